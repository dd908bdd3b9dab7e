"""The `generate` drop-in: the library's features, the additions, and no side effects on the model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_earlyexit import EarlyExitConfig, EarlyExitGenerateBeamOutput, EarlyExitGenerateOutput
from hf_earlyexit.common.library import CACHE
from hf_earlyexit.decoding.layers import decode_step
from hf_earlyexit.decoding.run import ExitRun
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.families.t5.decoder import T5Decoder
from tests import laws
from tests.tiny import ENDS, NUM_LAYERS, Unrest, one_row, stock_cache, tiny_inputs, tiny_pair, unrest, with_exits
from tests.watching import Scripted, counting, pseudo_random_script


SOFTMAX = {"exit_criterion": "softmax", "exit_threshold": 0.08}
SCRIPT = {"exit_criterion": Scripted(pseudo_random_script(3, NUM_LAYERS)), "exit_threshold": 0.5}


@pytest.fixture(scope="module")
def pair():
    return tiny_pair("untied", 3)


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


class Tokens(BaseStreamer):
    def __init__(self, fails_at: int | None = None):
        self.seen, self.ended, self.fails_at = [], False, fails_at

    def put(self, value):
        if len(self.seen) == self.fails_at:
            raise RuntimeError("the listener has gone")
        self.seen.append(value.tolist())

    def end(self):
        self.ended = True


def test_output_is_aligned_with_the_new_tokens(model):
    output = laws.generate(model, tiny_inputs(4), max_new_tokens=16, **SOFTMAX)
    assert isinstance(output, EarlyExitGenerateOutput)
    tokens, layers, confidences = laws.new_tokens(output), output.layers_run, output.exit_confidences
    assert tokens.shape == layers.shape == confidences.shape and layers.dtype == torch.long
    assert output.layer_rows.shape == output.filled_positions.shape == (NUM_LAYERS,)
    assert output.head_rows.shape == (NUM_LAYERS + 1,)
    early = (0 < layers) & (layers < NUM_LAYERS)
    assert (confidences[early] >= 0.08).all() and confidences[~early].isnan().all() and early.any()
    for row in range(4):
        ends = [step for step, token in enumerate(tokens[row].tolist()) if token in ENDS]
        if ends:
            assert layers[row, ends[0]] > 0, "the end token has its layer"
            assert not layers[row, ends[0] + 1 :].any()
    assert torch.equal(
        model.generate(**tiny_inputs(4), max_new_tokens=16, eos_token_id=ENDS, logits_processor=unrest(), **SOFTMAX),
        output.sequences,
    )


class Telling:
    """A criterion that passes after layer 2, with a confidence that encodes row and position."""

    def confidence(self, point):
        said = [0.5 + row / 100 + at / 1000 for row, at in zip(point.rows, point.positions)]
        return torch.tensor(said if point.layer == 2 else [0.0] * len(said))


def test_confidences_belong_to_their_tokens(model):
    output = laws.generate(model, tiny_inputs(3), exit_criterion=Telling(), exit_threshold=0.5, ends=[96])
    for row in range(3):
        for step in range(output.layers_run.shape[1]):
            assert output.exit_confidences[row, step] == pytest.approx(0.5 + row / 100 + step / 1000)
    beams = laws.generate(model, tiny_inputs(3), exit_criterion=Telling(), exit_threshold=0.5, num_beams=3)
    steps = torch.arange(beams.beam_indices.shape[1])
    expected = (0.5 + beams.beam_indices / 100 + steps / 1000).masked_fill(beams.beam_indices < 0, float("nan"))
    torch.testing.assert_close(beams.exit_confidences, expected, equal_nan=True)


def test_a_token_leaves_at_the_very_threshold(model):
    for threshold, layer in ((0.5, 2), (0.5 + 1e-6, NUM_LAYERS)):
        sure = type("Sure", (), {"confidence": lambda self, point: torch.full((1,), 0.5 * (point.layer == 2))})()
        output = laws.generate(model, tiny_inputs(1), exit_criterion=sure, exit_threshold=threshold, ends=[96])
        assert set(output.layers_run[0].tolist()) == {layer}


def test_under_autocast_as_stock(pair):
    stock, model = tiny_pair("untied", 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = laws.stock_generate(stock, tiny_inputs(3), max_new_tokens=6)
        assert torch.equal(laws.generate(model, tiny_inputs(3), max_new_tokens=6).sequences, expected.sequences)
        lazy, eager = (laws.generate(model, tiny_inputs(3), fill=fill, **SCRIPT) for fill in ("lazy", "eager"))
    assert torch.equal(lazy.sequences, eager.sequences) and lazy.filled_positions.sum() > 1


def test_one_step_after_all_rows_have_ended(model):
    """On some devices the library checks one step late whether all rows have finished; that step runs nothing."""
    output = laws.generate(model, tiny_inputs(2), max_new_tokens=3)
    rows = torch.tensor([True, True])
    run = ExitRun(ExitSettings(), frozenset(), NUM_LAYERS, 2, 9, "cpu")
    run.begin_step(1)
    run.record_finished(rows)
    cache = output.cache
    decoder = T5Decoder(model, cache, None, None)
    assert not decode_step(decoder, torch.zeros(2, 1, dtype=torch.long), cache, run).any()
    assert run.work.layer_rows.total() == 0


def test_beams_follow_the_winning_hypothesis(model):
    """Each hypothesis, replayed token by token with its reported exits, has the scores of the beam search."""
    output = laws.generate(model, tiny_inputs(3), num_beams=3, num_return_sequences=2, output_scores=True, **SOFTMAX)
    assert isinstance(output, EarlyExitGenerateBeamOutput)
    tokens = laws.new_tokens(output)
    assert output.layers_run.shape == tokens.shape == (6, tokens.shape[1])
    assert torch.equal(output.layers_run > 0, output.beam_indices >= 0)
    for hypothesis in range(6):
        length = int((output.layers_run[hypothesis] > 0).sum())
        layers = output.layers_run[hypothesis].tolist()
        forced = Forced(tokens[hypothesis, :length].tolist())
        again = model.generate(
            **one_row(tiny_inputs(3), hypothesis // 2),
            max_new_tokens=length,
            eos_token_id=None,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([Unrest(), forced]),
            exit_criterion=Scripted(lambda row, position, layers=layers: layers[position]),
            exit_threshold=0.5,
        )
        assert again.layers_run[0].tolist() == layers[:length]
        steps = enumerate(output.beam_indices[hypothesis, :length].tolist())
        for step, beam in steps:
            torch.testing.assert_close(
                output.logits[step][beam].log_softmax(-1), forced.before[step].log_softmax(-1), atol=1e-5, rtol=1e-5
            )


class Forced(LogitsProcessor):
    """Forces the given tokens, and keeps the scores it received with the noise removed."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.before = tokens, []

    def __call__(self, input_ids, scores):
        noise = Unrest()(input_ids, torch.zeros_like(scores))
        self.before.append((scores - noise)[0])
        forced = torch.full_like(scores, -1e9)
        forced[:, self.tokens[input_ids.shape[1] - 1]] = 0
        return forced


def test_streamers_processors_and_stopping_criteria(model):
    streamer, calls = Tokens(), []

    class Watching(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            calls.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= 6])

    output = model.generate(
        **tiny_inputs(1),
        max_new_tokens=16,
        streamer=streamer,
        logits_processor=unrest(),
        stopping_criteria=StoppingCriteriaList([Watching()]),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **SCRIPT,
    )
    assert streamer.ended and [token for token, *_ in streamer.seen[1:]] == output.sequences[0, 1:].tolist()
    assert calls == list(range(2, output.sequences.shape[1] + 1)) and output.sequences.shape[1] <= 6
    noise = unrest()
    for step, (scores, logits) in enumerate(zip(output.scores, output.logits)):
        torch.testing.assert_close(scores, noise(output.sequences[:, : step + 1], logits))


def test_rows_ended_without_an_end_token_go_on_as_in_stock(pair):
    """Without an EOS token, rows that a stopping criterion has ended keep decoding, as in the library."""
    stock, model = pair

    class FirstRowEnds(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([row == 0 and input_ids.shape[1] > 3 for row in range(len(input_ids))])

    kwargs = {"eos_token_id": None, "stopping_criteria": StoppingCriteriaList([FirstRowEnds()])}
    expected = laws.stock_generate(stock, tiny_inputs(3), **kwargs)
    output = laws.generate(model, tiny_inputs(3), **kwargs)
    assert torch.equal(output.sequences, expected.sequences) and (output.layers_run == NUM_LAYERS).all()


def test_a_live_row_may_emit_pad(pair):
    """Rows end by the stopping criteria, not by a pad token."""
    stock, model = pair

    class PadAtTwo(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores if input_ids.shape[1] != 3 else torch.where(torch.arange(scores.shape[1]) == 0, 99.0, scores)

    kwargs = {"logits_processor": LogitsProcessorList([*unrest(), PadAtTwo()])}
    expected = laws.stock_generate(stock, tiny_inputs(4), **kwargs)
    output = laws.generate(model, tiny_inputs(4), **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    assert ((laws.new_tokens(output)[:, 2] == 0) & (output.layers_run[:, 2] > 0)).any()


@pytest.mark.parametrize("padded", (False, True))
def test_decoder_prompts(pair, padded):
    """All positions of a prompt but the last run every layer; the last may exit. With and without padding."""
    stock, model = pair
    inputs = tiny_inputs(3, 5)
    prompt = torch.tensor([[0, 8, 9, 7], [0, 0, 5, 9], [0, 4, 4, 6]])
    inputs["decoder_input_ids"] = prompt
    if padded:
        inputs["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    laws.never_equals_stock(stock, model, inputs)
    for layer in (1, 4):
        output = laws.fixed_exit_equals_cut_stock(stock, model, inputs, layer)
        assert output.layer_rows[NUM_LAYERS - 1] == 9 and output.layers_run[:, 0].tolist() == [layer] * 3
    lazy, eager = (laws.generate(model, inputs, fill=fill, **SCRIPT) for fill in ("lazy", "eager"))
    assert torch.equal(lazy.sequences, eager.sequences) and lazy.filled_positions.sum() > 0
    # The second row alone gives the same tokens.
    inputs = {name: tensor[1:2] for name, tensor in inputs.items()}
    shifted = {**SCRIPT, "exit_criterion": Scripted(lambda row, at: SCRIPT["exit_criterion"].script(1, at))}
    alone = laws.generate(model, inputs, **shifted).sequences[0]
    assert torch.equal(alone, lazy.sequences[1, : len(alone)])


def test_inputs_embeds_and_ready_encoder_outputs(model):
    inputs = tiny_inputs(2)
    expected = laws.generate(model, inputs, **SOFTMAX)
    states = model.encoder(**inputs)
    again = laws.generate(model, {"encoder_outputs": states, "attention_mask": inputs["attention_mask"]}, **SOFTMAX)
    assert torch.equal(again.sequences, expected.sequences)
    embeds = {"inputs_embeds": model.shared(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    assert torch.equal(laws.generate(model, embeds, **SOFTMAX).sequences, expected.sequences)


@pytest.mark.parametrize("num_return_sequences", (1, 3))
def test_sampling_draws_as_stock_does(pair, num_return_sequences):
    """The random stream is stock's: full depth draws the same tokens, and finished rows still draw."""
    stock, model = pair
    kwargs = {"do_sample": True, "num_return_sequences": num_return_sequences, "top_p": 0.9}
    torch.manual_seed(5)
    expected = laws.stock_generate(stock, tiny_inputs(3), **kwargs)
    after = torch.rand(1)
    torch.manual_seed(5)
    output = laws.generate(model, tiny_inputs(3), **kwargs)
    assert torch.equal(output.sequences, expected.sequences) and torch.equal(torch.rand(1), after)
    torch.manual_seed(5)
    lazy = laws.generate(model, tiny_inputs(3), **kwargs, **SCRIPT)
    torch.manual_seed(5)
    eager = laws.generate(model, tiny_inputs(3), fill="eager", **kwargs, **SCRIPT)
    assert torch.equal(lazy.sequences, eager.sequences) and lazy.filled_positions.sum() > 0
    assert lazy.layers_run.shape[0] == 3 * num_return_sequences


def test_sampled_beams(pair):
    stock, model = pair
    kwargs = {"do_sample": True, "num_beams": 3}
    torch.manual_seed(6)
    expected = laws.stock_generate(stock, tiny_inputs(3), **kwargs)
    torch.manual_seed(6)
    assert torch.equal(laws.generate(model, tiny_inputs(3), **kwargs).sequences, expected.sequences)


def test_schedules_reach_the_tokens(model):
    """With the paper's decay, the first token needs more than the threshold and late tokens need less."""
    kwargs = {"exit_threshold": 0.5, "max_new_tokens": 10, "ends": [96]}
    sure = lambda value: type("Sure", (), {"confidence": lambda self, point: torch.full((len(point.rows),), value)})()  # noqa: E731
    paper = laws.generate(model, tiny_inputs(1), exit_criterion=sure(0.49), exit_schedule="calm", **kwargs)
    thresholds = [0.45 + 0.1 * torch.tensor(-4.0 * token / 10).exp().item() for token in range(10)]
    expected = [1 if threshold <= 0.49 else NUM_LAYERS for threshold in thresholds]
    assert paper.layers_run[0].tolist() == expected and len(set(expected)) == 2
    prompted = {**tiny_inputs(1), "decoder_input_ids": torch.tensor([[0, 8, 9]])}
    behind = laws.generate(model, prompted, exit_criterion=sure(0.49), exit_schedule="calm", **kwargs)
    assert torch.equal(behind.layers_run, paper.layers_run), "tokens are counted from the first new one"
    own = type("Own", (), {"threshold_at": lambda self, token, longest: 0.2 if token == 3 else 1.0})()
    del kwargs["exit_threshold"]
    output = laws.generate(model, tiny_inputs(1), exit_criterion=sure(0.4), exit_schedule=own, **kwargs)
    assert output.layers_run[0].tolist() == [NUM_LAYERS] * 3 + [1] + [NUM_LAYERS] * 6


def test_a_call_asks_some_of_the_exit_points(pair):
    """With `exit_layers`, also as a stored setting, a model behaves as if it had only these exit points."""
    stock, model = pair
    few = with_exits(stock, EarlyExitConfig((2, 4)))
    asked = laws.generate(model, tiny_inputs(4), **SOFTMAX, exit_layers=[2, 4])
    expected = laws.generate(few, tiny_inputs(4), **SOFTMAX)
    assert torch.equal(asked.sequences, expected.sequences) and torch.equal(asked.layers_run, expected.layers_run)
    assert asked.head_rows.nonzero().flatten().tolist() == [2, 4, NUM_LAYERS]
    passed = GenerationConfig(**SOFTMAX, exit_layers=[2, 4], max_new_tokens=9)
    stored = GenerationConfig.from_dict(passed.to_dict())
    by_config = model.generate(**tiny_inputs(4), generation_config=stored, return_dict_in_generate=True)
    assert by_config.head_rows.nonzero().flatten().tolist() == [2, 4, NUM_LAYERS]


def test_no_exit_point_is_refused(model, monkeypatch):
    """An empty `exit_layers` is refused in a call, in a generation config and in `warm_up`."""
    monkeypatch.setattr(model.encoder, "forward", None)
    with pytest.raises(ValueError, match=r"`exit_layers=\[\]` names no exit point.*`early_exit=False`"):
        laws.generate(model, tiny_inputs(2), **SOFTMAX, exit_layers=[])
    stored = GenerationConfig(**SOFTMAX, exit_layers=[])
    with pytest.raises(ValueError, match=r"`exit_layers=\[\]`"):
        model.generate(**tiny_inputs(2), generation_config=stored)
    with pytest.raises(ValueError, match=r"`exit_layers=\[\]`"):
        model.warm_up(exit_layers=())


def test_stored_exit_layers_do_not_stand_in_the_way_of_another_criterion(pair):
    few = with_exits(pair[0], EarlyExitConfig((1, 3)))
    few.generation_config.exit_layers = [2]
    output = laws.generate(few, tiny_inputs(2), exit_criterion="fixed", exit_layer=3)
    assert set(output.layers_run.unique().tolist()) <= {0, 3}


def test_settings_of_a_call_never_leak(model):
    inputs, before = tiny_inputs(3), copy.deepcopy(model.generation_config.to_dict())
    never = laws.generate(model, inputs)
    early = laws.generate(model, inputs, **SCRIPT, batch_exit="batch", fill="eager", num_beams=2)
    passed = GenerationConfig(exit_criterion="fixed", exit_layer=1, max_new_tokens=5)
    given = passed.to_dict()
    fixed = model.generate(**inputs, generation_config=passed, return_dict_in_generate=True)
    assert set(fixed.layers_run.unique().tolist()) <= {0, 1} and passed.to_dict() == given
    again = laws.generate(model, inputs)
    assert torch.equal(never.sequences, again.sequences) and torch.equal(never.layers_run, again.layers_run)
    assert model.generation_config.to_dict() == before and early.layers_run.numel()
    assert not any(name.startswith("_exit") for name in vars(model))


def test_two_threads_with_different_settings_on_one_model(model):
    settings = [{}, SCRIPT | {"fill": "eager"}, SCRIPT, SOFTMAX, {"exit_criterion": "fixed", "exit_layer": 2}]
    inputs = [tiny_inputs(4, seed) for seed in range(len(settings))]
    expected = [laws.generate(model, one, **kwargs) for one, kwargs in zip(inputs, settings)]
    problems, barrier = [], threading.Barrier(len(settings))

    def work(place: int):
        barrier.wait()
        for _ in range(4):
            output = laws.generate(model, inputs[place], **settings[place])
            same = torch.equal(output.sequences, expected[place].sequences)
            same = same and torch.equal(output.layers_run, expected[place].layers_run)
            if not (same and torch.equal(output.layer_rows, expected[place].layer_rows)):
                problems.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(settings))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert problems == []


def failing_criterion():
    def confidence(self, point):
        if point.layer == 3:
            raise RuntimeError("the criterion broke")
        return torch.zeros(len(point.rows))

    return type("Failing", (), {"confidence": confidence})()


class FailingProcessor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 3:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"exit_criterion": failing_criterion(), "exit_threshold": 0.5}, RuntimeError),
        ({"logits_processor": LogitsProcessorList([FailingProcessor()]), **SCRIPT}, KeyboardInterrupt),
        ({"streamer": Tokens(fails_at=3), **SCRIPT}, RuntimeError),
    ],
    ids=("criterion", "processor", "streamer"),
)
def test_after_any_exception_the_model_is_as_it_was(pair, arguments, error):
    """Law 9: after an exception the model is unchanged."""
    stock, model = pair
    inputs = tiny_inputs(1, 2)
    generation, config = model.generation_config.to_dict(), model.config.to_dict()
    modules = [type(module) for module in model.modules()]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    expected = laws.stock_generate(stock, inputs)
    early = laws.generate(model, inputs, **SOFTMAX)
    with pytest.raises(error):
        model.generate(**inputs, max_new_tokens=9, **arguments)
    assert model.generation_config.to_dict() == generation and model.config.to_dict() == config
    assert [type(module) for module in model.modules()] == modules
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert torch.equal(laws.generate(model, inputs).sequences, expected.sequences)
    assert torch.equal(laws.generate(model, inputs, **SOFTMAX).layers_run, early.layers_run)


def test_exits_save_the_work_of_the_layers_above(model):
    """Blocks above the exit are not called."""
    with counting(model) as counts:
        laws.generate(model, tiny_inputs(3), exit_criterion="fixed", exit_layer=2)
    assert set(counts["block"]) == {1, 2} and set(counts["keys"]) == {1, 2}


def test_a_stock_cache_still_serves_plain_calls(model):
    inputs = tiny_inputs(2)
    ids = torch.zeros(2, 1, dtype=torch.long)
    output = model(**inputs, decoder_input_ids=ids, **{CACHE: stock_cache()}, use_cache=True)
    assert output[CACHE].get_seq_length() == 1
    assert model(**inputs, decoder_input_ids=ids, use_cache=True)[CACHE].get_seq_length() == 1
