"""fastattn.nn's linear layers: what they compute, their keys, their numbers."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import nn as ours
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

E, HIDDEN, CLASSES = 24, 40, 30


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """A module of ours written in plain PyTorch, on the same parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        m: Any = self.module
        if isinstance(m, ours.LinearCrossEntropyLoss):
            ignore = -100 if m.ignore_index is None else m.ignore_index
            weight = None if m.weight is None else m.weight.to(x.dtype)
            return F.cross_entropy(
                m.linear(x).flatten(0, 1), other.flatten(), weight, ignore_index=ignore,
                reduction=m.reduction, label_smoothing=m.label_smoothing,
            )  # fmt: skip
        if isinstance(m, ours.Linear):
            out = F.linear(x, m.weight, m.bias)
            out = out if m.activation is None else getattr(F, m.activation)(out)
        elif isinstance(m, ours.FeedForward):
            out = m.down_proj(getattr(F, m.activation)(m.up_proj(x)))
        else:
            out = m.down_proj(getattr(F, m.activation)(m.gate_proj(x)) * m.up_proj(x))
        return out if other is None else other + out


def run(module: nn.Module, x: Tensor, other: Tensor | None) -> dict[str, Tensor]:
    """The output and the gradients of x and the parameters."""
    x = x.clone().requires_grad_()
    out = module(x) if other is None else module(x, other)
    wanted = {"dx": x, **{f"d{name}": p for name, p in module.named_parameters()}}
    grads = torch.autograd.grad(out, list(wanted.values()), upstream(out) + 1)
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def compare(module: nn.Module, x: Tensor, other: Tensor | None = None) -> None:
    plain = Plain(module)
    found, base = run(module, x, other), run(plain, x, other)
    wide = other.double() if other is not None and other.is_floating_point() else other
    truth = run(plain.double(), x.double(), wide)
    for ours_, base_, truth_, name in zip(found.values(), base.values(), truth.values(), found, strict=True):
        assert_close(ours_, base_, truth_, name, x.dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestValues:
    def test_linear(self, dtype: torch.dtype, bias: bool, residual: bool) -> None:
        for activation in (None, "relu", "gelu"):
            module = ours.Linear(E, HIDDEN, bias, dtype=dtype, activation=activation)
            compare(module, normal(2, 5, E).to(dtype), normal(2, 5, HIDDEN).to(dtype) if residual else None)

    def test_feed_forward(self, dtype: torch.dtype, bias: bool, residual: bool) -> None:
        for activation, save_memory in (("gelu", False), ("relu", True)):
            module = ours.FeedForward(E, HIDDEN, activation, bias=bias, save_memory=save_memory, dtype=dtype)
            x = normal(2, 5, E).to(dtype)
            compare(module, x, x.flip(0) if residual else None)

    def test_gated_feed_forward(self, dtype: torch.dtype, bias: bool, residual: bool) -> None:
        for activation, save_memory in (("silu", False), ("gelu", True)):
            module = ours.GatedFeedForward(
                E, HIDDEN, activation, bias=bias, save_memory=save_memory, dtype=dtype
            )
            x = normal(2, 5, E).to(dtype)
            compare(module, x, x.flip(0) if residual else None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "label_smoothing": 0.1},
        {"weight": torch.arange(1.0, CLASSES + 1), "ignore_index": 3},
    ],
    ids=str,
)
def test_linear_cross_entropy_loss(options: dict[str, Any], reduction: str) -> None:
    target = torch.randint(0, CLASSES, (2, 5), generator=torch.Generator().manual_seed(0))
    target[0, 1] = options.get("ignore_index", -100)
    module = ours.LinearCrossEntropyLoss(E, CLASSES, reduction=reduction, **options)
    compare(module, normal(2, 5, E), target)


def test_z_loss_and_softcap_reach_the_loss() -> None:
    target = torch.randint(0, CLASSES, (7,))
    x = normal(7, E)
    plain = ours.LinearCrossEntropyLoss(E, CLASSES)
    for options in ({"z_loss": 0.5}, {"softcap": 0.1}):
        other = ours.LinearCrossEntropyLoss(E, CLASSES, **options)
        other.load_state_dict(plain.state_dict())
        assert not torch.equal(plain(x, target), other(x, target))


class TestAsTorch:
    def test_linear(self) -> None:
        torch.manual_seed(1)
        theirs = nn.Linear(E, HIDDEN)
        torch.manual_seed(1)
        mine = ours.Linear(E, HIDDEN, activation="relu")
        assert isinstance(mine, nn.Linear) and "activation=relu" in repr(mine)
        self.same_state(mine, theirs)

    @pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has none")
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("weight", [None, torch.ones(CLASSES)], ids=["plain", "weighted"])
    def test_linear_cross_entropy_loss(self, weight: Tensor | None, bias: bool) -> None:
        torch.manual_seed(1)
        theirs = nn.LinearCrossEntropyLoss(E, CLASSES, bias=bias, weight=weight)
        torch.manual_seed(1)
        self.same_state(ours.LinearCrossEntropyLoss(E, CLASSES, bias=bias, weight=weight), theirs)

    def same_state(self, mine: nn.Module, theirs: nn.Module) -> None:
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for x, y in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(x, y)
        theirs.load_state_dict(mine.state_dict())


def test_keys() -> None:
    """Those of GatedFeedForward are Llama's."""
    assert list(ours.FeedForward(E, HIDDEN).state_dict()) == [
        "up_proj.weight", "up_proj.bias", "down_proj.weight", "down_proj.bias"
    ]  # fmt: skip
    assert list(ours.GatedFeedForward(E, HIDDEN).state_dict()) == [
        "gate_proj.weight", "up_proj.weight", "down_proj.weight"
    ]  # fmt: skip


MODULES = {
    "Linear": lambda: ours.Linear(E, E, activation="gelu"),
    "FeedForward": lambda: ours.FeedForward(E, HIDDEN, dropout=0.3, hidden_dropout=0.2),
    "GatedFeedForward": lambda: ours.GatedFeedForward(E, HIDDEN, dropout=0.3, hidden_dropout=0.2),
}


@pytest.mark.parametrize("kind", MODULES)
class TestModules:
    def test_copies(self, kind: str) -> None:
        module = MODULES[kind]().eval()
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(normal(3, E)), module(normal(3, E)))

    def test_dropout_stops_in_evaluation(self, kind: str) -> None:
        module, x = MODULES[kind](), normal(9, E)
        torch.manual_seed(0)
        first, second = module(x), module(x)
        torch.manual_seed(0)
        assert torch.equal(module(x), first)
        assert torch.equal(first, second) is (kind == "Linear")
        module.eval()
        assert torch.equal(module(x), module(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiles(self, kind: str) -> None:
        torch.compiler.reset()
        module = MODULES[kind]().eval()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        expected = run(module, normal(3, E), None)
        for x, y in zip(run(compiled, normal(3, E), None).values(), expected.values(), strict=True):
            assert torch.equal(x, y)


def test_bad_arguments() -> None:
    for make in (ours.FeedForward, ours.GatedFeedForward):
        with pytest.raises(ValueError, match="activation must be None or one of"):
            make(E, HIDDEN, "swish")
        with pytest.raises(ValueError, match=r"hidden_dropout must be in \[0, 1\), got 1.0"):
            make(E, HIDDEN, hidden_dropout=1.0)
    with pytest.raises(ValueError, match="activation must be None or one of"):
        ours.Linear(E, E, activation="swish")
    for options, message in (
        ({"out_features": (2,)}, r"out_features must be \(\)"),
        ({"options": object()}, "options must be None"),
        ({"reduction": "average"}, "reduction must be 'mean', 'sum' or 'none'"),
        ({"weight": torch.ones(3)}, r"weight must have shape \[30\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.LinearCrossEntropyLoss(E, CLASSES, **options)
