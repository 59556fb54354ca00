"""torch.nn.LinearCrossEntropyLoss on fastattn: a language model's head and its loss, without the logits."""

import torch
from torch import Tensor, nn

from fastattn.ops.linear_cross_entropy import REDUCTIONS, linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """The cross entropy of linear(x), which is never stored.

    Constructor and state_dict keys are those of torch.nn.LinearCrossEntropyLoss, which torch has since 2.11;
    targets are classes, not probabilities. What torch's has not comes last:

    Args:
        weight: [num_classes], each class's share in the loss of its tokens.
        ignore_index: tokens with this target do not count; None means -100.
        z_loss: adds z_loss * lse^2 per token.
        softcap: bounds the logits to (-softcap, softcap); 0 means none.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        z_loss: float = 0.0,
        softcap: float = 0.0,
    ) -> None:
        if out_features != ():
            raise ValueError(f"out_features must be (), one class a token, got {out_features}")
        if options is not None:
            raise ValueError("options must be None: they say how torch cuts the logits, which are not here")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must have shape [{num_classes}], got {list(weight.shape)}")
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input [..., in_features], target int64 [...] -> a scalar, or [...] where reduction is "none"."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            bias=self.linear.bias,
            class_weight=None if self.weight is None else self.weight.float(),
            ignore_index=-100 if self.ignore_index is None else self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        names = ("reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
