"""Sampling: what transformers' logits processors keep, and the tokens it draws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.models import Sampling
from fastattn.models.sampling import logprobs_of, penalise, sample, seen_tokens, warp
from fastattn.testing.compare import assert_close

B, V = 3, 701  # more than the tokens that top-p looks at first; no share of it is a whole number


@pytest.fixture(scope="module")
def theirs() -> Any:
    pytest.importorskip("transformers")
    from transformers.generation import logits_process

    return logits_process


def scores(seed: int = 0, spread: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)).mul(spread).to(dtype)


def processors(theirs: Any, sampling: Sampling) -> Any:
    """What transformers' generate makes of the same numbers, in its order."""
    found = theirs.LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        found.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    found.append(theirs.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(theirs.MinPLogitsWarper(sampling.min_p))
    return found


CHOICES = [
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=17),
    Sampling(1.0, top_k=V),
    Sampling(1.0, top_k=V + 5),
    Sampling(1.0, top_p=0.0),
    Sampling(1.0, top_p=0.3),
    Sampling(1.0, top_p=0.999),
    Sampling(1.0, min_p=0.05),
    Sampling(1.0, min_p=1.0),
    Sampling(2.0, top_k=50, top_p=0.9, min_p=0.02),
    Sampling(0.5, top_p=0.95, repetition_penalty=1.3),
    Sampling(1.5, top_k=5, repetition_penalty=0.6),
]


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])  # all alike, a flat distribution, a steep one
@pytest.mark.parametrize("sampling", CHOICES, ids=str)
def test_scores_are_those_of_transformers(theirs: Any, sampling: Sampling, spread: float) -> None:
    logits = scores(spread=spread)
    ids = torch.randint(0, V, (B, 40), generator=torch.Generator().manual_seed(1))
    expected = processors(theirs, sampling)(ids, logits)
    found = penalise(logits, sampling.repetition_penalty, seen_tokens(ids.tolist(), V, logits.device))
    ours = warp(found, sampling)
    if spread == 0.0:  # which of equals stay is by chance there
        ours, expected = ours.sort().values, expected.sort().values
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.75, 0.97])
def test_top_p_with_equals_is_that_of_transformers(theirs: Any, top_p: float) -> None:
    logits = scores(dtype=torch.bfloat16).float()  # so few digits that many are equal
    sampling = Sampling(1.0, top_p=top_p)
    ours, expected = warp(logits, sampling), processors(theirs, sampling)(None, logits)
    assert torch.equal(ours.sort().values, expected.sort().values)


def test_top_p_stops_where_the_sum_is_reached() -> None:
    logits = torch.tensor([[0.125, 0.5, 0.125, 0.25]]).log()
    for top_p, kept in ((0.5, [1]), (0.6, [1, 3]), (0.75, [1, 3]), (1.0, [0, 1, 2, 3])):
        assert warp(logits, Sampling(1.0, top_p=top_p)).isfinite().nonzero()[:, 1].tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_argmax(dtype: torch.dtype) -> None:
    logits = scores(dtype=dtype)
    for sampling in (Sampling(), Sampling(top_k=3, top_p=0.1, min_p=0.5)):
        assert torch.equal(sample(logits, sampling), logits.argmax(-1))


def test_greedy_heeds_the_penalty() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    seen = torch.tensor([[True, False, False]])
    assert sample(logits, Sampling(repetition_penalty=1.1), seen=seen).tolist() == [1]
    assert sample(-logits, Sampling(repetition_penalty=0.1), seen=~seen).tolist() == [2]


def test_the_seed_decides() -> None:
    logits, sampling = scores(spread=0.1), Sampling(1.0, seed=5)

    def draw(sampling: Sampling) -> list[list[int]]:
        generator = sampling.generator(logits.device)
        return [sample(logits, sampling, generator=generator).tolist() for _ in range(4)]

    assert draw(sampling) == draw(sampling) != draw(Sampling(1.0, seed=6))
    torch.manual_seed(5)
    assert draw(Sampling(1.0)) == draw(sampling)  # without a seed torch's own generator goes on


def test_what_is_cut_off_is_never_drawn() -> None:
    logits = scores(spread=0.1).repeat(200, 1)
    sampling = Sampling(1.0, top_k=40, top_p=0.9)
    tokens = sample(logits, sampling, generator=torch.Generator().manual_seed(0))
    assert warp(logits, sampling).gather(-1, tokens[:, None]).isfinite().all()
    assert len(tokens.unique()) > 40


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(4000, 3)
    tokens = sample(logits, Sampling(1.0), generator=torch.Generator().manual_seed(0))
    share = tokens.bincount(minlength=3) / 4000
    sigma = (torch.tensor([0.1, 0.2, 0.7]) * torch.tensor([0.9, 0.8, 0.3]) / 4000).sqrt()
    assert ((share - torch.tensor([0.1, 0.2, 0.7])).abs() < 4 * sigma).all()


def test_logprobs_are_of_the_bare_logits() -> None:
    logits, tokens = scores(), torch.tensor([3, 0, V - 1])
    base, truth = (x.log_softmax(-1)[torch.arange(B), tokens] for x in (logits, logits.double()))
    assert_close(logprobs_of(logits, tokens), base, truth)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0, .* got -0.1"),
        ({"temperature": 1e-9}, "at least 1e-06, got 1e-09"),
        ({"temperature": math.nan}, "temperature must be .* got nan"),
        ({"temperature": math.inf}, "temperature must be .* got inf"),
        ({"top_k": -1}, "top_k must be an integer .* got -1"),
        ({"top_k": 2.0}, "top_k must be an integer .* got 2.0"),
        ({"top_k": None}, "top_k must be an integer .* got None"),
        ({"top_p": 1.1}, "top_p must be in 0 ... 1, got 1.1"),
        ({"min_p": -0.5}, "min_p must be in 0 ... 1, got -0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and over 0, got 0.0"),
        ({"seed": -1}, "seed must be an integer .* got -1"),
        ({"seed": True}, "seed must be an integer .* got True"),
    ],
)
def test_bad_numbers_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_a_penalty_needs_what_was_seen() -> None:
    with pytest.raises(ValueError, match="seen must say which tokens were there"):
        sample(scores(), Sampling(repetition_penalty=2.0))
