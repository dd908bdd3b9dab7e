"""Inputs of the verbs that evaluate a model: from a file and its columns, or the shipped model's validation set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_earlyexit.cli.arguments import positive, text_of


if TYPE_CHECKING:
    from hf_earlyexit.common.data import Example
    from hf_earlyexit.common.partition import Partition


PREFIX = "input_prefix"  # field in output lines of `hf-earlyexit generate`: the prefix put before the input
PART_NAMES = ("explore", "select", "calibrate", "report")  # same as in `common/partition.py`, which is imported late


def add_data_arguments(parser) -> None:
    """Add the arguments that name inputs and references."""
    parser.add_argument(
        "--file", metavar="FILE", help=".csv, .tsv, .jsonl or .parquet (the shipped model's validation)"
    )
    parser.add_argument("--source-column", metavar="NAME", help="column of the inputs (known names are found)")
    parser.add_argument("--target-column", metavar="NAME", help="column of the references (known names are found)")
    parser.add_argument("--group-by", metavar="NAME", help="column that says which rows belong together")
    parser.add_argument(
        "--prefix", type=text_of, default="", metavar="TEXT", help="put before each input, such as 'summarize: '"
    )
    parser.add_argument(
        "--max-inputs",
        type=positive,
        metavar="N",
        help="distinct inputs at most, drawn by a hash (all); in the mean with --group-by: groups stay whole",
    )


def add_partition_arguments(parser) -> None:
    """Add the arguments of the partition."""
    parser.add_argument(
        "--salt",
        type=text_of,
        metavar="TEXT",
        help="of the hash that splits inputs; the same in all commands (hf_earlyexit)",
    )
    parser.add_argument(
        "--shares",
        type=float,
        nargs=4,
        metavar="X",
        help=f"of the parts {', '.join(PART_NAMES)}; the same in all commands (0.1 0.2 0.4 0.3)",
    )


def add_part_argument(parser) -> None:
    """Add `--part`, the parts of the partition that are read."""
    parser.add_argument(
        "--part",
        nargs="+",
        choices=PART_NAMES,
        default=("explore", "select"),
        help="the parts that are read (explore select); what is chosen by others must not be tested on them",
    )


def partition_of(arguments: argparse.Namespace) -> Partition:
    """The partition given by the arguments."""
    from hf_earlyexit.common.partition import PARTS, SALT, SHARES, Partition

    salt = SALT if arguments.salt is None else arguments.salt
    return Partition(salt, dict(zip(PARTS, arguments.shares or SHARES, strict=True)))


def read_examples(
    arguments: argparse.Namespace, partition: Partition, *, unique: bool, parts: Sequence[str] | None = None
) -> list[Example]:
    """Distinct inputs named by the arguments, in random order.

    Args:
        partition: Assigns inputs to parts.
        parts: The parts that are read; None: all inputs.
        unique: Refuse rows that repeat an input, unless `--group-by` names their group. If False, such rows are one
            input with several references.

    Raises:
        ValueError: A column does not exist, a model is given without a file, or an input is repeated.
    """
    examples = _all_examples(arguments, unique)
    kept = examples if parts is None else partition.keep(examples, parts)
    return partition.in_order(kept, arguments.max_inputs)


def _all_examples(arguments: argparse.Namespace, unique: bool) -> list[Example]:
    from hf_earlyexit.common import data
    from hf_earlyexit.families.shipped import default_examples

    if arguments.file is None:
        _refuse_without_file(arguments)
        return default_examples()
    rows = data.read_file(arguments.file)
    source, target = data.text_columns(rows.column_names, arguments.source_column, arguments.target_column)
    if unique or arguments.group_by is not None:
        options = {"prefix": arguments.prefix, "group_by": arguments.group_by}
        return data.read_examples(rows, source, target, **options)
    return data.group_by_input(data.column_pairs(rows, source, target, prefix=arguments.prefix))


def _refuse_without_file(arguments: argparse.Namespace) -> None:
    if arguments.model is not None:
        raise ValueError("--model needs --file: the inputs that come with the package are for the shipped model")
    for name in ("source_column", "target_column", "group_by", "prefix"):
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with --file")


def data_name(arguments: argparse.Namespace) -> str:
    """The file's name without its folder."""
    from hf_earlyexit.families.shipped import VALIDATION

    return Path(arguments.file or VALIDATION).name
