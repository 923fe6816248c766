"""TensorBoard and wandb: copies of the numbers in metrics.jsonl, and in TensorBoard of the answers in samples.jsonl.
Everything else reads those two files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from errors import UserError
from files import MESSAGE_LENGTH, one_line, writing

PROJECT = "diff-transformer"  # in wandb
TAGS = {  # first part of a path in `Tracker.log` -> title of its chart; any other part is an evaluation metric
    "loss": "train/loss",
    "lr": "train/learning rate",
    "grad_norm": "train/gradient norm",
    "lambda": "lambda",
    "differential_grad_norm": "differential gradient norm",
    "eval_loss": "eval loss",
}
LAYER = re.compile(r"model\.(language|vision)_[\w.]*?layers\.(\d+)\.self_attn\.differential")


class Tracker:
    """TensorBoard in a run folder, or wandb."""

    def __init__(self, kind: Literal["tensorboard", "wandb"], folder: Path, first_step: int, record: dict[str, Any]):
        """What TensorBoard holds from `first_step` on is dropped. `record` is run.json, whose id a run in wandb keeps
        when it continues. Raises UserError if wandb does not start, for example without a login."""
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        self.folder = folder
        if kind == "tensorboard":
            self.tracker = TensorBoardTracker("tensorboard", folder, purge_step=first_step)
        else:
            name, run_id = folder.resolve().name, record["id"]
            self.tracker = WandBTracker(PROJECT, name=name, id=run_id, resume="allow", config=record["config"])
        try:
            self.tracker.start()
        except Exception as error:  # wandb raises errors of its own, which cannot be named if it is not installed
            if kind == "tensorboard":
                raise
            reason = one_line(error)[:MESSAGE_LENGTH]
            raise UserError(f"--tracker=wandb: {reason}: run wandb login, or set WANDB_MODE=offline") from error
        self.is_tensorboard = kind == "tensorboard"

    def log_hyperparameters(self, values: dict[str, Any], scores: Iterable[str]):
        """Show the hyperparameters in TensorBoard's table, with the last values of these paths of `log`."""
        from torch.utils.tensorboard.summary import hparams

        if self.is_tensorboard:
            values = {key: v if isinstance(v, int | float) else str(v) for key, v in values.items()}
            columns = dict.fromkeys(["train/loss", *map(readable_tag, scores)], 0)
            for summary in hparams(values, columns)[:2]:  # the third ends a session
                self.tracker.writer.file_writer.add_summary(summary)

    def log(self, step: int, values: dict):
        """Log every number in `values`, nested ones under their path."""
        numbers = {readable_tag(path): number for path, number in flatten_numbers(values).items()}
        with writing(self.folder / self.tracker.name):
            self.tracker.log(numbers, step=step)

    def log_sample(self, place: int, sample: dict):
        """Log an answer (a line of samples.jsonl) to TensorBoard; the image is logged once, at step 0."""
        if not self.is_tensorboard:
            return
        tag, writer = f"samples {sample['set']}/{place}", self.tracker.writer
        lines = [f"{key}: {sample[key]!r}" for key in ("prompt", "answer", "response")]
        with writing(self.folder / self.tracker.name):
            writer.add_text(tag, "  \n".join(lines), sample["step"])
            if sample["step"] == 0 and sample["image"]:
                pixels = np.asarray(Image.open(self.folder / sample["image"]))
                writer.add_image(tag, pixels, sample["step"], dataformats="HWC")

    def finish(self):
        self.tracker.finish()


def flatten_numbers(values: dict, prefix: str = "") -> dict[str, float]:
    """{"a": {"b": 1}} -> {"a/b": 1}; values other than numbers are left out."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


def readable_tag(path: str) -> str:
    """A path of `flatten_numbers` as the title of a chart and, after a slash, of its curve. Layers get a two-digit
    number, so that they sort by depth."""
    path = LAYER.sub(lambda match: f"{match[1].replace('language', 'text')} layer {int(match[2]):02d}", path)
    kind, slash, rest = path.partition("/")
    if kind == "inside":  # layer / quantity
        layer, _, quantity = rest.partition("/")
        return f"maps {quantity}/{layer}"
    return TAGS.get(kind, f"eval {kind}") + slash + rest
