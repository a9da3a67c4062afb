"""Fine-tuning in a few parameters: what stays, what is kept, how it goes on, and what it does not go with."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import TOKENIZER, build, padded, refused
from test_finetune import PARTS, fit
from test_readme import ROOT

from minibert import BertConfig, BertForMaskedLM, BertForSequenceClassification, pipeline
from minibert.cli import main
from minibert.model.lora import adapt, learned
from minibert.tasks import finetune as module
from minibert.train import latest
from minibert.train.optim import adamw, optimizer_state

HEAD = {"classifier.weight", "classifier.bias"}
NEW = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # which a masked language model does not have


def learn(weights, out, **options):
    """Two epochs at rank 3. The network as it was before the first step, as it is, and its last checkpoint."""
    seen = {}

    def begin(run, network):
        seen["model"] = network
        seen["before"] = {name: p.detach().clone() for name, p in network.named_parameters()}

    fit(weights, out, **{"epochs": 2, "lr": 3e-2, "lora": 3, "begin": begin} | options)
    return seen["before"], seen["model"].eval(), latest(out)


def tensors(run):
    """Every tensor that a run keeps, by the path of its file."""
    files = {path.relative_to(run).as_posix(): load_file(path) for path in Path(run).glob("step-*/*.safetensors")}
    return {f"{path}: {name}": value for path, file in files.items() for name, value in file.items()}


def test_few_parameters_learn_and_a_checkpoint_is_their_sum_with_the_others(weights, tmp_path):
    before, model, checkpoint = learn(weights, tmp_path / "run")
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    factors = {name for name in before if re.search(r"encoder\.layers.*\.[ab]$", name)}
    assert changed == factors | HEAD | NEW and len(factors) == 2 * 4 * 2
    assert load_file(checkpoint / "learned.safetensors").keys() == changed
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert {name.rpartition(".")[0] for name in moments} == changed
    plain = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    assert not plain.new_parameters and not learned(plain).keys() & factors
    torch.testing.assert_close(plain(**padded()).logits, model(**padded()).logits, rtol=1e-5, atol=1e-5)
    assert pipeline("intent", checkpoint)("dogs and bark")["label"] == "dog"


@pytest.mark.parametrize("options", [{}, {"ema": 0.7, "layer_decay": 0.5, "unfreeze": 0.6, "optimizer": "lamb"}])
def test_a_run_that_was_killed_goes_on_bit_for_bit(options, weights, tmp_path, monkeypatch):
    options |= {"eval_every": 4, "save_every": 3}
    _, whole, _ = learn(weights, tmp_path / "whole", **options)

    def killed(network, data, *rest, **more):
        draw = data.next_batch
        data.next_batch = lambda cursor: draw(cursor) if cursor < 30 else pytest.fail("killed")
        return train(network, data, *rest, **more)

    train = module.train
    with monkeypatch.context() as patch, pytest.raises(pytest.fail.Exception, match="killed"):
        patch.setattr(module, "train", killed)
        learn(weights, tmp_path / "cut", **options)
    assert 3 <= int(latest(tmp_path / "cut").name[5:]) < 10
    _, cut, _ = learn(weights, tmp_path / "cut", resume=True, **options)
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    assert any("trained.safetensors" in name for name in one) == ("ema" in options)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), cut.parameters(), strict=True))


def test_the_average_that_is_saved_is_of_the_factors(weights, tmp_path):
    _, model, checkpoint = learn(weights, tmp_path / "run", ema=0.9)
    means, trained = (load_file(checkpoint / f"{name}.safetensors") for name in ("learned", "trained"))
    assert means.keys() == trained.keys() == learned(model).keys()
    assert all(torch.equal(trained[name], p) for name, p in learned(model).items())
    model.load_state_dict(means, strict=False)
    plain = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    torch.testing.assert_close(plain(**padded()).logits, model(**padded()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": 0}, "lora=0 is not a rank: expected a whole number from 1 to 24, the hidden size"),
        ({"lora_alpha": -1}, "lora_alpha=-1 is not a positive number"),
        ({"scratch": True}, "lora=3 would freeze the new weights of scratch=True: use one of the two"),
        ({"reinit_layers": 1}, "lora=3 would freeze the new weights of reinit_layers=1: use one of the two"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_no_directory(options, message, weights, tmp_path):
    assert refused(lambda: learn(weights, tmp_path / "run", **options)) == message
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_rank_and_the_frozen_weights_it_was_started_with_alone(weights, tmp_path):
    learn(weights, tmp_path / "run", steps=1)
    build(BertForMaskedLM, seed=1, initializer_range=0.1).save_pretrained(tmp_path / "other", TOKENIZER)
    changes = {"lora.rank=3": {"lora": 4}, "lora.alpha=16": {"lora_alpha": 8}, "lora={": {"lora": None}}
    for message, change in changes.items():
        again = {"steps": 1, "resume": True} | change
        assert f"was started with {message}" in refused(lambda again=again: learn(weights, tmp_path / "run", **again))
    message = refused(lambda: learn(tmp_path / "other", tmp_path / "run", steps=1, resume=True))
    assert "was started with lora.frozen=" in message


def test_the_command_says_how_many_learn_and_the_other_verbs_read_the_result(weights, tmp_path, capsys):
    data = tmp_path / "data.csv"
    data.write_text("text,label\n" + "".join(f"{e.texts[0]},{e.target}\n" for e in PARTS["train"]))
    run = f"finetune --data {data} --init {weights} --out {tmp_path / 'run'} --lora 3 --steps 2 --device cpu"
    assert main(run.split()) == 0
    # four layers' A and B, twice; pooler; three classes
    few = 2 * 3 * (4 * 24 + 2 * 24 + 2 * (24 + 37)) + 25 * 24 + 25 * 3
    everything = BertForSequenceClassification.from_pretrained(latest(tmp_path / "run")).num_parameters()
    said = capsys.readouterr()
    assert f"trainable parameters: {few:,} of {everything + few - 25 * 27:,}" in said.out + said.err
    assert main(f"evaluate --model {tmp_path / 'run'} --data {data} --json".split()) == 0
    assert main(["predict", "--model", str(tmp_path / "run"), "dogs bark"]) == 0


def of_bert_base(rank=None):
    """Parameters that learn, bytes of the optimizer's state, and bytes of a checkpoint's tensors."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig.preset("bert-base"))
        if rank:
            adapt(model, rank, 16)
    optimizer = adamw(model, lr=1e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moments = sum(value.nbytes for value in optimizer_state(model, optimizer).values())
    few = sum(p.numel() for p in learned(model).values())
    return few, moments, 4 * model.num_parameters() + moments + (4 * few if rank else 0)


def test_the_numbers_of_the_page_are_those_of_bert_base():
    page = " ".join((ROOT / "docs/training-help.md").read_text(encoding="utf-8").split())
    for name, rank in (("all of it", None), ("`--lora 8`", 8)):
        few, *sizes = of_bert_base(rank)
        moments, checkpoint = (f"{size / 1e6:,.0f} MB" for size in sizes)
        assert f"| {name} | {few:,} | {moments} | {checkpoint} |" in page
