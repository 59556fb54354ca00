"""Attention under torch's transforms: opcheck, compile, export, autocast, vmap, func.grad, fake tensors."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fastattn import attention
from fastattn.ops.attention import check
from fastattn.testing.check import OPTION_SETS, option_set, results, upstream
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

# torch's own, about itself: dynamo and jvp use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPE = (2, 4, 2, 20, 30, 16, 8)
DROPOUT = {"dropout_p": 0.5}


@pytest.fixture
def attend(kernel_backend):
    """`attention` on one backend."""

    def attend(*args, **kwargs):
        return attention(*args, **kwargs, backend=kernel_backend)

    return attend


@pytest.mark.parametrize("option", OPTION_SETS)
def test_opcheck(kernel_backend, option):
    q, k, v = qkv(*SHAPE, transposed=True)
    call = check(q, k, v, **option_set(option, q, k))
    saved = torch.ops.fastattn.attention_fwd(*call, kernel_backend)
    backward = (upstream(saved[0]), upstream(saved[1]), *saved, *call, call.bias is not None, kernel_backend)
    # The gradient lives outside of the op, and nothing here depends on sizes.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fastattn.attention_fwd, (*call, kernel_backend), test_utils=tests)
    torch.library.opcheck(torch.ops.fastattn.attention_bwd, backward, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_in_full(kernel_backend, dtype):
    q, k, v = qkv(*SHAPE, dtype=dtype)
    call = check(q, k, v, **option_set("everything", q, k))
    saved = torch.ops.fastattn.attention_fwd(*call, kernel_backend)
    backward = (upstream(saved[0]), upstream(saved[1]), *saved, *call, True, kernel_backend)
    torch.library.opcheck(torch.ops.fastattn.attention_fwd, (*call, kernel_backend))
    torch.library.opcheck(torch.ops.fastattn.attention_bwd, backward)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("option", ["plain", "causal", "mask_2d", "bias_3d", "sinks", "everything"])
    def test_forward_and_backward(self, kernel_backend, option):
        """The same bits as eager, without a graph break."""
        q, k, v = qkv(*SHAPE, transposed=True)
        given = {"q": q, "k": k, "v": v, **option_set(option, q, k), "backend": kernel_backend}
        leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if "alibi_slopes" in given:
            leaves = [x for x in leaves if x is not given["alibi_slopes"]]
        for x in leaves:
            x.requires_grad_()
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

        def run(attend):
            out, lse = attend(**given, return_lse=True)
            return out, lse, *torch.autograd.grad((out, lse), leaves, (upstream(out), upstream(lse)))

        for ours, expected in zip(run(compiled), run(attention), strict=True):
            assert torch.equal(ours, expected)

    def test_inductor(self, attend):
        """Among other operations, with gradients."""

        def block(x):
            q, k, v = (x * 2).unflatten(-1, (3, 4, 8)).unbind(2)
            return attend(q, k, v, causal=True).flatten(2).relu()

        x = torch.randn(2, 10, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
        expected = block(x)
        out = torch.compile(block, fullgraph=True)(x)
        assert torch.equal(out, expected)
        gradients = (torch.autograd.grad(y, x, upstream(y))[0] for y in (out, expected))
        assert torch.equal(*gradients)

    def test_one_tensor_in_three_places(self, attend):
        x = torch.randn(2, 9, 4, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)

        def gradient(attend, x):
            return torch.autograd.grad(attend(x, x, x).square().sum(), x)[0]

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        truth = gradient(partial(attention, backend="reference"), x.double())
        # The three gradients are added up in another order.
        assert_close(gradient(compiled, x), gradient(attend, x), truth)

    def test_another_length(self, attend):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        for seqlen in (5, 9, 33):
            call = qkv(2, 4, 2, seqlen, seqlen, 16)
            assert torch.equal(compiled(*call, causal=True), attend(*call, causal=True))

    @pytest.mark.parametrize("grad", [False, True])
    def test_dropout_without_a_seed(self, attend, grad):
        """A new seed on every call of the compiled code, and torch.manual_seed rules it."""
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        call = qkv(*SHAPE, requires_grad=grad)
        torch.manual_seed(0)
        first, second = compiled(*call, **DROPOUT), compiled(*call, **DROPOUT)
        torch.manual_seed(0)
        assert torch.equal(compiled(*call, **DROPOUT), first)
        assert not torch.equal(first, second)

    def test_no_grad(self, attend):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        call = qkv(*SHAPE)
        with torch.no_grad():
            assert torch.equal(compiled(*call), attend(*call))


def test_export_keeps_the_op(attend):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v, causal=True)

    call = qkv(*SHAPE)
    program = torch.export.export(Module(), call)
    assert torch.ops.fastattn.attention_fwd.default in [node.target for node in program.graph.nodes]
    assert torch.equal(program.module()(*call), attend(*call, causal=True))


def test_autocast(attend):
    call = qkv(*SHAPE, requires_grad=True)
    low = [x.detach().bfloat16().requires_grad_() for x in call]
    options = option_set("bias_3d", *call[:2]) | option_set("sinks", *call[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*call, **options)
    expected = attend(*low, **options)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, expected)
    dout = upstream(out)
    ours, theirs = torch.autograd.grad(out, call, dout), torch.autograd.grad(expected, low, dout)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype is torch.float32 and torch.equal(x, y.float())


def test_autocast_knows_devices_without_autocast(attend):
    with torch.autocast("cpu"), pytest.raises(NotImplementedError, match="'meta'"):
        attend(*(x.to("meta") for x in qkv(*SHAPE)))


def test_autocast_leaves_float64_and_integers_alone():
    """As torch's own ops do."""
    call = qkv(*SHAPE, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*call, backend="reference").dtype is torch.float64
        with pytest.raises(TypeError, match=r"got torch.int32"):
            attention(*(x.int() for x in call))


# Without a batching rule torch runs the op once for each slice, and warns that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
class TestFunc:
    def test_vmap(self, attend):
        calls = [qkv(*SHAPE, seed=seed) for seed in range(3)]
        stacked = [torch.stack(xs) for xs in zip(*calls, strict=True)]
        out = torch.func.vmap(lambda q, k, v: attend(q, k, v, causal=True))(*stacked)
        assert torch.equal(out, torch.stack([attend(*call, causal=True) for call in calls]))

    def test_vmap_over_one_input(self, attend):
        q, k, v = qkv(*SHAPE)
        masks = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) < 0.5
        out = torch.func.vmap(lambda mask: attend(q, k, v, mask=mask))(masks)
        assert torch.equal(out, torch.stack([attend(q, k, v, mask=mask) for mask in masks]))

    def test_grad(self, attend):
        q, k, v = qkv(*SHAPE)
        expected = torch.autograd.grad(attend(q.requires_grad_(), k, v).square().sum(), q)[0]
        found = torch.func.grad(lambda q: attend(q, k, v).square().sum())(q.detach())
        assert torch.equal(found, expected)

    def test_gradients_of_each_sample(self, attend):
        calls = [qkv(*SHAPE, seed=seed) for seed in range(3)]
        gradient = torch.func.grad(lambda q, k, v: attend(q, k, v).square().sum(), argnums=(0, 1, 2))
        found = torch.func.vmap(gradient)(*(torch.stack(xs) for xs in zip(*calls, strict=True)))
        for name, xs in zip("qkv", found, strict=True):
            for x, call in zip(xs, calls, strict=True):
                assert torch.equal(x, gradient(*call)["qkv".index(name)]), name

    def test_second_derivative_is_refused(self, attend):
        q, k, v = qkv(*SHAPE)
        first = torch.func.grad(lambda q: attend(q, k, v).square().sum())
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.func.grad(lambda q: first(q).square().sum())(q)

    def test_forward_mode_is_refused(self, attend):
        call = qkv(*SHAPE)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            torch.func.jvp(attend, call, call)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
            attend(forward_ad.make_dual(call[0], call[0]), *call[1:])


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors(attend, grad):
    with FakeTensorMode():
        call = qkv(*SHAPE, dtype=torch.bfloat16)
        call = [x.requires_grad_(grad) for x in call]
        out, lse = attend(*call, return_lse=True)
    assert out.shape == (2, 20, 4, 8) and out.dtype is torch.bfloat16
    assert lse.shape == (2, 4, 20) and lse.dtype is torch.float32
    assert out.requires_grad is grad


def test_parameters_and_other_subclasses_are_plain_tensors_to_it(attend, kernel_backend):
    class Marked(torch.Tensor):
        pass

    q, k, v = qkv(*SHAPE)
    expected = attend(q, k, v)
    assert torch.equal(attend(torch.nn.Parameter(q), k, v), expected)
    assert torch.equal(attend(q.as_subclass(Marked), k, v), expected)
    assert results(q=q.as_subclass(Marked), k=k, v=v, backend=kernel_backend)["dq"].shape == q.shape
