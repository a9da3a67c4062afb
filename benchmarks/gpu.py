"""One command for a machine with a GPU and no network: `python -m benchmarks gpu [--dry-run] [--minutes 9]`.

Every stage is a process of its own with a share of the time, in the order of STAGES: what is right before what is fast.
Each writes what it has finished as it goes; one that fails or is late is ended, recorded, and the next one runs. The
last thing printed is a summary under SUMMARY characters, and it is on disk after each stage.
`--dry-run` does all of it on a CPU, at toy size, with the kernels in Triton's interpreter.

This file imports the standard library alone: what is missing is said in the first line, before anything fails for it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import shared_work

ROOT = Path(__file__).parent.parent
SUMMARY = 10_000
SMALL = {  # what --tiny makes of a model
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
SQUAD = "squad_v1.1_dev_question_context_pairs"
NEEDED = ("torch", "triton", "numpy", "einops", "tokenizers", "safetensors", "pytest")
WELCOME = ("transformers", "matplotlib", "flash_attn", "transformer_engine", "liger_kernel", "pynvml")
MINUTES = 9.0
# the order, and of nine minutes each one's; what a stage leaves goes to the later ones
STAGES = {
    "environment": 0.3,  # versions, ptxas, peaks
    "compile": 1.3,  # all that follows, on all cores, into one cache
    "correctness": 1.4,  # groups of tests, bfloat16 at d = 64 first
    "kernels": 1.7,  # the table, varlen with dropout first
    "host": 0.3,  # what a call costs the CPU
    "train": 0.9,
    "infer": 0.4,
    "infer-one": 0.3,  # a text at a time
    "kernels-compiled": 0.4,  # and whoever needs torch.compile
    "train-compiled": 0.6,
    "pretraining": 0.5,  # a loss curve
    "profile": 0.2,
    "plans": 0.7,  # a search for better launch plans
}
COMPILING = ("compile", "host")  # also in a dry run Triton's compiler is there, not its interpreter
CORRECTNESS = "correctness"
VITAL = "environment"  # where it fails there is no GPU to go on with; it may take PATIENCE times its share
AGAIN = 15  # seconds without which a stage that lost its CUDA context is not started again
PATIENCE = 3  # the first to import torch from a cold disk


@dataclass(frozen=True)
class Stage:
    """A command line after `python`; `minutes` of a budget of nine. Its results are the JSON files of its folder."""

    name: str
    minutes: float
    command: list[str]


def stages(folder: Path, dry: bool) -> list[Stage]:
    """What runs, in order."""

    def own(name):
        return own_command(name, folder / name, dry)

    def suite(name, *options):
        return ["-m", "benchmarks", name.split("-")[0], "--quick", "--out", str(folder / name), *options]

    toy = "bert-tiny --tiny --batch-size 2 --longest 32 --rounds 2 --dtype float32 --lengths half"
    real = "bert-base --dtype bfloat16 --lengths half full " + SQUAD
    model = ["--backend", "triton", "--model", *(toy if dry else real).split()]
    kernels = ["--backend", "triton", "--dtype", *("float32 --tiny --rounds 2" if dry else "bfloat16").split()]
    few = "^minibert$|^transformers sdpa$" if dry else "^minibert(, padded call|, graphs)?$|sdpa(, masked rows)?$"
    few = ["--only", few]
    eager = ["--only", "^((?!compiled|overhead|flex).)*$"]  # what compiles comes last
    compiled = ["--only", "^minibert$" if dry else "^minibert|sdpa$|compiled|overhead|flex"]
    one = "--batch-size 1 --longest " + ("32" if dry else "128 --batches 8 --lengths full sst2_train")
    steps = [] if dry else ["--step-tokens", "16384"]
    commands = {
        "kernels": suite("kernels", *kernels, *eager),
        "host": suite("host", *["--tiny", "--rounds", "2"] * dry),
        "train": suite("train", *model, *([] if dry else ["--batches", "2"]), *few),
        "infer": suite("infer", *model, *([] if dry else ["--batch-size", "64", "--batches", "4"]), *few),
        "infer-one": suite("infer-one", *model, *few, *one.split()),
        "kernels-compiled": suite("kernels-compiled", *kernels, *compiled),
        "train-compiled": suite("train-compiled", *model, "--lengths", "half", *compiled, *steps),
    }
    made = {name: commands.get(name, own(name)) for name in STAGES}
    return [Stage(name, STAGES[name], command) for name, command in made.items()]


def own_command(name: str, folder: Path, dry: bool) -> list[str]:
    """Of one of OWN."""
    return ["-m", "benchmarks.gpu", "--stage", name, "--out", str(folder), *["--dry-run"] * dry]


def preflight() -> str:
    """The first line: which packages are missing, and what for."""
    needed, welcome = ([name for name in names if find_spec(name) is None] for names in (NEEDED, WELCOME))
    said = "missing and needed: " + ", ".join(needed) if needed else "nothing that is needed is missing"
    return said + (f"; not here, so not compared with or drawn: {', '.join(welcome)}" if welcome else "")


def shares(plan: list[Stage], minutes: float) -> str:
    """The order of the stages and what each may take."""
    total = sum(stage.minutes for stage in plan)
    parts = (f"{stage.name} {60 * minutes * stage.minutes / total:.0f} s" for stage in plan)
    return f"{minutes:g} minutes: " + ", ".join(parts)


def run(stage: Stage, limit: float, folder: Path, environment: dict) -> str:
    """Run a stage for at most `limit` seconds, and say what became of it."""
    with (folder / stage.name / "log.txt").open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            return "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            return f"cut off after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it started goes with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def result_of(stage: Stage, outcome: str, folder: Path) -> dict:
    """What a stage left on disk."""
    records = {}
    for path in sorted((folder / stage.name).glob("*.json")):
        with suppress(ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and {"rows", "lines"} & set(record):
                records[path.stem] = record
    text = (folder / stage.name / "log.txt").read_text(encoding="utf-8", errors="replace")
    return {"stage": stage.name, "outcome": outcome, "command": ["python", *stage.command], "records": records,
            "log": text[-4000:]}  # fmt: skip


def kernels_in(environment: dict) -> int:
    """How many compiled kernels Triton's cache holds."""
    return sum(1 for _ in Path(environment["TRITON_CACHE_DIR"]).glob("*/*.cubin"))


def run_all(
    folder: Path, *, dry: bool = False, minutes: float = MINUTES, plan: list[Stage] | None = None
) -> list[dict]:
    """Every stage, each with its share of the time that is left; results are written as they come."""
    end = time.perf_counter() + 60 * minutes
    print(preflight(), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    plan, results = plan or stages(folder, dry), []
    print(shares(plan, minutes), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        run_stages(plan, results, folder, end, environment)
    finally:
        print("\n" + conclude(results, folder), flush=True)
    return results


def run_stages(plan: list[Stage], results: list[dict], folder: Path, end: float, environment: dict) -> None:
    for index, stage in enumerate(plan):
        share = stage.minutes / sum(later.minutes for later in plan[index:])
        start, cached, outcome = time.perf_counter(), kernels_in(environment), "interrupted"
        limit = max(end - start, 0) * share * (PATIENCE if stage.name == VITAL else 1)
        own = {"STAGE_SECONDS": str(round(limit))} | ({"TRITON_INTERPRET": "0"} if stage.name in COMPILING else {})
        shutil.rmtree(folder / stage.name, ignore_errors=True)  # of an earlier run
        (folder / stage.name).mkdir()
        try:
            outcome = run(stage, limit, folder, environment | own)
            while outcome == f"failed with exit code {shared_work.LOST}":  # a suite goes on behind the case that did it
                left = limit - (time.perf_counter() - start)
                outcome = (
                    run(stage, left, folder, environment | own) if left > AGAIN else f"cut off after {limit:.0f} s"
                )
        finally:  # also of a stage that ends with all
            spent = {"seconds": round(time.perf_counter() - start, 1), "compiled": kernels_in(environment) - cached}
            results.append(result_of(stage, outcome, folder) | spent)
            shared_work.save(folder / f"{stage.name}.json", results[-1])
            (folder / "summary.txt").write_text(summary(results), encoding="utf-8")
        print(heading(results[-1]), flush=True)
        if stage.name == VITAL and outcome.startswith("failed"):
            break


def exit_code(results: list[dict]) -> int:
    """1 where a stage failed, or no test of a kernel passed; to be cut off is no failure."""
    failed = any(result["outcome"].startswith("failed") for result in results)
    groups = [group for result in results if result["stage"] == CORRECTNESS
              for record in result["records"].values() for group in record.get("groups", {}).values()]  # fmt: skip
    tested = not any(result["stage"] == CORRECTNESS for result in results) or any(group["passed"] for group in groups)
    return int(failed or not tested or any(group["failed"] for group in groups))


def conclude(results: list[dict], folder: Path) -> str:
    """Write the record of all suites, its page, and the summary, which is returned."""
    text = summary(results)
    (folder / "summary.txt").write_text(text, encoding="utf-8")
    suites = []
    for result in results:
        for record in result["records"].values():
            if "rows" in record:
                suites.append(record | {"rows": [row | {"stage": result["stage"]} for row in record["rows"]]})
    if suites:
        from . import measure, report

        merged = report.merge(suites)
        shared_work.save(folder / f"{measure.place_and_date(merged['machine'])}.json", merged)
        try:
            report.write_html(merged, folder / "report.html")
        except ImportError as error:
            print(f"no report.html: not installed: {error.name}")
    return text


def heading(result: dict) -> str:
    compiled = f", {result['compiled']} kernels compiled" if result.get("compiled") else ""
    return f"{result['stage']}: {result['outcome']}, {result['seconds']} s{compiled}"


def summary(results: list[dict]) -> str:
    """At most SUMMARY characters: a stage's outcome, its lines, and of one that went wrong the end of its log."""
    texts = []
    for result in results:
        lines = [line for record in result["records"].values() for line in _lines(record)]
        if result["outcome"].startswith("failed") and result["stage"] != CORRECTNESS or not lines:
            lines += result["log"].strip().splitlines()[-8:]
        texts.append("\n".join(line[:400] for line in lines))
    room = SUMMARY - 120 * len(results)  # headings, and what is said of more
    parts = dict.fromkeys(range(len(texts)), "")
    for left, number in enumerate(
        sorted(parts, key=lambda number: len(texts[number]))
    ):  # what short ones leave, others get
        share = room // (len(texts) - left)
        text = texts[number]
        if len(text) > share:
            text = text[:share].rsplit("\n", 1)[0] + f"\n… more in {results[number]['stage']}.json"
        room -= len(text)
        parts[number] = f"== {heading(results[number])}\n{text}\n"
    return "".join(parts.values())


def _lines(record) -> list[str]:
    """A line a case: each provider's time, and its share of the peak that is nearer."""
    if not isinstance(record, dict):
        return []
    cases: dict[str, list[str]] = {}
    for row in record.get("rows", ()):
        where = ", ".join(str(row[name]) for name in ("case", "direction", "dtype") if row.get(name))
        shares = [row[name] for name in ("matrix_share", "bandwidth_share") if name in row]
        if "refused" in row:
            text = f"– ({row['refused'].removeprefix(row['provider'] + ': ')[:40]})"
        else:
            text = _duration(row["seconds"]) + (f" {max(shares):.0%}" if shares else "")
        cases.setdefault(where, []).append(f"{row['provider']} {text}")
    loads = [row["load"] for row in record.get("rows", ()) if row.get("load") is not None]
    end = [f"load of the machine: {min(loads):.1f} to {max(loads):.1f}"] if loads else []
    return record.get("lines") or [f"{where}: {'; '.join(texts)}" for where, texts in cases.items()] + end


def _duration(seconds: float) -> str:
    from .report import duration

    return duration(seconds)


def environment(folder: Path, dry: bool) -> dict:
    """The machine and its peaks.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    from dataclasses import asdict

    import torch

    from . import measure

    if not dry and not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    facts, peaks = measure.machine(), {}
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32):
        peaks[str(dtype).removeprefix("torch.")] = asdict(measure.probe(dtype, "cpu" if dry else "cuda"))
    name = facts.get("gpu", {}).get("name", facts["cpu"])
    lines = [f"{name}, {', '.join(f'{package} {version}' for package, version in facts['versions'].items())}"]
    lines += [f"{dtype}: {p['flops'] / 1e12:.1f} TFLOP/s, {p['bytes'] / 1e9:.0f} GB/s" for dtype, p in peaks.items()]
    return {"machine": facts, "peaks": peaks, "lines": lines}


def compile_all(folder: Path, dry: bool) -> dict:
    """Compile what later stages launch, in a process a core."""
    processes = 1 if dry else os.cpu_count()

    def result():
        rows = shared_work.rows(folder)
        failed = [f"FAILED {row['item']}: {row['why']}" for row in rows if row["outcome"] == "failed"]
        cache = {"TRITON_CACHE_DIR": os.environ["TRITON_CACHE_DIR"]}
        line = f"{kernels_in(cache)} kernels cached, {processes} processes, {len(rows)} calls, {len(failed)} failed"
        return {"lines": [line, *failed]}

    command = own_command("compile-worker", folder, dry)
    keep = lambda: shared_work.save(folder / shared_work.RESULT, result())  # noqa: E731
    shared_work.run(command, folder, processes, shared_work.seconds_left(2), keep)
    return result()


def compile_worker(folder: Path, dry: bool) -> None:
    """One process of `compile_all`: tests and what the suites call, as `correctness.COMPILED` orders them."""
    from . import correctness, warm

    def units(wanted: str):
        for name, call in warm.units(dry):
            if name.startswith(wanted) and shared_work.claim(folder, name):
                with warm.compile_only() as failed:
                    try:
                        call()
                    except Exception as error:
                        if not failed:
                            failed.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                outcome = {"outcome": "failed", "why": "; ".join(failed)} if failed else {"outcome": "passed"}
                shared_work.add(folder, {"item": name} | outcome)
                if shared_work.context_is_lost():
                    os._exit(shared_work.LOST)

    correctness.work(folder, dry, compiling=True, between=units)


def correct(folder: Path, dry: bool) -> dict:
    """The kernels' tests, by group, in a few processes."""
    from .correctness import summary as groups

    command = own_command("correctness-worker", folder, dry)
    keep = lambda: shared_work.save(folder / shared_work.RESULT, groups(folder))  # noqa: E731
    shared_work.run(command, folder, 1 if dry else 4, shared_work.seconds_left(2), keep)
    found = groups(folder)
    if any(group["failed"] for group in found["groups"].values()):
        shared_work.save(folder / shared_work.RESULT, found)
        raise SystemExit(1)
    return found


def correctness_worker(folder: Path, dry: bool) -> None:
    from . import correctness

    correctness.work(folder, dry, compiling=False)


def profile(folder: Path, dry: bool) -> dict:
    """Where the time of a pretraining step goes."""
    import torch

    from minibert import BertForPreTraining
    from minibert.config import BertConfig
    from minibert.profile import Options, profile_step, synthetic_batch

    torch.manual_seed(0)
    config = BertConfig.preset("bert-base", **SMALL if dry else {})
    model = BertForPreTraining(config, backend="triton").to("cpu" if dry else "cuda")
    size = {"batch_size": 2, "length": 16} if dry else {"batch_size": 128, "length": 128}
    batch = synthetic_batch(config, "BertForPreTraining", fill=0.75, **size)
    options = Options(dtype="float32" if dry else "bfloat16", steps=1 if dry else 5, warmup=0 if dry else 3)
    result = profile_step(model, batch, options, folder)
    found = result["summary"]
    lines = [f"{found['step_ms']:.2f} ms a step, {found['tokens_per_second']:,.0f} tokens/s, launches "
             f"{found['launches']}, waits {found['cuda_waits']}, host syncs {found['host_syncs']}"]  # fmt: skip
    return {"lines": lines + [f"{r['op'][:60]}: {r['self_ms']:.3f} ms, {r['share']:.1%}" for r in result["ops"][:15]]}


def plans(folder: Path, dry: bool) -> dict:
    from .plans import search

    return search(folder, dry)


def pretraining(folder: Path, dry: bool) -> dict:
    from .pretraining import run as train

    return train(folder, dry)


OWN = {
    "environment": environment, "compile": compile_all, "compile-worker": compile_worker, CORRECTNESS: correct,
    "correctness-worker": correctness_worker, "plans": plans, "pretraining": pretraining, "profile": profile,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """All stages; or, in this process, one of this project's own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--stage", choices=OWN, help="this one alone, in this process")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results (default runs/gpu)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size, kernels in the interpreter")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args(argv)
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.stage is None:
        return exit_code(run_all(folder, dry=args.dry_run, minutes=args.minutes))
    result = OWN[args.stage](folder, args.dry_run)
    if result is not None:
        shared_work.save(folder / shared_work.RESULT, result)
        print("\n".join(result["lines"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
