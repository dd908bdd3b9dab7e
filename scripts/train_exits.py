"""Train the exits of a T5 with `EarlyExitTrainer`, and report the effect on full-depth quality.

A complete early-exit checkpoint takes two stages, each one run of this script. The first trains the whole model to
predict at every exit point; the second trains exit classifiers on the frozen result:

    python scripts/train_exits.py --model google-t5/t5-small --dataset cnn_dailymail --prefix "summarize: " \\
        --output_dir exits --objective multi_exit --exit_layers 2 4 --num_train_epochs 1
    python scripts/train_exits.py --model exits --dataset cnn_dailymail --prefix "summarize: " \\
        --output_dir exits-classified --objective classifiers --num_train_epochs 0.2

Several processes: `accelerate launch --multi_gpu --num_processes 2 scripts/train_exits.py ...`; on a CPU the same with
ACCELERATE_USE_CPU=true before it, or `torchrun --nproc-per-node 2 scripts/train_exits.py ... --use_cpu`.

`--resume` continues an interrupted run. All arguments of `Seq2SeqTrainingArguments` are accepted. The last line of
stdout is JSON.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from text_pairs import (
    DataArguments,
    HelpFormatter,
    RougeOfDistinctInputs,
    check_data,
    on_hub,
    own_outputs,
    read_texts,
    tokenize,
)
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.extras import require
from hf_earlyexit.common.failures import reading, refusals
from hf_earlyexit.common.output_files import refuse_folder_of_model
from hf_earlyexit.common.seen_inputs import TRAINING
from hf_earlyexit.common.tokenizer import load_tokenizer
from hf_earlyexit.exits.config import CLASSIFIER_KINDS, HEAD_KINDS
from hf_earlyexit.families.t5.configuration import early_exit_config
from hf_earlyexit.training.lora import add_lora, merge_lora
from hf_earlyexit.training.objectives import OBJECTIVES, Objective
from hf_earlyexit.training.objectives.layer_skip import CURRICULA, DROPOUT_SCHEDULES
from hf_earlyexit.training.objectives.multi_exit import WEIGHTS
from hf_earlyexit.training.objectives.self_distillation import TOWARDS
from hf_earlyexit.training.objectives.shallow_deep import ALIGNMENTS
from hf_earlyexit.training.trainer import EarlyExitTrainer


CLASSIFIER_SHAPE = ("classifier", "classifier_width", "classifier_per_layer")


@dataclass
class ModelArguments:
    """The model and its exits; defaults are the checkpoint's."""

    model: str = field(metadata={"help": "a T5 or early-exit checkpoint: a folder or a Hub id"})
    exit_layers: list[int] | None = field(
        default=None, metadata={"help": "layers with an exit point (the checkpoint's, or all but the last)"}
    )
    heads: str | None = field(default=None, metadata={"help": f"kind of the exit heads: {', '.join(HEAD_KINDS)}"})


@dataclass
class ObjectiveArguments:
    """The training objective. Options are those of the objective's class, with its defaults."""

    objective: str = field(default="multi_exit", metadata={"help": f"one of {', '.join(OBJECTIVES)}"})
    weights: str | None = field(default=None, metadata={"help": f"multi_exit: {' or '.join(WEIGHTS)}"})
    last_again: bool = field(default=False, metadata={"help": "multi_exit: add the last layer's loss once more"})
    distillation: float | None = field(
        default=None, metadata={"help": "multi_exit: share of an exit's loss towards the last layer's probabilities"}
    )
    e_scale: float | None = field(default=None, metadata={"help": "layer_skip: weight of exits, against the last"})
    curriculum: str | None = field(default=None, metadata={"help": f"layer_skip: {', '.join(CURRICULA)}"})
    rotation: int | None = field(default=None, metadata={"help": "layer_skip: every how many exits take part"})
    max_layer_dropout: float | None = field(default=None, metadata={"help": "layer_skip: rate of the last layer"})
    dropout_schedule: str | None = field(
        default=None, metadata={"help": f"layer_skip: {' or '.join(DROPOUT_SCHEDULES)}"}
    )
    depths: list[int] | None = field(default=None, metadata={"help": "sorted: exit points to train (all)"})
    shallow: int | None = field(default=None, metadata={"help": "shallow_deep: layers of the shallow model"})
    alpha: float | None = field(default=None, metadata={"help": "shallow_deep: weight of the distillation"})
    alignment: str | None = field(default=None, metadata={"help": f"shallow_deep: {', '.join(ALIGNMENTS)}"})
    towards: str | None = field(default=None, metadata={"help": f"self_distillation: {', '.join(TOWARDS)}"})
    top_k: int | None = field(default=None, metadata={"help": "relaxed_classifiers: choices that will do"})
    unbalanced: bool = field(default=False, metadata={"help": "classifiers: do not weigh the two labels alike"})
    classifier: str | None = field(
        default=None, metadata={"help": f"of all classifiers: {' or '.join(CLASSIFIER_KINDS)} (the checkpoint's)"}
    )
    classifier_width: int | None = field(default=None, metadata={"help": "of all classifiers: inner width of mlp"})
    classifier_per_layer: bool = field(default=False, metadata={"help": "of all classifiers: one for each exit point"})


@dataclass
class RunArguments:
    """The run itself."""

    lora_rank: int | None = field(
        default=None, metadata={"help": "train low-rank adapters of the blocks in place of their weights, then merge"}
    )
    own_outputs: bool = field(
        default=False, metadata={"help": "in place of the targets, learn from what the model writes at full depth"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in --output_dir, if any"})
    evaluate_exits: bool = field(default=False, metadata={"help": "report every exit in evaluations in between, too"})


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate every exit, save; the last line printed is JSON."""
    argv = sys.argv[1:] if argv is None else argv
    kinds = (ModelArguments, ObjectiveArguments, DataArguments, RunArguments, Seq2SeqTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=HelpFormatter)
    model_args, objective_args, data_args, run_args, training = parser.parse_args_into_dataclasses(argv)
    with refusals(parser.prog):
        objective = make_objective(objective_args)
        check_lora(run_args.lora_rank, objective)
        check_data(data_args)
        refuse_folder_of_model("--output_dir", training.output_dir, [model_args.model])
        config = exit_config(model_args, objective_args)
        texts = read_texts(data_args)
        with reading(model_args.model, "the model"):
            model = EarlyExitT5ForConditionalGeneration.from_pretrained(
                model_args.model, early_exit=config, dtype=torch.float32
            )
        tokenizer = load_tokenizer(model_args.model, model.config)
    model.record_seen(TRAINING, texts.sources)
    if run_args.lora_rank is not None:
        add_lora(model, run_args.lora_rank)
    if training.generation_max_length is None and model.generation_config.max_new_tokens is None:
        training.generation_max_length = data_args.max_target_tokens
    training.predict_with_generate = True
    if run_args.own_outputs:
        sources = list(dict.fromkeys(source for source, _ in texts.train))
        model.to(training.device)
        train_rows = own_outputs(model, tokenizer, sources, data_args, training.per_device_eval_batch_size)
    else:
        train_rows = tokenize(tokenizer, texts.train, data_args)
    validation_pairs = [(example.source, example.references[0]) for example in texts.validation]
    trainer = EarlyExitTrainer(
        model,
        training,
        objective=objective,
        evaluate_exits=run_args.evaluate_exits,
        command=shlex.join(["python", "scripts/train_exits.py", *argv]),
        train_dataset=train_rows,
        eval_dataset=tokenize(tokenizer, validation_pairs, data_args),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=RougeOfDistinctInputs(tokenizer, texts.validation),
    )
    metrics = {"validation_inputs": len(texts.validation), **train(trainer, run_args.resume)}
    if run_args.lora_rank is not None:
        merge_lora(model)
    save(trainer, finetuned_from=on_hub(model_args.model), dataset=on_hub(data_args.dataset))
    if trainer.is_world_process_zero():
        found = {name: None if math.isnan(value) else value for name, value in metrics.items()}
        result = {"output_dir": training.output_dir, "command": trainer.command, "left_out": texts.left_out}
        print(json.dumps({**result, "metrics": found}))


def make_objective(arguments: ObjectiveArguments) -> Objective:
    """The requested objective. An option of another objective raises `ValueError`."""
    if arguments.objective not in OBJECTIVES:
        raise ValueError(f"--objective must be one of {list(OBJECTIVES)}, got {arguments.objective!r}.")
    kind = OBJECTIVES[arguments.objective]
    own = {"unbalanced" if option.name == "balanced" else option.name for option in fields(kind) if option.repr}
    asked = {
        name: value
        for name, value in vars(arguments).items()
        if name != "objective" and value is not None and value is not False
    }
    if kind.trains_classifiers:
        asked = {name: value for name, value in asked.items() if name not in CLASSIFIER_SHAPE}
    if foreign := sorted(set(asked) - own):
        raise ValueError(f"--{foreign[0]} does not go with --objective {arguments.objective}.")
    return kind(**({"balanced": False} if asked.pop("unbalanced", False) else {}), **asked)


def check_lora(rank: int | None, objective: Objective) -> None:
    """Refuse an invalid rank, and adapters that the objective would not train."""
    if rank is None:
        return
    require("peft", "lora")
    if rank < 1:
        raise ValueError(f"--lora_rank must be a whole number from 1 on, got {rank}.")
    if not objective.moves("decoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight"):
        raise ValueError("--lora_rank does not go with this --objective, which moves no block of the model.")


def exit_config(arguments: ModelArguments, objective: ObjectiveArguments) -> EarlyExitConfig:
    """The requested exits, completed from the checkpoint's config."""
    checkpoint, _ = early_exit_config(arguments.model, None, {})
    own = EarlyExitConfig.from_dict(checkpoint.early_exit).for_layers(checkpoint.num_decoder_layers)
    values = own.to_dict()
    if arguments.exit_layers is not None and tuple(arguments.exit_layers) != own.exit_layers:
        values |= {"exit_layers": arguments.exit_layers, "heads": "shared"}
    if arguments.heads is not None:
        values["heads"] = arguments.heads
    asks = objective.classifier or objective.classifier_width or objective.classifier_per_layer
    if OBJECTIVES[objective.objective].trains_classifiers and (asks or own.classifier is None):
        per_layer, width = objective.classifier_per_layer, objective.classifier_width
        values["classifier"] = ClassifierConfig(objective.classifier or "linear", not per_layer, width)
    return EarlyExitConfig(**values).for_layers(checkpoint.num_decoder_layers)


def train(trainer: EarlyExitTrainer, resume: bool) -> dict[str, float]:
    """Train, evaluate with every token exiting at each exit point in turn, and return the metrics."""
    folder = trainer.args.output_dir
    checkpoint = get_last_checkpoint(folder) if resume and Path(folder).is_dir() else None
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    for layer in trainer.model.early_exit.exit_layers:
        prefix, always = f"always_{layer}", {"exit_criterion": "fixed", "exit_layer": layer}
        found = trainer.evaluate(metric_key_prefix=prefix, exits=False, **always)
        found.pop(f"{prefix}_loss")  # equals the last layer's loss
        metrics |= found
    return metrics


def save(trainer: EarlyExitTrainer, **card: str | None) -> None:
    """Save the model and its card, and upload them if `push_to_hub` is set."""
    trainer.save_state()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.save_model()
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
