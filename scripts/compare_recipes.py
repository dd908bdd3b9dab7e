"""Compare recipes for exits on one task: the same plain checkpoint, the same rows, the same number of steps.

Every recipe starts from the given plain checkpoint, trains on the same batches, and is evaluated in the same way:
quality at full depth before and after, quality at half of the layers, and the area under the curve of quality over
time, all with 95 % intervals over inputs, and the cost of training. Recipes that lose are listed like the others. When
the command is repeated, finished recipes are read back.

    python scripts/compare_recipes.py --model plain --train_file train.csv --validation_file validation.csv \\
        --prefix "describe: " --exit_layers 2 4 6 --max_steps 150 --output_dir recipes --table recipes.md

Quality is ROUGE-L (best of an input's references). Settings are thresholds of the top-two gap, from no exits to
exiting always at the first exit point. Quality at half of the layers is interpolated linearly in layers between the
two nearest settings. The area is the mean, over times from half of stock's time to all of it, of the best quality
among settings measured to take no longer (0 if there is none): one text at a time, on one CPU thread. Every recipe is
one run with one seed; the intervals do not include variation over seeds. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe_table import summarize, table
from recipes import RECIPES, Recipe
from text_pairs import DataArguments, HelpFormatter, check_data, partition_of, read_texts, tokenize
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_earlyexit import EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.data import Example
from hf_earlyexit.common.extras import require
from hf_earlyexit.common.failures import refusals
from hf_earlyexit.common.machine import environment, load
from hf_earlyexit.common.output_files import refuse_folder_of_model, refuse_overwriting, write_text
from hf_earlyexit.common.tokenizer import load_tokenizer
from hf_earlyexit.evaluation.grid import Grid
from hf_earlyexit.evaluation.model_evaluation import evaluate_model
from hf_earlyexit.families.t5.configuration import early_exit_config
from hf_earlyexit.training.lora import add_lora, merge_lora
from hf_earlyexit.training.shortcuts import fit_shortcuts
from hf_earlyexit.training.trainer import EarlyExitTrainer


BEFORE = "logit lens"  # the recipe without training
NOT_OF_THE_BUDGET = ("recipes", "beside", "table")
THRESHOLDS = (0.9, 0.6, 0.3, 0.0)


@dataclass
class ComparisonArguments:
    """The recipes that are compared, and their budget."""

    model: str = field(metadata={"help": "a plain T5 checkpoint: a folder or a Hub id"})
    output_dir: str = field(metadata={"help": "folder of results, one for each recipe"})
    table: str | None = field(default=None, metadata={"help": "Markdown file to write"})
    recipes: list[str] = field(default_factory=lambda: list(RECIPES), metadata={"help": "names of recipes"})
    beside: list[str] = field(default_factory=list, metadata={"help": "early-exit checkpoints to judge likewise"})
    exit_layers: list[int] = field(default_factory=lambda: [2, 4, 6], metadata={"help": "layers with an exit point"})
    max_steps: int = field(default=150, metadata={"help": "of each recipe that trains"})
    batch_size: int = field(default=48, metadata={"help": "rows of a step"})
    learning_rate: float = field(default=5e-4, metadata={"help": "falls linearly after 10 % of warm-up"})
    bf16: bool = field(default=False, metadata={"help": "train in mixed precision"})
    inputs: int = field(default=150, metadata={"help": "distinct validation inputs to evaluate on"})
    rounds: int = field(default=15, metadata={"help": "texts that each setting is timed on"})
    seed: int = field(default=0, metadata={"help": "of the order of rows and of dropout"})


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate every unfinished recipe; the last line printed is JSON."""
    parser = HfArgumentParser((ComparisonArguments, DataArguments), description=__doc__, formatter_class=HelpFormatter)
    arguments, data = parser.parse_args_into_dataclasses(argv)
    with refusals(parser.prog):
        check_recipes(arguments)
        check_data(data)
        models = [arguments.model, *arguments.beside]
        refuse_folder_of_model("--output_dir", arguments.output_dir, models)
        refuse_overwriting({"--table": arguments.table}, [data.train_file, data.validation_file, *models])
        texts = read_texts(data)
        comparison = Comparison(arguments, data, texts.train, texts.validation)
    results = {name: comparison.of_recipe(name) for name in arguments.recipes}
    results |= {Path(path).name: comparison.of_checkpoint(path) for path in arguments.beside}
    text = table(results, comparison.of_recipe(BEFORE), comparison.budget)
    print(text)
    if arguments.table:
        write_text(arguments.table, text + "\n")
    print(json.dumps({"output_dir": arguments.output_dir, "recipes": results}))


def check_recipes(arguments: ComparisonArguments) -> None:
    """Refuse unknown or repeated recipes, too small budgets, and missing exit points or packages."""
    if unknown := sorted(set(arguments.recipes) - set(RECIPES)):
        raise ValueError(f"--recipes has {unknown}; there are {list(RECIPES)}.")
    for name in ("max_steps", "batch_size", "inputs"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(arguments, name)}.")
    if arguments.rounds < 2:
        raise ValueError(f"--rounds must be at least 2, got {arguments.rounds}.")
    names = [*arguments.recipes, *(Path(path).name for path in arguments.beside)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--recipes and --beside have {repeated} twice: results go by name.")
    require("scipy.stats", "calibrate")
    for name in arguments.recipes:
        layer = RECIPES[name].asks_at
        if layer not in (None, *arguments.exit_layers):
            raise ValueError(f"--exit_layers must have {layer} for the recipe {name!r}, got {arguments.exit_layers}.")


class Comparison:
    """One task and one budget, under which recipes are run one after the other.

    Args:
        arguments: The recipes and the budget.
        data: How texts are read and cut.
        train_pairs: Inputs and targets.
        examples: Distinct validation inputs, in random order. The first `inputs` are for the final evaluation, the
            next 32 for evaluations during training.
    """

    def __init__(
        self,
        arguments: ComparisonArguments,
        data: DataArguments,
        train_pairs: list[tuple[str, str]],
        examples: list[Example],
    ):
        self.arguments, self.data, self.folder = arguments, data, Path(arguments.output_dir)
        config, _ = early_exit_config(arguments.model, None, {})
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(arguments.model, config)
        needed = arguments.max_steps * arguments.batch_size
        self.train_rows = tokenize(self.tokenizer, train_pairs, data).shuffle(seed=arguments.seed)
        self.train_rows = self.train_rows.select(range(min(needed, len(self.train_rows))))
        self.judged = examples[: arguments.inputs]
        watched = [(one.source, one.references[0]) for one in examples[arguments.inputs :][:32] or self.judged]
        self.watched_rows = tokenize(self.tokenizer, watched, data)

    @property
    def budget(self) -> str:
        """The budget in words."""
        asked = self.arguments
        return (
            f"{asked.max_steps} steps of {asked.batch_size} rows, exit points {asked.exit_layers}, "
            f"{len(self.judged)} inputs, {asked.rounds} texts timed per setting"
        )

    def of_recipe(self, name: str) -> dict[str, Any]:
        """Result of a recipe; read back if it was already run under this budget."""
        return self._once(name, repr(RECIPES[name]), lambda: self._try_recipe(name, RECIPES[name]))

    def of_checkpoint(self, path: str) -> dict[str, Any]:
        """Result of an early-exit checkpoint, evaluated at the same exit points, whatever its training cost."""
        return self._once(Path(path).name, path, lambda: self._try_checkpoint(path))

    def _once(self, name: str, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        file = self.folder / f"{name.replace(' ', '_').replace(',', '')}.json"
        asked = {**vars(self.arguments), **vars(self.data), "recipe": what}
        asked = json.loads(json.dumps({key: asked[key] for key in asked if key not in NOT_OF_THE_BUDGET}))
        if file.exists():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["asked"] == asked:
                return found
            print(f"{file} was made under another budget: it is made anew.", file=sys.stderr)
        print(f"--- {name}", file=sys.stderr)
        found = {"asked": asked, **make()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found) + "\n")
        return found

    def _try_recipe(self, name: str, recipe: Recipe) -> dict[str, Any]:
        set_seed(self.arguments.seed)
        exits = EarlyExitConfig(tuple(self.arguments.exit_layers), recipe.heads)
        model = EarlyExitT5ForConditionalGeneration.from_pretrained(
            self.arguments.model, early_exit=exits, dtype=torch.float32
        ).eval()
        cost = self.train(model, recipe, self.folder / "runs" / name)
        layers = self.arguments.exit_layers if recipe.asks_at is None else [recipe.asks_at]
        return {"source": recipe.source, "cost": cost, **self.evaluate(model, layers)}

    def _try_checkpoint(self, path: str) -> dict[str, Any]:
        model = EarlyExitT5ForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        return {"source": path, "cost": None, **self.evaluate(model, self.arguments.exit_layers)}

    def evaluate(self, model: EarlyExitT5ForConditionalGeneration, layers: Sequence[int]) -> dict[str, Any]:
        """Quality, area and points of a model at the exit points `layers`, and the machine they were measured on."""
        curve = f"softmax:{','.join(map(str, layers))}"
        grid = Grid({curve: THRESHOLDS}, (1,), ("row",), self.arguments.rounds)
        generation = {"max_new_tokens": self.data.max_target_tokens}
        cut = {"max_source_tokens": self.data.max_source_tokens}
        read = {"parts": self.data.validation_parts, "partition": partition_of(self.data)}
        model = model.to("cpu").eval()  # times of one text are compared on the CPU, wherever the model was trained
        results = evaluate_model(model, self.tokenizer, self.judged, grid, generation=generation, **cut, **read)
        return {**summarize(results, curve), "environment": environment(), "load": load()}

    def train(self, model: EarlyExitT5ForConditionalGeneration, recipe: Recipe, folder: Path) -> dict[str, Any]:
        """Train, and return the cost: CPU seconds, with two small evaluations, and number of trained parameters."""
        start, moved = time.process_time(), 0
        collate = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        if recipe.shortcuts:
            size = self.arguments.batch_size
            fit_shortcuts(model, DataLoader(self.train_rows, batch_size=size, collate_fn=collate))
            moved = sum(head.map.weight.numel() for head in model.exit_heads.heads.values())
        if recipe.lora_rank is not None:
            add_lora(model, recipe.lora_rank)
        if recipe.objective is not None:
            moving = (one for name, one in model.named_parameters() if recipe.objective.moves(name))
            moved = sum(one.numel() for one in moving if one.requires_grad)
            trainer = EarlyExitTrainer(
                model,
                self._training_arguments(recipe, folder),
                objective=recipe.objective,
                train_dataset=self.train_rows,
                eval_dataset=self.watched_rows,
                data_collator=collate,
            )
            trainer.train()
        if recipe.lora_rank is not None:
            merge_lora(model)
        return {"cpu_seconds": time.process_time() - start, "moved_parameters": moved}

    def _training_arguments(self, recipe: Recipe, folder: Path) -> Seq2SeqTrainingArguments:
        asked = self.arguments
        return Seq2SeqTrainingArguments(
            output_dir=str(folder),
            max_steps=asked.max_steps,
            per_device_train_batch_size=asked.batch_size,
            learning_rate=asked.learning_rate * recipe.learning_rate,
            warmup_steps=asked.max_steps // 10,
            bf16=asked.bf16,
            seed=asked.seed,
            train_sampling_strategy="group_by_length",
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )


if __name__ == "__main__":
    main()
