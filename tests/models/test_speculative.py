"""Generation with a draft: the model's own tokens, greedy and drawn, whatever the draft guesses."""

import copy
from typing import Any

import pytest
import torch

from fastattn.models import DecoderLM, ModelConfig, Sampling
from fastattn.models.speculative import _judge

pytestmark = pytest.mark.usefixtures("default_backend")

V, POSITIONS, NEW = 64, 48, 20
PROMPTS = [[5, 9, 33, 2], [7], [1, 62, 3, 44, 12, 60, 8, 9, 10, 11, 13]]


def model_of(seed: int = 0, spread: float = 0.3, **sizes: Any) -> DecoderLM:
    """A random model, with weights so large that its tokens vary."""
    torch.manual_seed(seed)
    wanted = {"vocab_size": V, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 64,
              "max_positions": POSITIONS, "tie_embeddings": False}  # fmt: skip
    model = DecoderLM(ModelConfig(**{**wanted, **sizes})).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=spread)
    return model


def drafts() -> dict[str, DecoderLM]:
    """That guess always, never and sometimes right."""
    near = copy.deepcopy(model_of())
    torch.manual_seed(2)
    with torch.no_grad():
        for p in near.parameters():
            p += 0.02 * torch.randn_like(p)
    return {"itself": model_of(), "another": model_of(1, embed_dim=16, num_layers=1), "near": near}


@pytest.mark.parametrize("draft_tokens", [1, 4, 30])
@pytest.mark.parametrize("name", ["itself", "another", "near"])
def test_greedy_tokens_stay(name: str, draft_tokens: int) -> None:
    model, draft = model_of(), drafts()[name]
    for options in ({}, {"page_size": 4}, {"sampling": Sampling(repetition_penalty=1.3)}):
        expected = model.generate(PROMPTS, NEW, **options)
        assert model.generate(PROMPTS, NEW, draft=draft, draft_tokens=draft_tokens, **options) == expected


def test_sequences_end_where_they_would() -> None:
    model, draft = model_of(), drafts()["near"]
    whole = model.generate(PROMPTS, NEW).tokens
    for stop in whole[0][3:6]:
        expected = model.generate(PROMPTS, NEW, stop_ids=[stop], logprobs=True)
        found = model.generate(PROMPTS, NEW, stop_ids=[stop], logprobs=True, draft=draft)
        assert found.tokens == expected.tokens
        assert found.reasons == expected.reasons
        assert found.logprobs is not None and expected.logprobs is not None
        assert [len(row) for row in found.logprobs] == [len(row) for row in expected.tokens]


def test_guesses_that_hold_save_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = model_of(), list[int]()
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, **rest: calls.append(ids.shape[1]) or hidden(ids, **rest)
    )
    model.generate(PROMPTS[:1], 1 + 3 * 5, draft=model_of(), draft_tokens=4)
    assert calls == [4, 5, 5, 5]  # the prompt, then four guesses and one more at a time
    calls.clear()
    model.generate(PROMPTS[:1], 8, draft=model_of(), draft_tokens=4)
    assert calls == [4, 5, 2]


def test_the_last_position_can_be_reached() -> None:
    model, new = model_of(), POSITIONS - 10
    prompts = [[3] * 11, [4, 5]]
    expected = model.generate(prompts, new).tokens
    assert model.generate(prompts, new, draft=drafts()["near"]).tokens == expected


def test_a_cache_goes_on() -> None:
    model, draft = model_of(), drafts()["near"]
    cache, ids = model.new_cache(1), PROMPTS[0]
    for _ in range(3):
        tokens = model.generate([ids], 9, draft=draft, cache=cache).tokens[0]
        assert tokens == model.generate([ids], 9).tokens[0]
        ids = ids + tokens
        assert cache.lengths.tolist() == [len(ids) - 1]


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=0), Sampling(0.7, top_k=5, min_p=0.05, seed=1)], ids=str
)
def test_draws_are_the_models(sampling: Sampling) -> None:
    """Three tokens of many sequences at once, against three without a draft: the same distribution."""
    model, draft = (model_of(seed, 0.15, vocab_size=6, num_layers=1) for seed in (0, 1))
    count = 8000
    prompts = [[1, 2, 3]] * count

    def shares(**options: Any) -> torch.Tensor:
        tokens = torch.tensor(model.generate(prompts, 3, sampling=sampling, **options).tokens)
        return (tokens @ torch.tensor([36, 6, 1])).bincount(minlength=216) / count

    with_draft, without = shares(draft=draft, draft_tokens=2), shares()
    # Both are drawn: the variance of a difference is that of two, about p / count each.
    deviation = (2 * torch.maximum(with_draft, without).clamp(min=4 / count) / count).sqrt()
    assert ((with_draft - without).abs() < 4.5 * deviation).all()
    assert (without > 0).sum() > 20


def test_a_guess_holds_with_the_ratio_of_the_probabilities() -> None:
    ours = torch.tensor([0.5, 0.3, 0.2, 0.0])
    theirs = torch.tensor([0.1, 0.3, 0.4, 0.2])
    count = 20000
    generator = torch.Generator().manual_seed(0)
    guesses = torch.multinomial(theirs, count, replacement=True, generator=generator)[:, None]
    new, counts = _judge(guesses, ours.expand(count, 2, 4), theirs.expand(count, 1, 4), generator)
    share = new[:, 0].bincount(minlength=4) / count
    assert ((share - ours).abs() <= 4 * (ours * (1 - ours) / count).sqrt()).all()
    held = float((counts == 2).float().mean())
    assert abs(held - float(torch.minimum(ours, theirs).sum())) < 4 * (0.25 / count) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": model_of(vocab_size=32)}, "draft must have the model's vocabulary of 64, got 32"),
        ({"draft": model_of(max_positions=20)}, "draft must have at least 30 positions, got 20"),
        ({"draft": model_of(dropout=0.1).train()}, r"draft must be in eval mode, .* call draft.eval\(\)"),
        ({"draft": model_of(), "draft_tokens": 0}, "draft_tokens must be an integer of at least 1, got 0"),
    ],
)
def test_bad_drafts_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of().stream(PROMPTS, NEW, **options)
