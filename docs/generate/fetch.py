"""The page of what presets read and others publish."""

from __future__ import annotations

from docs.generate.text import rows
from egrpo.ops.published import fetch_plan, published
from egrpo.study.resolve import load_study

PRESETS = {
    "flux_dev_hps": ("flux_dev_hps",),
    "sd35_medium_pickscore": ("sd35_medium_pickscore",),
    "sd35_medium_ocr": ("sd35_medium_pickscore", "sd35_medium_ocr"),
}
"""Presets that name files of their own, and what each is laid over."""

INTRODUCTION = """\
# What to fetch

Generated from `egrpo/ops/published.tsv` by `python -m docs.generate`.

`egrpo doctor --fetch-plan` prints these commands for your files, without what is there already.
They are the hub's own client and curl; nothing is fetched unasked. The options were checked, the
downloads were not run. Sizes are estimates from numbers of weights; licenses are as noted here, and
the publisher's page decides. Where one is to be accepted on the hub, log in first: `hf auth login`.
"""

SETS = """\
## Sets of prompts

`egrpo prompts NAME FILES` writes a prompt file of a published set: each prompt once, in its order,
and refuses files that hold another number of them than were counted in the published file. `~`:
the number is its publication's, and another one is said and not refused; `?`: not known. Parquet is
read by this command alone.
"""


def fetch_page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for name, files in PRESETS.items():
        study = load_study("config/config.yaml", *(f"config/presets/{f}.yaml" for f in files))
        lines = "\n".join(fetch_plan(study, there=lambda path: path.startswith("assets/")))
        parts.append(f"## `{name}.yaml`\n\n```sh\n{lines}\n```\n")
    sets = [
        (f"`{item.name}`", item.count, item.license, f"`{item.source}`")
        for item in published()
        if item.column
    ]
    head = ("set", "prompts", "license", "from")
    return "\n".join([*parts, SETS, "\n".join(rows(head, sets)), ""])
