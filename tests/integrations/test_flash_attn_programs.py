"""Programs written for flash-attn, in which only the import is changed; and bert_padding, which they use."""

import re
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.integrations import flash_attn
from fastattn.integrations.flash_attn import bert_padding
from fastattn.testing.compare import assert_close

pytestmark = pytest.mark.usefixtures("default_backend")

B, SK, H, D = 2, 9, 4, 8

# Trains on padded batches whose padding is taken out, with dense attention in every second layer; then
# continues prompts of different lengths, token by token over a cache.
PROGRAM = """
import torch
import torch.nn.functional as F
from torch import nn
from flash_attn import flash_attn_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_func

VOCABULARY, DIM, HEADS, LAYERS, LENGTH = 17, 32, 4, 2, 12
HEAD_DIM = DIM // HEADS


class Layer(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def attend(self, qkv, mask, cache):
        if cache is not None:
            q, k, v = qkv.unbind(2)
            return flash_attn_with_kvcache(
                q, *cache["kv"][self.index], k, v, cache_seqlens=cache["lengths"], causal=True,
                window_size=(8, 0),
            )
        if self.index % 2 == 0:
            rows, indices, starts, longest, *_ = unpad_input(qkv, mask)
            out = flash_attn_varlen_qkvpacked_func(
                rows, starts, longest, 0.0, causal=True, window_size=(8, 0)
            )
            return pad_input(out, indices, *qkv.shape[:2])
        return flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True, window_size=(8, 0))

    def forward(self, x, mask=None, cache=None):
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, HEAD_DIM))
        x = x + self.proj(self.attend(qkv, mask, cache).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens, mask=None, cache=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask, cache)
        return self.head(x)


def train(dtype, steps=4):
    torch.manual_seed(0)
    model = Model().to(dtype)
    tokens = torch.randint(VOCABULARY, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [7], [10]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        logits = model(tokens, mask)[:, :-1][mask[:, 1:]]
        loss = F.cross_entropy(logits, tokens[:, 1:][mask[:, 1:]])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return model, torch.stack(losses)


@torch.no_grad()
def generate(model, count=5):
    prompts, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2], dtype=torch.int32)
    shape = (2, 16, HEADS, HEAD_DIM)
    dtype = model.head.weight.dtype
    kv = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(LAYERS)]
    cache = {"kv": kv, "lengths": torch.zeros(2, dtype=torch.int32)}
    logits = model(prompts, cache=cache)[torch.arange(2), lengths.long() - 1]
    cache["lengths"] = lengths
    found = []
    for _ in range(count):
        found.append(logits)
        logits = model(logits.argmax(-1, keepdim=True), cache=cache)[:, 0]
        cache["lengths"] += 1
    return torch.stack(found, dim=1)


@torch.no_grad()
def probe(q, k, v):
    return flash_attn_func(q, k, v, causal=True)
"""


def load(original: bool = False) -> Any:
    """The program: with plain PyTorch in the place of flash-attn, or with its import changed."""
    text = PROGRAM
    if not original:
        text, changed = re.subn(
            r"^from flash_attn\b", "from fastattn.integrations.flash_attn", text, flags=re.M
        )
        assert changed == 3
    module = types.ModuleType("program")
    exec(compile(text, "program", "exec"), module.__dict__)
    return module


@pytest.fixture
def plain_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash_attn in plain PyTorch, of what the program needs."""

    def dense(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int] = (-1, 0)
    ) -> Tensor:
        assert causal
        distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    def varlen(rows: Tensor, starts: Tensor, longest: int, dropout_p: float, **options: Any) -> Tensor:
        parts = [rows[a:b].unbind(1) for a, b in pairwise(starts.tolist())]
        return torch.cat([dense(*(x[None] for x in part), **options)[0] for part in parts])

    def cached(
        q: Tensor, kc: Tensor, vc: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, **o: Any
    ) -> Tensor:
        outs = []
        for b, n in enumerate(cache_seqlens.tolist()):
            kc[b, n : n + k.shape[1]], vc[b, n : n + k.shape[1]] = k[b], v[b]
            end = n + k.shape[1]
            outs.append(dense(q[b : b + 1], kc[b : b + 1, :end], vc[b : b + 1, :end], **o))
        return torch.cat(outs)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_kvpacked_func = lambda q, kv, **o: dense(q, *kv.unbind(2), **o)
    package.flash_attn_varlen_qkvpacked_func, package.flash_attn_with_kvcache = varlen, cached
    interface.flash_attn_func = dense
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", bert_padding)


@pytest.mark.usefixtures("plain_flash_attn")
def test_training_and_generation() -> None:
    runs = []
    for program, dtype in (
        (load(), torch.float32),
        (load(original=True), torch.float32),
        (load(original=True), torch.float64),
    ):
        model, losses = program.train(dtype)
        runs.append((losses, program.generate(model), model.head.weight.detach()))
    for name, *compared in zip(("losses", "logits", "weights"), *runs, strict=False):
        assert_close(*compared, name)
    assert runs[0][0][-1] < runs[0][0][0]
    q, k, v = torch.randn(3, 2, 5, H, D)
    assert_close(
        load().probe(q, k, v),
        load(original=True).probe(q, k, v),
        load(original=True).probe(q.double(), k.double(), v.double()),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_types_of_flash_attn(dtype: torch.dtype) -> None:
    program = load()
    model, losses = program.train(dtype)
    assert losses.isfinite().all()
    assert program.generate(model).isfinite().all()


def test_programs_may_ask_for_the_version() -> None:
    assert tuple(int(x) for x in flash_attn.__version__.split(".")) >= (2, 8)


def test_padding_there_and_back() -> None:
    x = torch.randn(B, SK, H, D, requires_grad=True)
    mask = torch.tensor([[1] * 9, [0, 1, 1, 0, 1, 0, 0, 0, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()])
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 9, 13], torch.int32, 9)
    assert used.tolist() == [9, 4]
    back = bert_padding.pad_input(rows, indices, B, SK)
    assert torch.equal(back, x * mask[:, :, None, None])
    (grad,) = torch.autograd.grad(back, x, torch.ones_like(back))
    assert torch.equal(grad, mask[:, :, None, None].expand_as(x).float())
    assert torch.equal(bert_padding.index_first_axis(back.flatten(0, 1), indices), rows)
    assert torch.equal(bert_padding.index_put_first_axis(rows, indices, B * SK), back.flatten(0, 1))


def test_unused_tokens() -> None:
    x, mask = torch.randn(B, 4, D), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask, unused)
    assert torch.equal(rows, torch.cat([x[0, :3], x[1, :3]]))
    assert indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 6], 3, [2, 1])


def test_concatenated_sequences() -> None:
    x = torch.randn(3, 6, D)
    inside = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, inside)
    assert torch.equal(rows, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(bert_padding.pad_input(rows, indices, 3, 6)[0, 5], torch.zeros(D))
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)
