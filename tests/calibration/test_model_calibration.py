"""From inputs to a certificate: tested texts equal those of direct calls, and the chosen setting passed its test."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.calibration.deployment import DeploymentSettings
from hf_earlyexit.calibration.loss_table import LossTable
from hf_earlyexit.calibration.model_calibration import NONE_FASTER, NONE_SAFE, calibrate_model
from hf_earlyexit.calibration.risk_control import calibrate
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.calibration.search import Search, pareto_front
from hf_earlyexit.common.data import Example
from hf_earlyexit.decoding.candidates import Candidate
from hf_earlyexit.evaluation.metrics import rouge_scores, textual_consistency
from hf_earlyexit.families.shipped import default_examples, load_default
from hf_earlyexit.families.t5.stock import stock_of
from hf_earlyexit.generation.certificate import FILE
from tests.parts import drawn


DECODING = {"max_new_tokens": 8}
CURVES = {"softmax:2,4,6": [0.5, 0.9], "classifier": [0.9, 0.5]}
USE = DeploymentSettings(generation=DECODING)
SEARCH = Search(curves=CURVES, order="threshold", cost="layers")
LAX = RiskTarget(0.5)


@pytest.fixture(scope="module")
def shipped():
    return load_default()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return drawn(default_examples(), select=12, calibrate=24, report=24)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A journal of texts of full depth and settings under `USE`, which do not depend on target, loss or order."""
    return tmp_path_factory.mktemp("calibration") / "journal"


@pytest.fixture(scope="module")
def found(shipped, examples, written):
    return calibrate_model(*shipped, examples, LAX, USE, SEARCH, path=written, data_name="some")


def texts_of(shipped, examples, **keywords) -> list[str]:
    model, tokenizer = shipped
    batch = tokenizer([one.source for one in examples], return_tensors="pt", padding=True)
    return tokenizer.batch_decode(model.generate(**batch, **DECODING, **keywords), skip_special_tokens=True)


def losses_of(shipped, examples, setting) -> list[float]:
    early, full = texts_of(shipped, examples, **setting), texts_of(shipped, examples, early_exit=False)
    return [1 - textual_consistency(*pair) for pair in zip(early, full)]


def test_what_is_tested_is_what_direct_calls_write(shipped, examples, found):
    certificate, parts = found.certificate, SEARCH.partition.split(examples)
    assert {name: len(part) for name, part in parts.items()} == certificate.split["counts"]
    assert certificate.split["counts"] == {"explore": 0, "select": 12, "calibrate": 24, "report": 24}
    assert certificate.n == 24 and certificate.partition == SEARCH.partition.described()
    losses = np.array(
        [losses_of(shipped, parts["calibrate"], one.keywords) for one in found.tables["calibrate"].candidates]
    )
    np.testing.assert_allclose(found.tables["calibrate"].losses, losses.T)
    costs = [row["cost"] for row in certificate.table]
    by_hand = calibrate(losses.T, costs, target=0.5)
    assert [row["mean"] for row in certificate.table] == pytest.approx(by_hand.means)
    assert [row["p_value"] for row in certificate.table] == pytest.approx(by_hand.p_values)
    assert certificate.name == certificate.table[by_hand.index]["name"] and certificate.certified
    assert certificate.risk["mean"] == by_hand.means[by_hand.index]
    report = losses_of(shipped, parts["report"], certificate.setting)
    assert certificate.report["mean"] == pytest.approx(np.mean(report)) and certificate.report["n"] == 24
    assert certificate.report["low"] < certificate.report["mean"] < certificate.report["high"]


def test_costs_are_of_the_select_part_and_the_best_curve_goes_on(found):
    """Both curves are good enough there; the one with the cheapest setting is tested, conservative first."""
    select = found.tables["select"]
    assert (select.losses.mean(axis=0) <= 0.5).all()
    cheapest = select.candidates[int(select.layers.argmin())].curve
    assert {row["curve"] for row in found.certificate.table} == {cheapest}
    thresholds = [row["threshold"] for row in found.certificate.table]
    assert thresholds == sorted(thresholds, reverse=True)
    costs = dict(zip(select.names, select.layers))
    assert all(row["cost"] == pytest.approx(costs[row["name"]]) for row in found.certificate.table)


def test_a_curve_that_is_too_bad_on_the_select_part_is_passed_over(shipped, examples, written):
    """The eager curve is cheaper, but none of its settings is good enough."""
    curves = {"softmax:1": [0.0], "classifier": [0.98]}
    search = replace(SEARCH, curves=curves)
    certificate = calibrate_model(*shipped, examples, RiskTarget(0.3), USE, search, path=written).certificate
    assert {row["curve"] for row in certificate.table} == {"classifier"}


def test_pareto_order_tests_all_curves_as_one_with_all_of_delta(shipped, examples, written):
    """From smallest loss to smallest cost on the select part; settings beaten in both are not tested."""
    search = replace(SEARCH, order="pareto")
    found = calibrate_model(*shipped, examples, RiskTarget(0.4), USE, search, path=written)
    select, rows = found.tables["select"], found.certificate.table
    points = dict(zip(select.names, zip(select.losses.mean(axis=0), select.layers)))
    tested = [points[row["name"]] for row in rows]
    assert tested == sorted(tested) and [cost for _, cost in tested] == sorted(
        (cost for _, cost in tested), reverse=True
    )
    for name, (loss, cost) in points.items():
        beaten = any(other[0] <= loss and other[1] <= cost for key, other in points.items() if key != name)
        assert beaten != (name in [row["name"] for row in rows])
    assert 1 < len(rows) < 4 and len({row["curve"] for row in rows}) == 2
    losses = found.tables["calibrate"].losses
    by_hand = calibrate(losses, [row["cost"] for row in rows], target=0.4, delta=0.1)
    assert [row["upper_bound"] for row in rows] == pytest.approx(by_hand.upper_bounds)
    assert [row["accepted"] for row in rows] == [place < by_hand.accepted for place in range(len(rows))]


def test_pareto_front_by_hand():
    names = ["a", "b", "c", "d", "e", "f"]
    candidates = [Candidate(name) for name in names]
    losses = np.array([[0.1, 0.0, 0.2, 0.2, 0.3, 0.4]])
    table = LossTable(candidates, ["unit"], losses, np.zeros(6))
    costs = dict(zip(names, [0.8, 1.2, 0.9, 0.7, 0.7, 0.1]))
    assert [one.name for one in pareto_front(table, costs, below=1.0)] == ["a", "d", "f"]
    assert pareto_front(table, costs, below=0.1) == []


def test_several_finalists_share_delta(shipped, examples, written):
    search = replace(SEARCH, finalists=2)
    found = calibrate_model(*shipped, examples, RiskTarget(0.4), USE, search, path=written)
    names = [row["name"] for row in found.certificate.table]
    assert len({row["curve"] for row in found.certificate.table}) == 2 and len(names) == 4
    for curve in CURVES:
        rows = [row for row in found.certificate.table if row["curve"] == curve]
        costs = [row["cost"] for row in rows]
        losses = found.tables["calibrate"].of_curve(curve).losses
        by_hand = calibrate(losses, costs, target=0.4, delta=0.05)
        assert [row["accepted"] for row in rows] == [place < by_hand.accepted for place in range(len(rows))]
        assert [row["upper_bound"] for row in rows] == pytest.approx(by_hand.upper_bounds)
    accepted = [row for row in found.certificate.table if row["accepted"]]
    assert found.certificate.risk["cost"] == min(row["cost"] for row in accepted)


def test_reference_losses_are_signed_and_of_all_references(shipped, examples, written):
    found = calibrate_model(*shipped, examples, RiskTarget(0.5, "rougeL_drop"), USE, SEARCH, path=written)
    part = SEARCH.partition.split(examples)["calibrate"]
    candidate = found.tables["calibrate"].candidates[-1]
    pairs = zip(texts_of(shipped, part, early_exit=False), texts_of(shipped, part, **candidate.keywords), part)
    rouge = lambda text, one: rouge_scores(text, one.references)["rougeL"]  # noqa: E731
    expected = [rouge(full, one) - rouge(early, one) for full, early, one in pairs]
    np.testing.assert_allclose(found.tables["calibrate"].column(candidate), expected)
    assert min(expected) < 0 < max(expected)
    assert found.certificate.loss["against"] == "references" and found.certificate.loss["lower"] == -1


class Lossy:
    """A loss that is not 0 for equal texts."""

    name, description, lower, upper, needs_references, binary = "lossy", "what is not", 0.0, 1.0, False, False

    def of(self, early, full, references) -> float:
        return 0.5


class Cut(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_and_comes_to_the_same(shipped, examples, found, tmp_path, monkeypatch):
    model, tokenizer = shipped
    kind, calls, journal = type(model), [], tmp_path / "journal"
    generate = kind.generate

    def counting(limit):
        def call(self, *args, **kwargs):
            if len(calls) >= limit:
                raise Cut
            calls.append(1)
            return generate(self, *args, **kwargs)

        return call

    ask = (model, tokenizer, examples, LAX, USE, SEARCH)
    monkeypatch.setattr(kind, "generate", counting(7))
    with pytest.raises(Cut):
        calibrate_model(*ask, path=journal)
    monkeypatch.setattr(kind, "generate", counting(1000))
    resumed = calibrate_model(*ask, path=journal, data_name="some").certificate
    assert resumed == found.certificate
    batches = len(calls)
    assert calibrate_model(*ask, path=journal, data_name="some").certificate == resumed and len(calls) == batches
    with pytest.raises(ValueError, match="entries of another run: max_new_tokens differ"):
        calibrate_model(
            model, tokenizer, examples, LAX, DeploymentSettings(generation={"max_new_tokens": 9}), SEARCH, path=journal
        )


def test_a_journal_of_other_exits_is_refused(shipped, examples, tmp_path):
    """Shared heads have no weights, so only the built-in exit configuration distinguishes the models."""
    heads = {layers: load_default(EarlyExitConfig(exit_layers=layers, heads="shared"))[0] for layers in ((2, 4), (7,))}
    search, journal = replace(SEARCH, curves={"softmax": [0.5]}), tmp_path / "journal"
    calibrate_model(heads[2, 4], shipped[1], examples, LAX, USE, search, path=journal)
    with pytest.raises(ValueError, match="entries of another run: built in differ"):
        calibrate_model(heads[7,], shipped[1], examples, LAX, USE, search, path=journal)


def test_as_many_units_as_are_needed_are_not_always_enough():
    """Hoeffding-Bentkus rounds: with signed losses 88 units suffice and 89 do not; checked before any work."""
    promise, parts = RiskTarget(0.2, "rougeL_drop", bound="hb"), {"calibrate": [Example("a", ("b",))]}
    promise.check(parts, 88, 1)
    with pytest.raises(ValueError, match="has 89 units.*even at zero loss"):
        promise.check(parts, 89, 1)


def test_time_is_measured_once_beside_stock(shipped, examples, tmp_path):
    search = replace(SEARCH, cost="time", rounds=2, curves={"softmax:4": [0.0]})
    ask = (*shipped, examples, RiskTarget(0.9), USE, search)
    first = calibrate_model(*ask, path=tmp_path / "journal").certificate
    assert first.cost == {"name": "time", "unit": "of stock's time, batch 1"}
    assert 0.2 < first.risk["cost"] < 1
    assert calibrate_model(*ask, path=tmp_path / "journal").certificate == first


SETTINGS = [
    ("softmax", "constant"),
    ("state", "calm"),
    ("classifier", "calm_released"),
    ("entropy", {"name": "calm", "tau": 1.0}),
    ("max_prob", "constant"),
]


@pytest.mark.parametrize(("criterion", "schedule"), SETTINGS, ids=[name for name, _ in SETTINGS])
def test_what_certifies_nothing_falls_back_to_full_depth(shipped, examples, criterion, schedule, tmp_path):
    """Outputs equal full depth's token for token, also after save and load.

    The only setting exits immediately and has nearly the largest loss.
    """
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    search = replace(SEARCH, curves={f"{criterion}:1,2": [0.0]})
    use = DeploymentSettings(generation=DECODING, exits={"exit_schedule": schedule})
    certificate = calibrate_model(model, tokenizer, examples, RiskTarget(0.2), use, search).certificate
    assert not certificate.certified and certificate.reason == NONE_SAFE
    assert certificate.risk is None and certificate.report is None and not certificate.table[0]["accepted"]
    model.generation_config.exit_criterion, model.generation_config.exit_threshold = "softmax", 0.1
    model.certify(certificate)
    model.save_pretrained(tmp_path)
    loaded = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = tokenizer([one.source for one in examples[:8]], return_tensors="pt", padding=True)
    expected = stock_of(shipped[0]).generate(**batch, **DECODING)
    for one in (model, loaded):
        output = one.generate(**batch, strict_certificate=True, return_dict_in_generate=True)
        assert torch.equal(output.sequences, expected) and set(output.layers_run.unique().tolist()) <= {0, 8}
    assert (tmp_path / FILE).exists() and not loaded.exit_certificate.certified
    with pytest.raises(ValueError, match="no setting but full depth keeps the target"):
        loaded.generate(**batch, exit_criterion="softmax", exit_threshold=0.9, strict_certificate=True)


def test_candidates_are_part_of_the_use(shipped, examples):
    use = replace(USE, exits={"exit_candidates": 16})
    search = replace(SEARCH, curves={"softmax:2,4,6": [0.5], "state:4": [0.99]})
    found = calibrate_model(*shipped, examples, LAX, use, search)
    by_curve = {one.curve: one.keywords.get("exit_candidates") for one in found.tables["select"].candidates}
    assert by_curve == {"softmax:2,4,6": 16, "state:4": None}
    certificate = found.certificate
    assert certificate.certified
    assert certificate.generation["exit_candidates"] == certificate.setting.get("exit_candidates")
    with pytest.raises(ValueError, match="`exit_candidates=16` goes with none of the curves \\['state'\\]: leave"):
        calibrate_model(*shipped, examples, LAX, use, replace(SEARCH, curves={"state": [0.9]}))


@pytest.mark.parametrize("rule", ["batch", "batch_joint"])
def test_fallback_under_the_rules_of_batches(shipped, examples, rule):
    use = DeploymentSettings(batch_size=2, exits={"batch_exit": rule}, generation=DECODING)
    search = replace(SEARCH, curves={"softmax:1": [0.0]})
    certificate = calibrate_model(*shipped, examples, RiskTarget(0.25), use, search).certificate
    assert certificate.setting == {"early_exit": False} and certificate.unit == "batch of 2 inputs"


def test_what_costs_no_less_than_full_depth_is_not_used(shipped, examples, written):
    search = replace(SEARCH, curves={"softmax:7": [1.0]})
    certificate = calibrate_model(*shipped, examples, LAX, USE, search, path=written).certificate
    assert not certificate.certified and certificate.reason == NONE_FASTER and certificate.table[0]["accepted"]
    search = replace(search, order="pareto")
    pareto = calibrate_model(*shipped, examples, LAX, USE, search, path=written).certificate
    assert not pareto.certified and pareto.reason == NONE_FASTER and pareto.table == []


def test_a_batch_is_one_unit_where_rows_wait(shipped, examples):
    use = DeploymentSettings(batch_size=3, exits={"batch_exit": "batch"}, generation=DECODING)
    search = replace(SEARCH, curves={"softmax:2,4,6": [0.5]})
    given = drawn(default_examples(), select=5, calibrate=49)
    found = calibrate_model(*shipped, given, RiskTarget(0.8), use, search)
    part = search.partition.split(given)["calibrate"]
    assert len(part) == 49 and found.certificate.n == 16 and found.certificate.unit == "batch of 3 inputs"
    third = part[6:9]
    expected = np.mean(losses_of(shipped, third, found.certificate.setting))
    assert found.tables["calibrate"].losses[2, 0] == pytest.approx(expected)
    assert found.certificate.generation["batch_size"] == 3 and found.certificate.report is None


def test_groups_are_units(shipped, examples):
    pairs = [replace(one, group=f"pair {place // 2}") for place, one in enumerate(default_examples()[:120])]
    pairs = drawn(pairs, select=4, calibrate=24)
    search = replace(SEARCH, curves={"softmax:2,4,6": [0.5]})
    found = calibrate_model(*shipped, pairs, RiskTarget(0.8), USE, search)
    assert found.certificate.n == 12 and found.certificate.unit == "group of inputs"
    unit = found.tables["calibrate"].units[0]
    members = [one for one in pairs if one.group == unit]
    expected = np.mean(losses_of(shipped, members, found.certificate.setting))
    assert found.tables["calibrate"].losses[0, 0] == pytest.approx(expected)


def test_conformal_risk_control_has_no_delta(shipped, examples, written):
    promise = replace(LAX, method="crc")
    certificate = calibrate_model(*shipped, examples, promise, USE, SEARCH, path=written).certificate
    assert certificate.certified and certificate.delta is None and certificate.bound is None
    assert certificate.table[0]["p_value"] is None and certificate.in_words().startswith("In expectation over")


def test_the_model_is_left_as_it_is_and_what_it_stores_plays_no_part(shipped, examples, found):
    model, tokenizer = copy.deepcopy(shipped[0]), shipped[1]
    stored = {"exit_criterion": "state", "exit_threshold": 0.1, "batch_exit": "batch", "exit_schedule": "calm"}
    for name, value in stored.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    certificate = calibrate_model(model, tokenizer, examples, LAX, USE, SEARCH, data_name="some").certificate
    assert certificate == replace(found.certificate, attempts=None)  # without journal and ledger, no count
    assert model.generation_config.to_dict() == before and model.exit_certificate is None


REFUSED = [
    ({"promise": RiskTarget(0.1), "training": True}, "`model` is in training mode"),
    ({"promise": RiskTarget(0.5, Lossy())}, "`loss='lossy'` must be 0 where both texts are equal, got 0.5"),
    ({"examples": 20}, "calibrate part has 8 units, of 20 inputs.*even at zero loss. 25 are needed"),
    ({"promise": RiskTarget(0.05)}, "`target=0.05` with `delta=0.1` by 'wsr' even at zero loss. [0-9]+ are needed"),
    (
        {"promise": RiskTarget(0.09), "search": Search(curves=CURVES, order="threshold", finalists=2)},
        "over 2 curves by 'wsr'",
    ),
    ({"promise": RiskTarget(0.03, method="crc")}, "`target=0.03` even at zero loss. 33 are needed"),
    (
        {"promise": RiskTarget(0.5, method="crc"), "search": Search(curves=CURVES, order="threshold", finalists=2)},
        "`finalists=2`.*no delta",
    ),
    ({"use": DeploymentSettings(generation={"do_sample": True})}, "`do_sample=True` cannot be calibrated"),
    ({"use": DeploymentSettings(generation={"max_tokens": 3})}, "`generation` has 'max_tokens', which is no setting"),
    ({"use": DeploymentSettings(exits={"batch_exit": "rows"})}, "`batch_exit` must be one of"),
    ({"search": Search(curves={"softmx": [0.5]})}, "got 'softmx'"),
    ({"search": Search(curves={"softmax:9": [0.5]})}, "no exit points of this model"),
    ({"search": Search(curves={"softmax": []})}, "'softmax' has no threshold"),
    ({"search": Search(curves={"softmax": [1.5]})}, "in \\[0, 1\\], got 1.5"),
    ({"draw": {"calibrate": 54, "report": 6}}, "A part has not one unit: of .*'select': 0"),
    (
        {"use": DeploymentSettings(4, {"batch_exit": "batch"}), "draw": {"select": 3, "calibrate": 54}},
        "A part has not one unit: of .*'select': 3",
    ),
    (
        {"use": DeploymentSettings(4, {"batch_exit": "batch"}), "draw": {"select": 6, "calibrate": 54, "report": 3}},
        "A part has not one unit: of .*'report': 3",
    ),
    ({"repeat": True}, "repeats 1 of 61 inputs"),
    ({"references": False, "promise": RiskTarget(0.5, "rougeL_drop")}, "needs references, and the input 'describe"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_calibrated_is_refused_before_any_work(shipped, examples, changes, message, monkeypatch):
    model, tokenizer = shipped
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("something was generated"))
    monkeypatch.setattr(model, "training", changes.get("training", False))
    given = drawn(default_examples(), **changes["draw"]) if "draw" in changes else examples
    given = given[: changes.get("examples")]
    given = given + given[:1] if changes.get("repeat") else given
    given = given if changes.get("references", True) else [replace(one, references=()) for one in given]
    promise, use = changes.get("promise", RiskTarget(0.1)), changes.get("use", USE)
    with pytest.raises(ValueError, match=message):
        calibrate_model(model, tokenizer, given, promise, use, changes.get("search", SEARCH))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": "watts"}, r"`cost` must be one of \['time', 'layers'\], got 'watts'"),
        ({"order": "random"}, r"`order` must be one of \['pareto', 'threshold'\], got 'random'"),
        ({"finalists": 2}, "`finalists=2` goes with `order='threshold'`"),
        ({"finalists": 0, "order": "threshold"}, "`finalists` must be a whole number of at least 1, got 0"),
        ({"rounds": 1}, "`rounds`.*at least 2, got 1"),
    ],
)
def test_searches_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        Search(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeploymentSettings(exits={"exit_criterion": "state"}), "`exits` may have .*got 'exit_criterion'"),
        (lambda: DeploymentSettings(exits={"early_exit": False}), "`exits` may have .*got 'early_exit'"),
        (lambda: DeploymentSettings(batch_size=0), "`batch_size` must be a whole number of at least 1, got 0"),
        (lambda: DeploymentSettings(max_source_tokens=0), "`max_source_tokens`.*got 0"),
        (lambda: RiskTarget(0.1, len), "`loss` must be one of .* or an object with"),
        (lambda: RiskTarget(0.1, bound="clopper_pearson"), "`bound='clopper_pearson'` is for losses of 0 and 1"),
    ],
)
def test_uses_and_promises_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_exact_bounds_are_of_single_inputs(shipped, examples):
    promise = RiskTarget(0.5, "text_mismatch", bound="clopper_pearson")
    pairs = [replace(one, group=f"pair {place // 2}") for place, one in enumerate(examples)]
    with pytest.raises(ValueError, match="does not go with units of several inputs"):
        calibrate_model(*shipped, pairs, promise, USE, SEARCH)
