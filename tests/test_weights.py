"""The weights of chosen heads and queries: against the whole softmax, in little memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import attention, attention_weights, weights
from fastattn.ops.attention import check, weights_reference
from fastattn.testing.check import OPTION_SETS, option_set
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Weights are taken before the dropout.
OPTIONS = [name for name in OPTION_SETS if name != "dropout"]


def whole(q, k, **options):
    return weights_reference(check(q, k, k, **options))[0]


def widened(options):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and name in ("bias", "sinks") else x
        for name, x in options.items()
    }


def indices(chosen, size):
    return list(range(size)[chosen] if isinstance(chosen, slice) else chosen)


def check_weights(q, k, heads=None, rows=None, **options):
    """Against all weights at once, of which the same heads and rows are taken."""
    h = indices(slice(None) if heads is None else heads, q.shape[2])
    r = indices(slice(None) if rows is None else rows, q.shape[1])
    base = whole(q, k, **options)[:, h][:, :, r]
    truth = whole(q.double(), k.double(), **widened(options))[:, h][:, :, r]
    found = attention_weights(q, k, heads=heads, rows=rows, **options)
    assert found.dtype is torch.float32
    assert_close(found, base, truth, dtype=q.dtype)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("lengths", [(33, 50), (50, 33)], ids=str)
def test_is_the_softmax(monkeypatch, dtype, option, lengths):
    monkeypatch.setattr(weights, "_BLOCK", 2 * 50 * 8)  # several blocks, the last one shorter
    q, k, _ = qkv(2, 4, 2, *lengths, 16, dtype=dtype)
    options = option_set(option, q, k)
    options.pop("dropout_p", None)
    options.pop("seed", None)
    check_weights(q, k, **options)
    check_weights(q, k, heads=[3, 0], rows=[-1, 5, 5], **options)


@pytest.mark.parametrize("rows", [slice(None), slice(10, 3, -2), range(0, 20, 7), [], (-20, 19)], ids=str)
@pytest.mark.parametrize("heads", [slice(1, 3), slice(9, 12), [-1, 2], []], ids=str)
def test_choices(heads, rows):
    q, k, _ = qkv(2, 6, 3, 20, 31, 8)
    check_weights(q, k, heads, rows, causal=True)


def test_an_int_is_a_list_of_one():
    q, k, _ = qkv(1, 2, 2, 9, 9, 8)
    assert torch.equal(
        attention_weights(q, k, heads=1, rows=-1), attention_weights(q, k, heads=[1], rows=[8])
    )


def test_is_what_attention_multiplies_values_by():
    q, k, v = qkv(2, 4, 4, 30, 40, 16)
    found = attention_weights(q, k, causal=True, window_size=(9, 0)).transpose(1, 2)
    out = torch.einsum("bihj,bjhd->bihd", found, v)
    truth = attention(
        q.double(), k.double(), v.double(), causal=True, window_size=(9, 0), backend="reference"
    )
    assert_close(out, attention(q, k, v, causal=True, window_size=(9, 0)), truth)


def test_rows_that_see_nothing_and_no_keys():
    q, k, _ = qkv(1, 2, 2, 5, 3, 8)
    assert not attention_weights(q, k, causal=True)[:, :, :2].any()
    assert attention_weights(q, k[:, :0]).shape == (1, 2, 5, 0)
    assert attention_weights(q[:, :0], k).shape == (1, 2, 0, 3)
    assert attention_weights(q[:, :, :0], k).shape == (1, 0, 5, 3)
    assert attention_weights(q[:0], k[:0]).shape == (0, 2, 5, 3)


def test_large_scores_stay_normalised():
    """Where a rounded log-sum-exp would be off by as much as its own rounding."""
    q, k, _ = qkv(1, 2, 1, 20, 50, 16)
    found = attention_weights(q * 1000.0, k * 50.0)
    sums = found.double().sum(-1)
    assert_close(sums.float(), torch.ones(1, 2, 20), torch.ones(1, 2, 20, dtype=torch.float64))


def test_no_gradient_and_no_autocast():
    q, k, _ = qkv(1, 2, 2, 9, 9, 8, requires_grad=True)
    found = attention_weights(q, k)
    assert not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_weights(q, k), found)


class _Largest(TorchDispatchMode):
    """Remembers the size of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        made = results if isinstance(results, tuple | list) else [results]
        self.sizes += [x.untyped_storage().nbytes() for x in made if isinstance(x, torch.Tensor)]
        return results


def test_memory():
    """Beside inputs and result nothing is larger than a block, or than one head's keys."""
    q, k, _ = qkv(1, 8, 2, 4096, 4096, 32)
    rows = range(0, 4096, 8)
    with _Largest() as made:
        found = attention_weights(q, k, heads=[1, 6], rows=rows, causal=True, sinks=torch.zeros(8))
    block = 8 * weights._BLOCK  # distances between positions are int64
    others = {
        size for size in made.sizes if size not in (x.untyped_storage().nbytes() for x in (q, k, found))
    }
    assert max(others) <= block + 8 * len(rows)
    assert block < 4 * 4096 * 4096  # not even one head is held whole


GOOD = {"q": torch.zeros(1, 5, 4, 8), "k": torch.zeros(1, 7, 2, 8)}
BAD = {
    "q": ({"q": torch.zeros(5, 4, 8)}, ValueError, "q must have 4 dim"),
    "types": ({"k": GOOD["k"].half()}, TypeError, "share one type"),
    "head_dim": ({"k": torch.zeros(1, 7, 2, 9)}, ValueError, "head dim D"),
    "head": ({"heads": [0, 4]}, IndexError, r"heads must be in \[-4, 4\), got 4"),
    "row": ({"rows": -6}, IndexError, r"rows must be in \[-5, 5\), got -6"),
    "heads_of_another_kind": ({"heads": 1.0}, TypeError, "heads must be an int, a slice or a seq.*got 1.0"),
    "rows_of_another_kind": ({"rows": [0, "a"]}, TypeError, "rows must be an int, a slice or a seq"),
    "mask": ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "window": ({"window_size": (1, -5)}, ValueError, "window_size must be two"),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention_weights(**{**GOOD, **change})
