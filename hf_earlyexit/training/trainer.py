"""Trains exits with the library's `Seq2SeqTrainer`: freezing, the loss of a step, full depth before and after.

The loss is an objective (`objectives`), which this module treats as opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData
from torch import nn
from transformers import Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.training.exit_report import CountExits, summarize
from hf_earlyexit.training.layer_dropout import LayerDropout, layer_dropout
from hf_earlyexit.training.model_card import TrainedExits, make_card
from hf_earlyexit.training.objectives import Objective
from hf_earlyexit.training.text_trainer import TextTrainer


BEFORE, AFTER = "before", "after"


class EarlyExitTrainer(TextTrainer):
    """A `Seq2SeqTrainer` for exits, with an objective as additional argument.

    The loss of a step is the mean over all its tokens, for any number of accumulated batches and of processes.
    Parameters that the objective does not train are frozen during training, and their modules stay in `eval()`.
    Evaluation is of the last layer, at full depth: `eval_loss` is its cross-entropy, and `predict_with_generate`
    generates with `early_exit=False`. Full depth and every exit are always evaluated before the first step and after
    the last one: metrics `before_*` and `after_*`, in the log and in the result of `train`. A resumed run keeps the
    `before_*` metrics of its first start.

    Args:
        model: An early-exit model.
        args: `Seq2SeqTrainingArguments`.
        objective: The training objective, see `hf_earlyexit.training.objectives`.
        evaluate_exits: Whether evaluations during training report every exit, too (see `evaluate`).
        command: The shell command that runs this training, for the model card.
        kwargs: As for `Seq2SeqTrainer`. An `eval_dataset` is needed.

    Raises:
        ValueError: There is no `eval_dataset`, the model cannot be trained with the objective, one process has several
            GPUs, or an argument is given that this trainer would have to ignore.
    """

    def __init__(
        self,
        model: EarlyExitT5ForConditionalGeneration,
        args: Seq2SeqTrainingArguments | None = None,
        *,
        objective: Objective,
        evaluate_exits: bool = False,
        command: str = "",
        **kwargs,
    ):
        _check(model, args, objective, kwargs)
        super().__init__(model, args, **kwargs)
        if self.args.ddp_find_unused_parameters is None:
            # Heads that are not active in a step and blocks that all rows of a process skip have no gradients. With
            # gradient checkpointing the library would not search for such parameters.
            self.args.ddp_find_unused_parameters = True
        if self.args.n_gpu > 1:
            raise ValueError(f"One process with {self.args.n_gpu} GPUs: start one per GPU with `accelerate launch`.")
        self.objective, self.evaluate_exits, self.command = objective, evaluate_exits, command
        # Makes the library count the tokens of accumulated batches and of all processes for `compute_loss`.
        self.model_accepts_loss_kwargs = True
        self.running_objective = objective  # replaced by the prepared objective when training begins
        self._resting: list[nn.Module] = []
        self._dropout = LayerDropout()
        self.add_callback(_AroundTraining(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        """As the library's; the returned metrics include full depth before and after.

        Inputs that a checkpoint records as seen count as seen by the model that resumes from it.

        Raises:
            ValueError: Nothing is left to train: all parameters that the objective trains are frozen.
        """
        resumed = resume_from_checkpoint or None
        if resumed is True:
            resumed = get_last_checkpoint(self.args.output_dir)
        self.model.seen_inputs = self.model.seen_inputs.with_those_of(resumed)
        blocks = self.model.decoder.block
        with only_moving(self.model, self.objective.moves) as self._resting, layer_dropout(blocks) as self._dropout:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        after = self.evaluate(metric_key_prefix=AFTER, exits=True)
        return output._replace(metrics={**output.metrics, **self.measured(BEFORE), **after})

    def measured(self, prefix: str) -> dict[str, float]:
        """The last evaluation with this prefix, from the log, which checkpoints contain; empty if there was none."""
        logged = (item for entry in self.state.log_history for item in entry.items())
        return {name: value for name, value in logged if name.startswith(f"{prefix}_")}

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **kwargs,
    ) -> None:
        """Write `README.md` into the output folder: measurements, usage, and how to reproduce the training.

        Args:
            finetuned_from: The base model, if it is on the Hub.
            kwargs: As for the library's; not used.
        """
        if not self.is_world_process_zero():
            return
        tags = [tags] if isinstance(tags, str) else tags
        data = ModelCardData(
            language=language, license=license, tags=tags, base_model=finetuned_from, datasets=dataset
        )
        name = model_name or Path(self.args.output_dir).name
        trained = TrainedExits(
            name,
            self.hub_model_id or name,
            self.model.early_exit,
            self.model.config.num_decoder_layers,
            {key: value for entry in self.state.log_history for key, value in entry.items()},
            self._how_it_was_trained(),
        )
        make_card(trained, data).save(Path(self.args.output_dir) / "README.md")

    def _how_it_was_trained(self) -> str:
        args, accumulated = self.args, self.args.gradient_accumulation_steps
        rows = args.train_batch_size * accumulated * args.world_size
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        text = (
            f"`EarlyExitTrainer` with `{self.objective}`, {self.state.global_step} steps of {rows} rows, "
            f"{self.state.epoch:.2f} epochs, processes: {args.world_size}, {args.optim.value} with learning rate "
            f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), {precision}; transformers "
            f"{transformers.__version__}, torch {torch.__version__}."
        )
        return f"{text}\n\n```bash\n{self.command}\n```" if self.command else text

    def evaluate(
        self,
        eval_dataset=None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        exits: bool | None = None,
        **gen_kwargs,
    ) -> dict[str, float]:
        """As the library's, at full depth unless `gen_kwargs` has exit settings.

        Args:
            exits: Also report every exit point under teacher forcing, such as `eval_exit_2_loss`. The metrics are
                described in `hf_earlyexit.training.exit_report.summarize`. None: the trainer's `evaluate_exits`.
        """
        gen_kwargs = _at_full_depth_unless_asked(gen_kwargs)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)
        if self.evaluate_exits if exits is None else exits:
            report = {f"{metric_key_prefix}_{name}": value for name, value in self.report_exits(eval_dataset).items()}
            self.log(report)
            metrics |= report
        return metrics

    def predict(
        self, test_dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test", **gen_kwargs
    ):
        """As the library's, at full depth unless `gen_kwargs` has exit settings."""
        return super().predict(test_dataset, ignore_keys, metric_key_prefix, **_at_full_depth_unless_asked(gen_kwargs))

    def evaluation_loop(self, *args, **kwargs):
        """As the library's, but drops the rows that processes repeat to fill their last batch."""
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def report_exits(self, dataset=None) -> dict[str, float]:
        """The metrics of every exit point under teacher forcing, such as `exit_2_loss`."""
        self.model.eval()
        count, total = CountExits(self.model.early_exit), 0
        for inputs in self.get_eval_dataloader(dataset):
            counts = self.model(**self._prepare_inputs(inputs), exit_objective=count).loss
            total = total + self.accelerator.gather_for_metrics(counts).double().sum(dim=0)
        return summarize(total, self.model.early_exit, self.model.config.num_decoder_layers)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        """In training, the objective's mean over the tokens of a step; in evaluation, the last layer's loss."""
        if not self.model.training:
            output = model(**inputs)
            return (output.loss, output) if return_outputs else output.loss
        for module in self._resting:
            module.eval()
        objective = self.running_objective.at(self.state.global_step, self.state.max_steps)
        self._dropout.rates = objective.layer_dropout(self.model.config.num_decoder_layers)
        losses = model(**inputs, exit_objective=objective.token_losses).loss
        if num_items_in_batch is None:
            return losses.mean()
        # Gradients are averaged over the processes, while `num_items_in_batch` counts the tokens of all of them.
        shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() * shares / num_items_in_batch


def _check(model: Any, args: Seq2SeqTrainingArguments | None, objective: Objective, kwargs: dict[str, Any]) -> None:
    """Refuse models that cannot be trained and arguments that would be ignored, before anything is created."""
    if not isinstance(model, EarlyExitT5ForConditionalGeneration):
        raise ValueError(f"`model` must be an early-exit model, got `{type(model).__name__}`.")
    data = kwargs.get("eval_dataset")
    if data is None or isinstance(data, dict):
        raise ValueError(
            f"`eval_dataset` must be one data set, got {type(data).__name__}: full depth is evaluated before and "
            "after training, so pass one."
        )
    for name in ("model_init", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` does not go with `objective`: leave it out.")
    for name in ("label_smoothing_factor", "bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name, None):
            raise ValueError(f"`{name}={getattr(args, name)}` is not supported: leave it out.")
    objective.check(model.early_exit)


def _at_full_depth_unless_asked(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `generate`, with `early_exit=False` added if they have no exit settings."""
    config, names = gen_kwargs.get("generation_config"), ExitSettings.names()
    asked = set(names) & set(gen_kwargs) or any(getattr(config, name, None) is not None for name in names)
    return gen_kwargs if asked else {**gen_kwargs, "early_exit": False}


@contextmanager
def only_moving(model: nn.Module, moves: Callable[[str], bool]) -> Iterator[list[nn.Module]]:
    """Freeze the parameters that are not trained, and yield the modules that have only frozen parameters.

    Raises:
        ValueError: No parameter is left to train.
    """
    frozen = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and not moves(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("Nothing is left to train: every parameter that the objective moves is frozen.")
        yield list(_frozen_modules(model))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have parameters, all of them frozen."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield child
        else:
            yield from _frozen_modules(child)


class _AroundTraining(TrainerCallback):
    """Measures full depth before the first step, and keeps the classifiers' `trained` flag in the config correct."""

    def __init__(self, trainer: EarlyExitTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        if not trainer.measured(BEFORE):
            trainer.evaluate(metric_key_prefix=BEFORE, exits=True)
        elif state.global_step:
            self._keep_classifiers_true()
        before, layers = trainer.measured(BEFORE), trainer.model.early_exit.exit_layers
        agreement = {layer: before[f"{BEFORE}_exit_{layer}_agreement"] for layer in layers}
        trainer.running_objective = trainer.objective.prepared(agreement)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._keep_classifiers_true()

    def _keep_classifiers_true(self) -> None:
        classifier = self.trainer.model.config.early_exit["classifier"]
        if classifier is not None:
            classifier["trained"] = self.trainer.objective.trains_classifiers
