"""A family of models: what its config.json means, and which of its tensors are which of our parameters.

One table is read in both directions, to load and to save.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastattn.models.checkpoints.entries import Entry, Json, read_all
from fastattn.models.config import ModelConfig
from fastattn.models.pretrained import Pretrained

# These change nothing in evaluation. Where a family has no key for them, ours holds them.
_TRAINING = ("dropout", "attention_dropout")
_OURS = "fastattn"


class Order(NamedTuple):
    """How a tensor is stored: what makes ours of it, and what makes it of ours. Both may be views."""

    read: Callable[[Tensor, ModelConfig], Tensor]
    write: Callable[[Tensor, ModelConfig], Tensor]


AS_IS = Order(lambda x, _: x, lambda x, _: x)
TRANSPOSED = Order(lambda x, _: x.mT, lambda x, _: x.mT)


class Part(NamedTuple):
    """A stored tensor that is a parameter of ours, or some of its rows."""

    name: str | Callable[[ModelConfig], str]  # "{}" stands for a layer's number
    rows: Callable[[ModelConfig], int] | None = None  # None: all of them
    order: Order = AS_IS


class Piece(NamedTuple):
    """A `Part` of one parameter of one model."""

    name: str
    rows: slice
    shape: tuple[int, ...]  # as it is stored
    order: Order


def joined(
    template: str, *names: str, rows: tuple[Callable[[ModelConfig], int], ...], order: Order = AS_IS
) -> tuple[Part, ...]:
    """Parts that stand one below the other in a parameter; each name is put in for "*"."""
    return tuple(
        Part(template.replace("*", name), count, order) for name, count in zip(names, rows, strict=True)
    )


def query_rows(config: ModelConfig) -> int:
    """Rows of a projection to the queries."""
    return config.num_heads * config.head_dim


def key_rows(config: ModelConfig) -> int:
    """Rows of a projection to the keys, or to the values."""
    return config.num_kv_heads * config.head_dim


QKV_ROWS = (query_rows, key_rows, key_rows)


@dataclass(frozen=True)
class Family:
    """Models that one class of transformers computes, or one kind of GGUF file holds.

    Args:
        model_type: as config.json has it.
        model: our class.
        architecture: transformers' class.
        entries: the keys of config.json.
        choices: fields of ModelConfig that are the same for all of the family.
        tensors: our parameters' names, with "{}" for numbers, and what they are made of. A parameter that a
            model does not have, such as a bias, needs nothing. None: the names are ours.
        prefix: of the tensors' names; checkpoints without the head are stored without it.
        unused: a pattern of stored tensors that are no parameters.
        renamed: patterns of names in old files, and what they are called now.
        unties: a stored copy of the embedding that differs is a head of its own, whatever the config says.
    """

    model_type: str
    model: type[Pretrained]
    architecture: str
    entries: tuple[Entry, ...]
    choices: Mapping[str, Any]
    tensors: Mapping[str, str | Part | tuple[Part, ...]] | None
    prefix: str = ""
    unused: str = r"$^"
    renamed: Mapping[str, str] = field(default_factory=dict)
    unties: bool = False

    def read_config(self, json: Json) -> ModelConfig:
        """Raises ValueError where a key is missing, not understood or asks for what models do not do."""
        rest = {key: value for key, value in json.items() if key != _OURS}
        return ModelConfig(**{**self.choices, **read_all(self.entries, rest), **json.get(_OURS, {})})

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """A config.json. Raises ValueError where it would not be this config."""
        json: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for entry in self.entries:
            json |= entry.write(config)
        back = self.read_config(json)
        differing = [f.name for f in fields(config) if getattr(config, f.name) != getattr(back, f.name)]
        if lost := [name for name in differing if name not in _TRAINING]:
            listed = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
            raise ValueError(f"{self.model_type} has no {listed}")
        if differing:
            json[_OURS] = {name: getattr(config, name) for name in differing}
        return json

    def full_names(self, stored: Collection[str]) -> dict[str, str]:
        """What each stored tensor is called in `tensors`."""
        now = {}
        for name in stored:
            now[name] = name
            for old, new in self.renamed.items():
                now[name] = re.sub(old, new, now[name])
        if any(name.startswith(self.prefix) for name in stored):
            return now
        return {name: self.prefix + new for name, new in now.items()}

    def pieces(self, name: str, parameter: Tensor, config: ModelConfig) -> Iterator[Piece]:
        """What the parameter of this name is made of."""
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        parts: Any = name if self.tensors is None else self.tensors[re.sub(r"\.\d+(?=\.)", ".{}", name)]
        if not isinstance(parts, tuple) or isinstance(parts, Part):
            parts = (Part(parts) if isinstance(parts, str) else parts,)
        start = 0
        for part in parts:
            stop = parameter.shape[0] if part.rows is None else start + part.rows(config)
            rows = slice(start, stop)
            shape = tuple(part.order.write(parameter[rows], config).shape)
            stored = part.name(config) if callable(part.name) else part.name
            yield Piece(stored.format(*numbers), rows, shape, part.order)
            start = stop


def parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
    """A model's parameters, each once, and the further names of some of them with their first."""
    first: dict[int, str] = {}
    once: dict[str, nn.Parameter] = {}
    again: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) == name:
            once[name] = parameter
        else:
            again[name] = known
    return once, again
