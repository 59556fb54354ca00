"""Sequences cut into the ranks' parts and put together again."""

import re

import pytest
import torch
import torch.distributed as dist

from fastattn.distributed import local_positions, shard_sequence, unshard_sequence


def both(cases):
    return pytest.mark.parametrize("ranks", cases, indirect=True)


def parts_of(order):
    """This rank's tokens of 16, by shard_sequence and by local_positions; and what comes of them."""
    x = torch.arange(16)
    mine = shard_sequence(x, 0, order=order)
    positions = local_positions(len(mine), order=order)
    return mine.tolist(), positions.tolist(), unshard_sequence(mine, 0, order=order).tolist()


@both([4])
def test_orders(ranks):
    zigzag = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    contiguous = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    for order, expected in (("zigzag", zigzag), ("contiguous", contiguous)):
        for found, part in zip(ranks(parts_of, order), expected, strict=True):
            assert found == (part, part, list(range(16)))


def check_tensors():
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        y = x.to(dtype)
        for dim in (1, -2):
            part = shard_sequence(y, dim)
            assert part.shape == (2, 4, 3)
            assert part.is_contiguous() and part.data_ptr() != y.data_ptr()
            assert torch.equal(unshard_sequence(part, dim), y)
    y = x.transpose(0, 2)[..., :1]
    assert torch.equal(unshard_sequence(shard_sequence(y)), y)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(shard_sequence(x).sum(), x)
    mine = torch.zeros(8).index_fill(0, local_positions(4), 1.0)
    assert torch.equal(dx, mine[None, :, None].expand(2, 8, 3))
    assert local_positions(4, device="meta").device.type == "meta"
    assert shard_sequence(x[:, :0]).shape == unshard_sequence(x[:, :0].detach()).shape == (2, 0, 3)


@both([2])
def test_tensors_and_gradient(ranks):
    ranks(check_tensors)


def message_of(function, given, only=None):
    if only is not None and dist.get_rank() != only:
        given = {**given, "x": torch.zeros(2, 4)}
    try:
        function(**given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


X = torch.zeros(2, 6)
BAD = {
    "not_divisible": (
        shard_sequence,
        {"x": X},
        r"ValueError: x's dimension 1 must be a multiple of 4 \(zigzag order over 2 ranks\), got.*2, 6",
    ),
    "not_divisible_contiguous": (
        shard_sequence,
        {"x": torch.zeros(1, 5), "order": "contiguous"},
        "ValueError: .*a multiple of 2",
    ),
    "dim": (shard_sequence, {"x": X, "dim": 2}, r"ValueError: dim must be in \[-2, 2\).*got 2"),
    "order": (shard_sequence, {"x": X, "order": "zag"}, "ValueError: order must be one of"),
    "tensor": (shard_sequence, {"x": [1]}, "TypeError: x must be a tensor, got list"),
    "gradient": (
        unshard_sequence,
        {"x": torch.zeros(2, 4, requires_grad=True)},
        "ValueError: x must not require a gradient",
    ),
    "odd_part": (unshard_sequence, {"x": torch.zeros(2, 3)}, "ValueError: .*multiple of 2.*got .2, 3."),
    "odd_length": (local_positions, {"length": 3}, "ValueError: length must be a multiple of 2.*got 3"),
    "negative": (local_positions, {"length": -2}, "ValueError: length must be .*got -2"),
}


@pytest.mark.parametrize("case", BAD)
@both([2])
def test_bad_input(ranks, case):
    function, given, message = BAD[case]
    for found in ranks(message_of, function, given):
        assert re.match(message, found), found


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 8), "x's dimension 1, got 4, 8"),
        (torch.zeros(2, 4, 1), "x's number of dimensions, got 2, 3"),
        (torch.zeros(2, 4).half(), "the bytes of x's type, got 4, 2"),
    ],
    ids=str,
)
@both([2])
def test_ranks_that_disagree(ranks, x, message):
    for found in ranks(message_of, unshard_sequence, {"x": x}, only=1):
        assert message in found
