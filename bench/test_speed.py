"""The cases of `cases.py` under pytest-benchmark, one library at a time, for the history of one's own figures.

    python -m pytest bench --benchmark-autosave     (-k "gradient and Lorenz" for some; --quick for a smoke test)

Ratios for the README come from `side_by_side.py`, which interleaves the two and tunes diffrax's checkpoints.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case
from bench.rivals import Program, diffrax_program, disagreement, pykernels_program


@pytest.fixture(scope="module")
def programs(case: Case) -> dict[str, Program]:
    """Both libraries' programs of a case, their answers compared."""
    made = {
        "pykernels": pykernels_program(case.problem, case.gradient),
        "diffrax": diffrax_program(case.problem, case.gradient),
    }
    reason = disagreement(case, made["pykernels"].run(), made["diffrax"].run())
    assert reason is None, reason
    return made


@pytest.mark.parametrize("library", ["pykernels", "diffrax"])
def test_speed(benchmark: BenchmarkFixture, programs: dict[str, Program], case: Case, library: str) -> None:
    benchmark.group = case.name
    program = programs[library]
    benchmark.extra_info |= {
        "compile_seconds": program.compile_seconds,
        "temporary_bytes": program.temporary_bytes,
    }
    if case.compile_only:
        make = pykernels_program if library == "pykernels" else diffrax_program
        benchmark.pedantic(make, (case.problem, case.gradient), rounds=3)
    else:
        benchmark.pedantic(program.run, rounds=5, warmup_rounds=1)
