"""Shared test setup: threads, optional kernels, the device of tests marked gpu, and the list of law tests.

Torch is not imported before tests are collected: with `-n`, the process that distributes tests does not need it.
"""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import pytest


# Tiny matrices gain nothing from threads, and test processes with several threads each slow each other down. A value
# that is already set has precedence. The variable is read when torch is first imported, also in processes that tests
# start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest -m law` runs the laws without their mutations: the properties that must hold under any arithmetic. `.ci/run`
# runs them under several. The rest of the suite covers files, commands, reports and numbers that are computed by hand.
# Compiled, recorded and on-device decoding are not included: the suite compares them with what is tested here.
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

# `pytest -m once` runs tests that need only one release of transformers and one machine: mutations, which show that
# the laws detect errors; computations on texts, losses and times, whatever their origin; the pages of the
# documentation. `.ci/run` runs them once. Notebooks, benchmarks and tests of several processes are marked in their own
# files.
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
    """With `-m gpu`, `-m law` or `-m once`, skip files without such tests.

    Importing them takes as long as many tests, and may need extras that are not installed.
    """
    marker = (config.getoption("markexpr").split() or [""])[0]
    if marker not in ("gpu", "law", "once") or not re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None
    listed = {"law": LAWS, "once": ONCE}.get(marker, ())
    is_marked = collection_path.stem in listed or f"mark.{marker}" in collection_path.read_text(encoding="utf-8")
    return None if is_marked else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Configure torch from the environment, and mark the tests in `LAWS` and `ONCE`."""
    import torch

    from hf_earlyexit.kernels.kernel_switch import optional_kernels

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not optional_kernels():  # then disable torch's optional kernels, too
        torch.backends.mkldnn.enabled = False
    for item in items:
        if Path(item.path).stem in LAWS:
            item.add_marker(pytest.mark.law)
        if Path(item.path).stem in ONCE:
            item.add_marker(pytest.mark.once)
    gc.freeze()  # modules stay alive, so the collections of every training run can skip them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, run each file in one process, so that module fixtures are made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config):
    """The device of tests marked gpu."""
    import torch

    chosen = pytestconfig.getoption("--device")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
