"""LoRA fine-tuning of PaliGemma with differential attention: the baseline's hyperparameters, data, order and budget.

    python finetune_diff.py                                                # split, in the decoder of the embedded model
    python finetune_diff.py --differential.preset=v2
    python finetune_diff.py --differential.towers text vision              # in SigLIP too
    python finetune_diff.py --model=google/paligemma-3b-pt-224 --lr=1e-4   # on a GPU

What is not said here stands in finetune_original.py; `differential_attention.PRESETS` lists the methods.
"""

from dataclasses import dataclass, field, replace

import tyro

import finetune_original
from differential_attention import DifferentialConfig
from errors import one_line_errors


@dataclass
class Config(finetune_original.Config):
    # --- differential attention
    differential: DifferentialConfig = field(default_factory=DifferentialConfig)


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    config = replace(config, differential=replace(config.differential.resolve(), seed=config.seed))
    preset = "" if config.differential.preset == "split" else f"_{config.differential.preset}"
    finetune_original.finetune(config, arm=f"diff{preset}", differential=config.differential)


if __name__ == "__main__":
    main()
