"""Launches the rotary kernel of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import TYPE_CODES, core, missing


def unsupported(call: Any) -> str | None:
    """Why this kernel refuses a call, or None."""
    if core is None:
        return missing
    if call[0].dtype not in TYPE_CODES:
        return f"has no kernel for {call[0].dtype}"
    return None


def rotary_fwd(call: Any) -> Tensor:
    """out [B, S, H, D]; backward is the same with the call's `inverse` turned over."""
    x = call[0]
    out = torch.empty(x.shape, dtype=x.dtype)
    core.rotary_fwd(call, out, torch.get_num_threads())
    return out
