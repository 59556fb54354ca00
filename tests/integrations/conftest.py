"""Tiny models with random weights, one of each kind of attention that transformers has."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.integrations import transformers as ours

_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_TOKENS = {"bos_token_id": 1, "eos_token_id": 62, "pad_token_id": 0}
_DECODER = {**_SIZES, **_TOKENS, "num_key_value_heads": 2, "head_dim": 8}

# name: (model class, config class, what differs from the sizes above)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        # Small caps, so that they matter with random weights; one layer slides, one does not.
        {**_DECODER, "sliding_window": 4, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8,
         "tie_word_embeddings": False},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
            "experts_implementation": "eager",
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48,
            "moe_layers": [], "no_rope_layers": [1, 0],
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_DECODER, "sliding_window": None}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SIZES, **_TOKENS, "rotary_pct": 0.5}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS},
    ),
    "bert": ("BertModel", "BertConfig", _SIZES),
    "roberta": ("RobertaModel", "RobertaConfig", {**_SIZES, **_TOKENS}),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**_SIZES, **_TOKENS, "local_attention": 4, "global_attn_every_n_layers": 2,
         "sep_token_id": 2, "cls_token_id": 1},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0, "eos_token_id": 62, "pad_token_id": 0,
         "tie_word_embeddings": False},
    ),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "eos_token_id": 62,
         "pad_token_id": 0, "tie_word_embeddings": False},
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "image_size": 16, "patch_size": 4},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
         "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 10,
         "max_target_positions": 64, "decoder_start_token_id": 1, "suppress_tokens": None,
         "begin_suppress_tokens": None, **_TOKENS},
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_TOKENS},
    ),
    "falcon": (
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS},
    ),
    "gptj": (
        "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, **_TOKENS},
    ),
}  # fmt: skip


def _build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    model_class, config_class, sizes = _MODELS[name]
    config = getattr(transformers, config_class)(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than the usual 0.02: attention must be far from uniform for a wrong mask to show.
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2, generator=generator)
    if hasattr(model, "generation_config"):
        model.generation_config.eos_token_id = None  # all tokens that were asked for
    return model.to(dtype).eval()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Nothing here is large enough for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_model() -> Callable[..., Any]:
    """`shared_model(name, dtype)`: one model of a kind for all tests; they only choose its attention."""
    return cache(_build)


@pytest.fixture
def new_model() -> Callable[..., Any]:
    """`new_model(name)`: a model to be changed; the same weights every time."""
    return _build


@pytest.fixture(scope="session")
def choose() -> Callable[[Any, str], None]:
    """`choose(model, implementation)`, for all parts of it: transformers 5.17 leaves out T5's."""

    def run(model: Any, implementation: str) -> None:
        for part in model.modules():
            if isinstance(part, transformers.PreTrainedModel):
                part.set_attn_implementation(implementation)

    return run


def _plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The truth. transformers' eager functions take their softmax in float32, whatever the model."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * options.get("scaling", query.shape[-1] ** -0.5)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (bias := options.get("position_bias")) is not None:
        scores = scores + bias
    if attention_mask is not None and attention_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if (sinks := options.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2), None


def _plain_mask(**options: Any) -> Tensor:
    """Written out always, so that nothing depends on what None means."""
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return transformers.masking_utils.sdpa_mask(**options)


@pytest.fixture(scope="session", autouse=True)
def _registered() -> Iterator[None]:
    ours.register()
    transformers.AttentionInterface.register("plain", _plain_attention)
    transformers.AttentionMaskInterface.register("plain", _plain_mask)
    yield
    del transformers.AttentionInterface._global_mapping["plain"]
    del transformers.AttentionMaskInterface._global_mapping["plain"]
