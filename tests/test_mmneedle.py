"""MMNeedle's schema, prompts and response files; haystacks built in the same schema; the release, if available."""

import hashlib
import io
import json
import os
import pickle
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from PIL import Image

from errors import UserError
from haystack import ImagePool, PoolImage, needle_prompt, read_captioned_images, read_pool
from needle_eval import mmneedle, mmneedle_release
from needle_eval.mmneedle import score
from needle_eval.mmneedle_build import build_haystacks, name_of, write_haystacks
from needle_eval.mmneedle_prompts import (
    Setting,
    check_protocol,
    make_candidates,
    make_settings,
    official_prompt,
    quadrant_prompts,
)
from needle_eval.mmneedle_release import ground_truth_of, read_questions

RELEASE = Path(os.environ.get("MMNEEDLE_DATA", ""))
released = pytest.mark.skipif("MMNEEDLE_DATA" not in os.environ, reason="MMNEEDLE_DATA is not set")


def png(colour) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 12), colour).save(out, "PNG")
    return out.getvalue()


def flat_pool(count: int = 40) -> ImagePool:
    """Images of one opaque colour each, so that a single pixel tells what a cell shows."""
    colours = [(i, (i * 37) % 256, (i * 91) % 256) for i in range(count)]
    return ImagePool([PoolImage(png(c), f"colour {i}", str(i), "flat", "test") for i, c in enumerate(colours)])


def oracle(questions, change=lambda truth: truth) -> list[dict]:
    return [
        {
            "id": q.id,
            "setting": q.setting,
            "response": change(q.ground_truth),
            "ground_truth": q.ground_truth,
            **q.fields,
        }
        for q in questions
    ]


def absent_as_minus_one(truth: str) -> str:
    return "-1" if truth.startswith("0") else truth


# ---- prompts
def test_official_prompts_word_for_word():
    assert official_prompt(Setting(1, 2), ["A clock that is standing on a table."]) == (
        "Given 1 image indexed from 1 to 1, each divided into 2*2 subimages, identify the subimage that best matches "
        "the provided caption. Respond with 'index, row, column' and nothing else. For example, '1, 2, 3' indicates "
        "the subimage in the first image, second row, and third column. If no match is found, respond only with '-1'."
        "\nCaption: A clock that is standing on a table."
    )
    assert official_prompt(Setting(10, 1, 2), ["a ", "b"]) == (
        "Given 10 images indexed from 1 to 10, each divided into 1*1 subimage, identify the subimages that best match "
        "the provided 2 captions. Respond in the format: index_1, row_1, column_1; index_2, row_2, column_2. Only "
        "provide this information. For example, '1, 2, 3' indicates the subimage in the first image, second row, and "
        "third column. If no subimage matches a caption, respond with '-1' for that caption.\nCaption_1: a \n"
        "Caption_2: b"
    )


def test_short_prompts_are_those_of_training():
    assert needle_prompt("red apple") == "answer en where is red apple?"
    assert needle_prompt(" A dog\nruns. ", "A cat") == "answer en where is A dog runs; A cat?"
    asked = quadrant_prompts("A cat.")
    assert asked["rows"] == "Caption: A cat.. Where is the caption? Top or Bottom?"
    assert asked["columns"] == "Caption: A cat.. Where is the caption? Left or Right?"


def test_candidates_are_every_cell_and_none():
    assert make_candidates(Setting(1, 2)) == ("1, 1, 1", "1, 1, 2", "1, 2, 1", "1, 2, 2", "-1")
    assert len(make_candidates(Setting(10, 8))) == 641 and make_candidates(Setting(10, 8))[-2] == "10, 8, 8"


def test_settings():
    assert [str(s) for s in make_settings((1, 10), (1, 2), (1, 2))] == [
        "1x2x2", "1x2x2 K=2", "10x1x1", "10x1x1 K=2", "10x2x2", "10x2x2 K=2",
    ]  # fmt: skip
    assert Setting(10, 4, 5).annotations == "5_annotations_10_4_4.json"
    assert make_settings((1,), (2, 2), (1, 1)) == [Setting(1, 2)], "asked once"
    with pytest.raises(UserError, match="--needles=1"):
        mmneedle_release.first_per_cell([], Setting(1, 2, 2), 3)
    with pytest.raises(UserError, match="not 1 x 1 alone"):
        make_settings((1,), (1,), (1,))
    for protocol, setting in (("quadrant", Setting(1, 4)), ("detect", Setting(2, 2)), ("rank", Setting(1, 2, 2))):
        with pytest.raises(UserError, match=f"--protocol={protocol} asks"):
            check_protocol(protocol, setting)


# ---- the schema
@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 4, 1), (3, 2, 1), (10, 1, 1), (2, 3, 2), (10, 4, 1), (1, 4, 5)])
def test_flat_colours_decode_back_to_their_metadata(tmp_path, shape):
    """Row-major, 0-based; a needle only in the annotated cell, and in no cell for a negative."""
    pool, setting = flat_pool(250 if shape[0] == 10 else 40), Setting(*shape)
    write_haystacks(pool, tmp_path, setting, samples=12, seed=3, cell=8)
    metadata = json.loads((tmp_path / "metadata_stitched" / f"{shape[1]}_{shape[1]}.json").read_text())
    colours = {name_of(p): p.open().getpixel((0, 0)) for p in pool.images}
    captions = {name_of(p): p.caption for p in pool.images}
    for name, cells in metadata.items():
        pixels = np.asarray(Image.open(tmp_path / f"images_stitched/{shape[1]}_{shape[1]}" / name))
        assert pixels.shape == (8 * shape[1], 8 * shape[1], 3)
        for place, shown in cells.items():
            row, col = map(int, place.split("_"))
            assert tuple(pixels[8 * row + 4, 8 * col + 4]) == colours[shown]
            assert tuple(pixels[8 * row, 8 * col]) == colours[shown], "an opaque image fills its cell"
    questions = read_questions(tmp_path, setting, "official", samples=12)
    rows = json.loads((tmp_path / "metadata_stitched" / setting.annotations).read_text())
    assert len(questions) == 24 and [row["id"] for row in rows] == [*range(12), *range(5000, 5012)]
    for row, question in zip(rows, questions, strict=True):
        inside = [list(metadata[Path(path).name].values()) for path in row["image_ids"]]
        shown = [captions[name] for cells in inside for name in cells]
        assert len(question.images) == shape[0] and all(Path(path).is_file() for path in question.images)
        targets = row["target"] if shape[2] > 1 else [row["target"]]
        assert [captions[target] for target in targets] == question.fields["caption"]
        if row["id"] >= 5000:
            assert question.ground_truth == "; ".join(["0, 0, 0"] * shape[2]) and question.fields["kind"] == "negative"
            assert not set(question.fields["caption"]) & set(shown)
            continue
        for truth, target in zip(question.ground_truth.split("; "), targets, strict=True):
            m, r, c = (int(n) - 1 for n in truth.split(", "))
            assert metadata[Path(row["image_ids"][m]).name][f"{r}_{c}"] == target
            assert shown.count(captions[target]) == 1
    assert score(oracle(questions, absent_as_minus_one))[str(setting)]["positive"]["exact"]["rate"] == 1


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_haystacks(ImagePool(flat_pool().images), tmp_path / name, Setting(1, 2), samples=5, seed=1, cell=8)
    write_haystacks(flat_pool(), tmp_path / "c", Setting(1, 2), samples=5, seed=2, cell=8)
    files = [
        {f.relative_to(tmp_path / n): f.read_bytes() for f in (tmp_path / n).rglob("*") if f.is_file()} for n in "abc"
    ]
    assert files[0] == files[1] and files[0] != files[2]


def test_every_question_has_a_haystack_of_its_own_and_its_negative_the_same(tmp_path):
    write_haystacks(flat_pool(), tmp_path, Setting(10, 1), samples=100, seed=0, cell=4)
    rows = json.loads((tmp_path / "metadata_stitched/annotations_10_1_1.json").read_text())
    assert len({path for row in rows for path in row["image_ids"]}) == 1000
    for positive, negative in zip(rows[:100], rows[100:], strict=True):
        assert positive["image_ids"] == negative["image_ids"] and positive["target"] != negative["target"]


def test_names_of_images_stay_apart():
    images = [PoolImage(b"", "c", concept, "f", "test") for concept in ("a/b", "a-b", "a%2Fb")]
    assert len({name_of(p) for p in images}) == 3 and "/" not in name_of(images[0])


def test_a_pool_too_small_is_refused(tmp_path):
    with pytest.raises(UserError, match="need 65 captions, the pool has 40"):
        write_haystacks(flat_pool(), tmp_path / "a", Setting(1, 8), samples=2, seed=0, cell=4)
    with pytest.raises(UserError, match="4 captions are in one cell alone"):
        write_haystacks(flat_pool(), tmp_path / "b", Setting(1, 2, 5), samples=2, seed=0, cell=4)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of captioned images to evaluate on, in the working directory of an evaluation."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for i in range(60):
        Path(f"mine/{i:02}.png").write_bytes(png((i, i, i)))
        Path(f"mine/{i:02}.txt").write_text(f"a grey number {i}\n")
    return SimpleNamespace(data="haystack:mine", split="", cell=8, samples=4, seed=0)


def test_other_images_and_numbers_are_in_another_folder(photos):
    folders = [build_haystacks(photos, Setting(1, 2))]
    for name, value in (("cell", 9), ("samples", 5), ("seed", 1)):
        folders.append(build_haystacks(SimpleNamespace(**vars(photos) | {name: value}), Setting(1, 2)))
    folders.append(build_haystacks(photos, Setting(2, 2)))
    Path("mine/60.png").write_bytes(png((1, 2, 3)))
    Path("mine/60.txt").write_text(next(f"new {i}" for i in range(99) if is_for_testing(f"new {i}")))
    folders.append(build_haystacks(photos, Setting(1, 2)))
    assert len(set(folders)) == 6


def is_for_testing(caption: str) -> bool:
    return hashlib.sha256(caption.encode()).digest()[0] < 51


@pytest.mark.parametrize("change", ["swapped image", "broken annotations", "lost image", "half a folder"])
def test_built_haystacks_that_changed_are_built_again(photos, change, capsys):
    folder = build_haystacks(photos, Setting(1, 2))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    images = sorted(folder.rglob("*.png"))
    if change == "swapped image":
        images[0].write_bytes(images[1].read_bytes())
    elif change == "broken annotations":
        (folder / "metadata_stitched" / "annotations_1_2_2.json").write_text("[{}]")
    elif change == "lost image":
        images[0].unlink()
    else:
        (folder / "files.json").unlink()
    assert build_haystacks(photos, Setting(1, 2)) == folder
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert "its files have changed since they were built" in capsys.readouterr().out
    assert build_haystacks(photos, Setting(1, 2)) == folder and not capsys.readouterr().out


def test_too_few_captions_are_refused_with_the_number_needed(photos):
    for i in range(12, 60):
        Path(f"mine/{i:02}.txt").unlink()
    with pytest.raises(UserError, match="2 x 2 cells and 1 absent captions need 5 captions, split test has .*about 44"):
        build_haystacks(photos, Setting(1, 2))
    with pytest.raises(UserError, match="need 17 captions, split test has .* give about 118 captions"):
        build_haystacks(photos, Setting(1, 4))


def write_release(folder: Path, rows: list, captions: dict, name="annotations_1_2_2.json"):
    (folder / "metadata_stitched").mkdir()
    (folder / "metadata_stitched" / name).write_text(json.dumps(rows))
    (folder / "annotations_trainval").mkdir()
    (folder / "annotations_trainval" / "file_to_caption.pkl").write_bytes(pickle.dumps(captions))


GOOD = {"id": 0, "image_ids": ["images_stitched/2_2/s.jpg"], "index": 0, "row": 1, "col": 0, "target": "val2014/a.jpg"}


def test_broken_rows_become_questions_that_count_as_wrong(tmp_path):
    rows = [
        GOOD,
        GOOD | {"id": 1, "target": "val2014/lost.jpg"},
        GOOD | {"id": 2, "row": 2},
        {key: value for key, value in GOOD.items() if key != "image_ids"} | {"id": 3},
        GOOD | {"id": 4, "image_ids": ["a", "b"]},
        GOOD | {"id": 5000, "index": -1, "row": -1, "col": -1},
    ]
    write_release(tmp_path, rows, {"a.jpg": " A cat. "})
    questions = read_questions(tmp_path, Setting(1, 2), "official", samples=10)
    assert [q.fields["kind"] for q in questions] == ["positive"] * 5 + ["negative"]
    assert [bool(q.error) for q in questions] == [False, True, True, True, True, False]
    assert (
        "id 1: target val2014/lost.jpg has no caption" in questions[1].error
        and "is outside 1x2x2" in questions[2].error
    )
    assert questions[0].ground_truth == "1, 2, 1" and questions[0].prompt.endswith("Caption:  A cat. ")
    assert questions[0].images == (str(tmp_path / "images_stitched/2_2/s.jpg"),)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "link.png", "a/../../secret.png", "loop.png", "\0"])
def test_images_outside_the_release_are_not_opened(tmp_path, path):
    """A row with such an image becomes a question that counts as wrong, and its error names the path."""
    release = tmp_path / "release"
    release.mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (release / "link.png").symlink_to(tmp_path / "secret.png")
    (release / "loop.png").symlink_to(release / "loop.png")
    write_release(release, [GOOD, GOOD | {"id": 1, "image_ids": [path]}], {"a.jpg": "A cat"})
    good, bad = read_questions(release, Setting(1, 2), "official")
    assert not good.error and bad.images == () and "id 1: " in bad.error and path.strip("\0") in bad.error


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_captioned_images_outside_their_folder_are_refused(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "mine" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "mine" / "captions.json").write_text(json.dumps({name: "a secret"}))
    (tmp_path / "mine" / "rows.jsonl").write_text(json.dumps({"image": name, "caption": "a secret"}))
    for source in (tmp_path / "mine", tmp_path / "mine" / "rows.jsonl"):
        with pytest.raises(UserError, match=f"image {name}: is outside the folder"):
            read_captioned_images(source)


def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    write_release(tmp_path, [GOOD], {"a.jpg": "A cat"})
    file = tmp_path / "annotations_trainval" / "file_to_caption.pkl"

    class Bad:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file.write_bytes(pickle.dumps({"a.jpg": Bad()}))
    with pytest.raises(UserError, match="file_to_caption.pkl: refused"):
        read_questions(tmp_path, Setting(1, 2), "official")
    assert not (tmp_path / "ran").exists()
    file.write_bytes(pickle.dumps({"a.jpg": 3}))
    with pytest.raises(UserError, match="holds no file names and captions"):
        read_questions(tmp_path, Setting(1, 2), "official")


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="has no metadata_stitched/annotations_1_4_4.json"):
        read_questions(tmp_path, Setting(1, 4), "official")
    write_release(tmp_path, [{"row": 1}], {})
    with pytest.raises(UserError, match="annotations_1_2_2.json, row 1 has no id or index"):
        read_questions(tmp_path, Setting(1, 2), "official")


def test_a_repeated_id_is_refused(tmp_path):
    write_release(tmp_path, [GOOD, GOOD], {"a.jpg": "A cat"})
    with pytest.raises(UserError, match="annotations_1_2_2.json: the id 1x2x2/0 is there more than once"):
        read_questions(tmp_path, Setting(1, 2), "official")


def test_so_many_of_every_cell(tmp_path):
    write_haystacks(flat_pool(), tmp_path, Setting(1, 2), samples=40, seed=0, cell=4)
    questions = read_questions(tmp_path, Setting(1, 2), "quadrant", per_cell=3)
    assert len(questions) == 24 and {q.fields["kind"] for q in questions} == {"positive"}
    assert set(Counter(q.ground_truth for q in questions).values()) == {6}
    with pytest.raises(UserError, match="a cell has .* positives, not 40"):
        read_questions(tmp_path, Setting(1, 2), "quadrant", per_cell=40)


# ---- images of one's own
def test_images_of_a_folder_and_of_a_jsonl(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.png").write_bytes(png((i, i, i)))
        (tmp_path / f"{i:02}.txt").write_text(f"a grey number {i}\n")
    images = read_captioned_images(tmp_path)
    assert [p.caption for p in images] == [f"a grey number {i}" for i in range(60)]
    train, test = ([p.caption for p in images if p.split == split] for split in ("train", "test"))
    assert len(train) + len(test) == 60 and 4 <= len(test) <= 22 and not set(train) & set(test)
    (tmp_path / "05.txt").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="05.txt: cannot be read"):
        read_captioned_images(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"07.png": "seven", "03.png": "three"}))
    assert [p.caption for p in read_captioned_images(tmp_path)] == ["three", "seven"]
    (tmp_path / "rows.jsonl").write_text('{"image": "05.png", "caption": "five"}\n')
    assert read_captioned_images(tmp_path / "rows.jsonl")[0].open().getpixel((0, 0)) == (5, 5, 5)
    (tmp_path / "rows.jsonl").write_text('{"image": "05.png"}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: Object missing required field caption: give {image, caption}"):
        read_captioned_images(tmp_path / "rows.jsonl")
    (tmp_path / "captions.json").write_text(json.dumps({"lost.png": "gone"}))
    with pytest.raises(UserError, match="lost.png does not exist"):
        read_captioned_images(tmp_path)


def test_the_included_pool_is_drawn_on_colours():
    pool = ImagePool(read_pool(splits=("test_style",)))
    assert pool.resized(0, 64).mode == "RGBA" and pool.resized(0, 64).size == (56, 56)


# ---- response files
def official_scores(file: Path) -> dict:
    """An independent reading of a response file by the released scorer's rules, one needle."""
    index = exact = exist = n = 0
    for entry in json.loads(file.read_text()):
        if entry["response"] is None:
            continue
        n += 1
        result = entry["response"].replace("\n", "").strip().strip(".").strip()
        truth = "-1" if entry["ground_truth"] == "0, 0, 0" else entry["ground_truth"]
        index += result.split(", ")[0] == entry["ground_truth"].split(", ")[0]
        exact += result == truth
        exist += (truth == "-1") == (result == "-1")
    return {"index": index, "exact": exact, "existence": exist, "n": n}


def test_response_files_are_scored_alike_by_the_official_rule(tmp_path):
    write_haystacks(flat_pool(), tmp_path, Setting(1, 2), samples=30, seed=0, cell=4)
    rng = random.Random(0)
    rows = oracle(
        read_questions(tmp_path, Setting(1, 2), "official", samples=30),
        lambda truth: rng.choice([truth, "-1", "1, 1, 1.", "1", "", "No match", None, "-1, -1, -1"]),
    )
    mmneedle.write_official(rows, tmp_path / "response", "my_model/v2")
    result = score([row for row in rows if row["response"] is not None])["1x2x2"]
    for kind, folder in (("positive", "COCO_val2014_0_29"), ("negative", "COCO_val2014_5000_5029")):
        file = tmp_path / "response" / folder / "paligemma_my-model-v2_1_2_2.json"
        assert len(file.stem.split("_")) == 5
        theirs = official_scores(file)
        assert theirs["n"] == result[kind]["n"] < 30 and theirs["existence"] == result[kind]["existence"]["right"]
        if kind == "positive":
            assert [theirs[k] for k in ("index", "exact")] == [result[kind][k]["right"] for k in ("index", "exact")]
    entry = json.loads(file.read_text())[0]
    assert set(entry) == {"id", "response", "ground_truth", "target_path", "caption"} and entry["id"] == 5000


@pytest.mark.parametrize("model", ["many-needles_seed0", "NEEDLES", "runs/needles/2_needles"])
@pytest.mark.parametrize("needles", [1, 2])
def test_the_official_scorer_reads_the_setting_off_the_file_name_whatever_the_model_is_called(tmp_path, model, needles):
    """The released scorer splits a name at "_" and takes "needles" in it as the sign of several needles."""
    target = ["val2014/a.jpg"] * needles
    row = {"id": "x", "row": 0, "shape": [1, 2, needles], "kind": "positive", "protocol": "official"}
    row |= {"response": "-1", "ground_truth": "1, 1, 1", "target": target if needles > 1 else target[0]}
    (file,) = mmneedle.write_official([row | {"caption": ["a cat"] * needles}], tmp_path, model)
    parts = file.stem.split("_")
    assert ("needles" in file.name.lower()) == (needles > 1)
    assert len(parts) == (5 if needles == 1 else 7) and parts[2:5] == ["1", "2", "2"]
    assert needles == 1 or parts[5:] == ["needles", "2"]
    (entry,) = json.loads(file.read_text())
    assert entry["target_path"] == (["a.jpg"] * 2 if needles > 1 else "a.jpg")


# ---- the release
@released
def test_the_released_rows_read_as_they_are():
    golden = {
        0: ("7687", "1, 2, 2", "A clock that is standing on a table."),
        1: ("9999", "1, 2, 2", "Four bowls of different kinds of foods are shown. "),
        2: ("3909", "1, 1, 1", "A plate with two slices of pizza on a table with another plate and glass."),
        5000: ("1534", "0, 0, 0", "She is well prepared to participate in the tennis match."),
    }
    questions = read_questions(RELEASE, Setting(1, 2), "official", samples=5000)
    assert len(questions) == 10_000 and not any(bool(q.error) for q in questions)
    by_id = {q.fields["row"]: q for q in questions}
    for number, (stitched, truth, caption) in golden.items():
        assert by_id[number].images[0].endswith(f"images_stitched/2_2/COCO_val2014_stitched_{stitched}.jpg")
        assert (by_id[number].ground_truth, by_id[number].fields["caption"]) == (truth, [caption])
    for grid, (stitched, truth) in {4: ("4220", "1, 4, 1"), 8: ("8484", "1, 7, 2")}.items():
        first = read_questions(RELEASE, Setting(1, grid), "official", samples=1)[0]
        assert stitched in first.images[0] and first.ground_truth == truth


@released
def test_the_released_needles_lie_where_the_metadata_says():
    cells = mmneedle_release.read_release(RELEASE, "2_2.json", dict)
    captions = mmneedle_release.read_captions(RELEASE)
    for row in mmneedle_release.read_release(RELEASE, "annotations_1_2_2.json", list[dict]):
        shown = cells[Path(row["image_ids"][0]).name]
        caption = captions[Path(row["target"]).name]
        if row["index"] == -1:
            typed = msgspec.convert(row, mmneedle_release.NeedleRow)
            assert row["target"] not in shown.values() and ground_truth_of(typed, Setting(1, 2)) == "0, 0, 0"
        else:
            assert shown[f"{row['row']}_{row['col']}"] == row["target"]
            assert [captions[Path(name).name] for name in shown.values()].count(caption) == 1


@released
@pytest.mark.parametrize(("grid", "swapped", "constant"), [(2, 51.7, 26.8), (4, 24.0, 7.1), (8, 14.2, 2.7)])
def test_oracles_and_constants_on_the_first_thousand(grid, swapped, constant):
    """The truth scores 100; with row and column swapped only the diagonal is right; the best constant is that of the
    paper's data."""

    def swap(truth: str) -> str:
        index, row, column = truth.split(", ")
        return f"{index}, {column}, {row}"

    questions = read_questions(RELEASE, Setting(1, grid), "official")
    assert len(questions) == 2000
    result = score(oracle(questions, absent_as_minus_one))[f"1x{grid}x{grid}"]
    assert result["positive"]["exact"]["rate"] == result["negative"]["existence"]["rate"] == 1
    assert result["balanced existence"]["rate"] == 1 and result["positive"]["format failures"]["rate"] == 0
    result = score(oracle(questions, swap))[f"1x{grid}x{grid}"]["positive"]
    assert round(100 * result["exact"]["rate"], 1) == swapped
    result = score(oracle(questions, absent_as_minus_one))[f"1x{grid}x{grid}"]["baselines"]
    assert round(100 * result["best constant"]["exact"], 1) == constant
    if grid == 2:
        assert result["best constant"]["answer"] == "1, 1, 1"
        per_cell = score(oracle(questions))["1x2x2"]["positive"]["cells"]
        assert [cell["n"] for cell in per_cell] == [268, 235, 248, 249]
