"""The same data give the same model: accumulated, resumed, checkpointed, in half precision, in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Seq2SeqTrainer, TrainerCallback

from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from tests.training.trainers import OBJECTIVES, assert_same_weights, losses, make_trainer, rows, tiny


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "layer skip, gradual"])
def test_accumulated_batches_are_one_batch(objective, tmp_path):
    """The loss is a mean over tokens, not a mean of batch means: rows have 3 to 8 labels.

    Uses SGD, because Adam amplifies rounding errors. Objectives with random layer dropout are not included, because
    different rows would be skipped.
    """
    whole, parts = tiny(), tiny()
    one = make_trainer(whole, tmp_path / "one", objective, max_steps=1, optim="sgd")
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    four = make_trainer(parts, tmp_path / "four", objective, max_steps=1, optim="sgd", **accumulated)
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


# Variants of an objective class that differ only in the loss; the state kept between steps is the same.
OTHER_LOSSES = {
    "uniform, last again",
    "layer skip",
    "shallow deep, last",
    "self-distillation, kl",
    "self-distillation, choice",
    "classifiers, unbalanced",
}


@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=[pytest.mark.slow] if name in OTHER_LOSSES else []) for name in OBJECTIVES],
)
def test_resumed_is_as_if_never_stopped(objective, tmp_path):
    """With dropout, across an epoch boundary; the `before_*` metrics are those of the first start."""
    straight, stopped = tiny(dropout=0.1), tiny(dropout=0.1)
    whole = make_trainer(straight, tmp_path / "straight", objective, max_steps=5)
    expected = whole.train().metrics
    half = make_trainer(stopped, tmp_path / "stopped", objective, max_steps=5, save_strategy="steps", save_steps=4)

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    half.add_callback(Stop())
    half.train()
    again = make_trainer(tiny(dropout=0.1, seed=1), tmp_path / "stopped", objective, max_steps=5)
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
def test_bf16_is_near_fp32(objective, tmp_path, monkeypatch):
    # Replace the classifiers' labels by ones that do not depend on rounding. Whether two layers agree depends on it
    # where two tokens are nearly equally likely, which is frequent in random models.
    monkeypatch.setattr(TeacherForcedExits, "agrees", lambda exits, layer: exits.labels % (layer + 1) == 0)
    full, half = make_trainer(tiny(), tmp_path, objective), make_trainer(tiny(), tmp_path, objective, bf16=True)
    full.train()
    half.train()
    assert losses(half)[0] == pytest.approx(losses(full)[0], rel=0.01) and losses(half)[0] != losses(full)[0]
    assert losses(half)[-1] < losses(half)[0]
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def one_process() -> dict:
    return trained()


def launch(launcher: list[str]) -> dict:
    """The output of `under_launch` when started with this launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, "-m", *launcher, __file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment | {"ACCELERATE_USE_CPU": "true"})
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.once
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--nproc-per-node", "2"], {2}),
        # On a CPU accelerate 1.15 always starts one process, except through MPI, or in GPU mode, which uses torchrun.
        pytest.param(["accelerate.commands.launch", "--cpu", "--num_processes", "2"], {1, 2}, marks=pytest.mark.slow),
        pytest.param(
            ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], {2}, marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_give_the_loss_of_one(one_process, launcher, processes):
    """For two steps, over batches whose rows have different lengths."""
    found = launch(launcher)
    assert found["processes"] in processes and one_process["processes"] == 1
    assert len(found["losses"]) == 2 and found["losses"] == pytest.approx(one_process["losses"], rel=1e-5)
    assert found["report"] == pytest.approx(one_process["report"], rel=1e-4, nan_ok=True)
    # Without token counts over processes, each takes the mean over its own tokens: nearly the same, not twice that.
    assert found["by_process"] == pytest.approx(one_process["by_process"], rel=0.2)


def under_launch() -> None:
    """The work of each launched process; the first one prints."""
    torch.set_num_threads(1)
    found = trained()
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found))


def trained() -> dict:
    """Losses and exit report of two steps. The batches of all processes together have 8 rows."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options = {"max_steps": 2, "per_device_train_batch_size": 8 // processes}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(tiny(), folder, **options)
        trainer.train()
        by_process = make_trainer(tiny(), folder, average_tokens_across_devices=False, **options)
        by_process.train()
        report = trainer.report_exits()
    return {
        "losses": losses(trainer),
        "by_process": losses(by_process),
        "report": report,
        "processes": processes,
    }


if __name__ == "__main__":
    under_launch()
