"""The laws as functions of a model, to be tested on every kind of model and under every planted mutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_earlyexit.common.library import CACHE
from hf_earlyexit.exits.criteria import SoftmaxResponse, StateSimilarity
from tests.reference import frozen_row_generate
from tests.shortlists import exits_by_candidates
from tests.tiny import ENDS, cut_to, one_row, stock_cache, tiny_inputs, unrest
from tests.watching import Recording, Scripted, counting, pseudo_random_script


CRITERIA = {"softmax": SoftmaxResponse(), "state": StateSimilarity()}
TOLERANCE = 1e-4


@dataclass
class Tie:
    """A row whose outputs differ because two scores or confidences are nearly equal."""

    row: int
    step: int
    kind: str
    margin: float


def generate(model, inputs, seed: int = 0, max_new_tokens: int = 12, ends=ENDS, **kwargs):
    """Call `generate` with all outputs and with noise on the scores (`tiny.unrest`); greedy by default."""
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    options |= {
        "logits_processor": unrest(seed),
        "max_new_tokens": max_new_tokens,
        "eos_token_id": ends,
        "pad_token_id": 0,
    }
    return model.generate(**inputs, **(options | kwargs))


def stock_generate(stock, inputs, seed: int = 0, **kwargs):
    return generate(stock, inputs, seed, **{CACHE: stock_cache()}, **kwargs)


# --- checks that a run is not vacuous -------------------------------------------------------------------------------


def assert_not_vacuous(output) -> None:
    """Check that a run exercises exits.

    Tokens exit at three or more layers, two or more missing positions are filled, and in a batch rows end at different
    steps and run different numbers of layers in one step.
    """
    layers = output.layers_run
    assert len(set(layers[layers > 0].tolist())) >= 3, "tokens left at fewer than three layers"
    assert output.filled_positions.sum() >= 2, "fewer than two owed positions were paid"
    if len(layers) > 1:
        lengths = (layers > 0).sum(dim=1)
        assert len(set(lengths.tolist())) > 1, "all rows ended at the same step"
        both = layers[:, : int(lengths.min())]
        assert (both != both[:1]).any(), "rows never left at different layers in one step"


def longest_debt(layers: torch.Tensor, num_layers: int) -> int:
    """The largest number of missing positions that a row fills at once at a layer."""
    longest = 0
    for row in layers.tolist():
        for layer in range(1, num_layers + 1):
            owed = 0
            for depth in row:
                if 0 < depth < layer:
                    owed += 1
                elif depth >= layer:
                    longest, owed = max(longest, owed), 0
    return longest


# --- equal, or tied -------------------------------------------------------------------------------------------------


def new_tokens(output) -> torch.Tensor:
    return output.sequences[:, output.sequences.shape[1] - output.layers_run.shape[1] :]


def assert_equal_or_tied(ours, others, recording: Recording | None = None, threshold: float = 0.0) -> list[Tie]:
    """Every row of `ours` equals its counterpart in `others`, or first differs from it at a near tie.

    Args:
        ours: An output with scores, batch B.
        others: Outputs of batch 1, one per row of `ours`; without `layers_run` only tokens are compared.
        recording: The confidences that decided the exits of `ours`.
        threshold: The exit threshold of `ours`.

    Returns:
        The excused ties, at most 0.5 % of the rows.
    """
    ties = []
    for row, other in enumerate(others):
        if tie := first_difference(ours, other, row, recording, threshold):
            assert tie.margin <= TOLERANCE, (
                f"row {row} differs at step {tie.step} by {tie.kind}, margin {tie.margin:.2e}"
            )
            ties.append(tie)
    assert len(ties) <= 0.005 * len(others), f"{len(ties)} ties in {len(others)} rows: {ties}"
    return ties


def first_difference(ours, other, row: int, recording: Recording | None, threshold: float) -> Tie | None:
    prompt = ours.sequences.shape[1] - ours.layers_run.shape[1]
    our_tokens, other_tokens = ours.sequences[row, prompt:].tolist(), other.sequences[0, prompt:].tolist()
    length = min(len(our_tokens), len(other_tokens))
    has_layers = getattr(other, "layers_run", None) is not None
    for step in range(length):
        if has_layers and ours.layers_run[row, step] != other.layers_run[0, step]:
            layer = min(int(ours.layers_run[row, step]), int(other.layers_run[0, step]))
            margin = abs(recording.seen[row, prompt - 1 + step, layer] - threshold) if recording and layer else 1.0
            return Tie(row, step, "confidence", margin)
        if our_tokens[step] != other_tokens[step]:
            top = ours.scores[step][row].topk(2).values
            return Tie(row, step, "scores", float((top[0] - top[1]) / top.abs().max().clamp(min=1)))
    assert not any(our_tokens[length:] + other_tokens[length:]), f"row {row} goes on after the other has ended"
    return None


# --- the laws -------------------------------------------------------------------------------------------------------


def never_equals_stock(stock, model, inputs, seed: int = 0, **kwargs):
    """Law 1: full depth equals the stock model."""
    expected, output = stock_generate(stock, inputs, seed, **kwargs), generate(model, inputs, seed, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    live = output.layers_run > 0
    assert set(output.layers_run[live].tolist()) == {model.config.num_decoder_layers}
    if kwargs.get("num_beams", 1) == 1:
        for step, (mine, stocks) in enumerate(zip(output.logits, expected.logits)):
            torch.testing.assert_close(mine[live[:, step]], stocks[live[:, step]], **logit_tolerance(model))
            assert not mine[~live[:, step]].any(), "rows that have ended have zeros"
    else:
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)
    return output


def logit_tolerance(model) -> dict[str, float]:
    """Tolerances for `assert_close`: its default for fp32, the dtype of reported logits, unless the model is half."""
    return {"atol": 2e-2, "rtol": 2e-2} if model.dtype in (torch.float16, torch.bfloat16) else {}


def fixed_exit_equals_cut_stock(stock, model, inputs, layer: int, seed: int = 0, **kwargs):
    """Law 2: always exiting after a layer equals the stock model truncated to it."""
    expected = stock_generate(cut_to(stock, layer), inputs, seed, **kwargs)
    output = generate(model, inputs, seed, exit_criterion="fixed", exit_layer=layer, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    assert set(output.layers_run[output.layers_run > 0].tolist()) == {layer}
    return output


def batch_equals_rows_alone(model, inputs, criterion, threshold: float, seed: int = 0, **kwargs):
    """Law 3, in exact arithmetic: a row's tokens and exits do not depend on the other rows.

    Args:
        criterion: Called with None for the batch and with the row's number for a row alone. `point.rows` is [0] for a
            row alone, so the caller must shift scripts.
    """
    batch = generate(model, inputs, seed, exit_criterion=criterion(None), exit_threshold=threshold, **kwargs)
    for row in range(len(inputs["input_ids"])):
        alone = generate(
            model, one_row(inputs, row), seed, exit_criterion=criterion(row), exit_threshold=threshold, **kwargs
        )
        length = alone.sequences.shape[1]
        assert torch.equal(batch.sequences[row, :length], alone.sequences[0]), f"row {row} says something else alone"
        steps = alone.layers_run.shape[1]
        assert not batch.layers_run[row, steps:].any(), f"row {row} goes on longer in the batch"
        assert torch.equal(batch.layers_run[row, :steps], alone.layers_run[0]), f"row {row} leaves elsewhere alone"
    return batch


def follows_frozen_rows(stock, model, inputs, script, seed: int = 0, max_new_tokens: int = 12, ends=ENDS):
    """Laws 3 and 4 against the slow reference: lazy, eager and frozen rows are equal under any script."""
    expected, logits = frozen_row_generate(stock, inputs, script, max_new_tokens, unrest(seed), tuple(ends))
    outputs = [
        generate(
            model,
            inputs,
            seed,
            max_new_tokens,
            ends,
            exit_criterion=Scripted(script),
            exit_threshold=0.5,
            fill=fill,
        )
        for fill in ("lazy", "eager")
    ]
    for output in outputs:
        assert torch.equal(output.sequences, expected)
        live = output.layers_run > 0
        for step, mine in enumerate(output.logits):
            torch.testing.assert_close(mine[live[:, step]], logits[live[:, step], step].float())
        for row, layers in enumerate(output.layers_run.tolist()):
            assert layers == [script(row, at) if layer else 0 for at, layer in enumerate(layers)]
    return outputs


def exits_replayed_follow_frozen_rows(stock, model, inputs, criterion: str, threshold: float, seed: int = 0):
    """Laws 3 and 4 for a criterion: the slow reference gives the same text when its exits are replayed as a script."""
    output = generate(model, inputs, seed, exit_criterion=criterion, exit_threshold=threshold)
    layers = output.layers_run.tolist()
    replay = lambda row, position: layers[row][position] or 1  # noqa: E731
    expected, logits = frozen_row_generate(stock, inputs, replay, len(layers[0]), unrest(seed), tuple(ENDS))
    assert torch.equal(output.sequences, expected)
    for step, mine in enumerate(output.logits):
        live = output.layers_run[:, step] > 0
        torch.testing.assert_close(mine[live], logits[live, step].float())
    return output


def candidates_follow_frozen_rows(
    stock, model, inputs, criterion: str, count: int, threshold: float, seed: int = 0, **kwargs
):
    """Laws 3, 4 and 8 with candidates: exits, text and counts of scored rows equal those of the slow reference.

    The reference scores the full vocabulary at every layer, from the states of frozen rows.

    Returns:
        The output, and the number of rows that passed and were not confirmed.
    """
    settings = {"exit_criterion": criterion, "exit_candidates": count, "exit_threshold": threshold} | kwargs
    output = generate(model, inputs, seed, **settings)
    layers, depth = output.layers_run.tolist(), model.config.num_decoder_layers
    replay, states = (lambda row, position: layers[row][position] or 1), []
    norm_of = lambda layer: model.exit_heads.head_of(layer, stock.decoder.final_layer_norm)  # noqa: E731
    expected, logits = frozen_row_generate(
        stock, inputs, replay, len(layers[0]), unrest(seed), tuple(ENDS), norm_of, states
    )
    assert torch.equal(output.sequences, expected)
    asked = [*kwargs.get("exit_layers", range(1, depth)), depth]
    scale = stock.model_dim**-0.5 if stock.config.scale_decoder_outputs else 1.0
    heads, candidates, refused = [0] * (depth + 1), [0] * (depth + 1), 0
    for step, mine in enumerate(output.logits):
        live = [row for row in range(len(layers)) if layers[row][step]]
        torch.testing.assert_close(mine[live], logits[live, step].float())
        scores = {layer: stock.lm_head(norm_of(layer)(states[step][layer - 1]) * scale) for layer in asked}
        found = exits_by_candidates(scores, live, criterion, count, threshold, kwargs.get("batch_exit", "row"))
        assert found.layers == {row: layers[row][step] for row in live}
        for layer in asked:
            heads[layer] += found.heads[layer]
            candidates[layer] += found.candidates[layer]
        refused += found.refused
    assert output.head_rows.tolist() == heads and output.candidate_rows.tolist() == candidates
    return output, refused


def all_candidates_are_the_vocabulary(model, inputs, criterion: str, threshold: float, seed: int = 0, **kwargs):
    """With as many candidates as tokens in the vocabulary, exits and tokens are those without candidates."""
    settings = {"exit_criterion": criterion, "exit_threshold": threshold} | kwargs
    plain = generate(model, inputs, seed, **settings)
    output = generate(model, inputs, seed, exit_candidates=model.config.vocab_size, **settings)
    assert torch.equal(output.sequences, plain.sequences) and torch.equal(output.layers_run, plain.layers_run)
    torch.testing.assert_close(output.exit_confidences, plain.exit_confidences, equal_nan=True)
    assert output.candidate_rows.sum() > 0 and not plain.candidate_rows.any()
    return output


def ended_rows_rest(model, inputs, seed: int = 0, **kwargs):
    """A row runs exactly as many steps as it has tokens, EOS included."""
    output = generate(model, inputs, seed, **kwargs)
    for row, tokens in enumerate(new_tokens(output).tolist()):
        ends = [step for step, token in enumerate(tokens) if token in ENDS]
        length = ends[0] + 1 if ends else len(tokens)
        assert [depth > 0 for depth in output.layers_run[row].tolist()] == [
            step < length for step in range(len(tokens))
        ]
    assert int(output.layer_rows[0]) == int((output.layers_run > 0).sum())
    return output


def work_is_what_ran(model, inputs, seed: int = 0, **kwargs):
    """Law 8: the reported work is the work that hooks on the modules count."""
    with counting(model) as counts:
        output = generate(model, inputs, seed, **kwargs)
    layers = range(1, model.config.num_decoder_layers + 1)
    assert output.layer_rows.tolist() == [counts["block"][layer] for layer in layers]
    paid = [counts["keys"][layer] - counts["block"][layer] for layer in layers]
    assert output.filled_positions.tolist() == paid
    assert int(output.head_rows.sum()) == counts["head"][0] and output.head_rows[0] == 0
    assert int(output.candidate_rows.sum()) == counts["candidates"][0] and output.candidate_rows[0] == 0
    if kwargs.get("num_beams", 1) == 1 and kwargs.get("exit_candidates") is None:
        left = [int((output.layers_run == layer).sum()) for layer in layers]
        looks = kwargs.get("exit_criterion") in ("softmax", "max_prob", "entropy", "patience")
        asked = [*output.layer_rows.tolist()[:-1], left[-1]]
        assert output.head_rows.tolist()[1:] == (asked if looks else left)
    return output


def scripted_batch_equals_rows_alone(model, seed: int, batch_size: int = 4, **kwargs):
    """Law 3 under a script in which each row alone keeps the exits that it has in the batch."""
    script = pseudo_random_script(seed, model.config.num_decoder_layers)
    shifted = lambda row: Scripted(script if row is None else lambda _, position: script(row, position))  # noqa: E731
    return batch_equals_rows_alone(model, tiny_inputs(batch_size, seed), shifted, 0.5, seed, **kwargs)
