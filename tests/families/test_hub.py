"""Pushing a model to a Hub and loading it by name, each in its own process with its own cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from unittest import mock

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

from hf_earlyexit import ClassifierConfig, EarlyExitConfig, EarlyExitT5ForConditionalGeneration
from hf_earlyexit.common.data import hash_of_input
from hf_earlyexit.common.seen_inputs import FILE
from tests import laws
from tests.families.hub_stub import Hub, running_hub
from tests.tiny import tiny_inputs, tiny_pair


REPO = "someone/repo"
SEEN = ["some input", "another"]
CARD = ModelCard("---\nlicense: apache-2.0\ntags:\n- early-exit\n---\n\nIts tokens leave early.\n")
EXITS = EarlyExitConfig(exit_layers=(1, 2, 4), heads="linear", classifier=ClassifierConfig(shared=False, trained=True))


# --- run in client processes, since the Hub's library reads the address of the Hub on import ------------------------


def push() -> dict:
    """Push a model, its card, and the model again with another threshold."""
    model = trained_looking_model()
    model.record_seen("training", SEEN)
    says = {"first": said_by(model), "full depth": said_by(model, early_exit=False)}
    first = model.push_to_hub(REPO).oid
    with mock.patch.object(type(CARD), "validate"):  # older clients call the real Hub for it
        CARD.push_to_hub(REPO)
    model.generation_config.exit_threshold = 0.9
    model.push_to_hub(REPO)
    return {"says": says | {"last": said_by(model)}, "first commit": first, "weights": weights_of(model)}


def load(first_commit: str) -> dict:
    ours = EarlyExitT5ForConditionalGeneration
    models = {
        "first": ours.from_pretrained(REPO, revision=first_commit),
        "last": ours.from_pretrained(REPO),
        "auto": AutoModelForSeq2SeqLM.from_pretrained(REPO),
        "plain": T5ForConditionalGeneration.from_pretrained(REPO),
    }
    return {
        "says": {name: said_by(model.eval()) for name, model in models.items()},
        "weights": {name: weights_of(model) for name, model in models.items()},
        "classes": {name: type(model).__name__ for name, model in models.items()},
        "seen": {name: sorted(models[name].seen_inputs.by["training"]) for name in ("first", "last", "auto")},
        "card": ModelCard.load(REPO).content,
        "refusal": refusal_of("someone/else"),
    }


@torch.no_grad()
def trained_looking_model() -> EarlyExitT5ForConditionalGeneration:
    """A model with heads other than the logit lens, classifiers marked as trained, and stored exit settings."""
    _, model = tiny_pair("tied", 3, torch.float32, early_exit=EXITS)
    for parameter in model.exit_heads.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.exit_criterion = "classifier"
    model.generation_config.exit_threshold = 0.6
    return model


def said_by(model, **kwargs) -> dict:
    output = laws.generate(model, tiny_inputs(4, 3), **kwargs)
    layers = getattr(output, "layers_run", None)
    return {"tokens": output.sequences.tolist(), "layers_run": None if layers is None else layers.tolist()}


def weights_of(model) -> dict[str, str]:
    """Hashes of all weights, bit by bit."""
    return {name: sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in model.state_dict().items()}


def refusal_of(repo: str) -> str:
    with pytest.raises(OSError) as refusal:
        EarlyExitT5ForConditionalGeneration.from_pretrained(repo)
    return str(refusal.value)


# --- the test -------------------------------------------------------------------------------------------------------


def run_client(hub: Hub, home: Path, call: str) -> dict:
    """The result of a function of this file, run in a new process that can reach only this Hub."""
    code = f"import json; from tests.families import test_hub; print(json.dumps(test_hub.{call}))"
    elsewhere = ("hf_", "huggingface", "transformers_", "http_proxy", "https_proxy", "all_proxy")
    inherited = {name: value for name, value in os.environ.items() if not name.lower().startswith(elsewhere)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=inherited | hub.environment(str(home)) | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
        timeout=300,
    )
    assert run.returncode == 0, f"{run.stderr}\nasked of the Hub: {hub.requests}"
    return json.loads(run.stdout.splitlines()[-1])


def test_a_pushed_model_is_the_model_that_loads(tmp_path):
    """Law 7 through a Hub: by our class, by the Auto class, at an older revision, and at full depth as stock T5."""
    with running_hub() as hub:
        pushed = run_client(hub, tmp_path / "pushing", "push()")
        loaded = run_client(hub, tmp_path / "loading", f"load({pushed['first commit']!r})")
    _, files = hub.commit_of(REPO, "main")
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors", FILE}
    assert files["model.safetensors"].large and list(hub.uploads) == [files["model.safetensors"].oid]
    assert f"GET /{REPO}/resolve/{pushed['first commit']}/model.safetensors" in hub.requests

    says, expected = loaded["says"], pushed["says"]
    assert_exits_matter(expected)
    assert loaded["classes"]["last"] == loaded["classes"]["auto"] == "EarlyExitT5ForConditionalGeneration"
    assert says["first"] == expected["first"]
    assert says["last"] == says["auto"] == expected["last"]
    assert loaded["weights"]["last"] == loaded["weights"]["auto"] == pushed["weights"]
    assert {*map(tuple, loaded["seen"].values())} == {tuple(sorted(map(hash_of_input, SEEN)))}
    assert says["plain"] == {"tokens": expected["full depth"]["tokens"], "layers_run": None}

    assert files["README.md"].content.decode() == loaded["card"] == CARD.content
    assert "someone/else is not a" in loaded["refusal"]


def assert_exits_matter(says: dict) -> None:
    """Tokens exit at three or more layers, and both exits and the threshold change the output."""
    depths = {layer for row in says["first"]["layers_run"] for layer in row} - {0}
    assert len(depths) >= 3
    assert len({json.dumps(one["tokens"]) for one in says.values()}) == len(says)
