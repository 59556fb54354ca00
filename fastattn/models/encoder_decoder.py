"""Encoder-decoders by config: the original Transformer, and T5."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import checks
from fastattn.models.cache import ModelCache
from fastattn.models.config import ModelConfig
from fastattn.models.cross_attention import DecoderLayer, Memory
from fastattn.models.encoder import Encoder, Lengths
from fastattn.models.layers import initialise, make_norm
from fastattn.models.pretrained import Pretrained
from fastattn.models.relative_bias import RelativeBias
from fastattn.ops._checks import check_tensor
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy


class EncoderDecoder(Pretrained):
    """Source tokens and the target's first ones to the logits of the next.

    Encoder and decoder share the embeddings.

    Args:
        config: num_layers are the encoder's, num_decoder_layers the decoder's.
    Raises:
        ValueError: the config is not one of an encoder-decoder.

    Example:
        >>> model = EncoderDecoder(ModelConfig.t5(vocab_size=100, embed_dim=64, num_layers=2, num_heads=4,
        ...                                       hidden_dim=256, max_positions=64))
        >>> model.loss(ids, targets, mask).backward()
        >>> with torch.no_grad():
        ...     memory, cache = model.encode(ids, mask), model.new_cache(len(ids))
        ...     logits = model.decode(first, memory, cache=cache)
    """

    def __init__(self, config: ModelConfig) -> None:
        if config.num_segments:
            raise ValueError(f"num_segments must be 0 in an EncoderDecoder, got {config.num_segments}")
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.final_norm = make_norm(config) if config.pre_norm else nn.Identity()
        self.head = nn.Linear(config.embed_dim, config.vocab_size, config.head_bias)
        self.relative_bias = RelativeBias(config, both_ways=False) if config.positions == "relative" else None
        initialise(self, config.num_decoder_layers)
        if config.tie_embeddings:
            self.head.weight = self.encoder.embedding.tokens.weight

    def forward(
        self,
        ids: Tensor,
        decoder_ids: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the tokens that follow decoder_ids [B, T]; the rest is `Encoder.forward`'s."""
        memory = self.encode(ids, mask, lengths=lengths, keys=False)
        return self.decode(decoder_ids, memory)

    def encode(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        keys: bool | None = None,
    ) -> Memory:
        """What the decoder looks at.

        Args:
            ids: int64 or int32 [B, S].
            mask: [B, S], bool or integers; True or 1: a token.
            lengths: instead of a mask: integers [B], with the padding at the right.
            keys: also the keys and values of all decoder layers, which decoding with a cache reads.
                Default: where no gradients are recorded.
        """
        padding = self.encoder.find_padding(ids, mask, lengths)
        memory = Memory(self.encoder.tokens(ids, padding), padding, None)
        with_keys = not torch.is_grad_enabled() if keys is None else keys
        return memory._replace(keys=self._keys(memory)) if with_keys else memory

    def decode(self, ids: Tensor, memory: Memory, *, cache: ModelCache | None = None) -> Tensor:
        """Logits [B, T, V] of ids [B, T]; the rest is that of `hidden`."""
        return self.logits(self.hidden(ids, memory=memory, cache=cache))

    def hidden(self, ids: Tensor, *, memory: Memory, cache: ModelCache | None = None) -> Tensor:
        """What the projection to the vocabulary reads, [B, T, E].

        Args:
            ids: int64 or int32 [B, T], of the target.
            memory: of B sources (`encode`).
            cache: what was computed before (`new_cache`); ids follow it, and are appended.
        """
        checks.check_ids(ids, self.config, cache)
        if memory.batch_size != len(ids):
            raise ValueError(f"memory must have the {len(ids)} sequences of ids, got {memory.batch_size}")
        if cache is not None:
            if memory.keys is None:
                raise ValueError("memory must have keys where there is a cache: encode(..., keys=True)")
            if self.relative_bias is not None and cache[0].block_table is not None:
                raise ValueError("cache must have no pages where positions are relative")
            cache.reserve(ids.shape[1])
        x = self.run_layers(self.embed(ids, cache=cache), memory=memory, cache=cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        return x

    def embed(self, ids: Tensor, *, cache: ModelCache | None = None) -> Tensor:
        """The embeddings [B, T, E] of ids, which follow what the cache has."""
        embedding = self.encoder.embedding
        if cache is None or embedding.positions is None:
            return cast(Tensor, embedding(ids))
        steps = torch.arange(ids.shape[1], device=ids.device)
        return cast(Tensor, embedding(ids, cache.lengths[:, None] + steps))

    def run_layers(self, x: Tensor, *, memory: Memory, cache: ModelCache | None = None) -> Tensor:
        """All layers and the last norm, on embeddings; the cache has room, and its lengths stay."""
        bias = self._bias(x.shape[1], cache)
        for i, layer in enumerate(self.layers):
            own, keys = (None, None) if cache is None or memory.keys is None else (cache[i], memory.keys[i])
            x = layer(x, memory, keys, rope=self.encoder.rope, bias=bias, cache=own)
        return cast(Tensor, self.final_norm(x))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., V]."""
        return linear(self._scaled(hidden), self.head.weight, self.head.bias)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        **options: Any,
    ) -> Tensor:
        """Cross entropy of the targets [B, T], without the logits.

        The decoder reads the targets behind decoder_start_id, each one where the next is asked for.

        Args:
            targets: int64; -100 does not count.
            options: of `fastattn.linear_cross_entropy`.
        """
        read = self.shift(targets)
        hidden = self.hidden(read, memory=self.encode(ids, mask, lengths=lengths, keys=False))
        return linear_cross_entropy(
            self._scaled(hidden), self.head.weight, targets, bias=self.head.bias, **options
        )

    def shift(self, targets: Tensor) -> Tensor:
        """What the decoder reads to say targets [B, T]: decoder_start_id, and all but the last."""
        start = self.config.decoder_start_id
        if start is None:
            raise ValueError("targets need a config with a decoder_start_id, got None")
        check_tensor("targets", targets)
        if targets.dtype is not torch.int64 or targets.ndim != 2:
            raise ValueError(f"targets must be int64 [B, T], got {targets.dtype} {list(targets.shape)}")
        pad = start if self.config.pad_id is None else self.config.pad_id
        filled = targets.masked_fill(targets == -100, pad)
        checks.check_ids(filled, self.config, name="targets")
        return F.pad(filled[:, :-1], (1, 0), value=start)

    def new_cache(self, batch_size: int, max_length: int | None = None, **options: Any) -> ModelCache:
        """An empty cache of the decoder's own tokens, in the type and on the device of the weights.

        Args:
            max_length: tokens that a sequence can have. Default: max_positions.
            options: of `KVCache`: dtype, page_size, num_pages; with positions "relative" there are none.
        """
        config = self.config
        given = {name: value for name, value in options.items() if value is not None}
        if given and config.positions == "relative":
            raise ValueError(f"a cache must have no options where positions are relative, got {given}")
        cache = self._cache(batch_size, max_length or config.max_positions, **options)
        if config.positions == "relative":
            # A bias goes over all rows up to the longest sequence's, and 0 times what is there must be 0.
            for layer in cache.layers:
                layer.k.zero_()
                layer.v.zero_()
        return cache

    def _cache(self, batch_size: int, max_length: int, **options: Any) -> ModelCache:
        config, like = self.config, self.head.weight
        return ModelCache(
            config.num_decoder_layers, batch_size, max_length, config.num_kv_heads, config.head_dim,
            **{"dtype": like.dtype, "device": like.device, **options},
        )  # fmt: skip

    def _keys(self, memory: Memory) -> ModelCache:
        padding = memory.padding
        length = memory.tokens.shape[1] if padding is None else padding.packed.max_seqlen
        cache = self._cache(memory.batch_size, length)
        for layer, own in zip(self.layers, cache.layers, strict=True):
            k, v = cast(DecoderLayer, layer).cross_attention.project(memory.tokens)
            if padding is not None:
                k, v = padding.align(k), padding.align(v)
            own.extend(k[:, :0], k, v)  # no query: it is written, no more
        cache.advance(length)
        if padding is not None:
            cache.truncate(padding.packed.cu_seqlens.diff())
        return cache

    def _bias(self, new: int, cache: ModelCache | None) -> Tensor | None:
        """The relative bias of new tokens."""
        if self.relative_bias is None:
            return None
        if cache is None:
            return cast(Tensor, self.relative_bias(new))
        return self.relative_bias.behind(cache.lengths, new)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden * self.config.head_scale if self.config.head_scale != 1.0 else hidden
