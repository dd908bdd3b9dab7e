"""Shortcuts against `numpy.linalg.lstsq` on collected hidden states, and what a fit must not change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.evaluation.intervals import ratio_interval
from hf_earlyexit.families.t5.stock import stock_of
from hf_earlyexit.training.shortcuts import Sums, fit_shortcuts, measure_shortcuts, with_full_depth_labels
from tests import laws
from tests.tiny import ENDS, VOCABULARY, tiny_inputs, tiny_pair, unrest


WIDTH = 32
EXITS = EarlyExitConfig((1, 3, 4, 5), ("shortcut", "norm", "shortcut", "shortcut"))
FITTED = (1, 4, 5)


def tiny(seed: int = 0, dtype=torch.float64, early_exit: EarlyExitConfig = EXITS, family: str = "tied", **changes):
    return tiny_pair(family, seed, dtype, early_exit, **changes)[1]


def labelled(count: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """One batch: padded sources, and texts of 3 to 9 tokens, some of them with an unlabelled token in the middle."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, VOCABULARY, (count, 9), generator=generator)
    lengths = 3 + torch.arange(count) % 7
    labels[torch.arange(9) >= lengths[:, None]] = -100
    labels[::3, 1] = -100
    inputs = tiny_inputs(11, seed)
    return {**{name: tensor[torch.arange(count) % 11] for name, tensor in inputs.items()}, "labels": labels}


def split(batch: dict[str, torch.Tensor], sizes: list[int]) -> list[dict[str, torch.Tensor]]:
    parts = {name: tensor.split(sizes) for name, tensor in batch.items()}
    return [dict(zip(parts, values)) for values in zip(*parts.values())]


@torch.no_grad()
def states_of(model, batch) -> list[np.ndarray]:
    """Hidden states after 0, 1, ... layers, `[labelled tokens, hidden]`, the last layer's before the final norm.

    Computed by the stock model with the same weights, with its final norm removed.
    """
    stock = stock_of(model)
    stock.decoder.final_layer_norm = nn.Identity()
    states = stock(**batch, output_hidden_states=True).decoder_hidden_states
    mask = batch["labels"] != -100
    return [one[mask].double().numpy() for one in states]


def maps_of(model) -> dict[int, torch.Tensor]:
    return {layer: model.exit_heads.heads[str(layer)].map.weight.detach().clone() for layer in FITTED}


def fit(model, *batches, **options):
    return fit_shortcuts(model, batches, progress=False, **options)


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def own_hooks(model) -> list:
    """Hooks of this package; the library's stay after hidden states were requested once."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if hook.__module__.startswith("hf_earlyexit")]


# --- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_maps_are_those_of_lstsq(seed):
    """`lstsq` sees all labelled states at once; R² of the map and of the state itself match too."""
    model, batch = tiny(seed), labelled(seed=seed)
    states = states_of(model, batch)
    found = fit(model, *split(batch, [5, 1, 18]))
    assert found.tokens == len(states[0]) == int((batch["labels"] != -100).sum()) > 3 * WIDTH
    for layer in FITTED:
        expected = np.linalg.lstsq(states[layer], states[-1], rcond=None)[0].T
        np.testing.assert_allclose(maps_of(model)[layer].numpy(), expected, rtol=1e-8, atol=1e-8)
        variance = ((states[-1] - states[-1].mean(axis=0)) ** 2).sum()
        guesses = {"r2": states[layer] @ expected.T, "lens_r2": states[layer]}
        for name, guess in guesses.items():
            error = ((states[-1] - guess) ** 2).sum()
            assert getattr(found, name)[layer] == pytest.approx(1 - error / variance, abs=1e-9)
        assert found.r2[layer] > found.lens_r2[layer]


def test_ridge_draws_towards_the_identity():
    """Ridge equals additional rows of least squares, scaled per coordinate; a strong ridge gives the logit lens."""
    batch, ridge = labelled(), 0.3
    model = tiny()
    states = states_of(model, batch)
    fit(model, batch, ridge=ridge)
    for layer in FITTED:
        sizes = np.sqrt(ridge * (states[layer] ** 2).sum(axis=0))
        rows = np.concatenate([states[layer], np.diag(sizes)])
        targets = np.concatenate([states[-1], np.diag(sizes)])
        expected = np.linalg.lstsq(rows, targets, rcond=None)[0].T
        np.testing.assert_allclose(maps_of(model)[layer].numpy(), expected, rtol=1e-8, atol=1e-8)
    fit(model, batch, ridge=1e9)
    torch.testing.assert_close(maps_of(model)[4], torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-6)


def test_batches_may_be_cut_anyhow():
    batch, maps = labelled(), []
    for sizes in ([24], [1] * 24, [7, 9, 8]):
        model = tiny()
        fit(model, *split(batch, sizes))
        maps.append(maps_of(model))
    for other in maps[1:]:
        for layer in FITTED:
            torch.testing.assert_close(other[layer], maps[0][layer], rtol=1e-8, atol=1e-8)


def test_padding_is_not_used():
    """More padding changes nothing, nor do the tokens at unlabelled positions at the end."""
    batch = labelled()
    wider = {
        name: nn.functional.pad(tensor, (0, 3), value=-100 * (name == "labels")) for name, tensor in batch.items()
    }
    one, other = tiny(), tiny()
    tokens = fit(one, batch).tokens
    assert fit(other, wider).tokens == tokens
    for layer in FITTED:
        torch.testing.assert_close(maps_of(other)[layer], maps_of(one)[layer], rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_planted_linear_relation_is_recovered():
    """If the last blocks add nothing, the map is the identity; on bare sums it is any planted matrix."""
    model = tiny()
    for block in model.decoder.block[3:]:
        for part in (
            block.layer[0].SelfAttention.o,
            block.layer[1].EncDecAttention.o,
            block.layer[2].DenseReluDense.wo,
        ):
            part.weight.zero_()
    found = fit(model, labelled())
    for layer in (4, 5):
        torch.testing.assert_close(maps_of(model)[layer], torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-9)
        assert found.r2[layer] == found.lens_r2[layer] == pytest.approx(1)
    assert found.lens_r2[1] < 0.9
    torch.manual_seed(0)
    planted, states = torch.randn(7, 7, dtype=torch.float64), torch.randn(40, 7, dtype=torch.float64)
    states *= 10.0 ** torch.arange(-3, 4)  # coordinates of very different scales
    sums = Sums()
    for part in states.split(9):
        sums.add(part, part @ planted.T)
    torch.testing.assert_close(sums.solve(1, 0.0), planted, rtol=1e-7, atol=1e-7)
    assert sums.r2(planted) == pytest.approx(1)


# --- what a fit does not change -------------------------------------------------------------------------------------


def test_only_the_maps_move_and_modes_stay():
    model = tiny().train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    fit(model, labelled())
    assert moved(before, model) == {f"exit_heads.heads.{layer}.map.weight" for layer in FITTED}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not own_hooks(model)


def test_dropout_rests():
    one, other = tiny(dropout_rate=0.5), tiny()
    fit(one.train(), labelled())
    fit(other, labelled())
    assert all(torch.equal(maps_of(one)[layer], maps_of(other)[layer]) for layer in FITTED)


@torch.no_grad()
def test_a_norm_of_its_own_gives_way_to_the_final_one():
    """The prediction is the input of the final norm, so the head's norm is replaced by it."""
    model = tiny()
    model.exit_heads.heads["4"].norm.weight.mul_(2)
    fit(model, labelled())
    assert torch.equal(model.exit_heads.heads["4"].norm.weight, model.decoder.final_layer_norm.weight)


def test_classifiers_of_other_heads_count_as_untrained():
    model = tiny(early_exit=EarlyExitConfig(heads="shortcut", classifier=ClassifierConfig(trained=True)))
    fit(model, labelled())
    assert model.early_exit.classifier.trained is False


@torch.no_grad()
def test_after_an_error_the_model_is_as_it_was(monkeypatch):
    """Errors while reading batches, in a forward pass, and in the solve of one layer of several."""
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())

    def broken():
        yield labelled()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_shortcuts(model, broken(), progress=False)
    with pytest.raises(IndexError):
        fit(model, labelled() | {"decoder_input_ids": torch.full((24, 9), VOCABULARY)})
    with pytest.raises(ValueError, match="States after layer 1 vary in only 4 of their 32 dimensions"):
        fit(model, {name: tensor[1:2].repeat(24, 1) for name, tensor in labelled().items()})
    solve = Sums.solve
    monkeypatch.setattr(Sums, "solve", lambda sums, layer, ridge: solve(sums, layer, ridge) if layer < 5 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(model, labelled())
    assert not moved(before, model) and all(module.training for module in model.modules())
    assert not own_hooks(model)


# --- measurement ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_report_is_what_brute_force_finds():
    """On batches other than those of the fit, split differently, with one row without labels."""
    model, batch = tiny(), labelled(seed=7)
    fit(model, labelled())
    batch["labels"][2] = -100
    report = measure_shortcuts(model, split(batch, [11, 13]), progress=False)
    states, mask = [torch.from_numpy(one) for one in states_of(model, batch)], batch["labels"] != -100
    rows, final = mask.nonzero()[:, 0], model.decoder.final_layer_norm
    scale = model.model_dim**-0.5
    full = (final(states[-1]) * scale @ model.lm_head.weight.T).argmax(-1)
    variance = (states[-1] - states[-1].mean(dim=0)).square().sum()
    assert set(report.shortcut) == set(report.lens) == set(FITTED) and report.tokens == len(rows)
    kept = [row for row in range(24) if row != 2]
    for layer in FITTED:
        for worth, guess in (
            (report.shortcut[layer], states[layer] @ maps_of(model)[layer].T),
            (report.lens[layer], states[layer]),
        ):
            agrees = (final(guess) * scale @ model.lm_head.weight.T).argmax(-1) == full
            assert worth.agreement.agreeing == tuple(int(agrees[rows == row].sum()) for row in kept)
            assert worth.agreement.tokens == tuple(int((rows == row).sum()) for row in kept)
            assert worth.agreement.share == pytest.approx(agrees.double().mean().item())
            interval = ratio_interval(worth.agreement.agreeing, worth.agreement.tokens)
            assert worth.agreement.interval() == interval and interval["low"] < worth.agreement.share
            error = (states[-1] - guess).square().sum()
            assert worth.r2 == pytest.approx(float(1 - error / variance), abs=1e-9)
    assert report.shortcut[5].agreement.agreeing != report.lens[5].agreement.agreeing


def test_measuring_changes_nothing():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    report = measure_shortcuts(model, [labelled()], progress=False)
    assert not moved(before, model) and model.training
    assert report.shortcut == report.lens, "shortcuts start as the logit lens"


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    model = tiny(3, torch.float32, EarlyExitConfig(heads="shortcut"), "untied")
    fit(model, labelled(40), ridge=0.01)
    return model


def test_it_is_saved_and_says_the_same(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    again = EarlyExitT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    options = {"exit_criterion": "softmax", "exit_threshold": 0.2}
    mine, theirs = (laws.generate(model, tiny_inputs(5), **options) for model in (fitted, again))
    assert torch.equal(mine.sequences, theirs.sequences) and torch.equal(mine.layers_run, theirs.layers_run)
    assert len(set(mine.layers_run.flatten().tolist()) - {0}) >= 3
    lens = laws.generate(tiny(3, torch.float32, family="untied"), tiny_inputs(5), exit_criterion="fixed", exit_layer=1)
    one = laws.generate(fitted, tiny_inputs(5), exit_criterion="fixed", exit_layer=1)
    assert not torch.equal(one.sequences, lens.sequences), "the maps matter"


@pytest.mark.parametrize("prepared", (False, True))
def test_a_row_says_the_same_in_any_batch(prepared):
    model = tiny(3, early_exit=EarlyExitConfig(heads="shortcut"), family="untied")
    fit(model, labelled(40), ridge=0.01)
    if prepared:
        model.prepare_for_generation()
    for seed in range(2):
        output = laws.batch_equals_rows_alone(
            model, tiny_inputs(4, seed), lambda row: laws.CRITERIA["softmax"], 0.05, seed, max_new_tokens=16
        )
        laws.assert_not_vacuous(output)
        laws.scripted_batch_equals_rows_alone(model, seed)


@pytest.mark.parametrize("layer", (1, 4))
def test_always_leaving_is_the_stock_model_cut_there(layer):
    """The stock model is cut after that layer, with the shortcut as its final norm."""
    model = tiny(3, early_exit=EarlyExitConfig(heads="shortcut"), family="untied")
    fit(model, labelled(40), ridge=0.01)
    cut = laws.generate(stock_of(model, layer), tiny_inputs(4))
    ours = laws.generate(model, tiny_inputs(4), exit_criterion="fixed", exit_layer=layer)
    assert torch.equal(ours.sequences, cut.sequences)


def test_rows_follow_the_slow_reference():
    """Every token uses its own shortcut, with missing keys and values and candidates included."""
    model = tiny(3, early_exit=EarlyExitConfig(heads="shortcut"), family="untied")
    fit(model, labelled(40), ridge=0.01)
    output, _ = laws.candidates_follow_frozen_rows(stock_of(model), model, tiny_inputs(4, 3), "softmax", 4, 0.3, 3)
    laws.assert_not_vacuous(output)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_low_precision_is_near_fp64(dtype):
    """Sums are in fp64; the difference comes from the rounding of states and of the stored maps."""
    exact, rounded = tiny(1), tiny(1, dtype)
    expected, found = (fit(model, labelled(60)).r2 for model in (exact, rounded))
    assert {parameter.dtype for parameter in rounded.parameters()} == {dtype}
    for layer in FITTED:
        assert found[layer] == pytest.approx(expected[layer], abs=0.02)
        close = {"rtol": 0, "atol": 0.1 if dtype == torch.bfloat16 else 1e-3}
        torch.testing.assert_close(maps_of(rounded)[layer].double(), maps_of(exact)[layer], **close)


def test_the_models_own_texts_are_labels():
    """Labels are the full-depth tokens up to the end token; exit settings stored in the model do not matter."""
    model, inputs = tiny(2), tiny_inputs(4, 2)
    model.generation_config.exit_criterion, model.generation_config.exit_layer = "fixed", 1
    options = {"max_new_tokens": 9, "eos_token_id": ENDS, "pad_token_id": 0, "logits_processor": unrest(2)}
    ours = list(with_full_depth_labels(model, [{**inputs, "labels": torch.zeros(4, 2)}], **options))
    plain = stock_of(model).generate(**inputs, **options)[:, 1:]
    (batch,) = ours
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    lengths = []
    for mine, theirs in zip(batch["labels"].tolist(), plain.tolist()):
        ends = [place for place, token in enumerate(theirs) if token in ENDS]
        length = ends[0] + 1 if ends else len(theirs)
        assert mine == theirs[:length] + [-100] * (len(theirs) - length)
        lengths.append(length)
    assert len(set(lengths)) > 1
    assert fit(model, *ours, ridge=0.1).tokens == sum(lengths)


def test_own_texts_may_be_written_while_a_fit_reads_them():
    """The fit does not affect the generated texts, nor do they affect the fit."""
    read, streamed = tiny(2), tiny(2)
    inputs = [{name: tensor[row : row + 2] for name, tensor in tiny_inputs(6, 2).items()} for row in (0, 2, 4)]
    options = {"max_new_tokens": 6, "eos_token_id": ENDS, "pad_token_id": 0, "logits_processor": unrest(2)}
    fit(read, *with_full_depth_labels(read, inputs, **options), ridge=0.1)
    fit_shortcuts(streamed.train(), with_full_depth_labels(streamed, inputs, **options), ridge=0.1, progress=False)
    assert all(torch.equal(maps_of(read)[layer], maps_of(streamed)[layer]) for layer in FITTED)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", (-0.1, "1", None, True, float("nan"), float("inf")))
def test_ridge_is_checked_before_any_work(ridge):
    with pytest.raises(ValueError, match="`ridge` must be a number from 0 on, got"):
        fit_shortcuts(tiny(), iter(lambda: pytest.fail("read"), None), ridge=ridge)


@pytest.mark.parametrize("verb", (fit_shortcuts, measure_shortcuts))
def test_refusals(verb):
    batch = labelled()
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for batches, message in (
        ([batch, without], r"no `labels`, only \['attention_mask', 'input_ids'\]"),
        ([unlabelled], "no labelled token"),
        ([], "no labelled token"),
    ):
        with pytest.raises(ValueError, match=message):
            verb(tiny(), batches, progress=False)
    with pytest.raises(ValueError, match=r"no exit point with a head of kind 'shortcut'.*EarlyExitConfig\(heads="):
        verb(tiny(early_exit=EarlyExitConfig(heads="norm")), [batch], progress=False)


def test_too_few_tokens_want_a_ridge():
    few = {name: tensor[:4] for name, tensor in labelled().items()}
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="There are 16 labelled tokens, fewer than the 32 coordinates.*more batches"):
        fit(model, few)
    assert not moved(before, model)
    assert fit(model, few, ridge=0.1).tokens == 16
    assert all(one.isfinite().all() for one in maps_of(model).values())


def test_coordinates_that_are_always_zero_want_a_ridge_and_stay():
    torch.manual_seed(0)
    states = torch.randn(40, 5, dtype=torch.float64)
    states[:, 2] = 0
    sums = Sums()
    sums.add(states, states.flip(-1))
    with pytest.raises(ValueError, match="States after layer 6 vary in only 4 of their 5 dimensions.*`ridge` above 0"):
        sums.solve(6, 0.0)
    assert sums.solve(6, 1e-6)[:, 2].tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-6), "as the logit lens has it"


@torch.no_grad()
def test_states_must_be_finite():
    model = tiny()
    model.decoder.block[0].layer[2].DenseReluDense.wo.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="States after layer 1 are not finite"):
        fit(model, labelled())
