"""Shared parts of the command-line verbs: exit settings, argument types and checks, model loading."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_earlyexit.common.failures import reading
from hf_earlyexit.common.json_text import parse_json, read_json


EXIT_SETTINGS = (
    "exit_criterion",
    "exit_threshold",
    "exit_layers",
    "exit_layer",
    "exit_candidates",
    "exit_schedule",
    "batch_exit",
    "fill",
)


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        name: The name typed on the command line.
        run: Runs the verb and returns the exit code.
        summary: One line for the list of verbs.
        description: First text of the verb's help; the help ends with the example.
        example: Starts with `example:`.
        add_arguments: Adds the verb's arguments to its parser.
    """

    name: str
    run: Callable[[argparse.Namespace], int]
    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def add_to(self, verbs) -> None:
        """Add the verb's parser to the subparsers `verbs`."""
        style = argparse.RawDescriptionHelpFormatter
        texts = {"help": self.summary, "description": self.description, "epilog": self.example}
        parser = verbs.add_parser(self.name, formatter_class=style, **texts)
        parser.set_defaults(verb=self.run)
        self.add_arguments(parser)
        add_debug(parser, default=argparse.SUPPRESS)


def add_debug(parser: argparse.ArgumentParser, default: bool | str) -> None:
    """Add `--debug`, which is accepted before and after the verb.

    Verbs pass `default=argparse.SUPPRESS`, so that they do not overwrite a `--debug` given before the verb.
    """
    text = "show where in the code an error comes from"
    parser.add_argument("--debug", action="store_true", default=default, help=text)


def text_of(argument: str) -> str:
    """Type of an argument that is text, not a file name: must be encodable as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!a} is not UTF-8") from error
    return argument


def add_exit_settings(parser, criterion: str, threshold: str, layers: str) -> None:
    """Add the exit settings of `demo` and `generate`; the parameters are the defaults that the help shows."""
    parser.add_argument(
        "--exit-criterion",
        "--criterion",
        metavar="NAME",
        help=f"softmax, max_prob, entropy, state, classifier, patience or fixed ({criterion})",
    )
    parser.add_argument(
        "--exit-threshold",
        "--threshold",
        type=float,
        metavar="X",
        help=f"confidence in [0, 1] from which a token leaves ({threshold})",
    )
    parser.add_argument(
        "--exit-layers", type=positive, nargs="+", metavar="LAYER", help=f"exit points that are asked ({layers})"
    )
    parser.add_argument("--exit-layer", type=positive, metavar="LAYER", help="with fixed: the layer to exit after")
    parser.add_argument(
        "--exit-candidates",
        type=positive,
        metavar="N",
        help="with softmax, max_prob, entropy or patience: tokens scored after the first exit point (the vocabulary)",
    )
    parser.add_argument("--batch-exit", metavar="RULE", help="row, batch or batch_joint (row)")
    parser.add_argument(
        "--fill", metavar="WHEN", help="missing keys and values: lazy or eager (eager with CUDA graphs, else lazy)"
    )


def positive(text: str) -> int:
    """Type of an argument that is an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def schedule(text: str) -> str | dict[str, Any]:
    """Type of a schedule: its name, or a JSON object such as `{"name": "calm", "tau": 4}`."""
    return parse_json(text, "it") if text.startswith("{") else text


def exit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given exit settings as keywords of `generate`."""
    given = {name: getattr(arguments, name, None) for name in EXIT_SETTINGS}
    if getattr(arguments, "no_early_exit", False):
        given["early_exit"] = False
    return {name: value for name, value in given.items() if value is not None}


def add_model_arguments(parser) -> None:
    """Add the model, its device and its dtype."""
    parser.add_argument("--model", metavar="PATH_OR_ID", help="an early-exit or plain T5 (the shipped one)")
    parser.add_argument("--device", default="cpu", help="as for torch: cpu, cuda, cuda:1 (cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")


def add_curve_argument(parser) -> None:
    """Add `--curve`, which `curves_of` reads."""
    parser.add_argument(
        "--curve",
        nargs="+",
        action="append",
        metavar=("NAME", "THRESHOLD"),
        help="a criterion, or softmax:2,4 to ask at some exits only, and thresholds; repeatable (the known criteria)",
    )


def check_device(name: str) -> None:
    """Raise `ValueError` for a device that torch cannot use on this machine."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def model_path(arguments: argparse.Namespace) -> str | Path:
    """Path or Hub id of the model: `--model`, or the shipped checkpoint."""
    from hf_earlyexit.families.shipped import CHECKPOINT

    return arguments.model or CHECKPOINT


def check_settings_files(path: str | Path) -> None:
    """Check that `config.json` and `generation_config.json` of a model folder hold JSON objects, where they exist.

    Transformers ignores some of these files silently when they are broken.

    Raises:
        ValueError: A file is not a JSON object. The message names the file and, for a syntax error, the line.
    """
    for name in ("config.json", "generation_config.json"):
        if (file := Path(path) / name).is_file() and not isinstance(read_json(file), dict):
            raise ValueError(f"{file}: a JSON object is expected")


def load_model(arguments: argparse.Namespace):
    """The model in eval mode, on the device and in the dtype given."""
    import torch

    from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration

    path = model_path(arguments)
    check_settings_files(path)
    with reading(path, "the model"):
        model = EarlyExitT5ForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
    return model.to(arguments.device).eval()


def load(arguments: argparse.Namespace):
    """The model in eval mode, and its tokenizer."""
    model = load_model(arguments)
    from hf_earlyexit.common.tokenizer import load_tokenizer

    return model, load_tokenizer(model_path(arguments), model.config)


def source_cut(arguments: argparse.Namespace, model) -> int | None:
    """Maximum number of source tokens: the given value, else the certified one; None: inputs are not truncated.

    A value taken from the certificate, or one that differs from it, is reported on stderr.
    """
    given, certificate = arguments.max_source_tokens, model.exit_certificate
    if certificate is None or not certificate.certified:
        return given
    certified = certificate.data["max_source_tokens"]
    if given is None and certified is not None:
        print(f"as certified, inputs are cut to {certified} tokens: see --max-source-tokens", file=sys.stderr)
        return certified
    if given != certified:
        print(
            f"not as certified: --max-source-tokens {given} (certified: {certified or 'inputs uncut'})",
            file=sys.stderr,
        )
    return given


def rows_at_once(arguments: argparse.Namespace, model, usual: int) -> int:
    """Inputs per batch: the given number, else the certified one, else `usual`."""
    certificate = model.exit_certificate
    certified = certificate.generation["batch_size"] if certificate is not None and certificate.certified else None
    return arguments.batch_size or certified or usual


def check_file(flag: str, path: str | None) -> None:
    """Check before any work that an output file can be written: its folder exists, and it is not a folder."""
    if path is None:
        return
    check_folder(flag, str(Path(path).absolute().parent))
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it")


def check_folder(flag: str, path: str) -> None:
    """Check before any work that an output folder exists."""
    if not Path(path).is_dir():
        raise ValueError(f"{flag}: there is no folder {path} to write to")


def check_new_folder(flag: str, path: str) -> None:
    """Check before any work that an output folder can be created."""
    check_folder(flag, str(Path(path).absolute().parent))
    if Path(path).is_file():
        raise ValueError(f"{flag} {path} is a file: name a folder")


def curves_of(given: list[list[str]] | None) -> dict[str, tuple[float, ...]] | None:
    """`--curve` as thresholds by curve. Thresholds of a curve that is given several times are joined."""
    curves: dict[str, tuple[float, ...]] = {}
    try:
        for name, *thresholds in given or []:
            curves[name] = (*curves.get(name, ()), *map(float, thresholds))
    except ValueError as error:
        raise ValueError(f"--curve takes a name and thresholds: {error}") from error
    return curves or None
