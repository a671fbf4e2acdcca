"""Sums over the rows of a batch, and over batches: exact for every split, without the rows that do not count.

A batch gives sums (terms, weights, derivatives), which are added on the device; nothing is divided before all are in. One
compiled loop runs over many batches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pykernels.stream.programs import programs

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

PyTree = Any
Gradient = Literal["reverse", "forward", "finite-difference"]
NanPolicy = Literal["raise", "mask", "skip"]

# On CPUs a batch of small rows is evaluated in pieces that stay in a core's cache: about so many rows, if they have so few
# bytes. Measured with `bench/stream.py`: 7.5 ns a point instead of 11.4 for batches of 100,000.
TILE_ROWS = 8192
TILE_ROW_BYTES = 128


class Terms(NamedTuple):
    """What a loss may return instead of an array of terms.

    `value`: one term per row; `weight`: one weight per row (default 1), the loss being sum(weight * value) / sum(weight);
    `ok`: False for rows to leave out, such as `sol.ok` of `pk.solve_ensemble(..., throw=False)`. A row that is left out
    is counted, and changes neither the value nor the gradient of the others, even if its term is NaN.
    """

    value: Float[Array, " rows"]
    weight: Float[Array, " rows"] | None = None
    ok: Bool[Array, " rows"] | None = None


def as_params(params: PyTree) -> PyTree:
    """A pytree of floating arrays of its own. Raises TypeError for other leaves."""

    def leaf(value: Any) -> jax.Array:
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                "a stream is read by the host: this can not be called inside of jit, grad or vmap"
            )
        array = jnp.asarray(value)
        if array.dtype == bool or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"parameters must be floating-point numbers, not {array.dtype}: write 1.0, not 1")
        return strong(array)

    leaves, tree = jax.tree.flatten(params)
    if not leaves:
        raise ValueError("there are no parameters")
    return jax.tree.unflatten(tree, [leaf(value) for value in leaves])


def strong(array: Any) -> jax.Array:
    """Without JAX's weak type, which would make the second call another program."""
    array = jnp.asarray(array)
    return lax.convert_element_type(array, array.dtype) if array.dtype != jax.dtypes.float0 else array


def in_dtype_of(new: Any, old: Any) -> Any:
    """A loop's state must keep its types."""
    return new if new.dtype == old.dtype and not new.weak_type else lax.convert_element_type(new, old.dtype)


def own(tree: PyTree) -> PyTree:
    """Copies, since what is donated must belong to nobody else."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


class Sums(NamedTuple):
    """Sums over rows: weight * term, weight, and their derivatives with respect to the parameters (by kind)."""

    value: jax.Array
    weight: jax.Array
    rest: PyTree


class DeviceCounts(NamedTuple):
    """Counts while a pass goes on, int32. `first`: the first batch that was not finite, or -1."""

    masked: jax.Array
    nonfinite: jax.Array
    skipped: jax.Array
    lost: jax.Array
    first: jax.Array


class Totals(NamedTuple):
    """Sums over the batches so far; `low` holds the rounding errors of `high`, or nothing."""

    high: Sums
    low: Any
    counts: DeviceCounts


def accumulator(dtype: Any) -> Any:
    """The dtype of sums of numbers of this dtype."""
    return np.promote_types(dtype, np.float32)


def common_dtype(params: PyTree) -> Any:
    """That of sums over all parameters."""
    return functools.reduce(
        np.promote_types, (p.dtype for p in jax.tree.leaves(params)), np.dtype(np.float32)
    )


def zero_sums(kind: str, params: PyTree, numpy: Any = jnp) -> Sums:
    """Nothing, in the shape of a kind of sums."""
    dtype = common_dtype(params)
    rest: PyTree = None
    if kind == "gradient":
        rest = jax.tree.map(lambda p: numpy.zeros(p.shape, accumulator(p.dtype)), params)
    elif kind == "normal":
        n = sum(p.size for p in jax.tree.leaves(params))
        rest = numpy.zeros((n,), dtype), numpy.zeros((n, n), dtype)
    return Sums(numpy.zeros((), dtype), numpy.zeros((), dtype), rest)


def zero_totals(kind: str, params: PyTree, compensated: bool | None) -> Totals:
    """Totals before the first batch. They are NumPy's, which cost no dispatch."""
    if compensated is None:
        compensated = common_dtype(params) == np.float32
    low = zero_sums(kind, params, np) if compensated else None
    zero: Any = np.zeros((), np.int32)
    counts = DeviceCounts(zero, zero, zero, zero, zero - np.int32(1))
    return Totals(zero_sums(kind, params, np), low, counts)


def add(totals: Totals, sums: Sums, counts: DeviceCounts) -> Totals:
    """One batch more. The errors of the additions are exact (Knuth's two-sum), and added up beside the sums."""
    if totals.low is None:
        return Totals(jax.tree.map(jnp.add, totals.high, sums), None, counts)
    high = jax.tree.map(jnp.add, totals.high, sums)

    def error(a: jax.Array, b: jax.Array, s: jax.Array, low: jax.Array) -> jax.Array:
        part = s - a
        return low + ((a - (s - part)) + (b - part))

    return Totals(high, jax.tree.map(error, totals.high, sums, high, totals.low), counts)


def finished(totals: Totals) -> Sums:
    """The sums with their errors, at the end of a pass."""
    return totals.high if totals.low is None else jax.tree.map(jnp.add, totals.high, totals.low)


def mean(sums: Sums, like: PyTree) -> tuple[jax.Array, PyTree]:
    """Value and gradient, the latter in the dtypes of the parameters."""
    slope = None
    if sums.rest is not None:
        slope = jax.tree.map(
            lambda g, p: (g / sums.weight.astype(g.dtype)).astype(jnp.result_type(p)), sums.rest, like
        )
    return sums.value / sums.weight, slope


class Rows(NamedTuple):
    """What became of each row: not left out by the user, finite, of a weight that counts."""

    ok: jax.Array
    finite: jax.Array
    used: jax.Array


class Reduction(NamedTuple):
    """What to do with a batch. `sums(params, batch, use, count)`: the sums over the rows in use, of which there are `count`,
    and whether the user leaves none of these out (None if there is no way to); `rows(params, batch)`: each row's fate."""

    sums: Callable[[PyTree, PyTree, jax.Array, jax.Array], tuple[Sums, jax.Array | None]]
    rows: Callable[[PyTree, PyTree], Rows]


def loss_reduction(terms: Callable[[PyTree, PyTree], Any], kind: str, gradient: Gradient) -> Reduction:
    """The sums of a loss, of kind "value" or "gradient"."""

    def sums(
        params: PyTree, batch: PyTree, use: jax.Array, count: jax.Array
    ) -> tuple[Sums, jax.Array | None]:
        dtype = common_dtype(params)

        def total(params: PyTree) -> tuple[jax.Array, Extra]:
            value, weight, ok = _checked_terms(terms(params, batch), use.shape[0], dtype)
            zero = jnp.zeros((), dtype)
            summed = jnp.sum(jnp.where(use, value if weight is None else value * weight, zero))
            weights = count.astype(dtype) if weight is None else jnp.sum(jnp.where(use, weight, zero))
            if ok is None:
                return summed, (weights, None if weight is None else jnp.bool_(True))
            return summed, (weights, jnp.all(ok | ~use))

        if kind == "value":
            summed, (weights, all_ok) = total(params)
            return Sums(summed, weights, None), all_ok
        summed, (weights, all_ok), slope = _DIFFERENTIATE[gradient](total, params)
        return Sums(summed, weights, jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), slope)), all_ok

    def rows(params: PyTree, batch: PyTree) -> Rows:
        length = row_count(batch)
        value, weight, ok = _checked_terms(terms(params, batch), length, common_dtype(params))
        everything = jnp.ones((length,), bool)
        finite, used = jnp.isfinite(value), everything
        if weight is not None:
            finite, used = finite & jnp.isfinite(weight), weight != 0
        return Rows(everything if ok is None else ok, finite, used)

    return Reduction(sums, rows)


@dataclass(frozen=True)
class Objective:
    """A loss: `terms(params, batch)`, the user's functions in it, whatever else it depends on, and how it is summed."""

    terms: Callable[[PyTree, PyTree], Any]
    functions: tuple[Any, ...]
    static: tuple[Hashable, ...] = ()
    reduction: Callable[[Callable[[PyTree, PyTree], Any], str, Gradient], Reduction] = loss_reduction


def _checked_terms(
    result: Any, rows: int, dtype: Any
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    terms = result if isinstance(result, Terms) else Terms(result)
    shapes = [shape for shape in (jnp.shape(part) for part in terms if part is not None) if shape != (rows,)]
    if shapes:
        raise TypeError(
            f"a loss must return one term per row, shape ({rows},) for this batch, not {shapes[0]}"
        )
    value = jnp.asarray(terms.value)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(f"the terms of a loss must be real, not {value.dtype}")
    weight = None if terms.weight is None else jnp.asarray(terms.weight).astype(dtype)
    ok = None if terms.ok is None else jnp.asarray(terms.ok).astype(bool)
    return value.astype(dtype), weight, ok


Extra = tuple[jax.Array, jax.Array | None]
Total = Callable[[PyTree], tuple[jax.Array, Extra]]
Differentiated = tuple[jax.Array, Extra, PyTree]


def _reverse(total: Total, params: PyTree) -> Differentiated:
    (summed, rest), slope = jax.value_and_grad(total, has_aux=True)(params)
    return summed, rest, slope


def _forward(total: Total, params: PyTree) -> Differentiated:
    flat, restore = ravel(params)

    def along(direction: jax.Array) -> tuple[jax.Array, jax.Array, Extra]:
        return jax.jvp(lambda p: total(restore(p)), (flat,), (direction,), has_aux=True)

    basis = jnp.eye(flat.size, dtype=flat.dtype)
    summed, slope, rest = jax.vmap(along, out_axes=(None, 0, None))(basis)
    return summed, rest, restore(slope)


def _finite_difference(total: Total, params: PyTree) -> Differentiated:
    """Central differences, two evaluations for each parameter, one after the other. Their step balances rounding and
    truncation: the cube root of the precision, relative to parameters over one."""
    flat, restore = ravel(params)
    n = flat.size
    step = float(jnp.finfo(flat.dtype).eps) ** (1 / 3) * jnp.maximum(jnp.abs(flat), jnp.ones_like(flat))

    def at(i: jax.Array) -> tuple[jax.Array, Extra]:
        # 0 is the point itself, then come the n steps forwards and the n backwards.
        place = jnp.arange(n, dtype=i.dtype)
        ahead, behind = place == i - 1, place == i - 1 - n
        return total(restore(flat + jnp.where(ahead, step, 0) - jnp.where(behind, step, 0)))

    summed, (weights, all_ok) = lax.map(at, jnp.arange(2 * n + 1, dtype=jnp.int32))
    # The distance between the points that were really evaluated.
    width = (flat + step) - (flat - step)
    slope = (summed[1 : n + 1] - summed[n + 1 :]) / width.astype(summed.dtype)
    return summed[0], (weights[0], None if all_ok is None else all_ok[0]), restore(slope)


_DIFFERENTIATE = {"reverse": _reverse, "forward": _forward, "finite-difference": _finite_difference}


def ravel(params: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """Parameters as one vector of their common dtype, and the way back."""
    leaves, tree = jax.tree.flatten(params)
    dtype = functools.reduce(np.promote_types, (leaf.dtype for leaf in leaves))
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))

    def restore(flat: jax.Array) -> PyTree:
        parts = [
            flat[end - leaf.size : end].reshape(leaf.shape).astype(leaf.dtype)
            for leaf, end in zip(leaves, ends, strict=True)
        ]
        return jax.tree.unflatten(tree, parts)

    return jnp.concatenate([leaf.reshape(-1).astype(dtype) for leaf in leaves]), restore


def _batch_sums(
    reduction: Reduction,
    params: PyTree,
    data: PyTree,
    i: jax.Array,
    rows: jax.Array,
    tile: int,
    nothing: Sums,
    nan: NanPolicy,
) -> tuple[Sums, jax.Array, jax.Array]:
    """The sums of batch `i` over its good rows, of the first `rows`, and how many are masked and not finite."""

    def piece(j: jax.Array) -> tuple[Sums, jax.Array, jax.Array]:
        def leaf(values: jax.Array) -> jax.Array:
            rest = values.shape[2:]
            start = (i, j * tile, *[jnp.int32(0)] * len(rest))
            return lax.dynamic_slice(values, start, (1, tile, *rest))[0]

        return _good_sums(
            reduction, params, jax.tree.map(leaf, data), jnp.clip(rows - j * tile, 0, tile), nan
        )

    pieces = jax.tree.leaves(data)[0].shape[1] // tile
    if pieces == 1:
        return piece(jnp.int32(0))

    def add_piece(
        j: jax.Array, before: tuple[Sums, jax.Array, jax.Array]
    ) -> tuple[Sums, jax.Array, jax.Array]:
        return jax.tree.map(jnp.add, before, piece(j))

    zero = jnp.int32(0)
    return lax.fori_loop(zero, jnp.int32(pieces), add_piece, (nothing, zero, zero))


def _good_sums(
    reduction: Reduction, params: PyTree, batch: PyTree, count: jax.Array, nan: NanPolicy
) -> tuple[Sums, jax.Array, jax.Array]:
    """The sums over the first `count` rows without those that are left out or not finite.

    A row that does not count must not reach the gradient, and the derivative of a NaN term times zero is NaN. So rows out
    of use are replaced by a row in use before the model, and their terms by zero behind it. Rows beyond the data are
    copies of a row from the start; which others are bad is known only behind the model, but a sum is finite only if all
    its terms are. So all is well as a rule; if not, each row is looked at, and the sums are made again without the bad
    ones.
    """
    zero = jnp.int32(0)
    valid = jnp.arange(row_count(batch), dtype=jnp.int32) < count
    sums, all_ok = reduction.sums(params, batch, valid, count)
    if all_ok is None:
        if nan == "raise":  # no row is ever left out
            return sums, zero, zero
        all_ok = jnp.bool_(True)

    def again(_: None) -> tuple[Sums, jax.Array, jax.Array]:
        rows = reduction.rows(params, batch)
        good = valid & rows.ok & rows.finite
        first = jnp.argmax(good)

        def leaf(values: jax.Array) -> jax.Array:
            mask = good.reshape(good.shape + (1,) * (values.ndim - 1))
            return jnp.where(mask, values, lax.dynamic_index_in_dim(values, first))

        filled = reduction.sums(params, jax.tree.map(leaf, batch), good, _count(good))[0]
        some = jax.tree.map(lambda s: jnp.where(jnp.any(good), s, jnp.zeros_like(s)), filled)
        return some, _count(valid & ~rows.ok), _count(valid & rows.ok & ~rows.finite & rows.used)

    return lax.cond(all_ok & _all_finite(sums), lambda _: (sums, zero, zero), again, None)


def row_count(data: PyTree) -> int:
    """Rows of a pytree of arrays."""
    return jax.tree.leaves(data)[0].shape[0]


def _all_finite(tree: PyTree) -> jax.Array:
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


BatchSums = Callable[[Reduction, PyTree, Sums, DeviceCounts], tuple[Sums, DeviceCounts]]
BatchStep = Callable[[PyTree, PyTree, BatchSums], PyTree]
Run = Callable[..., tuple[PyTree, jax.Array]]


def compiled(
    step: BatchStep, counts: Callable[[PyTree], DeviceCounts], nan: NanPolicy, mesh: Mesh | None, tiled: bool
) -> Run:
    """One program for a chunk of batches, `run(carry, fixed, data, first, batches, rows, size) -> (carry, ticket)`.

    `data`: leaves of shape (batches at most, places, ...), of which `batches` hold `rows` rows, `size` each and the last one
    perhaps fewer; `first`: the number of the first one. `step(carry, fixed, sums_of)` takes one batch, of which
    `sums_of(reduction, params, nothing, counts)` gives the sums and the new counts. `carry` is donated. The ticket is there
    to wait for, and tells the first batch that was not finite, if any. On a mesh every device has its part of each batch's
    places, and sums are sums over the mesh.
    """
    axes = () if mesh is None else tuple(mesh.axis_names)

    def across(tree: PyTree) -> PyTree:
        return lax.psum(tree, axes) if axes else tree

    def run(
        carry: PyTree,
        fixed: PyTree,
        data: PyTree,
        first: jax.Array,
        batches: jax.Array,
        rows: jax.Array,
        size: jax.Array,
    ) -> tuple[PyTree, jax.Array]:
        local = jax.tree.leaves(data)[0].shape[1]
        tile = _tile(data) if tiled else local
        offset = 0 if mesh is None else lax.axis_index(axes) * local

        def body(i: jax.Array, carry: PyTree) -> PyTree:
            here = jnp.minimum(rows - i * size, size) - offset

            def sums_of(
                reduction: Reduction, params: PyTree, nothing: Sums, counts: DeviceCounts
            ) -> tuple[Sums, DeviceCounts]:
                sums, masked, nonfinite = _batch_sums(reduction, params, data, i, here, tile, nothing, nan)
                count = jnp.clip(here, 0, local)
                sums, masked, nonfinite, count = across((sums, masked, nonfinite, count))
                return _by_policy(nan, sums, masked, nonfinite, count, first + i, counts)

            return jax.tree.map(in_dtype_of, step(carry, fixed, sums_of), carry)

        carry = lax.fori_loop(jnp.int32(0), batches, body, carry)
        return carry, counts(carry).first

    if mesh is not None:
        specs = (P(), P(), P(None, axes), P(), P(), P(), P())
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(run, donate_argnums=0)


def _by_policy(
    nan: NanPolicy, sums: Sums, masked: jax.Array, nonfinite: jax.Array, count: jax.Array, index: jax.Array,
    counts: DeviceCounts,
) -> tuple[Sums, DeviceCounts]:  # fmt: skip
    """A batch's sums, or nothing if it is to be skipped, and the counts with it. What is not finite is never added."""
    finite = _all_finite(sums)
    skip = ~finite if nan == "mask" else ~finite | (nonfinite > 0)
    zero = jnp.int32(0)
    return jax.tree.map(lambda s: jnp.where(skip, jnp.zeros_like(s), s), sums), DeviceCounts(
        counts.masked + masked,
        counts.nonfinite + nonfinite,
        counts.skipped + skip.astype(jnp.int32),
        counts.lost + jnp.where(skip, count - masked - nonfinite, zero),
        jnp.where((~finite | (nonfinite > 0)) & (counts.first < 0), index, counts.first),
    )


def _tile(data: PyTree) -> int:
    """Rows to evaluate together: all of a batch, or a divisor of its size for which they stay in the cache."""
    leaves = jax.tree.leaves(data)
    rows = leaves[0].shape[1]
    row_bytes = sum(leaf.dtype.itemsize * math.prod(leaf.shape[2:]) for leaf in leaves)
    if row_bytes > TILE_ROW_BYTES:
        return rows
    least = -(-rows // TILE_ROWS)
    return next((rows // n for n in range(least, 2 * least + 1) if rows % n == 0), rows)


def traced_terms(objective: Objective) -> Callable[[PyTree, PyTree], Any]:
    """The loss as a function that Python runs once for all programs with the same shapes."""
    return programs.get(
        objective.functions,
        ("terms", objective.static),
        lambda: jax.jit(lambda *args: objective.terms(*args)),
    )
