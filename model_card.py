"""Model cards: README.md beside the weights, with metadata for the hub.

A card says what was trained, on which data, how well it answered (from run.json and metrics.jsonl), and how to load it.
`record` is the run.json of the run; `evals` maps names to [exact answers, rows] of the evaluation of the weights and is
empty if there was none.
"""

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from adapters import LOAD_IN_TRANSFORMERS
from checkpoint import ROOT, is_hub_id
from config_fields import PHI_TYPES
from differential_attention import DifferentialConfig
from needle_eval.statistics import wilson
from run_folder import comparable

TEXT_ONLY = "phi3"  # the model_type of a decoder alone
SCORES_HEAD = "| held-out rows | exact answers, % | 95 % Wilson interval | n |\n|---|---|---|---|"
PROJECT = "Multimodal Differential Transformer"

ADAPTER = "adapter"  # name of its folder in a run folder
LOAD_ADAPTER = """```python
from peft import AutoPeftModel

model = AutoPeftModel.from_pretrained("{name}")
```
"""
LOAD_DIFFERENTIAL_ADAPTER = f"""It works only with the parameters in `../differential.safetensors`. With the
{PROJECT} on the path, on `model`, the base model in transformers:

```python
from differential_transformers import load_differential
from peft import PeftModel

model = PeftModel.from_pretrained(model, "{{name}}")
load_differential(model, "{{name}}/..")
```
"""
LOAD_STANDARD = "Load it with `{name}.from_pretrained` of transformers."
LOAD_HERE = f"Load {{what}} with `{{name}}.from_pretrained` of the {PROJECT}."


def adapter_card(
    record: dict[str, Any],
    evals: dict[str, list[int]],
    differential: DifferentialConfig | None,
    model_type: str,
) -> str:
    """README.md of the folder adapter/."""
    base, config = record["base_model"], record["config"]
    data = hide_folders(str(config["data"]))
    metadata = ModelCardData(
        base_model=hub_base(record),
        library_name="peft",
        pipeline_tag=task_of(model_type),
        datasets=datasets_of(data),
        tags=[*tags_of(model_type, differential), "lora"],
        model_name=ADAPTER,
        eval_results=eval_results(task_of(model_type), data, evals),
    )
    lora = record.get("lora", {})
    facts = {
        "task": f"{task_of(model_type)}: {describe_data(data, model_type)}",
        "base model": hide_folders(base),
        "attention": f"differential, preset {differential.preset}" if differential else "standard",
        "LoRA": ", ".join(f"{key} {value}" for key, value in lora.items()),
        "seed": config.get("seed"),
        "updates": f"{record.get('step')}, {config['batch_size'] * config['accumulation']} examples each",
    }
    if not is_in_transformers(model_type):
        load = LOAD_HERE.format(what="the run folder", name="Phi3VForCausalLM") + "\n"
    else:
        load = (LOAD_DIFFERENTIAL_ADAPTER if differential else LOAD_ADAPTER).format(name=ADAPTER)
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in facts.items())
    text = f"# LoRA adapter\n\n| | |\n|---|---|\n{rows}\n\n{score_table(evals)}{load}"
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\nMade by the {PROJECT}, commit {record.get('commit')}.\n"


def merged_card(
    record: dict[str, Any],
    evals: dict[str, list[int]],
    differential: DifferentialConfig | None,
    model_type: str,
    model_class: str,
    name: str,
    license_: str = "",
) -> str:
    """README.md of a model folder with merged LoRA, with the hyperparameters of its run.

    `model_class` loads the folder, `name` is the folder's name; an empty `license_` means that of the base model.
    """
    base, data = record["base_model"], hide_folders(record["config"]["data"])
    if is_in_transformers(model_type) and not differential:
        library, load = "transformers", LOAD_STANDARD.format(name=model_class)
    else:
        library, load = None, LOAD_HERE.format(what="it", name=model_class)
    if is_in_transformers(model_type) and differential:
        load += "\n\n" + LOAD_IN_TRANSFORMERS.format(name=name)
    metadata = ModelCardData(
        base_model=hub_base(record),
        license=license_ or known_license(base),
        datasets=datasets_of(data),
        library_name=library,
        pipeline_tag=task_of(model_type),
        tags=tags_of(model_type, differential),
        model_name=name,
        eval_results=eval_results(task_of(model_type), data, evals),
    )
    commit = f"@{record['base_revision']}" if record.get("base_revision") else ""
    versions = ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items())
    fields = [(key, value) for key, value in comparable(record).items() if value is not None and key != "output_dir"]
    hyperparameters = "\n".join(f"| {key} | `{hide_folders(str(value))}` |" for key, value in fields)
    return f"""---
{metadata.to_yaml()}
---

# {name}

`{hide_folders(base)}{commit}` with LoRA, fine-tuned on `{data}` and merged;
arm `{record["arm"]}`, step {record.get("step")}. {load}

{score_table(evals)}| hyperparameter | value |
|---|---|
{hyperparameters}

Made by the {PROJECT}, commit {record.get("commit")}, with {versions}. The license of the
base model applies to its weights.
"""


def is_in_transformers(model_type: str) -> bool:
    """Whether transformers has a class for the model_type."""
    return model_type != "phi3_v"


def hub_base(record: dict[str, Any]) -> str | None:
    """The hub id of the base model; None for a folder. A folder in the repository, such as assets/paligemma-nano, looks
    like an id, but only folders have a fingerprint of their weights."""
    base = record["base_model"]
    return base if is_hub_id(base) and record.get("base_weights") is None else None


def known_license(base: str) -> str | None:
    """The license of a base model, if it is known."""
    if is_hub_id(base) and base.startswith("google/paligemma"):
        return "gemma"
    if is_hub_id(base) and base.startswith("microsoft/Phi-3"):
        return "mit"
    return "apache-2.0" if (ROOT / base).is_relative_to(ROOT / "assets") else None


def tags_of(model_type: str, differential: DifferentialConfig | None) -> list[str]:
    """Tags of a card."""
    family = "phi3" if model_type in PHI_TYPES else "paligemma"
    return [family, *(["differential-attention", differential.preset] if differential else [])]


def datasets_of(data: str) -> list[str] | None:
    """The dataset on the hub that --data names, if any."""
    return [data.removeprefix("hub:").partition("@")[0]] if data.startswith("hub:") else None


def task_of(model_type: str) -> str:
    """The hub's name of the task."""
    return "text-generation" if model_type == TEXT_ONLY else "image-text-to-text"


def describe_data(data: str, model_type: str) -> str:
    """The task that --data trains, in words."""
    if model_type == TEXT_ONLY:
        return f"answer prompts ({data})"
    if data == "haystack" or data.startswith("haystack:"):
        return f"find a captioned image in a grid ({data})"
    return f"answer questions about images ({data})"


def eval_results(task: str, data: str, evals: dict[str, list[int]]) -> list[EvalResult] | None:
    """Exact answers in percent, in the hub's format."""
    results = [
        EvalResult(task, data, data, "exact_match", 100 * right / n, dataset_config=rows)
        for rows, (right, n) in evals.items()
    ]
    return results or None


def score_table(evals: dict[str, list[int]]) -> str:
    """The table of the scores with an empty line below; empty if there are none."""
    rows = "\n".join(score_row(rows, right, n) for rows, (right, n) in evals.items())
    return f"{SCORES_HEAD}\n{rows}\n\n" if rows else ""


def score_row(rows: str, right: int, n: int) -> str:
    """A line of the card's table, in percent."""
    low, high = wilson(right, n)
    return f"| {rows} | {100 * right / n:.1f} | {100 * low:.1f} to {100 * high:.1f} | {n} |"


def hide_folders(path: str) -> str:
    """A path, or a value of --data, without the folders of this machine; other text unchanged."""
    kind, rest = re.fullmatch(r"((?:haystack:|vqav2:)?)(.*)", path, re.DOTALL).groups()
    for path_class in (PurePosixPath, PureWindowsPath):
        if path_class(rest).is_absolute():
            return kind + path_class(rest).name
    return path
