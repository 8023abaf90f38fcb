"""The workflow in folders of any name, and as a module of another one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from small_study import TABLE, planned, results, snakemake, study

STRANGE = "x$(touch PWNED)y 'a' \"b\" ü;#%41*[0-9]&|~`touch PWNED`\\z"
"""Name of a folder that a shell, a URI or a pattern would read as something else."""


@pytest.mark.slow
def test_a_study_runs_in_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / STRANGE
    folder.mkdir()
    one = {"seeds": None, "default_runs": ["one"], "tables": None, "figures": None, "paper": None}
    config = study(folder, TABLE + "one\tegrpo\n", **one, train__iterations=1)
    done = snakemake(config)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert not list(ROOT.glob("PWNED*"))
    assert {p.name for p in tmp_path.iterdir()} == {STRANGE}
    at = results(config)
    assert {p.name for p in at.parent.iterdir()} == {
        *("small", "mlflow.db", ".mlflow.db.lock", "mlartifacts", "index.html", ".digests.json")
    }
    assert list((at.parent / "mlartifacts").rglob("comparison.parquet"))
    assert (at / "published-comparison.json").exists()
    assert planned(config) == {}
    done = snakemake(config, "--report", str(folder / "report.html"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
def test_the_recipe_of_a_module_runs(tmp_path: Path) -> None:
    """Another workflow, elsewhere, imports this one under other names."""
    text = (ROOT / "docs/recipes.md").read_text()
    (snippet,) = re.findall(r"```python\n(configfile:.*?)```", text, re.DOTALL)
    snippet = snippet.replace("path/to/checkout", str(ROOT))
    (tmp_path / "Snakefile").write_text(snippet + 'rule plan:\n    shell: "true"\n')
    one = {"seeds": None, "default_runs": ["one"], "tables": None, "figures": None, "paper": None}
    config = study(tmp_path, TABLE + "one\tegrpo\n", **one, train__iterations=1)
    settings = {**yaml.safe_load(config.read_text()), "results": "results"}
    config.write_text(yaml.safe_dump({"egrpo": settings}))
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout + done.stderr

    jobs = run("--dry-run", "egrpo_all")
    for rule in ("embed", "plan", "train", "evaluate", "page", "publish"):
        assert re.search(rf"^egrpo_{rule} +[1-4]$", jobs, re.MULTILINE), rule
    run()
    assert json.loads((tmp_path / "summary.txt").read_text())["iterations"] == 1
    assert (tmp_path / "results/small/workflow.lock").exists()
