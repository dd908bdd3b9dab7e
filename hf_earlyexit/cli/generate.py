"""The verbs `demo` and `generate`."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import starmap
from pathlib import Path
from typing import Any, TextIO

from hf_earlyexit.cli.arguments import (
    Verb,
    add_exit_settings,
    add_model_arguments,
    check_device,
    check_file,
    check_settings_files,
    exit_settings,
    load,
    model_path,
    positive,
    rows_at_once,
    schedule,
    source_cut,
    text_of,
)
from hf_earlyexit.cli.data import PREFIX
from hf_earlyexit.common.failures import reading
from hf_earlyexit.common.json_text import decode
from hf_earlyexit.common.output_files import refuse_overwriting, written_beside
from hf_earlyexit.common.tables import READERS, Table, content_of, read_file, read_json_lines, suffix_of
from hf_earlyexit.reports import terminal


USUAL_ROWS = 8
STDIN = 0  # its file descriptor
RESULT_FIELDS = ("output", "tokens", "layers_run", "mean_layers")
DEMO = """\
Generate from real inputs with the model that ships with the package, and show for every token the layer it left at,
the layers run, and the time beside stock Transformers. Nothing is downloaded.
"""
DEMO_EXAMPLE = """\
example:
  hf-earlyexit demo
  hf-earlyexit demo --criterion classifier --threshold 0.5 --exit-layers 2 4 6
  hf-earlyexit demo --criterion fixed --exit-layer 6
"""
GENERATE = """\
Generate one output for every line of a text or row of a table, as JSON lines: the input, the output, its tokens, the
layers that each token ran and their mean. Without an exit criterion, here or in the model's generation_config, every
token runs all layers. Blank lines are skipped.
"""
GENERATE_EXAMPLE = """\
example:
  hf-earlyexit generate --input-file inputs.txt --exit-criterion softmax --exit-threshold 0.9
  hf-earlyexit generate --model google/flan-t5-small --input-file articles.jsonl --input-field article \\
      --prefix "summarize: " --output-file summaries.jsonl --exit-criterion fixed --exit-layer 6
"""


# --- demo -----------------------------------------------------------------------------------------------------------


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    add_exit_settings(parser, criterion="the shipped model's", threshold="the shipped model's", layers="all")
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="tokens per text at most (64)")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="escape codes (auto)")


def demo(arguments: argparse.Namespace) -> int:
    """The verb `demo`."""
    from hf_earlyexit.cli.demo import describe, run_trial

    trial = run_trial(exit_settings(arguments), arguments.max_new_tokens)
    print(describe(trial, terminal.use_colour(arguments.colour, sys.stdout), text_width()))
    return 0


def text_width() -> int:
    """Columns for running text: the terminal's width, at most 120."""
    return min(120, shutil.get_terminal_size((110, 24)).columns)


# --- generate -------------------------------------------------------------------------------------------------------


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input-file", required=True, metavar="FILE", help="text or table (.jsonl, .csv, ...); - is stdin"
    )
    files.add_argument(
        "--input-field",
        metavar="NAME",
        help="the column with the input ('text'); of other files than tables, lines are JSON objects",
    )
    files.add_argument("--output-file", metavar="FILE", help="where to write JSON lines (stdout)")
    add_model_arguments(parser.add_argument_group("model"))
    text = parser.add_argument_group("generation")
    text.add_argument(
        "--prefix", type=text_of, default="", metavar="TEXT", help="put before each input, such as 'summarize: '"
    )
    text.add_argument("--batch-size", type=positive, metavar="N", help="inputs at once (as certified, else 8)")
    text.add_argument("--max-new-tokens", type=positive, metavar="N", help="tokens per output at most (the model's)")
    text.add_argument(
        "--max-source-tokens", type=positive, metavar="N", help="longer inputs are cut (as certified, else never)"
    )
    text.add_argument("--num-beams", type=positive, metavar="N", help="beams; 1 is greedy (the model's)")
    exits = parser.add_argument_group("exit settings, the keywords of model.generate")
    add_exit_settings(exits, criterion="the model's", threshold="the model's", layers="the model's")
    exits.add_argument("--exit-schedule", type=schedule, metavar="NAME", help="constant, calm, calm_released, or JSON")
    exits.add_argument("--no-early-exit", action="store_true", help="every token runs all layers, whatever is set")


def generate(arguments: argparse.Namespace) -> int:
    """The verb `generate`."""
    records = read_records(arguments.input_file, arguments.input_field)
    if arguments.prefix:
        records = [with_prefix(record, arguments.prefix) for record in records]
    check_arguments(arguments)
    model, tokenizer = load(arguments)
    if can_be_prepared(model):
        model.prepare_for_generation()
    arguments.max_source_tokens = source_cut(arguments, model)
    tally = Tally(model.config.num_decoder_layers)
    with open_output(arguments.output_file) as output, progress(len(records), output) as bar:
        for batch in batches(records, rows_at_once(arguments, model, USUAL_ROWS)):
            for result in generate_batch(model, tokenizer, batch, arguments, tally):
                print(to_json(result, output), file=output)
            output.flush()
            bar.update(len(batch))
    print(tally.summary(), file=sys.stderr)
    return 0


def can_be_prepared(model) -> bool:
    """Whether to generate with a prepared copy of the weights.

    The copy is used on a CPU, for dtypes other than float16 and for weights that are not quantised, and only if a
    certificate, where there is one, covers it.
    """
    import torch

    from hf_earlyexit.generation.implementations import PREPARED

    certificate = model.exit_certificate
    if certificate is not None and certificate.certified and PREPARED not in certificate.implementations:
        return False
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    return model.device.type == "cpu" and model.dtype != torch.float16 and not is_quantised


def read_records(path: str, field: str | None) -> list[dict[str, Any]]:
    """The inputs of a file as objects with the text in `input`. Other columns of a table are kept.

    Raises:
        ValueError: The file has no input, or a line is malformed; the message has its number.
    """
    if path != "-" and suffix_of(path) in READERS:
        return records_of(read_file(path), field or "text")
    name, content = ("stdin", standard_input()) if path == "-" else (path, content_of(path))
    text = content if isinstance(content, str) else decode(content, name)
    if field is not None:
        return records_of(read_json_lines(text, name), field)
    lines = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
    return _refuse_none([{"input": line} for line in lines if line.strip()], name)


def standard_input() -> bytes | str:
    """Content of stdin: bytes, or text if `sys.stdin` was replaced by an object without a buffer."""
    return getattr(sys.stdin, "buffer", sys.stdin).read()


def records_of(table: Table, field: str) -> list[dict[str, Any]]:
    """The rows of a table, with `field` renamed to `input`."""
    return _refuse_none(
        [record_of(record, field, table.where(row)) for row, record in enumerate(table.records)], table.path
    )


def record_of(record: dict[str, Any], field: str, where: str) -> dict[str, Any]:
    """One row, with `field` renamed to `input`."""
    if not isinstance(record.get(field), str):
        raise ValueError(f"{where}: the field {field!r} must be a text; the row has {list(record)}: see --input-field")
    others = {name: value for name, value in record.items() if name != field}
    return {"input": record[field], **_refuse_taken(others, where)}


def _refuse_none(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    if not records:
        raise ValueError(f"{name} is empty: one input a line is expected")
    return records


def _refuse_taken(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `record`; raise `ValueError` if a result would overwrite one of its fields."""
    if taken := {"input", *RESULT_FIELDS} & set(record):
        raise ValueError(f"{where}: results would write over the fields {sorted(taken)}: rename them")
    return record


def with_prefix(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A record with the prefix of its input, so that `tune` can reconstruct the text that the model read."""
    if PREFIX in record:
        raise ValueError(f"--prefix: results would write over the field {PREFIX!r} of the inputs: rename it")
    return {**record, PREFIX: prefix}


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse invalid arguments before a model is loaded."""
    if arguments.output_file and not Path(arguments.output_file).parent.is_dir():
        raise ValueError(f"{arguments.output_file}: there is no such folder to write to")
    check_file("--output-file", arguments.output_file)
    source = STDIN if arguments.input_file == "-" else arguments.input_file
    refuse_overwriting({"--output-file": arguments.output_file}, [source, model_path(arguments)])
    check_device(arguments.device)
    from transformers import GenerationConfig

    from hf_earlyexit.decoding.settings import ExitSettings

    check_settings_files(model_path(arguments))
    try:
        with reading(model_path(arguments), "generation_config.json"):
            stored = GenerationConfig.from_pretrained(model_path(arguments))
    except OSError:  # no generation_config, or no such model; loading reports the latter
        stored = None
    if (count := getattr(stored, "num_return_sequences", None) or 1) > 1:
        raise ValueError(
            f"the generation_config of {model_path(arguments)} asks for {count} outputs of each input "
            "(num_return_sequences), one is written: set it to 1 there"
        )
    ExitSettings.merge(exit_settings(arguments), None, stored)


def open_output(path: str | None) -> AbstractContextManager[TextIO]:
    """Context manager of the output stream. It does not close standard output."""
    return written_beside(path) if path else nullcontext(sys.stdout)


def progress(total: int, output: TextIO):
    """A progress bar on stderr if that is a terminal and the results go elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, unit="input", disable=True if output.isatty() else None)


def batches(records: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """The records in batches of at most `size`, in their order."""
    return (records[start : start + size] for start in range(0, len(records), size))


def generate_batch(model, tokenizer, batch, arguments, tally: Tally) -> Iterator[dict[str, Any]]:
    """Generate for one batch and return its results in input order."""
    texts = [arguments.prefix + record["input"] for record in batch]
    cut = {"truncation": True, "max_length": arguments.max_source_tokens} if arguments.max_source_tokens else {}
    encoded = tokenizer(texts, return_tensors="pt", padding=True, **cut).to(model.device)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "num_beams")}
    options = {name: value for name, value in options.items() if value is not None}
    output = model.generate(**encoded, **options, **exit_settings(arguments), return_dict_in_generate=True)
    if output.get("layers_run") is None:
        raise ValueError(
            "the model's generation_config has a setting that early-exit decoding does not support: remove it there"
        )
    tally.add(output)
    outputs = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    return starmap(result_of, zip(batch, outputs, output.layers_run.tolist(), strict=True))


def result_of(record: dict[str, Any], text: str, layers_run: list[int]) -> dict[str, Any]:
    """The output record of one input. Steps after the end of its text, which ran no layer, are removed."""
    layers = [layer for layer in layers_run if layer > 0]
    mean = round(sum(layers) / len(layers), 3)
    return {**record, "output": text, "tokens": len(layers), "layers_run": layers, "mean_layers": mean}


def to_json(result: dict[str, Any], stream: TextIO) -> str:
    """The result as one JSON line, in ASCII unless the stream is UTF-8."""
    is_utf8 = (stream.encoding or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(result, ensure_ascii=not is_utf8)


class Tally:
    """Counts the work of all batches.

    Args:
        num_layers: Number of decoder layers.
    """

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self.inputs = self.tokens = self.token_layers = self.layers_executed = self.layers_full = 0
        self.start = time.perf_counter()

    def add(self, output) -> None:
        """Count one batch. Every row runs layer 1 at every step; at full depth each layer would run as many rows."""
        self.inputs += len(output.sequences)
        self.tokens += int((output.layers_run > 0).sum())
        self.token_layers += int(output.layers_run.sum())
        self.layers_executed += int(output.layer_rows.sum())
        self.layers_full += int(output.layer_rows[0]) * self.num_layers

    def summary(self) -> str:
        speed = self.tokens / (time.perf_counter() - self.start)
        return (
            f"{self.inputs} inputs, {self.tokens} tokens: on average {self.token_layers / self.tokens:.2f} of "
            f"{self.num_layers} layers per token; {self.layers_executed} of {self.layers_full} layers executed "
            f"({terminal.ratio(self.layers_executed, self.layers_full)}); {speed:.1f} tokens/s"
        )


VERBS = (
    Verb("demo", demo, "see early exit at work", DEMO, DEMO_EXAMPLE, add_demo_arguments),
    Verb("generate", generate, "generate from a file", GENERATE, GENERATE_EXAMPLE, add_generate_arguments),
)
