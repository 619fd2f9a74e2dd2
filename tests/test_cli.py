"""The command line as a new user meets it: collect, train, kill, resume, evaluate, plot, describe."""
import csv
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer
from PIL import Image
from test_training import assert_same_run

import bdpo_lit.reference.command_line as cli
from bdpo_lit.evidence.ablations import PENDULUM_ID
from bdpo_lit.evidence.cheetah import CHEETAH_ID, collect_cheetah
from bdpo_lit.offline.data import D4RL_TASKS, d4rl_folder, load_minari
from bdpo_lit.offline.own_data import returns_to_go
from bdpo_lit.offline.training import load_checkpoint

TINY = ("--train.pretrain-steps 30 --train.train-steps 40 --train.log-every 10 --train.save-every 8 "
        "--train.eval-every 20 --train.eval-episodes 1 --train.batch-size 16 --train.num-actions 2 --train.device cpu "
        "--algorithm.num-critics 2 --algorithm.num-samples 2 --algorithm.num-steps 2 --algorithm.warmup-steps 5 "
        "--algorithm.actor-hidden 16 --algorithm.critic-hidden 16 --algorithm.time-dim 4 "
        "--threads 1 --episodes 1").split()
BDPO = [sys.executable, "-m", "bdpo_lit"]
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "An empty folder to work in, with the maze collected."
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("D4RL_DATASET_DIR", str(home / "d4rl"))
        (home / "minari").mkdir()
        (home / "file").touch()   # where no folder can be
        (home / "folder").mkdir()
        for k in ("actions", "observations"): np.save(home / "folder" / k, np.zeros((3, 2)))
        os.chdir(home)
        cli.main("collect maze --num-steps 2000".split())
        yield home
        os.chdir(before)


@pytest.fixture
def bdpo(capsys):
    "Type a command; what it said, and its exit status."
    def bdpo(*words, status=0):
        capsys.readouterr()
        ended = 0
        try: cli.main([w for word in words for w in (word.split() if isinstance(word, str) else word)])
        except SystemExit as e: ended = e.code
        out = capsys.readouterr()
        if isinstance(ended, str): out, ended = out._replace(err=out.err + ended), 1
        if os.name == "nt": out = out._replace(out=out.out.replace("\\", "/"), err=out.err.replace("\\", "/"))
        assert (ended or 0) == status, out
        assert "Traceback" not in out.err
        return out.out if status == 0 else out.out + out.err
    return bdpo


def rows(file):
    with open(file) as f: return list(csv.DictReader(f))


def episodes(env, total, seed=0):
    "Random play, whole episodes but perhaps the last, as Minari buffers."
    made = []
    env.action_space.seed(seed)
    while total > 0:
        obs, _ = env.reset(seed=seed + len(made))
        seen, actions, rewards, ends = [obs], [], [], []
        while total > 0:
            actions.append(env.action_space.sample())
            obs, r, terminated, truncated, _ = env.step(actions[-1])
            seen.append(obs), rewards.append(r), ends.append((terminated, truncated))
            total -= 1
            if terminated or truncated: break
        observations = {k: np.array([o[k] for o in seen]) for k in obs} if isinstance(obs, dict) else np.array(seen)
        made.append(EpisodeBuffer(seed=seed, observations=observations, actions=np.array(actions), rewards=rewards,
                                  terminations=[t for t, _ in ends], truncations=[t for _, t in ends]))
    return made


# Killed, and killed again

DIE_IN_A_SAVE = """
import os, signal, sys
import bdpo_lit.reference.command_line, bdpo_lit.offline.training as training
calls, replace = 0, os.replace
def die(src, dst):
    global calls
    calls += str(dst).endswith("last.pt")
    if calls == {k}: os.kill(os.getpid(), signal.SIGKILL)   # written, and not yet in its place
    replace(src, dst)
os.replace = die
bdpo_lit.reference.command_line.main(sys.argv[1:])
"""


@POSIX
def test_killed_at_random_moments_ends_in_the_same_numbers(bdpo, home):
    words = ["train", "--task", "maze", *TINY, "--train.pretrain-steps", "120", "--train.train-steps", "200",
             "--algorithm.behavior-lr", "1.0", "--train.eval-every", "100"]
    bdpo(words, ["--run-dir", "through"])
    again, run_dir, rng, left = [*words, "--run-dir", "killed"], home / "killed", random.Random(0), []
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for k in (2, 9):
        dead = subprocess.run([sys.executable, "-W", "ignore", "-c", DIE_IN_A_SAVE.format(k=k), *again],
                              capture_output=True, env=env)
        assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]
        assert (run_dir / "last.pt.part").exists(), "it should have died between writing and moving"
        left.append(sum(load_checkpoint(run_dir)["steps"].values()))
    for _ in range(2):
        log = run_dir / "metrics.csv"
        before, deadline = log.stat().st_mtime_ns, time.time() + 60
        going = subprocess.Popen([*BDPO, *again], stderr=subprocess.DEVNULL, env=env)
        while log.stat().st_mtime_ns == before and going.poll() is None and time.time() < deadline: time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        going.kill()
        assert going.wait() in (-signal.SIGKILL, 0)
        left.append(sum(load_checkpoint(run_dir)["steps"].values()))
    assert left == sorted(left) and 0 < left[0] < left[1] < 320
    assert "taken up at update" in bdpo(again)
    assert_same_run(run_dir, home / "through")
    assert [r["metric"] for r in rows(run_dir / "warnings.csv")] == ["behavior/loss"]


@POSIX
def test_ctrl_c_saves_and_says_how_to_go_on(home):
    words = ["train", "--task", "maze", *TINY, "--train.train-steps", "100000", "--run-dir", "stopped"]
    going = subprocess.Popen([*BDPO, *words], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.time() + 60
    while not (home / "stopped" / "metrics.csv").exists() and time.time() < deadline: time.sleep(0.05)
    going.send_signal(signal.SIGINT)
    out, err = going.communicate(timeout=60)
    assert going.returncode == 130 and "Stopped. The run is kept in stopped; the same command goes on" in out
    assert "Traceback" not in err and "stopping after this update" in err
    assert sum(load_checkpoint(home / "stopped")["steps"].values()) > 0


# One task after the other

def test_the_maze_from_collecting_to_curves(bdpo, home):
    assert "2000 transitions in" in bdpo("collect maze --num-steps 2000"), "it is there already"
    assert "return_mean" in bdpo("describe bdpo/pointmaze-umaze-hidden-v0 --out pictures/maze.png")
    said = bdpo("train --task maze --seed 1", TINY)
    assert "runs/maze-1: new, of 30 + 40" in said and "Next: bdpo evaluate runs/maze-1" in said
    table = re.findall(r"^\| .*", said, re.M)
    for name in ("data, mean", "diffusion clone", "Gaussian clone", "BDPO"): assert name in "".join(table)
    again = bdpo("train --task maze --seed 1", TINY)
    assert "taken up at update 30 + 40" in again and re.findall(r"^\| .*", again, re.M) == table, "played once"
    run = home / "runs" / "maze-1"
    config = json.loads((run / "config.json").read_text())
    assert config["about"] | dict(task="maze", reward="none", reward_scale=1.0, ref_min_score=0.0) == config["about"]
    assert config["train"]["seed"] == 1 and config["algorithm"]["eta"] == 0.1, "the preset, but for what was changed"
    # longer is the same run; another eta is another one
    assert "30 + 40, of 30 + 50" in bdpo("train --task maze --seed 1", TINY, "--train.train-steps 50")
    before = (run / "last.pt").read_bytes()
    said = bdpo("train --task maze --seed 1", TINY, "--algorithm.eta 0.7", status=1)
    assert "eta is 0.1 there and 0.7 here" in said and (run / "last.pt").read_bytes() == before
    # evaluation
    said = bdpo("evaluate runs/maze-1 --episodes 2 --how best --num-actions 3 --seed 7")
    assert "2 episodes in bdpo/PointMazeUMazeHidden-v0 from seed 7, best of 3 actions by Q per decision" in said
    assert re.search(r"last +50 ", said) and re.search(r"best +20 ", said)
    assert "one action per decision" in bdpo("evaluate runs/maze-1 --episodes 1")
    first, second = json.loads((run / "evaluation.json").read_text(), parse_constant=pytest.fail)   # no NaN
    assert second["last"]["return"]["low"] is None, "one episode has no interval"
    assert (first["episodes"], first["seed"], first["num_actions"], second["how"]) == (2, 7, 3, "sample")
    assert len(first["last"]["returns"]) == len(first["best"]["returns"]) == 2
    assert {"command", "commit", "date", "torch", "machine"} <= first["provenance"].keys()
    assert first["env_id"] == "bdpo/PointMazeUMazeHidden-v0" and first["ref_max_score"] > 100
    # curves
    bdpo("plot runs/maze-1 --out pictures/curves.png")
    assert "picture: pictures/again.png" in bdpo("plot runs/maze-1 --out pictures/again")
    assert "cannot use file" in bdpo("plot runs/maze-1 --out file/curves.png", status=1)
    for picture in ("maze", "curves"): assert np.ptp(np.asarray(Image.open(f"pictures/{picture}.png"))) > 100


def test_curves_of_seeds_are_their_mean_and_range(bdpo, home):
    from bdpo_lit.offline.training import draw_runs, read_column
    for seed in (2, 3): bdpo(f"train --task maze --seed {seed}", TINY)
    bdpo("train --task maze --seed 2 --algorithm.eta 0.5 --run-dir runs/other", TINY)
    runs = [home / "runs" / name for name in ("maze-2", "maze-3", "other")]
    loss, score, values, price = draw_runs(runs).axes
    labels = [line.get_label() for line in values.lines]
    assert labels == ["maze, eta 0.1 (2 runs)", "maze, eta 0.5"]
    a, b = (np.array(list(read_column(d, "q/mean").values())) for d in runs[:2])
    np.testing.assert_allclose(values.lines[0].get_ydata(), (a + b) / 2)
    band, = values.collections
    low, high = (f(band.get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert (low, high) == (min(a.min(), b.min()), max(a.max(), b.max()))
    assert score.get_title() == "score" and len(loss.lines) == len(price.lines) == 2
    # a run of an older release, without one of the settings, and without a curve in the first panel
    config = json.loads((runs[2] / "config.json").read_text())
    del config["train"]["normalize_obs"], config["crc32"]
    (runs[2] / "config.json").write_text(json.dumps(config))
    lines = (runs[2] / "metrics.csv").read_text().splitlines(keepends=True)
    (runs[2] / "metrics.csv").write_text("".join(line for line in lines if ",pretrain," not in line))
    names = [text.get_text() for text in draw_runs(runs).legends[0].get_texts()]
    assert names == ["maze, normalize_obs False, eta 0.1 (2 runs)", "maze, normalize_obs unknown, eta 0.5"]


def test_half_a_cheetah(bdpo, home):
    collect_cheetah(2000, iterations=1, progress=False)   # the command would let it learn for a minute
    assert "was made with" in bdpo("collect halfcheetah --num-steps 3000", status=1)
    said = bdpo("train --task halfcheetah", TINY, "--train.eval-every 0")
    assert f"2000 transitions of {CHEETAH_ID}" in said and "played in HalfCheetah-v5" in said
    said = bdpo("evaluate runs/halfcheetah-0 --episodes 1")
    assert "score" in said and re.search(r"last +40 ", said)
    bdpo("plot runs/halfcheetah-0 --out cheetah.png")
    assert "obs_dim  17" in bdpo(f"describe {CHEETAH_ID}")


def test_swing_up_and_a_unit_of_reward_that_is_kept(bdpo, home):
    assert "400 transitions in 2 episodes" in bdpo("collect pendulum --num-steps 400")
    said = bdpo("train --task pendulum", TINY, "--train.eval-every 0")
    scale = float(re.search(r"rewards x ([\d.]+)", said)[1])
    data = load_minari(PENDULUM_ID)
    assert math.isclose(scale * returns_to_go(data, 0.98).std(), 10, rel_tol=1e-3) and "played in Pendulum-v1" in said
    longer = "--train.train-steps 60 --run-dir runs/pendulum-0"
    for words in ("--task pendulum", "--config runs/pendulum-0/config.json"):     # goes on, in the same unit
        assert f"rewards x {scale:.4g}" in bdpo("train", words, TINY, "--train.eval-every 0", longer)
    said = bdpo("train --task maze --reward spread", TINY, "--run-dir runs/spread")
    assert json.loads((home / "runs" / "spread" / "config.json").read_text())["about"]["reward"] == "spread"


def test_a_minari_set_with_dict_observations_knows_its_environment(bdpo, home):
    env = gym.make("PointMaze_UMazeDense-v3", max_episode_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("mine/goals-v0", episodes(env, 400), env=env, algorithm_name="random")
    assert "obs_dim  8" in bdpo("describe mine/goals-v0")
    said = bdpo("train --data mine/goals-v0 --train.normalize-obs", TINY)
    assert "played in PointMaze_UMazeDense-v3" in said and "runs/mine-goals-v0-0" in said
    scaling = load_checkpoint(home / "runs" / "mine-goals-v0-0")["agent"]["scaling"]
    assert scaling["obs_std"].min() > 0 and not torch.equal(scaling["obs_std"], torch.ones(8).double())
    (home / "minari" / "mine").rename(home / "minari" / "away")     # the run needs the data no more
    said = bdpo("evaluate runs/mine-goals-v0-0 --episodes 2")
    assert "2 episodes in PointMaze_UMazeDense-v3" in said and "success" in said and "score" not in said
    noted = json.loads((home / "runs" / "mine-goals-v0-0" / "evaluation.json").read_text())
    assert json.loads(noted[0]["env"])["max_episode_steps"] == 50, "not the limit of the id, but of the data set"


def d4rl_file(path, total=1500, limit=100, timeouts=True):
    "Random play in the layout of D4RL's gym_mujoco_v2 files."
    path.parent.mkdir(parents=True, exist_ok=True)
    env = gym.make("Hopper-v5", max_episode_steps=limit, terminate_when_unhealthy=False)
    made = episodes(env, total)
    join = lambda name: np.concatenate([np.asarray(getattr(e, name)) for e in made])  # noqa: E731
    with h5py.File(path, "w") as f:
        f["observations"] = np.concatenate([e.observations[:-1] for e in made]).astype(np.float32)
        f["next_observations"] = np.concatenate([e.observations[1:] for e in made]).astype(np.float32)
        f["actions"], f["rewards"] = join("actions").astype(np.float32), join("rewards").astype(np.float32)
        f["terminals"] = join("terminations")
        if timeouts: f["timeouts"] = join("truncations")
        f["infos/qpos"], f["infos/action_log_probs"] = np.zeros((total, 6)), np.zeros(total)
        f["metadata/algorithm"] = "random"
    return path


def test_d4rl_task_with_its_file_in_place(bdpo, home):
    d4rl_file(d4rl_folder() / "hopper_medium-v2.hdf5")
    said = bdpo("train --task hopper-medium-v2", TINY)
    assert "1485 transitions of hopper-medium-v2" in said and "played in Hopper-v4" in said
    assert "score in training: last" in said
    config = json.loads((home / "runs" / "hopper-medium-v2-0" / "config.json").read_text())
    assert (config["algorithm"]["eta"], config["algorithm"]["rho"]) == (0.2, 2.0)
    assert (config["about"]["ref_min_score"], config["about"]["ref_max_score"]) == (-20.272305, 3234.3)
    assert config["about"]["reward"] == "locomotion" and config["about"]["reward_scale"] > 1
    said = bdpo("evaluate runs/hopper-medium-v2-0 --episodes 2 --env Hopper-v5")
    assert "2 episodes in Hopper-v5" in said and "score" in said
    last = json.loads((home / "runs" / "hopper-medium-v2-0" / "evaluation.json").read_text())[0]["last"]
    assert last["score"]["mean"] == pytest.approx(100 * (last["return"]["mean"] + 20.272305) / (3234.3 + 20.272305))
    bdpo("describe hopper-medium-v2 --out hopper.png")
    said = bdpo("train --data hopper-medium-v2", TINY, "--run-dir plain")   # without the paper's settings
    assert "played in Hopper-v4" in said and "score in training: last" in said
    plain = json.loads((home / "plain" / "config.json").read_text())
    assert plain["about"]["reward"] == "chosen" and plain["about"]["ref_max_score"] == 3234.3
    if os.environ.get("MUJOCO_GL") == "egl":   # else MuJoCo may not be able to draw here
        assert "video: film/hopper.gif" in bdpo("evaluate runs/hopper-medium-v2-0 --episodes 1 --video film/hopper.gif")
        assert Image.open(home / "film" / "hopper.gif").n_frames > 1


def test_d4rl_ant_by_name_plays_in_the_maze_of_its_task(bdpo, home):
    path, rng, n = d4rl_folder() / D4RL_TASKS["antmaze-umaze-v2"].file.split("/")[-1], np.random.default_rng(0), 200
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        f["observations"] = rng.normal(size=(n, 29)).astype(np.float32)
        f["actions"] = rng.uniform(-1, 1, (n, 8)).astype(np.float32)
        f["rewards"], f["terminals"] = (np.arange(n) % 50 == 30).astype(np.float32), np.arange(n) % 50 == 30
        f["timeouts"] = np.arange(n) % 50 == 49
    words = ["--data", "antmaze-umaze-v2", "--run-dir", "ant", "--reward", "antmaze", *TINY]
    run = cli.open_run(cli._train_command(words))
    assert run.make_env().spec.id == "bdpo/AntMaze-umaze-v0" and run.data.meta["reward_scale"] == 100.0
    assert len(run.data) == 196


def test_d4rl_files_with_and_without_timeouts(bdpo, home):
    d4rl_file(home / "with.hdf5")
    d4rl_file(home / "without.hdf5", timeouts=False)
    said = bdpo("train --data with.hdf5 --reward none", TINY)
    assert "rewards x 1;" in said
    assert "bdpo evaluate runs/with-0 --env ..." in said
    assert "no environment: give --env to see scores" in said and not (home / "runs/with-0/best.pt").exists()
    assert "does not say where its policies play; give an environment" in bdpo("evaluate runs/with-0", status=1)
    said = bdpo("evaluate runs/with-0 --env Hopper-v5 --episodes 1")
    assert "best: none" in said
    assert "--max-episode-steps" in bdpo("train --data without.hdf5", TINY, status=1)
    assert "no environment" in bdpo("train --task maze --env none --run-dir none", TINY)
    assert "1485 transitions of without" in bdpo("train --data without.hdf5 --max-episode-steps 100", TINY)
    said = bdpo("train --data without.hdf5 --env Hopper-v5 --run-dir b", TINY)   # the limit of the environment: 1000
    assert "1498 transitions" in said and "return in training: last" in said
    assert "transitions  1485" in bdpo("describe without.hdf5 --max-episode-steps 100")


# Data of one's own

def pendulum_file(path, name="Pendulum-v1", total=600):
    env = gym.make(name)
    made = episodes(env, total)
    with h5py.File(path, "w") as f:
        f["observations"] = np.concatenate([e.observations[:-1] for e in made])
        f["actions"] = np.concatenate([e.actions for e in made])
        f["rewards"] = np.concatenate([e.rewards for e in made])
        f["terminals"], f["timeouts"] = (np.concatenate([getattr(e, k) for e in made])
                                         for k in ("terminations", "truncations"))
    return path


def test_settings_are_chosen_for_data_of_ones_own_and_options_override_them(bdpo, home):
    pendulum_file(home / "pend.hdf5")
    words = "train --data pend.hdf5 --env Pendulum-v1 --budget 5s"
    said = bdpo(words, TINY)
    assert "599 transitions of pend" in said or "597 transitions of pend" in said
    config = json.loads((home / "runs" / "pend-0" / "config.json").read_text())
    assert config["train"]["pretrain_steps"] == 30 and config["algorithm"]["actor_hidden"] == [16]
    assert config["about"]["reward"] == "chosen" and config["about"]["reward_scale"] > 0
    assert "settings: those runs/pend-0 was started with" in bdpo(words, TINY), "chosen once"
    assert "--budget and --size choose settings for --data alone" in bdpo("train --task maze --size small", status=2)
    assert "budget" in bdpo("train --data pend.hdf5 --env Pendulum-v1 --run-dir x --budget soon", TINY, status=2)
    # the same settings again, from the run's own file
    said = bdpo("train --config runs/pend-0/config.json --seed 1")
    assert "runs/pend-1: new, of 30 + 40" in said
    again = json.loads((home / "runs" / "pend-1" / "config.json").read_text())
    assert again["algorithm"] == config["algorithm"] and again["data"] == config["data"]
    assert again["about"]["reward_scale"] == config["about"]["reward_scale"]


def test_bounds_come_from_the_environment_or_from_words(bdpo, home):
    pendulum_file(home / "wide.hdf5")
    assert "lie outside" in bdpo("describe wide.hdf5", status=1)
    for words in ("--env Pendulum-v1", "--action-low -2 --action-high 2"):
        assert re.search(r"action_low +-2", bdpo("describe wide.hdf5", words))
    said = bdpo("train --data wide.hdf5 --env Pendulum-v1 --reward none", TINY)
    assert "played in Pendulum-v1" in said
    said = bdpo("train --data wide.hdf5 --action-low -2 --action-high 2 --reward none --run-dir w", TINY)
    assert "no environment" in said and "| policy" not in said
    assert "return" in bdpo("evaluate w --env Pendulum-v1 --episodes 1")
    said = bdpo("describe wide.hdf5 --env Pendulum-v1")
    assert re.search(r"environment +Pendulum-v1\n +time_limit +200\n", said) and re.search(r"dropped +[34]\n", said)
    assert re.search(r"training  would choose.*\n +rewards  x [\d.]+ .*\n +gamma  0.\d+ \(the longest", said)
    said = bdpo("describe bdpo/pointmaze-umaze-hidden-v0 --env PointMaze_UMazeDense-v3")
    assert re.search(r"environment +PointMaze_UMazeDense-v3\n +time_limit +300\n", said), "where it was asked for"
    assert "--action-low is for files" in bdpo("describe bdpo/pointmaze-umaze-hidden-v0 --action-low -1", status=2)


def test_a_preset_lends_its_settings_to_other_data_and_nothing_else(bdpo, home):
    d4rl_file(home / "mine.hdf5")
    said = bdpo("train --task hopper-medium-v2 --data mine.hdf5", TINY)
    assert "1485 transitions of mine" in said and "hopper" not in said and "score" not in said.split("see scores")[1]
    config = json.loads((home / "runs" / "mine-0" / "config.json").read_text())
    assert (config["algorithm"]["eta"], config["about"]["reward"]) == (0.2, "locomotion")
    assert config["about"]["task"] is None and "ref_max_score" not in config["about"]
    env = gym.make("Pendulum-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("mine/own-v0", episodes(env, 400), env=env, algorithm_name="random")
    said = bdpo("train --task halfcheetah --data mine/own-v0", TINY)
    assert "of mine/own-v0" in said and "played in Pendulum-v1" in said and "runs/mine-own-v0-0" in said


def test_a_scale_of_the_same_robot_is_said_to_be_borrowed(bdpo, home):
    env = gym.make("Hopper-v5", max_episode_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("mujoco/hopper/mine-v0", episodes(env, 300), env=env,
                                           algorithm_name="random")
    said = bdpo("train --task maze --data mujoco/hopper/mine-v0", TINY)
    assert "of this robot, not of these data" in said and "score in training" in said


def test_rewards_that_say_nothing(bdpo, home):
    with h5py.File(pendulum_file(home / "zero.hdf5"), "a") as f: f["rewards"][:] = 0
    said = bdpo("describe zero.hdf5 --env Pendulum-v1")
    assert "all rewards are 0; there is nothing to learn" in said and "training would choose nothing: zero" in said
    assert "rewards" in bdpo("train --data zero.hdf5 --env Pendulum-v1", TINY, status=1)
    words = "train --task maze --data zero.hdf5 --env Pendulum-v1 --run-dir z"
    assert "warning: all rewards are 0" in bdpo(words, TINY)


# Settings from a file

def test_settings_in_a_file_of_ones_own(bdpo, home):
    yaml = pytest.importorskip("yaml")
    wish = dict(task="maze", train=dict(pretrain_steps=20, seed=4), algorithm=dict(eta=0.3, actor_hidden=[16]))
    (home / "wish.yaml").write_text(yaml.safe_dump(wish))
    words = " ".join(TINY).replace("--train.pretrain-steps 30", "").replace("--algorithm.actor-hidden 16", "")
    assert "runs/maze-4: new, of 20 + 40" in bdpo("train --config wish.yaml", words)
    made = json.loads((home / "runs" / "maze-4" / "config.json").read_text())["algorithm"]
    assert (made["eta"], made["actor_hidden"], made["num_critics"]) == (0.3, [16], 2)
    for text, message in (("{", "give a run, or a JSON or YAML file"), ("[]", "it holds no settings"),
                          ('{"trian": {}}', "no setting 'trian'; did you mean 'train'?"),
                          ('{"task": "maze", "train": {"seeed": 1}}', "no setting 'seeed'; did you mean 'seed'?"),
                          ('{"task": "maze", "train": {"batch_size": 0}}', "batch_size must be an integer"),
                          ('{"task": 3}', "bad.json: 'task' cannot be 3"), ('{"seed": "x"}', "'seed' cannot be 'x'"),
                          ('{"data": "x.npz", "env": {"id": 1}}', "'env' cannot be {'id': 1}"),
                          ('{"about": {"env": 3}, "train": {}}', "'env' cannot be 3"),
                          ('{"about": 1}', "what shall be learnt?"), ('{"train": 1}', "'train' cannot be 1")):
        (home / "bad.json").write_text(text)
        assert message in bdpo("train --config bad.json", status=2)
    assert "No such file" in bdpo("train --config nowhere.json", status=2)
    (home / "theirs.json").write_text(json.dumps(dict(about={}, train=dict(log="wandb"), algorithm={})))
    assert cli._read_settings(home / "theirs.json")["train"]["log"] == "tensorboard", "their service is not ours"
    (home / "mine.json").write_text('{"train": {"log": "wandb"}}')
    assert cli._read_settings(home / "mine.json")["train"]["log"] == "wandb"


def test_a_file_imports_no_code(bdpo, home):
    (home / "stranger.py").write_text("raise SystemExit('imported')")
    bdpo("train --task maze --seed 6", TINY)
    config = home / "runs" / "maze-6" / "config.json"
    told = json.loads(config.read_text().replace("bdpo_lit.offline.maze:", "stranger:"))
    config.write_text(json.dumps({k: x for k, x in told.items() if k != "crc32"}))
    for words in ("evaluate runs/maze-6", "train --config runs/maze-6 --seed 7", "train --config runs/maze-6"):
        assert "if you trust it, name it yourself: --env stranger:bdpo/" in bdpo(words, status=1)
    assert "stranger" not in sys.modules


PENDULUM = json.loads(gym.spec("Pendulum-v1").to_json())


def wrapped(entry, **kwargs):
    return PENDULUM | dict(additional_wrappers=[dict(name="x", entry_point=entry, kwargs=kwargs)])


@pytest.mark.parametrize("named", [
    "stranger2:Pendulum-v1", "bdpo_lit.offline.maze:stranger2:Pendulum-v1", "bdpo_lit.__main__:Pendulum-v1",
    PENDULUM | dict(id="stranger2:Pendulum-v1"), PENDULUM | dict(entry_point="stranger2:Pendulum"),
    wrapped("stranger2:Wrapper"), wrapped("gymnasium.envs.registration:make", id="stranger2:Pendulum-v1"),
    wrapped("gymnasium.wrappers.array_conversion:ArrayConversion", env_xp="stranger2", target_xp="stranger2"),
    wrapped("gymnasium.wrappers.rendering:RecordVideo", video_folder="films"),
    PENDULUM | dict(id="GymV26Environment-v0", kwargs=dict(env_id="stranger2:Pendulum-v1")), ["Pendulum-v1"], 3,
])
def test_nothing_that_a_run_or_a_set_names_is_imported(named, bdpo, home, monkeypatch):
    (home / "stranger2.py").write_text("open('imported', 'w').close()")
    monkeypatch.syspath_prepend(home)
    run = home / "runs" / "strange"
    if not run.exists(): bdpo("train --task maze --run-dir runs/strange", TINY)
    config = json.loads((run / "config.json").read_text())
    config["about"] |= dict(env=json.dumps(named) if isinstance(named, dict) else named, task=None)
    (run / "config.json").write_text(json.dumps(config | dict(crc32=None)))
    for words in ("evaluate runs/strange --video x.gif", "evaluate runs/strange/last.pt",
                  "train --config runs/strange --run-dir y"):
        said = bdpo(words, status=2 if not isinstance(named, str | dict) and "train" in words else 1)
        assert re.fullmatch(r"bdpo: [^\n]+", said.strip()), said
        assert any(x in said for x in ("--env", "'env' cannot be", "config.json is damaged")), said
    bdpo("plot runs/strange --out strange.png", status=0 if isinstance(named, str | dict) else 1)
    if isinstance(named, dict):
        env = gym.make("Pendulum-v1", max_episode_steps=20)
        shutil.rmtree(home / "minari" / "strange", ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers("strange/set-v0", episodes(env, 60), env=env, algorithm_name="random")
        file = home / "minari" / "strange" / "set-v0" / "data" / "metadata.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(env_spec=json.dumps(named))))
        bdpo("describe strange/set-v0")
        assert "--env" in bdpo("train --data strange/set-v0 --run-dir z", TINY, status=1)
    assert "stranger2" not in sys.modules and not (home / "imported").exists() and not (home / "films").exists()


def test_a_module_beside_the_user_is_found(home):
    (home / "besides.py").write_text("import gymnasium as gym\ngym.register('Besides-v0', "
                                     "'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=5)\n")
    pendulum_file(home / "besides.hdf5")
    done = subprocess.run([*BDPO, "describe", "besides.hdf5", "--env", "besides:Besides-v0"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and re.search(r"action_high +2", done.stdout), done.stderr


# Environments that misbehave

BAD = """
import gymnasium as gym, numpy as np
from gymnasium.envs.classic_control import PendulumEnv
class Bad(PendulumEnv):
    def __init__(self, fault=None, **kwargs): super().__init__(**kwargs); self.fault, self.t = fault, 0
    def reset(self, **kwargs):
        self.t = 0
        if self.fault == "reset": raise RuntimeError("no start\\nat all")
        return super().reset(**kwargs)
    def step(self, action):
        self.t += 1
        obs, reward, end, cut, info = super().step(action)
        if self.fault == "step" and self.t == 3: raise ZeroDivisionError("broken")
        if self.fault == "old": return obs, reward, end, info
        return (obs[:2] if self.fault == "short" else obs), {"nan": np.nan, "None": None, "pair": [0, 1]}.get(
            self.fault, reward), end, cut, info
    def close(self):
        if self.fault == "close": raise OSError("it will not close")
for k in ("reset", "step", "old", "short", "nan", "None", "pair", "close"):
    gym.register(f"Bad{k}-v0", Bad, max_episode_steps=5, kwargs=dict(fault=k))
gym.register("Badendless-v0", Bad)
"""


def test_environments_that_misbehave_are_answered_in_one_line(bdpo, home, monkeypatch):
    (home / "badenv.py").write_text(BAD)
    pendulum_file(home / "bad.hdf5")
    bdpo("train --data bad.hdf5 --action-low -2 --action-high 2 --reward none --run-dir bad", TINY)
    monkeypatch.setattr("bdpo_lit.offline.evaluation.MAX_STEPS", 50)
    for k, message in dict(
            reset=r"failed in reset with RuntimeError: no start \(episode 1, at its start\)",
            step=r"failed in step with ZeroDivisionError: broken \(episode 1, step 3\)",
            old=r"failed in step with ValueError: not enough .*; Gymnasium's .* step 5 \(episode 1, step 1\)",
            short=r"showed an observation of shape \(2,\) .* \(episode 1, step 1\)",
            nan=r"paid nan \(episode 1, step 1\), so there is no return to report",
            None_=r"paid nan \(episode 1, step 1\), so there is no return to report",
            pair=r"paid a reward of shape \(2,\) \(episode 1, step 1\)").items():
        said = bdpo(f"evaluate bad --episodes 2 --env badenv:Bad{k.strip('_')}-v0", status=1)
        assert re.search(rf"^bdpo: the environment Bad{k.strip('_')}-v0 {message}$", said, re.M), said
    said = bdpo("evaluate bad --episodes 2 --env badenv:Badendless-v0", status=1)
    assert re.search("^bdpo: an episode in Badendless-v0 passed 50 steps; the environment needs a time", said, re.M)
    assert not (home / "bad" / "evaluation.json").exists(), "nothing is noted of what was not played"
    assert "return" in bdpo("evaluate bad --episodes 2 --env Pendulum-v1"), "the run is as it was"


def test_a_warning_is_a_line(capsys):
    cli.main("evaluate bad --episodes 2 --env badenv:Badclose-v0".split())
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said and set(said) == {"warning: the environment Badclose-v0 failed in close with OSError: it will not "
                                  "close; its episodes count all the same"}


# Several

def test_several_seeds_several_runs_and_any_checkpoint(bdpo, home):
    said = bdpo("train --task maze --seeds 8,9", TINY)
    assert re.search(r"\| policy +\| seed 8 \| seed 9 \|", said)
    assert "Next: bdpo evaluate runs/maze-8 runs/maze-9" in said
    for words in ("0", "1,1", "2-2", "a", "3-1"):
        assert "--seeds takes" in bdpo("train --task maze --seeds", words, status=2)
    assert "not both" in bdpo("train --task maze --seeds 0,1 --seed 2", status=2)
    said = bdpo("evaluate runs/maze-8 runs/maze-9 --episodes 1")
    assert said.count("1 episodes in bdpo/PointMaze") == 2 and re.search(r"2 runs +last +", said)
    found = json.loads(bdpo("evaluate runs/maze-8/last.pt runs/maze-9 --episodes 1 --json --learner behavior"))
    assert [r["policies"] for r in found] == [["last"], ["last", "best"]] and found[0]["how"] == "sample"
    assert "the behaviour policy, 1 episodes" in bdpo("evaluate runs/maze-8 --episodes 1 --learner behavior")
    assert "a video is of one run" in bdpo("evaluate runs/maze-8 runs/maze-9 --video x.gif", status=2)


# For programs

def test_json_is_all_there_is_on_stdout(bdpo, home):
    found = json.loads(bdpo("describe bdpo/pointmaze-umaze-hidden-v0 --json"), parse_constant=pytest.fail)
    assert found["transitions"] == 2000 and found["warnings"] == []
    assert [row[0] for row in found["chosen"]] == ["rewards", "gamma", "eta", "how"]
    found = json.loads(bdpo("train --task maze --seed 10 --json", TINY), parse_constant=pytest.fail)
    assert Path(found["run"]).name == "maze-10" and found["table"]["unit"] == "score"
    assert [r["name"] for r in found["table"]["rows"]][0].startswith("data, mean")


def test_the_command_is_a_module_and_has_a_version():
    from bdpo_lit import __version__
    for program in (["-m", "bdpo_lit"], ["-m", "bdpo_lit.reference.command_line"]):
        done = subprocess.run([sys.executable, *program, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"bdpo_lit {__version__}\n")
        done = subprocess.run([sys.executable, *program, "fly"], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("bdpo: no command 'fly'")


def test_a_policy_goes_away(bdpo, home):
    bdpo("train --task maze --seed 11", TINY)
    if not importlib.util.find_spec("onnx"): assert "onnx" in bdpo("export runs/maze-11 policy.onnx", status=1)
    assert re.fullmatch(r"policy: \S*policy.pt2\n", export(home, "away/policy.pt2"))
    policy = torch.export.load(home / "away" / "policy.pt2").module()
    assert policy(torch.zeros(3, 4)).shape == (3, 2)
    assert "name that ends in" in bdpo("export runs/maze-11 policy.doc", status=1)


def export(home, file, *words):
    "What is said in a process of its own: torch exports no checked function."
    done = subprocess.run([*BDPO, "export", "runs/maze-11", file, *words], capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_policy_goes_away_as_onnx_and_as_weights(home):
    pytest.importorskip("onnxscript"), pytest.importorskip("safetensors")
    runtime = pytest.importorskip("onnxruntime")
    words = ["--num-actions", "3", "--noise", "input"]
    for kind in ("onnx", "pt2", "safetensors"): export(home, f"away/same.{kind}", *words)
    obs, noise = torch.randn(5, 4), torch.randn(2, 5, 3, 2)
    action = torch.export.load(home / "away" / "same.pt2").module()(obs, noise).numpy()
    session = runtime.InferenceSession(home / "away" / "same.onnx")
    assert [x.name for x in session.get_inputs()] == ["obs", "noise"]
    np.testing.assert_allclose(session.run(None, dict(obs=obs.numpy(), noise=noise.numpy()))[0], action, atol=1e-4)
    from safetensors.numpy import load_file
    assert sum(x.size for x in load_file(home / "away" / "same.safetensors").values()) > 100


# Mistakes

# What is refused

@pytest.mark.parametrize("words, status, message", [
    ("train", 2, "Give --data PATH_OR_ID or --task NAME"),
    ("train --task hoper-medium-v2", 1, "no task 'hoper-medium-v2'; did you mean hopper-medium-v2"),
    ("train --data no/such-v0", 1, "data set 'no/such-v0' not found"),
    ("train --data nothing.hdf5", 1, "nothing.hdf5: no such file"),
    ("train --task maze --env Nowhere-v0", 1, "no environment 'Nowhere-v0'"),
    ("train --task maze --env Pendulum-v1", 1, "observations of length 3"),
    ("train --task maze --train.batch-size 0", 2, "--train.batch-size must be an integer of at least 1, got 0"),
    ("train --task maze --algorithm.eta -1", 2, "eta must be at least 0, got -1"),
    ("train --task maze --algorithm.etta 1", 2, "no option --algorithm.etta; did you mean --algorithm.eta"),
    ("train --task maze --train.device nowhere", 1, "device 'nowhere' is not available here"),
    ("train --task maze --run-dir file/run", 1, "cannot write file/run"),
    ("train --task maze --threads 0", 2, "--threads must be at least 1, got 0"),
    ("train --task maze --etta 1", 2, "there is no option --etta; did you mean --algorithm.eta"),
    ("train --task maze --actor_lr 1", 2, "did you mean --algorithm.actor-lr"),
    ("train --task maze --algorithm.rho x", 2, "--algorithm.rho: a number is needed, got 'x'"),
    ("train --task maze --algorithm.eta x", 2, "--algorithm.eta: FLOAT|{auto} is needed, got 'x'"),
    ("train --task maze --train.seed -1", 2, "--train.seed must be"),
    ("train --task maze --seed -1", 2, "--seed must be"),
    ("evaluate runs/none --episodes 0", 2, "--episodes must be at least 1, got 0"),
    ("evaluate runs/none --num-actions 0", 2, "--num-actions must be at least 1, got 0"),
    ("evaluate runs/none --episode 3", 2, "there is no option --episode; did you mean --episodes?"),
    ("evaluate runs/none --how worst", 2, "--how cannot be 'worst', but one of 'best', 'sample', 'softmax'"),
    ("evaluate", 2, "which run?"), ("demo --episodes 0", 2, "--episodes must be at least 1, got 0"),
    ("describe x.hdf5 --max-episode-steps 0", 2, "--max-episode-steps must be at least 1, got 0"),
    ("evaluat runs/none", 2, "no command 'evaluat'; did you mean evaluate?"),
    ("evaluate runs/none", 1, "runs/none is no run"),
    ("evaluate minari", 1, "minari is no run"),
    ("evaluate runs/none --video x.avi", 2, "the video is a .gif or an .mp4, got x.avi"),
    ("plot runs/none", 1, "runs/none is no run"), ("plot", 2, "no run to draw"),
    ("describe no/such-v0", 1, "data set 'no/such-v0' not found"),
    ("describe folder", 2, "folder is a folder (actions.npy, observations.npy); data are one file: import numpy"),
    ("collect maze --num-steps 1", 2, "--num-steps must be at least 2"), ("collect moon", 2, "'moon'"),
    ("describe minari", 1, "a file in D4RL's layout is given by its path, which ends in .hdf5 or .h5"),
    ("toy2d moons --folder file/x", 1, "choose or make another place"),
    ("collect maze --dataset-id maze", 1, "'maze' cannot name a data set; 'mine/maze-v0' could"),
    ("collect maze --num-steps 2500", 1, "was made with"), ("fly", 2, "no command 'fly'"),
    ("", 2, "there are demo, collect"),
])
def test_mistakes_are_answered_in_one_line(words, status, message, bdpo):
    said = bdpo(words, status=status)
    assert message in said and re.fullmatch(r"bdpo: [^\n]+", said.strip())


def test_a_folder_for_data_that_cannot_be_made(bdpo, home, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "file" / "minari"))
    assert "cannot write" in (said := bdpo("collect maze --num-steps 100", status=1))
    assert "MINARI_DATASETS_PATH" in said


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f["observations"].write_direct(np.full((60, 11), np.nan, np.float32)), "has 60 rows with NaN"),
    (lambda f: [f.__delitem__(k) or f.__setitem__(k, np.zeros(0)) for k in list(f) if k not in ("infos", "metadata")],
     "found 0 transitions"),
    (lambda f: f.__delitem__("rewards"), "lacks rewards"),
    (lambda f: f["actions"].write_direct(np.full((60, 3), 2, np.float32)), "(--clip-outside)"),
])
def test_files_that_cannot_be_learnt_from(spoil, message, bdpo, home):
    with h5py.File(d4rl_file(home / "spoilt.hdf5", 60), "a") as f: spoil(f)
    assert message in bdpo("train --data spoilt.hdf5", TINY, status=1)


def test_another_file_of_the_same_name_is_another_run(bdpo, home):
    d4rl_file(home / "same.hdf5", 200)
    bdpo("train --data same.hdf5", TINY)
    d4rl_file(home / "same.hdf5", 300)
    said = bdpo("train --data same.hdf5", TINY, status=1)
    assert "the number of transitions is 198 there and 297 here" in said


def test_a_damaged_run_and_a_damaged_note_lose_nothing(bdpo, home):
    bdpo("train --task maze --seed 5", TINY)
    run = home / "runs" / "maze-5"
    (run / "evaluation.json").write_text("{}")
    assert "evaluation.json is damaged; move it away" in bdpo("evaluate runs/maze-5 --episodes 1", status=1)
    assert (run / "evaluation.json").read_text() == "{}"
    (run / "last.pt").write_bytes(b"x")
    assert "not a readable checkpoint" in bdpo("evaluate runs/maze-5 --episodes 1", status=1)
    assert "taken up at update 30 + 40" in bdpo("train --task maze --seed 5", TINY), "from previous.pt"
    for name in ("last.pt", "previous.pt"): (run / name).write_bytes(b"x")
    assert "there is no good previous.pt. Copy best.pt to last.pt" in bdpo("train --task maze --seed 5", TINY, status=1)
    (run / "config.json").write_text("[]")
    assert "config.json is damaged" in bdpo("plot runs/maze-5", status=1)


def test_an_actor_that_never_starts_is_announced(bdpo):
    said = bdpo("train --task maze --run-dir late", TINY, "--algorithm.warmup-steps 40")
    assert "the actor starts after 40 updates (--algorithm.warmup-steps) of 40: it will stay a clone" in said


def test_a_mistake_of_ours_is_a_sentence_too(bdpo, monkeypatch):
    def broken(*_, **__): raise KeyError("nothing")
    monkeypatch.setattr("bdpo_lit.offline.tasks.judge_run", broken)
    said = bdpo("evaluate minari", status=1)
    assert "KeyError: 'nothing'; this is a mistake in bdpo_lit and not yours: BDPO_LIT_DEBUG=1" in said
    monkeypatch.setenv("BDPO_LIT_DEBUG", "1")
    with pytest.raises(KeyError): cli.main(["evaluate", "minari"])


def test_home_and_blanks_in_paths(bdpo, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home)), monkeypatch.setenv("USERPROFILE", str(home))
    said = bdpo(["train", "--task", "maze", "--run-dir", "~/my runs/a b"], TINY)
    assert re.search(r"Next: bdpo evaluate ['\"].*my runs.a b['\"]$", said.strip())
    assert (home / "my runs" / "a b").exists()
    assert "noted in" in bdpo(["evaluate", "~/my runs/a b", "--episodes", "1"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_library_for_drawing_that_is_not_there(home):
    import ctypes.util
    if ctypes.util.find_library("OSMesa"): pytest.skip("it is there")
    done = subprocess.run([*BDPO, "evaluate", "runs/none"], capture_output=True, text=True,
                          env={**os.environ, "MUJOCO_GL": "osmesa"})
    assert done.returncode == 1 and done.stderr.startswith("bdpo: runs/none is no run"), "nothing is drawn"


@POSIX
def test_sigterm_is_ctrl_c_from_the_first_moment(home):
    code = "import os, signal, sys; import bdpo_lit.reference.command_line as c\n" \
           "c.COMMANDS['plot'].__call__ = lambda self: os.kill(os.getpid(), signal.SIGTERM)\nc.main(['plot', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, "bdpo: interrupted")


# Help

def test_help_names_every_field_with_its_meaning(bdpo):
    said = re.sub(r"[\s│]+", " ", bdpo("train --task antmaze-large-play-v0 --help"))
    for part, words in (("train", ["--train.normalize-obs", "transitions per update", "(default: 100)"]),
                        ("algorithm", ["--algorithm.max-q", "best of M", "(default: 0.995)"])):
        for word in words: assert word in said, (part, word)
    for command in cli.COMMANDS: assert "--help" in bdpo(f"{command} --help")


def test_help_does_not_wait_for_torch():
    code = ("import sys; sys.argv = ['bdpo', '--help']\nfrom bdpo_lit.reference import command_line\n"
            "try: command_line.main()\nexcept SystemExit: print('torch' in sys.modules, 'matplotlib' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False"
