"""Data sources: pure functions of (seed, epoch, index), rows checked, answers never in an evaluation's input."""

import json

import pytest
import torch
from PIL import Image

from data import Haystacks, Subset, batch_order, loader, make_data, read_hub, read_jsonl, read_vqav2, text_lengths
from errors import UserError
from finetune_original import Config
from haystack import PicturePool, read_pool
from processing_paligemma import PaliGemmaProcessor

POOL = PicturePool(read_pool(splits=("train",)))


def source(**change):
    return Haystacks(**dict(pool=POOL, grids=(2, 4), negatives=0.2, size=64, seed=0) | change)


def write_rows(folder, rows):
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_an_example_depends_on_seed_epoch_and_index_alone():
    a, b = source().get(1, 5), source(pool=PicturePool(read_pool(splits=("train",)))).get(1, 5)
    assert (a.id, a.prefix, a.suffix) == (b.id, b.prefix, b.suffix)
    assert a.images[0].tobytes() == b.images[0].tobytes()
    others = [source().get(1, 6), source().get(2, 5), source(seed=1).get(1, 5), source(name="test").get(1, 5)]
    assert all(o.images[0].tobytes() != a.images[0].tobytes() for o in others)


def test_the_answer_is_where_the_needle_is():
    for index in range(40):
        key = f"k{index}"
        haystack = POOL.make(key, images=2, grid=2, positive=index % 4 > 0)
        captions = [[[POOL.pictures[i].caption for i in row] for row in cells] for cells in haystack.cells]
        flat = [c for cells in captions for row in cells for c in row]
        assert len(set(flat)) == 8
        if haystack.needle is None:
            assert haystack.caption not in flat and haystack.answer == "-1"
        else:
            m, row, col = haystack.needle
            assert captions[m][row][col] == haystack.caption
            assert haystack.answer == f"{m + 1}, {row + 1}, {col + 1}"


def test_needles_are_everywhere_and_a_fifth_is_absent():
    answers = [source(grids=(2,)).get(0, i).suffix for i in range(600)]
    shares = {a: answers.count(a) / 600 for a in set(answers)}
    assert set(shares) == {"-1", "1, 1, 1", "1, 1, 2", "1, 2, 1", "1, 2, 2"}
    assert all(0.15 < share < 0.26 for share in shares.values())


def test_the_picture_shows_the_drawings_row_by_row():
    flat = PicturePool(read_pool(splits=("train",))[:40])
    picture = flat.stitch("key", ((0, 1), (2, 3)), cell=64)
    assert picture.size == (128, 128)
    for place, index in enumerate((0, 1, 2, 3)):
        drawing = flat.drawing(index, 56)
        cell = picture.crop((place % 2 * 64, place // 2 * 64, place % 2 * 64 + 64, place // 2 * 64 + 64))
        background = cell.getpixel((0, 0))
        expected = Image.new("RGB", (64, 64), background)
        expected.paste(drawing, (4, 4), drawing)
        assert cell.tobytes() == expected.tobytes()


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="17 captions"):
        PicturePool(read_pool(splits=("train",))[:20]).make("k", 1, 4, True)


def test_training_and_test_sets_do_not_meet():
    train, sets = make_data(Config())
    styles = {p.style for p in train.pool.pictures}
    assert styles == {"fluent", "twemoji"}
    trained = {p.concept for p in train.pool.pictures}
    assert list(sets) == [
        "2x2", "4x4", "2x2 absent", "4x4 absent", "2x2 unseen concepts", "4x4 unseen concepts",
    ]  # fmt: skip
    for name, held_out in sets.items():
        assert {p.style for p in held_out.pool.pictures} == {"noto"}
        concepts = {p.concept for p in held_out.pool.pictures}
        assert concepts.isdisjoint(trained) if "unseen" in name else concepts == trained
        assert all((held_out.get(0, i).suffix == "-1") == ("absent" in name) for i in range(5))
    assert [sets[name].chance for name in ("2x2", "4x4", "2x2 absent")] == [0.25, 0.0625, None]
    assert make_data(Config(seed=3))[1]["2x2"].get(0, 0).id == sets["2x2"].get(0, 0).id  # one test set for all seeds


def test_batches_are_permutations_and_resume_anywhere():
    endless = batch_order(10, 4, seed=3)
    batches = [next(endless) for _ in range(9)]
    for epoch in range(3):
        rows = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert sorted(rows) == [(epoch, i) for i in range(10)]
    assert [i for _, i in sum(batches[:3], [])] != [i for _, i in sum(batches[3:6], [])]
    for start in range(9):
        again = batch_order(10, 4, seed=3, start=start)
        assert [next(again) for _ in range(9 - start)] == batches[start:]


def test_jsonl_rows_are_read(tmp_path):
    rows = [{"image": "a.png", "prefix": "caption en", "suffix": "red"}]
    rows.append({"image": ["a.png", "a.png"], "prefix": "answer en same?", "suffix": "yes"})
    found = read_jsonl(write_rows(tmp_path, rows))
    assert len(found) == 2
    example = found.get(0, 1)
    assert (example.prefix, example.suffix, len(example.images)) == ("answer en same?", "yes", 2)
    assert example.id.endswith("rows.jsonl:2")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{broken", "not json"),
        ('["a.png"]', "has no 'image'"),
        ({"prefix": "a", "suffix": "b"}, "has no 'image'"),
        ({"image": "a.png", "suffix": "b"}, "has no 'prefix'"),
        ({"image": "a.png", "prefix": "a"}, "has no 'suffix'"),
        ({"image": "a.png", "prefix": "a", "suffix": " "}, "suffix"),
        ({"image": "a.png", "prefix": 3, "suffix": "b"}, "prefix a string"),
        ({"image": [], "prefix": "a", "suffix": "b"}, "image must be"),
        ({"image": "b.png", "prefix": "a", "suffix": "b"}, "does not exist"),
        ({"image": "../a.png", "prefix": "a", "suffix": "b"}, "outside"),
        ({"image": "/etc/hostname", "prefix": "a", "suffix": "b"}, "outside"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, told):
    good = {"image": "a.png", "prefix": "a", "suffix": "b"}
    with pytest.raises(UserError, match=told) as caught:
        read_jsonl(write_rows(tmp_path, [good, row]))
    assert "rows.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_picture_is_named(tmp_path):
    path = write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"rows.jsonl:1.*a.png"):
        read_jsonl(path).get(0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_reaches_the_user_as_one_line_from_a_worker_too(tmp_path, tiny_model, workers):
    path = write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}])
    (tmp_path / "a.png").write_bytes(b"no picture")
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    with pytest.raises(UserError, match=r"rows.jsonl:1.*a.png") as caught:
        list(loader(read_jsonl(path), processor, [[(0, 0)]], with_suffix=True, workers=workers))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_workers_change_nothing(tiny_model):
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    batches = [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    alone, together = (list(loader(source(), processor, batches, True, workers=n)) for n in (0, 2))
    for (examples, batch), (others, other) in zip(alone, together, strict=True):
        assert [e.id for e in examples] == [e.id for e in others]
        assert all(torch.equal(batch[key], other[key]) for key in batch)


def test_vqav2_reads_the_official_files(tmp_path):
    (tmp_path / "train2014").mkdir()
    Image.new("RGB", (9, 5), "blue").save(tmp_path / "train2014" / "COCO_train2014_000000000042.jpg")
    question = {"image_id": 42, "question": "What colour is it?", "question_id": 42000}
    answer = {"question_id": 42000, "image_id": 42, "multiple_choice_answer": "blue", "answers": []}
    (tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps({"questions": [question]}))
    annotations = tmp_path / "v2_mscoco_train2014_annotations.json"
    annotations.write_text(json.dumps({"annotations": [answer]}))
    example = read_vqav2(tmp_path, "train").get(0, 0)
    assert (example.prefix, example.suffix) == ("answer en What colour is it?", "blue")
    assert example.images[0].size == (9, 5)
    annotations.write_text(json.dumps({"annotations": []}))
    with pytest.raises(UserError, match="42000"):
        read_vqav2(tmp_path, "train")


def test_a_parquet_copy_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    picture = Image.new("RGB", (6, 6), "green")
    row = {"image": [picture], "question": ["What?"], "multiple_choice_answer": ["green"]}
    rows = datasets.Dataset.from_dict(row).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    example = read_hub(str(tmp_path), "train").get(0, 0)
    assert (example.prefix, example.suffix, example.images[0].size) == ("answer en What?", "green", (6, 6))
    with pytest.raises(UserError, match="no-such-thing"):
        read_hub(str(tmp_path / "no-such-thing"), "train")


@pytest.mark.parametrize("data", ["vqav3:x", "nothing", "hub:"])
def test_an_unknown_source_is_named(data):
    with pytest.raises(UserError, match=data):
        make_data(Config(data=data))


def test_rows_of_like_length_share_a_batch(tmp_path, tiny_model):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [{"image": ["a.png"] * (1 + n % 2), "prefix": "x" * (n % 7), "suffix": "y"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    some = Subset("some", read_jsonl(tmp_path / "rows.jsonl"), list(range(2, 30)))
    lengths = text_lengths(some, processor)
    assert lengths == [len(processor.encode(*some.text(i))[0]) for i in range(28)] and len(set(lengths)) > 5
    batches = [next(order) for order in [batch_order(28, 4, seed=3, lengths=lengths)] for _ in range(14)]
    for epoch in range(2):
        found = batches[7 * epoch : 7 * epoch + 7]
        assert sorted(sum(found, [])) == [(epoch, i) for i in range(28)]
    again = batch_order(28, 4, seed=3, start=9, lengths=lengths)
    assert [next(again) for _ in range(5)] == batches[9:]

    def padded(order):
        rows = [[lengths[i] for _, i in next(order)] for _ in range(7)]
        return sum(len(row) * max(row) for row in rows) / sum(lengths)

    assert padded(batch_order(28, 4, 3, lengths=lengths)) < 1.06 < padded(batch_order(28, 4, 3))
    with pytest.raises(UserError, match="group_by_length"):
        text_lengths(source(), processor)
