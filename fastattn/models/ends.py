"""When sequences end, and what each step of generation brings until then."""

from collections.abc import Sequence
from typing import NamedTuple

from fastattn.models.checks import check_stop_ids
from fastattn.models.config import ModelConfig
from fastattn.models.text import TextStream, TextTokenizer


class NextTokens(NamedTuple):
    """What one step brings, an entry for each of the B sequences."""

    tokens: list[int | None]  # None: the sequence had ended, or with a draft has no more for now
    logprobs: list[float | None] | None  # of the tokens; None where not asked for
    texts: list[str] | None  # what can be read now; None without a tokenizer
    reasons: list[str | None]  # "stop" or "length" where the token is the sequence's last


class Ends:
    """Knows which sequences go on, when each ends, and its text until then.

    Attributes:
        alive: which sequences go on.
        left: new tokens that each may still get.
    """

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
        self.left = [max_new_tokens] * len(prompts)
        self._stop_ids = check_stop_ids(stop_ids, config)
        if isinstance(stop_strings, str) or not all(stop_strings):
            raise ValueError(f"stop_strings must be a list of texts, none empty, got {stop_strings!r}")
        if stop_strings and tokenizer is None:
            raise ValueError("tokenizer must be given with stop_strings, got None")
        self._texts: list[TextStream] | None = None
        if tokenizer is not None:
            self._texts = [TextStream(tokenizer, prompt, stop_strings) for prompt in prompts]

    def take(self, tokens: Sequence[int | None], logprobs: list[float] | None) -> NextTokens:
        """A token of each sequence, or None; those of sequences that have ended are passed over."""
        taken = [token if alive else None for token, alive in zip(tokens, self.alive, strict=True)]
        out = NextTokens(
            tokens=taken,
            logprobs=None if logprobs is None else [None] * len(taken),
            texts=None if self._texts is None else [""] * len(taken),
            reasons=[None] * len(taken),
        )
        for b, token in enumerate(taken):
            if token is None:
                continue
            self.left[b] -= 1
            if out.logprobs is not None and logprobs is not None:
                out.logprobs[b] = logprobs[b]
            text = None if self._texts is None else self._texts[b]
            new = "" if text is None else text.put(token)
            stop = token in self._stop_ids or (text is not None and text.stopped)
            if stop or not self.left[b]:
                self.alive[b] = False
                out.reasons[b] = "stop" if stop else "length"
                new += "" if text is None else text.end()
            if out.texts is not None:
                out.texts[b] = new
        return out
