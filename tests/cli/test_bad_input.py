"""Each wrong input ends in one line that names it, with exit code 2, and leaves nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minibert import BertConfig, BertForSequenceClassification, Tokenizer
from minibert.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the lamp is good bad kettle film soup was not very kind of broken and we like it"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([" ".join(WORDS)] * 3, 120)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=30, max_position_embeddings=16, id2label=("negative", "positive"),
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory, tokenizer)
    return directory


@pytest.fixture
def files(tmp_path, checkpoint):
    """Named inputs, good and bad."""
    good = "".join(
        f"the {a} was {b},{'positive' if b == 'good' else 'negative'}\n" for a in WORDS for b in ("good", "bad")
    )
    content = {
        "good.csv": "text,label\n" + good,
        "one_class.csv": "text,label\nthe lamp is good,positive\nthe film is good,positive\nsoup,positive\n",
        "empty.csv": "",
        "long.csv": "text,label\n" + " ".join(WORDS * 3) + ",positive\nbad soup,negative\nbad,negative\n",
        "strange.csv": "text,label\nthe lamp,neutral\n",
        "empty.txt": "",
        "corpus.txt": "\n\n".join(". ".join(" ".join(WORDS[i:] + WORDS[:i]) for _ in range(4)) for i in range(12)),
        "broken.yaml": "steps: [1, 2",
        "unknown.yaml": "stepz: 3\n",
        "broken.jsonl": '{"text": "a", "label": "x"}\n{"text": \n',
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,positive\nthé,negative\n".encode("latin-1"))
    (tmp_path / "no_model").mkdir()
    for name, damage in (
        ("truncated", lambda raw: raw[:-40]),
        ("flipped", lambda raw: raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:]),
    ):
        copy = tmp_path / name
        copy.mkdir()
        for file in checkpoint.iterdir():
            raw = file.read_bytes()
            (copy / file.name).write_bytes(damage(raw) if file.name == "model.safetensors" else raw)
    return tmp_path


FINETUNE = "finetune --init {checkpoint} --out {out} "
PRETRAIN = "pretrain --out {out} --steps 2 --vocab-size 100 --batch-tokens 64 "
CASES = {
    "missing labelled file": (FINETUNE + "--data {dir}/nowhere.csv", "nowhere.csv: no such file"),
    "empty labelled file": (FINETUNE + "--data {dir}/empty.csv", "empty.csv: it holds no records"),
    "unreadable encoding": (FINETUNE + "--data {dir}/latin.csv", "not UTF-8"),
    "broken json": (FINETUNE + "--data {dir}/broken.jsonl", "broken.jsonl:2: broken JSON"),
    "unknown column": (FINETUNE + "--data {dir}/good.csv --label-column lable", "did you mean 'label'?"),
    "label that is no number": (
        FINETUNE + "--data {dir}/good.csv --task regression",
        "label='positive' is not a number",
    ),
    "one class only": (FINETUNE + "--data {dir}/one_class.csv", "every label is 'positive': two classes are needed"),
    "text too long": (FINETUNE + "--data {dir}/long.csv", "use --truncate"),
    "unknown task": (FINETUNE + "--data {dir}/good.csv --task regresion", "did you mean 'regression'?"),
    "negative batch size": (FINETUNE + "--data {dir}/good.csv --batch-size -3", "batch_size=-3 is not positive"),
    "no checkpoint": (
        "finetune --data {dir}/good.csv --out {out} --init {dir}/no_model",
        "no_model is not a checkpoint",
    ),
    "truncated weights": ("finetune --data {dir}/good.csv --out {out} --init {dir}/truncated", "manifest.json says"),
    "flipped weights": ("finetune --data {dir}/good.csv --out {out} --init {dir}/flipped", "its sha256 is not"),
    "no device": (FINETUNE + "--data {dir}/good.csv --device cuda", "0 CUDA devices"),
    "missing corpus": (PRETRAIN + "--data {dir}/nowhere", "nowhere"),
    "empty corpus": (PRETRAIN + "--data {dir}/empty.txt", "empty.txt"),
    "unknown preset": (PRETRAIN + "--data {dir}/corpus.txt --model bert-tinny", "did you mean 'bert-tiny'?"),
    "unknown config key": (PRETRAIN + "--data {dir}/corpus.txt --arch.hiden_size 5", "did you mean 'hidden_size'?"),
    "heads that do not divide": (
        PRETRAIN + "--data {dir}/corpus.txt --arch.hidden_size 770 --arch.num_attention_heads 12",
        "hidden_size=770 is not divisible by num_attention_heads=12",
    ),
    "samples longer than positions": (
        PRETRAIN + "--data {dir}/corpus.txt --max-length 600",
        "max_length=600 exceeds max_position_embeddings=512",
    ),
    "fraction out of range": (
        PRETRAIN + "--data {dir}/corpus.txt --mask-rate 1.5",
        "mask_rate=1.5 is not between 0 and 1",
    ),
    "unknown objective": (PRETRAIN + "--data {dir}/corpus.txt --objectives mlm spo", "did you mean 'sop'?"),
    "objectives that exclude each other": (
        PRETRAIN + "--data {dir}/corpus.txt --objectives mlm clm",
        "objectives clm and mlm do not go together",
    ),
    "weight of no objective": (PRETRAIN + "--data {dir}/corpus.txt --weights.sop 2", "weights='sop' is not one of"),
    "negative weight": (PRETRAIN + "--data {dir}/corpus.txt --weights.nsp -1", "weights.nsp=-1.0 is not a positive"),
    "unknown unit to mask": (PRETRAIN + "--data {dir}/corpus.txt --mask-unit words", "did you mean 'word'?"),
    "two units to mask": (PRETRAIN + "--data {dir}/corpus.txt --mask-unit span --whole-word", "contradict each other"),
    "no labels a batch": (PRETRAIN + "--data {dir}/corpus.txt --mask-count 0", "mask_count=0 is not positive"),
    "attention that does not fit": (
        PRETRAIN + "--data {dir}/corpus.txt --arch.causal true",
        "causal=True does not fit the objectives mlm, nsp",
    ),
    "continuing without causal attention": ("generate --model {checkpoint} the", "is not causal: pretrain it with"),
    "no steps": ("pretrain --out {out} --steps 0 --data {dir}/corpus.txt", "steps=0 is not a positive whole number"),
    "graphs without a GPU": (
        PRETRAIN + "--data {dir}/corpus.txt --device cpu --cuda-graph",
        "cuda_graph=True needs a GPU, not device='cpu': use cuda_graph=False",
    ),
    "unknown flag": ("pretrain --out {out} --data {dir}/corpus.txt --stepz 3", "did you mean 'steps'?"),
    "value of another type": ("pretrain --out {out} --data {dir}/corpus.txt --steps many", "steps"),
    "required flag left out": ("pretrain --out {out}", "data"),
    "unknown verb": ("pretrian --out {out}", "did you mean 'pretrain'?"),
    "unknown key in a file": (
        PRETRAIN + "--data {dir}/corpus.txt --config {dir}/unknown.yaml",
        "did you mean 'steps'?",
    ),
    "broken yaml": (PRETRAIN + "--data {dir}/corpus.txt --config {dir}/broken.yaml", "broken.yaml: broken YAML"),
    "missing config file": (
        PRETRAIN + "--data {dir}/corpus.txt --config {dir}/nowhere.yaml",
        "nowhere.yaml: no such file",
    ),
    "mask without a head": ("fill-mask --model {checkpoint} [MASK]", "has no masked-language-model head"),
    "explaining no text": ("explain {checkpoint} --json", "give a directory and, after it, at least one text"),
    "explaining to nowhere": ("explain {checkpoint} lamp", "say where the page goes with --out page.html"),
    "page in no directory": ("explain {checkpoint} lamp --out {dir}/no/page.html", "in a directory that exists"),
    "explaining an unknown label": (
        "explain {checkpoint} lamp --json --label positiv",
        "label='positiv' is not one of negative, positive: did you mean 'positive'?",
    ),
    "guesses without a head": ("explain {checkpoint} lamp --json --mlm {checkpoint}", "has no masked-language-model"),
    "nothing to predict": ("predict --model {checkpoint}", "give texts on the command line or --data"),
    "file to predict without a text": (
        "predict --model {checkpoint} --data {dir}/good.csv --text-column txt",
        "'text'",
    ),
    "label unknown to the model": ("evaluate --model {checkpoint} --data {dir}/strange.csv", "'neutral' is not one of"),
    "no guesses": ("fill-mask --model {checkpoint} --top 0 [MASK]", "top=0 is not positive"),
    "answers to nowhere": (
        "predict --model {checkpoint} --out {dir}/no/where.jsonl lamp",
        "in a directory that exists",
    ),
    "unknown part": (PRETRAIN + "--data {dir}/corpus.txt --arch.norm batchnorm", "norm='batchnorm' is not one of"),
    "no tokens a batch": (
        "pretrain --out {out} --data {dir}/corpus.txt --batch-tokens 0",
        "batch_tokens=0 is not positive",
    ),
    "samples too short": (PRETRAIN + "--data {dir}/corpus.txt --max-length 3", "max_length=3 leaves no room"),
    "device of another kind": (FINETUNE + "--data {dir}/good.csv --device meta", "device='meta' is not supported"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_exit_code_2(name, files, checkpoint, capsys):
    command, expected = CASES[name]
    out = files / "out"
    code = main(command.format(dir=files, out=out, checkpoint=checkpoint).split())
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert error[-1].startswith("minibert: error: ") and expected in error[-1]
    assert not any("Traceback" in line for line in error)
    assert not out.exists()


def test_an_output_directory_that_holds_another_run_is_left_as_it_is(files, checkpoint, capsys):
    out = files / "out"
    command = f"finetune --data {files}/good.csv --init {checkpoint} --out {out} --epochs 1".split()
    assert main(command) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(command) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_triton_on_a_cpu_says_what_to_do(files, checkpoint):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    out = files / "out"
    command = f"finetune --data {files}/good.csv --init {checkpoint} --out {out} --backend triton --device cpu"
    process = subprocess.run(
        [sys.executable, "-m", "minibert", *command.split()], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "use backend='reference'" in process.stderr
    assert not out.exists()


def test_json_verbs_print_one_object_and_nothing_else(files, checkpoint, capsys):
    for command in (
        f"info --json {checkpoint}",
        f"predict --json --model {checkpoint} lamp",
        f"evaluate --json --model {checkpoint} --data {files}/good.csv",
    ):
        assert main(command.split()) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
