"""`make gpu` as far as it goes without a GPU: its parts do not depend on each other, and it says what is wrong."""
import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu.py"


def gpu(folder, *words):
    "The script in an environment whose torch cannot be imported."
    (folder / "torch.py").write_text("raise ImportError('torch is broken here')\n")
    env = os.environ | dict(PYTHONPATH=str(folder))
    return subprocess.run([sys.executable, SCRIPT, "--out", folder / "out.json", *words], env=env, timeout=60,
                          capture_output=True, text=True)


def test_a_part_that_fails_leaves_its_traceback_and_the_others_alone(tmp_path):
    run = gpu(tmp_path, "--device", "cpu", "--parts", "machine", "chapters", "--chapters", "of no such name")
    found = json.loads((tmp_path / "out.json").read_text())
    assert run.returncode == 1 and "machine   failed" in run.stdout and "chapters  done" in run.stdout
    assert found["machine"]["log"][-1] == "ImportError: torch is broken here" and found["chapters"]["status"] == "done"
    assert {"command", "commit", "date"} <= found["provenance"]["machine"].keys()
    assert gpu(tmp_path, "--device", "cpu", "--parts", "chapters", "--chapters", "-").returncode == 0
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["machine"] == found["machine"], "what is not measured anew stays"


def test_a_part_ends_with_its_time(tmp_path):
    run = gpu(tmp_path, "--device", "cpu", "--parts", "machine", "--minutes", "0.05")
    assert run.returncode == 1 and json.loads((tmp_path / "out.json").read_text()).keys() >= {"machine"}
    assert "machine   no time was left" in run.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    run = gpu(tmp_path)
    assert run.returncode == 1 and "There is no GPU here" in run.stderr and "--device cpu" in run.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_chapter_is_run_like_colab_does(tmp_path):
    "Slow cells are left out, those for a GPU run, and a broken one does not keep the others from running."
    cells = ["x = 1", "#| slow\nx = 2", "#| gpu\nassert 'cuda' != \"cuda\"", "#| eval: false\nx = 3", "1 / 0",
             "assert x == 1", "# markdown"]
    nb = dict(cells=[dict(cell_type="code", id=str(i), source=[c]) for i, c in enumerate(cells)])
    nb["cells"][-1]["cell_type"] = "markdown"
    (tmp_path / "01_x.ipynb").write_text(json.dumps(nb))
    words = ["--notebook", tmp_path / "01_x.ipynb", "--device", "cpu", "--into", tmp_path / "said.json"]
    subprocess.run([sys.executable, SCRIPT, *words], check=True, timeout=60, capture_output=True)
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["whole"] and said["gpu_cells"] == 1 and list(said["errors"]) == ["4"]
    assert "ZeroDivisionError" in said["errors"]["4"]
