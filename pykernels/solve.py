"""The thin solver: validate, choose the plan, hand over to the adjoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pykernels import lanes, primitives
from pykernels.adjoint import Adjoint, Milestones
from pykernels.field import Field, as_operands, as_state, trace_field
from pykernels.kernels import report, stepper, xla
from pykernels.kernels.report import GpuReport
from pykernels.kernels.stepper import Solve
from pykernels.order import check_order, integrate_in_order
from pykernels.stepsize import Adaptive, Fixed
from pykernels.tableau import ButcherTableau, tsit5

if TYPE_CHECKING:
    from jaxtyping import Array, ArrayLike, Bool, Float, Int32

PyTree = Any
FieldFunction = Callable[..., PyTree]

# Above these, XLA's loops over single components take longer, to compile and to run, than loops over whole arrays.
# Measured with `bench/lifts.py`.
COMPONENT_OPERATIONS = 24
COMPONENT_ELEMENTS = 8
# Above either of these a solve takes the array plan: its state, or the field's products, are then too much for one kernel,
# and whole solves run as XLA's loops on blocks of trajectories, whose gradients take longer. Measured with `bench/plans.py`.
LANES_OPERATIONS = 4096
LANES_ELEMENTS = 256


class Status(IntEnum):
    """Why a trajectory stopped."""

    SUCCESS = stepper.SUCCESS
    MAX_STEPS = stepper.MAX_STEPS
    STEP_TOO_SMALL = stepper.STEP_TOO_SMALL
    NON_FINITE = stepper.NON_FINITE


_REASONS = {
    Status.MAX_STEPS: "out of attempts (max_steps)",
    Status.STEP_TOO_SMALL: "the step would have to go under dtmin or rounding",
    Status.NON_FINITE: "the state or the field is not finite",
}


class SolveError(RuntimeError):
    """Some trajectories failed. `status` has one entry per trajectory."""

    def __init__(self, status: np.ndarray) -> None:
        self.status = status
        flat = np.atleast_1d(status).reshape(-1)
        parts = []
        for reason, text in _REASONS.items():
            failed = np.flatnonzero(flat == reason)
            if failed.size:
                shown = ", ".join(map(str, failed[:8])) + (", ..." if failed.size > 8 else "")
                parts.append(f"{text}: trajectory {shown}" if flat.size > 1 else text)
        super().__init__(
            f"{int(np.sum(flat != 0))} of {flat.size} trajectories failed; {'; '.join(parts)}. "
            "Pass throw=False to get NaN for these and the others' values."
        )


class Stats(NamedTuple):
    """Counts per trajectory, int32: attempts = accepted + rejected; evaluations of the field include the initial ones."""

    attempts: Int32[Array, " *lanes"]
    accepted: Int32[Array, " *lanes"]
    rejected: Int32[Array, " *lanes"]
    field_evaluations: Int32[Array, " *lanes"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["ts", "ys", "status", "stats"], meta_fields=[]
)
@dataclass(frozen=True)
class Solution:
    """What a solve returns; a pytree.

    `ys`: the final state with the structure and shapes of `y0`; with n save times every leaf has an axis of length n in
    front of the state's own axes, behind the trajectory axis of an ensemble. `ts`: the times of `ys`. `status`: int32, see
    `Status`. Values of failed trajectories are NaN.
    """

    ts: Float[Array, " *times"]
    ys: PyTree
    status: Int32[Array, " *lanes"]
    stats: Stats

    @property
    def ok(self) -> Bool[Array, " *lanes"]:
        """Which trajectories arrived."""
        return self.status == Status.SUCCESS


@dataclass(frozen=True)
class Config:
    """Overrides of what is otherwise chosen by measured rules; None: choose.

    `plan`: "lanes" fuses the whole solve of a block of trajectories, "array" evaluates the field as written, one step at a
    time, and fuses the rest of a step. `runner`: "native" is machine code through LLVM, on CPUs and, in the lanes plan, on
    NVIDIA GPUs, where "pallas" is a Pallas kernel for the lanes plan and "triton" runs the array plan's passes (where one of
    them is not possible an error says why); "xla" is the portable one.
    `lift`: "components" or "arrays", how the portable runner lifts the field. `block`: trajectories per block; on CPUs
    the native runner takes the next power of two, up to 64, on GPUs whole warps of 32, up to 1,024.
    """

    plan: Literal["lanes", "array"] | None = None
    lift: Literal["components", "arrays"] | None = None
    block: int | None = None
    runner: Literal["native", "pallas", "triton", "xla"] | None = None

    def __post_init__(self) -> None:
        if self.plan not in (None, "lanes", "array"):
            raise ValueError(f"Config(plan=) must be 'lanes' or 'array', not {self.plan!r}")
        if self.lift not in (None, "components", "arrays"):
            raise ValueError(f"Config(lift=) must be 'components' or 'arrays', not {self.lift!r}")
        if self.runner not in (None, "native", "pallas", "triton", "xla"):
            raise ValueError(
                f"Config(runner=) must be 'native', 'pallas', 'triton' or 'xla', not {self.runner!r}"
            )
        if self.runner in ("native", "pallas") and self.lift is not None:
            raise ValueError(f"Config(runner={self.runner!r}) has its own lift")
        if (self.runner, self.plan) in (("pallas", "array"), ("triton", "lanes")):
            raise ValueError(f"Config(runner={self.runner!r}) does not run the {self.plan} plan")
        if self.plan == "array" and self.lift is not None:
            raise ValueError(
                "Config(lift=) is for the lanes plan: the array plan evaluates the field as written"
            )
        if self.block is not None and (not isinstance(self.block, int) or self.block < 1):
            raise ValueError(f"Config(block=) must be a positive int, not {self.block!r}")


@dataclass(frozen=True)
class Explanation:
    """How a call would be executed, and why. Sizes in bytes. `runner` and `block` are those of a CPU. With a target, `gpu`
    says what each of its kernels costs on that GPU; it is empty where no kernel is made for one, and `gpu_reason` says why.
    """

    plan: str
    lift: str
    reason: str
    runner: str
    runner_reason: str
    block: int
    lanes: int
    operations: int
    milestone_bytes_per_trajectory: int
    target: str | None = None
    gpu: tuple[GpuReport, ...] = ()
    gpu_reason: str = ""

    def __str__(self) -> str:
        lines = [str(kernel) for kernel in self.gpu]
        if self.target is not None and not self.gpu:
            lines = [f"{self.target}: runner xla ({self.gpu_reason})"]
        return "\n".join([self._on_cpu(), *lines])

    def _on_cpu(self) -> str:
        lift, blocks = f" ({self.lift} lift)", f"blocks of {self.block} of {self.lanes} trajectories"
        if self.plan == "array":
            lift, blocks = "", f"{self.lanes} trajectories together"
        return (
            f"plan {self.plan}{lift}: {self.reason}\n"
            f"runner {self.runner} ({self.runner_reason}), {blocks}, {self.operations} operations per field evaluation\n"
            f"reverse mode keeps {self.milestone_bytes_per_trajectory} bytes per trajectory"
        )


def solve(
    field: FieldFunction,
    y0: PyTree,
    t0: ArrayLike,
    t1: ArrayLike,
    args: PyTree = None,
    *,
    method: ButcherTableau = tsit5,
    step: Fixed | Adaptive = Adaptive(),  # noqa: B008  (frozen)
    dt0: ArrayLike | None = None,
    save_at: ArrayLike | None = None,
    adjoint: Adjoint = Milestones(),  # noqa: B008  (frozen)
    max_steps: int = 4096,
    config: Config | None = None,
    throw: bool = True,
) -> Solution:
    """Integrate dy/dt = field(t, y, args) from t0 to t1 (backwards if t1 < t0).

    `y0`: pytree of float32 or float64 arrays of one dtype, which is also the dtype of time; `args`: pytree of arrays;
    `field` returns a pytree like `y0` and may close over arrays and traced values. `dt0`: first attempt's size for adaptive
    steps (default: Hairer's rule). `save_at`: sorted times between t0 and t1, whose values come from the method's own
    interpolant. `max_steps` bounds the attempts (with `Fixed(n)` it is n). Differentiable with respect to y0, args,
    closed-over values, t0, t1, dt0 and save_at as `adjoint` says; step sizes are constants of differentiation.

    A failed trajectory has NaN values and gradients, and its status says why; outside of JAX transformations SolveError is
    raised instead, unless `throw=False`.

    Raises TypeError or ValueError for arguments that do not fit together.
    """
    problem = _Problem.of(field, y0, t0, t1, args, None, method, step, dt0, save_at, max_steps, config)
    return _finish(problem, adjoint, throw)


def solve_ensemble(
    field: FieldFunction,
    y0s: PyTree,
    t0: ArrayLike,
    t1: ArrayLike,
    args: PyTree = None,
    *,
    in_axes: tuple[Any, Any] = (0, None),
    method: ButcherTableau = tsit5,
    step: Fixed | Adaptive = Adaptive(),  # noqa: B008  (frozen)
    dt0: ArrayLike | None = None,
    save_at: ArrayLike | None = None,
    adjoint: Adjoint = Milestones(),  # noqa: B008  (frozen)
    max_steps: int = 4096,
    config: Config | None = None,
    order: Literal["work"] | ArrayLike | None = None,
    throw: bool = True,
) -> Solution:
    """Integrate an ensemble of trajectories, each with its own steps.

    `field` is that of one trajectory. `in_axes = (y0s axis, args axis)` as in `jax.vmap`: a pytree prefix, None = shared by
    all; gradients of shared arguments are summed over the ensemble inside the kernel. `t0`, `t1`, `dt0` are scalars or one
    per trajectory, `save_at` has shape (n,) or (trajectories, n). Everything else, and the errors raised, as in `solve`.

    `order`: a block of trajectories takes as long as its slowest, so where work differs much those with similar work should
    share blocks. An array, one number per trajectory, puts the largest numbers first: best `stats.attempts` of an earlier
    solve that was much like this one. "work" sorts by the attempts of a pilot solve with half the digits. It costs about a
    quarter of the solve's attempts at the default tolerances and fewer at tighter ones, but as many where stability limits
    the steps, and is of no use at tolerances much looser than 1e-5. With `Fixed(dt)` "work" sorts by the number of steps,
    without a pilot, and with `Fixed(n)` not at all. Results come in the order given and with the same bits; gradients of
    what is shared are summed in another order. `order` itself is never differentiated.
    """
    problem = _Problem.of(field, y0s, t0, t1, args, in_axes, method, step, dt0, save_at, max_steps, config)
    return _finish(problem, adjoint, throw, check_order(order, problem.lanes))


def explain(
    field: FieldFunction,
    y0: PyTree,
    t0: ArrayLike,
    t1: ArrayLike,
    args: PyTree = None,
    *,
    in_axes: tuple[Any, Any] | None = None,
    method: ButcherTableau = tsit5,
    step: Fixed | Adaptive = Adaptive(),  # noqa: B008  (frozen)
    dt0: ArrayLike | None = None,
    save_at: ArrayLike | None = None,
    adjoint: Adjoint = Milestones(),  # noqa: B008  (frozen)
    max_steps: int = 4096,
    config: Config | None = None,
    target: str | None = None,
) -> Explanation:
    """How `solve` (or, with `in_axes`, `solve_ensemble`) would execute a call. Nothing is integrated.

    `target`: the name of an NVIDIA GPU's architecture, such as "sm_80" (A100) or "sm_90" (H100). The call's kernels are then
    compiled for it, with no GPU at hand, and the explanation tells their registers, instructions per attempt, occupancy and
    modelled time. Raises ValueError for other names, ImportError without `pykernels[cuda]`.
    """
    capability = None if target is None else report.capability_of(target)
    problem = _Problem.of(field, y0, t0, t1, args, in_axes, method, step, dt0, save_at, max_steps, config)
    spec = problem.spec
    runner, why, block = primitives.runner_on_cpu(spec, adjoint.kernels(spec), problem.lanes)
    gpu, gpu_reason = ((), "") if capability is None else _on_gpu(problem, adjoint, capability)
    return Explanation(
        plan="array" if spec.kind == "vmap" else "lanes",
        lift="components" if spec.kind == "small" else spec.kind,
        reason=problem.reason,
        runner=runner,
        runner_reason=why,
        block=block,
        lanes=problem.lanes,
        operations=lanes.operation_count(spec.field.jaxpr),
        milestone_bytes_per_trajectory=adjoint.memory(spec, problem.lanes),
        target=target,
        gpu=gpu,
        gpu_reason=gpu_reason,
    )


def _on_gpu(problem: _Problem, adjoint: Adjoint, capability: int) -> tuple[tuple[GpuReport, ...], str]:
    """What a call's kernels cost on a GPU, or nothing and why it has none."""
    spec = problem.spec
    images = primitives.gpu_images(adjoint.kernels(spec), problem.lanes, capability)
    if isinstance(images, str):
        return (), f"array plan, {problem.reason}" if spec.kind == "vmap" else images
    return tuple(report.report(image, problem.lanes, runner, block) for runner, image, block in images), ""


@dataclass(frozen=True, eq=False)
class _Problem:
    """A validated call: the static solve, its inputs with lanes last, and how to shape the results."""

    spec: Solve
    inputs: list[jax.Array]
    lanes: int
    reason: str
    y_tree: Any
    single: bool
    save_at: jax.Array | None

    @staticmethod
    def of(
        field: FieldFunction, y0: PyTree, t0: ArrayLike, t1: ArrayLike, args: PyTree, in_axes: tuple[Any, Any] | None,
        method: ButcherTableau, step: Fixed | Adaptive, dt0: ArrayLike | None, save_at: ArrayLike | None, max_steps: int,
        config: Config | None,
    ) -> _Problem:  # fmt: skip
        config = config or Config()
        max_steps = _check_settings(field, method, step, dt0, max_steps)
        y = as_state(y0)
        dtype = np.dtype(jax.tree.leaves(y)[0].dtype)
        operands = as_operands(args, dtype)
        y_axes, arg_axes = _axes(y, operands, in_axes)
        lanes_count = _count(jax.tree.leaves(y), y_axes, jax.tree.leaves(operands), arg_axes, in_axes)
        one = _one(y, y_axes)
        if all(0 in leaf.shape for leaf in jax.tree.leaves(one)):
            raise ValueError("y0 has no elements: there is nothing to integrate")
        traced, consts = trace_field(field, one, _one(operands, arg_axes))
        times = [_time(t0, "t0", dtype, lanes_count, in_axes), _time(t1, "t1", dtype, lanes_count, in_axes)]
        if dt0 is not None:
            times.append(_time(dt0, "dt0", dtype, lanes_count, in_axes))
            _check_dt0(times)
        saves = _save_times(save_at, dtype, lanes_count, in_axes, times)
        y_leaves = [
            leaf[..., None] if in_axes is None else _lanes_last(leaf, axis, lanes_count)
            for leaf, axis in zip(jax.tree.leaves(y), y_axes, strict=True)
        ]
        arg_leaves = [
            leaf if axis is None else jnp.moveaxis(leaf, axis, -1)
            for leaf, axis in zip(jax.tree.leaves(operands), arg_axes, strict=True)
        ]
        rows = [] if saves is None or saves.shape[-1] == 0 else [saves if saves.ndim == 1 else saves.T]
        inputs = [*times, *rows, *y_leaves, *arg_leaves, *consts]
        lane = [t.ndim == 1 for t in times] + [r.ndim == 2 for r in rows] + [True] * len(y_leaves)
        lane += [axis is not None for axis in arg_axes] + [False] * len(consts)
        kind, reason = _plan(traced, lane[len(times) + len(rows) :], config)
        # A lift is the portable runner's; the native ones have their own.
        runner = config.runner or ("xla" if config.lift is not None else None)
        spec = Solve(
            traced, method, step, max_steps, dt0 is not None, rows[0].shape[0] if rows else None, kind, tuple(lane),
            config.block or 0, runner,
        )  # fmt: skip
        return _Problem(spec, inputs, lanes_count, reason, jax.tree.structure(y), in_axes is None, saves)


def _check_settings(field: Any, method: Any, step: Any, dt0: Any, max_steps: Any) -> int:
    if not callable(field):
        raise TypeError(f"field must be a function field(t, y, args), not {field!r}")
    if not isinstance(method, ButcherTableau):
        raise TypeError(f"method must be a ButcherTableau such as pykernels.tsit5, not {method!r}")
    if not isinstance(step, (Fixed, Adaptive)):
        raise TypeError(f"step must be Fixed(...) or Adaptive(...), not {step!r}")
    if isinstance(step, Adaptive) and method.error is None:
        raise ValueError(f"{method.name} has no embedded error: use step=Fixed(...) or another method")
    if isinstance(step, Fixed) and dt0 is not None:
        raise ValueError("dt0 is the first step of Adaptive steps; Fixed(...) has its own step size")
    if isinstance(max_steps, bool) or not isinstance(max_steps, (int, np.integer)) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive int, not {max_steps!r}")
    if isinstance(step, Fixed) and step.steps is not None:
        return step.steps
    return int(max_steps)


def _axes(y: PyTree, args: PyTree, in_axes: Any) -> tuple[list[int | None], list[int | None]]:
    """The lane axis of every leaf of y0 and args, None where there is none."""
    if in_axes is None:
        return [None] * len(jax.tree.leaves(y)), [None] * len(jax.tree.leaves(args))
    if not isinstance(in_axes, (tuple, list)) or len(in_axes) != 2:
        raise TypeError(f"in_axes must be (axis of y0s, axis of args), not {in_axes!r}")
    return _broadcast_axes(in_axes[0], y, "y0s"), _broadcast_axes(in_axes[1], args, "args")


def _broadcast_axes(prefix: Any, tree: PyTree, name: str) -> list[int | None]:
    try:
        spread = jax.tree.map(
            lambda axis, part: [axis] * len(jax.tree.leaves(part)), prefix, tree, is_leaf=lambda x: x is None
        )
    except ValueError as error:
        raise ValueError(f"in_axes for {name} must be a pytree prefix of it: {error}") from error
    axes = jax.tree.leaves(spread, is_leaf=lambda x: x is None)
    for axis, leaf in zip(axes, jax.tree.leaves(tree), strict=True):
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
            raise TypeError(f"in_axes for {name} must be made of ints and None, not {axis!r}")
        if axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"in_axes for {name} names axis {axis} of an array of shape {leaf.shape}")
    return axes


def _count(
    y: list[jax.Array],
    y_axes: list[int | None],
    args: list[jax.Array],
    arg_axes: list[int | None],
    in_axes: Any,
) -> int:
    if in_axes is None:
        return 1
    sizes = {
        leaf.shape[axis]
        for leaf, axis in zip((*y, *args), (*y_axes, *arg_axes), strict=True)
        if axis is not None
    }
    if not sizes:
        raise ValueError("in_axes must give at least one leaf of y0s or args a trajectory axis")
    if len(sizes) > 1:
        raise ValueError(f"y0s and args disagree about the number of trajectories: {sorted(sizes)}")
    return sizes.pop()


def _one(tree: PyTree, axes: list[int | None]) -> PyTree:
    """Shapes of a single trajectory."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [
        leaf.shape if axis is None else leaf.shape[: axis % leaf.ndim] + leaf.shape[axis % leaf.ndim + 1 :]
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(
        structure, [jax.ShapeDtypeStruct(s, leaf.dtype) for s, leaf in zip(shapes, leaves, strict=True)]
    )


def _lanes_last(leaf: jax.Array, axis: int | None, count: int) -> jax.Array:
    if axis is None:
        return jnp.broadcast_to(leaf[..., None], (*leaf.shape, count))
    return jnp.moveaxis(leaf, axis, -1)


def _time(value: ArrayLike, name: str, dtype: np.dtype, count: int, in_axes: Any) -> jax.Array:
    time = jnp.asarray(value)
    if jnp.issubdtype(time.dtype, jnp.complexfloating) or time.dtype == bool:
        raise TypeError(f"{name} must be a real number, not {time.dtype}")
    if time.shape not in ((), (count,)) or (in_axes is None and time.shape):
        shapes = "a scalar" if in_axes is None else f"a scalar or of shape ({count},)"
        raise ValueError(f"{name} must be {shapes}, not of shape {time.shape}")
    return time.astype(dtype)


def _is_concrete(*values: Any) -> bool:
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def _check_dt0(times: Sequence[jax.Array]) -> None:
    t0, t1, dt0 = times
    if _is_concrete(t0, t1, dt0):
        wrong = np.asarray(dt0) * np.sign(np.asarray(t1) - np.asarray(t0)) < 0
        if np.any(wrong) or np.any(np.asarray(dt0) == 0) or not np.all(np.isfinite(dt0)):
            raise ValueError("dt0 must be finite, not zero, and have the sign of t1 - t0")


def _save_times(
    save_at: ArrayLike | None, dtype: np.dtype, count: int, in_axes: Any, times: Sequence[jax.Array]
) -> jax.Array | None:
    if save_at is None:
        return None
    dates = jnp.asarray(save_at)
    if dates.ndim not in (1, 2) or (dates.ndim == 2 and (in_axes is None or dates.shape[0] != count)):
        shapes = "(n,)" if in_axes is None else f"(n,) or ({count}, n)"
        raise ValueError(f"save_at must have shape {shapes}, not {dates.shape}")
    if jnp.issubdtype(dates.dtype, jnp.complexfloating) or dates.dtype == bool:
        raise TypeError(f"save_at must be real, not {dates.dtype}")
    dates = dates.astype(dtype)
    if _is_concrete(dates, *times[:2]) and dates.size:
        start, end = (np.asarray(t)[..., None] for t in times[:2])
        sign = np.where(end >= start, 1, -1)
        forward = sign * np.asarray(dates)
        if not np.all(np.diff(forward, axis=-1) >= 0):
            raise ValueError("save_at must be sorted in the direction of integration (and not NaN)")
        if not (np.all(forward >= sign * start) and np.all(forward <= sign * end)):
            raise ValueError("save_at must lie between t0 and t1")
    return dates


def _plan(field: Field, lane: Sequence[bool], config: Config) -> tuple[str, str]:
    """The lift ("vmap": the array plan) and why: rules measured with `bench/plans.py` and `bench/lifts.py`."""
    lane = (True, *lane)  # the time
    wants_lanes = config.plan == "lanes" or config.lift is not None or config.runner == "pallas"
    if config.plan == "array" or config.runner == "triton":
        return "vmap", "asked for by config"
    obstacle = lanes.unsupported(field.jaxpr, lane)
    if obstacle is not None:
        if wants_lanes:
            raise ValueError(f"the lanes plan does not apply: {obstacle}")
        return "vmap", f"the field is outside the lanes plan: {obstacle}"
    operations = lanes.operation_count(field.jaxpr)
    if not wants_lanes and field.elements > LANES_ELEMENTS:
        return "vmap", f"{field.elements} state elements are more than the lanes plan's {LANES_ELEMENTS}"
    if not wants_lanes and operations > LANES_OPERATIONS:
        return "vmap", f"{operations} operations are more than the lanes plan's {LANES_OPERATIONS}"
    inner = lanes.component_obstacle(field.jaxpr, lane)
    if config.lift == "components" and inner is not None:
        raise ValueError(f"the components lift does not apply: {inner}")
    if config.lift is not None:
        return config.lift, "asked for by config"
    if inner is not None:
        return "arrays", f"components are not possible: {inner}"
    if operations > COMPONENT_OPERATIONS or field.elements > COMPONENT_ELEMENTS:
        return (
            "arrays",
            f"{operations} operations on {field.elements} state elements: whole arrays are faster",
        )
    return "small", (
        f"{operations} operations on {field.elements} state elements fit into registers "
        f"(forward, fewer than {xla.FEW_LANES} trajectories are lifted as arrays)"
    )


def _finish(
    problem: _Problem, adjoint: Adjoint, throw: bool, order: str | jax.Array | None = None
) -> Solution:
    if isinstance(adjoint, type) or not hasattr(adjoint, "integrate"):
        raise TypeError(f"adjoint must be Milestones(), BoundedTree() or ForwardOnly(), not {adjoint!r}")
    spec = problem.spec
    inputs = primitives.vary_together(problem.inputs)
    *leaves, status, attempts, accepted = integrate_in_order(adjoint.integrate, spec, inputs, order)
    if problem.save_at is not None and spec.saves is None:  # no times at all
        leaves = [leaf[None][:0] for leaf in leaves]
    ys = [jnp.moveaxis(leaf, -1, 0) for leaf in leaves]
    ts = problem.inputs[1] if problem.save_at is None else problem.save_at
    if problem.single:
        ys, status, attempts, accepted = [y[0] for y in ys], status[0], attempts[0], accepted[0]
    elif ts.ndim == (0 if problem.save_at is None else 1):
        ts = jnp.broadcast_to(ts, (problem.lanes, *ts.shape))
    if throw and _is_concrete(status) and bool(jnp.any(status != 0)):
        raise SolveError(np.asarray(status))
    evaluations = _evaluations(spec, attempts)
    stats = Stats(attempts, accepted, attempts - accepted, evaluations)
    return Solution(ts, jax.tree.unflatten(problem.y_tree, ys), status, stats)


def _evaluations(spec: Solve, attempts: jax.Array) -> jax.Array:
    """Field evaluations as the method counts them: every stage once, an FSAL stage for two steps, interpolants apart."""
    per_attempt = spec.method.stages - spec.method.fsal
    first = int(spec.method.fsal or spec.adaptive) + int(spec.adaptive and not spec.has_dt0)
    return attempts * per_attempt + first
