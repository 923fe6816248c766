"""When an MMNeedle answer is right: the official rule, a lenient parser, and conversion of other protocols' answers.

No torch is imported here.
"""

import re

from boxes import locs_to_boxes
from needle_eval.mmneedle_prompts import ABSENT
from needle_eval.questions import normalise


# ---- the strict rule
def score_strict(response: str | None, truth: str, needles: int) -> dict:
    """The official scorer's verdict on one answer: existence, index, exact; for K > 1 also `first` and `each` needle.

    `each` holds (index, exact) of the answered needles only, as in the official pooling. Two oddities are kept because
    published numbers contain them: an empty answer counts as claiming existence on a positive, and "0, 0, 0" has the
    right index on a negative. None, for a broken question, is wrong in everything.
    """
    if response is None:
        return {"existence": False, "index": False, "exact": False, "first": (False, False), "each": []}
    absent = set(re.findall(r"\d+", truth)) == {"0"}
    given, true = split_needles(normalise(response), needles), split_needles(truth, needles)
    pairs = [(g.split(", ")[0] == t.split(", ")[0], g == t) for g, t in zip(given, true, strict=False)]
    return {
        "existence": says_absent(response, needles) == absent,
        "index": len(given) == len(true) and all(index for index, _ in pairs),
        "exact": given == [ABSENT] if absent else given == true,
        "first": pairs[0],
        "each": pairs,
    }


def split_needles(answer: str, needles: int) -> list[str]:
    """The parts of an answer, one per needle, as the official scorer splits it."""
    return [part.strip() for part in answer.split("; ")] if needles > 1 else [answer]


def says_absent(response: str, needles: int) -> bool:
    """Whether the official scorer reads an answer as "no needle"."""
    return "; ".join(split_needles(normalise(response), needles)) in absent_answers(needles)


def absent_answers(needles: int) -> set[str]:
    """Every answer that the official scorer reads as "no needle", normalised, split and joined again."""
    if needles == 1:
        return {ABSENT}
    one = [ABSENT] * needles
    return {ABSENT, "; ".join(one), ", ".join(one), "".join(one), "; ".join(["-1, -1, -1"] * needles)}


# ---- the lenient parser
def parse_lenient(response: str | None, needles: int = 1) -> str | None:
    """The intended answer: for each needle the next -1 or the next three integers; None if the text has fewer than K.

    If -1 is the only number, it stands for all needles.
    """
    text = re.sub(r"<\w+>", " ", response or "")  # location tokens are not numbers
    numbers = re.findall(r"(?<!\w)-\d+|\d+", text)  # the hyphens in "1-2-1" and "row-2" are not minus signs
    if numbers and (set(numbers) == {ABSENT} or says_absent(response, needles)):
        return "; ".join([ABSENT] * needles)
    found = []
    while numbers and len(found) < needles:
        size = 1 if numbers[0] == ABSENT else 3
        if len(numbers) < size:
            break
        found.append(", ".join(str(int(n)) for n in numbers[:size]))
        numbers = numbers[size:]
    return "; ".join(found) if len(found) == needles else None


def is_well_formed(response: str, needles: int = 1) -> bool:
    """Whether an answer has the requested format, right or wrong."""
    one = r"(-1|\d+, \d+, \d+)"
    answer = "; ".join(split_needles(normalise(response), needles))
    return answer in absent_answers(needles) or bool(re.fullmatch("; ".join([one] * needles), answer))


# ---- answers of other protocols, converted to the same format
def prepare_rows(rows: list[dict]) -> list[dict]:
    """Convert rows of any protocol to rows whose `response` the rules above can read, one per question."""
    rows = merge_quadrants(rows)
    return [row | {"response": cell_of_box(row)} if row["protocol"] == "detect" else row for row in rows]


def cell_of_box(row: dict) -> str | None:
    """`detect`: the cell that contains the centre of the first box; "-1" for an empty answer; other text is kept."""
    response, grid = row["response"], row["shape"][1]
    if response is None:
        return None
    if not response.strip():
        return ABSENT
    boxes = locs_to_boxes(response, grid, grid)
    if not boxes:
        return response
    x0, y0, x1, y1 = boxes[0][0]
    row_number, column_number = (min(int((low + high) / 2), grid - 1) + 1 for low, high in ((y0, y1), (x0, x1)))
    return f"1, {row_number}, {column_number}"


def merge_quadrants(rows: list[dict]) -> list[dict]:
    """`quadrant`: merge the two answers about an image into one row and column (arXiv 2507.15875).

    Rows without an axis are kept: rows of other protocols, merged rows, and broken rows, which were never asked.
    """
    merged, pairs = [], {}
    for row in rows:
        name = row["id"].rpartition("/")[0]
        if row.get("axis") is None:
            merged.append(row)
        elif name in pairs:
            pairs[name][row["axis"]] = row["response"]
        else:
            pairs[name] = {row["axis"]: row["response"]}
            merged.append({key: value for key, value in row.items() if key != "axis"} | {"id": name})
    for row in merged:
        if row["id"] in pairs:
            row["response"] = join_quadrants(pairs[row["id"]].get("rows"), pairs[row["id"]].get("columns"))
    return merged


def join_quadrants(rows: str | None, columns: str | None) -> str | None:
    """The place that "top" or "bottom" and "left" or "right" name; if either answer is different, both unchanged."""
    if rows is None or columns is None:
        return None
    row, column = (
        {"top": 1, "bottom": 2}.get(rows.strip().lower()),
        {"left": 1, "right": 2}.get(columns.strip().lower()),
    )
    return f"1, {row}, {column}" if row and column else f"{rows} | {columns}"
