"""The study: does differential attention find the needle better than standard attention does?

    python study.py                      # run the missing runs of the conversion study (A) and print its status
    python study.py --study=B1           # from scratch, on symbols: which arm forms the retrieval circuit first?
    python study.py --study=C            # on a pretrained language model, exploratory
    python study.py --quick=True         # 2 arms, 2 seeds, fewer steps and questions: ten minutes, not the study
    python study.py --report=True        # the tables, the verdicts and the figures, from the records

`study.json` is the plan, with one section per study, committed before its first run; later, only an `amendment` may
leave seeds out, before any result is looked at. Every run trains and is evaluated in its own process and an ordinary
run folder, and writes one record under results/study/. A run that has a record is never repeated; the same command
continues a study that was stopped. Records of another plan are refused, and a study does not continue on a machine
where the same run gives different numbers, such as another processor. On that machine the study can be replicated in a
folder of its own, --records=results/study-NAME, which the report lists separately.
"""

import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from msgspec import Meta

import study_records
import study_report
from errors import UserError, one_line_errors
from files import check_no_other_flags, check_ranges, read_json, write_json, write_text
from study_records import Job, Record, analysed_seeds, job_of

ROOT = Path(__file__).resolve().parent
PLAN = ROOT / "study.json"
RECORDS = ROOT / "results" / "study"
Name = Literal["A", "A-pilot", "B1", "C-pilot", "C-pilot-2", "C"]
RUNNERS = {
    "A": "study_conversion",
    "A-pilot": "study_conversion",
    "B1": "study_symbolic",
    "C": "study_decoder",
    "C-pilot": "study_decoder",
    "C-pilot-2": "study_decoder",
}
NOISES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)  # noise levels of --calibrate
POLL_SECONDS = 1.0
ALONE = {"report": ("study", "quick"), "status": ("study", "jobs", "records"), "calibrate": ("study",)}  # other flags
QUICK_ARMS = {"standard": "standard-2e-3", "split": "split-2e-3"}  # name in the quick version -> arm of the pilot
QUICK_SEEDS, QUICK_STEPS, QUICK_QUESTIONS = [0, 1], 80, 30


@dataclass
class Config:
    study: Name = "A"  # section of study.json
    jobs: Annotated[int, Meta(ge=1, le=256)] = 2  # runs at the same time, each in a process with one thread
    arms: tuple[str, ...] = ()  # arms to run; empty: all of the plan, those of the main question first
    seeds: tuple[int, ...] = ()  # seeds to run; empty: all of the plan
    records: str = "results/study"  # folder of the records; for a replication: results/study-NAME
    status: bool = False  # print which runs are finished and missing, and stop
    quick: bool = False  # run a small version for a first look, in runs/study/quick; it is not part of the study
    report: bool = False  # print tables and verdicts and draw the figures, from the records
    calibrate: str = ""  # print the accuracy of this run folder by cells, distractors and noise (studies A and A-pilot)
    run: str = ""  # internal: the job that this process runs, as ARM/JOB, or "fingerprint"
    fingerprint: str = ""  # internal: fingerprint of this machine, for the record of the job


# ---- the plan
def read_section(study: str) -> dict[str, Any]:
    """A section of study.json. Raises UserError if it does not exist."""
    plan = read_json(PLAN)
    if study not in plan:
        raise UserError(f"{PLAN.name}: has no section {study}: choose one of {', '.join(plan)}")
    return plan[study]


def check_committed(study: str, section: dict):
    """Raise UserError unless the section is the same in the last commit: a plan is committed before its first run."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "show", f"HEAD:{PLAN.name}"], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError("git is not installed: it shows that the plan was committed before its runs") from error
    committed = json.loads(git.stdout).get(study) if git.returncode == 0 else None
    if committed != section:
        raise UserError(
            f"{PLAN.name}: section {study} differs from the committed one: commit the plan before it is run"
        )


def make_quick(section: dict) -> dict[str, Any]:
    """A small version of study A, from the section of its pilot."""
    conditions = {name: condition | {"n": QUICK_QUESTIONS} for name, condition in section["conditions"].items()}
    choices = {"family": "core", "seeds": QUICK_SEEDS}
    arms = {name: section["arms"][arm] | choices for name, arm in QUICK_ARMS.items()}
    train = section["train"] | {"max_steps": QUICK_STEPS, "save_every": QUICK_STEPS}
    return section | {"arms": arms, "conditions": conditions, "train": train, "quick": True}


def list_jobs(section: dict, arms: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> list[Job]:
    """The runs of a section: family by family in the plan's order, then seed by seed, so that arms advance together.

    Raises UserError for an arm or a seed that is not in the plan.
    """
    unknown = set(arms) - set(section["arms"])
    if unknown:
        raise UserError(f"--arms: the plan has no {min(unknown)}: choose from {', '.join(section['arms'])}")
    planned = {seed for arm in section["arms"] for seed in analysed_seeds(section, arm)}
    if set(seeds) - planned:
        raise UserError(
            f"--seeds: the plan, as amended, has no {min(set(seeds) - planned)}: choose from {sorted(planned)}"
        )
    families = list(dict.fromkeys(arm["family"] for arm in section["arms"].values()))
    jobs = [
        (families.index(arm["family"]), seed, number, Job(name, seed, pairs))
        for number, (name, arm) in enumerate(section["arms"].items())
        for seed in analysed_seeds(section, name)
        for pairs in section.get("pairs", [None])
        if (not arms or name in arms) and (not seeds or seed in seeds)
    ]
    return [job for *_, job in sorted(jobs, key=lambda item: item[:3])]


# ---- records
def read_records(folder: Path, study: str, section: dict) -> dict[Job, Record]:
    """The records in `folder` of runs that the section plans. Raises UserError for a record of another plan."""
    planned, found = set(list_jobs(section)), {}
    for record in study_records.read_records(folder, study):
        if record.plan != study_records.hash_plan(section):
            path = folder / study_records.record_path(record)
            raise UserError(f"{path}: of another plan: restore study.json or remove the record")
        job = job_of(record)
        if job in planned:
            found[job] = record
    return found


def format_status(section: dict, records: dict[Job, Record], jobs: int) -> list[str]:
    """Lines with the number of finished and missing runs of every arm, and the remaining time."""
    lines = [f"{'arm':24}{'family':16}{'finished':>10}{'missing':>10}"]
    for arm, choices in section["arms"].items():
        total = [job for job in list_jobs(section) if job.arm == arm]
        finished = sum(job in records for job in total)
        lines.append(f"{arm:24}{choices['family']:16}{finished:>10}{len(total) - finished:>10}")
    missing = len(list_jobs(section)) - len(records)
    if records and missing:
        seconds = statistics.median(record.seconds for record in records.values())
        hours = missing * seconds / jobs / 3600
        lines.append(f"{missing} runs of about {seconds / 60:.1f} min: {hours:.1f} h with {jobs} at a time")
    return lines


# ---- running
def run_jobs(study: str, section: dict, folder: Path, jobs: list[Job], found: dict[Job, Record], config: Config):
    """Run these jobs, `config.jobs` at a time. Ctrl-C and SIGTERM stop their processes too; a later start continues
    them.

    `found` holds the records that are already in `folder`. A job that fails is reported, and the others still run.
    Raises UserError at the end if a job has failed, and before any run if this machine gives other numbers than those
    in the records.
    """
    waiting, running, failed = list(jobs), {}, []
    threads = str(section["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
    }
    logs = ROOT / "runs" / "study" / ("quick" if config.quick else study)
    base = [sys.executable, str(ROOT / "study.py"), f"--study={study}", f"--records={config.records}"]
    base += ["--quick=True"] if config.quick else []
    measured = subprocess.run([*base, "--run=fingerprint"], capture_output=True, text=True, env=environment, cwd=ROOT)
    if measured.returncode:
        raise UserError(f"the fingerprint of this machine cannot be measured: {measured.stderr.strip()[-300:]}")
    fingerprint = measured.stdout.split()[-1]
    others = [record for record in found.values() if record.fingerprint != fingerprint]
    if others:
        raise UserError(
            f"{folder}: {len(others)} records have the fingerprint {others[0].fingerprint}, this machine has "
            f"{fingerprint}, and such runs are never pooled: continue where those ran, or replicate the study with "
            "--records=results/study-NAME"
        )
    stops = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in stops]
    try:
        while waiting or running:
            while waiting and len(running) < config.jobs:
                job = waiting.pop(0)
                log = logs / job.arm / f"{job.name}.log"
                log.parent.mkdir(parents=True, exist_ok=True)
                command = [*base, f"--run={job.arm}/{job.name}", f"--fingerprint={fingerprint}"]
                with open(log, "ab") as out:
                    running[job] = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
                print(
                    f"{time.strftime('%H:%M')} {job.arm} {job.name} started, {len(waiting)} wait; log {log}", flush=True
                )
            time.sleep(POLL_SECONDS)
            for job, process in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    outcome = "finished" if job.record(folder).exists() else "failed"
                    failed += [job] if outcome == "failed" else []
                    print(f"{time.strftime('%H:%M')} {job.arm} {job.name} {outcome}", flush=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
        for number, handler in zip(stops, previous, strict=True):
            signal.signal(number, handler)
    if failed:
        first = failed[0]
        raise UserError(f"{len(failed)} runs failed; the last lines of {logs / first.arm / first.name}.log say why")


def run_job(study: str, section: dict, records: Path, config: Config):
    """Run one job in this process and write its record, or print the fingerprint of this machine."""
    import torch

    from machine import git_commit, versions

    torch.set_num_threads(section["threads"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    runner = importlib.import_module(RUNNERS[study])
    folder = ROOT / "runs" / "study" / ("quick" if config.quick else study)
    if config.run == "fingerprint":
        print(runner.measure_fingerprint(section, folder / "fingerprint"))
        return
    job = next(job for job in list_jobs(section) if f"{job.arm}/{job.name}" == config.run)
    result = runner.run(section, job, folder / job.arm / job.name)
    record = {
        "study": study,
        "plan": study_records.hash_plan(section),
        "arm": job.arm,
        "seed": job.seed,
        "commit": git_commit() or "",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": section.get("dtype", "float32"),
        "threads": section["threads"],
        "fingerprint": config.fingerprint,
        "versions": versions(),
    }
    job.record(records).parent.mkdir(parents=True, exist_ok=True)
    write_json(job.record(records), record | result)


def print_grid(study: str, section: dict, folder: Path):
    """Print endpoint N of every arm and seed, for the pilot and the quick version."""
    import study_conversion

    print(*study_conversion.format_pilot(section, read_records(folder, study, section)), sep="\n")


def write_report(output: Path = RECORDS):
    """Print tables and verdicts of all studies, and write report.md, figure.png and summary.png into a folder.

    They depend only on the plan and the records. Records in results/study-* are replications, which the figures leave
    out.
    """
    import study_figure

    plan = {study: read_section(study) for study in ("A", "B1", "C") if study in read_json(PLAN)}

    def read(folder: Path) -> list[study_records.Record]:
        return [record for study in plan for record in study_records.read_records(folder / study, study)]

    records, others = read(RECORDS), sorted(RECORDS.parent.glob(f"{RECORDS.name}-*"))
    lines = study_report.format_report(plan, records, [record for folder in others for record in read(folder)])
    write_text(output / "report.md", "\n".join(lines) + "\n")
    study_figure.draw_figures(plan, records, output)
    print(*lines, sep="\n")


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_ranges(config)
    for flag, allowed in ALONE.items():
        if getattr(config, flag):
            check_no_other_flags(config, flag, allowed)
    if config.report and not config.quick and "-pilot" not in config.study:
        write_report()
        return
    folder = ROOT / config.records / config.study
    if config.quick:
        if config.study != "A":
            raise UserError("--quick: is a small version of study A: leave --study out")
        section, folder = make_quick(read_section("A-pilot")), ROOT / "runs" / "study" / "quick" / "records"
    elif config.calibrate and not config.study.startswith("A"):
        raise UserError("--calibrate: measures the difficulty of study A: leave --study out")
    else:
        section = read_section("A-pilot" if config.calibrate else config.study)
    if config.run:
        run_job(config.study, section, folder, config)
    elif config.calibrate:
        import study_conversion

        study_conversion.calibrate(section, config.calibrate, section["fingerprint_seed"], NOISES)
    elif config.report:
        print_grid(config.study, section, folder)
    else:
        found = read_records(folder, config.study, section)
        print(*format_status(section, found, config.jobs), sep="\n", flush=True)
        jobs = [job for job in list_jobs(section, config.arms, config.seeds) if job not in found]
        if config.status:
            return
        if not config.quick:
            check_committed(config.study, section)
        if jobs:
            run_jobs(config.study, section, folder, jobs, found, config)
            print(*format_status(section, read_records(folder, config.study, section), config.jobs), sep="\n")
        if config.quick:
            print(
                "\nA first look with 2 seeds, few steps and few questions. It is not the study and shows no difference:"
            )
            print_grid(config.study, section, folder)


if __name__ == "__main__":
    main()
