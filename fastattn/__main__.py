"""The command line: `fastattn VERB` or `python -m fastattn VERB`. Each verb lives in the file of its name."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import fastattn
from fastattn import generate, info


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastattn" if Path(sys.argv[0]).name == "fastattn" else "python -m fastattn",
        description="Fused attention and feed-forward kernels: look at them, time them, see them at work.",
        epilog="examples:\n"
        "  python -m fastattn info            # what this machine has and what is missing\n"
        "  python -m fastattn bench --quick   # speed and error against PyTorch, in a minute\n"
        "  python -m fastattn check           # every kernel of this machine against the error rule\n"
        "  python -m fastattn demo            # a language model, before and after\n"
        "  python -m fastattn generate --chat # talk to a language model\n\n"
        "`python -m fastattn VERB --help` tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _verbs():
        verb.add_parser(verbs)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


def _verbs() -> Iterator[ModuleType]:
    """All that can run here: `info` needs nothing but torch, so that it can say what is missing."""
    yield from (info, generate)
    try:
        from fastattn import bench, check, compare, demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "rich":
            raise
        print("all verbs but info and generate need the package rich: pip install rich", file=sys.stderr)
        return
    yield from (bench, compare, check, demo)


if __name__ == "__main__":
    sys.exit(main())
