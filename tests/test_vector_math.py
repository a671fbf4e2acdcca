"""The mathematical functions of native kernels, on the machine the tests run on: at most 4 ulp over the whole range."""

import ctypes

import numpy as np
import pytest

from pykernels.kernels import cpu
from pykernels.kernels.ir import INT64, Argument, Cell, Program, Target, Writer

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ULPS = 4.0
FUNCTIONS = {
    "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "log": np.log, "log1p": np.log1p, "sin": np.sin, "cos": np.cos,
    "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh,
    "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh, "cbrt": np.cbrt,
}  # fmt: skip
BINARY = {"atan2": np.arctan2, "pow": np.power, "fmod": np.fmod}
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, np.inf, -np.inf, np.nan]


def kernel(name, dtype, width, mathematics, operands=1):
    """A native function that maps rows of `width` numbers."""
    buffers = [Argument((1 << 20,), dtype, True, True)] * operands + [Argument((1 << 20,), dtype, True)]
    write = Writer(Target(width), [*buffers, Argument((1,), INT64, False, True)])
    *sources, result, count = write.refs
    rows = write.load(count, write.address(count, [], 0), False)

    def step(carried):
        at = [(carried[0], INT64, 1)]
        values = [write.load(ref, write.address(ref, at, 0), True) for ref in sources]
        write.store(write.address(result, at, 0), write.function(name, dtype, *values), dtype, True)
        return [write.result(f"add i64 {carried[0].text}, 1", False)]

    write.loop(
        [(Cell(known=0), INT64, False)],
        lambda carried: write.result(f"icmp slt i64 {carried[0].text}, {rows.text}", False),
        step,
    )
    code = compiled(write.program(), width, mathematics)
    engine = cpu.link(code)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("kernel"))

    def apply(*values):
        size = values[0].size
        rows = -(-size // width)
        padded = [np.concatenate([v, np.ones(rows * width - size, dtype)]) for v in values]
        out, number = np.empty(rows * width, dtype), np.array([rows], np.int64)
        pointers = (ctypes.c_void_p * (operands + 2))(*[a.ctypes.data for a in (*padded, out, number)])
        strides = (ctypes.c_int64 * (operands + 2))(*[width] * (operands + 1), 0)
        function(pointers, strides)
        return out[:size]

    apply.engine = engine
    return apply


def compiled(program: Program, width: int, mathematics: str) -> bytes:
    machine = cpu.dataclasses.replace(cpu.machine(), mathematics=mathematics)
    return cpu.compile_object(cpu.pack(program, width).payload.encode(), machine)


def everywhere(dtype, count):
    """Numbers of every size: bit patterns spread over all there are, and the special ones with their neighbours."""
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    step = np.iinfo(bits).max // count
    patterns = (np.arange(count, dtype=bits) * bits.type(step) + bits.type(step // 3)).view(dtype)
    special = np.array(SPECIAL, dtype)
    near = np.concatenate(
        [np.nextafter(special, dtype(np.inf)), np.nextafter(special, dtype(-np.inf)), special]
    )
    tiny = np.array([5e-324, 1e-310, 2.2e-308, 1e-45, 1e-40, 1.1e-38], dtype)
    usual = np.random.default_rng(0).uniform(-20, 20, count // 4).astype(dtype)
    return np.concatenate([patterns, near, tiny, -tiny, usual])


def assert_accurate(got, exact, dtype, what):
    """`exact` in a wider format. Overflow and underflow at the last ulp are allowed, everything else is not."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(dtype)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded), err_msg=what)
        finite = np.isfinite(rounded) & np.isfinite(got)
        info = np.finfo(dtype)
        spacing = np.maximum(np.abs(np.spacing(rounded[finite])).astype(exact.dtype), info.smallest_subnormal)
        error = np.abs(got[finite].astype(exact.dtype) - exact[finite]) / spacing
        worst = np.max(error, initial=0.0)
        assert worst <= ULPS, f"{what}: {worst} ulp"
        # Where one is infinite and the other not, the finite one is next to it.
        odd = ~np.isnan(rounded) & ~finite & (got != rounded)
        near = np.where(np.isfinite(got), np.abs(got.astype(exact.dtype)), np.abs(exact)) >= info.max * (
            1 - 4 * info.eps
        )
        assert np.all(near[odd]), what


MATHEMATICS = sorted({"", cpu.machine().mathematics} if cpu.unavailable() is None else {""})


@pytest.mark.parametrize("mathematics", MATHEMATICS, ids=lambda m: f"libmvec-{m}" if m else "libm")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_number(name, dtype, mathematics):
    width = cpu.machine().vector_bytes // np.dtype(dtype).itemsize
    x = everywhere(dtype, 1 << (22 if dtype == np.float32 and mathematics else 16))
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name](x.astype(np.float64 if dtype == np.float32 else np.longdouble))
    got = kernel(name, np.dtype(dtype), width, mathematics)(x)
    assert_accurate(got, exact, dtype, f"{name} {np.dtype(dtype)}")


@pytest.mark.parametrize("mathematics", MATHEMATICS, ids=lambda m: f"libmvec-{m}" if m else "libm")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_numbers(name, dtype, mathematics):
    width = cpu.machine().vector_bytes // np.dtype(dtype).itemsize
    values = everywhere(dtype, 1 << 16)
    rng = np.random.default_rng(1)
    x, y = values, rng.permutation(values)
    pairs = np.array([(a, b) for a in SPECIAL for b in SPECIAL], dtype)
    usual = rng.uniform(0, 30, (2, 1 << 15)).astype(dtype)
    x, y = np.concatenate([x, pairs[:, 0], usual[0]]), np.concatenate([y, pairs[:, 1], usual[1] - 15])
    with np.errstate(all="ignore"):
        wide = np.float64 if dtype == np.float32 else np.longdouble
        exact = BINARY[name](x.astype(wide), y.astype(wide))
    got = kernel(name, np.dtype(dtype), width, mathematics, operands=2)(x, y)
    assert_accurate(got, exact, dtype, f"{name} {np.dtype(dtype)}")


@pytest.mark.parametrize("name", ["erf", "erfc"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_functions(name, dtype):
    """Against SciPy in double precision (float32), and 40-digit arithmetic (float64)."""
    special = pytest.importorskip("scipy.special")
    width = cpu.machine().vector_bytes // np.dtype(dtype).itemsize
    got_of = kernel(name, np.dtype(dtype), width, cpu.machine().mathematics)
    if dtype == np.float32:
        x = everywhere(dtype, 1 << 18)
        with np.errstate(all="ignore"):
            exact = getattr(special, name)(x.astype(np.float64))
    else:
        mpmath = pytest.importorskip("mpmath")
        x = np.concatenate([np.random.default_rng(2).uniform(-6, 26, 2000), everywhere(dtype, 256)])
        x = x[np.abs(x) < 1e3]
        with mpmath.workdps(40):
            values = [getattr(mpmath, name)(mpmath.mpf(float(v))) for v in x]
            high = np.array([float(v) for v in values])
            low = np.array([float(v - mpmath.mpf(h)) for v, h in zip(values, high, strict=True)])
        exact = high.astype(np.longdouble) + low
    assert_accurate(got_of(x), exact, dtype, name)


@pytest.mark.parametrize("width", [1, 2, 4, 16, 32])
@pytest.mark.parametrize("name", ["exp", "pow"])
def test_every_width_gives_the_same_numbers(name, width):
    """A vector that does not fill a call, or needs several, is split and filled up; each lane has the same number."""
    x = np.linspace(0.1, 9.0, 97)
    operands = 2 if name == "pow" else 1
    mathematics = cpu.machine().mathematics
    full = kernel(name, np.dtype(float), 8, mathematics, operands)(*[x] * operands)
    got = kernel(name, np.dtype(float), width, mathematics, operands)(*[x] * operands)
    if width == 1:  # scalar libm, rounded on its own
        np.testing.assert_allclose(got, full, rtol=8 * np.finfo(float).eps)
    else:
        np.testing.assert_array_equal(got, full)
