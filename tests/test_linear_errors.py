"""Bad input to the ops around a matrix product raises and names the argument: one test each."""

import math

import pytest
import torch

from fastattn import explain, linear
from fastattn.testing.check_linear import OPS, inputs

NAN, INF = math.nan, math.inf
SIZES = {
    "linear": (6, 4, 5),
    "feed_forward": (6, 4, 8, 5),
    "gated_feed_forward": (6, 4, 8, 5),
    "linear_cross_entropy": (6, 4, 5),
}


def z(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


HALF, META = torch.float16, "meta"
# Alike for all that have the argument.
X = {
    "x_rank_0": ({"x": z()}, ValueError, r"x must have shape \[..., K\].*got \[\]"),
    "x_no_features": ({"x": z(6, 0)}, ValueError, r"x must have shape.*at least 1, got \[6, 0\]"),
    "x_integers": ({"x": z(6, 4, dtype=torch.int32)}, TypeError, "x must be float32.*got torch.int32"),
    "x_complex": ({"x": z(6, 4, dtype=torch.cfloat)}, TypeError, "x must be float32.*got torch.complex64"),
    "x_is_a_list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x_sparse": ({"x": z(6, 4).to_sparse()}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    "x_nested": (
        {"x": torch.nested.nested_tensor([z(6, 4)], layout=torch.jagged)},
        TypeError,
        "dense.*got a nested one",
    ),
    "x_is_none": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
}
OPTIONS = {
    "activation_unknown": ({"activation": "swish"}, ValueError, "activation must be None or.*silu.*'swish'"),
    "activation_none": ({"activation": "none"}, ValueError, "activation must be None or one of.*'none'"),
    "activation_callable": ({"activation": torch.relu}, ValueError, "activation must be None or one of"),
    "residual_columns": ({"residual": z(6, 4)}, ValueError, r"residual.*\[..., 5\].*6 rows, got \[6, 4\]"),
    "residual_rows": ({"residual": z(7, 5)}, ValueError, r"residual must have.*6 rows, got \[7, 5\]"),
    "residual_row": ({"residual": z(5)}, ValueError, r"residual must have.*6 rows, got \[5\]"),
    "residual_rank_0": ({"residual": z()}, ValueError, r"residual must have shape.*got \[\]"),
    "residual_half": ({"residual": z(6, 5, dtype=HALF)}, TypeError, "residual must be in x's type.*float16"),
    "residual_is_a_number": ({"residual": 1.0}, TypeError, "residual must be a tensor, got float"),
    "device_of_residual": ({"residual": z(6, 5, device=META)}, ValueError, "residual must be on x's device"),
    "dropout_1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be.*got -0.1"),
    "dropout_nan": ({"dropout_p": NAN}, ValueError, "dropout_p must be"),
    "seed_negative": ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed must be in.*got -1"),
    "seed_unused_but_wrong": ({"seed": 2**63}, ValueError, "seed must be in"),
    "seed_fraction": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int.*float"),
    "seed_int32": ({"seed": z(dtype=torch.int32)}, TypeError, "seed must be an int64"),
}
HIDDEN = {
    "hidden_dropout_1": ({"hidden_dropout_p": 1.0}, ValueError, r"hidden_dropout_p must be in.*got 1.0"),
    "hidden_dropout_nan": ({"hidden_dropout_p": NAN}, ValueError, "hidden_dropout_p must be"),
}


def weight(name, layout, rows, columns):
    """What may be wrong with one weight."""
    transposed = z(columns, rows)
    at_least = "at least 1 row"
    return {
        f"{name}_transposed": ({name: transposed}, ValueError, rf"{name} must have.*{columns} columns"),
        f"{name}_columns": ({name: z(rows, columns + 1)}, ValueError, rf"{name} must have.*\[{layout}\]"),
        f"{name}_no_rows": ({name: z(0, columns)}, ValueError, rf"{name} must.*{at_least}, got \[0, "),
        f"{name}_rank_1": ({name: z(columns)}, ValueError, rf"{name} must have.*got \[{columns}\]"),
        f"{name}_rank_3": ({name: z(1, rows, columns)}, ValueError, f"{name} must have"),
        f"{name}_half": ({name: z(rows, columns, dtype=HALF)}, TypeError, f"{name} must be in x's type"),
        f"{name}_is_a_list": ({name: [1.0]}, TypeError, f"{name} must be a tensor, got list"),
        f"device_of_{name}": (
            {name: z(rows, columns, device=META)}, ValueError, f"{name} must be on x's device cpu, got meta"
        ),
    }  # fmt: skip


def bias(name, size):
    return {
        f"{name}_size": ({name: z(size + 1)}, ValueError, rf"{name} must have shape \[{size}\], got"),
        f"{name}_one": ({name: z(1)}, ValueError, rf"{name} must have shape \[{size}\], got \[1\]"),
        f"{name}_rank_2": ({name: z(1, size)}, ValueError, f"{name} must have shape"),
        f"{name}_half": ({name: z(size, dtype=HALF)}, TypeError, f"{name} must be in x's type"),
        f"{name}_is_true": ({name: True}, TypeError, f"{name} must be a tensor, got bool"),
        f"device_of_{name}": ({name: z(size, device=META)}, ValueError, f"{name} must be on x's device"),
    }


BAD = {
    "linear": {**X, **OPTIONS, **weight("weight", "N, K", 5, 4), **bias("bias", 5)},
    "feed_forward": {
        **X, **OPTIONS, **HIDDEN, **weight("w_up", "F, K", 8, 4), **weight("w_down", "N, F", 5, 8),
        **bias("b_up", 8), **bias("b_down", 5),
        "w_up_is_none": ({"w_up": None}, TypeError, "w_up must be a tensor, got NoneType"),
    },
    "gated_feed_forward": {
        **X, **OPTIONS, **HIDDEN, **weight("w_gate", "F, K", 8, 4), **weight("w_up", "F, K", 8, 4),
        **weight("w_down", "N, F", 5, 8), **bias("b_gate", 8), **bias("b_up", 8), **bias("b_down", 5),
        "w_up_rows": ({"w_up": z(7, 4)}, ValueError, r"w_up must have w_gate's shape \[8, 4\], got \[7, 4\]"),
        "stacked_odd": (
            {"w_gate": z(15, 4), "w_up": None, "b_gate": None, "b_up": None}, ValueError,
            r"w_gate must have an even number of rows.*\[15, 4\]",
        ),
        "stacked_columns": ({"w_gate": z(16, 5), "w_up": None}, ValueError, r"w_gate.*\[2 F, K\] with 4"),
        "stacked_b_up": (
            {"w_gate": z(16, 4), "w_up": None, "b_gate": z(16)}, ValueError, "b_up must be None where w_up"
        ),
        "stacked_b_gate": (
            {"w_gate": z(16, 4), "w_up": None, "b_up": None}, ValueError, r"b_gate must have shape \[16\]"
        ),
    },
    "linear_cross_entropy": {
        **X, **weight("weight", "V, K", 5, 4), **bias("bias", 5),
        "target_shape": ({"target": z(7, dtype=torch.int64)}, ValueError, r"target.*\[6\], got \[7\]"),
        "target_rank_2": ({"target": z(6, 1, dtype=torch.int64)}, ValueError, "target must have x's shape"),
        "target_int32": ({"target": z(6, dtype=torch.int32)}, TypeError, "target must be int64.*int32"),
        "target_probabilities": ({"target": z(6, 5)}, TypeError, "target must be int64, got torch.float32"),
        "target_is_a_list": ({"target": [1]}, TypeError, "target must be a tensor, got list"),
        "device_of_target": (
            {"target": z(6, dtype=torch.int64, device=META)}, ValueError, "target must be on x's device"
        ),
        "target_too_large": (
            {"target": torch.tensor([0, 4, -100, 5, 1, 2])}, ValueError, r"\[0, 5\) or ignore_index.*got 5"
        ),
        "target_negative": ({"target": torch.full((6,), -1)}, ValueError, "target must be in.*got -1"),
        "target_not_ignored": (
            {"target": torch.full((6,), -100), "ignore_index": -1}, ValueError, "ignore_index = -1, got -100"
        ),
        "class_weight_size": ({"class_weight": z(4)}, ValueError, r"class_weight.*\[V\] = \[5\], got \[4\]"),
        "class_weight_half": ({"class_weight": z(5, dtype=HALF)}, TypeError, "class_weight must be float32"),
        "class_weight_list": ({"class_weight": [1.0]}, TypeError, "class_weight must be a tensor, got list"),
        "class_weight_learned": (
            {"class_weight": z(5).requires_grad_()}, ValueError, "class_weight must not require a gradient"
        ),
        "device_of_class_weight": (
            {"class_weight": z(5, device=META)}, ValueError, "class_weight must be on x's device"
        ),
        "ignore_index_fraction": ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
        "ignore_index_none": ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
        "smoothing_above_1": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\]"),
        "smoothing_negative": ({"label_smoothing": -0.1}, ValueError, "label_smoothing.*got -0.1"),
        "smoothing_nan": ({"label_smoothing": NAN}, ValueError, "label_smoothing must be in"),
        "z_loss_negative": ({"z_loss": -1.0}, ValueError, "z_loss must be finite.*got -1.0"),
        "z_loss_inf": ({"z_loss": INF}, ValueError, "z_loss must be finite"),
        "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap must be finite.*got -1.0"),
        "softcap_nan": ({"softcap": NAN}, ValueError, "softcap must be finite"),
        "reduction": ({"reduction": "average"}, ValueError, "reduction must be 'mean', 'sum' or 'none'.*'av"),
    },
}  # fmt: skip
EVERY = [(op, name) for op, cases in BAD.items() for name in cases]


@pytest.mark.parametrize(("op", "name"), EVERY)
def test_bad_input(op, name):
    change, error, message = BAD[op][name]
    with pytest.raises(error, match=message):
        OPS[op](**inputs(op, SIZES[op]) | change)


@pytest.mark.parametrize(("op", "name"), EVERY)
def test_explain_refuses_the_same(op, name):
    change, error, message = BAD[op][name]
    with pytest.raises(error, match=message):
        explain(OPS[op], **inputs(op, SIZES[op]) | change)


@pytest.mark.parametrize("op", OPS)
class TestEvery:
    def test_an_unknown_option_is_not_ignored(self, op):
        with pytest.raises(TypeError, match="dropout_q"):
            OPS[op](**inputs(op, SIZES[op]), dropout_q=0.1)

    def test_options_are_keywords_only(self, op):
        with pytest.raises(TypeError, match="positional"):
            OPS[op](*inputs(op, SIZES[op]).values(), None, None, None, None)

    def test_an_unknown_backend(self, op):
        with pytest.raises(ValueError, match="backend='fast' is unknown"):
            OPS[op](**inputs(op, SIZES[op]), backend="fast")

    def test_float64_is_the_references(self, op):
        given = inputs(op, SIZES[op], dtype=torch.float64)
        with pytest.raises(NotImplementedError, match=f"fastattn.{op}.*torch.float64"):
            OPS[op](**given)
        assert OPS[op](**given, backend="reference").dtype is torch.float64

    def test_explain(self, op):
        found = explain(OPS[op], **inputs(op, SIZES[op]), backend="cpu")
        assert found[0] == ("cpu", None)


def test_a_refused_call_leaves_the_generator_alone():
    """The default seed is drawn only once everything else is known to be good."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="residual"):
        linear(**inputs("linear", SIZES["linear"]), dropout_p=0.5, residual=z(3, 3))
    assert torch.equal(torch.get_rng_state(), state)
