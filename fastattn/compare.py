"""`python -m fastattn compare A.json B.json`: what became slower or faster between two runs of bench."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastattn.bench import console
from fastattn.bench.report import READ, Report, Row
from fastattn.bench.table import duration, header, ratio
from fastattn.testing.cases.peers import OURS, label
from fastattn.testing.timing import Spread

# What must be equal for times to say something about the code.
_MACHINE = ("cpu", "cores", "threads", "system", "isa", "isa_torch")
_SAME_ROOF = 0.1  # a share by which two measurements of one machine's roof may differ
_FEW_ROUNDS, _UNKNOWN_SPREAD = 3, 0.1  # fewer rounds tell no spread: this one is assumed

SLOWER, FASTER, SAME, BROKEN, MENDED, FAILED = "slower", "faster", "same", "broken", "mended", "failed"
_STYLES = {SLOWER: "red", BROKEN: "red", FAILED: "red", FASTER: "green", MENDED: "green", SAME: ""}


@dataclass(frozen=True)
class Change:
    """One case in both runs."""

    before: Row
    after: Row
    by_share: bool  # of the roof: else by time
    ratio: Spread | None  # the speed after by the speed before; None where one of them failed
    control: float | None  # the same of a peer whose version is the same: what the machine did
    state: str


class Comparison:
    """Two reports, case by case."""

    def __init__(self, before: Report, after: Report, threshold: float) -> None:
        self.before, self.after, self.threshold = before, after, threshold
        old, new = ({row.key: row for row in report.rows} for report in (before, after))
        self.missing = [row for key, row in old.items() if key not in new]
        self.added = [row for key, row in new.items() if key not in old]
        self.other_machine = [
            name for name in _MACHINE if before.environment.get(name) != after.environment.get(name)
        ]
        versions = (report.environment["versions"]["torch"] for report in (before, after))
        self._same_torch = len(set(versions)) == 1 and not self.other_machine
        self.changes = [self._change(row, new[key]) for key, row in old.items() if key in new]

    @property
    def has_regressed(self) -> bool:
        """Whether anything is slower beyond the noise, or fails that did not."""
        return any(change.state in (SLOWER, BROKEN) for change in self.changes)

    def _change(self, old: Row, new: Row) -> Change:
        if old.failure is not None or new.failure is not None:
            states = {(False, True): BROKEN, (True, False): MENDED, (True, True): FAILED}
            state = states[old.failure is not None, new.failure is not None]
            return Change(old, new, False, None, None, state)
        by_share = self._differs(old)
        shares = [_shares(row, report) for row, report in ((old, self.before), (new, self.after))]
        if not by_share or None in shares:
            by_share, shares = False, [_speeds(old), _speeds(new)]
        a, b = shares
        assert a is not None and b is not None
        found = Spread(b.median / a.median, b.p20 / a.p80, b.p80 / a.p20)
        control = self._control(old, new) if not by_share else None
        return Change(old, new, by_share, found, control, self._state(found, control))

    def _state(self, found: Spread, control: float | None) -> str:
        """Beyond the threshold, beyond the spread of both, and not because the machine is."""
        alone = found.median / control if control is not None else found.median
        if max(found.median, alone) < 1 - self.threshold and found.p80 < 1:
            return SLOWER
        return FASTER if min(found.median, alone) > 1 + self.threshold and found.p20 > 1 else SAME

    def _control(self, old: Row, new: Row) -> float | None:
        peer = next((name for name in old.rivals if name in new.rivals), None)
        if peer is None or not self._same_torch:
            return None
        return old.seconds[peer].median / new.seconds[peer].median

    def _differs(self, row: Row) -> bool:
        """Whether the roof over a case is another one, so that times say nothing."""
        a, b = self.before.roof, self.after.roof
        if self.other_machine or a is None or b is None:
            return bool(self.other_machine)
        x, y = ((t.read_gbs if row.is_bandwidth_bound else t.gflops(row.dtype)) for t in (a, b))
        return abs(x - y) > _SAME_ROOF * max(x, y)


def _speeds(row: Row) -> Spread:
    """Calls a second."""
    t = row.seconds[OURS]
    return _widened(Spread(1 / t.median, 1 / t.p80, 1 / t.p20), row)


def _shares(row: Row, report: Report) -> Spread | None:
    """Of the roof; None where there is none."""
    share = row.share(report.roof)
    if share is None:
        return None
    if READ in row.ratios:
        return _widened(row.ratios[READ], row)
    t = row.seconds[OURS]
    return _widened(Spread(share, share * t.median / t.p80, share * t.median / t.p20), row)


def _widened(spread: Spread, row: Row) -> Spread:
    if row.rounds >= _FEW_ROUNDS:
        return spread
    return Spread(spread.median, spread.median * (1 - _UNKNOWN_SPREAD), spread.median * (1 + _UNKNOWN_SPREAD))


def show(found: Comparison, out: Console) -> None:
    """Both machines, a table, what is missing, and the verdict."""
    for name, report in (("A", found.before), ("B", found.after)):
        for line in header(report):
            out.print(f"{name}: {line}", highlight=False, markup=False)
    for line in _notes(found):
        out.print(line, highlight=False, markup=False)
    if found.changes:
        out.print(_table(found))
    for title, rows in (("only in A", found.missing), ("only in B", found.added)):
        for row in rows:
            out.print(f"{title}: {row.case} {row.dtype}", highlight=False, markup=False)
    for change in found.changes:
        if change.state == BROKEN:
            text = f"broken: {change.after.case} {change.after.dtype}: {change.after.failure}"
            out.print(text, highlight=False, markup=False, soft_wrap=True)
    out.print(verdict(found), highlight=False)


def verdict(found: Comparison) -> str:
    """How many cases changed, in one line; plain text."""
    states = [change.state for change in found.changes]
    parts = [f"{states.count(state)} {state}" for state in _STYLES if state in states and state != SAME]
    parts.append(f"{states.count(SAME)} the same within {found.threshold:.0%} and the noise")
    if found.missing:
        parts.append(f"{len(found.missing)} missing in B")
    return f"{len(states)} cases in both: {', '.join(parts)}"


def _notes(found: Comparison) -> Iterator[str]:
    if found.other_machine:
        yield f"the machines differ in {', '.join(found.other_machine)}: shares of the roof are compared"
    elif any(change.by_share for change in found.changes):
        yield "the roofs differ: where they do, shares of the roof are compared"
    if found.other_machine and not any(change.by_share for change in found.changes):
        yield "but a run has no roof: times are compared, which says little"


def _table(found: Comparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("case", "type"):
        table.add_column(name, no_wrap=True)
    for name in ("A", "B", "speed B/A (noise)", "peer B/A", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for change in found.changes:
        sides = [
            _side(change, row, report)
            for row, report in ((change.before, found.before), (change.after, found.after))
        ]
        peer = "" if change.control is None else f"{change.control:.2f}x {label(change.before.rivals[0])}"
        style = _STYLES[change.state]
        state = "" if change.state == SAME else f"[{style}]{change.state}[/]"
        factor = "" if change.ratio is None else ratio(change.ratio)
        table.add_row(change.before.case, change.before.dtype, *sides, factor, peer, state)
    return table


def _side(change: Change, row: Row, report: Report) -> str:
    if row.failure is not None:
        return "failed"
    share = row.share(report.roof) if change.by_share else None
    return duration(row.seconds[OURS].median) if share is None else f"{share:.0%} of roof"


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "compare",
        help="two runs of bench: what became slower or faster, beyond the noise",
        description="Compares the times of two JSON files of bench, case by case. A case is slower where\n"
        "its median is, by more than the threshold; and even the luckiest fifth of B by the unluckiest\n"
        "of A; and a peer of the same version in the same runs is not as much. Runs of different\n"
        "machines, or under different roofs, are compared by their shares of the roof. The exit code\n"
        "is 1 where a case is slower or fails that did not.",
        epilog="examples:\n"
        "  python -m fastattn compare before.json after.json\n"
        "  python -m fastattn compare before.json after.json --threshold 10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", metavar="A.json", type=Path)
    parser.add_argument("after", metavar="B.json", type=Path)
    parser.add_argument("--threshold", metavar="PERCENT", type=float, default=5.0, help="default: 5")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if not 0.0 <= args.threshold < 100.0:
        args.parser.error(f"--threshold must be from 0 to below 100, got {args.threshold:g}")
    reports: list[Report] = []
    for path in (args.before, args.after):
        try:
            reports.append(Report.from_json(path.read_text()))
        except (OSError, ValueError) as error:
            args.parser.error(f"{path}: {error}")
    found = Comparison(reports[0], reports[1], args.threshold / 100)
    show(found, console())
    return 1 if found.has_regressed else 0
