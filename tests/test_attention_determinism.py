"""The same bits whatever the number of threads, and whatever else is in the batch."""

import pytest
import torch

from fastattn.testing.check import OPTION_SETS, option_set, refusal, results
from fastattn.testing.inputs import qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "blocks": (2, 6, 2, 130, 300, 64, 48),
    "one_head": (1, 1, 1, 333, 500, 32, 32),
    "one_query": (1, 4, 2, 1, 3000, 64, 64),
    "few_queries": (3, 3, 1, 6, 1111, 80, 80),
}


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads(kernel_backend, set_threads, dtype, option):
    for shape in SHAPES.values():
        q, k, v = qkv(*shape, dtype=dtype)
        given = {"q": q, "k": k, "v": v, **option_set(option, q, k)}
        if reason := refusal(kernel_backend, **given):
            pytest.skip(reason)
        runs = []
        for threads in (1, 2, 3):
            set_threads(threads)
            both = results(**given, backend=kernel_backend)
            # Without a gradient to come, few queries run on a kernel of their own.
            forward = results(**given, backend=kernel_backend, gradients=False)
            runs.append(both | {f"{name} alone": x for name, x in forward.items()})
        for run in runs[1:]:
            assert_same(run, runs[0])


@pytest.mark.parametrize("heads", [1, 6])
def test_a_shared_bias_whose_rows_end_within_a_group(kernel_backend, set_threads, heads):
    """3 heads to a KV head, blocks of 112 rows: two blocks add to the bias of one query."""
    q, k, v = qkv(3, 6, 2, 65, 130, 32)
    bias = torch.randn(1, heads, 65, 130, generator=torch.Generator().manual_seed(0))
    given = {"q": q, "k": k, "v": v, "bias": bias}
    if reason := refusal(kernel_backend, **given):
        pytest.skip(reason)
    set_threads(1)
    expected = results(**given, backend=kernel_backend)
    set_threads(3)
    for _ in range(20):
        assert_same(results(**given, backend=kernel_backend), expected)


# Dropout is left out: its counter holds the place in the batch.
@pytest.mark.parametrize("option", [x for x in OPTION_SETS if x not in ("dropout", "everything")])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_batch(kernel_backend, dtype, shape, option):
    """Five sequences at once, of which the first is there twice, give what they give alone."""
    q, k, v = qkv(5, *SHAPES[shape][1:], dtype=dtype)
    given = {"q": q, "k": k, "v": v, **option_set(option, q, k)}
    for x in given.values():
        if has_batch(x):
            x[4] = x[0]
    if reason := refusal(kernel_backend, **given):
        pytest.skip(reason)
    together = results(**given, backend=kernel_backend)
    for at in (0, 3, 4):
        one = {name: x[at : at + 1] if has_batch(x) else x for name, x in given.items()}
        alone = results(**one, backend=kernel_backend)
        # The upstream gradient is drawn for the whole batch; sequence 0's is the same in both.
        names = alone if at == 0 else ("out", "lse")
        own = [name for name in names if has_batch(together[name])]
        assert_same({name: alone[name][0] for name in own}, {name: together[name][at] for name in own})


def has_batch(x):
    return isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[0] == 5


def assert_same(ours, expected):
    for name, x in ours.items():
        assert torch.equal(x, expected[name]), name
