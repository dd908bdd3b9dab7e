"""Lower bound on decoding time: bytes and FLOPs of each part, and the time that a machine needs for them.

Pure arithmetic on a config, a simulated walk and the rates of a machine; runs no model and measures nothing. Weights
count once per step and layer if any row runs there. Keys and values and the residual stream count per row. Values
between the products of one sub-layer are assumed to stay in the nearest cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import T5Config

from hf_earlyexit.exits.config import EarlyExitConfig
from hf_earlyexit.speed.machine_rates import MachineRates
from hf_earlyexit.speed.simulation import SimulatedWalk


LAYERS = "layers"
CROSS = "cross-attention"
SOURCE = "source projection"
CATCH_UP = "catch-up"
HEADS = "heads"
REST = "loop and decisions"
# d_model x d_model maps in an exit head. Classifiers are small and count as part of the decisions.
HEAD_MAPS = {"shared": 0, "norm": 0, "linear": 1, "mlp": 2, "shortcut": 1}


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes that determine the work of a T5 decoder.

    Attributes:
        num_layers: Layers of the decoder.
        d_model: Width of the residual stream.
        inner: Combined width of all heads of an attention.
        d_ff: Inner width of a feed-forward.
        ff_matrices: Matrices in a feed-forward: 3 if gated, else 2.
        vocabulary: Rows of the vocabulary head.
        head_maps: d_model x d_model maps in the exit head of each layer, the last layer included.
        value_bytes: Bytes of one number.
    """

    num_layers: int
    d_model: int
    inner: int
    d_ff: int
    ff_matrices: int
    vocabulary: int
    head_maps: tuple[int, ...]
    value_bytes: int

    @classmethod
    def of(cls, config: T5Config, value_bytes: int) -> DecoderSizes:
        """From a T5 config, with or without exits."""
        depth = config.num_decoder_layers
        exits = EarlyExitConfig.from_dict(getattr(config, "early_exit", None)).for_layers(depth)
        kinds = dict(zip(exits.exit_layers, exits.heads, strict=True))
        maps = tuple(HEAD_MAPS[kinds.get(layer, "shared")] for layer in range(1, depth + 1))
        gated = config.feed_forward_proj.startswith("gated-")
        inner = config.num_heads * config.d_kv
        return cls(depth, config.d_model, inner, config.d_ff, 2 + gated, config.vocab_size, maps, value_bytes)

    @property
    def layer_matrices(self) -> int:
        """Numbers in the matrices of self-attention and feed-forward."""
        return self.d_model * (4 * self.inner + self.ff_matrices * self.d_ff)

    @property
    def projection(self) -> int:
        """Numbers in two matrices between the stream and the heads: K and V, or Q and output."""
        return 2 * self.d_model * self.inner

    @property
    def head_matrix(self) -> int:
        """Numbers in the vocabulary head."""
        return self.d_model * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a full-depth step reads."""
        layer = self.layer_matrices + self.projection + 3 * self.d_model
        return self.value_bytes * (self.num_layers * layer + self.head_matrix + self.d_model)


@dataclass(frozen=True)
class PartWork:
    """The work of a part of the decoder in a walk, for each time that it runs.

    Attributes:
        name: Name of the part.
        rows: `[times]`, rows of its matrix products.
        bytes: `[times]`, read and written.
        flops: `[times]`, a multiplication and an addition counted as two.
    """

    name: str
    rows: np.ndarray
    bytes: np.ndarray
    flops: np.ndarray


def together(parts: Sequence[PartWork], *names: str) -> list[PartWork]:
    """Merge the parts of these names into one, where they cannot be timed apart."""
    chosen, others = ([part for part in parts if (part.name in names) == is_in] for is_in in (True, False))
    work = (np.concatenate([getattr(part, name) for part in chosen]) for name in ("rows", "bytes", "flops"))
    return [PartWork(names[0], *work), *others]


def parts_of(sizes: DecoderSizes, walk: SimulatedWalk, source: int) -> list[PartWork]:
    """The work of each part.

    Args:
        sizes: Of the decoder.
        walk: The simulated walk.
        source: Source positions of each row.
    """
    return [
        layers_work(sizes, walk),
        cross_work(sizes, walk, source),
        source_work(sizes, walk, source),
        catch_up_work(sizes, walk),
        heads_work(sizes, walk),
    ]


def layers_work(sizes: DecoderSizes, walk: SimulatedWalk) -> PartWork:
    """Self-attention and feed-forward.

    Two norms, keys and values of all earlier positions read and of one written, the stream read and written.
    """
    rows, keys = walk.rows[walk.rows > 0], walk.keys[walk.rows > 0]
    weights = sizes.layer_matrices + 2 * sizes.d_model
    numbers = weights + 2 * sizes.inner * (keys + rows) + 4 * sizes.d_model * rows
    flops = 2 * rows * sizes.layer_matrices + 4 * sizes.inner * keys
    return PartWork(LAYERS, rows, sizes.value_bytes * numbers, flops)


def cross_work(sizes: DecoderSizes, walk: SimulatedWalk, source: int) -> PartWork:
    """Cross-attention: a norm, Q and output, source keys and values read, the stream read and written."""
    rows = walk.rows[walk.rows > 0]
    numbers = sizes.projection + sizes.d_model + 2 * rows * (source * sizes.inner + sizes.d_model)
    flops = 2 * rows * (sizes.projection + 2 * source * sizes.inner)
    return PartWork(CROSS, rows, sizes.value_bytes * numbers, flops)


def source_work(sizes: DecoderSizes, walk: SimulatedWalk, source: int) -> PartWork:
    """Keys and values of the source, projected when a row runs a layer for the first time."""
    positions = source * walk.newcomers[walk.newcomers > 0]
    return _projected(SOURCE, sizes, positions, norm=0)  # encoder states are already normed


def catch_up_work(sizes: DecoderSizes, walk: SimulatedWalk) -> PartWork:
    """Missing keys and values, with a norm before the projection; weights are read once per backfill."""
    return _projected(CATCH_UP, sizes, walk.owed[walk.owed > 0], norm=sizes.d_model)


def _projected(name: str, sizes: DecoderSizes, positions: np.ndarray, norm: int) -> PartWork:
    """Hidden states read, keys and values written."""
    numbers = sizes.projection + norm + positions * (sizes.d_model + 2 * sizes.inner)
    return PartWork(name, positions, sizes.value_bytes * numbers, 2 * positions * sizes.projection)


def heads_work(sizes: DecoderSizes, walk: SimulatedWalk) -> PartWork:
    """Norm, vocabulary head and its logits, and any maps of an exit head."""
    maps = np.array(sizes.head_maps)[:, None, None] * sizes.d_model**2 * (walk.head_rows > 0)
    own = (walk.head_rows[maps > 0], maps[maps > 0], 2 * (maps * walk.head_rows)[maps > 0])
    rows = walk.head_products[walk.head_products > 0]
    numbers = sizes.head_matrix + sizes.d_model + rows * (sizes.d_model + sizes.vocabulary)
    rows, numbers, flops = map(np.concatenate, zip(own, (rows, numbers, 2 * rows * sizes.head_matrix), strict=True))
    return PartWork(HEADS, rows, sizes.value_bytes * numbers, flops)


# --- measured against ideal -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartTime:
    """A part of the decoder, per token.

    Attributes:
        name: Name of the part.
        bytes: Read and written.
        flops: Multiplications and additions.
        memory: Seconds in the memory regime, where weights are read once for all rows: bytes over bandwidth.
        compute: Seconds in the compute regime, where time grows with rows: FLOPs over the rate at that many rows.
        ideal: Minimum seconds: the longer of both, for each time that the part runs.
        measured: Measured seconds.
    """

    name: str
    bytes: float
    flops: float
    memory: float
    compute: float
    ideal: float
    measured: float

    @property
    def binds(self) -> str:
        """The regime of the part: `memory` or `compute`; `-` if it has no counted work."""
        if not self.bytes:
            return "-"
        return "memory" if self.memory >= self.compute else "compute"

    @property
    def loss(self) -> float:
        """Seconds above ideal."""
        return self.measured - self.ideal


@dataclass(frozen=True)
class Roofline:
    """Measured against ideal time, part by part; the parts add up to the total.

    Attributes:
        parts: The parts. The last is the remainder, which has no ideal.
        timers: Seconds per token spent on timing the parts; the total without timers is that much shorter.
    """

    parts: list[PartTime]
    timers: float

    @property
    def ideal(self) -> float:
        """Seconds per token."""
        return sum(part.ideal for part in self.parts)

    @property
    def measured(self) -> float:
        """Seconds per token, timers included."""
        return sum(part.measured for part in self.parts)

    @property
    def fraction(self) -> float:
        """The fraction of the roofline that is reached, without the cost of timers."""
        return self.ideal / (self.measured - self.timers)

    @property
    def largest_loss(self) -> PartTime:
        """The part whose time is furthest above its ideal."""
        return max(self.parts, key=lambda part: part.loss)


def compare(
    work: Sequence[PartWork], rates: MachineRates, seconds: Mapping[str, float], untimed: float, tokens: int
) -> Roofline:
    """Compare measured times to the limits of the machine.

    Args:
        work: All work of the walks.
        rates: Of the machine.
        seconds: Measured seconds of that work, by part, the remainder included.
        untimed: Seconds of the same walks without timers.
        tokens: Number of tokens walked.
    """
    parts = [part_time(part, rates, seconds.get(part.name, 0.0), tokens) for part in work]
    nothing = PartWork(REST, *np.zeros((3, 0)))
    parts.append(part_time(nothing, rates, seconds.get(REST, 0.0), tokens))
    return Roofline(parts, (sum(seconds.values()) - untimed) / tokens)


def part_time(work: PartWork, rates: MachineRates, seconds: float, tokens: int) -> PartTime:
    """A part per token: seconds in both regimes, and the longer one for each time that the part runs."""
    memory, compute = work.bytes / rates.working_bandwidth, work.flops / rates.rate_at(work.rows)
    sums = (work.bytes, work.flops, memory, compute, np.maximum(memory, compute))
    return PartTime(work.name, *(float(each.sum()) / tokens for each in sums), seconds / tokens)
