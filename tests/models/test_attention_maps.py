"""Attention weights of models, layer by layer: transformers' own, and no more than was asked for."""

import pytest
import torch

from fastattn.models import DecoderLM, Encoder, EncoderDecoder, ModelConfig, attention_maps, from_pretrained
from fastattn.testing.compare import assert_close

SIZES = {
    "vocab_size": 50,
    "embed_dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 48,
    "max_positions": 32,
}
IDS = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))


def of_transformers(model, dtype):
    with torch.no_grad():
        return model.to(dtype)(IDS, output_attentions=True).attentions


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Bert"])
def test_against_transformers(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "GPT2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32,
                                         bos_token_id=0, eos_token_id=0)  # fmt: skip
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        heads = {"num_key_value_heads": 2} if family == "Llama" else {}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=32, **heads,
        )  # fmt: skip
        theirs = transformers.BertModel(config) if family == "Bert" else transformers.LlamaForCausalLM(config)
    theirs.eval().save_pretrained(tmp_path)
    theirs.set_attn_implementation("eager")
    found = dict(attention_maps(from_pretrained(tmp_path), IDS))
    base, truth = of_transformers(theirs, torch.float32), of_transformers(theirs, torch.float64)
    assert list(found) == [0, 1, 2]
    for layer, weights in found.items():
        assert weights.shape == (2, 4, 11, 11)
        assert_close(weights, base[layer], truth[layer])


@pytest.mark.parametrize("positions", ["rotary", "learned", "alibi", "relative"])
def test_what_is_chosen(positions):
    kind = Encoder if positions == "relative" else DecoderLM
    model = kind(ModelConfig(**SIZES, positions=positions, dropout=0.3)).train()
    everything = dict(attention_maps(model, IDS))
    some = dict(attention_maps(model, IDS, layers=[-1, 0], heads=[2, 1], rows=slice(-3, None)))
    assert list(some) == [0, 2] and model.training
    for layer, weights in some.items():
        torch.testing.assert_close(weights, everything[layer][:, [2, 1], -3:], rtol=0, atol=1e-6)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3))


def test_layers_behind_are_not_computed():
    model = DecoderLM(ModelConfig(**SIZES))
    calls = []
    for i, layer in enumerate(model.layers):
        layer.feed_forward.register_forward_hook(lambda *_, i=i: calls.append(i))
    maps = attention_maps(model, IDS, layers=1)
    assert not calls
    assert next(maps)[0] == 1
    assert calls == [0]
    assert next(maps, None) is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": IDS + 40}, ValueError, r"ids must be in 0 \.\.\. 49, got 89"),
        ({"ids": IDS[0]}, ValueError, r"ids must be int64 or int32 \[B, S\]"),
        ({"layers": 3}, IndexError, r"layers must be in -3 \.\.\. 2, got 3"),
        ({"heads": 4}, IndexError, "heads"),
        ({"rows": [11]}, IndexError, "rows"),
        ({"model": EncoderDecoder(ModelConfig(**SIZES))}, TypeError, "got EncoderDecoder"),
    ],
    ids=["vocabulary", "shape", "layer", "head", "row", "model"],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        list(attention_maps(**{"model": DecoderLM(ModelConfig(**SIZES)), "ids": IDS, **change}))
