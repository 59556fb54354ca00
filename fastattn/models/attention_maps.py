"""What the heads of a model look at: the attention weights of chosen layers, heads and queries."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastattn.models import checks
from fastattn.models.decoder_lm import DecoderLM
from fastattn.models.encoder import Encoder
from fastattn.models.layers import Layer

Chosen = int | slice | Sequence[int] | None


def attention_maps(
    model: DecoderLM | Encoder,
    ids: Tensor,
    *,
    layers: Chosen = None,
    heads: Chosen = None,
    rows: Chosen = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields a chosen layer's number and its weights [B, heads, rows, S] in float32, layer by layer.

    Only one layer's are held at a time, and of it only what is chosen. Layers behind the last one that is
    chosen are not computed. No gradient is recorded, and nothing is dropped.

    Args:
        model: a decoder-only model or an encoder.
        ids: int64 or int32 [B, S], without padding.
        layers: a slice, or integers, which may be negative; they come in the model's order. Default: all.
        heads: which query heads, in the order of the result. Default: all.
        rows: which queries, in the same way. Default: all.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        IndexError: a layer, a head or a row is out of range.

    Example:
        >>> for layer, weights in attention_maps(model, ids, layers=[0, -1], heads=slice(4), rows=-1):
        ...     print(layer, weights[0, :, 0].argmax(-1))  # the token that the last one looks at most
    """
    if not isinstance(model, DecoderLM | Encoder):
        raise TypeError(f"model must be a DecoderLM or an Encoder, got {type(model).__name__}")
    checks.check_ids(ids, model.config)
    return _maps(model, ids, _numbers(layers, len(model.layers)), {"heads": heads, "rows": rows})


def _maps(
    model: DecoderLM | Encoder, ids: Tensor, wanted: set[int], chosen: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    training = model.training
    options: dict[str, Any] = {"rope": model.rope}
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(model, Encoder) and model.relative_bias is not None:
                options["bias"] = model.relative_bias(ids.shape[1])
            x = model.embedding(ids)
            for number in range(max(wanted, default=-1) + 1):
                layer = cast(Layer, model.layers[number])
                if number in wanted:
                    read = layer.attention_norm(x) if layer.pre_norm else x
                    yield number, layer.attention.weights(read, **options, **chosen)
                x = layer(x, **options)
    finally:
        model.train(training)


def _numbers(layers: Chosen, count: int) -> set[int]:
    if layers is None or isinstance(layers, slice):
        return set(range(count)[layers or slice(None)])
    wanted = [layers] if isinstance(layers, int) else list(layers)
    for layer in wanted:
        if not -count <= layer < count:
            raise IndexError(f"layers must be in {-count} ... {count - 1}, got {layer}")
    return {layer % count for layer in wanted}
