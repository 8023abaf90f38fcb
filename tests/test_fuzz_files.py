"""Damaged and hostile files: refused in one line, or read as they were written; nothing runs.

Settings and runs tables: ``test_fuzz.py``.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, small_run, write_run
from safetensors.torch import load_file, save_file
from tiny_models import TINY_OPEN_CLIP
from torch import Tensor, nn

from egrpo.cli import main
from egrpo.config.load import load_run
from egrpo.config.prompts import Prompt, read_prompts
from egrpo.config.rewards import REWARD_MODELS
from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.errors import UserError
from egrpo.models import load_model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning, load_conditioning, save_conditioning
from egrpo.planning.plan import grid_of, load_plan, measured_spread, plan
from egrpo.rewards import load_reward
from egrpo.rewards.network import read_state
from egrpo.rewards.torchscript import read_torchscript
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.files import write_json
from egrpo.store.tables import ENTROPY_PROFILE, TRAIN_METRICS, read_table, write_table
from egrpo.store.weights import read_header, read_part

TOY = ROOT / "assets/toy"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
    pytest.mark.filterwarnings("ignore:Validating sparse tensor"),
]


class Bomb:
    """Makes a folder when a pickle of it is read."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.where,)


def bombs(where: Path) -> Iterator[bytes]:
    """Pickles, bare and in the containers of weights, that make a folder when they are read."""
    for protocol in (0, 2, 5):
        yield pickle.dumps(Bomb(where), protocol)
    for value in (Bomb(where), {"state_dict": Bomb(where)}, {"a": torch.ones(2), "b": Bomb(where)}):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=new)
            yield buffer.getvalue()


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Path]:
    """The folder that they make; no test lets one do so."""
    yield tmp_path / "went-off"
    assert not (tmp_path / "went-off").exists()


def damaged(whole: bytes, flips: int = 40) -> Iterator[bytes]:
    """Truncated, bit-flipped and swollen copies."""
    rng = np.random.default_rng(len(whole))
    for at in sorted({0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1}):
        yield whole[:at]
    places = [(0, len(whole)), (0, min(2000, len(whole))), (max(0, len(whole) - 4000), len(whole))]
    for number in range(flips):
        spoilt = bytearray(whole)
        for at in rng.integers(*places[number % 3], rng.integers(1, 4)):
            spoilt[at] ^= 1 << int(rng.integers(0, 8))
        yield bytes(spoilt)
        start = int(rng.integers(0, len(whole)))
        yield whole[:start] + whole[start + int(rng.integers(1, 9)) :]
    yield whole + b"\0"
    yield b"\xff" * 64
    yield b"[" * 100_000
    yield (2**63 - 1).to_bytes(8, "little") + whole[8:]
    yield b"PK\x03\x04" + whole


def refusal(load: Callable[[], object], *names: object) -> str | None:
    """The line that refuses a file and names it, or None if it was read."""
    try:
        load()
    except UserError as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 2000
        assert any(str(name) in text for name in names), text
        return text
    return None


Loader = tuple[Path, Callable[[], Any], bool]
"""A file, how it is read, and whether a change of any byte must be seen."""


def _adapter(folder: Path) -> Loader:
    run = small_run()
    model = load_model(run.model)
    model.prepare_training(0)
    model.save(folder)

    whole = load_model(run.model)

    def load() -> Any:
        parts = copy.deepcopy((whole.transformer, whole.vae))
        model = type(whole)(run.model, parts=parts)
        model.load(folder)
        return model.transformer.state_dict()

    return folder / "pytorch_lora_weights.safetensors", load, True


def _full(folder: Path) -> Loader:
    model = load_model(small_run(**{"model.tuning": "full"}).model)
    with pytest.raises(UserError, match=str(folder)):
        model.load(folder)
    model.save(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    tensors.pop(min(tensors))
    save_file(tensors, path)
    assert "weights are missing" in str(refusal(lambda: model.load(folder), folder))
    path.write_bytes(whole)
    return path, lambda: model.load(folder), False


def _header(folder: Path) -> Loader:
    path = folder / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 3)}, path)
    return path, lambda: read_header(path), False


def _embeddings(folder: Path) -> Loader:
    path = folder / "e.safetensors"
    prompts = [Prompt("a"), Prompt("b")]
    train = Conditioning({"embeds": torch.randn(2, 3, 4), "pooled": torch.randn(2, 4)}, {})
    save_conditioning(path, prompts, train)

    def load() -> Any:
        texts, found = load_conditioning(path)
        return texts, found.tensors

    return path, load, True


def _config(folder: Path) -> Loader:
    path = write_run(small_run(), folder / "config.yaml")
    return path, lambda: load_run(path), False


PROMPT_FILES = {
    "p.jsonl": "\n".join(f'{{"prompt": "a cat {n}", "negative_prompt": "dog"}}' for n in range(5)),
    "p.json": '{"prompt": ["a cat", "ein Bär"], "negative_prompt": ["dog", null]}',
    "p.csv": 'id,prompt,negative_prompt\n1,"a cat, ""small""",dog\n2,狐狸,\n',
    "p.txt": "a cat\nein Bär\n狐狸\n",
}


def _prompts(name: str, folder: Path) -> Loader:
    path = folder / name
    path.write_text(PROMPT_FILES[name])
    return path, lambda: read_prompts(path), False


def _table(folder: Path) -> Loader:
    path = folder / "t.parquet"
    rest = {"metric": "loss", "value": 1 / 7}
    rows = [{"run": f"a{n}", "iteration": n, "nfe": 2 * n, **rest} for n in range(300)]
    write_table(path, TRAIN_METRICS, rows, metadata={"config_hash": "x"})

    def load() -> Any:
        found = read_table(path, TRAIN_METRICS)
        return found.to_pylist(), found.schema.metadata[b"config_hash"]

    return path, load, True


def profile_rows() -> list[dict[str, Any]]:
    grid = shifted_sigmas(16, 3.0)
    return [
        {
            **{"step": step, "span": span, "sigma": grid[step], "sigma_stop": grid[step + span]},
            **{"std": 0.1, "exp_per_dim": 2.5 - step / 9, "nats_per_dim": 0.1, "variance": 0.2},
            **{"prompt_id": prompt, "quantity": "reward:verifier"},
            **{"spread": 0.3 - step / 90, "yardstick": 0.1},
        }
        for prompt in range(2)
        for step in range(8)
        for span in (1, 2)
    ]


PROFILE_HEAD = {
    "sigmas": json.dumps(shifted_sigmas(16, 3.0)),
    "dynamics": "flow_sde",
    "noise_level": "0.7",
}


def _profile(folder: Path) -> Loader:
    path = folder / "entropy_profile.parquet"
    write_table(path, ENTROPY_PROFILE, profile_rows(), metadata=PROFILE_HEAD)
    run = small_run(**{"method.threshold": "auto"})

    def load() -> Any:
        plan(run, path, folder / "plan.json", folder / "plan.parquet")
        return (folder / "plan.json").read_text()

    return path, load, True


def _plan(folder: Path) -> Loader:
    path = folder / "plan.json"
    made = make_plan(shifted_sigmas(16, 3.0), range(8), threshold=2.2, noise_level=0.7)
    write_json(path, made.to_dict())
    return path, lambda: load_plan(path), False


def _preference(folder: Path) -> Loader:
    path = folder / "preference.safetensors"
    shutil.copy(TOY / "preference.safetensors", path)
    return path, lambda: reward("preference", path=path), False


def reward(kind: str, **given: Any) -> Any:
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    return load_reward(REWARD_MODELS[kind].model_validate({"kind": kind, **given}), "cpu")


def _clip(folder: Path) -> Loader:
    """A plain table of weights in torch's format."""
    path = folder / "clip.pt"
    torch.save(tiny_clip().state_dict(), path)
    return path, lambda: reward("clip", path=path).clip.model.state_dict(), True


def _torchscript(folder: Path) -> Loader:
    """The container of OpenAI's weights."""
    path = folder / "script.pt"
    traced(tiny_clip()).save(path)
    return path, lambda: reward("clip", path=path).clip.model.state_dict(), True


def _head(folder: Path) -> Loader:
    path = folder / "head.pth"
    head = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 1))
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, path)
    given = {"path": path, "clip": TOY / "clip.pt"}
    return path, lambda: reward("aesthetic", **given).head.state_dict(), True


LOADERS: dict[str, Callable[[Path], Loader]] = {
    **{name: partial(_prompts, name) for name in PROMPT_FILES},
    **{made.__name__: made for made in (_adapter, _full, _config, _header, _embeddings, _table)},
    **{made.__name__: made for made in (_profile, _plan, _preference, _clip, _torchscript, _head)},
}


SLOW = {"_head": 6, "_full": 6, "_adapter": 12}
"""Loaders that take long, and how often their files are damaged."""


def tiny_clip() -> Any:
    from clip.model import CLIP

    torch.manual_seed(0)
    return CLIP(16, 32, 1, 64, 16, 77, 100, 64, 1, 1).eval()


def traced(model: Any) -> Any:
    image, text = torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long)
    inputs = {"encode_image": image, "encode_text": text, "forward": (image, text)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace_module(model, inputs, check_trace=False)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files(name, tmp_path, bomb):
    path, load, exact = LOADERS[name](tmp_path)
    good = load()
    whole, refused = path.read_bytes(), 0
    for content in damaged(whole, SLOW.get(name, 40)):
        path.write_bytes(content)
        found: list[Any] = []
        message = refusal(lambda: found.append(load()), path.name, tmp_path)  # noqa: B023
        refused += message is not None
        if message is None and exact:
            assert equal(found[0], good)
    assert refused >= 8
    for content in bombs(bomb):
        path.write_bytes(content)
        message = refusal(load, path.name, tmp_path)
        assert message is not None or name == "p.txt"


def test_damaged_checkpoints_are_passed_over(tmp_path, capsys, bomb):
    kept = checkpoints.Checkpoint(1, {"weight/0": torch.arange(6.0)}, {"seconds": 1.0})
    newer = checkpoints.Checkpoint(2, {"weight/0": torch.arange(6.0) + 1}, {"seconds": 2.0})
    whole = checkpoints.save(tmp_path, newer).read_bytes()
    for content in [*damaged(whole), *bombs(bomb)]:
        for old in tmp_path.iterdir():
            old.unlink()
        checkpoints.save(tmp_path, kept)
        checkpoints.save(tmp_path, newer).write_bytes(content)
        found = checkpoints.latest(tmp_path)
        assert found is not None
        assert found.iteration == 1
        assert torch.equal(found.tensors["weight/0"], torch.arange(6.0))
        assert "damaged checkpoint passed over" in capsys.readouterr().err


def test_damaged_journals_keep_what_is_whole(tmp_path):
    path = tmp_path / "journal.jsonl"
    lines = [{"iteration": n, "metrics": {"loss": 0.5 + n}} for n in range(9)]
    for line in lines:
        journal.append(path, line)
    whole = path.read_bytes()
    for content in [*damaged(whole), b"[1]\n", b'{"iteration": "x"}\n']:
        path.write_bytes(content)
        found = list(journal.read(path))
        assert all(line in lines for line in found), "what is read is what was written"
        untouched = [text for text in whole.splitlines() if text in content]
        assert len(found) >= len(untouched)
        journal.rewind(path, 3)
        assert list(journal.read(path)) == [line for line in found if line["iteration"] <= 3]


# -- whole files that say something else -----------------------------------------------------------


def test_tables_of_other_columns_are_refused_by_them(tmp_path):
    path, load, _ = _table(tmp_path)
    data = pq.read_table(path)
    head = {k: v for k, v in data.schema.metadata.items() if k != b"sha256"}
    data = data.replace_schema_metadata(head)
    values = pa.array(["x"] * len(data))
    for changed, column in (
        (data.drop_columns("value"), "value is missing"),
        (data.set_column(4, "value", values), "value is string"),
        (data.set_column(1, "iteration", pa.nulls(len(data), pa.int32())), "iteration has empty"),
    ):
        pq.write_table(changed, path)
        assert f"column {column}" in str(refusal(load, path))
    pq.write_table(data.replace_schema_metadata({"schema": b"\xff"}), path)
    assert "damaged Parquet" in str(refusal(load, path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sigmas", v) for v in (None, "", "[", "3", "[1, 0.5]", '["a"]', "{}", "[" * 10**5)),
        *(("dynamics", v) for v in (None, "ode", "x")),
        *(("noise_level", v) for v in (None, "x", "nan", "-1", "inf")),
    ],
)
def test_profiles_that_do_not_say_their_grid(key, value, tmp_path):
    path = tmp_path / "entropy_profile.parquet"
    head = {k: v for k, v in {**PROFILE_HEAD, key: value}.items() if v is not None}
    write_table(path, ENTROPY_PROFILE, profile_rows(), metadata=head)
    assert "does not say its grid" in str(refusal(lambda: grid_of(path), path))
    done = CliRunner().invoke(main, ["plan", "--profile", str(path)])
    assert done.exit_code == 2
    assert done.output.startswith(f"egrpo: {path}: does not say its grid")
    assert done.output.count("\n") == 1


def test_profiles_without_entropy_or_spread(tmp_path):
    path = tmp_path / "entropy_profile.parquet"
    for key, wrong, reason in (("variance", None, "without entropy"), ("yardstick", 0.0, "is 0")):
        rows = [{**row, key: wrong} for row in profile_rows()]
        write_table(path, ENTROPY_PROFILE, rows, metadata=PROFILE_HEAD)
        message = refusal(lambda: measured_spread(path, {"verifier": 1.0}), path)
        assert reason in str(message)


# -- weights ---------------------------------------------------------------------------------------


class Setter(nn.Module):
    """A TorchScript module that writes a file when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.ones(2)

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.x, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.x = state[0]
        self.training = state[1]
        torch.save(self.x, "WENT-OFF")

    def forward(self) -> Tensor:
        return self.x


def test_torchscript_is_read_as_torch_reads_it_and_its_code_never_runs(tmp_path, monkeypatch):
    script = traced(tiny_clip())
    script.save(tmp_path / "good.pt")
    assert equal(read_torchscript(str(tmp_path / "good.pt")), dict(script.state_dict()))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Setter()).save(tmp_path / "evil.pt")
        torch.jit.load(tmp_path / "evil.pt")
    (tmp_path / "WENT-OFF").unlink()  # it does go off where it is read by torch
    for kind, more in (("clip", {}), ("hpsv2", {"architecture": architecture(tmp_path)})):
        load = partial(reward, kind, path=tmp_path / "evil.pt", **more)
        assert refusal(load, "evil.pt") is not None
    assert not (tmp_path / "WENT-OFF").exists()


def test_torchscript_whose_pickle_calls_functions(tmp_path):
    traced(tiny_clip()).save(tmp_path / "good.pt")
    calls = {
        "reduce": pickle.dumps(Bomb(tmp_path / "went-off"), 2),
        "global": b"\x80\x02cos\nmkdir\n(X\x08\x00\x00\x00went-offtR.",
        "builtin": b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        "storage": b"\x80\x02ctorch\nload\n.",
        "attribute": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    }
    for name, content in calls.items():
        path = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(tmp_path / "good.pt") as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.namelist():
                new.writestr(entry, content if entry == "good/data.pkl" else old.read(entry))
        assert "cannot be read" in str(refusal(lambda: read_state(str(path)), path))  # noqa: B023
    assert not any((folder / "went-off").exists() for folder in (tmp_path, Path()))


def architecture(folder: Path) -> Path:
    path = folder / "fuzz-tiny.json"
    path.write_text(json.dumps(TINY_OPEN_CLIP))
    return path


STRANGE: dict[str, Any] = {
    "list": [torch.ones(2)],
    "number": 3,
    "tensor": torch.ones(3),
    "numbers": {"a": 1},
    "keys": {1: torch.ones(2)},
    "state list": {"state_dict": [1]},
    "state numbers": {"state_dict": {"a": "b"}},
    "state none": {"state_dict": None},
    "empty": {},
    "other": {"layers.0.weight": torch.ones(3), "layers.0.bias": torch.ones(3)},
    "odd": {"layers.x.weight": torch.ones(1, 2), "layers.": torch.ones(1), "layers": torch.ones(1)},
    "chain": {
        **{"layers.0.weight": torch.ones(3, 64), "layers.0.bias": torch.ones(3)},
        **{"layers.1.weight": torch.ones(1, 2), "layers.1.bias": torch.ones(1)},
    },
    "blip": {
        "blip.visual_encoder.patch_embed.proj.weight": torch.ones(3),
        "blip.visual_encoder.pos_embed": torch.ones(3),
        "blip.visual_encoder.blocks.x": torch.ones(3),
        "blip.visual_encoder.blocks.0.mlp.fc1.weight": torch.ones(()),
        "blip.text_encoder.embeddings.word_embeddings.weight": torch.ones(3),
    },
    "sparse": {"layers.0.weight": torch.eye(64).to_sparse(), "layers.0.bias": torch.ones(1)},
    "complex": {"visual.proj": torch.ones(2, dtype=torch.complex64)},
}


@pytest.mark.parametrize("kind", ["clip", "hpsv2", "aesthetic", "imagereward"])
def test_weights_of_strange_content(kind, tmp_path, bomb):
    path = tmp_path / "w.pt"
    more = {
        "hpsv2": {"architecture": architecture(tmp_path)},
        "aesthetic": {"clip": TOY / "clip.pt"},
        "imagereward": {"tokenizer": TOY / "pipeline/tokenizer"},
    }
    load = partial(reward, kind, path=path, **more.get(kind, {}))
    for name, content in STRANGE.items():
        torch.save(content, path)
        assert refusal(load, path), name
    for content in bombs(bomb):
        path.write_bytes(content)
        assert refusal(load, path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "3", "{}", "\0", '{"embed_dim": 16}', "[" * 10**5, "null"),
        '{"embed_dim": "x", "vision_cfg": {}, "text_cfg": {}}',
        '{"embed_dim": 16, "vision_cfg": {"width": -1}, "text_cfg": {}}',
        '{"embed_dim": 16, "vision_cfg": {"nothing": 1}, "text_cfg": {}}',
    ],
)
def test_architectures_and_text_configs(text, tmp_path):
    weights, path = tmp_path / "w.pt", tmp_path / "fuzz-odd.json"
    torch.save({"a": torch.ones(2)}, weights)
    path.write_text(text)
    load = partial(reward, "hpsv2", path=weights, architecture=path)
    assert "fuzz-odd" in str(refusal(load, "architecture"))


def test_hostile_safetensors_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for header in (
        *([], 3, None, {"a": 3}, {"a": {}}, {"a": {**good, "shape": 3}}),
        *({"a": {**good, "shape": [-1]}}, {"a": {**good, "shape": ["x"]}}),
        *({"a": {**good, "data_offsets": v}} for v in ([], [4], "04", [0, "4"], [0, 2**62], None)),
    ):
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
        assert refusal(lambda: read_header(path), path) is not None, header


# -- models in diffusers' format -------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return shutil.copytree(TOY / "pipeline", tmp_path / "pipeline")


@pytest.fixture
def load(pipeline: Path) -> Callable[..., FlowModel]:
    """Loads the toy's model from there."""
    return partial(load_model, small_run().model.model_copy(update={"path": str(pipeline)}))


@pytest.fixture
def encode(load: Callable[..., FlowModel]) -> Callable[[], object]:
    """Encodes a prompt, for which the text encoders alone are loaded."""
    return lambda: load(text=True).encode([Prompt("a red circle")], negative=False)


def edits(text: str) -> Iterator[str]:
    """A JSON file with values of other kinds in every place, without each key, and damaged."""
    config = json.loads(text)
    keys = [key for key in config if not key.startswith("_diffusers")]
    for n, key in enumerate(keys):
        yield json.dumps({**config, key: [None, "x", -1, [], {}, 10**12][n % 6]})
    for key in keys[::4]:
        yield json.dumps({k: v for k, v in config.items() if k != key})
    yield from ("", "[]", "3", "null", "{", "\0", "[" * 10**5, text[: len(text) // 2])


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_damaged_configs_of_a_model(part, pipeline, load, encode):
    path, refused = pipeline / part / "config.json", 0
    for text in edits(path.read_text()):
        path.write_text(text)
        refused += refusal(load, pipeline, "model.") is not None
        refusal(lambda: read_part(pipeline, part), path)
        if part == "transformer":
            refusal(encode, pipeline, "model.")
    assert refused > 10


def test_damaged_weights_and_index_of_a_model(pipeline, load, bomb):
    path = pipeline / "vae/diffusion_pytorch_model.safetensors"
    good = path.read_bytes()
    for content in [*damaged(good, 6), *bombs(bomb)]:
        path.write_bytes(content)
        refusal(load, path.parent)
    path.unlink()
    for content in bombs(bomb):  # in the place of the weights that are used
        path.with_suffix(".bin").write_bytes(content)
        assert refusal(load, path.parent) is not None
    path.write_bytes(good)
    index = path.with_suffix(".safetensors.index.json")
    maps = ("[]", '{"a": "../../x"}', '{"a": 3}', '{"a": "\\u0000"}')
    for text in ("", "[]", "{}", *(f'{{"weight_map": {each}}}' for each in maps)):
        index.write_text(text)
        assert refusal(lambda: read_part(pipeline, "vae"), index) is not None, text
        refusal(load, path.parent)


def test_text_encoders_run_nothing_of_the_folder(pipeline, encode, bomb):
    """Pickled weights, code beside them, and damage."""
    encode()
    code = f"import os\nos.mkdir({str(bomb)!r})\n"
    index, encoder = pipeline / "model_index.json", pipeline / "text_encoder"
    good = index.read_text()
    for text in ("", "[]", "{}", "null", "[" * 10**5, good[:40]):
        index.write_text(text)
        assert refusal(encode, pipeline) is not None
    for name in ("text_encoder", "scheduler"):
        (pipeline / name / "evil.py").write_text(code + "class Evil: pass\n")
        index.write_text(json.dumps({**json.loads(good), name: ["evil", "Evil"]}))
        assert refusal(encode, pipeline) is not None
    (pipeline / "pipeline.py").write_text(code)
    index.write_text(json.dumps({**json.loads(good), "_class_name": ["pipeline", "Evil"]}))
    refusal(encode, pipeline)
    index.write_text(good)
    config = json.loads((encoder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    (encoder / "config.json").write_text(json.dumps(config))
    refusal(encode, pipeline)
    for file in encoder.glob("*.safetensors"):
        file.unlink()
    for content in bombs(bomb):
        (encoder / "pytorch_model.bin").write_bytes(content)
        assert refusal(encode, pipeline) is not None
