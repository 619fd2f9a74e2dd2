"""Runs: interrupted anywhere and resumed to the same numbers; clear errors; evaluation that disturbs nothing."""

import csv
import itertools
import os
import pickle
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bdpo_lit.evidence.demo as maze_demo
import bdpo_lit.offline.training as training
import bdpo_lit.reference.command_line as command_line
from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.offline.data import DataError, Transitions, scale_reward
from bdpo_lit.offline.evaluation import episode_seeds, vectorize
from bdpo_lit.offline.training import (
    METRICS,
    RunError,
    TrainConfig,
    Training,
    TrainingDiverged,
    advice,
    best_evaluation,
    contest,
    draw_runs,
    export_policy,
    load_agent,
    load_checkpoint,
    read_column,
    read_config,
    read_scoreboard,
    save_checkpoint,
    scoreboard,
    show_scoreboard,
    show_seeds,
    stop_after_step,
    surely_below,
    train_seeds,
    watch,
)

TINY = BDPOConfig(num_steps=2, num_critics=2, num_samples=2, actor_hidden=(8,), critic_hidden=(8,), time_dim=4,
                  behavior_lr=1e-2, actor_lr=1e-2, critic_lr=1e-2, warmup_steps=7, actor_every=2, ema=0.1)
PLAN = TrainConfig(pretrain_steps=33, train_steps=40, batch_size=8, seed=3, device="cpu", log_every=10, eval_every=10,
                   eval_episodes=3, num_actions=2, save_every=7)


KILL, INT, TERM = getattr(signal, "SIGKILL", None), signal.SIGINT, signal.SIGTERM


class Walk(gym.Env):
    "Five steps; what one gets depends on every action."

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=3).astype(np.float32), 0
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x[:2] += action
        return self.x.copy(), float(self.x[0] * action[1]), False, self.t == 5, {"success": bool(self.x[1] > 0)}


def toy(size=50):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return Transitions(draw(size, 3), draw(size, 2).clamp(-0.9, 0.9), draw(size), draw(size, 3), torch.zeros(size),
                       torch.zeros(size, dtype=torch.int64), dict(id="toy", ref_min_score=-1.0, ref_max_score=1.0))


def start(run_dir=None, resume=True, env=Walk, algorithm=TINY, data=None, **changes):
    return Training(data or toy(), replace(PLAN, **changes), algorithm, env, run_dir, resume)


def finish(*args, **kwargs):
    with closing((t := start(*args, **kwargs)).run()) as updates: list(updates)
    return t


def tensors(x):
    if isinstance(x, torch.Tensor): yield x
    elif isinstance(x, dict): yield from (t for y in x.values() for t in tensors(y))


def same_agent(a, b):
    pairs = zip(tensors(a.state_dict()), tensors(b.state_dict()), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def assert_same_run(here, there):
    for file in ("metrics.csv", "evaluations.csv", "warnings.csv"):
        assert (here / file).exists() == (there / file).exists()
        if (here / file).exists(): assert (here / file).read_text() == (there / file).read_text()
    for file in ("last.pt", "best.pt"):
        a, b = load_checkpoint(here / file), load_checkpoint(there / file)
        for key in ("steps", "evaluations", "warnings"): assert a[key] == b[key]
        assert torch.equal(a["order"], b["order"])
        assert same_agent(load_agent(here / file, "cpu"), load_agent(there / file, "cpu"))


@pytest.fixture(scope="module", autouse=True)
def settings():
    "One thread, and a Ctrl-C that is heard (jobs in the background are started deaf)."
    threads, handler = torch.get_num_threads(), signal.signal(INT, signal.default_int_handler)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(INT, handler)


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    "A run that nobody touched."
    return finish(tmp_path_factory.mktemp("through") / "run")


# Stopping and resuming

def at_call(owner, name, k, sig, times=1):
    "Send this process a signal in the k-th call of a function."
    real, calls = getattr(owner, name), itertools.count(1)
    def call(*args, **kwargs):
        if next(calls) == k:
            for _ in range(times): signal.raise_signal(sig)
        return real(*args, **kwargs)
    setattr(owner, name, call)


DEATHS = [  # where, in which call, how; what becomes of the process; (each goes on where the one before it died)
    (BDPO, "update_behavior", 5, KILL, 1, -KILL),    # before there is anything to resume
    (os, "fsync", 3, KILL, 1, -KILL),                # in the first save of last.pt: written, not yet in its place
    (BDPO, "update_behavior", 12, KILL, 1, -KILL),   # rows were logged since the last save
    (BDPO, "update_behavior", 3, INT, 1, 0),         # Ctrl-C
    (os, "replace", 2, KILL, 1, -KILL),              # while rows are forgotten
    (BDPO, "_normal", 40, INT, 2, 130),              # Ctrl-C twice, in the middle of an update
    (training, "play_episodes", 1, KILL, 1, -KILL),  # in an evaluation
    (training, "play_episodes", 1, INT, 2, 130),     # Ctrl-C twice in an evaluation: made up for later
    (BDPO, "update_actor", 2, KILL, 1, -KILL),       # critics updated, actor not
    (BDPO, "update", 4, TERM, 1, 0),
    (training, "save_checkpoint", 3, KILL, 1, -KILL),
    (csv.DictWriter, "writerow", 1, KILL, 1, -KILL),
    (BDPO, "update_critics", 1, INT, 1, 0),
]


def die_often(run_dir):
    "The run in one process after another, each of which gets a signal; prints how each ended, and what it left."
    signal.signal(INT, signal.default_int_handler)
    start()  # torch imports much when it makes its first optimiser: once for all
    for owner, name, k, sig, times, _ in DEATHS:
        if (child := os.fork()) == 0:
            code = 99
            try:
                torch.manual_seed(k)  # nobody may depend on torch's global random numbers
                at_call(owner, name, k, sig, times)
                t = start(run_dir)
                watch(t)
                code = 99 if t.finished else 0
            except KeyboardInterrupt: code = 130
            finally: os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = load_checkpoint(run_dir)["steps"].values() if (Path(run_dir) / "last.pt").exists() else ()
        print(code, *left, flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_interrupted_anywhere_ends_in_the_same_numbers(through, tmp_path, run):
    code = f"import test_training; test_training.die_often({str(tmp_path / 'run')!r})"
    done = run(sys.executable, "-c", code, cwd=Path(__file__).parent, OMP_NUM_THREADS="1")
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [end[0] for end in ends] == [death[-1] for death in DEATHS], done.stderr[-2000:]
    left = [end[1:] for end in ends]
    assert left == sorted(left), "a checkpoint went back"
    assert left[:3] == [(), (), (7, 0)] and 0 < left[-1][1] < PLAN.train_steps
    assert left[7][1] % PLAN.eval_every == 0, "a whole update is kept when its evaluation is broken off"
    finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", through.dir)


@pytest.mark.parametrize("updates", [0, 1, 13, 33, 34, 45, 73])
def test_leaving_the_loop_saves_and_resumes_exactly(updates, through, tmp_path):
    with closing((t := start(tmp_path / "run")).run()) as loop:
        for _ in range(updates): next(loop)
    if updates:  # a generator that never began has nothing to save
        assert sum(load_checkpoint(tmp_path / "run")["steps"].values()) == updates
    torch.manual_seed(updates)
    assert finish(tmp_path / "run").finished and not t.finished or updates == 73
    assert_same_run(tmp_path / "run", through.dir)


def test_an_error_of_the_consumer_saves_and_one_in_an_update_does_not(tmp_path, monkeypatch):
    def consume(t, fail_at):
        with closing(t.run()) as loop:
            for p in loop: assert p.step < fail_at, "consumer"
    t = start(tmp_path / "run", save_every=1000)
    with pytest.raises(AssertionError, match="consumer"): consume(t, 5)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert load_checkpoint(tmp_path / "run")["steps"]["pretrain"] == 5
    at_call(t.agent, "draw", 3, INT)
    with pytest.raises(KeyboardInterrupt): consume(t, 100)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    with pytest.raises(RunError, match="half-way.*resume=True"): next(t.run())


def test_more_updates_later(through, tmp_path):
    finish(tmp_path / "run", train_steps=20)
    assert load_checkpoint(tmp_path / "run")["steps"]["train"] == 20
    finish(tmp_path / "run")
    assert_same_run(tmp_path / "run", through.dir)
    assert not list(start(tmp_path / "run").run()), "nothing is left to do"


def test_tensorboard_shows_each_number_once(through, tmp_path):
    t = start(tmp_path / "run")
    with closing(t.run()) as loop:
        for p in loop:
            if (p.phase, p.step) == ("train", 25): break
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "train")).Reload()
    assert [e.step for e in events.Scalars("q/mean")] == [10, 20], "a kill after a save must not lose what was logged"
    names = [name for name in METRICS if name != "eta"]
    t._log("train", 40, dict.fromkeys(names, 1.0))  # step 25 has no row; steps 30 and 40 are written and then lost:
    for t.steps["train"] in (30, 40): t._log("train", 40, dict.fromkeys(names, 1e9))
    time.sleep(1.1)  # TensorBoard orders files by the second
    finish(tmp_path / "run")
    show = lambda events, tag: [(e.step, e.value) for e in events.Scalars(tag)]  # noqa: E731
    for phase in ("pretrain", "train"):
        a, b = (EventAccumulator(str(d / "tensorboard" / phase)).Reload() for d in (tmp_path / "run", through.dir))
        assert (tags := a.Tags()["scalars"]) == b.Tags()["scalars"]
        for tag in tags: assert show(a, tag) == show(b, tag)
    assert "evaluation/score" in tags


def test_signals_are_left_alone_outside_the_main_thread_and_restored():
    before, seen = (signal.getsignal(INT), signal.getsignal(TERM)), []
    def work():
        with stop_after_step() as stop: seen.append((signal.getsignal(INT), stop.is_set()))
    (thread := threading.Thread(target=work)).start()
    thread.join()
    assert seen == [(before[0], False)]
    with stop_after_step(): assert signal.getsignal(INT) is not before[0]
    assert (signal.getsignal(INT), signal.getsignal(TERM)) == before


# What a run does

def test_actor_starts_once_as_the_behaviour_policy(monkeypatch):
    calls, real = [], BDPO.start_actor
    monkeypatch.setattr(BDPO, "start_actor", lambda self: (calls.append(self.behavior.updates), real(self))[1])
    finish(env=None)
    assert calls == [PLAN.pretrain_steps]


def test_no_run_is_evaluated_on_the_starts_that_later_judge_it(monkeypatch):
    played, real = [], training.play_episodes
    monkeypatch.setattr(training, "play_episodes", lambda *a, seed: (played.append(seed), real(*a, seed=seed))[1])
    for seed in (0, 1, 1000): finish(seed=seed, eval_every=0)
    assert len(set(played)) == 3
    assert not set(episode_seeds(1000, 100)) & {start for seed in played for start in episode_seeds(seed, 10)}


@pytest.mark.parametrize("make_env, how", [(Walk, "best"), (vectorize(Walk, 2), "sample"), (Walk, "softmax")])
def test_evaluation_does_not_disturb_training(through, make_env, how, tmp_path):
    t = finish(tmp_path, env=make_env, eval_every=3, how=how)
    assert [e["step"] for e in t.evaluations] == [*range(3, 40, 3), 40]
    assert (tmp_path / "metrics.csv").read_text() == (through.dir / "metrics.csv").read_text()
    assert same_agent(t.agent, through.agent)
    before = t.agent.state_dict()["generator"].clone()
    assert t.evaluate() == t.evaluations[-1] == t.evaluate(), "same agent, same seeds, same result"
    assert len(t.evaluate(episodes=7)) == len(t.evaluations[-1]) and torch.equal(before, t.agent.generator.get_state())


def test_evaluations_and_the_best(through):
    assert [e["step"] for e in through.evaluations] == [10, 20, 30, 40]
    assert len({e["return"] for e in through.evaluations}) == 4
    best = max(through.evaluations, key=lambda e: e["return"])
    assert load_checkpoint(through.dir / "best.pt")["steps"]["train"] == best["step"]
    for e in through.evaluations: assert e["score"] == pytest.approx(100 * (e["return"] + 1) / 2)
    with open(through.dir / "evaluations.csv") as f: rows = list(csv.DictReader(f))
    assert [list(row.values()) for row in rows] == [["" if x is None else str(x) for x in e.values()]
                                                    for e in through.evaluations]
    assert all((e["env"], e["how"], e["num_actions"]) == (None, "best", 2) for e in through.evaluations)
    none = finish(env=None)
    assert same_agent(none.agent, through.agent) and not none.evaluations
    with pytest.raises(RunError, match="no environment"): none.evaluate()
    assert [e["step"] for e in finish(eval_every=0).evaluations] == [40], "0: only at the end"


def test_another_way_to_play_begins_another_comparison(through, tmp_path):
    finish(tmp_path, train_steps=20)
    stopped = (tmp_path / "evaluations.csv").read_text()
    other = finish(tmp_path, how="sample", num_actions=5)          # resumed, and judged otherwise
    assert (tmp_path / "metrics.csv").read_text() == (through.dir / "metrics.csv").read_text()
    assert (tmp_path / "evaluations.csv").read_text().startswith(stopped)
    assert [(e["how"], e["num_actions"]) for e in other.evaluations] == [("best", 2)] * 2 + [("sample", 1)] * 2
    new = other.evaluations[2:]
    assert load_checkpoint(tmp_path / "best.pt")["steps"]["train"] == max(new, key=lambda e: e["return"])["step"]
    assert read_column(tmp_path, "return") == {e["step"]: e["return"] for e in new}
    assert [line.get_label() for line in draw_runs([tmp_path, through.dir]).axes[2].lines] == [
        "toy, how sample, num_actions 5", "toy, how best, num_actions 2"]
    # what an older release wrote goes on in the columns of this one
    for e in (state := load_checkpoint(tmp_path))["evaluations"]: del e["env"], e["how"], e["num_actions"]
    save_checkpoint(tmp_path / "last.pt", state)
    (tmp_path / "evaluations.csv").write_text("step,episodes,return,std,success,score\n10,3,0,0,0,0\n")
    finish(tmp_path, train_steps=50, how="sample")
    with open(tmp_path / "evaluations.csv") as f: rows = list(csv.DictReader(f))
    assert [(r["step"], r["how"]) for r in rows] == [(str(k), "") for k in (10, 20, 30, 40)] + [("50", "sample")]
    assert [float(r["return"]) for r in rows[:4]] == [e["return"] for e in state["evaluations"]]


def test_the_number_of_threads_is_noted(tmp_path):
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        start(tmp_path, env=None)
    torch.set_num_threads(1)
    assert [v["threads"] for v in read_config(tmp_path)["versions"]] == [1, 2]


def test_rows_are_averages_of_what_the_agent_reports(through, monkeypatch):
    t, seen = start(log_every=1, env=None), {}
    for p in t.run():
        for key, x in p.metrics.items(): seen.setdefault((p.phase, (p.step - 1) // 10, key), []).append(x)
    with open(through.dir / "metrics.csv") as f: rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["step", "phase", *METRICS] and len(rows) == 8
    for row in rows:
        for key in METRICS:
            values = seen.get((row["phase"], (int(row["step"]) - 1) // 10, key))
            assert (row[key] == "") == (values is None)
            if values: assert float(row[key]) == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)


def test_asks_for_no_number_between_rows(monkeypatch):
    "Each would make a GPU wait."
    t = start(env=None)
    asked = []
    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, n=name, r=real: (asked.append(n), r(self, *a))[1])
    counts = [(p.metrics is not None, len(asked)) for p in t.run()]
    grew = [now - before for (_, before), (_, now) in itertools.pairwise(counts)]
    assert all((more > 0) == logged for more, (logged, _) in zip(grew, counts[1:], strict=True))


@pytest.mark.parametrize("phase, advice", [("pretrain", "behavior_lr"), ("train", "rewards")])
def test_divergence_keeps_the_last_good_checkpoint(phase, advice, tmp_path):
    t = start(tmp_path, save_every=1, log_every=1000, eval_every=1)
    with pytest.raises(TrainingDiverged, match=advice) as e:
        for p in t.run():
            if (p.phase, p.step) == (phase, 12):
                net = t.agent.behavior.net if phase == "pretrain" else t.agent.q.net
                next(net.parameters()).data.fill_(float("nan"))
    assert "loss" in str(e.value) and "nan by update 13" in str(e.value) and "last.pt is from before" in str(e.value)
    assert load_checkpoint(tmp_path)["steps"][phase] == 12


# Signs of trouble

def test_bounds_of_values_by_brute_force():
    g = torch.Generator().manual_seed(0)
    worth = lambda k, a, b: (1 - 0.8**k) / 0.2 * a + 0.8**k * b  # noqa: E731
    for _ in range(50):
        r, end = torch.randn(6, generator=g), (torch.rand(6, generator=g) < 0.5).float()
        on, off = r[end == 0].tolist(), r[end == 1].tolist()
        values = [worth(k, a, b) for k in (0, 1, 3, 200) for a in on or [0] for b in off or [0]
                  if (k == 0 or on) and (k == 200 or off)]
        found = training.attainable(replace(toy(6), reward=r, terminal=end), 0.8)
        assert found == pytest.approx((min(values), max(values)), abs=1e-3)
    assert training.attainable(replace(toy(), reward=torch.ones(50)), 1.0) == (-np.inf, np.inf)


WILD = replace(TINY, critic_lr=1.0, actor_lr=3.0, behavior_lr=3.0)


def test_warns_once_per_metric_and_again_after_a_kill(tmp_path, capsys):
    told = [w for p in start(algorithm=WILD, env=None).run() for w in p.warnings]
    names = [w["metric"] for w in told]
    assert len(names) == len(set(names)) and {"behavior/loss", "q/loss", "q/penalty"} <= set(names)
    assert told[0]["metric"] == "behavior/loss" and (told[0]["phase"], told[0]["step"]) == ("pretrain", 10)
    assert all("try " in w["text"] and w["value"] > w["limit"] or w["metric"] in ("q/mean", "v/mean") for w in told)
    through = finish(tmp_path / "through", algorithm=WILD)
    with open(tmp_path / "through" / "warnings.csv") as f: rows = list(csv.DictReader(f))
    assert [(r["metric"], int(r["step"])) for r in rows] == [(w["metric"], w["step"]) for w in told]
    for updates in (12, 30, 15):  # left after a row was written and before it was saved
        loop = start(tmp_path / "parts", algorithm=WILD, save_every=1000).run()
        for _ in range(updates): next(loop)
        del loop  # the generator's own save happens here; then what a kill would have left:
        with open(tmp_path / "parts" / "warnings.csv", "a") as f: f.write("99,train,v/std,1,0,lost\n40,tr")
    watch(start(tmp_path / "parts", algorithm=WILD))
    assert_same_run(tmp_path / "parts", through.dir)
    said = capsys.readouterr().err
    assert "warning: behavior/loss is" in said and "at update 10 of phase 'pretrain', limit 2: " in said


def test_a_healthy_run_is_silent(through):
    assert not through.warnings and not (through.dir / "warnings.csv").exists()


# Units

class Wide(Walk):
    "Walk with actions between -2 and 6, of which it takes a quarter."
    action_space = gym.spaces.Box(-2, 6, (2,))

    def step(self, action): return super().step((action - 2) / 4)


def test_scaled_runs_make_the_same_updates_and_play_in_the_units_of_the_environment(through, tmp_path):
    data = toy()
    bounds = dict(action_low=np.full(2, -2.0), action_high=np.full(2, 6.0))
    wide = replace(data, action=4 * data.action + 2, meta=data.meta | bounds)
    t = finish(tmp_path / "run", data=wide, env=Wide)
    assert torch.allclose(t.data.action, data.action, atol=1e-6)
    for a, b in zip(tensors(t.agent.actor.state_dict()), tensors(through.agent.actor.state_dict()), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    obs = np.ones((9, 3), np.float32)
    np.testing.assert_allclose(load_agent(tmp_path / "run").policy(seed=0)(obs),
                               4 * through.agent.policy(seed=0)(obs) + 2, atol=1e-3)
    with pytest.raises(RunError, match="environment's actions lie between"): start(data=wide)
    with pytest.raises(RunError, match="set clip to 1.0"):
        start(data=wide, env=Wide, algorithm=replace(TINY, clip=2.0))


def test_normalized_observations_are_saved_with_the_agent(through, tmp_path):
    data = toy()
    far = replace(data, obs=1000 * data.obs + 500, next_obs=1000 * data.next_obs + 500)
    t = finish(tmp_path / "run", data=far, env=None, normalize_obs=True)
    assert t.data.obs.mean(0).abs().max() < 1e-5 and torch.allclose(t.data.obs.std(0, correction=0), torch.ones(3))
    near = data.obs.numpy()
    agent = load_agent(tmp_path / "run")
    np.testing.assert_array_equal(agent.policy(seed=0)(1000 * near + 500), t.agent.policy(seed=0)(1000 * near + 500))
    seen = (near - near.mean(0)) / near.std(0)
    unscaled = BDPO(3, 2, TINY)
    unscaled.load_state_dict(agent.state_dict() | dict(scaling=unscaled.scaling))
    np.testing.assert_allclose(agent.policy(seed=0)(1000 * near + 500), unscaled.policy(seed=0)(seen), atol=1e-3)
    with pytest.raises(RunError, match="normalize_obs is True there and False here"):
        start(tmp_path / "run", data=far, env=None)


# Files

def edit(path, **changes): save_checkpoint(path, load_checkpoint(path) | changes)


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (Path.touch, (self.path,))


def flip(path, byte, bit=0):
    "One bit of a file becomes another one."
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def sealed(path, what):
    "A file of torch with the checksum that ours have."
    torch.save(what, path)
    path.write_bytes(path.read_bytes() + training._seal(path.read_bytes()))


FAULTS = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-50]), "no checksum, so it was cut short"),
    "empty": (lambda p: p.write_bytes(b""), "no checksum, so it was cut short"),
    "text": (lambda p: p.write_text("hello"), "or is of another program"),
    "flipped": (lambda p: flip(p, 5000), "checksum does not fit"),
    "flipped seal": (lambda p: flip(p, -1), "checksum does not fit"),
    "evil": (lambda p: p.write_bytes(pickle.dumps(Evil(p.with_name("touched")), 2)), "no checksum"),
    "evil in torch": (lambda p: sealed(p, dict(x=Evil(p.with_name("touched")))), "was not written by this bdpo_lit"),
    "other": (lambda p: torch.save(dict(weight=torch.zeros(2)), p), "or is of another program"),
    "tensor": (lambda p: sealed(p, torch.zeros(2)), "not a checkpoint of bdpo_lit"),
    "newer": (lambda p: edit(p, version=4), "version 4, and this bdpo_lit reads version 3; use the release"),
    "older": (lambda p: edit(p, version=2), "version 2, and this bdpo_lit reads version 3; use the release"),
    "of before the checksum": (lambda p: p.write_bytes(p.read_bytes()[:-72]), "or an older release"),
    "gone": (lambda p: p.unlink(), "no checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_checkpoints_are_refused(fault, tmp_path):
    finish(tmp_path, pretrain_steps=1, train_steps=1)
    damage, message = FAULTS[fault]
    damage(tmp_path / "last.pt")
    for read in (load_checkpoint, load_agent):
        with pytest.raises(RunError, match=message) as e: read(tmp_path)
        assert str(tmp_path / "last.pt") in str(e.value)
    if fault != "gone":
        with pytest.raises(RunError, match=message): start(tmp_path, pretrain_steps=1, train_steps=1)
    assert not (tmp_path / "touched").exists(), "code of a stranger was executed"


def test_configurations_survive_numpy_numbers(tmp_path):
    @dataclass
    class Config: eta: float; num_steps: int; hidden: tuple
    plain = training._plain(Config(np.float32(0.5), np.int64(3), (np.int32(8), 4)))
    assert plain == dict(eta=0.5, num_steps=3, hidden=[8, 4])
    save_checkpoint(tmp_path / "a.pt", plain)
    assert load_checkpoint(tmp_path / "a.pt").items() >= plain.items()


def test_load_agent_during_pretraining_and_elsewhere(tmp_path, through):
    with closing(start(tmp_path, env=None).run()) as loop: next(loop)
    agent, obs = load_agent(tmp_path), np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(agent.policy()(obs), agent.policy(learner="behavior")(obs))
    assert not np.array_equal(through.agent.policy()(obs), through.agent.policy(learner="behavior")(obs))
    state = load_checkpoint(tmp_path)  # as a GPU writes it: its generator has a state of 16 bytes
    state["agent"]["generator"] = torch.zeros(16, dtype=torch.uint8)
    edit(tmp_path / "last.pt", agent=state["agent"], device="cuda")
    np.testing.assert_array_equal(load_agent(tmp_path, "cpu").policy()(obs), agent.policy()(obs))
    with pytest.raises(RunError, match="trained on 'cuda' and this is 'cpu'.*device='cuda'"):
        start(tmp_path)


@pytest.mark.gpu
def test_agent_of_a_gpu_plays_on_the_cpu(tmp_path):
    t = finish(tmp_path, device="cuda")
    for a, b in zip(tensors(load_agent(tmp_path, "cpu").actor.state_dict()), tensors(t.agent.actor.state_dict())):
        assert torch.equal(a, b.cpu())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_while_rows_are_added(tmp_path):
    t = start(tmp_path, env=None)
    with closing(t.run()) as loop: next(loop)
    (tmp_path / "metrics.csv").unlink(missing_ok=True)
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*metrics.csv: No space left"): list(t.run())
    (tmp_path / "metrics.csv").unlink()
    t = start(tmp_path, env=None)
    for events in t.events.values():
        events.unlink()
        events.symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"cannot write .*tensorboard.*tfevents.*: No space left"): list(t.run())


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="a.pt: No space left"): save_checkpoint(tmp_path / "a.pt", {})
    assert not list(tmp_path.iterdir())


def other(path, text): (path / "config.json").write_text(text)


@pytest.mark.parametrize("spoil, changes, message", [
    (None, dict(resume=False), "already holds a run.*resume=True"),
    (None, dict(batch_size=4), "other settings: batch_size is 8 there and 4 here.*another directory"),
    (None, dict(algorithm=replace(TINY, eta=0.5, rho=0.0)), "eta is 0.15 there and 0.5 here; rho is 1.0 there and 0.0"),
    (None, dict(data=replace(toy(), reward=2 * toy().reward)), "the data set has other numbers than there"),
    (None, dict(data=scale_reward(toy(), "antmaze")), "settings: reward_scale is 1.0 there and 100.0 here. Resume"),
    (None, dict(data=toy(60)), "the number of transitions is 50 there and 60 here"),
    (lambda p: other(p, "{"), {}, "config.json is damaged, or was not written by this bdpo_lit"),
    (lambda p: other(p, '{"train": {}}'), {}, "config.json is damaged, or was not written by this bdpo_lit"),
    (lambda p: other(p, "[]"), {}, "config.json is damaged, or was not written by this bdpo_lit"),
])
def test_directories_that_are_refused(spoil, changes, message, tmp_path):
    finish(tmp_path, pretrain_steps=2, train_steps=0, env=None)
    if spoil: spoil(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    with pytest.raises(RunError, match=message): start(tmp_path, **{"env": None, "pretrain_steps": 2} | changes)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before, "touched what it refused"


def test_a_directory_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "metrics.csv").write_text("mine\n1\n")
    with pytest.raises(RunError, match="holds metrics.csv, but no config.json.*another directory"): start(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "mine\n1\n" and len(list(tmp_path.iterdir())) == 1


def test_settings_of_another_time(tmp_path):
    finish(tmp_path, pretrain_steps=1, train_steps=0, env=None)
    edit(tmp_path / "last.pt", algorithm=load_checkpoint(tmp_path)["algorithm"] | dict(temper=1.0))
    with pytest.raises(RunError, match="settings unknown here.*temper"): load_agent(tmp_path)


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_places_that_cannot_be_written(where, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write .*choose another place"): start(tmp_path / where)


def test_the_last_one_to_open_a_run_owns_it(tmp_path):
    first = start(tmp_path, env=None)
    loop = first.run()
    for _ in range(9): next(loop)
    finish(tmp_path, env=None)
    before = (tmp_path / "metrics.csv").read_text()
    with pytest.raises(RunError, match="taken over"): next(loop)      # the tenth update would log
    with pytest.raises(RunError, match="taken over"): first.save()
    assert (tmp_path / "metrics.csv").read_text() == before
    assert load_checkpoint(tmp_path)["steps"]["train"] == PLAN.train_steps


# Impossible wishes

@pytest.mark.parametrize("config, field, value", [
    *((TrainConfig, f, -1) for f in ("pretrain_steps", "train_steps", "seed", "eval_every")),
    *((TrainConfig, f, 0) for f in ("batch_size", "log_every", "eval_episodes", "num_actions", "save_every")),
    (TrainConfig, "how", "greedy"), (TrainConfig, "log", "mlflow"),
    (BDPOConfig, "eta", -0.1), (BDPOConfig, "eta", float("nan")), (BDPOConfig, "rho", -1.0), (BDPOConfig, "gamma", 1.1),
    *((BDPOConfig, f, 0) for f in ("num_steps", "num_critics", "num_samples", "actor_every")),
    (BDPOConfig, "actor_hidden", ()), (BDPOConfig, "solver", "euler"), (BDPOConfig, "actor_lr", 0.0),
])
def test_impossible_settings(config, field, value):
    with pytest.raises(ValueError) as e: config(**{field: value})
    message = str(e.value)
    assert message.startswith(f"{field} must be ") and message.endswith(f"got {value!r}")


def test_impossible_runs():
    with pytest.raises(ValueError, match="both 0, so there is nothing to do"): TrainConfig(0, 0)
    with pytest.raises(DataError, match="batch_size is 51, but the data set has only 50"): start(batch_size=51)
    with pytest.raises(RunError, match="device 'gpu' is not available here.*'auto' or 'cpu'"): start(device="gpu")


@pytest.mark.parametrize("env", ["Pendulum-v1", "MountainCarContinuous-v0", "CartPole-v1"])
@pytest.mark.parametrize("vector", [False, True])
def test_environments_that_do_not_fit_the_data(env, vector):
    make = lambda: gym.make(env)  # noqa: E731
    with pytest.raises(RunError, match=r"observations of length \d and actions of shape .*, the data set 3 and \(2,\)"):
        start(env=vectorize(make, 2) if vector else make)


@pytest.mark.parametrize("meta, message", [
    (dict(action_low=[-2.0, -1.0], action_high=[2.0, 1.0]), "environment's actions lie between .* must agree"),
    (dict(ref_min_score=3.0, ref_max_score=3.0), "ref_max_score is 3.0 and ref_min_score 3.0"),
])
def test_data_that_do_not_fit(meta, message):
    with pytest.raises(RunError, match=message): start(data=replace(toy(), meta=meta))
    start(data=replace(toy(), meta=dict(ref_max_score=3.0, action_low=[-1.0], action_high=[1.0])))


# Environments that misbehave

class Faulty(Walk):
    "Pays what `paid` says in the evaluation of that number; each resets twice, before and after."
    resets, paid = 0, {}

    def reset(self, **kwargs):
        Faulty.resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        what = self.paid.get((Faulty.resets - 1) // (2 * PLAN.eval_episodes), reward)
        if isinstance(what, type): raise what("the simulator is broken")
        return obs, what, *rest


def test_best_is_finite_and_a_nan_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "resets", 0)
    monkeypatch.setattr(Faulty, "paid", {0: np.nan, 2: None})
    watch(t := start(tmp_path, env=Faulty))
    earned = [e["return"] for e in t.evaluations]
    assert [np.isfinite(x) for x in earned] == [False, True, False, True]
    best = max((e for e in t.evaluations if np.isfinite(e["return"])), key=lambda e: e["return"])
    assert best_evaluation(t.evaluations) == best
    assert load_checkpoint(tmp_path / "best.pt")["steps"]["train"] == best["step"]
    said = capsys.readouterr().err
    assert said.count("evaluation/return is nan at update 10") == 1 and "paid a reward that is no finite number" in said
    assert [w["metric"] for w in t.warnings] == ["evaluation/return"]


def test_an_environment_that_raises_ends_in_one_sentence_and_keeps_the_run(through, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "resets", 0)
    monkeypatch.setattr(Faulty, "paid", {1: ZeroDivisionError})
    with pytest.raises(RunError, match="Faulty failed in step with ZeroDivisionError: the simulator is broken "
                       r"\(episode 1, step 1\) \(evaluation after update 20\); the run is kept in .*: mend") as e:
        list(start(tmp_path, env=Faulty).run())
    assert "\n" not in str(e.value) and e.value.__cause__ is not None
    assert load_checkpoint(tmp_path)["steps"]["train"] == 20
    finish(tmp_path)
    assert_same_run(tmp_path, through.dir)


def test_best_is_never_the_clone(tmp_path):
    "Before the actor has moved, an evaluation is the merit of nu."
    t = finish(tmp_path, algorithm=replace(TINY, warmup_steps=25))
    assert [e["policy"] for e in t.evaluations] == ["nu", "nu", "actor", "actor"]
    assert load_checkpoint(tmp_path / "best.pt")["steps"]["train"] in (30, 40)
    assert best_evaluation(t.evaluations)["step"] in (30, 40)
    never = finish(tmp_path / "never", algorithm=replace(TINY, warmup_steps=50))
    assert best_evaluation(never.evaluations) is None and not (tmp_path / "never" / "best.pt").exists()
    board = scoreboard(never, episodes=3)
    assert {r["who"] for r in board["rows"]} == {"data", "data_best", "behavior", "gaussian"}
    assert board["warnings"] == ["the actor has not moved: its first update comes after warmup_steps = 50; train "
                                 "longer, or warm up less"]


# Did it work?

def test_scoreboard_plays_all_on_the_same_episodes(tmp_path):
    t = finish(tmp_path / "ünï dir" / "run")
    board = scoreboard(t, episodes=6, candidates=(1, 3))
    names = [r["name"] for r in board["rows"]]
    best = best_evaluation(t.evaluations)["step"]
    assert names == ["data, mean of 1 episode", "data, best episode", "diffusion clone, one sample",
                     "diffusion clone, best of 3", "Gaussian clone", "BDPO, one sample", "BDPO, best of 3",
                     *(f"BDPO of update {best}, {how}" for how in ("one sample", "best of 3") if best < 40)]
    played = {r["name"]: r["returns"] for r in board["rows"] if "returns" in r}
    alone = training.play_episodes(t.agent.policy("best", 3, seed=1000), Walk, 6, seed=1000)
    assert played["BDPO, best of 3"] == alone.returns.tolist()
    row = next(r for r in board["rows"] if r["name"] == "BDPO, best of 3")
    assert row["mean"] == pytest.approx(100 * (alone.returns.mean() + 1) / 2) and row["low"] < row["mean"] < row["high"]
    assert board["rows"][0]["mean"] == pytest.approx(100 * (toy().reward.sum().item() + 1) / 2, rel=1e-5)
    again = scoreboard(tmp_path / "ünï dir" / "run", Walk, episodes=6, candidates=(1, 3))   # from the files alone
    assert again["rows"] == board["rows"] and again["unit"] == "score" and again["signs"] == board["signs"]
    assert read_scoreboard(t.dir)["rows"] == board["rows"] and read_scoreboard(tmp_path) is None
    lines = show_scoreboard(board).splitlines()
    assert len({len(line) for line in lines[:len(names) + 2]}) == 1, "the columns line up"
    assert "6 episodes for each policy, the same ones (seed 1000)." in lines


def test_scoreboard_of_a_run_without_directory_or_environment():
    t = finish(env=None)
    with pytest.raises(RunError, match="no environment to play in; give make_env"): scoreboard(t)
    with pytest.raises(RunError, match="observations of length 3 and actions of shape .1,., the policies have 3"):
        scoreboard(t, lambda: gym.make("Pendulum-v1"))
    assert {"gaussian", "last"} <= {e.who for e in contest(t, Walk, episodes=2).values()}


def test_scaled_runs_have_scaled_clones(tmp_path):
    data, bounds = toy(), dict(action_low=np.full(2, -2.0), action_high=np.full(2, 6.0))
    wide = replace(data, action=4 * data.action + 2, meta=data.meta | bounds)
    one, other = (scoreboard(finish(data=d, env=e), episodes=4)["rows"] for d, e in ((data, Walk), (wide, Wide)))
    for a, b in zip(one, other, strict=True): assert a["mean"] == pytest.approx(b["mean"], abs=0.5)


def line(mean, who="behavior", spread=5.0, seed=0, **more):
    x = np.random.default_rng(seed).normal(mean, spread, 20)
    return dict(name=who, who=who, num_actions=1, mean=x.mean(), low=x.mean() - spread / 2, high=x.mean() + spread / 2,
                returns=x.tolist()) | more


SIGNS = dict(penalty=2.0, value=140.0, attainable=[0.0, 200.0], eta=0.1, budget=None, action_dim=2,
             moved=True, warmup_steps=0)


@pytest.mark.parametrize("price, words", [
    (0.01, ("pi is nearly nu", "a smaller eta (it is 0.1; 0.033")),
    (2.0, ("Q promised more than the world pays (q/mean is 140, and values lie between 0 and 200)",
           "a larger eta (it is 0.1; 0.3 ")),
    (40.0, ("pi has left the data", "more than 5 nats for each of the 2", "a larger eta")),
])
def test_advice_says_which_way(price, words):
    said, = training._verdict([line(100), line(50, "last", seed=1)], SIGNS | dict(penalty=price), 1)
    assert all(w.lower() in said.lower() for w in ("last earns 5", "surely less than behavior (", *words)), said


def test_advice_where_a_budget_is_given_turns_the_other_way():
    assert "a smaller nats_per_dim (it is 1; 0.33 would be a step)" in advice(SIGNS | dict(budget=1.0))
    assert "a larger nats_per_dim (it is 1; 3 would be a step)" in advice(SIGNS | dict(budget=1.0, penalty=0.01))


def test_no_warning_without_cause():
    assert not training._verdict([line(100), line(101, "last", seed=1)], SIGNS, 1)
    assert not training._verdict([line(100), line(99, "last", seed=1)], SIGNS, 1), "within the noise"
    assert training._verdict([dict(name="data", who="data", mean=100.0), line(50, "last")], SIGNS, 1)
    many = [line(100), line(200, num_actions=10), line(150, "last"), line(210, "last", num_actions=10, name="ten")]
    assert not training._verdict(many, SIGNS, 1), "a clone that lets Q choose plays another game"
    assert "ten surely earns more (2" in training._better_played(many, 1)[0]
    ten = [line(100), line(50, "last", num_actions=10), line(110, "last", name="one")]
    assert "But one does not: play it like this." in training._verdict(ten, SIGNS, 10)[0]
    assert "pretrain longer" in advice(SIGNS | dict(penalty=0.01), poor_clone=True)
    poor = dict(name="x", who="last", num_actions=1, mean=None, low=None, high=None, returns=[np.nan] * 3)
    told, *_ = training._verdict([line(1), poor], SIGNS, 1)
    assert "no finite numbers, so nothing is known of: x" in told and not surely_below(poor, line(1))


@pytest.mark.parametrize("together", [False, True])
def test_several_seeds_and_one_table(together, tmp_path):
    make = lambda seed: start(tmp_path / f"run-{seed}", seed=seed)  # noqa: E731
    found = train_seeds(make, (1, 2, 5), together, episodes=3)
    assert list(found["boards"]) == [1, 2, 5] and len(list(tmp_path.glob("run-*/scoreboard.json"))) == 3
    for row in found["rows"]:
        if row["who"] in ("last", "behavior"):
            each = [next(r["mean"] for r in b["rows"] if all(r[k] == row[k] for k in ("who", "num_actions")))
                    for b in found["boards"].values()]
            assert row["values"] == each and row["mean"] == pytest.approx(np.mean(each))
    assert {"data", "behavior", "gaussian", "last", "best"} <= {r["who"] for r in found["rows"]}
    lines = show_seeds(found).splitlines()
    assert "seed 1" in lines[0] and "95 % interval" in lines[0]
    assert len({len(x) for x in lines[:len(found["rows"])]}) == 1, "the columns line up"


def test_seeds_that_were_stopped_go_on(tmp_path, monkeypatch):
    make = lambda seed: start(tmp_path / f"run-{seed}", env=Walk, seed=seed)  # noqa: E731
    real, calls = BDPO.update, itertools.count(1)
    def update(self, batch):
        if next(calls) == 50: signal.raise_signal(INT)      # in the second run
        return real(self, batch)
    monkeypatch.setattr(BDPO, "update", update)
    assert train_seeds(make, (1, 2), episodes=2) == {}
    assert [load_checkpoint(tmp_path / f"run-{s}")["steps"]["train"] for s in (1, 2)] == [40, 10]
    assert train_seeds(make, (1, 2), episodes=2)["rows"]


# A policy leaves the house

@pytest.mark.parametrize("suffix, solver", [(".pt2", "ddpm"), (".pt2", "ddim"), (".onnx", "ddpm")])
def test_exported_policies_are_the_policy(suffix, solver, tmp_path, run):
    "In a process of its own: tests check every shape, and an exporter passes symbols for them."
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(package)
    done = run(sys.executable, "-W", "ignore", "-c", EXPORT, suffix, solver, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.stdout.split() == ["fixed", "input"]


EXPORT = """if True:
    import sys
    from dataclasses import replace
    import numpy as np, torch
    from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
    from bdpo_lit.offline.training import export_policy
    suffix, solver = sys.argv[1:]
    config = BDPOConfig(num_steps=3, num_critics=2, actor_hidden=(16,) * 2, critic_hidden=(16,), time_dim=4,
                        solver=solver, q_layer_norm=True)
    agent, g = BDPO(3, 2, config), torch.Generator().manual_seed(0)
    for p in agent.q.target.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=g)
    draw = lambda *n: torch.rand(n, generator=g, dtype=torch.float64) + 0.5
    agent.set_scaling(draw(3), draw(3), draw(2), draw(2))
    obs = torch.randn(7, 3, generator=g)
    def load(path):
        if suffix == ".pt2": return lambda *x: torch.export.load(path).module()(*x).numpy()
        import onnxruntime
        s = onnxruntime.InferenceSession(path)
        return lambda *x: s.run(None, dict(zip((i.name for i in s.get_inputs()), (a.numpy() for a in x))))[0]
    play = load(export_policy(agent, f"fixed{suffix}", 4, seed=3))
    ours = [agent.policy("best", 4, seed=3)(x[None].numpy())[0] for x in obs]   # the first draw for one state
    for rows in (1, 2, 7): np.testing.assert_allclose(play(obs[:rows]), ours[:rows], atol=1e-5)
    print("fixed")
    play, stream = load(export_policy(agent, f"input{suffix}", 1, noise="input")), torch.Generator().manual_seed(5)
    noise = torch.stack([torch.randn(7, 1, 2, generator=stream) for _ in range(3)])
    np.testing.assert_allclose(play(obs, noise), agent.policy("sample", seed=5)(obs.numpy()), atol=1e-5)
    print("input")
"""


def test_exported_weights_are_those_that_act(through, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    file = export_policy(through.dir, tmp_path / "deep" / "policy.safetensors", num_actions=2)
    tensors = safetensors.load_file(file)
    for name, x in through.agent.actor.target.state_dict().items(): assert torch.equal(tensors[f"net.{name}"], x)
    for name, x in through.agent.q.target.state_dict().items(): assert torch.equal(tensors[f"q.{name}"], x)
    with pytest.importorskip("safetensors").safe_open(file, "pt") as f: assert f.metadata()["num_steps"] == "2"


def test_exports_that_are_refused(through, tmp_path, monkeypatch):
    for name in ("onnx", "safetensors.torch"): monkeypatch.setitem(sys.modules, name, None)
    for path, message in (("a.pkl", "ends in .pt2, .onnx, .safetensors, not a.pkl"),
                          ("a.onnx", r"the package onnx is not installed; it comes with the extra: bdpo_lit\[export\]"),
                          ("a.safetensors", "the package safetensors is not installed")):
        with pytest.raises(RunError, match=message): export_policy(through, tmp_path / path)
    with pytest.raises(RunError, match="noise is 'fixed' or 'input'"): export_policy(through, "a.pt2", noise="some")
    with pytest.raises(RunError, match="is no run|no checkpoint"): export_policy(tmp_path / "none", tmp_path / "a.pt2")


# Curves elsewhere

def test_a_tracker_that_is_missing_is_named_before_anything_is_made(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(RunError, match=f"log is '{name}', but the package {name} cannot be.*install {name}"):
            start(tmp_path / "run", log=name)
    assert not (tmp_path / "run").exists()


def test_trackio_has_the_curves(through, tmp_path, monkeypatch):
    "The real package, on this machine only."
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    finish(tmp_path / "run", log="trackio", train_steps=20)
    finish(tmp_path / "run", log="trackio")                  # taken up again: the same run of trackio
    assert (tmp_path / "run" / "metrics.csv").read_text() == (through.dir / "metrics.csv").read_text()
    assert trackio.__version__
    db, = (tmp_path / "trackio").glob("bdpo_lit*.db")
    with closing(sqlite3.connect(db)) as c: rows = c.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {f"run-{read_config(tmp_path / 'run')['about']['run_id']}"}
    assert sorted(step for _, step, text in rows if "q/mean" in str(text)) == [33 + k for k in (10, 20, 30, 40)]


# The command line

def test_command_line_says_what_there_is(run, capsys):
    with pytest.raises(SystemExit) as e: command_line.main(["demo", "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and all(word in said for word in ("--preset {short,long}", "--seed", "--run-dir"))
    done = run("bdpo", "demo", "--preset", "fast", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stdout + done.stderr for word in ("--preset", "'fast'", "'short'", "'long'"))


def test_ctrl_c_after_training_ends_politely(tmp_path, monkeypatch, capsys):
    plan = replace(PLAN, pretrain_steps=1, train_steps=1, eval_episodes=1, save_every=1)
    preset = maze_demo.Preset(plan, TINY)
    monkeypatch.setitem(maze_demo.PRESETS, "short", preset)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(maze_demo, "contest", lambda *args, **kwargs: signal.raise_signal(INT))
    assert maze_demo.demo(run_dir=tmp_path / "run", num_steps=100, dataset_id="test/ctrl-c-v0") == {}
    assert "Training is finished and kept in" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["steps"] == dict(pretrain=1, train=1)


@pytest.mark.parametrize("error", [RunError, DataError])
def test_command_line_errors_are_one_line(error, monkeypatch):
    def fail(*args, **kwargs): raise error("runs/x already holds a run")
    monkeypatch.setattr(maze_demo, "demo", fail)
    with pytest.raises(SystemExit, match="^bdpo: runs/x already holds a run$"): command_line.main(["demo"])
