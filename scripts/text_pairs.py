"""Answers for the texts that the training scripts read: arguments, pairs, token ids, ROUGE of what is said."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.data import Example, column_pairs, read_file, text_columns
from hf_earlyexit.failures import reading
from hf_earlyexit.labelled import IGNORED
from hf_earlyexit.metrics import Rouge
from hf_earlyexit.shortcuts import with_full_depth_labels
from hf_earlyexit.tables import READERS, Table, suffix_of


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def on_hub(name: str | None) -> str | None:
    """The name, unless it is a folder here: what a model card may link to."""
    return None if name is None or Path(name).exists() else name


def check_data(arguments: DataArguments) -> None:
    """Refuse what names no texts."""
    if (arguments.dataset is None) == (arguments.train_file is None):
        raise ValueError("Give either --dataset or --train_file.")
    if arguments.train_file is not None and arguments.validation_file is None:
        raise ValueError(
            "--train_file goes with --validation_file: full depth is evaluated before and after training."
        )


def read_pairs(arguments: DataArguments) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and validation pairs, inputs with the prefix."""
    if arguments.train_file is not None:
        parts = read_file(arguments.train_file), read_file(arguments.validation_file)
    elif (files := split_files(Path(arguments.dataset))) is not None:
        parts = map(read_file, files)
    else:
        own = None if Path(arguments.dataset).exists() else DATASET_CONFIGS.get(arguments.dataset)
        config = arguments.dataset_config or own
        with reading(arguments.dataset, "the data set"):
            parts = load_dataset(arguments.dataset, config, split=list(SPLITS))
    return tuple(pairs_of(part, arguments) for part in parts)


def split_files(folder: Path) -> list[Path] | None:
    """The one file of each split in a folder; None where the library `datasets` has to find its way.

    It would guess what kind of values are in the columns of a CSV.
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
    tokenizer = copy.deepcopy(tokenizer)  # it remembers how it cut, and the one that is saved should not

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
    """Rows of these sources with what the model writes of them at full depth, greedily, as labels: no targets needed.

    The very tokens that it writes; a text that was cut has no end token. With several processes each writes them all.
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
    """As `compute_metrics`: ROUGE of generated texts, each against all references of its input.

    Args:
        examples: The distinct inputs, in the order of the evaluation set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, examples: list[Example]):
        self.tokenizer, self.examples = tokenizer, examples

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ids = np.where(prediction.predictions < 0, self.tokenizer.pad_token_id, prediction.predictions)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        references = [list(example.references) for example in self.examples]
        return Rouge().compute(predictions=texts, references=references)
