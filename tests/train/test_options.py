"""What the command line refuses, and what --resume may change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.__main__ import main
from fastattn.train.options import Options, Refusal
from fastattn.train.schedule import learning_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"layers": -1}, "--layers must be at least 1, got -1"),
        ({"vocab_size": 256}, "--vocab-size must be at least 257, got 256"),
        ({"lr": 0.0}, "--lr must be over 0"),
        ({"lr": float("nan")}, "--lr must be finite and at least 0, got nan"),
        ({"valid_share": 0.9}, "--valid-share must be over 0 and at most 0.5, got 0.9"),
        ({"dropout": 1.0}, "--dropout must be below 1"),
        ({"min_lr": 1.5}, "--min-lr must be"),
        ({"batch": 6, "micro_batch": 4}, "--micro-batch must divide --batch 6, got 4"),
        ({"dim": 100, "heads": 3}, "the model: embed_dim must be a multiple of num_heads=3"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        Options(**options)


def test_the_default_model_has_its_stated_size() -> None:
    config = Options().config(4096)
    assert (config.hidden_dim, config.head_dim) == (704, 64)
    gpt2 = Options(family="gpt2").config(300)
    assert (gpt2.hidden_dim, gpt2.positions, gpt2.norm) == (1024, "learned", "layer_norm")


def test_the_learning_rate_rises_and_falls() -> None:
    options = Options(steps=11, warmup=4, lr=1.0, min_lr=0.2)
    rates = [learning_rate(step, options) for step in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[7] == pytest.approx(0.6)  # half way down
    assert rates[10] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(0, Options(steps=1, warmup=0)) == Options().lr


def test_resuming_keeps_what_makes_a_run(tmp_path: Path) -> None:
    before = Options(data=("a",), out="x", steps=10)
    (tmp_path / "run.json").write_text(before.to_json())
    found = Options.from_file(tmp_path / "run.json")
    assert found == before
    assert found.resumed({"steps": 20, "out": "y", "layers": 6}).steps == 20
    with pytest.raises(Refusal, match="--layers is 6 in this run and stays so, got 2"):
        found.resumed({"layers": 2})
    for text in ("{", json.dumps({"data": []}), json.dumps({"other": 1, "data": [], "prompt": []})):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(Refusal, match="does not hold a run's options"):
            Options.from_file(tmp_path / "run.json")


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What the verb says on stderr, with exit code 2 and no traceback."""
    assert main(["train", *map(str, words)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    return shown.err


def test_bad_data_is_refused(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, empty, short, binary = (tmp_path / name for name in ("out", "empty.txt", "short.txt", "binary.txt"))
    empty.write_text("")
    short.write_text("too short")
    binary.write_bytes(b"\xff\xfe text")
    assert "--out: which folder" in refused(capsys, "--data", texts)
    assert "nothing to train on" in refused(capsys, "--out", out)
    assert "has no run to --resume" in refused(capsys, "--out", out, "--resume")
    assert "no file, folder" in refused(capsys, "--data", tmp_path / "absent", "--out", out)
    assert "the 1 files are empty" in refused(capsys, "--data", empty, "--out", out)
    assert "binary.txt is not UTF-8 text" in refused(capsys, "--data", binary, "--out", out)
    assert "one window takes --context + 1 = 257" in refused(capsys, "--data", short, "--out", out)
    assert f"cannot write to {short}" in refused(capsys, "--data", texts, "--out", short)
    assert "--fsdp needs --ops fastattn" in refused(
        capsys, "--data", texts, "--out", out, "--fsdp", "--ops", "torch"
    )
    assert not (out / "run.json").exists()
    # After all that the folder still takes a run of other data.
    assert "of windows" not in refused(capsys, "--data", texts, "--out", out, "--batch", 0)


def test_an_unreadable_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    shown = refused(capsys, "--data", tmp_path / "a.txt", "--out", tmp_path / "out")
    assert "a.txt: Permission denied" in shown


def test_a_run_is_not_overwritten(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("--steps", 1)
    capsys.readouterr()
    train("--steps", 1, code=2)
    assert f"{folder} has a run; --resume goes on with it" in capsys.readouterr().err


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "x", "--out", "y"])
    assert stop.value.code == 2
    assert "pip install numpy tokenizers safetensors matplotlib" in capsys.readouterr().err
