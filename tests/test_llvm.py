"""The LLVM emitter against JAX: fields and their derivatives as native kernels, for vectors of several widths."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from test_lanes import (
    CASES,
    INSTRUCTIONS,
    QUICK,
    Setup,
    as_function,
    close,
    is_float,
    oracle,
    program_case,
    programs,
    setup,
)

from pykernels import lanes
from pykernels.kernels import cpu, llvm, native
from pykernels.kernels.ir import Argument, Target, Unsupported

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

LANES = 8


def kernel_of(body: Any, arguments: list[Argument], width: int, fma: bool = True, **machine: Any) -> Any:
    """An engine with the compiled kernel of a body."""
    program = llvm.emit(body, arguments, Target(width, fma))
    target = dataclasses.replace(cpu.machine(), **machine)
    return cpu.link(cpu.compile_object(cpu.pack(program, width).payload.encode(), target))


def run(
    body: Any, operands: list[tuple[np.ndarray, bool]], results: list[tuple[tuple[int, ...], Any, bool]], width: int,
    lanes_: int = LANES, **options: Any,
) -> list[np.ndarray]:  # fmt: skip
    """A body over an ensemble, natively. Operands: (array, has lanes); results: (shape without lanes, dtype, has lanes),
    sums over blocks where there are none."""
    arguments = [Argument(x.shape[:-1] if has else x.shape, x.dtype, has, True) for x, has in operands]
    arguments += [Argument(shape, np.dtype(dtype), has) for shape, dtype, has in results]
    engine = kernel_of(body, arguments, width, **options)
    arrays = [np.ascontiguousarray(x) for x, _ in operands]
    arrays += [np.zeros((*shape, lanes_) if has else shape, dtype) for shape, dtype, has in results]
    role = native.Role
    rows = []
    for i, (argument, array) in enumerate(zip(arguments, arrays, strict=True)):
        given_ = (role.INPUT, role.SHARED) if i < len(operands) else (role.RESULT, role.SUM)
        code = native.SUM_DTYPES[array.dtype.name] if given_[1] == role.SUM and not argument.lanes else 0
        rows.append(
            native.Row(given_[not argument.lanes], int(np.prod(argument.shape)), array.dtype.itemsize, code)
        )
    library = native.load()
    assert library is not None
    address = engine.get_function_address("kernel")
    library.run(address, lanes_, width, rows, [a.ctypes.data for a in arrays], 1)
    return arrays[len(operands) :]


def values_and_gradients(
    s: Setup, function: Any, cotangents: list[Any], inputs: Any
) -> tuple[list[Any], list[Any]]:
    floats = [i for i, x in enumerate(inputs) if is_float(x)]

    def of_floats(*chosen: Any) -> tuple[list[Any], list[Any]]:
        merged = list(inputs)
        for i, x in zip(floats, chosen, strict=True):
            merged[i] = x
        outs = list(function(*merged))
        return [o for o in outs if is_float(o)], outs

    _, pull, outs = jax.vjp(of_floats, *[inputs[i] for i in floats], has_aux=True)
    return outs, list(pull(cotangents))


def check(s: Setup, widths: tuple[int, ...]) -> None:
    """A lifted field's values and its cotangents of every input equal those of `jax.vmap`."""
    expected = jax.eval_shape(oracle(s), *s.inputs)
    rng = np.random.default_rng(7)
    cotangents = [
        rng.normal(size=o.shape).astype(o.dtype) for o in expected if jnp.issubdtype(o.dtype, jnp.floating)
    ]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def wanted(inputs: Any, cotangents: Any) -> Any:
        return values_and_gradients(s, oracle(s), cotangents, inputs)

    outs, gradients = wanted(s.inputs, cotangents)
    lifted = as_function(lanes.lift(s.jaxpr, s.lane, "arrays", differentiated=True))
    n, m = len(s.inputs), len(cotangents)

    def body(*refs: Any) -> None:
        values, grads = values_and_gradients(
            s, lifted, [r[...] for r in refs[n : n + m]], [r[...] for r in refs[:n]]
        )
        for ref, value in zip(refs[n + m :], [*values, *grads], strict=True):
            ref[...] = jnp.asarray(value, ref.dtype)

    operands = [*zip(map(np.asarray, s.inputs), s.lane, strict=True), *[(c, True) for c in cotangents]]
    floats = [k for x, k in zip(s.inputs, s.lane, strict=True) if is_float(x)]
    results = [(o.shape[:-1], o.dtype, True) for o in outs]
    results += [(g.shape[:-1] if k else g.shape, g.dtype, k) for g, k in zip(gradients, floats, strict=True)]
    for width in widths:
        got = run(body, operands, results, width)
        close(got[: len(outs)], list(outs))
        close(got[len(outs) :], list(gradients))


@pytest.mark.parametrize("name", CASES)
def test_fields_and_derivatives_equal_vmap(name: str) -> None:
    s = setup(CASES[name], np.float64, LANES)
    if name == "sort":
        with pytest.raises(Unsupported, match=r"^sort$"):
            check(s, (8,))
    else:
        check(s, (8, 2) if len(name) % 3 else (8, 1))


@pytest.mark.parametrize("name", list(CASES)[::4])
def test_single_precision(name: str) -> None:
    check(setup(CASES[name], np.float32, LANES), (8, 4))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    programs(set(INSTRUCTIONS) - {"sort"}),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([1, 4, 8]),
)
def test_random_programs(program: Any, dtype: Any, width: int) -> None:
    check(setup(program_case(program, dtype), dtype, LANES, seed=len(program)), (width,))


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 3e9, -3e9, 1e19, 7.25]
)


def scalar_operations(x: Any, y: Any, i: Any, j: Any) -> list[Any]:
    """Every elementwise operation, on operands of which all pairs occur."""
    a, b = x > y, i > j
    numbers = [
        x + y, x - y, x * y, x / y, -x, abs(x), jnp.maximum(x, y), jnp.minimum(x, y), jnp.sign(x), lax.clamp(-y, x, y),
        lax.rem(x, y), lax.sqrt(x), lax.rsqrt(x), lax.floor(x), lax.ceil(x), lax.round(x),
        lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN), lax.integer_pow(x, 3), lax.integer_pow(x, -2), x * y + x,
        x - y * x, lax.integer_pow(x, 0), jnp.where(a, x, y), lax.select_n(jnp.clip(i, 0, 2), x, y, x + y), lax.square(x),
    ]  # fmt: skip
    integers = [
        i + j, i - j, i * j, lax.div(i, j), lax.rem(i, j), -i, abs(i), jnp.maximum(i, j), jnp.minimum(i, j), jnp.sign(i),
        i & j, i | j, i ^ j, ~i, lax.shift_left(i, j), lax.shift_right_logical(i, j), lax.shift_right_arithmetic(i, j),
        lax.integer_pow(i, 3), x.astype(i.dtype), a.astype(i.dtype), jnp.where(b, i, j),
    ]  # fmt: skip
    masks = [
        x == y, x != y, x < y, x <= y, x > y, x >= y, i == j, i != j, i < j, i <= j, i > j, i >= j, a & b, a | b, a ^ b, ~a,
        lax.is_finite(x), x.astype(bool), i.astype(bool), a == b, a < b, jnp.maximum(a, b),
    ]  # fmt: skip
    others = [
        i.astype(x.dtype),
        a.astype(x.dtype),
        x.astype(np.float32),
        x.astype(np.float64),
        i.astype(np.int64),
        i.astype(np.int32),
    ]
    return [*numbers, *integers, *masks, *others]


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_operations_on_special_values(dtype: Any, integer: Any, width: int) -> None:
    """NaN, infinities, signed zeros, ties, overflow and division by zero come out as XLA's."""
    low, high = np.iinfo(integer).min, np.iinfo(integer).max
    whole = np.array([0, 1, -1, 2, -2, 7, -7, 31, 32, 33, 63, 64, 65, low, high, 100], integer)
    x, y = (g.reshape(-1).astype(dtype) for g in np.meshgrid(SPECIAL, SPECIAL))
    i, j = (g.reshape(-1) for g in np.meshgrid(whole, whole))
    expected = [np.asarray(e) for e in jax.jit(scalar_operations)(x, y, i, j)]

    def body(*refs: Any) -> None:
        for ref, value in zip(refs[4:], scalar_operations(*[r[...] for r in refs[:4]]), strict=True):
            ref[...] = value

    got = run(body, [(v, True) for v in (x, y, i, j)], [((), e.dtype, True) for e in expected], width, x.size)
    for k, (a, e) in enumerate(zip(got, expected, strict=True)):
        if e.dtype.kind == "f":
            np.testing.assert_allclose(a, e, rtol=4 * np.finfo(e.dtype).eps, err_msg=str(k))
            where = ~np.isnan(e)
            np.testing.assert_array_equal(np.signbit(a[where]), np.signbit(e[where]), err_msg=str(k))
        else:
            np.testing.assert_array_equal(a, e, err_msg=str(k))


def test_across_lanes() -> None:
    """The only places where lanes meet: sums (added in the order of the blocks) and whether a mask holds anywhere."""
    x = np.random.default_rng(0).normal(size=LANES)

    def body(x: Any, total: Any, largest: Any, flag: Any, everywhere: Any) -> None:
        v = x[...]
        total[...] = jnp.sum(v)
        largest[...] = jnp.max((v > 1.5).astype(jnp.int32))
        flag[...] = jnp.full(v.shape, jnp.any(v > 1.5))
        everywhere[...] = jnp.full(v.shape, jnp.all(v < 1.5))

    kinds = [((), float, False), ((), np.int32, False), ((), bool, True), ((), bool, True)]
    for width in (1, 2, 8):
        total, largest, flag, everywhere = run(body, [(x, True)], kinds, width)
        blocks = x.reshape(-1, width)
        np.testing.assert_allclose(total, x.sum(), rtol=1e-14)
        assert largest == (blocks > 1.5).any(1).sum()
        np.testing.assert_array_equal(flag, np.repeat((blocks > 1.5).any(1), width))
        np.testing.assert_array_equal(everywhere, np.repeat((blocks < 1.5).all(1), width))


def test_reductions_of_integers_are_bit_by_bit() -> None:
    """Not the largest and the smallest, which they are for masks."""
    i = np.random.default_rng(0).integers(-9, 9, (3, LANES)).astype(np.int32)

    def body(x: Any, either: Any, both: Any) -> None:
        either[...], both[...] = jnp.bitwise_or.reduce(x[...], 0), jnp.bitwise_and.reduce(x[...], 0)

    either, both = run(body, [(i, True)], [((), np.int32, True)] * 2, 4)
    np.testing.assert_array_equal(either, np.bitwise_or.reduce(i, 0))
    np.testing.assert_array_equal(both, np.bitwise_and.reduce(i, 0))


def test_products_fuse_by_the_program_alone() -> None:
    """a * b + c, c + a * b, a * b - c and c - a * b are rounded once where the product is used once, and twice without the
    flag that says the machine can."""
    a = np.array([1 + 2.0**-30] * LANES)
    c = 1 + 2.0**-29  # a * a is this and 2^-60, which is below its rounding

    def body(x: Any, *outs: Any) -> None:
        v = x[...]
        for out, value in zip(outs, [v * v + -c, -c + v * v, v * v - c, c - v * v], strict=True):
            out[...] = value

    results = [((), float, True)] * 4
    fused, plain = (run(body, [(a, True)], results, 8, fma=fma) for fma in (True, False))
    for got, sign in zip(fused, (1, 1, 1, -1), strict=True):
        np.testing.assert_array_equal(got, sign * 2.0**-60)
    for got in plain:
        np.testing.assert_array_equal(got, 0.0)


@pytest.mark.parametrize(
    ("cpu_name", "features", "letter"),
    [("x86-64", "", "b"), ("x86-64", "", ""), ("haswell", "", "d")],
    ids=["SSE2", "SSE2, libm", "AVX2"],
)
def test_other_processors(cpu_name: str, features: str, letter: str) -> None:
    """Code for older x86 processors, which this one runs too: other vectors, no fused multiply-add, other mathematics."""
    if not cpu.machine().triple.startswith("x86_64"):
        pytest.skip("no x86-64 processor")
    x = np.linspace(-3, 3, LANES)

    def body(x: Any, out: Any) -> None:
        v = x[...]
        out[...] = jnp.exp(v) * jnp.sin(v) + jnp.where(v > 0, jnp.sqrt(abs(v)), v / 3)

    expected = np.exp(x) * np.sin(x) + np.where(x > 0, np.sqrt(abs(x)), x / 3)
    for width in (2, 4, 8):
        (got,) = run(
            body,
            [(x, True)],
            [((), float, True)],
            width,
            fma=False,
            cpu=cpu_name,
            features=features,
            mathematics=letter,
        )
        np.testing.assert_allclose(got, expected, rtol=1e-14)


@pytest.mark.parametrize("width", [2, 4])
def test_compiles_for_arm(width: int) -> None:
    """NEON has vectors of two doubles; without libmvec the mathematics is libm's, lane by lane."""
    binding = pytest.importorskip("llvmlite.binding")
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()

    def body(x: Any, out: Any) -> None:
        v = x[...]
        out[...] = jnp.exp(v) + lax.while_loop(lambda y: jnp.any(y < 1), lambda y: y * y + 0.5, v)

    arguments = [Argument((), np.dtype(float), True, True), Argument((), np.dtype(float), True)]
    arm = cpu.Machine("aarch64-unknown-linux-gnu", "generic", "+neon", 16, True, "")
    source = cpu.pack(llvm.emit(body, arguments, Target(width)), width)
    code = cpu.compile_object(source.payload.encode(), arm)
    assert code[:4] == b"\x7fELF" and code[18] == 183  # AArch64


def test_unsupported_names_what_is_missing() -> None:
    def body(x: Any, out: Any) -> None:
        out[...] = lax.lgamma(x[...])

    with pytest.raises(Unsupported, match=r"^lgamma$"):
        kernel_of(body, [Argument((), np.dtype(float), True, True), Argument((), np.dtype(float), True)], 8)

    def half(x: Any, out: Any) -> None:
        out[...] = x[...].astype(jnp.float16).astype(x.dtype)

    with pytest.raises(Unsupported, match="float16"):
        kernel_of(half, [Argument((), np.dtype(float), True, True), Argument((), np.dtype(float), True)], 8)
