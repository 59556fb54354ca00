"""From logits to the next token: what transformers' logits processors do, in their order."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Top-p looks at so many of the likeliest tokens before it sorts them all, which takes as long as half a
# small model.
_LIKELIEST = (256, 4096)
# Colder, and a score divided by it could leave float32.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the likeliest, always.

    The repetition penalty comes first, then temperature, top_k, top_p and min_p, each on what the one before
    has left. The likeliest token always stays.

    Args:
        temperature: divides the scores, at least 1e-6; 0: greedy.
        top_k: keeps this many of the likeliest tokens, and those as likely as the last; 0: all.
        top_p: keeps the fewest of the likeliest tokens whose probabilities add up to it; 1: all.
        min_p: keeps tokens with at least this share of the likeliest one's probability; 0: all.
        repetition_penalty: divides positive and multiplies negative scores of tokens that the prompt or the
            output has; 1: none.
        seed: of the random numbers. Default: torch's own generator goes on.
    Raises:
        ValueError: an argument is wrong; names it, what was given and what is allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0.0 and not _COLDEST <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0, which is greedy, or finite and at least {_COLDEST}, "
                f"got {self.temperature}"
            )
        _check_whole("top_k", self.top_k)
        if self.seed is not None:
            _check_whole("seed", self.seed)
        for name in ("top_p", "min_p"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in 0 ... 1, got {getattr(self, name)}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be finite and over 0, got {self.repetition_penalty}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new one from the seed; None, which is torch's own, without."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)


def sample(
    logits: Tensor,
    sampling: Sampling,
    *,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each sequence.

    Shapes:
        logits [B, V] -> int64 [B].
    Args:
        seen: bool [B, V], the tokens that the repetition penalty is for (`seen_tokens`).
        generator: of the random numbers, on the logits' device.
    """
    if sampling.temperature == 0.0:
        return penalise(logits, sampling.repetition_penalty, seen).argmax(-1)
    return draw(probabilities(logits, sampling, seen), generator)


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """What `sample` draws from, float32 [B, V]; greedy, all is on one token."""
    logits = penalise(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0.0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, likeliest, 1.0)
    return warp(logits, sampling).softmax(-1)


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A token [B] of each row of weights [B, V], of any sum over 0."""
    # One random number a sequence: `torch.multinomial` draws one for each token of the vocabulary. Sums in
    # float64 keep the product below the last one.
    sums = weights.cumsum(-1, dtype=torch.float64)
    shares = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)
    return torch.searchsorted(sums, shares * sums[:, -1:], right=True)[:, 0]


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log of the probability, float32 [B], that the model itself gives to tokens [B].

    It is that of the logits [B, V] as they come: no penalty, no temperature, nothing cut off.
    """
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def seen_tokens(prompts: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Bool [B, V]: which tokens each prompt has."""
    seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True
    return seen.to(device)


def penalise(logits: Tensor, penalty: float, seen: Tensor | None) -> Tensor:
    """logits [B, V], and where the penalty is not 1 those of seen tokens made less likely, in float32."""
    if penalty == 1.0:
        return logits
    if seen is None:
        raise ValueError("seen must say which tokens were there, for a repetition_penalty; got None")
    scores = logits.float()
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores [B, V] in float32 by temperature (not 0), top_k, top_p and min_p; -inf: cut off."""
    scores = logits.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1.0:
        scores = scores.masked_fill(~_nucleus(scores.softmax(-1), sampling.top_p), -math.inf)
    if sampling.min_p > 0.0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), -math.inf)
    return scores


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Which tokens of probs [B, V] top_p keeps, bool [B, V]."""
    vocab_size = probs.shape[-1]
    for size in _LIKELIEST:
        if size < vocab_size:
            likeliest = probs.topk(size).values
            count = _count(likeliest, top_p)
            kept = probs >= likeliest.gather(-1, count - 1)
            whole = (count < size) & (kept.sum(-1, keepdim=True) == count)  # no equals beyond the cut
            if bool(whole.all()):
                return kept
    values, tokens = probs.sort(descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=probs.device)
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, tokens, ranks < _count(values, top_p))


def _count(descending: Tensor, top_p: float) -> Tensor:
    """How many of the likeliest tokens top_p keeps, [B, 1], at least one: those before add up to less."""
    before = descending.cumsum(-1) - descending
    return (before < top_p).sum(-1, keepdim=True).clamp(min=1)


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be an integer in [0, 2**63), got {value!r}")
