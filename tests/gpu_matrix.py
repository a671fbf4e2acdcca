"""The GPU kernels that must compile, and what each of them takes: the registry behind `gpu_kernels.csv`, which
`bench/gpu_matrix.py` writes and `test_gpu_matrix.py` checks a slice of."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import problems

import pykernels as pk
from pykernels.kernels import cuda, pallas
from pykernels.kernels.body import Kernel
from pykernels.kernels.disk import DiskCache
from pykernels.kernels.launch import Image

TABLE = Path(__file__).with_name("gpu_kernels.csv")
METHODS = {m.name: m for m in (pk.euler, pk.rk4, pk.bosh3, pk.tsit5, pk.dopri5, pk.dopri8, pk.vern7)}
PROBLEMS = {p.name: p for p in problems.PROBLEMS}
KINDS = ("forward", "milestones", "save_at", "backward")
RUNNERS = {"native": cuda, "pallas": pallas}
LIFTED = {"native": cuda.lifted, "pallas": pallas.lifted}
# Arguments that all trajectories share, whose gradients are sums over lanes; those of the other fields are per lane.
SHARED = frozenset({"coupled", "perceptron", "perceptron64"})


class Entry(NamedTuple):
    """One kernel of the matrix."""

    runner: str
    field: str
    method: str
    step: str
    dtype: str
    kind: str
    capability: int


class Cost(NamedTuple):
    """What a kernel takes: registers and spilled bytes (stores and loads) per thread, shared memory per block in bytes, and
    seconds from the field to PTX and from there to machine code, in a process that has compiled others before."""

    registers: int
    spilled: int
    shared: int
    ptx_seconds: float
    ptxas_seconds: float


def matrix() -> Iterator[Entry]:
    """All entries, the ones that take long last."""
    fields = sorted(PROBLEMS, key=lambda name: name in SHARED)
    for runner, field, method, step, dtype, kind, capability in itertools.product(
        RUNNERS, fields, METHODS, ("fixed", "adaptive"), ("float32", "float64"), KINDS, (80, 90)
    ):
        if step == "fixed" or METHODS[method].error is not None:
            yield Entry(runner, field, method, step, dtype, kind, capability)
    # A neural field with products large enough for tensor cores: tiles only.
    for dtype, kind in itertools.product(("float32", "float64"), ("forward", "milestones", "backward")):
        yield Entry("pallas", "perceptron64", "tsit5", "adaptive", dtype, kind, 90)


def sliced() -> list[Entry]:
    """Entries that have between them every value of every axis, by both runners, steered clear of the slowest."""
    steps = [
        (m, s) for m in METHODS for s in ("fixed", "adaptive") if s == "fixed" or METHODS[m].error is not None
    ]
    fields = itertools.cycle(PROBLEMS)
    kinds = itertools.cycle(KINDS)
    entries = []
    for i, (method, step) in enumerate(steps):
        field, kind = next(fields), next(kinds)
        if field == "perceptron":  # backwards, unrolled, it takes half a minute
            kind = "forward"
        for runner, dtype in zip(
            RUNNERS, ("float32", "float64") if i % 2 else ("float64", "float32"), strict=True
        ):
            entries.append(Entry(runner, field, method, step, dtype, kind, (80, 90)[i // 2 % 2]))
    # Every field backward once, where it takes little.
    entries += [
        Entry(("native", "pallas")[i % 2], field, "bosh3", "adaptive", "float32", "backward", 90)
        for i, field in enumerate(PROBLEMS)
    ]
    return entries


def kernels(
    problem: Any, dtype: Any, shared: bool = False, save_at: Any = None, **settings: Any
) -> list[Kernel]:
    """Forward, forward with milestones, backward by state and arguments, of an ensemble's solve."""
    y0s = problems.spread(problem.y0(dtype=dtype), 2)
    args = problem.args(dtype=dtype)
    seen: list[Any] = []

    class Spy(pk.Milestones):
        def integrate(self, solve: Any, inputs: Any) -> Any:
            seen.append((solve, self.record(solve)))
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        pk.solve_ensemble(
            problem.field, y0s, problem.t0, problem.t1, args if shared else problems.spread(args, 2),
            in_axes=(0, None if shared else 0), adjoint=Spy(), save_at=save_at,
            dt0=0.01 if isinstance(settings["step"], pk.Adaptive) else None, **settings,
        )  # fmt: skip
    ((solve, record),) = seen
    wrt = tuple(i >= solve.first_y for i in range(len(solve.lane)))
    return [Kernel(solve, None), Kernel(solve, record), Kernel(solve, record, wrt)]


def kernel_of(entry: Entry) -> Kernel:
    """The kernel of an entry."""
    problem = problems.PERCEPTRON_64 if entry.field == "perceptron64" else PROBLEMS[entry.field]
    dtype = np.dtype(entry.dtype)
    saves = jnp.linspace(problem.t0, problem.t1, 8, dtype=dtype) if entry.kind == "save_at" else None
    step = pk.Fixed(64) if entry.step == "fixed" else pk.Adaptive(1e-5, 1e-8)
    found = kernels(problem, dtype, entry.field in SHARED, saves, method=METHODS[entry.method], step=step)
    return found[{"forward": 0, "save_at": 0, "milestones": 1, "backward": 2}[entry.kind]]


@functools.lru_cache(maxsize=1)
def traced(entry: Entry) -> tuple[Kernel, float]:
    """The kernel of an entry of capability 0 as its runner takes it, traced anew, and the seconds that took. Raises
    RuntimeError where the runner has an obstacle."""
    kernel = kernel_of(entry)
    for cached in (pallas.traced, cuda.program_of):
        cached.cache_clear()
    start = time.perf_counter()
    obstacle = RUNNERS[entry.runner].obstacle(kernel, 1024)
    if obstacle is not None:
        raise RuntimeError(f"{entry}: {obstacle}")
    return LIFTED[entry.runner](kernel), time.perf_counter() - start


def compile_entry(entry: Entry) -> tuple[Image, float]:
    """PTX of an entry, compiled anew, and the seconds that took, tracing included."""
    runner: Any = RUNNERS[entry.runner]
    before, runner.cache = runner.cache, DiskCache(None)
    try:
        kernel, seconds = traced(entry._replace(capability=0))
        runner.compiled.cache_clear()
        start = time.perf_counter()
        image = runner.compiled(kernel, entry.capability)
        return image, seconds + time.perf_counter() - start
    finally:
        runner.cache = before


def cost(image: Image, seconds: float) -> Cost:
    """What a compiled kernel takes, by NVIDIA's assembler from the triton wheel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(image.ptx)
        start = time.perf_counter()
        done = subprocess.run(
            [ptxas(), "-v", f"-arch=sm_{image.capability}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assembled = time.perf_counter() - start
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert spills is not None and registers is not None, done.stderr
    return Cost(
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        image.shared,
        round(seconds, 2),
        round(assembled, 2),
    )


def ptxas() -> Path:
    """NVIDIA's assembler in the triton wheel; the path may not exist."""
    spec = importlib.util.find_spec("triton")
    return Path((spec.submodule_search_locations or [""])[0] if spec else "") / "backends/nvidia/bin/ptxas"


def versions() -> str:
    """What registers depend on."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "llvmlite", "jax"))


@dataclass
class Table:
    """The table on disk: a first line of versions, then a row per entry."""

    path: Path
    versions: str
    rows: dict[Entry, Cost]

    @staticmethod
    def read(path: Path = TABLE) -> Table:
        if not path.exists():
            return Table(path, versions(), {})
        with path.open(newline="") as file:
            made_with = file.readline().strip().removeprefix("# ")
            reader = csv.DictReader(file)
            rows = {}
            for row in reader:
                entry = Entry(**{**{k: row[k] for k in Entry._fields}, "capability": int(row["capability"])})
                rows[entry] = Cost(
                    int(row["registers"]), int(row["spilled"]), int(row["shared"]),
                    float(row["ptx_seconds"]), float(row["ptxas_seconds"]),
                )  # fmt: skip
        return Table(path, made_with, rows)

    def write(self) -> None:
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="") as file:
            file.write(f"# {self.versions}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*Entry._fields, *Cost._fields])
            writer.writerows([*entry, *self.rows[entry]] for entry in sorted(self.rows))
        temporary.replace(self.path)
