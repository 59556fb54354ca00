"""An encoder-decoder that learns to read dates: "the 3rd of May, 1987" becomes "1987-05-03".

python examples/seq2seq_dates.py   (one minute, then 99 % of unseen dates are right)
"""

import datetime
import random

import torch
from torch import Tensor

from fastattn.models import EncoderDecoder, ModelConfig

PAD, START, STEPS = 0, 1, 1000
FORMS = ("%d %B %Y", "%B %d, %Y", "%d/%m/%Y", "%a %d %b %Y", "%b %d %y", "the %d of %B, %Y", "%A, %B %d %Y")
LETTERS = "0123456789-/, abcdefghijklmnopqrstuvwxyz"
IDS = {letter: i + 2 for i, letter in enumerate(LETTERS)}


def batch(rng: random.Random, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sources [B, S] padded at the right, their lengths [B], and targets [B, 10]."""
    sources, targets = [], []
    for _ in range(count):
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=rng.randrange(25000))
        sources.append(torch.tensor([IDS[letter] for letter in date.strftime(rng.choice(FORMS)).lower()]))
        targets.append([IDS[letter] for letter in date.isoformat()])
    padded = torch.nn.utils.rnn.pad_sequence(sources, True, PAD)
    return padded, torch.tensor([len(source) for source in sources]), torch.tensor(targets)


@torch.inference_mode()
def translate(model: EncoderDecoder, source: Tensor, lengths: Tensor, length: int) -> Tensor:
    """Greedy: the source's keys are computed once, the target's are cached."""
    memory, cache = model.encode(source, lengths=lengths), model.new_cache(len(source), length)
    tokens = [torch.full((len(source), 1), START)]
    for _ in range(length):
        tokens.append(model.decode(tokens[-1], memory, cache=cache).argmax(-1))
    return torch.cat(tokens[1:], dim=1)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 128, "num_layers": 2, "num_heads": 4, "hidden_dim": 512, "max_positions": 32}
    choices = {"vocab_size": len(LETTERS) + 2, "pre_norm": True, "decoder_start_id": START}
    model, rng = EncoderDecoder(ModelConfig.vaswani(**sizes, **choices)), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        source, lengths, target = batch(rng, 64)
        optimizer.zero_grad()
        loss = model.loss(source, target, lengths=lengths)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    source, lengths, target = batch(random.Random(1), 1000)
    right = (translate(model.eval(), source, lengths, 10) == target).all(1).sum().item()
    print(f"{right / 10:.1f}% of 1000 unseen dates are right")


main()
