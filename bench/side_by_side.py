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
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pykernels as pk
from pykernels.kernels import cpu

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.cases import Case, Problem, lorenz, selected
from bench.rivals import Program, diffrax_program, disagreement, pykernels_program
from bench.timing import LONG_SECONDS, in_bytes, in_seconds, interleaved, setting, timed

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
    first_seconds, result = timed(ours.run)
    again = timed(ours.run)[0] if first_seconds < LONG_SECONDS else first_seconds
    # Native code is compiled beside XLA's, and waited for by the first run.
    waited = max(first_seconds - again, 0.0)
    first_seconds = again
    theirs, label, their_seconds, their_result = _best_diffrax(case)
    reason = disagreement(case, result, their_result)
    if reason is not None:
        raise Disagreement(reason)
    if case.compile_only:
        return _compile_line(case, config, (ours, theirs), repeats)
    samples = interleaved((ours.run, theirs.run), (first_seconds, their_seconds), repeats)
    here, there = statistics.median(samples[0]), statistics.median(samples[1])
    return _row(
        case.name, in_seconds(here), in_seconds(there) + label, there / here, _floor(case, config),
        in_seconds(ours.compile_seconds + waited),
        in_seconds(theirs.compile_seconds), in_bytes(ours.temporary_bytes), in_bytes(theirs.temporary_bytes),
    )  # fmt: skip


def _best_diffrax(case: Case) -> tuple[Program, str, float, Any]:
    """diffrax at its fastest checkpoint setting: the program, the setting, its second run's time and its result."""
    best = None
    for checkpoints in case.checkpoints if case.gradient else (None,):
        program = diffrax_program(case.problem, case.gradient, checkpoints)
        seconds, result = timed(program.run)
        if seconds < LONG_SECONDS:
            seconds, result = timed(program.run)
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
        samples[0].append(made.compile_seconds + timed(made.run)[0])
        made = diffrax_program(case.problem, case.gradient)
        samples[1].append(made.compile_seconds + timed(made.run)[0])
    here, there = statistics.median(samples[0]), statistics.median(samples[1])
    sizes = [in_bytes(program.temporary_bytes) for program in programs]
    return _row(
        case.name, "", "", there / here, _floor(case, config), in_seconds(here), in_seconds(there), *sizes
    )


def _floor(case: Case, config: pk.Config) -> float:
    return case.floor if config.runner == "xla" or cpu.unavailable() is not None else case.native_floor


def _row(name: str, here: str, there: str, ratio: float, floor: float, *cells: str) -> str:
    return f"| {' | '.join((name, here, there, f'{ratio:.3g}', f'{floor:g}', *cells))} |"


def _warm_up() -> None:
    """The first program of a process pays for things that are no program's own."""
    problem = Problem(lorenz, lambda: (np.ones((2, 3)), np.ones((2, 3))), "float64", t1=0.1)
    for gradient in (False, True):
        pykernels_program(problem, gradient).run()
        diffrax_program(problem, gradient).run()


def _setting(config: pk.Config) -> str:
    here = setting(("pykernels", "diffrax", "jax", "jaxlib", "numpy"))
    versions = ", ".join(
        f"{name} {here[name]}" for name in ("pykernels", "diffrax", "jax", "jaxlib", "numpy")
    )
    return (
        f"{versions}, Python {here['python']}; {here['cpu']}, {here['cores']} cores, "
        f"load {here['load']} at the start; device {jax.devices()[0].platform}, "
        f"runner {config.runner or ('native' if cpu.unavailable() is None else 'xla')}"
    )


if __name__ == "__main__":
    sys.exit(main())
