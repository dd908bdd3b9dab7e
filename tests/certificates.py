"""A certificate for a model, as from a calibration but without running one."""

from __future__ import annotations

from hf_earlyexit.common.partition import Partition
from hf_earlyexit.decoding.settings import ExitSettings
from hf_earlyexit.generation.certificate import Certificate, versions
from hf_earlyexit.generation.certified import uncertified
from hf_earlyexit.generation.fingerprint import weights_fingerprint


def certificate_for(
    model, setting: dict, *, certified: bool = True, rows: int | None = None, **decoding
) -> Certificate:
    """A certificate of this setting and decoding; with `certified=False`, of full depth."""
    bare = uncertified(model)
    conditions = bare.conditions_of(ExitSettings.merge(setting, None, None), {"kwargs": decoding, **decoding})
    return Certificate(
        certified=certified,
        reason="" if certified else "no setting was shown to keep the target",
        name="softmax 0.5" if certified else "full depth",
        setting=setting if certified else {"early_exit": False},
        loss={"name": "text_distance", "description": "distance", "against": "full depth", "lower": 0.0, "upper": 1.0},
        target=0.1,
        delta=0.1,
        method="ltt",
        bound="wsr",
        n=100,
        unit="input",
        risk={"mean": 0.01, "upper_bound": 0.05, "p_value": 0.01, "cost": 0.6} if certified else None,
        cost={"name": "time", "unit": "of stock's time, batch 1"},
        search={"order": "pareto", "curves": 1, "candidates": 9},
        table=[],
        split={"counts": {}, "hashes": {"select": [], "calibrate": [], "report": []}},
        data={"name": "", "fingerprint": "", "max_source_tokens": None},
        weights=weights_fingerprint(model),
        generation=conditions | {"batch_size": rows},
        versions=versions(),
        created="2026-01-31",
        partition=Partition().described(),
    )
