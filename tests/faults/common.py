"""How trials are counted, a child process to kill, and a run that takes a second."""

import contextlib
import functools
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from minibert import BertConfig, BertForPreTraining, Tokenizer
from minibert.data import PretrainingData, TokenStore, build_store
from minibert.tasks.pretraining import evaluate
from minibert.train import Interrupted, Result, TrainConfig, train

STEPS = 24


class Tally:
    """How often a fault was tried, and what went wrong in those trials that did not hold."""

    def __init__(self):
        self.tried, self.held, self.problems = 0, 0, []

    @contextlib.contextmanager
    def trial(self, what: str, counts: bool = True) -> Iterator[None]:
        self.tried += counts
        try:
            yield
            self.held += counts
        except Exception as error:
            self.problems.append(f"{what}: {type(error).__name__}: {error}")


class NotHere(Exception):
    """This machine does not let the fault be made."""


def refusal(call: Callable, *kinds: type[Exception], names: object = "") -> Exception:
    """The error of one of these types that `call` raises, after checking that it is one line which names `names`."""
    try:
        call()
    except kinds as error:
        assert str(error) and "\n" not in str(error), f"not one line: {error}"
        assert str(names) in str(error), f"{names} is not named: {error}"
        return error
    raise AssertionError("nothing was refused")


def fork(work: Callable[[], object]) -> int:
    """The pid of a child that runs `work` in silence, and ends with 0, an interruption's own code, or 70."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        work()
        code = 0
    except Interrupted as interrupted:
        code = interrupted.exit_code
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """How a child ended: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL, "it had ended before"


@functools.cache
def corpus() -> tuple[TokenStore, tempfile.TemporaryDirectory]:
    """A store of forty short documents, and the folder that keeps it there."""
    folder = tempfile.TemporaryDirectory()
    words = np.array(["the", "cat", "dog", "bird", "sees", "likes", "hears", "moon", "tree", "river", "door", "old"])
    draws = np.random.default_rng(0)
    documents = [
        "\n".join(" ".join(draws.choice(words, draws.integers(4, 12))).capitalize() + "." for _ in range(12))
        for _ in range(40)
    ]
    text = Path(folder.name) / "corpus.txt"
    text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    tokenizer = Tokenizer.train(documents, 120)
    return build_store([text], Path(folder.name) / "store", tokenizer), folder


def samples(**changes) -> PretrainingData:
    store = corpus()[0]
    return PretrainingData(store, store.tokenizer, **{"seed": 3, "batch_tokens": 160, "max_length": 40} | changes)


def new_model(seed: int = 0) -> BertForPreTraining:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    vocab_size = corpus()[0].tokenizer.vocab_size
    return BertForPreTraining(
        BertConfig(vocab_size=vocab_size, max_position_embeddings=40, **sizes), backend="reference"
    )


def new_config(**changes) -> TrainConfig:
    usual = {"steps": STEPS, "lr": 3e-3, "accumulate": 2, "save_every": 4, "eval_every": 6, "best_metric": "loss"}
    return TrainConfig(**usual | {"log_every": 1, "seed": 5} | changes)


def run(run_dir: Path, *, model=None, data=None, resume: bool = False, **changes) -> tuple[torch.nn.Module, Result]:
    """Pretrain a fresh model, or the given one."""
    model, data = model or new_model(), data or samples()
    check = lambda model, limit: evaluate(model, data.evaluation_batches(2))  # noqa: E731
    result = train(
        model, data, check, new_config(**changes), run_dir, corpus()[0].tokenizer, resume, parts=data.parts
    )  # fmt: skip
    return model, result


def random_states(seed: int | None = None) -> tuple:
    """Those of Python, NumPy and torch; with a seed, after setting it."""
    if seed is not None:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    _, words, *rest = np.random.get_state()
    return random.getstate(), words.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def litter(run_dir: Path) -> list[str]:
    """What a half-written file or checkpoint left."""
    return [path.name for path in run_dir.iterdir() if path.name.endswith(".tmp")] if run_dir.is_dir() else []
