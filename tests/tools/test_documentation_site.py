"""The documentation's links lead somewhere, in the repository and in the site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "documentation"))

import site_hook  # noqa: E402  (found through the line above)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {value for key in ("id", "name") if (value := values.get(key))}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.loads += [url for key in ("src", "href") if (url := values.get(key))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, _Page]:
    return {path: _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def _repository_pages() -> list[Path]:
    return sorted({path for pattern in site_hook.PAGES for path in ROOT.glob(pattern)})


@pytest.mark.parametrize("page", _repository_pages(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_in_the_repository(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    links = [
        match["target"]
        for line, fenced in site_hook._lines(page.read_text(encoding="utf-8"))
        if not fenced
        for match in site_hook.LINK.finditer(line)
    ]
    paths = [path for link in links if (path := site_hook.resolve(name, link)) is not None]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_in_the_site(site: Path, pages: dict[Path, _Page]) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # whose links are absolute: it is served from anywhere
            continue
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(site)}: {link}")
            elif (
                url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.relative_to(site)}: {link} (anchor)")
    assert broken == []


def test_reading_needs_no_network(pages: dict[Path, _Page]) -> None:
    outside = {
        url for page in pages.values() for url in page.loads if re.match(r"(https?:)?//", url)
    }
    assert outside == set()


def test_no_page_names_this_machine(site: Path) -> None:
    named = [p for p in site.rglob("*.html") if str(ROOT) in p.read_text(encoding="utf-8")]
    assert named == []


def test_every_written_page_is_in_the_site(site: Path) -> None:
    for page in _repository_pages():
        built = page.relative_to(ROOT).with_suffix(".html")
        if page.name == "README.md":
            built = built.with_name("index.html")
        assert (site / built).is_file()


def test_linked_files_are_shown(site: Path) -> None:
    """docs/dcnv2.md links to a folder of configs; README to config.py, here the reference."""
    text = (site / "configs" / "DCNv2" / "faster_rcnn_R_50_C5.yaml.html").read_text()
    assert "Base-RCNN-C5.yaml" in text
    start = _Page((site / "index.html").read_text())
    assert "d2det/config.py.html" in start.links
    assert "MODEL.MIMIC.CROP_SIZE" in (site / "d2det" / "config.py.html").read_text()


def test_lists_and_tables_after_a_paragraph() -> None:
    assert site_hook._spaced("a:\n- b\n  c\n- d") == "a:\n\n- b\n  c\n- d"
    assert site_hook._spaced("a:\n1. b\n2. c") == "a:\n\n1. b\n2. c"
    assert site_hook._spaced("a\n| b |\n|---|") == "a\n\n| b |\n|---|"
    fenced = "```\na\n- b\n```"
    assert site_hook._spaced(fenced) == fenced
    for unchanged in ("## a\n- b", "- a\n- b", "| a |\n| b |", "a\n\n- b"):
        assert site_hook._spaced(unchanged) == unchanged
