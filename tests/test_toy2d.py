"Planar bandits: their data, their exact optima, the measures, and training on them."
import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from bdpo_lit.algorithm import bdpo
from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.evidence import toy2d
from bdpo_lit.evidence.toy2d import (
    PRESETS,
    SUMS,
    TASKS,
    Bandit,
    WavyMLP,
    closeness,
    exact_eps,
    exact_value,
    gather,
    guide_by_sums,
    guide_chain,
    guide_contrastive,
    guide_dac,
    improve,
    landscape,
    make_bandit,
    noise_fn,
    pretrain,
    pushed,
    run_toy,
    see_waves,
    sliced_wasserstein,
    toy,
    value_errors,
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


def test_share_gap_is_total_variation():
    b = make_bandit("moons", 15_000)
    due = b.weight(0.5)[b.part == 1].sum()
    for part in (0, 1):
        c = closeness(b.points[b.part == part][:2000], b, 0.5)                # all in one part, the rest empty
        assert abs(c["share_gap"] - abs(part - due)) < 0.01


# ---- the algorithm on bandits

def test_without_a_future_the_target_is_the_reward_and_nothing_is_walked(monkeypatch):
    b = make_bandit("rings", 100).sample(8, torch.Generator().manual_seed(0))
    with_future = BDPO(1, 2, replace(TINY.algorithm, gamma=0.99), seed=3)
    walk = with_future.draw(b, "critics")
    target, ahead = with_future.look_ahead(b, walk["x_N"], walk["path_noise"])   # every decision is the last
    assert torch.equal(target, b.reward) and "q/penalty" in ahead
    monkeypatch.setattr(bdpo, "rollout", lambda *a: pytest.fail("walked"))
    without = BDPO(1, 2, replace(TINY.algorithm, gamma=0.0), seed=3)
    assert not {"x_N", "path_noise"} & set(without.draw(b, "critics"))
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
    assert set(a["closeness"]) - set(b["closeness"]) == {"DAC style", "contrastive energy", "chain", SUMS}
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
                sums=guide_by_sums(agent, blob), dac=guide_dac(agent, blob, plan, progress=False)[0])
    ends = {name: walk(eps, 1500, agent.sched)[-1].mean(0) for name, eps in ways.items()}
    for name, within in dict(sums=0.1, contrastive=0.15, chain=0.25).items():
        assert abs(ends[name][0] - 0.5) < within and abs(ends[name][1]) < 0.15, (name, ends[name])
    assert ends["dac"][0] > 0.65                 # the slope of Q at every step is too much of a good thing


# ---- waves

@pytest.mark.parametrize("name, which", [("actor", 0), ("v", 1)])
def test_a_perceptron_that_sees_waves_is_one_on_a_longer_input(name, which):
    "Eq. (19.5): the same layers on (a, sines, cosines); nothing is left of the waves where their weights are 0."
    agent = BDPO(1, 2, TINY.algorithm)
    plain = getattr(agent, name).net.mlp
    wavy, g = WavyMLP(plain, which, (0.5, 2.0)), torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 7, d, generator=g) for d in plain.in_dims]
    seen = [torch.cat([x, *(f(w * x) for f in (torch.sin, torch.cos) for w in (0.5, 2.0))], -1) if i == which else x
            for i, x in enumerate(inputs)]
    torch.testing.assert_close(wavy(*inputs), bdpo.plain(wavy, *seen), rtol=1e-5, atol=1e-6)
    first = dict(zip(range(3), wavy.layers[0].weight.detach().split(wavy.in_dims, 1)))
    first[which] = torch.cat([first[which][:, :2], 0 * first[which][:, 2:]], 1)
    wavy.layers[0].weight.data = torch.cat(list(first.values()), 1)
    plain.layers[0].weight.data = torch.cat([w[:, :2] if i == which else w for i, w in first.items()], 1)
    for layers in ("layers", "norms"):
        for mine, theirs in zip(list(getattr(plain, layers))[layers == "layers":],
                                list(getattr(wavy, layers))[layers == "layers":]):
            mine.load_state_dict(theirs.state_dict())
    plain.layers[0].bias.data = wavy.layers[0].bias.data
    plain.head.load_state_dict(wavy.head.state_dict())
    torch.testing.assert_close(wavy(*inputs), plain(*inputs), rtol=1e-5, atol=1e-6)


def test_networks_that_see_waves_start_afresh_by_seed_and_train():
    one, two, other = (BDPO(1, 2, TINY.algorithm) for _ in range(3))
    for agent, seed in ((one, 3), (two, 3), (other, 4)): see_waves(agent, (1.0, 2.0), seed)
    for name in ("behavior", "actor", "q", "v"):
        mine, theirs, third = (getattr(a, name) for a in (one, two, other))
        assert same(mine.net, theirs.net) and same(mine.net, mine.target) and not same(mine.net, third.net)
        assert mine.lr == getattr(BDPO(1, 2, TINY.algorithm), name).lr and mine.updates == 0
        assert mine.net.mlp.in_dims[name in ("q", "v")] == 2 * (1 + 2 * 2)      # where the action goes in
    plan, b = replace(TINY, waves=(1.0, 2.0)), make_bandit("moons", 300)
    agent = pretrain(b, plan, progress=False)
    before = copy.deepcopy(agent.behavior.target)
    improve(agent, b, plan, progress=False)
    assert not same(before, agent.actor.net) and agent.actor.updates == TINY.train_steps - 2
    x = torch.randn(5, 2)
    walked, asked = noise_fn(agent.actor.target)(x, 3), agent.actor.target(torch.zeros(1, 1), x, 3)
    torch.testing.assert_close(walked, asked.detach(), rtol=1e-5, atol=1e-6)


# ---- each way learns what it says, with what it says

def blank(agent, *learners):
    "Make the networks that learn useless: only their slow copies are left."
    for name in learners or ("behavior", "actor", "q", "v"):
        for p in getattr(agent, name).net.parameters(): p.data.fill_(math.nan)
    return agent


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def few(n=64): return make_bandit("moons", 300), torch.randn(n, 2, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def learners(monkeypatch):
    "The learners that the planes make, and the losses they were given."
    made = []

    class Spy(toy2d.Learner):
        def __init__(self, *a):
            super().__init__(*a)
            made.append(self)
            self.losses = []

        def step(self, loss):
            self.losses.append(loss.item())
            return super().step(loss)

    monkeypatch.setattr(toy2d, "Learner", Spy)
    return made


def test_the_actor_starts_as_the_behaviour_policy():
    b, _ = few()
    agent = pretrain(b, TINY, progress=False)
    assert not same(agent.behavior.net, agent.behavior.target)
    improve(agent, b, replace(TINY, train_steps=0), progress=False)
    assert same(agent.actor.net, agent.behavior.target) and same(agent.actor.target, agent.behavior.target)


def test_a_push_is_the_slope_times_the_noise_level():
    sched, (b, x) = vp_schedule(5), few(6)
    slope = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    n = torch.tensor([1, 2, 3, 4, 5, 1])
    want = torch.stack([x[i] - math.sqrt(1 - sched.alpha_bar[k]) * slope[i] for i, k in enumerate(n.tolist())])
    assert torch.allclose(pushed(x, slope, n, sched), want, atol=1e-6)
    assert torch.allclose(pushed(x, slope, 3, sched)[2], want[2], atol=1e-6)
    value = lambda x, n: exact_value(x, n, b, 0.3, sched) / 0.3
    guided = toy2d._guided(exact_eps(b, None, sched), value, sched)           # Eq. (19.3), by autograd
    assert torch.allclose(guided(x, 2), exact_eps(b, 0.3, sched)(x, 2), atol=1e-3)


def test_dac_regresses_on_the_pushed_noise(learners, monkeypatch):
    "The first loss is known: the actor is nu, and a linear Q has one slope."
    b, _ = few()
    agent = blank(pretrain(b, TINY, eta=0.25, progress=False))
    steps, made, w = [], toy2d.forward_sample, torch.tensor([0.4, -0.2])
    monkeypatch.setattr(toy2d, "forward_sample", lambda x, n, *a: steps.append(n) or made(x, n, *a))
    monkeypatch.setattr(toy2d.QNet, "forward", lambda self, obs, a: (a @ w)[None] + 0 * sum(
        p.sum() for p in self.parameters()))
    plan = replace(TINY, train_steps=agent.config.warmup_steps + 1)
    guide_dac(agent, b, plan, progress=False)
    actor, q = learners
    assert (len(actor.losses), q.updates) == (1, plan.train_steps)             # not before the warm-up
    want = (1 - agent.sched.alpha_bar[steps[0]]).mean() * w.square().mean() / 0.25**2
    assert actor.losses[0] == pytest.approx(want.item(), rel=1e-4)


def test_the_chain_warms_up_first(learners):
    b, _ = few()
    agent = pretrain(b, replace(TINY, algorithm=replace(TINY.algorithm, warmup_steps=7)), progress=False)
    *_, made = guide_chain(agent, b, TINY, progress=False, seconds=1e4, max_updates=3)
    actor, q = learners
    assert (made, actor.updates, q.updates) == (3, 3, 7 + 3)


@pytest.mark.parametrize("guide", [guide_dac, guide_contrastive, guide_chain, guide_by_sums])
def test_guides_start_from_and_play_slow_copies(guide, learners):
    b, x = few()
    agent = blank(pretrain(b, TINY, progress=False))
    more = dict(progress=False) if guide is not guide_by_sums else {}
    if guide is guide_chain: more |= dict(seconds=1e4, max_updates=3)
    eps = guide(agent, b, *([TINY] if more else []), **more)
    eps = eps[0] if more else eps
    played = eps(x, 2).detach()
    for learner in learners: assert not same(learner.net, learner.target)
    for learner in learners:
        for p in learner.net.parameters(): p.data.fill_(math.nan)
    assert torch.equal(eps(x, 2), played) and played.isfinite().all()


class Known:
    "A slow copy that gives the exact values, and writes down what it was asked."
    def __init__(self, agent, bandit): self.agent, self.bandit, self.asked = agent, bandit, []

    def __call__(self, obs, x, n):
        self.asked.append((n, x))
        return exact_value(x, n, self.bandit, self.agent.config.eta, self.agent.sched)[None]


def test_value_errors_ask_the_slow_values_at_their_own_step():
    b, _ = few()
    agent = blank(pretrain(b, TINY, eta=0.3, progress=False))
    agent.v.target = known = Known(agent, b)
    found = value_errors(agent, b, num=2000)
    assert all(f["error"] < 1e-6 for f in found.values())
    N = agent.config.num_steps
    assert [n for n, _ in known.asked] == [*range(1, N + 1), N] and list(found)[-1] == "start"
    x = known.asked[-1][1]
    assert x.mean(0).abs().max() < 0.1 and (x.std(0) - 1).abs().max() < 0.06   # a^N ~ N(0, I), not noised data
    exact = exact_value(x, N, b, 0.3, agent.sched)
    assert found["start"]["exact"] == pytest.approx(exact.mean().item(), abs=1e-5)
    agent.v.target = lambda obs, x, n: known(obs, x, n) + 0.1                  # and says so when they are off
    assert value_errors(agent, b, num=50)["start"]["error"] == pytest.approx(0.1, abs=1e-5)


def test_everything_measured_comes_from_slow_copies(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    made = toy2d.improve
    monkeypatch.setattr(toy2d, "improve", lambda agent, *a: blank(made(agent, *a)))
    numbers, arrays = run_toy("moons", 0.1, 1, "tiny", num=1000, progress=False)
    assert all(math.isfinite(c["energy_distance"]) for c in numbers["closeness"].values())
    assert all(math.isfinite(v["learnt"]) for v in numbers["value"].values())
    assert all(np.isfinite(x.astype(float)).all() for x in arrays.values())
    agent = blank(pretrain(few()[0], TINY, progress=False))
    assert all(landscape(agent, n).isfinite().all() for n in (0, 2, 4))


def test_rivals_start_from_what_was_learnt_before_bdpo_improved_on_it(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    learnt, seen, made = [], [], toy2d.pretrain
    monkeypatch.setattr(toy2d, "pretrain", lambda *a: learnt.append(made(*a)) or copy.deepcopy(learnt[0]))
    for name in ("guide_dac", "guide_contrastive", "guide_chain", "guide_by_sums"):
        def fake(agent, *a, name=name, **kw):
            seen.append(agent)
            eps = noise_fn(agent.behavior.target)
            return eps if name == "guide_by_sums" else (eps, 0)
        monkeypatch.setattr(toy2d, name, fake)
    numbers, _ = run_toy("moons", 0.1, 1, "tiny", compare=True, num=1000, progress=False)
    assert len(seen) == 4 and {"DAC style", "contrastive energy", "chain"} <= set(numbers["seconds"])
    for agent in seen:
        assert agent.updates == 0 and same(agent.behavior.target, learnt[0].behavior.target)


def test_every_seed_has_draws_of_its_own(monkeypatch):
    "Two seeds share nothing but the data: weights, order, noise, walks, measures."
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    used = {}

    def spy(name, seed_of):
        made = getattr(toy2d, name)

        def call(*a, **kw):
            used.setdefault(name, []).append(seed_of(a, kw))
            return made(*a, **kw)
        monkeypatch.setattr(toy2d, name, call)

    spy("BDPO", lambda a, kw: a[4])
    spy("_batches", lambda a, kw: (kw.get("seed", a[2]), kw.get("phase")))
    spy("_start", lambda a, kw: a[1])
    spy("walk", lambda a, kw: kw.get("seed", a[4] if len(a) > 4 else None))
    spy("closeness", lambda a, kw: a[3])
    spy("value_errors", lambda a, kw: kw["seed"])
    seen = []
    for seed in (1, 2):
        used.clear()
        run_toy("moons", 0.1, seed, "tiny", compare=True, num=1000, progress=False)
        seen.append({k: [x for x in v if x is not None] for k, v in used.items()})
    assert set(seen[0]) == {"BDPO", "_batches", "_start", "walk", "closeness", "value_errors"}
    for name in seen[0]: assert seen[0][name] and not set(seen[0][name]) & set(seen[1][name]), name
    assert {phase for _, phase in seen[0]["_batches"]} == {1, 2}
    b, _ = few()
    streams = [toy2d._batches(b, 8, *s) for s in ((0, 1), (0, 2), (1, 1), (1, 2))] + [
        iter([b.sample(8, torch.Generator().manual_seed(s))]) for s in (0, 1)]
    assert len({next(s).action.numpy().tobytes() for s in streams}) == len(streams)
    agents = [pretrain(b, replace(TINY, pretrain_steps=0), seed=s, progress=False) for s in (0, 1, 1)]
    assert same(agents[1].v.net, agents[2].v.net) and not same(agents[0].v.net, agents[1].v.net)
    critics = [toy2d._start(agents[0], s)[1].net for s in (0, 1, 1)]
    assert same(critics[1], critics[2]) and not same(critics[0], critics[1])


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
    (dict(task="moons", preset="huge"), "small, longer, waves, paper")])
def test_run_refuses(kw, word):
    with pytest.raises(ValueError, match=word): run_toy(**kw)


def test_paper_preset_is_the_papers():
    p = PRESETS["paper"]
    assert (p.pretrain_steps, p.train_steps, p.batch_size) == (100_000, 100_000, 512)
    default = BDPOConfig(rho=0.0, gamma=0.0, num_steps=50, clip=None, actor_decay_steps=100_000,
                         critic_decay_steps=100_000, warmup_steps=5000)
    assert p.algorithm == default and (default.num_critics, default.num_samples, default.actor_every) == (10, 10, 5)


def as_stored(plan, eta):
    return json.loads(json.dumps(asdict(replace(plan, algorithm=replace(plan.algorithm, eta=eta)))))


@pytest.mark.parametrize("name", ["toy2d_small", "toy2d_longer", "toy2d_waves"])
def test_stored_results_were_made_with_the_preset_of_today(name):
    for r in result(f"{name}.json"):
        want = as_stored(PRESETS[r["preset"]], r["eta"])
        kept = r["config"]          # settings that came later are at their defaults
        made = dict(waves=[]) | kept | dict(algorithm=want["algorithm"] | kept["algorithm"])
        assert made == want, (r["task"], r["eta"], r["seed"])
        assert name.endswith(r["preset"])


def test_stored_results_are_complete():
    found = result("toy2d_small.json")
    made = {(r["task"], r["eta"], r["seed"]) for r in found}
    assert {(t, 0.06, s) for t in TASKS for s in range(3)} <= made
    assert all(r["provenance"]["commit"] and "dirty" not in r["provenance"]["commit"] for r in found)
    assert all("chain" in r["seconds"] for r in found if r["seed"] == 0 and r["eta"] == 0.06)
    wavy, alone = result("toy2d_waves.json"), result("toy2d_alone.json")
    assert sorted((r["task"], r["seed"]) for r in wavy) == sorted((t, s) for t in TASKS for s in range(3))
    assert {(r["preset"], r["seed"]) for r in alone} >= {(p, s) for p in ("waves only", "work only") for s in range(3)}
    assert {r["provenance"]["commit"] for r in wavy + alone} == {wavy[0]["provenance"]["commit"]}
