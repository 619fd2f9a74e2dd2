"The four instruments: against closed forms, and against agents that are broken on purpose."
import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.algorithm.critics import rollout
from bdpo_lit.evidence import diagnostics
from bdpo_lit.evidence.diagnostics import (
    diagnose,
    diagnose_run,
    draw_diagnosis,
    gaussian_agent,
    price_curve,
    remaining,
    surprise,
    symptoms,
    value_curve,
    value_error,
    wrong_share,
)
from bdpo_lit.evidence.toy2d import make_bandit
from bdpo_lit.offline.data import Transitions, from_arrays
from bdpo_lit.offline.training import TrainConfig, Training

f64 = dict(dtype=torch.float64)
SLOPE = torch.tensor([0.5, -0.3], **f64)
OBS = torch.zeros(200, 1, **f64)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def mean(x): return float(x.mean()), float(x.std()) / len(x)**0.5


# ---- against closed forms

@pytest.mark.parametrize("curve", [0.0, 1.5])
def test_walks_agree_with_exact_values(curve):
    agent, values = gaussian_agent(SLOPE, curve, 0.4)
    found = value_curve(agent, OBS[:100], generator=seeded())
    for x in found:
        assert abs(x["bias"]) < 4 * x["se"] + 1e-9, x
        assert x["error"] < 0.15 * x["spread"] + 0.03, x
    assert wrong_share(found) < 0.2


def test_errors_of_values_are_measured():
    agent, _ = gaussian_agent(SLOPE, 0.8, 0.4)
    right = agent.v.target
    x = torch.randn(200, 16, 2, generator=seeded(), **f64)
    agent.v.target = lambda *a: right(*a) + 0.1                  # a constant: bias, and no error inside a state
    found = value_error(agent, OBS, x, 4, generator=seeded(1))
    assert abs(found["bias"] - 0.1) < 4 * found["se"] and found["error"] < 0.2 * found["spread"]
    agent.v.target = lambda *a: 0.5 * right(*a)                  # half the slope: half the spread is wrong
    found = value_error(agent, OBS, x, 4, generator=seeded(1))
    assert abs(found["error"] / found["spread"] - 0.5) < 0.05
    wave = lambda x: 0.1 * torch.sin(20 * x[..., 0])             # members that know where they are wrong
    agent.v.target = lambda obs, x, n: right(obs, x, n) + torch.stack([wave(x), 3 * wave(x)])
    found = value_error(agent, OBS, x, 4, num_walks=64, generator=seeded(1))
    low, *_, high = found["by_std"]
    assert abs(high[1] / high[0] - 2) < 0.2 and low[0] < high[0] / 3 and low[1] < high[1] / 2
    assert abs(found["std"] - float(wave(x).abs().mean())) < 1e-6


@pytest.mark.parametrize("curve", [0.0, 0.8, 3.0])
@pytest.mark.parametrize("num_steps", [2, 10])
def test_nats_left_are_those_of_the_closed_form(curve, num_steps):
    "The bound holds with equality for a linear Q; a curved one loses what equal variances cost, which is known."
    agent, values = gaussian_agent(SLOPE, curve, 0.4, num_steps)
    c = [float(lam * beta / 0.4) for (*_, lam), beta in zip(values[1:-1], agent.sched.beta[2:])]
    exact = sum(x - math.log1p(x) for x in c)                    # two components, a half each
    found = remaining(agent, OBS, generator=seeded(1))
    nats, se = mean(found["nats"])
    assert abs(nats - exact) < 4 * se + 0.003 and se < 0.02
    off, se = mean(found["off"])
    assert abs(off) < 4 * se


def test_nats_left_of_a_policy_that_stays():
    "pi = nu and a linear Q: the nats left are the KL of the optimum, in closed form."
    agent, values = gaussian_agent(SLOPE, 0.0, 0.4)
    best = values[-1]
    agent.actor.target = agent.behavior.target
    found = remaining(agent, OBS, 128, 256, seeded(2))
    # V_n of nu: the mean of b.a^0; the optimum pays it plus its own gain, of which n = 1 is not pi's to have
    b, gain = SLOPE, 0.0
    for n in range(1, 11):
        if n > 1: gain += float(agent.sched.beta[n] * (b @ b) / (2 * 0.4**2))
        b = values[n][1]
    nats, se = mean(found["nats"])
    assert abs(nats - gain) < 4 * se + 0.003
    assert float(price_curve(agent, OBS, generator=seeded()).abs().max()) == 0
    assert best[2] == 0


def test_the_ceilings_bias_is_as_stated():
    "Eq. (29.6): few draws against many, for log-normal weights whose variance is known from the optimum's recursion."
    agent, _ = gaussian_agent(2 * SLOPE, 0.0, 0.4, num_steps=4)
    obs = torch.zeros(2000, 1, **f64)
    few = remaining(agent, obs, 2, 20, seeded(3))["ceiling"] / 0.4
    many = remaining(agent, obs[:20], 2, 4000, seeded(4))
    bias = float((4000 / many["draws"] - 1).mean()) / 2 * (1 / 20 - 1 / 4000)
    measured = float(many["ceiling"].mean()) / 0.4 - mean(few)[0]
    assert bias > 6 * mean(few)[1] and abs(measured - bias) < 4 * mean(few)[1] + 0.15 * bias


def test_surprise_is_the_variational_bound():
    "For a Gaussian nu its expectation is a formula, quadratic in the action."
    agent, _ = gaussian_agent(SLOPE, 0.0, 0.4, var=0.25)
    a = torch.linspace(-2, 2, 9, **f64)[:, None].expand(9, 2)
    s, exact = agent.sched, torch.zeros(9, **f64)
    for n in range(1, 11):
        bar = s.alpha_bar[n]
        k = (1 - bar).sqrt() / (bar * 0.25 + 1 - bar)
        square = 2 * (1 - k * (1 - bar).sqrt())**2 + k**2 * bar * (a - 0.3).square().sum(1)
        exact += s.beta[n] / (2 * s.alpha[n] * (1 - bar)) * square
    found = surprise(agent, torch.zeros(9, 1, **f64), a, 8000, seeded())
    assert torch.allclose(found, exact, rtol=0.04)


def test_prices_are_those_of_the_targets_walks():
    agent = _tiny()
    obs, x = torch.randn(5, 3, generator=seeded()), torch.randn(5, 7, 2, generator=seeded(1))
    walk, again = list(diagnostics.descend(agent, obs, x, 4, generator=seeded(2))), seeded(2)
    noise = torch.stack([torch.randn(x.shape, generator=again) for _ in range(4)])
    a, paid = rollout(agent.actor.target, agent.behavior.target, obs, x, noise, agent.sched, clip=1.0)
    assert torch.allclose(walk[-1][3], a, atol=1e-5) and torch.allclose(sum(w[2] for w in walk), paid, rtol=1e-4)
    assert [w[0] for w in walk] == [4, 3, 2, 1]


# ---- on agents and runs

def _tiny(**changes):
    config = BDPOConfig(eta=0.5, num_steps=4, num_critics=2, num_samples=1, actor_hidden=(8,), critic_hidden=(8,),
                        time_dim=4, warmup_steps=0, actor_every=1, actor_lr=0.05)
    agent = BDPO(3, 2, replace(config, **changes))
    with torch.no_grad():
        for p in agent.actor.target.parameters(): p += 0.3 * torch.randn(p.shape, generator=seeded(9))
    return agent


def _rows(T=400):
    rng = np.random.default_rng(0)
    ends = np.arange(T) % 40 == 39
    return from_arrays(rng.normal(3, 2, (T, 3)), rng.uniform(-2, 2, (T, 2)), rng.normal(size=T),
                       ends & (rng.random(T) < 0.5), ends, action_low=-2, action_high=2)


def test_a_diagnosis_is_plain_numbers_and_disturbs_nothing():
    agent, data = _tiny(), _rows()
    before = copy.deepcopy(agent.state_dict())
    found = diagnose(agent, data, num_states=8)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(diagnose(agent, data, num_states=8)))
    assert json.dumps(found) != json.dumps(diagnose(agent, data, num_states=8, seed=1))
    after = agent.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert all(torch.equal(x, after["v"]["target"][k]) for k, x in before["v"]["target"].items())
    assert len(found["price"]) == 4 and [x["n"] for x in found["values"]] == [1, 2, 3, 4]
    assert len(draw_diagnosis(found).axes) == 4
    with pytest.raises(ValueError, match="no price"): diagnose(_tiny(eta=0.0), data)


def test_a_run_is_diagnosed_from_its_directory(tmp_path):
    "In the run's units: of reward, observations and actions."
    raw = _rows()
    data = replace(raw, reward=raw.reward * 3, meta=raw.meta | dict(reward_scale=3.0))
    plan = TrainConfig(pretrain_steps=3, train_steps=5, batch_size=32, eval_every=0, normalize_obs=True, device="cpu")
    run = Training(data, plan, _tiny().config, None, tmp_path / "run")
    for _ in run.run(): pass
    here = diagnose(run.agent, run.data, num_states=8)
    text = lambda f: json.dumps(f)
    assert text(diagnose_run(tmp_path / "run", raw, num_states=8)) == text(here)
    assert text(diagnose_run(tmp_path / "run", data, num_states=8)) == text(here)
    assert here["q"]["bounds"][1] == pytest.approx(float(data.reward[data.terminal == 0].max()) / 0.01, rel=1e-3)


# ---- each instrument trips on its fault

@pytest.fixture(scope="module")
def faults():
    "Small agents on a plane whose reward is the first coordinate; all but the first are broken."
    torch.set_num_threads(1)
    bandit = make_bandit("8gaussians", 4000)
    zero = torch.zeros(4000, 1)
    data = Transitions(zero, bandit.points, bandit.points[:, 0].clone(), zero.clone(), torch.ones(4000),
                       torch.arange(4000))
    config = BDPOConfig(eta=1.0, gamma=0.0, rho=0.0, num_steps=5, num_critics=2, num_samples=1, clip=None,
                        actor_hidden=(32,) * 2, critic_hidden=(32,) * 2, time_dim=8, behavior_lr=4e-3, actor_lr=4e-3,
                        critic_lr=8e-3, actor_decay_steps=180, critic_decay_steps=260, ema=0.1, actor_every=1,
                        warmup_steps=40)
    nu, draw = BDPO(1, 2, config), seeded()
    for _ in range(500): nu.update_behavior(data.sample(128, draw))
    def run(updates=220, frozen=(), **changes):
        agent, draw = BDPO(1, 2, replace(config, **changes), seed=1), seeded(1)
        agent.behavior.load_state_dict(copy.deepcopy(nu.behavior.state_dict()))
        agent.start_actor()
        for name in frozen: getattr(agent, name).step = lambda loss: loss.detach()
        for _ in range(updates): agent.update(data.sample(128, draw))
        return diagnose(agent, data, num_states=32)
    return {"healthy": run(), "actor": run(frozen=["actor"]), "v": run(frozen=["v"]), "small": run(eta=0.05),
            "large": run(eta=20.0), "one": run(updates=1, num_critics=1)}


@pytest.mark.parametrize("run, sign", [
    ("actor", "nothing paid, nats left, V_n right"), ("v", "V_n wrong by much of its spread"),
    ("small", "actions outside the data"), ("small", "hardly a draw counts in the ceiling"),
    ("small", "Q above what is attainable"), ("large", "nothing paid, nothing left"), ("one", "an ensemble of one")])
def test_a_fault_is_found_where_it_is(faults, run, sign):
    assert sign in [name for name, *_ in symptoms(faults[run])]
    assert sign not in [name for name, *_ in symptoms(faults["healthy"])]


def test_a_healthy_run_has_no_symptoms(faults): assert symptoms(faults["healthy"]) == []


def test_signs_of_time_and_budget(faults):
    found = copy.deepcopy(faults["healthy"])
    found["setting"] |= dict(budget=10 * sum(found["price"]), settled=0.5)
    found["left"] |= dict(off=2.0, off_se=0.1)
    names = [name for name, *_ in symptoms(found)]
    assert names == ["less than half the budget paid", "V_N far from the worth of walks",
                     "too few updates for the horizon"]
