"""`python -m fastattn bench`: speed with its proof, against PyTorch on the same tensors."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastattn.bench.measuring import EVERY, USUAL, measure
from fastattn.bench.suites import ALL, SUITES, choose
from fastattn.bench.table import show
from fastattn.testing.cases.peers import DENSE, LABELS

__all__ = ["add_parser", "console", "run"]


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    peers = "\n".join(f"  {name:9}{LABELS[name][1]}" for name in DENSE)
    parser = verbs.add_parser(
        "bench",
        help="speed and error against PyTorch, as a share of what the machine can do",
        description="Times fastattn against what PyTorch offers: same process, threads and tensors,\n"
        "taking turns. Every case is first held to the error rule, against a float64 reference;\n"
        "one that breaks it is not timed, and the exit code is 1.",
        epilog="examples:\n"
        "  python -m fastattn bench --quick                 # a third of the cases\n"
        "  python -m fastattn bench --json results.json     # all, and keep them\n"
        "  python -m fastattn bench --html report.html      # all, with plots, in one file to share\n"
        "  python -m fastattn bench --suite decode          # one suite\n"
        "  python -m fastattn bench --only bf16             # cases whose name or type has that word\n"
        "  python -m fastattn bench --peers all             # against six ways to write it in PyTorch\n"
        "  python -m fastattn bench --suite grid --quick    # many small shapes; shows the losers\n"
        "  python benchmarks/report.py results.json         # in a checkout: as a Markdown table\n\n"
        "suites:\n"
        "  attention  prefill, training, one query over many keys\n"
        "  varlen     16 packed sequences of 32 to 2048 tokens\n"
        "  decode     one query per sequence over a cache: dense, in pages, in int8\n"
        "  ffn        linear layers, the MLPs of GPT-2 and Llama, the loss of a language model\n"
        "  all        these four\n"
        "  norm       layer_norm and rms_norm, with a residual\n"
        "  rotary     rotary embeddings of a prompt, a batch, one token\n"
        "  model      GPT-2 and a small Llama, whole: prefill, decode, training (needs transformers)\n"
        "  train      a step of training of GPT-2 and of a small Llama, AdamW with it\n"
        "  sweep      speed over sequence length and over context, for the plots\n"
        "  grid       880 shapes of attention\n\n"
        f"peers:\n{peers}\n"
        "  packed sequences have SDPA in two forms, on the padded batch and in a loop; pages have\n"
        "  SDPA after gathering them\n\n"
        "columns:\n"
        "  case     [B,H,S,D], KV heads after a slash; of a model [B,S]\n"
        "  time     of one call of ours, the median\n"
        "  of roof  share of the FMA peak (fp16: of fp32's) as measured in this run; for decode,\n"
        "           of the speed of a plain read of the same memory, which takes turns with it\n"
        "  vs       how many times faster ours is: median of the rounds (20th-80th percentile)\n"
        "  error    the largest absolute one, over the output and the gradients\n\n"
        "docs/benchmarks.md tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=["all", *SUITES], default="all", help="default: all")
    add("--quick", action="store_true", help="a third of the cases, less time for each")
    add("--only", metavar="TEXT", default="", help="only cases whose name or type has it")
    add("--peers", default=USUAL, help="whom to time beside: sdpa (default), others with commas, or all")
    add("--json", metavar="FILE", type=Path, help="write everything that was measured")
    add("--plot", metavar="DIR", type=Path, help="write PNGs of the sweep, which is run too")
    add("--html", metavar="FILE", type=Path, help="write a report with plots of the sweep, which is run too")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    peers = _peers(args)
    pictures = args.plot is not None or args.html is not None
    if pictures:
        _require("matplotlib", "--plot and --html need", args.parser)
    names = [*(ALL if args.suite == "all" else (args.suite,))]
    suites = choose([*names, "sweep"] if pictures and "sweep" not in names else names, args.quick, args.only)
    if not suites:
        args.parser.error(f"--only: no case of the suite has {args.only!r} in its name")
    for suite in suites:
        if suite.needs:
            _require(suite.needs, f"--suite {args.suite} needs", args.parser)
    for path in (args.json, args.plot, args.html):
        if path is not None and not path.parent.is_dir():
            args.parser.error(f"there is no folder {path.parent}")
    report = measure(suites, peers)
    if args.json is not None:
        args.json.write_text(report.to_json())
    show(report, console(), all(suite.only_losers for suite in suites))
    if pictures:
        # Imported late: matplotlib takes a second.
        plots, html = (importlib.import_module(f"fastattn.bench.{name}") for name in ("plots", "html"))
        if args.plot is not None:
            for path in plots.write(report, args.plot):
                console().print(f"wrote {path}", highlight=False, soft_wrap=True)
        if args.html is not None:
            args.html.write_text(html.page(report), encoding="utf-8")
            console().print(f"wrote {args.html}", highlight=False, soft_wrap=True)
    return 1 if report.failures else 0


def _peers(args: argparse.Namespace) -> Sequence[str]:
    names = [name for name in args.peers.split(",") if name]
    if unknown := set(names) - {*DENSE, EVERY, USUAL}:
        args.parser.error(f"--peers: unknown {sorted(unknown)}; allowed are {', '.join((*DENSE, EVERY))}")
    return names or [USUAL]


def _require(package: str, who_needs: str, parser: argparse.ArgumentParser) -> None:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        parser.error(f"{who_needs} the package {package}: pip install {package}")


def console() -> Console:
    """Stdout, wide enough for the table also where it is a pipe or a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
