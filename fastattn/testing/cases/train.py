"""Steps of training a `DecoderLM`: beside its twin on plain PyTorch, as it is and compiled.

A step is what stands between two batches: the loss, its gradients, AdamW. Its learning rate is 0, which takes
as long as any other, so that every call starts from the same weights.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastattn.models import DecoderLM, ModelConfig
from fastattn.testing.cases.case import DTYPES, Call, Case, Checked, Curve, Part, Result
from fastattn.testing.cases.peers import OURS
from fastattn.testing.plain_model import PlainLM

_ROWS = 64  # of each gradient, that are held against float64
_LAYERS = 2  # of the model whose step is, since the whole one would take minutes


class Inputs(NamedTuple):
    """A model, a batch, and what the peers have made of them."""

    model: DecoderLM
    ids: Tensor  # [B, S]
    targets: Tensor  # [B, S]
    made: dict[str, Callable[[], tuple[DecoderLM, Tensor]]]  # by peer: its step, on its own copy of the model


@dataclass(frozen=True)
class TrainCase(Case[Inputs]):
    """One model and one size of batch."""

    op: ClassVar[str] = "train"

    model: str  # how the report calls the config
    config: ModelConfig
    batch: int
    length: int
    dtype: str = field(default="fp32", kw_only=True)
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """For example `step 4,512 gpt2-124m`: [B, S]."""
        return f"step {self.batch},{self.length} {self.model}"

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "torch", "compiled"

    @property
    def tokens(self) -> int:
        """Of one call."""
        return self.batch * self.length

    @property
    def weights(self) -> int:
        """How many numbers the matrices have that a token is multiplied with."""
        sizes = self.config
        attention = 2 * sizes.embed_dim * sizes.head_dim * (sizes.num_heads + sizes.num_kv_heads)
        feed_forward = (3 if sizes.gated else 2) * sizes.embed_dim * sizes.hidden_dim
        return sizes.num_layers * (attention + feed_forward) + sizes.vocab_size * sizes.embed_dim

    @property
    def flops(self) -> int:
        """6 for each weight and token, 14 D for each pair of query and key; AdamW has few."""
        pairs = self.batch * self.length * (self.length + 1) // 2
        attention = 14 * self.config.num_layers * self.config.num_heads * self.config.head_dim * pairs
        return 6 * self.tokens * self.weights + attention

    @property
    def bytes(self) -> int:
        """Of weights, gradients and AdamW's two averages."""
        return 4 * self.weights * DTYPES[self.dtype].itemsize

    def make_inputs(self, seed: int = 0) -> Inputs:
        """The same model and tokens for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = DecoderLM(self.config).to(DTYPES[self.dtype])
            tokens = torch.randint(self.config.vocab_size, (self.batch, self.length + 1))
        return Inputs(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), {})

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`. Each peer has one model of its own, however often it is bound."""
        if peer not in x.made:
            model = copy.deepcopy(x.model)
            loss: Any = model.loss if peer == OURS else PlainLM(model).loss
            if peer == "compiled":
                loss = torch.compile(loss, dynamic=False)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
            x.made[peer] = partial(_step, model, partial(loss, x.ids, x.targets), optimizer)
        return Call(x.made[peer], lambda result: _gradients(*result), self._names(x))

    def check(self, x: Inputs, peers: Sequence[str]) -> Checked:
        """See `Case`. The rule holds one sequence and a model of few layers, else the same."""
        if not self._is_too_long:
            return super().check(x, peers)
        small = replace(self, config=replace(self.config, num_layers=_LAYERS), batch=1)
        found = small.check(small.make_inputs(), peers)
        whole = super().check(x, list(found.errors))
        errors = {peer: found.errors[peer] for peer in whole.errors}
        return Checked(errors, whole.seconds, {**found.skipped, **whole.skipped})

    @property
    def _is_too_long(self) -> bool:
        return self.batch > 1 or self.config.num_layers > _LAYERS

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The loss and some rows of every gradient."""
        if self._is_too_long:
            return

        def reference(dtype: torch.dtype) -> Result:
            model = copy.deepcopy(x.model).to(dtype)
            loss = PlainLM(model).loss(x.ids, x.targets)
            loss.backward()
            return _gradients(model, loss)

        yield Part(reference, lambda result: result, self._names(x))

    def _names(self, x: Inputs) -> tuple[str, ...]:
        return "loss", *(f"gradient of {name}" for name, _ in x.model.named_parameters())


def _step(
    model: DecoderLM, loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> tuple[DecoderLM, Tensor]:
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    optimizer.step()
    return model, loss


def _gradients(model: DecoderLM, loss: Tensor) -> Result:
    """The loss, and the first rows of each gradient."""
    rows = (p.grad[:_ROWS].clone() for p in model.parameters() if p.grad is not None)
    return (loss.detach(), *rows)


GPT2 = ModelConfig.gpt2(
    vocab_size=50257, embed_dim=768, num_layers=12, num_heads=12, hidden_dim=3072, max_positions=1024
)
SMALL = ModelConfig(
    vocab_size=4096, embed_dim=320, num_layers=7, num_heads=5, hidden_dim=864, max_positions=512
)

TRAIN = [TrainCase("gpt2-124m", GPT2, 4, 512), TrainCase("llama-10m", SMALL, 8, 512)]
TRAIN_QUICK = [TrainCase("llama-10m", SMALL, 2, 512)]
