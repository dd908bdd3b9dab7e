from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch


# Tiny matrices gain nothing from threads, and test processes that each run several slow each other down.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "where tests marked gpu run: CUDA where there is a device, if not given"
    parser.addoption("--device", choices=("cuda", "cpu"), default=None, help=where)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, files without such tests are not imported, so that their extras need not be installed."""
    if config.getoption("markexpr") != "gpu" or not re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None
    return True if "mark.gpu" not in collection_path.read_text(encoding="utf-8") else None


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Of the tests marked gpu."""
    chosen = pytestconfig.getoption("--device")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
