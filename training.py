"""One training loop for both arms, on Accelerate: the arms differ in the model they hand in and in nothing else.

The state of a run is its adapter, what differential attention added, its optimizer, the number of the step and the
best score so far; learning rate, lambda's warm-up, data order and dropout follow from the step and the seed, so a run
that was cut off continues as if nothing had happened.
"""

import contextlib
import json
import math
import resource
import shutil
import time
from pathlib import Path

import safetensors.torch
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from adapters import (
    attach_adapter,
    gathered,
    load_differential,
    new_lora,
    save_differential,
    save_lora,
    shard_frozen_layers,
    stored_differential,
    trainable_counts,
)
from checkpoint import resolve_run
from data import Haystacks, batch_order, loader, text_lengths
from diagnostics import answer_attention, lambda_values, measure_maps, select_heads
from differential_attention import (
    differential_config,
    differential_parameters,
    set_progress,
    unfreeze_differential,
)
from errors import UserError
from files import atomic_folder, read_json, write_json, write_manifest, writing
from needle_eval.questions import is_exact
from needle_eval.statistics import wilson
from run_folder import WATCHING, Run, Stopped, check_same_data, read_trainer_state, start_folder, start_tracker, step_of
from vision_cache import VisionCache


# ---- the model
def add_lora(run: Run, config, model):
    """Freeze `model`, put LoRA into its language model, and unfreeze what differential attention added to it.

    On a resumed run, or where `config.model` is a run folder, with the weights that were learned. Returns peft's
    wrapper; `model` itself is changed in place.
    """
    model.requires_grad_(False)
    _, learned = resolve_run(config.model)
    folder = run.resume / "adapter" if run.resume else learned
    adapted = new_lora(config, model) if folder is None else attach_adapter(model, folder, trainable=True)
    if learned and stored_differential(learned.parent):
        load_differential(model, learned.parent)
    run.start = {name: p.detach().clone() for name, p in differential_parameters(model).items()}
    if run.resume and run.start:
        load_differential(model, run.resume)
    unfreeze_differential(model)
    lora = adapted.peft_config["default"]  # what acts: a run folder brings its own
    run.record["lora"] = {"rank": lora.r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout}
    return adapted


def make_optimizer(config, adapted) -> torch.optim.AdamW:
    """AdamW; what differential attention added takes no weight decay, which would move it without a gradient."""
    differential = differential_config(adapted)
    groups: dict[tuple, dict] = {}
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            added = ".differential." in name
            scale = differential.lambda_lr if added and "lambda" in name.rpartition(".")[2] else 1.0
            decay = 0.0 if added else config.weight_decay
            group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
            group["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, betas=(0.9, config.beta2), fused=True)


def save_adapter(adapted, folder: Path, record: dict):
    """`folder`/adapter in peft's format, differential.safetensors, run.json: all that it takes beside the base."""
    save_lora(adapted, folder / "adapter")
    save_differential(adapted, folder)
    write_json(folder / "run.json", record)


# ---- the loop
def learning_rate(config, step: int, steps: int) -> float:
    """Linear warm-up, never zero, then a cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def total_steps(config, source) -> int:
    if not config.epochs:
        return config.max_steps
    batches = math.ceil(len(source) / config.batch_size)  # the last one of an epoch may be short
    return math.ceil(config.epochs * batches / config.accumulation)


def train(run: Run, config, model, adapted, processor, source, eval_sets):
    """Train `adapted` on `source`; evaluate before, during and after; leave a run folder.

    A checkpoint is written before the evaluation at its step: whatever follows it happens again after a kill, once.
    """
    # --- what can be refused is refused before anything is written
    steps = total_steps(config, source)
    lengths = text_lengths(source, processor) if config.group_by_length else None
    cache = kept_features(config, model, source)
    optimizer, state = take_up(run, config, adapted)
    if config.shard:
        shard_frozen_layers(model, adapted, run.accelerator)
    wrapped, optimizer = run.accelerator.prepare(adapted, optimizer)
    describe(run, config, adapted, processor, source, steps)
    check_same_data(run, {"train": source, **eval_sets})
    start_folder(run, [fault for rows in (source, *eval_sets.values()) for fault in rows.skipped])
    start_tracker(run, config)
    probe = fixed_batch(run, processor, next(iter(eval_sets.values())))
    if state["step"] == 0 and not resolve_run(config.model)[1]:  # a run folder brings the heads that it selected
        select_heads(model, fixed_batch(run, processor, source))

    # --- step by step; `state["step"]` updates have been made
    first = saved = state["step"]
    began, busy, tokens = time.perf_counter() - state["seconds"], 0.0, 0
    batches = training_batches(run, config, processor, source, first, lengths, cache)
    with run.noting_signals(), tqdm(initial=first, total=steps, disable=not run.is_main, desc=run.record["arm"]) as bar:
        try:
            evaluate(run, config, model, processor, eval_sets, 2 * config.eval_batch_size)  # a broken one fails now
            for step in range(first, steps + 1):
                state |= {"step": step, "seconds": time.perf_counter() - began}
                run.heed()
                if step > first and (step % config.save_every == 0 or step == steps):
                    save_checkpoint(run, config, adapted, optimizer, state)
                    saved = step
                if step == steps:
                    check_moved(run, model, steps)
                if step % config.eval_every == 0 or step == steps:
                    look(run, config, model, adapted, processor, eval_sets, probe, state, steps)
                if step == steps:
                    break
                started = time.perf_counter()
                line, seen = update(run, config, model, wrapped, optimizer, batches, step, steps)
                busy, tokens = busy + time.perf_counter() - started, tokens + seen
                bar.update()
                if line["step"] % config.log_every == 0 or line["step"] == steps:
                    log_step(run, config, model, line, tokens / busy, bar)
                    busy, tokens = 0.0, 0
        except Stopped as stopped:
            if state["step"] > saved:
                save_checkpoint(run, config, adapted, optimizer, state)
            run.leave(stopped, state["step"])

    # --- what is left behind
    save_attention(run, model, processor, eval_sets)
    keep(run, adapted, run.folder / "final", {"step": steps, "seconds": round(time.perf_counter() - began, 1)})
    run.say(*table(run, eval_sets), f"time {time.perf_counter() - began:.0f} s, peak memory {peak_memory(run.device)}")
    run.say(f"adapter and metrics: {run.folder}; ask it: python generate.py --model={run.folder / 'final'} --image=...")
    run.finish()


def kept_features(config, model, source) -> VisionCache | None:
    """The cache that the configuration asks for. Raises UserError where no picture comes a second time."""
    if not (config.vision_cache_gb or config.vision_cache_dir):
        return None
    if isinstance(source, Haystacks):
        raise UserError("--vision_cache_gb: haystacks are made anew, none of their pictures comes again: give 0")
    return VisionCache(model, config.vision_cache_gb, config.vision_cache_dir)


def take_up(run: Run, config, adapted) -> tuple[torch.optim.Optimizer, dict]:
    """The optimizer, and the state of the loop: as the checkpoint has them, or new."""
    optimizer = make_optimizer(config, adapted)
    if run.resume is None:
        return optimizer, {"step": 0, "best": -1.0, "seconds": 0.0}
    state = read_trainer_state(run.resume)
    optimizer.load_state_dict(state.pop("optimizer"))
    return optimizer, state


def update(run: Run, config, model, wrapped, optimizer, batches, step: int, steps: int) -> tuple[dict, int]:
    """The update after `step` others: its line of the log, and how many tokens all processes saw."""
    wrapped.train()
    lr = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    set_progress(model, (step + 1) / steps)
    micro = [next(batches) for _ in range(config.accumulation)]
    # dropout's masks follow from seed and step; after the fetch, since a new loader draws from the same generator
    torch.manual_seed(config.seed * 1_000_003 + step * 1_009 + run.accelerator.process_index)
    loss, norm = train_step(run, config, wrapped, optimizer, micro, step)
    seen = sum(int(batch["attention_mask"].sum()) for _, batch in micro) * run.accelerator.num_processes
    return {"step": step + 1, "loss": loss, "lr": lr, "grad_norm": norm}, seen


def log_step(run: Run, config, model, line: dict, speed: float, bar: tqdm):
    """The line of an update, `speed` in tokens per second, into metrics.jsonl, the tracker and the bar."""
    line = line | differential_line(config, model, line["grad_norm"])
    run.track(line["step"], line)
    run.log(line | {"tokens_per_second": round(speed)})
    bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{speed:.0f}")


def look(run: Run, config, model, adapted, processor, eval_sets: dict, probe: dict, state: dict, steps: int):
    """Evaluate and log: all rows before and after training, two batches of each set in between; best/ is kept."""
    step = state["step"]
    limit = None if step in (0, steps) else 2 * config.eval_batch_size
    scores = evaluate(run, config, model, processor, eval_sets, limit)
    log_scores(run, step, scores, measure_maps(model, probe))
    found = headline_rate(scores, eval_sets, config)
    if step > 0 and (found > state["best"] or (step == steps and found == state["best"])):
        state["best"] = found
        keep(run, adapted, run.folder / "best", {"step": step})


def fixed_batch(run: Run, processor, source) -> dict:
    """The first eight prompts of an evaluation set: what the branches' diagnostics are taken on, always."""
    rows = [[(0, i) for i in range(min(8, len(source)))]]
    ((_, batch),) = loader(source, processor, rows, with_suffix=False, skip=run.skip)
    return {key: tensor.to(run.device) for key, tensor in batch.items()}


def save_attention(run: Run, model, processor, eval_sets: dict):
    """What answers pay to picture patches, for three needles of each size of grid, into attention.safetensors."""
    tensors = {}
    with gathered(model):
        for name, source in eval_sets.items():
            if run.is_main and getattr(source, "chance", None) and "unseen" not in name:
                rows = [[(0, i) for i in range(min(3, len(source)))]]
                ((_, batch),) = loader(source, processor, rows, with_suffix=True, skip=run.skip)
                batch = {key: tensor.to(run.device) for key, tensor in batch.items()}
                tensors[name] = answer_attention(model, batch).float().cpu().contiguous()
    if tensors:
        with writing(run.folder / "attention.safetensors"):
            safetensors.torch.save_file(tensors, run.folder / "attention.safetensors")


def differential_line(config, model, norm: float) -> dict:
    """Per layer lambda, and the gradient norm, before clipping, of what was added; {} for standard attention."""
    grads = {}
    for name, p in differential_parameters(model).items():
        if p.grad is not None:
            layer = name.rpartition(".")[0]
            grads[layer] = grads.get(layer, 0.0) + p.grad.float().square().sum().item()
    unclipped = max(1.0, norm / config.clip)  # the gradients have been clipped by now
    line = {"lambda": lambda_values(model)}
    line["differential_grad_norm"] = {layer: unclipped * math.sqrt(square) for layer, square in grads.items()}
    return {key: values for key, values in line.items() if values}


def check_moved(run: Run, model, steps: int):
    """Name the differential parameters that training left as they were. Raises UserError if a lambda is among them."""
    trained = {name: p for name, p in differential_parameters(model).items() if p.requires_grad}
    still = [name for name, p in trained.items() if torch.equal(p, run.start[name].to(p.device))]
    if trained:
        run.say(f"differential parameters that training moved: {len(trained) - len(still)} of {len(trained)}")
    if still:
        run.say(*(f"not moved: {name}" for name in still))
    frozen = [name for name in still if "lambda" in name]
    if frozen and steps > 1:  # before the second update nothing reaches the lambda of an exact start
        raise UserError(
            f"{run.folder}: {frozen[0]} did not learn ({len(frozen)} of them): raise --lr, or fix lambda openly"
        )


def training_batches(
    run: Run, config, processor, source, first: int, lengths: list[int] | None = None, cache: VisionCache | None = None
):
    """Endless (examples, batch on the device): this process's share of every micro-batch, from step `first` on.

    `lengths` as `batch_order` takes them; `cache` gives features in the place of pictures. Without examples the batch
    is a stand-in, so that this process takes part in the sums: it must weigh nothing.
    """
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    order = batch_order(len(source), config.batch_size, config.seed, first * config.accumulation, lengths)
    shares = (keys[rank::world] for keys in order)  # of a short last batch some get none: a stand-in then
    for examples, batch in loader(source, processor, shares, True, workers(config, run), run.skip):
        kept = {}
        if cache is not None:  # features stand in for pictures
            with run.autocast():  # as the forward pass would compute them
                kept = {"pixel_values": None, "image_features": cache.features(batch.pop("pixel_values"))}
        yield examples, {key: tensor.to(run.device, non_blocking=True) for key, tensor in batch.items()} | kept


def workers(config, run: Run) -> int:
    return config.workers if config.workers >= 0 else 4 * (run.device.type == "cuda")


def train_step(run: Run, config, wrapped, optimizer, micro: list, step: int) -> tuple[float, float]:
    """One update over micro-batches and processes; the loss is the mean over all their label tokens, and so its
    gradient.

    Returns that loss and the gradient norm before clipping. Raises UserError when either is not finite.
    """
    world = run.accelerator.num_processes
    counts = [(batch["labels"] != -100).sum() * bool(examples) for examples, batch in micro]
    total = run.accelerator.reduce(sum(counts).float(), "sum").clamp(min=1)
    optimizer.zero_grad(set_to_none=True)
    summed = torch.zeros((), device=run.device)
    for i, (_, batch) in enumerate(micro):
        last = i + 1 == len(micro)
        with contextlib.nullcontext() if last else run.accelerator.no_sync(wrapped), run.autocast():
            loss = wrapped(**batch).loss * counts[i] / total
        run.accelerator.backward(loss * world)  # gradients are averaged over processes, this is a sum
        summed += loss.detach()
    norm = run.accelerator.clip_grad_norm_(wrapped.parameters(), config.clip)
    loss, norm = run.accelerator.reduce(summed, "sum").item(), float(norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = ", ".join(example.id for examples, _ in micro for example in examples)
        raise UserError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr or look at these rows: {ids}")
    optimizer.step()
    return loss, norm


def save_checkpoint(run: Run, config, adapted, optimizer, state: dict):
    """A whole checkpoint or none; the oldest beyond `keep_checkpoints` go."""
    if run.is_main:
        newest = run.folder / "checkpoints" / f"step-{state['step']:06d}"
        with atomic_folder(newest) as folder:
            save_adapter(adapted, folder, run.record | {"step": state["step"]})
            save_state(state | {"optimizer": optimizer.state_dict()}, folder / "trainer.pt")
            write_manifest(folder)
        folders = sorted((run.folder / "checkpoints").glob("step-*"), key=step_of)
        for old in folders[: folders.index(newest) + 1][: -config.keep_checkpoints]:  # a later one is damaged
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


def save_state(state: dict, path: Path):
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's zip writer tells of a full disk in its own way
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path.parent}: cannot be written ({reason}): free some space; earlier checkpoints stay"
        ) from error


def keep(run: Run, adapted, folder: Path, more: dict):
    if run.is_main:
        with atomic_folder(folder) as new:
            save_adapter(adapted, new, run.record | more)
    run.accelerator.wait_for_everyone()


# ---- evaluation
def evaluate(run: Run, config, model, processor, eval_sets: dict, limit: int | None = None) -> dict[str, dict]:
    """Exact answers of each set, the first `limit` rows of each or all: {name: {right, n, answers}}.

    Generation is greedy and scored by MMNeedle's strict rule. A row that cannot be used is named and not counted.
    Raises Stopped.
    """
    model.eval()
    scores = {}
    for name, source in eval_sets.items():
        answers = answer_rows(run, config, model, processor, source, range(len(source))[:limit])
        if not answers:
            raise UserError(f"{name}: none of its rows can be used: look at its pictures")
        right = sum(is_exact(text, suffix) for _, _, suffix, text in answers)
        scores[name] = {"right": right, "n": len(answers), "answers": answers}
    return scores


def answer_rows(run: Run, config, model, processor, source, rows: range) -> list[list[str]]:
    """[id, prompt, answer, response] of every row, each answered by one of the processes, in the order of the rows."""
    rows, size = rows[run.accelerator.process_index :: run.accelerator.num_processes], config.eval_batch_size
    batches = [[(0, i) for i in rows[start : start + size]] for start in range(0, len(rows), size)]
    answers = []
    with gathered(model), run.autocast():
        for examples, batch in loader(source, processor, batches, False, workers(config, run), run.skip):
            if run.signal:
                break
            if not examples:
                continue
            batch = {key: tensor.to(run.device) for key, tensor in batch.items()}
            ids = model.generate(**batch, max_new_tokens=config.max_new_tokens)
            told = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :])
            answers += [(e.index, e.id, e.prefix, e.suffix, text) for e, text in zip(examples, told, strict=True)]
    run.heed()
    return [answer for _, *answer in sorted(gather_object(answers))]


def headline_rate(scores: dict[str, dict], eval_sets: dict, config) -> float:
    """What `best/` is chosen by: exact answers on the first two batches of the sets where there is something to find.

    The same rows at every evaluation. They are rows of the test sets, so report `final/`, not `best/`, as a result.
    """
    found = total = 0
    for name, score in scores.items():
        if getattr(eval_sets[name], "negatives", 0) < 1 and "unseen" not in name:
            answers = score["answers"][: 2 * config.eval_batch_size]
            found += sum(is_exact(text, suffix) for _, _, suffix, text in answers)
            total += len(answers)
    return found / total


def log_scores(run: Run, step: int, scores: dict[str, dict], inside: dict):
    """Accuracies and diagnostics into metrics.jsonl and the tracker, two answers of each set into samples.jsonl."""
    line = {"step": step, "eval": {name: [s["right"], s["n"]] for name, s in scores.items()}}
    run.log(line | ({"inside": inside} if inside else {}))
    run.track(step, {"exact": {name: s["right"] / s["n"] for name, s in scores.items()}, "inside": inside})
    for name, score in scores.items():
        for example, prompt, answer, response in score["answers"][:2]:
            line = {"step": step, "set": name, "id": example, "prompt": prompt, "answer": answer, "response": response}
            run.log(line, "samples.jsonl")
    run.say(f"step {step}: " + ", ".join(f"{n} {s['right']}/{s['n']}" for n, s in scores.items()))


def print_scores(run: Run, scores: dict[str, dict]):
    run.say(*(f"{name:28}{rate(s['right'], s['n']):>22}  n = {s['n']}" for name, s in scores.items()))


def table(run: Run, eval_sets: dict) -> list[str]:
    """Exact accuracy before and after, percent with 95 % Wilson intervals; beside it the baseline's, if it has run."""
    evals = [line["eval"] for line in run.metrics if "eval" in line]
    columns = {"untuned": evals[0], "fine-tuned": evals[-1]}
    if run.record["arm"] != "original":
        columns |= baseline_column(run)
    head = "".join(f"{column:>22}" for column in columns)
    lines = [f"\n{'held-out exact accuracy':28}{head}{'n':>7}{'chance':>9}"]
    for name, source in eval_sets.items():
        cells = "".join(f"{rate(*scores[name]) if name in scores else '-':>22}" for scores in columns.values())
        chance = getattr(source, "chance", None)
        told = "" if chance is None else f"{100 * chance:.2f}"
        lines.append(f"{name:28}{cells}{evals[-1][name][1]:>7}{told:>9}")
    return lines


def baseline_column(run: Run) -> dict[str, dict]:
    """The last scores of the baseline of this seed beside this run, if it is finished and was run alike."""
    folder = run.folder.parent / f"original_seed{run.record['config']['seed']}"
    if not (folder / "final").exists():
        return {}
    try:
        theirs = read_json(folder / "run.json")["config"]
        evals = [json.loads(line).get("eval") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (UserError, OSError, ValueError, KeyError) as error:
        run.say(f"{folder}: not shown beside ({error})")
        return {}
    ours = run.record["config"]
    unlike = [k for k in ours if k not in {"differential", *WATCHING} and ours[k] != theirs.get(k)]
    if unlike:
        run.say(f"{folder}: not shown beside, not run alike: {', '.join(unlike)}")
        return {}
    return {"original, fine-tuned": [scores for scores in evals if scores][-1]}


def rate(right: int, n: int) -> str:
    low, high = wilson(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---- what is printed
def describe(run: Run, config, adapted, processor, source, steps: int):
    """Trainable counts, batch arithmetic and one decoded batch with its labels, before anything is trained."""
    counts = trainable_counts(adapted)
    run.record["parameters"] = counts
    run.say(*(f"{name}: {t:,} of {n:,} parameters train" for name, (t, n) in counts.items()))
    update, world = config.batch_size * config.accumulation, run.accelerator.num_processes
    run.say(
        f"{update} examples an update = {config.batch_size} among {world} process(es) x {config.accumulation} "
        f"accumulated; {steps} updates of {len(source)} examples an epoch"
    )
    rows = [[(0, 0), (0, 1 % len(source))]]
    ((examples, batch),) = loader(source, processor, rows, with_suffix=True, skip=run.skip)
    for i, example in enumerate(examples):
        text = processor.decode(batch["input_ids"][i])
        learned = processor.decode([t for t in batch["labels"][i].tolist() if t >= 0], skip_special_tokens=False)
        run.say(f"{example.id}: {text!r}, {int(batch['attention_mask'][i].sum())} tokens, labels {learned!r}")


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the card"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"  # told in KiB
