"""What the objectives and the exit report make of a batch, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.exit_report import COUNTS, CountExits, summarize
from hf_earlyexit.labelled import LabelledExits
from hf_earlyexit.objectives import OBJECTIVES, ExitClassifiers, MultiExit, linear_weights, uniform_weights


# Two exit points, after 1 and 3 of 4 layers; hidden states are the logits of a vocabulary of two.
LAYERS = (1, 3)
EVEN, SURE, WRONG = [0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]
HALF, THREE_QUARTERS, QUARTER = math.log(2), math.log(4 / 3), math.log(4)  # losses of probabilities 1/2, 3/4, 1/4


def labelled(after_1, after_3, last, labels, classifier_logits=None) -> LabelledExits:
    """A batch of one row."""
    unused = torch.full((1, len(labels), 2), float("nan"))
    states = [unused, torch.tensor([after_1]), unused, torch.tensor([after_3]), unused]
    return LabelledExits(
        LAYERS,
        states,
        torch.tensor([last]),
        torch.tensor([labels]),
        score=lambda layer, hidden: hidden,
        classify=lambda layer, hidden: torch.tensor(classifier_logits[layer]),
    )


def test_weights():
    assert linear_weights((1, 3, 4)) == [1 / 8, 3 / 8, 4 / 8]
    assert uniform_weights((1, 3, 4)) == [1 / 3] * 3


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (MultiExit("linear"), (1 / 8, 3 / 8, 4 / 8)),
        (MultiExit("uniform"), (1 / 3, 1 / 3, 1 / 3)),
        (MultiExit("linear", last_again=True), (1 / 8, 3 / 8, 12 / 8)),
    ],
)
def test_multi_exit_by_hand(objective, weights):
    """Token 0 has the losses ln 2, ln 4/3, ln 4 at the exits and the last layer; token 1 is not labelled."""
    exits = labelled([EVEN, SURE], [SURE, SURE], [WRONG, SURE], [0, -100])
    expected = sum(weight * loss for weight, loss in zip(weights, (HALF, THREE_QUARTERS, QUARTER)))
    torch.testing.assert_close(objective.token_losses(exits), torch.tensor([expected]))


def test_distillation_by_hand():
    """Towards a last layer that gives the label 1/4; the exits give it 1/2 and 3/4."""
    exits = labelled([EVEN], [SURE], [WRONG], [0])
    taught = (HALF, 1 / 4 * THREE_QUARTERS + 3 / 4 * QUARTER)
    for share in (0.25, 1.0):
        losses = [(1 - share) * label + share * soft for label, soft in zip((HALF, THREE_QUARTERS), taught)]
        expected = losses[0] / 8 + 3 * losses[1] / 8 + 4 * QUARTER / 8
        found = MultiExit("linear", distillation=share).token_losses(exits)
        torch.testing.assert_close(found, torch.tensor([expected]))


def test_the_last_layer_does_not_learn_from_its_exits():
    last = torch.tensor([[WRONG]], requires_grad=True)
    states = [torch.zeros(1, 1, 2), torch.tensor([[SURE]]), torch.zeros(1, 1, 2)]
    exits = LabelledExits((1,), states, last, torch.tensor([[0]]), lambda layer, hidden: hidden, None)
    MultiExit("uniform", distillation=1.0).token_losses(exits).sum().backward()
    torch.testing.assert_close(last.grad, torch.tensor([[[1 / 4 - 1, 3 / 4]]]) / 2)


@pytest.mark.parametrize(
    ("balanced", "agrees", "differs"), [(False, (1, 1), (1, 1)), (True, (0.25, 0.6), (0.75, 0.4))]
)
def test_classifiers_by_hand(balanced, agrees, differs):
    """Of two tokens the first agrees with the last layer at both exits, the second only at layer 3. The classifiers
    say 3/4 and 1/2 at layer 1, 1/2 and 1/4 at layer 3."""
    exits = labelled(
        [SURE, WRONG], [SURE, SURE], [SURE, SURE], [1, 1], {1: [math.log(3), 0.0], 3: [0.0, -math.log(3)]}
    )
    objective = ExitClassifiers(balanced).prepared({1: 0.75, 3: 0.4})
    first = (agrees[0] * THREE_QUARTERS + agrees[1] * HALF) / 2
    second = (differs[0] * HALF + agrees[1] * QUARTER) / 2
    torch.testing.assert_close(objective.token_losses(exits), torch.tensor([first, second]))


def test_each_objective_moves_its_own():
    names = ["shared.weight", "exit_heads.heads.1.norm.weight", "exit_heads.classifiers.shared.output.weight"]
    assert [MultiExit().moves(name) for name in names] == [True, True, False]
    assert [ExitClassifiers().moves(name) for name in names] == [False, False, True]
    assert {name: one().trains_classifiers for name, one in OBJECTIVES.items()} == {
        "multi_exit": False,
        "classifiers": True,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("cubic",), "weights.*'cubic'"), (("linear", 1), "last_again.*1"), (("linear", True, 2), "distillation.*2")],
)
def test_what_is_no_multi_exit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiExit(*arguments)


def test_losses_of_half_precisions_are_in_fp32():
    exits = labelled([EVEN], [SURE], [WRONG], [0])
    exits = LabelledExits(
        LAYERS,
        [exits.hidden(1)[None].bfloat16()] * 5,
        torch.tensor([[WRONG]]).bfloat16(),
        torch.tensor([[0]]),
        lambda layer, hidden: hidden,
        None,
    )
    for objective in (MultiExit(), MultiExit(distillation=0.5)):
        assert objective.token_losses(exits).dtype == torch.float32


def test_classifiers_need_some_to_train():
    with pytest.raises(ValueError, match="no exit classifiers.*ClassifierConfig"):
        ExitClassifiers().check(EarlyExitConfig(LAYERS))


def test_exit_report_by_hand():
    """Four labelled tokens: at layer 1 two agree with the last layer, two are right, and the classifier lets three
    leave, of which two agree. At layer 3 all agree and none may leave."""
    config = EarlyExitConfig(LAYERS, "shared", ClassifierConfig()).for_layers(4)
    after_1 = [SURE, SURE, WRONG, WRONG]
    exits = labelled(after_1, [SURE] * 4, [SURE] * 4, [0, 1, 1, 0], {1: [1.0, 1.0, 1.0, -1.0], 3: [-1.0] * 4})
    counts = CountExits(config)(exits)
    assert counts.shape == (1, 3, len(COUNTS))
    report = summarize(counts.sum(dim=0), config, num_layers=4)
    loss = (THREE_QUARTERS + QUARTER + THREE_QUARTERS + QUARTER) / 4
    assert report["exit_1_loss"] == pytest.approx(loss)
    assert (report["exit_1_accuracy"], report["exit_1_agreement"]) == (0.5, 0.5)
    assert (report["exit_1_precision"], report["exit_1_recall"]) == (pytest.approx(2 / 3), 1.0)
    assert report["exit_1_f1_stay"] == pytest.approx(2 / 3)  # one rightly stays, one wrongly leaves
    assert (report["exit_3_agreement"], report["exit_3_recall"]) == (1.0, 0.0)
    assert math.isnan(report["exit_3_precision"]) and report["exit_4_accuracy"] == 0.5
    assert "exit_4_agreement" not in report


def test_counts_stay_in_their_rows():
    config = EarlyExitConfig(LAYERS).for_layers(4)
    states = torch.randn(5, 3, 4, 2)
    labels = torch.tensor([[0, 1, -100, -100], [1, 1, 0, 1], [-100] * 4])
    exits = LabelledExits(LAYERS, list(states), states[4], labels, lambda layer, hidden: hidden, None)
    counts = CountExits(config)(exits)
    assert counts[:, 0, 0].tolist() == [2, 4, 0] and counts[2].abs().sum() == 0
    assert not any("precision" in name for name in summarize(counts.sum(dim=0), config, 4))
