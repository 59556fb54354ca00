"""The dropout mask every backend draws: Philox4x32-10, counted by position.

A position's random word depends on the seed and on where it stands, never on thread, block or backend:
key = seed (low word, high word), counter = (column // 4, row, plane, 0), word = column % 4, and a
position is kept when its word is at least `threshold(p)`. Source: Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept when a share p of all positions is dropped."""
    return min(round(p * 2**32), _LOW)


def draw_seed() -> Tensor:
    """A seed from torch's default CPU generator, so that `torch.manual_seed` rules it. int64, shape []."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64)


def keep_mask(seed: Tensor, p: float, planes: int, rows: int, columns: int, first: int = 0) -> Tensor:
    """True where a position survives: bool [planes, rows, columns], from plane `first` on."""
    device = seed.device
    quads = (columns + 3) // 4
    shape = (planes, rows, quads)
    counter = [
        torch.arange(quads, device=device).expand(shape),
        torch.arange(rows, device=device)[:, None].expand(shape),
        torch.arange(first, first + planes, device=device)[:, None, None].expand(shape),
        torch.zeros(shape, dtype=torch.int64, device=device),
    ]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    words = torch.stack(counter, dim=-1).flatten(-2)
    return words[..., :columns] >= threshold(p)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low halves of a 32 x 32 bit product, in int64 without overflow."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & _LOW, total & _LOW
