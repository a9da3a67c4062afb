"""What becomes of measured seconds: figures, comparisons, pages."""

import json
import re
import shutil
import subprocess
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import lengths, report
from benchmarks import measure as measure_module
from benchmarks.__main__ import free_name, main
from benchmarks.gate import Refused
from benchmarks.measure import (
    Case,
    Peaks,
    Work,
    extra_memory,
    figures,
    joules,
    measure,
    on_device,
    place_and_date,
    spread,
)

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
    assert timer.how == "wall clock" and 0.02 <= timer.sample().seconds < 0.5
    assert joules(lambda: None) is None


@pytest.mark.parametrize("captured", (True, False))
def test_on_a_gpu_a_call_is_timed_behind_a_read_of_other_data_without_the_read_or_the_start_of_a_graph(
    captured, monkeypatch
):
    """A stand-in for torch.cuda that writes down what is asked of it: the order is what is tested, not a GPU."""
    log, clock = [], [0.0]
    start, read, work = 5.0, 2.0, 3.0  # milliseconds of a graph's start, of the read, of the call

    def does(name, milliseconds):
        def act(*arguments):
            (graphs[-1] if capturing else log).append((name, milliseconds))
            clock[0] += 0 if capturing else milliseconds

        return act

    graphs, capturing = [], []

    class Graph:
        def __init__(self):
            self.content = []
            graphs.append(self.content)

        def replay(self):
            clock[0] += start + sum(milliseconds for _, milliseconds in self.content)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    @contextmanager
    def capture(graph, stream):
        capturing.append(graph)
        yield
        capturing.pop()

    cuda = SimpleNamespace(
        is_available=lambda: True, stream=lambda stream: nullcontext(), CUDAGraph=Graph, graph=capture, Event=Event,
        synchronize=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(measure_module.torch, "cuda", cuda)
    monkeypatch.setattr(measure_module, "side_stream", lambda: "side")
    monkeypatch.setattr(measure_module, "never_waits", lambda call: captured)
    monkeypatch.setattr(measure_module.torch, "zeros", lambda *args, **options: SimpleNamespace(sum=does("read", read)))
    monkeypatch.setattr(measure_module, "_reads", measure_module._reads.__wrapped__)  # not to be kept
    timer = on_device(does("call", work))
    assert timer.how == ("CUDA graph" if captured else "launches")
    assert timer.sample().seconds == pytest.approx(work / 1e3)
    if captured:
        assert [[name for name, _ in graph] for graph in graphs] == [
            ["read"] * measure_module.DEVICE_CALLS, ["read", "call"] * measure_module.DEVICE_CALLS,
        ]  # fmt: skip


def test_quantiles_of_few_rounds_are_interpolated():
    assert spread([1.0, 2.0, 3.0]) == pytest.approx((2, 1.4, 2.6))
    assert spread([float(i) for i in range(9)]) == pytest.approx((4, 1.6, 6.4))
    assert spread([7.0]) == (7, 7, 7)


def test_a_row_whose_process_waited_for_a_core_says_so():
    def call():
        time.sleep(0.02)

    def work():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    case = Case(suite="s", name="c", work=Work(), providers={"waits": lambda: call}, baseline="waits")
    [row] = measure(case, rounds=3, peaks=PEAKS)
    assert row["waited"] == 3 and row["cpu_seconds"] < 0.01 and row["switches"] >= 0 and row["load"] >= 0
    titles, texts = report.cells([row])
    assert "DISTURBED: 3 of 3 rounds" in texts[0] and "load" in titles
    sample = measure_module.timed(work)
    assert sample.cpu_seconds >= 0.02
    busy = measure_module.cpu_use([measure_module.Sample(1.0, 1.9, 0), measure_module.Sample(1.0, 1.0, 4)])
    assert busy == {"cpu_seconds": 1.45, "switches": 4, "waited": 0}
    assert measure_module.cpu_use([measure_module.Sample(1.0)]) == {}
    elsewhere = replace(case, elsewhere=True)
    assert "waited" not in measure(elsewhere, rounds=1, peaks=PEAKS)[0]


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


def test_once_the_cuda_context_is_lost_nobody_else_is_blamed(monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure_module, "context_is_lost", lambda: True)
    providers = {"good": lambda: lambda: None, "bad": lambda: fails, "late": lambda: lambda: None}
    rows = measure(Case(suite="s", name="c", work=Work(), providers=providers, baseline="good"), rounds=3, peaks=PEAKS)
    assert [row["refused"] for row in rows] == [
        "not timed: bad lost the CUDA context",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
        "not reached: bad lost the CUDA context",
    ]


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


def on_machine(found, **facts):
    return found | {"machine": found["machine"] | facts}


def test_records_of_different_machines_are_neither_compared_nor_put_into_one_table(tmp_path, capsys):
    files = [tmp_path / name for name in ("one.json", "other.json", "gpu.json")]
    one = on_machine(record(row()), cores=2)
    others = on_machine(record(row(case="x")), cores=4), on_machine(record(row(case="y")), gpu={"name": "NVIDIA H200"})
    for file, found in zip(files, (one, *others), strict=True):
        file.write_text(json.dumps(found))
    for verb in ("--compare", "report"):
        for other, differs in zip(files[1:], ("cores 2 and 4", "GPU none and NVIDIA H200"), strict=True):
            with pytest.raises(SystemExit, match="2"):
                main([verb, str(files[0]), str(other)])
            assert (
                f"different machines are not {'compared' if verb == '--compare' else 'put'}"
                in (said := capsys.readouterr().err)
                and differs in said
            )


def test_what_does_other_work_is_not_called_slower():
    old, new = row(work={"tokens": 100}), row(work={"tokens": 200}, seconds=9.0, seconds_low=9.0, seconds_high=9.0)
    lines, count = report.compare(record(old), record(new))
    assert count == 1 and lines[0].startswith("OTHER") and "not compared" in lines[0]
    versions = [on_machine(record(row()), versions={"torch": number}) for number in ("2.12", "2.13")]
    assert report.compare(*versions) == (["version   torch 2.12, now 2.13"], 0)


def test_two_rows_of_one_call_are_an_error_and_two_peaks_of_one_name_are_both_kept():
    with pytest.raises(ValueError, match="two rows are of infer, half, batch 8"):
        report.compare(record(row(), row(seconds=2.0)), record(row()))
    with pytest.raises(ValueError, match="two rows are of"):
        report.merge([record(row()), record(row())])
    slower = record(row(case="other")) | {"peaks": {"float32, 2 threads": {"flops": 5e11, "bytes": 1e11, "cached": 0}}}
    merged = report.merge([record(row()), slower, record(row(case="third"))])
    assert [peak["flops"] for peak in merged["peaks"].values()] == [1e12, 5e11]
    assert list(merged["peaks"]) == ["float32, 2 threads", "float32, 2 threads (2)"]


def test_a_table_says_the_load_and_how_many_figures_were_disturbed():
    text = report.markdown([row(load=0.5), row(provider="x", load=3.25, waited=2, rounds=5)])
    assert "Load of the machine meanwhile: 0.5 to 3.2." in text and "1 of 2 figures were disturbed" in text


@pytest.mark.parametrize(
    "content", ("{", "[]", '{"rows": []}', '{"rows": [{"suite": "x"}], "machine": {}, "peaks": {}}')
)
def test_a_file_that_is_no_record_is_named(tmp_path, content, capsys):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(path)])
    assert "odd.json: " in capsys.readouterr().err
