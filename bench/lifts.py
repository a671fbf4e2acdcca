"""The two lifts of a field against each other, from which `solve.py` takes the sizes at which it changes over.

    python bench/lifts.py        (some minutes)

Per field: its operations and state elements, and for either lift the compile time and the median run of the forward
solve (float32) and of the gradient (float64) of 1,024 trajectories. The last column is the default's choice.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax

import pykernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cases import Problem, dense, dense_inputs, lorenz, lorenz_inputs
from bench.rivals import Program, pykernels_program

TRAJECTORIES = 1_024
PROBLEMS = {
    "Lorenz": Problem(lorenz, lambda: lorenz_inputs(TRAJECTORIES), "float32", t1=1.0, atol=1e-9),
    **{
        f"{n} dense states": Problem(
            dense(n), lambda n=n: dense_inputs(n, TRAJECTORIES), "float32", t1=1.0, atol=1e-9
        )
        for n in (2, 3, 4, 6, 8)  # beyond, components take minutes to compile
    },
}
LIFTS = ("components", "arrays")


def main() -> None:
    titles = [f"{what}, {lift}" for what in ("forward", "gradient") for lift in LIFTS]
    print(f"| field | operations | elements | {' | '.join(titles)} | choice |")
    print("| --- " * (len(titles) + 4) + "|")
    for name, problem in PROBLEMS.items():
        y0s, args = problem.arrays()
        chosen = pk.explain(problem.field(), y0s, 0.0, problem.end, args, in_axes=(0, 0))
        cells = [
            _figures(pykernels_program(replace(problem, dtype=dtype), gradient, pk.Config(lift=lift)))
            for dtype, gradient in (("float32", False), ("float64", True))
            for lift in LIFTS
        ]
        elements = y0s.size // TRAJECTORIES
        print(
            f"| {name} | {chosen.operations} | {elements} | {' | '.join(cells)} | {chosen.lift} |", flush=True
        )


def _figures(program: Program) -> str:
    program.run()
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        program.run()
        samples.append(time.perf_counter() - start)
    return f"{statistics.median(samples) * 1e3:.3g} ms, compile {program.compile_seconds:.2g} s"


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
