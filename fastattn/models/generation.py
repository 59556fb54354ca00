"""Generation: prompts go in, tokens come out step by step until every sequence has ended."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.models.cache import ModelCache
from fastattn.models.checks import check_prompts, check_prompts_cache
from fastattn.models.ends import Ends, NextTokens
from fastattn.models.prefill import prefill
from fastattn.models.sampling import Sampling, logprobs_of, sample, seen_tokens
from fastattn.models.speculative import check_draft, speculate
from fastattn.models.step import Step
from fastattn.models.text import TextTokenizer

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM
    from fastattn.models.encoder_decoder import EncoderDecoder

Prompts = Tensor | Sequence[Sequence[int] | Tensor | str]
GREEDY = Sampling()


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
    draft: "DecoderLM | None" = None,
    draft_tokens: int = 4,
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
        draft: a smaller model of the same vocabulary, which guesses; nothing else changes but the speed.
        draft_tokens: guesses at a time.
        context: further arguments of the model's `hidden`, the same in every step.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """
    if model.training and model.config.dropout:
        raise ValueError("model must be in eval mode, got one that drops out values: call model.eval()")
    if tokenizer is not None and isinstance(prompts, Sequence) and not isinstance(prompts, str):
        prompts = [tokenizer.encode(x) if isinstance(x, str) else x for x in prompts]
    ids = check_prompts(prompts, model.config, max_new_tokens)
    ends = Ends(model.config, ids, max_new_tokens, stop_ids, stop_strings, tokenizer)
    if draft is not None:
        check_draft(draft, model.config.vocab_size, ids, max_new_tokens, draft_tokens)
    if cache is None:
        options: dict[str, Any] = {"page_size": page_size}
        if cache_dtype is not None:
            options["dtype"] = cache_dtype
        cache = model.new_cache(len(ids), max(map(len, ids)) + max_new_tokens, **options)
    elif page_size is not None or cache_dtype is not None:
        raise ValueError("page_size and cache_dtype must be None with a cache: they are of a new one")
    else:
        check_prompts_cache(ids, cache, max_new_tokens)
    if draft is not None:
        return speculate(model, draft, cache, ids, ends, sampling, logprobs, draft_tokens, context or {})
    return _steps(model, cache, ids, ends, sampling, logprobs, context or {})


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
