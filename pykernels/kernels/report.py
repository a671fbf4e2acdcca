"""What a compiled kernel costs on a GPU that need not be there: registers, instructions and bytes per attempt, occupancy,
and a model of its time.

NVIDIA's assembler turns a kernel's PTX into machine code, which its disassembler lists (`ptxas`, `nvdisasm`, both in the
triton wheel). An attempt is found in the control flow of that code, whoever wrote the PTX:

* A loop is a natural loop: what reaches the source of an edge back to a block that dominates it.
* The kernel's loop is the outermost one with most instructions: of its attempts without milestones, of its segments with.
* In it, an *attempt loop* is one in which no loop does more floating-point arithmetic, not counting loops inside, than it
  does itself. The loops around it (segments, words of decisions) do hardly any, and loops beside it with less than an
  eighth of its arithmetic are none. A forward kernel has one; a backward kernel one that replays an attempt, for each level
  of replay, and one that pulls back. An attempt passes once through each, so their counts are added.
* Where the assembler has unrolled a loop (it does so with the smallest ones only), what counts is its code with unrolling
  switched off.
* What counts is the longest way once around such a loop that avoids what can be avoided: loops inside (the reduction of
  large angles for sine and cosine, the rows of values an attempt reaches) and blocks that call subroutines (divisions whose
  operands are subnormal or huge, and other cases that libraries treat apart). An inner loop on every way, such as a field's
  own, counts as one passage through it: `GpuReport.inner_loops` tells how many there are.

All counts are those of one thread, as the machine issues them: an instruction under a predicate counts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pykernels.kernels.launch import Image

WARP, SCHEDULERS = 32, 4
# What a processor (SM) of compute capability 8.0 and 9.0 holds (CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability"); registers are given to warps in units of 256, to as many warps as there are schedulers.
REGISTERS, REGISTER_UNIT = 65_536, 256
MOST_WARPS, MOST_BLOCKS = 64, 32
# Shared memory the system takes for every block, in bytes.
RESERVED_SHARED = 1024
# Longer attempts, in instructions, are not unrolled.
MOST_UNROLLED = 256


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU. Throughputs in results per clock and processor (CUDA C++ Programming Guide,
    "Throughput of Native Arithmetic Instructions"); clock in Hz, bandwidth in bytes/s, shared memory in bytes."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    single: int
    double: int
    special: int
    shared: int


# NVIDIA's data sheets. Clocks are the ones their peak rates follow from: "A100 80GB SXM", 19.5 TFLOP/s in float32 from 108
# processors; "H100 SXM", 67 TFLOP/s from 132.
GPUS = {
    "sm_80": Gpu("A100 SXM", 108, 1.41e9, 2.039e12, single=64, double=32, special=16, shared=164 << 10),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 3.35e12, single=128, double=64, special=16, shared=228 << 10),
}


@dataclass(frozen=True)
class Instructions:
    """Instructions of one thread by what executes them, and the bytes they move to or from global memory."""

    single: int = 0  # float32 arithmetic, comparisons included
    double: int = 0  # float64
    special: int = 0  # reciprocals, roots, exponentials, logarithms, and conversions that take as long
    memory: int = 0
    other: int = 0
    bytes: int = 0

    @property
    def total(self) -> int:
        """All instructions."""
        return self.single + self.double + self.special + self.memory + self.other

    @property
    def arithmetic(self) -> int:
        """Floating-point arithmetic without special functions, which divisions of integers have too."""
        return self.single + self.double

    def __add__(self, other: Instructions) -> Instructions:
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Instructions(*(a + b for a, b in zip(mine, others, strict=True)))


@dataclass(frozen=True)
class GpuReport:
    """A kernel on a GPU. Registers per thread; spilled and stack bytes per thread (spilled: stores and loads in the code);
    shared bytes per block; `attempt` per thread and attempt. Occupancy and time are None for a GPU not in `GPUS`;
    `microseconds` is the modelled time in which every lane of the ensemble makes one attempt."""

    name: str
    target: str
    runner: str
    registers: int
    spilled: int
    stack: int
    shared: int
    attempt: Instructions
    ptx_instructions: int
    attempt_loops: int
    inner_loops: int
    lanes: int
    threads: int
    blocks_per_processor: int | None
    occupancy: float | None
    microseconds: float | None

    def __str__(self) -> str:
        a = self.attempt
        text = (
            f"{self.name} on {self.target} ({self.runner}): {self.registers} registers, {self.spilled} bytes spilled, "
            f"{self.shared} bytes shared\n"
            f"  per attempt {a.total} instructions ({a.single} float32, {a.double} float64, {a.special} special, "
            f"{a.memory} memory, {a.other} other), {a.bytes} bytes"
        )
        if self.inner_loops:
            text += f", {self.inner_loops} inner loops counted once"
        if self.occupancy is None:
            return f"{text}\n  no model of {self.target}: there is one of {', '.join(GPUS)}"
        return (
            f"{text}\n  {self.blocks_per_processor} blocks of {self.threads} threads per processor "
            f"({100 * self.occupancy:.0f} % of its warps); {self.microseconds:.3g} microseconds per attempt of "
            f"{self.lanes} trajectories (model)"
        )


def capability_of(target: str) -> int:
    """The compute capability of an architecture such as "sm_90". Raises ValueError for what is none that NVIDIA's assembler
    knows, ImportError where that is not installed."""
    known = re.findall(r"'(sm_\d+)'", _run("ptxas", "--help").stdout)
    if target not in known:
        raise ValueError(
            f"target must be a GPU architecture such as 'sm_80' (A100) or 'sm_90' (H100), not {target!r}; "
            f"there are {', '.join(dict.fromkeys(known))}"
        )
    return int(target.removeprefix("sm_"))


def report(image: Image, lanes: int, runner: str = "native", block: int | None = None) -> GpuReport:
    """What a kernel costs for an ensemble of so many lanes, `block` of them per block (default: one per thread).

    Raises ImportError where NVIDIA's tools are not installed, RuntimeError if they refuse the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(image.ptx)
        # Triton asks for features of one architecture only, e.g. sm_90a.
        target = re.search(r"^\.target\s+(\w+)", image.ptx, re.MULTILINE)
        architecture = target[1] if target is not None else f"sm_{image.capability}"
        said = _run("ptxas", "-v", f"-arch={architecture}", str(source), "-o", str(binary)).stderr
        counted = attempts(machine_code(_run("nvdisasm", "-c", str(binary)).stdout, image.name))
        if counted.instructions.total < MOST_UNROLLED:
            rolled_up = r'\1\n.pragma "nounroll";'
            source.write_text(re.sub(r"^(\.address_size.*)$", rolled_up, image.ptx, flags=re.MULTILINE))
            _run("ptxas", f"-arch={architecture}", str(source), "-o", str(binary))
            rolled = attempts(machine_code(_run("nvdisasm", "-c", str(binary)).stdout, image.name))
            if rolled.instructions.arithmetic < counted.instructions.arithmetic:
                counted = rolled
    properties = re.search(
        rf"Function properties for {re.escape(image.name)}\s+(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        said,
    )
    used = re.search(r"Used (\d+) registers", said)
    if properties is None or used is None:
        raise RuntimeError(f"ptxas said nothing about {image.name}: {said}")
    static = re.search(r"(\d+) bytes smem", said)
    shared = image.shared + (int(static[1]) if static is not None else 0)
    name, threads = f"sm_{image.capability}", WARP * image.warps
    gpu = GPUS.get(name)
    registers = int(used[1])
    resident = None if gpu is None else blocks_per_processor(gpu, registers, shared, image.warps)
    warps = -(-lanes // (block or threads)) * image.warps
    return GpuReport(
        name=image.name,
        target=name,
        runner=runner,
        registers=registers,
        spilled=int(properties[2]) + int(properties[3]),
        stack=int(properties[1]),
        shared=shared,
        attempt=counted.instructions,
        ptx_instructions=attempts(ptx_code(image.ptx, image.name)).instructions.total,
        attempt_loops=counted.loops,
        inner_loops=counted.inner,
        lanes=lanes,
        threads=threads,
        blocks_per_processor=resident,
        occupancy=None if resident is None else resident * image.warps / MOST_WARPS,
        microseconds=None if gpu is None else 1e6 * attempt_seconds(gpu, counted.instructions, warps),
    )


def blocks_per_processor(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Blocks of so many warps that a processor holds at once."""
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp // SCHEDULERS * SCHEDULERS // warps
    return min(MOST_BLOCKS, MOST_WARPS // warps, by_registers, gpu.shared // (shared + RESERVED_SHARED))


def attempt_seconds(gpu: Gpu, attempt: Instructions, warps: int) -> float:
    """Modelled time of one attempt of every lane: max(issue, arithmetic, memory), as if latencies were hidden.

    A processor has 4 schedulers, each of which issues one instruction of one warp per clock. One with
    w = ceil(warps / (4 processors)) warps needs w * instructions clocks to issue, or w * n * 4 * 32 / throughput for the n
    float32, float64 or special instructions if these take longer; all together need bytes * 32 * warps / bandwidth seconds
    for memory.
    """
    share = -(-warps // (SCHEDULERS * gpu.processors))
    width = WARP * SCHEDULERS
    clocks = max(
        attempt.total,
        attempt.single * width / gpu.single,
        attempt.double * width / gpu.double,
        attempt.special * width / gpu.special,
    )
    return max(share * clocks / gpu.clock, attempt.bytes * WARP * warps / gpu.bandwidth)


# NVIDIA's tools.


@functools.cache
def tool(name: str) -> Path:
    """A tool of NVIDIA's from the triton wheel. Raises ImportError."""
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return path
    raise ImportError(f"{name} comes with triton, which is not installed: install pykernels[cuda]")


def _run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {(done.stderr or done.stdout).strip()}")
    return done


# Code as basic blocks.


class Instruction(NamedTuple):
    """An instruction: its opcode, what it counts as, the labels it may jump to, and whether the next one may follow."""

    opcode: str
    cost: Instructions
    targets: tuple[str, ...] = ()
    falls: bool = True
    calls: bool = False


class Block(NamedTuple):
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    cost: Instructions
    calls: bool
    following: tuple[int, ...]


Line = Instruction | str  # a string: a label


def blocks_of(lines: Iterable[Line]) -> list[Block]:
    """Basic blocks; the first one is the entry."""
    begun: list[tuple[list[Instruction], list[str]]] = [([], [])]
    for line in lines:
        if isinstance(line, str):
            if begun[-1][0]:
                begun.append(([], []))
            begun[-1][1].append(line)
            continue
        begun[-1][0].append(line)
        if line.targets or not line.falls or line.calls:
            begun.append(([], []))
    places = {label: number for number, (_, labels) in enumerate(begun) for label in labels}
    blocks = []
    for number, (instructions, _) in enumerate(begun):
        last = instructions[-1] if instructions else None
        following = [places[label] for label in last.targets if label in places] if last is not None else []
        if (last is None or last.falls) and number + 1 < len(begun):
            following.append(number + 1)
        cost = sum((i.cost for i in instructions), Instructions())
        blocks.append(Block(cost, any(i.calls for i in instructions), tuple(following)))
    return blocks


_MACHINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\(([^)]+)\)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_SPECIAL = ("MUFU", "I2F", "F2I", "F2F", "FRND")
_GLOBAL = ("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "LDGSTS")
_MEMORY = (*_GLOBAL, "LDL", "STL", "LDS", "STS", "LDC", "LDSM", "STSM", "ATOMS")
_DOUBLE = ("DADD", "DMUL", "DFMA", "DMNMX", "DSETP")
_SINGLE = ("FADD", "FMUL", "FFMA", "FMNMX", "FSETP", "FSET", "FSEL", "FCHK", "FADD32I", "FMUL32I", "FFMA32I")


def machine_code(listing: str, name: str) -> list[Line]:
    """A kernel's instructions in a listing of nvdisasm's; subroutines come behind it."""
    lines: list[Line] = []
    inside = False
    for text in listing.splitlines():
        if re.match(r"\s*\.section\s", text):
            inside = f".text.{name}," in text
        elif inside and (label := re.match(r"([.$][\w.$]+):", text)):
            lines.append(label[1])
        elif inside and (match := _MACHINE.search(text)):
            lines.append(_machine_instruction(match[1] is not None, match[2], match[3]))
    return lines


def _machine_instruction(guarded: bool, opcode: str, operands: str) -> Instruction:
    family, *modifiers = opcode.split(".")
    targets: tuple[str, ...] = ()
    # Subroutines have names; a call of a label is how ptxas leaves a loop on sm_80.
    calls = family == "CALL" and "`(.L" not in operands
    jumps = family in ("BRA", "JMP") or (family == "CALL" and not calls)
    if jumps:
        targets = tuple(_TARGET.findall(operands))
    elif family in ("BRX", "JMX", "BRXU", "JMXU"):
        listed = re.search(r"BRANCH_TARGETS ([^\"]*)", operands)
        targets = tuple(label.strip() for label in listed[1].split(",")) if listed is not None else ()
    # A branch may have a second condition behind the first: @P2 BRA !P3, target.
    conditional = guarded or (family == "BRA" and re.match(r"!?U?P\d", operands) is not None)
    ends = jumps or family in ("BRX", "JMX", "BRXU", "JMXU", "EXIT", "RET", "KILL")
    cost = _machine_cost(family, modifiers)
    return Instruction(opcode, cost, targets, falls=conditional or not ends, calls=calls)


def _machine_cost(family: str, modifiers: Sequence[str]) -> Instructions:
    if family in _MEMORY:
        width = next((_WIDTHS[m] for m in modifiers if m in _WIDTHS), 4)
        return Instructions(memory=1, bytes=width if family in _GLOBAL else 0)
    if family in _SPECIAL:
        return Instructions(special=1)
    if family in _SINGLE:
        return Instructions(single=1)
    if family in _DOUBLE:
        return Instructions(double=1)
    return Instructions(other=1)


def ptx_code(ptx: str, name: str) -> list[Line]:
    """A kernel's instructions in PTX."""
    start = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", ptx)
    if start is None:
        raise ValueError(f"the PTX has no kernel {name}")
    lines: list[Line] = []
    tables: dict[str, tuple[str, ...]] = {}
    for text in _statements(re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx[start.end() :], flags=re.DOTALL)):
        if text.endswith(":"):
            lines.append(text[:-1])
        elif text.startswith(".branchtargets"):
            assert isinstance(lines[-1], str)
            tables[lines[-1]] = tuple(t.strip() for t in text.removeprefix(".branchtargets").split(","))
        elif not text.startswith("."):
            lines.append(_ptx_instruction(text, tables))
    return lines


def _statements(text: str) -> Iterator[str]:
    """The statements and labels of the function whose parameters `text` begins with."""
    depth, statement = 0, ""
    for part in re.split(r"([;{}]|(?<=:)\s)", text[text.index("{") :]):
        begins = not statement.strip()
        # Behind an opcode, brackets hold the parts of a vector; else they are scopes.
        if part in ("{", "}") and begins:
            depth += 1 if part == "{" else -1
            if depth == 0:
                return
        elif part == ";" or (part.isspace() and statement.endswith(":")):
            yield " ".join(statement.split())
            statement = ""
        else:
            statement += part


def _ptx_instruction(text: str, tables: dict[str, tuple[str, ...]]) -> Instruction:
    guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    opcode, _, operands = rest.partition(" ")
    family, *modifiers = opcode.split(".")
    targets: tuple[str, ...] = ()
    if family == "bra":
        targets = (operands.strip(),)
    elif family == "brx":
        targets = tables[operands.rpartition(",")[2].strip()]
    falls = bool(guard) or family not in ("bra", "brx", "ret", "exit", "trap")
    cost = _ptx_cost(family, modifiers)
    return Instruction(opcode, cost, targets, falls, calls=family == "call")


def _ptx_cost(family: str, modifiers: Sequence[str]) -> Instructions:
    kind = modifiers[-1] if modifiers else ""
    if family in ("ld", "st", "atom", "red", "cp"):
        size = int(digits[0]) // 8 if (digits := re.search(r"\d+$", kind)) else 4
        size *= next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
        far = not {"local", "shared", "param", "const"} & set(modifiers)
        return Instructions(memory=1, bytes=size if far else 0)
    if family in ("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh", "div"):
        return Instructions(special=1)
    moves = family in ("mov", "cvt", "selp")
    return Instructions(
        single=int(kind == "f32" and not moves),
        double=int(kind == "f64" and not moves),
        other=int(moves or kind not in ("f32", "f64")),
    )


# Loops.


class Loop(NamedTuple):
    """A natural loop: its header and all its blocks."""

    header: int
    blocks: frozenset[int]


class Counted(NamedTuple):
    """What an attempt costs, in how many loops, and how many loops inside them are counted once."""

    instructions: Instructions
    loops: int
    inner: int


def attempts(lines: Iterable[Line]) -> Counted:
    """What an attempt costs in a kernel's code, as this module's text says; all of a kernel that has no loops."""
    blocks = blocks_of(lines)
    loops = natural_loops(blocks)
    found = attempt_loops(blocks, loops)
    if not found:
        reached = _order(blocks)
        leaves = [b for b in reached if not blocks[b].following]
        way = _longest_way(blocks, [], frozenset(reached), 0, leaves)
        return Counted(way.instructions, 0, way.inner)
    counted = [_around(blocks, loops, loop) for loop in found]
    total = sum((c.instructions for c in counted), Instructions())
    return Counted(total, len(found), sum(c.inner for c in counted))


def natural_loops(blocks: Sequence[Block]) -> list[Loop]:
    """The loops of what the entry reaches; those that share a header are one."""
    order = _order(blocks)
    above = _dominators(blocks, order)
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for after in blocks[b].following:
            before[after].append(b)
    bodies: dict[int, set[int]] = {}
    for source in order:
        for header in blocks[source].following:
            if header in above[source]:
                body, open_ = bodies.setdefault(header, {header}), [source]
                while open_:
                    b = open_.pop()
                    if b not in body:
                        body.add(b)
                        open_ += before[b]
    return [Loop(header, frozenset(body)) for header, body in bodies.items()]


def _order(blocks: Sequence[Block]) -> list[int]:
    """What the entry reaches, in reverse postorder."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].following))]
    while stack:
        b, rest = stack[-1]
        after = next((a for a in rest if a not in seen), None)
        if after is None:
            done.append(b)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(blocks[after].following)))
    return done[::-1]


def _dominators(blocks: Sequence[Block], order: Sequence[int]) -> dict[int, set[int]]:
    """For each block, those that every way from the entry to it passes, itself included."""
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for after in blocks[b].following:
            before[after].append(b)
    above = {b: set(order) for b in order} | {order[0]: {order[0]}}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = set.intersection(*(above[p] for p in before[b])) | {b}
            changed |= new != above[b]
            above[b] = new
    return above


def attempt_loops(blocks: Sequence[Block], loops: Sequence[Loop]) -> list[Loop]:
    """The loops each attempt passes through once, see above."""
    if not loops:
        return []

    own = {
        loop: sum(blocks[b].cost.arithmetic for b in loop.blocks - _union(_within(loops, loop)))
        for loop in loops
    }
    most = {loop: max(own[other] for other in (loop, *_within(loops, loop))) for loop in loops}

    def inside(loop: Loop) -> list[Loop]:
        if own[loop] == most[loop]:
            return [loop]
        children = [other for other in _outermost(_within(loops, loop)) if 8 * most[other] >= most[loop]]
        return [found for child in children for found in inside(child)]

    return inside(max(_outermost(loops), key=lambda loop: sum(blocks[b].cost.total for b in loop.blocks)))


def _within(loops: Sequence[Loop], loop: Loop) -> list[Loop]:
    return [other for other in loops if other.blocks < loop.blocks]


def _outermost(loops: Sequence[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(loop.blocks < other.blocks for other in loops)]


def _union(loops: Iterable[Loop]) -> frozenset[int]:
    return frozenset().union(*(loop.blocks for loop in loops))


def _around(blocks: Sequence[Block], loops: Sequence[Loop], loop: Loop) -> Counted:
    """The longest way once around a loop that avoids what can be avoided."""
    ends = [b for b in loop.blocks if loop.header in blocks[b].following]
    return _longest_way(blocks, _within(loops, loop), loop.blocks, loop.header, ends)


def _longest_way(
    blocks: Sequence[Block], loops: Sequence[Loop], places: frozenset[int], start: int, ends: Sequence[int]
) -> Counted:
    """The longest way from `start` to one of `ends`; `loops` are all that lie in `places`."""
    outer = _outermost(loops)
    node_of = {b: b for b in places} | {b: loop.header for loop in outer for b in loop.blocks}
    costs = {b: Counted(blocks[b].cost, 0, 0) for b in places}
    for loop in outer:
        inside = _around(blocks, loops, loop)
        costs[loop.header] = Counted(inside.instructions, 0, inside.inner + 1)
    following: dict[int, set[int]] = {node: set() for node in node_of.values()}
    for b in places:
        for after in blocks[b].following:
            if after in places and after != start and node_of[after] != node_of[b]:
                following[node_of[b]].add(node_of[after])
    goals = {node_of[b] for b in ends}
    avoided: set[int] = set()
    inner = {loop.header for loop in outer}
    # Loops first: a call inside one goes with it.
    for node in (*sorted(inner), *sorted(b for b in following if b not in inner and blocks[b].calls)):
        if node != start and _reaches(following, start, goals, avoided | {node}):
            avoided.add(node)
    best: dict[int, Counted | None] = {}

    def way(node: int) -> Counted | None:
        """The longest way from a node to a goal, None if there is none."""
        if node not in best:
            best[node] = None  # an irreducible cycle, which compilers do not write, ends here
            onward = [w for after in following[node] - avoided if (w := way(after)) is not None]
            if onward or node in goals:
                rest = max(onward, key=lambda w: w.instructions.total, default=Counted(Instructions(), 0, 0))
                mine = costs[node]
                best[node] = Counted(mine.instructions + rest.instructions, 0, mine.inner + rest.inner)
        return best[node]

    found = way(start)
    assert found is not None
    return found


def _reaches(following: dict[int, set[int]], start: int, goals: set[int], without: set[int]) -> bool:
    seen, open_ = {start}, [start]
    while open_:
        node = open_.pop()
        if node in goals:
            return True
        fresh = following[node] - seen - without
        seen |= fresh
        open_ += fresh
    return False
