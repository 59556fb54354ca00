"""What the ops around a matrix product read and write, and that threads do not show."""

import pytest
import torch

from fastattn import dispatch
from fastattn.ops import feed_forward, gated_feed_forward, linear, linear_cross_entropy
from fastattn.testing.check import refusal, upstream
from fastattn.testing.check_linear import EVERY_OPTION, OPS, inputs, results, with_options
from fastattn.testing.fence import FencedAllocations, fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MODULES = {
    x.__name__.split(".")[-1]: x for x in (linear, feed_forward, gated_feed_forward, linear_cross_entropy)
}
SIZES = {
    "linear": [(37, 53, 29), (1, 130, 301), (150, 64, 96), (7, 400, 33)],
    "feed_forward": [(37, 53, 60, 29), (1, 64, 301, 65), (150, 32, 96, 40), (7, 65, 130, 33)],
    "gated_feed_forward": [(37, 53, 60, 29), (1, 64, 301, 65), (150, 32, 96, 40), (7, 65, 130, 33)],
    "linear_cross_entropy": [(37, 53, 129), (1, 64, 1003), (150, 32, 300), (7, 65, 2100)],
}
every_option = pytest.mark.parametrize(("op", "option"), EVERY_OPTION)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def calls(backend, op, option, dtype):
    """A call for each of the op's sizes; skips with the backend's reason where it refuses."""
    for sizes in SIZES[op]:
        given = with_options(op, option, inputs(op, sizes, dtype=dtype))
        if reason := refusal(backend, op=OPS[op], **given):
            pytest.skip(reason)
        yield given


def assert_same(ours, expected):
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name


@every_option
@every_type
def test_fences(kernel_backend, dtype, op, option):
    """NaN beside every input, and a guarded band beside every output: neither may be touched."""
    for given in calls(kernel_backend, op, option, dtype):
        guarded = {name: fence(x) for name, x in given.items()}
        before = {name: x.clone() for name, x in guarded.items() if isinstance(x, torch.Tensor)}
        found = guarded_results(kernel_backend, op, guarded)
        expected = guarded_results(kernel_backend, op, given)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)
        for name, x in before.items():
            assert torch.equal(x, guarded[name]), f"{name} was changed"


def fence(x):
    """x amid NaN, in the order of its own strides; integers stay, since numbers beside them mean nothing."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return fenced(x.t()).t() if x.ndim == 2 and x.stride(0) == 1 else fenced(x)


def guarded_results(backend, op, given):
    """All that the launchers return, from them themselves: within an op no mode sees allocations."""
    given = dict(given)
    save = not given.pop("save_memory", False)
    call = MODULES[op].check(**given)
    module = dispatch.choose(op, backend, call.x.device, call)
    forward, backward = (getattr(module, f"{op}_{way}") for way in ("fwd", "bwd"))
    with FencedAllocations() as fences:
        if op == "linear_cross_entropy":
            loss, lse = forward(call)
            found = (
                loss,
                lse,
                *backward(fenced(upstream(loss)), lse, call, True, True, call.bias is not None),
            )
        else:
            out, z = forward(call, save)
            inputs = call[: call._fields.index("residual")]
            need = tuple(x is not None for x in inputs)
            dout = fenced(upstream(out))
            gradients = backward(dout, z, call, *(need if op == "linear" else (need,)))
            found = (out, *gradients) if z is None else (out, z, *gradients)
    fences.assert_intact()
    return found


@every_option
@every_type
def test_threads(kernel_backend, set_threads, dtype, op, option):
    for given in calls(kernel_backend, op, option, dtype):
        runs = []
        for threads in (1, 2, 3):
            set_threads(threads)
            runs.append(results(op, given, backend=kernel_backend))
            # Without a gradient to come, a call may take another way.
            alone = results(op, given, backend=kernel_backend, gradients=False)
            runs[-1]["out alone"] = alone["out"]
        for run in runs[1:]:
            assert_same(run, runs[0])


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
@every_type
def test_leftovers_of_an_earlier_call_do_not_show(kernel_backend, op, dtype):
    """Work space may be reused, what was in it may not."""
    for given in calls(kernel_backend, op, "everything", dtype):
        clean = results(op, given, backend=kernel_backend)
        for sizes in SIZES[op]:
            poison = with_options(op, "everything", inputs(op, sizes, dtype=dtype))
            poison["x"] = torch.full_like(poison["x"], torch.nan)
            results(op, poison, backend=kernel_backend)
        assert_same(results(op, given, backend=kernel_backend), clean)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_gradients_of_zero(backend, op):
    sizes = (0, *SIZES[op][0][1:])
    option = "sum" if op == "linear_cross_entropy" else "everything"
    given = with_options(op, option, inputs(op, sizes))
    if reason := refusal(backend, op=OPS[op], **given):
        pytest.skip(reason)
    for name, x in results(op, given, backend=backend).items():
        assert (x == 0).all(), name
