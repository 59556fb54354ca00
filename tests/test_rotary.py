"""rotary against the error rule and others' definitions: shapes, strides, gradients and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import rotary
from fastattn.testing.check import upstream
from fastattn.testing.check_op import ROTARY_OPTION_SETS, check_op, op_results, rotary_inputs
from fastattn.testing.compare import assert_close
from fastattn.testing.effort import examples, some
from fastattn.testing.fence import FencedAllocations, fenced

pytest.importorskip("fastattn._C", reason="the compiled core is missing")

TYPES = (torch.float32, torch.bfloat16, torch.float16)
all_types = pytest.mark.parametrize("dtype", TYPES, ids=str)
all_options = pytest.mark.parametrize("option", ROTARY_OPTION_SETS)
both_orders = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@all_options
@all_types
@both_orders
def test_options(backend, option, dtype, interleaved):
    shapes = ((2, 7, 3, 64, 64), (3, 5, 1, 7, 6), (1, 40, 2, 80, 32), (2, 9, 4, 128, 2))
    for *shape, rotary_dim in some(shapes):
        given = rotary_inputs(option, *shape, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved)
        check_op(rotary, given, backend=backend)


@pytest.mark.many
@all_types
@both_orders
def test_every_size(backend, dtype, interleaved):
    """Every remainder of four vectors, in what is turned and in what is not."""
    for head_dim in range(2, 140):
        rotary_dim = max(2, (head_dim * 7 // 10) // 2 * 2)
        for turned in (rotary_dim, head_dim // 2 * 2):
            given = rotary_inputs(
                "tables", 1, 2, 1, head_dim, rotary_dim=turned, dtype=dtype, interleaved=interleaved
            )
            check_op(rotary, given, backend=backend)


@all_options
@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_empty(backend, option, shape):
    given = rotary_inputs(option, *shape, rotary_dim=4, dtype=torch.float32)
    check_op(rotary, given, backend=backend)


@pytest.mark.slow
@all_types
@both_orders
def test_results_past_the_caches(backend, dtype, interleaved):
    """Outputs so large that they are streamed, whole heads and parts of them."""
    for rotary_dim in (128, 64):
        tokens = (40 << 20) // (8 * 128 * dtype.itemsize)
        given = rotary_inputs(
            "tables", 1, tokens, 8, 128, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved
        )
        whole = op_results(rotary, given, backend=backend, gradients=False)["out"]
        few = {**given, "x": given["x"][:, :50]}
        assert torch.equal(whole[:, :50], op_results(rotary, few, backend=backend)["out"])


LAYOUTS = {
    "bshd": lambda x: x,
    "bhsd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sbhd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "packed": lambda x: torch.cat([x, x, x], dim=2)[:, :, x.shape[2] : 2 * x.shape[2]],
    "fenced": fenced,
    "one_head": lambda x: x[:, :, :1].expand(x.shape),
}
calls = st.fixed_dictionaries(
    {
        "option": st.sampled_from(ROTARY_OPTION_SETS),
        "sizes": st.tuples(st.integers(1, 4), st.integers(1, 50), st.integers(1, 5)),
        "head_dim": st.integers(2, 40) | st.sampled_from([64, 80, 96, 128, 256]),
        "share": st.floats(0.0, 1.0),
        "dtype": st.sampled_from(TYPES),
        "interleaved": st.booleans(),
        "layouts": st.tuples(st.sampled_from(sorted(LAYOUTS)), st.booleans()),
        "seed": st.integers(0, 2**16),
    }
)


def build(call):
    head_dim = call["head_dim"]
    rotary_dim = max(2, int(call["share"] * head_dim) // 2 * 2)
    given = rotary_inputs(
        call["option"], *call["sizes"], head_dim, rotary_dim=rotary_dim, dtype=call["dtype"],
        interleaved=call["interleaved"], seed=call["seed"],
    )  # fmt: skip
    layout, fence_tables = call["layouts"]
    given["x"] = LAYOUTS[layout](given["x"])
    if fence_tables:
        for name in {"cos", "sin", "positions"} & set(given):
            given[name] = fenced(given[name])
    return given


@given(calls)
@settings(max_examples=examples(150))
def test_error_rule(backend, call):
    check_op(rotary, build(call), backend=backend)


@given(calls)
@settings(max_examples=examples(60))
def test_layouts_give_the_same_bits(kernel_backend, call):
    given = build(call)
    dense = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    expected = op_results(rotary, dense, backend=kernel_backend)
    for name, x in op_results(rotary, given, backend=kernel_backend).items():
        assert torch.equal(x, expected[name]), name


@all_types
@both_orders
def test_nothing_is_written_beside_the_result(kernel_backend, dtype, interleaved):
    for head_dim, rotary_dim in ((31, 30), (77, 10), (64, 64)):
        given = rotary_inputs(
            "tokens", 2, 3, 2, head_dim, rotary_dim=rotary_dim, dtype=dtype, interleaved=interleaved
        )
        with FencedAllocations() as allocations, torch.no_grad():
            rotary(**given, backend=kernel_backend)
        allocations.assert_intact()


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def test_against_transformers(backend):
    """As apply_rotary_pos_emb of its Llama computes it, with angles for each token."""
    given = rotary_inputs("tokens", 2, 9, 3, 64, rotary_dim=64, dtype=torch.float32)
    cos, sin = (torch.cat([given[name]] * 2, dim=-1)[:, :, None] for name in ("cos", "sin"))

    def llama(dtype):
        x, c, s = (t.to(dtype) for t in (given["x"], cos, sin))
        return x * c + rotate_half(x) * s

    out = rotary(**given, backend=backend)
    assert_close(out, llama(torch.float32), llama(torch.float64))


def test_interleaved_pairs_are_complex_numbers(backend):
    """As the original code of Llama computes it."""
    given = rotary_inputs("tables", 2, 9, 3, 64, rotary_dim=64, dtype=torch.float32, interleaved=True)

    def complex_product(dtype):
        x, c, s = (t.to(dtype) for t in (given["x"], given["cos"], given["sin"]))
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(c, s)[:, None]
        return torch.view_as_real(turned).flatten(-2)

    out = rotary(**given, backend=backend)
    assert_close(out, complex_product(torch.float32), complex_product(torch.float64))


def test_upstream_gradients_of_any_stride(backend):
    given = rotary_inputs("tables", 2, 9, 3, 64, rotary_dim=32, dtype=torch.float32)
    given["x"].requires_grad_()
    out = rotary(**given, backend=backend)
    dout = upstream(out)
    expected = torch.autograd.grad(out, given["x"], dout, retain_graph=True)[0]
    strided = dout.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(torch.autograd.grad(out, given["x"], strided, retain_graph=True)[0], expected)
    of_sum = torch.autograd.grad(out.sum(), given["x"], retain_graph=True)[0]
    assert torch.equal(of_sum, torch.autograd.grad(out, given["x"], torch.ones_like(out))[0])


def test_gradients_of_any_order(backend):
    given = rotary_inputs("positions", 2, 9, 3, 16, rotary_dim=8, dtype=torch.float32)
    x = given["x"].requires_grad_()
    out = rotary(**given, backend=backend)
    (dx,) = torch.autograd.grad(out, x, (2 * out.detach()).requires_grad_(), create_graph=True)
    assert_close(dx.detach(), 2 * x.detach(), 2 * x.detach().double())  # turned there and back
    dout = upstream(out).requires_grad_()
    (dx,) = torch.autograd.grad(rotary(**given, backend=backend), x, dout, create_graph=True)
    (ddout,) = torch.autograd.grad(dx, dout, x.detach())
    assert torch.equal(ddout, out.detach())


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.many
@all_types
@both_orders
def test_threads_give_the_same_bits(kernel_backend, set_threads, dtype, interleaved):
    given = rotary_inputs("positions", 3, 70, 8, 96, rotary_dim=64, dtype=dtype, interleaved=interleaved)
    set_threads(1)
    expected = op_results(rotary, given, backend=kernel_backend)
    for threads in (2, 3):
        set_threads(threads)
        for name, x in op_results(rotary, given, backend=kernel_backend).items():
            assert torch.equal(x, expected[name]), name
