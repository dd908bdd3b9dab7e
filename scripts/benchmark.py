"""Answers for what an exit saves on one CPU thread: `generate` with exits beside stock `generate`, in one process.

Models have random weights; time does not depend on what they say. The stock models hold the very same tensors. Every
call generates equally many tokens (the end token is shut out until then, on all sides) behind encoder states computed
beforehand, so that decoders are compared; only beside CTranslate2 does the encoder run, on all sides. Criteria are
asked at every layer but the last, "fixed" at its own.

A case is a set of calls, run in turn, in a new random order every round. A bar compares one call with a sum of others,
round by round; the ratio reported is the median over rounds, with the interquartile range as a share of it. Where that
is above 5 %, the bar's calls are measured again: the steadiest measurement counts, all are listed. Bars that are
missed are printed like those that are met. The last line is one JSON object with everything, times in seconds.

Example:
    python scripts/benchmark.py --cases batch1,rows --source 16,128 --json-out benchmark.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from hf_earlyexit import EarlyExitT5Config, EarlyExitT5ForConditionalGeneration, ExitPoint
from hf_earlyexit.extras import require
from hf_earlyexit.machine import cpu_model, load
from hf_earlyexit.timing import CLOCKS, Times, measure, spread


CASES = ("batch1", "rows", "phase", "ctranslate2")
BATCH, PERIOD, STEADY, ENOUGH_ROUNDS = 8, 4, 0.05, 31
AFTER_2 = {"early_exit": True, "exit_criterion": "fixed", "exit_layer": 2}
SPECIAL = ("<pad>", "</s>", "<unk>")

Calls = dict[str, Callable[[], Any]]


# --- what is compared -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """Criterion: a row leaves after layer 1 where `leaves(row, position)` says so, else it runs every layer."""

    leaves: Callable[[int, int], bool]

    def confidence(self, point: ExitPoint) -> torch.Tensor:
        asked = zip(point.rows, point.positions)
        return torch.tensor([float(point.layer == 1 and self.leaves(row, position)) for row, position in asked])


@dataclass(frozen=True)
class Bar:
    """A call's time over a weighted sum of others': at most `limit`, or shown beside where there is none."""

    name: str
    call: str
    against: dict[str, float]
    limit: float | None = None


@dataclass
class Case:
    """Calls that are timed in turn, the bars they are held to, and the work of those with exits, by layer."""

    name: str
    calls: Calls = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    work: dict[str, dict[str, list[int]]] = field(default_factory=dict)


class Bench:
    """The models, on one set of weights, and what is called on them."""

    def __init__(self, config: EarlyExitT5Config, new_tokens: int):
        self.layers, self.vocab_size = config.num_decoder_layers, config.vocab_size
        self.length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        self.ours = EarlyExitT5ForConditionalGeneration(config).eval()
        with torch.no_grad():  # Fresh embeddings are so large that every token is the start token.
            self.ours.shared.weight.mul_(0.02)
        self.stock = {depth: stock_model(self.ours, depth) for depth in {1, 2, self.layers}}

    def source(self, rows: int, length: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), self.vocab_size, (rows, length))

    @torch.no_grad()
    def encode(self, rows: int, length: int) -> torch.Tensor:
        return self.ours.encoder(self.source(rows, length)).last_hidden_state

    def decode(self, model: T5ForConditionalGeneration, states: torch.Tensor, **settings) -> Any:
        # Wrapped anew for each call, since `generate` may change what it is handed.
        mask = torch.ones(states.shape[:2], dtype=torch.long)
        return self.generate(model, encoder_outputs=BaseModelOutput(states), attention_mask=mask, **settings)

    def generate(self, model: T5ForConditionalGeneration, **settings) -> Any:
        return model.generate(**self.length, do_sample=False, **settings)

    def add_stock(self, case: Case, depth: int, states: torch.Tensor) -> None:
        case.calls[f"stock {depth} x {len(states)}"] = lambda: self.decode(self.stock[depth], states)

    def add_exits(self, case: Case, name: str, states: torch.Tensor, rows: list[int], **settings) -> None:
        """Add a call with exits, once an untimed run has put as many `rows` through each layer as were meant to."""
        output = self.decode(self.ours, states, return_dict_in_generate=True, **settings)
        work = {kind: output[kind].tolist() for kind in ("layer_rows", "filled_positions", "head_rows")}
        if work["layer_rows"] != [count * self.length["max_new_tokens"] for count in rows]:
            raise RuntimeError(f"{name!r} did not do the work that was meant: {work}.")
        case.calls[name], case.work[name] = lambda: self.decode(self.ours, states, **settings), work


def early_exit_config(layers: int, d_model: int, num_heads: int, d_ff: int, vocab_size: int) -> EarlyExitT5Config:
    """Of a gated T5 with encoder and decoder equally deep."""
    sizes = {"d_model": d_model, "num_heads": num_heads, "d_kv": d_model // num_heads, "d_ff": d_ff}
    depths = {"num_layers": layers, "num_decoder_layers": layers}
    kind = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    return EarlyExitT5Config(**sizes, **depths, **kind, vocab_size=vocab_size)


def stock_model(ours: EarlyExitT5ForConditionalGeneration, depth: int) -> T5ForConditionalGeneration:
    """The library's own model on the tensors of ours, with the first `depth` layers of its decoder."""
    values = ours.config.to_dict() | {"num_decoder_layers": depth}
    config = T5Config(**{name: value for name, value in values.items() if name not in ("model_type", "early_exit")})
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    weights = ours.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.tie_weights()
    return model.eval()


def batch1_case(bench: Bench, length: int) -> Case:
    """One row: leaving always after layer 2, never, and asking in vain."""
    case, states, layers = Case(f"batch 1, {length} source tokens"), bench.encode(1, length), bench.layers
    for depth in (layers, 2):
        bench.add_stock(case, depth, states)
    bench.add_exits(case, "exit after 2", states, [1] * 2 + [0] * (layers - 2), **AFTER_2)
    bench.add_exits(case, "never", states, [1] * layers, early_exit=False)
    bench.add_exits(case, "state in vain", states, [1] * layers, exit_criterion="state", exit_threshold=1.0)
    case.bars += [
        Bar("exit after 2 / stock cut to 2", "exit after 2", {"stock 2 x 1": 1}, 1.25),
        Bar("never / stock", "never", {f"stock {layers} x 1": 1}, 1.05),
        Bar("state, threshold out of reach / stock", "state in vain", {f"stock {layers} x 1": 1}, 1.10),
    ]
    return case


def rows_case(bench: Bench, length: int, leaving: Sequence[int]) -> Case:
    """A batch of which k rows leave after layer 1 at every token: neighbours, and spread over the batch."""
    case = Case(f"batch {BATCH}, {length} source tokens, k rows leave after layer 1 at every token")
    states, leaving = bench.encode(BATCH, length), sorted({0, *leaving})
    for live in {BATCH, *(BATCH - k for k in leaving)} - {0}:
        for depth in (bench.layers, 1):
            bench.add_stock(case, depth, states[:live])
    for k in leaving:
        for name, rows in leaving_rows(k).items():
            script = Script(lambda row, position, rows=frozenset(rows): row in rows)
            meant = [BATCH] + [BATCH - k] * (bench.layers - 1)
            bench.add_exits(case, name, states, meant, exit_criterion=script, exit_threshold=0.5)
            case.bars.append(Bar(f"{name} / sum of stock", name, arithmetic(bench.layers, BATCH - k), 1.25))
            if k:
                case.bars.append(Bar(f"{name} / k=0", name, {"k=0": 1}, 1.05))
    return case


def leaving_rows(k: int) -> dict[str, list[int]]:
    """Which rows leave, by the name of the call."""
    neighbours, spread = list(range(k)), [math.ceil(place * BATCH / k) for place in range(k)]
    return {f"k={k}": neighbours, f"k={k} spread": spread} if 1 < k < BATCH - 1 else {f"k={k}": neighbours}


def arithmetic(layers: int, live: int) -> dict[str, float]:
    """All rows through layer 1, `live` of them through the rest, as a sum of stock calls."""
    if live == BATCH:
        return {f"stock {layers} x {BATCH}": 1}
    rest = {f"stock {layers} x {live}": 1, f"stock 1 x {live}": -1} if live else {}
    return {f"stock 1 x {BATCH}": 1} | rest


def phase_case(bench: Bench, length: int) -> Case:
    """A batch whose rows leave after layer 1 for three tokens, then run every layer; at each step others do."""
    case = Case(f"batch {BATCH}, {length} source tokens, three tokens leave after layer 1, one does not, in turn")
    states, live, name = bench.encode(BATCH, length), BATCH // PERIOD, "in turn"
    for depth, rows in ((1, BATCH), (bench.layers, live), (1, live)):
        bench.add_stock(case, depth, states[:rows])
    script, meant = Script(lambda row, position: (row + position) % PERIOD != 0), [BATCH] + [live] * (bench.layers - 1)
    bench.add_exits(case, name, states, meant, exit_criterion=script, exit_threshold=0.5)
    owed = [live * min(position, PERIOD - 1) for position in range(bench.length["max_new_tokens"])]
    if case.work[name]["filled_positions"][1:] != [sum(owed)] * (bench.layers - 1):
        raise RuntimeError(f"{sum(owed)} positions were owed by every layer above the first: {case.work[name]}.")
    deep, parked = bench.ours.decoder.block[1:], [torch.ones(count, states.shape[-1]) for count in owed if count]
    # Every row comes to the deep layers in the end; the stock calls that stand for these layers have only `live` rows.
    later = [states[live * group : live * (group + 1)] for group in range(1, PERIOD)]
    case.calls["owed"] = lambda: project([block.layer[0] for block in deep], parked)
    case.calls["cross"] = lambda: project([block.layer[1] for block in deep], later)
    parts = arithmetic(bench.layers, live) | {"owed": 1}
    case.bars.append(Bar("in turn / sum of stock + owed + cross", name, parts | {"cross": 1}, 1.25))
    case.bars.append(Bar("in turn / sum of stock + owed", name, parts))
    return case


@torch.no_grad()
def project(parts: list[nn.Module], steps: list[torch.Tensor]) -> None:
    """Keys and values that attention `parts` make of the states of each step, with nothing around it."""
    for states in steps:
        for part in parts:
            attention = part.SelfAttention if hasattr(part, "SelfAttention") else part.EncDecAttention
            # Cross-attention takes the encoder states as they are; its norm is for the queries.
            normed = part.layer_norm(states) if hasattr(part, "SelfAttention") else states
            attention.k(normed), attention.v(normed)


# --- CTranslate2 ----------------------------------------------------------------------------------------------------


def import_ctranslate2() -> Any:
    """CTranslate2, or an end that says what to install or pass."""
    try:
        return require("ctranslate2", "bench")
    except ImportError as error:
        raise SystemExit(f"{error}, or pass `--no-ctranslate2`.") from None


def pieces(vocab_size: int) -> list[str]:
    return [*SPECIAL, *(f"t{number}" for number in range(len(SPECIAL), vocab_size))]


def translator_of(model: T5ForConditionalGeneration) -> Any:
    """The model in CTranslate2, in fp32, read into memory. The converter wants a tokenizer, for the vocabulary."""
    words = {piece: number for number, piece in enumerate(pieces(model.config.vocab_size))}
    backend = Tokenizer(WordLevel(words, unk_token=SPECIAL[-1]))
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL))
    ctranslate2, threads = import_ctranslate2(), {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/stock")
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(f"{folder}/stock")
        ctranslate2.converters.TransformersConverter(f"{folder}/stock").convert(f"{folder}/converted")
        return ctranslate2.Translator(f"{folder}/converted", compute_type="float32", **threads)


def ctranslate2_case(bench: Bench, length: int, rows: int, translator: Any) -> Case:
    """CTranslate2 at full depth, the encoder included on all sides; it stands beside, so there is no bar."""
    ids, names, new_tokens = bench.source(rows, length), pieces(bench.vocab_size), bench.length["max_new_tokens"]
    source = [[names[number] for number in row] for row in ids.tolist()]
    options = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens, "beam_size": 1}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls = {
        "ctranslate2": lambda: translator.translate_batch(source, **options),
        "stock": lambda: bench.generate(bench.stock[bench.layers], **inputs),
        "never": lambda: bench.generate(bench.ours, **inputs, early_exit=False),
        "exit after 2": lambda: bench.generate(bench.ours, **inputs, **AFTER_2),
    }
    expected = [[names[number] for number in row[1:]] for row in calls["stock"]().tolist()]
    same = sum(one.hypotheses[0] == other for one, other in zip(calls["ctranslate2"](), expected))
    bars = [Bar(f"{name} / ctranslate2", name, {"ctranslate2": 1}) for name in calls if name != "ctranslate2"]
    about = f"encoder included, CTranslate2 gives stock's tokens in {same} rows"
    return Case(f"batch {rows}, {length} source tokens, {about}", calls, bars)


# --- measuring ------------------------------------------------------------------------------------------------------


def covers(times: Times, bar: Bar) -> bool:
    """Whether the calls that a bar compares were measured."""
    return {bar.call, *bar.against} <= set(times.seconds["wall"])


def measure_until_steady(case: Case, args: argparse.Namespace, order: random.Random) -> list[Times]:
    """A measurement of the whole case, and up to `--repeat` more of the bars whose ratios still spread."""
    found, bars = [], case.bars
    while bars and len(found) <= args.repeat:
        names = {name for bar in bars for name in (bar.call, *bar.against)}
        with tqdm(total=args.rounds, desc=f"{case.name} ({len(found) + 1})", unit="round") as progress:
            calls = {name: call for name, call in case.calls.items() if name in names}
            found.append(measure(calls, args.rounds, order, progress.update))
        bars = [bar for bar in bars if found[-1].ratio(bar.call, bar.against, args.clock)["iqr"] > STEADY]
    return found


# --- reporting ------------------------------------------------------------------------------------------------------


def describe(case: Case, found: list[Times], decides: str) -> dict[str, Any]:
    """What the JSON holds of a case; calls as in the first measurement."""
    seconds = found[0].seconds
    calls = {name: {clock: spread(seconds[clock][name]) for clock in CLOCKS} for name in case.calls}
    bars = [describe_bar(bar, [times for times in found if covers(times, bar)], decides) for bar in case.bars]
    return {"name": case.name, "load": load(), "calls": calls, "bars": bars, "work": case.work}


def describe_bar(bar: Bar, found: list[Times], decides: str) -> dict[str, Any]:
    found = sorted(found, key=lambda times: times.ratio(bar.call, bar.against, decides)["iqr"])
    ratios = {clock: found[0].ratio(bar.call, bar.against, clock) for clock in CLOCKS}
    verdict = "beside" if bar.limit is None else "met" if ratios[decides]["median"] <= bar.limit else "missed"
    others = [times.ratio(bar.call, bar.against, decides) for times in found[1:]]
    return asdict(bar) | {"ratio": ratios, "verdict": verdict, "other_measurements": others}


def print_case(case: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"\n## {case['name']}\n{args.rounds} rounds, load {case['load']}")
    print(f"{'call, ms':40} {'wall':>8} {'IQR':>6} {'CPU':>8} {'IQR':>6} {'wall/token':>11}")
    for name, clocks in case["calls"].items():
        times = " ".join(f"{1000 * one['median']:8.1f} {one['iqr']:6.1%}" for one in clocks.values())
        print(f"{name:40} {times} {1000 * clocks['wall']['median'] / args.new_tokens:11.2f}")
    print(f"{'ratio':40} {'wall':>8} {'IQR':>6} {'CPU':>8} {'IQR':>6} {'at most':>11}  by {args.clock}")
    for bar in case["bars"]:
        ratios = " ".join(f"{one['median']:8.3f} {one['iqr']:6.1%}" for one in bar["ratio"].values())
        print(f"{bar['name']:40} {ratios} {bar['limit'] or '':>11}  {remarks(bar, args.clock)}")
    for name, work in case["work"].items():
        print(f"{name}: " + "; ".join(f"{kind} {runs_text(counts)}" for kind, counts in work.items()))


def remarks(bar: dict[str, Any], decides: str) -> str:
    unsteady = f", spreads by more than {STEADY:.0%}" if bar["ratio"][decides]["iqr"] > STEADY else ""
    others = ", ".join(f"{one['median']:.3f} ({one['iqr']:.1%})" for one in bar["other_measurements"])
    return bar["verdict"] + unsteady + (f", other measurements {others}" if others else "")


def runs_text(counts: list[int]) -> str:
    """`[192, 48, 48]` as `192 48*2`: by layer from 1 on, `head_rows` from 0 on."""
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return " ".join(f"{count}*{length}" if length > 1 else str(count) for count, length in runs)


def surroundings(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to know of the machine and the models."""
    shape = ("num_layers", "num_decoder_layers", "d_model", "num_heads", "d_kv", "d_ff", "vocab_size")
    modules = [torch, transformers] + ([import_ctranslate2()] if "ctranslate2" in args.cases else [])
    versions = {module.__name__: module.__version__ for module in modules}
    return {
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, threads used: {torch.get_num_threads()}",
        "versions": {"python": platform.python_version()} | versions,
        "model": {name: getattr(bench.ours.config, name) for name in shape} | {"dtype": str(bench.ours.dtype)},
        "attention": bench.stock[1].config._attn_implementation,
        "exit_layers": bench.ours.early_exit.exit_layers,
        "arguments": {name: getattr(args, name) for name in ("new_tokens", "rounds", "repeat", "clock", "seed")},
        "load_before": load(),
    }


# --- the command line -----------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(","), "default": list(CASES)}
    numbers = {"type": lambda text: [int(number) for number in text.split(",")]}
    parser.add_argument("--cases", **names, help=f"which (all of {','.join(CASES)})")
    parser.add_argument("--source", **numbers, default=[16, 128, 512], help="source tokens (16,128,512)")
    parser.add_argument("--leaving", **numbers, default=[0, 1, 4, 7, 8], help=f"k of {BATCH} rows (0,1,4,7,8)")
    parser.add_argument("--rounds", type=int, default=ENOUGH_ROUNDS, help="rounds of a measurement (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="further measurements at most (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="tokens of a call (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder each (%(default)s)")
    parser.add_argument("--d-model", type=int, default=768, help="width, a multiple of 64 (%(default)s)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="which decides (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and order (%(default)s)")
    parser.add_argument("--no-ctranslate2", action="store_true", help="leave CTranslate2 out")
    parser.add_argument("--quick", action="store_true", help="a tiny model and 3 rounds, to check the script")
    parser.add_argument("--json-out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.cases) - set(CASES)):
        parser.error(f"--cases has {unknown}: choose from {','.join(CASES)}")
    if args.layers < 3 or args.d_model % 64 or args.rounds < 2 or not set(args.leaving) <= set(range(BATCH + 1)):
        parser.error(f"at least 3 layers and 2 rounds, a width that 64 divides, 0 to {BATCH} leaving")
    if args.quick:
        args.rounds, args.repeat, args.new_tokens, args.source = 3, 0, 8, args.source[:1]
    args.cases = [name for name in args.cases if name != "ctranslate2" or not args.no_ctranslate2]
    return args


def make_cases(bench: Bench, args: argparse.Namespace) -> Iterator[Case]:
    """The cases asked for, each when its turn comes."""
    if "batch1" in args.cases:
        yield batch1_case(bench, min(args.source))
    for length in args.source:
        if "rows" in args.cases:
            yield rows_case(bench, length, args.leaving)
        if "phase" in args.cases:
            yield phase_case(bench, length)
    if "ctranslate2" in args.cases:
        translator = translator_of(bench.stock[bench.layers])
        for rows in (1, BATCH):
            yield ctranslate2_case(bench, min(args.source), rows, translator)


def main(arguments: Sequence[str] | None = None) -> None:
    args, start = parse(arguments), time.perf_counter()
    if "ctranslate2" in args.cases:
        import_ctranslate2()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    shape = (3, 32, 2, 64, 100) if args.quick else (args.layers, args.d_model, args.d_model // 64, 2048, 8000)
    bench, order = Bench(early_exit_config(*shape), args.new_tokens), random.Random(args.seed)
    report = surroundings(bench, args)
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    if args.rounds < ENOUGH_ROUNDS:
        print(f"Fewer than {ENOUGH_ROUNDS} rounds: a check of the script, not a measurement.")
    report["cases"] = []
    for case in make_cases(bench, args):
        report["cases"].append(describe(case, measure_until_steady(case, args, order), args.clock))
        print_case(report["cases"][-1], args)
    report |= {"load_after": load(), "minutes": round((time.perf_counter() - start) / 60, 1)}
    print(f"\nload_after: {report['load_after']}; {report['minutes']} minutes in all")
    if args.json_out is not None:
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
