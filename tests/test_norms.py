"""layer_norm and rms_norm against the error rule: shapes, strides, magnitudes, gradients and threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import layer_norm, rms_norm
from fastattn.testing.check import upstream
from fastattn.testing.check_op import NORM_OPTION_SETS, check_op, norm_inputs, op_results
from fastattn.testing.effort import INTERPRETING, examples, some
from fastattn.testing.fence import FencedAllocations, fenced

pytest.importorskip("fastattn._C", reason="the compiled core is missing")

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = (layer_norm, rms_norm)
named = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
all_options = pytest.mark.parametrize(
    ("op", "option"), NORM_OPTION_SETS, ids=lambda x: x if isinstance(x, str) else x.__name__
)
all_types = pytest.mark.parametrize("dtype", TYPES, ids=str)


@all_options
@all_types
def test_options(backend, op, option, dtype):
    for shape in some(((3, 5, 96), (70, 100), (7,), (1, 1, 1, 33))):
        check_op(op, norm_inputs(op, option, *shape, dtype=dtype), backend=backend)


@pytest.mark.many
@named
@all_types
def test_every_length_of_a_row(backend, op, dtype):
    """Every remainder of four vectors."""
    for columns in range(1, 140):
        check_op(op, norm_inputs(op, "everything", 3, columns, dtype=dtype), backend=backend)


@named
@all_types
def test_many_rows(backend, op, dtype):
    """More than one block of rows, the last of them short."""
    for shape in ((131, 65), (35, 300)) if INTERPRETING else ((1031, 65), (35, 4100)):
        check_op(op, norm_inputs(op, "everything", *shape, dtype=dtype), backend=backend)


@all_options
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 5), (0,) * 3 + (4,)], ids=str)
def test_empty_batch(backend, op, option, shape):
    given = norm_inputs(op, option, *shape, dtype=torch.float32)
    check_op(op, given, backend=backend)
    found = op_results(op, given, backend=backend)
    for name in {"dweight", "dbias"} & set(found):
        assert (found[name] == 0).all()


@pytest.mark.slow
@named
@all_types
def test_results_past_the_caches(backend, op, dtype):
    """Outputs so large that they are streamed."""
    rows = (40 << 20) // (2048 * dtype.itemsize)
    given = norm_inputs(op, "everything", rows, 2048, dtype=dtype)
    few = {name: x[-5:] if name in ("x", "residual") else x for name, x in given.items()}
    whole = op_results(op, given, backend=backend, gradients=False)
    for name, x in op_results(op, few, backend=backend, gradients=False).items():
        assert torch.equal(whole[name][-5:], x)
    leaves = [given[name].requires_grad_() for name in ("x", "residual")]
    out, total = op(**given, backend=backend)
    dx, dresidual = torch.autograd.grad((out, total), leaves, (upstream(out), upstream(total)))
    small = {name: x.detach()[:64] if name in ("x", "residual") else x for name, x in given.items()}
    assert torch.equal(dx, dresidual)
    assert torch.equal(dx[:64], op_results(op, small, backend=backend)["dx"])


@named
@all_types
class TestMagnitudes:
    @pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
    def test_size(self, backend, op, dtype, size):
        given = norm_inputs(op, "everything", 40, 300, dtype=dtype)
        given["x"], given["residual"] = given["x"] * size, given["residual"] * size
        check_op(op, given, backend=backend)

    def test_a_mean_far_from_zero(self, backend, op, dtype):
        given = norm_inputs(op, "everything", 40, 300, dtype=dtype)
        given["x"] = given["x"] + 1000.0
        check_op(op, given, backend=backend)

    def test_an_outlier(self, backend, op, dtype):
        given = norm_inputs(op, "everything", 40, 300, dtype=dtype)
        given["x"][:, 0] = 2000.0
        check_op(op, given, backend=backend)

    def test_rows_of_one_number(self, backend, op, dtype):
        given = norm_inputs(op, "weight", 4, 37, dtype=dtype)
        given["x"][:] = torch.tensor([0.0, 1.0, -3.0, 100.0])[:, None]
        check_op(op, given, backend=backend)

    def test_not_finite(self, backend, op, dtype):
        """A row that has none stays clear of the others."""
        given = norm_inputs(op, "everything", 3, 37, dtype=dtype)
        expected = op_results(op, given, backend=backend)
        given["x"][1, 5] = torch.nan
        found = op_results(op, given, backend=backend)
        assert found["out"][1].isnan().all() and found["total"][1].isnan().sum() == 1
        for name in ("out", "total", "dx", "dresidual"):
            assert torch.equal(found[name][::2], expected[name][::2])


LAYOUTS = {
    "rows": lambda x: x,
    "fenced": fenced,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "last_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every_other": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}
calls = st.fixed_dictionaries(
    {
        "chosen": st.sampled_from(NORM_OPTION_SETS),
        "shape": st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 200)),
        "dtype": st.sampled_from(TYPES),
        "layouts": st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
        "seed": st.integers(0, 2**16),
    }
)


def build(call):
    op, option = call["chosen"]
    given = norm_inputs(op, option, *call["shape"], dtype=call["dtype"], seed=call["seed"])
    for name, layout in zip(("x", "residual"), call["layouts"], strict=True):
        if name in given:
            given[name] = LAYOUTS[layout](given[name])
    return op, given


@given(calls)
@settings(max_examples=examples(150))
def test_error_rule(backend, call):
    op, given = build(call)
    check_op(op, given, backend=backend)


@given(calls)
@settings(max_examples=examples(60))
def test_layouts_give_the_same_bits(kernel_backend, call):
    op, given = build(call)
    dense = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    expected = op_results(op, dense, backend=kernel_backend)
    for name, x in op_results(op, given, backend=kernel_backend).items():
        assert torch.equal(x, expected[name]), name


@named
@all_types
def test_nothing_is_written_beside_the_results(kernel_backend, op, dtype):
    for columns in (1, 31, 64, 77):
        given = norm_inputs(op, "everything", 5, columns, dtype=dtype)
        with FencedAllocations() as allocations, torch.no_grad():
            op(**given, backend=kernel_backend)
        allocations.assert_intact()


@named
def test_upstream_gradients_of_any_stride(backend, op):
    given = norm_inputs(op, "everything", 6, 7, 40, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in given.values() if isinstance(x, torch.Tensor)]
    outputs = op(**given, backend=backend)
    douts = [upstream(x) for x in outputs]
    expected = torch.autograd.grad(outputs, leaves, douts, retain_graph=True)
    strided = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in douts]
    for x, y in zip(torch.autograd.grad(outputs, leaves, strided, retain_graph=True), expected, strict=True):
        assert torch.equal(x, y)
    ones = [torch.ones_like(x) for x in outputs]
    of_sum = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), leaves, retain_graph=True)
    for x, y in zip(of_sum, torch.autograd.grad(outputs, leaves, ones), strict=True):
        assert torch.equal(x, y)


@named
@pytest.mark.parametrize("wanted", ["x", "weight", "residual"])
def test_one_input_needs_a_gradient(backend, op, wanted):
    given = norm_inputs(op, "everything", 6, 40, dtype=torch.float32)
    expected = op_results(op, given, backend=backend)[f"d{wanted}"]
    outputs = op(**given | {wanted: given[wanted].requires_grad_()}, backend=backend)
    assert torch.equal(
        torch.autograd.grad(outputs, given[wanted], [upstream(x) for x in outputs])[0], expected
    )


@named
@pytest.mark.parametrize("which", [0, 1], ids=["out", "total"])
def test_loss_of_one_result(backend, op, which):
    given = norm_inputs(op, "residual_weight", 6, 40, dtype=torch.float32)
    leaves = [given[name].requires_grad_() for name in ("x", "residual")]
    result = op(**given, backend=backend)[which]
    dx, dresidual = torch.autograd.grad(result, leaves, upstream(result))
    assert torch.equal(dx, dresidual)
    if which == 1:
        assert torch.equal(dx, upstream(result))


@named
def test_gradients_of_two_calls_add_up(backend, op):
    """dx and dresidual are one tensor, which nobody may add to in place."""
    given = norm_inputs(op, "residual_weight", 6, 40, dtype=torch.float32)
    single = op_results(op, given, backend=backend)
    x, residual = given["x"].requires_grad_(), given["residual"].requires_grad_()
    for _ in range(2):
        outputs = op(**given, backend=backend)
        torch.autograd.backward(outputs, [upstream(t) for t in outputs], inputs=[x, residual])
    assert torch.equal(x.grad, 2 * single["dx"]) and torch.equal(residual.grad, 2 * single["dresidual"])


@named
def test_changing_the_total_before_backward_is_an_error(kernel_backend, op):
    given = norm_inputs(op, "residual_weight", 6, 40, dtype=torch.float32)
    out, total = op(**given | {"x": given["x"].requires_grad_()}, backend=kernel_backend)
    total.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@named
def test_double_backward_is_refused(kernel_backend, op):
    x = torch.randn(3, 8, requires_grad=True)
    out = op(x, backend=kernel_backend)
    (dx,) = torch.autograd.grad(out, x, upstream(out).requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


@named
def test_no_grad_gives_the_same(backend, op):
    given = norm_inputs(op, "everything", 6, 40, dtype=torch.float32)
    with torch.inference_mode():
        inference = op(**given, backend=backend)
    outputs = op(**given | {"x": given["x"].requires_grad_()}, backend=backend)
    for x, y in zip(outputs, inference, strict=True):
        assert x.requires_grad and not y.requires_grad and torch.equal(x, y)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.many
@all_options
@all_types
def test_threads_give_the_same_bits(kernel_backend, set_threads, op, option, dtype):
    for shape in ((999, 130), (17, 6000)):
        given = norm_inputs(op, option, *shape, dtype=dtype)
        set_threads(1)
        expected = op_results(op, given, backend=kernel_backend)
        for threads in (2, 3):
            set_threads(threads)
            for name, x in op_results(op, given, backend=kernel_backend).items():
                assert torch.equal(x, expected[name]), name


@named
def test_rows_do_not_depend_on_their_batch(kernel_backend, op):
    given = norm_inputs(op, "everything", 200, 70, dtype=torch.bfloat16)
    together = op_results(op, given, backend=kernel_backend)
    alone = {name: x[:1] if name in ("x", "residual") else x for name, x in given.items()}
    found = op_results(op, alone, backend=kernel_backend)
    for name in ("out", "total", "dx"):
        assert torch.equal(found[name], together[name][:1]), name
