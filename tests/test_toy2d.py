"Planar bandits: their data, their exact optima, the measures, and training on them."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdpo_lit.algorithm import bdpo
from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.evidence import toy2d
from bdpo_lit.evidence.toy2d import (
    PRESETS,
    TASKS,
    Bandit,
    closeness,
    exact_eps,
    exact_value,
    gather,
    guide_chain,
    guide_contrastive,
    guide_dac,
    guide_exact,
    make_bandit,
    pretrain,
    run_toy,
    sliced_wasserstein,
    toy,
    walk,
)
from bdpo_lit.reference.style import result
from bdpo_lit.theory.diffusion import forward_sample, vp_schedule

TINY = replace(PRESETS["small"], pretrain_steps=4, train_steps=6, batch_size=16, num_points=12_000, algorithm=replace(
    PRESETS["small"].algorithm, num_steps=4, actor_hidden=(8,), critic_hidden=(8,), time_dim=8, warmup_steps=2,
    actor_every=1, actor_decay_steps=4, critic_decay_steps=6))
by_task = pytest.mark.parametrize("task", TASKS)


# ---- data

@by_task
def test_data_by_seed(task):
    a, b, other = make_bandit(task, 300, 1), make_bandit(task, 300, 1), make_bandit(task, 300, 2)
    assert torch.equal(a.points, b.points) and torch.equal(a.energy, b.energy) and torch.equal(a.part, b.part)
    assert not torch.equal(a.points, other.points)
    assert a.points.dtype == a.energy.dtype == torch.float32
    assert a.part.unique().tolist() == list(range(a.part.max() + 1))


def test_data_are_what_they_are_called():
    rings = make_bandit("rings", 20_000)
    for k, (radius, energy) in enumerate(((0.75, 0), (1.5, 1), (2.25, 0.333), (3.0, 0.667))):
        mine = rings.part == k
        assert abs(rings.points[mine].norm(dim=1).mean() - radius) < 0.01
        assert torch.allclose(rings.energy[mine], torch.tensor(float(energy)))
    eight = make_bandit("8gaussians", 20_000)
    for k in range(8):
        mine = eight.points[eight.part == k]
        angle = math.pi / 2 + k * math.pi / 4
        assert torch.allclose(mine.mean(0), 4 / 1.414 * torch.tensor([math.cos(angle), math.sin(angle)]), atol=0.05)
        assert torch.allclose(mine.std(0), torch.tensor(0.5 / 1.414), atol=0.03)
        assert torch.allclose(eight.energy[eight.part == k], torch.tensor(k / 7))
    board = make_bandit("checkerboard", 20_000)
    column, row = (board.points / 2).floor().long().unbind(1)
    assert ((column + row) % 2 == 0).all() and torch.equal(board.energy, (column % 2 == 0).float())
    roll = make_bandit("swissroll", 20_000)
    assert torch.allclose(roll.energy, roll.points.square().sum(1) / 9, atol=1e-5)
    spiral = make_bandit("2spirals", 20_000)
    r = (spiral.points - 0.25 / 3).norm(dim=1)       # the arms carry a shift of up to 0.5 / 3
    assert torch.corrcoef(torch.stack([r, spiral.energy]))[0, 1] < -0.9
    moons = make_bandit("moons", 20_000)
    assert moons.points[moons.part == 1][:, 1].mean() < moons.points[moons.part == 0][:, 1].mean() - 0.5


def test_target_is_the_weighted_data():
    b = make_bandit("moons", 5000)
    for eta in (0.5, 1.0, math.inf):
        odds = math.exp(1 / eta)
        ones, zeros = int((b.part == 1).sum()), int((b.part == 0).sum())
        p = odds * ones / (odds * ones + zeros)
        assert abs(b.weight(eta)[b.part == 1].sum() - p) < 1e-12
        drawn = b.target(4000, eta, torch.Generator().manual_seed(0))
        at = (drawn[:, None] == b.points[None]).all(-1).int().argmax(1)
        assert abs((b.part[at] == 1).float().mean() - p) < 4 * (p * (1 - p) / 4000) ** 0.5 + 1e-9


@pytest.mark.parametrize("kw, word", [(dict(task="torus"), "torus"), (dict(task="moons", num=0), "at least 1")])
def test_make_bandit_refuses(kw, word):
    with pytest.raises(ValueError, match=word): make_bandit(**kw)


# ---- what is exact

def brute(x, n, b, eta, sched):
    "Value and tilted noise of one point by a loop over the data."
    root, var, top, norm, mean = sched.alpha_bar[n].sqrt(), 1 - sched.alpha_bar[n], 0.0, 0.0, torch.zeros(2).double()
    for a, e in zip(b.points.double(), b.energy.double()):
        q = math.exp(-((x - root * a) ** 2).sum() / (2 * var))
        top, norm, mean = top + q * math.exp(e / eta), norm + q, mean + q * math.exp(e / eta) * a
    return eta * math.log(top / norm), (x - root * mean / top) / var.sqrt()


@by_task
@pytest.mark.parametrize("n", [2, 5])
def test_exact_value_and_noise_against_loops(task, n):
    b, sched = make_bandit(task, 40), vp_schedule(5, dtype=torch.float64)
    x = forward_sample(b.points[:6].double(), n, torch.randn(6, 2, dtype=torch.float64), sched)
    for chunk in (2, 100):
        value, eps = exact_value(x, n, b, 0.3, sched, chunk), exact_eps(b, 0.3, sched, chunk)(x, n)
        for i in range(6):
            v, e = brute(x[i], n, b, 0.3, sched)
            assert abs(value[i] - v) < 1e-9 and torch.allclose(eps[i], e, atol=1e-8)


# ---- measures

def test_sliced_wasserstein_of_known_moves():
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(x, x[torch.randperm(500)]) < 1e-6
    assert abs(sliced_wasserstein(x, x + torch.tensor([0.0, 2.0]), 4000) - 4 / math.pi) < 0.03
    assert abs(sliced_wasserstein(x, 3 * x, 2000) - 2 * (2 / math.pi) ** 0.5) < 0.15     # E|z| of a normal, scaled


@by_task
def test_closeness_passes_the_target_and_notices_faults(task):
    b = make_bandit(task, 15_000)
    good = b.target(2000, 0.06, torch.Generator().manual_seed(9))
    c = closeness(good, b, 0.06)
    low, high = c["interval"]
    assert low - 0.01 < 0 < high + 0.01 and c["share_gap"] < 0.06 and c["outside"] < 0.05
    assert abs(sum(c["share"]) - 1) < 1e-5 and abs(sum(c["share_target"]) - 1) < 1e-6
    data = closeness(b.points[:2000], b, 0.06)
    assert data["share_gap"] > 0.3 and data["mean_energy"] < data["mean_energy_target"] - 0.1
    assert data["energy_distance"] > 0.03 and data["sliced_wasserstein"] > 3 * data["sliced_wasserstein_floor"]
    with pytest.raises(ValueError, match="1000 are needed"): closeness(good[:999], b, 0.06)
    with pytest.raises(ValueError, match="12000 are needed"): closeness(good, b.head(11_000), 0.06)
    far = closeness(good + 3.0, b, 0.06)
    assert far["outside"] > 0.5 and far["energy_distance"] > 0.5


# ---- the algorithm on bandits

def test_without_a_future_the_target_is_the_reward_and_nothing_is_walked(monkeypatch):
    b = make_bandit("rings", 100).sample(8, torch.Generator().manual_seed(0))
    with_future = BDPO(1, 2, replace(TINY.algorithm, gamma=0.99), seed=3)
    walk = with_future.draw(b, "critics")
    target, ahead = with_future.look_ahead(b, walk["x_N"], walk["walk"])   # every decision is the last
    assert torch.equal(target, b.reward) and "q/penalty" in ahead
    monkeypatch.setattr(bdpo, "rollout", lambda *a: pytest.fail("walked"))
    without = BDPO(1, 2, replace(TINY.algorithm, gamma=0.0), seed=3)
    assert "walk" not in without.draw(b, "critics")
    state = without.generator.get_state()
    assert torch.equal(without.look_ahead(b)[0], b.reward) and torch.equal(without.generator.get_state(), state)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_members_that_agree_exactly_give_finite_gradients(rho):
    "The slope of a standard deviation at zero is not a number; with one member, or equal members, every step is there."
    for K in (1, 3):
        agent = BDPO(1, 2, replace(TINY.algorithm, rho=rho, num_critics=K), seed=0)
        for net in (agent.q, agent.v):
            for p in (*net.net.parameters(), *net.target.parameters()): p.data[:] = p.data[:1]   # all members alike
        b = make_bandit("moons", 200)
        for _ in range(4): metrics = agent.update(b.sample(16, torch.Generator().manual_seed(1)))
        assert all(torch.isfinite(x) for x in metrics.values())
        assert all(torch.isfinite(p).all() for p in agent.actor.net.parameters())


def test_runs_are_repeatable_and_the_agent_is_left_alone_by_the_others(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    a, arrays = run_toy("moons", 0.1, 1, "tiny", compare=True, num=1000, progress=False)
    b, again = run_toy("moons", 0.1, 1, "tiny", num=1000, progress=False)
    assert a["closeness"]["BDPO"] == b["closeness"]["BDPO"] and a["value"] == b["value"]
    assert np.array_equal(arrays["landscape"], again["landscape"])
    assert set(a["closeness"]) - set(b["closeness"]) == {"DAC style", "contrastive energy", "chain", "exact guidance"}
    assert a["bytes_kept"]["chain"] > a["bytes_kept"]["DAC style"] > 0
    assert a["config"]["algorithm"]["eta"] == 0.1 and a["provenance"]["commit"]


def test_every_guide_reaches_a_simple_target():
    "One Gaussian blob, energy rising to the right: the optimum is the blob moved by var / eta."
    g = torch.Generator().manual_seed(0)
    points = 0.5 * torch.randn(20_000, 2, generator=g)
    blob = Bandit("blob", points, points[:, 0], torch.zeros(20_000, dtype=torch.int64))
    plan = replace(PRESETS["small"], pretrain_steps=200, train_steps=250, batch_size=128, algorithm=replace(
        PRESETS["small"].algorithm, num_steps=10, actor_hidden=(32,), critic_hidden=(32,), warmup_steps=50,
        actor_every=1, actor_decay_steps=200, critic_decay_steps=250, ema=0.1))
    agent = pretrain(blob, plan, eta=0.5, progress=False)
    ways = dict(contrastive=guide_contrastive(agent, blob, plan, progress=False)[0],
                chain=guide_chain(agent, blob, plan, progress=False, seconds=1e4, max_updates=150)[0],
                exact=guide_exact(agent, blob), dac=guide_dac(agent, blob, plan, progress=False)[0])
    ends = {name: walk(eps, 1500, agent.sched)[-1].mean(0) for name, eps in ways.items()}
    for name, within in dict(exact=0.1, contrastive=0.15, chain=0.25).items():
        assert abs(ends[name][0] - 0.5) < within and abs(ends[name][1]) < 0.15, (name, ends[name])
    assert ends["dac"][0] > 0.65                 # the slope of Q at every step is too much of a good thing


# ---- running and keeping

def test_toy_keeps_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    first = toy("rings", 0.06, preset="tiny", folder=tmp_path)
    toy("moons", 0.25, preset="tiny", folder=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"{n}-tiny.{s}" for n in ("rings-0.06-0", "moons-0.25-0")
                                                  for s in ("json", "npz", "png")}
    made = toy2d.run_toy
    monkeypatch.setattr(toy2d, "run_toy", lambda *a: pytest.fail("made again"))
    assert toy("rings", 0.06, preset="tiny", folder=tmp_path) == json.loads(json.dumps(first))
    assert "| rings | BDPO |" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception): toy("rings", 0.06, preset="tiny", compare=True, folder=tmp_path)
    monkeypatch.setattr(toy2d, "run_toy", made)
    for _ in range(2): gather(tmp_path, tmp_path / "all")
    assert [r["task"] for r in json.loads((tmp_path / "all.json").read_text())] == ["moons", "rings"]
    assert "rings/0.06/landscape" in np.load(tmp_path / "all.npz")


@pytest.mark.parametrize("kw, word", [
    (dict(task="torus"), "torus"), (dict(task="moons", eta=0.0), "eta must be positive"),
    (dict(task="moons", preset="huge"), "small, paper")])
def test_run_refuses(kw, word):
    with pytest.raises(ValueError, match=word): run_toy(**kw)


def test_paper_preset_is_the_papers():
    p = PRESETS["paper"]
    assert (p.pretrain_steps, p.train_steps, p.batch_size) == (100_000, 100_000, 512)
    default = BDPOConfig(rho=0.0, gamma=0.0, num_steps=50, clip=None, actor_decay_steps=100_000,
                         critic_decay_steps=100_000, warmup_steps=5000)
    assert p.algorithm == default and (default.num_critics, default.num_samples, default.actor_every) == (10, 10, 5)


def test_stored_results_are_complete():
    found = result("toy2d_small.json")
    made = {(r["task"], r["eta"], r["seed"]) for r in found}
    assert {(t, 0.06, s) for t in TASKS for s in range(3)} <= made
    assert all(r["provenance"]["commit"] and "dirty" not in r["provenance"]["commit"] for r in found)
    assert all("chain" in r["seconds"] for r in found if r["seed"] == 0 and r["eta"] == 0.06)
