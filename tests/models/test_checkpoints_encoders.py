"""Folders of BERT and T5, loaded and saved, old ones and wrong ones too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattn.models import DecoderLM, Encoder, EncoderDecoder, MaskedLM, ModelConfig, from_pretrained

V = 61
IDS = torch.randint(1, V, (3, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[20], [1], [9]]) > torch.arange(20)
BERT: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": V, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": V, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 32,
}  # fmt: skip


def theirs(name: str, **config: Any) -> Any:
    """A model of transformers whose weights are all different."""
    torch.manual_seed(0)
    kind, sizes = ("Bert", BERT) if name.startswith("Bert") else ("T5", T5)
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**sizes, **config}))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Of either kind of model, at the tokens: what this is about is the weights, so bits must agree."""
    if isinstance(model, EncoderDecoder):
        return model(IDS, IDS, MASK)
    if isinstance(model, Encoder | MaskedLM):
        return model(IDS, MASK)[MASK]
    if isinstance(model, transformers.T5ForConditionalGeneration):
        return model(input_ids=IDS, attention_mask=MASK.long(), decoder_input_ids=IDS).logits
    return model(IDS, MASK.long())[0][MASK]


def change(folder: Path, **keys: Any) -> None:
    """Sets keys of config.json; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")


KINDS = [
    ("BertModel", Encoder, {}),
    ("BertForMaskedLM", MaskedLM, {"hidden_act": "gelu_new", "type_vocab_size": 3}),
    ("T5ForConditionalGeneration", EncoderDecoder, {}),
    ("T5ForConditionalGeneration", EncoderDecoder, {"feed_forward_proj": "gated-gelu"}),
    ("T5ForConditionalGeneration", EncoderDecoder, {"feed_forward_proj": "gated-silu"}),
    ("T5ForConditionalGeneration", EncoderDecoder, {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("name", "kind", "config"), KINDS, ids=str)
@pytest.mark.parametrize("from_source", [True, False], ids=["loaded", "new"])
def test_there_and_back(name: str, kind: Any, config: Any, from_source: bool, tmp_path: Path) -> None:
    base = theirs(name, **config)
    base.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert type(ours) is kind
    if not from_source:
        ours.source = None
    ours.save_pretrained(tmp_path / "ours")
    again = kind.from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert torch.equal(outputs(again), outputs(ours))
    options = {"add_pooling_layer": False} if name == "BertModel" else {}
    back, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(back.eval()), outputs(base))


def test_head_of_its_own_whatever_the_config_says(tmp_path: Path) -> None:
    base = theirs("T5ForConditionalGeneration", tie_word_embeddings=False)
    base.lm_head.weight = torch.nn.Parameter(torch.randn(V, 32))
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    ours = from_pretrained(tmp_path)
    assert not ours.config.tie_embeddings
    assert ours.config.head_scale == 1.0
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(back), outputs(base))
    change(tmp_path, tie_word_embeddings=False, scale_decoder_outputs=None)  # as transformers 4 wrote it
    assert from_pretrained(tmp_path).config == ours.config


def test_encoder_comes_out_of_a_folder_with_a_head(tmp_path: Path) -> None:
    base = theirs("BertForMaskedLM")
    base.save_pretrained(tmp_path)
    ours, whole = Encoder.from_pretrained(tmp_path), MaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(ours), outputs(whole.encoder))
    ours.save_pretrained(tmp_path / "encoder")
    assert type(from_pretrained(tmp_path / "encoder")) is Encoder
    back = transformers.BertModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    assert torch.equal(outputs(back), outputs(base.bert))
    with pytest.raises(ValueError, match=r"cls\.predictions\.bias is missing"):
        MaskedLM.from_pretrained(tmp_path / "encoder")


def test_first_bert_files_load(tmp_path: Path) -> None:
    theirs("BertForPreTraining").save_pretrained(tmp_path)
    expected = {kind: outputs(kind.from_pretrained(tmp_path)) for kind in (Encoder, MaskedLM)}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in load_file(tmp_path / "model.safetensors").items()
    }
    assert len([name for name in old if name.endswith("gamma")]) == 6
    old["bert.embeddings.position_ids"] = torch.arange(32)[None].float()
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"].clone()
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    rewrite(tmp_path, old)
    change(tmp_path, architectures=None, tie_word_embeddings=None)
    assert type(from_pretrained(tmp_path)) is Encoder
    for kind, out in expected.items():
        assert torch.equal(outputs(kind.from_pretrained(tmp_path)), out)


def test_first_t5_files_load(tmp_path: Path) -> None:
    theirs("T5ForConditionalGeneration").save_pretrained(tmp_path)
    expected = outputs(from_pretrained(tmp_path))
    old = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        old[name] = old["shared.weight"].clone()
    bias = "relative_attention_bias.weight"
    old[f"decoder.block.0.layer.1.EncDecAttention.{bias}"] = torch.zeros(32, 4)
    rewrite(tmp_path, old)
    change(tmp_path, scale_decoder_outputs=None, tie_word_embeddings=None, n_positions=40, output_past=True)
    ours = from_pretrained(tmp_path)
    assert ours.config.tie_embeddings
    assert ours.config.max_positions == 40
    assert torch.equal(outputs(ours), expected)


NEW = [
    (Encoder, ModelConfig(**SIZES, num_kv_heads=2), "fastattn.Encoder"),
    (MaskedLM, ModelConfig(**SIZES, positions="alibi"), "fastattn.MaskedLM"),
    (MaskedLM, ModelConfig.bert(**SIZES), "bert"),
    (EncoderDecoder, ModelConfig.vaswani(**SIZES, num_decoder_layers=1), "fastattn.EncoderDecoder"),
    (EncoderDecoder, ModelConfig.t5(**SIZES, gated=True, activation="gelu_tanh"), "t5"),
    (EncoderDecoder, ModelConfig.t5(**SIZES, tie_embeddings=False), "t5"),
    (EncoderDecoder, ModelConfig.t5(**SIZES, num_kv_heads=2), "fastattn.EncoderDecoder"),
]


@pytest.mark.parametrize(("kind", "config", "model_type"), NEW)
def test_new_models_find_their_family(
    kind: Any, config: ModelConfig, model_type: str, tmp_path: Path
) -> None:
    model = kind(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    again = from_pretrained(tmp_path)
    assert type(again) is kind
    assert again.config == config
    assert torch.equal(outputs(again), outputs(model))


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "decoder": ("BertModel", {"is_decoder": True}, "is_decoder must be False, got True"),
    "positions": (
        "BertModel",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type must be 'absolute', got 'relative_key'",
    ),
    "activation": ("BertModel", {"hidden_act": "mish"}, "hidden_act must be one of .*, got 'mish'"),
    "size": ("BertModel", {"hidden_size": 16}, r"word_embeddings.weight must be \[61, 16\], got \[61, 32\]"),
    "layers": ("BertModel", {"num_hidden_layers": 3}, r"encoder.layer.2.* is missing"),
    "segments": ("BertModel", {"type_vocab_size": 0}, "token_type_embeddings.weight was not expected"),
    "gate": (
        "T5ForConditionalGeneration",
        {"is_gated_act": True},
        "is_gated_act must be False with .*'relu'",
    ),
    "other gate": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": None, "is_gated_act": None},
        r"DenseReluDense.wi_0.weight is missing",
    ),
    "unknown": ("T5ForConditionalGeneration", {"new_thing": 1}, "new_thing = 1: not understood"),
    "no encoder": ("T5ForConditionalGeneration", {"is_encoder_decoder": False}, "is_encoder_decoder must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_folders(name: str, tmp_path: Path) -> None:
    kind, keys, message = BAD[name]
    theirs(kind).save_pretrained(tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path)


def test_another_class(tmp_path: Path) -> None:
    theirs("BertModel").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="is a bert: a Encoder or MaskedLM, not a DecoderLM"):
        DecoderLM.from_pretrained(tmp_path)
