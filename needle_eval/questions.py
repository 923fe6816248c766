"""A question of a benchmark, and when an answer is exact. No torch is imported here."""

from collections import Counter
from dataclasses import dataclass

from errors import UserError


@dataclass(frozen=True)
class Question:
    """One question of a benchmark. `images` are paths of picture files, in prompt order; `truth` as the benchmark
    writes it, json-able; `setting` names what is scored apart; `fields` goes into the answer file as it is.

    Its answer is one json object a line: {"id", "setting", "prompt", "response", "ground_truth", "images", "seconds",
    **fields}. `response` is None where a picture or the row was broken ("error" says why): wrong, and in every
    denominator. All scores are computed from such rows alone.
    """

    id: str
    setting: str
    images: tuple[str, ...]
    prompt: str
    truth: object
    max_new_tokens: int
    fields: dict


def check_distinct(questions: list[Question], source):
    """Raise UserError where an id of `source`, a file, stands twice."""
    repeated = [name for name, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise UserError(f"{source}: {repeated[0]} stands there more than once: answers are told apart by it, mend it")


def normalise(response: str) -> str:
    """MMNeedle's normalisation: newlines deleted, blanks and full stops stripped."""
    return response.replace("\n", "").strip().strip(".").strip()


def is_exact(response: str, answer: str) -> bool:
    """MMNeedle's strict exact match for one needle; a negative's answer is "-1". Other answers go by the same rule."""
    return normalise(response) == normalise(answer)
