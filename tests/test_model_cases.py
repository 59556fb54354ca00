"""The benchmark's cases of whole models, on tiny ones: what they cost, who runs them, and their check."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.__main__ import main
from fastattn.bench import measuring, suites
from fastattn.testing.cases import model
from fastattn.testing.cases.model import Architecture, ModelCase
from fastattn.testing.cases.own_model import OWN_MODELS, OwnModelCase
from fastattn.testing.cases.peers import LABELS, OURS, forget_compiled

pytest.importorskip("transformers")

GPT2 = Architecture("tiny-gpt2", "gpt2", 2, 32, 64, 4, 4, vocab=64, positions=32)
LLAMA = Architecture("tiny-llama", "llama", 2, 32, 48, 4, 2, vocab=64, positions=32)
CASES = [
    ModelCase(sizes, task, 12, batch, dtype=dtype)
    for sizes in (GPT2, LLAMA)
    for task, batch, dtype in (
        ("prefill", 1, "fp32"),
        ("prefill", 1, "bf16"),
        ("decode", 1, "fp32"),
        ("decode", 2, "bf16"),
        ("train", 1, "fp32"),
        ("train", 2, "fp32"),
    )
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Nothing here is large enough for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")


def _title(case: ModelCase) -> str:
    return f"{case.name} {case.dtype}"


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_every_peer_computes_the_same(case: ModelCase) -> None:
    x = case.make_inputs()
    for peer in (OURS, "transformers", "eager"):
        assert set(case.check(x, [peer]).errors) == {peer}
    assert {OURS, *case.peers} <= set(LABELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's, where a graph breaks
@pytest.mark.parametrize("task", ["prefill", "decode", "train"])
def test_compiled_models_compute_the_same(task: Any) -> None:
    case = ModelCase(LLAMA, task, 12)
    forget_compiled(["compiled"])
    assert case.check(case.make_inputs(), ["compiled"]).errors


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_ours_is_accelerated_and_the_others_are_not(case: ModelCase) -> None:
    x = case.make_inputs()
    for peer in (OURS, "transformers", "eager"):
        case.bind(peer, x)
    chosen = {peer: made.config._attn_implementation for peer, made in x.made.items()}
    assert chosen == {OURS: "fastattn", "transformers": "sdpa", "eager": "eager"}
    assert x.made["transformers"] is x.model
    packed = [name for name, p in x.made[OURS].named_parameters() if not p.is_contiguous()]
    assert bool(packed) == (case.task != "train" and case.architecture is GPT2)
    assert all(p.is_contiguous() for p in x.model.parameters())
    assert case.bind(OURS, x).run.args[0] is x.made[OURS]  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["prefill", "decode", "train"])
def test_what_is_wrong_is_caught(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(copied: Any, **_: Any) -> None:
        with torch.no_grad():
            copied.model.layers[1].mlp.down_proj.weight.mul_(1.01)

    monkeypatch.setattr(model, "accelerate", spoil)
    case = ModelCase(LLAMA, task, 12)
    with pytest.raises(AssertionError, match=r"^(logits|loss|gradient of .*): error"):
        case.check(case.make_inputs(), [OURS])


def test_a_large_step_is_checked_on_a_small_model() -> None:
    case = ModelCase(LLAMA._replace(layers=3), "train", 12, 2)
    x = case.make_inputs()
    assert not list(case.parts(x))
    found = case.check(x, [OURS, "transformers"])
    assert found.errors["transformers"] > 0.0
    assert set(found.seconds) == set(found.errors) == {OURS, "transformers"}


def test_every_step_has_the_same_context() -> None:
    case = ModelCase(LLAMA, "decode", 12)
    x = case.make_inputs()
    call = case.bind("transformers", x)
    first = call.run()
    assert torch.equal(call.run(), first)
    assert x.cache.get_seq_length() == 12


def test_the_truth_is_float64_throughout() -> None:
    exact = ModelCase(LLAMA, "prefill", 12).make_inputs().model
    model._make_exact(exact)
    assert {type(m).__name__ for m in exact.modules() if "Norm" in type(m).__name__} == {"RMSNorm"}
    assert {p.dtype for p in exact.parameters()} == {torch.float64}
    assert exact(torch.arange(5)[None]).logits.dtype is torch.float64


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_work_is_that_of_the_model(case: ModelCase) -> None:
    x = case.make_inputs()
    matrices = {
        name: p.numel() for name, p in x.model.named_parameters() if p.ndim == 2 and "wpe" not in name
    }
    sizes = case.architecture
    assert sum(matrices.values()) == sizes.layer_weights + sizes.head_weights
    if case.task == "decode":
        assert case.bytes == sum(t.numel() * t.element_size() for t in case.reads(x))
    pairs = {"prefill": 12 * 13 // 2, "decode": 13, "train": 12 * 13 // 2}[case.task] * case.batch * 2
    heads = case.batch * (12 if case.task == "train" else 1)
    products = 2 * (case.tokens * sizes.layer_weights + heads * sizes.head_weights)
    attention = 4 * 32 * pairs
    assert case.flops == (products + attention if case.task != "train" else 3 * products + 3.5 * attention)


@pytest.mark.parametrize("case", [case for case in CASES if case.task != "train"], ids=_title)
def test_our_own_models_compute_the_same(case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as they are asked: a step leaves its cache as it was."""
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "auto")
    own = OwnModelCase(case.architecture, case.task, case.length, case.batch, dtype=case.dtype)
    x = own.make_inputs()
    assert set(own.check(x, [OURS, "transformers"]).errors) == {OURS, "transformers"}
    call = own.bind(OURS, x)
    results = [call.run().clone() for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert own.name == f"models {case.name}"
    assert len({(case.name, case.dtype) for case in OWN_MODELS}) == 12


def test_the_sizes_are_those_of_models_that_people_run() -> None:
    assert model.GPT2.layer_weights + model.GPT2.head_weights == 123_532_032
    assert model.LLAMA.layer_weights + model.LLAMA.head_weights == 134_479_872
    names = [(case.name, case.dtype) for case in model.MODEL]
    assert len(set(names)) == len(names) == 14


def test_the_table_tells_tokens_per_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = suites.Suite(CASES[:3], budget=0.0, min_rounds=3, needs="transformers")
    monkeypatch.setitem(suites.SUITES, "model", (tiny, tiny))
    monkeypatch.setattr(measuring, "_roof", lambda: None)
    assert main(["bench", "--suite", "model"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens/s") == 3
    assert "vs transformers" in shown


def test_without_transformers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("fastattn.bench.importlib.import_module", absent)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--suite", "model"])
    assert stop.value.code == 2
    assert "--suite model needs the package transformers: pip install transformers" in capsys.readouterr().err
