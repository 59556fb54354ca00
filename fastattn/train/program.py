"""A run from end to end: its folder, its tokens, training, and what is left at the end."""

import dataclasses
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from fastattn.models import DecoderLM, Tokenizer, load_tokenizer
from fastattn.train import corpus, curve, log, samples
from fastattn.train.checkpoint import BEST, LAST, NotSaved
from fastattn.train.files import write_atomically
from fastattn.train.options import Options, Refusal
from fastattn.train.parallel import Ranks
from fastattn.train.trainer import NextToken, Trainer, evaluate, fresh, share
from fastattn.train.windows import Windows

RUN = "run.json"
MODEL, CURVE, SUMMARY = "model", "curve.png", "summary.json"


def run(given: dict[str, Any], resume: bool) -> int:
    """Trains, and returns the exit code.

    Args:
        given: the options of the command line, without the defaults.
        resume: goes on where there is a run, or begins one.
    Raises:
        Refusal: what the user has to mend.
    """
    if not given.get("out"):
        raise Refusal("--out: which folder shall have the run?")
    folder = Path(given["out"]).expanduser()
    options = choose_options(folder, given, resume)
    if options.fsdp and options.ops == "torch":
        raise Refusal("--fsdp needs --ops fastattn: the plain ops read weights without FSDP2's hooks")
    ranks = Ranks(options.fsdp)
    try:
        share(options, ranks)
        refusal = None
        if ranks.is_first:
            try:
                prepare(folder, options, resume)
            except Refusal as error:
                refusal = error
        if ranks.sum(float(refusal is not None))[0]:
            # The others must not wait for what the first one has refused.
            raise refusal or Refusal("the first process has refused to start")
        facts = corpus.load(folder)
        trainer = Trainer(options, facts, folder, ranks)
        trainer.restore()
        is_done = trainer.train()
        if is_done:
            conclude(folder, options, trainer)
    except (OSError, NotSaved) as error:
        raise Refusal(f"--out: {error}; --resume goes on once that is mended", code=1) from error
    finally:
        ranks.close()
    if is_done:
        return 0
    if ranks.is_first:
        step = trainer.progress.step
        print(f"stopped at step {step}; --resume --out {folder} goes on", file=sys.stderr)
    return 130


def choose_options(folder: Path, given: dict[str, Any], resume: bool) -> Options:
    """What is given, on top of what the folder's run was told."""
    if resume and (folder / RUN).exists():
        return Options.from_file(folder / RUN).resumed(given)
    if not given.get("data"):
        known = f"{folder} has no run to --resume, and " if resume else ""
        raise Refusal(f"--data: {known}there is nothing to train on")
    return Options(**given)


def prepare(folder: Path, options: Options, resume: bool) -> None:
    """Makes the folder, the tokens, and the options that a later --resume reads."""
    if (folder / RUN).exists() and not resume:
        raise Refusal(f"--out: {folder} has a run; --resume goes on with it, another folder starts a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN).exists():
            # Left by a run that was stopped before it began: its tokens may be others.
            (folder / corpus.FACTS).unlink(missing_ok=True)
        corpus.prepare(options, folder)
        write_atomically(folder / RUN, lambda path: path.write_text(options.to_json(), encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"--out: cannot write to {folder}: {error.strerror or error}") from error
    weights = 12 * options.layers * options.dim**2 + 2 * options.vocab_size * options.dim
    # Beside one checkpoint of weights and two averages, while the next one is written: the best weights.
    needed, free = 4 * weights * (2 * 3 + 2), shutil.disk_usage(folder).free
    if free < needed:
        print(
            f"warning: {folder} has {free / 1e6:.0f} MB free, checkpoints take about {needed / 1e6:.0f} MB",
            file=sys.stderr,
        )


def conclude(folder: Path, options: Options, trainer: Trainer) -> None:
    """The first process finishes, and the others end no sooner: torchrun stops all when one goes wrong."""
    failure: Exception | None = None
    if trainer.ranks.is_first:
        try:
            finish(folder, options, trainer)
        except Exception as error:  # whatever it was: the others are waiting
            failure = error
    trainer.ranks.wait()
    if failure is not None:
        raise failure


def finish(folder: Path, options: Options, trainer: Trainer) -> None:
    """From the best weights: the loss on all that is held back, samples, the curve, the model's folder."""
    facts, progress = trainer.facts, trainer.progress
    # The last ones where no disk had room for the best.
    source, step = (LAST, progress.step) if progress.best_loss is None else (BEST, progress.best_step)
    model = fresh(trainer.config, folder / source)
    data = Windows(folder / corpus.VALID, facts.token_type, options.context)
    loss = evaluate(NextToken(model, options), data, 0, trainer.micro_batch)
    tokens = progress.step * options.batch * options.context
    count = sum(p.numel() for p in model.parameters())
    summary: dict[str, Any] = {
        "valid_loss": loss,
        "valid_bits_per_byte": loss / math.log(2.0) / facts.bytes_per_token,
        "best_step": step,
        "steps": progress.step,
        "tokens": tokens,
        "seconds": progress.seconds,
        "tokens_per_second": tokens / progress.seconds if progress.seconds else None,
        "parameters": count,
        "data": dataclasses.asdict(facts),
        "date": time.strftime("%Y-%m-%d"),
    }
    title = f"{count / 1e6:.1f} million weights: {loss:.3f} nats per token held back"
    lines = log.read(folder / log.LOG) if (folder / log.LOG).exists() else []
    write_atomically(folder / CURVE, lambda path: curve.draw(lines, path, title))
    written = samples.write(model, options, folder, data)
    export(model, folder)
    write_atomically(folder / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    if written:
        print(written)
    print(
        f"held back: {loss:.4f} nats per token, {summary['valid_bits_per_byte']:.3f} bits per byte "
        f"(all of it, weights of step {step})\n"
        f"{folder}: {CURVE}, {log.LOG}, {SUMMARY}, {MODEL}/" + (f", {samples.SAMPLES}" if written else "")
    )


def export(model: DecoderLM, folder: Path) -> None:
    """The model's folder, with its tokenizer, as `from_pretrained` and transformers load it."""
    tokenizer = load_tokenizer(folder)
    model.save_pretrained(folder / MODEL)
    Tokenizer(tokenizer.backend, None, {"eos_token": corpus.END}).save_pretrained(folder / MODEL)
