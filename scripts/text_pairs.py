"""Texts of the training scripts: arguments, input-target pairs, token ids, ROUGE of generated texts."""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.common.data import (
    Example,
    column_pairs,
    group_by_input,
    group_labels,
    read_examples,
    read_file,
    text_columns,
)
from hf_earlyexit.common.failures import reading
from hf_earlyexit.common.partition import OPEN, PARTS, SALT, SHARES, Partition, check_parts
from hf_earlyexit.common.tables import READERS, Table, suffix_of
from hf_earlyexit.evaluation.metrics import Rouge
from hf_earlyexit.generation.teacher_forced import IGNORED
from hf_earlyexit.training.shortcuts import with_full_depth_labels


SPLITS = ("train", "validation")
DATASET_CONFIGS = {"cnn_dailymail": "3.0.0", "abisee/cnn_dailymail": "3.0.0"}


@dataclass
class DataArguments:
    """The texts."""

    dataset: str | None = field(default=None, metadata={"help": "name or folder, as for datasets.load_dataset"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of the data set"})
    train_file: str | None = field(default=None, metadata={"help": "in place of --dataset: .csv, .jsonl or .parquet"})
    validation_file: str | None = field(default=None, metadata={"help": "goes with --train_file"})
    source_column: str | None = field(default=None, metadata={"help": "column of the inputs (known names are found)"})
    target_column: str | None = field(default=None, metadata={"help": "column of the targets (known names are found)"})
    prefix: str = field(default="", metadata={"help": "put before each input, such as 'summarize: '"})
    max_source_tokens: int = field(default=512, metadata={"help": "inputs are cut to this length"})
    max_target_tokens: int = field(
        default=128, metadata={"help": "targets and generated texts are cut to this length"}
    )
    max_validation_inputs: int | None = field(default=None, metadata={"help": "distinct inputs to evaluate on (all)"})
    group_by: str | None = field(
        default=None, metadata={"help": "column that says which rows belong together (those with the same input)"}
    )
    validation_parts: list[str] = field(
        default_factory=lambda: list(OPEN),
        metadata={
            "help": f"of {', '.join(PARTS)}, the parts of the validation inputs that are read; the others are for "
            "`hf-earlyexit calibrate`, and are not trained on either"
        },
    )
    salt: str = field(default=SALT, metadata={"help": "of the hash that splits inputs, as for `hf-earlyexit`"})
    shares: list[float] = field(
        default_factory=lambda: list(SHARES), metadata={"help": "of the parts, as for `hf-earlyexit`"}
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the description's line breaks."""


def on_hub(name: str | None) -> str | None:
    """The name if it is a Hub id, which a model card can link to; None if it is a local path."""
    return None if name is None or Path(name).exists() else name


def check_data(arguments: DataArguments) -> None:
    """Refuse missing or contradicting sources of texts."""
    if (arguments.dataset is None) == (arguments.train_file is None):
        raise ValueError("Give either --dataset or --train_file.")
    if arguments.train_file is not None and arguments.validation_file is None:
        raise ValueError(
            "--train_file goes with --validation_file: full depth is evaluated before and after training."
        )


@dataclass(frozen=True)
class Texts:
    """The texts of a training run.

    Attributes:
        train: Inputs and targets.
        validation: Distinct inputs, in random order.
        left_out: Number of training rows left out because their inputs, or groups, are in unread parts of validation.
        groups: Units of the training rows: groups, or else inputs.
    """

    train: list[tuple[str, str]]
    validation: list[Example]
    left_out: int
    groups: set[str]

    @property
    def sources(self) -> list[str]:
        """All inputs that are read, and the groups that they belong to."""
        validation = (text for one in self.validation for text in (one.source, one.unit))
        return [*(source for source, _ in self.train), *sorted(self.groups), *validation]


def read_texts(arguments: DataArguments) -> Texts:
    """Training pairs and validation inputs, with the prefix, without inputs that are reserved for tests.

    Raises:
        ValueError: A column, a part or a share is invalid, or no training row is left.
    """
    check_parts(arguments.validation_parts)
    partition = partition_of(arguments)
    train, validation = read_rows(arguments)
    examples = examples_of(validation, arguments)
    read = partition.keep(examples, arguments.validation_parts)
    kept_for_tests = {text for one in examples for text in (one.source, one.unit)}
    kept_for_tests -= {text for one in read for text in (one.source, one.unit)}
    pairs = pairs_of(train, arguments)
    units = [pair[0] for pair in pairs] if arguments.group_by is None else groups_of(train, arguments)
    rows = [
        (pair, unit)
        for pair, unit in zip(pairs, units, strict=True)
        if pair[0] not in kept_for_tests and unit not in kept_for_tests
    ]
    trained, groups = [pair for pair, _ in rows], {unit for _, unit in rows}
    if pairs and not trained:
        raise ValueError("All training inputs are validation inputs of parts that are not read: give others.")
    if left_out := len(pairs) - len(trained):
        print(
            f"{left_out} of {len(pairs)} training rows are left out: their inputs or groups are in validation "
            f"outside of --validation_parts {' '.join(arguments.validation_parts)}.",
            file=sys.stderr,
        )
    return Texts(trained, partition.in_order(read, arguments.max_validation_inputs), left_out, groups)


def partition_of(arguments: DataArguments) -> Partition:
    """The partition given by the arguments."""
    if len(arguments.shares) != len(PARTS):
        raise ValueError(f"--shares must be {len(PARTS)} numbers, for {list(PARTS)}, got {arguments.shares}.")
    return Partition(arguments.salt, dict(zip(PARTS, arguments.shares, strict=True)))


def read_rows(arguments: DataArguments) -> tuple[Table | Dataset, Table | Dataset]:
    """The rows of training and validation."""
    if arguments.train_file is not None:
        return read_file(arguments.train_file), read_file(arguments.validation_file)
    if (files := split_files(Path(arguments.dataset))) is not None:
        return tuple(map(read_file, files))
    own = None if Path(arguments.dataset).exists() else DATASET_CONFIGS.get(arguments.dataset)
    config = arguments.dataset_config or own
    with reading(arguments.dataset, "the data set"):
        return tuple(load_dataset(arguments.dataset, config, split=list(SPLITS)))


def examples_of(dataset: Table | Dataset, arguments: DataArguments) -> list[Example]:
    """The distinct inputs of one split."""
    if arguments.group_by is None:
        return group_by_input(pairs_of(dataset, arguments))
    columns = text_columns(dataset.column_names, arguments.source_column, arguments.target_column)
    return read_examples(dataset, *columns, prefix=arguments.prefix, group_by=arguments.group_by)


def groups_of(dataset: Table | Dataset, arguments: DataArguments) -> list[str]:
    """The group of every row, with the prefix, as `read_examples` names units.

    Raises:
        ValueError: The rows have no such column, so nothing shows which of them belong to a unit kept for tests.
    """
    if arguments.group_by not in dataset.column_names:
        raise ValueError(f"--group_by {arguments.group_by}: the training rows have no such column.")
    return [arguments.prefix + label for label in group_labels(dataset, arguments.group_by)]


def split_files(folder: Path) -> list[Path] | None:
    """The files of a folder with exactly one table per split; None for any other, which `datasets` loads.

    Such files are read without `datasets`, which would guess the types of a CSV's columns.
    """
    tables = [path for path in folder.iterdir() if suffix_of(str(path)) in READERS] if folder.is_dir() else []
    found = [[path for path in tables if path.name.partition(".")[0] == split] for split in SPLITS]
    return [path for (path,) in found] if all(len(paths) == 1 for paths in found) else None


def pairs_of(dataset: Table | Dataset, arguments: DataArguments) -> list[tuple[str, str]]:
    """The pairs of one split."""
    columns = text_columns(dataset.column_names, arguments.source_column, arguments.target_column)
    return column_pairs(dataset, *columns, prefix=arguments.prefix)


def tokenize(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], arguments: DataArguments) -> Dataset:
    """Rows with `input_ids`, `attention_mask` and `labels`."""
    tokenizer = copy.deepcopy(tokenizer)  # a tokenizer stores its truncation, which should not be saved

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(rows["source"], truncation=True, max_length=arguments.max_source_tokens)
        targets = tokenizer(text_target=rows["target"], truncation=True, max_length=arguments.max_target_tokens)
        return {**encoded, "labels": targets["input_ids"]}

    sources, targets = zip(*pairs, strict=True)
    rows = Dataset.from_dict({"source": list(sources), "target": list(targets)})
    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenising")


@torch.no_grad()
def own_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    arguments: DataArguments,
    batch_size: int,
) -> Dataset:
    """Rows of these sources whose labels are the model's own greedy output at full depth; no targets are needed.

    Labels are exactly the generated tokens. A text that reached the length limit has no end token. With several
    processes, each generates all texts.
    """
    cut = {"truncation": True, "max_length": arguments.max_source_tokens}
    rows = [{**tokenizer(source, **cut)} for source in sources]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = (tokenizer.pad([rows[place] for place in places], return_tensors="pt") for places in groups)
    labelled = with_full_depth_labels(model.eval(), batches, max_new_tokens=arguments.max_target_tokens)
    for places, batch in zip(tqdm(groups, desc="writing its own targets"), labelled, strict=True):
        for place, ids in zip(places, batch["labels"].cpu(), strict=True):
            rows[place]["labels"] = ids[ids != IGNORED].tolist()
    return Dataset.from_list(rows)


class RougeOfDistinctInputs:
    """A `compute_metrics`: ROUGE of generated texts, each against all references of its input.

    Args:
        tokenizer: Decodes the predictions.
        examples: The distinct inputs, in the order of the evaluation set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, examples: list[Example]):
        self.tokenizer, self.examples = tokenizer, examples

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions < 0, self.tokenizer.pad_token_id, prediction.predictions)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        references = [list(example.references) for example in self.examples]
        return Rouge().compute(predictions=texts, references=references)
