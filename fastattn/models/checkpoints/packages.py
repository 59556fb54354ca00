"""The packages that checkpoints need and models do not: they are imported late."""

import importlib
from typing import Any


def package(name: str) -> Any:
    """The module of this name. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = name.split(".")[0]
        if error.name != missing:
            raise
        raise ImportError(f"this needs {missing}; get it with: pip install 'fastattn[models]'") from error
