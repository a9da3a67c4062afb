"""The kernels compiled for four architectures, without a GPU: in a process of its own, outside the interpreter."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minibert_kernels import _triton, matrix, roofline, sass, step, xray

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="needs triton")
KERNELS = Path(xray.__file__).parents[1]
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
KEYS = "op direction arch plan registers spilled_bytes stack shared_bytes occupancy limiter mma bytes_over_minimum"
GPU = {80: "a100", 90: "h200", 100: "b200", 120: "rtx5090"}
LIMITS = {
    "limits": {
        "spilled_bytes": 0, "serialized_matrix_instructions": 0, "missing_matrix_instructions": 0,
        "bytes_over_minimum": 1.05,
    },
    "exceptions": [],
}  # fmt: skip


def python(*arguments, tmp_path, **environment):
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    own |= {"MINIBERT_XRAY_CACHE": str(tmp_path / "rows")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path, env=outside | own | environment,
    )  # fmt: skip


def compile_plans(tmp_path, *options):
    done = python("-m", "minibert_kernels.xray", "--json", *options, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = found["rows"]
    assert set(found["versions"]) == {"triton", "ptxas", "ptxas-blackwell"}
    for row in rows:
        assert (
            row["spilled_bytes"] == 0 and not row["serialized"] and row["registers"] > 0 and 0 < row["occupancy"] <= 1
        ), row
        # an exception of the limits
        small = re.match(r"d(q|kdv) d=(192|256) .* 90|dq d=192 .* 100", f"{row['plan']} {row['arch']}")
        kind = "HMMA" if small else MATRIX[row["arch"]]
        assert set(row["mma"]) == ({kind} if row["op"] == "attention" else set()), row
        assert row["gpu"] == GPU[row["arch"]] and (row["predicted_us"] is None) == ("crossing" in row["plan"]), row
    return rows


def test_the_plans_of_bert_base_compile_for_four_architectures_within_the_limits(tmp_path):
    rows = compile_plans(tmp_path, "--only", "attention bwd dq d=64$|dropout_add_norm bwd 768 columns, dropout")
    assert {(row["op"], row["arch"]) for row in rows} == {
        (op, arch) for op in ("attention", "dropout_add_norm") for arch in MATRIX
    }
    assert set(KEYS.split()) <= set(rows[0])
    for row in rows:
        assert row["bytes_over_minimum"] >= 1
        # the statistics of a row, a word each, are among the accesses: the fewer the others, the more they count
        assert row["wide_share"] > (0.4 if row["arch"] == 100 else 0.5), row


@pytest.mark.slow
def test_every_default_plan_compiles_for_four_architectures_within_the_limits(tmp_path):
    rows = compile_plans(tmp_path)
    assert len(rows) >= 470
    assert compile_plans(tmp_path) == rows


PLANTED = {
    "spill": r"planted fwd one warp sm_90 spills \d{3,} bytes \(limit: spilled_bytes of 0\)",
    "matrix": r"planted fwd elements sm_90 has no HGMMA instruction \(limit: missing_matrix_instructions of 0\)",
    "serialized": r"planted fwd call sm_90 has serialized matrix instructions "
    r"\(limit: serialized_matrix_instructions of 0\)",
    "twice": r"planted fwd twice moves 1\.500 times its least bytes \(limit: bytes_over_minimum of 1\.05\)",
}


@pytest.fixture(scope="module")
def named_faults(tmp_path_factory):
    """By fault, what is said of it and its sound twin: bytes are counted in the interpreter, the others compiled."""
    folder, found = tmp_path_factory.mktemp("planted"), {}
    for names, interpret in ((PLANTED.keys() - {"twice"}, {}), ({"twice"}, {"TRITON_INTERPRET": "1"})):
        done = python(str(Path(__file__).with_name("planted.py")), *names, tmp_path=folder, **interpret)
        assert done.returncode == 0, done.stderr
        found |= json.loads(done.stdout)
    return found


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_its_sound_twin_is_not(fault, named_faults):
    [found] = named_faults[fault]
    assert re.fullmatch(PLANTED[fault], found), found


def test_rows_come_from_the_cache_the_same_and_neither_damage_nor_an_unwritable_one_breaks_anything(tmp_path):
    code = """
from minibert_kernels import xray, xray_compile
def rows(): return xray.compile_all((80, 120), "pack fwd (1|768|1024) columns", 2)
first = rows()
def refuse(*_): raise AssertionError("compiled again")
compiler, xray_compile._compile_job = xray_compile._compile_job, refuse
assert len(first) == 6 and rows() == first
xray_compile._compile_job = compiler
import os, pathlib
entries = sorted(pathlib.Path(os.environ["MINIBERT_XRAY_CACHE"]).glob("*.json"))
assert len(entries) == 4, "768 and 1,024 columns come to the same code"
for path, damage in zip(entries, ("", "{}", "[7]", "null"), strict=True):
    path.write_text(damage)
assert rows() == first
open("file", "w").close()
os.environ["MINIBERT_XRAY_CACHE"] = "file/inside"
assert rows() == first
"""
    done = python("-c", code, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr


def test_code_is_printed(tmp_path):
    command = ("-m", "minibert_kernels.xray", "--arch", "90")
    done = python(*command, "--ptx", "pack fwd 768 columns", tmp_path=tmp_path)
    assert done.stdout.startswith("// pack fwd 768 columns sm_90") and ".target sm_90a" in done.stdout
    done = python(*command, "--sass", "pack fwd 768 columns", tmp_path=tmp_path)
    assert "STG.E.128" in done.stdout


def test_the_assembler_of_the_environment_is_the_one_that_is_named(tmp_path):
    import triton

    newer = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    code = "import json; from minibert_kernels._triton import compiler_versions; print(json.dumps(compiler_versions()))"
    own = _triton.compiler_versions()
    other = json.loads(python("-c", code, tmp_path=tmp_path, TRITON_PTXAS_PATH=str(newer)).stdout)
    assert own["triton"] == triton.__version__ and own["ptxas"] != own["ptxas-blackwell"]
    assert other == own | {"ptxas": own["ptxas-blackwell"]}


def test_info_and_records_name_what_compiles(capsys):
    from benchmarks.measure import machine
    from minibert.cli import main

    versions = _triton.compiler_versions()
    assert main(["info", "--json"]) == 0
    assert versions.items() <= json.loads(capsys.readouterr().out).items()
    assert versions.items() <= machine()["versions"].items()


def test_a_broken_limit_is_named_and_the_exit_code_says_so(tmp_path):
    strict = LIMITS | {"limits": LIMITS["limits"] | {"bytes_over_minimum": 0.5}}
    (tmp_path / "strict.json").write_text(json.dumps(strict))
    options = ("--arch", "90", "--only", "lamb_step fwd fp32 update", "--limits", "strict.json")
    done = python("-m", "minibert_kernels.xray", *options, tmp_path=tmp_path)
    assert done.returncode == 1
    assert "lamb_step fwd fp32 moves 1.429 times its least bytes (limit: bytes_over_minimum of 0.5)" in done.stderr
    header, line, _, foot, versions = done.stdout.splitlines()
    assert line.startswith("lamb_step fwd fp32 update  90 ") and line.endswith(" memory")
    assert "on h200 (sm_90)" in foot
    assert re.fullmatch(r"compiled by triton [\d.]+, ptxas \d+\.[\d.]+, ptxas-blackwell \d+\.[\d.]+", versions)


def test_a_wrong_option_is_one_line_and_two(monkeypatch, capsys):
    monkeypatch.setattr(xray, "interpreting", lambda: False)
    monkeypatch.setattr(sys, "argv", ["xray", "--only", "nothing"])
    assert (xray.main(), capsys.readouterr().err) == (2, "xray: error: only='nothing' matches no kernel\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "("}, "'(' is no regular expression"),
        ({"gpu": "h300"}, "gpu='h300' is not one of a100"),
        ({"gpu": "h200", "arch": [80]}, "gpu='h200' runs the code of sm_90, which is not in arch="),
        ({"arch": [70]}, "arch=70 is not one of 80, 90, 100, 120"),
        ({"step": ["bert-huge"]}, "step='bert-huge' is not one of bert-base, bert-large"),
        ({"lengths": [128, 0]}, "lengths=0: expected at least 1"),
        ({"tokens": 0}, "tokens=0: expected at least 1"),
        ({"processes": -1}, "processes=-1: expected at least 1"),
        ({"matrix_share": 1.5}, "matrix_share=1.5: expected at most 1"),
        ({"ptx": "pack", "sass": "pack"}, "ptx and sass exclude each other"),
        ({"as_json": True, "diff_with": "old.json"}, "json, markdown and diff exclude each other"),
        ({"ptx": "nothing"}, "ptx='nothing' matches no kernel"),
    ],
)
def test_each_wrong_option_is_named(options, message, monkeypatch):
    monkeypatch.setattr(xray, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=re.escape(message)):
        xray.run(**options)


@pytest.mark.parametrize("text", ["", "7", "[7]", '{"op": 1}', '[{"op": "pack"}]'])
def test_a_file_that_holds_no_rows_is_refused(text, tmp_path):
    (tmp_path / "old.json").write_text(text)
    with pytest.raises(ValueError, match="is no JSON|is no output of --json"):
        xray.load_rows(tmp_path / "old.json")


def test_rows_are_found_in_an_output_with_and_without_steps(tmp_path):
    rows = [dataclasses.asdict(row())]
    for content in (rows, {"rows": rows, "step": []}):
        (tmp_path / "old.json").write_text(json.dumps(content))
        assert xray.load_rows(tmp_path / "old.json") == rows


def test_the_interpreter_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(xray, "interpreting", lambda: True)
    monkeypatch.setattr(sys, "argv", ["xray"])
    assert xray.main() == 2
    assert capsys.readouterr().err == "xray: error: needs Triton's compiler: unset TRITON_INTERPRET\n"


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "tensor_columns", "expected"),
    [
        (90, 8, 168, 57344, 0, (8 / 64, "registers")),  # 168 · 32 = 5,376: 3 warps a quarter, 12 in all, 1 program
        (90, 8, 128, 49152, 0, (16 / 64, "registers")),  # 4,096: 4 a quarter, 2 programs
        (90, 4, 32, 0, 0, (1.0, "warps")),
        (90, 1, 32, 0, 0, (32 / 64, "blocks")),
        (80, 4, 64, 81920, 0, (8 / 64, "shared memory")),  # 81 KiB twice in 164
        (90, 4, 64, 81920, 0, (8 / 64, "shared memory")),  # and in 228, not three times
        (100, 4, 64, 1024, 256, (8 / 64, "tensor memory")),
        (120, 4, 40, 0, 0, (1.0, "warps")),  # 48 warps
        (80, 4, 33, 0, 0, (48 / 64, "registers")),  # 1,056 is handed out as 1,280: 12 a quarter
        (89, 4, 64, 57344, 0, (4 / 48, "shared memory")),  # 57 KiB once in 100
    ],
)
def test_occupancy_is_what_a_hand_computes(arch, num_warps, registers, shared, tensor_columns, expected):
    assert roofline.occupancy(arch, num_warps, registers, shared, tensor_columns) == expected


def row(**changes):
    common = {
        "op": "attention", "direction": "fwd", "plan": "d=64", "kernel": "_fwd_kernel", "arch": 90, "num_warps": 4,
        "num_stages": 2, "registers": 168, "spilled_bytes": 0, "stack": 0, "shared_bytes": 512, "occupancy": 0.25,
        "limiter": "registers", "matmul": True, "mma": {"HGMMA": 8},
    }  # fmt: skip
    return xray.Row(**common | changes)


def test_wide_accesses_are_counted_in_the_code():
    lines = ["LDG.E.128 R4, [R2]", "@P0 LDG.E R4, [R2]", "LDGSTS.E.BYPASS.128 [R4], [R2]", "STG.E.U16 [R2], R4",
             "LDGDEPBAR", "UTMALDG.2D [UR8], [UR6]", "LDS.128 R4, [R2]"]  # fmt: skip
    assert sass.wide_share("\n".join(lines)) == 0.6
    assert sass.wide_share("EXIT") is None


def test_a_loop_s_cost_is_that_of_the_innermost_between_a_branch_and_where_it_leads():
    body = [
        "LDG.E.128 R4, [R2]",
        "@P0 STG.E.U16 [R2], R4",
        "MUFU.EX2 R4, R4",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4]",
    ]
    body += ["FADD R1, R1, R2"] * 12 + ["@P0 BRA 0x20", "NOP"]
    lines = ["LDG.E R4, [R2]", "S2R R0, SR_TID.X", *body, "SYNCS.PHASECHK.TRYWAIT P0, [R1]", "@!P0 BRA 0x140",
             "@P1 BRA.U 0x10", "STG.E [R2], R4", "EXIT", "BRA 0x190"]  # fmt: skip
    code = "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))
    flops = 2 * 64 * 64 * 16 // 4
    assert sass.loops(code) == [{"instructions": 17, "mufu": 1, "flops": flops, "bytes": 16 + 2}]
    assert sass.cost(code.splitlines())["bytes"] == 16 + 2 + 4 + 4
    assert sass.cost(["/*0000*/ HMMA.16816.F32.BF16 R4, R4, R5, R6 ;"])["flops"] == 2 * 16 * 8 * 16


def test_the_bytes_of_a_row_are_those_of_a_call_that_reads_and_writes_the_same():
    def count(op, label, value):
        return {"op": op, "label": label, "forward": 1, "forward_over_minimum": value, "backward": 0,
                "backward_over_minimum": 0.0}  # fmt: skip

    counts = [count("attention", "S=128", 1.01), count("attention", "S=256", 1.02), count("pack", "", 1.03)]
    counts += [count("lamb_step", "fp16", 1.04), count("lamb_step", "fp16 without trust ratio", 1.05)]
    for changes, expected in (
        ({}, 1.02), ({"plan": "d=80 dropout"}, 1.02), ({"plan": "short 128 d=64"}, 1.01),
        ({"direction": "bwd"}, None), ({"plan": "d=64 group 4 dropout"}, None),
        ({"plan": "d=64 dropout bias alibi band schedule"}, None), ({"op": "segment_sum"}, None),
        ({"op": "pack", "plan": "768 columns"}, 1.03), ({"op": "pack", "plan": "1 columns"}, None),
        ({"op": "lamb_step", "plan": "bf16 update"}, 1.04), ({"op": "lamb_step", "plan": "fp32 update"}, None),
        ({"op": "lamb_step", "plan": "bf16 without trust ratio"}, 1.05),
    ):  # fmt: skip
        assert xray.with_bytes(row(**changes), counts).bytes_over_minimum == expected, changes


def test_every_plan_has_bytes_but_those_that_are_known_to_have_none():
    from minibert_kernels import traffic

    counted = {(case.op, case.label) for case in traffic.cases()}
    without = {
        (c.op, c.label.split("columns")[0]) for c in xray.cases(90)
        if (c.op, xray.counted_label(c.op, c.label)) not in counted and "bias alibi" not in c.label
    }  # fmt: skip
    assert {op for op, _ in without} == {"segment_sum", "pack", "mlm_mask"}
    assert {label for op, label in without if op != "segment_sum"} == {"1 ", "128 tokens, span, exact K"}


def test_an_exception_holds_up_to_its_value_and_is_named_when_nothing_needs_it():
    rows = [row(spilled_bytes=16), row(arch=80, mma={"HMMA": 8}, spilled_bytes=32)]
    assert len(xray.faults(rows, [], LIMITS)) == 2
    allowed = {"match": "attention fwd d=64 sm_.*", "limit": "spilled_bytes", "value": 16, "reason": "short"}
    [found] = xray.faults(rows, [], LIMITS | {"exceptions": [allowed]}, whole=True)
    assert found == "attention fwd d=64 sm_80 spills 32 bytes (limit: spilled_bytes of 16)"
    [found] = xray.faults([row()], [], LIMITS | {"exceptions": [allowed]}, whole=True)
    assert found == "the exception 'attention fwd d=64 sm_.*' of spilled_bytes is no longer needed"
    assert xray.faults([row()], [], LIMITS | {"exceptions": [allowed]}) == [], "part of the table cannot tell"


def test_the_limits_have_reasons_and_a_bad_file_is_refused(tmp_path):
    assert all(len(exception["reason"]) > 20 for exception in xray.load_limits()["exceptions"])
    path = tmp_path / "limits.json"
    exception = {"match": "x", "limit": "spilled_bytes", "value": 1, "reason": "none"}
    for wrong, message in (
        ([], "expected limits"),
        ({"limits": {}, "exceptions": []}, "expected limits"),
        (LIMITS | {"exceptions": [7]}, "is not match, limit"),
        (LIMITS | {"exceptions": [{"match": "x", "limit": "spilled_bytes", "value": 1}]}, "is not match, limit"),
        (LIMITS | {"exceptions": [exception | {"match": "("}]}, "is no regular expression"),
        (LIMITS | {"exceptions": [exception | {"value": "1"}]}, "'1' is no number"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            xray.load_limits(path)


def test_a_difference_says_what_changed_what_is_new_and_what_is_gone():
    old = [dataclasses.asdict(r) for r in (row(), row(plan="d=80"), row(plan="d=128"))]
    loop = {"instructions": 40, "mufu": 1, "flops": 0, "bytes": 16}
    new = [
        row(registers=176, occupancy=0.125, mma={}, serialized=True, loops=[loop]),
        row(plan="d=96"),
        row(plan="d=128"),
    ]
    assert xray.diff(old, [dataclasses.asdict(r) for r in new]).splitlines() == [
        "changed  attention fwd d=64 sm_90: registers 168 → 176 (+8), loop None → 40, occupancy 0.25 → 0.125 (-0.125), "
        "mma 8 HGMMA → none, serialized False → True",
        "new      attention fwd d=96 sm_90",
        "gone     attention fwd d=80 sm_90",
    ]
    assert xray.diff(old, old) == "no difference"


def test_a_predicted_time_is_that_of_the_limit_that_binds():
    h200, work = roofline.GPUS["h200"], roofline.Work
    assert roofline.seconds(work(bytes=4.32e12), h200) == (pytest.approx(1), "memory")
    assert roofline.seconds(work(bytes=1, flops=989.4e12), h200, matrix_share=0.5) == (pytest.approx(2), "matrix")
    assert roofline.seconds(work(bytes=1), h200, launch=3e-6) == (3e-6, "latency")
    found = xray.with_time(row(), "h200")
    # two products of 16,384 tokens · 512 keys · 12 heads · 64, at 70% of the peak
    flops = 2 * 2 * 16384 * 512 * 12 * 64
    assert found.predicted_us == round(1e6 * flops / (0.7 * 989.4e12), 1) and found.bound == "matrix"
    assert xray.with_time(row()) == found, "the typical GPU where none is named"
    assert xray.with_time(row(arch=80), "h200").gpu == "a100", "and where the named one runs other code"


def test_issue_slots_are_those_of_as_many_trips_as_the_work_needs():
    h200, loop = roofline.GPUS["h200"], {"instructions": 600, "mufu": 40, "flops": 1 << 20, "bytes": 64}
    masked, code = loop | {"instructions": 700}, loop | {"instructions": 2000}
    work = roofline.kernel_work("attention", "fwd", "d=64")  # 2 products of 512 keys · 12 heads · 64
    trips = 2 * 2 * 512 * 12 * 64 / (1 << 20)
    found = roofline.slots(work, code, [masked, loop])
    assert (found.instructions, found.mufu) == (600 * trips, 40 * trips)
    assert roofline.slots(work, code, [loop | {"flops": 0}]).instructions == 2000 * trips, "no loop has a product"
    assert roofline.slots(work, code | {"flops": 0}, []) is None, "an instruction that does not say its shape"
    gelu = roofline.Work(bytes=4 * 3072)
    found = roofline.slots(gelu, code, [], padding=1.5)
    assert found.instructions == 1.5 * 2000 * 4 * 3072 / (64 * 32), "a warp moves 32 times what a thread does"
    time, bound = roofline.seconds(gelu, h200, 16384, slots=found)
    assert bound == "issue"
    assert time == pytest.approx(16384 * found.instructions / (roofline.ISSUE_SHARE * 4 * 132 * 1.83e9))


def test_a_step_s_kernels_are_the_compiled_ones_and_their_times_make_the_step_s():
    loop = {"instructions": 599, "mufu": 34, "flops": 1 << 18, "bytes": 64}
    rows = [row(plan="d=64 dropout schedule", code=loop, loops=[loop]),
            row(op="bias_gelu", plan="3072 columns", code=loop | {"flops": 0})]  # fmt: skip
    [found] = [r for r in step.step_rows(["bert-base"], [512], ["h200"], rows=rows) if r["variant"] == "minibert"]
    kernels = {k["kernel"]: k for k in found["kernels"]}
    assert {k["launches"] for k in kernels.values()} == {12, 24}
    attention, gelu = kernels["attention fwd d=64 dropout schedule"], kernels["bias_gelu fwd 3072 columns"]
    assert (attention["registers"], attention["loop"], attention["bound"]) == (168, 599, "issue")
    assert gelu["instructions"] > 0 and kernels["bias_gelu bwd 3072 columns"]["instructions"] is None
    assert sum(op["share"] for op in found["ops"].values()) == pytest.approx(1)
    own = sum(k["us"] for k in found["kernels"] if k["op"] == "attention")
    assert own == pytest.approx(found["ops"]["attention"]["share"] * found["step_us"])
    [plain] = [r for r in step.step_rows(["bert-base"], [512], ["h200"]) if r["variant"] == "minibert"]
    assert plain["mfu"] > found["mfu"], "instructions take time"
    assert "attention fwd d=64 dropout schedule" in step.step_text([found])


def test_lamb_s_time_is_that_of_all_parameters_and_the_loss_s_that_of_the_labelled_rows():
    found = xray.with_time(row(op="lamb_step", plan="fp32 moments"), "h200")
    parameters = roofline.MODELS["bert-base"].parameters
    assert found.predicted_us == round(1e6 * 24 * parameters / (0.9 * 4.8e12), 1) and found.bound == "memory"
    work = roofline.kernel_work("linear_cross_entropy", "fwd", "V=30522 with gradient")
    assert (work.unit, work.units, work.bytes) == ("labelled row", 2458, 4 * 30522)


def test_a_gpu_has_the_occupancy_of_its_own_multiprocessors():
    compiled = row(arch=80, num_warps=8, registers=168, shared_bytes=57344)
    assert (xray.with_time(compiled).occupancy, xray.with_time(compiled).limiter) == (0.25, "registers")
    found = xray.with_time(compiled, "rtx4090")
    assert (found.gpu, found.occupancy, found.limiter) == ("rtx4090", round(8 / 48, 4), "registers")


def test_every_plan_has_a_formula_or_is_known_to_have_none():
    without = [c for c in xray.cases(90) if roofline.kernel_work(c.op, c.direction, c.label) is None]
    without = {(c.op, c.label.split(",")[0]) for c in without}
    assert without == {("segment_sum", "crossing runs")}  # how many runs cross a border is up to the data
    assert {gpu.arch for gpu in roofline.GPUS.values()} == set(MATRIX)
    assert {roofline.GPUS[name].arch: name for name in roofline.TYPICAL.values()} == roofline.TYPICAL == GPU


def test_a_step_needs_fewer_bytes_fused_and_its_time_is_that_of_its_ops():
    rows = step.step_rows(["bert-base"], [128, 512], ["h200", "b200"])
    assert len(rows) == 2 * 3 * 2
    for length in (128, 512):
        moved = [
            sum(op["bytes"] for op in r["ops"].values()) for r in rows if (r["length"], r["gpu"]) == (length, "h200")
        ]
        assert moved == sorted(moved) and moved[0] < moved[2]
    assert all(
        0 < r["mfu"] < roofline.MATRIX_SHARE and sum(o["share"] for o in r["ops"].values()) > 0.999 for r in rows
    )
    base = roofline.MODELS["bert-base"]
    assert base.parameters == pytest.approx(109e6, rel=0.01)
    # six FLOPs a weight of the layers, and twelve a layer, key and column of the scores
    assert roofline.model_flops(base, 128) == pytest.approx(6 * 85e6 + 12 * 12 * 128 * 768 + 0.15 * 6 * 24e6, rel=0.01)
    assert "minibert" in step.step_text(rows) and "b200: 65536 tokens, MFU" in step.step_text(rows)


def test_tables_have_a_line_a_row_and_a_column_an_architecture():
    rows = [
        row(direction=direction, kernel=f"_{direction}_kernel", arch=arch, registers=arch + 1, mma={"HMMA": 8})
        for arch in (80, 120)
        for direction in ("fwd", "bwd")
    ]
    text = xray.table(rows).splitlines()
    assert len(text) == 5
    assert " ".join(text[1].split()) == "attention fwd d=64 80 4 2 81 0 - - 0 512 25% registers 8 HMMA - - - - - -"
    timed = row(flops_per_unit=1572864.0, intensity=256.0)
    assert xray.table([xray.with_time(timed, "h200")]).splitlines()[1].split()[-4:] == [
        "1.57M",
        "256",
        "37.2",
        "matrix",
    ]
    counts = [
        {
            "op": "attention",
            "label": "S=128",
            "forward_over_minimum": 1.008,
            "backward_over_minimum": 1,
            "saved": 1032.0,
        }
    ]
    ops, plans = (part.splitlines() for part in xray.markdown(rows, counts).split("\n\n"))
    assert re.fullmatch(r"\| `attention` \| S=128 \| `attention.py` \| \d+ \| 1.008 \| 1 \| 1032 \|", ops[2])
    assert plans == [
        "| op | plan | kernel | sm_80 | sm_120 |",
        "|---|---|---|---|---|",
        "| `attention` | fwd, d=64 | `_fwd_kernel` | 81 / 0 / 512 / 25% / 8 HMMA | 121 / 0 / 512 / 25% / 8 HMMA |",
        "| `attention` | bwd, d=64 | `_bwd_kernel` | 81 / 0 / 512 / 25% / 8 HMMA | 121 / 0 / 512 / 25% / 8 HMMA |",
    ]


def test_the_matrix_counts_what_breaks_a_limit_by_version_and_architecture():
    fault = "attention fwd d=64 sm_90"
    faults = [f"{fault} does not compile: CompilationError: x", f"{fault} spills 8 bytes (limit: spilled_bytes of 0)"]
    found = {"versions": {"triton": "3.6.0"}, "kernels": {"80": 7, "90": 6}, "faults": faults}
    assert [line.split() for line in matrix.lines("3.6.0", found)] == [
        ["3.6.0", "sm_80", "7", "0", "0", "0", "0"], ["3.6.0", "sm_90", "6", "1", "1", "0", "0"]
    ]  # fmt: skip


def test_the_matrix_compiles_with_the_triton_of_a_folder_and_refuses_another(tmp_path):
    import triton

    place = tmp_path / "tritons" / triton.__version__
    place.mkdir(parents=True)
    (place / "triton").symlink_to(Path(triton.__file__).parent)
    options = ("--tritons", "tritons", "--arch", "90", "--only", "pack fwd 768", "--processes", "1")
    done = python("-m", "minibert_kernels.matrix", *options, "--versions", triton.__version__, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == [triton.__version__, "sm_90", "1", "0", "0", "0", "0"]
    place.rename(place.with_name("3.5.0"))
    done = python("-m", "minibert_kernels.matrix", *options, "--versions", "3.5.0", tmp_path=tmp_path)
    assert done.returncode == 1
    assert f"Triton 3.5.0 was asked for, and {triton.__version__} was imported" in done.stderr
