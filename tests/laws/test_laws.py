"""Laws 1 to 4 and 8 of the design on tiny random models; `test_mutations.py` has mutations that break them."""

from __future__ import annotations

import pytest
import torch

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.exits.criteria import CRITERIA
from tests import laws
from tests.tiny import FAMILIES, NUM_LAYERS, tiny_inputs, tiny_pair
from tests.watching import Recording, Scripted, pseudo_random_script, threshold_for


SEEDS = (0, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", (1, 4, 7))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_never_equals_stock(family, batch_size, dtype):
    for seed in SEEDS if batch_size == 4 else SEEDS[2:]:
        stock, model = tiny_pair.shared(family, seed, dtype)
        output = laws.never_equals_stock(stock, model, tiny_inputs(batch_size, seed), seed)
    if batch_size > 1:
        assert len(set((output.layers_run > 0).sum(1).tolist())) > 1, "no row ended before another"


@pytest.mark.parametrize("family", FAMILIES)
def test_never_equals_stock_beams_and_sampling(family):
    stock, model = tiny_pair.shared(family, 3)
    inputs = tiny_inputs(4, 3)
    laws.never_equals_stock(stock, model, inputs, num_beams=3, num_return_sequences=2)
    for kwargs in ({}, {"num_return_sequences": 3, "top_k": 20, "temperature": 1.3}):
        expected = sampled(laws.stock_generate, stock, inputs, **kwargs)
        output = sampled(laws.generate, model, inputs, **kwargs)
        assert torch.equal(output.sequences, expected.sequences)


def sampled(generate, model, inputs, **kwargs):
    torch.manual_seed(11)
    return generate(model, inputs, do_sample=True, **kwargs)


@pytest.mark.parametrize("schedule", ("constant", "calm", "calm_released"))
def test_never_is_never_under_every_schedule(schedule):
    stock, model = tiny_pair.shared("untied", 1)
    inputs = tiny_inputs(4, 1)
    expected = laws.stock_generate(stock, inputs)
    off = {"exit_criterion": "softmax", "exit_threshold": 0.0, "exit_schedule": schedule, "early_exit": False}
    assert torch.equal(laws.generate(model, inputs, **off).sequences, expected.sequences)
    never = {"exit_criterion": "softmax", "exit_threshold": None, "exit_schedule": schedule}
    assert torch.equal(laws.generate(model, inputs, **never).sequences, expected.sequences)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_fixed_exit_equals_cut_stock(family, dtype):
    """Law 2 for every layer once, over models of several seeds."""
    for seed in SEEDS:
        stock, model = tiny_pair.shared(family, seed, dtype)
        for layer in range(1 + seed, NUM_LAYERS + 1, len(SEEDS)):
            laws.fixed_exit_equals_cut_stock(stock, model, tiny_inputs(4, seed), layer, seed)
    laws.fixed_exit_equals_cut_stock(stock, model, tiny_inputs(3, seed), 2, seed, num_beams=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", (4, 7))
def test_batch_equals_rows_alone_under_scripts(family, batch_size):
    for seed in SEEDS if batch_size == 4 else SEEDS[:1]:
        _, model = tiny_pair.shared(family, seed)
        output = laws.scripted_batch_equals_rows_alone(model, seed, batch_size)
        laws.assert_not_vacuous(output)
        assert laws.longest_debt(output.layers_run, NUM_LAYERS) >= 2


@pytest.mark.parametrize("criterion", ("softmax", "max_prob", "entropy", "state", "patience"))
def test_batch_equals_rows_alone_under_criteria(criterion):
    depths = set()
    for seed in SEEDS:
        _, model = tiny_pair.shared("untied", seed)
        inputs = tiny_inputs(4, seed)
        threshold = threshold_for(model, inputs, CRITERIA[criterion](), 0.7, max_new_tokens=16)
        output = laws.batch_equals_rows_alone(model, inputs, lambda row: criterion, threshold, seed)
        depths |= set(output.layers_run.flatten().tolist())
    assert len(depths - {0}) >= 3


def test_batch_equals_rows_alone_with_beams():
    for seed in SEEDS[:2]:
        _, model = tiny_pair.shared("untied", seed)
        inputs = tiny_inputs(4, seed)
        threshold = threshold_for(model, inputs, laws.CRITERIA["softmax"], 0.8, max_new_tokens=16)
        output = laws.batch_equals_rows_alone(
            model, inputs, lambda row: "softmax", threshold, seed, num_beams=3, num_return_sequences=1
        )
        assert len(set(output.layers_run[output.layers_run > 0].tolist())) >= 3
        assert output.filled_positions.sum() >= 2


@pytest.mark.parametrize("criterion", ("softmax", "state"))
def test_batch_equals_rows_alone_or_tied_in_fp32(criterion):
    ties = []
    for seed in SEEDS[:2]:
        _, model = tiny_pair.shared("untied", seed, torch.float32)
        inputs = tiny_inputs(7, seed)
        threshold = threshold_for(model, inputs, laws.CRITERIA[criterion], 0.7, max_new_tokens=16)
        recording = Recording(laws.CRITERIA[criterion])
        batch = laws.generate(model, inputs, seed, exit_criterion=recording, exit_threshold=threshold)
        alone = [
            laws.generate(model, laws.one_row(inputs, row), seed, exit_criterion=criterion, exit_threshold=threshold)
            for row in range(7)
        ]
        ties += laws.assert_equal_or_tied(batch, alone, recording, threshold)
    assert ties == []


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_and_eager_follow_frozen_rows(family):
    for seed in SEEDS:
        stock, model = tiny_pair.shared(family, seed)
        script = pseudo_random_script(seed, NUM_LAYERS)
        lazy, eager = laws.follows_frozen_rows(stock, model, tiny_inputs(7, seed), script, seed)
        laws.assert_not_vacuous(lazy)
        assert laws.longest_debt(lazy.layers_run, NUM_LAYERS) >= 2
        assert eager.filled_positions.sum() > lazy.filled_positions.sum()


@pytest.mark.parametrize("criterion", ("softmax", "max_prob", "entropy", "state", "patience"))
def test_exits_of_a_criterion_replayed_follow_frozen_rows(criterion):
    depths = set()
    for seed in SEEDS:
        stock, model = tiny_pair.shared("tied", seed)
        inputs = tiny_inputs(4, seed)
        threshold = threshold_for(model, inputs, CRITERIA[criterion](), 0.7, max_new_tokens=16)
        output = laws.exits_replayed_follow_frozen_rows(stock, model, inputs, criterion, threshold, seed)
        depths |= set(output.layers_run.flatten().tolist())
    assert len(depths - {0}) >= 3


@pytest.mark.parametrize("rule", ("batch", "batch_joint"))
def test_batch_rules_follow_frozen_rows(rule):
    """All rows exit at the layer of the batch rule, and their tokens equal those of frozen rows that exit there."""
    stock, model = tiny_pair.shared("tied", 4)
    inputs, wish = tiny_inputs(4, 4), pseudo_random_script(4, NUM_LAYERS)
    kwargs = {"exit_criterion": Scripted(wish), "exit_threshold": 0.5, "batch_exit": rule, "ends": [96]}
    output = laws.generate(model, inputs, **kwargs)
    together = lambda row, position: max(wish(other, position) for other in range(4))  # noqa: E731
    expected = laws.follows_frozen_rows(stock, model, inputs, together, ends=[96])[0]
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.layers_run, expected.layers_run)


@pytest.mark.parametrize("rule, layer", (("row", None), ("batch", 4), ("batch_joint", NUM_LAYERS)))
def test_who_has_passed_stays_passed_in_batch_only(rule, layer):
    """Row 0 passes only after layer 2, row 1 only after layer 4: `"batch"` exits after 4, `"batch_joint"` never."""
    _, model = tiny_pair.shared("tied", 4)
    once = type(
        "Once",
        (),
        {"confidence": lambda self, point: torch.tensor([point.layer == 2 + 2 * row for row in point.rows]).double()},
    )()
    output = laws.generate(
        model, tiny_inputs(2, 4), exit_criterion=once, exit_threshold=1.0, batch_exit=rule, ends=None
    )
    assert [set(row) for row in output.layers_run.tolist()] == ([{2}, {4}] if layer is None else [{layer}] * 2)


def test_what_a_criterion_sees_is_what_the_stock_model_computes():
    """Hidden states, those of the layer below, logits and classifiers at every layer equal stock's own forward."""
    config = EarlyExitConfig(classifier=ClassifierConfig("mlp", shared=False, trained=True))
    stock, model = tiny_pair.shared("untied", 5, early_exit=config)
    inputs, seen = tiny_inputs(3, 5), {}

    class Looking:
        def confidence(self, point):
            seen[point.positions[0], point.layer] = point.hidden, point.previous, point.logits, point.exit_probability
            return torch.zeros(len(point.rows))

    output = laws.generate(model, inputs, exit_criterion=Looking(), exit_threshold=1.0, ends=[96], max_new_tokens=5)
    ids = output.sequences[:, :-1]
    states = stock(**inputs, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states
    for (position, layer), (hidden, previous, logits, probability) in seen.items():
        torch.testing.assert_close(hidden, states[layer][:, position])
        torch.testing.assert_close(previous, states[layer - 1][:, position])
        normed = stock.decoder.final_layer_norm(hidden)
        torch.testing.assert_close(logits, normed @ stock.lm_head.weight.T)
        inner, last = model.exit_heads.classifiers[str(layer)].inner, model.exit_heads.classifiers[str(layer)].output
        score = torch.relu(hidden @ inner.weight.T + inner.bias) @ last.weight[0] + last.bias
        torch.testing.assert_close(probability, torch.sigmoid(score))
    assert set(seen) == {(position, layer) for position in range(5) for layer in range(1, NUM_LAYERS)}


@pytest.mark.parametrize("criterion", ("softmax", "state", "patience", "fixed", "script", None))
@pytest.mark.parametrize("fill", ("lazy", "eager"))
def test_work_reported_is_work_executed(criterion, fill):
    _, model = tiny_pair.shared("deeper decoder", 5)
    inputs = tiny_inputs(7, 5)
    kwargs = {
        "softmax": {"exit_criterion": "softmax", "exit_threshold": 0.2},
        "state": {"exit_criterion": "state", "exit_threshold": 0.8},
        "patience": {"exit_criterion": "patience", "exit_threshold": 0.5},
        "fixed": {"exit_criterion": "fixed", "exit_layer": 2},
        "script": {"exit_criterion": Scripted(pseudo_random_script(5, NUM_LAYERS)), "exit_threshold": 0.5},
        None: {"early_exit": False},
    }[criterion]
    output = laws.work_is_what_ran(model, inputs, fill=fill, **kwargs)
    executed = (output.layers_run[:, :, None] >= torch.arange(1, NUM_LAYERS + 1)).sum(dim=(0, 1))
    assert torch.equal(executed, output.layer_rows)
    laws.work_is_what_ran(model, inputs, fill=fill, num_beams=2, **kwargs)


def test_rows_that_have_ended_run_nothing_and_hold_nobody_back():
    _, model = tiny_pair.shared("tied", 6)
    inputs = tiny_inputs(7, 6)
    output = laws.ended_rows_rest(
        model, inputs, exit_criterion=Scripted(lambda row, at: 2), exit_threshold=0.5, max_new_tokens=16
    )
    assert (output.layers_run == 0).any()
    # A row that always runs all layers keeps the others at full depth only until it has finished.
    outlived = 0
    for slow in range(7):
        script = Scripted(lambda row, at, slow=slow: NUM_LAYERS if row == slow else 1)
        joint = laws.generate(
            model, inputs, exit_criterion=script, exit_threshold=0.5, batch_exit="batch", max_new_tokens=16
        )
        ended = int((joint.layers_run[slow] > 0).sum())
        assert set(joint.layers_run[:, :ended].flatten().tolist()) <= {0, NUM_LAYERS}
        after = joint.layers_run[:, ended:]
        assert set(after.flatten().tolist()) <= {0, 1}
        outlived += after.numel() > 0
    assert outlived


@pytest.mark.parametrize("tokens, farthest", [(300, 150), pytest.param(1100, 600, marks=pytest.mark.slow)])
def test_many_tokens(tokens, farthest):
    """The arena and the relative bias grow several times, and positions missing for many steps are filled."""
    stock, model = tiny_pair.shared(
        "tied", 7, torch.float32, num_decoder_layers=3, relative_attention_max_distance=farthest
    )
    inputs = tiny_inputs(2, 7)
    script = lambda row, position: 3 if position % 67 == 66 else 1 + (position + row) % 2  # noqa: E731
    lazy, _ = laws.follows_frozen_rows(stock, model, inputs, script, max_new_tokens=tokens, ends=[])
    assert lazy.layers_run.shape == (2, tokens)
    assert lazy.cache.capacity >= tokens
    assert (lazy.layers_run > 0).all()
