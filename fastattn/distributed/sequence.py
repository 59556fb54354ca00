"""A sequence cut into the parts of the ranks, and put together again."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.distributed.parts import check_order, chunks_of
from fastattn.distributed.ranks import check_agreement, ranks_of
from fastattn.ops._checks import check_tensor


def shard_sequence(
    x: Tensor, dim: int = 1, *, order: str = "zigzag", group: dist.ProcessGroup | None = None
) -> Tensor:
    """This rank's part of a sequence that every rank has whole: a copy. Differentiable.

    Shapes:
        x [..., S, ...] -> [..., S / W, ...], for W ranks. S is a multiple of 2 W, or of W where the order
        is contiguous.
    Args:
        dim: of the sequence.
        order: "zigzag": rank r holds the chunks r and 2 W - 1 - r of 2 W, which balances causal attention;
            "contiguous": chunk r of W.
        group: the ranks that share the sequence. Default: all.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        RuntimeError: torch.distributed is not initialized.
    """
    check_order(order)
    check_tensor("x", x)
    dim = _checked_dim(x, dim)
    _, rank, size = ranks_of(group)
    mine = chunks_of(order, rank, size)
    count = len(mine) * size
    if x.shape[dim] % count:
        raise ValueError(
            f"x's dimension {dim} must be a multiple of {count} ({order} order over {size} ranks), "
            f"got shape {list(x.shape)}"
        )
    chunks = x.unflatten(dim, (count, -1))
    return torch.cat([chunks.select(dim, chunk) for chunk in mine], dim=dim)


def unshard_sequence(
    x: Tensor, dim: int = 1, *, order: str = "zigzag", group: dist.ProcessGroup | None = None
) -> Tensor:
    """The whole sequence, on every rank, from its parts: what `shard_sequence` was given.

    Not differentiable: the same loss on every rank would count W times. Compute it from the parts.

    Shapes:
        x [..., S / W, ...] -> [..., S, ...]; the same shape and type on all ranks.
    Args:
        dim, order, group: as in `shard_sequence`.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        RuntimeError: torch.distributed is not initialized.
    """
    check_order(order)
    check_tensor("x", x)
    dim = _checked_dim(x, dim)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x must not require a gradient, which unshard_sequence has not; x.detach() has none")
    ranks = ranks_of(group)
    count = len(chunks_of(order, 0, ranks.size))
    error = None
    if x.shape[dim] % count:
        shape = list(x.shape)
        error = ValueError(f"x's dimension {dim} must be a multiple of {count} ({order} order), got {shape}")
    sizes = [*x.shape, *[0] * 8][:8]
    facts = {"x's number of dimensions": float(x.ndim), "the bytes of x's type": float(x.dtype.itemsize)}
    facts |= {f"x's dimension {at}": float(n) for at, n in enumerate(sizes)}
    check_agreement(ranks, facts, x.device, error)
    x = x.contiguous()
    gathered = [torch.empty_like(x) for _ in range(ranks.size)]
    dist.all_gather(gathered, x, group=ranks.group)
    chunks: dict[int, Tensor] = {}
    for rank, part in enumerate(gathered):
        numbers = chunks_of(order, rank, ranks.size)
        chunks |= zip(numbers, part.chunk(count, dim), strict=True)
    return torch.cat([chunks[number] for number in sorted(chunks)], dim=dim)


def local_positions(
    length: int,
    *,
    order: str = "zigzag",
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where the tokens of this rank's part stand in the whole sequence: int64 [length].

    What `fastattn.rotary` takes as `positions`, and what learned embeddings are looked up by.

    Args:
        length: of this rank's part, S / W; even where the order is zigzag.
        order, group: as in `shard_sequence`.
        device: of the result.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        RuntimeError: torch.distributed is not initialized.
    """
    check_order(order)
    _, rank, size = ranks_of(group)
    mine = chunks_of(order, rank, size)
    if length < 0 or length % len(mine):
        raise ValueError(f"length must be a multiple of {len(mine)} ({order} order), got {length}")
    each = length // len(mine)
    return torch.cat([torch.arange(at * each, (at + 1) * each, device=device) for at in mine])


def _checked_dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be in [{-x.ndim}, {x.ndim}) for x of shape {list(x.shape)}, got {dim}")
    return dim % x.ndim
