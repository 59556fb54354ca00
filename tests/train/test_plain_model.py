"""The twin on plain PyTorch: the same model, and the same losses step by step."""

import copy
from typing import Any

import pytest
import torch

from fastattn.models import DecoderLM, ModelConfig
from fastattn.testing import compare
from fastattn.testing.plain_model import PlainLM
from fastattn.train.options import Options
from fastattn.train.trainer import make_optimizer

SIZES: dict[str, Any] = {
    "vocab_size": 40, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 16
}  # fmt: skip
CONFIGS = {
    "llama": ModelConfig(**SIZES, num_kv_heads=2),
    "gpt2": ModelConfig.gpt2(**SIZES),
    "post-norm": ModelConfig.gpt2(**SIZES, pre_norm=False, activation="relu", positions="sinusoidal"),
    "part of a head turns": ModelConfig(**SIZES, rotary_dim=4, embed_scale=2.0, head_scale=0.5),
}


def make(name: str) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(CONFIGS[name])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets [3, 16]."""
    ids = torch.randint(40, (3, 17), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_same(name: str) -> None:
    ours = make(name)
    base, truth = PlainLM(copy.deepcopy(ours)), PlainLM(copy.deepcopy(ours).double())
    losses = []
    for model in (ours, base, truth):
        losses.append(model.loss(*batch(0)))
        losses[-1].backward()
    compare.assert_close(*(x.detach() for x in losses), "loss")
    logits = [model(batch(0)[0]).detach() for model in (ours, base, truth)]
    compare.assert_close(*logits, "logits")
    for (key, p), q, t in zip(ours.named_parameters(), base.parameters(), truth.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and t.grad is not None
        compare.assert_close(p.grad, q.grad, t.grad, key)


@pytest.mark.parametrize("name", CONFIGS)
def test_twenty_steps_have_the_same_losses(name: str) -> None:
    """float64 says what they should be, and plain float32 how far rounding may lead away."""
    first = make(name)
    runs = []
    for model in (first, PlainLM(copy.deepcopy(first)), PlainLM(copy.deepcopy(first).double())):
        optimizer = make_optimizer(model, Options(lr=0.01))
        losses = []
        for step in range(20):
            loss = model.loss(*batch(step % 4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    ours, base, truth = runs
    assert truth[-1] < truth[0] - 0.3  # it has learned something
    for step in range(20):
        compare.assert_close(ours[step], base[step], truth[step], f"loss of step {step}")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"positions": "alibi"}, "no positions 'alibi'"), ({"softcap": 5.0}, r"no softcap 5\.0")],
)
def test_what_the_twin_does_not_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlainLM(DecoderLM(ModelConfig(**SIZES, **options)))
