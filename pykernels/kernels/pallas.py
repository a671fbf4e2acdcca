"""The Pallas runner: the bodies as Pallas kernels on its Triton backend, for NVIDIA GPUs. Only this file imports Pallas.

A block of lanes is one Triton program. Two ways to hold a field's arrays, both lifts of `lanes.py`: components, every scalar
of the state a vector of lanes in registers; and tiles, whole arrays with the lanes as last axis, shared by the block's
threads, for fields made of matrix products (neural fields), whose products with shared matrices are Triton's `dot`.

Pallas's lowering makes Triton IR of a body, a short pipeline of Triton's own passes makes PTX of that, and `launch.py` puts
it into the program. Stock Triton looks, for every load and store, at the whole slice of operations around it, to find a good
order of threads: quadratic in an unrolled step, and in a kernel of lanes, where every access is a row of them, there is
nothing to find. Without Triton, XLA compiles Pallas's own call: the same kernel, minutes instead of seconds.

The IR does not depend on the number of lanes, which is one more operand: buffers are flat, and offsets are computed here.
Division in float32 is Triton's `div.full` (2 ulp) and the square root is approximate; other functions are libdevice's.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pykernels import lanes as lifts
from pykernels.kernels import identity, rolled
from pykernels.kernels.body import Kernel
from pykernels.kernels.buffers import Buffer
from pykernels.kernels.disk import DiskCache, default_folder
from pykernels.kernels.launch import Image, capability, launch

# Lanes per program unless asked for, and threads per lane. Components: a thread per lane and one warp, so that no lane waits
# for another warp's and nothing needs a barrier. Tiles: several threads share a lane's arrays.
BLOCK, MOST_LANES = 32, 1024
THREADS = {"registers": 1, "tiles": 4}
# Triton's passes are called one by one, which is no public interface: versions that this was tested with.
TRITON_VERSIONS = ("3.9",)
# Beyond this many equations in a body, compilation takes minutes.
MOST_EQUATIONS = 40_000
# In Pallas's table of rules, but not for blocks of values.
_UNUSABLE = frozenset(
    {"concatenate", "split", "stack", "unstack", "scan", "cumsum", "argmax", "argmin", "debug_print"}
)
# PTX that drivers from CUDA 12.0 on take.
_PTX_VERSION = 80
# Entries of the disk cache are valid for one format of this file.
_FORMAT = 1


def unavailable() -> str | None:
    """Why there is no Pallas runner in this process, or None."""
    return None if _has_pallas() else "this JAX has no Pallas for Triton"


@functools.cache
def _has_pallas() -> bool:
    try:
        return importlib.util.find_spec("jax._src.pallas.triton.lowering") is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def without_triton() -> str | None:
    """Why the short pipeline is not there, and XLA's own compiles the kernels (minutes for a dozen states); or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install pykernels[cuda]"
    version = importlib.metadata.version("triton")
    if version.rpartition(".")[0] not in TRITON_VERSIONS:
        return f"triton {version} is not one of the supported {', '.join(TRITON_VERSIONS)}"
    return None


def kind_of(kernel: Kernel) -> str:
    """How a kernel holds its arrays: "tiles" where the field is made of products with shared matrices, else "registers"."""
    return "registers" if lifts.tile_obstacle(kernel.solve.field.jaxpr, _field_lanes(kernel)) else "tiles"


def _field_lanes(kernel: Kernel) -> tuple[bool, ...]:
    """Which inputs of the field have lanes: time and state always."""
    solve = kernel.solve
    return (*(True,) * (1 + len(solve.field.y_shapes)), *solve.lane[solve.first_operand :])


def lifted(kernel: Kernel) -> Kernel:
    """A kernel with the lift that is taken here."""
    solve = dataclasses.replace(kernel.solve, kind=kind_of(kernel), rolled=rolled.pays(kernel.solve))
    return dataclasses.replace(kernel, solve=solve)


def block_size(kernel: Kernel) -> int:
    """Lanes per program: a power of two, a warp or more."""
    wanted = min(kernel.solve.block or BLOCK, MOST_LANES // THREADS[kind_of(kernel)])
    return max(1 << (wanted - 1).bit_length(), BLOCK)


def warps(kernel: Kernel) -> int:
    """Warps per program."""
    return block_size(kernel) * THREADS[kind_of(kernel)] // 32


def preferred(kernel: Kernel) -> str | None:
    """Why this runner is the better one for a kernel, or None: products of matrices want many threads per lane."""
    if without_triton() is None and kind_of(kernel) == "tiles":
        return "products with shared matrices, on tiles"
    return None


def obstacle(kernel: Kernel, lanes: int) -> str | None:
    """Why this runner does not run a kernel, or None. Decided from the traced body."""
    reason = unavailable()
    if reason is None and kernel.solve.runner != "pallas":
        # Nobody should wait minutes who has not asked for it.
        reason = without_triton()
    if reason is not None:
        return reason
    kernel = lifted(kernel)
    if kernel.solve.kind == "registers":
        reason = lifts.component_obstacle(kernel.solve.field.jaxpr, _field_lanes(kernel))
        if reason is not None:
            return reason
    largest = max(math.prod(b.shape) for b in (*kernel.operands, *kernel.results, *kernel.scratch))
    if largest * (lanes + MOST_LANES) >= 1 << 31:
        return f"{lanes} lanes of {largest} elements are too many for 32 bits: solve fewer at a time"
    if _stored(kernel, capability()) is not None:
        return None
    (equation,) = traced(kernel).eqns
    return _unsupported(equation.params["jaxpr"])


def _unsupported(jaxpr: Any) -> str | None:
    """What Pallas has no Triton lowering for, in a kernel's jaxpr; or None."""
    from jax._src.pallas.triton.lowering import triton_lowering_rules

    known = {primitive.name for primitive in triton_lowering_rules} - _UNUSABLE
    count = 0
    for equation in _equations(jaxpr):
        count += 1
        name = equation.primitive.name
        if name not in known:
            return f"Pallas has no Triton lowering of {name}"
        if name == "select_n" and len(equation.invars) > 3:
            return "Pallas has no Triton lowering of a selection among more than two"
        for out in equation.outvars:
            shape = getattr(out.aval, "shape", ())
            if any(size & (size - 1) or size == 0 for size in shape):
                return f"Triton has no values of shape {shape}"
    return f"{count} operations are too many" if count > MOST_EQUATIONS else None


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def run(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    """Run a kernel without an `obstacle` over an ensemble; as `xla.run`."""
    results = kernel.results
    if lanes == 0:
        return [jnp.zeros((*b.shape, 0) if b.lanes else b.shape, b.dtype) for b in results]
    kernel = lifted(kernel)
    blocks = -(-lanes // block_size(kernel))
    types = [
        jax.ShapeDtypeStruct((math.prod(b.shape) * (lanes if b.lanes else blocks),), b.dtype)
        for b in (*kernel.results, *kernel.scratch)
    ]
    flat = [jnp.full((1,), lanes, jnp.int32), *[operand.reshape(-1) for operand in operands]]
    flat += [jnp.asarray(table) for table in kernel.tables]
    if without_triton() is None:
        outputs = launch(compiled(kernel, capability()), flat, types, blocks, [])
    else:
        with _without_deprecation():
            outputs = _pallas_call(kernel, types, blocks)(*flat)
    return [
        value.reshape(*b.shape, lanes) if b.lanes else jnp.sum(value.reshape(blocks, *b.shape), axis=0)
        for value, b in zip(outputs, results, strict=False)
    ]


# A kernel over flat buffers.


@dataclass(frozen=True)
class _Lanes:
    """The lanes of one program: how many there are in all, this block's numbers, and which of them exist."""

    count: Any
    numbers: Any
    inside: Any


class _Ref:
    """A kernel's view of a flat buffer, indexed as the bodies do: `ref[row, i, :]`, `ref[...]`, `ref[row]`.

    Elements lie in order, each followed by its lanes; `lanes` None: without lanes, beginning at element `start`. `fenced`: a
    thread may read what another one of the block has written, so there are barriers around every access.
    """

    def __init__(
        self,
        flat: Any,
        buffer: Buffer,
        lanes: _Lanes | None,
        *,
        start: Any = 0,
        fenced: bool = False,
    ) -> None:
        self.flat, self.buffer, self.lanes, self.start, self.fenced = flat, buffer, lanes, start, fenced
        self.shape = (*buffer.shape, *lanes.inside.shape) if lanes is not None else buffer.shape
        self.dtype = np.dtype(buffer.dtype)

    def __getitem__(self, index: Any) -> Any:
        from jax.experimental.pallas import triton as plgpu

        offsets, inside = self._place(index)
        other = None if inside is None else jnp.zeros((), self.dtype)
        self._fence()
        return plgpu.load(self.flat.at[offsets], mask=inside, other=other)

    def __setitem__(self, index: Any, value: Any) -> None:
        from jax.experimental.pallas import triton as plgpu

        offsets, inside = self._place(index)
        value = jnp.broadcast_to(jnp.asarray(value, self.dtype), np.shape(offsets))
        self._fence()
        plgpu.store(self.flat.at[offsets], value, mask=inside)

    def merge(self, index: Any, mask: Any, value: Any) -> None:
        """`ref[index] = value` in the lanes of the mask."""
        from jax.experimental.pallas import triton as plgpu

        offsets, inside = self._place(index)
        value, mask = (jnp.broadcast_to(x, offsets.shape) for x in (value, mask))
        self._fence()
        plgpu.store(self.flat.at[offsets], value, mask=inside & mask)

    def _fence(self) -> None:
        from jax.experimental.pallas import triton as plgpu

        if self.fenced:
            plgpu.debug_barrier()

    def _place(self, index: Any) -> tuple[Any, Any]:
        """Offsets of the elements under an index, and which of them exist (None: all)."""
        leading = [i for i in (index if isinstance(index, tuple) else (index,)) if not _is_whole(i)]
        shape = self.buffer.shape
        rest = shape[len(leading) :]
        element = self.start
        for i, stride in zip(leading, _strides(shape), strict=False):
            element = (
                element + (np.int32(i) if isinstance(i, (int, np.integer)) else i.astype(jnp.int32)) * stride
            )
        tile = (*rest, *self.lanes.inside.shape) if self.lanes is not None else rest
        for axis, stride in enumerate(_strides(rest)):
            element = element + lax.broadcasted_iota(jnp.int32, tile, axis) * stride
        if self.lanes is None:
            return jnp.asarray(element, jnp.int32), None
        numbers, inside = (
            lax.broadcast_in_dim(v, tile, (len(tile) - 1,)) for v in (self.lanes.numbers, self.lanes.inside)
        )
        return numbers + element * self.lanes.count, inside


def _is_whole(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


def _strides(shape: Sequence[int]) -> list[np.int32]:
    return [np.int32(math.prod(shape[i + 1 :])) for i in range(len(shape))]


def _pallas_call(kernel: Kernel, types: Sequence[jax.ShapeDtypeStruct], blocks: int) -> Callable[..., Any]:
    """The kernel as a function of the number of lanes, in an array, and flat operands."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    operands, written = kernel.operands, [*kernel.results, *kernel.scratch]
    size, fenced = block_size(kernel), warps(kernel) > 1

    def entry(count_ref: Any, *refs: Any) -> None:
        program = pl.program_id(0).astype(jnp.int32)
        count = count_ref[0]
        numbers = program * np.int32(size) + lax.iota(jnp.int32, size)
        lanes = _Lanes(count, numbers, numbers < count)
        views = [_Ref(r, b, lanes if b.lanes else None) for r, b in zip(refs, operands, strict=False)]
        for ref, b in zip(refs[len(operands) :], written, strict=True):
            start = np.int32(0) if b.lanes else program * np.int32(math.prod(b.shape))
            views.append(_Ref(ref, b, lanes if b.lanes else None, start=start, fenced=fenced))
        kernel.body(*views)

    entry.__name__ = name_of(kernel)
    parameters = plgpu.CompilerParams(num_warps=warps(kernel), num_stages=1)
    return pl.pallas_call(entry, out_shape=list(types), grid=(blocks,), compiler_params=parameters)


def name_of(kernel: Kernel) -> str:
    """The entry's name."""
    return f"pykernels_pallas_{'backward' if kernel.wrt is not None else 'forward'}"


@functools.lru_cache(maxsize=64)
def traced(kernel: Kernel) -> Any:
    """The jaxpr with the `pallas_call` of a lifted kernel, for any number of lanes."""
    # Sizes say nothing here: no offset is computed from them.
    sizes = [max(math.prod(b.shape), 1) for b in (*kernel.operands, *kernel.results, *kernel.scratch)]
    structs = [
        jax.ShapeDtypeStruct((2 * size,), b.dtype)
        for size, b in zip(sizes, (*kernel.operands, *kernel.results, *kernel.scratch), strict=True)
    ]
    call = _pallas_call(kernel, structs[len(kernel.operands) :], 2)
    with _without_deprecation():
        return jax.make_jaxpr(call)(
            jax.ShapeDtypeStruct((1,), np.int32), *structs[: len(kernel.operands)]
        ).jaxpr


def triton_ir(kernel: Kernel, capability: int) -> str:
    """Pallas's Triton IR of a lifted kernel without an `obstacle`."""
    from jax._src.interpreters import mlir
    from jax._src.pallas.triton.lowering import lower_jaxpr_to_triton_module

    (equation,) = traced(kernel).eqns
    # What a lowering of a whole program would hand on: nothing in it concerns a kernel.
    context: Any = SimpleNamespace(
        platforms=("cuda",), backend=None, axis_context=None, keepalives=[], channel_iterator=itertools.count(1),
        host_callbacks=[], lowering_parameters=mlir.LoweringParameters(),
    )  # fmt: skip
    lowered = lower_jaxpr_to_triton_module(
        equation.params["jaxpr"], equation.params["grid_mapping"], "cuda", capability, mlir_ctx=context
    )
    return str(lowered.module.operation.get_asm(enable_debug_info=False))


class _without_deprecation(warnings.catch_warnings):
    """Silences the deprecation of Pallas's Triton backend, and nothing else."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")


# Triton IR to PTX.

cache = DiskCache(default_folder())
"""Where this process keeps PTX; may be replaced."""


@functools.lru_cache(maxsize=256)
def compiled(kernel: Kernel, capability: int) -> Image:
    """PTX of a lifted kernel without an `obstacle`, by the short pipeline, from the disk cache if it is there."""
    stored = _stored(kernel, capability)
    if stored is None:
        ptx, shared = short_pipeline(triton_ir(kernel, capability), capability, warps(kernel))
        name = _disk_name(kernel, capability)
        if name is not None:
            cache.write(name, f"{shared}\n{ptx}".encode())
    else:
        size, _, ptx = stored.decode().partition("\n")
        shared = int(size)
    return Image(name_of(kernel), ptx, capability, warps(kernel), shared)


def _stored(kernel: Kernel, capability: int) -> bytes | None:
    name = _disk_name(kernel, capability)
    return None if name is None or without_triton() is not None else cache.read(name)


def _disk_name(kernel: Kernel, capability: int) -> str | None:
    if without_triton() is not None:
        return None
    versions = (_FORMAT, jax.__version__, importlib.metadata.version("triton"))
    return identity.digest(("pallas", kernel, capability, versions))


def short_pipeline(text: str, capability: int, warps: int) -> tuple[str, int]:
    """PTX, and bytes of shared memory, of Triton IR.

    Of Triton's own pipeline, what is needed to be right: layouts, shared memory and its barriers, LLVM's passes. Accesses
    are not looked at, loops not pipelined, matrix products not rewritten (float32 ones stay IEEE multiply-adds).
    """
    from triton._C.libtriton import ir, llvm, nvidia, passes
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend, get_llvm_flags

    backend = CUDABackend(GPUTarget("cuda", capability, 32))
    options = backend.parse_options({"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ttir")
        with open(path, "w") as file:
            file.write(text)
        module = ir.parse_mlir_module(path, context)
    module.context = context

    layouts = ir.pass_manager(context)
    passes.common.add_canonicalizer(layouts)
    passes.ttir.add_convert_to_ttgpuir(layouts, "cuda:80", warps, 32, 1)
    if "tf32x3" in text:
        passes.ttgpuir.add_f32_dot_tc(layouts, True)
        passes.ttgpuir.add_remove_layout_conversions(layouts)
        passes.ttgpuir.add_accelerate_matmul(layouts)
        passes.ttgpuir.add_remove_layout_conversions(layouts)
        passes.ttgpuir.add_optimize_dot_operands(layouts, True)
    passes.ttgpuir.add_remove_layout_conversions(layouts)
    passes.common.add_cse(layouts)
    passes.ttir.add_triton_licm(layouts)
    passes.common.add_canonicalizer(layouts)
    passes.common.add_symbol_dce(layouts)
    layouts.run(module, "pykernels_layouts")

    lower = ir.pass_manager(context)
    passes.convert.add_scf_to_cf(lower)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(lower, capability, _PTX_VERSION)
    nvidia.passes.ttgpuir.add_membar(lower, capability, _PTX_VERSION)
    passes.ttgpuir.add_allocate_global_scratch_memory(lower)
    nvidia.passes.ttgpuir.add_to_llvmir(lower, capability, _PTX_VERSION)
    passes.ttgpuir.add_canonicalize_llvm_ir(lower)
    passes.common.add_cse(lower)
    nvidia.passes.ttnvgpuir.add_nvgpu_to_llvm(lower)
    passes.common.add_canonicalizer(lower)
    passes.common.add_cse(lower)
    passes.common.add_symbol_dce(lower)
    passes.convert.add_nvvm_to_llvm(lower)
    lower.run(module, "pykernels_llvm")
    shared = module.get_int_attr("ttg.shared") or 0

    llvm.init_targets()
    machine = ("nvptx64-nvidia-cuda", f"sm_{capability}", f"+ptx{_PTX_VERSION}", get_llvm_flags())
    code = llvm.to_module(module, llvm.context())
    llvm.attach_datalayout(code, *machine)
    if nvidia.has_extern_deps(code):
        llvm.link_extern_libs(code, [path for _, path in options.extern_libs])
    # Vectors of unrelated values (SLP) are no instructions on a GPU.
    llvm.optimize_module(code, llvm.OPTIMIZE_O1, flags=get_llvm_flags(), disable_slp_vectorizer=True)
    return llvm.translate_to_asm(str(code), *machine, True, False, False), shared
