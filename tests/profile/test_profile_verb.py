"""`minibert profile` from the command line: tables, one JSON object, exit codes."""

import json

import pytest
import torch

from minibert import BertConfig, BertForSequenceClassification, BertModel
from minibert.cli import main
from minibert.model import FFNS
from minibert.model.ffn import MLP

SMALL = (
    "--arch.vocab_size 97 --arch.hidden_size 24 --arch.num_attention_heads 3 --arch.intermediate_size 40 "
    "--batch-size 3 --length 9 --fill 0.7 --steps 1 --warmup 0 --device cpu"
)


def run(out, command):
    return main(["profile", "--out", str(out), *SMALL.split(), *command.split()])


def test_the_tables_name_ops_modules_and_files(tmp_path, capsys):
    assert run(tmp_path / "out", "--mode train") == 0
    text = capsys.readouterr().out
    for word in ("aten::addmm", "ops, a step", "modules, a step", "tokens/s", "host syncs: 0\n", "all are in ops.json"):
        assert word in text
    assert "modules.json, ops.json, summary.json, trace.json" in text
    names = "".join(line.split("│")[1].strip() for line in text.splitlines() if "│" in line)
    assert "bert.encoder.layers.1.attention" in names and "…" not in text  # names are folded, never cut


def test_json_is_one_object_that_says_what_the_files_say(tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, "--mode infer --dtype bfloat16 --memory --json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {name: json.loads((out / f"{name}.json").read_text()) for name in ("summary", "ops", "modules")}
    assert result["summary"]["model"] == "BertModel" and result["summary"]["tokens"] == pytest.approx(19, abs=2)
    assert (out / "memory.json").is_file()


def test_a_saved_model_is_profiled_with_all_its_heads(tmp_path, capsys):
    config = BertConfig.preset("bert-tiny", vocab_size=97, num_hidden_layers=1, id2label=("a", "b", "c"))
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    command = f"profile --model {tmp_path / 'model'} --out {tmp_path / 'out'} --optimizer lamb --json"
    assert main(f"{command} --batch-size 2 --length 5 --steps 1 --warmup 0".split()) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["model"] == "BertForSequenceClassification" and summary["optimizer"] == "lamb"


class Waiting(MLP):
    def forward(self, x, ctx):
        return super().forward(x, ctx) if x.sum() < 1e9 else x


@pytest.mark.parametrize("ffn", ["mlp", "waiting"])
def test_a_wait_for_the_device_can_fail_the_command(ffn, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FFNS, "waiting", Waiting)
    command = f"--mode infer --arch.ffn {ffn}"
    assert run(tmp_path / "a", f"{command} --fail-on-sync") == (ffn == "waiting")
    assert run(tmp_path / "b", command) == 0
    text = capsys.readouterr().out
    line = f"test_profile_verb.py:{Waiting.forward.__code__.co_firstlineno + 1}: aten::_local_scalar_dense, 2 a step"
    assert (line in text) == (ffn == "waiting")


BAD = {
    "--mode tain": "mode='tain' is not one of train, infer: did you mean 'train'?",
    "--dtype float16": "dtype='float16' is not one of float32, bfloat16",
    "--optimizer adagrad": "optimizer='adagrad' is not one of adamw, bertadam, lamb, sgd",
    "--steps 0": "steps=0 is not positive",
    "--warmup -1": "warmup=-1 is negative",
    "--batch-size 0": "batch_size=0 is not positive",
    "--length 0": "length=0 is not positive",
    "--length 513": "length=513 exceeds max_position_embeddings=512",
    "--fill 0": "fill=0.0 is not above 0 and at most 1",
    "--fill 1.1": "fill=1.1 is not above 0 and at most 1",
    "--tool nsys": "tool='nsys' is not one of torch, proton, nvtx",
    "--tool nvtx": "tool='nvtx' needs a CUDA device, got cpu: use tool='torch'",
    "--tool proton": "tool='proton' needs a CUDA device, got cpu: use tool='torch'",
    "--model bert-tinny": "did you mean 'bert-tiny'?",
    "--model {dir}": "is not a checkpoint: it has no config.json and no step-N directory",
    "--arch.hiden_size 8": "unknown config key 'hiden_size': did you mean 'hidden_size'?",
    "--out {dir}": "exists and is not empty: choose another",
    "--stepz 3": "did you mean 'steps'?",
}


@pytest.mark.parametrize("command", BAD)
def test_a_mistake_is_one_line_and_nothing_is_written(command, tmp_path, capsys):
    (tmp_path / "x").write_text("")
    out = tmp_path / "out"
    assert run(out, command.format(dir=tmp_path)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("minibert: error: ") and printed.err.count("\n") == 1
    assert BAD[command] in printed.err
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert run(tmp_path / "out", "--device cuda") == 2
    assert "use device=cpu" in capsys.readouterr().err


def test_an_encoder_without_a_head_is_profiled_in_inference_only(tmp_path, capsys):
    BertModel(BertConfig.preset("bert-tiny", vocab_size=97, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    assert main(f"profile --model {tmp_path / 'model'} --out {tmp_path / 'out'}".split()) == 2
    assert "BertModel has no head to train: use mode='infer'" in capsys.readouterr().err
