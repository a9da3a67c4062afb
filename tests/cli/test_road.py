"""The verbs one after the other, at toy size: what the demo does with real weights."""

import json
from pathlib import Path

import pytest
import yaml

from minibert import BertForPreTraining, Tokenizer
from minibert.cli import VERBS, main
from minibert.demo import REVIEWS, SENTENCES
from minibert.train import TIMING_FIELDS, latest, read_metrics

TINY = (
    "--arch.hidden_size 32 --arch.num_attention_heads 2 --arch.intermediate_size 48 --max-length 48 --batch-tokens 512"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty documents of made-up sentences with a grammar that a tiny model can learn a little of."""
    subjects, verbs, objects = (
        ["cat", "dog", "bird", "fish"],
        ["sees", "likes", "follows", "hears"],
        ["moon", "tree", "river", "door"],
    )
    documents = []
    for d in range(40):
        lines = [
            f"The {subjects[(d + i) % 4]} {verbs[(d * i) % 4]} the {objects[(d + 3 * i) % 4]}. It is number {i}."
            for i in range(12)
        ]
        documents.append("\n".join(lines))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pretrained(corpus):
    out = corpus.parent / "run"
    command = (
        f"pretrain --data {corpus} --out {out} --steps 24 --lr 3e-3 --vocab-size 300 --save-every 8 --eval-every 12"
    )
    assert main(f"{command} {TINY} --valid-fraction 0.2 --log-every 1".split()) == 0
    return out


def test_pretraining_learns_and_writes_its_run(pretrained):
    records = read_metrics(pretrained / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 25))
    assert records[-1]["eval_mlm_loss"] < records[11]["eval_mlm_loss"]
    assert {"loss", "mlm_loss", "nsp_loss", "learning_rate", *TIMING_FIELDS} <= set(records[0])
    assert yaml.safe_load((pretrained / "config.yaml").read_text())["steps"] == 24
    assert latest(pretrained).name == "step-24"


def test_a_run_repeats_from_its_own_config_file(pretrained, tmp_path):
    out = tmp_path / "again"
    assert main(["pretrain", "--config", str(pretrained / "config.yaml"), "--out", str(out)]) == 0
    weights = "step-24/model.safetensors"
    assert (out / weights).read_bytes() == (pretrained / weights).read_bytes()


def test_fill_mask_gives_tokens_and_probabilities(pretrained, capsys):
    assert main(["fill-mask", "--model", str(pretrained), "--json", "--top", "3", "The [MASK] sees the [MASK]."]) == 0
    masks = json.loads(capsys.readouterr().out)["masks"]
    assert [len(mask) for mask in masks] == [3, 3]
    assert all(0 < entry["probability"] <= 1 for mask in masks for entry in mask)


def test_a_prepared_store_serves_pretraining_as_text_does(corpus, pretrained, tmp_path):
    store, out = tmp_path / "store", tmp_path / "run"
    tokenizer = tmp_path / "tokenizer"
    assert main(["tokenizer", "--data", str(corpus), "--out", str(tokenizer), "--vocab-size", "300"]) == 0
    assert main(["prepare", "--data", str(corpus), "--out", str(store), "--tokenizer", str(tokenizer)]) == 0
    command = f"pretrain --data {store} --out {out} --steps 24 --lr 3e-3 --save-every 8 --eval-every 12 {TINY}"
    assert main(f"{command} --valid-fraction 0.2 --log-every 1".split()) == 0
    weights = "step-24/model.safetensors"
    assert (out / weights).read_bytes() == (pretrained / weights).read_bytes()


def test_finetune_evaluate_predict_on_a_pretrained_run(pretrained, tmp_path, capsys):
    out = tmp_path / "reviews"
    command = f"finetune --data {REVIEWS} --init {pretrained} --out {out} --truncate --epochs 1 --max-train 96"
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--data", str(REVIEWS), "--truncate", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"accuracy", "precision", "recall", "f1", "macro_f1", "mcc", "per_class"} == set(result)
    assert main(["predict", "--model", str(out), "--json", *SENTENCES]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert [answer["text"] for answer in answers] == list(SENTENCES)
    assert all(answer["label"] in ("negative", "positive") and 0.5 <= answer["probability"] <= 1 for answer in answers)
    file = tmp_path / "answers.jsonl"
    assert main(["predict", "--model", str(out), "--data", str(REVIEWS), "--truncate", "--out", str(file)]) == 0
    assert len(file.read_text().splitlines()) == len(REVIEWS.read_text().splitlines()) - 1


def test_regression_of_pairs_from_jsonl(pretrained, tmp_path, capsys):
    rows = [
        {"sentence1": f"The cat sees door {i}.", "sentence2": "The moon." * (i % 3 + 1), "score": i % 3}
        for i in range(30)
    ]
    data, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = (
        f"finetune --data {data} --init {pretrained} --out {out} --task regression --epochs 2 --valid-fraction 0.3"
    )
    assert main(command.split()) == 0
    capsys.readouterr()
    assert main(["evaluate", "--model", str(out), "--data", str(data), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"pearson", "spearman", "mse"}
    assert main(["predict", "--model", str(out), "--data", str(data), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["predictions"]
    assert len(answers) == 30 and {"where", "text", "text_pair", "value"} == set(answers[0])


def test_a_folder_with_train_dev_and_test_is_read_as_published(pretrained, tmp_path):
    rows = [f"the cat sees {i}\t{i % 2}" for i in range(24)]
    for name, part in (("train", rows[:16]), ("dev", rows[16:])):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(part) + "\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tthe dog\n")
    out = tmp_path / "run"
    assert main(f"finetune --data {tmp_path} --init {pretrained} --out {out} --epochs 1".split()) == 0
    assert latest(out) is not None


def test_a_causal_model_is_pretrained_continues_a_text_and_is_measured(corpus, tmp_path, capsys):
    out = tmp_path / "causal"
    command = f"pretrain --data {corpus} --out {out} --steps 40 --lr 1e-2 --vocab-size 300 --objectives clm"
    command = f"{command} {TINY} --valid-fraction 0.2 --log-every 1".split()
    assert main(command) == main([*command, "--resume"]) == 0
    records = read_metrics(out / "metrics.jsonl")
    assert records[-1]["clm_loss"] == records[-1]["loss"] < records[0]["clm_loss"] - 1
    assert records[-1]["eval_clm_perplexity"] < 100
    capsys.readouterr()
    texts = []
    for seed in (3, 3, 4):
        arguments = ["generate", "--model", str(out), "--json", "--seed", str(seed), "--max-new-tokens", "9"]
        assert main([*arguments, "The cat", "The dog"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["texts"])
    assert texts[0] == texts[1] != texts[2]
    assert [text[:7] for text in texts[0]] == ["the cat", "the dog"]
    assert main(["generate", "--model", str(out), "--temperature", "0", "--max-new-tokens", "3", "the"]) == 0
    assert capsys.readouterr().out.startswith("the ")
    assert main(["evaluate", "--model", str(out), "--data", str(corpus), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"loss", "clm_loss", "clm_accuracy", "clm_perplexity", "best_constant_accuracy"} == set(result)
    assert main(["convert", str(out), "--out", str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["is_decoder"] is True
    for wrong, message in (
        (f"fill-mask --model {out} [MASK]", "is causal: continue a text with it"),
        (f"finetune --data {REVIEWS} --init {out} --out {tmp_path}/no", "causal=True: BertForSequenceClassification"),
        (f"evaluate --model {out} --data {corpus} --objectives mlm", "causal=True does not fit the objectives mlm"),
        (f"generate --model {out}", "give at least one text to continue"),
        (f"generate --model {out} --max-new-tokens 600 the", "exceeds max_position_embeddings=512"),
    ):
        assert main(wrong.split()) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_objectives_are_weighted_and_measured_by_their_names(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    command = f"pretrain --data {corpus} --out {out} --steps 3 --vocab-size 300 --objectives mlm sop --weights.sop 0.5"
    masking = "--mask-unit span --mask-count 40 --all-mask"
    assert main(f"{command} {masking} {TINY} --valid-fraction 0.2 --log-every 1".split()) == 0
    last = read_metrics(out / "metrics.jsonl")[-1]
    assert last["loss"] == pytest.approx(last["mlm_loss"] + 0.5 * last["sop_loss"])
    assert last["eval_loss"] == pytest.approx(last["eval_mlm_loss"] + 0.5 * last["eval_sop_loss"])
    assert yaml.safe_load((out / "config.yaml").read_text())["weights"] == {"sop": 0.5}
    capsys.readouterr()
    assert main(f"evaluate --model {out} --data {corpus} --json".split()) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {"mlm_accuracy", "sop_accuracy"} <= set(measured) and "nsp_accuracy" not in measured
    alone = tmp_path / "weights"  # of which nobody knows what they learned
    assert main(f"convert {out} --out {alone}".split()) == 0
    capsys.readouterr()
    assert main(f"evaluate --model {alone} --data {corpus} --json --objectives sop mlm".split()) == 0
    assert json.loads(capsys.readouterr().out) == measured


def test_nsp_is_left_out_where_it_is_not_wanted(corpus, tmp_path):
    out = tmp_path / "run"
    command = f"pretrain --data {corpus} --out {out} --steps 2 --vocab-size 300 --no-nsp --whole-word {TINY}"
    assert main(command.split()) == 0
    assert not any("nsp" in name for name in read_metrics(out / "metrics.jsonl")[-1])


def test_convert_keeps_every_tensor(pretrained, tmp_path):
    out = tmp_path / "converted"
    assert main(["convert", str(pretrained), "--out", str(out)]) == 0
    left, right = BertForPreTraining.from_pretrained(latest(pretrained)), BertForPreTraining.from_pretrained(out)
    assert all((a == b).all() for a, b in zip(left.parameters(), right.parameters(), strict=True))
    assert Tokenizer.from_pretrained(out).hash == Tokenizer.from_pretrained(latest(pretrained)).hash
    assert main(["convert", str(pretrained), "--out", str(out)]) == 2  # it is filled now


def test_resuming_on_other_data_is_refused_and_the_run_keeps_its_word(pretrained, tmp_path, capsys):
    out, one, two = tmp_path / "run", tmp_path / "one.csv", tmp_path / "two.csv"
    for file, label in ((one, "ab"), (two, "ba")):
        file.write_text("text,label\n" + "".join(f"the cat sees {i},{label[i % 2]}\n" for i in range(12)))
    command = f"finetune --init {pretrained} --out {out} --epochs 1 --valid-fraction 0.3"
    assert main(f"{command} --data {one}".split()) == 0
    before = (out / "config.yaml").read_bytes()
    assert main(f"{command} --data {two} --resume".split()) == 2
    assert "was started with data.train=" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before


def test_a_store_of_another_tokenizer_is_refused_beside_weights(corpus, pretrained, tmp_path, capsys):
    store = tmp_path / "store"
    assert main(f"prepare --data {corpus} --out {store} --vocab-size 300 --cased".split()) == 0
    assert main(f"evaluate --model {pretrained} --data {store}".split()) == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: minibert {verb}" in text and "--config" in text


def test_the_reviews_are_as_promised():
    import csv

    rows = list(csv.DictReader(REVIEWS.open(encoding="utf-8")))
    texts = {"".join(c for c in row["text"].lower() if c.isalnum()) for row in rows}
    positive = sum(row["label"] == "positive" for row in rows)
    assert len(rows) == len(texts) >= 600
    assert abs(2 * positive - len(rows)) <= 0.02 * len(rows)
    assert {row["topic"] for row in rows} == {"thing", "film", "food", "service"}
    assert not texts & {"".join(c for c in sentence.lower() if c.isalnum()) for sentence in SENTENCES}
    assert Path(REVIEWS).stat().st_size < 200_000
