"""Golden group G4, losses: stage 1, stage 2, their gradients, and the plain forward with the head."""

import pytest
import torch as th
from golden_data import (
    arrays,
    as_the_scripts_build,
    assert_close,
    assert_close_to_largest,
    assert_gradient_norms,
    fill,
    manifest,
)
from tiny import teacher_of

from guided_diffusion.config.settings import Distill
from guided_diffusion.distill.dynamic_batch import DistillationBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.losses import contrastive_loss

CASES = manifest("g4_tccd.json")["cases"]


def build(info):
    model, diffusion = as_the_scripts_build(info["student_arch"], info["diffusion"])
    objective = Distillation(model, diffusion, Distill()).eval()
    fill(objective.noise_encoder, prefix="out_embed.")
    return diffusion, model, objective


def batch_of(a, prefix=""):
    names = {"x_t": "x_t", "t": "t", "eps": "teacher/model_output"}
    names |= {"mean": "teacher/mean", "log_variance": "teacher/log_variance"}
    return DistillationBatch(**{key: a[prefix + name] for key, name in names.items()})


def parameters_of(model, objective):
    named = dict(model.named_parameters())
    return named | {"out_embed." + k: p for k, p in objective.noise_encoder.named_parameters()}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param], arrays(f"g4_tccd_{request.param}.npz")


def test_names_and_shapes_of_the_head(case):
    info, _ = case
    _, model, objective = build(info)
    ours = {name: list(p.shape) for name, p in parameters_of(model, objective).items()}
    assert ours == dict(info["keys"])


def test_plain_forward(case):
    info, a = case
    diffusion, model, objective = build(info)
    timesteps = diffusion.model_timesteps(a["t"])
    assert th.equal(timesteps, a["model_timesteps"])
    with th.no_grad():
        out = model.evaluate(a["x_t"], timesteps)
        z, emb = objective.noise_encoder(out.features), out.emb
        assert_close(out.output, a["student/output"])
        assert_close(model(a["x_t"], timesteps), a["student/output"])
        assert_close(emb, a["student/emb"])
        assert_close(z, a["student/h_emb"])
        assert_close(z @ emb.T, a["student/similarity"], atol=1e-4)
        assert_close(contrastive_loss(z, emb), a["student/contrastive_loss"])


def test_teacher_step(case, monkeypatch):
    info, a = case
    if "step_noise" not in a:
        return  # the teacher's values of this case are inputs only
    teacher, diffusion = as_the_scripts_build(info["teacher_arch"], info["diffusion"])
    with th.no_grad():
        output = teacher(a["x_t"], diffusion.model_timesteps(a["t"]))
    assert_close(output[:, :3], a["teacher/model_output"])
    # The step itself from the recorded eps: at t = T-1 it multiplies eps by 1 / sqrt(alpha) = 32, and with
    # it what two processors differ by in the network's last digits.
    output[:, :3] = a["teacher/model_output"]
    monkeypatch.setattr(th, "randn_like", lambda x: a["step_noise"])
    step = teacher_of(lambda x, t, y: output, diffusion).step(a["x_t"], a["t"])
    assert_close(step.mean, a["teacher/mean"])
    assert_close(step.log_variance, a["teacher/log_variance"])
    assert_close(step.x_prev, a["x_t_minus_1"])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_stage_losses_and_gradients(case, stage):
    info, a = case
    _, model, objective = build(info)
    out = getattr(objective, stage)(model, batch_of(a))
    assert_close(out.loss, a[f"{stage}/loss"], what="loss")
    for term in ("mse", "vb"):
        assert (f"{stage}/{term}" in a) == (f"{stage}_{term}" in out.terms)
        if f"{stage}/{term}" in a:
            assert_close(out.terms[f"{stage}_{term}"], a[f"{stage}/{term}"], what=term)
    out.loss.mean().backward()
    named = parameters_of(model, objective)
    for key, value in a.items():
        if key.startswith(f"{stage}/grad:"):
            assert_close_to_largest(named[key.split(":", 1)[1]].grad, value, what=key)
    norms = info["grad_l2_norm_of_mean_loss"][f"{stage}_only"]
    seen = assert_gradient_norms(model, norms)
    seen |= assert_gradient_norms(objective.noise_encoder, norms, prefix="out_embed.")
    assert seen == set(norms)


def test_both_stages_accumulate(case):
    info, a = case
    _, model, objective = build(info)
    for out in objective.passes(model, batch_of(a)):
        out.loss.mean().backward()
    norms = info["grad_l2_norm_of_mean_loss"]["stage1_plus_stage2_accumulated"]
    assert_gradient_norms(model, norms)
    assert_gradient_norms(objective.noise_encoder, norms, prefix="out_embed.")
