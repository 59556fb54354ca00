"""A report as text: header, tables, verdict. The Markdown and the HTML take their cells from here."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from fastattn.bench.report import Report, Row, groups, peers, skips, verdict
from fastattn.testing.cases.peers import OURS, label
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread

LOSS, WIN = "loss", "win"
_STYLES = {LOSS: "red", WIN: "green", "": ""}


class Column(NamedTuple):
    """One column of a table."""

    header: str
    cell: Callable[[Row], str]
    is_text: bool = False
    tone: Callable[[Row], str] = lambda row: ""  # LOSS, WIN or neither


def columns(rows: Sequence[Row], top: Roof | None, against: Sequence[str] | None = None) -> list[Column]:
    """All columns of a table of these rows, with every peer or the ones named."""
    against = peers(rows) if against is None else against
    return [*_identity(), *_ours(top), *_ratios(against), _error(OURS), *map(_error, against)]


def _identity() -> list[Column]:
    return [Column("case", lambda row: row.case, True), Column("type", lambda row: row.dtype, True)]


def _ours(top: Roof | None) -> list[Column]:
    def share(row: Row) -> str:
        found = row.share(top)
        return "" if found is None or row.failure is not None else f"{found:.0%}"

    def seconds(row: Row) -> str:
        return "failed" if row.failure is not None else duration(row.seconds[OURS].median)

    def speed(row: Row) -> str:
        return "" if row.failure is not None else f"{row.speed:.{0 if row.speed >= 10 else 1}f} {row.unit}"

    return [
        Column("time", seconds, tone=lambda row: LOSS if row.failure is not None else ""),
        Column("speed", speed),
        Column("of roof", share),
    ]


def _ratios(against: Sequence[str]) -> Iterator[Column]:
    for peer in against:
        yield _ratio(peer, f"vs {label(peer)}" + (" (p20-p80)" if len(against) == 1 else ""))


def _ratio(peer: str, header: str) -> Column:
    def cell(row: Row) -> str:
        return ratio(row.ratios[peer]) if peer in row.ratios else "-" if peer in row.skipped else ""

    def tone(row: Row) -> str:
        if peer not in row.rivals:
            return ""
        return LOSS if row.loses_to(peer) else WIN if row.ratios[peer].median >= 1.0 else ""

    return Column(header, cell, tone=tone)


def _error(peer: str) -> Column:
    header = "error" if peer == OURS else f"{label(peer)}'s error"
    return Column(header, lambda row: f"{row.errors[peer]:.1e}" if peer in row.errors else "")


def ratio(spread: Spread) -> str:
    """For example 2.26x (2.21-2.34)."""
    return f"{spread.median:.2f}x ({spread.p20:.2f}-{spread.p80:.2f})"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    value, unit = seconds * 1e6, "us"
    for larger in ("ms", "s"):
        if value >= 1000.0:
            value, unit = value / 1000.0, larger
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


def show(report: Report, console: Console, only_losers: bool = False) -> None:
    """Prints environment, a table per op, what is missing from it, and the verdict."""
    for line in header(report):
        console.print(line, highlight=False, markup=False)
    rows = [row for row in report.rows if row.loses or row.failure or not only_losers]
    tables = groups(rows)
    for title, found in tables.items():
        if len(tables) > 1:
            console.print(f"\n[bold]{title}", highlight=False)
        for table in _tables(found, report.roof, console):
            console.print(table)
    for row in report.failures:
        text = f"[red]failed[/] {row.case} {row.dtype}: {escape(row.failure or '')}"
        console.print(text, highlight=False, soft_wrap=True)
    for line in skips(report.rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    parts = list(verdict(report))
    console.print(("; " if len(parts) <= 3 else "\n").join(parts), highlight=False)


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


def _tables(rows: list[Row], top: Roof | None, console: Console) -> Iterator[Table]:
    """One table where it fits the console; else the peers that do not fit follow in further ones."""
    left, is_first = peers(rows), True
    endless = console.options.update(max_width=10_000)
    while left or is_first:
        count = len(left)
        while True:
            if is_first:
                table = _table(rows, columns(rows, top, left[:count]))
            else:
                table = _table(rows, [*_identity(), *_ratios(left[:count]), *map(_error, left[:count])])
            if count <= 1 or Measurement.get(console, endless, table).maximum <= console.width:
                break
            count -= 1
        yield table
        left, is_first = left[count:], False


def _table(rows: list[Row], shown: list[Column]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(column.header, justify="left" if column.is_text else "right", no_wrap=True)
    for row in rows:
        styles = [_STYLES[column.tone(row)] for column in shown]
        cells = [escape(column.cell(row)) for column in shown]
        table.add_row(*(f"[{s}]{c}[/]" if s and c else c for s, c in zip(styles, cells, strict=True)))
    return table
