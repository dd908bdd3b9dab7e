"""Runs scripts in this process as from a shell; a new process would spend ten seconds on imports."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch


SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@dataclass
class Ran:
    """Result of a script, as `subprocess.run` would return it."""

    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *arguments: str, cwd: Path) -> Ran:
    """Run `python scripts/<name> <arguments>` in folder `cwd`: execute its `__main__`, return exit status and output.

    The random state is that of a new process inside, and restored afterwards. Tests that depend on a fresh interpreter
    (several processes, variables that libraries read on import) use `subprocess`.
    """
    script, before = SCRIPTS / name, Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    command = [str(script), *arguments]
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", command),
            mock.patch.object(sys, "path", [str(SCRIPTS), *sys.path]),
            torch.random.fork_rng(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            torch.manual_seed(0)
            code = _exit_code(script)
    finally:
        os.chdir(before)
    return Ran(code, out.getvalue(), err.getvalue())


def _exit_code(script: Path) -> int:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0
