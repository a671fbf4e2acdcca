"""Sources: the same rows from everywhere, in every cut, in orders that can be repeated, in little memory."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pykernels as pk
from pykernels.stream import Batches, Shuffle, Table, columns
from pykernels.stream.source import BlockOrder, as_source, prefetched

ROWS = 103
X = np.arange(ROWS * 2, dtype=np.float64).reshape(ROWS, 2)
Y = np.arange(ROWS, dtype=np.float32) - 7


class Counting:
    """An iterator with a state, as grain's are."""

    def __init__(self, size, encode):
        self.at, self.size, self.encode = 0, size, encode

    def __iter__(self):
        return self

    def __next__(self):
        if self.at >= ROWS:
            raise StopIteration
        self.at += self.size
        return X[self.at - self.size : self.at], Y[self.at - self.size : self.at]

    def get_state(self):
        return str(self.at).encode() if self.encode else {"at": self.at}

    def set_state(self, state):
        self.at = int(state) if self.encode else state["at"]


def cut(*places):
    ends = [0, *places, ROWS]
    return [(X[a:b], Y[a:b]) for a, b in itertools.pairwise(ends)]


def memmaps(folder):
    np.concatenate([np.full(3, 9.0), X.ravel()]).tofile(folder / "x.bin")
    np.concatenate([Y[:5], Y]).tofile(folder / "y.bin")
    x = np.memmap(folder / "x.bin", np.float64, "r", offset=24, shape=X.shape)
    return x, np.memmap(folder / "y.bin", np.float32, "r")[5:]


def read_only_views(folder):
    wide = np.memmap(folder / "wide.bin", np.float64, "w+", shape=(ROWS, 3))
    wide[:, :2] = X
    changed = np.memmap(folder / "y.bin", np.float32, "w+", shape=Y.shape)
    changed[:] = 0
    changed.flush()
    private = np.memmap(folder / "y.bin", np.float32, "c", shape=Y.shape)
    private[:] = Y  # in memory only
    return wide[:, :2], private


def npy_shards(folder):
    for i, (a, b) in enumerate([(0, 40), (40, 41), (41, ROWS)]):
        np.save(folder / f"x-{i}.npy", X[a:b])
        np.save(folder / f"y-{i}.npy", Y[a:b].astype(">f4"))
    return pk.stream.npy((str(folder / "x-*.npy"), [folder / f"y-{i}.npy" for i in range(3)]))


def fortran(folder):
    np.save(folder / "x.npy", np.asfortranarray(X))
    np.save(folder / "y.npy", Y)
    return pk.stream.npy((folder / "x.npy", folder / "y.npy"))


def npz_shards(folder):
    np.savez(folder / "a.npz", x=X[:50], y=Y[:50])
    np.savez_compressed(folder / "b.npz", x=X[50:], y=Y[50:])
    return pk.stream.npz(folder / "*.npz", ("x", "y"))


def hdf5(folder):
    for name, rows in (("1.h5", slice(0, 60)), ("2.h5", slice(60, None))):
        with h5py.File(folder / name, "w") as file:
            file["group/times"] = X[rows]
            file.create_dataset("counts", data=Y[rows], chunks=(7,), compression="gzip")
    return pk.stream.hdf5([folder / "1.h5", folder / "2.h5"], ("group/times", "counts"))


def parquet(folder):
    for name, rows in (("1.parquet", slice(0, 90)), ("2.parquet", slice(90, None))):
        pairs = pa.array(
            list(X[rows]), pa.list_(pa.float64(), 2) if name[0] == "1" else pa.list_(pa.float64())
        )
        pq.write_table(pa.table({"x": pairs, "y": Y[rows]}), folder / name, row_group_size=13)
    return pk.stream.parquet(folder / "*.parquet", ("x", "y"))


TABLES = {
    "arrays": lambda folder: (X, Y),
    "jax": lambda folder: (jnp.asarray(X), jnp.asarray(Y)),
    "memmaps": memmaps,
    "views": read_only_views,
    "npy": npy_shards,
    "fortran": fortran,
    "npz": npz_shards,
    "hdf5": hdf5,
    "h5py": lambda folder: tuple(column._parts[0]._array for column in hdf5(folder)._columns),
    "parquet": parquet,
}
STREAMS = {
    "list": lambda folder: cut(9, 10, 60),
    "one_batch": lambda folder: cut(),
    "empty_batches": lambda folder: cut(0, 50, 50),
    "factory": lambda folder: lambda: iter(cut(3, 6, 99)),
    "iterator": lambda folder: iter(cut(50)),
    "grain": lambda folder: Counting(10, encode=False),
    "grain_bytes": lambda folder: Counting(7, encode=True),
}


def drained(reader, sizes):
    pieces = []
    for size in itertools.cycle(sizes):
        piece = reader.take(size)
        if piece is None:
            return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        assert len(jax.tree.leaves(piece)[0]) <= size
        pieces.append(piece)


@pytest.mark.parametrize("name", [name for name in {**TABLES, **STREAMS} if name != "h5py"])
@pytest.mark.parametrize("sizes", [(7,), (1, 30, 200)], ids=str)
def test_every_source_gives_all_rows_in_order(name, sizes, tmp_path):
    source = as_source({**TABLES, **STREAMS}[name](tmp_path))
    x, y = drained(source.open(None, 0), sizes)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    assert x.dtype == X.dtype and y.dtype == Y.dtype


def test_h5py_datasets_are_arrays_too(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"], file["y"] = X, Y
        x, y = drained(as_source((file["x"], file["y"])).open(None, 0), (10,))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


@pytest.mark.parametrize("name", [*(n for n in TABLES if n != "h5py"), "list", "factory"])
def test_reading_can_begin_anywhere(name, tmp_path):
    source = as_source({**TABLES, **STREAMS}[name](tmp_path))
    for start in (0, 1, 12, 39, 41, 90, ROWS - 1):
        x, y = source.open(None, 0, start).take(25)
        np.testing.assert_array_equal(x, X[start : start + 25])
        np.testing.assert_array_equal(y, Y[start : start + 25])
    assert source.open(None, 0, ROWS).take(1) is None
    assert source.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("encode", [False, True])
def test_iterators_with_a_state_go_on_from_their_cursor(encode):
    iterator = Counting(10, encode)
    source = Batches(iterator)
    reader = source.open(None, 0)
    rows = 0
    for size in (4, 6, 15, 40, 30):  # within a batch, at its end, over several
        rows += len(reader.take(size)[0])
        cursor = reader.cursor()
        again = Batches(Counting(10, encode)).open(None, 0, start=rows, cursor=cursor)
        x, _ = drained(again, (9,))
        np.testing.assert_array_equal(x, X[rows:])
    x, _ = drained(source.open(None, 1), (9,))  # a second pass begins where the first did
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize(
    "shuffle", [Shuffle(3), Shuffle(3, block=10, blocks=3), Shuffle(4, block=1, blocks=1)], ids=str
)
def test_a_shuffled_pass_is_a_permutation_that_can_begin_anywhere(shuffle):
    source = Table((X, Y))
    x, y = drained(source.open(shuffle, 5), (8,))
    order = (y + 7).astype(int)
    assert sorted(order) == list(range(ROWS)) and not np.array_equal(order, np.arange(ROWS))
    np.testing.assert_array_equal(x, X[order])
    for start in range(0, ROWS + 1, 1 if shuffle.block == 10 else 17):
        rest = source.open(shuffle, 5, start).take(ROWS)
        np.testing.assert_array_equal([] if rest is None else rest[1], y[start:])


def test_the_order_depends_on_seed_and_epoch_alone(tmp_path):
    def order(seed, epoch, source):
        return tuple(drained(as_source(source).open(Shuffle(seed, block=10, blocks=3), epoch), (50,))[1])

    assert order(0, 0, (X, Y)) == order(0, 0, memmaps(tmp_path))
    orders = {order(seed, epoch, (X, Y)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # Checkpoints of this version are to be resumed by the next: this order must stay as it is.
    first = drained(Table(np.arange(20)).open(Shuffle(1, block=3, blocks=2), 2), (20,))
    assert first.tolist() == EPOCH_2_OF_SEED_1


EPOCH_2_OF_SEED_1 = [7, 6, 8, 15, 16, 17, 0, 3, 4, 5, 1, 2, 18, 19, 12, 14, 13, 9, 11, 10]


def test_rows_are_spread_evenly():
    """Every row comes everywhere: over many epochs a row's mean place is the middle, within 5 standard errors."""
    source, n, epochs = Table(np.arange(30)), 30, 400
    places = [np.argsort(source.open(Shuffle(0, block=4, blocks=2), e).take(n)) for e in range(epochs)]
    error = np.sqrt((n**2 - 1) / 12 / epochs)
    np.testing.assert_allclose(np.mean(places, axis=0), (n - 1) / 2, atol=5 * error)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 100])
def test_block_order_is_a_bijection_with_its_inverse(n):
    order = BlockOrder(n, 7, 1)
    blocks = [order(i) for i in range(n)]
    assert sorted(blocks) == list(range(n))
    assert [order.position(b) for b in blocks] == list(range(n))


def test_a_shuffled_pass_holds_one_window():
    class Spy:
        shape, dtype = (100_000,), np.dtype(np.float64)
        reads: list[int] = []  # noqa: RUF012

        def read(self, start, stop):
            self.reads.append(stop - start)
            return np.arange(start, stop, dtype=np.float64)

    spy = Spy()
    reader = Table(spy).open(Shuffle(0, block=100, blocks=5), 0)
    reader.take(10)
    assert spy.reads == [100] * 5
    reader.take(480)
    assert len(spy.reads) == 5
    reader.take(20)
    assert spy.reads == [100] * 10


def test_big_tables_need_no_table_of_their_blocks():
    order = BlockOrder(10**12, 0, 0)
    block = order(123_456_789_012)
    assert 0 <= block < 10**12 and order.position(block) == 123_456_789_012


ERRORS = {
    "unequal": (lambda f: (X, Y[:5]), ValueError, "equally many rows"),
    "scalar": (lambda f: (X, np.float64(1)), ValueError, "single number"),
    "nested_lists": (lambda f: (X, [1.0, 2.0]), TypeError, "np.asarray"),
    "number": (lambda f: 3.0, TypeError, "pytree of arrays"),
    "nothing": (lambda f: (), ValueError, "no arrays"),
    "no_file": (lambda f: pk.stream.npy(str(f / "x*.npy")), FileNotFoundError, r"x\*\.npy"),
    "no_array": (lambda f: pk.stream.npy(_text(f / "a.npy")), ValueError, "not an array in NumPy's format"),
    "npz_name": (lambda f: npz_shards(f) and pk.stream.npz(f / "a.npz", "z"), KeyError, "only.*'x'"),
    "hdf5_name": (lambda f: hdf5(f) and pk.stream.hdf5(f / "1.h5", "z"), KeyError, "no dataset 'z'.*counts"),
    "parquet_name": (
        lambda f: parquet(f) and pk.stream.parquet(f / "1.parquet", "z"),
        KeyError,
        "no column 'z'",
    ),
}


def _text(path: Path) -> Path:
    path.write_text("not an array at all")
    return path


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_sources(name, tmp_path):
    make, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        as_source(make(tmp_path))


def test_errors_while_reading(tmp_path):
    words = as_source(np.array(["a", "b"]))
    with pytest.raises(TypeError, match="must be numbers"):
        words.open(None, 0).take(1)
    uneven = as_source([(X[:3], Y[:2])])
    with pytest.raises(ValueError, match="equally many rows"):
        uneven.open(None, 0).take(1)
    with pytest.raises(TypeError, match="must return an iterable"):
        as_source(lambda: 3).open(None, 0)
    with pytest.raises(ValueError, match="shuffle where they are made"):
        as_source(cut(5)).open(Shuffle(), 0)
    np.save(tmp_path / "x.npy", Y)
    short = pk.stream.npy(tmp_path / "x.npy")
    with open(tmp_path / "x.npy", "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match="shorter than its 103 rows"):
        short.open(None, 0).take(ROWS)
    with pytest.raises(ValueError, match="must be positive"):
        Shuffle(block=0)
    with pytest.raises(ValueError, match="shards must have rows of one shape"):
        np.save(tmp_path / "y.npy", X)
        pk.stream.npy([tmp_path / "x.npy", tmp_path / "y.npy"])


def test_an_iterator_lasts_for_one_pass():
    source = as_source(iter(cut(50)))
    source.check_passes(1, "")
    with pytest.raises(ValueError, match=r"read once, but epochs is 2.*lambda: make_batches\(\)"):
        source.check_passes(2, "epochs is 2")
    source.open(None, 0)
    with pytest.raises(ValueError, match="has been read before"):
        source.open(None, 1)
    as_source(Counting(10, True)).check_passes(5, "")


def test_reads_use_memory_again_that_nobody_holds(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40.0))
    column = columns.as_column(np.load(tmp_path / "x.npy", mmap_mode="r"))

    def address(array):
        return array.__array_interface__["data"][0]

    first = column.read(0, 10)
    part, place = first[3:].reshape(7, 1), address(first)
    held = jnp.asarray(column.read(10, 20))
    del first
    second = column.read(20, 30)
    assert address(second) != place, "a view still holds the first read"
    np.testing.assert_array_equal(part[:, 0], np.arange(3.0, 10.0))
    del part
    shorter = column.read(30, 35)
    np.testing.assert_array_equal(shorter, np.arange(30.0, 35.0))
    del second
    third, fourth = column.read(0, 10), column.read(30, 40)
    np.testing.assert_array_equal(held, np.arange(10.0, 20.0))
    np.testing.assert_array_equal(third, np.arange(10.0))
    np.testing.assert_array_equal(fourth, np.arange(30.0, 40.0))
    where = address(third)
    del third, fourth
    assert where in [address(array) for array in [column.read(10, 20) for _ in range(2)]]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_memory_used_again_reaches_no_batch_on_its_way(prefetch, tmp_path):
    """Far more reads than the pass holds at once, each for a slow program: every row arrives as it was read."""
    rows = 1 << 21
    np.save(tmp_path / "x.npy", np.arange(float(rows)))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")

    def terms(p, batch):
        return p * jax.lax.fori_loop(0, 20, lambda _, v: jnp.cos(v) * 0 + v, batch)

    of = pk.stream.value_and_grad(terms, x, batch_size=1 << 12, prefetch=prefetch)
    value, slope = of(1.0)
    assert value == slope == (rows - 1) / 2, "integers, exact sums"


@pytest.mark.parametrize("module", ["h5py", "pyarrow.parquet"])
def test_a_missing_package_is_named_with_its_extra(module, tmp_path, monkeypatch):
    (tmp_path / "a").touch()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf"{module.split('.')[0]}.*pip install 'pykernels\[stream\]'"):
        (pk.stream.hdf5 if module == "h5py" else pk.stream.parquet)(tmp_path / "a", "x")


def test_prefetch_is_bounded_and_ends():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    stream = prefetched(items(), 3)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one used, three waiting, one in hand
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "pykernels-prefetch"]
    assert list(prefetched(iter(range(10)), 2)) == list(range(10))


def test_errors_of_the_reading_thread_are_raised():
    def items():
        yield 1
        raise OSError("disk")

    stream = prefetched(items(), 2)
    assert next(stream) == 1
    with pytest.raises(OSError, match="disk"):
        next(stream)
    assert not [t for t in threading.enumerate() if t.name == "pykernels-prefetch"]


# Sparse files: their rows are zeros that take no disk, but as much memory as others once they are read.
MEMORY = """
import sys
import h5py, jax, numpy as np, pyarrow as pa, pyarrow.parquet as pq
import pykernels as pk

folder, rows = sys.argv[1], 75_000_000  # 600 MB of float64
jax.config.update("jax_enable_x64", True)
with open(folder + "/x.npy", "wb") as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (rows,)})
    file.truncate(file.tell() + 8 * rows)
with h5py.File(folder + "/x.h5", "w") as file:
    file.create_dataset("x", (rows,), "f8")
some = pa.table({"x": np.zeros(100_000)})
with pq.ParquetWriter(folder + "/x.parquet", some.schema) as writer:
    for _ in range(rows // 100_000):
        writer.write_table(some)
for i in range(2):
    np.savez(folder + f"/x{i}.npz", x=np.zeros(rows // 4))

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

def batches():
    for _ in range(rows // 100_000):
        yield np.zeros(100_000)

def terms(p, x):
    return (x - p) ** 2

pk.stream.value_and_grad(terms, np.zeros(500_000), batch_size=50_000)(1.0)  # compiled
sources = {
    "memmap": np.load(folder + "/x.npy", mmap_mode="r"),
    "npy": pk.stream.npy(folder + "/x.npy"),
    "npz": pk.stream.npz(folder + "/x*.npz", "x"),
    "hdf5": pk.stream.hdf5(folder + "/x.h5", "x"),
    "parquet": pk.stream.parquet(folder + "/x.parquet", "x"),
    "generator": batches,
}
before = kilobytes("VmRSS")
for name, source in sources.items():
    function = pk.stream.value_and_grad(terms, source, batch_size=50_000, prefetch=2 * (name == "npy"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    value, slope = function(0.5)
    print(name, (kilobytes("VmHWM") - before) / 1024, float(value) == 0.25, float(slope) == 1.0)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are measured through Linux's /proc"
)
def test_memory_does_not_grow_with_the_file(tmp_path):
    """600 MB (npz: 2 shards of 150 MB) through less than 60 MB, whatever the source."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 6
    for name, growth, value, slope in lines:
        assert value == slope == "True", name
        assert float(growth) < 60, (name, growth)
