"""layer_norm: against torch's, and bad input, one test each; more in test_norms.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import explain, layer_norm
from fastattn.testing.compare import assert_close


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {"x": x(2, 3, 8), "weight": x(8), "bias": x(8), "residual": x(2, 3, 8)}

BAD = {
    "x_scalar": ({"x": x()}, ValueError, r"x must have shape \[\.\.\., N\].*got \[\]"),
    "x_without_columns": ({"x": x(3, 0)}, ValueError, r"N at least 1, got \[3, 0\]"),
    "x_integers": ({"x": x(2, 3, 8).int()}, TypeError, "x must be float32.*got torch.int32"),
    "x_complex": ({"x": x(2, 3, 8).cfloat()}, TypeError, "got torch.complex64"),
    "x_list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "weight_list": ({"weight": [1.0] * 8}, TypeError, "weight must be a tensor, got list"),
    "weight_size": ({"weight": x(7)}, ValueError, r"weight must have shape \[N\] = \[8\], got \[7\]"),
    "weight_rank": ({"weight": x(3, 8)}, ValueError, r"weight must have shape.*got \[3, 8\]"),
    "weight_one": ({"weight": x(1)}, ValueError, r"weight must have shape.*got \[1\]"),
    "weight_half": ({"weight": x(8).half()}, TypeError, "weight must be in x's type.*torch.float16"),
    "weight_double": ({"weight": x(8).double()}, TypeError, "weight must be in x's type.*float64"),
    "weight_device": ({"weight": x(8, device="meta")}, ValueError, "weight must be on x's device cpu"),
    "bias_number": ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "bias_size": ({"bias": x(9)}, ValueError, r"bias must have shape \[N\] = \[8\], got \[9\]"),
    "bias_half": ({"bias": x(8).half()}, TypeError, "bias must be in x's type"),
    "bias_device": ({"bias": x(8, device="meta")}, ValueError, "bias must be on x's device"),
    "residual_list": ({"residual": [1.0]}, TypeError, "residual must be a tensor, got list"),
    "residual_shape": ({"residual": x(3, 8)}, ValueError, r"x's shape \[2, 3, 8\], got \[3, 8\]"),
    "residual_type": ({"residual": x(2, 3, 8).half()}, TypeError, "residual must be in x's type"),
    "residual_device": ({"residual": x(2, 3, 8, device="meta")}, ValueError, "residual must be on x's dev"),
    "eps_negative": ({"eps": -1e-5}, ValueError, "eps must be finite and at least 0, got -1e-05"),
    "eps_nan": ({"eps": math.nan}, ValueError, "eps must be finite.*nan"),
    "eps_inf": ({"eps": math.inf}, ValueError, "eps must be finite.*inf"),
    "eps_none": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        layer_norm(**GOOD | change)


@pytest.mark.parametrize("name", [name for name in BAD if name != "backend"])
def test_explain_refuses_the_same(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        explain(layer_norm, **GOOD | change)


def test_explain():
    assert explain(layer_norm, **GOOD)[0].reason is None
    wide = {name: t.double() for name, t in GOOD.items()}
    assert "has no kernel for torch.float64" in str(explain(layer_norm, **wide))
    with pytest.raises(NotImplementedError, match=r"fastattn.layer_norm: no backend.*float64"):
        layer_norm(**wide)


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        layer_norm(*GOOD.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_torch(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    t, r, w, b = (torch.randn(n, 96, generator=generator).to(dtype) for n in (30, 30, 1, 1))
    w, b = w[0], b[0]
    out, total = layer_norm(t, w, b, residual=r, eps=1e-4, backend=backend)
    assert torch.equal(total, t + r)
    base = F.layer_norm(t + r, (96,), w, b, 1e-4)
    truth = F.layer_norm(t.double() + r.double(), (96,), w.double(), b.double(), 1e-4)
    assert_close(out, base, truth)


def test_shapes(backend):
    t = torch.randn(2, 3, 5, 8)
    assert layer_norm(t, backend=backend).shape == t.shape
    out, total = layer_norm(t[0, 0, 0], residual=t[0, 0, 1], backend=backend)
    assert out.shape == total.shape == (8,)
