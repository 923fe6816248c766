"""LoRA fine-tuning with differential attention; hyperparameters, data, order and budget are those of the baseline.

    python finetune_diff.py                                                # split, in the decoder of the included model
    python finetune_diff.py --differential.preset=v2
    python finetune_diff.py --differential.towers text vision              # in SigLIP too
    python finetune_diff.py --model=google/paligemma-3b-pt-224 --lr=1e-4   # on a GPU

All other flags are those of finetune_original.py.
"""

from dataclasses import dataclass, field, replace

import finetune_original
from differential_attention import PRESETS, DifferentialConfig
from errors import UserError, one_line_errors


@dataclass
class Config(finetune_original.Config):
    differential: DifferentialConfig = field(default_factory=DifferentialConfig)  # the method and its settings


def describe_presets() -> str:
    """One line per preset, for --help: formula, start, what learns first, cost, source."""
    return "\n".join(f"    {name:18}{preset.describe()}" for name, preset in PRESETS.items())


@one_line_errors
def main():
    description = f"{__doc__}\nPresets of --differential.preset:\n\n{describe_presets()}"
    config = finetune_original.parse_config(Config, description)
    if config.differential.seed:
        raise UserError("--differential.seed: is set by --seed: leave it out")
    config = replace(config, differential=replace(config.differential.resolve(), seed=config.seed))
    preset = "" if config.differential.preset == "split" else f"_{config.differential.preset}"
    finetune_original.finetune(config, arm=f"diff{preset}", differential=config.differential)


if __name__ == "__main__":
    main()
