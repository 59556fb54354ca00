"""The tensors of a folder: model.safetensors, or the shards that model.safetensors.index.json lists."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.models.checkpoints.packages import package

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str  # as the file calls its type
    dtype: torch.dtype | None  # of what is read; None: it is no float


class Folder:
    """Opens the files of a folder and reads their heads; tensors are read one by one.

    Attributes:
        stored: the tensors, by name.
    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is not what its name says, or is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.stored: dict[str, Stored] = {}
        self._open: dict[Path, Any] = {}
        for file, names in self._files(path):
            opened = _open(file)
            self._open[file] = opened
            found = set(opened.keys())
            if missing := sorted(names - found):
                raise ValueError(f"{file} has no {missing[0]}, which {INDEX} says it has")
            for name in found:
                view = opened.get_slice(name)
                kind = view.get_dtype()
                self.stored[name] = Stored(file, name, tuple(view.get_shape()), kind, _TYPES.get(kind))

    def read(self, stored: Stored) -> Tensor:
        """In memory of its own."""
        tensor: Tensor = self._open[stored.file].get_tensor(stored.name)
        return tensor

    def _files(self, path: Path) -> Iterator[tuple[Path, set[str]]]:
        """Each file, and the tensors that it must have."""
        if (single := path / WEIGHTS).exists():
            yield single, set()
            return
        index = path / INDEX
        if not index.exists():
            other = next((p.name for p in sorted(path.glob("*.bin"))), None)
            pickled = f"; {other} is a pickle, which can run code: save it as safetensors" if other else ""
            raise FileNotFoundError(f"{path} has neither {WEIGHTS} nor {INDEX}{pickled}")
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
            raise ValueError(f"{index} has no weight_map of tensors and their files")
        for file in sorted(set(places.values())):
            if Path(file).name != file or not (path / file).is_file():
                raise FileNotFoundError(f"{index} lists {file}, which is not in {path}")
            yield path / file, {name for name, place in places.items() if place == file}


def _open(file: Path) -> Any:
    safetensors = package("safetensors")
    try:
        # Not mapped: each page would be held twice until the file is closed.
        return safetensors.safe_open(file, framework="pt", backend="pread")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {_what_is_cut(file) or error}") from error


def _what_is_cut(file: Path) -> str | None:
    """Which tensor a file breaks off in, where its head is still there."""
    data_size = file.stat().st_size - 8
    with file.open("rb") as stream:
        head_size = int.from_bytes(stream.read(8), "little")
        if not 0 < head_size <= data_size:
            return "it breaks off before the list of its tensors ends"
        try:
            head = json.loads(stream.read(head_size))
            ends = {name: x["data_offsets"][1] for name, x in head.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, IndexError):
            return None
    data_size -= head_size
    if not ends or max(ends.values()) <= data_size:
        return None
    first = min((end, name) for name, end in ends.items() if end > data_size)[1]
    return f"it has {data_size} of {max(ends.values())} bytes and breaks off in {first}"


def read_json(file: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError that name the file."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {type(found).__name__}")
    return found
