"""Kernels for NVIDIA GPUs, without one: they compile, the lowered program holds them, and their PTX, executed on the CPU by
`shared/ptxrun` (`--ptxrun=PATH`), gives the reference's numbers."""

from __future__ import annotations

import functools
import importlib.util
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

import pykernels as pk
from pykernels.kernels import cuda, launch
from pykernels.kernels.body import Kernel
from pykernels.kernels.disk import DiskCache

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=str(cuda.unavailable()))

TSIT5 = {"method": pk.tsit5, "step": pk.Adaptive(1e-5, 1e-8)}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test compiles anew."""
    monkeypatch.setattr(cuda, "cache", DiskCache(None))


def ptxas() -> Path:
    """NVIDIA's assembler from the triton wheel."""
    spec = importlib.util.find_spec("triton")
    path = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "backends/nvidia/bin/ptxas"
    if not path.exists():
        pytest.skip("no ptxas: it comes with triton")
    return path


def lanes_of(problem: Any, dtype: Any, lanes: int) -> tuple[Any, Any]:
    y0, args = problem.y0(dtype=dtype), problem.args(dtype=dtype)
    return problems.spread(y0, lanes), problems.spread(args, lanes)


def kernels(problem: Any, dtype: Any, shared: bool = False, **settings: Any) -> list[Kernel]:
    """Forward, forward with milestones, backward by state and arguments."""
    y0s, args = lanes_of(problem, dtype, 2)
    seen: list[Any] = []

    class Spy(pk.Milestones):
        def integrate(self, solve: Any, inputs: Any) -> Any:
            seen.append((solve, self.record(solve)))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pk.solve_ensemble(
            problem.field, y0s, problem.t0, problem.t1, problem.args(dtype=dtype) if shared else args,
            in_axes=(0, None if shared else 0), adjoint=Spy(),
            dt0=0.01 if isinstance(settings["step"], pk.Adaptive) else None, **settings,
        )  # fmt: skip
    ((solve, record),) = seen
    wrt = tuple(i >= solve.first_y for i in range(len(solve.lane)))
    return [Kernel(solve, None), Kernel(solve, record), Kernel(solve, record, wrt)]


def resources(image: launch.Image, tmp_path: Path) -> tuple[int, int]:
    """Registers and spilled bytes of a compiled kernel."""
    source = tmp_path / "kernel.ptx"
    source.write_text(image.ptx)
    done = subprocess.run(
        [ptxas(), "-v", f"-arch=sm_{image.capability}", source, "-o", tmp_path / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert spills is not None and registers is not None, done.stderr
    return int(registers[1]), int(spills[1]) + int(spills[2])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "limits"), [(np.float32, (56, 56, 80)), (np.float64, (96, 96, 136))])
def test_registers_of_lorenz(dtype: Any, limits: tuple[int, ...], capability: int, tmp_path: Path) -> None:
    """Nothing spills, and there is room for many threads: forward, forward with milestones, backward."""
    for kernel, most in zip(kernels(problems.LORENZ, dtype, **TSIT5), limits, strict=True):
        image = cuda.compiled(cuda.as_native(kernel), capability)
        registers, spilled = resources(image, tmp_path)
        assert spilled == 0 and registers <= most, (registers, spilled)


METHODS = [pk.euler, pk.rk4, pk.bosh3, pk.dopri5]
SLICE = [
    (problem, METHODS[i % len(METHODS)], (np.float32, np.float64)[i % 2], (80, 90)[i // 2 % 2])
    for i, problem in enumerate(problems.PROBLEMS)
    # The perceptron with weights per lane takes half a minute; with shared ones it is executed below.
    if problem is not problems.PERCEPTRON
]


@pytest.mark.parametrize(
    ("problem", "method", "dtype", "capability"),
    SLICE,
    ids=[f"{p.name}-{m.name}-{np.dtype(d).name}-sm_{c}" for p, m, d, c in SLICE],
)
def test_compiles(problem: Any, method: Any, dtype: Any, capability: int, tmp_path: Path) -> None:
    step = pk.Fixed(16) if method.error is None else pk.Adaptive(1e-4, 1e-6)
    for kernel in kernels(problem, dtype, method=method, step=step):
        assert cuda.obstacle(kernel, 2) is None
        image = cuda.compiled(cuda.as_native(kernel), capability)
        assert f".target sm_{capability}" in image.ptx
        resources(image, tmp_path)


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
    messages = calls(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert [re.search(rb"pykernels_(forward|backward)", m)[1] for m in messages] == [b"forward", b"backward"]
    for platform in ("cpu", "tpu"):
        assert "triton_kernel_call" not in traced.lower(lowering_platforms=(platform,)).as_text()
    several = traced.lower(lowering_platforms=("cpu", "cuda", "tpu")).as_text()
    assert len(calls(several)) == 2 and "stablehlo.while" in several
    portable = jax.jit(jax.grad(functools.partial(ensemble_loss, pk.Config(runner="xla")))).trace(y0s, p)
    assert "triton_kernel_call" not in portable.lower(lowering_platforms=("cuda",)).as_text()


def test_parameters_of_the_launch() -> None:
    """The arrays, the number of lanes, and the null pointers that the plugin appends: a mismatch would be garbage."""
    for kernel in kernels(problems.LORENZ, np.float32, **TSIT5):
        image = cuda.compiled(cuda.as_native(kernel), 90)
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
    kernel = cuda.as_native(kernels(problems.LORENZ, np.float32, **TSIT5)[0])
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


@pytest.fixture(scope="module")
def on_ptx(request: pytest.FixtureRequest) -> Any:
    """Runs a function with its CUDA kernels executed from their PTX, with poisoned buffers and race checks."""
    folder = request.config.getoption("--ptxrun")
    if folder is None:
        pytest.skip("no --ptxrun")
    sys.path.insert(0, str(Path(folder).resolve()))
    import from_jax

    def run(function: Any, *args: Any) -> Any:
        report: list[Any] = []
        out = from_jax.run_on_ptx(function, *args, report=report, poison=True, check_races=True)
        assert report and not any(entry.result.warnings for entry in report)
        return out, report

    return run


EXECUTED = [
    (problems.LORENZ, pk.tsit5, np.float64, "final", False),
    (problems.LORENZ, pk.tsit5, np.float32, "final", False),
    (problems.KEPLER, pk.dopri5, np.float64, "saved", False),
    (problems.FORCED_OSCILLATOR, pk.bosh3, np.float64, "final", True),
    (problems.SIR, pk.rk4, np.float64, "saved", True),
    (problems.PENDULUM, pk.dopri5, np.float32, "final", True),
    (problems.PERCEPTRON, pk.bosh3, np.float64, "final", True),
]


@pytest.mark.parametrize(
    ("problem", "method", "dtype", "what", "shared"),
    EXECUTED,
    ids=[
        f"{p.name}-{m.name}-{np.dtype(d).name}-{w}-{'shared' if s else 'lanes'}" for p, m, d, w, s in EXECUTED
    ],
)
def test_executed_ptx_gives_the_reference(
    on_ptx: Any, problem: Any, method: Any, dtype: Any, what: str, shared: bool
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

    def program(config: Any) -> Any:
        return jax.jit(jax.value_and_grad(functools.partial(loss, config), (0, 1), has_aux=True))

    got, report = on_ptx(program(None), y0s, args)
    assert len(report) == 2
    wanted = program(pk.Config(runner="xla"))(y0s, args)
    leaves = [[np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (got, wanted)]
    if dtype == np.float64:
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(np.max(np.abs(b)), 1e-3))
        return
    # Rounding moves the step sizes a little: both are held against the float64 solution with the same settings.
    double = [jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (y0s, args)]
    exact = [np.asarray(x) for x in jax.tree.leaves(program(pk.Config(runner="xla"))(*double))]
    for a, b, c in zip(*leaves, exact, strict=True):
        scale = max(np.max(np.abs(c)), 1e-3)
        error, portable = np.max(np.abs(a - c)) / scale, np.max(np.abs(b - c)) / scale
        assert error <= max(3 * portable, 32 * np.finfo(np.float32).eps), (error, portable)
