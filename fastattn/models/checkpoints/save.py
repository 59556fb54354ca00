"""From a model to a folder that transformers loads, and we do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastattn.models.checkpoints.families import FAMILIES
from fastattn.models.checkpoints.family import Family, parameters
from fastattn.models.checkpoints.folder import CONFIG, WEIGHTS
from fastattn.models.checkpoints.packages import package
from fastattn.models.pretrained import Pretrained


def save(model: Pretrained, path: str | Path) -> None:
    """`save_pretrained`."""
    save_file = package("safetensors.torch").save_file
    family, description = _describe(model)
    path = Path(path).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    once, _ = parameters(model)
    tensors: dict[str, Tensor] = {}
    for name, parameter in once.items():
        for piece in family.pieces(name, parameter, model.config):
            tensors[piece.name] = piece.order.write(parameter.detach()[piece.rows], model.config).contiguous()
    dtype = str(next(iter(once.values())).dtype).removeprefix("torch.")
    text = json.dumps({**description, "dtype": dtype}, indent=2, sort_keys=True) + "\n"
    _replace(path / WEIGHTS, lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    _replace(path / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))


def _describe(model: Pretrained) -> tuple[Family, dict[str, Any]]:
    """The first family that can say the model's config; the config.json it came from, if it still holds."""
    families = [family for family in FAMILIES if family.model is type(model)]
    if model.source is not None:
        for family in families:
            if (
                family.model_type == model.source["model_type"]
                and family.read_config(model.source) == model.config
            ):
                kept = {key: value for key, value in model.source.items() if key != "torch_dtype"}
                return family, {**kept, "architectures": [family.architecture]}
    reasons = []
    for family in families:
        try:
            return family, family.write_config(model.config)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no family can say the config of this {type(model).__name__}: {'; '.join(reasons)}")


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside the file, and puts it in its place when it is whole."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
