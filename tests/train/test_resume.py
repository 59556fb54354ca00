"""A run that was stopped, by a kill or by a full disk, ends with the bits of one that was not."""

import json
import multiprocessing
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastattn.__main__ import main
from fastattn.train import checkpoint, log
from fastattn.train.checkpoint import BEST, LAST
from fastattn.train.files import write_atomically

Train = Callable[..., Path]


def assert_same_bits(ours: Path, other: Path) -> None:
    """Weights, averages, progress and log, but for the time it took."""
    for name in (LAST, BEST):
        a, b = load_file(ours / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert not [x for x in a if not torch.equal(a[x], b[x])]
        told = [checkpoint.read_facts(folder / name) for folder in (ours, other)]
        for facts in told:
            del facts["progress"]["seconds"]
        assert told[0] == told[1]
    logs = [
        [(x["step"], x.get("loss"), x.get("valid_loss")) for x in log.read(folder / log.LOG)]
        for folder in (ours, other)
    ]
    assert logs[0] == logs[1]


def step_of(folder: Path) -> int:
    """Of the last checkpoint; 0 without one."""
    return int(checkpoint.read_facts(folder / LAST)["progress"]["step"]) if (folder / LAST).exists() else 0


# ---- kills ----


@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_change_no_bit(
    seed: int, train: Train, verb: Callable[..., list[str]], tmp_path: Path
) -> None:
    # A checkpoint each step: much of the time is spent in writing them.
    options = ["--dropout", 0.1, "--micro-batch", 2, "--steps", 48, "--eval-every", 4, "--save-every", 1]
    whole = train(*options, out="whole")
    folder, moments = tmp_path / "killed", random.Random(seed)
    command = verb(folder, "--resume", *options)
    # Its server imports all that is needed once, and each run is a fork of it, which begins at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastattn.__main__", "fastattn.train.program"])
    reached = []
    for _ in range(6):
        run = context.Process(target=main, args=(command,))
        run.start()
        wait_for_step(folder, step_of(folder) + moments.randint(0, 5), run)
        time.sleep(moments.uniform(0.0, 0.02))
        run.kill()
        run.join()
        reached.append(step_of(folder))
        assert run.exitcode in (-9, 0)
    assert reached == sorted(reached)
    assert len(set(reached)) > 2
    assert main(command) == 0
    assert_same_bits(folder, whole)
    assert not list(folder.glob(".*"))


def wait_for_step(folder: Path, step: int, run: Any) -> None:
    """Until a checkpoint has it; or for the end of a process."""
    end = time.monotonic() + 60.0
    while step_of(folder) < step and run.is_alive():
        assert time.monotonic() < end, "the run does not come on"
        time.sleep(0.002)


def test_what_a_kill_leaves_behind_is_cleared(train: Train) -> None:
    whole = train("--steps", 6, out="whole")
    folder = train("--steps", 6)
    for name in (LAST, BEST):
        (folder / f".{name}.tmp").mkdir()
        (folder / f".{name}.tmp" / name).write_bytes(b"half")
    with (folder / log.LOG).open("ab") as file:
        file.write(b'{"step": 6, "lo')  # torn
    train("--resume")
    assert_same_bits(folder, whole)


def test_more_steps_go_on(train: Train) -> None:
    folder = train("--steps", 4)
    train("--resume", "--steps", 9)
    assert step_of(folder) == 9
    assert [x["step"] for x in log.read(folder / log.LOG) if "loss" in x] == [*range(1, 10)]
    assert json.loads((folder / "run.json").read_text())["steps"] == 9


# ---- full disks ----


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write beyond it, as it does where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_checkpoint_before(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train("--steps", 6, out="whole")
    folder = train("--steps", 3)
    assert step_of(folder) == 3
    capsys.readouterr()
    # The best weights still fit, with AdamW's averages they do not.
    sizes = [(folder / name).stat().st_size for name in (BEST, LAST)]
    with largest_file(sum(sizes) // 2):
        train("--resume", "--steps", 5, code=1)
    shown = capsys.readouterr().err
    assert f"warning: cannot write {folder / LAST}: " in shown
    assert "error: the checkpoint of step 5 could not be written; the one of step 3 is whole" in shown
    assert "Traceback" not in shown
    assert step_of(folder) == 3
    assert not list(folder.glob(".*"))
    # Once there is room, nothing is lost but time. A schedule of its own: all runs had other --steps.
    train("--resume", "--steps", 6)
    assert step_of(folder) == step_of(whole) == 6


def test_a_disk_that_is_full_for_a_while_changes_no_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", 8, "--eval-every", 2, "--dropout", 0.1)
    whole = train(*options, out="whole")
    calls, plain = [0], checkpoint.save_file

    def full(tensors: Any, path: Path, told: Any) -> None:
        calls[0] += 1
        if 3 <= calls[0] <= 5:
            path.write_bytes(b"half of it")
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        plain(tensors, path, told)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = train(*options)
    shown = capsys.readouterr().err
    assert shown.count("No space left on device (os error 28); the one of step 2 is whole") == 3
    assert_same_bits(folder, whole)


def test_a_run_without_any_room_says_so(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(20_000):
        folder = train(code=1)
    shown = capsys.readouterr().err
    assert "error: the checkpoint of step 6 could not be written; there is no checkpoint yet" in shown
    assert not (folder / LAST).exists()
    train("--resume")
    assert step_of(folder) == 6


def test_without_room_for_the_best_weights_the_last_ones_are_taken(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = checkpoint.save_file

    def full(tensors: Any, path: Path, told: Any) -> None:
        if path.name == BEST:
            raise OSError(28, "No space left on device")
        plain(tensors, path, told)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = train("--eval-every", 4)
    assert not (folder / BEST).exists()
    assert json.loads((folder / "summary.json").read_text())["best_step"] == step_of(folder) == 6


def test_no_room_at_the_very_end_is_mended_by_resuming(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastattn.train.curve.draw", full)
        folder = train(code=1)
    assert "No space left on device; --resume goes on once that is mended" in capsys.readouterr().err
    train("--resume")
    assert (folder / "curve.png").exists()


def test_lines_that_do_not_fit_are_written_later(tmp_path: Path) -> None:
    told = log.Log(tmp_path / "log.jsonl", 0)
    assert told.write(step=1) is None
    with largest_file(20):
        assert "its lines are kept till it can" in (told.write(step=2) or "")
        assert told.write(step=3) is None  # it has said so
        assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    assert told.write(step=4) is None
    assert [x["step"] for x in log.read(tmp_path / "log.jsonl")] == [1, 2, 3, 4]


def test_a_file_is_whole_or_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, lambda beside: beside.write_text("old"))

    def broken(beside: Path) -> None:
        beside.write_text("n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert path.read_text() == "old"


# ---- what is not this run's ----


def test_what_does_not_fit_is_refused(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = train("--steps", 1), train("--steps", 1, "--family", "gpt2", out="other")

    def refused(text: str) -> None:
        capsys.readouterr()
        train("--resume", "--steps", 2, code=2)
        shown = capsys.readouterr().err
        assert text in shown and "Traceback" not in shown

    shutil.copy(folder / LAST, folder / "kept")
    shutil.copy(other / LAST, folder / LAST)
    refused("has a model with positions learned, and this run's is rotary")
    (folder / LAST).write_bytes((folder / "kept").read_bytes()[:-100])
    refused("is not a whole checkpoint")
    tensors, facts = load_file(folder / "kept"), checkpoint.read_facts(folder / "kept")
    checkpoint.save(folder / LAST, tensors, facts | {"tokenizer": "another"})
    refused("was trained with another tokenizer")
    del tensors["optimizer.final_norm.weight.exp_avg"]
    checkpoint.save(folder / LAST, tensors, facts)
    refused("has no averages of final_norm.weight")
    del tensors["model.final_norm.weight"]
    checkpoint.save(folder / LAST, tensors, facts)
    refused("final_norm.weight should be [32], it is nothing")
    shutil.copy(folder / "kept", folder / LAST)
    train("--resume", "--steps", 2)
