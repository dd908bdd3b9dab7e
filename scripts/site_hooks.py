"""MkDocs hooks: formulas as MathML, and links to files of the repository that are outside `docs/`.

Sources keep the form that GitHub renders: a formula is a fence named `math`, and a link points to the file in the
repository. Pages outside `docs/` become pages of the site (`PAGES`); any other linked file is copied to the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from pymdownx.superfences import SuperFencesException


PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "hf_earlyexit/assets/t5-e2e/README.md": "shipped-model.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|/|#)([^)#\s]+)")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def on_config(config):
    """Register the format of fences named `math`."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    config.watch.extend(str(root(config) / source) for source in PAGES)
    return config


def formula(source: str, *_, **__) -> str:
    """Convert LaTeX to MathML, which browsers render without a script.

    Raises:
        SuperFencesException: The formula has an unknown command, which the converter would print as text. An exception
            of another type would be swallowed, and the source shown.
    """
    drawn = convert(source, display="block")
    if "\\" in drawn:
        raise SuperFencesException(f"Not all of this formula can be drawn, a command is unknown: {source!r}")
    return f'<div class="formula">{drawn}</div>'


def on_files(files: Files, config) -> Files:
    """Add the pages of `PAGES`, and every file outside `docs/` that some page links to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root(config) / source)))
    for page in list(files.documentation_pages()):
        for target in sorted(outside(page, config)):
            if target not in PAGES and files.get_file_from_path(copy_of(target)) is None:
                files.append(File.generated(config, copy_of(target), abs_src_path=str(root(config) / target)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Rewrite links that cross the border of `docs/` to the files' places on the site."""
    here = repository_path(page.file, config)

    def turned(match: re.Match) -> str:
        target = normpath(f"{dirname(here)}/{match[1]}")
        both_inside = here.startswith("docs/") and target.startswith("docs/")
        if both_inside or not (root(config) / target).is_file():
            return match[1]
        on_site = target.removeprefix("docs/") if target.startswith("docs/") else PAGES.get(target, copy_of(target))
        return relpath(on_site, dirname(page.file.src_uri) or ".")

    return LINK.sub(turned, FRONT_MATTER.sub("", markdown))


def outside(file: File, config) -> set[str]:
    """Files outside `docs/` that a page links to, as paths in the repository."""
    here = dirname(repository_path(file, config))
    targets = {normpath(f"{here}/{link}") for link in LINK.findall(file.content_string)}
    return {target for target in targets if not target.startswith("docs/") and (root(config) / target).is_file()}


def repository_path(file: File, config) -> str:
    """Source of a page, as a path in the repository."""
    return Path(file.abs_src_path).relative_to(root(config)).as_posix()


def copy_of(target: str) -> str:
    """Path of a repository file's copy on the site."""
    return f"files/{target}"


def root(config) -> Path:
    """Root folder of the repository."""
    return Path(config.config_file_path).parent
