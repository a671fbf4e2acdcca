"""Sums over a stream, and with them means and their gradients, exact for every split into batches.

A loss over a stream is a mean of one term per row. Each batch gives sums (terms, weights, gradients), which are added on
the device and divided once, so no batch counts for more than its rows. Many batches go to the device together and one
compiled loop runs over them; the host neither waits for a batch nor reads anything of it before the pass is over.
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pykernels.stream.source import Shuffle, Source, as_source, concatenate, prefetched

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float

PyTree = Any
Gradient = Literal["reverse", "forward", "finite-difference"]
NanPolicy = Literal["raise", "mask", "skip"]

# What goes to the device at once, and how many of these may wait there: enough to hide the host's work, little memory.
CHUNK_BYTES = 2 << 20
CHUNKS_AHEAD = 3
PROGRAMS = 64


class Terms(NamedTuple):
    """What a loss may return instead of an array of terms.

    `value`: one term per row; `weight`: one weight per row (default 1), the loss being sum(weight * value) / sum(weight);
    `ok`: False for rows to leave out, such as `sol.ok` of `pk.solve_ensemble(..., throw=False)`. A row that is left out
    is counted, and changes neither the value nor the gradient of the others, even if its term is NaN.
    """

    value: Float[Array, " rows"]
    weight: Float[Array, " rows"] | None = None
    ok: Bool[Array, " rows"] | None = None


class Counts(NamedTuple):
    """Rows of a pass: `rows` used, `masked` by `Terms.ok`, `nonfinite` left out because their terms were not finite, and
    batches `skipped` as a whole (their rows are in none of the others)."""

    rows: int = 0
    masked: int = 0
    nonfinite: int = 0
    skipped: int = 0


class NonFiniteError(FloatingPointError):
    """Terms or gradients were not finite, with `nan="raise"`. `batch`: the first such batch of the pass."""

    def __init__(self, batch: int, batch_size: int, rows: int) -> None:
        self.batch, self.rows = batch, rows
        what = f"{rows} terms are not finite" if rows else "the gradient is not finite"
        super().__init__(
            f"{what}; the first of them is in batch {batch} (rows {batch * batch_size} to {(batch + 1) * batch_size} of the "
            'pass). Leave such rows out with nan="mask", or such batches with nan="skip"; both are counted.'
        )


@dataclass(frozen=True)
class Options:
    """How a stream is read and differentiated; the arguments of the public functions of these names."""

    batch_size: int | None = None
    shuffle: Shuffle | None = None
    prefetch: int = 0
    mesh: Mesh | None = None
    nan: NanPolicy = "raise"
    gradient: Gradient = "reverse"
    compensated: bool | None = None

    @staticmethod
    def of(
        batch_size: int | None = None, shuffle: int | Shuffle | None = None, prefetch: int = 0, mesh: Mesh | None = None,
        nan: NanPolicy = "raise", gradient: Gradient = "reverse", compensated: bool | None = None,
    ) -> Options:  # fmt: skip
        """Checked. Raises ValueError."""
        if batch_size is not None and (not isinstance(batch_size, (int, np.integer)) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive int, not {batch_size!r}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be a number of chunks, not {prefetch!r}")
        if nan not in ("raise", "mask", "skip"):
            raise ValueError(f"nan must be 'raise', 'mask' or 'skip', not {nan!r}")
        if gradient not in ("reverse", "forward", "finite-difference"):
            raise ValueError(
                f"gradient must be 'reverse', 'forward' or 'finite-difference', not {gradient!r}"
            )
        if shuffle is not None and not isinstance(shuffle, Shuffle):
            shuffle = Shuffle(int(shuffle))
        if mesh is None:
            ambient = jax.sharding.get_mesh()
            mesh = None if ambient.empty else ambient
        return Options(batch_size, shuffle, int(prefetch), mesh, nan, gradient, compensated)

    @property
    def static(self) -> tuple[Hashable, ...]:
        """What compiled programs depend on."""
        return (self.mesh, self.nan, self.gradient, self.compensated)


@dataclass(frozen=True)
class Objective:
    """A loss: `terms(params, batch)`, the user's functions in it, and whatever else it depends on. Of kind "normal", its
    `terms` is a `Reduce` itself."""

    terms: Callable[..., Any]
    functions: tuple[Any, ...]
    static: tuple[Hashable, ...] = ()


def value_and_grad(
    terms: Callable[[PyTree, PyTree], ArrayLike | Terms],
    source: Any,
    *,
    batch_size: int | None = None,
    gradient: Gradient = "reverse",
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    shuffle: int | Shuffle | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
    has_counts: bool = False,
) -> Callable[[PyTree], tuple[Any, PyTree]]:
    """A function `params -> (value, gradient)` of the mean loss over a whole stream and its gradient.

    `terms(params, batch)` returns one loss term per row, shape (rows,), or `Terms` with weights and a mask. The value is
    sum(weight * term) / sum(weight) over all rows, whatever the batches: the sums are divided once. `source`: a pytree of
    arrays or memory maps, a source (`npy`, `npz`, `hdf5`, `parquet`), or an iterable or factory of batches. `params`: a
    pytree of floating arrays; gradients have their shapes and dtypes. Every batch has `batch_size` rows for the model
    (default: 8,192, or those of the first batch of a stream); the last is filled up with a valid row, whose terms do not
    count.

    `gradient`: "reverse"; "forward", for few parameters; "finite-difference", central and slow, to compare with. `nan`:
    what to do with terms that are not finite: "raise" NonFiniteError after the pass, "mask" the rows, or "skip" their
    batches. `compensated`: sums over batches keep their rounding errors (default: where parameters have 32 bits or
    fewer). `shuffle`: a seed, or `Shuffle`. `prefetch`: chunks that a thread reads ahead. `mesh`: rows are spread over
    all its devices (default: the mesh of `jax.set_mesh`, if any). With `has_counts` the result is `((value, Counts),
    gradient)`.

    The model is traced once for all calls with the same function, shapes and options.
    """
    options = Options.of(batch_size, shuffle, prefetch, mesh, nan, gradient, compensated)
    passes = Passes(as_source(source), options)
    objective = Objective(terms, (terms,))

    def of(params: PyTree) -> tuple[Any, PyTree]:
        sums, counts = passes.sums(objective, "gradient", as_params(params))
        value, slope = mean(sums, params)
        return ((value, counts) if has_counts else value), slope

    return of


def value(
    terms: Callable[[PyTree, PyTree], ArrayLike | Terms],
    source: Any,
    params: PyTree,
    *,
    batch_size: int | None = None,
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """The mean loss over a stream, without its gradient; arguments and errors as in `value_and_grad`."""
    options = Options.of(batch_size, None, prefetch, mesh, nan, "reverse", compensated)
    sums, _ = Passes(as_source(source), options).sums(Objective(terms, (terms,)), "value", as_params(params))
    return mean(sums, params)[0]


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


def zero_sums(kind: str, params: PyTree) -> Sums:
    """Nothing, in the shape of a kind of sums."""
    dtype = common_dtype(params)
    zero = jnp.zeros((), dtype)
    rest: PyTree = None
    if kind == "gradient":
        rest = jax.tree.map(lambda p: jnp.zeros(p.shape, accumulator(p.dtype)), params)
    elif kind == "normal":
        n = sum(p.size for p in jax.tree.leaves(params))
        rest = jnp.zeros((n,), dtype), jnp.zeros((n, n), dtype)
    return Sums(zero, zero, rest)


def zero_totals(kind: str, params: PyTree, compensated: bool | None) -> Totals:
    """Totals before the first batch."""
    if compensated is None:
        compensated = common_dtype(params) == jnp.float32
    sums = zero_sums(kind, params)
    count = jnp.int32(0)
    counts = DeviceCounts(count, count, count, count, jnp.int32(-1))
    return own(Totals(sums, sums if compensated else None, counts))


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


Reduce = Callable[[PyTree, PyTree, jax.Array], tuple[Sums, Rows]]


def loss_reduction(terms: Callable[[PyTree, PyTree], Any], kind: str, gradient: Gradient) -> Reduce:
    """From a loss to its sums over the rows in use."""

    def reduce(params: PyTree, batch: PyTree, use: jax.Array) -> tuple[Sums, Rows]:
        dtype = common_dtype(params)

        def total(params: PyTree) -> tuple[jax.Array, tuple[jax.Array, Rows]]:
            value, weight, ok = _checked_terms(terms(params, batch), use.shape[0], dtype)
            finite, used = jnp.isfinite(value), jnp.ones_like(use)
            product = value
            if weight is not None:
                finite, used, product = finite & jnp.isfinite(weight), weight != 0, value * weight
            good = use & ok & finite
            zero = jnp.zeros((), dtype)
            summed = jnp.sum(jnp.where(good, product, zero))
            weights = jnp.sum(jnp.where(good, jnp.ones_like(value) if weight is None else weight, zero))
            return summed, (weights, Rows(ok, finite, used))

        if kind == "value":
            summed, (weights, rows) = total(params)
            return Sums(summed, weights, None), rows
        summed, (weights, rows), slope = _DIFFERENTIATE[gradient](total, params, use.shape[0])
        slope = jax.tree.map(lambda g: g.astype(accumulator(g.dtype)), slope)
        return Sums(summed, weights, slope), rows

    return reduce


def _checked_terms(result: Any, rows: int, dtype: Any) -> tuple[jax.Array, jax.Array | None, jax.Array]:
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
    ok = jnp.ones((rows,), bool) if terms.ok is None else jnp.asarray(terms.ok).astype(bool)
    return value.astype(dtype), weight, ok


Total = Callable[[PyTree], tuple[jax.Array, tuple[jax.Array, Rows]]]
Differentiated = tuple[jax.Array, tuple[jax.Array, Rows], PyTree]


def _reverse(total: Total, params: PyTree, rows: int) -> Differentiated:
    (summed, rest), slope = jax.value_and_grad(total, has_aux=True)(params)
    return summed, rest, slope


def _forward(total: Total, params: PyTree, rows: int) -> Differentiated:
    flat, restore = ravel(params)

    def along(direction: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, Rows]]:
        return jax.jvp(lambda p: total(restore(p)), (flat,), (direction,), has_aux=True)

    basis = jnp.eye(flat.size, dtype=flat.dtype)
    summed, slope, rest = jax.vmap(along, out_axes=(None, 0, None))(basis)
    return summed, rest, restore(slope)


def _finite_difference(total: Total, params: PyTree, rows: int) -> Differentiated:
    """Central differences, two evaluations for each parameter, one after the other. Their step balances rounding and
    truncation: the cube root of the precision, relative to parameters over one."""
    flat, restore = ravel(params)
    n = flat.size
    step = float(jnp.finfo(flat.dtype).eps) ** (1 / 3) * jnp.maximum(jnp.abs(flat), jnp.ones_like(flat))

    def at(carry: Rows, i: jax.Array) -> tuple[Rows, tuple[jax.Array, jax.Array]]:
        # 0 is the point itself, then come the n steps forwards and the n backwards.
        place = jnp.arange(n, dtype=i.dtype)
        ahead, behind = place == i - 1, place == i - 1 - n
        moved = flat + jnp.where(ahead, step, 0) - jnp.where(behind, step, 0)
        summed, (weights, now) = total(restore(moved))
        return Rows(*map(jnp.logical_and, carry, now)), (summed, weights)

    everything = Rows(*[jnp.ones((rows,), bool)] * 3)
    all_along, (summed, weights) = lax.scan(at, everything, jnp.arange(2 * n + 1, dtype=jnp.int32))
    # The distance between the points that were really evaluated.
    width = (flat + step) - (flat - step)
    return summed[0], (weights[0], all_along), restore((summed[1 : n + 1] - summed[n + 1 :]) / width)


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


def batch_sums(
    reduce: Reduce, params: PyTree, batch: PyTree, valid: jax.Array, index: jax.Array, nothing: Sums,
    counts: DeviceCounts, nan: NanPolicy, across: Callable[[PyTree], PyTree],
) -> tuple[Sums, DeviceCounts]:  # fmt: skip
    """The sums of one batch over its good rows.

    A row that does not count must not reach the gradient: the derivative of a NaN term times a zero is a NaN. So rows out
    of use are replaced by a row in use before the model, and their terms by zero behind it. Which rows are bad is known
    only behind the model: if there are any, the batch is evaluated again without them.
    """

    def fill(use: jax.Array) -> PyTree:
        first = jnp.argmax(use)

        def leaf(values: jax.Array) -> jax.Array:
            mask = use.reshape(use.shape + (1,) * (values.ndim - 1))
            return jnp.where(mask, values, lax.dynamic_index_in_dim(values, first))

        return jax.tree.map(leaf, batch)

    def attempt(state: tuple[Any, ...]) -> tuple[Any, ...]:
        _, use, masked, nonfinite, _ = state
        sums, rows = reduce(params, fill(use), use)
        good = rows.ok & rows.finite
        masked += _count(use & ~rows.ok)
        nonfinite += _count(use & rows.ok & ~rows.finite & rows.used)
        return jnp.any(use & ~good), use & good, masked, nonfinite, sums

    zero = jnp.int32(0)
    start = (jnp.bool_(True), valid, zero, zero, nothing)
    _, use, masked, nonfinite, sums = lax.while_loop(lambda state: state[0], attempt, start)
    sums = jax.tree.map(lambda s: jnp.where(jnp.any(use), s, jnp.zeros_like(s)), sums)
    masked, nonfinite, count, sums = across((masked, nonfinite, _count(valid), sums))
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(sums)]))
    skip = ~finite if nan == "mask" else ~finite | (nonfinite > 0)
    sums = jax.tree.map(lambda s: jnp.where(skip, jnp.zeros_like(s), s), sums)
    bad = ~finite | (nonfinite > 0)
    return sums, DeviceCounts(
        counts.masked + masked,
        counts.nonfinite + nonfinite,
        counts.skipped + skip.astype(jnp.int32),
        counts.lost + jnp.where(skip, count - masked - nonfinite, zero),
        jnp.where(bad & (counts.first < 0), index, counts.first),
    )


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


Across = Callable[[PyTree], PyTree]
BatchStep = Callable[[PyTree, PyTree, PyTree, jax.Array, jax.Array, Across], PyTree]
Run = Callable[..., tuple[PyTree, jax.Array]]


def compiled(step: BatchStep, counts: Callable[[PyTree], DeviceCounts], mesh: Mesh | None) -> Run:
    """One program for a chunk of batches: `run(carry, fixed, data, first, batches, rows) -> (carry, ticket)`.

    `data`: leaves of shape (batches at most, batch size, ...), of which `batches` hold `rows` rows; `first`: the number
    of the first one. `carry` is donated. The ticket is there to wait for, and tells the first batch that was not finite,
    if any. On a mesh every device has its part of each batch's rows, and sums are sums over the mesh.
    """
    axes = () if mesh is None else tuple(mesh.axis_names)

    def across(tree: PyTree) -> PyTree:
        return lax.psum(tree, axes) if axes else tree

    def run(
        carry: PyTree, fixed: PyTree, data: PyTree, first: jax.Array, batches: jax.Array, rows: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        local = jax.tree.leaves(data)[0].shape[1]
        devices, offset = 1, jnp.int32(0)
        if mesh is not None:
            devices, offset = mesh.size, lax.axis_index(axes) * local

        def body(i: jax.Array, carry: PyTree) -> PyTree:
            batch = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), data)
            valid = i * (local * devices) + offset + jnp.arange(local, dtype=jnp.int32) < rows
            new = step(carry, fixed, batch, valid, first + i, across)
            return jax.tree.map(in_dtype_of, new, carry)

        carry = lax.fori_loop(jnp.int32(0), batches, body, carry)
        return carry, counts(carry).first

    if mesh is not None:
        specs = (P(), P(), P(None, axes), P(), P(), P())
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return jax.jit(run, donate_argnums=0)


class _Cache:
    """Compiled programs by the functions they contain, with what these close over, and by options: the most recent ones.

    Functions are told apart as objects, so two closures from one factory are two models. As with `jax.jit` a function
    must be pure; but a closure variable or an attribute of a method's object that was bound anew is seen, and gives a new
    program.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, tuple[tuple[Any, ...], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, functions: Sequence[Any], static: Hashable, build: Callable[[], Any]) -> Any:
        """The program for these functions and options, built if there is none."""
        key = (*functions, static)
        captured = tuple(itertools.chain.from_iterable(map(_captured, functions)))
        try:
            hash(key)
        except TypeError:  # a callable that can not be a key
            return build()
        with self._lock:
            found = self._entries.get(key)
            if found is None or len(found[0]) != len(captured) or not all(map(_is, found[0], captured)):
                found = self._entries[key] = captured, build()
            self._entries.move_to_end(key)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
            return found[1]


def _is(a: Any, b: Any) -> bool:
    return a is b


def _captured(function: Any) -> tuple[Any, ...]:
    """What a function depends on beside its code, as far as one can see."""
    if isinstance(function, functools.partial):
        return (*_captured(function.func), *function.args, *function.keywords.values())
    if isinstance(function, types.MethodType):
        return (*_captured(function.__func__), *getattr(function.__self__, "__dict__", {}).values())
    cells = getattr(function, "__closure__", None) or ()
    defaults = (*(getattr(function, "__defaults__", None) or ()),)
    return (*(cell.cell_contents for cell in cells if _is_filled(cell)), *defaults)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (reading an empty cell raises)
    except ValueError:
        return False
    return True


programs = _Cache(PROGRAMS)


class Chunk(NamedTuple):
    """Some batches on their way to the device: leaves of shape (batches at most, batch size, ...)."""

    data: PyTree
    first: int
    batches: int
    rows: int
    cursor: Any


class Passes:
    """Passes over a source: its batches in chunks, and what compiled programs make of them."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.batch_size = 0  # known when the first pass begins
        self._per_chunk = 0

    def chunks(
        self, epoch: int = 0, start: int = 0, cursor: Any = None, every: Sequence[int] = ()
    ) -> Generator[Chunk]:
        """The chunks of a pass from batch `start` on; every so many batches a chunk ends, for each number in `every`."""
        made = self._chunks(epoch, start, cursor, every)
        return prefetched(made, self.options.prefetch) if self.options.prefetch else made

    def _chunks(self, epoch: int, start: int, cursor: Any, every: Sequence[int]) -> Generator[Chunk]:
        reader = self.source.open(self.options.shuffle, epoch, start * self.batch_size, cursor)
        if not self.batch_size:
            self.settle(self.options.batch_size or reader.usual_rows())
        size, first = self.batch_size, start
        while True:
            data = None
            if not self._per_chunk:
                data = reader.take(size)
                if data is None:
                    return
                self._per_chunk = self._chunk_length(data)
            batches = min([self._per_chunk, *((first // n + 1) * n - first for n in every)])
            missing = batches * size - (0 if data is None else row_count(data))
            more = reader.take(missing) if missing else None
            data = (
                concatenate([piece for piece in (data, more) if piece is not None])
                if data is not None
                else more
            )
            if data is None:
                return
            rows = row_count(data)
            made = -(-rows // size)
            yield Chunk(self._placed(data, rows), first, made, rows, reader.cursor())
            first += made
            if rows < batches * size:
                return

    def settle(self, wanted: int) -> None:
        """Set the batch size: no more than there are rows, and as many on each device."""
        devices = 1 if self.options.mesh is None else self.options.mesh.size
        if self.source.rows is not None:
            wanted = min(wanted, self.source.rows)
        self.batch_size = -(-max(wanted, 1) // devices) * devices

    def _chunk_length(self, batch: PyTree) -> int:
        """Batches for the device at once."""
        per_row = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / row_count(batch)
        length = max(int(CHUNK_BYTES / max(per_row * self.batch_size, 1)), 1)
        return length if self.source.rows is None else min(length, -(-self.source.rows // self.batch_size))

    def _placed(self, data: PyTree, rows: int) -> PyTree:
        shape = (self._per_chunk, self.batch_size)
        filled = -(-rows // self.batch_size) * self.batch_size

        def leaf(values: Any) -> Any:
            length = self._per_chunk * self.batch_size
            if rows < length:
                # Only batches with rows are run: their last one is filled up with a valid row.
                library: Any = jnp if isinstance(values, jax.Array) else np
                padding = library.zeros((length - rows, *values.shape[1:]), values.dtype)
                if isinstance(values, jax.Array):
                    padding = padding.at[: filled - rows].set(values[:1])
                else:
                    padding[: filled - rows] = values[:1]
                values = library.concatenate([values, padding])
            return values.reshape(*shape, *values.shape[1:])

        data = jax.tree.map(leaf, data)
        if self.options.mesh is None:
            return data
        spec = NamedSharding(self.options.mesh, P(None, tuple(self.options.mesh.axis_names)))
        return jax.device_put(data, spec)

    def replicated(self, tree: PyTree) -> PyTree:
        """Arrays where the programs expect them."""
        if self.options.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.options.mesh, P()))

    def sums(self, objective: Objective, kind: str, params: PyTree) -> tuple[Sums, Counts]:
        """One whole pass at some parameters. Raises NonFiniteError, and ValueError if there are no rows."""
        options = self.options
        run = sums_program(objective, kind, options)
        params = self.replicated(params)
        totals = self.replicated(zero_totals(kind, params, options.compensated))
        rows = 0
        queue = InFlight()
        for chunk in self.chunks():
            totals, ticket = run(totals, params, chunk.data, *scalars(chunk))
            rows += chunk.rows
            if queue.add(ticket) and options.nan == "raise":
                break
        return finished(totals), self.checked_counts(totals.counts, rows)

    def checked_counts(self, counts: DeviceCounts, rows: int) -> Counts:
        """Read the counts of a pass over so many rows. Raises what the options say about rows that are not finite."""
        if not rows:
            raise ValueError("the source has no rows")
        masked, nonfinite, skipped, lost, first = map(int, jax.device_get(counts))
        if self.options.nan == "raise" and first >= 0:
            raise NonFiniteError(first, self.batch_size, nonfinite)
        used = rows - masked - nonfinite - lost
        if used == 0:
            raise ValueError(f"no row is left: {masked} are masked, {nonfinite} are not finite")
        return Counts(used, masked, nonfinite, skipped)


def own(tree: PyTree) -> PyTree:
    """Copies, since what is donated must belong to nobody else."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


class InFlight:
    """Keeps the host from running far ahead of the device, which would keep all chunks between them in memory."""

    def __init__(self) -> None:
        self._tickets: deque[jax.Array] = deque()

    def add(self, ticket: jax.Array) -> bool:
        """One chunk more is on its way; waits for the one before the last few, and says if that had met what is not
        finite."""
        self._tickets.append(ticket)
        return len(self._tickets) > CHUNKS_AHEAD and int(self._tickets.popleft()) >= 0


def scalars(chunk: Chunk) -> tuple[np.ndarray, ...]:
    """A chunk's numbers as a program takes them."""
    return np.int32(chunk.first), np.int32(chunk.batches), np.int32(chunk.rows)  # type: ignore[return-value]


def row_count(data: PyTree) -> int:
    """Rows of a pytree of arrays."""
    return jax.tree.leaves(data)[0].shape[0]


def sums_program(objective: Objective, kind: str, options: Options) -> Run:
    """The program that adds chunks of batches to totals, at fixed parameters."""

    def build() -> Run:
        reduce = (
            objective.terms if kind == "normal" else loss_reduction(objective.terms, kind, options.gradient)
        )

        def step(
            totals: Totals, params: PyTree, batch: PyTree, valid: Any, index: Any, across: Any
        ) -> Totals:
            nothing = zero_sums(kind, params)
            sums, counts = batch_sums(
                reduce, params, batch, valid, index, nothing, totals.counts, options.nan, across
            )
            return add(totals, sums, counts)

        return compiled(step, lambda totals: totals.counts, options.mesh)

    return programs.get(objective.functions, (kind, objective.static, options.static), build)
