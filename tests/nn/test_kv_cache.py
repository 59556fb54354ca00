"""KVCache: what goes in comes out, in all layouts and types, and a full one says so."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import attention, dispatch
from fastattn.nn import KVCache
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

B, S, H, HK, D, DV = 3, 20, 4, 2, 8, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
layouts = pytest.mark.parametrize("page_size", [None, 1, 6], ids=["dense", "pages of 1", "pages of 6"])
types = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def new(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    return normal(B, n, HK, D, seed=seed), normal(B, n, HK, DV, seed=seed + 100)


def cache_of(dtype: torch.dtype = torch.float32, **options: Any) -> KVCache:
    return KVCache(B, S, HK, D, head_dim_v=DV, dtype=dtype, **options)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the cache keeps it: rounded, or as int8 times the largest of a token and head over 127."""
    if dtype is not torch.int8:
        return x.to(dtype)
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


@types
@layouts
def test_reads_what_was_written(dtype: torch.dtype, page_size: int | None) -> None:
    cache, k, v = cache_of(dtype, page_size=page_size), *new(S)
    for chunk in (slice(0, 5), slice(5, 6), slice(6, S)):
        cache.append(k[:, chunk], v[:, chunk])
    assert cache.lengths.tolist() == [S] * B
    for b in range(B):
        for ours, x in zip(cache.read(b), (k[b], v[b]), strict=True):
            expected = stored(x, dtype)
            assert ours.dtype is expected.dtype
            assert torch.equal(ours, expected)


@types
@layouts
def test_attends_to_what_it_reads(dtype: torch.dtype, page_size: int | None) -> None:
    cache, k, v = cache_of(dtype, page_size=page_size), *new(9)
    cache.append(k, v)
    cache.truncate(torch.tensor([9, 2, 0]))
    q, (k, v) = normal(B, 3, H, D, seed=7), new(3, seed=8)
    out = cache.attend(q, k, v, causal=True)
    assert cache.lengths.tolist() == [12, 5, 3]
    again = cache.attend(q, causal=True)
    assert torch.equal(out, again)
    for b in range(B):
        alone = [x[None].float() for x in (q[b], *cache.read(b))]
        base, truth = (
            attention(*(x.to(wide) for x in alone), causal=True, backend="reference")
            for wide in (torch.float32, torch.float64)
        )
        assert_close(out[b : b + 1], base, truth)


def test_memory() -> None:
    """A head's keys follow one another."""
    cache = cache_of(torch.int8)
    for x in (cache.k, cache.v, cache.k_scale, cache.v_scale):
        assert x is not None and x.shape[:3] == (B, S, HK) and x.transpose(1, 2).is_contiguous()
    paged = cache_of(page_size=6, num_pages=5)
    assert paged.k.shape == (5, 6, HK, D) and paged.k.transpose(1, 2).is_contiguous()
    assert paged.block_table is not None and paged.block_table.shape == (B, 4)
    assert cache_of().k_scale is None


@layouts
def test_forgets_and_reuses(page_size: int | None) -> None:
    cache, k, v = cache_of(page_size=page_size), *new(S)
    cache.append(k, v)
    cache.truncate(torch.tensor([S, 7, 0]))
    cache.truncate(torch.tensor([6, 7, 0], dtype=torch.int32))
    cache.append(k[:, :4], v[:, :4])
    assert cache.lengths.tolist() == [10, 11, 4]
    for b, length in enumerate((6, 7, 0)):
        assert torch.equal(cache.read(b)[0], torch.cat([k[b, :length], k[b, :4]]))
    cache.reset()
    assert cache.lengths.tolist() == [0] * B
    cache.append(k, v)
    assert torch.equal(cache.read(1)[1], v[1])


@types
@layouts
def test_reorders(dtype: torch.dtype, page_size: int | None) -> None:
    """Copies: what a sequence gets later, its twin does not see."""
    cache, k, v = cache_of(dtype, page_size=page_size), *new(S)
    cache.append(k[:, :8], v[:, :8])
    cache.truncate(torch.tensor([8, 3, 5]))
    before = [cache.read(b) for b in range(B)]
    cache.reorder(torch.tensor([2, 0, 2]))
    cache.append(k[:, 8:9], v[:, 8:9])
    for b, source in enumerate((2, 0, 2)):
        for ours, old, x in zip(cache.read(b), before[source], (k[b, 8:9], v[b, 8:9]), strict=True):
            assert torch.equal(ours, torch.cat([old, stored(x, dtype)]))


@layouts
def test_full(page_size: int | None) -> None:
    """Says so, and has written nothing."""
    cache, k, v = cache_of(page_size=page_size), *new(S)
    cache.append(k[:, 2:], v[:, 2:])
    cache.truncate(torch.tensor([1, 18, 2]))
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="full: max_length is 20, sequence 1 has 18 tokens and was to get 3"):
        cache.append(k[:, :3], v[:, :3])
    assert cache.lengths.tolist() == [1, 18, 2]
    for b in range(B):
        assert torch.equal(cache.read(b)[0], before.read(b)[0])
    cache.append(k[:, :2], v[:, :2])
    assert cache.lengths.tolist() == [3, S, 4]


def test_pool_of_pages() -> None:
    cache, k, v = cache_of(page_size=4, num_pages=7), *new(S)
    cache.append(k[:, :5], v[:, :5])
    assert "1 of 7 pages free" in repr(cache)
    with pytest.raises(ValueError, match=r"full: 1 of 7 pages are free, and 4 more tokens.* need 3"):
        cache.append(k[:, :4], v[:, :4])
    cache.append(k[:, 5:8], v[:, 5:8])
    assert torch.equal(cache.read(2)[0], k[2, :8])
    cache.truncate(torch.tensor([8, 4, 0]))
    assert "4 of 7 pages free" in repr(cache)
    cache.append(k[:, :4], v[:, :4])
    for b, length in enumerate((8, 4, 0)):
        assert torch.equal(cache.read(b)[0], torch.cat([k[b, :length], k[b, :4]]))
    with pytest.raises(ValueError, match=r"pool has 7 pages, and sequences \[0, 0, 1\] need 8"):
        cache.reorder(torch.tensor([0, 0, 1]))
    assert torch.equal(cache.read(2)[0], k[2, :4])


def test_failed_call_leaves_the_lengths() -> None:
    cache, (k, v) = cache_of(page_size=4), new(2)
    with pytest.raises(ValueError, match="H must be a multiple"):
        cache.attend(normal(B, 1, 3, D), k, v)
    assert cache.lengths.tolist() == [0] * B
    cache.append(k, v)
    assert torch.equal(cache.read(0)[0], k[0])


def test_copies_are_apart() -> None:
    cache, (k, v) = cache_of(page_size=4), new(3)
    cache.append(k, v)
    other = copy.deepcopy(cache)
    other.append(k, v)
    assert cache.lengths.tolist() == [3] * B
    assert torch.equal(cache.read(0)[0], k[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles() -> None:
    """Steps of one token, dense: one graph, compiled once."""
    if dispatch.DEFAULT == dispatch.REFERENCE:
        pytest.skip("the reference is plain PyTorch, and reads the lengths")
    torch.compiler.reset()
    cache, twin, (k, v), q = cache_of(), cache_of(), new(4), normal(B, 4, H, D)
    compiled = torch.compile(cache.attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for i in range(4):
            one = [x[:, i : i + 1] for x in (q, k, v)]
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                assert torch.equal(compiled(*one, causal=True), twin.attend(*one, causal=True))
    assert cache.lengths.tolist() == [4] * B


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "batch": ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "length": ({"max_length": -1}, ValueError, "max_length must be at least 1, got -1"),
    "heads": ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1"),
    "dim": ({"head_dim": 0}, ValueError, "head_dim must be at least 1"),
    "page": ({"page_size": 0}, ValueError, "page_size must be at least 1"),
    "pages": ({"page_size": 2, "num_pages": 0}, ValueError, "num_pages must be at least 1"),
    "pages_of_what": ({"num_pages": 3}, ValueError, "num_pages must be None without a page_size, got 3"),
    "type": ({"dtype": torch.int32}, TypeError, "dtype must be float32, .*int8, got torch.int32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_caches(case: str) -> None:
    given, error, message = BAD[case]
    with pytest.raises(error, match=message):
        KVCache(**{"batch_size": B, "max_length": S, "num_kv_heads": HK, "head_dim": D, **given})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (4, r"lengths must be in 0 ... \[3, 3, 3\], which is there, got 4"),
        (-1, "got -1"),
        (torch.tensor([0, 1]), r"shape \[B\] = \[3\], got torch.int64 \[2\]"),
        (torch.zeros(B), "float32"),
    ],
)
def test_bad_lengths(lengths: Any, message: str) -> None:
    cache = cache_of()
    cache.append(*new(3))
    with pytest.raises(ValueError, match=message):
        cache.truncate(lengths)


@pytest.mark.parametrize(
    "sequences", [torch.tensor([0, 1]), torch.tensor([0, 1, 3]), torch.tensor([0, -1, 2])]
)
def test_bad_orders(sequences: Tensor) -> None:
    with pytest.raises(ValueError, match=r"sequences must hold 3 numbers in 0 ... 2, got \[0, "):
        cache_of().reorder(sequences)
