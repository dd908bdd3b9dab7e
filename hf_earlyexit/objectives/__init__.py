"""Answers for what exits are trained towards: one objective a file, each a frozen dataclass.

An objective sees what the exit points say of a labelled batch (`LabelledExits`), never the trainer.
"""

from hf_earlyexit.objectives.exit_classifiers import ExitClassifiers, GeometricClassifiers, RelaxedClassifiers
from hf_earlyexit.objectives.layer_skip import LayerSkip
from hf_earlyexit.objectives.multi_exit import MultiExit
from hf_earlyexit.objectives.objective import Objective
from hf_earlyexit.objectives.self_distillation import SelfDistillation
from hf_earlyexit.objectives.shallow_deep import ShallowDeep
from hf_earlyexit.objectives.sorted_depths import SortedDepths


OBJECTIVES: dict[str, type[Objective]] = {
    "multi_exit": MultiExit,
    "layer_skip": LayerSkip,
    "sorted": SortedDepths,
    "shallow_deep": ShallowDeep,
    "self_distillation": SelfDistillation,
    "classifiers": ExitClassifiers,
    "geometric_classifiers": GeometricClassifiers,
    "relaxed_classifiers": RelaxedClassifiers,
}

__all__ = [
    "OBJECTIVES",
    "ExitClassifiers",
    "GeometricClassifiers",
    "LayerSkip",
    "MultiExit",
    "Objective",
    "RelaxedClassifiers",
    "SelfDistillation",
    "ShallowDeep",
    "SortedDepths",
]
