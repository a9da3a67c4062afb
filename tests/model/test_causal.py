"""With causal attention a token sees what came before it, and nothing of what comes."""

import dataclasses

import pytest
import torch
from small import build, gradients, packed, padded, small_config

from minibert.batch import pack
from minibert.config import BertConfig
from minibert.hub import hf_config, load_config
from minibert.model import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device here")


def next_tokens(lengths=(7, 1, 5)):
    """A packed batch in which every token but the last of a sequence predicts the next."""
    batch = packed(padded(lengths))
    ends = batch.cu_seqlens[1:].long() - 1
    rows = torch.arange(batch.num_tokens)
    rows = rows[~torch.isin(rows, ends)]
    return dataclasses.replace(batch, mlm_rows=rows, mlm_labels=batch.input_ids[rows + 1])


@pytest.mark.parametrize("place", [1, 4, 6])
def test_another_token_changes_the_logits_from_its_place_on(place):
    model, ids = build(BertForMaskedLM, causal=True), [5, 6, 7, 8, 9, 10, 11]
    other = [*ids[:place], 30, *ids[place + 1 :]]
    a, b = (model(pack([[1, 2, 3], x])).logits[3:] for x in (ids, other))
    assert torch.equal(a[:place], b[:place])
    assert ((a - b)[place:].abs().amax(-1) > 1e-3).all()


def test_more_text_does_not_change_the_logits_of_what_was_there():
    model, ids = build(BertForMaskedLM, causal=True), [5, 6, 7, 8, 9, 10, 11]
    torch.testing.assert_close(model(pack([ids[:4]])).logits, model(pack([ids])).logits[:4], **CLOSE)


def test_gradients_flow_to_earlier_tokens_of_the_same_sequence_alone():
    model, states = build(BertForMaskedLM, causal=True, train=True), []
    model.bert.embeddings.register_forward_hook(lambda module, args, output: states.append(output))
    logits = model(pack([[5, 6, 7], [8, 9, 10, 11], [12]]), seed=3).logits
    for row in range(3, 7):
        [grad] = torch.autograd.grad(logits[row].square().sum(), states[0], retain_graph=True)
        assert (grad.abs().amax(-1) > 0).tolist() == [3 <= token <= row for token in range(8)]


def test_attention_maps_are_lower_triangles():
    inputs = padded()
    maps = build(BertModel, causal=True)(**inputs, output_attentions=True).attentions
    mask = inputs["attention_mask"].bool()
    for probs in maps:
        assert probs.triu(1).abs().sum() == 0
        rows = probs.sum(-1).transpose(1, 2)[mask]
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_the_last_token_of_a_causal_layer_sees_what_it_would_see_otherwise():
    causal, both = (build(BertModel, causal=causal, num_hidden_layers=1) for causal in (True, False))
    a, b = (model(pack([[5, 6, 7, 8]])).last_hidden_state for model in (causal, both))
    torch.testing.assert_close(a[-1], b[-1], **CLOSE)
    assert ((a - b)[:-1].abs().amax(-1) > 1e-3).all()


def test_the_loss_is_the_mean_over_next_tokens():
    model, batch = build(BertForMaskedLM, causal=True), next_tokens()
    output = model(batch)
    logits = model(batch, output_logits=True).logits[batch.mlm_rows]
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, batch.mlm_labels))
    assert output.clm_loss is output.loss and output.clm_count == 10 and output.mlm_loss is None
    assert output.clm_correct == (logits.argmax(-1) == batch.mlm_labels).sum()


@WITHOUT_GPU
@pytest.mark.parametrize("train", [False, True])
def test_the_kernels_in_the_interpreter_match_the_reference(train):
    runs = []
    for backend in ("reference", "triton"):
        model = build(BertForMaskedLM, causal=True, train=train, backend=backend)
        loss = model(next_tokens(), seed=7).loss
        loss.backward()
        runs.append((loss, gradients(model)))
    (loss, expected), (ours, grads) = runs
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForSequenceClassification])
def test_a_head_on_cls_is_refused(kind):
    with pytest.raises(ValueError) as error:
        kind(small_config(causal=True))
    expected = f"causal=True: {kind.__name__} reads [CLS], which sees no other token: use a BertForMaskedLM"
    assert str(error.value) == expected


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_causal_is_true_or_false(value):
    with pytest.raises(ValueError) as error:
        BertConfig(causal=value)
    assert str(error.value) == f"causal={value!r} is not true or false"


def test_a_causal_model_is_saved_as_hugging_faces_decoder(tmp_path):
    model = build(BertForMaskedLM, causal=True)
    model.save_pretrained(tmp_path)
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.config.causal
    assert torch.equal(loaded(packed(padded())).logits, model(packed(padded())).logits)
    written = hf_config(model.config, "BertForMaskedLM")
    assert written["is_decoder"] is True and written["architectures"] == ["BertLMHeadModel"]
    assert written["model_type"] == "bert" and "causal" not in written
    assert "is_decoder" not in hf_config(small_config(), "BertForMaskedLM"), "as before"


def test_another_architecture_keeps_its_attention_too(tmp_path):
    build(BertForMaskedLM, causal=True, norm="rmsnorm").save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert config.causal and config.norm == "rmsnorm"


def test_weights_may_be_read_with_the_other_attention(tmp_path):
    build(BertForPreTraining).save_pretrained(tmp_path)
    causal = BertForMaskedLM.from_pretrained(tmp_path, causal=True)
    assert causal.config.causal and causal.new_parameters == ()
