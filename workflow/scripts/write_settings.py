"""Write one entry of the settings that the Snakefile resolved, as YAML.

A script of its own, which imports next to nothing: a study of the paper has hundreds of such jobs,
and a `run:` block starts a whole Snakemake for each.
"""

import json
import sys

import yaml


def main(store: str, entry: str, output: str) -> None:
    """Write ``entry`` of the JSON file ``store`` to ``output``."""
    with open(store, encoding="utf-8") as handle:
        settings = json.load(handle)[entry]
    with open(output, "w", encoding="utf-8") as handle:
        yaml.safe_dump(settings, handle, sort_keys=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
