"""fastattn.integrations.flash_attn against flash-attn's signatures, and against plain PyTorch."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.integrations import flash_attn as fa
from fastattn.integrations.flash_attn import flash_attn_interface
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

B, SQ, SK, H, HK, D = 2, 6, 9, 4, 2, 8
_TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
_PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {_TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {_TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {_TAIL}",
    "flash_attn_varlen_func": f"q, k, v, {_PACKED}, {_TAIL}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {_PACKED}, {_TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {_TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1), "softmax_scale": 0.3},
    "softcap": {"softcap": 1.5, "deterministic": True},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 0.5, H), "causal": True},
    "alibi_batch": {"alibi_slopes": torch.linspace(0.1, 0.5, B * H).view(B, H), "window_size": [4, 0]},
}
options_of_flash = pytest.mark.parametrize("options", OPTIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def starts(*lengths: int) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def scores_of(
    q: Tensor,
    k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """[B, H, Sq, Sk], -inf where nothing is seen."""
    sq, sk = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (softmax_scale or q.shape[3] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(sq)[:, None] + sk - sq - torch.arange(sk)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(q.dtype)
        scores = scores - (slopes if slopes.ndim == 2 else slopes[None])[..., None, None] * distance.abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    hidden |= (distance > left) & (left >= 0)
    hidden |= (distance < -right) & (right >= 0)
    return scores.masked_fill(hidden, -math.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse, written out."""
    scores = scores_of(q, k, **options)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    lse = scores.masked_fill(nothing, 0.0).logsumexp(-1).masked_fill(nothing[..., 0], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", weights, v), lse


def plain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for b in range(len(cu_q) - 1):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[b : b + 1]
        alone = (q[None, cu_q[b] : cu_q[b + 1]], *(x[None, cu_k[b] : cu_k[b + 1]] for x in (k, v)))
        out, lse = plain(*alone, alibi_slopes=slopes, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=-1)


def compare(ours: Callable[..., Any], theirs: Callable[..., Any], *inputs: Tensor) -> None:
    """out, lse and the gradient of every input against plain PyTorch."""
    results = []
    for function, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out, lse = function(*leaves)[:2]
        results.append([out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream(out))])
    for name, *compared in zip(("out", "lse", "d0", "d1", "d2"), *results, strict=False):
        assert_close(*compared, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert all(x.kind is x.POSITIONAL_OR_KEYWORD for x in parameters)
    assert ", ".join(str(x.replace(annotation=x.empty)) for x in parameters) == SIGNATURES[name]
    assert getattr(flash_attn_interface, name) is getattr(fa, name)


class TestDense:
    Q, K, V = normal(B, SQ, H, D, seed=1), normal(B, SK, HK, D, seed=2), normal(B, SK, HK, D, seed=3)

    @options_of_flash
    def test_apart(self, options: str) -> None:
        given = OPTIONS[options]
        compare(
            lambda *x: fa.flash_attn_func(*x, **given, return_attn_probs=True),
            lambda *x: plain(*x, **given), self.Q, self.K, self.V,
        )  # fmt: skip

    @options_of_flash
    def test_packed(self, options: str) -> None:
        given = OPTIONS[options]
        compare(
            lambda q, kv: fa.flash_attn_kvpacked_func(q, kv, **given, return_attn_probs=True),
            lambda q, kv: plain(q, *kv.unbind(2), **given),
            self.Q, torch.stack([self.K, self.V], dim=2),
        )  # fmt: skip
        compare(
            lambda qkv: fa.flash_attn_qkvpacked_func(qkv, **given, return_attn_probs=True),
            lambda qkv: plain(*qkv.unbind(2), **given), normal(B, SQ, 3, H, D),
        )  # fmt: skip

    def test_more_queries_than_keys(self) -> None:
        compare(
            lambda *x: fa.flash_attn_func(*x, causal=True, return_attn_probs=True),
            lambda *x: plain(*x, causal=True), self.Q, self.K[:, :4], self.V[:, :4],
        )  # fmt: skip

    def test_without_probabilities(self) -> None:
        out = fa.flash_attn_func(self.Q, self.K, self.V, 0.0, 0.3, True, (-1, -1), 0.0, None, False)
        also, lse, nothing = fa.flash_attn_func(
            self.Q, self.K, self.V, 0.0, 0.3, True, return_attn_probs=True
        )
        assert torch.equal(out, also)
        assert lse.shape == (B, H, SQ)
        assert nothing.numel() == 0

    @options_of_flash
    def test_dropout_is_seen(self, options: str) -> None:
        """The signs of S_dmask are what was dropped, its sizes the weights."""
        p, given = 0.4, OPTIONS[options]
        torch.manual_seed(3)
        out, _, signed = fa.flash_attn_func(self.Q, self.K, self.V, p, **{**given, "return_attn_probs": True})
        torch.manual_seed(3)
        assert torch.equal(fa.flash_attn_func(self.Q, self.K, self.V, p, **given), out)
        check_dropped(self.Q[:1], self.K[:1], self.V[:1], out[:1], signed[:1], p, **first(given))

    def test_types(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v = (x.to(dtype) for x in (self.Q, self.K, self.V))
            base, truth = plain(q, k, v)[0], plain(q.double(), k.double(), v.double())[0]
            assert_close(fa.flash_attn_func(q, k, v), base, truth)


def first(given: dict[str, Any]) -> dict[str, Any]:
    slopes = given.get("alibi_slopes")
    return given if slopes is None or slopes.ndim == 1 else {**given, "alibi_slopes": slopes[:1]}


def check_dropped(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, signed: Tensor, p: float, **options: Any
) -> None:
    """signed holds the weights; what is left of them gives out."""
    base, truth = ((scores_of(q.to(x), k.to(x), **options)).softmax(-1) for x in (q.dtype, torch.float64))
    assert_close(signed.abs(), base, truth)
    assert 0 < (signed < 0).sum() < (signed != 0).sum()
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    base, truth = (
        torch.einsum("bhij,bjhd->bihd", weights.masked_fill(signed < 0, 0.0) / (1 - p), v.to(weights.dtype))
        for weights in (base, truth)
    )
    assert_close(out, base, truth)


class TestVarlen:
    LENGTHS_Q, LENGTHS_K = (5, 3), (9, 4)
    CU_Q, CU_K = starts(*LENGTHS_Q), starts(*LENGTHS_K)
    PACKED = (CU_Q, CU_K, 5, 9)
    Q, K, V = normal(8, H, D, seed=1), normal(13, HK, D, seed=2), normal(13, HK, D, seed=3)

    @options_of_flash
    def test_apart(self, options: str) -> None:
        given = OPTIONS[options]
        compare(
            lambda *x: fa.flash_attn_varlen_func(*x, *self.PACKED, **given, return_attn_probs=True),
            lambda *x: plain_varlen(*x, self.CU_Q, self.CU_K, **given), self.Q, self.K, self.V,
        )  # fmt: skip

    @options_of_flash
    def test_packed(self, options: str) -> None:
        given = {**OPTIONS[options], "return_attn_probs": True}
        compare(
            lambda q, kv: fa.flash_attn_varlen_kvpacked_func(q, kv, *self.PACKED, **given),
            lambda q, kv: plain_varlen(q, *kv.unbind(1), self.CU_Q, self.CU_K, **OPTIONS[options]),
            self.Q, torch.stack([self.K, self.V], dim=1),
        )  # fmt: skip
        compare(
            lambda qkv: fa.flash_attn_varlen_qkvpacked_func(qkv, self.CU_K, 9, **given),
            lambda qkv: plain_varlen(*qkv.unbind(1), self.CU_K, self.CU_K, **OPTIONS[options]),
            normal(13, 3, H, D),
        )  # fmt: skip

    def test_pages(self) -> None:
        table = torch.tensor([[4, 0, 2], [1, 9, 9]], dtype=torch.int32)  # 9 is never read

        def paged(q: Tensor, *kv: Tensor) -> Any:
            return fa.flash_attn_varlen_func(
                q, *kv, *self.PACKED, causal=True, return_attn_probs=True, block_table=table
            )

        def gathered(q: Tensor, *kv: Tensor) -> Any:
            rows = [torch.cat([x[4], x[0], x[2, :1], x[1]]) for x in kv]
            return plain_varlen(q, *rows, self.CU_Q, self.CU_K, causal=True)

        compare(paged, gathered, self.Q, normal(5, 4, HK, D, seed=2), normal(5, 4, HK, D, seed=3))

    def test_dropout_is_seen(self) -> None:
        p, given = 0.4, OPTIONS["alibi_batch"]
        out, _, signed = fa.flash_attn_varlen_func(
            self.Q, self.K, self.V, *self.PACKED, p, **given, return_attn_probs=True
        )
        assert signed.shape == (B, H, 5, 9)
        for b, (sq, sk) in enumerate(zip(self.LENGTHS_Q, self.LENGTHS_K, strict=True)):
            at_q, at_k = (slice(int(x[b]), int(x[b + 1])) for x in (self.CU_Q, self.CU_K))
            options = {**given, "alibi_slopes": given["alibi_slopes"][b : b + 1]}
            check_dropped(
                self.Q[None, at_q], self.K[None, at_k], self.V[None, at_k], out[None, at_q],
                signed[b : b + 1, :, :sq, :sk], p, **options,
            )  # fmt: skip
            assert signed[b, :, sq:].eq(0).all() and signed[b, :, :, sk:].eq(0).all()


class TestCache:
    Q, K, V = normal(B, 2, H, D, seed=1), normal(B, 2, HK, D, seed=2), normal(B, 2, HK, D, seed=3)
    LENGTHS = torch.tensor([7, 3], dtype=torch.int32)

    def caches(self, rows: int = B) -> list[Tensor]:
        return [normal(rows, 12, HK, D, seed=seed) for seed in (4, 5)]

    def compare(self, ours: Any, q: Tensor, keys: list[Tensor], values: list[Tensor], **options: Any) -> None:
        for b, (out, lse) in enumerate(zip(*ours, strict=True)):
            for name, x, i in (("out", out, 0), ("lse", lse, 1)):
                alone = q[b : b + 1], keys[b][None], values[b][None]
                base, truth = plain(*alone, **options), plain(*(y.double() for y in alone), **options)
                assert_close(x[None], base[i], truth[i], name, torch.float32)

    @pytest.mark.parametrize("options", ["plain", "causal", "window", "softcap", "alibi"])
    def test_appends(self, options: str) -> None:
        given = {x: y for x, y in OPTIONS[options].items() if x != "deterministic"}
        caches = self.caches()
        wanted = [
            [torch.cat([old[b, :n], x[b]]) for b, n in enumerate(self.LENGTHS)]
            for old, x in zip(caches, (self.K, self.V), strict=True)
        ]
        ours = fa.flash_attn_with_kvcache(
            self.Q, *caches, self.K, self.V, cache_seqlens=self.LENGTHS, **given, return_softmax_lse=True
        )
        for b, n in enumerate(self.LENGTHS):
            assert torch.equal(caches[0][b, : n + 2], wanted[0][b])
        self.compare(ours, self.Q, *wanted, **given)

    def test_reads(self) -> None:
        """A row of the cache for each sequence, and what stands left of a sequence is padding."""
        caches = self.caches(4)
        rows, left = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
        ours = fa.flash_attn_with_kvcache(
            self.Q, *caches, cache_seqlens=self.LENGTHS, cache_batch_idx=rows, cache_leftpad=left,
            return_softmax_lse=True,
        )  # fmt: skip
        self.compare(ours, self.Q, *([x[3, 2:7], x[1, :3]] for x in caches))
        out = fa.flash_attn_with_kvcache(self.Q, *self.caches(), cache_seqlens=5, num_splits=2)
        assert torch.equal(out, fa.flash_attn_with_kvcache(self.Q, *(x[:, :5] for x in self.caches())))

    def test_pages(self) -> None:
        pages = [normal(5, 4, HK, D, seed=seed) for seed in (4, 5)]
        table = torch.tensor([[4, 0, 2], [1, 3, 3]], dtype=torch.int32)
        ours = fa.flash_attn_with_kvcache(
            self.Q, *pages, self.K, self.V, cache_seqlens=self.LENGTHS, block_table=table, causal=True,
            return_softmax_lse=True,
        )  # fmt: skip
        wanted = [[torch.cat([x[4], x[0], x[2]])[:9], torch.cat([x[1], x[3]])[:5]] for x in pages]
        for b, n in enumerate(self.LENGTHS):
            assert torch.equal(wanted[0][b][n:], self.K[b])
        self.compare(ours, self.Q, *wanted, causal=True)

    @pytest.mark.parametrize("interleaved", [True, False])
    def test_rotation(self, interleaved: bool) -> None:
        """Neighbours are pairs unless told otherwise; a new key turns by its place."""
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.1, 0.01]))
        caches, r = self.caches(), 6
        given = {} if interleaved else {"rotary_interleaved": False}
        ours = fa.flash_attn_with_kvcache(
            self.Q, *caches, self.K, self.V, angles.cos(), angles.sin(), self.LENGTHS, causal=True,
            return_softmax_lse=True, **given,
        )  # fmt: skip

        def turn(x: Tensor, first: int) -> Tensor:
            at = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
            pairs = torch.complex(x[..., at[0]], x[..., at[1]])
            turned = angles[first : first + len(x)]
            pairs = pairs * torch.polar(torch.ones_like(turned), turned)[:, None]
            x = x.clone()
            x[..., at[0]], x[..., at[1]] = pairs.real, pairs.imag
            return x

        q = torch.stack([turn(self.Q[b], int(n)) for b, n in enumerate(self.LENGTHS)])
        old = self.caches()
        keys = [torch.cat([old[0][b, :n], turn(self.K[b], int(n))]) for b, n in enumerate(self.LENGTHS)]
        values = [torch.cat([old[1][b, :n], self.V[b]]) for b, n in enumerate(self.LENGTHS)]
        self.compare(ours, q, keys, values, causal=True)

    def test_no_gradient(self) -> None:
        """As in flash-attn, also where the inputs want one."""
        out = fa.flash_attn_with_kvcache(self.Q.clone().requires_grad_(), *self.caches(), cache_seqlens=5)
        assert not out.requires_grad


X = normal(5, 4, HK, D)
TABLE = torch.tensor([[0, 1], [2, 5]], dtype=torch.int32)
BAD: dict[str, tuple[str, list[Any], dict[str, Any], type[Exception], str]] = {
    "qkv": ("qkvpacked_func", [normal(B, SQ, 2, H, D)], {}, ValueError, r"qkv must.*\[B, S, 3, H, D\].*2"),
    "kv": ("kvpacked_func", [normal(B, SQ, H, D), normal(B, SQ, H, D)], {}, ValueError, "kv must have shape"),
    "rank": (
        "varlen_qkvpacked_func", [normal(B, SQ, 3, H, D), starts(1), 1], {}, ValueError, r"\[T, 3, H, D\]"
    ),
    "scale": ("func", [X, X, X], {"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite"),
    "no_pages": (
        "varlen_func", [X[0], X[0], X[0], starts(2, 2), starts(2, 2), 2, 2], {"block_table": TABLE},
        ValueError, "k and v must have 4 dimensions",
    ),
    "pages": (
        "varlen_func", [X[0], X, X, starts(2, 2), starts(8, 8), 2, 8], {"block_table": TABLE},
        ValueError, "block_table must hold pages in 0 ... 4, got 0 to 5",
    ),
    "few_pages": (
        "varlen_func", [X[0], X, X, starts(2, 2), starts(8, 9), 2, 9], {"block_table": TABLE},
        ValueError, "pages of 4 keys for 9",
    ),
    "full": (
        "with_kvcache", [X[:2], X[:2], X[:2], X[:2], X[:2]], {"cache_seqlens": 1}, ValueError, "cache_seqlens"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls(case: str) -> None:
    name, args, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(fa, f"flash_attn_{name}")(*args, **options)
