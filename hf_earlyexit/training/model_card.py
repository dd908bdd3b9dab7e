"""The model card of trained exits: measurements, usage, and how to reproduce the training.

Every number comes from the log of a run; what was not measured is left out. Independent of trainers and models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from hf_earlyexit.exits.config import EarlyExitConfig


# Columns of the table of exits: metric name and heading.
EXIT_COLUMNS = {
    "after_exit_{}_loss": "loss",
    "after_exit_{}_accuracy": "accuracy",
    "after_exit_{}_agreement": "agrees with the last layer",
    "after_exit_{}_precision": "classifier: precision",
    "after_exit_{}_recall": "recall",
    "always_{}_rougeL": "ROUGE-L, always leaving here",
}
FULL_DEPTH_ROWS = {
    "exit_{}_loss": "loss, nats per token",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
PIPE = r"\|"
HIGHER_BY_100 = ("rouge1", "rouge2", "rougeL")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

A T5 whose tokens may leave the decoder early, after layer {{ exits }} of {{ num_layers }}: for the package
`hf_earlyexit`, which must be imported before the Auto classes know this model.{{ about }}

```python
from transformers import AutoTokenizer
from hf_earlyexit import EarlyExitT5ForConditionalGeneration

model = EarlyExitT5ForConditionalGeneration.from_pretrained("{{ path }}").eval()
tokenizer = AutoTokenizer.from_pretrained("{{ path }}")
batch = tokenizer(["..."], return_tensors="pt")
output = model.generate(**batch, exit_criterion="{{ criterion }}", exit_threshold=0.9, return_dict_in_generate=True)
print(tokenizer.batch_decode(output.sequences, skip_special_tokens=True), output.layers_run)
```

`early_exit=False` runs every layer. `T5ForConditionalGeneration` loads this checkpoint, too, and runs every layer.
{{ results }}
## How it was trained

{{ training }}
"""


@dataclass(frozen=True)
class TrainedExits:
    """The contents of a model card.

    Attributes:
        name: Of the model.
        path: Argument of `from_pretrained`: a Hub id or a folder.
        early_exit: The exit points, fully specified.
        num_layers: Of the decoder.
        metrics: Measurements, by the names in the trainer's log: `before_*` and `after_*` at full depth, each with
            `_exit_2_*`; `always_2_*` where every token exits after layer 2.
        training: How the model was trained and how to reproduce it, as Markdown.
        about: One or more sentences that follow the first one.
    """

    name: str
    path: str
    early_exit: EarlyExitConfig
    num_layers: int
    metrics: Mapping[str, float]
    training: str
    about: str = ""


def make_card(trained: TrainedExits, data: ModelCardData) -> ModelCard:
    """The card of trained exits. `data` is its header: licence, language, data sets."""
    data.library_name, data.pipeline_tag = "hf_earlyexit", data.pipeline_tag or "text-generation"
    data.tags = sorted({"early-exit", "t5", *(data.tags or [])})
    classifier = trained.early_exit.classifier
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=trained.name,
        path=trained.path,
        exits=", ".join(map(str, trained.early_exit.exit_layers)),
        num_layers=trained.num_layers,
        about=f" {trained.about}" if trained.about else "",
        criterion="classifier" if classifier is not None and classifier.trained else "softmax",
        results=results(trained),
        training=trained.training,
    )


def results(trained: TrainedExits) -> str:
    """The tables of measurements, as Markdown; empty if there are none."""
    sections = {
        "What the exits cost full depth": full_depth_table(trained.metrics, trained.num_layers),
        "What each exit is worth": exit_table(trained.metrics, (*trained.early_exit.exit_layers, trained.num_layers)),
    }
    return "".join(f"\n## {title}\n\n{table}\n" for title, table in sections.items() if table)


def full_depth_table(metrics: Mapping[str, float], num_layers: int) -> str:
    """Quality at full depth before and after training; the loss is the last layer's mean over all tokens."""
    named = {name.format(num_layers): title for name, title in FULL_DEPTH_ROWS.items()}
    rows = [
        [title, *(_number(metrics[f"{when}_{name}"], name) for when in ("before", "after"))]
        for name, title in named.items()
        if {f"before_{name}", f"after_{name}"} <= set(metrics)
    ]
    return markdown_table(["full depth", "before", "after"], rows) if rows else ""


def exit_table(metrics: Mapping[str, float], layers: Sequence[int]) -> str:
    """The measurements of each exit; empty columns are left out."""
    columns = {
        key: title for key, title in EXIT_COLUMNS.items() if any(key.format(layer) in metrics for layer in layers)
    }
    rows = [
        [str(layer), *(_number(metrics.get(key.format(layer)), key.rpartition("_")[2]) for key in columns)]
        for layer in layers
    ]
    return markdown_table(["left after", *columns.values()], rows) if columns else ""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; characters that would end a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', PIPE) for cell in line)} |" for line in lines)


def _number(value: float | None, name: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{100 * value:.2f}" if name in HIGHER_BY_100 else f"{value:.3f}"
