"""`scripts/fit_shortcuts.py` end to end on a tiny model, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.families.shipped import CHECKPOINT
from tests.common.test_data import write
from tests.scripts import Ran, run_script
from tests.scripts.test_train_exits import articles
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Folder of a tiny plain T5 with the shipped tokenizer, and files; six validation rows of five distinct inputs."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    T5ForConditionalGeneration(tiny_config(vocab_size=8000, eos_token_id=1)).save_pretrained(folder / "plain")
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder / "plain")
    for split, rows in {"train": articles(24), "validation": articles(6, start=5)}.items():
        write(folder / f"{split}.csv", rows)
    return folder


def run(folder: Path, *options: str) -> Ran:
    files = ("--train_file", "train.csv", "--validation_file", "validation.csv", "--model", "plain")
    parts = ("--validation_parts", "explore", "select", "calibrate", "report")
    return run_script("fit_shortcuts.py", *files, *parts, *options, cwd=folder)


@pytest.mark.parametrize("own_texts", (False, True))
def test_it_fits_measures_and_saves(folder, own_texts):
    options = (
        "--prefix describe: --exit_layers 2 4 --ridge 0.01 --batch_size 4 --max_train_rows 20 --output_dir fitted"
    )
    ran = run(folder, *options.split(), *["--own_texts", "--max_target_tokens", "5"][: 3 * own_texts])
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert (found["rows"], found["inputs"]) == (20, 5)
    for layer in ("2", "4"):
        assert found["fit"]["r2"][layer] > found["fit"]["lens_r2"][layer]
        for name in ("shortcut", "lens"):
            share = found["held_out"][name][layer]["agreement"]
            assert 0 <= share["low"] <= share["mean"] <= share["high"] <= 1
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(folder / "fitted")
    assert model.early_exit == EarlyExitConfig((2, 4), ("shortcut", "shortcut"))
    read = {short_hash(Example(f"describe:{row['article']}")) for row in articles(6, start=5)}
    assert read <= model.seen_inputs.by["training"], "what it was measured on, too"
    assert (model.exit_heads.heads["2"].map.weight - torch.eye(32)).abs().max() > 0.01
    plain = T5ForConditionalGeneration.from_pretrained(folder / "plain").state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.items())
    assert AutoTokenizer.from_pretrained(folder / "fitted")("the fox").input_ids
    card = (folder / "fitted/README.md").read_text()
    assert "linear shortcuts" in card and "python scripts/fit_shortcuts.py --train_file" in card
    share = found["held_out"]["shortcut"]["2"]["agreement"]["mean"]
    assert f"| 2 | {share:.3f} |" in card and f"over {found['fit']['tokens']} tokens with `ridge=0.01`" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ridge -1", "--ridge must be at least 0, got -1.0"),
        ("--batch_size 0", "--batch_size must be at least 1, got 0"),
        ("--max_train_rows 0", "--max_train_rows must be at least 1, got 0"),
        ("--exit_layers 9", "`exit_layers` has 9"),
        ("--source_column body", "no column 'body'"),
        ("--max_train_rows 1", "fewer than the 32 coordinates"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(folder, options, message):
    ran = run(folder, *options.split(), "--output_dir", "x")
    assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr
    assert not (folder / "x").exists()
