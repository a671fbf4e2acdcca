"""Online milestones: gradients do not depend on where they are, memory stays bounded, replays take the forward decisions."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pykernels as pk
from pykernels import primitives, schedule
from pykernels.field import trace_field
from pykernels.interpolation import weighted_sum
from pykernels.kernels import stepper as kernel
from pykernels.stepsize import scaled_error

# An ensemble of scalar equations whose frequencies, and so their numbers of attempts, differ.
FREQUENCIES = jnp.asarray([0.05, 0.4, 1.0, 1.7, 2.2])
STARTS = jnp.linspace(0.0, 1.0, 5)
SHARED = jnp.asarray([0.5, 0.3])
WEIGHTS = jnp.arange(1.0, 6.0)
DATES = jnp.asarray([0.0, 0.7, 0.7, 2.5, 3.0])
MOST = 256


def kicked(t, y, args):
    """Not autonomous; the kicks near sin(k t) = 0 make steps fail."""
    k, p = args
    return p[0] * jnp.cos(k * t) / (0.05 + jnp.sin(k * t) ** 2) - p[1] * y**3


def solve_kicked(y0, k, p, t0, t1, dates, adjoint):
    return pk.solve_ensemble(
        kicked, y0, t0, t1, (k, p), in_axes=(0, (0, None)), method=pk.heun, step=pk.Adaptive(rtol=1e-3, atol=1e-3),
        max_steps=MOST, save_at=dates, adjoint=adjoint, config=pk.Config(block=5),
    )  # fmt: skip


@functools.cache
def gradient_of_kicked(count: int, scratch: int, saved: bool) -> list[np.ndarray]:
    def loss(y0, k, p, t0, t1, dates):
        sol = solve_kicked(y0, k, p, t0, t1, dates if saved else None, pk.Milestones(count, scratch))
        rows = jnp.asarray([0.5, 1.0, -2.0, 1.0, 3.0]) if saved else 1.0
        return jnp.sum(WEIGHTS * jnp.sum(jnp.sin(sol.ys).reshape(5, -1) * rows, axis=1))

    wrt = (0, 1, 2, 3, 4, 5) if saved else (0, 1, 2, 3, 4)
    gradient = jax.jit(jax.grad(loss, wrt))(STARTS, FREQUENCIES, SHARED, 0.0, 3.0, DATES)
    return [np.asarray(g) for g in gradient]


def test_the_problem_exercises_the_milestones():
    stats = solve_kicked(STARTS, FREQUENCIES, SHARED, 0.0, 3.0, None, pk.Milestones()).stats
    attempts, rejected = np.asarray(stats.attempts), np.asarray(stats.rejected)
    assert 120 < attempts.max() < MOST and attempts.min() < attempts.max() / 3
    assert rejected.min() > 3
    # Levels of replay beyond the first: the grid below has none, one and many.
    levels = {len(schedule.replay_strides(MOST, schedule.record_for(MOST, c, s))) for c, s, _ in STORAGE}
    assert {0, 1, 2, 6} <= levels


# (count, scratch, with save times): every size of either kind, from one level of replay to seven. Compiling is what costs.
STORAGE = (
    (2, 2, False), (2, 7, False), (2, 64, False), (3, 3, False), (3, 64, True), (7, 2, False), (7, 7, True), (64, 3, False),
    (64, 64, False),
)  # fmt: skip


@pytest.mark.parametrize(("count", "scratch", "saved"), STORAGE)
def test_gradients_do_not_depend_on_the_storage(count, scratch, saved):
    full = gradient_of_kicked(3, MOST, saved)
    for got, want in zip(gradient_of_kicked(count, scratch, saved), full, strict=True):
        assert np.any(want != 0)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@pytest.mark.parametrize("saved", [False, True])
def test_the_full_storage_gradient_is_that_of_the_bounded_tree(saved):
    """The tree shares neither milestones nor the hand-written backward pass."""

    def loss(y0, k, p):
        sol = solve_kicked(y0, k, p, 0.0, 3.0, DATES if saved else None, pk.BoundedTree(branching=16))
        rows = jnp.asarray([0.5, 1.0, -2.0, 1.0, 3.0]) if saved else 1.0
        return jnp.sum(WEIGHTS * jnp.sum(jnp.sin(sol.ys).reshape(5, -1) * rows, axis=1))

    tree = jax.jit(jax.grad(loss, (0, 1, 2)))(STARTS, FREQUENCIES, SHARED)
    for got, want in zip(gradient_of_kicked(3, MOST, saved), tree, strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-10)


def test_nothing_to_replay():
    """No attempt at all: t1 = t0. The rows at t0 move with the field when their time moves."""

    def value(y0, date):
        sol = pk.solve(lambda t, y, _: -3.0 * y + t, y0, 1.0, 1.0, save_at=date[None], max_steps=16)
        return jnp.squeeze(sol.ys)

    y0, date = jnp.asarray(2.0), jnp.asarray(1.0)
    assert value(y0, date) == 2.0
    by_state, by_date = jax.jit(jax.grad(value, (0, 1)))(y0, date)
    assert by_state == 1.0
    np.testing.assert_allclose(by_date, -3.0 * 2.0 + 1.0, rtol=1e-15)


# Memory and size of the program.


def damped(t, y, p):
    x, v, w = y
    return jnp.stack([v, -p[0] * x - p[1] * v, p[2] * x - 0.1 * w])


PARAMETERS = jnp.asarray([2.0, 0.05, 0.7])
STATE = jnp.asarray([1.0, 0.0, 0.5])


def damped_loss(y0, p, step, adjoint, max_steps=4096):
    return jnp.sum(
        pk.solve(
            damped, y0, 0.0, 20.0, p, method=pk.bosh3, step=step, adjoint=adjoint, max_steps=max_steps
        ).ys
    )


@functools.cache
def compiled(steps: int) -> Any:
    gradient = jax.jit(
        jax.grad(functools.partial(damped_loss, step=pk.Fixed(steps), adjoint=pk.Milestones()), (0, 1))
    )
    return gradient.lower(STATE, PARAMETERS).compile()


def test_memory_grows_like_the_square_root_of_the_steps():
    numbers = [10**3, 10**4, 10**5, 10**6]
    sizes = {n: compiled(n).memory_analysis().temp_size_in_bytes for n in numbers}
    # Two square roots of states (milestones and scratch), and what does not depend on the number of steps.
    states = 2 * np.sqrt(numbers) * STATE.nbytes
    constant = 4096
    for n, bound in zip(numbers, states, strict=True):
        assert sizes[n] < 1.1 * bound + constant, sizes
    # Scratch is in there with the portable runner only: native blocks share what each thread has of its own.
    assert sizes[10**6] > 0.45 * states[-1], "the milestones are in there"


def test_the_program_does_not_depend_on_the_number_of_steps():
    small, large = (len(compiled(n).as_text()) for n in (10**3, 10**6))
    assert abs(large - small) < 0.02 * small


def test_adaptive_memory_is_far_below_one_state_per_attempt():
    most = 10**5
    loss = functools.partial(damped_loss, step=pk.Adaptive(), adjoint=pk.Milestones(), max_steps=most)
    size = jax.jit(jax.grad(loss)).lower(STATE, PARAMETERS).compile().memory_analysis().temp_size_in_bytes
    assert size < most * STATE.nbytes / 20


def test_a_million_steps():
    n = 10**6
    program = compiled(n)
    assert program.memory_analysis().temp_size_in_bytes < 2**20
    by_state, by_parameters = program(STATE, PARAMETERS)
    forward = functools.partial(damped_loss, step=pk.Fixed(n), adjoint=pk.ForwardOnly())

    @jax.jit
    def sensitivity(y_dot, p_dot):
        return jax.jvp(forward, (STATE, PARAMETERS), (y_dot, p_dot))[1]

    y_dot, p_dot = jnp.asarray([0.3, -1.0, 0.5]), jnp.asarray([1.0, 2.0, -0.7])
    want = sensitivity(y_dot, p_dot)
    np.testing.assert_allclose(jnp.vdot(by_state, y_dot) + jnp.vdot(by_parameters, p_dot), want, rtol=1e-9)
    # And against the solution itself: the third state of a linear problem, by the matrix exponential.
    matrix = jax.jacfwd(lambda y: damped(0.0, y, PARAMETERS))(STATE)
    exact = jnp.ones(3) @ jax.scipy.linalg.expm(20.0 * matrix)
    np.testing.assert_allclose(by_state, exact, rtol=1e-9)


# A replay in another program.


def pendulum(t, y, p):
    x, v = y
    return jnp.stack([v, -p[0] * jnp.sin(x) - p[1] * v + p[2] * jnp.cos(5 * t)])


def pendulum_rounded_otherwise(t, y, p):
    """The same field: its sums are associated otherwise, so nearly every result differs in the last bit."""
    x, v = y
    return jnp.stack([v, (p[2] * jnp.cos(5 * t) - p[0] * jnp.sin(x)) - p[1] * v])


class Recorded(NamedTuple):
    """A forward pass with its record. Rows and lanes as in `kernels.body`."""

    solve: kernel.Solve
    record: schedule.Record
    inputs: list[jax.Array]
    y: jax.Array
    status: jax.Array
    attempts: jax.Array
    decisions: jax.Array
    scalars: jax.Array
    states: jax.Array


def spec_of(field: Any, kind: str, step: pk.Adaptive, max_steps: int, dtype: Any, block: int) -> kernel.Solve:
    traced, consts = trace_field(field, jax.ShapeDtypeStruct((2,), dtype), jax.ShapeDtypeStruct((3,), dtype))
    assert not consts
    return kernel.Solve(
        traced, pk.tsit5, step, max_steps, False, None, kind, (False, False, True, False), block
    )


def record_pendula(lanes: int, t1: float, step: pk.Adaptive, max_steps: int, scratch: int) -> Recorded:
    solve = spec_of(pendulum, "components", step, max_steps, np.float64, 64)
    record = schedule.record_for(max_steps, None, scratch)
    y0 = jnp.stack([jnp.linspace(0.5, 2.0, lanes), jnp.zeros(lanes)])
    inputs = [jnp.asarray(0.0), jnp.asarray(t1), y0, jnp.asarray([2.0, 0.1, 0.5])]
    results = jax.jit(lambda *a: primitives.solve(a, solve, record))(*inputs)
    y, status, attempts, _, decisions, scalars, states = results
    np.testing.assert_array_equal(status, 0)
    return Recorded(solve, record, inputs, y, status, attempts, decisions, scalars, states)


class Arrival(NamedTuple):
    """A replayed segment: how far its end misses the next milestone, in steps and, after stretching the last step, in y."""

    missed: np.ndarray
    error: np.ndarray
    flips: int
    lanes: int


def replay_program(recorded: Recorded) -> Any:
    """`replay(start, decisions)`, with the other lift, another association of the field and other compiler settings."""
    forward = recorded.solve
    lanes = recorded.y.shape[-1]
    solve = spec_of(pendulum_rounded_otherwise, "arrays", forward.step, forward.max_steps, np.float64, lanes)
    record, attempts = recorded.record, recorded.attempts
    t0, t1, _, p = recorded.inputs
    operands = [[p]]

    def replay(start: jax.Array, decisions: jax.Array) -> Any:
        method = kernel.Method(solve, differentiated=True)
        stepper = kernel.Stepper(solve, method, jnp.full(lanes, t0), jnp.full(lanes, t1), None, operands)
        row = schedule.slot(start, record)
        t, low, h = recorded.scalars[row]
        y = [recorded.states[row]]
        k0 = method.field(t, y, operands) if solve.carries_stage else None
        state = kernel.State(t, low, h, (), y, k0, None, None, None)

        def attempt(state: Any, i: jax.Array) -> Any:
            live = i < attempts
            bit = (
                lax.shift_right_logical(decisions[1 + i // record.burst], jnp.full(lanes, i % record.burst))
                & 1
            )
            accepted = live & (bit == 1)
            new, taken = stepper.attempt(state, i, (live, accepted))
            # What the controller would have decided here.
            h = jnp.where(stepper.direction * (t1 - taken.t) < state.h, t1 - taken.t, state.h)
            error = [h * e for e in weighted_sum(solve.method.error, taken.stages)]
            _, reached = method.step(taken.t, h, taken.y, taken.stages[0], operands)
            square = scaled_error(solve.step, error, taken.y, reached)
            return new, (taken, live & ((square < 1) != accepted))

        numbers = start + jnp.arange(record.base, dtype=jnp.int32)
        end, (taken, flips) = lax.scan(attempt, state, numbers)
        following = schedule.slot(start + record.base, record)
        done = start + record.base >= attempts
        target_t = jnp.where(done, t1, recorded.scalars[following, 0])
        target_low = jnp.where(done, 0.0, recorded.scalars[following, 1])
        target_y = jnp.where(done, recorded.y, recorded.states[following])
        gap = (target_t - end.t) + (target_low - end.low)
        last = jnp.max(jnp.where(taken.accepted, jnp.arange(record.base)[:, None], -1), axis=0)

        def pick(x: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x, last.reshape(1, *(1,) * (x.ndim - 2), lanes), axis=0)[0]

        h, y = pick(taken.h), [pick(taken.y[0])]
        _, arrived = method.step(pick(taken.t), h + gap, y, [pick(taken.stages[0][0])], operands)
        begun = (attempts > start) & (last >= 0)
        error = jnp.max(jnp.abs(arrived[0] - target_y), axis=0)
        return begun, jnp.abs(gap / h), error, jnp.sum(flips)

    fast = jax.jit(replay, compiler_options={"xla_backend_optimization_level": 0})

    def arrival(start: int, decisions: jax.Array) -> Arrival:
        begun, missed, error, flips = fast(jnp.int32(start), decisions)
        begun = np.asarray(begun)
        return Arrival(np.asarray(missed)[begun], np.asarray(error)[begun], int(flips), int(begun.sum()))

    return arrival


@pytest.fixture(scope="module")
def tight() -> tuple[Recorded, Any]:
    """Tolerances so close to rounding that another program would decide differently somewhere."""
    recorded = record_pendula(lanes=8192, t1=1.0, step=pk.Adaptive(3e-14, 3e-14), max_steps=512, scratch=32)
    return recorded, replay_program(recorded)


def test_replays_end_at_the_next_milestone(tight):
    recorded, replay = tight
    starts = range(0, int(recorded.attempts.max()), recorded.record.base)
    arrivals = [replay(start, recorded.decisions) for start in starts]
    assert len(arrivals) >= 4 and arrivals[0].lanes == 8192
    assert sum(a.flips for a in arrivals) > 0, "some decisions hang on rounding: the recorded ones were taken"
    for arrival in arrivals:
        assert arrival.missed.max() < 0.5, "so little is the last step stretched or shortened"
        assert arrival.error.max() < 1e-14


def test_a_broken_decision_shows(tight):
    recorded, replay = tight
    good = replay(0, recorded.decisions)
    broken = replay(0, recorded.decisions.at[1, 100].set(recorded.decisions[1, 100] ^ (1 << 9)))
    changed = np.flatnonzero(good.missed != broken.missed)
    np.testing.assert_array_equal(changed, [100])
    assert broken.missed[100] > 0.5


def test_the_backward_pass_takes_the_recorded_decisions(tight):
    recorded, _ = tight
    wrt = (False, False, True, True)
    kept = [recorded.decisions, recorded.scalars, recorded.states]

    @jax.jit
    def pull(decisions):
        return primitives.pull_back(
            recorded.inputs, recorded.status, recorded.attempts, [decisions, *kept[1:]], [jnp.ones_like(recorded.y)],
            recorded.solve, recorded.record, wrt,
        )  # fmt: skip

    good, _ = pull(recorded.decisions)
    broken, _ = pull(recorded.decisions.at[1, 100].set(recorded.decisions[1, 100] ^ (1 << 9)))
    np.testing.assert_array_equal(np.flatnonzero(np.any(good != broken, axis=0)), [100])


# Single precision, where the step sizes' noise is not small.


def pendula_gradients(
    dtype: Any, tolerances: tuple[float, float], adjoint: Any, lift: str
) -> tuple[np.ndarray, np.ndarray]:
    lanes = 512
    y0 = jnp.stack([jnp.linspace(0.5, 2.0, lanes), jnp.zeros(lanes)], axis=1).astype(dtype)
    p = jnp.asarray([2.0, 0.1, 0.5], dtype)

    def loss(y0, p):
        sol = pk.solve_ensemble(
            pendulum, y0, 0.0, 10.0, p, step=pk.Adaptive(*tolerances), max_steps=1024, adjoint=adjoint,
            config=pk.Config(lift=lift, block=128),
        )  # fmt: skip
        return jnp.sum(sol.ys * jnp.asarray([1.0, 0.3], dtype))

    lane, shared = jax.jit(jax.grad(loss, (0, 1)))(y0, p)
    return np.asarray(lane, np.float64), np.asarray(shared, np.float64)


@functools.cache
def accurate_gradients() -> tuple[np.ndarray, np.ndarray]:
    return pendula_gradients(np.float64, (1e-9, 1e-11), pk.Milestones(), "components")


@pytest.mark.parametrize(
    ("lift", "tolerances", "storage"),
    [
        ("components", (1e-6, 1e-6), (64, 64)),
        # The embedded error is rounding noise here and the two passes' step sizes differ freely.
        ("arrays", (1e-7, 1e-9), (64, 64)),
    ],
    ids=str,
)
def test_single_precision_gradients(lift, tolerances, storage):
    lane, shared = pendula_gradients(np.float32, tolerances, pk.Milestones(*storage), lift)
    want_lane, want_shared = accurate_gradients()
    assert np.abs(lane - want_lane).max() < 1e-4 * np.abs(want_lane).max()
    assert np.abs(shared - want_shared).max() < 1e-5 * np.abs(want_shared).max()
