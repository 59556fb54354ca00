"""Encoders: BERT, MiniLM and their kin by config, sentence embeddings, and the head of masked tokens."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models import checks
from fastattn.models.config import ModelConfig
from fastattn.models.layers import Embedding, Layer, initialise, make_norm, make_rope
from fastattn.models.padding import Padding, check_mask
from fastattn.models.pretrained import Pretrained
from fastattn.models.relative_bias import RelativeBias
from fastattn.nn import Linear
from fastattn.ops._checks import check_tensor
from fastattn.ops.linear import linear
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

POOLS = ("mean", "cls")
Lengths = Tensor | Sequence[int]


class Encoder(Pretrained):
    """Tokens to one vector each, which knows all others.

    Padding costs nothing: only the tokens run through the layers, one sequence after the other. With
    positions "relative" the scores are padded, since a bias has no packed form.

    Args:
        config: "learned" positions, segments and an embedding norm are BERT's (`ModelConfig.bert`).

    Example:
        >>> model = Encoder(ModelConfig.bert(vocab_size=1000, embed_dim=64, num_layers=2, num_heads=4,
        ...                                  hidden_dim=256, max_positions=128))
        >>> sentences = pool(model(ids, mask), mask, normalise=True)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Layer(config, causal=False) for _ in range(config.num_layers))
        self.final_norm = make_norm(config) if config.pre_norm else nn.Identity()
        self.rope = make_rope(config)
        self.relative_bias = RelativeBias(config, both_ways=True) if config.positions == "relative" else None
        initialise(self, config.num_layers)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """ids [B, S] -> [B, S, E], zeros at padding.

        Args:
            ids: int64 or int32; positions are those of the columns, whatever is padding.
            mask: [B, S], bool or integers; True or 1: a token.
            lengths: instead of a mask: integers [B], with the padding at the right.
            segments: int64 or int32 [B, S], the type of each token. Default: all 0.
        Raises:
            ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
        """
        padding = self.find_padding(ids, mask, lengths)
        x = self.tokens(ids, padding, segments)
        return x if padding is None else padding.unpack(x)

    def find_padding(
        self, ids: Tensor, mask: Tensor | None = None, lengths: Lengths | None = None
    ) -> Padding | None:
        """Checks ids and says what of them is padding; None: nothing."""
        checks.check_ids(ids, self.config)
        padding = Padding.of(ids, mask, lengths)
        counts_between = self.config.window is not None or self.config.positions == "alibi"
        if padding is not None and counts_between and padding.has_gaps:
            raise ValueError("mask must not have gaps where a window or ALiBi counts the tokens between")
        return padding

    def tokens(self, ids: Tensor, padding: Padding | None = None, segments: Tensor | None = None) -> Tensor:
        """`forward` of the tokens alone: [1, T, E], one sequence after the other; all, without padding."""
        if segments is not None:
            self._check_segments(segments, ids)
        if padding is None:
            return self.run_layers(self.embedding(ids, segments=segments))
        kinds = None if segments is None else padding.pack(segments)
        x = self.embedding(padding.pack(ids), padding.packed.positions, kinds)
        return self.run_layers(x, padding=padding)

    def run_layers(self, x: Tensor, *, padding: Padding | None = None) -> Tensor:
        """All layers and the last norm, on embeddings [B, S, E]; with padding [1, T, E], the tokens alone."""
        options: dict[str, Any] = {"rope": self.rope}
        if self.relative_bias is not None:
            length = x.shape[1] if padding is None else padding.mask.shape[1]
            options |= {"bias": self.relative_bias(length), "padding": padding}
        elif padding is not None:
            options["packed"] = padding.packed
        for layer in self.layers:
            x = layer(x, **options)
        return cast(Tensor, self.final_norm(x))

    def _check_segments(self, segments: Tensor, ids: Tensor) -> None:
        check_tensor("segments", segments)
        if not self.config.num_segments:
            raise ValueError("segments must be None: the config has num_segments=0")
        if segments.dtype not in (torch.int64, torch.int32) or segments.shape != ids.shape:
            raise ValueError(
                f"segments must be int64 or int32 {list(ids.shape)}, as ids, got {segments.dtype} "
                f"{list(segments.shape)}"
            )
        if torch.compiler.is_compiling() or segments.device.type != "cpu":
            return
        low, high = (int(x) for x in segments.aminmax())
        if low < 0 or high >= self.config.num_segments:
            raise ValueError(
                f"segments must be in 0 ... {self.config.num_segments - 1}, got {low if low < 0 else high}"
            )


def pool(hidden: Tensor, mask: Tensor | None = None, how: str = "mean", *, normalise: bool = False) -> Tensor:
    """One vector for each sequence: [B, S, E] -> [B, E].

    Args:
        mask: [B, S], bool or integers; True or 1: a token. Default: no padding.
        how: "mean" of the tokens, or "cls", the first one.
        normalise: to length 1, so that a product of two is the cosine of their angle.
    Raises:
        ValueError, TypeError: an argument is wrong; names it, what was given and what is allowed.
    """
    check_tensor("hidden", hidden)
    if hidden.ndim != 3:
        raise ValueError(f"hidden must be [B, S, E], got {list(hidden.shape)}")
    if how not in POOLS:
        raise ValueError(f"how must be one of {POOLS}, got {how!r}")
    if mask is not None:
        mask = check_mask(mask, hidden)
    if how == "cls":
        first = 0 if mask is None else mask.int().argmax(1)
        out = hidden[torch.arange(len(hidden), device=hidden.device), first]
    elif mask is None:
        out = hidden.mean(1)
    else:
        out = hidden.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(out, dim=-1) if normalise else out


class MaskedLM(Pretrained):
    """An encoder with BERT's head, which says what stood where a token was masked.

    Args:
        config: of the encoder; its activation is the head's too.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.dense = Linear(config.embed_dim, config.embed_dim, activation=config.activation)
        self.norm = make_norm(config)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, config.head_bias)
        initialise(self, config.num_layers)
        if config.tie_embeddings:
            self.head.weight = self.encoder.embedding.tokens.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Logits [B, S, V]; the options are those of `Encoder.forward`."""
        return linear(self._features(self.encoder(ids, mask, **options)), self.head.weight, self.head.bias)

    def loss(
        self,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Lengths | None = None,
        segments: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Cross entropy against targets [B, S], without the logits.

        Args:
            targets: int64, the token that stood there; -100 does not count, nor does padding. The head
                reads what counts alone.
            options: of `fastattn.linear_cross_entropy`; with reduction "none" there is a loss for each
                token that counts.
        """
        padding = self.encoder.find_padding(ids, mask, lengths)
        checks.check_targets(targets, ids)
        hidden = self.encoder.tokens(ids, padding, segments)
        targets = targets if padding is None else padding.pack(targets)
        counts = targets != -100
        features = self._features(hidden[counts])
        return linear_cross_entropy(
            features, self.head.weight, targets[counts], bias=self.head.bias, **options
        )

    def _features(self, hidden: Tensor) -> Tensor:
        out = self.norm(self.dense(hidden))
        return cast(Tensor, out * self.config.head_scale if self.config.head_scale != 1.0 else out)
