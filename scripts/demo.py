"""The whole method in minutes: distil the embedded digits teacher without data, sample, score, draw.

Runs the same commands a user would, one after the other. What exists is reused: everything lies in one
folder that belongs to this configuration and teacher, so a changed one starts afresh.
--quick is a small one of about a minute, to see that everything works.
"""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from guided_diffusion.config import command_line, paths
from guided_diffusion.config.loading import load_distillation, mapping_text
from guided_diffusion.errors import UserError
from guided_diffusion.io.files import sha256_of, write_text
from guided_diffusion.io.shipped import IS_INSTALLED, SHIPPED
from guided_diffusion.processes.launch import run_script

CONFIG = SHIPPED / "yaml/digits_16/exp/digits-TCCD.yaml"
QUICK = [
    *("teacher.BATCH=0.025", "student.batch_size=16", "student.ema_rate=0.9", "student.log_interval=25"),
    *(
        "run.iterations=200",
        "student.lr_anneal_steps=200",
        "run.warmup_steps=20",
        "student.save_interval=200",
    ),
]
VERDICT = "TCCD's two stages: with this preset the study finds no gain in them, nor harm (docs/study.md)."
QUICK_NOTE = "A quick look (--quick): the student is hardly trained, and these are not the demo's figures."


def main() -> None:
    """Prepare, distil, sample, score, draw."""
    parser = command_line.make_bare_parser(__doc__)
    parser.add_argument(
        "--config", type=paths.find_config, default=CONFIG, help="the distillation (default: digits-TCCD)"
    )
    parser.add_argument("--quick", action="store_true", help="a small demo of about a minute")
    parser.add_argument("--num_samples", type=int, help="images per model (default 1000, --quick 100)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a configuration key")
    args = parser.parse_intermixed_args()
    if args.quick:
        args.overrides = QUICK + args.overrides
    if args.num_samples is None:
        args.num_samples = 100 if args.quick else 1000
    if args.num_samples < 100:
        raise UserError("--num_samples must be at least 100: fewer images give no meaningful score")
    experiment = load_distillation(args.config, args.overrides)
    if experiment.teacher.architecture.image_size != 16:
        raise UserError(f"--config {args.config}: the demo is of the digits, which are 16x16")
    teacher = Path(
        paths.input_file(experiment.teacher.model_path, args.config, "teacher.model_path")
    ).resolve()
    text = f"{experiment} {sha256_of(teacher)}"
    own = f"{experiment.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    folder = paths.output_path(f"experiments/demo/{own}", args.config)
    folder.mkdir(parents=True, exist_ok=True)
    distill = experiment.distill
    print(f"Distilling {teacher.name} into a smaller student, without any data. Everything goes to {folder}")
    print(
        f"Short-run settings (stage weights {distill.stage1_weight:g} and {distill.stage2_weight:g}, role "
        f"vector {distill.role_vector}, stride {distill.stride}): the published ones need far longer runs."
    )
    if args.quick:
        print(QUICK_NOTE)

    seconds = {}
    common = ["--config", args.config, *args.overrides, f"teacher.tempfile={folder / 'pool.cache'}"]
    seconds["prepare"] = run("Preparing the dynamic batch", "scripts/dynamic_prepare.py", *common)
    run_folder = folder / "run"
    seconds["distil"] = run("Distilling", "scripts/image_kd.py", *common, "--exp_dir", run_folder)

    from guided_diffusion.runs.checkpoint import newest_checkpoint

    checkpoint = newest_checkpoint(run_folder)
    assert checkpoint is not None
    student = checkpoint.path(experiment.student.training.scored_weights)
    sample = ["--batch_size", 125, "--num_samples", args.num_samples, "--timestep_respacing", 50]
    own_config = folder / "teacher.yaml"
    write_text(own_config, mapping_text(experiment.teacher.network_keys()))
    # The samples are drawn in 16 bits where the processor is fast in them.
    guidance = ["--guidance_scale", experiment.teacher.guidance_scale]
    for name, weights, config, overrides in (
        ("teacher", teacher, own_config, ["use_fp16=true", *guidance]),
        ("student", student, args.config, [*args.overrides, "student.use_fp16=true"]),
    ):
        seconds[f"sample {name}"] = run(
            f"Sampling {args.num_samples} images from the {name}", "scripts/image_sample.py",
            "--config", config, *overrides, "--model_path", weights, *sample, "--log_dir", folder / name,
        )  # fmt: skip
    digits = paths.output_path("datasets/digits/digits.npz", args.config)
    if not digits.is_file():
        run("Writing the real digits, for scoring only", "datasets/digits.py", "--out", digits.parent)
    report(folder, digits, checkpoint.step, teacher, student, args.num_samples, seconds, args.quick)


def run(title: str, script: str, *arguments: object) -> float:
    """Run one of the project's commands; return its seconds.

    Raises:
        UserError: it failed; it has said why.
    """
    shown = SHIPPED / script if IS_INSTALLED else script
    print(f"\n== {title}\n$ python {shown} {' '.join(map(str, arguments))}", flush=True)
    started = time.monotonic()
    done = subprocess.run([sys.executable, SHIPPED / script, *map(str, arguments)])
    if done.returncode:
        raise UserError(f"{script} failed (status {done.returncode}); running the demo again continues")
    return time.monotonic() - started


def report(
    folder: Path,
    digits: Path,
    step: int,
    teacher: Path,
    student: Path,
    n: int,
    seconds: dict[str, float],
    quick: bool,
) -> None:
    """Score the samples, draw the pictures, and print the table."""
    from evaluations.digits_floor import RealFloor, real_floor
    from evaluations.evaluator import evaluate
    from evaluations.results import DigitsResult, write_json
    from guided_diffusion.io.npz_reader import NpzFile
    from guided_diffusion.runs.figures import save_comparison
    from guided_diffusion.runs.weights import load_state_dict

    files = {name: folder / name / f"samples_{n}x16x16x3.npz" for name in ("teacher", "student")}
    scores = {name: evaluate(digits, path, backend="digits", intervals=20) for name, path in files.items()}
    floor = real_floor(digits, n)
    weights = {"teacher": teacher, "student": student}
    sizes = {name: sum(v.numel() for v in load_state_dict(path).values()) for name, path in weights.items()}

    lines = [
        f"{'':26}{'digits-FD':>10}{'noise-like':>12}{'class balance':>15}{'parameters':>12}{'sampling':>10}"
    ]
    measured: dict[str, DigitsResult | RealFloor] = {**scores, "real digits (floor)": floor}
    for name, score in measured.items():
        size = f"{sizes[name] / 1e6:.2f}M" if name in sizes else ""
        spent = f"{seconds[f'sample {name}']:.0f} s" if name in sizes else ""
        quality = f"{score.fd:10.2f}{score.noise_share:12.1%}{score.class_balance:15.3f}"
        lines.append(f"{name:26}{quality}{size:>12}{spent:>10}")
    lines.append(
        f"{n} images each, 50 ancestral steps; digits-FD: lower is better; class balance: 1 is even."
    )
    lines.append(
        f"Preparing took {seconds['prepare']:.0f} s, {step} iterations of distillation "
        f"{seconds['distil']:.0f} s (a step that was already done is quick)."
    )
    lines.append(QUICK_NOTE if quick else VERDICT)
    panels = {"real digits": NpzFile(digits).load("arr_0")[:100]}
    for name, path in files.items():
        panels[f"{name} ({sizes[name] / 1e6:.2f}M)"] = NpzFile(path).load("arr_0")[:100]
    save_comparison(folder / "comparison.png", panels)
    write_text(folder / "table.txt", "\n".join(lines) + "\n")
    write_json(list(scores.values()), folder / "scores.json")
    page = folder / "report.html"
    shown = [folder / name for name in ("run", "teacher", "student", "scores.json")]
    run("Writing the report", "scripts/report.py", *shown, "--out", page)
    print("\n" + "\n".join(lines))
    print(f"\nPictures: {folder / 'comparison.png'} (real, teacher, student side by side)")
    print(f"          {folder / 'teacher/samples.png'}, {folder / 'student/samples.png'}")
    print(f"Losses:   {folder / 'run/curves.png'}")
    print(f"Table:    {folder / 'table.txt'}")
    print(f"Report:   {page} (all of this in one page; open it in a browser)")


if __name__ == "__main__":
    run_script(main)
