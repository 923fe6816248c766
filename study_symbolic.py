"""Study B1: how many updates a small decoder, trained from scratch, needs until it retrieves values by their keys.

    python study_symbolic.py                          # the learning-rate grid of every arm on the pilot seeds
    python study_symbolic.py --arms=v1 --pairs=8      # part of it

A sample is a list of key-value pairs, followed by all its keys in another order; the answer to a key is its value. The
list changes with every sample, so the answer is never in the weights: the decoder has to form the circuit of two
attention layers that finds an equal token and reads the token after it (associative recall, arXiv 2312.04927;
induction heads, 2209.11895). Until then, accuracy stays at that of a guess among the listed values. The arms differ
only in their attention.

Shapes: B batch, n pairs of a sample, L = 3 n sequence length, C hidden size, V vocabulary.
"""

import itertools
import math
import statistics
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
import tyro
from msgspec import Meta
from torch import Tensor, nn

from attention import PrefixMask
from differential_attention import DifferentialConfig, make_differential
from errors import UserError, one_line_errors
from files import check_ranges, read_typed, write_json
from modeling_gemma import GemmaConfig, GemmaModel
from study_records import SYMBOLIC_THRESHOLD, Job, fingerprint_of

NUM_KEYS, NUM_VALUES = 64, 64  # tokens 0 .. 63 are keys, 64 .. 127 values
HIDDEN_SIZE, LAYERS = 64, 2
MLP_SIZE = 128  # hidden units of the MLP of the standard arm
BATCH_SIZE = 64
BETAS = (0.9, 0.98)
WARMUP_STEPS = 100  # linear warm-up; the learning rate is constant afterwards
CLIP_NORM = 1.0
SMOOTHING_STEPS = 20  # accuracy is the mean over the batches of the last 20 updates
RECORDED_LOSSES = 10
SEED_STRIDE = 1_000_003  # keeps runs with neighbouring seeds from sharing generator seeds of their weights

# ---- the pilot, which sets the learning rates of the study
PILOT_SEEDS = (100, 101)  # not used in the study
LEARNING_RATES = {8: (2e-3, 4e-3, 8e-3, 16e-3), 16: (1e-3, 2e-3, 4e-3, 8e-3)}  # by the number of pairs, for every arm
PILOT_MAX_STEPS = {8: 1500, 16: 2000}
CENSORING_FACTOR = 10  # step limit of the study's runs, in multiples of the pilot's median steps


@dataclass(frozen=True)
class Arm:
    """Attention of one arm: multi-head attention, with keys and values for each head, and a differential preset or
    None."""

    heads: int
    head_dim: int
    preset: str | None = None


ARMS = {
    "standard": Arm(4, 16),
    "v1": Arm(4, 16, "v1"),  # two pairs of heads: maps of width 16, values and norm of width 32
    "double_width": Arm(2, 32),
    "double_width_norm": Arm(2, 32, "norm_only"),  # V1's head norm on the same number of heads, nothing subtracted
    "v2": Arm(4, 16, "v2"),
}


# ---- the task
def draw_batch(pairs: int, generator: torch.Generator, batch_size: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
    """Tokens [B, 3 n] and answers [B, n] of new samples.

    A row is `k1 v1 k2 v2 ... kn vn q1 ... qn`: distinct keys, distinct values, and the keys in a random order; answer i
    is the value that follows q_i in the list. A guess among all values has accuracy 1 / 64, a guess among the listed
    values 1 / n.
    """
    keys = torch.rand(batch_size, NUM_KEYS, generator=generator).argsort(1)[:, :pairs]
    values = NUM_KEYS + torch.rand(batch_size, NUM_VALUES, generator=generator).argsort(1)[:, :pairs]
    order = torch.rand(batch_size, pairs, generator=generator).argsort(1)
    listed = torch.stack((keys, values), dim=2).flatten(1)
    return torch.cat((listed, keys.gather(1, order)), dim=1), values.gather(1, order)


# ---- the decoder
class RecallDecoder(nn.Module):
    """A causal two-layer Gemma decoder with the attention of one arm, randomly initialised."""

    def __init__(self, arm: Arm, seed: int):
        super().__init__()
        self.language_model = GemmaModel(decoder_config(arm))
        self.lm_head = nn.Linear(HIDDEN_SIZE, NUM_KEYS + NUM_VALUES, bias=False)
        if arm.preset is not None:
            config = DifferentialConfig(preset=arm.preset, seed=seed).resolve()
            for index, layer in enumerate(self.language_model.layers):
                attention = layer.self_attn
                attention.differential = make_differential(config, attention.shape, "text", index, attention.q_proj)
        self.draw_weights(seed)

    def draw_weights(self, seed: int):
        """Draw projections from a normal distribution of variance 1 / inputs, and embeddings of variance 1 / C.

        Each parameter name has its own generator, so projections of the same name and shape are equal in all arms.
        Parameters of the differential modules start as their presets say, except V2's second query, which is drawn like
        the first: the preset's copy of the first, meant for a pretrained layer, would only scale the output.
        """
        for name, parameter in self.named_parameters():
            is_projection = ".differential." not in name or name.endswith(".second_query")
            if parameter.ndim == 2 and is_projection:
                generator = torch.Generator().manual_seed(seed * SEED_STRIDE + zlib.crc32(name.encode()))
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor, answers: int) -> Tensor:
        """Logits [B, answers, V] after the last tokens of [B, L]."""
        positions = torch.arange(1, tokens.shape[1] + 1).expand_as(tokens)
        mask = PrefixMask.from_tensors(torch.ones_like(tokens), torch.ones_like(tokens))  # all suffix: causal
        hidden = self.language_model(self.language_model.embed(tokens), positions, mask, keep_last=answers)
        return self.lm_head(hidden)


def decoder_config(arm: Arm) -> GemmaConfig:
    """Sizes of an arm's decoder. V2's extra projections are offset by fewer hidden units of the MLP, so that all arms
    have the same number of parameters, up to the vectors of lambda and of the head norm (see `count_parameters`)."""
    # second_query and lambda_token have this many rows of size C, a hidden unit of the gated MLP has three
    added_rows = arm.heads * arm.head_dim + arm.heads if arm.preset == "v2" else 0
    return GemmaConfig(
        vocab_size=NUM_KEYS + NUM_VALUES,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE - round(added_rows / 3),
        num_hidden_layers=LAYERS,
        num_attention_heads=arm.heads,
        num_key_value_heads=arm.heads,
        head_dim=arm.head_dim,
    )


def count_parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- a run
def train(arm: str, seed: int, pairs: int, lr: float, max_steps: int) -> dict:
    """Train one decoder until its smoothed accuracy reaches 75 %, at most `max_steps` updates.

    Returns {"arm", "seed", "pairs", "learning_rate", "max_steps", "steps", "censored", "accuracy", "status",
    "trained_parameters", "losses", "seconds"}. The accuracy was reached after `steps` updates, or, if `censored`, not
    reached. It is measured on each batch before the update on that batch; batches are new, so none was trained on.
    `losses` are the first ten. A loss that is not finite ends the run, censored. Results in float32 on the CPU are
    bit-identical for the same processor, torch and number of threads. Raises UserError for an unknown arm or a number
    of pairs out of range.
    """
    check_arm(arm)
    if not 2 <= pairs <= min(NUM_KEYS, NUM_VALUES):
        raise UserError(f"pairs {pairs}: must be 2 to {min(NUM_KEYS, NUM_VALUES)}, the number of keys")
    started = time.monotonic()
    model = RecallDecoder(ARMS[arm], seed)
    # no weight decay: every batch is new, so there is nothing to overfit
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    generator = torch.Generator().manual_seed(seed)  # the same batches in every arm
    window, losses, accuracy, steps, reached = deque(maxlen=SMOOTHING_STEPS), [], 0.0, 0, False
    status = "finished"
    while steps < max_steps:
        tokens, answers = draw_batch(pairs, generator)
        logits = model(tokens, answers=pairs)
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        losses += [loss.item()] if len(losses) < RECORDED_LOSSES else []
        window.append((logits.argmax(-1) == answers).float().mean().item())
        accuracy = sum(window) / len(window)
        reached = len(window) == SMOOTHING_STEPS and accuracy >= SYMBOLIC_THRESHOLD
        if reached:
            break
        if not math.isfinite(loss.item()):
            status = f"the loss was not finite at step {steps}"
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        warmup.step()
        steps += 1
    return {
        "arm": arm, "seed": seed, "pairs": pairs, "learning_rate": lr, "max_steps": max_steps,
        "steps": steps if reached else max_steps, "censored": not reached, "accuracy": accuracy, "status": status,
        "trained_parameters": count_parameters(model),
        "losses": losses, "seconds": round(time.monotonic() - started, 2),
    }  # fmt: skip


def run(section: dict[str, Any], job: Job, folder: Path) -> dict[str, Any]:
    """Run one job of study.py. Returns the fields of its record that result; `folder` is not used."""
    rate = section["arms"][job.arm]["learning_rates"][str(job.pairs)]
    found = train(job.arm, job.seed, job.pairs, rate, section["max_steps"][str(job.pairs)])
    return {name: value for name, value in found.items() if name != "losses"}


def measure_fingerprint(section: dict[str, Any], folder: Path) -> str:
    """A hash of the first ten losses of the standard arm at the first pilot seed: equal if torch, the processor and the
    number of threads give the same rounding."""
    pairs = section["pairs"][0]
    rate = section["arms"]["standard"]["learning_rates"][str(pairs)]
    losses = train("standard", PILOT_SEEDS[0], pairs, rate, RECORDED_LOSSES)["losses"]
    return fingerprint_of(losses)


def check_arm(arm: str):
    """Raise UserError for an unknown arm."""
    if arm not in ARMS:
        raise UserError(f"arm {arm!r} is unknown: choose one of {', '.join(ARMS)}")


# ---- the pilot
def mean_log_steps(runs: Sequence[dict]) -> float:
    """Mean over runs of ln(steps); a censored run counts with its step limit."""
    return statistics.fmean(math.log(run["steps"]) for run in runs)


def choose_learning_rate(runs: Sequence[dict]) -> float:
    """The learning rate with the lowest mean ln(steps) for one arm and number of pairs; in a tie the lowest rate."""
    rates = sorted({run["learning_rate"] for run in runs})
    return min(rates, key=lambda rate: mean_log_steps([run for run in runs if run["learning_rate"] == rate]))


def summarise_pilot(runs: Sequence[dict]) -> dict:
    """{"8": {"max_steps", "learning_rates": {arm: rate}}, ...} by the number of pairs.

    `max_steps`, the step limit of the study's runs, is 10 times the median steps of all arms at their chosen rates.
    """
    summary = {}
    for pairs in sorted({run["pairs"] for run in runs}):
        by_arm = {arm: [run for run in runs if (run["pairs"], run["arm"]) == (pairs, arm)] for arm in ARMS}
        rates = {arm: choose_learning_rate(of_arm) for arm, of_arm in by_arm.items() if of_arm}
        chosen = [run["steps"] for arm in rates for run in by_arm[arm] if run["learning_rate"] == rates[arm]]
        max_steps = round(CENSORING_FACTOR * statistics.median(chosen))
        summary[str(pairs)] = {"max_steps": max_steps, "learning_rates": rates}
    return summary


def format_pilot(runs: Sequence[dict]) -> list[str]:
    """The grid as markdown tables: steps of each seed in order, `>` if censored, the chosen rate in bold."""
    lines = []
    for pairs, summary in summarise_pilot(runs).items():
        asked = [run for run in runs if str(run["pairs"]) == pairs]
        rates = sorted({run["learning_rate"] for run in asked})
        lines += [f"| {pairs} pairs | " + " | ".join(f"{rate:g}" for rate in rates) + " |"]
        lines += ["|---|" + "---|" * len(rates)]
        for arm, chosen in summary["learning_rates"].items():
            cells = []
            for rate in rates:
                found = [run for run in asked if (run["arm"], run["learning_rate"]) == (arm, rate)]
                found.sort(key=lambda run: run["seed"])
                steps = ", ".join(f"{'>' if run['censored'] else ''}{run['steps']}" for run in found)
                cells.append(f"**{steps}**" if rate == chosen else steps)
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += ["", f"A run of the study with {pairs} pairs ends at {summary['max_steps']} steps.", ""]
    return lines


class PilotRun(msgspec.Struct, forbid_unknown_fields=True):
    """What `train` returns."""

    arm: str
    seed: int
    pairs: int
    learning_rate: float
    max_steps: int
    steps: int
    censored: bool
    accuracy: float
    status: str
    trained_parameters: int
    losses: list[float]
    seconds: float


class Pilot(msgspec.Struct, forbid_unknown_fields=True):
    """The file that `main` writes."""

    torch: str
    threads: int
    chosen: dict[str, Any]
    runs: list[PilotRun]


@dataclass
class Config:
    """The pilot of study B1. Runs that are already in the output are not repeated."""

    arms: tuple[str, ...] = tuple(ARMS)  # arms to train
    pairs: tuple[Annotated[int, Meta(ge=2, le=NUM_KEYS)], ...] = tuple(LEARNING_RATES)  # key-value pairs per sample
    seeds: tuple[Annotated[int, Meta(ge=0)], ...] = PILOT_SEEDS  # seeds, one run each
    output: str = "results/study/B1-pilot.json"  # file that holds the runs


@one_line_errors
def main(config: Config):
    check_ranges(config)
    for arm in config.arms:
        check_arm(arm)
    for pairs in config.pairs:
        if pairs not in LEARNING_RATES:
            raise UserError(f"--pairs={pairs}: the pilot has a grid for {', '.join(map(str, LEARNING_RATES))} pairs")
    torch.set_num_threads(1)
    path = Path(config.output)
    runs = msgspec.to_builtins(read_typed(path, Pilot, "delete it").runs) if path.exists() else []
    names = ("pairs", "arm", "seed", "learning_rate")
    done = {tuple(run[name] for name in names) for run in runs}
    for pairs, arm, seed in itertools.product(config.pairs, config.arms, config.seeds):
        for rate in LEARNING_RATES[pairs]:
            if (pairs, arm, seed, rate) in done:
                continue
            runs.append(train(arm, seed, pairs, rate, PILOT_MAX_STEPS[pairs]))
            runs.sort(key=lambda run: (run["pairs"], list(ARMS).index(run["arm"]), run["seed"], run["learning_rate"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"torch": torch.__version__, "threads": 1, "chosen": summarise_pilot(runs), "runs": runs})
    print("\n".join(format_pilot(runs)))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
