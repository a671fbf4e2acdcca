"""Stages in a loop: the same values, gradients and counts as unrolled ones, whatever is saved and differentiated."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import pykernels as pk
from pykernels.kernels import xla
from pykernels.kernels.body import Kernel

ADAPTIVE = pk.Adaptive(1e-6, 1e-8)


def captured(problem: problems.Problem, shared: bool, **settings: Any) -> tuple[Any, Any, Any]:
    """The solve, the record and the inputs of an ensemble of three."""
    seen: list[Any] = []

    class Spy(pk.Milestones):
        def integrate(self, solve: Any, inputs: Any) -> Any:
            seen.append((solve, self.record(solve), list(inputs)))
            raise InterruptedError

    args = problem.args() if shared else problems.spread(problem.args(), 3)
    with contextlib.suppress(InterruptedError):
        pk.solve_ensemble(
            problem.field, problems.spread(problem.y0(), 3), problem.t0, problem.t1, args,
            in_axes=(0, None if shared else 0), adjoint=Spy(count=5, scratch=4), max_steps=300, **settings,
        )  # fmt: skip
    return seen[0]


def both_ways(solve: Any, record: Any, inputs: Any, kind: str, rolled: bool) -> list[np.ndarray]:
    """Everything the forward and the backward kernel write, differentiated by everything."""
    solve = dataclasses.replace(solve, kind=kind, rolled=rolled)
    n_y, wrt = len(solve.field.y_shapes), (True,) * len(solve.lane)

    @jax.jit
    def run(*inputs: jax.Array) -> list[jax.Array]:
        forward = xla.run(Kernel(solve, record), inputs, 3)
        values, counts, recorded = forward[:n_y], forward[n_y], forward[n_y + 1 :]
        # Lane 1's cotangents are zero, as those of a failed lane that is masked out.
        attempts = counts[1] * jnp.array([1, 0, 1], jnp.int32)
        cotangents = [jnp.cos(v) * jnp.array([1.0, 0.0, 1.0]) for v in values]
        backward = xla.run(Kernel(solve, record, wrt), [*inputs, attempts, *recorded, *cotangents], 3)
        return [*values, counts, *backward]

    return [np.asarray(x) for x in run(*inputs)]


@pytest.mark.parametrize(
    ("problem", "method", "step", "kind", "shared", "saved"),
    [
        (problems.FORCED_OSCILLATOR, pk.vern7, ADAPTIVE, "arrays", True, True),
        (problems.PENDULUM, pk.tsit5, ADAPTIVE, "components", False, False),
        (problems.SIR, pk.rk4, pk.Fixed(23), "components", True, True),
        (problems.PERCEPTRON, pk.dopri5, ADAPTIVE, "tiles", True, True),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_rolled_is_unrolled(
    problem: problems.Problem, method: Any, step: Any, kind: str, shared: bool, saved: bool
) -> None:
    saves = jnp.linspace(problem.t0, problem.t1, 7) if saved else None
    solve, record, inputs = captured(problem, shared, method=method, step=step, save_at=saves)
    unrolled, rolled = (both_ways(solve, record, inputs, kind, r) for r in (False, True))
    for a, b in zip(rolled, unrolled, strict=True):
        # Sums in another order; the step sizes of a stretched segment differ by rounding over the tolerance.
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * (1 + np.max(np.abs(b), initial=0)))
        assert np.all(np.isfinite(a))
