"""What a run found, and its JSON file."""

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.testing.cases.case import Curve
from fastattn.testing.cases.peers import LABELS, OURS
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread

_CALM = 0.25  # a machine with nothing else to do stays below, as a share of the median
READ = "read"  # a pass over the same memory, which takes part as one more peer


@dataclass(frozen=True)
class Row:
    """One case: its errors, and its times where it passed the error rule."""

    case: str
    dtype: str
    flops: int
    bytes: int
    is_bandwidth_bound: bool  # its work is bytes
    op: str = "attention"
    tokens: int = 0  # of one call; where there are some, its speed is in tokens/s
    curve: Curve | None = None
    errors: dict[str, float] = field(default_factory=dict)  # largest absolute, against float64
    seconds: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)  # how many times faster ours is
    skipped: dict[str, str] = field(default_factory=dict)  # peers that cannot run it, and why
    rounds: int = 0
    failure: str | None = None  # why it was not timed

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others of a report, and finds it again in another one."""
        return self.case, self.dtype

    @property
    def unit(self) -> str:
        """Of `speed`."""
        if self.tokens:
            return "tokens/s"
        return "GB/s" if self.is_bandwidth_bound else "GFLOP/s"

    @property
    def speed(self) -> float:
        """Ours, in `unit`; 0 where it was not timed."""
        return self.speed_of(OURS)

    def speed_of(self, peer: str) -> float:
        """In `unit`, of the work that the case needs, not of what a peer does; 0 where it was not timed."""
        if peer not in self.seconds:
            return 0.0
        return (self.tokens or self._work / 1e9) / self.seconds[peer].median

    @property
    def _work(self) -> int:
        """Bytes or operations, whatever bounds it."""
        return self.bytes if self.is_bandwidth_bound else self.flops

    def share(self, top: Roof | None) -> float | None:
        """Of the roof: FMA peak of the type; for decode, of a plain read that took turns with it."""
        if READ in self.ratios:
            return self.ratios[READ].median
        if top is None or not self.seconds:
            return None
        bound = top.read_gbs if self.is_bandwidth_bound else top.gflops(self.dtype)
        return self._work / 1e9 / self.seconds[OURS].median / bound

    @property
    def rivals(self) -> list[str]:
        """Whom it was timed against: not a plain read, and not ourselves in another type."""
        return [name for name in self.ratios if name != READ and not name.startswith(OURS)]

    def loses_to(self, peer: str) -> bool:
        """Whether a peer is faster, beyond the 4 us of overhead allowed to calls under 10 us."""
        if self.ratios[peer].median >= 1.0:
            return False
        ours, theirs = self.seconds[OURS].median, self.seconds[peer].median
        return not (theirs < 10e-6 and ours - theirs <= 4e-6)

    @property
    def loses(self) -> bool:
        """Whether any peer is faster."""
        return any(map(self.loses_to, self.rivals))


@dataclass(frozen=True)
class Report:
    """A whole run. The JSON file is this, with every row's speed and share of the roof added."""

    environment: dict[str, Any]
    roof: Roof | None
    rows: list[Row]

    @property
    def failures(self) -> list[Row]:
        """Cases that were not timed."""
        return [row for row in self.rows if row.failure is not None]

    @property
    def losses(self) -> list[Row]:
        """Cases in which a peer is faster."""
        return [row for row in self.rows if row.loses]

    def to_json(self) -> str:
        """See `from_json`."""
        rows = [{**asdict(row), "speed": row.speed, "roof_share": row.share(self.roof)} for row in self.rows]
        for row in rows:
            row["curve"] = row["curve"] and Curve(*row["curve"])._asdict()
        top = None if self.roof is None else asdict(self.roof)
        return json.dumps({"environment": self.environment, "roof": top, "rows": rows}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reads what `to_json` wrote, also what it wrote when attention was the only op.

        Raises:
            ValueError: the text is something else.
        """
        try:
            data = json.loads(text)
            rows = [_row(raw) for raw in data["rows"]]
            top = None if data["roof"] is None else Roof(**data["roof"])
            return cls(data["environment"], top, rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a report of bench: {type(error).__name__}: {error}") from error


def _row(raw: dict[str, Any]) -> Row:
    del raw["speed"], raw["roof_share"]
    if "is_decode" in raw:
        raw["is_bandwidth_bound"] = raw.pop("is_decode")
    for name in ("seconds", "ratios"):
        raw[name] = {peer: Spread(**spread) for peer, spread in raw[name].items()}
    if raw.get("curve"):
        raw["curve"] = Curve(**raw["curve"])
    return Row(**raw)


def peers(rows: Sequence[Row]) -> list[str]:
    """Whom these rows were measured or meant to be measured against, in the order of `LABELS`."""
    found = {name for row in rows for name in (*row.ratios, *row.skipped)} - {READ}
    order = list(LABELS)
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each plot and, of all others, of each op, in the order in which they came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.op if row.curve is None else row.curve.figure, []).append(row)
    return found


def mean_ratio(rows: Sequence[Row], peer: str) -> float | None:
    """The geometric mean of how many times faster ours is."""
    ratios = [row.ratios[peer].median for row in rows if peer in row.rivals]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def scatter(rows: Sequence[Row]) -> str | None:
    """A warning, where our own times scatter so much that something else must have run."""
    found = [(t.p80 - t.p20) / t.median for row in rows for t in [row.seconds.get(OURS)] if t is not None]
    if not found or (typical := statistics.median(found)) < _CALM:
        return None
    return f"times scatter by {typical:.0%} between p20 and p80: this machine was busy with something else"


def verdict(report: Report) -> Iterator[str]:
    """How many cases, who is faster where, and whether all are right; plain text."""
    yield f"{len(report.rows)} cases"
    for peer in peers(report.rows):
        mean = mean_ratio(report.rows, peer)
        if mean is not None:
            rows = [row for row in report.rows if peer in row.ratios]
            losses = sum(row.loses_to(peer) for row in rows)
            of = "" if len(rows) == len(report.rows) else f" of {len(rows)}"
            yield f"{losses}{of} lose to {LABELS[peer][0]}, geometric mean of the ratios {mean:.2f}x"
    if busy := scatter(report.rows):
        yield busy
    if report.failures:
        yield f"{len(report.failures)} failed"
    else:
        yield "all within the error rule"


def skips(rows: Sequence[Row]) -> Iterator[str]:
    """Who did not run what, and why; one line for each reason."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for peer, why in row.skipped.items():
            found[peer, why] = found.get((peer, why), 0) + 1
    for (peer, why), count in found.items():
        yield f"{LABELS[peer][0]} did not run {count} case{'s' if count > 1 else ''}: {why}"
