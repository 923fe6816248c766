"""One training loop for both arms, on Accelerate: the arms differ in the model they hand in and in nothing else.

A run lives in its folder: run.json, metrics.jsonl, samples.jsonl, checkpoints/step-*/, best/, final/, plots/. The state
of a run is its adapter, its optimizer and the number of the step; learning rate, data order and dropout follow from the
step and the seed, so a run that was cut off continues as if nothing had happened.
"""

import contextlib
import json
import math
import platform
import resource
import shutil
import subprocess
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import accelerate
import torch
from accelerate.utils import gather_object
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import attach_adapter, read_json, resolve_run, whole_or_nothing, write_json
from data import batch_order, loader
from errors import UserError
from haystack import is_exact, wilson

ROOT = Path(__file__).resolve().parent
# a run may continue with these changed: they say how it is watched, not what it computes
WATCHING = {
    "output_dir",
    "overwrite",
    "eval_only",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "workers",
}


@dataclass
class Run:
    """Where a run writes, what it computes on, and what its run.json says."""

    folder: Path
    accelerator: accelerate.Accelerator
    dtype: torch.dtype  # of the frozen base and of autocast
    record: dict
    resume: Path | None = None  # newest whole checkpoint
    metrics: list[dict] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, *lines: str):
        if self.is_main:
            tqdm.write("\n".join(lines))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def log(self, line: dict, file: str = "metrics.jsonl"):
        if self.is_main:
            with open(self.folder / file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if file == "metrics.jsonl":
            self.metrics.append(line)


# ---- the run folder
def open_run(config, arm: str) -> Run | None:
    """Look at the run folder and the device, write nothing yet; None if the run is finished already.

    An unfinished run of the same configuration continues from its newest whole checkpoint, `overwrite` starts anew.
    Raises UserError when the folder holds a run of another configuration.
    """
    accelerator = accelerate.Accelerator()
    dtype, why = choose_dtype(config.dtype, accelerator.device)
    record = {
        "arm": arm,
        "base_model": portable_path(resolve_run(config.model)[0]),
        "config": json.loads(json.dumps(asdict(config))),
        "device": device_name(accelerator.device),
        "dtype": str(dtype),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }
    run = Run(Path(config.output_dir or f"runs/{arm}_seed{config.seed}"), accelerator, dtype, record)
    if not config.eval_only and not config.overwrite:
        run.resume, finished = newest_checkpoint(run), (run.folder / "final").exists()
        if run.resume or finished:
            check_same_config(run)
        if finished:
            run.say(f"{run.folder} is finished: use {run.folder / 'final'}, or start anew with --overwrite=True")
            return None
    run.say(f"arm: {arm}", *(f"  {key}: {value}" for key, value in record["config"].items()))
    run.say(f"device: {record['device']}, {accelerator.num_processes} process(es), {dtype} because {why}")
    return run


def start_folder(run: Run, steps: int):
    """Make the run folder or take up an interrupted one; called when all that can be refused has been read."""
    if run.is_main:
        if run.resume is None and run.folder.exists():
            if any(run.folder.iterdir()) and not (run.folder / "run.json").exists():
                raise UserError(f"{run.folder} holds files that are no run: give another --output_dir")
            shutil.rmtree(run.folder)
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be made ({error.strerror}): give another --output_dir") from error
        trim_logs(run.folder, step_of(run.resume), steps)
        write_json(run.folder / "run.json", run.record)
    run.accelerator.wait_for_everyone()


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the card has it, else float32; never float16, in which Gemma overflows."""
    if wanted != "auto":
        return getattr(torch, wanted), "the configuration says so"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card computes in bfloat16"
    return torch.float32, f"{device.type} is not known to be fast and safe in bfloat16"


def check_same_config(run: Run):
    stored = read_json(run.folder / "run.json")
    old, new = stored.get("config", {}), run.record["config"]
    changed = [k for k in {**old, **new} if k not in WATCHING and old.get(k) != new.get(k)]
    changed += [k for k in ("arm", "base_model", "processes", "dtype") if stored.get(k) != run.record[k]]
    if changed:
        told = {**{k: stored.get(k) for k in run.record}, **old}, {**run.record, **new}
        differences = ", ".join(f"{k} {told[0].get(k)} -> {told[1].get(k)}" for k in changed)
        raise UserError(
            f"{run.folder} holds a run of another configuration ({differences}): give another --output_dir, "
            "or start anew with --overwrite=True"
        )


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def newest_checkpoint(run: Run) -> Path | None:
    """The last checkpoint that reads; a damaged one is named and passed over for the one before."""
    for folder in sorted((run.folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            read_trainer_state(folder)
            return folder
        except UserError as error:
            run.say(f"skipped: {error}")
    return None


def read_trainer_state(checkpoint: Path) -> dict:
    try:
        return torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged zip or pickle raises anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint / 'trainer.pt'}: damaged or missing ({reason}): delete {checkpoint}") from error


def trim_logs(folder: Path, first: int, steps: int):
    """Drop what was logged after the checkpoint of step `first`: it happens again, the final evaluation too."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if _stays(line, first, steps))
            (folder / f"{name}.tmp").write_text(kept, encoding="utf-8")
            (folder / f"{name}.tmp").replace(folder / name)


def _stays(line: str, first: int, steps: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # the process died in the middle of the line
        return False
    return entry["step"] <= first and not (entry["step"] == steps and "loss" not in entry)


def portable_path(base: str) -> str:
    """A folder inside the repository is noted relative to it, so that a run folder can be moved with it."""
    path = Path(base).resolve()
    if not Path(base).is_dir():
        return str(base)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)} | {
        "python": platform.python_version()
    }


def git_commit() -> str | None:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return git.stdout.strip() or None


# ---- the model
def add_lora(run: Run, config, model):
    """Freeze `model` and put LoRA into its language model; on a resumed run, or where `config.model` is a run folder,
    with the weights that were learned. Returns peft's wrapper; `model` itself is changed in place.
    """
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    _, learned = resolve_run(config.model)
    if run.resume is not None:
        return attach_adapter(model, run.resume / "adapter", trainable=True)
    if learned is not None:
        return attach_adapter(model, learned, trainable=True)
    torch.manual_seed(config.seed)
    targets = "|".join(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # anchored: bare names would put adapters into the vision tower too
        target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({targets})",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora_targets {config.lora_targets} do not fit the language model: {reason}") from error


def trainable_counts(model) -> dict[str, list[int]]:
    """Parameters by tower: [trainable, all]."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        tower = next((t for t in ("vision_tower", "multi_modal_projector", "language_model") if t in name), "lm_head")
        entry = counts.setdefault(f"{tower} lora" if "lora_" in name else tower, [0, 0])
        entry[0] += p.numel() * p.requires_grad
        entry[1] += p.numel()
    return counts


def save_adapter(adapted, folder: Path, record: dict):
    """`folder`/adapter in peft's format and run.json: with the base model, all that it takes to load the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft wonders about a base without a hub entry
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
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
    return math.ceil(config.epochs * len(source) / (config.batch_size * config.accumulation))


def train(run: Run, config, model, adapted, processor, source, eval_sets):
    """Train `adapted` on `source`; evaluate before, during and after; leave a run folder."""
    steps, first = total_steps(config, source), step_of(run.resume)
    world = run.accelerator.num_processes
    if config.batch_size % world:
        raise UserError(f"batch_size {config.batch_size} does not divide among {world} processes")
    start_folder(run, steps)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
    )
    best, seconds = -1.0, 0.0
    if run.resume is not None:
        state = read_trainer_state(run.resume)
        optimizer.load_state_dict(state["optimizer"])
        best, seconds = state["best"], state["seconds"]
        run.metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        run.say(f"continues from {run.resume}")
    wrapped, optimizer = run.accelerator.prepare(adapted, optimizer)

    describe(run, config, adapted, processor, source, steps)
    evaluate(run, config, model, processor, eval_sets, limit=2 * config.eval_batch_size)  # a broken one fails now
    if first == 0:
        log_scores(run, 0, evaluate(run, config, model, processor, eval_sets))

    batches = training_batches(run, config, processor, source, first)
    writer = SummaryWriter(run.folder / "tensorboard", purge_step=first + 1) if run.is_main else None
    began, tokens = time.perf_counter() - seconds, 0
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=not run.is_main, desc=run.record["arm"])
    mark = time.perf_counter()
    for step in bar:
        adapted.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        micro = [next(batches) for _ in range(config.accumulation)]
        # dropout's masks follow from seed and step; after the fetch, since a new loader draws from the same generator
        torch.manual_seed(config.seed * 1_000_003 + step * 1_009 + run.accelerator.process_index)
        loss, norm = train_step(run, config, wrapped, optimizer, micro, step)
        tokens += sum(int(batch["attention_mask"].sum()) for _, batch in micro) * world
        done = step + 1

        if done % config.log_every == 0 or done == steps:
            speed = tokens / (time.perf_counter() - mark)
            mark, tokens = time.perf_counter(), 0
            line = {"step": done, "loss": loss, "lr": learning_rate(config, step, steps), "grad_norm": norm}
            run.log(line | {"tokens_per_second": round(speed)})
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{speed:.0f}")
            for key in ("loss", "lr", "grad_norm"):
                if writer:
                    writer.add_scalar(key, line[key], done)
        if done % config.eval_every == 0 and done < steps:
            scores = evaluate(run, config, model, processor, eval_sets, limit=2 * config.eval_batch_size)
            log_scores(run, done, scores, writer)
            if mean_rate(scores) > best:
                best = mean_rate(scores)
                keep(run, adapted, run.folder / "best", {"step": done})
            mark, tokens = time.perf_counter(), 0
        if done % config.save_every == 0 or done == steps:
            state = {"optimizer": optimizer.state_dict(), "best": best, "seconds": time.perf_counter() - began}
            save_checkpoint(run, config, adapted, state, done)

    scores = evaluate(run, config, model, processor, eval_sets)
    log_scores(run, steps, scores, writer)
    if mean_rate(scores) >= best:
        keep(run, adapted, run.folder / "best", {"step": steps})
    keep(run, adapted, run.folder / "final", {"step": steps, "seconds": round(time.perf_counter() - began, 1)})
    if writer:
        writer.close()
    run.say(*table(run, eval_sets), f"time {time.perf_counter() - began:.0f} s, peak memory {peak_memory(run.device)}")
    run.say(f"adapter and metrics: {run.folder}; ask it: python generate.py --model={run.folder / 'final'} --image=...")
    run.accelerator.end_training()


def training_batches(run: Run, config, processor, source, first: int):
    """Endless (examples, batch on the device): this process's share of every micro-batch, from step `first` on."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    order = batch_order(len(source), config.batch_size, config.seed, start=first * config.accumulation)
    shares = (keys[rank::world] or keys[:1] for keys in order)
    for examples, batch in loader(source, processor, shares, with_suffix=True, workers=workers(config, run)):
        yield examples, {key: tensor.to(run.device, non_blocking=True) for key, tensor in batch.items()}


def workers(config, run: Run) -> int:
    return config.workers if config.workers >= 0 else 4 * (run.device.type == "cuda")


def train_step(run: Run, config, wrapped, optimizer, micro: list, step: int) -> tuple[float, float]:
    """One update over micro-batches and processes; the loss is the mean over all their label tokens, and so its
    gradient.

    Returns that loss and the gradient norm before clipping. Raises UserError when either is not finite.
    """
    world = run.accelerator.num_processes
    counts = [(batch["labels"] != -100).sum() for _, batch in micro]
    total = run.accelerator.reduce(sum(counts).float(), "sum")
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


def save_checkpoint(run: Run, config, adapted, state: dict, step: int):
    """A whole checkpoint or none; the oldest beyond `keep_checkpoints` go."""
    if run.is_main:
        with whole_or_nothing(run.folder / "checkpoints" / f"step-{step:06d}") as folder:
            save_adapter(adapted, folder, run.record | {"step": step})
            torch.save(state, folder / "trainer.pt")
        for old in sorted((run.folder / "checkpoints").glob("step-*"))[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    run.accelerator.wait_for_everyone()


def keep(run: Run, adapted, folder: Path, more: dict):
    if run.is_main:
        with whole_or_nothing(folder) as new:
            save_adapter(adapted, new, run.record | more)
    run.accelerator.wait_for_everyone()


# ---- evaluation
def evaluate(run: Run, config, model, processor, eval_sets: dict, limit: int | None = None) -> dict[str, dict]:
    """Exact answers of each set, the first `limit` rows of each or all: {name: {right, n, answers}}.

    Generation is greedy and scored by MMNeedle's strict rule; rows are shared among processes, each answered once.
    """
    model.eval()
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    scores = {}
    for name, source in eval_sets.items():
        rows = range(len(source))[:limit][rank::world]
        batches = [
            [(0, i) for i in rows[b : b + config.eval_batch_size]] for b in range(0, len(rows), config.eval_batch_size)
        ]
        answers = []
        for examples, batch in loader(source, processor, batches, with_suffix=False, workers=workers(config, run)):
            batch = {key: tensor.to(run.device) for key, tensor in batch.items()}
            with run.autocast():
                ids = model.generate(**batch, max_new_tokens=config.max_new_tokens)
            told = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :])
            answers += [(e.id, e.prefix, e.suffix, text) for e, text in zip(examples, told, strict=True)]
        answers = gather_object(answers)
        right = sum(is_exact(text, suffix) for _, _, suffix, text in answers)
        scores[name] = {"right": right, "n": len(answers), "answers": answers}
    return scores


def mean_rate(scores: dict[str, dict]) -> float:
    return sum(s["right"] / s["n"] for s in scores.values()) / len(scores)


def log_scores(run: Run, step: int, scores: dict[str, dict], writer: SummaryWriter | None = None):
    """Accuracies into metrics.jsonl and TensorBoard, the first two answers of each set into samples.jsonl."""
    run.log({"step": step, "eval": {name: [s["right"], s["n"]] for name, s in scores.items()}})
    for name, score in scores.items():
        if writer:
            writer.add_scalar(f"exact/{name}", score["right"] / score["n"], step)
        for example, prompt, answer, response in score["answers"][:2]:
            line = {"step": step, "set": name, "id": example, "prompt": prompt, "answer": answer, "response": response}
            run.log(line, "samples.jsonl")
    run.say(f"step {step}: " + ", ".join(f"{n} {s['right']}/{s['n']}" for n, s in scores.items()))


def print_scores(run: Run, scores: dict[str, dict]):
    for name, s in scores.items():
        low, high = wilson(s["right"], s["n"])
        run.say(f"{name:28}{100 * s['right'] / s['n']:6.1f} [{100 * low:.1f}, {100 * high:.1f}]  n = {s['n']}")


def table(run: Run, eval_sets: dict) -> list[str]:
    """Exact accuracy before and after, in percent with 95 % Wilson intervals."""
    evals = [line["eval"] for line in run.metrics if "eval" in line]
    lines = [f"\n{'held-out exact accuracy':28}{'untuned':>22}{'fine-tuned':>22}{'n':>7}{'chance':>9}"]
    for name, source in eval_sets.items():
        cells = []
        for right, n in (evals[0][name], evals[-1][name]):
            low, high = wilson(right, n)
            cells.append(f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        chance = getattr(source, "chance", None)
        told = "" if chance is None else f"{100 * chance:.2f}"
        lines.append(f"{name:28}{cells[0]:>22}{cells[1]:>22}{evals[-1][name][1]:>7}{told:>9}")
    return lines


# ---- what is printed
def describe(run: Run, config, adapted, processor, source, steps: int):
    """Trainable counts, batch arithmetic and one decoded batch with its labels, before anything is trained."""
    counts = trainable_counts(adapted)
    run.record["parameters"] = counts
    run.say(*(f"{name}: {t:,} of {n:,} parameters train" for name, (t, n) in counts.items()))
    world = run.accelerator.num_processes
    micro = config.batch_size // world
    update = config.batch_size * config.accumulation
    run.say(
        f"{update} examples an update = {micro} x {world} process(es) x {config.accumulation} accumulated; "
        f"{steps} updates of {len(source)} examples an epoch"
    )
    examples, batch = next(iter(loader(source, processor, [[(0, 0), (0, 1 % len(source))]], with_suffix=True)))
    for i, example in enumerate(examples):
        text = processor.decode(batch["input_ids"][i])
        learned = processor.decode([t for t in batch["labels"][i].tolist() if t >= 0], skip_special_tokens=False)
        run.say(f"{example.id}: {text!r}, {int(batch['attention_mask'][i].sum())} tokens, labels {learned!r}")


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the card"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
