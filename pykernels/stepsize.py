"""How steps are chosen: the settings users pass, and the controller's arithmetic on lane vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class Fixed:
    """Steps of constant size: `Fixed(1000)` takes that many, `Fixed(0.01)` steps of that size, the last one shortened.

    An `int` is a number of steps, a `float` a step size in units of time (positive, whatever the direction). Step number
    i starts at `t0 + i h`, never at a running sum, so time does not drift in float32.

    Raises ValueError for a number that is not positive and finite, TypeError for anything else.
    """

    size: int | float

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, (int, float)):
            raise TypeError(f"Fixed takes a number of steps (int) or a step size (float), not {self.size!r}")
        if not (math.isfinite(self.size) and self.size > 0):
            raise ValueError(f"Fixed takes a positive finite number of steps or step size, not {self.size!r}")

    @property
    def steps(self) -> int | None:
        """The number of steps, or None when the step size is given."""
        return self.size if isinstance(self.size, int) else None


@dataclass(frozen=True)
class Adaptive:
    """Steps chosen so that the embedded error, scaled by `atol + rtol |y|`, has a root mean square just below 1.

    The controller multiplies the step by `safety * e_n^(-b1) * e_(n-1)^(-b2) * e_(n-2)^(-b3)` with
    `b1 = (pcoeff + icoeff + dcoeff) / k`, `b2 = -(pcoeff + 2 dcoeff) / k`, `b3 = dcoeff / k`, where e is the scaled error
    of accepted steps and k the method's error order (Soderlind, ACM TOMS 29, 2003), limited to `factormin`..`factormax`.
    Defaults and conventions are those of diffrax's `PIDController`. `dtmin`, `dtmax`: smallest and largest step, in units
    of time; a trajectory whose step would have to go under `dtmin` fails. Trajectories have independent steps.

    Raises ValueError for tolerances that are negative, not finite or both zero, and for inconsistent limits.
    """

    rtol: float = 1e-6
    atol: float = 1e-6
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    dtmin: float | None = None
    dtmax: float | None = None
    factormin: float = 0.2
    factormax: float = 10.0
    safety: float = 0.9

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is None and name in ("dtmin", "dtmax"):
                continue
            if isinstance(value, bool):
                raise TypeError(f"Adaptive({name}=) must be a Python number, not {value!r}")
            if not isinstance(value, (int, float)):
                try:
                    value = float(value)  # NumPy scalars; a traced value can not be a static setting
                except Exception as error:
                    raise TypeError(f"Adaptive({name}=) must be a Python number, not {value!r}") from error
            if not math.isfinite(value):
                raise ValueError(f"Adaptive({name}=) must be finite, not {value!r}")
            object.__setattr__(self, name, float(value))
        if self.rtol < 0 or self.atol < 0 or self.rtol + self.atol == 0:
            raise ValueError(
                f"tolerances must be non-negative and not both zero: rtol={self.rtol}, atol={self.atol}"
            )
        if self.dtmin is not None and self.dtmin <= 0:
            raise ValueError(f"dtmin must be positive, not {self.dtmin}")
        if self.dtmax is not None and self.dtmax <= (self.dtmin or 0):
            raise ValueError(
                f"dtmax must be positive and above dtmin: dtmin={self.dtmin}, dtmax={self.dtmax}"
            )
        if not 0 < self.factormin < 1 < self.factormax or not 0 < self.safety <= 1:
            raise ValueError("Adaptive needs 0 < factormin < 1 < factormax and 0 < safety <= 1")

    @property
    def memory(self) -> int:
        """How many earlier errors the controller remembers (0, 1 or 2)."""
        return 2 if self.dcoeff else 1 if self.pcoeff else 0


def mean_square(pieces: list[Array]) -> Float[Array, " lanes"]:
    """Mean of the squares of a state's elements, per lane: the lane axis of every piece is its last."""
    elements = sum(math.prod(piece.shape[:-1]) for piece in pieces)
    total = sum(jnp.sum(piece * piece, axis=tuple(range(piece.ndim - 1))) for piece in pieces)
    return jnp.asarray(total / elements)


def scaled_error(
    step: Adaptive, error: list[Array], y: list[Array], y1: list[Array]
) -> Float[Array, " lanes"]:
    """Mean square of the embedded error in units of the tolerance; a step is good below 1. Infinite if not finite."""
    # The mean's division is in the constants.
    root = math.sqrt(sum(math.prod(piece.shape[:-1]) for piece in error))
    scaled = [
        e / (root * step.atol + root * step.rtol * jnp.maximum(abs(a), abs(b)))
        for e, a, b in zip(error, y, y1, strict=True)
    ]
    square = jnp.asarray(sum(jnp.sum(p * p, axis=tuple(range(p.ndim - 1))) for p in scaled))
    return jnp.where(jnp.isnan(square), jnp.inf, square)


def step_factor(
    step: Adaptive,
    order: int,
    square: Float[Array, " lanes"],
    accepted: Bool[Array, " lanes"],
    memory: tuple[Float[Array, " lanes"], ...],
) -> tuple[Float[Array, " lanes"], tuple[Float[Array, " lanes"], ...]]:
    """Factor for the next step size, and the controller's new memory: logarithms of inverse errors of accepted steps.

    The factor is a constant for differentiation.
    """
    logarithm = jnp.log(square)
    log = -0.5 * logarithm
    # In powers of two, with all constants in one.
    binary = math.log2(math.e) / order
    exponent = -0.5 * (step.pcoeff + step.icoeff + step.dcoeff) * binary * logarithm
    if step.memory > 0:
        exponent = exponent - (step.pcoeff + 2 * step.dcoeff) * binary * memory[0]
    if step.memory > 1:
        exponent = exponent + step.dcoeff * binary * memory[1]
    # A clamp in the exponent's domain would save nothing: the exponential is needed unless every lane is at a limit.
    raw = step.safety * jnp.exp2(exponent)
    factor = jnp.where(
        accepted, jnp.clip(raw, 1.0, step.factormax), jnp.clip(raw, step.factormin, step.safety)
    )
    # An exact step or an infinite error says nothing about the next one: the PI terms restart from 1.
    log = jnp.where(jnp.isfinite(log), log, 0.0)
    shifted = (log, *memory)[: step.memory]
    kept = tuple(jnp.where(accepted, new, old) for new, old in zip(shifted, memory, strict=True))
    return jax.lax.stop_gradient(factor), tuple(jax.lax.stop_gradient(m) for m in kept)


def initial_step(
    step: Adaptive,
    order: int,
    y: list[Array],
    f0: list[Array],
    euler: Callable[[Array], list[Array]],
) -> Float[Array, " lanes"]:
    """First step size by the rule of Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4.

    `euler(h)` returns the field after an Euler step of size h. Positive; a constant for differentiation.
    """
    scale = [step.atol + step.rtol * abs(p) for p in y]
    d0 = jnp.sqrt(mean_square([p / s for p, s in zip(y, scale, strict=True)]))
    d1 = jnp.sqrt(mean_square([p / s for p, s in zip(f0, scale, strict=True)]))
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = jnp.where(small, 1e-6, 0.01 * (d0 / jnp.where(small, 1.0, d1)))
    f1 = euler(h0)
    d2 = jnp.sqrt(mean_square([(b - a) / s for a, b, s in zip(f0, f1, scale, strict=True)])) / h0
    steepest = jnp.maximum(d1, d2)
    flat = steepest <= 1e-15
    h1 = jnp.where(
        flat, jnp.maximum(1e-6, h0 * 1e-3), jnp.exp(jnp.log(0.01 / jnp.where(flat, 1.0, steepest)) / order)
    )
    return jax.lax.stop_gradient(limit(step, jnp.minimum(100 * h0, h1)))


def limit(step: Adaptive, h: Float[Array, " lanes"]) -> Float[Array, " lanes"]:
    """Apply `dtmax`. `dtmin` is no clamp: a step that would go under it fails the trajectory."""
    return h if step.dtmax is None else jnp.minimum(h, step.dtmax)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Rounded sum of a and b and its exact rounding error (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
