"""Llama and those who kept its layers: SmolLM2 (which calls itself llama), Mistral, Qwen2."""

from typing import Any

from fastattn.models.checkpoints.entries import Entry, Field, Only, Unread, activation, fixed, tokens
from fastattn.models.checkpoints.family import QKV_ROWS, Family, joined
from fastattn.models.checkpoints.rope import Rope
from fastattn.models.decoder_lm import DecoderLM

_LAYER = "model.layers.{}."

_SIZES: tuple[Entry, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "embed_dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", None),
    Field("intermediate_size", "hidden_dim"),
    Field("max_position_embeddings", "max_positions"),
    activation("hidden_act", "silu"),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", False),
    Field("attention_dropout", "attention_dropout", 0.0),
    Rope(),
    *tokens(),
)

_TENSORS: dict[str, Any] = {
    "embedding.tokens.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": f"{_LAYER}input_layernorm.weight",
    "layers.{}.feed_forward_norm.weight": f"{_LAYER}post_attention_layernorm.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
for _kind in ("weight", "bias"):
    _TENSORS[f"layers.{{}}.attention.qkv_proj.{_kind}"] = joined(
        f"{_LAYER}self_attn.*_proj.{_kind}", "q", "k", "v", rows=QKV_ROWS
    )
    _TENSORS[f"layers.{{}}.attention.out_proj.{_kind}"] = f"{_LAYER}self_attn.o_proj.{_kind}"
    for _name in ("gate_proj", "up_proj", "down_proj"):
        _TENSORS[f"layers.{{}}.feed_forward.{_name}.{_kind}"] = f"{_LAYER}mlp.{_name}.{_kind}"


def _family(model_type: str, architecture: str, *entries: Entry, **choices: Any) -> Family:
    return Family(
        model_type, DecoderLM, architecture, (*_SIZES, *entries), choices, _TENSORS,
        prefix="model.", unused=r".*\.rotary_emb\.inv_freq",
    )  # fmt: skip


LLAMA = _family(
    "llama",
    "LlamaForCausalLM",
    Field("head_dim", "head_dim", None),
    Field("attention_bias", "qkv_bias", False),
    Field("attention_bias", "out_bias", False),
    Field("mlp_bias", "feed_forward_bias", False),
)

QWEN2 = _family(
    "qwen2",
    "Qwen2ForCausalLM",
    fixed("use_sliding_window", False),
    Unread(("sliding_window", "max_window_layers")),  # without the former they mean nothing
    Only("layer_types", lambda kinds: set(kinds) == {"full_attention"}, "full_attention for every layer"),
    qkv_bias=True,
)

MISTRAL = _family(
    "mistral",
    "MistralForCausalLM",
    Field("head_dim", "head_dim", None),
    # Theirs counts the token itself.
    Field(
        "sliding_window", "window", None,
        lambda tokens: tokens - 1, lambda window: None if window is None else window + 1,
    ),
)  # fmt: skip
