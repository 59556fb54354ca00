"""What attention reads, writes and allocates: strides, fences around its tensors, the memory it takes."""

import sys

import pytest
import torch

from fastattn import attention, dispatch
from fastattn.ops import attention as op
from fastattn.testing.check import OPTION_SETS, option_set, refusal, results, upstream
from fastattn.testing.fence import FencedAllocations, fenced
from fastattn.testing.inputs import qkv

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 4, 2, 67, 131, 33, 17), (1, 3, 1, 1, 1300, 64, 64), (1, 2, 2, 301, 149, 65, 127)]


def packed(batch, nheads, seqlen, head_dim, dtype):
    """q, k and v as slices of one tensor, as a fused projection makes them."""
    x = torch.randn(batch, seqlen, 3, nheads, head_dim, generator=torch.Generator().manual_seed(0))
    return x.to(dtype).unbind(2)


def bshd_of(order, q, k, v):
    """The same tensors, laid out in memory in another order of dimensions."""
    inverse = [order.index(dim) for dim in range(4)]
    return [x.permute(order).contiguous().permute(inverse) for x in (q, k, v)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
class TestStrides:
    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3), (1, 2, 0, 3)], ids=str)
    def test_permuted(self, check, dtype, causal, order):
        for shape in SHAPES:
            check(*bshd_of(order, *qkv(*shape, dtype=dtype)), causal=causal)

    def test_packed(self, check, dtype, causal):
        check(*packed(2, 3, 77, 40, dtype), causal=causal)

    def test_slices_of_a_larger_tensor(self, check, dtype, causal):
        q, k, v = qkv(3, 6, 6, 90, 120, 80, dtype=dtype)
        check(q[1:, 7:60, 1::2, 3:60], k[1:, ::2, :3, 5:62], v[:2, 1::2, 2:5, :31], causal=causal)

    def test_expanded_batch_and_head(self, check, dtype, causal):
        q, k, v = qkv(1, 4, 1, 50, 60, 32, dtype=dtype)
        batch = 3
        check(q.expand(batch, -1, -1, -1), k.expand(batch, -1, 2, -1), v.expand(batch, -1, 2, -1),
              causal=causal)  # fmt: skip

    def test_expanded_length(self, check, dtype, causal):
        q, k, v = qkv(2, 2, 2, 1, 1, 32, dtype=dtype)
        check(q.expand(-1, 40, -1, -1), k.expand(-1, 30, -1, -1), v.expand(-1, 30, -1, -1), causal=causal)

    def test_head_dim_1_with_any_last_stride(self, check, dtype, causal):
        q, k, v = (x[..., 2:3] for x in qkv(1, 2, 2, 20, 30, 7, dtype=dtype))
        q = q.as_strided(q.shape, (*q.stride()[:3], 5))
        check(q, k, v, causal=causal)


class TestOptionStrides:
    def test_masks_and_biases(self, check):
        q, k, v = qkv(2, 4, 2, 50, 70, 16)
        mask = torch.rand(70, 50, generator=torch.Generator().manual_seed(0)) < 0.7
        bias = torch.randn(2, 70, 4, 101, generator=torch.Generator().manual_seed(0))
        check(q, k, v, mask=mask.T)
        check(q, k, v, mask=mask.T.expand(2, 4, 50, 70))
        check(q, k, v, bias=bias.permute(0, 2, 3, 1)[:, :, ::2][:, :, :50])
        check(q, k, v, bias=bias[..., :70].transpose(1, 2)[:, :, 3:53])

    @pytest.mark.parametrize("shape", [(1, 4, 50, 70), (2, 1, 50, 70), (2, 4, 1, 70), (2, 4, 50, 1)], ids=str)
    def test_expanded(self, check, shape):
        """An expanded bias holds each number once, and still has one gradient for each position."""
        q, k, v = qkv(2, 4, 2, 50, 70, 16)
        bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        check(q, k, v, mask=(bias < 0.5).expand(2, 4, 50, 70))
        check(q, k, v, bias=bias.expand(2, 4, 50, 70))

    def test_sinks_and_slopes(self, check):
        q, k, v = qkv(2, 4, 2, 50, 70, 16)
        numbers = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
        check(q, k, v, sinks=numbers[0, ::2], alibi_slopes=numbers[1, 1::2])
        check(q, k, v, sinks=numbers[0, :1].expand(4), alibi_slopes=numbers[:, 2:4].T)


@pytest.mark.parametrize("option", OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fences(kernel_backend, dtype, option):
    """NaN beside every input, and a guarded band beside every output: neither may be touched."""
    for shape in SHAPES:
        q, k, v = qkv(*shape, dtype=dtype)
        given = {"q": q, "k": k, "v": v, **option_set(option, q, k)}
        if reason := refusal(kernel_backend, **given):
            pytest.skip(reason)
        guarded = {name: fenced(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        before = {name: x.clone() for name, x in guarded.items() if isinstance(x, torch.Tensor)}
        found = guarded_results(kernel_backend, guarded)
        for name, x in results(**given, backend=kernel_backend).items():
            assert torch.equal(found[name], x), name
        for name, x in before.items():
            assert torch.equal(x, guarded[name]), f"{name} was changed"


def guarded_results(backend, given):
    """What `results` returns, from the launchers themselves: within an op no mode sees allocations."""
    call = op.check(**given)
    module = dispatch.choose("attention", backend, call.q.device, call)
    with FencedAllocations() as fences:
        saved = module.attention_fwd(call)
        out, lse, _ = saved
        upstreams = fenced(upstream(out)), fenced(upstream(lse))
        gradients = module.attention_bwd(*upstreams, *saved, call, call.bias is not None)
    fences.assert_intact()
    names = ("dq", "dk", "dv", "dbias", "dsinks")
    found = {"out": out, "lse": lse, **dict(zip(names, gradients, strict=True))}
    if call.bias is not None:
        found["dbias"] = found["dbias"].view(given["bias"].shape)
    return found


def test_leftovers_of_an_earlier_call_do_not_show(backend):
    """Work space may be reused, what was in it may not."""
    q, k, v = qkv(2, 4, 2, 67, 131, 33)
    given = {"q": q, "k": k, "v": v, **option_set("everything", q, k)}
    if reason := refusal(backend, **given):
        pytest.skip(reason)
    clean = results(**given, backend=backend)
    for dtype in TYPES:
        for shape in ((2, 8, 2, 150, 300, 64, 64), (1, 4, 1, 1, 2000, 96, 96)):
            poison = (torch.full_like(x, torch.nan) for x in qkv(*shape, dtype=dtype))
            results(**dict(zip("qkv", poison, strict=True)), backend=backend)
    for name, x in results(**given, backend=backend).items():
        assert torch.equal(x, clean[name]), name


# The peak of a fresh process, in bytes. VmHWM and not ru_maxrss, which starts at the parent's size.
_MEASURE = """
import re, torch
from fastattn import attention

def peak():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])

def inputs(seqlen, nheads_k):
    shapes = (1, seqlen, 8, 64), (1, seqlen, nheads_k, 64), (1, seqlen, nheads_k, 64)
    return [torch.empty(shape, dtype={dtype}).normal_().requires_grad_({backward}) for shape in shapes]

def run(qkv, dout):
    out, lse = attention(*qkv, causal=True, return_lse=True, backend={backend!r})
    forward = peak()
    if {backward}:
        out.backward(dout)
    return forward, out.nbytes + lse.nbytes

small = inputs(64, {nheads_k})
run(small, torch.ones_like(small[0]))
qkv = inputs({seqlen}, {nheads_k})
dout = torch.ones_like(qkv[0])
start = peak()
forward, outputs = run(qkv, dout)
print(forward - start - outputs, peak() - start - outputs, sum(x.nbytes for x in qkv))
"""


@pytest.fixture
def added(run_python, kernel_backend):
    """(forward's, both passes' extra memory, size of q, k and v) in bytes, in a fresh process."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def measure(**sizes):
        done = run_python(_MEASURE.format(backend=kernel_backend, **sizes))
        assert done.returncode == 0, done.stderr
        return [int(number) for number in done.stdout.split()]

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_memory_of_the_forward_pass(added, dtype):
    forward, _, _ = added(dtype=dtype, seqlen=32768, nheads_k=8, backward=False)
    assert forward <= 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("nheads_k", [8, 1])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_memory_of_the_backward_pass(added, dtype, nheads_k):
    _, both, inputs = added(dtype=dtype, seqlen=16384, nheads_k=nheads_k, backward=True)
    assert both <= 3 * inputs


def test_out_does_not_share_memory_with_v(backend):
    """Not even where the weights are all one."""
    q, k, v = qkv(1, 1, 1, 1, 1, 8)
    if reason := refusal(backend, q, k, v):
        pytest.skip(reason)
    out = attention(q, k, v, backend=backend)
    assert torch.equal(out, v) and out.data_ptr() != v.data_ptr()
