"""Entry point of the command line `hf-earlyexit`: its verbs and its error messages.

Verbs read arguments and files, call the package and print; each group of verbs is a module of this folder. Modules
that need torch are imported inside the verbs, after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from hf_earlyexit.cli import calibrate, evaluate, generate, speed
from hf_earlyexit.cli.arguments import Verb, add_debug
from hf_earlyexit.common.failures import INTERRUPTED, REFUSED, as_program, is_users, one_line
from hf_earlyexit.common.machine import environment
from hf_earlyexit.common.version import __version__


PROGRAM = "hf-earlyexit"
DESCRIPTION = "Early-exit text generation for Hugging Face Transformers: easy tokens leave the decoder early."
ENV = "Print versions and hardware, to be pasted into a bug report."
ENV_EXAMPLE = """\
example:
  hf-earlyexit env
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    An error that the user can correct is one line on stderr and exit code 2.

    Args:
        argv: The arguments; None: those of this process, which is then set up as the program.
    """
    debug = False
    try:
        if argv is None:
            as_program()
        arguments = build_parser().parse_args(argv)
        debug = arguments.debug
        code = arguments.verb(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not is_users(error):
            raise
        if debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        return REFUSED


class Parser(argparse.ArgumentParser):
    """A parser that raises `ValueError`, so that its errors are reported like all others."""

    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    add_debug(parser, default=False)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_to(verbs)
    return parser


# --- env ------------------------------------------------------------------------------------------------------------


def env(arguments: argparse.Namespace) -> int:
    """The verb `env`."""
    facts = environment()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")
    return 0


VERBS = (
    *generate.VERBS,
    *calibrate.VERBS,
    *evaluate.VERBS,
    *speed.VERBS,
    Verb("env", env, "versions and hardware, for bug reports", ENV, ENV_EXAMPLE),
)
