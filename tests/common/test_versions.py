"""The declared, pinned, documented and tested releases agree."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

from hf_earlyexit.common.library import TESTED


ROOT = Path(__file__).parent.parent.parent


def declared() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def minor(release: str) -> tuple[int, int]:
    major, second = release.split(".")[:2]
    return int(major), int(second)


def test_the_bounds_are_those_of_the_tested_releases():
    requirements = declared()["options"]["install_requires"]
    low, high = re.search(r"^transformers>=([\d.]+),<([\d.]+)$", requirements, re.MULTILINE).groups()
    assert low == TESTED[0]
    assert minor(high) == (minor(TESTED[-1])[0], minor(TESTED[-1])[1] + 1), "the first release that was not tested"
    assert list(TESTED) == sorted(TESTED, key=minor)


def test_the_constraints_are_the_newest_tested_release():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert pins["transformers"] == TESTED[-1]
    requirements = declared()["options"]["install_requires"]
    low, high = re.search(r"^torch>=([\d.]+),<([\d.]+)$", requirements, re.MULTILINE).groups()
    assert minor(low) <= minor(pins["torch"]) < minor(high)


def test_the_readme_names_them():
    text = (ROOT / "README.md").read_text()
    for release in TESTED:
        assert release in text
    python = declared()["options"]["python_requires"].removeprefix(">=")
    assert f"Python {python} or newer" in text and f"Python {python} or newer" in (ROOT / "docs/index.md").read_text()


def test_every_tested_release_is_in_ci():
    """The newest release runs by the README's commands, the others from `TESTED`, each with the whole suite."""
    script = (ROOT / ".ci/run").read_text()
    assert "TESTED[-2::-1]" in script and "command_of_readme 2" in script
    assert script.count('-m "law and not slow"') == 1 and "tests/test_" not in script
