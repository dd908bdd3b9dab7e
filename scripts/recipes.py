"""The recipes that `compare_recipes.py` compares: objective, kind of exit heads, evaluated exit points."""

from __future__ import annotations

from dataclasses import dataclass

from hf_earlyexit.training.objectives import (
    LayerSkip,
    MultiExit,
    Objective,
    SelfDistillation,
    ShallowDeep,
    SortedDepths,
)


@dataclass(frozen=True)
class Recipe:
    """One way to make exits of a plain checkpoint.

    Attributes:
        objective: The training objective; None: nothing is trained.
        source: The publication.
        heads: Kind of the exit heads.
        learning_rate: Factor on the run's learning rate; heads alone tolerate a higher rate than a whole model.
        lora_rank: Train low-rank adapters of this rank in place of the blocks' weights, and merge them at the end;
            None: train the weights.
        shortcuts: Fit the heads by least squares first.
        asks_at: The only exit point to evaluate, if the objective does not train the others; None: all.
    """

    objective: Objective | None
    source: str
    heads: str = "shared"
    learning_rate: float = 1.0
    lora_rank: int | None = None
    shortcuts: bool = False
    asks_at: int | None = None


SHALLOW = 4
DISTILLED = MultiExit("uniform", last_again=True, distillation=0.5)
RECIPES: dict[str, Recipe] = {
    "logit lens": Recipe(None, "none"),
    "least-squares shortcuts": Recipe(None, "arXiv 2303.09435", "shortcut", shortcuts=True),
    "last layer only": Recipe(SortedDepths(()), "plain fine-tuning, for comparison"),
    "multi-exit, linear": Recipe(MultiExit("linear"), "CALM, arXiv 2207.07061"),
    "multi-exit, last again, distilled": Recipe(DISTILLED, "DEED, arXiv 2311.08623, with distillation"),
    "LayerSkip, rotational": Recipe(LayerSkip(1.0, "rotational", 2), "arXiv 2404.16710"),
    "LayerSkip, gradual, layer dropout": Recipe(LayerSkip(1.0, "gradual", max_layer_dropout=0.1), "arXiv 2404.16710"),
    "sorted": Recipe(SortedDepths(), "arXiv 2309.08968"),
    "shallow-deep": Recipe(ShallowDeep(SHALLOW), "FREE, arXiv 2310.05424", asks_at=SHALLOW),
    "self-distillation, frozen": Recipe(
        SelfDistillation("kl"), "arXiv 2407.21082; Kangaroo, arXiv 2404.18911", "mlp", learning_rate=3.0
    ),
    "self-distillation of shortcuts": Recipe(
        SelfDistillation("kl"), "both", "shortcut", learning_rate=3.0, shortcuts=True
    ),
    "multi-exit, LoRA": Recipe(DISTILLED, "LoRA, arXiv 2106.09685", lora_rank=16, learning_rate=3.0),
}
