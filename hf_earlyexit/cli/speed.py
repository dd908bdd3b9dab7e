"""The verbs `roofline`, which breaks down decoding time, and `tune`, which chooses exit points."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hf_earlyexit.cli.arguments import Verb, check_device, check_file, load_model, model_path, positive, text_of
from hf_earlyexit.cli.data import PREFIX, add_part_argument, add_partition_arguments, partition_of
from hf_earlyexit.common.failures import reading
from hf_earlyexit.common.json_text import read_json
from hf_earlyexit.common.output_files import refuse_overwriting, write_text
from hf_earlyexit.reports import speed_tables


if TYPE_CHECKING:
    from hf_earlyexit.speed.recorded_exits import RecordedExits
    from hf_earlyexit.speed.time_model import TimeModel


SHAPE = {"layers": 12, "d_model": 768, "d_ff": None, "vocabulary": 32128}
HEAD_WIDTH = 64
ROOFLINE = """\
Where a decoder's time goes, per token: bytes and FLOPs of each part, the least time that this machine could take for
them, and the time it takes. Tokens leave where recorded ones left (--exits), all at one layer (--depth), or run all
layers. Sources are random; so are weights if a shape is given instead of a model. The encoder is not looked at.
"""
ROOFLINE_EXAMPLE = """\
example:
  hf-earlyexit roofline --depth 2
  hf-earlyexit roofline my-exits --exits exits.json --batch 8 --json-out roofline.json
  hf-earlyexit roofline --layers 12 --d-model 768 --d-ff 2048 --vocabulary 8000 --batch 8
"""
TUNE = """\
Which exit points to ask at on this machine: times a model's layers, heads and questions, walks recorded exits in
thought through every set of exit points, and names the fastest, or says that early exit does not pay here. Exits
should be recorded with all exit points asked, as `hf-earlyexit generate --output-file` does; those of the shipped
model come with it. Predicted is the decoder in `generate`, without the encoder, as if tokens could still leave where
they could: in truth a token that leaves later changes those after it, so measure what is chosen.
"""
TUNE_EXAMPLE = """\
example:
  hf-earlyexit tune --batch 8
  hf-earlyexit tune my-exits --exits outputs.jsonl --criterion softmax --json-out tuning.json
"""


def add_speed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `roofline` and `tune` share."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or Hub id of a T5 (the shipped one)")
    walked = parser.add_argument_group("what is walked")
    walked.add_argument("--exits", metavar="FILE", help="recorded exits: JSON or JSON lines with layers_run")
    walked.add_argument("--criterion", metavar="NAME", help="what is asked at exit points (what --exits says)")
    walked.add_argument(
        "--exit-layers", type=positive, nargs="+", metavar="LAYER", help="where --exits was asked (what it says)"
    )
    walked.add_argument("--batch", type=positive, default=1, metavar="N", help="texts at once (1)")
    walked.add_argument("--source", type=positive, default=64, metavar="N", help="tokens of each source (64)")
    walked.add_argument("--new-tokens", type=positive, default=48, metavar="N", help="tokens of each timed text (48)")
    machine = parser.add_argument_group("measuring")
    machine.add_argument("--threads", type=positive, default=1, metavar="N", help="of torch (1)")
    machine.add_argument("--device", default="cpu", help="as for torch: cpu, cuda, cuda:1 (cpu)")
    machine.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    machine.add_argument("--prepared", action="store_true", help="on weights prepared for generation (the library's)")
    machine.add_argument("--rounds", type=positive, default=5, metavar="N", help="how often all is timed (5)")
    machine.add_argument("--json-out", metavar="FILE", help="where to write everything as JSON (nowhere)")


def check_speed_arguments(arguments: argparse.Namespace) -> None:
    """Refuse invalid arguments before a model is loaded."""
    check_file("--json-out", arguments.json_out)
    read = [arguments.exits, vars(arguments).get("time_model"), model_path(arguments)]
    refuse_overwriting({"--json-out": arguments.json_out}, read)
    check_device(arguments.device)
    from hf_earlyexit.exits.criteria import CRITERIA

    known = [name for name in CRITERIA if name != "fixed"]
    if arguments.criterion not in (None, *known):
        raise ValueError(f"--criterion must be one of {known}, got {arguments.criterion!r}")


def prepared_if_asked(arguments: argparse.Namespace, model):
    """The model, with a prepared copy of its weights if `--prepared` or `--compiled` was given."""
    return model.prepare_for_generation() if arguments.prepared or vars(arguments).get("compiled") else model


def check_criterion(criterion: str | None, model) -> None:
    """Refuse the criterion `classifier` for a model without exit classifiers."""
    if criterion == "classifier" and model.early_exit.classifier is None:
        raise ValueError("--criterion classifier: this model has no exit classifiers: train some, or name another")


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write all results as JSON if a path was given."""
    if path is not None:
        write_text(path, json.dumps(values, indent=1) + "\n")


def measured_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """The conditions that times depend on: CPU, load, and the measuring arguments."""
    from hf_earlyexit.common.machine import cpu_model, load

    names = ("batch", "source", "new_tokens", "threads", "device", "dtype", "prepared", "rounds")
    return {"cpu": cpu_model(), "load": load(), **{name: getattr(arguments, name) for name in names}}


# --- roofline -------------------------------------------------------------------------------------------------------


def add_roofline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `roofline`."""
    add_speed_arguments(parser)
    parser.add_argument("--depth", type=positive, metavar="LAYER", help="every token leaves after this layer")
    parser.add_argument(
        "--compiled", action="store_true", help="prepared, and on compiled regions: minutes to begin with"
    )
    shape = parser.add_argument_group("a shape instead of a model: gated T5, heads of 64, random weights")
    shape.add_argument("--layers", type=positive, metavar="N", help="of the decoder (12)")
    shape.add_argument("--d-model", type=positive, metavar="N", help="a multiple of 64 (768)")
    shape.add_argument("--d-ff", type=positive, metavar="N", help="(8/3 of d_model)")
    shape.add_argument("--vocabulary", type=positive, metavar="N", help="(32128)")


def roofline(arguments: argparse.Namespace) -> int:
    """The verb `roofline`."""
    check_roofline_arguments(arguments)
    from hf_earlyexit.kernels.compiling import CompileOptions
    from hf_earlyexit.speed.recorded_exits import read_exits
    from hf_earlyexit.speed.timed_walk import measure_roofline
    from hf_earlyexit.speed.timing import threads

    recorded = read_exits(arguments.exits) if arguments.exits else None
    model = shaped_model(arguments) if has_shape(arguments) else prepared_if_asked(arguments, load_model(arguments))
    walked, criterion = exits_to_walk(arguments, recorded, model)
    check_criterion(criterion, model)
    sizes = {"batch_size": arguments.batch, "source": arguments.source, "new_tokens": arguments.new_tokens}
    with threads(arguments.threads), progress(arguments.rounds) as bar:
        found, rates, mean_layers = measure_roofline(
            model,
            walked.layers_run,
            walked.exit_layers,
            criterion,
            **sizes,
            rounds=arguments.rounds,
            compiling=CompileOptions.usual() if arguments.compiled else None,
            after_round=bar.update,
        )
    print(speed_tables.describe_rates(rates))
    print(f"Per token, {mean_layers:.2f} of {model.config.num_decoder_layers} layers on average:\n")
    print(speed_tables.roofline_table(found))
    print(f"\n{speed_tables.verdict(found)}")
    setting = {"exit_layers": list(walked.exit_layers), "criterion": criterion, "mean_layers": mean_layers}
    parts = [{**asdict(part), "binds": part.binds} for part in found.parts]
    result = {"fraction": found.fraction, "timers": found.timers, "largest_loss": found.largest_loss.name}
    write_json(
        arguments.json_out,
        {
            **measured_on(arguments),
            "compiled": arguments.compiled,
            **setting,
            "rates": asdict(rates),
            "parts": parts,
            **result,
        },
    )
    return 0


def check_roofline_arguments(arguments: argparse.Namespace) -> None:
    """Refuse arguments that contradict each other."""
    check_speed_arguments(arguments)
    if arguments.exits and arguments.depth:
        raise ValueError("--depth does not go with --exits, which says where each token leaves: leave one out")
    if arguments.exit_layers and not arguments.exits:
        raise ValueError("--exit-layers says where --exits was asked: it needs --exits")
    if arguments.model and has_shape(arguments):
        raise ValueError("a shape (--layers, --d-model, --d-ff, --vocabulary) does not go with a model: leave one out")
    if (arguments.d_model or HEAD_WIDTH) % HEAD_WIDTH:
        raise ValueError(f"--d-model {arguments.d_model} must be a multiple of {HEAD_WIDTH}, the width of a head")


def has_shape(arguments: argparse.Namespace) -> bool:
    """Whether a shape was given."""
    return any(getattr(arguments, name) is not None for name in SHAPE)


def shaped_model(arguments: argparse.Namespace):
    """A model of the given shape with random weights. Its encoder has one layer and is not run."""
    import torch

    from hf_earlyexit.exits.config import ClassifierConfig, EarlyExitConfig
    from hf_earlyexit.families.t5.configuration import EarlyExitT5Config
    from hf_earlyexit.families.t5.modeling import EarlyExitT5ForConditionalGeneration

    shape = {name: getattr(arguments, name) or value for name, value in SHAPE.items()}
    d_model = shape["d_model"]
    config = EarlyExitT5Config(
        d_model=d_model,
        d_kv=HEAD_WIDTH,
        num_heads=d_model // HEAD_WIDTH,
        d_ff=shape["d_ff"] or d_model * 8 // 3,
        num_layers=1,
        num_decoder_layers=shape["layers"],
        vocab_size=shape["vocabulary"],
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        early_exit=EarlyExitConfig(classifier=ClassifierConfig()).to_dict(),
    )
    torch.manual_seed(0)
    model = EarlyExitT5ForConditionalGeneration(config).eval()
    return prepared_if_asked(arguments, model.to(arguments.device, getattr(torch, arguments.dtype)))


def exits_to_walk(
    arguments: argparse.Namespace, recorded: RecordedExits | None, model
) -> tuple[RecordedExits, str | None]:
    """The exits to walk and the criterion evaluated at them.

    Exits are as recorded, or all after layer `--depth`, or none, where every token runs all layers.
    """
    from hf_earlyexit.speed.recorded_exits import RecordedExits

    depth, points = model.config.num_decoder_layers, model.early_exit.exit_layers
    if recorded is None:
        leave = arguments.depth or depth
        if leave not in (*points, depth):
            raise ValueError(f"--depth {leave}: this model's exit points are {[*points, depth]}")
        asked = tuple({leave} - {depth})
        return RecordedExits([[leave]], depth, asked), arguments.criterion if asked else None
    asked = tuple(arguments.exit_layers or recorded.exit_layers or points)
    recorded.check_against(depth, asked)
    check_asked(asked, model)
    check_recorded_criterion(arguments, recorded)
    return RecordedExits(recorded.layers_run, depth, asked), arguments.criterion or recorded.criterion


def check_recorded_criterion(arguments: argparse.Namespace, recorded: RecordedExits) -> None:
    """Refuse exits recorded with a criterion that cannot be timed (fixed, or a custom one) if no other is given."""
    from hf_earlyexit.exits.criteria import CRITERIA

    known = [None, *(name for name in CRITERIA if name != "fixed")]
    if arguments.criterion is None and recorded.criterion not in known:
        raise ValueError(f"--exits {arguments.exits} was recorded with {recorded.criterion!r}: name a --criterion")


def check_asked(asked: Sequence[int], model) -> None:
    """Refuse layers that are not exit points of the model."""
    if foreign := sorted(set(asked) - set(model.early_exit.exit_layers)):
        raise ValueError(
            f"--exit-layers has {foreign}, which are no exit points of this model: it has "
            f"{list(model.early_exit.exit_layers)}"
        )


def progress(total: int):
    """A progress bar on stderr if that is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc="timing", unit="round", disable=None, leave=False)


# --- tune -----------------------------------------------------------------------------------------------------------


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tune`."""
    add_speed_arguments(parser)
    parser.add_argument("--batch-exit", choices=("row", "batch"), default="row", help="who leaves together (row)")
    parser.add_argument("--time-model", metavar="FILE", help="take times from what --json-out wrote: measure nothing")
    recorded = parser.add_argument_group("recorded exits, where --exits says of which inputs they are")
    recorded.add_argument(
        "--prefix", type=text_of, metavar="TEXT", help="that was put before each input (what --exits says)"
    )
    recorded.add_argument("--group-by", metavar="NAME", help="field that says which inputs belong together")
    add_part_argument(recorded)
    add_partition_arguments(recorded)


def tune(arguments: argparse.Namespace) -> int:
    """The verb `tune`."""
    check_speed_arguments(arguments)
    if arguments.model and not arguments.exits:
        raise ValueError("--exits is needed: record them with `hf-earlyexit generate --output-file`")
    for name in ("prefix", "group_by"):
        if getattr(arguments, name) is not None and not arguments.exits:
            raise ValueError(f"--{name.replace('_', '-')} goes with --exits: the shipped exits name their inputs")
    from hf_earlyexit.families.shipped import CHECKPOINT
    from hf_earlyexit.speed.recorded_exits import read_exits
    from hf_earlyexit.speed.tuning import tune

    partition = partition_of(arguments)

    def reads(record: dict[str, Any]) -> bool:
        return partition.part_of(unit_of_record(record, arguments)) in arguments.part

    recorded = read_exits(arguments.exits or CHECKPOINT / "exits.json", reads=reads)
    model = prepared_if_asked(arguments, load_model(arguments))
    walked, criterion = exits_to_walk(arguments, recorded, model)
    check_criterion(criterion, model)
    time_model = time_model_of(arguments, criterion, model)
    sizes = {"batch_size": arguments.batch, "rule": arguments.batch_exit}
    found = tune(time_model, walked.layers_run, walked.exit_layers, walked.num_layers, **sizes)
    print(speed_tables.describe_time_model(time_model, arguments.threads))
    print(f"\n{speed_tables.tuning_table(found)}\n\n{speed_tables.answer(found)}")
    ranking = [{**asdict(choice), "ratio": found.ratio(choice)} for choice in found.ranking]
    best = None if found.best is None else list(found.best.exit_layers)
    outcome = {"time_model": time_model.to_dict(), "full_depth": asdict(found.full_depth), "ranking": ranking}
    write_json(arguments.json_out, {**measured_on(arguments), "best": best, "margin": found.margin, **outcome})
    return 0


def unit_of_record(record: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The unit of a record in the partition: its input with the prefix, or its group, as in the other verbs.

    Raises:
        ValueError: The record lacks the group's field, was recorded with another prefix than `--prefix`, or has an
            input that begins with the prefix already.
    """
    known, column = record.get(PREFIX, ""), arguments.group_by
    if arguments.prefix is not None and PREFIX in record and arguments.prefix != known:
        raise ValueError(f"--prefix {arguments.prefix!r}: --exits says it was {known!r}: leave it out")
    if column is not None and record.get(column) in (None, ""):
        raise ValueError(f"--group-by {column}: a record of --exits has no such field, but {sorted(record)}")
    prefix = known if arguments.prefix is None else arguments.prefix
    if column is None and prefix and PREFIX not in record and record["input"].startswith(prefix):
        raise ValueError(f"--prefix {prefix!r}: inputs of --exits begin with it already: leave it out")
    return f"{prefix}{record['input'] if column is None else record[column]}"


def time_model_of(arguments: argparse.Namespace, criterion: str | None, model) -> TimeModel:
    """The time model: read from `--time-model`, or measured now."""
    if arguments.time_model:
        return read_time_model(arguments, criterion)
    if criterion is None:
        raise ValueError("--criterion is needed, since --exits does not name its criterion")
    from hf_earlyexit.speed.time_model import measure_time_model, rounds_in_all
    from hf_earlyexit.speed.timing import threads

    sizes = {"batch_size": arguments.batch, "source": arguments.source, "new_tokens": arguments.new_tokens}
    rounds = rounds_in_all(arguments.batch, arguments.rounds)
    with threads(arguments.threads), progress(rounds) as bar:
        return measure_time_model(model, criterion, **sizes, rounds=arguments.rounds, after_round=bar.update)


def read_time_model(arguments: argparse.Namespace, criterion: str | None) -> TimeModel:
    """Read the time model from a file of `tune --json-out`.

    The file's measuring conditions overwrite those in `arguments`.

    Raises:
        ValueError: The file has no time model, or one for another criterion or for fewer rows.
    """
    from hf_earlyexit.speed.time_model import TimeModel

    path = arguments.time_model
    stored = read_json(path)
    if not isinstance(stored, dict) or not isinstance(stored.get("time_model"), dict):
        raise ValueError(f"--time-model {path} has no `time_model`: name a file of `hf-earlyexit tune --json-out`")
    with reading(path, "its time model"):
        time_model = TimeModel.from_dict(stored["time_model"])
    if arguments.batch > max(time_model.rows):
        raise ValueError(f"--batch {arguments.batch}: {path} was measured up to {max(time_model.rows)} rows: again")
    for name in ("source", "threads", "device", "dtype", "prepared", "rounds"):
        setattr(arguments, name, stored.get(name, getattr(arguments, name)))  # printed times depend on these
    if criterion not in (None, time_model.criterion):
        raise ValueError(f"--time-model {path} is of {time_model.criterion}, not of {criterion}: measure again")
    return time_model


VERBS = (
    Verb("roofline", roofline, "say where time goes", ROOFLINE, ROOFLINE_EXAMPLE, add_roofline_arguments),
    Verb("tune", tune, "choose where to ask", TUNE, TUNE_EXAMPLE, add_tune_arguments),
)
