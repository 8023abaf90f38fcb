"""What is trained of a model: a LoRA or all weights, how it is saved and brought in again."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from egrpo.core.seeds import normal
from egrpo.errors import UserError, refusing
from egrpo.models.adapter import ADAPTER_FILE, read_adapter, write_adapter
from egrpo.models.conditioning import Conditioning
from egrpo.models.loading import from_pretrained, resolve_device
from egrpo.models.modules import repeated_blocks, whole
from egrpo.models.twin import Twin
from egrpo.store.files import replacing, write_text

if TYPE_CHECKING:
    from egrpo.config.models import Model

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class Trainable(ABC):
    """A transformer, what training adds to it, and the copy of it that samples.

    Attributes:
        pipeline: name in diffusers.
        lora_targets: layers adapted by default.
        equal_lengths: whether all prompts have one length, so that batches come in few shapes.
    """

    pipeline: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]]
    equal_lengths: ClassVar[bool] = False

    def __init__(self, settings: Model) -> None:
        self.settings = settings
        self.device = resolve_device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.transformer: Any = None
        self.twin: Twin | None = None  # of the transformer, see `sampling`
        self.sharded = False
        self.fits: int | None = None  # latents in one call, see egrpo.sampling.fit
        self.reference: Any = None

    @abstractmethod
    def velocity(
        self, x: Tensor, sigma: float, conditioning: Conditioning, module: nn.Module | None = None
    ) -> Tensor:
        """Velocity [B, C, h, w] at flow time ``sigma``."""

    def prepare_training(self, seed: int, *, reference: bool = False) -> list[nn.Parameter]:
        """Add the LoRA, or unfreeze everything; returns the trainable parameters.

        A LoRA is float32 and starts as the base model: its second factor is zero, its first
        Gaussian of standard deviation 1/rank, a function of ``seed`` and the layer's name; or as
        the adapter ``model.lora.start``.
        ``reference``: :meth:`reference_velocity` will be asked for.
        """
        self.twin = None
        if self.settings.tuning == "full":
            self.reference = copy.deepcopy(self.transformer) if reference else None
            self.transformer.requires_grad_(True)
            return list(self.transformer.parameters())
        return self._add_adapter(seed)

    def _add_adapter(self, seed: int) -> list[nn.Parameter]:
        """Add the LoRA that training begins with, in the place of one that is there."""
        from peft import LoraConfig

        lora = self.settings.lora
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets or list(self.lora_targets),
            init_lora_weights="gaussian",
        )
        self._remove_adapter()
        start = {} if lora.start is None else self._read_start(Path(lora.start))
        with refusing("model.lora.targets"):
            self.transformer.add_adapter(config)
        parameters = self._trained()
        for p in parameters:  # updates of 1e-5 vanish in bfloat16
            p.data = p.data.float()
        layers = dict(self.lora_layers())
        for name, layer in layers.items():  # peft's start, drawn as all noise is
            first = layer.lora_A["default"].weight
            first.data.copy_(normal(tuple(first.shape), seed, "lora", name) / lora.rank)
        for name, (down, up) in start.items():
            if name not in layers:
                raise UserError(
                    f"model.lora.start: {lora.start}: adapts {name}, which is not among "
                    "model.lora.targets; name its layers there"
                )
            if len(down) > lora.rank:
                raise UserError(
                    f"model.lora.start: {lora.start}: has rank {len(down)}; set model.lora.rank to "
                    "that, or more"
                )
            # of a smaller rank the rest of the second factor stays zero
            layers[name].lora_A["default"].weight.data[: len(down)] = down.to(self.device)
            factor = lora.rank / lora.alpha
            layers[name].lora_B["default"].weight.data[:, : len(down)] = factor * up.to(self.device)
        return parameters

    def _remove_adapter(self) -> None:
        if getattr(self.transformer, "peft_config", None):
            self.transformer.unload_lora()
            self.twin = None

    @torch.no_grad()
    def _read_start(self, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer the two factors [rank, in] and [out, rank] of a file, in float32.

        Their product is what it adds to the layer's weights, by diffusers' own reading of it.
        """
        import diffusers

        stock = getattr(diffusers, self.pipeline)
        with refusing(f"model.lora.start: {path}: no adapter that diffusers reads"):
            state, *alphas, metadata = stock.lora_state_dict(
                str(path.parent),
                weight_name=path.name,
                local_files_only=True,
                use_safetensors=True,
                return_alphas=True,  # where a family's files have them
                return_lora_metadata=True,
            )
            if any(key.startswith("text_encoder") for key in state):
                raise UserError(f"model.lora.start: {path}: adapts text encoders too")
            of = {"network_alphas": alphas[0]} if alphas else {}
            stock.load_lora_into_transformer(
                state, transformer=self.transformer, adapter_name="start", metadata=metadata, **of
            )
        found = {}
        for name, layer in self.lora_layers():  # diffusers rounds to the type of the model
            both = [
                state.get(f"transformer.{name}.{part}.weight", getattr(layer, part)["start"].weight)
                for part in ("lora_A", "lora_B")
            ]
            down, up = (factor.detach().float() for factor in both)
            found[name] = down, layer.scaling["start"] * up
        self._remove_adapter()
        if not found:
            raise UserError(f"model.lora.start: {path}: adapts no layer of the transformer")
        return found

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.transformer.parameters() if p.requires_grad]

    def lora_layers(self) -> Iterator[tuple[str, Any]]:
        """(name, layer) of every adapted layer."""
        from peft.tuners.lora import LoraLayer

        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name, module

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
            UserError: if a setting asks for a twin, which could not follow.
        """
        from torch.distributed.fsdp import fully_shard

        m = self.settings
        twins = {
            "feature_cache": m.feature_cache is not None,
            "merge_lora_for_sampling": m.merge_lora_for_sampling and m.tuning == "lora",
            "compile": m.compile is True,
            "cuda_graphs": m.cuda_graphs,
            "fp8_sampling": m.fp8_sampling,
        }
        for key in (key for key, asked in twins.items() if asked):
            raise UserError(f"model.{key}: makes a copy of the weights; switch it off for FSDP")
        for block in repeated_blocks(self.transformer).values():
            fully_shard(block)
        fully_shard(self.transformer)
        self.sharded = True
        return self._trained()

    @contextmanager
    def sampling(self, *, exact: bool = False, batch: int = 1) -> Iterator[Any]:
        """The network that samples, with the weights of this moment; what it keeps is freed after.

        It is the transformer, or its twin (:mod:`egrpo.models.twin`) where the settings ask for
        one; ``exact`` leaves out a twin that keeps features. ``batch``: rows of the largest batch.
        """
        twin = self._twin()
        if twin is None or (exact and twin.features is not None):
            yield self.transformer
            return
        twin.batch = batch
        twin.follow()
        try:
            yield twin.network
        finally:
            if twin.features is not None:
                twin.features.forget()

    def _twin(self) -> Twin | None:
        """Made where the settings ask for it, of the layers that are there by then."""
        m = self.settings
        if self.twin is not None or self.sharded:
            return self.twin
        compiled = self.compiles(m, cuda=self.device.type == "cuda")
        adapted = dict(self.lora_layers()) if m.merge_lora_for_sampling else {}
        if m.cuda_graphs and self.device.type != "cuda":
            raise UserError("model.cuda_graphs: needs a CUDA device; set it to false")
        if adapted or compiled or m.cuda_graphs or m.fp8_sampling or m.feature_cache is not None:
            self.twin = Twin(self.transformer, m, adapted, compiled=compiled)
        return self.twin

    @classmethod
    def compiles(cls, settings: Model, *, cuda: bool) -> bool:
        """Whether the blocks of what samples are compiled."""
        if settings.compile != "auto":
            return settings.compile
        return cuda and cls.equal_lengths and settings.feature_cache is None

    def save(self, folder: Path, *, write: bool = True) -> None:
        """Write what was trained so that stock diffusers loads it.

        Where several processes share the weights all must call it, and one of them writes. LoRA:
        ``pipe.load_lora_weights(folder)``, its scale in its weights; full: a transformer's
        ``from_pretrained(folder)``.
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
        """Bring in what :meth:`save` wrote.

        Raises:
            UserError: if the folder does not hold what ``model.tuning`` says.
        """
        if self.settings.tuning == "lora":
            self._load_adapter(folder)
            return
        module = from_pretrained(
            type(self.transformer),
            folder,
            f"{folder}: cannot be loaded",
            "train the run again",
            dtype=self.dtype,
            use_safetensors=True,
            local_files_only=True,
        )
        self.transformer, self.twin = module.to(self.device), None

    def _load_adapter(self, folder: Path) -> None:
        self._remove_adapter()
        path, rank = folder / ADAPTER_FILE, self.settings.lora.rank
        if not path.exists():
            raise UserError(f"{path}: no such file; training writes it")
        tensors, _ = read_adapter(path)
        ranks = {len(t) for name, t in tensors.items() if "lora_A" in name and t.ndim}
        if ranks and ranks != {rank}:
            raise UserError(
                f"{path}: rank {min(ranks)}, but model.lora.rank is {rank}; train the run again"
            )
        with refusing(f"{path}: cannot be loaded"):
            self.transformer.load_lora_adapter(
                folder,
                weight_name=ADAPTER_FILE,
                prefix="transformer",
                use_safetensors=True,
                adapter_name="default",
            )
        expected = {
            f"transformer.{name}.{part}.weight": getattr(layer, part)["default"].weight
            for name, layer in self.lora_layers()
            for part in ("lora_A", "lora_B")
        }
        differing = set(expected) ^ set(tensors)
        if differing:
            raise UserError(
                f"{path}: does not fit this model: {min(differing)} is in one and not in the other "
                f"(and {len(differing) - 1} more); train the run again"
            )
        for key, p in expected.items():  # diffusers rounds them to the model's type
            p.data = tensors[key].to(self.device)
        self.transformer.requires_grad_(False)
        self.twin = None
