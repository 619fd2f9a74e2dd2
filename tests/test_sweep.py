"""Grids of runs: interrupted, killed, full, failing, under bash and on Ray, and still the same table."""
import csv
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bdpo_lit.evidence.sweep as sweeps
import bdpo_lit.reference.command_line as cli
from bdpo_lit.evidence.sweep import (
    EXPERIMENTS,
    Experiment,
    cells,
    collect,
    draw_sweep,
    overall,
    read_experiment,
    read_results,
    report,
    run_local,
    run_ray,
    status,
    summary,
    sweep,
)
from bdpo_lit.offline.evaluation import iqm
from bdpo_lit.offline.maze import collect_maze
from bdpo_lit.offline.training import RunError
from bdpo_lit.reference.style import result

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and limits of Unix")
OPTIONS = read_experiment("minute").options | {"episodes": 1}
GRID = Experiment("grid", ["maze"], dict(eta={"algorithm.eta": [0.1, 1.0]}), [0], OPTIONS)
LONG = {"train.pretrain_steps": 1500, "train.log_every": 50, "train.save_every": 50}    # there is time to interrupt

RAY = dict(RAY_ADDRESS="local",     # not one that somebody left behind
           RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0",  # leaves nothing at home, is quiet and patient
           RAY_agent_register_timeout_ms="600000", RAY_worker_register_timeout_seconds="600")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Where the maze is kept, and the runs."
    home = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        for k, v in RAY.items(): patch.setenv(k, v)
        collect_maze(2000, progress=False)
        yield home


@pytest.fixture(scope="module")
def undisturbed(home):
    "The table of the grid, whose printed lines were run by bash."
    lines = "\n".join(cell.line() for cell in cells(GRID, home / "lines"))
    done = subprocess.run(["bash", "-e"], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return collect(GRID, home / "lines")


def same(rows):
    "All of a table that a machine, an hour and an interruption do not change."
    return [{k: v for k, v in r.items() if k not in ("seconds", "date", "commit")} for r in rows]


# ---- what a file says

def test_shipped_experiments():
    shipped = {p.stem: read_experiment(p.stem) for p in EXPERIMENTS.glob("*.toml")}
    assert {k: len(cells(x)) for k, x in shipped.items()} == dict(
        table1=75, ablate_eta=50, parts=165, minute=4)
    assert [shipped["parts"].variants[f"N={n}"]["algorithm.num_steps"] for n in (2, 10)] == [2, 10]
    assert [cell.set for cell in cells(shipped["table1"])[:15]] == sorted(
        (r["task"] for r in result("paper_table1.csv")), key=list(shipped["table1"].sets).index)
    for x in shipped.values(): assert x.about and len(x.seeds) == (2 if x.name == "minute" else 5)


@pytest.mark.parametrize("name", sorted(p.stem for p in EXPERIMENTS.glob("*.toml")))
def test_every_command_is_understood_by_bdpo_train(name):
    for cell in cells(read_experiment(name))[:3]:
        start = cli._with_settings(cli.Start.of(cell.options.get("task"), {}), {})
        c = cli._parse(start, cell.words(), "bdpo train")
        for k, v in cell.options.items():
            found = c
            for part in k.split("."): found = getattr(found, part)
            assert found == (tuple(v) if isinstance(v, list) else v), k


def test_options_of_a_grid_are_options_of_bdpo_train():
    start = cli._with_settings(cli.Start.of("maze", {}), {})
    there = {o.removeprefix("--").replace("-", "_") for o in cli._options(type(start))}
    assert set(sweeps._OPTIONS) <= there
    assert there - set(sweeps._OPTIONS) == {"seed", "seeds", "together", "run_dir", "json", "train.seed"}


@pytest.mark.parametrize("text, said", [
    ("sets = ['maze']\n[variants]\na.algorithm.etaa = 1", "no option 'algorithm.etaa'; did you mean 'algorithm.eta'"),
    ("sets = ['maze']\n[options]\nrun-dir = 'x'", "no option 'run_dir'"),
    ("sets = ['maze']\n[variants]\na.algorithm.num-steps = [5, 0]", "a=0: num_steps must be"),
    ("sets = ['maze']\n[variants]\na.train.batch-size = 'x'", "x, maze, a: "),
    ("sets = ['maze']\nseeds = [1, 1]", "two runs would share a folder"),
    ("sets = []", "needs a set"),
    ("sets = ['../maze']", "cannot name a folder"),
    ("sets = ['maze']\nvariant = {}", "variant"),
    ("sets = [", "is no experiment"),
    ("seeds = [1]", "sets")])
def test_what_cannot_be_run_is_refused_before_anything_starts(text, said, tmp_path):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(RunError) as e: read_experiment(tmp_path / "x.toml")
    assert said in str(e.value)


def test_lines_are_quoted(tmp_path):
    data = "it's my \"data\" $HOME.npz"
    x = Experiment("q", dict(d=dict(data=data)), dict(v={"algorithm.max_q": False, "algorithm.clip": "None"}), [3])
    line = cells(x, tmp_path / "a folder")[0].line()
    (tmp_path / "bdpo").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "bdpo").chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    heard = json.loads(subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env).stdout)
    assert heard == ["train", "--threads", "1", "--data", data, "--algorithm.no-max-q", "--algorithm.clip", "None",
                     "--seed", "3", "--run-dir", str(tmp_path / "a folder/q/d-v-3")]
    assert shlex.split(line)[1:] == heard


# ---- the same table, whatever happens

def test_each_policy_of_each_run_once(home, undisturbed):
    keys = [(r["variant"], r["seed"], r["name"]) for r in undisturbed]
    assert len(keys) == len(set(keys)) == 2 * 7
    assert {r["who"] for r in undisturbed} == {"data", "data_best", "behavior", "gaussian", "last"}
    for r in undisturbed:
        assert r["status"] == "finished" and r["commit"] and r["torch"] and r["python"] and r["threads"] == 1
        assert f"--algorithm.eta {r['variant'].removeprefix('eta=')} --seed 0" in r["command"]
    board = json.loads((cells(GRID, home / "lines")[0].run_dir / "scoreboard.json").read_text())
    assert [r["mean"] for r in undisturbed[:7]] == [r["mean"] for r in board["rows"]]


@pytest.fixture(params=[run_local, run_ray], ids=["local", "ray"])
def somehow(request):
    "Run here, or on a Ray that is started for it."
    if request.param is run_ray: pytest.importorskip("ray", reason="the extra bdpo_lit[sweep] is not installed")
    return request.param


@POSIX
def test_interrupted_and_taken_up_is_as_undisturbed(home, undisturbed, somehow):
    out = home / f"stopped-{somehow.__name__}"
    killed = cells(GRID, out)
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parent))
    code = f"import sys, test_sweep as t; t.sweep(t.GRID, sys.argv[1], t.{somehow.__name__})"
    going = subprocess.Popen([sys.executable, "-c", code, str(out)], env=env, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(lambda: any((c.run_dir / "metrics.csv").exists() for c in killed) or going.poll() is not None, 300)
    going.send_signal(signal.SIGINT)
    err = going.communicate(timeout=60)[1]
    assert going.returncode and "KeyboardInterrupt" in err
    found = {c.name: status(c) for c in killed}
    assert "unfinished" in (states := {s for s, _ in found.values()}) and "failed" not in states, found
    assert len(read_results(out / "grid" / "results.csv")) >= 2, "the table is written all the same"
    ran = [c for c in killed if c.log.exists()]
    assert ran and all("exit" in c.log.read_text() for c in ran), "nobody is left running"
    assert same(sweep(GRID, out, jobs=2)) == same(undisturbed)
    before = {c.log: c.log.read_text() for c in killed}
    assert same(sweep(GRID, out)) == same(undisturbed)
    assert {c.log: c.log.read_text() for c in killed} == before, "what is finished is not run again"


def wait_for(what, seconds=90):
    deadline = time.time() + seconds
    while not what():
        assert time.time() < deadline, "it took too long"
        time.sleep(0.05)


@contextmanager
def no_file_larger_than(size):
    "A disk that is full for all but small files; processes that are started inherit it."
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@POSIX
def test_a_full_disk_leaves_what_is_there(home, undisturbed):
    one = Experiment("grid", GRID.sets, {"eta=0.1": {"algorithm.eta": 0.1}}, [0], OPTIONS)
    cell, = cells(one, home / "full")
    with no_file_larger_than(12_000): rows = sweep(one, home / "full")   # checkpoints are
    assert [(r["status"], r["who"]) for r in rows] == [("failed", None)]
    assert "cannot write" in rows[0]["note"] and "free some space" in rows[0]["note"]
    assert (cell.run_dir / "config.json").exists()
    assert same(sweep(one, home / "full")) == [r for r in same(undisturbed) if r["variant"] == "eta=0.1"]


@pytest.fixture
def shared(tmp_path):
    "A file system of its own, small."
    folder = tmp_path / "shared"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_shared_folder_without_space_keeps_its_results(home, undisturbed, shared, somehow):
    "One run is finished, the other finds no room, the table neither; then there is room again."
    first, second = cells(GRID, shared)
    sweep(replace(GRID, variants={"eta=0.1": GRID.variants["eta=0.1"]}), shared)
    kept = {p: p.read_bytes() for p in [shared / "grid/results.csv", *first.run_dir.iterdir()] if p.is_file()}
    free = os.statvfs(shared)
    (shared / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - 12_000))
    with pytest.raises(RunError, match="cannot write .*results.csv: No space left"): sweep(GRID, shared, somehow)
    assert {p: p.read_bytes() for p in kept} == kept and status(first)[0] == "finished"
    assert status(second)[0] in ("failed", "unfinished"), "its log may have had no room for why"
    (shared / "ballast").unlink()
    assert same(sweep(GRID, shared, somehow)) == same(undisturbed)
    assert first.log.read_text().count("exit ") == 1, "what is finished is not run again"


@POSIX
def test_a_table_is_written_whole_or_not_at_all(tmp_path):
    x = Experiment("x", ["maze"], seeds=[0])
    collect(x, tmp_path)
    table = tmp_path / "x" / "results.csv"
    before = table.read_text()
    with no_file_larger_than(10), pytest.raises(RunError, match="cannot write .*results.csv: File too large"):
        collect(x, tmp_path)
    assert table.read_text() == before and os.listdir(tmp_path / "x") == ["results.csv"]
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot begin"): run_local(cells(x, tmp_path / "file"))


# ---- with a stand-in for `bdpo train`, which does as its seed says

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
words, run = sys.argv[3:], Path(sys.argv[-1])
seed = int(words[words.index("--seed") + 1])
run.mkdir(parents=True, exist_ok=True)
(run / "began").open("a").write(str(time.time()) + " ")
if seed == 1: sys.exit("bdpo: the third wheel came off")
if seed == 2: os.kill(os.getpid(), signal.SIGKILL)
if seed == 3:
    def leave(*_): (run / "saved").touch(); sys.exit(130)
    signal.signal(signal.SIGTERM, leave); (run / "ready").touch(); time.sleep(60)
time.sleep(0.3)
(run / "ended").write_text(str(time.time()))
if seed == 4: sys.exit(0)
config = dict(train=dict(seed=seed, train_steps=5, how="best", num_actions=10), algorithm={}, data=dict(id="it"),
              about=dict(preset="maze"), versions=[{}])
(run / "config.json").write_text(json.dumps(config))
row = dict(who="last", num_actions=1, step=5, mean=float(seed), name="it", low=None, high=None, success=None,
           episodes=2)
(run / "scoreboard.json").write_text(json.dumps(dict(rows=[row], episodes=20, unit="score", env="e", warnings=[],
                                                     seed=0, signs={}, provenance={})))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    "An experiment whose runs are played by the stand-in."
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/stand_in.py" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sweeps.sys, "executable", str(tmp_path / "python"))
    return lambda *seeds: Experiment("x", ["maze"], seeds=seeds)


@POSIX
def test_failures_are_rows_with_the_last_line_of_their_log(stand_in, tmp_path):
    x = stand_in(0, 1, 2, 4, 5)
    rows = sweep(x, tmp_path, jobs=2)
    assert [(r["seed"], r["status"], r["mean"]) for r in rows] == [
        (0, "finished", 0.0), (1, "failed", None), (2, "failed", None), (4, "failed", None), (5, "finished", 5.0)]
    assert rows[1]["note"] == "bdpo: the third wheel came off"
    assert "no scoreboard" in rows[3]["note"]
    said = report(rows)
    assert "failed: maze-default-1: bdpo: the third wheel came off" in said and "2 of 5 runs are finished" in said
    assert rows == collect(x, tmp_path)
    sweep(x, tmp_path, jobs=2)
    tries = {c.seed: len((c.run_dir / "began").read_text().split()) for c in cells(x, tmp_path)}
    assert tries == {0: 1, 1: 2, 2: 2, 4: 2, 5: 1}, "what failed is tried again, what is finished is not"


@POSIX
def test_as_many_at_a_time_as_asked(stand_in, tmp_path):
    sweep(stand_in(*range(10, 16)), tmp_path, jobs=3)
    spans = [(float((c.run_dir / "began").read_text()), float((c.run_dir / "ended").read_text()))
             for c in cells(stand_in(*range(10, 16)), tmp_path)]
    assert max(sum(a <= t < b for a, b in spans) for t, _ in spans) == 3


@POSIX
def test_an_interruption_lets_every_run_save_and_starts_no_other(stand_in, tmp_path):
    x = stand_in(3, 10)
    first, second = cells(x, tmp_path)
    def interrupt():
        wait_for((first.run_dir / "ready").exists)
        os.kill(os.getpid(), signal.SIGINT)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt): sweep(x, tmp_path, jobs=1)
    finally: signal.signal(signal.SIGINT, old)
    thread.join()
    assert (first.run_dir / "saved").exists() and not second.run_dir.exists()
    assert [status(c)[0] for c in (first, second)] == ["unfinished", "not begun"]
    assert [r["status"] for r in read_results(tmp_path / "x" / "results.csv")] == ["unfinished", "not begun"]


# ---- what counts as finished

def test_a_folder_with_another_run_is_not_counted(home, undisturbed, tmp_path):
    cell = next(c for c in cells(GRID, home / "lines") if c.variant == "eta=1.0")
    assert status(cell) == ("finished", "")
    changed = lambda **more: status(replace(cell, options=cell.options | more))
    for option, value, said in (("algorithm.eta", 0.5, "algorithm.eta is 1.0 there and 0.5 here"),
                                ("seed", 1, "seed is 0 there"), ("episodes", 2, "episodes is 1 there"),
                                ("task", "maze-long", "task is maze there"),
                                ("algorithm.actor_hidden", [16, 16], "actor_hidden is [16] there")):
        state, why = changed(**{option: value})
        assert state == "failed" and said in why
    board = json.loads((cell.run_dir / "scoreboard.json").read_text())
    assert sweeps._finished(dict(train=dict(train_steps=40)), board)
    assert not sweeps._finished(dict(train=dict(train_steps=80)), board), "the table is of an earlier end"
    gone = replace(cell, run_dir=tmp_path / "none")
    assert status(gone) == ("not begun", "")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text("{")
    state, why = status(gone)
    assert state == "failed" and "is damaged" in why


# ---- numbers

def rows_of(scores):
    return [dict(set=s, variant=v, seed=k, status="finished", who="last", num_actions=1, mean=x, seconds=1.0,
                 unit="score", note=None)
            for v, sets in scores.items() for s, xs in sets.items() for k, x in enumerate(xs)]


def test_summaries_against_a_bootstrap_by_hand():
    rng = np.random.default_rng(0)
    x = dict(a=rng.normal(50, 9, 5), b=rng.normal(20, 3, 5))
    rows = rows_of(dict(v=x, only=dict(a=x["a"])))
    (value, low, high), = overall(rows).values()     # "only" lacks a set
    mixed = [r | dict(unit=dict(a="score").get(r["set"], "return")) for r in rows]
    assert len({r["unit"] for r in mixed}) == 2 and not overall(mixed), "scores and returns have no common mean"
    pooled = np.sort(np.concatenate([*x.values()]))
    assert value == pytest.approx(pooled[2:8].mean())
    drawn = np.concatenate([rng.choice(xs, (20_000, 5)) for xs in x.values()], 1)
    assert (low, high) == pytest.approx(np.quantile(np.sort(drawn, 1)[:, 2:8].mean(1), (.025, .975)), abs=1)
    first = summary(rows)[0]
    assert (first["set"], first["variant"], first["seeds"]) == ("a", "v", 5) and first["iqm"] == iqm(x["a"])
    assert first["low"] < first["iqm"] < first["high"]
    failed = dict(rows[0], status="failed", who=None, num_actions=None, mean=None)
    assert summary([*rows, failed]) == summary(rows)
    assert "unknown" in report(rows_of(dict(v=dict(a=[1.0])))), "one seed has no interval"


def test_pictures(undisturbed):
    fig = draw_sweep(undisturbed)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["eta=0.1", "eta=1.0"]
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {
        "BDPO", "diffusion clone", "Gaussian clone", "data, mean"}
    two = draw_sweep([dict(r, set=s) for r, s in itertools.product(undisturbed, "ab")])
    assert [ax.get_title() for ax in two.axes] == ["a", "b"]
    lost = dict.fromkeys(undisturbed[0]) | dict(set="maze", variant="lost", seed=0, status="failed")
    assert len(draw_sweep([*undisturbed, lost]).axes[0].get_xticks()) == 3, "its place stays empty, but is there"


def test_a_table_is_read_as_it_was_written(home, undisturbed):
    with open(home / "lines" / "grid" / "results.csv", newline="") as f: raw = list(csv.DictReader(f))
    assert [r["mean"] for r in raw] == ["" if r["mean"] is None else repr(r["mean"]) for r in undisturbed]
    assert read_results(home / "lines" / "grid" / "results.csv") == undisturbed


# ---- Ray

@pytest.fixture
def cluster(home):
    "A head without cores, and two nodes with two cores each."
    pytest.importorskip("ray", reason="the extra bdpo_lit[sweep] is not installed")
    import ray
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0))
    try: yield cluster, [cluster.add_node(num_cpus=2, num_gpus=0) for _ in range(2)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def processes(of: int, name: str) -> list:
    "Descendants of a process whose command line contains the name, as they are now."
    import psutil
    found = []
    for p in psutil.Process(of).children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(p.cmdline()): found.append(p)
    return found


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"bdpo_lit\[sweep\]"): run_ray(cells(GRID, tmp_path))


TAKEN_UP = re.compile(r"taken up at update (\d+) \+ 0,")   # in the middle of its 1500 + 40


@POSIX
def test_ray_loses_a_worker_a_run_and_a_node_and_nothing_else(home, cluster):
    "Runs so long that all of them are in the middle when it happens."
    cluster, nodes = cluster
    long = Experiment("long", GRID.sets, GRID.variants, [0, 1], OPTIONS | LONG)
    calm, run = sweep(long, home / "calm"), cells(long, home / "ray")
    raylets = [n.all_processes["raylet"][0].process.pid for n in nodes]
    hit = {}

    def at(raylet, name=str(home / "ray")):
        "Runs of a node, by the folder in their command lines."
        return {Path(p.cmdline()[-1]).name: p for p in processes(raylet, name) if "bdpo_lit" in p.cmdline()}

    def disturb():
        wait_for(lambda: all((c.run_dir / "last.pt").exists() for c in run), 300)
        first, second = [*at(raylets[0])]
        hit["worker"], hit["run"] = [first], [second]
        processes(raylets[0], f"ray::{first}")[0].kill()    # its run ends with it
        at(raylets[0])[second].kill()                       # as the kernel does when memory is short
        lost = at(raylets[1])
        hit["node"] = [*lost]
        cluster.remove_node(nodes[1], allow_graceful=False)
        for p in lost.values(): p.kill()                    # where a machine goes, all of it does
        hit["states"] = {status(c)[0] for c in run}

    thread = threading.Thread(target=disturb)
    thread.start()
    rows = sweep(long, home / "ray", run_ray, address=cluster.address)
    thread.join()
    assert len(hit["worker"] + hit["run"] + hit["node"]) == 4 and "finished" not in hit["states"], hit
    assert same(rows) == same(calm)
    for c in run: assert TAKEN_UP.search(c.log.read_text()), f"{c.name} did not go on from its checkpoint: {hit}"


def test_ray_shares_a_gpu_and_tells_what_failed(home, monkeypatch):
    "A GPU that is only said to be there: its shares are handed out all the same."
    ray = pytest.importorskip("ray")
    real = ray.init
    monkeypatch.setattr(ray, "init", lambda address, **k: real(num_cpus=4, num_gpus=1, **k))
    x = Experiment("gpu", dict(maze=dict(task="maze"), lost=dict(data="nowhere.npz")), seeds=[0], options=OPTIONS)
    rows = sweep(x, home / "gpu", run_ray, gpus=0.5)
    assert {r["status"] for r in rows if r["set"] == "maze"} == {"finished"}
    lost, = (r for r in rows if r["set"] == "lost")
    assert lost["status"] == "failed" and "nowhere.npz" in lost["note"]
    assert cells(x, home / "gpu")[1].log.read_text().count("exit ") == 1, "a mistake is not tried again"


# ---- the command

def test_the_command(home, undisturbed, tmp_path, capsys):
    def said(words, status=None):
        capsys.readouterr()
        if status is None: cli.main(["sweep", *words])
        else:
            with pytest.raises(SystemExit) as e: cli.main(["sweep", *words])
            assert e.value.code == status
        out = capsys.readouterr()
        return out.out + out.err

    lines = said(["minute", "--print", "--out", "a b"]).splitlines()
    assert lines == [c.line() for c in cells(read_experiment("minute"), "a b")] and len(lines) == 4
    (tmp_path / "grid.toml").write_text("\n".join([
        "sets = ['maze']", "seeds = [0]", "[variants]", "eta.algorithm.eta = [0.1, 1.0]", "[options]",
        *(f'"{k}" = {json.dumps(v)}' for k, v in OPTIONS.items())]))
    words = [str(tmp_path / "grid.toml"), "--out", str(home / "lines")]
    assert "2 of 2 runs are finished" in said([*words, "--local", "--jobs", "1"])
    assert "eta=0.1" in said([*words, "--collect", "--plot", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").exists()
    assert "not begun: maze-eta=1.0-1" in said(["minute", "--collect", "--out", str(tmp_path)], 1)
    for wrong, why in ((["minute"], "how? Give one of"), (["minute", "--local", "--ray"], "how? Give one of"),
                       (["minute", "--local", "--jobs", "0"], "--jobs must be at least 1")):
        assert why in said(wrong, 2)
    with pytest.raises(SystemExit, match="no experiment 'minutes'"): cli.main("sweep minutes --print".split())
