"""The cases of the benchmark: what they cost, who runs them, and the check that comes before the clock."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.testing.cases import attention_varlen
from fastattn.testing.cases.attention import AttentionCase
from fastattn.testing.cases.attention_decode import DecodeCase
from fastattn.testing.cases.attention_varlen import VarlenCase
from fastattn.testing.cases.case import Case, bind_read, reason
from fastattn.testing.cases.feed_forward import FeedForwardCase
from fastattn.testing.cases.gated_feed_forward import GatedCase
from fastattn.testing.cases.layer_norm import LayerNormCase
from fastattn.testing.cases.linear import LinearCase
from fastattn.testing.cases.linear_cross_entropy import CrossEntropyCase
from fastattn.testing.cases.peers import COMPILED, LABELS, OURS, Unavailable, label
from fastattn.testing.cases.rms_norm import RMSNormCase
from fastattn.testing.cases.rotary import RotaryCase

FULL = AttentionCase(2, 3, 4, 4, 8)
TRAINING = AttentionCase(1, 2, 8, 8, 8, causal=True, backward=True)
PACKED = VarlenCase((3, 9, 1), 2, 8)
CACHED = DecodeCase(2, 4, 2, 32, 8)
LINEAR = LinearCase(200, 12, 150, "gelu")
MLP = FeedForwardCase(200, 12, 150)
SWIGLU = GatedCase(200, 12, 150)
LOSS = CrossEntropyCase(300, 12, 150)
LAYER_NORM = LayerNormCase(300, 8)
RMS_NORM = RMSNormCase(5, 8)
ROTARY = RotaryCase(2, 40, 3, 8)

CASES = [
    FULL,
    TRAINING,
    replace(FULL, causal=True, dtype="fp16"),
    replace(FULL, batch=1, nheads=4, nheads_k=2, masked=True, dtype="bf16"),
    AttentionCase(1, 2, 1, 32, 8),
    PACKED,
    replace(PACKED, causal=False, dtype="bf16"),
    replace(PACKED, backward=True),
    CACHED,
    replace(CACHED, page_size=4, dtype="bf16"),
    replace(CACHED, dtype="int8"),
    *(
        replace(case, rows=rows, backward=backward, dtype=dtype)
        for case in (LINEAR, MLP, SWIGLU, LOSS)
        for rows, backward, dtype in ((1, False, "fp32"), (3, False, "bf16"), (300, True, "fp32"))
    ),
    LAYER_NORM,
    # Not in bf16: PyTorch adds up its dbias in bf16, one share a thread, and may break the rule.
    replace(LAYER_NORM, backward=True),
    RMS_NORM,
    replace(RMS_NORM, backward=True),
    ROTARY,
    replace(ROTARY, backward=True, dtype="bf16"),
    replace(ROTARY, interleaved=True),
]


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_every_peer_computes_the_same(case: Case[Any]) -> None:
    """Each is held to the error rule in turn; those that compile have a test of their own."""
    x = case.make_inputs()
    for peer in (OURS, *case.peers):
        if peer in COMPILED:
            continue
        found = case.check(x, [peer])
        assert set(found.errors) == {peer}
        assert found.seconds[peer] > 0


def test_compiled_peers_compute_the_same() -> None:
    case = AttentionCase(1, 2, 160, 160, 16, causal=True)
    for peer in COMPILED:
        assert case.check(case.make_inputs(), [peer]).errors


def test_flex_says_that_it_has_no_backward() -> None:
    found = TRAINING.check(TRAINING.make_inputs(), [OURS, "flex"])
    assert found.skipped == {"flex": "FlexAttention has no backward on CPUs"}


def test_scores_that_do_not_fit_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.testing.cases.peers._free_memory", lambda: 1000)
    found = FULL.check(FULL.make_inputs(), [OURS, "sdpa", "math", "eager"])
    assert set(found.errors) == {OURS, "sdpa"}
    assert set(found.skipped) == {"math", "eager"}
    assert "memory are free" in found.skipped["math"]


def test_the_check_sees_every_output() -> None:
    """A peer that is right but for one number is caught."""
    x = TRAINING.make_inputs()
    assert set(TRAINING.check(x, ["sdpa", "math"]).errors) == {"sdpa", "math"}
    broken = x._replace(v=x.v.clone())
    broken.v[0, 3, 1, 2] = float("nan")
    with pytest.raises(AssertionError, match="not finite"):
        TRAINING.check(broken, ["sdpa"])


@pytest.mark.parametrize(
    "case", [FULL, PACKED, CACHED, LINEAR, MLP, SWIGLU, LOSS, ROTARY], ids=lambda case: case.op
)
def test_what_is_wrong_is_caught(case: Case[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(type(case).__module__)
    right = getattr(module.op, case.op)
    monkeypatch.setattr(module.op, case.op, lambda *args, **kwargs: right(*args, **kwargs) + 0.01)
    with pytest.raises(AssertionError, match="out: error"):
        case.check(case.make_inputs(), [OURS])


@pytest.mark.parametrize("case", [LINEAR, MLP, SWIGLU, LOSS], ids=lambda case: case.op)
def test_the_check_sees_every_gradient(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each, some numbers: one that is wrong all over is caught, and named."""
    case = replace(case, backward=True)
    x = case.make_inputs()
    call = case.bind("eager", x)
    for wrong in call.names:

        def spoil(raw: Any, wrong: str = wrong) -> Any:
            return tuple(t + (name == wrong) for name, t in zip(call.names, call.result(raw), strict=True))

        broken = call._replace(result=spoil)
        monkeypatch.setattr(type(case), "bind", lambda self, peer, x, broken=broken: broken)
        with pytest.raises(AssertionError, match=f"^{wrong}: error"):
            case.check(x, ["eager"])


def test_flops_count_products() -> None:
    assert LINEAR.flops == 2 * 200 * 12 * 150
    assert MLP.flops == 2 * LINEAR.flops
    assert replace(SWIGLU, backward=True).flops == 9 * LINEAR.flops
    assert LOSS.flops == 2 * 300 * 12 * 150
    assert LINEAR.bytes == 4 * (200 * 12 + 12 * 150 + 200 * 150)
    assert LOSS.bytes == 4 * (300 * 12 + 12 * 150 + 1)


def test_flops_count_visible_pairs() -> None:
    assert FULL.flops == 4 * 2 * 3 * 16 * 8
    assert replace(FULL, causal=True).flops == 4 * 2 * 3 * 10 * 8
    assert replace(FULL, backward=True).flops == FULL.flops * 3.5
    assert replace(PACKED, causal=False).flops == 4 * 2 * (9 + 81 + 1) * 8
    assert PACKED.flops == 4 * 2 * (6 + 45 + 1) * 8
    assert CACHED.flops == 4 * 2 * 4 * 32 * 8
    assert replace(LAYER_NORM, backward=True).flops == 3 * LAYER_NORM.flops


def test_bytes_count_each_tensor_once() -> None:
    assert AttentionCase(1, 2, 1, 100, 8, "bf16").bytes == 2 * 2 * 8 * (1 + 100 + 100 + 1)
    assert PACKED.bytes == 4 * 4 * 13 * 2 * 8
    assert replace(PACKED, backward=True).bytes == 2 * PACKED.bytes
    for rows in (LAYER_NORM, RMS_NORM, ROTARY):
        for case in (rows, replace(rows, dtype="bf16", backward=True)):
            assert case.bytes == sum(t.numel() * t.element_size() for t in case.reads(case.make_inputs()))
    for case in (CACHED, replace(CACHED, dtype="int8"), replace(CACHED, page_size=4, dtype="bf16")):
        x = case.make_inputs()
        read = sum(t.numel() * t.element_size() for t in case.reads(x))
        assert case.bytes == read + 2 * x.q.numel() * x.q.element_size()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_what_must_be_cold_is_more_than_the_caches_hold(
    case: Case[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastattn.testing.cases.case._last_level_cache", lambda: 4 * case.bytes)
    assert len(case.make_copies()) == (12 if case.is_bandwidth_bound else 1)


def test_pages_are_in_no_order_and_all_of_them_are_read() -> None:
    x = replace(CACHED, page_size=4).make_inputs()
    assert x.block_table is not None
    pages = x.block_table.flatten()
    assert sorted(pages.tolist()) == list(range(len(x.k_cache)))
    assert pages.tolist() != sorted(pages.tolist())


def test_a_plain_read_passes_over_the_cache() -> None:
    spans = []

    class Core:
        @staticmethod
        def read_pass(address: int, size: int, threads: int) -> None:
            spans.append((address, size))

    x = CACHED.make_inputs()
    bind_read(Core, CACHED.reads(x))()  # type: ignore[arg-type]
    assert spans == [(t.data_ptr(), t.numel() * 4) for t in (x.k_cache, x.v_cache)]


def test_lengths_are_the_same_in_every_run() -> None:
    lengths = attention_varlen.VARLEN[0].lengths
    assert len(lengths) == 16
    assert (min(lengths), max(lengths)) == (32, 2048)
    assert sum(lengths) == 19925
    assert all(case.lengths == lengths for case in attention_varlen.VARLEN)


def test_reasons_are_one_line() -> None:
    assert reason(Unavailable("why\nmore")) == "why"
    assert reason(RuntimeError("why\nmore")) == "RuntimeError: why"
    assert reason(AssertionError()) == "AssertionError: "


def test_labels() -> None:
    assert {peer for case in CASES for peer in case.peers} <= set(LABELS)
    assert label("sdpa") == "SDPA"
    assert label("another") == "another"
    assert torch.float64 not in {case.torch_dtype for case in CASES}
