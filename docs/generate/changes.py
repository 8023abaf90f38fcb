"""The page of changes: which rules a change makes run; a test holds it to the code."""

from __future__ import annotations

from typing import Any, NamedTuple

from docs.generate.text import cell, rows

RULES = (
    *("embed", "profile", "plan", "train", "evaluate", "evaluate_base", "suffix_quality"),
    *("tables", "figures", "pages", "publish"),
)
"""Columns: rules; `tables` are comparison and result_table, `figures` also result_figure, `pages`
page and about."""

TELL = "tables figures pages publish"
RUN = f"train evaluate {TELL}"
MODEL = f"profile plan train evaluate evaluate_base suffix_quality {TELL}"
AUTO = "train(auto) evaluate(auto) suffix_quality " + TELL
SHOWN = "pages publish"
TRAIN_TEXTS = f"embed profile plan train evaluate suffix_quality {TELL}"
SCORES = f"profile suffix_quality evaluate evaluate_base {TELL}"
HELDOUT_TEXTS = f"embed evaluate evaluate_base {TELL}"
TRAINED = f"plan(auto) suffix_quality(auto) {RUN}"

TRAIN, HELDOUT = "toy/prompts/train.txt", "toy/prompts/heldout.txt"
MORE = ("append", "a large red circle")
PURPLE, SMALLER = ("first", "purple", "blue"), ("first", "large", "small")
HALVED = ("replace", "0.5", "0.25")


class Change(NamedTuple):
    """One change: what it is, and the rules that run again, by name; ``rule(auto)`` only for runs
    whose plan reads the profile.

    ``how`` is ``set`` for a key of the settings, ``edit`` or ``code`` for a file (below the study's
    folder, or the package), or another word that the test knows; ``where`` the key, or the file;
    ``value`` that of the key, of a file what is replaced, and by what.
    """

    what: str
    rules: str
    how: str
    where: str = ""
    value: Any = None


def _set(key: str, value: Any, rules: str, what: str = "") -> Change:
    return Change(what or f"`{key}`", rules, "set", key, value)


def _code(file: str, rules: str) -> Change:
    return Change(f"`egrpo/{file}`", rules, "code", file)


def _file(what: str, file: str, rules: str, value: Any = None) -> Change:
    return Change(what, rules, "edit", file, value)


GROUPS: dict[str, list[Change]] = {
    "Settings": [
        _set("model.dtype", "bfloat16", f"embed {MODEL}"),
        _set("model.height", 48, MODEL),
        _set("model.guidance_scale", 2.0, f"embed {MODEL}"),
        _set("model.lora.rank", 8, RUN),
        _set("model.lora.start", "toy/clip.pt", MODEL, "an adapter to start from"),
        _set("model.merge_lora_for_sampling", False, RUN),
        _set("model.device", "cuda", SHOWN),
        _set("model.vae_slicing", True, SHOWN),
        _set("model.max_sequence_length", 5, f"embed {MODEL}"),
        _set("schedule.shift", 2.0, MODEL),
        _set(
            "schedule.base_shift", 0.7, SHOWN, "`schedule.base_shift`, where the shift is a number"
        ),
        _set(
            "seeds",
            [0, 1],
            "tables figures pages publish",
            "one more seed: of the runs that are there",
        ),
        _set("methods.egrpo.group_size", 4, f"plan suffix_quality {RUN}"),
        _set("methods.egrpo.noise_level", 0.5, f"profile plan suffix_quality {RUN}"),
        _set("methods.egrpo.granularities", [2], f"plan suffix_quality {RUN}"),
        _set("methods.flow_grpo.group_size", 6, "", "settings of a method that no run has"),
        _set("advantage.clamp", 3.0, RUN),
        _set("train.rewards", {"jpeg": 1.0}, TRAINED),
        _set("train.rewards.verifier", 2.0, TRAINED, "the weight of a trained reward"),
        _set("train.iterations", 5, RUN, "`train.iterations`: training goes on"),
        _set("train.learning_rate_scale", 2.0, RUN),
        _set("train.learning_rate_full", 1e-3, SHOWN, "`train.learning_rate_full`, with LoRA"),
        _set("train.kl_weight", 0.1, RUN),
        _set("train.prompts_per_iteration", 3, RUN),
        _set("train.micro_batch", 7, SHOWN),
        _set("train.gradient_checkpointing", True, SHOWN),
        _set("train.checkpoint_every", 3, SHOWN),
        _set("train.monitor_every", 1, SHOWN),
        _set(
            "train.monitor_prompts",
            3,
            f"embed {SHOWN}",
            "`train.monitor_prompts`: embedded for later runs",
        ),
        _set("train.bounds", {"reward/jpeg": {"least": -9.0}}, TELL, "a bound that warns"),
        _set(
            "train.bounds",
            {"reward/jpeg": {"least": -9.0, "action": "stop"}},
            RUN,
            "a bound that stops, of a reward that is not trained",
        ),
        _set("train.snapshots", [400], RUN),
        _set("profile.samples", 4, f"profile plan {AUTO}"),
        _set("profile.micro_batch", 5, SHOWN),
        _set("profile.strides", [1, 2], f"suffix_quality {SHOWN}"),
        _set("evaluate.steps", 5, f"evaluate evaluate_base {TELL}"),
        _set("evaluate.samples", 2, f"evaluate evaluate_base {TELL}"),
        _set("evaluate.prompts", 5, HELDOUT_TEXTS),
        _set("evaluate.micro_batch", 5, SHOWN),
        _set("evaluate.grid_prompts", 1, TELL),
        _set("tracking.every_seconds", 9.0, SHOWN),
        _set("rewards.clip.batch", 5, SHOWN),
        _set("rewards.clip.dtype", "bfloat16", SCORES),
        _set("rewards.jpeg", None, SCORES, "a reward that is only evaluated, taken away"),
        _set(
            "rewards.more",
            {"kind": "jpeg_compressibility"},
            SCORES,
            "one more reward that is only evaluated",
        ),
        _set("tables.t.caption", "Another.", "tables pages publish", "the caption of a table"),
    ],
    "Files": [
        _file("weights of the transformer", "toy/pipeline/transformer/*.safetensors", MODEL),
        _file("weights of the VAE", "toy/pipeline/vae/*.safetensors", MODEL),
        _file("`config.json` of the VAE", "toy/pipeline/vae/config.json", MODEL),
        _file(
            "weights of a text encoder", "toy/pipeline/text_encoder/*.safetensors", f"embed {MODEL}"
        ),
        _file("vocabulary of a tokenizer", "toy/pipeline/tokenizer/vocab.json", f"embed {MODEL}"),
        _file("a README in the model's folder", "toy/pipeline/README.md", ""),
        _file(
            "a checkpoint that is no part of the pipeline", "toy/pipeline/extra/w.safetensors", ""
        ),
        _file("weights of an evaluated reward", "toy/clip.pt", SCORES),
        _file("a prompt to train on, one of the profiled", TRAIN, TRAIN_TEXTS, PURPLE),
        _file("one more prompt to train on", TRAIN, f"embed {RUN}", MORE),
        _file("empty lines among the prompts", TRAIN, "", ("append", "\n")),
        _file("one more held-out prompt", HELDOUT, HELDOUT_TEXTS, MORE),
        _file("a held-out prompt, one of the monitored", HELDOUT, HELDOUT_TEXTS, SMALLER),
        _file("the module of a reward of one's own", "own_reward.py", SCORES, HALVED),
        _file("a module that it imports", "own_helper.py", SCORES, ("replace", "1.0", "2.0")),
        _file("a file that its options name", "table.json", SCORES, ("replace", "1", "2")),
        _file("a comment in its module", "own_reward.py", "", ("append", "# a remark")),
    ],
    "Times and places": [
        Change("every file touched: model, rewards, prompts, results", "", "touch"),
        Change("every time set years back", "", "touch", value=-1e8),
        Change("results copied without their times", "", "copy"),
        Change("model, rewards and prompts moved, the settings name the new folder", SHOWN, "move"),
        Change("other content, an older time", TRAIN_TEXTS, "older", TRAIN),
        Change("a result of a run is lost", f"evaluate {TELL}", "lose", "scores.parquet"),
        Change("the adapter of a run is lost", RUN, "lose", "adapter"),
        Change("a file of a result is cut short", f"evaluate {TELL}", "cut", "images.parquet"),
        Change("a table is lost", "tables pages publish", "lose", "../../tables/t.parquet"),
    ],
    "Code": [
        Change("a comment, anywhere", "", "comment"),
        Change("a docstring, anywhere", "", "docstring"),
        _code("core/loss.py", f"plan suffix_quality {RUN}"),
        _code("core/advantage.py", f"plan suffix_quality {RUN}"),
        _code("core/executor.py", MODEL),
        _code("core/schedule.py", MODEL),
        _code("core/entropy.py", MODEL),
        _code("core/intervals.py", f"suffix_quality {TELL}"),
        _code("models/base.py", f"embed {MODEL}"),
        _code("models/adapter.py", f"embed {MODEL}"),
        _code("rewards/clip.py", SCORES),
        _code("world/verifier.py", MODEL.replace("plan", "plan(auto)")),
        _code("sampling/sample.py", MODEL),
        _code("train/trainer.py", RUN),
        _code("measure/embed.py", f"embed {MODEL}"),
        _code("measure/profile.py", f"profile plan {AUTO}"),
        _code("measure/evaluate.py", f"evaluate evaluate_base {TELL}"),
        _code("measure/suffixes.py", "suffix_quality"),
        _code("planning/plan.py", f"plan train(auto) evaluate(auto) suffix_quality {TELL}"),
        _code("report/results.py", "tables pages publish"),
        _code("figures/style.py", "figures pages publish"),
        _code("page/page.py", "pages"),
        _code("tracking/deliver.py", "publish"),
        _code("ops/doctor.py", ""),
        _code("study/layout.py", ""),
        _code("bundle/export.py", ""),
        _code("cli.py", ""),
    ],
}
"""All of them, by heading. Reading prompts, and what settings mean, count by what comes out of
them: prompts by their texts, the grid by its sigmas."""

INTRODUCTION = """\
# What a change makes run again

A result of this workflow is identified by what it is computed from: settings as they were resolved,
the content of files, code without comments and docstrings. Nothing else counts: no times, no
places, no settings that only say how work is cut or what is told. Each line below is a change to a
finished study; a mark says that the rule has something to do after it. `auto` marks a rule for runs
whose plan reads the measured profile (`threshold: auto`, `allocation: profile`) alone.

The table is held to the code by a test (`tests/test_identity.py`). `egrpo status` says of each run
what is stale and by what; `egrpo keep` keeps results that other code made, if you know that it
computes the same. Versions of torch, diffusers, transformers, peft, accelerate, numpy, open_clip
and CLIP are recorded with each result; another one is said in a line, or makes results again, as
`libraries` says. More iterations go on from the finished state; no method here schedules over the
whole of a training, so none starts anew for it.
"""


def marks(change: Change) -> dict[str, str]:
    """A change's rules: rule -> what its cell says."""
    words = (word.partition("(") for word in change.rules.split())
    return {rule: only.rstrip(")") or "x" for rule, _, only in words}


def changes_page() -> str:
    """The page, as Markdown."""
    lines = [INTRODUCTION]
    for heading, changes in GROUPS.items():
        body = [[cell(c.what), *(marks(c).get(rule, "") for rule in RULES)] for c in changes]
        lines += [f"## {heading}", "", *rows(["change", *(f"`{r}`" for r in RULES)], body), ""]
    return "\n".join(lines).rstrip() + "\n"
