"""Random shapes, strides, types and options of the ops around a matrix product, against the error rule."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastattn.ops._activation import ACTIVATIONS
from fastattn.testing.check import refusal
from fastattn.testing.check_linear import OPS, check_linear, inputs, results, with_options
from fastattn.testing.effort import examples
from fastattn.testing.fence import fenced

LAYOUTS = {
    "dense": lambda x: x,
    "fenced": fenced,
    "by_column": lambda x: x.t().contiguous().t(),
    "one_row": lambda x: x[:1].expand(x.shape),
    "spread": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}

# Each group is one dimension of freedom; None takes none of it.
OPTIONS = {
    "linear": (ACTIVATIONS, ("no_bias",), ("residual",), ("dropout",)),
    "feed_forward": (
        ("plain", *ACTIVATIONS), ("no_bias",), ("residual",), ("dropout",), ("hidden_dropout",),
        ("save_memory",),
    ),
    "gated_feed_forward": (
        ("plain", *ACTIVATIONS), ("stacked",), ("residual",), ("dropout",), ("hidden_dropout",),
        ("save_memory",),
    ),
    "linear_cross_entropy": (
        ("no_bias",), ("ignored",), ("class_weight",), ("label_smoothing", "only_smoothing"), ("z_loss",),
        ("softcap",), ("sum", "none"),
    ),
}  # fmt: skip

rows = st.integers(1, 40) | st.integers(0, 200)
sizes = st.integers(1, 40) | st.sampled_from([64, 96, 128]) | st.integers(1, 300)


def calls(op):
    """Inputs of an op, drawn."""
    count = 4 if "feed_forward" in op else 3
    layouts = st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=5, max_size=5)
    groups = st.tuples(*(st.none() | st.sampled_from(names) for names in OPTIONS[op]))
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    every = st.tuples(rows, *[sizes] * (count - 1))
    return st.builds(build, st.just(op), every, dtypes, groups, layouts, st.integers(0, 2**16))


def build(op, sizes, dtype, options, layouts, seed):
    call = inputs(op, sizes, dtype=dtype, seed=seed)
    if op == "linear_cross_entropy" and sizes[0] == 0:
        call["reduction"] = "sum"  # the mean of nothing is NaN
    for name in options:
        if name is not None:
            call = with_options(op, name, call)
    matrices = [name for name, x in call.items() if isinstance(x, torch.Tensor) and x.ndim == 2]
    return call | {name: LAYOUTS[layout](call[name]) for name, layout in zip(matrices, layouts, strict=False)}


def mean_of_nothing(call):
    target = call.get("target")
    ignored = target is not None and bool((target == call.get("ignore_index", -100)).all())
    return ignored and call.get("reduction", "mean") == "mean"


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@settings(max_examples=examples(120, 10))
def test_error_rule(backend, op, data):
    call = data.draw(calls(op))
    assume(not mean_of_nothing(call))
    assume(refusal(backend, op=OPS[op], **call) is None)
    check_linear(op, call, backend=backend)


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@settings(max_examples=examples(40, 10))
def test_a_slice_gives_the_bits_of_a_copy(kernel_backend, op, data):
    """Weights keep their order: kernels may add up another way along the other one."""
    call = data.draw(calls(op))
    assume(refusal(kernel_backend, op=OPS[op], **call) is None)

    def ordered_copy(x):
        if not isinstance(x, torch.Tensor) or x.ndim != 2:
            return x
        return x.t().contiguous().t() if x.stride(0) == 1 != x.stride(1) else x.contiguous()

    ours = results(op, call, backend=kernel_backend)
    copies = {name: ordered_copy(x) for name, x in call.items()}
    for name, x in results(op, copies, backend=kernel_backend).items():
        assert torch.equal(ours[name], x), name
