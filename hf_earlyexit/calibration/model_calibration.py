"""Finds a setting of a model that keeps a risk target, and makes its certificate.

Inputs are split by a salted hash (`common/partition.py`). The settings to test and their order are chosen on the
select part. The tests run on the calibrate part. The chosen setting's risk on the report part is reported as measured.
The statistics of a loss table are in `calibration/risk_control.py`; the table is computed in
`calibration/loss_table.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from hf_earlyexit.calibration.agreement import agree, with_worst, writers_on
from hf_earlyexit.calibration.deployment import DeploymentSettings
from hf_earlyexit.calibration.ledger import Attempt, Ledger
from hf_earlyexit.calibration.loss_table import LossTable, record_losses, times_beside_stock
from hf_earlyexit.calibration.risk_control import Calibration
from hf_earlyexit.calibration.risk_target import RiskTarget, refuse_degenerate, units_of
from hf_earlyexit.calibration.search import Search, curves_of, pareto_front
from hf_earlyexit.common.data import Example, data_fingerprint, short_hash, units_have_several
from hf_earlyexit.common.extras import require
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.decoding.candidates import Candidate, full_depth
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.evaluation.intervals import mean_interval
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.families.t5.stock import stock_of
from hf_earlyexit.generation.certificate import Certificate, versions
from hf_earlyexit.generation.certified import uncertified
from hf_earlyexit.generation.fingerprint import tokenizer_fingerprint, weights_fingerprint
from hf_earlyexit.generation.implementations import PLAIN, PREPARED
from hf_earlyexit.generation.refusals import refuse_training_mode


NONE_SAFE = "no setting was shown to keep the target"
ATTEMPT = "certificate "  # prefix of the journal keys of certificates that were made
NONE_FASTER = "no setting that was shown to keep the target costs less than full depth"


@dataclass(frozen=True)
class ModelCalibration:
    """A certificate and the losses it is based on.

    Attributes:
        certificate: To be applied with `model.certify(certificate)`.
        tables: Losses by part: all candidates on select, the tested ones on calibrate, the chosen setting on report.
    """

    certificate: Certificate
    tables: dict[str, LossTable]


def calibrate_model(
    model: EarlyExitT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    promise: RiskTarget,
    use: DeploymentSettings | None = None,
    search: Search | None = None,
    *,
    path: str | Path | None = None,
    data_name: str = "",
    ledger: Ledger | None = None,
) -> ModelCalibration:
    """Find the cheapest setting that is shown to keep a risk target.

    Args:
        model: In eval mode; not changed.
        tokenizer: Of the model.
        examples: Distinct inputs, drawn independently of each other from the distribution of the inputs to come, as
            `data.read_examples` gives them. The model and its exits must not have been trained on any of them.
        promise: The risk target.
        use: How the model will be used.
        search: The search space.
        path: A journal, with which an interrupted run resumes.
        data_name: For the certificate.
        ledger: The ledger of the checkpoint's folders, in which this certificate is recorded. Earlier certificates on
            the same calibrate part, from the ledger and the journal, are counted in the certificate.

    Returns:
        The certificate. Its setting is full depth if no setting was shown to keep the target, or if none of those that
        were is cheaper than full depth.

    Raises:
        ValueError: An argument is not legal, an input occurs twice, the calibrate part is too small for the target
            even at zero loss (the message says how many inputs are needed), or the training of the checkpoint or one
            of its criteria used inputs of the calibrate or report part. All of these are raised before anything is
            generated. Also raised, after texts of the calibrate part are generated: full depth generates the same text
            for every input.
    """
    calibrator = _Calibrator(
        model, tokenizer, examples, promise, use or DeploymentSettings(), search or Search(), path
    )
    return calibrator.run(data_name, ledger)


class _Calibrator:
    """One calibration: checks its arguments, then runs its stages."""

    def __init__(self, model, tokenizer, examples, promise: RiskTarget, use: DeploymentSettings, search: Search, path):
        self.model, self.promise, self.use, self.search = uncertified(model), promise, use, search
        self.earlier_certificate = model.exit_certificate
        self.tokenizer = tokenizer
        require("scipy.stats", "calibrate")  # here too, to fail before hours of generation
        refuse_training_mode(model)
        self.candidates = search.candidates(model, use.exits)
        self.finalists = min(search.finalists, len(curves_of(self.candidates)))
        _refuse_repeated(examples)
        self.parts = search.partition.split(examples)
        seen = model.seen_inputs.with_criteria(search.criteria.values())
        seen.refuse([*self.parts["calibrate"], *self.parts["report"]], "the calibrate and report parts")
        self.conditions = self._check_use(self.candidates[0])
        self._check_parts()
        promise.check(self.parts, self._units("calibrate"), self.finalists, search.starts)
        measured = PREPARED if self.model.has_fresh_copy() else PLAIN
        self.implementations = list(use.implementations or [measured])
        self.journal = Journal(path, self._asked(examples))
        like = TextGenerator(
            self.model,
            tokenizer,
            generation=dict(use.generation),
            max_source_tokens=use.max_source_tokens,
            journal=self.journal,
        )
        measured, *others = self.implementations
        size = use.rows_per_batch or search.writing_batch_size
        self.writer = writers_on(self.model, [measured], size, like)[measured]
        self.others = writers_on(self.model, others, use.rows_per_batch or use.batch_size, like)
        self.agreement: dict[str, dict[str, int]] = {}

    def run(self, data_name: str, ledger: Ledger | None) -> ModelCalibration:
        """Run all stages."""
        tables = {"select": self._table("select", self.candidates)}
        costs = self._costs("select", self.candidates)
        chains = self._chains(tables["select"], costs)
        attempts = self._record_attempt(ledger, [[one.name for one in chain] for chain in chains])
        tables["calibrate"] = self._table("calibrate", [one for chain in chains for one in chain])
        if tables["calibrate"].candidates:
            self._refuse_degenerate("calibrate")
        tested = [self._test(tables["calibrate"].of(chain), costs) for chain in chains]
        tables["calibrate"] = tables["calibrate"].with_columns(table for table, _ in tested)
        tested = [result for _, result in tested]
        chosen, reason = self._choose(chains, tested, costs)
        if chosen is not None and self.parts["report"]:
            tables["report"] = self._table("report", [chosen])
        rows = [row for chain, result in zip(chains, tested, strict=True) for row in _rows(chain, result, costs)]
        report = self._report(tables["report"], chosen) if "report" in tables else None
        certificate = self._certificate(chosen, reason, rows, report, data_name)
        return ModelCalibration(replace(certificate, attempts=attempts), tables)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_parts(self) -> None:
        """Check the sizes of the select and report parts.

        Costs are measured on the select part. The report part may be empty, but not smaller than one unit.
        """
        sizes = {name: len(part) for name, part in self.parts.items()}
        if not self._units("select") or (sizes["report"] and not self._units("report")):
            raise ValueError(
                f"A part has not one unit: of {sizes} inputs, {self.search.partition}. Give more inputs, or other "
                "shares."
            )

    def _units(self, part: str) -> int:
        return len(set(units_of(self.parts[part], self.use.rows_per_batch)))

    def _check_use(self, candidate: Candidate) -> dict[str, Any]:
        """The conditions of a call, as a certificate stores them, except those that differ between candidates."""
        if self.use.rows_per_batch and units_have_several(self._examples()):
            raise ValueError("`batch_exit` other than 'row' does not go with groups of inputs: units would mix.")
        if self.promise.bound == "clopper_pearson" and self._unit(self._examples()) != "input":
            raise ValueError("`bound='clopper_pearson'` does not go with units of several inputs: use 'wsr' or 'hb'.")
        unknown = [name for name in self.use.generation if not hasattr(GenerationConfig(), name)]
        if unknown:
            raise ValueError(
                f"`generation` has {unknown[0]!r}, which is no setting of a generation config: leave it out."
            )
        settings = ExitSettings.merge(candidate.keywords, None, None)
        if not isinstance(settings.exit_schedule, (str, dict)):
            raise ValueError(f"`exit_schedule` must have a name to be certified, got {settings.exit_schedule!r}.")
        return self._conditions(candidate)

    def _conditions(self, candidate: Candidate) -> dict[str, Any]:
        settings = ExitSettings.merge(candidate.keywords, None, None)
        generation = dict(self.use.generation)
        conditions = self.model.conditions_of(settings, {"kwargs": generation, **generation})
        if conditions.get("do_sample"):
            raise ValueError(
                "`do_sample=True` cannot be calibrated, losses would be of one draw: use greedy or beams."
            )
        together = settings.batch_exit != "row"
        return conditions | {"batch_size": self.use.batch_size if together else None}

    def _asked(self, examples: Sequence[Example]) -> dict[str, Any]:
        """All values that the journal's entries depend on."""
        shared = {name: value for name, value in self.conditions.items() if not name.startswith("exit_")}
        criteria = {"criteria": dict(self.search.criteria)} if self.search.criteria else {}
        if self.implementations[0] != PLAIN:
            criteria["implementation"] = self.implementations[0]
        return criteria | {
            "built in": self.model.early_exit.to_dict(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "versions": versions(),
            "weights": weights_fingerprint(self.model),
            "inputs": data_fingerprint(examples),
            "partition": self.search.partition.described(),
            "exits": dict(self.use.exits),
            "max_source_tokens": self.use.max_source_tokens,
            "writing_batch_size": self.use.rows_per_batch or self.search.writing_batch_size,
            **shared,
        }

    # --- stages -----------------------------------------------------------------------------------------------------

    def _table(self, part: str, candidates: Sequence[Candidate]) -> LossTable:
        rows = self.use.rows_per_batch
        return record_losses(self.writer, self.parts[part], candidates, self.promise.loss, part, rows)

    def _refuse_degenerate(self, part: str) -> None:
        compared = self.parts[part][: len(units_of(self.parts[part], self.use.rows_per_batch))]
        refuse_degenerate(self.writer.write(compared, full_depth(), part).texts)

    def _costs(self, part: str, candidates: Sequence[Candidate]) -> dict[str, float]:
        """The costs of full depth and of each candidate, by name."""
        everyone = [full_depth(), *candidates]
        if self.search.cost == "layers":
            texts = (self.writer.write(self.parts[part], one, part).texts for one in everyone)
            return {one.name: _mean_layers(written) for one, written in zip(everyone, texts, strict=True)}
        size, rounds = self.use.batch_size, self.search.rounds
        key = f"{part} | time of {', '.join(one.name for one in everyone)} | batch {size}, {rounds} rounds"
        if key not in self.journal:
            stock = stock_of(self.model)
            options = {"batch_size": size, "rounds": rounds}
            self.journal.add(key, times_beside_stock(self.writer, stock, self.parts[part], everyone, **options))
        return dict(zip((one.name for one in everyone), self.journal[key], strict=True))

    def _chains(self, table: LossTable, costs: Mapping[str, float]) -> list[list[Candidate]]:
        """The chains of settings: each chain is tested in sequence, independently of the others."""
        if self.search.order == "pareto":
            front = pareto_front(table, costs, below=costs[full_depth().name])
            return [front] if front else []
        best = {curve: self._best_cost(table.of_curve(curve), costs) for curve in curves_of(table.candidates)}
        finalists = sorted(best, key=best.__getitem__)[: self.finalists]
        return [table.of_curve(curve).candidates for curve in finalists]

    def _best_cost(self, table: LossTable, costs: Mapping[str, float]) -> float:
        """The lowest cost among the candidates before the first whose mean loss is above the target."""
        above = (table.losses.mean(axis=0) > self.promise.target).tolist()
        good = table.names[: above.index(True)] if True in above else table.names
        return min((costs[name] for name in good), default=float("inf"))

    def _test(self, table: LossTable, costs: Mapping[str, float]) -> tuple[LossTable, Calibration]:
        """A chain's losses and test results; passing settings are tested over all implementations of the decoder."""
        asked = ([costs[name] for name in table.names], self.finalists, self.search.starts)
        result = self.promise.calibrate(table.losses, *asked)
        if not self.others or not result.accepted:
            return table, result
        passing, rows = table.of([table.candidates[place] for place in result.columns]), self.use.rows_per_batch
        inputs, loss = self.parts["calibrate"], self.promise.loss
        found = agree(passing, self.writer, self.others, inputs, loss, "calibrate", rows)
        for name, counts in found.counts.items():
            known = self.agreement.setdefault(name, dict.fromkeys(counts, 0) | {"batch_size": counts["batch_size"]})
            for count in ("texts", "different"):
                known[count] += counts[count]
        table = with_worst(table, found)
        return table, self.promise.calibrate(table.losses, *asked)

    def _choose(
        self, chains: Sequence[Sequence[Candidate]], tested: Sequence[Calibration], costs: Mapping[str, float]
    ) -> tuple[Candidate | None, str]:
        """The cheapest of the chains' choices, or the reason why there is none."""
        safe = [chain[one.index] for chain, one in zip(chains, tested, strict=True) if one.index is not None]
        cheapest = min(safe, key=lambda one: costs[one.name], default=None)
        if chains and cheapest is None:
            return None, NONE_SAFE
        if cheapest is None or costs[cheapest.name] >= costs[full_depth().name]:
            return None, NONE_FASTER
        return cheapest, ""

    def _report(self, table: LossTable, chosen: Candidate) -> dict[str, Any]:
        losses = table.column(chosen)
        cost = self._costs("report", [chosen])[chosen.name]
        return {"n": len(losses), **mean_interval(losses), "mean_layers": float(table.layers[0]), "cost": cost}

    # --- the result -------------------------------------------------------------------------------------------------

    def _certificate(
        self,
        chosen: Candidate | None,
        reason: str,
        rows: list[dict[str, Any]],
        report: dict[str, Any] | None,
        data_name: str,
    ) -> Certificate:
        setting = chosen or full_depth()
        risk = next((row for row in rows if row["name"] == setting.name), None)
        crc = self.promise.method == "crc"
        examples = self._examples()
        return Certificate(
            certified=chosen is not None,
            reason=reason,
            name=setting.name,
            setting=dict(setting.keywords),
            loss=self.promise.described(),
            target=self.promise.target,
            delta=None if crc else self.promise.delta,
            method=self.promise.method,
            bound=None if crc else self.promise.bound,
            n=self._units("calibrate"),
            unit=self._unit(examples),
            risk=risk and {name: risk[name] for name in ("mean", "upper_bound", "p_value", "cost")},
            cost={"name": self.search.cost, "unit": self._cost_unit()},
            search={
                "order": self.search.order,
                "curves": self.finalists,
                "candidates": len(self.candidates),
                "starts": self.search.starts,
            },
            table=rows,
            split={
                "counts": {name: len(part) for name, part in self.parts.items()},
                "hashes": {name: [short_hash(one) for one in part] for name, part in self.parts.items()},
            },
            data={
                "name": data_name,
                "fingerprint": data_fingerprint(examples),
                "max_source_tokens": self.use.max_source_tokens,
            },
            weights=self.journal.asked["weights"],
            generation=self._conditions(setting) if chosen else self.conditions,
            versions=versions(),
            created=date.today().isoformat(),
            report=report,
            implementations=self.implementations,
            agreement=self.agreement,
            partition=self.search.partition.described(),
        )

    def _record_attempt(self, ledger: Ledger | None, tested: list[list[str]]) -> int | None:
        """Record this attempt; returns how many earlier certificates use inputs of this calibrate part.

        Called before any text of the calibrate part is generated: a run that is cut off later has been an attempt. The
        model's own certificate counts too, with those that it counts, unless this question was recorded before.
        """
        question = {
            "promise": {**self.promise.described(), **self.promise.recorded()},
            "tested": tested,
            "starts": self.search.starts,
            "implementations": self.implementations,
            "asked": self.journal.asked,
        }
        this = Attempt.on(self.parts["calibrate"], self.search.partition.salt, question)
        if ledger is not None:
            ledger.read()
        known = [Attempt.from_dict(values) for key, values in self.journal.entries.items() if key.startswith(ATTEMPT)]
        known = list(dict.fromkeys([*(ledger.attempts if ledger else []), *known]))
        if (key := f"{ATTEMPT}{this.question}") not in self.journal:
            self.journal.add(key, asdict(this))
        if ledger is not None:
            ledger.add(*known, this)
        of_model = 0 if this in known else self._attempts_of_model(this)
        recorded = ledger is not None or self.journal.path is not None
        return max(this.earlier(known), of_model) if recorded or of_model else None

    def _attempts_of_model(self, this: Attempt) -> int:
        """The model's own certificate and those that it counts, if it was tested on any of the same inputs."""
        own = self.earlier_certificate
        if own is None or not {*own.split["hashes"]["calibrate"]} & {*this.inputs}:
            return 0
        return 1 + (own.attempts or 0)

    def _examples(self) -> list[Example]:
        return [one for part in self.parts.values() for one in part]

    def _unit(self, examples: Sequence[Example]) -> str:
        if self.use.rows_per_batch:
            return f"batch of {self.use.rows_per_batch} inputs"
        return "group of inputs" if units_have_several(examples) else "input"

    def _cost_unit(self) -> str:
        if self.search.cost == "layers":
            return "decoder layers per token"
        return f"of stock's time, batch {self.use.batch_size}"


def _refuse_repeated(examples: Sequence[Example]) -> None:
    sources = {example.source for example in examples}
    if len(sources) < len(examples):
        raise ValueError(
            f"`examples` repeats {len(examples) - len(sources)} of {len(examples)} inputs, which are then not "
            "independent: group them, as `data.read_examples(..., group_by=...)` does."
        )


def _rows(chain: Sequence[Candidate], result: Calibration, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of a chain in the certificate."""
    p_values = result.p_values or [None] * len(chain)
    numbers = zip(chain, result.means, result.upper_bounds, p_values, strict=True)
    return [
        {
            "name": one.name,
            "curve": one.curve,
            "threshold": one.threshold,
            "mean": mean,
            "upper_bound": upper_bound,
            "p_value": p_value,
            "cost": costs[one.name],
            "accepted": place in result.columns,
        }
        for place, (one, mean, upper_bound, p_value) in enumerate(numbers)
    ]


def _mean_layers(texts) -> float:
    layers = [layer for text in texts for layer in text.layers_run]
    return sum(layers) / len(layers)
