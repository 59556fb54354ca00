"""`python -m fastattn train`: trains a decoder on text, and goes on where it was stopped."""

import argparse
import dataclasses
import importlib
import importlib.util
import os
import sys
from typing import Any

from fastattn.train.options import Options, Refusal

__all__ = ["add_parser", "run"]

_NEEDS = ("numpy", "tokenizers", "safetensors", "matplotlib")


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "train",
        help="train a small language model on text files, with exact resuming",
        description="Trains a decoder-only language model on text. The folder of --out gets the tokens,\n"
        "a log with one JSON line a step, checkpoints, the loss curve, samples, and the model as\n"
        "transformers loads it. A run that was stopped, however it was, goes on with --resume, and ends\n"
        "with the same bits.",
        epilog="examples:\n"
        "  python -m fastattn train --data stdlib --out runs/code        # Python's own sources\n"
        "  python -m fastattn train --data 'books/*.txt' notes --tokenizer bytes --out runs/books\n"
        "  python -m fastattn train --resume --out runs/code             # after a kill; for more --steps\n"
        "  torchrun --nproc-per-node 2 -m fastattn train --data stdlib --out runs/code\n"
        "  torchrun --nproc-per-node 2 -m fastattn train --fsdp --data stdlib --out runs/code\n\n"
        "docs/training.md tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on with the run in --out; its options are kept there")
    for field in dataclasses.fields(Options):
        # Absent ones stay absent: --resume must know what was asked for.
        given: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(field)}
        flag = "--" + field.name.replace("_", "-")
        kind = field.metadata["kind"]
        if kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, **given)
        elif isinstance(kind, tuple):
            add(flag, choices=kind, **given)
        elif field.name in ("data", "prompt"):
            add(flag, nargs="+", metavar=field.metadata["metavar"], **given)
        else:
            add(flag, type=kind, metavar=field.metadata["metavar"], **given)
    parser.set_defaults(run=run, parser=parser)


def _help(field: "dataclasses.Field[object]") -> str:
    text = str(field.metadata["help"])
    is_plain = field.default not in ("", (), False) and "default" not in text
    return f"{text} (default: {field.default})" if is_plain else text


def run(args: argparse.Namespace) -> int:
    """The verb: 0 at the end, 1 where the run broke off, 2 for what the user has to mend, 130 at Ctrl-C."""
    names = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {name: tuple(given[name]) for name in ("data", "prompt") if name in given}
    if absent := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        args.parser.error(f"missing {' '.join(absent)}: pip install {' '.join(absent)}")
    try:
        # Imported late: it needs packages that the other verbs do not.
        return int(importlib.import_module("fastattn.train.program").run(given, args.resume))
    except Refusal as refusal:
        if os.environ.get("RANK", "0") == "0":
            print(f"{args.parser.prog}: error: {refusal}", file=sys.stderr)
        return refusal.code
