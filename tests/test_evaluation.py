"""Playing policies: independence of batching, exact bookkeeping, scores and intervals."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from PIL import Image

import bdpo_lit.offline.evaluation as evaluation
from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.offline.data import D4RL_REFERENCES, Transitions, episode_returns, load_minari, reference_scores
from bdpo_lit.offline.evaluation import (
    CannotDraw,
    EnvError,
    aggregate,
    bootstrap_interval,
    episode_seeds,
    evaluate,
    fit_gaussian,
    iqm,
    normalized_score,
    record_video,
    score_table,
    t_interval,
    vectorize,
)
from bdpo_lit.offline.maze import WaypointController, make_maze_env, play, random_policy


class Walk(gym.Env):
    """Random length, random observations, and a reward that depends on the action: catches every mix-up of episodes."""

    action_space = gym.spaces.Box(-1, 1, (1,))
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, report=True, endless=False, fault=None):
        self.report, self.endless, self.fault = report, endless, fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=2).astype(np.float32), 0
        self.length = int(self.np_random.integers(1, 15))
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x = self.x + self.np_random.normal(size=2).astype(np.float32)
        end = self.t >= self.length and not self.endless
        info = {"success": self.t == 3} if self.report else {}
        if self.fault == "raises": raise ZeroDivisionError("the simulator\nis broken")
        if self.fault == "exits": raise SystemExit(3)
        if self.fault == "old": return self.x.copy(), 0.0, end, {}
        shown = {"nan obs": np.full(2, np.nan, np.float32), "no obs": None, "words": np.array(["a", "b"]),
                 "column": self.x[:, None], "uneven": [1, [2]]}
        obs = shown.get(self.fault, self.x.copy())
        paid = {None: float(action[0] + self.x[1]), "nan": np.nan, "inf": np.inf, "none": None, "pair": np.ones(2),
                "one": np.array([action[0] + self.x[1]], np.float32), "text": "much"}
        reward = paid.get(self.fault, 0.0)
        if self.fault == "tells words": info = {"success": "yes"}
        return obs, reward, end and self.t % 2 == 0, end and self.t % 2 == 1, info

    def close(self):
        if self.fault == "close": raise OSError("it will not close")


def policy(obs):
    return np.tanh(obs[:, :1])


def alone(seed):
    env = Walk()
    obs, _ = env.reset(seed=seed)
    path, total, success, done = [obs], 0.0, False, False
    while not done:
        obs, reward, terminated, truncated, info = env.step(policy(obs[None])[0])
        path.append(obs)
        total, success, done = total + reward, success or info["success"], terminated or truncated
    return total, len(path) - 1, float(success), np.array(path)


@pytest.mark.parametrize("num_envs", [1, 2, 5, 40, None])
def test_results_do_not_depend_on_batching(num_envs):
    result = evaluate(policy, Walk, episodes=40, seed=3, num_envs=num_envs, trajectories=True)
    expected = [alone(s) for s in episode_seeds(3, 40)]
    np.testing.assert_allclose(result.returns, [e[0] for e in expected], rtol=1e-12)
    np.testing.assert_array_equal(result.lengths, [e[1] for e in expected])
    np.testing.assert_array_equal(result.success, [e[2] for e in expected])
    for got, e in zip(result.trajectories, expected, strict=True):
        np.testing.assert_array_equal(got, e[3])


def test_maze_one_environment_or_many():
    one = evaluate(WaypointController(), make_maze_env, episodes=5, seed=1, num_envs=1)
    many = evaluate(WaypointController(), make_maze_env, episodes=5, seed=1, num_envs=3)
    plain = [play(WaypointController(), make_maze_env(), s)[1] for s in episode_seeds(1, 5)]
    assert one.returns.tolist() == many.returns.tolist() == plain
    assert one.success_rate == 1.0 and (one.lengths == 300).all()


def test_prebuilt_environments_are_reused_and_left_open():
    envs = vectorize(Walk, 7)
    first, second = (evaluate(policy, envs, episodes=12, seed=2) for _ in range(2))
    fewer = evaluate(policy, envs, episodes=3, seed=2)
    assert first.returns.tolist() == second.returns.tolist() == evaluate(policy, Walk, 12, 2).returns.tolist()
    assert fewer.returns.tolist() == first.returns[:3].tolist()


@pytest.mark.parametrize("mode", [m for m in gym.vector.AutoresetMode if m != gym.vector.AutoresetMode.DISABLED])
def test_environments_that_reset_themselves_are_refused(mode):
    with pytest.raises(ValueError, match=f"{mode}; build them with `vectorize`"):
        evaluate(policy, gym.vector.SyncVectorEnv([Walk] * 2, autoreset_mode=mode), episodes=2)


def test_seeds_matter_and_do_not_overlap():
    assert evaluate(policy, Walk, 5, seed=0).returns.tolist() != evaluate(policy, Walk, 5, seed=1).returns.tolist()
    assert not set(episode_seeds(0, 500)) & set(episode_seeds(1, 500))
    assert len(set(episode_seeds(0, 500))) == 500


def test_environments_that_do_not_report_success():
    result = evaluate(policy, lambda: Walk(report=False), episodes=3)
    assert result.success is None and np.isnan(result.success_rate) and result.trajectories is None and len(result) == 3


def test_dict_observations_reach_the_policy_as_in_the_data():
    class Parts(Walk):
        observation_space = gym.spaces.Dict(z=Walk.observation_space, a=gym.spaces.Box(-9, 9, (1,)))

        def reset(self, **kw):
            obs, info = super().reset(**kw)
            return {"z": obs, "a": np.full(1, 7, np.float32)}, info

        def step(self, action):
            obs, *rest = super().step(action)
            return {"z": obs, "a": np.full(1, 7, np.float32)}, *rest

    def check(obs):
        assert obs.shape[1] == 3 and obs.dtype == np.float32 and (obs[:, 0] == 7).all()
        return policy(obs[:, 1:])

    result = evaluate(check, Parts, 6, seed=4, trajectories=True)
    np.testing.assert_allclose(result.returns, evaluate(policy, Walk, 6, seed=4).returns)
    assert result.trajectories[0].shape[1] == 3


def test_actions_are_clipped_to_their_bounds():
    wild = evaluate(lambda o: np.full((len(o), 1), 50.0), Walk, 4)
    tame = evaluate(lambda o: np.full((len(o), 1), 1.0), Walk, 4)
    assert wild.returns.tolist() == tame.returns.tolist()


@pytest.mark.parametrize("bad, message", [
    (lambda o: np.full((len(o), 1), np.inf), "NaN or infinite"),
    (lambda o: np.zeros(len(o)), "expected"),
    (lambda o: np.zeros((len(o), 2)), "expected"),
])
def test_bad_actions(bad, message):
    with pytest.raises(ValueError, match=message):
        evaluate(bad, Walk, 2)


def test_unsupported_settings(monkeypatch):
    class Buttons(Walk):
        action_space = gym.spaces.Discrete(2)

    with pytest.raises(ValueError, match="only Box"):
        evaluate(policy, Buttons, 2)
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(policy, Walk, 0)
    monkeypatch.setattr(evaluation, "MAX_STEPS", 50)
    with pytest.raises(ValueError, match="time limit"):
        evaluate(policy, lambda: Walk(endless=True), 2)


@pytest.mark.parametrize("fault, message", [
    ("raises", "failed in step with ZeroDivisionError: the simulator"),
    ("exits", "failed in step with SystemExit: 3"),
    ("old", r"failed in step with ValueError: not enough values .* got 4.; Gymnasium's reset returns 2 .*, and step 5"),
    ("pair", r"paid a reward of shape \(2,\)"),
    ("text", "failed in step with ValueError: could not convert string to float: 'much'"),
    ("nan obs", "returned an observation with NaN or infinite numbers"),
    ("no obs", r"showed an observation of shape \(\) \(object\); its space is Box\(.*"),
    ("words", r"showed an observation of shape \(2,\) \(<U1\); its space is Box\(.*"),
    ("column", r"showed an observation of shape \(2, 1\) \(float32\); its space is Box\(.*"),
    ("uneven", r"showed an observation of shape uneven \(list\); its space is Box\(.*"),
    ("tells words", "failed in its report of success with ValueError: could not convert string to float: .*"),
])
def test_environments_that_fail_are_named_in_one_line(fault, message):
    where = "" if fault == "tells words" else r" \(episode 1, step 1\)"
    with pytest.raises(EnvError, match=f"^the environment Walk {message}{where}$") as e:
        evaluate(policy, lambda: Walk(fault=fault), 2)
    assert "\n" not in str(e.value)


def test_a_fault_is_found_in_its_episode_and_step():
    class Late(Walk):
        def step(self, action):
            if self.length == 9 and self.t == 3: raise KeyError("late")
            return super().step(action)

        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            return (obs[0] if self.length == 5 else obs), info

    for cls, length, where in ((Late, 9, "step 4"), (Late, 5, "at its start")):
        seed = next(s for s in range(99) if (x := [len(alone(k)[3]) - 1 for k in episode_seeds(s, 9)])
                    and length in x[3:] and {5, 9} & set(x) == {length})
        first = [len(alone(k)[3]) - 1 for k in episode_seeds(seed, 9)].index(length)
        for width in (1, 3):
            with pytest.raises(EnvError, match=rf"\(episode {first + 1}, {where}\)$"):
                evaluate(policy, cls, 9, seed=seed, num_envs=width)


def test_an_environment_that_cannot_be_built_or_closed():
    def broken(): raise FileNotFoundError("no\nmodel")

    with pytest.raises(EnvError, match=r"^the environment cannot be built \(FileNotFoundError: no\)$"):
        evaluate(policy, broken, 2)
    with pytest.warns(UserWarning, match="Walk failed in close with OSError: it will not close; its episodes count"):
        played = evaluate(policy, lambda: Walk(fault="close"), 3)
    assert len(played) == 3 and played.fault is None


def test_a_reward_in_an_array_of_one_is_a_number():
    assert evaluate(policy, lambda: Walk(fault="one"), 3).returns == pytest.approx(evaluate(policy, Walk, 3).returns)


def test_success_may_be_reported_at_the_end_only():
    class Quiet(Walk):
        def step(self, action):
            *made, _ = super().step(action)
            return *made, ({"is_success": np.bool_(self.length > 7)} if made[2] or made[3] else {})

    lengths = [len(alone(s)[3]) - 1 for s in episode_seeds(0, 12)]
    assert evaluate(policy, Quiet, 12, num_envs=5).success.tolist() == [float(n > 7) for n in lengths]


@pytest.mark.parametrize("fault", ["nan", "inf", "none"])
def test_a_reward_that_is_no_number_makes_the_return_nan(fault):
    played = evaluate(policy, lambda: Walk(fault=fault), 3)
    assert np.isnan(played.returns).all()
    assert played.fault == f"the environment Walk paid {'inf' if fault == 'inf' else 'nan'} (episode 1, step 1)"


def test_an_environment_with_its_own_limit_may_take_longer(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_STEPS", 50)
    gym.register("test/Long-v0", lambda: Walk(endless=True), max_episode_steps=80)
    assert (evaluate(policy, lambda: gym.make("test/Long-v0", disable_env_checker=True), 2).lengths == 80).all()
    with pytest.raises(EnvError, match="an episode in Walk passed 50 steps; the environment needs a time limit"):
        evaluate(policy, lambda: Walk(endless=True), 2)


def test_gaussian_clone_of_a_known_rule():
    g = torch.Generator().manual_seed(0)
    obs = torch.rand(2000, 2, generator=g)
    action = (obs[:, :1] - 0.5 + 0.1 * torch.randn(2000, 1, generator=g)).clamp(-1, 1)
    zeros = torch.zeros(2000)
    data = Transitions(obs, action, zeros, obs, zeros, torch.arange(2000))
    play = fit_gaussian(data, steps=800, hidden=(32,))
    drawn = play(np.tile(np.float32([[0.9, 0.5]]), (4000, 1)))
    assert drawn.mean() == pytest.approx(0.4, abs=0.05) and drawn.std() == pytest.approx(0.1, rel=0.4)
    assert play.num_actions == 1 and np.abs(drawn).max() <= 1


def test_t_interval_is_students():
    x = [1.0, 2.0, 4.0]
    half = 4.302653 * np.std(x, ddof=1) / 3**0.5           # of the tables, two degrees of freedom
    np.testing.assert_allclose(t_interval(x), (np.mean(x) - half, np.mean(x) + half), rtol=1e-6)
    assert np.isnan(t_interval([1.0])).all()


def test_environments_are_closed_when_the_policy_fails(monkeypatch):
    closed = []
    monkeypatch.setattr(Walk, "close", lambda self: closed.append(1))

    def broken(obs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        evaluate(broken, Walk, 4)
    assert len(closed) == 4


@pytest.mark.parametrize("task", D4RL_REFERENCES)
def test_reference_scores_span_the_scale(task):
    low, high = reference_scores(task)
    np.testing.assert_allclose(normalized_score([low, high], low, high), [0, 100])


@pytest.mark.parametrize("name, task", [
    ("hopper-medium-v2", "hopper"), ("halfcheetah-medium-expert-v2", "halfcheetah"), ("antmaze-umaze-v0", "antmaze"),
    ("maze2d-umaze-v1", "maze2d-umaze"), ("pen-human-v1", "pen"), ("kitchen-partial-v0", "kitchen"),
])
def test_reference_scores_by_task_name(name, task):
    assert reference_scores(name) == D4RL_REFERENCES[task]


@pytest.mark.parametrize("name", ["hoper-medium-v2", "maze2d-umaze-dense-v1", "pendulum", "ant-medium-v2", ""])
def test_unknown_tasks_are_refused(name):
    with pytest.raises(ValueError, match="Known tasks: hopper"):
        reference_scores(name)


def test_normalized_score_refuses_an_empty_scale():
    with pytest.raises(ValueError, match="below"):
        normalized_score(1.0, 2.0, 2.0)


def test_iqm_is_the_mean_of_the_middle_half():
    x = np.random.default_rng(0).normal(size=(3, 40))
    np.testing.assert_allclose(iqm(x), np.sort(x, 1)[:, 10:30].mean(1))
    assert iqm([5.0]) == 5.0


def test_bootstrap_interval():
    x = np.random.default_rng(1).normal(10, 2, 400)
    lo, hi = bootstrap_interval(x)
    assert (hi - lo) == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1) and lo < x.mean() < hi
    assert bootstrap_interval(x) == bootstrap_interval(x) != bootstrap_interval(x, seed=1)
    narrow = bootstrap_interval(x, level=0.5)
    assert lo < narrow[0] < narrow[1] < hi
    lo, hi = bootstrap_interval(x, statistic=iqm)
    assert lo < iqm(x) < hi


def test_the_interval_of_equal_results_is_their_statistic():
    "To the bit: 15.8396... five times has a trimmed mean that differs in the last digit."
    x = [15.839607754861294] * 5
    assert bootstrap_interval(x, statistic=iqm) == (float(iqm(x)),) * 2


def test_bootstrap_of_degenerate_input():
    assert bootstrap_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    assert np.isnan(bootstrap_interval([2.0])).all()
    for bad in ([], [1.0, np.nan], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="finite"):
            bootstrap_interval(bad)


def test_table():
    silent = evaluate(policy, lambda: Walk(report=False), 3)
    results = {"random": evaluate(random_policy(), make_maze_env, 2), "walk": silent}
    lines = score_table(results, 0.0, 180.0).splitlines()
    assert len(lines) == 4 and all(line.count("|") == 9 for line in lines)
    assert "95% interval" in lines[0] and lines[2].startswith("| random | 0.0 | 0.0 to 0.0") and "–" in lines[3]
    assert "| seed | actions per decision |" in lines[0] and lines[2].endswith("| 2 | 0 | – |")


def test_evaluations_say_how_they_were_made():
    chosen = lambda obs: policy(obs)                                     # noqa: E731
    chosen.num_actions = 10
    result = evaluate(chosen, Walk, episodes=2, seed=7)
    assert (result.seed, result.num_actions) == (7, 10) and evaluate(policy, Walk, 2).num_actions is None
    assert score_table({"best of ten": result}, 0.0, 1.0).splitlines()[2].endswith("| 2 | 7 | 10 |")
    agent = BDPO(2, 1, BDPOConfig(num_critics=1, actor_hidden=(8,), critic_hidden=(8,), time_dim=4))
    for how, number in (("best", 6), ("softmax", 6), ("sample", 1)):
        assert evaluate(agent.policy(how, 6), Walk, episodes=1).num_actions == number


def test_intervals_agree_with_rliable():
    """rliable 1.2.0 (arch 7.2.0, numpy 2.4.6, pandas 2.3.3), get_interval_estimates with 20000 repetitions on these
    scores of five seeds and nine tasks gave: mean 73.4589 in [70.1843, 76.6488], IQM 72.5157 in [68.9910, 75.9739]."""
    rng = np.random.default_rng(0)
    scores = rng.normal(60, 15, (5, 9)) + rng.normal(0, 20, 9)
    tasks = {f"task {k}": column for k, column in enumerate(scores.T)}
    for statistic, value, lo, hi in ((np.mean, 73.45885935, 70.1843, 76.6488), (iqm, 72.51568703, 68.9910, 75.9739)):
        found = aggregate(tasks, statistic, resamples=20_000)
        assert found[0] == pytest.approx(value, abs=1e-8)
        np.testing.assert_allclose(found[1:], (lo, hi), atol=0.15)       # both draw at random


def test_aggregate_draws_within_tasks():
    tasks = {"low": [0.0, 0.0, 0.0], "high": [100.0, 100.0]}
    assert aggregate(tasks) == (40.0, 40.0, 40.0)                        # no luck in it, whatever the tasks are worth
    assert aggregate({"a": [1.0, 2.0, 4.0]}) != aggregate({"a": [1.0, 2.0, 4.0]}, level=0.5)
    for bad in ({}, {"one": [1.0]}, {"a": [1.0, 2.0], "nan": [1.0, np.nan]}):
        with pytest.raises(ValueError, match="two seeds or more"):
            aggregate(bad)


# ---- the same vector in the data and in play

def test_dict_observations_recorded_with_minari_are_played_as_they_were_learnt(tmp_path, monkeypatch):
    "A real goal-reaching environment, recorded, stored by Minari, loaded, and played by what the data say."
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    gym.register_envs(gymnasium_robotics)
    make = lambda: gym.make("PointMaze_UMaze-v3", max_episode_steps=40)  # noqa: E731
    env, rng, buffers, seeds = make(), np.random.default_rng(0), [], episode_seeds(3, 6)
    for seed in seeds:
        (obs, _), end = env.reset(seed=seed), False
        rows, actions, rewards = [obs], [], []
        while not end:
            push = 5 * (obs["desired_goal"] - obs["achieved_goal"]) + rng.normal(0, 0.5, 2)
            actions.append(np.clip(push, -0.99, 0.99).astype(np.float32))
            obs, reward, _, end, _ = env.step(actions[-1])
            rows.append(obs)
            rewards.append(reward)
        stop = np.arange(40) == 39
        buffers.append(EpisodeBuffer(observations={k: np.array([o[k] for o in rows]) for k in obs}, truncations=stop,
                                     actions=np.array(actions), rewards=np.array(rewards), terminations=stop & False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("test/goals-v0", buffers, env=env)
    data = load_minari("test/goals-v0")
    assert data.meta["env_id"] == "PointMaze_UMaze-v3" and data.obs_dim == 8 and len(data) == 240
    parts = ("achieved_goal", "desired_goal", "observation")
    expected = np.concatenate([np.concatenate([e.observations[k][:-1] for k in parts], -1) for e in buffers])
    np.testing.assert_array_equal(data.obs, expected.astype(np.float32))
    learnt = {row.tobytes(): action for row, action in zip(data.obs.numpy(), data.action.numpy(), strict=True)}
    played = evaluate(lambda obs: np.array([learnt[o.tobytes()] for o in obs]), make, 6, seed=3, trajectories=True)
    for k, path in enumerate(played.trajectories):                       # to the last bit, or the look-up had failed
        np.testing.assert_array_equal(path[:-1], data.obs[data.episode == k])
    assert played.returns.tolist() == episode_returns(data).tolist()


# ---- videos

@pytest.fixture(scope="module")
def can_render():
    try:
        env = gym.make("Hopper-v5", render_mode="rgb_array", width=64, height=64)
        env.reset()
        env.render()
    except Exception as e:
        pytest.skip(f"this machine renders nothing: {e}")


def hopper(**kw):
    return gym.make("Hopper-v5", max_episode_steps=40, **kw)


def test_video_shows_the_episode_that_evaluate_plays(tmp_path, can_render):
    make, path = (lambda **kw: hopper(terminate_when_unhealthy=False, **kw)), tmp_path / "deep" / "hopper.gif"
    play = lambda obs: np.tanh(obs[:, 2:5])                              # noqa: E731
    filmed = record_video(play, lambda: make(render_mode="rgb_array", width=96, height=64), path, 4, every=4, size=48)
    assert filmed.returns.tolist() == evaluate(play, make, 3, seed=4).returns[:1].tolist() and filmed.lengths == [40]
    with Image.open(path) as gif:
        assert gif.size == (48, 32) and gif.n_frames == 1 + 40 // 4 and gif.info["loop"] == 0
        frames = []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB"), float))
            assert gif.info["duration"] == 30                            # 4 steps of 8 ms, as GIF counts: in 10 ms
    assert all(f.std() > 5 for f in frames) and np.abs(frames[-1] - frames[0]).max() > 50   # something moves


def test_video_of_bad_arguments(tmp_path):
    for make, path, every, message in (
        (hopper, "a.gif", 4, r'render_mode=None; build it with gym.make\(..., render_mode="rgb_array"\)'),
        (hopper, "a.avi", 4, "need a .gif or .mp4"), (hopper, "a.gif", 0, "every >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            record_video(random_policy(), make, tmp_path / path, every=every)


def test_video_where_nothing_can_be_rendered(tmp_path, run):
    program = """if True:
        import gymnasium as gym
        from bdpo_lit.offline.evaluation import record_video
        record_video(lambda o: o[:, :3], lambda: gym.make("Hopper-v5", render_mode="rgb_array"), "x.gif")"""
    done = run(sys.executable, "-c", program, cwd=tmp_path, check=False, MUJOCO_GL="disabled",
               PYTHONPATH=str(Path(evaluation.__file__).parent.parent))
    said = [line for line in done.stderr.splitlines() if "CannotDraw: cannot render here" in line]
    assert done.returncode == 1 and len(said) == 1 and "MUJOCO_GL=egl" in said[0]
    assert not (tmp_path / "x.gif").exists()


def test_mp4_shows_the_same_film(tmp_path, can_render):
    ffmpeg = shutil.which("ffmpeg") or pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    make, path = lambda: hopper(render_mode="rgb_array", width=97, height=65), tmp_path / "ünï dir" / "hop.mp4"  # noqa: E731
    record_video(lambda obs: np.zeros((len(obs), 3)), make, path, 4, every=4, size=97)
    raw = subprocess.run([ffmpeg, "-loglevel", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
                         capture_output=True, check=True).stdout
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 64, 96, 3)         # an odd row and column are cut
    assert len(frames) > 2 and all(f.std() > 5 for f in frames)


def test_mp4_without_ffmpeg_is_one_sentence_before_anything_is_played(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(CannotDraw, match="ffmpeg, which is not installed: pip install imageio-ffmpeg, or ask for a"):
        record_video(policy, pytest.fail, tmp_path / "a.mp4")
