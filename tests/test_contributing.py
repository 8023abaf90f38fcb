"""What contributors rely on: hooks that judge as CI does, editor settings, issue forms."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import yaml
from conftest import ROOT

BIN = Path(sys.executable).parent


def recipe(target: str) -> list[str]:
    """Commands of a make target."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert found, target
    return [line.strip() for line in found[1].splitlines()]


def test_hooks_are_the_linters_of_ci() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    ours = {tuple(hook["entry"].removeprefix(".venv/bin/").split()[:2]) for hook in hooks}
    ci = {tuple(line.split()[:2]) for line in recipe("lint")}
    bare = {(words[0],) if words[0] in ("mypy", "snakefmt") else words for words in ci}
    assert ours == bare, "one hook for each line of `make lint`"
    assert "make lint" in (ROOT / ".ci/run").read_text()


def test_a_commit_with_a_fault_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "copy"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        who = {f"GIT_{x}_{y}": "a@b" for x in ("AUTHOR", "COMMITTER") for y in ("NAME", "EMAIL")}
        env = {**os.environ, **who, "PRE_COMMIT_HOME": str(tmp_path / "home")}
        env["SKIP"] = "mypy,snakemake-lint"  # they need the whole project
        env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
        return subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True)

    copy.mkdir()
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / ".venv").symlink_to(BIN.parent)
    assert run("git", "init", "-q").returncode == 0
    assert "pre-commit installed" in run("pre-commit", "install").stdout
    (copy / "bad.py").write_text('"""A module."""\n\nimport os\n')
    (copy / "good.py").write_text('"""A module."""\n')
    run("git", "add", "bad.py")
    refused = run("git", "commit", "-m", "unused import")
    assert refused.returncode != 0
    assert "F401" in refused.stdout + refused.stderr
    run("git", "rm", "-qf", "--cached", "bad.py")
    run("git", "add", "good.py")
    taken = run("git", "commit", "-m", "nothing wrong")
    assert taken.returncode == 0, taken.stdout + taken.stderr


def test_tracked_files_obey_the_editor_settings() -> None:
    settings = configparser.ConfigParser(strict=True)
    settings.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    assert settings["*"]["end_of_line"] == "lf"
    tabs = [s for s in settings.sections() if settings[s].get("indent_style") == "tab"]
    seen = 0
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for path in (ROOT / name for name in names.split("\0") if name):
        data = path.read_bytes()
        if b"\0" in data or not data or path.suffix in (".svg", ".txt", ".json", ".patch"):
            continue  # binary, or as another program writes it
        seen += 1
        text = data.decode()
        assert "\r" not in text, path
        assert text.endswith("\n"), path
        lines = text.splitlines()
        if path.suffix != ".tsv":
            assert not [n for n, line in enumerate(lines, 1) if line != line.rstrip()], path
        if not any(fnmatch(path.name, section) for section in tabs):
            assert not [n for n, line in enumerate(lines, 1) if line.startswith("\t")], path
    assert seen > 150


def test_issue_forms_are_what_github_reads() -> None:
    forms = {p.stem: yaml.safe_load(p.read_text()) for p in ROOT.glob(".github/*TEMPLATE/*.yml")}
    assert set(forms) == {"bug", "result", "method", "config"}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    for form in forms.values():
        assert set(form) - {"labels"} == {"name", "description", "body"}
        ids = [part["id"] for part in form["body"]]
        assert len(ids) == len(set(ids))
        for part in form["body"]:
            assert part["type"] in ("textarea", "input", "dropdown")
            assert part["attributes"]["label"]
            assert (part["type"] == "dropdown") == ("options" in part["attributes"])
    assert "egrpo doctor" in str(forms["bug"])


def test_help_lists_every_target() -> None:
    # make may run the tests
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    told = subprocess.check_output(["make", "help"], cwd=ROOT, env=env, text=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert [line.split()[0] for line in told.splitlines()] == targets
    assert {"demo", "test", "lint", "hooks", "ui"} <= set(targets)
