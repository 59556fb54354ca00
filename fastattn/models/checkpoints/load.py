"""From a folder or a file to a model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastattn.models.checkpoints.families import FAMILIES
from fastattn.models.checkpoints.family import Family
from fastattn.models.checkpoints.fill import Source, fill
from fastattn.models.checkpoints.folder import CONFIG, Folder, read_json
from fastattn.models.checkpoints.gguf_families import GGUF_FAMILIES, description
from fastattn.models.checkpoints.gguf_file import open_gguf
from fastattn.models.pretrained import Pretrained

Model = TypeVar("Model", bound=Pretrained)


class _Checkpoint(NamedTuple):
    file: Path  # that says what it is
    json: dict[str, Any]
    families: tuple[Family, ...]
    open: Callable[[], Source]


def load(
    path: str | Path, dtype: torch.dtype | None, device: torch.device | str | None, kind: type[Model]
) -> Model:
    """`from_pretrained`, for a model of this kind."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating type, got {dtype}")
    checkpoint = _find(Path(path).expanduser())
    file, json = checkpoint.file, checkpoint.json
    family = _family_of(file, json, checkpoint.families, kind)
    try:
        config = family.read_config(json)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    model = fill(family, config, checkpoint.open(), dtype, device)
    model.source = json if family in FAMILIES else None
    assert isinstance(model, kind)
    return model


def _find(path: Path) -> _Checkpoint:
    if path.suffix == ".gguf":
        opened = open_gguf(path)
        return _Checkpoint(path, description(opened), GGUF_FAMILIES, lambda: opened)
    if path.is_dir():
        return _Checkpoint(path / CONFIG, _config_of(path), FAMILIES, lambda: Folder(path))
    raise FileNotFoundError(
        f"there is no folder {path}. A model of the Hugging Face Hub becomes one by "
        "huggingface_hub.snapshot_download(name)"
    )


def _config_of(path: Path) -> dict[str, Any]:
    """config.json, with what generation_config.json says of the last token, as generation wants it."""
    json = read_json(path / CONFIG)
    if (file := path / "generation_config.json").exists():
        ends = read_json(file).get("eos_token_id")
        return json if ends is None else {**json, "eos_token_id": ends}
    return json


def _family_of(
    file: Path, json: Mapping[str, Any], families: tuple[Family, ...], kind: type[Pretrained]
) -> Family:
    """Of several for a model_type the one of the architecture, or the first."""
    given = json.get("model_type")
    fitting = [family for family in families if family.model_type == given]
    if not fitting:
        known = ", ".join(dict.fromkeys(family.model_type for family in families))
        raise ValueError(f"{file}: model_type must be one of {known}, got {given!r}")
    right = [family for family in fitting if issubclass(family.model, kind)]
    if not right:
        names = " or ".join(family.model.__name__ for family in fitting)
        raise TypeError(f"{file} is a {given}: a {names}, not a {kind.__name__}")
    named = [family for family in right if family.architecture in (json.get("architectures") or ())]
    return (named or right)[0]
