"""Streaming gradients beside what else there is, in one run: prints a table.

    python3.12 -m venv nlsq-venv && nlsq-venv/bin/pip install nlsq==0.4.2
    python bench/stream.py --nlsq nlsq-venv/bin/python    all cases, about ten minutes on two cores; with Python 3.12 too
    python bench/stream.py --only memmap                  the cases whose name contains "memmap"
    python bench/stream.py --quick                        a smoke test at tiny sizes, no figures worth keeping

nlsq 0.4.2 runs in a process of its own, on the same data; without --nlsq its cases show our time alone. The big file is
written to --folder (default: the system's temporary folder), and removed. Repeats of
the two sides are interleaved and the medians compared. A case whose two answers do not agree prints a line on stderr and no
figures, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pykernels as pk

HEADER = "| case | pykernels | beside | ratio | floor |\n| --- | --- | --- | --- | --- |"


class Disagreement(Exception):
    """The two sides' answers differ, so that their times must not be compared."""


class Row(NamedTuple):
    name: str
    here: str
    there: str
    ratio: float
    floor: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each side (default 5)")
    parser.add_argument("--nlsq", type=Path, help="a Python with nlsq 0.4.2")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the big file goes"
    )
    parser.add_argument("--nlsq-server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--full-pass", nargs=2, metavar=("FOLDER", "WHAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.full_pass:
        return _full_pass(Path(options.full_pass[0]), options.full_pass[1])
    repeats = 1 if options.quick else options.repeats
    print(
        f"pykernels {pk.__version__}, jax {jax.__version__}, diffrax {version('diffrax')}, optax {version('optax')}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores; medians of {repeats}\n\n{HEADER}",
        flush=True,
    )
    cases: dict[str, Callable[[], Iterator[Row]]] = {
        "exponential": lambda: exponential(options.nlsq, 20_000 if options.quick else 2_000_000, repeats),
        "100 parameters": lambda: many_parameters(2_000 if options.quick else 20_000, repeats),
        "memmap": lambda: memmap(options.folder, 1 << (18 if options.quick else 28), repeats),
        "trajectories": lambda: trajectories(2_000 if options.quick else 100_000, repeats),
    }
    failed = 0
    for name, case in cases.items():
        if options.only not in name:
            continue
        try:
            for row in case():
                ratio = f"{row.ratio:.3g}" if row.ratio else ""
                print(f"| {row.name} | {row.here} | {row.there} | {ratio} | {row.floor:g} |", flush=True)
        except Disagreement as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed += 1
    if options.quick:
        print("\nA smoke test at tiny sizes, and no measurement.")
    return 1 if failed else 0


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _medians(here: Callable[[], float], there: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Interleaved; both have run before."""
    samples = [(here(), there()) for _ in range(repeats)]
    return statistics.median(s[0] for s in samples), statistics.median(s[1] for s in samples)


def _agree(here: Any, there: Any, rtol: float, what: str) -> None:
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        if not np.allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b))):
            raise Disagreement(f"{what}: {np.asarray(a)} and {np.asarray(b)}")


# --- one epoch of Adam on two parameters


def decay(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return a * jnp.exp(-b * x)


def points(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(0.0, 4.0, count)
    return x, 2.5 * np.exp(-0.7 * x) + 0.01 * rng.normal(size=count)


NLSQ = """
import logging, sys, time
import numpy as np
logging.disable(logging.CRITICAL)
import jax.numpy as jnp
from nlsq import StreamingConfig, StreamingOptimizer

x, y = np.load(sys.argv[1])
optimizers = {}
for line in sys.stdin:
    size = int(line)
    if size not in optimizers:  # its fastest settings
        optimizers[size] = StreamingOptimizer(StreamingConfig(
            batch_size=size, max_epochs=1, learning_rate=0.01, warmup_steps=0, gradient_clip=1e300, convergence_tol=1e-300,
            enable_fault_tolerance=False, validate_numerics=False, enable_checkpoints=False, batch_shape_padding="static"))
    optimizers[size].reset_state()
    start = time.perf_counter()
    result = optimizers[size].fit((x, y), lambda x, a, b: a * jnp.exp(-b * x), np.array([1.0, 1.0]), verbose=0)
    print("seconds", time.perf_counter() - start, *result["x"], flush=True)
"""


class Nlsq:
    """nlsq in a process of its own: one epoch for each batch size it is told."""

    def __init__(self, python: Path, file: Path) -> None:
        self._process = subprocess.Popen(
            [python, "-c", NLSQ.replace("lambda x, a, b: a * jnp.exp(-b * x)", "model").replace(
                "optimizers = {}", "optimizers = {}\ndef model(x, a, b):\n    return a * jnp.exp(-b * x)\n")
             , str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def epoch(self, batch_size: int) -> tuple[float, np.ndarray]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{batch_size}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds"):
                seconds, *x = map(float, line.split()[1:])
                return seconds, np.array(x)
        raise RuntimeError("nlsq ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def adam_by_hand(x: np.ndarray, y: np.ndarray, batch_size: int) -> np.ndarray:
    """The same epoch in NumPy, as the reference."""
    p, m, v = np.ones(2), np.zeros(2), np.zeros(2)
    for i, start in enumerate(range(0, len(x), batch_size), 1):
        rows = slice(start, start + batch_size)
        e = np.exp(-p[1] * x[rows])
        r = p[0] * e - y[rows]
        slope = np.array([np.mean(2 * r * e), np.mean(-2 * r * p[0] * e * x[rows])])
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        p = p - 0.01 * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
    return p


def exponential(python: Path | None, count: int, repeats: int) -> Iterator[Row]:
    x, y = points(count)
    adam = optax.adam(0.01)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "points.npy", np.stack([x, y]))
        nlsq = None if python is None else Nlsq(python, Path(folder) / "points.npy")
        for batch_size, floor in ((1_000, 3.0), (10_000, 1.5), (100_000, 1.2)):

            def ours(batch_size: int = batch_size) -> jax.Array:
                return pk.stream.fit(
                    decay,
                    (x, y),
                    [1.0, 1.0],
                    optimizer=adam,
                    epochs=1,
                    batch_size=batch_size,
                    evaluate="never",
                ).x

            found = ours()
            _agree(found, adam_by_hand(x, y, batch_size), 1e-9, f"batches of {batch_size}")
            here, there = _seconds(ours), 0.0
            if nlsq is not None:
                # It returns the parameters of its best batch, not the last ones.
                _agree(found, nlsq.epoch(batch_size)[1], 1e-2, f"nlsq, batches of {batch_size}")
                here, there = _medians(
                    lambda: _seconds(ours), lambda size=batch_size: nlsq.epoch(size)[0], repeats
                )
            name = f"exponential, {count:,} points, one epoch of Adam, batches of {batch_size:,}, points per second"
            beside = f"nlsq {count / there / 1e6:.3g} million" if there else ""
            yield Row(name, f"{count / here / 1e6:.3g} million", beside, there / here, floor)
        if nlsq is not None:
            nlsq.close()


# --- the gradient of a model with a hundred parameters


def bumps(params: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Fifty Gaussian bumps with heights and places to fit."""
    x, y = batch
    heights, places = params[:50], params[50:]
    return (jnp.exp(-((x[:, None] - places) ** 2) * 50.0) @ heights - y) ** 2


def many_parameters(count: int, repeats: int) -> Iterator[Row]:
    rng = np.random.default_rng(1)
    batch = rng.uniform(0.0, 10.0, count), rng.normal(size=count)
    params = jnp.asarray(np.concatenate([rng.normal(size=50), np.linspace(0.0, 10.0, 50)]))
    reverse = pk.stream.value_and_grad(bumps, batch)
    central = pk.stream.value_and_grad(bumps, batch, gradient="finite-difference")
    loss = jax.jit(lambda p: jnp.mean(bumps(p, batch)))

    def forward_differences() -> np.ndarray:
        """As SciPy's curve_fit makes them: one evaluation of the whole loss for each parameter, and one more."""
        p = np.asarray(params)
        step = 1.5e-8 * np.maximum(1.0, np.abs(p))
        start = float(loss(p))
        return np.array(
            [(float(loss(p + step * e)) - start) / s for e, s in zip(np.eye(100), step, strict=True)]
        )

    exact = reverse(params)[1]
    _agree(forward_differences(), exact, 1e-5, "forward differences")
    _agree(central(params)[1], exact, 1e-6, "central differences")
    for name, other in (
        ("forward differences by hand, 101 evaluations", forward_differences),
        ('gradient="finite-difference", 201 evaluations', functools.partial(central, params)),
    ):
        here, there = _medians(
            lambda: _seconds(lambda: reverse(params)), lambda f=other: _seconds(f), repeats
        )
        yield Row(
            f"gradient of 100 parameters, {count:,} rows", f"{here * 1e3:.3g} ms", f"{name}: {there * 1e3:.3g} ms",
            there / here, 30.0,
        )  # fmt: skip


# --- an exact full pass over a file

READ_BYTES = 1 << 20


def squares(params: tuple[jax.Array, jax.Array], batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return (decay(batch[0], *params) - batch[1]) ** 2


def _full_pass(folder: Path, what: str) -> int:
    """In a process of its own: prints the time, the peak of memory above that of JAX loaded, and the value."""
    params = (jnp.float64(2.0), jnp.float64(0.5))
    columns = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy"]
    apply = jax.jit(lambda total, x, y: total + jnp.sum(squares(params, (x, y))))

    def read() -> jax.Array:
        """Reads the file and applies the model, and nothing else."""
        total, rows = jnp.float64(0), READ_BYTES // 8
        offset = columns[0].offset
        with open(folder / "x.npy", "rb", buffering=0) as fx, open(folder / "y.npy", "rb", buffering=0) as fy:
            fx.seek(offset)
            fy.seek(offset)
            pending: list[jax.Array] = []
            for _ in range(0, len(columns[0]), rows):
                x, y = np.empty(rows), np.empty(rows)
                count = fx.readinto(x.view(np.uint8).data)
                fy.readinto(y.view(np.uint8).data)
                total = apply(total, x[: count // 8], y[: count // 8])
                pending.append(total)
                if len(pending) > 3:
                    pending.pop(0).block_until_ready()
        return total / len(columns[0])

    gradient = pk.stream.value_and_grad(squares, tuple(columns))
    some = pk.stream.value_and_grad(squares, tuple(c[: 1 << 18] for c in columns))
    some(params)  # compiled
    jax.block_until_ready(apply(jnp.float64(0), np.zeros(READ_BYTES // 8), np.zeros(READ_BYTES // 8)))
    before = _kilobytes("VmRSS")
    start = time.perf_counter()
    value = read() if what == "read" else gradient(params)[0]
    value = float(value)
    print(time.perf_counter() - start, (_kilobytes("VmHWM") - before) / 1024, value)
    return 0


def _kilobytes(name: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def memmap(folder: Path, rows: int, repeats: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        x, y = points(1 << 18)
        for column, values in (("x", x), ("y", y)):
            file = np.lib.format.open_memmap(place / f"{column}.npy", "w+", np.float64, (rows,))
            for start in range(0, rows, len(values)):
                file[start : start + len(values)] = values[: rows - start]
            file.flush()
            del file
        peaks = []

        def run(what: str) -> float:
            command = [sys.executable, __file__, "--full-pass", str(place), what]
            seconds, peak, value = map(float, subprocess.check_output(command, text=True).split())
            values[what] = value
            if what == "ours":
                peaks.append(peak)
            return seconds

        values: dict[str, float] = {}
        run("read"), run("ours")  # the file is in the system's cache, where it fits
        _agree(values["ours"], values["read"], 1e-10, "the value")
        peaks.clear()
        here, there = _medians(lambda: run("ours"), lambda: run("read"), repeats)
        size = 16 * rows / 2**30
        yield Row(
            f"value and gradient over a memmap of {size:.3g} GB, {max(peaks):.0f} MB above JAX loaded (at most 300)",
            f"{size / here:.3g} GB/s", f"reading and applying the model: {size / there:.3g} GB/s", there / here, 0.7,
        )  # fmt: skip


# --- a model that is an ODE


def lotka_volterra(t: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    del t
    hare, lynx = y
    return jnp.stack([hare * (p[0] - p[1] * lynx), lynx * (p[3] * hare - p[2])])


TOLERANCE = 1e-6
END = 5.0


def observed(count: int) -> dict[str, np.ndarray]:
    """Noisy observations at ten times of trajectories from different starts, with shared rates."""
    rng = np.random.default_rng(2)
    y0 = rng.uniform(0.5, 2.0, (count, 2))
    ts = np.sort(rng.uniform(0.0, END, (count, 10)), axis=1)
    step = pk.Adaptive(rtol=1e-8, atol=1e-8)
    sols = pk.solve_ensemble(
        lotka_volterra, y0, 0.0, END, jnp.array([1.0, 0.5, 0.8, 0.4]), step=step, save_at=ts
    )
    return {"y0": y0, "ts": ts, "ys": np.asarray(sols.ys) * np.exp(0.05 * rng.normal(size=sols.ys.shape))}


def trajectory_terms(params: jax.Array, batch: dict[str, jax.Array]) -> pk.stream.Terms:
    sols = pk.solve_ensemble(
        lotka_volterra, batch["y0"], 0.0, END, params, step=pk.Adaptive(rtol=TOLERANCE, atol=TOLERANCE),
        dt0=0.05, save_at=batch["ts"], throw=False,
    )  # fmt: skip
    return pk.stream.Terms(jnp.mean((sols.ys - batch["ys"]) ** 2, axis=(1, 2)), ok=sols.ok)


def diffrax_loss(params: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    def one(y0: jax.Array, ts: jax.Array, ys: jax.Array) -> jax.Array:
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(lotka_volterra), diffrax.Tsit5(), 0.0, END, 0.05, y0, params,
            saveat=diffrax.SaveAt(ts=ts), stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        )  # fmt: skip
        return jnp.mean((sol.ys - ys) ** 2)

    return jnp.mean(jax.vmap(one)(batch["y0"], batch["ts"], batch["ys"]))


def trajectories(count: int, repeats: int) -> Iterator[Row]:
    data = observed(count)
    batch_size = min(1_000, count // 2)
    start = jnp.array([0.8, 0.6, 0.9, 0.3])
    adam = optax.adam(0.01)

    def ours() -> jax.Array:
        return pk.stream.minimize(
            trajectory_terms, data, start, optimizer=adam, epochs=1, batch_size=batch_size, evaluate="never"
        ).x

    @jax.jit
    def update(p: jax.Array, state: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        changes, state = adam.update(jax.grad(diffrax_loss)(p, batch), state)
        return optax.apply_updates(p, changes), state

    def by_hand() -> jax.Array:
        p, state = start, adam.init(start)
        for i in range(0, count, batch_size):
            p, state = update(p, state, {name: column[i : i + batch_size] for name, column in data.items()})
        return p

    _agree(ours(), by_hand(), 1e-5, "parameters")
    here, there = _medians(lambda: _seconds(ours), lambda: _seconds(by_hand), repeats)
    yield Row(
        f"{count:,} trajectories of Lotka-Volterra, shared rates, one epoch of Adam, batches of {batch_size:,}",
        f"{here:.3g} s", f"diffrax and optax by hand: {there:.3g} s", there / here, 15.0,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
