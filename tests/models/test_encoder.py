"""Encoders against transformers' BERT with the same weights: hidden states, logits, losses, gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models import Encoder, MaskedLM, ModelConfig, Padding, from_pretrained, pool
from fastattn.models.checkpoints.families import FAMILIES
from fastattn.models.checkpoints.family import parameters
from fastattn.testing.check import upstream
from fastattn.testing.compare import assert_close

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.usefixtures("default_backend")

B, S, V, SEGMENTS = 4, 24, 61, 3
SIZES: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 32,
}  # fmt: skip
BERT = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": SEGMENTS,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "pad_token_id": None,  # whose embedding has no gradient there
}  # fmt: skip


def tokens(seed: int = 0, high: int = V) -> Tensor:
    return torch.randint(high, (B, S), generator=torch.Generator().manual_seed(seed))


IDS, KINDS = tokens(), tokens(1, SEGMENTS)
LENGTHS = torch.tensor([S, 1, 17, 9])
STEPS = torch.arange(S)
RIGHT = LENGTHS[:, None] > STEPS
MASKS = {
    "none": torch.ones(B, S, dtype=torch.bool),
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "gaps": (STEPS % 5 != 2) & RIGHT,
}


def close(x: Tensor, base: Tensor, truth: Tensor, name: str, terms: float = 1.0) -> None:
    assert_close(x.detach(), base.detach(), truth.detach(), name, torch.float32, terms)


class Pair:
    """A model of transformers with random weights in float32 and float64, and ours with the same."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        options = {"add_pooling_layer": False} if name == "BertModel" else {}
        self.base = getattr(transformers, name)(transformers.BertConfig(**BERT), **options).eval()
        with torch.no_grad():
            for p in self.base.parameters():
                p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1))
        self.truth = copy.deepcopy(self.base).double()
        self.base.save_pretrained(folder)
        self.ours: Any = from_pretrained(folder)

    def compare_gradients(self) -> None:
        """Takes those that are there, piece by piece under their names."""
        family = next(family for family in FAMILIES if family.model is type(self.ours))
        base, truth = (
            {name.removeprefix("bert."): p.grad for name, p in model.named_parameters()}
            for model in (self.base, self.truth)
        )
        for ours, p in parameters(self.ours)[0].items():
            for piece in family.pieces(ours, p, self.ours.config):
                name = piece.name.removeprefix("bert.")
                close(p.grad[piece.rows], base.pop(name), truth[name], name, terms=B * S)
        assert not base
        for model in (self.base, self.truth, self.ours):
            model.zero_grad()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("BertModel", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("BertForMaskedLM", tmp_path_factory.mktemp("masked"))


@pytest.mark.parametrize("name", MASKS)
def test_hidden_states_and_gradients_are_bert_s(bert: Pair, name: str) -> None:
    mask = MASKS[name]
    given = {"attention_mask": mask.long(), "token_type_ids": KINDS}
    ours = bert.ours(IDS, mask, segments=KINDS)
    base, truth = (model(IDS, **given).last_hidden_state for model in (bert.base, bert.truth))
    assert not ours[~mask].any()
    close(ours[mask], base[mask], truth[mask], "hidden")
    for out in (ours, base, truth):
        (out * upstream(out) * mask[..., None]).sum().backward()
    bert.compare_gradients()


@torch.no_grad()
def test_bfloat16(bert: Pair) -> None:
    base = copy.deepcopy(bert.base).bfloat16()
    truth, ours = copy.deepcopy(base).double(), copy.deepcopy(bert.ours).bfloat16()
    outs = (model(IDS, RIGHT.long()).last_hidden_state[RIGHT] for model in (base, truth))
    assert_close(ours(IDS, RIGHT)[RIGHT], *outs, "hidden")


def test_lengths_say_what_a_mask_says(bert: Pair) -> None:
    given = (
        bert.ours(IDS, RIGHT.int()),
        bert.ours(IDS.int(), lengths=LENGTHS),
        bert.ours(IDS, lengths=LENGTHS.tolist()),
    )
    for out in given:
        assert torch.equal(out, bert.ours(IDS, RIGHT))


def test_no_padding_is_not_packed() -> None:
    assert Padding.of(IDS, torch.ones_like(IDS)) is None
    assert Padding.of(IDS, lengths=[S] * B) is None
    padding = Padding.of(IDS, RIGHT)
    assert padding is not None
    assert padding.pack(IDS).shape == (1, LENGTHS.sum())
    assert padding.packed.cu_seqlens.tolist() == [0, 24, 25, 42, 51]
    assert torch.equal(padding.unpack(padding.pack(IDS)), IDS * RIGHT)


CONFIGS = {
    "rotary": ModelConfig(**SIZES, num_kv_heads=2),
    "post-norm rotary": ModelConfig(**SIZES, pre_norm=False, softcap=5.0),
    "window": ModelConfig(**SIZES, window=3),
    "alibi": ModelConfig(**SIZES, positions="alibi"),
    "sinusoidal": ModelConfig.vaswani(**SIZES),
    "relative": ModelConfig.t5(**SIZES),
    "no positions": ModelConfig(**SIZES, positions="none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = Encoder(CONFIGS[name])
    whole = model(IDS, lengths=LENGTHS)
    whole.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    for b, length in enumerate(LENGTHS):
        alone = model(IDS[b : b + 1, :length])
        alone.square().sum().backward()
        close(whole[b : b + 1, :length], alone, alone.double(), f"sequence {b}")
    for p, grad in zip(model.parameters(), grads, strict=True):
        close(grad, p.grad, p.grad.double(), "gradient", terms=B * S)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_goes_through_no_layer(name: str) -> None:
    model = Encoder(CONFIGS[name])
    shapes = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, given, out: shapes.append((given[0].shape, out.shape)))
    model(IDS, RIGHT)
    tokens = (1, int(LENGTHS.sum()), 32)
    assert shapes == [(tokens, tokens)] * 2


@pytest.mark.parametrize("name", ["none", "right"])
def test_logits_and_loss_are_those_of_bert_for_masked_lm(masked: Pair, name: str) -> None:
    mask = MASKS[name]
    targets = IDS.masked_fill((STEPS % 4 != 0) | ~mask, -100)
    given = {"attention_mask": mask.long(), "token_type_ids": KINDS}
    base, truth = (model(IDS, labels=targets, **given) for model in (masked.base, masked.truth))
    logits = masked.ours(IDS, mask, segments=KINDS)
    close(logits[mask], base.logits[mask], truth.logits[mask], "logits")
    loss = masked.ours.loss(IDS, targets, mask, segments=KINDS)
    close(loss, base.loss, truth.loss, "loss")
    for out in (loss, base.loss, truth.loss):
        out.backward()
    masked.compare_gradients()


def test_loss_takes_the_options_of_linear_cross_entropy(masked: Pair) -> None:
    targets = IDS.masked_fill(STEPS % 4 != 0, -100)
    each = masked.ours.loss(IDS, targets, lengths=LENGTHS, reduction="none")
    counts = (targets != -100) & RIGHT
    assert each.shape == (counts.sum(),)
    smooth = masked.ours.loss(IDS, targets, RIGHT, label_smoothing=0.1, reduction="sum")
    logits = masked.ours(IDS, RIGHT)[counts]
    expected = F.cross_entropy(logits, targets[counts], label_smoothing=0.1, reduction="sum")
    close(smooth, expected, expected.double(), "loss", terms=float(counts.sum()))


def test_untied_head_and_its_scale() -> None:
    model = MaskedLM(ModelConfig.bert(**SIZES, tie_embeddings=False, head_scale=0.5))
    plain = MaskedLM(ModelConfig.bert(**SIZES, tie_embeddings=False))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        plain.head.weight *= 0.5
    assert model.head.weight is not model.encoder.embedding.tokens.weight
    assert torch.equal(model(IDS), plain(IDS))
    assert torch.equal(model.loss(IDS, IDS), plain.loss(IDS, IDS))


@pytest.mark.parametrize("name", MASKS)
def test_pool(bert: Pair, name: str) -> None:
    mask = MASKS[name]
    hidden = bert.ours(IDS, mask)
    rows = [x[m] for x, m in zip(hidden, mask, strict=True)]
    means = torch.stack([x.mean(0) for x in rows])
    firsts = torch.stack([x[0] for x in rows])
    close(pool(hidden, mask), means, means.double(), "mean")
    assert torch.equal(pool(hidden, mask.int(), "cls"), firsts)
    unit = pool(hidden, mask, normalise=True)
    close(unit, F.normalize(means), F.normalize(means.double()), "normalised")
    if name == "none":
        close(pool(hidden), means, means.double(), "mean")
        assert torch.equal(pool(hidden, how="cls"), firsts)


def test_dropout_follows_the_seed() -> None:
    config = ModelConfig.bert(**SIZES, dropout=0.2, attention_dropout=0.2)
    model = MaskedLM(config)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(IDS, IDS, RIGHT).item()

    assert loss(1) == loss(1)
    assert len({loss(1), loss(2), loss(3)}) == 3
    model.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("p", ["dropout", "attention_dropout"])
def test_each_dropout_drops(p: str) -> None:
    model = Encoder(ModelConfig.bert(**SIZES, **{p: 0.5}))
    assert not torch.equal(model(IDS), model(IDS))
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


def test_compiles_whole() -> None:
    model = Encoder(CONFIGS["rotary"]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), model(IDS))


EMPTY = RIGHT.clone()
EMPTY[2] = False
HIGH = IDS.clone()
HIGH[0, 0] = V
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "ids too high": (ValueError, "ids must be in 0 ... 60, got 61", {"ids": HIGH}),
    "ids below 0": (ValueError, "ids must be in 0 ... 60, got -1", {"ids": -(IDS != 0).long()}),
    "float ids": (ValueError, "ids must be int64 or int32", {"ids": IDS.float()}),
    "one row": (ValueError, r"ids must be int64 or int32 \[B, S\]", {"ids": IDS[0]}),
    "no ids": (ValueError, "ids must hold at least one token", {"ids": IDS[:, :0]}),
    "too long": (ValueError, "max_positions=32, got 48", {"ids": torch.cat((IDS, IDS), 1)}),
    "float mask": (TypeError, "mask must be bool or integers", {"mask": RIGHT.float()}),
    "mask of twos": (ValueError, "mask must be 1 at tokens and 0 at padding, got 2", {"mask": RIGHT * 2}),
    "mask's shape": (
        ValueError,
        r"mask must have shape \[B, S\] = \[4, 24\], got \[24\]",
        {"mask": RIGHT[0]},
    ),
    "no mask": (TypeError, "mask must be a tensor, got list", {"mask": RIGHT.tolist()}),
    "only padding": (ValueError, "mask .* got only padding in sequence 2", {"mask": EMPTY}),
    "both": (ValueError, "mask and lengths", {"mask": RIGHT, "lengths": LENGTHS}),
    "length 0": (ValueError, r"lengths must be in 1 ... 24, got 0", {"lengths": [S, 0, 1, 1]}),
    "length 25": (ValueError, r"lengths must be in 1 ... 24, got 25", {"lengths": [S, 25, 1, 1]}),
    "lengths' shape": (ValueError, r"lengths must be integers of shape \[B\] = \[4\]", {"lengths": [S]}),
    "float lengths": (ValueError, "lengths must be integers", {"lengths": LENGTHS.float()}),
    "segments too high": (ValueError, "segments must be in 0 ... 1, got 2", {"segments": KINDS}),
    "segments' shape": (ValueError, r"segments must be int64 or int32 \[4, 24\]", {"segments": KINDS[0]}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    error, message, given = BAD[name]
    with pytest.raises(error, match=message):
        Encoder(ModelConfig.bert(**SIZES))(**{"ids": IDS, **given})


def test_bad_calls() -> None:
    encoder = Encoder(CONFIGS["window"])
    with pytest.raises(ValueError, match="segments must be None"):
        encoder(IDS, segments=KINDS)
    with pytest.raises(ValueError, match="mask must not have gaps"):
        encoder(IDS, MASKS["gaps"])
    model = MaskedLM(ModelConfig.bert(**SIZES))
    with pytest.raises(ValueError, match=r"targets must be int64 \[4, 24\], as ids, got torch.int32"):
        model.loss(IDS, IDS.int())
    with pytest.raises(ValueError, match="target must be in"):
        model.loss(IDS, IDS + 1)
    hidden = torch.zeros(B, S, 8)
    with pytest.raises(ValueError, match="how must be one of"):
        pool(hidden, how="max")
    with pytest.raises(ValueError, match=r"hidden must be \[B, S, E\]"):
        pool(hidden[0])
    with pytest.raises(ValueError, match="only padding in sequence 2"):
        pool(hidden, EMPTY)
    with pytest.raises(ValueError, match="relative_buckets must be at least 4"):
        Encoder(ModelConfig.t5(**SIZES, relative_buckets=2))
