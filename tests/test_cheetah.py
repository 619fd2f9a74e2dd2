"""The half cheetah: its data, the learner that makes them, the baseline, and the files that the pages draw from."""

import csv
import hashlib
import json
import subprocess
import sys

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from scipy import stats

from bdpo_lit.evidence.cheetah import (
    CHEETAH_ENV_ID,
    CHEETAH_ID,
    PRESET,
    LinearPolicy,
    ars,
    ars_step,
    collect_cheetah,
    expectile_loss,
    iql,
    make_cheetah_env,
    merge_moments,
    record,
    replay,
)
from bdpo_lit.offline.data import DataError, Transitions, load_minari, reference_scores
from bdpo_lit.offline.evaluation import evaluate
from bdpo_lit.reference.style import RESULTS

SMALL = "toy/cheetah-small-v0"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture(scope="module")
def policies():
    rng = np.random.default_rng(0)
    return [LinearPolicy(rng.normal(size=(6, 17)) / 10, rng.normal(size=17), rng.uniform(0.5, 2, 17)) for _ in range(3)]


def digest(episodes):
    return hashlib.sha256(b"".join(e.observations.tobytes() + e.actions.tobytes() + e.rewards.tobytes()
                                   for e in episodes)).hexdigest()


# ---- the learner

def test_ars_step_is_the_formula_written_out():
    rng = np.random.default_rng(0)
    W, deltas, returns = rng.normal(size=(2, 3)), rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2))
    best = sorted(range(5), key=lambda i: -max(returns[i]))[:3]
    used = [x for i in best for x in returns[i]]
    step = sum((returns[i][0] - returns[i][1]) * deltas[i] for i in best)
    want = W + 0.1 / (3 * np.std(used)) * step
    np.testing.assert_allclose(ars_step(W, deltas, returns, rate=0.1, best=3), want, rtol=1e-6)


@pytest.mark.parametrize("cut", [1, 17, 39])
def test_moments_of_two_parts_are_those_of_the_whole(cut):
    x = np.random.default_rng(cut).normal(5, 3, (40, 4))
    n, mean, var = merge_moments(*merge_moments(0, np.zeros(4), np.zeros(4), x[:cut]), x[cut:])
    assert n == 40
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose(var, x.var(0))


def test_linear_policy_is_the_formula_and_stays_in_bounds(policies):
    p, obs = policies[0], np.random.default_rng(1).normal(0, 5, (4, 17)).astype(np.float32)
    want = [np.clip(p.weight @ ((o - p.mean) / p.std), -1, 1) for o in obs]
    np.testing.assert_allclose(p(obs), want, rtol=1e-5, atol=1e-6)


def test_a_recorded_episode_is_what_the_policy_plays(policies):
    e = record(policies[0], make_cheetah_env(), np.random.default_rng(0))
    seen = policies[0](e.observations[:-1])
    np.testing.assert_allclose(seen, e.actions, atol=1e-6)
    played = evaluate(policies[0], make_cheetah_env, 1)                   # another start, the same kind of return
    assert played.lengths[0] == len(e.rewards) == 1000


def test_learning_depends_on_the_seed_only():
    one, first = ars(1, seed=3)
    two, second = ars(1, seed=3)
    np.testing.assert_array_equal(one[0].weight, two[0].weight)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (1, 8, 2) and np.ptp(first) > 0
    assert (one[0].std > 0).all()


# ---- the data

def test_same_seed_same_bytes_other_seed_other_data(policies):
    first = digest(replay(policies, 600, 1))
    assert digest(replay(policies, 600, 1)) == first != digest(replay(policies, 600, 2))
    code = ("import hashlib, numpy as np\nfrom bdpo_lit.evidence.cheetah import LinearPolicy, replay\n"
            "rng = np.random.default_rng(0)\n"
            "ps = [LinearPolicy(rng.normal(size=(6, 17)) / 10, rng.normal(size=17), rng.uniform(0.5, 2, 17)) "
            "for _ in range(3)]\n"
            "print(hashlib.sha256(b''.join(e.observations.tobytes() + e.actions.tobytes() + e.rewards.tobytes() "
            "for e in replay(ps, 600, 1))).hexdigest())")
    fresh = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.split()[-1] == first


def test_episodes_come_from_first_to_last_policy(policies):
    episodes = replay(policies, 3000, 0, noise=0.0)
    assert [len(e.rewards) for e in episodes] == [1000] * 3
    for p, e in zip(policies, episodes, strict=True):
        np.testing.assert_allclose(p(e.observations[:-1]), e.actions, atol=1e-6)


def test_stored_data_replay_in_the_environment(root):
    dataset = collect_cheetah(1300, 5, SMALL, progress=False, iterations=1)
    episodes = list(dataset.iterate_episodes())
    assert [len(e.rewards) for e in episodes] == [1000, 300]
    env = gym.make(CHEETAH_ENV_ID)
    for e in episodes:
        assert not e.terminations.any() and e.truncations.tolist() == [False] * (len(e.rewards) - 1) + [True]
        assert np.abs(e.actions).max() <= 1
        env.reset(seed=0)
        env.unwrapped.set_state(np.r_[0.0, e.observations[0][:8]], e.observations[0][8:])
        for t in range(50):                                                 # from the recorded start, the same motion
            obs, reward, *_ = env.step(e.actions[t])
            np.testing.assert_allclose(obs, e.observations[t + 1], atol=1e-6)
            np.testing.assert_allclose(reward, e.rewards[t], atol=1e-6)
    data = load_minari(SMALL)
    assert (len(data), data.obs_dim, data.action_dim, int(data.terminal.sum())) == (1300, 17, 6, 0)
    assert data.meta["env_id"] == CHEETAH_ENV_ID
    low, high = reference_scores("halfcheetah-medium-replay-v2")
    assert (data.meta["ref_min_score"], data.meta["ref_max_score"]) == (low, high)
    text = (root / SMALL / "data" / "metadata.json").read_text()
    assert str(root) not in text and "D4RL" in dataset.storage.metadata["description"]
    assert dataset.storage.metadata["recipe"] == dict(num_steps=1300, seed=5, noise=0.2, iterations=1, version=1)
    before = (root / SMALL / "data" / "main_data.hdf5").stat().st_mtime_ns
    collect_cheetah(1300, 5, SMALL, progress=False, iterations=1)         # found
    assert (root / SMALL / "data" / "main_data.hdf5").stat().st_mtime_ns == before
    for other in (dict(seed=6), dict(noise=0.1), dict(iterations=2), dict(num_steps=1400)):
        settings = dict(num_steps=1300, seed=5, dataset_id=SMALL, progress=False, iterations=1)
        with pytest.raises(DataError, match="another dataset_id"): collect_cheetah(**{**settings, **other})


@pytest.mark.parametrize("bad", [dict(num_steps=1), dict(iterations=0), dict(noise=-0.1)])
def test_impossible_recipes_are_refused(bad, root):
    with pytest.raises(DataError, match=f"{next(iter(bad))} must be at least"): collect_cheetah(**bad)
    assert not root.exists() or list(minari.list_local_datasets()) == []


# ---- the baseline

@pytest.mark.parametrize("level", [0.5, 0.7, 0.95])
def test_expectile_loss_is_least_at_the_expectile(level):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        loss = expectile_loss(x - v, level)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(v.detach()) == pytest.approx(stats.expectile(x.numpy(), level), abs=1e-4)


def two_steps(n=1500):
    "State -1 leads to state 1 if the action is positive, else nowhere; only state 1 pays, and only for small actions."
    g = torch.Generator().manual_seed(0)
    action = torch.rand(n, 1, generator=g) * 1.8 - 0.9
    late = torch.arange(n) % 2 == 1
    obs = torch.where(late, 1.0, -1.0)[:, None]
    stays = late | (action[:, 0] <= 0)
    next_obs = torch.where(stays[:, None], obs, torch.ones(n, 1))
    reward = torch.where(late, 5 - 5 * action[:, 0], torch.zeros(n))
    return Transitions(obs, action, reward, next_obs, stays.float(), torch.arange(n))


def test_iql_looks_ahead_and_cloning_does_not():
    data, states = two_steps(), np.array([[-1.0], [1.0]], np.float32)
    early, late = iql(data, 1000, sharpness=1.0, hidden=(32, 32))[0](states)[:, 0]
    assert early > 0.2 and late < -0.2
    early, late = iql(data, 600, sharpness=0.0, hidden=(32, 32))[0](states)[:, 0]
    assert abs(early) < 0.12 and abs(late) < 0.12


# ---- what the pages draw from

def test_results_say_where_they_come_from():
    files = sorted(RESULTS.glob("halfcheetah_*.json"))
    assert files
    for file in files:
        entries = json.loads(file.read_text())
        for entry in entries if isinstance(entries, list) else entries.values():
            assert {"command", "commit", "date", "torch", "machine"} <= entry["provenance"].keys(), file.name
            assert "dirty" not in entry["provenance"]["commit"], file.name


def test_results_were_made_with_the_preset_of_today():
    for run in json.loads((RESULTS / "halfcheetah_compare.json").read_text()):
        algorithm = {k: tuple(x) if isinstance(x, list) else x for k, x in run["config"]["algorithm"].items()}
        assert {**vars(PRESET.algorithm), **algorithm} == vars(PRESET.algorithm)
        train = {**run["config"]["train"], "seed": 0, "device": "auto"}
        assert {**vars(PRESET.train), **train} == vars(PRESET.train)
        assert run["data"]["id"] == CHEETAH_ID and len(run["recorded"]) == run["data"]["episodes"]


def test_the_published_table_is_whole_and_cites_its_source():
    text = (RESULTS / "paper_table1.csv").read_text()
    assert "2502.04778" in text.splitlines()[1]
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert len(rows) == 15 and len(rows[0]) == 14
    means = [np.mean([float(r["BDPO"]) for r in rows if ("antmaze" in r["task"]) is ant]) for ant in (False, True)]
    assert means == pytest.approx([95.2, 86.6], abs=0.06)
