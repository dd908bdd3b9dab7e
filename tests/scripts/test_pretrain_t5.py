"""`scripts/pretrain_t5.py` end to end: tokenizer and plain T5 of a few texts, resuming, and loading with exits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, T5Config

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.seen_inputs import SeenInputs
from tests.common.test_data import write
from tests.scripts import Ran, run_script
from tests.scripts.test_train_exits import articles


SCRIPT = Path(__file__).parent.parent.parent / "scripts/pretrain_t5.py"
SHAPE = "--vocab_size 40 --encoder_layers 3 --decoder_layers 3 --d_model 16 --d_ff 24 --num_heads 2"
QUICK = "--per_device_train_batch_size 4 --learning_rate 1e-2 --report_to none --use_cpu --max_target_tokens 8"
QUICK += " --validation_parts explore select calibrate report"


def run(folder: Path, *options: str, shape: str = SHAPE) -> Ran:
    data = ["--train_file", "train.jsonl", "--validation_file", "validation.jsonl", "--prefix", "summarize: "]
    return run_script("pretrain_t5.py", *data, *shape.split(), *QUICK.split(), *options, cwd=folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    for split, rows in {"train": articles(12), "validation": articles(6, start=5)}.items():
        write(folder / f"{split}.jsonl", rows)
    return folder


def test_a_plain_t5_of_texts(folder):
    """Stock transformers loads the model and generates with it; a resumed run ends with the same losses."""
    straight = run(folder, "--output_dir", "straight", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    assert straight.returncode == 0, straight.stderr[-3000:]
    metrics = json.loads(straight.stdout.splitlines()[-1])["metrics"]
    assert metrics["validation_inputs"] == 5 and 0 <= metrics["eval_rougeL"] <= 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "straight")
    text = "the quick brown fox"
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder / "straight", output_loading_info=True)
    assert not info["missing_keys"] and type(model).__name__ == "T5ForConditionalGeneration"
    assert (model.generation_config.max_length, model.generation_config.max_new_tokens) == (None, 8)
    assert model.config.scale_decoder_outputs and model.config.tie_word_embeddings
    assert model.generate(**tokenizer(text, return_tensors="pt")).shape[1] <= 9
    card = (folder / "straight/README.md").read_text()
    assert f"/ {100 * metrics['eval_rougeL']:.1f} |" in card and "python scripts/pretrain_t5.py" in card

    options = "--output_dir further --max_steps 1 --start_from straight --denoising_words 3 --scaled_steps"
    further = run(folder, *options.split(), shape="")
    assert further.returncode == 0, further.stderr[-3000:]
    seen = [EarlyExitT5ForConditionalGeneration.from_pretrained(folder / name) for name in ("straight", "further")]
    assert seen[0].seen_inputs == seen[1].seen_inputs and seen[0].seen_inputs.by["training"]
    (checkpoint, *_) = sorted((folder / "straight").glob("checkpoint-*"))
    assert SeenInputs.of_model(checkpoint, T5Config.from_pretrained(checkpoint)) == seen[0].seen_inputs
    assert AutoTokenizer.from_pretrained(folder / "further").get_vocab() == tokenizer.get_vocab()
    weights = AutoModelForSeq2SeqLM.from_pretrained(folder / "further").state_dict()
    changes = [((weights[name] - weight).norm() / weight.norm()).item() for name, weight in model.state_dict().items()]
    assert max(changes) < 0.0101 and min(changes) > 0, "one step of 1 % of each weight's size"
    card = (folder / "further/README.md").read_text()
    assert "further than straight on pairs of texts, and on restoring stretches of 3 words" in card
    assert "(linear, Adafactor, scaled steps)" in card

    (folder / "straight/checkpoint-4").rename(folder / "moved")
    again = run(folder, "--output_dir", "straight", "--max_steps", "4", "--save_steps", "2", "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = json.loads(again.stdout.splitlines()[-1])["metrics"]
    assert resumed["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "straight").early_exit.exit_layers == (1, 2)


def test_texts_are_judged_by_their_own_references(folder, tmp_path, monkeypatch):
    """Texts meet their own references even with `group_by_length`, which Transformers also applies in evaluation."""
    sys.path.insert(0, str(SCRIPT.parent))
    import pretrain_t5

    judged = []

    class Recording(pretrain_t5.RougeOfDistinctInputs):
        def __call__(self, prediction):
            judged.extend(self.tokenizer.batch_decode(prediction.label_ids.clip(0), skip_special_tokens=True))
            assert [one.references[0][: len(text)] for one, text in zip(self.examples, judged)] == judged
            return super().__call__(prediction)

    monkeypatch.setattr(pretrain_t5, "RougeOfDistinctInputs", Recording)
    monkeypatch.chdir(folder)
    data = "--train_file train.jsonl --validation_file validation.jsonl --per_device_eval_batch_size 1"
    options = f"--output_dir {tmp_path} --max_steps 1 --train_sampling_strategy group_by_length --save_strategy no"
    pretrain_t5.main([*data.split(), *SHAPE.split(), *QUICK.split(), *options.split()])
    assert len(set(judged)) > 2


def test_stretches_are_restored_from_fewer_words():
    sys.path.insert(0, str(SCRIPT.parent))
    from pretrain_t5 import denoising_pairs

    text = " ".join(map(str, range(1000)))
    pairs = [(f"summarize: {text}", "numbers")]
    [(source, target)] = denoising_pairs(pairs, "summarize: ", 1000, seed=0)
    left = source.removeprefix("restore: ").split(" ")
    assert target == text and source.startswith("restore: ")
    assert sorted(left, key=int) == left and 800 < len(left) < 900
    stretches = list(denoising_pairs(pairs, "summarize: ", 300, seed=0))
    assert [len(target.split(" ")) for _, target in stretches] == [300, 300, 300, 100]
    assert " ".join(target for _, target in stretches) == text
    for source, target in stretches:
        left, known = source.removeprefix("restore: ").split(" "), target.split(" ")
        assert set(left) < set(known) and sorted(left, key=int) == left and len(left) > 0.7 * len(known)
    single = list(denoising_pairs(pairs, "summarize: ", 1, seed=0))
    assert 800 < len(single) < 900 and all(source == f"restore: {target}" for source, target in single)
    assert stretches == list(denoising_pairs(pairs, "summarize: ", 300, seed=0))


def test_scaled_steps_are_in_proportion_to_the_weight(tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    from pretrain_t5 import scaled_steps

    small, large = torch.full((4, 4), 0.01, requires_grad=True), torch.full((4, 4), 1.0, requires_grad=True)
    optimizer = scaled_steps([small, large], Seq2SeqTrainingArguments(str(tmp_path), learning_rate=0.01))
    (small.sum() + large.sum()).backward()
    optimizer.step()
    assert (0.01 - small.mean().item()) == pytest.approx(0.01 * 0.01, rel=1e-3)
    assert (1.0 - large.mean().item()) == pytest.approx(0.01 * 1.0, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_layers": 9}, "--encoder_layers 8 must be at least --decoder_layers 9"),
        ({"num_heads": 3}, "--num_heads 3 must divide --d_model 256"),
        ({"dropout": 1.0}, "--dropout must be in"),
        ({"d_ff": 0}, "--d_ff must be positive, got 0"),
        ({"denoising_words": 0}, "--denoising_words must be positive, got 0"),
        ({"optim": "adafactor", "scaled_steps": True}, "--optim adafactor does not go with --scaled_steps"),
        ({"d_ff": 8, "start_from": "plain"}, "--d_ff does not go with --start_from"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message, capsys, tmp_path):
    sys.path.insert(0, str(SCRIPT.parent))
    from pretrain_t5 import main

    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit, match="2"):
        main(
            [*arguments, "--train_file", "a.csv", "--validation_file", "b.csv", "--output_dir", str(tmp_path / "out")]
        )
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
