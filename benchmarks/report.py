"""README's table, from the JSON of `python -m fastattn bench --json FILE`.

Usage: python benchmarks/report.py FILE
"""

import sys
from pathlib import Path

from fastattn.bench import table
from fastattn.bench.report import Report, groups, skips, verdict


def markdown(report: Report) -> str:
    """Environment, a table per op and plot, and the verdict; cases that lose or fail are bold."""
    lines = [*(f"{line}  " for line in table.header(report)), ""]
    tables = groups(report.rows)
    for title, rows in tables.items():
        columns = table.columns(rows, report.roof)
        if len(tables) > 1:
            lines += [f"**{title}**", ""]
        lines.append("| " + " | ".join(column.header for column in columns) + " |")
        lines.append("| " + " | ".join("---" if column.is_text else "---:" for column in columns) + " |")
        for row in rows:
            cells = [column.cell(row) for column in columns]
            if row.loses or row.failure is not None:
                cells[0] = f"**{cells[0]}**"
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{line}  " for line in skips(report.rows)]
    return "\n".join([*lines, f"{'; '.join(verdict(report))}."])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit((__doc__ or "").strip())
    print(markdown(Report.from_json(Path(sys.argv[1]).read_text())))
