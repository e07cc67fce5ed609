"""MkDocs' hook that makes the site of the files where they lie in the repository.

The site has the repository's own paths, so that a link that works on the repository's web page
works in the site and nothing is copied by hand: README.md is its first page, docs/dcnv2.md is
docs/dcnv2/. What a page links to that is no page (a config, a test, a folder) becomes a page that
shows it; d2det/config.py becomes the configuration reference.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import config_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    *("*.md", "docs/**/*.md", "csrc/**/*.md", "benchmarks/**/*.md"),
    "tests/cuda_emulator/README.md",
)
PICTURES = ("docs/**/*.jpg", "docs/**/*.png", "docs/**/*.svg")
REFERENCE = "d2det/config.py"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".h": "cpp", ".cpp": "cpp", ".cu": "cuda"}

FENCE = re.compile(r"\s*(```|~~~)")
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
STARTS_BLOCK = re.compile(r"([-*+]|\d+\.) |\|")
CONTINUES_BLOCK = re.compile(r"([-*+]|\d+\.) |[|#>\s]")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages, their pictures, and a page for each other file or folder that they link to."""
    theirs = [file for file in files if file.src_dir != config.docs_dir]  # the theme's
    paths = [path for pattern in (*PAGES, *PICTURES) for path in sorted(ROOT.glob(pattern))]
    ours = [
        File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
        for path in paths
    ]
    known = {file.src_uri for file in ours}
    wanted: list[str] = []
    for page in (file for file in ours if file.is_documentation_page()):
        wanted += [path for path in _linked(page.src_uri, page.content_string) if path not in known]
    for path in sorted({*wanted, REFERENCE}):
        ours += _shown(path, config)
    unique = {file.src_uri: file for file in ours}
    return Files([*theirs, *unique.values()])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files that are no pages lead to the pages that show them."""
    here = page.file.src_uri

    def redirect(match: re.Match[str]) -> str:
        path = resolve(here, match["target"])
        if path is None or files.get_file_from_path(path) or not (ROOT / path).exists():
            return match[0]
        shown = _page_of(path)
        target = posixpath.relpath(shown, posixpath.dirname(here) or ".")
        return f"{match['before']}{target}{match['anchor'] or ''}"

    return "\n".join(
        line if fenced else LINK.sub(redirect, line) for line, fenced in _lines(_spaced(markdown))
    )


def resolve(page: str, target: str) -> str | None:
    """The path in the repository that a link of a page leads to; None for a web address."""
    if re.match(r"[a-z]+:", target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def _linked(page: str, markdown: str) -> Iterator[str]:
    """The files and folders of the repository that a page links to."""
    for line, fenced in _lines(markdown):
        for match in LINK.finditer(line) if not fenced else ():
            path = resolve(page, match["target"])
            if path is not None and (ROOT / path).exists():  # else MkDocs says that it is missing
                yield path


def _page_of(path: str) -> str:
    """The page that shows a file or folder of the repository."""
    return f"{path}/README.md" if (ROOT / path).is_dir() else f"{path}.md"


def _shown(path: str, config: MkDocsConfig) -> list[File]:
    """The page of a file that is no page; for a folder, that of each of its files as well."""
    if path == REFERENCE:
        text = config_reference.markdown(config_reference.read())
        return [File.generated(config, _page_of(path), content=text)]
    place = ROOT / path
    if not place.is_dir():
        return [_page(path, f"# {path}\n\n{_code(place)}", config)]
    inside = sorted(p for p in place.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    names = [file.relative_to(place).as_posix() for file in inside]
    items = "\n".join(f"- [{name}]({name}.md)" for name in names)
    index = _page(path, f"# {path}\n\n{items}\n", config)
    return [index, *(file for name in names for file in _shown(f"{path}/{name}", config))]


def _page(path: str, text: str, config: MkDocsConfig) -> File:
    hidden = InclusionLevel.NOT_IN_NAV
    return File.generated(config, _page_of(path), content=text, inclusion=hidden)


def _code(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    return f"````{language}\n{path.read_text(encoding='utf-8').rstrip()}\n````\n"


def _lines(markdown: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it is within a block of code."""
    fence = ""
    for line in markdown.split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence = mark[1]
            yield line, True
        elif mark and mark[1] == fence:
            fence = ""
            yield line, True
        else:
            yield line, bool(fence)


def _spaced(markdown: str) -> str:
    """With an empty line between a paragraph and its list or table.

    The repository's web page needs none (CommonMark); Python-Markdown would run them together.
    """
    result: list[str] = []
    for line, fenced in _lines(markdown):
        before = result[-1] if result else ""
        if not fenced and before and STARTS_BLOCK.match(line) and not CONTINUES_BLOCK.match(before):
            result.append("")
        result.append(line)
    return "\n".join(result)
