"""README's table, from the JSON of `python -m fastattn bench --json FILE`.

Usage: python benchmarks/report.py FILE
"""

import sys
from pathlib import Path

from fastattn import bench


def markdown(report: bench.Report) -> str:
    """Environment, table and verdict; cases that lose or fail are bold."""
    lines = [*(f"{line}  " for line in bench.header(report)), ""]
    lines += ["| " + " | ".join(bench.COLUMNS) + " |", "| --- | --- |" + " ---: |" * 6]
    for row in report.rows:
        cells = bench.cells(row, report.roof)
        if row.loses or row.failure is not None:
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{bench.verdict(report)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    print(markdown(bench.Report.from_json(Path(sys.argv[1]).read_text())))
