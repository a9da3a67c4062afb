"""What makes the host wait is found without a GPU, by its line, and minibert's own steps do none of it."""

import pytest
import torch
from small import build
from torch import nn

from minibert.model import MODELS, BertForMaskedLM, BertModel
from minibert.profile import Options, find_syncs, profile_step, synthetic_batch
from minibert.profile.watch import HostReads

TRAINED = [kind for name, kind in MODELS.items() if name not in ("BertModel", "BertForSentenceEmbedding")]
STEPS = [(kind, "train") for kind in TRAINED] + [(kind, "infer") for kind in MODELS.values()]


def batch_for(model, mode="train"):
    return synthetic_batch(model.config, model.objective, batch_size=5, length=11, fill=0.6, labels=mode == "train")


class Around(nn.Module):
    """A feed-forward part with something before it."""

    def __init__(self, inner, before):
        super().__init__()
        self.inner, self.before = inner, before

    def forward(self, x, ctx):
        self.before(x)
        return self.inner(x, ctx)


def planted(before, kind=BertForMaskedLM):
    model = build(kind)
    layer = (model if kind is BertModel else model.bert).encoder.layers[1]
    layer.ffn = Around(layer.ffn, before)
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "bertadam", "lamb", "sgd"])
@pytest.mark.parametrize(("kind", "mode"), STEPS)
def test_no_step_of_ours_makes_the_host_wait(kind, mode, optimizer):
    model = build(kind)
    assert find_syncs(model, batch_for(model, mode), mode=mode, optimizer=optimizer) == []


@pytest.mark.parametrize("part", [{"ffn": "swiglu"}, {"ffn": "geglu"}, {"norm": "rmsnorm"}])
def test_nor_does_any_part_that_can_be_chosen(part):
    model = build(BertForMaskedLM, **part)
    assert find_syncs(model, batch_for(model)) == []


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_nor_does_any_kind_of_label(problem):
    model = build(MODELS["BertForSequenceClassification"], problem_type=problem, id2label=("a", "b", "c"))
    if problem == "regression":
        model = build(MODELS["BertForSequenceClassification"], problem_type=problem, id2label=("a",))
    assert find_syncs(model, batch_for(model)) == []


def asks(x):
    return x.sum().item()


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_planted_item_is_found_by_file_and_line(mode):
    model = planted(asks)
    line = asks.__code__.co_firstlineno + 1
    [sync] = find_syncs(model, batch_for(model, mode), mode=mode)
    assert sync["where"].endswith(f"test_host_syncs.py:{line}")
    assert sync["op"] == "aten::_local_scalar_dense" and sync["calls"] == 1


WAITS = {
    "a branch": lambda x: 1 if x.any() else 0,
    "float()": lambda x: float(x[0, 0]),
    ".cpu()": lambda x: x.cpu(),
    ".tolist()": lambda x: x.tolist(),
    "copying into host memory": lambda x: torch.empty(x.shape).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "writing through a mask": lambda x: x.clone().index_put_((x > 0,), torch.ones((), device=x.device)),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeats of unknown sum": lambda x: torch.repeat_interleave(x.long().flatten()),
    "a length from a tensor": lambda x: x[: x.sum().long()],
    "copying to the device": lambda x: torch.ones(3).to(x.device),
}
GOES_ON = {
    "arithmetic": lambda x: (x * 2 + x.mean()).softmax(-1),
    "a fill by a mask": lambda x: x.clone().masked_fill_(x > 0, 0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "indices": lambda x: x[torch.zeros(3, dtype=torch.long, device=x.device)],
    "repeats of known sum": lambda x: x.repeat_interleave(2, 0),
    "values that are on the host": lambda x: torch.ones(3).sum().item(),
    "a copy to the device that waits for nothing": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a copy to the host that waits for nothing": lambda x: x.to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", [*WAITS, *GOES_ON])
def test_waiting_is_told_from_going_on(name, inference):
    x = torch.empty(7, 5, device="meta")
    with torch.inference_mode(inference), HostReads() as reads:
        (WAITS | GOES_ON)[name](x)
    assert sum(reads.found.values()) == (name in WAITS)


class Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx if dx.sum() > 0 else dx  # the host waits here


class AskingFFN(Around):
    def forward(self, x, ctx):
        return Asking.apply(self.inner(x, ctx))


def test_waiting_in_a_backward_is_found_there():
    model = build(BertForMaskedLM)
    layer = model.bert.encoder.layers[0]
    layer.ffn = AskingFFN(layer.ffn, None)
    [sync] = find_syncs(model, batch_for(model))
    with open(__file__, encoding="utf-8") as source:
        [line] = [number for number, text in enumerate(source, 1) if text.endswith("# the host waits here\n")]
    assert sync["where"].endswith(f"test_host_syncs.py:{line}")


def test_looking_leaves_the_model_as_it_is():
    model = build(BertForMaskedLM)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_syncs(model, batch_for(model))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_a_part_that_cannot_run_without_values_is_said_to_be_unknown():
    model = planted(lambda x: x.detach().numpy())
    summary = profile_step(model, batch_for(model), Options(steps=1, warmup=0))["summary"]
    assert summary["host_syncs"] is None
    assert "numpy" in summary["host_syncs_unknown"] or "meta" in summary["host_syncs_unknown"]
