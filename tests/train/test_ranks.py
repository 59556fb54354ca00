"""Several processes learn what one does, and one of them writes."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_process
import torch
from safetensors.torch import load_file

from fastattn.testing import compare
from fastattn.train import log
from fastattn.train.checkpoint import LAST
from fastattn.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# Masks of dropout belong to micro-batches: the same ones in one process and in two.
OPTIONS = ("--dropout", 0.1, "--micro-batch", 1)

Train = Callable[..., Path]
Verb = Callable[..., list[str]]


def start_ranks(command: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """Runs the verb in two processes; their exit codes, and what they said on stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastattn.__main__", "fastattn.train.program"])
    errors = [folder / f"stderr of {rank}" for rank in range(2)]
    processes = [
        context.Process(target=rank_process.run, args=(rank, 2, port, command, str(errors[rank])))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(90.0)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [path.read_text() for path in errors]


def assert_learned_the_same(ours: Path, other: Path) -> None:
    """The log is that of one process, but for rounding, and so are the weights."""
    logs = [log.read(folder / log.LOG) for folder in (ours, other)]
    assert [x["step"] for x in logs[0]] == [x["step"] for x in logs[1]]
    a, b = (
        torch.tensor([x[key] for x in lines for key in ("loss", "valid_loss", "gradient_norm") if key in x])
        for lines in logs
    )
    compare.assert_close(a, b, b.double(), "losses")
    first, second = (load_file(folder / LAST) for folder in (ours, other))
    assert {x: t.shape for x, t in first.items()} == {x: t.shape for x, t in second.items()}
    for name in (x for x in first if x.endswith("exp_avg")):
        compare.assert_close(first[name], second[name], second[name].double(), name)


def test_torchrun_learns_what_one_process_does(train: Train, verb: Verb, tmp_path: Path) -> None:
    one, two = train(*OPTIONS, out="one"), tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*torchrun, "-m", "fastattn", *verb(two, *OPTIONS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held back:") == 1
    assert "2 processes" in done.stderr
    assert_learned_the_same(two, one)


def test_shards_go_on_with_the_run_of_one_process_and_back(
    train: Train, verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(*OPTIONS, out="whole")
    stop_after(2, monkeypatch)
    folder = train(*OPTIONS, out="shards", code=130)
    monkeypatch.undo()
    codes, errors = start_ranks(verb(folder, *OPTIONS, "--resume", "--fsdp"), tmp_path)
    assert codes == [0, 0], errors
    assert "2 processes" in errors[0]
    assert "from step 2 to 6" in errors[0]
    assert errors[1] == ""
    assert json.loads((folder / "run.json").read_text())["fsdp"] is True
    assert_learned_the_same(folder, whole)
    # Sharded averages came back whole: one process goes on with them.
    train(*OPTIONS, "--resume", "--no-fsdp", "--steps", 7, out="shards")


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal would."""
    monkeypatch.setattr(Trainer, "_agree", lambda self, stop: self.progress.step == step)


def test_all_end_where_the_first_one_refuses(verb: Verb, tmp_path: Path) -> None:
    command = verb(tmp_path / "out", "--batch", 3)
    codes, errors = start_ranks(command, tmp_path)
    assert codes == [2, 2], errors
    assert "--batch must be a multiple of the 2 processes, got 3" in errors[0]
    assert errors[1] == ""
    assert not (tmp_path / "out").exists()
    command = verb(tmp_path / "out", "--data", tmp_path / "absent")
    codes, errors = start_ranks(command, tmp_path)
    assert codes == [2, 2], errors
    assert "--data: there is no file" in errors[0]
    assert errors[1] == ""


def test_a_program_that_torchrun_did_not_start_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.train.parallel import Ranks

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks(fsdp=True)
    module: Any = torch.nn.Linear(2, 2)
    assert (ranks.rank, ranks.size, ranks.fsdp, ranks.is_first) == (0, 1, False, True)
    assert ranks.sum(1.5, 2.5) == [1.5, 2.5]
    assert ranks.spread(module, torch.nn.ModuleList()) is module
