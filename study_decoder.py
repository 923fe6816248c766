"""Study C: one run of an arm on a pretrained language model, and its questions. Started by study.py.

The prompt lists key-value pairs, "The code of the {noun} is {4 digits}.", one per line, and asks for the codes of a few
of the nouns. Training uses one number of pairs; the questions have as many or more. The model is SmolLM2 as a Phi-3
decoder, written by `benchmarks/smollm2.py`; it is not part of this repository.
"""

import functools
import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import study_conversion
from differential_attention import knock_out
from errors import UserError
from files import write_text
from haystack import read_pool
from machine import make_accelerator
from modeling_phi3 import Phi3ForCausalLM
from needle_eval.questions import Question
from needle_eval.runner import Answerer, answer_questions
from processing_phi3v import Phi3Processor
from study_records import Job, endpoint_conditions

CODE = re.compile(r"(?<!\d)\d{4}(?!\d)")  # four digits, not a part of a longer number
BATCH_SIZE = 10  # prompts per batch
TOKENS_PER_CODE = 6  # four digits, a space, and one spare
FINGERPRINT_STEPS = 10  # steps of one prompt each


@functools.cache
def pool_nouns() -> list[str]:
    """The captions of the image pool, sorted."""
    return sorted({image.caption for image in read_pool()})


def key_value_prompt(pairs: int, key: str, needles: int = 1) -> tuple[str, list[str], list[str]]:
    """(prompt, the codes asked for, all codes), random with seed `key`: one line per pair, then the question."""
    rng = random.Random(key)
    chosen, codes = rng.sample(pool_nouns(), pairs), [str(code) for code in rng.sample(range(1000, 10000), pairs)]
    lines = [f"The code of the {noun} is {code}." for noun, code in zip(chosen, codes, strict=True)]
    asked = rng.sample(range(pairs), needles)
    if needles == 1:
        question = f"What is the code of the {chosen[asked[0]]}? Answer with the code alone."
    else:
        *others, last = (chosen[i] for i in asked)
        listed = f"{', the '.join(others)} and the {last}"
        question = f"What are the codes of the {listed}? Answer with the codes alone, in this order."
    return "\n".join([*lines, question]), [codes[i] for i in asked], codes


def write_training_rows(file: Path, pairs: int, needles: int, count: int, seed: int):
    """Write `count` rows of {image, prefix, suffix}: the training data of one seed, the same in all arms."""
    rows = []
    for i in range(count):
        prompt, codes, _ = key_value_prompt(pairs, f"study/train/{seed}/{i}", needles)
        rows.append({"image": None, "prefix": prompt, "suffix": " ".join(codes)})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def make_questions(section: dict, seed: int) -> list[Question]:
    """The questions of one seed, the same in all arms."""
    questions, needles = [], section["needles"]
    for name in endpoint_conditions(section):
        for i in range(section["prompts"]):
            key = f"study/{seed}/{name}/{i}"
            prompt, codes, _ = key_value_prompt(int(name.split()[0]), key, needles)
            tokens = TOKENS_PER_CODE * needles
            questions.append(Question(key, name, (), prompt, " ".join(codes), max_new_tokens=tokens))
    return questions


def pack_codes(rows: list[dict], names: list[str]) -> dict[str, dict[str, Any]]:
    """Like `study_conversion.pack_answers`, with one bit per code: the first codes of all prompts, then the second
    codes, and so on. A code is right if it is at its position among the codes of the response."""
    packed = {}
    for name in names:
        right = []
        for row in (row for row in rows if row["setting"] == name):
            expected, found = row["ground_truth"].split(), CODE.findall(row["response"] or "")
            right.append([i < len(found) and found[i] == code for i, code in enumerate(expected)])
        packed[name] = study_conversion.pack_bits([bit for place in zip(*right, strict=True) for bit in place])
    return packed


def run(section: dict, job: Job, folder: Path) -> dict[str, Any]:
    """Train an arm at one seed and ask it the seed's questions. Returns the fields of its record that result."""
    arm, seed = job.arm, job.seed
    check_model(section)
    questions, names = make_questions(section, seed), endpoint_conditions(section)
    config = study_conversion.make_config(section, arm, seed, folder)
    file = folder.with_suffix(".jsonl")
    rows_needed = config.max_steps * config.batch_size
    write_training_rows(file, section["train_pairs"], section["needles"], rows_needed, seed)
    name, status = study_conversion.train(replace(config, data=str(file)), arm)

    began = time.perf_counter()
    accelerator, dtype = make_accelerator(), getattr(torch, section["dtype"])
    model = Phi3ForCausalLM.from_pretrained(name, dtype, accelerator.device)
    answerer = Answerer(model, Phi3Processor.from_pretrained(section["model"]), accelerator, dtype, BATCH_SIZE)
    rows = answer_questions(answerer, questions, progress=f"{arm} seed {seed}")
    record = study_conversion.describe_training(model, folder, status) | {
        "num_concepts": section["prompts"],  # the bootstrap resamples prompts: codes of one prompt are dependent
        "answers": pack_codes(rows, names),
        "needle_shares": [],
        "log_likelihoods": {},
        "forward_flops": study_conversion.count_flops(config, [], questions[0].prompt),
        "knockout": {},
    }
    if study_conversion.has_lambda(model):
        knock_out(model)
        record["knockout"] = pack_codes(answer_questions(answerer, questions), names)
    return record | {"seconds": round(study_conversion.training_seconds(folder) + time.perf_counter() - began, 1)}


def check_model(section: dict):
    """Raise UserError unless the converted model exists and has the weights that the plan was made for."""
    if not (Path(section["model"]) / "config.json").exists():
        fix = f"write it with python benchmarks/smollm2.py --folder={section['model']}"
        raise UserError(f"{section['model']}: there is no model: {fix}")
    study_conversion.check_weights(section)


def measure_fingerprint(section: dict, folder: Path) -> str:
    """`study_records.fingerprint_of` the first losses of the first arm at the pilot seed, trained into `folder`."""
    check_model(section)
    file = folder.with_suffix(".jsonl")
    write_training_rows(
        file, section["train_pairs"], section["needles"], FINGERPRINT_STEPS, section["fingerprint_seed"]
    )
    small = section | {"train": section["train"] | {"batch_size": 1, "data": str(file)}}
    return study_conversion.measure_fingerprint(small, folder, FINGERPRINT_STEPS)
