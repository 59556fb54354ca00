"""Dropout: Philox as published, counted by position, the same on every backend."""

import math

import pytest
import torch

from fastattn import attention
from fastattn.dropout import draw_seed, keep_mask, threshold
from fastattn.testing.check import option_set, refusal
from fastattn.testing.inputs import qkv

SEEDS = (0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1)


def philox(counter, key):
    """Philox4x32-10, as Salmon et al. 2011 write it."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_this_philox_is_the_published_one(counter, key, words):
    """The known answers of Random123."""
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_keep_mask_is_philox_of_the_position(seed):
    planes, rows, columns, p = 3, 5, 11, 0.4
    keep = keep_mask(torch.tensor(seed), p, planes, rows, columns)
    assert keep.shape == (planes, rows, columns)
    key = seed % 2**32, seed >> 32
    for plane, row, column in torch.cartesian_prod(*map(torch.arange, keep.shape)).tolist():
        word = philox((column // 4, row, plane, 0), key)[column % 4]
        assert bool(keep[plane, row, column]) == (word >= threshold(p))


def test_a_position_does_not_depend_on_the_shape():
    seed = torch.tensor(9)
    large = keep_mask(seed, 0.5, 4, 33, 70)
    assert torch.equal(keep_mask(seed, 0.5, 2, 7, 13), large[:2, :7, :13])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_share_of_kept_positions(p):
    keep = keep_mask(draw_seed(), p, 4, 250, 1000)
    six_sigma = 6 * math.sqrt(p * (1 - p) / keep.numel())
    assert abs(float(keep.double().mean()) - (1 - p)) < six_sigma


def test_threshold():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert threshold(math.nextafter(1.0, 0.0)) == 2**32 - 1


def test_draw_seed_follows_the_generator():
    torch.manual_seed(4)
    first = int(draw_seed()), int(draw_seed())
    torch.manual_seed(4)
    assert (int(draw_seed()), int(draw_seed())) == first
    assert first[0] != first[1]


def kept(backend, shape, p, seed, dtype=torch.float32, **options):
    """Which weights a backend keeps, read off its output: equal weights, and v = identity."""
    batch, nheads, nheads_k, seqlen_q, seqlen_k = shape
    q, k, _ = qkv(*shape, 8, dtype=dtype)
    v = torch.eye(seqlen_k, dtype=dtype).expand(batch, nheads_k, -1, -1).transpose(1, 2)
    options = {"softmax_scale": 0.0, "dropout_p": p, "seed": seed, **options}
    if reason := refusal(backend, q, k, v, **options):
        pytest.skip(reason)
    out = attention(q, k, v, **options, backend=backend)
    return (out != 0).transpose(1, 2).reshape(batch * nheads, seqlen_q, seqlen_k)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_backends_keep_the_same_positions(backend, dtype, p, seed):
    for shape in ((2, 4, 2, 45, 131), (1, 3, 1, 1, 512), (1, 1, 1, 200, 37)):
        batch, nheads, _, *seqlens = shape
        expected = keep_mask(torch.tensor(seed), p, batch * nheads, *seqlens)
        assert torch.equal(kept(backend, shape, p, seed, dtype), expected)


def test_dropout_counts_keys_that_are_not_seen(backend):
    """The mask of a position stands, whatever window or mask is laid over it."""
    shape = (1, 2, 2, 100, 150)
    everywhere = kept(backend, shape, 0.5, 3)
    seen = torch.ones(100, 150).tril(50).bool()
    assert torch.equal(kept(backend, shape, 0.5, 3, causal=True), everywhere & seen)
    assert torch.equal(kept(backend, shape, 0.5, 3, mask=seen), everywhere & seen)


def test_lse_is_that_of_all_weights(backend):
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    if reason := refusal(backend, q, k, v, dropout_p=0.5, seed=1):
        pytest.skip(reason)
    _, lse = attention(q, k, v, return_lse=True, backend=backend)
    _, with_dropout = attention(q, k, v, dropout_p=0.5, seed=1, return_lse=True, backend=backend)
    assert torch.equal(lse, with_dropout)


def test_seeds(backend):
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    if reason := refusal(backend, q, k, v, dropout_p=0.5, seed=1):
        pytest.skip(reason)

    def run(**options):
        return attention(q, k, v, **options, backend=backend)

    assert torch.equal(run(dropout_p=0.5, seed=7), run(dropout_p=0.5, seed=torch.tensor(7)))
    assert not torch.equal(run(dropout_p=0.5, seed=7), run(dropout_p=0.5, seed=8))
    assert torch.equal(run(dropout_p=0.0, seed=7), run())
    torch.manual_seed(1)
    drawn = run(dropout_p=0.5)
    assert not torch.equal(drawn, run(dropout_p=0.5))
    torch.manual_seed(1)
    assert torch.equal(drawn, run(dropout_p=0.5))


def test_a_call_without_dropout_leaves_the_generator_alone(backend):
    q, k, v = qkv(1, 2, 2, 20, 30, 8)
    if reason := refusal(backend, q, k, v):
        pytest.skip(reason)
    state = torch.get_rng_state()
    attention(q, k, v, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("p", [0.05, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares(check, dtype, p):
    q, k, v = qkv(2, 4, 2, 61, 257, 32, 32, dtype=dtype)
    check(q, k, v, causal=True, dropout_p=p, seed=11)
    check(q, k, v, **option_set("sinks", q, k), dropout_p=p, seed=11)
