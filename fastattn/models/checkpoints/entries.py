"""What the keys of a config.json mean. An entry is read in one direction and written in the other.

A key that no entry knows is an error, since what it asks for would not be done.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastattn.models.config import ModelConfig

Json = Mapping[str, Any]
REQUIRED = object()

# Keys that change nothing in what a model computes from tokens.
UNUSED = {
    "_attn_implementation", "_name_or_path", "_num_labels", "architectures", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_range",
    "is_llama_config", "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length",
    "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "output_scores",
    "prefix", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
    "use_bfloat16", "use_cache",
}  # fmt: skip

# Keys that ask for nothing where they are false; families have entries for those that they know.
_SWITCHES = {"add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"}

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu",
    "sigmoid": "sigmoid", "tanh": "tanh",
}  # fmt: skip


class Entry(Protocol):
    """Some keys of config.json, and what they say about a `ModelConfig`."""

    @property
    def keys(self) -> tuple[str, ...]:
        """All that it understands."""

    def read(self, json: Json) -> dict[str, Any]:
        """Arguments of ModelConfig. Raises ValueError where the keys ask for what models do not do."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys, for this config."""


@dataclass(frozen=True)
class Field:
    """A key that is a field of ModelConfig under another name.

    Args:
        theirs: the key.
        ours: the field.
        default: where the key is missing or null, a value or a function of the others; None: ModelConfig's.
        read_value: from their value to ours.
        write_value: and back.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    read_value: Callable[[Any], Any] = lambda value: value
    write_value: Callable[[Any], Any] = lambda value: value

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, json: Json) -> dict[str, Any]:
        value = json.get(self.theirs)
        if value is None:
            value = self.default(json) if callable(self.default) else self.default
        if value is REQUIRED:
            raise ValueError(f"{self.theirs} is missing")
        return {} if value is None else {self.ours: self.read_value(value)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.write_value(getattr(config, self.ours))}


@dataclass(frozen=True)
class Only:
    """A key that may only have values which ask for nothing special. A missing or null one is fine."""

    theirs: str
    accepts: Callable[[Any], bool]
    allowed: str

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.theirs,)

    def read(self, json: Json) -> dict[str, Any]:
        value = json.get(self.theirs)
        if value is not None and not self.accepts(value):
            raise ValueError(f"{self.theirs} must be {self.allowed}, got {value!r}")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Unread:
    """Keys that change nothing in what a model of this family computes."""

    keys: tuple[str, ...]

    def read(self, json: Json) -> dict[str, Any]:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


def fixed(theirs: str, value: Any) -> Only:
    """A key that must have this value."""
    return Only(theirs, lambda given: bool(given == value), repr(value))


def activation(theirs: str, default: str) -> Field:
    """The name of an activation."""

    def read(name: Any) -> str:
        if name not in _ACTIVATIONS:
            raise ValueError(f"{theirs} must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
        return _ACTIVATIONS[name]

    ours = {ours: name for name, ours in reversed(_ACTIVATIONS.items()) if name != "gelu_python"}
    return Field(theirs, "activation", default, read, ours.__getitem__)


def tokens() -> tuple[Field, ...]:
    """Those with a meaning."""

    def read_eos(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, list) else (value,)

    def write_eos(ids: tuple[int, ...]) -> int | list[int] | None:
        return list(ids) if len(ids) > 1 else ids[0] if ids else None

    return (
        Field("pad_token_id", "pad_id", None),
        Field("bos_token_id", "bos_id", None),
        Field("eos_token_id", "eos_ids", None, read_eos, write_eos),
    )


def read_all(entries: tuple[Entry, ...], json: Json) -> dict[str, Any]:
    """The arguments of ModelConfig that all entries give. Raises ValueError where two differ."""
    given: dict[str, Any] = {}
    source: dict[str, str] = {}
    for entry in entries:
        for name, value in entry.read(json).items():
            key = ", ".join(entry.keys)
            if name in given and given[name] != value:
                raise ValueError(
                    f"{source[name]} and {key} must be the same, got {given[name]!r} and {value!r}"
                )
            given[name], source[name] = _typed(name, value, key), key
    known = UNUSED.union(*(entry.keys for entry in entries))
    known |= {key for key in _SWITCHES if json.get(key) is False}
    # Nothing, an empty list and an empty object ask for nothing either.
    if unknown := {key for key, value in json.items() if key not in known and value not in (None, [], {})}:
        listed = ", ".join(f"{key} = {json[key]!r}" for key in sorted(unknown))
        raise ValueError(
            f"{listed}: not understood. What changes the computation is not supported; "
            "what does not can be removed from the file"
        )
    return given


def _typed(name: str, value: Any, key: str) -> Any:
    """The value in the field's type."""
    kind = ModelConfig.__annotations__[name]
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is not kind:
        raise ValueError(f"{key} must be of type {kind.__name__}, got {value!r}")
    return value
