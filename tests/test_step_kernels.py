"""The step kernels of the array plan, natively on CPUs and as plain JAX: meaning, batches, derivatives, work in place."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pykernels import primitives, reference
from pykernels.kernels import columns, cpu, native
from pykernels.kernels.passes import Accept, Combine, Finish, Pass, Restore, Save, shape_of
from pykernels.kernels.passes import structs_of as structs

HAS_NATIVE = cpu.unavailable() is None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason=str(cpu.unavailable()))
RUNNERS = [pytest.param("native", marks=needs_native), "xla"]
DTYPES = [np.float32, np.float64]
# One of each kind, with what changes the kernel: a slope that is not read, a weight of one, several results, every option.
WEIGHTS, ERRORS, RTOL, ATOL = (0.3, 0.0, -1 / 3, 1.0), (0.1, 0.2, 0.0, -0.7), 1e-2, 1e-3
SLOTS = 3


def random(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class Inputs:
    """What the passes are tried on; two rows share a slot number and one has none."""

    def __init__(self, rows: int, columns: int, dtype: Any) -> None:
        shape = (rows, columns)
        self.y, self.new, self.error = (random(shape, dtype, i) for i in range(3))
        self.slopes = [random(shape, dtype, 10 + i) for i in range(4)]
        self.h = jnp.asarray(0.1 * (1 + np.arange(rows)), dtype)
        self.buffer = random((SLOTS, *shape), dtype, 5)
        self.slots = jnp.asarray(np.arange(rows) % (SLOTS + 1) - 1, jnp.int32)
        self.accepted = jnp.asarray(np.arange(rows) % 3 != 1)

    def leaves(self) -> list[Any]:
        return jax.tree.leaves(vars(self))


def with_error(i: Inputs, runner: str | None) -> Any:
    return primitives.rk_stage(i.y, i.slopes, i.h, WEIGHTS, ERRORS, runner=runner)


def finished(i: Inputs, runner: str | None) -> Any:
    milestone = (i.buffer, i.slots)
    return primitives.rk_finish(
        i.y, i.slopes, i.h, WEIGHTS, ERRORS, RTOL, ATOL, milestone=milestone, runner=runner
    )


def judged(i: Inputs, runner: str | None) -> Any:
    known: dict[str, Any] = {"new": i.new, "error": i.error}
    return primitives.rk_finish(i.y, i.slopes, i.h, None, ERRORS, RTOL, ATOL, **known, runner=runner)


PASSES: dict[str, Callable[[Inputs, str | None], Any]] = {
    "stage": lambda i, r: primitives.rk_stage(i.y, i.slopes, i.h, WEIGHTS, runner=r),
    "stage without y": lambda i, r: primitives.rk_stage(None, i.slopes, i.h, WEIGHTS, runner=r),
    "stage in place": lambda i, r: primitives.rk_stage(i.y, i.slopes, i.h, WEIGHTS, in_place=True, runner=r),
    "stage and error": with_error,
    "pull back": lambda i, r: primitives.rk_combine(
        [i.y], i.h, [[1.0], [0.0], [0.0]], [[0.0], [0.3], [-1 / 3]], runner=r
    ),
    "finish": finished,
    "finish, known": judged,
    "accept": lambda i, r: primitives.rk_accept([i.y, i.error], [i.new, i.slopes[0]], i.accepted, runner=r),
    "save": lambda i, r: primitives.milestone_save(i.buffer, jnp.int32(1), i.y, runner=r),
    "save by row": lambda i, r: primitives.milestone_save(i.buffer, i.slots, i.y, runner=r),
    "restore": lambda i, r: primitives.milestone_restore(i.buffer, jnp.int32(2), runner=r),
    "restore by row": lambda i, r: primitives.milestone_restore(i.buffer, i.slots, runner=r),
}


def combined(weights: Sequence[float], i: Inputs) -> np.ndarray:
    """sum of w k, in float64."""
    return sum(w * np.asarray(k, np.float64) for w, k in zip(weights, i.slopes, strict=True))


def expected(name: str, i: Inputs) -> list[np.ndarray]:
    """What a pass returns, in NumPy and float64."""
    y, new, error, h = (np.asarray(x, np.float64) for x in (i.y, i.new, i.error, i.h[:, None]))
    buffer, slots = np.asarray(i.buffer, np.float64).copy(), np.asarray(i.slots)
    stage, estimate = y + h * combined(WEIGHTS, i), h * combined(ERRORS, i)

    def square(error: np.ndarray, new: np.ndarray) -> np.ndarray:
        scale = ATOL + RTOL * np.maximum(abs(y), abs(new))
        return np.sum((error / scale) ** 2, axis=1)

    def saved(slots: np.ndarray) -> np.ndarray:
        for row, slot in enumerate(slots):
            if 0 <= slot < SLOTS:
                buffer[slot, row] = y[row]
        return buffer

    def restored(slots: np.ndarray) -> np.ndarray:
        found = [buffer[s, r] if 0 <= s < SLOTS else np.zeros(y.shape[1]) for r, s in enumerate(slots)]
        return np.stack(found) if found else np.zeros(y.shape)

    ok = np.asarray(i.accepted)[:, None]
    return {
        "stage": lambda: [stage],
        "stage without y": lambda: [stage - y],
        "stage in place": lambda: [stage],
        "stage and error": lambda: [stage, estimate],
        "pull back": lambda: [y, 0.3 * h * y, -1 / 3 * h * y],
        "finish": lambda: [stage, square(estimate, stage), saved(slots)],
        "finish, known": lambda: [new, square(error + estimate, new)],
        "accept": lambda: [
            np.where(ok, new, y),
            np.where(ok, np.asarray(i.slopes[0], np.float64), error),
        ],
        "save": lambda: [saved(np.full(len(slots), 1))],
        "save by row": lambda: [saved(slots)],
        "restore": lambda: [restored(np.full(len(slots), 2))],
        "restore by row": lambda: [restored(slots)],
    }[name]()


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", PASSES)
def test_every_pass_means_what_it_says(name: str, runner: str) -> None:
    """Odd sizes, both dtypes, several rows and one, nothing at all."""
    cases = [(shape, np.float32) for shape in [(1, 1), (5, 7), (2, 1023), (1, 20_001), (0, 7), (3, 0)]]
    cases = [*cases, ((5, 7), np.float64), ((2, 1023), np.float64)]
    for shape, dtype in cases if runner == "native" else cases[1::3]:
        inputs = Inputs(*shape, dtype)
        before = [np.asarray(leaf) for leaf in inputs.leaves()]
        outs = jax.tree.leaves(jax.jit(lambda i=inputs: PASSES[name](i, runner))())
        # Sums of five products of numbers below ten, and of up to 20,001 squares: relative to the largest one.
        for out, wanted in zip(outs, expected(name, inputs), strict=True):
            assert out.dtype == dtype and out.shape == wanted.shape
            size = np.max(abs(wanted), initial=1.0)
            np.testing.assert_allclose(out, wanted, rtol=0, atol=30 * np.finfo(dtype).eps * size)
        # Nothing that was not donated has changed.
        for leaf, old in zip(inputs.leaves(), before, strict=True):
            np.testing.assert_array_equal(leaf, old)


@needs_native
def test_a_million_columns_and_three() -> None:
    """The kernel for large states, whose results go past the caches, on a size that no vector divides."""
    inputs = Inputs(1, 1_000_003, np.float32)
    for name in ("stage and error", "finish"):
        for out, plain in zip(PASSES[name](inputs, "native"), PASSES[name](inputs, "xla"), strict=True):
            np.testing.assert_allclose(out, plain, rtol=2e-5, atol=1e-6)  # a sum of 10^6 in another order


def pass_objects(dtype: Any) -> list[Pass]:
    plain, scaled = ((1.0, 0.0), (0.0, 0.0)), ((0.0, 0.3), (0.0, -1 / 3))
    dtype = np.dtype(dtype)
    finish = (WEIGHTS, ERRORS, RTOL, ATOL)
    return [
        Combine(dtype, plain, scaled),
        Combine(dtype, plain, scaled, replaces=True),
        Finish(dtype, *finish, given=False, partial=True, slots=SLOTS),
        Finish(dtype, *finish, given=True, partial=False, slots=None),
        Accept(dtype, 2),
        Save(dtype, SLOTS),
        Restore(dtype, SLOTS),
    ]


def operands_of(pass_: Pass, rows: int, columns: int) -> list[Any]:
    def one(i: int, struct: jax.ShapeDtypeStruct) -> Any:
        if struct.dtype == bool:
            return jnp.arange(rows) % 2 == 0
        if struct.dtype == np.int32:
            return jnp.arange(rows, dtype=np.int32) % (SLOTS + 1) - 1
        return random(struct.shape, struct.dtype, i)

    return [one(i, struct) for i, struct in enumerate(structs(pass_.operands, rows, columns))]


def native_results(pass_: Pass, operands: Sequence[Any]) -> list[jax.Array]:
    """Through XLA, compiled anew."""
    return jax.jit(lambda *x: columns.run(pass_, x))(*operands)


@needs_native
def test_the_same_bits_for_any_number_of_threads() -> None:
    for pass_ in pass_objects(np.float32):
        for shape in [(1, 100_003), (37, 501)]:
            operands = operands_of(pass_, *shape)
            assert shape_of(pass_, operands) == shape
            run = columns.standalone(pass_, *shape)
            one, *others = (run([np.asarray(x) for x in operands], threads) for threads in (1, 2, 3, 7))
            for other in (*others, native_results(pass_, operands)):
                for a, b in zip(one, other, strict=True):
                    np.testing.assert_array_equal(a, b)


@needs_native
def test_streaming_stores_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole vectors, where results may go past the caches, and others, where they may not."""
    for pass_ in pass_objects(np.float32):
        for shape in [(3, 1024), (3, 1000)]:
            operands = operands_of(pass_, *shape)
            monkeypatch.setattr(columns, "STREAMED_BYTES", 1 << 40)
            ordinary = native_results(pass_, operands)
            monkeypatch.setattr(columns, "STREAMED_BYTES", 0)
            for a, b in zip(ordinary, native_results(pass_, operands), strict=True):
                np.testing.assert_array_equal(a, b)
    streamed, ordinary = (columns.source_of(Save(np.dtype(np.float32), SLOTS), on) for on in (True, False))
    assert "!nontemporal" in ir_of(streamed) and "!nontemporal" not in ir_of(ordinary)


def ir_of(source: Any) -> str:
    program, _ = cpu.unpack(source.payload.encode())
    return program.ir


@needs_native
def test_everything_is_written() -> None:
    """With results filled with NaN before the kernel runs."""
    library = native.load()
    assert library is not None
    library.set_poison(True)
    try:
        for pass_ in pass_objects(np.float32):
            operands = operands_of(pass_, 3, 777)
            plain = reference.run_pass(pass_, operands)
            for a, b in zip(native_results(pass_, operands), plain, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    finally:
        library.set_poison(False)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_fails_alone(runner: str, bad: float) -> None:
    """Its sum is not finite, whatever the error says; no bit of another row changes."""
    inputs = Inputs(4, 333, np.float32)
    good = [PASSES[name](inputs, runner) for name in ("finish", "finish, known")]
    for field in ("y", "new", "error"):
        broken = Inputs(4, 333, np.float32)
        setattr(broken, field, getattr(inputs, field).at[2, 100].set(bad))
        found = [PASSES[name](broken, runner) for name in ("finish", "finish, known")]
        for name, (_, square, *_), (_, before, *_) in zip(("finish", "known"), found, good, strict=True):
            if field in (("new", "error") if name == "known" else ("y",)):
                assert not np.isfinite(square[2]), (name, field)
            np.testing.assert_array_equal(np.delete(square, 2), np.delete(before, 2))
        np.testing.assert_array_equal(np.delete(found[0][0], 2, 0), np.delete(good[0][0], 2, 0))


@pytest.mark.parametrize("name", PASSES)
def test_vmap_adds_rows(name: str) -> None:
    """Over everything and over each operand alone; a buffer's batch is its second axis, as rows are. Kernels or not, it is
    the same rule."""
    runner = "native" if HAS_NATIVE and name == "finish" else "xla"
    inputs = Inputs(2, 130, np.float64)
    others = Inputs(2, 130, np.float64)
    others.y, others.h, others.slots = -others.y, 2 * others.h, others.slots + 1
    others.buffer, others.accepted = 2 * others.buffer, ~others.accepted
    axes = {"buffer": 1}

    def on(**changed: Any) -> Any:
        instance = Inputs(2, 130, np.float64)
        vars(instance).update(changed)
        return PASSES[name](instance, runner)

    each = [["y"], ["h"], ["slots"], ["buffer"], ["y", "h", "slots", "buffer", "accepted"]]
    for fields in each:
        pair = [[getattr(i, f) for f in fields] for i in (inputs, others)]
        stacked = [jnp.stack([a, b], axes.get(f, 0)) for f, a, b in zip(fields, *pair, strict=True)]
        in_axes = tuple(axes.get(f, 0) for f in fields)
        one = jax.jit(lambda *x, f=fields: on(**dict(zip(f, x, strict=True))))
        together = jax.tree.leaves(jax.jit(jax.vmap(one, in_axes=in_axes))(*stacked))
        for k in range(2):
            alone = jax.tree.leaves(one(*pair[k]))
            for a, b in zip(together, alone, strict=True):
                np.testing.assert_allclose(a[k], b, rtol=1e-13, atol=1e-13)


def plain_stage(y: Any, slopes: Any, h: Any) -> Any:
    def total(weights: Any) -> Any:
        return h[:, None] * sum(w * k for w, k in zip(weights, slopes, strict=True))

    return y + total(WEIGHTS), total(ERRORS)


@pytest.mark.parametrize("runner", RUNNERS)
def test_derivatives_of_stages(runner: str) -> None:
    """Forwards, backwards and twice, with respect to everything, as of the formula."""
    i = Inputs(3, 70, np.float64)
    point = (i.y, i.slopes, i.h)

    def ours(y: Any, slopes: Any, h: Any) -> Any:
        return primitives.rk_stage(y, slopes, h, WEIGHTS, ERRORS, runner=runner)

    def loss(f: Any) -> Any:
        return lambda *x: jnp.sum(f(*x)[0] ** 3) + jnp.sum(jnp.sin(f(*x)[1]))

    tangent = jax.tree.map(lambda x: jnp.cos(x), point)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f: Any) -> Any:
        gradient = jax.grad(loss(f), argnums=(0, 1, 2))
        return jax.jvp(f, point, tangent), jax.jvp(gradient, point, tangent)

    for a, b in zip(*(jax.tree.leaves(derivatives(f)) for f in (ours, plain_stage)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_finished_step_has_the_new_states_derivative(runner: str) -> None:
    """The sum is a constant; the saved milestone's cotangent reaches y."""
    i = Inputs(2, 90, np.float64)

    def ours(y: Any, slopes: Any, buffer: Any) -> Any:
        new, square, saved = primitives.rk_finish(
            y, slopes, i.h, WEIGHTS, ERRORS, RTOL, ATOL, milestone=(buffer, i.slots), runner=runner
        )
        return jnp.sum(new**2) + jnp.sum(square) + jnp.sum(jnp.sin(saved))

    def plain(y: Any, slopes: Any, buffer: Any) -> Any:
        new, _ = plain_stage(y, slopes, i.h)
        saved = buffer.at[i.slots[1], 1].set(y[1])  # row 0 has no slot
        return jnp.sum(new**2) + jnp.sum(jnp.sin(saved))

    gradients = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(i.y, i.slopes, i.buffer) for f in (ours, plain)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("runner", RUNNERS)
def test_cotangents_of_choices_and_milestones(runner: str) -> None:
    i = Inputs(4, 65, np.float64)

    def loss(f: Any) -> Any:
        return lambda *x: sum(jnp.sum(jnp.sin((n + 1) * out)) for n, out in enumerate(jax.tree.leaves(f(*x))))

    def checked(ours: Any, plain: Any, *point: Any) -> None:
        everything = tuple(range(len(point)))
        found = [jax.jit(jax.grad(loss(f), argnums=everything))(*point) for f in (ours, plain)]
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)

    ok = i.accepted[:, None]
    checked(
        lambda a, b: primitives.rk_accept([a, 2 * a], [b, 3 * b], i.accepted, runner=runner),
        lambda a, b: [jnp.where(ok, b, a), jnp.where(ok, 3 * b, 2 * a)],
        i.y,
        i.new,
    )
    there = i.slots >= 0
    kept = jnp.where(there, i.slots, SLOTS)
    rows = jnp.arange(4)
    checked(
        lambda buffer, y: primitives.milestone_save(buffer, i.slots, y, runner=runner),
        lambda buffer, y: buffer.at[kept, rows].set(y, mode="drop"),
        i.buffer,
        i.y,
    )
    checked(
        lambda buffer: primitives.milestone_restore(buffer, i.slots, runner=runner),
        lambda buffer: jnp.where(there[:, None], buffer[jnp.maximum(i.slots, 0), rows], 0),
        i.buffer,
    )


@pytest.mark.parametrize("runner", RUNNERS)
def test_donated_and_kept_inputs(runner: str) -> None:
    """A pass in place is right whether its operand is needed afterwards, given away, or two operands in one."""
    i = Inputs(3, 4100, np.float32)
    wanted = [np.asarray(x) for x in (i.y + i.h[:, None] * i.new, i.y)]

    def stage(y: Any, k: Any) -> Any:
        return primitives.rk_stage(y, [k], i.h, [1.0], in_place=True, runner=runner)

    kept, before = jax.jit(lambda y, k: (stage(y, k), y * 1))(i.y, i.new)
    # The multiply-add may be fused or not.
    np.testing.assert_allclose(kept, wanted[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(before, wanted[1])
    np.testing.assert_allclose(jax.jit(lambda y: stage(y, y))(i.y), i.y * (1 + i.h[:, None]), rtol=1e-6)
    given = jnp.copy(i.y)
    np.testing.assert_array_equal(jax.jit(stage, donate_argnums=0)(given, i.new), kept)
    assert given.is_deleted()
    same = jax.jit(lambda y, ok: primitives.rk_accept([y, y], [-y, y], ok, runner=runner))(i.y, i.accepted)
    np.testing.assert_array_equal(same[0], jnp.where(i.accepted[:, None], -i.y, i.y))
    np.testing.assert_array_equal(same[1], i.y)


def loop(runner: str, slots: int) -> Callable[..., Any]:
    """Attempts with everything: a stage, a judgement, milestones, acceptance."""

    def run(y: jax.Array, k: jax.Array, buffer: jax.Array) -> Any:
        h = jnp.full(y.shape[0], 1e-3, y.dtype)

        def attempt(i: Any, carry: Any) -> Any:
            y, k, buffer, total = carry
            new, error = primitives.rk_stage(y, [k], h, [1.0], [0.5], runner=runner)
            slope = jnp.roll(new, 1, axis=1)  # a field, which no pass can be fused with
            milestone = (buffer, jnp.where(i % 2 == 0, i // 2, -1).astype(jnp.int32))
            _, square, buffer = primitives.rk_finish(
                y,
                [slope],
                h,
                None,
                [-0.5],
                1e-3,
                1e-6,
                new=new,
                error=error,
                milestone=milestone,
                runner=runner,
            )
            y, k = primitives.rk_accept([y, k], [new, slope], square >= 0, runner=runner)
            return y, k, buffer, total + square

        return lax.fori_loop(0, 2 * slots, attempt, (y, k, buffer, jnp.zeros(y.shape[0], y.dtype)))

    return jax.jit(run, donate_argnums=(0, 1, 2))


def in_loops(program: str) -> list[str]:
    """The instructions of a compiled program but for those of its entry."""
    return [line for part in program.split("\n\n") if "ENTRY" not in part for line in part.splitlines()]


@needs_native
def test_no_copies_in_the_loop() -> None:
    """Neither a state nor the milestone buffer is copied or sliced per attempt, and nothing grows with the buffer."""
    rows, size = 2, 3001
    spaces = []
    for slots in (4, 64):
        y, k, buffer = (random((*n, rows, size), np.float32) for n in ((), (), (slots,)))
        compiled = loop("native", slots).lower(y, k, buffer).compile()
        moved = re.compile(
            rf"= f32\[({slots},)?{rows},{size}\]\S* (copy|dynamic-update-slice|dynamic-slice|select)\("
        )
        assert not [line for line in in_loops(compiled.as_text()) if moved.search(line)]
        spaces.append(compiled.memory_analysis().temp_size_in_bytes)
    assert spaces[0] == spaces[1] < 8 * y.nbytes
    # The search finds such a line where there is one.
    plain = loop("xla", 4).lower(*(random((*n, rows, size), np.float32) for n in ((), (), (4,)))).compile()
    assert [line for line in in_loops(plain.as_text()) if "dynamic-update-slice(" in line]


@needs_native
def test_a_loop_of_passes_is_that_of_plain_jax() -> None:
    def inputs() -> list[jax.Array]:
        return [random(shape, np.float64) for shape in ((2, 300), (2, 300), (4, 2, 300))]

    for a, b in zip(loop("native", 4)(*inputs()), loop("xla", 4)(*inputs()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_which_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    large, half = Accept(np.dtype(np.float32), 1), Accept(np.dtype(np.float16), 1)
    chosen = primitives.pass_runner_of
    assert chosen("tpu", large, 1, 10**6) == ("xla", "no step kernels on tpu")
    asked = Accept(np.dtype(np.float32), 1, runner="xla")
    assert chosen("cpu", asked, 1, 10**6) == ("xla", "asked for by config")
    if HAS_NATIVE:
        assert chosen("cpu", large, 1, 10**6) == ("native", "the default")
        assert chosen("cpu", large, 4, 8)[0] == "xla"  # XLA's loops are faster in the cache
        assert chosen("cpu", half, 1, 10**6) == ("xla", "no native code for float16")
    monkeypatch.setattr(cpu, "unavailable", lambda: "there is no compiler")
    assert chosen("cpu", large, 1, 10**6) == ("xla", "there is no compiler")
    inputs = Inputs(2, 11, np.float32)
    with pytest.raises(ValueError, match=r"'native'.*there is no compiler"):
        primitives.rk_accept([inputs.y], [inputs.new], inputs.accepted, runner="native")
    with pytest.raises(ValueError, match=r"'pallas'.*not on cpu"):
        primitives.rk_accept([inputs.y], [inputs.new], inputs.accepted, runner="pallas")


@needs_native
def test_the_lowered_program_holds_the_kernel() -> None:
    """For CPUs only, and only where it pays; one program may be for several platforms."""

    def stage(y: Any, k: Any) -> Any:
        return primitives.rk_stage(y, [k], jnp.float32(0.1), [1.0])

    def lowered(size: int, *platforms: str) -> str:
        struct = jax.ShapeDtypeStruct((1, size), np.float32)
        return jax.jit(stage).trace(struct, struct).lower(lowering_platforms=platforms).as_text()

    assert native.PASS_TARGET in lowered(10**6, "cpu") and native.PASS_TARGET not in lowered(100, "cpu")
    assert native.PASS_TARGET not in lowered(10**6, "tpu") and native.PASS_TARGET in lowered(
        10**6, "cpu", "tpu"
    )


def test_half_precision_is_plain_jax() -> None:
    y = random((2, 100), np.float16)
    out = primitives.rk_stage(y, [y], jnp.float16(0.5), [1.0])
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, 1.5 * y, rtol=1e-3)


REFUSED: dict[str, Callable[[jax.Array], Any]] = {
    "weights": lambda y: primitives.rk_stage(y, [y], 0.1, [1.0, 2.0]),
    "error weights": lambda y: primitives.rk_stage(y, [y], 0.1, [1.0], [1.0, 2.0]),
    "nothing": lambda y: primitives.rk_stage(None, [], 0.1, []),
    "columns": lambda y: primitives.rk_stage(y, [y[:, 1:]], 0.1, [1.0]),
    "step sizes": lambda y: primitives.rk_stage(y, [y], jnp.ones(5), [1.0]),
    "error weights at the end": lambda y: primitives.rk_finish(y, [y], 0.1, [1.0], [1.0, 2.0], 1e-3, 1e-6),
    "state and weights": lambda y: primitives.rk_finish(y, [y], 0.1, [1.0], [1.0], 1e-3, 1e-6, new=y),
    "neither": lambda y: primitives.rk_finish(y, [y], 0.1, None, [1.0], 1e-3, 1e-6),
    "buffer": lambda y: primitives.milestone_save(jnp.zeros((3, 2, 8)), jnp.int32(0), y),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        REFUSED[name](random((2, 9), np.float64))


def test_one_step_size_for_all_rows_and_unused_slopes() -> None:
    """A scalar will do; a slope of weight zero is not even looked at."""
    y = random((3, 50), np.float64)
    bad = jnp.full_like(y, jnp.nan)
    out = primitives.rk_stage(y, [y, bad], jnp.float64(0.5), [1.0, 0.0])
    np.testing.assert_allclose(out, 1.5 * y, rtol=1e-15)
    new, square = primitives.rk_finish(y, [y, bad], 0.5, [1.0, 0.0], [1.0, 0.0], RTOL, ATOL)
    np.testing.assert_allclose(new, 1.5 * y, rtol=1e-15)
    assert np.all(np.isfinite(square))


def test_uninitialized_buffers() -> None:
    """Of any shape and dtype; two of one shape are two buffers; writing them is like writing zeros."""

    @jax.jit
    def two(x: jax.Array) -> Any:
        a, b = (primitives.uninitialized((3, 5), np.float32, number=i) for i in range(2))
        return a.at[:].set(x), b.at[:].set(2 * x), primitives.uninitialized((0, 2), np.int32)

    x = random((3, 5), np.float32)
    a, b, nothing = two(x)
    np.testing.assert_array_equal(a, x)
    np.testing.assert_array_equal(b, 2 * x)
    assert nothing.shape == (0, 2) and nothing.dtype == np.int32
    assert primitives.uninitialized((), np.float64).shape == ()
