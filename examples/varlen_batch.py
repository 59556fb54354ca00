"""Sequences of different lengths, one after the other instead of padded: no work for padding.

python examples/varlen_batch.py
"""

import torch
from torch import Tensor

import fastattn

HEADS, HEAD_DIM = 8, 64


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The usual way: [B, S, H, D] with a mask over the padding."""
    mask = torch.arange(q.shape[1]) < lengths[:, None]  # [B, S]
    return fastattn.attention(q, k, v, mask=mask[:, None, None, :])


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([37, 512, 120, 5])
    q, k, v = torch.randn(3, len(lengths), int(lengths.max()), HEADS, HEAD_DIM)
    real = torch.arange(q.shape[1]) < lengths[:, None]

    # Packed: only the real tokens, [T, H, D], and where each sequence starts.
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    out = fastattn.attention_varlen(q[real], k[real], v[real], starts, starts)

    print(f"{len(out)} tokens instead of {real.numel()}")
    difference = (out - padded(q, k, v, lengths)[real]).abs().max().item()
    print(f"largest difference from the padded way: {difference:.1e}")
    for sequence in out.split(lengths.tolist()):
        print(list(sequence.shape))


if __name__ == "__main__":
    main()
