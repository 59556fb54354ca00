"""GPT-2."""

from fastattn.models.checkpoints.entries import Field, Unread, activation, fixed, tokens
from fastattn.models.checkpoints.family import TRANSPOSED, Family, Part
from fastattn.models.decoder_lm import DecoderLM

_LAYER = "transformer.h.{}."


def _conv1d(name: str) -> dict[str, Part]:
    """transformers' Conv1D keeps the transpose of a linear layer's weight."""
    return {"weight": Part(f"{_LAYER}{name}.weight", order=TRANSPOSED), "bias": Part(f"{_LAYER}{name}.bias")}


_LINEAR = {
    "attention.qkv_proj": _conv1d("attn.c_attn"),
    "attention.out_proj": _conv1d("attn.c_proj"),
    "feed_forward.up_proj": _conv1d("mlp.c_fc"),
    "feed_forward.down_proj": _conv1d("mlp.c_proj"),
}

CHOICES = {
    "positions": "learned", "norm": "layer_norm", "gated": False, "qkv_bias": True, "out_bias": True,
    "feed_forward_bias": True,
}  # fmt: skip

# A summary is what other heads make of the hidden states; the last one is about rounding.
_UNREAD = (
    *(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")),
    "n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn",
)  # fmt: skip

GPT2 = Family(
    model_type="gpt2",
    model=DecoderLM,
    architecture="GPT2LMHeadModel",
    entries=(
        Field("vocab_size", "vocab_size"),
        Field("n_embd", "embed_dim"),
        Field("n_layer", "num_layers"),
        Field("n_head", "num_heads"),
        Field("n_inner", "hidden_dim", lambda json: 4 * json["n_embd"]),
        Field("n_positions", "max_positions", lambda json: json.get("n_ctx", 1024)),
        activation("activation_function", "gelu_new"),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("resid_pdrop", "dropout", 0.1),
        Field("embd_pdrop", "dropout", 0.1),
        Field("attn_pdrop", "attention_dropout", 0.1),
        fixed("scale_attn_weights", True),
        fixed("scale_attn_by_inverse_layer_idx", False),
        fixed("add_cross_attention", False),
        Unread(_UNREAD),
        *tokens(),
    ),
    choices=CHOICES,
    tensors={
        "embedding.tokens.weight": "transformer.wte.weight",
        "embedding.positions": "transformer.wpe.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}ln_1.weight",
        "layers.{}.attention_norm.bias": f"{_LAYER}ln_1.bias",
        "layers.{}.feed_forward_norm.weight": f"{_LAYER}ln_2.weight",
        "layers.{}.feed_forward_norm.bias": f"{_LAYER}ln_2.bias",
        **{
            f"layers.{{}}.{name}.{kind}": part
            for name, both in _LINEAR.items()
            for kind, part in both.items()
        },
        "final_norm.weight": "transformer.ln_f.weight",
        "final_norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    },
    prefix="transformer.",
    unused=r".*\.attn\.(masked_)?bias",  # the causal mask, in old files
)
