"""What a checkpoint's exits are worth: that the numbers are those of direct calls, and that a run can be taken up."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit.data import Example, halves
from hf_earlyexit.default import CHECKPOINT, default_inputs, load_default
from hf_earlyexit.evaluation import ALWAYS, FULL_DEPTH, Bench, Half, choose, distribution, quality, settings_of
from hf_earlyexit.timing import Times, measure, spread


SCRIPT = Path(__file__).parent.parent / "scripts/evaluate_exits.py"
TOKENS = 10


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(str(CHECKPOINT), TOKENS, batch_size=3)


def examples() -> list[Example]:
    return [Example(text, ("A place to eat.", "A place.")) for text in default_inputs()]


def test_settings():
    names = [one.name for one in settings_of({"softmax:2,4": [0.5, 0.9], "state": [0.9]}, [2, 4])]
    assert names == [
        FULL_DEPTH,
        "always after layer 2",
        "always after layer 4",
        "softmax:2,4 0.5",
        "softmax:2,4 0.9",
        "state 0.9",
    ]
    last = settings_of({"softmax:2,4": [0.5]}, [])[-1]
    assert last.keywords == {"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4]}


def test_what_is_written_is_what_a_direct_call_writes(bench):
    model, tokenizer = load_default()
    setting = settings_of({"softmax:2,6": [0.6]}, [])[-1]
    found = bench.generate(examples(), setting)
    batch = tokenizer(default_inputs(), return_tensors="pt", padding=True)
    direct = model.generate(**batch, max_new_tokens=TOKENS, **setting.keywords, return_dict_in_generate=True)
    assert found.texts == tokenizer.batch_decode(direct.sequences, skip_special_tokens=True)
    assert found.layers_run == [[depth for depth in row if depth] for row in direct.layers_run.tolist()]
    assert found.work["layer_rows"] == direct.layer_rows.tolist()
    assert sum(map(len, found.layers_run)) == found.work["layer_rows"][0]


def test_quality_by_hand():
    half = Half([Example("x", ("a b c d", "e f")), Example("y", ("g h",))], full_depth=["e f", "g i"])
    scores = quality(half, ["e f", "g h"], [[2, 8], [4, 4, 2]])
    assert scores["rougeL"] == pytest.approx(100) and scores["mean_layers"] == 4 and scores["tokens"] == 5
    assert scores["consistency"] == pytest.approx((100 + 50) / 2) and scores["equal_texts"] == 50
    assert distribution([[2, 8], [4, 4, 2]], 8) == [0, 0.4, 0, 0.4, 0, 0, 0, 0.2]


def cell(name: str, curve: str, rouge: float, time: float) -> dict:
    return {"name": name, "curve": curve, "select": {"rougeL": rouge}, "time": {"1": {"cpu": {"median": time}}}}


def test_the_fastest_of_those_that_lose_little_is_chosen():
    cells = [
        cell(FULL_DEPTH, FULL_DEPTH, 60, 1.0),
        cell(f"{ALWAYS} 2", ALWAYS, 60, 0.2),
        cell("softmax 0.1", "softmax", 57.9, 0.3),
        cell("softmax 0.5", "softmax", 58.0, 0.5),
        cell("state 0.9", "state", 59.0, 0.6),
    ]
    assert choose(cells, 2.0, 1)["name"] == "softmax 0.5"
    assert choose(cells, 1.0, 1)["name"] == "state 0.9"
    assert choose(cells, 0.5, 1) is None


def test_times_are_ratios_of_calls_that_took_turns(bench):
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "iqr": pytest.approx(2 / 3)}
    times = Times(["ours", "stock"])
    for name, seconds in {"ours": [1.0, 4.0, 9.0], "stock": [2.0, 4.0, 3.0]}.items():
        times.seconds["wall"][name] = seconds
    assert times.ratio("ours", {"stock": 1.0}, "wall")["median"] == 1.0
    assert times.ratio("ours", {"stock": 0.5, "ours": 0.5}, "wall")["median"] == 1.0
    calls: list[str] = []
    found = measure({name: lambda name=name: calls.append(name) for name in "ab"}, 3, Random(0))
    assert sorted(calls) == list("aaaabbbb") and set(calls[:2]) == set("ab"), "warmed up once, then three rounds"
    assert all(len(found.seconds["cpu"][name]) == 3 for name in "ab")


def test_time_is_beside_the_stock_class_warmed_up(bench, monkeypatch):
    """Batches go round until there are enough."""
    assert type(bench.stock) is T5ForConditionalGeneration
    seen = {"stock": [], "ours": []}
    for name, model in (("stock", bench.stock), ("ours", bench.model)):
        record = lambda name=name, **call: seen[name].append((call["input_ids"].tolist(), "exit_layer" in call))  # noqa: E731
        monkeypatch.setattr(model, "generate", record)
    times = bench.time_beside_stock(examples()[:2], settings_of({}, [1])[-1], size=1, rounds=5)
    assert len(times.seconds["wall"]["stock"]) == len(times.seconds["cpu"]["ours"]) == 5
    first, second = (ids for ids, _ in seen["stock"][1:3])
    assert first != second and [ids for ids, _ in seen["stock"]] == [first, first, second, first, second, first]
    assert {exits for _, exits in seen["stock"]} == {False} and {exits for _, exits in seen["ours"]} == {True}
    assert len(seen["ours"]) == 6


def test_the_script_evaluates_what_is_missing_and_writes_it_all(tmp_path):
    with open(tmp_path / "inputs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["mr", "ref"], *([text, "A place to eat."] for text in default_inputs()[:5])])
    options = ["--file", "inputs.csv", "--output", "found.json", "--rounds", "2", "--timed-batch-sizes", "2"]
    options += ["--max-new-tokens", str(TOKENS), "--distribution", "exits.json", "--points", "100"]

    def run(*curves: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(SCRIPT), *options, *curves]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    for wrong, message in ((["softmx", "0.9"], "got 'softmx'"), (["classifier:9", "0.9"], "has [9]")):
        ran = run("--curve", *wrong)
        assert ran.returncode == 1 and message in ran.stderr and not (tmp_path / "found.json").exists()
    assert run("--curve", "softmax", "0.9").returncode == 0
    first = json.loads((tmp_path / "found.json").read_text())
    ran = run("--curve", "softmax", "0.9", "--curve", "state", "0.98")
    assert ran.returncode == 0, ran.stderr[-2000:]
    summary, text = json.loads(ran.stdout.splitlines()[-1]), ran.stdout
    mixed = run("--curve", "softmax", "0.9", "--max-inputs", "4")
    assert mixed.returncode == 1 and "found.json has cells of another run" in mixed.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["cells"][: len(first["cells"])] == first["cells"], "what was there is not run again"
    names = [one["name"] for one in found["cells"]]
    assert names == [FULL_DEPTH, *(f"{ALWAYS} {layer}" for layer in range(1, 8)), "softmax 0.9", "state 0.98"]
    assert summary["chosen"] in ("softmax 0.9", "state 0.98") and "| state 0.98 |" in text
    assert found["inputs"] == {"select": 2, "report": 3}
    full = found["cells"][0]
    assert full["report"]["mean_layers"] == 8 and full["report"]["consistency"] == 100
    assert full["distribution"] == [0] * 7 + [1] and full["time"]["2"]["cpu"]["median"] > 0
    exits = json.loads((tmp_path / "exits.json").read_text())
    report = halves([Example(text, ()) for text in default_inputs()[:5]])[1]
    model, tokenizer = load_default()
    batch = tokenizer([one.source for one in report], return_tensors="pt", padding=True)
    output = model.generate(**batch, max_new_tokens=TOKENS, **exits["setting"], return_dict_in_generate=True)
    assert exits["layers_run"] == [[depth for depth in row if depth] for row in output.layers_run.tolist()]
    assert sum(exits["distribution"]) == pytest.approx(1) and torch.is_tensor(output.sequences)


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(SCRIPT.parent))
    from evaluate_exits import plot

    def one(name: str, curve: str, layers: float) -> dict:
        time = {"1": {"cpu": {"median": layers / 8}}}
        return {"name": name, "curve": curve, "report": {"rougeL": 50.0, "mean_layers": layers}, "time": time}

    plot([one(FULL_DEPTH, FULL_DEPTH, 8), one("state 0.9", "state", 3)], [1], str(tmp_path / "curve.png"), "a test")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
