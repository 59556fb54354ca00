"""The thin Transformer trained by PyTorch Lightning: a small language model of this file's own folder.

python examples/lightning_train.py [STEPS]   (needs the package lightning)
"""

import sys
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastattn.models import DecoderLM, ModelConfig

LENGTH = 128


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Bytes of a text, and the bytes that follow them."""

    def __init__(self, text: bytes) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.tokens) - LENGTH

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor]:
        return self.tokens[at : at + LENGTH], self.tokens[at + 1 : at + LENGTH + 1]


class ByteModel(lightning.LightningModule):
    """Any of fastattn's models is a torch.nn.Module: Lightning needs to know nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DecoderLM(ModelConfig(256, 128, 2, 4, 384, LENGTH))  # rotary, SwiGLU, RMS norm

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.model.loss(*batch)  # fused head and cross entropy: no logits in memory
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(steps: int) -> float:
    lightning.seed_everything(0)
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    batches = DataLoader(Windows(text), batch_size=16, shuffle=True)
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(ByteModel(), batches)
    loss = float(trainer.callback_metrics["loss"])
    print(f"loss after {steps} steps: {loss:.2f} nats a byte")
    return loss


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
