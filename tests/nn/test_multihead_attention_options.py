"""MultiheadAttention beyond torch's: grouped heads, rotation, windows, nested tensors, caches, errors."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import attention
from fastattn.nn import KVCache, MultiheadAttention
from fastattn.testing.compare import assert_close

E, H, B, S = 32, 4, 3, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "grouped": {"num_kv_heads": 2},
    "one_kv_head_no_bias": {"num_kv_heads": 1, "bias": False},
    "grouped_kdim": {"num_kv_heads": 2, "kdim": E, "vdim": 24},
    "rotary": {"rotary_dim": 8},
    "rotary_part": {"rotary_dim": 4, "rotary_base": 100.0},
    "rotary_interleaved": {"rotary_dim": 6, "rotary_interleaved": True},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "softcap": {"softcap": 0.5},
    "zero": {"add_zero_attn": True, "window_size": (3, -1)},
    "all": {
        "num_kv_heads": 2, "rotary_dim": 8, "causal": True, "window_size": (5, -1), "softcap": 2.0,
        "add_zero_attn": True,
    },
}  # fmt: skip
options_of_ours = pytest.mark.parametrize("options", OPTIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(dtype: torch.dtype = torch.float32, **options: Any) -> MultiheadAttention:
    module = MultiheadAttention(E, H, batch_first=True, **options)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) / math.sqrt(parameter.shape[-1]))
    return module.to(dtype)


def inputs(options: dict[str, Any], seqlen_q: int = S, seqlen_k: int = S) -> list[Tensor]:
    query = normal(B, seqlen_q, E, seed=11)
    if "vdim" in options:
        return [query, normal(B, seqlen_k, E, seed=12), normal(B, seqlen_k, options["vdim"], seed=13)]
    return [query] * 3 if seqlen_q == seqlen_k else [query, *[normal(B, seqlen_k, E, seed=12)] * 2]


def plain(m: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """The definition: products, rotation by complex numbers, the reference of `attention`."""
    rows = m.num_kv_heads * m.head_dim
    weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    if m.in_proj_weight is not None:
        weights = m.in_proj_weight.split([E, rows, rows])
    biases = [None] * 3 if m.in_proj_bias is None else m.in_proj_bias.split([E, rows, rows])
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, m.head_dim))
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    if m.rotary_dim:
        longest = max(q.shape[1], k.shape[1])
        q, k = (turn(m, x, torch.arange(longest - x.shape[1], longest)) for x in (q, k))
    out = attention(
        q,
        k,
        v,
        **{"causal": m.causal, "window_size": m.window_size, "softcap": m.softcap, **options},
        sinks=torch.zeros(H, dtype=q.dtype) if m.add_zero_attn else None,
        backend="reference",
    )
    return m.out_proj(out.flatten(2))


def turn(m: MultiheadAttention, x: Tensor, positions: Tensor) -> Tensor:
    r, half = m.rotary_dim, m.rotary_dim // 2
    first = torch.arange(0, r, 2) if m.rotary_interleaved else torch.arange(half)
    second = first + (1 if m.rotary_interleaved else half)
    pairs = torch.complex(x[..., first].double(), x[..., second].double())
    # The angles are float32, as tables are; the rest is as exact as x.
    frequencies = m.rotary_base ** (torch.arange(0, r, 2, dtype=torch.float32) / -r)
    angles = torch.outer(positions.float(), frequencies).double()
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    out = x.clone()
    out[..., first], out[..., second] = pairs.real.to(x.dtype), pairs.imag.to(x.dtype)
    return out


@torch.no_grad()
def compare(
    out: Tensor, module: MultiheadAttention, given: dict[str, Any], x: list[Tensor], **call: Any
) -> None:
    base, truth = (
        plain(module, *x, **call),
        plain(build(torch.float64, **given), *(y.double() for y in x), **call),
    )
    assert_close(out.detach(), base, truth, dtype=out.dtype)


@pytest.mark.parametrize("need_weights", [False, True], ids=["fused", "weights"])
class TestOptions:
    @options_of_ours
    @pytest.mark.parametrize("seqlens", [(S, S), (5, S), (S, 5)])
    def test_forward(self, options: str, seqlens: tuple[int, int], need_weights: bool) -> None:
        given = OPTIONS[options]
        module, x = build(**given), inputs(given, *seqlens)
        out, weights = module(*x, need_weights=need_weights)
        assert (weights is not None) is need_weights
        compare(out, module, given, x)

    @options_of_ours
    def test_gradients(self, options: str, need_weights: bool) -> None:
        given, found = OPTIONS[options], []
        for module, run in (
            (build(**given), lambda m, *x: m(*x, need_weights=need_weights)[0]),
            (build(**given), plain),
            (build(torch.float64, **given), plain),
        ):
            dtype, given_x = module.out_proj.weight.dtype, inputs(given)
            leaves = {id(y): y.to(dtype, copy=True).requires_grad_() for y in given_x}
            x = [leaves[id(y)] for y in given_x]
            wanted = [*leaves.values(), *module.parameters()]
            out = run(module, *x)
            found.append(torch.autograd.grad(out, wanted, normal(*out.shape, seed=20).to(out.dtype)))
        for ours, base, truth in zip(*found, strict=True):
            assert_close(ours, base, truth, terms=B * S)

    @pytest.mark.parametrize("seqlens", [(S, S), (5, S), (S, 5)])
    @pytest.mark.parametrize(
        "given",
        [{}, {"window_size": (3, -1)}, {"window_size": (9, 2)}, {"causal": True}, {"add_bias_kv": True}],
        ids=str,
    )
    def test_causality_from_the_start_beside_a_window(
        self, given: dict[str, Any], seqlens: tuple[int, int], need_weights: bool
    ) -> None:
        module, x = build(**given), inputs(given, *seqlens)
        hidden = torch.ones(seqlens, dtype=torch.bool).triu(1)
        out, _ = module(*x, need_weights=need_weights, is_causal=True)
        by_mask, _ = module(*x, need_weights=need_weights, attn_mask=hidden)
        if "add_bias_kv" in given:
            assert torch.equal(out, by_mask)
        else:
            compare(out, module, given, x, mask=~hidden)
            compare(by_mask, module, given, x, mask=~hidden)


def nest(x: Tensor, lengths: list[int], layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([y[:n] for y, n in zip(x, lengths, strict=True)], layout=layout)


@pytest.mark.usefixtures("default_backend")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
class TestNested:
    LENGTHS = (S, 4, 7)

    @options_of_ours
    def test_forward(self, options: str, layout: torch.layout) -> None:
        """Every sequence as alone."""
        given = {x: y for x, y in OPTIONS[options].items() if x not in ("kdim", "vdim")}
        module, x = build(**given), inputs({})[0]
        with torch.no_grad():
            nested = nest(x, list(self.LENGTHS), layout)
            out, _ = module(nested, nested, nested, need_weights=False)
        assert out.layout is layout
        for b, (length, ours) in enumerate(zip(self.LENGTHS, out.unbind(), strict=True)):
            compare(ours[None], module, given, [x[b : b + 1, :length]] * 3)

    def test_keys_of_other_lengths(self, layout: torch.layout) -> None:
        given = {"rotary_dim": 8, "causal": True}
        module, x, y = build(**given), inputs({})[0], normal(B, S, E, seed=9)
        with torch.no_grad():
            query, key = nest(x, [5, 6, 7], layout), nest(y, list(self.LENGTHS), layout)
            out, _ = module(query, key, key, need_weights=False)
        for b, ours in enumerate(out.unbind()):
            alone = [x[b : b + 1, : b + 5], *[y[b : b + 1, : self.LENGTHS[b]]] * 2]
            compare(ours[None], module, given, alone)

    def test_refusals(self, layout: torch.layout) -> None:
        module, x = build(), nest(inputs({})[0], list(self.LENGTHS), layout)
        with pytest.raises(ValueError, match="need_weights must be False with nested"):
            module(x, x, x)
        with pytest.raises(ValueError, match="key_padding_mask must be None with nested"):
            module(x, x, x, need_weights=False, key_padding_mask=torch.zeros(B, S, dtype=torch.bool))
        other = nest(inputs({})[0], list(self.LENGTHS), layout)
        with pytest.raises(ValueError, match="query is not key"):
            module(x, other, other, need_weights=False, is_causal=True)


@pytest.mark.usefixtures("default_backend")
class TestCache:
    @pytest.fixture(autouse=True)
    def _no_gradients(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    @options_of_ours
    @pytest.mark.parametrize("page_size", [None, 5])
    def test_generation(self, options: str, page_size: int | None) -> None:
        """Prompts of different lengths, then token by token: the same as all at once, causally."""
        given = {**OPTIONS[options], "causal": True}
        module, x = build(**given), inputs(given)
        cache, prompts = module.new_cache(B, S, page_size=page_size), torch.tensor([4, 7, 1])
        outs = [[] for _ in range(B)]

        def step(rows: Tensor) -> None:
            """One chunk for each sequence, from where it stands."""
            at = cache.lengths[:, None] + rows
            chunk = {id(y): y.gather(1, at[:, :, None].expand(-1, -1, y.shape[2]).long()) for y in x}
            out, weights = module(*(chunk[id(y)] for y in x), need_weights=False, cache=cache)
            assert weights is None
            for b in range(B):
                outs[b].append(out[b])

        step(torch.arange(7))
        for b in range(B):
            outs[b][0] = outs[b][0][: prompts[b]]
        cache.truncate(prompts)
        for _ in range(S - 7):
            step(torch.arange(1))
        for b in range(B):
            compare(
                torch.cat(outs[b])[None], module, given, [y[b : b + 1, : len(torch.cat(outs[b]))] for y in x]
            )

    def test_chunk_that_is_not_causal_is_turned_token_by_token(self) -> None:
        given = {"rotary_dim": 8}
        module, x = build(**given), inputs(given)
        cache = module.new_cache(B, S)
        out, _ = module(*x, need_weights=False, cache=cache)
        compare(out, module, given, x)

    def test_reading_alone(self) -> None:
        """As a decoder looks at what an encoder said."""
        module, x = build(num_kv_heads=2), inputs({}, 4, S)
        cache = module.new_cache(B, S)
        module(x[0][:, :1], *x[1:], need_weights=False, cache=cache)
        for _ in range(2):
            out, _ = module(x[0], None, None, need_weights=False, cache=cache)
            compare(out, module, {"num_kv_heads": 2}, x)
        assert cache.lengths.tolist() == [S] * B

    @pytest.mark.parametrize("batch_first", [False, True])
    def test_layouts(self, batch_first: bool) -> None:
        module, x = build(causal=True), inputs({})[0]
        expected, _ = module(x, x, x, need_weights=False, cache=module.new_cache(B, S))
        module.batch_first = batch_first
        x = x if batch_first else x.transpose(0, 1)
        out, _ = module(x, x, x, need_weights=False, cache=module.new_cache(B, S))
        assert torch.equal(out if batch_first else out.transpose(0, 1), expected)

    def test_new_cache_follows_the_parameters(self) -> None:
        module = build(torch.bfloat16, num_kv_heads=2)
        assert module.new_cache(B, S).k.dtype is torch.bfloat16
        assert module.new_cache(B, S, dtype=torch.int8, page_size=4).k.shape == (9, 4, 2, 8)


X = normal(B, S, E)
CACHE = KVCache(B, S, H, E // H)
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "query_is_a_list": ({"query": [1.0]}, TypeError, "query must be a tensor, got list"),
    "rank": ({"query": X[None]}, ValueError, "query must have 3 dim.*got 4"),
    "ranks_differ": ({"key": X[0]}, ValueError, "key must have 3 dim.*got 2 beside query's 3"),
    "features": ({"value": X[..., 1:]}, ValueError, "value must have 32 features, got 31"),
    "lengths": ({"value": X[:, 1:]}, ValueError, "key and value must share.*12.*11"),
    "batch": ({"query": X[1:]}, ValueError, "share the batch size.*2, 12.*3, 12.*batch_first=True"),
    "key_is_none": ({"key": None}, ValueError, "None only with a cache"),
    "mask_type": ({"attn_mask": torch.zeros(S, S).int()}, TypeError, "attn_mask must be bool.*int32"),
    "mask_shape": (
        {"attn_mask": torch.zeros(S, S + 1)}, ValueError, r"attn_mask must.*\[12, 12\] or \[12, 12, 12\].*13"
    ),
    "padding_shape": (
        {"key_padding_mask": torch.zeros(S)}, ValueError, r"key_padding_mask.*\[3, 12\].*\[12\]"
    ),
    "weights_of_a_cache": ({"cache": CACHE, "need_weights": True}, ValueError, "need_weights must be False"),
    "mask_of_a_cache": (
        {"cache": CACHE, "attn_mask": torch.zeros(S, S)}, ValueError, "attn_mask must be None with a cache"
    ),
    "half_of_a_cache": ({"cache": CACHE, "key": None}, ValueError, "key and value must be given together"),
    "gradient_of_a_cache": ({"cache": CACHE}, NotImplementedError, "no gradient"),
}  # fmt: skip
BAD_MODULES: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 5}, "embed_dim must be a positive multiple of num_heads.*32.*5"),
    "no_heads": ({"num_heads": 0}, "num_heads=0"),
    "kv_heads": ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
    "rotary_odd": ({"rotary_dim": 3}, "rotary_dim must be even and in 0 ... head_dim = 8, got 3"),
    "rotary_large": ({"rotary_dim": 10}, "rotary_dim.*got 10"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "window": ({"window_size": (-2, 0)}, "window_size must be two integers"),
    "softcap": ({"softcap": -1.0}, "softcap must be finite"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    given, error, message = BAD_CALLS[case]
    call = {"query": X, "key": X, "value": X, "need_weights": False, **given}
    with pytest.raises(error, match=message):
        build()(**call)


@pytest.mark.parametrize("case", BAD_MODULES)
def test_bad_modules(case: str) -> None:
    given, message = BAD_MODULES[case]
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **given})


def test_rotation_needs_the_keys_place() -> None:
    module = build(rotary_dim=8)
    with pytest.raises(ValueError, match="key must be given where rotary_dim"):
        module(X, None, None, need_weights=False, cache=CACHE)


def test_a_cache_drops_nothing() -> None:
    module = build(dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout must be 0 with a cache, got 0.1; eval\(\)"):
        module(X, X, X, need_weights=False, cache=CACHE)


def test_a_cache_needs_no_extra_key() -> None:
    module = build(add_bias_kv=True)
    with pytest.raises(ValueError, match="add_bias_kv must be False with a cache"):
        module(X, X, X, need_weights=False, cache=CACHE)


def test_nothing_but_torch_is_torchs() -> None:
    assert set(dict(build().named_parameters())) == set(dict(nn.MultiheadAttention(E, H).named_parameters()))
