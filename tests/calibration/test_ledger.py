"""Inputs used for fitting are not tested on, and repeated tests on the same inputs are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_earlyexit import EarlyExitT5Config, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.calibration import model_calibration
from hf_earlyexit.calibration.ledger import FILE as LEDGER
from hf_earlyexit.calibration.ledger import Attempt, Ledger
from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.model_calibration import DeploymentSettings, calibrate_model
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.calibration.search import Search
from hf_earlyexit.calibration.verification import verify_certificate
from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.common.seen_inputs import FILE as SEEN
from hf_earlyexit.common.seen_inputs import IN_CONFIG, SeenInputs
from hf_earlyexit.exits.accuracy_thresholds import AccuracyTable, ExitAccuracy
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.generation.certificate import FILE, Certificate
from hf_earlyexit.generation.certified import uncertified
from tests.certificates import certificate_for
from tests.parts import drawn
from tests.tiny import tiny_pair


SETTING = {"exit_criterion": "softmax", "exit_threshold": 0.5}
SEARCH = Search(curves={"softmax:2,4": [0.9, 0.5]}, order="threshold", cost="layers")
USE = DeploymentSettings(
    generation={"max_new_tokens": 8}
)  # with fewer tokens the two texts of the select part are equal


def examples() -> list[Example]:
    return drawn(default_examples(), select=2, calibrate=12, report=2)


# --- seen inputs ----------------------------------------------------------------------------------------------------


def test_what_was_seen_goes_with_the_checkpoint(tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / SEEN).exists()
    model.record_seen("training", ["a", "b"])
    model.record_seen("criteria", ["c"])
    model.record_seen("training", ["b", "d"])
    model.save_pretrained(tmp_path / "one")
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "one")
    assert loaded.seen_inputs == model.seen_inputs and {*loaded.seen_inputs.by} == {"training", "criteria"}
    assert loaded.seen_inputs.by["training"] == {short_hash(Example(one)) for one in "abd"}
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / SEEN).read_text() == (tmp_path / "one" / SEEN).read_text()
    loaded.save_stock(tmp_path / "stock")
    from_stock = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "stock")
    assert from_stock.seen_inputs == model.seen_inputs, "a plain checkpoint has seen what it has seen"


def test_a_file_that_is_missing_or_none_is_refused(tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    model.record_seen("training", ["a"])
    model.save_pretrained(tmp_path)
    assert getattr(model.config, IN_CONFIG) == SEEN
    for text, message in (
        ("{", f"{SEEN}: not JSON"),
        ("[]", "does not list seen inputs"),
        ('{"format": 1, "by": []}', "does not list seen inputs"),
        ('{"format": 1, "by": {"training": "abcd"}}', "must be an object of lists of hashes"),
        ('{"format": 1, "by": {"training": [[]]}}', "must be an object of lists of hashes"),
        ('{"format": 2, "by": {}}', "has format 2, known is 1"),
    ):
        (tmp_path / SEEN).write_text(text)
        with pytest.raises(ValueError, match=message):
            EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / SEEN).unlink()
    with pytest.raises(ValueError, match=f"{SEEN} lists the inputs that were trained on, and the file is not there"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", (5, ["a"], {}, True, "another.json"))
def test_a_name_of_another_file_is_refused(name, tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, IN_CONFIG: name}))
    with pytest.raises(ValueError, match=f"{IN_CONFIG}.*must be '{SEEN}'"):
        EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_the_config_says_what_is_saved(tmp_path):
    """Seen inputs are saved and loaded also if copies share the config or a folder is loaded with another config."""
    _, model = tiny_pair("tied", 1, torch.float32)
    uncertified(model).record_seen("training", ["a"])
    model.save_pretrained(tmp_path / "none")
    assert not EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "none").seen_inputs
    model.record_seen("training", ["a"])
    model.save_pretrained(tmp_path / "seen")
    for config in ("seen", "none"):
        config = EarlyExitT5Config.from_pretrained(tmp_path / config)
        loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path / "seen", config=config)
        assert loaded.seen_inputs == model.seen_inputs


def what_was_seen_is_not_tested_on() -> None:
    """Calibration and verification refuse inputs used for fitting; inputs of the open parts may be used for it."""
    model, tokenizer = load_default()
    given = examples()
    for part, kept in Partition().split(given).items():
        for by in ("training", "criteria"):
            model.seen_inputs = SeenInputs().plus(by, [one.source for one in kept])
            if part in ("calibrate", "report"):
                message = f"has seen inputs of the calibrate and report parts before .{len(kept)} by {by}, of 14.*give"
                with pytest.raises(ValueError, match=message):
                    calibrate_model(model, tokenizer, given, RiskTarget(0.9), USE, SEARCH)
    model.seen_inputs = SeenInputs()
    tested = Partition().split(given)["calibrate"][:1]
    fitted = ExitAccuracy("softmax", (AccuracyTable(2, (0.5,), (0.9,)),), tuple(map(short_hash, tested))).to_dict()
    fitted = json.loads(json.dumps(fitted))  # as in another process
    search = Search(criteria={"mine": fitted}, curves={"mine:2": [0.5]}, cost="layers", rounds=2)
    with pytest.raises(ValueError, match="of the calibrate and report parts before .1 by criteria, of 14"):
        calibrate_model(model, tokenizer, given, RiskTarget(0.9), USE, search)
    certificate = certificate_for(model, {"exit_criterion": fitted, "exit_threshold": 0.5, "exit_layers": [2]})
    with pytest.raises(ValueError, match="seen inputs of the verification before .1 by criteria, of 16"):
        verify_certificate(model, tokenizer, given, LOSSES["text_distance"], replace(certificate, loss=LOSS))
    model.seen_inputs = SeenInputs().plus("criteria", [one.source for one in Partition().split(given)["report"]])
    certificate = certificate_for(model, SETTING)
    with pytest.raises(ValueError, match="seen inputs of the verification before .2 by criteria, of 16"):
        verify_certificate(model, tokenizer, given, LOSSES["text_distance"], replace(certificate, loss=LOSS))


LOSS = {"name": "text_distance", "lower": 0.0, "upper": 1.0}


def test_what_was_seen_is_not_tested_on(monkeypatch):
    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "generate", lambda *args, **kwargs: pytest.fail("wrote"))
    what_was_seen_is_not_tested_on()


@pytest.mark.once
def test_the_law_notices(monkeypatch):
    class Written(Exception):
        pass

    def write(*args, **kwargs):
        raise Written

    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "generate", write)
    monkeypatch.setattr(SeenInputs, "refuse", lambda self, examples, what: None)
    with pytest.raises(Written):
        what_was_seen_is_not_tested_on()


# --- the ledger -----------------------------------------------------------------------------------------------------


def test_attempts_on_the_same_inputs_are_counted_in_order(tmp_path):
    one, two = [Example("a")], [Example("a"), Example("b")]
    first = Attempt.on(two, "salt", {"target": 0.1})
    second = Attempt.on(two[::-1], "salt", {"target": 0.2})
    ledger = Ledger(tmp_path)
    assert first.earlier(ledger.attempts) == 0
    ledger.add(first)
    assert first.earlier(ledger.attempts) == 0, "the same question again is the same test"
    assert second.earlier(ledger.attempts) == 1
    assert Attempt.on([Example("c")], "salt", {}).earlier(ledger.attempts) == 0
    for overlapping in (Attempt.on(one, "salt", {}), Attempt.on(two, "pepper", {"target": 0.1})):
        assert overlapping.earlier(ledger.attempts) == 1, "an input that both have is enough, whatever the salt"
    ledger.add(second)
    again = Ledger(tmp_path)
    assert again.attempts == [first, second] and first.earlier(again.attempts) == 0
    assert second.earlier(again.attempts) == 1


def test_folders_tell_each_other(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    attempts = [Attempt.on([Example("a")], "salt", {"target": target}) for target in (1, 2, 3)]
    Ledger(source).add(attempts[0])
    ledger = Ledger(source, out)
    ledger.add(attempts[1])
    assert not out.exists(), "a folder is not made before there is anything to save"
    out.mkdir()
    ledger.write()
    assert (out / LEDGER).read_text() == (source / LEDGER).read_text() and len(Ledger(out).attempts) == 2
    Ledger(out).add(attempts[2])
    assert Ledger(source, out).attempts == attempts


def test_runs_that_overlap_know_of_each_other(tmp_path):
    attempts = [Attempt.on([Example("a")], "salt", {"target": target}) for target in (1, 2)]
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    one.add(attempts[0])
    other.add(attempts[1])
    one.write()
    assert other.attempts == Ledger(tmp_path).attempts == attempts and attempts[1].earlier(other.attempts) == 1


def test_a_folder_that_may_not_be_written_to_is_read(tmp_path, monkeypatch):
    own, out = tmp_path / "own", tmp_path / "out"
    for folder in (own, out):
        folder.mkdir()
    attempts = [Attempt.on([Example("a")], "salt", {"target": target}) for target in (1, 2)]
    Ledger(own).add(attempts[0])
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != own)
    ledger = Ledger(own, out)
    ledger.add(attempts[1])
    assert attempts[1].earlier(ledger.attempts) == 1 and Ledger(out).attempts == attempts
    assert Ledger(own).attempts == attempts[:1]


def test_what_is_no_ledger_is_refused(tmp_path):
    for text, message in (
        ("nothing", "line 1: not JSON"),
        ('{"inputs": "a"}', "line 1: a ledger of certificates has .*: move the file away"),
        ('{"inputs": "a", "salt": "b", "question": "c"}', "line 1: a ledger of certificates has"),
        ('{"inputs": [1], "salt": "b", "question": "c"}', "line 1: a ledger of certificates has"),
        ('{"inputs": ["a"], "salt": "b", "question": null}', "line 1: a ledger of certificates has"),
    ):
        (tmp_path / LEDGER).write_text(text)
        with pytest.raises(ValueError, match=message):
            Ledger(tmp_path)


def attempts_are_counted(tmp_path) -> None:
    """Attempts are counted from the journal and from the ledger of the folder."""
    (model, tokenizer), given, targets = load_default(), examples(), (0.9, 0.8, 0.9)
    journal, folder = tmp_path / "journal", tmp_path / "checkpoint"
    folder.mkdir(parents=True)

    def made(target: float, search: Search = SEARCH, **kept) -> Certificate:
        return calibrate_model(model, tokenizer, given, RiskTarget(target), USE, search, **kept).certificate

    assert [made(target, path=journal).attempts for target in targets] == [0, 1, 0]
    assert made(0.7, path=journal, ledger=Ledger(folder)).attempts == 2
    assert made(0.7, ledger=Ledger(folder)).attempts == 2, "the folder was told what the journal knew"
    held = made(0.7, path=tmp_path / "another")
    assert held.attempts == 0, "as far as this journal knows"
    model.exit_certificate = held
    assert made(0.6).attempts == 1, "the model's own certificate is known without ledger and journal"
    model.exit_certificate = replace(model.exit_certificate, attempts=4)
    assert made(0.6, path=tmp_path / "a third").attempts == 5, "with those that it counts"
    model.exit_certificate = None
    assert made(0.9, replace(SEARCH, starts=2), path=journal).attempts == 3, "other starts are another test"
    text = replace(made(0.8, path=journal)).in_words()
    assert "inputs, or some of them, an earlier certificate was tested, which the confidence does not" in text


@pytest.mark.once
def test_attempts_are_counted(tmp_path):
    attempts_are_counted(tmp_path)


@pytest.mark.once
def test_a_run_that_is_cut_off_before_its_result_is_an_attempt(tmp_path, monkeypatch):
    (model, tokenizer), given = load_default(), examples()
    cut_off = partial(calibrate_model, model, tokenizer, given, RiskTarget(0.9), USE, SEARCH, ledger=Ledger(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_calibration._Calibrator, "_refuse_degenerate", interrupt)
        cut_off()
    assert len(Ledger(tmp_path).attempts) == 1
    assert cut_off().certificate.attempts == 0, "the same question again is the same test"
    other = calibrate_model(model, tokenizer, given, RiskTarget(0.8), USE, SEARCH, ledger=Ledger(tmp_path))
    assert other.certificate.attempts == 1


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.once
def test_the_count_of_attempts_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(model_calibration.Attempt, "earlier", lambda self, attempts: 0)
    with pytest.raises(AssertionError):
        attempts_are_counted(tmp_path)


# --- certificates in an older format --------------------------------------------------------------------------------


def test_a_certificate_without_a_salt_loads_and_says_so(tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    certificate = certificate_for(model, SETTING)
    values = json.loads(certificate.save(tmp_path).read_text())
    del values["partition"], values["attempts"]
    (tmp_path / FILE).write_text(json.dumps(values))
    old = Certificate.load(tmp_path / FILE)
    assert old.partition is None and old.attempts is None
    assert "The inputs were split without a salt" in old.in_words() != certificate.in_words()
    assert "salt" not in certificate.in_words()
