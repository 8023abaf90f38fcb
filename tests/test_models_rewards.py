"""The toy model against the stock pipeline, what is no image, and prompt files."""

from __future__ import annotations

import pytest
import torch
from conftest import embedded, small_run, trainer_for

from egrpo.config.prompts import read_prompts
from egrpo.core.schedule import shifted_sigmas, stock_end
from egrpo.core.seeds import normal
from egrpo.errors import UserError
from egrpo.images import DECODED, FINE, LATENT, Images
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.sampling.sample import Sampler

TOY = "assets/toy/pipeline"
GRID = shifted_sigmas(8, 3.0, end=stock_end(3.0, dynamic=False))
"""What the stock pipeline samples on, called with a number of steps as its users call it."""


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ode_sampling_equals_the_stock_pipeline_in_any_batch(scale):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(TOY, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    model = load_model(small_run("x", **{"model.guidance_scale": scale}).model)
    prompts = read_prompts("assets/toy/prompts/heldout.txt")[:2]
    conditioning = model.encode(prompts, negative=scale > 1)
    ours, forward = Sampler(model, conditioning, GRID, micro_batch=3).images([0, 1], 1)
    assert forward == 2 * 8 * (2 if scale > 1 else 1)
    alone = Sampler(model, conditioning, GRID, 1).images([1], 1)[0].pixels
    assert (ours.pixels[[1]].int() - alone.int()).abs().max() <= 1
    call = {"num_inference_steps": 8, "guidance_scale": scale, "max_sequence_length": 0}
    for i, prompt in enumerate(prompts):
        noise = normal(model.image_shape, "evaluate", i, -1, 0)[None]
        shape = {"height": 32, "width": 32, "output_type": "pt"}
        stock = pipe(prompt.text, latents=noise, **call, **shape).images[0]
        stock = (stock.clamp(0, 1) * 255).round()
        assert (ours.pixels[i].float() - stock).abs().max() <= 1  # rounding to 8 bits


def test_saved_weights_sample_as_those_in_training(embeddings, tmp_path):
    _, conditioning = load_conditioning(embeddings["heldout"])
    for tuning in ("lora", "full"):
        scale = {"lora": 1000.0, "full": 300.0}[tuning]
        of = {"train.learning_rate_scale": scale, "model.tuning": tuning}
        trainer = trainer_for(embeddings, **of)
        for _ in range(2):
            trainer.step()
        trainer.model.save(tmp_path / tuning)
        base, loaded = load_model(trainer.run.model), load_model(trainer.run.model)
        loaded.load(tmp_path / tuning)
        live, ours, untrained = (
            Sampler(model, conditioning, GRID, 8).images([0], 1)[0].pixels.float()
            for model in (trainer.model, loaded, base)
        )
        assert (untrained - ours).abs().max() > 8, "training must have changed the image"
        assert (live - ours).abs().max() <= 1
    networks = (model.transformer.parameters() for model in (trainer.model, loaded))
    assert all(torch.equal(a, b) for a, b in zip(*networks, strict=True)), "of full tuning"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.path": "assets/toy"}, r"assets/toy/transformer: cannot be loaded"),
        ({"model.height": 30}, r"model\.height: 30 is not a multiple of 8"),
        ({"model.device": "tpu9"}, r"model\.device: 'tpu9'"),
        ({"model.lora.targets": ["nothing"]}, r"model\.lora\.targets: "),
    ],
)
def test_bad_model_settings_are_one_line(change, message):
    def prepare() -> None:
        model = load_model(small_run("x", **change).model)
        _ = model.image_shape
        model.prepare_training(0)

    with pytest.raises(UserError, match=message) as caught:
        prepare()
    assert "\n" not in str(caught.value)


CAT, DOG = ("a cat, small", ""), ("a dog", "blurry")
PROMPT_FILES = [  # name, contents, column, (prompt, negative prompt) of each
    ("bom.txt", "\ufeffa cat, small\r\n", "prompt", [CAT]),
    ("p.jsonl", '{"prompt": "猫"}\n', "prompt", [("猫", "")]),
    ("p.TXT", "a cat, small\r\n\r\n  a dog \t\r\n", "prompt", [CAT, ("a dog", "")]),
    ("p.txt", '{"prompt": "a"}\nprompt,b\n', "prompt", [('{"prompt": "a"}', ""), ("prompt,b", "")]),
    (
        "p.JSONL",
        '{"prompt": " a cat, small ", "negative_prompt": null}\n\n{"prompt": ""}\n{"prompt": " "}\n'
        '{"prompt": "a dog", "negative_prompt": " blurry\\n"}',
        "prompt", [CAT, DOG],
    ),
    (
        "evaluation_metadata.jsonl",  # GenEval
        '{"tag": "one", "include": [{"class": "cat", "count": 1}], "prompt": "a cat, small"}\n',
        "prompt", [CAT],
    ),
    ("anime.json", '["a cat, small", "", " a dog"]', "prompt", [CAT, ("a dog", "")]),  # HPDv2
    (
        "test.json",  # HPDv2
        '[{"prompt": "a cat, small", "image_path": ["1.jpg"], "rank": [1, 2]}, {"prompt": ""}]',
        "prompt", [CAT],
    ),
    (
        "p.json",
        '{"prompt": ["a cat, small", "a dog", " "], "negative_prompt": [null, "blurry", ""]}',
        "prompt", [CAT, DOG],
    ),
    (
        "p.csv",
        '\ufeffid,prompt,negative_prompt\r\n1,"a cat, small",\r\n\r\n2, a dog ,blurry\r\n3,,x\r\n',
        "prompt", [CAT, DOG],
    ),
    ("q.csv", 'prompt\n"a ""red"" cat\nby night"\n', "prompt", [('a "red" cat\nby night', "")]),
    ("p.tsv", 'Negative_Prompt\tprompt\n\t"a cat, small"\nblurry\ta dog\n', "prompt", [CAT, DOG]),
    (
        "PartiPrompts.tsv",  # no quoting
        'Prompt\tCategory\tNote\n"G" painted\tArts\t\na "b" c\tArts\tof "D"\n',
        "prompt", [('"G" painted', ""), ('a "b" c', "")],
    ),
    ("DrawBench.csv", "Prompts,Category\na dog,Animals\n", "Prompts", [("a dog", "")]),
    ("pickapic.jsonl", '{"caption": "a dog", "prompt": "x"}\n', "caption", [("a dog", "")]),
    ("both.csv", "Prompt,prompt\nA,a\n", "prompt", [("a", "")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "column", "wanted"), PROMPT_FILES, ids=[name for name, *_ in PROMPT_FILES]
)
def test_prompt_files_are_read_as_what_they_are(name, text, column, wanted, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert [(p.text, p.negative) for p in read_prompts(path, column)] == wanted


NAMES = ("p.parquet", "p.yaml", "p.zip", "p.txt.gz", "prompts")
KINDS = "{}: .* is not read as a prompt file; .txt, .jsonl, .json, .csv, .tsv"
REFUSED_PROMPT_FILES = [
    *((name, b"a cat", KINDS.format(name)) for name in NAMES),
    ("absent.txt", None, "no such prompt file"),
    ("p.txt", b"\n \n", "holds no prompt"),
    ("p.csv", b"Prompts,Category\na,b\n", "line 1: no column 'prompt'; there are 'Prompts', 'Cat"),
    ("p.csv", b"a dog\n", "line 1: no column 'prompt'; there are 'a dog': name one in prompts.col"),
    ("p.csv", b"prompt,PROMPT,prompt\na,b,c\n", "line 1: which column is prompt"),
    ("p.csv", b"PROMPT,Prompt\na,b\n", "line 1: which column is prompt"),
    ("p.csv", b"prompt,kind\na cat, small,x\n", "line 2: 3 cells, and the header has 2"),
    ("p.csv", b'prompt\n"a cat\n', "line 2: unexpected end of data"),
    ("p.csv", b'prompt\n"a" cat\n', "line 2: "),
    ("p.csv", b"prompt,kind\n", "holds no prompt"),
    ("p.csv", b"", "holds no prompt"),
    ("p.tsv", b'prompt\tkind\n"a" cat\t"x"\n', "line 2: "),  # neither quoted well nor unquoted
    ("p.tsv", b'prompt\tkind\n"a" cat\tx\ty\n', "line 2: 3 cells"),
    ("p.json", b'{"prompt": "a cat"}', "p.json: prompt: expected lists, of one length"),
    ("p.json", b'{"prompt": ["a"], "negative_prompt": []}', "expected lists, of one length"),
    ("p.json", b'{"text": ["a"]}', "p.json: no column 'prompt'; there are 'text'"),
    ("p.json", b'["a", 3]', "p.json, entry 2: expected a JSON object"),
    ("p.json", b'[["a"]]', "p.json, entry 1: expected a JSON object"),
    ("p.json", b'"a cat"', "p.json: expected a list of texts or of objects"),
    ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}', "not valid JSON: .*is named .jsonl"),
    ("p.json", b"[]", "holds no prompt"),
    ("p.json", b"[" * 100_000, "not valid JSON"),
    ("p.json", rb'["\ud83d"]', "entry 1: expected"),
    ("p.jsonl", b'{"text": "a"}', "line 1: no column 'prompt'; there are 'text'"),
    ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: holds a NUL character"),
    ("p.jsonl", rb'{"prompt": "a\u0000"}', "line 1: holds a NUL character"),
    ("p.txt", "ein Bär".encode("latin-1"), "cannot be read as UTF-8"),
    ("p.txt", "ein Bär".encode()[:-2], "cannot be read as UTF-8"),
]


JSONL = (
    *('{"prompt": 3}', '{"prompt": null}', '{"Prompt": 3}', '["prompt"]', '"prompt"', "3"),
    *('{"prompt": "a", "negative_prompt": 0}', '{"prompt": "a", "negative_prompt": false}'),
    *('{"prompt": "a", "negative_prompt": []}', r'{"prompt": "\ud800"}', "NaN", "[" * 10**5),
    *('{"prompt": "a"', "{'prompt': 'a'}", '{"prompt": ' + "9" * 5000 + "}", '{"a":' * 10**5),
)
REFUSED_PROMPT_FILES += [
    ("p.jsonl", f'{{"prompt": "a"}}\n\n{line}\n'.encode(), "jsonl, line 3: expected a JSON object")
    for line in JSONL
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED_PROMPT_FILES)
def test_prompt_files_that_are_refused_name_file_and_place(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value)
    assert str(caught.value).isprintable()  # one line
    assert len(str(caught.value)) < 2000


def test_embeddings_are_of_the_column_that_is_set(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,caption\nx,a red circle\ny,a blue square\n")
    files = {f"prompts.{key}": str(tmp_path / "p.csv") for key in ("train", "heldout")}
    run = small_run("x", **files, **{"prompts.column": "caption"})
    for path in embedded(run, tmp_path).values():
        texts, _ = load_conditioning(path)
        assert texts == ["a red circle", "a blue square"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_becomes_no_image(bad):
    """One number of one latent, or of what the VAE makes of it; the others are as without it."""
    model = load_model(small_run().model)
    latents = torch.randn(3, *model.image_shape, generator=torch.manual_seed(0))
    fine = model.decode(latents, 2)
    assert fine.valid.all()
    spoilt = latents.clone()
    spoilt[1, 0, 2, 3] = bad
    found = model.decode(spoilt, 3)
    assert found.faults.tolist() == [FINE, LATENT, FINE]
    assert (found.pixels[[0, 2]].int() - fine.pixels[[0, 2]].int()).abs().max() <= 1
    assert sorted(set(found.pixels[1].flatten().tolist())) == [120, 224]  # to be seen
    decoded = torch.zeros(3, 3, 8, 8)
    decoded[2, 1, 0, 7] = bad
    assert Images.cast(decoded, latents).faults.tolist() == [FINE, FINE, DECODED]
