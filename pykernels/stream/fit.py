"""Fits over a stream: any optax optimizer, one update per batch or per pass, with everything a long run needs."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from pykernels.stream.checkpoint import Checkpoint, CheckpointError
from pykernels.stream.columns import optional
from pykernels.stream.loss import Loss, Model, is_unpacked, model_objective
from pykernels.stream.passes import (
    Chunk,
    Counts,
    InFlight,
    NonFiniteError,
    Options,
    Passes,
    scalars,
    sums_program,
)
from pykernels.stream.programs import programs, settings_of
from pykernels.stream.source import Batches, Shuffle, as_source
from pykernels.stream.sums import (
    Gradient,
    NanPolicy,
    Objective,
    Terms,
    Totals,
    add,
    as_params,
    compiled,
    finished,
    in_dtype_of,
    mean,
    own,
    strong,
    traced_terms,
    zero_sums,
    zero_totals,
)

if TYPE_CHECKING:
    from jaxtyping import ArrayLike

PyTree = Any
Optimizer = Any  # optax.GradientTransformation: optax is optional
Evaluate = Literal["epochs", "end", "never"]


class Progress(NamedTuple):
    """What a callback is told. `batch` is the number of batches of this epoch that are done; `loss` the exact loss at
    these parameters, where one was computed, else None; `running_loss` the mean over this epoch's rows so far, each at
    the parameters of its time (on the device: reading it waits)."""

    epoch: int
    batch: int
    params: PyTree
    running_loss: jax.Array
    loss: float | None


class Epoch(NamedTuple):
    """One line of a fit's history. `running_loss`: mean over the rows, each at the parameters of its time; `loss`: that
    of the validation data, or of a full pass, at the end of the epoch (NaN where none was computed)."""

    epoch: int
    running_loss: float
    loss: float
    counts: Counts
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """What a fit returns, with the names of `scipy.optimize.OptimizeResult`; fields can be read as keys too.

    `x`: the parameters, in the structure of `p0`; the best ones where `fun` was computed more than once. `fun`: the exact
    loss there, of the validation data if there are any, else over the whole stream; NaN with `evaluate="never"`. `jac`:
    its gradient with `updates="pass"`, else None. `success`: all epochs ran, or a tolerance or the patience ended the
    fit. `status`: 0 all epochs, 1 converged, 2 patience, 3 callback, 4 interrupted, 5 no further decrease. `nit`:
    updates; `nfev`: passes over the data for the updates (the last one may be part of one); `counts`: of the last
    complete pass.
    """

    x: PyTree
    fun: float
    jac: PyTree | None
    success: bool
    status: int
    message: str
    nit: int
    nfev: int
    counts: Counts
    best_epoch: int
    history: list[Epoch] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Names of the fields."""
        return list(self.__dataclass_fields__)


_STATUS = {
    0: (True, "all epochs are done"),
    1: (True, "converged: a tolerance is met"),
    2: (True, "no better loss for as many epochs as the patience allows"),
    3: (False, "stopped by the callback"),
    4: (False, "interrupted"),
    5: (False, "the line search found no lower loss"),
}


def minimize(
    terms: Callable[[PyTree, PyTree], ArrayLike | Terms],
    source: Any,
    p0: PyTree,
    *,
    optimizer: Optimizer | None = None,
    epochs: int = 10,
    updates: Literal["batch", "pass"] = "batch",
    ftol: float = 1e-12,
    gtol: float = 1e-8,
    batch_size: int | None = None,
    shuffle: int | Shuffle | None = None,
    gradient: Gradient = "reverse",
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
    validation: Any = None,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    callback_every: int | None = None,
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FitResult:
    """Minimise the mean of `terms(params, batch)` over a stream. See `value_and_grad` for the loss, the source and how it
    is read.

    `optimizer`: any of optax's. `updates="batch"`: one update per batch, by the mean over its rows (default: Adam with a
    rate of 0.01). `updates="pass"`: one update per pass over the whole stream, by its exact gradient; the default is
    L-BFGS, `optax.lbfgs(linesearch=None)`, whose steps a line search over further passes then makes safe (Lewis and
    Overton 2013); the fit ends when the gradient's largest component is at most `gtol`, or the loss decreases by at most
    `ftol` times itself. `epochs`: passes over the stream, those of the line search included.

    `evaluate`: when the exact loss is computed, by a pass of its own with `updates="batch"`: after all "epochs", at the
    "end", or "never". Default: "epochs" with `validation` or `patience`, else "end". It is that of the `validation` data
    if there are any; the best parameters, and `patience` (epochs without a better one), go by it and never by a running
    mean.

    `callback(Progress)` is called after every epoch, and every `callback_every` batches; if it returns True the fit
    stops. `checkpoint`: where to save; with `resume=True` the fit goes on from the last checkpoint, in the middle of an
    epoch too, to exactly the result it would have had (from the start if there is none). Ctrl-C ends the fit after the
    chunk at work, and returns the best parameters so far; a second one interrupts at once. `progress`: a bar, by tqdm.

    Raises NonFiniteError with `nan="raise"`, CheckpointError if a checkpoint is of another fit or data, ValueError or
    TypeError for arguments that do not fit together, ImportError without optax (`pip install pykernels[stream]`).
    """
    options = Options.of(batch_size, shuffle, prefetch, mesh, nan, gradient, compensated)
    settings = _Settings.of(
        optimizer, epochs, updates, ftol, gtol, evaluate, patience, callback, callback_every, checkpoint, resume,
        progress, validation is not None,
    )  # fmt: skip
    return _Fit(Objective(terms, (terms,)), source, as_params(p0), options, settings, validation).run()


def fit(
    model: Model,
    source: Any,
    p0: PyTree,
    *,
    loss: Loss = "linear",
    f_scale: float = 1.0,
    optimizer: Optimizer | None = None,
    epochs: int = 10,
    updates: Literal["batch", "pass"] = "batch",
    ftol: float = 1e-12,
    gtol: float = 1e-8,
    batch_size: int | None = None,
    shuffle: int | Shuffle | None = None,
    gradient: Gradient = "reverse",
    nan: NanPolicy = "raise",
    compensated: bool | None = None,
    prefetch: int = 0,
    mesh: Mesh | None = None,
    validation: Any = None,
    evaluate: Evaluate | None = None,
    patience: int | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    callback_every: int | None = None,
    checkpoint: Checkpoint | None = None,
    resume: bool = False,
    progress: bool = False,
) -> FitResult:
    """Fit a model to (x, y) data: minimise the weighted mean over rows of f_scale^2 rho(((model - y) / f_scale)^2).

    `model(x, *params)` if `p0` is a vector, a list or a tuple, `model(x, params)` for other pytrees; it takes a batch of
    rows of x (any pytree of arrays) and returns an array of the shape of y, whose further axes are summed. Batches of
    `source` are (x, y), (x, y, weights) or dicts with these names. `loss`: rho, "linear" (squares), "soft_l1", "huber",
    "cauchy" or "arctan", as in `scipy.optimize.least_squares`. Everything else as in `minimize`.
    """
    options = Options.of(batch_size, shuffle, prefetch, mesh, nan, gradient, compensated)
    settings = _Settings.of(
        optimizer, epochs, updates, ftol, gtol, evaluate, patience, callback, callback_every, checkpoint, resume,
        progress, validation is not None,
    )  # fmt: skip
    params, unpack = model_params(p0)
    objective = model_objective(model, unpack, loss, f_scale)
    return _Fit(objective, source, params, options, settings, validation).run()


def model_params(p0: PyTree) -> tuple[PyTree, bool]:
    """A model's first parameters as arrays, a plain list of numbers as a vector, and whether the model takes them
    singly."""
    unpacked = is_unpacked(p0)
    if unpacked and isinstance(p0, (list, tuple)) and all(isinstance(p, (float, np.floating)) for p in p0):
        p0 = np.asarray(p0)
    return as_params(p0), unpacked


@dataclass(frozen=True)
class _Settings:
    """The arguments of a fit that are not about reading."""

    optimizer: Optimizer
    epochs: int
    updates: str
    ftol: float
    gtol: float
    evaluate: str
    patience: int | None
    callback: Callable[[Progress], bool | None] | None
    callback_every: int | None
    checkpoint: Checkpoint | None
    resume: bool
    progress: bool

    @staticmethod
    def of(
        optimizer: Any, epochs: int, updates: str, ftol: float, gtol: float, evaluate: str | None, patience: int | None,
        callback: Any, callback_every: int | None, checkpoint: Checkpoint | None, resume: bool, progress: bool,
        has_validation: bool,
    ) -> _Settings:  # fmt: skip
        if updates not in ("batch", "pass"):
            raise ValueError(f"updates must be 'batch' or 'pass', not {updates!r}")
        if epochs < 1:
            raise ValueError(f"epochs must be positive, not {epochs!r}")
        if evaluate not in (None, "epochs", "end", "never"):
            raise ValueError(f"evaluate must be 'epochs', 'end' or 'never', not {evaluate!r}")
        if patience is not None and (patience < 1 or evaluate in ("end", "never")):
            raise ValueError("patience must be a positive number of epochs, and needs evaluate='epochs'")
        if callback_every is not None and callback_every < 1:
            raise ValueError(f"callback_every must be a positive number of batches, not {callback_every!r}")
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=pk.stream.Checkpoint(folder)")
        if evaluate is None:
            evaluate = "epochs" if has_validation or patience is not None else "end"
        optax = optional("optax")
        if optimizer is None:
            optimizer = optax.adam(0.01) if updates == "batch" else optax.lbfgs(linesearch=None)
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(f"optimizer must be one of optax's, not {optimizer!r}")
        return _Settings(
            _lenient(optax.with_extra_args_support(optimizer)), epochs, updates, ftol, gtol, evaluate, patience, callback,
            callback_every, checkpoint, resume, progress,
        )  # fmt: skip


def _lenient(optimizer: Optimizer) -> Optimizer:
    """The same, where the user has strict dtype promotion too: optax mixes float and int32."""

    def init(params: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.init(params)

    def update(*args: PyTree, **extra: PyTree) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args, **extra)

    return type(optimizer)(init, update)


class _Updates(Protocol):
    """When parameters are updated: by each batch or by each pass."""

    def start(self, params: PyTree) -> PyTree:
        """Everything on the device that a checkpoint must hold."""

    def run(self, state: PyTree, chunk: Chunk, size: int) -> tuple[PyTree, jax.Array]:
        """Some batches, of so many rows."""

    def end_pass(self, state: PyTree, counts: Counts | None) -> tuple[PyTree, float]:
        """Behind the last batch: the next pass's state, and the mean of the terms."""


class _ByBatch(NamedTuple):
    params: PyTree
    optimizer: PyTree
    totals: Totals


class _BatchUpdates:
    """One update per batch: sums, the optimizer and the parameters in one compiled loop."""

    steps_per_pass = 0

    def __init__(self, objective: Objective, options: Options, optimizer: Optimizer) -> None:
        self._options, self._optimizer = options, optimizer
        apply_updates = optional("optax").apply_updates

        def build() -> Any:
            reduction = objective.reduction(traced_terms(objective), "gradient", options.gradient)

            def step(state: _ByBatch, moving: jax.Array, sums_of: Any) -> _ByBatch:
                params, opt_state, totals = state
                sums, counts = sums_of(reduction, params, zero_sums("gradient", params), totals.counts)

                def update(_: None) -> tuple[PyTree, PyTree]:
                    value, slope = mean(sums, params)
                    changes, new = optimizer.update(slope, opt_state, params, value=value, grad=slope)
                    return apply_updates(params, changes), jax.tree.map(in_dtype_of, new, opt_state)

                # A batch of which nothing is left, or that is skipped, moves neither the parameters nor the optimizer.
                params, opt_state = lax.cond(
                    moving & (sums.weight != 0), update, lambda _: (params, opt_state), None
                )
                totals = add(totals, sums._replace(rest=None), counts)
                return _ByBatch(params, opt_state, totals)

            return compiled(step, lambda state: state.totals.counts, options.nan, options.mesh, options.tiled)

        static = ("update", objective.static, options.static, settings_of(optimizer))
        self._program = programs.get(objective.functions, static, build)

    def start(self, params: PyTree) -> _ByBatch:
        return _ByBatch(
            params,
            jax.tree.map(_strong, self._optimizer.init(params)),
            zero_totals("value", params, self._options.compensated),
        )

    def run(self, state: _ByBatch, chunk: Chunk, size: int) -> tuple[_ByBatch, jax.Array]:
        return self._program(state, np.bool_(True), chunk.data, *scalars(chunk, size))

    def loss(self, state: _ByBatch, passes: Passes) -> float:
        """The exact loss at the state's parameters, by the program there is: the model need not be compiled again for one
        pass."""
        still, rows, queue = own(state), 0, InFlight()
        for chunk in passes.chunks():
            still, ticket = self._program(
                still, np.bool_(False), chunk.data, *scalars(chunk, passes.batch_size)
            )
            rows += chunk.rows
            queue.add(ticket)
        passes.checked_counts(still.totals.counts, rows)
        return self.end_pass(still, None)[1]

    def end_pass(self, state: _ByBatch, counts: Counts | None) -> tuple[_ByBatch, float]:
        value = float(mean(finished(state.totals), state.params)[0])
        return state._replace(totals=zero_totals("value", state.params, self._options.compensated)), value


class _ByPass(NamedTuple):
    """`point`: where the pass under way is evaluated; `base`, `direction`, `slope`: where its line search began, in which
    direction, and the gradient there; `optimizer`: its state behind `base`."""

    point: PyTree
    optimizer: PyTree
    totals: Totals
    base: PyTree
    direction: PyTree
    slope: PyTree


class _Search(NamedTuple):
    """A bracketing line search, all of it on the host: the loss and its slope at the base, the bracket, and the step."""

    value: float
    along: float
    low: float = 0.0
    high: float = math.inf
    step: float = 1.0
    tries: int = 0


class _PassUpdates:
    """One update per pass, by the exact gradient; behind L-BFGS with a line search for the weak Wolfe conditions, by
    bisection and doubling (Lewis and Overton 2013, algorithm 2.6), each of whose steps is a pass."""

    DECREASE, CURVATURE, TRIES = 1e-4, 0.9, 30

    def __init__(
        self, objective: Objective, options: Options, optimizer: Optimizer, ftol: float, gtol: float
    ) -> None:
        self._options, self._optimizer, self._ftol, self._gtol = options, optimizer, ftol, gtol
        self._program = sums_program(objective, "gradient", options)
        self.search: _Search | None = None
        self.status: int | None = None
        self.nit = 0
        self.accepted = True

        def build() -> Any:
            def update(
                params: PyTree, slope: PyTree, state: PyTree, value: jax.Array
            ) -> tuple[PyTree, PyTree]:
                changes, new = optimizer.update(slope, state, params, value=value, grad=slope)
                return changes, jax.tree.map(in_dtype_of, new, state)

            return jax.jit(update)

        self._update = programs.get((), ("pass", settings_of(optimizer)), build)

    def start(self, params: PyTree) -> _ByPass:
        state = jax.tree.map(_strong, self._optimizer.init(params))
        names = {type(s).__name__ for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "_fields"))}
        self._searches = _contains(state, "ScaleByLBFGSState")
        if _contains(state, "ScaleByZoomLinesearchState") or _contains(
            state, "ScaleByBacktrackingLinesearchState"
        ):
            raise ValueError(
                "optax's line searches call the loss inside of a compiled update, where a stream can not be read: write "
                f"optax.lbfgs(linesearch=None), whose steps are searched over whole passes here (found {sorted(names)})"
            )
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _ByPass(params, state, self._zero(params), params, zeros, zeros)

    def run(self, state: _ByPass, chunk: Chunk, size: int) -> tuple[_ByPass, jax.Array]:
        totals, ticket = self._program(state.totals, state.point, chunk.data, *scalars(chunk, size))
        return state._replace(totals=totals), ticket

    def end_pass(self, state: _ByPass, counts: Counts | None) -> tuple[_ByPass, float]:
        """`counts` is None where the pass met what is not finite: a step that went too far."""
        value, slope = mean(finished(state.totals), state.point)
        loss = math.inf if counts is None else float(value)
        state = state._replace(totals=self._zero(state.point))
        search = self.search
        if search is not None:
            enough = loss <= search.value + self.DECREASE * search.step * search.along
            if not enough:
                search = search._replace(high=search.step)
            elif _dot(slope, state.direction) < self.CURVATURE * search.along:
                search = search._replace(low=search.step)
            else:
                search = None
            if search is not None:
                small = enough and search.value - loss <= self._ftol * abs(search.value)
                if search.tries >= self.TRIES and not small:
                    self.accepted, self.status = False, 5
                    return state._replace(point=state.base), loss
                if not small:
                    step = 2 * search.low if search.high == math.inf else (search.low + search.high) / 2
                    self.accepted, self.search = enough, search._replace(step=step, tries=search.tries + 1)
                    return state._replace(point=_along(state.base, step, state.direction)), loss
        self.accepted, self.nit = True, self.nit + 1
        largest = max(float(jnp.max(jnp.abs(g))) if g.size else 0.0 for g in jax.tree.leaves(slope))
        before = self.search
        if largest <= self._gtol or (
            before is not None and before.value - loss <= self._ftol * abs(before.value)
        ):
            self.status = 1
        changes, opt_state = self._update(state.point, slope, state.optimizer, value)
        along = _dot(slope, changes)
        self.search = _Search(loss, along) if self._searches else None
        point = _along(state.point, 1.0, changes)
        return _ByPass(point, opt_state, state.totals, state.point, changes, slope), loss

    def _zero(self, params: PyTree) -> Totals:
        return zero_totals("gradient", params, self._options.compensated)


def _contains(state: PyTree, name: str) -> bool:
    """Whether an optax state has one of this kind in it."""
    if type(state).__name__ == name:
        return True
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (tuple, list)) else ()
    return any(_contains(part, name) for part in parts)


@jax.jit
def _along(base: PyTree, step: ArrayLike, direction: PyTree) -> PyTree:
    return jax.tree.map(lambda b, d: b + (jnp.asarray(step, d.dtype) * d).astype(b.dtype), base, direction)


def _dot(a: PyTree, b: PyTree) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(sum(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs))


def _strong(leaf: Any) -> jax.Array:
    array = jnp.asarray(leaf)
    return array if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else strong(array)


@dataclass
class _Place:
    """Where a fit is: what a checkpoint holds beside arrays."""

    epoch: int = 0
    batch: int = 0
    rows: int = 0
    cursor: Any = None
    saved: int = 0
    steps: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    counts: Counts = field(default_factory=Counts)
    history: list[Epoch] = field(default_factory=list)


class _Fit:
    """One run of a fit."""

    def __init__(
        self, objective: Objective, source: Any, params: PyTree, options: Options, settings: _Settings, validation: Any
    ) -> None:  # fmt: skip
        self.settings, self.objective, self.options = settings, objective, options
        self.source = as_source(source)
        self.passes = Passes(self.source, options)
        self.validation = None if validation is None else Passes(as_source(validation), options)
        self.params = params
        self.place = _Place()
        self.best: PyTree = None
        self._stop: int | None = None
        self._evaluate = settings.evaluate
        self._check_passes()
        # Now, and not in the middle of a pass: a stream may have to be started anew for it.
        self._fingerprint = self.source.fingerprint() if settings.checkpoint else ""
        if settings.updates == "batch":
            self.updates: Any = _BatchUpdates(objective, options, settings.optimizer)
        else:
            self.updates = _PassUpdates(objective, options, settings.optimizer, settings.ftol, settings.gtol)
        self.state = own(self.passes.replicated(self.updates.start(params)))

    def _check_passes(self) -> None:
        once = isinstance(self.source, Batches) and self.source.once
        if once and self._evaluate == "end" and self.validation is None:
            self._evaluate = "never"  # would be a second pass
        self.source.check_passes(self.settings.epochs, f"epochs is {self.settings.epochs}")
        if self._evaluate == "epochs" and self.validation is None and self.settings.updates == "batch":
            self.source.check_passes(2, "the loss is to be evaluated over all of them after each epoch")
        if self.validation is not None and self._evaluate == "epochs":
            self.validation.source.check_passes(
                self.settings.epochs, "the validation loss is computed every epoch"
            )
        if once and self.settings.checkpoint is not None:
            self.source.check_passes(2, "a resumed fit would read them again")

    def run(self) -> FitResult:
        if self.settings.resume:
            self._resume()
        bar = self._bar()
        try:
            with interruptions() as interrupted:
                while self._stop is None and self.place.epoch < self.settings.epochs:
                    if self._has_ended():
                        break
                    self._epoch(interrupted, bar)
                if self._stop is None:
                    self._stop = 0
        except KeyboardInterrupt:
            self._stop = 4
        finally:
            if bar is not None:
                bar.close()
        return self._result()

    def _has_ended(self) -> bool:
        """Whether the fit has ended by itself, a resumed one perhaps before."""
        if self.settings.updates == "pass" and self.updates.status is not None:
            self._stop = self.updates.status
        elif self.settings.patience is not None and self.place.waited >= self.settings.patience:
            self._stop = 2
        return self._stop is not None

    def _epoch(self, interrupted: Callable[[], bool], bar: Any) -> None:
        settings, place = self.settings, self.place
        checkpoint = settings.checkpoint
        every = [n for n in (settings.callback_every, checkpoint and checkpoint.every) if n]
        queue, start = InFlight(), time.monotonic()
        chunks = self.passes.chunks(place.epoch, place.batch, place.rows, place.cursor, every)
        try:
            for chunk in chunks:
                self.state, ticket = self.updates.run(self.state, chunk, self.passes.batch_size)
                place.batch = chunk.first + chunk.batches
                place.rows += chunk.rows
                place.cursor = chunk.cursor
                if bar is not None:
                    bar.update(chunk.rows)
                if queue.add(ticket) and self.options.nan == "raise":
                    break
                if settings.callback_every and place.batch % settings.callback_every == 0:
                    self._call(None)
                if checkpoint and checkpoint.every and place.batch % checkpoint.every == 0:
                    self._save()
                if interrupted():
                    self._stop = 4
                if self._stop is not None:
                    if checkpoint:
                        self._save()
                    return
        finally:
            chunks.close()  # ends the thread that reads ahead
        if not place.rows and place.epoch:
            raise ValueError(
                f"the source has no rows in epoch {place.epoch}: a function must return a new iterator each time"
            )
        self._end_epoch(start)

    def _end_epoch(self, start: float) -> None:
        place, settings = self.place, self.settings
        counts = self._counts()
        point = self.state.point if settings.updates == "pass" else None
        self.state, running = self.updates.end_pass(self.state, counts)
        loss = math.nan
        if settings.updates == "pass":
            if self.validation is None:
                loss = running
            elif self.updates.accepted:
                loss = self._value(point)
        elif self._evaluate == "epochs":
            loss = self._value(self.state.params)
        if loss < place.best_loss:
            place.best_loss, place.best_epoch, place.waited = loss, place.epoch, 0
            self.best = own(
                (self.state.base, self.state.slope) if settings.updates == "pass" else (self._now(), None)
            )
        else:
            place.waited += 1
        place.counts = counts or place.counts
        place.steps += place.batch if settings.updates == "batch" else 0
        place.history.append(Epoch(place.epoch, running, loss, place.counts, time.monotonic() - start))
        place.epoch, place.batch, place.rows, place.cursor = place.epoch + 1, 0, 0, None
        self._has_ended()
        self._call(None if math.isnan(loss) else loss)
        if settings.checkpoint:
            self._save()

    def _counts(self) -> Counts | None:
        """Counts of the pass; None if a step of a line search went where the loss is not finite."""
        try:
            return self.passes.checked_counts(self.state.totals.counts, self.place.rows)
        except NonFiniteError:
            if self.settings.updates == "pass" and self.updates.search is not None:
                return None
            raise

    def _value(self, params: PyTree) -> float:
        passes = self.passes if self.validation is None else self.validation
        sums, _ = passes.sums(self.objective, "value", params)
        return float(mean(sums, params)[0])

    def _last_loss(self) -> float:
        zero = zero_totals("value", self.params, self.options.compensated)
        return self.updates.loss(self.state._replace(totals=zero), self.passes)

    def _now(self) -> PyTree:
        """The parameters a user should see."""
        return self.state.base if self.settings.updates == "pass" else self.state.params

    def _current(self) -> PyTree:
        return self.state.point if self.settings.updates == "pass" else self.state.params

    def _call(self, loss: float | None) -> None:
        if self.settings.callback is None:
            return
        if self.place.batch == 0:  # behind an epoch
            running = jnp.asarray(self.place.history[-1].running_loss)
        else:
            running = mean(finished(self.state.totals), self._current())[0]
        news = Progress(self.place.epoch, self.place.batch, own(self._now()), running, loss)
        try:
            stop = bool(self.settings.callback(news))
        except StopIteration:  # SciPy's way to stop
            stop = True
        if stop and self._stop is None:
            self._stop = 3

    def _bar(self) -> Any:
        if not self.settings.progress:
            return None
        rows = self.source.rows
        total = None if rows is None else rows * self.settings.epochs
        done = self.place.epoch * (rows or 0) + self.place.rows
        return optional("tqdm").tqdm(total=total, initial=done, unit="rows", unit_scale=True)

    def _result(self) -> FitResult:
        place, settings = self.place, self.settings
        if self.best is not None:
            (best, jac), loss = self.best, place.best_loss
        else:
            best, jac, loss = self._now(), None, math.nan
            if self._evaluate == "end" and settings.updates == "batch" and self._stop != 4:
                loss = self._value(best) if self.validation is not None else self._last_loss()
        if self._stop == 0 and settings.updates == "pass" and self.updates.status is not None:
            self._stop = self.updates.status
        success, message = _STATUS[self._stop or 0]
        passes = place.epoch + (1 if place.batch else 0)
        steps = self.updates.nit if settings.updates == "pass" else place.steps + place.batch
        return FitResult(
            own(best), loss, jac, success, self._stop or 0, message, steps, passes, place.counts, place.best_epoch,
            list(place.history),
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a fit to go on."""
        return {
            "data": self._fingerprint,
            "batch size": self.passes.batch_size,
            "shuffle": repr(self.options.shuffle),
            "updates": self.settings.updates,
            "gradient": self.options.gradient,
            "nan": self.options.nan,
        }

    def _tree(self) -> PyTree:
        return {"state": self.state, "best": self._no_best() if self.best is None else self.best}

    def _no_best(self) -> PyTree:
        return (
            (self.state.base, self.state.slope)
            if self.settings.updates == "pass"
            else (self.state.params, None)
        )

    def _save(self) -> None:
        place = self.place
        place.saved += 1
        data: dict[str, Any] = {
            "identity": self._identity(),
            "place": {**vars(place), "history": [[*e[:3], list(e[3]), e[4]] for e in place.history]},
            "has best": self.best is not None,
        }
        if self.settings.updates == "pass":
            updates = self.updates
            search = None if updates.search is None else list(updates.search)
            data["pass"] = [search, updates.nit, updates.status]
        assert self.settings.checkpoint is not None
        self.settings.checkpoint.save(place.saved, self._tree(), data)

    def _resume(self) -> None:
        assert self.settings.checkpoint is not None
        found = self.settings.checkpoint.load_last(self._tree())
        if found is None:
            return
        tree, data = found
        self.passes.settle(self.options.batch_size or data["identity"]["batch size"])
        mine = self._identity()
        other = [name for name, value in data["identity"].items() if mine.get(name) != value]
        if other:
            raise CheckpointError(
                f"the checkpoints in {self.settings.checkpoint.folder} are of a fit with other "
                + ", ".join(f"{name} ({data['identity'][name]}, here {mine.get(name)})" for name in other)
            )
        self.state = own(self.passes.replicated(tree["state"]))
        self.best = tree["best"] if data["has best"] else None
        place = data["place"]
        history = [Epoch(e[0], e[1], e[2], Counts(*e[3]), e[4]) for e in place["history"]]
        self.place = _Place(**{**place, "counts": Counts(*place["counts"]), "history": history})
        if self.settings.updates == "pass":
            search, self.updates.nit, self.updates.status = data["pass"]
            self.updates.search = None if search is None else _Search(*search)


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """While in here the first Ctrl-C is only noted. A handler of the user's own stays; so does everything in other
    threads, which have none."""
    noted = threading.Event()

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield noted.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
