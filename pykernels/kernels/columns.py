"""The native CPU runner of step kernels: vector code over pieces of rows, on XLA's own threads, one pass over memory each.

The columns of a vector are the emitter's lanes; the loop over a piece's vectors is the body's. Kernels are named, carried
and compiled as whole solves are (`cpu.py`); `csrc/passes.cc` cuts rows into pieces and adds their sums, in an order that
depends on the shapes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pykernels.kernels import cpu, identity, ir, llvm, native
from pykernels.kernels.cpu import Source
from pykernels.kernels.ir import Argument, Target
from pykernels.kernels.native import Part, Strip
from pykernels.kernels.passes import Buffer, Kind, Pass, shape_of, structs_of

# Vector registers that a body takes at a time: longer bursts from each of the arrays it reads, and less of the loop itself.
REGISTERS = 4
# Columns of a piece: a task for a thread.
PIECE_BYTES = 64 * 1024
# Bytes of a pass's operands and results above which its kernel is worth a call of its own, and above which results are
# written past the caches, where the next pass would not find them anyway; and bytes of a row above which it does not matter
# that a last vector is copied. Measured with bench/step_kernels.py (--sizes for the first and the last).
SMALL_BYTES = 256 * 1024
STREAMED_BYTES = 8 * 1024 * 1024
LONG_ROW_BYTES = 8 * 1024
# What the emitter is told of a piece's vectors; it does not look.
_VECTORS = 16
_SUPPORTED = ("float32", "float64")


def obstacle(pass_: Pass, rows: int, columns: int) -> str | None:
    """Why this runner does not run a pass, or None."""
    reason = cpu.unavailable()
    if reason is not None:
        return reason
    if pass_.dtype.name not in _SUPPORTED:
        return f"no native code for {pass_.dtype}"
    if any(b.kind == Kind.SLOTS and b.slots == 0 for b in pass_.operands):
        return "there are no slots"
    found = source_of(pass_, False)
    return f"no native code for {found}" if isinstance(found, str) else None


def worthwhile(pass_: Pass, rows: int, columns: int) -> bool:
    """Whether a kernel is faster than what XLA makes of the pass, which is at its best in the caches, where it may also be
    fused with the field, and does not mind what length rows have."""
    vectors, rest = divmod(columns, width(pass_))
    long = columns * pass_.dtype.itemsize >= LONG_ROW_BYTES or (vectors >= 2 and rest == 0)
    return long and _bytes(pass_, rows, columns) >= SMALL_BYTES


def _bytes(pass_: Pass, rows: int, columns: int) -> int:
    states = sum(b.kind in (Kind.STATE, Kind.SLOTS) for b in (*pass_.operands, *pass_.results))
    return states * rows * columns * pass_.dtype.itemsize


def width(pass_: Pass) -> int:
    """Columns per vector."""
    return REGISTERS * cpu.machine().vector_bytes // pass_.dtype.itemsize


def run(pass_: Pass, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Run a pass without an `obstacle`: operands and results as it lists them."""
    rows, columns = shape_of(pass_, operands)
    plain = source_of(pass_, False)
    streamed = source_of(pass_, True) if _bytes(pass_, rows, columns) >= STREAMED_BYTES else Source("", "")
    assert isinstance(plain, Source) and isinstance(streamed, Source)
    cpu.register()
    for source in (plain, streamed):
        if source.key:
            cpu.compiler.prepare(source)
    call = jax.ffi.ffi_call(
        native.PASS_TARGET,
        structs_of(pass_.results, rows, columns),
        input_output_aliases=pass_.in_place,
    )
    given = [
        jnp.broadcast_to(x, b.shape(rows, columns)) for x, b in zip(operands, pass_.operands, strict=True)
    ]
    return list(
        call(
            *given,
            key=plain.key,
            ir=plain.payload,
            streaming_key=streamed.key,
            streaming_ir=streamed.payload,
            rows=np.int64(rows),
            columns=np.int64(columns),
            width=np.int64(width(pass_)),
            piece=np.int64(PIECE_BYTES // pass_.dtype.itemsize),
            layout=np.array(layout_of(pass_), np.int64).reshape(-1),
        )
    )


def uninitialized(shape: tuple[int, ...], dtype: np.dtype, number: int) -> jax.Array:
    """Memory as XLA gives it."""
    cpu.register()
    call = jax.ffi.ffi_call(native.BUFFER_TARGET, jax.ShapeDtypeStruct(shape, dtype))
    return call(number=np.int64(number))


def standalone(
    pass_: Pass, rows: int, columns: int
) -> Callable[[Sequence[np.ndarray], int], list[np.ndarray]]:
    """A pass without XLA: a function of its operands and a number of threads. For tests and benchmarks."""
    source, library = source_of(pass_, False), native.load()
    assert isinstance(source, Source) and library is not None
    engine = cpu.link(cpu.compile_object(source.payload.encode(), cpu.machine()))

    def run(operands: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
        arrays = [np.ascontiguousarray(x) for x in operands]
        results = [np.empty(s.shape, s.dtype) for s in structs_of(pass_.results, rows, columns)]
        for operand, result in pass_.in_place.items():
            results[result][...] = arrays[operand]
        library.run_pass(
            engine.get_function_address("kernel"),  # asked here: the code lives as long as its engine
            (rows, columns),
            width(pass_),
            PIECE_BYTES // pass_.dtype.itemsize,
            layout_of(pass_),
            [array.ctypes.data for array in (*arrays, *results)],
            threads,
        )
        return results

    return run


def layout_of(pass_: Pass) -> list[Strip]:
    """The custom call's view of a pass's buffers."""

    def strip(buffer: Buffer, state: Part, slots: Part, extra: int) -> Strip:
        item = buffer.dtype.itemsize
        match buffer.kind:
            case Kind.STATE:
                return Strip(state, item, 0, extra)
            case Kind.SLOTS:
                return Strip(slots, item, buffer.slots, buffer.slot)
            case Kind.ROW:
                return Strip(Part.ROW, item)
            case Kind.SUM:
                return Strip(Part.SUM, item, 0, native.SUM_DTYPES[buffer.dtype.name])

    out = []
    for i, buffer in enumerate(pass_.operands):
        if i in pass_.in_place:
            out.append(strip(buffer, Part.REPLACED, Part.REPLACED, 0))
        else:
            out.append(strip(buffer, Part.REPEATED if buffer.repeats else Part.STATE, Part.SLOTS, 0))
    replacing = set(pass_.in_place.values())
    return out + [
        strip(b, Part.RESULT, Part.SLOTS_RESULT, int(i in replacing)) for i, b in enumerate(pass_.results)
    ]


@functools.lru_cache(maxsize=256)
def source_of(pass_: Pass, streaming: bool) -> Source | str:
    """A pass's source, or what has no native code. A later process that asks for the same pass finds it on disk."""
    size, fma = width(pass_), cpu.machine().fma
    name = identity.digest(("pass", pass_, size, fma, streaming))
    stored = None if name is None else cpu.compiler.cache.read(name)
    if stored is not None:
        return Source(*stored.decode().split("\n"))

    def argument(buffer: Buffer, result: bool) -> Argument:
        has_columns = buffer.kind in (Kind.STATE, Kind.SLOTS)
        shape = (_VECTORS,) if has_columns else ()
        past = streaming and result and has_columns and not pass_.rewrites
        return Argument(shape, buffer.dtype, has_columns, constant=not result, streaming=past)

    read = [b for i, b in enumerate(pass_.operands) if i not in pass_.in_place]
    arguments = [
        Argument((), np.dtype(np.int32), False, constant=True),
        *[argument(b, False) for b in read],
        *[argument(b, True) for b in pass_.results],
    ]
    try:
        program = llvm.emit(pass_.body, arguments, Target(size, fma))
    except ir.Unsupported as reason:
        return str(reason)
    source = cpu.pack(program, size)
    if name is not None:
        cpu.compiler.cache.write(name, f"{source.key}\n{source.payload}".encode())
    return source
