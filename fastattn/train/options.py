"""What a run is told: one dataclass, which is the command line, the file run.json and the model's config."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.models import ModelConfig, Sampling


class Refusal(Exception):
    """What the user has to mend, in one line; `code` is the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def _option(default: Any, help: str, kind: Any = None, metavar: str = "N", *, later: bool = False) -> Any:
    """A field of the command line. later: --resume may change it."""
    told = {"help": help, "kind": kind or type(default), "metavar": metavar, "later": later}
    return dataclasses.field(default=default, metadata=told)


@dataclass(frozen=True)
class Options:
    """Everything that a run depends on. The defaults make a model of 5.9 million weights."""

    data: tuple[str, ...] = _option(
        (), "files, folders, globs, or stdlib: the sources of Python's standard library", metavar="PATH"
    )
    out: str = _option("", "the run's folder", metavar="DIR", later=True)
    tokenizer: str = _option("bpe", "how text becomes tokens", ("bpe", "bytes"))
    vocab_size: int = _option(4096, "tokens that bpe learns at most, 257 or more")
    valid_share: float = _option(0.05, "share of the data that is held back for evaluation", metavar="X")

    family: str = _option(
        "llama", "llama: rotary, RMS norms, SwiGLU; gpt2: learned positions, layer norms", ("llama", "gpt2")
    )
    layers: int = _option(6, "number of layers")
    dim: int = _option(256, "size of a token's vector")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(0, "heads of keys and values (default: as many as query heads)")
    hidden: int = _option(0, "inner size of the feed-forward layers (default: 8/3 of --dim; gpt2: 4)")
    context: int = _option(256, "tokens of a window, and the most that the model can see")
    dropout: float = _option(0.0, "share of what embeddings and layers add that is dropped", metavar="X")

    steps: int = _option(1000, "optimizer steps", later=True)
    batch: int = _option(32, "windows a step, over all processes")
    micro_batch: int = _option(0, "windows at a time; more are accumulated (default: all)", later=True)
    lr: float = _option(2e-3, "the highest learning rate", metavar="X")
    min_lr: float = _option(0.1, "the last learning rate, as a share of --lr", metavar="X")
    warmup: int = _option(50, "steps in which the learning rate rises")
    weight_decay: float = _option(0.1, "AdamW's, of matrices alone", metavar="X")
    beta2: float = _option(0.95, "AdamW's average of squares", metavar="X")
    clip: float = _option(1.0, "largest norm of the gradient; 0: any", metavar="X")
    dtype: str = _option("fp32", "of products and attention; weights are fp32 in both", ("fp32", "bf16"))
    seed: int = _option(0, "of weights, windows, dropout and the split")

    eval_every: int = _option(100, "steps between evaluations", later=True)
    eval_windows: int = _option(64, "windows of an evaluation; the last one reads all")
    patience: int = _option(0, "evaluations without progress after which it stops; 0: never", later=True)
    save_every: int = _option(0, "steps between checkpoints (default: --eval-every)", later=True)
    prompt: tuple[str, ...] = _option(
        (), "what samples begin with (default: parts of the held back data)", metavar="TEXT", later=True
    )
    sample_tokens: int = _option(128, "tokens of a sample; 0: no samples", later=True)
    temperature: float = _option(0.8, "of samples; 0: the likeliest token", metavar="X", later=True)
    fsdp: bool = _option(False, "torchrun: shard weights with FSDP2 instead of copying them", later=True)
    ops: str = _option(
        "fastattn", "torch: the same model on plain PyTorch ops, to compare", ("fastattn", "torch")
    )

    def __post_init__(self) -> None:
        at_least = {"eval_every": 1, "steps": 1, "batch": 1, "context": 1, "eval_windows": 1}
        at_least |= dict.fromkeys(("layers", "dim", "heads"), 1) | {"vocab_size": 257}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0.0):
                raise Refusal(f"{_flag(field.name)} must be finite and at least 0, got {value}")
            lowest = at_least.get(field.name, 0)
            if type(value) is int and not lowest <= value < 2**63:
                raise Refusal(f"{_flag(field.name)} must be at least {lowest}, got {value}")
        if not 0.0 < self.valid_share <= 0.5:
            raise Refusal(f"--valid-share must be over 0 and at most 0.5, got {self.valid_share}")
        if self.lr == 0.0:
            raise Refusal("--lr must be over 0, got 0.0")
        for name, allowed in (("min_lr", 1.0), ("beta2", 1.0), ("dropout", 1.0)):
            if getattr(self, name) > allowed or (name != "min_lr" and getattr(self, name) == 1.0):
                raise Refusal(f"{_flag(name)} must be below 1, got {getattr(self, name)}")
        if self.micro_batch and self.batch % self.micro_batch:
            raise Refusal(f"--micro-batch must divide --batch {self.batch}, got {self.micro_batch}")
        try:
            Sampling(self.temperature)
        except ValueError as error:
            raise Refusal(f"--temperature: {error}") from error
        self.config(257)

    def config(self, vocab_size: int) -> ModelConfig:
        """The model, once the size of the vocabulary is known."""
        gpt2 = self.family == "gpt2"
        # SwiGLU's three matrices have the weights of two with 4 dim; kernels like multiples of 32.
        hidden = self.hidden or (4 * self.dim if gpt2 else 32 * math.ceil(self.dim / 12))
        make = ModelConfig.gpt2 if gpt2 else ModelConfig
        try:
            return make(
                vocab_size=vocab_size, embed_dim=self.dim, num_layers=self.layers, num_heads=self.heads,
                num_kv_heads=self.kv_heads, hidden_dim=hidden, max_positions=self.context,
                dropout=self.dropout, eos_ids=(0,),
            )  # fmt: skip
        except ValueError as error:
            raise Refusal(f"the model: {error}") from error

    @property
    def saves_every(self) -> int:
        """Steps between checkpoints."""
        return self.save_every or self.eval_every

    def resumed(self, given: dict[str, Any]) -> "Options":
        """With what a later command line gives. Raises Refusal where that would make another run of it."""
        for field in dataclasses.fields(self):
            before = getattr(self, field.name)
            asked = given.get(field.name, before)
            if asked != before and not field.metadata["later"]:
                raise Refusal(
                    f"{_flag(field.name)} is {_shown(before)} in this run and stays so, got {_shown(asked)}; "
                    "another --out starts a run of its own"
                )
        return dataclasses.replace(self, **given)

    def to_json(self) -> str:
        """As `from_file` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "Options":
        """Raises Refusal where it is no such file."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(**found | {name: tuple(found[name]) for name in ("data", "prompt")})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Refusal(f"{path} does not hold a run's options: {error}") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
