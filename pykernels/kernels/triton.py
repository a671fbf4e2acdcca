"""The GPU runner of step kernels: hand-written Triton (`triton_kernels.py`), one program per block of columns of a row.

Two ways into a program, behind `_call`: jax-triton's `triton_call` where jax-triton works with this JAX, else Triton's own
compiler and `launch.py`. Both end in the CUDA plugin's `triton_kernel_call`. Sums over columns are a number per program,
which XLA adds: always in the same order.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pykernels.kernels.launch import Image, capability, launch
from pykernels.kernels.passes import Accept, Combine, Finish, Kind, Pass, Restore, Save, shape_of, structs_of

# Columns per program, and its threads: two or four vector accesses of 16 bytes per thread and array.
BLOCK, WARPS = 1024, 4
# Most pointers of a kernel (`triton_kernels.py`).
PLACES = {Combine: 20, Finish: 20, Accept: 20, Save: 4, Restore: 3}
# PTX that drivers from CUDA 12.0 on take.
_PTX_VERSION = 80
_TYPES = {"float32": "*fp32", "float64": "*fp64", "int32": "*i32", "bool": "*i1"}


def obstacle(pass_: Pass, rows: int, columns: int) -> str | None:
    """Why this runner does not run a pass, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install pykernels[cuda]"
    if pass_.dtype.name not in ("float32", "float64"):
        return f"no step kernels for {pass_.dtype}"
    if rows * columns == 0 or any(b.kind == Kind.SLOTS and b.slots == 0 for b in pass_.operands):
        return "nothing to do"
    if len(pass_.operands) + len(pass_.results) > PLACES[type(pass_)]:
        return f"more than {PLACES[type(pass_)]} arrays in one pass"
    if rows * _blocks(columns) >= 1 << 31:
        return "more blocks than a GPU can count"
    return None


def worthwhile(pass_: Pass, rows: int, columns: int) -> bool:
    """Whether a kernel is faster than what XLA makes of the pass: it reads and writes no array twice, whatever the size."""
    return True


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def run(pass_: Pass, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Run a pass without an `obstacle`: operands and results as it lists them."""
    rows, columns = shape_of(pass_, operands)
    given = [
        jnp.broadcast_to(x, b.shape(rows, columns)) for x, b in zip(operands, pass_.operands, strict=True)
    ]
    results = structs_of(pass_.results, rows, columns)
    sums = [i for i, buffer in enumerate(pass_.results) if buffer.kind == Kind.SUM]
    for i in sums:
        results[i] = jax.ShapeDtypeStruct((rows, _blocks(columns)), pass_.dtype)
    outs = _call(pass_, given, results, rows, columns)
    return [jnp.sum(out, axis=1) if i in sums else out for i, out in enumerate(outs)]


def _call(
    pass_: Pass,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    rows: int,
    columns: int,
) -> list[jax.Array]:
    grid, through = rows * _blocks(columns), jax_triton()
    if through is None:
        image = compiled(pass_, rows, columns, capability())
        return launch(image, operands, results, grid, [], in_place=pass_.in_place)
    name, constants = kernel_of(pass_, rows, columns)
    outs = through.triton_call(
        *operands,
        kernel=_function(name),
        out_shape=list(results),
        grid=grid,
        num_warps=WARPS,
        input_output_aliases=pass_.in_place,
        compute_capability=capability(),
        **constants,
    )
    return list(outs)


@functools.cache
def jax_triton() -> ModuleType | None:
    """jax-triton, None where it is not installed or does not work: without a CUDA plugin, and with JAX from 0.11 on (its
    0.4.1 does not lower under JAX 0.12)."""
    version = tuple(int(part) for part in importlib.metadata.version("jax").split(".")[:2])
    if version >= (0, 11) or importlib.util.find_spec("jax_triton") is None:
        return None
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    except ImportError:  # no CUDA plugin
        return None
    finally:
        # It empties the variable, which would break everybody else's use of Triton in this process.
        if before is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = before
    return jax_triton


def _function(name: str) -> Any:
    from pykernels.kernels import triton_kernels

    return getattr(triton_kernels, name)


def kernel_of(pass_: Pass, rows: int, columns: int) -> tuple[str, dict[str, Any]]:
    """The name of a pass's kernel, and its constants."""
    size = {"ROWS": rows, "COLUMNS": columns, "BLOCK": BLOCK}
    match pass_:
        case Combine():
            plain, scaled = (
                tuple(x for row in matrix for x in row) for matrix in (pass_.plain, pass_.scaled)
            )
            found = {"PLAIN": plain, "SCALED": scaled, "COUNT": pass_.count, "OUTPUTS": len(pass_.plain)}
        case Finish():
            found = {
                "WEIGHTS": pass_.weights, "ERRORS": pass_.error_weights, "COUNT": len(pass_.error_weights),
                "RTOL": pass_.rtol, "ATOL": pass_.atol,
                "GIVEN": pass_.given, "PARTIAL": pass_.partial, "SLOTS": pass_.slots or 0,
            }  # fmt: skip
        case Accept():
            found = {"COUNT": pass_.count}
        case Save() | Restore():
            found = {"SLOTS": pass_.slots}
        case _:
            raise TypeError(f"no pass: {pass_!r}")
    used = len(pass_.operands) + len(pass_.results)
    unused = {f"p{i}": None for i in range(used, PLACES[type(pass_)])}
    return type(pass_).__name__.lower(), {**size, **found, **unused}


@functools.lru_cache(maxsize=256)
def compiled(pass_: Pass, rows: int, columns: int, capability: int) -> Image:
    """PTX of a pass without an `obstacle`, by Triton's own compiler, which caches it on disk."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, constants = kernel_of(pass_, rows, columns)
    function = _function(name)
    buffers = [*pass_.operands, *pass_.results]
    types = {f"p{i}": _TYPES[np.dtype(b.dtype).name] for i, b in enumerate(buffers)}
    # XLA's buffers begin at multiples of 256 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(buffers))}
    signature = {n: types.get(n, "constexpr") for n in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
    if capability <= 90:
        options["ptx_version"] = _PTX_VERSION
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = kernel.metadata
    # Triton asks for an architecture's own extensions (sm_90a), of which nothing is used here.
    ptx = kernel.asm["ptx"].replace(f".target sm_{capability}a", f".target sm_{capability}")
    return Image(metadata.name, ptx, capability, metadata.num_warps, metadata.shared)
