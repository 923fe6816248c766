"""MMNeedle's official rule by golden cases, and our additional scores."""

import random

import pytest

from errors import UserError
from needle_eval import mmneedle
from needle_eval.mmneedle import format_table, score
from needle_eval.mmneedle_rules import is_well_formed, parse_lenient, prepare_rows, score_strict
from needle_eval.report import compare_answers

ONE = "1, 2, 1"
TWO = "1, 2, 1; 1, 1, 2"
NONE = "0, 0, 0"


def row(response, truth=ONE, needles=1, name="0", protocol="finetuned", shape=None, **more) -> dict:
    kind = "negative" if truth.startswith("0") else "positive"
    shape = shape or (1, 2, needles)
    result = {"id": name, "setting": "1x2x2", "response": response, "ground_truth": truth, "kind": kind, "shape": shape}
    return result | {"protocol": protocol, "row": 0, "target": "x.jpg", "caption": ["a cat"]} | more


# ---- golden tables: the released scorer's verdicts
def cases(truth, index, exact, exist, texts):
    return [(truth, text, (index, exact, exist)) for text in texts]


@pytest.mark.parametrize(
    ("truth", "response", "verdict"),
    cases(ONE, 1, 1, 1, ["1, 2, 1", "1, 2, 1.", " 1, 2, 1\n", ".1, 2, 1"])
    + cases(ONE, 0, 0, 1, ["1,2,1", "1,\n2, 1", "(1, 2, 1)", "'1, 2, 1'", "Answer: 1, 2, 1", "01, 2, 1"])
    + cases(ONE, 1, 0, 1, ["1", "1, 2", "1, 1, 2", "1, 2, 1, 1", "1, 2, 1\n\n1, 2, 1", "1, 2, 1; 1, 2, 1"])
    + cases(ONE, 0, 0, 0, ["-1", "-1."])
    + cases(ONE, 0, 0, 1, ["-1, -1, -1", ""])
    + cases(NONE, 0, 1, 1, ["-1", "-1.", "-1\n"])
    + cases(NONE, 0, 0, 0, ["-1, -1, -1", "", "No match", "- 1", "1, 1, 1"])
    + cases(NONE, 1, 0, 0, ["0, 0, 0"]),
)
def test_one_needle(truth, response, verdict):
    result = score_strict(response, truth, 1)
    assert (result["index"], result["exact"], result["existence"]) == tuple(map(bool, verdict))


@pytest.mark.parametrize(
    ("truth", "response", "index", "exact", "first", "each_index", "each_exact", "exist"),
    [
        (TWO, TWO, 1, 1, (1, 1), [1, 1], [1, 1], 1),
        (TWO, "1, 2, 1", 0, 0, (1, 1), [1], [1], 1),
        (TWO, "1, 1, 2; 1, 2, 1", 1, 0, (1, 0), [1, 1], [0, 0], 1),
        (TWO, "1, 2, 1;1, 1, 2", 0, 0, (1, 0), [1], [0], 1),
        (TWO, "1, 2, 1\n1, 1, 2", 0, 0, (1, 0), [1], [0], 1),
        (TWO, "1, 2, 1; -1", 0, 0, (1, 1), [1, 0], [1, 0], 1),
        (TWO, "1, 2, 1; 1, 1, 2; 1, 1, 1", 0, 0, (1, 1), [1, 1], [1, 1], 1),
        (TWO, "-1", 0, 0, (0, 0), [0], [0], 0),
        (TWO, "-1; -1", 0, 0, (0, 0), [0, 0], [0, 0], 0),
        (f"{NONE}; {NONE}", "-1", 0, 1, (0, 0), [0], [0], 1),
        (f"{NONE}; {NONE}", "-1; -1", 0, 0, (0, 0), [0, 0], [0, 0], 1),
        (f"{NONE}; {NONE}", "-1, -1", 0, 0, (0, 0), [0], [0], 1),
        (f"{NONE}; {NONE}", "-1\n-1", 0, 0, (0, 0), [0], [0], 1),
        (f"{NONE}; {NONE}", "-1, -1, -1; -1, -1, -1", 0, 0, (0, 0), [0, 0], [0, 0], 1),
        (f"{NONE}; {NONE}", "-1;-1", 0, 0, (0, 0), [0], [0], 0),
        (f"{NONE}; {NONE}", "-1; 1, 1, 1", 0, 0, (0, 0), [0, 0], [0, 0], 0),
        (f"{NONE}; {NONE}", "", 0, 0, (0, 0), [0], [0], 0),
    ],
)
def test_two_needles(truth, response, index, exact, first, each_index, each_exact, exist):
    result = score_strict(response, truth, 2)
    assert (result["index"], result["exact"], result["existence"]) == (bool(index), bool(exact), bool(exist))
    assert result["first"] == tuple(map(bool, first))
    assert [pair[0] for pair in result["each"]] == each_index and [pair[1] for pair in result["each"]] == each_exact


def official_verdict(response: str, truth: str, needles: int) -> dict:
    """The released scorer's rule for one row, transcribed independently of the code under test.

    Both strings lose newlines, outer whitespace and full stops. For several needles both are split at "; ", the parts
    stripped, and the answer joined again before it is compared with the ways to say that there is no needle.
    """
    answer = response.replace("\n", "").strip().strip(".").strip()
    if needles == 1:
        true = "-1" if truth == "0, 0, 0" else truth
        return {
            "index": answer.split(", ")[0] == truth.split(", ")[0],
            "exact": answer == true,
            "existence": (true == "-1") == (answer == "-1"),
        }
    nothing = truth == "; ".join(["0, 0, 0"] * needles)
    parts, wanted = ([part.strip() for part in text.split("; ")] for text in (answer, truth))
    said_nothing = "; ".join(parts) in (
        "-1",
        "; ".join(["-1"] * needles),
        ", ".join(["-1"] * needles),
        "-1" * needles,
        "; ".join(["-1, -1, -1"] * needles),
    )
    same_count = len(parts) == len(wanted)
    return {
        "index": same_count and all(p.split(", ")[0] == w.split(", ")[0] for p, w in zip(parts, wanted, strict=True)),
        "exact": "; ".join(parts) == "-1" if nothing else parts == wanted,
        "existence": said_nothing == nothing,
    }


def test_two_thousand_answers_are_judged_as_the_official_rule_judges_them():
    rng = random.Random(0)
    pieces = ["1", "2", "-1", "0", ", ", ",", "; ", ";", " ; ", ";  ", " ", "\n", ".", "1, 2, 1", "1, 1, 2"]
    pieces += ["-1, -1, -1", "0, 0, 0", "None", "\t"]
    for _ in range(2000):
        needles = rng.choice((1, 2, 2, 2, 5))
        place = rng.choice(("0, 0, 0", "place"))
        truth = "; ".join(
            f"1, {rng.choice('12')}, {rng.choice('12')}" if place == "place" else place for _ in range(needles)
        )
        parts = rng.choice((truth.split("; "), ["-1"] * needles, ["-1, -1, -1"] * needles, rng.choices(pieces, k=4)))
        response = rng.choice(("; ", ";", " ; ", ";  ", ", ", "", "\n")).join(parts)
        if rng.random() < 0.3:
            cut = rng.randrange(len(response) + 1)
            response = response[:cut] + rng.choice(pieces) + response[cut:]
        found = score_strict(response, truth, needles)
        assert {key: found[key] for key in ("index", "exact", "existence")} == official_verdict(
            response, truth, needles
        ), (
            response,
            truth,
        )


@pytest.mark.parametrize("response", ["-1 ; -1", "-1;  -1", "-1, -1, -1 ; -1, -1, -1"])
def test_blanks_beside_the_separator_do_not_hide_that_there_is_no_needle(response):
    assert score_strict(response, "0, 0, 0; 0, 0, 0", 2)["existence"]
    assert not score_strict(response, TWO, 2)["existence"]


@pytest.mark.parametrize(
    ("response", "needles", "meant"),
    [
        ("1, 2, 1", 1, "1, 2, 1"),
        ("(1,2,1)", 1, "1, 2, 1"),
        ("1-2-1", 1, "1, 2, 1"),
        ("image-1, row-2, column-1", 1, "1, 2, 1"),
        ("<loc0032><loc0100><loc0200><loc0300> cat", 1, None),
        ("The image is 1, row 02, column 1.", 1, "1, 2, 1"),
        ("-1", 1, "-1"),
        ("Answer: -1, there is none", 1, "-1"),
        ("-1, -1, -1", 1, "-1"),
        ("1, 2", 1, None),
        ("", 1, None),
        (None, 1, None),
        ("1, 2, 1;1, 1, 2", 2, "1, 2, 1; 1, 1, 2"),
        ("1, 2, 1; -1", 2, "1, 2, 1; -1"),
        ("-1", 2, "-1; -1"),
        ("-1\n-1", 2, "-1; -1"),
        ("1, 2, 1", 2, None),
    ],
)
def test_the_lenient_reading(response, needles, meant):
    assert parse_lenient(response, needles) == meant


def test_format_failures_are_kept_apart_from_wrong_answers():
    assert all(is_well_formed(text) for text in ("1, 2, 1", "2, 9, 9.", "-1"))
    assert not any(is_well_formed(text) for text in ("1,2,1", "", "red apple", "-1, -1, -1", "(1, 2, 1)"))
    assert is_well_formed(TWO, 2) and is_well_formed("1, 2, 1; -1", 2) and is_well_formed("-1, -1", 2)
    assert not is_well_formed("1, 2, 1", 2)


# ---- rates
def test_broken_answers_stay_in_the_denominator_unless_the_official_rule_is_asked_for():
    rows = [row("1, 2, 1", name="0"), row(None, name="1"), row("1, 1, 1", name="2"), row(None, NONE, name="3")]
    result = score(rows)["1x2x2"]
    assert (result["positive"]["exact"]["right"], result["positive"]["exact"]["n"], result["positive"]["broken"]) == (
        1,
        3,
        1,
    )
    assert result["positive"]["existence"]["right"] == 2 and result["negative"]["existence"]["right"] == 0
    assert result["positive"]["format failures"]["right"] == 0
    result = score([r for r in rows if r["response"] is not None])["1x2x2"]
    assert result["positive"]["exact"]["n"] == 2 and "negative" not in result and "balanced existence" not in result


@pytest.mark.parametrize("protocol", ["official", "detect", "quadrant"])
def test_a_broken_row_without_a_place_is_wrong_and_does_not_stop_the_scores(protocol):
    axis = {"axis": "rows"} if protocol == "quadrant" else {}
    good = row("bottom" if axis else "1, 2, 1", name="1x2x2/0/rows", protocol=protocol, **axis)
    rows = [good, row(None, "", name="1x2x2/1", protocol=protocol, error="lost")]
    if protocol == "quadrant":
        rows.append(good | {"id": "1x2x2/0/columns", "axis": "columns", "response": "left"})
    result = score(rows)["1x2x2"]["positive"]
    assert (result["exact"]["right"], result["exact"]["n"], result["broken"]) == (1, 2, 1)
    assert [cell["n"] for cell in result["cells"]] == [0, 0, 1, 0], "in the rates, in no cell"


def test_one_needle_s_cells_and_rate_agree():
    result = score([row("1, 2, 1; 1, 2, 2")])["1x2x2"]["positive"]
    assert result["exact"]["right"] == sum(cell["right"] for cell in result["cells"]) == 0


def test_baselines_stand_beside_the_metrics_they_have():
    def guesses(kind, metric):
        return mmneedle.format_baselines(score([row(ONE)])["1x2x2"]["baselines"], kind, metric).split()

    assert guesses("positive", "exact") == ["25.0", "100.0", "0.0"] and guesses("positive", "index")[2] == "0.0"
    assert guesses("positive", "existence") == ["100.0", "100.0", "0.0"]
    assert guesses("negative", "existence, lenient") == ["0.0", "0.0", "100.0"]
    assert guesses("negative", "format failures") == guesses("positive", "format failures") == []


def test_positives_and_negatives_never_share_a_number():
    rows = [row("-1", name=str(i)) for i in range(10)] + [row("-1", NONE, name=str(10 + i)) for i in range(30)]
    result = score(rows)["1x2x2"]
    assert result["positive"]["existence"]["rate"] == 0 and result["negative"]["existence"]["rate"] == 1
    assert result["balanced existence"]["rate"] == 0.5, "the mean of both, whatever their sizes"
    assert result["balanced existence"]["low"] < 0.5 < result["balanced existence"]["high"]


def test_depths_are_counted_each_for_itself():
    """The released scorer aliases one list, which gives every depth the same accuracy."""
    rows = [row(f"{m}, 1, 1", f"{m}, 1, 1", name=f"a{m}", shape=(3, 2, 1)) for m in (1, 2, 3)]
    rows += [row("1, 1, 1", f"{m}, 1, 1", name=f"b{m}", shape=(3, 2, 1)) for m in (1, 2, 3)]
    result = score(rows)["1x2x2"]["positive"]
    assert [entry["rate"] for entry in result["depths"]] == [1.0, 0.5, 0.5]
    assert [cell["n"] for cell in result["cells"]] == [6, 0, 0, 0] and result["cells"][1]["rate"] is None


def test_missing_answers_are_charged_and_the_official_pooling_stands_beside():
    rows = [row(TWO, TWO, 2, "0"), row("1, 2, 1", TWO, 2, "1"), row("-1", TWO, 2, "2")]
    result = score(rows)["1x2x2"]["positive"]
    assert (result["individual exact"]["right"], result["individual exact"]["n"]) == (3, 6)
    pooled = result["individual exact, official pooling"]
    assert (pooled["right"], pooled["n"]) == (3, 4)
    assert result["first exact"]["right"] == 2 and sum(cell["n"] for cell in result["cells"]) == 6


def test_baselines():
    truths = ["1, 1, 1"] * 3 + ["1, 2, 2"] * 2
    result = score([row("x", truth, name=str(i)) for i, truth in enumerate(truths)])["1x2x2"]["baselines"]
    assert result["uniform"] == {"exact": 0.25, "index": 1.0}
    assert result["best constant"] == {"answer": "1, 1, 1", "exact": 0.6, "index": 1.0}
    assert result["always -1"]["existence, negatives"] == 1.0 and result["always -1"]["balanced existence"] == 0.5
    broken = [row(None, "", name=f"broken{i}") for i in range(4)]  # no constant answer can be right about them
    result = score([row("x", truths[0], name="whole"), *broken])["1x2x2"]["baselines"]["best constant"]
    assert result == {"answer": "1, 1, 1", "exact": 0.2, "index": 0.2}


# ---- other protocols, one rule
def test_the_centre_of_a_box_is_its_cell():
    def cell(response, grid=4):
        return prepare_rows([row(response, protocol="detect", shape=(1, grid, 1))])[0]["response"]

    assert cell("<loc0000><loc0256><loc0255><loc0511> red apple") == "1, 1, 2"
    assert cell("<loc0768><loc0512><loc1023><loc0767> red apple ; <loc0000><loc0000><loc0100><loc0100> x") == "1, 4, 3"
    assert cell("<loc1023><loc1023><loc1023><loc1023> a") == "1, 4, 4"
    assert cell("<loc0000><loc0512><loc1000><loc1023> a", grid=2) == "1, 1, 2"
    assert cell("") == "-1" and cell("\n") == "-1" and cell(None) is None
    assert cell("red apple") == "red apple", "a format failure, and no absence"


@pytest.mark.parametrize(
    ("rows_answer", "columns_answer", "response"),
    [
        ("Bottom", " left\n", "1, 2, 1"),
        ("top", "RIGHT", "1, 1, 2"),
        ("Bottom.", "left", "Bottom. | left"),
        ("bottom", "", "bottom | "),
        ("left", "bottom", "left | bottom"),
        ("bottom", None, None),
    ],
)
def test_quadrants_need_row_and_column(rows_answer, columns_answer, response):
    rows = [
        row(text, protocol="quadrant", name=f"1x2x2/0/{axis}", axis=axis)
        for axis, text in (("rows", rows_answer), ("columns", columns_answer))
    ]
    merged = prepare_rows(rows)
    assert len(merged) == 1 and merged[0]["id"] == "1x2x2/0" and merged[0]["response"] == response
    result = score(rows)["1x2x2"]["positive"]
    assert result["exact"]["right"] == (response == ONE) and "existence" not in result
    assert result["format failures"]["right"] == (response is not None and "|" in response)


def test_the_same_rule_for_every_model():
    """Only a row's answer counts: names permuted, scores unchanged (the source project's scorer kept them apart)."""
    rows = [row("1, 2, 1", name="0"), row("bottom", name="1"), row("-1", NONE, name="2")]
    for protocol in ("finetuned", "official", "rank"):
        named = [[r | {"protocol": protocol, "model": model} for r in rows] for model in ("diff", "original")]
        assert score(named[0]) == score(named[1])
        assert format_table({"diff": score(named[0])})[2:] == format_table({"diff": score(named[1])})[2:]


# ---- comparison
def test_compare_counts_pairs():
    a = [row(ONE if i < 6 else "1, 1, 1", name=str(i)) for i in range(10)]
    b = [row(ONE if i >= 4 else "1, 1, 1", name=str(i)) for i in reversed(range(10))]
    result = compare_answers(a, b, mmneedle)["1x2x2 positive"]
    assert (result["first"]["right"], result["second"]["right"]) == (6, 6)
    assert (result["only first"], result["only second"]) == (4, 4)
    assert result["difference"]["mean"] == 0 and result["difference"]["low"] < 0 < result["difference"]["high"]
    assert result["p"] == 1.0
    with pytest.raises(UserError, match="2 questions are in only one of the runs"):
        compare_answers(a, b[:8], mmneedle)
    for changed in ({"prompt": "where is a dog?"}, {"ground_truth": "1, 2, 2"}):
        with pytest.raises(UserError, match="1 questions differ between the runs .3."):
            compare_answers(a, [r | (changed if r["id"] == "3" else {}) for r in b], mmneedle)


def test_the_table_shows_models_side_by_side():
    rows = [row("1, 2, 1", name="0"), row("-1", NONE, name="1"), row(None, name="2")]
    lines = "\n".join(format_table({"one": score(rows), "two": score(rows)}))
    assert (
        lines.count("50.0 [9.5, 90.5]") >= 4 and "broken, counted wrong" in lines and "caption absent, n = 1" in lines
    )
