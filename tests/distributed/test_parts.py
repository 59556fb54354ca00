"""Parts put together are the window over the whole sequence, each weight once: without any processes."""

import pytest
import torch

from fastattn.distributed.parts import ORDERS, View, chunks_of, parts, steps

WINDOWS = [(-1, -1), (-1, 0), (0, 0), (2, 0), (5, 3), (-1, 4), (7, -1), (0, 9), (30, 0), (100, 100)]
LENGTH = 4  # of a chunk


def positions(order, rank, size):
    """Of a rank's tokens in the whole sequence."""
    return torch.cat([torch.arange(LENGTH) + LENGTH * at for at in chunks_of(order, rank, size)])


def seen(part):
    """What an op sees of a part: bool [queries, keys]."""
    queries, keys = (len(range(1000)[x]) for x in (part.queries, part.keys))
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if part.window_left >= 0:
        mask &= distance <= part.window_left
    if part.window_right >= 0:
        mask &= distance >= -part.window_right
    return mask


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("distances", [False, True], ids=["", "alibi"])
def test_parts_are_the_window(distances, order, size, window):
    total = LENGTH * size * len(chunks_of(order, 0, size))
    distance = torch.arange(total)[:, None] - torch.arange(total)
    expected = torch.ones(total, total, dtype=torch.bool)
    for bound, sign in zip(window, (1, -1), strict=True):
        if bound >= 0:
            expected &= sign * distance <= bound
    times, own = torch.zeros(total, total, dtype=torch.int), torch.zeros(total, dtype=torch.int)
    local = total // size
    view = View(local, local, *window, distances)
    last = steps(order, size, view) - 1
    for rank in range(size):
        for source in range(size):
            found = parts(order, rank, source, size, view)
            assert not found or (rank - source) % size <= last
            for part in found:
                rows = positions(order, rank, size)[part.queries]
                keys = positions(order, source, size)[part.keys]
                times[rows[:, None], keys] += seen(part).int()
                own[rows] += part.own
                if distances:
                    ends = rows[-1] - keys[-1], len(rows) - len(keys) + part.shift
                    assert ends[0] == ends[1]
                assert min(part.window_left, part.window_right) >= -1
    assert torch.equal(times, expected.int())
    assert (own == 1).all()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_balances_a_causal_mask(size):
    """Behind the first step every rank sees as much of its visitor as any other."""

    def work(order, rank, step):
        found = parts(order, rank, (rank - step) % size, size, View(2 * LENGTH, 2 * LENGTH, -1, 0, False))
        return sum(int(seen(part).sum()) for part in found)

    for step in range(size):
        assert len({work("zigzag", rank, step) for rank in range(size)}) == 1
    assert {work("contiguous", rank, 1) for rank in range(size)} == {0, 4 * LENGTH**2}


@pytest.mark.parametrize("left", [-1, 31])
def test_parts_are_few(left):
    """Neighbours that are seen whole are one call of the op."""
    for source in range(4):
        found = parts("zigzag", 2, source, 4, View(8, 8, left, 0, False))
        assert len(found) == (3 if source == 2 else 1)


def test_a_window_ends_the_ring_early():
    assert steps("contiguous", 8, View(100, 100, 99, 0, False)) == 2
    assert steps("contiguous", 8, View(100, 100, 0, 0, False)) == 1
    assert steps("contiguous", 8, View(100, 100, 100, 0, False)) == 2
    assert steps("contiguous", 8, View(100, 100, 101, 0, False)) == 3
    # A rank's successor stands at the far end of its ring.
    assert steps("contiguous", 8, View(100, 100, 99, 1, False)) == 8
    assert steps("zigzag", 8, View(100, 100, -1, 0, False)) == 8
