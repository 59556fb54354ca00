"""rms_norm: against others' definitions, and bad input, one test each; more in test_norms.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import explain, rms_norm
from fastattn.testing.compare import assert_close


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {"x": x(2, 3, 8), "weight": x(8), "residual": x(2, 3, 8)}

BAD = {
    "x_scalar": ({"x": x()}, ValueError, r"x must have shape \[\.\.\., N\].*got \[\]"),
    "x_without_columns": ({"x": x(3, 0)}, ValueError, r"N at least 1, got \[3, 0\]"),
    "x_integers": ({"x": x(2, 3, 8).int()}, TypeError, "x must be float32.*got torch.int32"),
    "x_none": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "weight_size": ({"weight": x(7)}, ValueError, r"weight must have shape \[N\] = \[8\], got \[7\]"),
    "weight_half": ({"weight": x(8).half()}, TypeError, "weight must be in x's type.*torch.float16"),
    "weight_device": ({"weight": x(8, device="meta")}, ValueError, "weight must be on x's device cpu"),
    "residual_shape": ({"residual": x(8)}, ValueError, r"x's shape \[2, 3, 8\], got \[8\]"),
    "residual_type": ({"residual": x(2, 3, 8).half()}, TypeError, "residual must be in x's type"),
    "eps_negative": ({"eps": -1.0}, ValueError, "eps must be finite and at least 0, got -1.0"),
    "eps_none": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
    "offset_nan": ({"weight_offset": math.nan}, ValueError, "weight_offset must be finite, got nan"),
    "offset_inf": ({"weight_offset": math.inf}, ValueError, "weight_offset must be finite, got inf"),
    "offset_alone": ({"weight": None, "weight_offset": 1.0}, ValueError, "there is none; got 1.0"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        rms_norm(**GOOD | change)


@pytest.mark.parametrize("name", [name for name in BAD if name != "backend"])
def test_explain_refuses_the_same(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        explain(rms_norm, **GOOD | change)


def test_it_has_no_bias():
    with pytest.raises(TypeError, match="bias"):
        rms_norm(x(2, 8), x(8), bias=x(8))


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        rms_norm(x(2, 8), x(8), 1e-6)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_torch(backend, dtype):
    t, r, w = normal(30, 96, dtype=dtype), normal(30, 96, dtype=dtype, seed=1), normal(96, dtype=dtype)
    out, total = rms_norm(t, w, residual=r, eps=1e-4, backend=backend)
    assert torch.equal(total, t + r)
    base = F.rms_norm(t + r, (96,), w, 1e-4)
    assert_close(out, base, F.rms_norm(t.double() + r.double(), (96,), w.double(), 1e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_gemma(backend, dtype):
    """As transformers' GemmaRMSNorm computes it."""

    def gemma(t, w):
        wide = t if t.dtype is torch.float64 else t.float()
        out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (out * (1.0 + w.to(wide.dtype))).type_as(t)

    t, w = normal(30, 96, dtype=dtype), normal(96, dtype=dtype, seed=1) / 10
    out = rms_norm(t, w, weight_offset=1.0, backend=backend)
    assert_close(out, gemma(t, w), gemma(t.double(), w.double()))
