"""A real JupyterLab in a real browser: a chapter is opened and run as a reader does it, its slider moved by keyboard,
and a picture that moves without a kernel beside it. Needs Chromium and Playwright (`make browser`); takes minutes."""
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browser import chromium, complaints

NBS = Path(__file__).resolve().parent.parent / "nbs"
CHAPTER, = NBS.glob("*/*_toy2d.ipynb")       # the one with a widget that asks the kernel
EXAMPLE, = NBS.glob("*/*_style.ipynb")       # and one with an explorable
SHOWN = """box => box.lastElementChild.shadowRoot.querySelector(".numbers").innerText"""


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    "A folder with a copy of the chapter, into which the example of an explorable has been pasted at the end."
    desk, nb = tmp_path_factory.mktemp("desk"), nbformat.read(CHAPTER, 4)
    example, = (c for c in nbformat.read(EXAMPLE, 4).cells if 'explorable("tilt"' in c.source)
    fresh = ("import numpy as np\nimport matplotlib.pyplot as plt\n"
             "from bdpo_lit.reference.style import COLORS, explorable\n")
    example["source"] = fresh + re.sub(r"(?m)^#\|.*\n", "", example.source)
    nb.cells.append(example)
    nbformat.write(nb, desk / "chapter.ipynb")
    return desk


@pytest.fixture(scope="module")
def lab(desk, tmp_path_factory):
    "The address of a JupyterLab of this environment, with settings and trust of its own, open to this machine only."
    home, port = tmp_path_factory.mktemp("home"), free_port()
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))   # all cells
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
           "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(home / "data"), "IPYTHONDIR": str(home / "ipython"),
           "JUPYTER_RUNTIME_DIR": str(home / "run"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "OMP_NUM_THREADS": "1"}
    env.pop("MPLBACKEND", None)              # the kernel draws into the page
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=localhost", f"--port={port}",
             "--IdentityProvider.token=", "--ServerApp.password=", f"--ServerApp.root_dir={desk}"],
            env=env, stdout=log, stderr=log)
        url = f"http://localhost:{port}"
        for _ in range(240):
            try: urllib.request.urlopen(f"{url}/api/status", timeout=2); break
            except OSError: time.sleep(.5)
            assert server.poll() is None, (home / "log").read_text()
        yield url
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope="module")
def page(lab):
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        page.set_default_timeout(120_000)
        page.said = complaints(page)
        page.goto(f"{lab}/lab/tree/chapter.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        yield page


def test_before_anything_runs_the_still_picture_is_there(page):
    "Nobody trusts a notebook from elsewhere: Jupyter shows its outputs without their programs."
    image = page.locator(".explorable img")
    image.scroll_into_view_if_needed()
    assert image.is_visible() and image.evaluate("i => i.naturalWidth") > 300
    assert not page.locator(".explorable script").count()


def test_run_all(page):
    "From the menu, to the last cell, without an error."
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").first.wait_for(state="attached")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function("""() => { const all = document.querySelectorAll(".jp-CodeCell .jp-InputPrompt");
        return all.length > 50 && /\\[\\d+\\]/.test(all[all.length - 1].textContent); }""", timeout=600_000)
    failed = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']:has-text('Error')")
    assert not failed.count(), failed.first.inner_text()


def test_the_slider_of_the_widget_asks_the_kernel_for_a_new_figure(page, desk):
    figure = page.locator(".jp-OutputArea-output .widget-interact img")
    figure.first.wait_for()
    handle = page.locator(".widget-interact .noUi-handle").first
    handle.scroll_into_view_if_needed()
    before, shown = figure.first.get_attribute("src"), handle.get_attribute("aria-valuenow")
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("was => [...document.querySelectorAll('.widget-interact img')].some(i => i.src !== was)",
                           arg=before)
    assert handle.get_attribute("aria-valuenow") != shown and figure.count() == 1
    assert figure.first.evaluate("i => i.naturalWidth") > 100
    page.screenshot(path=desk / "widget.png")


def test_the_explorable_moves_without_the_kernel(page, lab, desk):
    page.get_by_role("menuitem", name="Kernel", exact=True).click()       # end it: nothing needs it now
    page.get_by_role("menuitem", name="Shut Down Kernel", exact=True).click()
    for _ in range(60):
        if not json.load(urllib.request.urlopen(f"{lab}/api/kernels")): break
        page.wait_for_timeout(500)
    else: pytest.fail("the kernel still runs")
    box = page.locator(".explorable")
    slider = box.locator("input[type=range]")
    slider.scroll_into_view_if_needed()
    active = page.locator(".jp-Cell.jp-mod-active")
    slider.focus()
    before, cell = box.evaluate(SHOWN), active.get_attribute("data-windowed-list-index")
    for _ in range(5): page.keyboard.press("ArrowLeft")
    for _ in range(2): page.keyboard.press("ArrowDown")      # would select the next cell, were it Jupyter's
    after = box.evaluate(SHOWN)
    page.screenshot(path=desk / "explorable.png")            # kept by pytest for a while, to look at
    assert after != before and "KL" in after and box.locator("img").is_hidden()
    assert active.get_attribute("data-windowed-list-index") == cell
    assert slider.evaluate("e => e.getRootNode().activeElement === e"), "the focus stays where it is"


def test_nothing_complained(page):
    ours = [said for said in page.said if "explorable" in said or "<anonymous>" in said]
    assert not ours
