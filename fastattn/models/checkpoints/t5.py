"""T5, version 1.0 and 1.1, and those who kept its layers: FLAN-T5."""

from typing import Any

from fastattn.models.checkpoints.entries import Entry, Field, Json, Unread, activation, fixed, tokens
from fastattn.models.checkpoints.family import QKV_ROWS, Family, Part, joined, key_rows
from fastattn.models.config import ModelConfig
from fastattn.models.encoder_decoder import EncoderDecoder

_MAX_POSITIONS = 512  # what T5 was trained with; its positions have no end


class _FeedForward:
    """`feed_forward_proj`: an activation, "gated-" where there is a gate; and what is said of it besides."""

    keys = ("feed_forward_proj", "dense_act_fn", "is_gated_act")

    def read(self, json: Json) -> dict[str, Any]:
        kind = json.get("feed_forward_proj") or "relu"
        gated, name = kind.startswith("gated-"), kind.removeprefix("gated-")
        name = "gelu_new" if kind == "gated-gelu" else name
        for key, value in (("dense_act_fn", name), ("is_gated_act", gated)):
            if json.get(key, value) != value:
                raise ValueError(
                    f"{key} must be {value!r} with feed_forward_proj {kind!r}, got {json[key]!r}"
                )
        return {"gated": gated, **activation("feed_forward_proj", "relu").read({"feed_forward_proj": name})}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        name = activation("feed_forward_proj", "relu").write(config)["feed_forward_proj"]
        kind = {"gelu_new": "gated-gelu"}.get(name, f"gated-{name}") if config.gated else name
        return {"feed_forward_proj": kind}


class _Head:
    """Version 1.0 scales what goes into its head, which is the embedding; 1.1 does neither."""

    keys = ("tie_word_embeddings", "scale_decoder_outputs", "d_model")

    def read(self, json: Json) -> dict[str, Any]:
        tied = json.get("tie_word_embeddings") is not False
        scaled = json.get("scale_decoder_outputs", tied)
        return {"tie_embeddings": tied, "head_scale": json["d_model"] ** -0.5 if scaled else 1.0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaled = config.head_scale != 1.0
        return {"tie_word_embeddings": config.tie_embeddings, "scale_decoder_outputs": scaled}


_ENTRIES: tuple[Entry, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "embed_dim"),
    Field("d_kv", "head_dim", 64),
    Field("d_ff", "hidden_dim"),
    Field("num_layers", "num_layers"),
    Field("num_decoder_layers", "num_decoder_layers", None),
    Field("num_heads", "num_heads"),
    Field("n_positions", "max_positions", _MAX_POSITIONS),
    Field("relative_attention_num_buckets", "relative_buckets", 32),
    Field("relative_attention_max_distance", "relative_max_distance", 128),
    Field("layer_norm_epsilon", "norm_eps", 1e-6),
    Field("dropout_rate", "dropout", 0.1),
    Field("dropout_rate", "attention_dropout", 0.1),
    Field("decoder_start_token_id", "decoder_start_id", 0),
    _FeedForward(),
    _Head(),
    fixed("is_encoder_decoder", True),
    fixed("is_decoder", False),
    fixed("add_cross_attention", False),
    Unread(("classifier_dropout", "initializer_factor", "output_past", "tie_encoder_decoder")),
    *tokens(),
)

_CHOICES = {"positions": "relative", "softmax_scale": 1.0}

_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
_TENSORS: dict[str, Any] = {
    "encoder.embedding.tokens.weight": "shared.weight",
    "encoder.relative_bias.buckets.weight": f"encoder.block.0.{_BIAS}",
    "encoder.final_norm.weight": "encoder.final_layer_norm.weight",
    "relative_bias.buckets.weight": f"decoder.block.0.{_BIAS}",
    "final_norm.weight": "decoder.final_layer_norm.weight",
    "head.weight": "lm_head.weight",
    "layers.{}.cross_attention_norm.weight": "decoder.block.{}.layer.1.layer_norm.weight",
    "layers.{}.cross_attention.q_proj.weight": "decoder.block.{}.layer.1.EncDecAttention.q.weight",
    "layers.{}.cross_attention.kv_proj.weight": joined(
        "decoder.block.{}.layer.1.EncDecAttention.*.weight", "k", "v", rows=(key_rows, key_rows)
    ),
    "layers.{}.cross_attention.out_proj.weight": "decoder.block.{}.layer.1.EncDecAttention.o.weight",
}


def _up(block: str) -> Part:
    """The one that a gate stands beside is its second."""
    return Part(lambda config: f"{block}.DenseReluDense.{'wi_1' if config.gated else 'wi'}.weight")


for _ours, _theirs, _last in (("encoder.layers.{}", "encoder", 1), ("layers.{}", "decoder", 2)):
    _attention, _mlp = (f"{_theirs}.block.{{}}.layer.{number}" for number in (0, _last))
    _TENSORS |= {
        f"{_ours}.attention_norm.weight": f"{_attention}.layer_norm.weight",
        f"{_ours}.attention.qkv_proj.weight": joined(
            f"{_attention}.SelfAttention.*.weight", "q", "k", "v", rows=QKV_ROWS
        ),
        f"{_ours}.attention.out_proj.weight": f"{_attention}.SelfAttention.o.weight",
        f"{_ours}.feed_forward_norm.weight": f"{_mlp}.layer_norm.weight",
        f"{_ours}.feed_forward.gate_proj.weight": f"{_mlp}.DenseReluDense.wi_0.weight",
        f"{_ours}.feed_forward.up_proj.weight": _up(_mlp),
        f"{_ours}.feed_forward.down_proj.weight": f"{_mlp}.DenseReluDense.wo.weight",
    }

T5 = Family(
    "t5", EncoderDecoder, "T5ForConditionalGeneration", _ENTRIES, _CHOICES, _TENSORS,
    # Copies of the embedding, and a bias that no layer reads, in old files.
    unused=r"(en|de)coder\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\..*\.relative_attention_bias\.weight",
    unties=True,  # transformers 5 writes tie_word_embeddings=true into every config
)  # fmt: skip
