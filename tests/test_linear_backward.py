"""How the gradients of the ops around a matrix product meet autograd; their values are checked elsewhere."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastattn.testing.check import refusal, upstream
from fastattn.testing.check_linear import OPS, differentiable, inputs, with_options

SIZES = {
    "linear": (30, 17, 9),
    "feed_forward": (30, 17, 26, 9),
    "gated_feed_forward": (30, 17, 26, 9),
    "linear_cross_entropy": (30, 17, 40),
}
OPTIONS = {
    "linear": ("gelu", "residual"),
    "feed_forward": ("gelu", "residual"),
    "gated_feed_forward": ("silu", "residual"),
    "linear_cross_entropy": ("none", "label_smoothing"),
}


@pytest.fixture(params=OPS)
def call(request, backend):
    """(op, arguments of which every differentiable one is a leaf)."""
    op = request.param
    given = inputs(op, SIZES[op])
    for option in OPTIONS[op]:
        given = with_options(op, option, given)
    if reason := refusal(backend, op=OPS[op], **given):
        pytest.skip(reason)
    leaves = {name: x.requires_grad_() for name, x in given.items() if differentiable(name, x)}
    return OPS[op], given | leaves | {"backend": backend}


def leaves(given):
    return {name: x for name, x in given.items() if differentiable(name, x)}


def test_one_input_needs_a_gradient(call):
    """The same bits as when all do."""
    op, given = call
    out = op(**given)
    together = torch.autograd.grad(out, list(leaves(given).values()), upstream(out))
    for wanted, expected in zip(leaves(given), together, strict=True):
        alone = {name: x.detach() if differentiable(name, x) else x for name, x in given.items()}
        alone[wanted].requires_grad_()
        out = op(**alone)
        assert torch.equal(torch.autograd.grad(out, alone[wanted], upstream(out))[0], expected), wanted


def test_upstream_gradients_of_any_stride(call):
    op, given = call
    x = given["x"]
    out = op(**given)
    dout = upstream(out)
    (expected,) = torch.autograd.grad(out, x, dout, retain_graph=True)
    strided = dout.repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(torch.autograd.grad(out, x, strided, retain_graph=True)[0], expected)
    if dout.ndim == 2:
        by_column = dout.t().contiguous().t()
        assert torch.equal(torch.autograd.grad(out, x, by_column)[0], expected)


def test_expanded_upstream_gradient(call):
    op, given = call
    out = op(**given)
    (of_sum,) = torch.autograd.grad(out.sum(), given["x"], retain_graph=True)
    assert torch.equal(of_sum, torch.autograd.grad(out, given["x"], torch.ones_like(out))[0])


def test_backward_twice_gives_the_same(call):
    op, given = call
    out = op(**given)
    first = torch.autograd.grad(out, list(leaves(given).values()), upstream(out), retain_graph=True)
    second = torch.autograd.grad(out, list(leaves(given).values()), upstream(out))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_no_grad_and_grad_give_the_same(call):
    op, given = call
    with torch.no_grad():
        plain = op(**given)
    with torch.inference_mode():
        inference = op(**given)
    out = op(**given)
    assert out.requires_grad and not plain.requires_grad
    assert torch.equal(out, plain) and torch.equal(out, inference)


def test_changing_an_input_before_backward_is_an_error(call, kernel_backend):
    op, given = call
    x = given["x"].clone()
    out = op(**given | {"x": x})
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused(call, kernel_backend):
    op, given = call
    out = op(**given)
    (dx,) = torch.autograd.grad(out, given["x"], upstream(out).requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op.__name__} has no second derivative"):
        dx.sum().backward()


def test_gradients_add_up_in_parameters(call):
    """Two calls with the same weights, as in a layer that is used twice."""
    op, given = call
    name = next(name for name in given if name.startswith("w"))
    weight = torch.nn.Parameter(given[name].detach())
    for _ in range(2):
        op(**given | {name: weight}).sum().backward()
    (once,) = torch.autograd.grad(op(**given | {name: weight}).sum(), weight)
    assert torch.equal(weight.grad, once * 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(call, use_reentrant):
    """The recomputation drops what the first pass dropped."""
    op, given = call
    dropout = {} if op.__name__ == "linear_cross_entropy" else {"dropout_p": 0.3}

    def run(x):
        return op(**given | {"x": x}, **dropout)

    x = given["x"]
    torch.manual_seed(3)
    plain = run(x)
    torch.manual_seed(3)
    again = checkpoint(run, x, use_reentrant=use_reentrant)
    assert torch.equal(again, plain)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    x.grad = None
    again.sum().backward()  # reentrant checkpoints insist on it
    assert torch.equal(x.grad, expected)
