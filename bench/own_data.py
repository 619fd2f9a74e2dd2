"""Chapter 18's measurement: five data sets, three seeds each, through `bdpo train --data` with no other choice made.

    python bench/own_data.py                one run after the other, an hour and a half
    python bench/own_data.py --threads 1    started twice: the two share the runs

The sets are such as users bring: three are made here as plain arrays (.npz), two are the book's own.
When all runs are there, their tables are gathered in one JSON file."""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

from bdpo_lit.evidence.ablations import collect_pendulum
from bdpo_lit.reference.style import provenance


def play(env: gym.Env, policy, *settings, seed: int) -> list[tuple]:
    "One episode: rows of observation, action, reward, terminal, timeout."
    obs, rows, over = env.reset(seed=seed)[0], [], False
    while not over:
        action = np.clip(policy(obs, *settings), env.action_space.low, env.action_space.high).astype(np.float32)
        after, reward, terminal, timeout, _ = env.step(action)
        rows.append((obs, action, reward, terminal, timeout))
        obs, over = after, terminal or timeout
    return rows


def save(path: Path, episodes: list):
    "As arrays, in the layout of chapter 13."
    o, a, r, d, t = map(np.array, zip(*(row for e in episodes for row in e)))
    np.savez(path, observations=o.astype(np.float32), actions=a, rewards=r, terminals=d, timeouts=t)


def steps(episodes: list) -> int: return sum(map(len, episodes))


def pendulum(path: Path):
    "Swing-up by scripts of random gains and noise: chapter 26's."
    episodes = list(collect_pendulum())
    join = lambda name: np.concatenate([getattr(e, name)[:len(e)] for e in episodes])
    np.savez(path, observations=join("observations"), actions=join("actions"), rewards=join("rewards"),
             terminals=join("terminations"), timeouts=join("truncations"))


def inverted_pendulum(path: Path, total: int = 20_000):
    "Random linear policies, actions within +-3; most let the pole fall early."
    env, rng, episodes = gym.make("InvertedPendulum-v5", max_episode_steps=400), np.random.default_rng(0), []
    def script(obs, gains, noise): return [gains @ obs + noise * rng.normal()]
    while steps(episodes) < total:
        gains, noise = np.array([.5, 4, .5, 1]) * rng.uniform(-.3, 1.2, 4), rng.uniform(.3, 2)
        episodes.append(play(env, script, gains, noise, seed=len(episodes)))
    save(path, episodes)


def hopper(path: Path, total: int = 60_000):
    "All episodes of an augmented random search (Mania et al., 2018), nearly all of which fall."
    env, rng, episodes = gym.make("Hopper-v5"), np.random.default_rng(0), []
    weights, mean, std = np.zeros((3, 11)), np.zeros(11), np.ones(11)
    def script(obs, w): return w @ ((obs - mean) / std) + .2 * rng.normal(size=3)
    def earned(w):
        episodes.append(play(env, script, w, seed=len(episodes)))
        return sum(row[2] for row in episodes[-1])
    while steps(episodes) < total:
        tries = rng.normal(size=(8, 3, 11))
        up, down = (np.array([earned(weights + s * w) for w in tries]) for s in (.05, -.05))
        top = np.argsort(-np.maximum(up, down))[:4]
        spread = np.concatenate([up[top], down[top]]).std() + 1e-6
        weights = weights + .04 / spread * np.tensordot(up[top] - down[top], tries[top], 1)
        seen = np.array([row[0] for e in episodes for row in e])
        mean, std = seen.mean(0), seen.std(0) + 1e-3
    save(path, episodes)


SETS = dict(   # how it is made, what the user types
    pendulum=(pendulum, ["--env", "Pendulum-v1"]),
    inverted_pendulum=(inverted_pendulum, ["--env", "InvertedPendulum-v5", "--max-episode-steps", "400"]),
    hopper=(hopper, ["--env", "Hopper-v5"]),
    halfcheetah=("bdpo/halfcheetah-replay-v0", []),
    maze=("bdpo/pointmaze-umaze-hidden-v0", []))
BDPO = [sys.executable, "-W", "ignore", "-m", "bdpo_lit"]


def source(name: str, folder: Path) -> str:
    "The data set, made if it is not there."
    make = SETS[name][0]
    if isinstance(make, str):
        subprocess.run([*BDPO, "collect", name], check=True)
        return make
    path = folder / f"{name}.npz"
    if not path.exists(): make(path)
    return str(path)


def train(name: str, seed: int, folder: Path, more: list[str]):
    "One run, unless it is there or another process is at it."
    run = folder / f"{name}-{seed}"
    try: run.with_suffix(".taken").touch(exist_ok=False)
    except FileExistsError: return
    start = time.monotonic()
    subprocess.run([*BDPO, "train", "--data", source(name, folder), *SETS[name][1], "--seed", str(seed),
                    "--run-dir", str(run), "--episodes", "40", *more], check=True)
    (run / "seconds").write_text(f"{time.monotonic() - start:.0f}")


def gather(folder: Path, seeds: list[int], more: list[str]) -> dict:
    "What every run's table says."
    runs = []
    for name in SETS:
        for seed in seeds:
            run = folder / f"{name}-{seed}"
            board = json.loads((run / "scoreboard.json").read_text())
            for row in board["rows"]: row.pop("returns", None)
            settings = json.loads((run / "config.json").read_text())
            runs.append(dict(set=name, seed=seed, seconds=int((run / "seconds").read_text()),
                             updates=settings["train"]["train_steps"], board=board))
    return dict(provenance=provenance(), options=more, runs=runs)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, default="runs/own_data")
    p.add_argument("--out", type=Path, default="bdpo_lit/results/own_data.json")
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    a, more = p.parse_known_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    for seed in a.seeds:
        for name in SETS: train(name, seed, a.folder, more)
    if all((a.folder / f"{n}-{s}" / "seconds").exists() for n in SETS for s in a.seeds):
        a.out.write_text(json.dumps(gather(a.folder, a.seeds, more), indent=1))
