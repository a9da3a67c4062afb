"""What fine-tuning reaches on published sets: one table, mean and standard deviation over seeds, beside no learning.

Every line is `minibert finetune` with the flags it has here. What is done already is not made again, so that lines may
be made one by one and put together at the end. Of some lines transformers trains the same model: from the same weights,
on the same batches, at the same rates, with dropout bits of its own.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from minibert.batch import Batch
from minibert.data.rows import RowData
from minibert.data.sentences import split_sentences
from minibert.data.text import read_documents
from minibert.files import write_atomically
from minibert.tasks import Task, task_of
from minibert.tasks.base import Example, evaluate
from minibert.tasks.finetune import new_model, numbers
from minibert.train import TrainConfig
from minibert.train.optim import adamw

from . import peers

ARTICLES = 300  # whose first paragraphs are to be summaries
LEADS = f"leads-{ARTICLES}.jsonl"
FLAGS = "flags.txt"
BODY = range(8, 41)  # sentences of an article that is summarised
TIMED = 12  # steps of each side


@dataclass(frozen=True)
class Line:
    """data: below the folder of published sets; LEADS lies beside the runs. flags: of `minibert finetune`.
    metrics: of its runs.json.
    """

    data: str
    flags: str
    metrics: tuple[str, ...]
    theirs: bool = False


LINES = {
    "SST-2": Line(
        "glue/SST-2", "--epochs 1.2 --lr 1e-4 --batch-size 64 --eval-every 300", ("valid accuracy", "valid f1")
    ),
    "SST-2, part": Line("glue/SST-2", "--max-train 5000 --epochs 1 --lr 2e-4", ("valid accuracy", "valid f1"), True),
    "banking77": Line("banking77", "--epochs 4 --lr 3e-4", ("test accuracy", "test f1")),
    "CLINC150": Line(
        "clinc150/data_full.json", "--task intent --epochs 3 --lr 3e-4", ("test accuracy", "test out_of_scope_auroc")
    ),
    "SNIPS": Line("snips", "--task joint --epochs 2 --lr 3e-4", ("test intent_accuracy", "test f1")),
    "SNIPS, part": Line(
        "snips", "--task joint --max-train 2500 --epochs 3 --lr 3e-4", ("test intent_accuracy", "test f1"), True
    ),
    "SemEval-2010 task 8": Line("semeval2010_task8", "--task relation --epochs 4 --lr 3e-4", ("test f1",)),
    "CoLA": Line("glue/CoLA", "--epochs 3 --lr 8e-5", ("valid accuracy", "valid mcc")),
    "RTE": Line("glue/RTE", "--epochs 2 --lr 1e-4 --max-length 128 --truncate", ("valid accuracy",)),
    "STS-B": Line(
        "glue/STS-B", "--task embedding --max-train 2000 --epochs 1 --lr 2e-5", ("valid spearman", "valid pearson")
    ),
    "SQuAD, by article": Line(
        "squad/dev-v1.1.rebuilt.json",
        "--task qa --epochs 2 --lr 3e-4 --max-train 1500 --max-length 192 --option.stride 64 --eval-every 94",
        ("valid f1", "valid exact_match"),
    ),
    "Wikipedia leads": Line(
        LEADS,
        "--task summary --epochs 2 --lr 2e-4 --batch-size 8 --truncate",
        ("valid rouge1", "valid rouge2", "valid rougeL"),
    ),
}  # fmt: skip


def folder_of(out: Path, name: str) -> Path:
    return out / "".join(c if c.isalnum() else "-" for c in name.lower())


def write_leads(corpus: Path, file: Path, count: int = ARTICLES) -> None:
    """Articles as documents to summarise: the first paragraph is the summary of the sentences after it."""
    lines = []
    for number, (lead, *body) in enumerate(read_documents(corpus)):
        sentences = [sentence for paragraph in body for sentence in split_sentences(paragraph)][: BODY[-1]]
        if len(lead) > 200 and len(sentences) in BODY:
            lines.append(json.dumps({"id": number, "sentences": sentences, "summary": lead}))
        if len(lines) == count:
            break
    write_atomically(file, "\n".join(lines) + "\n")


def flags_of(line: Line, folder: Path, data: Path, init: Path, seeds: int, dtype: str) -> list[str]:
    """Those of `minibert finetune` that make a line in `folder`.

    Raises:
        ValueError: the folder was made with others.
    """
    flags = ["--data", str(data), "--init", str(init), "--out", str(folder), *line.flags.split(), "--dtype", dtype]
    flags += ["--seeds", str(seeds), "--group-by-length"]
    kept = folder / FLAGS
    if folder.exists() and (not kept.exists() or kept.read_text() != " ".join(flags)):
        raise ValueError(f"{folder} was not made with {' '.join(flags)}: name another folder with --runs")
    return flags


def ours(folder: Path, flags: list[str]) -> None:
    """`minibert finetune`, or nothing where that was done."""
    from minibert.cli import main as minibert  # its packages may be missing where kernels are timed

    resume = ["--resume"] if folder.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FLAGS, " ".join(flags))
    if not (folder / "runs.json").exists() and minibert(["finetune", *flags, *resume]):
        raise ValueError(f"{' '.join(flags)} did not end well")


@dataclass
class Trained:
    """One run of a line: its options, how it trained, the task, its examples, the network before the first step."""

    options: dict[str, Any]
    config: TrainConfig
    task: Task
    parts: dict[str, Sequence[Example]]
    network: nn.Module
    tokenizer: Any

    @classmethod
    def again(cls, run: Path) -> "Trained":
        """As `minibert finetune` has made them from this run's config.yaml."""
        import yaml

        from minibert.cli.finetuning import chosen_task, read_parts

        options = yaml.safe_load((run / "config.yaml").read_text())
        task = chosen_task(options)
        parts, known = read_parts(task, options)
        network, tokenizer, parts = new_model(
            task, parts, options["init"], options["seed"], options["max_train"], known=known
        )
        config = TrainConfig(**json.loads((run / "run.json").read_text())["config"])
        return cls(options, config, task_of(network), parts, network, tokenizer)

    def data(self) -> RowData:
        rows = self.task.encode(self.tokenizer, self.parts["train"], self.network.config)
        chosen = {name: self.options[name] for name in ("batch_size", "seed", "group_by_length")}
        return RowData(rows, together=self.task.together, dtype=self.task.dtype, **chosen)

    def counterpart(self) -> peers.TransformersTask:
        """transformers' model of the same weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.network.save_pretrained(folder, self.tokenizer)
            return peers.TransformersTask(Path(folder), self.network)


def without_learning(run: Path, line: Line) -> dict[str, float]:
    """The commonest label of the training set, the first sentences, or the head before its first step."""
    it, metrics = Trained.again(run), line.metrics
    split = metrics[0].split()[0]
    if it.task.name == "summary":
        found = numbers(evaluate(it.task, it.network, it.tokenizer, it.parts[split]))
        return {metric: found[f"lead_{metric.split()[1]}"] for metric in metrics}
    if it.task.name == "classification":
        label = Counter(example.target for example in it.parts["train"]).most_common(1)[0][0]
        return {metrics[0]: mean(example.target == label for example in it.parts[split])}
    if it.task.name not in ("qa", "embedding"):
        return {}
    found = numbers(evaluate(it.task, it.network.eval(), it.tokenizer, it.parts[split]))
    return {metric: found[metric.split()[1]] for metric in metrics}


def theirs(run: Path, line: Line) -> dict[str, Any]:
    """transformers' model in the place of ours: what its best checkpoint reaches, by split."""
    it = Trained.again(run)
    data, model, metric = it.data(), it.counterpart(), it.task.metric
    step = stepper(model, model.loss, it.config)
    best, cursor = {}, 0
    for number in range(it.config.steps):
        batch, cursor = data.next_batch(cursor)
        step(batch, number)
        if (number + 1) % it.config.eval_every == 0 or number + 1 == it.config.steps:
            found = numbers(evaluate(it.task, model, it.tokenizer, it.parts["valid"]))
            if not best or found[metric] > best["valid"][metric]:
                others = it.parts.keys() - {"train", "valid"}
                best = {split: numbers(evaluate(it.task, model, it.tokenizer, it.parts[split])) for split in others}
                best["valid"] = found
    return best


def stepper(model: nn.Module, loss: Callable[[Batch], torch.Tensor], config: TrainConfig):
    """A training step as in `minibert.train`: the same groups, rates and clipping."""
    optimizer = adamw(model.train(), config.lr, config.weight_decay)

    def step(batch: Batch, number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(config.progress(number, 0.0))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_times(run: Path, line: Line) -> dict[str, float]:
    """Seconds of a training step, ours and theirs in turn on the same batches: medians, and of the ratio."""
    it = Trained.again(run)
    model = it.counterpart()
    sides = {
        "ours": stepper(it.network, lambda batch: it.network(batch).loss, it.config),
        "theirs": stepper(model, model.loss, it.config),
    }
    data, cursor, taken = it.data(), 0, {side: [] for side in sides}
    for number in range(TIMED + 2):
        batch, cursor = data.next_batch(cursor)
        for side, step in sides.items():
            start = time.perf_counter()
            step(batch, number)
            taken[side].append(time.perf_counter() - start)
    taken = {side: times[2:] for side, times in taken.items()}  # without what the first steps make ready
    ratio = median(b / a for a, b in zip(taken["ours"], taken["theirs"], strict=True))
    return {side: median(times) for side, times in taken.items()} | {"ratio": ratio}


def results(
    data: Path, out: Path, init: Path, *, corpus: Path | None, only: Sequence[str], seeds: int, dtype: str
) -> Iterator[dict[str, Any]]:
    """The rows of the table: all lines, or `only` these. What is not in `out` yet is made first.

    Raises:
        ValueError: a folder was made with other flags, which is said before anything is made; a run did not end well.
    """
    todo = {}
    for name, line in LINES.items():
        if not only or name in only:
            folder, source = folder_of(out, name), (out if line.data == LEADS else data) / line.data
            todo[name] = line, folder, source, flags_of(line, folder, source, init, seeds, dtype)
    for name, (line, folder, source, flags) in todo.items():
        if line.data == LEADS and corpus is not None and not source.exists():
            write_leads(corpus, source)
        if not (folder / "runs.json").exists() and not source.exists():
            print(f"{name}: left out: there is no {source}", file=sys.stderr)
            continue
        ours(folder, flags)
        yield row_of(name, line, folder)


def row_of(name: str, line: Line, folder: Path) -> dict[str, Any]:
    """What is known of a line. What stands beside our numbers is computed once, and kept beside the runs."""
    [cell] = json.loads((folder / "runs.json").read_text())["cells"]
    runs, kept = [folder / run for run in cell["runs"]], folder / "beside.json"
    record = json.loads((runs[0] / "run.json").read_text())
    beside = json.loads(kept.read_text()) if kept.exists() else {}
    for part, make, of_runs in (
        ("without", without_learning, runs), ("theirs", theirs, runs), ("step", step_times, runs[:1])
    ):  # fmt: skip
        if len(beside.get(part, ())) != len(of_runs) and (line.theirs or part == "without"):
            beside[part] = [make(run, line) for run in of_runs]
            write_atomically(kept, json.dumps(beside, indent=1) + "\n")
    row = {
        "suite": "finetune", "case": name, "provider": "minibert", "flags": line.flags, "runs": len(runs),
        "examples": cell["examples"], "minutes": mean(minutes(run) for run in runs),
        "cpu": record["machine"]["processor"], "threads": record["machine"]["threads"],
        "dtype": record["config"]["dtype"], "commit": (record["git"] or {}).get("commit"),
        "numbers": {metric: cell["numbers"][metric] for metric in line.metrics},
        "without": {metric: mean(found[metric] for found in beside["without"]) for metric in beside["without"][0]},
    }  # fmt: skip
    if line.theirs:
        from minibert.cli.sweeping import spread

        found = {metric: [of(run, metric) for run in beside["theirs"]] for metric in line.metrics}
        row |= {"step": beside["step"][0], "theirs": {metric: spread(values) for metric, values in found.items()}}
    return row


def of(found: dict[str, dict[str, float]], metric: str) -> float:
    split, name = metric.split()
    return found[split][name]


def minutes(run: Path) -> float:
    """Of all the processes that made it: the clock of each begins at zero."""
    seconds = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(one for one, then in zip(seconds, [*seconds[1:], 0], strict=True) if then < one) / 60


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a set, and below it one a set that transformers learned, too."""
    lines = ["| set | `minibert finetune` with | examples | minutes | reached | without learning |", "|---" * 6 + "|"]
    for row in rows:
        reached = [f"{metric} **{shown(number)}**" for metric, number in row["numbers"].items()]
        without = [f"{number:.3f}" for number in row["without"].values()]
        lines.append(
            f"| {row['case']} | `{row['flags']}` | {row['examples']:,} | {row['minutes']:.1f} | {', '.join(reached)} | "
            f"{', '.join(without) or '–'} |"
        )
    both = [row for row in rows if "theirs" in row]
    if both:
        lines += ["", "| set | metric | minibert | transformers | a step takes them |", "|---" * 5 + "|"]
        lines += [
            f"| {row['case']} | {metric} | {shown(number)} | {shown(row['theirs'][metric])} | "
            f"{row['step']['ratio']:.2f} × our time |"
            for row in both
            for metric, number in row["numbers"].items()
        ]
    return "\n".join(lines)


def shown(number: dict[str, float | None]) -> str:
    if number["mean"] is None:  # undefined, as a correlation with what is always the same
        return "–"
    return f"{number['mean']:.3f}" + (f" ± {number['sd']:.3f}" if number["sd"] is not None else "")
