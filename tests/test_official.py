"""Every formula and every update against the numbers of the official JAX implementation (official/README.md)."""
from pathlib import Path

import numpy as np
import pytest
import torch

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig, cosine_rate
from bdpo_lit.algorithm.behavior import noise_prediction_loss
from bdpo_lit.algorithm.critics import lcb, q_target, rollout, step_value, value_loss
from bdpo_lit.algorithm.networks import TimeEmbedding, mish
from bdpo_lit.offline.data import Batch
from bdpo_lit.theory.diffusion import ddim_step, forward_sample, reverse_mean, reverse_path, vp_schedule
from bdpo_lit.theory.path_kl import step_kl

VALUES = np.load(Path(__file__).parent / "official" / "values.npz")
CASES = {"T5_clip_rho0": dict(clip=1.0, rho=0.0), "T5_noclip_rho0.5": dict(clip=None, rho=0.5)}
ETA, GAMMA, N = 0.7, 0.99, 5


def value(key):
    "One array as a tensor; a trailing axis of one that the official code gives to scalars is kept."
    return torch.from_numpy(np.array(VALUES[key]))


def close(ours, key, tol=1e-5, squeeze=False):
    "Equal to `tol`, relative to the largest entry of the array: both sides were computed in float32."
    theirs = value(key).squeeze(-1) if squeeze else value(key)
    assert ours.shape == theirs.shape, f"{key}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = (ours.detach() - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-8)
    assert error < tol, f"{key}: relative error {error:.2g}"


def parameters(net, kind):
    "Our parameters by the official name, in the official shape."
    single = kind == "eps"
    base = "" if single else "base/"
    layers = {}
    if kind != "q":
        layers = {f"{base}MLP_0/Dense_{i}": m for i, m in enumerate((net.time.first, net.time.second))}
    trunk = "noise_predictor" if single else "base/backbone"
    layers |= {f"{trunk}/Dense_{i}": m for i, m in enumerate(net.mlp.layers)}
    layers[f"{trunk}/Dense_{len(net.mlp.layers)}" if single else "base/Dense_0"] = net.mlp.head
    named = {f"{name}/{theirs}": getattr(m, ours)
             for name, m in layers.items() for ours, theirs in (("weight", "kernel"), ("bias", "bias"))}
    if kind == "v":
        named |= {f"base/backbone/LayerNorm_{i}/{theirs}": getattr(m, ours)
                  for i, m in enumerate(net.mlp.norms) for ours, theirs in (("weight", "scale"), ("bias", "bias"))}
    return named


def unsqueezed(array, param):
    "A single network is an ensemble of one."
    return array if array.shape == param.shape else array[None]


NETS = {"behavior": "eps", "actor": "eps", "q": "q", "v": "v"}   # learner -> kind; official names: q0, vt
OFFICIAL = {"behavior": "behavior", "actor": "actor", "q": "q0", "v": "vt"}


class Case:
    "An agent with the official parameters, fed the official random draws in order."
    def __init__(self, name):
        self.name, self.options = name, CASES[name]
        config = BDPOConfig(eta=ETA, gamma=GAMMA, num_steps=N, num_critics=3, num_samples=4, actor_hidden=(16, 16),
                            critic_hidden=(16, 16), time_dim=8, warmup_steps=0, **self.options)
        self.agent, self.sched = BDPO(3, 2, config), vp_schedule(N)
        for learner, kind in NETS.items():
            for which in ("net", "target"):
                prefix = f"{name}/params/{OFFICIAL[learner]}{'_target' if which == 'target' else ''}"
                net = getattr(getattr(self.agent, learner), which)
                for key, p in parameters(net, kind).items(): p.data.copy_(unsqueezed(value(f"{prefix}/{key}"), p))
        get = self.get
        self.batch = Batch(get("batch/obs"), get("batch/action"), get("batch/reward")[:, 0], get("batch/next_obs"),
                           get("batch/terminal")[:, 0])

    def get(self, key): return value(f"{self.name}/{key}")
    def steps(self, key): return self.get(key)[:, 0].long()
    def close(self, ours, key, *args, **kwargs): close(ours, f"{self.name}/{key}", *args, **kwargs)

    def feed(self, *draws):
        "Replace the agent's random stream by the official draws."
        queue = list(draws)
        def take(*shape):
            draw = queue.pop(0)
            assert draw.shape == shape, f"the update asked for {shape}, the official code drew {tuple(draw.shape)}"
            return draw
        self.agent._normal, self.agent._steps = take, lambda batch_size: take(batch_size)
        return queue

    def close_gradients(self, learner, key):
        for name, p in parameters(getattr(self.agent, learner).net, NETS[learner]).items():
            theirs = self.get(f"{key}/{name}")
            scale = theirs.abs().max().clamp_min(1e-6)
            error = ((p.grad - unsqueezed(theirs, p)).abs().max() / scale).item()
            assert error < 1e-5, f"{key}/{name}: relative error {error:.2g}"

    def close_parameters(self, learner, which, key, lr):
        "After one Adam step of about lr * sign(gradient): agree to a tenth of it, and to the last bits of float32."
        for name, p in parameters(getattr(getattr(self.agent, learner), which), NETS[learner]).items():
            theirs = unsqueezed(self.get(f"{key}/{name}"), p)
            assert (p - theirs).abs().max() < 0.1 * lr + 2.5e-7, f"{key}/{name}"


@pytest.fixture(params=CASES)
def case(request): return Case(request.param)


@pytest.mark.parametrize("T", (5, 50))
def test_schedule(T):
    sched = vp_schedule(T)
    for ours, key in ((sched.beta, "betas"), (sched.alpha, "alphas"), (sched.alpha_bar, "alpha_hats"),
                      (sched.posterior_var, "postvars_exact")):
        close(ours, f"sched/T{T}/{key}")
    np.testing.assert_allclose(vp_schedule(T, dtype=torch.float64).alpha_bar, VALUES[f"sched/T{T}/alpha_hats_float64"],
                               rtol=1e-12)
    n = torch.arange(1, T + 1)
    weight = step_kl(torch.ones(T, 1), torch.zeros(T, 1), n, sched)
    np.testing.assert_allclose(weight, VALUES[f"sched/T{T}/penalty_weight"][1:], rtol=1e-5)


def test_activation_embedding_and_learning_rate():
    x = value("mish/x").requires_grad_()
    y = mish(x)
    y.sum().backward()
    close(y, "mish/y")
    close(x.grad, "mish/grad")
    close(TimeEmbedding(50, 64).waves, "time_embedding/out64")
    rates = [3e-4 * cosine_rate(step, 1000) for step in (0, 1, 500, 1000, 2000)]
    np.testing.assert_allclose(rates, VALUES["cosine/lr_at_0_1_500_1000_2000"], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rho", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("max_q", (False, True))
def test_ensemble_target(rho, max_q):
    values = value("get_target/vs").squeeze(-1)
    B, M = values.shape[1:]
    ours = q_target(torch.zeros(B), torch.zeros(B), values, torch.zeros(B, M), gamma=1.0, eta=0.0, rho=rho, max_q=max_q)
    close(ours, f"get_target/lcb_rho{rho}_maxQ{max_q}", squeeze=True)


def test_ensemble_target_gradient():
    values = value("get_target/vs").squeeze(-1).requires_grad_()
    lcb(values.mean(-1), 0.5).sum().backward()
    close(values.grad, "get_target/lcb_rho0.5_grad_sum", squeeze=True)


def test_networks(case):
    agent, b, n = case.agent, case.batch, case.steps("fwd/t")
    case.close(agent.behavior.net(b.obs, b.action, n), "fwd/behavior_eps")
    case.close(agent.actor.net(b.obs, b.action, n), "fwd/actor_eps")
    case.close(agent.q.net(b.obs, b.action), "fwd/q0", squeeze=True)
    case.close(agent.v.net(b.obs, b.action, n), "fwd/vt", squeeze=True)


def test_one_step(case):
    x, n, clip, sched = case.get("step/xt"), case.steps("step/t"), case.options["clip"], case.sched
    eps = case.agent.actor.net(case.batch.obs, x, n)
    case.close(eps, "step/eps")
    mean, std = reverse_mean(x, eps, n, sched, clip), (sched.beta[n].sqrt() * (n > 1)).unsqueeze(-1)
    case.close(mean, "step/ddpm_mean")
    case.close(std, "step/ddpm_std")
    case.close(mean.unsqueeze(1) + std.unsqueeze(1) * case.get("step/noise"), "step/ddpm_sample")
    case.close(ddim_step(x, eps, n, sched, clip), "step/ddim_next")


def test_ddim_path(case):
    agent, clip = case.agent, case.options["clip"]
    path = list(reverse_path(lambda x, n: agent.actor.net(case.batch.obs, x, n), case.get("ddim_sample/xT"),
                             case.sched, "ddim", clip))
    case.close(torch.stack([x for _, x, _, _ in path]), "ddim_sample/path_x")
    case.close(torch.stack([eps for _, _, eps, _ in path]), "ddim_sample/path_eps")
    case.close(path[-1][-1], "ddim_sample/action")


def test_penalty(case):
    eps, ref, n = case.get("penalty/actor_eps"), case.get("penalty/behavior_eps"), case.steps("step/t")
    np.testing.assert_allclose(step_kl(eps, ref, n, case.sched), case.get("penalty/out").sum(-1), rtol=1e-5)


def test_rollout(case):
    agent, noise = case.agent, case.get("critic/step_noise")
    action, penalty = rollout(agent.actor.target, agent.behavior.target, case.batch.next_obs, case.get("critic/xT"),
                              noise, case.sched,
                              clip=case.options["clip"])
    case.close(action, "critic/next_action")
    case.close(penalty.mean(), "critic/metric/misc_q0_penalty")


def test_critic_update(case):
    agent, n = case.agent, case.steps("critic/t")
    left = case.feed(case.get("critic/xT"), case.get("critic/step_noise"), n, case.get("critic/eps"),
                     case.get("critic/onestep_noise"))
    case.close(forward_sample(case.batch.action, n, case.get("critic/eps"), case.sched), "critic/xt")
    clip_norm = agent.config.clip_grad_norm
    for learner in (agent.q, agent.v): learner.clip_grad_norm = float("inf")  # look at the raw gradients first
    metrics = agent.update_critics(case.batch)
    assert not left
    for ours, theirs in (("q/loss", "loss_q0_loss"), ("v/loss", "loss_vt_loss"), ("q/mean", "misc_q0_mean"),
                         ("v/mean", "misc_vt_mean")):
        case.close(metrics[ours], f"critic/metric/{theirs}")
    for name in ("q", "v"):
        case.close(metrics[f"{name}/grad_norm"], f"critic/grad_norm/{OFFICIAL[name]}")
        case.close_gradients(name, f"critic/grad/{OFFICIAL[name]}")
    again = Case(case.name)                                                   # and now the whole step
    again.feed(case.get("critic/xT"), case.get("critic/step_noise"), n, case.get("critic/eps"),
               case.get("critic/onestep_noise"))
    assert again.agent.q.clip_grad_norm == clip_norm
    again.agent.update_critics(case.batch)
    for name in ("q", "v"):
        again.close_parameters(name, "net", f"critic/after/{OFFICIAL[name]}", lr=3e-4)
        again.close_parameters(name, "target", f"critic/after/{OFFICIAL[name]}_target", lr=3e-4 * 0.005)


def test_value_loss_and_targets_without_the_agent(case):
    "The same losses composed by hand from the exported functions, so that a reader can follow."
    a, b, o, n = case.agent, case.batch, case.options, case.steps("critic/t")
    action, penalty = rollout(a.actor.target, a.behavior.target, b.next_obs, case.get("critic/xT"),
                              case.get("critic/step_noise"), case.sched,
                              clip=o["clip"])
    target = q_target(b.reward, b.terminal, a.q.target(b.next_obs.unsqueeze(1), action), penalty, GAMMA, ETA, o["rho"])
    case.close(value_loss(a.q.net(b.obs, b.action), target), "critic/metric/loss_q0_loss")
    x = case.get("critic/xt")
    target, _ = step_value(a.actor.target, a.behavior.target, a.q.target, a.v.target, b.obs, x, n,
                           case.get("critic/onestep_noise"), case.sched,
                           ETA, o["rho"], o["clip"])
    case.close(value_loss(a.v.net(b.obs, x, n), target), "critic/metric/loss_vt_loss")


def test_actor_update(case):
    agent = case.agent
    for clip in (float("inf"), 1.0):
        fresh = Case(case.name)
        fresh.agent.actor.clip_grad_norm = clip
        left = fresh.feed(case.steps("actor/t"), case.get("actor/eps"), case.get("actor/onestep_noise"))
        metrics = fresh.agent.update_actor(case.batch)
        assert not left
        fresh.close(metrics["actor/loss"], "actor/loss")
        fresh.close(metrics["actor/grad_norm"], "actor/grad_norm")
        if clip == 1.0:
            fresh.close_parameters("actor", "net", "actor/after/actor", lr=1e-5)
            fresh.close_parameters("actor", "target", "actor/after/actor_target", lr=1e-5 * 0.005)
        else: fresh.close_gradients("actor", "actor/grad")
    assert agent.updates == 0


def test_behavior_update(case):
    for clip in (float("inf"), 1.0):
        fresh = Case(case.name)
        fresh.agent.behavior.clip_grad_norm = clip
        left = fresh.feed(case.steps("behavior/t"), case.get("behavior/eps"))
        metrics = fresh.agent.update_behavior(case.batch)
        assert not left
        fresh.close(metrics["behavior/loss"], "behavior/loss")
        if clip == 1.0:
            fresh.close_parameters("behavior", "net", "behavior/after/behavior", lr=3e-4)
            fresh.close_parameters("behavior", "target", "behavior/after/behavior_target", lr=3e-4 * 0.005)
        else:
            fresh.close_gradients("behavior", "behavior/grad")
    loss = noise_prediction_loss(case.agent.behavior.net, case.batch.obs, case.batch.action, case.steps("behavior/t"),
                                 case.get("behavior/eps"), case.sched)
    case.close(loss, "behavior/loss")


def test_action_choice(case):
    "Best of M by the ensemble mean of the slow Q, and one sample, from the official draws."
    agent, noise = case.agent, case.get("select/step_noise")
    s = case.batch.obs.unsqueeze(1)
    *_, (_, _, _, actions) = reverse_path(lambda x, n: agent.actor.target(s, x, n), case.get("select/xT"), case.sched,
                                          "ddpm",
                                          case.options["clip"], noise)
    case.close(agent.choose(case.batch.obs, actions, "best"), "select/action_greedy")
    case.close(actions[:, 0], "select/action_first")
