"""Windows of tokens, and which of them a step reads: a rule of (seed, step), so that there is no state."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WINDOWS, _DROPOUT = 0, 1  # streams of the counter-based generator


class Windows:
    """A file of tokens, which stays on the disk.

    Args:
        token_type: of its numbers, as numpy writes it.
        length: S, tokens that a model reads at once; a window has one more.
    """

    def __init__(self, path: Path, token_type: str, length: int) -> None:
        self._tokens = np.memmap(path, token_type, mode="r")
        self.length = length

    def random(self, seed: int, step: int, count: int) -> list[int]:
        """Where the windows of a step start. Every process draws all, and takes its own."""
        places = len(self._tokens) - self.length
        return [int(x % places) for x in _draw(_WINDOWS, seed, step, count)]

    def spread(self, count: int = 0) -> list[int]:
        """Where at most so many windows start that do not overlap, evenly spread; 0: all there are."""
        whole = (len(self._tokens) - 1) // self.length
        count = min(count or whole, whole)
        return [whole * i // count * self.length for i in range(count)]

    def at(self, starts: list[int]) -> tuple[Tensor, Tensor]:
        """ids [B, S] and the token after each, int64 [B, S]."""
        rows = [np.asarray(self._tokens[i : i + self.length + 1], np.int64) for i in starts]
        both = torch.from_numpy(np.stack(rows))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def dropout_seed(seed: int, step: int, window: int) -> int:
    """For torch's generator, before the micro-batch that begins with this window of a step."""
    return int(_draw(_DROPOUT, seed, step, window + 1)[window] >> np.uint64(1))


def _draw(stream: int, seed: int, step: int, count: int) -> Any:
    """So many 64-bit numbers: Philox, whose raw output is the same in every version of numpy."""
    return np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]).random_raw(count)
