"""Answers for the recipes that `compare_recipes.py` compares: an objective, the heads it wants, where it is asked."""

from __future__ import annotations

from dataclasses import dataclass

from hf_earlyexit.objectives import LayerSkip, MultiExit, Objective, SelfDistillation, ShallowDeep, SortedDepths


@dataclass(frozen=True)
class Recipe:
    """One way to make exits of a plain checkpoint.

    Attributes:
        objective: None: nothing is trained.
        source: Where it was published.
        heads: Kind of the exit heads.
        learning_rate: Times the run's; heads alone bear more than a whole model.
        lora_rank: Train low-rank adapters in place of the blocks' weights, and fold them in at the end; None: do not.
        shortcuts: Fit the heads by least squares first.
        asks_at: The one exit point to ask at, where the others learn nothing; None: all.
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
