"""Chapter 5: properties on random worlds and chains, and checks that must notice a wrong formula."""
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo_lit.theory.soft_rl import TabularMDP, boltzmann, kl, log_mean_exp, random_mdp, soft_value_iteration
from bdpo_lit.theory.theorem import reverse_kernels
from bdpo_lit.theory.two_clocks import (
    Chain,
    chain_value,
    corridor,
    forgetful,
    improve,
    kernel_kl,
    lower_values,
    marginals,
    optimal_lower,
    path_optimum,
    path_value,
    reverse_chain,
    sampled_upper,
    two_clock_iteration,
    two_clock_sweep,
    two_clock_td,
    upper_backup,
)

settings.register_profile("book", max_examples=10, deadline=None, derandomize=True, database=None)
few = settings(settings.get_profile("book"))
seeds = st.integers(0, 999)
etas = st.floats(-1.0, 1.0).map(lambda x: 10.0**x)
keeps = st.lists(st.floats(0.1, 0.9), min_size=1, max_size=4)
worlds = st.builds(random_mdp, num_states=st.integers(1, 4), num_actions=st.integers(2, 4), gamma=st.floats(0.0, 0.95),
                   seed=seeds)


def chain_like(behavior, seed, sharp=1.5):
    rng = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(behavior.kernels.shape, generator=rng, dtype=torch.float64)
    return Chain(behavior.start, logits.softmax(-1))


def values(mdp, actor, behavior, eta):
    return lower_values(chain_value(mdp, actor, behavior, eta)[1], actor, behavior, eta)


def close(x, y, tol=1e-10): return float((x - y).abs().max()) <= tol * max(1.0, float(y.abs().max()))


@few
@given(worlds, keeps)
def test_reverse_chain_inverts_forgetting(mdp, keep):
    forward = forgetful(keep, mdp.nu.shape[1])
    p, q = marginals(reverse_chain(mdp.nu, forward)), mdp.nu
    assert close(p[0], q)
    for n, f in enumerate(forward, 1):
        q = q @ f
        assert close(p[n], q)


@few
@given(worlds, keeps, etas, seeds)
def test_clocks_agree(mdp, keep, eta, seed):
    b = reverse_chain(mdp.nu, forgetful(keep, mdp.nu.shape[1]))
    actor = chain_like(b, seed)
    state, Q = chain_value(mdp, actor, b, eta)
    V = lower_values(Q, actor, b, eta)
    assert close(upper_backup(Q, mdp, actor, b, eta), Q) and close((actor.start * V[-1]).sum(-1), state)
    for rollout in (True, False): assert close(two_clock_sweep(V, mdp, actor, b, eta, rollout), V)
    W = torch.cat([V[:1], torch.full_like(V[1:], 7.0)])
    for n in range(1, len(V)):                     # exact up to n after n sweeps, whatever was there
        W = torch.cat([V[:1], two_clock_sweep(W, mdp, actor, b, eta)[1:]])
        assert close(W[:n + 1], V[:n + 1])


@few
@given(worlds, keeps, etas, seeds, st.floats(0.05, 1.0))
def test_improvement_never_hurts(mdp, keep, eta, seed, rate):
    b = reverse_chain(mdp.nu, forgetful(keep, mdp.nu.shape[1]))
    actor = chain_like(b, seed)
    V = values(mdp, actor, b, eta)
    full = improve(V, b, eta)
    one = actor.kernels.clone()
    one[seed % len(keep)] = full.kernels[seed % len(keep)]
    for new in (full, improve(V, b, eta, actor, rate), Chain(b.start, one)):
        assert (values(mdp, new, b, eta) - V).min() >= -1e-11 * (1 + V.abs().max())


@few
@given(worlds, keeps, etas, seeds)
def test_alternation_finds_the_unique_optimum(mdp, keep, eta, seed):
    b = reverse_chain(mdp.nu, forgetful(keep, mdp.nu.shape[1]))
    best = path_optimum(mdp, b, eta)
    runs = [V for (_, V), _ in zip(two_clock_iteration(mdp, b, eta, chain_like(b, seed)), range(25))]
    assert close(runs[-1], best, 1e-8) and (values(mdp, chain_like(b, seed + 1), b, eta) <= best + 1e-9).all()


@few
@given(worlds, keeps, etas, seeds)
def test_one_improvement_moves_every_error_up_one_rung(mdp, keep, eta, seed):
    b = reverse_chain(mdp.nu, forgetful(keep, mdp.nu.shape[1]))
    best, N = path_optimum(mdp, b, eta), len(keep)
    runs = zip(two_clock_iteration(mdp, b, eta, chain_like(b, seed)), range(2 * N + 2))
    error = torch.stack([(best - V).amax((1, 2)) for (_, V), _ in runs])     # (improvements, table)
    slack = 1e-9 * (1 + eta + best.abs().max())
    assert (error[1:, 1:] <= error[:-1, :-1] + slack).all() and (error[:, 0] <= mdp.gamma * error[:, -1] + slack).all()
    assert (error[N:, 0] <= mdp.gamma * error[:-N, 0] + slack).all()


def test_a_single_improvement_need_not_gain_gamma():
    "With three steps: Q is more than gamma times as wrong after one improvement; never after one pass in order."
    mdp = random_mdp(5, 4, gamma=0.1, seed=1)
    b = reverse_chain(mdp.nu, forgetful([0.8, 0.5, 0.0], 4))
    best = path_optimum(mdp, b, 0.5)[0]
    before, after = (float((best - V[0]).max()) for (_, V), _ in zip(
        two_clock_iteration(mdp, b, 0.5, chain_like(b, 0)), range(2)))
    Q = chain_value(mdp, chain_like(b, 0), b, 0.5)[1]
    in_order = chain_value(mdp, improve(optimal_lower(Q, b, 0.5), b, 0.5), b, 0.5)[1]
    assert after > 2 * mdp.gamma * before and float((best - in_order).max()) <= mdp.gamma * before


def test_the_shared_start_moves_the_kernels_of_an_mdp():
    "They are the reversal of pi_Q for their own Q*, which is not the flat one once something is remembered."
    mdp, eta = random_mdp(5, 4, gamma=0.9, seed=1), 0.5
    flat = boltzmann(soft_value_iteration(mdp, eta), mdp.nu, eta)
    for last, moved in ((0.0, 0.0), (0.05, 4.5e-5), (0.5, 4.1e-3), (0.9, 1.3e-2)):
        forward = forgetful([0.8, 0.5, last], 4)
        b = reverse_chain(mdp.nu, forward)
        V = path_optimum(mdp, b, eta)
        kernels, own = improve(V, b, eta).kernels, boltzmann(V[0], mdp.nu, eta)
        assert close(kernels, reverse_chain(own, forward).kernels, 1e-12)
        off = float((kernels - reverse_chain(flat, forward).kernels).abs().max())
        assert off == pytest.approx(moved, rel=0.05, abs=1e-12)


@few
@given(worlds, keeps, etas, seeds, st.floats(0.05, 0.95))
def test_rate_counts_from_the_old_chain(mdp, keep, eta, seed, rate):
    b = reverse_chain(mdp.nu, forgetful(keep, mdp.nu.shape[1]))
    actor = chain_like(b, seed)
    V = values(mdp, actor, b, eta) / (1 + 100 / eta)        # so that no kernel is one-hot
    mixed = actor.kernels**(1 - rate) * improve(V, b, eta).kernels**rate
    assert close(improve(V, b, eta, actor, rate).kernels, mixed / mixed.sum(-1, keepdim=True))


def test_what_is_never_met_is_uniform_here_and_in_the_theorem():
    nu, forward = torch.tensor([[1.0, 0, 0]], dtype=torch.float64), forgetful([1.0, 0.5], 3)
    kernels = reverse_chain(nu, forward).kernels
    theirs = reverse_kernels(nu[0], torch.cat([torch.eye(3, dtype=torch.float64)[None], forward]))[1:]
    third = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    for k in (kernels[:, 0], theirs):
        assert close(k[0, 1:], third) and close(k[0, 0], nu[0]) and close(k[1], nu.expand(3, 3))


def test_a_step_is_charged_where_it_starts():
    "Kernels that leave nothing to chance, x -> x + 1, and a price that tells every step and place apart."
    price = torch.tensor([[1.0, 10, 100], [1e3, 1e4, 1e5]], dtype=torch.float64)
    shift = torch.eye(3, dtype=torch.float64).roll(1, 1).expand(1, 2, 1, 3, 3)
    for x in range(3):
        a1, a0 = (x + 1) % 3, (x + 2) % 3
        target = sampled_upper(torch.tensor([[[0.25, 0.5, 0.75]]], dtype=torch.float64), shift, price.view(1, 2, 1, 3),
                               torch.eye(3, dtype=torch.float64)[x:x + 1], torch.ones(1, dtype=torch.float64),
                               torch.tensor([0]), 0.5, 2.0, torch.Generator())
        assert float(target) == 1 + 0.5 * (0.25 * (a0 + 1) - 2 * float(price[1, x] + price[0, a1]))


def test_step_size_decays():
    "gamma = 0, no price, a reward of one: a visited entry of Q closes a known share of what is missing."
    one = torch.ones(1, 1, dtype=torch.float64)
    mdp = TabularMDP(one, one[None], one, 0.0)
    b = reverse_chain(mdp.nu, forgetful([0.5], 1))
    missing = 1.0
    for k, V, _, _ in two_clock_td(mdp, b, forgetful([0.5], 1), 0.2, torch.tensor([0.1]), torch.tensor([0]),
                                   lr=0.05, decay=0.7):
        if k: missing *= 1 - 0.05 / (1 + k / 100) ** 0.7
        assert 1 - float(V[0, 0]) == pytest.approx(missing, rel=1e-9)
        if k == 300: break


@few
@given(worlds, keeps, etas)
def test_against_the_flat_optimum(mdp, keep, eta):
    flat, A = soft_value_iteration(mdp, eta), mdp.nu.shape[1]
    forward = forgetful([*keep[:-1], 0.0], A)      # the last step forgets everything: equal
    b = reverse_chain(mdp.nu, forward)
    best, pi = path_optimum(mdp, b, eta), boltzmann(flat, mdp.nu, eta)
    assert close(best[0], flat, 1e-9) and close(marginals(improve(best, b, eta))[0], pi, 1e-8)
    forward = forgetful(keep, A)                   # it remembers: kernels equal for a given Q, values never above
    b = reverse_chain(mdp.nu, forward)
    V = optimal_lower(flat, b, eta)
    assert close(improve(V, b, eta).kernels, reverse_chain(pi, forward).kernels, 1e-9)
    assert close(log_mean_exp(V[-1], b.start, eta), log_mean_exp(flat, mdp.nu, eta), 1e-9)
    assert (path_optimum(mdp, b, eta)[0] <= flat + 1e-9 * (1 + flat.abs().max())).all()


def test_learning_from_samples_approaches_the_exact_values():
    mdp, forward, eta = corridor(4), forgetful([0.7, 0.0], 3), 0.2
    b = reverse_chain(mdp.nu, forward)
    best = path_optimum(mdp, b, eta)
    tau, every = torch.tensor([0.3, 0.1], dtype=torch.float64), torch.tensor([5, 1])
    for k, V, slow, kernels in two_clock_td(mdp, b, forward, eta, tau, every, lr=0.5, decay=0.6):
        if k == 1200: break
    assert ((slow - best).abs() / best.max()).max() < 0.06
    for p in kernels:
        assert chain_value(mdp, Chain(b.start, p), b, eta)[0].mean() > 0.98 * (b.start * best[-1]).sum(-1).mean()


def test_learners_improve_their_actors_as_improve_does():
    mdp, forward = corridor(3), forgetful([0.5, 0.0], 3)
    b, old = reverse_chain(mdp.nu, forward), None
    for k, _, slow, kernels in two_clock_td(mdp, b, forward, 0.2, torch.tensor([0.5]), torch.tensor([2]),
                                            actor_rate=0.2):
        if k and k % 2 == 0: assert close(kernels[0], improve(slow[0], b, 0.2, Chain(b.start, old), 0.2).kernels)
        elif k: assert torch.equal(kernels[0], old)
        old = kernels[0]
        if k == 10: break


def test_learners_are_reproducible_and_independent():
    mdp, forward = corridor(3), forgetful([0.5, 0.0], 3)
    b = reverse_chain(mdp.nu, forward)

    def run(tau):
        every = torch.full((len(tau),), 2)
        return next(V for k, V, _, _ in two_clock_td(mdp, b, forward, 0.2, torch.tensor(tau), every) if k == 20)
    assert torch.equal(run([0.5, 0.1]), run([0.5, 0.1])) and torch.equal(run([0.5, 0.1])[1], run([0.1])[0])


@pytest.mark.parametrize("keep", [[1.0], [1.0, 0.0], [0.5, 1.0]])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_learning_with_steps_that_are_never_taken(keep, rate):
    mdp, forward = corridor(3), forgetful(keep, 3)
    b = reverse_chain(mdp.nu, forward)
    never = b.kernels == 0
    assert never.any()
    learner = two_clock_td(mdp, b, forward, 0.2, torch.tensor([0.5]), torch.tensor([2]), actor_rate=rate)
    for k, V, slow, kernels in learner:
        assert all(x.isfinite().all() for x in (V, slow, kernels)) and not kernels[0][never].any()
        if k == 30: break
    assert V.abs().max() > 0
    stray = Chain(b.start, torch.full_like(b.kernels, 1 / 3))
    with pytest.raises(ValueError, match="never takes"):
        next(two_clock_td(mdp, b, forward, 0.2, torch.tensor([0.5]), torch.tensor([2]), actor=stray))


def test_bad_input_is_refused():
    b = reverse_chain(random_mdp(2, 3).nu, forgetful([0.5], 3))
    with pytest.raises(ValueError, match="kernels must have shape"):      # past the tests' own shape checker
        Chain.__post_init__(SimpleNamespace(start=b.start, kernels=b.kernels[:, :1]))
    with pytest.raises(ValueError, match="start must be non-negative"): Chain(2 * b.start, b.kernels)
    negative = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)         # sums to one
    with pytest.raises(ValueError, match="start must be non-negative"): Chain(negative.expand(2, 3), b.kernels)
    with pytest.raises(ValueError, match="kernels must be non-negative"):
        Chain(b.start, negative.expand_as(b.kernels))
    with pytest.raises(ValueError, match="keep must be"): forgetful([1.5], 3)
    for rate in (0.0, 1.5, 0.5):
        with pytest.raises(ValueError, match="rate"):
            improve(torch.zeros(2, 2, 3, dtype=torch.float64), b, 0.5, rate=rate)
    with pytest.raises(RuntimeError, match="not converged after 2 sweeps"):
        path_optimum(random_mdp(2, 3), b, 0.5, max_sweeps=2)


# Damage: each check takes a formula, accepts the right one and must reject every wrong one.
MDP, ETA, FORWARD = random_mdp(3, 3, seed=4), 0.4, forgetful([0.8, 0.5, 0.2], 3)
BEHAVIOR = reverse_chain(MDP.nu, FORWARD)
ACTOR = chain_like(BEHAVIOR, 1)
Q = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def brute(start_from=None):
    "E[Q - eta log-ratio] by listing every path; from a^N ~ start, or from each a^n."
    n = 3 if start_from is None else start_from
    total = torch.zeros(3, 3, dtype=torch.float64)
    for path in product(range(3), repeat=n + 1):
        pa = pb = torch.ones(3, dtype=torch.float64)
        for m in range(1, n + 1):
            pa = pa * ACTOR.kernels[m - 1, :, path[m], path[m - 1]]
            pb = pb * BEHAVIOR.kernels[m - 1, :, path[m], path[m - 1]]
        total[:, path[n]] += pa * (Q[:, path[0]] - ETA * (pa / pb).log())
    return total if start_from is not None else (ACTOR.start * total).sum(-1)


def check_upper(f): return close(f(Q), MDP.reward + MDP.gamma * MDP.transition @ brute())


def check_lower(f): return close(f(Q), torch.stack([brute(n) for n in range(4)]))


def check_improve(f):
    "Worth more, entry by entry, than any of 300 perturbed rivals, for a fixed table of values."
    V = lower_values(Q, ACTOR, BEHAVIOR, ETA)
    worth = lambda k: torch.einsum("nsxy,nsy->nsx", k, V[:-1]) - ETA * kl(k, BEHAVIOR.kernels)
    mine, rng = f(V), torch.Generator().manual_seed(0)
    noise = torch.randn(300, *mine.shape, generator=rng, dtype=torch.float64)
    return all((worth(mine) >= worth((mine.log() + 0.2 * z).softmax(-1)) - 1e-12).all() for z in noise)


def check_optimal_lower(f):
    "The flat formula (31): V*_n(x) = eta log E exp(Q / eta) under the behaviour's n-step kernel."
    out, kernel = [Q], torch.eye(3, dtype=torch.float64).expand(3, 3, 3)
    for k in BEHAVIOR.kernels:
        kernel = k @ kernel
        out.append(ETA * (kernel @ (Q / ETA).exp()[..., None])[..., 0].log())
    return close(f(Q), torch.stack(out))


def check_reverse(f):
    "The joint distribution of neighbours is the same forwards and backwards."
    chain, q = f(MDP.nu, FORWARD), [MDP.nu]
    for k in FORWARD: q.append(q[-1] @ k)
    return all(close(q[n][:, :, None] * FORWARD[n], (q[n + 1][:, :, None] * chain.kernels[n]).transpose(1, 2))
               for n in range(3))


def check_regret(f):
    "Loss against the optimum, for gamma = 0: a sum of step KLs, under which marginals, towards what?"
    V = optimal_lower(Q, BEHAVIOR, ETA)
    loss = (ACTOR.start * (V - lower_values(Q, ACTOR, BEHAVIOR, ETA))[-1]).sum(-1)
    return close(f(improve(V, BEHAVIOR, ETA)), loss)


def lower(price=lambda n: kernel_kl(ACTOR, BEHAVIOR)[n - 1], kernels=ACTOR.kernels, sign=-1.0, discount=1.0):
    def f(Q):
        V = [Q]
        for n in range(1, 4):
            V.append(sign * ETA * price(n) + discount * torch.einsum("sxy,sy->sx", kernels[n - 1], V[-1]))
        return torch.stack(V)
    return f


def upper(p, price, discount=MDP.gamma, inner=1.0):
    def f(Q):
        paid = ETA * (p[1:] * price).sum((0, 2))
        return MDP.reward + discount * MDP.transition @ (inner * (p[0] * Q).sum(-1) - paid)
    return f


def regret(weight, direction, first=1):
    return lambda best: ETA * (weight(best)[first:first + 3] * direction(best)).sum((0, 2))


def bayes_without_prior(nu, forward):
    right = reverse_chain(nu, forward)
    k = forward.transpose(1, 2)[:, None].expand(-1, len(nu), -1, -1)
    return Chain(right.start, k / k.sum(-1, keepdim=True))


def bayes_from_nu(nu, forward):
    joint = nu[None, :, :, None] * forward[:, None]
    k = (joint / joint.sum(2, keepdim=True)).transpose(2, 3)
    return Chain(reverse_chain(nu, forward).start, k)


P, PRICE = marginals(ACTOR), kernel_kl(ACTOR, BEHAVIOR)
OPPOSITE = kl(BEHAVIOR.kernels, ACTOR.kernels)
RIGHT = {
    check_upper: lambda Q: upper_backup(Q, MDP, ACTOR, BEHAVIOR, ETA),
    check_lower: lambda Q: lower_values(Q, ACTOR, BEHAVIOR, ETA),
    check_improve: lambda V: improve(V, BEHAVIOR, ETA).kernels,
    check_optimal_lower: lambda Q: optimal_lower(Q, BEHAVIOR, ETA),
    check_reverse: reverse_chain,
    check_regret: regret(lambda best: P, lambda best: kl(ACTOR.kernels, best.kernels)),
}
WRONG = [
    (check_upper, "sign of the price", upper(P, -PRICE)),
    (check_upper, "no gamma", upper(P, PRICE, discount=1.0)),
    (check_upper, "gamma not on the price", lambda Q: MDP.reward + MDP.transition @ (
        path_value(Q * MDP.gamma, ACTOR, BEHAVIOR, ETA))),
    (check_upper, "price off by one step", upper(P, PRICE.roll(1, 0))),
    (check_upper, "weighted by the behaviour's path", upper(torch.cat([P[:1], marginals(BEHAVIOR)[1:]]), PRICE)),
    (check_upper, "Q under the behaviour", upper(torch.cat([marginals(BEHAVIOR)[:1], P[1:]]), PRICE)),
    (check_upper, "KL the other way", upper(P, OPPOSITE)),
    (check_upper, "KL of the executed action", lambda Q: MDP.reward + MDP.gamma * MDP.transition @ (
        (P[0] * Q).sum(-1) - ETA * kl(P[0], MDP.nu))),
    (check_upper, "last step not charged", upper(P, PRICE * torch.tensor([0.0, 1.0, 1.0])[:, None, None].double())),
    (check_lower, "sign of the price", lower(sign=1.0)),
    (check_lower, "price of the next step", lower(price=lambda n: PRICE[n % 3])),
    (check_lower, "step under the behaviour", lower(kernels=BEHAVIOR.kernels)),
    (check_lower, "discounted per diffusion step", lower(discount=MDP.gamma)),
    (check_lower, "KL the other way", lower(price=lambda n: OPPOSITE[n - 1])),
    (check_lower, "kernel transposed", lower(kernels=ACTOR.kernels.transpose(2, 3))),
    (check_improve, "V_n in place of V_{n-1}", lambda V: (BEHAVIOR.kernels.log() + V[1:, :, None] / ETA).softmax(-1)),
    (check_improve, "tilts the actor, not the behaviour", lambda V: improve(V, ACTOR, ETA).kernels),
    (check_improve, "no behaviour at all", lambda V: (V[:-1, :, None] / ETA).expand(3, 3, 3, 3).softmax(-1)),
    (check_improve, "sign", lambda V: improve(-V, BEHAVIOR, ETA).kernels),
    (check_improve, "eta twice", lambda V: improve(V, BEHAVIOR, ETA**2).kernels),
    (check_improve, "value of a^n, not of a^{n-1}", lambda V: (
        BEHAVIOR.kernels.log() + V[:-1, :, :, None] / ETA).softmax(-1)),
    (check_optimal_lower, "mean of V", lambda Q: lower_values(Q, BEHAVIOR, BEHAVIOR, ETA)),
    (check_optimal_lower, "under the actor", lambda Q: optimal_lower(Q, ACTOR, ETA)),
    (check_optimal_lower, "maximum of V", lambda Q: optimal_lower(Q, BEHAVIOR, 1e-3)),
    (check_reverse, "no prior", bayes_without_prior),
    (check_reverse, "prior of step 0 at every step", bayes_from_nu),
    (check_reverse, "steps in the wrong order", lambda nu, f: Chain(
        reverse_chain(nu, f).start, reverse_chain(nu, f).kernels.flip(0))),
    (check_regret, "KL the other way", regret(lambda best: P, lambda best: kl(best.kernels, ACTOR.kernels))),
    (check_regret, "along the optimum's path", regret(marginals, lambda best: kl(ACTOR.kernels, best.kernels))),
    (check_regret, "marginals off by one", regret(
        lambda best: P, lambda best: kl(ACTOR.kernels, best.kernels), first=0)),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda f: f.__name__)
def test_right_formulas_pass(check): assert check(RIGHT[check])


@pytest.mark.parametrize("check, name, formula", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_formulas_are_noticed(check, name, formula): assert not check(formula), f"{name}: went unnoticed"
