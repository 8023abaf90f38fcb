"""What all model families share: loading, guidance, decoding, LoRA, saving.

A family is a subclass that says how its network is called and how its prompts are encoded; see
:mod:`egrpo.models.families`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from egrpo.core.seeds import normal
from egrpo.errors import UserError, during, one_line
from egrpo.images import Images
from egrpo.models.adapter import ADAPTER_FILE, read_adapter, write_adapter
from egrpo.models.attention import use_attention
from egrpo.models.conditioning import Conditioning, padded
from egrpo.models.features import KeptFeatures
from egrpo.models.latents import Latents, latents_of
from egrpo.store.files import replacing, write_text

if TYPE_CHECKING:
    from egrpo.config.models import Model
    from egrpo.config.prompts import Prompt

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
ATTENTION = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""Linear layers of joint attention, as diffusers names them."""

Tensors = dict[str, Tensor]


def resolve_device(name: str, key: str = "model.device") -> torch.device:
    """``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"{key}: {name!r} is not a torch device (auto, cpu, cuda)") from None


class FlowModel(ABC):
    """Velocity, decoding and trainable parameters of one pipeline in diffusers' format.

    Latents are [B, C, h, w] whatever the network packs them into; sigma is the flow time in
    [0, 1]; the velocity is noise minus data. Text encoders are loaded by :meth:`encode` only.

    Attributes:
        pipeline, transformer_class, vae_class: names in diffusers.
        lora_targets: layers adapted by default.
        tokens: ``model.max_sequence_length`` where it is null.
    """

    pipeline: ClassVar[str]
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str] = "AutoencoderKL"
    lora_targets: ClassVar[tuple[str, ...]]
    tokens: ClassVar[int]

    def __init__(self, settings: Model, device: str | None = None, *, parts: Any = None) -> None:
        """Load the transformer and the VAE, or take the two modules in ``parts``."""
        self.settings = settings
        self.device = resolve_device(device or settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.transformer: Any
        self.vae: Any
        self.transformer, self.vae = parts or (
            self._load(self.transformer_class, "transformer"),
            self._load(self.vae_class, "vae"),
        )
        self.config = self.transformer.config
        if parts is None:
            self._check_scale()
        if settings.channels_last and self.vae_class == "AutoencoderKL":  # not of video
            self.vae.to(memory_format=torch.channels_last)
        if settings.vae_tiling:
            self.vae.enable_tiling()
        if settings.vae_slicing:
            self.vae.enable_slicing()
        use_attention(self.transformer, settings.attention_backend)
        if settings.fp8_weights:
            self.transformer.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=self.dtype
            )
        if settings.compile:
            compile_blocks(self.transformer)
        self._copy: Any = None  # of the transformer, see `sampling`
        self.features: KeptFeatures | None = None
        self.reference: Any = None

    # -- loading ---------------------------------------------------------------------------

    @during("loading")
    def _load(self, class_name: str, part: str) -> nn.Module:
        import diffusers

        from egrpo.settings import is_hub_id

        source = self.settings.path
        local = Path(source).is_dir()
        if not local and not is_hub_id(source):
            raise UserError(f"model.path: {source}: no such folder, and not a hub id (owner/name)")
        cls = getattr(diffusers, class_name)
        where = {"subfolder": part, "revision": self.settings.revision, "local_files_only": local}
        try:
            self._check_class(cls.load_config(source, **where), class_name, f"{source}/{part}")
            module, report = cls.from_pretrained(
                source, dtype=self.dtype, use_safetensors=True, output_loading_info=True, **where
            )
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # diffusers raises many kinds; all mean: not loadable
            raise UserError(
                f"model.path: {source}/{part}: cannot be loaded as {class_name}: {one_line(error)}"
            ) from None
        missing = report["missing_keys"]
        if missing:  # diffusers would go on with random values
            raise UserError(
                f"model.path: {source}/{part}: {len(missing)} weights are missing, such as "
                f"{min(missing)}; download it again"
            )
        try:
            module.to(self.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:  # no driver, no such index
            raise UserError(
                f"model.device: {self.device} cannot be used: {one_line(error, 200)}"
            ) from None
        return cast(nn.Module, module.eval().requires_grad_(False))

    def _check_class(self, config: Any, expected: str, where: str) -> None:
        """Refuse the weights of another family, which diffusers would load as far as they fit."""
        found = config.get("_class_name", expected)
        if found != expected:
            raise UserError(
                f"model.family: {self.settings.family} has a {expected}, but {where} is a {found}; "
                "set model.family to the family of these weights"
            )

    def _check_scale(self) -> None:
        """Refuse a VAE whose config.json gives no scale of latents: it is read when decoding."""
        try:
            finite = self.to_vae(torch.zeros(1, self.latents.channels, 1, 1)).isfinite().all()
        except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError):
            finite = torch.tensor(False)
        if not finite:
            raise UserError(
                f"model.path: {self.settings.path}/vae: config.json does not say the scale of "
                "latents; download it again"
            )

    # -- what a family says ----------------------------------------------------------------

    @abstractmethod
    def network(self, module: nn.Module, x: Tensor, sigma: float, cond: Tensors) -> Tensor:
        """Velocity [B, C, h, w] of one network call, without guidance.

        Args:
            module: the transformer.
            x: [B, C, h, w] in the model's dtype.
            cond: tensors of B prompts, as :meth:`encode_prompt` names them; where prompts differ
                in length, padded, with their ``lengths`` [B].
        """

    @abstractmethod
    def encode_prompt(self, pipe: Any, text: str) -> dict[str, Tensor]:
        """Tensors [1, ...] of one prompt, exactly as the stock pipeline computes them."""

    def guide(self, prompt: Tensor, negative: Tensor) -> Tensor:
        """Classifier-free guidance of two velocities [B, C, h, w]."""
        return negative + self.settings.guidance_scale * (prompt - negative)

    @staticmethod
    def stock_guidance(settings: Model) -> dict[str, float]:
        """Arguments of the stock pipeline's call that mean the same guidance."""
        return {"guidance_scale": settings.guidance_scale}

    def to_vae(self, z: Tensor) -> Tensor:
        """Latents [n, C, h, w] in the VAE's scale."""
        config = self.vae.config
        return z / config.scaling_factor + (config.shift_factor or 0.0)

    # -- shapes and prompts ----------------------------------------------------------------

    @property
    def evaluations_per_velocity(self) -> int:
        """Network evaluations of one velocity: two under classifier-free guidance."""
        return 2 if self.settings.guidance_scale > 1 else 1

    @property
    def latents(self) -> Latents:
        """What transformer and VAE say of latents."""
        return latents_of(self.settings.family, self.config, self.vae.config)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, rows, columns) of one latent at the configured image size.

        Raises:
            UserError: if VAE, patches or positions do not allow the size.
        """
        return self.latents.shape(self.settings.height, self.settings.width)

    @property
    def sequence_length(self) -> int:
        """Most text tokens."""
        given = self.settings.max_sequence_length
        return self.tokens if given is None else given

    def encode(self, prompts: Sequence[Prompt], *, negative: bool) -> Conditioning:
        """Embeddings exactly as the stock pipeline computes them; loads the text encoders.

        Args:
            prompts: texts, and negative texts.
            negative: whether guidance will need the negative texts.
        """
        pipe = self._text_pipeline()
        with torch.no_grad():
            positive = [self._encoded(pipe, p.text) for p in prompts]
            against = [self._encoded(pipe, p.negative or "") for p in prompts] if negative else []
        return Conditioning(padded(positive), padded(against))

    def _encoded(self, pipe: Any, text: str) -> dict[str, Tensor]:
        return {k: v.cpu() for k, v in self.encode_prompt(pipe, text).items()}

    def _text_pipeline(self) -> Any:
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipeline = getattr(diffusers, self.pipeline)
        source = self.settings.path
        where = {"revision": self.settings.revision, "local_files_only": Path(source).is_dir()}
        try:
            # diffusers wants a pipeline saved without T5 to be told so again
            index = pipeline.load_config(source, **where)
            absent = [k for k, entry in index.items() if entry in ([None, None], (None, None))]
            given = {**dict.fromkeys(absent), "transformer": self.transformer, "vae": self.vae}
            pipe = pipeline.from_pretrained(source, dtype=self.dtype, **where, **given)
        except Exception as error:
            raise UserError(f"model.path: {source}: text encoders: {one_line(error)}") from None
        return pipe.to(self.device)

    # -- sampling --------------------------------------------------------------------------

    def velocity(
        self,
        x: Tensor,
        sigma: float,
        conditioning: Conditioning,
        module: nn.Module | None = None,
        paths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Velocity [B, C, h, w] at flow time ``sigma``, guidance inside.

        Args:
            x: [B, C, h, w].
            conditioning: embeddings of B prompts, row by row.
            module: the transformer to use; None takes ``self.transformer``.
            paths: names the batch for features kept from the step before, see
                :meth:`keep_features`.
        """
        module = module or self.transformer
        x = x.to(self.dtype)
        with self._features_of(module, paths, sigma):
            if self.settings.guidance_scale <= 1:
                return self.network(module, x, sigma, conditioning.tensors)
            both = padded([conditioning.negative, conditioning.tensors])
            negative, prompt = self.network(module, torch.cat([x, x]), sigma, both).chunk(2)
        return self.guide(prompt, negative)

    @contextmanager
    def sampling(self, *, exact: bool = False) -> Iterator[Any]:
        """The network that samples, with the weights of this moment; what it keeps is freed after.

        It is the transformer, or a copy of it: one that has the LoRA merged into its weights, that
        keeps features from step to step (unless ``exact``), or both.
        """
        copied = self._copy is not None and not (exact and self.features is not None)
        if copied and self.settings.merge_lora_for_sampling:
            with torch.no_grad():
                for name, layer in self.lora_layers():
                    merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
                    self._copy.get_submodule(name).weight.copy_(merged)
        try:
            yield self._copy if copied else self.transformer
        finally:
            if self.features is not None:
                self.features.forget()

    def keep_features(self) -> None:
        """Make what samples keep features from step to step, where the settings say so.

        Without a merged copy that is a twin that shares all weights with the transformer, which
        itself stays exact.
        """
        if self.settings.feature_cache is None:
            return
        if self._copy is None:
            shared = [*self.transformer.parameters(), *self.transformer.buffers()]
            self._copy = copy.deepcopy(self.transformer, {id(t): t for t in shared})
        self.features = KeptFeatures(self._copy, self.settings.feature_cache, self.dtype)

    def _features_of(
        self, module: nn.Module, paths: tuple[int, ...] | None, sigma: float
    ) -> AbstractContextManager[None]:
        """The kept features of one batch; of none where the module keeps nothing."""
        if self.features is None or module is not self._copy:
            return nullcontext()
        if paths is None:
            raise ValueError("a network that keeps features needs the paths of its batch")
        return self.features.of(paths, sigma)

    @during("decoding")
    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int) -> Images:
        """Images of latents [n, C, h, w], ``batch`` at a time."""
        images = []
        for part in latents.split(batch):
            z = self.to_vae(part.to(self.vae.dtype))
            if self.settings.channels_last and z.ndim == 4:
                z = z.contiguous(memory_format=torch.channels_last)
            x = self.pixels(self.vae.decode(z, return_dict=False)[0]).float()
            images.append(Images.cast(x, part))
        return Images.joined(images)

    def pixels(self, decoded: Tensor) -> Tensor:
        """[n, 3, height, width] of what the VAE returns."""
        return decoded

    # -- training --------------------------------------------------------------------------

    def prepare_training(self, seed: int, *, reference: bool = False) -> list[nn.Parameter]:
        """Add the LoRA, or unfreeze everything; returns the trainable parameters.

        LoRA starts as the base model: its second factor is zero, its first Gaussian of standard
        deviation 1/rank, a function of ``seed`` and the layer's name.
        Its parameters are float32. ``reference``: :meth:`reference_velocity` will be asked for.
        """
        if self.settings.tuning == "full":
            self.reference = copy.deepcopy(self.transformer) if reference else None
            self.transformer.requires_grad_(True)
            self.keep_features()
            return list(self.transformer.parameters())
        from peft import LoraConfig

        if self.settings.merge_lora_for_sampling:
            self._copy = copy.deepcopy(self.transformer)
            if self.settings.compile:
                compile_blocks(self._copy)  # a copy has none of it
        lora = self.settings.lora
        try:
            self.transformer.add_adapter(
                LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    target_modules=lora.targets or list(self.lora_targets),
                    init_lora_weights="gaussian",
                )
            )
        except ValueError as error:
            raise UserError(f"model.lora.targets: {error}") from None
        parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        for p in parameters:  # updates of 1e-5 vanish in bfloat16
            p.data = p.data.float()
        for name, layer in self.lora_layers():  # peft's start, drawn as all noise is
            first = layer.lora_A["default"].weight
            first.data.copy_(normal(tuple(first.shape), seed, "lora", name) / lora.rank)
        self.keep_features()
        return parameters

    @torch.no_grad()
    def reference_velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """Velocity of the model before training: LoRA switched off, or a frozen copy."""
        if self.reference is not None:
            return self.velocity(x, sigma, conditioning, self.reference)
        self.transformer.disable_adapters()
        try:
            return self.velocity(x, sigma, conditioning)
        finally:
            self.transformer.enable_adapters()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        self.transformer.train()  # diffusers checkpoints in train mode only; it has no dropout
        self.transformer.enable_gradient_checkpointing()

    def shard(self) -> list[nn.Parameter]:
        """Cut the transformer's weights up among all processes (FSDP2), block by block.

        Returns:
            The trainable parameters, of which this process now holds its part.

        Raises:
            UserError: if there is a copy for sampling, which could not follow.
        """
        from torch.distributed.fsdp import fully_shard

        if self._copy is not None:
            key = "feature_cache" if self.settings.feature_cache else "merge_lora_for_sampling"
            raise UserError(f"model.{key}: makes a copy of the weights; switch it off for FSDP")
        for block in repeated_blocks(self.transformer):
            fully_shard(block)
        fully_shard(self.transformer)
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def lora_layers(self) -> Iterator[tuple[str, Any]]:
        """(name, layer) of every adapted layer."""
        from peft.tuners.lora import LoraLayer

        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

    # -- what was trained ------------------------------------------------------------------

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write what was trained so that stock diffusers loads it.

        Where several processes share the weights all must call it, and one of them writes.

        LoRA: ``pipe.load_lora_weights(folder)``; full: a transformer's ``from_pretrained(folder)``.
        An adapter's scale is in its weights: :func:`egrpo.models.adapter.write_adapter`.
        """
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        lora = self.settings.tuning == "lora"
        state = (
            get_peft_model_state_dict(self.transformer) if lora else self.transformer.state_dict()
        )
        state = {k: whole(v).contiguous() for k, v in state.items()}
        if not write:
            return
        if not lora:
            write_text(folder / "config.json", self.transformer.to_json_string())
            with replacing(folder / WEIGHTS_FILE) as temporary:
                save_file(state, temporary, metadata={"format": "pt"})
            return
        config = self.transformer.peft_config["default"].to_dict()
        plain = {
            f"transformer.{k}": sorted(v) if isinstance(v, set) else v
            for k, v in config.items()
            if k in ("r", "lora_alpha", "target_modules", "init_lora_weights", "lora_dropout")
        }
        tensors = {f"transformer.{k}": v for k, v in state.items()}
        write_adapter(folder / ADAPTER_FILE, tensors, plain)

    def load(self, folder: Path) -> None:
        """Bring in what :meth:`save` wrote, LoRA merged into the weights.

        Raises:
            UserError: if the folder does not hold what ``model.tuning`` says.
        """
        if self.settings.tuning == "full":
            try:
                module, report = type(self.transformer).from_pretrained(
                    folder,
                    dtype=self.dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise UserError(f"{folder}: cannot be loaded: {one_line(error)}") from None
            if report["missing_keys"]:
                raise UserError(
                    f"{folder}: {min(report['missing_keys'])} is missing; train the run again"
                )
            self.transformer = module.to(self.device)
            return
        path = folder / ADAPTER_FILE
        if not path.exists():
            raise UserError(f"{path}: no such file; training writes it")
        shapes = self._adapter_shapes(path)
        try:
            self.transformer.load_lora_adapter(
                folder, weight_name=ADAPTER_FILE, prefix="transformer", use_safetensors=True
            )
        except Exception as error:
            raise UserError(f"{path}: cannot be loaded: {one_line(error)}") from None
        expected = {
            f"transformer.{name}.{part}.weight"
            for name, _ in self.lora_layers()
            for part in ("lora_A", "lora_B")
        }
        differing = expected ^ set(shapes)
        if differing:
            raise UserError(
                f"{path}: does not fit this model: {min(differing)} is in one and not in the other "
                f"(and {len(differing) - 1} more); train the run again"
            )
        self.transformer.fuse_lora()

    def _adapter_shapes(self, path: Path) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor in an adapter file, whose checksum and rank are checked."""
        tensors, _ = read_adapter(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        ranks = {shape[0] for name, shape in shapes.items() if "lora_A" in name and shape}
        if ranks and ranks != {self.settings.lora.rank}:
            raise UserError(
                f"{path}: rank {min(ranks)}, but model.lora.rank is {self.settings.lora.rank}; "
                "train the run again"
            )
        return shapes


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that several processes may share; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, cut as ``like`` is; undoes :func:`whole`."""
    if not isinstance(like, DTensor) or tensor.ndim == 0:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def repeated_blocks(network: Any) -> list[Any]:
    """The blocks that a network repeats; the rest is small."""
    names = set(network._no_split_modules)
    return [module for module in network.modules() if type(module).__name__ in names]


def compile_blocks(network: Any) -> None:
    """Compile the repeated blocks."""
    for block in repeated_blocks(network):
        block.compile()
