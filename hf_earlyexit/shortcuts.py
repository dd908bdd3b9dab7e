"""Answers for linear shortcuts: exit heads that are fitted in closed form, without training, and what they are worth.

A shortcut guesses the last layer's output from a middle one, h_L ~ A h_l, by least squares over labelled decoder
positions ("Jump to Conclusions", arXiv 2303.09435); the model's final norm and LM head read the guess. Batches are
streamed: what is kept are sums, never states. Knows nothing of trainers and texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from tqdm import tqdm

from hf_earlyexit.config import is_number
from hf_earlyexit.heads import ExitNorm, IdentityLinear, ShortcutHead
from hf_earlyexit.intervals import ratio_interval
from hf_earlyexit.labelled import IGNORED, LabelledExits
from hf_earlyexit.models import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.plain import described, has_dense_weight, is_plain_linear, is_untouched


KIND = "shortcut"
REMEDY = "merge adapters (`merge_and_unload`), or load the model into memory"


@dataclass(frozen=True)
class ShortcutFit:
    """What a fit did.

    R² is 1 - squared error / variance of the last layer's output, both summed over tokens and coordinates, the
    variance around the mean. Below 0, the mean would be the better guess.

    Attributes:
        r2: Of the map, by layer, on the tokens of the fit.
        lens_r2: Of the middle state itself, as the logit lens takes it.
        tokens: Of the fit.
        ridge: As it was asked for.
        seconds: That reading the batches and solving took.
    """

    r2: dict[int, float]
    lens_r2: dict[int, float]
    tokens: int
    ridge: float
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """How often an exit's first choice is full depth's.

    Attributes:
        agreeing: Of each row's labelled tokens, those that agree.
        tokens: Of each row, those labelled.
    """

    agreeing: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def share(self) -> float:
        """Of all tokens."""
        return sum(self.agreeing) / sum(self.tokens)

    def interval(self) -> dict[str, float]:
        """The share as `mean`, with `low` and `high` of its 95 % bootstrap interval over rows.

        Raises:
            ImportError: scipy is missing, which the extra `calibrate` installs.
        """
        return ratio_interval(self.agreeing, self.tokens)


@dataclass(frozen=True)
class ExitWorth:
    """What one way of leaving after a layer is worth: its R² (see `ShortcutFit`), and how often it agrees."""

    r2: float
    agreement: Agreement


@dataclass(frozen=True)
class ShortcutReport:
    """What shortcuts are worth under teacher forcing, by layer, beside the logit lens on the same tokens.

    Attributes:
        shortcut: Of the exits' own heads.
        lens: Of the logit lens at the same layers.
        tokens: Labelled tokens of all rows.
    """

    shortcut: dict[int, ExitWorth]
    lens: dict[int, ExitWorth]
    tokens: int


def fit_shortcuts(
    model: EarlyExitT5ForConditionalGeneration,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    ridge: float = 0.0,
    progress: bool = True,
) -> ShortcutFit:
    """Fit the heads of kind `"shortcut"` in closed form, and write them into the model.

    For each exit point l with such a head, A minimises the sum over labelled decoder positions of |A h_l - h_L|²,
    where h_l is the output of block l and h_L that of the last block, before the final norm. The head's norm is the
    final one. Nothing else moves, and exit classifiers, trained for other heads, count as untrained from now on.
    The paper (arXiv 2303.09435) fits every pair of layers of GPT-2 and BERT at one random position of each sentence;
    here it is the last layer, at all labelled positions of a decoder under teacher forcing. `ridge` is not in it.

    Takes memory for two matrices hidden x hidden in fp64 for each exit point, and for a few more while one is solved.

    Args:
        model: In any mode, which it keeps, and of any dtype: sums and solutions are in fp64, maps are rounded to its.
        batches: As for `forward`, with `labels`, -100 where nothing counts; moved to the model's device. For texts
            that the model wrote itself see `with_full_depth_labels`.
        ridge: How strongly the map is drawn towards the identity, which is the logit lens. Added to the sum above is,
            for each coordinate j, `ridge` x |column j of A - I|² x (the sum of all states' squared coordinate j). 0 is
            plain least squares, which wants several times as many tokens as a state has coordinates.
        progress: Show a bar on stderr.

    Raises:
        ValueError: `ridge` is no number from 0 on, the model has no such head, a batch has no labels, states are not
            finite, or tokens are too few or too much alike for `ridge=0`. The model is as it was.
    """
    layers = _layers_of(model)
    if not (is_number(ridge) and 0 <= ridge < float("inf")):
        raise ValueError(f"`ridge` must be a number from 0 on, got {ridge!r}: 0 is plain least squares.")
    started, sums = time.monotonic(), {layer: Sums() for layer in layers}

    def add(exits: LabelledExits, last: torch.Tensor) -> None:
        for layer, one in sums.items():
            one.add(exits.hidden(layer), last)

    _look(model, batches, add, progress, "fitting")
    maps = {layer: one.solve(layer, ridge) for layer, one in sums.items()}
    r2 = {layer: one.r2(maps[layer]) for layer, one in sums.items()}
    lens_r2 = {layer: one.r2(None) for layer, one in sums.items()}
    _write(model, maps)
    return ShortcutFit(r2, lens_r2, sums[layers[0]].tokens, ridge, time.monotonic() - started)


def measure_shortcuts(
    model: EarlyExitT5ForConditionalGeneration,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    progress: bool = True,
) -> ShortcutReport:
    """What the shortcuts of a model are worth on these batches, and what the logit lens is. The model stays as it is.

    Args:
        model: With heads of kind `"shortcut"`.
        batches: As for `fit_shortcuts`, but not those of the fit.
        progress: Show a bar on stderr.

    Raises:
        ValueError: The model has no such head, a batch has no labels, or no token has one.
    """
    layers, depth = _layers_of(model), model.config.num_decoder_layers
    sums = {layer: Sums() for layer in layers}
    counts: dict[tuple[str, int], list[torch.Tensor]] = {}

    def count(exits: LabelledExits, last: torch.Tensor) -> None:
        for layer in layers:
            states = exits.hidden(layer)
            sums[layer].add(states, last)
            # The last layer's head, on a middle state, is the logit lens.
            lens = model.lm_head(model.exit_head_input(depth, states))
            for name, logits in (("shortcut", exits.logits(layer)), ("lens", lens)):
                counts.setdefault((name, layer), []).append(_agreeing(logits, exits))

    _look(model, batches, count, progress, "measuring")

    def worth(name: str, layer: int) -> ExitWorth:
        weight = model.exit_heads.heads[str(layer)].map.weight.detach().double() if name == "shortcut" else None
        agreeing, tokens = torch.cat(counts[name, layer]).T.tolist()
        return ExitWorth(sums[layer].r2(weight), Agreement(tuple(agreeing), tuple(tokens)))

    found = {name: {layer: worth(name, layer) for layer in layers} for name in ("shortcut", "lens")}
    return ShortcutReport(**found, tokens=sums[layers[0]].tokens)


def with_full_depth_labels(
    model: EarlyExitT5ForConditionalGeneration, batches: Iterable[Mapping[str, torch.Tensor]], **options
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches, labelled with what the model itself writes greedily at full depth: no references are needed.

    Args:
        model: In eval mode when the batches are read; `fit_shortcuts` sees to that.
        batches: With `input_ids` and `attention_mask`; what else they hold is left out.
        options: Of `generate`, such as `max_new_tokens`.
    """
    fixed = {"early_exit": False, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, **(options | fixed))
        written = output.layers_run.to(model.device) > 0  # rows that have ended run no layers
        yield {**inputs, "labels": output.sequences[:, -written.shape[1] :].masked_fill(~written, IGNORED)}


@dataclass
class Sums:
    """What least squares needs of states x and targets y, `[tokens, hidden]` each: sums over tokens in fp64.

    Attributes:
        states: `[hidden, hidden]`, of x x^T.
        products: `[hidden, hidden]`, of x (y - x)^T: what is solved for is the map's difference to the identity.
        targets: `[hidden]`, of y.
        squares: `[]`, of |y|².
        distances: `[]`, of |y - x|².
    """

    tokens: int = 0
    states: torch.Tensor | float = field(default=0.0, repr=False)
    products: torch.Tensor | float = field(default=0.0, repr=False)
    targets: torch.Tensor | float = field(default=0.0, repr=False)
    squares: torch.Tensor | float = field(default=0.0, repr=False)
    distances: torch.Tensor | float = field(default=0.0, repr=False)

    def add(self, states: torch.Tensor, targets: torch.Tensor) -> None:
        """Count these tokens, too."""
        states, targets = states.double(), targets.double()
        missing = targets - states
        self.tokens += len(states)
        self.states = self.states + states.T @ states
        self.products = self.products + states.T @ missing
        self.targets = self.targets + targets.sum(dim=0)
        self.squares = self.squares + targets.square().sum()
        self.distances = self.distances + missing.square().sum()

    def solve(self, layer: int, ridge: float) -> torch.Tensor:
        """The map `[hidden, hidden]`, which multiplies states from the left. `layer` is named in errors."""
        width = len(self.states)
        self._check(layer, ridge)
        scale = self.states.diagonal().sqrt()
        scale = torch.where(scale > 0, scale, 1.0)  # of a coordinate that is always 0
        # Coordinates of a residual stream differ in size a thousandfold; rounding must not be the largest one's.
        values, vectors = torch.linalg.eigh(self.states / scale[:, None] / scale)
        rank = int((values > width * torch.finfo(values.dtype).eps * values[-1]).sum())
        if ridge == 0 and rank < width:
            raise ValueError(
                f"States after layer {layer} vary in only {rank} of their {width} dimensions, so their map is not "
                "unique: give batches of more kinds, or `ridge` above 0."
            )
        solved = vectors.T @ (self.products / scale[:, None]) / (values.clamp(min=0) + ridge)[:, None]
        return torch.eye(width, dtype=values.dtype, device=values.device) + (vectors @ solved / scale[:, None]).T

    def _check(self, layer: int, ridge: float) -> None:
        if not bool(self.states.isfinite().all() & self.products.isfinite().all()):
            raise ValueError(f"States after layer {layer} are not finite: load the model in bf16 or fp32.")
        if ridge == 0 and self.tokens < len(self.states):
            raise ValueError(
                f"There are {self.tokens} labelled tokens, fewer than the {len(self.states)} coordinates of a state, "
                "so that a map is not unique: give more batches, or `ridge` above 0."
            )

    def r2(self, map: torch.Tensor | None) -> float:
        """R² of the map on these tokens; of the identity if there is None."""
        error = self.distances
        if map is not None:
            added = map - torch.eye(len(map), dtype=map.dtype, device=map.device)
            error = error - 2 * (added.T * self.products).sum() + ((added @ self.states) * added).sum()
        return 1 - float(error / (self.squares - self.targets.square().sum() / self.tokens))


def _layers_of(model: EarlyExitT5ForConditionalGeneration) -> list[int]:
    """The exit points with a shortcut."""
    exits = model.early_exit
    layers = [layer for layer, kind in zip(exits.exit_layers, exits.heads, strict=True) if kind == KIND]
    if not layers:
        raise ValueError(
            f"`model` has no exit point with a head of kind {KIND!r}, its kinds are {list(exits.heads)}: load it with "
            f'`early_exit=EarlyExitConfig(heads="{KIND}")`.'
        )
    _refuse_other_modules(model, layers)
    return layers


def _refuse_other_modules(model: EarlyExitT5ForConditionalGeneration, layers: list[int]) -> None:
    """See that the weights that are written and judged are what the heads say.

    Raises:
        ValueError: A map or a norm is not the plain one; the message names it.
    """
    for layer in layers:
        head, name = model.exit_heads.heads[str(layer)], f"exit_heads.heads.{layer}"
        if type(head) is not ShortcutHead:
            raise ValueError(f"`{name}` is {described(head)}, not a shortcut: put the head of the checkpoint back.")
        if not is_plain_linear(head.map, IdentityLinear):
            raise ValueError(f"`{name}.map` is {described(head.map)}, changed or offloaded: {REMEDY}.")
        if not (type(head.norm) is ExitNorm and is_untouched(head.norm) and has_dense_weight(head.norm)):
            raise ValueError(f"`{name}.norm` is {described(head.norm)}, changed or offloaded: {REMEDY}.")
    if not has_dense_weight(model.decoder.final_layer_norm):
        norm = described(model.decoder.final_layer_norm)
        raise ValueError(f"`decoder.final_layer_norm` is {norm}, whose scale heads cannot take over: {REMEDY}.")


@torch.no_grad()
def _look(
    model: EarlyExitT5ForConditionalGeneration,
    batches: Iterable[Mapping[str, torch.Tensor]],
    look: Callable[[LabelledExits, torch.Tensor], None],
    progress: bool,
    title: str,
) -> None:
    """Run all layers of each batch in eval mode, and show what its exit points say, with the last block's outputs
    `[tokens, hidden]`."""
    tokens = 0
    with _in_eval_mode(model):
        for batch in tqdm(batches, desc=title, unit="batch", disable=not progress):
            if batch.get("labels") is None:
                raise ValueError(f"A batch of `batches` has no `labels`, only {sorted(batch)}: give them.")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labelled = batch["labels"] != IGNORED
            tokens += int(labelled.sum())
            with _last_output(model) as outputs:
                objective = lambda exits: look(exits, outputs[0][labelled])  # noqa: B023, E731 (called in this turn)
                model(**batch, exit_objective=objective)
    if not tokens:
        raise ValueError("`batches` has no labelled token, so there is nothing to learn from.")


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _last_output(model: EarlyExitT5ForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """A list that takes the last block's output: the library shows only what the final norm makes of it."""
    outputs: list[torch.Tensor] = []
    hook = model.decoder.block[-1].register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    try:
        yield outputs
    finally:
        hook.remove()


def _agreeing(logits: torch.Tensor, exits: LabelledExits) -> torch.Tensor:
    """`[rows with labels, 2]`: a row's tokens where `logits [tokens, vocabulary]` agree with full depth, and all."""
    agrees = logits.argmax(dim=-1) == exits.full_depth_choices
    columns = torch.stack([agrees, torch.ones_like(agrees)], dim=-1).long()
    counts = columns.new_zeros(exits.batch_size, 2).index_add_(0, exits.rows, columns).cpu()
    return counts[counts[:, 1] > 0]


@torch.no_grad()
def _write(model: EarlyExitT5ForConditionalGeneration, maps: dict[int, torch.Tensor]) -> None:
    """Put the maps into the heads."""
    for layer, one in maps.items():
        head = model.exit_heads.heads[str(layer)]
        head.map.weight.copy_(one)
        head.norm.weight.copy_(model.decoder.final_layer_norm.weight)
    if model.config.early_exit["classifier"] is not None:
        model.config.early_exit["classifier"]["trained"] = False
