"""Launches that are recorded and run again as one call: the same bits, on what memory holds then."""

import threading

import pytest
import torch

from fastattn import attention, attention_decode, dispatch, gated_feed_forward, linear, rms_norm
from fastattn.ops.attention_varlen import attention_varlen

record = dispatch.recorder(torch.device("cpu"))
assert record is not None


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_reads_what_memory_holds(dtype, threads):
    """A layer's worth of kernels, on inputs, weights and a cache that change between the runs."""
    x, w_qkv, w_out = (normal(*s, dtype=dtype) for s in ((2, 1, 64), (128, 64), (64, 64)))
    gate, up, down = (normal(*s, dtype=dtype, seed=3) for s in ((96, 64), (96, 64), (64, 96)))
    k_cache, v_cache = normal(2, 40, 2, 16, dtype=dtype), normal(2, 40, 2, 16, dtype=dtype, seed=1)
    lengths = torch.tensor([3, 9], dtype=torch.int32)
    weight = normal(64, dtype=dtype)

    def layer():
        q, k, v = linear(rms_norm(x, weight), w_qkv).view(2, 1, 8, 16).split([4, 2, 2], dim=2)
        heads = attention_decode(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True)
        total = linear(heads.reshape(2, 1, 64), w_out, residual=x)
        return gated_feed_forward(total, gate, up, down, residual=total)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run, out = record(layer)
        first = out.clone()
        run()
        assert torch.equal(out, first)
        for step in range(5):
            x.copy_(normal(2, 1, 64, dtype=dtype, seed=10 + step))
            w_out.mul_(1.25)
            lengths += torch.tensor([1, 4])
            run()
            assert torch.equal(out, layer())
    finally:
        torch.set_num_threads(before)


def test_large_kernels_too():
    """Regions of many tasks, and kernels that wait for one another inside one."""
    q, k, v = (normal(2, 150, 4, 32, seed=i) for i in range(3))
    starts = torch.tensor([0, 100, 150], dtype=torch.int32)
    weight = normal(300, 128)

    def step():
        out = attention(q, k, v, causal=True)
        packed = attention_varlen(q[0], k[0], v[0], starts, starts)
        return linear(out.reshape(2, 150, 128), weight), packed

    run, (a, b) = record(step)
    for seed in range(3):
        v.copy_(normal(2, 150, 4, 32, seed=20 + seed))
        run()
        expected = step()
        assert torch.equal(a, expected[0]) and torch.equal(b, expected[1])


def test_it_holds_on_to_its_memory():
    """Nobody else keeps what stands between two kernels, or what goes in."""

    def make():
        x, up, down = normal(3, 32), normal(48, 32), normal(16, 48)
        return record(lambda: linear(linear(x, up), down))

    run, out = make()
    first = out.clone()
    trash = [torch.full((3, 48), torch.nan) for _ in range(100)]
    run()
    assert torch.equal(out, first) and len(trash) == 100


@pytest.mark.parametrize(
    "step",
    [
        lambda x: linear(x, x) + 1,
        lambda x: linear(x, x).sum(),
        lambda x: linear(x.t().contiguous(), x),
        lambda x: linear(x, x, dropout_p=0.5),
    ],
    ids=["add", "sum", "copy", "dropout"],
)
def test_what_it_cannot_see_is_refused(step):
    x = normal(8, 8)
    with pytest.raises(RuntimeError, match=r"only fastattn's kernels can be recorded.*got aten"):
        record(lambda: step(x))
    run, out = record(lambda: linear(x, x))  # and nothing is left over
    run()
    assert torch.equal(out, linear(x, x))


def test_a_recording_in_a_recording_is_refused():
    x = normal(8, 8)
    with pytest.raises(ValueError, match="a program is being recorded"):
        record(lambda: record(lambda: linear(x, x)))


def test_another_thread_is_not_recorded():
    x, others = normal(8, 8), []

    def step():
        worker = threading.Thread(target=lambda: others.append(linear(x, x)))
        worker.start()
        worker.join()
        return linear(x, x)

    run, out = record(step)
    x.mul_(2)
    run()
    assert torch.equal(out, linear(x, x)) and torch.equal(others[0] * 4, out)


def test_devices_without_one():
    assert dispatch.recorder(torch.device("meta")) is None
