"""A DecoderLM's twin on torch.nn.functional alone: the same parameters, the same numbers but for rounding.

It is what whole models are held against, step by step in training, and what they are timed against.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import DecoderLM
from fastattn.models.layers import Attention, Layer
from fastattn.nn import FeedForward, GatedFeedForward

_ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class PlainLM(nn.Module):
    """Computes what a DecoderLM does, from that model's own parameters, in their type.

    Args:
        model: whose positions are rotary, learned, sinusoidal or none, without window and softcap.
    Raises:
        ValueError: the model has something else.
    """

    def __init__(self, model: DecoderLM) -> None:
        super().__init__()
        config = model.config
        refused = {
            "positions": config.positions == "alibi",
            "window": config.window is not None,
            "softcap": config.softcap > 0.0,
            "num_segments": config.num_segments > 0,
            "activation": config.activation not in _ACTIVATIONS,
        }
        if found := [name for name, is_refused in refused.items() if is_refused]:
            raise ValueError(f"a plain model has no {found[0]} {getattr(config, found[0])!r}")
        self.model, self.config = model, config
        if model.rope is not None:
            # In the weights' type: a model in float64 is to be exact.
            dtype = model.embedding.tokens.weight.dtype
            positions = torch.arange(config.max_positions, dtype=torch.float64)
            angles = positions[:, None] * torch.tensor(model.rope._inv_freq, dtype=torch.float64)
            for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
                self.register_buffer(name, (table * config.rotary_scale).to(dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, S, V] of ids [B, S]."""
        config = self.config
        x = F.embedding(ids, self.model.embedding.tokens.weight) * config.embed_scale
        if self.model.embedding.positions is not None:
            x = x + self.model.embedding.positions[: ids.shape[1]].to(x.dtype)
        if self.model.embedding.norm is not None:
            x = self._norm(self.model.embedding.norm, x)
        x = self._drop(x)
        for layer in self.model.layers:
            x = self._layer(cast(Layer, layer), x)
        if config.pre_norm:
            x = self._norm(self.model.final_norm, x)
        return F.linear(x * config.head_scale, self.model.head.weight, self.model.head.bias)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy against targets [B, S]; in float32 or wider, as in `DecoderLM.loss`."""
        logits = self(ids).flatten(0, 1)  # [B S, V]
        wide = logits if logits.dtype is torch.float64 else logits.float()
        return F.cross_entropy(wide, targets.flatten())

    def _layer(self, layer: Layer, x: Tensor) -> Tensor:
        attend, feed = layer.attention, layer.feed_forward
        if layer.pre_norm:
            x = x + self._drop(self._attention(attend, self._norm(layer.attention_norm, x)))
            return x + self._drop(self._feed_forward(feed, self._norm(layer.feed_forward_norm, x)))
        x = self._norm(layer.attention_norm, x + self._drop(self._attention(attend, x)))
        return self._norm(layer.feed_forward_norm, x + self._drop(self._feed_forward(feed, x)))

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        if self.config.norm == "rms_norm":
            return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _attention(self, layer: Attention, x: Tensor) -> Tensor:
        config = self.config
        qkv = F.linear(x, layer.qkv_proj.weight, layer.qkv_proj.bias)
        qkv = qkv.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # [B, H + 2 Hk, S, D]
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if config.positions == "rotary":
            q, k = self._turn(q), self._turn(k)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=config.softmax_scale, enable_gqa=q.shape[1] != k.shape[1],
            dropout_p=config.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        return F.linear(out.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)

    def _turn(self, x: Tensor) -> Tensor:
        """Rotates pairs (i, i + rotary_dim / 2) of x [B, H, S, D] by the angles of their positions."""
        cos, sin = (cast(Tensor, table)[: x.shape[2]].to(x.dtype) for table in (self.cos, self.sin))
        turned, rest = x.split([self.config.rotary_dim, x.shape[-1] - self.config.rotary_dim], dim=-1)
        a, b = turned.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    def _feed_forward(self, layer: FeedForward | GatedFeedForward, x: Tensor) -> Tensor:
        activate = _ACTIVATIONS[self.config.activation]
        hidden = F.linear(x, layer.up_proj.weight, layer.up_proj.bias)
        if isinstance(layer, GatedFeedForward):
            hidden = activate(F.linear(x, layer.gate_proj.weight, layer.gate_proj.bias)) * hidden
        else:
            hidden = activate(hidden)
        return F.linear(hidden, layer.down_proj.weight, layer.down_proj.bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)
