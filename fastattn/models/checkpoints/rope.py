"""Rotary positions in a config.json, and the ways to stretch them over more tokens than were trained on.

Frequencies are those of `transformers.modeling_rope_utils`, in float64. Kinds that depend on how long a
sequence has become ("dynamic", "longrope") are refused: keys in a cache were turned by the old ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoints.entries import Json
from fastattn.models.config import ModelConfig

# What each kind must have, and what it may have.
_NEEDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), {"original_max_position_embeddings", "factor"}),
    "linear": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate"},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """rope_theta, and rope_parameters or, as it was called before, rope_scaling.

    Args:
        base: where config.json has none.
    """

    base: float = 10000.0

    @property
    def keys(self) -> tuple[str, ...]:
        return ("rope_theta", "rope_parameters", "rope_scaling", "rope_interleaved", "partial_rotary_factor")

    def read(self, json: Json) -> dict[str, Any]:
        name = "rope_scaling" if json.get("rope_scaling") else "rope_parameters"
        given = json.get(name) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must be an object, got {given!r}")
        given = {key: value for key, value in given.items() if value is not None}
        base = given.pop("rope_theta", json.get("rope_theta") or self.base)
        kinds = given.pop("rope_type", "default"), given.pop("type", "default")
        kind = kinds[0] if kinds[0] != "default" else kinds[1]
        share = given.pop("partial_rotary_factor", json.get("partial_rotary_factor") or 1.0)
        if share != 1.0:
            raise ValueError(f"partial_rotary_factor must be 1.0, got {share!r}")
        if json.get("rope_interleaved"):
            raise ValueError(f"rope_interleaved must be false, got {json['rope_interleaved']!r}")
        given.setdefault("original_max_position_embeddings", json.get("max_position_embeddings"))
        head_dim = json.get("head_dim") or json["hidden_size"] // max(1, json["num_attention_heads"])
        return {"rotary_base": base, **stretched(kind, head_dim, base, given, name)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        # A stretched config is not written: read again it would not be the same, and is told by that.
        return {"rope_theta": config.rotary_base}


def stretched(kind: str, dim: int, base: float, settings: Json, name: str) -> dict[str, Any]:
    """rotary_inv_freq and rotary_scale of ModelConfig.

    Args:
        kind: "default", "linear", "llama3" or "yarn".
        dim: values of a head that are turned.
        settings: of the kind, with transformers' names.
        name: of the settings, for errors.
    """
    if kind not in _NEEDS:
        raise ValueError(f"{name}: the type must be one of {', '.join(_NEEDS)}, got {kind!r}")
    needed, allowed = _NEEDS[kind]
    if missing := needed - settings.keys():
        raise ValueError(f"{name} of type {kind} must have {', '.join(sorted(missing))}")
    if unknown := settings.keys() - needed - allowed:
        raise ValueError(f"{name} of type {kind} has what is not understood: {', '.join(sorted(unknown))}")
    for key, value in settings.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name}: {key} must be a number, got {value!r}")
    if kind == "default":
        return {}
    inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "linear":
        return {"rotary_inv_freq": tuple((inv_freq / settings["factor"]).tolist())}
    if kind == "llama3":
        return {"rotary_inv_freq": tuple(_llama3(inv_freq, settings).tolist())}
    return {
        "rotary_inv_freq": tuple(_yarn(inv_freq, dim, base, settings).tolist()),
        "rotary_scale": _yarn_scale(settings),
    }


def _llama3(inv_freq: Tensor, settings: Json) -> Tensor:
    """Pairs that turn often within the old context stay, slow ones are stretched, others are mixed."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = settings["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    mixed: Tensor = kept * inv_freq + (1.0 - kept) * inv_freq / settings["factor"]
    return mixed


def _yarn(inv_freq: Tensor, dim: int, base: float, settings: Json) -> Tensor:
    """The same idea, mixed by the pair's number instead of its turns. Source: arXiv:2309.00071, 3.2."""
    context = settings["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_with(settings.get("beta_fast") or 32), pair_with(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    stretch = ((pairs - first) / (last - first or 0.001)).clamp(0.0, 1.0)
    mixed: Tensor = inv_freq * (1.0 - stretch) + inv_freq / settings["factor"] * stretch
    return mixed


def _yarn_scale(settings: Json) -> float:
    """What cosines and sines are multiplied by, since softmax gets flatter with more keys."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(settings["factor"]) + 1.0 if settings["factor"] > 1 else 1.0

    if (given := settings.get("attention_factor")) is not None:
        return float(given)
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(settings["mscale"]) / scale(settings["mscale_all_dim"])
    return scale(1.0)
