"""Linear layers with what follows them, and the feed-forward layers of a Transformer."""

import torch
from torch import Tensor, nn

from fastattn.ops._activation import check_activation
from fastattn.ops._checks_linear import check_dropout
from fastattn.ops.feed_forward import feed_forward
from fastattn.ops.gated_feed_forward import gated_feed_forward
from fastattn.ops.linear import linear


class Linear(nn.Linear):
    """torch.nn.Linear with the activation and the residual in the same pass.

    Args:
        activation: applied to the result; None or a name that `fastattn.linear` has.
    Raises:
        ValueError: the activation is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """residual + activation(input weight^T + bias)."""
        return linear(input, self.weight, self.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


class _FeedForward(nn.Module):
    """What both kinds have: numbers, and two dropouts that stop in evaluation."""

    def __init__(
        self, activation: str | None, dropout: float, hidden_dropout: float, save_memory: bool
    ) -> None:
        check_activation(activation)
        check_dropout(0, dropout=dropout, hidden_dropout=hidden_dropout)
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.hidden_dropout = hidden_dropout
        self.save_memory = save_memory

    def _dropouts(self) -> tuple[float, float]:
        return (self.dropout, self.hidden_dropout) if self.training else (0.0, 0.0)

    def extra_repr(self) -> str:
        names = ("activation", "dropout", "hidden_dropout", "save_memory")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class FeedForward(_FeedForward):
    """down_proj(activation(up_proj(x))): the feed-forward layer of a Transformer.

    up_proj and down_proj are torch.nn.Linear and hold the parameters; their forward is not called.

    Args:
        activation: None or a name that `fastattn.feed_forward` has.
        dropout: of the output, before a residual is added.
        hidden_dropout: of what the activation gives.
        save_memory: keep nothing of size hidden_dim for the backward pass, which computes it again.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str | None = "gelu",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        bias: bool = True,
        save_memory: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, dropout, hidden_dropout, save_memory)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., embed_dim] -> [..., embed_dim]; a residual of this shape is added."""
        dropout, hidden_dropout = self._dropouts()
        return feed_forward(
            x, self.up_proj.weight, self.up_proj.bias, self.down_proj.weight, self.down_proj.bias,
            activation=self.activation, residual=residual, dropout_p=dropout,
            hidden_dropout_p=hidden_dropout, save_memory=self.save_memory,
        )  # fmt: skip


class GatedFeedForward(_FeedForward):
    """down_proj(activation(gate_proj(x)) * up_proj(x)): SwiGLU and its kin.

    The names are those of Llama and its descendants, whose MLPs load as they are. gate_proj, up_proj and
    down_proj are torch.nn.Linear and hold the parameters; their forward is not called.

    Args:
        activation: of the gate; None or a name that `fastattn.gated_feed_forward` has.
        dropout: of the output, before a residual is added.
        hidden_dropout: of the product of gate and up.
        save_memory: keep nothing of size hidden_dim for the backward pass, which computes it again.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str | None = "silu",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        bias: bool = False,
        save_memory: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(activation, dropout, hidden_dropout, save_memory)
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, bias, device, dtype)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, bias, device, dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., embed_dim] -> [..., embed_dim]; a residual of this shape is added."""
        dropout, hidden_dropout = self._dropouts()
        return gated_feed_forward(
            x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight,
            b_gate=self.gate_proj.bias, b_up=self.up_proj.bias, b_down=self.down_proj.bias,
            activation=self.activation, residual=residual, dropout_p=dropout,
            hidden_dropout_p=hidden_dropout, save_memory=self.save_memory,
        )  # fmt: skip
