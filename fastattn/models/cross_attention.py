"""Attention from one sequence to another, and the decoder layer around it."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastattn.models.cache import ModelCache
from fastattn.models.config import ModelConfig
from fastattn.models.layers import Attention, make_feed_forward, make_norm, project_out
from fastattn.models.padding import Padding
from fastattn.nn import KVCache
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen
from fastattn.ops.linear import linear


class Memory(NamedTuple):
    """What the encoder made of its sources, for the decoder to look at."""

    tokens: Tensor  # [B, S, E]; with padding [1, T, E], the tokens alone
    padding: Padding | None
    keys: ModelCache | None  # keys and values of each decoder layer, for who decodes step by step

    @property
    def batch_size(self) -> int:
        return len(self.tokens if self.padding is None else self.padding.mask)

    @property
    def hidden(self) -> Tensor:
        """[B, S, E], zeros at padding."""
        return self.tokens if self.padding is None else self.padding.unpack(self.tokens)


class CrossAttention(nn.Module):
    """The decoder's tokens look at the memory. kv_proj's rows are the Hk heads of keys, then of values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, inner = config.embed_dim, config.num_heads * config.head_dim
        self.q_proj = nn.Linear(size, inner, config.qkv_bias)
        self.kv_proj = nn.Linear(size, 2 * config.num_kv_heads * config.head_dim, config.qkv_bias)
        self.out_proj = nn.Linear(inner, size, config.out_bias)
        self.options: dict[str, Any] = {"softmax_scale": config.softmax_scale, "softcap": config.softcap}

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, Hk, D] of a memory's tokens [B, S, E]."""
        kv = linear(tokens, self.kv_proj.weight, self.kv_proj.bias)
        k, v = kv.view(*tokens.shape[:2], 2, -1, self.config.head_dim).unbind(2)
        return k, v

    def forward(self, x: Tensor, residual: Tensor, memory: Memory, keys: KVCache | None = None) -> Tensor:
        """x [B, S, E] -> [B, S, E], with the residual added.

        Args:
            keys: of the memory, which were projected before. Default: they are projected now.
        """
        q = linear(x, self.q_proj.weight, self.q_proj.bias).unflatten(-1, (-1, self.config.head_dim))
        if keys is not None:
            out = keys.extend(q, **self.options)
        else:
            k, v = self.project(memory.tokens)
            out = self._attend(q, k, v, memory.padding)
        return project_out(self.out_proj, out, residual, self.config.dropout if self.training else 0.0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
        options = {**self.options, "dropout_p": self.config.attention_dropout if self.training else 0.0}
        if padding is None:
            return cast(Tensor, attention(q, k, v, **options))
        batch, length = q.shape[:2]
        starts = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device)
        packed = padding.packed
        rows = attention_varlen(
            q.flatten(0, 1), k[0], v[0], starts, packed.cu_seqlens, length, packed.max_seqlen, **options
        )
        return cast(Tensor, rows).view(q.shape)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and a feed-forward layer, with their residuals and norms."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, causal=True)
        self.cross_attention_norm = make_norm(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config)

    def forward(self, x: Tensor, memory: Memory, keys: KVCache | None = None, **options: Any) -> Tensor:
        """x [B, S, E] -> [B, S, E]; the options are those of `Attention.forward`."""
        if self.pre_norm:
            x = self.attention(self.attention_norm(x), x, **options)
            x = self.cross_attention(self.cross_attention_norm(x), x, memory, keys)
            return cast(Tensor, self.feed_forward(self.feed_forward_norm(x), x))
        x = self.attention_norm(self.attention(x, x, **options))
        x = self.cross_attention_norm(self.cross_attention(x, x, memory, keys))
        return cast(Tensor, self.feed_forward_norm(self.feed_forward(x, x)))
