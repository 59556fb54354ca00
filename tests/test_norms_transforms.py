"""layer_norm, rms_norm and rotary under torch's transforms: opcheck, compile, export, autocast, vmap, ..."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastattn import layer_norm, rms_norm, rotary
from fastattn.ops import layer_norm as layer_norm_op
from fastattn.ops import rms_norm as rms_norm_op
from fastattn.ops import rotary as rotary_op
from fastattn.testing.check import upstream
from fastattn.testing.check_op import (
    NORM_OPTION_SETS,
    ROTARY_OPTION_SETS,
    norm_inputs,
    op_results,
    rotary_inputs,
)

# torch's own, about itself: dynamo and jvp use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CASES = [*NORM_OPTION_SETS, *((rotary, option) for option in ROTARY_OPTION_SETS)]
NORMS = (layer_norm, rms_norm)
all_cases = pytest.mark.parametrize(
    ("op", "option"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__
)
named = pytest.mark.parametrize("op", [*NORMS, rotary], ids=lambda op: op.__name__)


def inputs(op, option="", *, dtype=torch.float32, seed=0, lead=(2, 6)):
    if op is rotary:
        return rotary_inputs(option or "tables", *lead, 3, 16, rotary_dim=8, dtype=dtype, seed=seed)
    return norm_inputs(op, option or "everything", *lead, 24, dtype=dtype, seed=seed)


def leaves_of(given):
    names = [name for name in ("x", "weight", "bias", "residual") if name in given]
    return [given[name].requires_grad_() for name in names]


def outputs_of(raw):
    return (raw,) if isinstance(raw, torch.Tensor) else raw


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(kernel_backend, op, option, dtype):
    given = inputs(op, option, dtype=dtype)
    if op is rotary:
        call = rotary_op.check(**given)
        torch.library.opcheck(torch.ops.fastattn.rotary_fwd, (*call, kernel_backend), test_utils=OPCHECKS)
        return
    name, module = op.__name__, layer_norm_op if op is layer_norm else rms_norm_op
    forward, backward = (getattr(torch.ops.fastattn, f"{name}_{way}") for way in ("fwd", "bwd"))
    call = module.check(**given)
    torch.library.opcheck(forward, (*call, kernel_backend), test_utils=OPCHECKS)
    out, total, *moments = forward(*call, kernel_backend)
    dtotal = None if call.residual is None else upstream(total)
    has_weight = call.weight is not None
    last = (
        (call.weight, call.bias, has_weight, call.bias is not None)
        if op is layer_norm
        else (call.weight, call.weight_offset, has_weight)
    )
    normed = call.x if call.residual is None else total
    args = (upstream(out), dtotal, normed, *moments, *last, kernel_backend)
    torch.library.opcheck(backward, args, test_utils=OPCHECKS)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @all_cases
    def test_forward_and_backward(self, kernel_backend, op, option):
        """The same bits as eager, without a graph break."""
        given = inputs(op, option)
        leaves = leaves_of(given)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")

        def run(op):
            outputs = outputs_of(op(**given, backend=kernel_backend))
            return *outputs, *torch.autograd.grad(outputs, leaves, [upstream(x) for x in outputs])

        for ours, expected in zip(run(compiled), run(op), strict=True):
            assert torch.equal(ours, expected)

    def test_inductor(self, kernel_backend):
        """A block of a transformer, with gradients."""
        given = inputs(rotary)

        def block(x, residual):
            h, residual = rms_norm(x * 2, residual=residual, backend=kernel_backend)
            q = rotary(h.unflatten(-1, (3, 16)), given["cos"], given["sin"], backend=kernel_backend)
            return layer_norm(q.flatten(2).relu() + residual, backend=kernel_backend)

        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(2, 6, 48, generator=generator, requires_grad=True) for _ in range(2))
        expected, out = block(x, residual), torch.compile(block, fullgraph=True)(x, residual)
        assert torch.equal(out, expected)
        gradients = [torch.autograd.grad(y, (x, residual), upstream(y)) for y in (out, expected)]
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.equal(ours, theirs)

    @named
    def test_another_batch(self, kernel_backend, op):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
        for lead in ((2, 5), (3, 6), (7, 9)):
            given = inputs(op, lead=lead)
            ours, expected = (outputs_of(f(**given, backend=kernel_backend)) for f in (compiled, op))
            for x, y in zip(ours, expected, strict=True):
                assert torch.equal(x, y)

    @pytest.mark.parametrize("op", NORMS, ids=lambda op: op.__name__)
    def test_one_tensor_in_two_places(self, kernel_backend, op):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")

        def gradient(op):
            out, total = op(x, residual=x, backend=kernel_backend)
            return torch.autograd.grad(out.square().sum() + total.sum(), x)[0]

        assert torch.equal(gradient(compiled), gradient(op))


@named
def test_export_keeps_the_op(kernel_backend, op):
    given = inputs(op)

    class Module(torch.nn.Module):
        def forward(self, given):
            return op(**given, backend=kernel_backend)

    program = torch.export.export(Module(), (given,))
    name = getattr(torch.ops.fastattn, f"{op.__name__}_fwd").default
    assert name in [node.target for node in program.graph.nodes]
    ours = outputs_of(program.module()(given))
    for x, y in zip(ours, outputs_of(op(**given, backend=kernel_backend)), strict=True):
        assert torch.equal(x, y)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, op, dtype):
    given = inputs(op, dtype=dtype)
    expected = op_results(op, given, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = op_results(op, given, backend=backend)
    for name, x in expected.items():
        assert found[name].dtype is x.dtype and torch.equal(found[name], x)


# Without a batching rule torch runs the op once for each slice, and warns that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@named
class TestFunc:
    def test_vmap(self, kernel_backend, op):
        calls = [inputs(op, seed=seed) for seed in range(3)]
        run = partial(op, **{name: x for name, x in calls[0].items() if name != "x"}, backend=kernel_backend)
        found = outputs_of(torch.func.vmap(run)(torch.stack([given["x"] for given in calls])))
        expected = zip(*(outputs_of(run(given["x"])) for given in calls), strict=True)
        for x, ys in zip(found, expected, strict=True):
            assert torch.equal(x, torch.stack(ys))

    def test_gradients_of_each_sample(self, kernel_backend, op):
        calls = [inputs(op, seed=seed) for seed in range(3)]
        others = {name: x for name, x in calls[0].items() if name != "x"}

        def loss(x):
            return sum(out.square().sum() for out in outputs_of(op(x, **others, backend=kernel_backend)))

        gradient = torch.func.grad(loss)
        found = torch.func.vmap(gradient)(torch.stack([given["x"] for given in calls]))
        assert torch.equal(found, torch.stack([gradient(given["x"]) for given in calls]))

    def test_forward_mode_is_refused(self, kernel_backend, op):
        given = inputs(op)
        run = partial(op, **{name: x for name, x in given.items() if name != "x"}, backend=kernel_backend)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.jvp(run, (given["x"],), (given["x"],))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
            run(forward_ad.make_dual(given["x"], given["x"]))


@named
@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors(kernel_backend, op, grad):
    with FakeTensorMode():
        given = inputs(op, dtype=torch.bfloat16)
        given["x"].requires_grad_(grad)
        outputs = outputs_of(op(**given, backend=kernel_backend))
    for out in outputs:
        assert out.shape == given["x"].shape and out.dtype is torch.bfloat16
        assert out.requires_grad is grad


@named
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(kernel_backend, op, use_reentrant):
    given = inputs(op)
    x = given.pop("x").requires_grad_()

    def gradient(out):
        x.grad = None
        out.square().sum().backward()
        return x.grad

    def run(x):
        return outputs_of(op(x, **given, backend=kernel_backend))[0]

    expected = gradient(run(x))
    assert torch.equal(gradient(checkpoint(run, x, use_reentrant=use_reentrant)), expected)


@named
def test_parameters_and_other_subclasses_are_plain_tensors_to_it(kernel_backend, op):
    class Marked(torch.Tensor):
        pass

    given = inputs(op)
    expected = outputs_of(op(**given, backend=kernel_backend))[0]
    for kind in (torch.nn.Parameter, lambda x: x.as_subclass(Marked)):
        out = outputs_of(op(**given | {"x": kind(given["x"])}, backend=kernel_backend))[0]
        assert torch.equal(out, expected)
