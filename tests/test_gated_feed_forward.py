"""gated_feed_forward against the error rule: out and every gradient, over shapes, types and options."""

import pytest
import torch

from fastattn import gated_feed_forward
from fastattn.testing.check_linear import OPTION_SETS, differentiable, inputs, results, with_options
from fastattn.testing.effort import some
from fastattn.testing.fence import fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = "gated_feed_forward"

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
    return with_options(OP, option, inputs(OP, shape, dtype=dtype))


@pytest.mark.parametrize("option", ["silu", "stacked", "transposed"])
@pytest.mark.parametrize("shape", some(list(SHAPES), 3))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check_op, dtype, shape, option):
    check_op(OP, call(SHAPES[shape], option, dtype))


@pytest.mark.parametrize("shape", some([(70, 48, 90, 56), (1, 48, 90, 56), (6, 65, 131, 67)], 1), ids=str)
@pytest.mark.parametrize("option", OPTION_SETS[OP])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check_op, dtype, option, shape):
    given = call(shape, option, dtype)
    check_op(OP, given)
    check_op(OP, given, gradients=False)


@pytest.mark.many
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_small_size(check_op, dtype):
    for size in range(1, 60):
        sizes = (size, 61 - size, 1 + size * 5 % 59, 1 + size * 7 % 53)
        check_op(OP, inputs(OP, sizes, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strides(check_op, dtype):
    """Slices of something larger; weights in both orders."""
    given = call((30, 17, 26, 9), "residual", dtype)
    tensors = {name: fenced(x) for name, x in given.items()}
    check_op(OP, tensors)
    for name in ("w_gate", "w_up", "w_down"):
        check_op(OP, tensors | {name: given[name].t().contiguous().t()})
    check_op(OP, given | {"x": given["x"][:1].expand(30, -1)})


@pytest.mark.parametrize("bias", ["b_gate", "b_up", "b_down"])
def test_one_bias(check_op, bias):
    check_op(OP, call((6, 5, 8, 4), "no_bias") | {bias: call((6, 5, 8, 4), "plain")[bias]})


@pytest.mark.parametrize("option", ["plain", "silu", "everything"])
def test_the_reference_means_the_same_stacked_and_apart(option):
    apart = call((37, 24, 50, 20), option, torch.float64)
    ours = results(OP, with_options(OP, "stacked", apart), backend="reference")
    theirs = results(OP, apart, backend="reference")
    for name in ("w", "b"):
        theirs[f"d{name}_gate"] = torch.cat([theirs[f"d{name}_gate"], theirs[f"d{name}_up"]])
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name])


def test_halves_of_one_weight(check_op):
    """Gate and up as two views of what one checkpoint stores."""
    stacked = call((12, 10, 16, 6), "stacked")
    gate, up = stacked["w_gate"].chunk(2)
    check_op(OP, stacked | {"w_gate": gate, "w_up": up, "b_gate": None})


def test_save_memory_changes_nothing_but_memory(backend, skip_if_refused):
    given = call((37, 24, 50, 20), "everything") | {"save_memory": False}
    skip_if_refused(gated_feed_forward, **given)
    kept = results(OP, given, backend=backend)
    anew = results(OP, given | {"save_memory": True}, backend=backend)
    assert torch.equal(kept["out"], anew["out"])
    assert torch.equal(kept["db_down"], anew["db_down"])


def test_gradients_have_the_inputs_shape_type_and_strides(backend, skip_if_refused):
    given = call((6, 5, 8, 4), "everything", torch.bfloat16)
    skip_if_refused(gated_feed_forward, **given)
    found = results(OP, given, backend=backend)
    for name, x in given.items():
        if differentiable(name, x):
            assert found[f"d{name}"].shape == x.shape
            assert found[f"d{name}"].dtype is x.dtype
    assert found["dw_gate"].stride() == found["dw_up"].stride() == (1, 8)
    assert found["dw_down"].stride() == (1, 4)


def test_the_hidden_numbers_are_dropped_after_the_product(backend, skip_if_refused):
    given = inputs(OP, (20, 4, 24, 24)) | {"w_down": torch.eye(24), "b_down": None}
    given |= {name: torch.full((24,), 50.0) for name in ("b_gate", "b_up")}
    given |= {"activation": None, "hidden_dropout_p": 0.4, "seed": 5}
    skip_if_refused(gated_feed_forward, **given)
    dropped = gated_feed_forward(**given, backend=backend) == 0
    assert torch.equal(dropped, gated_feed_forward(**given, backend="reference") == 0)
    assert 0.3 < float(dropped.float().mean()) < 0.5


def test_ranks(backend, skip_if_refused):
    given = inputs(OP, (6, 5, 8, 4))
    skip_if_refused(gated_feed_forward, **given)
    expected = gated_feed_forward(**given, backend=backend)
    out = gated_feed_forward(**given | {"x": given["x"].view(2, 1, 3, 5)}, backend=backend)
    assert torch.equal(out, expected.view(2, 1, 3, 4))
