"""Exit confidences are recorded only on request and correctly, and recording changes no output."""

from __future__ import annotations

import math

import pytest
import torch

from hf_earlyexit.decoding.recorded_run import RecordedRun, labelled_confidences
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.exits.criteria import CRITERIA
from tests import laws
from tests.tiny import ENDS, NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import Recording


SETTINGS = [
    {"exit_criterion": "softmax", "exit_threshold": 0.08},
    {"exit_criterion": "state", "exit_threshold": 0.75, "exit_layers": [2, 5]},
    {"exit_criterion": "patience", "exit_threshold": 0.5, "batch_exit": "batch"},
    {"exit_criterion": "softmax", "exit_threshold": 0.3, "exit_candidates": 4, "num_beams": 3},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda one: one["exit_criterion"])
def test_recording_changes_no_text_and_counts_its_work(setting):
    _, model = tiny_pair("untied", 1)
    plain = laws.generate(model, tiny_inputs(4, 1), 1, **setting)
    output = laws.generate(model, tiny_inputs(4, 1), 1, **setting, record_exits=True)
    assert torch.equal(output.sequences, plain.sequences) and torch.equal(output.layers_run, plain.layers_run)
    assert plain.asked_confidences is None and plain.asked_agreements is None
    assert output.asked_confidences.shape == (4, output.layers_run.shape[1], NUM_LAYERS - 1)
    asked = output.asked_confidences.isnan().logical_not()
    reached = output.layers_run[..., None] >= torch.arange(1, NUM_LAYERS)
    points = torch.tensor(
        [layer in setting.get("exit_layers", range(1, NUM_LAYERS)) for layer in range(1, NUM_LAYERS)]
    )
    assert torch.equal(asked, reached & points)
    known = output.asked_agreements.isnan().logical_not()
    assert torch.equal(known, asked & (output.layers_run == NUM_LAYERS)[..., None]) and known.any()
    if "num_beams" not in setting:
        assert int(output.head_rows[1:NUM_LAYERS].sum()) >= int(asked.sum())


@pytest.mark.parametrize("off", ({"exit_threshold": None}, {"early_exit": False}), ids=str)
def test_at_full_depth_everyone_is_asked_and_nobody_leaves(off):
    """The records are the criterion's confidences and whether the exit head agrees with the last layer."""
    stock, model = tiny_pair("tied", 3)
    recording, inputs = Recording(CRITERIA["max_prob"]()), tiny_inputs(4, 3)
    laws.generate(model, inputs, 3, exit_criterion=recording, exit_threshold=1.0)
    call = {"exit_criterion": "max_prob", "record_exits": True} | off
    output = laws.generate(model, inputs, 3, **call)
    assert torch.equal(output.sequences, laws.stock_generate(stock, inputs, 3).sequences)
    with torch.no_grad():
        options = {"decoder_input_ids": output.sequences[:, :-1], "output_hidden_states": True, "use_cache": False}
        forced = model(**inputs, **options)
    for row, depths in enumerate(output.layers_run.tolist()):
        for step, depth in enumerate(depths):
            for layer in range(1, NUM_LAYERS):
                confidence, agrees = (
                    float(one[row, step, layer - 1]) for one in (output.asked_confidences, output.asked_agreements)
                )
                if not depth:
                    assert math.isnan(confidence) and math.isnan(agrees)
                    continue
                assert confidence == pytest.approx(recording.seen[row, step, layer], abs=1e-6)
                hidden = model.exit_head_input(layer, forced.decoder_hidden_states[layer][row, step])
                assert agrees == float(model.lm_head(hidden).argmax() == forced.logits[row, step].argmax())
    confidences, agreed = labelled_confidences(output)
    assert len(confidences) == len(agreed) == 5 * int((output.layers_run > 0).sum()) and 0 < sum(agreed) < len(agreed)
    assert labelled_confidences(output, layer=2)[0] == output.asked_confidences[..., 1][output.layers_run > 0].tolist()
    assert len(set((output.layers_run > 0).sum(1).tolist())) > 1 and ENDS


def test_a_run_is_watched_only_where_it_is_asked_for(monkeypatch):
    _, model = tiny_pair("tied", 0)
    monkeypatch.setattr(RecordedRun, "__init__", lambda *args: pytest.fail("a run was watched"))
    laws.generate(model, tiny_inputs(2), exit_criterion="softmax", exit_threshold=0.3)
    assert ExitRun.see_logits(None, None) is None


def test_prepared_and_stored():
    _, model = tiny_pair("untied", 1)
    call = {"exit_criterion": "softmax", "exit_threshold": 0.08, "record_exits": True}
    expected = laws.generate(model, tiny_inputs(4, 1), 1, **call)
    for name, value in call.items():
        setattr(model.generation_config, name, value)
    output = laws.generate(model.prepare_for_generation(), tiny_inputs(4, 1), 1)
    for name in ("asked_confidences", "asked_agreements"):
        torch.testing.assert_close(output[name], expected[name], equal_nan=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"record_exits": True}, "`record_exits=True` needs an `exit_criterion` that has a confidence, got None"),
        ({"record_exits": True, "exit_criterion": "fixed", "exit_layer": 2}, "has a confidence, got 'fixed'"),
        ({"record_exits": "yes"}, "`record_exits` must be True or False, got 'yes'"),
        ({"record_exits": True, "exit_criterion": "classifier", "early_exit": False}, "has no exit classifiers"),
        ({"record_exits": True, "exit_criterion": "state", "early_exit": False, "use_cache": False}, "`use_cache=Fal"),
    ],
)
def test_what_cannot_be_recorded(call, message):
    _, model = tiny_pair("tied", 0)
    with pytest.raises(ValueError, match=message):
        model.generate(**tiny_inputs(1), **call)


def test_what_was_not_recorded():
    _, model = tiny_pair("tied", 0)
    with pytest.raises(ValueError, match="`output` has no recorded exits: pass `record_exits=True`"):
        labelled_confidences(laws.generate(model, tiny_inputs(1)))


def test_exits_that_were_not_asked_have_nothing_to_tell():
    _, model = tiny_pair("tied", 0)
    call = {"exit_criterion": "softmax", "exit_layers": [2, 4], "early_exit": False, "record_exits": True}
    output = laws.generate(model, tiny_inputs(1), **call)
    assert labelled_confidences(output, 4)[0]
    for layer in (0, 3, 6):
        with pytest.raises(ValueError, match=f"`layer={layer}` is not an exit point that was evaluated"):
            labelled_confidences(output, layer)
