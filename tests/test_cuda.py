"""Kernels for NVIDIA GPUs, without one: they compile, the lowered program holds them, and their PTX, executed on the CPU by
`shared/ptxrun` (`--ptxrun=PATH`), gives the reference's numbers."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from gpu_matrix import LIFTED, RUNNERS, Cost, cost, kernels, ptxas

import pykernels as pk
from pykernels import lanes
from pykernels.kernels import cuda, launch, pallas
from pykernels.kernels.body import Kernel
from pykernels.kernels.disk import DiskCache
from pykernels.kernels.launch import Image

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))

TSIT5 = {"method": pk.tsit5, "step": pk.Adaptive(1e-5, 1e-8)}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test compiles anew."""
    monkeypatch.setattr(cuda, "cache", DiskCache(None))


def lanes_of(problem: Any, dtype: Any, lanes: int) -> tuple[Any, Any]:
    y0, args = problem.y0(dtype=dtype), problem.args(dtype=dtype)
    return problems.spread(y0, lanes), problems.spread(args, lanes)


def assembled(image: Image) -> Cost:
    """What a compiled kernel takes."""
    if not ptxas().exists():
        pytest.skip("no ptxas: it comes with triton")
    return cost(image, 0.0)


def image_of(runner: str, kernel: Kernel, capability: int = 90) -> Image:
    assert RUNNERS[runner].obstacle(kernel, 64) is None
    return RUNNERS[runner].compiled(LIFTED[runner](kernel), capability)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "limits"), [(np.float32, (56, 56, 80)), (np.float64, (96, 96, 136))])
def test_registers_of_lorenz(dtype: Any, limits: tuple[int, ...], capability: int, runner: str) -> None:
    """Nothing spills, and there is room for many threads: forward, forward with milestones, backward."""
    for kernel, most in zip(kernels(problems.LORENZ, dtype, **TSIT5), limits, strict=True):
        found = assembled(image_of(runner, kernel, capability))
        assert found.spilled == 0
        assert found.registers <= most or runner == "pallas", found


def ensemble_loss(config: Any, y0s: Any, p: Any) -> Any:
    sols = pk.solve_ensemble(
        problems.LORENZ.field,
        y0s,
        0.0,
        0.2,
        p,
        in_axes=(0, 0),
        max_steps=64,
        throw=False,
        config=config,
        dt0=0.01,
        **TSIT5,
    )
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sols.ys))


def calls(text: str) -> list[bytes]:
    """The messages of all kernel launches in a lowered program."""
    found = re.findall(r'custom_call @triton_kernel_call\(.*?backend_config = "((?:[^"\\]|\\.)*)"', text)
    return [zlib.decompress(_unescaped(item)) for item in found]


def _unescaped(text: str) -> bytes:
    """MLIR's string escapes: two hexadecimal digits behind a backslash."""
    return re.sub(
        rb"\\([0-9A-Fa-f]{2})",
        lambda m: bytes([int(m[1], 16)]),
        text.encode("latin-1").replace(b"\\\\", b"\\5C"),
    )


def test_the_lowered_program_holds_the_kernels() -> None:
    """Exactly one forward and one backward kernel for CUDA; none for CPU and TPU; all in a program for several platforms."""
    y0s, p = lanes_of(problems.LORENZ, np.float32, 70)
    traced = jax.jit(jax.grad(functools.partial(ensemble_loss, None))).trace(y0s, p)
    assert names(traced.lower(lowering_platforms=("cuda",)).as_text()) == ["forward", "backward"]
    for platform in ("cpu", "tpu"):
        assert "triton_kernel_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
    several = traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    assert len(calls(several)) == 2 and "stablehlo.while" in several
    portable = jax.jit(jax.grad(functools.partial(ensemble_loss, pk.Config(runner="xla")))).trace(y0s, p)
    assert "triton_kernel_call" not in portable.lower(lowering_platforms=("cuda",)).as_text()
    chosen = jax.jit(jax.grad(functools.partial(ensemble_loss, pk.Config(runner="pallas")))).trace(y0s, p)
    assert names(chosen.lower(lowering_platforms=("cuda",)).as_text()) == [
        "pallas_forward",
        "pallas_backward",
    ]
    with pytest.raises(ValueError, match=r"runner='pallas'.*not possible"):
        chosen.lower(lowering_platforms=("cpu",))


def test_products_with_shared_matrices_take_tiles() -> None:
    """By default: Pallas where the field is made of matrix products, for they want many threads per lane."""
    y0s, layers = lanes_of(problems.PERCEPTRON, np.float32, 3)
    for shared, wanted in ((True, ["pallas_forward"]), (False, ["forward"])):
        args = problems.PERCEPTRON.args(dtype=np.float32) if shared else layers

        def run(y0s: Any, args: Any, axis: Any = None if shared else 0) -> Any:
            return pk.solve_ensemble(
                problems.PERCEPTRON.field,
                y0s,
                0.0,
                1.0,
                args,
                in_axes=(0, axis),
                method=pk.euler,
                step=pk.Fixed(4),
            ).ys

        lowered = jax.jit(run).trace(y0s, args).lower(lowering_platforms=("cuda",))
        assert names(lowered.as_text()) == wanted


def names(text: str) -> list[str]:
    """The kernels of a lowered program, in order."""
    return [re.search(rb"pykernels_(\w+)", message)[1].decode() for message in calls(text)]


@pytest.mark.parametrize("runner", RUNNERS)
def test_parameters_of_the_launch(runner: str) -> None:
    """The arrays, the number of lanes, and the null pointers that the plugin appends: a mismatch would be garbage."""
    for kernel in kernels(problems.LORENZ, np.float32, **TSIT5):
        image = image_of(runner, kernel)
        # One more for the number of lanes: a number, or an array of one.
        arrays = len(kernel.operands) + len(kernel.results) + len(kernel.scratch)
        entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", image.ptx, re.DOTALL)
        assert entry is not None and entry[1].count(".param") == arrays + 1 + launch.SCRATCH_POINTERS


SECOND = """
import sys
import jax
import jax.numpy as jnp
import pykernels as pk
from pathlib import Path
from pykernels.kernels import cuda
from pykernels.kernels.disk import DiskCache
cuda.cache = DiskCache(Path({folder!r}))
def loss(y, p):
    return jnp.sum(pk.solve(lambda t, y, p: -p * y, y, 0.0, 1.0, p).ys)
text = jax.jit(jax.grad(loss)).trace(jnp.ones(2), 0.5).lower(lowering_platforms=("cuda",)).as_text()
print(text.count("triton_kernel_call"), "llvmlite.binding" in sys.modules)
"""


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    def run() -> list[str]:
        code = SECOND.format(folder=str(tmp_path))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert run() == ["2", "True"] and len(list(tmp_path.iterdir())) == 2
    assert run() == ["2", "False"]


def test_ptx_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole is found, and what is damaged, or of another architecture, made again."""
    kernel = cuda.lifted(kernels(problems.LORENZ, np.float32, **TSIT5)[0])
    made: list[int] = []
    compile_ptx = cuda.compile_ptx

    def counting(program: Any, kernel: Kernel, capability: int) -> str:
        made.append(capability)
        return compile_ptx(program, kernel, capability)

    def again(capability: int = 90) -> launch.Image:
        cuda.compiled.cache_clear()
        cuda.program_of.cache_clear()
        assert cuda.obstacle(kernel, 2) is None
        return cuda.compiled(kernel, capability)

    monkeypatch.setattr(cuda, "cache", DiskCache(tmp_path))
    monkeypatch.setattr(cuda, "compile_ptx", counting)
    image = again()
    assert again() == image and made == [90]
    assert again(80).ptx != image.ptx and made == [90, 80]
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert again() == image and again() == image and made == [90, 80, 90]
    monkeypatch.setattr(cuda, "cache", DiskCache(None))
    assert again() == image and made == [90, 80, 90, 90]


def test_what_has_no_kernel_runs_portably() -> None:
    def sorting(t: Any, y: Any, args: Any) -> Any:
        return -jnp.sort(y)

    def run(y: Any) -> Any:
        return pk.solve_ensemble(sorting, y, 0.0, 1.0, in_axes=(0, None)).ys

    text = jax.jit(run).trace(jnp.ones((4, 3), jnp.float32)).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton_kernel_call" not in text and "stablehlo.while" in text


def test_pallas_kernels_are_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process has compiled the next one neither traces nor compiles."""
    monkeypatch.setattr(pallas, "cache", DiskCache(tmp_path))
    (kernel, *_) = kernels(problems.LOTKA_VOLTERRA, np.float32, **TSIT5)

    def forget() -> None:
        pallas.compiled.cache_clear()
        pallas.traced.cache_clear()

    forget()
    first = image_of("pallas", kernel)
    (entry,) = tmp_path.iterdir()
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(pallas, "_pallas_call", None)
        assert image_of("pallas", kernel) == first
    content = entry.read_bytes()
    entry.write_bytes(content[:-1])
    forget()
    assert image_of("pallas", kernel) == first and entry.read_bytes() == content, (
        "a damaged entry is made anew"
    )
    forget()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for Pallas gets it from XLA; nobody gets it from there by default."""
    monkeypatch.setattr(pallas, "without_triton", lambda: "triton is not installed: install pykernels[cuda]")
    problem = problems.PERCEPTRON
    y0s, layers = problems.spread(problem.y0(dtype=np.float32), 3), problem.args(dtype=np.float32)

    def lowered(runner: Any) -> str:
        def run(y0s: Any, layers: Any) -> Any:
            return pk.solve_ensemble(
                problem.field, y0s, 0.0, 1.0, layers, in_axes=(0, None), method=pk.euler, step=pk.Fixed(4),
                config=pk.Config(runner=runner),
            ).ys  # fmt: skip

        return jax.jit(run).trace(y0s, layers).lower(lowering_platforms=("cuda",)).as_text()

    assert names(lowered(None)) == ["forward"]
    if jax.__version_info__ < (0, 11):  # later ones lower Pallas calls only where the CUDA plugin is
        text = lowered("pallas")
        assert names(text) == [] and "xla.gpu.triton" in text and "pykernels_pallas_forward" in text


@pytest.mark.parametrize(
    ("field", "shape", "reason"),
    [
        (lambda t, y, w: w @ y, (4, 4), None),
        (lambda t, y, w: y @ w + jnp.tanh(y), (4, 4), None),
        (lambda t, y, w: y * jnp.sum(w), (4, 4), "no products"),
        (lambda t, y, w: (w @ y)[::-1], (4, 4), "no rule on tiles"),
        (lambda t, y, w: w.T @ (w @ y), (3, 4), "powers of two"),
        (lambda t, y, w: (w * y[0]) @ y, (4, 4), "no rule on tiles|other than a shared matrix"),
    ],
)
def test_what_fits_tiles(field: Any, shape: tuple[int, ...], reason: str | None) -> None:
    struct = [jax.ShapeDtypeStruct(s, np.float64) for s in ((), (4,), shape)]
    found = lanes.tile_obstacle(jax.make_jaxpr(field)(*struct), (True, True, False))
    assert found is None if reason is None else re.search(reason, found or ""), found
    assert lanes.tile_obstacle(jax.make_jaxpr(field)(*struct), (True, True, True)) is not None


@pytest.fixture(scope="module")
def on_ptx(ptxrun: Any) -> Any:
    """Runs a function with its CUDA kernels executed from their PTX, with poisoned buffers and race checks."""

    def run(function: Any, *args: Any) -> Any:
        report: list[Any] = []
        out = ptxrun.run_on_ptx(function, *args, report=report, poison=True, check_races=True)
        assert report and not any(entry.result.warnings for entry in report)
        return out, report

    return run


# Both runners go through every kind of kernel: values at the end and saved, arguments shared and per lane, both dtypes.
EXECUTED = [
    *[(r, problems.LORENZ, pk.tsit5, np.float64, "final", False) for r in RUNNERS],
    *[(r, problems.LORENZ, pk.tsit5, np.float32, "final", False) for r in RUNNERS],
    *[(r, problems.SIR, pk.rk4, np.float64, "saved", True) for r in RUNNERS],
    ("native", problems.KEPLER, pk.dopri5, np.float64, "saved", False),
    ("pallas", problems.FORCED_OSCILLATOR, pk.bosh3, np.float64, "saved", False),
    ("native", problems.FORCED_OSCILLATOR, pk.bosh3, np.float64, "final", True),
    ("native", problems.PENDULUM, pk.dopri5, np.float32, "final", True),
    ("pallas", problems.PERCEPTRON, pk.euler, np.float64, "final", True),
    # Stages in a loop: components, and arrays; cotangents of operands per lane, and summed.
    ("pallas", problems.COUPLED, pk.bosh3, np.float64, "final", True),
    ("native", problems.COUPLED, pk.rk4, np.float64, "saved", False),
    ("native", problems.PERCEPTRON, pk.vern7, np.float64, "final", True),
]


@pytest.mark.parametrize(
    ("runner", "problem", "method", "dtype", "what", "shared"),
    EXECUTED,
    ids=[
        f"{r}-{p.name}-{m.name}-{np.dtype(d).name}-{w}-{'shared' if s else 'lanes'}"
        for r, p, m, d, w, s in EXECUTED
    ],
)
def test_executed_ptx_gives_the_reference(
    on_ptx: Any, runner: str, problem: Any, method: Any, dtype: Any, what: str, shared: bool
) -> None:
    """Values and gradients of 37 lanes, one and a bit more than a warp, equal the portable runner's on the CPU."""
    # In float32 the tolerances keep decisions off rounding.
    adaptive = pk.Adaptive(1e-4, 1e-7) if dtype == np.float64 else pk.Adaptive(1e-3, 1e-5)
    step = pk.Fixed(12) if method.error is None else adaptive
    end = problem.t0 + 0.2 * (problem.t1 - problem.t0)
    dates = None if what == "final" else jnp.asarray(np.linspace(problem.t0, end, 4), dtype)
    y0s, args = lanes_of(problem, dtype, 37)
    args = problem.args(dtype=dtype) if shared else args

    def loss(config: Any, y0s: Any, args: Any) -> Any:
        sols = pk.solve_ensemble(
            problem.field, y0s, problem.t0, end, args, in_axes=(0, None if shared else 0), method=method, step=step,
            save_at=dates, max_steps=64, throw=False, config=config,
        )  # fmt: skip
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sols.ys)), (sols.ys, sols.stats.attempts)

    check_on_ptx(on_ptx, loss, runner, dtype, y0s, args)


@pytest.mark.parametrize(
    ("runner", "problem"),
    [("native", problems.SIR), ("pallas", problems.SIR), ("pallas", problems.PERCEPTRON)],
)
def test_executed_blocks_of_several_warps(on_ptx: Any, runner: str, problem: Any) -> None:
    """As many trajectories per block as were asked for, and sums over blocks that the last one does not fill."""
    y0s, _ = lanes_of(problem, np.float64, 75)

    def loss(config: Any, y0s: Any, args: Any) -> Any:
        sols = pk.solve_ensemble(
            problem.field, y0s, problem.t0, problem.t0 + 1.0, args, in_axes=(0, None), method=pk.heun,
            step=pk.Adaptive(1e-3, 1e-5), dt0=0.2, max_steps=64, throw=False, config=dataclasses.replace(config, block=64),
        )  # fmt: skip
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(sols.ys)), sols.stats.attempts

    report = check_on_ptx(on_ptx, loss, runner, np.float64, y0s, problem.args())
    assert [(entry.kernel.grid[0], entry.kernel.num_warps) for entry in report] == [
        (2, 2 if problem is problems.SIR else 8)
    ] * 2


def check_on_ptx(on_ptx: Any, loss: Any, runner: str, dtype: Any, *args: Any) -> Any:
    """Value, gradient and auxiliary results of loss(config, *args) from PTX against the portable runner's. Returns the
    launches' report."""

    def program(config: Any) -> Any:
        return jax.jit(jax.value_and_grad(functools.partial(loss, config), (0, 1), has_aux=True))

    got, report = on_ptx(program(pk.Config(runner=runner)), *args)
    assert len(report) == 2
    wanted = program(pk.Config(runner="xla"))(*args)
    leaves = [[np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (got, wanted)]
    if dtype == np.float64:
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(np.max(np.abs(b)), 1e-3))
        return report
    # Rounding moves the step sizes a little: both are held against the float64 solution with the same settings.
    double = [jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in args]
    exact = [np.asarray(x) for x in jax.tree.leaves(program(pk.Config(runner="xla"))(*double))]
    for a, b, c in zip(*leaves, exact, strict=True):
        scale = max(np.max(np.abs(c)), 1e-3)
        error, portable = np.max(np.abs(a - c)) / scale, np.max(np.abs(b - c)) / scale
        assert error <= max(3 * portable, 32 * np.finfo(np.float32).eps), (error, portable)
    return report


def operations(t: Any, y: Any, rate: Any) -> Any:
    """Functions, powers, divisions, extrema, integers and logic."""
    a, b = y
    cell = jnp.floor(3 * a).astype(jnp.int32)
    even = ((cell % 2 == 0) & (b > 0)) | ~(a < b)
    first = jnp.where(even, jnp.exp(-a * a) + jnp.log1p(abs(b)), jnp.sinh(a) / (1 + b * b))
    first = first + jnp.sqrt(abs(a) + 1) ** jnp.asarray(1.5, a.dtype) + jnp.cbrt(b + 3) * jnp.sign(a)
    second = jnp.arctan2(a, b) + jnp.tanh(b) * jnp.cos(a) - jnp.minimum(a, b) * jnp.maximum(a, 0.1)
    second = second + jnp.expm1(-b) + jnp.arctan(a) * jnp.sin(3 * t) + jnp.log(2 + a * a) * jnp.tan(0.1 * b)
    return rate * first, second - jnp.clip(b, -0.5, 0.5) + jax.nn.sigmoid(a) * (cell // 2).astype(a.dtype)


@pytest.mark.parametrize(("runner", "dtype"), [("native", np.float64), ("pallas", np.float32)])
def test_executed_functions_and_logic(on_ptx: Any, dtype: Any, runner: str) -> None:
    rng = np.random.default_rng(5)
    y0s = tuple(rng.normal(size=37).astype(dtype) for _ in range(2))
    rate = rng.uniform(0.5, 1, 37).astype(dtype)

    def loss(config: Any, y0s: Any, rate: Any) -> Any:
        sols = pk.solve_ensemble(
            operations, y0s, 0.0, 0.2, rate, in_axes=(0, 0), method=pk.heun, step=pk.Fixed(3), config=config,
            throw=False,
        )  # fmt: skip
        return sum(jnp.sum(leaf**2) for leaf in sols.ys), sols.ys

    check_on_ptx(on_ptx, loss, runner, dtype, y0s, rate)


def test_executed_neural_field(on_ptx: Any) -> None:
    """2-64-64-2 on tiles, its float32 products on tensor cores in three parts each."""
    problem, dtype = problems.PERCEPTRON_64, np.float32
    y0s, layers = problems.spread(problem.y0(dtype=dtype), 33), problem.args(dtype=dtype)

    def loss(config: Any, y0s: Any, layers: Any) -> Any:
        sols = pk.solve_ensemble(
            problem.field, y0s, 0.0, 0.2, layers, in_axes=(0, None), method=pk.euler, step=pk.Fixed(2), config=config,
            throw=False,
        )  # fmt: skip
        return jnp.sum(sols.ys**2), sols.ys

    (kernel, *_) = kernels(problem, dtype, shared=True, method=pk.euler, step=pk.Fixed(2))
    assert "mma.sync" in image_of("pallas", kernel).ptx
    check_on_ptx(on_ptx, loss, "pallas", dtype, y0s, layers)
