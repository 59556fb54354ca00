"""Rotary position embedding as a module: keeps the tables that the op reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.ops._checks import check_tensor
from fastattn.ops.rotary import rotary


class RotaryEmbedding(nn.Module):
    """Turns queries or keys [B, S, H, D] by the angles of their positions. Has no parameters.

    Pair i of a head turns by position * base ** (-2 i / dim). The tables are buffers that go along to other
    devices, stay in float32 whatever the module is cast to, and are in no state_dict.

    Args:
        dim: how many values of a head are turned, the first ones; even.
        base: of the wavelengths.
        interleaved: pairs are (0, 1), (2, 3), ...; else value i goes with value i + dim / 2.
        max_positions: for how many positions there are angles.
        inv_freq: [dim / 2], the angle of each pair at position 1, instead of the powers of base; what models
            with a longer context than they were trained on scale.
        scale: multiplies cosines and sines, as YaRN does.
        device: of the tables.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    cos: Tensor  # [max_positions, dim / 2], float32
    sin: Tensor

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        *,
        max_positions: int = 4096,
        inv_freq: Tensor | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and at least 2, got {dim}")
        if not base > 0.0:
            raise ValueError(f"base must be positive, got {base}")
        if max_positions < 1:
            raise ValueError(f"max_positions must be at least 1, got {max_positions}")
        if inv_freq is None:
            inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        elif inv_freq.shape != (dim // 2,):
            raise ValueError(f"inv_freq must have shape [dim / 2] = [{dim // 2}], got {list(inv_freq.shape)}")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        self.max_positions, self.scale = max_positions, scale
        # A list, which no cast reaches.
        self._inv_freq: list[float] = inv_freq.tolist()
        self._make_tables(torch.get_default_device() if device is None else torch.device(device))

    def _make_tables(self, device: torch.device) -> None:
        """The angles in float64, since large ones leave a float32 few digits behind the point."""
        positions = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angles = positions[:, None] * torch.tensor(self._inv_freq, dtype=torch.float64, device="cpu")
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, (table * self.scale).float().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What casts or moves a module goes through here; tables are made anew where it went.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._make_tables(self.cos.device)
        return self

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x turned; in x's shape and type.

        Args:
            x: [B, S, H, D], D >= dim.
            positions: int32 or int64, [B, S] or [S], below max_positions. Default: 0 ... S - 1.
        """
        check_tensor("x", x)
        if positions is None and x.ndim == 4 and x.shape[1] > self.max_positions:
            raise ValueError(f"x has {x.shape[1]} tokens, and max_positions is {self.max_positions}")
        return rotary(x, self.cos, self.sin, positions=positions, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, base={self.base}, interleaved={self.interleaved}, "
            f"max_positions={self.max_positions}, scale={self.scale}"
        )
