"""`EarlyExitTrainer` on a tiny model: what moves, what rests, and that the same data give the same model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.objectives import (
    ExitClassifiers,
    GeometricClassifiers,
    LayerSkip,
    MultiExit,
    RelaxedClassifiers,
    SelfDistillation,
    ShallowDeep,
    SortedDepths,
)
from hf_earlyexit.training import EarlyExitTrainer
from tests import laws
from tests.tiny import VOCABULARY, tiny_inputs, tiny_stock, with_exits


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
# Heads at exit points that take no part; the one at layer 5 is the model's own.
IDLE = {
    "layer skip": (1,),
    "layer skip, gradual": (1,),
    "sorted": (1,),
    "shallow deep": (1,),
    "shallow deep, last": (3,),
}
EXITS = EarlyExitConfig((1, 3, 5), ("norm", "linear", "shared"), ClassifierConfig("mlp", shared=False))
# Of what it was: a cross-entropy cannot fall below the teacher's entropy, which is high here.
FALLS_TO = {"self-distillation": 0.985}


def tiny(dropout: float = 0.0, early_exit: EarlyExitConfig = EXITS, seed: int = 0):
    return with_exits(tiny_stock(seed=seed, dtype=torch.float32, dropout_rate=dropout), early_exit)


def rows(count: int = 24) -> list[dict]:
    """A task that can be learnt: the target is the source's first tokens, 2 to 7 of them, and an end."""
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


# --- what moves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_falls_and_only_the_intended_parameters_move(objective, tmp_path):
    model = tiny(dropout=0.1)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = state_of(model)
    trainer = make_trainer(model, tmp_path, objective, max_steps=30)
    trainer.train()
    falling = losses(trainer)
    assert sum(falling[-5:]) < FALLS_TO.get(objective, 0.9) * sum(falling[:5])
    idle = tuple(f"exit_heads.heads.{layer}." for layer in IDLE.get(objective, ()))
    expected = {name for name in before if OBJECTIVES[objective].moves(name) and not name.startswith(idle)}
    assert moved(before, model) == expected
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert model.early_exit.classifier.trained == OBJECTIVES[objective].trains_classifiers


def test_frozen_parts_rest_in_eval_mode_and_the_others_do_not(tmp_path):
    modes: dict[str, bool] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            modes.update({name: module.training for name, module in model.named_modules()})

    for objective in ("classifiers", "linear"):
        model = tiny(dropout=0.1)
        trainer = make_trainer(model, tmp_path, objective, max_steps=1)
        trainer.add_callback(Watch())
        trainer.train()
        dropouts = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        assert {modes[name] for name in dropouts} == {objective == "linear"}
        assert modes["exit_heads.classifiers.1"] == (objective == "classifiers")
        assert not model.training, "after the last evaluation"


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = tiny()
    model.encoder.requires_grad_(False)
    model.shared.requires_grad_(False)
    before = state_of(model)
    make_trainer(model, tmp_path, max_steps=2).train()
    changed = moved(before, model)
    assert changed and not any(name.startswith(("encoder.", "shared.", "lm_head.")) for name in changed)
    assert not model.encoder.final_layer_norm.weight.requires_grad


def test_flags_come_back_after_an_error(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = tiny()
    trainer = make_trainer(model, tmp_path, "classifiers")
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_checkpoints_in_between_say_whether_classifiers_are_trained(tmp_path):
    """Also when a run that had come to its end is taken up."""
    for objective in ("classifiers", "linear"):
        model, folder = tiny(), tmp_path / objective
        model.config.early_exit["classifier"]["trained"] = objective == "linear"
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        make_trainer(model, folder, objective, **saving).train()
        config = json.loads((folder / "checkpoint-1/config.json").read_text())
        assert config["early_exit"]["classifier"]["trained"] == (objective == "classifiers")
        again = make_trainer(tiny(seed=1), folder, objective, **saving)
        again.model.config.early_exit["classifier"]["trained"] = objective == "linear"
        again.train(resume_from_checkpoint=True)
        assert again.model.early_exit.classifier.trained == (objective == "classifiers")


def test_agreement_is_measured_before_training_unless_given(tmp_path):
    trainer = make_trainer(tiny(), tmp_path, "classifiers", max_steps=1)
    metrics = trainer.train().metrics
    agreement = trainer.running_objective.agreement
    assert agreement == tuple(metrics[f"before_exit_{layer}_agreement"] for layer in (1, 3, 5))
    with torch.no_grad():
        trainer.model.exit_heads.heads["3"].norm.weight.mul_(torch.linspace(-1, 1, 32))
    trainer.train()
    again = trainer.running_objective.agreement
    assert again[1] != agreement[1] and again[0] == agreement[0], "another training measures anew"
    given = ExitClassifiers(agreement=(0.1, 0.2, 0.3))
    trainer = make_trainer(tiny(), tmp_path, "classifiers", max_steps=1)
    trainer.objective = given
    trainer.train()
    assert trainer.running_objective == given


def test_training_the_model_makes_its_classifiers_untrained(tmp_path):
    model = tiny()
    model.config.early_exit["classifier"]["trained"] = True
    make_trainer(model, tmp_path, max_steps=1).train()
    assert not model.early_exit.classifier.trained


# --- the same data give the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "layer skip, gradual"])
def test_accumulated_batches_are_one_batch(objective, tmp_path):
    """Rows have 3 to 8 labels, so a mean of means would not do. By SGD, since Adam blows rounding up. (Where layers
    are left out at random, the same rows are not left out.)"""
    whole, parts = tiny(), tiny()
    one = make_trainer(whole, tmp_path / "one", objective, max_steps=3, optim="sgd")
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = make_trainer(parts, tmp_path / "four", objective, max_steps=3, optim="sgd", **accumulated)
    one.train()
    four.train()
    assert losses(one) == pytest.approx(losses(four), rel=1e-5)
    assert_same_weights(whole, parts)


def test_stock_trainer_accumulates_as_it_should(tmp_path):
    """`accepts_loss_kwargs`: the library divides by the number of accumulated batches, since T5's loss does not."""
    data = [row for row in rows(48) if len(row["labels"]) == 5]
    found = []
    for size, steps in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(tiny(), tmp_path, trainer_class=Seq2SeqTrainer, **changes)
        trainer.train_dataset = data
        trainer.train()
        found.append(losses(trainer)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_is_as_if_never_stopped(objective, tmp_path):
    """With dropout, over the end of an epoch; full depth before is that of the first start."""
    straight, stopped = tiny(dropout=0.1), tiny(dropout=0.1)
    whole = make_trainer(straight, tmp_path / "straight", objective, max_steps=7)
    expected = whole.train().metrics
    half = make_trainer(stopped, tmp_path / "stopped", objective, max_steps=7, save_strategy="steps", save_steps=4)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    half.add_callback(Stop())
    half.train()
    again = make_trainer(tiny(dropout=0.1, seed=1), tmp_path / "stopped", objective, max_steps=7)
    metrics = again.train(resume_from_checkpoint=True).metrics
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    assert_same_weights(again.model, straight)
    names = [name for name in expected if name.endswith("_loss") and "train" not in name]
    assert {name.partition("_")[0] for name in names} == {"before", "after"}
    assert [metrics[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-5)
    full_depth_moves = metrics["before_loss"] != pytest.approx(metrics["after_loss"], rel=1e-3)
    assert full_depth_moves == OBJECTIVES[objective].moves("shared.weight")


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = tiny(dropout=0.1), tiny(dropout=0.1)
    make_trainer(plain, tmp_path, max_steps=3).train()
    trainer = make_trainer(checkpointed, tmp_path, max_steps=3, gradient_checkpointing=True)
    trainer.train()
    assert checkpointed.is_gradient_checkpointing
    assert_same_weights(plain, checkpointed)


@pytest.mark.parametrize("objective", ("linear", "distillation", "classifiers", "layer skip, gradual", "shallow deep"))
def test_bf16_is_near_fp32(objective, tmp_path):
    full, half = make_trainer(tiny(), tmp_path, objective), make_trainer(tiny(), tmp_path, objective, bf16=True)
    full.train()
    half.train()
    assert losses(half)[0] == pytest.approx(losses(full)[0], rel=0.01) and losses(half)[0] != losses(full)[0]
    assert losses(half)[-1] < losses(half)[0]
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def one_process() -> dict:
    return launch(["accelerate.commands.launch", "--cpu", "--num_processes", "1"])


def launch(launcher: list[str]) -> dict:
    """What `under_launch` prints when it is started so."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", *launcher, __file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        # On a CPU accelerate 1.15 starts one process whatever it is told, unless through MPI; torchrun starts two.
        (["accelerate.commands.launch", "--cpu", "--num_processes", "2"], {1, 2}),
        (["torch.distributed.run", "--nproc-per-node", "2"], {2}),
        (["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], {2}),
    ],
)
def test_two_processes_give_the_loss_of_one(one_process, launcher, processes):
    """For two steps, over batches whose rows are of uneven lengths."""
    found = launch(launcher)
    assert found["processes"] in processes and one_process["processes"] == 1
    assert len(found["losses"]) == 2 and found["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
    assert found["report"] == pytest.approx(one_process["report"], rel=1e-4, nan_ok=True)
    # Where tokens are not counted over processes, each takes the mean over its own: nearly the same, not twice that.
    assert found["by_process"] == pytest.approx(one_process["by_process"], rel=0.2)


# --- what it says ---------------------------------------------------------------------------------------------------


def test_labels_survive(tmp_path):
    trainer = make_trainer(tiny(), tmp_path)
    assert trainer.label_names == ["labels"]
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_before_and_after_is_the_last_layers_loss(tmp_path):
    model = tiny()
    stock_loss = model(**collate(rows()[:7])).loss.item()
    trainer = make_trainer(model, tmp_path, max_steps=3)
    metrics = trainer.train().metrics
    assert metrics["before_loss"] == pytest.approx(stock_loss, rel=1e-5)
    assert metrics["after_loss"] == pytest.approx(model(**collate(rows()[:7])).loss.item(), rel=1e-5)
    assert metrics["after_loss"] < metrics["before_loss"]
    assert metrics["after_exit_1_loss"] < metrics["before_exit_1_loss"]
    assert metrics["after_exit_6_loss"] == pytest.approx(metrics["after_loss"], rel=0.05), (
        "means of tokens and of rows"
    )
    assert not any("exit" in name for name in trainer.evaluate())
    assert trainer.evaluate(exits=True)["eval_exit_1_loss"] == pytest.approx(metrics["after_exit_1_loss"])


def test_evaluation_is_at_full_depth_unless_asked(tmp_path):
    model = tiny()
    for name, value in {"exit_criterion": "fixed", "exit_layer": 1, "max_new_tokens": 5}.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config.to_dict()
    seen = []
    trainer = make_trainer(model, tmp_path, predict_with_generate=True, per_device_eval_batch_size=7)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions.tolist()) or {}
    trainer.evaluate()
    trainer.evaluate(exit_criterion="fixed", exit_layer=3)
    batch = {name: tensor for name, tensor in collate(rows()[:7]).items() if name != "labels"}
    direct = [model.generate(**batch, early_exit=False), model.generate(**batch, exit_criterion="fixed", exit_layer=3)]
    assert seen[0] != seen[1]
    for found, expected in zip(seen, direct):
        assert [row[: expected.shape[1]] for row in found] == expected.tolist()
    assert model.generation_config.to_dict() == kept


def test_predictions_are_at_full_depth_unless_asked(tmp_path):
    """By keywords or by a generation config."""
    model = tiny()
    model.generation_config.exit_criterion, model.generation_config.exit_layer = "fixed", 1
    trainer = make_trainer(model, tmp_path, predict_with_generate=True, generation_max_length=6)
    asked = GenerationConfig(exit_criterion="fixed", exit_layer=1, max_length=6)
    full, by_keyword, by_config = (
        trainer.predict(rows()[:7], **options).predictions.tolist()
        for options in ({}, {"exit_criterion": "fixed", "exit_layer": 1}, {"generation_config": asked})
    )
    assert full != by_keyword == by_config


def test_texts_stay_in_order_and_evaluations_in_between_are_as_told(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    for exits in (False, True):
        trainer = make_trainer(tiny(), tmp_path, **options)
        trainer.evaluate_exits = exits
        trainer.train()
        assert any("eval_exit_1_loss" in entry for entry in trainer.state.log_history) == exits
    trainer.args.train_sampling_strategy = "group_by_length"
    assert list(trainer._get_eval_sampler(trainer.eval_dataset)) == list(range(7))


def test_decoder_inputs_that_are_given_are_used():
    model, batch = tiny(), collate(rows()[:4])
    ids = torch.full_like(batch["labels"], 5)
    loss = MultiExit().token_losses
    given = model(**batch, decoder_input_ids=ids, exit_objective=loss).loss
    assert not torch.equal(given, model(**batch, exit_objective=loss).loss)


def test_precision_and_recall_are_the_classifiers(tmp_path):
    trainer = make_trainer(tiny(), tmp_path, "classifiers", max_steps=20)
    metrics = trainer.train().metrics
    model, batch = trainer.model, collate(rows()[:7])
    states = model(**batch, output_hidden_states=True)
    mask = batch["labels"] != -100
    last = states.logits.argmax(-1)[mask]
    for layer in (1, 3, 5):
        hidden = states.decoder_hidden_states[layer][mask]
        agrees = model.lm_head(model.exit_head_input(layer, hidden)).argmax(-1) == last
        leaves = model.exit_heads.exit_probability(layer, hidden) >= 0.5
        both = (agrees & leaves).sum().item()
        assert metrics[f"after_exit_{layer}_recall"] == pytest.approx(both / agrees.sum().item())
        assert metrics[f"after_exit_{layer}_precision"] == pytest.approx(
            both / max(1, leaves.sum().item()), nan_ok=True
        )
        assert metrics[f"after_exit_{layer}_agreement"] == pytest.approx(agrees.float().mean().item())


def test_a_saved_run_reloads_to_the_same_tokens_and_exits(tmp_path):
    make_trainer(model := tiny(), tmp_path, max_steps=4).train()
    trainer = make_trainer(model, tmp_path, "classifiers", max_steps=10)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    options = {"exit_criterion": "classifier", "exit_threshold": 0.6}
    mine, theirs = (laws.generate(one, tiny_inputs(5), **options) for one in (model, again))
    assert torch.equal(mine.sequences, theirs.sequences) and torch.equal(mine.layers_run, theirs.layers_run)
    assert len(set(mine.layers_run.unique().tolist()) - {0}) >= 2
    assert not list((tmp_path / "saved").glob("pytorch_model*"))


def test_the_card_has_the_newest_figures_and_the_run(tmp_path):
    trainer = make_trainer(tiny(), tmp_path, max_steps=2)
    trainer.command = "python train.py --it"
    metrics = trainer.train().metrics
    trainer.log({"after_exit_1_loss": 9.0})
    trainer.create_model_card(language="en", dataset="e2e_nlg", tags="mine")
    text = (tmp_path / "README.md").read_text()
    assert "| 1 | 9.000 |" in text and f"| 3 | {metrics['after_exit_3_loss']:.3f} |" in text
    assert f"nats per token | {metrics['before_exit_6_loss']:.3f} | {metrics['after_exit_6_loss']:.3f} |" in text
    assert "MultiExit(weights='linear'" in text and "2 steps of 8 rows" in text and "python train.py --it" in text
    assert "learning rate 0.01 (constant), fp32" in text and "OptimizerNames" not in text
    head = ModelCard(text).data
    assert (head.language, head.datasets, "mine" in head.tags) == ("en", "e2e_nlg", True)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_dataset": None}, "eval_dataset.*NoneType.*full depth is evaluated before and after"),
        ({"eval_dataset": {"a": rows()}}, "eval_dataset.*one data set, got dict"),
        ({"model": tiny_stock(dtype=torch.float32)}, "early-exit model, got `T5ForConditionalGeneration`"),
        ({"model_init": tiny}, "`model_init` does not go with `objective`"),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, "`compute_loss_func` does not go"),
        ({"args": {"label_smoothing_factor": 0.1}}, "`label_smoothing_factor=0.1` is not supported"),
        ({"args": {"bf16_full_eval": True}}, "`bf16_full_eval=True` is not supported"),
        ({"model": tiny(early_exit=EarlyExitConfig((2,))), "objective": ExitClassifiers()}, "no exit classifiers"),
        ({"objective": ExitClassifiers(agreement=(0.5,))}, "`agreement` has 1 shares for 3 exit points"),
    ],
)
def test_refusals(changes, message, tmp_path):
    """Before anything is made."""
    changes = {**changes, "args": arguments(tmp_path / "out", **changes.get("args", {}))}
    values = {"model": tiny(), "objective": MultiExit(), "train_dataset": rows(), "eval_dataset": rows()}
    with pytest.raises(ValueError, match=message):
        EarlyExitTrainer(**(values | changes))
    assert not (tmp_path / "out").exists()


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="One process with 2 GPUs: .*accelerate launch"):
        EarlyExitTrainer(tiny(), args, objective=MultiExit(), train_dataset=rows(), eval_dataset=rows())


def test_nothing_left_to_train_is_refused(tmp_path):
    model = tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing is left to train"):
        make_trainer(model, tmp_path).train()


def test_an_objective_needs_labels():
    with pytest.raises(ValueError, match="exit_objective.*labels"):
        tiny()(input_ids=torch.ones(1, 3, dtype=torch.long), exit_objective=MultiExit().token_losses)


def under_launch() -> None:
    """What each process of a launch does; the first one prints. Batches of all processes together are of 8 rows."""
    import tempfile

    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {"max_steps": 2, "per_device_train_batch_size": 8 // processes}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(tiny(), folder, **options)
        trainer.train()
        by_process = make_trainer(tiny(), folder, average_tokens_across_devices=False, **options)
        by_process.train()
        found = {"losses": losses(trainer), "by_process": losses(by_process), "report": trainer.report_exits()}
        if trainer.is_world_process_zero():
            print(json.dumps({**found, "processes": processes}))


if __name__ == "__main__":
    under_launch()
