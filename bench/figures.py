"""The report's figures, under names that pages can rely on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.results import Report, Row
from bench.tables import worst

OURS = "pykernels, native lanes"
# A colour for each solver, the same in every figure.
COLOURS = matplotlib.colormaps["tab20"].colors
SIZE = (6.4, 4.0)

Points = list[tuple[float, float]]


def draw(report: Report, folder: Path) -> list[str]:
    """Writes all figures for which there are rows; their names."""
    names = sorted(
        {row.rival for row in report.rows}, key=lambda name: (not name.startswith("pykernels"), name)
    )
    style = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    drawn = []
    for name, figure in FIGURES.items():
        made = figure(report, style)
        if made is not None:
            made.savefig(folder / name, dpi=120, metadata={"Software": None})
            drawn.append(name)
    return drawn


def _curves(
    report: Report, section: str, kind: str, point: Callable[[Row], tuple[float, float | None]]
) -> dict[str, Points]:
    """Points of each solver in a section, without those that have none."""
    found: dict[str, Points] = {}
    for row in report.rows:
        if (row.section, row.kind) == (section, kind) and row.seconds == row.seconds:
            x, y = point(row)
            if x > 0 and y is not None and y > 0:
                found.setdefault(row.rival, []).append((x, y))
    return {name: sorted(points) for name, points in found.items()}


def _panels(
    panels: Sequence[tuple[dict[str, Points], str, str, str]], style: dict[str, Any]
) -> Figure | None:
    """Curves on logarithmic axes side by side, (curves, x label, y label, title) each; None if there is nothing to show."""
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return None
    figure = Figure(figsize=(SIZE[0] * len(panels), SIZE[1]), layout="constrained")
    for i, (curves, x_label, y_label, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for name, points in curves.items():
            width = 2.2 if name.startswith("pykernels") else 1.2
            axes.loglog(
                *zip(*points, strict=True), marker="o", ms=3.5, lw=width, color=style[name], label=name
            )
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    return figure


def _speed_up(report: Report, style: dict[str, Any]) -> Figure | None:
    panels = []
    for kind in ("forward", "gradient"):
        curves = _curves(report, "ensemble size", kind, lambda row: (row.x, row.seconds))
        ours = dict(curves.pop(OURS, []))
        ratios = {
            name: [(x, seconds / ours[x]) for x, seconds in points if x in ours]
            for name, points in curves.items()
        }
        panels.append(
            (
                {n: p for n, p in ratios.items() if p},
                "trajectories",
                "time over native lanes'",
                f"Lorenz, {kind}",
            )
        )
    return _panels(panels, style)


def _work_precision(report: Report, style: dict[str, Any]) -> Figure | None:
    return _panels(
        [
            (_curves(report, "work and precision", kind, lambda row: (worst(row), row.seconds)), "achieved error", "seconds",
             f"1,024 Lorenz trajectories, {kind}")
            for kind in ("forward", "gradient")
        ],
        style,
    )  # fmt: skip


def _steps(report: Report, style: dict[str, Any]) -> Figure | None:
    times = _curves(report, "steps", "gradient", lambda row: (row.x, row.seconds))
    memory = _curves(report, "steps", "gradient", lambda row: (row.x, row.memory))
    return _panels(
        [(times, "steps", "seconds", "gradient of one solve"), (memory, "steps", "bytes", "its temporary memory")], style
    )  # fmt: skip


def _gradient_over_forward(report: Report, style: dict[str, Any]) -> Figure | None:
    panels = []
    for section, label in (("ensemble size", "trajectories"), ("steps", "steps")):
        forward, gradient = (
            _curves(report, section, kind, lambda row: (row.x, row.seconds))
            for kind in ("forward", "gradient")
        )
        ratios = {
            name: [(x, seconds / dict(forward[name])[x]) for x, seconds in points if x in dict(forward[name])]
            for name, points in gradient.items()
            if name in forward
        }
        panels.append(
            ({n: p for n, p in ratios.items() if p}, label, "gradient over forward time", f"by {label}")
        )
    return _panels(panels, style)


def _scaling(report: Report, style: dict[str, Any]) -> Figure | None:
    per_step = "ns per trajectory and step"

    def per_evaluation(row: Row) -> tuple[float, float | None]:
        return row.x, None if not row.evaluations else 6e9 * row.seconds / row.evaluations

    def per_site(row: Row) -> tuple[float, float | None]:
        return row.x, None if not row.evaluations else 6e9 * row.seconds / row.evaluations / row.x

    return _panels(
        [
            (_curves(report, "ensemble size", "gradient", per_evaluation), "trajectories", per_step, "gradient"),
            (_curves(report, "state size", "forward", per_site), "sites of a ring", "ns per site and step", "forward"),
            (_curves(report, "devices", "gradient", per_evaluation), "trajectories", per_step, "devices"),
        ],
        style,
    )  # fmt: skip


FIGURES: dict[str, Callable[[Report, dict[str, Any]], Figure | None]] = {
    "speed_up.png": _speed_up,
    "work_precision.png": _work_precision,
    "steps.png": _steps,
    "gradient_over_forward.png": _gradient_over_forward,
    "scaling.png": _scaling,
}
