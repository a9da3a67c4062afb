"""The gate can fail: what computes something else is refused, by name."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import inference, peers, training
from benchmarks.gate import Once, Refused, judge
from benchmarks.peers import Place
from minibert import BertForPreTraining
from minibert.config import BertConfig

CONFIG = BertConfig.preset("bert-tiny", vocab_size=200, max_position_embeddings=64)
ENCODERS = inference.PROVIDERS | {"minibert, graphs": inference.CUDA_PROVIDERS["minibert, graphs"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(weights=peers.random_weights(CONFIG, tmp_path_factory.mktemp("weights"), BertForPreTraining))


@pytest.fixture(scope="module")
def reference(place):
    return inference.Reference(place)


def build(make, place, reference, name="candidate"):
    return inference.build(name, make, place, reference, [reference.ids], Once())


def broken(place, fault) -> peers.Encoder:
    """transformers' encoder with one fault."""
    model = peers.hf_model("BertModel", place, "sdpa").eval()
    prepare = partial(peers.padded, device="cpu")
    encoder = peers.Encoder(prepare, lambda batch: model(**batch), peers.masked_states)
    if fault == "types":
        return replace(encoder, prepare=lambda ids, types=None: prepare(ids))
    if fault == "long batch":  # as the timed one is, and the gate's own is not
        return replace(encoder, prepare=lambda ids, types=None: prepare(*(
            [part[: len(part) - (len(ids) > 6)] for part in x] for x in (ids, types))))  # fmt: skip
    if fault == "mask":
        full = lambda batch: batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}  # noqa: E731
        states = lambda output, batch: peers.masked_states(output, batch)  # noqa: E731
        return peers.Encoder(encoder.prepare, lambda batch: model(**full(batch)), states)
    layer = model.encoder.layer[1]
    if fault == "gelu":
        layer.intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")
    if fault == "bias":
        layer.output.dense.bias.data.zero_()
    return encoder


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_what_computes_bert_is_timed(make, place, reference):
    if isinstance(make, partial) and "dynamic" in make.keywords:
        pytest.skip("compiling takes a minute")
    build(make, place, reference)()


def test_nobody_is_made_or_judged_twice_and_the_refusal_is_kept(place):
    made = []

    def make(place, fault=None):
        made.append(place.dtype)
        return broken(place, fault)

    once = Once()
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        at = replace(place, dtype=dtype)
        reference = inference.Reference(at)
        inference.build("copy", make, at, reference, [reference.ids], once)
    assert made == [torch.float32, torch.bfloat16]
    for _ in range(2):
        with pytest.raises(Refused, match="odd in float32"):
            inference.build("odd", partial(make, fault="gelu"), at, reference, [reference.ids], once)
    assert made[2:] == [torch.float32], "its float32 twin was judged, and once"


def test_the_unbroken_copy_is_accepted(place, reference):
    build(lambda place: broken(place, None), place, reference)()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fault", ("mask", "gelu", "bias", "types"))
def test_what_computes_something_else_is_refused_by_name(fault, dtype, place):
    place = replace(place, dtype=dtype)
    reference = inference.Reference(place)
    with pytest.raises(Refused, match=f"a wrong {fault}.*: states differs by"):
        build(lambda place: broken(place, fault), place, reference, f"a wrong {fault}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("make", inference.EMBEDDERS.values(), ids=inference.EMBEDDERS)
def test_what_embeds_texts_is_timed_and_another_pooling_is_refused(make, dtype, place):
    place = replace(place, dtype=dtype)
    reference = inference.Reference(place)
    make = partial(make, batch_size=2)
    found = inference.build_embedder("candidate", make, place, reference, [reference.ids], Once())()
    assert found.shape == (6, CONFIG.hidden_size)

    def first_token(place):
        model = peers.minibert_model(place)
        return lambda texts: model(peers.pack([inference.framed(i) for i in reference.words])).pooler_output

    with pytest.raises(Refused, match="the first token.*: embeddings differs by"):
        inference.build_embedder("the first token", first_token, place, reference, [reference.ids], Once())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_what_is_wrong_on_a_timed_batch_alone_is_refused(dtype, place):
    place = replace(place, dtype=dtype)
    reference, timed = inference.Reference(place), [np.arange(1, 10)] * 7
    make = partial(broken, fault="long batch")
    with pytest.raises(Refused, match=r"cuts, as timed: states has shape \[56"):
        inference.build("cuts", lambda place: make(place), place, reference, [timed], Once())
    inference.build("cuts", lambda place: make(place), place, reference, [timed[:6]], Once())


def test_gradients_summed_over_parts_of_a_batch_are_those_of_the_batch(place, monkeypatch):
    monkeypatch.setattr(training, "PART_TOKENS", 9)
    batch = training.random_batch(np.array([5, 9, 7, 2, 11]), CONFIG.vocab_size)
    trainee = peers.transformers_trainee(place, 0.0, masked_rows=True)
    whole = training.results(trainee, batch, torch.float32)
    assert len(batch.split(batch.num_tokens // 9 + 1)) == 4
    for name, values in training.accumulated(trainee, batch).items():
        torch.testing.assert_close(values, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def faulty_trainee(place, dropout, fault):
    """minibert's, with what shows only while it is timed."""
    trainee = peers.minibert_trainee(place, 0.0 if fault == "no dropout" else dropout)
    if fault == "frozen" and dropout:
        trainee.model.bert.encoder.layers[0].requires_grad_(False)
    return trainee


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    ("fault", "message"), [("no dropout", "dropout moves grad .* does not act"), ("frozen", "has no gradient")]
)
def test_a_step_without_dropout_or_with_frozen_layers_is_refused(fault, message, dtype, place):
    place = replace(place, dtype=dtype)
    batches = [training.random_batch(np.array([5, 9, 7]), CONFIG.vocab_size)]
    with pytest.raises(Refused, match=message):
        training.build("it", partial(faulty_trainee, fault=fault), place, training.Reference(place), batches, Once())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_training_is_judged_by_loss_and_gradients(dtype, place):
    place = replace(place, dtype=dtype)
    reference = training.Reference(place)
    batches = [training.random_batch(np.array([5, 9, 7]), CONFIG.vocab_size)]
    providers = training.PROVIDERS | training.CUDA_PROVIDERS
    for name in ("minibert", "minibert, graphs", "transformers sdpa", "transformers sdpa, masked rows"):
        training.build(name, providers[name], place, reference, batches, Once())()

    def wrong_gradient(place, dropout):
        trainee = peers.minibert_trainee(place, dropout)
        layer = [p for name, p in trainee.model.named_parameters() if "layers.1" in name and p.ndim == 2][-1]
        layer.register_hook(lambda gradient: gradient * 1.01)
        return trainee

    with pytest.raises(Refused, match=r"1 % off in float32: grad .*1 differs by"):
        training.build("1 % off", wrong_gradient, place, reference, batches, Once())


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({}, "gives no states"),
        ({"states": torch.ones(2, 3)}, r"shape \[2, 3\], expected \[3, 2\]"),
        ({"states": torch.full((3, 2), torch.nan)}, "is not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(actual, message):
    with pytest.raises(Refused, match=f"candidate: .*{message}"):
        judge("candidate", actual, {"states": torch.ones(3, 2)})
