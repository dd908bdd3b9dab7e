"""Evaluation of a checkpoint's exits: criteria x thresholds x batch sizes x batch rules, compared to the stock model.

The experiment of arXiv 2407.20272 on any model and data. The unit is the distinct input with all its references. Every
cell is timed against the stock model at full depth, with alternating calls in one process. Results are plain values
(see `reports/report.py`).
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_earlyexit.common.data import Example, data_fingerprint
from hf_earlyexit.common.extras import require
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.common.machine import environment, load
from hf_earlyexit.common.partition import OPEN, Partition
from hf_earlyexit.decoding.candidates import FULL_DEPTH, STATIC, Candidate, full_depth
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.forced import force
from hf_earlyexit.evaluation.generate_texts import Generations, Text, TextGenerator
from hf_earlyexit.evaluation.grid import Cell, Grid, is_on_a_curve
from hf_earlyexit.evaluation.heat_map import heat_map
from hf_earlyexit.evaluation.intervals import mean_interval, ratio_interval
from hf_earlyexit.evaluation.metrics import Bleu, exact_match, rouge_scores, textual_consistency
from hf_earlyexit.evaluation.oracle_curves import oracle_values
from hf_earlyexit.evaluation.reliability import reliability
from hf_earlyexit.exits.criteria import CRITERIA
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.families.t5.stock import stock_generate, stock_of
from hf_earlyexit.generation.certificate import Certificate, versions
from hf_earlyexit.generation.certified import uncertified
from hf_earlyexit.generation.fingerprint import tokenizer_fingerprint, weights_fingerprint
from hf_earlyexit.generation.refusals import refuse_training_mode
from hf_earlyexit.speed import latency
from hf_earlyexit.speed.timing import CLOCKS, clock_of, one_thread, spread, take_turns


FORMAT = 1
ROUGE = ("rouge1", "rouge2", "rougeL")
SHOWN = 4  # number of examples shown token by token
Way = tuple[PreTrainedModel, Callable[..., Any]]  # a way to generate: a model, and the function to call


def evaluate_model(
    model: EarlyExitT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    grid: Grid | None = None,
    *,
    generation: Mapping[str, Any] | None = None,
    max_source_tokens: int | None = None,
    path: str | Path | None = None,
    data_name: str = "",
    parts: Sequence[str] = OPEN,
    partition: Partition | None = None,
) -> dict[str, Any]:
    """Evaluate every cell of a grid.

    Args:
        model: In eval mode; not changed. Its certificate, if any, is included in the results.
        tokenizer: Of the model.
        examples: Distinct inputs with references. Inputs of parts other than `parts` are not read.
        grid: The settings to evaluate.
        generation: Keywords of `generate` besides the exits, overriding the model's generation_config. No sampling.
        max_source_tokens: Longer inputs are truncated; None: never.
        path: A journal. An interrupted run resumes from it, cell by cell.
        data_name: Name of the data, for the results.
        parts: Parts of the partition that are read. The default is the open parts, because a setting chosen by these
            results cannot be tested on the same inputs. Inputs of the report part that the model's certificate was
            chosen or tested on are left out.
        partition: The default one if None.

    Returns:
        Plain values: `quality` by key, `cells`, `reliability`, `oracle`, `examples`, `certificate`, and the settings
        of the run. Scores include BLEU if sacreBLEU is installed.

    Raises:
        ValueError: An argument is invalid, inputs repeat each other, or one has no reference.
        ImportError: scipy, which comes with the extra `calibrate`, is not installed.
        All before anything is generated.
    """
    partition = partition or Partition()
    _refuse_unjudgeable(examples)
    read = inputs_to_read(examples, parts, partition, model.exit_certificate)
    evaluation = _Evaluation(model, tokenizer, read, grid or Grid(), generation, max_source_tokens, path, data_name)
    evaluation.asked |= {"parts": [*parts], "partition": partition.described()}
    with one_thread():
        return evaluation.run()


class _Evaluation:
    """One evaluation: checked settings, then its stages."""

    def __init__(self, model, tokenizer, examples, grid: Grid, generation, max_source_tokens, path, data_name: str):
        require("scipy.stats", "calibrate")  # checked here too, to fail before hours of generating
        refuse_training_mode(model)
        self.tokenizer, self.started = tokenizer, date.today().isoformat()
        self.certificate = model.exit_certificate
        self.model, self.examples, self.grid = uncertified(model), list(examples), grid
        self.candidates = grid.candidates(model)
        _refuse_larger(grid.batch_sizes, len(self.examples))
        self.asked = {
            "data": data_name,
            "weights": weights_fingerprint(model),
            "inputs": data_fingerprint(examples),
            "max_new_tokens": (generation or {}).get("max_new_tokens", model.generation_config.max_new_tokens),
            "max_source_tokens": max_source_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "rounds": grid.rounds,
        }
        self.options = {"generation": dict(generation or {}), "max_source_tokens": max_source_tokens}
        self.options["journal"] = self.journal = Journal(path, {**self.asked, **self._not_shown(generation or {})})
        self.stocks = {None: stock_of(self.model)}
        self.writer = self._writer(grid.writing_batch_size)

    def run(self) -> dict[str, Any]:
        """Run all stages."""
        full = self.writer.write(self.examples, full_depth(), "all").texts
        quality, cells = {}, []
        for cell in tqdm(self.grid.cells(self.candidates), desc="cells", unit="cell"):
            if cell.quality not in quality:
                quality[cell.quality] = self._quality(cell, full)
            cells.append(self._timed(cell))
        shown = best(quality, cells, self.grid, clock_of(self.model.device.type)) or next(
            cell for cell in cells if is_on_a_curve(cell["curve"])
        )
        return {
            "format": FORMAT,
            "asked": {**self.asked, **self._of_grid()},
            "environment": environment(),
            "commit": commit(),
            "started": self.started,
            "num_layers": self.model.config.num_decoder_layers,
            "inputs": self._inputs(full),
            "quality": quality,
            "cells": cells,
            **self._forced(full),
            "examples": self._examples(quality[shown["quality"]], full),
            "certificate": self.certificate and asdict(self.certificate),
        }

    def _not_shown(self, generation: Mapping[str, Any]) -> dict[str, Any]:
        """Further settings that everything in the journal depends on."""
        settings = ExitSettings.merge(full_depth().keywords, None, None)
        conditions = self.model.conditions_of(settings, {"kwargs": dict(generation), **generation})
        if conditions.get("do_sample"):
            raise ValueError("`do_sample=True` cannot be evaluated, texts would be of one draw: use greedy or beams.")
        return {
            "decoding": {name: value for name, value in conditions.items() if hasattr(GenerationConfig(), name)},
            "exits": self.model.early_exit.to_dict(),
            "device": self.model.device.type,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "versions": versions(),
        }

    def _writer(self, size: int) -> TextGenerator:
        return TextGenerator(self.model, self.tokenizer, batch_size=size, **self.options)

    def _of_grid(self) -> dict[str, Any]:
        names = ("batch_sizes", "batch_rules", "points")
        about = {"model": Path(self.model.name_or_path).name, "clock": clock_of(self.model.device.type)}
        return about | {name: getattr(self.grid, name) for name in names}

    def _inputs(self, full: Sequence[Text]) -> dict[str, Any]:
        masks = [row for batch in self.writer.batches(self.examples) for row in batch["attention_mask"]]
        lengths = [int(mask.sum()) for mask in masks]
        return {
            "count": len(full),
            "source_tokens": lengths,
            "full_depth_tokens": [len(text.tokens) for text in full],
        }

    # --- quality ----------------------------------------------------------------------------------------------------

    def _quality(self, cell: Cell, full: Sequence[Text]) -> dict[str, Any]:
        writer = self._writer(cell.size) if cell.waits else self.writer
        candidate = Candidate(cell.candidate.curve, cell.candidate.threshold, cell.keywords)
        part = f"{cell.rule} of {cell.size}" if cell.waits else "all"
        writing = writer.write(self.examples, candidate, part)
        place = {"batch_exit": cell.rule, "batch_size": cell.size if cell.waits else None}
        return {
            **asdict(candidate),
            "name": candidate.name,
            **place,
            **judge(writing, full, self.examples, self._depth),
        }

    @property
    def _depth(self) -> int:
        return self.model.config.num_decoder_layers

    # --- time -------------------------------------------------------------------------------------------------------

    def _timed(self, cell: Cell) -> dict[str, Any]:
        if cell.key not in self.journal:
            self.journal.add(cell.key, {"load": load(), "time": self._time(cell)})
        one = cell.candidate
        place = {"name": one.name, "curve": one.curve, "threshold": one.threshold}
        return {
            "quality": cell.quality,
            **place,
            "batch_exit": cell.rule,
            "batch_size": cell.size,
            **self.journal[cell.key],
        }

    def _time(self, cell: Cell) -> dict[str, Any]:
        ours = (self.model, partial(self.model.generate, **cell.keywords))
        if cell.candidate.curve == STATIC:
            ours = self._way_of_stock(cell.candidate.threshold)
        # Repeat the inputs cyclically so that every batch is full.
        inputs = list(islice(cycle(self.examples), cell.size * self.grid.rounds))
        batches = cycle(self.writer.batches(inputs, cell.size))
        return time_beside_stock(ours, self._way_of_stock(None), islice(batches, self.grid.rounds + 1))

    def _way_of_stock(self, layers: int | None) -> Way:
        stock = self._stock(layers)
        return stock, partial(stock_generate, stock)

    def _stock(self, layers: int | None) -> PreTrainedModel:
        if layers not in self.stocks:
            self.stocks[layers] = stock_of(self.model, layers)
        return self.stocks[layers]

    # --- further results --------------------------------------------------------------------------------------------

    def _forced(self, full: Sequence[Text]) -> dict[str, Any]:
        """Results from one teacher-forced pass over full depth's texts: `reliability` and `oracle`."""
        asked = [one for one in self.candidates if is_on_a_curve(one.curve)]
        names = list(dict.fromkeys(one.keywords["exit_criterion"] for one in asked))
        keys = {
            "reliability": f"reliability | {', '.join(names)}",
            "oracle": f"oracle | {', '.join(one.name for one in asked)}",
        }
        if any(key not in self.journal for key in keys.values()):
            forced = force(self.writer, self.examples, full, {name: CRITERIA[name]() for name in names})
            readings = {"reliability": lambda: reliability(forced), "oracle": lambda: oracle_values(forced, asked)}
            for name, read in readings.items():
                if keys[name] not in self.journal:
                    self.journal.add(keys[name], read())
        return {name: self.journal[key] for name, key in keys.items()}

    def _examples(self, shown: Mapping[str, Any], full: Sequence[Text]) -> list[dict[str, Any]]:
        few = self.examples[:SHOWN]
        return heat_map(self.writer, self._stock(None), few, full[:SHOWN], shown["name"], shown["keywords"])


def inputs_to_read(
    examples: Sequence[Example], parts: Sequence[str], partition: Partition, certificate: Certificate | None
) -> list[Example]:
    """The inputs of some parts. From the report part, only those that a certificate has not seen.

    Raises:
        ValueError: No input is left.
    """
    kept = partition.keep(examples, parts)
    if certificate is None:
        return kept
    unseen = {one.source for one in certificate.unseen(kept)}
    left = [one for one in kept if one.source in unseen or partition.part_of(one.unit) != "report"]
    if not left:
        raise ValueError(f"The model's certificate has seen all {len(kept)} inputs of the report part: give others.")
    return left


def _refuse_unjudgeable(examples: Sequence[Example]) -> None:
    if not examples:
        raise ValueError("`examples` must have at least one input, got none.")
    if repeated := len(examples) - len({one.source for one in examples}):
        raise ValueError(
            f"`examples` repeats {repeated} of {len(examples)} inputs: group them, as `data.group_by_input` does."
        )
    without = next((one.source for one in examples if not one.references), None)
    if without is not None:
        raise ValueError(f"The input {without[:80]!r} has no reference to be judged by: name their column.")


def _refuse_larger(batch_sizes: Sequence[int], count: int) -> None:
    larger = [size for size in batch_sizes if size > count]
    if larger:
        raise ValueError(f"`batch_sizes` has {larger[0]}, but there are {count} inputs: leave it out, or give more.")


def judge(writing: Generations, full: Sequence[Text], examples: Sequence[Example], num_layers: int) -> dict[str, Any]:
    """The quality and the work of texts.

    Scores are times 100, with 95 % intervals over units. BLEU, which is not a mean over inputs, has no interval.
    """
    texts, references = [one.text for one in writing.texts], [list(one.references) for one in examples]
    units = [one.unit for one in examples]
    rouge = [rouge_scores(*pair) for pair in zip(texts, references, strict=True)]
    each = {name: [100 * one[name] for one in rouge] for name in ROUGE}
    each["consistency"] = [100 * textual_consistency(text, one.text) for text, one in zip(texts, full, strict=True)]
    each["equal_texts"] = [100 * exact_match(text, one.text) for text, one in zip(texts, full, strict=True)]
    depths = [depth for one in writing.texts for depth in one.layers_run]
    tokens = [len(one.layers_run) for one in writing.texts]
    return {
        "scores": {name: mean_interval(values, units) for name, values in each.items()} | _bleu(texts, references),
        "mean_layers": ratio_interval([sum(one.layers_run) for one in writing.texts], tokens, units),
        "tokens": len(depths),
        "distribution": [depths.count(layer) / len(depths) for layer in range(1, num_layers + 1)],
        "work": writing.work,
        "per_input": {
            "rougeL": each["rougeL"],
            "consistency": each["consistency"],
            "layers": [fmean(one.layers_run) for one in writing.texts],
            "tokens": tokens,
        },
    }


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU, if sacreBLEU is installed."""
    if find_spec("sacrebleu") is None:
        return {}
    score = Bleu().compute(predictions=texts, references=references)["bleu"]
    return {"bleu": {"mean": score, "low": None, "high": None}}


def time_beside_stock(ours: Way, stock: Way, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and latencies of two ways to generate, alternating on each batch; the first batch is a warm-up."""
    ways = {"ours": ours, "stock": stock}
    calls: dict[str, list[latency.CallTimes]] = {name: [] for name in ways}

    def generate(name: str, batch: Mapping[str, Any]) -> None:
        calls[name].append(latency.timed_generate(*ways[name], batch))

    rounds = ({name: partial(generate, name, batch) for name in ways} for batch in batches)
    times = take_turns(rounds, random.Random(0))
    found: dict[str, Any] = {"ratio": {clock: times.ratio("ours", {"stock": 1.0}, clock) for clock in CLOCKS}}
    for name, (_, *timed) in calls.items():
        seconds = {clock: spread(times.seconds[clock][name]) for clock in CLOCKS}
        found[name] = {"seconds": seconds, **latency.summarize(timed)}
    return found


def best(
    quality: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], grid: Grid, clock: str = "cpu"
) -> Mapping[str, Any] | None:
    """The fastest cell at the smallest batch size that loses at most `points` of ROUGE-L."""
    least = quality[FULL_DEPTH]["scores"]["rougeL"]["mean"] - grid.points
    good = [
        cell
        for cell in cells
        if is_on_a_curve(cell["curve"])
        and cell["batch_size"] == min(grid.batch_sizes)
        and quality[cell["quality"]]["scores"]["rougeL"]["mean"] >= least
    ]
    return min(good, key=lambda cell: cell["time"]["ratio"][clock]["median"], default=None)


def commit() -> str | None:
    """Commit of the checkout that tracks this file; None if there is none, or the file is not tracked in it."""
    file = Path(__file__)
    try:
        _git(file.parent, "ls-files", "--error-unmatch", file.name)
        return _git(file.parent, "rev-parse", "--short", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
