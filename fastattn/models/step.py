"""One step of decoding: the inside of generation's loop."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastattn.models.cache import ModelCache

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM


class Step:
    """Appends one token to each sequence of a cache, and says what may follow.

    Args:
        model: in eval mode.
        cache: of this model, for as long as the steps go on.

    Example:
        >>> step = Step(model, cache)
        >>> logits = step(logits.argmax(-1))
    """

    def __init__(self, model: "DecoderLM", cache: ModelCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """Integers [B] of the vocabulary -> logits [B, V]."""
        self.cache.reserve(1)
        x = self.model.embed(tokens[:, None], cache=self.cache)
        hidden = self.model.run_layers(x, cache=self.cache)
        self.cache.advance(1)
        return self.model.logits(hidden)[:, 0]
