"""Answers for what a checkpoint's exits are worth: quality, layers, work and time of every setting, beside stock.

The unit is the distinct input with all its references. Knows nothing of files, tables and pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from random import Random
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, T5ForConditionalGeneration

from hf_earlyexit.data import Example
from hf_earlyexit.machine import load
from hf_earlyexit.metrics import Bleu, exact_match, rouge_scores, textual_consistency
from hf_earlyexit.models import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.timing import CLOCKS, Times, spread


FULL_DEPTH, ALWAYS = "full depth", "always after layer"
ROUGE = ("rouge1", "rouge2", "rougeL")
WORK = ("layer_rows", "filled_positions", "head_rows")


@dataclass(frozen=True)
class Setting:
    """A way to generate: its place in the tables, and the keywords of `generate`."""

    curve: str
    threshold: float | None
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        return self.curve if self.threshold is None else f"{self.curve} {self.threshold:g}"


@dataclass(frozen=True)
class Half:
    """Inputs that are evaluated together, with what full depth writes for them."""

    examples: list[Example]
    full_depth: list[str]


@dataclass(frozen=True)
class Written:
    """What a setting wrote: per input the text and the layers of its tokens; the work of all."""

    texts: list[str]
    layers_run: list[list[int]]
    work: dict[str, list[int]]


class Bench:
    """The model, stock beside it, and batches of inputs."""

    def __init__(self, path: str, max_new_tokens: int | None, batch_size: int):
        self.model = EarlyExitT5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.stock = T5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.max_new_tokens = max_new_tokens or self.model.generation_config.max_new_tokens or 128
        self.batch_size = batch_size
        self.num_layers = self.model.config.num_decoder_layers

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[dict[str, Any]]:
        """Padded batches of inputs in order, with what `generate` is told besides the exits."""
        for start in range(0, len(examples), size):
            texts = [example.source for example in examples[start : start + size]]
            encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
            yield {**encoded, "max_new_tokens": self.max_new_tokens, "num_beams": 1, "do_sample": False}

    def generate(self, examples: Sequence[Example], setting: Setting) -> Written:
        """What the setting writes for all inputs, in their order."""
        texts, layers_run, work = [], [], {}
        with tqdm(total=len(examples), desc=setting.name, unit="input", leave=False) as progress:
            for batch in self.batches(examples, self.batch_size):
                output = self.model.generate(**batch, **setting.keywords, return_dict_in_generate=True)
                texts += self.tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
                layers_run += [[depth for depth in row if depth] for row in output.layers_run.tolist()]
                for name in WORK:
                    work[name] = work.get(name, 0) + getattr(output, name)
                progress.update(len(output.sequences))
        return Written(texts, layers_run, {name: counts.tolist() for name, counts in work.items()})

    def time_beside_stock(self, examples: Sequence[Example], setting: Setting, size: int, rounds: int) -> Times:
        """Seconds of this setting and of stock, taking turns, a batch per round; the first batch warms up."""
        times, order = Times(["stock", "ours"]), Random(0)
        for number, batch in enumerate(islice(cycle(self.batches(examples[: size * rounds], size)), rounds)):
            calls = {
                "stock": partial(self.stock.generate, **batch),
                "ours": partial(self.model.generate, **batch, **setting.keywords),
            }
            names = list(calls)
            order.shuffle(names)
            for name in names:
                if number == 0:
                    calls[name]()
                times.run(name, calls[name])
        return times


def settings_of(curves: dict[str, Sequence[float]], exit_layers: Sequence[int]) -> list[Setting]:
    """Full depth, always leaving at each layer, and every threshold of every curve."""
    always = [Setting(ALWAYS, layer, {"exit_criterion": "fixed", "exit_layer": layer}) for layer in exit_layers]
    settings = [Setting(FULL_DEPTH, None, {"early_exit": False}), *always]
    for curve, thresholds in curves.items():
        criterion, _, layers = curve.partition(":")
        asked = {"exit_layers": [int(layer) for layer in layers.split(",")]} if layers else {}
        settings += [
            Setting(curve, threshold, {"exit_criterion": criterion, "exit_threshold": threshold, **asked})
            for threshold in thresholds
        ]
    return settings


def quality(half: Half, texts: Sequence[str], layers_run: Sequence[list[int]]) -> dict[str, float]:
    """Means over the inputs of a half; BLEU is of the whole half. ROUGE, consistency and exact match are times 100."""
    references = [list(example.references) for example in half.examples]
    rouge = [rouge_scores(*pair) for pair in zip(texts, references)]
    consistency = [textual_consistency(*pair) for pair in zip(texts, half.full_depth)]
    scores = {name: 100 * fmean(score[name] for score in rouge) for name in ROUGE}
    scores["bleu"] = Bleu().compute(predictions=list(texts), references=references)["bleu"]
    scores["consistency"] = 100 * fmean(consistency)
    scores["equal_texts"] = 100 * fmean(exact_match(*pair) for pair in zip(texts, half.full_depth))
    depths = [depth for row in layers_run for depth in row]
    return {**scores, "mean_layers": fmean(depths), "tokens": len(depths)}


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, by name: models with the same one say the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def distribution(layers_run: Sequence[list[int]], num_layers: int) -> list[float]:
    """Share of the tokens that ran 1, 2, ... layers."""
    depths = [depth for row in layers_run for depth in row]
    return [depths.count(layer) / len(depths) for layer in range(1, num_layers + 1)]


def evaluate(
    bench: Bench, splits: dict[str, Half], setting: Setting, sizes: Sequence[int], rounds: int
) -> dict[str, Any]:
    """One cell, as plain values: quality on both halves, work, time beside stock in batches of these sizes."""
    examples = [example for half in splits.values() for example in half.examples]
    wrote = bench.generate(examples, setting)
    cell: dict[str, Any] = {**asdict(setting), "name": setting.name, "work": wrote.work, "load": load()}
    cell["distribution"] = distribution(wrote.layers_run, bench.num_layers)
    start = 0
    for name, half in splits.items():
        here = slice(start, start := start + len(half.examples))
        cell[name] = quality(half, wrote.texts[here], wrote.layers_run[here])
    cell["time"] = {}
    for size in sizes:
        times = bench.time_beside_stock(examples, setting, size, rounds)
        ratios = {clock: times.ratio("ours", {"stock": 1.0}, clock) for clock in CLOCKS}
        stock = {f"stock_{clock}": spread(times.seconds[clock]["stock"]) for clock in CLOCKS}
        cell["time"][str(size)] = {**ratios, **stock}
    return cell


def choose(cells: Sequence[dict[str, Any]], points: float, size: int) -> dict[str, Any] | None:
    """The fastest cell with a threshold whose ROUGE-L on the select half is at most `points` below full depth's."""
    full = next(cell for cell in cells if cell["name"] == FULL_DEPTH)["select"]["rougeL"]
    good = [
        cell
        for cell in cells
        if cell["curve"] not in (FULL_DEPTH, ALWAYS) and cell["select"]["rougeL"] >= full - points
    ]
    return min(good, key=lambda cell: cell["time"][str(size)]["cpu"]["median"], default=None)
