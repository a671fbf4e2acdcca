"""The step kernels of the array plan on one large state: against the bandwidth of a copy, and against plain JAX.

    python bench/step_kernels.py [--columns 4000000] [--dtype float32] [--sizes]        (a minute)

Every pass is a compiled function of its own whose results take the memory of the results before, as in a solve, where XLA's
buffers are used again and again. (In a compiled loop XLA would move what does not change out of it.) Native and plain are
interleaved with the copy; figures are medians. "Of a copy": the bytes that a pass must move (each operand read once, each
result written once) per second, over those of the fastest of three copies on all cores.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk
from pykernels import primitives
from pykernels.kernels import cpu

PASSES_PER_CALL = 10
REPEATS = 15


class Case(NamedTuple):
    """A pass: `run(previous, y, others, h, runner)` gives its result, for which there is the previous one's memory, and what
    it has per row; the arrays it reads besides y; and those it reads and writes in all."""

    name: str
    others: int
    run: Callable[[Any, Any, Sequence[Any], Any, str], tuple[Any, Any]]
    moved: int


def stage(slopes: int) -> Case:
    weights = [0.1 * (j + 1) for j in range(slopes)]

    def run(previous: Any, y: Any, others: Sequence[Any], h: Any, runner: str) -> tuple[Any, Any]:
        return primitives.rk_stage(y, others, h, weights, runner=runner), h

    return Case(f"rk_stage, {slopes} slopes", slopes, run, slopes + 2)


def last_stage() -> Case:
    """The pass that also sums the known part of the error."""
    b, e = pk.tsit5.b[:6], pk.tsit5.error[:6]

    def run(previous: Any, y: Any, others: Sequence[Any], h: Any, runner: str) -> tuple[Any, Any]:
        return primitives.rk_stage(y, others, h, b, e, runner=runner), h

    return Case("rk_stage, 6 slopes and error", 6, run, 9)


def finish(slopes: int) -> Case:
    """New state, error and norm of a method that is not FSAL."""
    weights, errors = [0.1] * slopes, [0.01 * (-1) ** j for j in range(slopes)]

    def run(previous: Any, y: Any, others: Sequence[Any], h: Any, runner: str) -> tuple[Any, Any]:
        new, total = primitives.rk_finish(y, others, h, weights, errors, 1e-3, 1e-6, runner=runner)
        return new, h + 0 * total

    return Case(f"rk_finish, {slopes} slopes", slopes, run, slopes + 2)


def fsal_finish() -> Case:
    """Norm alone: new state and the error's other parts are known."""

    def run(previous: Any, y: Any, others: Sequence[Any], h: Any, runner: str) -> tuple[Any, Any]:
        new, error, slope = others
        _, total = primitives.rk_finish(
            y, [slope], h, None, [0.1], 1e-3, 1e-6, new=new, error=error, runner=runner
        )
        return previous, h + 0 * total

    return Case("rk_finish, FSAL", 3, run, 4)


def accept() -> Case:
    def run(previous: Any, y: Any, others: Sequence[Any], h: Any, runner: str) -> tuple[Any, Any]:
        (new,) = others
        return primitives.rk_accept([previous], [new], h > 0, runner=runner)[0], h

    return Case("rk_accept", 1, run, 2)


CASES = [stage(1), stage(2), stage(3), stage(4), stage(5), last_stage(), fsal_finish(), finish(7), accept()]


def program(case: Case, runner: str, y: Any, others: Sequence[Any], h: Any) -> Callable[[], None]:
    """The pass, several times; the memory of a result is the next one's."""

    def once(previous: Any, y: Any, others: Sequence[Any], h: Any) -> Any:
        return case.run(jax.tree.leaves(previous)[0], y, others, h, runner)[:2]

    compiled = jax.jit(once, donate_argnums=0, keep_unused=True)
    state = [jax.tree.map(jnp.copy, jax.jit(once)(y, y, others, h))]

    def repeated() -> None:
        for _ in range(PASSES_PER_CALL):
            state[0] = compiled(state[0], y, others, h)
        jax.block_until_ready(state[0])

    return repeated


def copies(columns: int, dtype: Any, threads: int) -> dict[str, Callable[[], None]]:
    """Ways to copy an array on all cores."""
    source, target = np.ones(columns, dtype), np.ones(columns, dtype)
    size = source.nbytes // threads
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def on_threads(part: Callable[[int], Any]) -> Callable[[], None]:
        def copy() -> None:
            others = [threading.Thread(target=part, args=(i,)) for i in range(1, threads)]
            for thread in others:
                thread.start()
            part(0)
            for thread in others:
                thread.join()

        return copy

    def repeatedly(i: int) -> None:
        for _ in range(PASSES_PER_CALL):
            libc.memcpy(target.ctypes.data + i * size, source.ctypes.data + i * size, size)

    def by_numpy(i: int) -> None:
        part = slice(i * columns // threads, (i + 1) * columns // threads)
        for _ in range(PASSES_PER_CALL):
            np.copyto(target[part], source[part])

    def alone() -> None:
        for _ in range(PASSES_PER_CALL):
            np.copyto(target, source)

    return {"memcpy": on_threads(repeatedly), "numpy": on_threads(by_numpy), "one thread": alone}


def check(case: Case, y: Any, others: Sequence[Any], h: Any) -> None:
    """Both runners' results agree to rounding before anything is timed."""
    results = [jax.jit(lambda *x, r=r: case.run(x[0], *x, r))(y, others, h) for r in ("native", "xla")]
    eps = float(jnp.finfo(y.dtype).eps)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=32 * eps, atol=32 * eps)


def measure(
    case: Case, arrays: Sequence[Any], h: Any, extra: dict[str, Callable[[], None]]
) -> dict[str, float]:
    """Median seconds per pass of both runners, and of what else is to be run between them."""
    y, others = arrays[0], arrays[1 : 1 + case.others]
    check(case, y, others, h)
    runs = {runner: program(case, runner, y, others, h) for runner in ("native", "xla")} | extra
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat > 0:
                samples[name].append((time.perf_counter() - start) / PASSES_PER_CALL)
    return {name: statistics.median(found) for name, found in samples.items()}


def inputs(rows: int, columns: int, dtype: Any) -> tuple[list[Any], Any]:
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(rows, columns)), dtype) for _ in range(8)]
    return arrays, jnp.full(rows, 1e-3, dtype)


def one_size(rows: int, columns: int, dtype: Any, only: str) -> None:
    arrays, h = inputs(rows, columns, dtype)
    size, rates = arrays[0].nbytes, copies(rows * columns, dtype, _cores())
    print(f"{rows} x {columns} {dtype}, {_cores()} cores")
    print(f"{'':30s} {'native':>9s} {'plain':>9s} {'plain/native':>13s} {'GB/s':>7s} {'of a copy':>10s}")
    for case in CASES:
        if only not in case.name:
            continue
        times = measure(case, arrays, h, rates)
        copy = 2 * size / min(times[name] for name in rates)
        rate = case.moved * size / times["native"]
        print(
            f"{case.name:30s} {times['native'] * 1e3:6.2f} ms {times['xla'] * 1e3:6.2f} ms "
            f"{times['xla'] / times['native']:12.2f}x {rate / 1e9:7.1f} {rate / copy:9.0%}   (copy {copy / 1e9:.1f} GB/s)"
        )


SIZES = [(1, 1 << k) for k in range(10, 22, 2)]
SIZES += [(n // c, c) for n, c in [(1 << 20, c) for c in (32, 33, 64, 100, 128, 300, 1000, 2000, 2048, 5000)]]


def many_sizes(dtype: Any, only: str) -> None:
    """Where kernels begin to pay: the thresholds of kernels/columns.py."""
    chosen = [case for case in (stage(2), last_stage(), fsal_finish()) if only in case.name]
    print(f"{'plain/native':18s} {'kB per array':>12s} " + " ".join(f"{case.name:>28s}" for case in chosen))
    for rows, columns in SIZES:
        arrays, h = inputs(rows, columns, dtype)
        found = [measure(case, arrays, h, {}) for case in chosen]
        cells = [f"{t['xla'] / t['native']:13.2f}x {t['native'] * 1e6:10.0f} us" for t in found]
        print(
            f"{rows:8d} x {columns:7d} {arrays[0].nbytes / 1024:12.0f} "
            + " ".join(f"{c:>28s}" for c in cells)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--columns", type=int, default=4_000_000)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--sizes", action="store_true", help="many sizes instead: where kernels begin to pay")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    reason = cpu.unavailable()
    if reason is not None:
        sys.exit(f"no native runner: {reason}")
    dtype = np.dtype(options.dtype)
    if options.sizes:
        many_sizes(dtype, options.only)
    else:
        one_size(options.rows, options.columns, dtype, options.only)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
