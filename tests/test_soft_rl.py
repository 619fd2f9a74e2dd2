"""Chapter 1: properties on random worlds, and checks that must notice a wrong formula."""
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdpo_lit.theory.soft_rl import (
    TabularMDP,
    boltzmann,
    kl,
    log_mean_exp,
    optimal_backup,
    policy_value,
    random_mdp,
    soft_backup,
    soft_policy_iteration,
    soft_value,
    soft_value_iteration,
)

settings.register_profile("book", max_examples=12, deadline=None, derandomize=True, database=None)
few = settings(settings.get_profile("book"))
etas = st.floats(-1.5, 1.5).map(lambda x: 10.0**x)
worlds = st.builds(random_mdp, num_states=st.integers(1, 6), num_actions=st.integers(2, 5), gamma=st.floats(0.0, 0.95),
                   concentration=st.floats(0.3, 3.0), seed=st.integers(0, 999))


def policy(mdp, seed, sharp=1.5):
    rng = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(mdp.nu.shape, generator=rng, dtype=torch.float64)).softmax(-1)


def close(x, y, tol=1e-10): return float((x - y).abs().max()) <= tol * max(1.0, float(y.abs().max()))


@few
@given(worlds, etas, st.integers(0, 99))
def test_values_are_fixed_points(mdp, eta, seed):
    pi = policy(mdp, seed)
    V, Q = policy_value(pi, mdp, eta)
    assert close(soft_backup(Q, pi, mdp, eta), Q) and close(soft_value(Q, pi, mdp.nu, eta), V)


@few
@given(worlds, etas, st.integers(0, 99))
def test_contraction_and_monotonicity(mdp, eta, seed):
    pi, (x, y) = policy(mdp, seed), 5 * torch.randn(2, *mdp.nu.shape, dtype=torch.float64,
                                                    generator=torch.Generator().manual_seed(seed))
    for backup in (lambda Q: soft_backup(Q, pi, mdp, eta), lambda Q: optimal_backup(Q, mdp, eta)):
        assert (backup(x) - backup(y)).abs().max() <= mdp.gamma * (x - y).abs().max() + 1e-12 * (1 + eta)
        assert (backup(torch.maximum(x, y)) >= backup(x) - 1e-12 * (1 + eta)).all()
        assert close(backup(x + 3) - backup(x), torch.full_like(x, 3 * mdp.gamma), 1e-11)


@few
@given(worlds, etas, st.integers(0, 99))
def test_optimum(mdp, eta, seed):
    Q = soft_value_iteration(mdp, eta)
    best = boltzmann(Q, mdp.nu, eta)
    assert close(policy_value(best, mdp, eta)[1], Q)
    assert (policy_value(policy(mdp, seed), mdp, eta)[1] <= Q + 1e-9 * (1 + eta)).all()
    runs = [x[2] for x, _ in zip(soft_policy_iteration(mdp, eta, policy(mdp, seed)), range(12))]
    assert torch.stack(runs).diff(dim=0).min() > -1e-10 * (1 + eta + Q.abs().max()) and close(runs[-1], Q, 1e-9)


@few
@given(worlds, etas, st.floats(0.01, 100.0))
def test_only_eta_over_reward_scale_matters(mdp, eta, c):
    scaled = TabularMDP(mdp.reward * c, mdp.transition, mdp.nu, mdp.gamma)
    assert close(soft_value_iteration(scaled, eta * c) / c, soft_value_iteration(mdp, eta), 1e-9 * (1 + 1 / c))


def test_never_leaves_the_support():
    nu, Q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 99.0], dtype=torch.float64)
    assert boltzmann(Q, nu, 1e-3)[2] == 0 and log_mean_exp(Q, nu, 1e-3) <= 1 and kl(nu.flip(0), nu) == torch.inf


@pytest.mark.parametrize("name, value", [("gamma", 1.0), ("gamma", -0.1), ("nu", torch.ones(3, 2)),
                                         ("nu", torch.ones(2, 2)), ("transition", torch.ones(3, 2, 2) / 2),
                                         ("nu", torch.tensor([1.5, -0.5]).expand(3, 2)),            # sum to one
                                         ("transition", torch.tensor([1.5, -0.5, 0.0]).expand(3, 2, 3))])
def test_bad_worlds_are_refused(name, value):
    "Asks the validation itself: the tests' shape checker would otherwise refuse wrong shapes before it."
    with pytest.raises(ValueError, match=name):
        TabularMDP.__post_init__(SimpleNamespace(**{**vars(random_mdp(3, 2)), name: value}))


@pytest.mark.parametrize("name", ["nu", "transition"])
@pytest.mark.parametrize("row", [(1.5, -0.5), (2.0, -1.0), (1 + 1e-3, -1e-3)])
def test_negative_probabilities_are_refused(name, row):
    "Rows that sum to one and yet are no distributions."
    world = vars(random_mdp(2, 2))
    table = world[name].clone()
    table[(0,) * (table.dim() - 1)] = torch.tensor(row, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{name} must be non-negative"): TabularMDP(**{**world, name: table})


@few
@given(worlds, etas, st.integers(0, 99))
def test_policy_iteration_contracts(mdp, eta, seed):
    "The error of every iteration is at most gamma times the one before, from any start; so is one sweep after it."
    best = soft_value_iteration(mdp, eta)
    Q = [x[2] for x, _ in zip(soft_policy_iteration(mdp, eta, policy(mdp, seed)), range(6))]
    rounding = 1e-9 * (1 + eta + best.abs().max())
    for old, new in zip(Q, Q[1:]):
        assert (best - new).abs().max() <= mdp.gamma * (best - old).abs().max() + rounding
        assert (optimal_backup(old, mdp, eta) <= new + rounding).all() and (new <= best + rounding).all()


def test_running_out_of_sweeps_is_said():
    with pytest.raises(RuntimeError, match="not converged after 3 sweeps"):
        soft_value_iteration(random_mdp(3, 2), 0.5, max_sweeps=3)


# Damage: each check takes a formula, accepts the right one and must reject every wrong one.
MDP, ETA = random_mdp(5, 4, seed=11), 0.4
PI, OTHER = policy(MDP, 1), policy(MDP, 2)
TABLE = torch.randn(5, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def check_kl(f):
    "Against torch.distributions, which has its own formula."
    theirs = torch.distributions.kl_divergence(*map(torch.distributions.Categorical, (PI, OTHER)))
    return close(f(PI, OTHER), theirs)


def check_backup(f):
    "Against a sum written with loops."
    out = torch.zeros(5, 4, dtype=torch.float64)
    for s in range(5):
        for a in range(4):
            future = sum(MDP.transition[s, a, t] * PI[t, b] * (TABLE[t, b] - ETA * (PI[t, b] / MDP.nu[t, b]).log())
                         for t in range(5) for b in range(4))
            out[s, a] = MDP.reward[s, a] + MDP.gamma * future
    return close(f(TABLE, PI, MDP, ETA), out)


def check_greedy(f):
    "Nothing that a gradient search finds is better than the greedy policy, and it is a policy."
    logits = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15,
                               line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        value = -((logits.softmax(-1) * TABLE).sum(-1)
                  - ETA * (logits.softmax(-1) * (logits.log_softmax(-1) - MDP.nu.log())).sum(-1)).sum()
        value.backward()
        return value
    search.step(loss)
    return close(f(TABLE, MDP.nu, ETA), logits.detach().softmax(-1), 1e-5)


def check_worth(f):
    "The worth of the greedy policy, added up."
    p = boltzmann(TABLE, MDP.nu, ETA)
    return close(f(TABLE, MDP.nu, ETA), (p * TABLE).sum(-1) - ETA * (p * (p / MDP.nu).log()).sum(-1))


def check_regret(f):
    "V* - V^pi equals eta times a discounted divergence: which one?"
    best = boltzmann(soft_value_iteration(MDP, ETA), MDP.nu, ETA)
    flow = torch.linalg.inv(torch.eye(5, dtype=torch.float64)
                            - MDP.gamma * torch.einsum("sa,sat->st", PI, MDP.transition))
    return close(flow @ f(PI, best), policy_value(best, MDP, ETA)[0] - policy_value(PI, MDP, ETA)[0], 1e-9)


RIGHT = {check_kl: kl, check_backup: soft_backup, check_greedy: boltzmann, check_worth: log_mean_exp,
         check_regret: lambda pi, best: ETA * kl(pi, best)}
WRONG = [
    (check_kl, "direction", lambda p, q: kl(q, p)),
    (check_kl, "weighted by q", lambda p, q: (q * (p / q).log()).sum(-1)),
    (check_backup, "no gamma", lambda Q, p, m, e: m.reward + m.transition @ soft_value(Q, p, m.nu, e)),
    (check_backup, "gamma on the price twice", lambda Q, p, m, e: soft_backup(Q, p, m, e * m.gamma)),
    (check_backup, "sign of the price", lambda Q, p, m, e: soft_backup(Q, p, m, -e)),
    (check_backup, "averaged over nu", lambda Q, p, m, e: m.reward + m.gamma * m.transition @ (
        (m.nu * Q).sum(-1) - e * kl(p, m.nu))),
    (check_backup, "KL the other way", lambda Q, p, m, e: m.reward + m.gamma * m.transition @ (
        (p * Q).sum(-1) - e * kl(m.nu, p))),
    (check_greedy, "without nu", lambda Q, nu, e: (Q / e).softmax(-1)),
    (check_greedy, "times eta", lambda Q, nu, e: boltzmann(Q, nu, 1 / e)),
    (check_greedy, "sign", lambda Q, nu, e: boltzmann(-Q, nu, e)),
    (check_greedy, "nu squared", lambda Q, nu, e: boltzmann(Q, nu**2, e)),
    (check_worth, "eta forgotten outside", lambda Q, nu, e: log_mean_exp(Q, nu, e) / e),
    (check_worth, "sum instead of mean", lambda Q, nu, e: e * (Q / e).logsumexp(-1)),
    (check_worth, "mean of nu only", lambda Q, nu, e: (nu * Q).sum(-1)),
    (check_regret, "KL the other way", lambda pi, best: ETA * kl(best, pi)),
    (check_regret, "distance to nu", lambda pi, best: ETA * kl(pi, MDP.nu)),
    (check_regret, "without eta", kl),
]


@pytest.mark.parametrize("check", RIGHT, ids=lambda f: f.__name__)
def test_right_formulas_pass(check): assert check(RIGHT[check])


@pytest.mark.parametrize("check, name, formula", WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_wrong_formulas_are_noticed(check, name, formula): assert not check(formula), f"{name}: went unnoticed"
