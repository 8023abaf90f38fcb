"""What each result of a study is computed from: a record, whose digest is the result's identity.

A record is flat: what it is -> its value. Settings stand by their keys as they were resolved;
files by the digest of their content, wherever they lie; grids by their sigmas, prompts by their
texts; code by the digest of each room's modules that the stage needs. Where something lies, when
it was written, how work is cut to fit the memory, on which device, and what is only told, is in no
record.

Artifacts that several runs share (embeddings, profiles, evaluations of the base model) are named by
their identities. Those of a run lie under its name, and ``study/standing.py`` knows theirs.
"""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from egrpo.config.keys import digest
from egrpo.config.models import Model, RunConfig
from egrpo.config.prompts import Prompt, read_prompts, train_prompts
from egrpo.config.rewards import Custom, OpenClip, RewardSettings
from egrpo.planning.grids import evaluation_sigmas, learning_rate, monitor_sigmas, training_sigmas
from egrpo.planning.trees import reads_profile
from egrpo.study.code import COMPUTE, Code
from egrpo.study.digests import Digests

Record = dict[str, Any]

LIBRARIES = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "numpy"),
    *("open_clip_torch", "clip-anytorch"),
)
"""Libraries that compute, by the names of their distributions."""

SETS = ("train", "heldout", "monitor", "profile")
"""Sets of prompts that are embedded: those to train on, those evaluated, and the first of each
that are monitored and profiled. Each is named by its texts, so one more prompt at the end of a
file leaves the smaller sets as they are."""

CUT = frozenset(
    "micro_batch train_micro_batch decode_batch gradient_checkpointing vae_slicing device"
    " compile deterministic".split()
)
"""How the work is cut to fit the memory, and where it is done: this changes roundings and nothing
else, so a run goes on from its state after a change."""

TUNED = frozenset("tuning lora merge_lora_for_sampling feature_cache".split())
"""Settings of the model that only training reads."""

WATCHED = frozenset("monitor_every monitor_prompts monitor_samples bounds".split())
"""Settings of monitors: without a bound that stops, they change nothing that is trained."""

LATER = frozenset("iterations snapshots".split())
"""Settings of how far training goes: with more of it a run goes on from its state."""

BOTH = ("model_index.json", "transformer/config.json")
"""Files that prompts' embeddings and images both need."""
TEXT_PARTS = ("text_encoder", "tokenizer", "scheduler", "feature_extractor", "image_encoder")
"""Parts of a pipeline that its prompts' embeddings need; the others make images."""


MISSING = "not installed"


def installed(name: str) -> str:
    """Version of a distribution; no import of it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return MISSING


@functools.cache
def versions() -> dict[str, str]:
    """Public versions of the libraries that compute."""
    return {name: installed(name).partition("+")[0] for name in LIBRARIES}


@dataclass(frozen=True)
class Sources:
    """Digests of what an evaluation is computed from, in parts that are kept apart.

    ``images``: weights, settings, code, all but the prompts; of each prompt; of rewards by name.
    """

    images: str
    prompts: tuple[str, ...]
    rewards: Mapping[str, str]

    def head(self) -> dict[str, str]:
        """As tables hold them."""
        return {
            "images_of": self.images,
            "prompts_of": json.dumps(self.prompts),
            "rewards_of": json.dumps(dict(self.rewards)),
        }


class Identities:
    """Records and identities of the results of runs, by digests of files.

    ``libraries``: versions of libraries are part of each (the study's ``libraries: remake``).
    """

    def __init__(self, digests: Digests, *, libraries: bool = False) -> None:
        self.digests, self.code, self.libraries = digests, Code(digests), libraries
        self._files = functools.cache(digests.files)
        self._train_prompts = functools.cache(train_prompts)
        self._heldout_prompts = functools.cache(read_prompts)
        self._found: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What was found under a key; found once, while files stay."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def record(self, stage: str, run: RunConfig) -> Record:
        """What a stage's result of a run is computed from; UserError if a file cannot be read."""
        if not stage.startswith("embed-"):
            return RECORDS[stage](self, run)
        of = run.model, run.prompts, run.guided, self._count(run, stage[6:])
        return self._once((stage, repr(of)), lambda: RECORDS[stage](self, run))

    def of(self, stage: str, run: RunConfig) -> str:
        """The identity of a stage's result of a run."""
        return self._once(("of", stage, run.run), lambda: digest(self.record(stage, run)))

    def sources(self, run: RunConfig, weights: str | None) -> Sources:
        """What an evaluation by weights with this digest is computed from; None: the base's."""
        record = sampled(self, run)
        images = {k: v for k, v in record.items() if "prompts (" not in k}
        return Sources(
            digest({**images, "weights": weights}),
            tuple(map(digest, self.texts(run, "heldout"))),
            {name: digest(self.reward(reward)) for name, reward in run.rewards.items()},
        )

    def branched(self, run: RunConfig, rewards: Collection[str], but: set[str]) -> Record:
        """What branches of profiled prompts are computed from, but for some settings."""
        return {
            **self.images(run.model, run),
            **within("embeddings", self.record("embed-profile", run)),
            **flat("profile", run.profile.model_dump(exclude=but | CUT)),
            "sigmas": list(training_sigmas(run)),
            **self.rewards(run, rewards),
        }

    # -- parts of records ------------------------------------------------------------------

    def stage(self, module: str, run: RunConfig | None = None) -> Record:
        """The code of a stage, of a run's method where that takes part, and the libraries."""
        method = () if run is None else (type(run.method).__module__,)
        found = self.code.rooms(module, *method)
        named = {f"library {k}": v for k, v in versions().items()} if self.libraries else {}
        return {**found, **named}

    def prompts(self, run: RunConfig, which: str) -> list[Prompt]:
        """The prompts of one of the :data:`SETS`; UserError if their file cannot be read."""
        files = run.prompts
        if which in ("train", "profile"):
            found = self._train_prompts(files.train, files.limit, files.column)
        else:
            found = self._heldout_prompts(files.heldout, files.column)
        return found[: self._count(run, which)]

    @staticmethod
    def _count(run: RunConfig, which: str) -> int | None:
        return {
            "train": None,
            "heldout": run.evaluate.prompts,
            "monitor": run.train.monitor_prompts if run.train.monitor_every else 1,
            "profile": run.profile.prompts,
        }[which]

    def texts(self, run: RunConfig, which: str) -> list[list[str]]:
        """Text and negative text of each prompt of a set, as the model is given them."""
        found = self.prompts(run, which)
        return [[p.text, p.negative if run.guided else ""] for p in found]

    def model_files(self, model: Model, *, text: bool) -> Record:
        """Digests of the files of a pipeline's parts: those for prompts, or those for images."""
        start = model.lora.start if model.tuning == "lora" and not text else None
        of_start = {"model.lora.start": self.digests.file(Path(start))} if start else {}
        if not os.path.isdir(model.path):
            return {"model.path": f"{model.path} {model.revision}", **of_start}
        return of_start | {
            f"model.path {name}": found
            for name, found in self._files(model.path).items()
            if name.partition("/")[0].startswith(TEXT_PARTS) == text or name in BOTH
        }

    def images(self, model: Model, run: RunConfig, *, tuned: bool = False) -> Record:
        """What a model computes images from: its settings and files."""
        skipped = {"path", "revision", "max_sequence_length", *CUT}
        dumped = model.model_dump(exclude=skipped | (set() if tuned else TUNED))
        dumped.get("lora", {}).pop("start", None)  # by its content
        return {**flat("model", dumped), **self.model_files(model, text=False)}

    def rewards(self, run: RunConfig, names: Collection[str]) -> Record:
        """What some rewards compute their scores from."""
        return {
            f"rewards.{name}{key}": value
            for name in sorted(names)
            for key, value in self.reward(run.rewards[name]).items()
        }

    def reward(self, settings: RewardSettings) -> Record:
        """What one reward computes its scores from; keys begin with a dot or a blank."""
        return self._once(repr(settings), lambda: dict(self._reward(settings)))

    def _reward(self, reward: RewardSettings) -> Iterator[tuple[str, Any]]:
        named = reward.files
        if isinstance(reward, OpenClip) and os.path.isfile(reward.architecture):
            named = {**named, "architecture": reward.architecture}
        local = [(key, path) for key, path in named.items() if os.path.exists(path)]
        settings = reward.model_dump(exclude={*reward.unscored, *(key for key, _ in local)})
        yield from ((f".{key}", value) for key, value in settings.items())
        code = self.code.rooms(f"egrpo.rewards.{reward.module}")
        if isinstance(reward, Custom):
            code = code | self.code.own(reward.function.partition(":")[0])
            paths = filter(os.path.exists, sorted(set(texts_in(reward.options))))
            local += [(f"options {os.path.basename(path)}", path) for path in paths]
        yield from ((f" {key}", found) for key, found in code.items())
        files: dict[str, list[str]] = defaultdict(list)  # of options, several of one name
        for key, path in local:
            for name, found in self._files(path).items():
                files[f".{key} {name}".rstrip()].append(found)
        yield from ((key, " ".join(found)) for key, found in files.items())


# -- records of the stages ------------------------------------------------------------------


def embedded(which: str, self: Identities, run: RunConfig) -> Record:
    """What one set's embeddings are computed from."""
    model = run.model.model_dump(include={"family", "dtype", "max_sequence_length"})
    return {
        **flat("model", model),
        **self.model_files(run.model, text=True),
        f"prompts ({which})": digest(self.texts(run, which)),
        "negative prompts": run.guided,
        **self.stage("egrpo.measure.embed"),
    }


def profiled(self: Identities, run: RunConfig, rewards: Collection[str]) -> Record:
    """What a profile is measured from, as far as it is of some rewards."""
    method = run.method.model_dump(include={"dynamics", "noise_level"})
    return {
        **self.branched(run, rewards, {"strides", "solvers", "features", "fp8"}),
        **flat("method", method),
        **self.stage("egrpo.measure.profile"),
    }


def planned(self: Identities, run: RunConfig) -> Record:
    """What a merge plan is made from: settings, and the profile, for its grid or its spreads."""
    method = {k: v for k, v in run.method.model_dump().items() if k != "name"}
    rewards = run.train.rewards if reads_profile(run) else {}
    return {
        **flat("method", method),
        **flat("train.rewards", rewards),
        **within("profile", profiled(self, run, rewards)),
        **self.stage("egrpo.planning.plan", run),
    }


def trajectory(self: Identities, run: RunConfig) -> Record:
    """What the weights of each iteration are computed from, however many there will be."""
    t = run.train
    stops = {name: bound for name, bound in run.bounds.items() if bound.action == "stop"}
    watched = (name.removeprefix("reward/") for name in stops if name.startswith("reward/"))
    other = {"rewards", "checkpoint_every", "learning_rate_full", "learning_rate_lora"}
    other |= {"learning_rate_scale", *LATER, *CUT, *WATCHED}
    found = {
        **self.images(run.model, run, tuned=True),
        **within("embeddings", self.record("embed-train", run)),
        **flat("method", run.method.model_dump()),
        **flat("advantage", run.advantage.model_dump()),
        **flat("train", t.model_dump(exclude=other)),
        **flat("train.rewards", t.rewards),
        "train.learning_rate": learning_rate(run),
        "seed": run.seed,
        "sigmas": list(training_sigmas(run)),
        **self.rewards(run, {*t.rewards, *watched}),
        **self.stage("egrpo.train.job", run),
    }
    if reads_profile(run):
        found |= within("plan", planned(self, run))
    if stops:
        found |= {f"train.bounds.{name}": bound.model_dump() for name, bound in stops.items()}
        found |= flat("train", t.model_dump(include=set(WATCHED - {"bounds"})))
        found |= within("monitors", self.record("embed-monitor", run))
        found["monitors: sigmas"] = list(monitor_sigmas(run))
    return found


def trained(self: Identities, run: RunConfig) -> Record:
    """What a finished training is computed from."""
    later = run.train.model_dump(include=set(LATER))
    return {**self.record("trajectory", run), **flat("train", later)}


def sampled(self: Identities, run: RunConfig) -> Record:
    """What the images of an evaluation are computed from, but for the weights that were trained."""
    model = run.evaluation_model
    return {
        **self.images(model, run),
        **flat("evaluate", run.evaluate.model_dump(include={"samples"})),
        "evaluation sigmas": list(evaluation_sigmas(run)),
        **within("embeddings", self.record("embed-heldout", run)),
        **self.stage("egrpo.measure.evaluate"),
    }


def base(self: Identities, run: RunConfig) -> Record:
    """What the scores of the base model are computed from."""
    return {**sampled(self, run), **self.rewards(run, run.rewards)}


def evaluated(self: Identities, run: RunConfig) -> Record:
    """What the scores of a trained run are computed from."""
    return {"training": self.of("train", run), **base(self, run)}


def compared(self: Identities, run: RunConfig) -> Record:
    """What a comparison of suffixes is computed from."""
    return {
        **self.branched(run, run.rewards, set()),
        **flat("method", run.method.model_dump()),
        "plan": self.of("plan", run),
        **self.stage("egrpo.measure.suffixes"),
    }


RECORDS: dict[str, Callable[[Identities, RunConfig], Record]] = {
    **{f"embed-{which}": functools.partial(embedded, which) for which in SETS},
    "profile": lambda self, run: profiled(self, run, run.rewards),
    "plan": planned,
    "suffixes": compared,
    "trajectory": trajectory,
    "train": trained,
    "sampled": sampled,
    "evaluate": evaluated,
    "base": base,
}
"""What each stage's result of a run is computed from."""


# -- helpers --------------------------------------------------------------------------------


def within(part: str, record: Record) -> Record:
    """A record as part of another one."""
    return {f"{part}: {key}": value for key, value in record.items()}


def flat(key: str, value: Any) -> Record:
    """A section by dotted keys."""
    if not isinstance(value, Mapping):
        return {key: list(value) if isinstance(value, tuple) else value}
    found: Record = {}
    for name, below in value.items():
        found |= flat(f"{key}.{name}", below)
    return found


def texts_in(value: Any) -> list[str]:
    """Every text in a setting, at any depth."""
    if isinstance(value, str):
        return [value] if value else []
    parts: Iterable[Any] = value if isinstance(value, Sequence) else ()
    parts = value.values() if isinstance(value, Mapping) else parts
    return [text for part in parts for text in texts_in(part)]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two records, one short text each: ``key old → new``."""
    both = {key: (before.get(key, "none"), now.get(key, "none")) for key in {*before, *now}}
    return [
        f"{key} {_short(old)} → {_short(new)}"
        for key, (old, new) in sorted(both.items())
        if old != new
    ]


def is_code(key: str) -> bool:
    """Whether a key of a record names code of this package."""
    before, mark, room = key.rpartition("code ")
    return bool(mark) and room in COMPUTE and (not before or before[-1] == " ")


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
