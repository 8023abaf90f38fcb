"""Writes envs/egrpo.yaml from the pins of requirements.txt: ``python envs/update.py``."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD = """\
# For `snakemake --sdm conda`: the pins of requirements.txt in a conda environment of their own.
# Written by `python envs/update.py`, not by hand. The pins stand here in full, since Snakemake
# copies this file before conda reads it: no path beside it can be named. The package itself is not
# among them; rules run `python -m egrpo` where it lies.
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python =3.12
  - pip
  - pip:
"""


def environment() -> str:
    """The environment as YAML."""
    lines = (HERE.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    return HEAD + "".join(f"      - {pin}\n" for pin in pins)


if __name__ == "__main__":
    (HERE / "egrpo.yaml").write_text(environment(), encoding="utf-8")
