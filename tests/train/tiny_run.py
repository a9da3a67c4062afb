"""A BERT of a few thousand weights, an endless stream of made-up samples, and a fork to kill."""

import os
import signal
import time

import numpy as np
import torch

from minibert.batch import pack
from minibert.config import BertConfig
from minibert.data import OBJECTIVES
from minibert.model import BertForPreTraining, BertForSequenceClassification
from minibert.train import TrainConfig, mean_over_sequences, train

CONFIG = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=20,
    max_position_embeddings=16,
)


def pretraining_parts(batch):
    return {f"{name}_loss": OBJECTIVES[name].count(batch) for name in ("mlm", "nsp")}


KINDS = {
    "classification": (BertForSequenceClassification, mean_over_sequences),
    "pretraining": (BertForPreTraining, pretraining_parts),
}


class Stream:
    """Samples that are functions of their number, cut into batches of the given sizes in turn.

    `before(cursor)` is called before a batch is made.
    """

    def __init__(self, kind="classification", sizes=(5,), before=lambda cursor: None):
        self.kind, self.before = kind, before
        self.edges = np.cumsum((0, *sizes))

    def next_batch(self, cursor):
        self.before(cursor)
        end = self.skip(cursor)
        return self.make(range(cursor, end)), end

    def skip(self, cursor):
        period = int(self.edges[-1])
        return cursor - cursor % period + int(self.edges[self.edges > cursor % period][0])

    def make(self, numbers):
        draws = [np.random.default_rng(number) for number in numbers]
        sequences = [rng.integers(5, 37, rng.integers(4, 12)) for rng in draws]
        starts = np.cumsum([0, *map(len, sequences)])
        classes = torch.tensor([int(sequence[0] > 20) for sequence in sequences])
        if self.kind == "classification":
            return pack(sequences, seq_ids=numbers, labels=classes)
        # the more labelled tokens the longer: micro-batches differ in their counts
        rows = [starts[i] + np.arange(1, 1 + len(sequence) // 3) for i, sequence in enumerate(sequences)]
        rows = torch.from_numpy(np.concatenate(rows))
        tokens = torch.from_numpy(np.concatenate(sequences))
        return pack(sequences, seq_ids=numbers, mlm_rows=rows, mlm_labels=tokens[rows], nsp_labels=classes)


def make_model(kind="classification", seed=7, **changes):
    torch.manual_seed(seed)
    return KINDS[kind][0](CONFIG.replace(**changes), backend="reference")


def make_config(**changes):
    return TrainConfig(
        **{"steps": 10, "lr": 3e-3, "warmup": 0.2, "save_every": 3, "log_every": 1, "seed": 11} | changes
    )


def run(
    run_dir,
    kind="classification",
    *,
    config=None,
    data=None,
    evaluate=None,
    model=None,
    resume=False,
    settings=None,
    weights=None,
):
    """Train a fresh model, or the given one, and return it with the result."""
    model = make_model(kind) if model is None else model
    data = Stream(kind) if data is None else data
    parts = KINDS[kind][1]
    result = train(
        model,
        data,
        evaluate,
        config or make_config(),
        run_dir,
        resume=resume,
        parts=parts,
        settings=settings,
        weights=weights,
    )
    return model, result


def evaluate_loss(model, eval_batches):
    """Loss on samples that are far down the stream; asks that it runs without dropout and gradients."""
    assert not model.training and not torch.is_grad_enabled()
    return {"loss": model(Stream().make(range(1000, 1013))).loss.item(), "batches": eval_batches or 0}


class Fork:
    """A child process that runs `work` and never comes back."""

    def __init__(self, work):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 2)
                work()
            finally:
                os._exit(0)

    def kill_after(self, seconds):
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
