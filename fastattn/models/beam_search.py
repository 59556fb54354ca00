"""Beam search: the sequences whose tokens together are likeliest, as far as some beams see."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.models.checks import check_prompts, check_stop_ids
from fastattn.models.prefill import prefill
from fastattn.models.step import Step

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM


class Beam(NamedTuple):
    """One way on from a prompt."""

    tokens: list[int]  # the new ones
    score: float  # the sum of their logprobs, over length ** length_penalty
    reason: str  # "stop" at a stop token, "length" after max_new_tokens


@torch.inference_mode()
def beam_search(
    model: "DecoderLM",
    prompts: Tensor | Sequence[Sequence[int] | Tensor],
    max_new_tokens: int,
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    cache_dtype: torch.dtype | None = None,
) -> list[list[Beam]]:
    """The best num_beams ways on from each prompt, best first; those that transformers finds.

    It ends where the best unfinished beam scores no better than the worst of num_beams finished ones.

    Args:
        prompts: ids [B, S], or B lists of them of any lengths.
        num_beams: W, how many ways are followed.
        length_penalty: over 0 favours long sequences, under 0 short ones.
        stop_ids: tokens that end a sequence. Default: the config's eos_ids.
        cache_dtype: of keys and values. Default: the weights' type.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """
    ids, config = check_prompts(prompts, model.config, max_new_tokens), model.config
    if (
        isinstance(num_beams, bool)
        or not isinstance(num_beams, int)
        or not 1 <= num_beams <= config.vocab_size
    ):
        raise ValueError(f"num_beams must be in 1 ... {config.vocab_size}, got {num_beams!r}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    if model.training and config.dropout:
        raise ValueError("model must be in eval mode, got one that drops out values: call model.eval()")
    stops = check_stop_ids(stop_ids, config)
    options: dict[str, Any] = {} if cache_dtype is None else {"dtype": cache_dtype}
    once = model.new_cache(len(ids), max(map(len, ids)) + max_new_tokens, **options)
    logits = prefill(model, ids, once).repeat_interleave(num_beams, 0)  # [B W, V]
    cache = once.repeat(num_beams)
    step = Step(model, cache)
    searches = [_Search(num_beams, max_new_tokens, length_penalty, stops) for _ in ids]
    # As many as may end, and W to go on with.
    wanted = min(num_beams * (1 + max(1, len(stops))), num_beams * config.vocab_size)
    while True:
        known = torch.tensor([search.scores for search in searches], device=logits.device)  # [B, W]
        totals = logits.float().log_softmax(-1).view(*known.shape, -1) + known[..., None]  # [B, W, V]
        best = totals.flatten(1).topk(wanted)
        beams, tokens = best.indices // config.vocab_size, best.indices % config.vocab_size
        for search, *found in zip(
            searches, best.values.tolist(), beams.tolist(), tokens.tolist(), strict=True
        ):
            search.take(*found)
        if all(search.done for search in searches):
            return [search.finished for search in searches]
        rows = [num_beams * b + beam for b, search in enumerate(searches) for beam in search.origins]
        if rows != list(range(len(rows))):
            cache.reorder(torch.tensor(rows))
        last = [tokens[-1] for search in searches for tokens in search.tokens]
        logits = step(torch.tensor(last, device=logits.device))


class _Search:
    """The beams of one prompt.

    Attributes:
        tokens: new ones of each unfinished beam, best first.
        scores: sums of their logprobs.
        origins: which beam of the step before each goes on from.
        finished: the best that have ended, best first.
        done: nothing better is to be found.
    """

    def __init__(self, width: int, max_new_tokens: int, length_penalty: float, stops: frozenset[int]) -> None:
        self.width, self.stops = width, stops
        self.max_new_tokens, self.length_penalty = max_new_tokens, length_penalty
        self.tokens: list[list[int]] = [[] for _ in range(width)]
        self.scores = [0.0] + [-math.inf] * (width - 1)  # all are the same in the beginning
        self.origins = list(range(width))
        self.finished: list[Beam] = []
        self.done = False

    def take(self, scores: list[float], beams: list[int], tokens: list[int]) -> None:
        """The best beams and tokens behind them, best first."""
        if self.done:
            return  # it waits for the other prompts, as it is
        length = len(self.tokens[0]) + 1
        at_end = length == self.max_new_tokens
        going: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(zip(scores, beams, tokens, strict=True)):
            if token not in self.stops and not at_end:
                going.append((score, beam, token))
            elif rank < self.width and score > -math.inf:
                reason = "stop" if token in self.stops else "length"
                self.finished.append(Beam([*self.tokens[beam], token], self._rate(score, length), reason))
        self.finished = sorted(self.finished, key=lambda x: x.score, reverse=True)[: self.width]
        going = going[: self.width]
        self.done = at_end or (
            len(self.finished) == self.width and self._rate(going[0][0], length) <= self.finished[-1].score
        )
        if not self.done:
            self.tokens = [[*self.tokens[beam], token] for _, beam, token in going]
            self.scores, self.origins = [x[0] for x in going], [x[1] for x in going]
        else:
            self.origins = list(range(self.width))

    def _rate(self, score: float, length: int) -> float:
        return float(score / length**self.length_penalty)
