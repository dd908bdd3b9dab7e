"""The model card of trained exits: its contents, and the absence of anything not measured."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from hf_earlyexit import ClassifierConfig, EarlyExitConfig
from hf_earlyexit.training.model_card import TrainedExits, exit_table, make_card, markdown_table


MEASURED = {
    "before_exit_6_loss": 1.5,
    "before_rougeL": 0.678,
    "after_rougeL": 0.671,
    "after_exit_2_loss": 2.5,
    "after_exit_2_precision": float("nan"),
    "after_exit_4_precision": 0.75,
    "after_exit_6_loss": 1.6,
    "always_2_rougeL": 0.5,
}


def card(classifier: ClassifierConfig | None = None, **metrics: float) -> str:
    exits = EarlyExitConfig((2, 4), "shared", classifier).for_layers(6)
    trained = TrainedExits("exits", "some/exits", exits, 6, metrics, "By hand.", "It describes.")
    return str(make_card(trained, ModelCardData(license="apache-2.0", tags=["own"], datasets="e2e_nlg")))


def test_what_would_end_a_cell_is_escaped():
    assert markdown_table(["a|b"], [["c"]]) == "| a\\|b |\n| --- |\n| c |"


def test_the_card_has_what_was_measured():
    text = card(**MEASURED)
    assert "after layer 2, 4 of 6" in text and "It describes." in text and text.endswith("By hand.")
    assert "| loss, nats per token | 1.500 | 1.600 |" in text and "| ROUGE-L | 67.80 | 67.10 |" in text
    assert "| left after | loss | classifier: precision | ROUGE-L, always leaving here |" in text
    assert [line for line in text.splitlines() if line[:4] in ("| 2 ", "| 4 ", "| 6 ")] == [
        "| 2 | 2.500 |  | 50.00 |",
        "| 4 |  | 0.750 |  |",
        "| 6 | 1.600 |  |  |",
    ]


def test_what_was_not_measured_is_left_out():
    text = card(train_loss=3.0)
    assert "## What" not in text and "3.0" not in text
    assert exit_table({}, (1, 2)) == ""


def test_the_head_and_the_snippet_are_good():
    data = ModelCard(card(**MEASURED)).data
    assert (data.library_name, data.license, data.datasets) == ("hf_earlyexit", "apache-2.0", "e2e_nlg")
    assert data.tags == ["early-exit", "own", "t5"]
    for classifier, criterion in ((ClassifierConfig(trained=True), "classifier"), (ClassifierConfig(), "softmax")):
        (code,) = card(classifier).split("```python\n")[1].split("```")[:1]
        compile(code, "snippet", "exec")
        assert f'exit_criterion="{criterion}"' in code and 'from_pretrained("some/exits")' in code
