"""Writes ``src/text/unicode_tables.inc``: what tokenizers need to know about characters.

``python runtimes/cpp/tools/write_unicode_tables.py``. Letters, numbers and lower case are asked of the ``tokenizers``
library itself, so that both agree on its version of Unicode; canonical decompositions are Python's.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, normalizers

TARGET = Path(__file__).resolve().parents[1] / "src" / "text" / "unicode_tables.inc"
CHARACTERS = tuple(code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)


def members(pattern: str) -> list[int]:
    """The characters that a pattern of the tokenizers library matches."""
    removing = normalizers.Replace(Regex(pattern), "")
    found: list[int] = []
    for start in range(0, len(CHARACTERS), 4096):
        part = CHARACTERS[start : start + 4096]
        left = set(removing.normalize_str("".join(map(chr, part))))
        found += [code for code in part if chr(code) not in left]
    return found


def ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of every run of characters."""
    found: list[tuple[int, int]] = []
    for code in codes:
        if found and found[-1][1] == code - 1:
            found[-1] = (found[-1][0], code)
        else:
            found.append((code, code))
    return found


def lower_cases() -> list[tuple[int, int, int]]:
    """Character, its lower case, and a second character of it or 0."""
    lower = normalizers.Lowercase()
    found: list[tuple[int, int, int]] = []
    for code in CHARACTERS:
        text = lower.normalize_str(chr(code))
        if text != chr(code):
            first, second = (*map(ord, text), 0)[:2]
            assert len(text) <= 2
            found.append((code, first, second))
    return found


def decompositions() -> list[tuple[int, int, int, int]]:
    """Character, the one or two that it decomposes into, and whether they compose to it; Hangul is computed."""
    found: list[tuple[int, int, int, int]] = []
    for code in CHARACTERS:
        mapping = unicodedata.decomposition(chr(code))
        if not mapping or mapping.startswith("<"):
            continue
        first, second = (*(int(part, 16) for part in mapping.split()), 0)[:2]
        composes = second != 0 and unicodedata.normalize("NFC", chr(code)) == chr(code)
        found.append((code, first, second, int(composes)))
    return found


def combining_classes() -> list[tuple[int, int, int]]:
    """First and last character of every run with one combining class, and the class."""
    found: list[tuple[int, int, int]] = []
    for code in CHARACTERS:
        number = unicodedata.combining(chr(code))
        if number and found and found[-1][1] == code - 1 and found[-1][2] == number:
            found[-1] = (found[-1][0], code, number)
        elif number:
            found.append((code, code, number))
    return found


def table(kind: str, name: str, rows: Iterable[tuple[int, ...]]) -> str:
    """A C++ array of structs."""
    lines = [""]
    for row in rows:
        entry = "{" + ",".join(f"0x{value:X}" if value > 255 else str(value) for value in row) + "},"
        if len(lines[-1]) + len(entry) > 118:
            lines.append("")
        lines[-1] += entry
    return f"constexpr {kind} {name}[] = {{\n" + "\n".join(lines) + "\n};\n"


def tables() -> str:
    """The whole file."""
    return "\n".join(
        [
            "// Written by tools/write_unicode_tables.py; do not edit.",
            table("Range", "kLetters", ranges(members(r"\p{L}"))),
            table("Range", "kNumbers", ranges(members(r"\p{N}"))),
            table("Lower", "kLower", lower_cases()),
            table("Decomposition", "kDecompositions", decompositions()),
            table("CombiningClass", "kCombiningClasses", combining_classes()),
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(tables(), encoding="utf-8")
