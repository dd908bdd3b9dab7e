"""Terminal formatting: colours, their legend, lines, tables."""

import io
import re

import pytest

from hf_earlyexit.common.extras import require
from hf_earlyexit.reports import terminal


TOKENS, LAYERS = ["▁The", "▁Port", "l", "and", "▁Arms", "."], [4, 1, 4, 2, 3, 4]
PAINTED = re.compile(r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_token_that_left_early_has_the_colour_of_its_layer():
    text = terminal.colour_tokens(TOKENS, LAYERS, 4, colour=True)
    assert PAINTED.findall(text) == [
        (str(terminal.colour_of(layer, 4)), word) for layer, word in ((1, "Port"), (2, "and"), (3, "Arms"))
    ]
    assert terminal.ESCAPES.sub("", text) == "The Portland Arms."


def test_spaces_are_never_coloured():
    text = terminal.colour_tokens(TOKENS, LAYERS, 4, colour=True)
    assert all(" " not in word for _, word in PAINTED.findall(text))


def test_without_colour_the_layer_stands_behind_the_token():
    assert terminal.colour_tokens(TOKENS, LAYERS, 4, colour=False) == "The Port¹land² Arms³."
    assert terminal.colour_tokens(["▁a"], [12], 24, colour=False) == "a¹²"


@pytest.mark.parametrize("colour", (True, False))
def test_marked_tokens_are_followed_by_a_star(colour):
    text = terminal.colour_tokens(TOKENS, LAYERS, 4, colour, marked=[1, 5])
    plain = terminal.ESCAPES.sub("", text).translate({ord(digit): None for digit in "¹²³"})
    assert plain == "The Port*land Arms.*"


def test_no_tokens_are_no_text():
    assert terminal.colour_tokens([], [], 4, colour=True) == ""


@pytest.mark.parametrize("num_layers", (2, 3, 8, 12, 24))
def test_colours_run_through_the_palette_and_full_depth_has_none(num_layers):
    places = [terminal.PALETTE.index(terminal.colour_of(layer, num_layers)) for layer in range(1, num_layers)]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == (len(terminal.PALETTE) - 1 if num_layers > 2 else 0)
    assert terminal.colour_of(num_layers, num_layers) is None


def test_legend_shows_each_layer_in_its_own_colour():
    text = terminal.legend([2, 6, 4, 8], 8, True, marked="odd")
    assert PAINTED.findall(text) == [
        (str(terminal.colour_of(layer, 8)), f"layer\N{NO-BREAK SPACE}{layer}") for layer in (2, 4, 6)
    ]
    assert text.endswith("plain = all 8  * = odd")
    assert terminal.legend([2], 8, False, marked="odd") == "word² = layer 2  plain = all 8  * = odd"


@pytest.mark.parametrize(
    "choice, environment, stream, expected",
    (
        ("auto", {}, Terminal(), True),
        ("auto", {}, io.StringIO(), False),
        ("auto", {"NO_COLOR": "1"}, Terminal(), False),
        ("auto", {"NO_COLOR": ""}, Terminal(), True),
        ("auto", {"TERM": "dumb"}, Terminal(), False),
        ("always", {"NO_COLOR": "1"}, io.StringIO(), True),
        ("never", {}, Terminal(), False),
    ),
)
def test_when_colours_are_used(monkeypatch, choice, environment, stream, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.use_colour(choice, stream) is expected


def test_lines_are_cut_at_spaces_and_escapes_take_no_room():
    plain = "the quick brown fox jumps over the lazy dog"
    words = [f"\x1b[38;5;16;48;5;75m{word}\x1b[0m" for word in plain.split()]
    lines = terminal.wrap(" ".join(words), 15)
    assert [terminal.ESCAPES.sub("", line) for line in lines] == ["the quick brown", "fox jumps over", "the lazy dog"]
    assert terminal.wrap(plain, 15) == ["the quick brown", "fox jumps over", "the lazy dog"]
    assert terminal.wrap("the quick brown", 14) == ["the quick", "brown"]
    assert terminal.wrap("incomprehensible", 5) == ["incomprehensible"]


def test_labelled_text_is_indented_alike():
    assert terminal.labelled("in", "one two three", 12, 5) == "in   one two\n     three"
    assert terminal.labelled("in", "", 12, 5) == "in   "


def test_table_aligns_names_left_and_numbers_right():
    rows = [("tokens", "7", "120"), ("heads run", "12345", "")]
    assert terminal.table(("", "ours", "theirs"), rows).splitlines() == [
        "            ours  theirs",
        "tokens         7     120",
        "heads run  12345",
    ]


def test_ratio():
    assert terminal.ratio(3, 4) == "0.75x"
    assert terminal.ratio(3, 0) == "-"


def test_require_imports_what_is_there():
    assert require("json", "bench") is __import__("json")


def test_require_says_what_to_install():
    with pytest.raises(ImportError, match=r"`no_such_module`: pip install hf-earlyexit\[bench\]"):
        require("no_such_module", "bench")
    with pytest.raises(ImportError, match=r"pip install hf-earlyexit\[bench\]"):
        require("no_such_module.inside", "bench")


def test_require_does_not_blame_a_module_for_what_it_lacks_itself(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import something_else_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_that_is_missing"):
        require("broken_module", "bench")
