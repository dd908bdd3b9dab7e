"""The command line as its tests call it."""

from __future__ import annotations

from hf_earlyexit.cli import main


def errors_of(arguments, capsys) -> str:
    """The one line that a refused call writes; nothing goes to stdout."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notices, line = captured.err.splitlines()
    assert not any("Traceback" in notice for notice in notices)
    assert line.startswith("hf-earlyexit: error: ")
    return line
