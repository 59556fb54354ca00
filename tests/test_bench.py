"""`python -m fastattn bench`: what it measures, refuses, prints, writes and draws."""

import importlib.util
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastattn import bench, dispatch
from fastattn.__main__ import main
from fastattn.bench import html, measuring, plots, report, suites, table
from fastattn.bench.report import Report, Row
from fastattn.ops import attention as op
from fastattn.testing.cases.attention import AttentionCase
from fastattn.testing.cases.attention_decode import DecodeCase
from fastattn.testing.cases.attention_varlen import VarlenCase
from fastattn.testing.cases.case import Curve
from fastattn.testing.cases.feed_forward import FeedForwardCase
from fastattn.testing.cases.linear import LinearCase
from fastattn.testing.cases.peers import DENSE, LABELS
from fastattn.testing.roof import Roof
from fastattn.testing.timing import Spread

ROOT = Path(__file__).resolve().parents[1]
CAUSAL = AttentionCase(1, 2, 16, 16, 8, causal=True)
ATTENTION = [
    CAUSAL,
    AttentionCase(1, 4, 16, 16, 8, "bf16", nheads_k=2, masked=True),
    replace(CAUSAL, backward=True),
    AttentionCase(1, 2, 1, 32, 8, "fp16"),
]
VARLEN = [VarlenCase((3, 9, 1), 2, 8), VarlenCase((3, 9), 2, 8, "bf16", backward=True)]
DECODE = [DecodeCase(2, 4, 2, 32, 8, "bf16", page_size=4), DecodeCase(2, 4, 2, 32, 8, "int8")]
FFN = [LinearCase(4, 8, 6), FeedForwardCase(9, 8, 6, backward=True)]
SWEEP = [
    AttentionCase(1, 1, length, length, 8, dtype, curve=Curve("a figure, D 8", "length", length))
    for length in (4, 8, 12)
    for dtype in ("fp32", "bf16")
]
TOP = Roof(200.0, 400.0, 30.0, 25.0, threads=2)


@pytest.fixture
def tiny_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny cases, in plain PyTorch, under a roof that is known."""
    cases = {"attention": ATTENTION, "varlen": VARLEN, "decode": DECODE, "ffn": FFN, "sweep": SWEEP}
    tiny = {name: suites.Suite(x, budget=0.0, min_rounds=3) for name, x in cases.items()}
    monkeypatch.setattr(suites, "SUITES", {name: (suite, suite) for name, suite in tiny.items()})
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")
    monkeypatch.setattr(measuring, "_roof", lambda: TOP)


@pytest.mark.usefixtures("tiny_suites")
def test_bench_writes_what_the_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    assert main(["bench", "--quick", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert set(data) == {"environment", "roof", "rows"}
    cases = (*ATTENTION, *VARLEN, *DECODE, *FFN)
    assert [row["case"] for row in data["rows"]] == [case.name for case in cases]
    for row in data["rows"]:
        assert row["case"] in shown
        assert row["seconds"]["fastattn"]["median"] > 0
        for ratio in row["ratios"].values():
            assert ratio["p20"] <= ratio["median"] <= ratio["p80"]
        assert set(row["errors"]) == set(row["seconds"]) - {"read"}
        assert row["roof_share"] > 0
    assert "attention_varlen" in shown
    assert "SDPA padded" in shown

    found = Report.from_json(file.read_text())
    assert json.loads(found.to_json()) == data
    lines = _report_module().markdown(found).splitlines()
    assert sum(line.startswith("| ") for line in lines) == 5 * 2 + len(data["rows"])


def _report_module() -> Any:
    path = ROOT / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(ROOT.glob("benchmarks/results/*.json")), ids=lambda path: path.name)
def test_results_that_were_kept_can_be_read(file: Path) -> None:
    found = Report.from_json(file.read_text())
    assert all(row.seconds for row in found.rows)
    assert f"{len(found.rows)} cases" in _report_module().markdown(found)


def test_readme_shows_the_kept_results() -> None:
    found = Report.from_json((ROOT / "benchmarks/results/zen5-2-cores.json").read_text())
    assert _report_module().markdown(found) in (ROOT / "README.md").read_text()


def test_other_files_are_refused() -> None:
    for text in ("", "[]", "{}", '{"environment": {}, "roof": null, "rows": [{}]}'):
        with pytest.raises(ValueError, match="not a report of bench"):
            Report.from_json(text)


@pytest.mark.usefixtures("tiny_suites")
def test_bench_never_times_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Any] = op.attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.01

    monkeypatch.setattr(op, "attention", wrong)
    file = tmp_path / "results.json"
    assert main(["bench", "--only", "fwd 1,2,16,8", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert "over" in row["failure"]
    assert row["seconds"] == {}
    assert "failed" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_suites")
def test_what_no_backend_takes_is_a_failure_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "auto")
    monkeypatch.setattr("fastattn.dispatch.ORDER", {"cpu": ()})
    monkeypatch.setattr("fastattn.dispatch._asked", dispatch._asked.__wrapped__)  # it remembers
    assert main(["bench", "--suite", "attention"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("no backend takes this call") == len(ATTENTION)
    assert "4 failed" in shown


@pytest.mark.usefixtures("tiny_suites")
@pytest.mark.parametrize(
    "bad", [["--only", "nothing"], ["--peers", "nobody"], ["--json", "no/such/folder/x.json"]]
)
def test_bench_refuses_what_it_does_not_know(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *bad])
    assert stop.value.code == 2
    assert bad[1].split("/x")[0] in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_suites")
def test_peers_are_asked_by_name_and_the_absent_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--peers", "sdpa,eager"]) == 0
    shown = capsys.readouterr().out
    assert "vs eager" in shown
    assert "vs SDPA loop" in shown
    assert "eager did not run 2 cases: has no form for attention_varlen" in shown
    assert "eager did not run 2 cases: has no form for attention_decode" in shown
    assert "SDPA did not run" not in shown


def test_a_peer_that_cannot_run_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Any:
        raise RuntimeError("no such kernel\nand a traceback")

    monkeypatch.setitem(DENSE, "flash", refuses)
    monkeypatch.setattr("fastattn.dispatch.DEFAULT", "reference")
    row = measuring.measure_case(CAUSAL, ["sdpa", "flash"], suites.Suite([], 0.0, 3))
    assert row.skipped == {"flash": "RuntimeError: no such kernel"}
    assert set(row.seconds) == {"fastattn", "sdpa"}
    assert list(report.skips([row])) == ["flash did not run 1 case: RuntimeError: no such kernel"]
    assert report.peers([row]) == ["sdpa", "flash"]


@pytest.mark.parametrize("quick", [False, True])
def test_cases_of_a_run_have_names_of_their_own(quick: bool) -> None:
    for names in ([*suites.ALL, "sweep"], ["grid"]):
        keys = [(case.name, case.dtype) for suite in suites.choose(names, quick) for case in suite.cases]
        assert len(keys) == len(set(keys))


def test_a_case_in_two_suites_runs_once_and_is_drawn() -> None:
    shared = [(c.name, c.dtype) for s in suites.choose(["decode"], False) for c in s.cases]
    chosen = [case for suite in suites.choose(["decode", "sweep"], False) for case in suite.cases]
    drawn = {(case.name, case.dtype) for case in chosen if case.curve}
    assert drawn & set(shared)


@pytest.mark.usefixtures("tiny_suites")
def test_pages_need_nothing_from_outside_and_tell_it_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "report.html", tmp_path / "plots"
    assert main(["bench", "--suite", "attention", "--html", str(page), "--plot", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["a-figure-d-8.png"]
    text = page.read_text()
    assert not re.findall(r'(?:src|href|srcset)="(?!data:|#)', text)
    assert not re.search(r"@import|url\(", text)
    for case in (*ATTENTION, *SWEEP):
        assert text.count(f">{case.name}<") >= 1
    assert "keep the error rule" in text
    assert text.count("data:image/svg+xml") == 2 * 2  # types, colours
    assert "How to read this" in text


def _row(ours: float, sdpa: float, **more: Any) -> Row:
    seconds = {"fastattn": Spread(ours, ours, ours), "sdpa": Spread(sdpa, sdpa, sdpa)}
    ratios = {"sdpa": Spread(sdpa / ours, sdpa / ours, sdpa / ours)}
    return Row("case <1>", "fp32", 10**6, 10**6, False, seconds=seconds, ratios=ratios, rounds=5, **more)


def _report(*rows: Row) -> Report:
    kept = Report.from_json((ROOT / "benchmarks/results/zen5-2-cores.json").read_text())
    return Report(kept.environment, TOP, list(rows))


def test_losses_and_failures_stand_on_top_of_the_page() -> None:
    pytest.importorskip("matplotlib")
    errors = {"fastattn": 1e-7, "sdpa": 1e-7}
    failed = Row("broken", "bf16", 1, 1, False, failure="out: error 1 is over 0.5")
    text = html.page(_report(_row(2e-3, 1e-3, errors=errors), failed))
    assert "1 of 2 cases failed" in text
    assert "case &lt;1&gt; fp32: SDPA 2.00x as fast" in text
    assert "out: error 1 is over 0.5" in text
    assert text.count('<tr class="loss">') == 2


def test_a_loss_is_shown_unless_it_is_microseconds() -> None:
    assert _row(2e-3, 1e-3).loses
    assert not _row(1e-3, 2e-3).loses
    assert not _row(9e-6, 6e-6).loses
    assert _row(11e-6, 6e-6).loses


def test_our_own_other_types_and_reads_are_no_rivals() -> None:
    row = _row(2e-3, 4e-3)
    slow = Spread(0.5, 0.5, 0.5)
    ratios = {**row.ratios, "fastattn bf16": slow, report.READ: slow}
    seconds = {**row.seconds, "fastattn bf16": slow, report.READ: slow}
    row = replace(row, ratios=ratios, seconds=seconds)
    assert row.rivals == ["sdpa"]
    assert not row.loses
    assert row.share(None) == 0.5


def test_tokens_are_told_instead_of_work() -> None:
    row = replace(_row(2e-3, 4e-3), tokens=5)
    assert (row.speed, row.unit) == (2500.0, "tokens/s")
    assert row.share(TOP) == replace(row, tokens=0).share(TOP) == 10**6 / 1e9 / 2e-3 / TOP.fp32_gflops


def test_a_busy_machine_is_said() -> None:
    calm, busy = Spread(1e-3, 0.95e-3, 1.05e-3), Spread(1e-3, 0.8e-3, 1.4e-3)
    row = _row(1e-3, 1e-3)
    assert report.scatter([replace(row, seconds={"fastattn": calm})]) is None
    assert "busy" in (report.scatter([replace(row, seconds={"fastattn": busy})]) or "")
    assert report.scatter([]) is None


def test_a_narrow_table_continues_below() -> None:
    spread = Spread(2.0, 1.9, 2.1)
    peers = dict.fromkeys(DENSE, spread)
    row = replace(
        _row(1e-3, 2e-3), ratios=peers, seconds={"fastattn": spread, **peers}, errors={"fastattn": 1e-7}
    )
    for width, fewest, most in ((120, 2, len(DENSE)), (400, 1, 1)):
        out = Console(file=io.StringIO(), width=width)
        table.show(_report(row), out)
        text = out.file.getvalue()  # type: ignore[attr-defined]
        assert fewest <= len(re.findall(r"^case +type", text, re.MULTILINE)) <= most
        assert "…" not in text
        for name in DENSE:
            assert f"vs {LABELS[name][0]}" in text


def test_a_figure_needs_two_points() -> None:
    pytest.importorskip("matplotlib")
    curve = Curve("one", "x", 1)
    rows = [_row(1e-3, 2e-3, curve=curve), _row(1e-3, 2e-3, curve=curve._replace(x=2))]
    assert plots.figures(_report(rows[0])) == {}
    assert list(plots.figures(_report(*rows))) == ["one"]
    light, dark = (next(plots.svgs(rows, TOP, dark)) for dark in (False, True))
    assert light != dark
    assert b"roof: FMA peak" in light


def test_pictures_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(bench.importlib, "import_module", absent)
    with pytest.raises(SystemExit):
        main(["bench", "--html", "x.html"])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (123.4e-6, "123 us"), (1.234e-6, "1.23 us")],
)
def test_duration(seconds: float, text: str) -> None:
    assert table.duration(seconds) == text
