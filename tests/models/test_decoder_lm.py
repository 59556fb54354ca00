"""DecoderLM against the same model written out in plain PyTorch, for every choice that a config has."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import DecoderLM, ModelConfig, Packed
from fastattn.models.layers import alibi_slopes, sinusoids
from fastattn.testing.compare import assert_close

SIZES: dict[str, Any] = {
    "vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 32,
}  # fmt: skip
MLP = {"gated": False, "activation": "gelu"}
BIASES = {"qkv_bias": True, "out_bias": True, "feed_forward_bias": True, "head_bias": True}

CHOICES: dict[str, dict[str, Any]] = {
    "rotary": {},
    "rotary, grouped, untied": {"num_kv_heads": 2, "tie_embeddings": False},
    "rotary, part of a head": {"rotary_dim": 4, "num_kv_heads": 1},
    "rotary, stretched": {"rotary_inv_freq": (1.0, 0.5, 0.1, 0.01), "rotary_scale": 1.2},
    "learned, biases": {"positions": "learned", "norm": "layer_norm", **MLP, **BIASES},
    "learned, grouped, window": {"positions": "learned", "num_kv_heads": 2, "window": 3},
    "sinusoidal, norms after": {"positions": "sinusoidal", "pre_norm": False, "embed_scale": 5.6},
    "alibi": {"positions": "alibi", "num_heads": 6, "head_dim": 8, "num_kv_heads": 3},
    "alibi, window": {"positions": "alibi", "window": 2, **MLP},
    "none, softcap, scales": {"positions": "none", "softcap": 2.0, "softmax_scale": 0.7, "head_scale": 0.5},
    "embedding norm, relu": {
        "embedding_norm": True,
        "norm": "layer_norm",
        "gated": False,
        "activation": "relu",
    },
}

IDS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(3))
TARGETS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(4))
TARGETS[0, 3:5] = -100


def make(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> DecoderLM:
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig(**{**SIZES, **CHOICES[name], **more})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


class Plain(nn.Module):
    """The same with torch's functions and all scores; weights are the model's, in any type."""

    def __init__(self, model: DecoderLM, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = model.config
        self.weights = nn.ParameterDict()
        for name, parameter in model.named_parameters():
            self.weights[name.replace(".", "/")] = nn.Parameter(parameter.detach().to(dtype))

    def get(self, name: str) -> Tensor | None:
        return self.weights.get(name.replace(".", "/"), None)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, config = self.get(f"{name}.weight"), self.config
        if config.norm == "rms_norm":
            return F.rms_norm(x, weight.shape, weight, config.norm_eps)
        return F.layer_norm(x, weight.shape, weight, self.get(f"{name}.bias"), config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        config = self.config
        x = F.embedding(ids, self.get("embedding.tokens.weight")) * config.embed_scale
        if config.positions == "learned":
            x = x + self.get("embedding.positions")[: ids.shape[1]]
        if config.positions == "sinusoidal":
            x = x + sinusoids(config.max_positions, config.embed_dim)[: ids.shape[1]].to(x)
        if config.embedding_norm:
            x = self.norm(x, "embedding.norm")
        for i in range(config.num_layers):
            for part, run in (("attention", self.attention), ("feed_forward", self.feed_forward)):
                name, norm = f"layers.{i}.{part}", f"layers.{i}.{part}_norm"
                x = (
                    x + run(self.norm(x, norm), name)
                    if config.pre_norm
                    else self.norm(x + run(x, name), norm)
                )
        x = self.norm(x, "final_norm") if config.pre_norm else x
        head = "embedding.tokens.weight" if config.tie_embeddings else "head.weight"
        return F.linear(x * config.head_scale, self.get(head), self.get("head.bias"))

    def feed_forward(self, x: Tensor, name: str) -> Tensor:
        function = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[self.config.activation]
        up = self.linear(x, f"{name}.up_proj")
        hidden = function(self.linear(x, f"{name}.gate_proj")) * up if self.config.gated else function(up)
        return self.linear(hidden, f"{name}.down_proj")

    def attention(self, x: Tensor, name: str) -> Tensor:
        config, length = self.config, x.shape[1]
        heads = self.linear(x, f"{name}.qkv_proj").unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if config.positions == "rotary":
            q, k = self.turned(q), self.turned(k)
        k, v = (y.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for y in (k, v))
        scale = 1 / math.sqrt(config.head_dim) if config.softmax_scale is None else config.softmax_scale
        scores = q @ k.mT * scale
        if config.softcap:
            scores = config.softcap * torch.tanh(scores / config.softcap)
        far = torch.arange(length)[:, None] - torch.arange(length)
        if config.positions == "alibi":
            scores = scores - alibi_slopes(config.num_heads)[:, None, None].to(x) * far
        hidden = (far < 0) | (far > (length if config.window is None else config.window))
        out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        return self.linear(out.transpose(1, 2).flatten(2), f"{name}.out_proj")

    def turned(self, x: Tensor) -> Tensor:
        config, half = self.config, self.config.rotary_dim // 2
        powers = torch.arange(half, dtype=torch.float64) / half
        inv_freq = torch.tensor(config.rotary_inv_freq or (config.rotary_base**-powers).tolist()).double()
        angles = torch.arange(x.shape[2])[:, None] * inv_freq
        cos, sin = ((y * config.rotary_scale).to(x) for y in (angles.cos(), angles.sin()))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOICES)
def test_logits(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    with torch.no_grad():
        assert_close(model(IDS), Plain(model, dtype)(IDS), Plain(model, torch.float64)(IDS), name)


@pytest.mark.parametrize("name", CHOICES)
def test_loss_and_gradients(name: str) -> None:
    model = make(name)
    loss = model.loss(IDS, TARGETS)
    loss.backward()
    results = []
    for dtype in (torch.float32, torch.float64):
        plain = Plain(model, dtype)
        value = F.cross_entropy(plain(IDS).flatten(0, 1), TARGETS.flatten())
        value.backward()
        results.append({"loss": value.detach(), **{k: p.grad for k, p in plain.weights.items()}})
    base, truth = results
    assert_close(loss.detach(), base["loss"], truth["loss"], "loss")
    for parameter_name, parameter in model.named_parameters():
        key = parameter_name.replace(".", "/")
        assert_close(parameter.grad, base[key], truth[key], parameter_name)


@pytest.mark.parametrize("options", [{}, {"page_size": 4}], ids=["dense", "pages"])
@pytest.mark.parametrize("name", CHOICES)
def test_in_steps_from_a_cache(name: str, options: dict[str, Any]) -> None:
    model = make(name)
    with torch.no_grad():
        cache = model.new_cache(3, **options)
        steps = [model(part, cache=cache) for part in IDS.split([5, 3, 1, 1, 2], dim=1)]
        assert cache.lengths.tolist() == [12, 12, 12]
        out = torch.cat(steps, dim=1)
        assert_close(out, Plain(model, torch.float32)(IDS), Plain(model, torch.float64)(IDS), name)


def test_steps_in_bfloat16() -> None:
    model = make("rotary, grouped, untied", torch.bfloat16)
    with torch.no_grad():
        cache = model.new_cache(3, 16)
        out = torch.cat([model(part, cache=cache) for part in IDS.split([9, 1, 1, 1], dim=1)], dim=1)
        assert cache[0].k.dtype == torch.bfloat16
        assert_close(out, Plain(model, torch.bfloat16)(IDS), Plain(model, torch.float64)(IDS))


def test_steps_of_sequences_of_different_lengths() -> None:
    model, lengths = make("learned, biases"), torch.tensor([4, 7, 2])
    with torch.no_grad():
        cache = model.new_cache(3, 16)
        model(IDS[:, :7], cache=cache)
        cache.truncate(lengths)
        step = model(IDS[:, 7:8], cache=cache)
        for b, length in enumerate(lengths):
            alone = torch.cat((IDS[b, :length], IDS[b, 7:8]))[None]
            truth, base = (Plain(model, dtype)(alone)[:, -1] for dtype in (torch.float64, torch.float32))
            assert_close(step[b], base, truth, f"sequence {b}")


@pytest.mark.parametrize("name", CHOICES)
def test_packed_is_as_each_alone(name: str) -> None:
    model, lengths = make(name), [5, 1, 12]
    packed = Packed.of(torch.tensor(lengths))
    parts = [ids[:length] for ids, length in zip(IDS, lengths, strict=True)]
    with torch.no_grad():
        out = model(torch.cat(parts)[None], packed=packed)
        base, truth = (
            torch.cat([Plain(model, dtype)(part[None]) for part in parts], dim=1)
            for dtype in (torch.float32, torch.float64)
        )
    assert_close(out, base, truth, name)


def test_loss_of_packed_tokens() -> None:
    model, packed = make("rotary"), Packed.of(torch.tensor([12, 12, 12]))
    loss = model.loss(IDS.reshape(1, -1), TARGETS.reshape(1, -1), packed=packed)
    truth, base = (
        F.cross_entropy(Plain(model, dtype)(IDS).flatten(0, 1), TARGETS.flatten())
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(loss.detach(), base.detach(), truth.detach(), "loss")


def test_head_scale_is_in_the_loss() -> None:
    model = make("none, softcap, scales")
    loss = model.loss(IDS, TARGETS, reduction="none")
    logits = model(IDS)
    assert_close(loss.detach(), *(F.cross_entropy(logits.mT.to(x), TARGETS, reduction="none").detach()
                                  for x in (torch.float32, torch.float64)), "loss")  # fmt: skip


@pytest.mark.parametrize("dropout", [{"dropout": 0.5}, {"attention_dropout": 0.5}], ids=str)
def test_dropout_is_for_training(dropout: dict[str, float]) -> None:
    model, plain = make("rotary", **dropout), make("rotary")
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
        model.train()
        torch.manual_seed(1)
        first = model(IDS)
        assert not torch.equal(first, plain(IDS))
        assert not torch.equal(first, model(IDS))
        torch.manual_seed(1)
        assert torch.equal(first, model(IDS))


@pytest.mark.parametrize("name", ["rotary, grouped, untied", "learned, biases", "alibi"])
def test_compiles_into_one_graph(name: str) -> None:
    model, plain, exact = make(name), make(name), Plain(make(name), torch.float64)
    torch.compiler.reset()
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(IDS, TARGETS)
    loss.backward()
    plain.loss(IDS, TARGETS).backward()
    F.cross_entropy(exact(IDS).flatten(0, 1), TARGETS.flatten()).backward()
    for (key, parameter), base in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(parameter.grad, base.grad, exact.get(key).grad, key)


@torch.no_grad()
def test_compiles_with_a_cache() -> None:
    model = make("rotary, grouped, untied")
    torch.compiler.reset()
    compiled, cache = torch.compile(model, fullgraph=True, backend="aot_eager"), model.new_cache(3)
    out = torch.cat([compiled(part, cache=cache) for part in IDS.split([10, 1, 1], dim=1)], dim=1)
    assert_close(out, Plain(model, torch.float32)(IDS), Plain(model, torch.float64)(IDS))


def test_keys_stay_what_they_are() -> None:
    layer = {
        "attention.qkv_proj", "attention.out_proj", "feed_forward.gate_proj", "feed_forward.up_proj",
        "feed_forward.down_proj", "attention_norm", "feed_forward_norm",
    }  # fmt: skip
    wanted = {f"layers.{i}.{name}.weight" for i in range(2) for name in layer}
    wanted |= {"embedding.tokens.weight", "final_norm.weight", "head.weight"}
    assert set(make("rotary").state_dict()) == wanted
    assert set(make("sinusoidal, norms after").state_dict()) == wanted - {"final_norm.weight"}
    learned = set(make("learned, biases").state_dict())
    assert "embedding.positions" in learned and "layers.0.attention.qkv_proj.bias" in learned


def test_first_numbers() -> None:
    torch.manual_seed(0)
    model = DecoderLM(ModelConfig.gpt2(**{**SIZES, "embed_dim": 128}))
    assert model.head.weight is model.embedding.tokens.weight
    for name, parameter in model.named_parameters():
        wanted = 0.01 if "out_proj" in name or "down_proj" in name else 0.02
        if parameter.ndim > 1:
            assert abs(parameter.std() / wanted - 1) < 0.1, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("norm.weight"))), name


def test_casts_and_moves_keep_tables() -> None:
    for name in ("alibi", "sinusoidal, norms after", "rotary"):
        model, there_and_back = make(name), make(name).half().to("meta").to_empty(device="cpu").float()
        there_and_back.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(model(IDS), there_and_back(IDS)), name


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (IDS[0], r"ids must be int64 or int32 \[B, S\], got torch\.int64 \[12\]"),
        (IDS.float(), r"ids must be int64 or int32 \[B, S\], got torch\.float32"),
        (IDS[:, :0], r"ids must hold at least one token for each sequence, got \[3, 0\]"),
        (IDS[:0], r"ids must hold at least one token for each sequence, got \[0, 12\]"),
        (torch.full((1, 2), 61), r"ids must be in 0 \.\.\. 60, got 61"),
        (torch.full((1, 2), -100), r"ids must be in 0 \.\.\. 60, got -100"),
        (torch.zeros(1, 33, dtype=torch.int64), r"ids must end within max_positions=32, got 33 tokens"),
    ],
)
def test_ids_that_are_wrong(ids: Tensor, message: str) -> None:
    model = make("rotary")
    with pytest.raises(ValueError, match=message):
        model(ids)
    with pytest.raises(ValueError, match=message):
        model.loss(ids, ids)


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="ids must be a tensor, got list"):
        make("rotary")([[1, 2]])


@torch.no_grad()
def test_cache_that_does_not_fit() -> None:
    model = make("rotary")
    cache = model.new_cache(3, 8)
    with pytest.raises(ValueError, match="ids must have the cache's 3 sequences, got 1"):
        model(IDS[:1], cache=cache)
    model(IDS[:, :6], cache=cache)
    before = [layer.k.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="the cache is full: max_length is 8, sequence 0 has 6 tokens"):
        model(IDS[:, :3], cache=cache)
    assert cache.lengths.tolist() == [6, 6, 6]
    assert all(torch.equal(a[:, :6], layer.k[:, :6]) for a, layer in zip(before, cache.layers, strict=True))
    longer = model.new_cache(3, 64)
    model(torch.zeros(3, 30, dtype=torch.int64), cache=longer)
    with pytest.raises(ValueError, match="ids must end within max_positions=32, got 33 tokens"):
        model(IDS[:, :3], cache=longer)


def test_packed_that_does_not_fit() -> None:
    model = make("rotary")
    with pytest.raises(ValueError, match=r"ids must have the packed tokens' shape \[1, 5\], got \[3, 12\]"):
        model(IDS, packed=Packed.of(torch.tensor([3, 2])))
    with pytest.raises(ValueError, match="ids must end within max_positions=32, got 33 tokens"):
        model(torch.zeros(1, 35, dtype=torch.int64), packed=Packed.of(torch.tensor([33, 2])))


def test_no_decoder() -> None:
    with pytest.raises(ValueError, match="positions must not be 'relative' in a DecoderLM"):
        DecoderLM(ModelConfig(**SIZES, positions="relative"))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads=5 where no head_dim is given, got 32"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
        ({"positions": "absolute"}, "positions must be one of .*, got 'absolute'"),
        ({"norm": "batch"}, "norm must be one of .*, got 'batch'"),
        ({"activation": "mish"}, "activation must be .*, got 'mish'"),
        ({"rotary_dim": 3}, "rotary_dim must be even and in 2 ... head_dim=8, got 3"),
        ({"rotary_inv_freq": (1.0,)}, r"inv_freq must have shape \[dim / 2\] = \[4\], got \[1\]"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"window": -1}, "window must be None or at least 0, got -1"),
        ({"eos_ids": (61,)}, "eos_ids must be in 0 ... 60, got 61"),
        ({"pad_id": -1}, "pad_id must be in 0 ... 60, got -1"),
    ],
)
def test_config_that_is_wrong(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderLM(ModelConfig(**{**SIZES, **choices}))
