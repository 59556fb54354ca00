"""A report as one page that needs nothing else: styles and plots are inside."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment  # comes with torch

from fastattn.bench import plots, table
from fastattn.bench.report import Report, Row, groups, mean_ratio, peers, scatter, skips
from fastattn.testing.cases.peers import LABELS, OURS, label

_TEMPLATE = Path(__file__).with_name("report.html")


def page(report: Report) -> str:
    """The whole file."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    figures = list(_figures(report))
    drawn = {figure["title"] for figure in figures}
    return template.render(
        env=report.environment,
        header=list(table.header(report)),
        count=len(report.rows),
        failures=report.failures,
        means=list(_means(report)),
        scatter=scatter(report.rows),
        losses=list(_losses(report)),
        figures=figures,
        tables=[
            _group(title, rows, report) for title, rows in groups(report.rows).items() if title not in drawn
        ],
        skips=list(skips(report.rows)),
        legend=[LABELS[name] for name in [OURS, *peers(report.rows)] if name in LABELS],
        facts=list(_facts(report.environment)),
    )


def _group(title: str, rows: list[Row], report: Report) -> dict[str, Any]:
    return {"title": title, "rows": rows, "columns": table.columns(rows, report.roof)}


def _means(report: Report) -> Iterator[dict[str, Any]]:
    for peer in peers(report.rows):
        ratios = [row.ratios[peer].median for row in report.rows if peer in row.rivals]
        if ratios:
            mean = mean_ratio(report.rows, peer)
            low, high = min(ratios), max(ratios)
            yield {"label": label(peer), "mean": mean, "count": len(ratios), "low": low, "high": high}


def _losses(report: Report) -> Iterator[str]:
    for row in report.losses:
        winners = ", ".join(
            f"{label(peer)} {1 / row.ratios[peer].median:.2f}x" for peer in row.rivals if row.loses_to(peer)
        )
        yield f"{row.case} {row.dtype}: {winners} as fast"


def _figures(report: Report) -> Iterator[dict[str, Any]]:
    for title, rows in plots.figures(report).items():
        light, dark = (plots.svgs(rows, report.roof, dark) for dark in (False, True))
        types = dict.fromkeys(row.dtype for row in rows)
        panels = [
            {"dtype": dtype, "light": _uri(a), "dark": _uri(b)}
            for dtype, a, b in zip(types, light, dark, strict=True)
        ]
        yield {**_group(title, groups(report.rows)[title], report), "panels": panels}


def _uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _facts(env: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The environment, as `info` tells it."""
    yield "machine", f"{env['cpu']}, {env['cores']} cores, {env['system']}"
    yield "threads", str(env["threads"])
    yield "kernels", f"{env['isa']} (of {', '.join(env['isa_tiers'])})" if env["isa"] else "none"
    yield "torch has", env["isa_torch"]
    yield "built by", ", ".join(f"{key} {value}" for key, value in env["build"].items())
    yield "versions", ", ".join(f"{name} {value}" for name, value in env["versions"].items() if value)
    if env["commit"]:
        yield "commit", env["commit"] + (" with uncommitted changes" if env["dirty"] else "")
    yield "measured", env["date"]
