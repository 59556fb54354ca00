"""fastattn.nn.LayerNorm and RMSNorm against torch's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.nn import LayerNorm, RMSNorm
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

PAIRS = [(LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)]
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=["layer", "rms"])
each = pytest.mark.parametrize("module", [LayerNorm, RMSNorm], ids=["layer", "rms"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(module: Any, dtype: torch.dtype) -> Any:
    """With parameters none of which is 0 or 1."""
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=seed))
    return module.to(dtype)


def run(module: Any, x: Tensor, residual: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients; torch's modules get the sum as their input."""
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    if residual is None or isinstance(module, LayerNorm | RMSNorm):
        found = module(*leaves)
    else:
        total = leaves[0] + leaves[1]
        found = module(total), total
    outputs = (found,) if isinstance(found, Tensor) else found
    wanted = dict(module.named_parameters()) | {f"x{i}": t for i, t in enumerate(leaves)}
    grads = torch.autograd.grad(outputs, list(wanted.values()), [upstream(t) for t in outputs])
    named = {f"out{i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


@pairs
@pytest.mark.parametrize("shape", [24, (24,), (4, 6), [2, 3, 4]], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_what_torchs_does(
    ours: Any, theirs: Any, shape: Any, affine: bool, with_residual: bool, dtype: torch.dtype
) -> None:
    options = {"eps": 1e-3, "elementwise_affine": affine}
    sizes = (shape,) if isinstance(shape, int) else shape
    x = normal(3, 5, *sizes).to(dtype)
    residual = normal(3, 5, *sizes, seed=1).to(dtype) if with_residual else None

    def results(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        given = (t if t is None else t.to(dtype) for t in (x, residual))
        return run(filled(module(shape, **options), dtype), *given)

    found, base, truth = results(ours, dtype), results(theirs, dtype), results(theirs, torch.float64)
    assert found.keys() == truth.keys()
    for name, t in found.items():
        assert t.dtype is dtype
        assert_close(t, base[name], truth[name], name)


@pairs
def test_state_dict_and_repr_are_torchs(ours: Any, theirs: Any) -> None:
    for options in ({}, {"elementwise_affine": False}, {"eps": 0.1, "dtype": torch.bfloat16}):
        mine, other = ours(8, **options), theirs(8, **options)
        assert isinstance(mine, theirs)
        assert {k: (t.shape, t.dtype) for k, t in mine.state_dict().items()} == {
            k: (t.shape, t.dtype) for k, t in other.state_dict().items()
        }
        other.load_state_dict(mine.state_dict())
        mine.load_state_dict(other.state_dict())
        for name, p in mine.named_parameters():
            assert torch.equal(p, other.get_parameter(name))
        assert repr(other)[:-1] in repr(mine)


def test_layer_norm_without_bias() -> None:
    assert list(LayerNorm(8, bias=False).state_dict()) == ["weight"]
    module, x = LayerNorm(8, bias=False), normal(3, 8)
    assert torch.allclose(module(x), nn.LayerNorm(8, bias=False)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_eps_is_torchs(dtype: torch.dtype) -> None:
    """It shows in small inputs."""
    x = (normal(3, 8) * 1e-4).to(dtype)
    truth = nn.RMSNorm(8, eps=torch.finfo(torch.float32).eps, dtype=torch.float64)
    with torch.no_grad():
        assert_close(RMSNorm(8, dtype=dtype)(x), nn.RMSNorm(8, dtype=dtype)(x), truth(x.double()))


def test_weight_offset() -> None:
    """Gemma's weights start at 0."""
    module, plain, x = RMSNorm(8, weight_offset=1.0), RMSNorm(8), normal(3, 8)
    assert (module.weight == 0).all() and (plain.weight == 1).all()
    assert torch.equal(module(x), plain(x))
    assert "weight_offset=1.0" in repr(module)
    with pytest.raises(ValueError, match=r"weight_offset needs elementwise_affine=True, got 1\.0"):
        RMSNorm(8, elementwise_affine=False, weight_offset=1.0)


@each
def test_bad_input(module: Any) -> None:
    norm = module((4, 6))
    with pytest.raises(ValueError, match=r"must end in normalized_shape \(4, 6\), got \[2, 6, 4\]"):
        norm(normal(2, 6, 4))
    with pytest.raises(ValueError, match=r"residual must end in normalized_shape.*got \[24\]"):
        norm(normal(2, 4, 6), normal(24))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        norm([1.0])
    with pytest.raises(ValueError, match="residual must have x's shape"):
        norm(normal(2, 4, 6), normal(3, 4, 6))


@each
@pytest.mark.parametrize("shape", [8, (2, 4)], ids=str)
def test_compile(module: Any, shape: Any) -> None:
    norm = module(shape)
    sizes = (shape,) if isinstance(shape, int) else shape
    x, residual = normal(3, *sizes), normal(3, *sizes, seed=1)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for given in ((x,), (x, residual)):
        expected, found = run(norm, *given), run_compiled(compiled, norm, *given)
        for name, t in expected.items():
            assert torch.equal(found[name], t), name


def run_compiled(compiled: Any, norm: Any, *given: Tensor) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in given]
    found = compiled(*leaves)
    outputs = (found,) if isinstance(found, Tensor) else found
    wanted = dict(norm.named_parameters()) | {f"x{i}": t for i, t in enumerate(leaves)}
    grads = torch.autograd.grad(outputs, list(wanted.values()), [upstream(t) for t in outputs])
    named = {f"out{i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


@each
def test_autocast_keeps_the_inputs_type(module: Any) -> None:
    norm = module(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(normal(3, 8)).dtype is torch.float32
        assert norm(normal(3, 8).bfloat16()).dtype is torch.bfloat16


def test_in_torchs_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    mine = copy.deepcopy(layer)
    for name in ("norm1", "norm2"):
        norm = LayerNorm(16)
        norm.load_state_dict(getattr(layer, name).state_dict())
        setattr(mine, name, norm)
    x = normal(2, 5, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(mine(x), layer(x), atol=1e-5)


@each
def test_copies_and_moves(module: Any) -> None:
    norm = filled(module(8), torch.float32)
    x = normal(3, 8)
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))
    assert norm.to("meta").weight.device.type == "meta"
