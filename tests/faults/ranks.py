"""Two processes under torchrun, of which one is killed again and again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from minibert.data import Tokenizer, build_store, read_documents
from minibert.data.sample import write_sample_corpus
from minibert.train import checkpoint, latest, read_metrics

from .common import Tally

ROOT = Path(__file__).resolve().parents[2]


def killed(tally: Tally, count: int, directory: Path) -> None:
    """torchrun starts both anew, which go on from the newest checkpoint: every step is made, and logged once."""
    corpus = write_sample_corpus(directory / "topics.jsonl")
    texts = (line for document in read_documents(corpus) for line in document)
    build_store(corpus, directory / "store", Tokenizer.train(texts, 300))
    run_dir, steps = directory / "run", 12 + 12 * count
    command = (
        f"pretrain --data {directory / 'store'} --out {run_dir} --steps {steps} --accumulate 2"
        " --device cpu --arch.hidden_size 32 --arch.num_attention_heads 2 --arch.intermediate_size 48 --max-length 48"
        " --batch-tokens 512 --save-every 2 --log-every 1 --resume"
    )
    process = torchrun(f"--max-restarts {count}", command, directory / "output")
    rng, reached = random.Random(5), 0
    for n in range(count):
        with tally.trial(f"kill {n}"):
            reached = kill_one_after_a_checkpoint(process, run_dir, reached, rng)
    with tally.trial("the run", counts=False):
        assert process.wait(timeout=120) == 0
        output = (directory / "output").read_text()
        assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, steps + 1))
        assert latest(run_dir).name == f"step-{steps}"
        assert output.count("minibert pretrain\n") == count + 1  # one of the two says it, at each start
        assert output.count("│ checkpoint ") == 1


def torchrun(options, command, output):
    """torchrun as a process, all of whose output goes into a file."""
    launcher = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d"
    launcher += " --rdzv-endpoint localhost:0"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with open(output, "w") as file:
        return subprocess.Popen(
            [*launcher.split(), *options.split(), "-m", "minibert", *command.split()],
            env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_one_after_a_checkpoint(process, run_dir, known, rng):
    """SIGKILL to one of the two processes, as soon as there is a newer checkpoint than `known`. Returns its step."""
    while process.poll() is None:
        step = max(checkpoint.steps(run_dir), default=0)
        workers = children(process.pid)
        if step > known and len(workers) == 2:
            os.kill(rng.choice(workers), signal.SIGKILL)
            return step
        time.sleep(0.01)
    raise AssertionError(f"torchrun ended after step {known}")
