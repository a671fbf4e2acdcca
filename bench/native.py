"""The native runner's own figures: one thread against two on trajectories of very different lengths, the time from tracing
to machine code in a first and in a second process, and its gradient against gradsolve's.

    python bench/native.py        (two minutes; gradsolve's line needs `pip install gradsolve`)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk
from pykernels.kernels import cpu
from pykernels.kernels.body import Kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cases import FIRST_STEP, Problem, dense, dense_inputs, lorenz, lorenz_inputs
from bench.rivals import Unavailable, gradsolve_program, pykernels_program
from bench.timing import timed

REPEATS = 9
COMPILED = {
    "Lorenz": (lorenz, lambda: lorenz_inputs(64)),
    "12 dense states": (dense(12), lambda: dense_inputs(12, 64)),
    "24 dense states": (dense(24), lambda: dense_inputs(24, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", nargs=2, metavar=("CASE", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.compile:
        print(*compile_times(*options.compile))
        return
    reason = cpu.unavailable()
    if reason is not None:
        sys.exit(f"no native runner: {reason}")
    threads()
    for name in COMPILED:
        processes(name)
    gradsolve()


def median(run: Callable[[], Any]) -> float:
    samples = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def threads() -> None:
    """Harmonic oscillators whose frequencies, and so their numbers of steps, spread twentyfold."""
    lanes = 16_384
    rng = np.random.default_rng(0)
    omega = jnp.asarray(rng.permutation(np.geomspace(1.0, 20.0, lanes)))
    y0s = jnp.tile(jnp.asarray([1.0, 0.0]), (lanes, 1))
    seen: list[Any] = []

    class Spy(pk.ForwardOnly):
        def integrate(self, solve: Any, inputs: Any) -> Any:
            seen.append((solve, inputs))
            return super().integrate(solve, inputs)

    sols = pk.solve_ensemble(
        lambda t, y, w: jnp.stack([w * y[1], -w * y[0]]), y0s, 0.0, 30.0, omega, in_axes=(0, 0),
        step=pk.Adaptive(1e-6, 1e-6), dt0=FIRST_STEP, adjoint=Spy(),
    )  # fmt: skip
    np.testing.assert_allclose(sols.ys[:, 0], np.cos(30 * np.asarray(omega)), atol=1e-2)
    ((solve, inputs),) = seen
    run, operands = cpu.standalone(Kernel(solve, None), lanes), [np.asarray(x) for x in inputs]
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):  # interleaved: the machine's speed changes
        for number, mine in zip((1, 2), samples, strict=True):
            mine.append(timed(lambda number=number: run(operands, number))[0])
    one, two = map(statistics.median, samples)
    attempts = np.asarray(sols.stats.attempts)
    print(
        f"16,384 trajectories of {attempts.min()} to {attempts.max()} attempts: one thread {one * 1e3:.1f} ms, "
        f"two {two * 1e3:.1f} ms, ratio {one / two:.2f} (floor 1.8)"
    )


def compile_times(name: str, cache: str) -> tuple[float, float, int]:
    """Seconds of tracing and emitting (with JAX's own lowering), of waiting for machine code beyond XLA's compilation, and
    how many kernels were compiled."""
    cpu.compiler.cache = cpu.DiskCache(cpu.Path(cache))
    field, inputs = COMPILED[name]
    problem = Problem(field, inputs, "float64", t1=1.0, atol=1e-9)
    y0s, args = problem.arrays()
    function = problem.field()

    def loss(args: Any) -> Any:
        step = pk.Adaptive(problem.rtol, problem.atol)
        sols = pk.solve_ensemble(function, y0s, 0.0, 1.0, args, in_axes=(0, 0), step=step, dt0=FIRST_STEP)
        return jnp.sum(sols.ys**2)

    jax.block_until_ready(jnp.sum(jnp.ones(3)))
    start = time.perf_counter()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(args)
    traced = time.perf_counter() - start
    program = lowered.compile()
    start = time.perf_counter()
    jax.block_until_ready(program(args))
    return traced, time.perf_counter() - start, cpu.compiler.compiled


def processes(name: str) -> None:
    """The same in new processes: with an empty cache on disk, and with the one that left behind."""
    firsts, seconds = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            for times in (firsts, seconds):
                done = subprocess.run(
                    [sys.executable, __file__, "--compile", name, cache],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                traced, waited, compiled = done.stdout.split()[-3:]
                assert int(compiled) == (2 if times is firsts else 0)
                times.append(float(traced) + float(waited))
    print(
        f"{name}, value and gradient, tracing to machine code beside XLA: first process "
        f"{statistics.median(firsts):.2f} s, second process {statistics.median(seconds):.2f} s"
    )


def gradsolve() -> None:
    problem = Problem(lorenz, lambda: lorenz_inputs(8_192), "float64", t1=1.0, atol=1e-9)
    try:
        theirs = gradsolve_program(problem, gradient=True)
    except Unavailable as why:
        print(why)
        return
    ours = pykernels_program(problem, gradient=True)
    (_, gradient), (_, their_gradient) = ours.run(), theirs.run()
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-3, atol=1e-3 * np.max(np.abs(gradient)))
    there, here = median(theirs.run), median(ours.run)
    print(
        f"8,192 Lorenz trajectories, value and gradient, float64: {here * 1e3:.1f} ms; gradsolve {there * 1e3:.0f} ms and "
        f"{theirs.overhead * 1e3:.0f} ms of recording, ratio {(there + theirs.overhead) / here:.0f} (floor 100)"
    )


if __name__ == "__main__":
    main()
