"""Read what `torch.save` wrote without running anything, or believing any size the file claims.

The file is a zip archive: `data.pkl` describes the object, `data/KEY` holds the bytes of each storage.
`torch.load(weights_only=True)` is not used: it takes the sizes from the pickle as they are, so a damaged or
crafted file makes it read beyond a storage's end or fill the memory, and it checks no checksum.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch as th

from ..errors import UserError
from .safe_pickle import DAMAGE, BoundedReader, Global, Interpreter, Refused

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
_CHUNK = 1 << 20


class StateDict(dict[Any, Any]):
    """An OrderedDict as it was saved.

    Attributes:
        metadata: what `torch.nn.Module.state_dict` stores beside the tensors, by module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metadata: Any = None


# What zipfile raises besides on damaged contents.
_ZIP_DAMAGE = (*DAMAGE, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, LookupError)


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
    try:
        with zipfile.ZipFile(path) as archive:
            records = _records(archive, path.stat().st_size)
            pickled = io.BytesIO(_read(archive, _require(records, "data.pkl")))
            if "byteorder" in records and _read(archive, records["byteorder"]) != b"little":
                raise Refused("it was written on a big-endian machine")
            reader = BoundedReader(pickled)
            return _TensorInterpreter(reader.size, archive, records).run(reader)
    except Refused as error:
        raise UserError(f"{path}: refused, nothing in it was run: {error}") from None
    except _ZIP_DAMAGE as error:
        told = str(error).strip().splitlines()
        reason = told[0] if told else type(error).__name__
        raise UserError(f"{path}: damaged, or not a file of torch.save's ({reason})") from None


def _records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries without their common folder; none is larger than it is in the file."""
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused(f"its entry {entry.filename[:60]!r} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("its entries together are larger than the file")
    return {entry.filename.partition("/")[2]: entry for entry in entries}


def _require(records: Mapping[str, zipfile.ZipInfo], name: str) -> zipfile.ZipInfo:
    if name not in records:
        raise ValueError(f"it has no entry {name[:60]!r}")
    return records[name]


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    data = bytearray()
    with archive.open(entry) as stream:
        while chunk := stream.read(_CHUNK):  # at the end zipfile compares the checksum
            data += chunk
    if len(data) != entry.file_size:
        raise EOFError(f"its entry {entry.filename[:60]!r} ends too soon")
    return data


@dataclass(frozen=True, eq=False)
class _Storage:
    """The flat contents of one storage."""

    values: th.Tensor


class _TensorInterpreter(Interpreter):
    """The pickle machine, with storages by reference and tensors as views of them."""

    globals: Mapping[tuple[str, str], str] = {
        ("collections", "OrderedDict"): "OrderedDict",
        ("torch._utils", "_rebuild_tensor_v2"): "tensor",
        ("torch._utils", "_rebuild_parameter"): "parameter",
        ("torch", "Size"): "size",
        **{("torch", name): name for name in _STORAGES},
    }
    plain = (str, bytes, int, float, type(None), th.Tensor)

    def __init__(self, size: int, archive: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]):
        super().__init__(size)
        self._archive, self._records = archive, records
        self._storages: dict[tuple[str, str], _Storage] = {}

    def _step(self, name: str, argument: Any) -> None:
        if name == "BINPERSID":
            self._stack.append(self._storage(self._pop()))
        elif name == "BUILD" and len(self._stack) > 1 and isinstance(self._stack[-2], dict):
            state, ordered = self._pop(), self._stack[-1]
            if isinstance(ordered, StateDict) and isinstance(state, dict):
                ordered.metadata = state.get("_metadata")
        else:
            super()._step(name, argument)

    def _storage(self, reference: Any) -> _Storage:
        match reference:
            case ("storage", Global(role=kind), str(key), str(), int(count)) if kind in _STORAGES:
                pass
            case _:
                raise Refused("it refers to something that is no storage")
        if (kind, key) not in self._storages:
            if any(key == other for _, other in self._storages):
                raise Refused("two tensors see one storage as different types")
            entry = _require(self._records, f"data/{key}")
            if entry.file_size != count * _STORAGES[kind].itemsize:
                raise Refused(f"a storage of {count} numbers does not fit its {entry.file_size} bytes")
            data = _read(self._archive, entry)
            dtype = _STORAGES[kind]
            self._storages[kind, key] = _Storage(
                th.frombuffer(data, dtype=dtype) if data else th.empty(0, dtype=dtype)
            )
        return self._storages[kind, key]

    def _call(self, function: Any, arguments: Any) -> Any:
        role = function.role if isinstance(function, Global) else None
        match role, arguments:
            case "OrderedDict", ():
                return StateDict()
            case "parameter", (th.Tensor() as tensor, *_):
                return tensor
            case "size", (tuple() as sizes,) if all(type(n) is int for n in sizes):
                return sizes
            case "tensor", (_Storage() as storage, int(offset), tuple() as size, tuple() as stride, *_):
                return _view(storage.values, offset, size, stride)
        raise Refused(f"it calls {role or 'something that is no function'} in an unusual way")

    def _is_key(self, value: Any) -> bool:
        # The optimizer's keys are small numbers; large ones could be chosen to collide.
        return super()._is_key(value) or (type(value) is int and 0 <= value < 1 << 32)


def _view(values: th.Tensor, offset: int, size: tuple[Any, ...], stride: tuple[Any, ...]) -> th.Tensor:
    """A tensor that lies in a storage, without seeing any of it twice."""
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or not 0 <= n < 1 << 40 for n in numbers):
        raise Refused("a tensor's shape is not a few whole numbers")
    if len(size) != len(stride) or len(size) > 8:
        raise Refused("a tensor's shape and strides do not belong together")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > len(values) or last >= max(1, len(values)):
        raise Refused(f"a tensor of shape {size!r:.60} does not fit its storage of {len(values)} numbers")
    return values.as_strided(size, stride, offset if count else 0)
