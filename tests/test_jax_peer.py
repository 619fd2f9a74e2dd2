"""The JAX side of `make bench`, as far as it goes without JAX: it says what is missing and how to get it."""
import os
import subprocess
import sys
from pathlib import Path

PEER = Path(__file__).resolve().parent.parent / "bench" / "jax_peer.py"


def refusal(*args) -> str:
    "What the program says when it ends without having begun."
    env = {k: x for k, x in os.environ.items() if k != "FLOWRL"}
    run = subprocess.run([sys.executable, PEER, *args], capture_output=True, text=True, timeout=60, env=env)
    assert run.returncode == 1 and not run.stdout and "Traceback" not in run.stderr
    return run.stderr


def test_without_its_environment():
    said = refusal()
    assert said.startswith("The JAX peer needs ") and "bench/requirements-jax.txt" in said and "git clone" in said


def test_incomplete_flowrl(tmp_path):
    "The archive on the package index has the agents, but not the modules they are made of."
    package = tmp_path / "flowrl" / "agent" / "offline"
    package.mkdir(parents=True)
    (tmp_path / "jax.py").touch()
    (package / "__init__.py").touch()
    (package / "dac.py").write_text("import flowrl.flow.ddpm\n")
    said = refusal("--flowrl", tmp_path)
    assert said.startswith("This flowrl has no flowrl.flow: ") and "git clone" in said
    assert refusal("--flowrl", tmp_path / "flowrl").startswith("No flowrl package in ")
