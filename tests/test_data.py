"""Data sources: pure functions of (seed, epoch, index), checked rows, no answers in the input of an evaluation."""

import codecs
import hashlib
import json
import os
import random
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

import haystack
import rows
from data import Haystacks, Subset, batch_order, hold_out, loader, make_data, text_lengths
from errors import UserError
from finetune_original import Config
from haystack import (
    ImagePool,
    add_noise,
    captions_needed,
    needle_prompt,
    read_captioned_images,
    read_pool,
    recolour_image,
)
from processing_paligemma import PaliGemmaProcessor
from rows import Row, read_hub, read_jsonl, read_vqav2

POOL = ImagePool(read_pool(splits=("train",)))


def source(**change):
    return Haystacks(**dict(pool=POOL, shapes=((1, 2), (1, 4)), negatives=0.2, size=64, seed=0) | change)


def write_rows(folder, rows):
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_an_example_depends_on_seed_epoch_and_index_alone():
    a, b = source().get(1, 5), source(pool=ImagePool(read_pool(splits=("train",)))).get(1, 5)
    assert (a.id, a.prefix, a.suffix) == (b.id, b.prefix, b.suffix)
    assert a.images[0].tobytes() == b.images[0].tobytes()
    others = [source().get(1, 6), source().get(2, 5), source(seed=1).get(1, 5), source(name="test").get(1, 5)]
    assert all(o.images[0].tobytes() != a.images[0].tobytes() for o in others)


def test_the_answer_is_where_the_needle_is():
    for index in range(40):
        key = f"k{index}"
        haystack = POOL.make(key, images=2, grid=2, positive=index % 4 > 0)
        captions = [[[POOL.images[i].caption for i in row] for row in cells] for cells in haystack.cells]
        flat = [c for cells in captions for row in cells for c in row]
        assert all(len({c for row in cells for c in row}) == 4 for cells in captions)
        (caption,) = haystack.captions
        if not haystack.needles:
            assert caption not in flat and haystack.answer == "-1"
        else:
            ((m, row, col),) = haystack.needles
            assert captions[m][row][col] == caption and flat.count(caption) == 1
            assert haystack.answer == f"{m + 1}, {row + 1}, {col + 1}"


def test_haystacks_of_several_shapes_have_the_images_and_cells_of_each():
    shapes = ((1, 2), (1, 4), (2, 2), (4, 2))
    rows = source(shapes=shapes, size=400)
    haystacks = [rows.make_haystack(0, i) for i in range(400)]
    found = [(len(haystack.cells), len(haystack.cells[0])) for haystack in haystacks]
    assert all(70 < found.count(shape) < 130 for shape in shapes)
    assert [rows.text(i)[2] for i in range(400)] == [images for images, _ in found]
    assert len(rows.get(0, found.index((4, 2))).images) == 4
    assert rows.chance is None and source(shapes=((4, 2),), negatives=0.0).chance == 1 / 16
    assert rows.kind(3) == source(shapes=shapes).kind(3)  # in every epoch: rows of one length can share a batch


def test_batches_of_haystacks_can_share_a_shape():
    rows = source(shapes=((1, 2), (4, 2)), size=1000)
    processor = PaliGemmaProcessor.from_pretrained(Config().model)
    lengths = text_lengths(rows, processor)
    assert set(lengths) == {64, 256}
    batches = batch_order(1000, 10, 0, 0, lengths)
    mixed = sum(len({lengths[index] for _, index in next(batches)}) > 1 for _ in range(100))
    assert mixed <= 2  # one for each stretch that is sorted


def test_recoloured_haystacks_differ_in_their_colours_alone():
    plain, colourful = source().get(0, 3), source(recolour=True).get(0, 3)
    assert (plain.prefix, plain.suffix) == (colourful.prefix, colourful.suffix)
    assert plain.images[0].tobytes() != colourful.images[0].tobytes()
    assert colourful.images[0].tobytes() == source(recolour=True).get(0, 3).images[0].tobytes()
    assert source(recolour=True).fingerprint() != source().fingerprint()
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    recoloured = [recolour_image(image, random.Random(seed)) for seed in range(200)]
    assert all(r.getchannel("A").tobytes() == image.getchannel("A").tobytes() for r in recoloured)
    reds = [r.getpixel((0, 0))[0] for r in recoloured]
    assert len(set(reds)) > 50 and abs(sum(reds) / 200 - 200) < 15
    black = [recolour_image(Image.new("RGB", (4, 4)), random.Random(seed)).getpixel((0, 0))[0] for seed in range(200)]
    assert 60 < sum(value > 0 for value in black) < 140  # brightness is added, and half of it is below zero


def test_distractors_surround_the_needle_each_in_one_cell():
    captions = POOL.captions
    for positive in (True, False):
        for key in range(30):
            haystack = POOL.add_distractors(f"k{key}", captions[7], captions[20:80], 4, 2, positive)
            shown = [POOL.images[i].caption for cells in haystack.cells for row in cells for i in row]
            assert len(set(shown)) == 16 and (captions[7] in shown) == positive
            assert set(shown) <= {captions[7], *captions[20:36]}  # the nearest ones first
            if positive:
                ((m, row, column),) = haystack.needles
                assert POOL.images[haystack.cells[m][row][column]].caption == captions[7]
                assert haystack.targets == (haystack.cells[m][row][column],)
            else:
                assert haystack.answer == "-1"
    places = {POOL.add_distractors(f"k{key}", captions[7], captions[20:80], 4, 2, True).needles for key in range(300)}
    assert len(places) == 16
    with pytest.raises(UserError, match="16 cells, but 11 captions"):
        POOL.add_distractors("k", captions[7], captions[20:30], 4, 2, True)


def test_noise_has_its_standard_deviation_and_follows_from_its_key():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(add_noise(grey, "a", 0.1), np.float64) / 255
    assert abs(noisy.std() - 0.1) < 0.005 and abs(noisy.mean() - 128 / 255) < 0.005
    assert add_noise(grey, "a", 0.1).tobytes() == add_noise(grey, "a", 0.1).tobytes()
    assert add_noise(grey, "b", 0.1).tobytes() != add_noise(grey, "a", 0.1).tobytes()
    assert add_noise(grey, "a", 0.0).tobytes() == grey.tobytes()


def test_needles_are_everywhere_and_a_fifth_is_absent():
    answers = [source(shapes=((1, 2),)).get(0, i).suffix for i in range(600)]
    shares = {a: answers.count(a) / 600 for a in set(answers)}
    assert set(shares) == {"-1", "1, 1, 1", "1, 1, 2", "1, 2, 1", "1, 2, 2"}
    assert all(0.15 < share < 0.26 for share in shares.values())


def test_the_image_shows_the_drawings_row_by_row():
    flat = ImagePool(read_pool(splits=("train",))[:40])
    image = flat.stitch("key", ((0, 1), (2, 3)), cell=64)
    assert image.size == (128, 128)
    for place, index in enumerate((0, 1, 2, 3)):
        drawing = flat.resized(index, 64)
        cell = image.crop((place % 2 * 64, place // 2 * 64, place % 2 * 64 + 64, place // 2 * 64 + 64))
        background = cell.getpixel((0, 0))
        expected = Image.new("RGB", (64, 64), background)
        expected.paste(drawing, (4, 4), drawing)
        assert cell.tobytes() == expected.tobytes()


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(UserError, match="17 captions"):
        ImagePool(read_pool(splits=("train",))[:20]).make("k", 1, 4, True)


def test_haystacks_of_one_s_own_images(tmp_path):
    """Captions of the test sets are never trained on, an opaque image fills its cell."""
    for i in range(120):
        Image.new("RGB", (30, 20), (i, 0, 255 - i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"thing {i}")
    train, sets = make_data(Config(data=f"haystack:{tmp_path}", grids=(2,), eval_samples=5))
    trained, tested = ({p.caption for p in s.pool.images} for s in (train, sets["2x2"]))
    assert list(sets) == ["2x2", "2x2 absent"] and not trained & tested and len(trained | tested) == 120
    assert train.get(0, 0).images[0].size == (512, 512)
    for i in range(5):
        example = sets["2x2"].get(0, i)
        _, row, column = (int(n) - 1 for n in example.suffix.split(", "))
        number = int(example.prefix.removeprefix("answer en where is thing ").removesuffix("?"))
        assert example.images[0].getpixel((256 * column + 128, 256 * row + 128)) == (number, 0, 255 - number)
        assert sets["2x2 absent"].get(0, i).suffix == "-1"
    (tmp_path / "0.txt").write_text(" A dog\nruns. ")
    (tmp_path / "1.txt").write_text("A dog runs")
    images = {Path(image.concept).stem: image for image in read_captioned_images(tmp_path)}
    assert needle_prompt(images["0"].caption) == "answer en where is A dog runs?"
    assert (images["0"].caption, images["0"].split) == (images["1"].caption, images["1"].split)
    with pytest.raises(UserError, match="0.txt:1: not valid JSON"):
        make_data(Config(data=f"haystack:{tmp_path / '0.txt'}"))


def test_images_of_ones_own_are_compared_by_name_caption_and_contents_and_not_by_time(tmp_path, monkeypatch):
    def fingerprints() -> list[str]:
        return ImagePool(read_captioned_images(tmp_path)).fingerprints

    for name in ("a", "b"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / f"{name}.bmp")
        (tmp_path / f"{name}.txt").write_text("a thing")
    first = fingerprints()
    assert len(set(first)) == 2  # equal but for their names
    for limit in (20_000, 1):
        monkeypatch.setattr(haystack, "HASHED_IMAGES", limit)
        before = fingerprints()
        os.utime(tmp_path / "a.bmp", (1, 1))
        assert fingerprints() == before
        Image.new("RGB", (30, 20), ("green", "blue")[limit == 1]).save(tmp_path / "a.bmp")  # of the same size
        assert (fingerprints()[0] != before[0]) == (limit > 1) and fingerprints()[1] == before[1]
    (tmp_path / "a.txt").write_text("another thing")
    assert fingerprints()[0] != before[0]


def test_fingerprints_of_the_included_pool_are_those_of_earlier_runs():
    images = [hashlib.sha256(image.data).digest() + image.caption.encode() for image in POOL.images]
    assert POOL.fingerprints == [image.hex() for image in images]


def test_grey_of_16_bits_keeps_its_levels_in_a_haystack(tmp_path):
    """PIL's own conversion clips it to white."""
    Image.fromarray(np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    (image,) = read_captioned_images(tmp_path)
    levels = np.asarray(image.open())[..., 0].flatten()
    assert image.open().mode == "RGB" and abs(levels - np.linspace(0, 255, 64)).max() <= 1


def test_test_sets_show_trained_styles_an_unseen_style_and_unseen_concepts_apart():
    train, sets = make_data(Config())
    styles = {p.style for p in train.pool.images}
    assert styles == {"fluent", "twemoji"}
    trained = {p.concept for p in train.pool.images}
    kinds = ("trained styles", "unseen style", "unseen style, absent", "unseen concepts")
    assert list(sets) == [f"{grid}x{grid} {kind}" for kind in kinds for grid in (2, 4)]
    for name, held_out in sets.items():
        assert {p.style for p in held_out.pool.images} == (styles if "trained" in name else {"noto"})
        concepts = {p.concept for p in held_out.pool.images}
        assert concepts.isdisjoint(trained) if "concepts" in name else concepts == trained
        assert all((held_out.get(0, i).suffix == "-1") == ("absent" in name) for i in range(5))
    names = ("2x2 trained styles", "4x4 unseen style", "2x2 unseen style, absent")
    assert [sets[name].chance for name in names] == [0.25, 0.0625, None]
    other = make_data(Config(seed=3))[1]
    assert all(other[name].get(0, 0).id == sets[name].get(0, 0).id for name in names)  # one test set for all seeds
    shown, asked = train.get(0, 0), sets["2x2 trained styles"].get(0, 0)
    assert shown.id != asked.id and shown.images[0].tobytes() != asked.images[0].tobytes()


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


def test_null_in_an_optional_field_and_a_byte_order_mark_are_read(tmp_path):
    """As `datasets` and Windows write them."""
    parts = [{"type": "image", "text": None, "image": "a.png"}, {"type": "text", "text": "What?", "image": None}]
    rows = [
        {"image": "a.png", "prefix": "a", "suffix": "b", "answers": None},
        chat(("user", parts), ("assistant", "red"), images=None, answers=None),
        chat(("user", "Hi"), ("assistant", "Hello"), images=None),
    ]
    path = write_rows(tmp_path, rows)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    read = read_jsonl(path)
    assert [read.text(i) for i in range(3)] == [("a", "b", 1), ("What?", "red", 1), ("Hi", "Hello", 0)]
    assert [read.answers(i) for i in range(2)] == [("b",), ("red",)]
    (tmp_path / "a.txt").write_text("\ufeffa red square", encoding="utf-8")
    assert [image.caption for image in read_captioned_images(tmp_path)] == ["a red square"]
    (tmp_path / "captions.jsonl").write_text('\ufeff{"image": "a.png", "caption": "red"}', encoding="utf-8")
    assert [image.caption for image in read_captioned_images(tmp_path / "captions.jsonl")] == ["red"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "not valid JSON"),
        ('["a.png"]', "Expected object, got array"),
        ({"prefix": "a", "suffix": "b"}, "missing required field image"),
        ({"image": "a.png", "suffix": "b"}, "missing required field prefix"),
        ({"image": "a.png", "prefix": "a"}, "missing required field suffix"),
        ({"image": "a.png", "prefix": "a", "suffix": " "}, "suffix"),
        ({"image": "a.png", "prefix": 3, "suffix": "b"}, r"Expected str, got int - at \$.prefix"),
        ({"image": "a.png", "prefix": "a", "suffix": None}, r"Expected str, got null - at \$.suffix"),
        ({"image": {"path": "a.png"}, "prefix": "a", "suffix": "b"}, r"at \$.image"),
        ('{"image": "a.png", "prefix": "\\ud800", "suffix": "b"}', "not valid JSON"),
        (
            '{"image": "a.png", "prefix": "a", "suffix": "b", "more": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "not valid JSON",
        ),
        ({"image": "loop/a.png", "prefix": "a", "suffix": "b"}, "not a valid path"),
        ({"image": [], "prefix": "a", "suffix": "b"}, "image must be"),
        ({"image": "b.png", "prefix": "a", "suffix": "b"}, "does not exist"),
        ({"image": "../a.png", "prefix": "a", "suffix": "b"}, "outside"),
        ({"image": "/etc/hostname", "prefix": "a", "suffix": "b"}, "outside"),
        ({"image": "out.png", "prefix": "a", "suffix": "b"}, "outside"),
        ({"image": "away/secret.png", "prefix": "a", "suffix": "b"}, "outside"),
        ({"image": "a.png\0", "prefix": "a", "suffix": "b"}, "not a valid path"),
        ({"image": "a" * 5000, "prefix": "a", "suffix": "b"}, "not a valid path"),
    ],
)
def test_a_bad_row_is_named_and_left_out_or_refused(tmp_path, row, message):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.png").touch()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder / "loop")
    good = {"image": "a.png", "prefix": "a", "suffix": "b"}
    path = write_rows(folder, [good, row, good])
    with pytest.raises(UserError, match=message) as caught:
        read_jsonl(path)
    assert "rows.jsonl:2" in str(caught.value) and "\n" not in str(caught.value)
    rows = read_jsonl(path, strict=False)
    assert len(rows) == 2 and rows.skipped == [str(caught.value)] and rows.get(0, 1).id.endswith("rows.jsonl:3")


def test_a_file_of_mostly_bad_rows_is_refused(tmp_path):
    bad = {"image": "gone.png", "prefix": "a", "suffix": "b"}
    path = write_rows(tmp_path, [bad, {"image": "a.png", "prefix": "a", "suffix": "b"}, bad])
    with pytest.raises(UserError, match=r"2 of 3 rows are bad, the first: .*rows.jsonl:1"):
        read_jsonl(path, strict=False)


def test_a_line_that_is_not_utf8_is_one_bad_row_and_unicode_separators_end_no_line(tmp_path):
    """One broken line is one bad row, and U+2028 does not end a line of JSON."""
    good = json.dumps({"image": "a.png", "prefix": "a\u2028b", "suffix": "b"}, ensure_ascii=False).encode()
    write_rows(tmp_path, [])
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, b'{"image": "\xff"}', good, b""]))
    rows = read_jsonl(tmp_path / "rows.jsonl", strict=False)
    assert [row.prefix for row in rows.rows] == ["a\u2028b"] * 2
    assert len(rows.skipped) == 1 and "rows.jsonl:2: not valid JSON" in rows.skipped[0]


def test_a_hundred_thousand_rows_with_one_bad_in_a_hundred(tmp_path):
    good = {"image": "a.png", "prefix": "a", "suffix": "b"}
    bad = [good | {"image": "gone.png"}, good | {"image": "../a.png"}, {"image": "a.png"}, good | {"suffix": ""}, "{"]
    rows = [bad[i // 100 % 5] if i % 100 == 0 else good for i in range(100_000)]
    path = write_rows(tmp_path, rows)
    began = time.process_time()
    found = read_jsonl(path, strict=False)
    assert (len(found), len(found.skipped)) == (99_000, 1_000)
    assert "rows.jsonl:1:" in found.skipped[0] and "rows.jsonl:99901:" in found.skipped[-1]
    assert time.process_time() - began < 20  # takes a second on an idle machine


def bomb(path, side=40_000):
    """A PNG whose header declares 1.6 billion pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_and_bombs_are_left_out_of_a_batch(tmp_path, tiny_model, workers):
    """A batch that lost all its rows, like an empty one, has the tensors of a stand-in row and no examples."""
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    path = write_rows(tmp_path, [{"image": f"{name}.png", "prefix": "a", "suffix": "b"} for name in "cba"])
    bomb(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    rows, faults = read_jsonl(path), []
    batches = [[(0, 0), (0, 2)], [(0, 1)], [], [(0, 2)]]
    found = list(loader(rows, processor, batches, True, workers, lambda fault: faults.append(str(fault))))
    assert [[e.index for e in examples] for examples, _ in found] == [[2], [], [], [2]]
    assert all(torch.equal(found[0][1][key], batch[key]) for _, batch in found for key in batch)
    assert len(faults) == 2 and "rows.jsonl:1: c.png: broken" in faults[0] and "too large" in faults[1]
    with pytest.raises(UserError, match=r"rows.jsonl:2: b.png: image too large"):
        list(loader(rows, processor, batches[1:], True, workers))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 rows can be used"):
        list(loader(rows, processor, batches, True, workers, faults.append))


# ---- held-out rows
def vqav2(folder, split="train", images=40, questions=3):
    """A folder in VQAv2's official form, every image with several questions."""
    (folder / f"{split}2014").mkdir(parents=True)
    asked, answered = [], []
    for image in range(images):
        file = f"COCO_{split}2014_{image:012d}.jpg"
        Image.new("RGB", (9, 5), (image * 6, 0, 0)).save(folder / f"{split}2014" / file)
        for n in range(questions):
            number = image * 1000 + n
            asked.append({"image_id": image, "question": f"What is {n}?", "question_id": number})
            answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
            answered.append({"question_id": number, "image_id": image, "question_type": "what is", "answers": answers})
            answered[-1] |= {"answer_type": "other", "multiple_choice_answer": f"red {n}"}
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": f"{split}2014"}
    questions_file = folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
    questions_file.write_text(json.dumps(head | {"task_type": "Open-Ended", "questions": asked}))
    (folder / f"v2_mscoco_{split}2014_annotations.json").write_text(json.dumps(head | {"annotations": answered}))
    return folder


def test_vqav2_holds_out_images_and_no_questions_of_the_others(tmp_path):
    train, sets = make_data(Config(data=f"vqav2:{vqav2(tmp_path)}"))
    (held,) = sets.values()
    assert list(sets) == ["held out"] and (len(train), len(held)) == (108, 12)
    shown = [{source.get(0, i).images[0].tobytes() for i in range(len(source))} for source in (train, held)]
    assert shown[0].isdisjoint(shown[1]) and len(shown[1]) == 4
    for other in (Config(seed=1), Config(eval_samples=5)):  # what one run holds out, no other run trains on
        again, sets = make_data(replace(other, data=f"vqav2:{tmp_path}"))
        assert again.indices == train.indices
        assert sets["held out"].indices == held.indices[: other.eval_samples]


def test_rows_that_share_images_through_others_stay_together(tmp_path):
    source = read_jsonl(write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}]))
    names = [["a"], ["a", "b"], ["b"], ["c"], ["d"], ["c"], ["e"], ["f"], ["g"], ["h"]]
    source.rows = [Row(str(i), tuple(images), "", "") for i, images in enumerate(names)]
    for seed in range(10):
        random.Random(seed).shuffle(names)
        source.rows = [Row(str(i), tuple(images), "", "") for i, images in enumerate(names)]
        train, held, name = hold_out(source, Config())
        assert sorted(train + held) == list(range(10)) and name == "held out"
        assert {n for i in train for n in names[i]}.isdisjoint(n for i in held for n in names[i])
    source.rows = [row for row in source.rows if {"a", "b"} & set(row.images)]
    assert hold_out(source, Config())[2] == "held out, images shared with training"


def test_a_tenth_of_rows_without_shared_images_is_held_out(tmp_path):
    source = read_jsonl(write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}]))
    source.rows = [Row(str(i), (f"{i}.png",), "", "") for i in range(40)]
    order = list(range(40))
    random.Random("held out").shuffle(order)
    assert hold_out(source, Config(seed=3))[:2] == (order[4:], order[:4])
    assert hold_out(source, Config(eval_samples=2))[:2] == (order[4:], order[:2])


def test_a_broken_image_is_named(tmp_path):
    path = write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}])
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"rows.jsonl:1.*a.png"):
        read_jsonl(path).get(0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_reaches_the_user_as_one_line_from_a_worker_too(tmp_path, tiny_model, workers):
    path = write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}])
    (tmp_path / "a.png").write_bytes(b"no image")
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
    vqav2(tmp_path, images=2, questions=2)
    example = read_vqav2(tmp_path, "train").get(0, 3)
    assert (example.id, example.prefix, example.suffix) == ("vqav2/train/1001", "answer en What is 1?", "red 1")
    assert example.images[0].size == (9, 5)
    annotations = tmp_path / "v2_mscoco_train2014_annotations.json"
    official = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(official | {"annotations": official["annotations"][1:]}))
    with pytest.raises(UserError, match="question 0 has no annotation"):
        read_vqav2(tmp_path, "train")
    (tmp_path / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match="3 of 4 rows are bad"):
        read_vqav2(tmp_path, "train", strict=False)
    annotations.write_text(json.dumps(official))
    rows = read_vqav2(tmp_path, "train", strict=False)
    assert len(rows) == len(rows.skipped) == 2 and "COCO_train2014_000000000001.jpg does not exist" in rows.skipped[0]


def parquet(folder, images=10, **columns):
    """A hub data set of VQAv2's columns, in parquet."""
    import datasets

    rows = [
        {"image_id": p, "question": f"What is {n}?", "multiple_choice_answer": "red"}
        for p in range(images)
        for n in (0, 1)
    ]
    table = {key: [row[key] for row in rows] for key in rows[0]}
    table["image"] = [Image.new("RGB", (6, 6), (row["image_id"], 0, 0)) for row in rows]
    folder.mkdir()
    made = datasets.Dataset.from_dict(table | columns).cast_column("image", datasets.Image())
    made.to_parquet(folder / "train.parquet")
    return folder


def test_a_parquet_row_without_accepted_answers_has_its_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = read_hub(str(parquet(tmp_path / "set", images=2, answers=[["a", "b"], [], None, ["c"]])), "train")
    assert [rows.answers(i) for i in range(4)] == [("a", "b"), ("red",), ("red",), ("c",)]


def test_a_parquet_copy_holds_out_images_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    train, sets = make_data(Config(data=f"hub:{parquet(tmp_path / 'set')}"))
    shown = [{s.get(0, i).images[0].tobytes() for i in range(len(s))} for s in (train, *sets.values())]
    assert [len(s) for s in (train, *sets.values())] == [18, 2] and shown[0].isdisjoint(shown[1])
    assert train.fingerprint() == make_data(Config(data=f"hub:{tmp_path / 'set'}", seed=1))[0].fingerprint()


def test_a_split_of_a_parquet_copy_without_image_ids_holds_out_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = parquet(tmp_path / "set")
    read_hub(str(folder), "train").rows.remove_columns("image_id").to_parquet(folder / "validation.parquet")
    (folder / "train.parquet").unlink()
    train, sets = make_data(Config(data=f"hub:{folder}@validation"))
    held = sets["held out"]
    assert (len(train), len(held)) == (18, 2) and not set(train.indices) & set(held.indices)
    (shuffled,) = make_data(Config(data=f"hub:{folder}@validation", eval_data=f"hub:{folder}"))[1].values()
    assert sorted(shuffled.indices) == list(range(20))
    with pytest.raises(UserError, match="split 'train'"):
        make_data(Config(data=f"hub:{folder}"))
    with pytest.raises(UserError, match="no image_id"):
        hold_out(read_hub(str(folder), "validation"), Config())


def test_texts_of_a_parquet_copy_are_selected_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = read_hub(str(parquet(tmp_path / "set", images=2, answers=[["a"]] * 4)), "train")
    calls, real = [], found.rows.select_columns
    monkeypatch.setattr(type(found.rows), "select_columns", lambda rows, names: calls.append(names) or real(names))
    assert [found.answers(i) + found.text(i)[1:] for i in range(4)] == [("a", "red", 1)] * 4
    assert calls == [["answers"], ["question", "multiple_choice_answer"]]


def test_a_dataset_that_brings_code_is_refused_and_not_run(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="give a parquet dataset") as caught:
        read_hub(str(tmp_path / "set"), "train")
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_a_parquet_copy_is_read_through_datasets(tmp_path, monkeypatch):
    import datasets

    image = Image.new("RGB", (6, 6), "green")
    row = {"image": [image], "question": ["What?"], "multiple_choice_answer": ["green"]}
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


def test_group_by_length_puts_rows_of_similar_length_into_a_batch(tmp_path, tiny_model):
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


# ---- regression tests
def test_one_image_under_several_names_or_copied_is_never_both_trained_on_and_held_out(tmp_path):
    (tmp_path / "sub").mkdir()
    names = []
    for i in range(12):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"link{i}.png").symlink_to(tmp_path / f"{i}.png")
        (tmp_path / f"copy{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
        names += [f"{i}.png", f"./{i}.png", f"sub/../{i}.png", f"link{i}.png", f"copy{i}.png"]
    path = write_rows(tmp_path, [{"image": name, "prefix": "a", "suffix": "b"} for name in names])
    for seed in range(5):
        train, sets = make_data(Config(data=str(path), seed=seed))
        (held,) = sets.values()
        shown = [{s.get(0, i).images[0].getpixel((0, 0)) for i in range(len(s))} for s in (train, held)]
        assert shown[0].isdisjoint(shown[1]) and shown[1]


def test_above_the_limit_images_are_compared_by_path_alone(tmp_path, monkeypatch):
    names = {"a.png", "./a.png", "copy.png", "link.png"}
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "copy.png").write_bytes(b"one")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    keys = rows.same_images(names, tmp_path)
    assert len(set(keys.values())) == 1
    monkeypatch.setattr(rows, "HASHED_IMAGES", 1)
    keys = rows.same_images(names, tmp_path)
    assert keys["a.png"] == keys["./a.png"] == keys["link.png"] != keys["copy.png"]


def test_ten_thousand_images_are_compared_within_seconds(tmp_path):
    for i in range(10_000):
        (tmp_path / f"{i}.png").write_bytes(i.to_bytes(64, "big"))
    rows = [{"image": f"{i}.png", "prefix": "a", "suffix": "b"} for i in range(10_000)]
    source = read_jsonl(write_rows(tmp_path, rows))
    began = time.process_time()
    assert len({key for (key,) in source.image_keys()}) == 10_000
    assert time.process_time() - began < 10  # takes half a second on an idle machine


def test_text_with_special_tokens_is_named_by_its_row_and_equal_texts_stay_apart(tmp_path, tiny_model):
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    row = {"image": "a.png", "prefix": "what is <image>?", "suffix": "b"}
    rows, faults = read_jsonl(write_rows(tmp_path, [row, row, row | {"prefix": "a"}])), []
    list(loader(rows, processor, [[(0, 0), (0, 1), (0, 2)]], True, 0, lambda fault: faults.append(str(fault))))
    assert ["rows.jsonl:1: " in faults[0], "rows.jsonl:2: " in faults[1], len(faults)] == [True, True, 2]
    assert all("<image>" in fault for fault in faults)


@pytest.mark.parametrize("words", [40, 3_000, 5_000_000])
def test_rows_longer_than_the_model_are_skipped_and_named(tmp_path, tiny_model, words):
    """Rows of megabytes are refused by their number of characters, before tokenisation."""
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    good = {"image": "a.png", "prefix": "a", "suffix": "b"}
    path = write_rows(tmp_path, [good | {"prefix": "a " * words}, good])
    rows, faults = read_jsonl(path), []
    began = time.process_time()
    found = list(loader(rows, processor, [[(0, 0), (0, 1)]], True, 0, faults.append, max_length=32))
    assert [[e.index for e in examples] for examples, _ in found] == [[1]]
    (fault,) = map(str, faults)
    assert "rows.jsonl:1: more tokens than the 32 that fit the model" in fault and len(fault) < 400
    assert time.process_time() - began < 5


def test_messages_of_broken_images_are_the_same_each_time(tmp_path, tiny_model):
    """With a memory address in the message, the same row would be logged again and again."""
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    path = write_rows(tmp_path, [{"image": "a.png", "prefix": "a", "suffix": "b"}])
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    messages = set()
    for _ in range(3):
        with pytest.raises(UserError) as caught:
            list(loader(read_jsonl(path), processor, [[(0, 0)]], True))
        messages.add(str(caught.value))
    assert len(messages) == 1 and " at 0x" not in messages.pop()


def test_too_few_captions_of_ones_own_are_counted_and_the_number_needed_is_given(tmp_path):
    for i in range(16):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"thing {i}")
    with pytest.raises(UserError, match=r"16 captions, of which \d+ are kept .* need 17 .* give about 118 captions"):
        make_data(Config(data=f"haystack:{tmp_path}"))
    with pytest.raises(UserError, match=r"2 x 2 cells .* need 5 in training and 5 in testing: give about 44 captions"):
        make_data(Config(data=f"haystack:{tmp_path}", grids=(2,)))


@pytest.mark.parametrize("test", [5, 17])
def test_the_number_of_captions_needed_is_enough_for_95_percent_of_sets(test):
    rng = np.random.default_rng(0)
    of_sets = rng.binomial(captions_needed(test), 51 / 256, 100_000)
    assert 0.95 <= (of_sets >= test).mean() < 0.965


def test_rows_of_eval_data_are_a_fixed_sample_of_a_sorted_file(tmp_path):
    rows = [{"image": "a.png", "prefix": "a", "suffix": "yes" if n < 100 else "no"} for n in range(200)]
    path = write_rows(tmp_path, rows)
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps(rows[0]))
    config = Config(data=str(train), eval_data=str(path), eval_samples=50)
    (held,) = make_data(config)[1].values()
    assert 15 < [held.text(i)[1] for i in range(50)].count("yes") < 35
    (other,) = make_data(replace(config, seed=1, eval_samples=20))[1].values()
    assert other.indices == held.indices[:20]


def test_evaluation_data_beside_haystacks_is_refused():
    with pytest.raises(UserError, match="--eval_data=x: haystack data has test sets of its own"):
        make_data(Config(eval_data="x"))
    for spec in ("haystack", "haystack:x.jsonl"):
        with pytest.raises(UserError, match=f"--eval_data={spec}: rows are evaluated on rows"):
            make_data(Config(data="rows.jsonl", eval_data=spec))


def parquet_of(folder, images):
    """A parquet file with the given image column, without the Image feature."""
    import pyarrow
    import pyarrow.parquet

    n = len(images)
    table = {"image": images, "question": ["What?"] * n, "multiple_choice_answer": ["red"] * n}
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train.parquet")
    return read_hub(str(folder), "train")


def test_parquet_images_as_bytes_or_structs_are_read_and_paths_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (6, 6), "red").save(tmp_path / "a.png")
    data, path = (tmp_path / "a.png").read_bytes(), str(tmp_path / "a.png")
    assert parquet_of(tmp_path / "bytes", [data]).get(0, 0).images[0].size == (6, 6)
    structs = [{"bytes": data, "path": "/nowhere.png"}, {"bytes": None, "path": path}, None]
    structs.append({"bytes": None, "path": "http://localhost:9/a.png"})
    rows = parquet_of(tmp_path / "structs", structs)
    assert rows.get(0, 0).images[0].size == (6, 6)
    for source in (rows, parquet_of(tmp_path / "paths", [None, path, path])):
        for index in (1, 2):
            with pytest.raises(UserError, match=f"/{index}: has no image bytes"):
                source.get(0, index)


@pytest.mark.parametrize("column", ["question", "multiple_choice_answer"])
def test_parquet_texts_that_are_not_strings_are_named(tmp_path, monkeypatch, column):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = read_hub(str(parquet(tmp_path / "set", images=1, **{column: [1, 2]})), "train")
    with pytest.raises(UserError, match="must be strings"):
        rows.get(0, 1)


# ---- conversations
def chat(*messages: tuple, **fields) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def test_conversations_are_the_rows_of_their_prompt_and_last_answer(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What is it?"}]
    rows = [
        chat(("user", "<image>\nWhat is it?"), ("assistant", "a cat"), images=["a.png"]),
        {"image": "a.png", "prefix": "What is it?", "suffix": "a cat"},
        chat(("user", parts), ("assistant", [{"type": "text", "text": "a dog"}])),
        chat(
            ("system", "Be brief."),
            ("user", "<image><image> Which?"),
            ("assistant", "the second"),
            ("user", "Why?"),
            ("assistant", "it barks"),
            images=["a.png", "b.png"],
            answers=["it barks", "barking"],
        ),
        chat(("user", "Hello"), ("assistant", "Hi")),
        {"image": "a.png", "prefix": "messages", "suffix": 'a row that says "messages"'},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    read = read_jsonl(file)
    assert [read.text(row) for row in range(6)] == [
        ("What is it?", "a cat", 1),
        ("What is it?", "a cat", 1),
        ("What is it?", "a dog", 1),
        ("Be brief.\nWhich?\nthe second\nWhy?", "it barks", 2),
        ("Hello", "Hi", 0),
        ("messages", 'a row that says "messages"', 1),
    ]
    assert read.rows[3].images == ("a.png", "b.png") and read.answers(3) == ("it barks", "barking")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (chat(("user", "Hi")), "end with one of the assistant"),
        (chat(("assistant", "Hi")), "after one of the user"),
        (chat(), "end with one of the assistant"),
        (chat(("user", "<image>"), ("assistant", "x")), "places for 1 images, but there are 0"),
        (chat(("user", "<image>"), ("assistant", "x"), images=["no.png"]), "no.png does not exist"),
        (chat(("user", [{"type": "image", "image": "a"}]), ("assistant", "x"), images=["b"]), "given twice"),
        (chat(("user", "Hi"), ("assistant", " ")), "suffix is empty"),
        (chat(("tool", "Hi"), ("assistant", "x")), "role"),
        (chat(("user", 3), ("assistant", "x")), "content"),
        ({"messages": "Hi"}, "messages"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named(tmp_path, row, part):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps(row))
    with refused("chat.jsonl:1", part):
        read_jsonl(file)
