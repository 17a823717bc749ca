"""The loop's own parts: what is logged, the learning rate, averages, arithmetic, what is kept."""

import math
from types import SimpleNamespace

import pytest
import torch as th
from in_process import script_here
from test_objectives import DKDM, build, loop_for, make_batch
from tiny import denoiser, distillation, network, one_line_error

from guided_diffusion.config.settings import Run, Training
from guided_diffusion.logger import RunLog, read_progress
from guided_diffusion.losses import normal_kl
from guided_diffusion.networks.precision import compute_dtype
from guided_diffusion.runs.checkpoint import complete_checkpoints
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.train_util import reseed
from guided_diffusion.training.ema import Ema
from guided_diffusion.training.grids import sampling_process
from guided_diffusion.training.metrics import Metrics
from guided_diffusion.training.objective import PassLoss
from guided_diffusion.training.optimizer import load_optimizer_state


def test_quartiles_are_those_of_the_batchs_own_timesteps():
    metrics = Metrics()
    t = th.tensor([0, 24, 25, 99, 75])
    values = th.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    metrics.add_pass(PassLoss(values, {"mse": values}, t), num_timesteps=100)
    assert metrics.read() == {"mse": 5.0, "mse_q0": 2.0, "mse_q1": 5.0, "mse_q3": 8.0}
    assert metrics.read() == {}  # a reading starts anew; an empty quartile is left out
    values[2] = math.nan  # spoils its own quartile alone
    metrics.add_pass(PassLoss(values, {"mse": values}, t), num_timesteps=100)
    read = metrics.read()
    assert math.isnan(read.pop("mse")) and math.isnan(read.pop("mse_q1"))
    assert read == {"mse_q0": 2.0, "mse_q3": 8.0}
    metrics.add("loss", th.tensor([1.0]))
    metrics.add("loss", th.tensor([3.0, 8.0]))
    assert metrics.read() == {"loss": 4.0}


def test_learning_rate(tmp_path):
    model, diffusion, objective = build()
    loop = loop_for(model, diffusion, objective, tmp_path, lr=1.0, lr_anneal_steps=10)
    rates = []
    for loop.step in range(12):
        rates.append(loop._learning_rate())
    assert rates == pytest.approx([1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    loop.training.lr_anneal_steps, loop.run_settings.warmup_steps = 0, 4
    rates = []
    for loop.step in range(6):
        rates.append(loop._learning_rate())
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_a_learning_rate_on_the_device_is_logged_as_a_number(tmp_path):
    """On a GPU the optimizer reads it there; rows of the log that are no numbers would be dropped."""
    model, diffusion, objective = build()
    loop = loop_for(model, diffusion, objective, tmp_path, lr=0.5)
    loop.log, loop._lr = RunLog(tmp_path, active=True), th.zeros(())
    loop.train_step(make_batch(diffusion))
    loop._log(1.0, 2.0)
    assert float(loop._lr) == 0.5
    assert [row["lr"] for row in read_progress(tmp_path / "progress.csv")] == [0.5]
    assert [group["lr"] for group in loop.optimizer.state_dict()["param_groups"]] == [0.5]


def test_averages():
    module = th.nn.Linear(1, 1, bias=False)
    th.nn.init.zeros_(module.weight)
    ema = Ema(module, 0.9)
    th.nn.init.ones_(module.weight)
    for _ in range(3):
        ema.update(th.tensor(False))
        ema.update(th.tensor(True))  # of a skipped iteration
    assert float(ema.state_dict()["weight"]) == pytest.approx(1 - 0.9**3)
    with ema.swapped():
        assert module.weight.item() == pytest.approx(1 - 0.9**3)
    assert module.weight.item() == 1
    assert float(ema.state_dict()["weight"]) == pytest.approx(1 - 0.9**3)
    for step, rate in ((0, 1 / 10), (3, 4 / 13), (10**6, 0.9)):
        fresh = Ema(th.nn.Linear(1, 1, bias=False), 0.9)
        th.nn.init.zeros_(fresh.average[0])
        th.nn.init.ones_(fresh.module.weight)
        fresh.update(th.tensor(False), warmup_step=step)
        assert float(fresh.state_dict()["weight"]) == pytest.approx(1 - rate)


def test_the_slowest_average_is_scored(tmp_path):
    model, diffusion, objective = build()
    loop = loop_for(model, diffusion, objective, tmp_path)
    assert loop._scored_ema.rate == 0.9 and loop.training.scored_weights == "ema_0.9"
    loop.emas = {rate: Ema(model, rate) for rate in (0.99, 0.9999, 0.9)}
    assert loop._scored_ema.rate == 0.9999
    assert Training(ema_rate="0.99,0.9999,0.9").scored_weights == "ema_0.9999"
    assert Training(ema_rate="").scored_weights == "model"


def test_a_weight_used_in_two_places_is_averaged_under_both_names():
    module = th.nn.Sequential(th.nn.Linear(2, 2, bias=False), th.nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    ema = Ema(module, 0.9)
    th.nn.init.zeros_(module[0].weight)
    ema.update(th.tensor(False))
    state = ema.state_dict()
    assert state["0.weight"].any() and th.equal(state["0.weight"], state["1.weight"])
    again = Ema(module, 0.9)
    again.load_state_dict(state)
    assert th.equal(again.average[0], ema.average[0])


def test_what_is_logged_counts_samples_and_leaves_out_skipped_steps(tmp_path):
    model, diffusion, objective = build(DKDM)
    batch = make_batch(diffusion, 5)
    loop = loop_for(model, diffusion, objective, tmp_path, microbatch=4, lr=1e-9)
    loop.train_step(batch)
    whole = objective.stage1(model, batch).loss.mean()
    values = loop.metrics.read()
    assert values["loss"] == pytest.approx(whole.item(), rel=1e-4)
    loop.train_step(batch)
    batch.x_t[0] = th.nan
    loop.train_step(batch)
    after = loop.metrics.read()
    assert after["skipped"] == 0.5 and after["grad_norm"] == pytest.approx(values["grad_norm"], rel=1e-3)


def test_the_growth_of_the_loss_scale_is_the_configured_one_after_resuming(tmp_path):
    model, diffusion, objective = build(DKDM)
    model.use_dtype(th.float16)
    before, after = (
        loop_for(model, diffusion, objective, tmp_path, fp16_scale_growth=growth) for growth in (0.001, 0.1)
    )
    th.save({"optimizer": before.optimizer.state_dict(), "scaler": before.scaler.state_dict(),
             "world_size": 1}, tmp_path / "opt.pt")  # fmt: skip
    after._load_optimizer(tmp_path / "opt.pt")
    assert after.scaler.get_growth_factor() == pytest.approx(2**0.1)


def test_a_network_of_a_respaced_process_is_sampled_in_its_own_steps():
    for respacing, expected in (("", [0, 5, 10, 14, 19]), ("4", [0, 6, 13, 19])):
        process = sampling_process(
            denoiser(**network(), timestep_respacing=respacing), Run(sample_respacing="5")
        )
        assert list(process.timestep_map) == expected, respacing


@pytest.mark.parametrize(
    "respacing, bounds, clip_last, advice",
    [
        ("50", (-1, 1), False, "give clip_last=true"),
        ("50", (-1, 1), True, ""),
        ("50", None, True, "train in all steps"),
        ("", (-1, 1), False, ""),
    ],
)
def test_a_kl_that_drowns_the_rest_is_told(respacing, bounds, clip_last, advice, tmp_path, capsys):
    """A student one unit of eps away from its teacher at t = T-1, both with the least variance."""
    process = create_gaussian_diffusion(
        steps=1000, noise_schedule="cosine", learn_sigma=True, timestep_respacing=respacing
    )
    process.bounds = bounds
    x, t = th.randn(1, 3, 8, 8), th.tensor([process.num_timesteps - 1])
    outputs = [th.cat([x + shift, -th.ones_like(x)], dim=1) for shift in (0.0, 1.0)]
    one, other = (process.p_distribution(output, x, t, clip_denoised=False) for output in outputs)
    kl = normal_kl(one["mean"], one["log_variance"], other["mean"], other["log_variance"]).mean()
    assert process.last_kl_gain == pytest.approx(float(kl), rel=1e-3)
    model, _, objective = build()
    loop = loop_for(model, process, objective, tmp_path, clip_last=clip_last)
    loop.log, loop.iterations, loop.step = RunLog(tmp_path, active=True), 1, 1
    loop.source = SimpleNamespace(close=lambda: None, pool_record=lambda: None)
    loop.run()
    printed = capsys.readouterr().out
    assert ("WARNING: at the noisiest of 50 steps the KL is 2e+05 times" in printed) == bool(advice)
    assert advice in printed


def test_arithmetic(monkeypatch):
    cpu, gpu = th.device("cpu"), th.device("cuda")
    assert compute_dtype("auto", False, gpu) == th.float32
    assert compute_dtype("fp16", False, cpu) == th.float16
    assert compute_dtype("fp32", True, gpu) == th.float32
    assert compute_dtype("auto", True, cpu) in (th.bfloat16, th.float32)
    # As on GPUs that have bfloat16 only by emulation, slowly (V100, T4).
    monkeypatch.setattr(th.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert compute_dtype("auto", True, gpu) == th.float16


def test_a_step_is_a_function_of_seed_rank_and_number():
    draws = []
    for key in [(0, 0, 5), (0, 0, 5), (0, 0, 6), (0, 1, 5), (1, 0, 5)]:
        reseed(*key)
        draws.append(th.randn(3))
    assert th.equal(draws[0], draws[1])
    assert all(not th.equal(draws[0], other) for other in draws[2:])


def test_gradient_clipping(tmp_path):
    model, diffusion, objective = build()
    batch = make_batch(diffusion)
    loop = loop_for(model, diffusion, objective, tmp_path)
    loop.run_settings.grad_clip = 0.01
    loop.train_step(batch)
    assert float(th.stack([p.grad.norm() for p in loop.parameters]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_moments_of_another_memory_layout():
    """A checkpoint's tensors are laid out as they were where it was written; the fused step minds that."""
    weights = []
    for stored in (th.channels_last, th.contiguous_format):
        th.manual_seed(0)
        weight = th.nn.Parameter(th.randn(2, 3, 2, 2).to(memory_format=th.channels_last))
        optimizer = th.optim.AdamW([weight], lr=0.1, fused=True)
        for _ in range(2):
            weight.grad = th.randn(2, 3, 2, 2).to(memory_format=th.channels_last)
            optimizer.step()
            saved = optimizer.state_dict()
            moments = {
                k: v.contiguous(memory_format=stored) if v.ndim else v for k, v in saved["state"][0].items()
            }
            load_optimizer_state(optimizer, saved | {"state": {0: moments}})
        weights.append(weight.detach())
    assert th.equal(*weights)


def test_initial_weights_and_kept_pools(tmp_path):
    config = distillation(tmp_path, student__save_interval=1, student__lr=1e-12, student__weight_decay=0.0)
    script_here("scripts/dynamic_prepare.py", "--config", config)
    flags = ["--config", config, f"student.model_path={tmp_path / 'teacher.pt'}", "run.iterations=6"]
    run = tmp_path / "run"
    script_here("scripts/image_kd.py", *flags, "--exp_dir", run, "student.cache_save_interval=2")
    start = th.load(tmp_path / "teacher.pt", weights_only=True)
    end = th.load(run / "model000006.pt", weights_only=True)
    for name in start:  # lr is next to nothing: the student is still the weights it was given
        th.testing.assert_close(start[name], end[name], atol=1e-6, rtol=1e-5)
    kept = {c.step for c in complete_checkpoints(run) if c.has("pool")}
    assert kept == {2, 4, 5, 6}  # every second, and the newest two
    assert len(complete_checkpoints(run)) == 6
    flags[2] = f"student.model_path={tmp_path / 'absent.pt'}"
    assert "student.model_path: no such file" in one_line_error(
        script_here("scripts/image_kd.py", *flags, check=False)
    )
