"""Products that are cut: few tokens in groups, weights and classes in parts, tokens in blocks."""

import pytest
import torch

OUT, IN, HIDDEN = 56, 48, 90


def across(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A weight [rows, columns] that lies as [columns, rows]."""
    return (torch.randn(columns, rows, dtype=dtype) / columns**0.5).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [9, 16, 17, 31, 32, 33])
def test_few_tokens_in_groups(check_op, tokens, dtype):
    """Dropout and residual must count on from group to group."""
    torch.manual_seed(0)
    given = {
        "x": torch.randn(tokens, IN, dtype=dtype),
        "w_up": across(HIDDEN, IN, dtype),
        "w_down": across(OUT, HIDDEN, dtype),
        "residual": torch.randn(tokens, OUT, dtype=dtype),
        "dropout_p": 0.3,
        "hidden_dropout_p": 0.2,
        "seed": 5,
    }
    check_op("gated_feed_forward", given | {"w_gate": across(HIDDEN, IN, dtype)})
    check_op("feed_forward", given | {"b_up": None, "b_down": None})


@pytest.mark.parametrize("tokens", [3, 30, 400])
def test_classes_in_parts(check_op, tokens):
    """A head that lies across and is too large to be packed whole."""
    torch.manual_seed(0)
    target = torch.randint(0, 12000, (tokens,))
    target[1] = -100
    given = {"x": torch.randn(tokens, 768), "weight": across(12000, 768), "target": target}
    check_op("linear_cross_entropy", given | {"label_smoothing": 0.1, "softcap": 20.0})


def test_weights_in_parts_and_tokens_in_blocks(check_op):
    """dx packs a weight of 36 MB, dweight a dout of 72."""
    torch.manual_seed(0)
    weight = torch.randn(6000, 1500) / 40
    check_op("linear", {"x": torch.randn(3000, 1500), "weight": weight, "bias": torch.randn(6000)})
