"""The CUDA runner: kernels as PTX by the LLVM emitter, one lane per thread, each thread with its own loops.

A thread leaves its loops when its own lane is done; nothing is decided for a block of threads. Buffers with lanes keep the
lane index fastest, so that neighbouring threads touch neighbouring memory. Sums over lanes (cotangents of shared operands)
are accumulated per thread, added within each warp at the end, and the warps' sums by XLA: always in the same order.

PTX comes from LLVM's NVPTX target and NVIDIA's libdevice, which is looked for where JAX's CUDA installation or Triton
brought it; `launch.py` makes it part of a program. Division and square roots are rounded correctly; the other
functions are CUDA's (CUDA C++ Programming Guide, "Mathematical Functions", gives their errors); no fast-math is used.

PTX is kept on disk, named by what it is made from: a later process neither emits nor compiles a kernel it finds there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pykernels.kernels import identity, ir, llvm, rolled
from pykernels.kernels.body import Kernel
from pykernels.kernels.disk import DiskCache, default_folder
from pykernels.kernels.ir import Argument, Program, Target, scalar_type, warps_of
from pykernels.kernels.launch import SCRATCH_POINTERS, Image, capability, launch
from pykernels.kernels.llvm import as_native
from pykernels.lanes import operation_count

# Warps per block, forward and backward, unless asked for. A processor has registers for 64 warps of 32 each, and room for 32
# blocks: forward kernels take from 32 registers on, so two warps per block, and backward ones more than 64, so one, let as
# many warps run as the registers allow. Backward the threads of a block wait for each other between segments, which those of
# different warps need not.
WARPS, MOST_WARPS = {False: 2, True: 1}, 32
# Registers a thread may have, by bytes of a float, in kernels so small that they need no more: without the cap ptxas takes
# 150 for tsit5's backward pass of three float64 states; with it 136, and nothing spills. Larger systems and fields, methods
# of more stages, and kernels that save values or differentiate time take what they need.
SMALL_ELEMENTS, SMALL_STAGES, SMALL_OPERATIONS, REGISTERS = 3, 7, 64, {4: 80, 8: 136}
# PTX in the disk cache is valid for one format of its entries.
_FORMAT = 1
_LIBDEVICE = (
    ("triton", "backends/nvidia/lib/libdevice.10.bc"),
    ("nvidia", "cuda_nvcc/nvvm/libdevice/libdevice.10.bc"),
    ("nvidia", "cu13/nvvm/libdevice/libdevice.10.bc"),
)


@functools.cache
def libdevice() -> Path | None:
    """NVIDIA's mathematical functions as LLVM bitcode: in the triton wheel, or in those that JAX's CUDA extra brings."""
    for package, path in _LIBDEVICE:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            if (Path(folder) / path).exists():
                return Path(folder) / path
    return None


def unavailable() -> str | None:
    """Why there is no CUDA runner in this process, or None."""
    missing = None if libdevice() is not None else "libdevice is not installed: install pykernels[cuda]"
    return llvm.unavailable() or missing


def lifted(kernel: Kernel) -> Kernel:
    """A kernel with the lift that is taken here."""
    kernel = as_native(kernel)
    return dataclasses.replace(
        kernel, solve=dataclasses.replace(kernel.solve, rolled=rolled.pays(kernel.solve))
    )


def obstacle(kernel: Kernel, lanes: int) -> str | None:
    """Why this runner does not run a kernel, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    buffers = (*kernel.operands, *kernel.results, *kernel.scratch)
    largest = max(math.prod(buffer.shape) for buffer in buffers)
    if largest * lanes >= 1 << 32 or lanes >= 1 << 31:
        return f"{lanes} lanes of {largest} elements are too many for 32 bits: solve fewer at a time"
    kernel = lifted(kernel)
    if _stored(kernel, capability()) is not None:
        return None
    found = program_of(kernel)
    return f"no native code for {found}" if isinstance(found, str) else None


@functools.lru_cache(maxsize=256)
def program_of(kernel: Kernel) -> Program | str:
    """A kernel's program, or what has no native code."""
    try:
        return llvm.emit(kernel.body, arguments_of(kernel), Target(1, thread=True))
    except ir.Unsupported as reason:
        return str(reason)


def arguments_of(kernel: Kernel) -> list[Argument]:
    """The kernel's buffers, in order. Sums have one partial value per warp; what fits there lies on the threads' stacks."""
    return [
        *[Argument(b.shape, np.dtype(b.dtype), b.lanes, constant=True) for b in kernel.operands],
        *[Argument(b.shape, np.dtype(b.dtype), b.lanes, spread=not b.lanes) for b in kernel.results],
        *[Argument(b.shape, np.dtype(b.dtype), b.lanes, private=b.stack) for b in kernel.scratch],
    ]


def run(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    """Run a kernel without an `obstacle` over an ensemble; as `xla.run`."""
    results = kernel.results
    if lanes == 0:
        return [jnp.zeros((*b.shape, 0) if b.lanes else b.shape, b.dtype) for b in results]
    kernel = lifted(kernel)
    types = [
        jax.ShapeDtypeStruct((*b.shape, lanes if b.lanes else warps_of(lanes)), b.dtype)
        for b in (*results, *kernel.scratch)
        if not b.stack
    ]
    operands = [*operands, *map(jnp.asarray, kernel.tables)]
    image = compiled(kernel, capability())
    outputs = launch(image, operands, types, -(-lanes // (32 * image.warps)), [lanes])
    return [
        value if buffer.lanes else jnp.sum(value, axis=-1)
        for value, buffer in zip(outputs, results, strict=False)
    ]


cache = DiskCache(default_folder())
"""PTX that earlier processes made; may be replaced by another `DiskCache`."""


@functools.lru_cache(maxsize=256)
def compiled(kernel: Kernel, capability: int) -> Image:
    """PTX of a kernel without an `obstacle`, from the disk cache if it is there."""
    image = _stored(kernel, capability)
    if image is not None:
        return image
    program = program_of(kernel)
    assert isinstance(program, Program)
    image = _image(kernel, compile_ptx(program, kernel, capability), capability)
    name = _name_on_disk(kernel, capability)
    if name is not None:
        cache.write(name, image.ptx.encode())
    return image


def _stored(kernel: Kernel, capability: int) -> Image | None:
    """A kernel that the disk cache has."""
    name = _name_on_disk(kernel, capability)
    ptx = None if name is None else cache.read(name)
    return None if ptx is None else _image(kernel, ptx.decode(), capability)


def _image(kernel: Kernel, ptx: str, capability: int) -> Image:
    return Image(_entry_name(kernel), ptx, capability, warps(kernel))


def warps(kernel: Kernel) -> int:
    """Warps per block."""
    if kernel.solve.block:
        return min(-(-kernel.solve.block // 32), MOST_WARPS)
    return WARPS[kernel.wrt is not None]


def _entry_name(kernel: Kernel) -> str:
    return "pykernels_backward" if kernel.wrt is not None else "pykernels_forward"


@functools.lru_cache(maxsize=256)
def _name_on_disk(kernel: Kernel, capability: int) -> str | None:
    """A hash of everything a kernel's PTX depends on, None if something in it has no name. llvmlite's version is also
    LLVM's, which every build of it contains."""
    import llvmlite

    path = libdevice()
    assert path is not None
    mathematics = hashlib.sha256(path.read_bytes()).hexdigest()
    versions = (_FORMAT, llvmlite.__version__, mathematics)
    return identity.digest(("ptx", kernel, capability, _registers(kernel), versions))


def _registers(kernel: Kernel) -> int | None:
    """Most registers a thread may have, None: as many as it takes."""
    solve = kernel.solve
    small = solve.field.elements <= SMALL_ELEMENTS and solve.method.stages <= SMALL_STAGES
    small = small and operation_count(solve.field.jaxpr) <= SMALL_OPERATIONS
    plain = solve.saves is None and not any((kernel.wrt or ())[: solve.first_y])
    return REGISTERS[solve.field.dtype.itemsize] if small and plain else None


def compile_ptx(program: Program, kernel: Kernel, capability: int) -> str:
    """PTX of a kernel's program."""
    import llvmlite.binding as binding

    path = libdevice()
    assert path is not None
    name = _entry_name(kernel)
    arguments = [argument for argument in arguments_of(kernel) if not argument.private]
    _initialize()
    text = "\n".join([definitions(program), program.ir, entry(name, arguments, _registers(kernel))])
    module = binding.parse_assembly(text)
    module.triple = "nvptx64-nvidia-cuda"
    # The oldest PTX that an architecture has: drivers refuse what is newer than they are.
    features = "+ptx80" if capability <= 90 else ""
    machine = binding.Target.from_triple(module.triple).create_target_machine(
        cpu=f"sm_{capability}", features=features, opt=3
    )
    module.data_layout = str(machine.target_data)
    library = binding.parse_bitcode(path.read_bytes())
    library.triple, library.data_layout = module.triple, module.data_layout
    module.link_in(library)
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"
    llvm.optimise(module, machine)
    return machine.emit_assembly(module)


@functools.cache
def _initialize() -> None:
    import llvmlite.binding as binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def definitions(program: Program) -> str:
    """LLVM IR that defines a program's mathematical functions by libdevice's."""
    parts: dict[str, None] = {}
    for function in program.functions:
        kind = scalar_type(function.dtype)
        symbol = f"__nv_{function.name}{'f' if function.dtype.itemsize == 4 else ''}"
        formals = ", ".join(f"{kind} %x{i}" for i in range(function.operands))
        parts[f"declare {kind} @{symbol}({', '.join([kind] * function.operands)})"] = None
        parts[
            f"define internal {kind} @{function.symbol}({formals}) alwaysinline {{\n"
            f"  %r = call {kind} @{symbol}({formals})\n  ret {kind} %r\n}}"
        ] = None
    return "\n".join(parts)


def entry(name: str, arguments: Sequence[Argument], registers: int | None = None) -> str:
    """LLVM IR of the kernel that the GPU starts, with at most so many registers: finds the thread's lane, and leaves threads
    without one alone.

    Parameters: the buffers, the number of lanes, and the call's scratch pointers, which are not used.
    """
    formals = [f"ptr addrspace(1) %g{i}" for i in range(len(arguments))] + ["i32 %lanes"]
    formals += [f"ptr addrspace(1) %unused{i}" for i in range(SCRATCH_POINTERS)]
    lines = [f"  %h{i} = addrspacecast ptr addrspace(1) %g{i} to ptr" for i in range(len(arguments))]
    actuals = [
        f"ptr %h{i}, i32 {'%lanes' if argument.lanes or argument.spread else '0'}"
        for i, argument in enumerate(arguments)
    ]
    places = ("ctaid.x", "ntid.x", "tid.x")
    declared = [f"declare i32 @llvm.nvvm.read.ptx.sreg.{r}()" for r in places]
    reads = [f"  %r{k} = call i32 @llvm.nvvm.read.ptx.sreg.{r}()" for k, r in enumerate(places)]
    attribute = "" if registers is None else f' "nvvm.maxnreg"="{registers}"'
    return "\n".join(
        [
            *declared,
            f"define ptx_kernel void @{name}({', '.join(formals)}){attribute} {{",
            *reads,
            "  %first = mul i32 %r0, %r1",
            "  %number = add i32 %first, %r2",
            "  %inside = icmp slt i32 %number, %lanes",
            "  br i1 %inside, label %go, label %leave",
            "go:",
            *lines,
            f"  call void @body({', '.join(actuals)}, i32 %number)",
            "  br label %leave",
            "leave:",
            "  ret void",
            "}",
        ]
    )
