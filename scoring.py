"""MMNeedle's scores: the official strict rule, a lenient reading beside it, format failures apart, and baselines.

The rule is one for every model and is fixed before the run: nothing here knows a model's name. It is that of the
benchmark's released scorer (Wang et al., arXiv 2406.11230, Wang-ML-Lab/multimodal-needle-in-a-haystack) but for its
defects: a missing answer is wrong instead of left out, positives and negatives never share a number, and the depths
of several pictures are counted each for itself.

M pictures of N x N cells, K needles. An answer row is a dict as `answering.py` writes it: `response` (None where the
question was broken), `ground_truth` "index, row, column" counted from 1 ("0, 0, 0" where the caption is absent; K of
them joined with "; "), `shape` (M, N, K), `kind` "positive" or "negative", `protocol`.
"""

import math
import re
from collections import Counter

from errors import UserError
from haystack import normalise
from intervals import mcnemar_exact, paired_bootstrap, rate
from processing_paligemma import locs_to_boxes

ABSENT = "-1"


# ---- the strict rule
def strict(response: str | None, truth: str, needles: int) -> dict:
    """What the official scorer says of one answer: existence, index, exact; for K > 1 also `first` and `each` needle.

    `each` holds (index, exact) of the answered needles only, as the official pooling has it. Two oddities are kept
    because published figures contain them: an empty answer claims existence on a positive, and "0, 0, 0" has the
    right index on a negative. None, a broken question, is wrong in everything.
    """
    if response is None:
        return {"existence": False, "index": False, "exact": False, "first": (False, False), "each": []}
    answer, absent = normalise(response), set(re.findall(r"\d+", truth)) == {"0"}
    told, true = ([part.strip() for part in text.split("; ")] if needles > 1 else [text] for text in (answer, truth))
    pairs = [(a.split(", ")[0] == t.split(", ")[0], a == t) for a, t in zip(told, true, strict=False)]
    return {
        "existence": (answer in absences(needles)) == absent,
        "index": len(told) == len(true) and all(index for index, _ in pairs),
        "exact": answer == ABSENT if absent else told == true,
        "first": pairs[0],
        "each": pairs,
    }


def absences(needles: int) -> set[str]:
    """Every answer that the official scorer takes for "no needle", once normalised."""
    if needles == 1:
        return {ABSENT}
    one = [ABSENT] * needles
    return {ABSENT, "; ".join(one), ", ".join(one), "".join(one), "; ".join(["-1, -1, -1"] * needles)}


# ---- the lenient reading
def lenient(response: str | None, needles: int = 1) -> str | None:
    """The answer meant: per needle the next -1 or the next three integers; None if the text does not hold K of them.

    One leading -1 stands for all needles where nothing else follows.
    """
    text = re.sub(r"<\w+>", " ", response or "")  # location tokens are no numbers
    numbers = re.findall(r"(?<!\w)-\d+|\d+", text)  # "1-2-1" and "row-2" have no minus
    if numbers and (set(numbers) == {ABSENT} or normalise(response) in absences(needles)):
        return "; ".join([ABSENT] * needles)
    found = []
    while numbers and len(found) < needles:
        size = 1 if numbers[0] == ABSENT else 3
        if len(numbers) < size:
            break
        found.append(", ".join(str(int(n)) for n in numbers[:size]))
        numbers = numbers[size:]
    return "; ".join(found) if len(found) == needles else None


def well_formed(response: str, needles: int = 1) -> bool:
    """Whether an answer has the form that was asked for, right or wrong."""
    one = r"(-1|\d+, \d+, \d+)"
    answer = normalise(response)
    return answer in absences(needles) or bool(re.fullmatch("; ".join([one] * needles), answer))


# ---- answers of other protocols, brought into the same form
def answers(rows: list[dict]) -> list[dict]:
    """Rows of any protocol as rows whose `response` the rules above can read: one row a needle question."""
    rows = merge_quadrants(rows) if any(row["protocol"] == "quadrant" for row in rows) else rows
    return [row | {"response": boxed(row)} if row["protocol"] == "detect" else row for row in rows]


def boxed(row: dict) -> str | None:
    """`detect`: the cell that holds the centre of the first box; no answer at all is "-1"; other text stays."""
    response, grid = row["response"], row["shape"][1]
    if response is None:
        return None
    if not response.strip():
        return ABSENT
    boxes = locs_to_boxes(response, grid, grid)
    if not boxes:
        return response
    x0, y0, x1, y1 = boxes[0][0]
    row_at, col_at = (min(int((low + high) / 2), grid - 1) + 1 for low, high in ((y0, y1), (x0, x1)))
    return f"1, {row_at}, {col_at}"


def merge_quadrants(rows: list[dict]) -> list[dict]:
    """`quadrant`: the two answers of a picture as one, row and column, for every model alike (arXiv 2507.15875)."""
    pairs: dict[str, dict] = {}
    for row in rows:
        name = row["id"].rpartition("/")[0] if "axis" in row else row["id"]  # a broken row is asked nothing
        pairs.setdefault(name, {})[row.get("axis")] = row
    merged = []
    for name, pair in pairs.items():
        told = [(pair[axis]["response"] if axis in pair else None) for axis in ("rows", "columns")]
        words = [text if text is None else text.strip().lower() for text in told]
        places = [{"top": 1, "bottom": 2}.get(words[0]), {"left": 1, "right": 2}.get(words[1])]
        response = f"1, {places[0]}, {places[1]}" if all(places) else " | ".join(map(str, told))
        merged.append(next(iter(pair.values())) | {"id": name, "response": None if None in told else response})
    return merged


# ---- scores
def score(rows: list[dict], skip_none: bool = False) -> dict[str, dict]:
    """Scores by setting ("1x2x2"), positives and negatives apart, every rate with its count and Wilson interval.

    `skip_none` leaves broken questions out of the denominators, as the official scorer does.
    """
    rows = [row for row in answers(rows) if not (skip_none and row["response"] is None)]
    settings = dict.fromkeys(row["setting"] for row in rows)
    return {name: score_setting([row for row in rows if row["setting"] == name]) for name in settings}


def score_setting(rows: list[dict]) -> dict:
    positives, negatives = ([row for row in rows if row["kind"] == kind] for kind in ("positive", "negative"))
    found = {"baselines": baselines(positives)}
    if positives:
        found["positive"] = score_positives(positives)
    if negatives:
        found["negative"] = score_kind(negatives)
    if positives and negatives:
        found["balanced existence"] = balanced(found["positive"]["existence"], found["negative"]["existence"])
    return found


def score_kind(rows: list[dict]) -> dict:
    """Existence, strict and lenient, and what could not be read, of positives or of negatives."""
    needles, wanted = rows[0]["shape"][2], rows[0]["kind"] == "negative"
    judged = [strict(row["response"], row["ground_truth"], needles) for row in rows]
    meant = [lenient(row["response"], needles) for row in rows]
    says_absent = [text is not None and set(text.split("; ")) == {ABSENT} for text in meant]
    heard = [row["response"] for row in rows if row["response"] is not None]
    scores = {
        "n": len(rows),
        "broken": len(rows) - len(heard),
        "format failures": rate(sum(not well_formed(text, needles) for text in heard), len(rows)),
    }
    if rows[0]["protocol"] != "quadrant":  # which offers no way to say "absent"
        scores["existence"] = rate(sum(j["existence"] for j in judged), len(rows))
        told = [text is not None and absent == wanted for text, absent in zip(meant, says_absent, strict=True)]
        scores["existence, lenient"] = rate(sum(told), len(rows))
    return scores


def score_positives(rows: list[dict]) -> dict:
    images, grid, needles = rows[0]["shape"]
    judged = [strict(row["response"], row["ground_truth"], needles) for row in rows]
    meant = [lenient(row["response"], needles) for row in rows]
    scores = score_kind(rows)
    for name in ("index", "exact"):
        scores[name] = rate(sum(j[name] for j in judged), len(rows))
    scores["exact, lenient"] = rate(sum(is_meant(row, text) for row, text in zip(rows, meant, strict=True)), len(rows))
    if needles > 1:
        each = [pair for j in judged for pair in j["each"]]
        for at, name in enumerate(("index", "exact")):
            scores[f"first {name}"] = rate(sum(j["first"][at] for j in judged), len(rows))
            # a needle that was not answered is charged; the official pooling is over the answered ones
            scores[f"individual {name}"] = rate(sum(pair[at] for pair in each), needles * len(rows))
            scores[f"individual {name}, official pooling"] = rate(sum(pair[at] for pair in each), len(each))
    scores["cells"] = places(rows, judged, lambda m, r, c: (r, c), [(r, c) for r in range(grid) for c in range(grid)])
    scores["depths"] = places(rows, judged, lambda m, r, c: (m,), [(m,) for m in range(images)])
    return scores


def is_meant(row: dict, meant: str | None) -> bool:
    return meant == row["ground_truth"]


def places(rows: list[dict], judged: list[dict], key, every: list[tuple]) -> list[dict]:
    """Exact answers by place, the needle's cell or its picture: one entry a place, each needle counted once.

    A broken row that names no place is in none of them.
    """
    right, total = Counter(), Counter()
    for row, verdict in zip(rows, judged, strict=True):
        if not row["ground_truth"]:
            continue
        for at, truth in enumerate(row["ground_truth"].split("; ")):
            place = key(*(int(n) - 1 for n in truth.split(", ")))
            total[place] += 1
            right[place] += at < len(verdict["each"]) and verdict["each"][at][1]
    return [{"place": [n + 1 for n in place], **rate(right[place], total[place])} for place in every]


def balanced(one: dict, other: dict) -> dict:
    """The mean of two independent rates; its interval from theirs (Zou and Donner 2008, MOVER)."""
    mean = (one["rate"] + other["rate"]) / 2
    below, above = (math.hypot(*(r["rate"] - r[end] for r in (one, other))) / 2 for end in ("low", "high"))
    return {"rate": mean, "low": mean - below, "high": mean + above, "n": one["n"] + other["n"]}


def baselines(positives: list[dict]) -> dict:
    """Rates of three answerers without eyes: a uniform guess, the best constant on these rows, and always "-1"."""
    always = {"existence, positives": 0.0, "existence, negatives": 1.0, "balanced existence": 0.5, "exact": 0.0}
    if not positives:
        return {"always -1": always}
    images, grid, needles = positives[0]["shape"]
    answer, times = Counter(row["ground_truth"] for row in positives).most_common(1)[0]
    indices = Counter(tuple(t.split(", ")[0] for t in row["ground_truth"].split("; ")) for row in positives)
    return {
        "uniform": {"exact": (images * grid**2) ** -needles, "index": images**-needles},
        "best constant": {
            "answer": answer,
            "exact": times / len(positives),
            "index": indices.most_common(1)[0][1] / len(positives),
        },
        "always -1": always,
    }


# ---- two runs against each other
def compare(first: list[dict], second: list[dict], judge) -> dict[str, dict]:
    """The same questions answered by two models: by setting and kind both rates, the paired difference, McNemar's p.

    `judge` says of a row whether it is right. Raises UserError when the ids differ, or what was asked under one id.
    """
    first, second = ({row["id"]: row for row in rows} for rows in (first, second))
    if set(first) != set(second):
        raise UserError(
            f"{len(set(first) ^ set(second))} questions are in one run alone ({min(set(first) ^ set(second))}): "
            "compare answers to the same questions"
        )
    asked = ("prompt", "ground_truth")
    other = [name for name in first if any(first[name].get(key) != second[name].get(key) for key in asked)]
    if other:
        raise UserError(
            f"{len(other)} questions differ between the runs ({other[0]}): compare answers to the same questions, of "
            "one protocol, one seed and the same pictures"
        )
    groups: dict[str, list] = {}
    for name, row in first.items():
        group = f"{row['setting']} {row['kind']}" if "kind" in row else row["setting"]
        groups.setdefault(group, []).append((judge(row), judge(second[name])))
    found = {}
    for name, pairs in groups.items():
        a, b = ([int(pair[i]) for pair in pairs] for i in (0, 1))
        difference, low, high = paired_bootstrap(a, b)
        only_a, only_b = (sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs))
        found[name] = {
            "first": rate(sum(a), len(a)),
            "second": rate(sum(b), len(b)),
            "difference": {"mean": difference, "low": low, "high": high},
            "only first": only_a,
            "only second": only_b,
            "p": mcnemar_exact(only_a, only_b),
        }
    return found


def judge(row: dict) -> bool:
    """What a row is compared by: the exact answer of a positive, the existence of a negative. One half of `quadrant`
    is right by itself."""
    if row["protocol"] == "quadrant" and "axis" in row and row["id"].endswith(row["axis"]):
        place = int(row["ground_truth"].split(", ")[1 if row["axis"] == "rows" else 2]) - 1
        words = {"rows": ("top", "bottom"), "columns": ("left", "right")}[row["axis"]]
        return (row["response"] or "").strip().lower() == words[place]
    response = boxed(row) if row["protocol"] == "detect" else row["response"]
    verdict = strict(response, row["ground_truth"], row["shape"][2])
    return verdict["exact" if row["kind"] == "positive" else "existence"]


# ---- what is printed
METRICS = {
    "positive": (
        "exact",
        "exact, lenient",
        "index",
        "existence",
        "existence, lenient",
        "first exact",
        "individual exact",
    ),
    "negative": ("existence", "existence, lenient"),
}
TITLES = {"positive": "caption present", "negative": "caption absent"}


def table(by_name: dict[str, dict], ranked: bool = False) -> list[str]:
    """Scores of models side by side, percent with 95 % Wilson intervals, baselines last.

    `ranked` answers were chosen among all possible ones: their exactness is another metric and is named so.
    """
    lines = []
    first = next(iter(by_name.values()))
    head = "".join(f"{name[-24:]:>26}" for name in by_name) + f"{'uniform':>10}{'constant':>10}{'all -1':>8}"
    for setting in (name for name in first if name != "attention"):
        lines.append(f"\n{setting:32}{head}")
        for kind, metrics in METRICS.items():
            told = [scores[setting].get(kind) for scores in by_name.values()]
            if told[0] is None:
                continue
            lines.append(f"{TITLES[kind]}, n = {told[0]['n']:,}")
            for metric in (*metrics, "format failures"):
                if metric in told[0]:
                    guesses = guessed(first[setting]["baselines"], kind, metric)
                    lines.append(
                        f"  {'ranked ' * (ranked and 'exact' in metric) + metric:30}"
                        + "".join(f"{percent(t[metric]):>26}" for t in told)
                        + guesses
                    )
            if any(t["broken"] for t in told):
                lines.append(f"  {'broken, counted wrong':30}" + "".join(f"{t['broken']:>26}" for t in told))
        if "balanced existence" in first[setting]:
            told = [percent(scores[setting]["balanced existence"]) for scores in by_name.values()]
            lines.append(f"{'balanced existence':32}" + "".join(f"{t:>26}" for t in told) + f"{'50.0':>28}")
    for name, scores in by_name.items():
        for setting, found in scores.get("attention", {}).items():
            shares = " ".join(f"{100 * share:.1f}" for share in found["share"])
            lines.append(
                f"\n{name} {setting}: attention on the needle's patches, percent of the pictures', by layer: {shares} "
                f"(even: {100 * found['even']:.1f}, n = {found['n']})"
            )
    return lines


def guessed(baselines: dict, kind: str, metric: str) -> str:
    """The three answerers without eyes, where they have a rate of this metric."""
    metric = metric.removesuffix(", lenient")
    if metric == "existence":  # a guess and a constant name a cell
        rates, always = ([1.0, 1.0], 0.0) if kind == "positive" else ([0.0, 0.0], 1.0)
    else:
        rates = [baselines.get(name, {}).get(metric) for name in ("uniform", "best constant")]
        always = None if None in rates else 0.0
    cells = zip((*rates, always), (10, 10, 8), strict=True)
    return "".join(f"{'' if r is None else f'{100 * r:.1f}':>{width}}" for r, width in cells)


def percent(told: dict) -> str:
    if told["rate"] is None:
        return "-"
    return f"{100 * told['rate']:.1f} [{100 * told['low']:.1f}, {100 * told['high']:.1f}]"
