"""A study's file: what it may say, and how it is told what is wrong with it."""

import numpy as np
import pytest
import tiny
import yaml
from in_process import script_here

from guided_diffusion.errors import UserError
from guided_diffusion.studies.cells import reference_path
from guided_diffusion.studies.study_file import Budget, load_study


def study(folder, **more):
    """Write a study of a tiny configuration; return its path."""
    config = tiny.distillation(folder, image_size=8)
    content = {
        "config": str(config),
        "baseline": "plain",
        "metrics": {"respacing": 5},
        "budgets": {"short": {"iterations": 4}},
        "runs": {"plain": None, "fast": {"overrides": ["student.lr=0.01"]}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content | more, sort_keys=False))
    return path


def test_what_is_not_said_has_defaults(tmp_path):
    found = load_study(study(tmp_path))
    assert [*found.runs] == ["plain", "fast"]
    assert found.runs["fast"].budgets == ("short",)
    assert found.runs["plain"].seeds == (0, 1, 2)
    assert found.budgets["short"] == Budget("short", "iterations", 4)
    assert found.score_at == (1.0,)
    assert found.experiment(found.runs["fast"]).student.training.lr == 0.01


def test_the_images_of_latents_are_those_that_they_decode_to(tmp_path):
    """So `reference: digits` is of 16x16 for a study in latents of 8x8."""
    tiny.make_vae(tmp_path / "vae")
    found = load_study(study(tmp_path, overrides={"teacher": {"vae_path": str(tmp_path / "vae")}}))
    assert found.image_size == 16


def test_a_reference_is_looked_for_beside_the_study(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = load_study(study(tmp_path, reference="real.npz"))
    with pytest.raises(UserError, match=r"reference: no such file: real\.npz"):
        reference_path(found)
    (tmp_path / "real.npz").touch()
    assert reference_path(found) == tmp_path / "real.npz"


def test_overrides_of_all_runs_give_way_to_presets_and_those_to_the_runs_own(tmp_path):
    (tmp_path / "preset.yaml").write_text("student: {lr: 0.02, weight_decay: 0.3}\n")
    runs = {
        "plain": None,
        "preset": {"presets": "preset.yaml"},
        "own": {"presets": ["preset.yaml"], "overrides": {"student": {"lr": 0.04}}},
    }
    path = study(tmp_path, runs=runs, overrides={"student": {"lr": 0.01}, "distill": {"role_vector": True}})
    found = load_study(path)
    training = {name: found.experiment(run).student.training for name, run in found.runs.items()}
    assert {name: t.lr for name, t in training.items()} == {"plain": 0.01, "preset": 0.02, "own": 0.04}
    assert training["own"].weight_decay == 0.3
    assert found.experiment(found.runs["own"]).distill.role_vector


def test_score_points_are_whole_iterations(tmp_path):
    found = load_study(study(tmp_path, score_at=[0.25, 0.5]))
    assert found.score_at == (0.25, 0.5, 1.0)
    assert found.divisor == 4
    assert found.points(8) == [2, 4, 8]


@pytest.mark.parametrize(
    "more, told",
    [
        ({"metric": {}}, "unknown key 'metric': did you mean 'metrics'?"),
        ({"metrics": {"sample": 3}}, "unknown key 'metrics.sample': did you mean 'metrics.samples'?"),
        ({"metrics": {"samples": "many"}}, "metrics.samples must be int, not 'many'"),
        ({"metrics": {"sets": 0}}, "metrics.sets must not be 0"),
        ({"baseline": "plan"}, "baseline: no 'plan'; did you mean 'plain'?"),
        ({"baselines": ["plain"]}, "baselines must hold groups and runs"),
        ({"baselines": {"stages": "plain"}}, "baselines: no 'stages'; there are"),
        ({"baselines": {"": "plan"}}, "no 'plan'; did you mean 'plain'?"),
        ({"budgets": {"short": {"iteration": 4}}}, "did you mean 'budgets.short.iterations'?"),
        ({"budgets": {"short": {"iterations": 4, "seconds": 1}}}, "budgets.short must be one of"),
        ({"budgets": {"short": {"iterations": 2.5}}}, "must be a positive number, not 2.5"),
        ({"questions": {"ask": "?"}}, "questions must be a list, not {'ask': '?'}"),
        ({"questions": ["?"]}, "questions.0 must hold keys and values, not '?'"),
        ({"questions": [{"run": "fast", "against": "plan"}]}, "questions.0.against: no 'plan'; did you mean"),
        ({"questions": [{"run": "fast", "agaist": "plain"}]}, "did you mean 'questions.0.against'?"),
        (
            {"questions": [{"run": "fast", "against": "plain", "budgets": ["shot"]}]},
            "questions.0.budgets: no 'shot'; did you mean 'short'?",
        ),
        ({"score_at": [0.3]}, "4 iterations are no multiple of 10"),
        ({"metrics": {"sets": 100}}, "metrics.sets must be at most 99, not 100"),  # the next seed's noise
        ({"score_at": [1.5]}, "score_at must be fractions"),
        ({"score_at": [0.0001]}, "score_at: 0, or one point twice, in thousandths of a budget"),
        ({"report": "page"}, "report must end in .md, not be 'page'"),
        ({"results": "gs://a/b"}, "results must be a file here, not gs://a/b"),
        ({"keep": "some"}, "keep must be little or all"),
        ({"config": "nowhere.yaml"}, "'nowhere.yaml' is to be found neither"),
        ({"runs": None}, "'runs' is missing"),
        ({"runs": {"a/b": None}}, "runs.a/b: a name is made of"),
        ({"runs": {"plain": {"overides": []}}}, "did you mean 'runs.plain.overrides'?"),
        ({"runs": {"plain": {"overrides": ["student.lrr=1"]}}}, "runs.plain: "),
        (
            {"runs": {"plain": {"overrides": ["student.resume_checkpoint=model000008.pt"]}}},
            "runs.plain: student.resume_checkpoint cannot be used in a study; student.model_path begins with",
        ),
        ({"runs": {"plain": {"overrides": "lr"}}}, "runs.plain.overrides must be keys and values"),
        ({"runs": {"plain": {"budgets": ["shot"]}}}, "runs.plain.budgets: no 'shot'; did you mean 'short'?"),
        ({"runs": {"plain": {"budgets": [["short"]]}}}, "runs.plain.budgets must be a list of names"),
        ({"runs": {"plain": {"presets": 5}}}, "runs.plain.presets must name a file or list files, not 5"),
        ({"baseline": ["plain"]}, "baseline"),
        ({"runs": {"plain": {"seeds": 0}}}, "runs.plain.seeds must be a number, 1 to 20, or"),
        ({"runs": {"plain": {"seeds": [1, 1]}}}, "as many seeds, not [1, 1]"),
        ({"runs": {"plain": {"data": {"real": 2}}}}, "runs.plain.data.real must lie in [0, 1], not 2"),
    ],
)
def test_mistakes_are_told_with_the_key_and_what_it_may_be(tmp_path, more, told):
    with pytest.raises(UserError) as error:
        load_study(study(tmp_path, **more))
    assert told in str(error.value)
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_the_command_tells_a_mistake_in_one_line(tmp_path):
    done = script_here("scripts/study.py", study(tmp_path, runs={"plain": {"seed": 1}}), check=False)
    assert "did you mean 'runs.plain.seeds'?" in tiny.one_line_error(done)


@pytest.mark.parametrize("path", sorted(tiny.ROOT.glob("yaml/study/*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_along_are_right(path):
    assert load_study(path).runs


@pytest.mark.parametrize(
    "more, told",
    [
        ({"backend": "digits"}, "backend: digits scores images of 16x16 or 32x32, not of 8x8"),
        ({"reference": "study.yaml"}, "not a readable npz archive"),
        ({"metrics": {"samples": 3, "respacing": 5}}, "metrics.samples must be at least 6"),
    ],
)
def test_what_cannot_be_scored_is_told_before_anything_is_run(tmp_path, more, told):
    np.savez(tmp_path / "real.npz", np.zeros((9, 8, 8, 3), np.uint8))
    path = study(tmp_path, **{"backend": "torch", "reference": "real.npz"} | more)
    done = script_here("scripts/study.py", path, "--out", tmp_path / "out", check=False)
    assert told in tiny.one_line_error(done)
    assert not (tmp_path / "out/cells").exists()
