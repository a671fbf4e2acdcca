"""pykernels against diffrax in one run: prints the README's table.

    python bench/side_by_side.py                  all cases, about eight minutes on two cores
    python bench/side_by_side.py --runner xla     the portable runner instead of the platform's default
    python bench/side_by_side.py --only gradient  the cases whose name contains "gradient"
    python bench/side_by_side.py --quick          a smoke test at tiny sizes, no figures worth keeping

Repeats of the two libraries are interleaved and the medians compared. A case whose two answers do not agree prints a line on
stderr and no figures, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cases import Case, Problem, Program, diffrax_program, disagreement, lorenz, pykernels_program, selected

import pykernels as pk
from pykernels.kernels import cpu

# Short runs are repeated within one sample until it takes this long, long ones are not repeated beyond the first.
SAMPLE_SECONDS = 0.02
LONG_SECONDS = 10.0
HEADER = (
    "| case | pykernels | diffrax | ratio | floor | compile | diffrax compile | temporaries | diffrax temporaries |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each library (default 5)")
    parser.add_argument(
        "--runner", choices=["native", "xla"], help="pykernels' runner (default: the platform's)"
    )
    options = parser.parse_args()
    config = pk.Config(runner=options.runner)
    # Compile times are those of a first run.
    cpu.compiler.cache = cpu.DiskCache(None)
    chosen = selected(options.only, options.quick)
    if not chosen:
        parser.error(f"no case's name contains {options.only!r}")
    jax.config.update("jax_enable_compilation_cache", False)
    print(_setting(config), HEADER, sep="\n\n", flush=True)
    _warm_up()
    failed = 0
    for case in chosen:
        try:
            print(_line(case, config, 1 if options.quick else options.repeats), flush=True)
        except Disagreement as error:
            print(f"{case.name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    if options.quick:
        print("\nSMALL: the case at a tiny size; a smoke test and no measurement.")
    return 1 if failed else 0


class Disagreement(Exception):
    """The two libraries' answers differ, so that their times must not be compared."""


def _line(case: Case, config: pk.Config, repeats: int) -> str:
    ours = pykernels_program(case.problem, case.gradient, config)
    first_seconds, result = _timed(ours.run)
    again = _timed(ours.run)[0] if first_seconds < LONG_SECONDS else first_seconds
    # Native code is compiled beside XLA's, and waited for by the first run.
    waited = max(first_seconds - again, 0.0)
    first_seconds = again
    theirs, label, their_seconds, their_result = _best_diffrax(case)
    reason = disagreement(case, result, their_result)
    if reason is not None:
        raise Disagreement(reason)
    if case.compile_only:
        return _compile_line(case, config, (ours, theirs), repeats)
    samples: tuple[list[float], list[float]] = ([], [])
    firsts = (first_seconds, their_seconds)
    for _ in range(repeats):
        for program, seconds, mine in zip((ours, theirs), firsts, samples, strict=True):
            if seconds > LONG_SECONDS:
                mine[:] = [seconds]
            else:
                mine.append(_sample(program.run, seconds))
    here, there = statistics.median(samples[0]), statistics.median(samples[1])
    return _row(
        case.name, _time(here), _time(there) + label, there / here, _floor(case, config),
        _time(ours.compile_seconds + waited),
        _time(theirs.compile_seconds), _bytes(ours.temporary_bytes), _bytes(theirs.temporary_bytes),
    )  # fmt: skip


def _best_diffrax(case: Case) -> tuple[Program, str, float, Any]:
    """diffrax at its fastest checkpoint setting: the program, the setting, its second run's time and its result."""
    best = None
    for checkpoints in case.checkpoints if case.gradient else (None,):
        program = diffrax_program(case.problem, case.gradient, checkpoints)
        seconds, result = _timed(program.run)
        if seconds < LONG_SECONDS:
            seconds, result = _timed(program.run)
        if best is None or seconds < best[2]:
            tried = case.gradient and len(case.checkpoints) > 1
            label = f" ({'default' if checkpoints is None else checkpoints} checkpoints)" if tried else ""
            best = program, label, seconds, result
    assert best is not None
    return best


def _compile_line(case: Case, config: pk.Config, programs: tuple[Program, Program], repeats: int) -> str:
    """Compile times alone, with the first run: of new programs, these sizes being small."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(min(repeats, 3)):
        made = pykernels_program(case.problem, case.gradient, config)
        samples[0].append(made.compile_seconds + _timed(made.run)[0])
        made = diffrax_program(case.problem, case.gradient)
        samples[1].append(made.compile_seconds + _timed(made.run)[0])
    here, there = statistics.median(samples[0]), statistics.median(samples[1])
    sizes = [_bytes(program.temporary_bytes) for program in programs]
    return _row(case.name, "", "", there / here, _floor(case, config), _time(here), _time(there), *sizes)


def _floor(case: Case, config: pk.Config) -> float:
    return case.floor if config.runner == "xla" or cpu.unavailable() is not None else case.native_floor


def _row(name: str, here: str, there: str, ratio: float, floor: float, *cells: str) -> str:
    return f"| {' | '.join((name, here, there, f'{ratio:.3g}', f'{floor:g}', *cells))} |"


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _sample(run: Callable[[], Any], seconds: float) -> float:
    """Seconds per run, over enough runs for the clock."""
    runs = max(1, round(SAMPLE_SECONDS / seconds))
    start = time.perf_counter()
    for _ in range(runs):
        run()
    return (time.perf_counter() - start) / runs


def _warm_up() -> None:
    """The first program of a process pays for things that are no program's own."""
    problem = Problem(lorenz, lambda: (np.ones((2, 3)), np.ones((2, 3))), "float64", t1=0.1)
    for gradient in (False, True):
        pykernels_program(problem, gradient).run()
        diffrax_program(problem, gradient).run()


def _setting(config: pk.Config) -> str:
    names = ("pykernels", "diffrax", "jax", "jaxlib", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{versions}, Python {platform.python_version()}; {_cpu()}, {os.cpu_count()} cores, "
        f"load {load:.1f} at the start; device {jax.devices()[0].platform}, "
        f"runner {config.runner or ('native' if cpu.unavailable() is None else 'xla')}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _time(seconds: float) -> str:
    return _in_units(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def _bytes(count: int) -> str:
    return _in_units(count, (("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _in_units(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """In the first unit of which it is at least one, else in the last."""
    unit, scale = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / scale:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main())
