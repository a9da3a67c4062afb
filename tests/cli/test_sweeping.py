"""Several runs at once: what a grid is made of, and what is kept of its runs."""

import json
import math

import pytest
import torch
from small import SIZES

from minibert import BertConfig, BertForPreTraining, Tokenizer
from minibert.cli import main
from minibert.cli.sweeping import curves, grid, summarise
from minibert.demo import REVIEWS
from minibert.train import read_metrics

NOTHING = {"seed": 3, "seeds": 1, "sweep": {}, "learning_curve": []}


def test_a_grid_is_all_combinations_and_the_seed_changes_first():
    runs = grid(NOTHING | {"sweep": {"lr": [2e-5, 0.1], "epochs": [2]}, "seeds": 2, "learning_curve": [9]})
    assert list(runs) == [f"lr-{lr}_epochs-2_max_train-9_seed-{seed}" for lr in ("2e-05", "0.1") for seed in (3, 4)]
    assert runs["lr-0.1_epochs-2_max_train-9_seed-4"] == {"lr": 0.1, "epochs": 2, "max_train": 9, "seed": 4}
    assert grid(NOTHING) == {"": {}}
    assert list(grid(NOTHING | {"seeds": 2})) == ["seed-3", "seed-4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"rate": [1]}}, "sweep='rate' is not one of lr, epochs"),
        ({"sweep": {"lr": ["fast"]}}, "sweep of lr holds 'fast': expected numbers"),
        ({"sweep": {"batch_size": [2.5]}}, "sweep of batch_size holds 2.5: expected whole numbers"),
        ({"sweep": {"batch_size": [True]}}, "holds True: expected whole numbers"),
        ({"sweep": {"scratch": [1]}}, "sweep of scratch holds 1: expected true or false"),
        ({"sweep": {"lr": []}}, "sweep of lr holds None: expected numbers"),
        ({"sweep": {"seed": [1]}, "seeds": 2}, "sweep has seed, and so has --seeds"),
        ({"sweep": {"max_train": [1]}, "learning_curve": [5]}, "sweep has max_train, and so has --learning-curve"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(NOTHING | changes)


def test_seeds_are_averaged_and_curves_are_by_what_else_differs():
    runs = {
        f"{scratch}{count}{seed}": (
            {"scratch": scratch, "max_train": count, "seed": seed},
            {"train": {"examples": min(count, 70)}, "valid": {"accuracy": count / 100 + seed / 10, "per_class": {}}},
        )
        for scratch in (False, True) for count in (90, 20) for seed in (0, 1)
    }  # fmt: skip
    cells = summarise(runs)
    assert [cell["options"] for cell in cells[:2]] == [
        {"scratch": False, "max_train": 90}, {"scratch": False, "max_train": 20},
    ]  # fmt: skip
    expected = {"mean": pytest.approx(0.95), "sd": pytest.approx(math.sqrt(0.005))}
    assert cells[0]["numbers"] == {"valid accuracy": expected} and cells[0]["runs"] == ["False900", "False901"]
    drawn = curves(cells, "valid accuracy")
    assert list(drawn) == ["scratch False", "scratch True"]
    assert [point[0] for point in drawn["scratch True"]] == [20, 70], "as many as there were to learn from"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained")
    tokenizer = Tokenizer.train([REVIEWS.read_text(encoding="utf-8")], 300)
    torch.manual_seed(0)
    config = BertConfig(**SIZES | {"vocab_size": tokenizer.vocab_size})
    BertForPreTraining(config).save_pretrained(directory, tokenizer)
    return directory


def test_a_learning_curve_over_seeds_is_kept_drawn_and_resumed(pretrained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = (
        f"finetune --data {REVIEWS} --init {pretrained} --out {tmp_path} --truncate --epochs 1 --valid-fraction 0.05 "
        "--learning-curve 16 40 --seeds 2 --sweep"
    ).split()
    command.append("{lr: [2e-5]}")
    assert main(command) == 0
    kept = json.loads((tmp_path / "runs.json").read_text())
    folders = [f"lr-2e-05_max_train-{count}_seed-{seed}" for count in (16, 40) for seed in (0, 1)]
    assert [folder for cell in kept["cells"] for folder in cell["runs"]] == folders
    assert [cell["examples"] for cell in kept["cells"]] == [16, 40]
    assert kept["metric"] == "valid accuracy" and kept["best"] in [cell["options"] for cell in kept["cells"]]
    means = [
        sum(json.loads((tmp_path / f / "results.json").read_text())["valid"]["accuracy"] for f in folders[i : i + 2])
        / 2
        for i in (0, 2)
    ]
    assert [cell["numbers"]["valid accuracy"]["mean"] for cell in kept["cells"]] == pytest.approx(means)
    assert (tmp_path / "curve.png").stat().st_size > 5000
    (tmp_path / "runs.json").unlink()
    logs = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in folders]
    assert main([*command, "--resume"]) == 0
    assert json.loads((tmp_path / "runs.json").read_text()) == kept
    assert logs == [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in folders]
    alone = tmp_path / "alone"
    assert main(["finetune", "--config", str(tmp_path / folders[0] / "config.yaml"), "--out", str(alone)]) == 0
    weights = [next(path.glob("step-*/model.safetensors")).read_bytes() for path in (alone, tmp_path / folders[0])]
    assert weights[0] == weights[1], "the config.yaml of a run is of that run alone"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep", "{max_train: [20, -3]}"], "max_train=-3 is not positive"),
        (["--learning-curve", "20", "0"], "max_train=0 is not positive"),
        (["--lora", "2", "--sweep", "{scratch: [false, true]}"], "lora=2 would freeze the new weights of scratch=True"),
        (["--sweep", "{ema: [0.9, 2]}"], "ema=2"),
        (["--lora-alpha", "8"], "lora_alpha=8.0 scales what lora adds: give lora, too"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_run(flags, message, pretrained, tmp_path, capsys):
    assert main([*f"finetune --data {REVIEWS} --init {pretrained} --out {tmp_path / 'runs'}".split(), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("rates", "code"), [("1e37, 1e38", 1), ("1e37, 1e-4", 0)])
def test_runs_that_break_are_left_out_and_are_an_error_where_none_is_left(rates, code, pretrained, tmp_path, capsys):
    command = f"finetune --data {REVIEWS} --init {pretrained} --out {tmp_path} --truncate --max-train 40 --steps 4"
    assert main([*command.split(), "--warmup", "0", "--device", "cpu", "--sweep", f"{{lr: [{rates}]}}"]) == code
    said = capsys.readouterr().err
    assert said.count("left out: step") == 1 + code
    assert (said.splitlines()[-1] == "minibert: error: none of 2 runs ended well: try a lower lr") == (code == 1)
    assert (tmp_path / "runs.json").exists() == (code == 0)
