"""fastattn.nn.RotaryEmbedding."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import rotary
from fastattn.nn import RotaryEmbedding
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """As transformers' Llama computes it, the angles in float64."""
    dim = x.shape[-1]
    inv_freq = 1.0 / base ** (torch.arange(0, dim, 2).double() / dim)
    angles = positions.double()[..., None] * inv_freq
    cos, sin = (torch.cat([t, t], dim=-1)[..., None, :].to(x.dtype) for t in (angles.cos(), angles.sin()))
    half = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
    return x * cos + half * sin


def test_computes_what_transformers_does() -> None:
    x, module = normal(2, 9, 3, 16), RotaryEmbedding(16, max_positions=500)
    for positions in (None, torch.arange(491, 500), torch.randint(0, 500, (2, 9))):
        given = torch.arange(9) if positions is None else positions
        assert_close(module(x, positions), llama(x, given), llama(x.double(), given))


def test_base_and_part_of_a_head() -> None:
    x, module = normal(2, 9, 3, 16), RotaryEmbedding(8, base=500.0)
    out = module(x)
    expected = llama(x[..., :8], torch.arange(9), 500.0)
    assert_close(out[..., :8], expected, llama(x[..., :8].double(), torch.arange(9), 500.0))
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_interleaved() -> None:
    x, module = normal(2, 9, 3, 16), RotaryEmbedding(16, interleaved=True)
    order = torch.arange(16).view(8, 2).t().flatten()  # 0, 2, ... 1, 3, ...
    assert_close(
        module(x)[..., order],
        RotaryEmbedding(16)(x[..., order]),
        llama(x[..., order].double(), torch.arange(9)),
    )


def test_own_frequencies_and_scale() -> None:
    x, inv_freq = normal(1, 5, 1, 4), torch.tensor([0.5, 0.25])
    module = RotaryEmbedding(4, inv_freq=inv_freq, scale=2.0)
    angles = torch.arange(5)[:, None] * inv_freq
    assert torch.allclose(module(x), 2.0 * rotary(x, angles.cos(), angles.sin()))


def test_far_positions_are_exact() -> None:
    module = RotaryEmbedding(2, inv_freq=torch.tensor([0.7]), max_positions=200_000)
    angle = 199_999 * float(torch.tensor(0.7))
    assert module.cos[-1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def test_tables_stay_in_float32_and_move() -> None:
    module = RotaryEmbedding(16, max_positions=20)
    cos = module.cos.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        module.to(dtype)
        assert module.cos.dtype is torch.float32 and torch.equal(module.cos, cos)
    assert module.half()(normal(1, 5, 2, 16).half()).dtype is torch.float16
    assert module.to("meta").sin.device.type == "meta"
    assert torch.equal(module.to_empty(device="cpu").cos, cos)
    assert RotaryEmbedding(16, device="meta").cos.device.type == "meta"
    with torch.device("meta"):
        assert RotaryEmbedding(16).cos.device.type == "meta"


def test_it_has_no_state() -> None:
    module = RotaryEmbedding(16)
    assert not module.state_dict() and not list(module.parameters())
    x = normal(1, 5, 2, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
    assert repr(module) == (
        "RotaryEmbedding(16, base=10000.0, interleaved=False, max_positions=4096, scale=1.0)"
    )


def test_gradient_and_compile() -> None:
    module = RotaryEmbedding(16)
    x = normal(2, 5, 3, 16).requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for positions in (None, torch.tensor([4, 3, 2, 1, 0])):
        out, expected = compiled(x, positions), module(x, positions)
        assert torch.equal(out, expected)
        gradients = [torch.autograd.grad(y, x, upstream(y))[0] for y in (out, expected)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, "dim must be even and at least 2, got 7"),
        ({"dim": 0}, "dim must be even and at least 2, got 0"),
        ({"dim": 8, "base": 0.0}, "base must be positive, got 0.0"),
        ({"dim": 8, "max_positions": 0}, "max_positions must be at least 1, got 0"),
        ({"dim": 8, "inv_freq": torch.ones(3)}, r"inv_freq must have shape.*\[4\], got \[3\]"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)


def test_bad_input() -> None:
    module = RotaryEmbedding(8, max_positions=4)
    with pytest.raises(ValueError, match="x has 5 tokens, and max_positions is 4"):
        module(normal(1, 5, 2, 8))
    with pytest.raises(ValueError, match="must hold 5 positions or more, as positions ask, got 4"):
        module(normal(1, 1, 2, 8), torch.tensor([4]))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        module([1.0])
