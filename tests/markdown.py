"""Markdown pages, taken apart: code fences, links, headings, names in code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


ROOT = Path(__file__).parent.parent
OPENING = re.compile(r"^```(\w*)")
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")
LINK = re.compile(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
TAG = re.compile(r"<(?:img|a)\s[^>]*(?:src|href)=\"([^\"]+)\"")
INLINE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """A code block.

    Attributes:
        language: Behind the opening fence.
        code: Between the fences.
        line: Of the opening fence, counted from 1.
        not_run: The reason in a comment right before it, `<!-- not run: REASON -->`; None if there is none.
    """

    language: str
    code: str
    line: int
    not_run: str | None = None


@dataclass(frozen=True)
class Page:
    """A Markdown file of the repository."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def fences(self) -> list[Fence]:
        found, opened = [], None
        for number, line in enumerate(self.lines):
            if opened is None and OPENING.match(line):
                opened = number
            elif opened is not None and line == "```":
                before = NOT_RUN.match(self.lines[opened - 1]) if opened else None
                code = "\n".join(self.lines[opened + 1 : number]) + "\n"
                language = OPENING.match(self.lines[opened])[1]
                found.append(Fence(language, code, opened + 1, before and before[1]))
                opened = None
        assert opened is None, f"{self.name}, line {opened + 1}: a fence that is not closed"
        return found

    def fences_of(self, language: str) -> list[Fence]:
        return [fence for fence in self.fences if fence.language == language]

    @cached_property
    def prose(self) -> str:
        """Without code blocks."""
        inside = {
            number
            for fence in self.fences
            for number in range(fence.line - 1, fence.line + fence.code.count("\n") + 1)
        }
        return "\n".join("" if number in inside else line for number, line in enumerate(self.lines))

    @cached_property
    def links(self) -> list[str]:
        text = INLINE.sub("", self.prose)
        return LINK.findall(text) + TAG.findall(text)

    @cached_property
    def inline_code(self) -> list[str]:
        return INLINE.findall(self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub makes them and `mkdocs.yml` has the site make them."""
        return {slug(heading) for heading in HEADING.findall(self.prose)}


def slug(heading: str) -> str:
    """A heading's anchor."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
