"""The included image pool: the claims of its README, checked against the file."""

import hashlib
import importlib.util
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "haystack-pool"
POOL = FOLDER / "pool.parquet"
SIZES = {"fluent": (96, 96), "noto": (64, 64), "twemoji": (64, 64)}
ROWS = {
    ("train", "fluent"): 200,
    ("train", "twemoji"): 200,
    ("test_style", "noto"): 200,
    ("test_concept", "fluent"): 60,
    ("test_concept", "noto"): 60,
    ("test_concept", "twemoji"): 60,
}


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(POOL).to_pylist()


@pytest.fixture(scope="module")
def make_pool():
    spec = importlib.util.spec_from_file_location("make_pool", FOLDER / "make_pool.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def concepts_of(rows, split):
    return {row["concept"] for row in rows if row["split"] == split}


def on_background(data, grey, size=24):
    """The image pasted on a uniform grey, `size` pixels square, as a flat float array in 0..1."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (grey, grey, grey, 255))
    canvas.alpha_composite(image)
    small = canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float64).ravel() / 255


def test_schema_matches_the_builder(make_pool):
    assert pq.read_schema(POOL).equals(make_pool.SCHEMA)


def test_the_pool_is_small_and_the_file_that_its_readme_names():
    assert POOL.stat().st_size < 8_000_000
    assert hashlib.sha256(POOL.read_bytes()).hexdigest() in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_counts_by_split_and_style(rows):
    assert Counter((row["split"], row["style"]) for row in rows) == ROWS


def test_rows_are_sorted_and_unique(rows):
    keys = [(row["concept"], row["style"]) for row in rows]
    assert keys == sorted(set(keys))


def test_every_concept_is_drawn_in_every_style(rows):
    styles = {}
    for row in rows:
        styles.setdefault(row["concept"], set()).add(row["style"])
    assert len(styles) == 260
    assert all(drawn == set(SIZES) for drawn in styles.values())


def test_captions_are_unique_within_a_style_and_shared_across_styles(rows):
    captions = {row["concept"]: row["caption"] for row in rows}
    assert all(row["caption"] == captions[row["concept"]] for row in rows)
    assert len(set(captions.values())) == len(captions)


def test_captions_are_short_and_plain(rows):
    odd = [row["caption"] for row in rows if not re.fullmatch(r"[a-z]+( [a-z]+){0,2}", row["caption"])]
    assert odd == []


def test_unseen_concepts_are_in_no_other_split(rows):
    assert not concepts_of(rows, "test_concept") & concepts_of(rows, "train")
    assert not concepts_of(rows, "test_concept") & concepts_of(rows, "test_style")


def test_the_style_test_asks_for_the_trained_concepts(rows):
    assert concepts_of(rows, "test_style") == concepts_of(rows, "train")


def test_no_image_of_the_test_style_is_trained_on(rows):
    assert {row["style"] for row in rows if row["split"] == "train"} == {"fluent", "twemoji"}
    assert {row["style"] for row in rows if row["split"] == "test_style"} == {"noto"}


def test_no_image_is_in_the_pool_twice(rows):
    assert len({hashlib.sha256(row["image"]).digest() for row in rows}) == len(rows)


def test_images_open_with_their_size_and_are_not_empty(rows):
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGBA", SIZES[row["style"]]), row["caption"]
            alpha = np.asarray(image.getchannel("A"))
        assert (alpha > 200).mean() > 0.08, row["caption"]


@pytest.mark.parametrize("style", sorted(SIZES))
def test_images_of_one_style_differ_at_24_pixels(rows, style):
    """Root-mean-square difference of every pair, over a white and a grey background; the ram and the ewe had 0.06."""
    drawn = [row for row in rows if row["style"] == style]
    points = np.stack([np.concatenate([on_background(row["image"], grey) for grey in (255, 110)]) for row in drawn])
    norms = (points**2).sum(1)
    distance = np.sqrt(np.maximum(0, norms[:, None] + norms - 2 * points @ points.T) / points.shape[1])
    np.fill_diagonal(distance, np.inf)
    i, j = np.unravel_index(distance.argmin(), distance.shape)
    assert distance[i, j] > 0.12, f"{drawn[i]['caption']} and {drawn[j]['caption']} look alike"


def test_list_of_concepts_and_splits_rebuild_from_the_builder(rows, make_pool):
    concepts = make_pool.read_concepts(FOLDER / "concepts.txt")
    unseen = make_pool.choose_unseen(concepts)
    assert {row["concept"]: row["caption"] for row in rows} == {code: name for code, (_, name) in concepts.items()}
    assert concepts_of(rows, "test_concept") == unseen
    assert all(row["split"] == make_pool.split_of(row["concept"], row["style"], unseen) for row in rows)


def test_unseen_concepts_spread_over_the_categories(make_pool):
    """Each category gives its share of the unseen concepts, to within one."""
    concepts = make_pool.read_concepts(FOLDER / "concepts.txt")
    size = Counter(category for category, _ in concepts.values())
    taken = Counter(concepts[code][0] for code in make_pool.choose_unseen(concepts))
    for category, n in size.items():
        assert abs(taken[category] - n * make_pool.N_UNSEEN / len(concepts)) <= 1, category


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fluent-MIT.txt", "Microsoft Corporation"),
        ("twemoji-CC-BY-4.0.txt", "Copyright Twitter, Inc and other contributors, CC BY 4.0"),
        ("noto-Apache-2.0.txt", "Apache License, Version 2.0"),
        ("emoji-datasource-MIT.txt", "Permission is hereby granted"),
        ("CLDR-Unicode-3.0.txt", "UNICODE LICENSE V3"),
    ],
)
def test_the_pool_has_its_licences(name, words):
    assert words in (FOLDER / "LICENSES" / name).read_text(encoding="utf-8")
    assert f"LICENSES/{name}" in (FOLDER / "README.md").read_text(encoding="utf-8")
