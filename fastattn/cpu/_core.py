"""The compiled core, fastattn._C, and what to say where it is missing."""

import os
from types import ModuleType

import torch

core: ModuleType | None
missing: str | None
try:
    # Joins PyTorch's OpenMP pool, which importing torch has loaded.
    from fastattn import _C as core
except ImportError as error:
    core = None
    missing = (
        f"the compiled core is missing ({error}); install a C++ compiler (g++ or clang++), then "
        "install fastattn again"
    )
else:
    missing = None
    if name := os.environ.get("FASTATTN_CPU_ISA"):
        core.set_isa(name)

# The core's numbers for types.
TYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
