"""Helpers that call the command line in tests."""

from __future__ import annotations

from hf_earlyexit.cli.main import main


def errors_of(arguments, capsys) -> str:
    """The one-line error of a refused call, which must leave stdout empty and exit with code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notices, line = captured.err.splitlines()
    assert not any("Traceback" in notice for notice in notices)
    assert line.startswith("hf-earlyexit: error: ")
    return line
