"""Choosing a price without the environment: `judge_prices` on runs made here."""
import gymnasium as gym
import numpy as np
import pytest

from bdpo_lit.algorithm.bdpo import BDPOConfig
from bdpo_lit.evidence.ablations import judge_prices
from bdpo_lit.offline.data import from_arrays
from bdpo_lit.offline.training import TrainConfig, Training, scoreboard

TINY = BDPOConfig(gamma=0.5, num_steps=2, num_critics=2, num_samples=1, actor_hidden=(16,), critic_hidden=(16,),
                  time_dim=8, warmup_steps=0, actor_every=1, behavior_lr=1e-2, ema=0.1)


class Pays(gym.Env):
    "One step that pays its action."
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, "f4"), {}

    def step(self, action): return np.zeros(2, "f4"), float(action[0]), True, False, {}


def data(side, n=400):
    "Actions on one side, or on both."
    rng = np.random.default_rng(0)
    a = np.clip(rng.choice(side, (n, 1)) + 0.1 * rng.normal(size=(n, 1)), -1, 1).astype("f4")
    return from_arrays(np.zeros((n, 2), "f4"), a, a[:, 0], np.ones(n, bool), action_low=-1.0, action_high=1.0,
                       max_episode_steps=1)


def test_the_better_policy_is_told_by_the_data_alone(tmp_path):
    "Clones of high and of low actions, judged on data that hold both."
    runs = []
    for name, side in (("high", [0.5]), ("low", [-0.5])):
        for seed in range(2):
            run = Training(data(side), TrainConfig(300, 1, 64, seed=seed, eval_every=0, device="cpu"), TINY, Pays,
                           tmp_path / f"{name}-{seed}")
            for _ in run.run(): pass
            scoreboard(run, Pays, episodes=4, candidates=(1,))
        runs.append([tmp_path / f"{name}-{seed}" for seed in range(2)])
    high, low = judge_prices(data([-0.5, 0.5]), runs, steps=150)
    assert np.shape(high["episodes"]) == (2, 4) and np.shape(high["value"]) == (2, 2)
    assert np.mean(high["episodes"]) == pytest.approx(0.5, abs=0.2) == -np.mean(low["episodes"])
    assert np.min(high["value"]) > 0 > np.max(low["value"])
