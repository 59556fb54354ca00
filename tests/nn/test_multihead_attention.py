"""fastattn.nn.MultiheadAttention against torch's, in all that torch's can do."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import accelerate
from fastattn.nn import MultiheadAttention
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

E, H, B, SQ, SK = 32, 4, 3, 6, 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's with the same parameters, none of them 0."""
    theirs = nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) / math.sqrt(parameter.shape[-1]))
    ours = MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def run(module: Any, inputs: list[Tensor], dtype: torch.dtype, **call: Any) -> dict[str, Tensor]:
    """Output, weights and the gradients of inputs, float masks and parameters.

    Inputs that are the same tensor are so in the call too, since torch and we look at that.
    """
    leaves = {id(x): x.detach().to(dtype, copy=True).requires_grad_() for x in inputs}
    for name, x in call.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[id(x)] = call[name] = x.detach().to(dtype, copy=True).requires_grad_()
    out, weights = module(*(leaves[id(x)] for x in inputs), **call)
    found = {"out": out, **({} if weights is None else {"weights": weights})}
    wanted = {f"d{i}": x for i, x in enumerate(leaves.values())}
    wanted |= {f"d{name}": x for name, x in module.named_parameters()}
    grads = torch.autograd.grad(
        list(found.values()), list(wanted.values()), [upstream(x) for x in found.values()],
        materialize_grads=True,
    )  # fmt: skip
    return {name: x.detach() for name, x in found.items()} | dict(zip(wanted, grads, strict=True))


def compare(
    inputs: list[Tensor], *, options: Any = None, dtype: torch.dtype = torch.float32, **call: Any
) -> None:
    ours, theirs = pair(dtype, **(options or {}))
    _, truth = pair(torch.float64, **(options or {}))
    found = run(ours, inputs, dtype, **call)
    # torch has no need to know what need_weights=False computes, and its fused path ignores the mask.
    base, truth = run(theirs, inputs, dtype, **call), run(truth, inputs, torch.float64, **call)
    assert found.keys() == truth.keys()
    for name in truth:
        # A parameter collects the gradients of all rows.
        terms = B * SK if name.startswith("d") else 1
        assert_close(found[name], base[name], truth[name], name, dtype, terms)


def inputs(kind: str = "cross", batch_first: bool = False, kdim: int = E, vdim: int = E) -> list[Tensor]:
    """query, key and value; "self": all one tensor, "cross": key is value."""

    def x(length: int, dim: int, seed: int) -> Tensor:
        return normal(*((B, length) if batch_first else (length, B)), dim, seed=seed)

    query = x(SQ, E, 11)
    if kind == "self":
        return [query] * 3
    key = x(SK, kdim, 12)
    return [query, key, key if kind == "cross" else x(SK, vdim, 13)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "kdim": {"kdim": 24, "vdim": 40},
    "kdim_no_bias": {"kdim": 24, "vdim": 40, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "bias_kv_zero": {"add_bias_kv": True, "add_zero_attn": True},
}
MODULES = [
    (x, kind) for x in OPTIONS for kind in ("self", "cross", "all") if kind == "all" or "kdim" not in x
]
IGNORE = normal(B, SK, seed=3) > 0.5
HIDE_2D = normal(SQ, SK, seed=4) > 0.5
HIDE_3D = normal(B * H, SQ, SK, seed=5) > 0.5
for _mask in (IGNORE, HIDE_2D, HIDE_3D):
    _mask[..., 0] = False
MASKS: dict[str, dict[str, Tensor]] = {
    "padding": {"key_padding_mask": IGNORE},
    "padding_float": {"key_padding_mask": normal(B, SK, seed=6)},
    "padding_infinite": {"key_padding_mask": torch.zeros(B, SK).masked_fill(IGNORE, -math.inf)},
    "2d": {"attn_mask": HIDE_2D},
    "2d_float": {"attn_mask": normal(SQ, SK, seed=7)},
    "3d": {"attn_mask": HIDE_3D},
    "3d_float": {"attn_mask": normal(B * H, SQ, SK, seed=8)},
    "both": {"key_padding_mask": IGNORE, "attn_mask": HIDE_3D},
    "both_float": {"key_padding_mask": normal(B, SK, seed=6), "attn_mask": normal(SQ, SK, seed=7)},
    "bool_and_float": {"key_padding_mask": IGNORE, "attn_mask": normal(SQ, SK, seed=7)},
    "float_and_bool": {"key_padding_mask": normal(B, SK, seed=6), "attn_mask": HIDE_2D},
}
weights_or_not = pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])


class TestAsTorch:
    @weights_or_not
    @pytest.mark.parametrize("batch_first", [False, True], ids=["sequence_first", "batch_first"])
    @pytest.mark.parametrize(("options", "kind"), MODULES)
    def test_modules(self, options: str, kind: str, batch_first: bool, need_weights: bool) -> None:
        given = {**OPTIONS[options], "batch_first": batch_first}
        dims = {name: given[name] for name in ("kdim", "vdim") if name in given}
        compare(inputs(kind, batch_first, **dims), options=given, need_weights=need_weights)

    @weights_or_not
    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    @pytest.mark.parametrize("options", ["plain", "bias_kv_zero"])
    @pytest.mark.parametrize("mask", MASKS)
    def test_masks(self, mask: str, options: str, need_weights: bool) -> None:
        compare(inputs(), options=OPTIONS[options], need_weights=need_weights, **MASKS[mask])

    @weights_or_not
    def test_weights_per_head(self, need_weights: bool) -> None:
        compare(inputs(), need_weights=need_weights, average_attn_weights=False)

    @weights_or_not
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("mask", [None, (SQ, SK), (H, SQ, SK)], ids=["none", "2d", "3d"])
    def test_without_a_batch(
        self, mask: tuple[int, ...] | None, batch_first: bool, need_weights: bool
    ) -> None:
        compare(
            [normal(SQ, E, seed=1), normal(SK, E, seed=2), normal(SK, E, seed=3)],
            options={"batch_first": batch_first},
            need_weights=need_weights,
            key_padding_mask=IGNORE[0],
            attn_mask=None if mask is None else normal(*mask) > 1.0,
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @weights_or_not
    def test_types(self, dtype: torch.dtype, need_weights: bool) -> None:
        compare(inputs("self"), dtype=dtype, need_weights=need_weights)

    @weights_or_not
    @pytest.mark.parametrize("seqlens", [(5, 5), (4, 7), (7, 4)])
    @pytest.mark.parametrize("padding", [False, True])
    def test_hint_of_causality(self, seqlens: tuple[int, int], padding: bool, need_weights: bool) -> None:
        """Aligned at the start."""
        sq, sk = seqlens
        ignore = torch.zeros(B, sk, dtype=torch.bool)
        ignore[1:, -1] = True
        compare(
            [normal(sq, B, E, seed=1), *[normal(sk, B, E, seed=2)] * 2],
            need_weights=need_weights,
            is_causal=True,
            attn_mask=torch.ones(sq, sk, dtype=torch.bool).triu(1),
            key_padding_mask=ignore if padding else None,
        )

    @pytest.mark.parametrize("options", ["plain", "bias_kv_zero"])
    @weights_or_not
    def test_causality_needs_no_mask(self, options: str, need_weights: bool) -> None:
        ours, theirs = pair(**OPTIONS[options])
        _, truth = pair(torch.float64, **OPTIONS[options])
        hidden = torch.ones(SQ, SK, dtype=torch.bool).triu(1)
        x = inputs()
        with torch.no_grad():
            out, _ = ours(*x, need_weights=need_weights, is_causal=True)
            base, _ = theirs(*x, attn_mask=hidden)
            true, _ = truth(*(y.double() for y in x), attn_mask=hidden)
        assert_close(out, base, true)

    @weights_or_not
    @pytest.mark.parametrize("mask", ["attn_mask", "key_padding_mask"])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_query_that_sees_nothing(self, mask: str, kind: str, need_weights: bool) -> None:
        """torch gives NaN."""
        ours, _ = pair()
        hidden = torch.zeros((SQ, SK) if mask == "attn_mask" else (B, SK), dtype=torch.bool)
        hidden[1] = True
        nothing = (1, slice(None)) if mask == "attn_mask" else (slice(None), 1)
        given = hidden if kind == "bool" else torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
        x = [y.requires_grad_() for y in inputs("all")]
        out, weights = ours(*x, need_weights=need_weights, average_attn_weights=False, **{mask: given})
        assert torch.equal(out[nothing], ours.out_proj.bias.expand_as(out[nothing]))
        if weights is not None:
            assert weights.isfinite().all()
            assert (weights[:, :, 1] if mask == "attn_mask" else weights[1]).eq(0).all()
        for grad in torch.autograd.grad(out.sum(), [*x, *ours.parameters()]):
            assert grad.isfinite().all()

    @weights_or_not
    def test_autocast(self, need_weights: bool) -> None:
        (ours, theirs), (_, truth) = pair(), pair(torch.float64)
        x = inputs("self")[0]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out, weights = ours(x, x, x, need_weights=need_weights)
            base, base_weights = theirs(x, x, x, need_weights=need_weights)
        with torch.no_grad():
            true_out, true_weights = truth(*[x.double()] * 3)
        assert out.dtype is base.dtype is torch.bfloat16
        assert_close(out, base, true_out, "out")
        if weights is not None:
            assert weights.dtype is base_weights.dtype
            assert_close(weights, base_weights, true_weights, "weights", torch.bfloat16)


class TestModule:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_first_values_and_state_dict(self, options: str) -> None:
        torch.manual_seed(5)
        theirs = nn.MultiheadAttention(E, H, **OPTIONS[options])
        torch.manual_seed(5)
        ours = MultiheadAttention(E, H, **OPTIONS[options])
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(mine, other)
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, nn.MultiheadAttention)

    def test_copies(self) -> None:
        ours, _ = pair(add_zero_attn=True)
        x = inputs()
        out, _ = ours(*x, need_weights=False)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(*x, need_weights=False)[0], out)

    def test_on_meta(self) -> None:
        module = MultiheadAttention(E, H, num_kv_heads=2, device="meta", dtype=torch.bfloat16)
        assert {x.device.type for x in module.parameters()} == {"meta"}
        assert {x.dtype for x in module.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_layout_of_the_output(self, batch_first: bool) -> None:
        """Contiguous, so that `view` works, whatever comes first."""
        ours, _ = pair(batch_first=batch_first)
        out, _ = ours(*inputs("self", batch_first), need_weights=False)
        assert out.is_contiguous()

    @weights_or_not
    @torch.no_grad()
    def test_dropout(self, need_weights: bool) -> None:
        """Values of 1, 0, 0, ... and identities around make the output show the weights."""
        n, p = 64, 0.25
        module = MultiheadAttention(n, 1, dropout=p, bias=False)
        module.in_proj_weight[2 * n :] = module.out_proj.weight[:] = torch.eye(n)
        query, key, value = normal(256, 1, n, seed=1), normal(n, 1, n, seed=2), torch.eye(n)[:, None]
        full, _ = module.eval()(query, key, value, need_weights=need_weights)
        torch.manual_seed(0)
        out, _ = module.train()(query, key, value, need_weights=need_weights)
        again, _ = module(query, key, value, need_weights=need_weights)
        kept = out != 0
        assert_close(out, (full * kept) / (1 - p), (full * kept).double() / (1 - p))
        # Five standard deviations of the share that was dropped.
        assert abs(kept.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
        assert not torch.equal(out, again)
        torch.manual_seed(0)
        assert torch.equal(module(query, key, value, need_weights=need_weights)[0], out)

    def test_no_dropout_in_training_is_evaluation(self) -> None:
        ours, _ = pair()
        x = inputs()
        assert torch.equal(ours.train()(*x, need_weights=False)[0], ours.eval()(*x, need_weights=False)[0])

    @weights_or_not
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("mask", [None, "padding", "both_float"])
    def test_compiles(self, mask: str | None, need_weights: bool) -> None:
        torch.compiler.reset()
        ours, _ = pair(dropout=0.1)
        call: dict[str, Any] = {"need_weights": need_weights, **(MASKS[mask] if mask else {})}
        ours.eval()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        expected = run(ours, inputs(), torch.float32, **call)
        for name, x in run(compiled, inputs(), torch.float32, **call).items():
            assert_close(
                x, expected[name.replace("_orig_mod.", "")], expected[name.replace("_orig_mod.", "")]
            )


class TestInTransformers:
    """torch's own layers, their self_attn swapped."""

    def layers(self, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
        torch.manual_seed(0)
        theirs = nn.TransformerEncoderLayer(E, H, 48, dropout=0.0, **options)
        ours = copy.deepcopy(theirs)
        ours.self_attn = MultiheadAttention(E, H, batch_first=options.get("batch_first", False))
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs, copy.deepcopy(theirs).double()

    @pytest.mark.parametrize("grad", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("mask", [None, "padding", "causal", "causal_padding"])
    def test_encoder_layer(
        self, mask: str | None, batch_first: bool, grad: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modules = self.layers(batch_first=batch_first)
        x = inputs("self", batch_first)[0]
        call: dict[str, Any] = {}
        if mask is not None and "causal" in mask:
            call = {"src_mask": torch.ones(SQ, SQ, dtype=torch.bool).triu(1), "is_causal": True}
        if mask is not None and "padding" in mask:
            call["src_key_padding_mask"] = torch.arange(SQ) >= torch.tensor([[SQ], [SQ - 2], [SQ - 1]])
        calls = []
        forward = MultiheadAttention.forward
        monkeypatch.setattr(
            MultiheadAttention, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
        )
        with torch.set_grad_enabled(grad):
            outs = [m.train(grad)(x.to(d), **call) for m, d in zip(modules, DTYPES, strict=True)]
        assert calls, "torch's fast path went past the module"
        assert_close(*(out.detach() for out in outs))

    @pytest.mark.usefixtures("default_backend")
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_encoder_that_nests(self) -> None:
        """In evaluation torch's encoder drops padding by nested tensors."""
        ours, theirs, truth = self.layers(batch_first=True)
        encoders = [
            nn.TransformerEncoder(x, 2, enable_nested_tensor=nested).eval()
            for x, nested in ((ours, False), (theirs, True), (truth, True))
        ]
        encoders[0].use_nested_tensor = True  # as it is where layers are swapped after construction
        padding = torch.arange(SQ) >= torch.tensor([[SQ], [SQ - 2], [SQ - 1]])
        x = inputs("self", batch_first=True)[0]
        with torch.no_grad():
            outs = [m(x.to(d), src_key_padding_mask=padding) for m, d in zip(encoders, DTYPES, strict=True)]
        assert_close(*outs)

    def test_accelerate_leaves_it_alone(self) -> None:
        both = nn.ModuleList(self.layers()[:2])
        with accelerate(both) as handle:
            ours, theirs = handle.report().of("attention")
        assert (ours.served, ours.note) == (False, "is fastattn's own")
        assert theirs.served

    def test_decoder_layer(self) -> None:
        torch.manual_seed(0)
        theirs = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0)
        ours = copy.deepcopy(theirs)
        ours.self_attn, ours.multihead_attn = MultiheadAttention(E, H), MultiheadAttention(E, H)
        ours.load_state_dict(theirs.state_dict())
        target, memory = inputs()[:2]
        hidden = nn.Transformer.generate_square_subsequent_mask(SQ)
        outs = [
            m(target.to(d), memory.to(d), tgt_mask=hidden.to(d), tgt_is_causal=True)
            for m, d in zip((ours, theirs, copy.deepcopy(theirs).double()), DTYPES, strict=True)
        ]
        assert_close(*(out.detach() for out in outs))


DTYPES = (torch.float32, torch.float32, torch.float64)
