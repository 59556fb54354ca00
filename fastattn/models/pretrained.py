"""What models have in common: they come from folders and files, and go into folders."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from fastattn.models.config import ModelConfig

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(torch.nn.Module):
    """A model that can be loaded and saved.

    Attributes:
        config: what it is made of.
        source: the config.json that it was loaded with, or None; `save_pretrained` writes it again.
    """

    config: "ModelConfig"
    source: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """`fastattn.models.from_pretrained`, for a checkpoint of this class."""
        from fastattn.models.checkpoints.load import load

        return load(path, dtype, device, cls)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder, which is made where it is missing.

        transformers loads them, where docs/models.md has a family of its that computes this model; else only
        fastattn does. Each file is whole, or what it was before.

        Raises:
            OSError: a file cannot be written.
        """
        from fastattn.models.checkpoints.save import save

        save(self, path)
