"""The compiled core, fastattn._C, and what to say where it is missing."""

import importlib
import os
from typing import Any

import torch

core: Any = None
missing: str | None = None
try:
    # Joins PyTorch's OpenMP pool, which importing torch has loaded.
    core = importlib.import_module("fastattn._C")
except ImportError as error:
    missing = (
        f"the compiled core is missing ({error}); install a C++ compiler (g++ or clang++), then "
        "install fastattn again"
    )
else:
    if name := os.environ.get("FASTATTN_CPU_ISA"):
        core.set_isa(name)

# The core's numbers for types.
TYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The largest head dim that the kernels take (csrc/cpu/gemm.inl.h).
MAX_HEAD_DIM = 512


def unsupported(call: Any) -> str | None:
    """Why the kernels of an op that asks for nothing but a type refuse a call, or None."""
    if core is None:
        return missing
    dtype = call[0].dtype
    return None if dtype in TYPE_CODES else f"has no kernel for {dtype}"
