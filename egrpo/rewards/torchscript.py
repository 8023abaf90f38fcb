"""TorchScript archives, the format of OpenAI's CLIP weights, read as tables of weights.

``torch.jit.load`` runs what an archive's ``__setstate__`` says, and that may write files. Here
its pickle may build tensors and nothing else, and its code is never looked at.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


def is_torchscript(path: str) -> bool:
    """Whether a file is such an archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: str) -> dict[str, Tensor]:
    """Tensors of an archive by dotted name, as its module's ``state_dict`` has them.

    Raises:
        Exception: of some kind, if it is damaged or its pickle asks for more than tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl"))
        module = _Reader(archive, root.removesuffix("data.pkl")).load()
    out: dict[str, Tensor] = {}
    _collect(module, "", out)
    return out


class _Object:
    """Stands for an object of any class of the archive."""


def _collect(found: Any, prefix: str, out: dict[str, Tensor]) -> None:
    for name, value in vars(found).items():
        if isinstance(value, Tensor):
            out[f"{prefix}{name}"] = value
        elif isinstance(value, _Object):
            _collect(value, f"{prefix}{name}.", out)


class _Reader(pickle.Unpickler):
    """Objects without behavior and tensors without code."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name."""
        if module.startswith("__torch__"):
            return type("Object", (_Object,), {})  # its own: a pickle can write on a class
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        harmless: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): lambda: OrderedDict(),
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: (
                storage.as_strided(size, stride, offset)
            ),
            ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
            **{("torch.jit._pickle", kind): lambda value: value for kind in LISTS},
        }
        if (module, name) not in harmless:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among weights")
        return harmless[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The elements of one storage, all in one dimension."""
        _, dtype, key, _, count = pid
        record = self.archive.getinfo(f"{self.root}data/{key}")
        if record.compress_type != zipfile.ZIP_STORED:  # small files must not become large
            raise pickle.UnpicklingError(f"record {record.filename} is compressed")
        return torch.frombuffer(bytearray(self.archive.read(record)), dtype=dtype, count=count)
