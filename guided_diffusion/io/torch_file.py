"""Read what `torch.save` wrote without running anything, or believing any size the file claims.

The file is a zip archive: `data.pkl` describes the object, `data/KEY` holds the bytes of each storage.
`torch.load(weights_only=True)` is not used: it takes the sizes from the pickle as they are, so a damaged or
crafted file makes it read beyond a storage's end or fill the memory, and it checks no checksum.
"""

import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import torch as th

from ..errors import UserError
from .safe_pickle import DataUnpickler, Name, are_sizes, telling

_STORAGES = {
    "FloatStorage": th.float32,
    "HalfStorage": th.float16,
    "BFloat16Storage": th.bfloat16,
    "DoubleStorage": th.float64,
    "LongStorage": th.int64,
    "IntStorage": th.int32,
    "ShortStorage": th.int16,
    "CharStorage": th.int8,
    "ByteStorage": th.uint8,
    "BoolStorage": th.bool,
}


class StateDict(dict[Any, Any]):
    """An OrderedDict as it was saved.

    Attributes:
        metadata: what `torch.nn.Module.state_dict` stores beside the tensors, by module.
    """

    metadata: Any = None


def read_torch_file(path: str | os.PathLike) -> Any:
    """Read a `.pt` file, of torch 1.6 or newer, onto the CPU.

    Returns:
        What was saved, out of dict, list, tuple, str, int, float, bool, None and dense tensors. An
        OrderedDict comes back as `StateDict`, a parameter as tensor; expanded tensors are refused.

    Raises:
        UserError: missing, damaged (every byte read is covered by a checksum), holding anything but
            the above, or claiming more than the file can hold.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    with telling(path, "damaged, or not a file of torch.save's"), zipfile.ZipFile(path) as archive:
        return _TensorUnpickler(archive, path.stat().st_size).load()


@dataclass(frozen=True, eq=False)
class _Storage:
    """The flat contents of one storage, and its type's name."""

    kind: str
    values: th.Tensor


class _TensorUnpickler(DataUnpickler):
    """With storages by reference and tensors as views of them."""

    names: ClassVar[set[str]] = {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.Size",
        *(f"torch.{kind}" for kind in _STORAGES),
    }
    keys = (str, bytes, int)  # the optimizer's are numbers
    plain = (str, bytes, int, float, type(None), th.Tensor)

    def __init__(self, archive: zipfile.ZipFile, size: int):
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise UnpicklingError("an entry is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size:
            raise UnpicklingError("its entries together are larger than the file")
        self._archive = archive
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        self._storages: dict[str, _Storage] = {}
        if "byteorder" in self._entries and self._read("byteorder") != b"little":
            raise UnpicklingError("it was written on a big-endian machine")
        super().__init__(io.BytesIO(self._read("data.pkl")))

    def _read(self, name: str) -> bytes:
        if name not in self._entries:
            raise ValueError(f"it has no entry {name!r:.60}")
        return self._archive.read(self._entries[name])  # zipfile compares the checksum

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that is meant."""
        match pid:
            case ("storage", Name(kind), str(key), str(), int(count)) if kind in _STORAGES:
                pass
            case _:
                raise UnpicklingError("it refers to something that is no storage")
        if key not in self._storages:
            dtype, data = _STORAGES[kind], bytearray(self._read(f"data/{key}"))
            if len(data) != count * dtype.itemsize:
                raise UnpicklingError(f"a storage's size does not fit its {len(data)} bytes")
            values = th.frombuffer(data, dtype=dtype) if data else th.empty(0, dtype=dtype)
            self._storages[key] = _Storage(kind, values)
        if self._storages[key].kind != kind:
            raise UnpicklingError("two tensors see one storage as different types")
        return self._storages[key]

    def call(self, function: Any, arguments: Any) -> Any:
        """What the allowed calls produce."""
        match function, arguments:
            case Name("OrderedDict"), ():
                return StateDict()
            case Name("_rebuild_parameter"), (th.Tensor() as tensor, *_):
                return tensor
            case Name("Size"), (tuple() as sizes,) if all(type(n) is int for n in sizes):
                return sizes
            case Name("_rebuild_tensor_v2"), (_Storage(_, values), offset, tuple(size), tuple(stride), *_):
                return _view(values, offset, size, stride)
        return super().call(function, arguments)

    def build(self, value: Any, state: Any) -> Any:
        """`value` with its attributes."""
        if not isinstance(value, StateDict) or not isinstance(state, dict):
            return super().build(value, state)
        value.metadata = state.get("_metadata")
        return value


def _view(values: th.Tensor, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> th.Tensor:
    """A tensor that lies in a storage, without seeing any of it twice."""
    if not are_sizes((offset, *size, *stride)) or len(size) != len(stride) or len(size) > 8:
        raise UnpicklingError("a tensor's shape and strides are not a few whole numbers each")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > len(values) or last >= max(1, len(values)):
        raise UnpicklingError(f"a tensor of shape {size} does not fit its storage of {len(values)} numbers")
    return values.as_strided(size, stride, offset if count else 0)
