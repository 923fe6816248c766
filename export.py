"""Export a trained run as a self-contained model folder with a model card, ready for the hub.

    python export.py --model=runs/original_seed0 --output=exported/original
    python export.py --model=runs/diff_seed0 --output=exported/diff --push_to_hub=you/paligemma-diff

LoRA is merged into the weights. With standard attention the folder is a model in the hub's layout. Differential
parameters are beside the weights in differential.safetensors, which this repository's `from_pretrained` reads, as does
`differential_transformers.from_pretrained` for the model of transformers.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import huggingface_hub
import torch
import tyro
from huggingface_hub.errors import HTTPError

from adapters import merge
from checkpoint import locate, resolve_run
from differential_attention import differential_config
from errors import UserError, one_line_errors
from files import MESSAGE_LENGTH, atomic_folder, check_ranges, one_line, read_json, read_json_lines
from model_card import merged_card
from models import classes_of

PROCESSOR_FILES = (  # copied from the base model
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

LOGIN_NEEDED = (401, 403)  # status codes of the hub
Result = TypeVar("Result")


@dataclass
class Config:
    model: str  # run folder, or its best/ or one of its checkpoints/
    output: str  # folder to create
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the saved weights; bfloat16: half the size, rounded
    license: str = ""  # license of the weights; empty: that of the base model, if known
    push_to_hub: str = ""  # owner/name of a hub repository to upload the folder to
    private: bool = True  # make that repository private


def read_evals(folder: Path, step: int | None) -> dict[str, list[int]]:
    """The evaluation at `step` in the metrics.jsonl of the run that contains `folder` (final/, best/, a checkpoint)."""
    for log in (parent / "metrics.jsonl" for parent in folder.absolute().parents[:2]):
        if log.is_file():
            lines = read_json_lines(log)
            return next((line["eval"] for line in lines if "eval" in line and line.get("step") == step), {})
    return {}


# ---- the hub
def call_hub(action: Callable[[huggingface_hub.HfApi], Result], name: str, fix: str) -> Result:
    """Return `action(HfApi())`. Raises UserError if it fails, with `fix` as what to do then."""
    try:
        return action(huggingface_hub.HfApi())
    except (OSError, ValueError, HTTPError) as error:
        reason = one_line(error)[:MESSAGE_LENGTH]
        if getattr(getattr(error, "response", None), "status_code", None) in LOGIN_NEEDED:
            fix = f"run `hf auth login` with a token that may write, then {fix}"
        raise UserError(f"--push_to_hub={name}: {reason}: {fix}") from error


@one_line_errors
def main() -> None:
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_ranges(config)
    output, name = Path(config.output), config.push_to_hub
    base, adapter = resolve_run(config.model)
    if adapter is None or not (adapter.parent / "run.json").is_file():
        raise UserError(f"{config.model}: not a run: give a run folder, its best/ or one of its checkpoints/")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already: give another --output")
    if name:  # before the work, in case the hub refuses
        call_hub(
            lambda api: api.create_repo(name, private=config.private, exist_ok=True),
            name,
            "check the name and try again",
        )

    # --- merge in float32, regardless of the run's dtype
    model = classes_of(config.model)[0].from_pretrained(config.model)
    merge(model)
    for key, parameter in model.named_parameters():
        if ".differential." not in key:  # always float32
            parameter.data = parameter.data.to(getattr(torch, config.dtype))

    # --- write the folder
    record = read_json(adapter.parent / "run.json")
    # a checkpoint of --average_last holds the weights of its step, but at the last step their mean was evaluated
    is_evaluated = adapter.parents[1].name != "checkpoints" or not record["config"].get("average_last")
    evals = read_evals(adapter.parent, record.get("step")) if is_evaluated else {}
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        for file in (locate(base) / file for file in PROCESSOR_FILES):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        text = merged_card(
            record,
            evals,
            differential_config(model),
            model.config.model_type,
            type(model).__name__,
            output.name,
            config.license,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{output}: {sum(file.stat().st_size for file in output.iterdir()) / 1e6:.1f} MB")
    if name:
        upload = dict(repo_id=name, folder_path=output, commit_message="Upload the model")
        fix = f"upload {output}, which is complete, with `hf upload {name} {output}`"
        call_hub(lambda api: api.upload_folder(**upload), name, fix)
        print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    main()
