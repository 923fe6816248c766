"""Simulated records of the study, with planted differences and the spread over seeds that the plan assumes."""

import numpy as np

from study_records import Answers, ConversionRecord, Record, SymbolicRecord, hash_plan

CONCEPTS = 20
PAIRED_SD = 3.06  # points: SD of the difference of two arms that the plan assumes
BASE = {4: 0.93, 16: 0.66, 32: 0.60, 64: 0.54}  # number of cells -> accuracy of standard
ENDPOINT = {"cells": [16, 64], "kinds": ["look-alike", "noise"]}
CORE = ("standard", "split", "additive", "flipped")
ENVIRONMENT = dict(commit="c0ffee", device="cpu", dtype="float32", threads=1, fingerprint="ab12",
                   versions={"torch": "2.13.0"}, status="finished", seconds=500.0)  # fmt: skip


def make_plan(others: dict[str, str] | None = None, seeds: int = 12, symbolic_seeds: int = 16) -> dict[str, dict]:
    """Both sections; `others` maps arms outside the core to their families, with half as many seeds."""
    arms = {arm: {"seeds": list(range(seeds)), "family": "core"} for arm in CORE}
    arms |= {arm: {"seeds": list(range(seeds // 2)), "family": family} for arm, family in (others or {}).items()}
    train = {"shapes": [[1, 2], [1, 4], [2, 2], [4, 2]]}
    symbolic = {"seeds": list(range(symbolic_seeds)), "family": "core", "learning_rates": {"8": 0.002, "16": 0.002}}
    symbolic = dict.fromkeys(("standard", "v1", "double_width", "double_width_norm", "v2"), symbolic)
    return {
        "A": {"arms": arms, "endpoint": ENDPOINT, "train": train, "attention_layer": 1},
        "B1": {"arms": symbolic, "pairs": [8, 16], "max_steps": {"8": 2000, "16": 4000}},
    }


def pack(right: np.ndarray) -> Answers:
    return Answers(n=len(right), right=np.packbits(right).tobytes().hex())


def simulate_conversion(
    plan: dict, effects: dict[str, float], rng: np.random.Generator, n: int = 400, endpoint_only: bool = False
) -> list[Record]:
    """Every planned run of study A; `effects` are the points of endpoint N by which an arm is better than standard.

    Each seed has an effect shared by all arms and one for each arm; questions are answered independently. In total the
    difference of two arms has the standard deviation `PAIRED_SD`.
    """
    section, records = plan["A"], []
    asked = len(ENDPOINT["cells"]) * len(ENDPOINT["kinds"]) * n
    from_questions = 2 * 0.24 / asked
    own = np.sqrt(((PAIRED_SD / 100) ** 2 - from_questions) / 2)
    shared = {seed: rng.normal(0, 0.02) for seed in range(100)}
    for arm, planned in section["arms"].items():
        for seed in planned["seeds"]:
            shift = shared[seed] + rng.normal(0, own) + effects.get(arm, 0) / 100
            answers = {}
            for cells, base in BASE.items():
                if endpoint_only and cells not in ENDPOINT["cells"]:
                    continue
                for kind in ENDPOINT["kinds"]:
                    answers[f"{cells} {kind}"] = pack(rng.random(n) < base + (shift if cells > 4 else shift / 4))
            answers |= {f"{cells} absent": pack(rng.random(n) < 0.9) for cells in (16, 64)}
            answers["16 unseen style"] = pack(rng.random(n) < 0.4 + shift)
            knockout = {}
            if arm in ("split", "flipped"):
                names = [f"{cells} {kind}" for cells in ENDPOINT["cells"] for kind in ENDPOINT["kinds"]]
                knockout = {name: pack(rng.random(n) < answers[name].rate() - 0.06) for name in names}
            share = 0.2 + shift + rng.normal(0, 0.02)
            records.append(ConversionRecord(
                study="A", plan=hash_plan(section), arm=arm, seed=seed, trained_parameters=43_008,
                num_concepts=CONCEPTS, final_loss=0.02, lambdas=[], answers=answers, needle_shares=[0.01, share],
                knockout=knockout, log_likelihoods={"16 noise": float(np.log(0.5 + shift))}, forward_flops=10**9,
                **ENVIRONMENT,
            ))  # fmt: skip
    return records


def simulate_symbolic(plan: dict, log_ratios: dict[str, float], rng: np.random.Generator) -> list[Record]:
    """Every planned run of study B1; `log_ratios` is the mean of ln(steps) relative to standard, by arm."""
    section, records = plan["B1"], []
    for pairs in section["pairs"]:
        for arm, planned in section["arms"].items():
            for seed in planned["seeds"]:
                steps = round(200 * (pairs / 8) * np.exp(log_ratios.get(arm, 0) + rng.normal(0, 0.04)))
                records.append(SymbolicRecord(
                    study="B1", plan=hash_plan(section), arm=arm, seed=seed, pairs=pairs, learning_rate=0.002,
                    max_steps=section["max_steps"][str(pairs)], steps=steps, censored=False, accuracy=0.76,
                    trained_parameters=98_624, **ENVIRONMENT,
                ))  # fmt: skip
    return records
