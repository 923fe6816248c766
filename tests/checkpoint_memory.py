"""Child process of test_checkpoint.py: loads a folder and prints peak resident growth and weights in bytes, as JSON.

python tests/checkpoint_memory.py FOLDER {bfloat16,float32}
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint

SIZES = {"embedding": (160_000, 256), "layers": (24, 512, 2048)}  # one tensor outweighs the rest, as in a Gemma


def build() -> torch.nn.Module:
    count, rows, columns = SIZES["layers"]
    layers = [torch.nn.Linear(columns, rows, bias=False) for _ in range(count)]
    return torch.nn.ModuleDict(
        {"embedding": torch.nn.Embedding(*SIZES["embedding"]), "layers": torch.nn.ModuleList(layers)}
    )


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def main(folder: str, dtype: str):
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = build()
    torch.ones(1, dtype=torch.bfloat16).float().sum()  # first-use allocations belong to the baseline
    before = max(resident("VmHWM"), resident("VmRSS"))
    checkpoint.load_weights(model, folder, getattr(torch, dtype))
    for tensor in model.parameters():
        tensor.detach().view(torch.uint8).flatten()[::4096].sum()  # touches every page of a mapped file
    weights = sum(tensor.nbytes for tensor in model.parameters())
    print(json.dumps({"growth": resident("VmHWM") - before, "weights": weights}))


if __name__ == "__main__":
    main(*sys.argv[1:])
