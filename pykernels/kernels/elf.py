"""Object files whose constants follow their code, in one section.

LLVM's runtime linker gives each section memory of its own, wherever the process has some left. Code reaches constants by
offsets of 32 bits: where XLA has filled the space between, by gigabytes, the linker aborts the process. Absolute addresses
(the large code model) would cost the smallest loops a tenth of their speed; one section cannot come apart.

The format: System V ABI, "ELF-64 Object File Format". 64-bit little-endian objects, as x86-64 and AArch64 Linux have them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC, _EXEC = 1, 2, 4
_HEADER, _SYMBOL, _REFERENCE = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ"), struct.Struct("<QIIq")
_SECTION_SYMBOL = 3
_SECTIONS_AT, _COUNTS_AT = 0x28, 0x3A


@dataclass
class Section:
    """A section header; `name` is its text."""

    name: str
    kind: int
    flags: int
    offset: int
    size: int
    info: int
    align: int


def sections(code: bytes) -> list[Section]:
    """The section headers of an object file. Raises ValueError for what is no 64-bit little-endian ELF."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit little-endian ELF object")
    table, count, names = _table(code)
    raw = [_HEADER.unpack_from(code, table + i * _HEADER.size) for i in range(count)]
    text = raw[names][4]

    def name(offset: int) -> str:
        return code[text + offset : code.index(b"\0", text + offset)].decode()

    return [Section(name(r[0]), r[1], r[2], r[4], r[5], r[7], r[8]) for r in raw]


def _table(code: bytes) -> tuple[int, int, int]:
    (table,) = struct.unpack_from("<Q", code, _SECTIONS_AT)
    _, count, names = struct.unpack_from("<HHH", code, _COUNTS_AT)
    return table, count, names


def join_constants(code: bytes) -> bytes:
    """An object file with its constants moved behind the code in `.text`, and their symbols with them. An object that is no
    such ELF (macOS, Windows) is returned as it is. Raises ValueError where something read-only cannot be moved."""
    try:
        found = sections(code)
    except ValueError:
        return code
    (text,) = (i for i, s in enumerate(found) if s.name == ".text")
    moved = [
        i
        for i, s in enumerate(found)
        if s.kind == _PROGBITS and s.flags & (_ALLOC | _EXEC | _WRITE) == _ALLOC
    ]
    if not moved:
        return code
    if any(s.kind == _RELA and s.info in moved for s in found):
        raise ValueError("constants that hold addresses")
    start = found[text]
    joined = bytearray(code[start.offset : start.offset + start.size])
    places = {}
    for i in moved:
        joined += bytes(-len(joined) % found[i].align)
        places[i] = len(joined)
        joined += code[found[i].offset : found[i].offset + found[i].size]
    align = max(found[i].align for i in (text, *moved))
    out = bytearray(code) + bytes(-len(code) % align)
    offset = len(out)
    out += joined
    table, _, _ = _table(code)

    def change(section: int, **fields: int) -> None:
        at = table + section * _HEADER.size
        names = ("name", "kind", "flags", "address", "offset", "size", "link", "info", "align", "entry")
        header = dict(zip(names, _HEADER.unpack_from(out, at), strict=True))
        _HEADER.pack_into(out, at, *{**header, **fields}.values())

    change(text, offset=offset, size=len(joined), align=align)
    for i in moved:
        change(i, kind=0, flags=0, size=0)
    # A section's own symbol stands for its beginning, whatever its value: there, the references move.
    (symbols,) = (s for s in found if s.kind == _SYMTAB)
    begins = {}
    for number, at in enumerate(range(symbols.offset, symbols.offset + symbols.size, _SYMBOL.size)):
        name, info, other, section, value, size = _SYMBOL.unpack_from(out, at)
        if section in places:
            own = info & 15 == _SECTION_SYMBOL
            if own:
                begins[number] = places[section]
            _SYMBOL.pack_into(out, at, name, info, other, text, value + (0 if own else places[section]), size)
    for references in (s for s in found if s.kind == _RELA):
        for at in range(references.offset, references.offset + references.size, _REFERENCE.size):
            place, kind, number, addend = _REFERENCE.unpack_from(out, at)
            _REFERENCE.pack_into(out, at, place, kind, number, addend + begins.get(number, 0))
    return bytes(out)
