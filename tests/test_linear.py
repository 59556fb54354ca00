"""linear against the error rule: out and every gradient, over shapes, types and options."""

import pytest
import torch

from fastattn import linear
from fastattn.ops._activation import ACTIVATIONS
from fastattn.testing.check_linear import OPTION_SETS, differentiable, inputs, results, with_options
from fastattn.testing.effort import some
from fastattn.testing.fence import fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)

# M, K, N
SHAPES = {
    "odd": (37, 53, 29),
    "one": (1, 1, 1),
    "few_rows": (7, 1000, 130),
    "empty": (0, 7, 5),
    "one_feature": (5, 1, 7),
    "one_output": (130, 33, 1),
    "one_row": (1, 300, 517),
    "blocks": (70, 128, 256),
    "deep": (16, 3000, 48),
    "tall": (700, 64, 100),
    "wide": (4, 64, 2100),
}


@pytest.mark.parametrize("option", ["plain", "gelu"])
@pytest.mark.parametrize("shape", some(list(SHAPES), 4))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
class TestShapes:
    def test_shapes(self, check_op, dtype, shape, option):
        check_op("linear", with_options("linear", option, inputs("linear", SHAPES[shape], dtype=dtype)))

    def test_weights_stored_by_column(self, check_op, dtype, shape, option):
        given = with_options("linear", option, inputs("linear", SHAPES[shape], dtype=dtype))
        check_op("linear", with_options("linear", "transposed", given))


@pytest.mark.parametrize("shape", some([(150, 96, 80), (1, 96, 80), (6, 130, 67)], 1), ids=str)
@pytest.mark.parametrize("option", OPTION_SETS["linear"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check_op, dtype, option, shape):
    given = with_options("linear", option, inputs("linear", shape, dtype=dtype))
    check_op("linear", given)
    check_op("linear", given, gradients=False)


@pytest.mark.many
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_small_size(check_op, dtype):
    """Every remainder of the tiles' rows and columns."""
    for size in range(1, 70):
        given = inputs("linear", (size, 71 - size, 1 + size * 5 % 67), dtype=dtype)
        check_op("linear", given | {"activation": "relu"})


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_magnitudes(check_op, size):
    given = inputs("linear", SHAPES["odd"])
    for activation in (None, "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"):
        check_op("linear", given | {"x": given["x"] * size, "activation": activation})


@pytest.mark.parametrize("end", [0.0, -0.0, 1e-30, 10.0, -10.0, 100.0, -100.0, 1e6, -1e6])
def test_the_ends_of_an_activation(check_op, end):
    given = {"x": torch.tensor([[end]]), "weight": torch.ones(1, 1)}
    for activation in ACTIVATIONS:
        check_op("linear", given | {"activation": activation})


@pytest.mark.parametrize("rows", [1, 9])
def test_nan_stays_nan(backend, skip_if_refused, rows):
    x, weight = torch.full((rows, 1), torch.nan), torch.ones(1, 1)
    for activation in (None, *ACTIVATIONS):
        skip_if_refused(linear, x, weight, activation=activation)
        assert linear(x, weight, activation=activation, backend=backend).isnan().all(), activation


class TestRanks:
    @pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
    def test_x_of_any_rank(self, backend, skip_if_refused, lead):
        given = inputs("linear", (6, 5, 4))
        x = torch.randn(*lead, 5, generator=torch.Generator().manual_seed(0))
        skip_if_refused(linear, x, given["weight"])
        out = linear(x, given["weight"], given["bias"], backend=backend)
        rows = linear(x.reshape(-1, 5), given["weight"], given["bias"], backend=backend)
        assert out.shape == (*lead, 4) and out.is_contiguous()
        assert torch.equal(out.flatten(), rows.flatten())

    def test_a_residual_of_another_rank(self, backend, skip_if_refused):
        given = with_options("linear", "residual", inputs("linear", (6, 5, 4)))
        skip_if_refused(linear, **given)
        expected = linear(**given, backend=backend)
        for shape in ((2, 3, 4), (3, 1, 2, 4)):
            residual = given["residual"].view(shape).requires_grad_()
            out = linear(**given | {"residual": residual}, backend=backend)
            assert torch.equal(out, expected)
            (gradient,) = torch.autograd.grad(out.sum(), residual)
            assert torch.equal(gradient, torch.ones(shape))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
class TestStrides:
    def strided(self, check_op, dtype, **change):
        given = with_options("linear", "residual", inputs("linear", (30, 17, 9), dtype=dtype))
        check_op("linear", given | {name: make(given[name]) for name, make in change.items()})

    def test_sliced_rows(self, check_op, dtype):
        self.strided(check_op, dtype, x=fenced, weight=fenced, residual=fenced)

    def test_every_other_row(self, check_op, dtype):
        self.strided(check_op, dtype, x=lambda x: x.repeat_interleave(2, 0)[::2], weight=lambda w: w.flip(0))

    def test_every_other_column(self, check_op, dtype):
        def spread(x):
            return x.repeat_interleave(2, -1)[..., ::2]

        self.strided(check_op, dtype, x=spread, weight=spread, bias=spread, residual=spread)

    def test_x_stored_by_column(self, check_op, dtype):
        def by_column(x):
            return x.t().contiguous().t()

        self.strided(check_op, dtype, x=by_column, residual=by_column)

    def test_rows_that_are_one(self, check_op, dtype):
        def one(x):
            return x[:1].expand(x.shape)

        self.strided(check_op, dtype, x=one, weight=one, bias=one, residual=one)

    def test_a_weight_of_one_column_that_is_a_slice(self, check_op, dtype):
        given = inputs("linear", (6, 3, 5), dtype=dtype)
        check_op("linear", given | {"x": given["x"][:, 1:2], "weight": given["weight"][:, 2:]})
        check_op("linear", given | {"weight": given["weight"].t().contiguous()[:, 2:3].t(), "bias": None})


def test_gradients_have_the_inputs_shape_type_and_strides(backend, skip_if_refused):
    given = with_options("linear", "everything", inputs("linear", (6, 5, 4), dtype=torch.bfloat16))
    skip_if_refused(linear, **given)
    found = results("linear", given, backend=backend)
    for name, x in given.items():
        if differentiable(name, x):
            assert found[f"d{name}"].shape == x.shape
            assert found[f"d{name}"].dtype is x.dtype
    assert found["dweight"].stride() == given["weight"].stride() == (1, 4)


def test_dropout_is_the_references_in_every_row(backend, skip_if_refused):
    """Where the one is 0 the other is, and what stays has grown."""
    options = {"dropout_p": 0.4, "seed": 3}
    given = inputs("linear", (33, 8, 45)) | {"bias": torch.full((45,), 100.0)}
    skip_if_refused(linear, **given, **options)
    out = linear(**given, **options, backend=backend)
    expected = linear(**given, **options, backend="reference")
    assert torch.equal(out == 0, expected == 0)
    assert 0.3 < float((out == 0).float().mean()) < 0.5


def test_a_seed_is_drawn_from_torchs_generator(backend, skip_if_refused):
    given = inputs("linear", (9, 8, 7))
    skip_if_refused(linear, **given)

    def draw():
        return linear(**given, dropout_p=0.5, backend=backend)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
