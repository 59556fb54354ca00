"""Every Triton kernel with every configuration, compiled for cards that are not here: docs/triton.md."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no Triton")

from fastattn.testing.effort import INTERPRETING
from fastattn.triton._compile import ARCHITECTURES, all_reports, ops, table

if INTERPRETING:
    pytest.skip("nothing is compiled where kernels are interpreted", allow_module_level=True)

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "triton.md"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports():
    return all_reports()


def test_every_op_is_compiled_for_each_card(reports):
    found = {(report.op, report.architecture) for report in reports}
    assert found == {(op, card) for op in ops() for card in ("sm80", "sm90")}


def test_nothing_spills(reports):
    assert not [report for report in reports if report.spilled]


def test_shared_memory_is_within_the_cards(reports):
    assert not [report for report in reports if report.shared > ARCHITECTURES[report.architecture]]


def test_tensor_cores_make_the_products(reports):
    assert not [report for report in reports if report.matrix and not report.instructions]


def test_tiles_of_64_rows_use_hoppers_own_instruction(reports):
    tiles = [report for report in reports if report.matrix and report.architecture == "sm90"]
    assert not [report for report in tiles if report.rows >= 64 and "wgmma" not in report.instructions]


def test_the_table_of_the_document_is_current(reports):
    """After a change of a kernel: `python -m fastattn.triton._compile` prints the table anew."""
    assert table(reports) in DOCUMENT.read_text()
