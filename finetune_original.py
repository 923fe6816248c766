"""LoRA fine-tuning of PaliGemma or Phi-3-vision with standard attention: the baseline arm.

    python finetune_original.py                                     # the included model on needle questions
    python finetune_original.py --model=google/paligemma-3b-pt-224  # on a GPU
    python finetune_original.py --model=microsoft/Phi-3.5-vision-instruct
    python finetune_original.py --data=my.jsonl --max_steps=100     # rows of {image, prefix, suffix}
    torchrun --nproc-per-node=4 finetune_original.py                # on four GPUs

Edit Config in this file, or pass any of its fields as a flag. To continue a killed run, run the same command again.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from typing import Annotated, Literal, TypeVar

import tyro
from msgspec import Meta

import plots
import training
from adapters import Rank, quantize
from checkpoint import resolve_run
from config_fields import Positive
from data import make_data
from differential_attention import DifferentialConfig, differential_config
from errors import UserError, one_line_errors
from evaluation import evaluate, make_evaluation, print_scores
from machine import out_of_memory_as
from metrics import Metric, check_installed
from models import classes_of
from run_folder import check_config, open_run

C = TypeVar("C", bound="Config")
SECTIONS = {"model": "model", "data": "data", "optimisation": "seed", "evaluation": "metric"}  # title -> first field
PATH_FIELDS = ("data", "eval_data", "vision_cache_dir", "output_dir")
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "use_dora", "use_rslora")
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Side = Annotated[int, Meta(ge=1, le=32)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0)]


@dataclass
class Config:
    # --- model
    model: str = "assets/paligemma-nano"  # hub id, model folder, or run folder (trains its adapter further)
    lora_rank: Rank = 16  # rank of the low-rank updates
    lora_alpha: Positive = 32  # the update is scaled by alpha / rank
    lora_dropout: BelowOne = 0.0  # dropout probability on LoRA's inputs in training
    lora_targets: tuple[str, ...] = ()  # linear layers in each decoder layer that get LoRA; empty: all
    use_dora: bool = False  # DoRA: learn magnitude and direction of each weight separately (arXiv 2402.09353)
    use_rslora: bool = False  # rsLoRA: the update is scaled by alpha / sqrt(rank) instead (arXiv 2312.03732)
    train_vision: Literal["no", "lora", "full"] = "no"  # train the vision tower too, with LoRA or in full
    train_projector: Literal["no", "lora", "full"] = "no"  # train the projector too, with LoRA or in full
    # dtype of the frozen base (adapters are float32); nf4: 4-bit QLoRA, needs a CUDA GPU and bitsandbytes
    dtype: Literal["auto", "float32", "bfloat16", "nf4"] = "auto"
    shard: bool = False  # FSDP2: shard the frozen layers over the processes of torchrun
    gradient_checkpointing: bool = False  # recompute layers in the backward pass: slower, much less memory
    compile: bool = False  # torch.compile the layers in training: slow start, then 0.8 x the time on an H200
    # --- data
    data: str = "haystack"  # haystack, haystack:IMAGES, a .jsonl file, vqav2:FOLDER, hub:NAME, or hub:NAME@SPLIT
    eval_data: str = ""  # the same forms but haystack; empty: haystack's own test sets, or held-out rows of data
    grids: Annotated[tuple[Side, ...], Meta(min_length=1)] = (2, 4)  # haystacks have N x N cells
    # (images, N) pairs for haystacks of several images, as in --shapes 1 2 1 4 4 2; empty: one image, N from `grids`
    shapes: tuple[tuple[Side, Side], ...] = ()
    recolour: bool = False  # randomise the colours of every image in training haystacks
    negatives: Share = 0.2  # fraction of haystack questions whose caption is in no cell (answer -1)
    strict_data: bool = False  # stop at the first bad row instead of skipping and reporting it
    workers: Annotated[int, Meta(ge=-1, le=1024)] = -1  # data loading processes; -1: none on a CPU, 4 on a GPU
    group_by_length: bool = False  # batch rows of similar length: less padding, a different order of the data
    vision_cache_gb: NotNegative = 0.0  # GB of memory per process for cached features of repeated images; 0: off
    vision_cache_dir: str = ""  # folder for cached features beyond vision_cache_gb; empty: recompute them
    # --- optimisation
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0  # seed of adapter initialisation, data order and dropout
    max_steps: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 400  # number of optimizer updates
    # above 0: this many passes over the data instead of max_steps
    epochs: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    batch_size: Count = 32  # examples per micro-batch, summed over all processes
    accumulation: Count = 1  # micro-batches per update
    # peak learning rate of AdamW; None: 1e-4 for the released PaliGemma models, 2e-3 for small ones; Phi-3: that of
    # config.json, else 4e-5
    lr: Annotated[float, Meta(gt=0, le=10)] | None = None
    vision_lr: Annotated[float, Meta(gt=0, le=10)] | None = None  # peak learning rate of the vision tower; None: lr
    projector_lr: Annotated[float, Meta(gt=0, le=10)] | None = None  # peak learning rate of the projector; None: lr
    warmup_steps: Annotated[int, Meta(ge=0, le=1_000_000)] = 30  # updates of linear warm-up before the cosine to zero
    # weight decay of LoRA and of parts that train in full; differential parameters have none
    weight_decay: Annotated[float, Meta(ge=0, le=10)] = 0.0
    beta2: BelowOne = 0.99  # decay of AdamW's second moment
    clip: Positive = 1.0  # maximum gradient norm
    average_last: BelowOne = 0.0  # average the weights over this last fraction of the updates for final/; 0: off
    # --- evaluation, logging and files
    metric: Metric = "exact"  # metric that selects best/; vqa, anls, rouge and map need your own data
    eval_samples: Count = 500  # rows of each evaluation set used before and after training
    eval_batch_size: Count = 64  # evaluation prompts answered at once
    eval_every: Count = 200  # updates between evaluations on two batches of each set
    # stop after this many evaluations without a new best score; 0: never
    patience: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    max_new_tokens: Count = 12  # maximum number of tokens of an answer
    eval_only: bool = False  # print held-out accuracy of `model` and stop
    log_every: Count = 10  # updates between log lines
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # besides metrics.jsonl; wandb must be installed
    save_every: Count = 100  # updates between checkpoints
    keep_checkpoints: Count = 2  # number of newest checkpoints to keep
    output_dir: str = ""  # run folder; empty: runs/{arm}_seed{seed}
    overwrite: bool = False  # start over if the folder holds a run


@out_of_memory_as(
    "lower --batch_size and --eval_batch_size, set --gradient_checkpointing=True, or take a smaller --model"
)
def finetune(config: Config, arm: str, differential: DifferentialConfig | None = None):
    """Run one arm: the baseline if `differential` is None, else the differential arm."""
    # --- defaults of the family, run folder, device, precision
    check_installed(config.metric)
    check_lora_flags(config)
    model_class, processor_class = classes_of(config.model)
    model_config = model_class.config_class.from_pretrained(config.model)
    targets, lr = config.lora_targets or model_class.lora_targets, config.lr or model_config.learning_rate
    config = replace(config, lora_targets=targets, lr=lr)
    run = open_run(config, arm)
    if run.finished:
        if run.is_main and not plots.is_drawn(run.folder):  # it was killed before its figures were drawn
            plots.draw_run(run.folder)
        return

    # --- data, checked before the model is loaded
    source, eval_sets = make_data(config)

    # --- the frozen base model, and LoRA in its language model
    processor = processor_class.from_pretrained(config.model)
    base, _ = resolve_run(config.model)  # for a run folder, its adapter is added below
    is_quantized = config.dtype == "nf4"
    model = model_class.from_pretrained(base, run.dtype, "cpu" if is_quantized else run.device, differential)
    if differential is None and differential_config(model) is not None:
        raise UserError(f"{config.model} has differential attention: train it with finetune_diff.py")
    if is_quantized:
        model = quantize(model, run.device)
    adapted = training.add_lora(run, config, model)
    model.gradient_checkpointing_enable(config.gradient_checkpointing)

    # --- train, or only evaluate
    if config.eval_only:
        print_scores(run, config, evaluate(make_evaluation(run, config, model, processor, eval_sets)))
    else:
        training.train(run, config, model, adapted, processor, source, eval_sets)
        if run.is_main:
            plots.draw_run(run.folder)


def check_lora_flags(config: Config):
    """Raise UserError for LoRA flags with a run folder, whose adapter keeps its own settings."""
    _, adapter = resolve_run(config.model)
    changed = [f.name for f in fields(Config) if f.name in LORA_FIELDS and getattr(config, f.name) != f.default]
    if adapter is not None and changed:
        raise UserError(f"--{changed[0]}: the adapter of {config.model} is trained on as it is: leave it out")


def parse_config(config_class: type[C], description: str | None, args: Sequence[str] | None = None) -> C:
    """The configuration from the command line. Exits with code 2 for unknown flags and values of the wrong type; raises
    UserError for values out of range."""
    args = sys.argv[1:] if args is None else list(args)
    asks_for_help = {"-h", "--help"} & set(args)
    flags = group_flags(config_class) if asks_for_help else config_class
    options = (tyro.conf.FlagConversionOff,)
    config = tyro.cli(flags, description=description, args=args, config=options, use_underscores=True)
    config = replace(config, **{name: expand_home(getattr(config, name)) for name in PATH_FIELDS})
    check_config(config)
    return config


def expand_home(value: str) -> str:
    """A path, or KIND:PATH, with ~ expanded, which bash does not do after `--flag=`."""
    return ":".join(map(os.path.expanduser, value.split(":", 1)))


def group_flags(config_class: type[C]) -> type:
    """A dataclass with the same flags, nested by the sections of `Config`, so that --help groups them.

    A field that is itself a dataclass is a separate group.
    """
    from tyro._docstrings import get_field_docstring  # private API, so only --help depends on it

    plain = [f for f in fields(config_class) if not is_dataclass(f.type)]
    nested = [(f.name, f.type) for f in fields(config_class) if is_dataclass(f.type)]
    first = [[f.name for f in plain].index(name) for name in SECTIONS.values()]
    groups = []
    for title, start, end in zip(SECTIONS, first, [*first[1:], len(plain)], strict=True):
        flags = []
        for f in plain[start:end]:
            comment = tyro.conf.arg(help=get_field_docstring(config_class, f.name, ()))
            flags.append((f.name, Annotated[f.type, comment], field(default=f.default)))
        group = make_dataclass(title, flags)
        group.__doc__ = None  # otherwise --help would show the signature
        groups.append((title, tyro.conf.OmitArgPrefixes[group]))
    return make_dataclass("Flags", groups + nested)


@one_line_errors
def main():
    finetune(parse_config(Config, __doc__), arm="original")


if __name__ == "__main__":
    main()
