"""Text of a sequence that grows token by token."""

from collections.abc import Sequence
from typing import Protocol

# Bytes of a character that are not all there yet are decoded to this.
_INCOMPLETE = "\ufffd"
_MOST_BYTES = 4  # of a character in UTF-8, and so the most tokens that one can wait for
_CONTEXT = 8  # tokens before the first one that tell how it is joined on


class TextTokenizer(Protocol):
    """A tokenizer, as far as generation needs it: those of `load_tokenizer` and of transformers are."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """Turns tokens into text as they come; ends before a stop string.

    A token may be half a character, or may be joined to its neighbours differently than it stands alone:
    it is decoded behind the ones before it, and text comes out when it is certain.

    Args:
        tokenizer: turns ids into text.
        context: tokens before the first one.
        stop_strings: the text ends before the first of them.
    Attributes:
        text: all that came out.
        stopped: a stop string was found.
    """

    def __init__(
        self, tokenizer: TextTokenizer, context: Sequence[int] = (), stop_strings: Sequence[str] = ()
    ) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._ids = list(context[-_CONTEXT:])
        self._decoded = len(self._ids)  # how many of the ids are text already
        self._before = self._decode()
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def put(self, token: int) -> str:
        """Takes one more; returns the text that has become certain, which may be empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decode()
        waits = text.endswith(_INCOMPLETE) and len(self._ids) - self._decoded < _MOST_BYTES
        if waits or len(text) <= len(self._before):
            return ""
        return self._release(self._advance(text))

    def end(self) -> str:
        """No token follows; returns the text that was waiting for one."""
        if self.stopped:
            return ""
        out = self._release(self._advance(self._decode())) + self._held
        self.text, self._held = self.text + self._held, ""
        return out

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True) if self._ids else ""

    def _advance(self, text: str) -> str:
        """What text has behind that of the earlier tokens, which are forgotten but for the last few."""
        new = text[len(self._before) :]
        self._ids = self._ids[self._decoded :] or self._ids
        self._decoded = len(self._ids)
        self._before = self._decode()
        return new

    def _release(self, new: str) -> str:
        """Adds new to what was held, and takes from it what cannot become a stop string."""
        waiting = self._held + new
        found = [at for at in (waiting.find(stop) for stop in self._stop_strings) if at >= 0]
        self.stopped = bool(found)
        kept = min(found) if found else len(waiting) - self._beginning(waiting)
        self._held = "" if found else waiting[kept:]
        self.text += waiting[:kept]
        return waiting[:kept]

    def _beginning(self, text: str) -> int:
        """How many of the last characters could be the first ones of a stop string."""
        longest = max((len(stop) for stop in self._stop_strings), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stop_strings):
                return count
        return 0
