"""What a model is made of: one dataclass for decoder-only models, encoders and encoder-decoders."""

from dataclasses import dataclass, field
from typing import Any

from fastattn.ops._activation import check_activation

POSITIONS = ("rotary", "learned", "sinusoidal", "alibi", "relative", "none")
NORMS = ("rms_norm", "layer_norm")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a Transformer. The defaults are Llama's; `gpt2()` and its like are others'.

    Args:
        vocab_size: number of token ids.
        embed_dim: E, size of a token's vector.
        num_layers: of the decoder, or of the encoder.
        num_heads: H, query heads.
        hidden_dim: F, inner size of a feed-forward layer.
        max_positions: tokens that a sequence can have.
        num_kv_heads: Hk, a divisor of H. Default: H.
        head_dim: D. Default: E / H.
        num_decoder_layers: of an encoder-decoder. Default: num_layers.
        positions: "rotary", "learned", "sinusoidal" (added to the embeddings), "alibi" (a slope on the
            scores), "relative" (T5's buckets, a bias on the scores) or "none".
        rotary_dim: values of a head that are turned. Default: D.
        rotary_base: of the wavelengths.
        rotary_inv_freq: [rotary_dim / 2], instead of the powers of rotary_base, for stretched contexts.
        rotary_scale: multiplies cosines and sines.
        relative_buckets: number of T5's buckets.
        relative_max_distance: from which on tokens share the last bucket.
        norm: "rms_norm" or "layer_norm".
        norm_eps: added to the mean square, or to the variance.
        pre_norm: norms stand before attention and feed-forward layers and one at the end; else after each.
        embedding_norm: a norm of the embeddings, as BERT has.
        gated: down(activation(gate(x)) * up(x)) instead of down(activation(up(x))).
        activation: a name that `fastattn.feed_forward` has.
        qkv_bias: biases of the projections to queries, keys and values.
        out_bias: bias of attention's output projection.
        feed_forward_bias: biases of the feed-forward layers.
        head_bias: bias of the projection to the vocabulary.
        tie_embeddings: the projection to the vocabulary is the embedding.
        embed_scale: multiplies the tokens' embeddings, before positions are added.
        head_scale: multiplies what goes into the projection to the vocabulary.
        softmax_scale: multiplies q k^T. Default: 1 / sqrt(D).
        softcap: bounds the scores; 0: none.
        window: tokens to the left that a token sees. Default: all.
        num_segments: token types, as BERT has; 0: none.
        dropout: of embeddings and of what attention and feed-forward layers add.
        attention_dropout: of the attention weights.
        pad_id, bos_id, eos_ids: tokens with a meaning; None or (): there is none.
        decoder_start_id: first token of an encoder-decoder's output.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    max_positions: int
    num_kv_heads: int = 0
    head_dim: int = 0
    num_decoder_layers: int = 0
    positions: str = "rotary"
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    rotary_inv_freq: tuple[float, ...] | None = None
    rotary_scale: float = 1.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm: str = "rms_norm"
    norm_eps: float = 1e-5
    pre_norm: bool = True
    embedding_norm: bool = False
    gated: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    feed_forward_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = True
    embed_scale: float = 1.0
    head_scale: float = 1.0
    softmax_scale: float | None = None
    softcap: float = 0.0
    window: int | None = None
    num_segments: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    pad_id: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = field(default=())
    decoder_start_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "hidden_dim", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads={self.num_heads} where no head_dim is given, "
                f"got {self.embed_dim}"
            )
        self._default("head_dim", self.embed_dim // self.num_heads)
        self._default("num_kv_heads", self.num_heads)
        self._default("num_decoder_layers", self.num_layers)
        self._default("rotary_dim", self.head_dim)
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")
        for name, allowed in (("positions", POSITIONS), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_activation(self.activation)
        if self.positions == "rotary" and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim must be even and in 2 ... head_dim={self.head_dim}, got {self.rotary_dim}"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window must be None or at least 0, got {self.window}")
        for name in ("pad_id", "bos_id", "decoder_start_id"):
            self._check_token(name, getattr(self, name))
        for token in self.eos_ids:
            self._check_token("eos_ids", token)

    def _default(self, name: str, value: int) -> None:
        if not getattr(self, name):
            object.__setattr__(self, name, value)

    def _check_token(self, name: str, token: int | None) -> None:
        if token is not None and not 0 <= token < self.vocab_size:
            raise ValueError(f"{name} must be in 0 ... {self.vocab_size - 1}, got {token}")

    @classmethod
    def gpt2(cls, **sizes: Any) -> "ModelConfig":
        """GPT-2's choices: learned positions, layer norms, biases, an MLP with GELU."""
        choices: dict[str, Any] = {
            "positions": "learned", "norm": "layer_norm", "gated": False, "activation": "gelu_tanh",
            "qkv_bias": True, "out_bias": True, "feed_forward_bias": True,
        }  # fmt: skip
        return cls(**choices | sizes)

    @classmethod
    def bert(cls, **sizes: Any) -> "ModelConfig":
        """BERT's choices: GPT-2's with norms behind, segments, a norm of the embeddings, GELU as it is."""
        choices: dict[str, Any] = {
            "pre_norm": False, "embedding_norm": True, "num_segments": 2, "activation": "gelu",
            "norm_eps": 1e-12, "head_bias": True,
        }  # fmt: skip
        return cls.gpt2(**choices | sizes)

    @classmethod
    def t5(cls, **sizes: Any) -> "ModelConfig":
        """T5's choices: buckets of distances, no biases, no scale of the scores; version 1.1 is gated."""
        choices: dict[str, Any] = {
            "positions": "relative", "norm_eps": 1e-6, "gated": False, "activation": "relu",
            "softmax_scale": 1.0, "pad_id": 0, "eos_ids": (1,), "decoder_start_id": 0,
        }  # fmt: skip
        if sizes.get("tie_embeddings", True):
            choices["head_scale"] = sizes["embed_dim"] ** -0.5
        return cls(**choices | sizes)

    @classmethod
    def vaswani(cls, **sizes: Any) -> "ModelConfig":
        """The first Transformer's: sinusoidal positions, norms behind, biases, ReLU, shared embeddings."""
        choices: dict[str, Any] = {
            "positions": "sinusoidal", "pre_norm": False, "activation": "relu",
            "embed_scale": sizes["embed_dim"] ** 0.5,
        }  # fmt: skip
        return cls.gpt2(**choices | sizes)
