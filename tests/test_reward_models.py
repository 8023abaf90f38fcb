"""Rewards from published file formats, against the reference libraries' own computation.

Checkpoints are tiny and random, with the keys and containers of the published ones.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any

import clip
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_fuzz_files import bombs, reward
from tiny_models import TINY_OPEN_CLIP, sizes, special
from torch import Tensor, nn

from egrpo.config import rewards as settings
from egrpo.errors import UserError
from egrpo.images import DECODED, FINE, LATENT, Images
from egrpo.rewards import load_reward, score_all
from egrpo.rewards.open_clip import OpenClip, padded_square
from egrpo.rewards.unifiedreward import UnansweredError, score_in

CLIP = "assets/toy/clip.pt"
PROMPTS = ["a red fox", "", "狐狸 in 雪 — ünïcode", "very long " * 100, "a red fox"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's images."""
SIZES = [(32, 32), (48, 20), (20, 48)]
"""Height and width: square at the model's resolution, tall, wide."""


def pictures(height: int, width: int) -> Tensor:
    """Smooth random images uint8 [5, 3, height, width]."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    small = torch.rand(len(PROMPTS), 3, 5, 7, generator=generator)
    big = nn.functional.interpolate(small, size=(height, width), mode="bicubic")
    return (big.clamp(0, 1) * 255).round().to(torch.uint8)


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def refused(match: str, kind: str, **given: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        reward(kind, **given)
    assert "\n" not in str(caught.value)


# -- open_clip and HPSv2.1 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "egrpo-tiny.json").write_text(json.dumps(TINY_OPEN_CLIP))
    open_clip.add_model_config(folder)
    return "egrpo-tiny"


@pytest.fixture(scope="module")
def open_clip_model(architecture: str) -> Any:
    torch.manual_seed(0)
    return open_clip.create_model_and_transforms(architecture)


@pytest.fixture(scope="module")
def hps_file(open_clip_model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """HPSv2's container: the weights under ``state_dict``, beside other things."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": open_clip_model[0].state_dict()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("container", "size"), [*zip(["pt", "safetensors", "module"], SIZES, strict=True)]
)
def test_open_clip(open_clip_model, architecture, tmp_path, container, size):
    model, _, preprocess = open_clip_model
    model.eval()
    path = tmp_path / f"w.{container}"
    prefix = "module." if container == "module" else ""
    state = {prefix + k: v for k, v in model.state_dict().items()}
    (save_file if container == "safetensors" else torch.save)(state, path)
    images = pictures(*size)
    found = reward("open_clip", path=path, architecture=architecture, tag=None).score(
        images, PROMPTS
    )
    tokens = open_clip.get_tokenizer(architecture)(PROMPTS)
    with torch.no_grad():
        image = unit(model.encode_image(torch.stack([preprocess(i) for i in pil(images)])))
        expected = (image * unit(model.encode_text(tokens))).sum(-1)
    assert found == pytest.approx(expected.numpy(), abs=1e-6)
    assert np.std(found) > 1e-3


def test_open_clip_preprocesses_as_the_published_weights_want():
    made = OpenClip.__new__(OpenClip)
    made.settings = settings.OpenClip(kind="open_clip", path="x")
    wanted = open_clip.get_pretrained_cfg("ViT-H-14-378-quickgelu", "dfn5b")
    assert made.published_preprocessing() == {
        f"image_{k}": wanted[k] for k in ("mean", "std", "interpolation", "resize_mode")
    }
    assert wanted["resize_mode"] == "squash"  # the whole image is seen


@pytest.mark.parametrize("size", [*SIZES, (100, 60), (224, 224)])
def test_hps_preprocessing_bit_for_bit(size):
    from torchvision.transforms import Normalize, ToTensor
    from torchvision.transforms import functional as f

    images = pictures(*size)
    expected = []
    for image in pil(images):  # HPSv2's validation transform, one image at a time
        x = ToTensor()(image.convert("RGB"))
        height, width = x.shape[1:]
        scale = 224 / float(max(height, width))
        if scale != 1.0:
            new = [round(side * scale) for side in (height, width)]
            x = f.resize(x, new, f.InterpolationMode.BICUBIC)
            down, right = 224 - new[0], 224 - new[1]
            x = f.pad(x, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
        expected.append(Normalize(MEAN, STD)(x))
    assert torch.equal(padded_square(images, 224), torch.stack(expected))


@pytest.mark.parametrize("size", SIZES)
def test_hps(open_clip_model, architecture, hps_file, size):
    model = open_clip_model[0].eval()
    images = pictures(*size)
    found = reward("hpsv2", path=hps_file, architecture=architecture, batch=2).score(
        images, PROMPTS
    )
    with torch.no_grad():
        image, text, _ = model(
            padded_square(images, 32), open_clip.get_tokenizer(architecture)(PROMPTS)
        )
    assert found == pytest.approx(torch.diagonal(image @ text.T).numpy(), abs=1e-6)
    assert found[0] != found[1]
    assert found.dtype == np.float32


def test_hps_from_a_hub_id_at_its_commit(architecture, hps_file, tmp_path, monkeypatch):
    commit = "c" * 40
    snapshot = tmp_path / f"models--xswu--HPSv2/snapshots/{commit}"
    snapshot.mkdir(parents=True)
    (snapshot / "HPS_v2.1_compressed.pt").symlink_to(hps_file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = {"architecture": architecture, "path": "xswu/HPSv2/HPS_v2.1_compressed.pt"}
    there = reward("hpsv2", **hub, revision=commit)
    here = reward("hpsv2", architecture=architecture, path=hps_file)
    x = pictures(32, 32)
    assert np.array_equal(there.score(x, PROMPTS), here.score(x, PROMPTS))
    refused("HPS_v2.1_compressed.pt at ddd", "hpsv2", **hub, revision="ddd")


def test_hps_wrong_files(architecture, hps_file, tmp_path):
    half = tmp_path / "half.pt"

    def of(path: object) -> dict[str, Any]:
        return {"path": path, "architecture": architecture}

    refused("no-such.pt: no such file", "hpsv2", **of("no-such.pt"))
    half.write_bytes(Path(hps_file).read_bytes()[:5000])
    refused("half.pt: cannot be read as weights", "hpsv2", **of(half))
    state = torch.load(hps_file, weights_only=True)
    del state["state_dict"]["visual.proj"]
    torch.save(state, half)
    refused("visual.proj is missing", "hpsv2", **of(half))
    state["state_dict"]["visual.proj"] = torch.zeros(2, 2)
    torch.save(state, half)
    refused(r"visual.proj has shape \(2, 2\)", "hpsv2", **of(half))
    unknown = {"path": hps_file, "architecture": "ViT-H-41"}
    refused("open_clip knows no 'ViT-H-41'; such as ViT-H-14", "hpsv2", **unknown)
    refused("has no 'nope'", "open_clip", path=hps_file, architecture=architecture, tag="nope")


# -- CLIP and the aesthetic head ------------------------------------------------------------------


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module]:
    """The head in the layout that LAION and ImageReward publish, for 64 features."""
    torch.manual_seed(1)
    dropped = [m for n in (64, 32, 16) for m in (nn.Linear(n, n // 2), nn.Dropout(0.2))]
    layers = nn.Sequential(*dropped, nn.Linear(8, 4), nn.Linear(4, 1))
    path = tmp_path_factory.mktemp("head") / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, path)
    return str(path), layers.eval()


@pytest.mark.parametrize("size", SIZES)
def test_clip_and_the_aesthetic_head(head_file, size):
    images, (path, layers) = pictures(*size), head_file
    model, preprocess = clip.load(CLIP, device="cpu", jit=False)
    pixels = torch.stack([preprocess(i) for i in pil(images)])
    given = settings.Clip.model_validate({"kind": "clip", "path": CLIP, "device": "cpu"})
    ours: Any = load_reward(given, "cuda:7")  # the base model's device
    assert torch.equal(ours.clip.pixels(images), pixels)  # bit for bit
    with torch.no_grad():
        seen, read = model.encode_image(pixels), model.encode_text(clip.tokenize(PROMPTS, 77, True))
        cosine, liked = torch.cosine_similarity(seen, read), layers(unit(seen.float()))[:, 0]
    np.testing.assert_allclose(ours.score(images, PROMPTS), cosine, atol=1e-5)
    found = reward("aesthetic", path=path, clip=CLIP).score(images, PROMPTS)
    assert found == pytest.approx(liked.numpy(), abs=1e-6)


def test_aesthetic_wrong_files(head_file, tmp_path):
    path, _ = head_file
    for kind in ("clip", "preference"):
        refused(r"absent\.bin: no such file", kind, path="absent.bin")
    refused("no such file", "aesthetic", path="nothing.pth", clip=CLIP)
    refused("no such file", "aesthetic", path=path, clip="nothing.pt")
    refused("no head", "aesthetic", path="assets/toy/preference.safetensors", clip=CLIP)
    state = torch.load(path, weights_only=True)
    state["layers.0.weight"] = torch.zeros(32, 768)
    torch.save(state, tmp_path / "other.pth")
    refused("takes 768 features", "aesthetic", path=tmp_path / "other.pth", clip=CLIP)


# -- PickScore -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pickscore(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A CLIPModel and its processor in a folder, as on the hub."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained("assets/toy/pipeline/tokenizer")
    tokenizer.model_max_length = 77
    text = {**sizes(layers=1), "max_position_embeddings": 77, **special(tokenizer)}
    vision = {**sizes(layers=1), "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(images, tokenizer)
    folder = tmp_path_factory.mktemp("pickscore")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder), model, processor


@pytest.mark.parametrize("size", SIZES)
def test_pickscore(pickscore, size):
    folder, model, processor = pickscore
    images = pictures(*size)
    found = reward("pickscore", path=folder).score(images, PROMPTS)
    more = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    expected = []
    for image, prompt in zip(pil(images), PROMPTS, strict=True):  # as the model card does it
        with torch.no_grad():
            seen = model.get_image_features(**processor(images=image, return_tensors="pt"))
            read = model.get_text_features(**processor(text=prompt, **more))
        seen, read = (x if isinstance(x, Tensor) else x.pooler_output for x in (seen, read))
        expected.append(float(model.logit_scale.exp() * (unit(read) @ unit(seen).T)))
    assert found == pytest.approx(expected, abs=1e-4)
    paper = reward("pickscore", path=folder, divide_by=100.0).score(images, PROMPTS)
    assert paper == pytest.approx(found / 100, abs=1e-6)


def test_pickscore_wrong_folders_of_which_nothing_runs(pickscore, tmp_path):
    folder, bomb = pickscore[0], tmp_path / "went-off"
    refused("processor: assets: cannot be loaded", "pickscore", path=folder, processor="assets")
    refused("path: assets: cannot be loaded", "pickscore", path="assets", processor=folder)
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(bomb)!r})\nclass Evil: pass\n")
    remote = {"AutoProcessor": "evil.Evil", "AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    for name in ("config", "processor_config", "tokenizer_config", "preprocessor_config"):
        text = {"auto_map": remote, "model_type": "evil", "processor_class": "Evil"}
        (tmp_path / f"{name}.json").write_text(json.dumps(text))
    refused("processor: .*cannot be loaded", "pickscore", path=folder, processor=tmp_path)
    refused("path: .*cannot be loaded", "pickscore", path=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "auto_map": remote}))
    for content in bombs(bomb):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        refused("path: .*cannot be loaded", "pickscore", path=tmp_path)
    assert not bomb.exists()


# -- ImageReward ---------------------------------------------------------------------------------

OUTER = """
embeddings.class_embedding cls_token
embeddings.position_embedding pos_embed
embeddings.patch_embedding.weight patch_embed.proj.weight
embeddings.patch_embedding.bias patch_embed.proj.bias
post_layernorm.weight norm.weight
post_layernorm.bias norm.bias
"""
INNER = """
layer_norm1 norm1
layer_norm2 norm2
self_attn.qkv attn.qkv
self_attn.projection attn.proj
mlp.fc1 mlp.fc1
mlp.fc2 mlp.fc2
"""


@pytest.fixture(scope="module")
def imagereward(
    head_file: tuple[str, nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Any, Any, Any]:
    """The published container: blip.visual_encoder.*, blip.text_encoder.*, mlp.layers.*."""
    from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    folder = tmp_path_factory.mktemp("imagereward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(3)
    given = {"image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6}
    eyes = BlipVisionModel(BlipVisionConfig(**sizes(64, 96, heads=1), **given)).eval()
    med = {"max_position_embeddings": 64, "vocab_size": len(words), "hidden_act": "gelu"}
    med = {**sizes(64, 96), **med, "layer_norm_eps": 1e-12}
    config = BlipTextConfig(**med, encoder_hidden_size=64, is_decoder=True)
    reader = BlipTextModel(config, add_pooling_layer=False).eval()
    (folder / "med_config.json").write_text(json.dumps({**med, "encoder_width": 64, "type": "x"}))
    state: dict[str, Tensor] = {}
    # transformers -> BLIP, written out here apart from the package's own table
    names = dict(line.split() for line in OUTER.strip().splitlines())
    inner = dict(line.split() for line in INNER.strip().splitlines())
    for layer, (ours, theirs), kind in product(range(2), inner.items(), ("weight", "bias")):
        names[f"encoder.layers.{layer}.{ours}.{kind}"] = f"blocks.{layer}.{theirs}.{kind}"
    state |= {f"blip.visual_encoder.{names[k]}": v for k, v in eyes.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in reader.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    state["blip.text_encoder.pooler.dense.weight"] = torch.zeros(64, 64)
    state["blip.vision_proj.weight"] = torch.zeros(4, 64)
    state |= {f"mlp.{k}": v for k, v in torch.load(head_file[0], weights_only=True).items()}
    torch.save(state, folder / "ImageReward.pt")
    files = {"path": "ImageReward.pt", "tokenizer": "tokenizer", "med_config": "med_config.json"}
    return {key: str(folder / name) for key, name in files.items()}, eyes, reader, head_file[1]


@pytest.mark.parametrize("size", SIZES)
def test_imagereward(imagereward, size):
    from torchvision import transforms as t
    from transformers import AutoTokenizer

    given, eyes, reader, head = imagereward
    images = pictures(*size)
    found = reward("imagereward", **given).score(images, PROMPTS)
    resize = t.Resize(32, interpolation=t.InterpolationMode.BICUBIC)
    preprocess = t.Compose([resize, t.CenterCrop(32), t.ToTensor(), t.Normalize(MEAN, STD)])
    tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
    expected = []
    for image, prompt in zip(pil(images), PROMPTS, strict=True):  # as ImageReward.score does it
        text = tokenizer(
            prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        )
        with torch.no_grad():
            seen = eyes(preprocess(image)[None]).last_hidden_state
            read = reader(
                text.input_ids,
                attention_mask=text.attention_mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            ).last_hidden_state
            expected.append(float(head(read[:, 0])))
    normal = (np.array(expected) - 0.16717362830052426) / 1.0333394966054072
    assert found == pytest.approx(normal, abs=1e-5)
    assert np.std(found) > 1e-4


def test_imagereward_wrong_files(imagereward, tmp_path, head_file):
    given = imagereward[0]
    refused("no such file", "imagereward", **{**given, "path": "nothing.pt"})
    refused("holds no blip", "imagereward", **{**given, "path": head_file[0]})
    refused("tokenizer: assets", "imagereward", **{**given, "tokenizer": "assets"})
    refused("med_config: nothing.json", "imagereward", **{**given, "med_config": "nothing.json"})
    state = torch.load(given["path"], weights_only=True)
    del state["blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    torch.save(state, tmp_path / "half.pt")
    refused("crossattention.self.key.weight is missing", "imagereward",
            **{**given, "path": tmp_path / "half.pt"})  # fmt: skip


# -- over HTTP -----------------------------------------------------------------------------------


@contextmanager
def service(answer: Callable[[dict[str, Any], int], tuple[int, str]]) -> Iterator[tuple[str, list]]:
    """A real HTTP server; ``answer`` gets the request and its number, gives status and body."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = {**json.loads(body), "path": self.path, "headers": dict(self.headers)}
            with lock:
                seen.append(request)
                number = len(seen)
            status, text = answer(request, number)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())
            except BrokenPipeError:
                pass  # the client gave up

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def chat(text: Any) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def prompt_of(request: dict[str, Any]) -> str:
    text = request["messages"][0]["content"][1]["text"]
    return text.rsplit("Text Caption: [", 1)[1].removesuffix("]")


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egrpo.rewards.http.LONGEST_WAIT", 0.01)


def test_http_scores_arrive_in_order(tmp_path):
    def answer(request: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(0.05 * (3 - number % 3))  # answers overtake each other
        return chat(f"...\nFinal Score: {1 + PROMPTS.index(prompt_of(request)) % 5}.0")

    (tmp_path / "token").write_text("secret\n")
    images = pictures(20, 48)
    with service(answer) as (url, seen):
        model = reward(
            "unifiedreward", url=url, token_file=tmp_path / "token", side=32, concurrency=3
        )
        found = model.score(images, PROMPTS)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.2])
    request = next(r for r in seen if prompt_of(r) == PROMPTS[1])
    assert request["path"] == "/v1/chat/completions"
    assert request["temperature"] == 0
    assert request["headers"]["Authorization"] == "Bearer secret"
    data = request["messages"][0]["content"][0]["image_url"]["url"]
    assert data.startswith("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1])))
    expected = pil(images)[1].resize((32, 32))
    assert np.array_equal(np.asarray(sent), np.asarray(expected))


@pytest.mark.usefixtures("_no_waiting")
def test_http_tries_again_after_errors(capsys):
    bad = [(500, "busy"), (429, "slow down"), (200, "no json"), (200, "{}"), chat("no idea")]

    def answer(request: dict[str, Any], number: int) -> tuple[int, str]:
        return bad[number - 1] if number <= len(bad) else chat("Final Score: 4.5")

    with service(answer) as (url, seen):
        found = reward("unifiedreward", url=url, attempts=6).score(pictures(8, 8)[:1], ["x"])
    assert found == pytest.approx([0.9])
    assert len(seen) == 6
    assert capsys.readouterr().err == ""


URL = "http://127.0.0.1:9/v1"
NO_SCORE = "no score in the answer"
PART = "is not one number"
OUTSIDE = "is outside the scale"
OWN_SCALE = {"pattern": r"Mark: (\d+)", "least": 0.0, "most": 100.0}


@pytest.mark.usefixtures("_no_waiting")
def test_http_failures_are_nan_and_said(capsys):
    texts = ["null", "[]", "3", '{"text": "Final Score: 3"}']
    no_texts = {text: chat(json.loads(text)) for text in texts}
    failing = {"refused": (400, "bad"), "broken": (500, "x"), "silly": chat("Final Score: 9")}

    def answer(request: dict[str, Any], number: int) -> tuple[int, str]:
        kind = prompt_of(request)
        time.sleep(1.5 if kind == "slow" else 0)
        return {**failing, **no_texts}.get(kind, chat("Final Score: 5"))

    prompts = [*no_texts, "slow", *failing]
    with service(answer) as (url, _):
        model = reward("unifiedreward", url=url, seconds=1.0, attempts=2, concurrency=9)
        found = model.score(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), [*prompts, "good"])
    assert np.isnan(found[:8]).all()
    assert found[8] == 1.0
    said = capsys.readouterr().err
    assert "8 of 9 images got no score (NaN): UnansweredError: an answer that is no chat" in said
    assert said.count("\n") == 1
    for text in ("9e300", "9e999"):
        with service(lambda *_: chat(text)) as (url, _):  # noqa: B023
            huge = reward("unifiedreward", url=url, pattern=r"(\S+)", attempts=1)
            assert np.isnan(huge.score(pictures(8, 8)[:1], ["a"])).all()
        assert "is too large" in capsys.readouterr().err
    assert np.isnan(model.score(pictures(8, 8)[:1], ["a"])).all(), "nobody is there any more"
    assert "ConnectError" in capsys.readouterr().err


FINAL: dict[float | str, list[str]] = {  # after `Final Score:`
    2: [" 9? No. Final Score: 2"],  # the last one counts: a judge may think aloud
    3: ["** 3", " 3**"],
    4: [" 4", " **4**/5", " *4 out of 5*", " 4 - a good image", " 4\n\n1. Alignment is good"],
    4.5: [" 4.5."],
    5: [" 5.0"],
    NO_SCORE: ["", "'.", " four", " \u22123"],
    OUTSIDE: [" 10", " 0", " 5.1", " -3", " 8/10", " 4/10", " **4** out of **10**"],
    PART: [" 1e9", " 4,5", " 4.5.2", " 3-4", " 3 to 4"],
}
ANSWERS: list[tuple[str, dict[str, Any], float | str]] = [
    *((f"Good. Final Score:{end}", {}, score) for score, ends in FINAL.items() for end in ends),
    ("**final score**:\n\n__3__", {}, 3),
    ("assign a score from 1 to 5 after 'Final Score:'.\nFinal Score: 2", {}, 2),
    ("", {}, NO_SCORE),
    ("Final Score: 7", {"most": 10.0}, 7),
    ("Final Score: 7/10", {"most": 10.0}, 7),
    ("Final Score: 0.5", {"least": 0.0}, 0.5),
    # a pattern of one's own has the scale that is given, else none
    ("Mark: 85%", OWN_SCALE, 85),
    ("Mark: 101", OWN_SCALE, OUTSIDE),
    ("Mark: 101", {"pattern": r"Mark: (\d+)"}, 101),
    ("7/10", {"pattern": r"(\d+)/10"}, 7),
    ("first 1, then 2", {"pattern": r"(\d)"}, 1),
    ("mark-4", {"pattern": r"mark-(\d)"}, 4),
    ("Mark: 10", {"pattern": r"Mark: (\d)"}, PART),
    ("Mark: -3", {"pattern": r"Mark:.*?(\d)"}, PART),
    ("Mark: 0.3", {"pattern": r"Mark: .*(\d)"}, PART),
    *((f"Mark: {text}", {"pattern": r"Mark: (\w+)"}, PART) for text in ("four", "1_0", "nan")),
    ("Mark: ", {"pattern": r"Mark: (\d)?"}, NO_SCORE),
]


@pytest.mark.parametrize(("text", "given", "right"), ANSWERS)
def test_a_judges_answer_is_a_number_in_its_scale(text, given, right):
    made = settings.UnifiedReward.model_validate({"kind": "unifiedreward", "url": URL, **given})
    if isinstance(right, str):
        with pytest.raises(UnansweredError, match=right):
            score_in(text, made)
    else:
        assert score_in(text, made) == right


def test_http_bad_settings(tmp_path):
    given = {"kind": "unifiedreward", "url": URL}
    patterns = [{"pattern": pattern} for pattern in ("(", "x", "(a)(b)")]
    scales = {"least": 5.0}, {"most": 1.0}, {"pattern": "(.)", "least": 1.0, "most": 0.0}
    for wrong in (*patterns, *scales, {"question": "?"}, {"url": "ftp://x"}):
        with pytest.raises(ValueError):
            settings.UnifiedReward.model_validate({**given, **wrong})
    refused("token_file: nothing: No such file", **given, token_file="nothing")


# -- a function of one's own ---------------------------------------------------------------------


def test_custom(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def redness(images, prompts, scale=1.0):\n"
        "    return scale * images[:, 0].float().mean((1, 2)) / 255\n"
        "def short(images, prompts):\n    return [0.0]\n"
        "def crash(images, prompts):\n    raise ZeroDivisionError('mine')\n"
        "class Counter:\n"
        "    def __init__(self, start):\n        self.n = start\n"
        "    def __call__(self, images, prompts):\n"
        "        self.n += 1\n        return [self.n] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    images = pictures(8, 8)
    redness = reward("custom", function="my_rewards:redness", options={"scale": 2.0})
    assert redness.score(images, PROMPTS) == pytest.approx(
        (2 * images[:, 0].float().mean((1, 2)) / 255).numpy()
    )
    counter = reward("custom", function="my_rewards:Counter", options={"start": 3})
    assert counter.score(images, PROMPTS).tolist() == [4.0] * 5
    assert counter.score(images, PROMPTS).tolist() == [5.0] * 5
    with pytest.raises(UserError, match=r"rewards.mine: returned 1 numbers .* for 5 images"):
        score_all({"mine": reward("custom", function="my_rewards:short")}, images, PROMPTS)
    with pytest.raises(ZeroDivisionError):  # no crash becomes a number
        score_all({"mine": reward("custom", function="my_rewards:crash")}, images, PROMPTS)
    refused("my_rewards:nothing: cannot be loaded", "custom", function="my_rewards:nothing")
    refused("no_such_module:f: cannot be loaded", "custom", function="no_such_module:f")
    monkeypatch.syspath_prepend(tmp_path)


NAN = float("nan")
RETURNED = {
    (1, 2.5): ["[1, 2.5]"],
    (1, 0): ["[True, False]", "np.array([True, False])"],
    (NAN, 2): ["[None, 2]", "[1e39, 2]"],
    (1, 2): [
        *("np.array([1, 2], dtype=object)", "torch.tensor([1, 2], dtype=torch.bfloat16)"),
        *("torch.tensor([1.0, 2.0], requires_grad=True)", "[torch.tensor(1.), torch.tensor(2)]"),
    ],
    None: [
        *("['1', '2']", "[1, '2']", "[b'1', b'2']", "np.array(['1', 2], dtype=object)"),
        *("[1 + 2j, 2]", "torch.tensor([1 + 2j, 2])", "[10**400, 1]", "[[1], [2, 3]]"),
        *("[[1], [2]]", "{'a': 1, 'b': 2}", "(n for n in [1, 2])", "None", "3.0"),
        "np.array(['2020', '2021'], dtype='datetime64[Y]')",
    ],
}


def test_what_a_custom_reward_returns_are_numbers(tmp_path, monkeypatch):
    """Truth is 1 or 0 and None is NaN; text and all else is refused, not turned into numbers."""
    (tmp_path / "giving.py").write_text(
        "import numpy as np\nimport torch\n"
        "def give(images, prompts, what):\n    return eval(what)\n"
    )
    monkeypatch.chdir(tmp_path)
    for right, what in ((right, what) for right, these in RETURNED.items() for what in these):
        model = {"mine": reward("custom", function="giving:give", options={"what": what})}
        if right is None:
            with pytest.raises(UserError, match=r"mine: returned|giving:give: returned"):
                score_all(model, pictures(8, 8)[:2], ["a", "b"])
        else:
            found = score_all(model, pictures(8, 8)[:2], ["a", "b"])["mine"]
            np.testing.assert_array_equal(found, right, err_msg=what)


# -- what all share ------------------------------------------------------------------------------


def test_jpeg_is_minus_the_size_in_kilobytes():
    images = pictures(32, 32)[:2]
    images[1] = 128
    scores = reward("jpeg_compressibility").score(images, ["", ""])
    buffer = io.BytesIO()
    pil(images)[0].save(buffer, "JPEG", quality=95)
    assert scores[0] == pytest.approx(-len(buffer.getvalue()) / 1000)
    assert scores[1] > scores[0]


def test_verifier_refuses_prompts_outside_its_grammar():
    with pytest.raises(UserError, match="kind verifier"):
        reward("verifier").score(pictures(32, 32)[:1], ["a photo of a horse"])


class Answering:
    """A reward that gives these scores, notes what it is asked and writes into it."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.asked: list[Any] = []

    def score(self, images: Tensor, prompts: list[str]) -> Any:
        self.asked.append((images.clone(), list(prompts)))
        images[:, :, :, :8] = 0
        prompts.reverse()
        prompts[0] = ""
        return np.array(self.scores or [0.0] * len(images))


def test_scores_are_checked():
    with pytest.raises(UserError, match=r"rewards\.r: returned"):
        score_all({"r": Answering(0.0)}, pictures(8, 8)[:2], ["", ""])
    found = score_all({"r": Answering(np.inf, 1.0)}, pictures(8, 8)[:2], ["", ""])["r"]
    np.testing.assert_array_equal(found, [np.nan, 1.0])


@pytest.mark.parametrize("lost", [[], [2], [0, 2], [0, 1, 2, 3, 4]])
def test_rewards_see_images_of_their_own_and_only_what_is_one(lost):
    """What is stored is the image as it was made, and the prompt."""
    images, texts, models = pictures(32, 32), [*"abcde"], {"own": Answering(), "other": Answering()}
    faults = np.full(5, FINE, np.int8)
    faults[lost] = [LATENT, DECODED, LATENT, DECODED, LATENT][: len(lost)]
    scores = score_all(models, Images(images, faults), texts)
    left = [n for n in range(5) if n not in lost]
    for name, model in models.items():
        np.testing.assert_array_equal(np.isnan(scores[name]), faults != FINE)
        assert len(model.asked) == bool(left)
        for seen, asked in model.asked:
            assert torch.equal(seen, pictures(32, 32)[left])
            assert asked == [texts[n] for n in left]
    assert torch.equal(images, pictures(32, 32))
    assert texts == [*"abcde"]
