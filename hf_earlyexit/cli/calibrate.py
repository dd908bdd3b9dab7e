"""The verbs `calibrate`, which makes a certificate, and `verify-certificate`, which tests one on new inputs."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from hf_earlyexit.cli.arguments import (
    Verb,
    add_curve_argument,
    add_model_arguments,
    check_device,
    check_file,
    check_new_folder,
    curves_of,
    load,
    model_path,
    positive,
    schedule,
)
from hf_earlyexit.cli.data import add_data_arguments, add_partition_arguments, data_name, partition_of, read_examples
from hf_earlyexit.common.json_text import read_json
from hf_earlyexit.common.output_files import folder_written_whole, refuse_folder_of_model, refuse_overwriting
from hf_earlyexit.reports import terminal


CALIBRATE = """\
Find the fastest setting of a model whose quality loss on inputs to come is shown to be at most a target, and save the
checkpoint with that setting and its certificate. Inputs are split by a hash: the select part says what is tested and
in which order, on the calibrate part it is tested, on the report part the result is reported; the explore part is for
looking around before. Where nothing passes it is full depth.
"""
CALIBRATE_EXAMPLE = """\
example:
  hf-earlyexit calibrate --loss rougeL_drop --target 0.02 --output-dir certified
  hf-earlyexit calibrate --model my-exits --file validation.jsonl --source-column document --target-column summary \\
      --group-by document --loss text_distance --target 0.2 --curve softmax:2,4 0.9 0.7 0.5 --output-dir certified
"""
VERIFY = """\
Compute the risk of a certified setting anew, on inputs that its certificate has not seen; those that it was chosen or
tested on are left out. The exit code is 1 if the promise is refuted for inputs like these.
"""
VERIFY_EXAMPLE = """\
example:
  hf-earlyexit verify-certificate --model certified --file new.csv --group-by mr --prefix "describe: "
"""

# Files for resuming training, most of them pickled. They are not copied along with a checkpoint.
LEFT_BEHIND = ("checkpoint-*", "training_args.bin", "trainer_state.json", "*.pt", "*.pth")


# --- calibrate ------------------------------------------------------------------------------------------------------


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `calibrate`."""
    add_model_arguments(parser.add_argument_group("model"))
    inputs = parser.add_argument_group("inputs")
    add_data_arguments(inputs)
    add_partition_arguments(inputs)
    add_promise_arguments(parser.add_argument_group("promise"))
    add_use_arguments(parser.add_argument_group("use, all of which the promise is about"))
    add_search_arguments(parser.add_argument_group("search"))
    files = parser.add_argument_group("files")
    files.add_argument("--output-dir", required=True, metavar="FOLDER", help="checkpoint, setting and certificate")
    files.add_argument("--journal", metavar="FILE", help="what is done so far, to go on from (FOLDER.journal)")
    files.add_argument("--losses", metavar="FILE", help="CSV to write the losses of the calibrate part to")


def add_promise_arguments(group) -> None:
    """Add the fields of a `RiskTarget`."""
    group.add_argument("--target", type=float, required=True, metavar="X", help="the mean loss is at most this")
    group.add_argument("--loss", default="text_distance", metavar="NAME", help="what is lost (text_distance)")
    group.add_argument("--delta", type=float, default=0.1, metavar="X", help="probability that it fails (0.1)")
    group.add_argument("--method", choices=("ltt", "ucb", "crc"), default="ltt", help="(ltt)")
    group.add_argument("--bound", choices=("wsr", "hb", "clopper_pearson", "hoeffding"), default="wsr", help="(wsr)")


def add_use_arguments(group) -> None:
    """Add the fields of a `DeploymentSettings`."""
    group.add_argument("--batch-size", type=positive, default=1, metavar="N", help="inputs at once (1)")
    group.add_argument("--batch-exit", metavar="RULE", help="row, batch or batch_joint (row)")
    group.add_argument(
        "--exit-candidates",
        type=positive,
        metavar="N",
        help="where a criterion looks at the vocabulary: tokens scored after the first exit point (all)",
    )
    group.add_argument("--exit-schedule", type=schedule, metavar="NAME", help="constant, calm, calm_released, or JSON")
    group.add_argument("--max-new-tokens", type=positive, metavar="N", help="tokens per text at most (the model's)")
    group.add_argument("--num-beams", type=positive, metavar="N", help="beams; 1 is greedy (the model's)")
    group.add_argument("--max-source-tokens", type=positive, metavar="N", help="longer inputs are cut (never)")
    group.add_argument(
        "--implementations",
        nargs="+",
        metavar="WAY",
        help="plain, prepared, compiled: the first is measured, the others must agree (plain)",
    )


def add_search_arguments(group) -> None:
    """Add the fields of a `Search`."""
    add_curve_argument(group)
    group.add_argument("--order", choices=("pareto", "threshold"), default="pareto", help="of the tests (pareto)")
    group.add_argument(
        "--finalists", type=positive, default=1, metavar="N", help="with threshold: curves that are tested (1)"
    )
    group.add_argument(
        "--starts", type=positive, default=1, metavar="N", help="settings that tests begin from, which share delta (1)"
    )
    group.add_argument("--cost", choices=("time", "layers"), default="time", help="what is to be low (time)")
    group.add_argument("--rounds", type=positive, default=31, metavar="N", help="batches to time each setting on (31)")


def calibrate(arguments: argparse.Namespace) -> int:
    """The verb `calibrate`."""
    journal = arguments.journal or f"{os.path.abspath(arguments.output_dir)}.journal"
    check_new_folder("--output-dir", arguments.output_dir)
    outputs = {"--journal": journal, "--losses": arguments.losses}
    for flag, path in outputs.items():
        check_file(flag, path)
    refuse_overwriting(outputs, [arguments.file, model_path(arguments)])
    refuse_folder_of_model("--output-dir", arguments.output_dir, [model_path(arguments)])
    check_device(arguments.device)
    from hf_earlyexit.calibration.ledger import Ledger
    from hf_earlyexit.calibration.model_calibration import DeploymentSettings, calibrate_model
    from hf_earlyexit.calibration.risk_target import RiskTarget
    from hf_earlyexit.calibration.search import Search

    promise = RiskTarget(arguments.target, arguments.loss, arguments.delta, arguments.method, arguments.bound)
    cut, ways = arguments.max_source_tokens, arguments.implementations
    use = DeploymentSettings(arguments.batch_size, exits_of(arguments), decoding_of(arguments), cut, ways)
    search = Search(
        curves_of(arguments.curve),
        arguments.order,
        arguments.finalists,
        arguments.starts,
        arguments.cost,
        arguments.rounds,
        partition=partition_of(arguments),
    )
    examples = read_examples(arguments, search.partition, unique=True)
    model, tokenizer = load(arguments)
    ledger = Ledger(*ledger_folders(arguments))
    named = {"path": journal, "data_name": data_name(arguments)}
    found = calibrate_model(model, tokenizer, examples, promise, use, search, **named, ledger=ledger)
    save(model, tokenizer, found.certificate, arguments)
    ledger.write()
    if arguments.losses:
        found.tables["calibrate"].save(arguments.losses)
    print(describe(found.certificate))
    print(f"\nSaved: {arguments.output_dir} (the checkpoint, its setting and its certificate)")
    return 0


def ledger_folders(arguments: argparse.Namespace) -> list[str]:
    """Folders whose ledgers count calibration attempts: the model's folder, if it is local, and the output folder.

    The package's own folder is never written.
    """
    own = [arguments.model] if arguments.model and Path(arguments.model).is_dir() else []
    return [*own, arguments.output_dir]


def exits_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given exit settings that all candidates share."""
    given = {name: getattr(arguments, name) for name in ("batch_exit", "exit_candidates", "exit_schedule")}
    return {name: value for name, value in given.items() if value is not None}


def decoding_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given decoding options as keywords of `generate`."""
    given = {name: getattr(arguments, name) for name in ("max_new_tokens", "num_beams")}
    return {name: value for name, value in given.items() if value is not None}


def save(model, tokenizer, certificate, arguments: argparse.Namespace) -> None:
    """Write the checkpoint with its certificate.

    The files of a local early-exit checkpoint are copied unchanged, except for the config, the generation config and
    the certificate. Any other model is saved anew. A model card among the files gets the section with the promise.
    """
    from hf_earlyexit.reports.card_sections import PROMISE, WORTH, promise_section, write_section

    model.certify(certificate)
    source = Path(model_path(arguments))
    with folder_written_whole(arguments.output_dir) as folder:
        if not is_early_exit_checkpoint(source):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        model.config.save_pretrained(folder)  # has the certified dtype, in which it will be loaded
        model.generation_config.save_pretrained(folder)
        certificate.save(folder)
        if (card := folder / "README.md").is_file():
            write_section(card, PROMISE, promise_section(certificate))
            write_section(card, WORTH, None)  # was about an earlier certificate


def is_early_exit_checkpoint(folder: Path) -> bool:
    """Whether a folder holds an early-exit checkpoint."""
    config = folder / "config.json"
    values = read_json(config) if config.is_file() else {}
    return isinstance(values, dict) and values.get("model_type") == "early_exit_t5"


def describe(certificate) -> str:
    """The table of tests, and the certificate in words."""
    from hf_earlyexit.reports.card_sections import table_of_tests

    return f"{terminal.table(*table_of_tests(certificate))}\n\n{terminal.paragraph(certificate.in_words(), 110)}"


# --- verify-certificate ---------------------------------------------------------------------------------------------


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify-certificate`."""
    add_model_arguments(parser.add_argument_group("model"))
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="inputs at once (16)")
    parser.add_argument("--journal", metavar="FILE", help="what is done so far, to go on from (none is kept)")
    add_data_arguments(parser.add_argument_group("inputs"))


def verify(arguments: argparse.Namespace) -> int:
    """The verb `verify-certificate`."""
    check_file("--journal", arguments.journal)
    refuse_overwriting({"--journal": arguments.journal}, [arguments.file, model_path(arguments)])
    check_device(arguments.device)
    from hf_earlyexit.calibration.losses import LOSSES
    from hf_earlyexit.calibration.verification import verify_certificate
    from hf_earlyexit.common.partition import Partition

    examples = read_examples(arguments, Partition(), unique=True)
    model, tokenizer = load(arguments)
    if model.exit_certificate is None:
        raise ValueError(f"{model_path(arguments)} has no certificate: make one with `hf-earlyexit calibrate`")
    loss = LOSSES.get(model.exit_certificate.loss["name"])
    if loss is None:
        name = model.exit_certificate.loss["name"]
        raise ValueError(f"the loss {name!r} is your own: use `verify_certificate` in Python")
    found = verify_certificate(
        model, tokenizer, examples, loss, batch_size=arguments.batch_size, path=arguments.journal
    )
    for difference in found.differences:
        print(f"not as certified: {difference}")
    if found.left_out:
        print(f"left out: {found.left_out} inputs that the certificate was chosen or tested on")
    print(terminal.paragraph(found.in_words(), 110))
    return int(found.refuted)


VERBS = (
    Verb(
        "calibrate",
        calibrate,
        "choose a setting with a guarantee",
        CALIBRATE,
        CALIBRATE_EXAMPLE,
        add_calibrate_arguments,
    ),
    Verb(
        "verify-certificate",
        verify,
        "try a certificate on new inputs",
        VERIFY,
        VERIFY_EXAMPLE,
        add_verify_arguments,
    ),
)
