"""Checkpoints: folders as Hugging Face keeps them, and GGUF files."""

from pathlib import Path

import torch

from fastattn.models.checkpoints.tokenizer import Tokenizer, load_tokenizer
from fastattn.models.pretrained import Pretrained

__all__ = ["Tokenizer", "from_pretrained", "load_tokenizer"]


def from_pretrained(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Pretrained:
    """A model with its weights, in evaluation mode. Which class it is follows from what is there.

    A wrong, cut off or missing file raises before a weight is read, and so does whatever config.json asks for
    that the model would not do.

    Args:
        path: a folder with config.json and model.safetensors, or model.safetensors.index.json and its
            shards; or a .gguf file.
        dtype: of the weights. Default: the narrowest that holds all that are stored; quantised ones become
            float32.
        device: of the weights. Default: torch's.
    Raises:
        FileNotFoundError: something is not there.
        ValueError: a file or a tensor is not what it should be; names it, and what is allowed.
        TypeError: dtype is no floating type, or the checkpoint is of another class.
        ImportError: a package is missing; says how to get it.
    """
    from fastattn.models.checkpoints.load import load

    return load(path, dtype, device, Pretrained)
