"""Studies: what a result is known by, what is counted and measured, and that nothing is done twice."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch as th
from scipy import stats
from test_foreign import STUDENTS, DDPMScheduler, distillation_config, save, unet
from test_study_file import study
from tiny import ROOT

from guided_diffusion import dist_util
from guided_diffusion.config.loading import load_distillation, load_experiment
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.errors import UserError
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.script_util import build_network, build_process
from guided_diffusion.studies import runner as runner_module
from guided_diffusion.studies.cell_run import CellRun, Prepared, Shared
from guided_diffusion.studies.cells import cells_of, changed_keys
from guided_diffusion.studies.commands import CommandFailed, Commands, Steps
from guided_diffusion.studies.comparison import Comparison, by_quarter, held_out_states
from guided_diffusion.studies.ledger import ledger_of
from guided_diffusion.studies.report import write_report
from guided_diffusion.studies.results import Results
from guided_diffusion.studies.runner import Runner
from guided_diffusion.studies.statistics import holm, paired_difference, sign_flip_p
from guided_diffusion.studies.study_file import Data, load_study
from guided_diffusion.training.muon import matrices


def ids(path):
    return {cell.name: cell.id for cell in cells_of(load_study(path))}


class TestIdentity:
    def test_each_cell_has_one_of_its_own(self, tmp_path):
        found = ids(study(tmp_path, budgets={"short": {"iterations": 4}, "long": {"iterations": 8}}))
        assert [*found] == [f"{run}/short/{seed}" for seed in range(3) for run in ("plain", "fast")]
        assert len(set(found.values())) == 6

    def test_a_budget_may_have_fewer_seeds(self, tmp_path):
        budgets = {"short": {"iterations": 4}, "long": {"iterations": 8, "seeds": 1}}
        plain = {"budgets": ["short", "long"], "seeds": 3}
        runs = {"plain": plain, "fast": {"budgets": ["long"], "seeds": [5]}}
        found = [*ids(study(tmp_path, budgets=budgets, runs=runs))]
        assert found == ["plain/short/0", "plain/long/0", "plain/short/1", "plain/short/2", "fast/long/5"]

    def test_names_and_places_are_no_part_of_it(self, tmp_path):
        before = ids(study(tmp_path))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        runs = {"base": {"overrides": ["student.log_interval=7"], "about": "x", "group": "y", "seeds": 1}}
        other = {"budgets": {"other": {"iterations": 4}}, "metrics": {"respacing": 5, "to_teacher": True}}
        after = ids(study(elsewhere, runs=runs, baseline="base", **other))
        assert after["base/other/0"] == before["plain/short/0"]

    @pytest.mark.parametrize(
        "more",
        [
            {"metrics": {"samples": 7}},
            {"budgets": {"short": {"iterations": 5}}},
            {"score_at": [0.5]},
            {"overrides": ["run.warmup_steps=3"]},
            {"runs": {"plain": {"data": {"real": 1}}}},
            {"runs": {"plain": {"teacher": True}}},
        ],
    )
    def test_what_is_run_and_measured_is_part_of_it(self, tmp_path, more):
        before = ids(study(tmp_path))["plain/short/0"]
        assert ids(study(tmp_path, **more))["plain/short/0"] != before

    def test_another_teacher_is_part_of_it(self, tmp_path):
        path = study(tmp_path)
        before = ids(path)["plain/short/0"]
        weights = th.load(tmp_path / "teacher.pt")
        th.save({name: value * 2 for name, value in weights.items()}, tmp_path / "teacher.pt")
        assert ids(path)["plain/short/0"] != before

    def test_a_vae_is_part_of_it_and_not_where_it_lies(self, tmp_path):
        found = {}
        for name, seed in (("here", 0), ("there", 0), ("another", 1)):
            tiny.make_vae(tmp_path / name, channels=4, seed=seed)
            path = study(tmp_path, overrides=[f"teacher.vae_path={tmp_path / name}"])
            found[name] = ids(path)["plain/short/0"]
        assert found["here"] == found["there"] != found["another"]

    def test_keys_at_their_defaults_are_no_part_of_it(self, tmp_path):
        """So that results stay known when a later version has further keys."""
        found = changed_keys(load_distillation(tiny.distillation(tmp_path)))
        assert "grad_clip" not in found["run"] and "temperature" not in found["distill"]
        assert found["student"]["lr"] == 1e-3


def any_record(name, **more):
    least = {"digest": "d", "run": "a", "budget": "quick", "seed": 0, "spent": {}, "revision": None}
    least |= {
        "iterations": 4,
        "seconds": {"preparation": 1, "train": 2},
        "flops": {"preparation": 3, "total": 4},
    }
    least["machine"] = dict.fromkeys(("cpu", "gpu", "cores", "threads", "jobs", "torch"))
    least["scores"] = [{"fd": 1.5, "primary": 1.5}]
    return {"id": name} | least | more


class TestResults:
    def test_a_line_that_was_cut_short_harms_no_other(self, tmp_path, capsys):
        path = tmp_path / "results.jsonl"
        results = Results(path)
        results.append(any_record("a", value=float("nan")))
        path.write_text(path.read_text() + '{"id": "b", "val')
        results.append(any_record("c", value=1 / 3))
        assert results.read() == {"a": any_record("a", value=None), "c": any_record("c", value=0.3333333)}
        assert "no record" in capsys.readouterr().err

    def test_foreign_lines_are_left_out(self, tmp_path, capsys):
        wrong = [{"scores": found} for found in (None, [], [1], [{}], [{"fd": 1, "primary": "x"}])]
        wrong += [{"machine": {}}, {"seconds": {}}, {"flops": {"preparation": 1, "total": None}}]
        lines = ['{"id": "x"}', "[1]", *(json.dumps(any_record("a", **more)) for more in wrong)]
        lines += [json.dumps(any_record("c")).replace('"primary": 1.5', f'"primary": 1{"0" * 400}')]
        lines += [json.dumps(any_record("b"))]
        (tmp_path / "results.jsonl").write_text("\n".join(lines))
        assert Results(tmp_path / "results.jsonl").read().keys() == {"b"}
        assert "results.jsonl:1: no record; left out" in capsys.readouterr().err

    def test_others_results_are_read_and_left_alone(self, tmp_path):
        line = json.dumps(any_record("a"))
        (tmp_path / "others.jsonl").write_text(line)
        results = Results(tmp_path / "own.jsonl", [tmp_path / "others.jsonl"])
        results.append(any_record("b"))
        assert results.read().keys() == {"a", "b"}
        assert (tmp_path / "others.jsonl").read_text() == line

    def test_many_threads_add_whole_lines(self, tmp_path):
        results = Results(tmp_path / "results.jsonl")
        threads = [
            threading.Thread(target=results.append, args=(any_record(str(n), text="x" * 5000),))
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results.read()) == 16


class TestStatistics:
    def test_the_exact_p_is_scipys(self):
        generator = np.random.default_rng(0)
        for n in (1, 2, 5, 8):
            found = generator.normal(0.5, 1, n)
            expected = stats.permutation_test(
                (found,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
            ).pvalue if n > 1 else 1.0  # fmt: skip
            assert sign_flip_p(list(found)) == pytest.approx(expected)

    def test_the_least_possible_p(self):
        assert sign_flip_p([-1.0, -2.0, -3.0]) == 0.25
        assert sign_flip_p([1.0] * 6) == 2 / 64
        assert sign_flip_p([0.0, 0.0]) == 1.0

    def test_the_interval_is_students(self):
        values = [0.3, -0.2, 0.9, 0.4]
        found = paired_difference(values)
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert found.mean == pytest.approx(0.35) and found.n == 4

    def test_one_pair_says_nothing_of_its_spread(self):
        found = paired_difference([2.0])
        assert (found.mean, found.low, found.high, found.p) == (2.0, -np.inf, np.inf, 1.0)

    def test_holms_correction(self):
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]) == [1.0, 1.0]
        assert holm([]) == []


class TestLedger:
    def test_what_each_option_costs(self, tmp_path):
        config = tiny.distillation(tmp_path, image_size=8)
        off = ["distill.stage1_weight=0", "distill.stage2_weight=0"]
        plain = ledger_of(load_distillation(config, off), None, 0)
        stage1 = ledger_of(load_distillation(config, off[1:]), None, 0)
        stage2 = ledger_of(load_distillation(config, off[:1]), None, 0)
        assert plain.head == 0 and stage1.head > 0
        assert stage1.student == plain.student
        assert stage2.student == 2 * plain.student
        # The student is the teacher's size: forward is one evaluation, backward about two.
        assert 2.5 < plain.student / plain.teacher <= 3
        total = plain.of(10)
        assert total["total"] == total["preparation"] + 10 * plain.iteration
        half = ledger_of(load_distillation(config, [*off, "teacher.prob=0.5"]), None, 0)
        seldom = ledger_of(load_distillation(config, [*off, "distill.teacher_interval=4"]), None, 0)
        assert (seldom.teacher, seldom.student) == (plain.teacher / 4, plain.student)
        assert half.teacher == 2 * plain.teacher

    def test_a_small_share_of_a_large_batch_is_counted_as_it_is(self, tmp_path):
        """Of 64 rows stage 2 takes 0.03 on two: an iteration's passes are 66 rows', not 68."""
        config = tiny.distillation(tmp_path, 8, student__batch_size=64)
        off = ["distill.stage1_weight=0"]
        plain = ledger_of(load_distillation(config, [*off, "distill.stage2_weight=0"]), None, 0)
        small = ledger_of(load_distillation(config, [*off, "distill.stage2_fraction=0.03"]), None, 0)
        assert small.student == pytest.approx(66 / 64 * plain.student, rel=1e-6)

    def test_a_guided_teacher_is_evaluated_twice(self, tmp_path):
        config = tiny.distillation(tmp_path, 8, class_cond=True, num_classes=3, teacher__null_class=True)
        plain, guided = (
            ledger_of(load_distillation(config, [f"teacher.guidance_scale={scale}"]), None, 0)
            for scale in (0, 2)
        )
        assert (guided.teacher, guided.preparation) == (2 * plain.teacher, 2 * plain.preparation)
        assert guided.student == plain.student

    def test_muons_products_are_paid_for(self, tmp_path):
        """Five iterations of x x^T, its square, and their product with x, for each matrix [m, n], m <= n."""
        config = tiny.distillation(tmp_path, image_size=8)
        experiment = load_distillation(config, ["run.optimizer=muon"])
        shapes = [sorted((len(p), p[0].numel())) for p in matrices(build_network(experiment.student)[0])]
        expected = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)
        assert ledger_of(experiment, None, 0).optimizer == expected
        assert ledger_of(load_distillation(config), None, 0).optimizer == 0

    def test_the_preparation_is_what_it_does(self, tmp_path):
        """8 batches of 4, each sample on average half the chain of 20 steps: 10 evaluations."""
        config = tiny.distillation(tmp_path, image_size=8)
        one = ledger_of(load_distillation(config), None, 0)
        assert one.preparation == pytest.approx(8 * 4 * 10 * one.teacher / 4)
        strided = ledger_of(load_distillation(config, ["distill.stride=19"]), None, 0)
        assert strided.preparation == pytest.approx(one.preparation / 10)

    def test_images_that_the_teacher_makes_are_paid_for(self, tmp_path):
        experiment = load_distillation(tiny.distillation(tmp_path, image_size=8))
        found = ledger_of(experiment, Data(real=0.25, respacing="5"), 100)
        evaluation = ledger_of(experiment, None, 0).teacher / 4
        assert found.preparation == pytest.approx(75 * 5 * evaluation)
        assert (
            found.teacher == 0 and ledger_of(experiment, Data(real=1.0, respacing="5"), 100).preparation == 0
        )


class TestComparison:
    def test_a_student_that_is_the_teacher_has_no_error(self, tmp_path):
        experiment = load_distillation(tiny.distillation(tmp_path, image_size=8))
        weights = tmp_path / "teacher.pt"
        states = held_out_states(experiment, weights, 9, tmp_path / "states.safetensors", lambda: None)
        same = Comparison(experiment, weights, weights)
        assert same.held_out(states)["all"] == pytest.approx(0, abs=1e-10)
        chain = same.own_chain(3, "5", lambda: None)
        assert chain["eps"]["all"] == pytest.approx(0, abs=1e-10)
        assert chain["path_kl"] == pytest.approx(0, abs=1e-4)

    def test_another_student_has_one_and_states_are_drawn_once(self, tmp_path):
        experiment = load_distillation(tiny.distillation(tmp_path, image_size=8))
        weights, other, cache = tmp_path / "teacher.pt", tmp_path / "student.pt", tmp_path / "states.st"
        network, _ = build_network(experiment.student)
        th.save(tiny.randomise(network).state_dict(), other)
        states = held_out_states(experiment, weights, 9, cache, lambda: None)
        th.manual_seed(5)
        again = held_out_states(experiment, weights, 9, cache, lambda: None)
        assert th.equal(states.x, again.x)
        found = Comparison(experiment, weights, other)
        with th.no_grad():
            eps = network.eval()(states.x, states.t)[:, :3]
        expected = float((eps - states.eps).square().mean())
        assert found.held_out(states)["all"] == pytest.approx(expected, rel=1e-4)
        chain = found.own_chain(3, "5", lambda: None)
        assert chain["path_kl"] > 0 and len(chain["step_kl"]) == 5
        assert sum(chain["step_kl"]) == pytest.approx(chain["path_kl"]) and min(chain["step_kl"]) > 0
        assert found.own_chain(3, "5", lambda: None) == found.own_chain(3, "5", lambda: None)

    def test_the_divergence_is_that_of_the_students_step_from_the_teachers(self, tmp_path):
        """Of two that differ in the variance alone: in this direction, and along the student's own chain."""
        experiment = load_distillation(tiny.distillation(tmp_path, image_size=8))
        found = Comparison(experiment, tmp_path / "teacher.pt", tmp_path / "teacher.pt")
        process, seen = build_process(experiment.student, "", "5"), {"student": [], "teacher": []}

        def replace_by(network, name, value):
            def forward(x, timesteps, y):
                seen[name].append(x)
                return th.cat([th.zeros_like(x), th.full_like(x, value)], dim=1)

            network.forward = forward

        def step(value, x, t):
            output = th.cat([th.zeros_like(x), th.full_like(x, value)], dim=1)
            return process.p_distribution(output, x, th.full((len(x),), t))

        replace_by(found.student, "student", 1.0)
        replace_by(found.teacher.network, "teacher", -1.0)
        divergences = found.own_chain(3, "5", lambda: None)["step_kl"]
        for t, divergence in enumerate(divergences):
            x = th.zeros(1, 3, 8, 8, dtype=th.float64)
            ours, theirs = (step(value, x, t)["log_variance"] for value in (1.0, -1.0))
            expected = 0.5 * (theirs - ours + (ours - theirs).exp() - 1).sum()
            assert divergence == pytest.approx(float(expected), rel=1e-3)
        assert all(map(th.equal, seen["student"], seen["teacher"]))
        first, second = seen["student"][:2]
        drawn = step(1.0, first, 4)
        spread = float((second - drawn["mean"]).std() / (0.5 * drawn["log_variance"]).exp().mean())
        assert spread == pytest.approx(1, abs=0.1)

    def test_no_dropout_is_compared(self, tmp_path):
        experiment = load_distillation(tiny.distillation(tmp_path, image_size=8), ["student.dropout=0.5"])
        found = Comparison(experiment, tmp_path / "teacher.pt", tmp_path / "teacher.pt")
        for network in (found.student, found.teacher.network):
            assert not any(module.training for module in network.modules())

    def test_quarters_of_the_chain(self):
        found = by_quarter(th.tensor([1.0, 3.0, 5.0]), th.tensor([0, 4, 19]), 20)
        assert found == {"all": 3.0, "quarters": [2.0, None, None, 5.0]}


def record_of(cell, score, seconds=1.0):
    return {
        "id": cell.id,
        "digest": cell.digest,
        "run": cell.run.name,
        "budget": cell.budget.name,
        "spent": {cell.budget.kind: cell.budget.amount},
        "seed": cell.seed,
        "revision": "f" * 40,
        "machine": {"cpu": "a processor", "gpu": None, "cores": 2, "threads": 1, "jobs": 1, "torch": "2"},
        "iterations": 4,
        "flops": {"preparation": 1e9, "total": 5e9},
        "seconds": {"preparation": 1.0, "train": seconds, "sample": 0.0, "score": 0.0},
        "scores": [
            {"fraction": 1.0, "fd": score, "primary": score, "held_out": {"all": 0.1, "quarters": [0.1] * 4}}
        ],
    }


class TestCell:
    @pytest.fixture
    def cell_run(self, tmp_path, monkeypatch):
        """Makes the run of a cell whose commands do as they are told instead of running."""

        def make(do=lambda *_: None, seed=0, **more):
            monkeypatch.setattr(Commands, "run", lambda self, log, *words: do(*words))
            found = load_study(study(tmp_path, **more))
            cells = {cell.name: cell for cell in cells_of(found)}
            shared = Shared(found, tmp_path / "out", ROOT, lambda *_: {"fd": 1.0})
            run = CellRun(shared, cells[f"plain/{next(iter(found.budgets))}/{seed}"])
            run.folder.mkdir(parents=True, exist_ok=True)
            return run

        return make

    def test_runs_of_other_arithmetic_share_nothing_of_the_teachers(self, cell_run):
        """`run.precision` decides it whatever `use_fp16` says."""
        pools, identities = [], []
        for precision in ("auto", "bf16"):
            run = cell_run()
            run.experiment.run.precision = precision
            pools.append(run._pool().path)
            identities.append(run._teacher_identity)
        assert pools[0] != pools[1] and identities[0] != identities[1]

    def test_a_run_that_diverges_is_a_result(self, cell_run):
        def do(script, *_):
            if "image_kd" in script:
                raise CommandFailed("image_kd.py: gradients were not finite for 50 iterations in a row")

        found = cell_run(do).run()
        assert found["failed"].startswith("image_kd.py: gradients were not finite") and found["scores"] == []
        assert found["iterations"] == 4 and found["flops"]["total"] > 0

    def test_a_run_that_diverges_in_the_trial_of_a_budget_in_seconds_is_a_result(self, cell_run):
        def do(script, *_):
            if "image_kd" in script:
                raise CommandFailed("image_kd.py: gradients were not finite for 9 iterations in a row")

        found = cell_run(do, budgets={"short": {"seconds": 300}}).run()
        assert found["failed"].startswith("image_kd.py: gradients were not finite") and found["scores"] == []
        assert found["iterations"] == 0

    def test_the_teacher_draws_from_the_students_noise_once_for_all_cells_of_a_seed(self, cell_run, tmp_path):
        drawn = []

        def do(script, *words):
            if "sample" in script:
                folder = Path(words[words.index("--log_dir") + 1])
                folder.mkdir(exist_ok=True)
                np.savez(folder / "samples_1x8x8x3.npz", np.zeros((1, 8, 8, 3), np.uint8))
                drawn.append((folder.parent.name, words[-1]))

        def score(reference, images):
            assert reference.name == images.name or reference.name.startswith("digits")
            if reference.name == images.name:  # as the evaluator keeps what it finds of a reference
                for letter in "abcdefgh":
                    np.savez(reference.with_suffix(f".{letter}.npz"), x=np.zeros(1))
            return {"fd": 7.0 if reference.name == images.name else 3.0}

        more = {"metrics": {"respacing": 5, "to_teacher": True}}
        for number in range(2):
            run = cell_run(do, **more)
            run.shared.score = score
            run._compared = lambda _: {}
            found = run._scores(number, tmp_path / "weights.pt")
            assert (found["primary"], found["to_teacher"]) == (3.0, 7.0)
        students = [seed for folder, seed in drawn if folder != "teacher"]
        teachers = [seed for folder, seed in drawn if folder == "teacher"]
        assert students == [*teachers, *teachers] and len(teachers) == 2

    def test_score_points_are_steps_that_are_saved(self, cell_run):
        run = cell_run(score_at=[0.3333, 0.01], budgets={"long": {"iterations": 30000}})
        assert run.study.divisor == 300 and run.study.points(30000) == [300, 10000, 30000]
        trial = run._config(run.folder / "trial.yaml", Path(), 60)
        assert load_distillation(trial, []).student.training.save_interval == 1

    def test_weights_that_had_other_scores_extend_nothing(self, cell_run):
        run = cell_run(metrics={"respacing": 5, "to_teacher": True})
        (run.folder / "run").mkdir()
        run._weights_after(4).touch()
        run.steps.add("scores 4", {"primary": 1.0})
        assert run.can_extend({"scores": [{"step": 4, "primary": 1.0}]})
        assert not run.can_extend({"scores": [{"step": 4, "primary": 2.0}]})
        assert not run.can_extend({"scores": [{"step": 4, "primary": 1.0, "to_teacher": 0.5}]})

    def test_a_disk_that_is_full_is_none(self, cell_run):
        def do(script, *_):
            raise CommandFailed(f"{script}: no space left on device")

        with pytest.raises(CommandFailed, match="no space left"):
            cell_run(do).run()

    def test_what_a_trained_run_was_trained_on_is_not_made_again(self, cell_run, tmp_path):
        scripts = []

        def do(script, *_):
            scripts.append(script)
            if "sample" in script:
                raise CommandFailed("stopped")

        for _ in range(2):
            with pytest.raises(CommandFailed, match="stopped"):
                cell_run(do).run()
            shutil.rmtree(tmp_path / "out/pools", ignore_errors=True)
        prepare, distil, sample = (
            f"scripts/{name}.py" for name in ("dynamic_prepare", "image_kd", "image_sample")
        )
        assert scripts == [prepare, distil, sample, sample]

    def test_a_run_that_is_renamed_after_its_training_is_sampled_by_its_new_name(self, cell_run):
        configs = []

        def do(script, *words):
            if "image_sample" in script:
                configs.append(Path(words[words.index("--config") + 1]))
                raise CommandFailed("stopped")

        def renamed():
            run = cell_run(do)
            run.cell = replace(run.cell, run=replace(run.cell.run, name="renamed"))
            return run

        for again in (lambda: cell_run(do), renamed):
            with pytest.raises(CommandFailed, match="stopped"):
                again().run()
        assert [path.name for path in configs] == ["plain.yaml", "renamed.yaml"]
        assert all(path.is_file() for path in configs)

    def test_a_budget_of_operations_pays_for_the_preparation_first(self, cell_run):
        unit = cell_run()
        ledger = ledger_of(unit.experiment, None, 0)
        budget = {"flops": ledger.preparation + 7.5 * ledger.iteration}
        run = cell_run(budgets={"equal": budget}, score_at=[0.5])
        assert run._iterations(ledger, Prepared(Path(), 0.0)) == 6  # a multiple of two
        run = cell_run(budgets={"equal": {"flops": ledger.preparation}})
        with pytest.raises(UserError, match=r"budgets.equal: does not pay for 1 iterations of plain"):
            run._iterations(ledger, Prepared(Path(), 0.0))

    def test_seconds_buy_all_seeds_the_same_iterations(self, cell_run, monkeypatch):
        for seed, seconds in ((0, 0.5), (1, 0.7)):
            monkeypatch.setattr(CellRun, "_seconds_per_iteration", lambda *_, s=seconds: s)
            run = cell_run(seed=seed, budgets={"quick": {"seconds": 10}})
            ledger = ledger_of(run.experiment, None, 0)
            assert run._iterations(ledger, Prepared(Path(), 2.0)) == 16

    def test_a_trial_tells_what_an_iteration_takes(self, cell_run):
        """The first ten iterations, which take longer, do not count."""

        def do(script, *words):
            folder = Path(words[words.index("--exp_dir") + 1])
            folder.mkdir()
            rows = ["step,seconds", "10,5", "20,8", "60,15"]
            (folder / "progress.csv").write_text("\n".join(rows) + "\n")

        assert cell_run(do)._seconds_per_iteration(Prepared(Path(), 0.0)) == pytest.approx(10 / 50)

    def test_what_a_command_is_given(self, cell_run):
        run = cell_run(overrides=["student.lr_anneal_steps=100"], score_at=[0.5])
        path = run._config(run.folder / "plain.yaml", run.folder / "pool.cache", 4)
        found = load_distillation(path)
        training = found.student.training
        assert (found.run.iterations, training.lr_anneal_steps, training.save_interval) == (4, 4, 2)
        constant = cell_run(budgets={"x": {"iterations": 6}})
        path = constant._config(run.folder / "plain.yaml", run.folder / "pool.cache", 6)
        assert load_distillation(path).student.training.lr_anneal_steps == 0
        pictures = cell_run(runs={"plain": {"data": {"real": 1, "random_flip": False}}})
        found = load_experiment(pictures._config(run.folder / "plain.yaml", Path("images.npz"), 4))
        assert not isinstance(found, DistillationExperiment)
        assert not found.student.training.random_flip and found.student.training.lr == 1e-3


def page_of(found, folder, scores):
    """The report of a study whose runs have these scores, by name and seed."""
    results = Results(folder / "results.jsonl")
    for cell in cells_of(found):
        results.append(record_of(cell, scores[cell.run.name][cell.seed]))
    write_report(found, results, folder, folder / "report.md", "studies.md")
    return (folder / "report.md").read_text()


class TestReport:
    def test_tables_compare_pairs(self, tmp_path):
        found = load_study(study(tmp_path))
        scores = {"plain": [4.0, 3.0, 5.0], "fast": [3.0, 2.5, 3.5]}
        text = page_of(found, tmp_path, scores)
        assert "## Findings" not in text and "| run | short | short: difference to plain |" in text
        assert "| plain | 4 (3) |  |" in text and "| fast | 3 (3) | -1 [-2.24, +0.242] |" in text
        assert "| plain | 4 | 4 / 3 / 5 | - |" in text
        assert "| fast | 3 | 3 / 2.5 / 3.5 | -1 [-2.24, +0.242] | 0.250 | 0.250 |" in text
        assert "| fast |  | `student.lr=0.01` | short: 0, 1, 2 |" in text and "a processor" in text
        assert (tmp_path / "report/study-short-why.png").is_file()
        assert (tmp_path / "report/study-short-0.png").is_file()

    def test_the_distance_to_the_teacher_is_compared_in_pairs_too(self, tmp_path):
        found = load_study(study(tmp_path, metrics={"respacing": 5, "to_teacher": True}))
        results = Results(tmp_path / "results.jsonl")
        # None: made before it was asked for
        distances = {"plain": [1.0, 2.0, None], "fast": [0.5, 1.0, 0.3]}
        for cell in cells_of(found):
            record = record_of(cell, 4.0)
            if distance := distances[cell.run.name][cell.seed]:
                record["scores"][-1]["to_teacher"] = distance
            results.append(record)
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        text = (tmp_path / "report.md").read_text()
        assert "| to the teacher | difference |" in text
        assert "| 1.5 (n = 2) | - |" in text and "| 0.6 | -0.75 [-3.93, +2.43] (n = 2) |" in text

    def test_scores_are_set_against_the_teachers_of_the_same_noise(self, tmp_path):
        """Whatever the budget: the teacher's own score has none."""
        budgets = {"short": {"iterations": 4}, "long": {"iterations": 8}}
        runs = {"plain": {"budgets": ["long"]}, "teacher": {"teacher": True}}
        found = load_study(study(tmp_path, runs=runs, budgets=budgets))
        scores = {"plain": [4.0, 3.0, 5.0], "teacher": [1.0, 0.5, 1.5]}
        text = page_of(found, tmp_path, scores)
        assert "| long: above the teacher |" in text and "| p (Holm) | above the teacher |" in text
        assert text.count("| +3 [+1.76, +4.24] |") == 2

    def test_what_was_found_stands_at_the_top(self, tmp_path):
        path = study(tmp_path, findings="Fast is **better**.\n")
        write_report(load_study(path), Results(tmp_path / "no"), tmp_path, tmp_path / "r.md", "x")
        assert (
            "\n## Findings\n\nFast is **better**.\n\n## How to read it\n" in (tmp_path / "r.md").read_text()
        )

    def test_questions_are_answered_by_pairs(self, tmp_path):
        """With p values corrected for all of them; where a seed or a run has no result, without it."""
        budgets = {"short": {"iterations": 4}, "long": {"iterations": 8}}
        both = {"budgets": ["short", "long"]}
        runs = {"plain": both, "fast": both | {"overrides": ["student.lr=0.01"]}}
        runs["alone"] = {"budgets": ["long"], "group": "other", "overrides": ["student.lr=0.1"]}
        compared = {"run": "fast", "against": "plain"}
        questions = [{"ask": "is fast | better?", **compared, "budgets": ["long", "short"]}]
        questions += [{"ask": "again?", **compared}, {"ask": "alone?", "run": "alone", "against": "fast"}]
        found = load_study(study(tmp_path, runs=runs, budgets=budgets, questions=questions))
        scores = {"plain": [4.0, 3.0, 5.0], "fast": [3.0, 2.5, 5.5]}
        results = Results(tmp_path / "results.jsonl")
        for cell in cells_of(found):
            if cell.run.name != "alone" and cell.name != "fast/long/2":
                results.append(record_of(cell, scores[cell.run.name][cell.seed]))
        write_report(found, results, tmp_path, tmp_path / "r.md", "x")
        text = (tmp_path / "r.md").read_text()
        table = text.split("## Questions")[1].split("## How to read it")[0]
        lines = [line for line in table.splitlines() if "−" in line]
        long = "| fast − plain | long | 2.75 against 3.5 | -0.75 [-3.93, +2.43] | 2 of 2 | 0.500 | 1.000 |"
        short = "| fast − plain | short | 3.67 against 4 | -0.333 [-2.23, +1.56] | 2 of 3 | 0.750 | 1.000 |"
        assert lines == [r"| Is fast \| better? " + long, "|  " + short, "| Again? " + short, "|  " + long]

    def test_a_group_may_have_a_baseline_of_its_own(self, tmp_path):
        more = {"group": "more", "overrides": ["student.lr=0.1"]}
        runs = {"plain": None, "fast": {"overrides": ["student.lr=0.01"]}, "faster": more}
        found = load_study(study(tmp_path, runs=runs, baselines={"more": "fast"}, seeds=2))
        results = Results(tmp_path / "results.jsonl")
        for cell in cells_of(found):
            results.append(record_of(cell, {"plain": 4.0, "fast": 3.0, "faster": 2.5}[cell.run.name]))
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        first, second = (tmp_path / "report.md").read_text().split("### More")
        assert "difference to plain" in first and "| fast | 3 | 3 / 3 | -1 " in first
        assert "difference to fast" in second and "| faster | 2.5 | 2.5 / 2.5 | -0.5 " in second
        assert "| fast | 3 | 3 / 3 | - |" in second and "| plain | 4" not in second

    def test_where_a_groups_baseline_is_not_run_that_of_all_runs_is(self, tmp_path):
        both = {"budgets": ["short", "long"]}
        runs = {"plain": both, "fast": {"overrides": ["student.lr=0.01"]}}
        runs["faster"] = both | {"group": "more", "overrides": ["student.lr=0.1"]}
        budgets = {"short": {"iterations": 4}, "long": {"iterations": 8}}
        path = study(tmp_path, runs=runs, baselines={"more": "fast"}, seeds=2, budgets=budgets)
        found, results = load_study(path), Results(tmp_path / "results.jsonl")
        for cell in cells_of(found):
            results.append(record_of(cell, {"plain": 4.0, "fast": 3.0, "faster": 2.5}[cell.run.name]))
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        short, long = (tmp_path / "report.md").read_text().split("## long:")
        assert "difference to fast" in short and "| faster | 2.5 | 2.5 / 2.5 | -0.5 " in short
        assert "difference to fast" not in long and "| faster | 2.5 | 2.5 / 2.5 | -1.5 " in long

    def test_what_diverged_or_is_missing_is_said(self, tmp_path):
        found = load_study(study(tmp_path))
        results = Results(tmp_path / "results.jsonl")
        for cell in [*cells_of(found)][:4]:
            record = record_of(cell, 4.0)
            if cell.name == "fast/short/1":
                record |= {"scores": [], "failed": "gradients were not finite"}
            results.append(record)
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        text = (tmp_path / "report.md").read_text()
        assert "| fast | 4 | 4 / diverged | +0 |" in text
        assert "2 not run yet" in text
        assert "- fast/short, seed 1: gradients were not finite" in text
        assert "does not declare" not in text

    def test_results_of_other_cells_are_told(self, tmp_path):
        more = load_study(study(tmp_path))
        results = Results(tmp_path / "results.jsonl")
        for cell in cells_of(more):
            results.append(record_of(cell, 4.0))
        found = load_study(study(tmp_path, seeds=2))
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        assert "(any more): plain/short/2 4; fast/short/2 4." in (tmp_path / "report.md").read_text()

    def test_numbers_that_are_not_finite_are_left_out(self, tmp_path):
        found, results = load_study(study(tmp_path)), Results(tmp_path / "results.jsonl")
        for cell in cells_of(found):
            record = record_of(cell, 4.0)
            wild = float("nan") if cell.name == "fast/short/1" else 2.0
            record["scores"][-1] |= {"step_kl": [1.0, wild], "path_kl": wild}
            record["scores"][-1]["primary"] = record["scores"][-1]["fd"] = wild
            results.append(record)
        write_report(found, results, tmp_path, tmp_path / "report.md", "studies.md")
        assert "| fast | 2 | 2 / - / 2 |" in (tmp_path / "report.md").read_text()

    def test_a_study_whose_every_score_is_not_finite_has_a_page_too(self, tmp_path):
        text = page_of(
            load_study(study(tmp_path)), tmp_path, dict.fromkeys(("plain", "fast"), [math.nan] * 3)
        )
        assert "| fast | - | - / - / - |" in text

    def test_a_study_without_results_has_a_page_too(self, tmp_path):
        write_report(load_study(study(tmp_path)), Results(tmp_path / "no"), tmp_path, tmp_path / "r.md", "x")
        assert "Not run yet with this budget: plain, fast." in (tmp_path / "r.md").read_text()


class TestRunner:
    @pytest.fixture
    def ran(self, monkeypatch):
        """The names of the cells that were run, without running them."""
        names = []

        def run(self):
            names.append(self.cell.name)
            if self.cell.name == "fast/short/1":
                raise CommandFailed("image_kd.py: disk full")
            return record_of(self.cell, 2.0)

        monkeypatch.setattr(CellRun, "run", run)
        monkeypatch.setattr(runner_module.dist_util, "setup_dist", dist_util.setup_dist)
        return names

    def runner(self, tmp_path, path, jobs=2):
        results = Results(tmp_path / "results.jsonl")
        return Runner(load_study(path), tmp_path / "out", ROOT, results, lambda *_: {}, jobs)

    def test_each_cell_runs_once_and_a_failure_stops_no_other(self, tmp_path, ran, capsys):
        path = study(tmp_path)
        failures = self.runner(tmp_path, path).run()
        assert sorted(ran) == sorted(ids(path))
        assert failures == ["fast/short/1: image_kd.py: disk full"]
        assert len(Results(tmp_path / "results.jsonl").read()) == 5
        ran.clear()
        self.runner(tmp_path, path).run()
        assert ran == ["fast/short/1"]  # which has no result

    def test_a_command_that_somebody_else_stops_is_a_failure(self, tmp_path):
        (tmp_path / "stopped.py").write_text("import sys; sys.exit(75)")
        with pytest.raises(CommandFailed, match="was stopped by somebody else"):
            Commands(tmp_path).run(tmp_path / "log", tmp_path / "stopped.py")

    def test_what_a_command_says_in_other_bytes_is_told(self, tmp_path):
        (tmp_path / "latin.py").write_text(
            "import os, sys; os.write(2, b'error: no such file: \\xfc\\n'); sys.exit(1)"
        )
        with pytest.raises(CommandFailed, match=r"no such file: \\xfc"):
            Commands(tmp_path).run(tmp_path / "log", tmp_path / "latin.py")

    def test_an_error_after_a_cell_is_told_and_the_others_run(self, tmp_path, ran, monkeypatch):
        def tidy(self):
            raise OSError("directory not empty")

        monkeypatch.setattr(Runner, "_tidy", tidy)
        failures = self.runner(tmp_path, study(tmp_path)).run()
        assert len(ran) == 6 and sum("directory not empty" in line for line in failures) == 5

    def test_further_seeds_and_renamed_runs_are_recognised(self, tmp_path, ran):
        self.runner(tmp_path, study(tmp_path)).run()
        ran.clear()
        runs = {"base": {"seeds": 4}, "copy": {"seeds": 4}}
        self.runner(tmp_path, study(tmp_path, runs=runs, baseline="base")).run()
        assert ran == ["base/short/3"]  # of two names for one thing the first

    @pytest.mark.parametrize(
        "patterns, expected",
        [
            (["fa*"], ["fast/short/0", "fast/short/1", "fast/short/2"]),
            (["plain/short/2"], ["plain/short/2"]),
            (
                ["*/short/2", "fast", "plain/*/2"],
                ["plain/short/2", "fast/short/2", "fast/short/0", "fast/short/1"],
            ),
        ],
    )
    def test_only_those_asked_for_in_that_order(self, tmp_path, ran, patterns, expected):
        self.runner(tmp_path, study(tmp_path), jobs=1).run(patterns)
        assert ran == expected

    def test_a_name_that_no_cell_has(self, tmp_path, ran):
        with pytest.raises(UserError, match="no run or cell is named slow"):
            self.runner(tmp_path, study(tmp_path)).run(["fast", "slow"])
        assert not ran

    def test_the_teacher_is_scored_once_for_all_budgets(self, tmp_path, ran):
        budgets = {"short": {"iterations": 2}, "long": {"iterations": 4}}
        runs = {"plain": {}, "teacher": {"teacher": True, "seeds": 1, "budgets": [*budgets]}}
        self.runner(tmp_path, study(tmp_path, budgets=budgets, runs=runs, baseline="plain")).run(["teacher"])
        assert ran == ["teacher/short/0"]


class TestCommands:
    def test_a_failure_is_told_by_its_own_line(self, tmp_path):
        commands = Commands(ROOT)
        with pytest.raises(CommandFailed, match=r"scripts/image_kd.py: no such configuration file: nowhere"):
            commands.run(tmp_path / "log", "scripts/image_kd.py", "--config", "nowhere")
        assert "$ python scripts/image_kd.py --config nowhere" in (tmp_path / "log").read_text()

    def test_time_of_steps_that_were_stopped_counts(self, tmp_path):
        def stopped():
            with Steps(tmp_path / "s.json").timed("train"):
                time.sleep(0.01)
                raise KeyError

        for _ in range(2):
            with pytest.raises(KeyError):
                stopped()
        steps = Steps(tmp_path / "s.json")
        assert steps.seconds("train") >= 0.02 and "trained" not in steps.done


SMOKE = ROOT / "yaml/study/smoke.yaml"


def start(out, *more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/study.py"), str(SMOKE), "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(found, seconds=120):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def commands_of(out):
    """The commands that were run, as often as they were."""
    logs = sorted(out.glob("cells/*/commands.log"))
    return [line for log in logs for line in log.read_text().splitlines() if line.startswith("$ python")]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A study that was asked to stop, went on, was killed, and went on to its end."""
    out = tmp_path_factory.mktemp("study")
    stopped = start(out)
    wait_for(lambda: [*out.glob("cells/*/run/config.yaml")])
    stopped.send_signal(signal.SIGTERM)
    told, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, told
    killed = start(out, "--jobs", "2")
    wait_for(lambda: len(commands_of(out)) > 6)
    second = start(out)
    killed.kill()
    killed.communicate()
    told, _ = second.communicate(timeout=300)  # it has waited for the one that was killed
    assert second.returncode == 0, told
    return out


@pytest.mark.slow
class TestWholeStudy:
    def test_every_cell_has_its_scores(self, out):
        records = Results(out / "results.jsonl").read()
        assert records.keys() == set(ids(SMOKE).values())
        for record in records.values():
            points = [1.0] if record["run"] == "teacher" else [0.5, 1.0]
            if record["run"] == "teacher":
                assert record["scores"][0]["fd"] > 0
            else:
                assert [score["fraction"] for score in record["scores"]] == points
                assert record["scores"][-1]["held_out"]["all"] > 0 and record["iterations"] == 4
                assert record["scores"][-1]["to_teacher"] > 0
            assert record["flops"]["total"] >= record["flops"]["preparation"]

    def test_scores_are_those_of_a_study_that_was_not_disturbed(self, out, tmp_path):
        undisturbed = start(tmp_path, "--only", "stage2/tiny/0")
        told, _ = undisturbed.communicate(timeout=200)
        assert undisturbed.returncode == 0, told
        (record,) = Results(tmp_path / "results.jsonl").read().values()
        assert Results(out / "results.jsonl").read()[record["id"]]["scores"] == record["scores"]

    def test_nothing_is_done_twice(self, out):
        before = (out / "results.jsonl").read_bytes(), commands_of(out)
        again = start(out)
        told, _ = again.communicate(timeout=100)
        assert again.returncode == 0 and "0 cells to run" in told
        assert ((out / "results.jsonl").read_bytes(), commands_of(out)) == before

    def test_a_score_that_is_asked_for_later_is_added(self, out, tmp_path):
        """The distance to the teacher's samples, from the weights that are kept; nothing is trained."""
        shutil.copytree(out, tmp_path / "out")
        results = tmp_path / "out/results.jsonl"
        before = Results(results).read()
        results.write_text(re.sub(r', "to_teacher": [^,}]*', "", results.read_text()))
        assert "to_teacher" not in results.read_text()
        again = start(tmp_path / "out", "--only", "DKDM")
        told, _ = again.communicate(timeout=200)
        assert again.returncode == 0 and "2 cells to run" in told and told.count("extended in") == 2, told
        after = Results(results).read()
        for key, record in before.items():
            last, expected = after[key]["scores"][-1], record["scores"][-1]
            if record["run"] == "DKDM":
                assert after[key] | {"scores": []} == record | {"scores": []} and last == expected
                assert "to_teacher" not in after[key]["scores"][0]  # whose weights are not kept
            else:
                assert "to_teacher" not in last
        added = Counter(commands_of(tmp_path / "out")) - Counter(commands_of(out))
        assert added and all("image_sample.py" in command for command in added)
        assert not [*(tmp_path / "out").glob("cells/*/samples_*")]

    def test_runs_of_a_seed_share_pool_and_noise(self, out):
        commands = commands_of(out)
        pools = {c for c in commands if "dynamic_prepare" in c}
        assert len(pools) == 2  # of four distillations
        for seed in (0, 1):
            configs = [
                (path.parent / "run/config.yaml").read_text()
                for path in out.glob(f"cells/*,{seed}-*/steps.json")
                if path.parent.name.startswith(("DKDM", "stage2"))
            ]
            files = {line for text in configs for line in text.splitlines() if "tempfile" in line}
            assert len(configs) == 2 and len(files) == 1
        seeds = {
            name: {
                re.search(r"run.seed=(\d+)", c)[1] for c in commands if f"/{name},tiny" in c and "sample" in c
            }
            for name in ("DKDM", "stage2")
        }
        assert seeds["DKDM"] == seeds["stage2"] and len(seeds["DKDM"]) == 2

    def test_large_files_are_gone(self, out):
        kept = {path.suffix for path in out.glob("cells/*/run/*") if path.stat().st_size > 100_000}
        assert kept == {".pt"}
        assert len([*out.glob("cells/*/run/*.pt")]) == 5
        assert not [*out.glob("pools/*")] and not [*out.glob("**/samples_*.npz")]

    def test_results_are_known_elsewhere(self, out, tmp_path):
        """As in a fresh clone, where only the results are."""
        (tmp_path / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes())
        there = start(tmp_path)
        told, _ = there.communicate(timeout=100)
        assert there.returncode == 0 and "0 cells to run" in told
        tables = [
            [line for line in (folder / "report.md").read_text().splitlines() if "tiny" not in line]
            for folder in (out, tmp_path)
        ]
        assert tables[0][:30] == tables[1][:30]

    def test_a_second_runner_is_refused(self, out, tmp_path):
        first = start(tmp_path)
        wait_for(lambda: (tmp_path / "cells").is_dir())
        second = start(tmp_path)
        told, _ = second.communicate(timeout=60)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
        assert second.returncode == 1 and "another process is writing there" in told
        assert first.returncode == 75


def guided_in_latents(folder):
    tiny.make_vae(folder / "vae", channels=4)
    more = {"teacher__guidance_scale": 3.0, "teacher__vae_path": str(folder / "vae")}
    tiny.distillation(folder, 8, class_cond=True, num_classes=3, teacher__null_class=True, **more)


def a_folder(folder):
    teacher = save(folder / "teacher", unet(sample_size=16), DDPMScheduler(20))
    shutil.move(distillation_config(folder, teacher, STUDENTS["CNN"]), folder / "tiny.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("make, flags", [(guided_in_latents, "--guidance_scale 3.0"), (a_folder, "")])
def test_any_teacher_is_studied_as_it_is_distilled(tmp_path, make, flags):
    """Its own samples, those it teaches by and those that students are compared with."""
    np.savez(tmp_path / "real.npz", arr_0=load_digit_images()[0][:60])
    path = study(
        tmp_path,
        reference=str(tmp_path / "real.npz"),
        metrics={"samples": 20, "sets": 1, "respacing": 3, "held_out": 8, "chains": 2, "to_teacher": True},
        seeds=1,
        runs={
            "plain": None,
            "teacher": {"teacher": True},
            "data-free": {"data": {"real": 0, "respacing": 3, "random_flip": False}},
        },
    )
    make(tmp_path)
    tiny.script("scripts/study.py", path, "--out", tmp_path / "out", OMP_NUM_THREADS="1")
    records = {record["run"]: record for record in Results(tmp_path / "out/results.jsonl").read().values()}
    for name in ("plain", "teacher", "data-free"):
        (scores,) = records[name]["scores"]
        assert np.isfinite(scores["primary"])
        assert name == "teacher" or (scores["held_out"]["all"] > 0 and np.isfinite(scores["to_teacher"]))
    logs = [*tmp_path.glob("out/cells/*/commands.log"), *tmp_path.glob("out/teacher/*/commands.log")]
    sampled = [line for log in logs for line in log.read_text().splitlines() if f"{tmp_path}/teacher" in line]
    assert len(sampled) == 3 and all(flags in line for line in sampled)
