"""The native CPU runner: kernels as vector code, run block after block on XLA's own threads by the handler in `csrc/`.

The custom call carries a kernel's name, a hash of its content, and the kernel itself as LLVM IR, never an address: whichever
process executes it, this one, one that loaded the program from JAX's persistent cache or from `jax.export`, or a forked
child, compiles it at the first call, or finds the object code in the cache on disk.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pykernels.kernels import elf, identity, ir, llvm, native
from pykernels.kernels.body import Kernel
from pykernels.kernels.buffers import Buffer
from pykernels.kernels.disk import DiskCache, default_folder
from pykernels.kernels.ir import Argument, Function, Program, Target
from pykernels.kernels.llvm import as_native
from pykernels.kernels.stepper import Solve

# Bytes of object code in the disk cache are valid for one format of this file, one LLVM and one CPU.
_FORMAT = 5
# Registers per lane vector of a small system. Two give the processor independent work while it waits for results; beyond a
# few state elements the values of an attempt no longer fit into the registers there are.
SMALL_ELEMENTS, SMALL_REGISTERS = 4, 2
MOST_LANES = 64


@dataclass(frozen=True)
class Machine:
    """The processor kernels are compiled for."""

    triple: str
    cpu: str
    features: str
    vector_bytes: int
    fma: bool
    mathematics: str  # the letter of libmvec's vector functions ("b", "d", "e"), or "" for scalar libm


@functools.cache
def machine() -> Machine:
    """This machine."""
    import llvmlite.binding as binding

    _initialize()
    features = binding.get_host_cpu_features()
    triple = binding.get_process_triple()
    if triple.startswith("x86_64"):
        has = {name for name, there in features.items() if there}
        size = 64 if {"avx512f", "avx512dq"} <= has else 32 if "avx2" in has else 16
        fma, letter = bool({"fma", "avx512f"} & has), {64: "e", 32: "d", 16: "b"}[size]
    else:
        size, fma, letter = 16, triple.startswith(("aarch64", "arm64")), ""
    if letter and not _load_libmvec():
        letter = ""
    # LLVM prefers half registers on some processors with AVX-512; a kernel has nothing else to slow down.
    flat = features.flatten() + (",-prefer-256-bit" if size == 64 else "")
    return Machine(triple, binding.get_host_cpu_name(), flat, size, fma, letter)


@functools.cache
def _initialize() -> None:
    import llvmlite.binding as binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@functools.cache
def _load_libmvec() -> bool:
    """Whether glibc's vector mathematics is there, in the version that has all functions (2.35)."""
    import llvmlite.binding as binding

    try:
        binding.load_library_permanently("libmvec.so.1")
    except RuntimeError:
        return False
    return binding.address_of_symbol("_ZGVbN2v_erf") is not None


def unavailable() -> str | None:
    """Why there is no native runner in this process, or None."""
    return llvm.unavailable() or (None if native.load() is not None else native.reason())


def width(solve: Solve, lanes: int) -> int:
    """Lanes per vector: a power of two."""
    if solve.block:
        size = min(1 << (solve.block - 1).bit_length(), MOST_LANES)
    else:
        size = machine().vector_bytes // solve.field.dtype.itemsize
        if solve.field.elements <= SMALL_ELEMENTS:
            size *= SMALL_REGISTERS
    while size // 2 >= lanes and size > 1:
        size //= 2
    return size


def obstacle(kernel: Kernel, lanes: int) -> str | None:
    """Why this runner does not run a kernel, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    found = source_of(as_native(kernel), width(kernel.solve, lanes))
    return f"no native code for {found}" if isinstance(found, str) else None


def run(kernel: Kernel, operands: Sequence[jax.Array], lanes: int) -> list[jax.Array]:
    """Run a kernel without an `obstacle` over an ensemble; as `xla.run`."""
    results = kernel.results
    if lanes == 0:
        return [jnp.zeros((*b.shape, 0) if b.lanes else b.shape, b.dtype) for b in results]
    kernel, size = as_native(kernel), width(kernel.solve, lanes)
    source = source_of(kernel, size)
    assert isinstance(source, Source)
    register()
    compiler.prepare(source)
    types = [jax.ShapeDtypeStruct((*b.shape, lanes) if b.lanes else b.shape, b.dtype) for b in results]
    call = jax.ffi.ffi_call(native.TARGET, types)
    return list(
        call(
            *operands,
            key=source.key,
            ir=source.payload,
            width=np.int64(size),
            lanes=np.int64(lanes),
            layout=np.array(layout_of(kernel), np.int64).reshape(-1),
        )
    )


def register() -> None:
    """Make native kernels known to XLA in this process.

    Solves do it themselves. It is needed only where a program that another process made with `jax.export` is run before
    anything else of this package. Raises RuntimeError where there is no native runner.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"no native kernels: {reason}")
    library = native.load()
    assert library is not None
    library.register()
    compiler.start(library)


def layout_of(kernel: Kernel) -> list[native.Row]:
    """The custom call's view of a kernel's buffers."""

    def row(buffer: Buffer, with_lanes: native.Role, without: native.Role) -> native.Row:
        code = native.SUM_DTYPES[buffer.dtype.name] if without == native.Role.SUM and not buffer.lanes else 0
        role = with_lanes if buffer.lanes else without
        return native.Row(role, math.prod(buffer.shape), np.dtype(buffer.dtype).itemsize, code)

    role = native.Role
    rows = [
        row(b, role.SILENT if i == kernel.silent else role.INPUT, role.SHARED)
        for i, b in enumerate(kernel.operands)
    ]
    rows += [row(b, role.RESULT, role.SUM) for b in kernel.results]
    return rows + [row(b, role.SCRATCH, role.SCRATCH) for b in kernel.scratch]


def standalone(kernel: Kernel, lanes: int) -> Callable[[Sequence[np.ndarray], int], list[np.ndarray]]:
    """A kernel without XLA: a function of its operands, lanes last, and a number of threads. For tests and benchmarks."""
    kernel, size = as_native(kernel), width(kernel.solve, lanes)
    source, library = source_of(kernel, size), native.load()
    assert isinstance(source, Source) and library is not None
    engine, layout = link(compile_object(source.payload.encode(), machine())), layout_of(kernel)

    def run(operands: Sequence[np.ndarray], threads: int) -> list[np.ndarray]:
        arrays = [np.ascontiguousarray(x) for x in operands]
        results = [np.empty((*b.shape, lanes) if b.lanes else b.shape, b.dtype) for b in kernel.results]
        address = engine.get_function_address("kernel")  # asked here: the code lives as long as its engine
        library.run(address, lanes, size, layout, [a.ctypes.data for a in (*arrays, *results)], threads)
        return results

    return run


@dataclass(frozen=True)
class Source:
    """A kernel as a custom call carries it."""

    key: str
    payload: str


@functools.lru_cache(maxsize=256)
def source_of(kernel: Kernel, size: int) -> Source | str:
    """A kernel's source, or what has no native code. A later process that asks for the same kernel finds it on disk."""
    name = identity.digest(("source", kernel, size, machine().fma))
    stored = None if name is None else compiler.cache.read(name)
    if stored is not None:
        return Source(*stored.decode().split("\n"))
    arguments = [
        *[Argument(b.shape, np.dtype(b.dtype), b.lanes, constant=True) for b in kernel.operands],
        *[Argument(b.shape, np.dtype(b.dtype), b.lanes) for b in (*kernel.results, *kernel.scratch)],
    ]
    try:
        program = llvm.emit(kernel.body, arguments, Target(size, machine().fma))
    except ir.Unsupported as reason:
        return str(reason)
    source = pack(program, size)
    if name is not None:
        compiler.cache.write(name, f"{source.key}\n{source.payload}".encode())
    return source


def pack(program: Program, size: int) -> Source:
    """A program as text, with its hash. The mathematical functions are named, not included: they are the machine's."""
    functions = [[f.name, f.dtype.name, f.wide, f.operands] for f in program.functions]
    content = json.dumps(
        {"width": size, "buffers": program.buffers, "functions": functions, "ir": program.ir}
    )
    payload = base64.b64encode(zlib.compress(content.encode(), 1)).decode()
    return Source(hashlib.sha256(content.encode()).hexdigest(), payload)


def unpack(payload: bytes) -> tuple[Program, int]:
    """The inverse of `pack`. Raises ValueError for what `pack` did not make."""
    try:
        content = json.loads(zlib.decompress(base64.b64decode(payload)))
        functions = [
            Function(name, np.dtype(dtype), wide, n) for name, dtype, wide, n in content["functions"]
        ]
        return Program(content["ir"], content["buffers"], tuple(functions)), content["width"]
    except (zlib.error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a kernel: {error}") from error


def entry(buffers: int) -> str:
    """LLVM IR of `void kernel(void* const* pointers, const int64_t* strides)`, as the custom call calls it."""
    lines, actuals = [], []
    for i in range(buffers):
        lines += [
            f"  %a{i} = getelementptr ptr, ptr %pointers, i64 {i}",
            f"  %p{i} = load ptr, ptr %a{i}",
            f"  %b{i} = getelementptr i64, ptr %strides, i64 {i}",
            f"  %s{i} = load i64, ptr %b{i}",
        ]
        actuals.append(f"ptr %p{i}, i64 %s{i}")
    call = f"  call void @body({', '.join(actuals)})"
    return "\n".join(
        ["define void @kernel(ptr %pointers, ptr %strides) nounwind {", *lines, call, "  ret void", "}"]
    )


# Mathematical functions of the machine.

_LIBMVEC_BYTES = {"b": 16, "d": 32, "e": 64}
_C_TYPES = {"float64": ("double", ""), "float32": ("float", "f")}
# libmvec has no remainder: libm's, which is exact, lane by lane.
_SCALAR_ONLY = frozenset({"fmod"})


def definitions(functions: Sequence[Function], size: int, mathematics: str) -> str:
    """LLVM IR that defines a program's mathematical functions by libmvec's (`mathematics` its letter) or libm's ("")."""
    parts: dict[str, None] = {}
    for function in functions:
        kind, suffix = _C_TYPES[function.dtype.name]
        scalar = f"declare {kind} @{function.name}{suffix}({', '.join([kind] * function.operands)})"
        if not function.wide:
            parts[scalar] = None
            parts[
                _define(
                    function,
                    kind,
                    [f"  %r = call {kind} @{function.name}{suffix}({_formals(kind, function)})"],
                )
            ] = None
        elif mathematics and function.name not in _SCALAR_ONLY:
            parts |= dict.fromkeys(_by_vectors(function, size, mathematics))
        else:
            parts[scalar] = None
            parts[_by_lanes(function, size)] = None
    return "\n".join(parts)


def _formals(kind: str, function: Function) -> str:
    return ", ".join(f"{kind} %x{i}" for i in range(function.operands))


def _define(function: Function, kind: str, lines: Sequence[str]) -> str:
    head = f"define internal {kind} @{function.symbol}({_formals(kind, function)}) alwaysinline {{"
    return "\n".join([head, *lines, f"  ret {kind} %r", "}"])


def _by_vectors(function: Function, size: int, letter: str) -> list[str]:
    """Calls of libmvec on parts of a vector, the last one filled up."""
    kind, suffix = _C_TYPES[function.dtype.name]
    per_call = _LIBMVEC_BYTES[letter] // function.dtype.itemsize
    whole, part = f"<{size} x {kind}>", f"<{per_call} x {kind}>"
    symbol = f"_ZGV{letter}N{per_call}{'v' * function.operands}_{function.name}{suffix}"
    lines, joined = [], ""
    for n, start in enumerate(range(0, size, per_call)):
        places = ", ".join(f"i32 {min(start + i, size - 1)}" for i in range(per_call))
        for i in range(function.operands):
            lines.append(
                f"  %p{n}_{i} = shufflevector {whole} %x{i}, {whole} poison, <{per_call} x i32> <{places}>"
            )
        operands = ", ".join(f"{part} %p{n}_{i}" for i in range(function.operands))
        lines.append(f"  %c{n} = call {part} @{symbol}({operands})")
        # Into the whole vector: first widened, then chosen element by element.
        wide = ", ".join(
            f"i32 {i - start}" if start <= i < start + per_call else "i32 poison" for i in range(size)
        )
        lines.append(f"  %w{n} = shufflevector {part} %c{n}, {part} poison, <{size} x i32> <{wide}>")
        if not joined:
            joined = f"%w{n}"
            continue
        choice = ", ".join(f"i32 {size + i if start <= i < start + per_call else i}" for i in range(size))
        lines.append(f"  %j{n} = shufflevector {whole} {joined}, {whole} %w{n}, <{size} x i32> <{choice}>")
        joined = f"%j{n}"
    lines.append(f"  %r = shufflevector {whole} {joined}, {whole} poison, <{size} x i32> <{_counting(size)}>")
    return [
        f"declare {part} @{symbol}({', '.join([part] * function.operands)})",
        _define(function, whole, lines),
    ]


def _counting(size: int) -> str:
    return ", ".join(f"i32 {i}" for i in range(size))


def _by_lanes(function: Function, size: int) -> str:
    kind, suffix = _C_TYPES[function.dtype.name]
    whole, lines, vector = f"<{size} x {kind}>", [], "poison"
    for lane in range(size):
        for i in range(function.operands):
            lines.append(f"  %e{lane}_{i} = extractelement {whole} %x{i}, i64 {lane}")
        operands = ", ".join(f"{kind} %e{lane}_{i}" for i in range(function.operands))
        lines.append(f"  %c{lane} = call {kind} @{function.name}{suffix}({operands})")
        name = "%r" if lane == size - 1 else f"%v{lane}"
        lines.append(f"  {name} = insertelement {whole} {vector}, {kind} %c{lane}, i64 {lane}")
        vector = name
    return _define(function, whole, lines)


# Compilation.


def compile_object(payload: bytes, target: Machine) -> bytes:
    """Object code of a packed kernel, whose function is `kernel`."""
    import llvmlite.binding as binding

    program, size = unpack(payload)
    parts = [definitions(program.functions, size, target.mathematics), program.ir, entry(program.buffers)]
    module = binding.parse_assembly("\n".join(parts))
    module.triple = target.triple
    machine_ = binding.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small", jit=False
    )
    module.data_layout = str(machine_.target_data)
    llvm.optimise(module, machine_)
    return elf.one_section(machine_.emit_object(module))


class Compiler:
    """Kernels of this process: compiled once, in threads of their own, freed when the library has retired them."""

    def __init__(self) -> None:
        self.cache = DiskCache(default_folder())
        self.compiled = 0  # how many kernels were compiled rather than found
        self._lock = threading.Lock()
        self._pending: dict[str, Future[bytes]] = {}
        self._engines: dict[str, Any] = {}
        self._workers: ThreadPoolExecutor | None = None
        self._library: native.Library | None = None
        # A forked child has none of the parent's threads.
        os.register_at_fork(after_in_child=self._forget_threads)

    def _forget_threads(self) -> None:
        self._lock, self._workers, self._pending = threading.Lock(), None, {}

    def start(self, library: native.Library) -> None:
        """Let the library ask for kernels."""
        if self._library is None:
            library.set_compiler(self.address)
            self._library = library

    def prepare(self, source: Source) -> None:
        """Start compiling a kernel that will be called: LLVM runs beside what Python and XLA do meanwhile."""
        with self._lock:
            if source.key in self._engines or source.key in self._pending:
                return
            if self._workers is None:
                self._workers = ThreadPoolExecutor(2, thread_name_prefix="pykernels-compile")
            self._pending[source.key] = self._workers.submit(
                self.object_code, source.key, source.payload.encode()
            )

    def object_code(self, key: str, payload: bytes) -> bytes:
        """A kernel's object code, from the disk cache if it is there."""
        import llvmlite

        target = machine()
        version = (_FORMAT, llvmlite.__version__, dataclasses.astuple(target), key)
        name = hashlib.sha256(repr(version).encode()).hexdigest()
        code = self.cache.read(name)
        if code is None:
            code = compile_object(payload, target)
            self.compiled += 1
            self.cache.write(name, code)
        return code

    def address(self, key: str, payload: bytes) -> int:
        """Where a kernel's function is in this process. Called by the library."""
        with self._lock:
            future = self._pending.pop(key, None)
        code = future.result() if future is not None else self.object_code(key, payload)
        with self._lock:
            self._free_retired()
            if key not in self._engines:
                self._engines[key] = link(code)
            return self._engines[key].get_function_address("kernel")

    def _free_retired(self) -> None:
        if self._library is not None:
            for key in self._library.retired():
                engine = self._engines.pop(key, None)
                if engine is not None:
                    engine.close()


def link(code: bytes) -> Any:
    """An engine that holds object code; the function is `kernel`. It lives as long as the engine."""
    import llvmlite.binding as binding

    _initialize()
    machine_ = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine_)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


compiler = Compiler()
"""The compiler of this process; `compiler.cache` may be replaced by another `DiskCache`."""
