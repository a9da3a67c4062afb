"""The command for a machine with a GPU: all its stages at toy size, and what happens when one goes wrong."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

import pytest

from benchmarks import cases, correctness, gpu, measure, plans, shared_work, warm
from benchmarks.__main__ import main
from benchmarks.gpu import Stage
from minibert_kernels import launch

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(gpu.ROOT), str(gpu.ROOT / "kernels")])}


def forked(stage, limit, folder, environment):
    """As `gpu.run`, in a child of this process, which has imported what a stage takes seconds to import."""
    _, module, *arguments = stage.command
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with (folder / stage.name / "log.txt").open("a") as file, redirect_stdout(file), redirect_stderr(file):
                os.chdir(gpu.ROOT)
                os.environ |= environment
                shared_work.STARTED = time.perf_counter()
                try:
                    code = {"benchmarks": main, "benchmarks.gpu": gpu.main}[module](arguments)
                except BaseException:
                    traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"cut off after {limit:.0f} s"
        time.sleep(0.05)
    code = os.waitstatus_to_exitcode(done[1])
    return "ok" if code == 0 else f"failed with exit code {code}"


@pytest.mark.parametrize("how", ["forks", pytest.param("processes", marks=pytest.mark.slow)])
def test_dry_run_goes_through_every_stage(how, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)  # what it holds is not compiled
    if how == "forks":
        importlib.import_module("transformers.models.bert.modeling_bert")  # once, for all that compare with it
        own = gpu.run
        spared = gpu.COMPILING + (gpu.VITAL, gpu.CORRECTNESS)  # outside of the interpreter, first, or with a pytest

        def run(stage, *rest):
            return (own if stage.name in spared else forked)(stage, *rest)

        monkeypatch.setattr(gpu, "run", run)
    code = main(["gpu", "--dry-run", "--minutes", "60", "--out", str(tmp_path)])  # 9 are too few where others work, too
    printed = capsys.readouterr().out
    assert code == 0, printed
    outcomes = {
        stage.name: json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in gpu.stages(tmp_path, True)
    }
    assert {name: found["outcome"] for name, found in outcomes.items()} == dict.fromkeys(outcomes, "ok")
    assert all(found["records"] for found in outcomes.values())
    assert all(len(found["records"]) == 1 for found in outcomes.values())  # nothing is summed up twice
    assert outcomes["compile"]["compiled"] >= 6 and not outcomes["kernels"]["compiled"]
    groups = outcomes["correctness"]["records"]["result"]["groups"]
    assert groups and all(group["passed"] and not group["failed"] for group in groups.values())
    suites = [outcomes[name] for name in ("kernels", "train", "infer", "kernels-compiled", "train-compiled")]
    rows = [row for suite in suites for record in suite["records"].values() for row in record["rows"]]
    timed = [row for row in rows if row["provider"].startswith("minibert")]
    assert len(timed) >= 15 and not [row for row in timed if "refused" in row]
    assert len((tmp_path / "summary.txt").read_text()) < gpu.SUMMARY
    assert (tmp_path / "report.html").exists() and len(list(tmp_path.glob("cpu-*.json"))) == 1
    assert (tmp_path / "pretraining" / "curve.svg").exists()


def test_what_is_right_comes_before_what_is_fast_and_the_shares_are_nine_minutes(tmp_path):
    order = list(gpu.STAGES)
    assert order[:4] == ["environment", "compile", "correctness", "kernels"] and order[-1] == "plans"
    assert sum(gpu.STAGES.values()) == pytest.approx(gpu.MINUTES)
    said = gpu.shares(gpu.stages(tmp_path, True), 9)
    assert said.startswith("9 minutes: environment ") and said.index("train ") < said.index("plans ")
    assert [stage.name for stage in gpu.stages(tmp_path, True)] == order


def test_the_first_line_says_what_is_missing_and_nothing_that_may_be_is_imported_before(tmp_path):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'triton', 'minibert', 'einops')));"
        "from benchmarks import gpu; gpu.find_spec = lambda name: None if name in ('einops', 'flash_attn') else name;"
        f"from pathlib import Path; gpu.run_all(Path({str(tmp_path)!r}), plan=[])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert first == "missing and needed: einops; not here, so not compared with or drawn: flash_attn"
    assert gpu.preflight().startswith("nothing that is needed is missing")


def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_runs(tmp_path, capsys):
    write = "import json, sys; json.dump({'lines': ['seen ' + str(i) for i in range(9999)]}, open(sys.argv[1], 'w'))"
    for name in ("good", "slow"):
        (tmp_path / name).mkdir()
    early = write.replace("9999", "2") + "; sys.stdout.flush(); import time; time.sleep(60)"
    plan = [
        Stage("bad", 1, ["-c", "raise SystemExit('no such kernel')"]),
        Stage("slow", 1, ["-c", early, str(tmp_path / "slow" / "result.json")]),
        Stage("good", 8, ["-c", write, str(tmp_path / "good" / "result.json")]),
    ]
    results = gpu.run_all(tmp_path, minutes=0.2, plan=plan)
    assert [found["outcome"].split(" after")[0] for found in results] == ["failed with exit code 1", "cut off", "ok"]
    text = (tmp_path / "summary.txt").read_text()
    assert len(text) < gpu.SUMMARY and "no such kernel" in text and text.count("seen 0\n") == 2
    assert "… more in good.json" in text
    assert capsys.readouterr().out.endswith(text + "\n")
    assert gpu.exit_code(results) == 1 and gpu.exit_code(results[1:]) == 0


def test_a_suite_that_lost_its_cuda_context_goes_on_in_another_process(tmp_path):
    seen = "import os, pathlib, sys; path = pathlib.Path(sys.argv[1]); path.exists() and sys.exit(0); path.touch(); "
    plan = [Stage("suite", 1, ["-c", seen + "print('first'); sys.exit(3)", str(tmp_path / "suite" / "seen")])]
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "seen").touch()  # of an earlier run
    [found] = gpu.run_all(tmp_path, minutes=1, plan=plan)
    assert found["outcome"] == "ok" and found["log"] == "first\n"


def test_who_loses_the_cuda_context_ends_the_process_and_the_next_one_begins_behind_the_case(tmp_path, monkeypatch):
    command = ["kernels", "--tiny", "--op", "unpack|pack", "--only", "eager", "--dtype", "float32", "--rounds", "1"]
    command += ["--device", "cpu", "--out", str(tmp_path)]
    lost = [False, True]

    def exit(code):
        raise SystemExit(code)

    monkeypatch.setenv("STAGE_SECONDS", "60")
    monkeypatch.setattr(shared_work, "context_is_lost", lambda: lost.pop(0) if lost else False)
    monkeypatch.setattr("benchmarks.__main__.os._exit", exit)
    monkeypatch.setattr(measure, "probe", lambda *_: measure.Peaks(flops=1e18, bytes=1e18))
    with pytest.raises(SystemExit, match="3"):
        main(command)
    [file] = tmp_path.glob("*.json")
    begun = json.loads(file.read_text())["rows"]
    assert [row["direction"] for row in begun] == ["fwd", "bwd"]
    lost = []
    assert main(command) == 0
    assert json.loads(file.read_text())["rows"] == begun  # there was no further case


def test_without_its_gpu_nothing_else_runs(tmp_path):
    plan = [Stage(gpu.VITAL, 1, ["-c", "raise SystemExit(1)"]), Stage("next", 1, ["-c", "pass"])]
    assert [found["stage"] for found in gpu.run_all(tmp_path, minutes=0.5, plan=plan)] == [gpu.VITAL]


def test_what_was_finished_is_summed_up_when_all_is_ended(tmp_path):
    stage = "import json, sys, time; json.dump({'lines': ['half of it']}, open(sys.argv[1], 'w')); print('up'); "
    stage += "sys.stdout.flush(); time.sleep(60)"
    code = (
        "from benchmarks import gpu; from pathlib import Path; "
        f"here = Path({str(tmp_path)!r}); (here / 'long').mkdir(); "
        f"gpu.run_all(here, plan=[gpu.Stage('long', 1, ['-c', {stage!r}, str(here / 'long' / 'result.json')])])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True)
    log, end = tmp_path / "long" / "log.txt", time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "== long: interrupted" in printed and "half of it" in printed
    assert json.loads((tmp_path / "long.json").read_text())["outcome"] == "interrupted"


def result(stage="short", lines=(), **facts):
    return {"stage": stage, "outcome": "ok", "seconds": 1.0, "log": "", "records": {"r": {"lines": lines}}} | facts


def test_what_short_stages_leave_of_the_summary_others_get():
    long = [f"line {i}".ljust(99) for i in range(500)]
    text = gpu.summary([result("short", ["brief"]), result("one", long), result("two", long)])
    assert len(text) < gpu.SUMMARY
    _, brief, one, two = text.split("== ")
    assert brief.endswith("brief\n") and one.endswith("… more in one.json\n")
    assert min(len(one), len(two)) > 0.47 * (gpu.SUMMARY - 450)


def test_a_failed_group_is_a_failure_and_so_is_that_no_test_was_reached():
    def tested(**count):
        return result("correctness", records={"result": {"lines": [], "groups": {"attention": count}}})

    assert gpu.exit_code([tested(passed=3, failed=0)]) == 0
    assert gpu.exit_code([tested(passed=3, failed=1)]) == 1
    assert gpu.exit_code([tested(passed=0, failed=0)]) == 1
    assert gpu.exit_code([result("correctness", outcome="cut off after 1 s")]) == 1


def test_a_case_is_one_line_of_the_summary_with_all_its_providers():
    rows = [
        {"case": "attention S=128", "direction": "fwd", "dtype": "bfloat16", "provider": "minibert", "seconds": 3e-5,
         "matrix_share": 0.2, "bandwidth_share": 0.8, "load": 1.25},
        {"case": "attention S=128", "direction": "fwd", "dtype": "bfloat16", "provider": "liger",
         "refused": "liger: why"},
    ]  # fmt: skip
    assert gpu._lines({"rows": rows}) == [
        "attention S=128, fwd, bfloat16: minibert 30 µs 80%; liger – (why)", "load of the machine: 1.2 to 1.2",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["gpu"])
    assert "gpu needs a CUDA device" in capsys.readouterr().err


def test_it_asks_for_no_package_that_an_image_for_cuda_may_lack():
    lacking = ("rich", "jsonargparse", "yaml", "datasets", "sklearn", "onnx", "onnxruntime", "sentence_transformers")
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking!r})); import benchmarks.__main__, benchmarks.plans, "
    code += "benchmarks.pretraining, benchmarks.warm, minibert.profile"
    subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, env=ENVIRONMENT, check=True)


# a worker over items that pass, fail, end their process, and never end
WORKER = """
import os, sys, time
from pathlib import Path
from benchmarks import shared_work
folder = Path(sys.argv[1])
for item in ("one", "dies", "two", "hangs", "three"):
    if shared_work.claim(folder, item):
        if item == "dies":
            os.kill(os.getpid(), 9)
        if item == "hangs":
            time.sleep(600)
        shared_work.add(folder, {"item": item, "outcome": "passed"})
"""


def test_processes_share_items_and_one_that_dies_or_hangs_costs_one_item(tmp_path, monkeypatch):
    monkeypatch.chdir(gpu.ROOT)
    calls = []
    shared_work.run(
        ["-c", WORKER, str(tmp_path)], tmp_path, 2, 8, lambda: calls.append(len(shared_work.rows(tmp_path)))
    )
    found = {row["item"]: row for row in shared_work.rows(tmp_path)}
    assert {item: row["outcome"] for item, row in found.items()} == {
        "one": "passed", "two": "passed", "three": "passed", "dies": "failed",
    }  # fmt: skip
    assert found["dies"]["why"] == "the process ended with code -9"
    assert shared_work.is_claimed(tmp_path, "hangs") and calls[-1] == 4


def test_a_command_that_cannot_start_is_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(gpu.ROOT)
    start = time.monotonic()
    shared_work.run(["-c", "raise SystemExit(1)"], tmp_path, 2, 60, lambda: None)
    assert time.monotonic() - start < 30


TESTS = """
import os
import pytest
@pytest.fixture
def device():
    return "cpu"
@pytest.mark.parametrize("dtype", ["torch.float16"])
def test_low(dtype): pass
def test_on_the_device(device): pass
def test_wrong(device): assert 1 == 2, "one is not two"
def test_elsewhere(): pass
"""


def test_groups_name_what_passed_failed_or_was_not_reached(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--fuzz')")
    folder = tmp_path / "out"
    folder.mkdir()
    code = (
        "from pathlib import Path; from benchmarks import correctness as c; c.DRY_PATHS = ['test_it.py'];"
        f"c.work(Path({str(folder)!r}), dry=True, compiling=False); import json;"
        f"print(json.dumps(c.summary(Path({str(folder)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: {what: n for what, n in group.items() if n} for name, group in found["groups"].items()} == {
        "other ops, float16": {"passed": 1}, "edge cases": {"passed": 1, "failed": 1},
    }  # fmt: skip
    [failure] = [line for line in found["lines"] if line.startswith("FAILED")]
    assert "test_wrong" in failure and "one is not two" in failure
    assert "edge cases: 1 passed, 1 failed" in found["lines"]


def test_all_that_later_stages_launch_has_its_turn_in_the_compilation():
    parts = [part for part in correctness.COMPILED if part not in correctness.GROUPS]
    names = [name for name, _ in warm.units(False)]
    assert all(any(name.startswith(part) for name in names) for part in parts)
    assert all(any(name.startswith(part) for part in parts) for name in names)
    assert {case.op for case in cases.TABLE if case.quick} == {
        name.split()[1] for name in names if name.startswith("kernels")
    }
    # attention at d = 64 first, then what the table and a step launch
    assert correctness.COMPILED[0] == correctness.GROUPS[0] and correctness.COMPILED[2:4] == ("kernels", "training")


WARM = """
import torch
from benchmarks import warm
from minibert_kernels import bias_gelu
from minibert_kernels.launches import recorded
x, bias = torch.zeros(32, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)
with warm.compile_only() as failed:
    out = bias_gelu(x, bias, backend="triton")
assert not failed, failed
try:
    bias_gelu(x, bias, backend="triton")
except ValueError as error:
    assert "needs CUDA tensors" in str(error)
else:
    raise SystemExit("launches are still recorded")
with warm.compile_only() as failed:
    bias_gelu(x.float(), bias, backend="triton")
    raise SystemExit("what was launched before an error is compiled, too")
"""
# the same call with Triton's own launch up to the compilation, which looks into the cache
LAUNCH = """
import torch, triton
from triton.runtime.jit import JITFunction
from minibert_kernels import bias_gelu, launch, launches
run = JITFunction.run
JITFunction.run = lambda self, *args, grid, warmup, **options: run(self, *args, grid=grid, warmup=True, **options)
triton.runtime.driver.set_active(launches._Driver(90))
launch.pose(launch.Pose(90, 132))
bias_gelu(torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16), backend="triton")
"""


def test_what_is_launched_is_compiled_into_the_cache_once(tmp_path):
    environment = ENVIRONMENT | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command, seen = [sys.executable, "-c", WARM], []
    for _ in range(2):
        done = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True)
        assert "what was launched before" in done.stderr
        seen.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.cubin")})
    subprocess.run([sys.executable, "-c", LAUNCH], cwd=gpu.ROOT, env=environment, check=True)
    assert len(seen[0]) == gpu.kernels_in(environment) == 2 and seen[1] == seen[0]


def test_a_plan_that_is_taken_is_what_the_next_launch_asks_for():
    key, looked_up = ("sm_90", "dq"), lambda: launch.attention_plan(64, 2, 90, 512, "dq")
    before, default = launch.ATTENTION_TILES[key][0], looked_up()
    plans.take(key, 0, (32, 32, 8))
    try:
        changed = looked_up()
        assert (changed.block_m, changed.block_n, changed.num_warps) == (32, 32, 8)
    finally:
        plans.take(key, 0, before)
    assert looked_up() == default
    assert {tiles for _, _, tiles in plans.first_ring()} > {before, *plans.neighbours(before)}
