"""The custom call that runs compiled kernels over an ensemble (csrc/), with small kernels written in LLVM IR."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest

from pykernels.kernels import native
from pykernels.kernels.native import Role, Row

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.reason())

MOST_TASKS = 1024  # kMostTasks in csrc/blocks.h: a task is ceil(blocks / 1024) consecutive blocks

# One lane after the other: y0 = factor * x0 through scratch, y1 = x1 + 1, and the block's sum of weight * y0.
KERNEL = """
define void @kernel(ptr %pointers, ptr %strides) {{
  %xp = load ptr, ptr %pointers
  %wpp = getelementptr ptr, ptr %pointers, i64 1
  %wp = load ptr, ptr %wpp
  %fpp = getelementptr ptr, ptr %pointers, i64 2
  %fp = load ptr, ptr %fpp
  %ypp = getelementptr ptr, ptr %pointers, i64 3
  %yp = load ptr, ptr %ypp
  %tpp = getelementptr ptr, ptr %pointers, i64 4
  %tp = load ptr, ptr %tpp
  %spp = getelementptr ptr, ptr %pointers, i64 5
  %sp = load ptr, ptr %spp
  %xs = load i64, ptr %strides
  %ysp = getelementptr i64, ptr %strides, i64 3
  %ys = load i64, ptr %ysp
  %factor = load double, ptr %fp
  br label %loop
loop:
  %i = phi i64 [ 0, %0 ], [ %next, %loop ]
  %sum = phi double [ 0.0, %0 ], [ %more, %loop ]
  %x0p = getelementptr double, ptr %xp, i64 %i
  %x0 = load double, ptr %x0p
  %x1p = getelementptr double, ptr %x0p, i64 %xs
  %x1 = load double, ptr %x1p
  %w0p = getelementptr double, ptr %wp, i64 %i
  %w = load double, ptr %w0p
  %product = fmul double %factor, %x0
  %s0p = getelementptr double, ptr %sp, i64 %i
  store double %product, ptr %s0p
  %y0 = load double, ptr %s0p
  %y1 = fadd double %x1, 1.0
  %y0p = getelementptr double, ptr %yp, i64 %i
  store double %y0, ptr %y0p
  %y1p = getelementptr double, ptr %y0p, i64 %ys
  store double %y1, ptr %y1p
  %weighted = fmul double %w, %y0
  %more = fadd double %sum, %weighted
  %next = add i64 %i, 1
  %again = icmp ult i64 %next, {width}
  br i1 %again, label %loop, label %end
end:
  store double %more, ptr %tp
  ret void
}}
"""
NOTHING = "define void @kernel(ptr %pointers, ptr %strides) {{ ret void }} ; {width}"
LAYOUT = (
    Row(Role.INPUT, 2, 8),
    Row(Role.SILENT, 1, 8),
    Row(Role.SHARED, 1, 8),
    Row(Role.RESULT, 2, 8),
    Row(Role.SUM, 1, 8, native.SUM_DTYPES["float64"]),
    Row(Role.SCRATCH, 1, 8),
)


class Compiler:
    """Compiles IR and keeps the code for ever, like the counts of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._engines: list[llvm.ExecutionEngine] = []
        self._lock = threading.Lock()
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()

    def __call__(self, key: str, ir: bytes) -> int:
        with self._lock:  # llvmlite's functions are not for several threads at once
            self.asked.append(key)
            machine = llvm.Target.from_default_triple().create_target_machine()
            engine = llvm.create_mcjit_compiler(llvm.parse_assembly(ir.decode()), machine)
            engine.finalize_object()
            self._engines.append(engine)
            return engine.get_function_address("kernel")


COMPILER = Compiler()  # kernels stay resident after a test, so their code must stay too
KEYS = (f"test_native_call {number}" for number in itertools.count())


@pytest.fixture
def library() -> Iterator[native.Library]:
    found = native.load()
    assert found is not None
    found.register()
    previous = found.set_compiler(COMPILER)
    yield found
    found.set_compiler(previous)
    found.set_capacity(256)
    found.set_poison(False)


def numbers(layout=LAYOUT) -> np.ndarray:
    return np.array(layout, np.int64).ravel()


def compiled(width: int, text: str = KERNEL, **changed) -> jax.stages.Wrapped:
    """A jitted function of x (2, lanes), weight (lanes,), factor () -> y (2, lanes), sum ()."""
    attributes = {"key": next(KEYS), "ir": text.format(width=width), "layout": numbers(), **changed}

    @jax.jit
    def run(x, weight, factor):
        lanes = x.shape[-1]
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), x.dtype))
        call = jax.ffi.ffi_call(native.TARGET, shapes)
        return call(x, weight, factor, width=np.int64(width), **({"lanes": np.int64(lanes)} | attributes))

    return run


def arguments(lanes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(lanes)
    x, weight = rng.normal(size=(2, lanes)), rng.normal(size=lanes)
    return jnp.asarray(x), jnp.asarray(weight), jnp.asarray(1.7)


def expected(x, weight, factor, width: int) -> tuple[np.ndarray, float]:
    """Results and the sum in its order: lanes of a block, blocks of a task, tasks."""
    x, weight, factor = np.asarray(x), np.asarray(weight), float(factor)
    y = np.stack([factor * x[0], x[1] + 1])
    terms = weight * y[0]

    def total(parts) -> float:
        # Not sum(), which compensates from Python 3.12 on.
        return float(functools.reduce(operator.add, parts)) if len(parts) else 0.0

    # The kernel's own sum begins with 0.0, which changes nothing but the sign of a zero.
    blocks = [total(terms[i : i + width]) for i in range(0, len(terms), width)]
    task = -(-len(blocks) // MOST_TASKS) or 1
    return y, total([total(blocks[i : i + task]) for i in range(0, len(blocks), task)])


@pytest.mark.parametrize("lanes", [0, 1, 7, 8, 1023])
@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("poison", [False, True])
def test_every_lane_and_the_sum(library, width, lanes, poison):
    library.set_poison(poison)
    y, total = compiled(width)(*arguments(lanes))
    expected_y, expected_total = expected(*arguments(lanes), width)
    np.testing.assert_array_equal(y, expected_y)
    assert float(total) == expected_total


@pytest.mark.parametrize("width", [1, 4])
def test_sums_do_not_depend_on_threads(library, width):
    lanes = 9001  # more blocks than tasks, and a last block with a lane missing
    operands = [np.array(a) for a in arguments(lanes)]
    expected_y, expected_total = expected(*arguments(lanes), width)
    assert expected_total != float(np.sum(operands[1] * expected_y[0]))  # the order can be seen
    address = COMPILER(next(KEYS), KERNEL.format(width=width).encode())
    for threads in (1, 2, 8):
        results = [np.full((2, lanes), np.nan), np.full((), np.nan)]
        buffers = [a.ctypes.data for a in (*operands, *results)]
        library.run(address, lanes, width, LAYOUT, buffers, threads)
        np.testing.assert_array_equal(results[0], expected_y)
        assert float(results[1]) == expected_total
    assert float(compiled(width)(*arguments(lanes))[1]) == expected_total


def test_what_a_kernel_does_not_write_is_poison(library):
    library.set_poison(True)
    y, total = compiled(4, NOTHING)(*arguments(10))
    assert jnp.isnan(y).all() and jnp.isnan(total)


def changed(row: int, **fields) -> np.ndarray:
    return numbers([r._replace(**fields) if i == row else r for i, r in enumerate(LAYOUT)])


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"layout": changed(0, role=9)}, "row 0: unknown role 9"),
        ({"layout": changed(0, elements=3)}, "buffer 0: 16 elements where the layout has 24"),
        ({"layout": changed(1, item=4)}, "buffer 1: items of 8 bytes where the layout has 4"),
        ({"layout": changed(2, role=0)}, "buffer 2: the last dimension is not the lanes"),
        ({"layout": changed(3, role=0)}, "buffer 3: the layout has an input where XLA has a result"),
        ({"layout": changed(4, dtype=3)}, "buffer 4: the dtype of a sum"),
        ({"layout": changed(4, dtype=0)}, "row 4: a sum of 32-bit numbers"),
        ({"layout": changed(5, elements=-1)}, "row 5: -1 elements"),
        ({"layout": changed(5, elements=2**62)}, "larger than the address space"),
        ({"layout": changed(5, elements=2**54)}, "no memory for the scratch"),
        ({"layout": numbers(LAYOUT[1:])}, "4 buffers besides scratch, XLA 5"),
        ({"layout": numbers()[:-1]}, "23 numbers"),
        ({"layout": numbers(LAYOUT[::-1])}, "inputs come first"),
        ({"lanes": np.int64(7)}, "buffer 0: the last dimension is not the lanes, 7"),
        ({"lanes": np.int64(-1)}, "an ensemble of -1 lanes"),
        ({"ir": "no IR"}, "does not compile: RuntimeError: LLVM IR parsing error"),
    ],
)
def test_errors_are_errors_of_xla(library, attributes, message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(compiled(4, **attributes)(*arguments(8)))


def test_a_block_has_lanes(library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="a block of 0 lanes"):
        jax.block_until_ready(compiled(0)(*arguments(8)))


def test_errors_outside_xla_are_python_errors(library):
    with pytest.raises(ValueError, match="unknown role 9"):
        library.run(1, 8, 4, [Row(9, 1, 8)], [0], 1)  # pyright: ignore
    with pytest.raises(ValueError, match="0 buffers for a layout of 6 rows"):
        library.run(1, 8, 4, LAYOUT, [], 1)


def test_without_a_compiler(library):
    run = compiled(4)
    library.set_compiler(None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no compiler is set for kernel test_native_call"):
        jax.block_until_ready(run(*arguments(8)))
    run(*arguments(0))  # needs none
    library.set_compiler(COMPILER)
    np.testing.assert_array_equal(run(*arguments(8))[0], expected(*arguments(8), 4)[0])  # not remembered


def test_a_compiler_that_raises(library):
    def fails(key, ir):
        raise KeyError("é" * 10_000)  # longer than there is room for

    run = compiled(4)
    library.set_compiler(fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not compile: KeyError: 'é"):
        jax.block_until_ready(run(*arguments(8)))
    library.set_compiler(lambda key, ir: 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not compile: no reason given"):
        jax.block_until_ready(run(*arguments(8)))


def test_one_compilation_for_many_threads(library):
    threads = 6
    operands = arguments(64)
    runs = [compiled(4, key=key) for key in (next(KEYS), next(KEYS)) for _ in range(threads // 2)]
    executables = [run.lower(*operands).compile() for run in runs]
    before = len(COMPILER.asked)
    gate = threading.Barrier(threads)

    def go(executable):
        gate.wait()
        return jax.block_until_ready(executable(*operands))

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(go, executables))
    asked = COMPILER.asked[before:]
    assert len(asked) == 2 and len(set(asked)) == 2
    for y, total in results:
        np.testing.assert_array_equal(y, expected(*operands, 4)[0])
        assert float(total) == expected(*operands, 4)[1]


def test_eviction(library):
    library.set_capacity(0)
    library.retired()
    library.set_capacity(2)
    keys = [next(KEYS) for _ in range(3)]
    runs = [compiled(4, key=key) for key in keys]
    before = len(COMPILER.asked)
    for i in (0, 1, 0, 2, 0):  # 2 drops 1
        jax.block_until_ready(runs[i](*arguments(8)))
    assert COMPILER.asked[before:] == keys
    assert library.resident() == 2
    assert library.retired() == [keys[1]] and library.retired() == []
    y, _ = runs[1](*arguments(8))  # compiled again from the IR in the call; drops 2
    np.testing.assert_array_equal(y, expected(*arguments(8), 4)[0])
    assert COMPILER.asked[before:] == [*keys, keys[1]]
    library.set_capacity(0)
    assert library.resident() == 0 and sorted(library.retired()) == sorted(keys)


def script(text: str) -> str:
    """Runs a test in a process of its own, with this file as the module `t`."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", text],
        env=os.environ | {"PYTHONPATH": path, "JAX_ENABLE_X64": "1"},
        cwd=Path(__file__).parent,  # not the source tree, which would hide an installed copy
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import multiprocessing, os, signal, warnings
import jax, numpy as np
import test_native_call as t
library = t.native.load()
library.register()
library.set_compiler(t.COMPILER)
known, unknown = t.compiled(4), t.compiled(8)

def check(run, width, lanes=4001):
    y, total = run(*t.arguments(lanes))
    expected_y, expected_total = t.expected(*t.arguments(lanes), width)
    np.testing.assert_array_equal(y, expected_y)
    assert float(total) == expected_total

def child():
    signal.alarm(60)  # a child that waits for threads it does not have would hang
    assert library.resident() == 1
    check(known, 4)
    assert len(t.COMPILER.asked) == 1
    check(unknown, 8)
    assert len(t.COMPILER.asked) == 2 and library.resident() == 2
    os._exit(7)  # not through the clean-up of a JAX whose threads are in the parent

check(known, 4)
unknown.lower(*t.arguments(4001)).compile()
# Python and JAX warn of forks with threads about, rightly; the point here is that this library adds no reason.
warnings.simplefilter("ignore")
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 7, process.exitcode
check(unknown, 8)
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child(library):
    assert script(FORK) == "forked\n"


DEVICES = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
from jax.sharding import Mesh, PartitionSpec as P
import test_native_call as t
library = t.native.load()
library.register()
library.set_compiler(t.COMPILER)
run = t.compiled(4)
mesh = Mesh(jax.devices(), "lanes")

def local(x, weight, factor):
    y, total = run(x, weight, factor)
    return y, jax.lax.psum(total, "lanes")

both = jax.jit(jax.shard_map(
    local, mesh=mesh, in_specs=(P(None, "lanes"), P("lanes"), P()), out_specs=(P(None, "lanes"), P()), check_vma=False,
))
x, weight, factor = t.arguments(2002)
for _ in range(20):
    y, total = both(x, weight, factor)
    halves = [t.expected(x[:, i : i + 1001], weight[i : i + 1001], factor, 4) for i in (0, 1001)]
    np.testing.assert_array_equal(y, np.concatenate([half for half, _ in halves], axis=1))
    assert float(total) == halves[0][1] + halves[1][1]
assert len(y.sharding.device_set) == 2 and len(t.COMPILER.asked) == 1
print("sharded")
"""


def test_two_devices(library):
    assert script(DEVICES) == "sharded\n"


def missing() -> str:
    """Why a process that starts now would have no library."""
    found = native._find.__wrapped__()
    assert isinstance(found, str)
    return found


def test_a_missing_library_has_a_reason(monkeypatch, tmp_path):
    assert native.reason() == ""
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert "not built" in missing()
    broken = tmp_path / "_native.so"
    broken.write_text("no library")
    spec = native.importlib.util.spec_from_file_location("pykernels._native", broken)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
    assert "does not load" in missing()


def test_an_older_library_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    assert "install it again" in missing()


def test_a_library_that_xla_would_refuse_is_not_used(monkeypatch, library):
    installed = native._installed_xla()
    assert installed is not None and installed >= library.xla
    for version in (None, (library.xla[0], library.xla[1] - 1), (library.xla[0] + 1, 0)):
        monkeypatch.setattr(native, "_installed_xla", lambda found=version: found)
        assert "was built for XLA's interface" in missing()


def test_the_module_does_not_import_llvmlite():
    text = "import sys, pykernels.kernels.native as n; n.load(); print('llvmlite' in sys.modules)"
    assert script(text) == "False\n"
