"""A GGUF file, read by the gguf package: its metadata, and its tensors in floating types."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoints.folder import Stored
from fastattn.models.checkpoints.packages import package

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufFile:
    """Opens a file and reads its head; tensors are dequantised one by one.

    Attributes:
        metadata: the keys and their values.
        stored: the tensors, by name; those of quantised types are read as float32.
    Raises:
        ValueError: it is no GGUF file, is cut off, or is one of several that belong together.
    """

    def __init__(self, path: Path) -> None:
        self._gguf = package("gguf")
        try:
            reader = _reader(self._gguf)(path)
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise ValueError(f"{path} is not a whole GGUF file: {error}") from error
        if reader.byte_order != "I":
            raise ValueError(f"{path} was written for the other byte order")
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one of {self.metadata['split.count']} files; merge them first")
        # Not the reader: it holds an object for each token of the vocabulary.
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.stored = {name: self._describe(path, tensor) for name, tensor in self._tensors.items()}

    def read(self, stored: Stored) -> Tensor:
        """In memory of its own, or in the dequantised copy's."""
        tensor = self._tensors[stored.name]
        values = self._gguf.dequantize(tensor.data, tensor.tensor_type)
        # A view of the file is read-only, which torch warns of.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def _describe(self, path: Path, tensor: Any) -> Stored:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        kind = tensor.tensor_type.name
        return Stored(path, tensor.name, shape, kind, _PLAIN.get(kind, self._dequantised(tensor)))

    def _dequantised(self, tensor: Any) -> torch.dtype | None:
        try:
            self._gguf.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            return None
        return torch.float32


def open_gguf(path: Path) -> GgufFile:
    """The last file is remembered while it stays as it is: to read the head takes seconds."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    status = path.stat()
    return _opened(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _opened(path: Path, size: int, changed: int) -> GgufFile:
    return GgufFile(path)


def _reader(gguf: Any) -> type[Any]:
    """gguf's reader, which says of a file that is cut off only that some array cannot be reshaped."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _build_tensors(self, start: int, fields: Any) -> None:
            for field in fields:
                _, name, _, sizes, kind, offset = field.parts
                block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                end = start + int(offset[0]) + int(sizes.prod()) // block * block_bytes
                if end > len(self.data):
                    raise ValueError(
                        f"it has {len(self.data)} bytes and breaks off in {bytes(name).decode()}"
                    )
            super()._build_tensors(start, fields)

    return Reader
