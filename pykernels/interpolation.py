"""Values inside a step from a method's own continuous extension Y(t + theta h) = y + h sum_i b_i(theta) k_i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from pykernels.tableau import ButcherTableau

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def dense_weights(
    method: ButcherTableau, theta: Float[Array, " lanes"]
) -> list[Float[Array, " lanes"] | None]:
    """b_i(theta) for every stage, the interpolant's extra stages included; None where the polynomial is zero."""
    return [_horner(row, theta) for row in method.dense]


def dense_slopes(
    method: ButcherTableau, theta: Float[Array, " lanes"]
) -> list[Float[Array, " lanes"] | None]:
    """d b_i / d theta, laid out as `dense_weights`."""
    return [_slope(row, theta) for row in method.dense]


def weighted_sum(weights: Sequence[float | Array | None], stages: Sequence[list[Array]]) -> list[Array]:
    """sum_i w_i k_i for every piece of the state; weights that are None or exactly zero cost nothing."""
    if len(weights) != len(stages):
        raise ValueError(f"{len(weights)} weights for {len(stages)} stages")
    # Only these are read: stages may lie in memory.
    terms = [(w, stages[i]) for i, w in enumerate(weights) if w is not None and not _is_zero(w)]
    if not terms:
        return [jnp.zeros_like(piece) for piece in stages[0]]
    sums = []
    for piece in range(len(terms[0][1])):
        total = None
        for w, k in terms:
            term = k[piece] if _is_one(w) else w * k[piece]
            total = term if total is None else total + term
        assert total is not None
        sums.append(total)
    return sums


def _horner(row: Sequence[float], theta: Array) -> Array | None:
    """row[0] theta + row[1] theta^2 + ..."""
    if not any(row):
        return None
    value = jnp.full_like(theta, row[-1])
    for coefficient in reversed(row[:-1]):
        value = value * theta + coefficient
    return value * theta


def _slope(row: Sequence[float], theta: Array) -> Array | None:
    if not any(row):
        return None
    value = jnp.full_like(theta, len(row) * row[-1])
    for power in range(len(row) - 1, 0, -1):
        value = value * theta + power * row[power - 1]
    return value


def _is_zero(weight: float | Array) -> bool:
    return isinstance(weight, float) and weight == 0.0


def _is_one(weight: float | Array) -> bool:
    return isinstance(weight, float) and weight == 1.0
