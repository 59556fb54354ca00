"""Running a suite: each case is checked, then timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastattn import info
from fastattn.bench.report import READ, Report, Row
from fastattn.bench.suites import Suite
from fastattn.cpu._core import core
from fastattn.testing import roof
from fastattn.testing.cases.case import Case, bind_read, reason
from fastattn.testing.cases.peers import FORMS_OF_SDPA, OURS, forget_compiled
from fastattn.testing.roof import Roof
from fastattn.testing.timing import race

USUAL = "usual"  # the peers that a case names first
EVERY = "all"


def measure(suites: Sequence[Suite], peers: Sequence[str] = (USUAL,)) -> Report:
    """Checks and times every case, with a progress bar on stderr."""
    # The roof is measured on both ends of the run, since a busy machine can only make it too low.
    before = _roof()
    rows = []
    # No background refresh: its thread would take time from the calls that are being timed.
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, auto_refresh=False,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=sum(len(suite.cases) for suite in suites))
        for suite in suites:
            for case in suite.cases:
                progress.update(task, description=f"{case.name} {case.dtype}")
                progress.refresh()
                rows.append(measure_case(case, peers, suite))
                progress.advance(task)
    after = _roof()
    top = before if before is None or after is None else before.at_least(after)
    return Report(asdict(info.environment()), top, rows)


def measure_case(case: Case[Any], peers: Sequence[str], suite: Suite) -> Row:
    """Checks one case, then times it. What breaks the error rule is never timed."""
    names, skipped = _chosen(case, peers)
    facts: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "flops": case.flops,
        "bytes": case.bytes,
        "is_bandwidth_bound": case.is_bandwidth_bound,
        "tokens": case.tokens,
        "op": case.op,
        "curve": case.curve,
    }
    forget_compiled(names)
    try:
        copies = case.make_copies()
        found = case.check(copies[0], names)
        calls: dict[str, list[Callable[[], object]]] = {
            peer: [case.bind(peer, x).run for x in copies] for peer in found.errors
        }
        if case.is_bandwidth_bound and core is not None:
            calls[READ] = [bind_read(core, case.reads(x)) for x in copies]
        timing = race(calls, suite.budget, suite.min_rounds, suite.limit, found.seconds)
    except Exception as error:  # whatever it was: the other cases shall run
        return Row(**facts, skipped=skipped, failure=reason(error))
    return Row(
        **facts,
        errors=found.errors,
        seconds=timing.seconds,
        ratios=timing.ratios,
        skipped={**skipped, **found.skipped},
        rounds=timing.rounds,
    )


def _chosen(case: Case[Any], peers: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Ours and who is asked to run a case, and those asked for who have no form for its op."""
    if USUAL in peers or EVERY in peers:
        return [OURS, *(case.peers if EVERY in peers else case.usual_peers)], {}
    wanted = {*peers, *(FORMS_OF_SDPA if "sdpa" in peers else ())}
    names = [peer for peer in case.peers if peer in wanted or peer.startswith(OURS)]
    absent = [peer for peer in peers if peer not in names and not (peer == "sdpa" and names)]
    return [OURS, *names], dict.fromkeys(absent, f"has no form for {case.op}")


def _roof() -> Roof | None:
    """None without the core: then only the reference runs, and a share of the roof says nothing."""
    return None if core is None else roof.measure(core)
