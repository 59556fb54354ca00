"""The beginning of generation: prompts of different lengths go into a cache."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.models.cache import ModelCache

if TYPE_CHECKING:
    from fastattn.models.decoder_lm import DecoderLM
    from fastattn.models.encoder_decoder import EncoderDecoder


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
