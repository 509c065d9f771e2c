"""Small changes to valid inputs: of trees, texts, bytes, and of the pieces that file formats are made of."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

NUMBERS = [
    0, 1, -1, 2, 3, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63),
    10**7, 10**30, 0.0, -0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, 1e30, 1.0000001, 3.0, float("inf"), float("nan"),
]  # fmt: skip
STRINGS = [
    "", " ", "0", "x", "None", "null", "auto", "..", ".", "/", "../../x", "/etc/passwd", "/dev/zero", "a/b", "-x", "~",
    "\0", "a\0b", "\n", "a\nerror: b", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\udcff", "é", "e\u0301", "中", "🙂",
    "$x^$", "[/b]", "{0}", "%s", "{{ 1 }}", "{% for %}", "<image>", "<IMG_CONTEXT>", "<|im_end|>", "a" * 5000, "1e999",
    "C:\\x", "*", "http://127.0.0.1:9/x", "file:///etc/passwd", "data:image/png;base64,AAAA", "__class__", "float16",
    "bfloat16", "attention", "mamba2", "linear", "measured:1", "hybrid:2", "dynamic", "yarn",
]  # fmt: skip


def value(rng: random.Random) -> Any:
    """Something that is rarely expected."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(STRINGS)
    nested: Any = rng.choice([1, "x", None])
    for _ in range(rng.choice([1, 2, 3, 70, 200])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice([None, True, False, [], {}, [None], {"": None}, [[]], nested])


# ---------------------------------------------------------------------------------------------- trees


def tree(rng: random.Random, data: Any, changes: int | None = None) -> Any:
    """``data`` (lists, dicts, scalars) with one to three changes somewhere in it."""
    data = json.loads(json.dumps(data))
    for _ in range(changes or rng.choice([1, 1, 1, 2, 3])):
        data = _change(rng, data)
    return data


def _places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [above]
    if len(above) < 12:
        items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
        for key, item in items:
            found += _places(item, (*above, key))
    return found


def _at(data: Any, place: Sequence[Any]) -> Any:
    for key in place:
        data = data[key]
    return data


def _change(rng: random.Random, data: Any) -> Any:
    places = _places(data)
    place = rng.choice(places)
    if not place:
        return value(rng) if rng.random() < 0.05 else data
    parent, key = _at(data, place[:-1]), place[-1]
    old = parent[key]
    how = rng.choice(["value", "value", "near", "near", "delete", "copy", "rename", "add", "wrap", "swap"])
    if how == "value":
        parent[key] = value(rng)
    elif how == "near":
        parent[key] = near(rng, old)
    elif how == "delete":
        del parent[key]
    elif how == "copy":
        parent[key] = json.loads(json.dumps(_at(data, rng.choice(places))))
    elif how == "wrap":
        parent[key] = rng.choice([[old], {"x": old}, [old, old], str(old)])
    elif isinstance(parent, list):
        other = rng.randrange(len(parent))
        if how == "swap":
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent.insert(key, json.loads(json.dumps(parent[other])) if how == "add" else value(rng))
    elif how == "rename":
        name = rng.choice([key + "_", key[:-1], key.upper(), rng.choice(STRINGS)])
        parent[name] = parent.pop(key)
    elif how == "add":
        parent[rng.choice([*STRINGS, key + "2"])] = value(rng)
    else:
        other = rng.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    return data


def near(rng: random.Random, old: Any) -> Any:
    """Something of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        as_float = float(old) if abs(old) < 2**1000 else 0.5
        return rng.choice([old + 1, old - 1, -old, old * 2, old // 2, as_float, str(old), rng.choice(NUMBERS)])
    if isinstance(old, float):
        whole = int(old) if math.isfinite(old) else 1
        return rng.choice([-old, old * 10, old / 10, whole, 0.0, rng.choice(NUMBERS)])
    if isinstance(old, str):
        spot = rng.randint(0, len(old))
        inside = old[:spot] + rng.choice(STRINGS) + old[spot:]
        return rng.choice([old[:spot], old[spot:], old + old, inside, old.upper(), [old], old + " "])
    if isinstance(old, list):
        return rng.choice([old[:-1], old + old, old[::-1], [*old, None], {str(i): item for i, item in enumerate(old)}])
    return rng.choice([None, [], {}, [old]])


def json_text(rng: random.Random, data: Any, *, changed: bool = True) -> bytes:
    """A tree as JSON, some of the time as no decent writer would have written it."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 2]))
    raw = text.encode("utf-8", "surrogatepass")
    how = rng.randrange(14) if changed else 13
    spot = rng.randint(0, len(raw))
    if how == 0:
        raw = raw[:spot]
    elif how == 1:
        odd = [b"\0", b"\xff", b"\xe9", b",", b"}", b"]", b'"', b"//", b"\\u12", b"'"]
        raw = raw[:spot] + rng.choice(odd) + raw[spot:]
    elif how == 2:  # a key twice
        raw = raw.replace(b"{", b'{"' + rng.choice([b"id", b"x", b"image", b"hidden_size"]) + b'": 1, ', 1)
    elif how == 3:
        raw = raw + rng.choice([b"\n", b" x", b"{}", b"\0", raw])
    elif how == 4:
        raw = b"\xef\xbb\xbf" + raw
    elif how == 5:
        odd = [b"1e999", b"NaN", b"-Infinity", b"1" * 5000, b"01", b"0x1", b"1_0", b"1."]
        raw = raw.replace(b"1", rng.choice(odd), 1)
    elif how == 6:
        raw = bytes_(rng, raw)
    elif how == 7:
        raw = raw.replace(b"1", rng.choice([b"[" * 9000 + b"]" * 9000, b'{"a":' * 9000 + b"1" + b"}" * 9000]), 1)
    return raw


# ---------------------------------------------------------------------------------------------- YAML

SCALARS = [
    "0x_", "!!int ''", "!!float x", "2020-13-01", "2020-01-01", "0o17", "017", "1:30:00", "1_000", ".inf", ".nan", "~",
    "yes", "*a", "&a x", "&a [*a]", "!!python/object/apply:os.system [x]", "!x y", "!!binary xx", "!!set {a}",
    "<<: {a: 1}",
    "{", "[", "|\n  x", ">-", "? a", "'", '"\\x', "%TAG", "---", "...", "@", "`", "- - - 1", "1e5", "+1", "0b1",
    "{a: 1, a: 2}", "[" * 100, "!!omap [a: 1]", "1" * 5000, "\t", "=", "!!timestamp x", "on", "null", "-", "''",
]  # fmt: skip


def yaml_text(rng: random.Random, text: str) -> str:
    """A YAML text with a few lines changed."""
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2, 3])):
        i = rng.randrange(len(lines))
        line, how = lines[i], rng.randrange(9)
        if how < 3 and ": " in line:
            lines[i] = line.partition(": ")[0] + ": " + rng.choice(SCALARS)
        elif how == 3:
            lines[i] = " " * rng.choice([1, 2, 4]) + line
        elif how == 4:
            lines[i] = line.lstrip()
        elif how == 5:
            lines.insert(i, rng.choice(lines))
        elif how == 6:
            del lines[i]
            lines = lines or [""]
        elif how == 7:
            lines[i] = line.replace(" ", "\t", 1)
        else:
            spot = rng.randint(0, len(line))
            lines[i] = line[:spot] + rng.choice([*SCALARS, *STRINGS]) + line[spot:]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- bytes


def bytes_(rng: random.Random, raw: bytes, other: bytes = b"") -> bytes:
    """One to four changes of bytes; ``other`` gives pieces to splice in."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4])):
        spot, length = rng.randint(0, len(data)), rng.choice([1, 1, 2, 4, 8, 64, 1000])
        how = rng.randrange(8)
        if how < 2 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif how == 2:
            data[spot : spot + length] = rng.randbytes(length)
        elif how == 3:
            del data[spot : spot + length]
        elif how == 4:
            data[spot:spot] = data[spot : spot + length]
        elif how == 5:
            del data[spot:]
        elif how == 6:
            number = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            code = rng.choice("<I >I <Q >Q <H >H".split())
            data[spot : spot + struct.calcsize(code)] = struct.pack(code, number % 256 ** struct.calcsize(code))
        else:
            source = other or raw
            start = rng.randint(0, len(source))
            data[spot:spot] = source[start : start + length]
    return bytes(data)


def png(rng: random.Random, raw: bytes) -> bytes:
    """A PNG with a chunk changed, its checksum right most of the time."""
    chunks, at = [], 8
    while at + 12 <= len(raw):
        (size,) = struct.unpack(">I", raw[at : at + 4])
        chunks.append((raw[at + 4 : at + 8], raw[at + 8 : at + 8 + size]))
        at += 12 + size
    _pieces(rng, chunks, b"IHDR IDAT PLTE tRNS iCCP eXIf tEXt zTXt gAMA acTL IEND".split())
    found = raw[:8]
    for kind, body in chunks:
        crc = zlib.crc32(kind + body) ^ (rng.random() < 0.1)
        size = len(body) if rng.random() < 0.97 else rng.choice([0, 1, 2**31 - 1, 2**32 - 1])
        found += struct.pack(">I", size) + kind + body + struct.pack(">I", crc)
    return found


def riff(rng: random.Random, raw: bytes) -> bytes:
    """A WEBP with a chunk changed."""
    chunks, at = [], 12
    while at + 8 <= len(raw):
        (size,) = struct.unpack("<I", raw[at + 4 : at + 8])
        chunks.append((raw[at : at + 4], raw[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    _pieces(rng, chunks, [b"VP8 ", b"VP8L", b"VP8X", b"EXIF", b"ICCP", b"ANIM", b"ANMF", b"ALPH", b"XMP "])
    body = b"".join(
        kind + struct.pack("<I", len(part) if rng.random() < 0.97 else 2**31) + part + b"\0" * (len(part) % 2)
        for kind, part in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4 if rng.random() < 0.9 else 2**31) + b"WEBP" + body


def jpeg(rng: random.Random, raw: bytes) -> bytes:
    """A JPEG with a segment of its head changed."""
    segments, at = [], 2
    while raw[at : at + 1] == b"\xff" and raw[at + 1] != 0xDA:
        (size,) = struct.unpack(">H", raw[at + 2 : at + 4])
        segments.append((raw[at : at + 2], raw[at + 4 : at + 2 + size]))
        at += 2 + size
    _pieces(rng, segments, [b"\xff" + bytes([code]) for code in (0xC0, 0xC2, 0xC4, 0xDB, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE)])
    head = b"".join(mark + struct.pack(">H", (len(body) + 2) % 65536) + body for mark, body in segments)
    return raw[:2] + head + raw[at:]


def _pieces(rng: random.Random, pieces: list[tuple[bytes, bytes]], kinds: list[bytes]) -> None:
    for _ in range(rng.choice([1, 1, 2])):
        i, how = rng.randrange(len(pieces)), rng.randrange(6)
        kind, body = pieces[i]
        if how < 3 and body:
            pieces[i] = kind, bytes_(rng, body)
        elif how == 3:
            pieces.insert(i, rng.choice(pieces))
        elif how == 4:
            pieces[i] = rng.choice(kinds), body
        elif len(pieces) > 1:
            del pieces[i]


def safetensors(rng: random.Random, raw: bytes) -> bytes:
    """A safetensors file with its header, its data or its frame changed."""
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    how = rng.randrange(6)
    if how == 0:
        return bytes_(rng, raw)
    if how == 1:
        return raw[:8] + raw[8 : 8 + size] + bytes_(rng, data)
    if how == 2:
        data = data + rng.randbytes(8)
    elif how == 3:  # two tensors change their names or places
        one, two = (rng.choice([name for name in header if name != "__metadata__"]) for _ in range(2))
        header[one], header[two] = header[two], header[one]
    else:
        header = tree(rng, header)
    text = json_text(rng, header, changed=rng.random() < 0.3)
    text += b" " * (-len(text) % 8)
    claimed = len(text) if rng.random() < 0.95 else rng.choice([0, 1, 2**31, 2**63, len(text) + 8])
    return struct.pack("<Q", claimed) + text + data
