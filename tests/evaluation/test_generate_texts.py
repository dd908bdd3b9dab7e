"""Generated texts match direct calls batch by batch, and an interrupted run resumes to the same result."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hf_earlyexit.calibration.model_calibration import calibrate_model
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.common.data import Example
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.decoding.candidates import curve_candidates, full_depth, static_decoders
from hf_earlyexit.evaluation.generate_texts import WORK, Text, TextGenerator
from hf_earlyexit.evaluation.grid import Grid
from hf_earlyexit.evaluation.model_evaluation import evaluate_model
from hf_earlyexit.families.shipped import default_inputs, load_default
from tests.tiny import tiny_pair


EXAMPLES = [Example(text) for text in default_inputs()[:5]]
CANDIDATES = [full_depth(), *static_decoders([2]), *curve_candidates("softmax:2,6", [0.6])]
ENDS = ["▁is", "▁place", "▁coffee", "</s>"]  # makes texts end at different steps


@pytest.fixture(scope="module")
def shipped():
    return load_default()


@pytest.fixture(scope="module")
def generation(shipped):
    return {"max_new_tokens": 9, "eos_token_id": shipped[1].convert_tokens_to_ids(ENDS)}


@pytest.fixture
def calls(shipped, monkeypatch) -> list:
    """The batches passed to the model."""
    model, seen = shipped[0], []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **call: seen.append(call) or generate(**call))
    return seen


def direct(shipped, generation, examples, **keywords):
    model, tokenizer = shipped
    batch = tokenizer([one.source for one in examples], return_tensors="pt", padding=True)
    return model.generate(**batch, **generation, return_dict_in_generate=True, **keywords)


def texts_of(shipped, output, prompt: int = 1) -> list[Text]:
    """The texts of an output, read token by token."""
    found = []
    for text, ids, layers in zip(
        shipped[1].batch_decode(output.sequences, skip_special_tokens=True),
        output.sequences.tolist(),
        output.layers_run.tolist(),
    ):
        live = [(token, layer) for token, layer in zip(ids[prompt:], layers, strict=True) if layer]
        found.append(Text(text, [token for token, _ in live], [layer for _, layer in live]))
    return found


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda one: one.name)
def test_what_is_written_is_what_direct_calls_write(shipped, generation, candidate):
    found = TextGenerator(*shipped, batch_size=2, generation=generation).write(EXAMPLES, candidate, "some")
    batches = [EXAMPLES[:2], EXAMPLES[2:4], EXAMPLES[4:]]
    outputs = [direct(shipped, generation, batch, **candidate.keywords) for batch in batches]
    assert found.texts == [text for output in outputs for text in texts_of(shipped, output)]
    for name in WORK:
        assert found.work[name] == sum(getattr(output, name) for output in outputs).tolist()
    lengths = [len(text.tokens) for text in found.texts]
    assert len(set(lengths)) > 1 and sum(lengths) == found.work["layer_rows"][0], "texts end at different steps"
    layers = {layer for text in found.texts for layer in text.layers_run}
    assert layers == {"full depth": {8}, "static decoder 2": {2}}.get(candidate.name, {2, 6, 8})


def test_beams(shipped, generation):
    beams = generation | {"num_beams": 2}
    found = TextGenerator(*shipped, batch_size=5, generation=beams).write(EXAMPLES, CANDIDATES[-1], "some")
    expected = texts_of(shipped, direct(shipped, beams, EXAMPLES, **CANDIDATES[-1].keywords))
    assert found.texts == expected and len({len(text.tokens) for text in expected}) > 1


def test_batches(shipped):
    writer = TextGenerator(*shipped, batch_size=2, generation={"max_new_tokens": 3})
    batches = list(writer.batches(EXAMPLES))
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    assert all(batch["max_new_tokens"] == 3 for batch in batches)
    live = [ids[mask > 0].tolist() for one in batches for ids, mask in zip(one["input_ids"], one["attention_mask"])]
    assert live == [shipped[1](example.source).input_ids for example in EXAMPLES], "in order, and padding is masked"
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == [max(map(len, live[:2])), max(map(len, live[2:4])), len(live[4])]
    assert [len(batch["input_ids"]) for batch in writer.batches(EXAMPLES, 4)] == [4, 1]


def test_long_inputs_are_cut(shipped):
    tokenizer = shipped[1]
    (batch,) = TextGenerator(*shipped, max_source_tokens=12).batches(EXAMPLES)
    assert batch["attention_mask"].all()
    whole = [tokenizer(example.source).input_ids for example in EXAMPLES]
    assert batch["input_ids"].tolist() == [[*ids[:11], tokenizer.eos_token_id] for ids in whole]


def test_a_run_that_was_cut_off_goes_on_and_comes_to_the_same(shipped, generation, calls, tmp_path):
    """After a cut inside any line, the header included, batches of whole lines are not generated again."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"

    def run(path):
        calls.clear()
        writer = TextGenerator(*shipped, batch_size=3, generation=generation, journal=Journal(path, {"seed": 1}))
        return [writer.write(EXAMPLES, candidate, "some") for candidate in CANDIDATES[1:]]

    expected = run(whole)
    content, batches = whole.read_bytes(), len(calls)
    assert batches == 4 and run(whole) == expected and calls == []
    ends = [place for place, byte in enumerate(content, start=1) if byte == ord("\n")]
    for kept, (start, end) in enumerate(pairwise([0, *ends])):
        cut.write_bytes(content[: (start + end) // 2])
        assert run(cut) == expected and len(calls) == batches - max(0, kept - 1)
        assert cut.read_bytes() == content


def test_parts_candidates_and_batch_sizes_do_not_take_each_others_entries(shipped, generation, calls):
    journal = Journal(None, {})
    for part, examples, candidate, size in (
        ("select", EXAMPLES[:2], CANDIDATES[0], 2),
        ("report", EXAMPLES[2:4], CANDIDATES[0], 2),
        ("report", EXAMPLES[2:4], CANDIDATES[1], 2),
        ("report", EXAMPLES[2:4], CANDIDATES[1], 1),
    ):
        writer = TextGenerator(*shipped, batch_size=size, generation=generation, journal=journal)
        before = len(calls)
        first = writer.write(examples, candidate, part)
        assert len(calls) == before + 2 // size
        assert writer.write(examples, candidate, part) == first and len(calls) == before + 2 // size
        assert first == TextGenerator(*shipped, batch_size=size, generation=generation).write(
            examples, candidate, part
        )
    assert len(journal.entries) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    (
        ({"use_cache": False}, "generation_config has settings that early exit does not support"),
        ({"num_return_sequences": 2}, "1"),
    ),
)
def test_what_cannot_be_compared_is_refused(shipped, generation, more, message):
    asked = generation | {"num_beams": 2} | more
    with pytest.raises(ValueError, match=message):
        TextGenerator(*shipped, generation=asked).write(EXAMPLES[:1], full_depth(), "some")


def test_a_tokenizer_of_another_model_is_refused_before_any_work(shipped, calls):
    other = tiny_pair("tied")[1]
    with pytest.raises(ValueError, match="EarlyExitT5.*the tokenizer has 8000 tokens, the model 97"):
        TextGenerator(other, shipped[1])
    examples = [Example(f"text {number}", ("text",)) for number in range(200)]
    with pytest.raises(ValueError, match="the tokenizer has 8000 tokens, the model 97"):
        calibrate_model(other, shipped[1], examples, RiskTarget(0.5))
    with pytest.raises(ValueError, match="the tokenizer has 8000 tokens, the model 97"):
        evaluate_model(other, shipped[1], examples, Grid())
    assert calls == []
