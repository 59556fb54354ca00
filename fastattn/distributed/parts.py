"""Which chunks of a sequence lie with whom, and what a rank's queries see of a visitor's keys.

In zigzag order a sequence is cut into 2 W chunks, and rank r of W holds the chunks r and 2 W - 1 - r: one
from the cheap end of a causal mask, one from the dear end. In contiguous order each holds one of W chunks.
"""

from functools import lru_cache
from typing import NamedTuple

ORDERS = ("zigzag", "contiguous")


class View(NamedTuple):
    """What queries see of keys, counted over the whole sequence."""

    seqlen_q: int  # of one rank
    seqlen_k: int
    left: int  # of the window, as in ops/attention.py: -1 means unbounded
    right: int
    distances: bool  # scores depend on them (ALiBi)

    @property
    def positions_matter(self) -> bool:
        return self.left >= 0 or self.right >= 0 or self.distances


class Part(NamedTuple):
    """Queries and keys between which the mask is a window again, aligned at the end."""

    queries: slice  # among those of this rank
    keys: slice  # among those of the visitor
    window_left: int
    window_right: int
    own: bool  # the queries' own positions are among the keys'
    shift: int  # query i stands i - j + shift behind key j; 0 where positions do not matter

    @property
    def whole(self) -> bool:
        return self.window_left < 0 and self.window_right < 0


def check_order(order: str) -> None:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")


def chunks_of(order: str, rank: int, size: int) -> tuple[int, ...]:
    """The numbers of a rank's chunks, in the order in which it holds them."""
    return (rank, 2 * size - 1 - rank) if order == "zigzag" else (rank,)


@lru_cache
def parts(order: str, rank: int, source: int, size: int, view: View) -> tuple[Part, ...]:
    """What the queries of `rank` see of the keys of `source`."""
    seqlen_q, seqlen_k, left, right, _ = view
    if not view.positions_matter:
        return (Part(slice(0, seqlen_q), slice(0, seqlen_k), -1, -1, rank == source, 0),)
    mine, theirs = chunks_of(order, rank, size), chunks_of(order, source, size)
    length = seqlen_q // len(mine)
    found: list[Part] = []
    for i, query_chunk in enumerate(mine):
        for j, key_chunk in enumerate(theirs):
            shift = (query_chunk - key_chunk) * length
            part = _part(i * length, j * length, length, shift, left, right)
            joined = _joined(found[-1], part) if found and part and not view.distances else None
            if joined:
                found[-1] = joined
            elif part:
                found.append(part)
    return tuple(found)


@lru_cache
def steps(order: str, size: int, view: View) -> int:
    """After how many visitors no rank sees anything of the next ones."""
    for step in reversed(range(size)):
        for rank in range(size):
            if parts(order, rank, (rank - step) % size, size, view):
                return step + 1
    return 1


def _part(query: int, key: int, length: int, shift: int, left: int, right: int) -> Part | None:
    """For chunks of one length that begin at `query` and `key`; None where nothing is seen.

    Query i stands i - j + shift behind key j. A bound below 0, which the op has not, leaves nothing for the
    last queries, or of the last keys, to see. Without them it is 0, as windows are aligned at the end.
    """
    queries = length + min(left - shift, 0) if left >= 0 else length
    keys = length + min(right + shift, 0) if right >= 0 else length
    if queries <= 0 or keys <= 0:
        return None
    behind = shift - (keys - queries)  # by how much the op counts too little
    left = left - behind if left >= 0 else -1
    right = right + behind if right >= 0 else -1
    return Part(
        slice(query, query + queries),
        slice(key, key + keys),
        -1 if left >= keys - 1 else left,
        -1 if right >= queries - 1 else right,
        shift == 0,
        shift,
    )


def _joined(a: Part, b: Part) -> Part | None:
    """Two neighbours that are seen whole, as one."""
    if not (a.whole and b.whole) or a.own or b.own:
        return None
    if a.queries == b.queries and a.keys.stop == b.keys.start:
        return a._replace(keys=slice(a.keys.start, b.keys.stop))
    if a.keys == b.keys and a.queries.stop == b.queries.start:
        return a._replace(queries=slice(a.queries.start, b.queries.stop))
    return None
