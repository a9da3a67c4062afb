"""Verbs on labelled text: finetune, evaluate, predict."""

import dataclasses
import json as jsonlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from torch import nn

from ..config import BertConfig, check_fractions
from ..data import PretrainingData
from ..data.records import SHOWN, Record
from ..data.report import figure_class
from ..data.sources import Source, find_splits
from ..data.spool import Spool
from ..data.tokenizer import Tokenizer
from ..explain import render_evaluation
from ..files import open_atomically, write_atomically
from ..hub import load_config
from ..tasks import (
    TASKS,
    Example,
    Task,
    head_of,
    make_task,
    pretraining,
    read_examples,
    read_texts,
    split_examples,
    task_of,
)
from ..tasks import evaluate as measure
from ..tasks import predict as answer
from ..tasks.base import CHUNK, printable
from ..tasks.finetune import ALPHA, check_lora
from ..tasks.finetune import finetune as fit
from ..train import OPTIMIZERS, SCHEDULES, NonFiniteError, Run, TrainConfig, World, read_trainer, resolve_model
from ..train.log import jsonable
from .common import (
    BadRecords,
    check_backend,
    check_causal,
    language_model,
    load,
    open_store,
    pick,
    print_json,
    print_result,
    refuse_taken,
    resolve_device,
    save_options,
    say,
)
from .flags import (
    Accumulate,
    Backend,
    BatchSize,
    Clip,
    CudaGraph,
    Decay,
    Device,
    Directory,
    Dtype,
    Json,
    KeepLast,
    LabelColumn,
    LogEvery,
    Lr,
    OnBadRecord,
    Options,
    Out,
    PairColumn,
    Parallel,
    Pickle,
    Resume,
    SaveEvery,
    Seed,
    SplitOnOom,
    Steps,
    TextColumn,
    Truncate,
    Warmup,
    WeightsDtype,
)
from .sweeping import grid, report_runs

RESULTS = "results.json"
TRAINING = """optimizer lr warmup schedule weight_decay layer_decay unfreeze clip accumulate split_on_oom cuda_graph ema
patience dtype save_every keep_last log_every parallel seed device"""
FITTING = """max_train batch_size group_by_length epochs steps eval_every scratch reinit_layers lora lora_alpha backend
allow_pickle resume"""


def finetune(
    *,
    out: Out,
    init: Annotated[str, "directory with the pretrained weights and their tokenizer"],
    task: Annotated[str, f"what to learn: {', '.join(TASKS)}"] = "classification",
    option: Options = {},  # noqa: B006
    data: Annotated[str | None, "a labelled file, or a folder of splits, as published: docs/finetuning.md"] = None,
    train: Annotated[list[str], "labelled files to learn from"] = (),
    valid: Annotated[list[str], "labelled files to choose the best checkpoint with"] = (),
    test: Annotated[list[str], "labelled files to report at the end"] = (),
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    on_bad_record: OnBadRecord = "fail",
    valid_fraction: Annotated[float, "share held out where no validation file is given"] = 0.1,
    test_fraction: Annotated[float, "share held out to report, where no test file is given"] = 0.0,
    max_train: Annotated[int | None, "learn from so many examples, drawn by the seed; None for all"] = None,
    max_length: Annotated[int | None, "tokens of a text; by default what the model takes"] = None,
    truncate: Truncate = False,
    class_weights: Annotated[str | None, "balanced: rare classes count as much as frequent ones in the loss"] = None,
    label_smoothing: Annotated[float, "share of a label that the loss spreads over all classes"] = 0.0,
    calibrate: Annotated[bool, "fit a temperature to the held-out examples, for probabilities that hold"] = False,
    scratch: Annotated[bool, "take the architecture and tokenizer of --init, and new weights"] = False,
    reinit_layers: Annotated[int, "draw new weights for so many of the last layers, and for the pooler"] = 0,
    lora: Annotated[int | None, "freeze the encoder, and learn additions of this rank to its weights"] = None,
    lora_alpha: Annotated[float, "the additions count alpha / rank"] = ALPHA,
    epochs: Annotated[float, "passes over the training examples, where --steps is not given"] = 3,
    steps: Steps = None,
    batch_size: BatchSize = 32,
    group_by_length: Annotated[
        bool, "batches of texts of about one length: faster on a CPU, where attention pads"
    ] = False,
    optimizer: Annotated[str, ", ".join(OPTIMIZERS)] = "adamw",
    lr: Lr = 5e-5,
    layer_decay: Annotated[
        float, "the rate of a layer over that of the one above; 0.9 moves the lower ones less"
    ] = 1.0,
    unfreeze: Annotated[float, "share of the run in which the layers begin to learn, from the last to the first"] = 0.0,
    warmup: Warmup = 0.1,
    schedule: Annotated[str, f"of the learning rate: {', '.join(SCHEDULES)}"] = "linear",
    weight_decay: Decay = 0.01,
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    split_on_oom: SplitOnOom = False,
    cuda_graph: CudaGraph = False,
    ema: Annotated[float | None, "average the weights, with this decay; evaluate and save the average"] = None,
    patience: Annotated[int | None, "stop after so many evaluations without a better result"] = None,
    eval_every: Annotated[int | None, "steps between evaluations; by default one an epoch"] = None,
    save_every: SaveEvery = None,
    keep_last: KeepLast = 1,
    log_every: LogEvery = 10,
    seed: Seed = 0,
    seeds: Annotated[int, "so many runs, with --seed and those after it: mean and standard deviation"] = 1,
    sweep: Annotated[
        dict[str, list[bool | int | float | str | None]], "a run for each: '{lr: [2e-5, 5e-5], epochs: [2, 3]}'"
    ] = {},  # noqa: B006
    learning_curve: Annotated[list[int], "a run for each number of training examples, and a picture"] = (),
    device: Device = "auto",
    dtype: Dtype = "float32",
    parallel: Parallel = "ddp",
    backend: Backend = "auto",
    resume: Resume = False,
    allow_pickle: Pickle = False,
) -> None:
    """Fine-tune for a task of docs/finetuning.md: classes, tags, answers, summaries, vectors ….

    Example: minibert finetune --data reviews.csv --init runs/tiny --out runs/reviews
    """
    options = dict(locals())
    check_fractions(valid_fraction=valid_fraction)
    if test_fraction:
        check_fractions(test_fraction=test_fraction)
    if seeds <= 0:
        raise ValueError(f"seeds={seeds} is not positive")
    World.current().check(accumulate, split_on_oom=split_on_oom, cuda_graph=cuda_graph)
    options["device"] = resolve_device(device)
    check_backend(backend, options["device"])
    source, runs, results = resolve_model(init), grid(options), {}
    options |= {"seeds": 1, "sweep": {}, "learning_curve": []}  # a run's config.yaml is of that run
    # what cannot be is refused before hours of work
    tasks = {folder: checked_task(options | changes) for folder, changes in runs.items()}
    if learning_curve:
        figure_class()  # where there is none, say so before hours of work
    for number, (folder, changes) in enumerate(runs.items(), 1):
        if len(runs) > 1:
            say(f"run {number} of {len(runs)}: {folder}")
        try:
            results[folder] = changes, one_run(tasks[folder], source, Path(out) / folder, options | changes)
        except NonFiniteError as error:
            if len(runs) == 1:
                raise
            say(f"left out: {error}")
    if not results:
        raise NonFiniteError(f"none of {len(runs)} runs ended well: try a lower lr")
    if len(runs) > 1 and World.current().is_main:
        report_runs(results, tasks[folder], Path(out), curve=bool(learning_curve))


def one_run(task: Task, source: Path, out: Path, options: dict[str, Any]) -> dict[str, dict]:
    """Fine-tune once; what the best checkpoint reaches, by split, and the number of examples it learned from."""
    parts, known = read_parts(task, options)

    def begin(run: Run, network: nn.Module) -> None:
        save_options(run, "finetune", options)
        say(", ".join(f"{split}: {len(examples):,} examples" for split, examples in parts.items()))
        if hasattr(task, "label_column") and network.config.num_labels > 1:
            say(f"classes: {SHOWN.repr(list(network.config.id2label))}")
        say(f"new parameters: {'all' if options['scratch'] else ', '.join(network.new_parameters) or 'none'}")
        if options["lora"]:
            few = sum(p.numel() for p in network.parameters() if p.requires_grad)
            say(f"trainable parameters: {few:,} of {sum(p.numel() for p in network.parameters()):,}")

    fit(task, parts, source, out, known=known, begin=begin, **pick(options, f"{TRAINING} {FITTING}"))
    examples = min(len(parts["train"]), options["max_train"] or len(parts["train"]))
    return {"train": {"examples": examples}} | (report_best(out, parts, options) if World.current().is_main else {})


def checked_task(options: dict[str, Any]) -> Task:
    """The task of a run, after looking at what else the run is asked for."""
    if options["max_train"] is not None and options["max_train"] <= 0:
        raise ValueError(f"max_train={options['max_train']} is not positive")
    check_lora(**pick(options, "lora lora_alpha scratch reinit_layers"))
    task = chosen_task(options)
    TrainConfig(**pick(options, TRAINING), steps=1, eval_every=1, best_metric=task.metric)
    return task


def chosen_task(options: dict[str, Any]) -> Task:
    """The task that the flags ask for; a flag that is not set leaves the task's own default."""
    names = "text_column pair_column label_column max_length truncate class_weights label_smoothing calibrate"
    given = {name: value for name, value in pick(options, names).items() if value is not None and value is not False}
    if not given["label_smoothing"]:
        given.pop("label_smoothing")  # a task without classes has no such option
    return make_task(options["task"], **given | options["option"])


def read_parts(task: Task, options: dict[str, Any]) -> tuple[dict[str, Sequence[Example]], Sequence[Example]]:
    """Examples by split: train, valid, and test where there is one with labels; and all that "train" was before any
    were held out, whose classes are known."""
    if (options["data"] is None) == (not options["train"]):
        raise ValueError("give --data or --train, one of the two")
    sources = find_splits(options["data"]) if options["data"] else {}
    sources |= {split: part_of(options[split], split) for split in ("train", "valid", "test") if options[split]}
    bad, parts, config = BadRecords(options["on_bad_record"]), {}, None
    for split, source in sources.items():  # "train" is the first
        examples = Spool(read_examples(task, source.records(bad), bad, config))
        if split == "test" and not options["test"] and examples and examples[0].target is None:
            say(f"{source.paths[0]}: it has no labels: left out")
            continue
        check_labelled(task, examples, source)
        parts[split] = examples
        if config is None and len(sources) > 1:
            config = BertConfig(**task.prepared(examples).config(examples))
            task = task.make(config.task_specific_params)
    bad.summary()
    known = parts["train"]
    for split, fraction in (("test", options["test_fraction"]), ("valid", options["valid_fraction"])):
        if split not in parts and fraction:
            parts["train"], parts[split] = split_examples(parts["train"], fraction, options["seed"])
    for split, examples in parts.items():
        if not examples:
            raise ValueError(
                f"{sources['train'].paths[0]}: too few examples to hold any out: name a file with --{split}"
            )
    return parts, known


def part_of(paths: list[str], *wanted: str, fits: Callable[[Source], bool] = lambda source: True) -> Source:
    """The first of the wanted splits that these files or this folder have, if there are several one that `fits`; or
    all there is where nothing is split."""
    found = find_splits(paths)
    if len(found) == 1:
        return next(iter(found.values()))
    there = [split for split in wanted if split in found]
    if not there:
        raise ValueError(f"{paths[0]} has {', '.join(found)}, and no {wanted[0]}: name a file")
    split = next((split for split in there if fits(found[split])), there[0])
    say(f"{paths[0]}: {split}")
    return found[split]


def has_labels(task: Task, source: Source) -> bool:
    """Whether one of its examples has one; also where none can be read, which is for its reader to say."""
    ignore, example = (lambda error: None), None
    for example in read_examples(task, source.records(ignore), ignore):
        if example.target is not None:
            return True
    return example is None


def check_labelled(task: Task, examples: Sequence[Example], source: Source) -> None:
    """Refuse a file of which every record was left out, and an example that nothing is known of."""
    if not examples:
        raise ValueError(f"{source.paths[0]}: none of its records can be used")
    bare = next((example for example in examples if example.target is None), None)
    if bare is None:
        return
    if "label_column" in (option.name for option in dataclasses.fields(task)):
        others = any(example.target is not None for example in examples)
        advice = ", others have" if others else ": name its column with --label-column"
        raise ValueError(f"{bare.where}: it has no label{advice}")
    raise ValueError(f"{bare.where}: it has no {' or '.join(task.answers)}")


def report_best(out: Path, parts: dict[str, Sequence[Example]], options: dict[str, Any]) -> dict[str, dict]:
    """Print and keep what the best checkpoint reaches on the held-out examples, and on the test set.

    A run that was done already when it was resumed has kept it.
    """
    splits, kept = [split for split in ("valid", "test") if split in parts], out / RESULTS
    if options["resume"] and kept.is_file() and list(results := jsonlib.loads(kept.read_text())) == splits:
        return results
    best = resolve_model(out)
    network = load(head_of(best), best, options["device"], options["backend"], False)
    task, tokenizer, results = task_of(network), Tokenizer.from_pretrained(best), {}
    for split in splits:
        results[split] = measure(task, network, tokenizer, parts[split])
        print_result({"split": split, **results[split], "checkpoint": str(best)}, as_json=False)
    write_atomically(kept, jsonlib.dumps(jsonable(results), indent=2) + "\n")
    return results


def evaluate(
    *,
    model: Directory,
    data: Annotated[list[str], "labelled files for a fine-tuned model; a token store or text for a pretrained one"],
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    on_bad_record: OnBadRecord = "fail",
    truncate: Truncate = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
    report: Annotated[str | None, "page to write, html: what a fine-tuned model reaches, its worst mistakes"] = None,
    objectives: Annotated[
        list[str], "of a pretrained model; by default those of its run, else those that it has heads for"
    ] = [],  # noqa: B006
) -> None:
    """Measure a model on labelled examples, or a pretrained one on text.

    Example: minibert evaluate --model runs/reviews --data test.csv --json
    """
    refuse_taken("report", report)
    source, device = resolve_model(model), resolve_device(device)
    tokenizer, kind = Tokenizer.from_pretrained(source), head_of(source, allow_pickle)
    if kind is None and report is not None:
        raise ValueError(f"{source} has no head of a task, whose mistakes --report would show: fine-tune it first")
    if kind is not None:
        network = load(kind, source, device, backend, allow_pickle, dtype)
        task, bad = with_flags(task_of(network), locals()), BadRecords(on_bad_record)
        check_complete(network, source)
        labelled = part_of(data, "test", "valid", fits=lambda source: has_labels(task, source))
        examples = list(read_examples(task, labelled.records(bad), bad, network.config))
        bad.summary()
        check_labelled(task, examples, labelled)
        predictions = list(answer(task, network, tokenizer, examples, chunk=len(examples)))
        result = task.measure(examples, predictions, network.config)
    else:
        network = load(language_model(load_config(source)), source, device, backend, allow_pickle, dtype)
        if any(name.startswith("mlm.") for name in network.new_parameters):
            raise ValueError(f"{source} has neither a task's head nor a masked-language-model head")
        result = evaluate_on_text(network, source, data, text_column or "text", seed, device, objectives)
    print_result(result, json)
    if report is not None:
        title = f"{model} on {', '.join(data)}"
        page = render_evaluation(task, examples, predictions, result, network.config, title)
        write_atomically(Path(report), page)
        say(f"the page is {report}")


def evaluate_on_text(
    network, source: Path, data: list[str], text_column: str, seed: int, device: str, objectives: list[str]
) -> dict:
    """The numbers of the objectives, or of those that the model has heads for, on a token store or on text."""
    pairs = not network.config.causal and not any(name.startswith("nsp.") for name in network.new_parameters)
    usual = ["clm"] if network.config.causal else ["mlm", "nsp"] if pairs else ["mlm"]
    chosen = objectives or learned_objectives(source) or usual
    check_causal(network.config, chosen)
    if not pairs and {"nsp", "sop"} & set(chosen):
        raise ValueError(f"{source} has no head for pairs: leave nsp and sop out of the objectives")
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(data, Path(folder) / "data", str(source), {"text_column": text_column})
        length = min(128, network.config.max_position_embeddings)
        if not objectives and "nsp" in chosen and store.num_documents < 2:
            say("one document has no other to draw random pairs from: next-sentence prediction is left out")
            chosen = ["mlm"]
        samples = PretrainingData(store, store.tokenizer, seed=seed, max_length=length, objectives=chosen)
        return pretraining.evaluate(network, samples.evaluation_batches(), device)


def learned_objectives(source: Path) -> list[str]:
    """What a checkpoint of `pretrain` learned; nothing where weights are all that there is."""
    with suppress(ValueError):
        return read_trainer(source)["settings"].get("objectives", [])
    return []


def predict(
    text: Annotated[list[str], "texts to read, with ||| between those of a pair, a question and context, and choices"],
    /,
    *,
    model: Directory,
    data: Annotated[list[str], "files of texts, instead of texts on the command line"] = (),
    out: Annotated[str | None, "jsonl file to write to, instead of stdout"] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    plain: Annotated[bool, "take a .txt for a text a line, also where its lines look like a labelled set's"] = False,
    on_bad_record: OnBadRecord = "fail",
    truncate: Truncate = False,
    device: Device = "auto",
    dtype: WeightsDtype = "float32",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Say what a fine-tuned model makes of texts, one at a time or a file of millions.

    Example: minibert predict --model runs/reviews "I love this product!"
    """
    if bool(text) == bool(data):
        raise ValueError("give texts on the command line or --data, one of the two")
    if plain and not data:
        raise ValueError("--plain says how files are read: name them with --data")
    refuse_taken("out", out)
    source = resolve_model(model)
    kind = head_of(source, allow_pickle)
    if kind is None:
        raise ValueError(f"{source} has no head of a task: fine-tune it first")
    network = load(kind, source, resolve_device(device), backend, allow_pickle, dtype)
    check_complete(network, source)
    task, bad = with_flags(task_of(network), locals()), BadRecords(on_bad_record)
    if data:
        records = part_of(data, "test", "valid").records(bad, lambda line: task.fields(*split_texts(line)), plain)
    else:
        records = (Record(f"text {number}", task.fields(*split_texts(one))) for number, one in enumerate(text, 1))
    examples = read_texts(task, records, bad)
    answers = answer(task, network, Tokenizer.from_pretrained(source), examples, places=bool(data))
    write_answers(map(printable, answers), task, out, json)
    bad.summary()


def check_complete(network: nn.Module, source: Path) -> None:
    if network.new_parameters:
        raise ValueError(f"{source} has no {', '.join(network.new_parameters)}: fine-tune it first")


def split_texts(text: str) -> list[str]:
    """The texts of a pair, or a question and what belongs to it, as they are typed: with ||| between them."""
    return [part.strip() for part in text.split("|||")]


def with_flags(task: Task, flags: dict[str, Any]) -> Task:
    """The model's task, with the columns and the truncation that are asked for here."""
    names = [field.name for field in dataclasses.fields(task)]
    columns = ("text_column", "pair_column", "label_column")
    columns = {name: flags[name] for name in columns if name in names and flags.get(name) is not None}
    return dataclasses.replace(task, truncate=task.truncate or flags["truncate"], **columns)


def write_answers(answers: Iterable[dict[str, Any]], task: Task, out: str | None, as_json: bool) -> None:
    """One line an answer as they come, on stdout or as jsonl in `out`; or one object on stdout."""
    if out is not None:
        with open_atomically(Path(out)) as file:
            count = 0
            for count, one in enumerate(answers, 1):
                file.write(jsonlib.dumps(one, ensure_ascii=False) + "\n")
                if count % CHUNK == 0:
                    say(f"{count:,} answers", end="\r")
        say(f"{count:,} answers in {out}")
    elif as_json:
        print_json({"predictions": list(answers)})
    else:
        for one in answers:
            print(task.line(one))
