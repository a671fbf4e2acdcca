"""Writing LLVM IR: cells, arithmetic on them, memory and loops. Nothing here knows of jaxprs.

A *cell* is one LLVM value, *wide* (one element per lane of the block: a vector, or a scalar where the target's width is 1)
or *narrow* (one for all lanes), or what becomes one where it is used: a known number, a pending product, an entry of a
shared array in memory.

Where a pending product is added to something, a fused multiply-add is written, explicitly: which products are fused is
decided by the program alone, never by LLVM's view of the surrounding code, so two kernels that contain the same step round
it alike. No fast-math flag is used: NaN, infinity and signed zeros behave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

# Beyond, a kernel would take longer to compile than most runs of it: see `Writer.result`.
MOST_INSTRUCTIONS = 40_000
BOOL, INT64 = np.dtype(bool), np.dtype(np.int64)
_TYPES = {
    "float64": "double", "float32": "float", "int64": "i64", "int32": "i32", "uint64": "i64", "uint32": "i32", "bool": "i1",
}  # fmt: skip
_SUFFIXES = {**_TYPES, "float64": "f64", "float32": "f32"}


class Unsupported(Exception):
    """Something has no rule here; the message names it."""


@dataclass(frozen=True)
class Target:
    """What one must know of a machine: lanes per vector (1: scalars), whether it has fused multiply-adds, and whether a lane
    is a thread of its own, as on a GPU: there the kernel is one function, and a pointer is where a buffer begins, for all
    threads, with the lane's place in it as 32 bits, which cost fewer registers than a pointer per thread and buffer."""

    width: int
    fma: bool = True
    thread: bool = False


@dataclass(frozen=True)
class Argument:
    """One buffer of a kernel: its shape without lanes, its dtype, whether it has lanes. `constant`: never written. `spread`,
    where a lane is a thread: without lanes in the body, in memory sums over the threads of a warp, `warps_of(lanes)` of
    them; its stride is the number of lanes. `private`, likewise: a thread has its own on its stack, and the kernel's caller
    knows nothing of it. `streaming`: lanes go past the caches, to places of whole vectors."""

    shape: tuple[int, ...]
    dtype: np.dtype
    lanes: bool
    constant: bool = False
    spread: bool = False
    private: bool = False
    streaming: bool = False


WARP = 32
CACHE_LINE = 64


def warps_of(lanes: int) -> int:
    """Warps that hold so many threads."""
    return -(-lanes // WARP)


@dataclass(frozen=True)
class Function:
    """A mathematical function a kernel calls; the target must define `symbol` for vectors (`wide`) or scalars."""

    name: str
    dtype: np.dtype
    wide: bool
    operands: int

    @property
    def symbol(self) -> str:
        """Its name in the module."""
        return f"pk_{self.name}_{_SUFFIXES[self.dtype.name]}{'_wide' if self.wide else ''}"


@dataclass(frozen=True)
class Program:
    """LLVM IR of the internal function `void body(ptr pointer, i64 stride, ...)`, with a pair for each of its buffers, and
    the mathematical functions it calls, which are not in it.

    A pointer is where the block's first lane of a buffer begins, a stride the distance between two elements of one lane, in
    items. Where a lane is a thread, strides have 32 bits, pointers are the buffers' own, and the lane's number comes last.
    How a kernel comes by them is the runner's business.
    """

    ir: str
    buffers: int
    functions: tuple[Function, ...]


class Ref:
    """A buffer inside the kernel."""

    __slots__ = ("argument", "number")

    def __init__(self, number: int, argument: Argument) -> None:
        self.number, self.argument = number, argument


class Cell:
    """One LLVM value, or what becomes one where it is used: `fresh` products each time, others the first time."""

    __slots__ = ("fresh", "known", "place", "product", "text", "truth", "wide")

    def __init__(
        self,
        text: str = "",
        wide: bool = False,
        known: Any = None,
        product: tuple[Cell, Cell] | None = None,
        place: tuple[Ref, int] | None = None,
        truth: Cell | None = None,
        fresh: bool = False,
    ) -> None:
        self.text, self.wide, self.known, self.product, self.place = text, wide, known, product, place
        self.fresh = fresh
        self.truth = truth  # the mask this integer was converted from


def known(value: Any, dtype: np.dtype) -> Cell:
    """A number known now."""
    return Cell(known=np.asarray(value, dtype)[()])


def is_float(dtype: np.dtype) -> bool:
    """Whether it is float32 or float64."""
    return dtype.kind == "f"


def checked(dtype: Any) -> np.dtype:
    """A dtype kernels know. Raises Unsupported."""
    if dtype == jax.dtypes.float0:  # the tangents of integers, of which nothing is ever read
        return BOOL
    dtype = np.dtype(dtype)
    if dtype.name not in _TYPES:
        raise Unsupported(f"values of dtype {dtype}")
    return dtype


def scalar_type(dtype: np.dtype) -> str:
    """LLVM's name of a scalar type."""
    return _TYPES[dtype.name]


def _literal(value: Any, dtype: np.dtype) -> str:
    if dtype == BOOL:
        return "true" if value else "false"
    if is_float(dtype):
        # LLVM writes float constants as the bits of the same number in double precision.
        return f"0x{int(np.float64(value).view(np.uint64)):016X}"
    return str(int(value))


def _saturated(number: Any, after: np.dtype) -> int:
    bounds = np.iinfo(after)
    if np.isnan(number):
        return 0
    return (
        int(bounds.max) if number >= bounds.max else int(bounds.min) if number <= bounds.min else int(number)
    )


class Writer:
    """Writes one kernel, instruction by instruction."""

    def __init__(self, target: Target, arguments: Sequence[Argument]) -> None:
        self.target = target
        self.refs = [Ref(i, argument) for i, argument in enumerate(arguments)]
        self._numbers = itertools.count()
        self._lines: list[str] = []
        self._allocations: list[str] = []
        self._block = "entry"
        self._splats: dict[str, str] = {}
        self._workspaces: dict[Any, str] = {}
        self._declared: dict[str, str] = {}
        self._functions: dict[Function, None] = {}
        self._shared: dict[Any, str] = {}
        self._definitions: list[str] = []

    def program(self) -> Program:
        """The finished functions."""
        stride = "i32" if self.target.thread else "i64"
        formals = [
            f"ptr noalias{' readonly' if r.argument.constant else ''} %p{r.number}, {stride} %s{r.number}"
            for r in self.refs
            if not r.argument.private
        ]
        private = [
            f"  %p{r.number} = alloca [{max(math.prod(r.argument.shape), 1)} x {self._stored(r.argument.dtype)}], align 16"
            for r in self.refs
            if r.argument.private
        ]
        formals += ["i32 %lane"] if self.target.thread else []
        text = [
            *self._declared.values(),
            *self._definitions,
            # A function of its own, so that the buffers can be said not to overlap.
            f"define internal void @body({', '.join(formals)}) {self._inlining} {{",
            "entry:",
            *private,
            *self._allocations,
            *self._lines,
            "  ret void",
            "}",
        ]
        return Program("\n".join(text) + "\n", len(self.refs), tuple(self._functions))

    @property
    def _inlining(self) -> str:
        # No tables for exceptions: they would be one more section that must lie near the code.
        return "alwaysinline" if self.target.thread else "noinline nounwind"

    def shared_function(self, key: Any, formals: str, write: Callable[[], None]) -> str:
        """The symbol of an internal function that `write` writes, once per key."""
        if key not in self._shared:
            symbol = f"shared{len(self._shared)}"
            self._shared[key] = symbol
            outside = self._lines, self._allocations, self._block, self._splats, self._workspaces
            self._lines, self._allocations, self._block, self._splats, self._workspaces = (
                [],
                [],
                "entry",
                {},
                {},
            )
            write()
            body = [*self._allocations, *self._lines]
            self._definitions += [f"define internal void @{symbol}({formals}) {self._inlining} {{", "entry:"]
            self._definitions += [*body, "  ret void", "}"]
            self._lines, self._allocations, self._block, self._splats, self._workspaces = outside
        return self._shared[key]

    # Text.

    def line(self, text: str) -> None:
        """One instruction without a result."""
        self._lines.append("  " + text)

    def type(self, dtype: np.dtype, wide: bool) -> str:
        """LLVM's type of a cell."""
        return self._vector(_TYPES[dtype.name], wide)

    def _vector(self, scalar: str, wide: bool) -> str:
        return f"<{self.target.width} x {scalar}>" if wide and self.target.width > 1 else scalar

    def result(self, expression: str, wide: bool) -> Cell:
        """One instruction with a result."""
        number = next(self._numbers)
        if number > MOST_INSTRUCTIONS:
            raise Unsupported(f"a kernel of more than {MOST_INSTRUCTIONS} instructions")
        name = f"%v{number}"
        self._lines.append(f"  {name} = {expression}")
        return Cell(name, wide)

    def value(self, cell: Cell, dtype: np.dtype) -> Cell:
        """A cell that is an LLVM value or a known number."""
        if cell.product is not None:
            done = self.binary("fmul", dtype, *cell.product)
            if cell.fresh:
                return done
            cell.product, cell.text, cell.wide = None, done.text, done.wide
        if cell.place is not None:
            ref, offset = cell.place
            return self.load(ref, self.address(ref, [], offset), False)
        return cell

    def text(self, cell: Cell, dtype: np.dtype, wide: bool) -> str:
        """A cell as the operand of an instruction on wide or narrow values."""
        cell = self.value(cell, dtype)
        spread = wide and self.target.width > 1
        if cell.known is not None:
            literal = _literal(cell.known, dtype)
            return f"splat ({_TYPES[dtype.name]} {literal})" if spread else literal
        if cell.wide or not spread:
            return cell.text
        if cell.text not in self._splats:
            vector = self.type(dtype, True)
            one = self.result(
                f"insertelement {vector} poison, {_TYPES[dtype.name]} {cell.text}, i64 0", True
            ).text
            zeros = f"<{self.target.width} x i32> zeroinitializer"
            self._splats[cell.text] = self.result(
                f"shufflevector {vector} {one}, {vector} poison, {zeros}", True
            ).text
        return self._splats[cell.text]

    def typed(self, cell: Cell, dtype: np.dtype, wide: bool) -> str:
        """`text` behind its type."""
        return f"{self.type(dtype, wide)} {self.text(cell, dtype, wide)}"

    def call(self, symbol: str, returns: str, operands: Sequence[tuple[str, str]], wide: bool) -> Cell:
        """Call a function that is declared here; operands are (type, text)."""
        types = ", ".join(t for t, _ in operands)
        self._declared.setdefault(symbol, f"declare {returns} @{symbol}({types})")
        return self.result(f"call {returns} @{symbol}({', '.join(f'{t} {x}' for t, x in operands)})", wide)

    # Arithmetic. Operands and result have one dtype unless said otherwise.

    def binary(self, operation: str, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
        """An LLVM instruction with two operands."""
        a, b = self.value(a, dtype), self.value(b, dtype)
        wide = a.wide or b.wide
        return self.result(f"{operation} {self.typed(a, dtype, wide)}, {self.text(b, dtype, wide)}", wide)

    def intrinsic(self, name: str, dtype: np.dtype, *cells: Cell) -> Cell:
        """An LLVM intrinsic."""
        values = [self.value(c, dtype) for c in cells]
        wide = any(c.wide for c in values)
        kind = self.type(dtype, wide)
        suffix = (f"v{self.target.width}" if wide and self.target.width > 1 else "") + _SUFFIXES[dtype.name]
        return self.call(
            f"llvm.{name}.{suffix}", kind, [(kind, self.text(c, dtype, wide)) for c in values], wide
        )

    def function(self, name: str, dtype: np.dtype, *cells: Cell) -> Cell:
        """A mathematical function that the target defines."""
        values = [self.value(c, dtype) for c in cells]
        wide = any(c.wide for c in values)
        function = Function(name, dtype, wide and self.target.width > 1, len(cells))
        self._functions[function] = None
        operands = ", ".join(self.typed(c, dtype, wide) for c in values)
        return self.result(f"call {self.type(dtype, wide)} @{function.symbol}({operands})", wide)

    def select(self, condition: Cell, yes: Cell, no: Cell, dtype: np.dtype) -> Cell:
        """`yes` where the condition holds."""
        if condition.known is not None:
            return yes if condition.known else no
        if yes is no:
            return yes
        yes, no = self.value(yes, dtype), self.value(no, dtype)
        wide = condition.wide or yes.wide or no.wide
        # A narrow condition chooses between whole vectors.
        test = f"{self.type(BOOL, condition.wide)} {condition.text}"
        return self.result(
            f"select {test}, {self.typed(yes, dtype, wide)}, {self.typed(no, dtype, wide)}", wide
        )

    def compare(self, name: str, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
        """A mask: eq, ne, lt, le, gt, ge, or (floats) uno, whether one is NaN."""
        a, b = self.value(a, dtype), self.value(b, dtype)
        wide = a.wide or b.wide
        if is_float(dtype):
            condition = "fcmp " + {"ne": "une", "uno": "uno"}.get(name, "o" + name)
        else:
            sign = "" if name in ("eq", "ne") else "s" if dtype.kind == "i" else "u"
            condition = f"icmp {sign}{name}"
        return self.result(f"{condition} {self.typed(a, dtype, wide)}, {self.text(b, dtype, wide)}", wide)

    def multiply(self, dtype: np.dtype, a: Cell, b: Cell, *, fresh: bool = False) -> Cell:
        """A float product that a later addition may take in; until then nothing is written. `fresh`: it may be used several
        times, in different places, and is written each time."""
        a, b = self.value(a, dtype), self.value(b, dtype)
        return Cell(wide=a.wide or b.wide, product=(a, b), fresh=fresh)

    def add(self, dtype: np.dtype, a: Cell, b: Cell, *, minus: bool = False) -> Cell:
        """a + b or a - b of floats, fused where one of them is a pending product."""
        if self.target.fma and b.product is not None:
            x, y = b.product
            return self.intrinsic("fma", dtype, self.negate(x, dtype) if minus else x, y, a)
        if self.target.fma and a.product is not None:
            x, y = a.product
            return self.intrinsic("fma", dtype, x, y, self.negate(b, dtype) if minus else b)
        return self.binary("fsub" if minus else "fadd", dtype, a, b)

    def negate(self, cell: Cell, dtype: np.dtype) -> Cell:
        """-x of floats, signed zeros included."""
        cell = self.value(cell, dtype)
        if cell.known is not None:
            return Cell(known=-cell.known)
        return self.result(f"fneg {self.typed(cell, dtype, cell.wide)}", cell.wide)

    def extreme(self, largest: bool, dtype: np.dtype, a: Cell, b: Cell) -> Cell:
        """Maximum or minimum: NaN if either is, and -0 is below 0."""
        a, b = self.value(a, dtype), self.value(b, dtype)
        if dtype == BOOL:
            return self.binary("or" if largest else "and", dtype, a, b)
        if is_float(dtype):
            return self.intrinsic("maximum" if largest else "minimum", dtype, a, b)
        return self.select(self.compare("gt" if largest else "lt", dtype, a, b), a, b, dtype)

    def convert(self, cell: Cell, before: np.dtype, after: np.dtype) -> Cell:
        """Another dtype's value, as XLA converts: out of range saturates, NaN becomes 0, numbers are true if not 0."""
        if before == after:
            return cell
        if cell.known is not None:
            if is_float(before) and after.kind in "iu":
                return known(_saturated(cell.known, after), after)
            with np.errstate(all="ignore"):
                return Cell(known=np.asarray(cell.known).astype(after)[()])
        cell = self.value(cell, before)
        source, result = self.typed(cell, before, cell.wide), self.type(after, cell.wide)
        if after == BOOL:
            return self.compare("ne", before, cell, known(0, before))
        if before == BOOL:
            out = self.result(f"{'uitofp' if is_float(after) else 'zext'} {source} to {result}", cell.wide)
            out.truth = cell
            return out
        if is_float(before) and is_float(after):
            operation = "fpext" if after.itemsize > before.itemsize else "fptrunc"
        elif is_float(after):
            operation = "sitofp" if before.kind == "i" else "uitofp"
        elif is_float(before):
            lanes = f"v{self.target.width}" if cell.wide and self.target.width > 1 else ""
            suffix = f"{lanes}{_SUFFIXES[after.name]}.{lanes}{_SUFFIXES[before.name]}"
            symbol = f"llvm.fpto{'s' if after.kind == 'i' else 'u'}i.sat.{suffix}"
            kind = self.type(before, cell.wide)
            return self.call(symbol, result, [(kind, self.text(cell, before, cell.wide))], cell.wide)
        elif after.itemsize == before.itemsize:
            return cell
        else:
            longer = "sext" if before.kind == "i" else "zext"
            operation = longer if after.itemsize > before.itemsize else "trunc"
        return self.result(f"{operation} {source} to {result}", cell.wide)

    def reinterpret(self, cell: Cell, before: np.dtype, after: np.dtype) -> Cell:
        """The same bits as another dtype of the same size."""
        cell = self.value(cell, before)
        if cell.known is not None:
            return Cell(known=np.asarray(cell.known, before).view(after)[()])
        return self.result(
            f"bitcast {self.typed(cell, before, cell.wide)} to {self.type(after, cell.wide)}", cell.wide
        )

    # Across lanes: the only places where they meet.

    def any(self, cell: Cell) -> Cell:
        """Whether a mask holds in any lane."""
        if cell.known is not None or not cell.wide or self.target.width == 1:
            return Cell(cell.text, False, cell.known)
        bits = self.result(f"bitcast {self.type(BOOL, True)} {cell.text} to i{self.target.width}", False)
        return self.result(f"icmp ne i{self.target.width} {bits.text}, 0", False)

    def across(self, operation: str, dtype: np.dtype, cell: Cell) -> Cell:
        """Sum, product, maximum or minimum over the lanes, of a wide cell, by halves: always in the same order."""
        cell = self.value(cell, dtype)
        if self.target.width == 1:
            return Cell(cell.text, False, cell.known)
        text, width = self.text(cell, dtype, True), self.target.width
        while width > 1:
            half, parts = width // 2, []
            vector = f"<{width} x {_TYPES[dtype.name]}>"
            for start in (0, half):
                places = ", ".join(f"i32 {start + i}" for i in range(half))
                parts.append(
                    self.result(
                        f"shufflevector {vector} {text}, {vector} poison, <{half} x i32> <{places}>", True
                    )
                )
            text = self._halves(operation, dtype, parts[0].text, parts[1].text, half)
            width = half
        vector = f"<1 x {_TYPES[dtype.name]}>"
        return self.result(f"extractelement {vector} {text}, i64 0", False)

    def _halves(self, operation: str, dtype: np.dtype, a: str, b: str, width: int) -> str:
        vector = f"<{width} x {_TYPES[dtype.name]}>"
        if operation in ("sum", "product"):
            name = {"sum": "add", "product": "mul"}[operation]
            return self.result(f"{'f' if is_float(dtype) else ''}{name} {vector} {a}, {b}", True).text
        order = "gt" if operation == "maximum" else "lt"
        ordered = f"fcmp o{order}" if is_float(dtype) else f"icmp {'s' if dtype.kind == 'i' else 'u'}{order}"
        mask = f"<{width} x i1>"
        larger = self.result(f"{ordered} {vector} {a}, {b}", True).text
        chosen = self.result(f"select {mask} {larger}, {vector} {a}, {vector} {b}", True).text
        if not is_float(dtype):
            return chosen
        nan = self.result(f"fcmp uno {vector} {a}, {a}", True).text
        return self.result(f"select {mask} {nan}, {vector} {a}, {vector} {chosen}", True).text

    # Memory.

    def _stored(self, dtype: np.dtype) -> str:
        return "i8" if dtype == BOOL else _TYPES[dtype.name]

    def address(self, ref: Ref, index: Sequence[tuple[Cell, np.dtype, int]], static: int) -> str:
        """Where a lane's element number `static` + sum(index * step) begins."""
        kind = "i32" if self.target.thread else "i64"
        offset = self._element(kind, index, static)
        has_lanes = ref.argument.lanes and not ref.argument.private
        if has_lanes and offset != "0":
            offset = self.result(f"mul {kind} {offset}, %s{ref.number}", False).text
        if self.target.thread:
            offset = self._sum(kind, offset, "%lane") if has_lanes else offset
            offset = offset if offset.isdigit() else self.result(f"zext i32 {offset} to i64", False).text
        item = self._stored(ref.argument.dtype)
        return self.result(f"getelementptr {item}, ptr %p{ref.number}, i64 {offset}", False).text

    def _element(self, kind: str, index: Sequence[tuple[Cell, np.dtype, int]], static: int) -> str:
        """`static` + sum(index * step), the text of an integer."""
        whole, offset = INT64 if kind == "i64" else np.dtype(np.int32), str(static)
        for cell, dtype, step in index:
            if cell.known is not None:
                offset = self._sum(kind, offset, str(int(cell.known) * step))
                continue
            place = self.convert(cell, dtype, whole).text
            scaled = place if step == 1 else self.result(f"mul {kind} {place}, {step}", False).text
            offset = self._sum(kind, offset, scaled)
        return offset

    def _warp(self, lanes: str) -> tuple[Cell, Cell, Cell]:
        """The thread's place in its warp, how many threads the warp has, and their mask. The last warp may lack threads
        behind the ensemble's end, which have left: the others know how many."""
        word = np.dtype(np.int32)

        def i32(expression: str) -> Cell:
            return self.result(expression, False)

        place = i32(f"and i32 %lane, {WARP - 1}")
        rest = i32(f"sub i32 {lanes}, {i32(f'sub i32 %lane, {place.text}').text}")
        members = self.select(i32(f"icmp slt i32 {rest.text}, {WARP}"), rest, known(WARP, word), word)
        mask = i32(f"lshr i32 -1, {i32(f'sub i32 {WARP}, {self.text(members, word, False)}').text}")
        return place, members, mask

    def wait(self) -> None:
        """Until all threads of the block have come here, but those that have left."""
        symbol = "llvm.nvvm.barrier.cta.sync.all"
        self._declared.setdefault(symbol, f"declare void @{symbol}(i32)")
        self.line(f"call void @{symbol}(i32 0)")

    def warp_maximum(self, ref: Ref, cell: Cell) -> Cell:
        """The largest of a warp's 32-bit integers; `ref` is any buffer with lanes."""
        _, _, mask = self._warp(f"%s{ref.number}")
        text = self.text(cell, np.dtype(np.int32), False)
        return self.call("llvm.nvvm.redux.sync.max", "i32", [("i32", text), ("i32", mask.text)], False)

    def store_totals(
        self,
        ref: Ref,
        index: Sequence[tuple[Cell, np.dtype, int]],
        offsets: Sequence[int],
        cells: Sequence[Cell],
    ) -> None:
        """Write sums over the threads of each warp, always in the same order, to a `spread` buffer: to its elements number
        sum(index * step) + offset."""
        lanes, dtype = f"%s{ref.number}", ref.argument.dtype

        def i32(expression: str) -> Cell:
            return self.result(expression, False)

        place, members, mask = self._warp(lanes)
        warp = i32(f"lshr i32 %lane, {WARP.bit_length() - 1}")
        distances = [1 << i for i in reversed(range(WARP.bit_length() - 1))]
        partners = [
            i32(f"icmp slt i32 {i32(f'add i32 {place.text}, {d}').text}, {members.text}") for d in distances
        ]
        totals = []
        for cell in cells:
            total = self.value(cell, dtype)
            for distance, present in zip(distances, partners, strict=True):
                other = self._shuffled(total, dtype, mask.text, distance)
                total = self.binary("fadd", dtype, total, self.select(present, other, known(0, dtype), dtype))
            totals.append(total)
        count = i32(f"lshr i32 {i32(f'add i32 {lanes}, {WARP - 1}').text}, {WARP.bit_length() - 1}").text

        def write() -> list[Cell]:
            for offset, total in zip(offsets, totals, strict=True):
                element = self._element("i32", index, offset)
                at = i32(f"add i32 {i32(f'mul i32 {count}, {element}').text}, {warp.text}").text
                wide = i32(f"zext i32 {at} to i64").text
                item = self._stored(dtype)
                pointer = self.result(f"getelementptr {item}, ptr %p{ref.number}, i64 {wide}", False).text
                self.store(pointer, total, dtype, False)
            return []

        self.branch(place, [write, list], [])

    def _shuffled(self, cell: Cell, dtype: np.dtype, mask: str, distance: int) -> Cell:
        """The cell of the thread that many places on; the instruction moves 32 bits."""
        word, kind = np.dtype(np.int32), self.type(dtype, False)

        def moved(text: str) -> str:
            operands = [("i32", mask), ("i32", text), ("i32", str(distance)), ("i32", str(WARP - 1))]
            return self.call("llvm.nvvm.shfl.sync.down.i32", "i32", operands, False).text

        text = self.text(cell, dtype, False)
        if dtype.itemsize == word.itemsize:
            bits = self.result(f"bitcast {kind} {text} to i32", False).text
            return self.result(f"bitcast i32 {moved(bits)} to {kind}", False)
        bits = self.result(f"bitcast {kind} {text} to <2 x i32>", False).text
        halves = [self.result(f"extractelement <2 x i32> {bits}, i32 {i}", False).text for i in (0, 1)]
        pair = "poison"
        for i, half in enumerate(halves):
            pair = self.result(f"insertelement <2 x i32> {pair}, i32 {moved(half)}, i32 {i}", False).text
        return self.result(f"bitcast <2 x i32> {pair} to {kind}", False)

    def _sum(self, kind: str, a: str, b: str) -> str:
        if a.isdigit() and b.isdigit():
            return str(int(a) + int(b))
        return b if a == "0" else a if b == "0" else self.result(f"add {kind} {a}, {b}", False).text

    def load(self, ref: Ref, pointer: str, wide: bool) -> Cell:
        """What a buffer holds at an address."""
        note = ""
        if ref.argument.constant:
            note = ", !invariant.load !0"
            self._declared.setdefault("!0", "!0 = !{}")
        return self._load(pointer, ref.argument.dtype, wide, note)

    def _load(self, pointer: str, dtype: np.dtype, wide: bool, note: str = "") -> Cell:
        kind = self._vector(self._stored(dtype), wide)
        cell = self.result(f"load {kind}, ptr {pointer}, align {dtype.itemsize}{note}", wide)
        if dtype == BOOL:
            cell = self.result(f"trunc {kind} {cell.text} to {self.type(dtype, wide)}", wide)
        return cell

    def store(
        self, pointer: str, cell: Cell, dtype: np.dtype, wide: bool, *, streaming: bool = False
    ) -> None:
        """Write a cell to an address."""
        text, kind = self.text(cell, dtype, wide), self._vector(self._stored(dtype), wide)
        if dtype == BOOL:
            text = self.result(f"zext {self.type(dtype, wide)} {text} to {kind}", wide).text
        align, note = dtype.itemsize, ""
        if streaming and wide:
            self._declared.setdefault("!1", "!1 = !{i32 1}")
            align, note = min(self.target.width * dtype.itemsize, CACHE_LINE), ", !nontemporal !1"
        self.line(f"store {kind} {text}, ptr {pointer}, align {align}{note}")

    def allocate(self, count: int, dtype: np.dtype, wide: bool) -> str:
        """Room for an array of cells on the stack."""
        name = f"%m{next(self._numbers)}"
        kind = self._vector(self._stored(dtype), wide)
        self._allocations.append(f"  {name} = alloca [{max(count, 1)} x {kind}], align 64")
        return name

    def workspace(self, name: str, count: int, dtype: np.dtype, wide: bool) -> str:
        """Room for an array that is used up before the same name asks again: all of a function's share it, so that the stack
        stays in the cache."""
        key = (name, count, dtype.name, wide)
        if key not in self._workspaces:
            self._workspaces[key] = self.allocate(count, dtype, wide)
        return self._workspaces[key]

    def element(self, base: str, index: str, dtype: np.dtype, wide: bool) -> str:
        """The address of an array's cell."""
        kind = self._vector(self._stored(dtype), wide)
        return self.result(f"getelementptr {kind}, ptr {base}, i64 {index}", False).text

    def fetch(self, base: str, index: str, dtype: np.dtype, wide: bool) -> Cell:
        """An array's cell."""
        return self._load(self.element(base, index, dtype, wide), dtype, wide)

    def spill(self, cells: Sequence[Cell], dtype: np.dtype, wide: bool, base: str | None = None) -> str:
        """Cells as an array on the stack, at `base` if that is given."""
        base = base or self.allocate(len(cells), dtype, wide)
        for i, cell in enumerate(cells):
            self.store(self.element(base, str(i), dtype, wide), cell, dtype, wide)
        return base

    def look_up(self, base: str, offset: Cell, dtype: np.dtype, wide: bool) -> Cell:
        """Each lane reads at its own 64-bit offset, in items, from `base`; a narrow offset is read once."""
        item = self._stored(dtype)
        if not offset.wide or self.target.width == 1:
            pointer = self.result(
                f"getelementptr {item}, ptr {base}, i64 {self.text(offset, INT64, False)}", False
            )
            return self._load(pointer.text, dtype, wide)
        width = self.target.width
        places = f"<{width} x i64> {offset.text}"
        pointers = self.result(f"getelementptr {item}, ptr {base}, {places}", True).text
        vector = f"<{width} x {item}>"
        symbol = f"llvm.masked.gather.v{width}{'i8' if dtype == BOOL else _SUFFIXES[dtype.name]}.v{width}p0"
        operands = [
            (f"<{width} x ptr>", f"align {dtype.itemsize} {pointers}"),
            (f"<{width} x i1>", "splat (i1 true)"),
            (vector, "poison"),
        ]
        cell = self.call(symbol, vector, operands, True)
        return (
            self.result(f"trunc {vector} {cell.text} to {self.type(dtype, True)}", True)
            if dtype == BOOL
            else cell
        )

    def lane_numbers(self) -> Cell:
        """0, 1, 2, ... along the lanes, as 64-bit integers."""
        if self.target.width == 1:
            return known(0, INT64)
        numbers = ", ".join(f"i64 {i}" for i in range(self.target.width))
        return Cell(f"<{numbers}>", True)

    # Control.

    def loop(
        self,
        initial: Sequence[tuple[Cell, np.dtype, bool]],
        condition: Callable[[list[Cell]], Cell],
        step: Callable[[list[Cell]], Sequence[Cell]],
    ) -> list[Cell]:
        """`step` as long as `condition` holds; carried cells are given as (cell, dtype, wide)."""
        number = next(self._numbers)
        begins = [self.text(cell, dtype, wide) for cell, dtype, wide in initial]
        before = self._block
        self._enter(f"test{number}", jump=True)
        carried, places = [], []
        for _, _, wide in initial:
            carried.append(Cell(f"%v{next(self._numbers)}", wide))
            places.append(len(self._lines))
            self._lines.append("")
        test = self.text(condition(carried), BOOL, False)
        self.line(f"br i1 {test}, label %loop{number}, label %done{number}")
        self._enter(f"loop{number}")
        new = step(carried)
        ends = [self.text(cell, dtype, wide) for cell, (_, dtype, wide) in zip(new, initial, strict=True)]
        after = self._block
        self.line(f"br label %test{number}")
        for place, cell, begin, end, (_, dtype, wide) in zip(
            places, carried, begins, ends, initial, strict=True
        ):
            kind = self.type(dtype, wide)
            self._lines[place] = f"  {cell.text} = phi {kind} [ {begin}, %{before} ], [ {end}, %{after} ]"
        self._enter(f"done{number}")
        return carried

    def count(self, times: int, body: Callable[[str], None]) -> None:
        """`body(i)` for 0 <= i < times, whose effects are on memory; i is the text of a 64-bit integer."""

        def step(carried: list[Cell]) -> list[Cell]:
            body(carried[0].text)
            return [self.result(f"add nsw i64 {carried[0].text}, 1", False)]

        self.loop(
            [(known(0, INT64), INT64, False)],
            lambda carried: self.result(f"icmp slt i64 {carried[0].text}, {times}", False),
            step,
        )

    def branch(
        self,
        index: Cell,
        branches: Sequence[Callable[[], Sequence[Cell]]],
        kinds: Sequence[tuple[np.dtype, bool]],
    ) -> list[Cell]:
        """The results of branch number `index` (32 bits, narrow, clamped); one of them runs."""
        number = next(self._numbers)
        arms = [f"arm{number}_{i}" for i in range(len(branches))]
        cases = " ".join(f"i32 {i}, label %{arm}" for i, arm in enumerate(arms[:-1]))
        last = f"i32 {self.text(index, np.dtype(np.int32), False)}"
        self.line(f"switch {last}, label %{arms[-1]} [ {cases} ]")
        ends, results = [], []
        for arm, write in zip(arms, branches, strict=True):
            self._enter(arm)
            results.append(
                [self.text(c, dtype, wide) for c, (dtype, wide) in zip(write(), kinds, strict=True)]
            )
            ends.append(self._block)
            self.line(f"br label %join{number}")
        self._enter(f"join{number}")
        out = []
        for texts, (dtype, wide) in zip(zip(*results, strict=True), kinds, strict=True):
            arriving = ", ".join(f"[ {t}, %{end} ]" for t, end in zip(texts, ends, strict=True))
            out.append(self.result(f"phi {self.type(dtype, wide)} {arriving}", wide))
        return out

    def _enter(self, label: str, *, jump: bool = False) -> None:
        if jump:
            self.line(f"br label %{label}")
        self._lines.append(f"{label}:")
        self._block, self._splats = label, {}
