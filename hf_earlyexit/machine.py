"""Answers for where something ran: versions and hardware, for bug reports and beside every measured time."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path


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
    """The machine and what is installed on it."""
    import torch

    from hf_earlyexit import __version__

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
    """Its version, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def load() -> list[float]:
    """The load averages over 1, 5 and 15 minutes."""
    return [round(one, 2) for one in os.getloadavg()]
