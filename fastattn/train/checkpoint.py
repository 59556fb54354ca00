"""Checkpoints: one safetensors file with everything that the next step depends on.

There is no state of random generators in it: windows and dropout follow from (seed, step) alone. Tensors are
whole, however the run that wrote them was spread, so that a run may go on with other processes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastattn.models import ModelConfig
from fastattn.train.files import write_atomically
from fastattn.train.options import Refusal
from fastattn.train.parallel import like, whole

LAST, BEST = "last.safetensors", "best.safetensors"
_MODEL, _OPTIMIZER = "model.", "optimizer."


class NotSaved(Exception):
    """A checkpoint could not be written; what was there before is whole."""


@dataclasses.dataclass
class Progress:
    """Where a run is, beside its tensors."""

    step: int = 0  # how many are done
    best_loss: float | None = None  # of the evaluations that have a checkpoint
    best_step: int = 0
    stale: int = 0  # evaluations since then
    seconds: float = 0.0  # that the steps took


def gather(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All tensors, by name; every process has to call it. A tied weight is there once."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[_MODEL + name] = whole(p.detach())
        if optimizer is not None:
            for key, value in optimizer.state[p].items():
                tensors[f"{_OPTIMIZER}{name}.{key}"] = whole(value)
    return tensors


def save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        facts: what goes with the tensors, as JSON has it.
    Raises:
        NotSaved: the disk is full, or what else the system says; the file from before is still there.
    """
    told = {"fastattn": json.dumps(facts)}
    try:
        write_atomically(path, lambda beside: save_file(tensors, beside, told))
    except (OSError, SafetensorError) as error:
        raise NotSaved(f"cannot write {path}: {error}") from error


def read_facts(path: Path) -> dict[str, Any]:
    """What was saved with the tensors. Raises Refusal where it is no whole checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["fastattn"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{path} is not a whole checkpoint: {error}") from error


def check_facts(path: Path, facts: dict[str, Any], config: ModelConfig, tokenizer_hash: str) -> None:
    """Raises Refusal where a checkpoint is of another model or of another tokenizer."""
    saved = facts.get("config", {})
    for name, value in config_facts(config).items():
        if saved.get(name) != value:
            raise Refusal(f"{path} has a model with {name} {saved.get(name)}, and this run's is {value}")
    if facts.get("tokenizer") != tokenizer_hash:
        raise Refusal(f"{path} was trained with another tokenizer than the one beside it")


def config_facts(config: ModelConfig) -> dict[str, Any]:
    """A config as it comes back from JSON."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config))))


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Fills a model, and an optimizer that has made no step, from a checkpoint that fits.

    Raises:
        Refusal: a tensor is missing, or has another shape. Nothing is filled then.
    """
    with safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, p in model.named_parameters():
            if shapes.get(_MODEL + name) != tuple(p.shape):
                found = shapes.get(_MODEL + name, "nothing")
                raise Refusal(f"{path}: {name} should be {list(p.shape)}, it is {found}")
            if optimizer is not None and f"{_OPTIMIZER}{name}.exp_avg" not in shapes:
                raise Refusal(f"{path} has no averages of {name}")
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(like(p, file.get_tensor(_MODEL + name)))
            if optimizer is not None:
                prefix = f"{_OPTIMIZER}{name}."
                state = {x.removeprefix(prefix): file.get_tensor(x) for x in shapes if x.startswith(prefix)}
                optimizer.state[p] = {k: x if x.ndim == 0 else like(p, x) for k, x in state.items()}
