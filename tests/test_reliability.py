"""What chapter 35 promises, tried in a minute by the quick form of torture.py (`make torture` takes hours); the page
names tests that exist, and its numbers are of runs in which nothing broke."""
import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest

from bdpo_lit.offline.training import load_checkpoint, save_checkpoint
from bdpo_lit.reference.style import result

TESTS = Path(__file__).parent
PAGE, = (TESTS.parent / "nbs" / "reference").glob("*_reliability.ipynb")
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and /proc as on Linux")


@pytest.fixture(scope="module")
def tried(run, tmp_path_factory):
    "All parts in small."
    out = tmp_path_factory.mktemp("torture") / "torture.json"
    done = run(sys.executable, "torture.py", "--quick", "--out", out, cwd=TESTS, check=False, OMP_NUM_THREADS="1")
    assert out.exists(), done.stderr
    return json.loads(out.read_text())


@linux
@pytest.mark.parametrize("part", ["kill", "checkpoints", "disk", "files", "data", "soak", "numerics"])
def test_no_promise_is_broken(part, tried):
    assert not tried[part]["bad"], "\n".join(tried[part]["bad"])


@linux
def test_something_was_tried(tried):
    kill, damages, disk = tried["kill"]["counts"], tried["checkpoints"]["damages"].values(), tried["disk"]["counts"]
    assert kill["runs"] == kill["ended alike"] >= 1
    assert sum(d.get("files", 0) for d in damages) >= tried["checkpoints"]["count"]
    assert disk["ended alike"] == tried["disk"]["count"] and any("no room for" in k for k in disk)
    assert {"read", "refused"} <= tried["files"]["counts"].keys()
    assert tried["numerics"]["again_equal"] and len(tried["soak"]["samples"]) >= 10


def test_other_numbers_are_noticed(tmp_path):
    "A checkpoint that is whole, but differs in the last bit of one weight: what all verdicts rest on."
    import torture
    torture.drive(tmp_path / "whole")
    torture.drive(tmp_path / "run", 50)
    agent, state = torture.load_agent(tmp_path / "run", "cpu").state_dict(), load_checkpoint(tmp_path / "run")
    assert torture._loaded(tmp_path / "run" / "last.pt", agent) == "fine, read rightly"
    weight = state["agent"]["q"]["net"]["mlp.head.weight"].view(-1)
    weight[0] += weight[0].abs() * 2**-23
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    assert torture._loaded(tmp_path / "run" / "last.pt", agent) == "other numbers: loaded"
    assert torture._resumed(tmp_path / "run", tmp_path / "whole", {}) == "other numbers: resumed"


WRITES = """
import os, sys, torture
from pathlib import Path
run, found = Path(sys.argv[1]), set()
def note(event, args):
    writes = event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes: paths = args[:1]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate"): paths = args[:1]
    elif event in ("os.rename", "os.link", "os.symlink"): paths = args[:2]
    else: return
    found.update(os.path.realpath(p) for p in paths if isinstance(p, str | bytes | Path))
first = run.with_name("first")      # what PyTorch makes once, in its own folders
torture.drive(first)
torture.export_policy(first, first / "policy.pt2")
sys.addaudithook(note)
torture.drive(run)
torture.scoreboard(run, torture.Walk, episodes=1)
torture.export_policy(run, run / "policy.pt2")
print(*sorted(found), sep=chr(10))
"""


def test_a_run_writes_nowhere_else(run, tmp_path):
    folder = tmp_path.resolve() / "run"
    done = run(sys.executable, "-c", WRITES, folder, cwd=TESTS, TMPDIR=tmp_path, OMP_NUM_THREADS="1").stdout.split()
    assert str(folder / "last.pt") in done and str(folder / "scoreboard.json") in done
    assert not (elsewhere := [p for p in done if not p.startswith(str(folder)) and p != "/dev/null"]), elsewhere


# ---- the page

def sources(): return "\n".join(c.source for c in nbformat.read(PAGE, 4).cells)


def test_the_page_names_tests_that_exist():
    named = re.findall(r"\b(test_\w+)\.py::(\w+)", sources())
    assert len(named) >= 15
    for file, name in named:
        tree = ast.parse((TESTS / f"{file}.py").read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, f"no {name} in {file}.py"


def test_nothing_broke_in_the_numbers_of_the_page():
    stored = result("torture.json")
    assert stored.keys() >= {"kill", "checkpoints", "disk", "files", "data", "soak", "numerics"}
    for part, found in stored.items():
        assert not found["bad"], f"{part}: {found['bad'][:3]}"
        assert found["provenance"]["date"] and found["seconds"] > 0
