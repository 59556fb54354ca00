"""Two parts of the keys give what all of them give, with gradients, and where parts see nothing."""

import math

import pytest
import torch

from fastattn import attention, attention_varlen, merge_attention_states
from fastattn.testing.check import results
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import packed_qkv, qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf


def merged(q, k, v, *, at, backend=None, return_lse=True, mask=None, **_):
    """Attention over the first `at` keys and over the others, as one op."""
    parts = [
        attention(
            q, k[:, keys], v[:, keys], mask=None if mask is None else mask[..., keys],
            return_lse=return_lse, backend=backend,
        )
        for keys in (slice(at), slice(at, None))
    ]  # fmt: skip
    return merge_attention_states(*parts[0], *parts[1])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("at", [0, 1, 40, 70])
def test_is_attention_over_all_keys(dtype, at):
    q, k, v = qkv(2, 4, 2, 33, 70, 16, 24, dtype=dtype)
    wide = [x.double() for x in (q, k, v)]
    ours = results(q=q, k=k, v=v, backend=None, op=merged, at=at)
    base = results(q=q, k=k, v=v, backend="reference")
    truth = results(q=wide[0], k=wide[1], v=wide[2], backend="reference")
    for name in truth:
        assert_close(ours[name], base[name], truth[name], name, dtype)
    assert ours["out"].dtype is dtype
    assert ours["lse"].dtype is torch.float32


def test_queries_that_see_nothing():
    """In one part, in the other, in both: out 0, lse -inf and gradients 0, never NaN."""
    q, k, v = qkv(1, 2, 2, 8, 20, 16)
    mask = torch.ones(8, 20, dtype=torch.bool)
    mask[0:2, :10] = mask[2:4, 10:] = mask[4:6] = False
    wide = [x.double() for x in (q, k, v)]
    ours = results(q=q, k=k, v=v, mask=mask, backend=None, op=merged, at=10)
    base = results(q=q, k=k, v=v, mask=mask, backend="reference")
    truth = results(q=wide[0], k=wide[1], v=wide[2], mask=mask, backend="reference")
    for name in truth:
        assert_close(ours[name], base[name], truth[name], name)
    assert not ours["out"][:, 4:6].any()
    assert (ours["lse"][:, :, 4:6] == -INF).all()
    assert not ours["dq"][:, 4:6].any()


def test_packed_sequences():
    """A prefix that all sequences share, and what each has of its own."""
    lengths = (5, 0, 30)
    q, k, v, cu_q, cu_k = packed_qkv(lengths, lengths, 4, 2, 16)
    prefix_k, prefix_v = qkv(1, 4, 2, 1, 40, 16, seed=1)[1:]
    own = attention_varlen(q, k, v, cu_q, cu_k, causal=True, return_lse=True)
    prefix = attention(q[None], prefix_k, prefix_v, return_lse=True)
    out, lse = merge_attention_states(prefix[0][0], prefix[1][0], *own)
    for b, length in enumerate(lengths):
        rows = slice(int(cu_q[b]), int(cu_q[b]) + length)
        alone = [torch.cat([x[0], y[rows]])[None] for x, y in ((prefix_k, k), (prefix_v, v))]
        expected = results(q=q[None, rows], k=alone[0], v=alone[1], causal=True, backend="reference")
        truth = results(
            q=q[None, rows].double(), k=alone[0].double(), v=alone[1].double(), causal=True,
            backend="reference",
        )  # fmt: skip
        assert_close(out[None, rows], expected["out"], truth["out"])
        assert_close(lse[None, :, rows], expected["lse"], truth["lse"])


def test_wider_types_are_kept():
    out, lse = torch.ones(1, 3, 2, 4), torch.zeros(1, 2, 3)
    merged_out, merged_lse = merge_attention_states(out.half(), lse.double(), out, lse)
    assert (merged_out.dtype, merged_lse.dtype) == (torch.float32, torch.float64)
    assert torch.equal(merged_out, out)
    assert torch.equal(merged_lse, lse.double() + math.log(2.0))


def test_order_and_unequal_sizes():
    """A part that weighs e^200 times the other is the result, whichever comes first."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 3, 2, 4, generator=generator)
    small, large = torch.full((2, 1, 2, 3), -100.0).unbind(0)
    large = large + 200.0
    for given in ((a, large, b, small), (b, small, a, large)):
        out, lse = merge_attention_states(*given)
        assert torch.equal(out, a)
        assert torch.equal(lse, large)


GOOD = {"out_a": torch.zeros(1, 3, 2, 4), "lse_a": torch.zeros(1, 2, 3)}
GOOD |= {"out_b": torch.zeros(1, 3, 2, 4), "lse_b": torch.zeros(1, 2, 3)}
BAD = {
    "no_tensor": ({"lse_b": None}, TypeError, "lse_b must be a tensor, got NoneType"),
    "integers": ({"out_b": torch.zeros(1, 3, 2, 4).int()}, TypeError, "out_b must be of a floating type"),
    "rank": ({"out_a": torch.zeros(3, 4)}, ValueError, r"out_a must be \[B, S, H, Dv\] or"),
    "outs": ({"out_b": torch.zeros(1, 3, 2, 5)}, ValueError, r"out_b must have out_a's shape \[1, 3, 2, 4\]"),
    "lse": ({"lse_a": torch.zeros(1, 3, 2)}, ValueError, r"lse_a must have.*\[1, 2, 3\].*got \[1, 3, 2\]"),
    "device": ({"lse_b": torch.zeros(1, 2, 3, device="meta")}, ValueError, "lse_b must be on"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        merge_attention_states(**{**GOOD, **change})
