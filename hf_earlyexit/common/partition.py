"""A fixed partition of distinct inputs into parts for exploration, selection, calibration and reporting.

The part of a unit depends only on the unit, the salt and the shares. An input is therefore in the same part whether it
is read from a file, a piece of that file or a larger file, and commands with the same salt and shares agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from hf_earlyexit.common.data import Example
from hf_earlyexit.common.values import is_number


PARTS = ("explore", "select", "calibrate", "report")
OPEN = ("explore", "select")  # read by default for exploration, selection and training
SALT = "hf_earlyexit"
SHARES = (0.1, 0.2, 0.4, 0.3)


@dataclass(frozen=True)
class Partition:
    """A partition of all possible inputs into four parts.

    Attributes:
        salt: Goes into every hash. A different salt gives an unrelated partition.
        shares: Probability of each part, with a sum of at most 1. Units in the remainder are in no part.
    """

    salt: str = SALT
    shares: Mapping[str, float] = field(default_factory=lambda: dict(zip(PARTS, SHARES, strict=True)))

    def __post_init__(self):
        if not isinstance(self.salt, str) or not self.salt:
            raise ValueError(f"`salt` must be a text that is not empty, got {self.salt!r}.")
        values = list(self.shares.values()) if isinstance(self.shares, Mapping) else []
        legal = all(is_number(value) and value >= 0 for value in values)
        if tuple(self.shares) != PARTS or not legal or sum(values) > 1 + 1e-9:
            raise ValueError(f"`shares` must be numbers for {list(PARTS)}, together at most 1, got {self.shares!r}.")

    def part_of(self, unit: str) -> str | None:
        """The part of a unit (an input, or the group that it belongs to); None if it is in no part.

        Open parts start at one end of the hash range and the calibrate part at the other end. Commands with different
        shares therefore overlap only where the open shares of one and the calibrate share of the other exceed 1.
        """
        place = int.from_bytes(self._digest("part", unit)[:8]) / 2**64
        if place >= 1 - self.shares["calibrate"]:
            return "calibrate"
        end = 0.0
        for name in (*OPEN, "report"):
            end += self.shares[name]
            if place < end:
                return name
        return None

    def split(self, examples: Iterable[Example]) -> dict[str, list[Example]]:
        """The inputs of each part, in random order. Units stay together."""
        parts: dict[str, list[Example]] = {name: [] for name in PARTS}
        for example in self.in_order(examples):
            if (part := self.part_of(example.unit)) is not None:
                parts[part].append(example)
        return parts

    def keep(self, examples: Iterable[Example], parts: Sequence[str] = OPEN) -> list[Example]:
        """The inputs of these parts, in random order.

        Raises:
            ValueError: A part does not exist, or none of the inputs is in the parts.
        """
        check_parts(parts)
        given = list(examples)
        kept = [example for example in self.in_order(given) if self.part_of(example.unit) in parts]
        if given and not kept:
            raise ValueError(
                f"None of {len(given)} inputs is in the parts that are read, {list(parts)}: give more inputs, or name "
                f"other parts (of {list(PARTS)})."
            )
        return kept

    def in_order(self, examples: Iterable[Example], at_most: int | None = None) -> list[Example]:
        """The inputs in a random order that is the same in every run and independent of file order and parts.

        Args:
            examples: The inputs, in any order.
            at_most: Maximum number of inputs. Units are taken whole, so where they have several inputs this is the
                mean: the number of units is `at_most` over the mean inputs per unit, and at least 1. It depends on no
                unit's own size, since leaving out large units would bias what is measured on the others.
        """
        ordered = sorted(examples, key=lambda one: (self._digest("order", one.unit), self._digest("in", one.source)))
        units = [list(members) for _, members in groupby(ordered, key=lambda example: example.unit)]
        if at_most is not None and len(ordered) > at_most:
            units = units[: max(1, at_most * len(units) // len(ordered))]
        return [example for unit in units for example in unit]

    def described(self) -> dict[str, Any]:
        """Salt and shares as plain values, for certificates, journals and results."""
        return {"salt": self.salt, "shares": dict(self.shares)}

    def _digest(self, purpose: str, text: str) -> bytes:
        return hashlib.sha256(json.dumps([self.salt, purpose, text]).encode()).digest()


def check_parts(parts: Sequence[str]) -> None:
    """Refuse unknown part names, and an empty list."""
    if isinstance(parts, str) or not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"`parts` must name some of {list(PARTS)}, got {parts!r}.")
