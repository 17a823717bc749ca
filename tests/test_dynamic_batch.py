"""Invariants of the pool."""

import copy
from dataclasses import replace

import pytest
import torch as th
from tiny import denoiser, network, randomise, teacher_of

from guided_diffusion.config.settings import Distill
from guided_diffusion.distill.dynamic_batch import DistillationBatch, DynamicBatch, pool_size, prepare
from guided_diffusion.distill.pool_file import read_pool, write_pool
from guided_diffusion.distill.source import TeacherSource
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import build_network, create_gaussian_diffusion


@pytest.fixture(scope="module")
def teacher():
    th.manual_seed(0)
    model, diffusion = build_network(denoiser(**network(8, attention_resolutions="4")))
    return teacher_of(randomise(model).eval(), diffusion, (3, 8, 8))


def noise_pool(size, diffusion):
    return DynamicBatch.of_noise(size, (3, 8, 8), diffusion.num_timesteps)


@pytest.mark.parametrize("stride", [1, 3, 50])
def test_preparation_lands_every_entry_on_its_own_level(teacher, stride, monkeypatch):
    diffusion = teacher.process
    goals = th.arange(1, diffusion.num_timesteps).repeat(3)
    monkeypatch.setattr(th, "randint", lambda *args, **kwargs: goals)
    pool = noise_pool(len(goals), diffusion)
    calls = list(prepare(pool, teacher, rows_per_call=10, stride=stride))
    assert th.equal(pool.levels, goals)
    assert sum(calls) == len(goals)
    jumps = -(-(diffusion.num_timesteps - goals) // stride)
    assert len(calls) >= int(jumps.sum()) / 10
    if stride == 50:  # one jump each, so every call but the last is full
        assert calls == [10] * 5 + [7]
    assert pool.x.isfinite().all()
    assert pool.x[goals == 1].std() < pool.x[goals == diffusion.num_timesteps - 1].std() + 0.2


def test_levels_are_drawn_from_1_to_T_minus_1(teacher):
    diffusion = teacher.process
    pool = noise_pool(400, diffusion)
    list(prepare(pool, teacher, rows_per_call=400, stride=20))
    assert set(pool.levels.tolist()) == set(range(1, diffusion.num_timesteps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("options", [{"learn_sigma": True}, {}, {"sigma_small": True}])
def test_a_jump_of_one_step_is_the_reverse_step(schedule, options):
    diffusion = create_gaussian_diffusion(steps=50, noise_schedule=schedule, **options)
    t = th.arange(1, 50)
    x, output = th.randn(49, 3, 4, 4), th.randn(49, 6 if "learn_sigma" in options else 3, 4, 4)
    out = diffusion.p_distribution(output, x, t)
    jump = diffusion.p_distribution(output, x, t, s=t - 1)
    for name in ("mean", "log_variance", "pred_xstart"):
        th.testing.assert_close(jump[name], out[name])


def test_a_longer_jump_is_the_respaced_process():
    whole = create_gaussian_diffusion(steps=100, noise_schedule="cosine", learn_sigma=True)
    spaced = create_gaussian_diffusion(
        steps=100, noise_schedule="cosine", learn_sigma=True, timestep_respacing="10"
    )
    x, output = th.randn(9, 3, 4, 4), th.randn(9, 6, 4, 4)
    kept, step = th.tensor(spaced.timestep_map), th.arange(1, 10)
    out = spaced.p_distribution(output, x, step)
    jump = whole.p_distribution(output, x, kept[step], s=kept[step - 1])
    th.testing.assert_close(jump["mean"], out["mean"])
    th.testing.assert_close(jump["log_variance"], out["log_variance"])


def test_levels_go_down_by_one_and_restart_from_pure_noise(teacher):
    diffusion = teacher.process
    total = diffusion.num_timesteps
    pool = noise_pool(6, diffusion)
    pool.levels = th.tensor([0, 1, 2, total, 0, 5])
    pool.x = th.full_like(pool.x, 7.0)
    batch = pool.advance(th.arange(6), teacher)
    assert batch.t.tolist() == [total - 1, 0, 1, total - 1, total - 1, 4]
    assert th.equal(pool.levels, batch.t)
    for restarted in (0, 4):
        assert batch.x_t[restarted].abs().max() < 6
        assert abs(float(batch.x_t[restarted].std()) - 1) < 0.2
    assert (batch.x_t[1] == 7).all()


def test_no_noise_is_added_at_the_last_step(teacher):
    x = th.randn(2, 3, 8, 8)
    step = teacher.step(x, th.tensor([0, 3]))
    assert th.equal(step.x_next[0], step.mean[0])
    assert not th.equal(step.x_next[1], step.mean[1])


def test_a_hop_to_level_1_is_drawn_and_one_to_the_clean_image_is_not(teacher):
    x, t = th.randn(2, 3, 8, 8), th.tensor([9, 9])
    one, other = (teacher.step(x, t, s=th.tensor([0, -1])).x_next for _ in range(2))
    assert not th.equal(one[0], other[0])
    assert th.equal(one[1], other[1])


def test_every_entry_is_visited_and_levels_stay_in_range(teacher):
    diffusion = teacher.process
    pool = noise_pool(24, diffusion)
    seen, levels = set(), set()
    for _ in range(60):
        index = pool.draw(8)
        assert len(set(index.tolist())) == 8
        seen |= set(index.tolist())
        levels |= set(pool.advance(index, teacher).t.tolist())
        assert pool.levels.min() >= 0 and pool.levels.max() <= diffusion.num_timesteps
    assert seen == set(range(24))
    assert levels == set(range(diffusion.num_timesteps))


def test_the_three_policies_are_one_mechanism(teacher):
    diffusion = teacher.process
    total = diffusion.num_timesteps
    assert pool_size("dynamic_iterative_distillation", 0.4, 1000, 128) == 51200
    assert pool_size("shuffled_iterative_distillation", 0.4, 1000, 128) == 128
    assert pool_size("iterative_distillation", 0.4, 1000, 128) == 128
    pool = noise_pool(5, diffusion)
    walked = [pool.next_batch(5, teacher).t.unique().tolist() for _ in range(total + 1)]
    assert walked == [[t] for t in reversed(range(total))] + [[total - 1]]  # lockstep, then restart


def test_prob_only_advances_the_same_samples(teacher):
    diffusion = teacher.process
    th.manual_seed(0)
    pool = noise_pool(4, diffusion)
    steps = [int(pool.next_batch(4, teacher, prob=0.3).t[0]) for _ in range(5)]
    assert steps != list(reversed(range(diffusion.num_timesteps)))[:5]
    pool = noise_pool(50, diffusion)
    pool.next_batch(2, teacher, prob=0.05)
    assert int((pool.levels < diffusion.num_timesteps).sum()) == 2


def test_a_pool_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="from 0 to 11, outside"):
        DynamicBatch(th.zeros(2, 3, 4, 4), th.tensor([0, 11]), 10)
    with pytest.raises(UserError, match="a pool needs"):
        DynamicBatch(th.zeros(2, 3, 4, 4), th.tensor([0, 1, 2]), 10)


@pytest.mark.parametrize("dtype", [th.float32, th.float16])
def test_a_pool_may_be_kept_elsewhere_and_in_16_bits(teacher, dtype):
    diffusion = teacher.process
    th.manual_seed(0)
    pool = noise_pool(6, diffusion).stored_on("cpu", dtype)
    other = pool.stored_on("cpu", dtype, device="meta")  # batches elsewhere than the pool
    x, level, _ = other.take(th.arange(2))
    assert x.device.type == level.device.type == "meta" and x.dtype == th.float32
    batch = pool.advance(th.arange(4), teacher)
    assert batch.x_t.dtype == batch.eps.dtype == th.float32
    assert pool.x.dtype == dtype
    again, _, _ = pool.take(th.arange(4))
    th.manual_seed(1)
    step = teacher.step(batch.x_t, batch.t)
    assert (again - step.mean).abs().max() < 6  # one step further, within its noise
    assert list(prepare(pool.stored_on("cpu", dtype), teacher, rows_per_call=6, stride=5))


def test_a_pool_whose_header_begins_like_a_pickle_is_read(tmp_path):
    """safetensors puts its header's length first, which may look like the first byte of a pickle."""
    pool = DynamicBatch(th.randn(2, 3, 4, 4), th.tensor([3, 7]), 10)
    first = set()
    for length in range(0, 256, 8):
        write_pool(tmp_path / "pool.cache", [pool], {"T": 10, "name": "x" * length})
        first.add((tmp_path / "pool.cache").read_bytes()[0])
        assert th.equal(read_pool(tmp_path / "pool.cache", 10, (3, 4, 4)).x, pool.x)
    assert 0x80 in first


# --- entries that advance by hops, and entries that follow the student -----------------------------


def test_a_jump_to_the_clean_image_lands_on_the_predicted_x_0(teacher):
    process = teacher.process
    t = th.arange(process.num_timesteps)
    x, output = th.randn(len(t), 3, 4, 4), 30 * th.randn(len(t), 6, 4, 4)
    clean = process.p_distribution(output, x, t, s=th.full_like(t, -1))
    assert clean["log_variance"].isfinite().all()
    th.testing.assert_close(clean["mean"], clean["pred_xstart"])
    th.testing.assert_close(clean["mean"][:1], process.p_distribution(output, x, t)["mean"][:1])


def test_hops_advance_by_the_stride_in_the_mean_and_leave_the_target_alone(teacher):
    total, stride = teacher.process.num_timesteps, 4
    pool = noise_pool(400, teacher.process)
    pool.levels = th.arange(400) % (total + 1)
    before = pool.levels.clone()
    th.manual_seed(3)
    batch = pool.advance(th.arange(400), teacher, stride=stride)
    assert th.equal(batch.t, th.where(before == 0, total, before) - 1)  # level 0 restarts
    hops = batch.t - batch.s
    assert th.equal(pool.levels, batch.s + 1) and th.equal(batch.index, th.arange(400))
    inside = batch.t >= 2 * stride - 1
    assert set(hops[inside].tolist()) == set(range(1, 2 * stride))
    assert abs(float(hops[inside].float().mean()) - stride) < 0.3
    assert (batch.s >= -1).all() and (batch.s == -1).any()
    step = teacher.step(batch.x_t, batch.t)  # the step to t - 1, as ever
    for name in ("eps", "mean", "log_variance"):
        th.testing.assert_close(getattr(batch, name), getattr(step, name))
    clean = batch.s == -1
    x_0 = teacher.process.clipped_xstart(batch.x_t, batch.t, batch.eps)
    th.testing.assert_close(pool.x[clean], x_0[clean])


def test_the_teachers_outputs_serve_so_many_batches_before_they_are_forgotten(teacher, monkeypatch):
    """What is trained on is always the teacher's own answer; the oldest make room."""
    pool = noise_pool(40, teacher.process)
    pool.levels = th.arange(40) % teacher.process.num_timesteps + 1
    calls, evaluate = [], teacher.step
    monkeypatch.setattr(teacher, "step", lambda *args, **more: calls.append(1) or evaluate(*args, **more))
    source = TeacherSource(pool, teacher, 4, Distill(teacher_interval=3, replay_batches=2))
    batches = []
    for step in range(12):
        th.manual_seed(step)
        batches.append(source.next_batch(step))
        assert len(calls) == step // 3 + 1 and len(pool.replay) == min(len(calls), 2) * 4
    monkeypatch.undo()
    for batch in batches:
        assert len(batch) == 4
        step = teacher.step(batch.x_t, batch.t)
        for name in ("eps", "mean", "log_variance"):
            th.testing.assert_close(getattr(batch, name), getattr(step, name))
    assert all(batch.index is None and batch.s is None for batch in batches)  # no entry follows the student
    seen = [{x.numpy().tobytes() for x in batch.x_t} for batch in batches]
    assert seen[0] == seen[1] == seen[2]  # all there is
    assert seen[3] != seen[4] and len(set.union(*seen)) == 16
    assert not set.union(*seen[:3]) & set.union(*seen[6:])


def test_outputs_that_are_kept_lie_in_the_pools_file(teacher, tmp_path):
    pool = noise_pool(8, teacher.process)
    total, path = teacher.process.num_timesteps, tmp_path / "pool.cache"
    for _ in range(2):
        pool.add_to_replay(pool.advance(pool.draw(4), teacher), 8)
    write_pool(path, [pool], {"T": total})
    halves = [read_pool(path, total, (3, 8, 8), rank=rank, world_size=2).replay for rank in (0, 1)]
    back = DistillationBatch.joined(halves)
    for name, value in vars(pool.replay).items():
        assert (value is None) == (getattr(back, name) is None)
        assert value is None or th.equal(value, getattr(back, name))
    with pytest.raises(UserError, match=r"pool\.cache: the teacher's outputs in it do not belong"):
        read_pool(path, int(pool.replay.t.max()), (3, 8, 8), expected={})
    kept = pool.replay
    for wrong in ({"eps": kept.eps[:, :, :4]}, {"x_t": kept.x_t.double()}, {"t": kept.t[:3]}):
        pool.replay = replace(kept, **wrong)
        write_pool(path, [pool], {"T": total})
        with pytest.raises(UserError, match=r"pool\.cache: the teacher's outputs in it do not belong"):
            read_pool(path, total, (3, 8, 8))
    pool.replay = None
    write_pool(path, [pool], {"T": total})
    assert read_pool(path, total, (3, 8, 8)).replay is None


def test_hops_visit_every_level(teacher):
    pool = noise_pool(64, teacher.process)
    seen = {int(t) for _ in range(40) for t in pool.next_batch(32, teacher, stride=5).t}
    assert seen == set(range(teacher.process.num_timesteps))


@pytest.mark.parametrize("dtype", [th.float32, th.float16])
@pytest.mark.parametrize("stride", [1, 6])
def test_an_entry_that_follows_the_student_lies_where_the_students_jump_leads(teacher, stride, dtype):
    process = teacher.process
    pool = noise_pool(40, process).stored_on("cpu", dtype)
    pool.levels = th.arange(40) % process.num_timesteps + 1
    batch = pool.advance(th.arange(40), teacher, stride=stride)
    teachers = pool.x.clone()
    pool.follow(batch, batch.eps, process, 1.0)  # a student that says what the teacher says
    th.testing.assert_close(pool.x, teachers)
    students = th.randn_like(batch.eps)
    pool.follow(batch, students, process, 0.0)
    th.testing.assert_close(pool.x, teachers)

    pool.follow(batch[:20], students[:20], process, 1.0)
    assert th.equal(pool.x[20:], teachers[20:]) and th.equal(pool.levels, batch.s + 1)
    values = th.zeros_like(students)  # any variance: the mean alone differs
    means = [
        process.p_distribution(th.cat([eps, values], 1), batch.x_t, batch.t, s=batch.s)["mean"]
        for eps in (batch.eps, students)
    ]
    moved = (teachers.float() + means[1] - means[0])[:20]
    tolerance = 1e-5 if dtype == th.float32 else 1e-2
    th.testing.assert_close(pool.x[:20].float(), moved, atol=tolerance, rtol=tolerance)
    assert float((moved - teachers[:20]).abs().max()) <= 2.1  # however far off the student is
    pool.x.copy_(teachers)
    pool.follow(batch, students, process, 0.5)
    share = float((pool.x != teachers).flatten(1).any(1).float().mean())
    assert 0.2 < share < 0.8


def test_an_entry_stays_where_the_teacher_led_it_if_the_students_prediction_is_not_finite(teacher):
    pool = noise_pool(40, teacher.process)
    batch = pool.advance(th.arange(40), teacher, stride=6)
    teachers, students = pool.x.clone(), th.randn_like(batch.eps)
    students[3, 0, 1, 2], students[5] = th.nan, th.inf
    pool.follow(batch, students, teacher.process, 1.0)
    stayed = (pool.x == teachers).flatten(1).all(dim=1)
    assert stayed[3] and stayed[5] and not stayed.all() and pool.x.isfinite().all()


def test_a_chain_that_begins_anew_has_a_new_label():
    """Else a pool of one batch would show its first labels alone, whatever the teacher has learned."""
    th.manual_seed(0)
    keys = network(8, attention_resolutions="4", class_cond=True, num_classes=50)
    model, process = build_network(denoiser(**keys))
    teacher = teacher_of(randomise(model).eval(), process, (3, 8, 8))
    pool = DynamicBatch.of_noise(4, (3, 8, 8), process.num_timesteps, 50)
    first, seen = pool.y.clone(), set()
    for _ in range(process.num_timesteps):
        assert th.equal(pool.advance(th.arange(4), teacher).y, first)
    for _ in range(3 * process.num_timesteps):
        batch = pool.advance(th.arange(4), teacher)
        seen |= set(batch.y.tolist())
        assert th.equal(pool.y, batch.y)
    assert 8 < len(seen) <= 16
    pool = DynamicBatch.of_noise(400, (3, 8, 8), process.num_timesteps, 50)
    pool.levels.zero_()
    assert set(pool.advance(th.arange(400), teacher).y.tolist()) == set(range(50))


def test_the_share_that_follows_the_student_grows(teacher):
    """From none at first to what is configured, over the ramp."""
    settings = Distill(on_policy=0.6)
    source = TeacherSource(noise_pool(8, teacher.process), teacher, 4, settings, ramp=6)
    shares = [source.next_batch(step) and source.probability for step in (0, 3, 6, 20)]
    assert shares == pytest.approx([0, 0.3, 0.6, 0.6])


def test_without_bounds_a_student_throws_an_entry_no_farther_than_the_teachers_images_reach(teacher):
    process = copy.copy(teacher.process)
    process.bounds = None  # as in a latent space
    pool = noise_pool(20, process)
    batch = pool.advance(th.arange(20), teacher_of(teacher.network, process, (3, 8, 8)), stride=6)
    teachers = pool.x.clone()
    pool.follow(batch, 1000 * th.randn_like(batch.eps), process, 1.0)
    images = process.clipped_xstart(batch.x_t, batch.t, batch.eps)
    reach = images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True)
    farthest = process.posterior_step(batch.t, batch.s).x_start * reach
    assert not th.equal(pool.x, teachers)
    assert ((pool.x - teachers).abs() <= 1.001 * farthest).all()


def test_where_the_student_leads_an_entry_depends_on_no_other(teacher):
    pool = noise_pool(12, teacher.process)
    batch = pool.advance(th.arange(12), teacher, stride=6)
    teachers, students = pool.x.clone(), 5 * th.randn_like(batch.eps)
    pool.follow(batch, students, teacher.process, 1.0)
    together = pool.x.clone()
    pool.x.copy_(teachers)
    for part in (slice(0, 1), slice(1, 6), slice(6, 12)):
        pool.follow(batch[part], students[part], teacher.process, 1.0)
    assert th.equal(pool.x, together) and not th.equal(pool.x, teachers)
