"""The demo: its output agrees with direct calls of the model."""

import io
import re
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
from transformers import T5ForConditionalGeneration

from hf_earlyexit.cli import demo
from hf_earlyexit.cli.main import main
from hf_earlyexit.families.shipped import CHECKPOINT, default_exits, default_inputs, load_default
from hf_earlyexit.reports import terminal
from tests.cli.command_line import errors_of


TOKENS = 12
EXITS = {"exit_criterion": "softmax", "exit_threshold": 0.6, "exit_layers": [2, 4, 6]}
EXIT_FLAGS = ["--exit-criterion", "softmax", "--exit-threshold", "0.6", "--exit-layers", "2", "4", "6"]
FLAGS = [*EXIT_FLAGS, "--max-new-tokens", str(TOKENS)]
SUPERSCRIPTS = {ord(digit): None for digit in "⁰¹²³⁴⁵⁶⁷⁸⁹"}


@pytest.fixture(scope="module")
def demo_text() -> str:
    """The demo's output without colours, in lines so wide that none is wrapped."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(demo, "REPETITIONS", 1)
        patch.setattr("hf_earlyexit.cli.generate.text_width", lambda: 10_000)
        threads = torch.get_num_threads()
        assert main(["demo", *FLAGS]) == 0
        assert torch.get_num_threads() == threads
    return stdout.getvalue()


@pytest.fixture
def few_inputs(monkeypatch):
    """Reduce the demo to two inputs, timed once; `demo_text` covers all of them."""
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    monkeypatch.setattr(demo, "default_inputs", lambda: default_inputs()[:2])


@pytest.fixture(scope="module")
def direct():
    """The demo's batch and tokenizer, and the outputs of direct calls with and without exits."""
    model, tokenizer = load_default()
    batch = dict(tokenizer(default_inputs(), return_tensors="pt", padding=True), max_new_tokens=TOKENS)
    early = model.generate(**batch, **EXITS, return_dict_in_generate=True)
    full = model.generate(**batch, early_exit=False, return_dict_in_generate=True)
    return batch, tokenizer, early, full


def numbers_behind(name: str, text: str) -> list[float]:
    """The numbers in a table row."""
    (line,) = re.findall(rf"^{name}(?:  .*|$)", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"(?<!\w)\d+(?:\.\d+)?", line.removeprefix(name))]


def texts_behind(label: str, text: str) -> list[str]:
    return [line.removeprefix(label).strip() for line in text.splitlines() if line.startswith(label)]


def test_demo_counts_what_a_direct_call_counts(demo_text, direct):
    _, _, early, full = direct
    tokens, full_tokens = (int((output.layers_run > 0).sum()) for output in (early, full))
    layers, full_layers = int(early.layer_rows.sum()), int(full.layer_rows.sum())
    heads, full_heads = int(early.head_rows.sum()), int(full.head_rows.sum())
    assert layers < full_layers
    assert int(early.filled_positions.sum()) > 0

    assert numbers_behind("tokens written", demo_text)[:2] == [tokens, full_tokens]
    row = numbers_behind("decoder layers run, for one token each", demo_text)
    assert row == [layers, full_layers, pytest.approx(layers / full_layers, abs=0.006)]
    assert numbers_behind("  per token", demo_text)[:2] == [pytest.approx(layers / tokens, abs=0.006), 8]
    row = numbers_behind(r"skipped layers caught up on \(keys and values\)", demo_text)
    assert row == [int(early.filled_positions.sum()), 0]
    assert numbers_behind("vocabulary heads run", demo_text)[:2] == [heads, full_heads]


def test_demo_counts_what_is_scored_for_candidates(demo_text, few_inputs, capsys):
    settings = {**EXITS, "exit_candidates": 8}
    model, tokenizer = load_default()
    batch = tokenizer(default_inputs()[:2], return_tensors="pt", padding=True)
    early = model.generate(**batch, **settings, max_new_tokens=4, return_dict_in_generate=True)
    assert main(["demo", *EXIT_FLAGS, "--exit-candidates", "8", "--max-new-tokens", "4"]) == 0
    name = "single tokens of the vocabulary scored besides"
    assert numbers_behind(name, capsys.readouterr().out)[:2] == [int(early.candidate_rows.sum()), 0]
    assert early.candidate_rows.any() and name not in demo_text


def test_demo_counts_the_tokens_of_each_layer(demo_text, direct):
    layers_run = direct[2].layers_run
    for layer in EXITS["exit_layers"]:
        assert numbers_behind(f"layer {layer}", demo_text)[0] == int((layers_run == layer).sum()) > 0
    assert numbers_behind("layer 8, the last", demo_text)[0] == int((layers_run == 8).sum()) > 0
    assert numbers_behind("all", demo_text)[0] == int((layers_run > 0).sum())
    left_early = int(((layers_run > 0) & (layers_run < 8)).sum())
    assert f"of the {left_early} tokens that left early" in demo_text


def test_demo_shows_the_texts_of_full_depth_and_of_early_exit(demo_text, direct):
    _, tokenizer, early, full = direct
    full_texts, early_texts = (
        tokenizer.batch_decode(output.sequences, skip_special_tokens=True) for output in (full, early)
    )
    shown = [text.translate(SUPERSCRIPTS).replace("*", "") for text in texts_behind("  early exit", demo_text)]
    assert texts_behind("  full depth", demo_text) == full_texts
    assert shown == early_texts
    equal = sum(early == full for early, full in zip(early_texts, full_texts))
    assert 0 < equal < len(full_texts)
    assert numbers_behind("texts equal to full depth", demo_text) == [equal, len(full_texts)]
    assert f"{len(full_texts) - equal} of {len(full_texts)} texts differ from full depth's" in demo_text
    assert all(f"{number} input" in demo_text for number in range(1, 9))
    assert all(text in demo_text for text in default_inputs())


def test_demo_shows_the_layer_of_every_token(demo_text, direct):
    _, tokenizer, early, _ = direct
    for row, text in enumerate(texts_behind("  early exit", demo_text)):
        ids = early.sequences[row, 1:].tolist()
        left = [
            layer
            for token, layer in zip(ids, early.layers_run[row].tolist())
            if token not in tokenizer.all_special_ids and layer < 8
        ]
        assert [int(digits) for digits in text.translate(to_digits()) if digits.isdigit()] == left


def to_digits() -> dict[int, str]:
    """Translation of superscripts to digits; digits of the text itself become spaces."""
    return {**{ord(digit): " " for digit in "0123456789"}, **dict(zip(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹"), "0123456789"))}


def test_demo_marks_the_tokens_that_full_depth_would_not_write(demo_text, direct):
    batch, _, early, _ = direct
    stock = T5ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    marks = 0
    for length in range(1, early.sequences.shape[1]):
        prefix, written = early.sequences[:, :length], early.sequences[:, length]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        longer = stock.generate(**inputs, decoder_input_ids=prefix, max_new_tokens=1)
        live = early.layers_run[:, length - 1] > 0
        marks += int((live & (longer[:, length] != written)).sum())
    tokens = int((early.layers_run > 0).sum())
    assert 0 < marks < tokens
    assert sum(text.count("*") for text in texts_behind("  early exit", demo_text)) == marks
    assert numbers_behind("all", demo_text) == [tokens, tokens - marks]
    by_layer = [numbers_behind(f"layer {layer}", demo_text)[1] for layer in (*EXITS["exit_layers"], "8, the last")]
    assert sum(by_layer) == tokens - marks


def test_demo_says_how_it_measured_and_whether_it_was_slower(demo_text):
    for row, words in (("one text at a time", "early exit took"), ("as one batch", "as one batch")):
        early, stock, ratio = numbers_behind(f"milliseconds, {row}", demo_text)
        assert early > 0 and stock > 0
        said = re.search(rf"{words} ([\d.]+) of stock's time \((slower|faster)\)", demo_text)
        assert (said[2] == "slower") == (float(said[1]) > 1) or float(said[1]) == 1
        assert float(said[1]) == ratio == pytest.approx(early / stock, rel=0.1)
    assert "medians of 1, 8 texts, 1 CPU thread" in demo_text
    assert "whose tokens equal plain Transformers'" in demo_text


def test_demo_says_what_its_setting_is_worth_on_other_inputs(few_inputs):
    """The quality claim appears only for the measured setting, which is the default."""
    exits = default_exits()
    _, ours = exits["rougeL"].values()
    claim = f"On {len(exits['layers_run'])} other inputs this setting has ROUGE-L {ours:.1f}"
    trial = demo.run_trial({}, max_new_tokens=2)
    assert trial.settings == exits["setting"] and claim in demo.about_texts(trial, 10_000)
    other = demo.with_defaults({"exit_criterion": "softmax", "exit_threshold": 0.77})
    assert "other inputs" not in demo.about_texts(replace(trial, settings=other), 10_000)


def test_demo_has_no_escape_codes_when_it_is_not_a_terminal(demo_text):
    assert "\x1b" not in demo_text
    assert "word² = layer 2  word⁴ = layer 4  word⁶ = layer 6  plain = all 8" in demo_text


def test_demo_colours_when_told_to(capsys, few_inputs):
    fixed = ["--criterion", "fixed", "--exit-layer", "3", "--max-new-tokens", "3"]
    assert main(["demo", "--colour", "always", *fixed]) == 0
    text = capsys.readouterr().out
    assert f"\x1b[38;5;16;48;5;{terminal.colour_of(3, 8)}m" in text
    assert numbers_behind("layer 3", text)[0] == numbers_behind("all", text)[0] > 0
    assert "model.generate(**batch, exit_criterion='fixed', exit_layer=3, max_new_tokens=3)" in text
    assert "After decoder layer 3 of 8" in text
    assert "²" not in text


def test_demo_shows_a_text_of_nothing_but_padding_as_such(few_inputs):
    trial = demo.run_trial({"exit_criterion": "state"}, max_new_tokens=2)
    trial.early.sequences[0] = 0
    assert "(no text: 2 tokens such as <pad>)" in demo.describe(trial, colour=False, width=100)


@pytest.mark.parametrize(
    "flags, message",
    (
        (["--criterion", "fixed"], "needs `exit_layer`"),
        (["--exit-layers", "9"], "`exit_layers=[9]` has [9], which are no exit points"),
        (["--colour", "sometimes"], "--colour: invalid choice"),
    ),
)
def test_demo_refuses_bad_arguments(capsys, flags, message):
    assert message in errors_of(["demo", *flags], capsys)
