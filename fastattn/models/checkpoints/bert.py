"""BERT, and MiniLM, which calls itself bert: the encoder alone, and with its head for masked tokens."""

from typing import Any

from fastattn.models.checkpoints.entries import Entry, Field, Unread, activation, fixed, tokens
from fastattn.models.checkpoints.family import QKV_ROWS, Family, joined
from fastattn.models.encoder import Encoder, MaskedLM

_LAYER = "bert.encoder.layer.{}."

_ENTRIES: tuple[Entry, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "embed_dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("intermediate_size", "hidden_dim"),
    Field("max_position_embeddings", "max_positions"),
    Field("type_vocab_size", "num_segments", 2),
    activation("hidden_act", "gelu"),
    Field("layer_norm_eps", "norm_eps", 1e-12),
    Field("hidden_dropout_prob", "dropout", 0.1),
    Field("attention_probs_dropout_prob", "attention_dropout", 0.1),
    Field("tie_word_embeddings", "tie_embeddings", True),
    fixed("position_embedding_type", "absolute"),
    fixed("is_decoder", False),
    fixed("add_cross_attention", False),
    # The pooler is what other heads read; checkpointing is about training.
    Unread(
        (
            "classifier_dropout", "gradient_checkpointing", "pooler_fc_size", "pooler_num_attention_heads",
            "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality",
        )
    ),
    *tokens(),
)  # fmt: skip

_CHOICES = {
    "positions": "learned", "norm": "layer_norm", "pre_norm": False, "embedding_norm": True, "gated": False,
    "qkv_bias": True, "out_bias": True, "feed_forward_bias": True, "head_bias": True,
}  # fmt: skip

_ENCODER: dict[str, Any] = {
    "embedding.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embedding.positions": "bert.embeddings.position_embeddings.weight",
    "embedding.segments.weight": "bert.embeddings.token_type_embeddings.weight",
}
_HEAD: dict[str, Any] = {
    "head.weight": "cls.predictions.decoder.weight",
    "head.bias": "cls.predictions.bias",
}
for _kind in ("weight", "bias"):
    _ENCODER |= {
        f"embedding.norm.{_kind}": f"bert.embeddings.LayerNorm.{_kind}",
        f"layers.{{}}.attention.qkv_proj.{_kind}": joined(
            f"{_LAYER}attention.self.*.{_kind}", "query", "key", "value", rows=QKV_ROWS
        ),
        f"layers.{{}}.attention.out_proj.{_kind}": f"{_LAYER}attention.output.dense.{_kind}",
        f"layers.{{}}.attention_norm.{_kind}": f"{_LAYER}attention.output.LayerNorm.{_kind}",
        f"layers.{{}}.feed_forward.up_proj.{_kind}": f"{_LAYER}intermediate.dense.{_kind}",
        f"layers.{{}}.feed_forward.down_proj.{_kind}": f"{_LAYER}output.dense.{_kind}",
        f"layers.{{}}.feed_forward_norm.{_kind}": f"{_LAYER}output.LayerNorm.{_kind}",
    }
    _HEAD |= {
        f"dense.{_kind}": f"cls.predictions.transform.dense.{_kind}",
        f"norm.{_kind}": f"cls.predictions.transform.LayerNorm.{_kind}",
    }

# Whether two sentences follow one another, and what that head reads.
_OTHER_HEADS = r"bert\.embeddings\.position_ids|bert\.pooler\..*|cls\.seq_relationship\..*"
_RENAMED = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}

BERT = Family(
    "bert", Encoder, "BertModel", _ENTRIES, _CHOICES, _ENCODER,
    prefix="bert.", unused=rf"{_OTHER_HEADS}|cls\.predictions\..*", renamed=_RENAMED,
)  # fmt: skip

BERT_MASKED = Family(
    "bert", MaskedLM, "BertForMaskedLM", _ENTRIES, _CHOICES,
    {**{f"encoder.{name}": parts for name, parts in _ENCODER.items()}, **_HEAD},
    prefix="bert.", unused=rf"{_OTHER_HEADS}|cls\.predictions\.decoder\.bias", renamed=_RENAMED,
)  # fmt: skip
