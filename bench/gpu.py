"""pykernels on an NVIDIA GPU, proved and then timed, by one command of less than nine minutes.

    python bench/gpu.py --output gpu.json           all of it; also prints the tables in Markdown
    python bench/gpu.py --only lorenz               the cases whose name contains "lorenz"
    python bench/gpu.py --runners native            one of the two runners
    python bench/gpu.py --rehearse                  the same at tiny sizes with the CPU's runners: no figures worth keeping

First the numerical suite: every reference problem's values and gradients by every runner, against the portable runner on the
CPU. Then the times of value, and of value and gradient, against diffrax and, where it is installed, gradsolve. A program whose
answer is wrong gets a line that says so and no time, and the exit status is 1. When the time is up, what is left is skipped,
with a line each; JSON is written after every case, so a run that is cut off leaves what it had.

Needs jax with CUDA, llvmlite, libdevice (pykernels[cuda], or CUDA's own wheels) and, for the comparison, diffrax.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import problems

BUDGET_SECONDS = 520.0
# The numerical suite may take so much of it.
SUITE_SHARE = 0.45
# No program is started that would probably not end in time; one takes about this long before there is a longer one.
PROGRAM_SECONDS = 12.0
FIRST_STEP = 0.01
# Of a measurement: samples of each program, interleaved, each long enough for the clock; fewer for slow programs.
SAMPLES, SAMPLE_SECONDS, CASE_SECONDS = 7, 0.01, 8.0
# Trajectories of an ensemble that are solved by the reference too.
REFERENCE_LANES = 64
SUITE_LANES = 37
# How far results may be from the reference, relative to its largest value. Kernels follow the reference's decisions; other
# libraries have their own, and are right to their tolerances.
EXACT, ALIKE = 1e-10, 1e-3

Runner = Literal["native", "pallas", "xla"]


class Budget:
    """The time that is left, and how long a program has taken so far."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.longest = min(PROGRAM_SECONDS, seconds / 8)

    def left(self) -> float:
        return self.end - time.perf_counter()

    def allows(self) -> bool:
        """Whether another program will probably end in time."""
        return self.left() > self.longest

    def part(self, share: float) -> Budget:
        """A budget that ends after this share of what is left."""
        made = Budget(self.left() * share)
        made.longest = self.longest
        return made

    def took(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)


@dataclass(frozen=True)
class Answer:
    """What a program computed, in NumPy and float64: the loss, every trajectory's final state, attempts (None: not told), and
    the gradient's leaves, if there is one."""

    loss: float
    states: list[np.ndarray]
    attempts: np.ndarray | None
    own: list[np.ndarray]  # gradients that every trajectory has of its own
    shared: list[np.ndarray]  # gradients summed over trajectories


@dataclass(frozen=True)
class Ensemble:
    """Trajectories to solve. `args` are in two parts, one with a value per trajectory, one shared by all; the gradient is by both.
    The field gets both parts merged by `merge`. Arrays are NumPy's in float64."""

    field: Callable[[Any, Any, Any], Any]
    y0s: Any
    own: Any
    shared: Any
    t0: float
    t1: float
    merge: Callable[[Any, Any], Any]
    method: pk.ButcherTableau = pk.tsit5
    step: pk.Adaptive | pk.Fixed = pk.Adaptive(1e-6, 1e-9)  # noqa: RUF009  (frozen)
    max_steps: int = 256

    @property
    def lanes(self) -> int:
        return int(jax.tree.leaves(self.y0s)[0].shape[0])

    def first(self, lanes: int) -> Ensemble:
        """The ensemble of its first trajectories."""
        y0s, own = jax.tree.map(lambda a: a[:lanes], (self.y0s, self.own))
        return dataclasses.replace(self, y0s=y0s, own=own)


@dataclass(frozen=True)
class Program:
    """A compiled program with its inputs on the device. `run` starts it and waits; `overhead` is what else a user of it waits
    for, in seconds, without compilation."""

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int | None
    overhead: float = 0.0


Build = Callable[[Ensemble, str, bool], Program]


@dataclass(frozen=True)
class Entrant:
    """Somebody who solves ensembles: `build(ensemble, dtype, gradient)` makes the program, whose result is
    ((loss, (states, attempts or None)), (own, shared) or None)."""

    name: str
    build: Build
    tolerance: float = EXACT


@dataclass(frozen=True)
class Case:
    """A line of the table for each entrant."""

    name: str
    ensemble: Callable[[], Ensemble]
    dtype: str
    gradient: bool
    entrants: Sequence[Entrant]


@dataclass
class Row:
    """What came out of an entrant's program. Without a reason, its answer is right; times are only given then."""

    case: str
    entrant: str
    lanes: int
    dtype: str
    kind: str
    reason: str | None = None
    median_seconds: float | None = None
    samples: int = 0
    compile_seconds: float | None = None
    overhead_seconds: float = 0.0
    error: float | None = None
    attempts: list[int] | None = None  # fewest and most
    temporary_bytes: int | None = None
    peak_bytes: int | None = None  # of the process, until then


@dataclass
class Report:
    """All that is kept of a run."""

    setting: dict[str, str]
    suite: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    def wrong(self) -> list[Row]:
        return [row for row in (*self.suite, *self.rows) if row.reason is not None]

    def write(self, path: Path | None) -> None:
        """To a file, whole or not at all."""
        if path is not None:
            draft = path.with_name(path.name + ".part")
            draft.write_text(json.dumps(dataclasses.asdict(self), indent=1))
            draft.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--runners", default="", help="pykernels' runners, with commas (default: all)")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for all of it")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args()
    started = time.perf_counter()
    budget = Budget(options.budget)
    jax.config.update("jax_enable_x64", True)
    # Compile times are those of a first run.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.rehearse:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        parser.error("no GPU here; --rehearse runs this on the CPU")
    runners = (
        options.runners.split(",") if options.runners else ["native", "xla" if options.rehearse else "pallas"]
    )
    report = Report(setting())
    stop = threading.Timer(options.budget + 15, _give_up, [report, options.output])
    stop.daemon = True
    stop.start()
    print(", ".join(f"{key} {value}" for key, value in report.setting.items()), flush=True)
    suite(report, budget.part(SUITE_SHARE), runners, options.only, options.output)
    for case in cases(runners, options.rehearse):
        if options.only in case.name:
            measure(case, report, budget)
            report.seconds = time.perf_counter() - started
            report.write(options.output)
    report.finished = True
    report.seconds = time.perf_counter() - started
    report.write(options.output)
    print("", table(report), "", f"{report.seconds:.0f} s", sep="\n")
    for row in report.wrong():
        print(f"WRONG {row.case}, {row.entrant}: {row.reason}", file=sys.stderr)
    return 1 if report.wrong() else 0


def _give_up(report: Report, path: Path | None) -> None:
    """A kernel that does not end can not be stopped: leave what there is, and the process."""
    report.write(path)
    print(f"{table(report)}\nout of time in the middle of a program", flush=True)
    os._exit(3)


# Entrants.


def pykernels(runner: Runner, order: Literal["work"] | None = None) -> Entrant:
    def build(ensemble: Ensemble, dtype: str, gradient: bool) -> Program:
        def final(own: Any, shared: Any, y0s: Any) -> Any:
            axes = (0, ensemble.merge(jax.tree.map(lambda a: 0, own), jax.tree.map(lambda a: None, shared)))
            sols = pk.solve_ensemble(
                ensemble.field, y0s, ensemble.t0, ensemble.t1, ensemble.merge(own, shared), in_axes=axes,
                method=ensemble.method, step=ensemble.step, max_steps=ensemble.max_steps, order=order, throw=False,
                dt0=FIRST_STEP if isinstance(ensemble.step, pk.Adaptive) else None, config=pk.Config(runner=runner),
            )  # fmt: skip
            return sols.ys, sols.stats.attempts

        return compiled(final, ensemble, dtype, gradient)

    return Entrant(f"pykernels {runner}{', order=work' if order else ''}", build)


def diffrax() -> Entrant:
    """diffrax under `jax.vmap`, with its default adjoint."""
    import diffrax as library

    def build(ensemble: Ensemble, dtype: str, gradient: bool) -> Program:
        assert isinstance(ensemble.step, pk.Adaptive)
        term = library.ODETerm(ensemble.field)
        controller = library.PIDController(rtol=ensemble.step.rtol, atol=ensemble.step.atol)

        def one(own: Any, shared: Any, y0: Any) -> Any:
            solution = library.diffeqsolve(
                term, library.Tsit5(), ensemble.t0, ensemble.t1, FIRST_STEP, y0, ensemble.merge(own, shared),
                stepsize_controller=controller, max_steps=ensemble.max_steps, throw=False,
            )  # fmt: skip
            return jax.tree.map(lambda a: a[0], solution.ys), solution.stats["num_steps"]

        return compiled(jax.vmap(one, in_axes=(0, None, 0)), ensemble, dtype, gradient)

    return Entrant("diffrax", build, ALIKE)


def gradsolve() -> Entrant:
    """gradsolve's replay of recorded steps. Its overhead is the recording, which every new parameter value needs."""
    import gradsolve as library

    def build(ensemble: Ensemble, dtype: str, gradient: bool) -> Program:
        assert dtype == "float64" and gradient and isinstance(ensemble.step, pk.Adaptive)
        step, function = ensemble.step, ensemble.field

        class System:
            name, dim, is_stiff = "bench", ensemble.y0s.shape[-1], False
            t0, t1 = ensemble.t0, ensemble.t1

            def f_jax(self, t: Any, y: Any, p: Any) -> Any:
                return function(t, y, p)

        def record() -> Any:
            return library.grad_closure(
                System(), ensemble.y0s, ensemble.own, engine="tsit5_replay", rtol=step.rtol, atol=step.atol
            )

        record()
        seconds = statistics.median([timed(record)[0] for _ in range(3)])
        closure = record()

        def loss(own: Any) -> Any:
            ys = closure(own)
            return jnp.sum(ys**2), (ys, None)

        own = jnp.asarray(ensemble.own)
        compile_seconds, program = timed(jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(own).compile)

        def run() -> Any:
            value, by_own = jax.block_until_ready(program(own))
            return value, (by_own, None)

        return Program(run, compile_seconds, program.memory_analysis().temp_size_in_bytes, seconds)

    return Entrant("gradsolve", build, ALIKE)


def compiled(
    final: Callable[[Any, Any, Any], Any], ensemble: Ensemble, dtype: str, gradient: bool
) -> Program:
    """The program of a solver (own args, shared args, initial states) to (final states, attempts)."""

    def loss(args: tuple[Any, Any], y0s: Any) -> Any:
        ys, attempts = final(*args, y0s)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ys)), (ys, attempts)

    def forward(args: tuple[Any, Any], y0s: Any) -> Any:
        return loss(args, y0s), None

    inputs = jax.tree.map(lambda a: jnp.asarray(a, dtype), ((ensemble.own, ensemble.shared), ensemble.y0s))
    function = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else forward)
    seconds, program = timed(lambda: function.lower(*inputs).compile())

    def run() -> Any:
        return jax.block_until_ready(program(*inputs))

    return Program(run, seconds, program.memory_analysis().temp_size_in_bytes)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


# Checks.


def answer_of(result: Any) -> Answer:
    """A program's result in NumPy."""
    (loss, (states, attempts)), gradient = result
    own, shared = gradient if gradient is not None else (None, None)

    def leaves(tree: Any) -> list[np.ndarray]:
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]

    counts = None if attempts is None else np.asarray(attempts)
    return Answer(float(loss), leaves(states), counts, leaves(own), leaves(shared))


@dataclass(frozen=True)
class Reference:
    """The portable runner's answers on the CPU for the first trajectories of an ensemble: in float64, and in the case's dtype,
    which says how far rounding alone leads."""

    exact: Answer
    rounded: Answer
    lanes: int
    whole: bool  # whether these are all trajectories


def reference_of(ensemble: Ensemble, dtype: str, gradient: bool) -> Reference:
    """With shared arguments their gradient is a sum over the whole ensemble, so all of it is solved."""
    whole = bool(jax.tree.leaves(ensemble.shared)) or ensemble.lanes <= REFERENCE_LANES
    lanes = ensemble.lanes if whole else REFERENCE_LANES
    part = ensemble.first(lanes)
    (cpu, *_) = jax.devices("cpu")
    with jax.default_device(cpu):
        build = pykernels("xla").build
        exact = answer_of(build(part, "float64", gradient).run())
        rounded = exact if dtype == "float64" else answer_of(build(part, dtype, gradient).run())
    return Reference(exact, rounded, lanes, whole)


def check(answer: Answer, reference: Reference, tolerance: float) -> tuple[float, str | None]:
    """The largest error relative to the reference's largest values, and why the answer is wrong, or None.

    In float32 an answer may be three times further from the float64 one than the portable runner's is, or 64 roundings:
    rounding moves the sizes of steps.
    """
    largest = 0.0
    for what in ("states", "own", "shared"):
        for got, exact, rounded in zip(
            getattr(answer, what),
            getattr(reference.exact, what),
            getattr(reference.rounded, what),
            strict=True,
        ):
            if not np.all(np.isfinite(got)):
                return float("inf"), f"{what}: not finite"
            got = got if what == "shared" else got[: reference.lanes]
            scale = max(float(np.max(np.abs(exact), initial=0.0)), 1e-12)
            error = float(np.max(np.abs(got - exact), initial=0.0)) / scale
            allowed = tolerance
            if reference.rounded is not reference.exact:
                portable = float(np.max(np.abs(rounded - exact), initial=0.0)) / scale
                allowed = max(3 * portable, 64 * float(np.finfo(np.float32).eps), tolerance)
            largest = max(largest, error)
            if not error <= allowed:
                return largest, f"{what}: error {error:.1e}, allowed {allowed:.1e}"
    # Trajectories beyond the reference's are only known by the loss, which is the sum over all.
    total = sum(float(np.sum(leaf**2)) for leaf in answer.states)
    if not abs(total - answer.loss) <= 1e-4 * abs(total):
        return largest, f"the loss {answer.loss:.6g} is not that of the states, {total:.6g}"
    exact_attempts = reference.exact.attempts
    if answer.attempts is not None and tolerance == EXACT and exact_attempts is not None:
        wanted, got_attempts = int(exact_attempts.sum()), int(answer.attempts[: reference.lanes].sum())
        if abs(got_attempts - wanted) > (0 if reference.rounded is reference.exact else 0.05 * wanted):
            return largest, f"{got_attempts} attempts, the reference made {wanted}"
    return largest, None


# The numerical suite.

SUITE_METHODS = (pk.tsit5, pk.dopri5, pk.bosh3, pk.rk4, pk.euler)


def suite(
    report: Report, budget: Budget, runners: Sequence[Runner], only: str = "", path: Path | None = None
) -> None:
    """Values and gradients of the reference problems, each by one of the methods, by every runner in both dtypes."""
    for i, problem in enumerate(problems.PROBLEMS):
        name = f"suite, {problem.name}"
        if only not in name:
            continue
        if not budget.allows():
            skip(report, name)
            continue
        ensemble = suite_ensemble(problem, SUITE_METHODS[i % len(SUITE_METHODS)], shared=i % 2 == 1)
        for dtype in ("float64", "float32"):
            reference = reference_of(ensemble, dtype, True)
            for runner in runners:
                row = Row(f"{name}, {ensemble.method.name}", runner, ensemble.lanes, dtype, "gradient")
                start = time.perf_counter()
                prove(row, pykernels(runner), ensemble, reference, True)
                budget.took(time.perf_counter() - start)
                report.suite.append(row)
                print(
                    f"{row.case}, {dtype}, {runner}: {row.reason or f'right, error {row.error:.1e}'}",
                    flush=True,
                )
        report.write(path)


def suite_ensemble(problem: problems.Problem, method: pk.ButcherTableau, shared: bool) -> Ensemble:
    """Some trajectories of a problem over a fifth of its span; matrices are always shared."""
    y0s, args = problems.spread(problem.y0(), SUITE_LANES), problem.args()
    shared = shared or problem in (problems.COUPLED, problems.PERCEPTRON)
    return Ensemble(
        problem.field, y0s, () if shared else problems.spread(args, SUITE_LANES), args if shared else (),
        problem.t0, problem.t0 + 0.2 * (problem.t1 - problem.t0), only_shared if shared else only_own,
        method, pk.Fixed(16) if method.error is None else pk.Adaptive(1e-4, 1e-6), 128,
    )  # fmt: skip


def only_own(own: Any, shared: Any) -> Any:
    return own


def only_shared(own: Any, shared: Any) -> Any:
    return shared


def prove(
    row: Row, entrant: Entrant, ensemble: Ensemble, reference: Reference, gradient: bool
) -> Program | None:
    """Compile and run a program, and fill in its row; the program if its answer is right."""
    try:
        program = entrant.build(ensemble, row.dtype, gradient)
        seconds, result = timed(program.run)
        again = min(seconds, timed(program.run)[0])
    except Exception as error:
        # Whatever one program breaks by, out of memory for one, the others are still to be measured.
        row.reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return None
    answer = answer_of(result)
    # Kernels' machine code is made when they are first run.
    row.compile_seconds = program.compile_seconds + seconds - again
    row.temporary_bytes, row.overhead_seconds = program.temporary_bytes, program.overhead
    row.peak_bytes = peak_bytes()
    if answer.attempts is not None:
        row.attempts = [int(answer.attempts.min()), int(answer.attempts.max())]
    row.error, row.reason = check(answer, reference, entrant.tolerance)
    return program if row.reason is None else None


def peak_bytes() -> int | None:
    """The most device memory that this process has used until now; not known on CPUs."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


# Times.


def measure(case: Case, report: Report, budget: Budget) -> None:
    """A row for each entrant of a case: proved first, and only what is right is timed, interleaved."""
    kind = "gradient" if case.gradient else "value"
    if not budget.allows():
        skip(report, f"{case.name}, {case.dtype}, {kind}")
        return
    ensemble = case.ensemble()
    start = time.perf_counter()
    reference = reference_of(ensemble, case.dtype, case.gradient)
    budget.took(time.perf_counter() - start)
    proved: list[tuple[Row, Program]] = []
    for entrant in case.entrants:
        row = Row(case.name, entrant.name, ensemble.lanes, case.dtype, kind)
        if not budget.allows():
            skip(report, f"{case.name}, {case.dtype}, {kind}, {entrant.name}")
            continue
        start = time.perf_counter()
        program = prove(row, entrant, ensemble, reference, case.gradient)
        budget.took(time.perf_counter() - start)
        report.rows.append(row)
        if program is not None:
            proved.append((row, program))
        else:
            print(f"{case.name}, {case.dtype}, {kind}, {entrant.name}: {row.reason}", flush=True)
    sampled = samples([program for _, program in proved], min(CASE_SECONDS, max(budget.left(), 0.0)))
    for (row, program), seconds in zip(proved, sampled, strict=True):
        row.samples, row.median_seconds = len(seconds), statistics.median(seconds) + program.overhead
        print(
            f"{case.name}, {case.dtype}, {kind}, {row.entrant}: {row.median_seconds * 1e3:.3g} ms", flush=True
        )


def samples(programs: Sequence[Program], seconds: float) -> list[list[float]]:
    """Seconds per run of each program, in turns, since a machine's speed changes; at least one sample of each."""
    firsts = [timed(program.run)[0] for program in programs]
    taken: list[list[float]] = [[first] for first in firsts]
    end = time.perf_counter() + seconds
    for _ in range(SAMPLES - 1):
        for program, first, mine in zip(programs, firsts, taken, strict=True):
            if time.perf_counter() + first > end:
                continue
            runs = max(1, round(SAMPLE_SECONDS / first))
            mine.append(
                timed(lambda program=program, runs=runs: [program.run() for _ in range(runs)])[0] / runs
            )
    return taken


def skip(report: Report, what: str) -> None:
    report.skipped.append(what)
    print(f"skipped, the time is up: {what}", flush=True)


# Cases.


def lorenz(lanes: int) -> Ensemble:
    """The parameter rho goes from a stable to an almost chaotic system."""
    rho = np.linspace(0.0, 21.0, lanes)
    # The reference takes the first ones, which are to be of all kinds.
    np.random.default_rng(0).shuffle(rho)
    own = np.stack([np.full(lanes, 10.0), rho, np.full(lanes, 8 / 3)], axis=-1)
    return Ensemble(problems.LORENZ.field, np.tile([1.0, 0.0, 0.0], (lanes, 1)), own, (), 0.0, 1.0, only_own)


def divergent(lanes: int) -> Ensemble:
    """Oscillators whose frequencies, and so their numbers of steps, spread twentyfold, in no order."""
    omega = np.geomspace(1.0, 20.0, lanes)
    np.random.default_rng(0).shuffle(omega)
    return Ensemble(
        oscillator, np.tile([1.0, 0.0], (lanes, 1)), omega, (), 0.0, 10.0, only_own, step=pk.Adaptive(1e-6, 1e-6),
        max_steps=1024,
    )  # fmt: skip


def oscillator(t: Any, y: Any, omega: Any) -> Any:
    del t
    return jnp.stack([omega * y[1], -omega * y[0]])


def coupled(lanes: int) -> Ensemble:
    """Twelve states; the gradient by a number of each trajectory's own, and by a matrix that all share."""
    args = problems.COUPLED.args()
    own = problems.spread(args["p"], lanes, 0.3)
    y0s = problems.spread(problems.COUPLED.y0(), lanes, 0.5)
    return Ensemble(problems.COUPLED.field, y0s, own, args["w"], 0.0, problems.COUPLED.t1, _weighted)


def _weighted(own: Any, shared: Any) -> Any:
    return {"p": own, "w": shared}


def cases(runners: Sequence[Runner], rehearse: bool) -> list[Case]:
    """All cases, the more telling ones first: when the time is up, the others are missed less."""
    ours = [pykernels(runner) for runner in runners]
    theirs = [diffrax()] if importlib.util.find_spec("diffrax") is not None else []
    replay = [gradsolve()] if importlib.util.find_spec("gradsolve") is not None else []
    sizes = [2**k for k in ((4, 5, 6) if rehearse else (16, 20, 10, 23, 13, 7))]
    compared = {sizes[0], sizes[1], sizes[2]}
    made: list[Case] = []
    for lanes in sizes:
        for dtype in ("float32", "float64"):
            for gradient in (True, False):
                others = theirs if lanes in compared else []
                if gradient and dtype == "float64" and lanes == sizes[0]:
                    others = [*others, *replay]
                made.append(
                    Case(
                        f"lorenz {lanes:,}",
                        functools.partial(lorenz, lanes),
                        dtype,
                        gradient,
                        [*ours, *others],
                    )
                )
        if lanes == sizes[0]:
            made += _spread_and_coupled(runners, ours, theirs, lanes, 32 if rehearse else 2**13)
    ordered = [entrant for runner in runners for entrant in (pykernels(runner), pykernels(runner, "work"))]
    for gradient in (False, True):
        name = f"divergent {sizes[1]:,}"
        made.append(Case(name, functools.partial(divergent, sizes[1]), "float32", gradient, ordered))
    return made


def _spread_and_coupled(
    runners: Sequence[Runner], ours: list[Entrant], theirs: list[Entrant], lanes: int, coupled_lanes: int
) -> list[Case]:
    ordered = [entrant for runner in runners for entrant in (pykernels(runner), pykernels(runner, "work"))]
    made = []
    for dtype in ("float32", "float64"):
        name, make = f"divergent {lanes:,}", functools.partial(divergent, lanes)
        made.append(Case(name, make, dtype, False, [*ordered, *theirs]))
        made.append(Case(name, make, dtype, True, ordered))
        name, make = f"coupled {coupled_lanes:,}", functools.partial(coupled, coupled_lanes)
        made += [Case(name, make, dtype, gradient, [*ours, *theirs]) for gradient in (True, False)]
    return made


# What is printed.


def setting() -> dict[str, str]:
    device = jax.devices()[0]
    said = {"device": device.device_kind, "Python": platform.python_version()}
    for name in ("pykernels", "jax", "jaxlib", "llvmlite", "triton", "diffrax", "gradsolve"):
        try:
            said[name] = version(name)
        except PackageNotFoundError:
            said[name] = "not installed"
    return said


def table(report: Report) -> str:
    """The suite in a line, then the rows, in Markdown."""
    right = sum(row.reason is None for row in report.suite)
    lines = [
        f"Numerical suite: {right} of {len(report.suite)} right.",
        "",
        "| case | dtype | kind | program | time | ns per trajectory | compile | temporaries | error | attempts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(report.rows, key=lambda r: (r.case.split()[0], r.dtype, r.kind, r.lanes, r.entrant)):
        lines.append(f"| {' | '.join(_cells(row))} |")
    peak = max((row.peak_bytes or 0 for row in (*report.suite, *report.rows)), default=0)
    lines += ["", f"Device memory, at most: {_bytes(peak) if peak else 'not known'}."]
    lines += [f"Skipped: {what}." for what in report.skipped]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    head = [row.case, row.dtype, row.kind, row.entrant]
    if row.median_seconds is None:
        return [*head, f"none: {row.reason or 'not timed'}", "", "", "", "", ""]
    times = [_time(row.median_seconds), f"{row.median_seconds / row.lanes * 1e9:.3g}"]
    compile_time = "" if row.compile_seconds is None else _time(row.compile_seconds)
    size = "" if row.temporary_bytes is None else _bytes(row.temporary_bytes)
    attempts = "" if row.attempts is None else f"{row.attempts[0]} to {row.attempts[1]}"
    return [*head, *times, compile_time, size, f"{row.error:.1e}", attempts]


def _time(seconds: float) -> str:
    return _in_units(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))


def _bytes(count: int) -> str:
    return _in_units(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _in_units(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """In the first unit of which it is at least one, else in the last."""
    unit, scale = next((u for u in units if value >= u[1]), units[-1])
    return f"{value / scale:.3g} {unit}"


if __name__ == "__main__":
    sys.exit(main())
