"""Attention over a cache: how it lies in memory, and that nothing but the call decides the bits."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastattn import attention_decode, dispatch
from fastattn.ops import attention_decode as op
from fastattn.testing.check import refusal
from fastattn.testing.check_decode import (
    DECODE_OPTION_SETS,
    check_decode,
    decode_inputs,
    decode_option_set,
    same_bytes,
    twins,
)
from fastattn.testing.fence import FencedAllocations, fenced

TYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_TYPES = (*TYPES, torch.int8)
layouts = pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])


@pytest.fixture(autouse=True)
def _backend_has_the_op(skip_if_refused):
    skip_if_refused(attention_decode, **decode_inputs([1], 1, 1, 1, 1))


def kv_in_one(call):
    """k and v side by side in one tensor, as many engines keep them."""
    both = torch.cat([call["k_cache"], call["v_cache"]], dim=3)
    split = call["k_cache"].shape[3]
    return call | {"k_cache": both[..., :split], "v_cache": both[..., split:]}


def heads_first(call):
    """[B, Hk, S, D] in memory, the scales too."""
    names = ("q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale")
    return call | {
        name: call[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names if name in call
    }


def all_fenced(call):
    tensors = {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}
    return call | {name: fenced(x) for name, x in tensors.items()}


LAYOUTS = {"plain": dict, "kv_in_one": kv_in_one, "heads_first": heads_first, "fenced": all_fenced}


@layouts
@pytest.mark.parametrize("layout", ["kv_in_one", "heads_first", "fenced"])
@pytest.mark.parametrize("cache_dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_layouts_give_the_same_bits(kernel_backend, dtype, cache_dtype, layout, page_size):
    call = decode_inputs([70, 0, 300, 5], 4, 2, 2, 33, 33, new=2, page_size=page_size, dtype=dtype,
                         cache_dtype=cache_dtype, rotary_dim=8)  # fmt: skip
    moved = twins(LAYOUTS[layout](call))
    assert_same(run(kernel_backend, moved), run(kernel_backend, twins(call)))


def run(backend, call, **options):
    """out, lse and the cache afterwards."""
    out, lse = attention_decode(**call, **options, return_lse=True, backend=backend)
    written = {name: x for name, x in call.items() if name.endswith(("_cache", "_scale"))}
    return {"out": out, "lse": lse, **written}


def assert_same(ours, expected):
    for name, x in ours.items():
        assert same_bytes(x.contiguous().clone(), expected[name].contiguous().clone()), name


@layouts
@pytest.mark.parametrize("cache_dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_threads_give_the_same_bits(kernel_backend, dtype, cache_dtype, page_size):
    before = torch.get_num_threads()
    try:
        for seqlens, seqlen_q in (([1500, 0, 33], 1), ([700], 2), ([40, 300], 30)):
            call = decode_inputs(seqlens, 4, 2, seqlen_q, 64, new=seqlen_q, page_size=page_size, dtype=dtype,
                                 cache_dtype=cache_dtype, rotary_dim=32)  # fmt: skip
            runs = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                runs.append(run(kernel_backend, twins(call), causal=True))
            assert_same(*runs)
    finally:
        torch.set_num_threads(before)


@layouts
@pytest.mark.parametrize("option", DECODE_OPTION_SETS)
@pytest.mark.parametrize("seqlen_q", [1, 3, 20])
def test_a_sequence_gives_the_same_bits_alone(kernel_backend, seqlen_q, option, page_size):
    call = decode_inputs([1500, 0, 33, 700], 4, 2, seqlen_q, 64, new=seqlen_q, page_size=page_size,
                         dtype=torch.bfloat16, rotary_dim=32)  # fmt: skip
    call |= decode_option_set(option, call["q"])
    together = run(kernel_backend, twins(call))
    for b in range(4):
        mine = {"q", "k", "v", "cache_seqlens", "block_table"} | (
            set() if page_size else {"k_cache", "v_cache"}
        )
        if "alibi_slopes" in call and call["alibi_slopes"].ndim == 2:
            mine.add("alibi_slopes")
        alone = {name: x[b : b + 1] if name in mine else x for name, x in call.items()}
        found = run(kernel_backend, twins(alone))
        assert_same({name: found[name] for name in ("out", "lse")},
                    {name: together[name][b : b + 1] for name in ("out", "lse")})  # fmt: skip


@layouts
@pytest.mark.parametrize("cache_dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fences(kernel_backend, dtype, cache_dtype, page_size):
    """NaN beside every input, and a guarded band beside every output: neither may be touched."""
    for seqlen_q in (1, 20):
        call = decode_inputs([70, 0, 300], 4, 2, seqlen_q, 33, 17, new=seqlen_q, page_size=page_size,
                             dtype=dtype, cache_dtype=cache_dtype, rotary_dim=8)  # fmt: skip
        expected = run(kernel_backend, twins(call), causal=True)
        guarded = twins(all_fenced(call))
        checked = op.check(**guarded, causal=True)
        module = dispatch.choose("attention_decode", kernel_backend, checked.q.device, checked)
        with FencedAllocations() as fences:
            out, lse = module.attention_decode(checked)
        fences.assert_intact()
        assert_same({"out": out, "lse": lse}, expected)
        check_decode(**all_fenced(call), causal=True, backend=kernel_backend)


calls = st.fixed_dictionaries(
    {
        "seqlens": st.lists(st.integers(0, 30) | st.integers(0, 300), max_size=5),
        "heads": st.tuples(st.integers(1, 3), st.integers(1, 4)),
        "seqlen_q": st.integers(1, 3) | st.integers(0, 40),
        "dims": st.tuples(*[st.integers(1, 40) | st.sampled_from([64, 80, 128])] * 2),
        "new": st.none() | st.integers(0, 3) | st.integers(0, 40),
        "page_size": st.none() | st.integers(1, 40) | st.sampled_from([64, 256]),
        "dtype": st.sampled_from(TYPES),
        "cache_dtype": st.none() | st.sampled_from(CACHE_TYPES),
        "rotary": st.none() | st.integers(1, 20),
        "interleaved": st.booleans(),
        "select": st.booleans(),
        "leftpad": st.booleans(),
        "num_splits": st.just(0) | st.integers(0, 9),
        "options": st.lists(st.sampled_from(DECODE_OPTION_SETS), max_size=3),
        "layout": st.sampled_from(sorted(LAYOUTS)),
        "seed": st.integers(0, 2**16),
    }
)


@given(calls)
@settings(max_examples=100)
def test_error_rule(backend, call):
    kv_heads, group = call["heads"]
    half = min(call["rotary"] or 0, call["dims"][0] // 2)
    given = decode_inputs(
        call["seqlens"], kv_heads * group, kv_heads, call["seqlen_q"], *call["dims"], rotary_dim=2 * half,
        **{name: call[name] for name in ("new", "page_size", "dtype", "cache_dtype", "select", "seed")},
    )  # fmt: skip
    for name in call["options"]:
        given |= decode_option_set(name, given["q"])
    if call["leftpad"] and call["page_size"] is None:
        generator = torch.Generator().manual_seed(call["seed"])
        leftpad = torch.rand(len(call["seqlens"]), generator=generator) * (given["cache_seqlens"] + 3)
        given["cache_leftpad"] = leftpad.int()
    given = LAYOUTS[call["layout"]](given)
    given |= {"interleaved": call["interleaved"], "num_splits": call["num_splits"]}
    assume(refusal(backend, op=attention_decode, **given) is None)
    check_decode(**given, backend=backend)
