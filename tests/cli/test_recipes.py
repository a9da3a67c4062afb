"""`minibert pretrain --recipe`, and the picture of a run."""

import pytest
import yaml

from minibert.cli import build_parser, main, parse
from minibert.cli.phases import plan_phases
from minibert.cli.pretraining import PHASED, TRAINING
from minibert.config import BertConfig
from minibert.train import METRICS, RECIPES, TrainConfig, latest, read_metrics, recipe_options, resolve_model

SENTENCE = "the lamp is good bad kettle film soup was not very kind of broken and we like it"
DAY = 24 * 60
# what the sources say, in their own units: sequences of a batch, and so on
FIGURES = {
    "original": [
        {"batch": 256, "length": 128, "steps": 900_000, "lr": 1e-4, "warmup_steps": 10_000, "beta2": 0.999},
        {"batch": 256, "length": 512, "steps": 100_000, "eps": 1e-6, "weight_decay": 0.01, "clip": 1.0},
    ],
    "nvlamb": [
        {"batch": 65536, "length": 128, "steps": 7038, "lr": 6e-3, "warmup": 0.2843, "weight_decay": 0.01},
        {"batch": 32768, "length": 512, "steps": 1563, "lr": 4e-3, "warmup": 0.128, "optimizer": "lamb"},
    ],
    "mosaic": {"batch": 4096, "length": 128, "steps": 70_000, "lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6,
               "decay_at_the_peak": 1e-5, "warmup": 0.06, "schedule": "linear", "final_lr": 0.02, "mask_rate": 0.3},
    "crammed": {"batch": 8192, "length": 128, "minutes": DAY, "lr": 1e-3, "ramp": 0.6, "clip": 0.5, "mask_rate": 0.25,
                "mask_count": 128 * 128 // 4, "schedule": "linear"},
    "24h": {"batch": 4096, "length": 128, "minutes": DAY, "lr": 1e-3, "warmup": 0.06, "beta2": 0.98, "clip": None,
            "model": "bert-large"},
    "modern": {"decay_at_the_peak": 1e-5, "schedule": "trapezoid", "mask_rate": 0.3, "beta2": 0.98},
}  # fmt: skip
NSP = {"original", "nvlamb"}
NO_DROPOUT = {"crammed", "modern"}


def options_of(*flags):
    return parse(build_parser("pretrain"), ["--data", "x", "--out", "y", *flags])


def phases_of(*flags):
    """The options of each phase; of the whole, where there are none."""
    options = options_of(*flags)
    if not options["phases"]:
        return [options]
    return [options | phase for phase in plan_phases(options["phases"], options, PHASED)]


def config_of(options):
    return TrainConfig(**{name: options[name] for name in TRAINING.split()})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_has_the_figures_of_its_source(name):
    figures = FIGURES[name] if isinstance(FIGURES[name], list) else [FIGURES[name]]
    for options, expected in zip(phases_of("--recipe", name), figures, strict=True):
        config = config_of(options)
        actual = options | {
            "batch": options["accumulate"] * options["batch_tokens"] / options["max_length"],
            "length": options["max_length"],
            "decay_at_the_peak": options["weight_decay"] * options["lr"],
            "warmup_steps": config.steps and config.warmup_steps,
        }
        assert {key: actual[key] for key in expected} == pytest.approx(expected)
        assert options["objectives"] == ["mlm", "nsp"][: 1 + (name in NSP)]
        architecture = BertConfig.preset(options["model"], **options["arch"])
        assert (architecture.hidden_dropout_prob == 0) == (name in NO_DROPOUT)
        assert architecture.max_position_embeddings >= options["max_length"]


def test_the_two_phases_of_the_original_are_one_line():
    first, second = map(config_of, phases_of("--recipe", "original"))

    def rate(config, step):
        return config.learning_rate(config.progress(step, 0.0))

    for step in (10_000, 400_000, 899_999):
        assert rate(first, step) == pytest.approx(1e-4 * (1e6 - step) / (1e6 - 10_000), rel=1e-4)
    for step in (0, 50_000, 90_000):
        assert rate(second, step) == pytest.approx(1e-4 * (1e5 - step) / (1e6 - 10_000), rel=1e-4)


def test_flags_and_files_override_a_recipe(tmp_path):
    (tmp_path / "file.yaml").write_text("lr: 0.25\nbeta2: 0.5\n")
    file = ["--config", str(tmp_path / "file.yaml")]
    options = options_of(
        "--recipe", "mosaic", *file, "--lr", "0.125", "--arch.num_hidden_layers", "3", "--mask-rate=.2"
    )
    assert (options["lr"], options["beta2"], options["mask_rate"], options["warmup"]) == (0.125, 0.5, 0.2, 0.06)
    assert options["arch"] == RECIPES["mosaic"]["arch"] | {"num_hidden_layers": 3}
    assert options_of("--recipe", "mosaic")["arch"] == RECIPES["mosaic"]["arch"]
    small = options_of("--recipe", "crammed", "--model", "bert-tiny")  # whose sizes are its own
    assert small["arch"] == {"ffn": "geglu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_a_recipe_fits_itself_to_the_time_or_the_steps_given():
    for name in RECIPES:
        options = options_of("--recipe", name, "--minutes", "30")
        assert (options["minutes"], options["steps"]) == (30, None) and config_of(options).minutes == 30
        options = options_of("--recipe", name, "--steps", "40")
        assert (options["minutes"], options["steps"]) == (None, 40) and config_of(options).steps == 40
    for flag in ("--batch-tokens=512", "--mask-rate=0.15"):
        assert options_of("--recipe", "crammed", flag)["mask_count"] is None
    assert "steps" not in recipe_options("mosaic", {"minutes"})
    for name in ("original", "nvlamb"):
        assert sum(phase["minutes"] for phase in phases_of("--recipe", name, "--minutes", "30")) == 30
        assert sum(phase["steps"] for phase in phases_of("--recipe", name, "--steps", "40")) == 40
        assert {phase["lr"] for phase in phases_of("--recipe", name, "--lr", "0.5")} == {0.5}


def test_a_recipe_that_is_none_is_named(capsys):
    assert main(["pretrain", "--data", "x", "--out", "y", "--recipe", "cramed"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "recipe='cramed' is not one of original," in line and "did you mean 'crammed'?" in line


@pytest.fixture(scope="module")
def crammed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crammed")
    words = SENTENCE.split()
    text = "\n\n".join(". ".join(" ".join(words[i:] + words[:i]) for _ in range(4)) for i in range(16))
    (folder / "corpus.txt").write_text(text)
    small = "--vocab-size 120 --arch.hidden_size 16 --arch.num_attention_heads 2 --arch.num_hidden_layers 1"
    small += " --arch.intermediate_size 20 --batch-tokens 256 --max-length 48 --accumulate 3 --valid-fraction 0.2"
    command = f"pretrain --data {folder}/corpus.txt --out {folder}/run --recipe crammed --minutes 0.02 {small}"
    assert main(f"{command} --log-every 1 --device cpu --ema 0.9".split()) == 0
    return folder / "run"


def test_a_recipe_trains_for_the_time_it_is_given(crammed):
    records = read_metrics(crammed / METRICS)
    assert 1.2 <= records[-1]["seconds"] < 20 and len(records) > 3
    peak = max(record["learning_rate"] for record in records)
    assert 5e-4 < peak <= 1e-3 and records[-1]["learning_rate"] < peak / 2
    assert "eval_mlm_loss" in records[-1] and "nsp_loss" not in records[-1]
    options = yaml.safe_load((crammed / "config.yaml").read_text())
    assert (options["recipe"], options["minutes"], options["steps"], options["clip"]) == ("crammed", 0.02, None, 0.5)


def test_a_run_of_a_recipe_repeats_from_its_own_config_file(crammed):
    saved = yaml.safe_load((crammed / "config.yaml").read_text())
    again = parse(build_parser("pretrain"), ["--config", str(crammed / "config.yaml")])
    assert {name: again[name] for name in saved} == saved


def test_a_recipe_of_two_phases_is_one_command(crammed, tmp_path):
    command = f"pretrain --data {crammed}/data --init {crammed} --out {tmp_path}/run --recipe nvlamb --steps 6"
    small = "--no-nsp --max-length 64 --batch-tokens 256 --accumulate 1 --valid-fraction 0.2 --log-every 1 --device cpu"
    assert main(f"{command} {small}".split()) == 0
    first, second = (read_metrics(tmp_path / "run" / phase / METRICS) for phase in ("phase-1", "phase-2"))
    assert [len(first), len(second)] == [5, 1] and second[0]["learning_rate"] == pytest.approx(4e-3)
    begun = read_metrics(crammed / METRICS)[-1]["loss"]
    assert first[0]["loss"] == pytest.approx(begun, rel=0.1)
    assert (resolve_model(tmp_path / "run") / "config.json").read_text() == (
        latest(crammed) / "config.json"
    ).read_text()


def test_a_run_is_drawn(crammed, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "curve.png"
    assert main(["plot", str(crammed), str(crammed), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and f"in {out}" in capsys.readouterr().err.replace("\n", "")
    assert main(["plot", str(crammed), "--out", str(tmp_path / "curve.bmpp")]) == 2
    assert "bmpp" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_without_matplotlib_or_without_a_run_is_one_line(crammed, tmp_path, monkeypatch, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "is not a run: it has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / METRICS).touch()
    assert main(["plot", str(tmp_path)]) == 2
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["plot", str(crammed)]) == 2
    assert "pip install 'minibert[viz]'" in capsys.readouterr().err.splitlines()[-1]
