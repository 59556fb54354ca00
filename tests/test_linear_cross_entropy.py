"""linear_cross_entropy against the error rule, and against what F.cross_entropy means."""

import pytest
import torch
import torch.nn.functional as F

from fastattn import linear_cross_entropy
from fastattn.testing.check_linear import OPTION_SETS, inputs, results, with_options
from fastattn.testing.effort import some
from fastattn.testing.fence import fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = "linear_cross_entropy"

# M, K, V
SHAPES = {
    "odd": (37, 53, 129),
    "one": (1, 1, 1),
    "one_class": (9, 4, 1),
    "one_feature": (5, 1, 7),
    "one_row": (1, 64, 1003),
    "few_rows": (7, 96, 500),
    "tall": (700, 32, 40),
    "wide": (20, 30, 5001),
    "deep": (8, 1500, 70),
}


def call(shape, option, dtype=torch.float32):
    return with_options(OP, option, inputs(OP, shape, dtype=dtype))


@pytest.mark.parametrize("option", ["plain", "none", "transposed"])
@pytest.mark.parametrize("shape", some(list(SHAPES), 3))
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check_op, dtype, shape, option):
    check_op(OP, call(SHAPES[shape], option, dtype))


@pytest.mark.parametrize("reduction", some(["mean", "sum", "none"], 1))
@pytest.mark.parametrize("option", OPTION_SETS[OP])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check_op, dtype, option, reduction):
    given = call((70, 48, 301), option, dtype) | {"reduction": reduction}
    check_op(OP, given)
    check_op(OP, given, gradients=False)


@pytest.mark.many
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_small_size(check_op, dtype):
    for size in range(1, 60):
        check_op(OP, inputs(OP, (size, 61 - size, 1 + size * 5 % 59), dtype=dtype) | {"reduction": "none"})


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strides(check_op, dtype):
    given = call((30, 17, 26), "everything", dtype)
    fences = {name: fenced(given[name]) for name in ("x", "weight", "bias", "class_weight")}
    check_op(OP, given | fences)
    check_op(OP, given | {"target": given["target"].repeat_interleave(2)[::2]})
    check_op(OP, given | {"target": given["target"][:1].expand(30)})


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
class TestMagnitudes:
    """Logits that a naive exp overflows on, and orders of classes that are hard on an online sum."""

    @pytest.mark.parametrize("size", [1e-3, 30.0, 1e3])
    def test_logits_up_to(self, check_op, dtype, size):
        given = call((20, 32, 300), "none", dtype)
        check_op(OP, given | {"weight": given["weight"] * size})

    @pytest.mark.parametrize("step", [2.0, 0.1, -0.1, -2.0])
    def test_every_class_is_likelier_than_the_last(self, check_op, dtype, step):
        given = call((20, 32, 300), "none", dtype)
        check_op(OP, given | {"bias": (step * torch.arange(300.0)).to(dtype)})

    def test_one_class_towers_over_the_others(self, check_op, dtype):
        given = call((20, 32, 300), "none", dtype)
        for where in (0, 150, 299):
            bias = torch.zeros(300, dtype=dtype)
            bias[where] = 200.0
            check_op(OP, given | {"bias": bias})


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reference_is_torchs(reduction, label_smoothing, weighted):
    given = call((12, 8, 20), "ignored", torch.float64)
    class_weight = torch.rand(20) if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    logits = F.linear(given["x"], given["weight"], given["bias"])
    expected = F.cross_entropy(
        logits, given["target"], None if class_weight is None else class_weight.double(), **options
    )
    found = linear_cross_entropy(**given, class_weight=class_weight, **options, backend="reference")
    torch.testing.assert_close(found, expected)


def test_the_references_z_loss():
    given = call((12, 8, 20), "ignored", torch.float64) | {"reduction": "none", "backend": "reference"}
    added = linear_cross_entropy(**given, z_loss=0.5) - linear_cross_entropy(**given)
    lse = F.linear(given["x"], given["weight"], given["bias"]).logsumexp(dim=-1)
    torch.testing.assert_close(added, (0.5 * lse.square()).masked_fill(given["target"] == -100, 0.0))


class TestIgnored:
    def test_tokens_have_no_loss_and_no_gradient(self, backend, skip_if_refused):
        given = call((12, 8, 20), "everything")
        skip_if_refused(linear_cross_entropy, **given)
        found = results(OP, given, backend=backend)
        ignored = given["target"] == -100
        assert (found["out"][ignored] == 0).all()
        assert (found["dx"][ignored] == 0).all()
        assert (found["dx"][~ignored] != 0).any()

    def test_a_mean_of_no_tokens(self, backend, skip_if_refused):
        """NaN as in torch, and no NaN in the gradients."""
        given = call((12, 8, 20), "plain") | {"target": torch.full((12,), -100)}
        skip_if_refused(linear_cross_entropy, **given)
        found = results(OP, given, backend=backend)
        assert found["out"].isnan()
        for name in ("dx", "dweight", "dbias"):
            assert (found[name] == 0).all(), name

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_no_tokens_at_all(self, check_op, reduction):
        check_op(OP, call((0, 8, 20), "plain") | {"reduction": reduction})

    def test_a_class_may_be_the_one_to_ignore(self, check_op):
        check_op(OP, call((30, 8, 5), "plain") | {"ignore_index": 3})


def test_a_loss_is_float32_and_has_the_targets_shape(backend, skip_if_refused):
    given = call((12, 8, 20), "none", torch.bfloat16)
    skip_if_refused(linear_cross_entropy, **given)
    shaped = given | {"x": given["x"].view(3, 4, 8), "target": given["target"].view(3, 4)}
    loss = linear_cross_entropy(**shaped, backend=backend)
    assert loss.shape == (3, 4) and loss.dtype is torch.float32
    assert torch.equal(loss.flatten(), linear_cross_entropy(**given, backend=backend))
    mean = linear_cross_entropy(**shaped | {"reduction": "mean"}, backend=backend)
    assert mean.shape == () and mean.dtype is torch.float32
    one = linear_cross_entropy(
        given["x"][0], given["weight"], given["target"][0], reduction="none", backend=backend
    )
    assert one.shape == ()


def test_gradients_have_the_inputs_shape_type_and_strides(backend, skip_if_refused):
    given = call((12, 8, 20), "everything", torch.bfloat16)
    skip_if_refused(linear_cross_entropy, **given)
    found = results(OP, given, backend=backend)
    for name in ("x", "weight", "bias"):
        assert found[f"d{name}"].shape == given[name].shape
        assert found[f"d{name}"].dtype is torch.bfloat16
    assert found["dweight"].stride() == (1, 20)


def test_shifted_labels(check_op):
    """The way language models are trained: every token but the last, every label but the first."""
    x, labels = torch.randn(2, 9, 8), torch.randint(0, 20, (2, 9))
    given = call((12, 8, 20), "plain") | {"x": x[:, :-1], "target": labels[:, 1:]}
    check_op(OP, given)
