"""torch.nn's Transformer layers on fastattn: the same constructors, state_dict keys and calls."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn import nested
from fastattn.nn.activation import Activation, fused_name
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.linear import linear


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on fused attention and a fused feed-forward layer.

    Differs from torch's as `fastattn.nn.MultiheadAttention` differs from torch's, and in:

    Args:
        activation: a name that `fastattn.feed_forward` has, or a callable. torch's own functions and
            modules are fused too; any other callable runs between two fused products.
        save_memory: keep nothing of size dim_feedforward for the backward pass, which computes it again.
    """

    activation: Activation  # type: ignore[assignment]  # torch keeps names as callables

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        save_memory: bool = False,
    ) -> None:
        fused_name(activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, F.relu, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = _ours(self.self_attn)
        self.activation = activation
        self.save_memory = save_memory

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch's; see `fastattn.nn.MultiheadAttention.forward` for the masks and is_causal."""

        def attend(x: Tensor) -> Tensor:
            out = _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)
            return cast(Tensor, self.dropout1(out))

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return _feed_forward(self, self.norm2(x), x, self.dropout2)
        x = self.norm1(src + attend(src))
        return cast(Tensor, self.norm2(_feed_forward(self, x, x, self.dropout2)))


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on fused attention and a fused feed-forward layer.

    Differs from torch's as `fastattn.nn.TransformerEncoderLayer` does, with the same arguments.
    """

    activation: Activation  # type: ignore[assignment]  # torch keeps names as callables

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        save_memory: bool = False,
    ) -> None:
        fused_name(activation)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, F.relu, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = _ours(self.self_attn)
        self.multihead_attn = _ours(self.multihead_attn)
        self.activation = activation
        self.save_memory = save_memory

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's would hide an activation that is a module behind F.relu, in every copy.
        nn.Module.__setstate__(self, state)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's; see `fastattn.nn.MultiheadAttention.forward` for the masks and is_causal."""

        def attend(x: Tensor) -> Tensor:
            out = _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            return cast(Tensor, self.dropout1(out))

        def look_up(x: Tensor) -> Tensor:
            masks = (memory_mask, memory_key_padding_mask)
            out = _attend(self.multihead_attn, x, memory, *masks, memory_is_causal)
            return cast(Tensor, self.dropout2(out))

        if self.norm_first:
            x = tgt + attend(self.norm1(tgt))
            x = x + look_up(self.norm2(x))
            return _feed_forward(self, self.norm3(x), x, self.dropout3)
        x = self.norm1(tgt + attend(tgt))
        x = self.norm2(x + look_up(x))
        return cast(Tensor, self.norm3(_feed_forward(self, x, x, self.dropout3)))


def _ours(theirs: nn.MultiheadAttention) -> MultiheadAttention:
    """In torch's place, with torch's very parameters, so that no other random numbers are drawn."""
    ours = MultiheadAttention(
        theirs.embed_dim, theirs.num_heads, theirs.dropout, theirs.in_proj_bias is not None,
        batch_first=theirs.batch_first, device="meta",
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict(keep_vars=True), assign=True)
    return ours


def _attend(
    attention: nn.Module, x: Tensor, keys: Tensor, mask: Tensor | None, padding: Tensor | None, causal: bool
) -> Tensor:
    out, _ = attention(
        x, keys, keys, key_padding_mask=padding, need_weights=False, attn_mask=mask, is_causal=causal
    )
    return cast(Tensor, out)


def _feed_forward(
    layer: TransformerEncoderLayer | TransformerDecoderLayer, x: Tensor, residual: Tensor, dropout: nn.Dropout
) -> Tensor:
    """residual + the layer's two products of x, with an activation and a dropout between them."""
    if x.is_nested:
        rows, starts = nested.pack(x)
        out = _feed_forward(layer, rows, nested.pack(residual)[0], dropout)
        return nested.unpack(out, starts, x)
    up, down = layer.linear1, layer.linear2
    name = fused_name(layer.activation)
    if name is None:
        assert callable(layer.activation)
        hidden = layer.dropout(layer.activation(linear(x, up.weight, up.bias)))
        return linear(hidden, down.weight, down.bias, residual=residual, dropout_p=_share(dropout))
    return feed_forward(
        x, up.weight, up.bias, down.weight, down.bias, activation=name, residual=residual,
        dropout_p=_share(dropout), hidden_dropout_p=_share(layer.dropout), save_memory=layer.save_memory,
    )  # fmt: skip


def _share(dropout: nn.Dropout) -> float:
    """What it drops now."""
    return dropout.p if dropout.training else 0.0
