"""Whole language models as transformers runs them: a prompt, a token after it, a step of training.

Their weights are random, of the sizes of models that people run. transformers is imported late: it takes
seconds, and only these cases need it.
"""

import copy
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import accelerate
from fastattn.testing.cases.case import DTYPES, Call, Case, Checked, Curve, Part, Result
from fastattn.testing.cases.peers import OURS

Task = Literal["prefill", "decode", "train"]

_ROWS = 64  # of each gradient, that are held against float64
_LAYERS = 2  # of the model whose training step is, since the whole one would take minutes


class Architecture(NamedTuple):
    """A kind of model and its sizes. Embedding and head share a weight; nothing is dropped."""

    name: str
    family: Literal["gpt2", "llama"]
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int

    @property
    def layer_weights(self) -> int:
        """How many numbers the matrices of all layers have."""
        attention = 2 * self.hidden * self.hidden * (self.heads + self.kv_heads) // self.heads
        products = 3 if self.family == "llama" else 2
        return self.layers * (attention + products * self.hidden * self.inner)

    @property
    def head_weights(self) -> int:
        """How many numbers the matrix has that makes the logits."""
        return self.hidden * self.vocab

    @property
    def cached(self) -> int:
        """How many numbers the cache has for each token."""
        return 2 * self.layers * self.hidden * self.kv_heads // self.heads

    def config(self, transformers: Any) -> Any:
        """As transformers wants it."""
        tokens = {"vocab_size": self.vocab, "bos_token_id": None, "eos_token_id": None}
        if self.family == "gpt2":
            return transformers.GPT2Config(
                **tokens, n_layer=self.layers, n_embd=self.hidden, n_inner=self.inner, n_head=self.heads,
                n_positions=self.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )  # fmt: skip
        return transformers.LlamaConfig(
            **tokens, num_hidden_layers=self.layers, hidden_size=self.hidden, intermediate_size=self.inner,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions, tie_word_embeddings=True,
        )  # fmt: skip


class Inputs(NamedTuple):
    """A model and what it is given."""

    model: Any  # with torch's attention
    ids: Tensor  # [B, S]
    cache: Any  # the keys and values of all but the last token, for decode
    made: dict[str, Any]  # by peer: its own copy of the model


@dataclass(frozen=True)
class ModelCase(Case[Inputs]):
    """One model at one task."""

    op: ClassVar[str] = "model"

    architecture: Architecture
    task: Task
    length: int  # of each sequence; for decode, of the context before the one token
    batch: int = 1
    dtype: str = field(default="fp32", kw_only=True)
    curve: Curve | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """For example `decode 1,1000 gpt2-124m`: [B, S]."""
        return f"{self.task} {self.batch},{self.length} {self.architecture.name}"

    @property
    def peers(self) -> tuple[str, ...]:
        """See `Case`."""
        return "transformers", "eager", "compiled"

    @property
    def tokens(self) -> int:
        """Of one call."""
        return self.batch * (1 if self.task == "decode" else self.length)

    @property
    def is_bandwidth_bound(self) -> bool:
        """One token: bound by reading all weights, and the cache."""
        return self.task == "decode"

    @property
    def flops(self) -> int:
        """2 for each weight and token, 4 D for each pair of query and key; logits of those who need them."""
        sizes, trains = self.architecture, self.task == "train"
        pairs = self.length + 1 if self.task == "decode" else self.length * (self.length + 1) // 2
        attention = 4 * self.batch * sizes.layers * sizes.hidden * pairs
        products = 2 * self.tokens * sizes.layer_weights
        products += 2 * sizes.head_weights * (self.tokens if trains else self.batch)
        return 3 * products + attention * 7 // 2 if trains else products + attention

    @property
    def bytes(self) -> int:
        """Of the matrices, the gradients of them in training, and the cache."""
        sizes = self.architecture
        numbers = (sizes.layer_weights + sizes.head_weights) * (2 if self.task == "train" else 1)
        return (numbers + self.batch * self.length * sizes.cached) * DTYPES[self.dtype].itemsize

    def make_inputs(self, seed: int = 0) -> Inputs:
        """The same model and tokens for the same seed."""
        sizes, one_more = self.architecture, int(self.task == "decode")
        model = build(sizes, DTYPES[self.dtype], seed)
        ids = torch.randint(
            sizes.vocab, (self.batch, self.length + one_more), generator=torch.Generator().manual_seed(seed)
        )
        cache = None
        if self.task == "decode":
            with torch.no_grad():
                cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        return Inputs(model.train(self.task == "train"), ids, cache, {})

    def make_copies(self) -> list[Inputs]:
        """One: a model is cold by itself, since each layer waits for all others."""
        return [self.make_inputs()]

    def reads(self, x: Inputs) -> tuple[Tensor, ...]:
        """The matrices, the one of the head among them, and the cache."""
        positions = getattr(x.model.base_model, "wpe", None)
        rows = {id(p) for p in positions.parameters()} if positions is not None else set()
        matrices = (p for p in x.model.parameters() if p.ndim == 2 and id(p) not in rows)
        return (*matrices, *(t for layer in x.cache.layers for t in (layer.keys, layer.values)))

    def bind(self, peer: str, x: Inputs) -> Call:
        """See `Case`. Each peer has one model of its own, however often it is bound."""
        if peer not in x.made:
            x.made[peer] = self._treated(peer, x.model)
        model = x.made[peer]
        if self.task == "train":
            return Call(partial(_train, model, x.ids), partial(_gradients, model), self._names(x))
        run = partial(_prefill, model, x.ids)
        if self.task == "decode":
            run = partial(_decode, model, x.ids[:, -1:], copy.deepcopy(x.cache))
        return Call(run, lambda logits: (logits,), self._names(x))

    def _treated(self, peer: str, model: Any) -> Any:
        if peer == "transformers":
            return model
        model = copy.deepcopy(model)
        if peer == OURS:
            accelerate(model, pack=self.task != "train", loss=self.task == "train")
        elif peer == "eager":
            model.set_attn_implementation("eager")
        else:
            model = torch.compile(model, dynamic=False)
        return model

    def check(self, x: Inputs, peers: Sequence[str]) -> Checked:
        """See `Case`. In training the rule holds one sequence and a model of few layers, else the same."""
        if not self._is_too_long:
            return super().check(x, peers)
        small = replace(self, architecture=self.architecture._replace(layers=_LAYERS), batch=1)
        found = small.check(small.make_inputs(), peers)
        whole = super().check(x, list(found.errors))
        errors = {peer: found.errors[peer] for peer in whole.errors}
        return Checked(errors, whole.seconds, {**found.skipped, **whole.skipped})

    @property
    def _is_too_long(self) -> bool:
        return self.task == "train" and (self.batch > 1 or self.architecture.layers > _LAYERS)

    def parts(self, x: Inputs) -> Iterator[Part]:
        """The logits of the last token, or the loss and some rows of every gradient."""
        if self._is_too_long:
            return

        def reference(dtype: torch.dtype) -> Result:
            model = copy.deepcopy(x.model)
            if dtype is torch.float64:
                _make_exact(model)
            if self.task == "train":
                return _gradients(model, _train_by_formula(model, x.ids[0]))
            return (_last_logits(model, x.ids),)

        yield Part(reference, lambda result: result, self._names(x))

    def _names(self, x: Inputs) -> tuple[str, ...]:
        if self.task != "train":
            return ("logits",)
        return "loss", *(f"gradient of {name}" for name, _ in x.model.named_parameters())


def build(sizes: Architecture, dtype: torch.dtype, seed: int) -> Any:
    """A model with random weights, in evaluation."""
    transformers = importlib.import_module("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            sizes.config(transformers), dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval()


# ---- what is timed ----


@torch.inference_mode()
def _prefill(model: Any, ids: Tensor) -> Tensor:
    """As `generate` does it: fills a cache, and makes the logits of the last token alone."""
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits


@torch.inference_mode()
def _decode(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """One token more, which the cache forgets again: each call has the same context."""
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.crop(-1)
    return logits


def _train(model: Any, ids: Tensor) -> Tensor:
    """Forward and backward, without an optimizer."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss


def _gradients(model: nn.Module, loss: Tensor) -> Result:
    """The loss, and the first rows of each gradient."""
    rows = (p.grad[:_ROWS].clone() for p in model.parameters() if p.grad is not None)
    return (loss.detach(), *rows)


# ---- what it is held against ----


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    """Of the last token [B, 1, V], without a cache."""
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
    return logits


def _train_by_formula(model: Any, ids: Tensor) -> Tensor:
    """The mean loss of predicting each next token of a sequence, whose gradients the model then has.

    transformers would compute the loss in float32, also for the truth.
    """
    logits = model(ids[None, :-1], use_cache=False).logits[0]  # [S - 1, V]
    loss = F.cross_entropy(logits, ids[1:])
    loss.backward()
    return loss


def _make_exact(model: nn.Module) -> None:
    """float64 throughout: Llama's norms compute in float32, whatever the model is in."""
    model.double()
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)  # type: ignore[arg-type]
                exact.weight = norm.weight  # type: ignore[assignment]
                setattr(module, name, exact)


GPT2 = Architecture("gpt2-124m", "gpt2", 12, 768, 3072, 12, 12, vocab=50257, positions=1024)
# The sizes of SmolLM2-135M.
LLAMA = Architecture("llama-135m", "llama", 30, 576, 1536, 9, 3, vocab=49152, positions=8192)

_INFERENCE: tuple[tuple[Task, int], ...] = (("prefill", 1024), ("decode", 128), ("decode", 1000))
MODEL = [
    case
    for sizes in (GPT2, LLAMA)
    for case in (
        *(ModelCase(sizes, task, n, dtype=dtype) for task, n in _INFERENCE for dtype in ("fp32", "bf16")),
        ModelCase(sizes, "train", 512, batch=4),
    )
]
MODEL_QUICK = [
    case for case in MODEL if case.task != "train" and case.length >= 1000 and case.dtype == "fp32"
]
