"""A report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from bench.results import Report, Row
from bench.timing import in_bytes, in_seconds

MAIN = ("pykernels, native lanes", "pykernels")
TITLES = {
    "ensemble size": "Ensembles of Lorenz systems, 1 to 1,048,576 trajectories",
    "work and precision": "Work and precision: 1,024 Lorenz trajectories",
    "steps": "Number of steps: one trajectory, 1,000 to 1,000,000 fixed steps",
    "problems": "Other problems",
    "limits": "Where others are faster, or may be",
    "state size": "State size: reaction and diffusion on one ring of 1 to 1,048,576 sites",
    "plane": "Two dimensions: a Brusselator on one grid of 1,024 to 131,072 sites",
    "devices": "Several devices: one ensemble, split by `shard_map`",
}
WHAT = {"steps": "steps", "work and precision": "tolerance", "state size": "sites", "plane": "sites"}
# Errors at which work-precision curves are compared.
MATCHED = (1e-5, 1e-6, 1e-7, 1e-8)
#: Why another is faster where one is, by section and family; a limit of the design, not of this version.
REASONS = {
    "single": "A solve of some microseconds: most of it is what JAX needs to start a compiled program and to hand over "
    "its results, and one trajectory fills one lane of a vector of eight.",
    "large neural field": "The work is in products of large matrices, which XLA hands to its matrix library whoever "
    "asks: there is little around them to fuse.",
    "stiff": "Stability bounds an explicit method's steps: it makes thousands where an implicit one makes dozens. "
    "pykernels has explicit methods only.",
}


def page(report: Report, drawn: Sequence[str]) -> str:
    """The whole page; `drawn` are the names of the figures beside it."""
    parts = [f"# Measured\n\n{intro(report)}"]
    if report.quick:
        parts.append("**Tiny sizes: a smoke test and no measurement.**")
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in drawn]
    if report.laws:
        parts.append(f"## Growth\n\n{law_table(report)}")
    for section, title in TITLES.items():
        rows = [row for row in report.rows if row.section == section]
        if not rows:
            continue
        parts.append(f"## {title}")
        if section == "work and precision":
            parts.append(matched(rows))
        for case in dict.fromkeys(row.case for row in rows):
            mine = [row for row in rows if row.case == case]
            parts.append(f"### {case}\n\n{table(mine, WHAT.get(section, 'trajectories'))}")
            parts += lost(section, mine)
    if report.wrong:
        lines = "\n".join(f"* {what}" for what in report.wrong)
        parts.append(f"## Wrong answers, and so no figures\n\n{lines}")
    if report.left_out:
        parts.append("## Left out\n\n" + "\n".join(f"* {what}" for what in report.left_out))
    return "\n\n".join(parts) + "\n"


def intro(report: Report) -> str:
    """Where and how."""
    here = dict(report.setting)
    cpu, cores, load, commit, python = (here.pop(key) for key in ("cpu", "cores", "load", "commit", "python"))
    versions = ", ".join(f"{name} {number}" for name, number in here.items())
    return (
        f"{versions}, Python {python}; {cpu}, {cores} cores, load {load} at the start, commit {commit}; "
        f"{report.seconds:.0f} s for all of it.\n\n"
        "Every row is of a program whose states, and gradient, agree with a reference: SciPy's DOP853 at 1e-12 with its "
        "adjoint equation; what did not has no row. Programs of one table ran in one process, in turns, in two rounds some "
        "minutes apart. `time` is the median, `+-` half the range of the middle half of the samples, `x` how many times "
        "longer than pykernels it took. "
        "`compile` counts tracing, lowering, compiling and the wait for machine code. `memory` is what XLA allocates beside "
        "inputs and results; of other programs, the growth of the process. `error` is the distance from the reference, of "
        "its largest value, in the states or the gradient, whichever is larger. `evaluations` of the field are those of the "
        "forward solve, all trajectories together."
    )


def table(rows: Iterable[Row], what: str) -> str:
    """One case's rows, by size."""
    lines = [
        f"| {what} | solver | time | +- | x | error | compile | memory | evaluations |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = list(rows)
    for x in dict.fromkeys(row.x for row in rows):
        same = [row for row in rows if row.x == x]
        base = next((row for row in same if row.rival in MAIN), same[0])
        for row in same:
            name = f"{row.rival} ({row.note})" if row.note else row.rival
            size = f"{x:,.0f}" if x >= 1 else f"{x:.0e}"
            if math.isnan(row.seconds):
                lines.append(f"| {size} | {name} | NaN | | | | | | |")
                continue
            ratio = "" if row is base else f"{row.seconds / base.seconds:.3g}"
            noise = f"{100 * row.spread:.0f} %" if len(row.samples) > 1 else ""
            cells = [
                size, name, in_seconds(row.seconds), noise, ratio, f"{worst(row):.0e}",
                "" if not row.compile_seconds else in_seconds(row.compile_seconds),
                "" if row.memory is None else in_bytes(row.memory),
                "" if row.evaluations is None else f"{row.evaluations:,}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def worst(row: Row) -> float:
    """The larger of a row's errors."""
    return max(row.error or 0.0, row.gradient_error or 0.0)


def matched(rows: Sequence[Row]) -> str:
    """Times at the same achieved error, between the points of each rival's curve (straight lines through logarithms)."""
    curves = {
        (row.kind, row.rival): [r for r in rows if (r.kind, r.rival) == (row.kind, row.rival)] for row in rows
    }
    lines = [
        "Times at the same achieved error, whatever tolerance that took, and how many times longer than pykernels':\n",
        f"| | solver | {' | '.join(f'error {error:.0e}' for error in MATCHED)} |",
        f"| --- | --- | {' | '.join('---:' for _ in MATCHED)} |",
    ]
    for (kind, rival), curve in curves.items():
        cells = []
        for error in MATCHED:
            seconds, ours = (at_error(c, error) for c in (curve, curves.get((kind, MAIN[0]), [])))
            ratio = "" if seconds is None or ours is None or rival == MAIN[0] else f", {seconds / ours:.3g} x"
            cells.append("" if seconds is None else f"{in_seconds(seconds)}{ratio}")
        lines.append(f"| {kind} | {rival} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_error(curve: Sequence[Row], error: float) -> float | None:
    """Seconds of a curve at an achieved error; None beyond its ends."""
    points = sorted((worst(row), row.seconds) for row in curve if worst(row) > 0 and row.seconds > 0)
    if not points or not points[0][0] <= error <= points[-1][0]:
        return None
    errors, seconds = np.log(np.array(points)).T
    return float(np.exp(np.interp(np.log(error), errors, seconds)))


def law_table(report: Report) -> str:
    """What is stated, what is measured."""
    lines = ["| growth | stated exponent | measured | |", "| --- | ---: | ---: | --- |"]
    for law in report.laws:
        verdict = "holds" if law["holds"] else "**does not hold**"
        lines.append(f"| {law['what']} | {law['stated']:g} | {law['measured']:.3g} | {verdict} |")
    return "\n".join(lines)


def lost(section: str, rows: Sequence[Row]) -> list[str]:
    """Who is faster than pykernels, and why, where a reason is known."""
    said = []
    for x in dict.fromkeys(row.x for row in rows):
        same = [row for row in rows if row.x == x]
        base = next((row for row in same if row.rival in MAIN), None)
        if base is None:
            continue
        faster = [
            row for row in same if not row.rival.startswith("pykernels") and 1.05 * row.seconds < base.seconds
        ]
        if faster:
            names = ", ".join(f"{row.rival} ({base.seconds / row.seconds:.2g} times)" for row in faster)
            said.append(f"Faster at {x:g}: {names}.")
    reason = REASONS.get(rows[0].case.partition(",")[0])
    if section == "limits" and reason:
        said.append(reason)
    return said
