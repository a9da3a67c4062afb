"""What becomes of measured seconds: figures, comparisons, pages."""

import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import lengths, report
from benchmarks import measure as measure_module
from benchmarks.__main__ import free_name, main
from benchmarks.gate import Refused
from benchmarks.measure import Case, Peaks, Work, extra_memory, figures, joules, measure, on_device, place_and_date

PEAKS = Peaks(flops=1e12, bytes=1e11)


def row(**values):
    return {"suite": "infer", "case": "half, batch 8", "dtype": "float32", "threads": 2, "provider": "minibert",
            "seconds": 1.0, "seconds_low": 0.98, "seconds_high": 1.02, "ratio": 2.0, "ratio_low": 1.9,
            "ratio_high": 2.1, "tokens_per_second": 100.0} | values  # fmt: skip


def record(*rows):
    machine = {"cpu": "a CPU", "date": "2026-01-01"}
    return {"machine": machine, "options": {}, "peaks": {"float32, 2 threads": vars(PEAKS)}, "rows": list(rows)}


def test_a_rate_above_the_roofline_is_refused():
    assert figures(Work(flops=1e12), [1.0], None, PEAKS)["matrix_share"] == 1
    assert "above the matrix peak" in figures(Work(flops=1e12), [0.9], None, PEAKS)["refused"]
    assert "above the bandwidth peak" in figures(Work(bytes=1e12), [0.9], None, PEAKS)["refused"]


def test_ratios_are_taken_within_a_round():
    found = figures(Work(tokens=10), [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], PEAKS)
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (2, 2, 2)
    assert found["tokens_per_second"] == 5


def test_extra_memory_is_what_a_call_allocates_beyond_what_was_there():
    held = torch.ones(1 << 20)

    def call():
        first = held * 2  # 4 MiB, freed when the second is there
        second = first + 1
        del first
        return second

    assert extra_memory(call) == pytest.approx(8 << 20, abs=64)  # and a number or two
    assert extra_memory(lambda: None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_time_is_the_wall_clocks_and_energy_is_not_told():
    timer = on_device(lambda: time.sleep(0.02))
    assert timer.how == "wall clock" and 0.02 <= timer.sample() < 0.5
    assert joules(lambda: None) is None


@pytest.mark.parametrize("captured", (True, False))
def test_on_a_gpu_a_call_is_timed_behind_an_overwritten_cache_from_a_graph_or_else_as_launched(captured, monkeypatch):
    """A stand-in for torch.cuda that writes down what is asked of it: the order is what is tested, not a GPU."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def capture(graph, stream):
        log.append("capture")
        yield

    class Junk:
        def zero_(self):
            log.append("flush")

    def never_waits(call):
        log.append("checked")
        return captured

    cuda = SimpleNamespace(
        is_available=lambda: True, stream=lambda stream: nullcontext(), CUDAGraph=Graph, graph=capture, Event=Event,
        synchronize=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(measure_module.torch, "cuda", cuda)
    monkeypatch.setattr(measure_module, "side_stream", lambda: "side")
    monkeypatch.setattr(measure_module, "never_waits", never_waits)
    monkeypatch.setattr(measure_module.torch, "empty", lambda *args, **kwargs: Junk())
    timer = on_device(lambda: log.append("call"))
    assert log == ["call"] * 3 + ["checked"] + ["capture", "call"] * captured and timer.how == (
        "CUDA graph" if captured else "launches"
    )
    log.clear()
    assert timer.sample() == 2e-3
    one = ["flush", "event", "replay" if captured else "call", "event"]
    assert log == one * measure_module.DEVICE_CALLS


@pytest.mark.parametrize(
    ("name", "label"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
     ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L40S", "l40s")],
)  # fmt: skip
def test_files_are_named_after_the_gpu(name, label):
    assert place_and_date({"date": "2026-01-31", "gpu": {"name": name}}) == f"{label}-2026-01-31"
    assert place_and_date({"date": "2026-01-31"}) == "cpu-2026-01-31"


def test_one_that_is_refused_missing_or_broken_costs_the_others_nothing():
    def fails(error):
        def build():
            raise error

        return build

    providers = {
        "good": lambda: lambda: None,
        "other": fails(Refused("other: states differs")),
        "missing": fails(ImportError("x", name="onnxruntime")),
        "broken": fails(RuntimeError("no\nluck")),
    }
    rows = measure(Case(suite="s", name="c", work=Work(), providers=providers, baseline="good"), rounds=3, peaks=PEAKS)
    assert {r["provider"]: r.get("refused") for r in rows} == {
        "good": None, "other": "other: states differs", "missing": "not installed: onnxruntime",
        "broken": "RuntimeError: no luck",
    }  # fmt: skip
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize("name", lengths.DATASETS)
def test_drawn_lengths_are_those_of_the_data_set(name):
    drawn = lengths.sample(name, 20_000, longest=10**9)
    _, mean, quantiles = lengths.DATASETS[name]
    assert drawn.mean() == pytest.approx(mean, rel=0.08)
    assert np.median(drawn) == pytest.approx(quantiles[lengths.LEVELS.index(50)], rel=0.05, abs=1)


@pytest.mark.parametrize(("name", "share"), lengths.ARTIFICIAL.items())
def test_fill_is_what_it_says(name, share):
    drawn = lengths.sample(name, 64, longest=512)
    assert drawn.max() == 512 and drawn.mean() / 512 == pytest.approx(share, rel=0.03)


def test_one_that_breaks_in_a_round_costs_the_others_nothing_and_is_no_baseline():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    providers = {"breaks": lambda: breaks, "good": lambda: lambda: None}
    rows = measure(
        Case(suite="s", name="c", work=Work(), providers=providers, baseline="breaks"), rounds=5, peaks=PEAKS
    )
    assert rows[0]["refused"] == "RuntimeError: out of memory"
    assert rows[1]["seconds"] > 0 and "ratio" not in rows[1]


def test_what_fits_a_cache_may_move_faster_than_a_copy():
    peaks = Peaks(flops=1e12, bytes=1e11, cached=1 << 20)
    assert "seconds" in figures(Work(bytes=1 << 19), [1e-7], None, peaks)
    assert "refused" in figures(Work(bytes=1 << 21), [1e-7], None, peaks)


def test_a_record_of_other_options_is_not_overwritten(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"options": {"rounds": 3}}))
    (tmp_path / "cpu-2.json").write_text("broken")
    assert free_name(tmp_path, "cpu", {"rounds": 3}) == "cpu"
    assert free_name(tmp_path, "cpu", {"rounds": 5}) == "cpu-3"


@pytest.mark.parametrize(
    "flags", ("--only (", "--rounds 0", "--threads -1", "--device cuda", "--device meta", "--lengths none")
)
def test_a_wrong_option_is_one_line_that_names_it(flags, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["infer", *flags.split()])
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_when_nothing_matches_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["kernels", "--op", "nothing", "--out", str(tmp_path)])
    assert "nothing was measured" in capsys.readouterr().err


def test_compare_counts_what_is_gone_or_refused_now_and_not_other_words_of_a_refusal():
    refused = row(provider="x", refused="3.02 is above")
    assert report.compare(record(row(), refused), record(row(), refused | {"refused": "3.05 is above"})) == ([], 0)
    assert report.compare(record(row()), record())[1] == 1
    assert report.compare(record(row()), record(row(refused="no")))[1] == 1
    stages = record(row(stage="infer"), row(stage="infer-compiled", seconds=9.0))
    assert report.compare(stages, stages) == ([], 0)


def test_compare_tells_a_change_from_noise(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record(row(), row(case="same"))))
    slower = row(seconds=1.2, seconds_low=1.15, seconds_high=1.25)
    new.write_text(json.dumps(record(slower, row(case="same", seconds=1.01))))
    assert main(["--compare", str(old), str(new)]) == 1
    assert re.fullmatch(r"SLOWER    infer, half, batch 8.*: \+20.0% \(noise 4.0%\)\n", capsys.readouterr().out)
    assert main(["--compare", str(new), str(old)]) == 0
    assert main(["--compare", str(old), str(old)]) == 0
    assert capsys.readouterr().out.endswith("no change beyond the noise\n")


def test_the_page_needs_nothing_beside_it(tmp_path):
    kernel = row(suite="kernels", direction="fwd", intensity=10.0, flops_per_second=1e11)
    curve = [row(suite="scaling", axis="length", value=value) for value in (64, 128)]
    xray = [{"op": "attention", "arch": 90, "mma": {"HGMMA": 4}, "occupancy": 0.5}]
    found = record(row(), row(provider="<b>&", refused="a < b"), kernel, *curve)
    report.write_html(found, tmp_path / "page.html", xray)
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(?!['\"]?data:)", page) and "<script" not in page and "@import" not in page
    assert page.count("data:image/svg+xml") == 4  # bars twice, the roofline, a curve
    assert "a &lt; b" in page and "4 HGMMA" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the path")
def test_a_browser_shows_the_page_without_a_complaint(tmp_path):
    kernel = row(suite="kernels", direction="fwd", intensity=10.0, flops_per_second=1e11)
    report.write_html(record(row(), kernel, row(provider="x", refused="y")), tmp_path / "page.html")
    command = (
        f"chromium --headless --no-sandbox --disable-gpu --enable-logging=stderr --user-data-dir={tmp_path}/profile"
    )
    options = ["--screenshot=" + str(tmp_path / "page.png"), (tmp_path / "page.html").as_uri()]
    done = subprocess.run([*command.split(), *options], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr and (tmp_path / "page.png").stat().st_size > 10_000


def test_readme_tables_come_from_the_record(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- infer -->\nold\n<!-- /infer -->\nafter\n")
    assert report.update_readme(readme, record(row(), row(suite="train"))) == ["infer"]
    text = readme.read_text()
    assert "old" not in text and "| half, batch 8 | float32, 2 threads | 2.00 (1.90 to 2.10) |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


@pytest.mark.parametrize(
    "content", ("{", "[]", '{"rows": []}', '{"rows": [{"suite": "x"}], "machine": {}, "peaks": {}}')
)
def test_a_file_that_is_no_record_is_named(tmp_path, content, capsys):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(path)])
    assert "odd.json: " in capsys.readouterr().err
