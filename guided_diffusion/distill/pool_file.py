"""The pool's file: safetensors under the ecosystem's name `.cache`, and the original's pickles read safely.

`total_x_t_1` [N, C, H, W] and `total_t` int64 [N] keep the original's names; `total_y` int64 [N] carries
class labels, and `answers_NAME` [M, ...] what a run keeps of the teacher's outputs, by the names of
`DistillationBatch`. The header records what the pool belongs to, so that a wrong one is refused.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from ..config.settings import Process
from ..errors import UserError, first_line
from ..io.safe_pickle import load_arrays
from ..io.safetensors_file import open_safetensors, read_about, read_arrays, write_arrays
from .dynamic_batch import DistillationBatch, DynamicBatch

_SUFFIX_OF_PART = ".part"
_REQUIRED = ("total_t", "total_x_t_1")
_REPLAY = "answers_"
# What a pool says of itself only where it has it: one that does not say it has it not.
_SAID_IF_SET = (
    *("beta_start", "beta_end", "sigma_small", "clip_denoised", "rescale_timesteps", "guidance_scale"),
    *("vae_sha256", "vae_scale", "vae_shift"),
)


def write_pool(path: str | os.PathLike, pools: list[DynamicBatch], belongs_to: Mapping[str, Any]) -> None:
    """Write one or several ranks' pools, one after the other, as one file, atomically."""
    arrays = {
        "total_t": th.cat([pool.levels.cpu() for pool in pools]),
        "total_x_t_1": th.cat([pool.x.cpu() for pool in pools]),
    }
    labels = [pool.y for pool in pools if pool.y is not None]
    if labels:
        arrays["total_y"] = th.cat([y.cpu() for y in labels])
    replays = [pool.replay for pool in pools if pool.replay is not None]
    if replays:
        kept = vars(DistillationBatch.joined(replays))
        arrays |= {f"{_REPLAY}{name}": value.cpu() for name, value in kept.items() if value is not None}
    write_arrays(path, "pool", arrays, belongs_to)


def read_pool(
    path: str | os.PathLike,
    num_timesteps: int,
    shape: tuple[int, int, int],
    *,
    expected: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DynamicBatch:
    """Read one rank's contiguous share of a pool.

    Args:
        path: our file, or a pickle of the original's.
        num_timesteps: T of the process.
        shape: (C, H, W) of a sample.
        expected: what the pool must belong to; compared with what the file says where it says it. An
            original's file says nothing, and may hold more than `expected["size"]` samples.
        rank: which share.
        world_size: of how many.

    Returns:
        The share, x as the file has it (float32 or float16), on the CPU.

    Raises:
        UserError: missing or damaged file, or a pool of something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such pool: {path} (scripts/dynamic_prepare.py makes it)")
    is_pickle = _is_pickle(path)
    arrays, belongs_to = _read_pickle(path) if is_pickle else _read_safetensors(path)
    if expected and belongs_to:
        for key in dict.fromkeys([*expected, *_SAID_IF_SET]):
            theirs, ours = belongs_to.get(key), expected.get(key)
            if theirs != ours and (key in belongs_to or key in _SAID_IF_SET):
                told = f"was made for {key} {_told(theirs, ours)}, this run has {_told(ours, theirs)}"
                raise UserError(f"{path}: {told}")
    x, levels, y = arrays["total_x_t_1"], arrays["total_t"], arrays.get("total_y")
    if x.ndim != 4 or x.shape[1:] != shape or not x.is_floating_point():
        wanted = f"float [N, {', '.join(map(str, shape))}]"
        raise UserError(f"{path}: holds samples {list(x.shape)} of {x.dtype}, this run needs {wanted}")
    for name, numbers in (("total_t", levels), ("total_y", y)):
        if numbers is not None and (numbers.dtype != th.int64 or numbers.shape != x.shape[:1]):
            found = f"{numbers.dtype} {list(numbers.shape)}"
            raise UserError(f"{path}: '{name}' must be int64 [{len(x)}], not {found}")
    size = (expected or {}).get("size")
    if is_pickle and size is not None:  # the originals read as many as they need of a larger pool
        x, levels = x[:size], levels[:size]
    if size is not None and len(x) != size:
        raise UserError(f"{path}: holds {len(x)} samples; rho, T and batch size of this run make {size}")
    if len(x) % world_size:
        raise UserError(f"{path}: {len(x)} samples cannot be divided evenly among {world_size} ranks")
    share = len(x) // world_size
    # Copies: the arrays are the mapped file, and who truncates or unmounts that must not end a run.
    mine = slice(rank * share, (rank + 1) * share)
    try:
        return DynamicBatch(
            x[mine].clone(),
            levels[mine].clone(),
            num_timesteps,
            None if y is None else y[mine].clone(),
            replay=_replay(arrays, num_timesteps, shape, rank, world_size),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _told(value: Any, other: Any) -> str:
    """A value in a message; one said only if set, and not set, is the contrary of the other, or none."""
    if value is None:
        return str(not other) if isinstance(other, bool) else "none"
    return repr(value)


def _replay(
    arrays: Mapping[str, th.Tensor], num_timesteps: int, shape: tuple[int, ...], rank: int, world: int
) -> DistillationBatch | None:
    """A rank's contiguous share of the outputs that were kept, or None.

    Raises:
        UserError: they do not belong together, or to this process and space.
    """
    found = {k.removeprefix(_REPLAY): v for k, v in arrays.items() if k.startswith(_REPLAY)}
    if not found:
        return None
    images, numbers = ("x_t", "eps", "mean", "log_variance"), ("t", "y") if "total_y" in arrays else ("t",)
    t = found.get("t", th.zeros(0))
    known = {field.name for field in fields(DistillationBatch)} - {"place"}
    fits = {*images, *numbers} <= found.keys() <= known
    fits = fits and all(value.shape[:1] == t.shape for value in found.values())
    fits = fits and all(found[name].dtype == th.int64 for name in numbers)
    fits = fits and all(found[name].shape[1:] == shape for name in images)
    fits = fits and all(found[name].dtype == th.float32 for name in images)
    if not fits or len(t) < world or int(t.min()) < 0 or int(t.max()) >= num_timesteps:
        raise UserError("the teacher's outputs in it do not belong to this run")
    share = len(t) // world
    batch = DistillationBatch(**found)  # type: ignore[arg-type]
    return batch[rank * share : (rank + 1) * share].each(th.clone)


def read_pool_header(path: str | os.PathLike) -> dict[str, Any]:
    """What a pool's file says it belongs to; {} for an original's, which says nothing.

    Raises:
        UserError: a damaged file.
    """
    return {} if _is_pickle(Path(path)) else _belongs_to(read_about(path, "pool"), path)


def join_parts(
    path: Path,
    num_timesteps: int,
    shape: tuple[int, int, int],
    belongs_to: Mapping[str, Any],
    ranks: int,
) -> None:
    """Join the ranks' parts in rank order as `path`, and remove them."""
    parts = [part_path(path, rank) for rank in range(ranks)]
    write_pool(path, [read_pool(part, num_timesteps, shape) for part in parts], belongs_to)
    for part in parts:
        part.unlink()


def part_path(path: str | os.PathLike, rank: int) -> Path:
    """Where a rank leaves its share until rank 0 has joined them."""
    return Path(f"{path}.rank{rank}{_SUFFIX_OF_PART}")


def require_replaceable(path: Path) -> None:
    """Refuse to overwrite a file that is not a pool.

    Raises:
        UserError: it is something else.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    is_pool = not start or start[:1] == b"\x80" or start[8:] == b"{"
    with suppress(UserError), open_safetensors(path, "pool") as arrays:  # else a pickle, or damaged
        is_pool = set(_REQUIRED) <= {*arrays.keys()}
    if not is_pool:
        raise UserError(f"teacher.tempfile: {path} is no pool, and would be replaced; name another file")


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors file begins with its header's length, whose first byte can be a pickle's too.
    return start[:1] == b"\x80" and start[8:] != b"{"


def _belongs_to(about: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """What a pool says it belongs to; earlier versions said betas too that are the schedule's own."""
    if "T" not in about:
        return about
    names = [name for name in ("noise_schedule", "beta_start", "beta_end") if name in about]
    try:
        process = Process(about["T"], **{name: about[name] for name in names})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not a readable pool ({first_line(error)})") from None
    return {k: v for k, v in about.items() if k not in names or getattr(process, k)}


def _require_pool(path: Path, names: Iterable[str]) -> None:
    if missing := set(_REQUIRED) - set(names):
        raise UserError(f"{path}: is no pool, it has no {', '.join(sorted(missing))}")


def _read_safetensors(path: Path) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    arrays, about = read_arrays(path, "pool")
    _require_pool(path, arrays)
    return arrays, _belongs_to(about, path)


def _read_pickle(path: Path) -> tuple[dict[str, th.Tensor], dict[str, Any]]:
    content = load_arrays(path)
    content = content if isinstance(content, dict) else {}
    _require_pool(path, content)
    try:
        return {name: th.from_numpy(np.array(content[name])) for name in _REQUIRED}, {}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is no pool ({error})") from None
