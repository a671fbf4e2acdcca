"""Whole solves by the native runner: against the portable one, bit for bit where that is promised, and in every process."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import pykernels as pk
from pykernels.kernels import cpu, elf, identity, llvm, native
from pykernels.kernels.body import Kernel
from pykernels.kernels.ir import Argument, Target

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

NATIVE, PORTABLE = pk.Config(runner="native"), pk.Config(runner="xla")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test compiles anew: nothing comes from an earlier run's cache on disk."""
    monkeypatch.setattr(cpu.compiler, "cache", cpu.DiskCache(tmp_path / "objects"))
    return tmp_path / "objects"


def lorenz(t: Any, y: Any, p: Any) -> Any:
    return jnp.stack([p[0] * (y[1] - y[0]), y[0] * (p[1] - y[2]) - y[1], y[0] * y[1] - p[2] * y[2]])


def ensemble(lanes: int, dtype: Any = np.float64) -> tuple[jax.Array, jax.Array]:
    rho = np.linspace(0.0, 28.0, lanes)
    p = np.stack([np.full(lanes, 10.0), rho, np.full(lanes, 8 / 3)], axis=-1)
    return jnp.asarray(np.tile([1.0, 0.5, 0.2], (lanes, 1)), dtype), jnp.asarray(p, dtype)


def value_and_gradients(
    y0s: Any, p: Any, config: pk.Config | None = NATIVE, field: Any = lorenz, **settings: Any
) -> tuple[Any, ...]:
    options: dict[str, Any] = {"step": pk.Adaptive(1e-6, 1e-9), "dt0": 0.01, "config": config} | settings

    def loss(y0s: Any, p: Any, shared: Any) -> Any:
        sol = pk.solve_ensemble(
            lambda t, y, args: shared * field(t, y, args), y0s, 0.0, 1.0, p, in_axes=(0, 0), **options
        )
        return jnp.sum(sol.ys**2), (sol.ys, sol.stats.accepted, sol.status)

    (value, rest), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        y0s, p, jnp.ones((), y0s.dtype)
    )
    return value, *rest, *gradients


def same_bits(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("dtype", "lanes"), [(np.float64, n) for n in (1, 2, 7, 1023)] + [(np.float32, 100)])
def test_equals_the_portable_runner(lanes: int, dtype: Any) -> None:
    y0s, p = ensemble(lanes, dtype)
    step = pk.Adaptive(1e-6, 1e-9) if dtype == np.float64 else pk.Adaptive(1e-4, 1e-6)
    ours, theirs = (value_and_gradients(y0s, p, config, step=step) for config in (NATIVE, PORTABLE))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    if dtype == np.float64:
        np.testing.assert_array_equal(ours[2], theirs[2])
    else:  # rounding may turn a borderline decision
        assert np.mean(ours[2] != theirs[2]) < 0.05
    tolerance = 1e-11 if dtype == np.float64 else 1e-3
    for i in (0, 1, 4, 5, 6):
        scale = np.max(np.abs(theirs[i]))
        np.testing.assert_allclose(ours[i], theirs[i], rtol=0, atol=tolerance * scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "save"),
    [
        (pk.euler, False),
        (pk.bosh3, False),
        (pk.bosh3, True),
        (pk.dopri8, False),
        (pk.vern7, True),
        (pk.rk4, True),
    ],
    ids=lambda value: getattr(value, "name", "saved" if value else "final"),
)
def test_methods_equal_the_portable_runner(method: Any, save: bool) -> None:
    y0s, p = ensemble(6)
    step = pk.Fixed(20) if method.error is None else pk.Adaptive(1e-5, 1e-8)
    dates = jnp.array([0.0, 0.1, 0.55, 1.0]) if save else None
    results = []
    for config in (NATIVE, PORTABLE):

        def run(y0s: Any, p: Any, config: Any = config) -> Any:
            sol = pk.solve_ensemble(
                lorenz,
                y0s,
                0.0,
                1.0,
                p,
                in_axes=(0, 0),
                method=method,
                step=step,
                save_at=dates,
                config=config,
            )
            return jnp.sum(sol.ys**2), sol

        results.append(jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(y0s, p))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("problem", problems.PROBLEMS, ids=lambda problem: problem.name)
def test_shared_problems_are_native(problem: Any) -> None:
    explained = pk.explain(problem.field, problem.y0(), problem.t0, problem.t1, problem.args())
    assert explained.runner == "native", explained.runner_reason


def test_a_lane_does_not_depend_on_its_block() -> None:
    """Each lane's numbers are the same wherever it stands and whoever is beside it: other blocks, other neighbours."""
    y0s, p = ensemble(64)
    order = np.random.default_rng(0).permutation(64)
    _, ys, accepted, _, dy, dp, _ = value_and_gradients(y0s, p)
    _, *moved = value_and_gradients(y0s[order], p[order])
    same_bits([x[order] for x in (ys, accepted, dy, dp)], [*moved[:2], *moved[3:5]])
    _, *part = value_and_gradients(y0s[:33], p[:33])
    same_bits([x[:33] for x in (ys, accepted, dy, dp)], [*part[:2], *part[3:5]])


def kernels(lanes: int, shared: bool = False) -> tuple[list[Kernel], list[Any]]:
    """The forward and backward kernels of a solve, and the forward one's inputs."""
    y0s, p = ensemble(lanes)
    seen: list[Any] = []

    class Spy(pk.Milestones):
        def integrate(self, solve: Any, inputs: Any) -> Any:
            seen.append((solve, inputs))
            return super().integrate(solve, inputs)

    args, axis = (p[0], None) if shared else (p, 0)
    pk.solve_ensemble(
        lorenz, y0s, 0.0, 1.0, args, in_axes=(0, axis), step=pk.Adaptive(1e-6, 1e-9), adjoint=Spy()
    )
    ((solve, inputs),) = seen
    wrt = tuple(i >= solve.first_y for i in range(len(inputs)))
    record = pk.Milestones().record(solve)
    return [Kernel(solve, record), Kernel(solve, record, wrt)], inputs


@pytest.mark.parametrize("shared", [False, True], ids=["lane arguments", "shared arguments"])
def test_threads_and_undefined_memory_do_not_matter(shared: bool) -> None:
    """One, two and eight threads give identical bits, and so does memory full of NaN."""
    lanes = 1023
    (forward, backward), inputs = kernels(lanes, shared)
    operands = [np.asarray(x) for x in inputs]
    library = native.load()
    assert library is not None
    run_forward, run_backward = (cpu.standalone(kernel, lanes) for kernel in (forward, backward))
    results = []
    for threads, poison in [(1, False), (2, False), (8, False), (2, True)]:
        library.set_poison(poison)
        try:
            ys, counts, decisions, *milestones = run_forward(operands, threads)
            attempts = counts[1].copy()
            cotangents = 2 * ys
            back = run_backward([*operands, attempts, decisions, *milestones, cotangents], threads)
        finally:
            library.set_poison(False)
        results.append([ys, counts, *back])
    assert np.all(results[0][1][0] == 0)
    for other in results[1:]:
        same_bits(results[0], other)


def test_replay_is_the_forward_pass() -> None:
    """One emitter rounds both: gradients are the same bits with any number of milestones, at tolerances near rounding."""
    y0s, p = ensemble(40, np.float32)
    settings = {"step": pk.Adaptive(1e-7, 1e-9), "max_steps": 512}
    full = value_and_gradients(y0s, p, adjoint=pk.Milestones(512, 1), **settings)
    for adjoint in (pk.Milestones(), pk.Milestones(3, 64), pk.Milestones(7, 8)):
        same_bits(full, value_and_gradients(y0s, p, adjoint=adjoint, **settings))


def test_a_diverging_lane_changes_no_other() -> None:
    y0s, p = ensemble(17)
    good = value_and_gradients(y0s, p, throw=False)
    bad = value_and_gradients(y0s.at[5].set(jnp.inf), p, throw=False)
    others = np.arange(17) != 5
    assert np.isnan(bad[1][5]).all() and bad[3][5] != 0
    same_bits([x[others] for x in good[1:6]], [x[others] for x in bad[1:6]])


@pytest.mark.slow
def test_a_million_lanes() -> None:
    lanes = 1_000_003
    y0s = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (lanes, 1)), np.float32)

    def loss(y0s: Any) -> Any:
        sol = pk.solve_ensemble(
            lambda t, y, k: -k * y, y0s, 0.0, 1.0, jnp.float32(0.7), in_axes=(0, None), step=pk.Fixed(4),
            method=pk.rk4, config=NATIVE,
        )  # fmt: skip
        return jnp.sum(sol.ys)

    gradient = jax.jit(jax.grad(loss))(y0s)
    np.testing.assert_allclose(gradient, np.exp(-0.7), rtol=1e-5)


def test_what_is_not_native_says_so() -> None:
    y0 = jnp.ones(3)

    def sorting(t: Any, y: Any, args: Any) -> Any:
        return -jnp.sort(y)

    explained = pk.explain(sorting, y0, 0.0, 1.0)
    assert (explained.runner, explained.runner_reason) == ("xla", "no native code for sort")
    assert bool(pk.solve(sorting, y0, 0.0, 1.0).ok)
    with pytest.raises(ValueError, match="no native code for sort"):
        pk.solve(sorting, y0, 0.0, 1.0, config=NATIVE)
    assert pk.explain(lorenz, y0, 0.0, 1.0, y0, config=PORTABLE).runner_reason == "asked for by config"
    assert pk.explain(lorenz, y0, 0.0, 1.0, y0, adjoint=pk.BoundedTree()).runner == "xla"
    native_one = pk.explain(lorenz, y0, 0.0, 1.0, y0)
    assert native_one.runner == "native" and "native" in str(native_one)


def test_without_the_library_the_portable_runner_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "it was not built")
    explained = pk.explain(lorenz, jnp.ones(3), 0.0, 1.0, jnp.ones(3))
    assert (explained.runner, explained.runner_reason) == ("xla", "it was not built")
    y0s, p = ensemble(3)
    lowered = jax.jit(lambda y, p: pk.solve_ensemble(lorenz, y, 0.0, 1.0, p, in_axes=(0, 0)).ys).lower(y0s, p)
    assert native.TARGET not in lowered.as_text()


def test_the_lowered_program_holds_the_kernel_and_no_address() -> None:
    y0s, p = ensemble(5)

    def loss(y: Any, p: Any) -> Any:
        return jnp.sum(pk.solve_ensemble(lorenz, y, 0.0, 1.0, p, in_axes=(0, 0)).ys)

    texts = []
    for _ in range(2):
        jax.clear_caches()
        texts.append(jax.jit(jax.grad(loss)).lower(y0s, p).as_text())
    assert texts[0].count(f"@{native.TARGET}") == 2
    assert texts[0] == texts[1], (
        "the program's text is the same every time: JAX's persistent cache can find it"
    )


def test_nothing_unused_is_computed() -> None:
    """Under jit all inputs are tracers: what is not asked for is removed before kernels are made."""
    y0s, p = ensemble(5)

    def loss(y: Any, p: Any) -> Any:
        return jnp.sum(pk.solve_ensemble(lorenz, y, jnp.asarray(0.0), 1.0, p, in_axes=(0, 0)).ys)

    def calls(function: Any, *args: Any) -> list[str]:
        text = jax.jit(function).lower(*args).compile().as_text()
        return [line.split(" custom-call(")[0] for line in text.splitlines() if f'"{native.TARGET}"' in line]

    forward, backward = calls(jax.grad(loss, 1), y0s, p)
    assert "s32[" in forward and "f64[5]" not in backward, "no cotangents of t0 and t1"
    everything = calls(jax.grad(lambda t1, y, p: jnp.sum(pk.solve_ensemble(
        lorenz, y, 0.0, t1, p, in_axes=(0, 0)).ys)), jnp.full(5, 1.0), y0s, p)  # fmt: skip
    assert "f64[5]" in everything[1]
    (value_only,) = calls(lambda p: jax.vjp(loss, y0s, p)[0], p)
    assert value_only.count("f64[") == 1, "no milestones"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other object files")
def test_code_and_constants_are_one_section() -> None:
    """Sections of their own may be linked further apart than code can reach: the linker then ends the process."""
    for kernel in kernels(4, shared=True)[0]:
        source = cpu.source_of(cpu.as_native(kernel), 4)
        assert isinstance(source, cpu.Source)
        code = cpu.compile_object(source.payload.encode(), cpu.machine())
        found = elf.sections(code)
        assert [s.name for s in found if s.flags & 2] == [".text"], "nothing else is loaded"
        assert code[:4] == b"\x7fELF" and elf.one_section(code) == code
        assert elf.far_calls(code) == []
    assert elf.one_section(b"no ELF") == b"no ELF"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other object files")
def test_calls_of_other_libraries_stay_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker's table of other libraries' functions is a section of its own: code must not need it."""

    def pendulum(t: Any, y: Any, p: Any) -> Any:
        return jnp.stack([y[1], -p * jnp.sin(y[0])])

    y0s = jnp.ones((4, 2))
    payloads: list[bytes] = []
    original = cpu.compiler.object_code

    def caught(key: str, payload: bytes) -> bytes:
        payloads.append(payload)
        return original(key, payload)

    monkeypatch.setattr(cpu.compiler, "object_code", caught)
    sols = pk.solve_ensemble(pendulum, y0s, 0.0, 1.0, 9.0, config=pk.Config(runner="native"))
    assert np.isfinite(np.asarray(sols.ys)).all() and payloads
    monkeypatch.setattr(elf, "one_section", lambda code: code)
    plain = cpu.compile_object(payloads[0], cpu.machine())
    monkeypatch.undo()
    assert platform.machine() != "x86_64" or elf.far_calls(plain), "this field calls sin"
    assert elf.far_calls(elf.one_section(plain)) == []


def test_object_code_on_disk(own_cache: Path) -> None:
    (kernel, _), _ = kernels(4)
    source = cpu.source_of(cpu.as_native(kernel), 4)
    assert isinstance(source, cpu.Source)
    payload = source.payload.encode()
    first = cpu.Compiler()
    first.cache = cpu.DiskCache(own_cache)
    code = first.object_code(source.key, payload)
    again = cpu.Compiler()
    again.cache = cpu.DiskCache(own_cache)
    assert again.object_code(source.key, payload) == code and (first.compiled, again.compiled) == (1, 0)
    entries = {path: path.read_bytes() for path in own_cache.iterdir()}
    damages = [
        lambda content: content[:-1],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: b"",
        lambda content: b"something else entirely",
    ]
    for i, damage in enumerate(damages):
        for path, content in entries.items():
            path.write_bytes(damage(content))
        other = cpu.Compiler()
        other.cache = cpu.DiskCache(own_cache)
        assert other.object_code(source.key, payload) == code and other.compiled == 1, i
    # An entry under another name, of another kernel or machine, is foreign.
    names = list(entries)
    for path in names:
        path.write_bytes(next(content for other, content in entries.items() if other != path))
    other = cpu.Compiler()
    other.cache = cpu.DiskCache(own_cache)
    assert other.object_code(source.key, payload) == code and other.compiled == 1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    cache = cpu.DiskCache(blocked / "below")
    cache.write("name", b"code")
    assert cache.read("name") is None
    assert cpu.DiskCache(None).read("name") is None


def test_the_cache_stays_small(tmp_path: Path) -> None:
    """What was not used for longest goes first."""
    old = cpu.DiskCache(tmp_path)
    for i, name in enumerate("abcd"):
        old.write(name, bytes(1000))
        os.utime(tmp_path / name, (i, i))
    assert old.read("a") is not None  # now the latest used
    cpu.DiskCache(tmp_path, most_bytes=3500).write("e", bytes(1000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d", "e"]


def test_names_of_kernels() -> None:
    """Equal in content, equal in name; what has no name of its own has none."""

    def kernel(factor: float, method: Any = pk.tsit5) -> Kernel:
        def field(t: Any, y: Any, args: Any) -> Any:
            return jnp.where(y > 0, -factor * y, y[jnp.array([1, 0])])

        seen: list[Any] = []

        class Spy(pk.ForwardOnly):
            def integrate(self, solve: Any, inputs: Any) -> Any:
                seen.append(solve)
                return super().integrate(solve, inputs)

        pk.solve(field, jnp.ones(2), 0.0, 1.0, adjoint=Spy(), method=method)
        return Kernel(seen[0], None)

    name = identity.digest(kernel(2.0))
    assert name is not None and name == identity.digest(kernel(2.0))
    # Floats of the field are operands, not part of the kernel; another method is another kernel.
    assert identity.digest(kernel(2.0, pk.dopri5)) not in (name, None)
    assert identity.digest(("a", 1.0)) != identity.digest(("a", 1)) != identity.digest(("a", True))
    assert (
        identity.digest(np.zeros(3))
        != identity.digest(np.zeros((3, 1)))
        != identity.digest(np.zeros(3, np.float32))
    )
    assert identity.digest(lambda: None) is None

    @jax.custom_jvp
    def odd(x: Any) -> Any:
        return x

    odd.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))
    assert identity.digest(jax.make_jaxpr(odd)(1.0)) is None


def test_kernels_are_freed() -> None:
    """Many different kernels in one process: those least recently used go, and come back when they are needed."""
    library = native.load()
    assert library is not None
    y0 = jnp.ones(1)

    def program(i: int) -> Any:
        def field(t: Any, y: Any, args: Any) -> Any:
            return -(y**2) - y ** (2 + i % 5) * (jnp.arange(1) + i).astype(y.dtype)

        return jax.jit(
            lambda y: pk.solve(field, y, 0.0, 1.0, step=pk.Fixed(2), method=pk.euler, throw=False).ys
        )

    library.set_capacity(4)
    try:
        programs = [program(i) for i in range(12)]
        first = [np.asarray(f(y0)) for f in programs]
        assert library.resident() <= 4 and len(cpu.compiler._engines) <= 5
        compiled = cpu.compiler.compiled
        assert [np.asarray(f(y0)) for f in programs] == first
        assert cpu.compiler.compiled == compiled, "found on disk again"
    finally:
        library.set_capacity(256)
    assert len({x.tobytes() for x in first}) > 4


@pytest.mark.slow
def test_a_thousand_kernels_do_not_leak() -> None:
    """A thousand different kernels made, loaded and, but for the last sixteen, freed: memory stays where it was."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    arguments = [Argument((), np.dtype(float), True, True), Argument((), np.dtype(float), True)]

    def engine(i: int) -> Any:
        def body(x: Any, out: Any) -> None:
            out[...] = x[...] * i + 1

        source = cpu.pack(llvm.emit(body, arguments, Target(4)), 4)
        return cpu.link(cpu.compile_object(source.payload.encode(), cpu.machine()))

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    engines: list[Any] = []
    sizes = []
    for i in range(1000):
        engines.append(engine(i))
        assert engines[-1].get_function_address("kernel")
        if len(engines) > 16:
            engines.pop(0).close()
        if i in (200, 999):
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 12 << 20, f"{(sizes[1] - sizes[0]) >> 10} kB more after 800 further kernels"


SCRIPT = """
import platform
import sys
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import pykernels as pk
from pathlib import Path
from pykernels.kernels import cpu
cpu.compiler.cache = cpu.DiskCache(Path({objects!r}))
"""


def python(code: str, objects: Path, **environment: str) -> str:
    """The last line a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(objects=str(objects)) + code],
        capture_output=True, text=True, env=os.environ | environment, timeout=300, check=False, cwd=objects.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


SOLVE = """
def loss(y, p):
    return jnp.sum(pk.solve(lambda t, y, p: -p * y, y, 0.0, 1.0, p).ys)
"""


def test_persistent_compilation_cache(tmp_path: Path) -> None:
    """A program from JAX's cache on disk, executed by a process that has compiled nothing."""
    code = (
        SOLVE
        + """
jax.config.update("jax_compilation_cache_dir", {cache!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
value = jax.jit(jax.grad(loss))(jnp.ones(2), 0.5)
print(float(value[0]), sum("cache_hits" in name for name in hits), cpu.compiler.compiled)
""".format(cache=str(tmp_path / "jax"))
    )
    first = python(code, tmp_path / "one").split()
    second = python(code, tmp_path / "two").split()
    np.testing.assert_allclose(float(first[0]), np.exp(-0.5), rtol=1e-5)
    assert first[0] == second[0] and int(first[2]) == 2
    assert int(second[1]) >= 1 and int(second[2]) == 2, (
        "the program was found, its kernels were compiled from it"
    )


def test_export(tmp_path: Path) -> None:
    """An exported program brings its kernels along; the receiving process needs pykernels imported, nothing traced."""
    pytest.importorskip("flatbuffers")
    y0s, p = ensemble(3)
    function = jax.jit(lambda y, p: pk.solve_ensemble(lorenz, y, 0.0, 1.0, p, in_axes=(0, 0)).ys)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(native.TARGET)]
    exported = jax.export.export(function, disabled_checks=allowed)(y0s, p)
    path = tmp_path / "program"
    path.write_bytes(exported.serialize())
    text = python(
        f"""
pk.register_native()
program = jax.export.deserialize(bytearray(Path({str(path)!r}).read_bytes()))
y0s = jnp.asarray(np.tile([1.0, 0.5, 0.2], (3, 1)))
p = jnp.asarray(np.stack([np.full(3, 10.0), np.linspace(0.0, 28.0, 3), np.full(3, 8 / 3)], axis=-1))
print(np.asarray(program.call(y0s, p)).tobytes().hex(), cpu.compiler.compiled)
""",
        tmp_path / "elsewhere",
    )
    numbers, compiled = text.split()
    assert numbers == np.asarray(function(y0s, p)).tobytes().hex() and compiled == "1"


def _child(queue: Any, function: Any, y0s: Any, p: Any) -> None:
    queue.put(np.asarray(function(y0s, p)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("compiled_before", [True, False])
def test_after_fork(compiled_before: bool) -> None:
    """A forked child (a data loader, say) runs kernels that its parent compiled, and others."""
    y0s, p = ensemble(40)
    scale = 1.0 if compiled_before else 0.5

    @jax.jit
    def function(y: Any, p: Any) -> Any:
        return pk.solve_ensemble(
            lambda t, y, p: scale * lorenz(t, y, p), y, 0.0, 1.0, p, in_axes=(0, 0), throw=False
        ).ys

    expected = np.asarray(function(y0s, p))
    lowered = function.lower(y0s, p).compile()
    if not compiled_before:
        library = native.load()
        assert library is not None
        library.set_capacity(0)
        library.set_capacity(256)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue, lowered, y0s, p), daemon=True)
    with cpu.compiler._lock:  # as if a thread, which the child does not have, were compiling
        child.start()
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_array_equal(queue.get(), expected)


def test_many_python_threads() -> None:
    """Programs that share a kernel, and others that do not, from several threads at once: each kernel is compiled once."""
    y0s, p = ensemble(24)
    before = cpu.compiler.compiled
    functions = [
        jax.jit(functools.partial(lambda n, y, p: pk.solve_ensemble(
            lorenz, y, 0.0, 1.0, p, in_axes=(0, 0), step=pk.Fixed(40 + n // 2), throw=False).ys, n))
        for n in range(6)
    ]  # fmt: skip
    results: list[Any] = [None] * 6
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            results[i] = np.asarray(functions[i](y0s, p))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i in (0, 2, 4):
        np.testing.assert_array_equal(results[i], results[i + 1])
    assert cpu.compiler.compiled - before <= 3


def test_several_devices(tmp_path: Path) -> None:
    """`jax.shard_map` over host devices: each runs its share of the lanes, at the same time."""
    text = python(
        """
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((2,), ("lanes",), axis_types=(jax.sharding.AxisType.Auto,))
def loss(y, p):
    sol = pk.solve_ensemble(lambda t, y, p: -p * y, y, 0.0, 1.0, p, in_axes=(0, 0), config=pk.Config(runner="native"))
    return jnp.sum(sol.ys)
gradient = jax.grad(loss)
y, p = jnp.ones((10, 2)), jnp.linspace(0.1, 1.0, 10)
shared = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(P("lanes"), P("lanes")), out_specs=P("lanes")))
print(np.array_equal(shared(y, p), jax.jit(gradient)(y, p)), len(jax.devices()))
""",
        tmp_path,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert text == "True 2"


def test_transformations() -> None:
    """vmap, scan, checkpoint and donation around native kernels."""
    y0s, p = ensemble(6)
    plain = pk.solve_ensemble(lorenz, y0s, 0.0, 1.0, p, in_axes=(0, 0), config=NATIVE).ys

    def one(y: Any, p: Any) -> Any:
        return pk.solve(lorenz, y, 0.0, 1.0, p, config=NATIVE).ys

    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(y0s, p), plain)

    def twice(y: Any) -> Any:
        return jax.lax.scan(lambda y, _: (jax.vmap(one)(y, p), None), y, None, length=2)[0]

    again = pk.solve_ensemble(lorenz, plain, 0.0, 1.0, p, in_axes=(0, 0), config=NATIVE).ys
    np.testing.assert_array_equal(jax.jit(twice)(y0s), again)
    gradients = [
        jax.jit(jax.grad(lambda y, f=f: jnp.sum(f(y) ** 2)))(y0s) for f in (twice, jax.checkpoint(twice))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-12)
    donated = jax.jit(jax.vmap(one), donate_argnums=0)(y0s + 0, p)
    np.testing.assert_array_equal(donated, plain)
