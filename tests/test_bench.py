"""The report of `python -m bench`: only right answers have rows, and only what moved is told."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import problems
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `pytest` alone does not put it there
from bench import cases, compare, figures, reference, report, results, rivals, tables

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LANES = 8
RIGHT, OURS = "lax.scan by hand, RK4", "pykernels, native lanes"


@functools.cache
def program() -> rivals.Program:
    return rivals.scan_program(cases.PROBLEMS["Lorenz"](LANES), True)


def changed(change: Callable[[Any], Any]) -> rivals.Rival:
    """A program whose results are changed."""

    def build(problem: cases.Problem, gradient: bool) -> rivals.Program:
        made = program()
        return replace(made, run=lambda: change(jax.tree.map(np.array, made.run())))

    return rivals.Rival(OURS, build)


def wrong_field(problem: cases.Problem, gradient: bool) -> rivals.Program:
    """pykernels' own kernels, of a field that is a hundredth off."""

    def make() -> Any:
        field = problem.field()
        return lambda t, y, p: 1.01 * field(t, y, p)

    return rivals.pykernels_program(replace(problem, field=make), gradient)


def wrong_state(result: Any) -> Any:
    (loss, (ys, attempts)), gradient = result
    ys[-1, 1] += 0.1
    return (loss, (ys, attempts)), gradient


def wrong_gradient(result: Any) -> Any:
    result[1][-1, 1] *= 1.02
    return result


def wrong_loss(result: Any) -> Any:
    (loss, rest), gradient = result
    return (1.01 * loss, rest), gradient


def not_finite(result: Any) -> Any:
    result[0][1][0][3, 1] = np.nan  # of a trajectory that has no reference, too
    return result


def measured(rival: rivals.Rival) -> results.Report:
    made = results.Report({})
    entry = report.Entry(
        "problems", "Lorenz", LANES, cases.PROBLEMS["Lorenz"](LANES), True, (RIGHT, rival.name)
    )
    right = rivals.Rival(RIGHT, lambda problem, gradient: program())
    report.sample(
        report.measure(entry, made, lambda: 600.0, {}, {}, {RIGHT: right, rival.name: rival}), True, 600.0
    )
    return made


@pytest.mark.parametrize(
    "rival",
    [
        rivals.Rival(OURS, wrong_field),
        *(changed(change) for change in (wrong_state, wrong_gradient, wrong_loss, not_finite)),
    ],
    ids=["kernel", "state", "gradient", "loss", "not finite"],
)
def test_a_wrong_answer_has_no_row(rival: rivals.Rival, capsys: pytest.CaptureFixture[str]) -> None:
    made = measured(rival)
    assert [row.rival for row in made.rows] == [RIGHT]
    assert len(made.wrong) == 1 and OURS in made.wrong[0]
    assert f"WRONG {made.wrong[0]}" in capsys.readouterr().err
    assert not any(line.startswith("|") and OURS in line for line in tables.table(made.rows, "").splitlines())
    # The same program with its results as they are has one.
    assert [row.rival for row in measured(changed(lambda result: result)).rows] == [RIGHT, OURS]


def test_what_breaks_is_nan_and_what_is_absent_is_said() -> None:
    def breaks(problem: cases.Problem, gradient: bool) -> rivals.Program:
        raise MemoryError("out of memory\nand a long story")

    def absent(problem: cases.Problem, gradient: bool) -> rivals.Program:
        raise rivals.Unavailable("not installed")

    broken = measured(rivals.Rival("broken", breaks))
    assert [(row.rival, math.isnan(row.seconds)) for row in broken.rows] == [(RIGHT, False), ("broken", True)]
    assert "| broken (MemoryError: out of memory) | NaN |" in tables.table(broken.rows, "trajectories")
    missing = measured(rivals.Rival("absent", absent))
    assert missing.left_out == ["absent: not installed"] and len(missing.rows) == 1


def test_reference_is_the_closed_form() -> None:
    rates = np.array([0.5, 1.0, 2.0])
    y0s = np.array([[1.0, 2.0, -0.5]] * 3)
    problem = cases.Problem(cases.anew(problems.DECAY), lambda: (y0s, rates), "float64", t1=1.5)
    got = reference.reference(problem)
    exact = y0s * np.exp(-1.5 * rates)[:, None]
    # DOP853 at 1e-12, some dozens of steps.
    np.testing.assert_allclose(got.states[0], exact, rtol=1e-10)
    np.testing.assert_allclose(got.gradient[0], -3.0 * np.sum(exact**2, axis=1), rtol=1e-9)


def test_a_ring_repeats_itself() -> None:
    """What makes the reference of a large ring: it holds copies of the small one."""
    small, large = (reference._solved(replace(cases.fisher_ring(n), cell=None)) for n in (64, 128))
    np.testing.assert_allclose(large.states[0], np.tile(small.states[0], 2), rtol=1e-10)
    np.testing.assert_allclose(large.gradient[0], 2 * small.gradient[0], rtol=1e-9)


def row(name: str, samples: list[float], temporary: int = 1000) -> results.Row:
    median = float(np.median(samples))
    return results.Row(
        "steps", "Lorenz", 8, name, "gradient", median, samples=samples, temporary_bytes=temporary
    )


def test_compare_tells_what_moved_and_nothing_else() -> None:
    before = [
        row("same", [1.0, 1.1, 1.2]),
        row("noisy", [1.0, 1.5, 2.0]),
        row("slightly slower", [1.0, 1.01, 1.02]),
        row("slower", [1.0, 1.1, 1.2]),
        row("faster", [1.0, 1.1, 1.2]),
        row("larger", [1.0, 1.1, 1.2]),
        row("gone", [1.0]),
    ]
    after = [
        row("same", [1.1, 1.1, 1.2]),
        row("noisy", [1.4, 2.4, 3.0]),
        row("slightly slower", [1.03, 1.04, 1.05]),
        row("slower", [2.0, 2.2, 2.4]),
        row("faster", [0.5, 0.55, 0.6]),
        row("larger", [1.0, 1.1, 1.2], 2000),
        row("new", [1.0]),
    ]
    told = compare.moved(results.Report({}, before), results.Report({}, after))
    assert told == [
        "slower, 2.00 times, 1.1 s to 2.2 s: steps: Lorenz, 8, slower",
        "faster, 2.00 times, 1.1 s to 550 ms: steps: Lorenz, 8, faster",
        "larger, 1 kB to 2 kB: steps: Lorenz, 8, larger",
        "gone: steps: Lorenz, 8, gone",
        "new: steps: Lorenz, 8, new",
    ]
    assert compare.moved(results.Report({}, before), results.Report({}, before)) == []


def test_curves_are_matched_by_achieved_error() -> None:
    curve = [replace(row("a", [s]), error=e) for s, e in ((1.0, 1e-3), (4.0, 1e-7))]
    assert tables.at_error(curve, 1e-5) == pytest.approx(2.0)  # half way, in logarithms
    assert tables.at_error(curve, 1e-8) is None


def test_growth_laws_are_measured() -> None:
    def rows(power: float) -> list[results.Row]:
        made = [
            replace(row(OURS, [1e-6 * x**power]), x=x, section="ensemble size")
            for x in (16, 4096, 16384, 131072)
        ]
        return [replace(made[0], seconds=1.0), *made[1:], replace(made[1], seconds=math.nan)]

    for power, holds in ((1.0, True), (1.1, True), (1.3, False)):
        (law,) = report.laws(results.Report({}, rows(power)))
        assert law["measured"] == pytest.approx(power, abs=2e-3) and law["holds"] is holds
        verdict = "| holds |" if holds else "| **does not hold** |"
        assert verdict in tables.law_table(results.Report({}, laws=[law]))


def test_quick_report(tmp_path: Path) -> None:
    """As one calls it: numbers, tables and figures, which can be read, drawn and compared again."""

    def bench(*words: str) -> str:
        command = [sys.executable, "-m", "bench", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    bench("report", "--quick", "--output", str(tmp_path))
    made = results.read(tmp_path / "report.json")
    assert not made.wrong and {"cpu", "commit", "jax", "pykernels"} <= set(made.setting)
    assert {row.section for row in made.rows} >= {"ensemble size", "work and precision", "steps", "problems"}
    for one in made.rows:
        assert one.seconds > 0 and len(one.samples) == 4 and one.error is not None
        assert (one.gradient_error is not None) == (one.kind == "gradient")
    page = (tmp_path / "report.md").read_text()
    for name in figures.FIGURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in page
    path = str(tmp_path / "report.json")
    assert bench("compare", path, path) == ""


@pytest.mark.parametrize("name", ["Lorenz", "Lotka-Volterra", "SIR", "Kepler", "stiff"])
def test_fields_written_again_are_the_registered_ones(name: str) -> None:
    """Solved by others, with gradients where a field comes with its pullback."""
    problem = cases.PROBLEMS[name](4)
    for rival, gradient in (("SciPy", False), ("C++ by hand", False), ("C++ by hand", True)):
        if rivals.RIVALS[rival].enters(problem, gradient):
            try:
                made = rivals.RIVALS[rival].build(problem, gradient)
            except rivals.Unavailable:  # no compiler
                continue
            assert reference.errors(problem, made.run())[2] is None, (rival, gradient)


@pytest.mark.parametrize("name", cases.PROBLEMS)
def test_registered_problems(name: str) -> None:
    """Every size has its inputs, and one field function is not used twice."""
    problem = cases.PROBLEMS[name](4)
    y0s, args = problem.arrays()
    assert problem.field() is not problem.field()
    axes = (None, None if problem.alone else 0, None if problem.alone or problem.shared_args else 0)
    field = problem.field() if problem.alone else jax.vmap(problem.field(), in_axes=axes)
    slope = jax.eval_shape(lambda y0s, args: field(0.5, y0s, args), y0s, args)
    assert jax.tree.map(np.shape, slope) == jax.tree.map(np.shape, y0s)
