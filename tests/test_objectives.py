"""Meaning of the losses: the contrastive term, the stages, microbatches, other image sizes."""

import copy
import math

import pytest
import torch as th
from tiny import denoiser, network, randomise, teacher_of

from guided_diffusion.config.settings import Distill, Run, Training
from guided_diffusion.distill.dynamic_batch import DistillationBatch, DynamicBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.logger import RunLog
from guided_diffusion.losses import contrastive_loss
from guided_diffusion.networks.base import Evaluation
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler
from guided_diffusion.script_util import build_network
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.objective import DiffusionTraining, ImageBatch

DKDM = Distill(stage1_weight=0, stage2_weight=0)


def build(settings=None, image_size=16, **options):
    th.manual_seed(0)
    model, diffusion = build_network(denoiser(**network(image_size)))
    objective = Distillation(randomise(model), diffusion, settings or Distill(), **options)
    return model, diffusion, objective


def make_batch(diffusion, size=8, image_size=16):
    pool = DynamicBatch.of_noise(size, (3, image_size, image_size), diffusion.num_timesteps)
    pool.levels = th.arange(size) % diffusion.num_timesteps + 1

    def teacher(x, timesteps, y):
        return th.cat([0.9 * x, x.clamp(-1, 1)], dim=1)

    return pool.advance(th.arange(size), teacher_of(teacher, diffusion))


def gradients(objective, model, batch):
    parameters = [*model.parameters(), *objective.parameters()]
    for out in objective.passes(model, batch):
        out.loss.mean().backward()
    result = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return result


class TestContrastiveLoss:
    def test_aligned_pairs_minimise_it(self):
        e = th.nn.functional.normalize(th.randn(6, 32), dim=-1) * 6
        aligned = contrastive_loss(e, e)
        assert aligned < 0.01
        for _ in range(20):
            assert contrastive_loss(e[th.randperm(6)], e) >= aligned
        assert contrastive_loss(th.zeros(6, 32), e) == pytest.approx(math.log(6))

    def test_temperature_and_normalisation(self):
        z, e = th.randn(5, 16), th.randn(5, 16)
        assert contrastive_loss(z, e, temperature=2.0) == pytest.approx(float(contrastive_loss(z / 2, e)))
        assert contrastive_loss(3 * z, e, normalize=True) == pytest.approx(
            float(contrastive_loss(z, 0.5 * e, normalize=True))
        )

    def test_targets_shared_among_equal_timesteps_would_change_nothing(self):
        """As docs/method.md says; the embedding is a function of the timestep alone."""
        t = th.tensor([0, 1, 2, 2, 0, 2])
        z, table = th.randn(6, 8, requires_grad=True), th.randn(3, 8, requires_grad=True)
        logits, same = z @ table[t].T, (t[:, None] == t).float()
        shared = same / same.sum(1, keepdim=True)
        found = contrastive_loss(z, table[t])
        expected = 0.5 * sum(th.nn.functional.cross_entropy(way, shared) for way in (logits, logits.T))
        th.testing.assert_close(found, expected)
        wanted = th.autograd.grad(expected, (z, table), retain_graph=True)
        th.testing.assert_close(th.autograd.grad(found, (z, table)), wanted)


class TestStages:
    def test_both_off_is_dkdm(self):
        model, diffusion, tccd = build()
        _, _, dkdm = build(DKDM)
        batch = make_batch(diffusion)
        assert dkdm.noise_encoder is None and not list(dkdm.parameters())
        (only,) = dkdm.passes(model, batch)
        first, second = tccd.passes(model, batch)
        th.testing.assert_close(only.loss, first.terms["stage1_mse"] + first.terms["stage1_vb"])
        th.testing.assert_close(first.loss, only.loss + first.terms["stage1_align"])
        assert set(second.terms) == {"stage2_mse", "stage2_vb"}

    def test_weights_scale_their_stage(self):
        model, diffusion, whole = build()
        batch = make_batch(diffusion)
        light = Distillation(model, diffusion, Distill(stage1_weight=0.25, stage2_weight=0.5))
        light.load_state_dict(whole.state_dict())
        for heavy, less, weight, term in zip(
            whole.passes(model, batch), light.passes(model, batch), [0.25, 0.5], ["align", None], strict=True
        ):
            if term:
                align = heavy.terms["stage1_align"]
                th.testing.assert_close(heavy.loss - align, less.loss - weight * align)
            else:
                th.testing.assert_close(weight * heavy.loss, less.loss)

    def test_the_figures_stage_2_adds_the_alignment(self):
        model, diffusion, published = build()
        figure = Distillation(model, diffusion, Distill(stage2_align=True))
        figure.load_state_dict(published.state_dict())
        batch = make_batch(diffusion)
        ours, theirs = figure.stage2(model, batch), published.stage2(model, batch)
        th.testing.assert_close(ours.loss, theirs.loss + ours.terms["stage2_align"])

    def test_the_role_vector_marks_stage_2_alone(self):
        settings = Distill(role_vector=True)
        model, diffusion, objective = build(settings)
        batch = make_batch(diffusion)
        before = [objective.stage1(model, batch).loss, objective.stage2(model, batch).loss]
        with th.no_grad():
            objective.role.add_(1.0)
        after = [objective.stage1(model, batch).loss, objective.stage2(model, batch).loss]
        assert th.equal(before[0], after[0])
        assert not th.allclose(before[1], after[1])
        assert not any("role" in name for name in model.state_dict())
        gradients(objective, model, batch)

    def test_the_kl_trains_only_the_variance(self):
        model, diffusion, objective = build(DKDM)
        batch = make_batch(diffusion)
        output = model(batch.x_t, batch.t).detach().requires_grad_()
        objective.distillation_terms(output, batch, x_in=batch.x_t, x_t=batch.x_t)["vb"].sum().backward()
        assert output.grad[:, :3].abs().max() == 0
        assert output.grad[:, 3:].abs().max() > 0

    def test_a_perfect_student_has_no_loss(self):
        _, diffusion, objective = build(DKDM)
        x = th.randn(4, 3, 16, 16).clamp(-1, 1)
        t = th.tensor([0, 5, 10, 15])
        output = th.cat([x * diffusion.at("sqrt_one_minus_alphas_cumprod", t), th.rand_like(x)], dim=1)
        out = diffusion.p_distribution(output, x, t, clip_denoised=False)
        batch = DistillationBatch(x, t, output[:, :3], out["mean"], out["log_variance"])
        terms = objective.distillation_terms(output, batch, x_in=x, x_t=x)
        assert terms["mse"].abs().max() == 0
        assert terms["vb"].abs().max() < 1e-6

    @pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
    def test_in_stage_2_too_the_mean_is_that_of_the_noise_that_the_student_predicts(self, kind):
        """Whatever it predicts: applied to eps_T, x_0 or v stand for another noise than they would at x_t."""
        _, teachers = build_network(denoiser(**network()))
        th.manual_seed(0)
        model, diffusion = build_network(denoiser(**network(), prediction_type=kind))
        objective = Distillation(model, diffusion, Distill(stage1_weight=0))
        x, eps, values = th.rand(3, 4, 3, 16, 16) * 2 - 1
        t = th.tensor([0, 5, 10, 19])
        out = teachers.p_distribution(th.cat([eps, values], dim=1), x, t, clip_denoised=False)
        batch = DistillationBatch(x, t, eps, out["mean"], out["log_variance"])
        start = diffusion.predict_xstart_from_eps(eps, t, eps)  # of a student that says eps at (eps, t)
        scale = [diffusion.at(f"sqrt_{name}alphas_cumprod", t) for name in ("", "one_minus_")]
        said = {"epsilon": eps, "sample": start, "v_prediction": scale[0] * eps - scale[1] * start}[kind]
        terms = objective.distillation_terms(th.cat([said, values], dim=1), batch, x_in=eps, x_t=x)
        assert terms["mse"].max() < 1e-6 and terms["vb"].max() < 1e-4

    def test_clip_last_tames_the_first_step(self):
        model, diffusion, wild = build(DKDM)
        _, _, tame = build(DKDM, clip_last=True)
        batch = make_batch(diffusion, size=diffusion.num_timesteps)
        wild_vb = wild.stage1(model, batch).terms["stage1_vb"]
        tame_vb = tame.stage1(model, batch).terms["stage1_vb"]
        assert wild_vb[-1] > 100 * tame_vb[-1]
        assert th.equal(wild_vb[:-1], tame_vb[:-1])

    def test_input_perturbation(self, monkeypatch):
        """The network and the KL see the perturbed x_t; in stage 2 the KL alone, by new noise."""
        gamma = 0.5
        model, diffusion, objective = build(Distill(stage1_weight=0), input_perturb=gamma)
        batch = make_batch(diffusion)
        noises = [th.randn(batch.x_t.shape, generator=th.Generator().manual_seed(i)) for i in range(2)]
        drawn = iter(noises)
        monkeypatch.setattr(th, "randn_like", lambda x: next(drawn))
        losses = list(objective.passes(model, batch))
        assert next(drawn, None) is None

        scale = gamma * diffusion.at("sqrt_one_minus_alphas_cumprod", batch.t)
        seen = [batch.x_t + scale * noise for noise in noises]
        for x_in, x_t, loss in zip([seen[0], batch.eps], seen, losses, strict=True):
            eps, values = model(x_in, batch.t).chunk(2, dim=1)
            mse = ((eps - batch.eps) ** 2).mean(dim=(1, 2, 3))
            coefficient = diffusion.at("posterior_mean_coef1", batch.t)
            x_0 = diffusion.predict_xstart_from_eps(x_t, batch.t, eps)
            mean = coefficient * x_0 + diffusion.at("posterior_mean_coef2", batch.t) * x_t
            log_variance = diffusion.p_distribution(th.cat([eps, values], 1), x_t, batch.t)["log_variance"]
            kl = th.distributions.kl_divergence(
                th.distributions.Normal(batch.mean, (0.5 * batch.log_variance).exp()),
                th.distributions.Normal(mean, (0.5 * log_variance).exp()),
            ).mean(dim=(1, 2, 3)) / math.log(2)
            th.testing.assert_close(loss.loss, mse + kl, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ["v", "min_snr"])
    def test_loss_weights_are_1_in_the_mean_and_weight_every_squared_error(self, kind):
        model, diffusion, plain = build(Distill(stage1_weight=0))
        _, _, capped = build(Distill(stage1_weight=0, loss_weight=kind, loss_weight_cap=1e12))
        _, _, weighted = build(Distill(stage1_weight=0, loss_weight=kind))
        assert (plain.loss_weight == 1).all()
        assert not any("loss_weight" in name for name in weighted.state_dict())
        assert float(weighted.loss_weight.mean()) == pytest.approx(1)
        batch = make_batch(diffusion, size=diffusion.num_timesteps)
        for stage in ("stage1", "stage2"):
            ours, theirs = (getattr(objective, stage)(model, batch) for objective in (weighted, plain))
            difference = (
                ours.terms[f"{stage}_mse"] - weighted.loss_weight[batch.t] * theirs.terms[f"{stage}_mse"]
            )
            assert difference.abs().max() < 1e-6 * theirs.terms[f"{stage}_mse"].max()
            assert th.equal(ours.terms[f"{stage}_vb"], theirs.terms[f"{stage}_vb"])
        bars = th.from_numpy(diffusion.alphas_cumprod)
        snr = bars / (1 - bars)
        ratio = weighted.loss_weight / weighted.loss_weight[0]
        expected = (1 / bars).clamp(max=5) if kind == "v" else (5 / snr).clamp(max=1)
        th.testing.assert_close(ratio, (expected / expected[0]).float(), rtol=1e-5, atol=0)
        if kind == "v":  # without a cap it is the squared error of v = sqrt(abar) eps - sqrt(1 - abar) x_0
            x, t = batch.x_t, batch.t
            ours, target = th.randn_like(x), batch.eps
            signal, noise = (
                diffusion.at("sqrt_alphas_cumprod", t),
                diffusion.at("sqrt_one_minus_alphas_cumprod", t),
            )
            v = [
                signal * eps - noise * diffusion.predict_xstart_from_eps(x, t, eps) for eps in (ours, target)
            ]
            error = ((v[0] - v[1]) ** 2).mean(dim=(1, 2, 3))
            rates = capped.squared_error(ours, target, t) / error
            th.testing.assert_close(rates, rates[:1].expand_as(rates), rtol=1e-3, atol=0)

    def test_stage_2_between_is_a_state_whose_noise_is_the_target(self):
        model, diffusion, objective = build(Distill(stage1_weight=0, stage2_time="between"))
        batch = make_batch(diffusion, size=200)
        s, x_s = objective.between(batch)
        assert (s >= batch.t).all() and (s < diffusion.num_timesteps).all()
        early = batch.t == 0
        assert len(set(s[early].tolist())) > 5 and (s == diffusion.num_timesteps - 1).any()
        x_0 = diffusion.predict_xstart_from_eps(x_s, s, batch.eps)
        expected = diffusion.clipped_xstart(batch.x_t, batch.t, batch.eps)
        far = s < diffusion.num_timesteps - 2  # where x_s still shows x_0
        th.testing.assert_close(x_0[far], expected[far], atol=1e-3, rtol=1e-3)
        (_, out) = objective.passes(model, batch)
        assert set(out.terms) == {"stage2_mse"} and (out.t >= batch.t).all()

        class Perfect:
            def evaluate(self, x, timesteps, y, emb_shift=None):
                return Evaluation(th.cat([batch.eps, th.zeros_like(batch.eps)], 1), None, None)

        assert objective.stage2(Perfect(), batch).loss.abs().max() == 0

    def test_stage_2_may_see_a_share_of_the_batch(self, tmp_path):
        """In one pass with stage 1, with the losses and gradients of two."""
        model, diffusion, objective = build(Distill(stage2_fraction=0.3, role_vector=True))
        batch = make_batch(diffusion)
        (both,) = objective.passes(model, batch)
        first, second = both.parts
        assert len(first.loss) == 8 and len(second.loss) == len(second.t) == 3
        apart = objective.stage1(model, batch), objective.stage2(model, batch[:3])
        parameters = [*model.parameters(), *objective.parameters()]
        joint = th.autograd.grad(both.loss.mean(), parameters, allow_unused=True)
        single = th.autograd.grad(sum(one.loss.mean() for one in apart), parameters, allow_unused=True)
        for one, other in zip(both.parts, apart, strict=True):
            assert one.terms.keys() == other.terms.keys()
            th.testing.assert_close(one.loss, other.loss)
        for one, other in zip(joint, single, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                th.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        loop = loop_for(model, diffusion, objective, tmp_path)
        loop.train_step(batch)
        assert {"stage1_mse", "stage2_mse", "stage1_align", "stage2_vb_q0"} <= loop.metrics.sums.keys()

    def test_a_pass_of_both_stages_gives_each_sample_its_label(self):
        th.manual_seed(0)
        keys = network(8, attention_resolutions="4", class_cond=True, num_classes=8)
        model, diffusion = build_network(denoiser(**keys))
        pool = DynamicBatch.of_noise(8, (3, 8, 8), diffusion.num_timesteps, 8)
        pool.y = th.arange(8)
        batch = pool.advance(th.arange(8), teacher_of(randomise(model), diffusion, (3, 8, 8)))
        objective = Distillation(model, diffusion, Distill(stage1_weight=0, stage2_fraction=0.5))
        (both,) = objective.passes(model, batch)
        apart = objective.stage1(model, batch), objective.stage2(model, batch[:4])
        for one, other in zip(both.parts, apart, strict=True):
            th.testing.assert_close(one.loss, other.loss)

    @pytest.mark.parametrize(
        "fraction, count, seen", [(0.07, 100, 7), (0.28, 25, 7), (0.3, 8, 3), (1e-9, 8, 1)]
    )
    def test_a_share_is_rounded_up(self, fraction, count, seen):
        """Whatever floating point makes of it: 0.07 * 100 is 7.000000000000001."""
        objective = build(Distill(stage2_fraction=fraction))[2]
        batch = DistillationBatch(*[th.zeros(count)] * 5)
        shares = []
        objective.together = lambda student, batch, count, weight: shares.append(count)
        assert list(objective.passes(None, batch)) == [None] and shares == [seen]

    def test_the_alignment_may_see_a_share_of_the_batch(self):
        model, diffusion, objective = build(Distill(stage1_fraction=0.5, stage2_weight=0))
        batch = make_batch(diffusion)
        (part,) = objective.passes(model, batch)
        objective.settings.stage1_fraction = 1.0
        (alone,) = objective.passes(model, batch[:4])
        (whole,) = objective.passes(model, batch)
        assert len(part.loss) == 8 and len(alone.loss) == 4
        th.testing.assert_close(part.terms["stage1_align"][:4], alone.terms["stage1_align"])
        assert not th.isclose(part.terms["stage1_align"][0], whole.terms["stage1_align"][0])

    @pytest.mark.parametrize("options", [{"temperature": 0.5}, {"temperature": 0.02, "normalize": True}])
    def test_the_alignment_is_the_configured_one(self, options):
        model, diffusion, objective = build(Distill(stage2_weight=0, **options))
        batch = make_batch(diffusion)
        (found,) = objective.passes(model, batch)
        out = model.evaluate(batch.x_t, batch.t, None)
        z = objective.noise_encoder(out.features)
        expected = contrastive_loss(z, out.emb, **options)
        th.testing.assert_close(found.terms["stage1_align"], expected.expand(8))
        assert not th.isclose(expected, contrastive_loss(z, out.emb, temperature=0.02))

    def test_the_source_is_told_what_the_student_says_of_x_t(self):
        model, diffusion, objective = build(Distill(stage1_weight=0))
        batch, told = make_batch(diffusion), []
        objective.follow = lambda *heard: told.append(heard)
        list(objective.passes(model, batch))
        ((where, eps),) = told
        assert where is batch and not eps.requires_grad
        with th.no_grad():
            th.testing.assert_close(eps, model(batch.x_t, batch.t)[:, :3])


def loop_for(model, diffusion, objective, tmp_path, **training):
    return TrainLoop(
        network=model,
        objective=objective,
        source=None,
        process=diffusion,
        training=Training(ema_rate="0.9", **training),
        run=Run(),
        log=RunLog(tmp_path, active=False),
    )


@pytest.mark.parametrize("microbatch", [1, 3, 4])
@pytest.mark.parametrize(
    "settings",
    [
        DKDM,
        Distill(stage1_weight=0, role_vector=True),
        Distill(stage1_weight=0, role_vector=True, stage2_fraction=0.25),
        Distill(stage1_weight=0, stage2_fraction=0.6),
    ],
)
def test_microbatches_give_the_same_gradient(settings, microbatch, tmp_path):
    model, diffusion, objective = build(settings)
    batch = make_batch(diffusion)
    results = []
    for size in (-1, microbatch):
        m, o = copy.deepcopy(model), copy.deepcopy(objective)
        loop_for(m, diffusion, o, tmp_path, microbatch=size).train_step(batch)
        results.append([p.grad for p in [*m.parameters(), *o.parameters()]])
    largest = max(float(gradient.abs().max()) for gradient in results[0])
    for whole, pieces in zip(*results, strict=True):
        th.testing.assert_close(whole, pieces, atol=1e-6 * largest, rtol=1e-4)


def test_the_contrastive_term_sees_only_its_microbatch(tmp_path):
    model, diffusion, objective = build()
    batch = make_batch(diffusion)
    pieces = [objective.stage1(model, piece).terms["stage1_align"].mean() for piece in batch.split(4)]
    whole = objective.stage1(model, batch).terms["stage1_align"].mean()
    assert sum(pieces) / 2 < whole  # fewer negatives


@pytest.mark.parametrize("image_size", [16, 64])
def test_tccd_trains_at_other_image_sizes(image_size, tmp_path):
    model, diffusion, objective = build(image_size=image_size)
    before = copy.deepcopy(model.state_dict())
    loop = loop_for(model, diffusion, objective, tmp_path, lr=1e-3)
    loop.train_step(make_batch(diffusion, 4, image_size))
    assert all(p.grad.isfinite().all() for p in loop.parameters)
    assert any(not th.equal(before[k], v) for k, v in model.state_dict().items())
    assert objective.noise_encoder.pos_embedding.shape[1] == 17


def test_second_moment_sampling_follows_the_losses():
    sampler = LossSecondMomentResampler(4, history=3)
    t = th.arange(4)
    assert th.equal(sampler.probabilities(), UniformSampler(4).probabilities())
    for _ in range(3):
        sampler.update_with_losses(t, th.tensor([1.0, 1.0, 1.0, 7.0]))
    expected = 0.999 * th.tensor([0.1, 0.1, 0.1, 0.7], dtype=th.float64) + 0.001 / 4
    th.testing.assert_close(sampler.probabilities(), expected)
    drawn, weights = sampler.sample(20000, "cpu")
    values = th.tensor([1.0, 2.0, 3.0, 4.0])
    assert float((values[drawn] * weights).mean()) == pytest.approx(2.5, rel=0.05)  # unbiased


def test_second_moment_sampling_forgets_what_is_not_finite():
    sampler = LossSecondMomentResampler(2, history=1)
    sampler.update_with_losses(th.tensor([0, 1, 0, 1]), th.tensor([1.0, 3.0, th.nan, th.inf]))
    th.testing.assert_close(sampler.probabilities()[1], th.tensor(0.75, dtype=th.float64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", [UniformSampler, LossSecondMomentResampler])
def test_plain_training_learns(sampler, tmp_path):
    th.manual_seed(0)
    model, diffusion = build_network(denoiser(**network(8, attention_resolutions="4")))
    loop = loop_for(model, diffusion, DiffusionTraining(diffusion, sampler(20)), tmp_path, lr=2e-3)
    losses = []
    for _ in range(40):
        images = th.full((16, 3, 8, 8), 0.5)
        loop.train_step(ImageBatch(images))
        terms = loop.metrics.read()
        losses.append(terms["mse"])
        # Terms are weighted as their sum is, so that they keep their meaning whatever t is drawn.
        assert terms["mse"] + terms.get("vb", 0) == pytest.approx(terms["loss"], rel=1e-5)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
@pytest.mark.parametrize("stage2_time", ["same", "between"])
def test_a_schedule_that_ends_in_noise_alone(predicts, stage2_time):
    """From whose last step a prediction of eps leads to no x_0: both stages and the pool do without it."""
    th.manual_seed(0)
    keys = network(8, 16, attention_resolutions="4", noise_schedule="linear", prediction_type=predicts)
    model, process = build_network(denoiser(**keys))
    assert process.alphas_cumprod[-1] == 0
    teacher, T = teacher_of(randomise(model), process, (3, 8, 8)), process.num_timesteps
    pool = DynamicBatch.of_noise(6, (3, 8, 8), T)
    pool.levels = th.tensor([T, T, T, T, T - 1, 3])
    batch = pool.advance(th.arange(6), teacher)
    objective = Distillation(model, process, Distill(stage1_weight=0, stage2_time=stage2_time))
    one, two = objective.passes(model, batch)
    assert one.loss.isfinite().all() and two.loss.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in gradients(objective, model, batch))
    before = pool.x.clone()
    pool.follow(batch, process.eps_of(model(batch.x_t, batch.t).detach(), batch.x_t, batch.t) + 1, process, 1)
    moved = (pool.x - before).flatten(1).abs().amax(1) > 0
    assert pool.x.isfinite().all() and moved.tolist() == [False] * 4 + [True] * 2
