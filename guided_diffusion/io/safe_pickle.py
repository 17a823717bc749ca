"""Read pickled arrays without running anything: pools, CIFAR-10 and ImageNet-32 batch files.

A pickle is a program. The standard library's interpreter in Python runs it here with only those
instructions that describe data; names stand for nothing, and a call chooses one of the few cases written
out in `DataUnpickler.call`. The interpreter in C cannot be restricted so: even with a harmless `find_class`,
a file of a few bytes makes it fill 16 GiB of memory with a memo, and one of 100 KB crashes the process with
a deeply nested tuple as a dictionary's key.
"""

import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ..errors import UserError, first_line

_DTYPE_CODE = re.compile(r"[iu][1248]|f[248]")
_USUAL = pickle._Unpickler.dispatch
# APPEND and APPENDS are safe because nothing but a list has the methods they call here.
_UNCHANGED = """
    PROTO MARK STOP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT GLOBAL
    STACK_GLOBAL BINPERSID GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
"""


def load_arrays(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Any:
    """Read a pickle (protocol 0 to 5, numpy 1 or 2 names, Python 2 or 3) of plain data and arrays.

    Args:
        source: a path, or a seekable binary stream standing at the start of the pickle.
        name: what to call the file in messages; a path's or stream's own name by default.

    Returns:
        What was pickled, out of dict (keys: str or bytes), list, tuple, str, bytes, int, float, bool,
        None, numpy scalars and numpy arrays of integers and floats. defaultdict comes back as dict,
        bytearray as bytes, Python 2 strings as str (latin-1). Arrays are read-only views of the bytes
        read and keep the byte order of the file.

    Raises:
        UserError: missing or truncated file, anything but the above (a pickle that wants to call
            something is refused, naming it, and nothing is run), or an array whose shape does not
            match its bytes.
    """
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            raise UserError(f"no such file: {source}")
        with open(source, "rb") as stream:
            return load_arrays(stream, name)
    with telling(name or getattr(source, "name", "pickle"), "truncated, or not a pickle"):
        return DataUnpickler(source).load()


@contextmanager
def telling(name: Any, damaged: str) -> Iterator[None]:
    """Turn what reading the file `name` raises into a `UserError` of one line."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(f"{name}: refused, nothing in it was run: {error}") from None
    except MemoryError:
        raise  # of this machine's; no file's claims lead to it
    except Exception as error:  # the interpreter checks nothing: there is no list of what it raises
        reason = first_line(error)
        raise UserError(f"{name}: {damaged} ({reason:.200})") from None


class _Bounded:
    """A stream that refuses a length beyond its end before allocating it."""

    def __init__(self, stream: BinaryIO):
        self._stream, start = stream, stream.tell()
        self.left = stream.seek(0, os.SEEK_END) - start
        stream.seek(start)

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count} more bytes are expected, {self.left} are left")
        self.left -= count
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline()
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise EOFError("it ends within a line")
        return line


@dataclass(frozen=True)
class Name:
    """A name that the file mentions, without its module. Inert: `DataUnpickler.call` gives it a meaning."""

    name: str


@dataclass(eq=False)
class _Unbuilt:
    """A dtype, or an array (of no dtype yet), until BUILD tells the rest."""

    dtype: np.dtype | None
    built: Any = field(init=False)


class _Memo(dict[int, Any]):
    """What PUT saved, by number. What was saved unfinished is found as what became of it."""

    def __setitem__(self, key: int, value: Any) -> None:
        if key >> 32:  # larger ones could be chosen to collide
            raise UnpicklingError("it numbers its values absurdly")
        super().__setitem__(key, value)

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        return getattr(value, "built", value)


class DataUnpickler(pickle._Unpickler):
    """Reads plain data and arrays from a stream; `torch_file` teaches it tensors.

    What it refuses raises UnpicklingError; damaged contents may raise anything, see `telling`.

    Attributes:
        names: what the file may mention.
        keys: the types of dictionaries' keys.
        plain: the types that may be left in the end, besides dict, list and tuple.
    """

    names: ClassVar[set[str]] = {
        "collections.defaultdict",
        "_codecs.encode",  # how Python 3 writes bytes in protocols 0 to 2,
        "__builtin__.bytes",  # and no bytes at all
        "numpy.ndarray",
        "numpy.dtype",
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),  # protocol 5
    }
    keys: ClassVar[tuple[type, ...]] = (str, bytes)
    plain: ClassVar[tuple[type, ...]] = (str, bytes, int, float, type(None), np.ndarray, np.generic)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: BinaryIO):
        bounded = _Bounded(stream)
        super().__init__(bounded, encoding="latin-1")
        self.memo = _Memo()
        self._allowance = bounded.left  # what copying may produce: as much as the file holds

    def load(self) -> Any:
        """What the pickle holds: shared or circular it may be, but not unfinished."""
        return self.checked(super().load())

    def checked(self, content: Any) -> Any:
        """`content`, all of which is plain."""
        values, seen = [content], set()
        for value in values:
            if not isinstance(value, (list, tuple, dict, *self.plain)):
                raise UnpicklingError("it holds something else than plain data and arrays")
            if isinstance(value, (list, tuple, dict)) and id(value) not in seen:
                seen.add(id(value))
                values.extend(value.values() if isinstance(value, dict) else value)
        return values[0]

    def find_class(self, module: str, name: str) -> Name:
        """Look nothing up."""
        asked = f"{module}.{name}"
        if asked not in self.names:
            raise UnpicklingError(f"it asks for {asked!r:.80}, which arrays have no need of")
        return Name(name)

    def call(self, function: Any, arguments: Any) -> Any:
        """What the allowed calls produce; nothing that the file names is called."""
        match function, arguments:
            case Name("defaultdict"), () | (None,):
                return {}
            case Name("bytes"), ():
                return b""
            case Name("encode"), (str(text), "latin1" | "latin-1"):
                return self._as_bytes(text)
            case Name("dtype"), (str(code), *_):
                if not _DTYPE_CODE.fullmatch(code):
                    raise UnpicklingError(f"it holds an array of type {code!r:.20}, which is no plain number")
                return _Unbuilt(np.dtype(code))
            case Name("_reconstruct"), (Name("ndarray"), *_):
                return _Unbuilt(None)
            case Name("scalar"), (np.dtype() as dtype, data):
                return self._array(data, dtype, (), "C")[()]
            case Name("_frombuffer"), (data, np.dtype() as dtype, shape, "C" | "F" as order):
                return self._array(data, dtype, shape, order)
        called = function.name if isinstance(function, Name) else "something that is no function"
        raise UnpicklingError(f"it calls {called} in an unusual way")

    def build(self, value: Any, state: Any) -> Any:
        """What becomes of an unfinished value."""
        match value, state:
            case _Unbuilt(np.dtype() as dtype), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
                value.built = dtype.newbyteorder(order)
            case _Unbuilt(None), (1, shape, np.dtype() as dtype, bool() | 0 | 1 as fortran, data):
                value.built = self._array(data, dtype, shape, "F" if fortran else "C")
            case _:
                raise UnpicklingError("it describes something in an unusual way")
        return value.built

    def _as_bytes(self, value: Any) -> bytes:
        if isinstance(value, str):
            # A small file that copies one long string many times must not fill the memory.
            self._allowance -= len(value)
            if self._allowance < 0:
                raise UnpicklingError("it unfolds into more than the file holds")
            return value.encode("latin-1")
        if not isinstance(value, bytes):
            raise UnpicklingError(f"an array's contents are a {type(value).__name__}, not bytes")
        return value

    def _array(self, contents: Any, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
        """A read-only view of the contents; the shape must account for every byte."""
        data = self._as_bytes(contents)
        if not isinstance(shape, tuple) or not are_sizes(shape) or len(shape) > 8:
            raise UnpicklingError("an array's shape is not a few whole numbers")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise UnpicklingError(f"an array of shape {shape} does not fit its {len(data)} bytes")
        return np.ndarray(shape, dtype, data, order=order)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        for key in items[::2]:
            # Hashes of large numbers can be made to collide, and those of nested tuples recurse.
            if type(key) not in self.keys or (type(key) is int and key >> 32):
                raise UnpicklingError(f"a dictionary's key is a {type(key).__name__}")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _refuse(self) -> None:
        raise UnpicklingError("it uses an instruction that arrays have no need of")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(_USUAL, _refuse),
        **{code: _USUAL[code] for code in (getattr(pickle, name)[0] for name in _UNCHANGED.split())},
        pickle.FRAME[0]: lambda self: self.read(8),  # helps only a reader that buffers
        pickle.BYTEARRAY8[0]: _USUAL[pickle.BINBYTES8[0]],  # its own allocates before it reads
        pickle.DICT[0]: _dict,
        pickle.SETITEM[0]: lambda self: self._update([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        pickle.REDUCE[0]: lambda self: self.stack.append(self.call(self.stack.pop(-2), self.stack.pop())),
        pickle.BUILD[0]: lambda self: self.stack.append(self.build(self.stack.pop(-2), self.stack.pop())),
    }


def are_sizes(values: tuple[Any, ...]) -> bool:
    """Whether all are whole numbers that may be multiplied without fear."""
    return all(type(n) is int and 0 <= n < 1 << 40 for n in values)
