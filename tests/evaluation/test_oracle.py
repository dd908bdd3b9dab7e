"""The oracle matches stock models row by row, and planted mistakes are detected."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hf_earlyexit import EarlyExitConfig
from hf_earlyexit.evaluation import forced, oracle
from hf_earlyexit.evaluation.oracle import first_agreeing, oracle_exits, stable_from
from tests.laws.test_mutations import swapped
from tests.tiny import ENDS, NUM_LAYERS, tiny_inputs, tiny_pair, unrest


WRITING = {"max_new_tokens": 9, "eos_token_id": ENDS, "pad_token_id": 0}
PROMPT = torch.tensor([[0, 0, 5, 9], [0, 7, 8, 30], [0, 0, 0, 60], [0, 44, 5, 6], [0, 0, 5, 5]])
PROMPT_MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def untidy(seed: int, family: str = "tied", exit_layers=(1, 2, 3, 4, 5)):
    """A pair whose exits agree with full depth at times, and not consistently from layer to layer."""
    return tiny_pair(family, seed, early_exit=EarlyExitConfig(exit_layers))


# --- by hand: the stock model, one row at a time, without padding ---------------------------------------------------


@torch.no_grad()
def by_hand(stock, inputs, sequences, prompt: int, is_token, exit_layers) -> tuple[list[list[int]], list[list[int]]]:
    """For every row, the first layer that agrees and the first from which on all do, by loops over plain numbers."""
    firsts, stables = [], []
    for row in range(len(sequences)):
        source = int(inputs["attention_mask"][row].sum())
        ids = inputs["input_ids"][row : row + 1, :source]
        text = sequences[row : row + 1, :-1]
        options = {}
        if "decoder_attention_mask" in inputs:
            mask = inputs["decoder_attention_mask"][row : row + 1]
            ones = torch.ones(1, text.shape[1] - mask.shape[1], dtype=mask.dtype)
            options["decoder_attention_mask"] = torch.cat([mask, ones], dim=1)
        output = stock(input_ids=ids, decoder_input_ids=text, output_hidden_states=True, use_cache=False, **options)
        norm, scale = (
            stock.decoder.final_layer_norm,
            stock.model_dim**-0.5 if stock.config.scale_decoder_outputs else 1,
        )
        firsts.append([])
        stables.append([])
        for step, there in enumerate(is_token[row].tolist()):
            if not there:
                firsts[-1].append(0)
                stables[-1].append(0)
                continue
            place = prompt - 1 + step
            says = int(output.logits[0, place].argmax())
            agreeing = [NUM_LAYERS]
            for layer in exit_layers:
                state = output.decoder_hidden_states[layer][0, place]
                if int(stock.lm_head(norm(state) * scale).argmax()) == says:
                    agreeing.append(layer)
            firsts[-1].append(min(agreeing))
            asked = [*exit_layers, NUM_LAYERS]
            stables[-1].append(min(one for one in asked if all(o in agreeing for o in asked if o >= one)))
    return firsts, stables


def holds_by_hand(family: str = "tied", exit_layers=(1, 2, 3, 4, 5), seeds=(0, 1, 2), prompted: bool = False):
    """Check that the oracle matches stock calls, with several different layers and lengths."""
    occurred, differing, lengths = set(), 0, set()
    for seed in seeds:
        stock, model = untidy(seed, family)
        inputs = tiny_inputs(5, seed)
        if prompted:
            inputs |= {"decoder_input_ids": PROMPT, "decoder_attention_mask": PROMPT_MASK}
        found = oracle_exits(model, inputs, exit_layers=exit_layers, logits_processor=unrest(seed), **WRITING)
        prompt = found.sequences.shape[1] - found.first.shape[1]
        assert prompt == (4 if prompted else 1)
        first, stable = by_hand(stock, inputs, found.sequences, prompt, found.is_token, exit_layers)
        assert found.first.tolist() == first and found.stable.tolist() == stable
        occurred |= set(found.first[found.is_token].tolist())
        differing += int((found.first != found.stable).sum())
        lengths |= set(found.is_token.sum(dim=1).tolist())
    assert len(occurred) >= 3 and differing > 0 and len(lengths) >= 3, "else nothing would be shown"
    assert NUM_LAYERS in occurred and min(exit_layers) in occurred


@pytest.mark.parametrize("family", ["tied", "untied", "deeper decoder"])
def test_it_is_what_stock_calls_give_row_by_row(family):
    holds_by_hand(family)


def test_only_the_layers_that_are_asked_count():
    holds_by_hand(exit_layers=(2, 5))


def test_padded_prompts_are_no_tokens_and_padding_is_not_seen():
    holds_by_hand(prompted=True)


def test_rows_are_those_of_full_depth_and_their_ends():
    _, model = untidy(1)
    inputs = tiny_inputs(5, 1)
    found = oracle_exits(model, inputs, logits_processor=unrest(1), **WRITING)
    options = {"early_exit": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, logits_processor=unrest(1), **WRITING, **options)
    assert torch.equal(found.sequences, output.sequences) and torch.equal(found.is_token, output.layers_run > 0)
    assert not found.agrees[~found.is_token].any() and not found.rewritten[~found.is_token].any()
    assert found.rewritten.any(), "the processor wrote what full depth by itself would not"


def test_numbers_of_a_batch_come_from_its_tokens_alone():
    _, model = untidy(1)
    found = oracle_exits(model, tiny_inputs(5, 1), logits_processor=unrest(1), **WRITING)
    first, stable = ([one for row in rows.tolist() for one in row if one] for rows in (found.first, found.stable))
    assert found.layers_per_token == pytest.approx(np.mean(first)) and np.mean(first) < NUM_LAYERS
    assert found.stable_layers_per_token == pytest.approx(np.mean(stable)) and np.mean(stable) > np.mean(first)
    assert found.shares == {layer: first.count(layer) / len(first) for layer in range(1, NUM_LAYERS + 1)}
    assert found.stable_shares[NUM_LAYERS] == stable.count(NUM_LAYERS) / len(stable)
    assert found.agreement[1] == found.shares[1], "who agrees at the first exit has it as first"
    tokens = found.agrees[found.is_token].double()
    assert list(found.agreement.values()) == pytest.approx(tokens.mean(dim=0).tolist())


def test_greedy_full_depth_says_what_it_has_written_and_is_left_as_it_was():
    _, model = untidy(2)
    model.generation_config.exit_criterion, model.generation_config.exit_threshold = "softmax", 0.0
    before = copy.deepcopy((model.generation_config.to_dict(), model.config.to_dict(), dict(vars(model))))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = oracle_exits(model, tiny_inputs(4, 2), max_new_tokens=6)
    assert not found.rewritten.any() and not found.tied.any(), "in fp64"
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before[:2]
    assert set(vars(model)) == set(before[2]) and not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not found.first.requires_grad


def test_of_equal_logits_the_lowest_id_is_taken_at_every_layer():
    """The head has repeated rows, so every best logit occurs twice."""
    _, model = untidy(0, "untied")
    plain = oracle_exits(model, tiny_inputs(3), max_new_tokens=5)
    with torch.no_grad():
        model.lm_head.weight[49:97] = model.lm_head.weight[1:49]
        model.lm_head.weight[0] = 0
    found = oracle_exits(model, tiny_inputs(3), max_new_tokens=5)
    assert found.tied.all() and not plain.tied.any()
    assert found.sequences.max() < 49 and not found.rewritten.any()
    assert len(found.first.unique()) >= 2 and (found.first < NUM_LAYERS).any()


def test_half_precision_is_held_against_what_it_says_in_this_pass():
    _, model = tiny_pair("tied", 0, torch.bfloat16)
    found = oracle_exits(model, tiny_inputs(8), max_new_tokens=9)
    assert found.agrees.shape == (*found.first.shape, 5) and (found.first >= 1).all()
    firsts = torch.cat([found.agrees, torch.ones_like(found.agrees[..., :1])], dim=-1).int().argmax(dim=-1) + 1
    assert torch.equal(firsts, found.first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": [2, 6]}, r"has \[6\], which are no exit points of this model: it has \[1, 2, 3, 4, 5\]"),
        ({"exit_layers": [3, 2]}, "must ascend"),
        ({"do_sample": True}, "`do_sample` does not go with an oracle"),
        ({"exit_threshold": 0.5}, "`exit_threshold` does not go with an oracle"),
        ({"inputs": {"input_ids": torch.ones(1, 2).long()}}, r"\['attention_mask'\] is missing"),
        ({"inputs": {**tiny_inputs(1), "labels": 1}}, r"\['labels'\] cannot be used"),
        ({"training": True}, "is in training mode.*`model.eval\\(\\)`"),
    ],
)
def test_what_no_oracle_can_be_asked_is_refused_before_any_work(change, message, monkeypatch):
    _, model = untidy(0)
    monkeypatch.setattr(type(model), "generate", lambda *args, **kwargs: pytest.fail("something was generated"))
    model.train(change.pop("training", False))
    trained, inputs = model.training, change.pop("inputs", tiny_inputs(2))
    with pytest.raises(ValueError, match=message):
        oracle_exits(model, inputs, **change)
    assert model.training == trained


def test_a_model_without_exit_points_has_nothing_to_choose():
    _, model = tiny_pair("tied", 0, early_exit=EarlyExitConfig(exit_layers=()))
    found = oracle_exits(model, tiny_inputs(2), max_new_tokens=3)
    assert found.layers_per_token == NUM_LAYERS and found.agreement == {} and found.shares == {NUM_LAYERS: 1.0}


# --- first and stable, by hand --------------------------------------------------------------------------------------


AGREES = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()


def test_first_and_stable_by_hand():
    assert first_agreeing(AGREES, (2, 4, 6), 8).tolist() == [2, 4, 2, 2, 8, 4]
    assert stable_from(AGREES, (2, 4, 6), 8).tolist() == [2, 4, 6, 8, 8, 8]
    assert first_agreeing(AGREES[:, :0], (), 8).tolist() == stable_from(AGREES[:, :0], (), 8).tolist() == [8] * 6


# --- planted mistakes -----------------------------------------------------------------------------------------------


@swapped(oracle, "first_agreeing")
def is_off_by_one_layer(first):
    return lambda agrees, layers, num_layers: (first(agrees, layers, num_layers) + 1).clamp(max=num_layers)


@swapped(oracle, "first_agreeing")
def takes_the_last_instead_of_the_first(first):
    def mutant(agrees, layers, num_layers):
        return torch.tensor([max([o for o, a in zip(layers, row) if a] or [num_layers]) for row in agrees.tolist()])

    return mutant


@swapped(oracle, "stable_from")
def takes_the_first_for_the_stable(stable):
    return first_agreeing


@swapped(forced.TeacherForcedExits, "hidden")
def looks_a_layer_too_deep(hidden):
    return lambda self, layer: hidden(self, min(layer + 1, self.num_layers))


@swapped(oracle, "_forcing")
def forces_the_text_one_place_off(forcing):
    def mutant(inputs, sequences, new_tokens):
        found = forcing(inputs, sequences, new_tokens)
        return found | {"decoder_input_ids": sequences[:, 1:]}

    return mutant


@swapped(oracle, "_forcing")
def forgets_the_padding_of_the_source(forcing):
    def mutant(inputs, sequences, new_tokens):
        return forcing({**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}, sequences, new_tokens)

    return mutant


@swapped(oracle, "_forcing")
def forgets_the_padding_of_the_prompt(forcing):
    return lambda inputs, *rest: {n: v for n, v in forcing(inputs, *rest).items() if n != "decoder_attention_mask"}


@pytest.mark.parametrize(
    ("mutate", "law"),
    [
        (is_off_by_one_layer, holds_by_hand),
        (takes_the_last_instead_of_the_first, holds_by_hand),
        (takes_the_first_for_the_stable, holds_by_hand),
        (looks_a_layer_too_deep, holds_by_hand),
        (forces_the_text_one_place_off, holds_by_hand),
        (forgets_the_padding_of_the_source, holds_by_hand),
        (forgets_the_padding_of_the_prompt, lambda: holds_by_hand(prompted=True)),
    ],
    ids=lambda one: one.__name__,
)
def test_mistakes_are_noticed(monkeypatch, mutate, law):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        law()
