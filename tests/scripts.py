"""Scripts run as from a shell, in this process: a process of its own spends ten seconds on imports."""

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


SCRIPTS = Path(__file__).parent.parent / "scripts"


@dataclass
class Ran:
    """What `subprocess.run` would return of a script."""

    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *arguments: str, cwd: Path) -> Ran:
    """`python scripts/<name> <arguments>` in folder `cwd`: the script's `__main__`, its exit status and its output.

    Random numbers start as in a new process and go on afterwards as if there had been no script. What depends on a
    fresh interpreter (several processes, variables that libraries read when they are imported) is for `subprocess`.
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
