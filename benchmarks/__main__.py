"""Benchmarks beside what one would use otherwise; every figure with its noise, its machine and its roofline.

    python -m benchmarks infer --quick                       # minutes on two cores
    python -m benchmarks kernels --dtype bfloat16            # every op beside its peers, on a GPU
    python -m benchmarks all --out results                   # everything, JSON, CSV and one HTML page
    python -m benchmarks report A.json B.json --html page.html
    python -m benchmarks --compare OLD.json NEW.json         # exit code 1 where something got slower

docs/benchmarks.md says how each number is made, and what it does not say.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import NoReturn

import torch

from minibert import BertForPreTraining, BertModel
from minibert.config import PRESETS, BertConfig
from minibert.files import write_atomically
from minibert_kernels.dispatch import BACKENDS
from minibert_kernels.xray import load_rows

from . import (
    cases,
    data,
    finetuning,
    gpu,
    host,
    inference,
    kernels,
    lengths,
    measure,
    peers,
    report,
    scaling,
    shared_work,
    training,
)

MODEL_SUITES = {"infer": (inference, BertModel), "train": (training, BertForPreTraining)}
SUITES = ("kernels", *MODEL_SUITES, "data", "scaling", "host", "all")
SST2 = "sst2_train"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


positive.__name__ = "positive whole number"  # what argparse calls it


def fail(message: str) -> NoReturn:
    """What the user can mend: one line, and exit code 2."""
    print(f"benchmarks: error: {message}", file=sys.stderr)
    sys.exit(2)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what changed between two records"
    )
    verbs, there = parser.add_subparsers(dest="verb"), "cuda" if torch.cuda.is_available() else "cpu"
    for name in SUITES:
        verb = verbs.add_parser(name)
        verb.add_argument("--quick", action="store_true", help="few rounds and cases: minutes on two cores")
        verb.add_argument("--model", default="bert-base", choices=PRESETS, help="default bert-base")
        verb.add_argument("--lengths", nargs="+", default=None, metavar="NAME",
                          help="full, half, quarter, or a data set of benchmarks/lengths.py")  # fmt: skip
        verb.add_argument("--longest", type=positive, default=512, help="longer texts are cut here")
        verb.add_argument("--batch-size", type=positive, default=None)
        verb.add_argument("--batches", type=positive, default=None, help="of a run")
        verb.add_argument("--step-tokens", nargs="+", type=positive, default=None, metavar="TOKENS",
                          help="train: of a step, in place of --batch-size (default on a GPU "
                          f"{' '.join(map(str, training.STEP_TOKENS))}: fewer may measure Python)")  # fmt: skip
        verb.add_argument(
            "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"]
        )
        verb.add_argument("--threads", nargs="+", type=positive, default=None)
        verb.add_argument("--rounds", type=positive, default=None)
        verb.add_argument("--device", default=there, choices=("cpu", "cuda"))
        verb.add_argument("--backend", default="auto", choices=BACKENDS, help="of minibert")
        verb.add_argument("--only", type=pattern, default="", metavar="PATTERN", help="providers whose name matches")
        verb.add_argument(
            "--op", type=pattern, default="", metavar="PATTERN", help="kernels, host: lines whose op and name match"
        )
        verb.add_argument("--tokens", type=positive, default=None, help="kernels: of a case")
        verb.add_argument("--axis", nargs="+", default=scaling.AXES, choices=scaling.AXES, help="scaling: of what")
        verb.add_argument("--tiny", action="store_true", help="so small that the interpreter takes seconds")
        verb.add_argument("--out", type=Path, default=None, help="folder for the record (default benchmarks/results)")
    verb = verbs.add_parser("gpu", help="all of it on a machine with a GPU, in stages")
    verb.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size, kernels in the interpreter")
    verb.add_argument("--minutes", type=float, default=9)
    verb.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for the results (default runs/gpu)")
    verb = verbs.add_parser(
        "finetune", help="what fine-tuning reaches on published sets; what is made is not made again"
    )
    verb.add_argument("--data", type=Path, required=True, help="folder of the sets, as finetuning.LINES names them")
    verb.add_argument("--init", type=Path, required=True, help="folder of the pretrained weights")
    verb.add_argument("--corpus", type=Path, help="articles whose first paragraphs are to be summaries")
    verb.add_argument(
        "--only", nargs="+", default=(), choices=finetuning.LINES, metavar="NAME", help="these sets alone"
    )
    verb.add_argument("--seeds", type=positive, default=3)
    verb.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    verb.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="folder for the runs (default runs/tasks)")
    verb.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the record")
    verb = verbs.add_parser("report")
    verb.add_argument("records", nargs="+", type=Path)
    verb.add_argument("--html", type=Path, help="write the page here")
    verb.add_argument("--csv", type=Path)
    verb.add_argument("--readme", type=Path, help="put the tables between the marks of this file")
    verb.add_argument("--xray", type=Path, help="rows of `minibert xray --json`, for the page")
    args = parser.parse_args(argv)
    if not args.compare and not args.verb:
        parser.error("name a suite, or --compare OLD NEW")
    if getattr(args, "device", there) == "cuda" and there == "cpu":
        parser.error("--device cuda: there is no CUDA device")
    for name in getattr(args, "lengths", None) or ():
        if name not in (*lengths.ARTIFICIAL, *lengths.DATASETS):
            parser.error(f"--lengths {name} is not one of {', '.join((*lengths.ARTIFICIAL, *lengths.DATASETS))}")
    return args


def read_one(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: {' '.join(str(error).split())}")
    if not isinstance(record, dict) or not {"rows", "machine", "peaks"} <= set(record):
        fail(f"{path}: expected a record of benchmarks, with machine, peaks and rows")
    for number, row in enumerate(record["rows"], 1):
        if not isinstance(row, dict) or not {"suite", "case", "provider"} <= set(row) or not {
            "seconds", "refused"} & set(row):  # fmt: skip
            fail(f"{path}: row {number} has no suite, case and provider, or neither seconds nor refused")
    return record


def read(paths) -> dict:
    """Records as one: the machine of the first, the rows of all."""
    try:
        return report.merge([read_one(path) for path in paths])
    except ValueError as error:
        fail(str(error))


def place_of(row: dict) -> tuple:
    """What rows of one case share."""
    return tuple(row.get(name) for name in ("suite", "case", "dtype", "threads", "direction", "axis", "value"))


def run(args) -> dict:
    """Measure, writing the record after every case."""
    options = {name: value for name, value in vars(args).items() if name not in ("out", "compare")}
    options = json.loads(json.dumps(options))  # as they are read back
    record = {"machine": measure.machine(), "options": options, "peaks": {}, "rows": []}
    folder = args.out or Path(__file__).parent / "results"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {folder}: {error.strerror}")
    name = f"{measure.place_and_date(record['machine'])}-{args.verb}" + "-quick" * args.quick
    name = free_name(folder, name, options)
    if "STAGE_SECONDS" in os.environ and (folder / f"{name}.json").exists():  # a stage of `gpu` that goes on
        record = read_one(folder / f"{name}.json")
    done = {place_of(row) for row in record["rows"]}
    torch.backends.cuda.matmul.allow_tf32 = False
    rounds = args.rounds or (5 if args.quick else 9)
    for case in suite_cases(args):
        if place_of({"suite": case.suite, "case": case.name, **case.labels}) in done:
            continue
        dtype = case.labels.get("dtype", "float32")
        label = f"{dtype}, {torch.get_num_threads()} threads"
        judged = case.suite != "host"  # what the host does has no roofline
        if judged and label not in record["peaks"]:
            record["peaks"][label] = asdict(measure.probe(getattr(torch, dtype), args.device))
        peaks = measure.Peaks(**record["peaks"][label]) if judged else measure.Peaks(0, 0)
        rows = measure.measure(case, rounds=rounds, peaks=peaks, say=lambda line: print(line, file=sys.stderr))
        work = {name: value for name in ("tokens", "sequences") if (value := getattr(case.work, name))}
        record["rows"] += [row | {"work": work} | {key: options[key] for key in TOLD[case.suite]} for row in rows]
        record["machine"]["afterwards"] = measure.condition()
        write_atomically(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
        if shared_work.context_is_lost():
            print(f"{case.name}: the CUDA context is lost", file=sys.stderr)
            os._exit(shared_work.LOST)
    if not record["rows"]:
        fail("nothing was measured: no provider or line matches --only and --op")
    report.show(record)
    report.write_csv(record, folder / f"{name}.csv")
    report.write_html(record, folder / f"{name}.html")
    print(folder / f"{name}.json", folder / f"{name}.html", sep="\n")
    return record


def tasks(args) -> None:
    """The table of finetuning.py, and its record."""
    if args.seeds < 2:
        fail(f"--seeds {args.seeds}: a standard deviation needs two")
    for folder in (args.runs, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    options = {"only": list(args.only), "seeds": args.seeds, "dtype": args.dtype}
    try:
        rows = list(finetuning.results(args.data, args.runs, args.init, corpus=args.corpus, **options))
    except ValueError as error:
        fail(str(error))
    options = {"data": str(args.data), "init": str(args.init)} | options
    if not rows:
        fail(f"--data {args.data} has none of the sets")
    record = {"machine": measure.machine(), "options": options, "peaks": {}, "rows": rows}
    name = free_name(args.out, f"{measure.place_and_date(record['machine'])}-finetune", options)
    file = args.out / f"{name}.json"
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    print(finetuning.table(rows), file, sep="\n")


# options that a row of a suite repeats, because two rows that differ in them are not to be compared
TOLD = {
    "kernels": ("device", "backend", "tokens"), "host": ("device", "backend"), "data": (),
    "scaling": ("device", "backend", "model"),
    **dict.fromkeys(("infer", "embed", "train"), ("device", "backend", "model", "longest")),
}  # fmt: skip


def free_name(folder: Path, name: str, options: dict) -> str:
    """`name`, or with a number behind it where that file holds a record of other options."""
    for number in count(1):
        found = f"{name}-{number}" if number > 1 else name
        try:
            if json.loads((folder / f"{found}.json").read_text(encoding="utf-8"))["options"] == options:
                return found
        except FileNotFoundError:
            return found
        except (ValueError, KeyError, TypeError):
            continue


def suite_cases(args):
    """The cases of the asked suites, one after the other."""
    wanted = SUITES[:-1] if args.verb == "all" else (args.verb,)
    config, cores = BertConfig.preset(args.model, **gpu.SMALL if args.tiny else {}), torch.get_num_threads()
    on_gpu, dtypes = args.device == "cuda", [getattr(torch, name) for name in args.dtype]
    common = {"device": args.device, "backend": args.backend, "only": lambda name: re.search(args.only, name)}
    usual = [SST2, gpu.SQUAD] + ([] if args.quick else ["ag_news_test", "full", "half", "quarter"])
    options = common | {
        "names": args.lengths or usual,
        "dtypes": dtypes, "longest": args.longest,
        "threads": args.threads or ([cores] if args.quick or on_gpu else sorted({1, cores})),
        "batch_size": args.batch_size or (8 if args.quick else 32),
        "num_batches": args.batches or (1 if args.quick else 2),
    }  # fmt: skip
    step_tokens = args.step_tokens or (training.STEP_TOKENS if on_gpu and not args.batch_size else ())
    for suite in wanted:
        if suite == "kernels":
            table = [
                case for case in (cases.TINY if args.tiny else cases.TABLE)
                if (case.quick or not args.quick) and re.search(args.op, f"{case.op} {case.name}")
            ]  # fmt: skip
            tokens = args.tokens or (64 if args.tiny else 65536 if on_gpu else 4096)
            yield from kernels.cases(table=table, dtypes=dtypes, tokens=tokens, **common)
        elif suite == "data":
            yield from data.cases(300 if args.quick else 2000)
        elif suite == "host":
            yield from host_cases(args, common)
        elif suite == "scaling":
            for dtype in dtypes:
                yield from scaling.cases(config, dtype=dtype, quick=args.quick, axes=args.axis, **common)
        else:
            module, kind = MODEL_SUITES[suite]
            with tempfile.TemporaryDirectory() as folder:
                own = {"step_tokens": step_tokens} if suite == "train" else {}
                yield from module.cases(peers.random_weights(config, Path(folder), kind), config, **options, **own)
        torch.set_num_threads(cores)


def host_cases(args, common):
    """Those of host.py; as one suite among all it is left out where launches cannot be recorded."""
    try:
        yield from host.cases(**common, layers=2 if args.tiny else 12, op=lambda name: re.search(args.op, name))
    except ValueError as error:
        if args.verb != "all":
            fail(f"host: {error}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.compare:
        try:
            lines, slower = report.compare(*(read([path]) for path in args.compare))
        except ValueError as error:
            fail(str(error))
        print("\n".join(lines or ["no change beyond the noise"]))
        return 1 if slower else 0
    if args.verb == "gpu":
        if not args.dry_run and not torch.cuda.is_available():
            fail("gpu needs a CUDA device: there is none (--dry-run runs on a CPU)")
        return gpu.exit_code(gpu.run_all(args.out.resolve(), dry=args.dry_run, minutes=args.minutes))
    if args.verb == "finetune":
        tasks(args)
        return 0
    if args.verb != "report":
        run(args)
        return 0
    record = read(args.records)
    for path in (args.readme, args.xray):
        if path and not path.is_file():
            fail(f"{path}: no such file")
    if args.html:
        report.write_html(record, args.html, load_rows(args.xray) if args.xray else ())
    if args.csv:
        report.write_csv(record, args.csv)
    if args.readme:
        print("updated:", ", ".join(report.update_readme(args.readme, record)) or "nothing: no marks")
    if not (args.html or args.csv or args.readme):
        report.show(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
