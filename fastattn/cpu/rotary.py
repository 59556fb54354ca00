"""Launches the rotary kernel of csrc/cpu."""

from typing import Any

import torch
from torch import Tensor

from fastattn.cpu._core import core
from fastattn.cpu._core import unsupported as unsupported


def rotary_fwd(call: Any) -> Tensor:
    """out [B, S, H, D]; backward is the same with the call's `inverse` turned over."""
    x = call[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    core.rotary_fwd(call, out, torch.get_num_threads())
    return out
