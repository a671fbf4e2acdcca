"""Everybody who solves a problem of `cases.py`, one adapter each. To add a rival, write its `..._program` and its entry in
`RIVALS`.

All get the same field, tolerances, first step where they take one, and loss: the sum of squares of the final states,
differentiated with respect to the arguments. What an adapter raises `Unavailable` for is left out with a line.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint
from jax.sharding import Mesh, PartitionSpec

import pykernels as pk
from bench.cases import FIRST_STEP, Case, Problem
from bench.timing import LONG_SECONDS, timed
from bench.written import FIELDS, Written, leaves_of, rows
from pykernels import reference
from pykernels.kernels import cpu


class Unavailable(Exception):
    """A rival cannot be run here; the message says why."""


@dataclass(frozen=True)
class Program:
    """A compiled program with its inputs. `run` waits for the result: ((loss or None, (ys, attempts)), gradient or None).

    `attempts` is None where a solver does not tell; `evaluations` makes field evaluations of it. `temporary_bytes` is what
    XLA allocates beside inputs and results. `overhead` is what a user waits for besides a run, compilation excepted.
    """

    run: Callable[[], Any]
    compile_seconds: float
    temporary_bytes: int | None = None
    evaluations: Callable[[Any], int | None] = lambda attempts: None
    overhead: float = 0.0
    label: str = ""


Build = Callable[[Problem, bool], Program]


@dataclass(frozen=True)
class Rival:
    """`build(problem, gradient)` makes the program; `enters` says which problems it is for."""

    name: str
    build: Build
    enters: Callable[[Problem, bool], bool] = lambda problem, gradient: True


def tsit5_evaluations(attempts: Any) -> int | None:
    """Six a step, the first of the next being the last of this one, and one to begin with."""
    if attempts is None:
        return None
    counts = np.atleast_1d(np.asarray(attempts))
    return int(6 * counts.sum(dtype=np.int64) + counts.size)


# pykernels.


def pykernels_program(problem: Problem, gradient: bool, config: pk.Config | None = None) -> Program:
    """pykernels with its default adjoint and, unless told otherwise, its own choice of how to run."""
    return _compiled(_ours(problem, config), problem, gradient)


class _Remembering:
    """An adjoint in the reference's manner: every step is remembered, and JAX goes back through all of it."""

    def integrate(self, spec: Any, inputs: Any) -> Any:
        return reference.solve(inputs, spec)


def reference_program(problem: Problem, gradient: bool) -> Program:
    """pykernels's specification of a solve, in plain JAX."""
    return _compiled(_ours(problem, adjoint=_Remembering()), problem, gradient)


def _ours(
    problem: Problem, config: pk.Config | None = None, adjoint: Any = None
) -> Callable[[Any, Any], Any]:
    field = problem.field()
    adaptive = problem.fixed_steps is None
    settings: dict[str, Any] = {
        "step": pk.Adaptive(problem.rtol, problem.atol) if adaptive else pk.Fixed(problem.fixed_steps),
        "dt0": FIRST_STEP if adaptive else None,
        "max_steps": problem.max_steps,
        "config": config,
        "throw": False,
    }
    if adjoint is not None:
        settings["adjoint"] = adjoint

    def final(y0s: Any, args: Any) -> Any:
        if problem.alone:
            solution = pk.solve(field, y0s, 0.0, problem.end, args, **settings)
        else:
            in_axes = (0, None if problem.shared_args else 0)
            solution = pk.solve_ensemble(field, y0s, 0.0, problem.end, args, in_axes=in_axes, **settings)
        return solution.ys, solution.stats.attempts

    return final


def native_program(problem: Problem, gradient: bool) -> Program:
    """The lanes plan in machine code."""
    reason = cpu.unavailable()
    if reason is not None:
        raise Unavailable(reason)
    return pykernels_program(problem, gradient, pk.Config(plan="lanes", runner="native"))


def devices_program(devices: int, problem: Problem, gradient: bool) -> Program:
    """The ensemble split over several devices, of which a host has as many as `jax_num_cpu_devices` says."""
    if len(jax.devices()) < devices:
        raise Unavailable(f"{len(jax.devices())} devices only")
    mesh = Mesh(np.array(jax.devices()[:devices]), ("trajectories",))
    split = PartitionSpec("trajectories")
    final = jax.shard_map(_ours(problem), mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return _compiled(final, problem, gradient)


# JAX.


def diffrax_program(problem: Problem, gradient: bool, checkpoints: int | None = None) -> Program:
    """diffrax under `jax.vmap`, with its checkpointed adjoint; `checkpoints` matters to gradients only."""
    if problem.fixed_steps is None:
        controller = diffrax.PIDController(rtol=problem.rtol, atol=problem.atol)
        first, max_steps = FIRST_STEP, problem.max_steps
    else:
        controller = diffrax.ConstantStepSize()
        first, max_steps = problem.fixed_step, problem.fixed_steps
    adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)
    final = _diffrax(problem, diffrax.Tsit5(), controller, first, max_steps, adjoint)
    return _compiled(final, problem, gradient)


def _diffrax(
    problem: Problem, solver: Any, controller: Any, first: float, max_steps: int, adjoint: Any
) -> Callable[[Any, Any], Any]:
    term = diffrax.ODETerm(problem.field())

    def one(y0: Any, args: Any) -> Any:
        solution = diffrax.diffeqsolve(
            term, solver, 0.0, problem.end, first, y0, args,
            stepsize_controller=controller, max_steps=max_steps, throw=False, adjoint=adjoint,
        )  # fmt: skip
        assert solution.ys is not None
        return jax.tree.map(lambda leaf: leaf[0], solution.ys), solution.stats["num_steps"]

    return _over_trajectories(problem, one)


def best_diffrax(problem: Problem, gradient: bool) -> Program:
    """diffrax at its fastest checkpoint setting."""
    best, best_seconds = None, float("inf")
    for checkpoints in problem.checkpoints if gradient else (None,):
        program = diffrax_program(problem, gradient, checkpoints)
        seconds, _ = timed(program.run)
        if seconds < LONG_SECONDS:
            seconds, _ = timed(program.run)
        if seconds < best_seconds:
            label = f"{'default' if checkpoints is None else checkpoints} checkpoints" if gradient else ""
            best, best_seconds = replace(program, label=label), seconds
    assert best is not None
    return best


def implicit_diffrax_program(problem: Problem, gradient: bool) -> Program:
    """diffrax with an implicit method of fifth order."""
    controller = diffrax.PIDController(rtol=problem.rtol, atol=problem.atol)
    final = _diffrax(
        problem, diffrax.Kvaerno5(), controller, FIRST_STEP, problem.max_steps, diffrax.RecursiveCheckpointAdjoint()
    )  # fmt: skip
    made = _compiled(final, problem, gradient)
    return replace(made, evaluations=lambda attempts: None)  # Newton's iterations are not told


def odeint_program(problem: Problem, gradient: bool) -> Program:
    """`jax.experimental.ode`: Dormand-Prince 5(4), the adjoint equation solved backwards."""
    field = problem.field()

    def one(y0: Any, args: Any) -> Any:
        times = jnp.asarray([0.0, problem.end], problem.dtype)
        ys = odeint(
            lambda y, t, args: field(t, y, args), y0, times, args, rtol=problem.rtol, atol=problem.atol
        )
        return jax.tree.map(lambda leaf: leaf[-1], ys), None

    return _compiled(_over_trajectories(problem, one), problem, gradient)


def scan_program(problem: Problem, gradient: bool) -> Program:
    """What one writes by hand: the classical Runge-Kutta method, a fixed number of steps, in `lax.scan` under `jax.vmap`."""
    field, steps = problem.field(), problem.hand_steps

    def one(y0: Any, args: Any) -> Any:
        h = problem.end / steps

        def moved(y: Any, by: float, k: Any) -> Any:
            return jax.tree.map(lambda a, b: a + by * b, y, k)

        def step(y: Any, i: Any) -> Any:
            t = i.astype(problem.dtype) * h
            k1 = field(t, y, args)
            k2 = field(t + h / 2, moved(y, h / 2, k1), args)
            k3 = field(t + h / 2, moved(y, h / 2, k2), args)
            k4 = field(t + h, moved(y, h, k3), args)
            mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
            return moved(y, h, mean), None

        return jax.lax.scan(step, y0, jnp.arange(steps))[0], jnp.asarray(steps)

    made = _compiled(_over_trajectories(problem, one), problem, gradient)
    return replace(made, evaluations=lambda steps: 4 * int(np.sum(steps)), label=f"{steps} steps")


def _over_trajectories(problem: Problem, one: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return one if problem.alone else jax.vmap(one, in_axes=(0, None if problem.shared_args else 0))


def gradsolve_program(problem: Problem, gradient: bool) -> Program:
    """gradsolve's replay of recorded steps. Its overhead is the recording, which every new parameter value needs."""
    if importlib.util.find_spec("gradsolve") is None:
        raise Unavailable("gradsolve is not installed")
    import gradsolve as library

    assert gradient
    field, (y0s, args) = problem.field(), problem.inputs()

    class System:
        name, dim, is_stiff = "bench", y0s.shape[-1], False
        t0, t1 = 0.0, problem.end

        def f_jax(self, t: Any, y: Any, p: Any) -> Any:
            return field(t, y, p)

    def record() -> Any:
        return library.grad_closure(
            System(), y0s, args, engine="tsit5_replay", rtol=problem.rtol, atol=problem.atol
        )

    first, _ = timed(record)
    overhead = float(np.median([timed(record)[0] for _ in range(3)]))
    closure = record()
    made = _compiled(lambda y0s, args: (closure(args), None), problem, gradient)
    return replace(made, compile_seconds=made.compile_seconds + first - overhead, overhead=overhead)


def _compiled(final: Callable[[Any, Any], Any], problem: Problem, gradient: bool) -> Program:
    """Trace, lower and compile with nothing left in JAX's caches, which is what a user waits for."""

    def loss(args: Any, y0s: Any) -> Any:
        ys, attempts = final(y0s, args)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ys)), (ys, attempts)

    def forward(args: Any, y0s: Any) -> Any:
        return (None, final(y0s, args)), None

    # float32 programs are traced with float64 off, as their users would run them.
    with jax.enable_x64(problem.dtype == "float64"):
        y0s, args = problem.arrays()
        jax.clear_caches()
        start = time.perf_counter()
        compiled = (
            jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else forward)
            .lower(args, y0s)
            .compile()
        )
        seconds = time.perf_counter() - start

    def run() -> Any:
        return jax.block_until_ready(compiled(args, y0s))

    return Program(run, seconds, compiled.memory_analysis().temp_size_in_bytes, tsit5_evaluations)


# Others. Their results are NumPy's, their attempts None.


def scipy_program(problem: Problem, gradient: bool) -> Program:
    """SciPy, one trajectory after the other: RK45, or Radau where the problem is stiff."""
    from scipy.integrate import solve_ivp

    field = _written(problem).plain
    (starts, args), alone = problem.inputs(), problem.alone
    y0s, ps = rows(starts, alone), rows(args, alone)
    method = "Radau" if problem.stiff else "RK45"

    def run() -> Any:
        solved = [
            solve_ivp(
                field, (0.0, problem.end), y0, method, args=(p if p.size == 1 else (p.tolist(),)),
                rtol=problem.rtol, atol=problem.atol, first_step=FIRST_STEP,
            )
            for y0, p in zip(y0s, ps, strict=True)
        ]  # fmt: skip
        ys = leaves_of(np.array([one.y[:, -1] for one in solved]), starts, alone)
        return (None, (ys, np.array([one.nfev for one in solved]))), None

    return Program(run, 0.0, evaluations=lambda counts: int(np.sum(counts)), label=method)


def torchdiffeq_program(problem: Problem, gradient: bool) -> Program:
    """torchdiffeq: Dormand-Prince 5(4), one step size for all trajectories, gradients through the solver's operations."""
    torch, library = _torch("torchdiffeq")

    def final(field: Callable[[Any, Any], Any], y0s: Any) -> Any:
        times = torch.tensor([0.0, problem.end], dtype=torch.float64)
        return library.odeint(field, y0s, times, rtol=problem.rtol, atol=problem.atol, method="dopri5")[-1]

    return _torch_program(torch, final, problem, gradient)


def torchode_program(problem: Problem, gradient: bool) -> Program:
    """torchode: Tsit5, a step size for each trajectory, gradients through the solver's operations."""
    torch, library = _torch("torchode")

    def final(field: Callable[[Any, Any], Any], y0s: Any) -> Any:
        term = library.ODETerm(field)
        controller = library.IntegralController(problem.atol, problem.rtol, term=term)
        adjoint = library.AutoDiffAdjoint(library.Tsit5(term), controller)
        start = torch.zeros(len(y0s), dtype=torch.float64)
        span = library.InitialValueProblem(y0=y0s, t_start=start, t_end=start + problem.end)
        return adjoint.solve(span, dt0=start + FIRST_STEP).ys[:, -1]

    return _torch_program(torch, final, problem, gradient)


def _torch(name: str) -> tuple[Any, Any]:
    for wanted in ("torch", name):
        if importlib.util.find_spec(wanted) is None:
            raise Unavailable(f"{wanted} is not installed (pip install '.[rivals]')")
    import torch

    return torch, importlib.import_module(name)


def _torch_program(torch: Any, final: Callable[[Any, Any], Any], problem: Problem, gradient: bool) -> Program:
    field = _written(problem).torch
    assert field is not None
    (starts, args), alone = problem.inputs(), problem.alone
    y0s, ps = (torch.tensor(rows(tree, alone)) for tree in (starts, args))
    ps.requires_grad_(gradient)

    def run() -> Any:
        with torch.set_grad_enabled(gradient):
            ys = final(lambda t, y: field(t, y, ps), y0s)
            if not gradient:
                return (None, (leaves_of(ys.numpy(), starts, alone), None)), None
            loss = (ys**2).sum()
            (slope,) = torch.autograd.grad(loss, ps)
        states = leaves_of(ys.detach().numpy(), starts, alone)
        return (loss.item(), (states, None)), leaves_of(slope.numpy(), args, alone)

    return Program(run, 0.0)


def cpp_program(problem: Problem, gradient: bool) -> Program:
    """`hand.cpp`, compiled for this machine; threads as many as cores."""
    seconds, library = timed(functools.partial(_cpp_library, problem.written, problem.max_steps))
    (starts, args), alone = problem.inputs(), problem.alone
    y0s, ps = rows(starts, alone), rows(args, alone)
    ys, attempts = np.empty_like(y0s), np.empty(len(y0s), np.int32)
    slopes = np.empty_like(ps)

    def pointer(array: np.ndarray) -> Any:
        return array.ctypes.data_as(ctypes.c_void_p)

    numbers = [ctypes.c_double(x) for x in (problem.end, problem.rtol, problem.atol, FIRST_STEP)]
    arrays = [pointer(a) for a in (y0s, ps, ys, attempts)]

    def run() -> Any:
        library.run(
            ctypes.c_long(len(y0s)), ctypes.c_int(os.cpu_count() or 1), *numbers, *arrays,
            pointer(slopes) if gradient else None,
        )  # fmt: skip
        if attempts.min() < 0:
            raise RuntimeError("out of steps")
        states, counts = leaves_of(ys, starts, alone), attempts[0] if alone else attempts
        if not gradient:
            return (None, (states, counts)), None
        return (float(np.sum(ys**2)), (states, counts)), leaves_of(slopes, args, alone)

    return Program(run, seconds, evaluations=tsit5_evaluations)


@functools.cache
def _cpp_library(name: str, max_steps: int) -> Any:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise Unavailable("no C++ compiler")
    written, method = FIELDS[name], pk.tsit5
    assert written.cpp is not None and method.error is not None
    stages = len(method.b)

    def numbers(values: Any) -> str:
        return "{" + ", ".join(repr(float(v)) for v in values) + "}"

    matrix = [[*row, *[0.0] * (stages - len(row))] for row in ((), *method.a)]
    parts = {
        "STATES": str(written.states), "ARGUMENTS": str(written.args), "STAGES": str(stages),
        "MAX_STEPS": str(max_steps), "TABLEAU_A": "{" + ", ".join(map(numbers, matrix)) + "}",
        "TABLEAU_B": numbers(method.b), "TABLEAU_E": numbers(method.error), "TABLEAU_C": numbers(method.c),
        "FIELD": written.cpp[0], "PULL": written.cpp[1],
    }  # fmt: skip
    source = (Path(__file__).parent / "hand.cpp").read_text()
    for key, text in parts.items():
        source = source.replace(f" {key}", f" {text}")
    with tempfile.TemporaryDirectory() as folder:
        file, library = Path(folder) / "hand.cpp", Path(folder) / "hand.so"
        file.write_text(source)
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        done = subprocess.run(
            [compiler, *flags, str(file), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"hand.cpp does not compile: {done.stderr[:300]}")
        return ctypes.CDLL(str(library))


def _written(problem: Problem) -> Written:
    assert problem.written is not None
    return FIELDS[problem.written]


# Who enters for what.


def _one_array(problem: Problem) -> bool:
    """An array of states, arguments of each trajectory's own."""
    return not (problem.alone or problem.shared_args) and all(
        isinstance(a, np.ndarray) and a.ndim == 2 for a in problem.inputs()
    )


def _adaptive(problem: Problem, gradient: bool) -> bool:
    return problem.fixed_steps is None


def _in_torch(problem: Problem, gradient: bool) -> bool:
    return (
        problem.written is not None and FIELDS[problem.written].torch is not None and problem.lanes <= 1_024
    )


#: All of them, pykernels first.
RIVALS = {
    rival.name: rival
    for rival in (
        Rival("pykernels", pykernels_program),
        Rival("pykernels, native lanes", native_program),
        Rival("pykernels, portable lanes", functools.partial(pykernels_program, config=pk.Config(runner="xla"))),
        Rival("pykernels, array plan", functools.partial(pykernels_program, config=pk.Config(plan="array"))),
        Rival("pykernels, reference", reference_program, lambda problem, gradient: problem.lanes <= 16),
        Rival("pykernels, 1 device", functools.partial(devices_program, 1)),
        Rival("pykernels, 2 devices", functools.partial(devices_program, 2)),
        Rival("lax.scan by hand, RK4", scan_program, lambda problem, gradient: not problem.stiff),
        Rival("diffrax", best_diffrax),
        Rival("diffrax, Kvaerno5", implicit_diffrax_program, lambda problem, gradient: problem.stiff),
        Rival("gradsolve", gradsolve_program, lambda problem, gradient: gradient and _one_array(problem)),
        Rival("jax.experimental.ode", odeint_program, _adaptive),
        Rival(
            "SciPy", scipy_program,
            lambda problem, gradient: not gradient and problem.written is not None and problem.lanes <= 64,
        ),
        Rival("torchdiffeq", torchdiffeq_program, _in_torch),
        Rival("torchode", torchode_program, _in_torch),
        Rival(
            "C++ by hand", cpp_program,
            lambda problem, gradient: problem.written is not None and FIELDS[problem.written].cpp is not None,
        ),
    )
}  # fmt: skip


def disagreement(case: Case, ours: Any, theirs: Any) -> str | None:
    """Why the two results of a case may not be compared, None if they may.

    They must have made the same attempts: exactly in float64, where both follow the same decisions, and within
    2 % in float32, where rounding may turn a borderline one. In float64 the results agree to 1e-9 of the largest
    value (both round differently, and some trajectories amplify that). In float32 each is held against the
    float64 solution with the same settings: ours may be no further from it than three times diffrax's distance,
    or 32 roundings.
    """
    attempts, their_attempts = (int(np.sum(np.asarray(result[0][1][1]))) for result in (ours, theirs))
    is_double = case.problem.dtype == "float64"
    if abs(attempts - their_attempts) > (0 if is_double else 0.02 * their_attempts):
        return f"different work: {attempts} attempts here, {their_attempts} in diffrax"
    mine, other = _values(ours), _values(theirs)
    if not all(np.all(np.isfinite(a)) for a in (*mine, *other)):
        return "not finite"
    if is_double:
        distances = [np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(mine, other, strict=True)]
        return f"distance from diffrax {max(distances):.1e}" if max(distances) > 1e-9 else None
    exact = _values(diffrax_program(replace(case.problem, dtype="float64"), case.gradient).run())
    for a, b, c in zip(mine, other, exact, strict=True):
        scale = np.max(np.abs(c))
        error, their_error = np.max(np.abs(a - c)) / scale, np.max(np.abs(b - c)) / scale
        if error > max(3 * their_error, 32 * np.finfo(np.float32).eps):
            return f"error {error:.1e}, diffrax's {their_error:.1e}"
    return None


def _values(result: Any) -> list[np.ndarray]:
    """Loss, final states and gradient as float64 arrays."""
    (loss, (ys, _)), gradient = result
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((loss, ys, gradient))]
