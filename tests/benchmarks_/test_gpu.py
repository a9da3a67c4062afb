"""The command for a machine with a GPU: all its stages at toy size, and what happens when one goes wrong."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.gpu import Stage


def test_dry_run_goes_through_every_stage(tmp_path, capsys):
    code = main(["gpu", "--dry-run", "--minutes", "60", "--out", str(tmp_path)])  # 9 are too few where others work, too
    printed = capsys.readouterr().out
    assert code == 0, printed
    outcomes = {
        stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in gpu.stages(tmp_path, True)
    }
    assert {name: found["outcome"] for name, found in outcomes.items()} == dict.fromkeys(outcomes, "ok")
    assert all(found["records"] for name, found in outcomes.items() if name != "tests")
    suites = [outcomes[name] for name in ("kernels", "train", "infer", "train-compiled", "infer-compiled")]
    rows = [row for suite in suites for record in suite["records"].values() for row in record["rows"]]
    timed = [row for row in rows if row["provider"].startswith("minibert")]
    assert len(timed) >= 15 and not [row for row in timed if "refused" in row]
    assert len((tmp_path / "summary.txt").read_text()) < gpu.SUMMARY
    assert (tmp_path / "report.html").exists() and len(list(tmp_path.glob("cpu-*.json"))) == 1
    assert (tmp_path / "pretraining" / "curve.svg").exists()


def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_runs(tmp_path, capsys):
    write = "import json, sys; json.dump({'lines': ['seen ' + str(i) for i in range(9999)]}, open(sys.argv[1], 'w'))"
    (tmp_path / "good").mkdir()
    plan = [
        Stage("bad", 1, ["-c", "raise SystemExit('no such kernel')"]),
        Stage("slow", 1, ["-c", "import time; time.sleep(60)"]),
        Stage("good", 8, ["-c", write, str(tmp_path / "good" / "result.json")]),
    ]
    results = gpu.run_all(tmp_path, minutes=0.2, plan=plan)
    assert [found["outcome"].split(" after")[0] for found in results] == ["failed with exit code 1", "stopped", "ok"]
    text = (tmp_path / "summary.txt").read_text()
    assert len(text) < gpu.SUMMARY and "no such kernel" in text and "seen 0\n" in text
    assert "… more in good.json" in text
    assert capsys.readouterr().out.endswith(text + "\n")


def test_what_short_stages_leave_of_the_summary_others_get():
    def result(stage, lines):
        return {"stage": stage, "outcome": "ok", "seconds": 1.0, "log": "", "records": {"r": {"lines": lines}}}

    long = [f"line {i}".ljust(99) for i in range(500)]
    text = gpu.summary([result("short", ["brief"]), result("one", long), result("two", long)])
    assert len(text) < gpu.SUMMARY
    _, brief, one, two = text.split("== ")
    assert brief.endswith("brief\n") and one.endswith("… more in one.json\n")
    assert min(len(one), len(two)) > 0.47 * (gpu.SUMMARY - 450)


def test_a_case_is_one_line_of_the_summary_with_all_its_providers():
    rows = [
        {"case": "attention S=128", "direction": "fwd", "dtype": "bfloat16", "provider": "minibert", "seconds": 3e-5,
         "matrix_share": 0.2, "bandwidth_share": 0.8},
        {"case": "attention S=128", "direction": "fwd", "dtype": "bfloat16", "provider": "liger", "refused": "why"},
    ]  # fmt: skip
    assert gpu._lines({"rows": rows}) == ["attention S=128, fwd, bfloat16: minibert 30 µs 80%; liger not timed (why)"]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["gpu"])
    assert "gpu needs a CUDA device" in capsys.readouterr().err


def test_it_asks_for_no_package_that_an_image_for_cuda_may_lack():
    lacking = ("rich", "jsonargparse", "yaml", "datasets", "sklearn", "onnx", "onnxruntime", "sentence_transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); import benchmarks.__main__, benchmarks.plans, "
    code += "benchmarks.pretraining, minibert.profile"
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, check=True)
