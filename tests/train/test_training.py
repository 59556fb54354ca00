"""What a run leaves, how it learns, and when it stops."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastattn.models import from_pretrained, load_tokenizer
from fastattn.testing import compare
from fastattn.train import log, trainer
from fastattn.train.options import Options
from fastattn.train.trainer import Trainer, make_optimizer

Train = Callable[..., Path]


def losses(folder: Path) -> list[float]:
    """Of each step."""
    return [x["loss"] for x in log.read(folder / log.LOG) if "loss" in x]


def evaluations(folder: Path) -> list[float]:
    """The losses of what is held back."""
    return [x["valid_loss"] for x in log.read(folder / log.LOG) if "valid_loss" in x]


def assert_same_losses(ours: Path, other: Path) -> None:
    """But for rounding."""
    a, b = (torch.tensor([*losses(folder), *evaluations(folder)]) for folder in (ours, other))
    compare.assert_close(a, b, b.double(), "losses")


def test_a_run_leaves_a_model_and_what_there_is_to_know(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("--sample-tokens", 5, "--prompt", "7 squared is", "Größe")
    lines = log.read(folder / log.LOG)
    assert [x["step"] for x in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert {"loss", "lr", "tokens_per_second", "share_of_peak"} <= set(lines[0])
    assert lines[-1]["tokens"] == 6 * 4 * 16
    assert losses(folder)[-1] < losses(folder)[0] < 1.2 * math.log(257)
    assert (folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "7 squared is" in (folder / "samples.md").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"]) == (6, 6)
    shown = capsys.readouterr()
    assert f"held back: {summary['valid_loss']:.4f} nats" in shown.out
    assert "Größe" in shown.out
    assert "step 3: held back" in shown.err
    assert not list(folder.glob(".*"))  # nothing that was only written for a while
    # The model is that of the best checkpoint, and its tokenizer the run's.
    model, tokenizer = from_pretrained(folder / "model"), load_tokenizer(folder / "model")
    best = load_file(folder / "best.safetensors")
    assert torch.equal(model.embedding.tokens.weight, best["model.embedding.tokens.weight"])
    assert tokenizer.decode(tokenizer.encode("größer")) == "größer"
    assert tokenizer.id_of("<|endoftext|>") == 0


def test_transformers_loads_the_model(train: Train) -> None:
    transformers = pytest.importorskip("transformers")
    for family in ("llama", "gpt2"):
        folder = train("--steps", 1, "--family", family, out=family) / "model"
        theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), from_pretrained(folder)
        text = "7 squared is 49"
        ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(folder).encode(text)])
        assert ids.tolist() == [load_tokenizer(folder).encode(text)]
        with torch.no_grad():
            compare.assert_close(ours(ids), theirs(ids).logits, theirs.double()(ids).logits, family)


def test_a_run_learns(train: Train) -> None:
    folder = train(
        "--steps", 120, "--eval-every", 60, "--lr", 0.01, "--tokenizer", "bpe", "--vocab-size", 300
    )
    first, last = evaluations(folder)
    assert last < first < losses(folder)[0] - 1.0


def test_the_same_seed_gives_the_same_bits_and_another_other_ones(train: Train) -> None:
    options = ("--dropout", 0.1, "--steps", 3)
    first, again, other = (
        load_file(train(*options, "--seed", seed, out=out) / "last.safetensors")
        for seed, out in ((1, "a"), (1, "b"), (2, "c"))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.embedding.tokens.weight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_ops_learn_the_same(train: Train, family: str) -> None:
    ours, plain = (train("--ops", ops, "--family", family, out=ops) for ops in ("fastattn", "torch"))
    assert_same_losses(ours, plain)


def test_micro_batches_add_up_to_the_batch(train: Train) -> None:
    assert_same_losses(train("--micro-batch", 1, out="a"), train(out="b"))


def test_bf16_learns_almost_the_same(train: Train) -> None:
    found = [torch.tensor(losses(train("--dtype", x, out=x)), dtype=torch.float64) for x in ("bf16", "fp32")]
    assert not torch.equal(*found)
    compare.assert_close(found[0].bfloat16(), found[1].bfloat16(), found[1], "losses")


def test_dropout_is_of_training_alone(train: Train) -> None:
    dropped, plain = (train("--dropout", x, "--lr", 1e-12, out=str(x)) for x in (0.5, 0.0))
    assert losses(dropped) != losses(plain)
    a, b = (torch.tensor(evaluations(folder)) for folder in (dropped, plain))
    compare.assert_close(a, b, b.double(), "held back")


def test_only_matrices_decay(train: Train) -> None:
    folder = train("--steps", 1, "--lr", 1e-30, "--warmup", 0)
    options = Options.from_file(folder / "run.json")
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decays = {
        id(p): group["weight_decay"] for group in make_optimizer(model, options).param_groups
        for p in group["params"]
    }  # fmt: skip
    assert [decays[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_gradients_are_clipped(train: Train) -> None:
    plain, clipped = (train("--clip", x, "--steps", 1, out=str(x)) for x in (0, 1e-3))
    first, second = (load_file(folder / "last.safetensors") for folder in (plain, clipped))
    name = next(x for x in first if x.endswith("exp_avg") and "qkv_proj.weight" in x)
    norm = log.read(plain / log.LOG)[0]["gradient_norm"]
    got, want = second[name], first[name] * (1e-3 / norm)
    compare.assert_close(got / got.abs().max(), want / got.abs().max(), want.double() / got.abs().max())


def test_it_stops_where_nothing_is_won(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    # So high a rate that what is held back gets worse after the first evaluation.
    options = ("--lr", 1.0, "--warmup", 0, "--eval-every", 1, "--patience", 2, "--steps", 500)
    folder = train(*options)
    found = evaluations(folder)
    best = found.index(min(found))
    assert len(found) == best + 3 < 500
    assert json.loads((folder / "summary.json").read_text())["best_step"] == best + 1
    # It stays stopped, and goes on when it may wait longer.
    capsys.readouterr()
    train(*options, "--resume")
    assert evaluations(folder) == found
    train(*options, "--resume", "--patience", 3)
    assert len(evaluations(folder)) > len(found)


def test_a_loss_that_is_not_finite_ends_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Trainer._backward

    def broken(self: Trainer) -> float:
        return math.nan if self.progress.step == 4 else plain(self)

    monkeypatch.setattr(Trainer, "_backward", broken)
    train(code=1)
    shown = capsys.readouterr().err
    assert "step 5: the loss is nan" in shown
    assert "the one of step 3 is whole" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(
    number: int, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(out="whole")
    plain, before = Trainer.step, signal.getsignal(number)

    def stopped(self: Trainer) -> dict[str, Any]:
        if self.progress.step == 1:
            os.kill(os.getpid(), number)
        return plain(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    folder = train(code=130)
    assert f"stopped at step 2; --resume --out {folder} goes on" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    train("--resume")
    assert losses(folder) == losses(whole)


def test_the_bar_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"loss": 1.5, "lr": 1e-3, "tokens_per_second": 1234.5, "share_of_peak": 0.25}
    assert trainer.describe(line) == "loss 1.500, lr 1.0e-03, 1234 tokens/s, 25% of peak"
    assert "peak" not in trainer.describe(line | {"share_of_peak": None})
