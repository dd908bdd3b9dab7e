"""What all tests share: threads, optional kernels, the device of tests marked gpu, and which tests are the laws.

Torch is not imported before tests are collected: with `-n`, the process that hands out tests does without.
"""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest


# Tiny matrices gain nothing from threads, and test processes that each run several slow each other down. Whoever sets
# the variable wants that number. It is read when torch is first imported, in every process that a test starts, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest -m law` runs the laws, their mutations not included: what must hold under any arithmetic. `.ci/run` runs
# them under several. The rest of the suite is about files, commands, reports and numbers that are computed by hand.
# Compiled and recorded decoding and that on a device are left out: the suite holds them against what is tested here.
LAWS = (
    "test_accuracy_thresholds",
    "test_beta_mixture",
    "test_cache",
    "test_exit_candidates",
    "test_generation",
    "test_laws",
    "test_low_precision",
    "test_oracle_curves",
    "test_patience",
    "test_prepared",
    "test_properties",
    "test_separating",
    "test_stock",
)

# `pytest -m once` runs what says as much under one release of transformers and on one machine as on all: mutations,
# which show that the laws notice; what is computed of texts, losses and times, however they came about; the pages of
# the documentation. `.ci/run` runs it once. Notebooks, benchmarks and tests of several processes are marked so where
# they stand.
ONCE = (
    "test_calibration",
    "test_docs",
    "test_figures",
    "test_fixed_sequence",
    "test_fuzz_readers",
    "test_fuzz_verbs",
    "test_guarantee",
    "test_losses",
    "test_model_calibration",
    "test_mutations",
    "test_mutations_of_modules",
    "test_mutations_of_promises",
    "test_mutations_of_speed",
    "test_partition",
    "test_report",
    "test_report_certificate",
    "test_roofline",
    "test_simulation",
    "test_time_model",
    "test_timed_walk",
    "test_tuning",
    "test_verification",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    where = "where tests marked gpu run: CUDA where there is a device, if not given"
    parser.addoption("--device", choices=("cuda", "cpu"), default=None, help=where)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, `-m law` or `-m once`, files without such tests are not imported: that takes as long as many
    tests, and the extras of others need not be installed."""
    marker = (config.getoption("markexpr").split() or [""])[0]
    if marker not in ("gpu", "law", "once") or not re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None
    listed = {"law": LAWS, "once": ONCE}.get(marker, ())
    is_marked = collection_path.stem in listed or f"mark.{marker}" in collection_path.read_text(encoding="utf-8")
    return None if is_marked else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Set torch up as the environment says, and mark the laws."""
    import torch

    from hf_earlyexit.kernel_switch import optional_kernels

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not optional_kernels():  # then without those of torch, too
        torch.backends.mkldnn.enabled = False
    for item in items:
        if Path(item.path).stem in LAWS:
            item.add_marker(pytest.mark.law)
        if Path(item.path).stem in ONCE:
            item.add_marker(pytest.mark.once)
    gc.freeze()  # modules stay: a collection, which every training run asks for, need not walk through them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a file is run by one process: what a fixture of a module makes is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config):
    """Of the tests marked gpu."""
    import torch

    chosen = pytestconfig.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
