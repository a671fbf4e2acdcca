"""The report: all `entries`, checked, timed, and written as JSON, Markdown and figures.

An entry is a problem at one size, solved by several rivals in one process, in turns. A row exists only for a program whose
states and gradient agree with the reference; what is wrong is named on stderr and in the JSON's `wrong`, without figures.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import figures, tables
from bench.cases import PROBLEMS, Problem
from bench.reference import errors
from bench.results import Report, Row, spread, write
from bench.rivals import RIVALS, Program, Rival, Unavailable
from bench.timing import interleaved, peak_bytes, setting, timed
from pykernels.kernels import cpu

PACKAGES = (
    "pykernels", "diffrax", "jax", "jaxlib", "numpy", "llvmlite", "gradsolve", "scipy", "torch", "torchdiffeq", "torchode",
)  # fmt: skip
# Seconds for all of it. No program is started that would probably not end in time.
BUDGET = 570.0
# Turns of each program of an entry, in each of two rounds. A machine's speed drifts, within minutes by more than within the
# second that an entry takes: all entries have their second round when all have had the first.
REPEATS, SAMPLING_SECONDS = 4, 0.8
# A rival that took longer than this for an entry is left out of the larger ones of its series.
SLOW_SECONDS = 2.5

OURS = ("pykernels, native lanes", "pykernels, portable lanes", "pykernels, array plan")
REFERENCE = "pykernels, reference"
JAX = ("lax.scan by hand, RK4", "diffrax", "gradsolve", "jax.experimental.ode")
QUICK = ("pykernels, native lanes", "pykernels", "lax.scan by hand, RK4", "SciPy", "C++ by hand")
OTHERS = ("SciPy", "torchdiffeq", "torchode", "C++ by hand")


Series = tuple[str, str, str]  # section, case, rival
Made = tuple[Row, Program, float]  # with the seconds of a run


@dataclass(frozen=True)
class Entry:
    """`x` is what a series of entries varies: trajectories, sites, steps or the tolerance."""

    section: str
    family: str
    x: float
    problem: Problem
    gradient: bool
    rivals: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "gradient" if self.gradient else "forward"

    @property
    def case(self) -> str:
        return f"{self.family}, {self.kind}, {self.problem.dtype}"

    def __str__(self) -> str:
        return f"{self.section}: {self.case}, {self.x:g}"


# What is measured.


def entries(quick: bool) -> list[Entry]:
    """All of it, the more telling first: when the time is up, the others are missed less."""
    made = [*_ensembles(quick), *_precision(quick), *_steps(quick), *_problems(quick)]
    made += [*_limits(quick), *_sites(quick), *_devices(quick), *_planes(quick)]
    if quick:  # others take long to compile
        kept = [tuple(name for name in entry.rivals if name in QUICK) for entry in made]
        made = [replace(entry, rivals=rivals) for entry, rivals in zip(made, kept, strict=True) if rivals]
    return made


@functools.cache
def _problem(name: str, size: int) -> Problem:
    """One object for all entries of a size, so that they share a reference."""
    return PROBLEMS[name](size)


def _ensembles(quick: bool) -> Iterator[Entry]:
    for gradient in (True, False):
        for n in (8,) if quick else (1, 16, 256, 1_024, 4_096, 16_384, 131_072, 1_048_576):
            if n in (8, 1_024):
                rivals = (*OURS, *JAX, *OTHERS)
            elif n == 16_384:
                rivals = (*OURS, "lax.scan by hand, RK4", "diffrax", "C++ by hand")
            elif n in (1, 16):
                rivals = (OURS[0], REFERENCE, *JAX[:2], *OTHERS[:2], OTHERS[-1])
            elif n == 1_048_576:
                rivals = (OURS[0], "C++ by hand")
            else:
                rivals = (OURS[0], "C++ by hand", "lax.scan by hand, RK4")
            # The best of diffrax's checkpoint settings at the size most quoted; elsewhere its default.
            settings = (None, 8, 16, 32, 64) if n == 1_024 and not quick else (None,)
            problem = replace(_problem("Lorenz", n), checkpoints=settings)
            yield Entry("ensemble size", "Lorenz", n, problem, gradient, rivals)


def _precision(quick: bool) -> Iterator[Entry]:
    n = 16 if quick else 1_024
    for gradient in (True,) if quick else (True, False):
        for digits in (5,) if quick else (9, 7, 5):
            problem = replace(
                _problem("Lorenz", n), rtol=10.0**-digits, atol=10.0 ** -(digits + 3), checkpoints=(None,),
                hand_steps=round(24 * 10 ** ((digits - 3) / 4)),  # of fourth order
            )  # fmt: skip
            yield Entry(
                "work and precision", "Lorenz", 10.0**-digits, problem, gradient,
                ("pykernels, native lanes", "lax.scan by hand, RK4", "diffrax", "jax.experimental.ode", "C++ by hand"),
            )  # fmt: skip


def _steps(quick: bool) -> Iterator[Entry]:
    for gradient in (True, False):
        ours = OURS[:2] if gradient else OURS[:1]
        rivals = (*ours, "lax.scan by hand, RK4", "diffrax")
        for n in (64,) if quick else (1_000, 10_000, 100_000, 1_000_000):
            yield Entry("steps", "long horizon", n, _problem("long horizon", n), gradient, rivals)


def _problems(quick: bool) -> Iterator[Entry]:
    sizes = {
        "Lotka-Volterra": (1_024,),
        "SIR": (1_024,),
        "Kepler": (1_024,),
        "12 dense states": (256, 4_096),
        "divergent": (1_024,),
        "neural field": (256, 4_096),
        "reaction-diffusion": (8,) if quick else (256, 4_096),
    }
    for name in list(sizes)[-1:] if quick else sizes:
        for gradient in (False,) if quick else (True, False):
            for n in sizes[name] if gradient else sizes[name][:1]:
                rivals = ("pykernels, native lanes", "lax.scan by hand, RK4", "diffrax", "C++ by hand")
                problem = replace(_problem(name, n), checkpoints=(None,))
                yield Entry("problems", name, n, problem, gradient, rivals)
    for gradient in () if quick else (True, False):
        problem = replace(
            _problem("Lorenz", 1_024), dtype="float32", checkpoints=(None,), rtol=1e-5, atol=1e-5
        )
        rivals = (OURS[0], "lax.scan by hand, RK4", "diffrax")
        yield Entry("problems", "Lorenz", 1_024, problem, gradient, rivals)


def _limits(quick: bool) -> Iterator[Entry]:
    for name, n, gradient, rivals in (
        ("single", 1, False, ("pykernels", "diffrax", "SciPy", "C++ by hand")),
        ("single", 1, True, ("pykernels", "diffrax", "C++ by hand")),
        ("large neural field", 256, True, ("pykernels", "diffrax", "jax.experimental.ode")),
        ("stiff", 16, False, ("pykernels", "diffrax", "diffrax, Kvaerno5", "SciPy")),
    ):
        if not quick or (name, gradient) == ("single", False):
            problem = replace(_problem(name, n), checkpoints=(None,))
            yield Entry("limits", name, n, problem, gradient, rivals)


def _sites(quick: bool) -> Iterator[Entry]:
    for n in (64,) if quick else (1, 64, 1_024, 16_384, 131_072, 1_048_576):
        rivals = ("pykernels", "diffrax")
        yield Entry("state size", "ring", n, replace(_problem("ring", n), checkpoints=(None,)), False, rivals)


def _planes(quick: bool) -> Iterator[Entry]:
    for gradient in (False,) if quick else (True, False):
        for n in (1_024,) if quick else (1_024, 16_384, 131_072):
            problem = replace(_problem("Brusselator", n), checkpoints=(None,))
            yield Entry("plane", "Brusselator", n, problem, gradient, ("pykernels", "diffrax"))


def _devices(quick: bool) -> Iterator[Entry]:
    for n in (16,) if quick else (1_024, 16_384, 131_072):
        rivals = ("pykernels, 1 device", "pykernels, 2 devices")
        yield Entry("devices", "Lorenz", n, _problem("Lorenz", n), True, rivals)


# Measuring.


def run(
    folder: Path,
    only: str = "",
    quick: bool = False,
    budget: float = BUDGET,
    rivals: Mapping[str, Rival] = RIVALS,
) -> Report:
    """Measures the entries whose name contains `only` and writes JSON, Markdown and figures into `folder`."""
    _prepare(quick)
    started = time.perf_counter()
    report = Report(setting(PACKAGES), quick=quick)
    print(", ".join(f"{key} {value}" for key, value in report.setting.items()), flush=True)
    usual: dict[str, float] = {}
    ended: dict[Series, str] = {}
    entered: list[tuple[Entry, list[Made]]] = []
    sampling = 0.0

    def left() -> float:
        return budget - (time.perf_counter() - started)

    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries(quick):
        if only not in str(entry):
            continue

        # As much time as the first rounds have taken is kept for the second ones.
        right = measure(entry, report, lambda kept=sampling: left() - kept, usual, ended, rivals)
        sampling += timed(lambda right=right: sample(right, report.quick, left()))[0]
        entered.append((entry, right))
        report.seconds = round(time.perf_counter() - started, 1)
        write(report, folder / "report.json")
    for entry, right in entered:
        sample(right, report.quick, left())
        for row, _, _ in right:
            print(f"{entry}, {row.rival}: {row.seconds:.4g} s +- {row.spread:.0%}", flush=True)
    report.seconds = round(time.perf_counter() - started, 1)
    report.laws = laws(report)
    write(report, folder / "report.json")
    publish(report, folder)
    print(f"{len(report.rows)} rows, {report.seconds:.0f} s, in {folder}", flush=True)
    return report


def publish(report: Report, folder: Path) -> None:
    """The Markdown and the figures of a report."""
    (folder / "report.md").write_text(tables.page(report, figures.draw(report, folder)))


def _prepare(quick: bool) -> None:
    """float64; several devices, which share the cores, so that `shard_map` has something to split over; compile times of a
    first run."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    cpu.compiler.cache = cpu.DiskCache(None)
    # The first program of a process pays for things that are no program's own.
    for _ in range(1 if quick else 2):
        RIVALS["lax.scan by hand, RK4"].build(PROBLEMS["single"](1), False).run()


def measure(
    entry: Entry,
    report: Report,
    left: Callable[[], float],
    usual: dict[str, float],
    ended: dict[Series, str],
    rivals: Mapping[str, Rival] = RIVALS,
) -> list[Made]:
    """Adds a row, still without times, for each rival of an entry whose answer is right; these rows and their programs.
    `ended`: who has dropped out of a series, and why."""
    right: list[Made] = []
    for name in entry.rivals:
        rival, series = rivals[name], (entry.section, entry.case, name)
        if not rival.enters(entry.problem, entry.gradient):
            continue
        if series in ended:
            report.leave_out(f"{entry.section}, {entry.case}, {name}: the rest, as {ended[series]}")
            continue
        if left() < usual.get(f"{name} {entry.kind}", 5.0):
            report.leave_out(f"{entry}, {name}: the time is up")
            continue
        seconds, made = timed(lambda rival=rival: _proved(entry, rival, report))
        usual[f"{name} {entry.kind}"] = max(seconds, usual.get(f"{name} {entry.kind}", 0.0))
        if made is None:
            ended[series] = f"{entry.x:g} gave no answer that is right"
            continue
        right.append(made)
        if made[2] + made[1].overhead > SLOW_SECONDS:
            ended[series] = f"{entry.x:g} took more than {SLOW_SECONDS:g} s"
    return right


def sample(right: Sequence[Made], quick: bool, left: float) -> None:
    """A round of samples, in turns, of programs that are right. Of a slow one the first round is the run that proved it."""
    if not right or (left <= 0 and right[0][0].samples):
        return
    due = []
    for row, program, seconds in right:
        if seconds > SLOW_SECONDS and not row.samples:
            row.samples, row.seconds = [seconds + program.overhead], seconds + program.overhead
        else:
            due.append((row, program, seconds))
    repeats, target = (2, 0.002) if quick else (REPEATS, 0.01)
    programs, seconds = [program.run for _, program, _ in due], [seconds for *_, seconds in due]
    budget = min(SAMPLING_SECONDS, max(left, 0.0))
    for (row, program, _), taken in zip(
        due, interleaved(programs, seconds, repeats, budget, target), strict=True
    ):
        row.samples += [seconds + program.overhead for seconds in taken]
        row.seconds = statistics.median(row.samples)
        row.spread = spread(row.samples)


def _proved(entry: Entry, rival: Rival, report: Report) -> Made | None:
    """A rival's row so far, its program and the seconds of a run; None if its answer is wrong or it cannot run here."""
    row = Row(entry.section, entry.case, entry.x, rival.name, entry.kind, float("nan"))
    try:
        program = rival.build(entry.problem, entry.gradient)
        first, result = timed(program.run)
        again = first if first > SLOW_SECONDS else min(first, timed(program.run)[0])
        row.peak_bytes = None if first > SLOW_SECONDS else peak_bytes(program.run)
    except Unavailable as why:
        report.leave_out(f"{rival.name}: {why}")
        return None
    except Exception as error:  # whatever a rival breaks by, the others are still to be measured
        row.note = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        report.rows.append(row)
        print(f"{entry}, {rival.name}: broke, {row.note}", file=sys.stderr, flush=True)
        return None
    row.error, row.gradient_error, reason = errors(entry.problem, result)
    if reason is not None:
        report.wrong.append(f"{entry}, {rival.name}: {reason}")
        print(f"WRONG {report.wrong[-1]}", file=sys.stderr, flush=True)
        return None
    # Native code is made beside XLA's program, and waited for by the first run.
    row.compile_seconds = program.compile_seconds + max(first - again, 0.0)
    row.temporary_bytes = program.temporary_bytes
    row.evaluations, row.note = program.evaluations(result[0][1][1]), program.label
    report.rows.append(row)
    return row, program, again


# Growth laws.


@dataclass(frozen=True)
class Law:
    """`value` of a rival's rows grows as x to the power of `exponent`, from `least` on, to within `tolerance`."""

    what: str
    section: str
    kind: str
    rival: str
    value: str
    least: float
    exponent: float
    tolerance: float


LAWS = (
    Law("time of a gradient over trajectories", "ensemble size", "gradient", OURS[0], "seconds", 4_096, 1.0, 0.15),
    Law("time of a gradient over steps", "steps", "gradient", OURS[0], "seconds", 10_000, 1.0, 0.15),
    Law("memory of a gradient over steps", "steps", "gradient", OURS[0], "memory", 1_000, 0.5, 0.1),
    Law("time of a solve over sites of a ring", "state size", "forward", "pykernels", "seconds", 16_384, 1.0, 0.15),
)  # fmt: skip


def laws(report: Report) -> list[dict[str, Any]]:
    """What is stated about growth, and the exponents measured: the slopes of straight lines through logarithms."""
    made = []
    for law in LAWS:
        of = (law.section, law.kind, law.rival)
        rows = [row for row in report.rows if (row.section, row.kind, row.rival) == of and row.x >= law.least]
        points = [(row.x, float(value)) for row in rows if (value := getattr(row, law.value)) and value > 0]
        if len({x for x, _ in points}) >= 2:
            slope = float(np.polyfit(*np.log(np.array(points)).T, 1)[0])
            holds = abs(slope - law.exponent) <= law.tolerance
            made.append(
                {"what": law.what, "stated": law.exponent, "measured": round(slope, 3), "holds": holds}
            )
    return made
