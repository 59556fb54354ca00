"""The ops around a matrix product under opcheck, compile, export, autocast, vmap, func.grad, fake tensors."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fastattn.ops import feed_forward, gated_feed_forward, linear, linear_cross_entropy
from fastattn.testing.check import upstream
from fastattn.testing.check_linear import EVERY_OPTION, OPS, differentiable, inputs, with_options

# torch's own, about itself: dynamo and jvp use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODULES = {
    x.__name__.split(".")[-1]: x for x in (linear, feed_forward, gated_feed_forward, linear_cross_entropy)
}
SIZES = {
    "linear": (6, 5, 4),
    "feed_forward": (6, 5, 8, 4),
    "gated_feed_forward": (6, 5, 8, 4),
    "linear_cross_entropy": (6, 5, 9),
}
WITHOUT_LOSS = [op for op in OPS if op != "linear_cross_entropy"]
every_op = pytest.mark.parametrize("op", OPS)


def call(op, *options, dtype=torch.float32, grad=False):
    given = inputs(op, SIZES[op], dtype=dtype)
    for option in options:
        given = with_options(op, option, given)
    for name, x in given.items():
        if grad and differentiable(name, x):
            given[name] = x.detach().requires_grad_()
    return given


def leaves(given):
    return [x for name, x in given.items() if differentiable(name, x)]


def ops_arguments(op, given, backend):
    """(arguments of the op's forward, those of its backward)."""
    given = dict(given)
    save = not given.pop("save_memory", False)
    call = MODULES[op].check(**given)
    forward_op = getattr(torch.ops.fastattn, f"{op}_fwd")
    if op == "linear_cross_entropy":
        loss, lse = forward_op(*call, backend)
        return (*call, backend), (upstream(loss), lse, *call, [True, True, call.bias is not None], backend)
    out, z = forward_op(*call, save, backend)
    need = [x is not None for x in call[: call._fields.index("residual")]]
    return (*call, save, backend), (upstream(out), z, *call, need, backend)


class TestOpcheck:
    @pytest.mark.parametrize(("op", "option"), EVERY_OPTION)
    def test_options(self, kernel_backend, op, option):
        forward, backward = ops_arguments(op, call(op, option), kernel_backend)
        # The gradient lives outside of the op, and nothing here depends on sizes.
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        for way, arguments in (("fwd", forward), ("bwd", backward)):
            checked = getattr(torch.ops.fastattn, f"{op}_{way}")
            torch.library.opcheck(checked, arguments, test_utils=tests)

    @every_op
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_in_full(self, kernel_backend, op, dtype):
        forward, backward = ops_arguments(op, call(op, "everything", dtype=dtype), kernel_backend)
        for way, arguments in (("fwd", forward), ("bwd", backward)):
            torch.library.opcheck(getattr(torch.ops.fastattn, f"{op}_{way}"), arguments)

    @every_op
    def test_a_gradient_alone(self, kernel_backend, op):
        _, backward = ops_arguments(op, call(op, "everything"), kernel_backend)
        need = backward[-2]
        for at in range(len(need)):
            alone = [index == at for index in range(len(need))]
            arguments = (*backward[:-2], alone, kernel_backend)
            checked = getattr(torch.ops.fastattn, f"{op}_bwd")
            torch.library.opcheck(checked, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @every_op
    @pytest.mark.parametrize("option", ["plain", "no_bias", "everything"])
    def test_forward_and_backward(self, kernel_backend, op, option):
        """The same bits as eager, without a graph break."""
        given = call(op, option, grad=True)
        compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")

        def run(function):
            out = function(**given, backend=kernel_backend)
            return out, *torch.autograd.grad(out, leaves(given), upstream(out) + 1)

        for ours, expected in zip(run(compiled), run(OPS[op]), strict=True):
            assert torch.equal(ours, expected)

    @every_op
    def test_inductor(self, kernel_backend, op):
        """Among other operations, with gradients."""
        given = call(op)

        def block(x):
            out = OPS[op](**given | {"x": (x * 2).relu()}, backend=kernel_backend)
            return out.square().sum()

        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
        expected = torch.autograd.grad(block(x), x)
        found = torch.autograd.grad(torch.compile(block, fullgraph=True)(x), x)
        assert torch.equal(found[0], expected[0])

    @every_op
    def test_other_numbers_of_rows(self, kernel_backend, op):
        compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (5, 9, 33):
            given = inputs(op, (rows, *SIZES[op][1:])) | {"backend": kernel_backend}
            assert torch.equal(compiled(**given), OPS[op](**given))

    @pytest.mark.parametrize("op", WITHOUT_LOSS)
    def test_dropout_without_a_seed(self, kernel_backend, op):
        """A new seed on every call of the compiled code, and torch.manual_seed rules it."""
        compiled = torch.compile(OPS[op], fullgraph=True, backend="aot_eager")
        given = call(op) | {"dropout_p": 0.5, "backend": kernel_backend}
        torch.manual_seed(0)
        first, second = compiled(**given), compiled(**given)
        torch.manual_seed(0)
        assert torch.equal(compiled(**given), first)
        assert not torch.equal(first, second)

    def test_a_wrong_class_is_refused_when_it_runs(self, kernel_backend):
        compiled = torch.compile(OPS["linear_cross_entropy"], fullgraph=True, backend="aot_eager")
        given = call("linear_cross_entropy") | {"target": torch.full((6,), 9)}
        with pytest.raises(ValueError, match="target must be in"):
            compiled(**given, backend=kernel_backend)


@every_op
def test_export_keeps_the_op(kernel_backend, op):
    given = call(op)

    class Module(torch.nn.Module):
        def forward(self, x):
            return OPS[op](**given | {"x": x}, backend=kernel_backend)

    program = torch.export.export(Module(), (given["x"],))
    assert getattr(torch.ops.fastattn, f"{op}_fwd").default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(given["x"]), Module()(given["x"]))


class TestAutocast:
    @every_op
    def test_casts(self, kernel_backend, op):
        given = call(op, grad=True)
        low = {
            name: x.detach().bfloat16().requires_grad_() if differentiable(name, x) else x
            for name, x in given.items()
        }
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = OPS[op](**given, backend=kernel_backend)
        expected = OPS[op](**low, backend=kernel_backend)
        assert out.dtype is expected.dtype and torch.equal(out, expected)
        dout = upstream(out) + 1
        ours = torch.autograd.grad(out, leaves(given), dout)
        theirs = torch.autograd.grad(expected, leaves(low), dout)
        for x, y in zip(ours, theirs, strict=True):
            assert x.dtype is torch.float32 and torch.equal(x, y.float())

    @pytest.mark.parametrize("op", WITHOUT_LOSS)
    def test_a_residual_stays_as_wide_as_it_is(self, backend, op):
        """As where PyTorch adds it to what a layer returns."""
        given = call(op, "residual")
        residual = given.pop("residual").requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            alone = OPS[op](**given, backend=backend)
            out = OPS[op](**given, residual=residual.view(2, 3, 4), backend=backend)
            low = OPS[op](**given, residual=residual.bfloat16(), backend=backend)
            with pytest.raises(ValueError, match=r"residual must have shape \[..., 4\] with x's 6 rows"):
                OPS[op](**given, residual=residual[:3], backend=backend)
        assert out.dtype is torch.float32 and torch.equal(out, residual + alone)
        assert low.dtype is torch.bfloat16
        assert torch.equal(torch.autograd.grad(out.sum(), residual)[0], torch.ones(6, 4))

    @every_op
    def test_float64_stays(self, op):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert OPS[op](**call(op, dtype=torch.float64), backend="reference").dtype is torch.float64


# Without a batching rule torch runs the op once for each slice, and warns that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@every_op
class TestFunc:
    def test_vmap(self, kernel_backend, op):
        given = call(op) | {"backend": kernel_backend}
        xs = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
        out = torch.func.vmap(lambda x: OPS[op](**given | {"x": x}))(xs)
        assert torch.equal(out, torch.stack([OPS[op](**given | {"x": x}) for x in xs]))

    def test_vmap_over_weights(self, kernel_backend, op):
        """An ensemble."""
        given = call(op) | {"backend": kernel_backend}
        name = next(name for name in given if name.startswith("w"))
        weights = torch.stack([given[name] * scale for scale in (1.0, 0.5, -2.0)])
        out = torch.func.vmap(lambda w: OPS[op](**given | {name: w}))(weights)
        assert torch.equal(out, torch.stack([OPS[op](**given | {name: w}) for w in weights]))

    def test_gradients_of_each_sample(self, kernel_backend, op):
        given = call(op, "transposed") | {"backend": kernel_backend}
        name = next(name for name in given if name.startswith("w"))

        def loss(weight, x):
            return OPS[op](**given | {name: weight, "x": x}).square().sum()

        xs = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
        gradient = torch.func.grad(loss, argnums=(0, 1))
        found = torch.func.vmap(gradient, in_dims=(None, 0))(given[name], xs)
        for at, x in enumerate(xs):
            for ours, expected in zip(found, gradient(given[name], x), strict=True):
                assert torch.equal(ours[at], expected)

    def test_second_derivative_is_refused(self, kernel_backend, op):
        given = call(op) | {"backend": kernel_backend}
        first = torch.func.grad(lambda x: OPS[op](**given | {"x": x}).square().sum())
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.func.grad(lambda x: first(x).square().sum())(given["x"])

    def test_forward_mode_is_refused(self, kernel_backend, op):
        given = call(op) | {"backend": kernel_backend}
        x = given["x"]
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.jvp(lambda x: OPS[op](**given | {"x": x}), (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
            OPS[op](**given | {"x": forward_ad.make_dual(x, x)})


@pytest.mark.parametrize("grad", [False, True])
@every_op
def test_fake_tensors(kernel_backend, op, grad):
    with FakeTensorMode():
        given = call(op, dtype=torch.bfloat16, grad=grad) | {"backend": kernel_backend}
        out = OPS[op](**given)
    loss = op == "linear_cross_entropy"
    assert out.shape == (() if loss else (6, 4))
    assert out.dtype is (torch.float32 if loss else torch.bfloat16)
    assert out.requires_grad is grad


@every_op
def test_parameters_and_other_subclasses_are_plain_tensors_to_it(kernel_backend, op):
    class Marked(torch.Tensor):
        pass

    given = call(op) | {"backend": kernel_backend}
    expected = OPS[op](**given)
    for name, x in given.items():
        if differentiable(name, x):
            assert torch.equal(
                OPS[op](**given | {name: torch.nn.Parameter(x, requires_grad=False)}), expected
            )
            assert torch.equal(OPS[op](**given | {name: x.as_subclass(Marked)}), expected)
