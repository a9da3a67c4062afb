"""Launches recorded without a GPU: in a process of its own, outside the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minibert_kernels import _triton, launches

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="needs triton")
ROOT = Path(__file__).parents[2]


def printed(code, tmp_path):
    """What a script prints last, as JSON."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    own |= {"MINIBERT_XRAY_CACHE": str(tmp_path / "rows")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=outside | own)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_op_s_launches_are_recorded_as_variants_with_their_grids_and_nothing_remains(tmp_path):
    code = """
import json, torch, triton
from minibert_kernels import bias_gelu
from minibert_kernels.launches import recorded
from minibert_kernels.launch import capability, multiprocessors
x, bias = torch.zeros(4096, 768, dtype=torch.bfloat16, requires_grad=True), torch.zeros(768, requires_grad=True)
with recorded(100, 148) as found:
    assert (capability(x.device), multiprocessors(x.device)) == (100, 148)
    for _ in range(3):
        bias_gelu(x, bias)
    bias_gelu(x[:32], bias).sum().backward()
again = bias_gelu(x, bias)  # by the reference, as ever on a CPU
assert torch.equal(again, torch.zeros_like(x)) and capability(x.device) == 90
assert triton.runtime.driver._active is None
print(json.dumps([[v.kernel, v.grids, v.source.signature["x_ptr"], v.options["num_warps"]] for v in found.variants]))
"""
    forward, backward = printed(code, tmp_path)
    assert forward[0] == "_bias_act_fwd_kernel" and forward[2:] == ["*bf16", 4]
    assert len(forward[1]) == 4 and forward[1][:3] == [forward[1][0]] * 3 and forward[1][3] != forward[1][0]
    assert backward[0] == "_bias_act_bwd_kernel" and len(backward[1]) == 1


def test_x_ray_compiles_what_a_training_step_launches(tmp_path):
    code = """
import json
from minibert.config import BertConfig
from minibert.profile.launches import step_launches
from minibert_kernels import xray, xray_compile
config = BertConfig.preset("bert-tiny", hidden_size=128, num_attention_heads=2, vocab_size=512)
found = step_launches(config, mode="train", length=256, batch_size=4)
cases = xray_compile.launched_cases({"train 256": found}, 90)
known = {xray_compile._identity(case) for case in [*xray_compile.cases(90), *cases]}
assert all(xray_compile._identity(v.case("", "", "", False)) in known for v in found.variants)
names = [f"{case.op} {case.direction} {case.label}" for case in cases]
rows = xray.compile_all((90,), "bias_gelu fwd .*launched", 1, more={90: cases})
print(json.dumps({"kernels": sorted(found.by_kernel()), "names": names, "rows": [row.plan for row in rows]}))
"""
    found = printed(code, tmp_path)
    assert {"_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_cross_entropy_kernel"} <= set(found["kernels"])
    assert len(set(found["names"])) == len(found["names"]) and not any("unknown" in name for name in found["names"])
    assert found["rows"] and all(", launched by train 256" in plan for plan in found["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "most"), [("train", 8), ("infer", 3)])
def test_two_hundred_random_batches_compile_few_variants_of_a_kernel(mode, most, tmp_path):
    code = f"""
import json
from minibert.profile.launches import variants_of_batches
found = variants_of_batches({mode!r}, 200)
print(json.dumps({{kernel: len(variants) for kernel, variants in found.by_kernel().items()}}))
"""
    found = printed(code, tmp_path)
    assert max(found.values()) <= most, found


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(launches, "interpreting", lambda: True)
    with pytest.raises(ValueError, match="unset TRITON_INTERPRET"), launches.recorded(90, 132):
        pass
