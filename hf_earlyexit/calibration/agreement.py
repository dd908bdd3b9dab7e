"""Losses of settings under several implementations of the decoder, for a certificate that covers all of them.

The guarantee is tested on the largest loss of each input over the implementations, so it holds for each of them. Only
settings that pass with the measured implementation are run with the others; the rest have failed already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_earlyexit.calibration.loss_table import LossTable, record_losses
from hf_earlyexit.calibration.losses import Loss
from hf_earlyexit.calibration.risk_target import RiskTarget
from hf_earlyexit.common.data import Example, data_fingerprint, short_hash
from hf_earlyexit.common.journal import Journal
from hf_earlyexit.decoding.candidates import Candidate, curve_candidates, full_depth
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.evaluation.generate_texts import TextGenerator
from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.generation.certificate import Certificate, plain, versions
from hf_earlyexit.generation.certified import certified_config, uncertified
from hf_earlyexit.generation.fingerprint import tokenizer_fingerprint, weights_fingerprint
from hf_earlyexit.generation.implementations import check_implementations, on_implementation


@dataclass(frozen=True)
class Agreement:
    """Losses and text differences of settings over several implementations of the decoder.

    Attributes:
        losses: The largest loss of each unit and setting over the implementations.
        counts: By implementation: the number of `texts` compared, how many are `different` from those of the measured
            implementation, and the `batch_size` they were generated with.
    """

    losses: LossTable
    counts: dict[str, dict[str, int]]


def agree(
    table: LossTable,
    writer: TextGenerator,
    others: Mapping[str, TextGenerator],
    examples: Sequence[Example],
    loss: Loss,
    part: str,
    rows_per_batch: int | None = None,
) -> Agreement:
    """Generate with the settings of a table under the other implementations too, and take the largest losses.

    Args:
        table: Losses with the measured implementation, whose texts `writer` has.
        others: Generators of the other implementations, by name. Their texts are compared with full depth as measured
            and with full depth under the same implementation, and the larger loss counts. An implementation that is
            wrong at full depth too is therefore noticed.
        examples, loss, part, rows_per_batch: As for `record_losses`.
    """
    worst, counts = table.losses, {}
    whole = examples[: len(examples) // (rows_per_batch or 1) * (rows_per_batch or 1)]
    full = writer.write(whole, full_depth(), part).texts
    for name, other in others.items():
        own_part = f"{part}, {name}"
        asked = (other, examples, table.candidates, loss, own_part, rows_per_batch)
        for losses in (record_losses(*asked).losses, record_losses(*asked, full).losses):
            worst = np.maximum(worst, losses)
        pairs = [
            (one.tokens, another.tokens)
            for candidate in table.candidates
            for one, another in zip(
                writer.write(whole, candidate, part).texts, other.write(whole, candidate, own_part).texts, strict=True
            )
        ]
        different = sum(one != another for one, another in pairs)
        counts[name] = {"texts": len(pairs), "different": different, "batch_size": other.batch_size}
    return Agreement(replace(table, losses=worst), counts)


def writers_on(
    model: EarlyExitT5ForConditionalGeneration, names: Sequence[str], batch_size: int, like: TextGenerator
) -> dict[str, TextGenerator]:
    """A text generator for each named implementation, otherwise configured like `like`."""
    found = {}
    for name in names:
        model, keywords = on_implementation(model, name)
        found[name] = TextGenerator(
            model,
            like.tokenizer,
            batch_size=batch_size,
            generation={**like.generation, **keywords},
            max_source_tokens=like.max_source_tokens,
            journal=like.journal,
        )
    return found


def with_worst(table: LossTable, agreement: Agreement) -> LossTable:
    """The table with its columns replaced by those of the agreement."""
    losses = table.losses.copy()
    losses[:, [table.names.index(name) for name in agreement.losses.names]] = agreement.losses.losses
    return replace(table, losses=losses)


def add_implementations(
    certificate: Certificate,
    model: EarlyExitT5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    loss: Loss,
    names: Sequence[str],
    *,
    batch_size: int = 1,
    writing_batch_size: int = 16,
    path: str | Path | None = None,
) -> Certificate:
    """A certificate that holds for more implementations of the decoder.

    The accepted settings are tested again, on the same inputs, by the largest loss over all implementations. The
    result replaces the certificate. Adding implementations until one fails, and then continuing with those before it,
    would be another test on the same inputs.

    Args:
        examples: Those of the calibration, in any order.
        loss: The certificate's, as an object.
        names: Implementations to add; those the certificate has are measured again.
        batch_size: The batch size of later calls, with which the added implementations are measured.
        writing_batch_size: The batch size with which the first implementation was measured.
        path: A journal, with which an interrupted run resumes.

    Raises:
        ValueError: The model, the loss or the inputs are not the certificate's, it is a certificate of batches, or its
            setting does not keep the target with all implementations.
    """
    ways = [*certificate.implementations, *names]
    check_implementations(ways)
    by_hash = {short_hash(one): one for one in examples}
    known = certificate.split["hashes"]["calibrate"]
    _check(certificate, model, loss, set(known) <= set(by_hash))
    own, bare = [by_hash[one] for one in known], uncertified(model)
    bare.generation_config = certified_config(bare.generation_config, certificate)
    cut = certificate.data["max_source_tokens"]
    settings = ExitSettings.merge(certificate.setting, None, None)
    conditions = bare.conditions_of(settings, {}) | {"batch_size": None}
    if different := certificate.differences(conditions):
        raise ValueError(f"The model is not as certified: {', '.join(different)}. Load it as it was calibrated.")
    asked = _asked(certificate, own) | {
        "conditions": plain(conditions),
        "setting": plain(certificate.setting),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    like = TextGenerator(bare, tokenizer, max_source_tokens=cut, journal=Journal(path, asked))
    writer = writers_on(bare, ways[:1], writing_batch_size, like)[ways[0]]
    others = writers_on(bare, ways[1:], batch_size, like)
    table = record_losses(writer, own, _candidates(certificate, _passing(certificate)), loss, "calibrate")
    found = agree(table, writer, others, own, loss, "calibrate")
    return _tested_anew(certificate, found, loss, ways)


def _tested_anew(certificate: Certificate, found: Agreement, loss: Loss, ways: list[str]) -> Certificate:
    """The certificate, updated with the test results on the largest losses of its passing settings."""
    method, bound = certificate.method, certificate.bound or "wsr"
    promise = RiskTarget(certificate.target, loss, certificate.delta or 0.1, method, bound)
    passing = _passing(certificate)
    result = promise.calibrate(found.losses.losses, [row["cost"] for row in passing], certificate.search["curves"])
    p_values = result.p_values or [None] * len(passing)
    measured = {
        row["name"]: {"mean": mean, "upper_bound": bound, "p_value": p, "accepted": place < result.accepted}
        for place, (row, mean, bound, p) in enumerate(
            zip(passing, result.means, result.upper_bounds, p_values, strict=True)
        )
    }
    if not measured[certificate.name]["accepted"]:
        raise ValueError(f"{certificate.name} is not shown to keep the target with all of {ways}: calibrate anew.")
    rows = [row | measured.get(row["name"], {"accepted": False}) for row in certificate.table]
    risk = {name: value for name, value in measured[certificate.name].items() if name != "accepted"}
    risk, counts = {**certificate.risk, **risk}, found.counts
    return replace(certificate, table=rows, risk=risk, implementations=ways, agreement=counts)


def _passing(certificate: Certificate) -> list[dict[str, Any]]:
    """The rows of the settings that passed in the chain of the certified one."""
    own = next(row["curve"] for row in certificate.table if row["name"] == certificate.name)
    one_chain = certificate.search["order"] == "pareto"
    return [row for row in certificate.table if row["accepted"] and (one_chain or row["curve"] == own)]


def _asked(certificate: Certificate, inputs: Sequence[Example]) -> dict[str, Any]:
    """All values that the journal's entries depend on."""
    return {
        "weights": certificate.weights,
        "inputs": data_fingerprint(inputs),
        "decoding": certificate.decoding,
        "max_source_tokens": certificate.data["max_source_tokens"],
        "versions": versions(),
    }


def _check(certificate: Certificate, model, loss: Loss, has_inputs: bool) -> None:
    if not certificate.certified or certificate.generation["batch_size"] is not None or certificate.unit != "input":
        raise ValueError("Implementations can be added to certificates of single inputs only: calibrate with them.")
    if certificate.search.get("starts", 1) > 1:
        raise ValueError("Implementations cannot be added where tests had several starts: calibrate with them.")
    if weights_fingerprint(model) != certificate.weights:
        raise ValueError("The weights are not the certified ones.")
    if loss.name != certificate.loss["name"]:
        raise ValueError(f"`loss` is {loss.name!r}, the certificate is about {certificate.loss['name']!r}: pass that.")
    if not has_inputs:
        raise ValueError("`examples` lacks inputs of the certificate's calibrate part: pass those of the calibration.")


def _candidates(certificate: Certificate, rows: Sequence[dict[str, Any]]) -> list[Candidate]:
    """The settings of these rows of the certificate."""
    own = ("exit_criterion", "exit_threshold", "exit_layers")
    shared = {name: value for name, value in certificate.setting.items() if name not in own}
    criterion = certificate.setting["exit_criterion"]
    found = []
    for row in rows:
        named = row["curve"].partition(":")[0]
        criteria = {named: criterion} if isinstance(criterion, dict) else {}
        found += curve_candidates(row["curve"], [row["threshold"]], criteria, **shared)
    return found
