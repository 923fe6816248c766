"""Build pool.parquet: captioned images of concrete things, each drawn in three styles.

Pack four npm packages and unpack each into a folder of its own below one folder PACKAGES:

    mkdir PACKAGES && cd PACKAGES
    for package in @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 \\
                   emoji-datasource-twitter@16.0.0 cldr-annotations-full@48.2.0; do
        archive=$(npm pack "$package" | tail -n 1)
        mkdir "${archive%.tgz}" && tar xzf "$archive" -C "${archive%.tgz}"
    done

    python assets/haystack-pool/make_pool.py PACKAGES

The same packages and concepts.txt give the same bytes under Pillow 13.0.0 and pyarrow 26.0.1; under others, the same
pixels.
"""

import argparse
import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).resolve().parent
SEED = 0
N_UNSEEN = 60  # concepts that no training row shows, in any style
FLUENT_SIZE = 96  # shipped at 256 px; a haystack's cell is at most 112 px wide

FLUENT = "lobehub-fluent-emoji-3d-1.1.0/package/assets/{code}.webp"
TWEMOJI = "emoji-datasource-twitter-16.0.0/package/img/twitter/64/{code}.png"
NOTO = "emoji-datasource-google-16.0.0/package/img/google/64/{code}.png"
STYLES = {"fluent": FLUENT, "noto": NOTO, "twemoji": TWEMOJI}  # in the order of the rows of one concept
NAMES = "cldr-annotations-full-48.2.0/package/annotations/en/annotations.json"
TRAIN_STYLES = ("fluent", "twemoji")  # noto is the style that tests keep to themselves

SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("concept", pa.string()),
        ("style", pa.string()),
        ("split", pa.string()),
    ]
)


def read_concepts(path):
    """`{code point: (category, name)}` from concepts.txt, in the file's order."""
    concepts, category = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            code, name = line.split(" ", 1)
            if code in concepts:
                raise SystemExit(f"{path.name}: {code} is listed twice")
            concepts[code] = (category, name)
    return concepts


def check_names(concepts, packages):
    """Stop where concepts.txt differs from the CLDR short name, or names two concepts alike."""
    annotations = json.loads((packages / NAMES).read_text(encoding="utf-8"))["annotations"]["annotations"]
    for code, (_, name) in concepts.items():
        short_name = annotations[chr(int(code, 16))]["tts"][0].lower()
        if name != short_name:
            raise SystemExit(f"concepts.txt: {code} is {short_name!r} in CLDR, not {name!r}")
    if len({name for _, name in concepts.values()}) != len(concepts):
        raise SystemExit("concepts.txt: two concepts share a name")


def choose_unseen(concepts):
    """`N_UNSEEN` code points, spread over the categories in proportion to their sizes.

    Every k-th of a list that is sorted by category and shuffled within; a hash shuffles, because it is the same on
    every version of Python.
    """

    def key(code):
        return concepts[code][0], hashlib.sha256(f"{SEED}:{code}".encode()).hexdigest()

    ordered = sorted(concepts, key=key)
    return {ordered[i * len(ordered) // N_UNSEEN] for i in range(N_UNSEEN)}


def encode(packages, code, style):
    """One image as lossless WebP with its alpha channel; only the Fluent ones change size."""
    paths = [packages / STYLES[style].format(code=name) for name in (code, f"{code}-fe0f")]  # fe0f: "as a picture"
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise SystemExit(f"no image of {code} in style {style}: {paths[0]} is missing")
    with Image.open(path) as image:
        image = image.convert("RGBA")
    if style == "fluent":
        image = image.resize((FLUENT_SIZE, FLUENT_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=75, method=4)  # lossless: quality is effort
    return buffer.getvalue()


def split_of(code, style, unseen):
    """Unseen concepts are tested in every style; the others are trained in two styles and tested in the third."""
    if code in unseen:
        return "test_concept"
    return "train" if style in TRAIN_STYLES else "test_style"


def build(packages):
    """The whole pool as a table, sorted by concept and style."""
    concepts = read_concepts(HERE / "concepts.txt")
    check_names(concepts, packages)
    unseen = choose_unseen(concepts)
    rows = [
        {
            "image": encode(packages, code, style),
            "caption": concepts[code][1],
            "concept": code,
            "style": style,
            "split": split_of(code, style, unseen),
        }
        for code in sorted(concepts)
        for style in STYLES
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder that holds the unpacked npm packages")
    parser.add_argument("--output", type=Path, default=HERE / "pool.parquet")
    args = parser.parse_args()
    table = build(args.packages)
    # The images are compressed already: dictionaries and statistics would only store some of them twice.
    pq.write_table(table, args.output, compression="none", use_dictionary=False, write_statistics=False)
    digest = hashlib.sha256(args.output.read_bytes()).hexdigest()
    print(f"{args.output.name}: {table.num_rows} rows, {args.output.stat().st_size} bytes, sha256 {digest}")


if __name__ == "__main__":
    main()
