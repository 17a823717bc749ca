"""YAML files and command-line overrides -> a validated `settings.Experiment`. The only user of OmegaConf.

An experiment has the sections `teacher`, `student`, `distill` and `run`; a baseline, or a network to be
sampled from, has the student's keys at top level. In a section (or at top level) `model:`, `diffusion:`
and `training:` name files to merge in, whose keys then lie flat in the section; the section's own keys
win over theirs. `base:` names one file or several that the whole configuration is laid over. Relative
paths are looked for from the file's own folder and each one above it, then from the working directory,
then among the files that come with the library.
"""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import (  # type: ignore[attr-defined]
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    MarkedYAMLError,
    SafeLoader,
    ScalarEvent,
    YAMLError,
)
from yaml import parse as parse_yaml  # type: ignore[attr-defined]

from ..errors import UserError, first_line
from ..io.files import folder_name, read_object
from ..io.model_folder import read_model_folder
from ..io.shipped import SHIPPED
from .described import described_keys
from .foreign import folder_keys
from .paths import existing_config, find_config, find_model, find_path, input_folders, resolve_path
from .registry import ARCHITECTURES, OBJECTIVES, settings_of
from .settings import (
    SECTIONS,
    Architecture,
    Denoiser,
    Distill,
    DistillationExperiment,
    Experiment,
    Run,
    Student,
    Teacher,
    flat,
    free_to_differ,
    keys_of,
)

_BY_USE = ("student", "teacher", "distill", "run")  # sections, those whose keys are meant most often first
_INCLUDES = ("model", "diffusion", "training")
# Keys that are no choice here, those of the originals' diffusion files and one of version 0.1.0: the value
# that describes what is done, and why, or where the choice lies.
_OF_DIFFUSION_FILES = {
    "use_ddim": (False, "the teacher's chain is ancestral; image_sample.py takes --use_ddim"),
    "clip_first": (False, "only clip_last is known"),
}
_SETTLED = {
    "teacher": _OF_DIFFUSION_FILES,
    "student": _OF_DIFFUSION_FILES,
    "distill": {"share_equal_timesteps": (False, "it changed neither the loss nor any gradient")},
}
_T = TypeVar("_T")
_MOST_BYTES, _MOST_NODES, _DEEPEST = 1 << 20, 10_000, 20
_MOST_UNFOLDED = 1e8  # characters
_LARGEST = 10**300  # about the largest float
# What reading damaged or foreign YAML raises: impossible dates, keys that are lists, ...
_DAMAGE = (
    *(OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError),
    *(LookupError, AttributeError, ArithmeticError, RecursionError),
)


def load_experiment(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Experiment:
    """Read, merge and check a configuration.

    Args:
        path: the YAML file; see `find_config`.
        overrides: "section.key=value", or "key=value" where the student's keys lie at top level.

    Raises:
        UserError: unreadable file, unknown key (with the nearest known one), wrong type or value.
    """
    path = find_config(path)
    return _experiment(_read(existing_config(path)), path, overrides)


def experiment_of(keys: dict[str, Any], path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """`load_experiment` of a configuration whose keys lie in something else than a YAML file, at `path`.

    Raises:
        UserError: any mistake in the keys or the overrides.
    """
    # Nothing in them is a reference, whatever a file or folder is called.
    plain = {name: _escaped(value) for name, value in keys.items()}
    return _experiment(OmegaConf.create(plain), path, overrides)


def override_values(overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides give, by key; of "section.key=value" by section and key.

    Raises:
        UserError: one that is none.
    """
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"'{override}' is no override: write key=value, such as student.lr=1e-3")
        if override.partition("=")[2] == "???":  # OmegaConf's mark of a missing value
            raise UserError(f"'{override}' gives no value")
    # "key=" gives an empty text, which is no number; YAML would take it for null, the default.
    quoted = [override if override.partition("=")[2] else f"{override}''" for override in overrides]
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(quoted))  # type: ignore[return-value]
    except _DAMAGE as error:
        raise UserError(f"{' '.join(overrides):.200}: {first_line(error)}") from None


def _experiment(tree: DictConfig, path: Path, overrides: Sequence[str]) -> Experiment:
    named = {override.partition(".")[0] for override in overrides} - {"student"}
    if not {"teacher", "student"} & {*tree, *named}:
        overrides = [override.removeprefix("student.") for override in overrides]  # a baseline's keys
    given = override_values(overrides)
    try:
        content = _plain(OmegaConf.merge(tree, given), path)
    except _DAMAGE as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    sections = {name: content.pop(name) for name in SECTIONS if name in content}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: '{name}' must be a section of keys, not {section!r}")
    distilled = "teacher" in sections
    if "student" in sections and content:
        raise _unknown_key(path, next(iter(content)), [*SECTIONS], _BY_USE)
    if "student" not in sections:
        if distilled:
            raise UserError(f"{path}: has a 'teacher' section but no 'student' section")
        sections["student"] = content
    if "distill" in sections and not distilled:
        raise UserError(f"{path}: 'distill' needs a 'teacher' section")
    for name, settled in _SETTLED.items():
        if name in sections:
            if name != "distill":
                sections[name] = _include(sections[name], path)
            _drop_settled(sections[name], settled, path, f"{name}." if distilled else "")
    _refuse_idle(overrides, distilled)

    run = _build(Run, sections.get("run", {}), path, "run.")
    if not distilled:
        student = _build_found(Student, sections["student"], path, "")
        experiment = Experiment(name=_name(path), student=student, run=run)
    else:
        sections["teacher"].pop("clip_last", None)  # its x_0 is clipped at every step anyway
        teacher = _build_found(Teacher, sections["teacher"], path, "teacher.")
        experiment = DistillationExperiment(
            name=_name(path),
            teacher=teacher,
            student=_build_found(
                Student, sections["student"], path, "student.", _shared(teacher, sections["student"])
            ),
            distill=_build(Distill, sections.get("distill", {}), path, "distill."),
            run=run,
        )
    experiment.check()
    return experiment


def _name(path: Path) -> str:
    """A configuration's name: its file's, but of a run's own config.yaml the run's."""
    if path.name == "config.yaml":
        with suppress(OSError, ValueError, KeyError):
            return folder_name(read_object(path.with_name("run.json"))["name"])
    return path.stem


def load_distillation(path: str | os.PathLike, overrides: Sequence[str] = ()) -> DistillationExperiment:
    """`load_experiment` of a configuration that has a teacher.

    Raises:
        UserError: any mistake in it or in the overrides, or it has no teacher.
    """
    experiment = load_experiment(path, overrides)
    if not isinstance(experiment, DistillationExperiment):
        raise UserError(f"{path}: distilling needs a 'teacher' section (image_train.py trains without)")
    return experiment


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file that is no configuration, laid over its `base`.

    Raises:
        UserError: it is not readable, or holds something else.
    """
    return _plain(_read(path), path)


def read_plain(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file as they stand there: nothing included, nothing filled in.

    Raises:
        UserError: it is not readable, or holds something else.
    """
    return OmegaConf.to_container(_load(path), resolve=False)  # type: ignore[return-value]


def mapping_text(content: dict[str, Any]) -> str:
    """Keys and values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(content))


def experiment_keys(experiment: Experiment) -> dict[str, Any]:
    """The resolved configuration, section by section, as a file would give it."""
    if isinstance(experiment, DistillationExperiment):
        return {name: flat(getattr(experiment, name)) for name in SECTIONS}
    return flat(experiment.student) | {"run": flat(experiment.run)}


def experiment_text(experiment: Experiment) -> str:
    """`experiment_keys` as YAML; loading it gives the same experiment."""
    return mapping_text(experiment_keys(experiment))


def _reason(error: Exception) -> str:
    """What is wrong with a YAML file, and where."""
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return first_line(error)


def _load(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(
            f"no such configuration file: {path}; those that come with the library are in {SHIPPED / 'yaml'}"
        )
    try:
        _require_modest(path)
        tree = OmegaConf.load(path)
    except _DAMAGE as error:
        raise UserError(f"{path}: not readable as YAML: {_reason(error)}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: must hold keys and values")
    return tree


def _read(path: Path, depth: int = 0) -> DictConfig:
    if depth > 8:
        raise UserError(f"{path}: 'base' files nest too deeply (in a circle?)")
    tree = _load(path)
    try:
        found: Any = tree.get("base")
        bases = list(found) if isinstance(found, ListConfig) else [] if found is None else [found]
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    if "base" in tree:
        del tree["base"]
    if not bases:
        return tree
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: 'base' must name a file or list files, not {bases!r:.80}")
    layers = [_read(resolve_path(base, path), depth + 1) for base in bases]
    try:
        merged = OmegaConf.merge(*layers, tree)
    except _DAMAGE as error:  # a section is a list here, keys there
        raise UserError(f"{path}: does not fit its base: {first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged


def _plain(tree: Any, path: Path) -> dict[str, Any]:
    """A file's keys and values, with what they refer to filled in."""
    try:
        text = OmegaConf.to_yaml(tree)
        # k references make a text at most 3^(k/3) times as long, the largest product of numbers of sum k.
        if 3 ** (min(text.count("${"), 300) / 3) * len(text) > _MOST_UNFOLDED:
            raise ValueError("its references, ${...}, unfold into too much")
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except _DAMAGE as error:
        raise UserError(f"{path}: {first_line(error)}") from None


def _escaped(value: Any) -> Any:
    """A value that OmegaConf takes as it is, though it may look like a reference."""
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _require_modest(path: Path) -> None:
    """Refuse a file whose aliases unfold into far more than it holds, or contain themselves.

    Raises:
        ValueError: it is one; or YAMLError.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError("too large for a configuration")
    sizes: dict[str, int] = {}  # of what each anchor names, once it is complete
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, and size so far
    for event in parse_yaml(path.read_text(encoding="utf-8"), SafeLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, CollectionStartEvent):
            open_nodes.append((anchor, 1))
            if len(open_nodes) > _DEEPEST:
                raise ValueError("nested too deeply")
            continue
        if isinstance(event, CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, AliasEvent):
            if anchor not in sizes:
                raise ValueError(f"the alias {anchor!r} names nothing before it")
            size, anchor = sizes[str(anchor)], None
        elif not isinstance(event, ScalarEvent):
            continue
        if anchor is not None:
            sizes[anchor] = size
        open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + size)
        if open_nodes[-1][1] > _MOST_NODES:
            raise ValueError("its aliases unfold into too much")


def _include(section: dict[str, Any], path: Path, depth: int = 0) -> dict[str, Any]:
    """Lay a section's keys over those of the files that its `model`, `diffusion` and `training` name."""
    if depth > 8:
        raise UserError(f"{path}: '{', '.join(_INCLUDES)}' files nest too deeply (in a circle?)")
    merged: dict[str, Any] = {}
    for name in _INCLUDES:
        included = section.get(name)
        if isinstance(included, str):
            file = _find_include(included, path)
            merged |= _include(_plain(_read(file), file), file, depth + 1)
        elif isinstance(included, dict):
            merged |= _include(included, path, depth + 1)
        elif included is not None:
            raise UserError(f"{path}: '{name}' must name a file or hold keys, not {included!r}")
    return merged | {k: v for k, v in section.items() if k not in _INCLUDES}


def _drop_settled(
    section: dict[str, Any], settled: Mapping[str, tuple[bool, str]], path: Path, where: str
) -> None:
    """Accept keys that are no choice here where they say what is done anyway."""
    for name, (value, why) in settled.items():
        if section.pop(name, value) != value:
            raise UserError(f"{path}: {where}{name} can only be {str(value).lower()}: {why}")


def _shared(teacher: Teacher, student: dict[str, Any]) -> dict[str, Any]:
    """What a student that says nothing of it has of its teacher: the process, and what the samples are."""
    variance = {"sigma_small": False} if student.get("learn_sigma") else {}
    samples = {
        name: getattr(teacher.architecture, name) for name in ("image_size", "class_cond", "num_classes")
    }
    return flat(teacher.process) | variance | flat(teacher.space) | samples


def _build_found(
    section: type[_T], given: dict[str, Any], path: Path, where: str, otherwise: dict[str, Any] | None = None
) -> _T:
    """`_build` a section out of what is configured, what its model says of itself, and what holds otherwise.

    Raises:
        UserError: a mistake in either, or the two contradict each other.
    """
    otherwise = otherwise or {}
    found = _found_keys(otherwise | given, path)
    built: Any = _build(section, otherwise | found | given, path, where)
    if not found:
        return built
    ours, theirs = flat(built), flat(_build(section, otherwise | given | found, path, where))
    for name in found:
        if ours[name] != theirs[name] and not free_to_differ(name, built.architecture):
            model = given["model_path"]
            raise UserError(
                f"{path}: {where}{name} is {ours[name]!r}, but {model} says {theirs[name]!r}: leave it out"
            )
    return built


def _found_keys(given: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a section's model says of itself: a folder; where no network is configured, a checkpoint."""
    model = find_model(str(given.get("model_path") or ""), path)
    if model is not None and model.is_dir():
        return folder_keys(read_model_folder(model), given)
    if model is None or any(name == "architecture" or _architectures_with(name) for name in given):
        return {}
    from ..io.description import read_description  # which imports torch

    return described_keys(read_description(model), model)


def _with_space(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """A section's keys with its VAE's folder found; see `input_folders`.

    In a VAE's latents nothing is clipped unless the keys say so.
    """
    if not (name := values.get("vae_path")):
        return values
    folders = [folder / os.path.expanduser(str(name)) for folder in input_folders(path)]
    found = next((str(folder.resolve()) for folder in folders if folder.is_dir()), name)
    return {"clip_denoised": False} | values | {"vae_path": found}


def _find_include(name: str, path: Path) -> Path:
    # celeba's diffusion file is spelt `diffsion.yaml` in the wild; either spelling finds the other.
    for spelling in (name, name.replace("diffsion", "diffusion"), name.replace("diffusion", "diffsion")):
        if (found := find_path(spelling, path)) is not None:
            return found
    return resolve_path(name, path)


def _refuse_idle(overrides: Sequence[str], distilled: bool) -> None:
    """Refuse an override of a key that does nothing where it stands, though files may describe a network by
    it, and one without a value of a key that is something by default.
    """
    for override in overrides:
        section, _, name = override.partition("=")[0].rpartition(".")
        kind = Student if not section and not distilled else SECTIONS.get(section)
        for _, key in keys_of(kind) if kind else ():
            if key.name != name:
                continue
            if section in key.metadata["idle_in"]:
                raise UserError(
                    f"{override}: {name} does nothing there ({key.metadata['help']}); leave it out"
                )
            if override.endswith(f"{name}=") and key.default:  # as of a shell's variable that is not set
                raise UserError(f"{override}: gives no value")


def _build(section: type[_T], values: dict[str, Any], path: Path, where: str) -> _T:
    """Sort a section's flat keys into its parts, and check their types."""
    given: Any = section
    if issubclass(section, Denoiser):
        architecture = str(values.get("architecture", Architecture.architecture))
        kind = settings_of(ARCHITECTURES, architecture, f"{where}architecture", Architecture)
        given = section(architecture=kind())
        values = _with_space(values, path)
    elif issubclass(section, Distill):
        name = str(values.get("objective", Distill.objective))
        section = given = settings_of(OBJECTIVES, name, f"{where}objective", Distill)
    parts = {key.name: part for part, key in keys_of(given)}
    defaults = {key.name: key.default for _, key in keys_of(given)}
    whole = {key.name for _, key in keys_of(given) if key.type is int}
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name not in parts:
            if issubclass(section, Denoiser) and (others := _architectures_with(name)):
                told = f"is a key of {' and '.join(others)}, and the architecture is {architecture}"
                raise UserError(f"{path}: {where}{name} {told}")
            raise _unknown_key(
                path, f"{where}{name}", [where + key for key in parts], _BY_USE if where else ("run",)
            )
        if value is None and not defaults[name]:
            continue
        if value is None or value == "???":  # OmegaConf's mark of a missing value
            raise UserError(f"{path}: {where}{name} has no value")
        plain = ",".join(map(str, value)) if isinstance(value, list) else value
        if name in whole and isinstance(value, float) and value.is_integer():  # such as 1e5
            plain = int(value)
        plain = _escaped(plain)  # what refers to something has been filled in
        if isinstance(plain, int) and abs(plain) > _LARGEST:
            raise UserError(f"{path}: {where}{name} is beyond all numbers")
        (nested.setdefault(parts[name], {}) if parts[name] else nested)[name] = plain
    try:
        built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(given), nested))
    except OmegaConfBaseException as error:
        name = str(getattr(error, "key", None) or "")
        raise UserError(f"{path}: {where}{name}: {first_line(error)}") from None
    assert isinstance(built, section)
    return built


def _architectures_with(key: str) -> list[str]:
    """The built-in architectures that have a key of their own."""
    settings = {name: settings_of(ARCHITECTURES, name, "", Architecture) for name in ARCHITECTURES}
    return [name for name, kind in settings.items() if key in {*_keys(kind)} - {*_keys(Architecture)}]


def _keys(section: type) -> list[str]:
    return [key.name for _, key in keys_of(section)]


def _unknown_key(path: Path, name: Any, known: list[str], others: Iterable[str]) -> UserError:
    """That there is no such key among those known where it stands; with the one that may be meant, of these
    or of other sections.
    """
    elsewhere = [f"{section}.{key}" for section in others for key in _keys(SECTIONS[section])]
    by_name = {key.rpartition(".")[2]: key for key in reversed(known + elsewhere)}
    nearest = difflib.get_close_matches(str(name).rpartition(".")[2], by_name, n=1, cutoff=0.4)
    hint = f"did you mean '{by_name[nearest[0]]}'?" if nearest else f"known are {', '.join(known)}"
    return UserError(f"{path}: unknown key '{name}'; {hint}")
