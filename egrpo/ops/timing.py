"""``egrpo measure``: what a study's models take on this machine's card, as rows of rates."""

from __future__ import annotations

import datetime
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from egrpo.config.models import Model, RunConfig
from egrpo.errors import UserError, during
from egrpo.models import load_model
from egrpo.models.attention import check_attention
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.ops.activations import CLIP_TOKENS
from egrpo.ops.checks import different
from egrpo.ops.memory import advice_where_memory_ends
from egrpo.ops.rates import Rate, architecture, write_rates
from egrpo.planning.grids import training_sigmas
from egrpo.sampling.fit import batch_of
from egrpo.settings import is_hub_id
from egrpo.store.files import read_json
from egrpo.study.layout import Layout

SECONDS = 5.0
"""How long a kind of work is repeated; at least once, after one that is not counted."""

SIGMA = 0.7
"""Flow time of an evaluation; its value changes no time."""

SHORT = 64
"""Tokens of a prompt, where families do not pad theirs to the longest."""

Tell = Callable[[str], None]


def measure(at: Layout, names: Iterable[str], tell: Tell) -> list[Rate]:
    """Measure each model, size and type of the runs once, and add the rows to the study's rates.

    No names are all runs; ``tell`` is given one line a step.

    Raises:
        UserError: for an unknown run, a model that cannot be loaded, or too little memory.
    """
    runs = [at.study.runs[name] for name in at.study.chosen(names)]
    models = ("path", "height", "width", "dtype")
    rates = []
    for run in different(runs, lambda run: [getattr(run.model, name) for name in models]):
        with advice_where_memory_ends(run, "train"):
            rates.append(measure_run(run, tell))
        write_rates(at.rates, rates[-1:])  # one that fails loses none of those before
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rates


def measure_run(run: RunConfig, tell: Tell) -> Rate:
    """Load a run's model as training does, and time what training does with it.

    Raises:
        UserError: if the model cannot be loaded, or its attention is wrong on this card.
    """
    m, t = run.model, run.train
    tell(f"{run.run}: {m.path}, {m.height}x{m.width}, {m.dtype}")
    begun = time.monotonic()
    model = load_model(m)
    parameters = model.prepare_training(run.seed)
    if t.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    prompt = random_prompt(model)
    check_attention(model, prompt)
    card = card_of(model.device)
    tell(f"  loading: {time.monotonic() - begun:.1f} s, on {card}")
    size = batch_of(model, prompt, t.micro_batch)
    sampling = 1000 * sampling_seconds(model, run, prompt, size)
    tell(f"  sampling: {sampling:.4g} ms an evaluation, {size} latents at once")
    training = 1000 * training_seconds(model, parameters, t.train_micro_batch, prompt)
    tell(f"  training: {training:.4g} ms an evaluation, {t.train_micro_batch} latents at once")
    latents = torch.randn(t.decode_batch, *model.image_shape, device=model.device)
    whole = seconds_of(lambda: model.decode(latents, t.decode_batch), model.device)
    decoding = 1000 * whole / t.decode_batch
    tell(f"  decoding: {decoding:.4g} ms an image, {t.decode_batch} at once")
    batches = f"batches {size}/{t.train_micro_batch}/{t.decode_batch}"
    today = datetime.date.today().isoformat()
    return Rate(
        card=card,
        model=architecture(m.family, model.config),
        name=m.path if is_hub_id(m.path) else "",
        height=m.height,
        width=m.width,
        dtype=m.dtype,
        sampling_ms=sampling,
        training_ms=training,
        decoding_ms=decoding,
        source=f"egrpo measure, {today}, torch {torch.__version__}, {batches}",
    )


def card_of(device: torch.device) -> str:
    """A device's name; of a CPU with its threads, on which times depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{platform.machine()} {device.type}{threads}"


def random_prompt(model: FlowModel) -> Conditioning:
    """Embeddings [1, L, D] of no prompt, of the shape that the family's have.

    What they hold changes no time, so the text encoders, which take memory, stay away.

    Raises:
        UserError: if the transformer's config does not say how wide they are.
    """
    config, device, dtype = model.config, model.device, model.dtype
    width = config.get("joint_attention_dim") or config.get("cap_feat_dim")
    if not width:
        raise UserError(f"model.path: {model.settings.path}: does not say the width of prompts")
    pooled = config.get("pooled_projection_dim")
    whole = model.sequence_length + clip_tokens(model.settings)
    length = whole if model.equal_lengths else min(SHORT, model.sequence_length)
    tensors = {"embeds": torch.randn(1, length, width, device=device, dtype=dtype)}
    if pooled:
        tensors["pooled"] = torch.randn(1, pooled, device=device, dtype=dtype)
    if not model.equal_lengths:
        tensors["lengths"] = torch.tensor([length], device=device)
    return Conditioning(tensors, tensors if model.evaluations_per_velocity > 1 else {})


def clip_tokens(settings: Model) -> int:
    """Text tokens beside those of ``max_sequence_length``; UserError if the file is damaged."""
    if settings.family != "sd3":
        return 0
    path = Path(settings.path) / "tokenizer" / "tokenizer_config.json"
    said = read_json(path) if path.is_file() else {}
    most = said.get("model_max_length") if isinstance(said, dict) else None
    return most if isinstance(most, int) and 0 < most <= CLIP_TOKENS else CLIP_TOKENS


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a piece of work, without its first time, which warms up.

    What else runs on the machine for a moment does not count.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    times: list[float] = []
    while sum(times) < SECONDS or not times:
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _batch(model: FlowModel, prompt: Conditioning, size: int) -> tuple[torch.Tensor, Conditioning]:
    """Latents [size, C, h, w] and as many rows of the prompt."""
    x = torch.randn(size, *model.image_shape, device=model.device)
    rows = torch.zeros(size, dtype=torch.int64, device=model.device)
    return x.to(model.dtype), prompt.rows(rows)


@during("sampling")
def sampling_seconds(model: FlowModel, run: RunConfig, prompt: Conditioning, size: int) -> float:
    """Seconds of one evaluation of one latent, in the network and the batch of rollouts.

    Where features are kept from step to step, the mean over the whole grid.
    """
    x, prompts = _batch(model, prompt, size)
    kept = run.model.feature_cache is not None
    sigmas = training_sigmas(run)[:-1] if kept else (SIGMA,)
    with torch.no_grad(), model.sampling(batch=size) as network:

        def work() -> None:
            if kept and model.twin and model.twin.features:
                model.twin.features.forget()
            for sigma in sigmas:
                model.velocity(x, sigma, prompts, network, tuple(range(size)))

        seconds = seconds_of(work, model.device)
    return seconds / (len(sigmas) * size * model.evaluations_per_velocity)


@during("training")
def training_seconds(
    model: FlowModel, parameters: Iterable[torch.nn.Parameter], size: int, prompt: Conditioning
) -> float:
    """Seconds of one forward and backward of one latent, in the batch of training."""
    x, prompts = _batch(model, prompt, size)

    def work() -> None:
        model.velocity(x, SIGMA, prompts).float().square().mean().backward()

    seconds = seconds_of(work, model.device)
    for p in parameters:
        p.grad = None
    return seconds / (size * model.evaluations_per_velocity)
