"""Inputs by part of the partition, for tests that need a given number of each."""

from __future__ import annotations

from collections.abc import Sequence

from hf_earlyexit.common.data import Example
from hf_earlyexit.common.partition import Partition


def drawn(examples: Sequence[Example], partition: Partition | None = None, **counts: int) -> list[Example]:
    """The first `counts[part]` inputs of each named part, each part in the order of `examples`."""
    parts, partition = {name: [] for name in counts}, partition or Partition()
    for example in examples:
        part = partition.part_of(example.unit)
        if part in parts and len(parts[part]) < counts[part]:
            parts[part].append(example)
    assert {name: len(found) for name, found in parts.items()} == counts, "there are not so many"
    return [example for found in parts.values() for example in found]
