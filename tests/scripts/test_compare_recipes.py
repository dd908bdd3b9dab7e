"""`scripts/compare_recipes.py` on a tiny model, and its summary figures against values worked out by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from tests.scripts import SCRIPTS, Ran, run_script
from tests.scripts.test_train_exits import folder  # noqa: F401 (a fixture)


sys.path.insert(0, str(SCRIPTS))

from recipe_table import area_under, interval, quality_at, summarize, table
from recipes import RECIPES


CURVE = "softmax:2,4"


def results() -> dict:
    """Results for two inputs of 1 and 3 tokens, at two thresholds and at full depth, on 6 layers."""

    def quality(name, curve, rouge, layers):
        return {"name": name, "curve": curve, "per_input": {"rougeL": rouge, "layers": layers, "tokens": [1, 3]}}

    settings = [
        quality("full depth", "full depth", [80.0, 60.0], [6.0, 6.0]),
        quality("static decoder 2", "static decoder", [1.0, 1.0], [2.0, 2.0]),
        quality(f"{CURVE} 0.8", CURVE, [80.0, 40.0], [2.0, 6.0]),
        quality(f"{CURVE} 0", CURVE, [20.0, 20.0], [2.0, 2.0]),
    ]
    times = {f"{CURVE} 0.8": 0.9, f"{CURVE} 0": 0.6}
    cells = [{"name": name, "time": {"ratio": {"cpu": {"median": time}}}} for name, time in times.items()]
    return {
        "quality": {one["name"]: one for one in settings},
        "cells": cells,
        "num_layers": 6,
        "asked": {"clock": "cpu"},
    }


def test_figures_by_hand():
    """Points (layers per token, quality, time) are (2, 20, 0.6), (5, 60, 0.9) and (6, 70, 1)."""
    found = summarize(results(), CURVE)
    assert [(one["layers"], one["rougeL"], one["time"]) for one in found["points"]] == [
        (6.0, 70.0, 1.0),
        (5.0, 60.0, 0.9),
        (2.0, 20.0, 0.6),
    ]
    assert found["full_depth"]["mean"] == 70.0
    assert found["at_half"]["mean"] == pytest.approx(20 + 40 / 3)
    assert found["area"]["mean"] == pytest.approx((0 * 0.1 + 20 * 0.3 + 60 * 0.1) / 0.5, abs=0.1)
    assert found["area"]["low"] < found["area"]["mean"] < found["area"]["high"]


def test_who_always_runs_more_than_half_has_no_quality_there():
    found = results()
    found["num_layers"] = 3
    summary = summarize(found, CURVE) | {"cost": None}
    assert summary["at_half"] is None and "| - |" in table({"deep": summary}, summary, "little").splitlines()[-1]


def test_quality_outside_of_the_points_is_the_nearest_one():
    assert quality_at(1.0, np.array([4.0, 2.0]), np.array([9.0, 5.0])) == 5.0
    assert quality_at(3.0, np.array([4.0, 2.0]), np.array([9.0, 5.0])) == 7.0


def test_a_slower_setting_never_counts_for_less_time():
    assert area_under(np.array([1.2, 1.0]), np.array([90.0, 50.0])) == pytest.approx(50 / 501)
    assert area_under(np.array([0.4, 1.0]), np.array([30.0, 50.0])) == pytest.approx(30, abs=0.1)


def test_intervals_are_over_inputs():
    values = np.array([0.0, 1.0] * 50)
    found = interval(lambda draw: values[draw].mean(), 100)
    assert found["mean"] == 0.5 and found["low"] == pytest.approx(0.4, abs=0.02)
    assert found["high"] == pytest.approx(0.6, abs=0.02)


def test_the_table_holds_full_depth_against_the_untrained_model():
    summary = summarize(results(), CURVE)
    untouched = {**summary, "cost": {"cpu_seconds": 0.0, "moved_parameters": 0}}
    losing = {
        **summary,
        "cost": {"cpu_seconds": 12.3, "moved_parameters": 2_500_000},
        "rougeL_of_full_depth": [value - 5 for value in summary["rougeL_of_full_depth"]],
    }
    *_, first, second = table({"lens": untouched, "other": losing}, untouched, "little").splitlines()
    assert "| 0 (the same) |" in first and "| -5.0 (-5.0 to -5.0) |" in second and "| 12 | 2.50 M |" in second


def test_at_least_six_recipes_that_train():
    assert sum(recipe.objective is not None for recipe in RECIPES.values()) >= 6
    assert len({repr(recipe) for recipe in RECIPES.values()}) == len(RECIPES)


def run(where: Path, *options: str) -> Ran:
    budget = "--max_steps 2 --batch_size 4 --inputs 4 --rounds 2 --exit_layers 2 4 --max_target_tokens 6"
    data = "--train_file train.csv --validation_file validation.csv --output_dir compared --table table.md"
    data += " --validation_parts explore select calibrate report"
    arguments = ["--model", "plain", *budget.split(), *data.split(), *options]
    return run_script("compare_recipes.py", *arguments, cwd=where)


@pytest.mark.once
def test_recipes_are_tried_once_under_one_budget(folder):  # noqa: F811
    EarlyExitT5ForConditionalGeneration.from_pretrained(
        folder / "plain", early_exit=EarlyExitConfig([2, 4])
    ).save_pretrained(folder / "exits")
    ran = run(folder, "--recipes", "logit lens", "shallow-deep", "multi-exit, LoRA")
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])["recipes"]
    assert list(found) == ["logit lens", "shallow-deep", "multi-exit, LoRA"]
    assert all(one["cost"]["cpu_seconds"] > 0 for name, one in found.items() if name != "logit lens")
    moved = {name: one["cost"]["moved_parameters"] for name, one in found.items()}
    assert moved["logit lens"] == 0 < moved["multi-exit, LoRA"] < moved["shallow-deep"]
    assert {point["name"].partition(" ")[0] for point in found["shallow-deep"]["points"]} == {"full", "softmax:4"}
    assert {point["name"].partition(" ")[0] for point in found["multi-exit, LoRA"]["points"]} == {
        "full",
        "softmax:2,4",
    }
    text = (folder / "table.md").read_text()
    assert "2 steps of 4 rows" in text and text.count("\n| ") == 2 + 3

    again = run(folder, "--recipes", "shallow-deep", "--beside", "exits")
    assert json.loads(again.stdout.splitlines()[-1])["recipes"]["exits"]["cost"] is None
    assert (folder / "table.md").read_text().splitlines()[-1].endswith("| - | - |")
    assert json.loads(again.stdout.splitlines()[-1])["recipes"]["shallow-deep"] == found["shallow-deep"]
    assert "train_runtime" not in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipes", "alchemy"], "--recipes has ['alchemy']"),
        (["--max_steps", "0"], "--max_steps must be positive, got 0"),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (
            ["--exit_layers", "2", "--recipes", "shallow-deep"],
            "--exit_layers must have 4 for the recipe 'shallow-deep'",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message, capsys, tmp_path):
    from compare_recipes import main

    files = ["--train_file", "a.csv", "--validation_file", "b.csv", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "plain", *files, *options])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
