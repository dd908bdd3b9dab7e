"""The documentation: links resolve, snippets run, commands parse, names exist, the site builds."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest

from hf_earlyexit import EarlyExitT5ForConditionalGeneration
from hf_earlyexit.cli.main import VERBS, build_parser
from hf_earlyexit.exits.config import HEAD_KINDS
from hf_earlyexit.exits.criteria import BATCH_RULES, CRITERIA, SCHEDULES
from hf_earlyexit.training.objectives import OBJECTIVES
from hf_earlyexit.training.trainer import EarlyExitTrainer
from tests.docs.markdown import ROOT, Page, slug


CARD = "hf_earlyexit/assets/t5-e2e/README.md"
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", CARD)
PAGES = [Page(path) for path in (*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").rglob("*.md")))]
WITH_PYTHON = [page for page in PAGES if page.fences_of("python")]
# Python blocks that are not run, and why. Each is marked on its page.
NOT_RUN = {
    "README.md": ["needs a Hub download", "goes on from the block above, and compiles for about a minute"],
    "docs/calibration.md": ["needs a file of yours; how-to/certify.md runs the same on a few inputs"],
    "docs/criteria.md": ["needs a model with a certificate, and texts of yours"],
    "docs/gpu.md": ["needs a CUDA device"],
    "docs/how-to/make-a-checkpoint.md": ["needs a Hub download"],
    "docs/how-to/prepare-and-compile.md": ["compiles for about a minute"],
    "docs/t5-synopsis.md": ["the weights are not shipped"],
    "docs/training.md": ["needs a Hub download; how-to/train-exits.md runs the same on a few inputs"],
}
# Classes of the variables with these names in blocks that are not run.
VARIABLES = {"model": EarlyExitT5ForConditionalGeneration, "trainer": EarlyExitTrainer}


def named(page: Page) -> str:
    return page.name


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    """Files and anchors exist; links to other hosts are only checked for their syntax."""
    assert [link for link in page.links if not leads_somewhere(page, link)] == []


def leads_somewhere(page: Page, link: str) -> bool:
    if "//" in link:
        parts = urlparse(link)
        return (
            parts.scheme in ("http", "https") and re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) is not None
        )
    target, _, anchor = link.partition("#")
    path = (page.path.parent / target).resolve() if target else page.path
    if not path.is_file() or not path.is_relative_to(ROOT):
        return False
    return not anchor or (path.suffix == ".md" and anchor in Page(path).anchors)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](README.md) [b](README.md#install) `[c](no.md)`", []),
        ("[a](no.md) ![b](no.png)", ["no.md", "no.png"]),
        ("[a](README.md#no-such-heading)", ["README.md#no-such-heading"]),
        ("# Here\n[a](#here) [b](#there)", ["#there"]),
        ("[a](https://host) [b](https://arxiv.org/abs/1)", ["https://host"]),
        ("```bash\n[a](no.md)\n```", []),
    ],
)
def test_a_link_that_leads_nowhere_is_noticed(tmp_path, text, wrong, monkeypatch):
    monkeypatch.setattr("tests.docs.test_docs.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# Install\n")
    page = Page(tmp_path / "page.md")
    page.path.write_text(text)
    assert [link for link in page.links if not leads_somewhere(page, link)] == wrong


def test_anchors_are_those_of_github():
    assert slug("`hf-earlyexit tune`, 2. *Why?*") == "hf-earlyexit-tune-2-why"
    assert slug("A [link](x.md) & more") == "a-link--more"


# --- snippets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_runs(page, tmp_path, monkeypatch):
    """All Python blocks of a page run in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for fence in page.fences_of("python"):
        # Line numbers are those of the page, so that errors point to it.
        code = compile("\n" * fence.line + fence.code, page.name, "exec")
        if fence.not_run is None:
            exec(code, namespace)


def test_what_is_not_run_is_known():
    found = {page.name: [fence.not_run for fence in page.fences_of("python") if fence.not_run] for page in PAGES}
    assert {name: reasons for name, reasons in found.items() if reasons} == NOT_RUN


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in NOT_RUN], ids=named)
def test_what_is_not_run_names_what_exists(page):
    """Blocks that are not run use existing imports, attributes (of imports, model, trainer) and keywords."""
    known = dict(VARIABLES)
    for fence in page.fences_of("python"):
        tree = ast.parse(fence.code)
        known |= imported(tree)
        if fence.not_run:
            assert wrong_names(tree, known) == []


def imported(tree: ast.AST) -> dict[str, object]:
    """Objects that a block imports from this package, by name."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_earlyexit":
            module = importlib.import_module(node.module)
            found |= {one.asname or one.name: getattr(module, one.name) for one in node.names}
    return found


def wrong_names(tree: ast.AST, known: dict[str, object]) -> list[str]:
    """Attributes and keywords that the known objects do not have."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            if not hasattr(known[node.value.id], node.attr):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call) and (function := called(node, known)) is not None:
            takes = inspect.signature(function).parameters
            if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
                found += [word.arg for word in node.keywords if word.arg and word.arg not in takes]
    return found


def called(node: ast.Call, known: dict[str, object]):
    """The function of a call if it is known, else None."""
    function = node.func
    if isinstance(function, ast.Name):
        return known.get(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return getattr(known.get(function.value.id), function.attr, None)
    return None


def test_a_name_that_does_not_exist_is_noticed():
    tree = ast.parse("model.generate(fill=1); model.prepare(); model.warm_up(rows=2); trainer.measured(prefix='x')")
    assert wrong_names(tree, VARIABLES) == ["rows", "model.prepare"]
    with pytest.raises(AttributeError):
        imported(ast.parse("from hf_earlyexit import NoSuchThing"))


# --- commands -------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised after arguments were parsed, in place of running the script."""


def commands(page: Page) -> list[list[str]]:
    """The words of every command in the page's bash blocks."""
    lines = "\n".join(fence.code.replace("\\\n", " ") for fence in page.fences_of("bash")).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
    return [command for command in words if command]


WITH_COMMANDS = [page for page in PAGES if page.fences_of("bash")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_commands_are_read(page, monkeypatch):
    """Commands of the pages are accepted by the parsers of the command line and of the scripts."""
    for program, *arguments in commands(page):
        if Path(program).name == "hf-earlyexit":
            build_parser().parse_args(arguments)
        elif Path(program).name.startswith("python") and arguments[0].startswith("scripts/"):
            read_by_script(*arguments, monkeypatch=monkeypatch)


def read_by_script(name: str, *arguments: str, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main = importlib.import_module(Path(name).stem).main
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        with pytest.raises(Parsed):
            main(list(arguments))


def parse_and_stop(parser, *args, parse=argparse.ArgumentParser.parse_known_args, **kwargs):
    if left_over := parse(parser, *args, **kwargs)[1]:
        parser.error(f"unrecognized arguments: {left_over}")
    raise Parsed


@pytest.mark.parametrize(
    "arguments", ["--modle x --output_dir y", "--output_dir y", "--model x --output_dir y --heads"]
)
def test_a_command_that_is_not_read_is_noticed(arguments, monkeypatch):
    with pytest.raises(SystemExit):
        read_by_script("scripts/train_exits.py", *arguments.split(), monkeypatch=monkeypatch)


def test_scripts_of_the_pages_are_read():
    """Commands of scripts are found, so that `test_commands_are_read` checks some."""
    read = {Path(words[1]).name for page in WITH_COMMANDS for words in commands(page) if words[0] == "python"}
    assert read >= {"train_exits.py", "pretrain_t5.py"}


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_names_in_code_exist(page):
    """Inline code that looks like a module, its member, a file or a verb names an existing one."""
    assert [name for name in page.inline_code if not exists(name)] == []


def exists(name: str) -> bool:
    if re.fullmatch(r"hf_earlyexit(\.\w+)+", name):
        return resolves(name)
    if re.fullmatch(r"(scripts|docs|tests|hf_earlyexit)/[\w./-]+\.\w+", name):
        return (ROOT / name).is_file()
    if match := re.match(r"hf-earlyexit ([a-z][\w-]*)", name):
        return match[1] in {verb.name for verb in VERBS}
    return True


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize(
    "name", ["hf_earlyexit.no_such", "hf_earlyexit.families.shipped.no_such", "scripts/no.py", "hf-earlyexit no"]
)
def test_a_name_in_code_that_does_not_exist_is_noticed(name):
    assert not exists(name)


def test_everything_that_can_be_chosen_has_a_line():
    """Every criterion, head, objective, batch rule and schedule is documented in its page's tables."""
    tables = Page(ROOT / "docs/methods/index.md").inline_code
    words = {word for code in tables for word in re.findall(r'"\w+"|\w+', code)}
    quoted = {f'"{name}"' for name in (*CRITERIA, *HEAD_KINDS)}
    assert sorted({*quoted, *(kind.__name__ for kind in OBJECTIVES.values())} - words) == []
    rules = Page(ROOT / "docs/concepts/batch-rules.md").inline_code
    assert {f'"{name}"' for name in BATCH_RULES} <= set(rules)
    calm = " ".join(Page(ROOT / "docs/methods/calm.md").inline_code)
    assert [name for name in SCHEDULES if name != "constant" and f'"{name}"' not in calm] == []


# --- the site -------------------------------------------------------------------------------------------------------


def test_the_site_builds(tmp_path):
    """The site builds in strict mode, which fails on missing links and anchors, and loads nothing external."""
    pytest.importorskip("mkdocs")
    # Without `--quiet`, which would keep warnings from being counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "methods/calm.html", "contributing.html", "shipped-model.html"} <= set(pages)
    assets = re.compile(r"<(?:script|img|iframe|link|source)\b[^>]*\s(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")
    assert {name: found for name, text in pages.items() if (found := assets.findall(text))} == {}
    formulas = {page.name.removeprefix("docs/"): len(page.fences_of("math")) for page in PAGES}
    drawn = {name: pages[name.replace(".md", ".html")].count("<math ") for name, count in formulas.items() if count}
    assert drawn == {name: count for name, count in formulas.items() if count} != {}
    assert "Top-1 minus top-2 probability" in pages["reference/criteria.html"]
    assert 'href="../contributing.html"' in pages["methods/index.html"]
