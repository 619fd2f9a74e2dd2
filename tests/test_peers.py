"""The peers: five runs as one are five runs, formulas, what each learns where the answer is known, and the table."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bdpo_lit.evidence import peers
from bdpo_lit.evidence.peers import (
    DAC,
    DQL,
    FQL,
    IDQL,
    IQL,
    METHODS,
    SETS,
    TD3BC,
    GaussianBDPO,
    GaussianClone,
    PointBDPO,
    compare_peers,
    gaussian_kl,
    noise_at,
    player,
    train,
)
from bdpo_lit.evidence.sweep import read_results, write_results
from bdpo_lit.offline.data import Scaling, Transitions
from bdpo_lit.reference.style import RESULTS

KINDS = [GaussianClone, IQL, TD3BC, DQL, DAC, FQL, GaussianBDPO, PointBDPO]
TINY = replace(peers.PEER, actor_hidden=(16, 16), critic_hidden=(16, 16), warmup_steps=2, actor_every=1, num_steps=3)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def noise_data(n=200, S=3, A=2):
    g = seeded()
    return Transitions(torch.randn(n, S, generator=g), torch.rand(n, A, generator=g) - 0.5, torch.randn(n, generator=g),
                       torch.randn(n, S, generator=g), (torch.rand(n, generator=g) < 0.2).float(), torch.arange(n))


def bandit(n=2000):
    "States -1 and 1, one decision; the best action is half the state, recorded ones are anywhere."
    g = seeded()
    obs = torch.where(torch.rand(n, 1, generator=g) < 0.5, -1.0, 1.0)
    action = torch.rand(n, 1, generator=g) * 1.8 - 0.9
    reward = -10 * (action - obs / 2).square()[:, 0]
    return Transitions(obs, action, reward, obs.clone(), torch.ones(n), torch.arange(n))


def double(kind, seeds):
    peer = kind(3, 2, seeds, 0.7, TINY).double()
    peer.sched = peer.sched.to(torch.float64)
    return peer


# ---- five runs as one

@pytest.mark.parametrize("kind", KINDS)
def test_five_runs_together_are_five_runs(kind):
    data, together = noise_data(), train(double(kind, [3, 0, 5]), noise_data(), 3, 6)
    for run, seed in enumerate([3, 0, 5]):
        alone = train(double(kind, [seed]), data, 3, 6)
        if kind is PointBDPO: together.var[run] = run + 0.5
        taken = together.alone(run, 0)
        if kind is PointBDPO: assert (taken.var == run + 0.5).all()
        for (name, a), b in zip(alone.named_parameters(), taken.parameters(), strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-6, atol=1e-6, msg=f"{kind.__name__}, {name}")
    start, end = double(kind, [3]).parameters(), together.alone(0, 0).parameters()
    assert not any(torch.equal(a, b) for a, b in zip(start, end, strict=True)), "every network learns"


def test_runs_differ_by_their_seed_alone():
    same = train(double(DQL, [4, 4]), noise_data(), 2, 4)
    for p in same.parameters(): torch.testing.assert_close(*p.chunk(2))
    other = train(double(DQL, [4, 5]), noise_data(), 2, 4)
    assert any((a != b).any() for a, b in (p.chunk(2) for p in other.parameters()))


def test_each_run_has_its_own_clipped_gradient():
    peer = double(GaussianClone, [0, 1])
    weight = torch.tensor([[1e6], [1e-6]], dtype=torch.float64)       # one far above the bound, one far below
    obs, action = torch.randn(2, 8, 3, generator=seeded()).double(), torch.zeros(2, 8, 2).double()
    log_p = peers.normal(peer.net["actor"], obs).log_prob(action).sum(-1)
    peer.learn("actor", -(weight * log_p).mean())
    norms = torch.cat([p.grad.reshape(2, -1) for p in peer.net["actor"].parameters()], 1).norm(dim=1)
    assert norms[0] == pytest.approx(1.0) and 0 < norms[1] < 1e-4


# ---- formulas

def test_gaussian_kl_is_that_of_torch():
    a, b, c, d = (torch.randn(4, 6, 3, generator=seeded(k), dtype=torch.float64) for k in range(4))
    p, q = Normal(a, b.exp()), Normal(c, d.exp())
    torch.testing.assert_close(gaussian_kl(p, q), kl_divergence(p, q).sum(-1))
    assert (gaussian_kl(p, p).abs() < 1e-12).all()


def test_noise_at_is_the_noise_net_of_each_run():
    peer = DQL(3, 2, [0, 1], config=TINY)
    obs, x = torch.randn(2, 7, 3, generator=seeded(1)), torch.randn(2, 7, 2, generator=seeded(2))
    n = torch.randint(1, 4, (2, 7), generator=seeded(3))
    got, two = noise_at(peer.net["actor"], obs)(x, n), noise_at(peer.net["actor"], obs)(x, 2)
    for run in range(2):
        net = peer.alone(run, 0).net["actor"]
        torch.testing.assert_close(got[run], net(obs[run], x[run], n[run]))
        torch.testing.assert_close(two[run], net(obs[run], x[run], 2))


def test_the_price_of_a_point_is_that_of_two_gaussians_of_equal_width():
    peer = PointBDPO(3, 2, [0, 1], config=TINY)
    peer.var = torch.rand(2, 1, 2, generator=seeded()) + 0.1
    obs = torch.randn(2, 5, 3, generator=seeded(1))
    for p in peer.net["actor"].parameters(): p.data += torch.randn(p.shape, generator=seeded(2)) / 3
    action, price = peer.priced(peer.net["actor"], obs)
    assert price.mean() > 0.1
    nu, std = peer.slow["nu"](obs).tanh(), peer.var.sqrt().expand(2, 5, 2)
    torch.testing.assert_close(price, kl_divergence(Normal(action, std), Normal(nu, std)).sum(-1))


def test_the_width_of_the_clone_is_measured():
    data = bandit()
    peer = train(PointBDPO(1, 1, [0], 1.0, TINY), data, 400, 0)
    assert float(peer.var) == pytest.approx(float(data.action.var()), rel=0.15)


def test_dac_learns_the_shifted_noise():
    """Where that leads is another matter: it asks Q at noisy actions. For Q = 2 a the prediction must be the clone's,
    less sqrt(1 - alpha_bar) 2 / eta."""
    data, quick = bandit(), replace(TINY, actor_lr=5e-3)
    both = []
    for eta in (1e9, 4.0):
        peer = DAC(1, 1, [0], eta, quick)
        peer.q = lambda obs, action, slow=False: (2 * action).transpose(1, 2).expand(-1, 2, -1)
        for _ in range(400): peer.improve(peer.batch(data))
        both.append(peer)
    obs, x = torch.zeros(1, 41, 1) + 1, torch.linspace(-1, 1, 41)[None, :, None]
    for n in (1, 2, 3):
        clone, pushed = (noise_at(p.slow["actor"], obs)(x, n).mean() for p in both)
        due = float((1 - both[0].sched.alpha_bar[n]).sqrt()) * 2 / 4
        assert float(clone - pushed) == pytest.approx(due, abs=0.12)


def test_the_flow_is_followed_by_euler_steps():
    peer = FQL(3, 2, [0, 1], config=TINY)
    head = peer.slow["flow"].head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([[0.2, -0.1], [0.0, 0.3]]))
    z = torch.rand(2, 5, 2, generator=seeded()) * 0.5
    torch.testing.assert_close(peer.follow(torch.zeros(2, 5, 3), z), z + head.bias[:, None])


def test_the_blur_of_td3_is_bounded():
    peer = TD3BC(3, 2, [0], config=TINY)
    obs = torch.randn(1, 4000, 3, generator=seeded())
    gap = (peer.ahead(obs)[0] - peer.draw(obs)).abs()
    assert 0.4 < gap.max() <= 0.5 + 1e-6 and 0.1 < float(gap.mean()) < 0.2


def test_the_best_of_ten_is_the_best_of_those_drawn():
    peer = DQL(3, 2, [0, 1], config=TINY)
    for p in (*peer.slow["q"].parameters(), *peer.slow["actor"].parameters()): p.data += torch.randn(p.shape) / 3
    obs, state = torch.randn(2, 6, 3, generator=seeded()), [g.get_state() for g in peer.draws]
    best = peer.act(obs, 10)
    for g, s in zip(peer.draws, state, strict=True): g.set_state(s)
    drawn = peer.draw(obs.repeat_interleave(10, 1)).view(2, 6, 10, 2)
    q = peer.q(obs.repeat_interleave(10, 1), drawn.flatten(1, 2), slow=True).mean(1).view(2, 6, 10)
    for run, row in np.ndindex(2, 6): torch.testing.assert_close(best[run, row], drawn[run, row, q[run, row].argmax()])


# ---- what they learn

@pytest.mark.parametrize("kind, knob", [
    (IQL, 1.0), (TD3BC, 2.0), (DQL, 2.0), (FQL, 2.0), (GaussianBDPO, 0.5), (PointBDPO, 0.5)])
def test_each_beats_its_clone_where_the_best_action_is_known(kind, knob):
    "A clone's regret is a third of that of chance, or more."
    quick = replace(TINY, warmup_steps=100, actor_lr=3e-3, critic_lr=3e-3, num_steps=2)
    data = bandit()
    peer = train(kind(1, 1, [0], knob, quick), data, 100, 350)
    obs = torch.where(torch.arange(400) % 2 == 0, -1.0, 1.0).view(1, -1, 1)
    regret = lambda action: float(10 * (action - obs / 2).square().mean()) / -float(data.reward.mean())
    assert regret(peer.act(obs)) < 0.2, "share of the regret of chance"
    if kind is IQL: assert regret(peer.alone(0, 0, IDQL).act(obs, 10)) < 0.5 < regret(peer.alone(0, 0, IDQL).act(obs))


def test_values_look_ahead():
    "The first of two decisions earns nothing, but leads to the second: Eq. (27.1) and IQL's target."
    g, n = seeded(), 2000
    late = torch.arange(n) % 2 == 1
    action = torch.rand(n, 1, generator=g) * 1.8 - 0.9
    obs = torch.where(late, 1.0, -1.0)[:, None]
    data = Transitions(obs, action, 4.0 * late, torch.ones(n, 1), late.float(), torch.arange(n))
    quick = replace(TINY, warmup_steps=10_000, critic_lr=3e-3, ema=0.1)
    for kind in (TD3BC, IQL):
        peer = train(kind(1, 1, [0], 1.0, quick), data, 0, 400)
        q = peer.q(torch.tensor([[[-1.0], [1.0]]]), torch.zeros(1, 2, 1)).mean((0, 1)).tolist()
        assert q == pytest.approx([4 * 0.98, 4.0], abs=0.3), kind.__name__


# ---- judging, and the table

def test_a_player_speaks_the_units_of_the_environment():
    raw = noise_data()
    of = lambda x, n: torch.full((n,), x, dtype=torch.float64)
    scaling = Scaling(of(1.0, 3), of(2.0, 3), of(0.0, 2), of(3.0, 2))
    world, peer = peers.World(raw, scaling, lambda: None, None), TD3BC(3, 2, [0, 1], config=TINY)
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    want = 3 * peer.slow["actor"](torch.as_tensor((obs - 1) / 2)[None].expand(2, -1, -1)).tanh()[1]
    np.testing.assert_allclose(player(peer, 1, world)(obs), want.numpy(), rtol=1e-5)


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch):
    asked = []
    def one(name, label):
        asked.append((name, label))
        return [dict(experiment="peers", set=name, variant=label, seed=0, mean=1.5, seconds=2.0, num_actions=1)]
    monkeypatch.setattr(peers, "compare_one", one)
    first = compare_peers(tmp_path, ["maze"], ["IQL", "DAC"])
    again = compare_peers(tmp_path, ["maze"], ["IQL", "DAC", "FQL"])
    assert asked == [("maze", "IQL"), ("maze", "DAC"), ("maze", "FQL")]
    assert first == again[:2] and again == read_results(tmp_path / "results.csv")
    assert (again[0]["mean"], again[0]["num_actions"], again[0]["unit"]) == (1.5, 1, None)


def test_numbers_come_back_as_they_were_written(tmp_path):
    rows = [dict(set="maze", seed=1, mean=0.1 + 0.2, note="knob 3", knob=3.0)]
    write_results(tmp_path / "new" / "x.csv", rows)
    read, = read_results(tmp_path / "new" / "x.csv")
    assert read["mean"] == 0.1 + 0.2 and read["note"] == "knob 3" and "knob" not in read


def test_the_stored_table_is_whole():
    rows = [r for r in read_results(RESULTS / "peers.csv") if r["experiment"] == "peers"]
    for name in SETS:
        for label in (play[0] for m in METHODS.values() for play in m.plays):
            mine = [r for r in rows if (r["set"], r["variant"]) == (name, label)]
            assert [r["seed"] for r in mine] == list(range(5)), (name, label)
            assert len({r["note"] for r in mine}) == 1 and all(r["episodes"] == 20 for r in mine)
            assert all(r["commit"] and r["torch"] and r["seconds"] > 0 for r in mine)
