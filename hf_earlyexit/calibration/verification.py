"""Verification of a certificate on new inputs: the risk there, and a test whether it refutes the guarantee."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_earlyexit.calibration.bounds import p_values_of
from hf_earlyexit.calibration.loss_table import record_losses
from hf_earlyexit.calibration.losses import Loss
from hf_earlyexit.calibration.risk_target import refuse_degenerate, units_of
from hf_earlyexit.common.data import Example, data_fingerprint
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.decoding.candidates import Candidate, full_depth
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.evaluation.intervals import mean_interval
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.certificate import Certificate, plain, versions
from hf_earlyexit.generation.certified import certified_config, uncertified
from hf_earlyexit.generation.fingerprint import tokenizer_fingerprint, weights_fingerprint
from hf_earlyexit.generation.implementations import implementation_of


LEVEL = 0.05  # of the test whether new inputs refute a guarantee


@dataclass(frozen=True)
class Verification:
    """Results of a certified setting on new inputs.

    Attributes:
        mean: Of the losses.
        low, high: 95 % bootstrap interval of the mean.
        n: Number of units.
        target: The certificate's target.
        p_value: Of the hypothesis that the guarantee holds. If small, the guarantee does not hold for inputs like
            these.
        mean_layers: Per token.
        left_out: Number of inputs left out because the certificate was chosen or tested on them; they prove nothing
            new.
        differences: What differs from the certified state, such as the weights.
    """

    mean: float
    low: float
    high: float
    n: int
    target: float
    p_value: float
    mean_layers: float
    left_out: int
    differences: list[str]

    @property
    def refuted(self) -> bool:
        """Whether the risk of inputs like these is shown to be above the target."""
        return self.p_value <= LEVEL

    def in_words(self) -> str:
        """The result in a sentence or two."""
        found = f"mean loss {self.mean:.4f} (95 % interval {self.low:.4f} to {self.high:.4f}) on {self.n} new units"
        if self.refuted:
            verdict = f"REFUTED for inputs like these (p = {self.p_value:.2g})"
        elif self.mean > self.target:
            verdict = f"above it here, not so clearly that the promise is refuted (p = {self.p_value:.2g})"
        else:
            verdict = "kept here"
        return f"Promised: at most {self.target:g}. Found: {found}. The promise is {verdict}."


def verify_certificate(
    model: EarlyExitT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    loss: Loss,
    certificate: Certificate | None = None,
    *,
    batch_size: int = 16,
    path: str | Path | None = None,
) -> Verification:
    """Measure the risk of a certified setting on inputs that the certificate was not chosen or tested on.

    Args:
        model: In eval mode; not changed.
        tokenizer: Of the model.
        examples: Distinct inputs. Those that the certificate was chosen or tested on are left out.
        loss: The certificate's, as an object.
        certificate: The model's own if None.
        batch_size: Inputs per batch, if the certificate is not one of batches.
        path: A journal, with which an interrupted run resumes.

    Raises:
        ValueError: There is no certificate, it is for another loss, no input is left, or one was used in training.
    """
    certificate = model.exit_certificate if certificate is None else certificate
    _check(certificate, loss)
    new = Partition().in_order(certificate.unseen(examples))  # the same order in every run
    model.seen_inputs.with_criteria([certificate.setting.get("exit_criterion")]).refuse(new, "the verification")
    rows = certificate.generation["batch_size"]
    if len(new) < max(1, rows or 1):
        raise ValueError(f"`examples` has {len(new)} inputs that the certificate has not seen: give other ones.")
    weights, bare = weights_fingerprint(model), uncertified(model)
    bare.generation_config = certified_config(bare.generation_config, certificate)
    writer = TextGenerator(
        bare,
        tokenizer,
        batch_size=rows or batch_size,
        max_source_tokens=certificate.data["max_source_tokens"],
        journal=Journal(
            path,
            {
                **_asked(certificate, new, rows or batch_size),
                "conditions": plain(_conditions(bare, certificate)),
                "implementation": implementation_of(bare, bare.generation_config),
                "tokenizer": tokenizer_fingerprint(tokenizer),
                "weights": weights,
                "versions": versions(),
            },
        ),
    )
    candidate = Candidate(certificate.name, None, certificate.setting)
    table = record_losses(writer, new, [candidate], loss, "verify", rows)
    refuse_degenerate(writer.write(new[: len(units_of(new, rows))], full_depth(), "verify").texts)
    losses = table.column(candidate)
    return Verification(
        **mean_interval(losses),
        n=len(losses),
        target=certificate.target,
        p_value=_p_value_of_the_promise(losses, certificate),
        mean_layers=float(table.layers[0]),
        left_out=len(examples) - len(new),
        differences=_differences(bare, certificate, weights),
    )


def _asked(certificate: Certificate, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """All values that the journal's entries depend on."""
    return {
        "inputs": data_fingerprint(examples),
        "setting": certificate.setting,
        "generation": certificate.generation,
        "max_source_tokens": certificate.data["max_source_tokens"],
        "batch_size": batch_size,
    }


def _check(certificate: Certificate | None, loss: Loss) -> None:
    if certificate is None:
        raise ValueError("The model has no certificate: calibrate it (`hf-earlyexit calibrate`), or pass one.")
    if loss.name != certificate.loss["name"]:
        raise ValueError(f"`loss` is {loss.name!r}, the certificate is about {certificate.loss['name']!r}: pass that.")


def _p_value_of_the_promise(losses: np.ndarray, certificate: Certificate) -> float:
    """P-value of "the risk is at most the target": mirrored losses, with a bound that is valid for any losses."""
    lower, upper = certificate.loss["lower"], certificate.loss["upper"]
    gains = (upper - losses) / (upper - lower)
    order = np.random.default_rng(0).permutation(len(gains))
    unit_target = (upper - certificate.target) / (upper - lower)
    return float(p_values_of(gains[order, None], unit_target, bound="wsr", delta=LEVEL)[0])


def _conditions(bare: EarlyExitT5ForConditionalGeneration, certificate: Certificate) -> dict[str, Any]:
    """The conditions of a call of the model with the certified setting and batch size."""
    settings = ExitSettings.merge(certificate.setting, None, None)
    return bare.conditions_of(settings, {}) | {"batch_size": certificate.generation["batch_size"]}


def _differences(bare: EarlyExitT5ForConditionalGeneration, certificate: Certificate, weights: str) -> list[str]:
    """What differs from the certified state, although the setting and the decoding are the certified ones."""
    found = certificate.differences(_conditions(bare, certificate)) if certificate.certified else []
    if certificate.certified:  # length 0: inputs are truncated as certified
        found += certificate.uncovered(implementation_of(bare, bare.generation_config), 0)
    return found + (["weights"] if weights != certificate.weights else [])
