"""Encoder inference beside transformers: `python -m benchmarks.inference [--weights DIR] [--json FILE]`.

Same weights, same texts, turn by turn in one process; nothing is timed before its hidden states agree. Lengths are
those of the shipped reviews (short, uneven) and of texts of 128 tokens each (where packing has nothing to save).
"""

import argparse
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from minibert import BertModel, Tokenizer
from minibert.data.tasks import find_columns, read_examples
from minibert.demo import REVIEWS, minilm_directory
from minibert.integrations.parity import load_theirs
from minibert.integrations.speed import time_inference


def cases(tokenizer: Tokenizer) -> dict[str, dict]:
    """Name to the arguments of `time_inference`."""
    reviews = [example.texts[0] for example in read_examples(REVIEWS, find_columns(REVIEWS))]
    words = " ".join(reviews).split()
    full = [" ".join(words[i : i + 110]) for i in range(0, 16 * 110, 110)]
    full = [tokenizer.decode(tokenizer.encode(text)[1:127]) for text in full]  # 128 tokens with [CLS] and [SEP]
    return {
        "reviews, batch 32": {"texts": reviews[:256], "batch_size": 32},
        "reviews, batch 1": {"texts": reviews[:32], "batch_size": 1},
        "128 tokens, batch 8": {"texts": full, "batch_size": 8},
        "128 tokens, batch 1": {"texts": full[:8], "batch_size": 1},
    }


def machine() -> dict:
    """What a number needs to be one: hardware, versions, commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": metadata.version("transformers"), "commit": commit,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=None, help="Hugging Face directory; default MiniLM-L6")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None, help="file for the record")
    arguments = parser.parse_args()
    weights = arguments.weights or minilm_directory()
    tokenizer, ours = Tokenizer.from_pretrained(weights), BertModel.from_pretrained(weights)
    rows = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for attention in ("eager", "sdpa"):
            theirs = load_theirs(BertModel, weights, attention)
            for name, case in cases(tokenizer).items():
                timing = time_inference(ours, theirs, tokenizer, rounds=arguments.rounds, **case)
                rows.append({"case": name, "against": f"transformers {attention}"} | timing.to_dict())
    table = Table("case", "against", "threads", "load", "ours, tokens/s", "ratio", "20 to 80 %")
    for row in rows:
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        speed = f"{row['tokens'] / row['ours']:,.0f}"
        table.add_row(
            row["case"], row["against"], str(row["threads"]), f"{row['load']:.1f}", speed, f"{row['ratio']:.2f}", spread
        )
    Console(highlight=False, width=110).print(table)
    if arguments.json:
        record = {"machine": machine(), "weights": weights.name, "dtype": "float32", "rows": rows}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
