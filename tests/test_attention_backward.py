"""How the gradients of attention meet autograd; their values are checked wherever `check` is used."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastattn import attention
from fastattn.testing.check import option_set, refusal, results, upstream
from fastattn.testing.compare import assert_close
from fastattn.testing.inputs import qkv

SHAPE = (2, 4, 2, 70, 90, 32, 16)
NAMES = ("q", "k", "v", "bias", "sinks")


@pytest.fixture
def call(backend):
    """A call of which every differentiable input is a leaf."""
    q, k, v = qkv(*SHAPE)
    leaves = {"q": q, "k": k, "v": v, **option_set("bias_3d", q, k), **option_set("sinks", q, k)}
    call = {name: x.requires_grad_() for name, x in leaves.items()} | {"causal": True}
    if reason := refusal(backend, **call):
        pytest.skip(reason)
    return call | {"backend": backend}


def gradients(loss, call):
    return torch.autograd.grad(loss, [call[name] for name in NAMES], materialize_grads=True)


@pytest.mark.parametrize("loss_of", ["out", "lse", "both"])
def test_loss_of(call, loss_of):
    def loss(call):
        out, lse = attention(**call, return_lse=True)
        parts = {"out": (out * upstream(out)).sum(), "lse": (lse * upstream(lse)).sum()}
        return sum(parts.values()) if loss_of == "both" else parts[loss_of]

    wide = {name: x.detach().double().requires_grad_() for name, x in call.items() if name in NAMES}
    wide = call | wide | {"backend": "reference"}
    base = call | {"backend": "reference"}
    found = (gradients(loss(call), call), gradients(loss(base), base), gradients(loss(wide), wide))
    for name, *xs in zip(NAMES, *found, strict=True):
        assert_close(*xs, name)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_needs_a_gradient(call, wanted):
    def gradient(call):
        out = attention(**call)
        return torch.autograd.grad(out, call[wanted], upstream(out))[0]

    alone = {name: x.detach() if name in NAMES else x for name, x in call.items()}
    alone[wanted].requires_grad_()
    assert torch.equal(gradient(alone), gradient(call))


def test_gradients_have_the_inputs_shape_and_type(backend):
    q, k, v = qkv(*SHAPE, dtype=torch.bfloat16, transposed=True)
    given = {"q": q, "k": k, "v": v, "bias": torch.zeros(90), "sinks": torch.zeros(4)}
    if reason := refusal(backend, **given):
        pytest.skip(reason)
    found = results(**given, backend=backend)
    for name, x in given.items():
        assert found[f"d{name}"].shape == x.shape
        assert found[f"d{name}"].dtype is x.dtype


def test_upstream_gradients_of_any_stride(call):
    out, lse = attention(**call, return_lse=True)
    dout, dlse = upstream(out), upstream(lse)
    expected = torch.autograd.grad((out, lse), call["q"], (dout, dlse), retain_graph=True)[0]

    def reversed_layout(x):
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)

    strided = reversed_layout(dout), reversed_layout(dlse)
    assert strided[0].stride(3) != 1
    assert torch.equal(torch.autograd.grad((out, lse), call["q"], strided)[0], expected)


def test_expanded_upstream_gradient(call):
    out = attention(**call)
    of_sum = torch.autograd.grad(out.sum(), call["k"], retain_graph=True)[0]
    assert torch.equal(of_sum, torch.autograd.grad(out, call["k"], torch.ones_like(out))[0])


def test_backward_twice_gives_the_same(call):
    out = attention(**call)
    first = torch.autograd.grad(out, call["v"], upstream(out), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, call["v"], upstream(out))[0], first)


def test_no_grad_and_grad_give_the_same(call):
    with torch.no_grad():
        plain = attention(**call)
    with torch.inference_mode():
        inference = attention(**call)
    out = attention(**call)
    assert out.requires_grad and not plain.requires_grad
    assert torch.equal(out, plain) and torch.equal(out, inference)


def test_changing_an_input_before_backward_is_an_error(call, kernel_backend):
    k = call["k"].clone()
    out = attention(**call | {"k": k})
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_double_backward_is_refused(call, kernel_backend):
    out = attention(**call)
    (dq,) = torch.autograd.grad(out, call["q"], upstream(out).requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(call, use_reentrant, dropout_p):
    def run(q):
        return attention(**call | {"q": q}, dropout_p=dropout_p)

    q = call["q"]
    torch.manual_seed(3)
    plain = run(q)
    torch.manual_seed(3)
    again = checkpoint(run, q, use_reentrant=use_reentrant)
    assert torch.equal(again, plain)
    for x, y in zip(
        torch.autograd.grad(plain.sum(), [q], retain_graph=True), backward(again.sum(), q), strict=True
    ):
        assert torch.equal(x, y)


def backward(loss, *leaves):
    """`torch.autograd.grad`, but through `.backward()`, which reentrant checkpoints insist on."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


def test_gradient_descends(call, backend):
    """The whole loop: a learned bias finds the one key that the loss wants seen."""
    bias = torch.zeros(90, requires_grad=True)
    fixed = {name: call[name].detach() for name in ("q", "k", "v")}
    target = fixed["v"][:, 7:8].repeat_interleave(2, dim=2).expand(2, 70, 4, 16)
    losses = []
    for _ in range(20):
        loss = (attention(**fixed, bias=bias, backend=backend) - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, bias)
        with torch.no_grad():
            bias -= 50.0 * gradient
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert int(bias.argmax()) == 7
