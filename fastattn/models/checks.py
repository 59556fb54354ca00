"""What models ask of their inputs, before any memory is touched."""

import torch
from torch import Tensor

from fastattn.models.cache import ModelCache
from fastattn.models.config import ModelConfig
from fastattn.models.layers import Packed
from fastattn.ops._checks import check_tensor


def check_ids(
    ids: Tensor,
    config: ModelConfig,
    cache: ModelCache | None = None,
    packed: Packed | None = None,
    name: str = "ids",
) -> None:
    """Raises where ids are not tokens [B, S] of the vocabulary, or more than there are positions for.

    What they hold is looked at on the CPU alone: elsewhere it would wait for the device.
    """
    check_tensor(name, ids)
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32 [B, S], got {ids.dtype} {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(f"{name} must hold at least one token for each sequence, got {list(ids.shape)}")
    if packed is not None:
        if tuple(ids.shape) != tuple(packed.positions.shape):
            raise ValueError(
                f"{name} must have the packed tokens' shape {list(packed.positions.shape)}, "
                f"got {list(ids.shape)}"
            )
        longest = packed.max_seqlen
    else:
        longest = ids.shape[1]
    tracing = torch.compiler.is_compiling() or ids.device.type != "cpu"
    if cache is not None:
        if cache.batch_size != ids.shape[0]:
            raise ValueError(f"{name} must have the cache's {cache.batch_size} sequences, got {ids.shape[0]}")
        longest += 0 if tracing else int(cache.lengths.max())
    if longest > config.max_positions:
        raise ValueError(f"{name} must end within max_positions={config.max_positions}, got {longest} tokens")
    if tracing:
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"{name} must be in 0 ... {config.vocab_size - 1}, got {low if low < 0 else high}")


def check_targets(targets: Tensor, ids: Tensor) -> None:
    """Raises where targets are not one class for each of ids; the op looks at what they hold."""
    check_tensor("targets", targets)
    if targets.dtype is not torch.int64 or targets.shape != ids.shape:
        raise ValueError(
            f"targets must be int64 {list(ids.shape)}, as ids, got {targets.dtype} {list(targets.shape)}"
        )
