"""The study's report: verdicts by the plan's rule, power on simulated records, no early results."""

import random
import re

import msgspec
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from simulated_study import ENVIRONMENT, PAIRED_SD, make_plan, pack, simulate_conversion, simulate_symbolic

import study_report
from errors import UserError
from files import write_json
from needle_eval.statistics import format_interval, format_p
from study_figure import draw_figures
from study_records import Answers, ConversionRecord, endpoint_conditions, hash_plan, points, read_records, record_path
from study_report import (
    Contrast,
    answer,
    core_contrasts,
    core_verdict,
    format_report,
    group_records,
    symbolic_contrasts,
    verdict,
)

PLAN = make_plan({"gate": "rival"})
FIGURES = ("figure.png", "summary.png")


@pytest.fixture(scope="module")
def records():
    """A finished study: split 1 point better than standard, V1 6 % faster."""
    rng = np.random.default_rng(0)
    found = simulate_conversion(PLAN, {"split": 1.0, "gate": -9.0}, rng)
    return found + simulate_symbolic(PLAN, {"v1": -0.06, "double_width": -0.12, "double_width_norm": -0.12}, rng)


def conversion_group(plan, records):
    return group_records(plan["A"], "A", records)[0]


# ---- the rule
def differences(mean: float, sd: float, n: int = 12) -> list[float]:
    """n numbers of exactly this mean and standard deviation."""
    z = np.linspace(-1, 1, n)
    return (mean + sd * z / z.std(ddof=1)).tolist()


@pytest.mark.parametrize(
    ("mean", "sd", "holm_p", "expected"),
    [
        (-0.5, 0.4, 0.01, "hurts"),
        (-5, 1, 0.001, "hurts"),
        (-5, 1, 0.06, "undecided"),
        (5, 1, 0.001, "helps"),
        (1, 0.5, 0.001, "helps, less than what matters"),
        (3, 2, 0.001, "helps, size unclear"),  # 95 % interval 1.7 to 4.3
        (4, 2, 0.001, "helps, size unclear"),  # 2.7 to 5.3
        (3, 2, 0.06, "undecided"),
        (0.5, 2, 0.4, "no practical difference"),
        (0.5, 6, 0.7, "undecided"),
        (2.2, 1.4, 0.06, "no practical difference"),  # 90 % interval 1.5 to 2.9
        (2.4, 1.4, 0.06, "undecided"),  # 1.7 to 3.1
    ],
)
def test_the_verdict_is_the_first_that_applies(mean, sd, holm_p, expected):
    assert verdict(Contrast("split", "standard", list(range(12)), differences(mean, sd), holm_p)) == expected


def test_only_three_helps_name_the_subtraction():
    helps = Contrast("split", "standard", list(range(12)), differences(5, 1), 0.001)
    unclear = Contrast("split", "flipped", list(range(12)), differences(3, 2), 0.001)
    assert core_verdict([helps, helps, helps]) == "helps (and it is the subtraction)"
    assert core_verdict([helps, helps, unclear]) == "helps"
    assert core_verdict([unclear, helps, helps]) == "helps, size unclear"


# ---- the whole path from records to verdicts
def test_a_planted_4_and_a_planted_0_are_called_right_at_the_plan_s_power():
    plan, rng, n = make_plan(), np.random.default_rng(1), 150
    found = {}
    for effect in (4.0, 0.0):
        studies = [
            core_contrasts(conversion_group(plan, simulate_conversion(plan, {"split": effect}, rng, 400, True)))
            for _ in range(n)
        ]
        spread = np.sqrt(np.mean([c.t["sd"] ** 2 for study in studies for c in study]))
        assert spread == pytest.approx(PAIRED_SD, rel=0.05)  # the simulation has the spread that the plan assumes
        found[effect] = [core_verdict(study) for study in studies]
        means = [study[0].t["mean"] for study in studies]
        assert np.mean(means) == pytest.approx(effect, abs=4 * PAIRED_SD / np.sqrt(12 * n))
    # 4 points: at least the power of the first step of Holm's test; a true 0: TOST's .87, see test_power_of_the_plan
    critical, noncentral = stats.t.isf(0.05 / 6, 11), 4 / PAIRED_SD * np.sqrt(12)
    power = stats.nct.sf(critical, 11, noncentral)
    helped = np.mean([v.startswith("helps") for v in found[4.0]])
    assert power > 0.9 and helped > power - 3 * np.sqrt(power * (1 - power) / n)
    null = np.mean([v == "no practical difference" for v in found[0.0]])
    assert abs(null - 0.87) < 3 * np.sqrt(0.87 * 0.13 / n)
    assert np.mean([v.startswith(("helps", "hurts")) for v in found[0.0]]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)


def test_a_planted_speed_up_from_scratch_is_called_right(records):
    found = symbolic_contrasts(group_records(PLAN["B1"], "B1", records)[0])
    primary = [of_pairs[0] for of_pairs in found.values()]
    assert [(c.arm, c.baseline) for c in primary] == [("v1", "double_width_norm")] * 2
    for c in primary:
        standard_error = 0.04 * np.sqrt(2 / 16)
        assert c.t["mean"] == pytest.approx(0.06, abs=3 * standard_error)
        assert study_report.steps_verdict(c) == "more steps"
    for of_pairs in found.values():
        assert (of_pairs[-1].arm, study_report.steps_verdict(of_pairs[-1])) == ("v2", "undecided")  # planted: 0
    text = "\n".join(format_report(PLAN, records))
    assert re.search(r"without the norm is faster than V1 is confirmed \(steps against V1: -\d %", text)


def test_the_subtraction_is_named_only_against_all_three_controls():
    """A plan without one of the controls cannot say that the subtraction is what helps."""
    found = [Contrast("split", b, list(range(12)), differences(9.0, 2.0)) for b in ("standard", "additive", "flipped")]
    for one in found:
        one.holm_p = 0.001
    assert core_verdict(found) == "helps (and it is the subtraction)"
    assert core_verdict(found[:2]) == "helps"


# ---- what the numbers are
def test_measures_of_one_run():
    right = {"4 look-alike": 8, "4 noise": 8, "16 look-alike": 7, "16 noise": 5, "64 look-alike": 3, "64 noise": 5}
    right |= {"16 absent": 9, "64 absent": 7, "16 unseen style": 2}
    answers = {name: pack(np.arange(10) < count) for name, count in right.items()}
    record = ConversionRecord(
        study="A", plan=hash_plan(PLAN["A"]), arm="split", seed=0, trained_parameters=1, num_concepts=5,
        final_loss=None, lambdas=[], answers=answers, needle_shares=[0.1, 0.3], knockout={},
        log_likelihoods={"16 noise": -1.0, "64 noise": -2.0}, forward_flops=1, **ENVIRONMENT,
    )  # fmt: skip
    conditions = endpoint_conditions(PLAN["A"])
    assert conditions == ["16 look-alike", "16 noise", "64 look-alike", "64 noise"]
    assert points(record, conditions) == pytest.approx(50)
    assert study_report.false_alarms(record) == pytest.approx(20)
    assert study_report.accuracy_by_cells(record) == pytest.approx({4: 0.8, 16: 0.6, 64: 0.4})
    assert study_report.slope(record) == pytest.approx(-10)
    assert study_report.cells_at_half(record) == pytest.approx(5, abs=0.05)  # 32 cells
    assert study_report.needle_share(record, 1) == pytest.approx(30)
    assert study_report.knocked_out(record, conditions) is None
    assert study_report.likelihood(record) == pytest.approx(-1.5)
    z = stats.norm.ppf
    expected = np.mean([z(12.5 / 21) - z(1.5 / 11), z(8.5 / 21) - z(3.5 / 11)])
    assert study_report.sensitivity(record) == pytest.approx(expected)


def test_bits_of_answers_survive_the_packing():
    right = np.random.default_rng(5).random(43) < 0.5
    assert (pack(right).bits() == right).all() and pack(right).rate() == right.mean()


def test_concepts_are_part_of_the_bootstrap():
    # every seed has the same difference, so t has no width; it comes from one concept alone
    plan = make_plan(seeds=4)
    records = simulate_conversion(plan, {}, np.random.default_rng(2))
    for record in records:
        concept = np.arange(400) % record.num_concepts
        wins = {"split": concept == 3, "standard": concept < 0}.get(record.arm, concept < 0)
        record.answers = {name: pack(wins) for name in record.answers}
    group = conversion_group(plan, records)
    first = core_contrasts(group)[0]
    assert first.t["low"] == first.t["high"] == pytest.approx(5)
    low, high = study_report.bootstrap(group, first)
    assert low == pytest.approx(0) and 10 <= high <= 20


# ---- before all core runs are in
def inverted(records, arm):
    """The same records with all answers of an arm inverted: different means, equal standard deviations."""
    return [
        msgspec.structs.replace(r, answers={name: pack(1 - a.bits()) for name, a in r.answers.items()})
        if r.arm == arm and r.study == "A"
        else r
        for r in records
    ]


def equal_figures(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FIGURES)


def test_nothing_but_spread_is_shown_before_all_core_runs_are_in(records, tmp_path):
    partial = [r for r in records if (r.study, r.arm, r.seed) != ("A", "flipped", 11)]
    partial = [r for r in partial if (r.study, r.seed) != ("B1", 15)]
    lines = format_report(PLAN, partial)
    assert "No answer yet: 47 of 48 core runs are finished." in lines
    assert "No answer yet: 150 of 160 runs are finished." in lines
    assert lines == format_report(PLAN, inverted(partial, "split"))  # so no mean and no difference is in them
    assert "[" not in "".join(lines)
    for number, shown in enumerate((partial, inverted(partial, "split"))):
        draw_figures(PLAN, shown, tmp_path / f"{number}")
    assert equal_figures(tmp_path / "0", tmp_path / "1")
    assert format_report(PLAN, records) != format_report(PLAN, inverted(records, "split"))


def test_the_plan_alone_gives_a_report_and_a_figure(tmp_path):
    assert format_report(PLAN, []).count("No run is finished.") == 2
    draw_figures(PLAN, [], tmp_path)
    for name in FIGURES:
        assert Image.open(tmp_path / name).size == (900, 760)


# ---- the report
def test_the_report_and_the_figure_are_the_same_for_records_in_any_order(records, tmp_path):
    shuffled = random.Random(0).sample(records, len(records))
    lines = format_report(PLAN, records)
    assert lines == format_report(PLAN, shuffled)
    for number, given in enumerate((records, shuffled)):
        draw_figures(PLAN, given, tmp_path / f"{number}")
    assert equal_figures(tmp_path / "0", tmp_path / "1")
    for name, size in zip(FIGURES, ((1800, 1520), (1800, 760)), strict=True):  # four panels and two
        image = Image.open(tmp_path / "0" / name)
        image.load()
        assert image.size == size
        assert image.text == {} and "dpi" in image.info  # no version, no time


def test_the_report_has_an_answer_and_a_verdict_for_every_arm(records):
    group = conversion_group(PLAN, records)
    first = core_contrasts(group)[0]
    sentence = answer(group)
    assert format_interval(first.t) in sentence and "12 seeds" in sentence
    assert f"**{core_verdict(core_contrasts(group))}**. What would change this answer:" in sentence
    rows = {line.split(" | ")[0].strip("| "): line for line in format_report(PLAN, records) if line.startswith("| ")}
    assert rows["gate"].endswith("| hurts |") and "6 of 6" in rows["gate"] and "rival" in rows["gate"]
    for arm in ("additive", "flipped"):
        assert rows[arm].rstrip(" |").split("| ")[-1] in ("no practical difference", "undecided")
    assert rows["standard"].endswith("| - |")


def test_the_questions_of_every_seed_are_compared(records):
    plan = make_plan(seeds=1)
    found = {r.arm: r for r in simulate_conversion(plan, {}, np.random.default_rng(0))}
    for arm, right in (("split", [1, 1, 0, 1]), ("standard", [0, 1, 1, 0])):
        found[arm].answers = {name: pack(np.array(right, bool)) for name in found[arm].answers}
    lines = study_report.format_seeds(conversion_group(plan, list(found.values())), "split", "standard")
    p = stats.binomtest(4, 12).pvalue  # 4 conditions: 8 questions that split alone answers, 4 that standard does
    assert lines[-1] == f"| 0 | 16 | 12 | 8 | 8 | 4 | {format_p(p)} |" and len(lines) == 3


def test_secondary_arms_are_one_holm_family(records):
    found = study_report.secondary_contrasts(conversion_group(PLAN, records))
    assert [c.arm for c in found] == ["additive", "flipped", "gate"]
    gate = found[-1]
    assert gate.holm_p == pytest.approx(3 * gate.t["p"])


# ---- what is never pooled
def test_an_endpoint_that_some_seeds_lack_is_not_tested_but_counts_in_its_family(records, monkeypatch):
    """Alone, the complete endpoint has p = .03 and would get a star; with another one in its family it has .06."""
    values = differences(1.0, 1.0 / stats.t.isf(0.015, 11) * 12**0.5)  # t test: p = .03

    def complete(record):
        return values[record.seed] if record.arm == "split" else 0.0

    group = conversion_group(PLAN, records)
    endpoints = {"complete": complete, "partial": lambda record: None if record.seed == 3 else complete(record)}
    monkeypatch.setattr(study_report, "secondary_endpoints", lambda group: endpoints)
    rows = study_report.format_secondary(group)
    assert "+1.0" in rows[-2] and "*" not in rows[-2] and "- (11 of 12 seeds)" in rows[-1] and "+" not in rows[-1]
    del endpoints["partial"]
    assert "*" in study_report.format_secondary(group)[-1]


def test_other_environments_are_reported_apart(records):
    main = format_report(PLAN, records)
    for change in ({"device": "NVIDIA H100"}, {"fingerprint": "0000"}, {"dtype": "bfloat16"}, {"threads": 2}):
        others = [msgspec.structs.replace(r, **change) for r in records if r.study == "A" and r.arm != "gate"]
        lines = format_report(PLAN, records + inverted(others, "split"))
        start = lines.index(f"## Study A: fitted into a pretrained model, replication on {others[0].device}")
        end = lines.index("## Study B1: trained from scratch")
        assert lines[:start] + lines[end:] == main


def test_a_replication_never_takes_the_place_of_the_study(records):
    """Not even with more records, and not before the study has any."""
    ours = [r for r in records if r.study == "A" and r.arm != "gate"]
    others = [msgspec.structs.replace(r, fingerprint="0000") for r in records if r.study == "A"]
    lines = format_report(PLAN, ours, inverted(others, "split"))
    start = lines.index("## Study A: fitted into a pretrained model, replication on cpu")
    assert lines[:start] == format_report(PLAN, ours)[:start]
    alone = format_report(PLAN, [], others)
    assert alone[:3] == ["## Study A: fitted into a pretrained model", "", "No run is finished."]
    assert "## Study A: fitted into a pretrained model, replication on cpu" in alone


def test_an_amendment_leaves_seeds_out_and_keeps_the_plan_s_hash(records):
    amended = PLAN["A"] | {"amendment": {"seeds": [0, 1, 2, 5], "reason": "the time ended."}}
    assert hash_plan(amended) == hash_plan(PLAN["A"])
    few = [r for r in records if r.study == "A" and (r.seed in (0, 1, 2, 5) or r.arm == "standard")]
    assert not {r.seed for r in group_records(amended, "A", few)[0].records} - {0, 1, 2, 5}
    lines = format_report({"A": amended}, few)
    note = "Amended to seeds 0, 1, 2, 5: the time ended."
    assert note in lines
    others = [msgspec.structs.replace(r, device="NVIDIA H100") for r in few]
    assert format_report({"A": amended}, few, others).count(note) == 1  # the reason is not that of a replication
    assert any("(95 % interval, 4 seeds," in line for line in lines)
    assert any("No answer yet" in line for line in format_report({"A": PLAN["A"]}, few))
    with pytest.raises(UserError, match="the amendment has seed 12, the plan of standard has not"):
        group_records(PLAN["A"] | {"amendment": {"seeds": [0, 12]}}, "A", few)


def test_the_rule_of_decision_is_the_planned_one(monkeypatch):
    plan = {"A": PLAN["A"] | {"margin": 3.0, "hypotheses": [["split", b] for b in ("standard", "additive", "flipped")]}}
    group_records(plan["A"], "A", [])
    monkeypatch.setattr(study_report, "MARGIN", 2.0)
    with pytest.raises(UserError, match="study.json: plans margin 3.0, study_report.py has 2.0"):
        group_records(plan["A"], "A", [])


def test_the_planned_device_comes_first_however_few_its_records(records):
    plan = {"A": PLAN["A"] | {"device": "cpu"}}
    ours = [msgspec.structs.replace(r, plan=hash_plan(plan["A"])) for r in records if r.study == "A"]
    others = [msgspec.structs.replace(r, device="NVIDIA H100") for r in ours]
    groups = group_records(plan["A"], "A", others + ours[:3])
    assert [(g.environment.device, len(g.records)) for g in groups] == [("cpu", 3), ("NVIDIA H100", len(ours))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "ab" * 32}, "A/standard/seed00.json: of plan abababababab, not"),
        ({"seed": 12}, "arm standard with seed 12 is not planned"),
        ({"arm": "v9"}, "arm v9 with seed 0 is not planned"),
        ({}, "two records of one run"),
        ({"seed": 0, "answers": {}, "arm": "standard"}, "two records"),
    ],
)
def test_records_that_do_not_belong_are_refused(records, change, message):
    with pytest.raises(UserError, match=message):
        format_report(PLAN, [*records, msgspec.structs.replace(records[0], **change)])


def test_a_missing_condition_is_named(records):
    answers = {name: a for name, a in records[0].answers.items() if name != "64 noise"}
    broken = [msgspec.structs.replace(records[0], answers=answers), *records[1:]]
    with pytest.raises(UserError, match="A/standard/seed00.json: has no answers of '64 noise'"):
        format_report(PLAN, broken)


# ---- files
def test_records_survive_their_files(records, tmp_path):
    chosen = records[:3] + records[-3:]
    for record in chosen:
        path = tmp_path / record.study / record_path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, msgspec.to_builtins(record))
    assert read_records(tmp_path / "A", "A") == chosen[:3]
    assert sorted(map(record_path, read_records(tmp_path / "B1", "B1"))) == sorted(map(record_path, chosen[3:]))
    (tmp_path / "A/standard/seed00.json").rename(tmp_path / "A/standard/seed09.json")
    with pytest.raises(UserError, match="seed09.json: holds the record of standard/seed00.json"):
        read_records(tmp_path / "A", "A")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {"16 noise": {"n": 12, "right": "ff"}}}, "not those of 12 bits"),
        ({"answers": {"16 noise": {"n": 4, "right": "zz"}}}, "right"),
        ({"study": "B1"}, "study"),
        ({"seed": "0"}, "seed"),
        ({"needle_share": 0.2}, "needle_share"),
    ],
)
def test_a_broken_record_is_named(records, tmp_path, change, message):
    path = tmp_path / record_path(records[0])
    path.parent.mkdir()
    write_json(path, msgspec.to_builtins(records[0]) | change)
    with pytest.raises(UserError, match=f"seed00.json: .*{message}"):
        read_records(tmp_path, "A")


def test_answers_have_as_many_digits_as_bits():
    assert Answers(n=9, right="ff80").rate() == 1.0
    with pytest.raises(ValueError, match="not those of 9 bits"):
        Answers(n=9, right="ff")


def test_an_arm_shows_its_accuracy_only_when_all_its_seeds_are_finished(records):
    """And it is in no Holm family before: the verdicts of the others do not change with each of its runs."""
    some = [r for r in records if not (r.arm == "gate" and r.seed == 5)]
    assert [c.arm for c in study_report.secondary_contrasts(conversion_group(PLAN, some))] == ["additive", "flipped"]
    (row,) = [line for line in format_report(PLAN, some) if line.startswith("| gate |")]
    assert row.endswith("| 5 of 6 |" + " - |" * 8)
