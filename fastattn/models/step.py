"""One step of decoding: the inside of generation's loop."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn import dispatch
from fastattn.models.cache import ModelCache

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM
    from fastattn.models.encoder_decoder import EncoderDecoder


class Step:
    """Appends one token to each sequence of a cache, and says what may follow.

    The first step is recorded, where the model consists of nothing but fastattn's kernels: all later ones
    are then one call into the core. It reads weights and caches where they lay at first, with the number
    of threads of that time.

    Args:
        model: in eval mode.
        cache: of this model, for as long as the steps go on.
        context: further arguments of the model's `run_layers`, the same in every step.

    Example:
        >>> step = Step(model, cache)
        >>> with torch.inference_mode():
        ...     logits = step(logits.argmax(-1))
    """

    def __init__(self, model: "DecoderLM | EncoderDecoder", cache: ModelCache, **context: Any) -> None:
        self.model, self.cache, self.context = model, cache, context
        # How a step is run again; before the first one None; where that cannot be, the reason.
        self._again: Callable[[], None] | str | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Integers [B] of the vocabulary -> logits [B, V], which the next step may overwrite."""
        self.cache.reserve(1)
        x = self.model.embed(tokens[:, None], cache=self.cache)
        if callable(self._again):
            self._x.copy_(x)
            self._again()
        else:
            self._logits = self._run(x) if self._again else self._first(x)
        self.cache.advance(1)
        return self._logits[:, 0]

    @property
    def not_recorded(self) -> str | None:
        """Why steps are not one call; None: they are."""
        return None if callable(self._again) else self._again or "no step was taken yet"

    def _first(self, x: Tensor) -> Tensor:
        record = dispatch.recorder(x.device)
        if record is None:
            self._again = f"no backend records on device {x.device.type!r}"
            return self._run(x)
        self._x = x
        self._again, logits = record(lambda: self._run(x))
        return logits

    def _run(self, x: Tensor) -> Tensor:
        return self.model.logits(self.model.run_layers(x, cache=self.cache, **self.context))
