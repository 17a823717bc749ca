"""Every configuration key: its name, type, default, meaning, and the values it may take.

The names and defaults of `Network`, `Teacher` and `Student` are those of the configurations that users of
guided-diffusion, DKDM and TCCD already have; what this project adds lives in `Distill` and `Run`.
Nothing here imports torch, so that a mistyped key is answered at once.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

SOLVERS = ("dpmpp_2m", "unipc")
SAMPLERS = ("ancestral", "ddim", *SOLVERS)


def key(default: Any, help: str) -> Any:
    """A configuration key with its default and its one line of documentation."""
    return dataclasses.field(default=default, metadata={"help": help})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class Network:
    """A U-Net and the diffusion process it belongs to (the keys of ADM)."""

    image_size: int = key(64, "height and width of the images")
    num_channels: int = key(128, "base width of the U-Net")
    num_res_blocks: int = key(2, "residual blocks per level")
    num_heads: int = key(4, "attention heads, unless num_head_channels gives their width")
    num_heads_upsample: int = key(-1, "attention heads on the way up (-1: as num_heads)")
    num_head_channels: int = key(-1, "width of an attention head (-1: by num_heads)")
    attention_resolutions: str = key("16,8", "feature map sizes with attention")
    channel_mult: str = key("", "width multiplier of each level ('': ADM's for the image size)")
    dropout: float = key(0.0, "dropout probability in training")
    class_cond: bool = key(False, "condition on class labels")
    num_classes: int = key(1000, "number of classes, if class_cond")
    use_checkpoint: bool = key(False, "recompute blocks in backward: less memory, more time")
    use_scale_shift_norm: bool = key(True, "condition by scale and shift instead of addition")
    resblock_updown: bool = key(False, "resample inside residual blocks")
    use_fp16: bool = key(False, "16-bit arithmetic, as run.precision says")
    use_new_attention_order: bool = key(False, "packing of q, k and v in the checkpoint")
    learn_sigma: bool = key(False, "learned variance: the network has 6 output channels")
    diffusion_steps: int = key(1000, "steps T of the process")
    noise_schedule: str = key("linear", "linear or cosine")
    timestep_respacing: str = key("", "steps to keep: '50', 'ddim50', 'trailing50', '10,15,20' ('': all)")
    use_kl: bool = key(False, "train the variational bound alone")
    predict_xstart: bool = key(False, "the network predicts x_0 instead of the noise")
    rescale_timesteps: bool = key(False, "feed the network timesteps scaled to 0..1000")
    rescale_learned_sigmas: bool = key(False, "multiply the bound beside the MSE by T/1000")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        for name in ("image_size", "num_channels", "num_res_blocks", "diffusion_steps", "num_classes"):
            _require(getattr(self, name) > 0, f"{where}{name} must be positive, not {getattr(self, name)}")
        _require(0 <= self.dropout < 1, f"{where}dropout must be in [0, 1), not {self.dropout}")
        _require(
            self.noise_schedule in ("linear", "cosine"),
            f"{where}noise_schedule must be linear or cosine, not '{self.noise_schedule}'",
        )
        for name in ("attention_resolutions", "channel_mult"):
            try:
                [float(part) for part in getattr(self, name).split(",") if part]
            except ValueError:
                value = getattr(self, name)
                raise UserError(f"{where}{name} must be numbers such as '16,8', not '{value}'") from None


@dataclass
class Teacher(Network):
    """The teacher and the dynamic batch (the keys of DKDM)."""

    prob: float = key(1.0, "probability of training on a drawn batch instead of only advancing it")
    BATCH: float = key(0.4, "rho: the pool holds round(rho T) batches")
    input_perturb: float = key(0.0, "gamma: noise added to the student's input, in units of its own")
    batch_size: int = key(128, "rows per teacher call and rank while preparing the pool")
    model_path: str = key("", "the teacher's checkpoint")
    iter_choice: str = key(
        "dynamic_iterative_distillation",
        "dynamic_iterative_distillation, shuffled_iterative_distillation or iterative_distillation",
    )
    tempfile: str = key("", "the pool's file, written by dynamic_prepare.py")

    def __post_init__(self) -> None:
        """Accept the originals' spelling."""
        if self.iter_choice == "shffled_iterative_distillation":
            self.iter_choice = "shuffled_iterative_distillation"

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        _require(0 < self.prob <= 1, f"{where}prob must be in (0, 1], not {self.prob}")
        _require(self.BATCH > 0, f"{where}BATCH must be positive, not {self.BATCH}")
        _require(self.input_perturb >= 0, f"{where}input_perturb must not be negative")
        _require(self.batch_size > 0, f"{where}batch_size must be positive, not {self.batch_size}")
        choices = ("dynamic_iterative", "shuffled_iterative", "iterative")
        _require(
            self.iter_choice in [f"{choice}_distillation" for choice in choices],
            f"{where}iter_choice '{self.iter_choice}' is none of "
            + ", ".join(f"{choice}_distillation" for choice in choices),
        )


@dataclass
class Student(Network):
    """The network being trained and how (the keys of ADM's training scripts)."""

    schedule_sampler: str = key("uniform", "timesteps of plain training: uniform or loss-second-moment")
    lr: float = key(1e-4, "learning rate of AdamW")
    weight_decay: float = key(0.0, "weight decay of AdamW")
    lr_anneal_steps: int = key(0, "lower lr linearly to 0 over so many iterations (0: constant)")
    batch_size: int = key(128, "samples per iteration, all ranks together")
    microbatch: int = key(-1, "samples per backward pass and rank (-1: all at once)")
    ema_rate: str = key("0.9999", "decay of the averaged weights; several: '0.99,0.9999'")
    resume_checkpoint: str = key("", "run directory or modelNNNNNN.pt to continue from")
    fp16_scale_growth: float = key(1e-3, "growth of log2(loss scale) per iteration in float16")
    model_path: str = key("", "initial weights ('': random)")
    log_interval: int = key(100, "iterations between log lines")
    save_interval: int = key(10000, "iterations between checkpoints")
    cache_save_interval: int = key(
        -1, "keep the pool of every so many iterations (-1: of the newest two checkpoints only)"
    )
    clip_last: bool = key(False, "clip the student's x_0 to [-1, 1] inside the KL at t = T-1")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        super().check(where)
        for name in ("batch_size", "log_interval", "save_interval"):
            _require(getattr(self, name) > 0, f"{where}{name} must be positive, not {getattr(self, name)}")
        _require(self.lr > 0, f"{where}lr must be positive, not {self.lr}")
        _require(self.weight_decay >= 0, f"{where}weight_decay must not be negative")
        _require(self.lr_anneal_steps >= 0, f"{where}lr_anneal_steps must not be negative")
        _require(
            self.microbatch == -1 or self.microbatch > 0,
            f"{where}microbatch must be -1 or positive, not {self.microbatch}",
        )
        _require(
            self.cache_save_interval == -1 or self.cache_save_interval > 0,
            f"{where}cache_save_interval must be -1 or positive, not {self.cache_save_interval}",
        )
        _require(
            self.schedule_sampler in ("uniform", "loss-second-moment"),
            f"{where}schedule_sampler must be uniform or loss-second-moment, not '{self.schedule_sampler}'",
        )
        try:
            rates = self.ema_rates
        except ValueError:
            raise UserError(f"{where}ema_rate must be numbers, not '{self.ema_rate}'") from None
        _require(all(0 <= rate < 1 for rate in rates), f"{where}ema_rate must be in [0, 1)")

    @property
    def ema_rates(self) -> list[float]:
        """The EMA decays as numbers."""
        return [float(rate) for rate in self.ema_rate.split(",") if rate]


@dataclass
class Distill:
    """What TCCD adds, and our options on it. The defaults are the published method."""

    stage1_weight: float = key(1.0, "weight of the timestep-noise alignment (0: off)")
    stage2_weight: float = key(1.0, "weight of the interactive self-supervision pass (0: off)")
    stage2_align: bool = key(False, "use the alignment in stage 2 too (the paper's figure, not its code)")
    temperature: float = key(1.0, "temperature of the contrastive loss")
    normalize: bool = key(False, "contrast unit vectors instead of plain dot products")
    share_equal_timesteps: bool = key(False, "equal timesteps in a batch share the target's mass")
    gather_negatives: bool = key(False, "contrast with the negatives of all ranks, not the rank's own")
    role_vector: bool = key(False, "mark stage 2's input by a learned vector added to its timestep embedding")
    stride: int = key(1, "timesteps per teacher jump while preparing the pool (1: every step)")
    pool_dtype: str = key("float32", "how the pool is kept, in memory and in its file: float32 or float16")
    pool_device: str = key("auto", "where the pool is kept: auto (beside the networks) or cpu")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        for name in ("stage1_weight", "stage2_weight"):
            _require(getattr(self, name) >= 0, f"{where}{name} must not be negative")
        _require(self.temperature > 0, f"{where}temperature must be positive, not {self.temperature}")
        _require(self.stride >= 1, f"{where}stride must be at least 1, not {self.stride}")
        _require(
            self.pool_dtype in ("float32", "float16"),
            f"{where}pool_dtype must be float32 or float16, not '{self.pool_dtype}'",
        )
        _require(
            self.pool_device in ("auto", "cpu"),
            f"{where}pool_device must be auto or cpu, not '{self.pool_device}'",
        )


@dataclass
class Run:
    """How a run is carried out."""

    iterations: int = key(0, "end after so many iterations (0: after lr_anneal_steps; both 0: never)")
    warmup_steps: int = key(0, "raise lr linearly from 0 over so many iterations")
    seed: int = key(0, "seed of everything random")
    precision: str = key("auto", "auto, fp32, bf16 or fp16 (auto: fp32, or the device's best if use_fp16)")
    compile: bool = key(False, "torch.compile the networks' blocks: minutes at the start, for GPUs")
    grad_clip: float = key(0.0, "clip the gradient's norm to this (0: do not)")
    max_bad_steps: int = key(50, "give up after so many skipped iterations in a row (non-finite gradients)")
    ema_warmup: bool = key(False, "average with min(rate, (1 + step) / (10 + step))")
    keep_last: int = key(0, "keep only so many of the newest checkpoints (0: all)")
    keep_every: int = key(0, "keep checkpoints at multiples of this besides (0: none)")
    sample_interval: int = key(0, "iterations between grids of samples (0: with every checkpoint; -1: never)")
    num_samples: int = key(16, "samples in such a grid")
    sample_respacing: str = key("50", "timestep_respacing of such a grid")

    def check(self, where: str) -> None:
        """Raise `UserError` for values that cannot be right."""
        for name in ("iterations", "warmup_steps", "seed", "grad_clip", "keep_last", "keep_every"):
            _require(getattr(self, name) >= 0, f"{where}{name} must not be negative")
        _require(
            self.precision in ("auto", "fp32", "bf16", "fp16"),
            f"{where}precision must be auto, fp32, bf16 or fp16, not '{self.precision}'",
        )
        _require(self.max_bad_steps > 0, f"{where}max_bad_steps must be positive, not {self.max_bad_steps}")
        _require(self.sample_interval >= -1, f"{where}sample_interval must be -1 or more")
        _require(self.num_samples > 0, f"{where}num_samples must be positive")


@dataclass
class Experiment:
    """A whole configuration, validated. `teacher` is None for baselines and plain networks."""

    name: str
    teacher: Teacher | None
    student: Student
    distill: Distill
    run: Run

    def check(self) -> None:
        """Raise `UserError` for values that cannot be right, alone or together."""
        self.student.check("student." if self.teacher else "")
        self.run.check("run.")
        if self.teacher is None:
            return
        self.teacher.check("teacher.")
        self.distill.check("distill.")
        for name in (
            *("image_size", "diffusion_steps", "noise_schedule", "timestep_respacing"),
            *("rescale_timesteps", "class_cond", "num_classes"),
        ):
            ours, theirs = getattr(self.student, name), getattr(self.teacher, name)
            _require(
                ours == theirs,
                f"student.{name} is {ours!r} but teacher.{name} is {theirs!r}: both must be the same",
            )
        for where, network in (("teacher", self.teacher), ("student", self.student)):
            for name in ("predict_xstart", "use_kl"):
                _require(
                    not getattr(network, name),
                    f"{where}.{name}: distillation matches noise predictions by MSE, so it must be false",
                )
        _require(
            self.student.schedule_sampler == "uniform",
            "student.schedule_sampler must be uniform: in distillation the pool gives the timesteps",
        )
        if self.distill.stage2_align:
            _require(
                self.distill.stage1_weight > 0 and self.distill.stage2_weight > 0,
                "distill.stage2_align: the alignment, weighted by stage1_weight, is added to stage 2: "
                "both weights must be positive",
            )
        if self.distill.stage1_weight > 0:
            _require(
                self.student.image_size % 4 == 0,
                f"stage 1 cuts images into 4x4 patches: image_size {self.student.image_size} "
                "must be divisible by 4",
            )


def describe_keys(section: type) -> list[tuple[str, Any, str]]:
    """(name, default, meaning) of each key of a section, in order."""
    return [(f.name, f.default, f.metadata["help"]) for f in dataclasses.fields(section)]
