"""The native library: the XLA custom calls that run a compiled kernel over all blocks of an ensemble, or over a state in
memory, on XLA's own threads.

`csrc/` holds its source and its rules. Where it was not built (no C++ compiler at installation), `load` returns None and
`reason` says why. Compiling kernels is not its business: it asks the function given to `set_compiler`.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.util
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

TARGET = "pykernels_lanes"
PASS_TARGET = "pykernels_passes"
BUFFER_TARGET = "pykernels_buffer"
ABI = 3  # what this module expects of `pk_abi` in csrc/lanes.cc

# Compiles the IR of a kernel, called with its key: returns the address of its function, valid until `retired` names the key;
# or raises, which becomes an XLA error. Called from XLA's threads, for several keys at once.
Compiler = Callable[[str, bytes], int]


class Role(enum.IntEnum):
    """What a buffer is to a kernel."""

    INPUT = 0  # with lanes; missing lanes of the last block repeat the last lane
    SILENT = 1  # with lanes; missing lanes are zero
    SHARED = 2  # an input without lanes
    RESULT = 3  # with lanes
    SUM = 4  # a result without lanes: the sum of what the blocks store
    SCRATCH = 5  # with lanes, private to a running block, contents undefined; XLA does not know of it


# Codes of the dtypes that a sum can have; other buffers' codes are not looked at.
SUM_DTYPES = {"float32": 0, "float64": 1, "int32": 2, "int64": 3}


class Row(NamedTuple):
    """A buffer in a kernel's layout: arguments first, then results, then scratch."""

    role: Role
    elements: int  # per lane, or in all where there are no lanes
    item: int  # bytes
    dtype: int = 0  # from SUM_DTYPES for a sum


class Part(enum.IntEnum):
    """What a buffer of a step kernel is to it (see csrc/passes.h)."""

    STATE = 0  # an operand (rows, columns); columns missing in the last vector are zero
    REPEATED = 1  # the same; missing columns repeat the last one
    ROW = 2  # an operand (rows,)
    SLOTS = 3  # an operand (slots, rows, columns), of which a row's slot is read
    REPLACED = 4  # an operand whose memory is a result's
    RESULT = 5  # a result (rows, columns)
    SLOTS_RESULT = 6  # a result (slots, rows, columns), of which a row's slot is written
    SUM = 7  # a result (rows,): the sum of what the pieces store


class Strip(NamedTuple):
    """A buffer in a step kernel's layout: operands first, then results."""

    part: Part
    item: int  # bytes
    slots: int = 0  # of a buffer with slots
    extra: int = (
        0  # the operand that holds the slots; a sum's dtype code; whether a RESULT is in an operand's place
    )


_COMPILE = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_char),
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_char),
    ctypes.c_int64,
    ctypes.POINTER(ctypes.c_char),
    ctypes.c_int64,
)
_KEYS = 1 << 16  # bytes of keys asked for at once


class Library:
    """The exports of the loaded library, typed. There is one per process: use `load`."""

    def __init__(self, path: str):
        """Raises OSError where the file is no library, AttributeError where it lacks an export."""
        self.path = path
        library = ctypes.CDLL(path)
        library.pk_abi.restype = ctypes.c_int64
        library.pk_xla_major.restype = ctypes.c_int64
        library.pk_xla_minor.restype = ctypes.c_int64
        library.pk_set_compiler.argtypes = [ctypes.c_void_p]
        library.pk_set_compiler.restype = None
        library.pk_set_capacity.argtypes = [ctypes.c_int64]
        library.pk_set_capacity.restype = None
        library.pk_resident.restype = ctypes.c_int64
        library.pk_retired.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.pk_retired.restype = ctypes.c_int64
        library.pk_set_poison.argtypes = [ctypes.c_int]
        library.pk_set_poison.restype = None
        library.pk_run.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int64,
        ]
        library.pk_run.restype = ctypes.c_char_p
        library.pk_run_pass.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int64] * 4,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_int64,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_int64,
        ]
        library.pk_run_pass.restype = ctypes.c_char_p
        self._library = library
        self._handlers = {
            TARGET: library.PkLanes,
            PASS_TARGET: library.PkPasses,
            BUFFER_TARGET: library.PkBuffer,
        }
        self._registered = False
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None
        # The one function that C++ ever calls; never replaced, so a call that is under way cannot lose it.
        self._trampoline = _COMPILE(self._compile)

    @property
    def abi(self) -> int:
        """The version of the interface that the library was built with."""
        return self._library.pk_abi()

    @property
    def xla(self) -> tuple[int, int]:
        """The version of XLA's foreign function interface that the library was built for."""
        return self._library.pk_xla_major(), self._library.pk_xla_minor()

    def register(self) -> None:
        """Make the custom calls known to XLA, once."""
        with self._lock:
            if not self._registered:
                for name, handler in self._handlers.items():
                    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
                self._registered = True

    def set_compiler(self, compiler: Compiler | None) -> Compiler | None:
        """Set what compiles kernels that are not resident; returns what it was."""
        with self._lock:
            previous, self._compiler = self._compiler, compiler
            function = None if compiler is None else ctypes.cast(self._trampoline, ctypes.c_void_p)
            self._library.pk_set_compiler(function)
        return previous

    def set_capacity(self, capacity: int) -> None:
        """Keep at most so many compiled kernels, the most recently used."""
        self._library.pk_set_capacity(capacity)

    def resident(self) -> int:
        """How many compiled kernels are kept."""
        return self._library.pk_resident()

    def retired(self) -> list[str]:
        """Keys of kernels that are neither kept nor in use, named once: their code may be freed.

        A kernel that is needed again is compiled again. So hold one lock over this and the freeing after it, and take it in
        the compiler to look up and to store code: then what the compiler stores or finds under a key is not freed by a
        report from before it was asked.
        """
        keys: list[str] = []
        buffer = ctypes.create_string_buffer(_KEYS)
        while size := self._library.pk_retired(buffer, _KEYS):
            keys += buffer.raw[:size].decode().split("\n")
        return keys

    def set_poison(self, on: bool) -> None:
        """Fill results and scratch with 0xFF before a block runs: shows what a kernel forgets to write."""
        self._library.pk_set_poison(on)

    def run(
        self,
        address: int,
        lanes: int,
        width: int,
        layout: Sequence[Row],
        buffers: Sequence[int],
        threads: int,
    ) -> None:
        """Run a kernel without XLA, on up to `threads` threads: for tests and benchmarks.

        `buffers` are the addresses of the C-contiguous arrays of all rows but scratch. Raises ValueError for a bad layout,
        and if there is no memory for scratch.
        """
        if len(buffers) != sum(row.role != Role.SCRATCH for row in layout):
            raise ValueError(f"{len(buffers)} buffers for a layout of {len(layout)} rows")
        numbers = [int(number) for row in layout for number in row]
        error = self._library.pk_run(
            address,
            lanes,
            width,
            (ctypes.c_int64 * len(numbers))(*numbers),
            len(layout),
            (ctypes.c_void_p * len(buffers))(*buffers),
            threads,
        )
        if error is not None:
            raise ValueError(error.decode())

    def run_pass(
        self,
        address: int,
        shape: tuple[int, int],
        width: int,
        piece: int,
        layout: Sequence[Strip],
        buffers: Sequence[int],
        threads: int,
    ) -> None:
        """Run a step kernel on a state of that shape without XLA, on up to `threads` threads: for tests and benchmarks.

        `buffers` are the addresses of the C-contiguous arrays of all strips. Raises ValueError for a bad layout.
        """
        if len(buffers) != len(layout):
            raise ValueError(f"{len(buffers)} buffers for a layout of {len(layout)} strips")
        numbers = [int(number) for strip in layout for number in strip]
        error = self._library.pk_run_pass(
            address,
            *shape,
            width,
            piece,
            (ctypes.c_int64 * len(numbers))(*numbers),
            len(layout),
            (ctypes.c_void_p * len(buffers))(*buffers),
            threads,
        )
        if error is not None:
            raise ValueError(error.decode())

    def _compile(
        self,
        key: ctypes._Pointer[ctypes.c_char],
        key_size: int,
        ir: ctypes._Pointer[ctypes.c_char],
        ir_size: int,
        error: ctypes._Pointer[ctypes.c_char],
        capacity: int,
    ) -> int | None:
        try:
            compiler = self._compiler
            if compiler is None:
                raise RuntimeError("no compiler is set")
            return compiler(ctypes.string_at(key, key_size).decode(), ctypes.string_at(ir, ir_size))
        except BaseException as exception:  # C++ called: there is nobody above to raise to, XLA reports it
            text = f"{type(exception).__name__}: {exception}".encode(errors="replace")[: capacity - 1]
            ctypes.memmove(error, text + b"\0", len(text) + 1)
            return None


@functools.cache
def _find() -> Library | str:
    """The library, or why there is none."""
    spec = importlib.util.find_spec("pykernels._native")
    if spec is None or spec.origin is None:
        return "it was not built: pykernels was installed without a C++ compiler, or not installed at all"
    try:
        library = Library(spec.origin)
    except (OSError, AttributeError) as error:
        return f"{spec.origin} does not load: {error}"
    if library.abi != ABI:
        return f"{spec.origin} has interface {library.abi}, this pykernels needs {ABI}: install it again"
    # To register what XLA refuses would keep JAX from starting its CPU backend at all. XLA takes what was built for an older
    # version, so the build asks for the oldest JAX; without build isolation it gets what is installed.
    built, installed = library.xla, _installed_xla()
    if installed is None or built[0] != installed[0] or built[1] > installed[1]:
        return f"{spec.origin} was built for XLA's interface {built}, the installed jaxlib has {installed}: install it again"
    return library


def _installed_xla() -> tuple[int, int] | None:
    """The version of XLA's foreign function interface in the installed jaxlib, as its headers say."""
    try:
        header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    except OSError:
        return None
    version = dict(re.findall(r"^#define XLA_FFI_API_(MAJOR|MINOR) +(\d+)", header, re.MULTILINE))
    return (int(version["MAJOR"]), int(version["MINOR"])) if len(version) == 2 else None


_finding = threading.Lock()


def load() -> Library | None:
    """The native library, None where it is missing (see `reason`). Loaded once, at the first call."""
    with _finding:  # a cache does not keep two threads from loading twice
        found = _find()
    return found if isinstance(found, Library) else None


def reason() -> str:
    """Why `load` returns None; empty where it does not."""
    with _finding:
        found = _find()
    return found if isinstance(found, str) else ""


def register() -> bool:
    """Make the custom call known to XLA; False where there is no library."""
    library = load()
    if library is not None:
        library.register()
    return library is not None
