"""Answers for the command line `hf-earlyexit`: its verbs, and how their errors look.

Verbs read arguments and files, call the package and write lines; they are in the files `cli_*.py`. Whatever
needs torch is imported inside the verbs, after the arguments have been read.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from hf_earlyexit import __version__, cli_calibrate, cli_evaluate, cli_generate, cli_speed
from hf_earlyexit.cli_arguments import Verb, add_debug
from hf_earlyexit.failures import INTERRUPTED, REFUSED, as_program, is_users, one_line
from hf_earlyexit.machine import environment


PROGRAM = "hf-earlyexit"
DESCRIPTION = "Early-exit text generation for Hugging Face Transformers: easy tokens leave the decoder early."
ENV = "Print versions and hardware, to be pasted into a bug report."
ENV_EXAMPLE = """\
example:
  hf-earlyexit env
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. What the user can put right is one line on stderr and code 2.

    Args:
        argv: The arguments. None: those of this process, which then is the program.
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
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
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
    """A parser whose errors are reported like all others."""

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
    *cli_generate.VERBS,
    *cli_calibrate.VERBS,
    *cli_evaluate.VERBS,
    *cli_speed.VERBS,
    Verb("env", env, "versions and hardware, for bug reports", ENV, ENV_EXAMPLE),
)
