"""Reads a picture's orientation, and keeps its other metadata from filling the memory.

Pillow copies what every entry of a TIFF or EXIF directory points to, and 65,535 entries may point to the same
megabytes. So Pillow gets a JPEG without its EXIF, and it gets a TIFF only after the sizes in its directories were added
up.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

ORIENTATION = 0x0112
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "L"}
# Entries that point to other directories: EXIF, GPS, interoperability, others.
_LINKS = (0x8769, 0x8825, 0xA005, 0x014A)
_DIRECTORIES = 1000  # of a TIFF file; each frame has one
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation of a picture, 1 (upright) to 8, from tag 0x0112 or, if that is missing, from XMP.

    A tag that is broken, or of another type or range, counts as missing. Source: the TIFF 6.0 and EXIF 2.32 standards.
    """
    data = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    try:
        for tag, kind, count, value in _first_directory(data):
            if tag == ORIENTATION and count == 1 and kind in _INTEGERS:
                (found,) = struct.unpack_from(("<" if data[:2] == b"II" else ">") + _INTEGERS[kind], value)
                if 1 <= found <= 8:
                    return int(found)
    except struct.error:  # cut short
        pass
    said = _XMP.search(xmp)
    return int(said[1]) if said else 1


def without_exif(jpeg: bytes) -> tuple[bytes, bytes, bytes]:
    """A JPEG without its APP1 and APP2 segments (EXIF, XMP, other pictures, colour profiles); its EXIF; its XMP."""
    kept, exif, xmp, place = [jpeg[:2]], b"", b"", 2
    while place + 4 <= len(jpeg) and jpeg[place] == 0xFF and jpeg[place + 1] not in (0xD9, 0xDA):
        marker = jpeg[place + 1]
        # It has no length: a fill byte, or a marker in the wrong place.
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            place += 1 if marker == 0xFF else 2
            continue
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        segment = jpeg[place + 4 : end]
        if marker not in (0xE1, 0xE2):
            kept.append(jpeg[place:end])
        elif segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif segment.startswith(_XMP_HEAD):
            xmp = xmp or segment
        place = end
    return b"".join([*kept, jpeg[place:]]), exif, xmp


def check_tiff(file: BinaryIO, size: int) -> None:
    """Refuse a TIFF file whose directories point to more bytes than it has, or that has thousands of frames.

    Args:
        file: open, at any position. The position changes.
        size: its bytes.

    Raises:
        ValueError: says what is wrong.
    """
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    place_form, count_form, entry_form = (order + form for form in (("Q", "Q", "HHQQ") if big else ("L", "H", "HHLL")))
    entry_size = struct.calcsize(entry_form)
    directories, total = 0, 0
    seen: set[int] = set()
    try:
        todo = [struct.unpack_from(place_form, head, 8 if big else 4)[0]]
        while todo:
            place = todo.pop()
            if not 0 < place < size or place in seen:
                continue
            seen.add(place)
            directories += 1
            if directories > _DIRECTORIES:
                raise ValueError(f"it has more than {_DIRECTORIES} frames or directories")
            file.seek(place)
            (count,) = struct.unpack(count_form, file.read(struct.calcsize(count_form)))
            if count > 65535:
                raise ValueError(f"a directory of {count:,} entries")
            table = file.read(count * entry_size)
            whole = len(table) // entry_size * entry_size
            for tag, kind, number, value in struct.iter_unpack(entry_form, table[:whole]):
                total += _SIZES.get(kind, 1) * number
                if tag in _LINKS and number == 1:
                    todo.append(value)
            if total > size + 65536:
                raise ValueError("its directories point to more bytes than the file has")
            todo.append(struct.unpack(place_form, file.read(struct.calcsize(place_form)))[0])
    except struct.error:  # the file is cut short, which Pillow reports
        pass


def _first_directory(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(tag, type, count, the four bytes of its value or place) of each entry."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return
    (place,) = struct.unpack_from(order + "L", data, 4)
    (count,) = struct.unpack_from(order + "H", data, place)
    for number in range(count):
        begin = place + 2 + 12 * number
        yield *struct.unpack_from(order + "HHL", data, begin), data[begin + 8 : begin + 12]
