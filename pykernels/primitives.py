"""The primitives: whole solves of an ensemble, and the passes over a state in memory, as single JAX operations. Only this
file extends JAX.

`solve` integrates, `pull_back` takes cotangents back through a recorded solve, `solve_tangents` integrates values and
tangents together. All are batched natively: `jax.vmap` adds lanes. `rk_stage`, `rk_finish`, `rk_accept`, `milestone_save`
and `milestone_restore` are the step kernels of the array plan, on states (rows, columns): `jax.vmap` adds rows. What all of
them mean is in `reference.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir, partial_eval

from pykernels import array_plan, reference
from pykernels.kernels import body, columns, cpu, cuda, pallas, triton, xla
from pykernels.kernels.body import Kernel
from pykernels.kernels.buffers import Buffer
from pykernels.kernels.launch import Image
from pykernels.kernels.passes import (
    INT32,
    Accept,
    Combine,
    Finish,
    Kind,
    Matrix,
    Pass,
    Restore,
    Save,
    shape_of,
    structs_of,
)
from pykernels.kernels.stepper import SUCCESS, Solve
from pykernels.schedule import Record


def solve(inputs: Sequence[jax.Array], solve: Solve, record: Record | None = None) -> list[jax.Array]:
    """Integrate an ensemble. Inputs as `Solve` lists them, lanes last.

    Returns the values' leaves `([saves,] *shape, lanes)`, NaN for failed lanes, then per lane status, attempts and accepted
    attempts (int32), then, with `record`, what `pull_back` needs.
    """
    count = len(solve.field.y_shapes)
    results = solve_p.bind(*inputs, solve=solve, record=record)
    return [*results[:count], *results[count], *results[count + 1 :]]


def pull_back(
    inputs: Sequence[jax.Array],
    status: jax.Array,
    attempts: jax.Array,
    recorded: Sequence[jax.Array],
    cotangents: Sequence[jax.Array],
    solve: Solve,
    record: Record,
    wrt: Sequence[bool],
) -> list[jax.Array]:
    """Cotangents of the inputs with `wrt` (the leaves of y0 always), from those of the values' leaves.

    Those of shared inputs are summed over lanes. A failed lane with a cotangent other than zero gets NaN, in its own inputs
    and in the shared ones; a lane whose cotangents are all zero contributes exactly zero.
    """
    operands = vary_together([*inputs, status, attempts, *recorded, *cotangents])
    return pull_back_p.bind(*operands, solve=solve, record=record, wrt=tuple(wrt))


def any_lane(mask: jax.Array) -> jax.Array:
    """Whether any lane is set, over *all* lanes: under `jax.vmap` too, so that it can decide a `lax.cond`."""
    return any_lane_p.bind(mask)


def fail(value: jax.Array, failed: jax.Array) -> jax.Array:
    """A linear identity that turns what is not zero into NaN in failed lanes, forwards and backwards: a failed lane's used
    cotangent becomes NaN, an unused one stays exactly zero."""
    return fail_p.bind(value, jnp.broadcast_to(failed, value.shape))


def permute(value: jax.Array, places: jax.Array, back: jax.Array) -> jax.Array:
    """`value[..., places]` for a permutation whose inverse is `back`. Its transposition gathers too, where that of an index
    would be a scatter."""
    return permute_p.bind(value, places, back)


def rk_combine(
    operands: Sequence[jax.Array],
    h: jax.Array,
    plain: Sequence[Sequence[float]],
    scaled: Sequence[Sequence[float]],
    *,
    in_place: bool = False,
    runner: str | None = None,
) -> list[jax.Array]:
    """`out[i] = sum_j (plain[i][j] + h scaled[i][j]) operands[j]` in one pass over memory; the matrices are static.

    Operands and results (rows, columns), h (rows,) or a scalar. What has only zeros in its column is not read. Linear in the
    operands, whose cotangents are one such pass with the matrices transposed, and linear in h. `in_place`: the first result
    takes the memory of the first operand, if nothing else needs that.
    """
    used = [j for j in range(len(operands)) if any(row[j] for row in (*plain, *scaled))] or [0]
    in_place = in_place and used[0] == 0
    kept = [operands[j] for j in used]
    plain, scaled = (
        tuple(tuple(float(row[j]) for j in used) for row in matrix) for matrix in (plain, scaled)
    )
    pass_ = Combine(np.dtype(kept[0].dtype), plain, scaled, in_place, runner=runner)
    return _bind(rk_combine_p, pass_, [*kept, h])


def rk_stage(
    y: jax.Array | None,
    slopes: Sequence[jax.Array],
    h: jax.Array,
    weights: Sequence[float],
    error_weights: Sequence[float] | None = None,
    *,
    in_place: bool = False,
    runner: str | None = None,
) -> Any:
    """`y + h sum_j weights[j] slopes[j]` in one pass over memory, without y where it is None.

    y and slopes (rows, columns), h (rows,) or a scalar; the weights are Python floats, a slope with weight zero is not read.
    With `error_weights`, also `h sum_j error_weights[j] slopes[j]` from the same
    pass, for `rk_finish(error=)`. `in_place`: the result takes the memory of y, if nothing else needs that.
    """
    n = len(slopes)
    if len(weights) != n or (error_weights is not None and len(error_weights) != n):
        raise ValueError(f"{n} slopes need as many weights")
    if y is None and n == 0:
        raise ValueError("neither a state nor a slope")
    operands, first = ([], 0) if y is None else ([y], 1)
    scaled = [[0.0] * first + list(w) for w in (weights, error_weights) if w is not None]
    plain = [[1.0] * first + [0.0] * n, [0.0] * (first + n)][: len(scaled)]
    in_place = in_place and y is not None
    outs = rk_combine([*operands, *slopes], h, plain, scaled, in_place=in_place, runner=runner)
    return outs[0] if error_weights is None else tuple(outs)


def rk_finish(
    y: jax.Array,
    slopes: Sequence[jax.Array],
    h: jax.Array,
    weights: Sequence[float] | None,
    error_weights: Sequence[float],
    rtol: float,
    atol: float,
    *,
    new: jax.Array | None = None,
    error: jax.Array | None = None,
    milestone: tuple[jax.Array, jax.Array] | None = None,
    runner: str | None = None,
) -> tuple[jax.Array, ...]:
    """The end of an attempt in one pass over memory: the new state and, per row, the sum of squares of its embedded error in
    units of the tolerance.

    The new state is `y + h sum_j weights[j] slopes[j]`, or `new` where it is known already (an FSAL method evaluates the
    field there; weights are then None). The error of an element is `(error + h sum_j error_weights[j] slopes[j]) /
    (atol + rtol max(|y|, |new|))`, `error` being what `rk_stage` has summed before. The sum over columns is NaN or infinite
    where the error or the new state is not finite; states of several leaves add their sums before dividing by the number of
    elements. A constant for differentiation.

    With `milestone=(buffer, slot)`, buffer (slots, rows, columns), slot int32, a scalar or (rows,): the same pass writes y,
    the state the attempt began with, to the row's slot, in place; a slot that there is not (-1) writes nothing.

    Returns (new, sum), and the buffer if there is one.
    """
    n = len(slopes)
    if len(error_weights) != n or (new is None) == (weights is None):
        raise ValueError("as many error weights as slopes, and either weights or the new state")
    if weights is not None and len(weights) != n:
        raise ValueError(f"{n} slopes need as many weights")
    used = [j for j in range(n) if error_weights[j] or (weights is not None and weights[j])]
    pass_ = Finish(
        np.dtype(y.dtype),
        tuple(float(weights[j]) for j in used) if weights is not None else (),
        tuple(float(error_weights[j]) for j in used),
        float(rtol),
        float(atol),
        given=new is not None,
        partial=error is not None,
        slots=None if milestone is None else milestone[0].shape[0],
        runner=runner,
    )
    given = [x for x in (new, error) if x is not None]
    outs = _bind(rk_finish_p, pass_, [y, *[slopes[j] for j in used], h, *given, *(milestone or ())])
    return tuple(outs) if new is None else (new, *outs)


def rk_accept(
    olds: Sequence[jax.Array], news: Sequence[jax.Array], accepted: jax.Array, *, runner: str | None = None
) -> list[jax.Array]:
    """`where(accepted, new, old)` by row for states (rows, columns), in one pass and in the old ones' memory: a row that is
    not accepted costs nothing. `accepted` is (rows,) or a scalar."""
    if not olds:
        return []
    pass_ = Accept(np.dtype(olds[0].dtype), len(olds), runner=runner)
    return _bind(rk_accept_p, pass_, [*olds, *news, accepted])


def milestone_save(
    buffer: jax.Array, slot: jax.Array, value: jax.Array, *, runner: str | None = None
) -> jax.Array:
    """The buffer (slots, rows, columns) with `value` (rows, columns) in its slot, in its memory. The slot is int32, a
    scalar or (rows,): each row's own; a row whose slot there is not (-1) is not saved."""
    pass_ = Save(np.dtype(buffer.dtype), buffer.shape[0], runner=runner)
    return _bind(milestone_save_p, pass_, [buffer, slot, value])[0]


def milestone_restore(buffer: jax.Array, slot: jax.Array, *, runner: str | None = None) -> jax.Array:
    """What is in the buffer's slot, (rows, columns); a row whose slot there is not is zero."""
    pass_ = Restore(np.dtype(buffer.dtype), buffer.shape[0], runner=runner)
    return _bind(milestone_restore_p, pass_, [buffer, slot])[0]


def uninitialized(shape: Sequence[int], dtype: Any, *, number: int = 0) -> jax.Array:
    """A buffer of undefined contents, for what is written before it is read. Where a platform can, it costs nothing: no pass
    over its memory, no page before its first use. Buffers of one shape in one function want different numbers: XLA may take
    equal ones for the same value, and copies."""
    return uninitialized_p.bind(shape=tuple(shape), dtype=np.dtype(dtype), number=number)


def _lanes(inputs: Sequence[Any], solve: Solve) -> int:
    return inputs[solve.first_y].shape[-1]


def _structs(buffers: Sequence[Buffer], lanes: int) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((*b.shape, lanes) if b.lanes else b.shape, b.dtype) for b in buffers]


def _varying(aval: Any) -> frozenset[Any]:
    """The mesh axes of an enclosing `jax.shard_map` along which a value differs."""
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # JAX 0.12


def vary_together(values: Sequence[Any]) -> list[Any]:
    """Under `jax.shard_map`, values that differ along the same mesh axes; reverse mode sums over what is added here."""
    axes = [_varying(jax.typeof(value)) for value in values]
    union = frozenset().union(*axes)
    return [
        value if mine == union else jax.lax.pcast(value, tuple(sorted(union - mine)), to="varying")
        for value, mine in zip(values, axes, strict=True)
    ]


def _abstract(structs: Sequence[jax.ShapeDtypeStruct], like: Any) -> list[Any]:
    """Abstract results that differ along the mesh axes that the operand `like` does, as all operands do."""
    if not _varying(like):
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in structs]
    spec = jax.sharding.PartitionSpec
    return [
        like.update(
            shape=s.shape, dtype=s.dtype, sharding=like.sharding.update(spec=spec(*[None] * len(s.shape)))
        )
        for s in structs
    ]


def _lower(implementation: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """A lowering rule that traces `implementation`. Its loops know nothing of a mesh."""
    rule = mlir.lower_fun(implementation, multiple_results=True)

    def lower(context: Any, *operands: Any, **statics: Any) -> Any:
        plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in context.avals_in]
        return rule(context.replace(avals_in=plain), *operands, **statics)

    return lower


Run = Callable[[Kernel, Sequence[jax.Array], int], list[jax.Array]]


def _run_portable(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    if kernel.solve.kind == "vmap":
        return array_plan.run(kernel, operands, lanes, _passes(kernel.solve.runner))
    return _run_loops(kernel, operands, lanes)


def _passes(runner: str | None) -> array_plan.Passes:
    """The step kernels, all by one runner."""
    return array_plan.Passes(
        stage=functools.partial(rk_stage, runner=runner),
        finish=functools.partial(rk_finish, runner=runner),
        accept=functools.partial(rk_accept, runner=runner),
        save=functools.partial(milestone_save, runner=runner),
        restore=functools.partial(milestone_restore, runner=runner),
        empty=uninitialized,
    )


def _run_loops(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    """The kernel's body as XLA's loops."""
    if kernel.solve.runner not in (None, "xla"):
        raise ValueError(f"Config(runner={kernel.solve.runner!r}) is not possible on this platform")
    # A recorded solve is lifted as its replay will be: XLA then rounds both alike, which float32 needs (see body.py).
    solve = xla.resolve(kernel.solve, lanes, differentiated=kernel.record is not None)
    return xla.run(dataclasses.replace(kernel, solve=solve), operands, lanes)


class _Runner(NamedTuple):
    """A runner of a platform: why it does not run a kernel (None: it does), how it does, and why it is the better one for a
    kernel than those before it (None: it is not)."""

    obstacle: Callable[[Kernel, int], str | None]
    run: Run
    preferred: Callable[[Kernel], str | None] = lambda kernel: None


# The runners of each platform besides the portable one, by the names that `Config` knows; the first one is the default.
_RUNNERS: dict[str, dict[str, _Runner]] = {
    "cpu": {"native": _Runner(cpu.obstacle, cpu.run)},
    "cuda": {
        "native": _Runner(cuda.obstacle, cuda.run),
        "pallas": _Runner(pallas.obstacle, pallas.run, pallas.preferred),
    },
}


def _run_on(platform: str) -> Run:
    """The platform's runner for each kernel, and the portable one for what none of them runs."""

    def run(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
        if kernel.solve.kind == "vmap":
            return _run_portable(kernel, operands, lanes)
        name, reason = runner_of(platform, kernel, lanes)
        if name != "xla":
            return _RUNNERS[platform][name].run(kernel, operands, lanes)
        if kernel.solve.runner in _RUNNERS[platform]:
            raise ValueError(f"Config(runner={kernel.solve.runner!r}) is not possible: {reason}")
        return _run_portable(kernel, operands, lanes)

    return run


def runner_of(platform: str, kernel: Kernel, lanes: int) -> tuple[str, str]:
    """The name of the runner that a kernel gets on a platform, "xla" for the portable one, and why.

    The one asked for; else one that is preferred for this kernel; else the platform's first one without an obstacle.
    """
    asked = kernel.solve.runner
    if asked == "xla":
        return "xla", "asked for by config"
    if kernel.solve.kind == "vmap":
        name, reason = _step_kernels_of(platform, kernel.solve, lanes)
        return name, f"loops are XLA's, their step kernels' runner {name}: {reason}"
    runners = _RUNNERS[platform]
    if asked is not None:
        obstacle = runners[asked].obstacle(kernel, lanes) if asked in runners else f"not on {platform}"
        return ("xla", obstacle) if obstacle is not None else (asked, "asked for by config")
    for name, runner in runners.items():
        better = runner.preferred(kernel)
        if better is not None and runner.obstacle(kernel, lanes) is None:
            return name, better
    obstacles: list[str] = []
    for name, runner in runners.items():
        obstacle = runner.obstacle(kernel, lanes)
        if obstacle is None:
            return name, "the default" if not obstacles else "; ".join(obstacles)
        obstacles.append(obstacle)
    return "xla", "; ".join(obstacles)


def _step_kernels_of(platform: str, solve: Solve, lanes: int) -> tuple[str, str]:
    """The runner of the array plan's passes over the largest leaf, and why."""
    columns = max(math.prod(shape) for shape in solve.field.y_shapes)
    stage = Combine(solve.field.dtype, ((1.0, 0.0),), ((0.0, 1.0),), runner=solve.runner)
    return pass_runner_of(platform, stage, lanes, columns)


def runner_on_cpu(solve: Solve, kernels: Sequence[Kernel], lanes: int) -> tuple[str, str, int]:
    """The runner a CPU takes for these kernels, why, and its lanes per block. No kernels: plain JAX."""
    chosen = [runner_of("cpu", kernel, lanes) for kernel in kernels] or [("xla", "this adjoint is plain JAX")]
    for name, reason in chosen:
        if solve.kind == "vmap":
            return name, reason, lanes
        if name == "xla":
            return name, reason, xla.block_size(lanes, xla.wanted_block(solve))
    return "native", "machine code through LLVM", cpu.width(solve, lanes)


# How each of a GPU's runners compiles a kernel for a compute capability, and its lanes per block (None: one per
# thread).
_IMAGES: dict[str, tuple[Callable[[Kernel, int], Image], Callable[[Kernel], int | None]]] = {
    "native": (
        lambda kernel, capability: cuda.compiled(cuda.lifted(kernel), capability),
        lambda kernel: None,
    ),
    "pallas": (
        lambda kernel, capability: pallas.compiled(pallas.lifted(kernel), capability),
        pallas.block_size,
    ),
}


def gpu_images(
    kernels: Sequence[Kernel], lanes: int, capability: int
) -> list[tuple[str, Image, int | None]] | str:
    """For each kernel the runner that a GPU takes, what it compiles for a compute capability and its lanes per block, or why
    there is nothing compiled. No kernels: plain JAX."""
    chosen = [runner_of("cuda", kernel, lanes) for kernel in kernels]
    for name, reason in chosen or [("xla", "this adjoint is plain JAX")]:
        if name not in _IMAGES:
            return reason
    found = []
    for (name, _), kernel in zip(chosen, kernels, strict=True):
        compiled, block = _IMAGES[name]
        found.append((name, compiled(kernel, capability), block(kernel)))
    return found


def _define(
    name: str, implementation: Callable[..., list[jax.Array]], abstract: Callable[..., Any]
) -> jex.Primitive:
    """A primitive with several results. `implementation` says what it means with the kernels run by `run`: natively where
    the platform has such a runner, portably everywhere else."""
    primitive = jex.Primitive(name)
    primitive.multiple_results = True
    statics = [n for n, p in inspect.signature(implementation).parameters.items() if p.kind is p.KEYWORD_ONLY]
    statics.remove("run")

    def eagerly(*operands: jax.Array, **parameters: Any) -> list[jax.Array]:
        return primitive.bind(*operands, **parameters)

    primitive.def_impl(jax.jit(eagerly, static_argnames=statics))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, _lower(functools.partial(implementation, run=_run_portable)))
    for platform in _RUNNERS:
        rule = _lower(functools.partial(implementation, run=_run_on(platform)))
        mlir.register_lowering(primitive, rule, platform=platform)
    return primitive


def _solve(*inputs: jax.Array, solve: Solve, record: Record | None, run: Run) -> list[jax.Array]:
    results = run(Kernel(solve, record), inputs, _lanes(inputs, solve))
    count = len(solve.field.y_shapes)
    sound = results[count][0] == SUCCESS
    values = [jnp.where(sound, value, jnp.nan) for value in results[:count]]
    if solve.saves is not None:
        inside = _inside(inputs, solve)
        rows = [inside.reshape(inside.shape[0], *(1,) * (v.ndim - 2), inside.shape[1]) for v in values]
        values = [jnp.where(row, value, jnp.nan) for row, value in zip(rows, values, strict=True)]
    return values + results[count:]


def _inside(inputs: Sequence[jax.Array], solve: Solve) -> jax.Array:
    """Which save times lie in the interval, (saves, lanes or 1): the others have no value."""
    t0, t1, dates = (inputs[i] for i in (0, 1, solve.first_y - 1))
    dates = dates if solve.lane[solve.first_y - 1] else dates[:, None]
    forward = t1 >= t0
    after = jnp.where(forward, dates >= t0, dates <= t0)
    return after & jnp.where(forward, dates <= t1, dates >= t1)


def _solve_abstract(*inputs: Any, solve: Solve, record: Record | None) -> list[Any]:
    lanes = _lanes(inputs, solve)
    if solve.kind == "vmap":
        structs = _structs(body.forward_buffers(solve, None), lanes) + array_plan.record_shapes(
            solve, record, lanes
        )
    else:
        structs = _structs(body.forward_buffers(solve, record), lanes)
    return _abstract(structs, inputs[0])


def _pull_back(
    *operands: jax.Array, solve: Solve, record: Record, wrt: tuple[bool, ...], run: Run
) -> list[jax.Array]:
    inputs, status, attempts, recorded, cotangents = _parts(operands, solve)
    lanes = _lanes(inputs, solve)
    failed = status != SUCCESS
    used = functools.reduce(
        jnp.logical_or,
        [jnp.any(ct != 0, axis=tuple(range(ct.ndim - 1))) for ct in cotangents],
        jnp.zeros(lanes, bool),
    )
    attempts = jnp.where(failed | ~used, 0, attempts)
    cotangents = [jnp.where(failed, 0.0, ct) for ct in cotangents]
    kernel = Kernel(solve, record, wrt)
    raw = run(kernel, [*inputs, attempts, *recorded, *cotangents], lanes)
    poison = failed & used
    wanted_lanes = [has_lanes for has_lanes, w in zip(solve.lane, wrt, strict=True) if w]
    return [
        _with_failures(value, buffer, has_lanes, failed, poison)
        for value, buffer, has_lanes in zip(raw, kernel.results, wanted_lanes, strict=True)
    ]


def _with_failures(
    value: jax.Array, buffer: Buffer, has_lanes: bool, failed: jax.Array, poison: jax.Array
) -> jax.Array:
    nan = jnp.asarray(jnp.nan, value.dtype)
    if not buffer.lanes:
        return jnp.where(jnp.any(poison), nan, value)
    value = jnp.where(failed, jnp.where(poison, nan, 0.0), value)
    return value if has_lanes else jnp.sum(value, axis=-1)


def _parts(operands: Sequence[Any], solve: Solve) -> tuple[Any, ...]:
    """inputs, status, attempts, recorded, cotangents."""
    n, n_y = len(solve.lane), len(solve.field.y_shapes)
    return operands[:n], operands[n], operands[n + 1], operands[n + 2 : -n_y], operands[-n_y:]


def _pull_back_abstract(*operands: Any, solve: Solve, record: Record, wrt: tuple[bool, ...]) -> list[Any]:
    wanted = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a, w in zip(operands, wrt, strict=False) if w]
    return _abstract(wanted, operands[0])


def _solve_tangents(
    *operands: jax.Array, solve: Solve, active: tuple[bool, ...], run: Run
) -> list[jax.Array]:
    """Values, status and counts, then tangents of the values: JAX's forward mode through the portable runner's loops.

    Step sizes and decisions are comparisons and stopped gradients in the body, so the tangents ride along.
    """
    del run  # tangents are the portable runner's on every platform
    portable = dataclasses.replace(solve, runner=None)
    n = len(solve.lane)
    inputs, given = operands[:n], iter(operands[n:])
    some = [value for value, has in zip(inputs, active, strict=True) if has]

    def values(*some: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        mine = iter(some)
        results = _solve(
            *[next(mine) if a else x for x, a in zip(inputs, active, strict=True)],
            solve=portable, record=None, run=_run_loops,
        )  # fmt: skip
        count = len(solve.field.y_shapes)
        return results[:count], results[count:]

    primal, tangent, rest = jax.jvp(values, some, list(given), has_aux=True)
    sound = rest[0][0] == SUCCESS
    return [*primal, *rest, *[jnp.where(sound, t, jnp.nan) for t in tangent]]


def _solve_tangents_abstract(*operands: Any, solve: Solve, active: tuple[bool, ...]) -> list[Any]:
    results = _solve_abstract(*operands[: len(solve.lane)], solve=solve, record=None)
    return [*results, *results[: len(solve.field.y_shapes)]]


solve_p = _define("pykernels_solve", _solve, _solve_abstract)
pull_back_p = _define("pykernels_pull_back", _pull_back, _pull_back_abstract)
solve_tangents_p = _define("pykernels_solve_tangents", _solve_tangents, _solve_tangents_abstract)


def _merge_lanes(value: jax.Array, dim: int | None, has_lanes: bool, size: int, lanes: int) -> jax.Array:
    """Give a value the lanes (batch, lane) merged into one last axis; a shared value is repeated."""
    if dim is None:
        value = jnp.broadcast_to(
            value[..., None, :] if has_lanes else value[..., None, None],
            (*(value.shape[:-1] if has_lanes else value.shape), size, lanes),
        )
    elif has_lanes:
        value = jnp.moveaxis(value, dim, -2)
    else:
        value = jnp.moveaxis(value, dim, -1)
        value = jnp.broadcast_to(value[..., None], (*value.shape, lanes))
    return value.reshape(*value.shape[:-2], size * lanes)


def _split_lanes(value: jax.Array, size: int) -> jax.Array:
    return value.reshape(*value.shape[:-1], size, -1)


def _batch_size(operands: Sequence[Any], dims: Sequence[int | None]) -> int:
    return next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)


def _batched_lanes(
    solve: Solve, operands: Sequence[Any], dims: Sequence[int | None], always: Sequence[bool]
) -> tuple[Solve, list[Any], int, int]:
    """The solve and operands of a batch of ensembles as one ensemble. A shared input stays shared unless it is batched or
    `always` asks for lanes; operands behind the inputs always have lanes."""
    size = _batch_size(operands, dims)
    y, d = operands[solve.first_y], dims[solve.first_y]
    lanes = y.shape[-1] if d is None or d % y.ndim != y.ndim - 1 else y.shape[-2]
    n = len(solve.lane)
    had = [*solve.lane, *[True] * (len(operands) - n)]
    becomes = [
        h or d is not None or a
        for h, d, a in zip(had, dims, [*always, *[True] * (len(operands) - n)], strict=True)
    ]
    merged = [
        _merge_rows(x, d, Kind.SLOTS, size, lanes)
        if _is_buffer(solve, i - n - 2)
        else _merge_lanes(x, d, h, size, lanes)
        if b
        else x
        for i, (x, d, h, b) in enumerate(zip(operands, dims, had, becomes, strict=True))
    ]
    return solve.with_lanes(becomes[:n]), merged, size, lanes


def _is_buffer(solve: Solve, recorded: int) -> bool:
    """Whether this one of what a solve has recorded is a buffer of milestones with lanes in the middle."""
    first = 1 + solve.adaptive
    return solve.kind == "vmap" and first <= recorded < first + len(solve.field.y_shapes)


def _solve_batch(
    operands: Sequence[Any], dims: Sequence[int | None], *, solve: Solve, record: Record | None
) -> Any:
    solve, merged, size, lanes = _batched_lanes(solve, operands, dims, [False] * len(solve.lane))
    results = solve_p.bind(*merged, solve=solve, record=record)
    values = len(solve.field.y_shapes) + 1
    buffers = [_is_buffer(solve, i - values) for i in range(len(results))]
    split = [
        _split_rows(r, Kind.SLOTS, size, lanes) if buffer else _split_lanes(r, size)
        for r, buffer in zip(results, buffers, strict=True)
    ]
    return split, [1 if buffer else r.ndim - 2 for r, buffer in zip(split, buffers, strict=True)]


def _pull_back_batch(
    operands: Sequence[Any],
    dims: Sequence[int | None],
    *,
    solve: Solve,
    record: Record,
    wrt: tuple[bool, ...],
) -> Any:
    # A shared input whose cotangent is wanted needs one per batch element: it gets lanes here and its sum over the
    # ensemble's own lanes below.
    before = solve
    solve, merged, size, _ = _batched_lanes(solve, operands, dims, wrt)
    results = pull_back_p.bind(*merged, solve=solve, record=record, wrt=wrt)
    split = [_split_lanes(r, size) for r in results]
    had = [h for h, w in zip(before.lane, wrt, strict=True) if w]
    split = [r if h else jnp.sum(r, axis=-1) for r, h in zip(split, had, strict=True)]
    return split, [r.ndim - 2 if h else r.ndim - 1 for r, h in zip(split, had, strict=True)]


def _solve_tangents_batch(
    operands: Sequence[Any], dims: Sequence[int | None], *, solve: Solve, active: tuple[bool, ...]
) -> Any:
    n = len(solve.lane)
    tangent_of = [i for i, a in enumerate(active) if a]
    # A tangent has lanes exactly where its input has.
    needed = [False] * n
    for position, i in enumerate(tangent_of):
        needed[i] = dims[i] is not None or dims[n + position] is not None
    size = _batch_size(operands, dims)
    inner, merged, _, lanes = (
        _batched_lanes(solve, operands[:n], dims[:n], needed)
        if any(d is not None for d in dims[:n])
        else _with_size(solve, operands[:n], size, needed)
    )
    tangents = [
        _merge_lanes(x, d, solve.lane[i], size, lanes) if inner.lane[i] else x
        for x, d, i in zip(operands[n:], dims[n:], tangent_of, strict=True)
    ]
    results = solve_tangents_p.bind(*merged, *tangents, solve=inner, active=active)
    split = [_split_lanes(r, size) for r in results]
    if any(d is not None for d in dims[:n]):
        return split, [r.ndim - 2 for r in split]
    # Values that depend on nothing batched are not batched: JAX's forward mode counts on it.
    values = len(split) - len(solve.field.y_shapes)
    return [r[..., 0, :] for r in split[:values]] + split[values:], [None] * values + [
        r.ndim - 2 for r in split[values:]
    ]


def _with_size(
    solve: Solve, inputs: Sequence[Any], size: int, needed: Sequence[bool]
) -> tuple[Solve, list[Any], int, int]:
    """`_batched_lanes` where only tangents are batched."""
    lanes = _lanes(inputs, solve)
    becomes = [h or n for h, n in zip(solve.lane, needed, strict=True)]
    merged = [
        _merge_lanes(x, None, h, size, lanes) if b else x
        for x, h, b in zip(inputs, solve.lane, becomes, strict=True)
    ]
    return solve.with_lanes(becomes), merged, size, lanes


batching.primitive_batchers[solve_p] = _solve_batch
batching.primitive_batchers[pull_back_p] = _pull_back_batch
batching.primitive_batchers[solve_tangents_p] = _solve_tangents_batch

# Under jit everything is a tracer, so a recorded solve cannot tell what will be differentiated: t0 and closed-over arrays
# look like everything else. What turns out unused is left out here, when JAX removes dead code, before kernels are made.


def _solve_without_unused(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    eqn = rest[-1]  # JAX 0.12 passes one argument more
    if not any(used):
        return [False] * len(eqn.invars), None
    kept = len(eqn.params["solve"].field.y_shapes) + 1
    if eqn.params["record"] is None or any(used[kept:]):
        return [True] * len(eqn.invars), eqn
    return [True] * len(eqn.invars), eqn.replace(
        outvars=eqn.outvars[:kept], params={**eqn.params, "record": None}
    )


def _pull_back_without_unused(used: Sequence[bool], *rest: Any) -> tuple[list[bool], Any]:
    eqn = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    solve, wrt = eqn.params["solve"], list(eqn.params["wrt"])
    outvars = []
    for out, i, wanted in zip(eqn.outvars, [i for i, w in enumerate(wrt) if w], used, strict=True):
        # Cotangents of the state are carried in any case.
        wrt[i] = wanted or solve.first_y <= i < solve.first_operand
        if wrt[i]:
            outvars.append(out)
    params = {**eqn.params, "wrt": tuple(wrt)}
    return [True] * len(eqn.invars), eqn.replace(outvars=outvars, params=params)


partial_eval.dce_rules[solve_p] = _solve_without_unused
partial_eval.dce_rules[pull_back_p] = _pull_back_without_unused

NO_REVERSE_MODE = (
    "adjoint=ForwardOnly() supports jax.jvp and jax.jacfwd only. For jax.grad, jax.vjp and jax.jacrev use "
    "adjoint=Milestones() (the default) or adjoint=BoundedTree()."
)


def _solve_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, solve: Solve, record: Record | None
) -> Any:
    if record is not None:
        raise TypeError("forward-mode differentiation of a recorded solve (forward over reverse) is not supported: "
                        "use adjoint=BoundedTree() for second derivatives")  # fmt: skip
    active = tuple(
        not isinstance(t, ad.Zero) and jnp.issubdtype(p.dtype, jnp.floating)
        for p, t in zip(primals, tangents, strict=True)
    )
    given = [t for t, a in zip(tangents, active, strict=True) if a]
    results = solve_tangents_p.bind(*primals, *given, solve=solve, active=active)
    count = len(solve.field.y_shapes)
    values, rest, out = results[:count], results[count : count + 1], results[count + 1 :]
    zeros = [ad.Zero(jax.core.ShapedArray(r.shape, jax.dtypes.float0)) for r in rest]
    return [*values, *rest], [*out, *zeros]


def _refuse_reverse_mode(*operands: Any, solve: Solve, active: tuple[bool, ...]) -> Any:
    del operands, solve, active
    raise TypeError(NO_REVERSE_MODE)


ad.primitive_jvps[solve_p] = _solve_jvp
# Reverse mode first splits a function into what is known now and what is linear in unknown tangents, then transposes.
partial_eval.custom_partial_eval_rules[solve_tangents_p] = _refuse_reverse_mode
ad.primitive_transposes[solve_tangents_p] = _refuse_reverse_mode


def _any_lane_abstract(mask: Any) -> Any:
    return jax.core.ShapedArray((), np.dtype(bool))


any_lane_p = jex.Primitive("pykernels_any_lane")
any_lane_p.def_impl(lambda mask: jnp.any(mask))
any_lane_p.def_abstract_eval(_any_lane_abstract)
mlir.register_lowering(any_lane_p, mlir.lower_fun(lambda mask: jnp.any(mask), multiple_results=False))
batching.primitive_batchers[any_lane_p] = lambda operands, dims: (any_lane(operands[0]), None)


def _fail(value: jax.Array, failed: jax.Array) -> jax.Array:
    return jnp.where(failed & (value != 0), jnp.asarray(jnp.nan, value.dtype), value)


def _fail_batch(operands: Sequence[Any], dims: Sequence[int | None]) -> Any:
    size = _batch_size(operands, dims)
    value, failed = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    )
    return fail_p.bind(value, failed), 0


fail_p = jex.Primitive("pykernels_fail")
fail_p.def_impl(_fail)
fail_p.def_abstract_eval(lambda value, failed: jax.core.ShapedArray(value.shape, value.dtype))
mlir.register_lowering(fail_p, mlir.lower_fun(_fail, multiple_results=False))
batching.primitive_batchers[fail_p] = _fail_batch
ad.primitive_jvps[fail_p] = lambda primals, tangents: (
    fail_p.bind(*primals),
    tangents[0] if isinstance(tangents[0], ad.Zero) else fail_p.bind(tangents[0], primals[1]),
)
ad.primitive_transposes[fail_p] = lambda ct, value, failed: (
    None if isinstance(ct, ad.Zero) else fail_p.bind(ct, failed),
    None,
)


def _permute(value: jax.Array, places: jax.Array, back: jax.Array) -> jax.Array:
    if places.ndim > 1:  # batches, in front
        return jax.vmap(_permute)(value, places, back)
    return value.at[..., places].get(unique_indices=True, mode="promise_in_bounds")


def _permute_batch(operands: Sequence[Any], dims: Sequence[int | None]) -> Any:
    value, places, back = operands
    dim, *of_places = dims
    if dim is not None and of_places == [None, None] and places.ndim == 1:
        return permute_p.bind(jnp.moveaxis(value, dim, 0), places, back), 0
    size = _batch_size(operands, dims)
    return permute_p.bind(*[
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(operands, dims, strict=True)
    ]), 0  # fmt: skip


permute_p = jex.Primitive("pykernels_permute")
permute_p.def_impl(jax.jit(_permute))
permute_p.def_abstract_eval(
    lambda value, places, back: _abstract([jax.ShapeDtypeStruct(value.shape, value.dtype)], value)[0]
)
mlir.register_lowering(permute_p, _lower(lambda *operands: [_permute(*operands)]))
batching.primitive_batchers[permute_p] = _permute_batch
ad.primitive_jvps[permute_p] = lambda primals, tangents: (
    permute_p.bind(*primals),
    tangents[0] if isinstance(tangents[0], ad.Zero) else permute_p.bind(tangents[0], *primals[1:]),
)
ad.primitive_transposes[permute_p] = lambda ct, value, places, back: (
    None if isinstance(ct, ad.Zero) else permute_p.bind(ct, back, places),
    None,
    None,
)


# The step kernels. Every pass is lowered, batched and typed in one way, by what its buffers are.


def _bind(primitive: jex.Primitive, pass_: Pass, operands: Sequence[Any]) -> list[jax.Array]:
    """A pass on operands as its primitive takes them: a scalar stays one only where it is a slot, which XLA likes better."""
    rows, columns = shape_of(pass_, operands)
    values = []
    for buffer, operand in zip(pass_.operands, operands, strict=True):
        value = jnp.asarray(operand, buffer.dtype)
        if buffer.kind == Kind.ROW and buffer.dtype != INT32 and value.ndim == 0:
            value = jnp.broadcast_to(value, (rows,))
        expected = buffer.shape(rows, columns)
        if value.shape != expected and not (buffer.dtype == INT32 and value.ndim == 0):
            raise ValueError(
                f"{primitive.name}: an operand of shape {value.shape} where {expected} is needed"
            )
        values.append(value)
    return primitive.bind(*vary_together(values), pass_=pass_)


class _PassRunner(NamedTuple):
    """A platform's runner of passes: its name, why it does not run a pass of so many rows and columns (or None), whether
    that is worth it, how it does."""

    name: str
    obstacle: Callable[[Pass, int, int], str | None]
    worthwhile: Callable[[Pass, int, int], bool]
    run: Callable[[Pass, Sequence[jax.Array]], list[jax.Array]]


_PASS_RUNNERS: dict[str, _PassRunner] = {
    "cpu": _PassRunner("native", columns.obstacle, columns.worthwhile, columns.run),
    "cuda": _PassRunner("triton", triton.obstacle, triton.worthwhile, triton.run),
}


def pass_runner_of(platform: str, pass_: Pass, rows: int, columns: int) -> tuple[str, str]:
    """The name of the runner that a pass gets on a platform, "xla" for plain JAX, and why."""
    runner, asked = _PASS_RUNNERS.get(platform), pass_.runner
    if asked == "xla":
        return "xla", "asked for by config"
    if runner is None or asked not in (None, runner.name):
        obstacle: str | None = f"no step kernels on {platform}" if asked is None else f"not on {platform}"
    else:
        obstacle = runner.obstacle(pass_, rows, columns)
    if runner is None or obstacle is not None:
        return "xla", str(obstacle)
    if asked is None and not runner.worthwhile(pass_, rows, columns):
        return "xla", "the state is small, or its rows are"
    return runner.name, "the default" if asked is None else "asked for by config"


def _run_pass(platform: str) -> Callable[..., list[jax.Array]]:
    def run(*operands: jax.Array, pass_: Pass) -> list[jax.Array]:
        name, reason = pass_runner_of(platform, pass_, *shape_of(pass_, operands))
        if name != "xla":
            return _PASS_RUNNERS[platform].run(pass_, operands)
        if pass_.runner not in (None, "xla"):
            raise ValueError(f"Config(runner={pass_.runner!r}) is not possible: {reason}")
        return reference.run_pass(pass_, operands)

    return run


def _pass_abstract(*operands: Any, pass_: Pass) -> list[Any]:
    return _abstract(structs_of(pass_.results, *shape_of(pass_, operands)), operands[0])


def _merge_rows(value: Any, dim: int | None, kind: Kind, size: int, rows: int) -> Any:
    """A batched operand with the batch's rows behind each other."""
    if kind == Kind.SLOTS:
        value = value[:, None] if dim is None else jnp.moveaxis(value, dim, 1)
        value = jnp.broadcast_to(value, (value.shape[0], size, *value.shape[2:]))
        return value.reshape(value.shape[0], -1, value.shape[-1])
    if kind == Kind.STATE:
        value = value[None] if dim is None else jnp.moveaxis(value, dim, 0)
        return jnp.broadcast_to(value, (size, *value.shape[1:])).reshape(-1, value.shape[-1])
    if dim is None and value.ndim == 0:  # a slot for all
        return value
    value = value if dim is None else jnp.moveaxis(value, dim, 0)
    scalars = value.ndim == (0 if dim is None else 1)
    value = value[..., None] if scalars else value
    return jnp.broadcast_to(value, (size, rows)).reshape(-1)


def _split_rows(value: Any, kind: Kind, size: int, rows: int) -> Any:
    if kind == Kind.SLOTS:
        return value.reshape(value.shape[0], size, rows, *value.shape[2:])
    return value.reshape(size, rows, *value.shape[1:])


def _batch_pass(primitive: jex.Primitive) -> Callable[..., Any]:
    def rule(operands: Sequence[Any], dims: Sequence[int | None], *, pass_: Pass) -> Any:
        size, one = (
            _batch_size(operands, dims),
            [
                jax.ShapeDtypeStruct(x.shape if d is None else (*x.shape[:d], *x.shape[d + 1 :]), x.dtype)
                for x, d in zip(operands, dims, strict=True)
            ],
        )
        rows, _ = shape_of(pass_, one)
        merged = [
            _merge_rows(x, d, buffer.kind, size, rows)
            for x, d, buffer in zip(operands, dims, pass_.operands, strict=True)
        ]
        results = primitive.bind(*merged, pass_=pass_)
        kinds = [buffer.kind for buffer in pass_.results]
        split = [_split_rows(r, kind, size, rows) for r, kind in zip(results, kinds, strict=True)]
        return split, [1 if kind == Kind.SLOTS else 0 for kind in kinds]

    return rule


def _define_pass(name: str) -> jex.Primitive:
    primitive = jex.Primitive(name)
    primitive.multiple_results = True

    def eagerly(*operands: jax.Array, pass_: Pass) -> list[jax.Array]:
        return primitive.bind(*operands, pass_=pass_)

    primitive.def_impl(jax.jit(eagerly, static_argnames="pass_"))
    primitive.def_abstract_eval(_pass_abstract)
    mlir.register_lowering(primitive, _lower(_run_pass("any other")))
    for platform in _PASS_RUNNERS:
        mlir.register_lowering(primitive, _lower(_run_pass(platform)), platform=platform)
    batching.primitive_batchers[primitive] = _batch_pass(primitive)
    return primitive


rk_combine_p = _define_pass("pykernels_rk_combine")
rk_finish_p = _define_pass("pykernels_rk_finish")
rk_accept_p = _define_pass("pykernels_rk_accept")
milestone_save_p = _define_pass("pykernels_milestone_save")
milestone_restore_p = _define_pass("pykernels_milestone_restore")


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def _none(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero)


def _sum_tangents(a: Sequence[Any] | None, b: Sequence[Any] | None) -> Sequence[Any] | None:
    return a if b is None else b if a is None else [x + y for x, y in zip(a, b, strict=True)]


def _combine_tangents(
    combine: Combine, xs: Sequence[Any], h: Any, dxs: Sequence[Any], dh: Any
) -> Sequence[Any] | None:
    """Tangents of a combination, None where they are all zero."""
    keep = [j for j, dx in enumerate(dxs) if not _none(dx)]
    by_x = by_h = None
    if keep:
        plain, scaled = ([[row[j] for j in keep] for row in m] for m in (combine.plain, combine.scaled))
        by_x = rk_combine([dxs[j] for j in keep], h, plain, scaled, runner=combine.runner)
    if not _none(dh):
        none = [[0.0] * combine.count for _ in combine.plain]
        by_h = rk_combine(xs, dh, none, combine.scaled, runner=combine.runner)
    return _sum_tangents(by_x, by_h)


def _zeros(values: Sequence[Any]) -> list[Any]:
    return [ad.Zero(jax.typeof(v).to_tangent_aval()) for v in values]


def _combine_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, pass_: Combine) -> Any:
    outs = rk_combine_p.bind(*primals, pass_=pass_)
    (*xs, h), (*dxs, dh) = primals, tangents
    given = _combine_tangents(pass_, xs, h, dxs, dh)
    return outs, _zeros(outs) if given is None else given


def _combine_transpose(cotangents: Sequence[Any], *operands: Any, pass_: Combine) -> list[Any]:
    *xs, h = operands
    keep = [i for i, ct in enumerate(cotangents) if not _none(ct)]
    cts = [cotangents[i] for i in keep]
    if not keep:
        return [None] * len(operands)
    plain, scaled = (tuple(m[i] for i in keep) for m in (pass_.plain, pass_.scaled))
    if ad.is_undefined_primal(h):
        slopes = rk_combine(xs, jnp.ones((), pass_.dtype), [[0.0] * len(xs)] * len(keep), scaled)
        return [None] * len(xs) + [sum(jnp.sum(ct * k, axis=1) for ct, k in zip(cts, slopes, strict=True))]
    outs = rk_combine(cts, h, _transposed(plain), _transposed(scaled), runner=pass_.runner)
    return [*outs, None]


ad.primitive_jvps[rk_combine_p] = _combine_jvp
ad.primitive_transposes[rk_combine_p] = _combine_transpose


def _finish_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, pass_: Finish) -> Any:
    outs = rk_finish_p.bind(*primals, pass_=pass_)
    y, slopes, h, _, _, milestone = pass_.parts(primals)
    dy, dslopes, dh, _, _, dmilestone = pass_.parts(tangents)
    given = _zeros(outs)
    if not pass_.given:
        weights = pass_.weights
        combine = Combine(
            pass_.dtype, ((1.0, *[0.0] * len(weights)),), ((0.0, *weights),), runner=pass_.runner
        )
        new = _combine_tangents(combine, [y, *slopes], h, [dy, *dslopes], dh)
        given[0] = given[0] if new is None else new[0]
    if milestone and not (_none(dmilestone[0]) and _none(dy)):
        buffer, value = ad.instantiate_zeros(dmilestone[0]), ad.instantiate_zeros(dy)
        given[-1] = milestone_save(buffer, milestone[1], value, runner=pass_.runner)
    return outs, given


ad.primitive_jvps[rk_finish_p] = _finish_jvp


def _accept_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, pass_: Accept) -> Any:
    outs = rk_accept_p.bind(*primals, pass_=pass_)
    if all(_none(t) for t in tangents[:-1]):
        return outs, _zeros(outs)
    given = [ad.instantiate_zeros(t) for t in tangents[:-1]]
    return outs, rk_accept_p.bind(*given, primals[-1], pass_=pass_)


def _accept_transpose(cotangents: Sequence[Any], *operands: Any, pass_: Accept) -> list[Any]:
    accepted = operands[-1][:, None]
    cts = [ad.instantiate_zeros(ct) for ct in cotangents]
    olds = [jnp.where(accepted, 0, ct) for ct in cts]
    return [*olds, *[jnp.where(accepted, ct, 0) for ct in cts], None]


ad.primitive_jvps[rk_accept_p] = _accept_jvp
ad.primitive_transposes[rk_accept_p] = _accept_transpose


def _save_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, pass_: Save) -> Any:
    outs = milestone_save_p.bind(*primals, pass_=pass_)
    buffer, _, value = tangents
    if _none(buffer) and _none(value):
        return outs, _zeros(outs)
    given = [ad.instantiate_zeros(buffer), primals[1], ad.instantiate_zeros(value)]
    return outs, milestone_save_p.bind(*given, pass_=pass_)


def _save_transpose(cotangents: Sequence[Any], *operands: Any, pass_: Save) -> list[Any]:
    (ct,), (_, slot, value) = cotangents, operands
    if _none(ct):
        return [None, None, None]
    shape = value.aval.shape if ad.is_undefined_primal(value) else value.shape
    saved = milestone_restore(ct, slot, runner=pass_.runner)
    return [milestone_save(ct, slot, jnp.zeros(shape, pass_.dtype), runner=pass_.runner), None, saved]


ad.primitive_jvps[milestone_save_p] = _save_jvp
ad.primitive_transposes[milestone_save_p] = _save_transpose


def _restore_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, pass_: Restore) -> Any:
    outs = milestone_restore_p.bind(*primals, pass_=pass_)
    if _none(tangents[0]):
        return outs, _zeros(outs)
    return outs, milestone_restore_p.bind(tangents[0], primals[1], pass_=pass_)


def _restore_transpose(cotangents: Sequence[Any], buffer: Any, slot: Any, *, pass_: Restore) -> list[Any]:
    (ct,) = cotangents
    if _none(ct):
        return [None, None]
    zeros = jnp.zeros(buffer.aval.shape, pass_.dtype)
    return [milestone_save(zeros, slot, ct, runner=pass_.runner), None]


ad.primitive_jvps[milestone_restore_p] = _restore_jvp
ad.primitive_transposes[milestone_restore_p] = _restore_transpose


def _uninitialized(*, shape: tuple[int, ...], dtype: np.dtype, number: int) -> jax.Array:
    return jax.lax.empty(shape, dtype)


def _uninitialized_on_cpu(*, shape: tuple[int, ...], dtype: np.dtype, number: int) -> jax.Array:
    if cpu.unavailable() is not None:
        return _uninitialized(shape=shape, dtype=dtype, number=number)
    return columns.uninitialized(shape, dtype, number)


uninitialized_p = jex.Primitive("pykernels_uninitialized")
uninitialized_p.def_impl(
    jax.jit(lambda **statics: uninitialized_p.bind(**statics), static_argnames=("shape", "dtype", "number"))
)
uninitialized_p.def_abstract_eval(lambda *, shape, dtype, number: jax.core.ShapedArray(shape, dtype))
mlir.register_lowering(uninitialized_p, mlir.lower_fun(_uninitialized, multiple_results=False))
mlir.register_lowering(
    uninitialized_p, mlir.lower_fun(_uninitialized_on_cpu, multiple_results=False), platform="cpu"
)
