"""Configurations: what is accepted, and that a mistake gets one clear line."""

import re

import pytest
import yaml
from tiny import ROOT, distillation, network

from guided_diffusion.config.loading import experiment_text, load_experiment
from guided_diffusion.config.settings import DistillationExperiment, flat
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

KINDS = ("TCCD-0.4", "Dynamic-0.4", "Baseline")


@pytest.fixture
def config(tmp_path):
    return distillation(tmp_path)


def test_overrides_win(config):
    experiment = load_experiment(config, ["student.lr=5e-4", "distill.stage2_weight=0", "run.iterations=9e0"])
    assert experiment.student.training.lr == 5e-4
    assert experiment.distill.stage2_weight == 0
    assert experiment.run.iterations == 9
    assert experiment.teacher.prob == 1.0


@pytest.mark.parametrize(
    "override, told",
    [
        ("student.lrr=1", "did you mean 'student.lr'"),
        ("student.num_chanels=8", "did you mean 'student.num_channels'"),
        (
            "teacher.noise_schedule=linear teacher.diffusion_steps=5",
            "beta_end would be 4, more than 1",
        ),
        ("distill.advance_stride=10000000000000000000", "advance_stride must be 1 to 1000000"),
        ("iterations=5", "did you mean 'run.iterations'"),
        ("student.stage1_weight=0", "did you mean 'distill.stage1_weight'"),
        ("batch_size=8", "did you mean 'student.batch_size'"),
        ("tempfil=x", "did you mean 'teacher.tempfile'"),
        ("run.qqqqqqqq=1", "unknown key 'run.qqqqqqqq'; known are run.iterations, "),
        (
            "student.attention_resolutions=0",
            "attention_resolutions must be positive whole numbers such as '16,8'",
        ),
        ("student.attention_resolutions=16.5", "must be positive whole numbers such as '16,8', not '16.5'"),
        (
            "student.channel_mult=1,inf",
            "channel_mult must be positive numbers such as '1,1.5,2', not '1,inf'",
        ),
        ("student.channel_mult=1,-1", "channel_mult must be positive numbers"),
        ("distil.stage1_weight=1", "unknown key 'distil'; did you mean 'distill'"),
        ("lr=1e-3", "did you mean 'student.lr'"),
        ("student.lr=fast", "student.lr: Value 'fast'"),
        ("student.lr=-1", "student.lr must be positive"),
        ("student.lr=.inf", "student.lr must be positive"),
        ("distill.stage2_weight=.inf", "distill.stage2_weight must be 0 or positive, not inf"),
        ("run.iterations=1.5", "run.iterations: Value '1.5' of type 'float' could not be converted"),
        ("student.fp16_scale_growth=0", "fp16_scale_growth must be in [1e-6, 1], not 0"),
        ("student.ema_rate=1.5", "ema_rate must be in [0, 1)"),
        ("student.microbatch=0", "microbatch must be -1 or positive"),
        ("student.schedule_sampler=loss-second-moment", "the pool gives the timesteps"),
        ("student.schedule_sampler=other", "schedule_sampler must be uniform"),
        ("student.image_size=32", "student.image_size is 32 but teacher.image_size is 16"),
        ("student.use_kl=true", "student.use_kl: distillation matches noise predictions"),
        ("teacher.prob=0", "prob must be in (0, 1]"),
        ("teacher.iter_choice=dynamic", "iter_choice must be dynamic_iterative_distillation, "),
        ("teacher.noise_schedule=quadratic", "noise_schedule must be linear, cosine or scaled_linear"),
        ("distill.temperature=0", "temperature must be positive"),
        ("distill.stage1_weight=0 distill.stage2_align=true", "both weights must be positive"),
        ("run.precision=fp8", "precision must be auto, fp32, bf16 or fp16"),
        ("student", "'student' is no override"),
        ("student.model=nowhere.yaml", "'nowhere.yaml' is to be found neither"),
        ("student.model=/nowhere/x.yaml", "no such file: /nowhere/x.yaml"),
        ("student.lr=", "student.lr=: gives no value"),  # a shell's variable that is not set
        ("student.attention_resolutions=", "student.attention_resolutions=: gives no value"),
        ("student.num_res_blocks=", "num_res_blocks=: gives no value"),
        ("run.ema_warmup=", "run.ema_warmup: Value ''"),
        ("student.image_size=???", "'student.image_size=???' gives no value"),
        ("teacher.BATCH=.inf", "BATCH must be positive"),
        ("student.lr=\udcff", "student.lr"),
        ("student.lr=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_mistakes_are_told(config, override, told):
    with pytest.raises(UserError) as error:
        load_experiment(config, override.split(" "))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, told",
    [
        ("lr: ???", "lr has no value"),
        ("lr:", "lr has no value"),
        ("base: true", "'base' must name a file"),
        ("base: [3]", "'base' must name a file"),
        ("base: ${nope}", "Interpolation key 'nope' not found"),
        ("model: part.yaml", "Interpolation key 'width' not found"),
        ("student: {}\n1: 2", "unknown key '1'"),
        ("lr: 1\nlr: 2", "odd.yaml: not readable as YAML: line 2: found duplicate key lr"),
        ("lr: 1\n  bad: 2", "line 2: mapping values are not allowed here"),
        ("architecture: dit\nnum_channels: 8", "num_channels is a key of adm, and the architecture is dit"),
    ],
)
def test_odd_values_in_a_file_are_told(tmp_path, text, told):
    (tmp_path / "part.yaml").write_text("num_channels: ${width}")
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(told)):
        load_experiment(tmp_path / "odd.yaml")


def test_what_a_text_ends_in_is_left_alone(config):
    weights = "gs://bucket/x.pt?signature=abc="
    assert load_experiment(config, [f"teacher.model_path={weights}"]).teacher.model_path == weights
    assert load_experiment(config, ["student.model_path="]).student.training.model_path == ""


def test_a_base_may_refer_to_other_keys_and_may_be_empty(tmp_path):
    (tmp_path / "linear.yaml").write_text("lr: 0.5")
    found = {}
    for base in ("${noise_schedule}.yaml", "['${noise_schedule}.yaml']", ""):
        (tmp_path / "net.yaml").write_text(f"base: {base}\nnoise_schedule: linear")
        found[base] = load_experiment(tmp_path / "net.yaml").student.training.lr
    assert list(found.values()) == [0.5, 0.5, 1e-4]


def test_what_a_student_says_counts_and_not_its_teachers_name_for_it(config):
    found = load_experiment(config, ["teacher.predict_xstart=true"])
    assert found.teacher.process.prediction_type == found.student.process.prediction_type == "sample"
    for kind in ("epsilon", "v_prediction"):
        found = load_experiment(config, ["teacher.predict_xstart=true", f"student.prediction_type={kind}"])
        assert found.student.process.prediction_type == kind
    fixed = ["teacher.learn_sigma=false", "teacher.sigma_small=true"]
    found = load_experiment(config, [*fixed, "student.learn_sigma=true"])
    assert found.teacher.process.sigma_small and not found.student.process.sigma_small


def test_a_baselines_keys_may_be_given_as_a_students(tmp_path):
    """As --help has them."""
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(network()))
    training = load_experiment(
        tmp_path / "net.yaml", ["student.lr=0.5", "random_flip=false"]
    ).student.training
    assert training.lr == 0.5 and not training.random_flip


def test_the_resolved_configuration_loads_again(config, tmp_path):
    for source in (config, baseline(tmp_path)):
        experiment = load_experiment(source)
        (tmp_path / "resolved.yaml").write_text(experiment_text(experiment))
        again = load_experiment(tmp_path / "resolved.yaml")
        again.name = experiment.name
        assert again == experiment


def baseline(folder):
    (folder / "net.yaml").write_text(yaml.safe_dump({"model": "arch.yaml", "diffusion": "diffusion.yaml"}))
    keys = network()
    steps = {k: keys.pop(k) for k in ("learn_sigma", "diffusion_steps", "noise_schedule")}
    (folder / "arch.yaml").write_text(yaml.safe_dump(keys))
    (folder / "diffsion.yaml").write_text(yaml.safe_dump(steps))
    path = folder / "baseline.yaml"
    path.write_text(
        "model: net.yaml\nlr: 1e-3\nimage_size: 8\nattention_resolutions: 4\nchannel_mult: [1, 2]\n"
    )
    return path


def test_files_are_merged_in_and_the_sections_own_keys_win(tmp_path, monkeypatch):
    path = baseline(tmp_path)
    monkeypatch.chdir("/")
    experiment = load_experiment(path, ["num_channels=64"])
    assert not isinstance(experiment, DistillationExperiment)
    student = flat(experiment.student)
    assert (student["image_size"], student["num_channels"], student["diffusion_steps"]) == (8, 64, 20)
    assert (student["channel_mult"], student["attention_resolutions"], student["lr"]) == ("1,2", "4", 1e-3)


def test_a_base_is_laid_under(tmp_path, config):
    top = tmp_path / "variant.yaml"
    top.write_text(f"base: {config.name}\ndistill: {{stage1_weight: 0}}\n")
    experiment = load_experiment(top)
    assert experiment.distill.stage1_weight == 0
    assert experiment.name == "variant"
    assert experiment.student == load_experiment(config).student
    top.write_text(f"base: {config.name}\nstudent: [lr]\n")
    with pytest.raises(UserError, match="does not fit its base: Cannot merge"):
        load_experiment(top)
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\n")
    with pytest.raises(UserError, match="in a circle"):
        load_experiment(tmp_path / "circle.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "", "teacher: 3\nstudent: {}\n", "teacher: {}\n"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    if not text:  # all defaults: a network of 64x64 images
        assert load_experiment(path).student.architecture.image_size == 64
        return
    with pytest.raises(UserError):
        load_experiment(path)


def test_the_originals_spellings_are_accepted(config):
    experiment = load_experiment(config, ["teacher.iter_choice=shffled_iterative_distillation"])
    assert experiment.teacher.iter_choice == "shuffled_iterative_distillation"


def test_the_public_factory_takes_the_same_keys():
    defaults = model_and_diffusion_defaults()
    model, diffusion = create_model_and_diffusion(**defaults | network())
    assert (model.image_size, diffusion.num_timesteps) == (16, 20)
    with pytest.raises(TypeError, match="num_chanels"):
        create_model_and_diffusion(num_chanels=3)


ALL = sorted(ROOT.glob("yaml/*/exp/*.yaml"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_experiment_loads_from_anywhere(path, monkeypatch):
    monkeypatch.chdir("/")
    experiment = load_experiment(path)
    name = path.stem
    distils = isinstance(experiment, DistillationExperiment)
    assert distils != ("Baseline" in name or name.endswith("teacher"))
    if "Dynamic" in name:
        assert experiment.distill.stage1_weight == experiment.distill.stage2_weight == 0
    if distils and not name.startswith("digits"):
        assert experiment.distill.stride == 1 and not experiment.distill.role_vector
        ratio = re.search(r"(?:TCCD|Dynamic)-([\d.]+)", name)
        assert (float(ratio[1]) if ratio else 0.4) == experiment.teacher.BATCH


def test_the_seeds_names_exist():
    wanted = [f"cifar10_32/exp/CIFAR10-{n}M-{kind}" for n in (14, 24, 32, 44, 57) for kind in KINDS]
    wanted += [f"celeba_64/exp/CelebA64-57M-{kind}" for kind in KINDS]
    wanted += [f"imagenet_32/exp/ImageNet32-14M-{kind}" for kind in KINDS]
    for name in wanted:
        load_experiment(ROOT / f"yaml/{name}.yaml")
    for ratio in ("0.05", "0.1", "0.15", "0.2", "1"):
        experiment = load_experiment(ROOT / f"yaml/cifar10_32/exp/CIFAR10-14M-Baseline-{ratio}.yaml")
        assert experiment.name == f"CIFAR10-14M-Baseline-{ratio}"


def test_no_two_files_are_identical():
    texts = [path.read_text() for path in ROOT.glob("yaml/**/*.yaml")]
    assert len(set(texts)) == len(texts)
