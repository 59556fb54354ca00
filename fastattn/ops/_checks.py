"""Argument checks that ops share. Each names the argument, what was given and what is allowed."""

import torch
from torch import Tensor

from fastattn import dropout


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")


def check_type(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype is not q.dtype and x.dtype is not torch.float32:
        raise TypeError(f"{name} must be in q's type {q.dtype} or float32, got {x.dtype}")


def check_seed(seed: int | Tensor | None) -> Tensor:
    if seed is None:
        return dropout.draw_seed()
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.ndim != 0:
            raise TypeError(f"seed must be an int64 tensor of shape [], got {seed.dtype} {list(seed.shape)}")
        return seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    return torch.tensor(seed, dtype=torch.int64)
