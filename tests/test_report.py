"""make_report.py: one page made only from run folders, what it says about arms over seeds, what it must not open."""

import json
import re
import shutil
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from runs import ROOT
from scipy import stats

import arms as arms_
import eval_mmnih
import finetune_diff
import finetune_original
import make_report
from arms import Contrast, Measured, answer, average, contrasts, measure_evaluations, measure_training, read_arms
from differential_attention import DifferentialConfig
from files import read_json, write_json
from finetune_original import finetune
from needle_eval.plots import STYLE, Difference, arm_styles
from needle_eval.statistics import format_p

EVALUATION = "mmneedle-finetuned-haystack-samples_8"
RIGHT = {"original": 0.25, "diff": 0.5}
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder with the runs original_seed0 and diff_seed0, each evaluated with generated and with ranked answers."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(STYLE, "figure.dpi", 30)  # figures take the time
        flags = dict(max_steps=2, eval_every=1, grids=(2,), tracker="none")
        standard = tiny.quick(finetune_original.Config, tiny_model, folder, **flags)
        finetune(replace(standard, output_dir="runs/original_seed0"), "original")
        differential = tiny.quick(
            finetune_diff.Config, tiny_model, folder, differential=DifferentialConfig().resolve(), **flags
        )
        finetune(replace(differential, output_dir="runs/diff_seed0"), "diff", differential.differential)
        for flags in (["--attention=2", "--grids", "2", "4"], ["--protocol=rank", "--grids=2"]):
            models = ["--model", "runs/original_seed0", "runs/diff_seed0"]
            patch.setattr(sys, "argv", ["eval_mmnih.py", *models, "--samples=8", *flags])
            eval_mmnih.main()
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch) -> Path:
    """A copy of these runs, which is the current folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setitem(STYLE, "figure.dpi", 30)
    return tmp_path / "work"


def add_seed(run: str, seed: int, right: float = 0.5) -> Path:
    """A copy of a run with another seed, in whose evaluation this share of the positives is right."""
    copy = Path(run.replace("seed0", f"seed{seed}"))
    if not copy.exists():
        shutil.copytree(run, copy)
    for file in (copy / "run.json", copy / "final" / "run.json"):
        record = read_json(file)
        record["config"]["seed"] = seed
        write_json(file, record)
    edit_answers(copy, right)
    return copy


def edit_answers(run: Path, right: float):
    """Make the first part of the positives of every setting right, and the others wrong."""
    file = run / "eval" / EVALUATION / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for setting in {row["setting"] for row in rows}:
        asked = [row for row in rows if row["setting"] == setting and row["kind"] == "positive"]
        for number, row in enumerate(asked):
            row["response"] = row["ground_truth"] if number < right * len(asked) else "9, 9, 9"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Checker(HTMLParser):
    """Collects the texts, addresses and unclosed elements of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.headings, self.text, self.images = [], [], [], "", 0

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.images += tag == "img"
        if tag == "img":
            assert dict(attributes)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] != "style":
            self.text += data


def check(page: str) -> Checker:
    """Parse a page: elements are closed, links lead to its own sections, and nothing is loaded from elsewhere."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open and "<script" not in page and "url(" not in page and "@import" not in page
    for address in checker.addresses:
        assert address.startswith("data:image/") or f'id="{address[1:]}"' in page
    return checker


def test_a_page_of_two_arms_over_seeds(folder, capsys, monkeypatch):
    runs = [f"runs/{arm}_seed0" for arm in ("original", "diff")]
    paths = [*runs, *(str(add_seed(run, seed, right=(seed + 1) / 8)) for run in runs for seed in (1, 2))]
    monkeypatch.setattr(sys, "argv", ["make_report.py", *paths])
    make_report.main()
    assert capsys.readouterr().out.strip() == "runs/report.html"
    page = check(Path("runs/report.html").read_text())
    assert page.headings == [
        "Runs", f"Evaluation {EVALUATION}", "Evaluation mmneedle-rank-haystack-samples_8-grids_2",
        "Last evaluation of training", "Training", "lambda", "Attention maps", "Attention on the needle", "Confusion",
        "Calibration", "Failures",
    ]  # fmt: skip
    assert page.images > 15  # figures, and the images of the gallery
    assert "3 seeds" in page.text and "Expected calibration error" in page.text and "where is" in page.text


def test_the_page_comes_from_files_alone():
    """No model and no data set is loaded."""
    for file in ("make_report.py", "arms.py"):
        assert not re.search(r"^(from|import) (data|models|modeling\w*|training) ", (ROOT / file).read_text(), re.M)


def test_the_answer_is_the_paired_t_test_over_seeds(folder):
    rates = {"original": [0.25, 0.5, 0.375, 0.5], "diff": [0.5, 0.625, 0.75, 0.625]}
    runs = []
    for arm, of_arm in rates.items():
        for seed, right in enumerate(of_arm):
            runs.append(add_seed(f"runs/{arm}_seed0", seed, right))
    arms = read_arms(runs)
    assert {arm: list(seeds) for arm, seeds in arms.items()} == {"original": [0, 1, 2, 3], "diff": [0, 1, 2, 3]}
    measured = measure_evaluations(arms, [])[0]
    assert measured.headline == ["1x2x2 positive", "1x4x4 positive"]
    assert measured.chance == {"1x2x2 positive": 1 / 4, "1x4x4 positive": 1 / 16}
    (found,) = contrasts(measured)
    test = stats.ttest_rel(rates["diff"], rates["original"])
    low, high = (100 * bound for bound in test.confidence_interval(0.95))
    pooled = found.pooled("")
    assert pooled == ("all seeds", pytest.approx(21.875), pytest.approx(low), pytest.approx(high))
    assert found.test("")["p"] == pytest.approx(test.pvalue)
    text = answer(arms, measured)
    assert text.startswith("diff answers 62.5 % and original 40.6 % of the questions right")
    assert f"95 % interval {low:+.1f} to {high:+.1f}, paired t test over 4 seeds" in text
    assert text.endswith("no difference is shown." if test.pvalue >= 0.05 else "diff is better.")


def test_more_questions_do_not_narrow_the_interval_over_seeds():
    """Only the means of the seeds count: the pooled interval does not depend on the intervals over questions."""
    means = [1.0, 4.0, 2.0]
    wide, narrow = (
        Contrast("b", "a", [0, 1, 2], {"": [Difference("", m, m - width, m + width) for m in means]})
        for width in (30, 0.1)
    )
    assert wide.pooled("") == narrow.pooled("")
    assert Contrast("b", "a", [0, 1], {"": [Difference("", m, m, m) for m in (1.0, 2.0)]}).pooled("").low is None


def test_equal_differences_leave_no_interval(folder):
    """With few questions every seed often has the same difference; a t test would treat it as certain."""
    equal = Contrast("b", "a", [0, 1, 2], {"": [Difference("", 2.5, 0.0, 5.0)] * 3})
    assert equal.test("") is None and equal.pooled("") == ("all seeds", 2.5, None, None)
    runs = [add_seed(f"runs/{arm}_seed0", seed, right) for arm, right in RIGHT.items() for seed in range(3)]
    arms = read_arms(runs)
    text = answer(arms, measure_evaluations(arms, [])[0])
    assert text.endswith("+25.0 points in each of 3 seeds, which leaves no spread to test against.")


def test_too_few_seeds_show_no_difference(folder):
    arms = read_arms([Path("runs/original_seed0"), Path("runs/diff_seed0")])
    one = answer(arms, measure_evaluations(arms, [])[0])
    assert "over the questions of this seed" in one and one.endswith("1 seed cannot show a difference, 3 are needed.")
    for run in ("runs/original_seed0", "runs/diff_seed0"):
        add_seed(run, 1)
    arms = read_arms(sorted(Path("runs").glob("*_seed?")))
    two = answer(arms, measure_evaluations(arms, [])[0])
    assert "interval" not in two and two.endswith("2 seeds cannot show a difference, 3 are needed.")


def test_the_interval_of_a_mean_of_settings():
    """For symmetric intervals MOVER is the root of the sum of squares."""
    found = average("x", [Difference("", 2.0, -1.0, 5.0), Difference("", 6.0, 2.0, 10.0)])
    assert found == ("x", 4.0, pytest.approx(4 - 2.5), pytest.approx(4 + 2.5))
    assert average("x", [Difference("", 2.0, None, None), Difference("", 6.0, 2.0, 10.0)]).low is None


@pytest.mark.parametrize("arm", ["original", "diff"])
def test_a_page_of_one_run(folder, arm):
    page = check(make_report.make_page([Path(f"runs/{arm}_seed0")]))
    assert "there is no second arm" in page.text
    assert ("lambda" in page.headings) == ("Attention maps" in page.headings) == (arm == "diff")
    assert "minus" not in page.text and "Confusion" in page.headings


def test_several_runs_of_one_arm(folder):
    arms = read_arms([Path("runs/original_seed0"), *(add_seed("runs/original_seed0", s, s / 4) for s in (1, 2))])
    text = answer(arms, measure_evaluations(arms, [])[0])
    assert re.search(r"original answers [\d.]+ % of .* \(95 % interval [\d.]+ % to [\d.]+ %, 3 seeds\)", text)
    assert "uniform guess reaches 15.6 %" in text and "no second arm" in text


def test_an_unfinished_run_is_shown_and_not_counted(folder):
    run = add_seed("runs/diff_seed0", 1)
    for name in ("final", "plots", "eval", "attention.safetensors"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    runs = [Path("runs/original_seed0"), Path("runs/diff_seed0"), run]
    arms = read_arms(runs)
    assert list(measure_training(arms).rates["diff"]) == [0]
    page = check(make_report.make_page(runs))
    assert "unfinished after 2 updates" in page.text and "1 seed cannot show a difference" in page.text


def test_a_run_that_has_logged_nothing_yet(folder):
    run = Path("runs/started")
    run.mkdir()
    shutil.copy("runs/diff_seed0/run.json", run)
    page = check(make_report.make_page([run]))
    assert "No answer yet: 0 of 1 runs are finished" in page.text and "unfinished after 0 updates" in page.text


def test_runs_that_were_not_evaluated_are_compared_by_their_last_evaluation(folder):
    shutil.rmtree("runs/diff_seed0/eval")
    page = check(make_report.make_page([Path("runs/original_seed0"), Path("runs/diff_seed0")]))
    assert "(the runs' last evaluation" in page.text and "runs/diff_seed0 has none" in page.text
    assert "Wrong answers among the samples" in page.text


def test_the_answer_is_about_final_weights_and_the_protocol_of_training(folder):
    """For any names of other evaluations, since best/ was chosen on rows of the test sets."""
    runs = [Path("runs/original_seed0"), Path("runs/diff_seed0")]
    for run in runs:
        copies = {f"best-{EVALUATION}": "finetuned", "a-quadrant": "quadrant", "best-a": "finetuned"}
        for name, protocol in copies.items():
            copy = shutil.copytree(run / "eval" / EVALUATION, run / "eval" / name)
            record = read_json(copy / "eval.json")
            record["config"]["protocol"] = protocol
            write_json(copy / "eval.json", record)
    names = [measured.name for measured in measure_evaluations(read_arms(runs), [])]
    assert names[:-1] == [EVALUATION, "a-quadrant", "best-a", f"best-{EVALUATION}"]
    assert "rank" in names[-1]


def test_a_run_that_subtracts_no_map_or_saved_no_attention_has_no_figure_of_it(folder):
    run, notes = Path("runs/diff_seed0"), []
    (run / "signed_maps.safetensors").unlink()
    arms = read_arms([run])
    assert make_report.section_maps(arms, notes) == [] and "stores no second map" in notes[0]
    assert len(make_report.section_share(arms, [], arm_styles(arms), notes)) == 1  # the applied map is there
    (run / "attention.safetensors").unlink()
    assert make_report.section_maps(arms, notes) == make_report.section_share(arms, [], arm_styles(arms), notes) == []


def test_arms_are_told_apart_by_their_hyperparameters(folder):
    other = Path("runs/other")
    shutil.copytree("runs/diff_seed0", other)
    runs = [Path("runs/diff_seed0"), other]
    with refused("runs/diff_seed0", "runs/other", "same arm"):
        read_arms(runs)
    record = read_json(other / "run.json")
    record["config"] |= {"lr": 0.5, "log_every": 7}  # the second one does not change what is computed
    write_json(other / "run.json", record)
    assert list(read_arms(runs)) == [f"diff, lr {read_json(runs[0] / 'run.json')['config']['lr']}", "diff, lr 0.5"]
    first = next(iter(read_arms([*runs, Path("runs/original_seed0")])))
    assert first == "original"


def test_what_is_no_run_is_refused(folder):
    with refused("runs/eval/run.json"):
        make_report.make_page([Path("runs/eval")])
    with open("runs/diff_seed0/metrics.jsonl", "a") as log:
        log.write("{\n")
    with refused("runs/diff_seed0/metrics.jsonl, line"):
        make_report.make_page([Path("runs/diff_seed0")])


def test_answers_and_prompts_are_text_not_markup(folder):
    file = Path("runs/original_seed0/eval") / EVALUATION / "answers.jsonl"
    rows = [json.loads(line) | {"response": "<script>alert(1)</script>"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = check(make_report.make_page([Path("runs/original_seed0")]))
    assert "<script>alert(1)</script>" in page.text  # escaped in the page itself, which holds no such element


def test_images_outside_of_the_data_are_not_opened(folder):
    secret = folder / "secret.png"
    Image.new("RGB", (8, 8), "red").save(secret)
    assert make_report.read_image(str(secret), [folder / "runs"]) is None
    assert make_report.read_image(str(secret), [folder / "runs", folder]).size == (8, 8)
    assert make_report.read_image("missing.png", [folder]) is None


def test_answered_against_true_cells():
    def row(truth: str, response: str | None, kind: str = "positive") -> dict:
        return {"ground_truth": truth, "response": response, "kind": kind, "shape": (1, 2, 1)}

    rows = [row("1, 1, 2", "1, 1, 2"), row("1, 1, 2", "1, 2, 1"), row("1, 1, 2", "-1"), row("1, 1, 2", "a cat")]
    rows += [row("0, 0, 0", "-1", "negative"), row("0, 0, 0", None, "negative")]
    found = make_report.confusion(rows)
    assert found.shape == (5, 6)
    assert found[1].tolist() == [0, 0.25, 0.25, 0, 0.25, 0.25] and found[4].tolist() == [0, 0, 0, 0, 0.5, 0.5]
    assert np.isnan(found[[0, 2, 3]]).all()
    other = np.full((5, 6), np.nan)
    other[0, 0] = 1
    assert make_report.nan_mean([found, other])[[0, 1]].tolist()[0][0] == 1
    assert make_report.nan_mean([found, other])[1].tolist() == found[1].tolist()


def test_every_arm_has_a_look_of_its_own():
    found = arm_styles("abcdefghijklmnopqrst")
    assert len({(look["color"], look["marker"]) for look in found.values()}) == 20
    assert [name for name, look in found.items() if look["color"] == "#000000"] == ["a"] and arms_.TRAINING


def test_several_arms_are_adjusted_by_holm():
    def rates(differences: list[float]) -> dict:
        return {seed: {"a": {"mean": d, "low": None, "high": None}} for seed, d in enumerate(differences)}

    of_arms = {"b": rates([0.01, 0.02, 0.015]), "c": rates([0.01, -0.02, 0.01])}
    measured = Measured("training", {"a": {}, "b": {}, "c": {}}, {}, ["a"], of_arms)
    found = contrasts(measured)
    raw = [contrast.test("")["p"] for contrast in found]
    assert [contrast.holm_p for contrast in found] == [pytest.approx(2 * min(raw)), pytest.approx(max(raw))]
    assert [contrast.arm for contrast in found] == ["b", "c"] and {contrast.baseline for contrast in found} == {"a"}


def test_the_table_of_one_headline_group_shows_the_p_value_of_the_answer():
    def rates(values: list[float]) -> dict:
        return {seed: {"a": {"rate": r, "n": 100, "low": r, "high": r}} for seed, r in enumerate(values)}

    def differences(values: list[float]) -> dict:
        return {seed: {"a": {"mean": d, "low": None, "high": None}} for seed, d in enumerate(values)}

    arms = {"standard": rates([0.5] * 3), "b": rates([0.51, 0.52, 0.515]), "c": rates([0.51, 0.48, 0.51])}
    of_arms = {"b": differences([0.01, 0.02, 0.015]), "c": differences([0.01, -0.02, 0.01])}
    measured = Measured("training", arms, {}, ["a"], of_arms)
    first = contrasts(measured)[0]
    lines = "".join(make_report.section_difference(measured, arm_styles(arms)))
    assert format_p(first.holm_p) != format_p(first.test("")["p"])
    assert format_p(first.holm_p) in lines and 'Holm p: of "a" adjusted for the number of arms.' in unescape(lines)


def test_runs_that_were_asked_other_questions_are_named(folder):
    """They are named in the notes of the page, which shows the rest."""
    file = Path("runs/diff_seed0/eval") / EVALUATION / "eval.json"
    record = read_json(file)
    record["config"]["seed"] = 9
    write_json(file, record)
    notes = []
    measured = measure_evaluations(read_arms([Path("runs/original_seed0"), Path("runs/diff_seed0")]), notes)
    assert EVALUATION not in [found.name for found in measured] and "differ in config, seed" in notes[0]
