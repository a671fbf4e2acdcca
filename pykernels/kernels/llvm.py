"""From a kernel body to LLVM IR: the emitter behind every native runner.

A body is traced once with the arrays lift, for a block of `LANES` lanes, a prime that no other axis has: whatever axis has
that length is the lane axis, and it disappears here. An array of shape (3, lanes) becomes three wide cells (`ir.py`). Moving
elements about, most of what a field's jaxpr does, happens among cells and leaves no instruction behind. Only what would be
long stays a loop: products with matrices, long scans.

A new primitive is one entry of `_RULES` (whole arrays) or `_SCALAR` (one cell of each operand).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from pykernels.kernels.body import Kernel
from pykernels.kernels.ir import (
    BOOL,
    INT64,
    Argument,
    Cell,
    Program,
    Ref,
    Target,
    Unsupported,
    Writer,
    checked,
    is_float,
    known,
)
from pykernels.kernels.stepper import IN_STEP, TOGETHER
from pykernels.lanes import CALLS, open_jaxpr, scan_counts

LANES = 1_000_003
# Longest matrix product, in multiply-adds, that is written out; longer ones are loops, over blocks of so many results: as
# many sums as keep the multipliers of a processor busy while each waits for its last addition.
UNROLLED_PRODUCT, PRODUCT_BLOCK = 64, 8
# Longest scan, in equations it would write, that is written out.
UNROLLED_SCAN = 500
# Most (entry, update) pairs of an array whose entries are replaced at an index known only at run time.
UPDATED_PAIRS = 1024
# Shared operands with more elements than this are read where they are used.
HELD_ELEMENTS = 8

Array = Any  # NumPy object array of cells; its shape is the value's without the lane axis
INT32 = np.dtype(np.int32)

# Calls are inlined; what a custom rule stands for is enough where derivatives have been taken.
_CALLS = {**CALLS, "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
# The last ones speak of meshes, of which a kernel knows nothing.
_IDENTITIES = frozenset(
    {
        "copy",
        "copy_p",
        "name",
        "stop_gradient",
        "optimization_barrier",
        "reshard",
        "sharding_constraint",
        "pvary",
        "pcast",
    }
)
_ADDITIONS = frozenset({"add", "sub", "add_any", "reduce_sum"})


def emit(body: Callable[..., None], arguments: Sequence[Argument], target: Target) -> Program:
    """The kernel of a body whose Refs are `arguments`. Raises `Unsupported`, naming the first thing that has no rule."""
    emitter = Emitter(target, arguments)
    emitter.run(trace(body, arguments), list(emitter.write.refs))
    return emitter.write.program()


def unavailable() -> str | None:
    """Why nothing can be compiled in this process, or None."""
    return "llvmlite is not installed" if importlib.util.find_spec("llvmlite") is None else None


def as_native(kernel: Kernel) -> Kernel:
    """A kernel with the lift that is taken here."""
    return dataclasses.replace(kernel, solve=dataclasses.replace(kernel.solve, kind="arrays"))


def trace(body: Callable[..., None], arguments: Sequence[Argument]) -> ClosedJaxpr:
    """A kernel body as a jaxpr whose inputs are made Refs, in order."""

    def run(*arrays: jax.Array) -> list[jax.Array]:
        body(*[jax.new_ref(a) for a in arrays])
        return []

    structs = [jax.ShapeDtypeStruct((*a.shape, LANES) if a.lanes else a.shape, a.dtype) for a in arguments]
    return jax.make_jaxpr(run)(*structs)


def optimise(module: Any, machine: Any) -> None:
    """LLVM's passes over a llvmlite module: what puts a kernel's values into registers, and no more.

    The emitter leaves little to do, and code generation and ptxas do the rest. LLVM's full pipeline gave slower code (Lorenz
    and 24 dense states backward on a CPU, by a tenth), up to 12 registers more on a GPU, took longer, and llvmlite 0.50
    keeps 57 kB of every one it makes.
    """
    import llvmlite.binding as binding

    passes = binding.create_new_module_pass_manager()
    passes.add_always_inliner_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_sroa_pass()
    passes.add_simplify_cfg_pass()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes.run(module, binding.create_pass_builder(machine, options))


def _aval(atom: Any) -> Any:
    return atom.aval


def _dtype(atom: Any) -> np.dtype:
    return checked(_aval(atom).dtype)


def _lane_axis(shape: Sequence[int]) -> int | None:
    found = [i for i, n in enumerate(shape) if n == LANES]
    if len(found) > 1:
        raise Unsupported("an array with two lane axes")
    return found[0] if found else None


def _inner(atom: Any) -> tuple[int, ...]:
    """A value's shape without the lane axis."""
    return _without(_aval(atom).shape, _aval(atom).shape)


def _without(items: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """What is said per axis, without the lane axis's."""
    axis = _lane_axis(shape)
    return tuple(x for i, x in enumerate(items) if i != axis)


def _axes(axes: Iterable[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Numbers of axes, counted without the lane axis, which is left out."""
    lane = _lane_axis(shape)
    return tuple(i - (lane is not None and i > lane) for i in axes if i != lane)


def _array(cells: Iterable[Cell], shape: tuple[int, ...]) -> Array:
    out = np.empty(math.prod(shape), object)
    for i, cell in enumerate(cells):
        out[i] = cell
    return out.reshape(shape)


def _single_products(jaxpr: Jaxpr) -> set[Any]:
    """Results of products that are used once, by an addition that does not repeat them."""
    uses: Counter[Any] = Counter(a for a in jaxpr.outvars if not isinstance(a, Literal))
    user: dict[Any, JaxprEqn] = {}
    products = []
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if not isinstance(atom, Literal):
                uses[atom] += 1
                user[atom] = eqn
        if eqn.primitive.name == "mul" and _aval(eqn.outvars[0]).dtype.kind == "f":
            products.append(eqn.outvars[0])

    def fits(product: Any) -> bool:
        if uses[product] != 1 or product not in user:
            return False
        eqn = user[product]
        return eqn.primitive.name == "reduce_sum" or (
            eqn.primitive.name in _ADDITIONS and _aval(eqn.outvars[0]).shape == _aval(product).shape
        )

    return {product for product in products if fits(product)}


class Emitter:
    """Interprets a jaxpr on arrays of cells."""

    def __init__(self, target: Target, arguments: Sequence[Argument]) -> None:
        self.write = Writer(target, arguments)

    def run(self, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
        """The results of a jaxpr: arrays of cells, or Refs."""
        jaxpr, consts = open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(const, var)
        single = _single_products(jaxpr)

        def read(atom: Any) -> Any:
            return self.constant(atom.val, atom) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            values, name = [read(a) for a in eqn.invars], eqn.primitive.name
            if self.write.target.thread and eqn.params.get("name") == TOGETHER:
                (ref, *_) = (r for r in self.write.refs if r.argument.lanes and not r.argument.private)
                outs = [_array([self.write.warp_maximum(ref, values[0].reshape(-1)[0])], ())]
            elif self.write.target.thread and eqn.params.get("name") == IN_STEP:
                self.write.wait()
                outs = values
            elif name in _CALLS:
                outs = self.run(eqn.params[_CALLS[name]], values)
            elif name in _IDENTITIES:
                outs = values
            elif name in _RULES:
                out = _RULES[name](self, eqn, *values)
                outs = out if eqn.primitive.multiple_results else [out]
            elif name in _SCALAR:
                rule = _product if eqn.outvars[0] in single else _SCALAR[name]
                outs = [self.elementwise(rule, eqn, values)]
            else:
                raise Unsupported(name)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def constant(self, value: Any, like: Any) -> Array:
        """A known array."""
        dtype = _dtype(like)
        array = np.asarray(value, dtype)
        return _array([known(x, dtype) for x in array.reshape(-1)], array.shape)

    def elementwise(self, rule: Callable[..., Cell], eqn: JaxprEqn, args: list[Array]) -> Array:
        """One scalar of the result after the other. Integers that are known now are computed now: they may be indices."""
        shape = _inner(eqn.outvars[0])
        fold = _FOLD.get(eqn.primitive.name) if all(_dtype(a).kind in "iub" for a in eqn.invars) else None
        out = []
        lane = _lane_axis(_aval(eqn.outvars[0]).shape)
        # An operand of the same rank without lanes has length 1 there.
        args = [a.squeeze(lane) if a.ndim > len(shape) else a for a in args]
        for cells in zip(*[np.broadcast_to(a, shape).reshape(-1) for a in args], strict=True):
            if fold is not None and all(c.known is not None for c in cells):
                with np.errstate(over="ignore"):
                    value = np.asarray(fold(*[c.known for c in cells]))
                out.append(Cell(known=value.astype(_dtype(eqn.outvars[0]))[()]))  # overflow wraps
            else:
                out.append(rule(self.write, eqn, *cells))
        return _array(out, shape)

    def carried(self, atom: Any, cells: Array) -> list[tuple[Cell, np.dtype, bool]]:
        """The cells of a loop's carry, as `Writer.loop` takes them."""
        wide = _lane_axis(_aval(atom).shape) is not None
        return [(cell, _dtype(atom), wide) for cell in cells.reshape(-1)]


def _split(cells: Sequence[Cell], atoms: Sequence[Any]) -> list[Array]:
    """Cells of several values, one behind the other, as these values."""
    out, position = [], 0
    for atom in atoms:
        size = math.prod(_inner(atom))
        out.append(_array(cells[position : position + size], _inner(atom)))
        position += size
    return out


# Rules for whole arrays: (emitter, equation, *operands) -> result, or results.


def _new_ref(e: Emitter, eqn: JaxprEqn, value: Any) -> Ref:
    if not isinstance(value, Ref):
        raise Unsupported("a buffer inside a kernel")
    return value


def _place(
    e: Emitter, eqn: JaxprEqn, ref: Ref, first: int, args: Sequence[Any]
) -> tuple[Any, list[int], tuple[int, ...]]:
    """What a Ref's index names: the dynamic part of the address, the static offsets of the cells, and their shape."""
    leaves = [(value, _dtype(atom)) for value, atom in zip(args, eqn.invars[first:], strict=True)]
    indexers = jax.tree.unflatten(eqn.params["tree"], leaves)
    shape = _aval(eqn.invars[0]).shape
    if len(indexers) > 1:
        raise Unsupported("a buffer indexed twice")
    indices = indexers[0].indices if indexers else [slice(None)] * len(shape)
    lane = _lane_axis(shape) if ref.argument.lanes else None
    steps = np.cumprod([1, *reversed(_without(shape, shape))])[::-1][1:]
    dynamic, ranges, kept = [], [], []
    inner = iter(steps)
    for axis, index in enumerate(indices):
        if axis == lane:
            if not hasattr(index, "start") or index.start not in (0, None):
                raise Unsupported("a buffer indexed along its lanes")
            continue
        step = int(next(inner))
        if isinstance(index, slice):
            ranges.append([i * step for i in range(shape[axis])])
            kept.append(shape[axis])
        elif hasattr(index, "start"):
            if not isinstance(index.start, int):
                raise Unsupported("a window of a buffer that moves")
            stride = index.stride if isinstance(index.stride, int) else 1
            ranges.append([(index.start + i * stride) * step for i in range(index.size)])
            kept.append(index.size)
        elif isinstance(index, (int, np.integer)):
            ranges.append([int(index) * step])
        else:
            cells, dtype = index
            (cell,) = cells.reshape(-1)
            if cells.ndim or cell.wide:
                raise Unsupported("a buffer indexed by an array")
            dynamic.append((cell, dtype, step))
    offsets = [0]
    for steps_of_axis in ranges:
        offsets = [a + b for a in offsets for b in steps_of_axis]
    return dynamic, offsets, tuple(kept)


def _get(e: Emitter, eqn: JaxprEqn, ref: Ref, *index: Any) -> Array:
    dynamic, offsets, shape = _place(e, eqn, ref, 1, index)
    argument, write = ref.argument, e.write
    if argument.constant and not argument.lanes and not dynamic and len(offsets) > HELD_ELEMENTS:
        return _array([Cell(place=(ref, offset)) for offset in offsets], shape)
    return _array(
        [write.load(ref, write.address(ref, dynamic, offset), argument.lanes) for offset in offsets], shape
    )


def _swap(e: Emitter, eqn: JaxprEqn, ref: Ref, value: Array, *index: Any) -> Array:
    dynamic, offsets, shape = _place(e, eqn, ref, 2, index)
    lanes, dtype, write = ref.argument.lanes, ref.argument.dtype, e.write
    unused = type(eqn.outvars[0]).__name__ == "DropVar"
    if ref.argument.spread:
        write.store_totals(ref, dynamic, offsets, list(np.broadcast_to(value, shape).reshape(-1)))
        return _array([Cell() for _ in offsets], shape)
    old = []
    for offset, cell in zip(offsets, np.broadcast_to(value, shape).reshape(-1), strict=True):
        pointer = write.address(ref, dynamic, offset)
        old.append(Cell() if unused else write.load(ref, pointer, lanes))
        write.store(pointer, cell, dtype, lanes, streaming=ref.argument.streaming)
    return _array(old, shape)


def _broadcast_in_dim(e: Emitter, eqn: JaxprEqn, value: Array, *_: Any) -> Array:
    shape, before = eqn.params["shape"], _aval(eqn.invars[0]).shape
    places = [
        (axis, size)
        for axis, size in zip(eqn.params["broadcast_dimensions"], before, strict=True)
        if size != LANES
    ]
    lane = _lane_axis(shape)
    if lane is not None and any(axis == lane for axis, _ in places):
        # A length of 1 becomes the lane axis.
        gone = [i for i, (axis, _) in enumerate(places) if axis == lane]
        value, places = value.squeeze(tuple(gone)), [p for p in places if p[0] != lane]
    inner = [1] * len(_without(shape, shape))
    for axis, size in places:
        inner[axis - (lane is not None and axis > lane)] = size
    return np.broadcast_to(value.reshape(inner), _without(shape, shape))


def _reshape(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
    return value.reshape(_inner(eqn.outvars[0]))


def _transpose(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
    order = [i for i in eqn.params["permutation"] if _aval(eqn.invars[0]).shape[i] != LANES]
    return value.transpose([sorted(order).index(i) for i in order])


def _slice(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
    p, shape = eqn.params, _aval(eqn.invars[0]).shape
    strides = p["strides"] or (1,) * len(shape)
    triples = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    lane = _lane_axis(shape)
    if lane is not None and triples[lane] != (0, LANES, 1):
        raise Unsupported("a part of the lanes")
    return value[tuple(slice(*t) for t in _without(triples, shape))]


def _concatenate(e: Emitter, eqn: JaxprEqn, *values: Array) -> Array:
    return np.concatenate(values, _axes([eqn.params["dimension"]], _aval(eqn.outvars[0]).shape)[0])


def _pad(e: Emitter, eqn: JaxprEqn, value: Array, filling: Array) -> Array:
    config = _without(eqn.params["padding_config"], _aval(eqn.invars[0]).shape)
    out = np.empty(_inner(eqn.outvars[0]), object)
    out[...] = filling.reshape(-1)[0]
    for index in np.ndindex(value.shape):
        place = tuple(low + i * (gap + 1) for i, (low, _, gap) in zip(index, config, strict=True))
        if all(0 <= i < n for i, n in zip(place, out.shape, strict=True)):
            out[place] = value[index]
    return out


def _iota(e: Emitter, eqn: JaxprEqn, *_: Any) -> Array:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    if shape[axis] == LANES:
        raise Unsupported("numbers of lanes")
    (inner,) = _axes([axis], shape)
    numbers = np.broadcast_to(
        np.arange(shape[axis]).reshape([-1 if i == inner else 1 for i in range(len(_without(shape, shape)))]),
        _without(shape, shape),
    )
    dtype = _dtype(eqn.outvars[0])
    return _array([known(n, dtype) for n in numbers.reshape(-1)], numbers.shape)


def _empty(e: Emitter, eqn: JaxprEqn, *_: Any) -> Array:
    zero = known(0, _dtype(eqn.outvars[0]))
    shape = _inner(eqn.outvars[0])
    return _array([zero] * math.prod(shape), shape)


def _split_rule(e: Emitter, eqn: JaxprEqn, value: Array) -> list[Array]:
    (axis,) = _axes([eqn.params["axis"]], _aval(eqn.invars[0]).shape)
    return np.split(value, np.cumsum(eqn.params["sizes"])[:-1], axis)


def _stack(e: Emitter, eqn: JaxprEqn, *values: Array) -> Array:
    (axis,) = _axes([eqn.params["axis"]], _aval(eqn.outvars[0]).shape)
    return np.stack(values, axis)


def _unstack(e: Emitter, eqn: JaxprEqn, value: Array) -> list[Array]:
    (axis,) = _axes([eqn.params["axis"]], _aval(eqn.invars[0]).shape)
    rows = np.moveaxis(value, axis, 0)
    return [rows[i, ...] for i in range(rows.shape[0])]  # `...`: a cell alone is an array without axes


def _reduction(across: str, combine: Callable[[Writer, np.dtype, Cell, Cell], Cell], neutral: Any) -> Any:
    """Reduction over axes, which may contain the lane axis: then lanes meet, last."""

    def rule(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
        shape, axes = _aval(eqn.invars[0]).shape, eqn.params["axes"]
        dtype, lane = _dtype(eqn.invars[0]), _lane_axis(shape)
        if dtype != BOOL and lane in axes and eqn.primitive.name in ("reduce_or", "reduce_and"):
            raise Unsupported(f"{eqn.primitive.name} of integers over the lanes")
        inner = _axes(axes, shape)
        kept = [i for i in range(value.ndim) if i not in inner]
        rows = value.transpose(*kept, *inner).reshape(math.prod(value.shape[i] for i in kept), -1)
        out = []
        for row in rows:
            total = row[0] if row.size else known(neutral(dtype), dtype)
            for cell in row[1:]:
                total = combine(e.write, dtype, total, cell)
            out.append(_across(e.write, across, dtype, total) if lane is not None and lane in axes else total)
        return _array(out, tuple(value.shape[i] for i in kept))

    return rule


def _across(write: Writer, operation: str, dtype: np.dtype, cell: Cell) -> Cell:
    if operation == "maximum" and cell.truth is not None:
        # The largest of a mask's zeros and ones.
        return write.convert(write.any(cell.truth), BOOL, dtype)
    if dtype == BOOL:
        if operation == "maximum":
            return write.any(cell)
        one = known(True, BOOL)
        return write.binary("xor", BOOL, write.any(write.binary("xor", BOOL, cell, one)), one)
    return write.across(operation, dtype, cell)


def _sum(write: Writer, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
    return write.add(dtype, a, b) if is_float(dtype) else write.binary("add", dtype, a, b)


def _minus(write: Writer, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
    return write.add(dtype, a, b, minus=True) if is_float(dtype) else write.binary("sub", dtype, a, b)


def _times(write: Writer, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
    return write.binary("fmul" if is_float(dtype) else "mul", dtype, a, b)


def _largest(write: Writer, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
    return write.extreme(True, dtype, a, b)


def _smallest(write: Writer, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
    return write.extreme(False, dtype, a, b)


def _bits(operation: str) -> Callable[[Writer, np.dtype, Cell, Cell], Cell]:
    """Bit by bit; of masks these are the maximum and the minimum."""
    return lambda write, dtype, a, b: write.binary(operation, dtype, a, b)


def _bound(sign: int) -> Callable[[np.dtype], Any]:
    def bound(dtype: np.dtype) -> Any:
        if dtype == BOOL:
            return sign > 0
        return (
            sign * np.inf if is_float(dtype) else (np.iinfo(dtype).max if sign > 0 else np.iinfo(dtype).min)
        )

    return bound


def _cumulative(combine: Callable[[Writer, np.dtype, Cell, Cell], Cell]) -> Any:
    def rule(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
        (axis,) = _axes([eqn.params["axis"]], _aval(eqn.invars[0]).shape)
        dtype = _dtype(eqn.outvars[0])
        rows = np.moveaxis(value, axis, -1)
        rows = rows[..., ::-1] if eqn.params["reverse"] else rows
        out = rows.copy()
        for i in range(1, rows.shape[-1]):
            for j in np.ndindex(rows.shape[:-1]):
                out[*j, i] = combine(e.write, dtype, out[*j, i - 1], rows[*j, i])
        return np.moveaxis(out[..., ::-1] if eqn.params["reverse"] else out, -1, axis)

    return rule


def _arg_extreme(largest: bool) -> Any:
    """The first place of the extreme; a NaN is more extreme than everything."""

    def rule(e: Emitter, eqn: JaxprEqn, value: Array) -> Array:
        (axis,) = _axes(eqn.params["axes"], _aval(eqn.invars[0]).shape)
        before, after, write = _dtype(eqn.invars[0]), _dtype(eqn.outvars[0]), e.write
        rows = np.moveaxis(value, axis, -1)
        out = []
        for j in np.ndindex(rows.shape[:-1]):
            best, place = rows[*j, 0], known(0, after)
            for i in range(1, rows.shape[-1]):
                cell = rows[*j, i]
                wins = write.compare("gt" if largest else "lt", before, cell, best)
                if is_float(before):
                    first = write.binary(
                        "and",
                        BOOL,
                        write.compare("uno", before, cell, cell),
                        write.compare("eq", before, best, best),
                    )
                    wins = write.binary("or", BOOL, wins, first)
                best, place = (
                    write.select(wins, cell, best, before),
                    write.select(wins, known(i, after), place, after),
                )
            out.append(place)
        return _array(out, rows.shape[:-1])

    return rule


def _dot_general(e: Emitter, eqn: JaxprEqn, x: Array, y: Array) -> Array:
    """A product of matrices. The lane axis may be free, contracted (then lanes meet) or a batch axis."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = _aval(eqn.invars[0]).shape, _aval(eqn.invars[1]).shape
    dtype, write = _dtype(eqn.outvars[0]), e.write
    meet = any(left[i] == LANES for i in lc)
    lc, lb, rc, rb = _axes(lc, left), _axes(lb, left), _axes(rc, right), _axes(rb, right)
    x, y = (
        _array([write.convert(c, _dtype(v), dtype) for c in a.reshape(-1)], a.shape)
        for a, v in ((x, eqn.invars[0]), (y, eqn.invars[1]))
    )
    lf = [i for i in range(x.ndim) if i not in (*lc, *lb)]
    rf = [i for i in range(y.ndim) if i not in (*rc, *rb)]
    batch, depth = math.prod(x.shape[i] for i in lb), math.prod(x.shape[i] for i in lc)
    rows, columns = math.prod(x.shape[i] for i in lf), math.prod(y.shape[i] for i in rf)
    a = x.transpose(*lb, *lf, *lc).reshape(batch, rows, depth)
    b = y.transpose(*rb, *rc, *rf).reshape(batch, depth, columns)
    shape = _inner(eqn.outvars[0])
    if depth == 1 and is_float(dtype) and not (meet and write.target.width > 1):
        # Outer products, such as the cotangent of a matrix: most are added to something, and need no memory of their own.
        a, b = (_array([write.value(c, dtype) for c in m.reshape(-1)], m.shape) for m in (a, b))
        places = np.ndindex(batch, rows, columns)
        return _array(
            [write.multiply(dtype, a[n, i, 0], b[n, 0, j], fresh=True) for n, i, j in places], shape
        )
    if batch * rows * depth * columns > UNROLLED_PRODUCT and is_float(dtype):
        return _array(_long_product(write, dtype, a, b, meet), shape)
    out = []
    for n, i, j in np.ndindex(batch, rows, columns):
        total: Cell | None = None
        for k in range(depth):
            term = (
                write.multiply(dtype, a[n, i, k], b[n, k, j])
                if is_float(dtype)
                else _times(write, dtype, a[n, i, k], b[n, k, j])
            )
            total = term if total is None else _sum(write, dtype, total, term)
        total = known(0, dtype) if total is None else write.value(total, dtype)
        out.append(_across(write, "sum", dtype, total) if meet else total)
    return _array(out, shape)


class _Matrix:
    """A factor of a long product in memory: where it begins, whether its cells are wide, and the steps of its three axes."""

    def __init__(self, write: Writer, name: str, cells: Array, dtype: np.dtype) -> None:
        self.wide = any(cell.wide for cell in cells.reshape(-1))
        self.steps = tuple(int(np.prod(cells.shape[i + 1 :])) for i in range(3))
        places = [cell.place for cell in cells.reshape(-1)]
        steps = _affine(places, cells.shape)
        if steps is not None:
            ref, offset = places[0]
            self.base, self.steps = write.address(ref, [], offset), steps
        else:
            base = write.workspace(name, cells.size, dtype, self.wide)
            self.base = write.spill(list(cells.reshape(-1)), dtype, self.wide, base)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.wide, self.steps


def _affine(places: Sequence[tuple[Ref, int] | None], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The steps along three axes between entries of one shared array in memory, if that is where they are."""
    if any(p is None for p in places) or len({p[0] for p in places if p}) != 1:
        return None
    offsets = np.array([p[1] for p in places if p]).reshape(shape)
    steps = tuple(
        int(np.take(offsets, 1, i).flat[0] - offsets.flat[0]) if shape[i] > 1 else 0 for i in range(3)
    )
    expected = offsets.flat[0] + sum(np.indices(shape)[i] * steps[i] for i in range(3))
    return steps if np.array_equal(offsets, expected) else None


def _long_product(write: Writer, dtype: np.dtype, a: Array, b: Array, meet: bool) -> list[Cell]:
    """A product as a function with loops, shared by all products of its kind."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    left, right = _Matrix(write, "left", a, dtype), _Matrix(write, "right", b, dtype)
    wide = (left.wide or right.wide) and not meet
    key = ("product", dtype.name, a.shape, b.shape, left.key, right.key, meet)

    def element(base: str, matrix: _Matrix, index: Sequence[str]) -> Cell:
        return write.fetch(base, _offset(write, index, matrix.steps), dtype, matrix.wide)

    def block(n: str, i: Sequence[str], j: Sequence[str]) -> None:
        def step(carried: list[Cell]) -> list[Cell]:
            k = carried[0].text
            a = [element("%left", left, (n, row, k)) for row in i]
            b = [element("%right", right, (n, k, column)) for column in j]
            terms = [write.multiply(dtype, x, y) for x in a for y in b]
            totals = [write.add(dtype, t, term) for t, term in zip(carried[1:], terms, strict=True)]
            return [write.result(f"add nsw i64 {k}, 1", False), *totals]

        zeros = [(known(0, dtype), dtype, left.wide or right.wide)] * (len(i) * len(j))
        _, *totals = write.loop(
            [(known(0, INT64), INT64, False), *zeros],
            lambda carried: write.result(f"icmp slt i64 {carried[0].text}, {depth}", False),
            step,
        )
        for (row, column), total in zip(itertools.product(i, j), totals, strict=True):
            done = _across(write, "sum", dtype, total) if meet else total
            place = _offset(write, (n, row, column), (rows * columns, columns, 1))
            write.store(write.element("%out", place, dtype, wide), done, dtype, wide)

    def body() -> None:
        def plane(n: str) -> None:
            _blocked(write, rows, PRODUCT_BLOCK, lambda i: along(n, i))

        def along(n: str, i: Sequence[str]) -> None:
            _blocked(write, columns, max(PRODUCT_BLOCK // len(i), 1), lambda j: block(n, i, j))

        _blocked(write, batch, 1, lambda n: plane(n[0]))

    symbol = write.shared_function(key, "ptr noalias %left, ptr noalias %right, ptr noalias %out", body)
    out = write.workspace("product", batch * rows * columns, dtype, wide)
    write.line(f"call void @{symbol}(ptr {left.base}, ptr {right.base}, ptr {out})")
    return [write.fetch(out, str(i), dtype, wide) for i in range(batch * rows * columns)]


def _blocked(write: Writer, count: int, most: int, body: Callable[[Sequence[str]], None]) -> None:
    """`body` of all numbers below `count`, in runs of about equal length, at most `most`; the runs are a loop."""
    runs = max(-(-count // most), 1)
    size = -(-count // runs)
    whole = count // size

    def run(q: str) -> None:
        first = write.result(f"mul nsw i64 {q}, {size}", False).text
        body([first, *[write.result(f"add nsw i64 {first}, {i}", False).text for i in range(1, size)]])

    if whole == 1:
        body([str(i) for i in range(size)])
    else:
        write.count(whole, run)
    if count > whole * size:
        body([str(i) for i in range(whole * size, count)])


def _offset(write: Writer, index: Sequence[str], steps: Sequence[int]) -> str:
    """sum(index * step) as the text of a 64-bit integer."""
    total, static = "", 0
    for i, step in zip(index, steps, strict=True):
        if i.isdigit():
            static += int(i) * step
        elif step:
            term = i if step == 1 else write.result(f"mul nsw i64 {i}, {step}", False).text
            total = term if not total else write.result(f"add nsw i64 {total}, {term}", False).text
    if not total:
        return str(static)
    return total if not static else write.result(f"add nsw i64 {total}, {static}", False).text


# Reading and replacing entries at an index.


def _window(
    e: Emitter, starts: Sequence[tuple[Cell, np.dtype]], shape: Sequence[int], sizes: Sequence[int]
) -> list[Cell]:
    """Starts of a window, moved inside as XLA does, as 64-bit integers."""
    out = []
    for (cell, dtype), n, size in zip(starts, shape, sizes, strict=True):
        out.append(_clamped(e.write, e.write.convert(cell, dtype, INT64), n - size))
    return out


def _clamped(write: Writer, cell: Cell, most: int) -> Cell:
    if cell.known is not None:
        return known(min(max(int(cell.known), 0), most), INT64)
    low = write.extreme(True, INT64, cell, known(0, INT64))
    return write.extreme(False, INT64, low, known(most, INT64))


class _Table:
    """An array whose entries are read at indices known only at run time: in memory from the first such reading on."""

    def __init__(self, e: Emitter, cells: Array, dtype: np.dtype) -> None:
        self.write, self.cells, self.dtype = e.write, cells, dtype
        self.wide = any(cell.wide for cell in cells.reshape(-1))
        self.base: str | None = None
        self.step = 1

    def read(self, index: Sequence[Cell]) -> Cell:
        """The entry at a full index of in-bounds 64-bit integers."""
        if all(i.known is not None for i in index):
            return self.cells[tuple(int(i.known) for i in index)]
        write = self.write
        offset = known(0, INT64)
        for i, n in zip(index, self.cells.shape, strict=True):
            scaled = _int(write, "mul", offset, known(n, INT64))
            offset = _int(write, "add", scaled, i)
        if self.base is None:
            self._store()
        assert self.base is not None
        if not self.wide:
            return write.look_up(
                self.base, _int(write, "mul", offset, known(self.step, INT64)), self.dtype, offset.wide
            )
        width = write.target.width
        if not offset.wide:
            return write.fetch(self.base, write.text(offset, INT64, False), self.dtype, True)
        place = _int(write, "add", _int(write, "mul", offset, known(width, INT64)), write.lane_numbers())
        return write.look_up(self.base, place, self.dtype, True)

    def _store(self) -> None:
        flat = list(self.cells.reshape(-1))
        steps = _affine([c.place for c in flat], (1, 1, len(flat)))
        if steps is not None and flat[0].place is not None:
            ref, offset = flat[0].place
            self.base, self.step = self.write.address(ref, [], offset), steps[2]
        else:
            self.base = self.write.spill(flat, self.dtype, self.wide)


def _int(write: Writer, operation: str, a: Cell, b: Cell) -> Cell:
    if a.known is not None and b.known is not None:
        return known(a.known * b.known if operation == "mul" else a.known + b.known, INT64)
    if operation == "mul" and b.known == 1:
        return a
    if operation == "add" and a.known == 0:
        return b
    return write.binary(operation, INT64, a, b)


def _dynamic_slice(e: Emitter, eqn: JaxprEqn, value: Array, *starts: Array) -> Array:
    shape, sizes = _aval(eqn.invars[0]).shape, eqn.params["slice_sizes"]
    given = [(s.reshape(-1)[0], _dtype(a)) for s, a in zip(starts, eqn.invars[1:], strict=True)]
    begin = _window(e, _without(given, shape), value.shape, _without(sizes, shape))
    table = _Table(e, value, _dtype(eqn.outvars[0]))
    inner = _inner(eqn.outvars[0])
    return _array(
        [
            table.read([_int(e.write, "add", b, known(i, INT64)) for b, i in zip(begin, index, strict=True)])
            for index in np.ndindex(inner)
        ],
        inner,
    )


def _dynamic_update_slice(e: Emitter, eqn: JaxprEqn, value: Array, update: Array, *starts: Array) -> Array:
    shape = _aval(eqn.invars[0]).shape
    given = [(s.reshape(-1)[0], _dtype(a)) for s, a in zip(starts, eqn.invars[2:], strict=True)]
    begin = _window(e, _without(given, shape), value.shape, update.shape)
    out = value.copy()
    places = [[_int(e.write, "add", b, known(i, INT64)) for b, i in zip(begin, index, strict=True)]
              for index in np.ndindex(update.shape)]  # fmt: skip
    _replace(e, out, places, list(update.reshape(-1)), _dtype(eqn.outvars[0]), lambda old, new: new)
    return out


def _replace(
    e: Emitter, cells: Array, places: Sequence[Sequence[Cell]], updates: Sequence[Cell], dtype: np.dtype,
    combine: Callable[[Cell, Cell], Cell], meet: bool = False,
) -> None:  # fmt: skip
    """Combine updates into the entries at `places` (64-bit indices; out of bounds: nowhere)."""
    unknown = sum(any(i.known is None for i in place) for place in places)
    if unknown * cells.size > UPDATED_PAIRS:
        raise Unsupported(f"an update at run-time indices of an array of {cells.size} elements")
    for place, update in zip(places, updates, strict=True):
        if all(i.known is not None for i in place):
            index = tuple(int(i.known) for i in place)
            if all(0 <= i < n for i, n in zip(index, cells.shape, strict=True)):
                new = _across(e.write, "sum", dtype, update) if meet else update
                cells[index] = combine(cells[index], new)
            continue
        for index in np.ndindex(cells.shape):
            here: Cell | None = None
            for i, n in zip(place, index, strict=True):
                test = e.write.compare("eq", INT64, i, known(n, INT64))
                here = test if here is None else e.write.binary("and", BOOL, here, test)
            assert here is not None
            old = cells[index]
            if meet:
                mine = e.write.select(here, update, known(0, dtype), dtype)
                cells[index] = combine(old, _across(e.write, "sum", dtype, mine))
            else:
                cells[index] = e.write.select(here, combine(old, update), old, dtype)


def _gather(e: Emitter, eqn: JaxprEqn, value: Array, indices: Array) -> Array:
    """XLA's gather, one entry of the result after the other."""
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    shape, dtype = _aval(eqn.invars[0]).shape, _dtype(eqn.outvars[0])
    table = _Table(e, value, dtype)
    full = _aval(eqn.outvars[0]).shape
    collapsed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windowed = [i for i in range(len(shape)) if i not in collapsed]
    batch_axes = [i for i in range(len(full)) if i not in numbers.offset_dims]
    fill = p["mode"] in (lax.GatherScatterMode.FILL_OR_DROP,)
    outside = p["fill_value"]
    if outside is None:
        outside = np.nan if is_float(dtype) else True if dtype == BOOL else np.iinfo(dtype).min
    out = []
    for index in np.ndindex(*[1 if n == LANES else n for n in full]):
        start = _start(e, eqn, 1, indices, [index[i] for i in batch_axes])
        offsets = dict(zip(windowed, (index[i] for i in numbers.offset_dims), strict=True))
        valid: Cell | None = None
        place = []
        for axis, n in enumerate(shape):
            if n == LANES:
                if axis in start:
                    raise Unsupported("a gather along the lanes")
                continue
            if axis in numbers.operand_batching_dims:
                which = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
                begin = known([index[i] for i in batch_axes][which], INT64)
            elif axis in start:
                given, most = start[axis], n - sizes[axis]
                begin = _clamped(e.write, given, most)
                if fill and given.known is None:
                    inside = e.write.compare("eq", INT64, given, begin)
                    valid = inside if valid is None else e.write.binary("and", BOOL, valid, inside)
                elif fill and not 0 <= given.known <= most:
                    valid = known(False, BOOL)
            else:
                begin = known(0, INT64)
            place.append(_int(e.write, "add", begin, known(offsets.get(axis, 0), INT64)))
        cell = table.read(place)
        out.append(cell if valid is None else e.write.select(valid, cell, known(outside, dtype), dtype))
    return _array(out, _inner(eqn.outvars[0]))


def _start(e: Emitter, eqn: JaxprEqn, operand: int, indices: Array, batch: Sequence[int]) -> dict[int, Cell]:
    """Axis of the operand -> start of the window, as 64-bit integers, for one batch index (0 along the lanes)."""
    numbers, atom = eqn.params["dimension_numbers"], eqn.invars[operand]
    reads = eqn.primitive.name == "gather"
    axes: tuple[int, ...] = numbers.start_index_map if reads else numbers.scatter_dims_to_operand_dims
    shape = _aval(atom).shape
    inner = tuple(i for i, n in zip(batch, shape, strict=False) if n != LANES)
    return {axis: e.write.convert(indices[*inner, k], _dtype(atom), INT64) for k, axis in enumerate(axes)}


def _scatter(combine: Callable[[Writer, np.dtype, Cell, Cell], Cell]) -> Any:
    def rule(e: Emitter, eqn: JaxprEqn, value: Array, indices: Array, updates: Array) -> Array:
        numbers, dtype = eqn.params["dimension_numbers"], _dtype(eqn.outvars[0])
        shape, full = _aval(eqn.invars[0]).shape, _aval(eqn.invars[2]).shape
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        windowed = [i for i in range(len(shape)) if i not in gone]
        batch_axes = [i for i in range(len(full)) if i not in numbers.update_window_dims]
        meet = _lane_axis(full) is not None and _lane_axis(shape) is None
        if meet and eqn.primitive.name != "scatter-add":
            raise Unsupported(f"{eqn.primitive.name} from lanes into a shared array")
        places = []
        for index in np.ndindex(*[1 if n == LANES else n for n in full]):
            batch = [index[i] for i in batch_axes]
            start = _start(e, eqn, 1, indices, batch)
            offsets = dict(zip(windowed, (index[i] for i in numbers.update_window_dims), strict=True))
            place = []
            for axis, n in enumerate(shape):
                if n == LANES:
                    continue
                if axis in numbers.operand_batching_dims:
                    which = numbers.scatter_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
                    begin = known(batch[which], INT64)
                else:
                    begin = start.get(axis, known(0, INT64))
                if eqn.params["mode"] == lax.GatherScatterMode.CLIP and axis in start:
                    begin = _clamped(e.write, begin, n - 1)
                place.append(_int(e.write, "add", begin, known(offsets.get(axis, 0), INT64)))
            places.append(place)
        out = value.copy()
        _replace(
            e,
            out,
            places,
            list(updates.reshape(-1)),
            dtype,
            lambda old, new: combine(e.write, dtype, old, new),
            meet,
        )
        return out

    return rule


# Control flow.


def _while(e: Emitter, eqn: JaxprEqn, *args: Any) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    consts, body_consts, init = args[:n], args[n : n + m], args[n + m :]
    atoms = eqn.outvars
    carried = [c for atom, value in zip(atoms, init, strict=True) for c in e.carried(atom, value)]

    def condition(cells: list[Cell]) -> Cell:
        (test,) = e.run(p["cond_jaxpr"], [*consts, *_split(cells, atoms)])
        return test.reshape(-1)[0]

    def step(cells: list[Cell]) -> list[Cell]:
        outs = e.run(p["body_jaxpr"], [*body_consts, *_split(cells, atoms)])
        return [cell for out in outs for cell in out.reshape(-1)]

    return _split(e.write.loop(carried, condition, step), atoms)


def _cond(e: Emitter, eqn: JaxprEqn, index: Array, *args: Any) -> list[Array]:
    (cell,), dtype = index.reshape(-1), _dtype(eqn.invars[0])
    branches, atoms = eqn.params["branches"], eqn.outvars
    if cell.wide:
        raise Unsupported("cond with an index per lane")
    number = _clamped(e.write, e.write.convert(cell, dtype, INT64), len(branches) - 1)
    if number.known is not None:
        return e.run(branches[int(number.known)], args)
    kinds = [(k, w) for atom in atoms for _, k, w in e.carried(atom, np.empty(_inner(atom), object))]

    def arm(branch: Any) -> Callable[[], list[Cell]]:
        return lambda: [cell for out in e.run(branch, args) for cell in out.reshape(-1)]

    cells = e.write.branch(e.write.convert(number, INT64, INT32), [arm(b) for b in branches], kinds)
    return _split(cells, atoms)


def _equations(jaxpr: Any) -> int:
    """Roughly the equations a jaxpr writes: a scan's count as often as it steps."""
    inner, _ = open_jaxpr(jaxpr)
    total = 0
    for eqn in inner.eqns:
        size = max((math.prod(_inner(v)) for v in eqn.outvars if hasattr(_aval(v), "shape")), default=1)
        own = [eqn.params[k] for k in ("jaxpr", "call_jaxpr", "cond_jaxpr", "body_jaxpr") if k in eqn.params]
        total += eqn.params.get("length", 1) * sum(map(_equations, own)) if own else size
    return total


def _scan(e: Emitter, eqn: JaxprEqn, *args: Any) -> list[Array]:
    p = eqn.params
    n, m = scan_counts(p)
    consts, carry, xs = list(args[:n]), list(args[n : n + m]), args[n + m :]
    length = p["length"]
    lane_lists = [v for v in (*eqn.invars[n + m :], *eqn.outvars[m:]) if _aval(v).shape[0] == LANES]
    if lane_lists:
        raise Unsupported("a scan over the lanes")
    if length * _equations(p["jaxpr"]) > UNROLLED_SCAN:
        return _long_scan(e, eqn, consts, carry, xs)
    rows: list[list[Array]] = []
    for i in reversed(range(length)) if p["reverse"] else range(length):
        outs = e.run(p["jaxpr"], [*consts, *carry, *[x[i, ...] for x in xs]])
        carry, row = outs[:m], outs[m:]
        rows.append(row)
    rows = rows[::-1] if p["reverse"] else rows
    shapes = [_inner(v) for v in eqn.outvars[m:]]
    ys = [_array([c for row in rows for c in row[k].reshape(-1)], shape) for k, shape in enumerate(shapes)]
    return [*carry, *ys]


def _long_scan(
    e: Emitter, eqn: JaxprEqn, consts: list[Array], carry: list[Array], xs: Sequence[Array]
) -> list[Array]:
    """A scan as a loop; what it reads and writes row by row lies in memory."""
    p, write = eqn.params, e.write
    n, m = len(consts), len(carry)
    length, atoms = p["length"], eqn.outvars[:m]
    sources = [
        (write.spill(list(x.reshape(-1)), _dtype(a), _wide(a)), _inner(a)[1:], _dtype(a), _wide(a))
        for x, a in zip(xs, eqn.invars[n + m :], strict=True)
    ]
    results = [
        (write.allocate(math.prod(_inner(a)), _dtype(a), _wide(a)), _inner(a)[1:], _dtype(a), _wide(a))
        for a in eqn.outvars[m:]
    ]

    def places(number: str, size: int) -> list[str]:
        first = _offset(write, (number,), (size,))
        return [
            first if i == 0 else write.result(f"add nsw i64 {first}, {i}", False).text for i in range(size)
        ]

    def step(cells: list[Cell]) -> list[Cell]:
        turn = cells[0].text
        number = write.result(f"sub nsw i64 {length - 1}, {turn}", False).text if p["reverse"] else turn
        row = [
            _array([write.fetch(base, at, dtype, wide) for at in places(number, math.prod(shape))], shape)
            for base, shape, dtype, wide in sources
        ]
        outs = e.run(p["jaxpr"], [*consts, *_split(cells[1:], atoms), *row])
        for out, (base, shape, dtype, wide) in zip(outs[m:], results, strict=True):
            for at, cell in zip(places(number, math.prod(shape)), out.reshape(-1), strict=True):
                write.store(write.element(base, at, dtype, wide), cell, dtype, wide)
        following = write.result(f"add nsw i64 {turn}, 1", False)
        return [following, *[cell for out in outs[:m] for cell in out.reshape(-1)]]

    start = [c for atom, value in zip(atoms, carry, strict=True) for c in e.carried(atom, value)]
    _, *cells = write.loop(
        [(known(0, INT64), INT64, False), *start],
        lambda carried: write.result(f"icmp slt i64 {carried[0].text}, {length}", False),
        step,
    )
    ys = [
        _array(
            [write.fetch(base, str(i), dtype, wide) for i in range(length * math.prod(shape))],
            (length, *shape),
        )
        for base, shape, dtype, wide in results
    ]
    return [*_split(cells, atoms), *ys]


def _wide(atom: Any) -> bool:
    return _lane_axis(_aval(atom).shape) is not None


# Rules for one cell of each operand: (writer, equation, *cells) -> cell.


def _arithmetic(floating: str, integer: str) -> Any:
    def rule(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
        dtype = _dtype(eqn.outvars[0])
        return write.binary(floating if is_float(dtype) else integer, dtype, a, b)

    return rule


def _product(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    return write.multiply(_dtype(eqn.outvars[0]), a, b)


def _add(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    return _sum(write, _dtype(eqn.outvars[0]), a, b)


def _add_any(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    """Sums of cotangents: a known zero is one that never existed."""
    if a.known is not None and a.known == 0:
        return b
    if b.known is not None and b.known == 0:
        return a
    return _sum(write, _dtype(eqn.outvars[0]), a, b)


def _sub(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    return _minus(write, _dtype(eqn.outvars[0]), a, b)


def _div(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    if is_float(dtype):
        return write.binary("fdiv", dtype, a, b)
    if dtype.kind == "u":
        zero, safe = _safe_unsigned(write, dtype, b)
        return write.select(
            zero, known(np.iinfo(dtype).max, dtype), write.binary("udiv", dtype, a, safe), dtype
        )
    if b.known is not None and b.known not in (0, -1):
        return write.binary("sdiv", dtype, a, b)
    # XLA: x / 0 is -1, and the smallest number divided by -1 is itself.
    zero, minus, safe = _safe_divisor(write, dtype, b)
    quotient = write.select(minus, _negative(write, dtype, a), write.binary("sdiv", dtype, a, safe), dtype)
    return write.select(zero, known(-1, dtype), quotient, dtype)


def _rem(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    if is_float(dtype):
        return write.function("fmod", dtype, a, b)
    if dtype.kind == "u":
        zero, safe = _safe_unsigned(write, dtype, b)
        return write.select(zero, a, write.binary("urem", dtype, a, safe), dtype)
    if b.known is not None and b.known not in (0, -1):
        return write.binary("srem", dtype, a, b)
    # XLA: x % 0 is x.
    zero, minus, safe = _safe_divisor(write, dtype, b)
    rest = write.select(minus, known(0, dtype), write.binary("srem", dtype, a, safe), dtype)
    return write.select(zero, a, rest, dtype)


def _safe_unsigned(write: Writer, dtype: np.dtype, b: Cell) -> tuple[Cell, Cell]:
    zero = write.compare("eq", dtype, b, known(0, dtype))
    return zero, write.select(zero, known(1, dtype), b, dtype)


def _safe_divisor(write: Writer, dtype: np.dtype, b: Cell) -> tuple[Cell, Cell, Cell]:
    zero = write.compare("eq", dtype, b, known(0, dtype))
    minus = write.compare("eq", dtype, b, known(-1, dtype))
    return zero, minus, write.select(write.binary("or", BOOL, zero, minus), known(1, dtype), b, dtype)


def _negative(write: Writer, dtype: np.dtype, a: Cell) -> Cell:
    return write.negate(a, dtype) if is_float(dtype) else write.binary("sub", dtype, known(0, dtype), a)


def _neg(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    return _negative(write, _dtype(eqn.outvars[0]), a)


def _abs(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    if is_float(dtype):
        return write.intrinsic("fabs", dtype, a)
    if dtype.kind == "u":
        return a
    return write.select(write.compare("lt", dtype, a, known(0, dtype)), _negative(write, dtype, a), a, dtype)


def _sign(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    zero, one = known(0, dtype), known(1, dtype)
    if is_float(dtype):  # zeros and NaN are their own sign
        a = write.value(a, dtype)
        return write.select(_nonzero(write, dtype, a), write.intrinsic("copysign", dtype, one, a), a, dtype)
    positive = write.select(write.compare("gt", dtype, a, zero), one, zero, dtype)
    if dtype.kind == "u":
        return positive
    return write.select(write.compare("lt", dtype, a, zero), known(-1, dtype), positive, dtype)


def _nonzero(write: Writer, dtype: np.dtype, a: Cell) -> Cell:
    """Ordered and not zero."""
    zero = known(0, dtype)
    return write.binary("or", BOOL, write.compare("lt", dtype, a, zero), write.compare("gt", dtype, a, zero))


def _intrinsic(name: str) -> Any:
    return lambda write, eqn, a: write.intrinsic(name, _dtype(eqn.outvars[0]), a)


def _function(name: str) -> Any:
    return lambda write, eqn, *cells: write.function(name, _dtype(eqn.outvars[0]), *cells)


def _round(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    away = eqn.params["rounding_method"] == lax.RoundingMethod.AWAY_FROM_ZERO
    return write.intrinsic("round" if away else "roundeven", _dtype(eqn.outvars[0]), a)


def _rsqrt(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    return write.binary("fdiv", dtype, known(1, dtype), write.intrinsic("sqrt", dtype, a))


def _logistic(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    tail = write.function("exp", dtype, write.negate(a, dtype))
    return write.binary("fdiv", dtype, known(1, dtype), write.binary("fadd", dtype, tail, known(1, dtype)))


def _square(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    return _times(write, dtype, a, a)


def _one_minus_square(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    """(1 + x)(1 - x), exact to rounding near 1, as JAX says."""
    dtype = _dtype(eqn.outvars[0])
    one = known(1, dtype)
    if is_float(dtype):
        return _times(write, dtype, write.add(dtype, one, a), write.add(dtype, one, a, minus=True))
    return _times(write, dtype, write.binary("add", dtype, one, a), write.binary("sub", dtype, one, a))


def _polynomial(write: Writer, eqn: JaxprEqn, x: Cell, *coefficients: Cell) -> Cell:
    """Horner's rule; coefficients from the lowest degree."""
    dtype = _dtype(eqn.outvars[0])
    x = write.value(x, dtype)
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        if is_float(dtype):
            total = write.add(dtype, coefficient, write.multiply(dtype, total, x))
        else:
            total = write.binary("add", dtype, coefficient, _times(write, dtype, total, x))
    return total


def _integer_pow(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    """By repeated squaring; negative powers are reciprocals of positive ones."""
    dtype, power = _dtype(eqn.outvars[0]), eqn.params["y"]
    if not is_float(dtype) and power < 0:
        raise Unsupported("integer_pow of an integer to a negative power")
    rest, base, total = abs(power), a, None
    while rest:
        if rest & 1:
            total = base if total is None else _times(write, dtype, total, base)
        rest >>= 1
        base = _times(write, dtype, base, base) if rest else base
    total = known(1, dtype) if total is None else total
    return write.binary("fdiv", dtype, known(1, dtype), total) if power < 0 else total


def _pow(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    if not is_float(dtype):
        raise Unsupported("pow of integers")
    return write.function("pow", dtype, a, write.convert(b, _dtype(eqn.invars[1]), dtype))


def _compare(name: str) -> Any:
    return lambda write, eqn, a, b: write.compare(name, _dtype(eqn.invars[0]), a, b)


def _total_order(name: str) -> Any:
    """Comparison of floats by their bits: -NaN < -inf < ... < -0 < 0 < ... < inf < NaN. Integers compare as ever."""

    def rule(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
        dtype = _dtype(eqn.invars[0])
        if not is_float(dtype):
            return write.compare(name, dtype, a, b)
        bits = np.dtype(f"int{8 * dtype.itemsize}")
        keys = []
        for cell in (a, b):
            number = write.reinterpret(cell, dtype, bits)
            sign = write.binary("ashr", bits, number, known(8 * dtype.itemsize - 1, bits))
            rest = write.binary("lshr", bits, sign, known(1, bits))
            keys.append(write.binary("xor", bits, number, rest))
        return write.compare(name, bits, *keys)

    return rule


def _logic(name: str) -> Any:
    return lambda write, eqn, a, b: write.binary(name, _dtype(eqn.outvars[0]), a, b)


def _not(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    return write.binary("xor", dtype, a, known(True if dtype == BOOL else -1, dtype))


def _shift(name: str) -> Any:
    """Shifts by the width or more give 0, or the sign everywhere."""

    def rule(write: Writer, eqn: JaxprEqn, a: Cell, b: Cell) -> Cell:
        dtype = _dtype(eqn.outvars[0])
        bits = 8 * dtype.itemsize
        if b.known is None:
            b = write.value(b, dtype)
            low = write.compare("ge", dtype, b, known(0, dtype))
            inside = write.binary("and", BOOL, low, write.compare("lt", dtype, b, known(bits, dtype)))
            safe = write.select(inside, b, known(bits - 1, dtype), dtype)
            shifted = write.binary(name, dtype, a, safe)
            return shifted if name == "ashr" else write.select(inside, shifted, known(0, dtype), dtype)
        if not 0 <= b.known < bits:
            return (
                write.binary("ashr", dtype, a, known(bits - 1, dtype)) if name == "ashr" else known(0, dtype)
            )
        return write.binary(name, dtype, a, b)

    return rule


def _select_n(write: Writer, eqn: JaxprEqn, which: Cell, *cases: Cell) -> Cell:
    dtype, index = _dtype(eqn.outvars[0]), _dtype(eqn.invars[0])
    if index == BOOL:
        return write.select(write.value(which, BOOL), cases[-1], cases[0], dtype)
    out = cases[-1]
    for i in reversed(range(len(cases) - 1)):
        below = write.compare("le", index, which, known(i, index))
        out = write.select(below, cases[i], out, dtype)
    return out


def _clamp(write: Writer, eqn: JaxprEqn, low: Cell, a: Cell, high: Cell) -> Cell:
    dtype = _dtype(eqn.outvars[0])
    return write.extreme(False, dtype, write.extreme(True, dtype, a, low), high)


def _bitcast(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    before, after = _dtype(eqn.invars[0]), _dtype(eqn.outvars[0])
    if before.itemsize != after.itemsize or BOOL in (before, after):
        raise Unsupported("bitcast_convert_type between widths")
    return write.reinterpret(a, before, after)


def _is_finite(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    dtype = _dtype(eqn.invars[0])
    return write.compare("lt", dtype, write.intrinsic("fabs", dtype, a), known(np.inf, dtype))


def _convert(write: Writer, eqn: JaxprEqn, a: Cell) -> Cell:
    return write.convert(a, _dtype(eqn.invars[0]), _dtype(eqn.outvars[0]))


def _quotient(a: int, b: int) -> int:
    """Rounded towards zero; by zero it is -1, as XLA says."""
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


_FOLD: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum, "neg": np.negative,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "sign": np.sign, "abs": np.abs,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "convert_element_type": lambda x: x, "select_n": lambda which, *cases: cases[int(which)],
    "div": lambda a, b: _quotient(int(a), int(b)), "rem": lambda a, b: np.fmod(a, b) if b else a,
}  # fmt: skip

_SCALAR: dict[str, Callable[..., Cell]] = {
    "add": _add, "add_any": _add_any, "sub": _sub, "mul": _arithmetic("fmul", "mul"), "div": _div, "rem": _rem,
    "neg": _neg, "abs": _abs, "sign": _sign, "square": _square, "integer_pow": _integer_pow, "pow": _pow,
    "max": lambda write, eqn, a, b: write.extreme(True, _dtype(eqn.outvars[0]), a, b),
    "min": lambda write, eqn, a, b: write.extreme(False, _dtype(eqn.outvars[0]), a, b),
    "clamp": _clamp, "is_finite": _is_finite, "select_n": _select_n, "convert_element_type": _convert,
    "sqrt": _intrinsic("sqrt"), "floor": _intrinsic("floor"), "ceil": _intrinsic("ceil"), "round": _round,
    "bitcast_convert_type": _bitcast, "one_minus_square": _one_minus_square, "polynomial": _polynomial,
    "rsqrt": _rsqrt, "logistic": _logistic,
    "and": _logic("and"), "or": _logic("or"), "xor": _logic("xor"), "not": _not,
    "shift_left": _shift("shl"), "shift_right_logical": _shift("lshr"), "shift_right_arithmetic": _shift("ashr"),
}  # fmt: skip
_SCALAR |= {f"{name}_to": _total_order(name) for name in ("eq", "lt", "le")}
_SCALAR |= {name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_SCALAR |= {
    name: _function(name)
    for name in (
        "exp", "exp2", "log", "log1p", "expm1", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh",
        "asinh", "acosh", "atanh", "erf", "erfc", "cbrt", "atan2",
    )
}  # fmt: skip

_RULES: dict[str, Callable[..., Any]] = {
    "new_ref": _new_ref, "ref": _new_ref, "get": _get, "swap": _swap,
    "broadcast_in_dim": _broadcast_in_dim, "reshape": _reshape, "squeeze": _reshape, "expand_dims": _reshape,
    "transpose": _transpose, "slice": _slice, "concatenate": _concatenate, "pad": _pad, "iota": _iota,
    "rev": lambda e, eqn, a: np.flip(a, _axes(eqn.params["dimensions"], _aval(eqn.invars[0]).shape)),
    "split": _split_rule, "stack": _stack, "unstack": _unstack,
    "tile": lambda e, eqn, a: np.tile(a, _without(eqn.params["reps"], _aval(eqn.invars[0]).shape)),
    "reduce_sum": _reduction("sum", _sum, lambda dtype: 0), "reduce_prod": _reduction("product", _times, lambda dtype: 1),
    "reduce_max": _reduction("maximum", _largest, _bound(-1)), "reduce_min": _reduction("minimum", _smallest, _bound(1)),
    "reduce_or": _reduction("maximum", _bits("or"), lambda dtype: 0),
    "reduce_and": _reduction("minimum", _bits("and"), lambda dtype: True if dtype == BOOL else -1),
    "cumsum": _cumulative(_sum), "cumprod": _cumulative(_times),
    "cummax": _cumulative(_largest), "cummin": _cumulative(_smallest),
    "argmax": _arg_extreme(True), "argmin": _arg_extreme(False),
    "dot_general": _dot_general, "dynamic_slice": _dynamic_slice, "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather, "scatter": _scatter(lambda write, dtype, old, new: new), "scatter-add": _scatter(_sum),
    "scatter-mul": _scatter(_times), "scatter-max": _scatter(_largest), "scatter-min": _scatter(_smallest),
    "scatter-sub": _scatter(lambda write, dtype, old, new: _minus(write, dtype, old, new)),
    "empty": _empty, "empty2": _empty,
    "while": _while, "cond": _cond, "scan": _scan,
}  # fmt: skip
