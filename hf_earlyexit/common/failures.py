"""How programs fail: one line on stderr and an exit code.

Errors that the user can fix are `ValueError`, `OSError`, `ImportError`, and out-of-memory errors. Every other error is
a bug in the program and keeps its traceback.
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
    """Whether the user can fix the error."""
    return isinstance(error, (ValueError, OSError, ImportError)) or _is_out_of_memory(error)


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
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
    """Wrap a library call that reads user files, and turn its errors on broken files into a ValueError.

    Raises:
        ValueError: The library raised an error that does not name the file.
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
    """Wrap the checks before a script's work: an error that the user can fix becomes one line and exit code 2."""
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
    """Make an interrupt end this process at once, and let output streams accept every character.

    No cleanup is needed: files replace their targets when complete, and journals are written line by line. Without
    this, a library that is being imported, or called back from C, would print a traceback of a `KeyboardInterrupt` or
    continue. Interrupts that are already ignored, or handled otherwise, stay so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
