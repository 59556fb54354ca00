"""`python -m fastattn check`: it passes here, and it would say so if not."""

import os
from pathlib import Path
from typing import Any

import pytest

from fastattn import check
from fastattn.__main__ import main
from fastattn.check import PROBES, Outcome, Worker, probes, run_probe, verdict
from fastattn.ops import attention as op

_C = pytest.importorskip("fastattn._C", reason="the compiled core is missing")
OPS = sorted(p.stem for p in Path(op.__file__).parent.glob("*.py") if p.stem[0] != "_")


def test_every_op_has_probes() -> None:
    assert sorted(PROBES) == OPS
    for name in PROBES:
        assert {label.split()[0] for label in probes(name)} == {"fp32", "bf16", "fp16"}


def test_a_part_of_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    tier = _C.isa_tiers()[0]
    assert main(["check", "--op", "attention", "--tier", tier, "--only", "fp32 options: s"]) == 0
    shown = capsys.readouterr().out
    assert tier in shown
    assert "calls in" in shown
    assert "within the error rule, none outside" in shown


@pytest.mark.parametrize("name", PROBES)
def test_the_reference_passes(name: str) -> None:
    for label in list(probes(name))[::23]:
        assert run_probe(name, label, "reference") == ("passed", "")


def test_what_is_wrong_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(**given: Any) -> None:
        raise AssertionError("out: error 1 is over 0.5")

    monkeypatch.setitem(PROBES, "attention", lambda dtype: [("one", wrong)])
    monkeypatch.setattr(Worker, "run", lambda self, call, *args: call(*args))
    assert main(["check", "--op", "attention"]) == 1
    shown = capsys.readouterr().out
    assert "fp16 one: AssertionError: out: error 1 is over 0.5" in shown
    assert f"{3 * len(_C.isa_tiers())} failed" in shown


def test_a_refusal_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.dispatch.ORDER", {"cpu": ("cpu",)})
    monkeypatch.setattr("fastattn.cpu.attention.unsupported", lambda call: "not today")
    state, why = run_probe("attention", "fp32 options: plain", "cpu")
    assert state == "refused"
    assert "not today" in why
    outcome = Outcome("attention", "cpu", "generic", passed=2, refused={"a": why})
    assert verdict([outcome]) == "3 calls in 0 s; 1 refused; 2 within the error rule, none outside"


def test_a_process_that_dies_is_a_failure_and_the_next_call_has_another() -> None:
    worker = Worker(_C.isa_tiers()[0])
    try:
        assert worker.run(os._exit, 3) == ("failed", "the process died")  # type: ignore[arg-type]
        assert worker.run(run_probe, "attention", "fp32 options: plain", "cpu") == ("passed", "")
    finally:
        worker.close()


def test_it_refuses_what_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", "--only", "no such call"])
    assert stop.value.code == 2
    monkeypatch.setattr(check, "core", None)
    monkeypatch.setattr(check, "missing", "the core is missing (why)")
    with pytest.raises(SystemExit) as stop:
        main(["check"])
    assert stop.value.code == 1
    assert "nothing to check: the core is missing (why)" in capsys.readouterr().err
