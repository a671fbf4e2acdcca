"""Residuals of a model, and the robust losses of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pykernels.stream.sums import Objective, Terms

PyTree = Any
Model = Callable[..., Any]
Loss = Literal["linear", "soft_l1", "huber", "cauchy", "arctan"]


def _huber(z: jax.Array) -> jax.Array:
    outside = z > 1
    return jnp.where(outside, 2 * jnp.sqrt(jnp.where(outside, z, jnp.ones_like(z))) - 1, z)


# rho(z) of the squared residual in units of `f_scale`, as `scipy.optimize.least_squares` defines them (Triggs et al. 2000).
LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda z: z,
    "soft_l1": lambda z: 2 * (jnp.sqrt(1 + z) - 1),
    "huber": _huber,
    "cauchy": jnp.log1p,
    "arctan": jnp.arctan,
}


def check_loss(loss: str, f_scale: float) -> None:
    """Raises ValueError if there is no such loss."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, not {loss!r}")
    if not f_scale > 0:
        raise ValueError(f"f_scale must be positive, not {f_scale!r}")


def is_unpacked(p0: PyTree) -> bool:
    """Whether a model takes these parameters one by one: a plain tuple or list, or a vector of them."""
    if isinstance(p0, (list, tuple)):
        return not hasattr(p0, "_fields")
    return hasattr(p0, "ndim") and p0.ndim == 1


def x_y_weights(batch: PyTree) -> tuple[PyTree, jax.Array, jax.Array | None]:
    """The parts of a batch (x, y), (x, y, weights) or a mapping of these names. Raises TypeError for others."""
    if isinstance(batch, Mapping) and {"x", "y"} <= set(batch) <= {"x", "y", "weights"}:
        return batch["x"], batch["y"], batch.get("weights")
    if isinstance(batch, tuple) and len(batch) in (2, 3):
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    raise TypeError(
        "a batch for a model must be (x, y), (x, y, weights) or a dict of 'x', 'y' and 'weights', not of structure "
        f"{jax.tree.structure(batch)}"
    )


def residuals(model: Model, unpack: bool, params: PyTree, x: PyTree, y: jax.Array) -> jax.Array:
    """model - y. Raises TypeError if the model's values do not have the shape of y: broadcasting would go unnoticed."""
    prediction = jnp.asarray(model(x, *params) if unpack else model(x, params))
    if prediction.shape != y.shape:
        raise TypeError(
            f"the model's values must have the shape of y, {y.shape} for this batch, not {prediction.shape}"
        )
    return prediction - y.astype(prediction.dtype)


def model_objective(model: Model, unpack: bool, loss: Loss, f_scale: float) -> Objective:
    """The loss of a model: f_scale^2 rho((residual / f_scale)^2), summed over the elements of a row, weighted over
    rows."""
    check_loss(loss, f_scale)

    def terms(params: PyTree, batch: PyTree) -> Terms:
        x, y, weights = x_y_weights(batch)
        r = residuals(model, unpack, params, x, y)
        each = f_scale**2 * LOSSES[loss]((r / f_scale) ** 2)
        return Terms(jnp.sum(each, axis=tuple(range(1, each.ndim))), weights)

    return Objective(terms, (model,), ("model", unpack, loss, f_scale))
