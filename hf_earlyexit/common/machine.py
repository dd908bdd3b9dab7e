"""Versions and hardware of this machine, for bug reports and for records of measured times."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

from hf_earlyexit.common.version import __version__


PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "evaluate",
    "rouge-score",
    "sacrebleu",
    "ctranslate2",
)


def environment() -> dict[str, str]:
    """The machine and the installed packages."""
    import torch

    versions = {name: version_of(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "hf_earlyexit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "cuda": f"{torch.version.cuda}, {', '.join(gpus)}" if torch.cuda.is_available() else "not available",
    }


def version_of(package: str) -> str:
    """The version of a package, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The name of the processor, if the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def load() -> list[float]:
    """The load averages over 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]
