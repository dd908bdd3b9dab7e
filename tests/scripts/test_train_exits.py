"""`scripts/train_exits.py` end to end on a tiny model: both stages, resuming, uploading, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, HfArgumentParser, T5ForConditionalGeneration

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.families.shipped import CHECKPOINT
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
from tests.common.test_data import write
from tests.families import hub_stub
from tests.scripts import Ran, run_script
from tests.tiny import NUM_LAYERS, tiny_config


SCRIPT = Path(__file__).parent.parent.parent / "scripts/train_exits.py"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "goes", "home"]
QUICK = "--max_steps 2 --per_device_train_batch_size 4 --learning_rate 1e-2 --report_to none --use_cpu"
QUICK += " --validation_parts explore select calibrate report"


def articles(count: int, start: int = 0) -> list[dict]:
    """Rows with CNN/DailyMail's schema; the last two have the same article."""
    texts = [" ".join(WORDS[(row + place) % 12] for place in range(6)) for row in range(start, start + count - 1)]
    rows = [{"article": text, "highlights": text[:12], "id": str(number)} for number, text in enumerate(texts)]
    return [*rows, {**rows[-1], "highlights": "the fox"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder of a tiny plain T5 with the shipped tokenizer, and of a data set as a folder and as files."""
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=8000, eos_token_id=1, pad_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "bare")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder / "plain")
    (folder / "cnn_dailymail").mkdir()
    for split, rows in {"train": articles(12), "validation": articles(6, start=5)}.items():
        write(folder / "cnn_dailymail" / f"{split}.jsonl", rows)
        write(folder / f"{split}.csv", rows)
    return folder


def run(folder: Path, *options: str) -> Ran:
    return run_script(SCRIPT.name, *QUICK.split(), "--max_target_tokens", "8", *options, cwd=folder)


def start(folder: Path, *options: str, launcher: tuple = (), **environment: str) -> subprocess.CompletedProcess:
    """Run the script in its own processes."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent), **environment}
    command = [sys.executable, *launcher, str(SCRIPT), *QUICK.split(), "--max_target_tokens", "8", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=variables)


def result(ran: Ran | subprocess.CompletedProcess) -> dict:
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first_stage(folder) -> dict:
    options = (
        "--model plain --dataset cnn_dailymail --output_dir exits --exit_layers 2 4 --heads norm --weights uniform"
    )
    return result(run(folder, *options.split(), "--prefix", "summarize: ", "--save_steps", "1"))


def test_the_first_stage_says_what_it_measured_and_saves(first_stage, folder):
    metrics = first_stage["metrics"]
    assert {"before_loss", "after_loss", "before_rougeL", "after_rougeL", "always_2_rougeL", "always_4_rougeL"} <= set(
        metrics
    )
    assert metrics["after_exit_2_loss"] < metrics["before_exit_2_loss"]
    assert metrics["validation_inputs"] == 5 and "always_2_loss" not in metrics, "six rows"
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "exits")
    assert model.early_exit == EarlyExitConfig((2, 4), ("norm", "norm"))
    read = {Example(f"summarize: {row['article']}") for row in (*articles(12), *articles(6, start=5))}
    assert model.seen_inputs.by == {"training": {short_hash(one) for one in read}} and first_stage["left_out"] == 0
    assert model.generation_config.max_new_tokens is None, "what was set to evaluate is not what was saved"
    assert json.loads((folder / "exits/tokenizer.json").read_text())["truncation"] is None
    card = (folder / "exits/README.md").read_text()
    assert "after layer 2, 4 of 6" in card and f"| 2 | {metrics['after_exit_2_loss']:.3f} |" in card
    assert f"| ROUGE-L | {100 * metrics['before_rougeL']:.2f} | {100 * metrics['after_rougeL']:.2f} |" in card
    assert "python scripts/train_exits.py" in card and "--prefix 'summarize: '" in card
    assert ModelCard(card).data.library_name == "hf_earlyexit"


def test_distinct_inputs_are_evaluated_against_all_their_references(folder):
    """The best of two references counts."""
    sys.path.insert(0, str(SCRIPT.parent))
    from text_pairs import Example, RougeOfDistinctInputs

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ids = tokenizer(["the fox", "a dog"], padding=True, return_tensors="np").input_ids
    examples = [Example("x", ("a dog", "the fox")), Example("y", ("the fox",))]
    prediction = type("Prediction", (), {"predictions": ids})()
    assert RougeOfDistinctInputs(tokenizer, examples)(prediction)["rougeL"] == pytest.approx(0.5)


def test_a_run_that_was_cut_off_goes_on(first_stage, folder):
    """A run resumed from the checkpoint of step 1 ends with the same losses."""
    options = (
        "--model plain --dataset cnn_dailymail --output_dir exits --exit_layers 2 4 --heads norm --weights uniform"
    )
    last = folder / "exits/checkpoint-2"
    last.rename(folder / "moved")
    again = result(run(folder, *options.split(), "--prefix", "summarize: ", "--save_steps", "1", "--resume"))
    same = [name for name in first_stage["metrics"] if "loss" in name and name != "train_loss"]
    assert len(same) > 6
    assert [again["metrics"][name] for name in same] == pytest.approx([first_stage["metrics"][name] for name in same])


def test_the_second_stage_trains_classifiers_and_uploads(first_stage, folder):
    """Classifiers are trained from files and uploaded to a Hub with the card; other weights are unchanged."""
    options = "--model exits --train_file train.csv --validation_file validation.csv --output_dir classified"
    options += " --objective classifiers --classifier mlp --classifier_per_layer --push_to_hub --hub_model_id some/one"
    options += " --exit_layers 2 4"  # repeated, which must not reset the first stage's heads
    with hub_stub.running_hub() as hub:
        metrics = result(start(folder, *options.split(), **hub.environment(str(folder / "home"))))["metrics"]
        files = {name: file.content for name, file in hub.commit_of("some/one", "main")[1].items()}
    assert 0 <= metrics["after_exit_2_recall"] <= 1
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert (
        "classifier: precision" in files["README.md"].decode()
        and 'from_pretrained("some/one")' in files["README.md"].decode()
    )
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "classified")
    assert model.early_exit.classifier.trained and model.early_exit.classifier.kind == "mlp"
    before = EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "exits").state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.once
def test_two_processes_evaluate_every_input_once(folder):
    """On five inputs, one process and two measure the same before training."""
    files = ("--train_file", "train.csv", "--validation_file", "validation.csv")
    options = ("--model", "plain", *files, "--exit_layers", "2", "--output_dir")
    alone = result(run(folder, *options, "alone"))["metrics"]
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    together = result(start(folder, *options, "together", launcher=launcher))["metrics"]
    names = [name for name in alone if name.startswith("before_") and ("exit" in name or "rouge" in name)]
    assert len(names) > 4
    assert [together[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-4)


def test_a_second_run_keeps_the_classifiers_it_is_not_told_to_change(first_stage, folder):
    sys.path.insert(0, str(SCRIPT.parent))
    from train_exits import ModelArguments, ObjectiveArguments, exit_config

    per_layer = ObjectiveArguments(objective="classifiers", classifier="mlp", classifier_per_layer=True)
    made = exit_config(ModelArguments(str(folder / "exits")), per_layer)
    assert made.heads == ("norm", "norm") and (made.classifier.kind, made.classifier.shared) == ("mlp", False)
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "exits", early_exit=made)
    model.save_pretrained(folder / "own")
    kept = exit_config(ModelArguments(str(folder / "own")), ObjectiveArguments(objective="classifiers"))
    assert kept.classifier == made.classifier
    changed = exit_config(ModelArguments(str(folder / "own"), exit_layers=[3]), ObjectiveArguments())
    assert changed.exit_layers == (3,) and changed.heads == ("shared",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--weights uniform --last_again --distillation 0.5", MultiExit("uniform", True, 0.5)),
        (
            "--objective layer_skip --e_scale 0.2 --curriculum gradual --max_layer_dropout 0.1",
            LayerSkip(0.2, "gradual", max_layer_dropout=0.1),
        ),
        ("--objective sorted --depths 2 4", SortedDepths((2, 4))),
        ("--objective shallow_deep --shallow 2 --alpha 0 --alignment last", ShallowDeep(2, 0.0, "last")),
        ("--objective self_distillation --towards kl", SelfDistillation("kl")),
        ("--objective classifiers --unbalanced --classifier mlp", ExitClassifiers(balanced=False)),
        ("--objective geometric_classifiers --classifier_per_layer", GeometricClassifiers()),
        ("--objective relaxed_classifiers --top_k 3", RelaxedClassifiers(3)),
    ],
)
def test_every_objective_and_its_options_from_the_shell(options, expected):
    sys.path.insert(0, str(SCRIPT.parent))
    from train_exits import ObjectiveArguments, make_objective

    arguments = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(options.split())[0]
    assert make_objective(arguments) == expected


def test_options_of_another_objective_are_refused():
    sys.path.insert(0, str(SCRIPT.parent))
    from train_exits import ObjectiveArguments, make_objective

    for values, foreign in (
        ({"objective": "sorted", "alpha": 0.0}, "alpha"),
        ({"objective": "geometric_classifiers", "unbalanced": True}, "unbalanced"),
        ({"objective": "layer_skip", "classifier": "mlp"}, "classifier"),
    ):
        with pytest.raises(ValueError, match=f"--{foreign} does not go with --objective {values['objective']}"):
            make_objective(ObjectiveArguments(**values))


def test_heads_learn_from_what_the_model_writes(folder):
    """With `--own_outputs` the heads do not depend on the targets, and full depth is unchanged."""
    options = (
        "--model plain --output_dir {} --exit_layers 2 4 --heads linear --objective self_distillation --own_outputs"
    )
    objective = ("--objective", "self_distillation")
    other = [{**row, "highlights": "home"} for row in articles(12)]
    write(folder / "other.jsonl", other)
    found = []
    for name, train in (("first", "train.csv"), ("second", "other.jsonl")):
        files = ["--train_file", train, "--validation_file", "validation.csv"]
        found.append(result(run(folder, *options.format(name).split(), *objective, *files))["metrics"])
    assert found[0]["after_exit_2_loss"] == found[1]["after_exit_2_loss"] != found[0]["before_exit_2_loss"]
    assert found[0]["after_loss"] == found[0]["before_loss"]


def test_adapters_are_merged_before_saving(folder):
    options = "--model plain --dataset cnn_dailymail --output_dir adapted --exit_layers 2 4 --heads norm --lora_rank 2"
    metrics = result(run(folder, *options.split()))["metrics"]
    plain, adapted = (T5ForConditionalGeneration.from_pretrained(folder / name) for name in ("plain", "adapted"))
    moved = {
        name for name, weight in plain.state_dict().items() if not torch.equal(weight, adapted.state_dict()[name])
    }
    rest = ("shared.", "lm_head.", "layer_norm", "relative_attention_bias")
    assert moved and not any(part in name for name in moved for part in rest), "embeddings and norms rest"
    assert metrics["before_loss"] != metrics["after_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model plain --output_dir x --dataset cnn_dailymail --lora_rank 0", "--lora_rank must be a whole number"),
        (
            "--model plain --output_dir x --dataset cnn_dailymail --lora_rank 2 --objective classifiers",
            "--lora_rank does not go with this --objective",
        ),
        ("--model plain --output_dir x", "either --dataset or --train_file"),
        ("--model plain --output_dir x --train_file train.csv", "--train_file goes with --validation_file"),
        ("--model plain --output_dir x --dataset cnn_dailymail --objective both", "--objective must be one of"),
        ("--model plain --output_dir x --dataset cnn_dailymail --weights cubic", "`weights` must be one of"),
        ("--model plain --output_dir x --dataset cnn_dailymail --classifier mlp", "--classifier does not go with"),
        ("--model plain --output_dir x --dataset cnn_dailymail --exit_layers 9", "`exit_layers` has 9"),
        ("--model plain --output_dir x --dataset cnn_dailymail --source_column body", "no column 'body'"),
        ("--model plain --output_dir x --train_file train.csv --validation_file no.csv", "no file 'no.csv'"),
        ("--model plain --output_dir plain/x --dataset cnn_dailymail", "is, or is in, the folder of the model"),
        ("--model bare --output_dir x --dataset cnn_dailymail", "bare has no tokenizer"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(folder, options, message):
    ran = run(folder, *options.split())
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr
    assert not (folder / "x").exists()


def test_help_has_an_example(folder):
    ran = run(folder, "--help")
    assert ran.returncode == 0 and "python scripts/train_exits.py --model google-t5/t5-small" in ran.stdout
    assert "--last_again" in ran.stdout and NUM_LAYERS == 6
