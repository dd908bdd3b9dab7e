"""Parsing of report pages."""

from __future__ import annotations

from html.parser import HTMLParser

from hf_earlyexit.reports.report import render


VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A parsed page: tags with their attributes, and the text without tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += data

    def having(self, tag: str, name: str) -> list[str]:
        return [attributes[name] for found, attributes in self.tags if found == tag and name in attributes]


def page_of(results) -> Page:
    return Page(render(results, {}))
