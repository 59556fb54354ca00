"""Generation with a draft: a small model guesses some tokens, and the model looks at all of them at once.

What comes out is distributed as if the model had been alone; greedy, it is the same. Reading the weights for
five tokens takes hardly longer than for one, so every guess that is right is a step saved.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.models.cache import ModelCache
from fastattn.models.ends import Ends, NextTokens
from fastattn.models.prefill import prefill
from fastattn.models.sampling import Sampling, draw, probabilities, sample, seen_tokens
from fastattn.models.step import Step

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM
    from fastattn.models.encoder_decoder import EncoderDecoder


def check_draft(draft: "DecoderLM", vocab_size: int, prompts: list[list[int]], new: int, count: int) -> None:
    """Raises where a draft cannot guess behind these prompts, count of so many new tokens at a time."""
    config, positions = draft.config, max(map(len, prompts)) + new - 1
    if config.vocab_size != vocab_size:
        raise ValueError(f"draft must have the model's vocabulary of {vocab_size}, got {config.vocab_size}")
    if config.max_positions < positions:
        raise ValueError(f"draft must have at least {positions} positions, got {config.max_positions}")
    if draft.training and config.dropout:
        raise ValueError("draft must be in eval mode, got one that drops out values: call draft.eval()")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"draft_tokens must be an integer of at least 1, got {count!r}")


@torch.inference_mode()
def speculate(
    model: "DecoderLM | EncoderDecoder",
    draft: "DecoderLM",
    cache: ModelCache,
    prompts: list[list[int]],
    ends: Ends,
    sampling: Sampling,
    logprobs: bool,
    draft_tokens: int,
    context: dict[str, Any],
) -> Iterator[NextTokens]:
    """The loop of `generation.stream` with a draft, each of whose rounds has a few steps."""
    device = cache.lengths.device
    generator = sampling.generator(device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens(prompts, model.config.vocab_size, device)
    lengths = [len(prompt) for prompt in prompts]
    room = max(lengths) + max(ends.left)
    caches = cache, draft.new_cache(len(prompts), room)
    prefill(draft, prompts, caches[1])
    step = Step(draft, caches[1])
    logits = prefill(model, prompts, cache, **context)[:, None]  # [B, 1, V]
    new = sample(logits[:, 0], sampling, seen=seen, generator=generator)[:, None]  # [B, 1]
    counts = torch.ones_like(new[:, 0])  # how many of the new tokens are to be taken
    while True:
        before = list(ends.alive)
        steps = list(_take(ends, new, counts, logits if logprobs else None))
        # All but the last token of each sequence stays in the caches, and nothing of who ended before.
        lengths = [n + sum(x.tokens[b] is not None for x in steps) for b, n in enumerate(lengths)]
        kept = torch.tensor(
            [(n - 1) * alive for n, alive in zip(lengths, before, strict=True)], device=device
        )
        for one in caches:
            one.truncate(kept)
        yield from steps
        if not any(ends.alive):
            return
        for one in caches:
            one.truncate(kept * torch.tensor(ends.alive, device=device))
        if seen is not None:
            for row, tokens, count in zip(seen, new, counts.tolist(), strict=True):
                row[tokens[:count]] = True
        # One more comes from the model itself; nobody gets more than may still come.
        guesses = min(
            draft_tokens, min(n for n, alive in zip(ends.left, ends.alive, strict=True) if alive) - 1
        )
        last = new.gather(1, counts[:, None] - 1)  # [B, 1]
        tokens, theirs, seens = _guess(step, last[:, 0], guesses, sampling, seen, generator)
        hidden = model.hidden(torch.cat([last, tokens], 1), cache=cache, **context)
        logits = model.logits(hidden)  # [B, guesses + 1, V]
        ours = [probabilities(logits[:, i], sampling, known) for i, known in enumerate(seens)]
        new, counts = _judge(tokens, torch.stack(ours, 1), theirs, generator)


def _take(ends: Ends, new: Tensor, counts: Tensor, logits: Tensor | None) -> Iterator[NextTokens]:
    """The steps that new tokens [B, n] are, of which counts [B] hold."""
    chances = None
    if logits is not None:
        chances = logits.float().log_softmax(-1).gather(-1, new[..., None])[..., 0].T.tolist()
    held = counts.tolist()
    for i, column in enumerate(new.T[: max(held)].tolist()):
        tokens = [token if i < count else None for token, count in zip(column, held, strict=True)]
        step = ends.take(tokens, chances and chances[i])
        if any(token is not None for token in step.tokens):
            yield step


def _guess(
    step: Step,
    last: Tensor,
    count: int,
    sampling: Sampling,
    seen: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Guesses [B, count] behind the last tokens [B], the probabilities [B, count, V] that they were drawn
    from, and what was seen before each and after all."""
    tokens, theirs, seens = [last], [], [seen]
    for _ in range(count):
        theirs.append(probabilities(step(tokens[-1]), sampling, seens[-1]))
        tokens.append(draw(theirs[-1], generator))
        known = seens[-1]
        seens.append(None if known is None else known.scatter(1, tokens[-1][:, None], True))
    logits = step(tokens[-1])  # for the draft's cache: the last guess may hold
    empty = logits.new_zeros((len(last), 0, logits.shape[-1]), dtype=torch.float32)
    return (
        torch.stack(tokens, 1)[:, 1:],
        torch.stack(theirs, 1) if theirs else empty,
        seens,
    )


def _judge(
    guesses: Tensor, ours: Tensor, theirs: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Which guesses [B, n] hold, and the token behind them: new tokens [B, n + 1] and their counts [B].

    A guess holds with the ratio of the model's probability (ours [B, n + 1, V]) to the draft's (theirs
    [B, n, V]), at most 1. The token in place of the first that does not is drawn from what ours exceeds
    theirs by. Together that is a draw from ours. Source: Leviathan et al. 2023, arXiv:2211.17192.
    """
    rows, n = guesses.shape
    at = guesses[..., None]
    shares = torch.rand(rows, n, device=ours.device, generator=generator)
    holds = shares * theirs.gather(-1, at)[..., 0] < ours[:, :n].gather(-1, at)[..., 0]
    held = holds.long().cumprod(-1).sum(-1, keepdim=True)  # [B, 1]
    where = held[..., None].expand(-1, -1, ours.shape[-1])
    wanted = ours.gather(1, where)[:, 0]  # [B, V]
    rest = wanted - F.pad(theirs, (0, 0, 0, 1)).gather(1, where)[:, 0]
    rest = rest.clamp_(min=0.0)
    # Rounding alone can leave nothing.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0.0, rest, wanted)
    new = F.pad(guesses, (0, 1)).scatter(1, held, draw(rest, generator)[:, None])
    return new, held[:, 0] + 1
