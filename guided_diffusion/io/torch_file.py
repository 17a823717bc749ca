"""Read what `torch.save` wrote without running anything, or believing any size the file claims.

The file is a zip archive: `data.pkl` describes the object, `data/KEY` holds the bytes of each storage.
`torch.load(weights_only=True)` is not used: it takes the sizes from the pickle as they are, so a damaged or
crafted file makes it read beyond a storage's end or fill the memory, and it checks no checksum.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
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

# A pickle of the number that began a file of torch.save's before 1.6.
_MOST_VIEWS = 4  # times that tensors may see a file's numbers, as tied weights do
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


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
        OrderedDict comes back as `StateDict`, a parameter as tensor; expanded tensors are refused. Of a
        `.ckpt`, as PyTorch Lightning saves it, the `state_dict` alone, if it has one.

    Raises:
        UserError: missing, damaged (every byte read is covered by a checksum), holding anything but
            the above, or claiming more than the file can hold.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    with open(path, "rb") as file:
        if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
            raise UserError(f"{path}: is in the format of torch before 1.6: torch.load it and save it again")
    with telling(path, "damaged, or not a file of torch.save's"), zipfile.ZipFile(path) as archive:
        kind = _LightningUnpickler if path.suffix == ".ckpt" else _TensorUnpickler
        return kind(archive, path.stat().st_size).load()


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
        self._archive, self._size = archive, size
        self._seen = 0  # bytes that its tensors would have, each by itself
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
                view = _view(values, offset, size, stride)
                self._seen += view.nbytes
                if self._seen > _MOST_VIEWS * self._size:
                    raise UnpicklingError("its tensors see the same numbers again and again")
                return view
        return super().call(function, arguments)

    def build(self, value: Any, state: Any) -> Any:
        """`value` with its attributes."""
        if not isinstance(value, StateDict) or not isinstance(state, dict):
            return super().build(value, state)
        value.metadata = state.get("_metadata")
        return value


class _Ignored:
    """Whatever a Lightning checkpoint holds beside tensors: a class, an object of it, a function's result.

    It stands in the place of each, has nothing of any, and takes no notice of what is done with it.
    """

    def append(self, item: Any) -> None:
        """As of a list."""

    def extend(self, items: Any) -> None:
        """As of a list."""


class _LightningUnpickler(_TensorUnpickler):
    """Reads the `state_dict` of a file that may also hold callbacks, loop states and hyper-parameters.

    Names that tensors have no need of become `_Ignored`, and so does what is made with them. None may be left
    inside the state_dict.
    """

    def load(self) -> Any:
        """The state_dict; all that the file holds if there is none."""
        content = pickle._Unpickler.load(self)
        return self.checked(content.get("state_dict", content) if isinstance(content, dict) else content)

    def find_class(self, module: str, name: str) -> Any:
        """Look nothing up."""
        return super().find_class(module, name) if f"{module}.{name}" in self.names else _Ignored()

    def call(self, function: Any, arguments: Any) -> Any:
        """What tensors are made by; nothing else is called."""
        match function, arguments:
            case _Ignored(), _:
                return function
        return super().call(function, arguments)

    def build(self, value: Any, state: Any) -> Any:
        """`value` with its attributes, if it has any."""
        return value if isinstance(value, _Ignored) else super().build(value, state)

    def _update(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], _Ignored):
            return
        known = [
            part
            for pair in zip(items[::2], items[1::2], strict=True)
            if type(pair[0]) in self.keys
            for part in pair
        ]
        super()._update(known)

    def _new(self) -> None:
        function, arguments = self.stack.pop(-2), self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def _new_with_names(self) -> None:
        self.stack.pop()
        self._new()

    def _set(self) -> None:
        self.pop_mark()
        self.stack.append(_Ignored())

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **DataUnpickler.dispatch,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_names,
        pickle.EMPTY_SET[0]: lambda self: self.stack.append(_Ignored()),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: _set,
    }


def _view(values: th.Tensor, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> th.Tensor:
    """A tensor that lies in a storage, and has no more numbers than it."""
    if not are_sizes((offset, *size, *stride)) or len(size) != len(stride) or len(size) > 8:
        raise UnpicklingError("a tensor's shape and strides are not a few whole numbers each")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
    if count > len(values) or last >= max(1, len(values)):
        raise UnpicklingError(f"a tensor of shape {size} does not fit its storage of {len(values)} numbers")
    return values.as_strided(size, stride, offset if count else 0)
