"""Measure loading and answering with a random Phi-3.5-vision (4.1 billion parameters): time and peak memory.

    python benchmarks/full_size_phi.py --folder=/tmp/phi-3.5-vision-random

The checkpoint (8.3 GB in bf16 shards) is written shard by shard unless the folder holds one. A fresh process loads it
and answers one prompt with a square image at 4 crops, in bfloat16. Needs 12 GB of memory. The released code is not run
here; tests/test_phi3v.py compares with its numbers at small size.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from full_size import peak_gb  # noqa: E402

from modeling_clip import ClipVisionConfig  # noqa: E402
from modeling_phi3 import Phi3Config, Phi3TextConfig, Phi3VForCausalLM  # noqa: E402

NUM_CROPS, CROP, GRID = 4, 336, 2  # a square image is cut into GRID x GRID crops
IMAGE_TOKENS = 757  # of a square image at 4 crops
SHARD_BYTES = 2_000_000_000
PROMPT_IDS = [1, 32010, 29871, 13]  # <s>, <|user|> and a newline; the text does not matter with random weights
ANSWER_IDS = [1724, 338, 4318, 297, 445, 1967, 29973, 32007, 29871, 13, 32001]


@dataclass
class Config:
    folder: str = "/tmp/phi-3.5-vision-random"  # checkpoint; written if it does not exist
    new_tokens: int = 5  # length of the greedy answer
    output: str = str(ROOT / "benchmarks" / "results" / "full_size_phi.json")
    measure: bool = False  # internal: this process loads the model and answers


def make_config() -> Phi3Config:
    """Phi-3.5-vision's sizes, with a ramp of the same length in place of its rotary factors."""
    half = 48
    text = Phi3TextConfig(
        max_position_embeddings=131072,
        short_factor=tuple(1 + i / half for i in range(half)),
        long_factor=tuple(1 + 60 * i / half for i in range(half)),
    )
    return Phi3Config(text, ClipVisionConfig(), "phi3_v")


def write_checkpoint(folder: Path) -> None:
    """Write random weights in bfloat16, one shard in memory at a time."""
    config = make_config()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Phi3VForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    generator, places, shard, size = torch.Generator().manual_seed(0), {}, {}, 0
    names = list(shapes)
    for name in names:
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
        is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
        shard[name] = torch.ones_like(tensor) if is_norm else tensor
        size += 2 * tensor.numel()
        if size > SHARD_BYTES or name == names[-1]:
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


@torch.no_grad()
def measure(config: Config) -> dict:
    """Load the model and answer once. Peak memory is only right in a fresh process."""
    started = time.perf_counter()
    model = Phi3VForCausalLM.from_pretrained(config.folder, torch.bfloat16)
    load_seconds, load_peak = time.perf_counter() - started, peak_gb()
    ids = torch.tensor([PROMPT_IDS + [model.config.image_token_id] * IMAGE_TOKENS + ANSWER_IDS])
    pixels = torch.randn(1, NUM_CROPS + 1, 3, CROP, CROP, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[GRID * CROP, GRID * CROP]])
    started = time.perf_counter()
    answer = model.generate(ids, pixels, torch.ones_like(ids), config.new_tokens, image_sizes=sizes)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": ids.shape[1],
        "load_seconds": round(load_seconds, 1),
        "load_peak_gb": round(load_peak, 2),
        "answer_seconds": round(time.perf_counter() - started, 1),
        "total_peak_gb": round(peak_gb(), 2),
        "answer": answer[0, ids.shape[1] :].tolist(),
    }


def main() -> None:
    config = tyro.cli(Config, use_underscores=True)
    if config.measure:
        print(json.dumps(measure(config)))
        return
    folder = Path(config.folder)
    if not (folder / "config.json").exists():
        write_checkpoint(folder)
    files = list(folder.glob("*.safetensors"))
    flags = ["--measure", f"--folder={folder}", f"--new_tokens={config.new_tokens}"]
    process = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    result = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine()}
    result |= {"threads": torch.get_num_threads(), "dtype": "bfloat16"}
    result |= {"weights_gb": round(sum(file.stat().st_size for file in files) / 1e9, 2)}
    result |= json.loads(process.stdout.splitlines()[-1])
    print(result)
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
