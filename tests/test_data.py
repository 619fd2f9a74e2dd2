"""Offline data: what both formats keep, and what each kind of bad file says."""

import hashlib
import re
import socket
import subprocess
import sys
import threading
import warnings
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
from minari.data_collector import EpisodeBuffer

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.offline.data import (
    ACTION_MARGIN,
    D4RL_TASKS,
    DataError,
    Scaling,
    Transitions,
    d4rl_folder,
    describe,
    episode_returns,
    fetch_d4rl,
    load,
    load_hdf5,
    load_minari,
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
    "lengths": (dict(terminals=np.zeros(5, bool)), {}, "lengths differ.*'terminals': 5"),
    "scalar": (dict(terminals=np.float32(0)), {}, "lengths differ"),
    "text values": (dict(actions=np.full((16, 2), b"a")), {}, "'actions' has dtype"),
    "outside": (dict(actions=np.full((16, 2), 1.5)), {}, "16 actions lie outside the bounds .*clip_outside"),
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
    "key": (lambda f: f["episode_2"].__delitem__("actions"), "are damaged"),
    "width": (lambda f: replace_array(f["episode_4"], "observations", np.zeros((7, 4))), "episodes differ in shape"),
    "text": (lambda f: replace_array(f["episode_0"], "rewards", np.full(5, b"x")), "'rewards of episode 0' has dtype"),
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
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        load_hdf5(path)


def test_download_without_network_is_one_clear_message(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(minari, "load_dataset", lambda *a, **k: refuse())  # spare the retries
    with pytest.raises(DataError, match="could not be downloaded .*check the id and the network") as error:
        load_minari("D4RL/antmaze/umaze-v1", download=True)
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert len(re.findall("\n", str(error.value))) == 0


def test_download_without_its_package_names_it(monkeypatch):
    def lacking(*args, **kwargs):
        raise ImportError('please install "minari[hf]"')

    monkeypatch.setattr(minari, "load_dataset", lacking)
    with pytest.raises(DataError, match=r"minari\[hf\]"):
        load_minari("D4RL/antmaze/umaze-v1", download=True)


def test_malformed_id(monkeypatch):
    with pytest.raises(DataError, match="hopper"):
        load_minari("hopper")


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
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
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
    (10**7, "ended after [0-9]+ of 10000000 bytes"), (2000, "is not the file: not a readable HDF5 file")])
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
    monkeypatch.setattr(Path, "write_text", lambda self, *a: (_ for _ in ()).throw(PermissionError("read-only"))
                        if self.suffix == ".sha256" else real(self, *a))
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
    returns, lengths = (a.patches for a in figure.axes[:2])
    kept = len(torch.unique(data.episode))
    assert sum(p.get_height() for p in returns) == sum(p.get_height() for p in lengths) == kept
    for bad in ((0, 3), (-1, 0)):
        with pytest.raises(ValueError, match="two of 0 to 2"):
            describe(data, coords=bad)
    plt.close("all")
