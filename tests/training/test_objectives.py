"""Objectives and the exit report on a batch, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.generation.teacher_forced import TeacherForcedExits
from hf_earlyexit.training.exit_report import COUNTS, CountExits, summarize
from hf_earlyexit.training.objectives import (
    OBJECTIVES,
    ExitClassifiers,
    GeometricClassifiers,
    LayerSkip,
    MultiExit,
    RelaxedClassifiers,
    SelfDistillation,
    ShallowDeep,
    SortedDepths,
)
from hf_earlyexit.training.objectives.multi_exit import linear_weights, uniform_weights
from hf_earlyexit.training.objectives.shallow_deep import aligned_errors


# Two exit points, after 1 and 3 of 4 layers; hidden states are the logits of a vocabulary of two.
LAYERS = (1, 3)
EVEN, SURE, WRONG = [0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]
HALF, THREE_QUARTERS, QUARTER = math.log(2), math.log(4 / 3), math.log(4)  # losses of probabilities 1/2, 3/4, 1/4


def labelled(after_1, after_3, last, labels, classifier_logits=None) -> TeacherForcedExits:
    """A batch of one row."""
    unused = torch.full((1, len(labels), 2), float("nan"))
    states = [unused, torch.tensor([after_1]), unused, torch.tensor([after_3]), unused]
    return TeacherForcedExits(
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
    """The last layer gives the label probability 1/4; the exits give it 1/2 and 3/4."""
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
    exits = TeacherForcedExits((1,), states, last, torch.tensor([[0]]), lambda layer, hidden: hidden, None)
    MultiExit("uniform", distillation=1.0).token_losses(exits).sum().backward()
    torch.testing.assert_close(last.grad, torch.tensor([[[1 / 4 - 1, 3 / 4]]]) / 2)


@pytest.mark.parametrize(
    ("balanced", "agrees", "differs"), [(False, (1, 1), (1, 1)), (True, (0.25, 0.6), (0.75, 0.4))]
)
def test_classifiers_by_hand(balanced, agrees, differs):
    """Of two tokens the first agrees with the last layer at both exits, the second only at layer 3.

    The classifiers give 3/4 and 1/2 at layer 1, 1/2 and 1/4 at layer 3.
    """
    exits = labelled(
        [SURE, WRONG], [SURE, SURE], [SURE, SURE], [1, 1], {1: [math.log(3), 0.0], 3: [0.0, -math.log(3)]}
    )
    objective = ExitClassifiers(balanced).prepared({1: 0.75, 3: 0.4})
    first = (agrees[0] * THREE_QUARTERS + agrees[1] * HALF) / 2
    second = (differs[0] * HALF + agrees[1] * QUARTER) / 2
    torch.testing.assert_close(objective.token_losses(exits), torch.tensor([first, second]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_classifier_learns_where_all_agreed_when_shares_were_measured(share):
    """Exact balancing would weight its losses by 0, and it would stay at its random start."""
    exits = labelled([SURE, WRONG], [SURE, SURE], [SURE, SURE], [1, 1], {1: [0.0, 0.0], 3: [0.0, 0.0]})
    losses = ExitClassifiers().prepared({1: share, 3: share}).token_losses(exits)
    torch.testing.assert_close(losses, ExitClassifiers(False).token_losses(exits))


def test_layer_skip_weights_by_hand():
    """For 4 layers, l from 0: weights 0, e, 3e before the last; the last 3 + e * 2 * 3 / 2."""
    assert LayerSkip(0.5, "all").weights((1, 2, 3), 4) == pytest.approx(
        {1: 0.0, 2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5}
    )
    assert LayerSkip(0.0, "all").weights((1, 2, 3), 4) == {1: 0, 2: 0, 3: 0, 4: 1}


def test_layer_skip_by_hand():
    exits = labelled([SURE], [SURE], [WRONG], [0])
    found = LayerSkip(1.0, "all").token_losses(exits)  # the weights of layers 1, 3, 4 are 0, 3, 6
    torch.testing.assert_close(found, torch.tensor([(3 * THREE_QUARTERS + 6 * QUARTER) / 9]))


def test_heads_of_weight_zero_are_not_run():
    """Layer 1 always has weight 0, the others are run only in steps in which the curriculum includes them."""
    asked: list[int] = []

    def score(layer, hidden):
        asked.append(layer)
        return hidden

    states = [torch.zeros(1, 1, 2)] * 5
    exits = TeacherForcedExits((1, 2, 3), states, states[4], torch.tensor([[0]]), score, None)
    LayerSkip(1.0, "rotational", 3).at(2, 9).token_losses(exits)
    LayerSkip(1.0, "all").token_losses(exits)
    assert asked == [3, 2, 3]


def taking_part(objective: LayerSkip, steps: int) -> list[tuple[int, ...]]:
    """The exit points active in each step, of layers 2 to 5 of 6."""
    return [
        tuple(layer for layer, weight in objective.at(step, steps).weights((2, 3, 4, 5), 6).items() if weight)[:-1]
        for step in range(steps)
    ]


def test_curricula_by_hand():
    assert taking_part(LayerSkip(curriculum="rotational", rotation=2), 3) == [(2, 4), (3, 5), (2, 4)]
    assert taking_part(LayerSkip(curriculum="rotational", rotation=3), 4) == [(2, 5), (3,), (4,), (2, 5)]
    # One more layer every 12 / (2 * 6) = 1 step, from the last one down.
    gradual = taking_part(LayerSkip(curriculum="gradual"), 12)
    assert gradual[:5] == [(), (5,), (4, 5), (3, 4, 5), (2, 3, 4, 5)] and set(gradual[5:]) == {(2, 3, 4, 5)}


def test_layer_dropout_by_hand():
    rates = LayerSkip(max_layer_dropout=0.2).layer_dropout(3)
    assert rates == pytest.approx([0, 0.2 * (2**0.5 - 1), 0.2])
    from_scratch = LayerSkip(max_layer_dropout=0.2, dropout_schedule="exponential")
    found = [from_scratch.at(step, 5).layer_dropout(3)[2] for step in (0, 2, 4)]
    assert found == pytest.approx([0, 0.2 * (2**0.5 - 1), 0.2])
    assert LayerSkip().layer_dropout(3) == [] == MultiExit().layer_dropout(3)


def test_sorted_depths_by_hand():
    exits = labelled([EVEN], [SURE], [WRONG], [0])
    losses = {1: HALF, 3: THREE_QUARTERS, 4: QUARTER}
    for depths, layers in ((None, (1, 3, 4)), ((3,), (3, 4)), ((), (4,))):
        expected = sum(losses[layer] for layer in layers) / len(layers)
        torch.testing.assert_close(SortedDepths(depths).token_losses(exits), torch.tensor([expected]))


def test_shallow_deep_by_hand():
    """S = 3 of 4 layers: teachers are layers 1, 3, 4.

    The norm halves hidden states, except the last one, which the library returns after the norm.
    """
    states = torch.tensor([[9.0, 9.0], [2.0, 0.0], [0.0, 4.0], [6.0, 2.0], [0.0, 2.0]])
    norm = lambda hidden: hidden / 2  # noqa: E731
    exits = TeacherForcedExits(
        (1, 3),
        [state.view(1, 1, 2) for state in states],
        torch.tensor([[WRONG]]),
        torch.tensor([[0]]),
        lambda layer, hidden: torch.tensor([SURE]),
        None,
        norm,
    )
    cross = (3 * THREE_QUARTERS + 4 * QUARTER) / 7
    # Students (1, 0), (0, 2), (3, 1) against teachers (1, 0), (3, 1), (0, 2): mean squared differences.
    of_pairs = {"last": 5.0, "uniform": (0 + 5 + 5) / 3, "dynamic": (0 + 2.5) / 2}
    for alignment, distance in of_pairs.items():
        found = ShallowDeep(3, 0.5, alignment).token_losses(exits)
        torch.testing.assert_close(found, torch.tensor([cross + 0.5 * distance]))
    torch.testing.assert_close(ShallowDeep(3, 0.0).token_losses(exits), torch.tensor([cross]))


def test_alignment_is_each_tokens_own_and_descends():
    """Alignment is per token, and student indices decrease from the last teacher down.

    Token 0: the last teacher gets student 2 (from 0), the next one student 1 although 2 has a smaller error, the first
    one student 0. Token 1: the last teacher gets the first student, so none is left for the others.
    """
    first = [[4.0, 9.0, 9.0], [9.0, 2.0, 9.0], [9.0, 0.0, 1.0]]
    second = [[9.0, 9.0, 0.5], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0]]
    found = aligned_errors(torch.tensor([first, second]))
    torch.testing.assert_close(found, torch.tensor([(1.0 + 2.0 + 4.0) / 3, 0.5]))


def test_deep_layers_do_not_learn_from_shallow_ones():
    states = [torch.randn(1, 2, 3, requires_grad=True) for _ in range(5)]
    labels = torch.tensor([[0, 1]])
    for alignment in ("dynamic", "uniform", "last"):
        exits = TeacherForcedExits((2, 3), states, states[4], labels, lambda layer, hidden: hidden, None, torch.tanh)
        alone = torch.autograd.grad(ShallowDeep(2, 0.0, alignment).token_losses(exits).sum(), states[4])[0]
        taught = torch.autograd.grad(ShallowDeep(2, 0.7, alignment).token_losses(exits).sum(), states[4])[0]
        torch.testing.assert_close(taught, alone)


def test_self_distillation_by_hand():
    """The last layer gives 1/4 and 3/4; the exits give token 0 1/2 and 3/4. Labels are not used."""
    taught = (HALF + 1 / 4 * THREE_QUARTERS + 3 / 4 * QUARTER) / 2
    entropy = 1 / 4 * QUARTER + 3 / 4 * THREE_QUARTERS
    expected = {"probabilities": taught, "kl": taught - entropy, "choice": (HALF + QUARTER) / 2}
    for towards, loss in expected.items():
        for label in (0, 1):
            found = SelfDistillation(towards).token_losses(labelled([EVEN], [SURE], [WRONG], [label]))
            torch.testing.assert_close(found, torch.tensor([loss]))


def test_kl_to_a_sure_teacher_is_finite():
    exits = labelled([EVEN], [SURE], [[1e4, 0.0]], [0])
    assert SelfDistillation("kl").token_losses(exits).isfinite().all()


def test_geometric_classifiers_by_hand():
    """Exit probabilities are 3/4 and 1/4. Token 0 agrees at both exits, token 1 at the second one, token 2 at none."""
    exits = labelled(
        [SURE, WRONG, WRONG],
        [SURE, SURE, WRONG],
        [SURE] * 3,
        [1] * 3,
        {1: [math.log(3)] * 3, 3: [-math.log(3)] * 3},
    )
    expected = [3 / 4, 1 / 4 * 1 / 4, 1 / 4 * 3 / 4]
    found = GeometricClassifiers().token_losses(exits)
    torch.testing.assert_close(found, -torch.tensor(expected).log())


def test_relaxed_classifiers_by_hand():
    """Weights are 2/3 and 1/3. Exits choose token 0, the last layer's second choice, accepted from `top_k` 2 on."""
    exits = labelled([SURE], [SURE], [WRONG], [1], {1: [math.log(3)], 3: [0.0]})
    strict, relaxed = (RelaxedClassifiers(top_k).token_losses(exits) for top_k in (1, 2))
    torch.testing.assert_close(strict, torch.tensor([2 / 3 * QUARTER + 1 / 3 * HALF]))
    torch.testing.assert_close(relaxed, torch.tensor([2 / 3 * THREE_QUARTERS + 1 / 3 * HALF]))


def test_each_objective_moves_its_own():
    names = ["shared.weight", "exit_heads.heads.1.norm.weight", "exit_heads.classifiers.shared.output.weight"]
    found = {name: [kind().moves(parameter) for parameter in names] for name, kind in OBJECTIVES.items()}
    whole, classifiers = [True, True, False], [False, False, True]
    assert found == {
        "multi_exit": whole,
        "layer_skip": whole,
        "sorted": whole,
        "shallow_deep": whole,
        "self_distillation": [False, True, False],
        "classifiers": classifiers,
        "geometric_classifiers": classifiers,
        "relaxed_classifiers": classifiers,
    }
    assert {name for name, kind in OBJECTIVES.items() if kind.trains_classifiers} == {
        name for name, moves in found.items() if moves == classifiers
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSkip(e_scale=2), "e_scale.*2"),
        (lambda: LayerSkip(curriculum="steep"), "curriculum.*'steep'"),
        (lambda: LayerSkip(rotation=0), "rotation.*0"),
        (lambda: LayerSkip(max_layer_dropout=-1), "max_layer_dropout.*-1"),
        (lambda: LayerSkip(dropout_schedule="no"), "dropout_schedule.*'no'"),
        (lambda: SortedDepths((3, 2)), "ascend"),
        (lambda: ShallowDeep(0), "shallow.*0"),
        (lambda: ShallowDeep(alpha=-1), "alpha.*-1"),
        (lambda: ShallowDeep(alignment="static"), "alignment.*'static'"),
        (lambda: SelfDistillation("labels"), "towards.*'labels'"),
        (lambda: RelaxedClassifiers(0), "top_k.*0"),
        (lambda: SortedDepths((2, 3)).check(EarlyExitConfig(LAYERS)), r"depths.*\[2\].*\[1, 3\]"),
        (lambda: ShallowDeep(2).check(EarlyExitConfig(LAYERS)), r"shallow=2.*\[1, 3\]"),
        (lambda: ShallowDeep().check(EarlyExitConfig(())), "no exit points"),
        (lambda: SelfDistillation().check(EarlyExitConfig(LAYERS, ("shared", "shared"))), "All exit heads.*'linear'"),
        (lambda: GeometricClassifiers().check(EarlyExitConfig(LAYERS)), "no exit classifiers"),
        (lambda: RelaxedClassifiers().check(EarlyExitConfig(LAYERS)), "no exit classifiers"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("cubic",), "weights.*'cubic'"), (("linear", 1), "last_again.*1"), (("linear", True, 2), "distillation.*2")],
)
def test_what_is_no_multi_exit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiExit(*arguments)


def test_losses_of_half_precisions_are_in_fp32():
    exits = labelled([EVEN], [SURE], [WRONG], [0])
    exits = TeacherForcedExits(
        LAYERS,
        [exits.hidden(1)[None].bfloat16()] * 5,
        torch.tensor([[WRONG]]).bfloat16(),
        torch.tensor([[0]]),
        lambda layer, hidden: hidden,
        None,
    )
    for objective in (MultiExit(), MultiExit(distillation=0.5), LayerSkip(), SelfDistillation("kl")):
        assert objective.token_losses(exits).dtype == torch.float32


def test_classifiers_need_some_to_train():
    with pytest.raises(ValueError, match="no exit classifiers.*ClassifierConfig"):
        ExitClassifiers().check(EarlyExitConfig(LAYERS))


def test_exit_report_by_hand():
    """At layer 1 of four labelled tokens two agree with the last layer and two are right.

    The classifier there lets three tokens exit, of which two agree. At layer 3 all agree and none may exit.
    """
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
    assert report["exit_1_f1_stay"] == pytest.approx(2 / 3)  # one token rightly stays, one wrongly exits
    assert (report["exit_3_agreement"], report["exit_3_recall"]) == (1.0, 0.0)
    assert math.isnan(report["exit_3_precision"]) and report["exit_4_accuracy"] == 0.5
    assert "exit_4_agreement" not in report


def test_counts_stay_in_their_rows():
    config = EarlyExitConfig(LAYERS).for_layers(4)
    states = torch.randn(5, 3, 4, 2)
    labels = torch.tensor([[0, 1, -100, -100], [1, 1, 0, 1], [-100] * 4])
    exits = TeacherForcedExits(LAYERS, list(states), states[4], labels, lambda layer, hidden: hidden, None)
    counts = CountExits(config)(exits)
    assert counts[:, 0, 0].tolist() == [2, 4, 0] and counts[2].abs().sum() == 0
    assert not any("precision" in name for name in summarize(counts.sum(dim=0), config, 4))
