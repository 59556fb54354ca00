"""Encoder-decoders against transformers' T5 and torch's Transformer with the same weights."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import EncoderDecoder, Memory, ModelCache, ModelConfig
from fastattn.models.checkpoints.family import parameters
from fastattn.models.checkpoints.t5 import T5 as T5_FAMILY
from fastattn.models.relative_bias import buckets
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("default_backend")

B, S, T, V = 4, 24, 13, 61
SIZES: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 32,
    "num_decoder_layers": 3, "decoder_start_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
VERSIONS = {"1.0": T5, "1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def close(x: Tensor, base: Tensor, truth: Tensor, name: str, terms: float = 1.0) -> None:
    assert_close(x.detach(), base.detach(), truth.detach(), name, torch.float32, terms)


IDS, TARGETS = tokens(S, 0), tokens(T, 1)
STEPS = torch.arange(S)
RIGHT = torch.tensor([[S], [1], [17], [9]]) > STEPS
MASKS = {
    "none": torch.ones_like(RIGHT),
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "gaps": (STEPS % 5 != 2) & RIGHT,
}


class Pair:
    """A T5 of transformers with random weights in float32 and float64, and ours with the same."""

    def __init__(self, version: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = transformers.T5ForConditionalGeneration(transformers.T5Config(**VERSIONS[version])).eval()
        if version == "1.1":
            self.base.lm_head.weight = nn.Parameter(torch.empty(V, 32))
        with torch.no_grad():
            for p in self.base.parameters():
                p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
        self.truth = copy.deepcopy(self.base).double()
        self.base.save_pretrained(folder)
        self.ours = EncoderDecoder.from_pretrained(folder)

    def compare_gradients(self) -> None:
        """Takes those that are there, piece by piece under their names."""
        base, truth = ({name: p.grad for name, p in x.named_parameters()} for x in (self.base, self.truth))
        for ours, p in parameters(self.ours)[0].items():
            for piece in T5_FAMILY.pieces(ours, p, self.ours.config):
                close(p.grad[piece.rows], base.pop(piece.name), truth[piece.name], piece.name, B * (S + T))
        assert not base


@pytest.fixture(scope="module", params=VERSIONS)
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("name", MASKS)
def test_logits_are_those_of_t5(t5: Pair, name: str) -> None:
    mask = MASKS[name]
    given = {"input_ids": IDS, "attention_mask": mask.long(), "decoder_input_ids": TARGETS}
    base, truth = (model(**given) for model in (t5.base, t5.truth))
    close(t5.ours(IDS, TARGETS, mask), base.logits, truth.logits, "logits")
    hidden = t5.ours.encode(IDS, mask).hidden
    encoded = (out.encoder_last_hidden_state[mask] for out in (base, truth))
    close(hidden[mask], *encoded, "hidden")
    assert not hidden[~mask].any()


def test_loss_and_gradients_are_those_of_t5(t5: Pair) -> None:
    labels = TARGETS.masked_fill(torch.arange(T) >= torch.tensor([[T], [3], [8], [1]]), -100)
    loss = t5.ours.loss(IDS, labels, RIGHT)
    base, truth = (
        model(input_ids=IDS, attention_mask=RIGHT.long(), labels=labels).loss for model in (t5.base, t5.truth)
    )
    close(loss, base, truth, "loss")
    for out in (loss, base, truth):
        out.backward()
    t5.compare_gradients()


@torch.no_grad()
def test_bfloat16(t5: Pair) -> None:
    base = copy.deepcopy(t5.base).bfloat16()
    truth, ours = copy.deepcopy(base).double(), copy.deepcopy(t5.ours).bfloat16()
    given = {"input_ids": IDS, "attention_mask": RIGHT.long(), "decoder_input_ids": TARGETS}
    outs = [model(**given).logits for model in (base, truth)]
    assert_close(ours(IDS, TARGETS, RIGHT), *outs, "logits")
    memory, cache = ours.encode(IDS, RIGHT), ours.new_cache(B)
    steps = [ours.decode(x, memory, cache=cache) for x in TARGETS.split(4, dim=1)]
    assert_close(torch.cat(steps, 1), *outs, "logits, step by step")


def test_greedy_tokens_are_those_of_t5(t5: Pair) -> None:
    ids = torch.zeros(B, 1, dtype=torch.long)
    given = {"input_ids": IDS, "attention_mask": RIGHT.long(), "max_new_tokens": 20, "min_new_tokens": 20}
    theirs = t5.base.generate(**given, do_sample=False, eos_token_id=None, use_cache=False)
    with torch.no_grad():
        memory, cache = t5.ours.encode(IDS, RIGHT), t5.ours.new_cache(B, 20)
        for _ in range(20):
            logits = t5.ours.decode(ids[:, -1:], memory, cache=cache)
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(ids, theirs)


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("number", "largest"), [(32, 128), (8, 20), (64, 1000), (6, 7)])
def test_buckets_are_those_of_t5(both_ways: bool, number: int, largest: int) -> None:
    distances = torch.arange(-2000, 2001)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    assert torch.equal(
        buckets(distances, number, largest, both_ways), theirs(distances, both_ways, number, largest)
    )


def torch_transformer(model: EncoderDecoder) -> nn.Transformer:
    """torch's with copies of our weights."""
    config = model.config
    theirs = nn.Transformer(
        config.embed_dim, config.num_heads, config.num_layers, config.num_decoder_layers, config.hidden_dim,
        dropout=0.0, batch_first=True,
    )  # fmt: skip
    theirs.encoder.norm = theirs.decoder.norm = None
    for to, layer in (
        *zip(theirs.encoder.layers, model.encoder.layers, strict=True),
        *zip(theirs.decoder.layers, model.layers, strict=True),
    ):
        pairs = [(to.self_attn, layer.attention.qkv_proj, layer.attention.out_proj)]
        to.linear1, to.linear2 = layer.feed_forward.up_proj, layer.feed_forward.down_proj
        norms = [layer.attention_norm, layer.feed_forward_norm]
        if (cross := getattr(layer, "cross_attention", None)) is not None:
            qkv = nn.Linear(1, 1)
            for kind in ("weight", "bias"):
                both = [getattr(cross.q_proj, kind), getattr(cross.kv_proj, kind)]
                setattr(qkv, kind, nn.Parameter(torch.cat(both)))
            pairs.append((to.multihead_attn, qkv, cross.out_proj))
            norms.insert(1, layer.cross_attention_norm)
        for i, norm in enumerate(norms, 1):
            getattr(to, f"norm{i}").load_state_dict(norm.state_dict())
        for attention, qkv, out in pairs:
            attention.in_proj_weight, attention.in_proj_bias, attention.out_proj = qkv.weight, qkv.bias, out
    return copy.deepcopy(theirs)


def run_torch(theirs: nn.Transformer, model: EncoderDecoder, mask: Tensor) -> Tensor:
    """The formula of the paper around it, in the type of its weights."""
    dtype = theirs.encoder.layers[0].linear1.weight.dtype
    table, positions = (x.to(dtype) for x in (model.head.weight, model.encoder.embedding.positions))
    source, target = (F.embedding(x, table) * math.sqrt(32) + positions[: x.shape[1]] for x in (IDS, TARGETS))
    hidden = theirs(
        source, target, src_key_padding_mask=~mask, memory_key_padding_mask=~mask, tgt_is_causal=True,
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),
    )  # fmt: skip
    return hidden @ table.T


@pytest.fixture(scope="module")
def vaswani() -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(ModelConfig.vaswani(**SIZES))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
    return model


@pytest.mark.parametrize("name", ["none", "right"])
def test_original_transformer_is_torch_s(vaswani: EncoderDecoder, name: str) -> None:
    base, truth = torch_transformer(vaswani), torch_transformer(vaswani).double()
    outs = vaswani(IDS, TARGETS, MASKS[name]), *(run_torch(x, vaswani, MASKS[name]) for x in (base, truth))
    close(*outs, "logits")
    vaswani.zero_grad()
    for out in outs:
        (out * upstream(out)).sum().backward()
    for layer, b, t in zip(vaswani.layers, base.decoder.layers, truth.decoder.layers, strict=True):
        grads = [x.multihead_attn.in_proj_weight.grad for x in (b, t)]
        ours = torch.cat(
            [x.weight.grad for x in (layer.cross_attention.q_proj, layer.cross_attention.kv_proj)]
        )
        close(ours, *grads, "cross attention", terms=B * S)
    for layer, b, t in zip(vaswani.encoder.layers, base.encoder.layers, truth.encoder.layers, strict=True):
        grads = [x.self_attn.in_proj_weight.grad for x in (b, t)]
        close(layer.attention.qkv_proj.weight.grad, *grads, "self attention", terms=B * S)
        grads = [x.linear1.weight.grad for x in (b, t)]
        close(layer.feed_forward.up_proj.weight.grad, *grads, "feed-forward", terms=B * S)


CONFIGS = {
    "vaswani": ModelConfig.vaswani(**SIZES),
    "t5": ModelConfig.t5(**SIZES),
    "t5, few buckets": ModelConfig.t5(**SIZES, relative_buckets=6, relative_max_distance=7, num_kv_heads=2),
    "rotary": ModelConfig(**SIZES, num_kv_heads=2, softcap=5.0, window=6),
    "alibi": ModelConfig(**SIZES, positions="alibi"),
    "learned": ModelConfig.gpt2(**SIZES),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def new_model(config: ModelConfig) -> EncoderDecoder:
    torch.manual_seed(0)
    model = EncoderDecoder(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0 if p.ndim > 1 else 1.0)
    return model


@every_config
@pytest.mark.parametrize("name", ["none", "right", "left"])
@torch.no_grad()
def test_step_by_step_is_the_whole(config: ModelConfig, name: str) -> None:
    model = new_model(config)
    memory = model.encode(IDS, MASKS[name])
    whole = model.decode(TARGETS, memory)
    cache = model.new_cache(B, T)
    pieces = [model.decode(x, memory, cache=cache) for x in TARGETS.split([1, 4, 1, 1, 6], dim=1)]
    close(torch.cat(pieces, 1), whole, whole.double(), "logits")
    assert cache.lengths.tolist() == [T] * B


@every_config
@torch.no_grad()
def test_sequences_of_a_cache_have_their_own_lengths(config: ModelConfig) -> None:
    model = new_model(config)
    memory = model.encode(IDS, RIGHT)
    whole = model.decode(TARGETS, memory)
    cache = model.new_cache(B)
    model.hidden(TARGETS[:, :8], memory=memory, cache=cache)
    lengths = torch.tensor([8, 2, 0, 5])
    cache.truncate(lengths)
    rows, steps = torch.arange(B)[:, None], lengths[:, None] + torch.arange(4)
    out = model.decode(TARGETS[rows, steps], memory, cache=cache)
    close(out, whole[rows, steps], whole[rows, steps].double(), "logits")


@pytest.mark.parametrize("options", [{"page_size": 4}, {"dtype": torch.bfloat16}, {"dtype": torch.int8}])
@torch.no_grad()
def test_caches_without_a_bias_have_the_options_of_kv_cache(options: dict[str, Any]) -> None:
    model = new_model(CONFIGS["rotary"])
    memory, cache = model.encode(IDS, RIGHT), model.new_cache(B, T, **options)
    whole = model.decode(TARGETS, memory)
    out = torch.cat([model.decode(x, memory, cache=cache) for x in TARGETS.split(4, dim=1)], 1)
    rounded = whole if "page_size" in options else out  # what int8 and bfloat16 lose is KVCache's own test
    close(out, rounded, rounded.double(), "logits")
    assert (out.argmax(-1) == whole.argmax(-1)).float().mean() > 0.9


@every_config
@torch.no_grad()
def test_keys_of_the_memory_are_computed_once(config: ModelConfig) -> None:
    model = new_model(config)
    memory = model.encode(IDS, RIGHT)
    expected = model.decode(TARGETS, memory)
    blank = memory._replace(tokens=torch.full_like(memory.tokens, torch.nan))
    close(model.decode(TARGETS, blank, cache=model.new_cache(B)), expected, expected.double(), "logits")
    assert memory.keys is not None
    assert len(memory.keys) == config.num_decoder_layers
    assert torch.equal(memory.keys.lengths, RIGHT.sum(1))


def test_memory_has_keys_where_no_gradients_are_recorded() -> None:
    model = new_model(CONFIGS["t5"])
    memory = model.encode(IDS, RIGHT)
    assert memory.keys is None
    with torch.no_grad():
        assert model.encode(IDS, RIGHT).keys is not None
        assert model.encode(IDS, RIGHT, keys=False).keys is None
        with pytest.raises(ValueError, match="memory must have keys"):
            model.decode(TARGETS, memory, cache=model.new_cache(B))
    with pytest.raises(NotImplementedError, match="has no gradient"):
        model.encode(IDS, RIGHT, keys=True)


def test_frozen_encoder_trains_the_decoder() -> None:
    model = new_model(CONFIGS["vaswani"])
    with torch.no_grad():
        memory = model.encode(IDS, RIGHT)
    model.decode(TARGETS, memory).square().sum().backward()
    assert model.layers[0].cross_attention.kv_proj.weight.grad.any()
    assert model.encoder.layers[0].attention.qkv_proj.weight.grad is None


@every_config
def test_padding_of_the_source_changes_nothing(config: ModelConfig) -> None:
    model = new_model(config)
    whole = model(IDS, TARGETS, RIGHT)
    for b, length in enumerate(RIGHT.sum(1).tolist()):
        alone = model(IDS[b : b + 1, :length], TARGETS[b : b + 1])
        close(whole[b : b + 1], alone, alone.double(), f"sequence {b}")
    assert torch.equal(whole, model(IDS, TARGETS, lengths=RIGHT.sum(1)))


def test_loss_reads_the_targets_shifted() -> None:
    model = new_model(ModelConfig.vaswani(**{**SIZES, "decoder_start_id": 3, "pad_id": 5}))
    targets = TARGETS.clone()
    targets[0, 4:] = -100
    read = model.shift(targets)
    assert read[0].tolist() == [3, *targets[0, :4].tolist(), *[5] * (T - 5)]
    assert torch.equal(read[1:, 1:], targets[1:, :-1])
    logits = model(IDS, read, RIGHT)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}):
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)
        terms = B * T if options.get("reduction") == "sum" else 1
        close(model.loss(IDS, targets, RIGHT, **options), expected, expected.double(), "loss", terms)


@pytest.mark.parametrize("p", ["dropout", "attention_dropout"])
@pytest.mark.parametrize("kind", [ModelConfig.vaswani, ModelConfig.t5], ids=["vaswani", "t5"])
def test_dropout_follows_the_seed(kind: Any, p: str) -> None:
    model = new_model(kind(**SIZES, **{p: 0.2})).train()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(IDS, TARGETS, RIGHT).item()

    assert loss(1) == loss(1)
    assert len({loss(1), loss(2), loss(3)}) == 3
    model.eval()
    assert loss(1) == loss(2)


def test_compiles_whole() -> None:
    model = new_model(CONFIGS["t5"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(IDS, TARGETS)
    close(compiled(IDS, TARGETS), expected, expected.double(), "logits")


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="num_segments must be 0"):
        EncoderDecoder(ModelConfig.bert(**SIZES))
    with pytest.raises(ValueError, match="window must be None"):
        EncoderDecoder(ModelConfig.t5(**SIZES, window=3))


@torch.no_grad()
def test_bad_calls() -> None:
    model = new_model(CONFIGS["t5"])
    memory = model.encode(IDS, RIGHT)
    assert isinstance(memory, Memory)
    with pytest.raises(ValueError, match="only padding in sequence 1"):
        model.encode(IDS, RIGHT & (STEPS > 0))
    with pytest.raises(ValueError, match=r"mask must have shape \[B, S\] = \[4, 24\], got \[4, 13\]"):
        model(IDS, TARGETS, RIGHT[:, :T])
    with pytest.raises(ValueError, match=r"ids must be in 0 \.\.\. 60, got 62"):
        model.decode(torch.full_like(TARGETS, 62), memory)
    with pytest.raises(ValueError, match="memory must have the 2 sequences of ids, got 4"):
        model.decode(TARGETS[:2], memory)
    with pytest.raises(ValueError, match="max_positions=32, got 39 tokens"):
        model.decode(TARGETS.repeat(1, 3), memory)
    with pytest.raises(ValueError, match="cache must have no options"):
        model.new_cache(B, page_size=4)
    paged = ModelCache(3, B, 32, 4, 8, page_size=4)
    with pytest.raises(ValueError, match="cache must have no pages"):
        model.decode(TARGETS, memory, cache=paged)
    full = model.new_cache(B, 5)
    with pytest.raises(ValueError, match="the cache is full"):
        model.decode(TARGETS, memory, cache=full)
    assert full.lengths.tolist() == [0] * B
    with pytest.raises(ValueError, match=r"targets must be in 0 \.\.\. 60, got -2"):
        model.loss(IDS, TARGETS - 2)
    with pytest.raises(ValueError, match=r"targets must be int64 \[B, T\]"):
        model.loss(IDS, TARGETS[0])
    with pytest.raises(ValueError, match="memory must have the 3 sequences of ids"):
        model.loss(IDS, TARGETS[:3])
    without = new_model(ModelConfig.t5(**{**SIZES, "decoder_start_id": None}))
    with pytest.raises(ValueError, match="decoder_start_id"):
        without.loss(IDS, TARGETS)
