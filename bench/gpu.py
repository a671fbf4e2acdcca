"""pykernels on an NVIDIA GPU, proved and then timed, by one command of less than nine minutes.

    python bench/gpu.py --output gpu.json           all of it; also prints the tables in Markdown
    python bench/gpu.py --only lorenz coupled       the cases whose name contains one of these
    python bench/gpu.py --runners native            one of the two runners
    python bench/gpu.py --rehearse                  the same at tiny sizes with the CPU's runners: no figures worth keeping

First the numerical suite: every reference problem's values and gradients by every runner, against the portable runner on the
CPU. Then the times of value, and of value and gradient, against diffrax and, where it is installed, gradsolve. A program
whose answer is wrong gets a line that says so and no time, and if it is one of pykernels' the exit status is 1. When the
time is up, what is left is skipped, with a line each; JSON is written after every case, so that a run which is cut off
leaves something.

Needs jax with CUDA, llvmlite, libdevice (pykernels[cuda], or CUDA's own wheels) and, for the comparison, diffrax.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import problems

from bench.timing import in_bytes, in_seconds, timed

BUDGET_SECONDS = 520.0
# The numerical suite may take so much of it. What is left then may be waited for references, to such a part: while they are
# computed, compile times are a little longer.
SUITE_SHARE, WAIT_SHARE = 0.45, 0.1
# No program is started that would probably not end in time; an entrant's first is taken to take this long.
PROGRAM_SECONDS = 12.0
FIRST_STEP = 0.01
# Of a measurement: samples of each program, interleaved, each long enough for the clock; fewer for slow programs.
SAMPLES, SAMPLE_SECONDS, CASE_SECONDS = 7, 0.01, 4.0
# Trajectories of an ensemble that are solved by the reference too.
REFERENCE_LANES = 64
SUITE_LANES = 37
# How far float64 results may be from the reference, relative to its largest value. pykernels' runners and diffrax take the
# same steps; gradsolve has its own, and is right to its tolerances.
EXACT, ALIKE, TOLERANT = 1e-10, 1e-9, 1e-3
# How far float32 results may be in any case.
ROUNDED = 1e-2
# Fractions i * GOLDEN modulo 1 fill the unit interval evenly, and the first ones of any number are the same.
GOLDEN = (5**0.5 - 1) / 2

Runner = Literal["native", "pallas", "xla"]


class Budget:
    """The time that is left, and the longest that each entrant's programs have taken so far."""

    def __init__(self, seconds: float, longest: dict[str, float] | None = None) -> None:
        self.end = time.perf_counter() + seconds
        self.usual = min(PROGRAM_SECONDS, seconds / 8)
        self.longest: dict[str, float] = {} if longest is None else longest

    def left(self) -> float:
        return max(self.end - time.perf_counter(), 0.0)

    def allows(self, entrant: str = "") -> bool:
        """Whether another program will probably end in time."""
        return self.left() > self.longest.get(entrant, self.usual)

    def took(self, entrant: str, seconds: float) -> None:
        self.longest[entrant] = max(self.longest.get(entrant, 0.0), seconds)

    def part(self, share: float) -> Budget:
        """A budget that ends after this share of what is left."""
        return Budget(self.left() * share, self.longest)


@dataclass(frozen=True)
class Answer:
    """What a program computed, in NumPy and float64: the loss, all final states, attempts (None: not told), and the leaves
    of the gradient, of which there are none in a program for the value alone."""

    loss: float
    states: list[np.ndarray]
    attempts: np.ndarray | None
    own: list[np.ndarray]  # gradients that every trajectory has of its own
    shared: list[np.ndarray]  # gradients summed over trajectories


@dataclass(frozen=True)
class Ensemble:
    """Trajectories to solve. Arguments are in two parts, one with a value per trajectory, one shared by all, which `merge`
    makes the field's arguments of; gradients are by both. Arrays are NumPy's in float64."""

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


@dataclass(frozen=True)
class Program:
    """A compiled program with its inputs on the device. `run` starts it and waits; `overhead` is how many seconds its user
    waits for something else, compilation excepted."""

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
    """A line of the table for each entrant. `make` gives an ensemble of any size, the first trajectories being the same; if
    its arguments are shared by trajectories, `shared` must say so."""

    family: str
    make: Callable[[int], Ensemble]
    lanes: int
    dtype: str
    gradient: bool
    entrants: Sequence[Entrant]
    shared: bool = False

    @property
    def name(self) -> str:
        return f"{self.family} {self.lanes:,}"

    @property
    def kind(self) -> str:
        return "gradient" if self.gradient else "value"

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}, {self.kind}"

    @property
    def reference_lanes(self) -> int:
        """A gradient by shared arguments is a sum over all trajectories, so all are solved for it; else some are enough."""
        return self.lanes if self.shared else min(self.lanes, REFERENCE_LANES)


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
        """What is not right among pykernels' own."""
        rows = (*self.suite, *self.rows)
        return [row for row in rows if row.reason is not None and row.entrant.startswith("pykernels")]

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
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--runners", nargs="+", choices=["native", "pallas", "xla"], help="(default: all)")
    parser.add_argument("--alone", action="store_true", help="without other libraries")
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
    runners = options.runners or ["native", "xla" if options.rehearse else "pallas"]
    report = Report(setting())
    stop = threading.Timer(options.budget + 15, _give_up, [report, options.output])
    stop.daemon = True
    stop.start()
    print(", ".join(f"{key} {value}" for key, value in report.setting.items()), flush=True)
    named = [
        case for case in cases(runners, options.rehearse, options.alone) if chosen(case.name, options.only)
    ]
    proofs = [proof for proof in suite(runners) if chosen(proof.name, options.only)]
    references = References()
    for case in (*proofs, *named):
        references.ask(case)
    check_all(proofs, report, budget.part(SUITE_SHARE), references)
    references.wait(budget.left() * WAIT_SHARE)
    for case in named:
        measure(case, report, budget, references)
        report.seconds = time.perf_counter() - started
        report.write(options.output)
    report.finished = True
    report.seconds = time.perf_counter() - started
    report.write(options.output)
    print("", table(report), "", f"{report.seconds:.0f} s", sep="\n", flush=True)
    for row in report.wrong():
        print(f"WRONG {row.case}, {row.dtype}, {row.kind}, {row.entrant}: {row.reason}", file=sys.stderr)
    references.close()
    return 1 if report.wrong() else 0


def chosen(name: str, only: Sequence[str]) -> bool:
    return any(part in name for part in only)


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

    return Entrant("gradsolve", build, TOLERANT)


def compiled(
    final: Callable[[Any, Any, Any], Any], ensemble: Ensemble, dtype: str, gradient: bool
) -> Program:
    """The program of a solver (own args, shared args, initial states) to (final states, attempts)."""

    def loss(args: tuple[Any, Any], y0s: Any) -> Any:
        ys, attempts = final(*args, y0s)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ys)), (ys, attempts)

    def forward(args: tuple[Any, Any], y0s: Any) -> Any:
        return loss(args, y0s), None

    function = jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else forward)
    # float32 programs are traced with float64 off, as their users would run them.
    with jax.enable_x64(dtype == "float64"):
        given = ((ensemble.own, ensemble.shared), ensemble.y0s)
        inputs = jax.tree.map(lambda a: jnp.asarray(a, dtype), given)
        seconds, program = timed(lambda: function.lower(*inputs).compile())

    def run() -> Any:
        return jax.block_until_ready(program(*inputs))

    return Program(run, seconds, program.memory_analysis().temp_size_in_bytes)


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
    """The portable runner's answers on the CPU for an ensemble's first trajectories: in float64, and in float32, which says
    how far rounding alone leads."""

    exact: Answer
    rounded: Answer
    lanes: int


def reference_of(ensemble: Ensemble) -> Reference:
    (cpu, *_) = jax.devices("cpu")
    with jax.default_device(cpu):
        build = pykernels("xla").build
        answers = [answer_of(build(ensemble, dtype, True).run()) for dtype in ("float64", "float32")]
    return Reference(answers[0], answers[1], ensemble.lanes)


class References:
    """References that are computed by a thread beside everything else, once for all the cases that share one."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.made: dict[tuple[str, int], Future[Reference]] = {}

    def ask(self, case: Case) -> Future[Reference]:
        lanes = case.reference_lanes
        if (case.family, lanes) not in self.made:
            future = self.pool.submit(lambda: reference_of(case.make(lanes)))
            self.made[case.family, lanes] = future
        return self.made[case.family, lanes]

    def wait(self, seconds: float) -> None:
        wait(self.made.values(), timeout=seconds)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


def check(
    answer: Answer, reference: Reference, dtype: str, gradient: bool, tolerance: float
) -> tuple[float, str | None]:
    """The largest error relative to the reference's largest values, and why the answer is wrong, or None.

    A float32 answer may be three times further from the float64 one than the portable runner's is, or 64 roundings, since
    rounding moves the sizes of steps; but no further than `ROUNDED`.
    """
    largest = 0.0
    for what in ("states", "own", "shared") if gradient else ("states",):
        leaves = [getattr(each, what) for each in (answer, reference.exact, reference.rounded)]
        for got, exact, rounded in zip(*leaves, strict=True):
            if not np.all(np.isfinite(got)):
                return largest, f"{what}: not finite"
            mine = got if what == "shared" else got[: reference.lanes]
            scale = max(float(np.max(np.abs(exact))), 1e-12)
            error, portable = (float(np.max(np.abs(a - exact))) / scale for a in (mine, rounded))
            few = min(max(3 * portable, 64 * float(np.finfo(np.float32).eps)), ROUNDED)
            allowed = tolerance if dtype == "float64" else max(tolerance, few)
            largest = max(largest, error)
            if error > allowed:
                return largest, f"{what}: error {error:.1e}, allowed {allowed:.1e}"
    # Of trajectories beyond the reference's, the loss is known to be the sum over all.
    total = sum(float(np.sum(leaf**2)) for leaf in answer.states)
    if not abs(total - answer.loss) <= 1e-4 * abs(total):
        return largest, f"the loss {answer.loss:.6g} is not that of the states, {total:.6g}"
    if answer.attempts is not None and tolerance == EXACT:
        made, wanted = (
            int(np.sum(counts[: reference.lanes])) for counts in (answer.attempts, reference.exact.attempts)
        )
        if abs(made - wanted) > (0 if dtype == "float64" else 0.05 * wanted):
            return largest, f"{made} attempts, the reference made {wanted}"
    return largest, None


# The numerical suite.

SUITE_METHODS = (pk.tsit5, pk.dopri5, pk.bosh3, pk.rk4, pk.euler)


def suite(runners: Sequence[Runner]) -> list[Case]:
    """Values and gradients of the reference problems, each by one of the methods, by every runner in both dtypes."""
    made = []
    for i, problem in enumerate(problems.PROBLEMS):
        method = SUITE_METHODS[i % len(SUITE_METHODS)]
        shared = i % 2 == 1 or problem in (problems.COUPLED, problems.PERCEPTRON)
        make = functools.partial(suite_ensemble, problem, method, shared)
        for dtype in ("float64", "float32"):
            entrants = [pykernels(runner) for runner in runners]
            family = f"suite {problem.name} {method.name}"
            made.append(Case(family, make, SUITE_LANES, dtype, True, entrants, shared))
    return made


def suite_ensemble(
    problem: problems.Problem, method: pk.ButcherTableau, shared: bool, lanes: int
) -> Ensemble:
    """Some trajectories of a problem over a fifth of its span."""
    y0s, args = problems.spread(problem.y0(), lanes), problem.args()
    return Ensemble(
        problem.field, y0s, () if shared else problems.spread(args, lanes), args if shared else (),
        problem.t0, problem.t0 + 0.2 * (problem.t1 - problem.t0), only_shared if shared else only_own,
        method, pk.Fixed(16) if method.error is None else pk.Adaptive(1e-4, 1e-6), 128,
    )  # fmt: skip


def check_all(proofs: Sequence[Case], report: Report, budget: Budget, references: References) -> None:
    """A row of the suite for each entrant of each case."""
    for case in proofs:
        for row, _ in proved(case, report.suite, report, budget, references):
            print(f"{case}, {row.entrant}: right, error {row.error:.1e}", flush=True)


def only_own(own: Any, shared: Any) -> Any:
    return own


def only_shared(own: Any, shared: Any) -> Any:
    return shared


def prove(
    case: Case, entrant: Entrant, ensemble: Ensemble, reference: Reference
) -> tuple[Row, Program | None]:
    """Compile and run an entrant's program: its row, without times, and the program if its answer is right."""
    row = Row(case.name, entrant.name, ensemble.lanes, case.dtype, case.kind)
    try:
        program = entrant.build(ensemble, case.dtype, case.gradient)
        seconds, result = timed(program.run)
        again = min(seconds, timed(program.run)[0])
    except Exception as error:
        # Whatever a program breaks by, as for want of memory, the others are still to be measured.
        row.reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        return row, None
    answer = answer_of(result)
    # Kernels' machine code is made when they are first run.
    row.compile_seconds = program.compile_seconds + seconds - again
    row.temporary_bytes, row.overhead_seconds = program.temporary_bytes, program.overhead
    row.peak_bytes = peak_bytes()
    if answer.attempts is not None:
        row.attempts = [int(answer.attempts.min()), int(answer.attempts.max())]
    row.error, row.reason = check(answer, reference, case.dtype, case.gradient, entrant.tolerance)
    return row, program if row.reason is None else None


def proved(
    case: Case, rows: list[Row], report: Report, budget: Budget, references: References
) -> Iterator[tuple[Row, Program]]:
    """The programs of a case whose answers are right, with their rows; adds all rows. Skips what there is no time for."""
    if not budget.allows():
        skip(report, str(case))
        return
    try:
        reference = references.ask(case).result(timeout=budget.left())
    except TimeoutError:
        skip(report, f"{case}, waiting for the reference")
        return
    ensemble = case.make(case.lanes)
    for entrant in case.entrants:
        if not budget.allows(entrant.name):
            skip(report, f"{case}, {entrant.name}")
            continue
        seconds, (row, program) = timed(functools.partial(prove, case, entrant, ensemble, reference))
        budget.took(entrant.name, seconds)
        rows.append(row)
        if program is not None:
            yield row, program
        else:
            print(f"{case}, {entrant.name}: {row.reason}", flush=True)


def peak_bytes() -> int | None:
    """The most device memory that this process has used until now; not known on CPUs."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


# Times.


def measure(case: Case, report: Report, budget: Budget, references: References) -> None:
    """A row for each entrant of a case; only what is right is timed, all of it interleaved."""
    right = list(proved(case, report.rows, report, budget, references))
    sampled = samples([program for _, program in right], min(CASE_SECONDS, budget.left()))
    for (row, program), seconds in zip(right, sampled, strict=True):
        row.samples, row.median_seconds = len(seconds), statistics.median(seconds) + program.overhead
        print(f"{case}, {row.entrant}: {in_seconds(row.median_seconds)}", flush=True)


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
    rho = 21.0 * (np.arange(lanes) * GOLDEN % 1)
    own = np.stack([np.full(lanes, 10.0), rho, np.full(lanes, 8 / 3)], axis=-1)
    return Ensemble(problems.LORENZ.field, np.tile([1.0, 0.0, 0.0], (lanes, 1)), own, (), 0.0, 1.0, only_own)


def divergent(lanes: int) -> Ensemble:
    """Oscillators whose frequencies, and so their numbers of steps, spread twentyfold, in no order. They are damped, since a
    loss that is constant has a gradient of nothing but errors."""
    omega = 20.0 ** (np.arange(lanes) * GOLDEN % 1)
    return Ensemble(
        oscillator, np.tile([1.0, 0.0], (lanes, 1)), omega, (), 0.0, 10.0, only_own, step=pk.Adaptive(1e-5, 1e-7),
        max_steps=1024,
    )  # fmt: skip


def oscillator(t: Any, y: Any, omega: Any) -> Any:
    del t
    return jnp.stack([omega * y[1], -omega * (y[0] + 0.04 * y[1])])


def coupled(lanes: int) -> Ensemble:
    """Twelve states; the gradient by a number of each trajectory's own, and by a matrix that all share."""
    args = problems.COUPLED.args()
    own = problems.spread(args["p"], lanes, 0.3)
    y0s = problems.spread(problems.COUPLED.y0(), lanes, 0.5)
    return Ensemble(problems.COUPLED.field, y0s, own, args["w"], 0.0, problems.COUPLED.t1, _weighted)


def _weighted(own: Any, shared: Any) -> Any:
    return {"p": own, "w": shared}


def cases(runners: Sequence[Runner], rehearse: bool, alone: bool) -> list[Case]:
    """All cases, the more telling ones first: when the time is up, the others are missed less."""
    ours = [pykernels(runner) for runner in runners]
    ordered = [entrant for runner in runners for entrant in (pykernels(runner), pykernels(runner, "work"))]
    theirs = [diffrax()] if not alone and importlib.util.find_spec("diffrax") is not None else []
    replay = [gradsolve()] if not alone and importlib.util.find_spec("gradsolve") is not None else []
    dtypes, kinds = ("float32", "float64"), (True, False)
    sizes = (64, 96, 128) if rehearse else (2**16, 2**20, 2**10, 2**23, 2**13, 2**7)
    made = []
    for lanes in sizes:
        for dtype, gradient in itertools.product(dtypes, kinds):
            # A gradient by diffrax takes long to compile.
            others = theirs if lanes == sizes[0] or (lanes in sizes[:3] and not gradient) else []
            if gradient and dtype == "float64" and lanes == sizes[0]:
                others = [*others, *replay]
            made.append(Case("lorenz", lorenz, lanes, dtype, gradient, [*ours, *others]))
        if lanes == sizes[0]:
            for dtype, gradient in itertools.product(dtypes, kinds):
                entrants = ordered if gradient else [*ordered, *theirs]
                made.append(Case("divergent", divergent, lanes, dtype, gradient, entrants))
            some = 64 if rehearse else 2**13
            for dtype, gradient in itertools.product(dtypes, kinds):
                made.append(Case("coupled", coupled, some, dtype, gradient, [*ours, *theirs], shared=True))
    made += [Case("divergent", divergent, sizes[1], "float32", gradient, ordered) for gradient in kinds]
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
    skipped = sum(what.startswith("suite") for what in report.skipped)
    lines = [
        f"Numerical suite: {right} right, {len(report.suite) - right} wrong, {skipped} skipped.",
        "",
        "| case | dtype | kind | program | time | ns per trajectory | compile | temporaries | error | attempts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(report.rows, key=lambda r: (r.case.split()[0], r.dtype, r.kind, r.lanes, r.entrant)):
        lines.append(f"| {' | '.join(_cells(row))} |")
    peak = max((row.peak_bytes or 0 for row in (*report.suite, *report.rows)), default=0)
    lines += ["", f"Device memory, at most: {in_bytes(peak) if peak else 'not known'}."]
    lines += [f"Skipped: {what}." for what in report.skipped]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    head = [row.case, row.dtype, row.kind, row.entrant]
    if row.median_seconds is None:
        return [*head, f"none: {row.reason or 'not timed'}", "", "", "", "", ""]
    times = [in_seconds(row.median_seconds), f"{row.median_seconds / row.lanes * 1e9:.3g}"]
    compile_time = "" if row.compile_seconds is None else in_seconds(row.compile_seconds)
    size = "" if row.temporary_bytes is None else in_bytes(row.temporary_bytes)
    attempts = "" if row.attempts is None else f"{row.attempts[0]} to {row.attempts[1]}"
    return [*head, *times, compile_time, size, f"{row.error:.1e}", attempts]


if __name__ == "__main__":
    sys.exit(main())
