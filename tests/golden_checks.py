"""What is compared with the originals' numbers, one comparison at a time, on this process's device.

The tests assert every comparison; `benchmarks/gpu.py` tells on a GPU how much of its tolerance each one uses.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch as th
from golden_data import arrays, as_the_scripts_build, fill, manifest
from tiny import teacher_of

from guided_diffusion import dist_util
from guided_diffusion.config.settings import Distill, Run, Training
from guided_diffusion.distill.dynamic_batch import DistillationBatch, DynamicBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.logger import RunLog
from guided_diffusion.losses import contrastive_loss
from guided_diffusion.train_util import TrainLoop

UNETS = manifest("g1_unet.json")["cases"]
LOSSES = manifest("g4_tccd.json")["cases"]
# Of the others the teacher's values are inputs only.
TEACHERS = [case for case in LOSSES if "step_noise" in LOSSES[case]["arrays"]]
STEPS = manifest("g4_trainstep.json")["cases"]
POOLS = manifest("g5_dynamic.json")["cases"]


class Comparison(NamedTuple):
    """|ours - reference| <= atol + rtol |reference|, element by element; numbers or tensors."""

    what: str
    ours: th.Tensor | float
    reference: th.Tensor | float
    atol: float = 1e-5
    rtol: float = 1e-4


def close_to_largest(what: str, ours: th.Tensor, reference: th.Tensor) -> Comparison:
    """A comparison to 1e-5 of the reference's largest magnitude."""
    return Comparison(what, ours, reference, 1e-5 * float(reference.abs().max()), 0)


def norms_of_gradients(named, norms) -> Iterator[Comparison]:
    """Comparisons of the norms of all gradients: to 1e-4 of each and 1e-6 of the largest."""
    largest = max(norm or 0 for norm in norms.values())
    assert named.keys() == norms.keys()
    for name, parameter in named.items():
        if norms[name] is None:
            assert parameter.grad is None, f"{name} should have no gradient"
        else:
            yield Comparison(f"norm of {name}", parameter.grad.norm(), norms[name], 1e-6 * largest, 1e-4)


def by_the_scripts(config):
    """A network of a configuration of guided-diffusion's, as the scripts build it."""
    config = dict(config)
    return as_the_scripts_build(config, {"learn_sigma": config.pop("learn_sigma", False)})[0]


def unet(case, build=by_the_scripts) -> Iterator[Comparison]:
    """Group G1: a U-Net's output and gradients."""
    expected, info = arrays(f"g1_unet_{case}.npz"), UNETS[case]
    model = build(info["config"])
    x = expected["x"].clone().requires_grad_()
    output = model(x, expected["t"], y=expected.get("y"))
    yield Comparison("output", output, expected["output"])
    (output**2).sum().backward()
    yield close_to_largest("gradient of x", x.grad, expected["grad_x"])
    parameters = dict(model.named_parameters())
    for key, value in expected.items():
        if key.startswith("grad:"):
            yield close_to_largest(key, parameters[key.removeprefix("grad:")].grad, value)
    yield from norms_of_gradients(parameters, info["grad_l2_norm"])
    if "t_float" in expected:
        with th.no_grad():
            output = model(expected["x"], expected["t_float"])
        yield Comparison("output at fractional timesteps", output, expected["output_t_float"])


def build_student(info):
    """The process, the student and the objective of a case of group G4, filled by the rule."""
    model, diffusion = as_the_scripts_build(info["student_arch"], info["diffusion"])
    objective = Distillation(model, diffusion, Distill()).to(dist_util.dev()).eval()
    fill(objective.noise_encoder, prefix="out_embed.")
    return diffusion, model, objective


def batch_of(a, prefix=""):
    """The recorded batch among the arrays of a case of group G4."""
    names = {"x_t": "x_t", "t": "t", "eps": "teacher/model_output"}
    names |= {"mean": "teacher/mean", "log_variance": "teacher/log_variance"}
    return DistillationBatch(**{key: a[prefix + name] for key, name in names.items()})


def parameters_of(model, objective):
    """Student and head under the originals' names."""
    named = dict(model.named_parameters())
    return named | {"out_embed." + k: p for k, p in objective.noise_encoder.named_parameters()}


def plain_forward(case) -> Iterator[Comparison]:
    """Group G4: the student and its head without a loss."""
    a = arrays(f"g4_tccd_{case}.npz")
    diffusion, model, objective = build_student(LOSSES[case])
    timesteps = diffusion.model_timesteps(a["t"])
    yield Comparison("timesteps", timesteps, a["model_timesteps"], 0, 0)
    with th.no_grad():
        out = model.evaluate(a["x_t"], timesteps)
        z, emb = objective.noise_encoder(out.features), out.emb
        yield Comparison("evaluation", out.output, a["student/output"])
        yield Comparison("output", model(a["x_t"], timesteps), a["student/output"])
        yield Comparison("timestep embedding", emb, a["student/emb"])
        yield Comparison("noise representation", z, a["student/h_emb"])
        yield Comparison("similarity", z @ emb.T, a["student/similarity"], atol=1e-4)
        yield Comparison("contrastive loss", contrastive_loss(z, emb), a["student/contrastive_loss"])


def teacher_step(case) -> Iterator[Comparison]:
    """Group G4: the teacher's step."""
    info, a = LOSSES[case], arrays(f"g4_tccd_{case}.npz")
    teacher, diffusion = as_the_scripts_build(info["teacher_arch"], info["diffusion"])
    with th.no_grad():
        output = teacher(a["x_t"], diffusion.model_timesteps(a["t"]))
    yield Comparison("prediction", output[:, :3], a["teacher/model_output"])
    # The step itself from the recorded eps: at t = T-1 it multiplies eps by 1 / sqrt(alpha) = 32, and with
    # it what two processors differ by in the network's last digits.
    output[:, :3] = a["teacher/model_output"]
    with mock.patch.object(th, "randn_like", return_value=a["step_noise"]):
        step = teacher_of(lambda x, t, y: output, diffusion).step(a["x_t"], a["t"])
    yield Comparison("mean", step.mean, a["teacher/mean"])
    yield Comparison("log variance", step.log_variance, a["teacher/log_variance"])
    yield Comparison("x_{t-1}", step.x_next, a["x_t_minus_1"])


def stage(case, name) -> Iterator[Comparison]:
    """Group G4: the losses and gradients of "stage1" or "stage2"."""
    info, a = LOSSES[case], arrays(f"g4_tccd_{case}.npz")
    _, model, objective = build_student(info)
    out = getattr(objective, name)(model, batch_of(a))
    yield Comparison("loss", out.loss, a[f"{name}/loss"])
    for term in ("mse", "vb"):
        assert (f"{name}/{term}" in a) == (f"{name}_{term}" in out.terms)
        if f"{name}/{term}" in a:
            yield Comparison(term, out.terms[f"{name}_{term}"], a[f"{name}/{term}"])
    out.loss.mean().backward()
    named = parameters_of(model, objective)
    for key, value in a.items():
        if key.startswith(f"{name}/grad:"):
            yield close_to_largest(key, named[key.split(":", 1)[1]].grad, value)
    yield from norms_of_gradients(named, info["grad_l2_norm_of_mean_loss"][f"{name}_only"])


def both_stages(case) -> Iterator[Comparison]:
    """Group G4: the gradients that the two stages add up to."""
    info, a = LOSSES[case], arrays(f"g4_tccd_{case}.npz")
    _, model, objective = build_student(info)
    for out in objective.passes(model, batch_of(a)):
        out.loss.mean().backward()
    norms = info["grad_l2_norm_of_mean_loss"]["stage1_plus_stage2_accumulated"]
    yield from norms_of_gradients(parameters_of(model, objective), norms)


def is_noise(name, measured):
    """Whether Adam turns rounding into full steps here: the gradient is zero in exact arithmetic.

    So it is where two backends of the original disagree, and in the third of every qkv bias that
    belongs to the keys: softmax does not see what is added to all of them.
    """
    return measured > 1e-3 or name.endswith("qkv.bias")


def two_steps(case, folder: Path) -> Iterator[Comparison]:
    """Group G4: two iterations of the whole loop; its files go to a folder."""
    info, a = STEPS[case], arrays(f"g4_trainstep_{case}.npz")
    diffusion, model, objective = build_student(info)
    initial = {name: p.detach().clone() for name, p in parameters_of(model, objective).items()}
    loop = TrainLoop(
        network=model,
        objective=objective,
        source=None,
        process=diffusion,
        training=Training(
            lr=info["lr"],
            weight_decay=info["weight_decay"],
            lr_anneal_steps=info["lr_anneal_steps"],
            ema_rate=info["ema_rates"],
        ),
        run=Run(),
        log=RunLog(folder, active=False),
    )
    for step, expected in enumerate(info["per_step"]):
        rtol = 1e-4 if step == 0 else 1e-3
        batch = batch_of(a, f"step{step}/")
        with th.no_grad():
            for out, stage in zip(objective.passes(model, batch), ["stage1", "stage2"], strict=True):
                key = f"step{step}/{stage}"
                yield Comparison(f"{key}/loss", out.loss, a[f"{key}/loss"], 2e-3, rtol)
                for term in ("mse", "vb"):
                    ours, atol = out.terms[f"{stage}_{term}"], 1e-5 if step == 0 else 1e-4
                    yield Comparison(f"{key}/{term}", ours, a[f"{key}/{term}"], atol, rtol)
        loop.train_step(batch)
        yield Comparison("lr", loop.optimizer.param_groups[0]["lr"], expected["lr_after"], 0, 1e-6)

        noise = info["noise_between_two_cpu_backends"]["param_change_rel"]
        named = parameters_of(model, objective)
        compared = [name for name in expected["param_l2"] if not is_noise(name, noise[name])]
        assert len(compared) > 0.8 * len(named)
        for name in compared:
            now, change = named[name].detach(), named[name].detach() - initial[name]
            yield Comparison(f"step {step}, {name}", now.norm(), expected["param_l2"][name], 0, 1e-3)
            reference = expected["param_change_l2"][name]
            yield Comparison(f"step {step}, change of {name}", change.norm(), reference, 0, 1e-3)
        for rate, changes in expected["ema_change_l2"].items():
            averages = loop.emas[float(rate)].state_dict()
            for name, _ in model.named_parameters():
                if not is_noise(name, noise[name]):
                    change = float((averages[name] - initial[name]).norm())
                    # At rate 0.9999 rounding is most of the change, and one weight of many may be rounded
                    # the other way elsewhere: from one unit in the last place to two.
                    unit = th.finfo(th.float32).eps * float(initial[name].abs().max())
                    atol = max(3 * unit**2, 4e-3 * changes[name] ** 2)
                    what = f"step {step}, EMA {rate}, {name}"
                    yield Comparison(what, change**2, changes[name] ** 2, atol, 0)
    for key, value in a.items():
        if key.startswith("final/param:"):
            ours = parameters_of(model, objective)[key.split(":", 1)[1]]
            yield Comparison(key, ours, value, 2e-4, 0)


def teacher_of_pool(case):
    """The teacher of a case of group G5."""
    info = POOLS[case]
    return teacher_of(*as_the_scripts_build(info["teacher_arch"], info["diffusion"]))


def twelve_iterations(case) -> Iterator[Comparison]:
    """Group G5: twelve batches from a pool, and the pool after them."""
    info, a, teacher = POOLS[case], arrays(POOLS[case]["file"]), teacher_of_pool(case)
    pool = DynamicBatch(a["total_x_t_1"].clone(), a["total_t"].clone(), info["num_timesteps"])
    fresh = iter(a["iter/fresh_noise_concatenated"])
    for k, index in enumerate(a["iter/random_index"]):
        restart = pool.levels[index] == 0
        fresh_rows = a["iter/fresh_rows_per_yield"][k]
        yield Comparison("rows that start anew", int(restart.sum()), float(fresh_rows), 0, 0)
        nothing = th.zeros(3, 32, 32, device=index.device)
        draws = iter([th.stack([next(fresh) if r else nothing for r in restart]), a["iter/step_noise"][k]])
        with mock.patch.object(th, "randn_like", lambda x, draws=draws: next(draws)):
            batch = pool.advance(index, teacher)
        yield Comparison("t", batch.t, a["iter/t"][k], 0, 0)
        if (key := f"iter/yield_{k}") + "/x_t" in a:
            yield Comparison(f"{key}/x_t", batch.x_t, a[f"{key}/x_t"], 1e-4, 0)
            yield Comparison(f"{key}/x_t_minus_1", pool.x[index], a[f"{key}/x_t_minus_1"], 1e-4, 0)
            yield Comparison(f"{key}/eps", batch.eps, a[f"{key}/teacher_model_output"], 1e-4, 0)
        mean_abs = pool.x[index].abs().double().mean()
        reference = a["iter/mean_abs_x_t_minus_1_per_yield"][k]
        yield Comparison(f"mean of |x_(t-1)|, {k}", mean_abs, reference, 1e-4, 0)
        if k + 1 == info["iter_total_after_covers_yields"]:
            yield Comparison("levels afterwards", pool.levels, a["iter/total_t_after"], 0, 0)
            ours = pool.x.abs().double().mean(dim=(1, 2, 3))
            yield Comparison("means afterwards", ours, a["iter/total_x_t_1_mean_abs_after"], 1e-4, 0)
