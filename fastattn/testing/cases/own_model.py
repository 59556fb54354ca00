"""The same models as `fastattn.models` runs them, beside transformers: a prompt, and a token after it."""

import importlib
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastattn.models import DecoderLM, ModelCache, Step
from fastattn.testing.cases.case import Call
from fastattn.testing.cases.model import GPT2, LLAMA, Inputs, ModelCase, Task
from fastattn.testing.cases.peers import OURS


@dataclass(frozen=True)
class OwnModelCase(ModelCase):
    """One model at one task, as `DecoderLM.generate` does it."""

    op: ClassVar[str] = "models"

    @property
    def name(self) -> str:
        """For example `models decode 1,1000 gpt2-124m`: [B, S]."""
        return f"models {super().name}"

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`."""
        if peer != OURS:
            return super().bind(peer, x)
        if peer not in x.made:
            x.made[peer] = _converted(x.model)
        model = x.made[peer]
        run = partial(_prefill, model, x.ids)
        if self.task == "decode":
            cache = model.new_cache(self.batch, self.length + 1)
            with torch.inference_mode():
                model.hidden(x.ids[:, :-1], cache=cache)
            run = partial(_decode, Step(model, cache), cache, x.ids[:, -1])
        return Call(run, lambda logits: (logits,), ("logits",))


def _converted(model: Any) -> DecoderLM:
    """The same weights, by way of a folder."""
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return DecoderLM.from_pretrained(folder)


@torch.inference_mode()
def _prefill(model: DecoderLM, ids: Tensor) -> Tensor:
    """Fills a cache of the prompt's length, and makes the logits of the last token alone."""
    cache = model.new_cache(*ids.shape)
    return model.logits(model.hidden(ids, cache=cache)[:, -1:])


@torch.inference_mode()
def _decode(step: Step, cache: ModelCache, tokens: Tensor) -> Tensor:
    """One token more, which the cache forgets again: each call has the same context."""
    logits = step(tokens)
    cache.advance(-1)
    return logits[:, None]


_TASKS: tuple[tuple[Task, int], ...] = (("prefill", 512), ("decode", 128), ("decode", 1000))
OWN_MODELS = [
    OwnModelCase(sizes, task, length, dtype=dtype)
    for sizes in (LLAMA, GPT2)
    for task, length in _TASKS
    for dtype in ("fp32", "bf16")
]
OWN_MODELS_QUICK = [case for case in OWN_MODELS if case.architecture is LLAMA and case.length != 1000]
