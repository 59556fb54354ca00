"""torch.nn.LayerNorm and torch.nn.RMSNorm on fastattn, with a residual that is added in the same pass."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastattn.ops._checks import check_tensor
from fastattn.ops.layer_norm import layer_norm
from fastattn.ops.rms_norm import rms_norm

Normed = Tensor | tuple[Tensor, Tensor]  # out; or out and total, where there was a residual


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm: the same arguments, parameters and state_dict keys."""

    # torch says Tensor; what there is besides comes with a second argument.
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Normed:  # type: ignore[override]
        """The norm of input; or that of total = input + residual, and total."""
        x = _rows("input", input, self.normalized_shape)
        total = None if residual is None else _rows("residual", residual, self.normalized_shape)
        weight, bias = _row(self.weight), _row(self.bias)
        return _shaped(layer_norm(x, weight, bias, eps=self.eps, residual=total), input)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm: the same arguments, parameters and state_dict keys.

    Args:
        weight_offset: is added to the weight, which then starts at 1 - weight_offset; Gemma's models have 1.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
    ) -> None:
        if weight_offset != 0.0 and not elementwise_affine:
            raise ValueError(f"weight_offset needs elementwise_affine=True, got {weight_offset}")
        self.weight_offset = weight_offset  # before torch's constructor resets the weight
        super().__init__(cast(list[int], normalized_shape), eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Sets the weight so that it multiplies by 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Normed:  # type: ignore[override]
        """The norm of x; or that of total = x + residual, and total."""
        rows = _rows("x", x, self.normalized_shape)
        total = None if residual is None else _rows("residual", residual, self.normalized_shape)
        # As torch: of the type in which it is computed.
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        found = rms_norm(rows, _row(self.weight), eps=eps, residual=total, weight_offset=self.weight_offset)
        return _shaped(found, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_offset={self.weight_offset}"


def _rows(name: str, x: Tensor, normalized_shape: tuple[int, ...]) -> Tensor:
    """x with the dimensions that are normalised made one."""
    check_tensor(name, x)
    if x.shape[-len(normalized_shape) :] != normalized_shape:
        raise ValueError(f"{name} must end in normalized_shape {normalized_shape}, got {list(x.shape)}")
    return x if len(normalized_shape) == 1 else x.flatten(-len(normalized_shape))


def _row(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.ndim == 1 else p.flatten()


def _shaped(found: Normed, x: Tensor) -> Normed:
    if isinstance(found, Tensor):
        return found if found.ndim == x.ndim else found.view(x.shape)
    out, total = found
    return (out, total) if out.ndim == x.ndim else (out.view(x.shape), total.view(x.shape))
