"""eval_mmnih.py end to end: three benchmarks, several models and processes, interruption and resuming, comparison."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_answering import timeless

import eval_mmnih
from adapters import save_differential
from diagnostics import needle_share
from differential_attention import differential_parameters
from errors import UserError
from eval_mmnih import Config
from files import lock_folder, read_json, write_json
from haystack import read_pool
from modeling_gemma import PaliGemmaForConditionalGeneration
from needle_eval import mm_niah, mmneedle, pope
from needle_eval.folder import evaluation_name, fill_defaults, hash_weights, output_folder, slug
from needle_eval.mmneedle_build import build_haystacks
from needle_eval.mmneedle_prompts import Setting
from needle_eval.plots import cells_title, draw_side_by_side, needles_label

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*flags: str, capsys=None) -> str:
    """Run the script's main in this process. Returns what it prints."""
    argv, sys.argv = sys.argv, ["eval_mmnih.py", *map(str, flags)]
    try:
        eval_mmnih.main()
    finally:
        sys.argv = argv
    return capsys.readouterr().out if capsys else ""


def refused(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        evaluate(*flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: "), message
    return message


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_mmneedle_on_the_included_images(tiny_model, folder, capsys):
    out = evaluate(f"--model={tiny_model}", "--samples=6", "--output_dir=out", "--attention=2", capsys=capsys)
    assert "benchmark mmneedle, data haystack" in out and "protocol finetuned" in out and "caption absent, n = 6" in out
    assert "first prompt: 'answer en where is " in out and "2x2: 16 px, 2 patches" in out
    rows, scores = rows_of(folder / "out"), read_json(folder / "out" / "scores.json")
    assert [row["setting"] for row in rows] == ["1x2x2"] * 12 + ["1x4x4"] * 12
    assert scores["benchmark"] == "mmneedle" and scores["config"]["protocol"] == "finetuned"
    assert {row["benchmark"] for row in rows} == {"mmneedle"} and {row["protocol"] for row in rows} == {"finetuned"}
    positive = scores["scores"]["1x4x4"]["positive"]
    assert (
        positive["n"] == 6 and len(positive["cells"]) == 16 and {"right", "n", "low", "high"} <= set(positive["exact"])
    )
    shares = scores["attention on the needle"]["1x2x2"]
    assert len(shares["share"]) == 2 and shares["even"] == 0.25 and all(0 < s < 1 for s in shares["share"])
    for name in ("cells.png", "accuracy.png"):
        assert Image.open(folder / "out" / "plots" / name).size[0] > 300
    lost = [row for row in rows if (row["setting"], row["kind"]) != ("1x4x4", "positive")]  # of one model and setting
    scores = {"some": mmneedle.score(lost), "all": mmneedle.score(rows), "half": mmneedle.score(rows[:12])}
    draw_side_by_side(scores, folder / "lost.png", "")
    assert Image.open(folder / "lost.png").size[0] > 300
    assert sorted(f.parent.name for f in (folder / "out" / "response").rglob("*_1_4_4.json")) == [
        "COCO_val2014_0_5", "COCO_val2014_5000_5005",
    ]  # fmt: skip
    before = (folder / "out" / "scores.json").read_text()
    assert evaluate("--score=out", capsys=capsys).split("1x2x2", 1)[1] in out, "the same table from the files alone"
    assert (folder / "out" / "scores.json").read_text() == before


@pytest.mark.parametrize(
    ("protocol", "count", "prompt"),
    [
        ("official", 12, "Given 1 image indexed from 1 to 1, each divided into 2*2 subimages, identify"),
        ("rank", 12, "answer en where is"),
        ("quadrant", 12, "Caption: "),
        ("detect", 12, "detect "),
    ],
)
def test_every_protocol(tiny_model, folder, capsys, protocol, count, prompt):
    out = evaluate(
        f"--model={tiny_model}", f"--protocol={protocol}", "--samples=6", "--grids=2", "--output_dir=out", capsys=capsys
    )
    rows, scores = rows_of(folder / "out"), read_json(folder / "out" / "scores.json")["scores"]["1x2x2"]
    assert len(rows) == count and all(row["prompt"].startswith(prompt) for row in rows)
    assert f"protocol {protocol}" in out and scores["positive"]["n"] == 6
    if protocol == "rank":
        assert {row["response"] for row in rows} <= {"1, 1, 1", "1, 1, 2", "1, 2, 1", "1, 2, 2", "-1"}
    assert ("negative" in scores) == (protocol != "quadrant")


def test_quadrant_needs_no_other_flag(tiny_model, folder, capsys):
    out = evaluate(f"--model={tiny_model}", "--protocol=quadrant", "--samples=4", capsys=capsys)
    assert "1x2x2" in out and "1x4x4" not in out
    (place,) = (folder / "runs" / "eval").glob("*/*")
    assert place.name == "mmneedle-quadrant-haystack-samples_4"
    assert read_json(place / "eval.json")["config"]["grids"] == [2]


def test_other_settings_are_in_another_folder(tiny_model, folder, capsys):
    """Once the second of these was refused, because the folder's name did not contain the settings."""
    flags = (f"--model={tiny_model}", "--grids=2", "--samples=3")
    for more in ([], ["--needles=2"], ["--images", "1", "2"], ["--prefix=hm ", "--seed=1"], ["--per_cell=0"]):
        evaluate(*flags, *more)
    names = sorted(place.name for place in (folder / "runs" / "eval").glob("*/*"))
    start = "mmneedle-finetuned-haystack"
    assert names == [
        f"{start}-prefix_hm-samples_3-seed_1-grids_2",
        f"{start}-samples_3-grids_2",
        f"{start}-samples_3-grids_2-needles_2",
        f"{start}-samples_3-images_1_2-grids_2",
    ]
    assert evaluation_name(fill_defaults(Config(), mmneedle), mmneedle) == start, (
        "the name of an evaluation at its defaults"
    )
    assert (
        evaluation_name(fill_defaults(Config(protocol="quadrant"), mmneedle), mmneedle) == "mmneedle-quadrant-haystack"
    )
    assert evaluation_name(Config(benchmark="pope", samples=5), pope) == "pope-samples_5"


def test_several_images_and_needles(tiny_model, folder, capsys):
    flags = ("--images", "1", "3", "--grids", "2", "--needles", "1", "2", "--samples=4")
    out = evaluate(f"--model={tiny_model}", *flags, "--attention=2", "--output_dir=out", capsys=capsys)
    result = read_json(folder / "out" / "attention.json")
    assert set(result) == {"1x2x2", "3x2x2"} and result["3x2x2"]["even"] == 1 / 12 and result["3x2x2"]["n"] == 2
    assert "several images per prompt: PaliGemma" in out and "individual exact" in out
    scores = read_json(folder / "out" / "scores.json")["scores"]
    assert list(scores) == ["1x2x2", "1x2x2 K=2", "3x2x2", "3x2x2 K=2"]
    assert (
        len(scores["3x2x2"]["positive"]["depths"]) == 3 and scores["3x2x2"]["baselines"]["uniform"]["exact"] == 1 / 12
    )
    assert Image.open(folder / "out" / "plots" / "depths.png").size[0] > 200
    rows = rows_of(folder / "out")
    assert {len(row["images"]) for row in rows if row["setting"].startswith("3x")} == {3}
    two, one = scores["1x2x2 K=2"]["positive"], scores["1x2x2"]["positive"]
    assert cells_title("1x2x2 K=2", two) == "1x2x2 K=2\n8 needles in 4 questions"
    assert cells_title("1x2x2", one) == "1x2x2\nn = 4"
    assert needles_label({"a": one, "b": two}) == "needles found, each counted for itself"
    assert needles_label({"a": one}) == "exact answers"
    assert all(row["ground_truth"].count("; ") == 1 for row in rows if row["setting"].endswith("K=2"))


def test_models_side_by_side_and_compared(tiny_model, folder, capsys):
    models = [tiny_model, ROOT / "assets" / "paligemma-nano"]
    out = evaluate(
        "--model", *models, "--protocol=detect", "--samples=12", "--grids=2", "--output_dir=out", capsys=capsys
    )
    places = [folder / "out" / slug(str(model)) for model in models]
    assert all((place / "answers.jsonl").exists() for place in places) and "paligemma-nano" in out
    figure = next(folder.glob("out/*-accuracy.png"))
    assert f"side by side: {figure.relative_to(folder)}" in out, "announced, and in no model's own folder"
    own = [(place / "plots" / "accuracy.png").read_bytes() for place in places]
    assert own[0] != own[1] != figure.read_bytes() and Image.open(figure).size[0] > 300
    result = evaluate("--compare", *places, capsys=capsys)
    written = Path("runs/comparisons") / f"{slug(str(places[1]))}-against-{slug(str(places[0]))}.json"
    assert f"written: {written}" in result
    found = read_json(written)["by pair"][0]["1x2x2 positive"]
    assert found["second"]["right"] >= 8 > found["first"]["right"], "the included model finds, a random one does not"
    assert found["only second"] - found["only first"] == found["second"]["right"] - found["first"]["right"]
    assert found["p"] < 0.05 and found["difference"]["low"] > 0 and "McNemar p = " in result


def seeded_run(root: Path, arm: str, seed: int, right: int):
    """A run folder for `--compare`: run.json and one evaluation."""
    run = root / f"{arm}_seed{seed}"
    place = run / "eval" / "mmneedle-finetuned-haystack"
    place.mkdir(parents=True)
    write_json(run / "run.json", {"config": {"seed": seed}})
    write_json(place / "eval.json", {"benchmark": "mmneedle"})
    row = {
        "setting": "1x2x2",
        "kind": "positive",
        "protocol": "finetuned",
        "shape": [1, 2, 1],
        "row": 0,
        "ground_truth": "1, 1, 1",
    }
    lines = [json.dumps(row | {"id": str(i), "response": "1, 1, 1" if i < right else "-1"}) for i in range(20)]
    (place / "answers.jsonl").write_text("\n".join(lines) + "\n")


def test_arms_are_compared_over_seeds(folder, capsys):
    for seed, (a, b) in enumerate([(10, 12), (8, 12), (12, 13)]):
        seeded_run(folder, "original", seed, a)
        seeded_run(folder, "diff", seed, b)
    out = evaluate("--compare", "original_seed*", "diff_seed*", capsys=capsys)
    result = read_json("runs/comparisons/diff_seed--against-original_seed-.json")
    over = result["over seeds"]["1x2x2 positive"]
    assert [Path(a).parts[0] for a, _ in result["pairs"]] == ["original_seed0", "original_seed1", "original_seed2"]
    assert over["first"]["mean"] == pytest.approx(0.5) and over["difference"]["mean"] == pytest.approx(7 / 60)
    # differences .1, .2, .05: mean .11667, sd .07638, t = 2.646 on 2 degrees of freedom
    assert over["difference"]["p"] == pytest.approx(0.1181, abs=2e-4) and "over 3 seeds" in out
    (folder / "diff_seed2").rename(folder / "diff_seed7")
    assert "nothing*" in refused(capsys, "--compare", "original_seed?", "nothing*")
    write_json(folder / "diff_seed7" / "run.json", {"config": {"seed": 7}})
    assert "seeds [0, 1, 2] and [0, 1, 7] cannot be paired" in refused(
        capsys, "--compare", "original_seed*", "diff_seed*"
    )


def test_runs_with_more_evaluations_are_compared_by_the_one_that_both_have(folder, capsys):
    for arm in ("original", "diff"):
        seeded_run(folder, arm, 0, 10)
        own = folder / f"{arm}_seed0" / "eval"
        shutil.copytree(own / "mmneedle-finetuned-haystack", own / "knockout-mmneedle-finetuned-haystack")
    out = evaluate("--compare", "original_seed0", "diff_seed0", capsys=capsys)
    assert "diff_seed0/eval/mmneedle-finetuned-haystack against" in out
    for arm in ("original", "diff"):
        shutil.copytree(
            folder / f"{arm}_seed0/eval/mmneedle-finetuned-haystack", folder / f"{arm}_seed0/eval/mmneedle-official"
        )
    assert "give the one folder of answers" in refused(capsys, "--compare", "original_seed0", "diff_seed0")


def test_a_folder_without_any_valid_response_is_scored(tiny_model, folder):
    evaluate(f"--model={tiny_model}", "--samples=4", "--grids=2", "--output_dir=a")
    rows = [json.loads(line) for line in (folder / "a" / "answers.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"response": None}) + "\n" for row in rows)
    (folder / "a" / "answers.jsonl").write_text(text)
    evaluate("--score", "a", "--skip_none=True")
    assert read_json("a/scores.json")["skip_none"] is True


def test_seeds_in_different_settings_are_refused(folder, capsys):
    for seed in (0, 1):
        for arm in ("original", "diff"):
            seeded_run(folder, arm, seed, 10)
            if seed:
                file = folder / f"{arm}_seed1/eval/mmneedle-finetuned-haystack/answers.jsonl"
                file.write_text(file.read_text().replace("1x2x2", "1x4x4"))
    assert "different settings" in refused(capsys, "--compare", "original_seed*", "diff_seed*")


def test_folders_are_scored_whole_and_each_for_itself(tiny_model, folder, capsys):
    evaluate(f"--model={tiny_model}", "--samples=4", "--grids=2", "--output_dir=a")
    shutil.copytree("a", "b")
    lines = (folder / "b" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    text = "".join(json.dumps(row | {"response": row["ground_truth"]}) + "\n" for row in rows)
    (folder / "b" / "answers.jsonl").write_text(text)
    out = evaluate("--score", "a", "b", capsys=capsys)
    assert re.search(r"1x2x2 +a +b +uniform", out) and "100.0 [51.0, 100.0]" in out, "one model twice: two columns"
    assert read_json("a/scores.json")["skip_none"] is False
    evaluate("--score", "a", "--skip_none=True")
    assert read_json("a/scores.json")["skip_none"] is True
    (folder / "b" / "answers.jsonl").write_text("\n".join(lines[:5]) + "\n")
    assert "b: 5 answers to 8 questions: run the evaluation again" in refused(capsys, "--score", "b")


def write_pope(folder: Path):
    """POPE's three files with eight questions each, one of them about a missing image."""
    (folder / "images").mkdir()
    for image in read_pool(splits=("test_style",))[:3]:
        image.open().convert("RGB").save(folder / "images" / f"{image.concept}.jpg")
    names = sorted(path.name for path in (folder / "images").iterdir())
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": i,
                "image": names[i % 3],
                "text": f"Is there a cat in the image? {i}",
                "label": ["yes", "no"][i % 2],
            }
            for i in range(8)
        ]
        rows[7]["image"] = "lost.jpg"
        (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_pope(tiny_model, folder, capsys):
    write_pope(folder)
    out = evaluate(f"--model={tiny_model}", "--benchmark=pope", "--data=.", "--image_folder=images", capsys=capsys)
    place = folder / "runs" / "eval" / slug(str(tiny_model)) / "pope"
    result = read_json(place / "scores.json")
    assert result["benchmark"] == "pope" and result["scores"]["popular"]["n"] == 8 and len(result["broken"]) == 3
    assert "lost.jpg" in result["broken"][0] and result["scores"]["popular"]["broken"] == 1 and "always yes" in out
    assert "--image_folder" in refused(capsys, f"--model={tiny_model}", "--benchmark=pope", "--data=.")
    (folder / "none").mkdir()
    message = refused(
        capsys, f"--model={tiny_model}", "--benchmark=pope", "--data=.", "--image_folder=none", "--output_dir=x"
    )
    assert "none of 4 images exists" in message and not (folder / "x").exists()


def test_mm_niah(tiny_model, folder, capsys):
    """Rows of every task in the released schema; one document is longer than the model and counts as wrong."""
    (folder / "niah").mkdir()
    image = read_pool(splits=("test_style",))[0]
    image.open().convert("RGB").save(folder / "niah" / "a.jpg")
    for task in mm_niah.TASKS:
        answer = [1] if task.startswith("counting") else "oak"
        for number in range(2):
            meta = {"placed_depth": 0.5, "context_length": 1500, "choices": None, "choices_image_path": None}
            text = "word " * 3000 if number and task == "retrieval-text" else "Some words."
            row = {"id": number, "images_list": ["a.jpg"], "context": f"{text}\n<image>", "question": "Which tree?"}
            with open(folder / "niah" / f"{task}.jsonl", "a") as file:
                file.write(json.dumps(row | {"answer": answer, "meta": meta}) + "\n")
    flags = (f"--model={tiny_model}", "--benchmark=mm-niah", "--output_dir=out")
    assert "--data=haystack: give the folder or a file of the released MM-NIAH" in refused(capsys, *flags)
    evaluate(*flags, "--data=niah", capsys=capsys)
    rows, found = rows_of(folder / "out"), read_json(folder / "out" / "scores.json")
    assert found["benchmark"] == "mm-niah" and len(rows) == 12 and set(found["scores"]["tasks"]) == set(mm_niah.TASKS)
    assert not any("<image>" in row["prompt"] for row in rows)
    assert [row["id"] for row in rows if row["response"] is None] == ["mm-niah/retrieval-text/1"]
    assert found["scores"]["tasks"]["retrieval-text"]["broken"] == 1 and "the model has" in found["broken"][0]
    assert len(list((folder / "out" / "response").glob("*_*-val.jsonl"))) == 6


def test_a_folder_of_the_release_is_read_in_place(tiny_model, folder, capsys):
    """A folder built from the included images has the release's files: given as --data it is the same benchmark."""
    flags = (f"--model={tiny_model}", "--samples=5", "--grids=2", "--protocol=official")
    evaluate(*flags, "--output_dir=built")
    release = next((folder / "runs" / "haystacks").glob("included-*"))
    shutil.move(release, folder / "release")
    out = evaluate(*flags, "--data=release", "--output_dir=read", capsys=capsys)
    built, read = (
        [(r["id"], r["response"], r["ground_truth"]) for r in rows_of(folder / name)] for name in ("built", "read")
    )
    assert built == read and "data release" in out
    assert rows_of(folder / "read")[0]["images"][0].startswith("release/images_stitched/2_2/")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("batch_size=0", "int >= 1"), ("workers=-2", "int >= -1"), ("samples=-1", "int >= 0"), ("cell=-4", "int >= 0")]
    + [("attention=-1", "int >= 0"), ("per_cell=-1", "int >= 0"), ("cell=1000000", "int <= 4096")]
    + [("seed=99999999999999999999", "an integer of at most 64 bits"), ("images=0", "int >= 1")]
    + [("grids=100000", "int <= 1000"), ("needles=-2", "int >= 1")],
)
def test_numbers_that_no_run_can_have_are_refused(folder, capsys, flag, expected):
    message = refused(capsys, f"--{flag}")
    assert f"--{flag.partition('=')[0]}=" in message and f"expected {expected}" in message


def test_flags_that_would_be_ignored_are_refused(folder, capsys):
    assert "--model: give at least one" in refused(capsys, "--model")
    for flag in ("--protocol=detect", "--grids=2", "--cell=64", "--skip_none=True", "--attention=3", "--split=test"):
        message = refused(capsys, "--benchmark=pope", "--data=x", "--image_folder=x", flag)
        assert f"{flag.partition('=')[0]}: does not apply to --benchmark=pope" in message
    assert "--seed: does not apply to --benchmark=mm-niah" in refused(
        capsys, "--benchmark=mm-niah", "--data=x", "--seed=1"
    )
    assert "--image_folder: does not apply to --benchmark=mmneedle" in refused(capsys, "--image_folder=x")
    for flag in ("--seed=1", "--cell=64", "--split=test"):
        message = refused(capsys, "--data=MMNEEDLE", flag)
        assert f"{flag.partition('=')[0]}: does not apply to the released files of --data=MMNEEDLE" in message
    assert "--attention: is measured with one needle" in refused(capsys, "--needles", "2", "5", "--attention=3")
    assert "--protocol: does not apply to --compare" in refused(capsys, "--compare", "a", "b", "--protocol=rank")
    assert "--attention: does not apply to --score" in refused(capsys, "--score", "a", "--attention=3")
    assert "--score: does not apply to --compare" in refused(capsys, "--compare", "a", "b", "--score", "a")


# ---- continuing, processes
def test_evaluations_that_start_together_share_what_is_built(folder):
    """Each runs in its own process, like two models on two GPUs."""
    code = (
        "from eval_mmnih import Config; from needle_eval.mmneedle_build import Setting, build_haystacks; "
        "print(build_haystacks(Config(samples=150), Setting(1, 2)))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert len(list(folder.glob("runs/haystacks/*/images_stitched/2_2/*.png"))) == 150


NANO = [sys.executable, str(ROOT / "eval_mmnih.py"), "--samples=24", "--grids=2", "--batch_size=4"]


def test_an_interrupted_evaluation_of_pope_continues(tiny_model, folder, capsys):
    write_pope(folder)
    flags = [f"--model={tiny_model}", "--benchmark=pope", "--data=.", "--image_folder=images"]
    evaluate(*flags, capsys=capsys)
    file = folder / "runs" / "eval" / slug(str(tiny_model)) / "pope" / "answers.jsonl"
    whole = rows_of(file.parent)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    evaluate(*flags, capsys=capsys)
    assert timeless(rows_of(file.parent)) == timeless(whole)


def test_evaluations_that_asked_differently_are_not_compared(folder, capsys):
    for arm in ("original", "diff"):
        seeded_run(folder, arm, 0, 10)
    for record in ({"decoding": "ranked"}, {"config": {"cell": 128}}, {"benchmark": "pope"}):
        write_json(folder / "diff_seed0/eval/mmneedle-finetuned-haystack/eval.json", {"benchmark": "mmneedle"} | record)
        assert f"differ in {next(iter(record))}" in refused(capsys, "--compare", "original_seed0", "diff_seed0")


def test_a_folder_that_is_named_twice_is_scored_once(folder, capsys):
    seeded_run(folder, "original", 0, 10)
    place = "original_seed0/eval/mmneedle-finetuned-haystack"
    assert evaluate("--score", place, place, capsys=capsys) == evaluate("--score", place, capsys=capsys)


def test_two_evaluations_of_one_folder_at_once_are_refused(tiny_model, folder, capsys):
    (folder / "out").mkdir()
    lock = lock_folder(folder / "out")
    code = (
        "import sys, eval_mmnih; "
        f"sys.argv = ['x', '--model={tiny_model}', '--samples=4', '--grids=2', '--output_dir=out']; eval_mmnih.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "another process writes into it" in done.stderr
    lock.release()


def test_killed_and_continued_or_on_two_processes_the_answers_are_the_same(folder):
    def run(*flags: str, launcher=NANO[:1]):
        return subprocess.Popen([*launcher, *NANO[1:], *flags], env=ENVIRONMENT, stderr=subprocess.DEVNULL)

    assert run("--output_dir=whole").wait(300) == 0
    whole = rows_of(folder / "whole")
    killed = run("--output_dir=killed")
    file = folder / "killed" / "answers.jsonl"
    while killed.poll() is None and not (file.exists() and file.read_text().count("\n") >= 8):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    held = file.read_text().count("\n")
    assert 8 <= held < 48, "killed in the middle"
    assert run("--output_dir=killed").wait(300) == 0
    assert timeless(rows_of(folder / "killed")) == timeless(whole)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert run("--output_dir=two", launcher=torchrun).wait(300) == 0
    assert timeless(rows_of(folder / "two")) == timeless(whole)
    scores = [read_json(folder / name / "scores.json")["scores"] for name in ("whole", "killed", "two")]
    assert scores[0] == scores[1] == scores[2]


def test_another_evaluation_is_not_overwritten_unasked(tiny_model, folder, capsys):
    flags = (f"--model={tiny_model}", "--samples=2", "--grids=2", "--output_dir=out")
    evaluate(*flags)
    kept = (folder / "out" / "answers.jsonl").read_bytes()
    assert "protocol" in refused(capsys, *flags, "--protocol=official")
    assert (folder / "out" / "answers.jsonl").read_bytes() == kept
    (folder / "out" / "plots" / "depths.png").write_bytes(b"of other settings")
    evaluate(*flags, "--protocol=official", "--overwrite=True")
    assert not (folder / "out" / "plots" / "depths.png").exists() and (folder / "out" / "plots" / "cells.png").exists()
    assert rows_of(folder / "out")[0]["protocol"] == "official"


def test_trained_again_is_another_model(tiny_model, folder):
    run = folder / "run" / "final"
    (run / "adapter").mkdir(parents=True)
    write_json(run / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(tiny_model)})
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"one")
    write_json(run / "run.json", {"base_model": str(tiny_model)})
    before = hash_weights(str(run))
    assert before == hash_weights(str(run))
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"two")
    assert hash_weights(str(run)) != before
    for place in (run, run / "adapter"):  # of this repository, and of the bridge
        before = hash_weights(str(run))
        (place / "differential.safetensors").write_bytes(b"one")
        assert hash_weights(str(run)) != before
    shutil.copytree(tiny_model, folder / "base")
    file = next((folder / "base").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert hash_weights(str(folder / "base")) != hash_weights(str(tiny_model)), "trained again, of the same size"
    result = output_folder(fill_defaults(Config(), mmneedle), mmneedle, str(folder / "run"))
    assert result.parts[:2] == ("runs", "eval"), "an adapter that lies in no run writes nothing beside it"
    write_json(folder / "run" / "run.json", {"base_model": str(tiny_model)})
    assert (
        output_folder(fill_defaults(Config(), mmneedle), mmneedle, str(folder / "run"))
        == folder / "run/eval/mmneedle-finetuned-haystack"
    )


def test_knockout_answers_as_the_model_without_its_second_map(folder, capsys):
    nano = ROOT / "assets" / "paligemma-nano"
    model = PaliGemmaForConditionalGeneration.from_pretrained(nano, differential="split")
    with torch.no_grad():
        for name, parameter in differential_parameters(model).items():
            if name.endswith("second_up"):
                parameter.normal_(std=2.0)
    shutil.copytree(nano, folder / "split")
    save_differential(model, folder / "split")
    flags = ("--samples=8", "--grids", "2")
    evaluate(f"--model={nano}", *flags, "--output_dir=standard")
    evaluate("--model=split", *flags)
    evaluate("--model=split", *flags, "--knockout=True")
    trained, knocked = (folder / f"runs/eval/split/{name}mmneedle-finetuned-haystack" for name in ("", "knockout-"))
    trained, knocked = (next(f.parent.glob(f"{f.name}*")) for f in (trained, knocked))
    assert read_json(knocked / "eval.json")["weights"] == read_json(trained / "eval.json")["weights"] + ", lambda 0"
    answers = {f: [row["response"] for row in rows_of(f)] for f in (folder / "standard", trained, knocked)}
    assert answers[knocked] == answers[folder / "standard"] != answers[trained]
    assert "has standard attention" in refused(capsys, f"--model={nano}", *flags, "--knockout=True")
    out = evaluate("--score", trained, knocked, capsys=capsys)
    assert "split-lambda-0" in out and read_json(knocked / "scores.json")["knockout"] is True


def test_faults_are_one_line(tiny_model, folder, capsys):
    model = f"--model={tiny_model}"
    assert "metadata_stitched/annotations_1_2_2.json" in refused(capsys, model, "--data=nowhere")
    shutil.copytree(tiny_model, "short")
    config = read_json("short/config.json")
    config["text_config"]["max_position_embeddings"] = 100
    write_json("short/config.json", config)
    message = refused(capsys, "--model=short", "--images=10", "--grids=2", "--samples=10", "--output_dir=out")
    assert "10x2x2/0 and 19 other questions do not fit: 10 images of 16 tokens (32 px)" in message
    assert "the model has 100: take fewer images" in message
    assert not (folder / "out").exists(), "refused before anything is written"
    assert "--protocol=quadrant asks" in refused(capsys, model, "--protocol=quadrant", "--grids=4")
    assert "takes two runs" in refused(capsys, "--compare", "a", "b", "c")
    assert "takes two runs" in refused(capsys, "--compare") and "--score: give at least one" in refused(
        capsys, "--score"
    )
    assert "--skip_none: does not apply to --benchmark=pope" in refused(
        capsys, model, "--skip_none=True", "--benchmark=pope"
    )
    assert "--attention: needs a protocol" in refused(capsys, model, "--attention=3", "--protocol=detect")
    assert "there is no such folder" in refused(capsys, "--compare", "a", "b")
    assert "eval.json" in refused(capsys, "--score=.")


# ---- attention on the needle
def test_a_broken_image_stops_neither_answers_nor_attention(tiny_model, folder, capsys):
    flags = (f"--model={tiny_model}", "--samples=4", "--grids=2", "--attention=4")
    evaluate(*flags, "--output_dir=built")
    shutil.move(next((folder / "runs" / "haystacks").glob("included-*")), folder / "release")
    flags += ("--data=release", "--output_dir=out")  # a built folder would be built again
    evaluate(*flags)
    rows = rows_of(folder / "out")
    image = Path(next(row["images"][0] for row in rows if row["kind"] == "positive"))
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    out = evaluate(*flags, "--overwrite=True", capsys=capsys)
    result = read_json(folder / "out" / "scores.json")
    assert result["attention on the needle"]["1x2x2"]["n"] == 3 and "broken, counted wrong" in out
    assert len(result["broken"]) == 2 and image.name in result["broken"][0]
    image.write_bytes(whole)
    evaluate(*flags)
    assert timeless(rows_of(folder / "out")) == timeless(rows), "mended, it is asked again"


def test_what_fails_after_the_answers_costs_neither_them_nor_the_table(tiny_model, folder, capsys, monkeypatch):
    """Attention without enough memory, and official files on a full disk."""

    def raise_error(error):
        def fail(*_):
            raise error

        return fail

    flags = (f"--model={tiny_model}", "--samples=2", "--grids=2", "--attention=1", "--output_dir=out")
    with monkeypatch.context() as patch:
        patch.setattr(eval_mmnih, "measure_needle_attention", raise_error(torch.OutOfMemoryError("of 2 GB")))
        out = evaluate(*flags, capsys=capsys)
    assert "attention is not measured: the GPU is out of memory: lower --images (of 2 GB)" in out and "1x2x2" in out
    with monkeypatch.context() as patch:
        patch.setattr(mmneedle, "write_official", raise_error(OSError(errno.ENOSPC, "full")))
        assert f"{Path('out/response')}: cannot be written" in refused(capsys, "--score=out")
    evaluate("--score=out")


def test_the_share_is_that_of_the_cell_in_the_answer(tiny_model, folder, monkeypatch):
    """All attention on the cell of the first positive, which is off the diagonal."""
    flags = (f"--model={tiny_model}", "--samples=1", "--grids=4")
    evaluate(*flags, "--output_dir=asked")
    truth = next(row["ground_truth"] for row in rows_of(folder / "asked") if row["kind"] == "positive")
    _, row, column = (int(number) - 1 for number in truth.split(", "))
    assert row != column
    paid = torch.zeros(1, 2, 1, 1, 4, 4)  # parts, layers, batch, tokens; the tiny model has a patch per cell
    paid[..., row, column] = 1
    monkeypatch.setattr("needle_eval.needle_attention.answer_attention", lambda *_: paid.flatten(-2))
    evaluate(*flags, "--output_dir=measured", "--attention=1")
    assert read_json(folder / "measured" / "attention.json")["1x4x4"]["share"] == [1.0, 1.0]


def test_the_needle_s_share_of_a_made_map():
    paid = torch.zeros(2, 3, 2 * 16)  # layers, tokens, two images of 4 x 4 patches
    paid[0, :, 16 + 4 * 1 + 3] = 0.6  # second image, patch (1, 3): cell (0, 1) of 2 x 2
    paid[0, :, 0] = -0.2
    paid[1] = 1.0
    share = needle_share(paid, (1, 0, 1), images=2, grid=2)
    assert share.shape == (2, 3)
    torch.testing.assert_close(share[0], torch.full((3,), 0.75))
    torch.testing.assert_close(share[1], torch.full((3,), 1 / 8))
    assert needle_share(paid, (0, 0, 0), 2, 2)[0, 0] == pytest.approx(0.25)


def test_images_of_one_s_own(tiny_model, folder, capsys):
    (folder / "mine").mkdir()
    captions = {}
    for i, image in enumerate(read_pool(splits=("train",))[:120]):
        image.open().convert("RGB").save(folder / "mine" / f"{i}.png")
        captions[f"{i}.png"] = f"{image.caption} {i}"
    (folder / "mine" / "captions.json").write_text(json.dumps(captions))
    evaluate(
        f"--model={tiny_model}", "--data=haystack:mine", "--samples=3", "--grids=2", "--cell=32", "--output_dir=out"
    )
    rows = rows_of(folder / "out")
    assert len(rows) == 6 and Image.open(rows[0]["images"][0]).size == (64, 64)
    with pytest.raises(UserError, match="lost.png"):
        (folder / "mine" / "captions.json").write_text(json.dumps({"lost.png": "x"}))
        build_haystacks(Config(data="haystack:mine"), Setting(1, 2))
