"""A decoder-only language model: GPT-2, Llama, SmolLM2, Qwen2 and their kin, by config."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastattn.models import checks
from fastattn.models.cache import ModelCache
from fastattn.models.config import ModelConfig
from fastattn.models.layers import Embedding, Layer, Packed, initialise, make_norm, make_rope
from fastattn.models.pretrained import Pretrained
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class DecoderLM(Pretrained):
    """Tokens to the next token's logits.

    Args:
        config: positions "relative" are for encoder-decoders.
    Raises:
        ValueError: the config is not one of a decoder.

    Example:
        >>> model = DecoderLM(ModelConfig.gpt2(vocab_size=256, embed_dim=128, num_layers=2, num_heads=4,
        ...                                    hidden_dim=512, max_positions=256))
        >>> model.loss(ids[:, :-1], ids[:, 1:]).backward()
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.positions == "relative":
            raise ValueError("positions must not be 'relative' in a DecoderLM, which has no bias")
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, causal=True) for _ in range(config.num_layers))
        self.final_norm = make_norm(config) if config.pre_norm else nn.Identity()
        self.head = nn.Linear(config.embed_dim, config.vocab_size, config.head_bias)
        self.rope = make_rope(config)
        initialise(self, config.num_layers)
        if config.tie_embeddings:
            self.head.weight = self.embedding.tokens.weight

    def forward(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits [B, S, V] of ids [B, S]; the options are those of `hidden`."""
        return self.logits(self.hidden(ids, **options))

    def hidden(self, ids: Tensor, *, packed: Packed | None = None, cache: ModelCache | None = None) -> Tensor:
        """What the projection to the vocabulary reads, [B, S, E].

        Args:
            ids: int64 or int32 [B, S].
            packed: ids are [1, T], the tokens of several sequences.
            cache: what was computed before (`new_cache`); ids follow it, and are appended.
        """
        checks.check_ids(ids, self.config, cache, packed)
        if cache is not None:
            cache.reserve(ids.shape[1])
        x = self.run_layers(self.embed(ids, packed=packed, cache=cache), packed=packed, cache=cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return x

    def embed(self, ids: Tensor, *, packed: Packed | None = None, cache: ModelCache | None = None) -> Tensor:
        """The embeddings [B, S, E] of ids, which follow what the cache has."""
        if packed is not None:
            return cast(Tensor, self.embedding(ids, packed.positions))
        if cache is None or self.embedding.positions is None:
            return cast(Tensor, self.embedding(ids))
        steps = torch.arange(ids.shape[1], device=ids.device)
        return cast(Tensor, self.embedding(ids, cache.lengths[:, None] + steps))

    def run_layers(
        self, x: Tensor, *, packed: Packed | None = None, cache: ModelCache | None = None
    ) -> Tensor:
        """All layers and the last norm, on embeddings [B, S, E]; the cache has room, and its lengths stay.

        Every step of it is one of our kernels.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, rope=self.rope, packed=packed, cache=None if cache is None else cache[i])
        return cast(Tensor, self.final_norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        if self.config.head_scale != 1.0:
            hidden = hidden * self.config.head_scale
        return linear(hidden, self.head.weight, self.head.bias)

    def loss(self, ids: Tensor, targets: Tensor, *, packed: Packed | None = None, **options: Any) -> Tensor:
        """Cross entropy of ids [B, S] against targets [B, S], without the logits.

        Args:
            targets: int64, the token after each; -100 does not count.
            options: of `fastattn.linear_cross_entropy`.
        """
        hidden = self.hidden(ids, packed=packed)
        if self.config.head_scale != 1.0:
            hidden = hidden * self.config.head_scale
        return linear_cross_entropy(hidden, self.head.weight, targets, bias=self.head.bias, **options)

    def new_cache(self, batch_size: int, max_length: int | None = None, **options: Any) -> ModelCache:
        """An empty cache, in the type and on the device of the weights.

        Args:
            max_length: tokens that a sequence can have. Default: max_positions.
            options: of `KVCache`: dtype, page_size, num_pages.
        """
        config, like = self.config, self.embedding.tokens.weight
        return ModelCache(
            config.num_layers, batch_size, max_length or config.max_positions, config.num_kv_heads,
            config.head_dim, **{"dtype": like.dtype, "device": like.device, **options},
        )  # fmt: skip
