"""Read pickled arrays without running anything: pools, CIFAR-10 and ImageNet-32 batch files.

A pickle is a program. This is an interpreter for the part of its language that describes plain data
and numpy arrays; it has no way to import or call what a file names, so there is nothing to escape
from. `pickletools` decodes the instructions. `pickle.Unpickler` is not used: even with a harmless
`find_class`, a file of a few bytes makes it fill 16 GiB of memory with a memo, and one of 100 KB
crashes the process with a deeply nested tuple as a dictionary's key.
"""

import math
import os
import pickletools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

from ..errors import UserError

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1, numpy 2
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_GLOBALS = {
    ("collections", "defaultdict"): "defaultdict",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes in protocols 0 to 2,
    ("__builtin__", "bytes"): "bytes",  # and no bytes at all
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    **{(module, "_reconstruct"): "reconstruct" for module in _MULTIARRAY},
    **{(module, "scalar"): "scalar" for module in _MULTIARRAY},
    **{(module, "_frombuffer"): "frombuffer" for module in _NUMERIC},  # protocol 5
}
_DTYPE_CODE = re.compile(r"[iu][1248]|f[248]")
_KEYS = (str, bytes)  # their hashes cannot be made to collide, or to recurse as a nested tuple's does
_PLAIN = (*_KEYS, bytearray, int, float, type(None), np.ndarray, np.generic)

# Instructions whose decoded argument is the value itself.
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_PYTHON_2_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING")  # as latin-1
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, *_PYTHON_2_TEXTS, *_BYTES))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}

# What decoding damaged or foreign contents can raise.
DAMAGE = (ValueError, EOFError, OSError)


def load_arrays(source: str | os.PathLike | BinaryIO, name: str | None = None) -> Any:
    """Read a pickle (protocol 0 to 5, numpy 1 or 2 names, Python 2 or 3) of plain data and arrays.

    Args:
        source: a path, or a seekable binary stream standing at the start of the pickle.
        name: what to call the file in messages; a path's or stream's own name by default.

    Returns:
        What was pickled, out of dict (keys: str or bytes), list, tuple, str, bytes, int, float, bool,
        None, numpy scalars and numpy arrays of integers and floats. defaultdict comes back as dict,
        Python 2 strings as str (latin-1). Arrays are read-only views of the bytes read and keep the
        byte order of the file.

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
    name = name or str(getattr(source, "name", "pickle"))
    try:
        reader = BoundedReader(source)
        return Interpreter(reader.size).run(reader)
    except Refused as error:
        raise UserError(f"{name}: refused, nothing in it was run: {error}") from None
    except DAMAGE as error:
        raise UserError(f"{name}: truncated, or not a pickle ({error})") from None


class Refused(Exception):
    """Well-formed, but more than plain data and arrays."""


class BoundedReader:
    """What `pickletools` reads with; refuses a length beyond the end before allocating it."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        start = stream.tell()
        self.size = stream.seek(0, os.SEEK_END) - start
        self._left = self.size
        stream.seek(start)

    def read(self, count: int) -> bytes:
        """Exactly so many bytes, or fewer at the end of the stream."""
        if count > self._left:
            raise EOFError(f"{count} more bytes are expected, {self._left} are left")
        data = self._stream.read(count)
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        """Up to the next line feed."""
        data = self._stream.readline()
        self._left -= len(data)
        return data


def _instructions(reader: BoundedReader) -> Iterator[tuple[str, Any]]:
    """Name and decoded argument of each instruction before STOP."""
    while True:
        code = reader.read(1)
        if code not in _OPCODES:
            raise ValueError(f"it holds {code!r}, which is no instruction")
        opcode = _OPCODES[code]
        if opcode.name == "STOP":
            return
        if opcode.name == "STRING":  # pickletools (Python < 3.14) expects ASCII behind the escapes
            yield opcode.name, _unquoted(reader.readline())
        else:
            yield opcode.name, opcode.arg and opcode.arg.reader(cast(IO[bytes], reader))


def _unquoted(line: bytes) -> str:
    """A Python 2 string from its repr."""
    if len(line) < 3 or line[-1:] != b"\n" or line[0] != line[-2] or line[:1] not in (b"'", b'"'):
        raise ValueError("a string's quotes do not match")
    return line[1:-2].decode("unicode_escape")


@dataclass(frozen=True)
class Global:
    """A name the file may mention. Inert: `Interpreter` decides what it stands for."""

    role: str


@dataclass(eq=False)
class _Pending:
    """A dtype or array between its REDUCE and the BUILD that says what it holds."""

    role: str
    code: str = ""
    memo_keys: list[int] = field(default_factory=list)


class Interpreter:
    """A stack, its marks, and a memo, as in the pickle machine. `torch_file` teaches it tensors.

    Attributes:
        globals: the names a file may mention, and the role each plays in `_call`.
        plain: the types that may be left in the end, besides dict, list and tuple.
    """

    globals: Mapping[tuple[str, str], str] = _GLOBALS
    plain: tuple[type, ...] = _PLAIN

    def __init__(self, size: int):
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._allowance = size  # what copying may still produce: as much as the file holds

    def run(self, reader: BoundedReader) -> Any:
        """What the pickle holds."""
        for name, argument in _instructions(reader):
            self._step(name, argument)
        result = self._pop()
        _require_plain(result, self.plain)
        return result

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _GETS:
            if int(argument) not in self._memo:
                raise ValueError(f"it refers to value {argument} before making it")
            stack.append(self._memo[int(argument)])
        elif name in _PUTS:
            self._remember(int(argument))
        elif name == "MEMOIZE":
            self._remember(len(self._memo))
        elif name in ("PROTO", "FRAME"):
            pass  # both only help a reader that buffers
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in _TUPLES:
            stack.append(tuple(self._pop_many(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif name == "LIST":
            stack.append(self._pop_to_mark())
        elif name == "DICT":
            stack.append(self._as_dict(self._pop_to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = self._pop_many(1) if name == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_many(2) if name == "SETITEM" else self._pop_to_mark()
            self._top(dict).update(self._as_dict(items))
        elif name == "GLOBAL":
            stack.append(self._named_global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self._named_global(*self._pop_many(2)))
        elif name == "REDUCE":
            function, arguments = self._pop_many(2)
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = self._pop()
            pending = self._top(_Pending)
            built = _built(pending, state, self._as_bytes)
            stack[-1] = built
            for key in pending.memo_keys:
                self._memo[key] = built
        else:
            asked = f"{name} {argument!r:.60}" if argument else name
            raise Refused(f"it uses the instruction {asked}, which arrays have no need of")

    def _pop(self) -> Any:
        return self._pop_many(1)[0]

    def _pop_many(self, count: int) -> list[Any]:
        floor = self._marks[-1] if self._marks else 0
        if len(self._stack) - count < floor:
            raise ValueError("an instruction finds too little on the stack")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("an instruction finds no mark on the stack")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise Refused("an instruction does not fit what it is applied to")
        return self._stack[-1]

    def _remember(self, key: int) -> None:
        value = self._top(object)
        if isinstance(value, _Pending):
            value.memo_keys.append(key)
        self._memo[key] = value

    def _as_bytes(self, value: Any) -> bytes | bytearray:
        """Bytes as they are, a string as latin-1."""
        if isinstance(value, str):
            # A small file that copies one long string many times must not fill the memory.
            self._allowance -= len(value)
            if self._allowance < 0:
                raise Refused("it unfolds into more than the file holds")
            return value.encode("latin-1")
        if not isinstance(value, (bytes, bytearray)):
            raise Refused(f"an array's contents are a {type(value).__name__}, not bytes")
        return value

    def _call(self, function: Any, arguments: Any) -> Any:
        """What the allowed calls produce; nothing that the file names is called."""
        role = function.role if isinstance(function, Global) else None
        match role, arguments:
            case "defaultdict", () | (None,):
                return {}
            case "bytes", ():
                return b""
            case "encode", (str(text), "latin1" | "latin-1"):
                return self._as_bytes(text)
            case "dtype", (str(code), *_):
                return _Pending("dtype", _checked_code(code))
            case "reconstruct", (Global(role="ndarray"), *_):
                return _Pending("array")
            case "scalar", (np.dtype() as dtype, data):
                return _array(self._as_bytes(data), dtype, (), "C")[()]
            case "frombuffer", (data, np.dtype() as dtype, shape, "C" | "F" as order):
                return _array(self._as_bytes(data), dtype, shape, order)
        raise Refused(f"it calls {role or 'something that is no function'} in an unusual way")

    def _named_global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it asks for something whose name is no text")
        if (module, name) not in self.globals:
            asked = f"{module}.{name}"[:80]
            raise Refused(f"it asks for {asked!r}, which arrays have no need of")
        return Global(self.globals[module, name])

    def _as_dict(self, items: list[Any]) -> dict[Any, Any]:
        """A dict of keys and values in turn."""
        for key in items[::2]:
            if not self._is_key(key):
                raise Refused(f"a dictionary's key is a {type(key).__name__}")
        return dict(zip(items[::2], items[1::2], strict=True))

    def _is_key(self, value: Any) -> bool:
        return isinstance(value, _KEYS)


def _checked_code(code: str) -> str:
    if not _DTYPE_CODE.fullmatch(code):
        raise Refused(f"an array of type {code[:20]!r}, which is no plain number")
    return code


def _built(pending: _Pending, state: Any, as_bytes: Any) -> Any:
    match pending.role, state:
        case "dtype", (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
            return np.dtype(pending.code).newbyteorder(order)
        case "array", (1, shape, np.dtype() as dtype, bool() | 0 | 1 as fortran_order, data):
            return _array(as_bytes(data), dtype, shape, "F" if fortran_order else "C")
    raise Refused(f"an unusual description of a numpy {pending.role}")


def _array(data: bytes | bytearray, dtype: np.dtype, shape: Any, order: Any) -> np.ndarray:
    """A read-only view of `data`; the shape must account for every byte."""
    if not isinstance(shape, tuple) or len(shape) > 8 or any(type(n) is not int for n in shape):
        raise Refused("an array's shape is not a few whole numbers")
    fits = all(0 <= n < 1 << 40 for n in shape) and math.prod(shape) * dtype.itemsize == len(data)
    if not fits:
        raise Refused(f"an array of shape {shape!r:.60} does not fit its {len(data)} bytes")
    if not data:
        return np.empty(shape, dtype, order)
    return np.frombuffer(memoryview(data).toreadonly(), dtype).reshape(shape, order=order)


def _require_plain(root: Any, plain: tuple[type, ...]) -> None:
    """Refuse what is left unfinished anywhere in a (possibly shared or circular) structure."""
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple, dict)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(value.values() if isinstance(value, dict) else value)
        elif not isinstance(value, plain):
            raise Refused("it holds something else than plain data and arrays")
