"""Evaluation of a checkpoint's exits: the numbers match direct calls, and a run can be resumed."""

from __future__ import annotations

import gc
import json
import subprocess
from dataclasses import replace
from functools import partial
from itertools import repeat
from random import Random

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.decoding.candidates import FULL_DEPTH, STATIC, Candidate, full_depth
from hf_earlyexit.evaluation import model_evaluation
from hf_earlyexit.evaluation.generate_texts import Generations, Text
from hf_earlyexit.evaluation.grid import Cell, Grid
from hf_earlyexit.evaluation.heat_map import full_depth_choices
from hf_earlyexit.evaluation.metrics import rouge_scores
from hf_earlyexit.evaluation.model_evaluation import best, evaluate_model, inputs_to_read, judge, time_beside_stock
from hf_earlyexit.evaluation.oracle import oracle_exits
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.families.t5.stock import stock_generate, stock_of
from hf_earlyexit.reports.report import check_results
from hf_earlyexit.speed.timing import Times, measure, spread, take_turns
from tests.certificates import certificate_for
from tests.evaluation.shortly import time_shortly
from tests.parts import drawn
from tests.tiny import tiny_inputs, tiny_pair


pytest.importorskip("scipy.stats")
DECODING = {"max_new_tokens": 8}
GRID = Grid({"softmax:2,6": [0.6], "classifier": [0.5]}, batch_sizes=[1, 2], rounds=2, writing_batch_size=3)


@pytest.fixture(scope="module")
def shipped():
    return load_default()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return Partition().keep(drawn(default_examples(), explore=2, select=3))


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation") / "journal"


@pytest.fixture(scope="module")
def found(shipped, examples, journal):
    with pytest.MonkeyPatch.context() as patch:
        time_shortly(patch)
        return evaluate_model(*shipped, examples, GRID, generation=DECODING, path=journal, data_name="some.csv")


def direct(shipped, examples, **keywords):
    model, tokenizer = shipped
    batch = tokenizer([one.source for one in examples], return_tensors="pt", padding=True)
    output = model.generate(**batch, **DECODING, **keywords, return_dict_in_generate=True)
    return tokenizer.batch_decode(output.sequences, skip_special_tokens=True), output


def test_all_cells_are_there(found):
    places = [(cell["name"], cell["batch_exit"], cell["batch_size"]) for cell in found["cells"]]
    static = [(f"{STATIC} {layer}", "row", size) for layer in range(1, 8) for size in (1, 2)]
    curves = [
        (name, *place)
        for name in ("softmax:2,6 0.6", "classifier 0.5")
        for place in (("row", 1), ("row", 2), ("batch", 2))
    ]
    assert places == [(FULL_DEPTH, "row", 1), (FULL_DEPTH, "row", 2), *static, *curves]
    assert {cell["quality"] for cell in found["cells"]} == set(found["quality"])
    check_results(json.loads(json.dumps(found)))


def test_texts_and_work_are_those_of_direct_calls(shipped, examples, found):
    keywords = {"exit_criterion": "softmax", "exit_threshold": 0.6, "exit_layers": [2, 6]}
    quality = found["quality"]["softmax:2,6 0.6"]
    texts, output = direct(shipped, examples, **keywords)
    rouge = [100 * rouge_scores(text, one.references)["rougeL"] for text, one in zip(texts, examples)]
    assert quality["per_input"]["rougeL"] == pytest.approx(rouge)
    assert quality["scores"]["rougeL"]["mean"] == pytest.approx(sum(rouge) / 5)
    assert quality["scores"]["rougeL"]["low"] < sum(rouge) / 5 < quality["scores"]["rougeL"]["high"]
    assert quality["work"]["layer_rows"] == output.layer_rows.tolist()
    assert quality["tokens"] == int((output.layers_run > 0).sum()) == quality["work"]["layer_rows"][0]
    assert quality["mean_layers"]["mean"] == pytest.approx(
        float(output.layers_run[output.layers_run > 0].float().mean())
    )
    assert quality["per_input"]["layers"][0] == pytest.approx(
        float(output.layers_run[0][output.layers_run[0] > 0].float().mean())
    )
    assert sum(quality["distribution"]) == pytest.approx(1) and quality["batch_size"] is None


def test_texts_of_waiting_rows_are_of_their_batch_size(shipped, examples, found):
    """Five inputs in batches of two: rows of a batch wait for each other, and the last input is alone."""
    keywords = {"exit_criterion": "softmax", "exit_threshold": 0.6, "exit_layers": [2, 6], "batch_exit": "batch"}
    quality = found["quality"]["softmax:2,6 0.6 | batch of 2"]
    outputs = [direct(shipped, examples[start : start + 2], **keywords)[1] for start in (0, 2, 4)]
    work = [sum(counts) for counts in zip(*(output.layer_rows.tolist() for output in outputs))]
    assert quality["work"]["layer_rows"] == work != found["quality"]["softmax:2,6 0.6"]["work"]["layer_rows"]
    assert quality["batch_size"] == 2 and quality["batch_exit"] == "batch"


def test_a_static_decoder_writes_what_the_cut_stock_model_writes(shipped, examples, found):
    model, tokenizer = shipped
    batch = tokenizer([one.source for one in examples], return_tensors="pt", padding=True)
    texts = tokenizer.batch_decode(stock_of(model, 4).generate(**batch, **DECODING), skip_special_tokens=True)
    rouge = [100 * rouge_scores(text, one.references)["rougeL"] for text, one in zip(texts, examples)]
    assert found["quality"][f"{STATIC} 4"]["per_input"]["rougeL"] == pytest.approx(rouge)
    assert found["quality"][f"{STATIC} 4"]["work"]["layer_rows"][4:] == [0] * 4


def test_baselines_and_what_is_shown(found):
    full = found["quality"][FULL_DEPTH]
    assert full["scores"]["consistency"]["mean"] == 100 and full["distribution"] == [0] * 7 + [1]
    assert found["inputs"]["count"] == 5 and found["inputs"]["full_depth_tokens"] == full["per_input"]["tokens"]
    assert set(found["reliability"]) == {"softmax", "classifier"} and len(found["reliability"]["softmax"]) == 7
    shown = found["examples"][0]
    assert len(shown["tokens"]) == len(shown["layers"]) == len(shown["confidences"]) > 0
    assert len(found["examples"]) == 4 and found["certificate"] is None and found["format"] == 1
    assert json.loads(json.dumps(found, allow_nan=False))["environment"]["torch threads"] == "1"


def test_the_oracle_is_along_full_depths_texts(shipped, examples, found):
    """The stored oracle matches direct calls, for two curves with different exit points."""
    model, tokenizer = shipped
    batch = tokenizer([one.source for one in examples], return_tensors="pt", padding=True)
    for layers in ([2, 6], list(range(1, 8))):
        direct = oracle_exits(model, dict(batch), exit_layers=layers, **DECODING)
        kept = found["oracle"]["oracles"][",".join(map(str, layers))]
        assert kept["first"]["layers"] == pytest.approx(direct.layers_per_token)
        assert kept["stable"]["layers"] == pytest.approx(direct.stable_layers_per_token)
        assert kept["first"]["shares"] == {str(layer): share for layer, share in direct.shares.items()}
        assert len({share for share in kept["first"]["shares"].values() if share}) >= 3
    assert found["oracle"]["tokens"] == int(direct.is_token.sum()) == sum(found["inputs"]["full_depth_tokens"])
    assert [one["agreement"] for one in found["oracle"]["same_layer"][:-1]] == list(direct.agreement.values())
    curves = found["oracle"]["curves"]
    assert {name: one["exit_layers"] for name, one in curves.items()} == {
        "softmax:2,6": [2, 6],
        "classifier": list(range(1, 8)),
    }
    assert curves["softmax:2,6"]["asked"] == [0.6]


def test_a_journal_from_before_the_oracle_is_taken_up(shipped, examples, found, journal, tmp_path, monkeypatch):
    lines = journal.read_text().splitlines(keepends=True)
    older = tmp_path / "journal"
    older.write_text("".join(line for line in lines if not line.startswith('{"key": "oracle')))
    monkeypatch.setattr(model_evaluation, "time_beside_stock", lambda *args: pytest.fail("a cell was timed again"))
    monkeypatch.setattr(model_evaluation, "reliability", lambda *args: pytest.fail("counted again"))
    again = evaluate_model(*shipped, examples, GRID, generation=DECODING, path=older, data_name="some.csv")
    assert again["oracle"] == found["oracle"] and older.stat().st_size == journal.stat().st_size


def test_differing_places_are_those_of_stock(shipped, examples, found):
    """The comparison is at the same prefix, not to the full-depth text."""
    model, tokenizer = shipped
    shown = next(one for one in found["examples"] if one["differs"])
    source = tokenizer(shown["input"], return_tensors="pt")
    place = shown["differs"][0]
    prompt = [0, *tokenizer.convert_tokens_to_ids(shown["tokens"][:place])]
    with torch.no_grad():
        logits = stock_of(model)(**source, decoder_input_ids=torch.tensor([prompt])).logits[0, -1]
    assert tokenizer.convert_ids_to_tokens(int(logits.argmax())) != shown["tokens"][place]


def test_times_are_of_pairs(found):
    for cell in found["cells"]:
        time = cell["time"]
        assert time["ratio"]["cpu"]["median"] > 0 and len(cell["load"]) == 3
        for which in ("ours", "stock"):
            assert time[which]["tokens_per_second"] > 0
            assert 0 < time[which]["encoder_ms"]["median"] < time[which]["first_token_ms"]["median"]


def test_a_run_that_is_taken_up_does_nothing_twice(shipped, examples, found, journal, monkeypatch):
    monkeypatch.setattr(model_evaluation, "time_beside_stock", lambda *args: pytest.fail("a cell was timed again"))
    monkeypatch.setattr(model_evaluation, "force", lambda *args: pytest.fail("texts were forced again"))
    again = evaluate_model(*shipped, examples, GRID, generation=DECODING, path=journal, data_name="some.csv")
    for part in ("quality", "cells", "reliability", "oracle", "inputs"):
        assert again[part] == found[part]


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"grid": Grid(rounds=3, batch_sizes=[1])}, "rounds"),
        ({"generation": {**DECODING, "num_beams": 2}}, "decoding"),
        ({"model": EarlyExitConfig(exit_layers=(2,))}, "exits, weights"),
    ],
)
def test_a_journal_of_another_run_is_refused(shipped, examples, journal, found, monkeypatch, change, differing):
    model, tokenizer = load_default(change["model"]) if "model" in change else shipped
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("something was generated"))
    arguments = {"generation": DECODING, "path": journal, "data_name": "some.csv"} | {
        name: value for name, value in change.items() if name in ("grid", "generation")
    }
    grid = Grid({"softmax:2": [0.6]}, batch_sizes=[1], rounds=2)
    with pytest.raises(ValueError, match=f"entries of another run: {differing} differ"):
        evaluate_model(model, tokenizer, examples, **({"grid": grid} | arguments))


def test_pairs_take_turns_on_the_same_batches_and_the_first_warms_up(monkeypatch):
    seen = []

    def timed(model, generate, batch):
        seen.append((model, batch["number"], generate, gc.isenabled()))
        return batch["number"]

    monkeypatch.setattr(model_evaluation.latency, "timed_generate", timed)
    monkeypatch.setattr(model_evaluation.latency, "summarize", lambda calls: {"calls": calls})
    batches = [{"number": number} for number in range(5)]
    found = time_beside_stock(("ours", "with exits"), ("stock", "plain"), batches)
    assert found["ours"]["calls"] == found["stock"]["calls"] == [1, 2, 3, 4]
    assert sorted(number for _, number, *_ in seen) == sorted([0, 1, 2, 3, 4] * 2)
    assert {model: generate for model, _, generate, _ in seen} == {"ours": "with exits", "stock": "plain"}
    assert {seen[place][0] for place in range(0, 10, 2)} == {"ours", "stock"}, "who is first differs"
    assert not any(collects for *_, collects in seen[2:]) and gc.isenabled() and gc.get_freeze_count() == 0


def test_static_decoders_are_timed_as_the_stock_class_cut_and_batches_are_whole(shipped, examples, monkeypatch):
    """Three inputs in batches of two, repeated cyclically."""
    seen = []

    def time(ours, stock, batches):
        model, generate = ours
        sizes = [len(batch["input_ids"]) for batch in batches]
        seen.append((type(model), model.config.num_decoder_layers, generate.keywords, type(stock[0]), sizes))
        return {"ratio": {"cpu": {"median": 1.0}}}

    monkeypatch.setattr(model_evaluation, "time_beside_stock", time)
    evaluate_model(*shipped, examples[:3], Grid({"state": [0.9]}, batch_sizes=[2], rounds=4), generation=DECODING)
    stock, sizes = T5ForConditionalGeneration, [2] * 5
    assert seen[0] == (type(shipped[0]), 8, {"early_exit": False}, stock, sizes)
    assert seen[1:8] == [(stock, layer, {}, stock, sizes) for layer in range(1, 8)]
    assert [(one[0], one[2]["batch_exit"]) for one in seen[8:]] == [
        (type(shipped[0]), rule) for rule in ("row", "batch")
    ]


def test_nothing_good_enough_is_shown_at_its_most_conservative(shipped, examples, monkeypatch):
    monkeypatch.setattr(model_evaluation, "time_beside_stock", lambda *args: {"ratio": {"cpu": {"median": 1.0}}})
    grid = Grid({"state": [0.0, 0.9, 0.5], "softmax": [0.1]}, batch_sizes=[1], rounds=2, points=-100)
    found = evaluate_model(*shipped, examples[:2], grid, generation=DECODING)
    assert {one["name"] for one in found["examples"]} == {"state 0.9"}


def test_a_report_is_of_inputs_that_the_certificate_has_not_seen(shipped):
    """Also for a certificate with a different partition."""
    given = drawn(default_examples(), select=2, calibrate=2, report=4)
    certificate = certificate_for(shipped[0], {"exit_criterion": "softmax", "exit_threshold": 0.5})
    report = [one for one in given if Partition().part_of(one.unit) == "report"]
    seen = {"select": [short_hash(given[0])], "calibrate": [*map(short_hash, report[:3])], "report": []}
    old = replace(certificate, split={"counts": {}, "hashes": seen}, partition=None)
    read = partial(inputs_to_read, given, partition=Partition(), certificate=old)
    assert read(parts=["report"]) == report[3:]
    assert {*read(parts=["select"])} == {*given[:2]}, "to look again at what was looked at"
    assert len(inputs_to_read(given, ["report"], Partition(), None)) == 4
    seen["calibrate"].append(short_hash(report[3]))
    with pytest.raises(ValueError, match="certificate has seen all 4 inputs of the report part"):
        read(parts=["report"])


def test_without_sacrebleu_there_is_no_bleu(monkeypatch):
    monkeypatch.setattr(model_evaluation, "find_spec", lambda name: None)
    scores = judge(Generations([Text("a", [1], [8])], {}), [Text("a", [1], [8])], [Example("x", ("a",))], 8)["scores"]
    assert "bleu" not in scores and "rougeL" in scores


def test_a_decoder_that_is_deeper_than_the_encoder_can_be_timed():
    """Plain stock T5 cannot: Transformers sizes its cache by the encoder."""
    stock, model = tiny_pair("deeper decoder")
    batch = {**tiny_inputs(2), "max_new_tokens": 4}
    ways = [(model, partial(model.generate, early_exit=False)), (stock, partial(stock_generate, stock))]
    assert time_beside_stock(*ways, repeat(batch, 3))["stock"]["tokens_per_second"] > 0
    sequences = model.generate(**batch, early_exit=False)
    assert torch.equal(full_depth_choices(stock, batch, sequences), sequences[:, 1:])


def test_the_commit_is_that_of_a_checkout_which_tracks_the_package(tmp_path, monkeypatch):
    """It is not the commit of a project whose folder merely contains the installed package."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init")
    (tmp_path / "evaluation.py").touch()
    monkeypatch.setattr(model_evaluation, "__file__", str(tmp_path / "evaluation.py"))
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "other")
    assert model_evaluation.commit() is None
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "with it")
    assert model_evaluation.commit() == git("rev-parse", "--short", "HEAD").strip()


def test_quality_by_hand():
    examples = [Example("x", ("a b c d", "e f")), Example("y", ("g h",))]
    full = [Text("e f", [1], [8]), Text("g i", [1], [8])]
    writing = Generations([Text("e f", [1, 2], [2, 8]), Text("g h", [1, 2, 3], [4, 4, 2])], {"layer_rows": [5]})
    found = judge(writing, full, examples, 8)
    assert found["scores"]["rougeL"] == {"mean": 100, "low": 100, "high": 100}
    assert found["scores"]["consistency"]["mean"] == pytest.approx((100 + 50) / 2)
    assert found["scores"]["equal_texts"]["mean"] == 50 and found["tokens"] == 5
    assert found["mean_layers"]["mean"] == 4 and found["per_input"]["layers"] == [5, pytest.approx(10 / 3)]
    assert (found["mean_layers"]["low"], found["mean_layers"]["high"]) == (pytest.approx(10 / 3), 5)
    assert found["distribution"] == [0, 0.4, 0, 0.4, 0, 0, 0, 0.2] and found["work"] == {"layer_rows": [5]}
    grouped = judge(writing, full, [Example(one.source, one.references, "one unit") for one in examples], 8)
    assert grouped["scores"]["consistency"] == dict.fromkeys(("mean", "low", "high"), 75), "one unit has no spread"


def cell(name: str, curve: str, time: float, size: int = 1) -> dict:
    return {"quality": name, "curve": curve, "batch_size": size, "time": {"ratio": {"cpu": {"median": time}}}}


def test_the_best_is_the_fastest_of_those_that_lose_little():
    scores = {FULL_DEPTH: 60.0, "a": 57.9, "b": 58.0, "c": 59.0, "s": 60.0}
    quality = {name: {"scores": {"rougeL": {"mean": mean}}} for name, mean in scores.items()}
    cells = [
        cell(FULL_DEPTH, FULL_DEPTH, 1.0),
        cell("s", STATIC, 0.2),
        cell("a", "softmax", 0.3),
        cell("b", "softmax", 0.5),
        cell("c", "state", 0.6),
        cell("b", "softmax", 0.1, size=8),
    ]
    found = [best(quality, cells, Grid(points=points)) for points in (2.0, 1.0, 0.5)]
    assert [one and one["quality"] for one in found] == ["b", "c", None]


def test_cells_that_write_the_same_share_their_texts():
    one = Candidate("state", 0.9, {"exit_criterion": "state", "exit_threshold": 0.9})
    assert Cell(one, "row", 1).quality == Cell(one, "row", 8).quality
    assert Cell(one, "batch", 4).quality != Cell(one, "batch", 8).quality != Cell(one, "row", 8).quality
    assert Cell(one, "batch", 4).keywords["batch_exit"] == "batch" and Cell(full_depth(), "row", 4).keywords == {
        "early_exit": False
    }


@pytest.mark.parametrize("rules", [("row", "batch"), ("batch", "row"), ("batch",)])
def test_one_input_at_a_time_is_a_row_of_its_own(rules):
    """Otherwise its texts would come from rows that wait for each other in larger batches."""
    cells = Grid({}, batch_sizes=[1, 4], batch_rules=rules).cells([Candidate("state", 0.9)])
    assert [(cell.size, cell.rule) for cell in cells] == [(1, "row"), *((4, rule) for rule in rules)]


def test_times_are_ratios_of_calls_that_took_turns():
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
    rounds = ({"a": partial(calls.append, number)} for number in range(3))
    assert len(take_turns(rounds, Random(0)).seconds["wall"]["a"]) == 2 and calls[8:] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 1}, "`rounds`.*at least 2, got 1"),
        ({"batch_sizes": []}, "`batch_sizes`"),
        ({"batch_sizes": [0]}, r"`batch_sizes` must be numbers of at least 1, got \[0\]"),
        ({"batch_sizes": [16]}, "`batch_sizes` has 16, but there are 5 inputs"),
        ({"batch_sizes": [2, 2]}, "`batch_sizes` repeats a value"),
        ({"batch_rules": []}, "`batch_rules`"),
        ({"batch_rules": ["rows"]}, "`batch_exit` must be one of"),
        ({"curves": {"softmx": [0.5]}}, "got 'softmx'"),
        ({"curves": {"softmax:9": [0.5]}}, "no exit points"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_any_work(shipped, examples, arguments, message, monkeypatch):
    monkeypatch.setattr(type(shipped[0]), "generate", lambda *args, **kwargs: pytest.fail("something was generated"))
    with pytest.raises(ValueError, match=message):
        evaluate_model(*shipped, examples, Grid(**arguments))
    with pytest.raises(ValueError, match="has no reference to be judged by"):
        evaluate_model(*shipped, [Example("describe: name[x]")])
    with pytest.raises(ValueError, match="at least one input"):
        evaluate_model(*shipped, [])
    with pytest.raises(ValueError, match="`examples` repeats 1 of 6 inputs"):
        evaluate_model(*shipped, [*examples, examples[0]])
    with pytest.raises(ValueError, match="`do_sample=True` cannot be evaluated"):
        evaluate_model(*shipped, examples, Grid(batch_sizes=[1]), generation={"do_sample": True})
    monkeypatch.setattr(shipped[0], "training", True)
    with pytest.raises(ValueError, match="`model` is in training mode"):
        evaluate_model(*shipped, examples)
