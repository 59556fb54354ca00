"""The ranks of a group: what they must agree on, and what they pass on to each other."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks(NamedTuple):
    """A group of processes, as one of its members sees it."""

    group: dist.ProcessGroup
    rank: int  # of this process, within the group
    size: int


def ranks_of(group: object) -> Ranks:
    """The group's ranks; None means all processes."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialized: start the program with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gave to those outside
        raise ValueError("group must be one that this process belongs to, got one that it does not")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def check_agreement(
    ranks: Ranks, facts: dict[str, float], device: torch.device, error: Exception | None = None
) -> None:
    """Raises on every rank, instead of waiting for ever, where facts differ or one rank has an error.

    Args:
        facts: what must be the same everywhere, by the name that a message gives it. As many on every rank.
        error: what this rank has to say against its own arguments.
    """
    mine = torch.tensor([error is not None, *facts.values()], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(gathered, mine, group=ranks.group)
    if error is not None:
        raise error
    refused, *columns = torch.stack(gathered, dim=1).tolist()
    if any(refused):
        raise ValueError(f"rank {refused.index(1.0)} of the group has refused its arguments; it says why")
    for name, found in zip(facts, columns, strict=True):
        if len(set(found)) > 1:
            values = ", ".join(f"{x:g}" for x in found)
            raise ValueError(f"all ranks of the group must agree on {name}, got {values} (by rank)")


class Passing:
    """A tensor on its way to the rank `places` further on, while the one from as far back comes in."""

    def __init__(self, x: Tensor, ranks: Ranks, places: int = 1) -> None:
        self._sent = self._received = x.contiguous()
        self._works: list[dist.Work] = []
        if places % ranks.size == 0 or x.numel() == 0:
            return
        to, origin = (
            dist.get_global_rank(ranks.group, (ranks.rank + sign * places) % ranks.size) for sign in (1, -1)
        )
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, to, ranks.group),
                dist.P2POp(dist.irecv, self._received, origin, ranks.group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received
