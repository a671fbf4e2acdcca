"""The registry of what is measured: problems, most of them `tests/problems.py`'s, at any size, and the cases made of them.

`cases()` are the rows of `side_by_side.py`; `PROBLEMS` are the families that `report.py` takes its entries from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import problems

from bench.written import FIELDS

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

    `hand_steps`: how many steps of the classical Runge-Kutta method reach a similar error. `written`: the name under which
    `written.py` has the field for others than JAX. `stiff`: implicit methods enter too. If the state repeats itself
    `repeats` times along its only axis, `cell` is the problem of one of them: its solution is known at any size.
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
    max_steps: int = 4096
    hand_steps: int = 64
    checkpoints: tuple[int | None, ...] = (
        CHECKPOINTS  # tried for diffrax's gradient, of which the fastest counts
    )
    written: str | None = None
    stiff: bool = False
    cell: Problem | None = None
    repeats: int = 1

    @property
    def accepted_error(self) -> float:
        """How far states and gradients may be from the reference, of its largest value, before a program counts as wrong: a
        thousand times the tolerance of a step, as errors add up and grow; never more than 5 %. Fixed steps are so small that
        their errors are below that too."""
        rounding = 1e3 * float(np.finfo(self.dtype).eps)
        return max(min(1e3 * (self.rtol if self.fixed_steps is None else 1e-8), 0.05), rounding)

    @property
    def lanes(self) -> int:
        """The number of trajectories."""
        return 1 if self.alone else len(jax.tree.leaves(self.inputs()[0])[0])

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


def anew(problem: problems.Problem) -> Callable[[], Field]:
    """A problem's field as a new function each time."""
    return lambda: lambda t, y, args: problem.field(t, y, args)


lorenz = anew(problems.LORENZ)
perceptron = anew(problems.PERCEPTRON)


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


def perceptron_inputs(trajectories: int) -> tuple[Any, Any]:
    return np.random.default_rng(3).normal(size=(trajectories, 2)), problems.PERCEPTRON.args()


def one_lorenz() -> tuple[Any, Any]:
    return problems.LONG_HORIZON.y0(), problems.LONG_HORIZON.args()


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


def lorenz_ensemble(trajectories: int) -> Problem:
    """Parameters from a stable to an almost chaotic system."""
    return Problem(
        lorenz, lambda: lorenz_inputs(trajectories), "float64", t1=1.0, atol=1e-9, hand_steps=128, written="lorenz"
    )  # fmt: skip


def around(
    problem: problems.Problem, trajectories: int, *, hand_steps: int = 64, scale: float = 0.05
) -> Problem:
    """Trajectories around one of the tests' problems, with arguments of their own."""

    def inputs() -> tuple[Any, Any]:
        return problems.spread(problem.y0(), trajectories, scale), problems.spread(
            problem.args(), trajectories, scale, 1
        )

    return Problem(
        anew(problem), inputs, "float64", t1=problem.t1, atol=1e-9, hand_steps=hand_steps,
        written=problem.name if problem.name in FIELDS else None,
    )  # fmt: skip


def divergent(trajectories: int) -> Problem:
    """Frequencies, and so numbers of steps, that spread twentyfold, in no order."""

    def inputs() -> tuple[Any, Any]:
        omega = np.random.default_rng(0).permutation(np.geomspace(1.0, 20.0, trajectories))
        return np.tile(problems.DIVERGENT.y0(), (trajectories, 1)), omega

    return Problem(anew(problems.DIVERGENT), inputs, "float64", t1=10.0, atol=1e-9, hand_steps=2048)


def neural_field(trajectories: int) -> Problem:
    """A perceptron whose weights all trajectories share: its gradient is a sum over them."""
    return Problem(
        perceptron, lambda: perceptron_inputs(trajectories), "float64", t1=4.0, atol=1e-9, shared_args=True
    )


def large_neural_field(trajectories: int) -> Problem:
    """Layers of 2-128-128-2: nearly all work is in products with matrices."""
    args = problems._perceptron_args(hidden=128)
    return Problem(
        perceptron, lambda: (perceptron_inputs(trajectories)[0], args), "float64", t1=1.0, rtol=1e-5, atol=1e-7,
        shared_args=True,
    )  # fmt: skip


def fisher_ensemble(trajectories: int) -> Problem:
    """Rings of 16 sites."""

    def inputs() -> tuple[Any, Any]:
        y0 = problems.fisher_wave(16)
        return problems.spread(y0, trajectories), problems.spread(
            problems.REACTION_DIFFUSION.args(), trajectories
        )

    return Problem(anew(problems.REACTION_DIFFUSION), inputs, "float64", t1=2.0, atol=1e-9, hand_steps=32)


def fisher_ring(sites: int) -> Problem:
    """One ring, of any number of sites."""

    def inputs() -> tuple[Any, Any]:
        return problems.fisher_wave(sites), problems.REACTION_DIFFUSION.args()

    repeats = max(sites // 64, 1)
    return Problem(
        anew(problems.REACTION_DIFFUSION), inputs, "float64", t1=2.0, atol=1e-9, alone=True, hand_steps=32,
        cell=fisher_ring(64) if repeats > 1 else None, repeats=repeats, max_steps=256,
    )  # fmt: skip


def _brusselator(t: Any, y: Any, args: Any) -> Any:
    """Two concentrations on a torus, 32 sites around one way; the state is flat, site after site."""
    u, v = jnp.moveaxis(y.reshape(-1, 32, 2), -1, 0)

    def laplacian(x: Any) -> Any:
        return sum(jnp.roll(x, by, axis) for axis in (0, 1) for by in (-1, 1)) - 4 * x

    rate = u * u * v
    slopes = (
        args[0] + rate - (args[1] + 1) * u + args[2] * laplacian(u),
        args[1] * u - rate + args[2] * laplacian(v),
    )
    return jnp.stack(slopes, axis=-1).reshape(-1)


def brusselator(sites: int) -> Problem:
    """Prigogine and Lefever's reaction on a torus of so many sites, whose initial values repeat every 32 x 32 of them."""
    repeats = max(sites // 1_024, 1)

    def inputs() -> tuple[Any, Any]:
        x, y = np.meshgrid(*[2 * np.pi * np.arange(n) / 32 for n in (32 * repeats, 32)], indexing="ij")
        state = np.stack([1 + 0.3 * np.sin(x) * np.cos(y), 3 + 0.2 * np.cos(x - 2 * y)], axis=-1)
        return state.reshape(-1), np.array([1.0, 3.0, 0.2])

    return Problem(
        lambda: lambda t, y, args: _brusselator(t, y, args), inputs, "float64", t1=1.0, atol=1e-9, alone=True,
        cell=brusselator(1_024) if repeats > 1 else None, repeats=repeats, max_steps=256,
    )  # fmt: skip


def long_horizon(steps: int) -> Problem:
    """One trajectory over so many fixed steps."""
    return Problem(
        lorenz, one_lorenz, "float64", fixed_steps=steps, fixed_step=SMALL_FIXED_STEP, alone=True, hand_steps=steps,
        max_steps=steps, checkpoints=(None,),
    )  # fmt: skip


def single(_: int = 1) -> Problem:
    """One Lorenz trajectory, so little work that what surrounds a solve decides."""
    return Problem(
        lorenz, one_lorenz, "float64", t1=1.0, atol=1e-9, alone=True, hand_steps=128, written="lorenz"
    )


def stiff(trajectories: int) -> Problem:
    """Time constants of about 1e-4 over a span of 2: stability, not accuracy, bounds explicit methods' steps."""

    def inputs() -> tuple[Any, Any]:
        return np.zeros((trajectories, 1)), problems.spread(problems.STIFF.args(), trajectories)

    return Problem(
        anew(problems.STIFF), inputs, "float64", t1=2.0, atol=1e-6, hand_steps=8192, max_steps=16384, stiff=True,
        written="stiff",
    )  # fmt: skip


#: Families of problems by name: each makes the problem of so many trajectories ("long horizon": steps; "ring": sites).
PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "Lorenz": lorenz_ensemble,
    "Lotka-Volterra": lambda n: around(problems.LOTKA_VOLTERRA, n, hand_steps=128),
    "SIR": lambda n: around(problems.SIR, n, hand_steps=160),
    "Kepler": lambda n: around(problems.KEPLER, n, hand_steps=160, scale=0.02),
    "12 dense states": lambda n: Problem(
        dense(12), lambda: dense_inputs(12, n), "float64", t1=3.0, atol=1e-9
    ),
    "divergent": divergent,
    "neural field": neural_field,
    "reaction-diffusion": fisher_ensemble,
    "long horizon": long_horizon,
    "ring": fisher_ring,
    "Brusselator": brusselator,
    "single": single,
    "large neural field": large_neural_field,
    "stiff": stiff,
}
