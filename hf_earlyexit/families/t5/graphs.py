"""T5 decoding with CUDA graphs: one per segment between exit points and per number of rows.

A graph runs a segment for the rows, writes their keys and values and, if the criterion needs nothing from the host,
evaluates the exit at the end of the segment. The host writes the continuing rows and their positions, replays the
graph, reads the confidences, and picks the next graph. Where rows mostly continue, the next graph is enqueued before
the confidences are read (`decoding/running_ahead.py`); the keys and values that it writes for exiting rows are
overwritten when their missing ones are filled. Everything else is `PreparedT5Decoder`'s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from hf_earlyexit.common.transfer import take, to_device
from hf_earlyexit.decoding.cache import EarlyExitCache
from hf_earlyexit.decoding.layers import Answer, segments
from hf_earlyexit.decoding.running_ahead import RunningAhead
from hf_earlyexit.exits.criteria import ExitCriterion, ExitPoint, at_least_float32, needs_no_host
from hf_earlyexit.families.t5.graph_layers import GraphLayer, LayerPast, LayerWeights, Present, layer_weights
from hf_earlyexit.families.t5.graph_layers import self_attention_bias as bias_of
from hf_earlyexit.families.t5.prepared import PreparedT5, PreparedT5Decoder
from hf_earlyexit.generation.plain import is_untouched
from hf_earlyexit.kernels import graphs
from hf_earlyexit.kernels.compiling import CompileOptions
from hf_earlyexit.kernels.graphs import Room, Workspace, WorkspacePool, roomy
from hf_earlyexit.kernels.rows import Rows


# The fewest positions and source tokens that a workspace has room for.
SMALLEST_ROOM = 64

# Packages whose modules only issue device work, so that they can be recorded.
RECORDABLE = ("torch", "transformers", "hf_earlyexit")

_making = threading.Lock()


class Enqueued(NamedTuple):
    """Layers that were enqueued on the device, and the rows that their results are ordered by."""

    layers: range
    rows: Rows


class GraphedT5:
    """State shared by all calls on one prepared copy: weights for graphs, idle workspaces, compiled functions."""

    def __init__(self, prepared: PreparedT5):
        self.layers: list[LayerWeights] = [
            layer_weights(*pair) for pair in zip(prepared.blocks, prepared.layers, strict=True)
        ]
        self.pool = WorkspacePool()
        self.compiled: dict[Hashable, Callable] = {}


class GraphedT5Decoder(PreparedT5Decoder):
    """The T5 adapter on recorded CUDA graphs.

    Args:
        prepared: The packed weights.
        options: How the kernels inside the graphs are compiled.
        model: An `EarlyExitT5ForConditionalGeneration`.
        cache: The cache of the call, in a workspace lent for it, with encoder states attached.
        masks: As for `T5Decoder`.
    """

    def __init__(self, prepared: PreparedT5, options: CompileOptions, model: nn.Module, cache: EarlyExitCache, *masks):
        super().__init__(prepared, model, cache, *masks)
        self.options, self.graphed = options, graphed(prepared)
        self.workspace: Workspace = self.graphed.pool.lent_to(cache)
        self.arena, self.room = cache.arena, len(self.workspace.buffers["ids"])
        self.criterion: ExitCriterion | None = None
        self.questions: Collection[int] = ()
        self.behind: dict[int, range] = {}  # by exit point, the layers up to the next one
        self.running_ahead = RunningAhead()
        self.asked: Enqueued | None = None  # the segment that ends at the latest exit point of this step
        self.early: Enqueued | None = None  # the segment after it, if already enqueued
        self.has_source: set[range] = set()
        self.replays: dict[Hashable, Callable[[], None]] = {}  # the workspace's graphs under a shorter key
        self.in_graphs = False
        self.uploaded: Rows | None = None  # the rows whose indices and positions the workspace holds
        self.ahead: Rows | None = None  # the rows that `look_ahead` has prepared the next step for
        self._bring_masks(cache)

    @staticmethod
    def lend(prepared: PreparedT5, model: nn.Module, cache: EarlyExitCache, capacity: int) -> None:
        """Place an empty cache with encoder states in a workspace with room for `capacity` positions."""
        source = roomy(cache.encoder_states.shape[1], SMALLEST_ROOM)
        room = Room(roomy(cache.num_rows), roomy(capacity, SMALLEST_ROOM), source)
        workspace = graphed(prepared).pool.lend(cache, room, partial(new_workspace, model, cache))
        for name in ("arena", "cross"):  # non-finite values of an earlier call must not reach this one
            workspace.buffers[name].zero_()
        cache.adopt(workspace.buffers["arena"][:, :, : cache.num_rows])

    def expect(self, criterion: ExitCriterion, exit_points: Collection[int]) -> None:
        if needs_no_host(criterion):
            self.criterion, self.questions = criterion, exit_points
            self.behind = {layers.start - 1: layers for layers in segments(self.num_layers, exit_points)}

    # --- what stays the same in a call ------------------------------------------------------------------------------

    def _bring_masks(self, cache: EarlyExitCache) -> None:
        """Write this call's masks and bias to the workspace; point the cache to the cross-attention buffers."""
        buffers, rows = self.workspace.buffers, cache.num_rows
        buffers["cross_bias"].zero_()
        # -inf where there is no source position; padding has a finite bias.
        buffers["cross_bias"][..., self.cross_mask.shape[-1] :] = -torch.inf
        buffers["cross_bias"][:rows, ..., : self.cross_mask.shape[-1]] = self.cross_mask
        buffers["prompt_bias"].zero_()
        if self.prompt_mask is not None:
            buffers["prompt_bias"][:rows, ..., : self.prompt_mask.shape[-1]] = self.prompt_mask
        by_distance = self._bias_by_distance(buffers["bias_by_distance"].shape[1])
        buffers["bias_by_distance"].copy_(by_distance[0, :, 0].flip(-1))
        source = self.encoder_states.shape[1]
        for layer in range(self.num_layers):
            cache.cross_keys[layer], cache.cross_values[layer] = buffers["cross"][:, layer, :rows, :, :source]

    # --- a step -----------------------------------------------------------------------------------------------------

    def begin_step(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        if self.asked is not None:  # all rows of the last step exited at that exit point
            self.running_ahead.see(self.asked.layers[-1], someone_went_on=False)
        self.asked = self.early = None
        # Graphs read the workspace's arena, which a cache that has moved or grown no longer uses.
        self.in_graphs = cache.arena is self.arena and not torch.is_autocast_enabled(cache.device.type)
        if not self.in_graphs:
            self.ahead = None
            return super().begin_step(rows, cache, length)
        self.new_positions, self.head_dim = length, cache.head_dim
        self.keys = roomy(cache.get_seq_length() + 1, SMALLEST_ROOM)
        if self.ahead is not rows:
            self.uploaded = None
        self.has_ids = self.ahead is not None
        self.ahead = None

    def look_ahead(self, ids: torch.Tensor, rows: Rows, cache: EarlyExitCache) -> None:
        if self.in_graphs:
            self.workspace.buffers["ids"][: len(ids)].copy_(ids)
            self._upload(rows, cache)
            self.ahead = rows

    def begin_prompt(self, rows: Rows, cache: EarlyExitCache, length: int) -> None:
        self.in_graphs, self.ahead = False, None
        super().begin_step(rows, cache, length)

    def embed(self, ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        if not self.in_graphs:
            return super().embed(ids, rows)
        if not self.has_ids:  # graphs embed
            self.workspace.buffers["ids"][: len(ids)].copy_(ids[:, 0])
        return self.workspace.buffers["states"][: len(rows), None]

    def run_blocks(
        self, layers: range, hidden: torch.Tensor, rows: Rows, cache: EarlyExitCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.in_graphs:
            return super().run_blocks(layers, hidden, rows, cache)
        if self.asked is not None:
            self.running_ahead.see(self.asked.layers[-1], someone_went_on=True)
        enqueued = self.early if self.early is not None else self._enqueue(layers, rows, cache)
        self.asked = self.early = None
        cache.mark_written(layers, rows)
        after, before = self._after(layers[-1])
        states = self._of(rows, after)[:, None]
        if layers[-1] not in self.questions:
            return states, self._of(rows, before)[:, None]
        self.workspace.recorder.mark()
        self.asked, behind = enqueued, self.behind[layers[-1]]
        if self.running_ahead.is_worth_it(layers[-1]) and not cache.lacks(behind[-1], rows):
            self.early = self._enqueue(behind, rows, cache)
        return states, states

    def _enqueue(self, layers: range, rows: Rows, cache: EarlyExitCache) -> Enqueued:
        """Replay the graph that runs these layers for these rows."""
        if layers not in self.has_source:
            for layer in layers:
                cache.fill_cross(layer, Rows.everyone(cache.num_rows, cache.device), self.project_source)
            self.has_source.add(layers)
        if rows is not self.uploaded:
            self._upload(rows, cache)
        self._graph(layers, len(rows))()
        return Enqueued(layers, rows)

    def _of(self, rows: Rows, buffer: torch.Tensor) -> torch.Tensor:
        """These rows of a buffer `[room, ...]`."""
        return buffer if len(rows) == self.room else rows.select(buffer[: rows.batch_size])

    def answer(self, layer: int, rows: Rows) -> Answer | None:
        if not self.in_graphs or self.asked is None or self.asked.layers[-1] != layer:
            return None
        self.workspace.recorder.wait()
        evaluated = self.asked.rows
        confidences = self.workspace.buffers["confidences", layer][: len(evaluated)].tolist()
        logits = self.workspace.buffers.get(("logits", layer, self.criterion))
        if rows is evaluated:
            return Answer(confidences, None if logits is None else logits[: len(rows)])
        # The layers were enqueued before it was known that some of the rows exit.
        places = [evaluated.indices.index(row) for row in rows]
        logits = None if logits is None else take(logits[: len(evaluated)], places)
        return Answer([confidences[place] for place in places], logits)

    def _size(self, count: int) -> int:
        """The number of rows of a graph for `count` rows: a power of two, filled up by repeating the last row."""
        return min(roomy(count), self.room)

    def _upload(self, rows: Rows, cache: EarlyExitCache) -> None:
        """Write the indices and positions of the continuing rows to the buffer that graphs read."""
        size = self._size(len(rows))
        indices = [*rows.indices, *rows.indices[-1:] * (size - len(rows))]
        control = to_device([indices, [cache.lengths[row] for row in indices]], cache.device)
        self.workspace.buffers["control"][:, :size].copy_(control)
        self.uploaded = rows

    # --- graphs -----------------------------------------------------------------------------------------------------

    def _graph(self, layers: range, count: int) -> Callable[[], None]:
        if (replay := self.replays.get((layers, count, self.keys))) is None:
            criterion = self.criterion if layers[-1] in self.questions else None
            size, everyone = self._size(count), count == self.room
            key = (layers, size, everyone, self.keys, self.options, criterion)
            segment = partial(self._segment, layers, size, everyone, self.keys, criterion)
            replay = self.replays[layers, count, self.keys] = self.workspace.graph(key, segment)
        return replay

    @torch.no_grad()
    def _segment(self, layers: range, size: int, everyone: bool, keys: int, criterion: ExitCriterion | None) -> None:
        """The work that a graph records; reads and writes only buffers of the workspace."""
        buffers = self.workspace.buffers
        rows, positions = buffers["control"][:, :size]
        if layers.start == 1:
            states = self.stack.embed_tokens(buffers["ids"][rows])
            prompt_bias = buffers["prompt_bias"][rows][..., :keys]
            bias = bias_of(buffers["bias_by_distance"], positions, prompt_bias, keys)
            buffers["bias"][..., :keys].index_copy_(0, rows, bias)
        else:
            states = self._after(layers.start - 1)[0]
            states = states if everyone else states[rows]
        present = Present(rows, positions, buffers["bias"][..., :keys], buffers["cross_bias"])
        run_layer = self._layer(size, everyone, keys)
        for layer in layers:
            previous = states
            past = LayerPast(buffers["arena"][:, layer - 1], buffers["cross"][:, layer - 1])
            states = run_layer(states, self.graphed.layers[layer - 1], past, present)
        after, before = self._after(layers[-1])
        # Only criteria that are evaluated outside the graph need the state before the layer.
        for buffer, values in ((after, states), *(() if criterion else ((before, previous),))):
            buffer.copy_(values) if everyone else buffer.index_copy_(0, rows, values)
        if criterion is not None:
            self._evaluate(criterion, layers[-1], states, previous)

    def _evaluate(self, criterion: ExitCriterion, layer: int, states: torch.Tensor, previous: torch.Tensor) -> None:
        """Evaluate the exit and write the confidences to a host buffer."""
        score = lambda layer, hidden: self.lm_head(self.head_input(layer, hidden))  # noqa: E731
        places = list(range(len(states)))
        point = ExitPoint(layer, places, places, states, previous, score, self.exit_probability)
        confidence = criterion.confidence(point)
        make = partial(self.workspace.recorder.host_buffer, self.room, dtype=at_least_float32(states).dtype)
        # Each exit point has its own buffer, since the next graph may run while the host reads.
        host = self.workspace.buffer(("confidences", layer), make)
        host[: len(states)].copy_(confidence, non_blocking=True)
        if point.scored is not None:
            shape = (self.room, point.scored.shape[1])
            logits = self.workspace.buffer(("logits", layer, criterion), lambda: point.scored.new_empty(shape))
            logits[: len(states)].copy_(point.scored)

    def _layer(self, size: int, everyone: bool, keys: int) -> Callable:
        """The layer function, compiled once per prepared copy, options and shapes."""
        shapes = [self.workspace.buffers[name].shape for name in ("arena", "cross")]
        key = (self.options, size, everyone, keys, *shapes)
        if key not in self.graphed.compiled:
            config, activation = self.model.config, self.prepared.layers[0].activation
            layer = GraphLayer(activation, config.is_gated_act, config.layer_norm_epsilon, config.num_heads, everyone)
            options = self.options.for_one_row() if size == 1 else self.options
            self.graphed.compiled[key] = options.compile(layer, dynamic=False)
        return self.graphed.compiled[key]

    def _after(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for the states `[room, hidden]` after a layer and before it, by batch row.

        Each exit point has its own buffers: the states of exiting rows are read again when the other rows are done.
        """
        like = self.workspace.buffers["states"]
        make = partial(torch.zeros_like, like)
        return self.workspace.buffer(("after", layer), make), self.workspace.buffer(("before", layer), make)

    def warm_up(self, segments: Iterable[range], cache: EarlyExitCache) -> Iterator[None]:
        """Record graphs of these segments for any number of rows and positions; yields after each graph."""
        counts = {(self._size(count), count == self.room): count for count in range(1, cache.num_rows + 1)}
        lengths = {roomy(length + 1, SMALLEST_ROOM): length for length in range(cache.capacity)}
        segments = list(segments)
        for length, count in product(lengths.values(), counts.values()):
            cache.lengths, rows = [length] * cache.num_rows, Rows(range(count), cache.num_rows, cache.device)
            self.begin_step(rows, cache, 1)
            for segment in segments:
                hidden = cache.encoder_states.new_zeros(len(rows), 1, cache.encoder_states.shape[-1])
                self.run_blocks(segment, hidden, rows, cache)
                yield
        cache.lengths = [0] * cache.num_rows


# --- workspaces -----------------------------------------------------------------------------------------------------


def graphed(prepared: PreparedT5) -> GraphedT5:
    """The `GraphedT5` of a prepared copy, made on first use and dropped with the copy."""
    with _making:
        if prepared.graphed is None:
            prepared.graphed = GraphedT5(prepared)
    return prepared.graphed


def refuse_unrecordable(model: nn.Module) -> None:
    """Check that the modules that a graph calls can be recorded; their Python code runs only during recording.

    Raises:
        ValueError: A module is not the library's or has hooks; the message names it.
    """
    for name, module in called_modules(model):
        package = type(module).__module__.partition(".")[0]
        if package not in RECORDABLE or not is_untouched(module):
            raise ValueError(
                f'`cache_implementation="static"` records graphs on this device and would not run the Python of '
                f"`{name}`, a `{type(module).__name__}`: remove its hooks and own code, or leave "
                "`cache_implementation` out."
            )


def called_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a graph calls, by name."""
    yield "decoder.embed_tokens", model.decoder.embed_tokens
    for number, block in enumerate(model.decoder.block):
        yield f"decoder.block.{number}.layer.2.DenseReluDense.act", block.layer[2].DenseReluDense.act
    yield from model.exit_heads.named_modules(prefix="exit_heads")


def new_workspace(model: nn.Module, cache: EarlyExitCache, room: Room) -> Workspace:
    """A workspace with buffers of that room, on the device of the cache."""
    rows, capacity, source = room
    recorder = graphs.RECORDERS[cache.device.type](cache.device)
    heads, width, dtype = cache.num_heads, cache.head_dim, cache.dtype
    with torch.inference_mode(False), torch.device(cache.device):
        buffers = {
            "arena": torch.zeros(2, cache.num_layers, rows, heads, capacity, width, dtype=dtype),
            "cross": torch.zeros(2, cache.num_layers, rows, heads, source, width, dtype=dtype),
            "cross_bias": torch.zeros(rows, 1, 1, source, dtype=dtype),
            "prompt_bias": torch.zeros(rows, 1, 1, capacity, dtype=dtype),
            "bias_by_distance": torch.zeros(heads, capacity, dtype=dtype),
            "bias": torch.zeros(rows, heads, 1, capacity, dtype=dtype),
            "ids": torch.zeros(rows, dtype=torch.long),
            "control": torch.zeros(2, rows, dtype=torch.long),
            "states": torch.zeros(rows, model.config.d_model, dtype=dtype),
        }
    return Workspace(recorder, buffers)
