"""Bad input raises, names the argument, and does so before any memory is touched: one test each."""

import math

import pytest
import torch

from fastattn import attention, explain

NAN, INF = math.nan, math.inf


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {"q": x(2, 5, 4, 8), "k": x(2, 7, 2, 8), "v": x(2, 7, 2, 16)}
STRIDED = x(2, 8, 5, 4).transpose(1, 2).transpose(2, 3)  # [B, S, H, D], last stride 20

BAD = {
    # The wrong shape.
    "q_rank_3": ({"q": x(5, 4, 8)}, ValueError, r"q must have 4 dim.*got shape \[5, 4, 8\]"),
    "k_rank_5": ({"k": x(1, 2, 7, 2, 8)}, ValueError, "k must have 4 dim"),
    "v_rank_0": ({"v": x()}, ValueError, "v must have 4 dim"),
    "batch_of_q": ({"q": x(3, 5, 4, 8)}, ValueError, "batch size.*(3, 2, 2)"),
    "batch_of_v": ({"v": x(1, 7, 2, 16)}, ValueError, "batch size.*(2, 2, 1)"),
    "head_dim": ({"k": x(2, 7, 2, 9)}, ValueError, "head dim D.*8 and 9"),
    "head_dim_0": ({"q": x(2, 5, 4, 0), "k": x(2, 7, 2, 0)}, ValueError, "at least 1.*D 0"),
    "head_dim_v_0": ({"v": x(2, 7, 2, 0)}, ValueError, "at least 1.*Dv 0"),
    "seqlen": ({"v": x(2, 6, 2, 16)}, ValueError, "length Sk.*7 and 6"),
    "heads_of_v": ({"v": x(2, 7, 1, 16)}, ValueError, "number of heads Hk.*2 and 1"),
    "heads_not_a_multiple": ({"q": x(2, 5, 3, 8)}, ValueError, "multiple of Hk.*H 3.*Hk 2"),
    "fewer_heads_than_kv": ({"q": x(2, 5, 1, 8)}, ValueError, "multiple of Hk.*H 1.*Hk 2"),
    "no_kv_heads": ({"k": x(2, 7, 0, 8), "v": x(2, 7, 0, 16)}, ValueError, "multiple of Hk.*Hk 0"),
    # The wrong type.
    "types_differ": ({"k": x(2, 7, 2, 8, dtype=torch.half)}, TypeError, "one type.*k torch.float16"),
    "integers": ({n: t.int() for n, t in GOOD.items()}, TypeError, "got torch.int32"),
    "complex": ({n: t.cfloat() for n, t in GOOD.items()}, TypeError, "got torch.complex64"),
    "q_is_a_list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "k_is_none": ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "v_is_an_array": ({"v": x(2, 7, 2, 16).numpy()}, TypeError, "v must be a tensor, got ndarray"),
    "mask_is_a_list": ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
    "bias_is_a_number": ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "sinks_are_a_list": ({"sinks": [0.0] * 4}, TypeError, "sinks must be a tensor, got list"),
    "slopes_are_a_list": ({"alibi_slopes": [0.0]}, TypeError, "alibi_slopes must be a tensor, got list"),
    # Strides and devices.
    "last_stride_of_q": ({"q": STRIDED}, ValueError, r"last stride of q.*q.contiguous\(\)"),
    "last_stride_of_k": ({"k": x(2, 7, 2, 16)[..., ::2]}, ValueError, "last stride of k"),
    "last_stride_0_of_v": ({"v": x(2, 7, 2, 1).expand(-1, -1, -1, 16)}, ValueError, "last stride of v"),
    "device_of_k": ({"k": x(2, 7, 2, 8, device="meta")}, ValueError, "k must be on q's device cpu.*meta"),
    "device_of_q": ({"q": x(2, 5, 4, 8, device="meta")}, ValueError, "k must be on q's device meta"),
    "device_of_mask": (
        {"mask": x(5, 7, dtype=torch.bool, device="meta")}, ValueError, "mask must be on q's device"
    ),
    "device_of_bias": ({"bias": x(5, 7, device="meta")}, ValueError, "bias must be on q's device"),
    "device_of_sinks": ({"sinks": x(4, device="meta")}, ValueError, "sinks must be on q's device"),
    "device_of_slopes": (
        {"alibi_slopes": x(4, device="meta")}, ValueError, "alibi_slopes must be on q's device"
    ),
    # Mask, bias, sinks, slopes.
    "mask_of_numbers": ({"mask": x(5, 7)}, TypeError, "mask must be bool.*torch.float32"),
    "mask_of_bytes": ({"mask": x(5, 7, dtype=torch.uint8)}, TypeError, "mask must be bool"),
    "mask_transposed": ({"mask": x(7, 5, dtype=torch.bool)}, ValueError, r"mask must broad.*\[7, 5\]"),
    "mask_heads": ({"mask": x(2, 2, 5, 7, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "mask_rank_5": ({"mask": x(1, 2, 4, 5, 7, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "mask_batch_first": ({"mask": x(2, 7, dtype=torch.bool)}, ValueError, "mask must broadcast"),
    "bias_shape": ({"bias": x(2, 4, 5, 6)}, ValueError, r"\[B, H, Sq, Sk\] = \[2, 4, 5, 7\].*5, 6\]"),
    "bias_rank_5": ({"bias": x(1, 1, 1, 5, 7)}, ValueError, "bias must broadcast"),
    "bias_empty": ({"bias": x(0, 4, 5, 7)}, ValueError, "bias must broadcast"),
    "bias_half": ({"bias": x(5, 7, dtype=torch.half)}, TypeError, "bias must be in q's type.*float16"),
    "bias_double": ({"bias": x(5, 7, dtype=torch.double)}, TypeError, "bias must be in q's type"),
    "bias_bool": ({"bias": x(5, 7, dtype=torch.bool)}, TypeError, "bias must be in q's type"),
    "sinks_of_kv_heads": ({"sinks": x(2)}, ValueError, r"sinks must have shape \[H\] = \[4\].*\[2\]"),
    "sinks_rank_2": ({"sinks": x(2, 4)}, ValueError, "sinks must have shape"),
    "sinks_double": ({"sinks": x(4, dtype=torch.double)}, TypeError, "sinks must be in q's type"),
    "slopes_shape": ({"alibi_slopes": x(4, 2)}, ValueError, r"alibi_slopes must have.*\[4, 2\]"),
    "slopes_rank_3": ({"alibi_slopes": x(2, 4, 1)}, ValueError, "alibi_slopes must have shape"),
    "slopes_double": ({"alibi_slopes": x(4, dtype=torch.double)}, TypeError, "slopes must be float32"),
    "slopes_learned": ({"alibi_slopes": x(4).requires_grad_()}, ValueError, "not require a gradient"),
    # Numbers.
    "scale_nan": ({"softmax_scale": NAN}, ValueError, "softmax_scale must be finite.*got nan"),
    "scale_inf": ({"softmax_scale": INF}, ValueError, "softmax_scale must be finite.*got inf"),
    "scale_negative": ({"softmax_scale": -0.1}, ValueError, "softmax_scale must be.*got -0.1"),
    "softcap_nan": ({"softcap": NAN}, ValueError, "softcap must be finite.*got nan"),
    "softcap_inf": ({"softcap": INF}, ValueError, "softcap must be finite.*got inf"),
    "softcap_negative": ({"softcap": -1.0}, ValueError, "softcap must be.*got -1.0"),
    "dropout_1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be"),
    "dropout_nan": ({"dropout_p": NAN}, ValueError, "dropout_p must be"),
    "seed_negative": ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed must be in.*got -1"),
    "seed_too_large": ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must be in"),
    "seed_unused_but_wrong": ({"seed": -1}, ValueError, "seed must be in"),
    "seed_fraction": ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int.*float"),
    "seed_int32": ({"dropout_p": 0.1, "seed": x(dtype=torch.int32)}, TypeError, "seed must be an int64"),
    "seed_of_shape_1": ({"dropout_p": 0.1, "seed": x(1, dtype=torch.int64)}, TypeError, r"seed.*\[1\]"),
    "window_below_1": ({"window_size": (-2, 0)}, ValueError, r"window_size must be.*\(-2, 0\)"),
    "window_fraction": ({"window_size": (1.5, 0)}, ValueError, "window_size must be two integers"),
    "window_nan": ({"window_size": (NAN, 0)}, ValueError, "window_size must be two integers"),
    "window_inf": ({"window_size": (INF, 0)}, ValueError, "window_size must be two integers"),
    "window_none": ({"window_size": (None, 0)}, ValueError, "window_size must be two integers"),
    "window_one_number": ({"window_size": 5}, ValueError, "window_size must be two integers"),
    "window_of_three": ({"window_size": (1, 2, 3)}, ValueError, "window_size must be two integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        attention(**GOOD | change)


@pytest.mark.parametrize("name", BAD)
def test_explain_refuses_the_same(name):
    change, error, message = BAD[name]
    call = GOOD | change
    with pytest.raises(error, match=message):
        explain(attention, call.pop("q"), call.pop("k"), call.pop("v"), **call)


def test_options_are_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        attention(*GOOD.values(), True)


def test_an_unknown_option_is_not_ignored():
    with pytest.raises(TypeError, match="is_causal"):
        attention(**GOOD, is_causal=True)


@pytest.mark.parametrize(
    "change",
    [
        {"softmax_scale": 0.0},
        {"softmax_scale": 1},
        {"softcap": 30},
        {"dropout_p": 0},
        {"seed": 7},
        {"dropout_p": 0.1, "seed": 2**63 - 1},
        {"dropout_p": 0.1, "seed": torch.tensor(3)},
        {"window_size": [3, -1]},
        {"window_size": (2**40, 2**40)},
        {"causal": True, "window_size": (-1, 5)},
        {"mask": x(dtype=torch.bool)},
        {"bias": x(1)},
        {"sinks": None, "bias": None, "mask": None, "alibi_slopes": None},
        {"v": x(2, 7, 2, 1).as_strided((2, 7, 2, 1), (14, 2, 1, 9))},
    ],
    ids=str,
)
def test_unusual_but_good_input(change):
    assert attention(**GOOD | change, backend="reference").shape[:3] == (2, 5, 4)


def test_a_refused_call_leaves_the_generator_alone():
    """The default seed is drawn only once everything else is known to be good."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="window_size"):
        attention(**GOOD, dropout_p=0.5, window_size=(-7, 0))
    assert torch.equal(torch.get_rng_state(), state)
