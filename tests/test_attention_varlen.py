"""Attention over packed sequences: the error rule, and what dense attention gives on the same ones."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastattn import attention, attention_varlen, dispatch
from fastattn.ops import attention_varlen as op
from fastattn.testing.check import (
    PACKED_OPTION_SETS,
    check_varlen,
    packed_option_set,
    refusal,
    results,
    upstream,
)
from fastattn.testing.compare import assert_close
from fastattn.testing.fence import FencedAllocations, fenced
from fastattn.testing.inputs import packed_qkv, starts

TYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")

# Lengths of queries and of keys, then H, Hk, D, Dv.
SHAPES = {
    "one": ((1,), (1,), 1, 1, 1, 1),
    "ragged": ((5, 37, 1, 64), (53, 37, 130, 3), 3, 3, 17, 29),
    "gqa": ((65, 14, 15), (130, 300, 33), 6, 2, 64, 64),
    "mqa": ((33, 8, 9), (100, 8, 9), 8, 1, 80, 40),
    "empty_queries": ((0, 20, 0, 7, 0), (10, 20, 30, 7, 0), 4, 2, 32, 32),
    "empty_keys": ((3, 20, 11, 7), (0, 20, 0, 40), 4, 2, 32, 32),
    "decode": ((1, 1, 1, 4), (700, 1, 1300, 65), 4, 2, 64, 64),
    "blocks": ((300, 20, 511), (300, 900, 256), 2, 1, 64, 64),
    "many": (tuple(range(30)), tuple(range(29, -1, -1)), 2, 1, 16, 16),
    "no_sequences": ((), (), 4, 2, 8, 8),
    "no_tokens": ((0, 0), (0, 0), 4, 2, 8, 8),
    "no_keys": ((3, 2), (0, 0), 4, 2, 8, 8),
    "no_heads": ((3, 2), (4, 5), 0, 0, 8, 8),
}


@pytest.fixture(autouse=True)
def _backend_has_the_op(skip_if_refused):
    skip_if_refused(attention_varlen, *packed_qkv((1,), (1,), 1, 1, 1))


@pytest.fixture
def check(backend):
    """`check_varlen` on this backend."""

    def run(*tensors, **options):
        check_varlen(*tensors, backend=backend, **options)

    return run


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shapes(check, dtype, shape, causal):
    tensors = packed_qkv(*SHAPES[shape], dtype=dtype)
    check(*tensors, causal=causal)
    check(*tensors, causal=causal, gradients=False)


@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_options(check, dtype, option):
    tensors = packed_qkv((90, 0, 5, 33), (150, 12, 2, 33), 6, 3, 40, 24, dtype=dtype)
    check(*tensors, **packed_option_set(option, tensors[0], batch=4))


@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
def test_options_with_few_queries(check, option):
    """Without a gradient to come they may run on a kernel of their own."""
    tensors = packed_qkv((1, 3, 0, 1), (700, 300, 9, 0), 4, 2, 64, 64, dtype=torch.bfloat16)
    check(*tensors, **packed_option_set(option, tensors[0], batch=4), gradients=False)


@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
@pytest.mark.parametrize("shape", [(3, 65, 130, 6, 2, 32, 16), (4, 1, 300, 4, 1, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_equal_lengths_give_the_bits_of_attention(kernel_backend, dtype, shape, option):
    batch, seqlen_q, seqlen_k, *heads_and_dims = shape
    tensors = packed_qkv((seqlen_q,) * batch, (seqlen_k,) * batch, *heads_and_dims, dtype=dtype)
    options = packed_option_set(option, tensors[0], batch)
    dense = dict(zip("qkv", (x.unflatten(0, (batch, -1)) for x in tensors[:3]), strict=True))
    found = packed_results(kernel_backend, tensors, gradients=False, **options)
    expected = results(**dense, **options, backend=kernel_backend, gradients=False)
    assert torch.equal(found["out"], expected["out"].flatten(0, 1))
    assert torch.equal(found["lse"], expected["lse"].transpose(0, 1).flatten(1))

    def gradients(attend, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attend(*leaves, *tensors[3:], **options, backend=kernel_backend)
        dout = upstream(out.flatten(0, -3)).view_as(out)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    ours = gradients(attention_varlen, *tensors)
    for name, x, y in zip(
        ("out", "dq", "dk", "dv"), ours, gradients(attention, *dense.values()), strict=True
    ):
        assert torch.equal(x, y.flatten(0, 1)), name


def packed_results(backend, tensors, **options):
    given = dict(zip(NAMES, tensors, strict=True))
    return results(**given, **options, backend=backend, op=attention_varlen)


def test_dropout_is_that_of_the_padded_batch(backend):
    seqlens_q, seqlens_k = (7, 20, 0, 1), (30, 5, 9, 11)
    tensors = packed_qkv(seqlens_q, seqlens_k, 4, 2, 16)
    dropout = {"dropout_p": 0.4, "seed": 2**35 + 1}
    out = attention_varlen(*tensors, **dropout, backend=backend)

    def padded(dtype):
        q, k, v = (
            torch.nn.utils.rnn.pad_sequence(x.to(dtype).split(seqlens), batch_first=True)
            for x, seqlens in zip(tensors, (seqlens_q, seqlens_k, seqlens_k), strict=False)
        )
        mask = torch.arange(30) < torch.tensor(seqlens_k)[:, None, None, None]
        whole = attention(q, k, v, mask=mask, **dropout, backend="reference")
        return torch.cat([x[:n] for x, n in zip(whole, seqlens_q, strict=True)])

    assert_close(out, padded(torch.float32), padded(torch.float64))


@pytest.mark.parametrize("option", [x for x in PACKED_OPTION_SETS if x not in ("dropout", "everything")])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_sequence_gives_the_same_bits_alone(kernel_backend, dtype, option):
    seqlens_q, seqlens_k = (1, 150, 0, 40, 3), (400, 150, 5, 33, 0)
    tensors = packed_qkv(seqlens_q, seqlens_k, 4, 2, 64, 32, dtype=dtype)
    options = packed_option_set(option, tensors[0], batch=5)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    together, lse = attention_varlen(*tensors, **options, return_lse=True, backend=kernel_backend)
    gradients = torch.autograd.grad(together, leaves, dout := upstream(together))
    with torch.no_grad():
        forward = attention_varlen(*tensors, **options, backend=kernel_backend)
    for b in range(5):
        at = [slice(*x[b : b + 2].tolist()) for x in tensors[3:]]
        own = [
            x[rows].detach().requires_grad_() for x, rows in zip(leaves, (at[0], at[1], at[1]), strict=True)
        ]
        ends = starts(seqlens_q[b : b + 1]), starts(seqlens_k[b : b + 1])
        mine = options | {k: x[b : b + 1] for k, x in options.items() if k == "alibi_slopes" and x.ndim == 2}
        out, own_lse = attention_varlen(*own, *ends, **mine, return_lse=True, backend=kernel_backend)
        assert torch.equal(out, together[at[0]]) and torch.equal(own_lse, lse[:, at[0]])
        for i, x in enumerate(torch.autograd.grad(out, own, dout[at[0]])):
            assert torch.equal(x, gradients[i][at[min(i, 1)]]), "qkv"[i]
        with torch.no_grad():
            alone = attention_varlen(*own, *ends, **mine, backend=kernel_backend)
        assert torch.equal(alone, forward[at[0]])


@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads_give_the_same_bits(kernel_backend, dtype, option):
    before = torch.get_num_threads()
    try:
        for lengths in (((130, 0, 33, 5), (130, 300, 9, 77)), ((1, 1, 2), (1300, 7, 260))):
            tensors = packed_qkv(*lengths, 6, 2, 64, 48, dtype=dtype)
            options = packed_option_set(option, tensors[0], batch=len(lengths[0]))
            for gradients in (False, True):
                runs = []
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    runs.append(packed_results(kernel_backend, tensors, gradients=gradients, **options))
                for name, x in runs[0].items():
                    assert torch.equal(x, runs[1][name]), name
    finally:
        torch.set_num_threads(before)


def test_rows_that_see_nothing(backend):
    tensors = packed_qkv((30, 4, 3), (10, 0, 3), 4, 2, 32, 16)
    found = packed_results(backend, tensors, causal=True)
    blind = found["lse"] == -torch.inf
    assert blind[:, :20].all() and blind[:, 30:34].all() and not blind[:, 34:].any()
    for name in ("out", "dq"):
        assert (found[name][blind.T] == 0).all()
    assert not any(x.isnan().any() for x in found.values())
    sinks = torch.tensor([0.5, -2.0, 0.0, 3.0])
    found = packed_results(backend, tensors, causal=True, sinks=sinks)
    sink = sinks[:, None].expand(4, 4)
    assert_close(found["lse"][:, 30:34], sink, sink)
    assert (found["out"][30:34] == 0).all()


def layouts(tensors):
    """The same q, k and v, laid out in memory in other ways."""
    q, k, v = tensors[:3]
    yield [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    yield [fenced(x) for x in (q, k, v)]
    kv = torch.cat([k, v], dim=1)
    yield q, kv[:, : k.shape[1]], kv[:, k.shape[1] :]


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_layouts_give_the_same_bits(kernel_backend, dtype, option):
    tensors = packed_qkv((33, 0, 14, 1), (33, 5, 140, 80), 4, 2, 24, 24, dtype=dtype)
    options = packed_option_set(option, tensors[0], batch=4)
    expected = packed_results(kernel_backend, tensors, **options)
    for qkv in layouts(tensors):
        found = packed_results(kernel_backend, (*qkv, *tensors[3:]), **options)
        for name, x in expected.items():
            assert torch.equal(found[name], x), name


@pytest.mark.parametrize("option", PACKED_OPTION_SETS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fences(kernel_backend, dtype, option):
    """NaN beside every input, and a guarded band beside every output: neither may be touched."""
    tensors = packed_qkv((33, 0, 1, 70), (100, 7, 260, 33), 4, 2, 33, 17, dtype=dtype)
    options = packed_option_set(option, tensors[0], batch=4)
    expected = packed_results(kernel_backend, tensors, **options)
    guarded = {name: fenced(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    call = op.check(*(fenced(x) for x in tensors), **guarded)
    module = dispatch.choose("attention_varlen", kernel_backend, call.q.device, call)
    with FencedAllocations() as fences:
        saved = module.attention_varlen_fwd(call)
        alone, _, _ = module.attention_varlen_fwd(call, need_lse=False, for_backward=False)
        ups = fenced(upstream(saved[0])), fenced(upstream(saved[1]))
        gradients = module.attention_varlen_bwd(*ups, *saved, call)
    fences.assert_intact()
    found = dict(zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (*saved[:2], *gradients), strict=True))
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    forward = packed_results(kernel_backend, tensors, gradients=False, **options)
    assert torch.equal(alone, forward["out"])


def test_max_seqlen_may_be_too_large(backend):
    tensors = packed_qkv((5, 9, 0), (12, 3, 7), 4, 2, 16)
    expected = attention_varlen(*tensors, causal=True, backend=backend)
    for bounds in ((9, 12), (10, 100), (2**31, 2**40), (None, 12), (9, None)):
        assert torch.equal(attention_varlen(*tensors, *bounds, causal=True, backend=backend), expected)


def test_returns_lse_only_when_asked(backend):
    tensors = packed_qkv((5, 2), (6, 3), 2, 1, 8)
    out = attention_varlen(*tensors, backend=backend)
    with_lse, lse = attention_varlen(*tensors, return_lse=True, backend=backend)
    assert torch.equal(out, with_lse)
    assert out.shape == (7, 2, 8) and out.is_contiguous()
    assert lse.shape == (2, 7) and lse.dtype is torch.float32


lengths = st.integers(0, 20) | st.integers(0, 20) | st.integers(0, 200)
calls = st.fixed_dictionaries(
    {
        "seqlens": st.lists(st.tuples(lengths, lengths), max_size=6),
        "heads": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dims": st.tuples(*[st.integers(1, 40) | st.sampled_from([64, 80, 128])] * 2),
        "dtype": st.sampled_from(TYPES),
        "options": st.lists(st.sampled_from(PACKED_OPTION_SETS), max_size=3),
        "gradients": st.booleans(),
        "fenced": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


@given(calls)
@settings(max_examples=60)
def test_error_rule(backend, call):
    seqlens = [[pair[i] for pair in call["seqlens"]] for i in (0, 1)]
    kv_heads, group = call["heads"]
    tensors = packed_qkv(
        *seqlens, kv_heads * group, kv_heads, *call["dims"], dtype=call["dtype"], seed=call["seed"]
    )
    options = {}
    for name in call["options"]:
        options |= packed_option_set(name, tensors[0], len(call["seqlens"]))
    if call["fenced"]:
        tensors = [fenced(x) for x in tensors[:3]] + list(tensors[3:])
    assume(refusal(backend, *tensors, op=attention_varlen, **options) is None)
    check_varlen(*tensors, backend=backend, gradients=call["gradients"], **options)
