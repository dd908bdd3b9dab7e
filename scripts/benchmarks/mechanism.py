"""Cases that measure the cost of the mechanism: one row, exiting rows, backfill; CTranslate2 for comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.models import AFTER_2, BATCH, PERIOD, Bar, Bench, Case, Script, pieces


def batch1_case(bench: Bench, length: int) -> Case:
    """One row: every token exits after layer 2, none exits, and exits are evaluated that never accept a token."""
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
    """A batch of which k rows exit after layer 1 at every token: neighbours, or rows spread over the batch."""
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
            case.bars.append(Bar(f"{name} / sum of stock", name, arithmetic(bench.layers, BATCH - k), 1.1))
            if k:
                case.bars.append(Bar(f"{name} / k=0", name, {"k=0": 1}, 1.05))
    return case


def leaving_rows(k: int) -> dict[str, list[int]]:
    """The exiting rows, by the name of the call."""
    neighbours, spread = list(range(k)), [math.ceil(place * BATCH / k) for place in range(k)]
    return {f"k={k}": neighbours, f"k={k} spread": spread} if 1 < k < BATCH - 1 else {f"k={k}": neighbours}


def arithmetic(layers: int, live: int) -> dict[str, float]:
    """Weights of stock calls whose sum is: all rows through layer 1, `live` rows through the other layers."""
    if live == BATCH:
        return {f"stock {layers} x {BATCH}": 1}
    rest = {f"stock {layers} x {live}": 1, f"stock 1 x {live}": -1} if live else {}
    return {f"stock 1 x {BATCH}": 1} | rest


def phase_case(bench: Bench, length: int) -> Case:
    """A batch whose rows exit after layer 1 for three tokens, then run every layer for one.

    Rows are out of phase: at every step a quarter of them runs every layer.
    """
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
    # Every row reaches the deep layers eventually. The stock calls that represent these layers have only `live` rows.
    later = [states[live * group : live * (group + 1)] for group in range(1, PERIOD)]
    case.calls["owed"] = lambda: project([block.layer[0] for block in deep], parked)
    case.calls["cross"] = lambda: project([block.layer[1] for block in deep], later)
    parts = arithmetic(bench.layers, live) | {"owed": 1}
    case.bars.append(Bar("in turn / sum of stock + owed + cross", name, parts | {"cross": 1}, 1.1))
    case.bars.append(Bar("in turn / sum of stock + owed", name, parts))
    return case


@torch.no_grad()
def project(parts: list[nn.Module], steps: list[torch.Tensor]) -> None:
    """Compute only the keys and values that attention `parts` project from the states of each step."""
    for states in steps:
        for part in parts:
            attention = part.SelfAttention if hasattr(part, "SelfAttention") else part.EncDecAttention
            # Cross-attention projects encoder states without a norm; its norm is for the queries.
            normed = part.layer_norm(states) if hasattr(part, "SelfAttention") else states
            attention.k(normed), attention.v(normed)


def ctranslate2_case(bench: Bench, length: int, rows: int, translator: Any) -> Case:
    """CTranslate2 at full depth, with the encoder included for all models, for comparison: its bars have no limit."""
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
    same = sum(one.hypotheses[0] == other for one, other in zip(calls["ctranslate2"](), expected, strict=True))
    bars = [Bar(f"{name} / ctranslate2", name, {"ctranslate2": 1}) for name in calls if name != "ctranslate2"]
    about = f"encoder included, CTranslate2 gives stock's tokens in {same} rows"
    return Case(f"batch {rows}, {length} source tokens, {about}", calls, bars)
