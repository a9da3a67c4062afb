"""The direction of imports, the shape of the tree, and what an import may do to others."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("minibert", "kernels", "benchmarks", "tests")
PHILOX = "minibert_kernels.philox"
BASE = {"config", "batch", "files", "hub", "model", "data", "version", PHILOX}

# who may import what of ours; nobody imports the package itself
ALLOWED = {
    "config": set(),
    "files": set(),
    "version": set(),
    "batch": {"config"},
    "hub": {"config", "files"},
    "model": {"config", "batch", "hub", "minibert_kernels"},
    "data": {"config", "batch", "files", PHILOX},
    "integrations": {"config", "batch", "data", "hub", "model"},
    "train": BASE | {"minibert_kernels"},
    "tasks": BASE | {"train"},
    "profile": BASE | {"minibert_kernels", "train"},
    "explain": BASE - {"hub", "files", PHILOX} | {"tasks", "train"},
    "demo": BASE | {"minibert_kernels", "train", "tasks", "integrations", "cli"},
    "cli": BASE | {"minibert_kernels", "train", "tasks", "integrations", "profile", "explain", "demo"},
}
TRANSFORMERS = ("minibert/integrations/", "benchmarks/peers.py", "tests/parity/")


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path):
    """The absolute dotted name of everything a file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def ours(name):
    """What of ours a dotted name stands for: a part of minibert, minibert itself, or the kernels."""
    first, *rest = name.split(".")
    if first == "minibert_kernels":
        return PHILOX if name.startswith(PHILOX) else first
    if first != "minibert":
        return None
    return rest[0] if rest and rest[0] in ALLOWED else first


def owner(path):
    """The part of minibert that a file belongs to."""
    return path.relative_to(ROOT / "minibert").parts[0].removesuffix(".py")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_every_part_of_the_package_has_a_row_in_the_table():
    parts = {owner(path) for path in sources("minibert")} - {"__init__", "__main__"}  # the command alone
    assert parts == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part):
    allowed = ALLOWED[part] | {part} | ({PHILOX} if "minibert_kernels" in ALLOWED[part] else set())
    wrong = [
        f"{relative(path)} imports {name}"
        for path in sources("minibert")
        if owner(path) == part
        for name in imports(path)
        if ours(name) not in {None, *allowed}
    ]
    assert not wrong


FORMS = """
import torch.nn
from ..model import BertModel
from .. import hub, __version__
from .text import a
import minibert.train.loop
def f():
    from minibert_kernels.philox import fold
    from minibert import cli
"""


def test_the_walk_sees_an_import_in_each_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "minibert" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(FORMS)
    expected = [None, "model", "hub", "minibert", "data", "train", PHILOX, "cli"]
    assert [ours(name) for name in imports(path)] == expected


def module(path):
    """The dotted name of a file of ours."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[parts[0] == "kernels" :]).removesuffix(".__init__")


def test_no_file_imports_itself_through_others():
    files = {module(path): path for path in sources("minibert", "kernels")}
    graph = {}
    for name, path in files.items():
        imported = [target.removeprefix("kernels.") for target in imports(path)]
        # what is imported is a file, or a name in one
        graph[name] = {t if t in files else t.rpartition(".")[0] for t in imported} & files.keys() - {name}
    assert len(graph["minibert.train.loop"]) > 10 and "minibert_kernels.jit" in graph["minibert_kernels.gelu"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the way around


def test_the_kernels_import_nothing_of_minibert():
    known = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "minibert_kernels"}
    for path in sources("kernels"):
        names = {name.removeprefix("kernels.").split(".")[0] for name in imports(path)}
        assert names <= known, f"{relative(path)} imports {names - known}"


def test_nothing_imports_tests_or_benchmarks():
    for path in sources("minibert", "kernels"):
        assert not {name.split(".")[0] for name in imports(path)} & {"tests", "benchmarks"}, relative(path)


def test_transformers_is_imported_in_three_places_only():
    for path in sources(*CODE):
        if relative(path).startswith(TRANSFORMERS):
            continue
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"transformers", "sentence_transformers"}, relative(path)


def test_the_folder_of_the_kernels_is_no_package():
    assert (ROOT / "kernels" / "minibert_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_file_is_short_enough_to_read():
    long = {
        relative(path): n for path in sources("minibert", "kernels") if (n := len(path.read_text().splitlines())) >= 600
    }
    assert not long


def test_every_function_is_short_enough_to_read():
    long = [
        f"{relative(path)}: {node.name}"
        for path in sources("minibert", "kernels")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 100
    ]
    assert not long


def test_no_file_names_a_place_on_one_machine():
    homes = ["/" + name + "/" for name in ("work", "home", "root", "Users", "mnt")]
    documents = [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.py"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("docs/*.md"),
        ROOT / "Makefile",
    ]
    for path in [*sources(*CODE), *documents, ROOT / ".ci" / "run"]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [home for home in homes if home in text], path


def run(program, *paths, cwd=ROOT):
    """Run a program in a process of its own, with these folders and nothing else on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", program], cwd=cwd, env=environment, capture_output=True, text=True)


def test_transformers_imports_beside_a_package_called_kernels(tmp_path):
    """transformers looks for the distribution `kernels`; where it is installed, our folder must not be taken for it."""
    pytest.importorskip("transformers")
    metadata = tmp_path / "kernels-0.99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99.0\n")
    (metadata / "RECORD").write_text("")
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.99.0'\n__getattr__ = lambda name: type(name, (), {})\n")
    program = """
import importlib.metadata, transformers
from transformers import BertModel
import kernels
print(importlib.metadata.version("kernels"), kernels.__version__)
"""
    done = run(program, ROOT, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0.99.0", "0.99.0"]


def test_the_package_runs_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from minibert import BertConfig, BertForPreTraining
from minibert.batch import pack
from minibert_kernels.dispatch import explain
config = BertConfig.preset("bert-tiny", vocab_size=31, num_hidden_layers=1)
model = BertForPreTraining(config)
batch = pack([[1, 2, 3], [4]], mlm_rows=torch.tensor([1]), mlm_labels=torch.tensor([9]))
model(batch, seed=1).loss.backward()
print(all(p.grad.isfinite().all() for p in model.bert.encoder.parameters()))
print(explain("attention")["why"])
try:
    BertForPreTraining(config, backend="triton")(batch)
except ValueError as error:
    print(error)
"""
    done = run(program, ROOT, ROOT / "kernels")
    assert done.returncode == 0, done.stderr[-2000:]
    finite, explanation, error = done.stdout.splitlines()
    assert finite == "True"
    assert explanation == "'triton' needs the package triton, which is not installed"
    assert error.endswith("backend='triton' needs the package triton, which is not installed: use backend='reference'")


def test_importing_the_package_imports_neither_transformers_nor_the_command_line():
    program = """
import sys, minibert
print(sorted({"transformers", "datasets", "jsonargparse", "matplotlib", "sklearn"} & set(sys.modules)))
print(sorted(minibert.__all__))
"""
    done = run(program, ROOT, ROOT / "kernels")
    assert done.returncode == 0, done.stderr[-2000:]
    heavy, names = done.stdout.splitlines()
    assert heavy == "[]"
    for name in ("BertConfig", "BertModel", "BertForPreTraining", "BertForMaskedLM", "Tokenizer"):
        assert repr(name) in names
