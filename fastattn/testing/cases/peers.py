"""Other ways to compute attention in PyTorch: who is timed beside us.

Each takes q, k, v [B, H, S, D] and prepares what a user would prepare once; what it returns is timed.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

OURS = "fastattn"

Attend = Callable[[Tensor, Tensor, Tensor], Any]
# q, k, v, the mask (bool, broadcasts to the scores, True = attend) and causal, for Sq = Sk.
Peer = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Attend]

# By name: how tables call it, and what it is.
LABELS = {
    "fastattn": ("fastattn", "this library, as a user calls it"),
    "sdpa": (
        "SDPA",
        "torch's scaled_dot_product_attention, its own choice; pages are gathered first",
    ),
    "flash": ("flash", "scaled_dot_product_attention, told to use its flash kernel"),
    "math": ("math", "scaled_dot_product_attention, told to use its math kernel, which stores the scores"),
    "eager": ("eager", "one line of PyTorch after the other; attention stores its scores, a loss its logits"),
    "compiled": ("compiled", "eager under torch.compile, compiled before the clock starts"),
    "flex": ("flex", "FlexAttention under torch.compile, compiled before the clock starts"),
    "padded": ("SDPA padded", "SDPA on the sequences padded to the longest, with a mask; padding is free"),
    "loop": ("SDPA loop", "SDPA on one sequence after the other"),
    "fastattn bf16": ("fastattn bf16", "this library on the same keys and values in bfloat16"),
    "transformers": ("transformers", "the model as transformers runs it, with torch's attention"),
    "torch": ("PyTorch", "torch.nn.functional's functions, one after the other"),
}
FORMS_OF_SDPA = ("padded", "loop")
COMPILED = ("compiled", "flex")


class Unavailable(Exception):
    """A peer cannot run a case; the message is the reason that is shown."""


def label(peer: str) -> str:
    """How tables call a peer."""
    return LABELS[peer][0] if peer in LABELS else peer


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """torch's own choice."""
    grouped = q.shape[1] != k.shape[1]
    return partial(scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """The fused kernel of SDPA."""
    return _with(SDPBackend.FLASH_ATTENTION, sdpa(q, k, v, mask, causal))


def math_(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """The unfused kernel of SDPA. It computes in float32 whatever the type."""
    _afford(3 * 4 * _scores(q, k))
    return _with(SDPBackend.MATH, sdpa(q, k, v, mask, causal))


def _with(backend: SDPBackend, run: Attend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return cast(Tensor, run(q, k, v))

    return attend


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """What people write who know softmax(q k^T) v."""
    _afford(3 * q.element_size() * _scores(q, k))
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return partial(_eager, mask=mask)


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v


def compiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """Eager, as torch.compile makes it. The first call compiles."""
    run = eager(q, k, v, mask, causal)
    return torch.compile(run, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Attend:
    """FlexAttention. The first call compiles."""
    if q.requires_grad:
        raise Unavailable("FlexAttention has no backward on CPUs")
    # Imported here, since it loads torch's compiler, which takes seconds.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j if mask is None else mask[0, 0, i, j]

    blocks = None
    if causal or mask is not None:
        blocks = create_block_mask(sees, None, None, q.shape[2], k.shape[2], device=q.device.type)
    run = torch.compile(flex_attention, dynamic=False)
    return partial(run, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


DENSE: dict[str, Peer] = {
    "sdpa": sdpa,
    "flash": flash,
    "math": math_,
    "eager": eager,
    "compiled": compiled,
    "flex": flex,
}


def forget_compiled(peers: list[str]) -> None:
    """Empties torch.compile's cache, which keeps only so many shapes of one function."""
    if set(peers) & set(COMPILED):
        torch.compiler.reset()


def _scores(q: Tensor, k: Tensor) -> int:
    """How many scores there are; twice that where a backward keeps them."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (2 if q.requires_grad else 1)


def _afford(size: int) -> None:
    """Raises Unavailable where so many bytes would not fit into half of the free memory."""
    free = _free_memory()
    if free is not None and size > free // 2:
        raise Unavailable(f"its scores take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")


def _free_memory() -> int | None:
    """Bytes, where the system says it."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
