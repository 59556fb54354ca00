"""The benchmark's steps of training, of tiny models: what they cost, who runs them, and their check."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.bench import measuring, suites
from fastattn.models import DecoderLM, ModelConfig
from fastattn.testing.cases import train
from fastattn.testing.cases.peers import LABELS, OURS, forget_compiled
from fastattn.testing.cases.train import TrainCase

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "embed_dim": 32,
    "num_heads": 2,
    "hidden_dim": 48,
    "max_positions": 16,
}
CASES = [
    TrainCase("tiny-llama", ModelConfig(**SIZES, num_layers=2), 1, 12),
    TrainCase("tiny-gpt2", ModelConfig.gpt2(**SIZES, num_layers=3), 2, 16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_take_the_same_step(case: TrainCase) -> None:
    found = case.check(case.make_inputs(), [OURS, "torch"])
    assert set(found.errors) == {OURS, "torch"}
    assert {OURS, *case.peers} <= set(LABELS)
    assert case.usual_peers == ("torch",)


@pytest.mark.slow
def test_the_compiled_twin_takes_the_same_step() -> None:
    forget_compiled(["compiled"])
    found = CASES[0].check(CASES[0].make_inputs(), [OURS, "compiled"])
    assert not found.skipped
    forget_compiled(["compiled"])


def test_a_call_changes_no_weight() -> None:
    x = CASES[0].make_inputs()
    call = CASES[0].bind(OURS, x)
    first, second = (call.result(call.run()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first) == len(call.names)


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = DecoderLM.loss
    monkeypatch.setattr(DecoderLM, "loss", lambda *given: 2.0 * plain(*given))
    with pytest.raises(AssertionError, match="loss: error"):
        CASES[1].check(CASES[1].make_inputs(), [OURS])


def test_work_is_that_of_the_model() -> None:
    case, x = CASES[0], CASES[0].make_inputs()
    matrices = sum(p.numel() for p in x.model.parameters() if p.ndim == 2)
    assert case.weights == matrices  # the head is the embedding
    assert case.bytes == 16 * matrices
    assert case.flops == 6 * 12 * matrices + 14 * 2 * 32 * (12 * 13 // 2)
    assert replace(case, batch=3).flops == 3 * case.flops
    assert [c.config.num_layers for c in train.TRAIN] == [12, 7]
    assert train.TRAIN[1].weights == pytest.approx(10e6, rel=0.01)


def test_it_is_measured_beside_plain_pytorch() -> None:
    row = measuring.measure_case(CASES[0], ["torch"], suites.Suite([], 0.0, 3))
    assert {OURS, "torch"} <= set(row.errors)
    assert "train" not in suites.ALL
