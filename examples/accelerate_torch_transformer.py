"""A torch.nn.Transformer, accelerated in place and given back as it was.

python examples/accelerate_torch_transformer.py
"""

import torch
from torch import nn

import fastattn


def main() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(
        d_model=256, nhead=8, num_encoder_layers=2, num_decoder_layers=2, batch_first=True
    ).eval()
    source, target = torch.randn(2, 100, 256), torch.randn(2, 80, 256)
    causal = nn.Transformer.generate_square_subsequent_mask(80)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(source, target, tgt_mask=causal, tgt_is_causal=True)

    before = run()
    handle = fastattn.accelerate(model)
    during = run()
    print(handle.report())
    print(f"largest difference: {(before - during).abs().max().item():.1e}")
    handle.remove()
    print("the same bits as before:", torch.equal(run(), before))


if __name__ == "__main__":
    main()
