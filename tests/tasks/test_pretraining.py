"""What is measured on held-out text, and how a text is continued."""

import dataclasses

import pytest
import torch
from small import SIZES, build

from minibert.batch import IGNORE, pack
from minibert.config import BertConfig
from minibert.data.tokenizer import Tokenizer
from minibert.model import BertForMaskedLM, BertForPreTraining
from minibert.tasks.pretraining import evaluate, generate
from minibert.train.optim import adamw

TEXT = "the cat sat on a mat and dogs bark at night while birds sing"


@pytest.fixture(scope="module")
def tokenizer():
    """Five special tokens (0 to 4), then the words."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split(), "##s"]
    return Tokenizer.from_vocab({piece: i for i, piece in enumerate(pieces)})


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A causal model that knows one sentence by heart."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES | {"hidden_size": 48, "causal": True, "hidden_dropout_prob": 0.0})
    model, ids = BertForMaskedLM(config).train(), torch.tensor(tokenizer.encode(TEXT))
    batch = pack([ids.tolist()], mlm_rows=torch.arange(len(ids) - 1), mlm_labels=ids[1:])
    optimizer = adamw(model, lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        model(batch, seed=step).loss.backward()
        optimizer.step()
    return model.eval()


def test_a_model_continues_the_text_it_has_learned_to_its_end(learned, tokenizer):
    assert generate(learned, tokenizer, "The cat sat", max_new_tokens=15, temperature=0) == TEXT
    assert generate(learned, tokenizer, "", max_new_tokens=18, temperature=0.1) == TEXT
    assert generate(learned, tokenizer, "dogs", max_new_tokens=2, top_k=1).split()[0] == "dogs"


def test_a_continuation_is_a_function_of_the_seed(tokenizer):
    model = build(BertForMaskedLM, causal=True, initializer_range=0.05)
    texts = [generate(model, tokenizer, "the cat", max_new_tokens=9, seed=seed) for seed in (0, 1, 2, 0)]
    torch.rand(3)
    assert texts[0] == texts[3] and len(set(texts)) == 3
    assert generate(model, tokenizer, "the cat", max_new_tokens=9, temperature=0) == generate(
        model, tokenizer, "the cat", max_new_tokens=9, top_k=1, seed=5
    )


@pytest.mark.parametrize("top_k", [None, 4])
def test_tokens_are_drawn_as_often_as_the_model_says(tokenizer, top_k):
    model = build(BertForMaskedLM, causal=True, initializer_range=0.2)
    ids = [tokenizer.cls_token_id, *tokenizer.encode_plain(["the cat"])[0]]
    # special tokens are no text; [SEP] is its end
    logits = model(pack([ids])).logits[-1].tolist()
    logits = {i: logits[i] for i in range(tokenizer.vocab_size) if i not in (0, 1, 2, 4)}
    likely = sorted(logits, key=logits.get, reverse=True)[:top_k]
    expected = (torch.tensor([logits[i] for i in likely]) / 1.5).softmax(0)
    place = {tokenizer.decode([*ids, i], skip_special_tokens=True): n for n, i in enumerate(likely)}
    drawn, draws = torch.zeros(len(likely)), 800
    for seed in range(draws):
        text = generate(model, tokenizer, "the cat", max_new_tokens=1, temperature=1.5, top_k=top_k, seed=seed)
        drawn[place[text]] += 1
    assert (drawn / draws - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not positive"),
        ({"top_k": 0}, "top_k=0 is not positive"),
        ({"temperature": -0.5}, "temperature=-0.5 is not a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan is not a number from 0"),
        ({"max_new_tokens": 17}, "max_new_tokens=17 after 3 tokens exceeds max_position_embeddings=19"),
    ],
)
def test_what_cannot_be_continued_is_refused(tokenizer, options, message):
    with pytest.raises(ValueError) as error:
        generate(build(BertForMaskedLM, causal=True), tokenizer, "the cat", **options)
    assert str(error.value) == message


def test_a_model_that_sees_what_comes_is_refused(tokenizer):
    with pytest.raises(ValueError, match="causal=False: the model fills masks; to continue a text, pretrain with"):
        generate(build(BertForMaskedLM), tokenizer, "the cat")


def batches():
    """Two batches of different size, with labels of which some are ignored."""
    first = pack(
        [[5, 6, 7, 8], [9, 10, 11]], mlm_rows=torch.tensor([0, 1, 5]), mlm_labels=torch.tensor([IGNORE, 6, 7]),
        sop_labels=torch.tensor([1, 0]),
    )  # fmt: skip
    second = pack(
        [[12, 13]], mlm_rows=torch.tensor([1]), mlm_labels=torch.tensor([6]), sop_labels=torch.tensor([IGNORE])
    )
    return [first, second]


def test_an_evaluation_is_the_mean_over_labels_and_its_loss_the_weighted_sum():
    model = build(BertForPreTraining).requires_grad_(False)
    result = evaluate(model, batches(), commonest=7, weights={"sop": 0.25})
    logits = [model(batch, output_logits=True) for batch in batches()]
    tokens = torch.cat([logits[0].prediction_logits[[1, 5]], logits[1].prediction_logits[[1]]])
    pairs = logits[0].seq_relationship_logits
    labels, order = torch.tensor([6, 7, 6]), torch.tensor([1, 0])
    mlm = float(torch.nn.functional.cross_entropy(tokens, labels))
    sop = float(torch.nn.functional.cross_entropy(pairs, order))
    expected = {
        "loss": mlm + 0.25 * sop,
        "mlm_loss": mlm,
        "mlm_accuracy": float((tokens.argmax(-1) == labels).float().mean()),
        "sop_loss": sop,
        "sop_accuracy": float((pairs.argmax(-1) == order).float().mean()),
        "best_constant_accuracy": 2 / 3,
        "commonest_accuracy": 1 / 3,
    }
    assert result.keys() == expected.keys()
    assert result == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_of_pairs_alone_has_no_tokens_to_guess():
    alone = [dataclasses.replace(batch, mlm_rows=None, mlm_labels=None) for batch in batches()]
    assert set(evaluate(build(BertForPreTraining), alone)) == {"loss", "sop_loss", "sop_accuracy"}


def test_a_causal_evaluation_has_a_perplexity():
    result = evaluate(build(BertForMaskedLM, causal=True), batches()[:1])
    assert result["clm_perplexity"] == pytest.approx(torch.tensor(result["clm_loss"]).exp().item(), rel=1e-5)
    assert {"loss", "clm_loss", "clm_accuracy", "clm_perplexity", "best_constant_accuracy"} == set(result)
