"""The command line as a new user meets it: collect, train, kill, resume, evaluate, plot, describe."""
import csv
import json
import os
import random
import re
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
import tyro
from minari.data_collector import EpisodeBuffer
from PIL import Image
from test_training import assert_same_run

import bdpo_lit.reference.command_line as cli
from bdpo_lit.evidence.cheetah import CHEETAH_ID, collect_cheetah
from bdpo_lit.offline.data import D4RL_TASKS, d4rl_folder
from bdpo_lit.offline.training import load_checkpoint

TINY = ("--train.pretrain-steps 30 --train.train-steps 40 --train.log-every 10 --train.save-every 8 "
        "--train.eval-every 20 --train.eval-episodes 1 --train.batch-size 16 --train.num-actions 2 --train.device cpu "
        "--algorithm.num-critics 2 --algorithm.num-samples 2 --algorithm.num-steps 2 --algorithm.warmup-steps 5 "
        "--algorithm.actor-hidden 16 --algorithm.critic-hidden 16 --algorithm.time-dim 4 --threads 1").split()


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    "An empty folder to work in, with the maze collected."
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
        patch.setenv("D4RL_DATASET_DIR", str(home / "d4rl"))
        (home / "minari").mkdir()
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
        going = subprocess.Popen([Path(sys.executable).parent / "bdpo", *again], stderr=subprocess.DEVNULL, env=env)
        while log.stat().st_mtime_ns == before and going.poll() is None and time.time() < deadline: time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        going.kill()
        assert going.wait() in (-signal.SIGKILL, 0)
        left.append(sum(load_checkpoint(run_dir)["steps"].values()))
    assert left == sorted(left) and 0 < left[0] < left[1] < 320
    assert "taken up at update" in bdpo(again)
    assert_same_run(run_dir, home / "through")
    assert [r["metric"] for r in rows(run_dir / "warnings.csv")] == ["behavior/loss"]


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    words = ["train", "--task", "maze", *TINY, "--train.train-steps", "100000", "--run-dir", "stopped"]
    going = subprocess.Popen([Path(sys.executable).parent / "bdpo", *words], stdout=subprocess.PIPE,
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
    assert "taken up at update 30 + 40" in bdpo("train --task maze --seed 1", TINY)
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
    assert "cannot use /proc/x: " in bdpo("plot runs/maze-1 --out /proc/x/curves.png", status=1)
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
    del config["train"]["normalize_obs"]
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


def test_a_minari_set_with_dict_observations_knows_its_environment(bdpo, home):
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("mine/goals-v0", episodes(env, 400), env=env, algorithm_name="random")
    assert "obs_dim  8" in bdpo("describe mine/goals-v0")
    said = bdpo("train --data mine/goals-v0 --train.normalize-obs", TINY)
    assert "played in PointMaze_UMaze-v3" in said and "runs/mine-goals-v0-0" in said
    scaling = load_checkpoint(home / "runs" / "mine-goals-v0-0")["agent"]["scaling"]
    assert scaling["obs_std"].min() > 0 and not torch.equal(scaling["obs_std"], torch.ones(8).double())
    (home / "minari" / "mine").rename(home / "minari" / "away")     # the run needs the data no more
    said = bdpo("evaluate runs/mine-goals-v0-0 --episodes 2")
    assert "2 episodes in PointMaze_UMaze-v3" in said and "success" in said and "score" not in said
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
    assert "1485 transitions of hopper-medium-v2" in said and "played in Hopper-v4" in said and "score: last" in said
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
    assert "played in Hopper-v4" in said and "score: last" in said
    plain = json.loads((home / "plain" / "config.json").read_text())
    assert plain["algorithm"]["eta"] == 0.15 and plain["about"]["reward"] == "locomotion"
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
    words = ["--data", "antmaze-umaze-v2", "--run-dir", "ant", *TINY]
    run = cli.open_run(tyro.cli(cli._train_command(words), args=words))
    assert run.make_env().spec.id == "bdpo/AntMaze-umaze-v0" and run.data.meta["reward_scale"] == 100.0
    assert len(run.data) == 196


def test_d4rl_files_with_and_without_timeouts(bdpo, home):
    d4rl_file(home / "with.hdf5")
    d4rl_file(home / "without.hdf5", timeouts=False)
    said = bdpo("train --data with.hdf5", TINY)
    assert "rewards x 1;" in said, "its unit is not known"
    assert "bdpo evaluate runs/with-0 --env ..." in said
    assert "no environment: give --env to see scores" in said and not (home / "runs/with-0/best.pt").exists()
    assert "does not say where its policies play; give an environment" in bdpo("evaluate runs/with-0", status=1)
    said = bdpo("evaluate runs/with-0 --env Hopper-v5 --episodes 1")
    assert "best: none" in said
    assert "no 'timeouts'; pass max_episode_steps" in bdpo("train --data without.hdf5", TINY, status=1)
    assert "no environment" in bdpo("train --task maze --env none --run-dir none", TINY)
    assert "1485 transitions of without" in bdpo("train --data without.hdf5 --max-episode-steps 100", TINY)
    said = bdpo("train --data without.hdf5 --env Hopper-v5 --run-dir b", TINY)   # the limit of the environment: 1000
    assert "1498 transitions" in said and "return: last" in said
    same = bdpo("train --task hopper-medium-v2 --data with.hdf5 --run-dir c", TINY)
    assert "1485 transitions of hopper-medium-v2" in same and "score: last" in same
    assert "transitions  1485" in bdpo("describe without.hdf5 --max-episode-steps 100")


# What is refused

@pytest.mark.parametrize("words, status, message", [
    ("train", 1, "Give --task NAME or --data PATH_OR_ID"),
    ("train --task hoper-medium-v2", 1, "no task 'hoper-medium-v2'; did you mean hopper-medium-v2"),
    ("train --data no/such-v0", 1, "data set 'no/such-v0' not found"),
    ("train --data nothing.hdf5", 1, "nothing.hdf5: no such file"),
    ("train --task maze --env Nowhere-v0", 1, "no environment 'Nowhere-v0'"),
    ("train --task maze --env Pendulum-v1", 1, "observations of length 3"),
    ("train --task maze --train.batch-size 0", 2, "batch_size must be an integer of at least 1, got 0"),
    ("train --task maze --algorithm.eta -1", 2, "eta must be at least 0, got -1"),
    ("train --task maze --algorithm.etta 1", 2, "--algorithm.etta"),
    ("train --task maze --train.device nowhere", 1, "device 'nowhere' is not available here"),
    ("train --task maze --run-dir /proc/run", 1, "cannot write /proc/run"),
    ("train --task maze --threads 0", 1, "threads must be at least 1"),
    ("evaluate runs/none", 1, "runs/none is no run"),
    ("evaluate minari", 1, "minari is no run"),
    ("evaluate runs/none --video x.mp4", 1, "the video is a .gif, got x.mp4"),
    ("plot runs/none", 1, "runs/none is no run"), ("plot", 1, "no run to draw"),
    ("describe no/such-v0", 1, "data set 'no/such-v0' not found"),
    ("collect maze --num-steps 1", 1, "num_steps must be at least 2"), ("collect moon", 2, "'moon'"),
    ("describe minari", 1, "a file in D4RL's layout is given by its path, which ends in .hdf5 or .h5"),
    ("toy2d moons --folder /proc/x", 1, "cannot use /proc/x: No such file or directory; choose another place"),
    ("collect maze --dataset-id maze", 1, "'maze' cannot name a data set; 'mine/maze-v0' could"),
    ("collect maze --num-steps 2500", 1, "was made with"), ("fly", 2, "fly"), ("", 2, "Missing subcommand"),
])
def test_mistakes_are_answered_in_one_line(words, status, message, bdpo):
    said = bdpo(words, status=status)
    assert message in re.sub(r"[\s│]+", " ", said)
    if status == 1: assert re.fullmatch(r"bdpo: [^\n]+", said.strip())


def test_a_folder_for_data_that_cannot_be_made(bdpo, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", "/proc/minari")
    assert "cannot write /proc/minari" in (said := bdpo("collect maze --num-steps 100", status=1))
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
    assert "the number of transitions is 198 there and 297 here; the checksum of its numbers" in said


def test_a_damaged_run_and_a_damaged_note_lose_nothing(bdpo, home):
    bdpo("train --task maze --seed 5", TINY)
    run = home / "runs" / "maze-5"
    (run / "evaluation.json").write_text("{}")
    assert "evaluation.json is damaged; move it away" in bdpo("evaluate runs/maze-5 --episodes 1", status=1)
    assert (run / "evaluation.json").read_text() == "{}"
    (run / "last.pt").write_bytes(b"x")
    assert "not a readable checkpoint" in bdpo("evaluate runs/maze-5 --episodes 1", status=1)
    assert "not a readable checkpoint" in bdpo("train --task maze --seed 5", TINY, status=1)
    (run / "config.json").write_text("[]")
    assert "config.json is damaged" in bdpo("plot runs/maze-5", status=1)


def test_an_actor_that_never_starts_is_announced(bdpo):
    said = bdpo("train --task maze --run-dir late", TINY, "--algorithm.warmup-steps 40")
    assert "the actor starts after 40 updates" in said and "only 40 are asked for" in said


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
