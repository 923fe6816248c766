"""Count the kernel launches and host-device syncs of an update, ours and transformers + peft, without a GPU.

    python benchmarks/launches.py

A model with PaliGemma 3b's 18 + 27 layers at toy width, the same weights on both sides, a ragged batch of 8 needle
questions, bfloat16. Every operation counts as one launch; where CUDA has other kernels than the CPU, CUDA's are counted
(tests/pretend_cuda.py). A sync is counted where the CPU needs a value or a size. Ours is counted in the training loop;
for transformers: loss, backward pass, clipping and AdamW. A decoded token is the count of 4 tokens minus that of 3; for
ours without the CUDA graph, which replaces all these launches by one.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import pretend_cuda  # noqa: E402
import transformers  # noqa: E402
from compare import default_loss, make_tuned_loss, our_model, with_lora  # noqa: E402

import modeling_vlm  # noqa: E402
from data import loader, make_data  # noqa: E402
from finetune_original import Config as Finetune  # noqa: E402
from modeling_vlm import choose_step_decoder  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402

NANO = ROOT / "assets" / "paligemma-nano"
ROWS = 8
Counted = dict[str, int]


@dataclass
class Config:
    output: str = str(ROOT / "benchmarks" / "results" / "launches.json")


def counted(work: Callable[[], object]) -> Counted:
    """Launches and syncs of the second call of `work`."""
    work()
    with pretend_cuda.Counts() as counts:
        work()
    launches, waits = counts.take()
    return {"launches": launches, "waits": waits}


def our_updates(folder: Path) -> Iterator[tuple[str, Counted]]:
    for preset in (None, "split"):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as run:
            plain, logged = pretend_cuda.count_updates(folder, Path(run), preset, patch)
        for kind, (launches, waits) in (("", plain), (", logged", logged)):
            yield f"update, {preset or 'standard'}{kind}", {"launches": launches, "waits": waits}


def hf_model(folder: Path) -> torch.nn.Module:
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def needle_batch(folder: Path) -> dict[str, torch.Tensor]:
    source, _ = make_data(Finetune(grids=(2,), negatives=0.5))
    processor = PaliGemmaProcessor.from_pretrained(folder)
    ((_, batch),) = loader(source, processor, [[(0, i) for i in range(ROWS)]], with_suffix=True)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    return batch


def hf_updates(folder: Path) -> Iterator[tuple[str, Counted]]:
    batch = needle_batch(folder)
    for name in ("HF-default", "HF-default, autocast", "HF-tuned"):
        model = hf_model(folder)
        adapted = with_lora(model, own_dtype=name == "HF-tuned")
        if name == "HF-tuned":
            features = our_model(model.config, hf_model(folder).state_dict()).model.image_features(
                batch["pixel_values"]
            )
            loss = make_tuned_loss(adapted, batch, features)
        else:
            loss = lambda adapted=adapted: default_loss(adapted, batch)  # noqa: E731
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def update(loss=loss, trained=trained, optimizer=optimizer, enabled="autocast" in name):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        yield f"update, {name}", counted(update)


def decoded_tokens(folder: Path) -> Iterator[tuple[str, Counted]]:
    """Counts per decoded token; ours without the CUDA graph, which replaces all launches by one."""
    ids = torch.randint(5, 90, (2, 6))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.MonkeyPatch.context() as patch:
        pretend_cuda.force(patch)
        patch.setattr(modeling_vlm, "choose_step_decoder", lambda _: choose_step_decoder("cuda"))
        for side in ("ours", "HF"):
            for kind in ("", ", adapter"):
                model = hf_model(folder)
                model = our_model(model.config, model.state_dict()) if side == "ours" else model
                yield f"token, {side}{kind}", one_token(model, batch, bool(kind))


def one_token(model: torch.nn.Module, batch: dict, with_adapter: bool) -> Counted:
    if with_adapter:
        with_lora(model)
    model.eval()
    if isinstance(model, modeling_vlm.VisionLanguageModel):
        model.config.eos_token_id, more = -1, {}
    else:
        model.generation_config.eos_token_id, more = None, dict(do_sample=False)
    three, four = (counted(lambda n=n: model.generate(**batch, max_new_tokens=n, **more)) for n in (3, 4))
    return {key: four[key] - three[key] for key in four}


def table(rows: dict[str, Counted]) -> list[str]:
    lines = [f"| {name} | {row['launches']:,} | {row['waits']} |" for name, row in rows.items()]
    return ["| work | launches | syncs |", "|---|---|---|", *lines]


def main():
    config = tyro.cli(Config, use_underscores=True)
    result = {"date": time.strftime("%Y-%m-%d")}
    result |= {name: version(name) for name in ("torch", "transformers", "peft")} | {"rows": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretend_cuda.write_deep_model(NANO, folder)
        for rows in (our_updates, hf_updates, decoded_tokens):
            result["rows"] |= rows(folder)
    print(*table(result["rows"]), sep="\n")
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
