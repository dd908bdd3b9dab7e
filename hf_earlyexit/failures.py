"""Answers for how a program ends that cannot do what it was asked: one line on stderr, and a code.

What the user can put right is a `ValueError`, an `OSError` or an `ImportError`, or memory that is too small. All else
is a fault of the program, and keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


REFUSED, INTERRUPTED = 2, 130
LONGEST = 2000  # characters of a line
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def is_users(error: BaseException) -> bool:
    """Whether the user can put right what went wrong."""
    return isinstance(error, (ValueError, OSError, ImportError)) or _is_out_of_memory(error)


def one_line(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return " ".join(f"{os.fspath(error.filename)}: {error.strerror}".splitlines())
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    if _is_out_of_memory(error):
        return f"out of memory: take smaller batches or shorter inputs ({text or type(error).__name__})"
    return text or type(error).__name__


def _is_out_of_memory(error: BaseException) -> bool:
    is_said = any(words in str(error) for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_said)


@contextmanager
def reading(path: str | Path, what: str) -> Iterator[None]:
    """Files of a user are read by a library inside: whatever it makes of broken ones is said as such.

    Raises:
        ValueError: The library has raised an error that does not name the file.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if _is_out_of_memory(error) or (isinstance(error, ValueError) and str(path) in str(error)):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {what} cannot be read: {kind}{error}") from error


@contextmanager
def refusals(program: str) -> Iterator[None]:
    """Around what a script does before its work begins: what the user can put right is one line and code 2."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_users(error):
            raise
        print(f"{program}: error: {one_line(error)} See --help.", file=sys.stderr)
        sys.exit(REFUSED)


def as_program() -> None:
    """Let an interrupt end this process at once, and let output streams take every character.

    Nothing needs to be put in order: files take their place when they are whole, journals are written line by line.
    Libraries that are being imported, or called back from C, would print a traceback of a `KeyboardInterrupt`, or go
    on. Where the caller of this process ignores interrupts, or handles them, that stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
