"""T5's positions: a number for each head and bucket of distances, added to the scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.config import ModelConfig


class RelativeBias(nn.Module):
    """The bias of all layers of a stack, computed once.

    Args:
        both_ways: half of the buckets are for keys behind the query; else nobody sees those.
    Raises:
        ValueError: the config's buckets do not reach its largest distance, or there is a window.
    """

    def __init__(self, config: ModelConfig, both_ways: bool) -> None:
        single = config.relative_buckets // (4 if both_ways else 2)
        if not 1 <= single < config.relative_max_distance:
            raise ValueError(
                f"relative_buckets must be at least 4 and half of a side's fewer than relative_max_distance="
                f"{config.relative_max_distance}, got {config.relative_buckets}"
            )
        if config.window is not None:
            raise ValueError(f"window must be None where positions are relative, got {config.window}")
        super().__init__()
        self.config, self.both_ways = config, both_ways
        self.buckets = nn.Embedding(config.relative_buckets, config.num_heads)

    def forward(self, length: int) -> Tensor:
        """[1, H, S, S], of S tokens."""
        distances = torch.arange(1 - length, length, device=self.buckets.weight.device)
        # Every row of the bias is a piece of one line: a step to the next query is one back in it.
        line = self._of(distances).t()  # [H, 2 S - 1]
        return line.unfold(1, length, 1).flip(1)[None]

    def behind(self, lengths: Tensor, new: int) -> Tensor:
        """[B, H, new, Sk], of new tokens behind what each sequence has; -inf for keys behind a token.

        Args:
            lengths: integers [B]. Where all are the same, B is 1 in the result.
        """
        longest = int(lengths.max())
        if int(lengths.min()) == longest:
            lengths = lengths[:1]
        steps = torch.arange(longest + new, device=lengths.device)
        distances = steps - (lengths[:, None] + steps[:new])[..., None]  # [B, new, Sk]
        bias = self._of(distances).permute(0, 3, 1, 2)
        return bias.masked_fill(distances[:, None] > 0, -torch.inf)

    def _of(self, distances: Tensor) -> Tensor:
        """[..., H], for distances of keys from queries."""
        config = self.config
        index = buckets(distances, config.relative_buckets, config.relative_max_distance, self.both_ways)
        return F.embedding(index, self.buckets.weight)


def buckets(distances: Tensor, number: int, max_distance: int, both_ways: bool) -> Tensor:
    """The bucket of each distance: one for each small one, then logarithmically more in each.

    Source: Raffel et al. 2020, arXiv:1910.10683, 2.1. In float32, as T5 was trained: what lies on an
    edge would move else.
    """
    if both_ways:
        number //= 2
        side, far = (distances > 0) * number, distances.abs()
    else:
        side, far = torch.zeros_like(distances), (-distances).clamp(min=0)
    single = number // 2  # distances with a bucket of their own
    octaves = torch.log(far.clamp(min=1).float() / single) / math.log(max_distance / single)
    shared = single + (octaves * (number - single)).long()
    return side + torch.where(far < single, far, shared.clamp(max=number - 1))
