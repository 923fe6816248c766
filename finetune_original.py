"""LoRA fine-tuning of PaliGemma with standard attention: the baseline arm.

    python finetune_original.py                                     # the embedded model on needle questions
    python finetune_original.py --model=google/paligemma-3b-pt-224  # on a GPU
    python finetune_original.py --data=my.jsonl --max_steps=100     # rows of {image, prefix, suffix}
    torchrun --nproc-per-node=4 finetune_original.py                # on four GPUs

Edit the block below, or give any field as a flag. A killed run continues when it is started again.
"""

from dataclasses import dataclass
from typing import Literal

import tyro

import plots
import training
from checkpoint import resolve_run
from data import make_data
from differential_attention import differential_config
from errors import UserError, one_line_errors
from files import writing
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor
from run_folder import open_run


@dataclass
class Config:
    # --- model
    model: str = "assets/paligemma-nano"  # hub id, model folder, or run folder whose adapter is trained on
    lora_rank: int = 16  # rank of the low-rank updates
    lora_alpha: float = 32  # the update is scaled by alpha / rank
    lora_dropout: float = 0.0  # share of LoRA inputs dropped in training
    # linear layers of the language model that get LoRA
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # of the frozen base; adapters are float32 always; nf4: 4-bit (QLoRA), on a CUDA card, with bitsandbytes installed
    dtype: Literal["auto", "float32", "bfloat16", "nf4"] = "auto"
    shard: bool = False  # FSDP2: torchrun's processes share the frozen layers' weights out among them
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: slower, much less memory
    # --- data
    data: str = "haystack"  # haystack, haystack:PICTURES, a .jsonl file, vqav2:FOLDER, or hub:NAME
    eval_data: str = ""  # the same forms; empty: haystack's own test sets, or a tenth of `data` held out
    grids: tuple[int, ...] = (2, 4)  # haystacks have N x N cells
    negatives: float = 0.2  # share of haystack questions whose caption is in no cell; the answer is -1
    strict_data: bool = False  # stop at the first bad row instead of leaving it out, named and counted
    workers: int = -1  # data loading processes; -1: none on a CPU, 4 on a GPU
    group_by_length: bool = False  # batches of rows of like length: less padding, another order of the data
    vision_cache_gb: float = 0.0  # memory of each process for features of pictures that come again, computed once
    vision_cache_dir: str = ""  # where features beyond it go; empty: they are computed anew
    # --- optimisation
    seed: int = 0  # of adapters, data order and dropout
    max_steps: int = 400  # updates
    epochs: float = 0.0  # above 0: so many passes over the data instead of max_steps
    batch_size: int = 32  # examples per micro-batch, over all processes
    accumulation: int = 1  # micro-batches per update
    lr: float = 2e-3  # AdamW's peak rate; 1e-4 suits PaliGemma 3b
    warmup_steps: int = 30  # updates of linear warm-up; a cosine to zero follows
    weight_decay: float = 0.0  # of adapters
    beta2: float = 0.99  # AdamW's second-moment decay
    clip: float = 1.0  # largest gradient norm
    # --- evaluation and logging
    eval_samples: int = 500  # rows of each evaluation set, before and after training
    eval_batch_size: int = 64  # prompts generated at once
    eval_every: int = 200  # updates between evaluations on two batches of each set
    max_new_tokens: int = 12  # longest answer
    eval_only: bool = False  # print held-out accuracy of `model` and stop
    log_every: int = 10  # updates
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # beside metrics.jsonl; wandb if it is installed
    save_every: int = 100  # updates between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept
    output_dir: str = ""  # empty: runs/{arm}_seed{seed}
    overwrite: bool = False  # start anew where the folder holds a run


def finetune(config: Config, arm: str, differential=None):
    """Both arms: `differential` is the only thing that the other one adds."""
    # --- run folder, device, precision
    run = open_run(config, arm)
    if run is None:
        return

    # --- the frozen base, and LoRA in its language model
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    base, _ = resolve_run(config.model)  # an adapter is put in below
    quantized = config.dtype == "nf4"
    home = "cpu" if quantized else run.device
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, run.dtype, home, differential)
    if differential is None and differential_config(model) is not None:
        raise UserError(f"{config.model} holds differential attention: train it with finetune_diff.py")
    if quantized:
        model = training.quantize(model, run.device)
    adapted = training.add_lora(run, config, model)
    model.gradient_checkpointing_enable(config.gradient_checkpointing)

    # --- data
    source, eval_sets = make_data(config)

    # --- train, or only look
    if config.eval_only:
        training.print_scores(run, training.evaluate(run, config, model, processor, eval_sets))
    else:
        training.train(run, config, model, adapted, processor, source, eval_sets)
        if run.is_main:
            with writing(run.folder / "plots"):
                plots.draw_run(run.folder)


@one_line_errors
def main():
    finetune(tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True), arm="original")


if __name__ == "__main__":
    main()
