"""Object files in one section: constants, and jumps to functions of other libraries, follow the code.

LLVM's runtime linker gives each section memory of its own, wherever the process has some left; its table of the functions
that are called in other libraries (libmvec's sine, say) is one more. Code reaches both by offsets of 32 bits: where the
space between is filled, by XLA's code or by a process with torch in it, the linker aborts the process. Absolute addresses
(the large code model) would cost the smallest loops a tenth of their speed; one section cannot come apart.

The formats: System V ABI, "ELF-64 Object File Format", and its AMD64 supplement. 64-bit little-endian objects, as x86-64
and AArch64 Linux have them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITE, _ALLOC, _EXEC = 1, 2, 4
_HEADER, _SYMBOL, _REFERENCE = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ"), struct.Struct("<QIIq")
_SECTION_SYMBOL = 3
_FUNCTION = 2
_MACHINE_AT, _SECTIONS_AT, _COUNTS_AT = 0x12, 0x28, 0x3A
_X86_64 = 62
_ADDRESS, _DISTANCE, _CALL = 1, 2, 4  # R_X86_64_64, _PC32, _PLT32
_JUMP = b"\xff\x25"  # jmp *offset(%rip)


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


def sections(code: bytes | bytearray) -> list[Section]:
    """The section headers of an object file. Raises ValueError for what is no 64-bit little-endian ELF."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit little-endian ELF object")
    table, count, names = _table(code)
    raw = [_HEADER.unpack_from(code, table + i * _HEADER.size) for i in range(count)]
    text = raw[names][4]

    def name(offset: int) -> str:
        return code[text + offset : code.index(b"\0", text + offset)].decode()

    return [Section(name(r[0]), r[1], r[2], r[4], r[5], r[7], r[8]) for r in raw]


def _table(code: bytes | bytearray) -> tuple[int, int, int]:
    (table,) = struct.unpack_from("<Q", code, _SECTIONS_AT)
    _, count, names = struct.unpack_from("<HHH", code, _COUNTS_AT)
    return table, count, names


def one_section(code: bytes) -> bytes:
    """An object file with its constants and its ways to other libraries' functions in `.text`, behind the code.

    An object that is no such ELF (macOS, Windows) is returned as it is. Raises ValueError where something read-only cannot
    be moved.
    """
    try:
        found = sections(code)
    except ValueError:
        return code
    return _with_calls(_with_constants(code, found))


def far_calls(code: bytes) -> list[int]:
    """Places in x86-64 code where a function of another library is called over an offset of 32 bits."""
    found = sections(code)
    (symbols,) = (s for s in found if s.kind == _SYMTAB)
    elsewhere = [fields[3] == 0 for _, fields in _records(code, symbols, _SYMBOL)]
    return [
        place
        for references in (s for s in found if s.kind == _RELA)
        for _, (place, kind, number, _) in _records(code, references, _REFERENCE)
        if kind == _CALL and elsewhere[number]
    ]


def _change(out: bytearray, section: int, **fields: int) -> None:
    """Change fields of a section's header."""
    table, _, _ = _table(out)
    at = table + section * _HEADER.size
    names = ("name", "kind", "flags", "address", "offset", "size", "link", "info", "align", "entry")
    header = dict(zip(names, _HEADER.unpack_from(out, at), strict=True))
    _HEADER.pack_into(out, at, *{**header, **fields}.values())


def _appended(out: bytearray, content: bytes | bytearray, align: int) -> int:
    """Append the new content of a section; where it begins."""
    out += bytes(-len(out) % align)
    offset = len(out)
    out += content
    return offset


def _text(found: list[Section]) -> int:
    (text,) = (i for i, s in enumerate(found) if s.name == ".text")
    return text


def _records(code: bytes, section: Section, format_: struct.Struct) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Where each entry of a table is, and its fields."""
    for at in range(section.offset, section.offset + section.size, format_.size):
        yield at, format_.unpack_from(code, at)


def _with_constants(code: bytes, found: list[Section]) -> bytes:
    text = _text(found)
    moved = [
        i
        for i, s in enumerate(found)
        if s.kind == _PROGBITS and s.flags & (_ALLOC | _EXEC | _WRITE) == _ALLOC
    ]
    if not moved:
        return code
    if any(s.kind == _RELA and s.info in moved for s in found):
        raise ValueError("constants that hold addresses")
    joined = bytearray(_content(code, found[text]))
    places = {i: _appended(joined, _content(code, found[i]), found[i].align) for i in moved}
    align = max(found[i].align for i in (text, *moved))
    out = bytearray(code)
    offset = _appended(out, joined, align)
    _change(out, text, offset=offset, size=len(joined), align=align)
    for i in moved:
        _change(out, i, kind=0, flags=0, size=0)
    # A section's own symbol stands for its beginning, whatever its value: there, the references move.
    (symbols,) = (s for s in found if s.kind == _SYMTAB)
    begins = {}
    for number, (at, fields) in enumerate(_records(code, symbols, _SYMBOL)):
        name, info, other, section, value, size = fields
        if section in places:
            own = info & 15 == _SECTION_SYMBOL
            if own:
                begins[number] = places[section]
            _SYMBOL.pack_into(out, at, name, info, other, text, value + (0 if own else places[section]), size)
    for references in (s for s in found if s.kind == _RELA):
        for at, (place, kind, number, addend) in _records(code, references, _REFERENCE):
            _REFERENCE.pack_into(out, at, place, kind, number, addend + begins.get(number, 0))
    return bytes(out)


def _with_calls(code: bytes) -> bytes:
    """Each function of another library is called by a jump through an address behind the code. The linker's own jumps go
    through a table that is one more section. (On AArch64 they hold the address themselves.)"""
    if struct.unpack_from("<H", code, _MACHINE_AT)[0] != _X86_64 or not far_calls(code):
        return code
    found = sections(code)
    text = _text(found)
    (symbols,) = (s for s in found if s.kind == _SYMTAB)
    table = [fields for _, fields in _records(code, symbols, _SYMBOL)]
    # A symbol in the section, and its place there: references to the section are written as distances from it.
    anchor, start = next(
        (number, fields[4])
        for number, fields in enumerate(table)
        if fields[3] == text and fields[1] & 15 == _FUNCTION
    )
    joined = bytearray(_content(code, found[text]))
    (relocations,) = (s for s in found if s.kind == _RELA and s.info == text)
    entries, addresses, jumps = [], [], {}
    for _, (place, kind, number, addend) in _records(code, relocations, _REFERENCE):
        if kind == _CALL and table[number][3] == 0:
            # The address, and the jump through it.
            if number not in jumps:
                slot = _appended(joined, bytes(8), 8)
                jumps[number] = len(joined)
                joined += _JUMP + struct.pack("<i", slot - (len(joined) + len(_JUMP) + 4))
                addresses.append((slot, _ADDRESS, number, 0))
            kind, number, addend = _DISTANCE, anchor, addend + jumps[number] - start
        entries.append((place, kind, number, addend))
    out = bytearray(code)
    align = max(found[text].align, 8)
    offset = _appended(out, joined, align)
    _change(out, text, offset=offset, size=len(joined), align=align)
    packed = b"".join(_REFERENCE.pack(*entry) for entry in (*entries, *addresses))
    offset = _appended(out, packed, 8)
    _change(out, found.index(relocations), offset=offset, size=len(packed))
    return bytes(out)


def _content(code: bytes, section: Section) -> bytes:
    return code[section.offset : section.offset + section.size]
