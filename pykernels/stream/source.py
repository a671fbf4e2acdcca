"""Where rows come from, tables and streams of batches behind one interface, and the order in which they come.

A *table* has columns, arrays whose first axis is the rows, that can be read anywhere (`columns.py`; those in files are in
`files.py`). A *stream* gives batches of any size one after the other: a list, a loader, a factory of generators.
"""

from __future__ import annotations

import base64
import hashlib
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from pykernels.stream.columns import Column, PyTree, as_column, concatenate, native

# Rows read around the beginning, the middle and the end of a table to recognise it.
FINGERPRINT_ROWS = 16
SHUFFLE_BLOCK = 4096
USUAL_ROWS = 8192  # a few columns of them fit into a core's cache


class Reader(Protocol):
    """One pass over a source."""

    def take(self, rows: int) -> PyTree | None:
        """The next `rows` rows, fewer only at the end, None behind it."""

    def usual_rows(self) -> int:
        """A batch size for those who do not care."""

    def cursor(self) -> Any:
        """What `Source.open` needs, beside the number of rows, to go on from here: data for JSON, or None."""


class Source(ABC):
    """Rows that can be read in one or more passes. `Table` and `Batches` are the two kinds."""

    rows: int | None = None

    @abstractmethod
    def open(self, shuffle: Shuffle | None, epoch: int, start: int = 0, cursor: Any = None) -> Reader:
        """A pass that begins with row `start` of this epoch's order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that other data would not have."""

    def check_passes(self, passes: float, why: str) -> None:  # noqa: B027  (most sources can be read again)
        """Raises ValueError if the source can not be read so often."""


@dataclass(frozen=True)
class Shuffle:
    """A seeded order of a table's rows that is a pure function of (seed, epoch).

    Blocks of `block` consecutive rows come in a pseudo-random order; `blocks` of them at a time are in memory, and their
    rows are put in a pseudo-random order. Memory: `block * blocks` rows, whatever the table's length. `block=None`: what
    the source reads well (a Parquet row group), or 4,096.
    """

    seed: int = 0
    block: int | None = None
    blocks: int = 16

    def __post_init__(self) -> None:
        if (self.block is not None and self.block < 1) or self.blocks < 1:
            raise ValueError("Shuffle(block=, blocks=) must be positive")
        if self.seed < 0:
            raise ValueError(f"Shuffle(seed=) must not be negative, not {self.seed}")


def as_source(data: Any) -> Source:
    """The source that `data` is: a `Source`, a pytree of arrays with equally many rows, or an iterable or factory of
    batches.

    Tuples, dicts and other pytrees are tables of arrays; lists, iterators, other iterables and functions give batches.
    Raises TypeError for anything else.
    """
    if isinstance(data, Source):
        return data
    if hasattr(data, "shape") and hasattr(data, "dtype"):
        return Table(data)
    if isinstance(data, (tuple, dict)):
        return Table(data)
    if callable(data) or isinstance(data, Iterable):
        return Batches(data)
    if jax.tree.leaves(data) != [data]:  # a registered pytree of arrays
        return Table(data)
    raise TypeError(
        f"data must be a pytree of arrays, a source, an iterable of batches or a function that makes one, not {data!r}"
    )


class Table(Source):
    """Columns with equally many rows.

    `columns`: a pytree whose leaves are arrays (NumPy's, JAX's, `np.memmap`, h5py datasets, anything with `shape`,
    `dtype` and slices) or instances of `Column`. A batch has the same structure. `block`: rows that are best read
    together.
    """

    rows: int

    def __init__(self, columns: PyTree, *, block: int | None = None) -> None:
        leaves, self._tree = jax.tree.flatten(columns, is_leaf=lambda leaf: isinstance(leaf, Column))
        self._columns = [as_column(leaf) for leaf in leaves]
        if not self._columns:
            raise ValueError("the data have no arrays")
        counts = {column.shape[0] for column in self._columns}
        if len(counts) > 1:
            shapes = [column.shape for column in self._columns]
            raise ValueError(f"the arrays must have equally many rows, but their shapes are {shapes}")
        self.rows = counts.pop()
        self.block = block

    def read(self, start: int, stop: int) -> PyTree:
        """Rows `start` to `stop` as a pytree of arrays."""
        return jax.tree.unflatten(self._tree, [native(column.read(start, stop)) for column in self._columns])

    def open(self, shuffle: Shuffle | None, epoch: int, start: int = 0, cursor: Any = None) -> Reader:
        if shuffle is None:
            return _InOrder(self, start)
        return _Shuffled(self, shuffle, epoch, start)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr([(c.shape, str(c.dtype)) for c in self._columns]).encode())
        digest.update(str(self._tree).encode())
        for start in sorted({0, self.rows // 2, max(self.rows - FINGERPRINT_ROWS, 0)}):
            rows = self.read(start, min(start + FINGERPRINT_ROWS, self.rows))
            for leaf in jax.tree.leaves(rows):
                digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()[:32]


class _InOrder:
    def __init__(self, table: Table, start: int) -> None:
        self._table, self._next = table, start

    def take(self, rows: int) -> PyTree | None:
        start, self._next = self._next, min(self._next + rows, self._table.rows)
        return self._table.read(start, self._next) if start < self._next else None

    def usual_rows(self) -> int:
        return USUAL_ROWS

    def cursor(self) -> None:
        return None


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of the 64-bit integers that looks random: the finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class BlockOrder:
    """A pseudo-random permutation of range(n) that needs no table: a Feistel network on the smallest even number of bits,
    walked until it lands in the range (Black and Rogaway 2002). Always the same for the same keys.
    """

    ROUNDS = 6

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self._n = n
        self._half = (max(n - 1, 1).bit_length() + 1) // 2
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, position: int) -> int:
        """The block at a position."""
        return self._walk(position, self._keys, False)

    def position(self, block: int) -> int:
        """Where a block is: the inverse."""
        return self._walk(block, self._keys[::-1], True)

    def _walk(self, value: int, keys: np.ndarray, inverse: bool) -> int:
        value = self._rounds(value, keys, inverse)
        while value >= self._n:
            value = self._rounds(value, keys, inverse)
        return value

    def _rounds(self, value: int, keys: np.ndarray, inverse: bool) -> int:
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        if inverse:
            left, right = right, left
        for key in keys:
            mixed = int(_mix(np.uint64(right) ^ key)) & mask
            left, right = right, left ^ mixed
        if inverse:
            left, right = right, left
        return (left << self._half) | right


class _Shuffled:
    """The table's blocks in the order of `BlockOrder`, a window of them at a time, and the window's rows in random
    order."""

    def __init__(self, table: Table, shuffle: Shuffle, epoch: int, start: int) -> None:
        self._table, self._shuffle, self._epoch, self._next = table, shuffle, epoch, start
        self._block = min(shuffle.block or table.block or SHUFFLE_BLOCK, max(table.rows, 1))
        self._count = -(-table.rows // self._block)
        self._order = BlockOrder(self._count, shuffle.seed, epoch)
        # Only the table's last block may be short: whatever comes behind it comes that much earlier.
        self._missing = self._count * self._block - table.rows
        self._short = self._order.position(self._count - 1) if self._count else 0
        self._window, self._rows, self._places = -1, None, np.zeros(0, np.intp)

    def take(self, rows: int) -> PyTree | None:
        pieces = []
        while rows > 0 and self._next < self._table.rows:
            self._load()
            offset = self._next - self._begin(self._window)
            places = self._places[offset : offset + rows]
            pieces.append(jax.tree.map(lambda leaf, places=places: leaf[places], self._rows))
            rows -= len(places)
            self._next += len(places)
        return concatenate(pieces) if pieces else None

    def usual_rows(self) -> int:
        return USUAL_ROWS

    def cursor(self) -> None:
        return None

    def _begin(self, window: int) -> int:
        blocks = min(window * self._shuffle.blocks, self._count)
        return blocks * self._block - (self._missing if self._short < blocks else 0)

    def _load(self) -> None:
        """Bring the window of the next row into memory."""
        window = self._next // (self._block * self._shuffle.blocks)
        while self._begin(window + 1) <= self._next:
            window += 1
        if window == self._window:
            return
        first = window * self._shuffle.blocks
        blocks = sorted(self._order(i) for i in range(first, min(first + self._shuffle.blocks, self._count)))
        self._rows = None  # the window before is not kept while this one is read
        self._rows = concatenate(
            [self._table.read(b * self._block, min((b + 1) * self._block, self._table.rows)) for b in blocks]
        )
        length = self._begin(window + 1) - self._begin(window)
        seeds = np.random.SeedSequence([self._shuffle.seed, self._epoch, window, 1])
        key = seeds.generate_state(1, np.uint64)
        # Different keys never tie, so that this is one permutation on every machine and with every version of NumPy.
        self._places = np.argsort(_mix(np.arange(length, dtype=np.uint64) ^ key))
        self._window = window


class Batches(Source):
    """Batches from a re-iterable object (a list, a loader), from a function that makes an iterator of them, or from an
    iterator, which lasts for one pass.

    Batches are pytrees of arrays with equally many rows; they may differ in length, since they are cut anew. Iterators
    with `get_state` and `set_state`, such as grain's, are resumed through these and can be read again; others are resumed
    by reading again from the start of the epoch.
    """

    def __init__(self, batches: Iterable[PyTree] | Callable[[], Iterable[PyTree]]) -> None:
        self._batches = batches
        self._iterator = batches if isinstance(batches, Iterator) else None
        self._start = self._iterator.get_state() if _has_state(self._iterator) else None  # type: ignore[union-attr]
        self._used = False

    @property
    def once(self) -> bool:
        """Whether the source is an iterator that can not be started again."""
        return self._iterator is not None and self._start is None

    def check_passes(self, passes: float, why: str) -> None:
        if self.once and passes > 1:
            raise ValueError(
                f"the data are an iterator, which can be read once, but {why}. Give a function that makes a new one, "
                "source=lambda: make_batches(), or a list of batches"
            )

    def open(self, shuffle: Shuffle | None, epoch: int, start: int = 0, cursor: Any = None) -> Reader:
        if shuffle is not None:
            raise ValueError(
                "batches come in their own order: shuffle where they are made, or give arrays or files"
            )
        reader = _InPieces(self._begin(), cursor)
        if cursor is None:
            reader.skip(start)
        return reader

    def fingerprint(self) -> str:
        if self.once:
            return "an iterator"
        first = next(self._begin(), None)
        digest = hashlib.sha256(str(jax.tree.structure(first)).encode())
        for leaf in jax.tree.leaves(first):
            array = np.asarray(leaf)
            digest.update(repr((array.shape[1:], str(array.dtype))).encode())
            digest.update(np.ascontiguousarray(array[:FINGERPRINT_ROWS]).tobytes())
        return digest.hexdigest()[:32]

    def _begin(self) -> Iterator[PyTree]:
        if self._iterator is not None:
            if self._start is not None:
                self._iterator.set_state(self._start)  # type: ignore[attr-defined]
            elif self._used:
                self.check_passes(2, "it has been read before")
            self._used = True
            return self._iterator
        batches = self._batches() if callable(self._batches) else self._batches
        if not isinstance(batches, Iterable):
            raise TypeError(f"the function must return an iterable of batches, not {batches!r}")
        return iter(batches)


def _has_state(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


class _InPieces:
    """Cuts a stream of batches into pieces of the wanted length."""

    def __init__(self, iterator: Iterator[PyTree], cursor: Any) -> None:
        self._iterator = iterator
        # What was read and not yet taken: the iterator's state before the batch, the batch, its length, rows taken of it.
        self._held: deque[tuple[Any, PyTree, int, int]] = deque()
        if cursor is not None:
            iterator.set_state(_decoded(cursor["state"]))  # type: ignore[attr-defined]
            self.skip(cursor["rows"])

    def take(self, rows: int) -> PyTree | None:
        pieces = []
        while rows > 0 and (self._held or self._pull()):
            state, batch, length, taken = self._held[0]
            stop = min(taken + rows, length)
            whole = taken == 0 and stop == length
            pieces.append(batch if whole else jax.tree.map(lambda leaf, a=taken, b=stop: leaf[a:b], batch))
            rows -= stop - taken
            if stop == length:
                self._held.popleft()
            else:
                self._held[0] = (state, batch, length, stop)
        return concatenate(pieces) if pieces else None

    def usual_rows(self) -> int:
        if not self._held and not self._pull():
            return USUAL_ROWS
        return self._held[0][2]

    def skip(self, rows: int) -> None:
        """Leave out rows that were used before a resume, at most a batch in memory."""
        while rows > 0:
            if not self._held and not self._pull():
                raise ValueError("the stream is shorter than it was: these are other data")
            state, batch, length, taken = self._held.popleft()
            skipped = min(rows, length - taken)
            rows -= skipped
            if taken + skipped < length:
                self._held.append((state, batch, length, taken + skipped))

    def cursor(self) -> Any:
        if not _has_state(self._iterator):
            return None
        if self._held:
            state, _, _, taken = self._held[0]
            return {"state": _encoded(state), "rows": taken}
        return {"state": _encoded(self._iterator.get_state()), "rows": 0}  # type: ignore[attr-defined]

    def _pull(self) -> bool:
        state = self._iterator.get_state() if _has_state(self._iterator) else None  # type: ignore[attr-defined]
        batch = next(self._iterator, None)
        if batch is None:
            return False
        if isinstance(batch, list):
            batch = tuple(batch)
        batch = jax.tree.map(lambda leaf: native(np.asarray(leaf)), batch)
        leaves = jax.tree.leaves(batch)
        lengths = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(
                f"a batch must be a pytree of arrays with equally many rows, not {[x.shape for x in leaves]}"
            )
        length = lengths.pop()
        if length:
            self._held.append((state, batch, length, 0))
        return bool(length) or self._pull()


def _encoded(state: Any) -> Any:
    return {"bytes": base64.b64encode(state).decode()} if isinstance(state, bytes) else {"data": state}


def _decoded(state: Any) -> Any:
    return base64.b64decode(state["bytes"]) if "bytes" in state else state["data"]


def prefetched(items: Iterator[Any], depth: int) -> Generator[Any]:
    """The same items, made by a thread that is at most `depth` of them ahead. Its errors are raised here, and closing the
    generator ends the thread."""
    results: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                results.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
        except BaseException as error:  # raised where the items are used
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="pykernels-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = results.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()
