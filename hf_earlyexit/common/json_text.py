"""Strict JSON parsing of user files, with one-line errors that name the place.

Independent of the meaning of the values.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> Any:
    """The values of a JSON file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON; the message has the file and the line.
    """
    return parse_json(decode(Path(path).read_bytes(), str(path)), str(path))


def decode(content: bytes, name: str) -> str:
    """Decode a file as UTF-8, without a byte order mark.

    Raises:
        ValueError: It is not UTF-8; the message has the file and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ValueError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8") from error


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text. Refuses values that Python would silently change or drop.

    Args:
        where: Name of the file for messages, with the line if `text` is one line of it.

    Raises:
        ValueError: It is not JSON, repeats a key, or holds a value that cannot be written again.
    """
    try:
        values = json.loads(text, object_pairs_hook=_distinct, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = where if error.lineno == 1 else f"{where}, line {error.lineno}"
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(f"{where}: a text has {half}, half of a pair of surrogates: it is no character") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON that can be read (nested too deep)") from error
    except ValueError as error:  # from the two functions below, or from integers with thousands of digits
        raise ValueError(f"{where}: not JSON that can be read ({error})") from error
    return values


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {repeated!r}")
    return values


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits} is too large")
    return value
