"""Lists with matching items must have equal lengths, or the code that takes them refuses them.

`zip` stops at its shortest list, and so does `map` of several lists.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hf_earlyexit.calibration.ledger import Attempt
from hf_earlyexit.calibration.losses import LOSSES
from hf_earlyexit.calibration.risk_control import calibrate
from hf_earlyexit.common.partition import Partition
from hf_earlyexit.evaluation.generate_texts import Text
from hf_earlyexit.exits.accuracy_thresholds import fit_accuracy
from hf_earlyexit.speed.recorded_exits import read_exits
from tests.scripts import SCRIPTS


PACKAGE = SCRIPTS.parent / "hf_earlyexit"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *SCRIPTS.rglob("*.py")])
# Files in which lists may differ in length, and the reason.
MAY_DIFFER = {
    "decoding/layers.py": "an end and the one before it",
    "common/tables.py": "rows may lack cells, which then are not there, or have empty ones too many",
    "calibration/losses.py": "a token that one text lacks is another one, which the length counts",
    "reports/oracle_report.py": "styles that are taken in turn",
    "speed/machine_rates.py": "weights that are taken in turn",
    "generation/fingerprint.py": "lengths are compared before",
}


def pairs_unequal_lists(source: str) -> list[int]:
    """Lines with a non-strict `zip`, or a `map` of several lists."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = {call: call.func.id if isinstance(call.func, ast.Name) else "" for call in calls}

    def is_strict(call: ast.Call) -> bool:
        told = {word.arg: word.value for word in call.keywords}
        return isinstance(told.get("strict"), ast.Constant) and told["strict"].value is True

    return [
        call.lineno
        for call, name in names.items()
        if (name == "zip" and len(call.args) > 1 and not is_strict(call)) or (name == "map" and len(call.args) > 2)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE if PACKAGE in path.parents else SCRIPTS.parent).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_lists_are_paired_strictly(path):
    found = pairs_unequal_lists(path.read_text(encoding="utf-8"))
    assert len(found) == (name_of(path) in MAY_DIFFER), f"lines {found}: strict=True, or a line in `MAY_DIFFER`"


@pytest.mark.parametrize(
    "line", ("zip(a, b)", "zip(a, b, strict=False)", "zip(a, b, strict=some)", "map(f, a, b)", "dict(zip(a, b))")
)
def test_what_is_not_strict_is_noticed(line):
    assert pairs_unequal_lists(f"x = 1\n{line}") == [2]
    assert not pairs_unequal_lists("zip(a, b, strict=True); map(f, a); zip(a)")


def exits_of_other_inputs(folder: Path):
    path = folder / "exits.json"
    path.write_text('{"layers_run": [[2], [4]], "num_layers": 4, "inputs": ["a"]}')
    read_exits(path)


CALLS = {
    "shares and parts": lambda folder: Partition(shares={"explore": 0.5, "select": 0.5}),
    "costs and columns": lambda folder: calibrate([[0.0, 0.0]] * 30, [1.0], target=0.5, delta=0.1),
    "confidences and agreement": lambda folder: fit_accuracy("softmax", {1: [0.5] * 60}, {1: [1] * 59}),
    "exits and inputs": exits_of_other_inputs,
    "fields of a ledger": lambda folder: Attempt.from_dict({"inputs": ["a"], "salt": "b"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_lists_of_other_lengths_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="one for each|must be|of the same tokens|the input of each text|has \\["):
        CALLS[name](tmp_path)


def test_a_missing_token_counts_as_another_one():
    long, short = Text("a b", [1, 2, 3, 4], [1] * 4), Text("a", [1, 2], [1] * 2)
    for early, full in ((long, short), (short, long)):
        assert LOSSES["token_mismatch"].of(early, full, ()) == 0.5
