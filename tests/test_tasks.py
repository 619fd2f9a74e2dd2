"""Presets against the paper's tables, field by field and in both directions; environments by name."""
import csv
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.algorithm.networks import mish
from bdpo_lit.offline.data import D4RL_TASKS, Transitions, reference_scores
from bdpo_lit.offline.evaluation import evaluate
from bdpo_lit.offline.tasks import TASKS, AntMaze, d4rl_task, env_maker, judge_run
from bdpo_lit.offline.training import RunError, TrainConfig, Training
from bdpo_lit.reference.command_line import EMBEDDED, find_task
from bdpo_lit.theory.diffusion import vp_schedule

PAPER = Path(__file__).parent / "paper"


def table(name):
    with open(PAPER / name) as f: return list(csv.DictReader(f))


COMMON = {row["name"]: row for row in table("table3_common.csv")}
FAMILIES = {row["family"]: row for row in table("table4_per_task.csv") if row["family"] != "toy2d"}


def number(cell): return float(re.match(r"[\d.e-]+", cell)[0])


def widths(cell): return (int(cell.split("x")[0]),) * int(cell.split("x")[1])


def rate(lr, decay): return f"{lr:g}", decay is not None


def said_rate(cell): return f"{number(cell):g}", True  # the official code decays actor and critics everywhere


CHECKS = {  # row of Table 3: (what it says of a task, what the preset has)
    "diffusion hidden layers": lambda s, name, t, a: (widths(s), a.actor_hidden),
    "time embedding": lambda s, name, t, a: (number(s), a.time_dim),
    "solver": lambda s, name, t, a: (s.lower(), a.solver),
    "diffusion steps N": lambda s, name, t, a: (number(s), a.num_steps),
    "behaviour lr": lambda s, name, t, a: (number(s), a.behavior_lr),
    "actor lr": lambda s, name, t, a: (said_rate(s), rate(a.actor_lr, a.actor_decay_steps)),
    "actor gradient clip": lambda s, name, t, a: (number(s), a.clip_grad_norm),
    "actor EMA": lambda s, name, t, a: ([number(s), int(s.split()[-2])], [a.ema, a.actor_every]),
    "actor update every": lambda s, name, t, a: (number(s), a.actor_every),
    "value hidden layers": lambda s, name, t, a: (widths(s), a.critic_hidden),
    "value lr": lambda s, name, t, a: (said_rate(s), rate(a.critic_lr, a.critic_decay_steps)),
    "value ensemble K": lambda s, name, t, a: (exception(s, name), a.num_critics),
    "value EMA": lambda s, name, t, a: (number(s), a.ema),
    "samples per target": lambda s, name, t, a: (number(s), a.num_samples),
    "discount": lambda s, name, t, a: (number(s), a.gamma),
    "batch size": lambda s, name, t, a: (number(s), t.batch_size),
    "pretrain steps": lambda s, name, t, a: (number(s), t.pretrain_steps),
    "train steps": lambda s, name, t, a: (number(s), t.train_steps),
    "critic warm-up steps": lambda s, name, t, a: (number(s), a.warmup_steps),
    "sample clip": lambda s, name, t, a: (s, f"[{-a.clip:g},{a.clip:g}]"),
    "evaluation episodes": lambda s, name, t, a: (number(s), t.eval_episodes),
    "actions per decision": lambda s, name, t, a: (exception(s, name), 1 if t.how == "sample" else t.num_actions),
}
OF_EVERY_AGENT = {"activation", "noise schedule", "optimizer"}  # not settings; see the test below
NOT_IN_THE_TABLES = dict(  # official code, or ours alone
    q_layer_norm=lambda name: name.startswith("antmaze"), v_layer_norm=lambda name: True,
    actor_decay_steps=lambda name: 2_000_000, critic_decay_steps=lambda name: 2_000_000,
    normalize_obs=lambda name: False, how=lambda name: "sample" if name == "antmaze-umaze-diverse-v0" else "best")
# no result depends on them, or not where eta is a number
OURS = {"seed", "device", "compile", "log", "log_every", "eval_every", "save_every", "nats_per_dim"}


def exception(cell, name):
    "The number in brackets if the cell makes an exception for this task: 10 (20 for hopper-medium-v2)."
    found = re.search(r"\((\d+) for ([\w-]+)\)", cell)
    return float(found[1]) if found and found[2] in name else number(cell)


def mismatches(name, task):
    family = "antmaze" if name.startswith("antmaze") else "locomotion"
    t, a = task.train, task.algorithm
    pairs = {row: check(COMMON[row][family], name, t, a) for row, check in CHECKS.items()}
    own, = (row for f, row in FAMILIES.items() if name.startswith(f))
    pairs |= {k: (float(own[k]), getattr(a, k)) for k in ("eta", "rho")}
    pairs["max_q"] = own["max_q_backup"] == "true", a.max_q
    settings = asdict(t) | asdict(a)
    pairs |= {k: (of(name), settings[k]) for k, of in NOT_IN_THE_TABLES.items()}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}


def test_every_row_of_the_tables_is_used():
    assert set(COMMON) == set(CHECKS) | OF_EVERY_AGENT
    assert set(TASKS) == {row["task"] for row in table("table1_d4rl.csv")} and len(TASKS) == 15
    for f in FAMILIES: assert any(name.startswith(f) for name in TASKS), f
    assert set(FAMILIES) == {f for f in FAMILIES for name in TASKS if name.startswith(f)}


@pytest.mark.parametrize("name", TASKS)
def test_preset_is_what_the_tables_say(name): assert not mismatches(name, TASKS[name])


@pytest.mark.parametrize("name", TASKS)
def test_any_other_setting_would_be_noticed(name):
    task = TASKS[name]
    for part in ("train", "algorithm"):
        config = getattr(task, part)
        for f in (f.name for f in fields(config) if f.name not in OURS):
            x = getattr(config, f)
            other = not x if isinstance(x, bool) else dict(how="softmax", solver="ddim").get(f) or \
                ((7,) if isinstance(x, tuple) else None if "decay" in f else x / 2 if isinstance(x, float) else x + 2)
            changed = replace(task, **{part: replace(config, **{f: other})})
            if (f, task.train.how) == ("num_actions", "sample"): continue  # one sample has no candidates
            assert mismatches(name, changed), f"{f}: {x} or {other}, the tables do not say"


def test_what_every_agent_has():
    agent = BDPO(3, 2, BDPOConfig())
    assert isinstance(agent.q.optimizer, torch.optim.Adam)                                       # optimizer
    assert torch.equal(agent.sched.beta, vp_schedule(5).beta)                                    # noise schedule
    x = torch.linspace(-3, 3, 50)
    assert torch.allclose(mish(x), torch.nn.functional.mish(x), atol=1e-6)                       # activation


@pytest.mark.parametrize("name", TASKS)
def test_data_scores_and_environment_of_a_task(name):
    task = TASKS[name]
    assert task.data in D4RL_TASKS and len(reference_scores(task.data)) == 2
    assert task.reward == ("antmaze" if name.startswith("antmaze") else "locomotion")
    assert task.env == D4RL_TASKS[name].env_id or name.startswith("antmaze"), "the same with and without a preset"
    env = (build := env_maker(task.env))()
    assert build.spec.id == env.spec.id
    sizes = dict(halfcheetah=(17, 6), hopper=(11, 3), walker2d=(17, 6), antmaze=(29, 8))[name.split("-")[0]]
    assert (env.observation_space.shape[0], env.action_space.shape[0]) == sizes
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == (700 if "umaze" in name else 1000)
    env.close()


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks(name):
    task = find_task(name)
    env_maker(task.env)().close()
    assert isinstance(task.train, TrainConfig) and task.data.startswith("bdpo/")


@pytest.mark.parametrize("name, hint", [("hopper-medium-v3", "hopper-medium-v2"), ("maaze", "maze"), ("x", "walker2d")])
def test_unknown_tasks(name, hint):
    with pytest.raises(RunError, match=f"no task '{name}'.*{hint}"): find_task(name)
    with pytest.raises(RunError, match="no task"): d4rl_task(name)


# The ant's maze

def cell(xy): return int(np.floor(xy[1] / 4 + 0.5)) + 1, int(np.floor(xy[0] / 4 + 0.5)) + 1


@pytest.mark.parametrize("size, goal", [("umaze", (0, 8)), ("medium", (20, 20)), ("large", (32, 24))])
def test_goals_lie_where_the_data_had_them(size, goal):
    env = AntMaze(size)
    drawn = []
    for k in range(100):
        obs, _ = env.reset(seed=k)
        drawn.append(env.goal - goal)
        assert cell(obs[:2]) == (1, 1) and env.walls[1][1] == 0
    assert np.min(drawn) >= 0 and 1.2 < np.max(drawn) < 1.5
    i, j = cell(np.array(goal) + 0.1)
    assert env.walls[i][j] == 0
    first = env.goal
    again, _ = env.reset(seed=99)
    assert np.array_equal(env.goal, first) and np.array_equal(obs, again), "same seed, same episode"
    env.ant.reset(seed=99)
    assert not np.array_equal(obs[:2], env.ant.data.qpos[:2]), "start and goal have random numbers of their own"
    assert not np.array_equal(obs, env.reset()[0])
    env.close()


def test_the_ant_has_the_strength_and_the_clock_of_the_data():
    env = AntMaze()
    model = env.ant.model
    assert model.opt.timestep == 0.02 and env.ant.dt == pytest.approx(0.1)
    assert (model.actuator_gear[:, 0] == 30).all() and (model.actuator_ctrlrange == [-1, 1]).all()
    torso = model.geom("torso_geom")
    assert torso.solref == pytest.approx([0.02, 1]) and torso.solimp[:3] == pytest.approx([0.8, 0.8, 0.01])
    obs, _ = env.reset(seed=0)
    assert np.array_equal(obs, np.r_[env.ant.data.qpos, env.ant.data.qvel])
    for i, row in enumerate(env.walls):
        for j, wall in enumerate(row):
            if wall: assert cell(model.geom(f"block_{i}_{j}").pos) == (i, j)
    env.close()


def test_an_episode_in_the_maze_ends_at_the_goal_or_at_the_limit():
    env = gym.make("bdpo/AntMaze-umaze-v0")
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(700)]
    assert ends == [(False, False)] * 699 + [(False, True)]
    env.close()
    still = evaluate(lambda obs: np.zeros((len(obs), 8)), env_maker("bdpo/AntMaze-umaze-v0"), 2)
    assert still.returns.tolist() == [0, 0] and still.success.tolist() == [0, 0] and still.lengths.tolist() == [700] * 2
    env = AntMaze()
    env.reset(seed=0)
    for distance, there in ((0.8, False), (0.2, True)):
        env.ant.set_state(np.r_[env.goal + [distance, 0], env.ant.data.qpos[2:]], 0 * env.ant.data.qvel)
        assert env.step(np.zeros(8))[1:] == (float(there), there, False, {"success": there})
    env.close()


# Names of environments

HOPPER = gym.spec("Hopper-v5").to_json()


@pytest.mark.parametrize("env, message", [
    ("Hopper-v99", "no environment 'Hopper-v99'"), ("nowhere:Hopper-v4", "no environment 'nowhere:Hopper-v4'"),
    ("{", "not the specification"), ('{"id": 3}', "not the specification"),
    (HOPPER.replace("gymnasium.envs.mujoco.hopper_v5:HopperEnv", "os:abort"), "not registered here"),
    (HOPPER.replace('"Hopper-v5"', '"Mine-v0"'), "'Mine-v0' is not registered here"),
])
def test_environments_that_cannot_be(env, message):
    with pytest.raises(RunError, match=message): env_maker(env)


def test_what_a_file_may_name(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    data = pendulum()
    data.meta["env_id"] = "stranger:Pendulum-v1"                # as a data set may have it
    list(Training(data, PLAN, TINY, None, run).run())
    with pytest.raises(RunError, match="name it yourself: --env stranger:Pendulum-v1"): judge_run(run, 1)
    with pytest.raises(SystemExit, match="imported"): judge_run(run, 1, env="stranger:Pendulum-v1")
    for env in ("Pendulum-v1", "bdpo_lit.offline.maze:bdpo/PointMazeUMazeHidden-v0", HOPPER):
        env_maker(env, from_file=True)


def test_a_module_that_a_run_names_is_imported_only_when_it_is_typed(tmp_path, monkeypatch):
    pendulum_env = "gymnasium.envs.classic_control:PendulumEnv"
    (tmp_path / "mine.py").write_text("from gymnasium import register\n"
                                      f"register('Mine-v0', {pendulum_env!r}, max_episode_steps=5)")
    monkeypatch.chdir(tmp_path)                                    # a module in the working folder
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    run, make = tmp_path / "run", env_maker("mine:Mine-v0")
    t = Training(pendulum(), PLAN, TINY, make, run, about=dict(env="mine:Mine-v0"))
    list(t.run())
    assert {e["env"] for e in t.evaluations} == {"Mine-v0"}
    Training(pendulum(), PLAN, TINY, None, run, resume=True, about=dict(env=None))     # whoever resumes need not say it
    del gym.registry["Mine-v0"], sys.modules["mine"]
    with pytest.raises(RunError, match="whose use would import mine"): judge_run(run, 1)
    assert "mine" not in sys.modules
    assert judge_run(run, 1, env="mine:Mine-v0")["env_id"] == "Mine-v0"


def test_specifications_with_known_wrappers():
    env = gym.wrappers.ClipReward(gym.make("Pendulum-v1", g=5.0), -0.5, 0.5)
    again = env_maker(env.spec.to_json())()
    again.reset(seed=0)
    assert again.step([0.0])[1] == -0.5 and again.unwrapped.g == 5.0
    strange = env.spec.to_json().replace("gymnasium.wrappers", "mine.wrappers")
    with pytest.raises(RunError, match="wrapped in what we do not know"): env_maker(strange)


# The judge

TINY = BDPOConfig(num_steps=2, num_critics=2, num_samples=2, actor_hidden=(8,), critic_hidden=(8,), time_dim=4,
                  warmup_steps=0)
PLAN = TrainConfig(pretrain_steps=2, train_steps=40, batch_size=8, device="cpu", eval_every=10, eval_episodes=1,
                   num_actions=2, log_every=10)


def pendulum():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    meta = dict(id="pendulum", ref_min_score=-2000.0, ref_max_score=0.0, action_low=np.array([-2.0]),
                action_high=np.array([2.0]))
    return Transitions(draw(50, 3), draw(50, 1).clamp(-1.9, 1.9), draw(50), draw(50, 3), torch.zeros(50),
                       torch.zeros(50, dtype=torch.int64), meta)


def test_judge_plays_last_and_best_as_they_are(tmp_path):
    short = gym.make("Pendulum-v1", max_episode_steps=20).spec.to_json()
    make = env_maker(short)
    t = Training(pendulum(), PLAN, TINY, make, tmp_path, about=dict(env=short))
    list(t.run())
    result = judge_run(tmp_path, episodes=3, seed=5)
    best = max(t.evaluations, key=lambda e: e["return"])
    assert (result["last"]["step"], result["best"]["step"]) == (40, best["step"])
    played = evaluate(t.agent.policy("best", 2, seed=5), make, 3, seed=5)
    assert result["last"]["returns"] == played.returns.tolist()
    assert result["last"]["return"]["mean"] == pytest.approx(played.returns.mean())
    assert result["last"]["score"]["mean"] == pytest.approx(100 * (played.returns.mean() + 2000) / 2000)
    assert "success" not in result["last"] and (result["how"], result["num_actions"]) == ("best", 2)
    assert result["last"]["return"]["low"] <= result["last"]["return"]["mean"] <= result["last"]["return"]["high"]
    assert judge_run(tmp_path, 3, 6)["last"] != result["last"]
    sampled = judge_run(tmp_path, 3, 5, how="sample", num_actions=7)
    assert (sampled["how"], sampled["num_actions"]) == ("sample", 1) and sampled["last"] != result["last"]


def test_any_checkpoint_and_either_policy_can_be_judged(tmp_path):
    make = env_maker(gym.make("Pendulum-v1", max_episode_steps=20).spec.to_json())
    t = Training(pendulum(), PLAN, TINY, make, tmp_path / "run")
    list(t.run())
    last = judge_run(tmp_path / "run", 2, env="Pendulum-v1")["last"]
    assert judge_run(tmp_path / "run" / "last.pt", 2, env="Pendulum-v1")["last"] == last
    away = tmp_path / "away.pt"                                     # all by itself, without a config.json
    (tmp_path / "run" / "last.pt").rename(away)
    with pytest.raises(RunError, match="does not say where"): judge_run(away)
    assert judge_run(away, 2, env="Pendulum-v1", num_actions=2)["away"]["returns"] == last["returns"]
    nu = judge_run(away, 2, env="Pendulum-v1", learner="behavior")
    assert (nu["how"], nu["num_actions"], nu["policies"]) == ("sample", 1, ["away"])
    played = evaluate(t.agent.policy("sample", learner="behavior", seed=1000), env_maker("Pendulum-v1"), 2, seed=1000)
    assert nu["away"]["returns"] == played.returns.tolist()
    assert judge_run(away, 2, how="best", env="Pendulum-v1", learner="behavior")["num_actions"] == 10
    with pytest.raises(ValueError, match="num_actions must be at least 1, got 0"):
        judge_run(away, env="Pendulum-v1", num_actions=0)


def test_another_environment_has_to_fit_in_size_and_in_bounds(tmp_path):
    list(Training(pendulum(), PLAN, TINY, None, tmp_path).run())
    narrow = lambda **kwargs: gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1, 1)  # noqa: E731
    gym.register("Narrow-v0", narrow, max_episode_steps=5)
    try:
        with pytest.raises(RunError, match="Narrow-v0 takes actions between .*-1.* act between .*-2"):
            judge_run(tmp_path, env="Narrow-v0")
    finally: del gym.registry["Narrow-v0"]


def test_judge_without_a_best_or_without_a_place(tmp_path):
    list(Training(pendulum(), PLAN, TINY, None, tmp_path).run())
    assert judge_run(tmp_path, 1, env="Pendulum-v1")["best"] is None
    with pytest.raises(RunError, match="does not say where its policies play"): judge_run(tmp_path)
    with pytest.raises(RunError, match="Hopper-v4 has observations of length 11 .* 3 and"):
        judge_run(tmp_path, env="Hopper-v4")
