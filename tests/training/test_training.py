"""`EarlyExitTrainer` on a tiny model: what is trained, what stays in eval mode, and what is reported."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import GenerationConfig, TrainerCallback

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.data import hash_of_input
from hf_earlyexit.training.objectives import ExitClassifiers, MultiExit
from hf_earlyexit.training.trainer import EarlyExitTrainer
from tests import laws
from tests.tiny import tiny_inputs, tiny_pair, tiny_stock
from tests.training.trainers import OBJECTIVES, arguments, collate, losses, make_trainer, moved, rows, state_of, tiny


# Heads of inactive exit points; the one at layer 5 is the model's own.
IDLE = {
    "layer skip": (1,),
    "layer skip, gradual": (1,),
    "sorted": (1,),
    "shallow deep": (1,),
    "shallow deep, last": (3,),
}
# Ratio to the first losses: a cross-entropy cannot fall below the teacher's entropy, which is high here.
FALLS_TO = {"self-distillation": 0.985}


# --- trained parameters ---------------------------------------------------------------------------------------------


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
    """The flag is also correct if a completed run is resumed."""
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


# --- metrics, evaluation and checkpoints ----------------------------------------------------------------------------


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
    """Exit settings may be given as keywords or in a generation config."""
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


# --- refusals -------------------------------------------------------------------------------------------------------


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
    """Refused before anything is created."""
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


def test_what_a_checkpoint_has_seen_counts_after_resuming(tmp_path):
    """The data may be others by then."""
    model = tiny_pair("tied", 0, torch.float32)[1]
    model.record_seen("training", ["first"])
    make_trainer(model, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    for resumed in (True, str(tmp_path / "checkpoint-1")):
        again = tiny_pair("tied", 0, torch.float32)[1]
        again.record_seen("training", ["second"])
        make_trainer(again, tmp_path, max_steps=1).train(resume_from_checkpoint=resumed)
        assert again.seen_inputs.by == {"training": {hash_of_input("first"), hash_of_input("second")}}
    fresh = tiny_pair("tied", 0, torch.float32)[1]
    make_trainer(fresh, tmp_path / "fresh", max_steps=1).train()
    assert not fresh.seen_inputs
