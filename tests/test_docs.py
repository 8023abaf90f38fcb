"""The documents: generated ones in step, the site builds, links lead somewhere, commands exist."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click
import pytest
import yaml
from conftest import ROOT
from pydantic import BaseModel
from snakemake.cli import get_argument_parser

from docs.generate.__main__ import DOCUMENTS
from docs.generate.commands import TARGETS, make_targets
from docs.generate.methods import ENTRIES, drawings, example
from docs.generate.settings import extra, named, possible, section
from docs.generate.tables import FILES
from egrpo.cli import main
from egrpo.config.models import RunConfig
from egrpo.config.rewards import REWARD_MODELS
from egrpo.config.study import FigureSpec, StudyConfig, TableSpec
from egrpo.methods import METHOD_MODELS
from egrpo.store.tables import TABLES
from egrpo.study.layout import OUTPUTS, PAGES
from egrpo.study.resolve import load_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser

RULES = "\n".join(p.read_text() for p in (ROOT / "workflow/rules").glob("*.smk"))


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def without_numbers(svg: str) -> str:
    """What a drawing is but for its coordinates and the ids that matplotlib derives from them."""
    return NUMBER.sub("0", re.sub(r"\b[pm][0-9a-f]{10}\b", "id", svg))


@pytest.mark.parametrize("path", DOCUMENTS)
def test_generated_document_is_in_step(path):
    there, made = (ROOT / path).read_text(), DOCUMENTS[path]()
    if path.endswith(".svg") and there != made:  # processors differ in last digits
        assert without_numbers(there) == without_numbers(made), "run `python -m docs.generate`"
        there, made = (re.sub(r"\b[pm][0-9a-f]{10}\b", "", text) for text in (there, made))
        numbers = [[float(n) for n in NUMBER.findall(text)] for text in (there, made)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.02)
        return
    assert there == made, "run `python -m docs.generate`"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_drawing_shows_its_tree(name):
    tree, svg = example(name), drawings()[f"docs/images/trees/{name}.svg"]()

    def drawn(gid: str, what: str) -> int:
        found = re.findall(rf'<g id="{gid}">(.*?)\n   </g>', svg, re.DOTALL)
        return sum(len(re.findall(what, part)) for part in found)

    edges = [n for n in tree.nodes if n.parent >= 0]
    merged = [n for n in edges if n.trained and n.index - tree.nodes[n.parent].index > 1]
    assert drawn("forward", "<use") == tree.cost.forward
    assert drawn("train", "<use") == tree.cost.train
    assert drawn("images-.*?", "<use") == len(tree.leaves)
    assert drawn("ode", "M ") == sum(n.dynamics == "ode" for n in edges)
    assert drawn("dpm2", "M ") == sum(n.dynamics == "dpm2" for n in edges)
    assert drawn("merged-.*?", "M ") == len(merged)
    assert (name in ("egrpo", "egrpo_efficient")) == bool(merged)
    assert len(svg) < 40_000


def test_every_method_has_its_entry_and_its_departures():
    assert set(ENTRIES) == set(METHOD_MODELS)
    for entry in ENTRIES.values():
        assert entry.departures.startswith("Departs from"), entry.title


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A settings model and all below it."""
    found = {model}
    for name, field in model.model_fields.items():
        below = section(field) or named(field) or possible(field)
        if below is not None and name not in ("method", "rewards"):
            found |= models(below)
    return found


SETTINGS = {
    *models(RunConfig),
    *(StudyConfig, TableSpec, FigureSpec),
    *METHOD_MODELS.values(),
    *REWARD_MODELS.values(),
}


def numeric(kind: object) -> bool:
    """Whether a setting of this type holds a number."""
    return kind in (int, float) or any(numeric(part) for part in get_args(kind) if part is not bool)


FIELDS = [
    (model, name, field)
    for model in SETTINGS
    for name, field in model.model_fields.items()
    if not section(field) and not named(field)
]


def test_every_number_but_a_seed_has_a_unit():
    numbers = [(m, name, field) for m, name, field in FIELDS if numeric(field.annotation)]
    assert len(numbers) > 150
    for model, name, field in numbers:
        assert bool(extra(field, "unit")) == (name not in ("seed", "seeds")), (model, name)


def test_every_setting_and_every_source_is_on_its_page():
    page = (ROOT / "docs/settings.md").read_text()
    for model, name, field in FIELDS:
        if name in ("kind", "name", "run", "arm"):
            continue
        if model is RunConfig and name in ("method", "rewards"):
            continue
        assert re.search(rf"^\| `([a-z_<>.]+\.)?{name}` \|", page, re.MULTILINE), name
        assert field.is_required() or extra(field, "source") in page


def test_every_table_names_files_that_rules_make():
    assert set(FILES) == set(TABLES)
    known = {name for outputs in OUTPUTS.values() for name in outputs}
    known |= {f"{name}.parquet" for name in (*PAGES.values(), "<table>")}
    for files in FILES.values():
        assert {file.rpartition("/")[2] for file in files} <= known


def test_every_target_of_the_page_is_a_rule():
    for target in TARGETS:
        assert f"rule {target}:" in RULES + (ROOT / "Snakefile").read_text()


def test_every_command_and_make_target_is_on_its_page():
    page = (ROOT / "docs/commands.md").read_text()
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == {name for name, _ in make_targets()}
    for name, _ in make_targets():
        assert f"`make {name}`" in page
    for name, command in main.commands.items():
        if command.hidden:
            continue
        part = page.split(f"### `egrpo {name}`\n")[1].split("\n### ")[0]
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert f"`{option.opts[0]}" in part, (name, option.opts[0])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    words = ["-W", "-n", "--keep-going", "-q", "-d", folder / "trees", "docs", folder / "html"]
    command = [sys.executable, "-m", "sphinx", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_is_in_the_site(site):
    for page in (ROOT / "docs").rglob("*.md"):
        if "_build" not in page.parts:
            assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page


FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|embed)\b[^>]*?\bsrc(?:set)?=[\"']?(?:https?:)?//"
    r"|<link\b[^>]*?\bhref=[\"']?(?:https?:)?//"
    r"|url\([\"']?(?:https?:)?//|@import\s+[\"'](?:https?:)?//"
)


def test_pages_ask_nothing_of_the_network(site):
    assert FETCHED.search('<script src="https://cdn.example/x.js">')
    assert FETCHED.search("@import '//fonts.example/x.css'")
    files = [p for p in site.rglob("*") if p.suffix in (".html", ".css")]
    assert len(files) > 30
    for file in files:
        found = FETCHED.search(file.read_text())
        assert found is None, (file, found)


def test_pages_in_a_browser(site: Path, browser: Browser) -> None:
    """On a desk and on a phone: all images there, nothing wider than the window, no request."""
    pages = [p for p in sorted(site.rglob("*.html")) if p.name not in ("genindex.html",)]
    for width, height in ((1280, 900), (375, 800)):
        page = browser.new_page(viewport={"width": width, "height": height})
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        for file in pages:
            page.goto(file.as_uri())
            broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
            assert page.evaluate(broken) == [], file
            assert page.evaluate("document.documentElement.scrollWidth") <= width, file
        assert asked
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        page.close()


@pytest.mark.parametrize("theme", ["auto", "dark", "light"])
def test_drawings_on_a_phone_in_the_dark(site: Path, browser: Browser, theme: str) -> None:
    """Labels keep their size, and lines on white are turned over unless the reader chose light."""
    look = "e => getComputedStyle(e.parentElement).filter"
    page = browser.new_page(viewport={"width": 375, "height": 800}, color_scheme="dark")
    for name, drawing in (("methods", True), ("results", False)):
        page.goto((site / f"{name}.html").as_uri())
        page.evaluate(f"document.body.dataset.theme = '{theme}'")
        images = page.locator(f".content p > img[src$='.{'svg' if drawing else 'png'}']").all()
        assert len(images) > 5
        for image in images:
            assert image.evaluate("e => e.clientWidth") == 42 * 16
            assert image.evaluate("e => getComputedStyle(e.parentElement).overflowX") == "auto"
            assert ("invert" in image.evaluate(look)) == (drawing and theme != "light")
    page.close()


def markdown() -> list[Path]:
    """Every Markdown file that git knows."""
    words = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    found = subprocess.check_output(words, cwd=ROOT, text=True)
    return [ROOT / line for line in found.splitlines()]


FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        seen = found.count(slug)
        found.append(f"{slug}-{seen}" if seen else slug)
    return frozenset(found)


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    plain = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    links = re.findall(r"\]\(([^)\s]+)\)", plain) + re.findall(r'(?:src|href)="([^"]+)"', plain)
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_every_link_leads_somewhere():
    wrong = "[a](nowhere.md) [b](settings.md#nothing) [c](settings.md#the-study) [d](../README.md)"
    assert broken_links(ROOT / "docs/tour.md", wrong) == ["nowhere.md", "settings.md#nothing"]
    pages = markdown()
    assert len(pages) > 30
    for path in pages:
        assert broken_links(path, path.read_text()) == [], path


def quoted(text: str) -> Iterator[list[str]]:
    """Words of each command in a page's shell blocks and code spans."""
    blocks = [block for kind, block in FENCE.findall(text) if kind == "sh"]
    spans = re.findall(r"`((?:egrpo|snakemake|make|python -m|python \w+/) ?[^`\n]*)`", text)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines() + spans:
        for command in re.split(r"&&|;|\|(?!\|)", line.split(" #")[0].split("  ->")[0]):
            words = shlex.split(command)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def targets_of(text: str) -> set[str]:
    """Tables and figures that the YAML of a page defines."""
    found: set[str] = set()
    for kind, block in FENCE.findall(text):
        data = yaml.safe_load(block) if kind == "yaml" else None
        if isinstance(data, dict):
            found |= {*(data.get("tables") or {}), *(data.get("figures") or {})}
    return found


def fault(words: list[str], targets: set[str]) -> str | None:
    """What is wrong with a command."""
    name, *rest = words
    if rest and rest[-1].startswith("--"):  # prose names an option without its value
        rest.append("0")
    if name == "make":
        unknown = [w for w in rest if w not in {t for t, _ in make_targets()} and w != "…"]
        return f"no target {unknown}" if unknown else None
    if name == "python" and rest[:1] == ["-m"]:
        return None if importlib.util.find_spec(rest[1]) else f"no module {rest[1]}"
    if name == "python" and rest:
        return None if rest[0] == "-c" or (ROOT / rest[0]).exists() else f"no script {rest[0]}"
    if name == "egrpo" and rest and rest[0] in main.commands:
        command = main.commands[rest[0]]
        try:
            context = click.Context(command, **command.context_settings)
            command.make_parser(context).parse_args([*rest[1:]])
        except click.UsageError as error:
            return error.format_message()
        return missing_configs([w for w in rest[1:] if w.endswith(".yaml")])
    if name == "egrpo":
        return None if rest == [] else f"no command {rest[0]}"
    if name == "snakemake":
        try:
            options, more = get_argument_parser().parse_known_args(rest)
        except SystemExit:
            return "not understood"
        free = ("results/", "TARGET", "0")
        unknown = [t for t in options.targets if t not in targets and not t.startswith(free)]
        if more or unknown:
            return f"no target or option {more or unknown}"
        configs = [str(path) for path in options.configfile or ()]
        return missing_configs([*configs, *(options.profile or [])])
    return None


def missing_configs(paths: list[str]) -> str | None:
    """A file of the repository that is not there; one without a folder is the reader's own."""
    missing = [path for path in paths if "/" in path and not (ROOT / path).exists()]
    return f"no file {missing}" if missing else None


def test_every_quoted_command_is_one():
    study = load_study(ROOT / "config/config.yaml")
    known = {*TARGETS, *study.tables, *study.figures}
    for wrong in (
        *("make nothing", "egrpo nothing", "egrpo plan --nothing 3", "python -m egrpo.nothing"),
        *("egrpo cost config/nothing.yaml", "snakemake --cores all nothing"),
        "snakemake --profile profiles/nothing",
    ):
        assert fault(wrong.split(), known), wrong
    count = 0
    for path in markdown():
        text = path.read_text()
        for words in quoted(text):
            count += 1
            assert fault(words, known | targets_of(text)) is None, (path, words)
    assert count > 60
