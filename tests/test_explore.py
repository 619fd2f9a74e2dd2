"""The pictures that move without a kernel: what they show, against the book's own functions; and, where a browser is
found, used as a reader uses them, by keyboard, on a desk and on a phone, in the light and in the dark."""
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from browser import chromium, complaints

from bdpo_lit.offline.evaluation import bootstrap_interval, normalized_score
from bdpo_lit.reference.style import COLORS, EXPLORE, result
from bdpo_lit.theory.diffusion import Mixture, mixture_eps, vp_schedule
from bdpo_lit.theory.soft_rl import boltzmann, kl
from bdpo_lit.theory.theorem import (
    forward_kernels,
    gaussian_chain,
    grid_marginals,
    optimal_kernels,
    optimal_values,
    reverse_kernels,
    run_chain,
    total_variation,
)
from bdpo_lit.theory.two_clocks import (
    chain_value,
    corridor,
    forgetful,
    improve,
    lower_values,
    path_optimum,
    reverse_chain,
    two_clock_sweep,
)

NBS = Path(__file__).resolve().parent.parent / "nbs"
PROGRAMS = {p.stem for p in EXPLORE.glob("*.js")} - {"common"}


def stored():
    "Every explorable of the book as its chapter stores it: (chapter, program, HTML)."
    for path in sorted(NBS.glob("*/*.ipynb")):
        for cell in (c for c in nbformat.read(path, 4).cells if c.cell_type == "code"):
            for out in cell.outputs:
                page = "".join(out.get("data", {}).get("text/html", ""))
                if found := re.match(r'<div class="explorable" data-name="(\w+)"', page):
                    yield path.stem, found[1], page


STORED = list(stored())
each = pytest.mark.parametrize("chapter, name, page", STORED, ids=[f"{chapter}-{name}" for chapter, name, _ in STORED])


def given(page): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])


def tensor(x): return torch.tensor(x, dtype=torch.float64)


# ---- what the numbers beside a picture must be, by the book's functions. `at` are the controls, in their order

def tilt(data, at):
    nu, Q, eta = tensor(data["nu"]), tensor(data["Q"]), 10**float(at[0])
    policy = boltzmann(Q, nu, eta)
    price, value = kl(policy, nu), policy @ Q
    return dict(price=price, value=value, worth=value - eta * price, copying=nu @ Q)


def schedule(data, at):
    grid, N = tensor(data["grid"]), int(at[1])
    sched = vp_schedule(N, beta_max=float(f"{10**(float(at[0]) / 10):.2g}"), dtype=torch.float64)
    jump = forward_kernels(grid, vp_schedule(1, beta_max=float(f"{10**(float(at[0]) / 10):.2g}"), dtype=torch.float64))
    q, p = (grid_marginals(tensor(data[who]), jump)[1] for who in ("nu", "pi"))
    return dict(left=sched.alpha_bar[N], apart=total_variation(q, p), lost=data["eta"] * kl(q, p))


def blur(data, at):
    grid, sched = tensor(data["grid"]), vp_schedule(int(at[0]), dtype=torch.float64)
    trio = Mixture(tensor(data["weight"]), tensor(data["mean"])[:, None], tensor(data["sd"])**2)
    start = (-grid.square() / 2).softmax(0)
    bins = lambda p: p[:-1].reshape(-1, 4).sum(-1)
    made = bins(run_chain(start, gaussian_chain(mixture_eps(trio, sched), grid, sched, last_noise=bool(at[1]))))
    wanted = bins(trio.log_prob(grid[:, None]).softmax(0))
    return dict(off=total_variation(made, wanted), between=made[data["gaps"]].sum(), data=wanted[data["gaps"]].sum())


def particles(data, at):
    grid, N, eta = tensor(data["grid"]), len(data["V"]) - 1, data["eta"]
    n, nu = N - int(at[0]), tensor(data["qNu"][0])
    forward = forward_kernels(grid, vp_schedule(N, dtype=torch.float64))
    reverse = reverse_kernels(nu, forward)
    V = optimal_values(tensor(data["V"][0]), reverse, eta)
    q = p = grid_marginals(nu, forward)[N]
    best, paid = optimal_kernels(V, reverse, eta), 0.
    for m in range(N, n, -1):
        paid += eta * (p @ kl(best[m], reverse[m]))
        q, p = q @ reverse[m], p @ best[m]
    return dict(nu=q @ V[n], pi=p @ V[n], paid=paid, less=p @ V[n] - paid)


def clocks(data, at, sweeps):
    world, eta = corridor(), .1
    behavior = reverse_chain(world.nu, forgetful([.8, .6, 0.], 3))
    actor = improve(path_optimum(world, behavior, eta), behavior, eta)
    exact = lower_values(chain_value(world, actor, behavior, eta)[1], actor, behavior, eta)
    V = torch.zeros_like(exact)
    for _ in range(sweeps): V = two_clock_sweep(V, world, actor, behavior, eta, at[0] == "whole")
    first = lambda V: (actor.start * V[-1]).sum(-1)[0]
    return dict(first=first(V), exactFirst=first(exact), error=(V - exact).abs().max())


def best_of(data, at):
    row, M = result("maze_best_of.json")[int(at[2])], str(data["Ms"][int(at[0])])
    scores = normalized_score(row["returns"][at[1]][M], row["ref_min"], row["ref_max"])
    low, high = bootstrap_interval(scores)
    return dict(mean=scores.mean(), low=low, high=high, worst=scores.min())


EXPECTED = dict(tilt=tilt, schedule=schedule, blur=blur, particles=particles, clocks=clocks, best_of=best_of)


# ---- without a browser

def test_every_program_is_shown_and_known():
    assert {name for _, name, _ in STORED} == PROGRAMS == set(EXPECTED), "stored in a chapter, and checked here"


@each
def test_a_page_carries_its_picture_and_asks_for_nothing(chapter, name, page):
    assert len(page) < 300_000
    still = r'<img src="data:image/png;base64,[\w+/=]{1000,}" alt="[^"]{20,}">'
    assert re.search(still, page), "a still picture, described"
    outside = r"https?:|\bfetch\(|import\(|XMLHttpRequest|WebSocket|localStorage|\bsrc=[\"'](?!data:)"
    assert not re.findall(outside, page)
    assert page.count("</script>") == 2 and all(f'"{c}"' in page for c in COLORS.values())
    current = "\n".join((EXPLORE / f"{n}.js").read_text() for n in ("common", name))
    assert current in page, f"explore/{name}.js has changed: execute {chapter} anew"


STATES = dict(tilt=[["-1"], ["0.5"]], schedule=[["10", "5"], ["-3", "50"]], blur=[["2", False], ["20", True]],
              particles=[["0"], ["7"]], clocks=[["whole"], ["steps"]], best_of=[["0", "mean", "0"], ["5", "lcb", "0"]])
CALLS = dict(tilt="{eta: 10 ** at[0]}", schedule="{betaMax: +(10 ** (at[0] / 10)).toPrecision(2), N: +at[1]}",
             blur="{N: +at[0], last: at[1]}", particles="{n: data.V.length - 1 - at[0]}",
             clocks='{sweeps: 7, whole: at[0] === "whole"}', best_of="{run: +at[2], rule: at[1], M: data.Ms[at[0]]}")


@pytest.mark.skipif(not shutil.which("node"), reason="no Node")
@each
def test_numbers_of_the_program_are_the_books(chapter, name, page, tmp_path):
    code = "\n".join((EXPLORE / f"{n}.js").read_text() for n in ("common", name))
    (tmp_path / "run.js").write_text(
        f"{code}\nconst data = {json.dumps(given(page))};\n"
        f"console.log(JSON.stringify({json.dumps(STATES[name])}.map(at => numbers(data, {CALLS[name]}))))")
    found = subprocess.run(["node", tmp_path / "run.js"], capture_output=True, text=True, check=True).stdout
    for at, ours in zip(STATES[name], json.loads(found)):
        wanted = EXPECTED[name](given(page), at, **(dict(sweeps=7) if name == "clocks" else {}))
        same = [key for key in wanted if isinstance(ours.get(key), int | float)]
        assert len(same) >= min(2, len(ours))
        for key in same: assert abs(ours[key] - float(wanted[key])) < 1e-6, (at, key)


# ---- with one

PAGE = """<!doctype html><html lang="en"><meta charset="utf8"><meta name="viewport" content="width=device-width">
<style>body { margin: 16px; font: 17px sans-serif; background: #fff; color: #222; } img { max-width: 100%%; }
@media (prefers-color-scheme: dark) { body { background: #222; color: #eee; } }</style><body>%s</body></html>"""
READ = """box => { const root = box.lastElementChild.shadowRoot; return {
  at: [...root.querySelectorAll("input, select")].map(e => e.type === "checkbox" ? e.checked : e.value),
  numbers: [...root.querySelectorAll(".numbers data")].map(e => +e.value),
  said: root.querySelector(".numbers").innerText,
  drawn: [...root.querySelectorAll(".chart svg[role=img]")].map(e => e.outerHTML).join() }; }"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser: yield browser


@pytest.fixture
def open_page(browser):
    "A page with some HTML in it, as wide and as light as asked; what it complains of must be nothing."
    contexts = []

    def open_page(body, width=1400, scheme="light", motion="no-preference"):
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme,
                                      reduced_motion=motion)
        page = context.new_page()
        asked = []
        page.on("request", lambda r: asked.append(r.url) if not r.url.startswith(("data:", "about:")) else None)
        contexts.append((context, complaints(page), asked))
        page.set_content(PAGE % body)
        return page

    yield open_page
    for context, said, asked in contexts:
        assert not said and not asked
        context.close()


def check(name, data, seen):
    "The numbers beside the picture are the book's."
    extra = dict(sweeps=int(re.search(r"sweeps: (\d+)", seen["said"])[1])) if name == "clocks" else {}
    wanted = [float(v) for v in EXPECTED[name](data, seen["at"], **extra).values()]
    assert np.allclose(seen["numbers"], wanted, rtol=0, atol=1e-6), (name, seen["at"], seen["numbers"], wanted)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@each
def test_a_reader_moves_it(chapter, name, page, width, scheme, open_page):
    tab = open_page(page, width, scheme)
    box = tab.locator(".explorable")
    assert box.locator("img").is_hidden() and box.locator(".chart > svg").first.is_visible()
    before = box.evaluate(READ)
    check(name, given(page), before)
    # everything is reached by Tab, has a name, and answers to keys
    controls = box.locator("input, select, button")
    roles = {"range": "slider", "checkbox": "checkbox", "select-one": "combobox", "button": "button"}
    for k in range(controls.count()):
        tab.keyboard.press("Tab")
        control = controls.nth(k)
        assert control.evaluate("e => e.getRootNode().activeElement === e"), f"Tab does not reach control {k}"
        kind = control.evaluate("e => e.type")
        tree = control.aria_snapshot()
        assert re.search(rf'{roles[kind]} "[^"]+"', tree), f"control {k} has no name: {tree}"
        was, label = box.evaluate(READ), control.inner_text()
        if kind == "range":
            for _ in range(3): tab.keyboard.press("ArrowRight")
        else: tab.keyboard.press(dict(checkbox=" ", button="Enter").get(kind, "ArrowDown"))
        if name == "particles": tab.wait_for_timeout(500)     # it glides
        now = box.evaluate(READ)
        check(name, given(page), now)
        if label not in ("Play", "Restart", "Empty the tables"):
            assert now["drawn"] != was["drawn"], f"{tree} moves nothing"
            if (name, k) != ("schedule", 1): assert now["numbers"] != was["numbers"], f"{tree} changes no number"
    # it fits, and shows in either light
    wide = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1], f"{wide[0] - wide[1]} pixels too wide"
    assert box.evaluate("b => b.lastElementChild.shadowRoot.querySelector('.numbers').ariaLive") == "polite"
    ink, paint = box.evaluate("""b => { const host = b.lastElementChild;
        const text = host.shadowRoot.querySelector('svg text');
        return [getComputedStyle(text).fill, host.style.getPropertyValue('--behavior')]; }""")
    assert ink == {"light": "rgb(34, 34, 34)", "dark": "rgb(238, 238, 238)"}[scheme]
    assert (paint == COLORS["behavior"]) == (scheme == "light")


def test_many_on_a_page_and_nothing_left_behind(open_page):
    "No global names; an output that is shown again works again; a page without scripts keeps the still pictures."
    tab = open_page("<p>empty</p>")
    bare = set(tab.evaluate("Object.getOwnPropertyNames(window)"))
    tab = open_page("".join(page for *_, page in STORED))
    assert set(tab.evaluate("Object.getOwnPropertyNames(window)")) <= bare
    assert tab.locator(".explorable[data-on] .chart > svg").count() >= len(STORED)
    tab.evaluate("""html => { const box = document.querySelector(".explorable"), div = document.createElement("div");
        box.replaceWith(div); div.innerHTML = html;     // as Jupyter does when a cell is run again
        for (const old of div.querySelectorAll("script")) {
          const s = document.createElement("script"); for (const a of old.attributes) s.setAttribute(a.name, a.value);
          s.textContent = old.textContent; old.replaceWith(s); } }""", STORED[0][2])
    again = tab.locator(".explorable").first
    was = again.evaluate(READ)
    again.locator("input").first.press("ArrowRight")
    assert again.evaluate(READ)["numbers"] != was["numbers"]


def test_without_a_program_the_still_picture_stays(browser):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.set_content(PAGE % "".join(page for *_, page in STORED))
    assert all(img.is_visible() for img in tab.locator(".explorable img").all())
    context.close()


def test_motion_stops_where_it_is_unwelcome(open_page):
    pages = [page for _, name, page in STORED if name == "particles"]
    if not pages: pytest.skip("not stored yet")
    tab = open_page(pages[0], motion="reduce")
    box = tab.locator(".explorable")
    box.get_by_role("button", name="Step").click()
    now = box.evaluate(READ)
    tab.wait_for_timeout(200)
    assert box.evaluate(READ)["drawn"] == now["drawn"], "at once, without gliding"
    tab = open_page(pages[0])
    box = tab.locator(".explorable")
    box.get_by_role("button", name="Play").click()
    tab.wait_for_timeout(1600)
    box.get_by_role("button", name="Pause").click()
    assert box.evaluate(READ)["at"][0] in ("1", "2"), "a step takes 0.7 s"
