"""Training objectives of exits: one per file, each a frozen dataclass.

An objective sees the outputs of the exit points on a labelled batch (`TeacherForcedExits`), never the trainer.
"""

from hf_earlyexit.training.objectives.exit_classifiers import ExitClassifiers, GeometricClassifiers, RelaxedClassifiers
from hf_earlyexit.training.objectives.layer_skip import LayerSkip
from hf_earlyexit.training.objectives.multi_exit import MultiExit
from hf_earlyexit.training.objectives.objective import Objective
from hf_earlyexit.training.objectives.self_distillation import SelfDistillation
from hf_earlyexit.training.objectives.shallow_deep import ShallowDeep
from hf_earlyexit.training.objectives.sorted_depths import SortedDepths


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
