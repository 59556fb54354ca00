"""What models ask of their inputs, before any memory is touched."""

from collections.abc import Sequence

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


def check_prompts(
    prompts: Tensor | Sequence[Sequence[int] | Tensor | str], config: ModelConfig, max_new_tokens: int
) -> list[list[int]]:
    """Raises where prompts are not tokens of the vocabulary, or leave no positions for new ones."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    if isinstance(prompts, str) or not isinstance(prompts, Tensor | Sequence):
        raise TypeError(f"prompts must be a tensor [B, S] or a list of them, got {type(prompts).__name__}")
    ids: list[list[int]] = []
    for b, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise TypeError(f"prompts[{b}] must be ids, since there is no tokenizer, got {prompt!r:.60}")
        row = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(row, Sequence) or not all(type(token) is int for token in row):
            raise TypeError(f"prompts[{b}] must be a list of integers, got {row!r:.60}")
        if not row:
            raise ValueError(f"prompts[{b}] must have at least one token, got none")
        if not 0 <= min(row) <= max(row) < config.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise ValueError(f"prompts[{b}] must be in 0 ... {config.vocab_size - 1}, got {wrong}")
        if len(row) > config.max_positions:
            raise ValueError(
                f"prompts[{b}] must have at most max_positions={config.max_positions} tokens, got {len(row)}"
            )
        ids.append(list(row))
    if not ids:
        raise ValueError("prompts must have at least one sequence, got none")
    longest = max(map(len, ids))
    room = config.max_positions - longest + 1  # the last new token is not read
    if max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens must be at most {room} behind a prompt of {longest} tokens and with "
            f"max_positions={config.max_positions}, got {max_new_tokens}"
        )
    return ids


def check_stop_ids(stop_ids: Sequence[int] | None, config: ModelConfig) -> frozenset[int]:
    """Raises where they are not tokens of the vocabulary; None: the config's eos_ids."""
    found = frozenset(config.eos_ids if stop_ids is None else stop_ids)
    for stop in found:
        if not 0 <= stop < config.vocab_size:
            raise ValueError(f"stop_ids must be in 0 ... {config.vocab_size - 1}, got {stop}")
    return found


def check_prompts_cache(prompts: list[list[int]], cache: ModelCache, max_new_tokens: int) -> None:
    """Raises where a cache cannot hold the beginnings of these prompts, or has no room for the rest."""
    if cache.batch_size != len(prompts):
        raise ValueError(f"cache must have {len(prompts)} sequences, as prompts has, got {cache.batch_size}")
    for b, (prompt, had) in enumerate(zip(prompts, cache.lengths.tolist(), strict=True)):
        if had >= len(prompt):
            raise ValueError(
                f"cache must have fewer tokens than prompts[{b}] with its {len(prompt)}, got {had}"
            )
    wanted = max(map(len, prompts)) + max_new_tokens - 1
    if wanted > cache.max_length:
        raise ValueError(f"cache must have room for {wanted} tokens of a sequence, got {cache.max_length}")


def check_targets(targets: Tensor, ids: Tensor) -> None:
    """Raises where targets are not one class for each of ids; the op looks at what they hold."""
    check_tensor("targets", targets)
    if targets.dtype is not torch.int64 or targets.shape != ids.shape:
        raise ValueError(
            f"targets must be int64 {list(ids.shape)}, as ids, got {targets.dtype} {list(targets.shape)}"
        )
