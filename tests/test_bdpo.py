"""`BDPO` makes the updates of the plain `Algorithm1`, keeps its clocks, and acts, reports and resumes as it says."""
import copy
import math

import pytest
import torch
from torch import nn

from bdpo_lit.algorithm.bdpo import BDPO, Algorithm1, BDPOConfig, _networks, plain_eps, plain_q, plain_v
from bdpo_lit.algorithm.speed import PlainBDPO, synthetic_batch
from bdpo_lit.theory.diffusion import vp_schedule

NAMES = "behavior", "actor", "q", "v"
TINY = dict(num_critics=3, num_samples=4, actor_hidden=(16, 16), critic_hidden=(16, 16), time_dim=8, ema=0.3,
            warmup_steps=4, actor_every=2, actor_lr=3e-3, actor_decay_steps=5, critic_decay_steps=11)
CASES = {
    "locomotion": {}, "ddim": dict(solver="ddim", eta=2.0),
    "antmaze": dict(max_q=True, q_layer_norm=True, rho=0.5, eta=20.0, actor_lr=0.03),
    "unclipped": dict(clip=None, v_layer_norm=False), "averages": dict(rho=0.0, num_steps=1, num_critics=1),
}


def make(kind, dtype=torch.float64, seed=0, **options):
    "An agent in double precision; its draws are those of single precision."
    agent = kind(3, 2, BDPOConfig(**TINY | options), seed=seed)
    for name in NAMES:
        for part in ("net", "target"): getattr(getattr(agent, name), part).to(dtype)
    agent.sched = vp_schedule(agent.config.num_steps, dtype=dtype)
    normal = agent._normal
    agent._normal = lambda *shape: normal(*shape).to(dtype)
    return agent


def batch(seed=0, size=16): return synthetic_batch(size, 3, 2, seed=seed, dtype=torch.float64)


def parameters(agent, name):
    learner = getattr(agent, name)
    return torch.cat([nn.utils.parameters_to_vector(net.parameters()) for net in (learner.net, learner.target)])


def learn(agent, updates=12):
    "All of Algorithm 1: a few updates of the behaviour policy, the start of the actor, the main loop."
    for k in range(4): agent.update_behavior(batch(k))
    agent.start_actor()
    for k in range(updates): agent.update(batch(100 + k))
    return agent


@pytest.mark.parametrize("case", CASES)
def test_it_makes_the_updates_of_the_plain_algorithm(case):
    "From the same seed, by its own draws, through warm-up and updates of all four networks."
    before, plain, ours = (learn(make(kind, **CASES[case]), k) for kind, k in ((BDPO, 0), (Algorithm1, 12), (BDPO, 12)))
    assert torch.equal(plain.generator.get_state(), ours.generator.get_state())
    for name in NAMES:
        moved = (parameters(before, name) - parameters(ours, name)).abs().max()
        gap = (parameters(plain, name) - parameters(ours, name)).abs().max()
        assert moved > 1e-3 and gap < 1e-9, f"{name} moved {moved:.1g}, and is off by {gap:.1g}"


@pytest.mark.parametrize("option", [dict(eta=0.2), dict(rho=0.9), dict(gamma=0.98), dict(max_q=True), dict(clip=0.9),
                                    dict(ema=0.31), dict(actor_decay_steps=6), dict(behavior_lr=4e-4)], ids=str)
def test_a_difference_in_any_setting_would_be_noticed(option):
    plain, ours = learn(make(Algorithm1)), learn(make(BDPO, **option))
    assert max((parameters(plain, name) - parameters(ours, name)).abs().max() for name in NAMES) > 1e-6


def test_the_best_of_the_samples_pays_the_mean_of_all_penalties():
    "With constant critics and no reward the target is what is paid."
    agent, b = make(BDPO, max_q=True, gamma=1.0, eta=1.0), batch()
    agent.q.target.mlp.head.weight.data.zero_()
    z = agent.draw(b, "critics")
    nothing = b._replace(reward=0 * b.reward, terminal=0 * b.terminal)
    target, found = agent.look_ahead(nothing, z["x_N"], z["path_noise"])
    assert found["q/penalty"] > 0.1                    # two random networks disagree
    torch.testing.assert_close(-target.mean(), found["q/penalty"], rtol=1e-6, atol=1e-8)


# ---- clocks

def test_every_network_has_its_own_rate_and_horizon():
    agent, c = learn(make(BDPO)), BDPOConfig(**TINY)
    counts = dict(behavior=4 + 4, actor=4, q=12, v=12)
    assert {name: getattr(agent, name).updates for name in NAMES} == counts
    half_cosine = lambda i, horizon: 0.5 * (1 + math.cos(math.pi * min(1, i / horizon)))
    rates = dict(behavior=c.behavior_lr, actor=c.actor_lr * half_cosine(counts["actor"] - 1, 5),
                 q=c.critic_lr * half_cosine(11, 11), v=c.critic_lr * half_cosine(11, 11))
    for name in NAMES:
        assert getattr(agent, name).optimizer.param_groups[0]["lr"] == pytest.approx(rates[name], abs=1e-15), name


@pytest.mark.parametrize("kind", (Algorithm1, BDPO, PlainBDPO))
@pytest.mark.parametrize("warmup, every, due", [(4, 2, [6, 8, 10]), (3, 2, [4, 6, 8, 10]), (0, 5, [5, 10])])
def test_the_actor_learns_after_the_warm_up_at_every_kth_update(kind, warmup, every, due):
    agent, found = make(kind, warmup_steps=warmup, actor_every=every), []
    for k in range(1, 11):
        before = agent.actor.updates, agent.behavior.updates
        agent.update(batch(k))
        if (agent.actor.updates, agent.behavior.updates) != before: found.append(k)
    assert found == due and agent.actor.updates == agent.behavior.updates == len(due)


# ---- chance

@pytest.mark.parametrize("kind", (Algorithm1, BDPO))
@pytest.mark.parametrize("N", (1, 5))
def test_every_step_is_drawn_equally_often(kind, N):
    n = kind(3, 2, BDPOConfig(**TINY, num_steps=N)).draw(batch(size=5000), "actor")["n"]
    count = torch.bincount(n, minlength=N + 1)
    assert count[0] == 0 and len(count) == N + 1
    assert ((count[1:] - 5000 / N).abs() < 5 * (5000 / N) ** 0.5).all()


@pytest.mark.parametrize("kind", (Algorithm1, BDPO))
def test_weights_and_draws_have_seeds_of_their_own(kind):
    agent, c = kind(3, 2, BDPOConfig(**TINY), seed=7), BDPOConfig(**TINY)
    for seed in (7, agent.generator.initial_seed()):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            fresh = _networks(3, 2, c)["behavior"]
        assert not torch.equal(nn.utils.parameters_to_vector(fresh.parameters()),
                               nn.utils.parameters_to_vector(agent.behavior.net.parameters()))
    assert agent.generator.initial_seed() != kind(3, 2, c, seed=8).generator.initial_seed()


# ---- acting

@pytest.mark.parametrize("solver", ("ddpm", "ddim"))
@pytest.mark.parametrize("who", ("actor", "behavior"))
def test_acting_walks_by_the_solver_that_is_set(solver, who):
    "One sample, against the plain steps with the same noise."
    agent, plain = (kind(3, 2, BDPOConfig(**TINY, solver=solver)) for kind in (BDPO, Algorithm1))
    obs, generators = torch.randn(50, 3), [torch.Generator().manual_seed(3) for _ in range(2)]
    action = agent.act(obs, "sample", learner=who, generator=generators[0])
    normal = lambda: torch.randn(50, 1, 2, generator=generators[1])[:, 0]
    x = normal()
    with torch.no_grad():
        for k in range(5, 0, -1):
            n = torch.full((50,), k)
            eps = plain_eps(getattr(plain, who).target, obs, x, n)
            if solver == "ddim": x = plain.ddim_step(x, eps, n)
            else: x = plain.reverse_step(x, eps, n, normal() if k > 1 else torch.zeros_like(x))
    torch.testing.assert_close(action, x, rtol=1e-4, atol=1e-4)


# ---- what an update reports

def test_metrics_are_what_they_are_called():
    agent, b = learn(make(BDPO)), batch(7)
    plain = make(Algorithm1)
    for name in NAMES:
        for part in ("net", "target"):
            getattr(getattr(plain, name), part).load_state_dict(getattr(getattr(agent, name), part).state_dict())
    z = agent.draw(b, "critics")
    q_loss, v_loss, found = agent.critic_losses(b, **z)
    x = plain.noised(b.action, z["n"], z["eps"])
    with torch.no_grad():
        q, v = plain_q(plain.q.net, b.obs, b.action), plain_v(plain.v.net, b.obs, x, z["n"])         # (K, B)
        eps, nu = (plain_eps(net, b.obs, x, z["n"]) for net in (plain.actor.target, plain.behavior.target))
        paid = plain.look_ahead(b._replace(reward=0 * b.reward, terminal=0 * b.terminal), z["x_N"], z["path_noise"])
        plain.config = BDPOConfig(**TINY | dict(eta=0.0))
        free = plain.look_ahead(b._replace(reward=0 * b.reward, terminal=0 * b.terminal), z["x_N"], z["path_noise"])
    expected = {"q/loss": q_loss, "v/loss": v_loss, "q/mean": q.mean(), "v/mean": v.mean(),
                "q/std": torch.stack([q[:, i].std(correction=0) for i in range(q.shape[1])]).mean(),
                "q/penalty": ((free - paid) / agent.config.gamma / agent.config.eta).mean(),
                "v/penalty": plain.penalty(eps, nu, z["n"]).mean()}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.detach(), rtol=1e-9, atol=1e-12, msg=name)
    a = agent.draw(b, "actor")
    x = plain.noised(b.action, a["n"], a["eps"])
    loss, found = agent.policy_loss(b, **a)
    with torch.no_grad():
        eps, nu = (plain_eps(net, b.obs, x, a["n"]) for net in (plain.actor.net, plain.behavior.target))
    torch.testing.assert_close(found["actor/penalty"], plain.penalty(eps, nu, a["n"]).mean(), rtol=1e-9, atol=1e-12)
    assert found["actor/loss"] == loss and found["actor/penalty"] > 0


# ---- saving

def test_a_resumed_agent_goes_on_along_the_same_cosine():
    through, part = learn(make(BDPO), 6), make(BDPO, seed=9)
    part.load_state_dict(copy.deepcopy(through.state_dict()))
    assert [getattr(part, name).updates for name in NAMES] == [5, 1, 6, 6] and part.updates == 6
    for k in range(4):
        for agent in (through, part): agent.update(batch(50 + k))
    for name in NAMES:
        rates = [getattr(agent, name).optimizer.param_groups[0]["lr"] for agent in (through, part)]
        assert rates[0] == rates[1], name
        assert torch.equal(parameters(through, name), parameters(part, name)), name


# ---- a budget in the place of a price

AUTO = dict(eta="auto", nats_per_dim=0.3, warmup_steps=2)


def test_a_budget_moves_the_price():
    "First by the spread of Q over the batch, then by the penalty: at most one per cent with each update of the actor."
    agent, prices, spreads = make(BDPO, **AUTO), [], []
    seen = agent.seen
    agent.seen = lambda q, loss: spreads.append(q.mean(0).std().item()) or seen(q, loss)
    for k in range(8):
        met = agent.update(batch(k))
        assert "q/spread" not in met and math.isclose(met["eta"].item(), agent.eta, rel_tol=1e-6)
        prices.append(agent.eta)
    for price, spread in zip(prices[:3], spreads): assert math.isclose(price, spread / math.sqrt(2 * 0.6))
    steps = [abs(math.log(b / a)) for a, b in zip(prices[2:], prices[3:])]
    assert max(steps) < 0.01 + 1e-9 and [x > 0 for x in steps] == [True, False] * 2 + [True]   # updates 4, 6 and 8


def test_with_a_number_there_is_no_budget():
    agent = learn(make(BDPO), 6)
    assert agent.eta == agent.config.eta and "price" not in agent.state_dict()
    assert "eta" not in agent.update(batch())
    with pytest.raises(ValueError, match="constant eta"): Algorithm1(3, 2, BDPOConfig(**TINY | AUTO))
    for wrong in (dict(AUTO, gamma=0.0), dict(AUTO, nats_per_dim=0.0), dict(eta=-0.1)):
        with pytest.raises(ValueError): BDPOConfig(**TINY | wrong)


def test_the_price_is_saved():
    through, part = make(BDPO, **AUTO), make(BDPO, seed=9, **AUTO)
    for k in range(5): through.update(batch(k))
    part.load_state_dict(copy.deepcopy(through.state_dict()))
    for k in range(4):
        for agent in (through, part): agent.update(batch(50 + k))
    assert through.eta == part.eta != 1.0
    for name in NAMES: assert torch.equal(parameters(through, name), parameters(part, name)), name
