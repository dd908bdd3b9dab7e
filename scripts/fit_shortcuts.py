"""Fit linear shortcuts in closed form: exit heads for a T5 without exit training.

    python scripts/fit_shortcuts.py --model google-t5/t5-small --dataset cnn_dailymail --prefix "summarize: " \\
        --max_train_rows 2000 --max_validation_inputs 300 --output_dir shortcuts

Every exit point gets a matrix that predicts the last layer's output from its own by least squares
(`hf_earlyexit.training.shortcuts`); nothing else in the model changes. Agreement of the exits with full depth is
measured on validation inputs, each with its first reference, and compared with the logit lens. The last line of stdout
is JSON.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import ModelCardData
from text_pairs import DataArguments, HelpFormatter, check_data, on_hub, read_texts, tokenize
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, PreTrainedTokenizerBase

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.extras import require
from hf_earlyexit.common.failures import reading, refusals
from hf_earlyexit.common.output_files import folder_written_whole, refuse_folder_of_model
from hf_earlyexit.common.seen_inputs import TRAINING
from hf_earlyexit.common.tokenizer import load_tokenizer
from hf_earlyexit.families.t5.configuration import early_exit_config
from hf_earlyexit.training.model_card import TrainedExits, make_card
from hf_earlyexit.training.shortcuts import (
    KIND,
    ExitWorth,
    ShortcutFit,
    ShortcutReport,
    fit_shortcuts,
    measure_shortcuts,
    with_full_depth_labels,
)


ABOUT = "Its exit heads are linear shortcuts, fitted in closed form; the rest is the model that it was made of."


@dataclass
class FitArguments:
    """The model and the fit."""

    model: str = field(metadata={"help": "a T5 or early-exit checkpoint: a folder or a Hub id"})
    output_dir: str = field(metadata={"help": "where the fitted model, its tokenizer and its card are written"})
    exit_layers: list[int] | None = field(
        default=None, metadata={"help": "layers with an exit point (the checkpoint's, or all but the last)"}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "fit on so many rows, drawn at random (all)"})
    own_texts: bool = field(
        default=False, metadata={"help": "fit on what the model itself writes at full depth in place of the targets"}
    )
    ridge: float = field(default=0.0, metadata={"help": "how strongly maps are drawn towards the logit lens"})
    batch_size: int = field(default=32, metadata={"help": "rows that are read at once"})
    seed: int = field(default=0, metadata={"help": "of the draw of training rows"})


def main(argv: list[str] | None = None) -> None:
    """Fit, measure, save; the last line printed is JSON."""
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser((FitArguments, DataArguments), description=__doc__, formatter_class=HelpFormatter)
    arguments, data = parser.parse_args_into_dataclasses(argv)
    with refusals(parser.prog):
        check_fit(arguments)
        check_data(data)
        refuse_folder_of_model("--output_dir", arguments.output_dir, [arguments.model])
        config = shortcut_config(arguments)
        texts = read_texts(data)
        with reading(arguments.model, "the model"):
            model = EarlyExitT5ForConditionalGeneration.from_pretrained(
                arguments.model, early_exit=config, dtype=torch.float32
            ).eval()
        tokenizer = load_tokenizer(arguments.model, model.config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train_pairs = chosen(texts.train, arguments)
    model.record_seen(TRAINING, [*(source for source, _ in train_pairs), *(one.source for one in texts.validation)])
    validation_pairs = [(example.source, example.references[0]) for example in texts.validation]
    train = batches_of(tokenize(tokenizer, train_pairs, data), tokenizer, arguments.batch_size)
    if arguments.own_texts:
        train = with_full_depth_labels(model, train, max_new_tokens=data.max_target_tokens)
    with refusals(parser.prog):  # too few rows, or rows too similar
        fit = fit_shortcuts(model, train, ridge=arguments.ridge)
    validation = batches_of(tokenize(tokenizer, validation_pairs, data), tokenizer, arguments.batch_size)
    report = measure_shortcuts(model, validation)
    command = shlex.join(["python", "scripts/fit_shortcuts.py", *argv])
    save(model, tokenizer, arguments, fit, report, command)
    counts = {"rows": len(train_pairs), "left_out": texts.left_out, "inputs": len(texts.validation)}
    found = {**counts, "fit": asdict(fit), "held_out": as_json(report)}
    print(json.dumps({"output_dir": arguments.output_dir, "command": command, **found}))


def check_fit(arguments: FitArguments) -> None:
    """Refuse invalid arguments before any work."""
    for name in ("max_train_rows", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if arguments.ridge < 0:
        raise ValueError(f"--ridge must be at least 0, got {arguments.ridge}.")
    require("scipy.stats", "calibrate")  # for the intervals, at the end


def shortcut_config(arguments: FitArguments) -> EarlyExitConfig:
    """Config with shortcuts at the given exit points, or at the checkpoint's."""
    checkpoint, _ = early_exit_config(arguments.model, None, {})
    own = EarlyExitConfig.from_dict(checkpoint.early_exit)
    layers = own.exit_layers if arguments.exit_layers is None else arguments.exit_layers
    return EarlyExitConfig(layers, KIND).for_layers(checkpoint.num_decoder_layers)


def chosen(pairs: list[tuple[str, str]], arguments: FitArguments) -> list[tuple[str, str]]:
    """The rows to fit on."""
    count = arguments.max_train_rows
    return pairs if count is None or count >= len(pairs) else random.Random(arguments.seed).sample(pairs, count)


def batches_of(rows: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> DataLoader:
    """The rows in padded batches, in their order."""
    return DataLoader(rows, batch_size=size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def as_json(report: ShortcutReport) -> dict:
    """The report as plain values, with intervals in place of counts."""

    def values(worth: ExitWorth) -> dict:
        return {"r2": worth.r2, "agreement": worth.agreement.interval()}

    exits = {name: getattr(report, name) for name in ("shortcut", "lens")}
    return {"tokens": report.tokens, **{name: {k: values(w) for k, w in one.items()} for name, one in exits.items()}}


def save(
    model: EarlyExitT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    arguments: FitArguments,
    fit: ShortcutFit,
    report: ShortcutReport,
    command: str,
) -> None:
    """Write the model, its tokenizer and its card."""
    metrics = {f"after_exit_{layer}_agreement": one.agreement.share for layer, one in report.shortcut.items()}
    how = (
        f"`fit_shortcuts`, by least squares over {fit.tokens} tokens with `ridge={fit.ridge:g}`, in "
        f"{fit.seconds:.0f} s; agreement is measured on {report.tokens} tokens of validation inputs."
        f"\n\n```bash\n{command}\n```"
    )
    name = Path(arguments.output_dir).name
    trained = TrainedExits(name, name, model.early_exit, model.config.num_decoder_layers, metrics, how, ABOUT)
    with folder_written_whole(arguments.output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        make_card(trained, ModelCardData(base_model=on_hub(arguments.model))).save(folder / "README.md")


if __name__ == "__main__":
    main()
