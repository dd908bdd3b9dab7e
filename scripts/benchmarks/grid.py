"""One cell of the speed table: every way to decode the same rows, and the bars that compare them.

Ours is timed in three ways: *plain*, on Transformers' blocks; *prepared*, on a prepared copy of the weights;
*compiled*, on compiled segments of that copy. Exits are forced after a layer, or replayed from the layers that tokens
of real texts ran.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any, NamedTuple

import torch
from transformers import CompileConfig

from benchmarks.models import Bar, Bench, Case, pieces, translator_of
from hf_earlyexit import ExitPoint
from hf_earlyexit.common.extras import require
from hf_earlyexit.families.shipped import default_inputs, load_default
from hf_earlyexit.families.t5.stock import stock_of


COMPILED = {"cache_implementation": "static"}
NEVER = {"early_exit": False}
VAIN = {
    "state": {"exit_criterion": "state", "exit_threshold": 1.0},
    "classifier": {"exit_criterion": "classifier", "exit_threshold": 1.0},
    "softmax, 16 candidates": {"exit_criterion": "softmax", "exit_threshold": 1.0, "exit_candidates": 16},
    "entropy, 16 candidates": {"exit_criterion": "entropy", "exit_threshold": 1.0, "exit_candidates": 16},
    "softmax": {"exit_criterion": "softmax", "exit_threshold": 1.0},
}
VAIN_LIMITS = {"state": 1.05, "classifier": 1.05, "softmax, 16 candidates": 1.15, "entropy, 16 candidates": 1.15}


class Speed(NamedTuple):
    """Required speed-up over stock at full depth, for one row, prepared and compiled."""

    prepared: float
    compiled: float


SPEEDS = {"calm": Speed(1.4, 1.8), "base": Speed(1.25, 1.4)}


@dataclass(frozen=True)
class Replay:
    """Criterion: tokens of row r exit where those of text r did, with depths scaled to a decoder of `num_layers`."""

    texts: Sequence[Sequence[int]]
    num_layers: int
    of_layers: int

    def depth(self, row: int, position: int) -> int:
        text = self.texts[row % len(self.texts)]
        return text[position % len(text)] * self.num_layers // self.of_layers

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        asked = zip(point.rows, point.positions, strict=True)
        return torch.tensor([float(point.layer >= self.depth(row, position)) for row, position in asked])

    def shares(self, rows: int, steps: int) -> dict[int, float]:
        """Share of tokens by the number of layers that they run."""
        depths = [self.depth(row, position) for row in range(rows) for position in range(steps)]
        return {depth: depths.count(depth) / len(depths) for depth in sorted(set(depths))}


def recorded(num_layers: int) -> Replay:
    """A replay of the exits that are shipped with the checkpoint."""
    text = resources.files("hf_earlyexit").joinpath("assets/t5-e2e/exits.json").read_text(encoding="utf-8")
    exits = json.loads(text)
    # Texts mix depths. Long ones come first, so that few have to be repeated from their start.
    texts = sorted(exits["layers_run"], key=len, reverse=True)
    return Replay(texts, num_layers, exits["num_layers"])


class Cell:
    """The calls on `rows` rows with `source` source tokens.

    Args:
        only: Kinds of calls to make; empty: all.
    """

    def __init__(self, bench: Bench, shape: str, rows: int, source: int, only: Sequence[str] = ()):
        self.bench, self.shape, self.rows, self.source, self.only = bench, shape, rows, source, only
        self.layers = bench.layers
        self.depths = [self.layers // 4, self.layers // 2, 3 * self.layers // 4]
        self.states = bench.encode(rows, source)
        self.replay = {"exit_criterion": recorded(self.layers), "exit_threshold": 0.5, "exit_layers": self.depths}
        self.case = Case(f"{shape}, batch {rows}, {source} source tokens")

    def wants(self, kind: str) -> bool:
        return not self.only or kind in self.only

    def fill(self, ctranslate2: bool) -> Case:
        if self.wants("stock"):
            self.add_stock()
        for kind, more in (("prepared", {}), ("compiled", COMPILED)):
            if self.wants(kind):
                self.add_ours(kind, more)
        if self.wants("plain"):
            self.add("plain never", self.bench.ours, NEVER)
            self.bar("plain never / stock", "plain never", self.stock(1))
        if "int8" in self.only:
            self.add("int8 plain never", self.bench.quantised, NEVER)
            self.bar("int8 plain never / stock", "int8 plain never", self.stock(1))
            half = {"exit_criterion": "fixed", "exit_layer": self.depths[1]}
            self.add(f"int8 plain exit after {self.depths[1]}", self.bench.quantised, half)
            self.bar("int8 plain exit / stock", f"int8 plain exit after {self.depths[1]}", self.stock(1))
        if "stock compiled" in self.only:
            config = CompileConfig(mode="default")
            config._compile_all_devices = True
            options = {"cache_implementation": "static", "compile_config": config}
            self.add("stock compiled", self.bench.stock_at(self.layers), options)
            self.bar("stock compiled / stock", "stock compiled", self.stock(1))
        if self.wants("lookup") and self.rows == 1:
            self.add("prompt lookup", self.bench.stock_at(self.layers), {"prompt_lookup_num_tokens": 3})
            self.bar("prompt lookup / stock", "prompt lookup", self.stock(1))
        if ctranslate2 and self.wants("ctranslate2"):
            self.add_ctranslate2()
        return self.case

    def add(self, name: str, model: Any, settings: dict[str, Any]) -> None:
        self.case.calls[name] = lambda: self.bench.decode(model, self.states, **settings)

    def bar(self, name: str, call: str, against: dict[str, float], limit: float | None = None) -> None:
        if {call, *against} <= set(self.case.calls):
            self.case.bars.append(Bar(name, call, against, limit))

    def stock(self, weight: float, depth: int | None = None) -> dict[str, float]:
        return {"stock" if depth is None else f"stock cut to {depth}": weight}

    def add_stock(self) -> None:
        self.add("stock", self.bench.stock_at(self.layers), {})
        for depth in self.depths[:2]:
            self.add(f"stock cut to {depth}", self.bench.stock_at(depth), {})
            self.bar(f"stock cut to {depth} / stock", f"stock cut to {depth}", self.stock(1))
        self.case.calls["encoder"] = lambda: self.bench.encode(self.rows, self.source)
        self.bar("encoder / stock", "encoder", self.stock(1))

    def add_ours(self, kind: str, more: dict[str, Any]) -> None:
        """Add no exits, forced and replayed exits, and our own loop on decoders cut to the forced depths."""
        model, limits = self.bench.prepared, self.speed_limits(kind)
        never = f"{kind} never"
        self.add(never, model, NEVER | more)
        self.bar(f"{never} / stock", never, self.stock(1), limits.get("never"))
        for depth in self.depths:
            name, cut = f"{kind} exit after {depth}", f"{kind} cut to {depth}"
            self.add(name, model, {"exit_criterion": "fixed", "exit_layer": depth} | more)
            self.add(cut, self.bench.own_at(depth), NEVER | more)
            self.bar(f"{name} / stock", name, self.stock(1), limits.get(depth))
            self.bar(f"{name} / {cut}", name, {cut: 1}, 1.15)
        name = f"{kind} replay"
        self.add(name, model, self.replay | more)
        self.count(name, model, self.replay | more)
        self.bar(f"{name} / stock", name, self.stock(1), limits.get("replay"))
        if self.rows == 1:
            steps = self.bench.length["max_new_tokens"]
            shares = self.replay["exit_criterion"].shares(1, steps).items()
            parts = {never if depth == self.layers else f"{kind} cut to {depth}": share for depth, share in shares}
            self.bar(f"{name} / sum of own cut decoders", name, parts, 1.15)

    def count(self, name: str, model: Any, settings: dict[str, Any]) -> None:
        """Record the work of a call, from an untimed run."""
        output = self.bench.decode(model, self.states, return_dict_in_generate=True, **settings)
        self.case.work[name] = {
            kind: output[kind].tolist() for kind in ("layer_rows", "filled_positions", "head_rows")
        }

    def speed_limits(self, kind: str) -> dict[Any, float]:
        """Limits of a kind's bars against stock in this cell."""
        limits: dict[Any, float] = {}
        if self.rows == 1 and self.shape in SPEEDS:
            limits["never"] = 1 / getattr(SPEEDS[self.shape], kind)
        if self.shape == "calm" and self.rows == 1:
            limits |= {4: 1 / 2.2, 2: 1 / 3}
        if self.shape == "calm" and self.rows == 8:
            limits["replay"] = 1 / 1.6
        return limits

    def add_ctranslate2(self) -> None:
        """Add CTranslate2 at full depth.

        CTranslate2 runs its encoder in every call. A call for one token measures the encoder and one step; subtracting
        it from a full call leaves the time of the other tokens.
        """
        ids, names = self.bench.source(self.rows, self.source), pieces(self.bench.vocab_size)
        source = [[names[number] for number in row] for row in ids.tolist()]
        for compute_type in ("float32", "int8"):
            translator, name = self.bench.translator(compute_type), f"ctranslate2 {compute_type}"
            for label, steps in ((name, self.bench.length["max_new_tokens"]), (f"{name}, one token", 1)):
                options = {"min_decoding_length": steps, "max_decoding_length": steps, "beam_size": 1}
                call = lambda translator=translator, options=options: translator.translate_batch(source, **options)  # noqa: E731
                self.case.calls[label] = call
            self.bar(f"{name}, encoder included / stock", name, self.stock(1))
            # The time of the others includes their first token, so they count one token more than CTranslate2.
            decoding = {name: 1, f"{name}, one token": -1}
            for kind in ("prepared", "compiled"):
                shallow = f"{kind} exit after {self.depths[0]}"
                limit = 1 / 1.3 if (self.shape, self.rows, compute_type) == ("calm", 1, "float32") else None
                self.bar(f"{kind} never / {name} without its encoder", f"{kind} never", decoding)
                self.bar(f"{shallow} / {name} without its encoder", shallow, decoding, limit)


class GridBench(Bench):
    """A bench whose models are made on first use."""

    def __init__(self, *args):
        super().__init__(*args, depths=())
        self._stock, self._own, self._translators = {}, {}, {}

    def stock_at(self, depth: int):
        if depth not in self._stock:
            self._stock[depth] = self.stock_model(depth)
        return self._stock[depth]

    def own_at(self, depth: int):
        """Ours with a decoder of `depth` layers, prepared."""
        if depth not in self._own:
            self._own[depth] = self.own_model(depth).prepare_for_generation()
        return self._own[depth]

    @cached_property
    def prepared(self):
        return self.alias().prepare_for_generation()

    @cached_property
    def quantised(self):
        """Ours with int8 weights by torchao, except for heads."""
        quantization = require("torchao.quantization", "test")
        model = copy.deepcopy(self.ours)
        is_inner = lambda module, name: isinstance(module, torch.nn.Linear) and "head" not in name  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=is_inner)
        return model

    def translator(self, compute_type: str):
        if compute_type not in self._translators:
            self._translators[compute_type] = translator_of(self.stock_at(self.layers), compute_type)
        return self._translators[compute_type]


def vain_case(bench: GridBench, source: int) -> Case:
    """One row whose exits are evaluated at every layer but the last without ever exiting, against no exits."""
    case, states = Case(f"batch 1, {source} source tokens, thresholds out of reach"), bench.encode(1, source)
    case.calls["stock"] = lambda: bench.decode(bench.stock_at(bench.layers), states)
    case.calls["never"] = lambda: bench.decode(bench.prepared, states, **NEVER)
    case.bars.append(Bar("never / stock", "never", {"stock": 1}))
    for name, settings in VAIN.items():
        case.calls[name] = lambda settings=settings: bench.decode(bench.prepared, states, **settings)
        case.bars.append(Bar(f"{name} / never", name, {"never": 1}, VAIN_LIMITS.get(name)))
        case.bars.append(Bar(f"{name} / stock", name, {"stock": 1}))
    return case


def fill_case(bench: GridBench, rows: int, source: int) -> Case:
    """Replayed exits, with lazy and with eager backfill of missing K/V."""
    cell = Cell(bench, "", rows, source, only=("none",))
    case = Case(f"batch {rows}, {source} source tokens, debts paid late or at once")
    for kind, more in (("prepared", {}), ("compiled", COMPILED)):
        for fill in ("lazy", "eager"):
            settings = cell.replay | more | {"fill": fill}
            case.calls[f"{kind} {fill}"] = lambda settings=settings: bench.decode(
                bench.prepared, cell.states, **settings
            )
            cell.case = case
            cell.count(f"{kind} {fill}", bench.prepared, settings)
        case.bars.append(Bar(f"{kind}, eager / lazy", f"{kind} eager", {f"{kind} lazy": 1}))
    return case


SHIPPED = {
    "never": NEVER,
    "classifier 0.9, certified": {"exit_criterion": "classifier", "exit_threshold": 0.9},
    "classifier 0.6, rule batch": {"exit_criterion": "classifier", "exit_threshold": 0.6, "batch_exit": "batch"},
    "softmax 0.5 at 2, 4, 6": {"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4, 6]},
    "softmax 0.5 at 2, 4, 6, 8 candidates": {
        **{"exit_criterion": "softmax", "exit_threshold": 0.5, "exit_layers": [2, 4, 6]},
        "exit_candidates": 8,
    },
}


def shipped_case(rows: int) -> Case:
    """The shipped checkpoint on its own inputs, whole texts, encoder included, against its stock class."""
    model, tokenizer = load_default()
    stock, prepared, inputs = stock_of(model), copy.copy(model).prepare_for_generation(), default_inputs()
    groups = [inputs[start : start + rows] for start in range(0, len(inputs), rows)]
    batches = [tokenizer(group, return_tensors="pt", padding=True) for group in groups]
    case = Case(f"shipped, batch {rows}, {len(inputs)} inputs of its own, encoder included")

    def add(name: str, one: Any, settings: dict[str, Any]) -> None:
        case.calls[name] = lambda: [one.generate(**batch, **settings) for batch in batches]
        if name != "stock":
            case.bars.append(Bar(f"{name} / stock", name, {"stock": 1}))

    add("stock", stock, {})
    for depth in (4, 7):
        add(f"stock cut to {depth}", stock_of(model, depth), {})
    add("plain never", model, NEVER)
    for name, settings in SHIPPED.items():
        add(f"prepared {name}", prepared, settings)
        add(f"compiled {name}", prepared, settings | COMPILED)
    return case
