"""Chapter 28: each variant changes what it says, and nothing else."""
import json
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from bdpo_lit.algorithm.actor import actor_loss
from bdpo_lit.algorithm.bdpo import BDPO
from bdpo_lit.algorithm.critics import lcb, rollout, step_value
from bdpo_lit.algorithm.speed import Fleet, rough, synthetic_batch
from bdpo_lit.evidence import choices
from bdpo_lit.evidence.choices import Careful, ClippedPrice, FrozenClone, NarrowSteps, OnPolicy, ThroughChain
from bdpo_lit.evidence.sweep import read_results, summary
from bdpo_lit.offline.data import Batch, from_arrays
from bdpo_lit.offline.own_data import reward_unit
from bdpo_lit.offline.training import TrainConfig, Training
from bdpo_lit.theory.diffusion import posterior_mean, x0_from_eps
from bdpo_lit.theory.path_kl import step_kl_from_means

S, A, B = 4, 2, 12
CONFIG = replace(choices.HAND, actor_hidden=(8,), critic_hidden=(8,), time_dim=4, num_samples=3, warmup_steps=0,
                 actor_every=1)


def agent(kind, **settings):
    "In float64, with weights that do not depend on the kind."
    one = rough(kind(S, A, replace(CONFIG, **settings)))
    if kind is NarrowSteps: one.narrow()        # `rough` has made a schedule of its own
    one.draw_float, one._normal = one._normal, lambda *shape: one.draw_float(*shape).double()
    return one


@pytest.fixture
def batch(): return Batch(*(x.double() for x in synthetic_batch(B, S, A)))


def normal(*shape): return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def slope(loss, one): return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*one.actor.net.parameters()])])


def weights(learner): return [p.clone() for net in (learner.net, learner.target) for p in net.parameters()]


def same(x, y): return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def close(x, y, tolerance=1e-12): torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ---- through the chain

@pytest.mark.parametrize("clip", [1.0, None])
def test_a_priced_path_is_a_rollout_with_a_gradient(clip):
    one = agent(BDPO)
    given = one.actor.net, one.behavior.target, normal(B, S), normal(B, 3, A), normal(5, B, 3, A), one.sched
    found = choices.priced_path(*given, clip)
    close(found, rollout(*given, clip=clip))
    assert all(x.requires_grad for x in found)


def test_the_chains_gradient_is_that_of_its_value(batch):
    "Against finite differences of Eq. (28.1), price and nu's predictor included; without a clip, which has kinks."
    one = agent(ThroughChain, clip=None)
    draws = one.draw(batch, "actor")

    def value():
        x, price = rollout(one.actor.net, one.behavior.target, batch.obs, *draws.values(), one.sched, clip=None)
        q = one.q.target(batch.obs.unsqueeze(1), x).mean(-1)
        return (one.eta * price.mean(-1) - lcb(q, one.config.rho)).mean().item()

    loss, _ = one.policy_loss(batch, **draws)
    assert abs(value() - loss.item()) < 1e-12
    g, net, h = slope(loss, one), one.actor.net, 1e-6
    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    ends = []
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(start + sign * h * normal(len(start)), net.parameters())
        ends.append(value())
    close((ends[0] - ends[1]) / (2 * h), (g @ normal(len(start))).item(), 1e-6)


def test_with_one_step_chain_and_value_agree(batch):
    "N = 1: from the same a^1 the two gradients are one (V_0 is Q); with N = 2 they are not."
    for N, equal in ((1, True), (2, False)):
        step, chain = (agent(kind, num_steps=N) for kind in (BDPO, ThroughChain))
        x, n, noise = normal(B, A), torch.full((B,), N), normal(N, B, 1, A)
        inputs = step.step_inputs(batch, n, 0 * x, noise[0]) | dict(x=x)
        one = slope(actor_loss(step.actor.net, **inputs)[0], step)
        other = slope(chain.policy_loss(batch, x[:, None], noise)[0], chain)
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12) == equal


def test_the_chain_leaves_the_lower_critic_alone(batch):
    one, two = agent(ThroughChain), agent(BDPO)
    for a in (one, two):
        before, q = weights(a.v), weights(a.q)
        for _ in range(3): a.update(batch)
        assert same(before, weights(a.v)) == (a is one) and not same(q, weights(a.q))


# ---- the clone, the price, the noisy actions

def test_a_frozen_clone_learns_before_and_not_after(batch):
    for kind in (FrozenClone, BDPO):
        one = agent(kind)
        fresh = weights(one.behavior)
        one.update_behavior(batch)
        before = weights(one.behavior)
        assert not same(fresh, before)
        actor = weights(one.actor)
        for _ in range(3): one.update(batch)
        assert same(before, weights(one.behavior)) == (kind is FrozenClone)
        assert not same(actor, weights(one.actor))


def test_the_clipped_price_is_that_of_the_steps_walked():
    one, n = agent(ClippedPrice), torch.tensor([1, 2, 3, 4, 5, 5])
    x, eps, eps_nu = (2 * normal(6, A) + k for k in range(3))
    paid = one.step_price(x, eps, eps_nu, n)
    mean = lambda e: posterior_mean(x, x0_from_eps(x, e, n, one.sched).clamp(-1, 1), n, one.sched)
    close(paid, step_kl_from_means(mean(eps), mean(eps_nu), one.sched.beta[n]))
    free = agent(ClippedPrice, clip=None).step_price(x, eps, eps_nu, n)
    assert (paid <= free + 1e-12).all() and (paid < free - 1e-6).any()


def test_without_a_clip_the_two_prices_are_one(batch):
    one, two = agent(ClippedPrice, clip=None), agent(BDPO, clip=None)
    for a, b in zip(one.critic_losses(batch, **one.draw(batch, "critics"))[:2],
                    two.critic_losses(batch, **two.draw(batch, "critics"))[:2]): close(a, b, 1e-9)
    losses = [a.policy_loss(batch, **a.draw(batch, "actor"))[0] for a in (one, two)]
    close(*losses, 1e-9)
    close(slope(losses[0], one), slope(losses[1], two), 1e-9)


def test_with_a_clip_all_three_prices_change(batch):
    one, two = agent(ClippedPrice, eta=5.0), agent(BDPO, eta=5.0)
    for learner in (one, two):      # far from nu, so that clips bind
        for net in (learner.actor.net, learner.actor.target):
            for p in net.mlp.head.parameters(): p.data += 3
    both = [(a.draw(batch, "critics"), a.draw(batch, "actor"), a) for a in (one, two)]
    ours, theirs = ([*a.critic_losses(batch, **c)[:2], a.policy_loss(batch, **p)[0]] for c, p, a in both)
    assert all((x - y).abs() > 1e-3 for x, y in zip(ours, theirs))


def test_narrow_steps_are_those_of_the_posterior_and_their_price_is_their_kl():
    one, usual, n = agent(NarrowSteps), agent(BDPO).sched, torch.tensor([1, 2, 3, 4, 5, 5])
    x, eps, eps_nu = (2 * normal(6, A) + k for k in range(3))
    mean = lambda e: posterior_mean(x, x0_from_eps(x, e, n, usual), n, usual)
    var = torch.where(n == 1, usual.beta[n], usual.posterior_var[n])
    close(one.step_price(x, eps, eps_nu, n), step_kl_from_means(mean(eps), mean(eps_nu), var))
    close(one.step_price(x, eps, eps_nu, 3)[2:3], one.step_price(x, eps, eps_nu, n)[2:3])
    close(one.sched.beta[2:], usual.posterior_var[2:])
    close(one.sched.alpha_bar, usual.alpha_bar)


def test_narrow_steps_are_walked_by_critics_actor_and_player_alike(batch):
    "Critics see the swapped schedule; the policy's actions are those of `ddpm_step` on it."
    one, x_N, noise = agent(NarrowSteps, clip=None), normal(B, 1, A), normal(5, B, 1, A)
    found, price = choices.priced_path(one.actor.target, one.behavior.target, batch.obs, x_N, noise, one.sched, None,
                                       one.step_price)
    x, total, obs, var = x_N[:, 0], 0.0, batch.obs, one.wide.posterior_var
    for i, n in enumerate((5, 4, 3, 2, 1)):
        eps, eps_nu = one.actor.target(obs, x, n), one.behavior.target(obs, x, n)
        mean = [posterior_mean(x, x0_from_eps(x, e, n, one.wide), n, one.wide) for e in (eps, eps_nu)]
        total = total + step_kl_from_means(*mean, var[n] if n > 1 else one.wide.beta[1])
        x = mean[0] + var[n].sqrt() * noise[i, :, 0]
    close(found[:, 0], x)
    close(price[:, 0], total)
    assert one.step_inputs(batch, **one.draw(batch, "actor"))["sched"] is one.sched
    a, _ = one.look_ahead(batch, x_N, noise)
    b, _ = agent(BDPO, clip=None).look_ahead(batch, x_N, noise)
    assert (a - b).abs().max() > 1e-4


def test_what_the_clone_learns_does_not_depend_on_how_it_is_walked(batch):
    one, two = agent(NarrowSteps), agent(BDPO)
    for a in (one, two):
        a.generator.manual_seed(5)
        for _ in range(3): a.update(batch)
    assert same(weights(one.behavior), weights(two.behavior)) and not same(weights(one.actor), weights(two.actor))


def test_own_noisy_actions_are_those_of_the_walk(batch):
    one, n, noise = agent(OnPolicy), torch.arange(B) % 5 + 1, normal(B, 3, A)
    eps = one.draw(batch, "actor")["eps"]
    x = one.step_inputs(batch, n, eps, noise)["x"]
    for i in range(B):      # one row at a time, with the plain predictor
        y = eps[0, i:i + 1]
        for k, m in enumerate(range(5, int(n[i]), -1)):
            at = torch.tensor([m])
            x0 = x0_from_eps(y, one.actor.target(batch.obs[i:i + 1], y, at), at, one.sched).clamp(-1, 1)
            y = posterior_mean(y, x0, at, one.sched) + one.sched.beta[m].sqrt() * eps[1 + k, i:i + 1]
        close(x[i:i + 1], y, 1e-9)


def test_at_the_top_of_the_path_own_actions_are_noise(batch):
    "n = N: a^N is drawn, not walked to; the value of the step is as `step_value` says."
    one, n = agent(OnPolicy), torch.full((B,), 5)
    eps = one.draw(batch, "actor")["eps"]
    step = one.step_inputs(batch, n, eps, normal(B, 3, A))
    assert torch.equal(step["x"], eps[0])
    close(one.policy_loss(batch, n, eps, normal(B, 3, A))[0], -step_value(one.actor.net, **step)[0].mean())


# ---- choosing

def test_choice_by_the_bound_is_choice_by_the_mean_without_pessimism():
    obs, actions = normal(50, S), normal(50, 9, A)
    picks = {rho: agent(Careful, rho=rho).choose(obs, actions) for rho in (0.0, 1.0, 50.0)}
    usual = agent(BDPO).choose(obs, actions)
    assert torch.equal(picks[0.0], usual) and not torch.equal(picks[50.0], usual)
    spread = agent(BDPO).q.target(obs.unsqueeze(1), actions).std(0, correction=0)
    at = lambda chosen: spread[(actions == chosen[:, None]).all(-1)].mean()
    assert at(picks[50.0]) < at(picks[0.0])


# ---- together, and from the start to the table

@pytest.mark.parametrize("kind", [ThroughChain, ClippedPrice, NarrowSteps, OnPolicy, choices.HalfProducts])
def test_a_fleet_trains_a_variant_as_it_would_train_alone(kind, batch):
    alone, fleet = ([agent(kind, num_steps=3) for _ in range(2)] for _ in range(2))
    for k, (a, b) in enumerate(zip(alone, fleet)): a.generator.manual_seed(k); b.generator.manual_seed(k)
    program = Fleet(fleet)
    for a in alone:
        for _ in range(2): a.update(batch)
    for _ in range(2): program.update([batch, batch])
    program.give_back()
    for a, b in zip(alone, fleet):
        for learner in ("actor", "q", "behavior"):
            close(weights(getattr(a, learner)), weights(getattr(b, learner)), 1e-6)


@pytest.fixture(scope="module")
def raw():
    rng = np.random.default_rng(0)
    ends = np.arange(1000) % 10 == 9
    return from_arrays(rng.normal(size=(1000, 3)).astype("f4"), rng.uniform(-2, 2, (1000, 1)).astype("f4"),
                       rng.normal(size=1000).astype("f4"), ends, action_low=-2.0, action_high=2.0,
                       max_episode_steps=10)


def test_all_seeds_together_are_what_training_makes_of_each(raw):
    "From the first update to the last, to rounding: so the runs of chapter 26 can stand for `base`."
    data, states = choices.begin(raw, [0, 3], CONFIG, steps=3)
    (_, agents, _), = choices.go_on(BDPO, states, data, [3], CONFIG)
    scaled = replace(raw, reward=reward_unit(raw, CONFIG.gamma) * raw.reward)
    for seed, one in zip((0, 3), agents):
        config = TrainConfig(3, 3, choices.BATCH, seed, "cpu", normalize_obs=True)
        training = Training(scaled, config, CONFIG)
        for _ in training.run(): pass
        for name in ("behavior", "actor", "q", "v"):
            close(weights(getattr(one, name)), weights(getattr(training.agent, name)), 1e-5)


def test_variants_start_from_the_same_state(raw):
    data, states = choices.begin(raw, [0, 1], CONFIG, steps=3)
    assert data.action.abs().max() <= 1 and not torch.equal(states[0]["generator"], states[1]["generator"])
    for kind in (BDPO, ThroughChain, OnPolicy):
        (step, agents, spent), = choices.go_on(kind, states, data, [1], CONFIG)
        assert (step, len(agents)) == (1, 2) and spent > 0 and all(type(a) is kind for a in agents)
        for a, state in zip(agents, states):
            start = state["actor"]["net"]["mlp.head.weight"]
            assert torch.equal(start, state["behavior"]["target"]["mlp.head.weight"])
            assert 0 < (a.actor.net.mlp.head.weight - start).abs().max() < 1.01 * CONFIG.actor_lr


def test_one_program_keeps_the_clone_frozen(raw):
    data, states = choices.begin(raw, [0], CONFIG, steps=3)
    for kind in (FrozenClone, BDPO):
        (_, (one,), _), = choices.go_on(kind, states, data, [2], CONFIG)
        still = all(torch.equal(x, states[0]["behavior"]["net"][k]) for k, x in one.behavior.net.state_dict().items())
        assert still == (kind is FrozenClone)


def test_noise_of_a_known_gradient(raw):
    "A loss whose gradient is a constant and noise of known variance: Eq. (28.2)."
    class Known(BDPO):
        def draw(self, batch, what): return dict(z=torch.randn(self.size, generator=self.generator))

        def policy_loss(self, batch, z):
            flat = torch.cat([p.flatten() for p in self.actor.net.parameters()])
            return flat @ (0.5 + 2.0 * z), {}
    one = Known(3, 1, CONFIG)
    one.size = sum(p.numel() for p in one.actor.net.parameters())
    noise, mean = choices.gradient_noise(one, raw, draws=400)
    assert abs(noise / 16 - 1) < 0.1, "2^2 over 0.5^2; without the correction of the mean it were 15.4"
    assert abs(mean.mean() - 0.5) < 0.05


def test_error_of_the_lower_critic_and_price_of_paths(batch):
    "Constant critics and nothing to pay: the error is their difference. Far apart, clipped paths cost less."
    one = agent(BDPO, eta=0.0, rho=0.0)
    for net, value in ((one.v.net, 1.5), (one.v.target, 4.0), (one.q.target, 4.0)):
        net.mlp.head.weight.data.zero_(); net.mlp.head.bias.data.fill_(value)
    error, spread = choices.lower_error(one, batch)
    assert abs(error - 2.5) < 1e-12 and spread < 1e-12
    for p in one.actor.target.mlp.head.parameters(): p.data += 3
    usual, clipped = choices.path_prices(one, batch)
    assert 0 < clipped < usual
    one.actor.target.load_state_dict(one.behavior.target.state_dict())
    assert choices.path_prices(one, batch) == (0.0, 0.0)


class Coast(gym.Env):
    "Twenty steps, whatever one does; pays for small actions."
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype("f4"), {}

    def step(self, action): return self.np_random.normal(size=3).astype("f4"), -float(action[0]**2), False, False, {}


def test_from_the_start_to_the_table(raw, tmp_path, monkeypatch):
    "Two variants, candidates and noise, at the smallest size; what is there is not made again."
    monkeypatch.setattr(choices, "HAND", CONFIG)
    monkeypatch.setattr(choices, "PRETRAIN", 2)
    make_env = lambda: gym.wrappers.TimeLimit(Coast(), 5)
    for variant, stops in (("base", (2,)), ("chain", (1, 2))):
        choices.compare("coast", variant, raw, make_env, stops, tmp_path, seeds=range(2))
    choices.candidates("coast", raw, make_env, 2, tmp_path, Ms=(1, 2))
    choices.looks("coast", raw, 2, tmp_path, draws=3)
    with pytest.raises(ValueError, match=r"begins seeds \[0, 1\], not \[5, 6\]"):
        choices.compare("coast", "frozen", raw, make_env, (2,), tmp_path, seeds=(5, 6))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    choices.compare("coast", "base", raw, make_env, (2,), tmp_path, seeds=range(2))
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
    choices.gather(tmp_path, tmp_path / "choices.csv")
    rows = read_results(tmp_path / "choices.csv")
    count = {e: sum(r["experiment"] == e for r in rows) for e in
             ("choices", "candidates", "noise", "cosine", "error", "spread", "nats")}
    assert count == dict(choices=4 + 4, candidates=2 * (2 + 1 + 2), noise=8, cosine=8, error=4, spread=4, nats=4)
    assert all(r["commit"] and r["date"] and r["status"] == "finished" for r in rows)
    line, = summary([r for r in rows if r["experiment"] == "choices" and r["variant"] == "base"])
    assert line["seeds"] == 2 and line["low"] <= line["iqm"] <= line["high"] <= 0 and line["seconds"] >= 0
    one = {r["seed"]: r["mean"] for r in rows if r["experiment"] == "choices" and r["variant"] == "base"
           and r["who"] == "last"}
    again = {r["seed"]: r["mean"] for r in rows if r["experiment"] == "candidates" and r["num_actions"] == 1
             and r["who"] == "last"}
    assert one == again, "one candidate is one draw"
    late = [*(r["mean"] for r in rows if (r["variant"], r["step"]) == ("chain", 1))]
    gain, low, high, ahead = choices.gains(rows, "coast", "chain", 1, 2)
    assert gain == pytest.approx(np.mean(late) - np.mean([*one.values()])) and low <= gain <= high and 0 <= ahead <= 2
    assert json.loads((tmp_path / "coast-base.json").read_text())[0]["unit"] == "return"
