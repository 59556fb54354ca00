"""A tiny run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.__main__ import main
from fastattn.train import trainer

TINY = {
    "tokenizer": "bytes", "valid-share": 0.1, "layers": 1, "dim": 32, "heads": 2, "hidden": 48, "context": 16,
    "batch": 4, "steps": 6, "warmup": 2, "eval-every": 3, "eval-windows": 4, "sample-tokens": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here is large enough for two threads, and nobody asks for a share of the peak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(trainer, "peak_flops", lambda dtype: 1e9)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few documents."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(6):
        words = (f"{j} squared is {j * j}, and {i} more is {j * j + i}.\n" for j in range(40))
        (folder / f"{i}.txt").write_text("".join(words))
    return folder


@pytest.fixture
def verb(texts: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run."""
    tiny = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    return lambda out, *options: ["train", "--data", str(texts), "--out", str(out), *tiny, *map(str, options)]


@pytest.fixture
def train(verb: Callable[..., list[str]], tmp_path: Path) -> Callable[..., Path]:
    """Runs the verb in this process, to the end; returns the run's folder."""

    def run(*options: Any, out: str = "run", code: int = 0) -> Path:
        assert main(verb(tmp_path / out, *options)) == code
        return tmp_path / out

    return run
