"""Which backend runs a call, and what is said where none does."""

import pytest
import torch

from fastattn import attention, dispatch, explain, rms_norm
from fastattn.testing.inputs import qkv

SHAPE = (1, 2, 1, 3, 4, 8)


def test_the_cpu_backend_runs_here():
    """Without it every other test would be skipped, and silently so."""
    reasons = dict(explain(attention, *qkv(*SHAPE)))
    assert reasons["cpu"] is None


def test_auto_takes_a_backend_that_supports_the_call():
    assert attention(*qkv(*SHAPE)).shape == (1, 3, 2, 8)
    assert torch.equal(attention(*qkv(*SHAPE)), attention(*qkv(*SHAPE), backend="auto"))


@pytest.mark.parametrize("grad", [False, True])
def test_an_unknown_backend_is_an_error_that_lists_the_known(grad):
    known = "'auto', 'cpu', 'triton', 'reference'"
    with pytest.raises(ValueError, match=f"backend='gpu' is unknown; allowed are {known}"):
        attention(*qkv(*SHAPE, requires_grad=grad), backend="gpu")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_refused_call_gives_the_reason_and_the_way_out(name, grad):
    call = qkv(*SHAPE, dtype=torch.float64, requires_grad=grad)
    with pytest.raises(NotImplementedError, match=r"cpu: .*float64.*backend='reference' runs it"):
        attention(*call, backend=name)
    assert attention(*call, backend="reference").dtype is torch.float64


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_device_without_a_backend(name):
    call = [x.to("meta") for x in qkv(*SHAPE)]
    with pytest.raises(NotImplementedError, match=r"fastattn.attention: no backend.*'meta'"):
        attention(*call, backend=name)


def test_the_reference_is_never_chosen_silently():
    names = {name for names in dispatch.ORDER.values() for name in names}
    assert dispatch.REFERENCE not in names


def test_a_default_backend_runs_or_raises(monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    wide = qkv(*SHAPE, dtype=torch.float64)
    assert attention(*wide).dtype is torch.float64
    with pytest.raises(NotImplementedError, match="float64"):
        attention(*wide, backend="cpu")
    monkeypatch.setattr(dispatch, "DEFAULT", "cpu")
    with pytest.raises(NotImplementedError, match="float64"):
        attention(*wide)
    monkeypatch.setattr(dispatch, "DEFAULT", "gpu")
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        attention(*qkv(*SHAPE))


def test_the_environment_names_the_default_backend(run_python):
    done = run_python("from fastattn import dispatch; print(dispatch.DEFAULT)", FASTATTN_BACKEND="reference")
    assert done.stdout == "reference\n"


class TestExplain:
    def test_prints_the_choice_and_the_reference(self):
        lines = str(explain(attention, *qkv(*SHAPE), causal=True)).splitlines()
        assert lines[0].split() == ["->", "cpu", "supports", "this", "call"]
        assert lines[-1].split()[0] == "reference"

    def test_gives_the_reason_of_a_refusal(self):
        found = explain(attention, *qkv(*SHAPE, dtype=torch.float64))
        assert found[0].backend == "cpu" and "float64" in found[0].reason
        assert "->" not in str(found)

    def test_lists_no_backend_for_a_device_that_has_none(self):
        assert list(explain(attention, *(x.to("meta") for x in qkv(*SHAPE)))) == []

    def test_takes_every_argument_of_the_op(self):
        found = explain(attention, *qkv(*SHAPE), causal=True, return_lse=True, backend="cpu")
        assert found[0].reason is None

    @pytest.mark.parametrize("op", ["attention", torch.matmul, None])
    def test_refuses_what_is_not_an_op(self, op):
        with pytest.raises(TypeError, match="op must be an op"):
            explain(op, *qkv(*SHAPE))

    def test_runs_nothing(self, monkeypatch):
        monkeypatch.setattr(dispatch, "choose", None)
        explain(attention, *qkv(*SHAPE))


def test_what_no_device_has_run_is_reached_by_name_alone(monkeypatch):
    """It would run the call, and says so; `auto` passes it over."""
    monkeypatch.setattr(dispatch, "BY_NAME_ALONE", frozenset({"cpu"}))
    dispatch._asked.cache_clear()
    x = torch.zeros(2, 8)
    try:
        verdict = explain(rms_norm, x)[0]
        assert verdict.reason is None and not verdict.takes_auto
        assert "-> cpu" not in repr(explain(rms_norm, x))
        with pytest.raises(NotImplementedError, match="cpu: has not run on a device yet; backend='cpu' asks"):
            rms_norm(x, backend="auto")
        assert torch.equal(rms_norm(x, backend="cpu"), x)
    finally:
        dispatch._asked.cache_clear()
