"""Generation: prompts go in, tokens come out step by step until every sequence has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.models.cache import ModelCache
from fastattn.models.checks import check_prompts, check_prompts_cache
from fastattn.models.config import ModelConfig
from fastattn.models.sampling import Sampling, logprobs_of, sample, seen_tokens
from fastattn.models.step import Step
from fastattn.models.text import TextStream, TextTokenizer

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM
    from fastattn.models.encoder_decoder import EncoderDecoder

Prompts = Tensor | Sequence[Sequence[int] | Tensor | str]
GREEDY = Sampling()


class NextTokens(NamedTuple):
    """What one step brings, an entry for each of the B sequences."""

    tokens: list[int | None]  # None: the sequence had ended before
    logprobs: list[float | None] | None  # of the tokens; None where not asked for
    texts: list[str] | None  # what can be read now; None without a tokenizer
    reasons: list[str | None]  # "stop" or "length" where the token is the sequence's last


@dataclass
class Generated:
    """What `generate` returns, an entry for each of the B sequences.

    Attributes:
        tokens: the new ones; a stop token is the last of them.
        logprobs: the logs of the probabilities that the model gave them; None where not asked for.
        texts: without special tokens, up to the stop string; None without a tokenizer.
        reasons: why they ended: "stop" at a stop token or string, "length" after max_new_tokens.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    texts: list[str] | None
    reasons: list[str]

    def add(self, step: NextTokens) -> None:
        """Appends what a step has brought."""
        for b, token in enumerate(step.tokens):
            if token is None:
                continue
            self.tokens[b].append(token)
            if self.logprobs is not None and step.logprobs is not None:
                self.logprobs[b] += [x for x in (step.logprobs[b],) if x is not None]
            if self.texts is not None and step.texts is not None:
                self.texts[b] += step.texts[b]
            self.reasons[b] = step.reasons[b] or ""


def generate(
    model: "DecoderLM | EncoderDecoder",
    prompts: Prompts,
    max_new_tokens: int,
    *,
    on_step: Callable[[NextTokens], None] | None = None,
    **options: Any,
) -> Generated:
    """All steps of a `stream`; on_step sees each as it comes."""
    steps = stream(model, prompts, max_new_tokens, **options)
    rows = range(len(prompts))
    out = Generated(
        tokens=[[] for _ in rows],
        logprobs=[[] for _ in rows] if options.get("logprobs") else None,
        texts=["" for _ in rows] if options.get("tokenizer") is not None else None,
        reasons=["" for _ in rows],
    )
    for step in steps:
        if on_step is not None:
            on_step(step)
        out.add(step)
    return out


def stream(
    model: "DecoderLM | EncoderDecoder",
    prompts: Prompts,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: TextTokenizer | None = None,
    logprobs: bool = False,
    cache: ModelCache | None = None,
    page_size: int | None = None,
    cache_dtype: torch.dtype | None = None,
    context: dict[str, Any] | None = None,
) -> Iterator[NextTokens]:
    """Yields the next tokens of all sequences, until each has ended. Bad arguments raise at once.

    Args:
        prompts: ids [B, S], or B lists of them of any lengths, or with a tokenizer B texts; none empty.
        max_new_tokens: of each sequence.
        sampling: how tokens are chosen. Default: greedy.
        stop_ids: tokens that end a sequence. Default: the config's eos_ids; (): none.
        stop_strings: texts that end a sequence; they need a tokenizer.
        tokenizer: as `load_tokenizer` gives it; with it there is text.
        logprobs: also tell the log of the probability that the model gave each token.
        cache: holds the first tokens of each prompt, which are not computed again. In the end it holds
            all but the last token of the sequences that ended last, and nothing of the others.
            Default: a new one.
        page_size, cache_dtype: of the new cache. Default: no pages, the weights' type.
        context: further arguments of the model's `hidden`, the same in every step.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """
    if model.training and model.config.dropout:
        raise ValueError("model must be in eval mode, got one that drops out values: call model.eval()")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
    if tokenizer is not None and isinstance(prompts, Sequence) and not isinstance(prompts, str):
        prompts = [tokenizer.encode(x) if isinstance(x, str) else x for x in prompts]
    ids = check_prompts(prompts, model.config, max_new_tokens)
    ends = Ends(model.config, ids, max_new_tokens, stop_ids, stop_strings, tokenizer)
    if cache is None:
        options: dict[str, Any] = {"page_size": page_size}
        if cache_dtype is not None:
            options["dtype"] = cache_dtype
        cache = model.new_cache(len(ids), max(map(len, ids)) + max_new_tokens, **options)
    elif page_size is not None or cache_dtype is not None:
        raise ValueError("page_size and cache_dtype must be None with a cache: they are of a new one")
    else:
        check_prompts_cache(ids, cache, max_new_tokens)
    return _steps(model, cache, ids, ends, sampling, logprobs, context or {})


class Ends:
    """Knows which sequences go on (`alive`), when each ends, and its text until then."""

    def __init__(
        self,
        config: ModelConfig,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int] | None,
        stop_strings: Sequence[str],
        tokenizer: TextTokenizer | None,
    ) -> None:
        self.alive = [True] * len(prompts)
        self._left = max_new_tokens
        self._stop_ids = frozenset(config.eos_ids if stop_ids is None else stop_ids)
        for stop in self._stop_ids:
            if not 0 <= stop < config.vocab_size:
                raise ValueError(f"stop_ids must be in 0 ... {config.vocab_size - 1}, got {stop}")
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(f"stop_strings must be a list of texts, none empty, got {stop_strings!r}")
        if stop_strings and tokenizer is None:
            raise ValueError("tokenizer must be given with stop_strings, got None")
        self._texts: list[TextStream] | None = None
        if tokenizer is not None:
            self._texts = [TextStream(tokenizer, prompt, stop_strings) for prompt in prompts]

    def take(self, tokens: list[int], logprobs: list[float] | None) -> NextTokens:
        """A token of each sequence; those of sequences that have ended are passed over."""
        self._left -= 1
        rows = range(len(tokens))
        out = NextTokens(
            tokens=[token if self.alive[b] else None for b, token in enumerate(tokens)],
            logprobs=None if logprobs is None else [logprobs[b] if self.alive[b] else None for b in rows],
            texts=None if self._texts is None else ["" for _ in rows],
            reasons=[None for _ in rows],
        )
        for b, token in enumerate(out.tokens):
            if token is None:
                continue
            text = None if self._texts is None else self._texts[b]
            new = "" if text is None else text.put(token)
            stop = token in self._stop_ids or (text is not None and text.stopped)
            if stop or not self._left:
                self.alive[b] = False
                out.reasons[b] = "stop" if stop else "length"
                new += "" if text is None else text.end()
            if out.texts is not None:
                out.texts[b] = new
        return out


@torch.inference_mode()
def _steps(
    model: "DecoderLM | EncoderDecoder",
    cache: ModelCache,
    prompts: list[list[int]],
    ends: Ends,
    sampling: Sampling,
    logprobs: bool,
    context: dict[str, Any],
) -> Iterator[NextTokens]:
    device = cache.lengths.device
    generator = sampling.generator(device)
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = seen_tokens(prompts, model.config.vocab_size, device)
    kept = torch.ones_like(cache.lengths)  # 0: the sequence has ended, and goes on as padding
    try:
        logits = prefill(model, prompts, cache, **context)
        step = Step(model, cache, **context)
        while True:
            tokens = sample(logits, sampling, seen=seen, generator=generator)  # [B]
            chances = logprobs_of(logits, tokens).tolist() if logprobs else None
            out = ends.take(tokens.tolist(), chances)
            yield out
            if not any(ends.alive):
                return
            if any(out.reasons):
                kept.copy_(torch.tensor(ends.alive))
                cache.truncate(cache.lengths * kept)  # padding costs least behind few keys
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            logits = step(tokens)
    finally:
        cache.truncate(cache.lengths * kept)


def prefill(
    model: "DecoderLM | EncoderDecoder", prompts: list[list[int]], cache: ModelCache, **context: Any
) -> Tensor:
    """Gives the cache the tokens of the prompts that it has not; the logits [B, V] behind each one's last.

    Shorter ones are padded on the right, where no other token sees the padding; then the cache forgets it.
    """
    device = cache.lengths.device
    new = [prompt[had:] for prompt, had in zip(prompts, cache.lengths.tolist(), strict=True)]
    longest = max(map(len, new))
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in new], device=device)
    hidden = model.hidden(padded, cache=cache, **context)  # [B, S, E]
    cache.truncate(torch.tensor([len(prompt) for prompt in prompts], device=device))
    last = torch.tensor([len(tokens) - 1 for tokens in new], device=device)
    return model.logits(hidden[torch.arange(len(new), device=device), last])
