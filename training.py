"""The training loop, built on Accelerate. The baseline and the differential arm differ only in the model they pass in.

The state of a run is the adapter, the differential parameters, the optimizer, the step and the best score so far.
Learning rate, lambda warm-up, data order and dropout depend only on the step and the seed, so a resumed run takes the
same steps as an uninterrupted one.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from adapters import (
    attach_adapter,
    find_differential,
    gathered,
    load_differential,
    new_lora,
    save_differential,
    save_lora,
    shard_frozen_layers,
    trainable_counts,
)
from checkpoint import locate, resolve_run
from data import Haystacks, Source, batch_order, loader, text_lengths
from diagnostics import (
    SAVED_QUESTIONS,
    answer_attention,
    effective_map,
    first_map,
    lambda_values,
    measure_maps,
    select_heads,
    subtracted_map,
)
from differential_attention import (
    differential_config,
    differential_modules,
    differential_parameters,
    is_lambda,
    unfreeze_differential,
)
from errors import TrainingFailed, UserError
from evaluation import (
    Evaluation,
    evaluate,
    evaluation_losses,
    headline_rate,
    log_samples,
    make_evaluation,
    max_length,
    prompt_limit,
)
from files import MESSAGE_LENGTH, atomic_folder, one_line, write_json, write_manifest, writing
from fused_ops import cast_lora, lora_layers
from machine import choose_workers, compile_layers, out_of_memory_as, peak_memory, without_compiling
from metrics import score_answers
from model_card import adapter_card
from needle_eval.statistics import format_rate, rate
from processing_paligemma import Processor
from run_folder import (
    Run,
    Stopped,
    check_same_data,
    differing_fields,
    find_checkpoints,
    load_optimizer,
    read_metrics,
    read_run_record,
    read_trainer_state,
    start_folder,
    start_tracker,
)
from vision_cache import VisionCache

if TYPE_CHECKING:
    from finetune_original import Config

PROBE_ROWS = 8  # prompts on which both maps are measured at every evaluation
SMALLER_BATCH = (
    "lower --batch_size and raise --accumulation by the same factor, which keeps the result, or set "
    "--gradient_checkpointing=True"
)
SEED_STRIDE, STEP_STRIDE = 1_000_003, 1_009  # every seed, step and process has its own dropout seed


# ---- the model and its optimizer
def add_lora(run: Run, config: "Config", model: nn.Module) -> nn.Module:
    """Freeze `model`, add LoRA to its language model and, if they train, to its tower and projector, and unfreeze the
    differential parameters.

    A resumed run loads the weights of its checkpoint; a new run whose `config.model` is a run folder starts from the
    weights of that run. Returns peft's wrapper; `model` is modified in place. Also records the LoRA settings in
    `run.record` and the initial differential parameters in `run.initial_differential`. Raises UserError for parts that
    cannot train.
    """
    model.requires_grad_(False)
    trained = {"vision_tower": config.train_vision, "multi_modal_projector": config.train_projector}
    prepare_parts(config, model, trained)
    _, adapter = resolve_run(config.model)
    folder = run.resume / "adapter" if run.resume else adapter
    adapted = new_lora(config, model) if folder is None else attach_adapter(model, folder, trainable=True)
    if adapter and (stored := stored_differential_folder(config)):  # from_pretrained loads those of a model folder
        load_differential(model, stored)
    run.initial_differential = {name: p.detach().clone() for name, p in differential_parameters(model).items()}
    if run.resume and run.initial_differential:
        load_differential(model, run.resume)
    unfreeze_differential(model)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad and ".differential." not in name]
    for part, how in trained.items():
        if how != "no" and not any(part in name for name in names):
            raise UserError(f"{config.model}: its adapter does not train the {part}: start from its base model")
    lora = adapted.peft_config["default"]  # the settings in effect: a run folder has its own
    run.record["lora"] = {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
    run.record["lora"] |= {"dora": lora.use_dora, "rslora": lora.use_rslora}
    return adapted


def prepare_parts(config: "Config", model: nn.Module, trained: dict[str, str]):
    """Cast the parts that train in full to float32, like the adapters. Raises UserError for parts that cannot train."""
    for part, how in trained.items():
        module = getattr(model.model, part)
        if how != "no" and module is None:
            raise UserError(f"--train_vision, --train_projector: {config.model} is a decoder alone: leave them out")
        if how == "full":
            if differential_parameters(module):  # peft would copy and save them with the part
                raise UserError("--train_vision=full: the tower has differential attention: use --train_vision=lora")
            module.float()


def stored_differential_folder(config: "Config") -> Path | None:
    """The folder with the differential parameters of `config.model`; None for a standard model or run."""
    base, adapter = resolve_run(config.model)
    return find_differential(locate(base), adapter)


def make_optimizer(config: "Config", adapted: nn.Module) -> torch.optim.AdamW:
    """AdamW on the trainable parameters. Differential parameters get no weight decay, which would change them even
    without a gradient; lambda, the vision tower and the projector have their own learning rates."""
    differential = differential_config(adapted)
    groups: dict[tuple, dict] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            is_differential = ".differential." in name
            # factor of the learning rate
            scale = differential.lambda_lr if is_differential and is_lambda(name) else 1.0
            for part, part_lr in (("vision_tower", config.vision_lr), ("multi_modal_projector", config.projector_lr)):
                if part in name and part_lr and not is_differential:
                    scale = part_lr / config.lr
            decay = 0.0 if is_differential else config.weight_decay
            group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
            group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=(0.9, config.beta2), fused=True)


def init_or_resume_optimizer(run: Run, config: "Config", adapted: nn.Module) -> tuple[torch.optim.AdamW, dict]:
    """The optimizer and the state of the loop (step, best score, evaluations since then, seconds), new or loaded from
    the checkpoint."""
    optimizer = make_optimizer(config, adapted)
    state = {"step": 0, "best": -1.0, "stale": 0, "seconds": 0.0}
    if run.resume is None:
        return optimizer, state
    state |= read_trainer_state(run.resume)
    load_optimizer(optimizer, state.pop("optimizer"), run.resume)
    if state["step"] in run.extended_at:
        state["stale"] = 0
    return optimizer, state


def learning_rate_at(config: "Config", step: int, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up from above zero, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def count_steps(config: "Config", source: Source) -> int:
    """Number of updates of the run."""
    if not config.epochs:
        return config.max_steps
    batches = math.ceil(len(source) / config.batch_size)  # the last one of an epoch may be short
    return math.ceil(config.epochs * batches / config.accumulation)


def dropout_seed(config: "Config", step: int, process: int) -> int:
    """Seed of the dropout masks of one update on one process."""
    return config.seed * SEED_STRIDE + step * STEP_STRIDE + process


# ---- training
def train(
    run: Run,
    config: "Config",
    model: nn.Module,
    adapted: nn.Module,
    processor: Processor,
    source: Source,
    eval_sets: dict[str, Source],
):
    """Train `adapted`, peft's wrapper of `model`, on `source`; evaluate before, during and after; write the run folder.

    Raises UserError for what the user can fix, if possible before anything is written.
    """
    # ------------------------------------------------------------------
    # setup: all checks that do not run the model come before the first file is written
    # ------------------------------------------------------------------
    accelerator, world_size = run.accelerator, run.accelerator.num_processes
    total_steps = count_steps(config, source)
    lengths = text_lengths(source, processor) if config.group_by_length else None
    cache = make_vision_cache(config, model, source)
    optimizer, state = init_or_resume_optimizer(run, config, adapted)
    done = state["step"]
    if run.resume and (total_steps < done or (total_steps == done and done in run.extended_at)):
        raise UserError(
            f"{run.folder}: {done} updates are made, --max_steps and --epochs ask for {total_steps}: give more"
        )
    if config.shard:
        shard_frozen_layers(model, adapted, accelerator)
    wrapped, optimizer = accelerator.prepare(adapted, optimizer)
    print_setup(run, config, model, adapted, processor, source, total_steps)
    check_same_data(run, {"train": source, **eval_sets})
    evaluation = make_evaluation(run, config, model, processor, eval_sets)
    start_folder(run, [fault for rows in (source, *eval_sets.values()) for fault in rows.skipped])
    start_tracker(run, config, eval_sets)
    limit = prompt_limit(config, model)
    headline_set = next(iter(eval_sets.values()))
    evaluation.probe = first_rows(run, limit, processor, headline_set, PROBE_ROWS, 1, with_suffix=False)
    if state["step"] == 0 and stored_differential_folder(config) is None:  # stored parameters include the selection
        select_heads(model, first_rows(run, limit, processor, source, PROBE_ROWS, 1, with_suffix=False))

    first_step = last_saved = state["step"]  # 0, or the step of the checkpoint
    started = time.perf_counter() - state["seconds"]
    update_seconds, tokens = 0.0, 0  # since the last log line
    batches = training_batches(run, config, model, processor, source, first_step, lengths, cache)
    if config.compile:
        compile_layers(model)
    # listed once: walking through all modules takes milliseconds, in which a GPU waits
    trained, with_lora = [p for p in adapted.parameters() if p.requires_grad], lora_layers(model)
    differential = differential_modules(model).values()
    scheduled = [module for module in differential if module.config.anneal or module.config.lambda_warmup]
    with run.catch_signals(), tqdm(initial=first_step, total=total_steps, disable=not run.is_main, desc=run.arm) as bar:
        try:
            if not (evaluates_at(run, config, first_step) or run.repeats_evaluation):
                evaluate(evaluation, evaluation.short_count)  # so that a broken evaluation fails now, not hours later

            for step in range(first_step, total_steps + 1):  # step = number of updates so far
                is_stale = 0 < config.patience <= state["stale"]  # known one update after the evaluation
                last_step = step == total_steps or is_stale  # only a checkpoint and an evaluation follow
                state |= {"step": step, "seconds": time.perf_counter() - started}
                run.raise_if_stopped()

                # ------------------------------------------------------------------
                # checkpoint, then evaluate: after a kill the evaluation is repeated, and its log lines are replaced
                # ------------------------------------------------------------------
                if step > first_step and (step % config.save_every == 0 or last_step):
                    raise_if_not_finite(run, adapted, step)
                    save_checkpoint(run, config, adapted, optimizer, state)
                    last_saved = step
                if last_step:
                    load_average(adapted, state)
                    check_lambda_moved(run, model, step)
                is_repeated = step == first_step and run.repeats_evaluation
                if evaluates_at(run, config, step) or last_step or is_repeated:
                    evaluate_and_log(evaluation, adapted, state, last_step)
                if is_stale and step < total_steps:
                    run.print(f"stopped after step {step}: no better score in {config.patience} evaluations")
                if last_step:
                    break

                # ------------------------------------------------------------------
                # learning rate, lambda's schedule, micro-batches, dropout
                # ------------------------------------------------------------------
                update_started = time.perf_counter()
                if not model.training:  # an evaluation has been made
                    wrapped.train()
                lr = learning_rate_at(config, step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                for module in scheduled:
                    module.progress.fill_((step + 1) / total_steps)
                micro_batches = [next(batches) for _ in range(config.accumulation)]
                # only after the batches are fetched, since a new loader draws from the same generator
                torch.manual_seed(dropout_seed(config, step, accelerator.process_index))

                # ------------------------------------------------------------------
                # forward and backward: the loss is the mean over the label tokens of all micro-batches and processes
                # ------------------------------------------------------------------
                optimizer.zero_grad(set_to_none=True)
                # a batch without examples is a dummy for a process that has no data left: weight 0
                label_counts = [batch["plan"].label_count * bool(examples) for examples, batch in micro_batches]
                total_labels = torch.full((), float(sum(label_counts)), device=run.device)
                total_labels = accelerator.reduce(total_labels, "sum").clamp(min=1)
                loss = torch.zeros((), device=run.device)
                with out_of_memory_as(SMALLER_BATCH), cast_lora(with_lora):
                    for i, (_, batch) in enumerate(micro_batches):
                        is_last = i + 1 == config.accumulation  # gradients are averaged over the processes only then
                        with contextlib.nullcontext() if is_last else accelerator.no_sync(wrapped), run.autocast():
                            micro_loss = wrapped(**batch).loss * label_counts[i] / total_labels
                        accelerator.backward(micro_loss * world_size)  # times world_size: a sum instead of an average
                        loss += micro_loss.detach()

                # ------------------------------------------------------------------
                # clip, check, update
                # ------------------------------------------------------------------
                grad_norm = accelerator.clip_grad_norm_(trained, config.clip)
                # the only point where an update synchronises with the device
                loss, grad_norm = torch.stack((accelerator.reduce(loss, "sum"), grad_norm.to(loss))).tolist()
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    ids = ", ".join(example.id for examples, _ in micro_batches for example in examples)
                    fault = f"loss {loss}, gradient norm {grad_norm}"
                    raise TrainingFailed(f"step {step + 1}: {fault}: lower --lr, or check these rows: {ids}")
                optimizer.step()
                if step + 1 > (1 - config.average_last) * total_steps:
                    update_average(adapted, state)

                # ------------------------------------------------------------------
                # log
                # ------------------------------------------------------------------
                # an estimate, which assumes as many tokens on every process as on this one
                tokens += sum(batch["plan"].tokens for _, batch in micro_batches) * world_size
                update_seconds += time.perf_counter() - update_started
                bar.update()
                if (step + 1) % config.log_every == 0 or step + 1 == total_steps:
                    line = {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": grad_norm}
                    line |= describe_differential(config, model, grad_norm)
                    run.track(step + 1, {key: value for key, value in line.items() if key != "step"})
                    run.log(line | {"tokens_per_second": round(tokens / update_seconds)})
                    bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens / update_seconds:.0f}")
                    update_seconds, tokens = 0.0, 0
        except Stopped as stopped:
            if state["step"] > last_saved:
                raise_if_not_finite(run, adapted, state["step"])
                save_checkpoint(run, config, adapted, optimizer, state)
            run.exit_after_signal(stopped, state["step"])

    # ------------------------------------------------------------------
    # final adapter and results
    # ------------------------------------------------------------------
    save_attention(run, model, processor, eval_sets)
    seconds = time.perf_counter() - started
    save_snapshot(run, adapted, run.folder / "final", {"step": state["step"], "seconds": round(seconds, 1)})
    run.print(*format_results(run, eval_sets), f"time {seconds:.0f} s, peak memory {peak_memory(run.device)}")
    run.print(f"adapter and metrics: {run.folder}; ask it: python generate.py --model={run.folder} --image=...")
    run.finish()


def evaluates_at(run: Run, config: "Config", step: int) -> bool:
    """Whether the run is evaluated after `step` updates, besides at its end."""
    return step % config.eval_every == 0 or step in run.extended_at


def training_batches(
    run: Run,
    config: "Config",
    model: nn.Module,
    processor: Processor,
    source: Source,
    first_step: int,
    lengths: list[int] | None = None,
    cache: VisionCache | None = None,
) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """Yields (examples, batch on the device) endlessly: this process's part of every micro-batch, from `first_step` on.

    `lengths` as in `data.batch_order`; `cache` provides the image features. A batch without examples holds the tensors
    of some other row, so that this process takes part in the reductions; the caller must give it weight 0.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    order = batch_order(len(source), config.batch_size, config.seed, first_step * config.accumulation, lengths)
    shares = (keys[rank::world] for keys in order)  # some processes get nothing from a short last batch
    workers = choose_workers(config.workers, run.device)
    for examples, batch in loader(source, processor, shares, True, workers, run.skip, max_length(model)):
        more = {"plan": model.model.plan(**batch).to(run.device)}  # made before the tensors leave the CPU
        if cache is not None and "pixel_values" in batch:  # a batch of text alone has no images
            images = {name: batch.pop(name) for name in ("pixel_values", "image_sizes") if name in batch}
            with run.autocast():  # as the forward pass would compute them
                more |= {"pixel_values": None, "image_features": cache.features(**images)}
        yield examples, {key: tensor.to(run.device, non_blocking=True) for key, tensor in batch.items()} | more


def make_vision_cache(config: "Config", model: nn.Module, source: Source) -> VisionCache | None:
    """The cache that the configuration asks for, if any. Raises UserError for haystacks, whose images never repeat."""
    if not (config.vision_cache_gb or config.vision_cache_dir):
        return None
    if isinstance(source, Haystacks):
        raise UserError("--vision_cache_gb, --vision_cache_dir: every haystack has new images: train without the cache")
    return VisionCache(model, config.vision_cache_gb, config.vision_cache_dir)


def first_rows(
    run: Run, limit: int, processor: Processor, source: Source, count: int, batch_size: int, with_suffix: bool
) -> list[dict[str, Tensor]]:
    """The first `count` rows of a source as batches on the device; rows of more than `limit` tokens are left out."""
    rows = [(0, i) for i in range(min(count, len(source)))]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    loaded = loader(source, processor, batches, with_suffix, skip=run.skip, max_length=limit)
    return [{key: tensor.to(run.device) for key, tensor in batch.items()} for examples, batch in loaded if examples]


def describe_differential(config: "Config", model: nn.Module, grad_norm: float) -> dict[str, dict[str, float]]:
    """{"lambda", "differential_grad_norm"} by layer, norms before clipping; {} for standard attention."""
    gradients = {name: p.grad for name, p in differential_parameters(model).items() if p.grad is not None}
    sums = [gradient.float().square().sum() for gradient in gradients.values()]
    squares: dict[str, float] = {}
    for name, square in zip(gradients, torch.stack(sums).tolist() if sums else (), strict=True):  # one transfer
        layer = name.rpartition(".")[0]
        squares[layer] = squares.get(layer, 0.0) + square
    unclip = max(1.0, grad_norm / config.clip)  # the gradients have been clipped by now
    line = {"lambda": lambda_values(model)}
    line["differential_grad_norm"] = {layer: unclip * math.sqrt(square) for layer, square in squares.items()}
    return {key: values for key, values in line.items() if values}


def update_average(adapted: nn.Module, state: dict):
    """Update the running mean of the trained weights: state["average"], over state["averaged"] updates."""
    weights = {name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad}
    old = state.get("average") or {name: torch.zeros_like(weight) for name, weight in weights.items()}
    means = [old[name].to(weight.device) for name, weight in weights.items()]
    state["averaged"] = state.get("averaged", 0) + 1
    changes = torch._foreach_sub(list(weights.values()), means)
    torch._foreach_div_(changes, state["averaged"])
    state["average"] = dict(zip(weights, torch._foreach_add(means, changes), strict=True))


def load_average(adapted: nn.Module, state: dict):
    """Replace the trained weights by their mean over the last updates, if `state` has one."""
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, mean in state.get("average", {}).items():
            parameters[name].copy_(mean)


def raise_if_not_finite(run: Run, adapted: nn.Module, step: int):
    """Raise TrainingFailed if a trained parameter is not finite, so that it is never saved."""
    trained = {name: p.isfinite().all() for name, p in adapted.named_parameters() if p.requires_grad}
    for name, is_finite in zip(trained, torch.stack(list(trained.values())).tolist(), strict=True):
        if not is_finite:
            raise TrainingFailed(
                f"{run.folder}: {name} is not finite after step {step}: lower --lr; earlier checkpoints stay"
            )


def check_lambda_moved(run: Run, model: nn.Module, total_steps: int):
    """Print the differential parameters that training did not change.

    Raises TrainingFailed if a lambda is among them.
    """
    trained = {name: p for name, p in differential_parameters(model).items() if p.requires_grad}
    unchanged = [name for name, p in trained.items() if torch.equal(p, run.initial_differential[name].to(p.device))]
    if trained:
        run.print(f"differential parameters changed by training: {len(trained) - len(unchanged)} of {len(trained)}")
    run.print(*(f"not changed: {name}" for name in unchanged))
    lambdas = [name for name in unchanged if is_lambda(name)]
    if lambdas and total_steps > 1:  # with equal maps at the start, lambda has no gradient in the first update
        raise TrainingFailed(
            f"{run.folder}: {lambdas[0]} did not learn ({len(lambdas)} of them): "
            "raise --lr or --differential.lambda_lr, or fix lambda explicitly with --differential.lambda_kind=fixed"
        )


# ---- what is saved
def save_adapter(run: Run, adapted: nn.Module, folder: Path, state: dict):
    """Write adapter/ (peft's format, with its card), differential.safetensors and run.json to `folder`: everything but
    the base model."""
    save_lora(adapted, folder / "adapter")
    save_differential(adapted, folder)
    record = run.record | state
    write_json(folder / "run.json", record)
    evals = [line["eval"] for line in run.metrics if "eval" in line and line["step"] == state["step"]]
    model_type = adapted.get_base_model().config.model_type
    card = adapter_card(record, evals[-1] if evals else {}, differential_config(adapted), model_type)
    (folder / "adapter" / "README.md").write_text(card, encoding="utf-8")


def save_checkpoint(run: Run, config: "Config", adapted: nn.Module, optimizer: torch.optim.Optimizer, state: dict):
    """Write a checkpoint atomically; delete the oldest beyond `keep_checkpoints`."""
    if run.is_main:
        newest = run.folder / "checkpoints" / f"step-{state['step']:06d}"
        with atomic_folder(newest) as folder:
            save_adapter(run, adapted, folder, {"step": state["step"]})
            save_trainer_state(state | {"optimizer": optimizer.state_dict()}, folder / "trainer.pt")
            write_manifest(folder)
        folders = find_checkpoints(run.folder)
        for old in folders[: folders.index(newest) + 1][: -config.keep_checkpoints]:  # newer ones are damaged
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


def save_trainer_state(state: dict, path: Path):
    """Write the state of the loop. Raises UserError when the disk is full."""
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's zip writer raises this for a full disk
        reason = one_line(error)[:MESSAGE_LENGTH]
        raise UserError(
            f"{path.parent}: cannot be written ({reason}): free some space; earlier checkpoints stay"
        ) from error


def save_snapshot(run: Run, adapted: nn.Module, folder: Path, record: dict):
    """Write `final/` or `best/`, the adapter with its manifest, atomically."""
    if run.is_main:
        with atomic_folder(folder) as new:
            save_adapter(run, adapted, new, record)
            write_manifest(new)
    run.accelerator.wait_for_everyone()


def save_attention(run: Run, model: nn.Module, processor: Processor, eval_sets: dict[str, Source]):
    """Save the attention from answer tokens to image patches, for a few needles of each grid, in attention.safetensors.

    Where a second map is subtracted, also save A1 and lambda A2 [2, layers, questions, T, N] in
    signed_maps.safetensors. What does not fit in GPU memory is left out.
    """
    tensors, signed = {}, {}
    try:
        with gathered(model):
            for name, source in eval_sets.items():
                if run.is_main and source.chance and source.counts_for_best:
                    limit, count = max_length(model), SAVED_QUESTIONS
                    (batch,) = first_rows(run, limit, processor, source, count, count, with_suffix=True)
                    maps = answer_attention(model, batch, (effective_map, first_map, subtracted_map)).float().cpu()
                    tensors[name] = maps[0].contiguous()
                    if bool(maps[2].any()):
                        signed[name] = maps[1:].contiguous()
    except torch.OutOfMemoryError as error:  # explicit maps need more memory than training; final/ works without them
        reason = one_line(error)[:MESSAGE_LENGTH]
        run.print(f"the attention maps of some sets are not saved: the GPU is out of memory ({reason})")
    for file, found in (("attention.safetensors", tensors), ("signed_maps.safetensors", signed)):
        if found:
            with writing(run.folder / file):
                safetensors.torch.save_file(found, run.folder / file)


# ---- evaluation
def evaluate_and_log(evaluation: Evaluation, adapted: nn.Module, state: dict, last_step: bool):
    """Evaluate on all rows before and after training, on a few batches of each set in between; log; save best/."""
    run, config, step = evaluation.run, evaluation.config, state["step"]
    is_full = last_step or step in (0, *run.extended_at)
    scores = evaluate(evaluation, None if is_full else evaluation.short_count)
    with without_compiling(config):
        losses = evaluation_losses(evaluation)
    maps = measure_maps(evaluation.model, evaluation.probe)

    line = {"step": step, "eval": {name: [score.correct, score.n] for name, score in scores.items()}}
    line |= {"eval_loss": losses}
    if config.metric != "exact":
        line["metric"] = {name: score_answers(config.metric, score.rows) for name, score in scores.items()}
    run.log(line | ({"inside": maps} if maps else {}))
    rates = {name: score.correct / score.n for name, score in scores.items()}
    run.track(step, {"exact": rates, config.metric: line.get("metric", rates), "eval_loss": losses, "inside": maps})
    log_samples(evaluation, step, scores)
    results = [f"{name} {score.correct}/{score.n}, loss {losses[name]:.3f}" for name, score in scores.items()]
    run.print(f"step {step}: " + "; ".join(results))
    if step > 0:
        keep_best(evaluation, adapted, state, headline_rate(evaluation, scores), last_step)


def keep_best(evaluation: Evaluation, adapted: nn.Module, state: dict, score: float, last_step: bool):
    """Count the evaluations since the best one in `state`, and save best/ if this one is better.

    On equal scores the earlier one is kept, except at the last step: best/ equals final/ unless an earlier evaluation
    was better.
    """
    state["stale"] = 0 if score > state["best"] else state["stale"] + 1
    if score > state["best"] or (last_step and score == state["best"]):
        state["best"] = score
        raise_if_not_finite(evaluation.run, adapted, state["step"])
        save_snapshot(evaluation.run, adapted, evaluation.run.folder / "best", {"step": state["step"]})


# ---- what is printed
def print_setup(
    run: Run,
    config: "Config",
    model: nn.Module,
    adapted: nn.Module,
    processor: Processor,
    source: Source,
    total_steps: int,
):
    """Print trainable parameters, batch arithmetic and two decoded examples with their labels."""
    counts = trainable_counts(adapted)
    run.record["parameters"] = counts
    run.print(*(f"{name}: {trainable:,} of {total:,} parameters train" for name, (trainable, total) in counts.items()))
    update, world = config.batch_size * config.accumulation, run.accelerator.num_processes
    run.print(
        f"{update} examples per update = batch of {config.batch_size} over {world} process(es) x {config.accumulation} "
        f"accumulated; {total_steps} updates; {len(source)} examples per epoch"
    )
    if config.warmup_steps >= total_steps:
        run.print(
            f"--warmup_steps={config.warmup_steps}: as long as the run or longer ({total_steps} updates), so the "
            "learning rate only rises: lower it"
        )
    rows = [[(0, 0), (0, 1 % len(source))]]  # (epoch, row)
    ((examples, batch),) = loader(source, processor, rows, True, skip=run.skip, max_length=max_length(model))
    for i, example in enumerate(examples):
        text = processor.decode(batch["input_ids"][i])
        labels = processor.decode([t for t in batch["labels"][i].tolist() if t >= 0], skip_special_tokens=False)
        run.print(f"{example.id}: {text!r}, {int(batch['attention_mask'][i].sum())} tokens, labels {labels!r}")


def format_results(run: Run, eval_sets: dict[str, Source]) -> list[str]:
    """Exact accuracy in percent before and after, with 95 % Wilson intervals, and the baseline's if it has run."""
    evals = [line["eval"] for line in run.metrics if "eval" in line]
    columns = {"before": evals[0], "after": evals[-1]} | baseline_column(run)
    head = "".join(f"{column:>22}" for column in columns)
    lines = [f"\n{'held-out exact accuracy':28}{head}{'n':>7}{'chance':>9}"]
    for name, source in eval_sets.items():
        cells = "".join(
            f"{format_rate(rate(*scores[name])) if name in scores else '-':>22}" for scores in columns.values()
        )
        chance = "" if source.chance is None else f"{100 * source.chance:.2f}"
        lines.append(f"{name:28}{cells}{evals[-1][name][1]:>7}{chance:>9}")
    metric = [line["metric"] for line in run.metrics if "metric" in line]
    for name in metric[-1] if metric else ():
        cells = "".join(f"{100 * values[name]:>22.1f}" for values in (metric[0], metric[-1]))
        lines.append(f"{f'{name}, ' + run.record['config']['metric']:28}{cells}")
    return lines


def baseline_column(run: Run) -> dict[str, dict]:
    """The last scores of the baseline with this seed and parent folder, if it is finished and comparable."""
    folder = run.folder.parent / f"original_seed{run.record['config']['seed']}"
    if folder == run.folder or not (folder / "final").exists():
        return {}
    try:
        different = differing_fields(run.record, read_run_record(folder))
        evals = [line["eval"] for line in read_metrics(folder) if "eval" in line]
    except UserError as error:
        run.print(f"{folder}: not shown beside this run ({error})")
        return {}
    if different or not evals:
        run.print(f"{folder}: not shown beside this run, which differs in {', '.join(different) or 'its evaluations'}")
        return {}
    return {"original, after": evals[-1]}
