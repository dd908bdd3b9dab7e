"""The demo: one run that compares the shipped model with stock Transformers, in counted work and measured time.

`run_trial` runs the models, `describe` formats the result. Every number that is shown comes from the trial.
Formatting for the terminal is in `reports/terminal.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration
from transformers.utils import logging

from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.heat_map import full_depth_choices
from hf_earlyexit.families.shipped import CHECKPOINT, default_exits, default_inputs, load_default
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.mixin import EarlyExitGenerateOutput
from hf_earlyexit.reports import terminal
from hf_earlyexit.speed.timing import measure, one_thread


THRESHOLD = 0.9
REPETITIONS = 3
LABEL_WIDTH = 14


@dataclass(frozen=True)
class Trial:
    """One batch at full depth and with early exit.

    Attributes:
        inputs: The texts of the batch.
        settings: The exit settings, as keywords of `generate`.
        max_new_tokens: Maximum number of tokens per text.
        exit_layers: Layers whose exits are evaluated.
        tokenizer: The model's tokenizer.
        num_layers: Number of decoder layers.
        head_in_layers: Number of weights of the vocabulary head, in units of one decoder layer.
        stock: `[batch, T]`, the ids that stock Transformers generates.
        full: Output of the early-exit model with `early_exit=False`.
        early: Output of the early-exit model with `settings`.
        choices: `[batch, T]` like the early-exit texts: the token that stock would generate after each of their
            prefixes.
        seconds: One value per repetition; the calls take turns. `"stock"` and `"early"`: the texts one at a time.
            `"stock batch"` and `"early batch"`: all texts at once.
    """

    inputs: list[str]
    settings: dict[str, Any]
    max_new_tokens: int
    exit_layers: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    num_layers: int
    head_in_layers: float
    stock: torch.Tensor
    full: EarlyExitGenerateOutput
    early: EarlyExitGenerateOutput
    choices: torch.Tensor
    seconds: dict[str, list[float]]

    @property
    def new_tokens(self) -> torch.Tensor:
        """`[batch, T]`, the ids generated with early exit, without the decoder start token."""
        return self.early.sequences[:, 1:]

    @property
    def written(self) -> torch.Tensor:
        """`[batch, T]`, True where the text had not ended yet, so that a token was computed."""
        return self.early.layers_run > 0

    @property
    def left_early(self) -> torch.Tensor:
        return self.written & (self.early.layers_run < self.num_layers)

    @property
    def as_full_depth(self) -> torch.Tensor:
        """`[batch, T]`, True where full depth would have generated the same token after the same prefix."""
        return self.written & (self.new_tokens == self.choices)

    @cached_property
    def stock_texts(self) -> list[str]:
        return self.tokenizer.batch_decode(self.stock, skip_special_tokens=True)

    @cached_property
    def early_texts(self) -> list[str]:
        return self.tokenizer.batch_decode(self.early.sequences, skip_special_tokens=True)

    @property
    def equal_texts(self) -> int:
        return sum(early == stock for early, stock in zip(self.early_texts, self.stock_texts, strict=True))

    def unended(self, sequences: torch.Tensor) -> int:
        """Number of texts that reached the token limit without an end token."""
        return int((sequences != self.tokenizer.eos_token_id).all(dim=1).sum())


# --- running --------------------------------------------------------------------------------------------------------


def run_trial(settings: dict[str, Any], max_new_tokens: int | None = None) -> Trial:
    """Run the shipped model on its shipped inputs, as one batch, on one thread.

    Args:
        settings: Exit settings, as keywords of `generate`; `with_defaults` fills in missing ones.
        max_new_tokens: Maximum number of tokens per text; None: the checkpoint's limit.

    Raises:
        ValueError: A setting is invalid.
    """
    settings = with_defaults(settings)
    model, tokenizer, stock = load_models()
    inputs = default_inputs()
    max_new_tokens = max_new_tokens or model.generation_config.max_new_tokens
    batch = dict(tokenizer(inputs, return_tensors="pt", padding=True), max_new_tokens=max_new_tokens)
    early = partial(model.generate, **batch, **settings, return_dict_in_generate=True)
    with one_thread():
        early_output = early()
        full_output = model.generate(**batch, early_exit=False, return_dict_in_generate=True)
        stock_ids = stock.generate(**batch)
        choices = full_depth_choices(stock, batch, early_output.sequences)
        rows = [dict(tokenizer([text], return_tensors="pt"), max_new_tokens=max_new_tokens) for text in inputs]
        calls = {
            "stock": lambda: [stock.generate(**row) for row in rows],
            "early": lambda: [model.generate(**row, **settings) for row in rows],
            "stock batch": partial(stock.generate, **batch),
            "early batch": early,
        }
        with tqdm(desc="timing", total=REPETITIONS, delay=2, leave=False, disable=None) as progress:
            seconds = measure(calls, REPETITIONS, Random(0), progress.update).seconds["wall"]
    return Trial(
        inputs=inputs,
        settings=settings,
        max_new_tokens=max_new_tokens,
        exit_layers=asked_layers(model, settings),
        tokenizer=tokenizer,
        num_layers=model.config.num_decoder_layers,
        head_in_layers=head_in_layers(model),
        stock=stock_ids,
        full=full_output,
        early=early_output,
        choices=choices,
        seconds=seconds,
    )


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` completed from the shipped model's if the criterion is the same, else with `THRESHOLD` if needed."""
    own = default_exits()["setting"]
    criterion = settings.get("exit_criterion", own["exit_criterion"])
    if criterion == own["exit_criterion"]:
        return {**own, **settings}
    return settings if criterion == "fixed" else {"exit_threshold": THRESHOLD, **settings}


def load_models() -> tuple[EarlyExitT5ForConditionalGeneration, PreTrainedTokenizerBase, T5ForConditionalGeneration]:
    """The shipped model, its tokenizer, and the same checkpoint in its stock class."""
    with quiet_loading():
        model, tokenizer = load_default()
        stock = T5ForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model.prepare_for_generation(), tokenizer, stock


def asked_layers(model: EarlyExitT5ForConditionalGeneration, settings: dict[str, Any]) -> list[int]:
    """Layers whose exits are evaluated under these settings, in ascending order."""
    points = ExitSettings.merge(settings, None, None).exit_points(model.early_exit, model.config.num_decoder_layers)
    return sorted(points)


def head_in_layers(model: torch.nn.Module) -> float:
    """Number of weights of the vocabulary head, in units of one decoder layer."""
    layer = sum(parameter.numel() for parameter in model.decoder.block[-1].parameters())
    return model.lm_head.weight.numel() / layer


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the progress bars of Transformers while two small models are loaded."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# --- formatting -----------------------------------------------------------------------------------------------------


def describe(trial: Trial, colour: bool, width: int) -> str:
    """The demo's whole output as text of `width` columns, with or without escape codes."""
    parts = [
        introduction(trial, width),
        explanation(trial, colour, width),
        *(example(trial, row, colour, width) for row in range(len(trial.inputs))),
        tokens_by_layer(trial),
        work(trial),
        verdict(trial, width),
        about_texts(trial, width),
        what_next(),
    ]
    return "\n\n".join(parts)


def introduction(trial: Trial, width: int) -> str:
    """What the demo does, wrapped to `width` columns, and its `generate` call."""
    settings = ", ".join(f"{name}={value!r}" for name, value in trial.settings.items())
    text = (
        f"A small T5 describes {len(trial.inputs)} restaurants. After decoder layer {_list(trial.exit_layers)} of "
        f"{trial.num_layers} the criterion says how sure each token is. One that is sure enough leaves: it is written "
        "as it stands, and the layers above do not run for it. In Python:"
    )
    return (
        f"{terminal.paragraph(text, width)}\n\n"
        "    model, tokenizer = load_default()\n"
        f"    model.generate(**batch, {settings}, max_new_tokens={trial.max_new_tokens})"
    )


def explanation(trial: Trial, colour: bool, width: int) -> str:
    """Legend of the texts that follow."""
    key = terminal.legend(trial.exit_layers, trial.num_layers, colour, marked="not what full depth would write")
    return terminal.labelled("left after", key, width, LABEL_WIDTH)


def example(trial: Trial, row: int, colour: bool, width: int) -> str:
    """One input with its two texts."""
    lines = (
        (f"{row + 1} input", trial.inputs[row]),
        ("  full depth", trial.stock_texts[row]),
        ("  early exit", coloured_text(trial, row, colour)),
    )
    return "\n".join(terminal.labelled(label, text, width, LABEL_WIDTH) for label, text in lines)


def coloured_text(trial: Trial, row: int, colour: bool) -> str:
    """The coloured text of one row, without end and padding tokens, which the tables do count."""
    ids = trial.new_tokens[row].tolist()
    shown = [place for place, token in enumerate(ids) if token not in trial.tokenizer.all_special_ids]
    if not shown:
        return f"(no text: {trial.written[row].sum()} tokens such as {trial.tokenizer.convert_ids_to_tokens(ids[0])})"
    tokens = trial.tokenizer.convert_ids_to_tokens([ids[place] for place in shown])
    layers = trial.early.layers_run[row, shown].tolist()
    differs = (~trial.as_full_depth[row, shown]).nonzero().flatten().tolist()
    return terminal.colour_tokens(tokens, layers, trial.num_layers, colour, marked=differs)


def tokens_by_layer(trial: Trial) -> str:
    """Table of the layers after which tokens exited, and of the tokens that full depth would have generated too."""
    rows = []
    for layer in (*trial.exit_layers, trial.num_layers):
        here = trial.early.layers_run == layer
        name = f"layer {layer}" if layer < trial.num_layers else f"layer {layer}, the last"
        rows.append((name, f"{here.sum()}", f"{(here & trial.as_full_depth).sum()}"))
    rows.append(("all", f"{trial.written.sum()}", f"{trial.as_full_depth.sum()}"))
    return terminal.table(("left after", "tokens", "as full depth would write"), rows)


def work(trial: Trial) -> str:
    """Table of executed work and time: early exit, full depth, ratio."""
    early, full = trial.early, trial.full
    tokens, full_tokens = int(trial.written.sum()), int((full.layers_run > 0).sum())
    layers, full_layers = int(early.layer_rows.sum()), int(full.layer_rows.sum())
    rows = [
        _compare("tokens written", tokens, full_tokens),
        _compare("decoder layers run, for one token each", layers, full_layers),
        _compare("  per token", layers / tokens, full_layers / full_tokens, "{:.2f}"),
        _compare("skipped layers caught up on (keys and values)", int(early.filled_positions.sum()), 0),
        _compare("vocabulary heads run", int(early.head_rows.sum()), int(full.head_rows.sum())),
        *_candidates(int(early.candidate_rows.sum())),
        _compare("milliseconds, one text at a time", *_milliseconds(trial), "{:.0f}"),
        _compare("milliseconds, as one batch", *_milliseconds(trial, " batch"), "{:.0f}"),
        ("texts equal to full depth", f"{trial.equal_texts} of {len(trial.inputs)}", "", ""),
    ]
    return terminal.table(("", "early exit", "full depth", "ratio"), rows)


def _compare(name: str, early: float, full: float, style: str = "{}") -> tuple[str, str, str, str]:
    return name, style.format(early), style.format(full), terminal.ratio(early, full)


def _candidates(rows: int) -> list[tuple[str, str, str, str]]:
    """The row for candidate tokens scored without a whole vocabulary head; no row if there are none."""
    return [_compare("single tokens of the vocabulary scored besides", rows, 0)] if rows else []


def _milliseconds(trial: Trial, which: str = "") -> tuple[float, float]:
    """Median milliseconds of early exit and of stock."""
    return tuple(1000 * statistics.median(trial.seconds[name + which]) for name in ("early", "stock"))


def verdict(trial: Trial, width: int) -> str:
    """Sentences about whether early exit was faster, and how time was measured."""
    heads, full_heads = int(trial.early.head_rows.sum()), int(trial.full.head_rows.sum())
    same = "equal" if torch.equal(trial.full.sequences, trial.stock) else "DIFFER FROM"
    return terminal.paragraph(
        f"Time: with one text at a time, early exit took {_beside_stock(trial)}; as one batch "
        f"{_beside_stock(trial, ' batch')}. It ran {heads} vocabulary heads, which turn states into words, instead of "
        f"{full_heads}; each has the weights of {trial.head_in_layers:.1f} of this model's decoder layers. Measured: "
        "wall-clock of `generate`, encoder included, taking turns with plain Transformers, medians of "
        f"{REPETITIONS}, {len(trial.inputs)} texts, 1 CPU thread. Full depth is timed with plain Transformers and "
        f"counted with `early_exit=False`, whose tokens {same} plain Transformers'.",
        width,
    )


def _beside_stock(trial: Trial, which: str = "") -> str:
    early, stock = _milliseconds(trial, which)
    return f"{early / stock:.2f} of stock's time ({'slower' if early > stock else 'faster'})"


def about_texts(trial: Trial, width: int) -> str:
    """Sentences about how early exit changed the texts."""
    early, wrong = int(trial.left_early.sum()), int((trial.left_early & ~trial.as_full_depth).sum())
    text = (
        f"Text: of the {early} tokens that left early, {wrong} were not what full depth would have written there, and "
        f"all that follows builds on them: {len(trial.inputs) - trial.equal_texts} of {len(trial.inputs)} texts "
        f"differ from full depth's. {trial.unended(trial.early.sequences)} did not end within {trial.max_new_tokens} "
        f"tokens (at full depth {trial.unended(trial.stock)}). Another text need not be a worse one."
    )
    return terminal.paragraph(f"{text}{about_other_inputs(trial.settings)}", width)


def about_other_inputs(settings: dict[str, Any]) -> str:
    """Quality of this setting on the larger evaluation set, if it was measured there; else an empty string."""
    exits = default_exits()
    if settings != exits["setting"]:
        return ""
    full_depth, ours = exits["rougeL"].values()
    return (
        f" On {len(exits['layers_run'])} other inputs this setting has ROUGE-L {ours:.1f} (best of the references), "
        f"full depth {full_depth:.1f}."
    )


def what_next() -> str:
    """Commands to try after the demo."""
    return "\n".join(
        (
            "Try  hf-earlyexit demo --criterion classifier --threshold 0.5     leave sooner, and watch the text break",
            "     hf-earlyexit demo --criterion fixed --exit-layer 4           ask nobody, always leave",
            "     hf-earlyexit generate --help                                 your own model and inputs",
        )
    )


def _list(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers or ["none"])
    return f"{', '.join(first)} and {last}" if first else last
