"""Attention in your own model: take torch.nn's module out, put ours in; nothing else changes.

python examples/drop_in_module.py
"""

import time

import torch
from torch import nn

import fastattn


class Classifier(nn.Module):
    """A patch classifier as people write it: one attention layer, one MLP, a mean and a head."""

    def __init__(self, attention: type[nn.Module], embed_dim: int = 256) -> None:
        super().__init__()
        self.attention = attention(embed_dim, 8, batch_first=True)
        self.norm = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )
        self.head = nn.Linear(embed_dim, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x))).mean(dim=1))


def milliseconds(model: nn.Module, x: torch.Tensor) -> float:
    """Of one training step, the better of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(x).square().mean().backward()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    torch.manual_seed(0)
    theirs = Classifier(nn.MultiheadAttention)
    ours = Classifier(fastattn.nn.MultiheadAttention)
    ours.load_state_dict(theirs.state_dict())  # the same keys, the same weights

    x = torch.randn(4, 512, 256)
    difference = (theirs(x) - ours(x)).abs().max().item()
    print(f"largest difference of the logits: {difference:.1e}")
    before, after = milliseconds(theirs, x), milliseconds(ours, x)
    print(f"a training step: {before:.0f} ms with torch.nn, {after:.0f} ms with fastattn.nn")


if __name__ == "__main__":
    main()
