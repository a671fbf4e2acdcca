"""Passes over a source: options, batches in chunks on their way to the device, counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pykernels.stream.columns import concatenate
from pykernels.stream.programs import programs
from pykernels.stream.source import Shuffle, Source, prefetched
from pykernels.stream.sums import (
    DeviceCounts,
    Gradient,
    NanPolicy,
    Objective,
    PyTree,
    Run,
    Sums,
    Totals,
    add,
    compiled,
    finished,
    row_count,
    traced_terms,
    zero_sums,
    zero_totals,
)

# What goes to the device at once, and how many of these may wait there: enough to hide the host's work, little memory.
CHUNK_BYTES = 3 << 20
CHUNKS_AHEAD = 2


class Counts(NamedTuple):
    """Rows of a pass: `rows` used, `masked` by `Terms.ok`, `nonfinite` left out because their terms were not finite, and
    batches `skipped` as a whole (their rows are in none of the others)."""

    rows: int = 0
    masked: int = 0
    nonfinite: int = 0
    skipped: int = 0


class NonFiniteError(FloatingPointError):
    """Terms or gradients were not finite, with `nan="raise"`. `batch`: the first such batch of the pass."""

    def __init__(self, batch: int, batch_size: int) -> None:
        self.batch = batch
        super().__init__(
            f"the terms or the gradient of batch {batch} are not finite (rows {batch * batch_size} to "
            f"{(batch + 1) * batch_size} of the pass). "
            'Leave such rows out with nan="mask", or such batches with nan="skip"; both are counted.'
        )


@dataclass(frozen=True)
class Options:
    """How a stream is read and differentiated; the arguments of the public functions of these names."""

    batch_size: int | None = None
    shuffle: Shuffle | None = None
    prefetch: int = 0
    mesh: Mesh | None = None
    nan: NanPolicy = "raise"
    gradient: Gradient = "reverse"
    compensated: bool | None = None

    @staticmethod
    def of(
        batch_size: int | None = None, shuffle: int | Shuffle | None = None, prefetch: int = 0, mesh: Mesh | None = None,
        nan: NanPolicy = "raise", gradient: Gradient = "reverse", compensated: bool | None = None,
    ) -> Options:  # fmt: skip
        """Checked. Raises ValueError."""
        if batch_size is not None and (not isinstance(batch_size, (int, np.integer)) or batch_size < 1):
            raise ValueError(f"batch_size must be a positive int, not {batch_size!r}")
        if prefetch < 0:
            raise ValueError(f"prefetch must be a number of chunks, not {prefetch!r}")
        if nan not in ("raise", "mask", "skip"):
            raise ValueError(f"nan must be 'raise', 'mask' or 'skip', not {nan!r}")
        if gradient not in ("reverse", "forward", "finite-difference"):
            raise ValueError(
                f"gradient must be 'reverse', 'forward' or 'finite-difference', not {gradient!r}"
            )
        if shuffle is not None and not isinstance(shuffle, Shuffle):
            shuffle = Shuffle(int(shuffle))
        if mesh is None:
            ambient = jax.sharding.get_mesh()
            mesh = None if ambient.empty else ambient
        return Options(batch_size, shuffle, int(prefetch), mesh, nan, gradient, compensated)

    @property
    def static(self) -> tuple[Hashable, ...]:
        """What compiled programs depend on."""
        return (self.mesh, self.nan, self.gradient, self.compensated, self.tiled)

    @property
    def tiled(self) -> bool:
        """Whether batches are evaluated piece by piece: what is known to pay on CPUs, whose caches are small."""
        devices = jnp.zeros(()).devices() if self.mesh is None else set(self.mesh.devices.flat)
        return all(device.platform == "cpu" for device in devices)


class Chunk(NamedTuple):
    """Some batches on their way to the device: leaves of shape (batches at most, batch size, ...)."""

    data: PyTree
    first: int
    batches: int
    rows: int
    cursor: Any


class Passes:
    """Passes over a source: its batches in chunks, and what compiled programs make of them."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source, self.options = source, options
        self.batch_size = 0  # known when the first pass begins
        self._per_chunk = 0

    def chunks(
        self, epoch: int = 0, start: int = 0, rows: int = 0, cursor: Any = None, every: Sequence[int] = ()
    ) -> Generator[Chunk]:
        """The chunks of a pass from batch `start` on, behind so many rows. A chunk ends at every multiple of each number of
        batches in `every`."""
        made = self._chunks(epoch, start, rows, cursor, every)
        return prefetched(made, self.options.prefetch) if self.options.prefetch else made

    def _chunks(
        self, epoch: int, start: int, rows: int, cursor: Any, every: Sequence[int]
    ) -> Generator[Chunk]:
        reader = self.source.open(self.options.shuffle, epoch, rows, cursor)
        if not self.batch_size:
            self.settle(self.options.batch_size or self._evenly(reader.usual_rows()))
        size, first = self.batch_size, start
        while True:
            data = None
            if not self._per_chunk:
                data = reader.take(size)
                if data is None:
                    return
                self._per_chunk = self._chunk_length(data)
            batches = min([self._per_chunk, *((first // n + 1) * n - first for n in every)])
            missing = batches * size - (0 if data is None else row_count(data))
            more = reader.take(missing) if missing else None
            data = (
                concatenate([piece for piece in (data, more) if piece is not None])
                if data is not None
                else more
            )
            if data is None:
                return
            rows = row_count(data)
            made = -(-rows // size)
            yield Chunk(self._placed(data, rows), first, made, rows, reader.cursor())
            first += made
            if rows < batches * size:
                return

    def _evenly(self, usual: int) -> int:
        """About so many rows in each batch, and hardly any places without one in the last."""
        rows = self.source.rows
        return usual if not rows else -(-rows // -(-rows // usual))

    def settle(self, wanted: int) -> None:
        """Set the batch size: no more than there are rows."""
        self.batch_size = max(wanted if self.source.rows is None else min(wanted, self.source.rows), 1)

    def _chunk_length(self, batch: PyTree) -> int:
        """Batches for the device at once."""
        per_row = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) / row_count(batch)
        length = max(int(CHUNK_BYTES / max(per_row * self.batch_size, 1)), 1)
        return length if self.source.rows is None else min(length, -(-self.source.rows // self.batch_size))

    def _placed(self, data: PyTree, rows: int) -> PyTree:
        shape = (self._per_chunk, self.batch_size)
        # Every device of a mesh has as many places for a batch's rows; the last ones may stay empty.
        spare = 0 if self.options.mesh is None else -self.batch_size % self.options.mesh.size
        filled = -(-rows // self.batch_size) * self.batch_size

        def leaf(values: Any) -> Any:
            length = self._per_chunk * self.batch_size
            if rows < length:
                # Only batches with rows are run: their last one is filled up with a valid row.
                library: Any = jnp if isinstance(values, jax.Array) else np
                padding = library.zeros((length - rows, *values.shape[1:]), values.dtype)
                if isinstance(values, jax.Array):
                    padding = padding.at[: filled - rows].set(values[:1])
                else:
                    padding[: filled - rows] = values[:1]
                values = library.concatenate([values, padding])
            values = values.reshape(*shape, *values.shape[1:])
            if not spare:
                return values
            copies = np.broadcast_to(values[:, :1], (shape[0], spare, *values.shape[2:]))
            return np.concatenate([values, copies], axis=1)

        data = jax.tree.map(leaf, data)
        if self.options.mesh is None:
            return data
        spec = NamedSharding(self.options.mesh, P(None, tuple(self.options.mesh.axis_names)))
        return jax.device_put(data, spec)

    def replicated(self, tree: PyTree) -> PyTree:
        """Arrays where the programs expect them."""
        if self.options.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.options.mesh, P()))

    def sums(self, objective: Objective, kind: str, params: PyTree) -> tuple[Sums, Counts]:
        """One whole pass at some parameters. Raises NonFiniteError, and ValueError if there are no rows."""
        options = self.options
        run = sums_program(objective, kind, options)
        params = self.replicated(params)
        totals = self.replicated(zero_totals(kind, params, options.compensated))
        rows = 0
        queue = InFlight()
        for chunk in self.chunks():
            totals, ticket = run(totals, params, chunk.data, *scalars(chunk, self.batch_size))
            rows += chunk.rows
            if queue.add(ticket) and options.nan == "raise":
                break
        return finished(totals), self.checked_counts(totals.counts, rows)

    def checked_counts(self, counts: DeviceCounts, rows: int) -> Counts:
        """Read the counts of a pass over so many rows. Raises what the options say about rows that are not finite."""
        if not rows:
            raise ValueError("the source has no rows")
        masked, nonfinite, skipped, lost, first = map(int, jax.device_get(counts))
        if self.options.nan == "raise" and first >= 0:
            raise NonFiniteError(first, self.batch_size)
        used = rows - masked - nonfinite - lost
        if used == 0:
            raise ValueError(f"no row is left: {masked} are masked, {nonfinite} are not finite")
        return Counts(used, masked, nonfinite, skipped)


class InFlight:
    """Keeps the host from running far ahead of the device, which would keep all chunks between them in memory."""

    def __init__(self) -> None:
        self._tickets: deque[jax.Array] = deque()

    def add(self, ticket: jax.Array) -> bool:
        """One chunk more is on its way; waits for the one before the last few, and says if that had met what is not
        finite."""
        self._tickets.append(ticket)
        return len(self._tickets) > CHUNKS_AHEAD and int(self._tickets.popleft()) >= 0


def scalars(chunk: Chunk, batch_size: int) -> tuple[np.int32, ...]:
    """A chunk's numbers as a program takes them."""
    return np.int32(chunk.first), np.int32(chunk.batches), np.int32(chunk.rows), np.int32(batch_size)


def sums_program(objective: Objective, kind: str, options: Options) -> Run:
    """The program that adds chunks of batches to totals, at fixed parameters."""

    def build() -> Run:
        reduction = objective.reduction(traced_terms(objective), kind, options.gradient)

        def step(totals: Totals, params: PyTree, sums_of: Any) -> Totals:
            return add(totals, *sums_of(reduction, params, zero_sums(kind, params), totals.counts))

        return compiled(step, lambda totals: totals.counts, options.nan, options.mesh, options.tiled)

    return programs.get(objective.functions, (kind, objective.static, options.static), build)
