"""The command line as a whole: verbs, help, `env`."""

import re
import runpy
import shlex
import sys

import pytest
import torch

import hf_earlyexit
from hf_earlyexit.cli.main import VERBS, build_parser, main
from hf_earlyexit.exits.criteria import BATCH_RULES, CRITERIA, SCHEDULES
from tests.cli.command_line import errors_of


def test_a_verb_is_required(capsys):
    assert "VERB" in errors_of([], capsys)
    assert "invalid choice: 'dmeo'" in errors_of(["dmeo"], capsys)


def test_env_names_versions_and_hardware(capsys):
    assert main(["env"]) == 0
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["hf_earlyexit"] == hf_earlyexit.__version__
    assert facts["torch"] == torch.__version__
    assert facts["torch threads"] == str(torch.get_num_threads())
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cpu"]
    assert {"transformers", "accelerate", "datasets", "evaluate", "rouge-score", "tokenizers"} <= set(facts)
    assert {"platform", "cores", "cuda", "ctranslate2"} <= set(facts)


def test_env_names_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.common.machine.PACKAGES", ("no-such-package",))
    assert main(["env"]) == 0
    assert re.search(r"^no-such-package +not installed$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_help_has_an_example(capsys, verb):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"example:\n  hf-earlyexit {verb}" in capsys.readouterr().out


def test_help_names_every_choice_and_the_true_defaults(capsys):
    for verb, words in (
        ("generate", {*CRITERIA, *SCHEDULES, *BATCH_RULES}),
        ("demo", {*CRITERIA, *BATCH_RULES, "(the shipped model's)"}),
    ):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_the_examples_of_the_help_are_read(verb):
    for command in verb.example.replace("\\\n", " ").splitlines()[1:]:
        program, *arguments = shlex.split(command)
        assert program == "hf-earlyexit" and arguments[0] == verb.name
        assert build_parser().parse_args(arguments)


def test_the_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf_earlyexit", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("hf_earlyexit", run_name="__main__", alter_sys=True)
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "usage: hf-earlyexit" in text
    assert all(verb.name in text for verb in VERBS)
