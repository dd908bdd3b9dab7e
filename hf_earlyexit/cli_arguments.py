"""Answers for what verbs of the command line share: exit settings, kinds of arguments, the model they name."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_earlyexit.failures import reading
from hf_earlyexit.json_text import parse_json, read_json


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
        name: As it is typed.
        run: What it does; returns the exit code.
        summary: In the list of verbs.
        description: In its help, which ends in the example.
        example: Starts with `example:`.
        add_arguments: What it takes.
    """

    name: str
    run: Callable[[argparse.Namespace], int]
    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def add_to(self, verbs) -> None:
        """Put its parser among those of other verbs."""
        style = argparse.RawDescriptionHelpFormatter
        texts = {"help": self.summary, "description": self.description, "epilog": self.example}
        parser = verbs.add_parser(self.name, formatter_class=style, **texts)
        parser.set_defaults(verb=self.run)
        self.add_arguments(parser)
        add_debug(parser, default=argparse.SUPPRESS)


def add_debug(parser: argparse.ArgumentParser, default: bool | str) -> None:
    """Before the verb or behind it: the verb's default is none, so that it leaves what stands before it."""
    text = "show where in the code an error comes from"
    parser.add_argument("--debug", action="store_true", default=default, help=text)


def text_of(argument: str) -> str:
    """An argument that is read as text, not as the name of a file."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{argument!a} is not UTF-8") from error
    return argument


def add_exit_settings(parser, criterion: str, threshold: str, layers: str) -> None:
    """The exit settings of both verbs, with their defaults for the help."""
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
    parser.add_argument("--exit-layer", type=positive, metavar="LAYER", help="with fixed: the layer to leave at")
    parser.add_argument(
        "--exit-candidates",
        type=positive,
        metavar="N",
        help="with softmax, max_prob, entropy or patience: tokens scored after the first exit point (the vocabulary)",
    )
    parser.add_argument("--batch-exit", metavar="RULE", help="row, batch or batch_joint (row)")
    parser.add_argument("--fill", metavar="WHEN", help="keys and values of skipped layers: lazy or eager (lazy)")


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def schedule(text: str) -> str | dict[str, Any]:
    """A schedule's name, or its JSON object: `{"name": "calm", "tau": 4}`."""
    return parse_json(text, "it") if text.startswith("{") else text


def exit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The exit settings that were given, as keywords of `generate`."""
    given = {name: getattr(arguments, name, None) for name in EXIT_SETTINGS}
    if getattr(arguments, "no_early_exit", False):
        given["early_exit"] = False
    return {name: value for name, value in given.items() if value is not None}


def add_model_arguments(parser) -> None:
    """Which model, where and in which dtype."""
    parser.add_argument("--model", metavar="PATH_OR_ID", help="an early-exit or plain T5 (the shipped one)")
    parser.add_argument("--device", default="cpu", help="as for torch: cpu, cuda, cuda:1 (cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")


def add_curve_argument(parser) -> None:
    """What `curves_of` reads."""
    parser.add_argument(
        "--curve",
        nargs="+",
        action="append",
        metavar=("NAME", "THRESHOLD"),
        help="a criterion, or softmax:2,4 to ask at some exits only, and thresholds; repeatable (the known criteria)",
    )


def check_device(name: str) -> None:
    """Refuse a device that cannot be used here."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def model_path(arguments: argparse.Namespace) -> str | Path:
    """Where the model is: what was asked for, or the shipped one."""
    from hf_earlyexit.default import CHECKPOINT

    return arguments.model or CHECKPOINT


def check_settings_files(path: str | Path) -> None:
    """Refuse files of settings in a model's folder that are no JSON: of some the library takes no notice.

    Raises:
        ValueError: The message has the file and the line.
    """
    for name in ("config.json", "generation_config.json"):
        if (file := Path(path) / name).is_file() and not isinstance(read_json(file), dict):
            raise ValueError(f"{file}: a JSON object is expected")


def load_model(arguments: argparse.Namespace):
    """The model, in eval mode, where it is asked for."""
    import torch

    from hf_earlyexit.models import EarlyExitT5ForConditionalGeneration

    path = model_path(arguments)
    check_settings_files(path)
    with reading(path, "the model"):
        model = EarlyExitT5ForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
    return model.to(arguments.device).eval()


def load(arguments: argparse.Namespace):
    """The model, in eval mode, and its tokenizer."""
    model = load_model(arguments)
    from hf_earlyexit.tokenizer import load_tokenizer

    return model, load_tokenizer(model_path(arguments), model.config)


def source_cut(arguments: argparse.Namespace, model) -> int | None:
    """The tokens that inputs are cut to: what was asked for, else as the model's certificate says; None: they are not.

    What decides it, or departs from the certificate, is said on stderr.
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
    """Inputs in a batch: what was asked for, else as the model's certificate says, else the usual number."""
    certificate = model.exit_certificate
    certified = certificate.generation["batch_size"] if certificate is not None and certificate.certified else None
    return arguments.batch_size or certified or usual


def check_file(flag: str, path: str | None) -> None:
    """Refuse, before any work, a file that cannot be written: no such folder, or a folder itself."""
    if path is None:
        return
    check_folder(flag, str(Path(path).absolute().parent))
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder: name a file in it")


def check_folder(flag: str, path: str) -> None:
    """Refuse, before any work, a folder to write to that is not there."""
    if not Path(path).is_dir():
        raise ValueError(f"{flag}: there is no folder {path} to write to")


def check_new_folder(flag: str, path: str) -> None:
    """Refuse, before any work, a folder that cannot be made."""
    check_folder(flag, str(Path(path).absolute().parent))
    if Path(path).is_file():
        raise ValueError(f"{flag} {path} is a file: name a folder")


def curves_of(given: list[list[str]] | None) -> dict[str, tuple[float, ...]] | None:
    """`--curve` as thresholds by curve; of a curve that is named twice all of them."""
    curves: dict[str, tuple[float, ...]] = {}
    try:
        for name, *thresholds in given or []:
            curves[name] = (*curves.get(name, ()), *map(float, thresholds))
    except ValueError as error:
        raise ValueError(f"--curve takes a name and thresholds: {error}") from error
    return curves or None
