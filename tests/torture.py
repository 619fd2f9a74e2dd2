"""`make torture`: hours of what a run and its files must stand, and what came of it, counted.

    kill         a run whose process is killed at random moments ends in the same numbers
    checkpoints  damaged checkpoints: the run goes on rightly, or says what to do
    disk         no space left, at every kind of write
    files        damaged config.json, CSV and JSON files of a run
    data         damaged data sets (fuzz_data.py)
    soak         memory, open files and speed of one process that trains for long
    numerics     precisions, threads, repetition

Each piece of a part is written to --out as soon as it is done, in place of what was there, or (--go-on) beside it.
The script ends with status 1 if a promise was broken. --quick is what `make test` runs."""
import argparse
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import closing, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_training import PLAN, TINY, Walk, tensors, toy  # noqa: E402

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig  # noqa: E402
from bdpo_lit.algorithm.speed import synthetic_batch  # noqa: E402
from bdpo_lit.evidence.demo import PRESETS  # noqa: E402
from bdpo_lit.offline.data import load_minari  # noqa: E402
from bdpo_lit.offline.maze import collect_maze, make_maze_env  # noqa: E402
from bdpo_lit.offline.training import (  # noqa: E402
    RunError,
    Training,
    draw_runs,
    export_policy,
    load_agent,
    load_checkpoint,
    read_column,
    read_config,
    read_scoreboard,
    scoreboard,
    show_scoreboard,
    stop_after_step,
)
from bdpo_lit.reference.style import RESULTS, provenance  # noqa: E402
from bdpo_lit.theory.diffusion import vp_schedule  # noqa: E402

TINY_PLAN = replace(PLAN, pretrain_steps=30, train_steps=50, log_every=3, save_every=4, eval_every=10)
TABLES = ("metrics.csv", "evaluations.csv", "warnings.csv")


# ---- a run that takes a second

def begin(folder: Path) -> Training:
    "The run in the folder, or a new one."
    return Training(toy(), TINY_PLAN, TINY, Walk, folder, resume=True)


def drive(folder: Path, updates: int | None = None, each: Callable = lambda made: None) -> dict:
    "So many more updates, or all; Ctrl-C and SIGTERM stop it tidily, as under `watch`."
    t = begin(folder)
    with stop_after_step() as stop, closing(t.run()) as loop:
        for made, _ in enumerate(loop, 1):
            each(made)
            if made == updates or stop.is_set(): break
    return dict(finished=t.finished)


def equal(a, b) -> bool:
    "The same to the last bit."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def ended_alike(folder: Path, whole: Path) -> bool:
    "Whether a run ended as the undisturbed one: last checkpoint and tables."
    a, b = (load_checkpoint(f / "last.pt") for f in (folder, whole))
    text = lambda f: [(f / name).read_bytes() if (f / name).exists() else None for name in TABLES]
    a["run"] = b["run"] = None      # its name
    return equal(a, b) and text(folder) == text(whole)


class Apart:
    "A function in a process of its own, whose answer or error comes back; what it prints does not."
    def __init__(self, f: Callable[[], object]):
        self.pipe, write = os.pipe()
        if (pid := os.fork()) == 0:
            code = 70
            try:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for fd in (1, 2): os.dup2(nowhere, fd)
                told, code = dict(answer=f()), 0
            except KeyboardInterrupt: told, code = {}, 130
            except BaseException as e: told = dict(error=type(e).__name__, text=str(e), fine=isinstance(e, RunError))
            finally:
                try: os.write(write, json.dumps(told).encode()[:60_000])
                finally: os._exit(code)
        os.close(write)
        self.pid = pid

    def end(self) -> tuple[int, dict]:
        "Wait: exit status (minus the signal), and what it told."
        with open(self.pipe, "rb") as f: told = f.read()
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code, json.loads(told) if told else {}


def in_one_line(told: dict) -> bool: return bool(told.get("fine")) and "\n" not in told["text"].strip()


def say(*words): print(*words, flush=True)


# ---- kill

def kill(cycles: int, seed: int, folder: Path) -> dict:
    "Signals at random moments; after some of them the run is driven to its end and compared."
    rng, counts, moments, bad = random.Random(seed), Counter(), [], []
    start = time.perf_counter()
    Apart(partial(drive, folder / "whole")).end()
    usual = time.perf_counter() - start
    while sum(counts[k] for k in ("KILL", "TERM", "INT twice")) < cycles:
        run = folder / f"run{counts['runs']}"
        for _ in range(rng.randint(1, 8)):
            how = rng.choice(["KILL", "KILL", "TERM", "INT twice"])
            process = Apart(partial(drive, run))
            time.sleep(rng.uniform(0, usual))
            try:
                if how == "INT twice":
                    os.kill(process.pid, signal.SIGINT)
                    time.sleep(rng.uniform(0, 0.01))
                os.kill(process.pid, getattr(signal, f"SIG{how.split()[0]}"))
            except ProcessLookupError: pass
            code, told = process.end()
            if told.get("answer", {}).get("finished"): counts["too late"] += 1; break
            counts[how] += 1
            if "error" in told: bad.append(f"{how}: {told}")
            if (run / "last.pt").exists(): moments.append(sum(load_checkpoint(run / "last.pt")["steps"].values()))
        code, told = Apart(partial(drive, run)).end()
        counts["runs"] += 1
        if code or not ended_alike(run, folder / "whole"):
            bad.append(f"run {counts['runs']} of seed {seed}: {told or code}")
        else: counts["ended alike"] += 1
        shutil.rmtree(run)
    return dict(counts=dict(counts), kept_at=sorted(moments), pretrain=TINY_PLAN.pretrain_steps,
                train=TINY_PLAN.train_steps, bad=bad)


# ---- checkpoints

def flip(x: bytearray, rng, other):
    "One bit."
    x[rng.randrange(len(x))] ^= 1 << rng.randrange(8)


def flips(x, rng, other):
    for _ in range(20): flip(x, rng, other)


def cut(x, rng, other): del x[rng.randrange(len(x)):]


def zeros(x, rng, other):
    "A block that never reached the disk."
    at, size = rng.randrange(len(x)), rng.choice([512, 4096])
    x[at:at + size] = bytes(len(x[at:at + size]))


def mixed(x, rng, other):
    "A block of an older checkpoint."
    at, size = rng.randrange(len(x)), rng.choice([512, 4096])
    x[at:at + size] = other[at:at + size].ljust(len(x[at:at + size]), b"\0")


def swapped(x, rng, other):
    "Two tensors of one size have changed places, every checksum of the archive being right."
    with zipfile.ZipFile(io.BytesIO(x)) as z: members = {i.filename: z.read(i) for i in z.infolist()}
    alike = [(a, b) for a in members for b in members
             if "/data/" in a and "/data/" in b and a < b and len(members[a]) == len(members[b])
             and members[a] != members[b]]
    a, b = rng.choice(alike)
    members[a], members[b] = members[b], members[a]
    with zipfile.ZipFile(new := io.BytesIO(), "w", zipfile.ZIP_STORED) as z:
        for name, content in members.items(): z.writestr(name, content)
    x[:] = new.getvalue() + x[-72:]     # the seal stays where it was


def longer(x, rng, other): x += rng.randbytes(rng.randrange(1, 5000))


def empty(x, rng, other): x.clear()


DAMAGES = (flip, flips, cut, zeros, mixed, swapped, longer, empty)


def checkpoints(count: int, seed: int, folder: Path) -> dict:
    "A stopped run whose checkpoints are damaged is taken up again, and its agent is loaded."
    rng, counts, bad = random.Random(seed), {f.__name__: Counter() for f in DAMAGES}, []
    drive(folder / "whole")
    for updates in (63, 13): drive(folder / "stopped", updates)
    right = {p.name: p.read_bytes() for p in sorted((folder / "stopped").glob("*.pt"))}
    older = right.get("previous.pt") or right["best.pt"]
    agents = {name: load_agent(folder / "stopped" / name, "cpu").state_dict() for name in right}
    choice = [[name] for name in right] + [["last.pt"]] * 3 + [[n for n in right if n != "best.pt"]]
    for k in range(count):
        damage, names, run = rng.choice(DAMAGES), rng.choice(choice), folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "stopped", run)
        for name in names:
            damage(x := bytearray(right[name]), rng, older)
            (run / name).write_bytes(x)
        files = {name: (run / name).read_bytes() for name in names}
        found = [_loaded(run / name, agents[name]) for name in names] + [_resumed(run, folder / "whole", files)]
        counts[damage.__name__].update(trials=1, files=len(names))
        for verdict in found:
            counts[damage.__name__][verdict.split(":")[0]] += 1
            if not verdict.startswith("fine"): bad.append(f"{damage.__name__} {names}, trial {k}: {verdict}")
    return dict(count=count, damages={k: dict(v) for k, v in counts.items()}, bad=bad,
                files={k: len(v) for k, v in right.items()})


def _loaded(path: Path, agent: dict) -> str:
    "What became of a damaged file when it was asked for by name."
    try: found = load_agent(path, "cpu").state_dict()
    except RunError as e: return "fine, refused" if "\n" not in str(e) else f"more than a line: {e}"
    except Exception as e: return f"crash: loading, {type(e).__name__} {e}"
    return "fine, read rightly" if equal(found, agent) else "other numbers: loaded"


def _resumed(run: Path, whole: Path, files: dict) -> str:
    "What became of the run."
    try:
        with redirect_stderr(io.StringIO()): drive(run)     # which says that it goes on from the one before
    except RunError as e:
        if "\n" in str(e): return f"more than a line: {e}"
        if not {"last.pt", "previous.pt"} <= files.keys(): return f"stopped, though a good one is left: {e}"
        if any((run / name).read_bytes() != x for name, x in files.items()): return f"lost: {e}"
        shutil.copy(run / "best.pt", run / "last.pt")       # as the message says
        drive(run)
        return "fine, run stopped and said why" if ended_alike(run, whole) else "other numbers: resumed from best.pt"
    except Exception as e: return f"crash: resuming, {type(e).__name__} {e}"
    return "fine, run went on" if ended_alike(run, whole) else "other numbers: resumed"


# ---- disk

def limited(folder: Path, size: int, at: int) -> dict:
    "The run, in which from the update `at` on no file can grow beyond `size` bytes."
    def each(made):
        if made == at: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    each(0)
    return drive(folder, each=each)


def filled(folder: Path, room: int, at: int) -> dict:
    "The run on a file system of its own, in which from the update `at` on only `room` bytes are left."
    def each(made):
        if made != at: return
        free = os.statvfs(folder.parent)
        with open(folder.parent / "ballast", "wb") as f: f.write(bytes(max(free.f_bavail * free.f_frsize - room, 0)))
    return drive(folder, each=each)


def disk(count: int, seed: int, folder: Path) -> dict:
    "Places too small for what is written, from the start or from some update on; then there is room again."
    rng, counts, bad = random.Random(seed), Counter(), []
    drive(folder / "whole")
    largest = (folder / "whole" / "last.pt").stat().st_size
    small = folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={30 * largest}", "tmpfs", small]      # root may
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        for k in range(count):
            full = mounted and k % 2
            run = (small if full else folder) / "run"
            size = rng.choice([0, rng.randrange(64), int(largest ** rng.random()), rng.randrange(largest + 1)])
            process = Apart(partial(filled if full else limited, run, size, rng.choice([0, 1, rng.randrange(80)])))
            code, told = process.end()
            (small / "ballast").unlink(missing_ok=True)
            if code == 0: counts["there was room"] += 1
            elif in_one_line(told):
                what = told["text"].split("cannot write ")[-1].split(";")[0].split(": ")[0]
                what = "tensorboard" if "tensorboard" in what else Path(what).name
                counts[f"no room for {what}"] += 1
            else: bad.append(f"limit {size}: {told or code}")
            code, told = Apart(partial(drive, run)).end()
            if code or not ended_alike(run, folder / "whole"): bad.append(f"trial {k}, then: {told or code}")
            else: counts["ended alike"] += 1
            shutil.rmtree(run)
    finally:
        if mounted: subprocess.run(["umount", small], check=True)
    for write in (scoreboard, partial(export_policy, path=folder / "policy.pt2")):
        code, told = Apart(partial(_no_room, partial(write, folder / "whole"))).end()
        if in_one_line(told): counts["other writes refused in a line"] += 1
        else: bad.append(f"{write}: {told or code}")
    return dict(count=count, counts=dict(counts), tmpfs=bool(mounted), bad=bad)


def _no_room(write: Callable):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    write(make_env=Walk, episodes=1) if write.func is scoreboard else write()


# ---- files of a run

STRANGE = (None, "", "x", "../../x", -1, 0, 1.5, 10**30, math.nan, math.inf, True, [], {}, [[]], {"x": 1}, "9" * 5000)


def leaves(x, path=()):
    "Places in nested lists and dicts."
    if isinstance(x, dict | list) and x:
        for k in (x if isinstance(x, dict) else range(len(x))):
            yield (*path, k)
            yield from leaves(x[k], (*path, k))


def strange_json(x: bytearray, rng, other):
    "Another value, or none, in some place."
    tree = json.loads(x)
    *way, last = rng.choice(list(leaves(tree)))
    at = tree
    for k in way: at = at[k]
    if rng.random() < 0.2: del at[last]
    else: at[last] = rng.choice(STRANGE)
    x[:] = json.dumps(tree).encode()


def strange_csv(x, rng, other):
    "Another cell, one less, or one more."
    rows = [line.split(",") for line in x.decode().splitlines()]
    row = rng.choice(rows)
    how, k = rng.randrange(4), rng.randrange(len(row))
    if how == 0: del row[k]
    elif how == 1: row.insert(k, "x")
    elif how == 2: rows.remove(row)
    else: row[k] = str(rng.choice(STRANGE))
    x[:] = "\n".join(map(",".join, rows)).encode() + b"\n" * rng.randrange(3)


READERS = dict(
    read_config=read_config, read_metric=lambda run: read_column(run, "q/mean"),
    read_evaluations=lambda run: read_column(run, "return"), draw=lambda run: plt.close(draw_runs([run])),
    board=lambda run: (b := read_scoreboard(run)) and show_scoreboard(b), resume=lambda run: begin(run),
    score=lambda run: scoreboard(run, Walk, episodes=1, candidates=[1]))


def files(count: int, seed: int, folder: Path) -> dict:
    "Each reader of a run directory meets a damaged file: it reads, or refuses in a line."
    rng, counts, bad = random.Random(seed), Counter(), []
    for updates in (63, 13): drive(folder / "stopped", updates)
    scoreboard(folder / "stopped", Walk, episodes=1, candidates=[1])
    names = [p.name for p in sorted((folder / "stopped").iterdir()) if p.suffix in (".json", ".csv")]
    warned = Counter()
    for k in range(count):
        name, run = rng.choice(names), folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(folder / "stopped", run)
        content, own = bytearray((run / name).read_bytes()), strange_json if name.endswith("json") else strange_csv
        damage = rng.choice([own, own, own, flip, flips, cut, zeros, longer, empty])
        damage(content, rng, b"")
        (run / name).write_bytes(content)
        for reader, read in READERS.items():
            if reader in ("draw", "score") and k % 10: continue     # which take long
            try: read(run); verdict = "read"
            except RunError as e: verdict = "refused" if "\n" not in str(e) else "more than a line"
            except Exception as e: verdict = f"crash: {type(e).__name__} {e}"
            counts[verdict.split(":")[0]] += 1
            if verdict not in ("read", "refused"):
                kind = f"{reader}, {name}: {verdict}".splitlines()[0][:160]
                warned[kind] += 1
                if warned[kind] <= 3: bad.append(f"{damage.__name__}, seed {seed} trial {k}: {kind}")
    return dict(count=count, files=names, counts=dict(counts), bad=bad)


def data(count: int, seed: int, folder: Path) -> dict:
    "Damaged and hostile data sets: read rightly, refused in a line, or (where no checksum is) with other numbers."
    from fuzz_data import fuzz
    found = fuzz(count, seed, folder)
    counts = dict(read=found["right"], refused=found["refused"], other=found["other"], crash=found["crashed"])
    return dict(count=count, counts=counts, kinds=found["kinds"], slowest_s=found["slowest_s"], bad=found["bad"])


# ---- soak

def resident() -> float:
    "Memory of this process now, in MB (Linux)."
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def maze(folder: Path, steps: int = 5000):
    "A small set of the maze, in a folder of its own."
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    (folder / "minari").mkdir()
    return load_minari(collect_maze(steps, progress=False).spec.dataset_id)


def soak(minutes: float, seed: int, folder: Path) -> dict:
    "Trains in the maze, evaluates every 500 updates, and looks at itself."
    demo, samples = PRESETS["short"], []
    plan = replace(demo.train, pretrain_steps=500, train_steps=10**9, eval_every=500, eval_episodes=5, log_every=100,
                   save_every=500, seed=seed, device="cpu")
    t = Training(maze(folder), plan, demo.algorithm, make_maze_env, folder / "run")
    start = last = time.perf_counter()
    every, made = minutes * 60 / 120, 0
    with closing(t.run()) as updates:
        for _ in updates:
            made += 1
            if (now := time.perf_counter()) - last < every: continue
            samples.append(dict(minutes=(now - start) / 60, updates=sum(t.steps.values()), speed=made / (now - last),
                                memory_mb=resident(), files=len(os.listdir("/proc/self/fd")),
                                evaluations=len(t.evaluations)))
            last, made = now, 0
            if now - start > minutes * 60: break
    warm = min(2, samples[-1]["evaluations"])       # environments come and go: memory moves by some 30 MB
    late = [s for s in samples[len(samples) // 4:] if s["evaluations"] >= warm]
    first, last = (np.median([s["memory_mb"] for s in part]) for part in np.array_split(late, 2))
    bad = [f"memory grew from {first:.0f} to {last:.0f} MB"] if last > 1.1 * first else []
    if late[-1]["files"] > late[0]["files"]: bad.append("files stay open")
    found = {f"{what}_{name}": f([s[what] for s in late]) for what in ("memory_mb", "files")
             for name, f in (("least", min), ("most", max))}
    return dict(minutes=minutes, samples=samples, **found, bad=bad)


# ---- numerics

WATCHED = ("behavior/loss", "q/loss", "q/mean", "v/loss", "v/mean", "actor/loss")


def updates_of(agent: BDPO, batches: list) -> list[dict]:
    "Metrics of behaviour updates, for a fifth of the batches, then of the main loop's."
    found, warm = [], len(batches) // 5
    for k, batch in enumerate(batches):
        if k == warm: agent.start_actor()
        metrics = agent.update_behavior(batch) if k < warm else agent.update(batch)
        found.append({name: float(metrics[name]) for name in WATCHED if name in metrics})
    return found


def in_double(agent: BDPO) -> BDPO:
    "The same agent in float64, with the draws of float32."
    for learner in (agent.behavior, agent.actor, agent.q, agent.v):
        for net in (learner.net, learner.target): net.double()
    agent.sched = vp_schedule(agent.config.num_steps, dtype=torch.float64)
    agent._normal = lambda *shape: BDPO._normal(agent, *shape).double()
    return agent


def apart(a: list[dict], b: list[dict]) -> dict:
    "By metric: update, and relative distance, of 40 updates."
    found = {}
    for name in WATCHED:
        if not (steps := [k for k in range(len(a)) if name in a[k]]): continue
        scale = float(np.mean([abs(b[k][name]) for k in steps]))
        chosen = steps[::max(len(steps) // 40, 1)]
        found[name] = dict(update=[k + 1 for k in chosen],
                           distance=[abs(a[k][name] - b[k][name]) / scale for k in chosen],
                           most=max(abs(a[k][name] - b[k][name]) for k in steps) / scale)
    return found


def large(updates: int) -> dict:
    "One thread and two, with the paper's networks, where products of matrices are shared out between threads."
    batch, trained = synthetic_batch(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        agent = BDPO(17, 6, BDPOConfig(warmup_steps=0), "cpu", 0)
        trained.append(updates_of(agent, [batch] * updates))
    most = max(x["most"] for x in apart(*trained).values())
    return dict(updates=updates, threads_equal=most == 0, most=most)


def numerics(updates: int, seed: int, folder: Path) -> dict:
    "The maze's agent, the same batches and draws: again; with two threads; in float64."
    algorithm, rows = replace(PRESETS["short"].algorithm, warmup_steps=updates // 10), maze(folder)
    order = torch.Generator().manual_seed(seed)
    batches = [rows.sample(PRESETS["short"].train.batch_size, order) for _ in range(updates)]
    def trained(threads: int = 1, double: bool = False):
        torch.set_num_threads(threads)
        agent = BDPO(rows.obs_dim, rows.action_dim, algorithm, "cpu", seed)
        if not double: return agent, updates_of(agent, batches)
        as_double = [type(b)(*(x.double() if x.is_floating_point() else x for x in b)) for b in batches]
        return agent, updates_of(in_double(agent), as_double)
    (one, of_one), (again, _), (two, of_two), (two_again, _) = trained(), trained(), trained(2), trained(2)
    _, of_double = trained(double=True)
    torch.set_num_threads(1)
    same = lambda a, b: equal(list(tensors(a.state_dict())), list(tensors(b.state_dict())))
    bad = [f"{name} gives other numbers" for name, fits in (
        ("the same again", same(one, again)), ("the same again, two threads,", same(two, two_again))) if not fits]
    return dict(updates=updates, again_equal=same(one, again), two_threads_again_equal=same(two, two_again),
                threads_equal=same(one, two), threads=apart(of_one, of_two), double=apart(of_one, of_double),
                losses={name: [m[name] for m in of_one if name in m][-1] for name in WATCHED},
                paper=large(max(updates // 25, 2)), bad=bad)


# ---- all of it

PARTS = dict(kill=(kill, 60, 4, 6), checkpoints=(checkpoints, 1000, 24, 100), disk=(disk, 100, 6, 10),
             files=(files, 3000, 30, 250), data=(data, 10_000, 40, 500),      # full size, quick size, size of a piece
             soak=(soak, 60, 0.1, None), numerics=(numerics, 1000, 20, None))


def added(old: dict, new: dict) -> dict:
    "Two pieces of a part in one: counts and lists are added up."
    def add(a, b):
        if isinstance(a, dict): return {k: add(a[k], b[k]) if k in a and k in b else (a | b)[k] for k in a | b}
        return a + b
    sums = {"count", "counts", "damages", "kinds", "seconds", "seeds", "bad", "kept_at"}
    return new | {k: add(old[k], new[k]) for k in sums & old.keys() & new.keys()}


def in_pieces(name: str, size, a) -> list[tuple]:
    "Sizes and seeds."
    piece = PARTS[name][3] or size
    return [(min(piece, size - k * piece), a.seed + k) for k in range(math.ceil(size / piece))]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=RESULTS / "torture.json")
    p.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    p.add_argument("--quick", action="store_true", help="a minute in all")
    p.add_argument("--go-on", action="store_true", help="keep the pieces that --out has, and add those it lacks")
    p.add_argument("--minutes", type=float, help="of the soak")
    p.add_argument("--count", type=int, help="trials of the parts, in place of their own numbers")
    p.add_argument("--seed", type=int, default=0, help="of the first piece")
    a = p.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # jobs in the background are started deaf
    broken = False
    for name in a.parts:
        part, full, quick, _ = PARTS[name]
        size = quick if a.quick else (a.minutes or full) if name == "soak" else (a.count or full)
        found = _read(a.out).get(name) if a.go_on else None
        for count, seed in in_pieces(name, size, a):
            if found and seed in found["seeds"]: continue
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                new = part(count, seed, Path(folder).resolve())
            new |= dict(seeds=[seed], seconds=round(time.perf_counter() - start, 1), provenance=provenance())
            found = added(found, new) if found else new
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(_read(a.out) | {name: found}, indent=1) + "\n")
        say(f"{name}: {size} in {found['seconds']:.0f} s", found.get("counts", ""), found.get("damages", ""))
        for line in found["bad"][:40]: say("  broken:", line)
        broken = broken or bool(found["bad"])
    sys.exit(broken)


def _read(path: Path) -> dict: return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__": main()
