"""Make a trained run into a model folder that stands alone, with a model card, ready for the hub.

    python export.py --model=runs/original_seed0 --output=exported/original
    python export.py --model=runs/diff_seed0 --output=exported/diff --push_to_hub=you/paligemma-diff

LoRA is merged into the weights. With standard attention the folder is a PaliGemma that transformers loads; differential
attention lies beside the weights in differential.safetensors, which this repository's `from_pretrained` reads.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import torch
import tyro
from huggingface_hub.errors import HTTPError

from adapters import merge
from checkpoint import is_hub_id, locate, resolve_run
from differential_attention import differential_config
from errors import UserError, one_line_errors
from files import atomic_folder, read_json
from modeling_gemma import PaliGemmaForConditionalGeneration
from needle_eval.statistics import wilson
from run_folder import comparable

ROOT = Path(__file__).resolve().parent
# what a processor is made of; model.safetensors and config.json are written anew
PROCESSOR = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)

LOADED_THERE = "Load it with transformers' `PaliGemmaForConditionalGeneration.from_pretrained`."
LOADED_HERE = """Load it with `PaliGemmaForConditionalGeneration.from_pretrained` of the repository named below:
transformers would pass `differential.safetensors` by, and have another model."""


@dataclass
class Config:
    model: str  # run folder, or its best/ or one of its checkpoints/
    output: str  # folder to make
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the saved weights; bfloat16: half the size, rounded
    license: str = ""  # of the weights; empty: the base model's, where it is known
    push_to_hub: str = ""  # owner/name: upload the folder there too
    private: bool = True  # who sees that repository


# ---- the model card
def card(config: Config, record: dict, evals: dict[str, list[int]], differential) -> str:
    """README.md: metadata that the hub reads, then what was trained from what, how, and how well it answered.

    `record` is the run's run.json, `evals` name -> [exact answers, rows].
    """
    base, data, name = record["base_model"], public(record["config"]["data"]), Path(config.output).name
    told = huggingface_hub.ModelCardData(
        base_model=base if is_hub_id(base) else None,
        license=config.license or known_license(base),
        datasets=[data.removeprefix("hub:")] if data.startswith("hub:") else None,
        library_name=None if differential else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["paligemma", "lora", *(["differential-attention", differential.preset] if differential else [])],
        model_name=name,
        eval_results=[
            huggingface_hub.EvalResult(
                "image-text-to-text", data, data, "exact_match", 100 * right / n, dataset_config=k
            )
            for k, (right, n) in evals.items()
        ],
    )
    commit = f"@{record['base_revision']}" if record.get("base_revision") else ""
    made = ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items())
    fields = [(key, value) for key, value in comparable(record).items() if value is not None and key != "output_dir"]
    return f"""---
{told.to_yaml()}
---

# {name}

`{public(base)}{commit}` with LoRA, fine-tuned on `{data}` and merged; arm `{record["arm"]}`, step {record.get("step")}.
{LOADED_HERE if differential else LOADED_THERE}

| held-out rows | exact answers, % | 95 % Wilson interval | n |
|---|---|---|---|
{chr(10).join(interval(rows, right, n) for rows, (right, n) in evals.items())}

| hyperparameter | value |
|---|---|
{chr(10).join(f"| {key} | `{public(str(value))}` |" for key, value in fields)}

Made by the Multimodal Differential Transformer, commit {record.get("commit")}, with {made}. The licence of the
base model goes with its weights.
"""


def public(path: str) -> str:
    """A path without the folders of the machine that it lies on; anything else as it is."""
    return re.sub(r"(^|:)/\S*/", r"\1", path)


def interval(rows: str, right: int, n: int) -> str:
    low, high = wilson(right, n)
    return f"| {rows} | {100 * right / n:.1f} | {100 * low:.1f} to {100 * high:.1f} | {n} |"


def known_license(base: str) -> str | None:
    if is_hub_id(base) and base.startswith("google/paligemma"):
        return "gemma"
    return "apache-2.0" if (ROOT / base).is_relative_to(ROOT / "assets") else None


def read_evals(folder: Path, step: int | None) -> dict[str, list[int]]:
    """The evaluation at `step` in the metrics.jsonl of the run that `folder` (final/, best/, a checkpoint) is of."""
    for log in (parent / "metrics.jsonl" for parent in folder.absolute().parents[:2]):
        if log.is_file():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            return next((line["eval"] for line in lines if "eval" in line and line["step"] == step), {})
    return {}


# ---- the hub
def hub(action, name: str):
    """`action(HfApi())`, its faults in one line."""
    try:
        return action(huggingface_hub.HfApi())
    except (OSError, ValueError, HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push_to_hub={name}: {reason}: run `hf auth login` with a token that may write") from error


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    output, name = Path(config.output), config.push_to_hub
    base, adapter = resolve_run(config.model)
    if adapter is None or not (adapter.parent / "run.json").is_file():
        raise UserError(f"{config.model}: no run: give a run folder, its best/ or one of its checkpoints/")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: is there already: give another --output")
    if name:  # what the hub refuses it refuses before the work
        hub(lambda api: api.create_repo(name, private=config.private, exist_ok=True), name)

    # --- merge in float32, whatever the run computed in
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    merge(model)
    for key, parameter in model.named_parameters():
        if ".differential." not in key:  # float32 always
            parameter.data = parameter.data.to(getattr(torch, config.dtype))

    # --- the folder
    record = read_json(adapter.parent / "run.json")
    evals = read_evals(adapter.parent, record.get("step"))
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        for file in (locate(base) / file for file in PROCESSOR):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        text = card(config, record, evals, differential_config(model))
        (folder / "README.md").write_text(text, encoding="utf-8")
    print(f"{output}: {sum(file.stat().st_size for file in output.iterdir()) / 1e6:.1f} MB")
    if name:
        hub(lambda api: api.upload_folder(repo_id=name, folder_path=output, commit_message="Upload the model"), name)
        print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    main()
