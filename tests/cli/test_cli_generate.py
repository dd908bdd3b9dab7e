"""The verb `generate`: input files and JSON lines as output."""

import io
import json
import re

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.cli.arguments import load
from hf_earlyexit.cli.main import build_parser, main
from hf_earlyexit.families.shipped import CHECKPOINT, default_inputs, load_default
from tests.cli.command_line import errors_of


EXITS = {"exit_criterion": "softmax", "exit_threshold": 0.6, "exit_layers": [2, 4, 6]}
EXIT_FLAGS = ["--exit-criterion", "softmax", "--exit-threshold", "0.6", "--exit-layers", "2", "4", "6"]
FLAGS = [*EXIT_FLAGS, "--max-new-tokens", "12"]


@pytest.fixture
def lines(capsys):
    """A function that runs `generate` and returns the JSON lines of stdout, which must have nothing else."""

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
    """A tiny plain T5, and an early-exit one that stores exit settings, both with the shipped tokenizer."""
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
    assert [(result["input"], result["input_prefix"]) for result in results] == [(text, "describe: ") for text in bare]
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
        (["--criterion", "softmax", "--threshold", "0", "--exit-candidates", "8"], {1}),
        (["--criterion", "patience", "--threshold", "0.5", "--exit-candidates", "8"], {2, 3}),
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


def test_generate_names_a_stored_setting_that_the_walk_does_not_do(capsys, tmp_path):
    model, tokenizer = load_default()
    model.generation_config.use_cache = False
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "inputs.txt").write_text("describe: name[Cotto]\n")
    arguments = ["--model", str(tmp_path / "model"), "--input-file", str(tmp_path / "inputs.txt")]
    assert "generation_config has a setting that early-exit decoding does not support" in errors_of(
        ["generate", *arguments, "--max-new-tokens", "2"], capsys
    )


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch):
    """Fail the test if a model is loaded."""

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
        (["--exit-criterion", "state", "--exit-threshold", "1", "--exit-candidates", "8"], "`exit_candidates=8` goes"),
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
