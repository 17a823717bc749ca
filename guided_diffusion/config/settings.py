"""Every configuration key: its name, type, default, meaning, and the values it may take.

A section of a configuration is flat; inside it is made of parts. A teacher is an architecture, a process, a
space and how its pool is made; a student is the first three and how it is trained. Names and defaults of
`Architecture`, `Process`, `Teacher` and `Training` are those of the configurations that users of
guided-diffusion, DKDM and TCCD already have; what this project adds lies in `Space`, `Distill` and `Run`.
Nothing here imports torch, so that a mistyped key is answered at once.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError

NOISE_SCHEDULES = ("linear", "cosine", "scaled_linear")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def key(default: Any, help: str, *, idle_in: tuple[str, ...] = ()) -> Any:
    """A configuration key.

    Args:
        default: its default.
        help: its one line of documentation.
        idle_in: sections ("" for the top level of a baseline) in which it describes the network or the
            run of somebody else and changes nothing. There it is accepted from a file and refused as an
            override.
    """
    return dataclasses.field(default=default, metadata={"help": help, "idle_in": idle_in})


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with a message unless a condition holds."""
    if not condition:
        raise UserError(message)


def require_one_of(value: str, choices: tuple[str, ...], where: str) -> None:
    """Raise `UserError`, naming the key `where`, unless a value is one of several."""
    require(
        value in choices, f"{where} must be {', '.join(choices[:-1])} or {choices[-1]}, not '{value:.60}'"
    )


def require_positive(section: Any, where: str, *names: str) -> None:
    """Raise `UserError` unless these keys of a section are above 0 and finite."""
    for name in names:
        value = getattr(section, name)
        require(0 < value < math.inf, f"{where}{name} must be positive, not {value}")


def require_not_negative(section: Any, where: str, *names: str) -> None:
    """Raise `UserError` unless these keys of a section are 0, or above and finite."""
    for name in names:
        value = getattr(section, name)
        require(0 <= value < math.inf, f"{where}{name} must be 0 or positive, not {value}")


def _is_positive(text: str, whole: bool) -> bool:
    try:
        return 0 < (int(text) if whole else float(text)) < math.inf
    except ValueError:
        return False


# More than anybody has: a hostile file must not keep the machine busy for days.
_MOST_LAYERS, _MOST_PIXELS, MOST_STEPS = 1000, 1_000_000, 1_000_000


@dataclass
class Architecture:
    """What every network has."""

    architecture: str = key("adm", "adm, diffusers_unet2d, dit, or package.module:Class of your own")
    image_size: int = key(64, "height and width of the images, or of the latents with vae_path")
    class_cond: bool = key(False, "condition on class labels")
    num_classes: int = key(1000, "number of classes, if class_cond")
    null_class: bool = key(False, "one more label, num_classes, stands for no class; guidance needs it")
    class_dropout_prob: float = key(
        0.0, "replace a label by the null class this often in training", idle_in=("teacher",)
    )
    use_fp16: bool = key(False, "16-bit arithmetic, as run.precision says")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require_positive(self, where, "image_size", "num_classes")
        require(
            self.image_size <= _MOST_PIXELS,
            f"{where}image_size must be at most {_MOST_PIXELS}, not {self.image_size}",
        )
        prob = self.class_dropout_prob
        require(0 <= prob < 1, f"{where}class_dropout_prob must be in [0, 1), not {prob}")
        require(
            not prob or self.has_null_class,
            f"{where}class_dropout_prob: needs {where}class_cond and {where}null_class",
        )

    def require_timesteps(self, process: "Process", where: str) -> None:
        """Raise `UserError` for a process some of whose timesteps the network does not know."""

    def require_buildable(self, where: str) -> None:
        """Raise `UserError` for more layers than any network has: building them would take days."""
        for name in ("num_res_blocks", "layers_per_block", "num_layers"):
            value = getattr(self, name, 0)
            require(value <= _MOST_LAYERS, f"{where}{name} must be at most {_MOST_LAYERS}, not {value}")

    @property
    def has_null_class(self) -> bool:
        """Whether the label `num_classes` is taken, and means no class."""
        return self.class_cond and self.null_class

    def require_guidable(self, scale: float, what: str, where: str) -> None:
        """Refuse classifier-free guidance of a network that it cannot be had of, or by an impossible scale.

        Args:
            scale: w; 0 for none.
            what: the key or flag that gives it.
            where: the network's section in messages, such as "teacher.".

        Raises:
            UserError: it is negative or no number, or there is no null class.
        """
        require(math.isfinite(scale) and scale >= 0, f"{what} must be 0 or more, but is {scale}")
        require(
            not scale or self.has_null_class,
            f"{what}: guidance needs a network with classes and a null class: {where}class_cond and "
            f"{where}null_class (of a dit, class_cond)",
        )


@dataclass
class AdmArchitecture(Architecture):
    """ADM's U-Net."""

    num_channels: int = key(128, "base width of the U-Net")
    num_res_blocks: int = key(2, "residual blocks per level")
    num_heads: int = key(4, "attention heads, unless num_head_channels gives their width")
    num_heads_upsample: int = key(-1, "attention heads on the way up (-1: as num_heads)")
    num_head_channels: int = key(-1, "width of an attention head (-1: by num_heads)")
    attention_resolutions: str = key(
        "16,8", "sizes S with attention: where maps are halved image_size // S fold"
    )
    channel_mult: str = key("", "width multiplier of each level ('': ADM's for the image size)")
    dropout: float = key(0.0, "dropout probability in training", idle_in=("teacher",))
    use_checkpoint: bool = key(
        False, "recompute blocks in backward: less memory, more time", idle_in=("teacher",)
    )
    use_scale_shift_norm: bool = key(True, "condition by scale and shift instead of addition")
    resblock_updown: bool = key(False, "resample inside residual blocks")
    use_new_attention_order: bool = key(False, "packing of q, k and v in the checkpoint")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        require_positive(self, where, "num_channels", "num_res_blocks")
        require(0 <= self.dropout < 1, f"{where}dropout must be in [0, 1), not {self.dropout}")
        for name, example, whole in (
            ("attention_resolutions", "16,8", True),
            ("channel_mult", "1,1.5,2", False),
        ):
            value = getattr(self, name)
            require(
                not value or all(_is_positive(part, whole) for part in value.split(",")),
                f"{where}{name} must be positive{' whole' if whole else ''} numbers such as '{example}', "
                f"not '{value:.60}'",
            )


def beta_range(noise_schedule: str, steps: int, start: float = 0.0, end: float = 0.0) -> tuple[float, float]:
    """First and last beta; for those that are 0 DDPM's 1e-4 and 0.02, which "linear" scales by 1000 / T."""
    scale = 1000 / steps if noise_schedule == "linear" else 1.0
    return start or scale * 0.0001, end or scale * 0.02


@dataclass
class Process:
    """The diffusion process."""

    diffusion_steps: int = key(1000, "steps T of the process")
    noise_schedule: str = key("linear", "linear, cosine or scaled_linear")
    beta_start: float = key(0.0, "first beta of a linear or scaled_linear schedule (0: the schedule's own)")
    beta_end: float = key(0.0, "last beta of a linear or scaled_linear schedule (0: the schedule's own)")
    prediction_type: str = key("epsilon", "what the network predicts: epsilon, sample (x_0) or v_prediction")
    predict_xstart: bool = key(False, "ADM's name for prediction_type: sample")
    learn_sigma: bool = key(False, "learned variance: the network has twice the output channels")
    sigma_small: bool = key(False, "if not learn_sigma: the posterior's variance instead of beta")
    clip_denoised: bool = key(True, "clip the predicted x_0 to [-1, 1]; with vae_path false unless given")
    timestep_respacing: str = key("", "steps to keep: '50', 'ddim50', 'trailing50', '10,15,20' ('': all)")
    rescale_timesteps: bool = key(False, "feed the network timesteps scaled to 0..1000")
    use_kl: bool = key(False, "train the variational bound alone")
    rescale_learned_sigmas: bool = key(
        False, "multiply the bound beside the MSE by T/1000", idle_in=("teacher",)
    )

    def __post_init__(self) -> None:
        """Say `prediction_type` for `predict_xstart`, and 0 for betas that are the schedule's own."""
        if self.predict_xstart and self.prediction_type in ("epsilon", "sample"):
            self.prediction_type, self.predict_xstart = "sample", False
        if self.noise_schedule != "cosine" and self.diffusion_steps > 0:
            betas = beta_range(self.noise_schedule, self.diffusion_steps)
            for name, own in zip(("beta_start", "beta_end"), betas, strict=True):
                if math.isclose(getattr(self, name), own, rel_tol=1e-9):
                    setattr(self, name, 0.0)

    @property
    def beta_range(self) -> tuple[float, float]:
        """First and last beta of a linear or scaled_linear schedule."""
        return beta_range(self.noise_schedule, self.diffusion_steps, self.beta_start, self.beta_end)

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require(
            0 < self.diffusion_steps <= MOST_STEPS,
            f"{where}diffusion_steps must be 1 to {MOST_STEPS}, not {self.diffusion_steps}",
        )
        require_one_of(self.noise_schedule, NOISE_SCHEDULES, f"{where}noise_schedule")
        require_one_of(self.prediction_type, PREDICTION_TYPES, f"{where}prediction_type")
        require(
            not self.predict_xstart,
            f"{where}predict_xstart contradicts {where}prediction_type: {self.prediction_type}",
        )
        for name in ("beta_start", "beta_end"):
            beta = getattr(self, name)
            require(0 <= beta <= 1, f"{where}{name} must be in [0, 1], not {beta}")
            require(
                not beta or self.noise_schedule != "cosine", f"{where}{name}: the cosine schedule has none"
            )
        if self.noise_schedule != "cosine":
            for name, beta in zip(("beta_start", "beta_end"), self.beta_range, strict=True):
                require(
                    beta <= 1,
                    f"{where}{name} would be {beta:g}, more than 1, with {where}diffusion_steps "
                    f"{self.diffusion_steps}; give it, or {where}noise_schedule: cosine",
                )
        require(
            not (self.learn_sigma and self.sigma_small),
            f"{where}sigma_small: does nothing with learn_sigma; set one of the two to false",
        )


@dataclass
class Space:
    """What the samples are: pixels, or the latents of a VAE."""

    vae_path: str = key("", "folder of a diffusers VQModel or AutoencoderKL, whose latents x is ('': pixels)")
    vae_scale: float = key(0.0, "factor of the VAE's latents (0: scaling_factor of its config.json)")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require_not_negative(self, where, "vae_scale")
        require(
            not self.vae_scale or bool(self.vae_path),
            f"{where}vae_scale: does nothing without {where}vae_path",
        )


@dataclass
class Denoiser:
    """A network, the process it denoises, and the space of its samples."""

    architecture: Architecture = dataclasses.field(default_factory=AdmArchitecture)
    process: Process = dataclasses.field(default_factory=Process)
    space: Space = dataclasses.field(default_factory=Space)

    def network_keys(self) -> dict[str, Any]:
        """The keys of these three, as a configuration to sample from has them at its top level."""
        return flat(self.architecture) | flat(self.process) | flat(self.space)

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        self.architecture.check(where)
        self.process.check(where)
        self.architecture.require_timesteps(self.process, where)
        self.space.check(where)


@dataclass
class Teacher(Denoiser):
    """The teacher and the dynamic batch (the keys of DKDM)."""

    prob: float = key(1.0, "probability of training on a drawn batch instead of only advancing it")
    BATCH: float = key(0.4, "rho: the pool holds round(rho T) batches")
    input_perturb: float = key(0.0, "gamma: noise added to the student's x_t, in units of its own")
    batch_size: int = key(128, "rows per teacher call and rank while preparing the pool")
    model_path: str = key("", "the teacher's checkpoint, a diffusers folder, or owner/name on the Hub")
    iter_choice: str = key(
        "dynamic_iterative_distillation",
        "dynamic_iterative_distillation, shuffled_iterative_distillation or iterative_distillation",
    )
    tempfile: str = key("", "the pool's file, written by dynamic_prepare.py")
    guidance_scale: float = key(
        0.0, "classifier-free guidance w, eps(null) + w (eps(y) - eps(null)): what is distilled (0: off)"
    )

    def __post_init__(self) -> None:
        """Accept the originals' spelling."""
        if self.iter_choice == "shffled_iterative_distillation":
            self.iter_choice = "shuffled_iterative_distillation"

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        self.architecture.require_guidable(self.guidance_scale, f"{where}guidance_scale", where)
        require(0 < self.prob <= 1, f"{where}prob must be in (0, 1], not {self.prob}")
        require_positive(self, where, "BATCH", "batch_size")
        require_not_negative(self, where, "input_perturb")
        orders = ("dynamic_iterative", "shuffled_iterative", "iterative")
        choices = tuple(f"{order}_distillation" for order in orders)
        require_one_of(self.iter_choice, choices, f"{where}iter_choice")


@dataclass
class Training:
    """How a network is optimised (the keys of ADM's training scripts)."""

    schedule_sampler: str = key("uniform", "timesteps of plain training: uniform or loss-second-moment")
    random_flip: bool = key(
        True, "plain training: mirror each image with probability 1/2", idle_in=("student",)
    )
    lr: float = key(1e-4, "learning rate")
    weight_decay: float = key(0.0, "weight decay, decoupled from the gradient")
    lr_anneal_steps: int = key(0, "lower lr linearly to 0 over so many iterations (0: constant)")
    batch_size: int = key(128, "samples per iteration, all ranks together")
    microbatch: int = key(-1, "samples per backward pass and rank (-1: all at once)")
    ema_rate: str = key("0.9999", "decay of the averaged weights; several: '0.99,0.9999'")
    resume_checkpoint: str = key("", "run directory or modelNNNNNN.pt to continue from")
    fp16_scale_growth: float = key(1e-3, "growth of log2(loss scale) per iteration in float16")
    model_path: str = key("", "initial weights: a checkpoint or a diffusers folder ('': random)")
    log_interval: int = key(100, "iterations between log lines")
    save_interval: int = key(10000, "iterations between checkpoints")
    cache_save_interval: int = key(
        -1,
        "keep the pools of checkpoints at multiples of this (-1: of the newest two checkpoints only)",
        idle_in=("",),
    )
    clip_last: bool = key(
        False, "clip the student's predicted x_0 inside the KL at t = T-1, if clip_denoised"
    )

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require_positive(self, where, "batch_size", "log_interval", "save_interval", "lr")
        require_not_negative(self, where, "weight_decay", "lr_anneal_steps")
        require(
            1e-6 <= self.fp16_scale_growth <= 1,
            f"{where}fp16_scale_growth must be in [1e-6, 1], not {self.fp16_scale_growth}",
        )
        require(
            self.microbatch == -1 or self.microbatch > 0,
            f"{where}microbatch must be -1 or positive, not {self.microbatch}",
        )
        require(
            self.cache_save_interval == -1 or self.cache_save_interval > 0,
            f"{where}cache_save_interval must be -1 or positive, not {self.cache_save_interval}",
        )
        require_one_of(self.schedule_sampler, ("uniform", "loss-second-moment"), f"{where}schedule_sampler")
        try:
            rates = self.ema_rates
        except ValueError:
            raise UserError(f"{where}ema_rate must be numbers, not '{self.ema_rate}'") from None
        require(all(0 <= rate < 1 for rate in rates), f"{where}ema_rate must be in [0, 1)")

    @property
    def ema_rates(self) -> list[float]:
        """The EMA decays as numbers."""
        return [float(rate) for rate in self.ema_rate.split(",") if rate]

    @property
    def scored_weights(self) -> str:
        """The weights of a checkpoint that grids and scores are of: the slowest average, or else "model"."""
        return f"ema_{max(self.ema_rates)}" if self.ema_rates else "model"


@dataclass
class Student(Denoiser):
    """The network being trained, its process, and how it is trained."""

    training: Training = dataclasses.field(default_factory=Training)

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        self.training.check(where)


@dataclass
class Distill:
    """What TCCD adds, and our options on it. The defaults are the published method."""

    objective: str = key("tccd", "tccd (DKDM with both stages off), or package.module:Class of your own")
    stage1_weight: float = key(1.0, "weight of the timestep-noise alignment (0: off)")
    stage1_fraction: float = key(1.0, "share of each batch that the alignment sees")
    stage2_weight: float = key(1.0, "weight of the interactive self-supervision pass (0: off)")
    stage2_align: bool = key(False, "use the alignment in stage 2 too (the paper's figure, not its code)")
    temperature: float = key(1.0, "temperature of the contrastive loss")
    normalize: bool = key(False, "contrast unit vectors instead of plain dot products")
    gather_negatives: bool = key(False, "contrast with the negatives of all ranks, not the rank's own")
    role_vector: bool = key(False, "mark stage 2's input by a learned vector added to its timestep embedding")
    stage2_time: str = key(
        "same",
        "stage 2's input: same (the teacher's prediction of the noise), or between (a noisier state of it)",
    )
    stage2_fraction: float = key(1.0, "share of each batch that stage 2 sees")
    loss_weight: str = key(
        "eps", "weight of the squared error of eps over t, 1 in the mean: eps (1), v (1/abar) or min_snr"
    )
    loss_weight_cap: float = key(5.0, "loss_weight v: largest 1/abar; min_snr: gamma")
    advance_stride: int = key(
        1, "timesteps by which a drawn entry advances, in the mean (1: each by one; N: by 1 to 2N-1)"
    )
    teacher_interval: int = key(
        1, "iterations per batch of the teacher's (1: each has its own; N: its last outputs serve N times)"
    )
    replay_batches: int = key(16, "teacher_interval > 1: batches of the teacher's outputs that are kept")
    on_policy: float = key(
        0.0, "probability that an entry goes on where the student leads, raised from 0 in the first third"
    )
    bottleneck_weight: float = key(
        0.0, "weight of the distance of the student's bottleneck from the teacher's, between U-Nets (0: off)"
    )
    initial_weights: str = key(
        "random",
        "the student's initial weights, if not student.model_path's: random, or teacher (a selection of its)",
    )
    stride: int = key(1, "timesteps per teacher jump while preparing the pool (1: every step)")
    pool_seed: int = key(-1, "seed of the pool (-1: run.seed); each has a file of its own beside tempfile")
    pool_dtype: str = key("float32", "how the pool is kept, in memory and in its file: float32 or float16")
    pool_device: str = key("auto", "where the pool is kept: auto (beside the networks) or cpu")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require_not_negative(self, where, "stage1_weight", "stage2_weight", "bottleneck_weight")
        require_positive(self, where, "temperature")
        require(
            self.loss_weight_cap > 0, f"{where}loss_weight_cap must be positive, not {self.loss_weight_cap}"
        )
        for name in ("stride", "advance_stride", "teacher_interval", "replay_batches"):
            value = getattr(self, name)
            require(1 <= value <= MOST_STEPS, f"{where}{name} must be 1 to {MOST_STEPS}, not {value}")
        for name in ("stage1_fraction", "stage2_fraction"):
            share = getattr(self, name)
            require(0 < share <= 1, f"{where}{name} must be in (0, 1], not {share}")
        require(0 <= self.on_policy <= 1, f"{where}on_policy must be in [0, 1], not {self.on_policy}")
        require_one_of(self.loss_weight, ("eps", "v", "min_snr"), f"{where}loss_weight")
        require_one_of(self.initial_weights, ("random", "teacher"), f"{where}initial_weights")
        require_one_of(self.stage2_time, ("same", "between"), f"{where}stage2_time")
        require(self.pool_seed >= -1, f"{where}pool_seed must be -1 or more, not {self.pool_seed}")
        require_one_of(self.pool_dtype, ("float32", "float16"), f"{where}pool_dtype")
        require_one_of(self.pool_device, ("auto", "cpu"), f"{where}pool_device")
        if self.stage2_align:
            require(
                self.stage1_weight > 0 and self.stage2_weight > 0,
                f"{where}stage2_align: the alignment, weighted by stage1_weight, is added to stage 2: "
                "both weights must be positive",
            )


@dataclass
class Run:
    """How a run is carried out."""

    iterations: int = key(0, "end after so many iterations (0: after lr_anneal_steps; both 0: never)")
    optimizer: str = key("adamw", "adamw, or muon (Muon for matrices and convolutions, AdamW for the rest)")
    warmup_steps: int = key(0, "raise lr linearly from 0 over so many iterations")
    seed: int = key(0, "seed of everything random")
    precision: str = key("auto", "auto, fp32, bf16 or fp16 (auto: fp32, or the device's best if use_fp16)")
    channels_last: bool = key(
        False,
        "lay float32 networks out channels last, as 16-bit ones are: faster on CPUs, rounds more",
    )
    compile: bool = key(False, "torch.compile the networks' blocks: minutes at the start, for GPUs")
    cuda_graphs: bool = key(
        True, "launch an iteration's kernels, and those of a network that is only evaluated, at once on a GPU"
    )
    grad_clip: float = key(0.0, "clip the gradient's norm to this (0: do not)")
    max_bad_steps: int = key(50, "give up after so many skipped iterations in a row (non-finite gradients)")
    ema_warmup: bool = key(False, "average with min(rate, (1 + step) / (10 + step))")
    keep_last: int = key(0, "keep only so many of the newest checkpoints (0: all)")
    keep_every: int = key(0, "keep checkpoints at multiples of this besides (0: none)")
    weights_format: str = key("pt", "files of the networks: pt, safetensors (for other programs too) or both")
    sample_interval: int = key(0, "iterations between grids of samples (0: with every checkpoint; -1: never)")
    num_samples: int = key(16, "samples in such a grid")
    sample_respacing: str = key(
        "50", "timestep_respacing of such a grid, and of what is scored, unless the process is respaced"
    )
    eval_interval: int = key(
        0, "iterations between scores of the averaged weights; each writes a checkpoint (0: never)"
    )
    eval_samples: int = key(10000, "samples that are scored")
    eval_backend: str = key("tensorflow", "what scores them: tensorflow or torch (FID), or digits")
    eval_reference: str = key("", "npz of the real images they are scored against: a path or a URL")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        require_not_negative(
            self,
            where,
            *("iterations", "warmup_steps", "seed", "grad_clip", "keep_last", "keep_every", "eval_interval"),
        )
        require_positive(self, where, "eval_samples", "max_bad_steps", "num_samples")
        require_one_of(self.eval_backend, ("tensorflow", "torch", "digits"), f"{where}eval_backend")
        require(
            not self.eval_interval or bool(self.eval_reference),
            f"{where}eval_interval: scores need {where}eval_reference, an npz of real images",
        )
        require_one_of(self.optimizer, ("adamw", "muon"), f"{where}optimizer")
        require_one_of(self.precision, ("auto", "fp32", "bf16", "fp16"), f"{where}precision")
        require_one_of(self.weights_format, ("pt", "safetensors", "both"), f"{where}weights_format")
        require(self.sample_interval >= -1, f"{where}sample_interval must be -1 or more")


@dataclass
class Experiment:
    """A whole configuration, validated: a network to train on images, or to sample from.

    Attributes:
        where: what stands before the student's keys on a command line and in messages.
    """

    name: str
    student: Student
    run: Run
    where: ClassVar[str] = ""

    def check(self) -> None:
        """Raise `UserError` for values that cannot be right, alone or together."""
        self.student.check(self.where)
        self.run.check("run.")


@dataclass
class DistillationExperiment(Experiment):
    """A configuration with a teacher."""

    teacher: Teacher
    distill: Distill
    where: ClassVar[str] = "student."

    def check(self) -> None:
        """Raise `UserError` for values that cannot be right, alone or together."""
        super().check()
        self.teacher.check("teacher.")
        self.distill.check("distill.")
        ours, theirs = flat(self.student), flat(self.teacher)
        for name in SHARED_KEYS:
            require(
                ours[name] == theirs[name],
                f"student.{name} is {ours[name]!r} but teacher.{name} is {theirs[name]!r}: "
                "both must be the same",
            )
        for where, keys in (("teacher", theirs), ("student", ours)):
            require(
                not keys["use_kl"],
                f"{where}.use_kl: distillation matches noise predictions by MSE, so it must be false",
            )
        require(
            self.student.training.schedule_sampler == "uniform",
            "student.schedule_sampler must be uniform: in distillation the pool gives the timesteps",
        )
        if self.distill.on_policy:
            require(
                bool(self.run.iterations or self.student.training.lr_anneal_steps),
                "distill.on_policy is raised over a third of the run, which needs an end: set run.iterations",
            )
            require(
                not self.teacher.input_perturb,
                "distill.on_policy follows the student from x_t itself: teacher.input_perturb must be 0",
            )
            for name in ("dropout", "class_dropout_prob"):
                require(
                    not ours.get(name),
                    f"distill.on_policy follows what the student predicts: student.{name} must be 0",
                )


# What a student must have in common with its teacher: the samples, and the process that they run through.
SHARED_KEYS = (
    *("image_size", "class_cond", "num_classes"),
    *("diffusion_steps", "noise_schedule", "beta_start", "beta_end"),
    *("timestep_respacing", "rescale_timesteps"),
    *("vae_path", "vae_scale"),
)
SECTIONS: dict[str, type] = {"teacher": Teacher, "student": Student, "distill": Distill, "run": Run}


# Keys that do not affect the samples of a trained network, or that other keys imply.
IDLE_IN_SAMPLING = (
    *("dropout", "class_dropout_prob", "use_checkpoint", "use_fp16"),
    *("use_kl", "rescale_learned_sigmas", "predict_xstart", "timestep_respacing"),
)


def free_to_differ(name: str, part: Any) -> bool:
    """Whether a key may have another value when a trained network is used than when it was trained."""
    if name in ("num_classes", "null_class"):
        return not part.class_cond
    return name in (*IDLE_IN_SAMPLING, "clip_denoised", "sigma_small")


def keys_of(section: Any) -> Iterator[tuple[str, dataclasses.Field]]:
    """(part, key) of the keys of a section, a type or an instance, in order; part is "" for its own."""
    for field in dataclasses.fields(section):
        if field.default_factory is dataclasses.MISSING:
            yield "", field
        else:
            inner = field.default_factory if isinstance(section, type) else getattr(section, field.name)
            yield from ((field.name, key) for _, key in keys_of(inner))


def flat(section: Any) -> dict[str, Any]:
    """The keys of a section, or of a part of one, and their values, without the parts."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def dotted(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by "section.key"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= dotted(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def describe_keys(section: type, name: str = "") -> list[tuple[str, Any, str]]:
    """(name, default, meaning) of each key that does something in a section, in order."""
    return [
        (field.name, field.default, field.metadata["help"])
        for _, field in keys_of(section)
        if name not in field.metadata["idle_in"]
    ]
