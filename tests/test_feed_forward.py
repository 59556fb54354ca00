"""feed_forward against the error rule: out and every gradient, over shapes, types and options."""

import pytest
import torch

from fastattn import feed_forward
from fastattn.testing.check_linear import OPTION_SETS, differentiable, inputs, results, with_options
from fastattn.testing.effort import some
from fastattn.testing.fence import fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# M, K, F, N
SHAPES = {
    "odd": (37, 53, 29, 31),
    "one": (1, 1, 1, 1),
    "empty": (0, 7, 6, 5),
    "one_row": (1, 130, 517, 129),
    "one_feature": (5, 1, 3, 1),
    "one_hidden": (40, 7, 1, 5),
    "few_rows": (7, 96, 700, 100),
    "blocks": (130, 64, 256, 64),
    "tall": (700, 32, 48, 40),
    "wide": (20, 30, 1500, 33),
}


def call(shape, option, dtype=torch.float32):
    return with_options("feed_forward", option, inputs("feed_forward", shape, dtype=dtype))


@pytest.mark.parametrize("option", ["gelu", "relu", "transposed"])
@pytest.mark.parametrize("shape", some(list(SHAPES), 3))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check_op, dtype, shape, option):
    check_op("feed_forward", call(SHAPES[shape], option, dtype))


@pytest.mark.parametrize("shape", some([(70, 48, 90, 56), (1, 48, 90, 56), (6, 65, 131, 67)], 1), ids=str)
@pytest.mark.parametrize("option", OPTION_SETS["feed_forward"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check_op, dtype, option, shape):
    given = call(shape, option, dtype)
    check_op("feed_forward", given)
    check_op("feed_forward", given, gradients=False)


@pytest.mark.many
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_small_size(check_op, dtype):
    for size in range(1, 60):
        sizes = (size, 61 - size, 1 + size * 5 % 59, 1 + size * 7 % 53)
        check_op("feed_forward", inputs("feed_forward", sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strides(check_op, dtype):
    """Slices of something larger; weights of which one is stored by column, the other by row."""
    given = call((30, 17, 26, 9), "residual", dtype)
    tensors = {name: fenced(x) for name, x in given.items()}
    check_op("feed_forward", tensors)
    check_op("feed_forward", tensors | {"w_up": given["w_up"].t().contiguous().t()})
    check_op("feed_forward", tensors | {"w_down": given["w_down"].t().contiguous().t()})
    check_op("feed_forward", given | {"x": given["x"][:1].expand(30, -1)})


@pytest.mark.parametrize("bias", ["b_up", "b_down"])
def test_one_bias(check_op, bias):
    check_op("feed_forward", call((6, 5, 8, 4), "no_bias") | {bias: call((6, 5, 8, 4), "plain")[bias]})


def test_two_names_for_one_tensor(check_op):
    """A weight that is tied to its own transpose, and x as its own residual."""
    given = inputs("feed_forward", (6, 5, 8, 5))
    check_op("feed_forward", given | {"w_down": given["w_up"].t(), "residual": given["x"]})


def test_save_memory_changes_nothing_but_memory(backend, skip_if_refused):
    """Up to what rounding z costs, out and the gradients after it are the same bits."""
    given = call((37, 24, 50, 20), "everything") | {"save_memory": False}
    skip_if_refused(feed_forward, **given)
    kept = results("feed_forward", given, backend=backend)
    anew = results("feed_forward", given | {"save_memory": True}, backend=backend)
    assert torch.equal(kept["out"], anew["out"])
    assert torch.equal(kept["db_down"], anew["db_down"])


def test_what_is_kept_for_backward(kernel_backend):
    """z and the inputs, or the inputs alone; never the residual."""
    given = call((64, 8, 512, 8), "residual")
    kept = {}
    for save_memory in (False, True):
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):  # noqa: B023
            feed_forward(**leaves, save_memory=save_memory, backend=kernel_backend)
        kept[save_memory] = sizes
    assert (64, 512) in kept[False]
    assert (64, 512) not in kept[True]


def test_gradients_have_the_inputs_shape_type_and_strides(backend, skip_if_refused):
    given = call((6, 5, 8, 4), "everything", torch.bfloat16)
    skip_if_refused(feed_forward, **given)
    found = results("feed_forward", given, backend=backend)
    for name, x in given.items():
        if differentiable(name, x):
            assert found[f"d{name}"].shape == x.shape
            assert found[f"d{name}"].dtype is x.dtype
    assert found["dw_up"].stride() == (1, 8)
    assert found["dw_down"].stride() == (1, 4)


def test_each_dropout_has_its_own_positions(backend, skip_if_refused):
    """The identity as w_down shows which hidden numbers were dropped."""
    given = inputs("feed_forward", (20, 4, 24, 24)) | {"w_down": torch.eye(24), "b_down": None}
    given |= {"b_up": torch.full((24,), 50.0), "activation": "relu", "seed": 5}
    skip_if_refused(feed_forward, **given)
    of_hidden, of_out, expected = (
        feed_forward(**given, **options, backend=name) == 0
        for options, name in (
            ({"hidden_dropout_p": 0.4}, backend),
            ({"dropout_p": 0.4}, backend),
            ({"hidden_dropout_p": 0.4}, "reference"),
        )
    )
    assert torch.equal(of_hidden, expected)
    assert not torch.equal(of_hidden, of_out)


def test_ranks(backend, skip_if_refused):
    given = inputs("feed_forward", (6, 5, 8, 4))
    skip_if_refused(feed_forward, **given)
    expected = feed_forward(**given, backend=backend)
    out = feed_forward(**given | {"x": given["x"].view(2, 1, 3, 5)}, backend=backend)
    assert torch.equal(out, expected.view(2, 1, 3, 4))
    one = feed_forward(**given | {"x": given["x"][0]}, backend=backend)
    assert one.shape == (4,)
