"""Checks of plain values: numbers, integers, and the fields of a dataclass."""

from __future__ import annotations

from dataclasses import fields


def is_integer(value) -> bool:
    """Whether the value is an integer; booleans are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether the value is a number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def known_fields(cls: type, values: dict) -> dict:
    """Return `values`; refuse keys that are not fields of `cls`."""
    names = [one.name for one in fields(cls)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{cls.__name__} has no {unknown}: it has {names}.")
    return values
