"""One command for a machine with a GPU and no network: `python -m benchmarks gpu [--dry-run] [--minutes 9]`.

Every stage is a process of its own with a share of the time. When it ends, its result is written; a stage that fails or
takes too long is recorded, and the next one runs. The last thing printed is a summary under SUMMARY characters.
`--dry-run` does all of it on a CPU, at toy size, with the kernels in Triton's interpreter.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minibert.files import write_atomically

from . import measure, report

ROOT = Path(__file__).parent.parent
SUMMARY = 10_000
SMALL = {  # what --tiny makes of a model
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
SQUAD = "squad_v1.1_dev_question_context_pairs"
RESULT = "result.json"


@dataclass(frozen=True)
class Stage:
    """A command line after `python`; `minutes` of a budget of nine. Its results are the JSON files of its folder."""

    name: str
    minutes: float
    command: list[str]


def stages(folder: Path, dry: bool) -> list[Stage]:
    """What runs, in order: what is right before what is fast."""

    def own(name, minutes):
        return Stage(name, minutes, ["-m", "benchmarks.gpu", name, str(folder / name), *["--dry-run"] * dry])

    def suite(verb, minutes, *options, name=None):
        place = str(folder / (name or verb))
        return Stage(name or verb, minutes, ["-m", "benchmarks", verb, "--quick", "--out", place, *options])

    toy = "bert-tiny --tiny --batch-size 2 --longest 32 --rounds 2 --dtype float32 --lengths half"
    real = "bert-base --batch-size 64 --batches 4 --dtype bfloat16 --lengths half full " + SQUAD
    model = ["--backend", "triton", "--model", *(toy if dry else real).split()]
    kernels = ["--backend", "triton", "--dtype", *("float32 --tiny --rounds 2" if dry else "bfloat16").split()]
    eager = ["--only", "minibert|eager|sdpa" if dry else "^((?!compiled|overhead|flex).)*$"]  # what compiles comes last
    compiled = ["--lengths", "half", "--only", "^minibert$" if dry else "^minibert|sdpa$|compiled|overhead|flex"]
    tests = ["tests/kernels/test_philox.py"] if dry else ["-m", "gpu", "tests/kernels", "tests/train"]
    return [
        own("environment", 0.3),
        Stage("tests", 1.3, ["-m", "pytest", "-q", "--junitxml", str(folder / "tests" / "junit.xml"), *tests]),
        suite("kernels", 1.2, *kernels, *eager),
        own("plans", 0.8),
        suite("train", 0.6, *model, *eager),
        suite("infer", 0.4, *model, *eager),
        own("pretraining", 3.0),
        own("profile", 0.3),
        suite("train", 0.5, *model, *compiled, name="train-compiled"),
        suite("infer", 0.3, *model, *compiled, name="infer-compiled"),
        suite("kernels", 0.6, *kernels, *compiled[2:], name="kernels-compiled"),
    ]


def run(stage: Stage, limit: float, folder: Path, environment: dict) -> dict:
    """Run a stage for at most `limit` seconds; what became of it, with the records it wrote."""
    (folder / stage.name).mkdir(parents=True, exist_ok=True)
    log, start = folder / stage.name / "log.txt", time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it started goes with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    records = {}
    for path in sorted((folder / stage.name).glob("*.json")):
        with suppress(ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and {"rows", "lines"} & set(record):
                records[path.stem] = record
    text = log.read_text(encoding="utf-8", errors="replace")
    return {"stage": stage.name, "outcome": outcome, "seconds": round(time.perf_counter() - start, 1),
            "command": ["python", *stage.command], "records": records, "log": text[-4000:]}  # fmt: skip


def run_all(folder: Path, *, dry: bool = False, minutes: float = 9, plan: list[Stage] | None = None) -> list[dict]:
    """Every stage, each with its share of the time that is left; results are written as they come."""
    plan, results, end = plan or stages(folder, dry), [], time.perf_counter() + 60 * minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended too
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        run_stages(plan, results, folder, end, environment)
    finally:
        text = conclude(results, folder)
    print("\n" + text)
    return results


def run_stages(plan: list[Stage], results: list[dict], folder: Path, end: float, environment: dict) -> None:
    for index, stage in enumerate(plan):
        share = stage.minutes / sum(later.minutes for later in plan[index:])
        limit = max(end - time.perf_counter(), 0) * share
        environment["STAGE_SECONDS"] = str(round(limit))
        results.append(run(stage, limit, folder, environment))
        write_atomically(folder / f"{stage.name}.json", json.dumps(results[-1], indent=1) + "\n")
        print(f"{stage.name}: {results[-1]['outcome']}, {results[-1]['seconds']} s", flush=True)


def conclude(results: list[dict], folder: Path) -> str:
    """Write the record of all suites, its page, and the summary, which is returned."""
    suites = []
    for result in results:
        for record in result["records"].values():
            if "rows" in record:
                suites.append(record | {"rows": [row | {"stage": result["stage"]} for row in record["rows"]]})
    if suites:
        merged = report.merge(suites)
        write_atomically(
            folder / f"{measure.place_and_date(merged['machine'])}.json", json.dumps(merged, indent=1) + "\n"
        )
        report.write_html(merged, folder / "report.html")
    text = summary(results)
    write_atomically(folder / "summary.txt", text)
    return text


def summary(results: list[dict]) -> str:
    """At most SUMMARY characters: a stage's outcome, its lines, and of one that went wrong the end of its log."""
    texts = []
    for result in results:
        lines = [line for record in result["records"].values() for line in _lines(record)]
        if result["outcome"] != "ok" or not lines:
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
        parts[number] = (
            f"== {results[number]['stage']}: {results[number]['outcome']}, {results[number]['seconds']} s\n{text}\n"
        )
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
            text = f"not timed ({row['refused'][:40]})"
        else:
            text = report.duration(row["seconds"]) + (f" {max(shares):.0%}" if shares else "")
        cases.setdefault(where, []).append(f"{row['provider']} {text}")
    return record.get("lines") or [f"{where}: {'; '.join(texts)}" for where, texts in cases.items()]


def environment(folder: Path, dry: bool) -> dict:
    """The machine and its peaks."""
    device = "cpu" if dry else "cuda"
    facts, peaks = measure.machine(), {}
    for dtype in (torch.float32,) if dry else (torch.bfloat16, torch.float16, torch.float32):
        peaks[str(dtype).removeprefix("torch.")] = asdict(measure.probe(dtype, device))
    name = facts.get("gpu", {}).get("name", facts["cpu"])
    lines = [f"{name}, {', '.join(f'{package} {version}' for package, version in facts['versions'].items())}"]
    lines += [f"{dtype}: {p['flops'] / 1e12:.1f} TFLOP/s, {p['bytes'] / 1e9:.0f} GB/s" for dtype, p in peaks.items()]
    return {"machine": facts, "peaks": peaks, "lines": lines}


def profile(folder: Path, dry: bool) -> dict:
    """Where the time of a pretraining step goes."""
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


def main(argv: list[str] | None = None) -> int:
    """One stage of this project's own, in this process."""
    from . import plans, pretraining

    own = {"environment": environment, "plans": plans.search, "pretraining": pretraining.run, "profile": profile}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="one stage of `gpu`")
    parser.add_argument("stage", choices=own)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    result = own[args.stage](args.folder, args.dry_run)
    write_atomically(args.folder / RESULT, json.dumps(result, indent=1) + "\n")
    print("\n".join(result["lines"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
