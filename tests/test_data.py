"""Offline data: what both formats keep, and what each kind of bad file says."""

import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gymnasium as gym
import h5py
import matplotlib.pyplot as plt
import minari
import numpy as np
import pytest
import torch
from fuzz_data import fuzz
from minari.data_collector import EpisodeBuffer

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.offline.data import (
    ACTION_MARGIN,
    D4RL_TASKS,
    DataError,
    DataWarning,
    Scaling,
    Transitions,
    d4rl_folder,
    data_warnings,
    describe,
    environment_scores,
    episode_lengths,
    episode_returns,
    fetch_d4rl,
    from_arrays,
    is_file,
    known_spec,
    load,
    load_hdf5,
    load_minari,
    read_spec,
    reference_scores,
    scale_reward,
    summary,
)

OBS = gym.spaces.Box(-100, 100, (3,))
ACT = gym.spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def episode(T, terminal, rng, **changes):
    last = np.arange(T) == T - 1
    fields = dict(
        observations=rng.normal(size=(T + 1, 3)).astype(np.float32),
        actions=rng.uniform(-1, 1, (T, 2)).astype(np.float32),
        rewards=rng.normal(size=T),
        terminations=last & terminal,
        truncations=last & (not terminal),
    )
    return EpisodeBuffer(**{**fields, **changes})


def episodes(seed=0):
    rng = np.random.default_rng(seed)
    return [episode(T, terminal, rng) for T, terminal in ((5, False), (3, True), (1, True), (1, False), (6, False))]


def write_minari(name, buffers, obs=OBS, act=ACT, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(name, buffers, observation_space=obs, action_space=act, **kw)


def write_hdf5(path, buffers, **changes):
    column = {
        "observations": np.concatenate([e.observations[:-1] for e in buffers]),
        "actions": np.concatenate([e.actions for e in buffers]),
        "rewards": np.concatenate([e.rewards for e in buffers]),
        "terminals": np.concatenate([e.terminations for e in buffers]),
        "timeouts": np.concatenate([e.truncations for e in buffers]),
        **changes,
    }
    with h5py.File(path, "w") as f:
        for key, value in column.items():
            if value is not None:
                f[key] = value
    return path


def test_minari_keeps_every_transition_with_its_own_successor():
    buffers = episodes()
    write_minari("toy/all-v0", buffers)
    data, i = load_minari("toy/all-v0"), 0
    for k, e in enumerate(buffers):
        for t in range(len(e.rewards)):
            np.testing.assert_array_equal(data.obs[i], e.observations[t])
            np.testing.assert_array_equal(data.next_obs[i], e.observations[t + 1])
            np.testing.assert_allclose(data.action[i], np.clip(e.actions[t], -ACTION_MARGIN, ACTION_MARGIN), atol=1e-7)
            assert data.reward[i] == np.float32(e.rewards[t])
            assert data.terminal[i] == float(e.terminations[t]) and data.episode[i] == k
            i += 1
    assert i == len(data)
    for name in ("obs", "action", "reward", "next_obs", "terminal"):
        assert getattr(data, name).dtype == torch.float32 and getattr(data, name).is_contiguous()


def test_hdf5_drops_exactly_the_rows_without_successor(root):
    buffers = episodes()
    data, i = load_hdf5(write_hdf5(root / "d.hdf5", buffers)), 0
    for k, e in enumerate(buffers):
        for t in range(len(e.rewards)):
            if e.truncations[t]:
                continue
            np.testing.assert_array_equal(data.obs[i], e.observations[t])
            assert data.terminal[i] == float(e.terminations[t]) and data.episode[i] == k
            if not e.terminations[t]:
                np.testing.assert_array_equal(data.next_obs[i], e.observations[t + 1])
            i += 1
    assert i == len(data)


def test_hdf5_counts_steps_when_timeouts_are_missing(root):
    rng = np.random.default_rng(1)
    buffers = [episode(T, end, rng) for T, end in ((4, False), (4, True), (2, True), (4, False), (3, False))]
    recorded = load_hdf5(write_hdf5(root / "a.hdf5", buffers))
    counted = load_hdf5(write_hdf5(root / "b.hdf5", buffers, timeouts=None), max_episode_steps=4)
    for name in ("obs", "next_obs", "episode", "terminal"):
        assert torch.equal(getattr(recorded, name), getattr(counted, name)), name


def test_hdf5_unfinished_last_row_is_dropped_but_a_terminal_one_is_kept(root):
    rng = np.random.default_rng(2)
    cut = [episode(4, False, rng, truncations=np.zeros(4, bool))]
    assert len(load_hdf5(write_hdf5(root / "a.hdf5", cut))) == 3
    assert len(load_hdf5(write_hdf5(root / "b.hdf5", [episode(4, True, rng)]))) == 4


def test_hdf5_next_observations_keep_timeouts(root):
    buffers = episodes()
    following = np.concatenate([e.observations[1:] for e in buffers])
    data = load_hdf5(write_hdf5(root / "d.hdf5", buffers, next_observations=following), use_next_observations=True)
    np.testing.assert_array_equal(data.next_obs, following)


def test_column_vectors_are_read_as_scalars(root):
    buffers = episodes()
    columns = dict(rewards=np.concatenate([e.rewards for e in buffers])[:, None])
    data = load_hdf5(write_hdf5(root / "d.hdf5", buffers, **columns))
    assert data.reward.ndim == 1


def test_dict_observations_are_joined_alphabetically(root):
    space = gym.spaces.Dict(observation=gym.spaces.Box(-9, 9, (3,)), achieved_goal=gym.spaces.Box(-9, 9, (2,)))
    rng = np.random.default_rng(0)
    parts = {k: rng.normal(size=(5, *s.shape)).astype(np.float32) for k, s in space.spaces.items()}
    write_minari("toy/dict-v0", [episode(4, False, rng, observations=parts)], obs=space)
    data = load_minari("toy/dict-v0")
    for t in range(4):
        expected = np.concatenate([parts["achieved_goal"][t], parts["observation"][t]])
        np.testing.assert_array_equal(data.obs[t], expected)


def test_load_dispatches(root):
    write_minari("toy/x-v0", episodes())
    assert len(load("toy/x-v0")) == 16
    assert len(load(write_hdf5(root / "x.hdf5", episodes()))) == 13


def test_sample_is_uniform_seeded_and_keeps_rows_together():
    T = 50
    x = torch.arange(float(T))[:, None]
    data = Transitions(x, x / 100, x[:, 0], x + 1, torch.zeros(T), torch.zeros(T, dtype=torch.int64))
    batch = data.sample(100_000, torch.Generator().manual_seed(0))
    assert torch.equal(batch.next_obs, batch.obs + 1) and torch.equal(batch.reward, batch.obs[:, 0])
    count = torch.bincount(batch.reward.long(), minlength=T)
    assert (count - 2000).abs().max() < 5 * 2000**0.5
    again = data.sample(100_000, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


def test_scale_and_summary(root):
    data = load_hdf5(write_hdf5(root / "d.hdf5", episodes()), id="toy", ref_min_score=1.0)
    scaled = scale_reward(data, "locomotion")
    returns = episode_returns(scaled)
    assert float(returns.max() - returns.min()) == pytest.approx(1000, rel=1e-5)
    assert torch.equal(scale_reward(data, "antmaze").reward, data.reward * 100)
    assert data.meta["id"] == "toy" and data.meta["ref_min_score"] == 1.0 and "reward_scale" not in data.meta
    assert summary(data)["transitions"] == len(data)


BAD_HDF5 = {
    "missing": (lambda p: p / "none.hdf5", {}, "none.hdf5: no such file"),
    "empty file": (lambda p: touch(p / "e.hdf5", b""), {}, "not a readable HDF5 file"),
    "text": (lambda p: touch(p / "e.hdf5", b"hello" * 100), {}, "not a readable HDF5 file"),
    "truncated": (lambda p: truncated(p), {}, "may be truncated"),
    "no rewards": (dict(rewards=None), {}, "lacks rewards; found .*observations"),
    "nan": (dict(rewards=np.r_[np.zeros(3), np.nan, np.zeros(12)]), {}, "'rewards' has 1 rows with NaN.*index 3"),
    "inf": (dict(observations=np.r_[np.zeros((15, 3)), np.full((1, 3), np.inf)]), {}, "'observations'.*index 15"),
    "overflow": (dict(rewards=np.full(16, 1e300)), {}, "'reward' has .* infinite"),
    "long overflow": (dict(rewards=np.full(16, np.longdouble("1e400"))), {}, "'rewards' has .* infinite"),
    "complex": (dict(rewards=np.zeros(16, complex)), {}, "'rewards' has dtype complex"),
    "wide rewards": (dict(rewards=np.zeros((16, 3))), {}, r"'rewards' has shape \(16, 3\); expected one number"),
    "wide terminals": (dict(terminals=np.zeros((16, 2))), {}, "'terminals' has shape"),
    "no reward": (dict(rewards=np.zeros((16, 0))), {}, "'rewards' has shape"),
    "fractions": (dict(terminals=np.linspace(0, 1, 16)), {}, "'terminals' has 14 values other than 0 and 1.*index 1"),
    "negative": (dict(timeouts=np.full(16, -2)), {}, "'timeouts' has 16 values other than 0 and 1"),
    "no components": (dict(observations=np.zeros((16, 0))), {}, "neither empty"),
    "no action": (dict(actions=np.zeros((16, 0))), {}, "neither empty"),
    "no rows": (dict(observations=np.zeros((0, 3)), actions=np.zeros((0, 2)), rewards=np.zeros(0),
                     terminals=np.zeros(0), timeouts=np.zeros(0)), {}, "found 0 transitions"),
    "null": (dict(rewards=h5py.Empty("f")), {}, "'rewards' holds nothing"),
    "successors": (dict(next_observations=np.zeros((16, 2))), dict(use_next_observations=True), "'next_observations'"),
    "directory": (lambda p: (p / "d.hdf5").mkdir() or p / "d.hdf5", {}, "no such file"),
    "bounds in number": ({}, dict(action_low=[-1, -1, -1]), "action_low has 3 components, the actions 2"),
    "bounds in kind": ({}, dict(action_high="wide"), "action_high: could not convert"),
    "lengths": (dict(terminals=np.zeros(5, bool)), {}, "lengths differ.*'terminals': 5"),
    "scalar": (dict(terminals=np.float32(0)), {}, "lengths differ"),
    "text values": (dict(actions=np.full((16, 2), b"a")), {}, "'actions' has dtype"),
    "outside": (dict(actions=np.full((16, 2), 1.5)), {}, "16 actions lie outside .*action_low .*clip_outside"),
    "discrete": (dict(actions=np.zeros(16, int)), {}, "discrete actions are not supported"),
    "images": (dict(observations=np.zeros((16, 4, 4, 3), np.uint8)), {}, "images"),
    "no time-outs": (dict(timeouts=None), {}, "pass max_episode_steps"),
    "limit 0": (dict(timeouts=None), dict(max_episode_steps=0), "max_episode_steps must be at least 1, got 0"),
    "limit -1": ({}, dict(max_episode_steps=-1), "max_episode_steps must be at least 1, got -1"),
    "no successors": (dict(timeouts=np.ones(16, bool), terminals=np.zeros(16, bool)), {}, "found 0 usable transitions"),
    "bounds": ({}, dict(action_low=1.0, action_high=-1.0), "lower below upper"),
    "next": ({}, dict(use_next_observations=True), "lacks next_observations"),
}


def touch(path, content):
    path.write_bytes(content)
    return path


def truncated(p):
    content = write_hdf5(p / "full.hdf5", episodes()).read_bytes()
    return touch(p / "cut.hdf5", content[: len(content) // 2])


@pytest.mark.parametrize("case", BAD_HDF5)
def test_bad_hdf5(case, root):
    make, kwargs, message = BAD_HDF5[case]
    path = make(root) if callable(make) else write_hdf5(root / "bad.hdf5", episodes(), **make)
    with pytest.raises(DataError, match=f"(?s){message}") as error:
        load_hdf5(path, **kwargs)
    assert path.name in str(error.value) and error.value.__cause__ is None


def test_outside_actions_can_be_clipped(root):
    path = write_hdf5(root / "d.hdf5", episodes(), actions=np.full((16, 2), 1.5))
    assert load_hdf5(path, clip_outside=True).action.max() < 1


def edit(name, change):
    path = minari.storage.get_dataset_path(name) / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as f:
        change(f)


def replace_array(group, key, value):
    del group[key]
    group[key] = value


BAD_MINARI = {
    "nan": (lambda f: f["episode_1/rewards"].__setitem__(2, np.nan),
            "'rewards of episode 1' has 1 rows with NaN.*index 2"),
    "lengths": (lambda f: replace_array(f["episode_0"], "rewards", np.zeros(4)),
                "episode 0 has lengths .*'rewards': 4"),
    "no extra observation": (
        lambda f: replace_array(f["episode_0"], "observations", np.zeros((5, 3))), "one observation more"),
    "key": (lambda f: f["episode_2"].__delitem__("actions"), "'episode_2/actions' is missing"),
    "episode": (lambda f: f.__delitem__("episode_4"), "'episode_4' is missing"),
    "width": (lambda f: replace_array(f["episode_4"], "observations", np.zeros((7, 4))), "expected observations of 3"),
    "action width": (lambda f: replace_array(f["episode_4"], "actions", np.zeros((6, 3))), "differ in shape"),
    "flat": (lambda f: replace_array(f["episode_4"], "actions", np.zeros(6)), "vectors of actions"),
    "half": (lambda f: replace_array(f["episode_0"], "terminations", np.full(5, 0.5)), "values other than 0 and 1"),
    "three rewards": (lambda f: replace_array(f["episode_0"], "rewards", np.zeros((5, 3))), "one reward a step"),
    "group": (lambda f: f["episode_1"].move("actions", "a") or f["episode_1"].create_group("actions"), "is a Group"),
    "array": (lambda f: replace_array(f, "episode_1", np.zeros(3)), "not in a group"),
    "link": (lambda f: replace_array(f["episode_1"], "actions", h5py.ExternalLink("other.hdf5", "/x")), "is a link"),
    "text": (lambda f: replace_array(f["episode_0"], "rewards", np.full(5, b"x")), "'episode_0/rewards' has dtype"),
    "outside": (lambda f: f["episode_0/actions"].__setitem__(0, 7.0), "1 actions lie outside"),
}


@pytest.mark.parametrize("case", BAD_MINARI)
def test_bad_minari_content(case):
    change, message = BAD_MINARI[case]
    write_minari("toy/bad-v0", episodes())
    edit("toy/bad-v0", change)
    with pytest.raises(DataError, match=f"(?s)'toy/bad-v0'.*{message}"):
        load_minari("toy/bad-v0")


def test_truncated_minari_file():
    write_minari("toy/cut-v0", episodes())
    path = minari.storage.get_dataset_path("toy/cut-v0") / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="damaged"):
        load_minari("toy/cut-v0")


@pytest.mark.parametrize("lost", ["metadata.json", "main_data.hdf5"])
def test_half_written_minari_folder(lost):
    write_minari("toy/half-v0", episodes())
    (minari.storage.get_dataset_path("toy/half-v0") / "data" / lost).unlink()
    with pytest.raises(DataError, match="incomplete or damaged.*delete that folder"):
        load_minari("toy/half-v0")


SPACES = {
    "images": (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), ACT, "not images"),
    "discrete observations": (gym.spaces.Discrete(3), ACT, "observation space is Discrete"),
    "discrete actions": (OBS, gym.spaces.Discrete(3), "action space is Discrete"),
    "unbounded actions": (OBS, gym.spaces.Box(-np.inf, np.inf, (2,)), "must be finite"),
    "nested images": (gym.spaces.Dict(a=OBS, b=gym.spaces.Box(0, 1, (2, 2))), ACT, r"\['b'\]"),
}


@pytest.mark.parametrize("case", SPACES)
def test_unsupported_spaces(case):
    obs, act, message = SPACES[case]
    T = 3

    def draw(space, n):
        if isinstance(space, gym.spaces.Dict):
            return {k: draw(s, n) for k, s in space.spaces.items()}
        return np.array([space.sample() for _ in range(n)])

    stop = np.arange(T) == T - 1
    buffer = EpisodeBuffer(observations=draw(obs, T + 1), actions=draw(act, T), rewards=np.zeros(T),
                           terminations=np.zeros(T, bool), truncations=stop)
    write_minari("toy/space-v0", [buffer], obs=obs, act=act)
    with pytest.raises(DataError, match=message):
        load_minari("toy/space-v0")


def test_too_few_transitions():
    rng = np.random.default_rng(0)
    write_minari("toy/one-v0", [episode(1, True, rng)])
    with pytest.raises(DataError, match="found 1 usable transitions; at least 2"):
        load_minari("toy/one-v0")


def test_unknown_id_lists_local_sets_and_close_matches():
    write_minari("toy/hopper-v0", episodes())
    write_minari("other/set-v0", episodes())
    with pytest.raises(DataError) as error:
        load_minari("toy/hoper-v0")
    text = str(error.value)
    assert "did you mean: toy/hopper-v0" in text and "other/set-v0" in text and "download=True" in text


def test_the_books_own_data_are_collected_not_downloaded():
    with pytest.raises(DataError, match=r"bdpo collect maze\|halfcheetah"):
        load_minari("bdpo/pointmaze-umaze-hidden-v0")


def test_group_where_an_array_should_be(root):
    path = write_hdf5(root / "d.hdf5", episodes(), rewards=None)
    with h5py.File(path, "a") as f:
        f.create_group("rewards")
    with pytest.raises(DataError, match="'rewards' is a Group, not an array"):
        load_hdf5(path)


def test_download_without_network_is_one_clear_message(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(minari, "download_dataset", refuse)  # spare the retries
    with pytest.raises(DataError, match="could not be downloaded .*check the id and the network") as error:
        load_minari("D4RL/antmaze/umaze-v1", download=True)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert len(re.findall("\n", str(error.value))) == 0


def test_download_without_its_package_names_it(monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError('please install "minari[hf]"')

    monkeypatch.setattr(minari, "download_dataset", lacking)
    with pytest.raises(DataError, match=r"minari\[hf\]"):
        load_minari("D4RL/antmaze/umaze-v1", download=True)


def test_malformed_id(monkeypatch):
    with pytest.raises(DataError, match="hopper"):
        load_minari("hopper")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_stays_on_the_gpu():
    x = torch.arange(8.0)[:, None]
    data = Transitions(x, x / 10, x[:, 0], x + 1, torch.zeros(8), torch.zeros(8, dtype=torch.int64)).to("cuda")
    batch = data.sample(4, torch.Generator("cuda").manual_seed(0))
    assert all(t.device.type == "cuda" for t in batch)


# ---- scaling

LOW, HIGH = np.array([-0.3, 0.1], np.float32), np.array([0.7, 300.0], np.float32)


def raw_transitions(T=400, **meta):
    g = torch.Generator().manual_seed(0)
    obs = torch.randn(T, 3, generator=g) * torch.tensor([40.0, 0.01, 0.0]) + torch.tensor([-3.0, 2.0, 9.0])
    action = torch.from_numpy(LOW) + torch.rand(T, 2, generator=g) * torch.from_numpy(HIGH - LOW)
    meta = dict(id="raw", source="raw", action_low=LOW, action_high=HIGH) | meta
    return Transitions(obs, action, torch.rand(T), obs + 1, torch.zeros(T), torch.zeros(T, dtype=torch.int64), meta)


def test_scaling_is_what_it_says_and_comes_back():
    data = raw_transitions()
    scaling = Scaling.fit(data)
    scaled = scaling.apply(data)
    np.testing.assert_allclose(scaling.obs_mean, data.obs.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.obs_std[:2], data.obs.double().numpy().std(0)[:2], rtol=1e-12)
    np.testing.assert_allclose(scaled.action, (data.action.numpy() - 0.5 * (LOW + HIGH)) / (0.5 * (HIGH - LOW)),
                               atol=1e-6)
    for name in ("reward", "terminal", "episode"):
        assert torch.equal(getattr(scaled, name), getattr(data, name))
    assert scaled.meta["scaling"] is scaling and "scaling" not in data.meta and scaled.meta["id"] == "raw"
    assert scaled.meta["action_low"].tolist() == [-1, -1] and scaled.meta["action_high"].tolist() == [1, 1]
    np.testing.assert_allclose(scaling.env_action(scaled.action), data.action, rtol=1e-6)
    a = torch.rand(1000, 2, dtype=torch.float64) * 2 - 1
    np.testing.assert_allclose(scaling.action(scaling.env_action(a)), a, atol=1e-13)


def test_scaled_actions_land_exactly_on_the_bounds_and_never_outside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.normal(size=2).astype(np.float32)
        high = low + rng.exponential(size=2).astype(np.float32) + np.float32(1e-3)
        scaling = Scaling.fit(raw_transitions(action_low=low, action_high=high))
        assert (scaling.env_action(torch.ones(2)).numpy() == high).all()
        assert (scaling.env_action(-torch.ones(2)).numpy() == low).all()


def test_scaling_with_nothing_to_do_changes_no_bit():
    data = raw_transitions(action_low=-np.ones(2), action_high=np.ones(2))
    scaling = Scaling.fit(data, normalize_obs=False)
    assert torch.equal(scaling.apply(data).obs, data.obs) and torch.equal(scaling.apply(data).action, data.action)
    assert torch.equal(scaling.env_action(data.action), data.action)
    off = Scaling.fit(raw_transitions(action_low=None, action_high=None), normalize_obs=False, scale_actions=False)
    assert torch.equal(off.env_action(data.action), data.action)


def test_constant_coordinates_are_only_centred():
    scaling = Scaling.fit(raw_transitions())
    assert scaling.obs_std[2] == 1 and scaling.obs(torch.tensor([-3.0, 2.0, 9.5]))[2] == 0.5
    assert scaling.obs_std[1] < 0.02                                             # small, but it moves


@pytest.mark.parametrize("changes, message", [
    (dict(action_low=None), "one lower and one upper bound for each of the 2"),
    (dict(action_high=np.ones(3)), "one lower and one upper bound"),
    (dict(action_low=HIGH, action_high=LOW), "lower below upper"),
    (dict(action_high=np.array([np.inf, 1])), "must be finite"),
    (dict(action_low=np.array([np.nan, 0])), "must be finite"),
])
def test_bad_bounds_are_refused(changes, message):
    with pytest.raises(DataError, match=f"raw.*{message}"):
        Scaling.fit(raw_transitions(**changes))


def test_nothing_is_scaled_twice_or_by_the_maps_of_another_set():
    data = raw_transitions()
    scaling = Scaling.fit(data)
    for again in (Scaling.fit, scaling.apply):
        with pytest.raises(DataError, match="already scaled"):
            again(scaling.apply(data))
    other = replace(data, obs=data.obs[:, :2].contiguous(), next_obs=data.next_obs[:, :2].contiguous())
    with pytest.raises(DataError, match="2 and 2 components, but the scaling is for 3 and 2"):
        scaling.apply(other)


def test_an_agent_takes_raw_observations_and_gives_actions_of_the_environment(tmp_path):
    data, config = raw_transitions(), BDPOConfig(num_critics=2, actor_hidden=(8,), critic_hidden=(8,), time_dim=4)
    scaling = Scaling.fit(data)
    agent, loaded = BDPO(3, 2, config), BDPO(3, 2, config, seed=1)
    plain = agent.policy(seed=5)(scaling.obs(data.obs).numpy())
    agent.set_scaling(**vars(scaling))
    torch.save(agent.state_dict(), tmp_path / "agent.pt")
    loaded.load_state_dict(torch.load(tmp_path / "agent.pt", weights_only=True))
    played = loaded.policy(seed=5)(data.obs.numpy())
    assert played.dtype == np.float32 and (played >= LOW).all() and (played <= HIGH).all()
    np.testing.assert_array_equal(played, scaling.env_action(torch.from_numpy(plain)))
    with pytest.raises(ValueError, match="obs_mean must be 3 finite numbers"):
        agent.set_scaling(**{**vars(scaling), "obs_mean": torch.zeros(2), "obs_std": torch.ones(2)})
    with pytest.raises(ValueError, match="action_half must be 2 finite positive numbers"):
        agent.set_scaling(**{**vars(scaling), "action_half": torch.tensor([1.0, 0.0])})


# ---- D4RL by name, from a real server

TASK = "hopper-medium-v2"


class Server(ThreadingHTTPServer):
    "Serves one body under every path; `cuts` says after how many bytes each answer breaks off (None: not)."

    def __init__(self, body, ranges=True, cuts=(), status=200, announced=None, shift=0):
        self.body, self.ranges, self.cuts, self.status = body, ranges, list(cuts), status
        self.announced, self.asked, self.shift = announced, [], shift   # answers begin `shift` bytes late
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *args):
        pass                                        # the client went away

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(server.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start += server.shift if start else 0
        body = server.body[start:]
        self.send_response(206 if start else server.status)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.send_header("Content-Length", str(server.announced or len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(root):
    servers = []

    def start(body=None, **kw):
        if body is None:
            body = write_hdf5(root / "served.hdf5", [e for k in range(40) for e in episodes(k)]).read_bytes()
        servers.append(Server(body, **kw))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fetch(root):
    return lambda server, task=TASK, **kw: fetch_d4rl(
        task, root / "cache", progress=False, base_url=getattr(server, "url", server), timeout=5.0, **kw)


@pytest.mark.parametrize("task", D4RL_TASKS)
def test_every_task_is_asked_for_under_its_own_path_and_loads_by_name(task, serve, fetch, root):
    server, spec = serve(), D4RL_TASKS[task]
    path = fetch(server, task)
    assert server.asked == [("/" + spec.file, None)] and path == root / "cache" / spec.file.split("/")[1]
    data = load(task, folder=root / "cache", download=False)
    low, high = reference_scores(task)
    assert {"id": task, "env_id": spec.env_id, "ref_min_score": low, "ref_max_score": high}.items() <= data.meta.items()
    assert len(data) == len(load_hdf5(path))
    if spec.env_id:
        assert gym.spec(spec.env_id).max_episode_steps == spec.max_episode_steps
        assert re.sub("-.*", "", spec.env_id).lower() == task.split("-")[0]


def test_no_two_tasks_share_a_file():
    assert len({spec.file for spec in D4RL_TASKS.values()}) == len(D4RL_TASKS) == 21


def test_a_download_is_whole_recorded_and_not_repeated(serve, fetch, root):
    server = serve()
    path = fetch(server)
    assert path.read_bytes() == server.body and sorted(p.name for p in path.parent.iterdir()) == [
        "hopper_medium-v2.hdf5", "hopper_medium-v2.hdf5.sha256"]
    digest = hashlib.sha256(server.body).hexdigest()
    assert path.with_name(path.name + ".sha256").read_text() == f"{digest}  {path.name}\n"
    assert fetch(server) == fetch(server, sha256=digest.upper()) == path and len(server.asked) == 1


@pytest.mark.parametrize("cuts", [[1000], [1000, 5000, 1], [0, 100]])
def test_a_broken_connection_is_taken_up_where_it_ended(cuts, serve, fetch):
    server = serve(cuts=cuts)
    if cuts[0] == 0:
        with pytest.raises(DataError, match="after 0 of .*What arrived is kept"):
            fetch(server)
        cuts = cuts[1:]
    assert fetch(server).read_bytes() == server.body
    starts = [f"bytes={sum(cuts[: k + 1])}-" for k in range(len(cuts))]
    assert [r for _, r in server.asked if r] == starts


def test_a_partial_file_of_an_earlier_run_is_completed(serve, fetch, root):
    server = serve()
    part = root / "cache" / "hopper_medium-v2.hdf5.part"
    part.parent.mkdir()
    for kept in (server.body[:3000], server.body, server.body + b"too much"):    # cut, complete, longer than the file
        part.write_bytes(kept)
        path = fetch(server)
        assert path.read_bytes() == server.body and not part.exists()
        path.unlink()
    assert [r for _, r in server.asked] == ["bytes=3000-", f"bytes={len(server.body)}-",
                                            f"bytes={len(server.body) + 8}-", None]


def test_another_part_than_the_one_asked_for_is_not_appended(serve, fetch, root):
    part = root / "cache" / "hopper_medium-v2.hdf5.part"
    part.parent.mkdir()
    server = serve(shift=7)
    part.write_bytes(server.body[:100])
    assert fetch(server).read_bytes() == server.body and [wanted for _, wanted in server.asked] == ["bytes=100-", None]


def test_one_process_fetches_at_a_time(serve, fetch, root):
    (root / "cache").mkdir()
    code = "import filelock, sys; f = filelock.FileLock(sys.argv[1]); f.acquire(); print(flush=True); input()"
    lock = root / "cache" / "hopper_medium-v2.hdf5.lock"
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    server = serve()
    with pytest.raises(DataError, match="another process is fetching hopper_medium-v2.hdf5"): fetch(server)
    assert not server.asked
    other.kill()
    other.communicate()
    assert fetch(server).read_bytes() == server.body and not lock.exists()


def test_a_server_without_ranges_begins_again(serve, fetch):
    server = serve(ranges=False, cuts=[1000])
    assert fetch(server).read_bytes() == server.body
    assert [r for _, r in server.asked] == [None, "bytes=1000-"]


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(serve, fetch, root):
    server = serve(ranges=False, cuts=[1000] * 9)
    with pytest.raises(DataError, match="ended after 1000 of .*put it at") as error:
        fetch(server)
    assert len(server.asked) == 2 and not (root / "cache" / "hopper_medium-v2.hdf5").exists()
    assert str(root / "cache" / "hopper_medium-v2.hdf5") in str(error.value) and server.url in str(error.value)


@pytest.mark.parametrize("body, message", [
    (b"<html>please log in</html>", "not a readable HDF5 file"),
    ("half", "not a readable HDF5 file"),
    ("keys", "lacks rewards"),
    ("lengths", "lengths differ"),
])
def test_what_is_not_the_file_is_thrown_away(body, message, serve, fetch, root):
    if body == "half":                              # announced as whole
        whole = write_hdf5(root / "x.hdf5", episodes()).read_bytes()
        body = whole[: len(whole) // 2]
    elif body == "keys":
        body = write_hdf5(root / "x.hdf5", episodes(), rewards=None).read_bytes()
    elif body == "lengths":
        body = write_hdf5(root / "x.hdf5", episodes(), timeouts=np.zeros(3, bool)).read_bytes()
    with pytest.raises(DataError, match=f"is not the file: .*{message}"):
        fetch(serve(body))
    assert list((root / "cache").iterdir()) == []
    good = serve()
    assert fetch(good).read_bytes() == good.body    # nothing of the bad one is left over


@pytest.mark.parametrize("announced, message", [
    (10**7, "ended after [0-9]+ of 10000000 bytes"), (2000, "is not the file: .*not a readable HDF5 file")])
def test_a_size_that_is_not_the_announced_one(announced, message, serve, fetch):
    with pytest.raises(DataError, match=message):
        fetch(serve(announced=announced, ranges=False))


def test_the_expected_checksum(serve, fetch, root):
    server = serve()
    with pytest.raises(DataError, match="its SHA-256 is .* expected 00"):
        fetch(server, sha256="00" * 32)
    assert list((root / "cache").iterdir()) == []
    path = fetch(server, sha256=hashlib.sha256(server.body).hexdigest())
    with pytest.raises(DataError, match="expected 00"):
        fetch(server, sha256="00" * 32)
    assert path.exists()                            # what the user has is never deleted


def test_a_file_that_changed_on_disk_is_refused(serve, fetch):
    server = serve()
    path = fetch(server)
    content = bytearray(server.body)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="its SHA-256 is .*Delete it and hopper_medium-v2.hdf5.sha256"):
        fetch(server)
    assert len(server.asked) == 1 and path.exists()


def test_files_of_the_d4rl_package_are_found(root, monkeypatch, serve):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(root / "theirs"))
    (root / "theirs").mkdir()
    path = write_hdf5(root / "theirs" / "hopper_medium-v2.hdf5", episodes())
    assert fetch_d4rl(TASK, base_url="http://127.0.0.1:1/") == path and len(load(TASK)) == 13
    assert path.with_name(path.name + ".sha256").exists()
    path.with_name(path.name + ".sha256").unlink()
    path.write_bytes(b"not data")
    with pytest.raises(DataError, match="not a readable HDF5 file.*damaged, or another one"):
        load(TASK)
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(root))
    assert d4rl_folder() == root / ".d4rl" / "datasets"


def test_a_folder_that_cannot_be_written_to_is_no_fault(root, fetch, monkeypatch):
    path = root / "cache" / "hopper_medium-v2.hdf5"
    path.parent.mkdir()
    write_hdf5(path, episodes())
    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (_ for _ in ()).throw(PermissionError("read-only"))
                        if self.suffix == ".sha256" else real(self, *a, **k))
    with pytest.warns(UserWarning, match="changes of hopper_medium-v2.hdf5 will not be noticed"):
        assert fetch("http://127.0.0.1:1/") == path


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_refuses(status, serve, fetch):
    with pytest.raises(DataError, match=f"HTTP Error {status}"):
        fetch(serve(b"no", status=status))


def test_without_a_network_the_place_for_the_file_is_named(root, fetch):
    with pytest.raises(DataError) as error:
        fetch("http://127.0.0.1:1/")
    text = str(error.value)
    assert "could not be downloaded" in text and str(root / "cache" / "hopper_medium-v2.hdf5") in text
    assert "get http://127.0.0.1:1/gym_mujoco_v2/hopper_medium-v2.hdf5" in text and "\n" not in text
    with pytest.raises(DataError, match="pass download=True, or get http://rail"):
        load(TASK, folder=root / "cache", download=False)


def test_misspelt_tasks():
    with pytest.raises(DataError, match="did you mean hopper-medium-v2"):
        fetch_d4rl("hoper-medium-v2")
    with pytest.raises(DataError, match="did you mean: .*hopper-medium-v2"):
        load("hopper-medium-v0")


@pytest.mark.parametrize("task", [TASK, "antmaze-umaze-v2"])
def test_tasks_without_recorded_timeouts(task, root):
    rng, spec = np.random.default_rng(0), D4RL_TASKS[task]
    path = root / spec.file.split("/")[1]
    write_hdf5(path, [episode(1000, False, rng), episode(700, True, rng), episode(1000, False, rng)], timeouts=None)
    if task == TASK:
        data = load(task, folder=root)
        assert len(data) == 2698 and data.episode.unique().tolist() == [0, 1, 2]
    else:
        with pytest.raises(DataError, match="has no 'timeouts'"):   # goals are terminal, but end no episode there
            load(task, folder=root)


def d4rl_q_learning_rule(raw):
    "The rule of d4rl.qlearning_dataset for files with time-outs, told row by row: (row, successor, terminal)."
    N = len(raw["rewards"])
    return [(i, i + 1, bool(raw["terminals"][i])) for i in range(N - 1) if not raw["timeouts"][i]]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_the_published_results_were_made_from(seed, root):
    "Also where terminal rows come in clusters in the middle of an episode, as in antmaze."
    rng, N = np.random.default_rng(seed), 300
    raw = dict(observations=rng.normal(size=(N, 3)).astype(np.float32), actions=rng.uniform(-1, 1, (N, 2)),
               rewards=rng.normal(size=N).astype(np.float32), timeouts=np.arange(N) % 50 == 49)
    raw["terminals"] = (np.isin(np.arange(N) // 4, rng.integers(0, N // 4, 9))) & ~raw["timeouts"]
    raw["terminals"][-1] = raw["timeouts"][-1] = False
    with h5py.File(root / "d.hdf5", "w") as f:
        for key, x in raw.items():
            f[key] = x
    data, expected = load_hdf5(root / "d.hdf5"), d4rl_q_learning_rule(raw)
    assert len(data) == len(expected)
    for k, (i, after, terminal) in enumerate(expected):
        assert torch.equal(data.obs[k], torch.from_numpy(raw["observations"][i])) and data.terminal[k] == terminal
        assert terminal or torch.equal(data.next_obs[k], torch.from_numpy(raw["observations"][after]))


def test_minari_sets_of_the_same_robot_get_no_score_of_d4rl():
    write_minari("mujoco/hopper/medium-v0", episodes())
    data = load("mujoco/hopper/medium-v0")
    assert (data.meta["ref_min_score"], data.meta["ref_max_score"]) == (None, None)
    with pytest.raises(ValueError, match="no D4RL reference scores"):
        reference_scores("mujoco/hopper/medium-v0")


# ---- a look

def test_describe(root, capsys):
    data = load_hdf5(write_hdf5(root / "d.hdf5", episodes()))
    figure = describe(data, coords=(2, 0))
    assert [a.get_xlabel() for a in figure.axes] == ["return", "length (steps)", "$s_2$", "action"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in summary(data)) and len(shown.splitlines()) == len(summary(data))
    for said in (r"dropped  3\n", r"length_min  1\n", r"length_median  3\n", r"length_max  6\n", r"action_low  -1\n"):
        assert re.search(said, shown), said
    returns, lengths = (sum(p.get_height() for p in a.patches) for a in figure.axes[:2])
    assert returns == len(torch.unique(data.episode)) and lengths == 5      # one had a single row, a time-out
    plain = replace(data, reward=torch.zeros(len(data)), meta=data.meta | dict(time_limit=4, env_id="Hopper-v5"))
    describe(plain)
    shown = capsys.readouterr().out
    assert re.search(r"environment  Hopper-v5\n(.*\n)*.*warning  all rewards are 0", shown)
    assert "warning  2 of 5 episodes are longer than the environment's 4 steps" in shown
    json.dumps(summary(plain))
    far = torch.where(torch.arange(len(data))[:, None] % 2 > 0, 3e38, -3e38).expand(-1, 3).contiguous()
    describe(replace(data, obs=far))                # their distance is no float32
    one = Transitions(data.obs[:, :1].contiguous(), data.action, data.reward, data.next_obs[:, :1].contiguous(),
                      data.terminal, data.episode)
    describe(one)                                   # of one component: no second to draw it against
    for bad in ((0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="two of 0 to 2"):
            describe(data, coords=bad)
    plt.close("all")


# ---- files from strangers

def linked(kind):
    "A file whose actions lie elsewhere: bytes of a secret file as numbers, where that is possible."
    def make(p):
        path, secret = write_hdf5(p / "d.hdf5", episodes(), actions=None), p / "secret"
        write_hdf5(p / "other.hdf5", episodes())
        secret.write_bytes(b"0123456789abcdef" * 8)
        with h5py.File(path, "a") as f:
            if kind == "external": f.create_dataset("actions", (16, 2), "<f4", external=[(secret, 0, 128)])
            if kind == "virtual":
                layout = h5py.VirtualLayout((16, 2), "f8")
                layout[:] = h5py.VirtualSource(p / "other.hdf5", "actions", (16, 2))
                f.create_virtual_dataset("actions", layout)
            if kind == "external link": f["actions"] = h5py.ExternalLink(p / "other.hdf5", "/actions")
            if kind == "soft link": f["actions"] = h5py.SoftLink("/observations")
            if kind == "dangling": f["actions"] = h5py.SoftLink("/nowhere")
        return path
    return make


@pytest.mark.parametrize("kind, message", [
    ("external", "keeps its values in other files"), ("virtual", "keeps its values in other files"),
    ("external link", "is a link"), ("soft link", "is a link"), ("dangling", "is a link")])
def test_what_lies_elsewhere_is_not_read(kind, message, root):
    with pytest.raises(DataError, match=f"d.hdf5: 'actions' {message}"): load_hdf5(linked(kind)(root))


@pytest.mark.parametrize("shape, chunks", [((10**13, 2), (100, 2)), ((16, 10**9), (16, 10)), ((16, 2), (2**26, 2)),
                                           ((2**23,), (1000,))])
def test_a_file_cannot_ask_for_more_memory_than_its_size_allows(shape, chunks, root):
    path = write_hdf5(root / "d.hdf5", episodes(), actions=None)
    with h5py.File(path, "a") as f:
        if len(shape) == 1:                          # equal lengths, all of them fill values
            for key in list(f): del f[key]
            for key in ("rewards", "terminals", "timeouts"): f.create_dataset(key, shape, "f4", chunks=chunks)
            f.create_dataset("observations", (*shape, 3), "f4", chunks=(1000, 3))
            shape, chunks = (*shape, 2), (1000, 2)
        f.create_dataset("actions", shape, "f4", chunks=chunks, maxshape=(None, None))
    with pytest.raises(DataError, match="room for|lengths differ"): load_hdf5(path)


def test_compressed_files_have_room(root):
    big, T = root / "d.hdf5", 400_000
    with h5py.File(big, "w") as f:
        for key, width in dict(observations=(3,), actions=(2,), rewards=(), terminals=(), timeouts=()).items():
            f.create_dataset(key, data=np.zeros((T, *width), np.float32), compression="gzip")
    assert big.stat().st_size < 200_000
    with pytest.warns(DataWarning, match="all rewards are 0"): assert len(load_hdf5(big)) == T - 1


@pytest.mark.parametrize("kind", [">f8", ">f4", "<f2", "g", ">i2", "u1", "?"])
def test_numbers_of_any_machine(kind, root):
    buffers = episodes()
    obs = np.round(np.concatenate([e.observations[:-1] for e in buffers])).clip(0, 1)
    data = load_hdf5(write_hdf5(root / "d.hdf5", buffers, observations=obs.astype(kind)), max_episode_steps=99)
    expected = load_hdf5(write_hdf5(root / "e.hdf5", buffers, observations=obs.astype(np.float32)))
    assert torch.equal(data.obs, expected.obs)
    assert torch.equal(load_hdf5(write_hdf5(root / "d.hdf5", buffers, timeouts=None, terminals=np.concatenate(
        [e.terminations | e.truncations for e in buffers]).astype(kind)), 99).terminal.sum(), torch.tensor(5.0))


@pytest.mark.parametrize("name", ["mit Leerzeichen.hdf5", "данные-数据.hdf5", "CAPITALS.HDF5", "x.H5"])
def test_paths_of_all_kinds(name, root, monkeypatch):
    write_hdf5(root / name, episodes())
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert len(load(root / name)) == len(load(f"~/{name}")) == 13 and is_file(f"~/{name}")


PACKED = {
    "declared": (lambda f, x: f.create_dataset("rewards", (16,), "f4"), "not written to its end"),
    "in part": (lambda f, x: f.create_dataset("rewards", (16,), "f4", chunks=(4,)).__setitem__(slice(9), 1),
                "not written"),
    "to a gigabyte": (lambda f, x: stored(f, zlib.compress(bytes(10**7), 9), compression="gzip"),
                      "not unpack to its size"),
    "too little": (lambda f, x: stored(f, x.tobytes()[:-1]), "not unpack to its size"),
    "too little, unpacked": (lambda f, x: stored(f, x.tobytes()[:-1], 1, compression="gzip"), "not unpack to its size"),
    "lzf": (lambda f, x: f.create_dataset("rewards", data=x, compression="lzf"), "h5repack"),
    "in integers": (lambda f, x: f.create_dataset("rewards", data=x.astype(int), scaleoffset=0), "h5repack"),
    "words": (lambda f, x: f.create_dataset("rewards", (16,), h5py.enum_dtype({"no": 0, "yes": 1})), "dtype {'no': 0"),
}


def stored(f, piece, mask=0, **kw):
    f.create_dataset("rewards", (16,), "f4", chunks=(16,), **kw).id.write_direct_chunk((0,), piece, mask)


@pytest.mark.parametrize("case", PACKED)
def test_arrays_must_be_whole_and_unpack_to_their_size(case, root):
    make, message = PACKED[case]
    path = write_hdf5(root / "d.hdf5", episodes(), rewards=None)
    with h5py.File(path, "a") as f: make(f, np.linspace(0, 1, 16, dtype="f4"))
    with pytest.raises(DataError, match=f"d.hdf5: 'rewards' .*{message}"): load_hdf5(path)


@pytest.mark.parametrize("kw", [dict(compression="gzip", shuffle=True, fletcher32=True),
                                dict(chunks=(3,), fletcher32=True),
                                dict(compression="gzip", chunks=(5,), maxshape=(None,))])
def test_arrays_packed_simply_are_read(kw, root):
    plain = load_hdf5(write_hdf5(root / "e.hdf5", episodes()))
    with h5py.File(write_hdf5(root / "d.hdf5", episodes(), rewards=None), "a") as f, h5py.File(root / "e.hdf5") as g:
        f.create_dataset("rewards", data=g["rewards"][()], **kw)
    assert same(plain, load_hdf5(root / "d.hdf5"))


def test_a_flipped_bit_is_noticed_where_there_is_a_checksum(root):
    with h5py.File(root / "d.hdf5", "w") as f:
        for k, x in columns(episodes()).items(): f.create_dataset(k, data=x, fletcher32=True)
        at = f["rewards"].id.get_chunk_info(0).byte_offset
    body = bytearray((root / "d.hdf5").read_bytes())
    body[at + 5] ^= 1
    with pytest.raises(DataError, match="d.hdf5: not a readable"): load(touch(root / "d.hdf5", body))


def test_more_than_the_memory_of_this_machine_is_refused(root, monkeypatch):
    path = write_hdf5(root / "d.hdf5", episodes())
    monkeypatch.setattr("bdpo_lit.offline.data._memory", lambda: 1000.0)
    with pytest.raises(DataError, match="d.hdf5: 'actions' has 128 bytes.* take a part"): load(path)


def test_a_message_cannot_play_tricks_on_a_terminal(root):
    with h5py.File(root / "d.hdf5", "w") as f: h5py.h5g.create(f.id, b"\x1b[2J\xff")
    with pytest.raises(DataError, match="lacks observations") as error: load(root / "d.hdf5")
    assert str(error.value).isprintable() and "x1b[2J" in str(error.value)
    assert str(DataError("a\x1b[2J\nb\udcff")) == "a\\x1b[2J\nb\\udcff"


FUZZ = int(os.environ.get("BDPO_LIT_FUZZ", 300))    # how many odd inputs; set more for an hour of them
FROM = int(os.environ.get("BDPO_LIT_FUZZ_FROM", 0))


def test_odd_files_are_read_rightly_or_refused_by_name(root):
    found = fuzz(FUZZ, FROM, root)
    assert not found["bad"], "\n".join(found["bad"][:20])
    assert found["right"] > FUZZ / 10 and found["refused"] > FUZZ / 2 and found["grown_mb"] < 500
    print({k: x for k, x in found.items() if k not in ("kinds", "bad")})


@pytest.mark.parametrize("guard, without, fault, said", [
    ("_insist_whole", lambda x, what: None, "strange_hdf5", "silently accepted"),
    ("_insist_finite", lambda what, good: None, "wrong_array", "silently accepted"),
    ("_flags", lambda name, x, source: x.astype(bool), "wrong_array", "silently accepted"),
    ("_insist_steps", lambda stored, steps, source: None, "other_episodes", "silently accepted"),
    ("_references", lambda stored, source: {}, "metadata", "silently accepted"),
    ("_boundaries", lambda terminal, timeout, steps: (timeout, np.cumsum(terminal)), "other_form", "other numbers")])
def test_a_loader_without_a_guard_is_found_out(guard, without, fault, said, root, monkeypatch):
    monkeypatch.setattr(f"bdpo_lit.offline.data.{guard}", without)
    assert any(said in bad for bad in fuzz(60, FROM, root, only=fault)["bad"])


# ---- tables of one's own

def columns(buffers):
    column = lambda get: np.concatenate([get(e) for e in buffers])
    return dict(observations=column(lambda e: e.observations[:-1]), actions=column(lambda e: e.actions),
                rewards=column(lambda e: e.rewards), terminals=column(lambda e: e.terminations),
                timeouts=column(lambda e: e.truncations))


FIELDS = ("obs", "action", "reward", "next_obs", "terminal", "episode")


def same(a, b): return all(torch.equal(getattr(a, k), getattr(b, k)) for k in FIELDS)


def test_arrays_files_and_npz_are_one(root):
    table = columns(episodes())
    np.savez(root / "d.npz", **table)
    np.savez_compressed(root / "e.npz", **table)
    (root / "e.npz").rename(root / "E.NPZ")
    data = load_hdf5(write_hdf5(root / "d.hdf5", episodes()))
    assert all(same(data, x) for x in (from_arrays(**table), load(root / "d.npz"), load(str(root / "E.NPZ")),
                                       from_arrays(**{k: torch.from_numpy(x) for k, x in table.items()}),
                                       from_arrays(**{k: x.tolist() for k, x in table.items()})))
    assert (data.meta["id"], from_arrays(**table, name="mine").meta["id"]) == ("d", "mine")


@pytest.mark.parametrize("change, message", [
    (dict(observations=[[1.0], [2.0, 3.0]]), "'observations' is no array"),
    (dict(actions=[[object()]] * 16), "'actions' has dtype object"),
    (dict(rewards=np.zeros(3)), "mine: lengths differ"),
    (dict(timeouts=None), "has no 'timeouts'; pass max_episode_steps"),
    (dict(terminals=np.full(16, 7)), "values other than 0 and 1"),
    (dict(action_low=[0, 0, 0]), "action_low has 3"),
    (dict(time_limit=0), "time_limit must be at least 1"),
])
def test_arrays_are_checked_like_files(change, message):
    with pytest.raises(DataError, match=f"mine: .*{message}|mine: {message}|{message}"):
        from_arrays(**columns(episodes()) | change, name="mine")


def test_bounds_of_one_component_each():
    table = columns(episodes())
    wide = table | dict(actions=table["actions"] * [2, 5])
    with pytest.raises(DataError, match="pass action_low and action_high"): from_arrays(**wide)
    data = from_arrays(**wide, action_low=[-2, -5], action_high=(2, 5))
    assert data.meta["action_high"].tolist() == [2, 5] and data.action.abs().max() > 1
    assert len(from_arrays(**wide, action_low=-5, action_high=5)) == 13


def test_bounds_of_a_file(root):
    path = write_hdf5(root / "d.hdf5", episodes(), actions=np.linspace(-1.9, 1.9, 32).reshape(16, 2))
    with pytest.raises(DataError, match=r"--action-low, --action-high\), or name it \(--env\)"): load(path)
    assert load(path, action_low=-2, action_high=2).meta["action_low"].tolist() == [-2, -2]


def test_successors_tell_episodes_where_marks_lack():
    buffers = episodes()
    following = np.concatenate([e.observations[1:] for e in buffers])
    table = columns(buffers) | dict(timeouts=None, next_observations=following)
    data = from_arrays(**table)
    assert len(data) == 16 and episode_lengths(data).tolist() == [5, 3, 1, 1, 6] and data.meta["dropped"] == 0
    order = np.random.default_rng(1).permutation(16)
    shuffled = from_arrays(**{k: None if x is None else x[order] for k, x in table.items()})
    assert len(shuffled) == 16 and len(episode_lengths(shuffled)) >= 14


def test_a_limit_is_obeyed_where_some_time_outs_are_marked(root):
    rng = np.random.default_rng(0)
    buffers = [episode(10, False, rng) for _ in range(4)]
    marks = np.concatenate([e.truncations for e in buffers])
    marks[[19, 39]] = False
    path = write_hdf5(root / "d.hdf5", buffers, timeouts=marks)
    data = load_hdf5(path, max_episode_steps=10)
    assert len(data) == 36 and len(episode_returns(data)) == 4 and not data_warnings(data)
    with pytest.warns(DataWarning, match="1 of 3 episodes are longer than the environment's 10 .*the longest has 20"):
        judged = load_hdf5(path, time_limit=10)      # the environment's: marks decide, but nobody is left in the dark
    assert len(judged) == 37 and summary(judged)["length_max"] == 20


def test_warnings_name_what_misleads():
    table = columns(episodes())
    with pytest.warns(DataWarning, match="mine: all rewards are 0; there is nothing to learn"):
        from_arrays(**table | dict(rewards=np.zeros(16)), name="mine")
    with pytest.warns(DataWarning, match="all rewards are 1; only the ends of episodes"):
        from_arrays(**table | dict(rewards=np.ones(16)))
    still = table["actions"].copy()
    still[:, 1] = 0.25
    with pytest.warns(DataWarning, match=r"components of the action that never change: 1 \(0.25\)"):
        from_arrays(**table | dict(actions=still))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data_warnings(from_arrays(**table)) == []


def test_lengths_of_a_part_are_counted():
    data = from_arrays(**columns(episodes()))
    part = replace(data, **{k: getattr(data, k)[:6] for k in FIELDS})
    assert episode_lengths(data).tolist() == [5, 3, 1, 1, 6] and episode_lengths(part).tolist() == [4, 2]


# ---- OGBench

def ogbench(goal_at=None):
    "Two recordings in a row as OGBench's files have them: one row more than steps, terminals at the last."
    rng = np.random.default_rng(0)
    last = np.isin(np.arange(12), (4, 11))
    masks = np.ones(12, np.float32)
    masks[goal_at or []] = 0
    return dict(observations=rng.normal(size=(12, 3)).astype(np.float32), actions=rng.uniform(-1, 1, (12, 2)),
                terminals=last.astype(np.float32), rewards=masks * -1.0, masks=masks, qpos=rng.normal(size=(12, 9)))


def their_regular(raw):
    "ogbench.load_dataset(compact_dataset=False), told row by row."
    end = raw["terminals"].astype(bool)
    rows = [t for t in range(len(end)) if not end[t]]
    return {k: raw[k][rows] for k in ("observations", "actions", "rewards", "masks")} | dict(
        next_observations=raw["observations"][[t + 1 for t in rows]], terminals=np.float32([end[t + 1] for t in rows]))


def their_compact(raw):
    end = raw["terminals"]
    return raw | dict(valids=1 - end, terminals=np.minimum(end + np.r_[end[1:], 1.0], 1.0))


@pytest.mark.parametrize("goal_at", [None, [2], [3, 4], [10], [11]])
def test_ogbench_in_all_its_forms(goal_at, root):
    raw = ogbench(goal_at)
    loaded = []
    for k, form in enumerate((lambda r: r, their_regular, their_compact)):
        np.savez(root / f"{k}.npz", **form(raw))
        loaded.append(load(root / f"{k}.npz"))
    data, expected = loaded[0], their_regular(raw)
    assert same(data, loaded[1]) and same(data, loaded[2])
    np.testing.assert_array_equal(data.obs, expected["observations"])
    np.testing.assert_array_equal(data.next_obs, expected["next_observations"])
    np.testing.assert_array_equal(data.terminal, 1 - expected["masks"])
    if goal_at is None: assert episode_lengths(data).tolist() == [4, 6] and not data.terminal.any()


@pytest.mark.parametrize("lacks, message", [
    ("rewards", "lacks rewards; found .*of OGBench .*singletask"), ("masks", "lacks masks; .*singletask"),
    ("terminals", "lacks terminals")])
def test_ogbench_without_a_task(lacks, message, root):
    np.savez(root / "d.npz", **{k: x for k, x in ogbench().items() if k != lacks})
    with pytest.raises(DataError, match=message): load(root / "d.npz")


def packed(p, **arrays):
    np.savez(p / "d.npz", **arrays)
    return p / "d.npz"


BAD_NPZ = {
    "missing": (lambda p: p / "none.npz", "none.npz: no such file"),
    "text": (lambda p: touch(p / "d.npz", b"hello" * 99), "not a readable .npz"),
    "truncated": (lambda p: touch(p / "d.npz", packed(p, **columns(episodes())).read_bytes()[:-300]), "not a readable"),
    "pickled": (lambda p: packed(p, **columns(episodes()) | dict(rewards=np.array([{}] * 16))),
                "'rewards.npy' has dtype object"),
    "successors": (lambda p: packed(p, **columns(episodes()), next_observations=np.zeros((16, 2))), "'next_observ"),
    "masks": (lambda p: packed(p, **ogbench() | dict(masks=np.full(12, 0.5))), "'masks' has 12 values other than 0"),
    "short masks": (lambda p: packed(p, **ogbench() | dict(masks=np.ones(3))), "lengths differ"),
    "scalar": (lambda p: packed(p, **columns(episodes()) | dict(rewards=0.0)), "lengths differ"),
    "bomb": (lambda p: bomb(p / "d.npz"), "room for"),
    "claim": (lambda p: member(p / "d.npz", claim((10**12,)) + bytes(64)), "claims 4000000000000 bytes, but has 64"),
    "more": (lambda p: member(p / "d.npz", claim((16,)) + bytes(68)), "claims 64 bytes, but has 68"),
    "no array": (lambda p: member(p / "d.npz", b"text"), "not a readable .npz"),
    "bzip2": (lambda p: member(p / "d.npz", claim((16,)) + bytes(64), zipfile.ZIP_BZIP2), "never does; write it again"),
    "twins": (lambda p: member(p / "d.npz", claim((16,)) + bytes(64), name="actions"), "come twice"),
}


def bomb(path):
    np.savez_compressed(path, **columns(episodes()) | dict(observations=np.zeros((20_000_000, 1))))
    return path


def claim(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=shape))
    return header.getvalue()


def member(path, content, method=zipfile.ZIP_STORED, name="rewards.npy"):
    np.savez(path, **{k: x for k, x in columns(episodes()).items() if k != "rewards"})
    with zipfile.ZipFile(path, "a", method) as z: z.writestr(name, content)
    return path


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz(case, root):
    make, message = BAD_NPZ[case]
    with pytest.raises(DataError, match=message) as error: load(make(root))
    assert ".npz" in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("name, message", [
    ("d.hdf5.gz", "'.gz' are not read, only .hdf5, .h5 and .npz; unpack it first"),
    ("d.zip", "unpack it first"), ("d.pkl", "from_arrays, or keep them with np.savez"), ("d.CSV", "'.csv' are not"),
    ("plain", "'no ending' are not read")])
def test_files_of_other_kinds(name, message, root):
    with pytest.raises(DataError, match=message): load(touch(root / name, b"x"))


# ---- what a Minari set says of itself

def amend(name, **changes):
    path = minari.storage.get_dataset_path(name) / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def box(shape, low, high): return json.dumps(dict(type="Box", dtype="float32", shape=shape, low=low, high=high))


@pytest.mark.parametrize("claim, message", [
    (dict(total_episodes=10**13), "claims 10000000000000 episodes"), (dict(total_episodes=-1), "claims -1"),
    (dict(total_episodes="5"), "claims 5"), (dict(total_episodes=10_000), "'episode_5' is missing"),
    (dict(data_format="arrow"), "format arrow; only hdf5 is read"),
    (dict(total_steps=15), "15 steps, but there are 16"),
    (dict(total_episodes=4), "tells of 4 episodes, .* has 5"), (dict(total_episodes=True), "claims True"),
    (dict(observation_space=box([10**9], 0.0, 1.0)), "spaces cannot be read .not spelt out"),
    (dict(ref_max_score=10**400), "must be numbers"),
    (dict(minari_version="9.9.9"), "was written by Minari 9.9.9"),
    (dict(ref_min_score="low"), "must be numbers"), (dict(observation_space="[]"), "spaces cannot be read"),
    (dict(observation_space=box([10**13], 0.0, 1.0)), "spaces cannot be read"),
    (dict(observation_space=box([0], [], [])), "only vectors of floats"),
    (dict(observation_space=box([2], [0, 0], [1, 1])), "expected observations of 2 components"),
    (dict(observation_space=json.dumps(dict(type="Dict", subspaces={}))), "only vectors of floats"),
    (dict(action_space=box([1], [-1], [1])), "the action space 1"),
])
def test_impossible_claims_are_refused_at_once(claim, message):
    write_minari("toy/claims-v0", episodes())
    amend("toy/claims-v0", **claim)
    with pytest.raises(DataError, match=f"toy/claims-v0.*{message}"): load("toy/claims-v0")


SPEC_028 = (
    '{"id": "Pendulum-v1", "entry_point": "gymnasium.envs.classic_control.pendulum:PendulumEnv",'
    ' "reward_threshold": null, "nondeterministic": false,'
    ' "max_episode_steps": 200, "order_enforce": true, "autoreset": false,'
    ' "disable_env_checker": false, "apply_api_compatibility": false, "kwargs": {}, "additional_wrappers": [],'
    ' "vector_entry_point": null}')


def pendulum(name, T=40, **claims):
    rng = np.random.default_rng(0)
    buffers = [episode(T, False, rng, actions=rng.uniform(-2, 2, (T, 1))) for _ in range(3)]
    write_minari(name, buffers, act=gym.spaces.Box(-2, 2, (1,)), env="Pendulum-v1")
    amend(name, **claims)
    return load(name)


@pytest.mark.parametrize("spec", [
    SPEC_028, SPEC_028.replace(", ", ","), SPEC_028.replace("reset\": false", "reset\": true")])
def test_specifications_of_older_gymnasiums(spec):
    data = pendulum("toy/old-v0", env_spec=spec)
    assert (data.meta["env_id"], data.meta["time_limit"], data_warnings(data)) == ("Pendulum-v1", 200, [])
    assert gym.make(known_spec(data.meta["env_spec"])).observation_space.shape == (3,)
    assert read_spec(spec) == known_spec(spec)


def test_older_sets_without_spaces_have_those_of_their_environment():
    pendulum("toy/old-v0", env_spec=SPEC_028)
    path = minari.storage.get_dataset_path("toy/old-v0") / "data" / "metadata.json"
    stored = json.loads(path.read_text())
    del stored["observation_space"]
    path.write_text(json.dumps(stored))
    assert load("toy/old-v0").meta["action_high"].tolist() == [2]


def test_a_specification_from_a_stranger_runs_nothing(root):
    evil = json.loads(SPEC_028) | dict(entry_point="os:system", kwargs=dict(command=f"touch {root}/owned"))
    with pytest.raises(DataError, match="Pendulum-v1.*not under this name.*--env"): known_spec(json.dumps(evil))
    path = minari.storage.get_dataset_path("toy/evil-v0") / "data" / "metadata.json"
    with pytest.raises(DataError, match="spaces cannot be read .*--env"):
        pendulum("toy/evil-v0", env_spec=json.dumps(evil), observation_space=None)
    assert path.exists() and not (root / "owned").exists()


@pytest.mark.parametrize("claim", [
    dict(kwargs=dict(xml_file="/etc/passwd")), dict(kwargs=dict(a=[dict(b="..\\up")])),
    dict(additional_wrappers=[dict(name="w", entry_point="gymnasium.wrappers:TimeLimit", kwargs=dict(to="~/x"))]),
    dict(additional_wrappers=[dict(name="w", entry_point="gymnasium.wrappers:RecordVideo",
                                   kwargs=dict(video_folder="x"))]),
    dict(additional_wrappers=[dict(name="w", entry_point="gymnasium.utils.play:play", kwargs={})])])
def test_a_specification_from_a_stranger_reads_and_writes_no_file(claim):
    with pytest.raises(DataError, match="is (wrapped in what we do not know|given a path) .*--env"):
        known_spec(json.dumps(json.loads(SPEC_028) | claim))


@pytest.mark.parametrize("claim", [dict(max_episode_steps=10**30), dict(max_episode_steps=-1),
                                   dict(max_episode_steps="9"),
                                   dict(kwargs=[1]), dict(id=3), dict(additional_wrappers="no")])
def test_a_specification_with_odd_values_is_none(claim):
    with pytest.raises(DataError, match="not the specification"): read_spec(json.dumps(json.loads(SPEC_028) | claim))
    with pytest.warns(DataWarning, match="--env"):
        assert pendulum("toy/odd-v0", env_spec=json.dumps(json.loads(SPEC_028) | claim)).meta["env_id"] is None


@pytest.mark.parametrize("which", ["metadata.json", "main_data.hdf5", "", "more"])
def test_links_out_of_a_set_are_not_followed(which, root):
    write_minari("toy/links-v0", episodes())
    home = minari.storage.get_dataset_path("toy/links-v0")
    path = home / "data" / which
    if which == "more": path.symlink_to("/etc")
    else: link(path, root / "elsewhere")
    with pytest.raises(DataError, match="toy/links-v0.* is a link out of its folder"): load("toy/links-v0")


def link(path, other):
    path.rename(other)
    path.symlink_to(other)


def test_a_set_may_lie_behind_a_link(root):
    write_minari("toy/far-v0", episodes())
    link(minari.storage.get_dataset_path("toy/far-v0"), root / "elsewhere")
    assert len(load("toy/far-v0")) == 16


def test_a_pipe_in_place_of_a_file_does_not_stop_us():
    write_minari("toy/pipe-v0", episodes())
    path = minari.storage.get_dataset_path("toy/pipe-v0") / "data" / "metadata.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="incomplete or damaged .*no metadata.json"): load("toy/pipe-v0")


def test_a_part_of_the_observations_is_not_the_whole():
    space = gym.spaces.Dict(a=gym.spaces.Box(-9, 9, (3,)), b=gym.spaces.Box(-9, 9, (2,)))
    rng = np.random.default_rng(0)
    parts = {k: rng.normal(size=(5, *s.shape)).astype(np.float32) for k, s in space.spaces.items()}
    write_minari("toy/part-v0", [episode(4, False, rng, observations=parts)], obs=space)
    part = dict(type="Dict", subspaces=dict(a=json.loads(box([3], [-9.0] * 3, [9.0] * 3))))
    amend("toy/part-v0", observation_space=json.dumps(part))
    with pytest.raises(DataError, match="has 2 parts, its space 1"): load("toy/part-v0")


def test_a_specification_that_cannot_be_read_is_no_obstacle_but_said():
    with pytest.warns(DataWarning, match="not the specification of an environment.*--env"):
        data = pendulum("toy/lost-v0", env_spec="{}")
    assert data.meta["env_id"] is None and len(data) == 120


def test_episodes_longer_than_the_judge_allows():
    short = json.dumps(json.loads(SPEC_028) | dict(max_episode_steps=30))
    with pytest.warns(DataWarning, match="3 of 3 episodes are longer than the environment's 30 steps"):
        data = pendulum("toy/long-v0", env_spec=SPEC_028, eval_env_spec=short)
    assert data.meta["time_limit"] == 30 and len(data) == 120


def test_a_scale_by_environment_is_no_reference_of_the_data():
    assert environment_scores("Hopper-v5") == reference_scores("hopper-medium-v2")
    with pytest.raises(ValueError, match="D4RL has no scale for 'Ant-v5'"): environment_scores("Ant-v5")
