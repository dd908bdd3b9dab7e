"""The command line: what each verb prints, that its numbers are the model's, and how it refuses."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import hf_earlyexit
from hf_earlyexit import EarlyExitT5ForConditionalGeneration, demo, terminal
from hf_earlyexit.cli import DEMO_EXAMPLE, ENV_EXAMPLE, GENERATE_EXAMPLE, build_parser, load, main
from hf_earlyexit.default import CHECKPOINT, default_exits, default_inputs, load_default
from hf_earlyexit.policies import BATCH_RULES, CRITERIA, SCHEDULES


TOKENS = 12
EXITS = {"exit_criterion": "softmax", "exit_threshold": 0.6, "exit_layers": [2, 4, 6]}
EXIT_FLAGS = ["--exit-criterion", "softmax", "--exit-threshold", "0.6", "--exit-layers", "2", "4", "6"]
FLAGS = [*EXIT_FLAGS, "--max-new-tokens", str(TOKENS)]
SUPERSCRIPTS = {ord(digit): None for digit in "⁰¹²³⁴⁵⁶⁷⁸⁹"}


def errors_of(arguments, capsys) -> str:
    """The one line that a refused call writes; nothing goes to stdout."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notices, line = captured.err.splitlines()
    assert not any("Traceback" in notice for notice in notices)
    assert line.startswith("hf-earlyexit: error: ")
    return line


# --- demo -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_text() -> str:
    """What the demo prints, without colours, in lines so long that none is cut."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(demo, "REPETITIONS", 2)
        patch.setattr("hf_earlyexit.cli.text_width", lambda: 10_000)
        threads = torch.get_num_threads()
        assert main(["demo", *FLAGS]) == 0
        assert torch.get_num_threads() == threads
    return stdout.getvalue()


@pytest.fixture(scope="module")
def direct():
    """The demo's model and batch, and what a direct call gives."""
    model, tokenizer = load_default()
    batch = dict(tokenizer(default_inputs(), return_tensors="pt", padding=True), max_new_tokens=TOKENS)
    early = model.generate(**batch, **EXITS, return_dict_in_generate=True)
    full = model.generate(**batch, early_exit=False, return_dict_in_generate=True)
    return batch, tokenizer, early, full


def numbers_behind(name: str, text: str) -> list[float]:
    """The numbers of a table's row."""
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
    """From superscripts; figures of the text itself are left out."""
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
    assert "medians of 2, 8 texts, 1 CPU thread" in demo_text
    assert "whose tokens equal plain Transformers'" in demo_text


def test_demo_says_what_its_setting_is_worth_on_other_inputs(monkeypatch):
    """Only of the setting that this was measured for, which is the one it has if told nothing."""
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    exits = default_exits()
    _, ours = exits["rougeL"].values()
    claim = f"On {len(exits['layers_run'])} other inputs this setting has ROUGE-L {ours:.1f}"
    trial = demo.run_trial({}, max_new_tokens=2)
    assert trial.settings == exits["setting"] and claim in demo.about_texts(trial, 10_000)
    other = demo.run_trial({"exit_criterion": "softmax", "exit_threshold": 0.77}, max_new_tokens=2)
    assert "other inputs" not in demo.about_texts(other, 10_000)


def test_demo_has_no_escape_codes_when_it_is_not_a_terminal(demo_text):
    assert "\x1b" not in demo_text
    assert "word² = layer 2  word⁴ = layer 4  word⁶ = layer 6  plain = all 8" in demo_text


def test_demo_colours_when_told_to(capsys, monkeypatch):
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    fixed = ["--criterion", "fixed", "--exit-layer", "3", "--max-new-tokens", "3"]
    assert main(["demo", "--colour", "always", *fixed]) == 0
    text = capsys.readouterr().out
    assert f"\x1b[38;5;16;48;5;{terminal.colour_of(3, 8)}m" in text
    assert numbers_behind("layer 3", text)[0] == numbers_behind("all", text)[0] > 0
    assert "model.generate(**batch, exit_criterion='fixed', exit_layer=3, max_new_tokens=3)" in text
    assert "After decoder layer 3 of 8" in text
    assert "²" not in text


def test_demo_shows_a_text_of_nothing_but_padding_as_such():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "REPETITIONS", 1)
        trial = demo.run_trial({"exit_criterion": "state"}, max_new_tokens=2)
    trial.early.sequences[0] = 0
    assert "(no text: 2 tokens such as <pad>)" in demo.describe(trial, colour=False, width=100)


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(capsys):
    """Runs `generate` and reads what it wrote to stdout: JSON lines and nothing else."""

    def run(*arguments) -> list[dict]:
        assert main(["generate", *map(str, arguments)]) == 0
        captured = capsys.readouterr()
        run.summary = captured.err.splitlines()[-1]
        return [json.loads(line) for line in captured.out.splitlines()]

    return run


@pytest.fixture(scope="module")
def inputs() -> list[str]:
    return default_inputs()[:3]


@pytest.fixture
def text_file(tmp_path, inputs):
    path = tmp_path / "inputs.txt"
    path.write_text("\n\n".join(inputs) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_checkpoints(tmp_path_factory):
    """A tiny plain T5, and one of ours that stores exit settings, both with the shipped tokenizer."""
    plain, ours = (tmp_path_factory.mktemp(name) for name in ("plain", "ours"))
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=8000, decoder_start_token_id=0, **shape)).save_pretrained(plain)
    model = EarlyExitT5ForConditionalGeneration.from_pretrained(plain)
    model.generation_config.exit_criterion, model.generation_config.exit_layer = "fixed", 2
    model.save_pretrained(ours)
    for path in (plain, ours):
        AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(path)
    return plain, ours


def test_generate_writes_what_the_model_generates_in_input_order(lines, text_file, inputs):
    results = lines("--input-file", text_file, *EXIT_FLAGS, "--max-new-tokens", "30")
    model, tokenizer = load_default()
    batch = tokenizer(inputs, return_tensors="pt", padding=True)
    output = model.generate(**batch, **EXITS, max_new_tokens=30, return_dict_in_generate=True)
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    assert len({len(result["layers_run"]) for result in results}) > 1 or (output.layers_run > 0).all()
    for result, text, expected, layers in zip(results, inputs, texts, output.layers_run):
        layers = layers[layers > 0].tolist()
        assert result == {
            "input": text,
            "output": expected,
            "tokens": len(layers),
            "layers_run": layers,
            "mean_layers": round(sum(layers) / len(layers), 3),
        }


def test_generate_cuts_rows_where_they_end_and_keeps_the_end_token(lines, text_file):
    results = lines("--input-file", text_file)
    _, tokenizer = load_default()
    for result in results:
        assert result["layers_run"] == [8] * len(tokenizer(result["output"]).input_ids)
    assert len({result["tokens"] for result in results}) > 1


def test_generate_keeps_the_order_over_batches(lines, text_file, inputs):
    results = lines("--input-file", text_file, "--batch-size", "2", "--max-new-tokens", "4", "--num-beams", "2")
    assert [result["input"] for result in results] == inputs
    assert [result["output"].split()[0] for result in results] == ["Fitzbillies", "Cotto", "Cocum"]


def test_generate_keeps_the_other_fields_of_json_lines(lines, tmp_path, inputs):
    path = tmp_path / "inputs.jsonl"
    records = [{"id": number, "text": text, "tags": ["é"]} for number, text in enumerate(inputs)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    results = lines("--input-file", path, "--max-new-tokens", "3")
    assert [(result["id"], result["input"], result["tags"]) for result in results] == [
        (record["id"], record["text"], record["tags"]) for record in records
    ]
    assert all("text" not in result and result["output"] for result in results)


def test_generate_reads_a_named_field_from_stdin_and_puts_the_prefix_before_it(lines, monkeypatch, inputs):
    bare = [text.removeprefix("describe: ") for text in inputs]
    stdin = "\n".join(json.dumps({"meaning": text, "text": 0}) for text in bare)
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    options = ("--input-file", "-", "--max-new-tokens", "4", "--prefix")
    results = lines(*options, "describe: ", "--input-field", "meaning")
    assert [result["input"] for result in results] == bare
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(inputs)))
    assert [result["output"] for result in lines(*options, "")] == [result["output"] for result in results]


def test_generate_writes_a_file(lines, text_file, tmp_path, inputs):
    path = tmp_path / "outputs.jsonl"
    text_file.write_text("describe: name[Café Rouge]\n", encoding="utf-8")
    assert lines("--input-file", text_file, "--output-file", path, "--max-new-tokens", "2") == []
    written = path.read_text(encoding="utf-8")
    assert "Café Rouge" in written
    assert json.loads(written)["input"] == "describe: name[Café Rouge]"


def test_generate_sums_up_on_stderr(lines, text_file):
    results = lines("--input-file", text_file, "--batch-size", "2", *FLAGS)
    tokens = sum(result["tokens"] for result in results)
    layers = sum(sum(result["layers_run"]) for result in results)
    said = re.fullmatch(
        r"3 inputs, (\d+) tokens: on average ([\d.]+) of 8 layers per token; (\d+) of (\d+) layers executed "
        r"\(([\d.]+)x\); [\d.]+ tokens/s",
        lines.summary,
    )
    assert said.groups() == (f"{tokens}", f"{layers / tokens:.2f}", f"{layers}", f"{8 * tokens}", said[5])
    assert float(said[5]) == pytest.approx(layers / (8 * tokens), abs=0.006)
    assert layers < 8 * tokens


def test_generate_counts_all_beams_as_work(lines, text_file):
    results = lines("--input-file", text_file, "--num-beams", "2", "--max-new-tokens", "5")
    executed, full = map(int, re.search(r"(\d+) of (\d+) layers executed", lines.summary).groups())
    assert executed == full == 8 * 5 * 2 * len(results)


@pytest.mark.parametrize(
    "flags, layers",
    (
        ([], {3}),
        (["--exit-criterion", "fixed", "--exit-layer", "1"], {1}),
        (["--criterion", "softmax", "--threshold", "0", "--batch-exit", "batch", "--fill", "eager"], {1}),
        (["--criterion", "softmax", "--threshold", "0", "--no-early-exit"], {3}),
        (["--criterion", "softmax", "--threshold", "0", "--exit-schedule", '{"name": "calm", "tau": 0}'], {3}),
    ),
)
def test_generate_takes_a_plain_t5_and_every_exit_setting(lines, text_file, tiny_checkpoints, flags, layers):
    results = lines("--model", tiny_checkpoints[0], "--input-file", text_file, "--max-new-tokens", "4", *flags)
    assert {layer for result in results for layer in result["layers_run"]} == layers


def test_generate_follows_the_settings_stored_with_a_model(lines, text_file, tiny_checkpoints):
    options = ("--model", tiny_checkpoints[1], "--input-file", text_file, "--max-new-tokens", "4")
    assert lines(*options)[0]["layers_run"] == [2] * 4
    assert lines(*options, "--exit-layer", "1")[0]["layers_run"] == [1] * 4
    assert lines(*options, "--no-early-exit")[0]["layers_run"] == [3] * 4


def test_generate_loads_in_the_dtype_that_is_asked_for(tiny_checkpoints):
    arguments = ["generate", "--input-file", "-", "--model", str(tiny_checkpoints[0])]
    assert load(build_parser().parse_args(arguments))[0].dtype == torch.float32
    assert load(build_parser().parse_args([*arguments, "--dtype", "bfloat16"]))[0].dtype == torch.bfloat16


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    """What can be refused early is refused before a model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(EarlyExitT5ForConditionalGeneration, "from_pretrained", refuse)


@pytest.mark.parametrize(
    "flags, message",
    (
        (["--exit-criterion", "sotfmax"], "`exit_criterion` must be one of"),
        (["--exit-criterion", "softmax"], "needs an `exit_threshold`"),
        (["--exit-criterion", "softmax", "--exit-threshold", "2"], "`exit_threshold` must be a number in"),
        (["--exit-layer", "2"], 'goes with `exit_criterion="fixed"`'),
        (["--batch-exit", "rows"], "`batch_exit` must be one of"),
        (["--fill", "late"], "`fill` must be one of"),
        (["--exit-schedule", "clam"], "`exit_schedule` must be one of"),
        (["--exit-schedule", "{"], "--exit-schedule: invalid"),
        (["--batch-size", "0"], "--batch-size: '0' is not a whole number from 1 on"),
        (["--max-new-tokens", "many"], "--max-new-tokens: 'many' is not a whole number"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--output-file", "no/such/folder/out.jsonl"], "no/such/folder/out.jsonl: there is no such folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ),
)
def test_generate_refuses_bad_arguments_before_loading(capsys, text_file, no_loading, flags, message):
    assert message in errors_of(["generate", "--input-file", str(text_file), *flags], capsys)


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("empty.txt", "", "is empty"),
        ("blank.txt", "\n \n", "is empty"),
        ("bad.jsonl", '{"text": "a"}\n\n{"text": \n', "bad.jsonl, line 3: not JSON"),
        ("list.jsonl", '["a"]\n', "list.jsonl, line 1: a JSON object is expected, got list"),
        ("field.jsonl", '{"text": "a"}\n{"txt": "a"}\n', "line 2: the field 'text' must be a text"),
        ("number.jsonl", '{"text": 1}\n', "line 1: the field 'text' must be a text"),
        ("taken.jsonl", '{"text": "a", "output": "b"}\n', "line 1: results would write over the fields ['output']"),
    ),
)
def test_generate_refuses_bad_inputs_before_loading(capsys, tmp_path, no_loading, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert message in errors_of(["generate", "--input-file", str(tmp_path / name)], capsys)


def test_generate_names_a_missing_file(capsys, tmp_path, no_loading):
    path = str(tmp_path / "nowhere.txt")
    assert f"{path}: No such file" in errors_of(["generate", "--input-file", path], capsys)


def test_generate_names_a_folder_that_is_no_model(capsys, tmp_path, text_file):
    line = errors_of(["generate", "--input-file", str(text_file), "--model", str(tmp_path)], capsys)
    assert str(tmp_path) in line


def test_generate_does_not_touch_the_output_of_a_refused_call(capsys, tmp_path, text_file):
    path = tmp_path / "precious.jsonl"
    path.write_text("precious")
    errors_of(["generate", "--input-file", str(text_file), "--output-file", str(path), "--fill", "late"], capsys)
    assert path.read_text() == "precious"


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


def test_a_verb_is_required(capsys):
    assert "VERB" in errors_of([], capsys)
    assert "invalid choice: 'dmeo'" in errors_of(["dmeo"], capsys)


# --- env, help ------------------------------------------------------------------------------------------------------


def test_env_names_versions_and_hardware(capsys):
    assert main(["env"]) == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["hf_earlyexit"] == hf_earlyexit.__version__
    assert facts["torch"] == torch.__version__
    assert facts["torch threads"] == str(torch.get_num_threads())
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]
    assert {"transformers", "accelerate", "datasets", "evaluate", "rouge-score", "tokenizers"} <= set(facts)
    assert {"platform", "cores", "cuda", "ctranslate2"} <= set(facts)


def test_env_names_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.machine.PACKAGES", ("no-such-package",))
    assert main(["env"]) == 0
    assert re.search(r"^no-such-package +not installed$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("verb", ("demo", "generate", "env"))
def test_help_has_an_example(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  hf-earlyexit {verb}" in capsys.readouterr().out


def test_help_names_every_choice_and_the_true_defaults(capsys):
    for verb, words in (
        ("generate", {*CRITERIA, *SCHEDULES, *BATCH_RULES}),
        ("demo", {*CRITERIA, *BATCH_RULES, "(the shipped model's)"}),
    ):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert [word for word in words if word not in text] == []


def test_the_examples_of_the_help_are_read(capsys):
    for example in (DEMO_EXAMPLE, GENERATE_EXAMPLE, ENV_EXAMPLE):
        for command in example.replace("\\\n", " ").splitlines()[1:]:
            program, *arguments = command.replace('"summarize: "', "summarize:").split()
            assert program == "hf-earlyexit"
            assert build_parser().parse_args(arguments)


def test_the_package_runs_as_a_module():
    finished = subprocess.run([sys.executable, "-m", "hf_earlyexit", "--help"], capture_output=True, text=True)
    assert finished.returncode == 0
    assert "usage: hf-earlyexit" in finished.stdout
    assert all(verb in finished.stdout for verb in ("demo", "generate", "env"))


def test_generate_names_a_stored_setting_that_the_walk_does_not_do(capsys, tmp_path):
    model, tokenizer = load_default()
    model.generation_config.use_cache = False
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "inputs.txt").write_text("describe: name[Cotto]\n")
    arguments = ["--model", str(tmp_path / "model"), "--input-file", str(tmp_path / "inputs.txt")]
    assert "generation_config asks for" in errors_of(["generate", *arguments, "--max-new-tokens", "2"], capsys)
