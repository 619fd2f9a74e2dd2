"""What all tests share. jaxtyping's hook checks every call of bdpo_lit against the shapes it declares."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MINARI_DATASETS_PATH", str(ROOT / "data" / "minari"))   # keep data sets out of the home folder
os.environ.setdefault("MPLBACKEND", "agg")
install_import_hook("bdpo_lit", "beartype.beartype")


def run(*cmd, cwd=ROOT, check=True, **env):
    "Run a command with the tools of this environment first on PATH; fail with its output."
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **env}
    for name in ("IN_TEST", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"): env.pop(name, None)
    done = subprocess.run([str(c) for c in cmd], cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{cmd} returned {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session", name="run")
def _run(): return run


@pytest.fixture(scope="session")
def copy_project(tmp_path_factory):
    "Copy what git would commit into a new folder."
    def copy(name):
        to = tmp_path_factory.mktemp(name, numbered=True) / "project"
        for file in run("git", "ls-files", "-co", "--exclude-standard", "-z").stdout.split("\0"):
            if file and os.path.lexists(ROOT / file):
                (to / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, to / file, follow_symlinks=False)
        return to
    return copy
