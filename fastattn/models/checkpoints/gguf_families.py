"""What GGUF files hold, by their architecture. Source: llama.cpp's gguf-py/gguf/constants.py."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.models.checkpoints.entries import Entry, Field, Json, Unread, fixed
from fastattn.models.checkpoints.family import AS_IS, QKV_ROWS, Family, Order, Part
from fastattn.models.checkpoints.gguf_file import GgufFile
from fastattn.models.checkpoints.gpt2 import CHOICES as GPT2_CHOICES
from fastattn.models.checkpoints.rope import stretched
from fastattn.models.config import ModelConfig
from fastattn.models.decoder_lm import DecoderLM

# Of general interest, or for the tokenizer.
_NOT_THE_MODELS = ("GGUF.", "general.", "tokenizer.", "quantize.", "split.")
_ROPE_FACTORS = "rope_freqs.weight"


def description(file: GgufFile) -> dict[str, Any]:
    """The metadata as a config.json, without the architecture's name before each key.

    What other families say in their metadata, and GGUF files by the tensors that they have, is added.
    """
    architecture = file.metadata.get("general.architecture")
    json: dict[str, Any] = {"model_type": architecture}
    for key, value in file.metadata.items():
        if not key.startswith(_NOT_THE_MODELS):
            json[key.removeprefix(f"{architecture}.")] = value
    stored = file.stored
    if "token_embd.weight" in stored:
        json["vocab_size"] = stored["token_embd.weight"].shape[0]
    json["tie_embeddings"] = "output.weight" not in stored
    for ours, name in (("qkv_bias", "attn_q"), ("out_bias", "attn_output"), ("feed_forward_bias", "ffn_up")):
        json[ours] = f"blk.0.{name}.bias" in stored
    if _ROPE_FACTORS in stored:
        json["rope_factors"] = file.read(stored[_ROPE_FACTORS]).tolist()
    for ours in ("bos_id", "pad_id"):
        json[ours] = file.metadata.get(f"tokenizer.ggml.{_TOKENS[ours]}_token_id")
    ends = (file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    json["eos_ids"] = tuple(dict.fromkeys(token for token in ends if token is not None))
    return json


_TOKENS = {"bos_id": "bos", "pad_id": "padding"}


@dataclass(frozen=True)
class _Rope:
    """rope.*, and the factors that llama.cpp keeps as a tensor for Llama 3."""

    @property
    def keys(self) -> tuple[str, ...]:
        names = ("type", "factor", "original_context_length", "finetuned")
        scaling = (f"rope.scaling.{name}" for name in names)
        return ("rope.freq_base", "rope.dimension_count", "rope_factors", *scaling)

    def read(self, json: Json) -> dict[str, Any]:
        base = json.get("rope.freq_base", 10000.0)
        dim = json.get(
            "attention.key_length", json["embedding_length"] // max(1, json["attention.head_count"])
        )
        if (turned := json.get("rope.dimension_count", dim)) != dim:
            raise ValueError(f"rope.dimension_count must be the head's {dim}, got {turned}")
        kind = json.get("rope.scaling.type", "none")
        kind = "default" if kind == "none" else kind
        if (factors := json.get("rope_factors")) is not None:
            if kind != "default" or len(factors) != dim // 2:
                raise ValueError(
                    f"{_ROPE_FACTORS} must have {dim // 2} values and stand alone, got {len(factors)}"
                )
            inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            return {
                "rotary_base": base,
                "rotary_inv_freq": tuple((inv_freq / torch.tensor(factors)).tolist()),
            }
        context = json.get("rope.scaling.original_context_length", json.get("context_length"))
        settings = {
            "original_max_position_embeddings": context,
            "factor": json.get("rope.scaling.factor", 1.0),
        }
        return {"rotary_base": base, **stretched(kind, dim, base, settings, "rope.scaling")}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}  # GGUF files are not written


# llama.cpp turns neighbouring values, and rows of queries and keys are in that order; ours are in halves.
_PAIRED = Order(
    lambda x, config: x.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2),
    lambda x, config: x.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2),
)

_SIZES: tuple[Entry, ...] = (
    *(Field(name, name) for name in ("vocab_size", "tie_embeddings")),
    *(Field(name, name, None) for name in (*_TOKENS, "eos_ids")),
    Field("embedding_length", "embed_dim"),
    Field("block_count", "num_layers"),
    Field("attention.head_count", "num_heads"),
    Field("feed_forward_length", "hidden_dim"),
    Field("context_length", "max_positions"),
    fixed("attention.causal", True),
)
_BIASES = tuple(Field(name, name, False) for name in ("qkv_bias", "out_bias", "feed_forward_bias"))
_LLAMA_SIZES: tuple[Entry, ...] = (
    Field("attention.head_count_kv", "num_kv_heads", None),
    Field("attention.key_length", "head_dim", None),
    Field("attention.value_length", "head_dim", None),
    Field("attention.layer_norm_rms_epsilon", "norm_eps"),
    _Rope(),
    *_BIASES,
)
_NAMES = {
    "attention_norm": "attn_norm", "attention.qkv_proj": "attn_qkv", "attention.out_proj": "attn_output",
    "feed_forward_norm": "ffn_norm", "feed_forward.gate_proj": "ffn_gate", "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}  # fmt: skip


def _tensors() -> dict[str, Any]:
    tables: dict[str, Any] = {
        "embedding.tokens.weight": "token_embd.weight",
        "embedding.positions": "position_embd.weight",
    }
    for kind in ("weight", "bias"):
        tables |= {f"layers.{{}}.{ours}.{kind}": f"blk.{{}}.{name}.{kind}" for ours, name in _NAMES.items()}
        tables |= {f"final_norm.{kind}": f"output_norm.{kind}", f"head.{kind}": f"output.{kind}"}
    return tables


def _llama(architecture: str, order: Order) -> Family:
    """Queries, keys and values apart; those of the first two in some order."""
    tensors = _tensors()
    for kind in ("weight", "bias"):
        names = (f"blk.{{}}.attn_{name}.{kind}" for name in "qkv")
        tensors[f"layers.{{}}.attention.qkv_proj.{kind}"] = tuple(
            Part(name, rows, way)
            for name, rows, way in zip(names, QKV_ROWS, (order, order, AS_IS), strict=True)
        )
    return Family(
        architecture, DecoderLM, "", (*_SIZES, *_LLAMA_SIZES), {}, tensors, unused=re.escape(_ROPE_FACTORS)
    )


GGUF_FAMILIES = (
    _llama("llama", _PAIRED),
    _llama("qwen2", AS_IS),
    Family(
        "gpt2",
        DecoderLM,
        "",
        (
            *_SIZES,
            Field("attention.layer_norm_epsilon", "norm_eps"),
            fixed("rope_factors", None),
            Unread(("qkv_bias", "out_bias", "feed_forward_bias")),
        ),
        {**GPT2_CHOICES, "activation": "gelu_tanh"},
        _tensors(),
    ),
)
