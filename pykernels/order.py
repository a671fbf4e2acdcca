"""Which trajectories share a block: those with similar work, since a block takes as long as its slowest lane.

The lanes of a solve are reordered on the way in and put back on the way out; nothing else knows about it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from pykernels import primitives
from pykernels.kernels.stepper import Solve
from pykernels.stepsize import Fixed

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Real

# A pilot that makes one attempt for this many of the solve's is cheap enough: looser tolerances only rank worse.
MOST_FEWER = 8.0

Integrate = Callable[[Solve, Sequence[jax.Array]], list[jax.Array]]


def check_order(order: Any, lanes: int) -> str | Real[Array, " lanes"] | None:
    """The argument `order` of an ensemble of so many trajectories; raises TypeError or ValueError if it is none."""
    if order is None:
        return None
    if isinstance(order, str):
        if order != "work":
            raise ValueError(f"order must be 'work', an array or None, not {order!r}")
        return order
    counts = jnp.asarray(order)
    if jnp.issubdtype(counts.dtype, jnp.complexfloating) or counts.dtype == bool:
        raise TypeError(f"order must have integers or real numbers, not {counts.dtype}")
    if counts.shape != (lanes,):
        raise ValueError(f"order must have one number per trajectory, shape ({lanes},), not {counts.shape}")
    return counts


def integrate_in_order(
    integrate: Integrate, solve: Solve, inputs: Sequence[jax.Array], order: str | jax.Array | None
) -> list[jax.Array]:
    """`integrate(solve, inputs)` with its lanes in this order inside, and its results in the caller's."""
    places = lane_order(solve, inputs, order)
    if places is None:
        return integrate(solve, inputs)
    count = jnp.arange(places.shape[-1], dtype=places.dtype)
    back = jnp.zeros_like(places).at[places].set(count, unique_indices=True, mode="promise_in_bounds")
    places, back, *inputs = primitives.vary_together([places, back, *inputs])
    moved = [
        primitives.permute(value, places, back) if has_lanes else value
        for value, has_lanes in zip(inputs, solve.lane, strict=True)
    ]
    return [primitives.permute(result, back, places) for result in integrate(solve, moved)]


def lane_order(
    solve: Solve, inputs: Sequence[jax.Array], order: str | jax.Array | None
) -> Int32[Array, " lanes"] | None:
    """The caller's lane in every place, most work first: what is started last should be short. None: leave it alone.

    A constant of differentiation. Lanes with equal work stay in the caller's order.
    """
    lanes = inputs[solve.first_y].shape[-1]
    if order is None or lanes < 2:
        return None
    if not isinstance(order, str):
        return jnp.argsort(lax.stop_gradient(order), descending=True).astype(jnp.int32)
    inputs = [lax.stop_gradient(value) for value in inputs]
    if not isinstance(solve.step, Fixed):
        short = pilot(solve)
        save_times = {solve.first_y - 1} if solve.saves is not None else set()
        results = primitives.solve([x for i, x in enumerate(inputs) if i not in save_times], short)
        return _most_first(results[-2], short.max_steps)
    if solve.step.steps is None and (solve.lane[0] or solve.lane[1]):
        steps = jnp.ceil(abs(inputs[1] - inputs[0]) / solve.step.size)
        return _most_first(jnp.minimum(steps, float(solve.max_steps)).astype(jnp.int32), solve.max_steps)
    return None  # as many steps in every lane


def pilot(solve: Solve) -> Solve:
    """A cheap solve whose attempts rank the lanes of an adaptive one: with half the digits, and without save times.

    Half the digits, the square root of the relative tolerance, is both cheap where tolerances are tight and accurate enough
    where they are loose: what is much looser than 1e-3 follows other trajectories than the solve does. Attempts go with the
    tolerance to the power of -1/order, unless stability limits the steps: then the pilot makes as many as the solve.

    Some trajectories go astray only because of the loose tolerance, and would be followed for long. So the pilot gives up
    where it predicts that the solve runs out of attempts; its failures have their attempts like any other lane.
    """
    step, order = solve.step, solve.method.error_order
    fewer = min(MOST_FEWER, max(1.0, (step.rtol or step.atol) ** (-0.5 / order)))
    looser = fewer**order
    first_y = solve.first_y
    return dataclasses.replace(
        solve,
        step=dataclasses.replace(step, rtol=step.rtol * looser, atol=step.atol * looser),
        max_steps=math.ceil(solve.max_steps / fewer),
        saves=None,
        lane=solve.lane if solve.saves is None else (*solve.lane[: first_y - 1], *solve.lane[first_y:]),
    )


def _most_first(counts: Int32[Array, " lanes"], most: int) -> Int32[Array, " lanes"]:
    """Lanes by descending counts, which are at most `most`."""
    lanes = counts.shape[-1]
    if (most + 1) * lanes > 2**32:
        return jnp.argsort(counts, descending=True).astype(jnp.int32)
    # The count and the lane in one word: CPUs sort it four times as fast as a pair.
    rank = (most - jnp.clip(counts, 0, most)).astype(jnp.uint32)
    words = lax.sort(rank * lanes + jnp.arange(lanes, dtype=jnp.uint32), is_stable=False)
    return (words % lanes).astype(jnp.int32)
