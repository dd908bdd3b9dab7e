"""Output of the verbs `roofline` and `tune`: tables, and a sentence with the conclusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_earlyexit.reports import terminal


if TYPE_CHECKING:
    from hf_earlyexit.speed.machine_rates import MachineRates
    from hf_earlyexit.speed.roofline import PartTime, Roofline
    from hf_earlyexit.speed.time_model import TimeModel
    from hf_earlyexit.speed.tuning import Choice, Tuning


SHOWN = 10  # sets of exit points in the table


# --- roofline -------------------------------------------------------------------------------------------------------


def describe_rates(rates: MachineRates) -> str:
    """The machine's measured peak rates: memory bandwidth and GFLOP/s."""
    set_size = rates.working_set / 2**20
    from_cache, from_memory = (
        ", ".join(f"{rate / 1e9:.0f} ({rows})" for rows, rate in zip(rates.product_rows, found, strict=True))
        for found in (rates.cached_rates, rates.memory_rates)
    )
    return (
        f"This machine, {rates.threads} thread(s): reads {rates.bandwidth / 1e9:.1f} GB/s from memory, "
        f"{rates.working_bandwidth / 1e9:.1f} GB/s over the {set_size:.0f} MiB that a step of this decoder reads;\n"
        f"GFLOP/s (rows): {from_cache} with weights in a cache; {from_memory} with weights from memory."
    )


def roofline_table(found: Roofline) -> str:
    """A table with a line per part, and one for the total."""
    header = ("", "MB", "MFLOP", "memory ms", "compute ms", "binds", "ideal ms", "measured ms", "fraction")
    whole = ("all", *(f"{sum(getattr(part, name) for part in found.parts) / 1e6:.2f}" for name in ("bytes", "flops")))
    regimes = [_milliseconds(sum(getattr(part, name) for part in found.parts)) for name in ("memory", "compute")]
    ends = (_milliseconds(found.ideal), _milliseconds(found.measured), f"{found.ideal / found.measured:.2f}")
    return terminal.table(header, [*map(_part_line, found.parts), (*whole, *regimes, "", *ends)])


def _part_line(part: PartTime) -> tuple[str, ...]:
    times = map(_milliseconds, (part.memory, part.compute))
    fraction = f"{part.ideal / part.measured:.2f}" if part.bytes and part.measured else "-"
    work = (f"{part.bytes / 1e6:.2f}", f"{part.flops / 1e6:.2f}")
    return (part.name, *work, *times, part.binds, _milliseconds(part.ideal), _milliseconds(part.measured), fraction)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"


def verdict(found: Roofline) -> str:
    """The part with the largest loss, and the decoder's fraction of the roofline."""
    worst, above = found.largest_loss, found.measured - found.ideal
    timers = f"{found.timers * 1000:.3f} ms per token" if found.timers > 0 else "too little to be seen"
    return (
        f"The largest loss is in {worst.name}: {worst.loss * 1000:.3f} of the {above * 1000:.3f} ms above ideal. "
        f"Without timers the decoder reaches {found.fraction:.2f} of the roofline; they took {timers}."
    )


# --- tune -----------------------------------------------------------------------------------------------------------


def describe_time_model(time_model: TimeModel, threads: int) -> str:
    """Table of everything that was timed, in milliseconds."""
    names = ("layer", "head", "question", "step")
    lines = [(name, *map(_milliseconds, getattr(time_model, name))) for name in names]
    header = (f"ms, {threads} thread(s)", *(f"{rows} row(s)" for rows in time_model.rows))
    singles = ("departure", "payment", "position", "source")
    rest = ", ".join(f"{name} {_milliseconds(getattr(time_model, name))}" for name in singles)
    return f"{terminal.table(header, lines)}\n{rest}"


def tuning_table(found: Tuning) -> str:
    """Table of full depth, the fastest sets of exit points, and the set of all exit points."""
    everything = max(found.ranking, key=lambda choice: len(choice.exit_layers))
    shown = [found.full_depth, *found.ranking[:SHOWN]]
    shown += [everything] if everything not in shown else []
    return terminal.table(("exit points", "layers", "ms/token", "of full depth"), [_line(found, one) for one in shown])


def _line(found: Tuning, choice: Choice) -> tuple[str, ...]:
    name = " ".join(map(str, choice.exit_layers)) or "none: full depth"
    return (name, f"{choice.mean_layers:.2f}", _milliseconds(choice.seconds), f"{found.ratio(choice):.2f}")


def answer(found: Tuning) -> str:
    """The recommended exit points, or that early exit does not pay; and the assumptions behind this."""
    granted = (
        "Predicted for the decoder alone, as if tokens could still leave where they did when recorded; in truth "
        "a token that leaves later changes those after it, so measure what you choose."
    )
    if found.best is None:
        fastest = found.ranking[0]
        return (
            f"Early exit does not pay here: the fastest set, {' '.join(map(str, fastest.exit_layers))}, would take "
            f"{found.ratio(fastest):.2f} of full depth's time, and {1 - found.margin:.2f} is asked for. {granted}"
        )
    layers = " ".join(map(str, found.best.exit_layers))
    return f"Ask at --exit-layers {layers}: {found.ratio(found.best):.2f} of full depth's time. {granted}"
