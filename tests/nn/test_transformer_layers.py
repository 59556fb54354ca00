"""fastattn.nn's Transformer layers against torch's: outputs, every gradient, every constructor option."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

E, H, HIDDEN, B, ST, SM = 32, 4, 48, 3, 6, 9
KINDS = {
    "encoder": (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (TransformerDecoderLayer, nn.TransformerDecoderLayer),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's with the same parameters, none of them 0."""
    our_kind, their_kind = KINDS[kind]
    options = {"dropout": 0.0, **options}
    theirs = their_kind(E, H, HIDDEN, **copy.deepcopy(options))
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            spread = normal(*parameter.shape, seed=seed) / parameter.shape[-1] ** 0.5
            parameter.copy_(spread + (1.0 if parameter.ndim == 1 else 0.0))
    ours = our_kind(E, H, HIDDEN, **copy.deepcopy(options))
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(kind: str, batch_first: bool = False) -> list[Tensor]:
    lengths = (ST,) if kind == "encoder" else (ST, SM)
    return [normal(*((B, length) if batch_first else (length, B)), E, seed=20 + length) for length in lengths]


def run(module: Any, given: list[Tensor], dtype: torch.dtype, **call: Any) -> dict[str, Tensor]:
    """The output and the gradients of inputs and parameters."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in given]
    out = module(*leaves, **call)
    wanted = {f"d{i}": x for i, x in enumerate(leaves)}
    wanted |= {f"d{name}": x for name, x in module.named_parameters()}
    grads = torch.autograd.grad(out, list(wanted.values()), upstream(out))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def compare(kind: str, dtype: torch.dtype = torch.float32, call: Any = None, **options: Any) -> None:
    given = inputs(kind, options.get("batch_first", False))
    (ours, theirs), (_, wide) = pair(kind, dtype, **options), pair(kind, torch.float64, **options)
    found, base = (run(module, given, dtype, **(call or {})) for module in (ours, theirs))
    truth = run(wide, given, torch.float64, **(call or {}))
    assert found.keys() == truth.keys()
    for name in truth:
        # A parameter collects the gradients of all rows.
        terms = B * ST if name.startswith("d") else 1
        assert_close(found[name], base[name], truth[name], name, dtype, terms)


def square(x: Tensor) -> Tensor:
    return x.square()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_first": {"norm_first": True},
    "batch_first": {"batch_first": True},
    "both_first": {"norm_first": True, "batch_first": True},
    "no_bias": {"bias": False},
    "eps": {"layer_norm_eps": 0.1},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu", "norm_first": True},
    "F.gelu": {"activation": F.gelu},
    "GELU_tanh": {"activation": nn.GELU(approximate="tanh")},
    "SiLU": {"activation": nn.SiLU()},
    "tanh": {"activation": torch.tanh},
    "any_callable": {"activation": square, "norm_first": True},
    "with_parameters": {"activation": nn.PReLU()},
}


def hidden(sq: int, sk: int) -> Tensor:
    return torch.ones(sq, sk, dtype=torch.bool).triu(1)


def padded(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor([[length], [length - 2], [length - 1]])


CALLS: dict[str, list[dict[str, Any]]] = {
    "encoder": [
        {"src_mask": hidden(ST, ST)},
        {"src_mask": hidden(ST, ST), "is_causal": True},
        {"src_key_padding_mask": padded(ST)},
        {"src_mask": hidden(ST, ST), "src_key_padding_mask": padded(ST), "is_causal": True},
        {"src_mask": nn.Transformer.generate_square_subsequent_mask(ST)},
    ],
    "decoder": [
        {"tgt_mask": hidden(ST, ST), "tgt_is_causal": True},
        {"tgt_mask": hidden(ST, ST), "memory_mask": hidden(ST, SM)},
        {"memory_mask": hidden(ST, SM), "memory_is_causal": True},
        {"tgt_key_padding_mask": padded(ST), "memory_key_padding_mask": padded(SM)},
    ],
}


@every_kind
class TestAsTorch:
    @pytest.mark.parametrize("option", OPTIONS)
    def test_options(self, kind: str, option: str) -> None:
        compare(kind, **OPTIONS[option])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_types(self, kind: str, norm_first: bool, dtype: torch.dtype) -> None:
        compare(kind, dtype, norm_first=norm_first, activation="gelu")

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_masks(self, kind: str, norm_first: bool) -> None:
        for call in CALLS[kind]:
            wide = {
                name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
                for name, x in call.items()
            }
            given = inputs(kind)
            (ours, theirs), (_, truth) = pair(kind, norm_first=norm_first), pair(kind, torch.float64)
            truth.norm_first = norm_first
            outs = [
                module(*(x.to(dtype) for x in given), **masks).detach()
                for module, dtype, masks in (
                    (ours, torch.float32, call), (theirs, torch.float32, call), (truth, torch.float64, wide)
                )
            ]  # fmt: skip
            assert_close(*outs)

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_in_evaluation(self, kind: str, norm_first: bool) -> None:
        """Where torch's encoder takes a fast path of its own; dropout stops."""
        options = {"norm_first": norm_first, "batch_first": True}
        given = inputs(kind, batch_first=True)
        with torch.no_grad():
            ours, theirs = (x.eval() for x in pair(kind, dropout=0.3, **options))
            truth = pair(kind, torch.float64, dropout=0.3, **options)[1].eval()
            assert_close(ours(*given), theirs(*given), truth(*(x.double() for x in given)))

    def test_without_a_batch(self, kind: str) -> None:
        (ours, theirs), (_, truth) = pair(kind), pair(kind, torch.float64)
        given = [x[:, 0] for x in inputs(kind)]
        outs = (ours(*given), theirs(*given), truth(*(x.double() for x in given)))
        assert_close(*(out.detach() for out in outs))

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_autocast(self, kind: str, norm_first: bool) -> None:
        """The residual stream stays float32."""
        ours, theirs = pair(kind, norm_first=norm_first)
        truth = pair(kind, torch.float64, norm_first=norm_first)[1]
        given = inputs(kind)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                out, base = ours(*given), theirs(*given)
            assert out.dtype is base.dtype
            assert_close(out, base, truth(*(x.double() for x in given)), dtype=torch.bfloat16)


@every_kind
class TestModule:
    @pytest.mark.parametrize("option", OPTIONS)
    def test_first_values_and_state_dict(self, kind: str, option: str) -> None:
        our_kind, their_kind = KINDS[kind]
        torch.manual_seed(5)
        theirs = their_kind(E, H, HIDDEN, **OPTIONS[option])
        after = torch.rand(())
        torch.manual_seed(5)
        ours = our_kind(E, H, HIDDEN, **OPTIONS[option])
        assert torch.equal(torch.rand(()), after)
        assert isinstance(ours, their_kind)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(mine, other)
        theirs.load_state_dict(ours.state_dict())
        assert all(x.requires_grad and isinstance(x, nn.Parameter) for x in ours.parameters())

    def test_copies(self, kind: str) -> None:
        for option in ("gelu", "F.gelu", "any_callable", "with_parameters"):
            ours, _ = pair(kind, **OPTIONS[option])
            given = inputs(kind)
            out = ours(*given)
            for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
                assert torch.equal(other(*given), out)

    def test_on_meta_and_in_other_types(self, kind: str) -> None:
        module = KINDS[kind][0](E, H, HIDDEN, device="meta", dtype=torch.bfloat16)
        assert {x.device.type for x in module.parameters()} == {"meta"}
        assert {x.dtype for x in module.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize("activation", ["relu", square])
    def test_dropout(self, kind: str, activation: str | Callable[[Tensor], Tensor]) -> None:
        """By torch's seed, in training alone."""
        ours, _ = pair(kind, dropout=0.5, activation=activation)
        given = inputs(kind)
        torch.manual_seed(0)
        first, second = ours(*given), ours(*given)
        torch.manual_seed(0)
        assert torch.equal(ours(*given), first)
        assert not torch.equal(first, second)
        ours.eval()
        assert torch.equal(ours(*given), ours(*given))

    def test_save_memory(self, kind: str) -> None:
        saving = KINDS[kind][0](E, H, HIDDEN, save_memory=True, dropout=0.0)
        ours, _ = pair(kind)
        saving.load_state_dict(ours.state_dict())
        given = inputs(kind)
        found, expected = (run(module, given, torch.float32) for module in (saving, ours))
        for name, x in expected.items():
            assert_close(found[name], x, x, name)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("option", ["plain", "gelu", "F.gelu", "SiLU", "tanh", "any_callable"])
    def test_compiles(self, kind: str, option: str) -> None:
        torch.compiler.reset()
        ours, _ = pair(kind, **OPTIONS[option])
        given = inputs(kind)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        expected = run(ours, given, torch.float32)
        for name, x in run(compiled, given, torch.float32).items():
            eager = expected[name.replace("_orig_mod.", "")]
            assert_close(x, eager, eager, name)

    def test_bad_arguments(self, kind: str) -> None:
        make = KINDS[kind][0]
        with pytest.raises(ValueError, match=r"activation must be None or one of.*'swish'"):
            make(E, H, activation="swish")
        with pytest.raises((ValueError, AssertionError), match="embed_dim"):
            make(E, 5)


class TestInTransformers:
    """Inside torch's own stacks."""

    @pytest.mark.parametrize("training", [False, True])
    def test_encoder(self, training: bool) -> None:
        x, padding = inputs("encoder", batch_first=True)[0], padded(ST)
        (ours, theirs), (_, truth) = (
            pair("encoder", d, batch_first=True) for d in (torch.float32, torch.float64)
        )
        encoders = [
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
            for layer in (ours, theirs, truth)
        ]
        assert type(encoders[0].layers[1]) is TransformerEncoderLayer
        with torch.set_grad_enabled(training):
            outs = [m(x.to(m.layers[0].linear1.weight.dtype), src_key_padding_mask=padding) for m in encoders]
        assert_close(*(out.detach()[~padding] for out in outs))

    def test_transformer(self) -> None:
        """Both stacks, causal, as torch.nn.Transformer builds and calls them."""
        x, memory = inputs("decoder")
        mask = nn.Transformer.generate_square_subsequent_mask(ST)
        outs = []
        for at, dtype in ((0, torch.float32), (1, torch.float32), (1, torch.float64)):
            encoder = nn.TransformerEncoder(pair("encoder", dtype)[at], 2, enable_nested_tensor=False)
            decoder = nn.TransformerDecoder(pair("decoder", dtype)[at], 2)
            whole = nn.Transformer(E, H, custom_encoder=encoder, custom_decoder=decoder)
            outs.append(
                whole(memory.to(dtype), x.to(dtype), tgt_mask=mask.to(dtype), tgt_is_causal=True).detach()
            )
        assert_close(*outs)

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_jagged(self, norm_first: bool) -> None:
        """Sequences of different lengths, without padding, give what each gives alone."""
        ours, _ = pair("encoder", norm_first=norm_first, batch_first=True)
        rows = [normal(length, E, seed=length) for length in (3, 6, 1)]
        out = ours(torch.nested.nested_tensor(rows, layout=torch.jagged))
        for found, x in zip(out.unbind(), rows, strict=True):
            expected = ours(x[None])[0].detach()
            assert_close(found.detach(), expected, expected)

    def test_the_attention_is_ours(self) -> None:
        decoder = TransformerDecoderLayer(E, H)
        assert type(decoder.self_attn) is type(decoder.multihead_attn) is MultiheadAttention
