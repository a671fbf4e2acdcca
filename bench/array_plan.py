"""The array plan on whole solves: steps of a large reaction-diffusion system, neural ODEs, and the memory of a gradient.

    python bench/array_plan.py                       everything, some minutes on two cores
    python bench/array_plan.py --only steps neural   parts: steps, neural, memory
    python bench/array_plan.py --quick               a smoke test at tiny sizes, no figures worth keeping

Both libraries get the same field, method (tsit5), tolerances and first step; their answers are compared before anything is
timed, and a disagreement ends the run with status 1. Programs of a table are interleaved, times are medians, ratios those of
medians. diffrax's gradients run at the fastest of its checkpoint settings.

steps: a Brusselator on a rectangle, two concentrations in float32, adaptive steps: the difference between solves of many and
of few steps. The floor is six evaluations of the field, each in a loop of its own, and the bytes that the passes of a step
must move at 60 % of the fastest of three copies on all cores. neural: 256 trajectories of a field 2-64-64-2.
memory: the gradient of the Brusselator with milestones, in a process of its own: XLA's temporaries and the resident set, in
states; the gradient against forward sensitivities in one direction.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from step_kernels import PASSES_PER_CALL, copies

import pykernels as pk

# Of an adaptive tsit5 step: operands read and results written by five stages, the last one with the error's known part, the
# norm, and the acceptance of the new state and slope.
PASSES_OF_A_STEP = 3 + 4 + 5 + 6 + 7 + 9 + 4 + 4
CHECKPOINTS = (None, 8, 16, 32, 101)


class Setting(NamedTuple):
    repeats: int
    grid: tuple[int, int]  # two concentrations on it
    trajectories: int
    width: int  # of the neural field
    grids_of_memory: tuple[tuple[int, int], ...]


FULL = Setting(7, (1000, 2000), 256, 64, ((500, 1000), (1000, 2000)))
QUICK = Setting(1, (40, 50), 8, 8, ((40, 50),))


def medians(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        jax.block_until_ready(program())
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def agree(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
        if not error <= tolerance:
            print(f"{what}: the answers differ by {error:.2g}", file=sys.stderr)
            raise SystemExit(1)


# Reaction and diffusion.


def laplacian(u: jax.Array, edge: jax.Array) -> jax.Array:
    def shifted(axis: int, by: int) -> jax.Array:
        padding = [(0, 0, 0)] * 2
        padding[axis] = (by, -by, 0)
        return lax.pad(u, edge, padding)

    return shifted(0, 1) + shifted(0, -1) + shifted(1, 1) + shifted(1, -1) - 4 * u


def brusselator(t: jax.Array, y: Any, p: Any) -> Any:
    """On a rectangle at whose edges the concentrations are those of the steady state."""
    del t
    u, v = y
    a, b, d = p
    rate = u * u * v
    return a + rate - (b + 1) * u + d * laplacian(u, a), b * u - rate + d * laplacian(v, b / a)


def concentrations(grid: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    x, y = np.linspace(0, 30, grid[0])[:, None], np.linspace(0, 50, grid[1])[None]
    u, v = 1 + 0.3 * np.sin(x) * np.cos(y), 3 + 0.2 * np.cos(x - y)
    rates = tuple(jnp.asarray(r, dtype) for r in (1.0, 3.0, 0.1))
    return (jnp.asarray(u, dtype), jnp.asarray(v, dtype)), rates


STEP = 2.0**-6  # stable, and no step is rejected


def steps(setting: Setting) -> None:
    y0, rates = concentrations(setting.grid, np.float32)
    elements = 2 * math.prod(setting.grid)
    few, many = 4, 20

    def ours(y0: Any, n: int, runner: str | None) -> Any:
        sol = pk.solve(
            brusselator, y0, 0.0, n * STEP, rates, step=pk.Adaptive(1e-2, 1e-2, dtmax=STEP), dt0=STEP,
            adjoint=pk.ForwardOnly(), config=pk.Config(plan="array", runner=runner),
        )  # fmt: skip
        return sol.ys, sol.stats.attempts

    def theirs(y0: Any, n: int) -> Any:
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(brusselator), diffrax.Tsit5(), 0.0, n * STEP, STEP, y0, rates, adjoint=diffrax.ForwardMode(),
            stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-2, dtmax=STEP),
        )  # fmt: skip
        return jax.tree.map(lambda leaf: leaf[0], sol.ys), sol.stats["num_steps"]

    def evaluations(y0: Any, n: int) -> Any:
        def once(_: int, y: Any) -> Any:  # reads and writes what an evaluation does
            return jax.tree.map(lambda a, k: a + 1e-3 * k, y, brusselator(jnp.float32(0.0), y, rates))

        return lax.fori_loop(0, n, once, y0)

    compiled: dict[str, Callable[..., Any]] = {
        "pykernels": jax.jit(lambda y, n: ours(y, n, None), static_argnums=1),
        "pykernels, runner xla": jax.jit(lambda y, n: ours(y, n, "xla"), static_argnums=1),
        "diffrax": jax.jit(theirs, static_argnums=1),
        "field": jax.jit(evaluations, static_argnums=1),
    }
    (mine, attempts), (other, taken) = (compiled[name](y0, many) for name in ("pykernels", "diffrax"))
    agree("a large state", mine, other, 1e-5)
    assert int(attempts) == int(taken) == many, "each library makes these attempts"
    # The field stays bounded: six evaluations are as many small Euler steps.
    counts = {name: (6 * few, 6 * many) if name == "field" else (few, many) for name in compiled}
    programs = {
        f"{name} {n}": (lambda f=function, n=n: f(y0, n))
        for name, function in compiled.items()
        for n in counts[name]
    }
    copying = copies(elements, np.float32, len(os.sched_getaffinity(0)))
    times = medians({**programs, **copying}, setting.repeats)
    bandwidth = 2 * 4 * elements * PASSES_PER_CALL / min(times[name] for name in copying)
    each = {
        name: (times[f"{name} {b}"] - times[f"{name} {a}"]) / (many - few) for name, (a, b) in counts.items()
    }
    moved = PASSES_OF_A_STEP * elements * 4
    floor = each["field"] + moved / (0.6 * bandwidth)
    print(f"\nOne adaptive step of {elements:,} float32 states; a copy moves {bandwidth / 1e9:.3g} GB/s.\n")
    print("| | ms a step | pykernels' ratio | |\n| --- | --- | --- | --- |")
    for name in ("pykernels", "pykernels, runner xla", "diffrax"):
        print(f"| {name} | {1e3 * each[name]:.3g} | {each[name] / each['pykernels']:.3g} | |")
    print(f"| six evaluations of the field | {1e3 * each['field']:.3g} | | |")
    print(
        f"| with {moved / 1e6:.4g} MB at 60 % of a copy | {1e3 * floor:.3g} | | a step takes "
        f"{each['pykernels'] / floor:.3g} of it (wanted: at most 1.25; diffrax 1.7) |"
    )


# Neural ODEs.


def perceptron(t: jax.Array, y: jax.Array, layers: Any) -> jax.Array:
    del t
    *hidden, (weight, bias) = layers
    for w, b in hidden:
        y = jnp.tanh(w @ y + b)
    return weight @ y + bias


def network(width: int) -> Any:
    rng = np.random.default_rng(0)
    return [
        (
            jnp.asarray(rng.normal(size=(after, before)) / np.sqrt(before), jnp.float32),
            jnp.asarray(0.1 * rng.normal(size=after), jnp.float32),
        )
        for before, after in itertools.pairwise((2, width, width, 2))
    ]


def neural(setting: Setting) -> None:
    print(
        f"\nNeural ODE 2-{setting.width}-{setting.width}-2, {setting.trajectories} trajectories, float32, value and gradient"
        " with respect to the weights.\n"
    )
    titles = ("steps", "pykernels", "own forward", "of it", "diffrax", "ratio", "wanted", "plan lanes")
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|")
    _neural(setting, "100 fixed", pk.Fixed(100), 4.0, 1e-4, "2.2 and at most 5.5 of its own forward")
    _neural(setting, "adaptive, rtol 1e-5", pk.Adaptive(1e-5, 1e-5), 4.0, 1e-3, "3")


def _neural(
    setting: Setting, name: str, step: pk.Fixed | pk.Adaptive, end: float, tolerance: float, wanted: str
) -> None:
    layers = network(setting.width)
    starts = np.random.default_rng(1).normal(size=(setting.trajectories, 2))
    y0s = jnp.asarray(starts, jnp.float32)
    fixed = isinstance(step, pk.Fixed)

    def ours(plan: str) -> Callable[[Any], jax.Array]:
        def loss(layers: Any) -> jax.Array:
            sols = pk.solve_ensemble(
                perceptron, y0s, 0.0, end, layers, step=step, dt0=None if fixed else 0.01,
                config=pk.Config(plan=plan),  # type: ignore[arg-type]
            )  # fmt: skip
            return jnp.sum(sols.ys**2)

        return loss

    def theirs(checkpoints: int | None) -> Callable[[Any], jax.Array]:
        def loss(layers: Any) -> jax.Array:
            controller = (
                diffrax.ConstantStepSize()
                if isinstance(step, pk.Fixed)
                else diffrax.PIDController(rtol=step.rtol, atol=step.atol)
            )

            def one(y0: jax.Array) -> jax.Array:
                return diffrax.diffeqsolve(
                    diffrax.ODETerm(perceptron), diffrax.Tsit5(), 0.0, end,
                    end / step.size if isinstance(step, pk.Fixed) else 0.01, y0, layers, max_steps=101 if fixed else 4096,
                    stepsize_controller=controller, adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints),
                ).ys[0]  # fmt: skip

            return jnp.sum(jax.vmap(one)(y0s) ** 2)

        return loss

    def gradient(loss: Callable[[Any], jax.Array]) -> Callable[[], Any]:
        compiled = jax.jit(jax.value_and_grad(loss))
        return lambda: compiled(layers)

    forward = jax.jit(ours("array"))
    programs: dict[str, Callable[[], Any]] = {
        "array": gradient(ours("array")),
        "forward": lambda: forward(layers),
        "lanes": gradient(ours("lanes")),
    }
    candidates = {f"diffrax {c}": gradient(theirs(c)) for c in CHECKPOINTS}
    answer = programs["array"]()
    for other in (programs["lanes"], *candidates.values()):
        agree(name, answer, other(), tolerance)
    quick = medians(candidates, min(setting.repeats, 3))
    best = min(quick, key=lambda key: quick[key])
    times = medians({**programs, best: candidates[best]}, 3 * setting.repeats)
    array, ms = times["array"], {key: f"{1e3 * value:.3g} ms" for key, value in times.items()}
    print(
        f"| {name} | {ms['array']} | {ms['forward']} | {array / times['forward']:.3g} | {ms[best]} ({best.split()[1]} "
        f"checkpoints) | {times[best] / array:.3g} | {wanted} | {ms['lanes']} |",
        flush=True,
    )


# Memory.


def memory(setting: Setting) -> None:
    print("\nGradient of the Brusselator with milestones: memory in states.\n")
    titles = (
        "states", "milestones + scratch", "XLA's temporaries", "beyond milestones and scratch", "resident set", "attempts",
        "gradient / forward", "against sensitivities",
    )  # fmt: skip
    print(f"| {' | '.join(titles)} |\n{'| --- ' * len(titles)}|")
    for grid, storage in itertools.product(setting.grids_of_memory, ((5, 8), (9, 8), (17, 16))):
        arguments = json.dumps({"grid": grid, "storage": storage, "check": storage == (9, 8)})
        command = [sys.executable, __file__, "--measure-memory", arguments]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def measure_memory(grid: tuple[int, int], storage: tuple[int, int], check: bool) -> None:
    """A line of the table, for a process of its own."""
    y0, rates = concentrations(grid, np.float32)
    state = 2 * math.prod(grid) * 4
    settings: Any = {
        "step": pk.Adaptive(1e-4, 1e-4, dtmax=STEP),
        "dt0": STEP,
        "config": pk.Config(plan="array"),
    }
    count, scratch = storage
    attempts = 32

    def loss(y0: Any, rates: Any, adjoint: Any) -> Any:
        sol = pk.solve(
            brusselator,
            y0,
            0.0,
            attempts * STEP,
            rates,
            adjoint=adjoint,
            max_steps=count * scratch,
            **settings,
        )
        return sum(jnp.mean(leaf**2) for leaf in sol.ys), sol.stats.attempts

    value = jax.jit(lambda y0, rates: loss(y0, rates, pk.ForwardOnly()))
    adjoint = pk.Milestones(count, scratch)
    gradient = jax.jit(jax.grad(lambda y0, rates: loss(y0, rates, adjoint), (0, 1), has_aux=True))
    compiled = gradient.lower(y0, rates).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / state
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got, taken = jax.block_until_ready(compiled(y0, rates))
    resident = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / state
    slots = (count + 1) | 1
    times = medians({"gradient": lambda: compiled(y0, rates), "forward": lambda: value(y0, rates)}, 3)
    error = "-"
    if check:
        rng = np.random.default_rng(0)
        along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), (y0, rates))

        def tangent(along: Any) -> Any:
            return jax.jvp(lambda *a: loss(*a, pk.ForwardOnly())[0], (y0, rates), along)[1]

        want = float(jax.jit(tangent)(along))
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(along), strict=True)
        inner = [np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
        error = f"{abs(sum(inner) - want) / abs(want):.1e}"
    print(
        f"| {2 * math.prod(grid):,} | {slots} + {scratch} | {temporaries:.4g} | {temporaries - slots - scratch:.4g} | "
        f"{resident:.4g} | {int(taken)} | {times['gradient'] / times['forward']:.3g} | {error} |"
    )


PARTS = {"steps": steps, "neural": neural, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        given = json.loads(options.measure_memory)
        measure_memory(tuple(given["grid"]), tuple(given["storage"]), given["check"])
        return
    for part in options.only:
        PARTS[part](QUICK if options.quick else FULL)
    if options.quick:
        print("\nTiny sizes: a smoke test and no measurement.")


if __name__ == "__main__":
    main()
