"""Verbs on labelled text: finetune, evaluate, predict."""

import hashlib
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from minibert_kernels.philox import fold, uniform

from ..config import one_of
from ..data import PretrainingData
from ..data.tasks import (
    Columns,
    Example,
    LabelledData,
    encode_labels,
    encode_texts,
    find_columns,
    find_splits,
    label_names,
    read_examples,
    split_examples,
)
from ..data.tokenizer import Tokenizer
from ..hub import load_config
from ..model import BertForSequenceClassification
from ..tasks import pretraining
from ..tasks.classification import evaluate as measure
from ..tasks.classification import kind_of
from ..tasks.classification import predict as label
from ..train import TrainConfig, World, claim
from ..train import train as fit
from .common import (
    check_backend,
    check_causal,
    check_fractions,
    language_model,
    load,
    model_kind,
    open_store,
    pick,
    print_answers,
    print_result,
    resolve_device,
    resolve_model,
    save_options,
    say,
)
from .flags import (
    Accumulate,
    Backend,
    BatchSize,
    Clip,
    Decay,
    Device,
    Directory,
    Dtype,
    Json,
    KeepLast,
    LabelColumn,
    LogEvery,
    Lr,
    Out,
    PairColumn,
    Pickle,
    Resume,
    SaveEvery,
    Seed,
    SplitOnOom,
    Steps,
    TextColumn,
    Truncate,
    Warmup,
)


def finetune(
    *,
    out: Out,
    init: Annotated[str, "directory with the pretrained weights and their tokenizer"],
    data: Annotated[
        str | None, "one labelled file (csv, tsv, jsonl), or a folder with train, dev and test files"
    ] = None,
    train: Annotated[str | None, "labelled file to learn from"] = None,
    valid: Annotated[str | None, "labelled file to choose the best checkpoint with"] = None,
    test: Annotated[str | None, "labelled file to report at the end"] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    task: Annotated[str, "classification or regression"] = "classification",
    valid_fraction: Annotated[float, "share held out where no validation file is given"] = 0.1,
    max_train: Annotated[int | None, "learn from so many examples, drawn by the seed; None for all"] = None,
    max_length: Annotated[int | None, "tokens of a text; by default what the model takes"] = None,
    truncate: Truncate = False,
    epochs: Annotated[float, "passes over the training examples, where --steps is not given"] = 3,
    steps: Steps = None,
    batch_size: BatchSize = 32,
    lr: Lr = 5e-5,
    warmup: Warmup = 0.1,
    weight_decay: Decay = 0.01,
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    split_on_oom: SplitOnOom = False,
    eval_every: Annotated[int | None, "steps between evaluations; by default one an epoch"] = None,
    save_every: SaveEvery = None,
    keep_last: KeepLast = 1,
    log_every: LogEvery = 10,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    resume: Resume = False,
    allow_pickle: Pickle = False,
) -> None:
    """Fine-tune for classification or regression of texts or pairs.

    Example: minibert finetune --data reviews.csv --init runs/tiny --out runs/reviews
    """
    options = dict(locals())
    one_of("task", task, ("classification", "regression"))
    check_fractions(valid_fraction=valid_fraction)
    for name in ("batch_size", "epochs", "max_train", "accumulate", "max_length"):
        if options[name] is not None and options[name] <= 0:
            raise ValueError(f"{name}={options[name]} is not positive")
    World.current().check(accumulate, split_on_oom)
    device, source = resolve_device(device), resolve_model(init)
    check_backend(backend, device)
    parts = read_parts(options)
    names = label_names(parts["train"]) if task == "classification" else ("value",)
    network, tokenizer = new_classifier(source, names, options)
    longest = min(max_length or math.inf, network.config.max_position_embeddings)
    sets = {
        split: LabelledData(
            *encode_texts(tokenizer, examples, longest, truncate),
            encode_labels(examples, task, names),
            batch_size=batch_size,
            seed=seed,
        )
        for split, examples in parts.items()
    }
    epoch = max(1, math.ceil(len(parts["train"]) / batch_size / accumulate))
    config = TrainConfig(
        **pick(
            options, "lr warmup weight_decay clip accumulate split_on_oom seed dtype save_every keep_last log_every"
        ),
        steps=max(1, round(epochs * epoch)) if steps is None else steps,
        eval_every=epoch if eval_every is None else eval_every,
        device=device,
        best_metric="pearson" if task == "regression" else "accuracy",
        best_mode="higher",
    )
    with claim(out, resume) as run:
        save_options(run, "finetune", options)
        say(", ".join(f"{split}: {len(examples):,} examples" for split, examples in parts.items()))
        say(f"new parameters: {', '.join(network.new_parameters) or 'none'}")
        counts = {split: len(examples) for split, examples in parts.items()}
        settings = {"task": task, "batch_size": batch_size, "examples": counts, "backend": backend}
        settings["data"] = {split: data_hash(part) for split, part in sets.items()}
        check = lambda network, limit: _numbers(measure(network, sets["valid"]))  # noqa: E731
        fit(network, sets["train"], check, config, run, tokenizer, settings=settings)
    if World.current().leads:
        report_best(out, sets, backend, device)


def data_hash(part: LabelledData) -> str:
    """SHA-256 of the ids, types and labels: what a resumed run must find again."""
    return hashlib.sha256(repr((part.ids, part.types, part.labels.tolist())).encode()).hexdigest()


def read_parts(options: dict[str, Any]) -> dict[str, list[Example]]:
    """Examples by split: train, valid, and test where there is one with labels."""
    if (options["data"] is None) == (options["train"] is None):
        raise ValueError("give --data or --train, one of the two")
    files = find_splits(options["data"]) if options["data"] else {"train": Path(options["train"])}
    files |= {split: Path(options[split]) for split in ("valid", "test") if options[split]}
    columns = find_columns(files["train"], options["text_column"], options["pair_column"], options["label_column"])
    if columns.label is None:
        raise ValueError(f"{files['train']}: no label column: name it with --label-column")
    parts = {}
    for split, file in files.items():
        if split == "test" and find_columns(file, columns.text, columns.pair).label is None and not options["test"]:
            say(f"{file}: it has no labels: left out")
            continue
        parts[split] = read_examples(file, columns)
    if "valid" not in parts:
        parts["train"], parts["valid"] = split_examples(parts["train"], options["valid_fraction"], options["seed"])
    if not parts["train"]:
        raise ValueError(f"{files['train']}: nothing is left to learn from beside the held-out examples")
    limit = options["max_train"]
    if limit is not None and limit < len(parts["train"]):
        order = np.argsort(uniform(fold(options["seed"], 0x11317), np.arange(len(parts["train"]))), kind="stable")
        parts["train"] = [parts["train"][i] for i in sorted(order[:limit])]
    return parts


def new_classifier(source: Path, names: tuple[str, ...], options: dict[str, Any]):
    """The classifier on the weights of `source`, and their tokenizer."""
    torch.manual_seed(options["seed"])
    kind = "regression" if options["task"] == "regression" else "single_label_classification"
    network = BertForSequenceClassification.from_pretrained(
        source,
        backend=options["backend"],
        allow_pickle=options["allow_pickle"],
        id2label=names,
        problem_type=kind,
    )
    return network, Tokenizer.from_pretrained(source)


def report_best(out: str, sets: dict[str, LabelledData], backend: str, device: str) -> None:
    """Print what the best checkpoint reaches on the held-out examples, and on the test set where there is one."""
    best = resolve_model(out)
    network = load(BertForSequenceClassification, best, device, backend, allow_pickle=False)
    for split in ("valid", "test"):
        if split in sets:
            print_result({"split": split, **measure(network, sets[split]), "checkpoint": str(best)}, as_json=False)


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in result.items() if isinstance(value, float)}


def evaluate(
    *,
    model: Directory,
    data: Annotated[list[str], "a labelled file for a classifier; a token store or text for a pretrained model"],
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "auto",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
    objectives: Annotated[
        list[str], "of a pretrained model; by default clm of a causal one, else mlm, and nsp where there is its head"
    ] = [],  # noqa: B006
) -> None:
    """Measure a model on labelled examples, or a pretrained one on text.

    Example: minibert evaluate --model runs/reviews --data test.csv --json
    """
    source, device = resolve_model(model), resolve_device(device)
    tokenizer = Tokenizer.from_pretrained(source)
    if model_kind(source, allow_pickle) is BertForSequenceClassification:
        network = load(BertForSequenceClassification, source, device, backend, allow_pickle)
        columns = find_columns(data[0], text_column, pair_column, label_column)
        if columns.label is None:
            raise ValueError(f"{data[0]}: no label column: name it with --label-column")
        examples = [example for path in data for example in read_examples(path, columns)]
        encoded = encode_texts(tokenizer, examples, network.config.max_position_embeddings, truncate)
        labels = encode_labels(examples, kind_of(network), network.config.id2label)
        result = measure(network, LabelledData(*encoded, labels, batch_size=batch_size, seed=seed))
    else:
        network = load(language_model(load_config(source)), source, device, backend, allow_pickle)
        if any(name.startswith("mlm.") for name in network.new_parameters):
            raise ValueError(f"{source} has neither a classifier nor a masked-language-model head: nothing to evaluate")
        result = evaluate_on_text(network, source, data, text_column or "text", seed, device, objectives)
    print_result(result, json)


def evaluate_on_text(
    network, source: Path, data: list[str], text_column: str, seed: int, device: str, objectives: list[str]
) -> dict:
    """The numbers of the objectives, or of those that the model has heads for, on a token store or on text."""
    pairs = not network.config.causal and not any(name.startswith("nsp.") for name in network.new_parameters)
    chosen = objectives or (["clm"] if network.config.causal else ["mlm", "nsp"] if pairs else ["mlm"])
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


def predict(
    text: Annotated[list[str], "texts to label"],
    /,
    *,
    model: Directory,
    data: Annotated[str | None, "a file of texts (csv, tsv, jsonl), instead of texts on the command line"] = None,
    out: Annotated[str | None, "jsonl file to write to, instead of stdout"] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    truncate: Truncate = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    backend: Backend = "auto",
    allow_pickle: Pickle = False,
    json: Json = False,
) -> None:
    """Label texts: label and probability of each.

    Example: minibert predict --model runs/reviews "I love this product!"
    """
    if bool(text) == (data is not None):
        raise ValueError("give texts on the command line or --data, one of the two")
    if out is not None and (Path(out).exists() or not Path(out).parent.is_dir()):
        raise ValueError(f"--out {out}: expected a new file in a directory that exists")
    source = resolve_model(model)
    network = load(BertForSequenceClassification, source, resolve_device(device), backend, allow_pickle)
    if network.new_parameters:
        raise ValueError(f"{source} has no classifier: fine-tune it first")
    if data is None:
        empty = [t for t in text if not t.strip()]
        if empty:
            raise ValueError(f"text={empty[0]!r} is empty")
        examples = [Example((t,), None, f"text {i}") for i, t in enumerate(text, 1)]
    else:
        columns = find_columns(data, text_column, pair_column)
        examples = read_examples(data, Columns(text=columns.text, pair=columns.pair, label=None))
    answers = list(
        label(network, Tokenizer.from_pretrained(source), examples, truncate=truncate, batch_size=batch_size)
    )
    print_answers(answers, out, json)
