"""`make gpu`: all that wants a GPU, in a quarter of an hour.

Parts, the most valuable first; each is a process of its own, so that one may fail, or run out of time, without the
others. The JSON file is written anew after each, and holds how it ended and, if badly, the end of what it said:

    machine    GPU, versions, whether torch.compile works; fastest matrix product and copy
    tests      pytest -m gpu
    updates    one update of the paper's locomotion agent: eager, compiled, recorded as CUDA graphs, with TF32; by the
               JAX code of BDPO's authors, given a clone of theirs (flow-rl)
    seeds      the same for five seeds, one after the other and as one program (Fleet)
    plane      8gaussians at the paper's size to the end (100,000 + 100,000 updates; less: --share 0.5), against the
               known optimum
    maze       the preset of `bdpo demo` to the end, on the GPU, and its scoreboard
    chapters   every chapter as Colab's "Run all" does it, its cells for a GPU included (those of the paper's size cut)

A machine with a GPU, network and Linux needs nothing but:

    make gpu                                  # builds .venv/ first; FLOWRL=clone-of-flow-rl adds the JAX code
    git diff bdpo_lit/results/speed_gpu.json  # shown in chapter 23, whose sentences are about an H200

On Colab, with a GPU (Runtime, Change runtime type):

    !git clone -q https://github.com/bdpo-lit/bdpo_lit && cd bdpo_lit && pip install -q . pytest beartype && \\
     python bench/gpu.py --minutes 20

A GPU without network and without our packages, but with torch, matplotlib, scipy, h5py, tensorboard, pytest:

    python bench/gpu.py --fetch build/wheels  # elsewhere, on a machine with network
    python bench/gpu.py --wheels build/wheels --flowrl flow-rl --commit $(git describe --always)   # there

Then copy speed_gpu.json from there. Some parts only, or more time for each: --parts tests updates --minutes 20.
Try it without a GPU: `python bench/gpu.py --device cpu --minutes 20`, everything at small sizes.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEER = Path(__file__).with_name("jax_peer.py")
# In brackets: parts that run side by side. Seconds each may take of fourteen minutes.
TOGETHER = (("machine", "tests"), ("updates",), ("seeds",), ("plane", "maze", "chapters"))
LIMIT = dict(machine=60, tests=150, updates=240, seeds=90, plane=360, maze=360, chapters=360)
OPS = ("pretrain", "critic", "actor", "train")       # those of the JAX peer, too
FLEET = 5                                            # seeds

# What a bare machine lacks, by whom it is wanted. Versions are those of requirements.lock where it has them.
WHEELS = """fastcore ipython ipython_pygments_lexers traitlets jedi parso matplotlib-inline prompt_toolkit wcwidth
stack-data asttokens executing pure_eval pexpect ptyprocess gymnasium Farama-Notifications gymnasium-robotics pettingzoo
mujoco glfw PyOpenGL minari tyro docstring_parser typeguard beartype ipywidgets comm""".split()
JAX_WHEELS = ["hydra-core==1.3.8", "omegaconf==2.3.1", "antlr4-python3-runtime==4.9.3"]
# flow-rl imports distrax for agents other than BDPO; what distrax needs does not work with the newest JAX.
DISTRAX = '"A stand-in."\ndef __getattr__(name): return type(name, (), {})\n'


# ---- the parts; each gets the options and `keep`, which stores what is known so far

def machine(a, keep):
    "What is here. Only the last line needs anything of ours."
    import torch
    found = dict(torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0], cores=os.cpu_count())
    keep(found)
    if a.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        found |= dict(gpu=p.name, memory=p.total_memory, multiprocessors=p.multi_processor_count,
                      capability=f"{p.major}.{p.minor}")
        keep(found)
    x = torch.randn(8192 if a.device == "cuda" else 1024, 8192, device=a.device)
    y, best = torch.empty_like(x), lambda f: min(_seconds(f, a.device) for _ in range(8))
    found["copy_bytes_per_second"] = 2 * x.nbytes / best(lambda: y.copy_(x))
    found["matmul_flops"] = {}
    for precision in ("highest", "high"):            # float32, TF32
        torch.set_float32_matmul_precision(precision)
        found["matmul_flops"][precision] = 2 * x.numel() * len(x) / best(lambda: x @ x.T)
    keep(found)
    from bdpo_lit.algorithm.speed import compiler_trouble
    found["compiler_trouble"] = compiler_trouble(a.device)
    keep(found)


def _seconds(f, device, repeats=1):
    "Wall-clock seconds of a call, the GPU's work included."
    import torch
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats): f()
    wait()
    return (time.perf_counter() - start) / repeats


def tests(a, keep):
    "Every test marked gpu; without a GPU those that can do without."
    from xml.etree import ElementTree
    marked = [str(f) for f in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in f.read_text("utf-8")]
    if a.device == "cpu":
        marked, os.environ["BDPO_LIT_GPU"] = [str(ROOT / "tests" / "test_gpu.py")], "cpu"
    report = Path(a.work) / "tests.xml"
    side_by_side = ["-n", str(min(6, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short",
                           *side_by_side, f"--junitxml={report}", *marked], cwd=ROOT)
    found = dict(status_of_pytest=done.returncode, tests={})
    for case in ElementTree.parse(report).iter("testcase"):
        fault = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        found["tests"][case.get("name")] = "passed" if fault is None else (
            f"{fault.tag}: {(fault.text or fault.get('message') or '')[-1500:]}")
    found["counts"] = {k: sum(x.split(":")[0] == k for x in found["tests"].values())
                       for k in ("passed", "failure", "error", "skipped")}
    keep(found)
    if done.returncode: raise RuntimeError("some tests failed")


def updates(a, keep):
    "Time every kind of update in all ways, in turn, each way in a process of its own."
    ways = dict(eager={}, compiled=dict(mode="default"), whole=dict(mode="whole"), recorded=dict(mode="cudagraph"))
    ways["whole, recorded"] = dict(mode="whole-cudagraph")
    ways["whole, recorded, TF32"] = dict(mode="whole-cudagraph", tf32=True)
    theirs = {"JAX": "float32", "JAX, TF32": "tensorfloat32"} if a.flowrl else {}
    _race(a, keep, ways | theirs, OPS)


def seeds(a, keep):
    "Time what trains several seeds on one GPU."
    _race(a, keep, {"eager": {}, "recorded": dict(mode="cudagraph"), f"{FLEET} seeds": dict(seeds=FLEET),
                    f"{FLEET} seeds, recorded": dict(seeds=FLEET, mode="cudagraph"),
                    f"{FLEET} seeds, together": dict(seeds=FLEET, together=True)}, ("pretrain", "train"))


def _race(a, keep, ways, ops):
    "Start the contenders, and let them make updates in turn."
    from bdpo_lit.evidence.benchmark import SIZES, interleave, ratios
    small = a.device == "cpu"
    size = dict(batch=32, steps=3, critics=2, samples=2, width=32) if small else {}
    rounds, patience = (2, 0.05) if small else (5, 0.2)
    found = dict(size=SIZES["locomotion"] | dict(critics=10, samples=10, width=256) | size, rounds=rounds,
                 contenders={}, missing={}, per_second={})
    with ExitStack() as stack:
        workers = _started(a, stack, ways, size, found["missing"])
        found["contenders"] = {name: w.about for name, w in workers.items()}
        keep(found)
        found["repeats"] = {op: _enough(workers["eager"], op, patience) for op in ops}
        found["ratio"] = ratios(interleave(workers, found["repeats"], rounds), "eager", "wall")
        for name, by_op in found["ratio"].items():
            n = found["contenders"][name].get("seeds", 1)
            found["per_second"][name] = {op: n / x["seconds"] for op, x in by_op.items()}
        keep(found)
        for name in [x for x in workers if "JAX" not in x]:     # last: to watch is to disturb
            for what in ("memory", "profile", *(["work"] if name == "eager" else [])):
                try: found["contenders"][name][what] = workers[name].ask(what)
                except RuntimeError as e: found["missing"][f"{name} {what}"] = str(e)
            keep(found)


def _started(a, stack, ways, size, missing):
    "The contenders, ready; they start side by side, since compiling takes long. Why others are not there."
    todo = {}
    for name, way in ways.items():
        if isinstance(way, str): todo[name] = partial(_jax, a, size, way)
        elif a.device == "cpu" and "cudagraph" in way.get("mode", ""): missing[name] = "needs a GPU"
        else: todo[name] = partial(_ours, dict(device=a.device) | way | size)
    with ThreadPoolExecutor(len(todo)) as pool:
        promised = {name: pool.submit(start) for name, start in todo.items()}
    workers = {}
    for name, promise in promised.items():
        try: workers[name] = stack.enter_context(promise.result())
        except Exception as e: missing[name] = repr(e)   # the others can do without
    return workers


def _ours(told):
    from bdpo_lit.evidence.benchmark import Worker
    return Worker([sys.executable, __file__, "--serve", json.dumps(told)])


def _jax(a, size, precision):
    "The official code, told to use the GPU and to leave memory to the others."
    from bdpo_lit.evidence.benchmark import Worker
    told = [word for k, x in size.items() for word in (f"--{k}", str(x))]
    env = dict(JAX_PLATFORMS=a.device, XLA_PYTHON_CLIENT_PREALLOCATE="false",
               JAX_DEFAULT_MATMUL_PRECISION=precision)
    if a.jax != sys.executable: env["PYTHONPATH"] = ""    # an environment of its own
    return Worker([a.jax, str(PEER), "--flowrl", a.flowrl, "--agents", "bdpo", "--ops", ",".join(OPS), *told],
                  "bdpo ", env)


def _enough(worker, op, patience):
    "How many calls take so many seconds; whole cycles."
    n = max(1, min(500, round(patience / worker.ask(f"{op} 5")["wall"])))
    return 5 * -(-n // 5) if op == "train" else n


def serve(device, mode="off", seeds=1, together=False, tf32=False, **size):
    "A contender: one line about itself, then an answer to each line `OP REPEATS`, until input ends."
    import torch
    out = os.fdopen(os.dup(1), "w")     # the protocol keeps stdout; what anything else prints goes to stderr
    os.dup2(2, 1)
    tell = lambda x: print(json.dumps(x), file=out, flush=True)
    from bdpo_lit.algorithm.speed import Fleet, accelerate, work
    from bdpo_lit.evidence.benchmark import contender
    start = time.perf_counter()
    torch.set_num_threads(1)
    if tf32: torch.set_float32_matmul_precision("high")
    agents, batch, _ = contender("less", device=device, seeds=seeds, **size)
    said = [accelerate(x, mode, batch) for x in agents][0]
    fleet = Fleet(agents) if together else None
    all_of = lambda name: lambda: [getattr(x, name)(batch) for x in agents]
    ops = dict(pretrain=all_of("update_behavior"), critic=all_of("update_critics"), actor=all_of("update_actor"),
               train=all_of("update"))
    if fleet:
        batches = [batch] * seeds
        ops = dict(pretrain=lambda: fleet.update_behavior(batches), train=lambda: fleet.update(batches))
    for f in ops.values(): _seconds(f, device, 10)
    others = dict(memory=lambda: dict(bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None),
                  work=lambda: work(agents[0], batch), profile=lambda: _profile(ops["train"], device))
    tell(dict(said=said, seeds=seeds, seconds_to_ready=time.perf_counter() - start))
    for line in sys.stdin:
        op, n = (line.split() + ["1"])[:2]
        try:
            if op in others: tell(others[op]())
            # as in the JAX peer: wait after every update
            else: tell(dict(wall=sum(_seconds(ops[op], device) for _ in range(int(n))) / int(n), cpu=0.0))
        except Exception as e: tell(dict(error=f"{op}: {e!r}"))


def _profile(f, device, updates=20):
    "Kernels, and microseconds that the GPU is busy, per update."
    from torch.profiler import ProfilerActivity, profile
    if device != "cuda": return dict(kernels=None, busy_us=None)
    with profile(activities=[ProfilerActivity.CUDA]) as seen: _seconds(f, device, updates)
    kernels = [e for e in seen.events() if "CUDA" in str(e.device_type)]
    return dict(kernels=len(kernels) / updates, busy_us=sum(e.device_time for e in kernels) / updates)


def plane(a, keep):
    "The plane 8gaussians at the paper's size, updates recorded where that works, until it or the time ends."
    import torch

    from bdpo_lit.algorithm.bdpo import BDPO
    from bdpo_lit.algorithm.speed import accelerate
    from bdpo_lit.evidence.toy2d import PRESETS, closeness, make_bandit, noise_fn, value_errors, walk
    plan, eta = PRESETS["paper"], 0.06
    torch.set_float32_matmul_precision("high")       # TF32, as JAX does by itself
    if a.device == "cpu":
        plan = replace(plan, pretrain_steps=60, train_steps=60, batch_size=64, num_points=60_000,
                       algorithm=replace(PRESETS["small"].algorithm, warmup_steps=20))
    short = {k: round(a.share * getattr(plan, k)) for k in ("pretrain_steps", "train_steps")}
    decay = dict.fromkeys(("actor_decay_steps", "critic_decay_steps"), short["train_steps"])
    plan = replace(plan, **short, algorithm=replace(plan.algorithm, **decay))
    bandit = make_bandit("8gaussians", plan.num_points).to(a.device)
    agent = BDPO(1, 2, replace(plan.algorithm, eta=eta), a.device)
    order = torch.Generator(a.device).manual_seed(0)
    said = accelerate(agent, "cudagraph", bandit.sample(plan.batch_size, order))
    found = dict(task=bandit.task, eta=eta, said=said, batch=plan.batch_size, updates={}, seconds={}, finished=True)
    for phase, total, update in (("pretrain", plan.pretrain_steps, agent.update_behavior),
                                 ("train", plan.train_steps, agent.update)):
        if phase == "train": agent.start_actor()
        made, start = 0, time.perf_counter()
        while made < total and time.time() < a.until - 40:
            n = min(500, total - made)
            _seconds(lambda update=update: update(bandit.sample(plan.batch_size, order)), a.device, n)
            made += n
        found["updates"][phase], found["seconds"][phase] = made, time.perf_counter() - start
        found["finished"] &= made == total
        keep(found)
    ends = {name: walk(noise_fn(x.target), 4000, agent.sched, seed=100)[-1]
            for name, x in dict(behaviour=agent.behavior, BDPO=agent.actor).items()}
    found["closeness"] = {name: closeness(x, bandit, None if name == "behaviour" else eta) for name, x in ends.items()}
    found["value"] = value_errors(agent, bandit)
    keep(found)


def maze(a, keep):
    "The preset of the demo, on the GPU, to its end or that of the time; then everyone plays."
    from bdpo_lit.evidence.demo import PRESETS
    from bdpo_lit.offline.data import load_minari
    from bdpo_lit.offline.evaluation import vectorize
    from bdpo_lit.offline.maze import MAZE_ID, collect_maze, make_maze_env
    from bdpo_lit.offline.training import Training, scoreboard
    small = a.device == "cpu"
    plan, start = PRESETS["short"], time.perf_counter()
    train = replace(plan.train, device=a.device, compile="cudagraph")
    if small: train = replace(train, pretrain_steps=60, train_steps=60, eval_every=60, eval_episodes=4, log_every=30)
    collect_maze(4000 if small else 50_000, progress=False)
    found = dict(seconds=dict(collect=time.perf_counter() - start))
    envs = vectorize(make_maze_env, 20)
    training = Training(load_minari(MAZE_ID), train, plan.algorithm, envs, Path(a.work) / "maze")
    found |= dict(said=training.accelerate(), device=str(training.agent.device))
    keep(found)
    start = time.perf_counter()
    with closing(training.run()) as made:
        for p in made:
            if p.evaluation:
                found |= dict(updates=training.steps, evaluations=training.evaluations)
                found["seconds"]["train"] = time.perf_counter() - start
                keep(found)
            if time.time() > a.until - 60: break
    found["finished"] = training.finished
    envs.close()
    start = time.perf_counter()
    board = scoreboard(training, make_maze_env, episodes=4 if small else 40, candidates=(1, 4, 10))
    found["seconds"]["play"] = time.perf_counter() - start
    found |= dict(warnings=board["warnings"], scoreboard=[{k: x for k, x in row.items() if k != "returns"}
                                                          for row in board["rows"]])
    keep(found)


def chapters(a, keep):
    "Run the chapters side by side; which cells failed, and why."
    files = sorted((ROOT / "nbs").glob("*/*.ipynb"))
    if a.chapters: files = [f for f in files if f.stem in a.chapters]
    found, failed = {}, []
    def run(file):
        if (left := a.until - 10 - time.time()) < 5: return file.stem, dict(stopped="no time was left")
        into, begin = Path(a.work) / f"{file.stem}.json", time.perf_counter()
        process = subprocess.Popen([sys.executable, __file__, "--notebook", str(file), "--device", a.device,
                                    "--into", str(into)], stdin=subprocess.DEVNULL, start_new_session=True)
        try: process.wait(left)
        except subprocess.TimeoutExpired: _end(process)
        said = json.loads(into.read_text()) if into.exists() else dict(errors={"": f"ended with {process.returncode}"})
        return file.stem, said | dict(seconds=round(time.perf_counter() - begin, 1))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        for name, said in pool.map(run, files):
            found[name] = said
            failed = [k for k, x in found.items() if x.get("errors") or not x.get("whole")]
            keep(dict(chapters=found, gpu_cells=sum(x.get("gpu_cells", 0) for x in found.values()), failed=failed))
    if failed: raise RuntimeError(f"failed, or not whole: {', '.join(failed)}")


# Cells of the paper's size take as long as the whole of `plane`; here they shall only be seen to work.
CUT = {"19_toy2d": "PRESETS['paper'] = replace(PRESETS['paper'], pretrain_steps={n}, train_steps={n})"}


def notebook(file, device, into):
    "A chapter's cells in order, but for the slow ones; those for a GPU run."
    os.environ |= dict(BDPO_LIT_RUN="gpu", IPYTHONDIR=tempfile.mkdtemp())
    from IPython.core.interactiveshell import InteractiveShell
    shell, cells = InteractiveShell.instance(), json.loads(file.read_text("utf-8"))["cells"]
    found = dict(errors={}, gpu_cells=0, whole=False)
    os.chdir(tempfile.mkdtemp())                     # whatever a chapter writes, it leaves the checkout alone
    for cell in cells:
        source = "".join(cell["source"])
        flags = dict(re.findall(r"^#\|\s*(\w+):?[ \t]*(\S*)", source, re.M))
        if cell["cell_type"] != "code" or flags.get("eval") == "false" or {"slow", "notest"} & flags.keys(): continue
        if "gpu" in flags:
            found["gpu_cells"] += 1
            source = "\n".join([CUT.get(file.stem, "").format(n=500 if device == "cuda" else 3), source])
            if device == "cpu": source = source.replace('"cuda"', '"cpu"')
        done = shell.run_cell(source)
        if error := done.error_before_exec or done.error_in_exec:
            found["errors"][cell.get("id", "?")] = "".join(traceback.format_exception(error))[-2000:]
        into.write_text(json.dumps(found))
        if len(found["errors"]) > 5: return
    into.write_text(json.dumps(found | dict(whole=True)))


PARTS = dict(machine=machine, tests=tests, updates=updates, seeds=seeds, plane=plane, maze=maze, chapters=chapters)


# ---- running them

def _end(process):
    "End a process and all that it has started."
    for s in (signal.SIGTERM, signal.SIGKILL):
        try: os.killpg(process.pid, s)
        except ProcessLookupError: return
        try: return process.wait(5)
        except subprocess.TimeoutExpired: continue


RUNNING = []     # processes of parts


def run_part(name, a, until):
    "A part in a process of its own: what it found, and how it ended."
    until, start = min(until, time.time() + LIMIT[name] * a.minutes / 14), time.time()
    if until - start < 5: return dict(status="no time was left")
    into, log = Path(a.work) / f"{name}.json", Path(a.work) / f"{name}.log"
    command = [sys.executable, "-u", __file__, "--part", name, "--into", str(into), "--until", str(until),
               "--work", a.work, "--device", a.device, "--jax", a.jax, "--share", str(a.share)]
    command += ["--flowrl", a.flowrl] if a.flowrl else []
    command += ["--chapters", *a.chapters] if a.chapters else []
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, start_new_session=True)
        RUNNING.append(process)
        try: status = "done" if process.wait(until - start) == 0 else "failed"
        except subprocess.TimeoutExpired: status = "stopped, its time was over"
        _end(process)                                # whatever it has left behind
    found = json.loads(into.read_text()) if into.exists() else {}
    said = log.read_text("utf-8", "replace").splitlines()
    if status != "done" or found.get("missing"): found["log"] = said[-60:]
    return dict(status=status, minutes=round((time.time() - start) / 60, 2)) | found


def install(folder):
    "Unpack wheels into a folder of their own, for this process's children; the project itself by name only."
    site = tempfile.mkdtemp(prefix="site-")
    version = re.search(r'__version__ = "(.*)"', (ROOT / "bdpo_lit" / "__init__.py").read_text())[1]
    info = Path(site, f"bdpo_lit-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bdpo_lit\nVersion: {version}\n")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
                    "--no-cache-dir", "--target", site, *map(str, sorted(Path(folder).glob("*.whl")))], check=True)
    if importlib.util.find_spec("distrax") is None: Path(site, "distrax.py").write_text(DISTRAX)
    return site


def fetch(folder):
    "Download what a bare Python 3.12 on x86-64 Linux with torch lacks."
    folder.mkdir(parents=True, exist_ok=True)
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    lock = {k.lower().replace("_", "-"): x for k, x in lock.items()}
    ours = [f"{n}=={lock[k]}" if (k := n.lower().replace("_", "-")) in lock else n for n in WHEELS]
    *wheels, antlr = ours + JAX_WHEELS                # of the last there is none
    tags = [w for n in ("_2_28", "_2_27", "_2_24", "_2_17", "2014") for w in ("--platform", f"manylinux{n}_x86_64")]
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
                    "--implementation", "cp", *tags, "-d", str(folder), *wheels], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), antlr], check=True)
    for wheel in folder.glob("gymnasium_robotics-*.whl"): _without(wheel, r"/assets/(adroit_hand|kitchen_franka|stls)/")
    print(f"{sum(x.stat().st_size for x in folder.glob('*.whl')) / 2**20:.0f} MiB in {folder}")


def _without(wheel, what):
    "Drop files from a wheel: hands and kitchens are nine tenths of gymnasium-robotics, and no maze has them."
    draft = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if not re.search(what, entry.filename): new.writestr(entry, old.read(entry))
    draft.replace(wheel)


def provenance(a):
    "As `bdpo_lit.reference.style.provenance`, which this process cannot import for sure."
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    words = [w for w in sys.argv[1:] if w]
    return dict(command=" ".join(["bench/gpu.py", *words]), commit=a.commit or described.stdout.strip() or "unknown",
                date=time.strftime("%Y-%m-%d"))


def summary(result):
    "How each part ended, and updates per second (of all seeds)."
    lines = [f"{name:9s} {x['status']}, {x.get('minutes', 0):.1f} min" for name, x in result.items() if name in PARTS]
    for part in ("updates", "seeds"):
        if not (per_second := result.get(part, {}).get("per_second")): continue
        lines += ["", f"{'updates per second':22s}" + "".join(f"{op:>10s}" for op in OPS)]
        lines += [f"{name:22s}" + "".join(f"{x[op]:10.0f}" if op in x else f"{'-':>10s}" for op in OPS)
                  for name, x in per_second.items()]
    return "\n".join(lines)


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: all parts at small sizes, as a test")
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
                   help="which; the others keep what the file has of them")
    p.add_argument("--minutes", type=float, default=14.0, help="for all parts together (default 14), a share for each")
    p.add_argument("--out", type=Path, help="JSON file (default bdpo_lit/results/speed_gpu.json; cpu: under runs/)")
    p.add_argument("--flowrl", default=os.environ.get("FLOWRL") or None, metavar="DIR",
                   help="a clone of github.com/typoverflow/flow-rl, v0.2.0: its JAX code is timed as well")
    p.add_argument("--jax", default=sys.executable, metavar="PYTHON", help="one with JAX for the GPU (default: this)")
    p.add_argument("--share", type=float, default=1.0, help="of the paper's updates, for the plane (default 1)")
    p.add_argument("--chapters", nargs="+", metavar="NAME", help="such as 19_toy2d (default: all; cpu: two)")
    p.add_argument("--wheels", type=Path, metavar="DIR", help="unpack these first, for a machine without network")
    p.add_argument("--fetch", type=Path, metavar="DIR", help="download those wheels, and end")
    p.add_argument("--commit", help="version of the code, where git is not at hand")
    for hidden in ("--part", "--into", "--until", "--work", "--serve", "--notebook"): p.add_argument(
        hidden, help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    a = options()
    if a.fetch: return fetch(a.fetch)
    if a.serve: return serve(**json.loads(a.serve))
    if a.notebook: return notebook(Path(a.notebook), a.device, Path(a.into))
    if a.part:
        a.until, into = float(a.until), Path(a.into)
        def keep(found):
            into.with_suffix(".part").write_text(json.dumps(found, indent=1))
            into.with_suffix(".part").replace(into)
        return PARTS[a.part](a, keep)
    check = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if a.device == "cuda" and subprocess.run([sys.executable, "-c", check]).returncode:
        sys.exit("There is no GPU here, or no torch that can use it. Everything at small sizes: --device cpu")
    until, a.work = time.time() + 60 * a.minutes, tempfile.mkdtemp(prefix="gpu-")
    if a.device == "cpu" and not a.chapters: a.chapters = ["12_speed", "19_toy2d"]
    out = a.out or (ROOT / "bdpo_lit" / "results" / "speed_gpu.json" if a.device == "cuda" else
                    ROOT / "runs" / "gpu_cpu.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    path = [str(ROOT)] + ([install(a.wheels)] if a.wheels else [])
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= dict(MINARI_DATASETS_PATH=str(Path(a.work) / "minari"), MPLBACKEND="agg", OMP_NUM_THREADS="1")
    result, lock = json.loads(out.read_text()) if out.exists() else {}, threading.Lock()
    made = provenance(a)
    def run(name):
        print(f"{name} ...", file=sys.stderr, flush=True)
        found = run_part(name, a, until)
        with lock:
            result[name] = found
            result.setdefault("provenance", {})[name] = made | dict(device=a.device)
            out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {found['status']}", file=sys.stderr, flush=True)
    for group in TOGETHER:
        if some := [name for name in group if name in a.parts]:
            with ThreadPoolExecutor(len(some)) as pool:
                try: list(pool.map(run, some))
                except KeyboardInterrupt:
                    for process in RUNNING: _end(process)    # sessions of their own: Ctrl-C does not reach them
                    raise
    shutil.rmtree(a.work, ignore_errors=True)
    print(f"\n{summary(result)}\n\nWritten: {out}")
    return int(any(result[name]["status"] != "done" for name in a.parts))


if __name__ == "__main__": sys.exit(main())
