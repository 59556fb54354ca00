"""Packed attention under autograd and torch's transforms, and what it refuses: one test each."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from fastattn import attention_varlen, explain
from fastattn.ops.attention_varlen import check
from fastattn.testing.check import PACKED_OPTION_SETS, packed_option_set, upstream
from fastattn.testing.inputs import packed_qkv, starts

# torch's own, about itself: dynamo and jvp use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# No sequence is short enough for a kernel of its own where no gradient is to come.
SEQLENS = (9, 0, 14, 7), (9, 3, 14, 30)
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")


def make(seqlens=SEQLENS, **options):
    return packed_qkv(*seqlens, 4, 2, 16, 8, **options)


@pytest.fixture
def attend(kernel_backend, skip_if_refused):
    """`attention_varlen` on one backend."""
    skip_if_refused(attention_varlen, *make())

    def attend(*args, **kwargs):
        return attention_varlen(*args, **kwargs, backend=kernel_backend)

    return attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
@pytest.mark.usefixtures("attend")
def test_opcheck(kernel_backend, option, dtype):
    tensors = make(dtype=dtype)
    call = check(*tensors, **packed_option_set(option, tensors[0], batch=4))
    forward, backward = torch.ops.fastattn.attention_varlen_fwd, torch.ops.fastattn.attention_varlen_bwd
    saved = forward(*call, kernel_backend)
    # The gradient lives outside of the op, and nothing here depends on sizes.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    if option == "everything":
        tests = (*tests, "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(forward, (*call, kernel_backend), test_utils=tests)
    upstreams = upstream(saved[0]), upstream(saved[1])
    torch.library.opcheck(backward, (*upstreams, *saved, *call, kernel_backend), test_utils=tests)


class TestAutograd:
    @pytest.fixture
    def leaves(self):
        sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
        return {**dict(zip(NAMES, make(requires_grad=True), strict=True)), "sinks": sinks.requires_grad_()}

    @pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks"])
    def test_one_input_needs_a_gradient(self, attend, leaves, wanted):
        def gradient(call):
            out = attend(**call, causal=True)
            return torch.autograd.grad(out, call[wanted], upstream(out))[0]

        alone = {name: x.detach() for name, x in leaves.items()}
        alone[wanted].requires_grad_()
        assert torch.equal(gradient(alone), gradient(leaves))

    def test_upstream_gradients_of_any_stride(self, attend, leaves):
        out, lse = attend(**leaves, return_lse=True)
        dout, dlse = upstream(out), upstream(lse)
        strided = dout.permute(2, 0, 1).contiguous().permute(1, 2, 0), dlse.T.contiguous().T
        expected = torch.autograd.grad((out, lse), leaves["q"], (dout, dlse), retain_graph=True)[0]
        found = torch.autograd.grad((out, lse), leaves["q"], strided, retain_graph=True)[0]
        assert strided[0].stride(2) != 1 and torch.equal(found, expected)
        of_sum = torch.autograd.grad(out.sum(), leaves["k"], retain_graph=True)[0]
        assert torch.equal(of_sum, torch.autograd.grad(out, leaves["k"], torch.ones_like(out))[0])

    def test_no_grad_and_grad_give_the_same(self, attend, leaves):
        with torch.no_grad():
            plain = attend(**leaves)
        with torch.inference_mode():
            assert torch.equal(attend(**leaves), plain)
        out = attend(**leaves)
        assert out.requires_grad and not plain.requires_grad and torch.equal(out, plain)

    @pytest.mark.parametrize("name", ["k", "cu_seqlens_k"])
    def test_changing_an_input_before_backward_is_an_error(self, attend, leaves, name):
        changed = leaves[name].clone()
        out = attend(**leaves | {name: changed})
        changed.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_double_backward_is_refused(self, attend, leaves):
        out = attend(**leaves)
        (dq,) = torch.autograd.grad(out, leaves["q"], upstream(out).requires_grad_(), create_graph=True)
        with pytest.raises(NotImplementedError, match="attention_varlen has no second derivative"):
            dq.sum().backward()


@pytest.fixture
def compiled(attend):
    """The same, compiled without a graph break."""
    torch.compiler.reset()
    yield torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.compiler.reset()


class TestCompile:
    @pytest.mark.parametrize("option", ["plain", "window_causal", "sinks", "everything"])
    def test_forward_and_backward(self, attend, compiled, option):
        """The same bits as eager."""
        tensors = make(requires_grad=True)
        options = packed_option_set(option, tensors[0], batch=4)
        leaves = [*tensors[:3], *(options[x].requires_grad_() for x in ("sinks",) if x in options)]

        def run(attend):
            out, lse = attend(*tensors, **options, return_lse=True)
            return out, lse, *torch.autograd.grad((out, lse), leaves, (upstream(out), upstream(lse)))

        for ours, expected in zip(run(compiled), run(attend), strict=True):
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize("grad", [False, True])
    def test_other_lengths(self, attend, grad):
        """One graph for all of them."""
        torch.compiler.reset()
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.compiler.set_stance("default"):
            for count, seqlens in enumerate(
                [((5, 9), (7, 11)), ((6, 8, 7), (2, 9, 4)), ((30,) * 4, (8,) * 4)]
            ):
                with torch.compiler.set_stance("fail_on_recompile" if count else "default"):
                    tensors = make(seqlens, requires_grad=grad)
                    out = compiled(*tensors, causal=True)
                expected = attend(*tensors, causal=True)
                assert torch.equal(out, expected)
                if grad:
                    gradients = (torch.autograd.grad(x.sum(), tensors[:3]) for x in (out, expected))
                    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
        torch.compiler.reset()

    def test_bounds_that_are_given(self, attend, compiled):
        tensors = make()
        assert torch.equal(compiled(*tensors, 20, 40), attend(*tensors))

    def test_bad_lengths_raise_when_it_runs(self, compiled):
        """Nobody can see them before; the kernel must not."""
        q, k, v, _, ends = make()
        with pytest.raises(ValueError, match=r"cu_seqlens_q must end with Tq = 30, .*got 31"):
            compiled(q, k, v, starts((9, 0, 14, 8)), ends)

    def test_inductor(self, attend):
        def block(x, ends):
            q, k, v = (x * 2).unflatten(-1, (3, 4, 8)).unbind(1)
            return attend(q, k, v, ends, ends, causal=True).flatten(1).relu()

        torch.compiler.reset()
        ends = starts((9, 7))
        x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
        expected, out = block(x, ends), torch.compile(block, fullgraph=True)(x, ends)
        assert torch.equal(out, expected)
        gradients = (torch.autograd.grad(y, x, upstream(y))[0] for y in (out, expected))
        assert torch.equal(*gradients)


def test_export_keeps_the_op(attend):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return attend(*tensors, causal=True)

    program = torch.export.export(Module(), make())
    targets = [node.target for node in program.graph.nodes]
    assert torch.ops.fastattn.attention_varlen_fwd.default in targets
    assert torch.equal(program.module()(*make()), attend(*make(), causal=True))


def test_autocast(attend):
    tensors = make(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*tensors)
    low = [x.detach().bfloat16().requires_grad_() for x in tensors[:3]]
    expected = attend(*low, *tensors[3:])
    assert out.dtype is torch.bfloat16 and torch.equal(out, expected)
    ours, theirs = (
        torch.autograd.grad(y, x, upstream(out)) for y, x in ((out, tensors[:3]), (expected, low))
    )
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype is torch.float32 and torch.equal(x, y.float())


# Without a batching rule torch runs the op once for each slice, and warns that this is slow.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
class TestFunc:
    def test_vmap(self, attend):
        calls = [make(seed=seed) for seed in range(3)]
        calls[1] = (*calls[1][:3], starts((8, 7, 6, 9)), calls[1][4])
        out = torch.func.vmap(attend)(*(torch.stack(xs) for xs in zip(*calls, strict=True)))
        assert torch.equal(out, torch.stack([attend(*call) for call in calls]))

    def test_grad(self, attend):
        q, *others = make()
        expected = torch.autograd.grad(attend(q.requires_grad_(), *others).square().sum(), q)[0]
        found = torch.func.grad(lambda q: attend(q, *others).square().sum())(q.detach())
        assert torch.equal(found, expected)

    def test_forward_mode_is_refused(self, attend):
        q, *others = make()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
            attend(forward_ad.make_dual(q, q), *others)


@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors(attend, grad):
    with FakeTensorMode() as mode:
        q, k, v = (x.requires_grad_(grad) for x in (torch.empty(n, 4, 8) for n in (20, 56, 56)))
        ends = mode.from_tensor(starts((20,))), mode.from_tensor(starts((56,)))
        out, lse = attend(q, k, v, *ends, return_lse=True)
    assert out.shape == (20, 4, 8) and lse.shape == (4, 20) and lse.dtype is torch.float32
    assert out.requires_grad is grad


def test_other_subclasses_are_plain_tensors_to_it(attend):
    class Marked(torch.Tensor):
        pass

    tensors = make()
    expected = attend(*tensors)
    for at in range(5):
        marked = [x.as_subclass(Marked) if i == at else x for i, x in enumerate(tensors)]
        assert torch.equal(attend(*marked), expected)
    with pytest.raises(ValueError, match="cu_seqlens_q must end with Tq = 30"):
        attend(*tensors[:3], starts((9, 14)).as_subclass(Marked), starts((9, 47)))


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def ends(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = {"q": x(5, 4, 8), "k": x(7, 2, 8), "v": x(7, 2, 16), "cu_seqlens_q": ends(0, 2, 5),
        "cu_seqlens_k": ends(0, 0, 7)}  # fmt: skip

BAD = {
    "q_rank_4": ({"q": x(1, 5, 4, 8)}, ValueError, r"q must have 3 dimensions \[Tq, H, D\]"),
    "k_rank_2": ({"k": x(7, 16)}, ValueError, r"k must have 3 dimensions \[Tk, Hk, D\]"),
    "length": ({"v": x(6, 2, 16)}, ValueError, "share the length Tk, got 7 and 6"),
    "heads": ({"q": x(5, 3, 8)}, ValueError, "multiple of Hk.*H 3.*Hk 2"),
    "head_dim": ({"k": x(7, 2, 9)}, ValueError, "head dim D.*8 and 9"),
    "types": ({"k": x(7, 2, 8, dtype=torch.half)}, TypeError, "share one type"),
    "integers": ({n: t.int() for n, t in GOOD.items()}, TypeError, "got torch.int32"),
    "last_stride": ({"k": x(7, 2, 16)[..., ::2]}, ValueError, "last stride of k"),
    "device": ({"v": x(7, 2, 16, device="meta")}, ValueError, "v must be on q's device"),
    "starts_none": ({"cu_seqlens_q": None}, TypeError, "cu_seqlens_q must be a tensor, got NoneType"),
    "starts_list": ({"cu_seqlens_k": [0, 0, 7]}, TypeError, "cu_seqlens_k must be a tensor, got list"),
    "starts_int64": ({"cu_seqlens_q": ends(0, 2, 5).long()}, TypeError, "cu_seqlens_q must be int32"),
    "starts_rank_2": ({"cu_seqlens_q": x(1, 3, dtype=torch.int32)}, ValueError, r"\[B \+ 1\].*\[1, 3\]"),
    "starts_empty": ({"cu_seqlens_q": ends()}, ValueError, r"\[B \+ 1\], got \[0\]"),
    "starts_strided": ({"cu_seqlens_k": ends(0, 9, 0, 9, 7)[::2]}, ValueError, "cu_seqlens_k must be cont"),
    "starts_device": ({"cu_seqlens_k": ends(0, 0, 7).to("meta")}, ValueError, "on q's device"),
    "starts_differ": ({"cu_seqlens_k": ends(0, 7)}, ValueError, r"share the length B \+ 1, got 3 and 2"),
    "starts_at_1": ({"cu_seqlens_q": ends(1, 2, 5)}, ValueError, "cu_seqlens_q must begin with 0, got 1"),
    "starts_negative": ({"cu_seqlens_k": ends(0, -1, 7)}, ValueError, r"never fall, got -1 after 0 at \[1\]"),
    "starts_fall": ({"cu_seqlens_q": ends(0, 9, 5)}, ValueError, r"never fall, got 5 after 9 at \[2\]"),
    "too_few": ({"cu_seqlens_q": ends(0, 2, 4)}, ValueError, "end with Tq = 5.*got 4"),
    "too_many": ({"cu_seqlens_k": ends(0, 2, 8)}, ValueError, "end with Tk = 7.*got 8"),
    "max_too_small": ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q must be at least 3.*got 2"),
    "max_k_too_small": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 7.*got -1"),
    "max_tensor": ({"max_seqlen_k": ends(7)}, TypeError, "max_seqlen_k must be an int, got Tensor"),
    "slopes": ({"alibi_slopes": x(3, 4)}, ValueError, r"\[2, 4\], got \[3, 4\]"),
    "sinks": ({"sinks": x(2)}, ValueError, r"sinks must have shape \[H\] = \[4\]"),
    "scale": ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be finite"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be"),
    "window": ({"window_size": (-2, 0)}, ValueError, "window_size must be two integers"),
    "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "seed": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must be in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    call = GOOD | change
    with pytest.raises(error, match=message):
        attention_varlen(**call)
    with pytest.raises(error, match=message):
        explain(attention_varlen, call.pop("q"), **call)


@pytest.mark.parametrize("name", ["mask", "bias", "block_table"])
def test_there_is_no_mask_and_no_bias(name):
    with pytest.raises(TypeError, match=name):
        attention_varlen(**GOOD, **{name: None})


def test_a_device_without_a_backend():
    with pytest.raises(NotImplementedError, match=r"attention_varlen: no backend.*'meta'"):
        attention_varlen(*(x.to("meta") for x in GOOD.values()))


def test_float64_is_for_the_reference():
    wide = {n: t.double() if t.is_floating_point() else t for n, t in GOOD.items()}
    with pytest.raises(NotImplementedError, match="attention_varlen: no backend"):
        attention_varlen(**wide)
    assert attention_varlen(**wide, backend="reference").dtype is torch.float64
