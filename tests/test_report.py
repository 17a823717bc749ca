"""A page about runs: made of real, of damaged and of hostile ones, and looked at by a real browser."""

import base64
import csv
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import Browser, needs_chromium
from in_process import script_here
from tiny import ROOT, one_line_error, script

from guided_diffusion.logger import RunLog, read_pool_records, read_progress
from guided_diffusion.reports import tables
from guided_diffusion.reports.reading import read_material
from guided_diffusion.runs.figures import save_grid

CONFIG = ROOT / "yaml/digits_16/exp/digits-TCCD.yaml"
NAMES = {"fd": "digits-FD", "precision": "Precision"}
HOSTILE = "<script>hacked = 1</script><img src=x onerror=hacked=1>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two short runs of the demo's configuration, samples of the first, and their scores."""
    folder = tmp_path_factory.mktemp("runs")
    keys = [f"teacher.tempfile={folder / 'pool.cache'}", "teacher.BATCH=0.02", "distill.stride=500"]
    keys += [
        "student.batch_size=8",
        "student.num_channels=8",
        "student.num_heads=2",
        "student.log_interval=2",
    ]
    keys += ["student.save_interval=4", "run.iterations=8", "run.sample_respacing=2", "run.num_samples=4"]
    keys += ["distill.advance_stride=400", "--config", CONFIG]
    script_here("scripts/dynamic_prepare.py", *keys)
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        script_here("scripts/image_kd.py", *keys, "--exp_dir", folder / name, f"student.lr={lr}")
    script_here(
        "scripts/image_sample.py", *keys, "--model_path", folder / "a/ema_0.99_000008.pt", "--log_dir",
        folder / "samples", "--num_samples", 100, "--batch_size", 100, "--timestep_respacing", 2,
    )  # fmt: skip
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), dtype=np.uint8))
    script_here(
        "evaluations/evaluator.py", folder / "real.npz", folder / "samples/samples_100x16x16x3.npz",
        "--backend", "digits", "--intervals", 4, "--output", folder / "scores.json", "--no_cache",
    )  # fmt: skip
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the first run that a test may spoil."""
    shutil.copytree(made / "a", tmp_path / "a", ignore=shutil.ignore_patterns("*.pt", "*.cache"))
    return tmp_path / "a"


def report(*paths, out, **options):
    return script_here("scripts/report.py", *paths, "--out", out, **options)


class Parsed(HTMLParser):
    """What a page holds: its elements with their attributes, and its text by the element it is in."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.inside = [], "", []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("style", "script"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th", "dd", "dt", "p", "li", "summary"):
            self.text += " "
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_page_of_two_runs(made, tmp_path):
    page = tmp_path / "deep" / "report.html"
    done = report(made / "a", made / "b", made / "samples", made / "scores.json", out=page)
    assert done.stdout == f"wrote {page}\n"
    assert list(page.parent.iterdir()) == [page]
    parsed = Parsed(page)
    text = re.sub(r"\s+", " ", parsed.text)
    for term in (
        "stage1_mse",
        "stage1_vb",
        "stage1_align",
        "stage2_mse",
        "stage2_vb",
        "loss",
        "grad_norm",
        "lr",
    ):
        assert re.search(rf"\b{term}\b", text), term
    assert "finished" in text and "iterations/s" in text and "Not in this report" not in text
    (differing,) = re.findall(r"What differs between the runs\. (.*?) All keys", text)
    assert differing.split() == ["key", "a", "b", "student.lr", "0.001", "0.002"]
    score = json.loads((made / "scores.json").read_text())[0]
    low, high = score["intervals"]["fd"]
    assert f"a 8 100 {score['fd']:.4g} [{low:.4g}, {high:.4g}]" in text
    sources = [image["src"] for image in parsed.of("img")]
    grids = ("samples_teacher", "samples000004", "samples_raw000004", "samples000008", "samples_raw000008")
    files = [made / f"{run}/{name}.png" for run in "ab" for name in grids]
    wanted = [path.read_bytes() for path in [*files, made / "samples/samples.png"]]
    assert [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources] == wanted
    assert all(image["alt"] for image in parsed.of("img"))
    charts = [kind for kind in parsed.of("div") if "chart" in kind.get("class", "")]
    assert {kind["class"] for kind in charts} == {
        "chart",
        "chart over-step",
        "chart over-samples",
        "chart over-seconds",
    }
    assert len(parsed.of("svg")) > len(charts)
    identifiers = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    loaded = [a for _, a in parsed.elements if {"src", "href", "xlink:href"} & a.keys()]
    for attributes in loaded:
        address = attributes.get("src") or attributes.get("href") or attributes.get("xlink:href")
        assert address.startswith(("data:image/png;base64,", "#")), address


def test_what_a_run_records_for_it(made):
    """The time grows from row to row, and the pool is counted at the start and with every checkpoint."""
    rows = read_progress(made / "a/progress.csv")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    seconds = [row["seconds"] for row in rows]
    assert seconds[0] > 0 and seconds == sorted(set(seconds))
    records = read_pool_records(made / "a/pool.jsonl")
    assert [record["step"] for record in records] == [0, 4, 8]
    for record in records:
        assert len(record["levels"]) == 20 and record["T"] == 1000
        assert sum(record["levels"]) + record["clean"] == 160
    assert records[0]["restarts"] == 0 and records[0]["clean"] == 0
    assert records[1]["mean_level"] != records[0]["mean_level"]


def test_levels_are_those_of_all_ranks_and_a_resumed_run_counts_on(made, tmp_path):
    """Four iterations on two ranks and four more on one; the time goes on where it was."""
    from guided_diffusion.distill.pool_file import read_pool

    keys = ["--config", CONFIG, f"teacher.tempfile={made / 'pool.cache'}", "teacher.BATCH=0.02"]
    keys += ["distill.stride=500", "student.batch_size=8", "student.num_channels=8", "student.num_heads=2"]
    keys += ["student.log_interval=2", "student.save_interval=4", "distill.advance_stride=400"]
    keys += ["run.sample_interval=-1", "student.lr=1e-3"]
    run = tmp_path / "run"
    script("scripts/image_kd.py", *keys, "--exp_dir", run, "run.iterations=4", ranks=2)
    first = read_progress(run / "progress.csv")
    with open(run / "pool.jsonl", "a") as file:
        file.write('{"step": 6, "of a run that was killed": true}\n{"step": 7, "le')
    script_here("scripts/image_kd.py", *keys, "--exp_dir", run, "run.iterations=8")
    rows = read_progress(run / "progress.csv")
    assert rows[:2] == first and rows[2]["seconds"] > rows[1]["seconds"]
    records = read_pool_records(run / "pool.jsonl")
    assert [record["step"] for record in records] == [0, 4, 8]
    for record in records[1:]:
        pool = read_pool(run / f"teacher-state-{record['step']:06d}.cache", 1000, (3, 16, 16))
        levels = pool.levels.numpy()
        assert record["clean"] == (levels == 0).sum()
        wanted, _ = np.histogram(levels[levels > 0] - 1, bins=20, range=(0, 1000))
        assert record["levels"] == wanted.tolist()
        assert record["mean_level"] == pytest.approx(levels.mean())
    # 8 of 160 entries a turn, which are at level 0 after two or three; all that were restarted left it.
    assert 0 < records[1]["restarts"] + records[2]["restarts"] <= 64


def test_words_and_numbers(run):
    """Skipped iterations come from their shares; chains live as long as it takes to restart them all."""
    with open(run / "progress.csv", "w", newline="") as file:
        columns = ["step", "skipped", "samples", "seconds", "eval_fd"]
        rows = [[2, 0.5, 16, 10, 9.0], [4, 0, 32, 20, 8.0], [8, 0.25, 64, 40, 7.5]]
        csv.writer(file).writerows([columns, *rows])
    log = RunLog(run)
    (run / "pool.jsonl").unlink()
    for step, restarts in ((0, 7), (4, 10), (8, 30)):  # 7 before this run took the pool up
        log.pool(step, {"T": 100, "levels": [10] * 20, "clean": 0, "mean_level": 25.0, "restarts": restarts})
    (run / "best.json").write_text('{"step": 8, "metric": "digits-FD", "value": 7.5}')
    (run / "run.json").write_text('{"name": "x", "ended": "not yet", "resumed": ["2026-01-02T03:04:05"]}')
    told = {name: cells[0] for name, cells in tables.overview(read_material([run], ["fd"])).rows}
    (run / "run.json").write_text('{"name": "x", "ended": "finished", "began_at": 2}')
    elsewhere = {name: cells[0] for name, cells in tables.overview(read_material([run], ["fd"])).rows}
    assert elsewhere["skipped iterations"] == "1" and elsewhere["throughput"].startswith("0.15 ")
    (run / "run.json").write_text('{"name": "x", "ended": "not yet", "resumed": ["2026-01-02T03:04:05"]}')
    material = read_material([run], ["fd"])
    assert told["skipped iterations"] == "2" and told["throughput"] == "0.2 iterations/s, 1.6 images/s"
    assert told["best checkpoint"] == "iteration 8: digits-FD 7.5"
    assert told["ended"] == "not yet: it is running, or was killed"
    assert told["continued"] == "once, last 2026-01-02 03:04:05"
    ((_, cells),) = tables.pools(material).rows
    assert list(cells) == ["200", "40", "40 iterations", "75 of 100 timesteps", "30 iterations"]
    assert tables.duration(5.04) == "5.0 s" and tables.duration(232) == "3:52 min"
    assert tables.duration(90061) == "1 day, 1:01:01 h"


def test_scores_while_training_and_the_teachers_grid(run, tmp_path):
    log = RunLog(run)
    for step, fd in ((4, 30.0), (7, 20.0)):  # rows of their own
        log.row(step, {"eval_fd": fd, "eval_precision": 0.5})
    (read,) = read_material([run], ["fd"]).runs
    assert [row["samples"] for row in read.rows if "eval_fd" in row] == [32, 56]
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for name in ("samples_teacher", "samples_raw000004", "samples_raw000008"):
        save_grid(run / f"{name}.png", noise)
    report(run, out=tmp_path / "r.html")
    parsed = Parsed(tmp_path / "r.html")
    alts = [image["alt"] for image in parsed.of("img")]
    assert alts[0] == "Samples of the teacher" and len(alts) == 5
    assert "Samples of digits-TCCD at iteration 4, weights being trained" in alts
    says = {kind["aria-label"] for kind in parsed.of("div") if kind.get("role") == "img"}
    assert "digits-FD. digits-TCCD: 30 at iteration 4, 20 at iteration 7" in says
    assert "Precision. digits-TCCD: 0.5 at iteration 4, 0.5 at iteration 7" in says


@pytest.fixture
def hostile_page(run, tmp_path):
    """A report whose files have names, values and columns that try to be HTML."""
    hostile = tmp_path / HOSTILE.replace("/", "_")
    run.rename(hostile)
    (hostile / "run.json").write_text(json.dumps({
        "name": HOSTILE, "ended": HOSTILE, "command": [HOSTILE], "git_revision": HOSTILE, "started": HOSTILE,
        "versions": {HOSTILE: HOSTILE}, "ranks": [HOSTILE], "peak_memory": HOSTILE,
    }))  # fmt: skip
    (hostile / "best.json").write_text(json.dumps({"step": 4, "metric": HOSTILE, "value": 1.0}))
    (hostile / "config.yaml").write_text(json.dumps({"student": {HOSTILE: HOSTILE}}))
    with open(hostile / "progress.csv", "w", newline="") as file:
        names = [HOSTILE, *(f"{HOSTILE}_q{q}" for q in range(4)), f"eval_{HOSTILE}"]
        csv.writer(file).writerows([["step", *names], [1, *range(6)], [2, *range(6)]])
    record = {"samples": HOSTILE, "backend": HOSTILE, "n": 5, "fd": 1.0}
    (tmp_path / "s.json").write_text(json.dumps([record | {"intervals": {"fd": [0.5, HOSTILE]}}]))
    (tmp_path / "made").mkdir()
    (tmp_path / "made/sampling.json").write_text(json.dumps({"config": HOSTILE, "sampler": HOSTILE}))
    page = tmp_path / "r.html"
    report(hostile, tmp_path / "made", tmp_path / "s.json", out=page)
    return page


def test_what_comes_from_files_is_escaped(hostile_page):
    parsed = Parsed(hostile_page)
    assert hostile_page.read_text().count("<script") == 1
    assert not [a for _, a in parsed.elements if "onerror" in a] and "49" not in parsed.text
    assert parsed.text.count("<script>hacked = 1</script>") > 12


DAMAGES = {"empty": b"", "bytes": b"\0\xff{]", "deep": b"[" * 100_000, "cut": b'{"a": 1'}
FILES = {
    "run.json": "how it ended and its versions are not known",
    "config.yaml": "no configuration",
    "progress.csv": "no curves",
    "pool.jsonl": "no levels of the pool",
    "best.json": "the best checkpoint is not known",
    "samples000008.png": "not shown",
    "checkpoint000008.json": "scores of its weights stand alone",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_cost_their_part_of_the_page(made, run, tmp_path, damage):
    for name in FILES:
        (run / name).write_bytes(DAMAGES[damage])
    notes = read_material([run, made / "b"], ["fd"]).notes
    assert len(notes) == len(FILES)
    for name, lost in FILES.items():
        assert [note for note in notes if re.fullmatch(rf"a: {re.escape(name)}: .*; {lost}", note)], notes
    if damage == "bytes":
        report(run, made / "b", out=tmp_path / "r.html")
        text = Parsed(tmp_path / "r.html").text
        assert all(note in text for note in notes)
        assert "finished" in text and "stage1_mse" in text  # of the other run


@pytest.mark.parametrize("name", FILES)
def test_one_damaged_file_costs_no_other_part(made, run, name):
    (run / name).write_bytes(b"\0")
    (spoilt,) = read_material([run], ["fd"]).runs
    (sound,) = read_material([made / "a"], ["fd"]).runs
    assert [note.partition(":")[0] for note in spoilt.notes] == [name] and not sound.notes
    parts = ("record", "rows", "keys", "pool", "grids", "weights")
    differing = [part for part in parts if getattr(spoilt, part) != getattr(sound, part)]
    assert len(differing) == (name != "best.json"), differing


def test_what_is_missing_is_told(run, tmp_path):
    for path in run.iterdir():
        if path.name != "progress.csv":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    report(run, out=tmp_path / "r.html")
    text = re.sub(r"\s+", " ", Parsed(tmp_path / "r.html").text)
    assert "a: run.json: is missing; how it ended and its versions are not known" in text
    assert "stage1_mse" in text and "Pool" not in text and "Samples" not in text
    older = read_progress(run / "progress.csv")
    with open(run / "progress.csv", "w", newline="") as file:  # of a version that recorded no time
        writer = csv.DictWriter(file, [name for name in older[0] if name != "seconds"], extrasaction="ignore")
        writer.writeheader(), writer.writerows(older)
    report(run, out=tmp_path / "r.html")
    assert "axis-seconds" not in {a.get("id") for a in Parsed(tmp_path / "r.html").of("input")}


def test_mistakes_are_told_in_one_line(made, tmp_path):
    def refused(*paths, out=tmp_path / "r.html"):
        return one_line_error(report(*paths, out=out, check=False))

    (tmp_path / "bad.json").write_text('[{"samples": 1}]')
    assert f"{tmp_path}: is no run; give run directories" in refused(made / "a", tmp_path)
    assert "absent: does not exist; " in refused(tmp_path / "absent")
    assert "bad.json: is no record of the evaluator" in refused(made / "a", tmp_path / "bad.json")
    assert "no run among the paths" in refused(made / "samples")
    assert "is a folder; name a file" in refused(made / "a", out=tmp_path)
    assert not (tmp_path / "r.html").exists()


def test_many_rows_and_grids_stay_a_small_page(run, tmp_path):
    with open(run / "progress.csv", "w", newline="") as file:
        rows = [[step, 1 / step, step * 8, step / 5] for step in range(1, 30_001)]
        csv.writer(file).writerows([["step", "loss", "samples", "seconds"], *rows])
    for step in range(9, 109):
        shutil.copy(run / "samples000008.png", run / f"samples{step:06d}.png")
    report(run, out=tmp_path / "r.html")
    parsed = Parsed(tmp_path / "r.html")
    frames = [int(kind["data-step"]) for kind in parsed.of("div") if "data-step" in kind]
    assert len(frames) == 24 and frames[0] == 4 and frames[-1] == 108
    assert "24 of its 102 grids of samples are shown" in parsed.text
    assert (tmp_path / "r.html").stat().st_size < 400_000


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "report.html"
    report(made / "a", made / "b", made / "samples", made / "scores.json", out=page)
    return page


SHOWN = """[...document.querySelectorAll('.frame')]
  .filter(frame => frame.querySelector('img').offsetParent).map(frame => frame.dataset.step)"""
AXES = (
    "[...new Set([...document.querySelectorAll('.chart')].filter(c => c.offsetParent).map(c => c.className))]"
)
PAPER = "getComputedStyle(document.body).backgroundColor"


@needs_chromium
class TestInABrowser:
    def test_nothing_is_loaded_and_nothing_complained_of(self, browser, page):
        browser.resize(1200)
        browser.open(page)
        assert browser.complaints() == []
        assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert browser.value("document.querySelectorAll('.chart path').length") > 100

    def test_the_slider_moves_by_keyboard(self, browser, page):
        browser.open(page)
        assert browser.value(SHOWN) == ["8", "8"]
        browser.value("document.querySelector('#slider-0').focus()")
        browser.press("ArrowLeft", 37)
        assert browser.value(SHOWN) == ["4", "8"]
        assert browser.value("document.querySelector('output').textContent") == "4"
        assert browser.value("document.querySelector('#slider-0').ariaValueText") == "iteration 4"
        browser.press("End", 35)
        assert browser.value(SHOWN) == ["8", "8"]
        assert browser.complaints() == []

    def test_the_axis_is_chosen_by_keyboard(self, browser, page):
        browser.open(page)
        assert browser.value(AXES) == ["chart over-step", "chart"]
        browser.value("document.querySelector('#axis-step').focus()")
        for axis in ("samples", "seconds"):
            browser.press("ArrowRight", 39)
            assert browser.value(AXES) == [f"chart over-{axis}", "chart"]

    def test_without_scripts(self, browser, page):
        browser("Emulation.setScriptExecutionDisabled", value=True)
        try:
            browser.open(page)
            assert browser.value(SHOWN) == ["8", "8"]
            assert browser.value("document.querySelector('#slider-0').offsetParent === null")
            assert browser.value(AXES) == ["chart over-step", "chart"]
            browser.click("#axis-samples")
            assert browser.value(AXES) == ["chart over-samples", "chart"]
            browser.click("#theme-dark")
            assert browser.value(PAPER) == "rgb(21, 23, 26)"
        finally:
            browser("Emulation.setScriptExecutionDisabled", value=False)

    def test_light_and_dark_and_paper(self, browser, page):
        try:
            for scheme, colour in (("dark", "rgb(21, 23, 26)"), ("light", "rgb(253, 253, 252)")):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                browser("Emulation.setEmulatedMedia", features=[feature])
                browser.open(page)
                assert browser.value(PAPER) == colour
                names = ["--ink", "--muted", "--accent", *(f"--run-{i}" for i in range(8))]
                ratios = {name: browser.value(CONTRAST % name) for name in names}
                assert all(ratio >= 4.5 for ratio in ratios.values()), ratios
            browser.click("#theme-dark")
            assert browser.value(PAPER) == "rgb(21, 23, 26)"
            browser("Emulation.setEmulatedMedia", media="print")
            ink = browser.value("getComputedStyle(document.body).color")
            assert ink == "rgb(29, 32, 35)"  # on white, whatever the screen had
            assert browser.value("getComputedStyle(document.querySelector('.bar')).display") == "none"
            pdf = base64.b64decode(browser("Page.printToPDF", printBackground=True)["data"])
            assert pdf.startswith(b"%PDF")
        finally:
            browser("Emulation.setEmulatedMedia", media="", features=[])

    def test_on_a_phone(self, browser, page):
        browser.resize(360, 740)
        try:
            browser.open(page)
            assert browser.value("document.documentElement.scrollWidth") <= 360
            widths = browser.value(
                "[...document.querySelectorAll('.chart svg')].map(s => s.clientWidth).filter(w => w)"
            )
            assert min(widths) > 250
        finally:
            browser.resize(1200)

    def test_for_a_screen_reader(self, browser, page):
        browser.open(page)
        nodes = [node for node in browser("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        found = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes]
        unnamed = [
            role for role, name in found if role in ("image", "slider", "radio", "region") and not name
        ]
        assert not unnamed
        assert sum(role == "image" for role, _ in found) > 20
        assert ("slider", "Iteration") in found and ("radio", "training time") in found
        levels = [
            next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
            for node in nodes
            if node["role"]["value"] == "heading"
        ]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))

    def test_hostile_files_do_nothing(self, browser, hostile_page):
        browser.open(hostile_page)
        assert browser.value("typeof hacked") == "undefined"
        assert browser.complaints() == []


# The contrast of a colour with the paper, as WCAG 2 defines it.
CONTRAST = """(name => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const light = text => text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
  const pair = [light(getComputedStyle(probe).color), light(getComputedStyle(document.body).backgroundColor)];
  probe.remove();
  return Math.max(...pair) / Math.min(...pair);
})("%s")"""
