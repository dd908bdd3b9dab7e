"""The search space of a calibration: candidates, the order of tests, and the cost that is minimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_earlyexit.calibration.loss_table import LossTable
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.decoding.candidates import Candidate, check_candidates, curve_candidates, default_curves
from hf_earlyexit.exits.criteria import CRITERIA
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration


COSTS = ("time", "layers")
ORDERS = ("pareto", "threshold")


@dataclass(frozen=True)
class Search:
    """The search space, fixed before these inputs are seen.

    Attributes:
        curves: Thresholds by curve (see `candidates.curve_candidates`); None: `candidates.CURVES`.
        order: The order in which settings are tested, until one fails. `"pareto"`: all curves together, from the
            smallest loss to the smallest cost on the select part, without settings that another one beats in both
            (Pareto testing, arXiv 2210.07913). `"threshold"`: curve by curve, from conservative to eager.
        finalists: With `"threshold"`, the number of curves that are tested, the best ones on the select part, each
            with delta divided by that number.
        starts: The number of settings of a chain at which its tests start, each with its share of delta (see
            `fixed_sequence.rejected`).
        cost: The cost that is minimised: `"time"` relative to the stock model, or `"layers"` per token. Both are
            measured on the select part.
        rounds: Number of batches of `DeploymentSettings.batch_size` that each candidate is timed on.
        partition: Assigns inputs to exploration, selection, calibration and report.
        writing_batch_size: Inputs per batch if nothing is timed and rows do not wait for each other.
        criteria: Criteria by a name of your choice, as plain values such as `ExitAccuracy.to_dict()`; `curves` may
            then have curves of these names. They must not have been fitted on these inputs.
    """

    curves: Mapping[str, Sequence[float]] | None = None
    order: str = "pareto"
    finalists: int = 1
    starts: int = 1
    cost: str = "time"
    rounds: int = 31
    partition: Partition = field(default_factory=Partition)
    writing_batch_size: int = 16
    criteria: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        for name, known in (("cost", COSTS), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {list(known)}, got {getattr(self, name)!r}.")
        if self.order == "pareto" and self.finalists != 1:
            raise ValueError(
                f"`finalists={self.finalists}` goes with `order='threshold'`: 'pareto' tests all at once."
            )
        for name, least in (("finalists", 1), ("starts", 1), ("rounds", 2), ("writing_batch_size", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {getattr(self, name)!r}.")
        self._check_names()

    def _check_names(self) -> None:
        """Check that names of criteria are new, contain no exit points, and are used by a curve."""
        if taken := sorted(set(self.criteria) & set(CRITERIA)):
            raise ValueError(f"`criteria` has {taken[0]!r}, which is a criterion already: choose another name.")
        if split := [name for name in self.criteria if ":" in name]:
            raise ValueError(f"`criteria` has {split[0]!r}: choose a name without ':', which precedes exit points.")
        curved = {curve.partition(":")[0] for curve in self.curves or ()}
        if idle := [name for name in self.criteria if name not in curved]:
            raise ValueError(
                f"`criteria` has {idle[0]!r}, and `curves` {list(self.curves or ())} no curve of it: add one, or "
                "leave the criterion out."
            )

    def candidates(self, model: EarlyExitT5ForConditionalGeneration, exits: Mapping[str, Any]) -> list[Candidate]:
        """All candidates, checked against the model.

        Raises:
            ValueError: A candidate is not legal, the model lacks what it needs, or a setting in `exits` applies to
                none of the candidates.
        """
        curves = self.curves or default_curves(model.early_exit)
        found = [
            one
            for curve, thresholds in curves.items()
            for one in curve_candidates(curve, thresholds, self.criteria, **exits)
        ]
        for name in set(exits) - {name for one in found for name in one.keywords}:
            raise ValueError(f"`{name}={exits[name]!r}` goes with none of the curves {list(curves)}: leave it out.")
        check_candidates(found, model.early_exit, model.config.num_decoder_layers, model.config.vocab_size)
        return found


def curves_of(candidates: Sequence[Candidate]) -> list[str]:
    """The curves of the candidates, each once, in order."""
    return list(dict.fromkeys(one.curve for one in candidates))


def pareto_front(table: LossTable, costs: Mapping[str, float], below: float) -> list[Candidate]:
    """Candidates that cost less than `below` and that no other one beats in both loss and cost, ordered by loss."""
    by_loss = sorted(
        zip(table.losses.mean(axis=0), (costs[name] for name in table.names), table.candidates, strict=True), key=_key
    )
    front: list[Candidate] = []
    for _, cost, candidate in by_loss:
        if cost < below:
            front.append(candidate)
            below = cost
    return front


def _key(entry: tuple[float, float, Candidate]) -> tuple[float, float]:
    """Loss and cost. Losses that differ only by rounding are equal, so that the cheaper candidate comes first."""
    return round(entry[0], 9), entry[1]
