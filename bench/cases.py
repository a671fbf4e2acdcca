"""The benchmark's problems, each as one compiled program of pykernels and one of diffrax that do the same work.

Both libraries get the same field, method (tsit5), tolerances, first step and loss. A comparison is only worth its time if
both answers are right, so every pair passes `disagreement` before it is timed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk

Field = Callable[[Any, Any, Any], Any]

# diffrax starts with 0.01 when it is given no first step.
FIRST_STEP = 0.01
# A power of two: n steps of it end at n * FIXED_STEP exactly, in float32 too, so both libraries take exactly n.
FIXED_STEP = 2.0**-7
SMALL_FIXED_STEP = 2.0**-20
# Settings of diffrax's checkpointed adjoint among which a gradient's fastest is taken; None is its default.
CHECKPOINTS = (None, 8, 16, 32, 64)


@dataclass(frozen=True)
class Problem:
    """An ensemble with one loss, the sum of squares of the final states, differentiated with respect to the arguments.

    `field` makes a new field function, so that a compile time never profits from an earlier trace. `inputs` are NumPy
    (y0s, args) in float64 with trajectories first; `shared_args` have no trajectory axis; `alone` is a single trajectory.
    With `fixed_steps` of size `fixed_step` nothing is adaptive and `t1`, `rtol`, `atol` do not matter.
    """

    field: Callable[[], Field]
    inputs: Callable[[], tuple[Any, Any]]
    dtype: str
    t1: float = 10.0
    rtol: float = 1e-6
    atol: float = 1e-6
    fixed_steps: int | None = None
    fixed_step: float = FIXED_STEP
    shared_args: bool = False
    alone: bool = False

    @property
    def end(self) -> float:
        """The time of the final state."""
        return self.t1 if self.fixed_steps is None else self.fixed_steps * self.fixed_step

    def arrays(self) -> tuple[Any, Any]:
        """(y0s, args) on the device, in the problem's dtype."""
        return jax.tree.map(lambda a: jnp.asarray(a, self.dtype), self.inputs())


@dataclass(frozen=True)
class Case:
    """A line of the table. `floor` and `native_floor` are how many times faster than diffrax the portable and the native
    runner are meant to be at least."""

    name: str
    problem: Problem
    gradient: bool
    floor: float
    native_floor: float
    compile_only: bool = False
    quick: Problem | None = None  # the same at a size for a smoke test; None: not part of it
    checkpoints: tuple[int | None, ...] = CHECKPOINTS  # tried for diffrax's gradient


@dataclass(frozen=True)
class Program:
    """A compiled program with its inputs. `run` waits for the result: ((loss or None, (ys, attempts)), gradient or None)."""

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int


def lorenz() -> Field:
    def field(t: Any, y: Any, p: Any) -> Any:
        del t
        return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])

    return field


def lorenz_inputs(trajectories: int) -> tuple[Any, Any]:
    rho = np.linspace(0.0, 21.0, trajectories)
    p = np.stack([np.full(trajectories, 10.0), rho, np.full(trajectories, 8 / 3)], axis=-1)
    return np.tile([1.0, 0.0, 0.0], (trajectories, 1)), p


def dense(states: int) -> Callable[[], Field]:
    """p * (W @ tanh(y)) - y, with a random matrix of spectral radius about 1.2 shared by all trajectories."""
    matrix = np.random.default_rng(states).normal(size=(states, states)) * 1.2 / np.sqrt(states)

    def make() -> Field:
        def field(t: Any, y: Any, p: Any) -> Any:
            del t
            return p * (jnp.asarray(matrix, y.dtype) @ jnp.tanh(y)) - y

        return field

    return make


def dense_inputs(states: int, trajectories: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(states + 1)
    return rng.normal(size=(trajectories, states)), rng.uniform(0.5, 1.5, size=(trajectories, states))


def perceptron() -> Field:
    def field(t: Any, y: Any, layers: Any) -> Any:
        del t
        for weight, bias in layers[:-1]:
            y = jnp.tanh(weight @ y + bias)
        weight, bias = layers[-1]
        return weight @ y + bias

    return field


def perceptron_inputs(trajectories: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(3)
    sizes = (2, 16, 16, 2)
    layers = [
        (rng.normal(size=(m, n)) / np.sqrt(n), 0.1 * rng.normal(size=m)) for n, m in itertools.pairwise(sizes)
    ]
    return rng.normal(size=(trajectories, 2)), layers


def one_lorenz() -> tuple[Any, Any]:
    return np.array([1.0, 0.0, 0.0]), np.array([10.0, 14.0, 8 / 3])


def cases() -> list[Case]:
    """All cases, in the order of the table."""
    rows = []
    for n in (1_024, 16_384):
        problem = Problem(lorenz, lambda n=n: lorenz_inputs(n), "float32")
        quick = replace(problem, inputs=lambda: lorenz_inputs(32), t1=1.0) if n == 1_024 else None
        rows.append(
            Case(
                f"forward, Lorenz adaptive, {n:,} trajectories, float32", problem, False, 15, 80, quick=quick
            )
        )
    fixed = Problem(lorenz, lambda: lorenz_inputs(1_024), "float32", fixed_steps=1_000)
    quick = replace(fixed, inputs=lambda: lorenz_inputs(32), fixed_steps=50)
    rows.append(
        Case(
            "forward, Lorenz 1,000 fixed steps, 1,024 trajectories, float32",
            fixed,
            False,
            20,
            20,
            quick=quick,
        )
    )
    for dtype, floor, native in (("float64", 5, (50, 85)), ("float32", 9, (85, 130))):
        for n, native_floor in zip((1_024, 8_192), native, strict=True):
            problem = Problem(lorenz, lambda n=n: lorenz_inputs(n), dtype, t1=1.0, atol=1e-9)
            small = dtype == "float32" and n == 1_024
            quick = replace(problem, inputs=lambda: lorenz_inputs(32), t1=0.2) if small else None
            name = f"gradient, Lorenz adaptive, {n:,} trajectories, {dtype}"
            rows.append(Case(name, problem, True, floor, native_floor, quick=quick))
    million = Problem(
        lorenz, one_lorenz, "float64", fixed_steps=1_000_000, fixed_step=SMALL_FIXED_STEP, alone=True
    )
    # diffrax's default only: fewer checkpoints over so many steps mean more recomputation, and a run takes half a minute.
    name = "gradient, Lorenz 1,000,000 fixed steps, one trajectory, float64"
    quick = replace(million, fixed_steps=1_000)
    rows.append(Case(name, million, True, 8, 30, quick=quick, checkpoints=(None,)))
    for n, native in ((12, (9, 20)), (24, (5, 10))):
        for gradient, dtype, floor in ((False, "float32", 3), (True, "float64", 4)):
            problem = Problem(dense(n), lambda n=n: dense_inputs(n, 1_024), dtype, atol=1e-9)
            what = "gradient" if gradient else "forward"
            small = n == 12 and not gradient
            # Few trajectories: rounding may not decide, as it does in float32 at the full tolerances.
            small_problem = replace(
                problem, inputs=lambda n=n: dense_inputs(n, 32), t1=1.0, rtol=1e-4, atol=1e-6
            )
            quick = small_problem if small else None
            name = f"{what}, {n} dense states adaptive, 1,024 trajectories, {dtype}"
            rows.append(Case(name, problem, gradient, floor, native[gradient], quick=quick))
    compiled = {
        "Lorenz": Problem(lorenz, lambda: lorenz_inputs(64), "float64", t1=1.0, atol=1e-9),
        "24 dense states": Problem(dense(24), lambda: dense_inputs(24, 64), "float64", t1=1.0, atol=1e-9),
        "perceptron 2-16-16-2": Problem(
            perceptron, lambda: perceptron_inputs(64), "float64", t1=1.0, atol=1e-9, shared_args=True
        ),
    }
    for name, problem in compiled.items():
        quick = problem if name.startswith("perceptron") else None
        rows.append(
            Case(f"compile, gradient, {name}, float64", problem, True, 2, 2, True, quick, checkpoints=(None,))
        )
    alone = Problem(lorenz, one_lorenz, "float64", atol=1e-9, alone=True)
    for gradient in (False, True):
        what = "gradient" if gradient else "forward"
        quick = None if gradient else alone
        rows.append(
            Case(f"{what}, Lorenz adaptive, one trajectory, float64", alone, gradient, 1, 1, quick=quick)
        )
    return rows


def selected(only: str = "", quick: bool = False) -> list[Case]:
    """The cases whose name contains `only`, at their smoke test's size if `quick`."""
    chosen = [case for case in cases() if only in case.name]
    if not quick:
        return chosen
    return [
        replace(case, name=f"SMALL {case.name}", problem=case.quick, checkpoints=case.checkpoints[:1])
        for case in chosen
        if case.quick is not None
    ]


def pykernels_program(problem: Problem, gradient: bool, config: pk.Config | None = None) -> Program:
    """pykernels with its default adjoint and, unless told otherwise, its own choice of how to run."""
    field = problem.field()
    adaptive = problem.fixed_steps is None
    settings: dict[str, Any] = {
        "step": pk.Adaptive(problem.rtol, problem.atol) if adaptive else pk.Fixed(problem.fixed_steps),
        "dt0": FIRST_STEP if adaptive else None,
        "config": config,
    }

    def final(y0s: Any, args: Any) -> Any:
        if problem.alone:
            solution = pk.solve(field, y0s, 0.0, problem.end, args, **settings)
        else:
            in_axes = (0, None if problem.shared_args else 0)
            solution = pk.solve_ensemble(field, y0s, 0.0, problem.end, args, in_axes=in_axes, **settings)
        return solution.ys, solution.stats.attempts

    return _compiled(final, problem, gradient)


def diffrax_program(problem: Problem, gradient: bool, checkpoints: int | None = None) -> Program:
    """diffrax under `jax.vmap`, with its checkpointed adjoint; `checkpoints` matters to gradients only."""
    term = diffrax.ODETerm(problem.field())
    if problem.fixed_steps is None:
        controller = diffrax.PIDController(rtol=problem.rtol, atol=problem.atol)
        first, max_steps = FIRST_STEP, 4096
    else:
        controller = diffrax.ConstantStepSize()
        first, max_steps = problem.fixed_step, problem.fixed_steps

    def one(y0: Any, args: Any) -> Any:
        solution = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, problem.end, first, y0, args,
            stepsize_controller=controller, max_steps=max_steps, throw=False,
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints),
        )  # fmt: skip
        values = solution.ys
        assert values is not None
        return values[0], solution.stats["num_steps"]

    final = one if problem.alone else jax.vmap(one, in_axes=(0, None if problem.shared_args else 0))
    return _compiled(final, problem, gradient)


def _compiled(final: Callable[[Any, Any], Any], problem: Problem, gradient: bool) -> Program:
    """Trace, lower and compile with nothing left in JAX's caches, which is what a user waits for."""

    def loss(args: Any, y0s: Any) -> Any:
        ys, attempts = final(y0s, args)
        return jnp.sum(ys**2), (ys, attempts)

    def forward(args: Any, y0s: Any) -> Any:
        return (None, final(y0s, args)), None

    # float32 programs are traced with float64 off, as their users would run them.
    with jax.enable_x64(problem.dtype == "float64"):
        y0s, args = problem.arrays()
        jax.clear_caches()
        start = time.perf_counter()
        compiled = (
            jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else forward)
            .lower(args, y0s)
            .compile()
        )
        seconds = time.perf_counter() - start

    def run() -> Any:
        return jax.block_until_ready(compiled(args, y0s))

    return Program(run, seconds, compiled.memory_analysis().temp_size_in_bytes)


def disagreement(case: Case, ours: Any, theirs: Any) -> str | None:
    """Why the two results of a case may not be compared, None if they may.

    They must have made the same attempts: exactly in float64, where both follow the same decisions, and within
    2 % in float32, where rounding may turn a borderline one. In float64 the results agree to 1e-9 of the largest
    value (both round differently, and some trajectories amplify that). In float32 each is held against the
    float64 solution with the same settings: ours may be no further from it than three times diffrax's distance,
    or 32 roundings.
    """
    attempts, their_attempts = (int(np.sum(np.asarray(result[0][1][1]))) for result in (ours, theirs))
    is_double = case.problem.dtype == "float64"
    if abs(attempts - their_attempts) > (0 if is_double else 0.02 * their_attempts):
        return f"different work: {attempts} attempts here, {their_attempts} in diffrax"
    mine, other = _values(ours), _values(theirs)
    if not all(np.all(np.isfinite(a)) for a in (*mine, *other)):
        return "not finite"
    if is_double:
        distances = [np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(mine, other, strict=True)]
        return f"distance from diffrax {max(distances):.1e}" if max(distances) > 1e-9 else None
    exact = _values(diffrax_program(replace(case.problem, dtype="float64"), case.gradient).run())
    for a, b, c in zip(mine, other, exact, strict=True):
        scale = np.max(np.abs(c))
        error, their_error = np.max(np.abs(a - c)) / scale, np.max(np.abs(b - c)) / scale
        if error > max(3 * their_error, 32 * np.finfo(np.float32).eps):
            return f"error {error:.1e}, diffrax's {their_error:.1e}"
    return None


def _values(result: Any) -> list[np.ndarray]:
    """Loss, final states and gradient as float64 arrays."""
    (loss, (ys, _)), gradient = result
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((loss, ys, gradient))]
