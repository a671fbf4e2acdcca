"""The benchmark for GPUs, rehearsed on the CPU: it runs, and what is wrong, or late, gets no time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from pykernels.kernels import cpu

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"
LANES = 16
RUNNER = "native" if cpu.unavailable() is None else "xla"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rehearsal(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--alone", "--runners", RUNNER, "--output", output,
         "--only", "suite sir", "lorenz 64"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "Numerical suite: 2 right, 0 wrong, 0 skipped." in done.stdout
        and "| lorenz 64 | float64 | gradient |" in done.stdout
    )
    report = json.loads(output.read_text())
    assert report["finished"] and not report["skipped"]
    assert [(row["dtype"], row["kind"]) for row in report["rows"]] == [
        (dtype, kind) for dtype in ("float32", "float64") for kind in ("gradient", "value")
    ]
    for row in report["rows"]:
        assert row["reason"] is None and row["median_seconds"] > 0 and row["compile_seconds"] > 0
    for row in report["suite"]:
        assert row["reason"] is None and row["error"] < (1e-10 if row["dtype"] == "float64" else 1e-4)


def entrants_of(gpu: ModuleType, changes: dict[str, Any]) -> list[Any]:
    """One program under several names, each with the results changed in its own way."""
    built: list[Any] = []

    def entrant(name: str, change: Any) -> Any:
        def build(ensemble: Any, dtype: str, gradient: bool) -> Any:
            if not built:
                built.append(gpu.pykernels(RUNNER).build(ensemble, dtype, gradient))
            (program,) = built
            return dataclasses.replace(program, run=lambda: change(jax.tree.map(np.array, program.run())))

        return gpu.Entrant(f"pykernels {name}", build)

    return [entrant(name, change) for name, change in changes.items()]


def _right(result: Any) -> Any:
    return result


def _wrong_gradient(result: Any) -> Any:
    value, (own, shared) = result
    own[3, 1] *= 1 + 1e-6
    return value, (own, shared)


def _wrong_state(result: Any) -> Any:
    result[0][1][0][5, 0] += 1e-6
    return result


def _not_finite(result: Any) -> Any:
    result[0][1][0][LANES - 1, 2] = np.nan
    return result


def _wrong_loss(result: Any) -> Any:
    (loss, rest), gradient = result
    return (loss * 1.01, rest), gradient


def _other_steps(result: Any) -> Any:
    result[0][1][1][0] += 1
    return result


def _breaks(result: Any) -> Any:
    raise MemoryError("out of memory\nand a long story")


WRONG = {
    "gradient": (_wrong_gradient, "own: error"),
    "state": (_wrong_state, "states: error"),
    "not finite": (_not_finite, "states: not finite"),
    "loss": (_wrong_loss, "the loss"),
    "steps": (_other_steps, "attempts, the reference made"),
    "breaks": (_breaks, "MemoryError: out of memory"),
}


def test_what_is_wrong_gets_no_time(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """One small error in one number is enough, and only the entrant that made it loses its time."""
    entrants = entrants_of(
        gpu, {"right": _right} | {f"wrong {name}": wrong for name, (wrong, _) in WRONG.items()}
    )
    case = gpu.Case("lorenz", gpu.lorenz, LANES, "float64", True, entrants)
    report, references = gpu.Report({}), gpu.References()
    gpu.measure(case, report, gpu.Budget(600.0), references)
    right, *wrong = report.rows
    assert right.reason is None and right.median_seconds > 0
    printed = capsys.readouterr().out
    for row, (name, (_, reason)) in zip(wrong, WRONG.items(), strict=True):
        assert row.median_seconds is None and reason in row.reason, name
        assert row.reason in printed
        (line,) = (line for line in gpu.table(report).splitlines() if row.entrant in line)
        assert f"| none: {row.reason} |" in line
    assert report.wrong() == wrong

    # A wrong reference is as good a reason to distrust a time.
    exact = references.ask(case).result().exact
    exact.own[0] = exact.own[0] * (1 + 1e-6)
    again = gpu.Report({})
    gpu.measure(dataclasses.replace(case, entrants=entrants[:1]), again, gpu.Budget(600.0), references)
    assert again.rows[0].median_seconds is None and "own: error" in again.rows[0].reason
    references.close()


def test_what_is_late_is_skipped(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    case = gpu.Case("lorenz", gpu.lorenz, LANES, "float64", True, entrants_of(gpu, {"right": _right}))
    report, references = gpu.Report({}), gpu.References()
    gpu.measure(case, report, gpu.Budget(0.0), references)
    assert report.rows == [] and report.skipped == [str(case)]
    assert f"skipped, the time is up: {case}" in capsys.readouterr().out
    assert f"Skipped: {case}." in gpu.table(report)
    # The longest of an entrant's programs so far says what another one may take.
    budget = gpu.Budget(600.0)
    budget.part(0.5).took("slow", 601.0)
    assert budget.allows("quick") and not budget.allows("slow")


@pytest.mark.parametrize("name", ["lorenz", "divergent", "coupled"])
def test_smaller_ensembles_are_the_first_of_larger_ones(gpu: ModuleType, name: str) -> None:
    """A reference for the first trajectories serves all sizes; where arguments are shared, all trajectories are solved."""
    made = [case for case in gpu.cases(["native"], rehearse=False, alone=True) if case.family == name]
    assert len({case.lanes for case in made}) == {"lorenz": 6, "divergent": 2, "coupled": 1}[name]
    for case in made:
        assert case.shared == bool(jax.tree.leaves(case.make(2).shared))
        if not case.shared:
            few, many = case.make(8), case.make(16)
            for a, b in zip(
                jax.tree.leaves((few.y0s, few.own)), jax.tree.leaves((many.y0s, many.own)), strict=True
            ):
                np.testing.assert_array_equal(a, b[:8])
