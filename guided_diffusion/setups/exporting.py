"""Exporting: a trained network as a folder that diffusers loads, compared with ours before it counts."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch as th
from safetensors import SafetensorError

from ..config.foreign import NOISE_SCHEDULES, NULL_CLASS
from ..config.settings import Denoiser, Experiment
from ..errors import UserError, first_line
from ..io.description import read_description
from ..io.diffusers_library import import_diffusers
from ..io.files import set_usual_mode, write_text
from ..io.model_folder import is_hub_name, weights_sha256
from ..networks.base import DenoisingNetwork, ForDiffusers
from ..processes.stopping import stop_if_asked
from ..respace import SpacedDiffusion
from ..runs.provenance import has_untrained_null_class, require_known_steps, training_facts
from ..runs.weights import build_loaded, require_agreement
from ..script_util import build_process, build_space
from ..spaces import LatentSpace

_SCHEDULES = {ours: theirs for theirs, ours in NOISE_SCHEDULES.items()}
_STEPS = 10  # of the chain that is compared
_FORWARD, _CHAIN = 1e-5, 1e-4  # the largest differences, in units of the largest number


def export_pipeline(
    experiment: Experiment,
    weights: Path,
    out: Path,
    *,
    name: str = "",
    scores: Iterable[str] = (),
    overwrite: bool = False,
) -> None:
    """Write a network and its process as a pipeline of diffusers'.

    The folder is written under another name, loaded again by diffusers, and compared: a forward pass, and a
    chain of ten steps from equal noise. It gets its name if both agree, and is removed if not.

    Args:
        experiment: the configuration; its student is exported.
        weights: the checkpoint.
        out: the folder.
        name: what the model card calls it, and loads; "" for the folder's.
        scores: lines for the model card, such as "FID 5.1 (50000 samples)".
        overwrite: replace an export that is there.

    Raises:
        UserError: the network or its process is none of diffusers', `out` is there, or the two disagree.
        Stopped: SIGTERM or SIGINT came; nothing is left of it.
    """
    student, out = experiment.student, out.resolve()
    _require_free(out, overwrite)
    diffusers = import_diffusers("exporting")
    require_agreement(student, weights, experiment.where)
    network, process = build_loaded(student, weights, experiment.where)
    require_known_steps(student, process, read_description(weights))
    network.eval()
    try:
        theirs = network.for_diffusers()
        config = scheduler_config(student, theirs.class_name)
        scheduler = getattr(diffusers, config.pop("_class_name"))(**config)
    except ValueError as error:
        raise UserError(f"{weights}: cannot be expressed in diffusers: {error}") from None
    model = getattr(diffusers, theirs.class_name)(**theirs.config)
    model.load_state_dict(theirs.state)
    if student.architecture.has_null_class and theirs.class_name == "UNet2DModel":
        model.register_to_config(**{NULL_CLASS: True})
    pipeline = _pipeline(diffusers, model, scheduler, student)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder = temporary / out.name
        try:
            pipeline.save_pretrained(folder, safe_serialization=True)
        except SafetensorError as error:  # its way of telling a full disk
            raise UserError(f"{out}: cannot be written: {first_line(error)}") from None
        card = model_card(experiment, weights, name or out.name, theirs, scores)
        (folder / "README.md").write_text(card)
        require_same(
            diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False),
            network,
            student,
            f"{weights}",
        )
        for file in folder.rglob("*.safetensors"):
            set_usual_mode(file)
        stop_if_asked()
        _put_in_place(folder, out, before=temporary / "before")
    finally:
        shutil.rmtree(temporary)


def _put_in_place(folder: Path, out: Path, before: Path) -> None:
    """Give a folder its name; whatever stops it, what had the name has it still or lies in `before`."""
    try:
        if out.exists():
            out.rename(before)
        folder.rename(out)
    except BaseException:
        if before.exists() and not out.exists():
            before.rename(out)
        raise


def _pipeline(diffusers: Any, model: Any, scheduler: Any, denoiser: Denoiser) -> Any:
    """The pipeline of a network, with a copy of its VAE if it has one."""
    transformer, space = isinstance(model, diffusers.DiTTransformer2DModel), build_space(denoiser)
    if not isinstance(space, LatentSpace):  # a transformer too: DiTPipeline does not load without a VAE
        return diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
    if space.shift:
        raise UserError(f"{space.folder}: has a shift_factor, which no pipeline of such networks heeds")
    vae = space.vae(th.device("cpu"))
    vae.register_to_config(scaling_factor=space.scale)
    if transformer:
        return diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)
    return diffusers.LDMPipeline(vqvae=vae, unet=model, scheduler=scheduler)


def push(folder: Path, name: str) -> None:
    """Upload an exported folder to the Hub, as the model `name`, owner/name.

    Raises:
        UserError: it cannot be uploaded.
        Stopped: SIGTERM or SIGINT came before.
    """
    from huggingface_hub import HfApi

    stop_if_asked()
    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # it raises its own, its HTTP library's and the system's
        told = first_line(error)
        raise UserError(f"{folder} is written, but not uploaded as {name} ({told:.200})") from None


def require_hub_name(name: str) -> None:
    """Raise `UserError` unless a name is a model's on the Hub."""
    if not is_hub_name(name):
        raise UserError(f"--push: '{name}' is no name on the Hub; write owner/name")


def scheduler_config(denoiser: Denoiser, network: str) -> dict[str, Any]:
    """The class and arguments of the scheduler whose process is a configured one.

    It is a DDPMScheduler; but DiTPipeline drops a learned variance, so there it is a DDIMScheduler.

    Raises:
        ValueError: there is none, and why.
    """
    process = denoiser.process
    if process.timestep_respacing:
        raise ValueError(
            f"it knows some of its steps only (timestep_respacing {process.timestep_respacing}), which no "
            "scheduler says; if it was trained on all of them, give timestep_respacing= (of a distillation "
            "student.timestep_respacing= teacher.timestep_respacing=)"
        )
    if process.rescale_timesteps and process.diffusion_steps != 1000:
        raise ValueError("its timesteps are rescaled to 0..1000 (rescale_timesteps), which no scheduler does")
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": process.diffusion_steps,
        "beta_schedule": _SCHEDULES[process.noise_schedule],
        "prediction_type": process.prediction_type,
        "clip_sample": process.clip_denoised,
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    if process.noise_schedule != "cosine":
        config |= dict(zip(("beta_start", "beta_end"), process.beta_range, strict=True))
    if process.learn_sigma and denoiser.space.vae_path and network != "UNet2DModel":
        if process.clip_denoised:
            raise ValueError("clip_denoised is true, and DiTPipeline clips otherwise with a learned variance")
        return config | {"_class_name": "DDIMScheduler"}
    if process.learn_sigma:
        return config | {"variance_type": "learned_range"}
    return config | {"variance_type": "fixed_small" if process.sigma_small else "fixed_large"}


@th.no_grad()
def require_same(pipeline: Any, network: DenoisingNetwork, denoiser: Denoiser, origin: str) -> None:
    """Compare a loaded pipeline with the network and process that it was made of.

    Raises:
        UserError: a forward pass differs by more than 1e-5, or a chain of ten steps from equal noise by more
            than 1e-4, both in units of the largest number; or so do latents that are decoded.
    """
    parts, scheduler = pipeline.components, pipeline.scheduler
    model = parts.get("unet") or parts["transformer"]
    steps = denoiser.process.diffusion_steps
    x = th.randn(4, *network.shape, generator=th.Generator().manual_seed(0))
    y = None if network.num_classes is None else th.arange(4) % network.num_classes
    labels = th.zeros(4, dtype=th.int64) if y is None and "num_embeds_ada_norm" in model.config else y
    t = th.tensor([0, steps // 3, 2 * steps // 3, steps - 1])
    _require_close(
        model(x, t, class_labels=labels).sample, network(x, t, y), _FORWARD, "a forward pass", origin
    )

    scheduler.set_timesteps(min(_STEPS, steps))
    full = build_process(denoiser, "timestep_respacing", "")
    process = SpacedDiffusion(
        [int(t) for t in scheduler.timesteps],
        betas=full.betas,
        model_mean_type=full.model_mean_type,
        model_var_type=full.model_var_type,
        loss_type=full.loss_type,
        rescale_timesteps=full.rescale_timesteps,
        bounds=full.bounds,
    )
    generator, channels = th.Generator().manual_seed(1), network.shape[0]
    ancestral = type(scheduler).__name__ == "DDPMScheduler"
    ours = (process.p_sample_loop if ancestral else process.ddim_sample_loop)(
        network,
        x.shape,
        noise=x,
        model_kwargs={} if y is None else {"y": y},
        noise_fn=lambda like: th.randn(like.shape, generator=generator),
    )
    generator = th.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        output = model(x, t.expand(len(x)), class_labels=labels).sample
        output = output if ancestral else output[:, :channels]
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    _require_close(x, ours, _CHAIN, f"a chain of {len(scheduler.timesteps)} steps", origin)
    if vae := parts.get("vqvae") or parts.get("vae"):
        decoded, space = vae.decode(x / vae.config.scaling_factor).sample, build_space(denoiser)
        assert isinstance(space, LatentSpace)
        _require_close(decoded, space.pixels(x), _CHAIN, "the decoded samples", origin)


def _require_close(theirs: th.Tensor, ours: th.Tensor, most: float, what: str, origin: str) -> None:
    difference = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1))
    if not difference <= most:
        raise UserError(
            f"{origin}: is not exported: {what} by diffusers differs from ours by {difference:.1e} "
            f"(at most {most:.0e} is rounding)"
        )


def model_card(
    experiment: Experiment, weights: Path, name: str, theirs: ForDiffusers, scores: Iterable[str]
) -> str:
    """The README.md of an exported folder."""
    description = read_description(weights)
    student, architecture = experiment.student, experiment.student.architecture
    classes = architecture.num_classes if architecture.class_cond else 0
    size = build_space(student).image_size
    untrained = ", not trained: do not guide by it" if has_untrained_null_class(description) else ""
    lines = [
        "---",
        "library_name: diffusers",
        "license: unknown  # fill in: what the teacher's licence allows",
        "pipeline_tag: unconditional-image-generation",
        "tags: [diffusion, distillation]",
        "---",
        "",
        f"# {name}",
        "",
        f"A {theirs.class_name} for {size}x{size} images"
        + (f" of {classes} classes" if classes else "")
        + (f" (label {classes}: no class{untrained})" if architecture.has_null_class else "")
        + f", {sum(v.numel() for v in theirs.state.values()) / 1e6:.2f}M parameters.",
        "",
        *(f"- {key}: {value}" for key, value in _facts(experiment, weights, description).items()),
        "",
        "## Scores",
        "",
        *([f"- {score}" for score in scores] or ["None were given."]),
        "",
        "## How to load",
        "",
        "```python",
        *_code(theirs, classes, bool(student.space.vae_path), name, student.process.diffusion_steps),
        "```",
        "",
    ]
    return "\n".join(lines)


def _facts(experiment: Experiment, weights: Path, description: dict[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint, by itself as far as it tells, else by the configuration."""
    told = {"config": experiment.name} | description
    if "method" not in told:
        told |= training_facts(experiment)
    facts: dict[str, Any] = {"Configuration": told["config"]}
    if "teacher" in told:
        teacher = str(told["teacher"])
        facts["Teacher"] = Path(teacher).name if os.path.isabs(teacher) else teacher
    facts["Method"] = told["method"]
    if "guidance" in told:
        facts["Guidance"] = told["guidance"]
    facts["Checkpoint"] = _checkpoint_fact(weights)
    if "step" in description:
        facts["Iterations"] = description["step"]
    if description.get("revision"):
        facts["Revision of the program"] = description["revision"]
    return facts


def _checkpoint_fact(weights: Path) -> str:
    return f"{weights.name} (SHA-256 {weights_sha256(weights)[:16]})"


def _code(theirs: ForDiffusers, classes: int, latent: bool, name: str, total: int) -> list[str]:
    """How to sample, in Python; where no pipeline of diffusers' knows how, step by step."""
    transformer, steps = theirs.class_name != "UNet2DModel", min(50, total)
    labels = [k % classes if classes else 0 for k in range(4)]
    call, comment = "batch_size=4", []
    if transformer and latent:
        call = f"class_labels={labels}, guidance_scale=1.0"
        if classes != 1000:
            comment = ["# Not guided: DiTPipeline takes label 1000 for no class, whatever the network has."]
    if (transformer and latent) or not (transformer or classes):
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(name)})",
            *comment,
            f"images = pipeline({call}, num_inference_steps={steps}).images",
        ]
    decode = ["x = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample.detach()"]
    size = theirs.config["sample_size"]
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(name)})",
        "model, scheduler = pipeline.unet, pipeline.scheduler",
        f"labels = torch.tensor({labels})",
        f"x = torch.randn(4, {theirs.config['in_channels']}, {size}, {size})",
        f"scheduler.set_timesteps({steps})",
        "for t in scheduler.timesteps:",
        "    with torch.no_grad():",
        "        output = model(x, t.expand(len(x)), class_labels=labels).sample",
        "    x = scheduler.step(output, t, x).prev_sample",
        *(decode if latent else []),
        "images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())",
    ]


def _require_free(out: Path, overwrite: bool) -> None:
    """Raise `UserError` if something is there that may not be replaced."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not _card_of(out):
        raise UserError(f"{out}: is there already and no export; choose another --out")
    if not overwrite:
        raise UserError(f"{out}: is there already; choose another --out, or give --overwrite")


def _card_of(folder: Path) -> str:
    """The model card of an export, which its line about the checkpoint tells; "" for any other folder."""
    path = folder / "README.md"
    card = path.read_text(errors="replace") if path.is_file() else ""
    return card if re.search(r"^- Checkpoint: .* \(SHA-256 [0-9a-f]{16}\)$", card, re.MULTILINE) else ""


def is_export_of(weights: Path, folder: Path) -> bool:
    """Whether a folder holds the export of a checkpoint, its card maybe edited since."""
    return f"\n- Checkpoint: {_checkpoint_fact(weights)}\n" in _card_of(folder)


def rename_in_card(folder: Path, name: str) -> None:
    """Have the model card of an export load it under another name, such as the one it has on the Hub."""
    card = _card_of(folder)
    if before := re.search(r'from_pretrained\("(.*)"\)', card):
        card = card.replace(before[0], f"from_pretrained({json.dumps(name)})")
        card = card.replace(f"\n# {before[1]}\n", f"\n# {name}\n")
    write_text(folder / "README.md", card)
