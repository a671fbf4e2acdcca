"""Solves under JAX's transformations: whatever order they are applied in, the numbers are those of a loop over solves."""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pykernels as pk

STEP = pk.Adaptive(rtol=1e-2, atol=1e-2)
Y0 = jnp.asarray([1.0, 0.2])
ARGS = {"k": jnp.asarray(2.0), "p": jnp.asarray([0.1, 0.5])}
Y0S = jnp.stack([jnp.linspace(0.3, 2.0, 6), jnp.linspace(-1.0, 1.0, 6)], axis=1)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def field(t, y, args):
    x, v = y
    return jnp.stack([v, -args["k"] * jnp.sin(x) - args["p"][0] * v + args["p"][1] * jnp.cos(3 * t)])


def final(y0, args, t0=0.0, t1=2.0, *, adjoint=pk.Milestones(), step=STEP, max_steps=64, save_at=None):  # noqa: B008
    sol = pk.solve(
        field,
        y0,
        t0,
        t1,
        args,
        method=pk.heun,
        step=step,
        adjoint=adjoint,
        max_steps=max_steps,
        save_at=save_at,
    )
    return sol.ys


def ensemble(y0s, args, in_axes=(0, None), **settings):
    return pk.solve_ensemble(
        field, y0s, 0.0, 2.0, args, in_axes=in_axes, method=pk.heun, step=STEP, max_steps=64, **settings
    ).ys


def loss(y0, args):
    return jnp.sum(final(y0, args) * jnp.asarray([1.0, -2.0]))


def close(got: Any, want: Any, **tolerance: float) -> None:
    got_leaves, want_leaves = jax.tree.leaves(got), jax.tree.leaves(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(got_leaves, want_leaves, strict=True):
        assert np.all(np.isfinite(b)) and np.any(np.asarray(b) != 0)
        np.testing.assert_allclose(a, b, **(tolerance or CLOSE))


def spread(size: int) -> dict[str, jax.Array]:
    """Arguments with a leading axis."""
    return {"k": jnp.linspace(1.0, 3.0, size), "p": jnp.linspace(0.0, 0.6, 2 * size).reshape(size, 2)}


@functools.cache
def looped() -> tuple[Any, Any, Any]:
    """Values, gradients by y0 and gradients by args of the ensemble, one trajectory after the other."""
    values = [final(y, ARGS) for y in Y0S]
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    gradients = [gradient(y, ARGS) for y in Y0S]
    by_args = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[g[1] for g in gradients])
    return jnp.stack(values), jnp.stack([g[0] for g in gradients]), by_args


def test_jit_vmap_ensemble_and_loop_agree():
    values, _, _ = looped()
    close(jax.jit(final)(Y0, ARGS), final(Y0, ARGS))
    close(jax.vmap(final, (0, None))(Y0S, ARGS), values)
    close(jax.jit(jax.vmap(final, (0, None)))(Y0S, ARGS), values)
    close(ensemble(Y0S, ARGS), values)
    close(ensemble(Y0S.T, ARGS, in_axes=(1, None)), values)
    close(jax.vmap(final, (1, None), out_axes=1)(Y0S.T, ARGS), values.T)


def test_vmap_over_args_times_and_save_times():
    args, times = spread(3), jnp.asarray([1.0, 1.5, 2.0])
    over_args = jnp.stack([final(Y0, jax.tree.map(lambda leaf, i=i: leaf[i], args)) for i in range(3)])
    close(jax.vmap(final, (None, 0))(Y0, args), over_args)
    close(ensemble(jnp.broadcast_to(Y0, (3, 2)), args, in_axes=(0, 0)), over_args)
    close(ensemble(Y0, args, in_axes=(None, 0)), over_args)
    one = {"k": 0, "p": None}
    mixed = {"k": args["k"], "p": ARGS["p"]}
    by_leaf = jnp.stack([final(Y0, {"k": k, "p": ARGS["p"]}) for k in args["k"]])
    close(jax.vmap(final, (None, one))(Y0, mixed), by_leaf)
    close(ensemble(Y0, mixed, in_axes=(None, one)), by_leaf)
    close(
        jax.vmap(lambda t0, t1: final(Y0, ARGS, t0, t1))(times / 4, times),
        jnp.stack([final(Y0, ARGS, t / 4, t) for t in times]),
    )
    dates = jnp.stack([jnp.linspace(0.0, t, 4) for t in times])
    close(
        jax.vmap(lambda d: final(Y0, ARGS, save_at=d))(dates),
        jnp.stack([final(Y0, ARGS, save_at=d) for d in dates]),
    )


def test_nested_vmap():
    args = spread(3)
    want = jnp.stack(
        [
            jnp.stack([final(y, jax.tree.map(lambda leaf, i=i: leaf[i], args)) for i in range(3)])
            for y in Y0S[:2]
        ]
    )
    close(jax.vmap(jax.vmap(final, (None, 0)), (0, None))(Y0S[:2], args), want)
    close(jax.vmap(jax.vmap(final, (0, None)), (None, 0), out_axes=1)(Y0S[:2], args), want)


def test_gradients_of_ensembles():
    _, by_state, by_args = looped()
    summed = jax.tree.map(lambda leaf: leaf.sum(0), by_args)
    weights = jnp.asarray([1.0, -2.0])
    close(jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))(Y0S, ARGS), (by_state, by_args))
    total = jax.grad(lambda y0s, args: jnp.sum(jax.vmap(loss, (0, None))(y0s, args)), (0, 1))
    close(jax.jit(total)(Y0S, ARGS), (by_state, summed))
    whole = jax.grad(lambda y0s, args: jnp.sum(ensemble(y0s, args) * weights), (0, 1))
    close(jax.jit(whole)(Y0S, ARGS), (by_state, summed))
    # Shared within each of two ensembles, not between them: the sums are over an ensemble's own lanes.
    pairs = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), ARGS)
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]).sum(1), by_args)
    close(jax.jit(jax.vmap(whole))(Y0S.reshape(2, 3, 2), pairs), (by_state.reshape(2, 3, 2), halves))
    close(
        jax.jit(jax.vmap(whole, (0, None)))(Y0S.reshape(2, 3, 2), ARGS), (by_state.reshape(2, 3, 2), halves)
    )


def test_shared_state_of_an_ensemble():
    """A y0 without a trajectory axis is shared too, and its gradient summed."""
    args = spread(3)
    single = [jax.grad(loss)(Y0, jax.tree.map(lambda leaf, i=i: leaf[i], args)) for i in range(3)]
    weights = jnp.asarray([1.0, -2.0])
    close(jax.grad(lambda y: jnp.sum(ensemble(y, args, in_axes=(None, 0)) * weights))(Y0), sum(single))


def test_jacobians_forward_and_reverse():
    dates = jnp.asarray([0.5, 2.0])
    reverse = jax.jit(jax.jacrev(functools.partial(final, save_at=dates), (0, 1)))(Y0, ARGS)
    forward = jax.jit(jax.jacfwd(functools.partial(final, save_at=dates, adjoint=pk.ForwardOnly()), (0, 1)))(
        Y0, ARGS
    )
    assert reverse[0].shape == (2, 2, 2)
    close(reverse, forward, rtol=1e-9, atol=1e-11)
    _, by_state, _ = looped()
    jacobian = jax.jit(jax.jacrev(final))(Y0S[0], ARGS)
    close(jnp.asarray([1.0, -2.0]) @ jacobian, by_state[0])


def test_reverse_mode_of_forward_only_is_refused():
    with pytest.raises(TypeError, match="Milestones"):
        jax.grad(lambda y: jnp.sum(final(y, ARGS, adjoint=pk.ForwardOnly())))(Y0)


def test_scan_over_solves():
    """Consecutive intervals in a scan, and the gradient back through all of them."""
    starts = jnp.asarray([0.0, 0.5, 1.0, 1.5])

    def own(t, y, args):  # no other test has used this field
        return field(t, y, args)

    def final(y0, args, t0, t1):
        return pk.solve(own, y0, t0, t1, args, method=pk.heun, step=STEP, max_steps=64).ys

    def scanned(y0, args):
        def interval(y, start):
            y = final(y, args, start, start + 0.5)
            return y, y

        return lax.scan(interval, y0, starts)

    def unrolled(y0, args):
        rows = []
        for start in np.asarray(starts):
            y0 = final(y0, args, start, start + 0.5)
            rows.append(y0)
        return y0, jnp.stack(rows)

    close(jax.jit(scanned)(Y0, ARGS), unrolled(Y0, ARGS))

    def total(function):
        return lambda y0, args: jnp.sum(jnp.sin(function(y0, args)[1]))

    got = jax.jit(jax.grad(total(scanned), (0, 1)))(Y0, ARGS)
    close(got, jax.grad(total(unrolled), (0, 1))(Y0, ARGS))
    checkpointed = jax.jit(jax.grad(jax.checkpoint(total(scanned)), (0, 1)))(Y0, ARGS)
    close(checkpointed, got)


def test_gradients_do_not_depend_on_what_was_differentiated_before():
    """By both, by the state alone, and then by both in a scan: three different sets of wanted cotangents."""

    def decay(t, y, p):
        return -p * y

    def one(y, p, t=0.0):
        return pk.solve(decay, y, t, t + 1.0, p, method=pk.bosh3, step=pk.Fixed(8)).ys

    def scanned(y, p):
        return lax.scan(lambda y, t: (one(y, p, t), None), y, jnp.arange(3.0))[0]

    y, p = jnp.asarray(1.0), jnp.asarray(2.0)
    # One step multiplies y by the method's stability function at -p/8, a cubic.
    factor, slope = jax.value_and_grad(lambda p: (1 - p / 8 + (p / 8) ** 2 / 2 - (p / 8) ** 3 / 6) ** 8)(p)
    close(jax.grad(one, (0, 1))(y, p), (factor, slope))
    close(jax.grad(one, 0)(y, p), factor)
    close(jax.jit(jax.grad(scanned, (0, 1)))(y, p), (factor**3, 3 * factor**2 * slope))


def test_closures_over_traced_values():
    """A field may close over values being differentiated or batched: the gradient is that of passing them as arguments."""
    _, by_state, by_args = looped()

    def closed(y0, args):
        sol = pk.solve(
            lambda t, y, _: field(t, y, args), y0, 0.0, 2.0, method=pk.heun, step=STEP, max_steps=64
        )
        return jnp.sum(sol.ys * jnp.asarray([1.0, -2.0]))

    close(jax.grad(closed, (0, 1))(Y0S[0], ARGS), (by_state[0], jax.tree.map(lambda leaf: leaf[0], by_args)))
    args = spread(3)
    got = jax.jit(jax.vmap(jax.grad(closed, 1), (None, 0)))(Y0, args)
    close(got, jax.jit(jax.vmap(jax.grad(loss, 1), (None, 0)))(Y0, args))

    def closed_ensemble(args):
        sol = pk.solve_ensemble(
            lambda t, y, _: field(t, y, args), Y0S, 0.0, 2.0, method=pk.heun, step=STEP, max_steps=64
        )
        return jnp.sum(sol.ys * jnp.asarray([1.0, -2.0]))

    close(jax.grad(closed_ensemble)(ARGS), jax.tree.map(lambda leaf: leaf.sum(0), by_args))


def test_second_derivatives_through_the_bounded_tree():
    steps = 4

    def tree(y):
        sol = pk.solve(
            field, y, 0.0, 1.0, ARGS, method=pk.heun, step=pk.Fixed(steps), adjoint=pk.BoundedTree(branching=2)
        )  # fmt: skip
        return jnp.sum(jnp.sin(sol.ys))

    def plain(y):
        h = 1.0 / steps
        for i in range(steps):
            first = field(i * h, y, ARGS)
            second = field((i + 1) * h, y + h * first, ARGS)
            y = y + h / 2 * (first + second)
        return jnp.sum(jnp.sin(y))

    close(jax.jit(jax.hessian(tree))(Y0), jax.jit(jax.hessian(plain))(Y0), rtol=1e-11)


# Programs.


def primitives_in(jaxpr: Any) -> Counter[str]:
    """How often each primitive occurs in a jaxpr, in all its inner jaxprs too."""
    counts: Counter[str] = Counter()
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        counts[eqn.primitive.name] += 1
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                counts += primitives_in(value)
    return counts


def ours(counts: Counter[str]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if name.startswith("pykernels")}


def test_a_solve_is_one_primitive_and_its_gradient_two():
    assert ours(primitives_in(jax.make_jaxpr(final)(Y0, ARGS))) == {"pykernels_solve": 1}
    assert ours(primitives_in(jax.make_jaxpr(jax.jit(jax.vmap(final, (0, None))))(Y0S, ARGS))) == {
        "pykernels_solve": 1
    }
    pair = {"pykernels_solve": 1, "pykernels_pull_back": 1}
    assert ours(primitives_in(jax.make_jaxpr(jax.grad(loss, (0, 1)))(Y0, ARGS))) == pair
    both = jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None))
    assert ours(primitives_in(jax.make_jaxpr(both)(Y0S, ARGS))) == pair
    forward = jax.make_jaxpr(jax.jacfwd(functools.partial(final, adjoint=pk.ForwardOnly())))(Y0, ARGS)
    assert ours(primitives_in(forward)) == {"pykernels_solve_tangents": 1}


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_lowering_for_other_platforms(platform):
    """Without the platform present: loops in plain StableHLO."""
    y0, args = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (Y0, ARGS))
    traced = jax.jit(jax.value_and_grad(lambda y0, args: jnp.sum(final(y0, args)), (0, 1))).trace(y0, args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") >= 4
    assert re.findall(r"custom_call @?\"?([\w.$]+)", text) == []


def test_ahead_of_time_compilation_and_export():
    function = jax.jit(jax.value_and_grad(loss, (0, 1)))
    want = function(Y0, ARGS)
    program = function.lower(Y0, ARGS).compile()
    close(program(Y0, ARGS), want, rtol=0.0)
    # JAX asks to be told that a custom call may be exported: a native kernel carries all it needs.
    allowed = [jax.export.DisabledSafetyCheck.custom_call("pykernels_lanes")]
    exported = jax.export.export(function, platforms=["cpu"], disabled_checks=allowed)(Y0, ARGS)
    close(exported.call(Y0, ARGS), want, rtol=1e-13)
    pytest.importorskip("flatbuffers", reason="JAX serialises exports with it")
    restored = jax.export.deserialize(exported.serialize())
    close(restored.call(Y0, ARGS), want, rtol=1e-13)


def test_donation():
    want = ensemble(Y0S, ARGS)
    donated = jnp.array(Y0S)
    got = jax.jit(ensemble, donate_argnums=0)(donated, ARGS)
    close(got, want)
    assert donated.is_deleted()


def test_eager_calls_do_not_compile_twice(caplog):
    def run(scale: float) -> tuple[Any, Any]:
        args = {"k": ARGS["k"] * scale, "p": ARGS["p"]}
        return final(Y0 * scale, args), jax.grad(loss)(Y0 * scale, args)

    first = run(1.0)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        second = run(1.0)
        third = run(1.25)
    compiled = [record.getMessage() for record in caplog.records if "ompil" in record.getMessage()]
    assert [message for message in compiled if "Compiling" in message or "XLA compilation" in message] == []
    close(second, first, rtol=0.0)
    assert not np.allclose(third[0], first[0])


def test_the_log_would_show_a_compilation(caplog):
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        pk.solve(lambda t, y, _: -y, jnp.asarray(1.0), 0.0, 1.0, method=pk.euler, step=pk.Fixed(3))
    assert any("XLA compilation" in record.getMessage() for record in caplog.records)


def test_threads():
    """Two threads, each with its own field and first use of it, get what one thread gets."""

    def work(rate: float) -> np.ndarray:
        def decay(t, y, scale):
            return -rate * scale * y + jnp.sin(t)

        def value(y, scale):
            return pk.solve(
                decay, y, 0.0, 1.0, scale, method=pk.bosh3, step=pk.Adaptive(1e-3, 1e-3), max_steps=32
            ).ys

        y = jnp.asarray(1.5)
        rows = [jax.value_and_grad(value, (0, 1))(y, jnp.asarray(s)) for s in (0.5, 1.0, 2.0)]
        return np.asarray([jax.tree.leaves(row) for row in rows])

    results: dict[float, Any] = {}

    def run(rate: float) -> None:
        try:
            results[rate] = work(rate)
        except BaseException as error:
            results[rate] = error

    threads = [threading.Thread(target=run, args=(rate,)) for rate in (1.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for rate, got in results.items():
        assert isinstance(got, np.ndarray), got
        np.testing.assert_allclose(got, work(rate), rtol=1e-13)
    assert len(results) == 2


SHARDED = """
import warnings
warnings.simplefilter("error")
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import pykernels as pk

assert len(jax.devices()) == 2
mesh = Mesh(np.asarray(jax.devices()), ("lanes",))

def field(t, y, p):
    return -p * y + jnp.sin(3 * t)

def values(y0s, p):
    return pk.solve_ensemble(field, y0s, 0.0, 1.0, p, method=pk.bosh3, step=pk.Adaptive(1e-3, 1e-3), max_steps=32,
                             config=pk.Config(block=4)).ys

def loss(y0s, p):
    return jnp.sum(values(y0s, p) ** 2)

y0s, p = jnp.linspace(-1.0, 2.0, 16), jnp.asarray(2.0)
want = jax.jit(jax.grad(loss, (0, 1)))(y0s, p)

mapped = jax.jit(jax.shard_map(values, mesh=mesh, in_specs=(P("lanes"), P()), out_specs=P("lanes")))
np.testing.assert_allclose(mapped(y0s, p), values(y0s, p), rtol=1e-13)

def outer(y0s, p):
    return jnp.sum(jax.shard_map(values, mesh=mesh, in_specs=(P("lanes"), P()), out_specs=P("lanes"))(y0s, p) ** 2)

got = jax.jit(jax.grad(outer, (0, 1)))(y0s, p)
for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-12)

def inner(y0s, p):
    gradients = jax.grad(loss, (0, 1))(y0s, jax.lax.pcast(p, "lanes", to="varying"))
    return gradients[0], jax.lax.psum(gradients[1], "lanes")

got = jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=(P("lanes"), P()), out_specs=(P("lanes"), P())))(y0s, p)
for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-12)

placed = jax.device_put(y0s, NamedSharding(mesh, P("lanes")))
np.testing.assert_allclose(jax.jit(values)(placed, p), values(y0s, p), rtol=1e-13)
print("sharded")
"""


def test_shard_map_over_two_devices():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(pk.__file__).parent.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "sharded\n"
