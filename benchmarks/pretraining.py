"""A short pretraining run with its loss curve, on the text that is always there: this project's own documents and code.

It shows that a whole model learns with the kernels on this machine, and how fast; not how good a model gets: the text
is small, so a long run learns it by heart. The held-out loss says when.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path

import torch

from minibert import BertForPreTraining, Tokenizer
from minibert.config import BertConfig
from minibert.data import PretrainingData, build_store
from minibert.tasks.pretraining import evaluate
from minibert.train.optim import adamw
from minibert_kernels.philox import fold

from . import shared_work
from .measure import probe
from .training import step_flops

ROOT = Path(__file__).parent.parent
ENDING = 8  # seconds for the last evaluation, the probe and the picture
LR, WARMUP = 2e-4, 0.1  # the share of the time in which the learning rate rises


def texts() -> tuple[list[str], list[str]]:
    """Documents to train on and, one in ten, held out; a document is one file, a line one sentence."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    paths += [
        path for folder in ("minibert", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    documents = ["\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
                 for path in sorted(paths)]  # fmt: skip
    documents = [text for text in documents if text.count("\n") > 3]
    return [text for i, text in enumerate(documents) if i % 10], documents[::10]


def parts(folder: Path, vocab_size: int, tokens: int, length: int):
    """Tokenizer, and the batches to train on and to evaluate on; the stores go under `folder`."""
    train, held_out = texts()
    tokenizer = Tokenizer.train([line for text in train for line in text.split("\n")], vocab_size)
    stores = []
    for name, documents in (("train", train), ("held_out", held_out)):
        (folder / f"{name}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
        store = build_store([folder / f"{name}.txt"], folder / name, tokenizer)
        stores.append(PretrainingData(store, tokenizer, max_length=length, batch_tokens=tokens))
    return tokenizer, *stores


def run(folder: Path, dry: bool) -> dict:
    """Train for the time that STAGE_SECONDS leaves; loss by second, useful tokens/s, MFU, and the held-out numbers."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    tokens, length, every = (128, 32, 1) if dry else (32768, 128, 20)
    tokenizer, data, held_out = parts(Path(tempfile.mkdtemp(dir=folder)), 500 if dry else 8192, tokens, length)
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64} if dry else {}
    config = BertConfig.preset("bert-tiny" if dry else "bert-base", vocab_size=tokenizer.vocab_size, **small)
    model = BertForPreTraining(config, backend="triton").to(device)
    optimizer = adamw(model, lr=LR)
    check = [batch for batch, _ in islice(held_out.batches(), 2 if dry else 8)]
    before = evaluate(model, check, device)

    def learn(batch, step):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = model(batch.to(device), seed=fold(0, step))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out

    for group in optimizer.param_groups:
        group["lr"] = 0.0
    learn(data.next_batch(0)[0], 0)  # compiles the kernels, and learns nothing
    budget = 5 if dry else min(shared_work.seconds_left(ENDING), 180)
    curve, done, flops, start = [], 0, 0.0, time.perf_counter()
    for step, (batch, _) in enumerate(data.batches()):
        share = (time.perf_counter() - start) / budget
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LR * min(share / WARMUP, (1 - share) / (1 - WARMUP), 1)
        out = learn(batch, step)
        done += batch.num_tokens
        flops += step_flops(config, batch.lengths, len(batch.mlm_rows))
        if step % every == 0:  # reading the loss waits for the device
            row = {"step": step, "seconds": time.perf_counter() - start}
            curve.append(row | {"loss": out.loss.item(), "mlm_loss": out.mlm_loss.item()})
            shared_work.save(folder / shared_work.RESULT, {"curve": curve, "lines": [losses(curve)]})
    if device == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - start
    after = evaluate(model, check, device)
    draw(curve, folder / "curve.svg")
    mfu = flops / spent / probe(dtype, device).flops
    lines = [
        f"{step} steps in {spent:.0f} s, {done / spent:,.0f} useful tokens/s, {mfu:.1%} of the matrix peak",
        f"held out: mlm_loss {before['mlm_loss']:.3f} to {after['mlm_loss']:.3f}, "
        f"mlm_accuracy {before['mlm_accuracy']:.3f} to {after['mlm_accuracy']:.3f}",
    ]
    return {"curve": curve, "before": before, "after": after, "tokens_per_second": done / spent, "mfu": mfu,
            "lines": lines}  # fmt: skip


def losses(curve: list[dict]) -> str:
    return "loss: " + " ".join(f"{row['loss']:.2f}" for row in curve[:: max(len(curve) // 20, 1)])


def draw(curve: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([row["seconds"] for row in curve], [row["mlm_loss"] for row in curve])
    axes.set(xlabel="seconds", ylabel="masked language model loss, training batches")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
