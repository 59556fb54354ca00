"""What the models are built of: embeddings, attention, and the layer that both stand in.

A layer reads x [B, S, E], or the packed tokens of sequences of different lengths, [1, T, E].
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.config import ModelConfig
from fastattn.nn import FeedForward, GatedFeedForward, KVCache, LayerNorm, RMSNorm, RotaryEmbedding
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen
from fastattn.ops.linear import linear
from fastattn.ops.rotary import rotary
from fastattn.weights import attention_weights

if TYPE_CHECKING:
    from fastattn.models.padding import Padding


class Packed(NamedTuple):
    """Sequences that stand one after the other in [1, T, E], without padding."""

    cu_seqlens: Tensor  # int32 [B + 1], where each starts and the last ends
    max_seqlen: int
    positions: Tensor  # int32 [1, T], of each token in its sequence

    @classmethod
    def of(cls, lengths: Tensor) -> "Packed":
        """From integer lengths [B]."""
        lengths = lengths.to(torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        tokens = torch.arange(int(cu_seqlens[-1]), dtype=torch.int32, device=lengths.device)
        positions = tokens - cu_seqlens[:-1].repeat_interleave(lengths)
        return cls(cu_seqlens, int(lengths.max()), positions[None])


def make_norm(config: ModelConfig) -> nn.Module:
    """A norm of a token's vector."""
    kind = RMSNorm if config.norm == "rms_norm" else LayerNorm
    return kind(config.embed_dim, config.norm_eps)


def make_feed_forward(config: ModelConfig) -> FeedForward | GatedFeedForward:
    """A feed-forward layer; its forward takes a residual."""
    kind = GatedFeedForward if config.gated else FeedForward
    return kind(
        config.embed_dim, config.hidden_dim, config.activation, config.dropout, bias=config.feed_forward_bias
    )


class Embedding(nn.Module):
    """Tokens, and where that is how positions are told, their positions: ids [B, S] -> [B, S, E]."""

    positions: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.segments = nn.Embedding(config.num_segments, config.embed_dim) if config.num_segments else None
        self.norm = make_norm(config) if config.embedding_norm else None
        shape = (config.max_positions, config.embed_dim)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(shape))
        elif config.positions == "sinusoidal":
            self.register_buffer("positions", sinusoids(*shape), persistent=False)
        else:
            self.positions = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What casts or moves a module goes through here; the table stays in float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.config.positions == "sinusoidal" and self.positions is not None:
            table = sinusoids(self.config.max_positions, self.config.embed_dim)
            self.positions = table.to(self.positions.device)
        return self

    def forward(self, ids: Tensor, positions: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """positions: integers, [B, S] or [1, S]. Default: 0 ... S - 1."""
        x = F.embedding(ids, self.tokens.weight)
        if self.config.embed_scale != 1.0:
            x = x * self.config.embed_scale
        if self.positions is not None:
            table = self.positions.to(x.dtype)
            x = x + (table[: ids.shape[1]] if positions is None else F.embedding(positions, table))
        if self.segments is not None:
            kinds = torch.zeros_like(ids) if segments is None else segments
            x = x + F.embedding(kinds, self.segments.weight)
        if self.norm is not None:
            x = self.norm(x)
        return F.dropout(x, self.config.dropout, self.training)


class Attention(nn.Module):
    """Self-attention: one product to queries, keys and values, the fused kernel, the output's product.

    qkv_proj's rows are the H query heads, then the Hk heads of keys, then those of values.
    """

    slopes: Tensor | None

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = nn.Linear(config.embed_dim, heads * config.head_dim, config.qkv_bias)
        self.out_proj = nn.Linear(config.num_heads * config.head_dim, config.embed_dim, config.out_bias)
        window = -1 if config.window is None else config.window
        self.options: dict[str, Any] = {
            "causal": causal,
            "window_size": (window, 0 if causal else window),
            "softmax_scale": config.softmax_scale,
            "softcap": config.softcap,
        }
        slopes = alibi_slopes(config.num_heads) if config.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What casts or moves a module goes through here; slopes stay in float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.slopes is not None:
            self.slopes = alibi_slopes(self.config.num_heads).to(self.slopes.device)
        return self

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        rope: RotaryEmbedding | None = None,
        packed: Packed | None = None,
        cache: KVCache | None = None,
        bias: Tensor | None = None,
        padding: "Padding | None" = None,
    ) -> Tensor:
        """x [B, S, E] -> [B, S, E], with the residual added.

        Args:
            rope: turns queries and keys.
            packed: x is [1, T, E], the tokens of several sequences.
            cache: of this layer, with room reserved; x follows the tokens it has, and is written there.
            bias: added to the scores, [1, H, S, S]; with a cache [B, H, S, tokens of the longest]. Without
                rope and packed.
            padding: with a bias, which has no packed form: x is [1, T, E] all the same.
        """
        config, options = self.config, {**self.options, "alibi_slopes": self.slopes}
        qkv = self._project(x)
        if bias is not None:
            out = self._attend_biased(qkv, bias, cache, padding)
        elif cache is not None:
            q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
            if rope is not None:
                options |= {"cos": rope.cos, "sin": rope.sin}
            out = cache.extend(q, k, v, **options)
        else:
            q, k, v = self._turn(qkv, rope, packed)
            options["dropout_p"] = config.attention_dropout if self.training else 0.0
            if packed is not None:
                ends, longest = packed.cu_seqlens, packed.max_seqlen
                rows = attention_varlen(
                    q[0], k[0], v[0], ends, ends, max_seqlen_q=longest, max_seqlen_k=longest, **options
                )
                out = cast(Tensor, rows)[None]
            else:
                out = cast(Tensor, attention(q, k, v, **options))
        return project_out(self.out_proj, out, residual, config.dropout if self.training else 0.0)

    def weights(
        self, x: Tensor, *, rope: RotaryEmbedding | None = None, bias: Tensor | None = None, **chosen: Any
    ) -> Tensor:
        """What `forward` gives to each key, [B, heads, rows, S]; chosen: of `attention_weights`."""
        q, k, _ = self._turn(self._project(x), rope)
        return attention_weights(q, k, alibi_slopes=self.slopes, bias=bias, **self.options, **chosen)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values of [B, S, E], [B, S, H + 2 Hk, D]."""
        qkv = linear(x, self.qkv_proj.weight, self.qkv_proj.bias)
        return qkv.view(*x.shape[:2], -1, self.config.head_dim)

    def _turn(self, qkv: Tensor, rope: RotaryEmbedding | None, packed: Packed | None = None) -> list[Tensor]:
        """q, k and v, the first two turned by their positions."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        if rope is None:
            return list(qkv.split([heads, kv_heads, kv_heads], dim=2))
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)
        qk = rotary(qk, rope.cos, rope.sin, positions=packed and packed.positions)
        return [*qk.split([heads, kv_heads], dim=2), v]

    def _attend_biased(
        self, qkv: Tensor, bias: Tensor, cache: KVCache | None, padding: "Padding | None"
    ) -> Tensor:
        """Over padded rows: neither `attention_varlen` nor `attention_decode` takes a bias."""
        config, mask = self.config, None
        if padding is not None:
            qkv, mask = padding.unpack(qkv), padding.mask[:, None, None]
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
        if cache is not None:
            cache.extend(q[:, :0], k, v)  # no query: they are written, no more
            k, v = (x[:, : bias.shape[-1]] for x in (cache.k, cache.v))
        dropout_p = config.attention_dropout if self.training else 0.0
        out = cast(Tensor, attention(q, k, v, bias=bias, mask=mask, dropout_p=dropout_p, **self.options))
        return out if padding is None else padding.pack(out)


def project_out(proj: nn.Linear, heads: Tensor, residual: Tensor | None, dropout_p: float) -> Tensor:
    """residual + dropout(proj(heads)) of [B, S, H, D], in one pass."""
    flat = heads.reshape(*heads.shape[:2], -1)
    return linear(flat, proj.weight, proj.bias, residual=residual, dropout_p=dropout_p)


class Layer(nn.Module):
    """Attention and a feed-forward layer, each with its residual and its norm."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, causal)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x [B, S, E] -> [B, S, E]; the options are those of `Attention.forward`."""
        if self.pre_norm:
            x = self.attention(self.attention_norm(x), x, **options)
            return cast(Tensor, self.feed_forward(self.feed_forward_norm(x), x))
        x = self.attention_norm(self.attention(x, x, **options))
        return cast(Tensor, self.feed_forward_norm(self.feed_forward(x, x)))


def make_rope(config: ModelConfig) -> RotaryEmbedding | None:
    """The tables of a model whose positions are rotary, shared by its layers."""
    if config.positions != "rotary":
        return None
    inv_freq = config.rotary_inv_freq
    return RotaryEmbedding(
        config.rotary_dim, config.rotary_base, max_positions=config.max_positions, scale=config.rotary_scale,
        inv_freq=None if inv_freq is None else torch.tensor(inv_freq, dtype=torch.float64),
    )  # fmt: skip


def initialise(model: nn.Module, num_layers: int) -> None:
    """As GPT-2: normal with 0.02, and less for what adds to the residual stream, which grows by depth."""
    for name, p in model.named_parameters():
        if p.ndim < 2:
            if name.endswith("bias"):
                nn.init.zeros_(p)
            continue
        adds = name.endswith(("out_proj.weight", "down_proj.weight"))
        nn.init.normal_(p, std=0.02 / math.sqrt(2 * num_layers) if adds else 0.02)


def sinusoids(max_positions: int, embed_dim: int) -> Tensor:
    """Sines and cosines [max_positions, embed_dim], interleaved. Source: Vaswani et al. 2017, 3.5."""
    pairs = torch.arange(0, embed_dim, 2, dtype=torch.float64)
    positions = torch.arange(max_positions, dtype=torch.float64)
    angles = positions[:, None] * 10000.0 ** (-pairs / embed_dim)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :embed_dim].float()


def alibi_slopes(num_heads: int) -> Tensor:
    """Slopes [H]: powers of 2^(-8 / H); between two powers of two, every other one of the larger's.

    Source: Press et al. 2022, arXiv:2108.12409.
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return torch.tensor(slopes)
