"""The records of the study's runs.

A record is a small JSON file, results/study/<study>/<arm>/seedNN.json, written by a finished run. It holds the hash of
the plan, the environment of the run and one bit per answer, so that reports need nothing but the plan and the records.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from errors import UserError
from files import read_typed

SYMBOLIC_THRESHOLD = 0.75  # accuracy that counts as retrieval in B1, and ends a run

Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Hex = Annotated[str, Meta(pattern="^[0-9a-f]+$")]


# ---- runs
class Job(NamedTuple):
    """One run of a study. `pairs` is the size of B1's task, None in other studies."""

    arm: str
    seed: int
    pairs: int | None = None

    @property
    def name(self) -> str:
        return f"{f'{self.pairs}pairs-' if self.pairs else ''}seed{self.seed:02d}"

    def record(self, records: Path) -> Path:
        """The path of the run's record in the folder of its study's records."""
        return records / self.arm / f"{self.name}.json"


# ---- records
class Answers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which of `n` questions were answered right: `right` is numpy.packbits of one bit each, as hexadecimal digits."""

    n: Positive
    right: Hex

    def __post_init__(self):
        if len(self.right) != 2 * math.ceil(self.n / 8):
            raise ValueError(f"right has {len(self.right)} hexadecimal digits, not those of {self.n} bits")

    def bits(self) -> np.ndarray:
        """Array [n] of 0 and 1."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=self.n)

    def rate(self) -> float:
        """The share of right answers."""
        return float(self.bits().mean())


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of every record: which run it is, and where it ran."""

    plan: Hex  # `hash_plan` of the study's section
    arm: str
    seed: Count
    commit: str
    device: str
    dtype: str
    threads: Positive
    fingerprint: Hex  # hash of the first losses of a pilot seed, which depend on processor and versions
    versions: dict[str, str]
    status: str  # "finished", or why training failed; a failed run counts with its accuracy
    seconds: float  # for training, over all starts, and for answering the questions
    trained_parameters: Count


class ConversionRecord(Record, kw_only=True):
    """A run of study A or C. `answers` by condition: "16 look-alike", "16 noise", "16 absent", "16 unseen style", ...

    If the caption is absent, right means that the model said so. The needle of question i of a condition is concept
    i modulo `num_concepts`, in every seed; in study C, code i is asked for in prompt i modulo `num_concepts`.
    `knockout` holds answers with the second map switched off, `needle_shares` the needle's share of the attention by
    layer, `log_likelihoods` the mean log-probability, in nats, of the right answer by condition of the endpoint, and
    `forward_flops` the FLOPs of one prompt (`study_conversion.count_flops`).
    """

    study: Literal["A", "A-pilot", "C", "C-pilot", "C-pilot-2"]
    num_concepts: Positive
    final_loss: float | None  # None: not finite
    lambdas: list[float]  # one per layer, in order
    answers: dict[str, Answers]
    needle_shares: list[float]
    knockout: dict[str, Answers]
    log_likelihoods: dict[str, float] = {}  # empty: not measured
    forward_flops: Count = 0  # 0: not counted


class SymbolicRecord(Record, kw_only=True):
    """A run of study B1, see `study_symbolic.train`."""

    study: Literal["B1"]
    pairs: Positive
    learning_rate: float
    max_steps: Positive
    steps: Positive
    censored: bool
    accuracy: float


class Environment(NamedTuple):
    """What must be equal for runs to be compared or pooled with each other."""

    device: str
    dtype: str
    threads: int
    fingerprint: str


def environment_of(record: Record) -> Environment:
    """The environment of a run."""
    return Environment(record.device, record.dtype, record.threads, record.fingerprint)


def hash_plan(section: dict[str, Any]) -> str:
    """SHA-256 of one study's section of the plan, without its amendment, independent of key order and white space."""
    planned = {name: value for name, value in section.items() if name != "amendment"}
    return hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()


def analysed_seeds(section: dict[str, Any], arm: str) -> list[int]:
    """The seeds of an arm that count: those of the plan, unless an amendment, made before any result was looked at,
    keeps only some of them: {"seeds": [...], "reason": "..."}.

    Raises UserError if the amendment has a seed that the plan lacks.
    """
    planned = section["arms"][arm]["seeds"]
    kept = section.get("amendment", {}).get("seeds", planned)
    if unknown := set(kept) - set(planned):
        raise UserError(f"study.json: the amendment has seed {min(unknown)}, the plan of {arm} has not: remove it")
    return [seed for seed in planned if seed in kept]


def read_records(folder: Path, study: str) -> list[Record]:
    """The records of one study, <arm>/seedNN.json or <arm>/<pairs>pairs-seedNN.json in `folder`, in order of path.

    Raises UserError for a file that is not a record, or that has another run's path.
    """
    records = []
    for path in sorted(Path(folder).glob("*/*.json")):
        record = read_typed(path, SymbolicRecord if study == "B1" else ConversionRecord, "delete it and run it again")
        if path.relative_to(folder) != record_path(record):
            raise UserError(f"{path}: holds the record of {record_path(record)}: move it there")
        records.append(record)
    return records


def job_of(record: Record) -> Job:
    """The run that wrote a record."""
    return Job(record.arm, record.seed, getattr(record, "pairs", None))


def record_path(record: Record) -> Path:
    """The path of a record in the folder of its study."""
    return job_of(record).record(Path())


def endpoint_conditions(section: dict[str, Any]) -> list[str]:
    """The conditions whose unweighted mean is endpoint N."""
    endpoint = section["endpoint"]
    return [f"{cells} {kind}" for cells in endpoint["cells"] for kind in endpoint["kinds"]]


def points(record: ConversionRecord, conditions: Sequence[str]) -> float:
    """Unweighted mean accuracy of these conditions, in points. Raises UserError if the record lacks one."""
    missing = [condition for condition in conditions if condition not in record.answers]
    if missing:
        raise UserError(
            f"{record.study}/{record_path(record)}: has no answers of {missing[0]!r}: delete it and run it again"
        )
    return 100 * statistics.fmean(record.answers[condition].rate() for condition in conditions)


def fingerprint_of(losses: Sequence[float]) -> str:
    """A hash of the first losses of a run: equal if library, processor and number of threads give the same rounding."""
    return hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:16]
