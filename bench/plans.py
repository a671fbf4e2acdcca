"""The lanes plan against the array plan, from which `solve.py` takes the sizes at which it changes over.

    python bench/plans.py [--fields perceptron ring] [--rows 1 256]        (some minutes)
    python bench/plans.py --layouts                                        a minute

Per field and number of trajectories: operations of one evaluation and state elements; for either plan the median run of the
forward solve and of the gradient, and the gradient's compile time (tracing and machine code included); which plan is faster,
and the default's choice. Runs alternate between the plans.

Layouts: fields of products with shared matrices in the array plan, with the trajectories' axis first and last, from which
`array_plan.py` takes the sizes at which it changes over.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pykernels as pk
from pykernels import array_plan

STEPS = 20
PLANS = ("lanes", "array")


class Field(NamedTuple):
    """A field of one size, with inputs for so many trajectories."""

    field: Callable[..., Any]
    y0s: jax.Array
    args: Any


def layers(widths: tuple[int, ...], rows: int) -> Field:
    """A neural field with shared weights."""
    rng = np.random.default_rng(0)
    weights = [
        (
            jnp.asarray(rng.normal(size=(b, a)) / np.sqrt(a), jnp.float32),
            jnp.asarray(0.1 * rng.normal(size=b), jnp.float32),
        )
        for a, b in itertools.pairwise(widths)
    ]

    def field(t, y, weights):
        *hidden, (w, b) = weights
        for matrix, bias in hidden:
            y = jnp.tanh(matrix @ y + bias)
        return w @ y + b

    return Field(field, jnp.asarray(rng.normal(size=(rows, widths[0])), jnp.float32), weights)


def perceptron(width: int, rows: int) -> Field:
    """2-width-width-2."""
    return layers((2, width, width, 2), rows)


def ring(cells: int, rows: int) -> Field:
    """Fitzhugh-Nagumo cells that diffuse around a ring: elementwise, and two shifts."""
    rng = np.random.default_rng(0)

    def field(t, y, p):
        v, w = y[:cells], y[cells:]
        spread = jnp.roll(v, 1) + jnp.roll(v, -1) - 2 * v
        return jnp.concatenate([v - v**3 / 3 - w + p[0] * spread, p[1] * (v + p[2] - p[3] * w)])

    y0s = jnp.asarray(rng.normal(size=(rows, 2 * cells)), jnp.float32)
    return Field(field, y0s, jnp.asarray([0.5, 0.08, 0.7, 0.8], jnp.float32))


def dense(states: int, rows: int) -> Field:
    """A dense linear map and tanh."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(states, states)) / np.sqrt(states), jnp.float32)
    return Field(
        lambda t, y, w: jnp.tanh(w @ y) - y, jnp.asarray(rng.normal(size=(rows, states)), jnp.float32), w
    )


FIELDS: dict[str, tuple[Callable[[int, int], Field], tuple[int, ...]]] = {
    "perceptron": (perceptron, (16, 32, 64, 128)),
    "ring": (ring, (16, 64, 256, 1024)),
    "dense": (dense, (12, 24, 48, 96)),
}


def programs(case: Field, plan: str) -> tuple[Any, Any, float]:
    """Forward solve, gradient, and the gradient's compile time."""

    def loss(y0s, args):
        sols = pk.solve_ensemble(
            case.field, y0s, 0.0, 1.0, args, step=pk.Fixed(STEPS), config=pk.Config(plan=plan), throw=False
        )
        return jnp.sum(sols.ys**2)

    forward, gradient = jax.jit(loss), jax.jit(jax.grad(loss, (0, 1)))
    start = time.perf_counter()
    jax.block_until_ready(gradient(case.y0s, case.args))
    compiled = time.perf_counter() - start
    return forward, gradient, compiled


def medians(functions: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Interleaved."""
    samples: list[list[float]] = [[] for _ in functions]
    for function in functions:
        jax.block_until_ready(function())
    for _ in range(repeats):
        for function, taken in zip(functions, samples, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in samples]


WIDTHS = ((2, 16, 2), (2, 64, 64, 2), (8, 32, 8), (16, 16), (64, 64))


def layouts() -> None:
    """Rows first over rows last, at sizes around the limits."""
    print("| layers | trajectories | forward, first / last | gradient, first / last | choice |")
    print("| --- " * 5 + "|")
    usual = array_plan.NARROW, array_plan.MANY_ROWS
    for widths, rows in itertools.product(WIDTHS, (8, 32, 64, 256, 2048)):
        case, calls = layers(widths, rows), []
        for narrow, many in ((0, 1), (widths[0], 1)):
            array_plan.NARROW, array_plan.MANY_ROWS = narrow, many
            jax.clear_caches()
            forward, gradient, _ = programs(case, "array")
            # Compiled while these limits hold.
            made = [f.lower(case.y0s, case.args).compile() for f in (forward, gradient)]
            calls += [functools.partial(f, case.y0s, case.args) for f in made]
        array_plan.NARROW, array_plan.MANY_ROWS = usual
        times = medians(calls, 7)
        choice = "last" if widths[0] <= usual[0] and rows >= usual[1] else "first"
        print(
            f"| {'-'.join(map(str, widths))} | {rows} | {times[0] / times[2]:.2f} | {times[1] / times[3]:.2f} | {choice} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fields", nargs="*", default=list(FIELDS))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 16, 256, 4096])
    parser.add_argument(
        "--most-operations", type=int, default=20_000, help="of the lanes plan: it takes long to compile"
    )
    parser.add_argument("--layouts", action="store_true", help="of the array plan, instead")
    arguments = parser.parse_args()
    if arguments.layouts:
        return layouts()
    print(
        "| field | trajectories | operations | elements | forward lanes / array ms | gradient lanes / array ms | compile s |"
        " faster | choice |"
    )
    print("| --- " * 9 + "|")
    for name in arguments.fields:
        make, sizes = FIELDS[name]
        for size, rows in itertools.product(sizes, arguments.rows):
            case = make(size, rows)
            why = pk.explain(
                case.field, case.y0s, 0.0, 1.0, case.args, in_axes=(0, None), step=pk.Fixed(STEPS)
            )
            if why.operations > arguments.most_operations:
                continue
            made = [programs(case, plan) for plan in PLANS]
            calls = [
                functools.partial(f, case.y0s, case.args)
                for forward, gradient, _ in made
                for f in (forward, gradient)
            ]
            times = [1e3 * t for t in medians(calls, 7)]
            forward, gradient = times[::2], times[1::2]
            faster = [PLANS[int(pair[1] < pair[0])] for pair in (forward, gradient)]
            print(
                f"| {name} {size} | {rows} | {why.operations} | {case.y0s.shape[1]} | {forward[0]:.3g} / {forward[1]:.3g} | "
                f"{gradient[0]:.3g} / {gradient[1]:.3g} | {made[0][2]:.2g} / {made[1][2]:.2g} | {', '.join(faster)} | "
                f"{why.plan} {why.runner} |",
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
