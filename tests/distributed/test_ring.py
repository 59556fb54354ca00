"""Ring attention over 2 and 4 processes against one, forward and backward."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastattn import attention
from fastattn.distributed import local_positions, ring_attention, shard_sequence, unshard_sequence
from fastattn.nn import RotaryEmbedding
from fastattn.ops.rotary import rotary
from fastattn.testing.check import results, upstream
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def both(cases):
    return pytest.mark.parametrize("ranks", cases, indirect=True)


def draw(shape, dtype):
    return qkv(*shape, dtype=dtype)


def sinks_of(nheads):
    return torch.linspace(-1.0, 3.0, nheads)


def check_ring(shape, dtype, order, options, backend=None, group=None):
    """One rank's part of a call; on each rank the whole result is held against one process."""
    q, k, v = draw(shape, dtype)
    if options.pop("sinks", False):
        options["sinks"] = sinks_of(shape[1]).to(dtype)
    wide = {**options, **({"sinks": options["sinks"].double()} if "sinks" in options else {})}
    base = results(q=q, k=k, v=v, backend="reference", **options)
    truth = results(q=q.double(), k=k.double(), v=v.double(), backend="reference", **wide)
    cut = {"order": order, "group": group}
    leaves = [shard_sequence(x, **cut).requires_grad_() for x in (q, k, v)]
    if "sinks" in options:
        options["sinks"] = options["sinks"].detach().requires_grad_()
        leaves.append(options["sinks"])
    out, lse = ring_attention(*leaves[:3], return_lse=True, backend=backend, **cut, **options)
    incoming = (
        shard_sequence(upstream(base["out"]), **cut),
        shard_sequence(upstream(base["lse"]), 2, **cut),
    )
    gradients = torch.autograd.grad((out, lse), leaves, incoming)
    found = {"out": unshard_sequence(out.detach(), **cut), "lse": unshard_sequence(lse.detach(), 2, **cut)}
    found |= {
        name: unshard_sequence(x, **cut) for name, x in zip(("dq", "dk", "dv"), gradients[:3], strict=True)
    }
    if "sinks" in options:
        found["dsinks"] = gradients[3].clone()
        dist.all_reduce(found["dsinks"], group=group)
    for name, x in truth.items():
        terms = shape[0] * shape[3] if name == "dsinks" else 1  # queries that share it
        assert_close(found[name], base[name], x, name, dtype, terms)
    assert out.dtype is dtype and lse.dtype is F32


SMALL = (2, 4, 2, 64, 64, 16, 24)  # B, H, Hk, Sq, Sk, D, Dv
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "window_causal": {"causal": True, "window_size": (30, -1)},
    "window_right": {"window_size": (-1, 7)},
    "softcap_scale": {"causal": True, "softcap": 3.0, "softmax_scale": 0.4},
    "sinks": {"causal": True, "sinks": True},
    "sinks_full": {"sinks": True},
    "scale_zero": {"softmax_scale": 0.0},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.0])},
    "alibi_batch": {"alibi_slopes": torch.linspace(0.4, 0.0, 8).view(2, 4), "causal": True},
    "everything": {
        "alibi_slopes": torch.tensor([0.5, 0.1, 0.02, 0.3]),
        "window_size": (40, 2),
        "sinks": True,
        "softcap": 4.0,
        "softmax_scale": 0.3,
    },
}


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
@pytest.mark.parametrize("options", OPTIONS)
@both([2])
def test_two(ranks, backend, options, order):
    ranks(check_ring, SMALL, F32, order, OPTIONS[options], backend)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("options", ["full", "causal", "window", "everything"])
@both([4])
def test_four(ranks, backend, options, dtype):
    ranks(check_ring, SMALL, dtype, "zigzag", OPTIONS[options], backend)


@both([4])
def test_four_contiguous(ranks):
    ranks(check_ring, SMALL, F32, "contiguous", OPTIONS["causal"])
    ranks(check_ring, SMALL, F32, "contiguous", {"window_size": (20, 0), "sinks": True})


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@both([2])
def test_types(ranks, backend, dtype):
    ranks(check_ring, SMALL, dtype, "zigzag", {"causal": True, "sinks": True}, backend)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 4, 4, 1, 1), (3, 6, 1, 300, 300, 33, 17), (1, 2, 2, 24, 24, 128, 128), (0, 2, 2, 8, 8, 4, 4)],
    ids=str,
)
@both([2])
def test_shapes(ranks, backend, shape):
    ranks(check_ring, shape, F32, "zigzag", {"causal": True}, backend)


@both([2])
def test_queries_of_another_length(ranks):
    """Without positions q may be longer or shorter than k: cross-attention."""
    ranks(check_ring, (2, 4, 2, 6, 64, 16), F32, "contiguous", {})
    ranks(check_ring, (2, 4, 2, 64, 6, 16), F32, "contiguous", {"sinks": True})
    ranks(check_ring, (2, 4, 2, 6, 0, 16), F32, "contiguous", {})


@pytest.mark.parametrize("options", ["causal", "window", "sinks", "everything"])
@both([2])
def test_reference_backend(ranks, options):
    ranks(check_ring, SMALL, F32, "zigzag", OPTIONS[options], backend="reference")


def check_large_scores():
    """One rounding of lse is a factor on a row's weights: what it lost must reach the backward."""
    q, k, v = draw((1, 2, 2, 64, 64, 16), F32)
    q, k = q * 50.0, k * 50.0
    base = results(q=q, k=k, v=v, backend="reference", causal=True)
    truth = results(q=q.double(), k=k.double(), v=v.double(), backend="reference", causal=True)
    leaves = [shard_sequence(x).requires_grad_() for x in (q, k, v)]
    out, lse = ring_attention(*leaves, causal=True, return_lse=True)
    incoming = shard_sequence(upstream(base["out"])), shard_sequence(upstream(base["lse"]), 2)
    for name, x in zip(("dq", "dk", "dv"), torch.autograd.grad((out, lse), leaves, incoming), strict=True):
        assert_close(unshard_sequence(x), base[name], truth[name], name)


@both([2])
def test_large_scores(ranks):
    ranks(check_large_scores)


def check_groups():
    """Two rings of two, each with its own sequence; and a group that some are not in."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = groups[dist.get_rank() % 2]
    check_ring(SMALL, F32, "zigzag", {"causal": True}, group=mine)
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="group must be one that this process belongs to"):
        ring_attention(x, x, x, group=groups[1 - dist.get_rank() % 2])
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup or None, got str"):
        ring_attention(x, x, x, group="gloo")


@both([4])
def test_groups(ranks):
    ranks(check_groups)


def same_bits_twice(order, options):
    q, k, v = (shard_sequence(x, order=order) for x in draw(SMALL, F32))
    first = ring_attention(q, k, v, order=order, **options)
    with torch.no_grad():
        return torch.equal(first, ring_attention(q, k, v, order=order, check_ranks=False, **options))


@both([2])
def test_without_a_check_and_bit_for_bit(ranks):
    assert ranks(same_bits_twice, "zigzag", {"causal": True}) == [True, True]


def check_autocast():
    q, k, v = (shard_sequence(x).requires_grad_() for x in draw(SMALL, F32))
    with torch.autocast("cpu", dtype=BF16):
        out = ring_attention(q, k, v, causal=True)
    narrow = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, ring_attention(*narrow, causal=True))
    out.sum().backward()
    assert q.grad.dtype is k.grad.dtype is v.grad.dtype is F32


@both([2])
def test_autocast(ranks):
    ranks(check_autocast)


def check_compiled():
    """A graph break, and the same result."""
    q, k, v = (shard_sequence(x) for x in draw(SMALL, F32))
    compiled = torch.compile(lambda q: ring_attention(q * 2.0, k, v, causal=True) + 1.0, backend="eager")
    assert torch.equal(compiled(q), ring_attention(q * 2.0, k, v, causal=True) + 1.0)


@both([2])
def test_compiled(ranks):
    ranks(check_compiled)


class Layer(nn.Module):
    """Rotation, attention and a projection over a sequence, or over this rank's part of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.rotary = RotaryEmbedding(8, max_positions=64)

    def forward(self, x, positions, attend, backend=None):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).unbind(2)
        q, k = (
            rotary(y, self.rotary.cos, self.rotary.sin, positions=positions, backend=backend) for y in (q, k)
        )
        return self.out(attend(q, k, v, causal=True, backend=backend).flatten(2))


def check_training():
    """DistributedDataParallel's mean of the ranks' gradients is the whole loss's gradient."""
    x, target = torch.randn(2, 2, 64, 32, generator=torch.Generator().manual_seed(3)).unbind(0)
    parallel = DistributedDataParallel(Layer())
    mine, wanted = shard_sequence(x), shard_sequence(target)
    positions = local_positions(mine.shape[1])
    (parallel(mine, positions, ring_attention) - wanted).square().mean().backward()
    gradients = []
    for dtype in (F32, torch.float64):
        layer = Layer().to(dtype)
        out = layer(x.to(dtype), torch.arange(64), attention, backend="reference")
        (out - target).square().mean().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for p, base, truth in zip(parallel.parameters(), *gradients, strict=True):
        assert_close(p.grad, base, truth)


@both([2])
def test_training(ranks):
    ranks(check_training)


def memory_of(length, backend):
    """The growth of the process's peak, in bytes, by a forward and backward of so many tokens."""

    def peak():
        with open("/proc/self/status") as status:
            return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) * 1024

    q, k, v = draw((1, 1, 1, length, length, 8), F32)
    leaves = [shard_sequence(x).requires_grad_() for x in (q, k, v)]
    start = peak()
    ring_attention(*leaves, causal=True, backend=backend).sum().backward()
    return peak() - start


@both([2])
def test_memory(ranks, kernel_backend):
    length, fraction = 8192, 4 * 8192**2 / 8  # of the scores
    assert max(ranks(memory_of, length, kernel_backend)) < fraction
    assert min(ranks(memory_of, length, "reference")) > fraction  # which would have been seen


def message_of(change, only=None):
    """The error of a call, if `only` is given with a change on that rank alone."""
    given = {name: torch.zeros(1, 4, 2, 8) for name in "qkv"}
    if only is None or dist.get_rank() == only:
        given |= {name: x() if callable(x) else x for name, x in change.items()}
    try:
        ring_attention(**given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


ODD = {name: torch.zeros(1, 5, 2, 8) for name in "qkv"}
REFUSED = {  # alike on both ranks
    "rank": ({"q": torch.zeros(4, 2, 8)}, "ValueError: q must have 4 dim"),
    "order": ({"order": "ring"}, r"ValueError: order must be one of \('zigzag', 'contiguous'\), got 'ring'"),
    "odd": ({**ODD, "causal": True}, "ValueError: q's length must be even in zigzag order.*got 5"),
    "lengths": (
        {"q": torch.zeros(1, 6, 2, 8), "causal": True},
        "ValueError: q and k must have the same length where causal, .* is given, got 6 and 4",
    ),
    "window": ({"window_size": (1,)}, "ValueError: window_size must be two integers"),
    "backend": ({"backend": "cpux"}, "ValueError: backend='cpux' is unknown"),
    "type": ({name: torch.zeros(1, 4, 2, 8).double() for name in "qkv"}, "NotImplementedError:.*float64"),
}


@pytest.mark.parametrize("case", REFUSED)
@both([2])
def test_bad_input(ranks, case):
    change, message = REFUSED[case]
    for found in ranks(message_of, change):
        assert re.match(message, found, re.DOTALL), found


UNEQUAL = {  # on rank 1 alone
    "length": ({"k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)}, "Sk, the length of k, got 4, 6"),
    "batch": ({name: torch.zeros(2, 4, 2, 8) for name in "qkv"}, "agree on B, got 1, 2"),
    "heads": ({name: torch.zeros(1, 4, 1, 8) for name in "qkv"}, "agree on H, got 2, 1"),
    "type": ({name: torch.zeros(1, 4, 2, 8).half() for name in "qkv"}, "q's type .*got 0, 2"),
    "slopes": ({"alibi_slopes": torch.zeros(2)}, "whether there are alibi_slopes, got 0, 1"),
    "causal": ({"causal": True}, r"window_right \(causal: 0\), got -1, 0"),
    "scale": ({"softmax_scale": 0.5}, "softmax_scale, got 0.353553, 0.5"),
    "order": ({"order": "contiguous"}, "agree on order"),
    "gradient": ({"q": torch.zeros(1, 4, 2, 8).requires_grad_()}, "a gradient is needed, got 0, 1"),
}


@pytest.mark.parametrize("case", UNEQUAL)
@both([2])
def test_ranks_that_disagree(ranks, case):
    """An error on every rank, and nobody waits."""
    change, message = UNEQUAL[case]
    found = ranks(message_of, change, only=1)
    assert found[0] == found[1]
    assert re.match("ValueError: all ranks of the group must agree on", found[0])
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 2, 8)}, "ValueError: q must have 4 dim"),
        ({"q": None}, "TypeError: q must be a tensor"),
        ({"order": "ring"}, "ValueError: order must be one of"),
        ({"backend": "ring"}, "ValueError: backend='ring' is unknown"),
    ],
    ids=str,
)
@both([2])
def test_one_rank_that_refuses(ranks, change, message):
    zero, one = ranks(message_of, change, only=1)
    assert zero == "ValueError: rank 1 of the group has refused its arguments; it says why"
    assert one.startswith(message)


def check_second_derivative():
    q, k, v = (shard_sequence(x).requires_grad_() for x in draw(SMALL, F32))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(ring_attention(q, k, v).sum(), q, create_graph=True)


@both([2])
def test_no_second_derivative(ranks):
    ranks(check_second_derivative)


def test_without_a_group():
    x = torch.zeros(1, 4, 2, 8)
    for call in (lambda: ring_attention(x, x, x), lambda: shard_sequence(x), lambda: local_positions(4)):
        with pytest.raises(RuntimeError, match=r"not initialized.*torchrun"):
            call()


def test_the_document_runs(tmp_path):
    root = Path(__file__).parents[2]
    text = (root / "docs" / "distributed.md").read_text()
    script = tmp_path / "ring.py"
    script.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    paths = [os.environ.get("PYTHONPATH", ""), str(root)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    found = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120)
    parts = re.findall(r"rank \d: loss (\d\.\d+), parts of (\d+) tokens", found.stdout)
    assert parts == [(parts[0][0], "256")] * 2
