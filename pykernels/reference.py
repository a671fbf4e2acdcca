"""The plain meaning of the primitives: of solves, one trajectory, one step at a time, every step remembered; of the step
kernels, by `run_pass`.

This is the specification of `primitives.solve` and, differentiated by JAX itself, of `primitives.pull_back`: slow, short and
independent of lanes, milestones and kernels. Tests compare everything else with it. Where no kernel runs, the meaning of a
step kernel is also what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from pykernels.kernels.passes import Accept, Combine, Finish, Pass, Restore, Save, is_inside
from pykernels.kernels.stepper import MAX_STEPS, NON_FINITE, STEP_TOO_SMALL, SUCCESS, Solve
from pykernels.stepsize import Adaptive

_RUNNING = -1


class _Step(NamedTuple):
    """One attempt: from (t, y) by h with stages k, arriving at `end`; `taken` if it counts."""

    t: jax.Array
    h: jax.Array
    end: jax.Array
    y: list[jax.Array]
    k: list[list[jax.Array]]
    taken: jax.Array


def solve(inputs: Sequence[jax.Array], solve: Solve) -> list[jax.Array]:
    """Values' leaves, status, attempts, accepted: as `primitives.solve` without a record."""
    axes = [-1 if lanes else None for lanes in solve.lane]
    return jax.vmap(lambda *one: _trajectory(solve, one), in_axes=axes, out_axes=-1)(*inputs)


def _trajectory(solve: Solve, inputs: Sequence[jax.Array]) -> list[jax.Array]:
    t0, t1 = inputs[:2]
    y0 = list(inputs[solve.first_y : solve.first_operand])
    evaluate = jex.jaxpr_as_fun(solve.field.jaxpr)

    def f(t: jax.Array, y: list[jax.Array]) -> list[jax.Array]:
        return list(evaluate(t, *y, *inputs[solve.first_operand :]))

    if isinstance(solve.step, Adaptive):
        y1, steps, status = _adaptive(solve, solve.step, f, t0, t1, inputs[2] if solve.has_dt0 else None, y0)
        attempts = jnp.sum(steps.h != 0, dtype=jnp.int32)
    else:
        y1, steps, status, attempts = _fixed(solve, f, t0, t1, y0)
    values = y1
    if solve.saves is not None:
        values = jax.vmap(lambda date: _interpolate(solve, f, steps, t0, t1, y0, date))(
            inputs[solve.first_y - 1]
        )
    values = [jnp.where(status == SUCCESS, v, jnp.nan) for v in values]
    return [*values, status, attempts, jnp.sum(steps.taken, dtype=jnp.int32)]


def _stages(solve: Solve, f: Any, t: jax.Array, h: jax.Array, y: list[jax.Array]) -> Any:
    tableau = solve.method
    k = [f(t, y)]
    for row, c in zip(tableau.a, tableau.c[1:], strict=True):
        k.append(f(t + c * h, _combine(y, h, row, k)))
    return k, _combine(y, h, tableau.b, k)


def _combine(
    y: list[jax.Array], h: jax.Array, weights: Sequence[Any], k: list[list[jax.Array]]
) -> list[jax.Array]:
    return [p + h * sum(w * stage[i] for w, stage in zip(weights, k, strict=True)) for i, p in enumerate(y)]


def _rms(leaves: list[jax.Array]) -> jax.Array:
    size = sum(leaf.size for leaf in leaves)
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in leaves) / size)


def _adaptive(
    solve: Solve,
    step: Adaptive,
    f: Any,
    t0: jax.Array,
    t1: jax.Array,
    dt0: jax.Array | None,
    y0: list[jax.Array],
) -> Any:
    tableau, eps = solve.method, float(jnp.finfo(t0.dtype).eps)
    order = tableau.error_order
    sign = jnp.where(t1 >= t0, 1.0, -1.0).astype(t0.dtype)
    h0 = abs(dt0) if dt0 is not None else _hairer(step, order, f, t0, sign, y0)
    h0 = h0 if step.dtmax is None else jnp.minimum(h0, step.dtmax)
    sound = jnp.isfinite(t0) & jnp.isfinite(t1) & jnp.isfinite(h0)
    sound = sound & jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in (*y0, *f(t0, y0))]))
    status = jnp.where(sound, jnp.where(t0 == t1, SUCCESS, _RUNNING), NON_FINITE).astype(jnp.int32)

    def attempt(carry: Any, _: Any) -> Any:
        t, h, e1, e2, y, status = carry
        live = status == _RUNNING
        clipped = abs(t1 - t) - h < 100 * eps * jnp.maximum(abs(t0), abs(t1))
        signed = jnp.where(clipped, t1 - t, sign * h)
        k, y1 = _stages(solve, f, t, signed, y)
        error = [
            signed * sum(w * stage[i] for w, stage in zip(tableau.error or (), k, strict=True))
            for i in range(len(y))
        ]
        scale = [step.atol + step.rtol * jnp.maximum(abs(a), abs(b)) for a, b in zip(y, y1, strict=True)]
        # Stopped before the root: its derivative at zero is infinite.
        error, scale = lax.stop_gradient((error, scale))
        scaled = _rms([e / s for e, s in zip(error, scale, strict=True)])
        good = jnp.isfinite(scaled) & jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in y1]))
        scaled = jnp.where(good, scaled, jnp.inf)
        taken = live & (scaled < 1)
        inverse = 1 / scaled
        factor = step.safety * inverse ** ((step.pcoeff + step.icoeff + step.dcoeff) / order)
        factor = factor * e1 ** (-(step.pcoeff + 2 * step.dcoeff) / order) * e2 ** (step.dcoeff / order)
        factor = jnp.where(
            taken, jnp.clip(factor, 1.0, step.factormax), jnp.clip(factor, step.factormin, step.safety)
        )
        following = abs(signed) * factor
        following = following if step.dtmax is None else jnp.minimum(following, step.dtmax)
        smallest = jnp.maximum(eps * jnp.maximum(abs(t), eps * abs(t1 - t0)), step.dtmin or 0.0)
        why = jnp.where(following < smallest, jnp.where(good, STEP_TOO_SMALL, NON_FINITE), _RUNNING)
        end = jnp.where(clipped, t1, t + signed)
        new_status = jnp.where(live, jnp.where(taken & clipped, SUCCESS, why), status).astype(jnp.int32)
        inverse = jnp.where(jnp.isfinite(inverse) & (inverse > 0), inverse, 1.0)
        new = (
            jnp.where(taken, end, t),
            jnp.where(live, following, h),
            jnp.where(taken, inverse, e1),
            jnp.where(taken, e1, e2),
            [jnp.where(taken, a, b) for a, b in zip(y1, y, strict=True)],
            new_status,
        )
        return new, _Step(t, jnp.where(live, signed, 0.0), end, y, k, taken)

    one = jnp.ones_like(t0)
    carry, steps = lax.scan(attempt, (t0, h0, one, one, y0, status), None, length=solve.max_steps)
    status = jnp.where(carry[-1] == _RUNNING, MAX_STEPS, carry[-1])
    return carry[4], steps, status


def _hairer(
    step: Adaptive, order: int, f: Any, t0: jax.Array, sign: jax.Array, y0: list[jax.Array]
) -> jax.Array:
    """Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4."""
    scale = [step.atol + step.rtol * abs(p) for p in y0]
    f0 = f(t0, y0)
    d0, d1 = (
        _rms([a / s for a, s in zip(y0, scale, strict=True)]),
        _rms([a / s for a, s in zip(f0, scale, strict=True)]),
    )
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = jnp.where(small, 1e-6, 0.01 * d0 / jnp.where(small, 1.0, d1))
    f1 = f(t0 + sign * h0, [a + sign * h0 * b for a, b in zip(y0, f0, strict=True)])
    d2 = _rms([(b - a) / s for a, b, s in zip(f0, f1, scale, strict=True)]) / h0
    d = jnp.maximum(d1, d2)
    h1 = jnp.where(
        d <= 1e-15, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.where(d <= 1e-15, 1.0, d)) ** (1 / order)
    )
    return lax.stop_gradient(jnp.minimum(100 * h0, h1))


def _fixed(solve: Solve, f: Any, t0: jax.Array, t1: jax.Array, y0: list[jax.Array]) -> Any:
    count = solve.step.steps
    if count is not None:
        h, number = (t1 - t0) / count, jnp.int32(count)
    else:
        size = solve.step.size
        h = jnp.where(t1 >= t0, size, -size).astype(t0.dtype)
        number = jnp.ceil(abs(t1 - t0) / size - 1e-6)
        number = jnp.maximum(number, jnp.where(t1 == t0, 0.0, 1.0)).astype(jnp.int32)

    def step(y: list[jax.Array], i: jax.Array) -> Any:
        t = t0 + i.astype(t0.dtype) * h
        last = (i + 1 == number) & (count is None)
        mine = jnp.where(last, t1 - t, h)
        k, y1 = _stages(solve, f, t, mine, y)
        live = i < number
        end = jnp.where(i + 1 == number, t1, t0 + (i + 1).astype(t0.dtype) * h)
        return [jnp.where(live, a, b) for a, b in zip(y1, y, strict=True)], _Step(t, mine, end, y, k, live)

    y1, steps = lax.scan(step, y0, jnp.arange(solve.max_steps, dtype=jnp.int32))
    sound = jnp.isfinite(t0) & jnp.isfinite(t1) & jnp.all(jnp.stack([jnp.all(jnp.isfinite(p)) for p in y1]))
    status = jnp.where(sound, jnp.where(number > solve.max_steps, MAX_STEPS, SUCCESS), NON_FINITE)
    return y1, steps, status.astype(jnp.int32), jnp.minimum(number, solve.max_steps)


def _interpolate(
    solve: Solve, f: Any, steps: _Step, t0: jax.Array, t1: jax.Array, y0: list[jax.Array], date: jax.Array
) -> list[jax.Array]:
    """The value at one date: the interpolant of the taken step that contains it."""
    tableau = solve.method
    sign = jnp.where(t1 >= t0, 1.0, -1.0).astype(t0.dtype)
    holds = steps.taken & (sign * steps.t < sign * date) & (sign * date <= sign * steps.end)
    step = jax.tree.map(lambda leaf: leaf[jnp.argmax(holds)], steps)
    found = jnp.any(holds)
    h = jnp.where(found, step.h, 1.0)
    k = list(step.k)
    for row, c in zip(tableau.dense_a, tableau.dense_c, strict=True):
        k.append(f(step.t + c * h, _combine(step.y, h, row, k)))
    theta = (date - step.t) / h
    weights = [sum(b * theta ** (power + 1) for power, b in enumerate(row)) for row in tableau.dense]
    inside = _combine(step.y, h, weights, k)
    before = [a + (date - t0) * b for a, b in zip(y0, f(t0, y0), strict=True)]
    return [jnp.where(found, a, b) for a, b in zip(inside, before, strict=True)]


def run_pass(pass_: Pass, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """What a step kernel returns: operands and results as the pass lists them, states (rows, columns)."""
    match pass_:
        case Combine():
            return pass_.combined(operands[:-1], operands[-1][:, None])
        case Finish():
            return _finish(pass_, operands)
        case Accept():
            *states, accepted = operands
            old, new = states[: pass_.count], states[pass_.count :]
            return [jnp.where(accepted[:, None], b, a) for a, b in zip(old, new, strict=True)]
        case Save():
            return [_save(*operands)]
        case Restore():
            return [_restore(*operands)]
    raise TypeError(f"no pass: {pass_!r}")


def _finish(finish: Finish, operands: Sequence[jax.Array]) -> list[jax.Array]:
    y, slopes, h, given, error, milestone = finish.parts(operands)
    h = h[:, None]
    new = finish.new_state(y, slopes, h) if given is None else given
    total = jnp.sum(finish.square(y, new, slopes, h, error), axis=1)
    saved = [_save(milestone[0], milestone[1], y)] if milestone else []
    return [*([] if finish.given else [new]), total, *saved]


def _save(buffer: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    inside = is_inside(slot, buffer.shape[0])
    if buffer.size == 0:
        return buffer
    if slot.ndim == 0:  # XLA replaces a slice in place
        kept = lax.dynamic_index_in_dim(buffer, slot, keepdims=False)
        return lax.dynamic_update_index_in_dim(buffer, jnp.where(inside, value, kept), slot, 0)
    nowhere = buffer.shape[0]
    places = jnp.where(inside, slot, nowhere)
    return buffer.at[places, jnp.arange(slot.shape[0])].set(value, mode="drop", unique_indices=True)


def _restore(buffer: jax.Array, slot: jax.Array) -> jax.Array:
    inside = is_inside(slot, buffer.shape[0])
    if buffer.size == 0:
        return jnp.zeros(buffer.shape[1:], buffer.dtype)
    if slot.ndim == 0:
        return jnp.where(inside, lax.dynamic_index_in_dim(buffer, slot, keepdims=False), 0)
    found = buffer.at[slot, jnp.arange(slot.shape[0])].get(mode="clip")
    return jnp.where(inside[:, None], found, 0)
