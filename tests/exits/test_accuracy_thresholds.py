"""Accuracy as confidence: tables by hand, one number for per-exit thresholds, and storage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.calibration.accuracy_fit import fit_exit_accuracy
from hf_earlyexit.calibration.model_calibration import DeploymentSettings, calibrate_model
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.calibration.search import Search
from hf_earlyexit.common.data import Example, short_hash
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.forced import force
from hf_earlyexit.exits.accuracy_thresholds import WRAPPED, AccuracyTable, ExitAccuracy, fit_accuracy
from hf_earlyexit.exits.criteria import CRITERIA
from hf_earlyexit.exits.separating import EQUALLY_SURE
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.generation.certificate import CertificateWarning
from tests import laws
from tests.certificates import certificate_for
from tests.evaluation.test_reliability import Numbers, texts_of
from tests.parts import drawn
from tests.tiny import NUM_LAYERS, tiny_inputs, tiny_pair


SURE, RIGHT = [0.9, 0.2, 0.4, 0.8, 0.4, 0.6], [0, 0, 1, 1, 0, 1]
TABLES = (AccuracyTable(2, (0.1, 0.5), (0.5, 0.9)), AccuracyTable(4, (0.3,), (0.8,)))


def fitted(**options) -> AccuracyTable:
    (table,) = fit_accuracy("softmax", {3: SURE}, {3: RIGHT}, **options).tables
    return table


# --- tables ---------------------------------------------------------------------------------------------------------


def test_tables_by_hand():
    """From 0.2 on 3 of 6 agree, from 0.4 on 3 of 5, from 0.6 on 2 of 3; from 0.8 and 0.9 on fewer again.

    A threshold is midway to the value before, which is 0 before the first.
    """
    low, middle, high = 0.2 / 2, (0.2 + 0.4) / 2, (0.4 + 0.6) / 2
    every = fitted(least_tokens=1, levels=None)
    assert every == AccuracyTable(3, (low, middle, high), (3 / 6, 3 / 5, 2 / 3))
    assert fitted(least_tokens=3, levels=None) == every
    assert fitted(least_tokens=4, levels=None) == AccuracyTable(3, (low, middle), (3 / 6, 3 / 5))
    assert fitted(least_tokens=1, levels=10) == AccuracyTable(3, (low, middle), (0.5, 0.6)), "two thirds are not 0.7"
    assert fitted(least_tokens=1, levels=1) == AccuracyTable(3, (), ())
    nobody = fit_accuracy("softmax", {3: SURE}, {3: [0] * 6}, least_tokens=1).tables[0]
    assert nobody == AccuracyTable(3, (), ()) and nobody.share(1.0) == 0 and nobody.threshold(0.01) is None
    assert [every.share(value) for value in (0.09, 0.2, 0.4, 0.6, 1.0)] == [0, 0.5, 0.6, 2 / 3, 2 / 3]
    own = every.confidences
    assert [every.threshold(value) for value in (0, 0.5, 0.51, 2 / 3, 0.7)] == [0, *own, None]


TOKENS = some.lists(some.tuples(some.integers(0, 8), some.booleans()), min_size=1, max_size=30)


@given(tokens=TOKENS, least=some.integers(1, 4), target=some.integers(1, 20))
def test_thresholds_are_the_smallest_with_the_rate(tokens, least, target):
    """For every target, the threshold is midway below the smallest confidence with that rate, and the share is at
    least the target exactly from there on."""
    least = min(least, len(tokens))
    sure, right = [value / 8 for value, _ in tokens], [agrees for _, agrees in tokens]
    table = fit_accuracy("softmax", {1: sure}, {1: right}, least_tokens=least, levels=None).tables[0]
    target = target / 20
    leaving = {at: [agrees for value, agrees in zip(sure, right) if value >= at] for at in sure}
    good = [at for at, left in leaving.items() if len(left) >= least and sum(left) / len(left) >= target]
    if not good:
        assert table.threshold(target) is None
    else:
        first = min(good)
        before = max((value for value in sure if value < first), default=None)
        if before is None:  # as far below as the next value's threshold is above
            gap = min((value for value in sure if value > first), default=first + 2 * EQUALLY_SURE) - first
            before = max(-first, first - gap)
        assert table.threshold(target) == pytest.approx((before + first) / 2, abs=1e-12)
    for confidence in sure:
        assert (table.share(confidence) >= target) == (bool(good) and confidence >= min(good))


# --- the law --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerLayer:
    """Confidence 1 from the exit's own threshold on, else 0; use with threshold 0.5."""

    criterion: object
    thresholds: dict

    def confidence(self, point):
        own = self.thresholds[point.layer]
        return (self.criterion.confidence(point).double() >= (math.inf if own is None else own)).double()


@pytest.fixture(scope="module")
def model():
    return tiny_pair("untied", 2)[1]


@pytest.mark.parametrize("criterion", WRAPPED)
def test_one_target_is_a_threshold_per_exit(criterion):
    config = EarlyExitConfig(classifier={"kind": "linear", "trained": True}) if criterion == "classifier" else None
    _, model = tiny_pair("untied", 2, early_exit=config)
    forced = force(Numbers(model, 4), [Example("")] * 4, texts_of(model), {criterion: CRITERIA[criterion]()})
    columns = forced.confidences[criterion].numpy().T
    said = dict(zip(forced.layers, columns))
    generator, depths = np.random.default_rng(0), set()
    agrees = {layer: generator.random(len(sure)) < 0.6 * sure + 0.3 for layer, sure in said.items()}
    fit = fit_accuracy(criterion, said, agrees, least_tokens=2)
    asked = CRITERIA[criterion]()
    for target in (0.34, 0.5, 0.605, 0.8, 0.95):
        own = PerLayer(asked, fit.thresholds_for(target))
        expected = laws.generate(model, tiny_inputs(4), exit_criterion=own, exit_threshold=0.5)
        output = laws.generate(model, tiny_inputs(4), exit_criterion=fit, exit_threshold=target)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.layers_run, expected.layers_run)
        depths |= set(output.layers_run.flatten().tolist())
    stored = laws.generate(model, tiny_inputs(4), exit_criterion=fit.to_dict(), exit_threshold=target)
    assert torch.equal(stored.sequences, output.sequences) and torch.equal(stored.layers_run, output.layers_run)
    assert len(depths - {0}) >= 3
    alone = laws.batch_equals_rows_alone(model, tiny_inputs(4), lambda row: fit, 0.51)
    assert (alone.layers_run > 0).any()


# --- from a model ---------------------------------------------------------------------------------------------------


def test_fitted_on_what_full_depth_writes():
    """The tables equal those counted by hand with the stock forward pass on the texts of full depth."""
    model, tokenizer = load_default()
    examples = drawn(default_examples(), explore=2, select=4)
    options = {"generation": {"max_new_tokens": 8}, "least_tokens": 5, "levels": None}
    found = fit_exit_accuracy(model, tokenizer, examples, "max_prob", exit_layers=[2, 6], batch_size=4, **options)
    assert found.criterion == "max_prob" and found.layers == [2, 6]
    assert model.seen_inputs.by == {"criteria": {short_hash(one) for one in examples}}
    sure, right = {2: [], 6: []}, {2: [], 6: []}
    for example in examples:
        inputs = tokenizer(example.source, return_tensors="pt")
        text = model.generate(**inputs, max_new_tokens=8, early_exit=False)
        with torch.no_grad():
            output = model(**inputs, decoder_input_ids=text[:, :-1], output_hidden_states=True, use_cache=False)
            for layer in sure:
                logits = model.lm_head(model.exit_head_input(layer, output.decoder_hidden_states[layer][0]))
                sure[layer] += logits.softmax(-1).amax(-1).tolist()
                right[layer] += (logits.argmax(-1) == output.logits[0].argmax(-1)).tolist()
    expected = fit_accuracy("max_prob", sure, right, least_tokens=5, levels=None)
    for one, other in zip(found.tables, expected.tables):
        assert one.shares == other.shares and one.confidences == pytest.approx(other.confidences, abs=1e-5)
    assert found.tables[0].shares[0] < found.tables[1].shares[0] and len(found.tables[0].shares) > 2


def test_patience_counts_the_exits_that_will_be_asked():
    model, tokenizer = load_default()
    options = {"generation": {"max_new_tokens": 8}, "least_tokens": 1, "exit_layers": [2, 6]}
    found = fit_exit_accuracy(model, tokenizer, drawn(default_examples(), select=4), "patience", **options)
    assert found.layers == [2, 6]
    assert set(found.tables[0].confidences) == {0.0} and set(found.tables[1].confidences) <= {0.0, 0.25}


# --- stored ---------------------------------------------------------------------------------------------------------


def test_plain_values_and_back():
    fit = ExitAccuracy("entropy", TABLES)
    values = fit.to_dict()
    assert ExitAccuracy.from_dict(json.loads(json.dumps(values))) == fit
    assert ExitSettings.merge({"exit_criterion": values, "exit_threshold": 0.9}, None, None).criterion == fit
    with pytest.raises(ValueError, match="`criterion` is an object.*cannot be stored: wrap one of"):
        replace(fit, criterion=CRITERIA["entropy"]()).to_dict()


def test_it_is_certified_saved_and_loaded_with_its_tables(tmp_path):
    _, model = tiny_pair("tied", 1, torch.float32)
    fit = ExitAccuracy("softmax", TABLES)
    setting = {"exit_criterion": fit.to_dict(), "exit_threshold": 0.8, "exit_layers": [2, 4]}
    model.certify(certificate_for(model, setting, max_new_tokens=6))
    model.save_pretrained(tmp_path)
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    expected = model.generate(**tiny_inputs(3), strict_certificate=True)
    assert torch.equal(loaded.generate(**tiny_inputs(3), strict_certificate=True), expected)
    call = setting | {"exit_criterion": fit, "strict_certificate": True}
    assert torch.equal(loaded.generate(**tiny_inputs(3), **call), expected), "the object is its plain values"
    many = AccuracyTable(2, tuple(np.linspace(0.1, 0.9, 50)), tuple(np.linspace(0.2, 1, 50)))
    for tables in ((TABLES[0], replace(TABLES[1], shares=(0.7,))), (many, TABLES[1])):
        other = ExitAccuracy("softmax", tables).to_dict()
        with pytest.warns(CertificateWarning, match="exit_criterion={'name': 'accuracy'.*certified") as caught:
            loaded.generate(**tiny_inputs(3), **setting | {"exit_criterion": other})
        assert len(str(caught[0].message)) < 800
    loaded.generation_config.exit_criterion = fit
    with pytest.raises(ValueError, match=r"`generation_config.exit_criterion` is an object.*set it to its `to_dict"):
        loaded.save_pretrained(tmp_path)


def test_it_is_calibrated_like_any_criterion():
    model, tokenizer = load_default()
    examples = drawn(default_examples(), select=12, calibrate=24, report=24)
    fit = ExitAccuracy("softmax", (AccuracyTable(2, (0.3, 0.6), (0.6, 0.9)), AccuracyTable(6, (0.2,), (0.9,))))
    search = Search(
        curves={"accuracy:2,6": [0.9, 0.5]}, criteria={"accuracy": fit.to_dict()}, order="threshold", cost="layers"
    )
    use = DeploymentSettings(generation={"max_new_tokens": 8})
    found = calibrate_model(model, tokenizer, examples, RiskTarget(0.5), use, search).certificate
    assert found.certified and found.setting["exit_criterion"] == fit.to_dict() == found.generation["exit_criterion"]
    assert found.name.startswith("accuracy:2,6 ") and found.setting["exit_layers"] == [2, 6]
    with pytest.raises(ValueError, match="`criteria` has 'softmax', which is a criterion already"):
        replace(search, criteria={"softmax": fit.to_dict()})
    for criteria, curves, message in (
        ({"accuracy:2": fit.to_dict()}, search.curves, "`criteria` has 'accuracy:2': choose a name without ':'"),
        ({"accuracy": fit.to_dict(), "other": fit.to_dict()}, search.curves, "has 'other', .* no curve of it"),
        ({"accuracy": fit.to_dict()}, None, r"has 'accuracy', and `curves` \[\] no curve of it"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(search, criteria=criteria, curves=curves)


# --- refused --------------------------------------------------------------------------------------------------------

VALUES = ExitAccuracy("softmax", TABLES).to_dict()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({"name": "accurate"}, "must be those of an `ExitAccuracy`.*got \\['name'\\] with the name 'accurate'"),
        (VALUES | {"criterion": "fixed"}, "`criterion` must be one of .*got 'fixed'"),
        (VALUES | {"criterion": 5}, "`criterion` must be one of .*got 5"),
        (VALUES | {"tables": None}, "`tables` of `exit_criterion` must be a list, got None"),
        (
            VALUES | {"tables": [{**VALUES["tables"][0], "shares": 0.1}]},
            "`confidences` and `shares` of a table must be",
        ),
        (VALUES | {"tables": []}, "`tables` must be of different layers, ascending, got layers \\[\\]"),
        (VALUES | {"tables": VALUES["tables"][::-1]}, "got layers \\[4, 2\\]"),
        (VALUES | {"tables": [{"layer": 2}]}, "`tables` of `exit_criterion` must be objects with"),
        (
            VALUES,
            "has accuracies for the exits \\[2, 4\\], but none for \\[1, 3, 5\\], which the call evaluates: pass",
        ),
    ],
)
def test_what_cannot_be_a_criterion(model, criterion, message):
    assert NUM_LAYERS == 6
    with pytest.raises(ValueError, match=message):
        model.generate(**tiny_inputs(1), exit_criterion=criterion, exit_threshold=0.5)


def test_patience_is_asked_where_it_was_fitted(model):
    """Accuracies of patience are refused at a subset of the fitted exit points, where its confidence differs."""
    call = {"exit_criterion": VALUES | {"criterion": "patience"}, "exit_threshold": 0.5}
    model.generate(**tiny_inputs(1), **call, exit_layers=[2, 4])
    with pytest.raises(ValueError, match="patience fitted for exit points \\[2, 4\\], but the call evaluates \\[4\\]"):
        model.generate(**tiny_inputs(1), **call, exit_layers=[4])


def test_a_wrapped_classifier_must_be_there(model):
    values = VALUES | {"criterion": "classifier"}
    with pytest.raises(ValueError, match="This model has no exit classifiers"):
        model.generate(**tiny_inputs(1), exit_criterion=values, exit_threshold=0.5, exit_layers=[2, 4])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((0, (), ()), "`layer` of a table must be a whole number from 1 on, got 0"),
        ((1, (0.5,), ()), "Layer 1 has 1 `confidences` and 0 `shares`"),
        ((1, (0.5, 0.4), (0.1, 0.2)), "`confidences` of layer 1 must ascend"),
        ((1, (0.5, 0.6), (0.2, 0.2)), "`shares` of layer 1 must ascend"),
        ((1, (0.5,), (1.2,)), "`shares` of layer 1 must be numbers in"),
    ],
)
def test_what_is_no_table(table, message):
    with pytest.raises(ValueError, match=message):
        AccuracyTable(*table)


@pytest.mark.parametrize(
    ("sure", "right", "options", "message"),
    [
        ({1: SURE}, {2: RIGHT}, {}, "`confidences` has layers \\[1\\] and `agrees` \\[2\\]"),
        ({1: SURE}, {1: RIGHT}, {}, "Layer 1 has 6 tokens, fewer than `least_tokens=50`"),
        ({1: SURE}, {1: RIGHT[:3]}, {"least_tokens": 1}, "must be of the same tokens, got shapes \\[6\\] and \\[3\\]"),
        ({1: [2.0]}, {1: [1]}, {"least_tokens": 1}, "`confidences` of layer 1 must be in \\[0, 1\\]"),
        ({1: [float("nan")]}, {1: [1]}, {"least_tokens": 1}, "`confidences` of layer 1 must be in \\[0, 1\\]"),
        ({1: [0.5]}, {1: [0.5]}, {"least_tokens": 1}, "`agrees` of layer 1 must be true or false"),
        ({1: SURE}, {1: RIGHT}, {"least_tokens": 0}, "`least_tokens` must be a whole number from 1 on"),
        ({1: SURE}, {1: RIGHT}, {"levels": 0}, "`levels` must be a whole number from 1 on"),
    ],
)
def test_what_cannot_be_fitted(sure, right, options, message):
    with pytest.raises(ValueError, match=message):
        fit_accuracy("softmax", sure, right, **options)


def test_what_cannot_be_fitted_from_a_model(model, monkeypatch):
    with pytest.raises(ValueError, match="`criterion` must be one of .*got 'fixed'"):
        fit_exit_accuracy(model, None, [Example("")], "fixed")
    with pytest.raises(ValueError, match="`examples` must have at least one"):
        fit_exit_accuracy(model, None, [])
    with pytest.raises(ValueError, match=r"`exit_layers=\[9\]` has \[9\], which are no exit points"):
        fit_exit_accuracy(model, None, [Example("")], exit_layers=[9])
    monkeypatch.setattr(model, "training", True)
    with pytest.raises(ValueError, match="`model` is in training mode"):
        fit_exit_accuracy(model, None, [Example("")])
