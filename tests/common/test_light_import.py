"""Importing the package, and its command line, does not import what only some features need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


HEAVY = ("datasets", "pandas", "pyarrow", "evaluate", "matplotlib")
CODE = """
import json, sys
import {modules}
print(json.dumps([name for name in {names} if name in sys.modules]))
"""


def loaded_by(modules: str, names: tuple[str, ...]) -> list[str]:
    """Which of `names` are loaded once `modules` have been imported in a new process."""
    code = CODE.format(modules=modules, names=names)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.once
def test_importing_the_package_loads_no_tables_metrics_or_figures():
    assert loaded_by("hf_earlyexit, hf_earlyexit.cli.main", HEAVY) == []


@pytest.mark.once
def test_a_module_that_is_loaded_is_noticed():
    assert loaded_by("pyarrow", HEAVY) == ["pyarrow"]
