"""Simulate fixed-sequence tests with one and with several starts: false acceptances, and what the tests find.

    python scripts/simulate_starts.py --draws 1000

Losses with known risks are drawn `--draws` times. In each draw the settings are tested in their order at one
family-wise error rate (`hf_earlyexit.calibration.fixed_sequence`, betting). Printed for each order of risks and number
of starts:

- failures: the share of draws in which any accepted setting has a risk above the target. The guarantee is at most
  delta.
- something: the share of draws in which at least one setting is accepted; all settings are cheaper than full depth.
- cost: the mean cost of the cheapest accepted setting, where full depth costs 1 and each step in the order saves 0.1.

`--losses` adds recorded losses as a population, from which inputs are drawn with replacement: a CSV with a row per
input and a column `LOSS SETTING` per setting. These settings are tested in the order of their mean losses on
`--select` other inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_earlyexit.calibration.bounds import p_values_of
from hf_earlyexit.calibration.fixed_sequence import rejected
from hf_earlyexit.cli.arguments import positive
from hf_earlyexit.common.failures import reading, refusals
from hf_earlyexit.common.tables import read_file


TARGET, DELTA = 0.1, 0.1
STARTS = (1, 2, 3)
HARDLY_BAD = TARGET + 1e-3
# Risks in the order of the tests.
ORDERS = {
    "ascending": (0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.2),
    "ascending, close to the target": (0.06, 0.065, 0.07, 0.075, 0.08, 0.085, 0.09, HARDLY_BAD),
    "the first is bad": (0.15, 0.02, 0.03, 0.04, 0.05, 0.06, 0.12, 0.2),
    "one in the middle is bad": (0.02, 0.03, 0.15, 0.03, 0.04, 0.05, 0.12, 0.2),
    "all are hardly bad": (HARDLY_BAD,) * 8,
    "all but every third are hardly bad": (HARDLY_BAD, HARDLY_BAD, 0.02) * 3,
}


@dataclass(frozen=True)
class Found:
    """Result for one number of starts.

    Attributes:
        failures, something, cost: See the module docstring.
    """

    failures: float
    something: float
    cost: float


def losses_like(risks: tuple[float, ...], inputs: int, generator: np.random.Generator) -> NDArray:
    """`[inputs, settings]`, losses of 0 and 1 with the given risks.

    For half of the inputs the settings share one random difficulty, to correlate settings as on texts.
    """
    shared = generator.random((inputs, 1))
    own = generator.random((inputs, len(risks)))
    return (np.where(generator.random((inputs, 1)) < 0.5, shared, own) < np.array(risks)).astype(float)


def simulate(draw: Callable[[], tuple[NDArray, NDArray, float]], draws: int, starts: int) -> Found:
    """Mean result over draws.

    Args:
        draw: Returns losses `[inputs, settings]` in the order of the tests, the risk of each column, and the target.
        draws: Number of draws.
        starts: Number of starts.
    """
    failures = something = cost = 0.0
    for _ in range(draws):
        losses, risks, target = draw()
        p_values = p_values_of(losses, target, bound="wsr", delta=DELTA / starts)
        columns = rejected(p_values.tolist(), DELTA, starts)
        failures += any(risks[column] > target for column in columns)
        something += bool(columns)
        cost += 1 - 0.1 * (1 + max(columns)) if columns else 1.0
    return Found(failures / draws, something / draws, cost / draws)


def simulated(order: str, draws: int, inputs: int, starts: int) -> Found:
    """Result for an order of known risks. Draws are the same for every number of starts."""
    generator, risks = np.random.default_rng(0), ORDERS[order]
    return simulate(lambda: (losses_like(risks, inputs, generator), np.array(risks), TARGET), draws, starts)


def recorded(path: Path) -> dict[str, NDArray]:
    """Losses `[inputs, settings]` by name, from a file.

    A loss's name is the first word of its columns. Losses with negative values are rescaled from [-1, 1] to [0, 1].
    """
    rows = read_file(path)
    names = dict.fromkeys(column.split(" ")[0] for column in rows.column_names if " " in column)
    if not names:
        raise ValueError(f"{path} has no column `LOSS SETTING`; there are {rows.column_names}")
    found = {}
    for name in names:
        columns = [rows[column] for column in rows.column_names if column.startswith(f"{name} ")]
        with reading(path, f"the losses {name!r}"):
            table = np.array(columns, dtype=float).T
        found[name] = (table + 1) / 2 if table.min() < 0 else table
    return found


def of_population(table: NDArray, draws: int, inputs: int, select: int, starts: int) -> Found:
    """Result for recorded losses. The target is 1e-4 below the median setting's risk."""
    generator, risks = np.random.default_rng(0), table.mean(axis=0)
    target = float(np.sort(risks)[len(risks) // 2] - 1e-4)

    def draw() -> tuple[NDArray, NDArray, float]:
        looked_at, tested = (table[generator.integers(len(table), size=count)] for count in (select, inputs))
        order = looked_at.mean(axis=0).argsort(kind="stable")
        return tested[:, order], risks[order], target

    return simulate(draw, draws, starts)


def lines(arguments: argparse.Namespace, populations: Mapping[str, NDArray]) -> Iterator[str]:
    """Lines of the Markdown table.

    Args:
        arguments: The parsed arguments.
        populations: Recorded losses by name.
    """
    yield "| order of the risks | starts | failures | something | cost |"
    yield "| --- | --- | --- | --- | --- |"
    for order in ORDERS:
        for starts in STARTS:
            yield line(order, starts, simulated(order, arguments.draws, arguments.inputs, starts))
    for name, table in populations.items():
        for starts in STARTS:
            found = of_population(table, arguments.draws, arguments.inputs, arguments.select, starts)
            yield line(f"recorded `{name}`, in the order of {arguments.select} others", starts, found)


def line(order: str, starts: int, found: Found) -> str:
    """Table line of one order and number of starts."""
    return f"| {order} | {starts} | {found.failures:.3f} | {found.something:.3f} | {found.cost:.3f} |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=positive, default=1000, metavar="N", help="of calibration inputs (1000)")
    parser.add_argument("--inputs", type=positive, default=219, metavar="N", help="of each draw (219)")
    parser.add_argument(
        "--select", type=positive, default=109, metavar="N", help="other inputs that give the order (109)"
    )
    parser.add_argument("--losses", type=Path, metavar="FILE", help="recorded losses")
    arguments = parser.parse_args(argv)
    with refusals(parser.prog):
        populations = recorded(arguments.losses) if arguments.losses else {}
    for one in lines(arguments, populations):
        print(one, flush=True)


if __name__ == "__main__":
    main()
