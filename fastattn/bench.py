"""`python -m fastattn bench`: speed with its proof, against PyTorch on the same tensors."""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from fastattn import info
from fastattn.cpu._core import core
from fastattn.testing import cases, roof
from fastattn.testing.cases import Case
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread, race

OURS = "fastattn"
READ = "read"  # a pass over k and v, which takes part in decode as one more peer


@dataclass(frozen=True)
class Suite:
    """A list of cases and how much time each may take."""

    cases: list[Case]
    budget: float  # seconds a case
    min_rounds: int
    only_losers: bool = False  # the table shows those alone; the JSON has every case


# By name: the whole and the quick version.
SUITES = {
    "attention": (Suite(cases.ATTENTION, 1.5, 5), Suite(cases.ATTENTION_QUICK, 0.8, 5)),
    "grid": (Suite(cases.GRID, 0.15, 3, True), Suite(cases.GRID_QUICK, 0.05, 3, True)),
}

COLUMNS = ("case", "type", "time", "speed", "of roof", "vs SDPA (p20-p80)", "error", "SDPA's error")


@dataclass(frozen=True)
class Row:
    """One case: its errors, and its times where it passed the error rule."""

    case: str
    dtype: str
    flops: int
    bytes: int
    is_decode: bool  # bound by bandwidth: its speed is in GB/s
    errors: dict[str, float] = field(default_factory=dict)  # largest absolute, against float64
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)  # how many times faster ours is
    rounds: int = 0
    failure: str | None = None  # why it was not timed

    @property
    def speed(self) -> float:
        """GFLOP/s, or GB/s for decode; 0 where it was not timed."""
        if OURS not in self.seconds:
            return 0.0
        return (self.bytes if self.is_decode else self.flops) / self.seconds[OURS].median / 1e9

    def share(self, top: Roof | None) -> float | None:
        """Of the roof: FMA peak of the type; for decode, of a plain read that took turns with it."""
        if READ in self.ratios:
            return self.ratios[READ].median
        if top is None or not self.seconds:
            return None
        return self.speed / (top.read_gbs if self.is_decode else top.gflops(self.dtype))

    @property
    def loses(self) -> bool:
        """Whether SDPA is faster, beyond the 4 us of overhead allowed to calls under 10 us."""
        if "sdpa" not in self.ratios or self.ratios["sdpa"].median >= 1.0:
            return False
        ours, sdpa = self.seconds[OURS].median, self.seconds["sdpa"].median
        return not (sdpa < 10e-6 and ours - sdpa <= 4e-6)


@dataclass(frozen=True)
class Report:
    """A whole run. The JSON file is this, with every row's speed and share of the roof added."""

    environment: dict[str, Any]
    roof: Roof | None
    rows: list[Row]

    def to_json(self) -> str:
        """See `from_json`."""
        rows = [{**asdict(row), "speed": row.speed, "roof_share": row.share(self.roof)} for row in self.rows]
        top = None if self.roof is None else asdict(self.roof)
        everything = {"environment": self.environment, "roof": top, "rows": rows}
        return json.dumps(everything, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reads what `to_json` wrote."""
        data = json.loads(text)
        rows = []
        for raw in data["rows"]:
            del raw["speed"], raw["roof_share"]
            for key in ("seconds", "ratios"):
                raw[key] = {name: Spread(**spread) for name, spread in raw[key].items()}
            rows.append(Row(**raw))
        top = None if data["roof"] is None else Roof(**data["roof"])
        return cls(data["environment"], top, rows)


def measure(suite: Suite, peers: Sequence[str] = ("sdpa",)) -> Report:
    """Checks and times every case of a suite, with a progress bar on stderr."""
    # The roof is measured on both ends of the run, since a busy machine can only make it too low.
    before = _roof()
    rows = []
    # No background refresh: its thread would take time from the calls that are being timed.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(suite.cases))
        for case in suite.cases:
            progress.update(task, description=f"{case.name} {case.dtype}")
            progress.refresh()
            rows.append(measure_case(case, [OURS, *peers], suite.budget, suite.min_rounds))
            progress.advance(task)
    after = _roof()
    top = before if before is None or after is None else before.at_least(after)
    return Report(asdict(info.environment()), top, rows)


def measure_case(case: Case, peers: list[str], budget: float, min_rounds: int = 5) -> Row:
    """Checks one case, then times it. What breaks the error rule is never timed."""
    facts: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "flops": case.flops,
        "bytes": case.bytes,
        "is_decode": case.is_decode,
    }
    copies = cases.make_copies(case)
    try:
        errors = cases.check(case, copies[0], peers)
    except (AssertionError, NotImplementedError) as error:
        return Row(**facts, failure=str(error))
    calls: dict[str, list[Callable[[], object]]] = {
        peer: [cases.bind(peer, case, x) for x in copies] for peer in peers
    }
    if case.is_decode and core is not None:
        calls[READ] = [cases.bind_read(core, x) for x in copies]
    timing = race(calls, budget, min_rounds)
    return Row(**facts, errors=errors, seconds=timing.seconds, ratios=timing.ratios, rounds=timing.rounds)


def cells(row: Row, top: Roof | None) -> list[str]:
    """One row under `COLUMNS`."""
    if row.failure is not None:
        return [row.case, row.dtype, "failed", *[""] * (len(COLUMNS) - 3)]
    ratio, share = row.ratios.get("sdpa"), row.share(top)
    sdpa_error = row.errors.get("sdpa")
    return [
        row.case,
        row.dtype,
        duration(row.seconds[OURS].median),
        f"{row.speed:.0f} {'GB/s' if row.is_decode else 'GFLOP/s'}",
        "" if share is None else f"{share:.0%}",
        "" if ratio is None else f"{ratio.median:.2f}x ({ratio.p20:.2f}-{ratio.p80:.2f})",
        f"{row.errors[OURS]:.1e}",
        "" if sdpa_error is None else f"{sdpa_error:.1e}",
    ]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    value, unit = seconds * 1e6, "us"
    for larger in ("ms", "s"):
        if value >= 1000.0:
            value, unit = value / 1000.0, larger
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def show(report: Report, console: Console, only_losers: bool = False) -> None:
    """Prints environment, table and verdict."""
    for line in header(report):
        console.print(line, highlight=False, markup=False)
    rows = [row for row in report.rows if row.loses or row.failure or not only_losers]
    if rows:
        console.print(_table(rows, report.roof))
    for row in report.rows:
        if row.failure is not None:
            text = f"[red]failed[/] {row.case} {row.dtype}: {escape(row.failure)}"
            console.print(text, highlight=False, soft_wrap=True)
    console.print(verdict(report), highlight=False)


def header(report: Report) -> Iterator[str]:
    """What the numbers depend on, in three lines."""
    env, top = report.environment, report.roof
    kernels = "reference" if env["backend"] == "reference" else env["isa"] or "without kernels"
    yield f"{env['cpu']}, {env['threads']} threads; fastattn {kernels}, torch {env['isa_torch']}"
    commit = "" if env["commit"] is None else f", commit {env['commit'][:12]}"
    dirty = " with uncommitted changes" if env["dirty"] else ""
    ours, theirs = (env["versions"][name] for name in ("fastattn", "torch"))
    yield f"fastattn {ours}{commit}{dirty}, torch {theirs}, {env['date']}"
    if top is not None:
        yield (
            f"roof, measured in this run: {top.fp32_gflops:.0f} GFLOP/s fp32, "
            f"{top.bf16_gflops:.0f} bf16; {top.read_gbs:.1f} GB/s read, {top.copy_gbs:.1f} copy"
        )
    else:
        yield "roof: not measured, the compiled core is missing (python -m fastattn info)"


def verdict(report: Report) -> str:
    """Wins, losses and failures in one line; plain text."""
    ratios = [row.ratios["sdpa"].median for row in report.rows if "sdpa" in row.ratios]
    losses = sum(row.loses for row in report.rows)
    failures = sum(row.failure is not None for row in report.rows)
    parts = [f"{len(report.rows)} cases"]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        parts.append(f"{losses} lose to SDPA, geometric mean of the ratios {mean:.2f}x")
    parts.append(f"{failures} failed" if failures else "all within the error rule")
    return "; ".join(parts)


def _table(rows: list[Row], top: Roof | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in COLUMNS:
        side: Literal["left", "right"] = "left" if column in ("case", "type") else "right"
        table.add_column(column, justify=side, no_wrap=True)
    for row in rows:
        text = cells(row, top)
        if row.failure is not None:
            text[2] = f"[red]{text[2]}[/]"
        elif row.loses:
            text[5] = f"[red]{text[5]}[/]"
        elif "sdpa" in row.ratios and row.ratios["sdpa"].median >= 1.0:
            text[5] = f"[green]{text[5]}[/]"
        table.add_row(*text)
    return table


def _roof() -> Roof | None:
    """None without the core: then only the reference runs, and a share of the roof says nothing."""
    return None if core is None else roof.measure(core)


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "bench",
        help="speed and error against PyTorch, as a share of what the machine can do",
        description="Times attention against torch's scaled_dot_product_attention: same process,\n"
        "threads and tensors, taking turns. Every case is first held to the error rule, against\n"
        "a float64 reference; one that breaks it is not timed, and the exit code is 1.",
        epilog="examples:\n"
        "  python -m fastattn bench --quick                # a third of the cases, about a minute\n"
        "  python -m fastattn bench --json results.json    # all, and keep them\n"
        "  python -m fastattn bench --only decode          # cases whose name has that word\n"
        "  python -m fastattn bench --suite grid --quick   # many small shapes; shows the losers\n"
        "  python benchmarks/report.py results.json        # in a checkout: as a Markdown table\n\n"
        "columns:\n"
        "  case     [B,H,S,D], KV heads after a slash\n"
        "  time     of one call of ours, the median\n"
        "  of roof  share of the FMA peak (fp16: of fp32's) as measured in this run; for decode,\n"
        "           of the speed of a plain read of the same k and v, which takes turns with it\n"
        "  error    the largest absolute one, over the output and the gradients",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=list(SUITES), default="attention", help="default: attention")
    add("--quick", action="store_true", help="a third of the cases, less time for each")
    add("--only", metavar="TEXT", default="", help="only cases whose name or type has it")
    add("--peers", default="sdpa", help="whom to time beside: sdpa (default), math, or sdpa,math")
    add("--json", metavar="FILE", type=Path, help="write everything that was measured")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    peers = [name for name in args.peers.split(",") if name]
    if unknown := set(peers) - (set(cases.PEERS) - {OURS}):
        args.parser.error(f"--peers: unknown {sorted(unknown)}; allowed are sdpa and math")
    whole, quick = SUITES[args.suite]
    suite = quick if args.quick else whole
    chosen = [case for case in suite.cases if args.only in f"{case.name} {case.dtype}"]
    if not chosen:
        args.parser.error(f"--only: no case of the suite has {args.only!r} in its name")
    report = measure(Suite(chosen, suite.budget, suite.min_rounds, suite.only_losers), peers)
    if args.json is not None:
        args.json.write_text(report.to_json())
    show(report, console(), suite.only_losers)
    return 1 if any(row.failure is not None for row in report.rows) else 0


def console() -> Console:
    """Stdout, wide enough for the table also where it is a pipe or a file."""
    found = Console()
    return found if found.is_terminal else Console(width=120)
