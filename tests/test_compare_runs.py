"""`python -m fastattn compare`: what counts as slower, and what does not."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastattn import compare
from fastattn.__main__ import main
from fastattn.bench.report import READ, Report, Row
from fastattn.compare import Comparison
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread

KEPT = Path(__file__).parents[1] / "benchmarks/results/zen5-2-cores.json"


def kept() -> Report:
    return Report.from_json(KEPT.read_text())


def row(seconds: float, sdpa: float | None = None, noise: float = 0.01, case: str = "case") -> Row:
    def around(x: float) -> Spread:
        return Spread(x, x * (1 - noise), x * (1 + noise))

    times = {"fastattn": around(seconds)}
    ratios = {}
    if sdpa is not None:
        times["sdpa"], ratios["sdpa"] = around(sdpa), around(sdpa / seconds)
    return Row(case, "fp32", 10**9, 10**6, False, seconds=times, ratios=ratios, rounds=9)


def states(before: Row, after: Row, roof: Roof | None = None) -> list[str]:
    a = replace(kept(), rows=[before])
    b = replace(kept(), rows=[after], roof=roof or a.roof)
    return [change.state for change in Comparison(a, b, 0.05).changes]


def test_the_same_run_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(KEPT), str(KEPT)]) == 0
    shown = capsys.readouterr().out
    count = len(Report.from_json(KEPT.read_text()).rows)
    assert f"{count} cases in both: {count} the same" in shown
    assert "slower" not in shown


def test_slower_is_beyond_threshold_and_noise() -> None:
    assert states(row(1.0), row(1.2)) == ["slower"]
    assert states(row(1.0), row(0.8)) == ["faster"]
    assert states(row(1.0), row(1.04)) == ["same"]
    assert states(row(1.0, noise=0.15), row(1.2, noise=0.15)) == ["same"]


def test_where_the_peer_is_as_much_slower_the_machine_is() -> None:
    assert states(row(1.0, sdpa=3.0), row(1.2, sdpa=3.6)) == ["same"]
    assert states(row(1.0, sdpa=3.0), row(1.2, sdpa=3.0)) == ["slower"]


def test_one_round_tells_no_noise() -> None:
    once = replace(row(1.1, noise=0.0), rounds=1)
    assert states(row(1.0, noise=0.0), once) == ["same"]
    assert states(row(1.0, noise=0.0), replace(once, rounds=3)) == ["slower"]


def test_under_another_roof_shares_are_compared() -> None:
    whole = kept().roof
    half = Roof(
        whole.fp32_gflops / 2, whole.bf16_gflops / 2, whole.read_gbs / 2, whole.copy_gbs / 2, threads=2
    )
    assert states(row(1.0), row(2.0), half) == ["same"]
    assert states(row(1.0), row(3.0), half) == ["slower"]


def test_reads_that_took_turns_are_the_roof_of_their_case() -> None:
    def read(seconds: float, share: float) -> Row:
        ratios = {READ: Spread(share, share, share)}
        return replace(row(seconds), is_bandwidth_bound=True, ratios=ratios)

    slow = Roof(512.0, 1008.0, 24.0, 22.0, threads=2)
    assert states(read(1.0, 0.9), read(2.0, 0.9), slow) == ["same"]
    assert states(read(1.0, 0.9), read(2.0, 0.7), slow) == ["slower"]


def test_other_machines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = kept()
    other = replace(a, environment={**a.environment, "cpu": "another", "threads": 8})
    file = tmp_path / "other.json"
    file.write_text(other.to_json())
    assert main(["compare", str(KEPT), str(file)]) == 0
    shown = capsys.readouterr().out
    assert "the machines differ in cpu, threads: shares of the roof are compared" in shown
    assert "of roof" in shown
    file.write_text(replace(other, roof=None, rows=a.rows[:2]).to_json())
    assert main(["compare", str(KEPT), str(file)]) == 0
    assert "which says little" in capsys.readouterr().out


def test_failures_and_missing_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Row("broken", "fp32", 1, 1, False, failure="out: error 1 is over 0.5")
    a = replace(kept(), rows=[row(1.0), row(1.0, case="broken"), row(1.0, case="gone")])
    b = replace(kept(), rows=[row(1.0), failed, row(1.0, case="new")])
    for report, name in ((a, "a.json"), (b, "b.json")):
        (tmp_path / name).write_text(report.to_json())
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert main(["compare", *names]) == 1
    shown = capsys.readouterr().out
    assert "only in A: gone fp32" in shown
    assert "only in B: new fp32" in shown
    assert "broken: broken fp32: out: error 1 is over 0.5" in shown
    assert "1 missing in B" in shown
    assert main(["compare", *reversed(names)]) == 0
    assert "mended" in capsys.readouterr().out
    assert compare.verdict(Comparison(b, b, 0.05)).startswith("3 cases in both: 1 failed, 2 the same")


@pytest.mark.parametrize("bad", [["a.json", "b.json"], [str(KEPT), __file__], ["--threshold", "200"]])
def test_what_cannot_be_compared_is_refused(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *([str(KEPT)] * 2 if bad[0] == "--threshold" else []), *bad])
    assert stop.value.code == 2
    assert bad[0] in capsys.readouterr().err or bad[1] == __file__
