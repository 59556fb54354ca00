"""One process or several of torchrun: what they share, and how the model is spread over them."""

import os
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_LAST_WORK = 0.5  # seconds


class Ranks:
    """The processes of a run. Without torchrun there is one, and nothing here costs anything.

    Args:
        fsdp: weights, gradients and AdamW's averages are sharded; else each process has all of them.
    """

    def __init__(self, fsdp: bool) -> None:
        self.rank, self.size = (int(os.environ.get(x, y)) for x, y in (("RANK", "0"), ("WORLD_SIZE", "1")))
        self.fsdp = fsdp and "RANK" in os.environ
        if "RANK" in os.environ:
            dist.init_process_group("gloo")

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Over all processes, of as many numbers in each."""
        if self.size == 1:
            return [*numbers]
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return cast(list[float], total.tolist())

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def spread(self, module: nn.Module, layers: nn.ModuleList) -> nn.Module:
        """The module as this process trains it; its gradients become means over the processes."""
        if self.fsdp:
            # Imported late: DDP and a single process do without.
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # A layer returns a view of its last product, which nobody writes to.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            mesh = init_device_mesh("cpu", (self.size,))
            for part in (*layers, module):
                fully_shard(part, mesh=mesh)
            return module
        return nn.parallel.DistributedDataParallel(module) if self.size > 1 else module

    def accumulate(self, module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: only after the last one of a step are gradients exchanged."""
        if self.fsdp:
            cast(Any, module).set_requires_gradient_sync(is_last)
        elif self.size > 1 and not is_last:
            return cast(Any, module).no_sync()  # type: ignore[no-any-return]
        return nullcontext()

    def settle(self, module: nn.Module) -> None:
        """After forwards without a backward: FSDP2 leaves the weights of the outermost module whole."""
        if self.fsdp:
            cast(Any, module).reshard()

    def close(self) -> None:
        """No process talks to another after it."""
        if dist.is_initialized():
            dist.destroy_process_group()
            # gloo's threads let go of their last work on their own, and ask Python for it: one that is
            # ending by then kills them, and the process ends with SIGABRT.
            time.sleep(_LAST_WORK)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all shards of it: every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, given: Tensor) -> Tensor:
    """A whole tensor, sharded as the other is."""
    if isinstance(tensor, DTensor):
        return distribute_tensor(given, tensor.device_mesh, tensor.placements)
    return given
