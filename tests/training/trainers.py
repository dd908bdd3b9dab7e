"""Trainers of a tiny model on a learnable task, and all objectives they are tested with."""

from __future__ import annotations

import copy

import torch
from transformers import Seq2SeqTrainingArguments

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.training.objectives import (
    ExitClassifiers,
    GeometricClassifiers,
    LayerSkip,
    MultiExit,
    RelaxedClassifiers,
    SelfDistillation,
    ShallowDeep,
    SortedDepths,
)
from hf_earlyexit.training.trainer import EarlyExitTrainer
from tests.tiny import VOCABULARY, made_once, tiny_stock, with_exits


OBJECTIVES = {
    "linear": MultiExit("linear"),
    "uniform, last again": MultiExit("uniform", last_again=True),
    "distillation": MultiExit("uniform", distillation=0.5),
    "layer skip": LayerSkip(),
    "layer skip, gradual": LayerSkip(curriculum="gradual", max_layer_dropout=0.3),
    "sorted": SortedDepths((3,)),
    "shallow deep": ShallowDeep(3),
    "shallow deep, last": ShallowDeep(1, alignment="last"),
    "self-distillation": SelfDistillation(),
    "self-distillation, kl": SelfDistillation("kl"),
    "self-distillation, choice": SelfDistillation("choice"),
    "classifiers": ExitClassifiers(),
    "classifiers, unbalanced": ExitClassifiers(balanced=False),
    "classifiers, geometric": GeometricClassifiers(),
    "classifiers, relaxed": RelaxedClassifiers(3),
}
EXITS = EarlyExitConfig((1, 3, 5), ("norm", "linear", "shared"), ClassifierConfig("mlp", shared=False))


@made_once
def tiny(dropout: float = 0.0, early_exit: EarlyExitConfig = EXITS, seed: int = 0):
    return with_exits(tiny_stock(seed=seed, dtype=torch.float32, dropout_rate=dropout), early_exit)


def rows(count: int = 24) -> list[dict]:
    """A learnable task: the target is the source's first 2 to 7 tokens and an end token."""
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(4, VOCABULARY, (count, 8), generator=generator).tolist()
    return [
        {"input_ids": source, "attention_mask": [1] * 8, "labels": [*source[: 2 + row % 6], 1]}
        for row, source in enumerate(sources)
    ]


def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["labels"]) for row in batch)
    padded = [[*row["labels"], *[-100] * (longest - len(row["labels"]))] for row in batch]
    inputs = {name: torch.tensor([row[name] for row in batch]) for name in ("input_ids", "attention_mask")}
    return {**inputs, "labels": torch.tensor(padded)}


def arguments(folder, **changes) -> Seq2SeqTrainingArguments:
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Seq2SeqTrainingArguments(**(values | changes))


def make_trainer(model, folder, objective="linear", trainer_class=EarlyExitTrainer, **changes):
    options = {"objective": OBJECTIVES[objective]} if trainer_class is EarlyExitTrainer else {}
    data = {"train_dataset": rows(), "eval_dataset": rows()[:7], "data_collator": collate}
    return trainer_class(model=model, args=arguments(folder, **changes), **data, **options)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def state_of(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_weights(model, other) -> None:
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
