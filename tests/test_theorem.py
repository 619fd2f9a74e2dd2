"""Chapters 2-4: properties on random schedules, mixtures and values; damage: a wrong formula must fail its check."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from bdpo_lit.theory import diffusion as df
from bdpo_lit.theory import path_kl as pk
from bdpo_lit.theory import theorem as ex
from bdpo_lit.theory.diffusion import Mixture, Schedule, vp_schedule
from bdpo_lit.theory.soft_rl import boltzmann, kl, log_mean_exp

F64 = dict(dtype=torch.float64)
few = settings(max_examples=15, derandomize=True, deadline=None, database=None)


def close(a, b, tol=1e-10):
    "Equal up to tol, absolute and relative; NaN and infinity never pass."
    a, b = torch.broadcast_tensors(torch.as_tensor(a, **F64), torch.as_tensor(b, **F64))
    assert a.isfinite().all() and b.isfinite().all()
    assert ((a - b).abs() <= tol * (1 + b.abs())).all(), f"differ by {(a - b).abs().max():.2e}"


def gen(seed): return torch.Generator().manual_seed(seed)
def rand(seed, *shape): return torch.rand(shape, generator=gen(seed), **F64)
def randn(seed, *shape): return torch.randn(shape, generator=gen(seed), **F64)
def normal_pdf(x, mean, var): return (-(x - mean) ** 2 / (2 * var)).exp() / (2 * math.pi * var) ** 0.5


def schedule_of(betas):
    beta = torch.tensor([0.0, *betas], **F64)
    return Schedule(beta, 1 - beta, (1 - beta).cumprod(0))


seeds = st.integers(0, 10_000)
schedules = st.lists(st.floats(0.01, 0.9), min_size=1, max_size=7).map(schedule_of)


@st.composite
def mixtures(draw, dim=1):
    C, seed = draw(st.integers(1, 4)), draw(seeds)
    return Mixture(randn(seed, C).softmax(0), randn(seed + 1, C, dim), 0.05 + rand(seed + 2, C))


def random_chain(seed, S, N): return randn(seed, S).softmax(0), (2 * randn(seed + 1, N + 1, S, S)).softmax(-1)


# Properties

@few
@given(schedules, st.floats(-2, 2))
def test_single_steps_compose_to_the_marginal(sched, x0):
    mean, var = torch.tensor([x0], **F64), torch.zeros(1, **F64)
    for n in range(1, sched.num_steps + 1):
        mean, unit = df.forward_step(mean, n, torch.zeros(1, **F64), sched), torch.ones(1, **F64)
        gain, spread = df.forward_step(unit, n, 0 * unit, sched), df.forward_step(0 * unit, n, unit, sched)
        var = gain**2 * var + spread**2
        close(mean, df.forward_sample(torch.tensor([x0], **F64), n, torch.zeros(1, **F64), sched), 1e-13)
        close(var, df.forward_sample(torch.zeros(1, **F64), n, unit, sched) ** 2, 1e-13)


@few
@given(schedules, st.integers(1, 5), st.integers(1, 4), seeds)
def test_views_of_one_prediction_agree(sched, B, A, seed):
    n = torch.randint(1, sched.num_steps + 1, (B,), generator=gen(seed))
    x, eps = randn(seed, B, A), randn(seed + 1, B, A)
    x0 = df.x0_from_eps(x, eps, n, sched)
    close(df.eps_from_x0(x, x0, n, sched), eps, 1e-8)
    close(df.eps_from_score(df.score_from_eps(eps, n, sched), n, sched), eps, 1e-12)
    close(df.eps_from_mean(x, df.reverse_mean(x, eps, n, sched), n, sched), eps, 1e-8)
    close(df.reverse_mean(x, eps, n, sched), df.posterior_mean(x, x0, n, sched), 1e-12)
    close(df.ddim_step(x, eps, n, sched), df.forward_sample(x0, n - 1, eps, sched), 1e-12)


@few
@given(schedules, mixtures(dim=2), seeds)
def test_mixture_score_is_the_gradient(sched, mixture, seed):
    x = randn(seed, 20, 2).requires_grad_()
    for n in range(sched.num_steps + 1):
        noised = mixture.noised(n, sched)
        close(noised.score(x).detach(), torch.autograd.grad(noised.log_prob(x).sum(), x)[0], 1e-9)


def check_plane(density, data, noised=None):
    "A mixture on the plane, unequal variances, against torch.distributions; then noised, against quadrature."
    spread = torch.distributions.Independent(Normal(data.mean, data.var.sqrt()[:, None].expand(-1, 2)), 1)
    ref = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(data.weight), spread)
    x, axis = 1.5 * randn(1, 40, 2), torch.linspace(-6, 6, 241, **F64)
    close(density(data, x), ref.log_prob(x), 1e-10)
    plane = torch.cartesian_prod(axis, axis)
    close(density(data, plane).exp().sum() * 0.05**2, 1, 1e-6)
    if noised is None: return
    for n in STEPS:                                                      # forget by adding up over the plane
        ab, p0 = S4.alpha_bar[n], ref.log_prob(plane).exp() * 0.05**2
        gap = (x[:8, None] - ab.sqrt() * plane).square().sum(-1)
        dens = (p0 * (-gap / (2 * (1 - ab))).exp()).sum(-1) / (2 * math.pi * (1 - ab))
        close(noised(data, n).log_prob(x[:8]).exp(), dens, 1e-7)


PLANE = Mixture(torch.tensor([0.2, 0.5, 0.3], **F64), torch.tensor([[-0.8, 0.3], [0.5, 0.6], [0.1, -0.9]], **F64),
                torch.tensor([0.04, 0.3, 0.09], **F64))


def test_mixture_on_the_plane():
    check_plane(Mixture.log_prob, PLANE, lambda m, n: m.noised(n, S4))
    x = PLANE.sample(200_000, gen(0))
    mean = PLANE.weight @ PLANE.mean
    second = PLANE.weight @ (PLANE.var[:, None] + PLANE.mean**2)         # of each coordinate
    for moment, value in ((x, mean), (x**2, second), (x[:, :1] * x[:, 1:], (PLANE.weight * PLANE.mean.prod(-1)).sum())):
        assert ((moment.mean(0) - value).abs() < 4 * moment.std(0) / len(x) ** 0.5).all()
    near = (x - PLANE.mean[0]).norm(dim=-1) < 0.15                       # the narrow component shows
    share = PLANE.log_prob(torch.cartesian_prod(*[torch.linspace(-6, 6, 1201, **F64)] * 2)).exp() * 0.01**2
    cells = (torch.cartesian_prod(*[torch.linspace(-6, 6, 1201, **F64)] * 2) - PLANE.mean[0]).norm(dim=-1) < 0.15
    assert abs(near.double().mean() - share[cells].sum()) < 0.003


def log_density(power=1.0, spread=lambda v: v, weight=lambda w: w.log()):
    "The log-density of a mixture, with room for mistakes."
    def f(m, x):
        gap = (x.unsqueeze(-2) - m.mean).square().sum(-1)
        return (weight(m.weight) - gap / (2 * spread(m.var)) - power * (2 * math.pi * m.var).log()).logsumexp(-1)
    return f


WRONG_DENSITIES = {"one dimension": log_density(power=0.5), "deviation for variance": log_density(spread=torch.sqrt),
                   "weights forgotten": log_density(weight=lambda w: torch.zeros_like(w)),
                   "one variance for all": log_density(spread=lambda v: v.mean())}


@pytest.mark.parametrize("wrong", WRONG_DENSITIES)
def test_damaged_plane_is_noticed(wrong):
    check_plane(log_density(), PLANE)
    with pytest.raises(AssertionError): check_plane(WRONG_DENSITIES[wrong], PLANE)


@few
@given(schedules, mixtures(), st.data())
def test_best_noise_prediction_is_the_mean_noise(sched, mixture, data):
    n = data.draw(st.integers(1, sched.num_steps))
    x, x0, ab = torch.linspace(-2, 2, 9, **F64), torch.linspace(-12, 12, 6001, **F64), sched.alpha_bar[n]
    w = (mixture.log_prob(x0[:, None]) - (x[:, None] - ab.sqrt() * x0) ** 2 / (2 * (1 - ab))).softmax(-1)
    noise = (x[:, None] - ab.sqrt() * x0) / (1 - ab).sqrt()
    close(df.mixture_eps(mixture, sched)(x[:, None], n).squeeze(-1), (w * noise).sum(-1), 1e-8)


@few
@given(schedules, st.integers(1, 4), seeds)
def test_four_forms_of_the_step_price(sched, A, seed):
    n = torch.randint(1, sched.num_steps + 1, (6,), generator=gen(seed))
    x, e, f = randn(seed, 6, A), randn(seed + 1, 6, A), randn(seed + 2, 6, A)
    mean, x0, score = ([fn(p) for p in (e, f)] for fn in (
        lambda p: df.reverse_mean(x, p, n, sched), lambda p: df.x0_from_eps(x, p, n, sched),
        lambda p: df.score_from_eps(p, n, sched)))
    ref = kl_divergence(*(Normal(m, sched.beta[n].sqrt()[:, None]) for m in mean)).sum(-1)
    for price in (pk.step_kl(e, f, n, sched), pk.step_kl_from_means(*mean, sched.beta[n]),
                  pk.step_kl_from_x0(*x0, n, sched), pk.step_kl_from_score(*score, n, sched)):
        close(price, ref, 1e-9)
    clipped = [df.reverse_mean(x, p, n, sched, clip=1.0) for p in (e, f)]
    assert (pk.step_kl_from_means(*clipped, sched.beta[n]) <= pk.step_kl(e, f, n, sched) * (1 + 1e-9) + 1e-12).all()


@few
@given(schedules, seeds)
def test_path_price_is_the_sum_along_the_walk(sched, seed):
    a, b = (lambda x, n: torch.sin(x + n)), (lambda x, n: torch.cos(2 * x) / n)
    x, noise = randn(seed, 5, 2), randn(seed + 1, sched.num_steps, 5, 2)
    price, x0 = pk.path_kl(a, b, x, sched, noise=noise)
    total = 0
    for z, n in zip(noise, range(sched.num_steps, 0, -1)):
        total = total + pk.step_kl(a(x, n), b(x, n), n, sched)
        x = df.ddpm_step(x, a(x, n), n, sched, z)
    close(price, total, 1e-12)
    close(x0, x, 1e-12)


@few
@given(schedules, seeds)
def test_path_price_with_a_clipped_walk(sched, seed):
    "The walk is clipped, the price is on raw noise along it; both by hand, and clipping changes the paths."
    a, b = (lambda x, n: torch.sin(x + n) - 2), (lambda x, n: torch.cos(2 * x) / n)
    x, noise = 3 * randn(seed, 50, 2), randn(seed + 1, sched.num_steps, 50, 2)
    price, x0 = pk.path_kl(a, b, x, sched, clip=0.5, noise=noise)
    free, _ = pk.path_kl(a, b, x, sched, noise=noise)
    total = 0
    for z, n in zip(noise, range(sched.num_steps, 0, -1)):
        total = total + pk.step_kl(a(x, n), b(x, n), n, sched)
        clean = df.x0_from_eps(x, a(x, n), n, sched).clamp(-0.5, 0.5)
        x = df.posterior_mean(x, clean, n, sched) + sched.beta[n].sqrt() * (n > 1) * z
    close(price, total, 1e-12)
    close(x0, x, 1e-12)
    assert x0.abs().max() <= 0.5 + 1e-12
    if sched.num_steps > 1: assert (price - free).abs().max() > 1e-6


@few
@given(st.integers(2, 3), st.integers(1, 4), seeds)
def test_path_kl_by_listing_all_paths(S, N, seed):
    (sp, kp), (sq, kq) = random_chain(seed, S, N), random_chain(seed + 7, S, N)
    total, ends = 0, torch.zeros(2, S, **F64)
    for path in itertools.product(range(S), repeat=N + 1):
        p, q = (s[path[0]] * math.prod(k[N - i, path[i], path[i + 1]] for i in range(N))
                for s, k in ((sp, kp), (sq, kq)))
        total += p * (p / q).log()
        ends[:, path[-1]] += torch.stack([p, q])
    close(pk.markov_path_kl(sp, kp, sq, kq).sum(), total, 1e-11)
    assert total >= kl(ends[0], ends[1]) - 1e-12


def test_reverse_kernels_of_cells_that_noise_never_reaches():
    "Rows are distributions for every cell; unreachable ones are uniform, the others Bayes' rule."
    F, p0 = torch.eye(4, **F64).repeat(3, 1, 1), torch.tensor([0.2, 0.5, 0.3, 0.0], **F64)
    F[1:, :3] = torch.tensor([0.6, 0.4, 0.0, 0.0], **F64)              # from anywhere with mass to the first two
    R, p = ex.reverse_kernels(p0, F), ex.grid_marginals(p0, F)
    assert R.isfinite().all()
    close(R.sum(-1), 1, 1e-12)
    close(R[1, :2], p0.expand(2, 4), 1e-12)                              # such noise tells nothing about a^0
    for n in (1, 2): close(R[n, 2:], 0.25, 1e-12)
    close(ex.run_chain(p[2], R), p0, 1e-12)
    V = ex.optimal_values(torch.tensor([1.0, -1.0, 0.5, 2.0], **F64), R, 0.7)
    assert V[1:].isfinite().all() and ex.optimal_kernels(V, R, 0.7).isfinite().all()


def test_path_kl_ignores_states_that_are_never_reached():
    sp, kp, (sq, kq) = torch.tensor([0.5, 0.5, 0.0], **F64), torch.full((3, 3, 3), 1 / 3, **F64), random_chain(1, 3, 2)
    kq[2, 2] = torch.tensor([1.0, 0.0, 0.0], **F64)                    # infinitely dear, but nobody is there
    terms = pk.markov_path_kl(sp, kp, sq, kq)
    close(terms[2], kl(kp[2, :2], kq[2, :2]).mean())
    assert terms.isfinite().all()
    sp = torch.tensor([0.5, 0.4, 0.1], **F64)
    assert pk.markov_path_kl(sp, kp, sq, kq)[2] == math.inf


@few
@given(st.integers(2, 12), st.integers(1, 6), st.floats(0.05, 20), seeds, st.booleans())
def test_the_theorem_on_any_chain(S, N, eta, seed, gaussian):
    "Random nu, Q and eta; forward kernels of a random schedule, or any kernels whatever."
    nu, Q = (2 * randn(seed, S)).softmax(0), 2 * randn(seed + 1, S)
    F = torch.cat([torch.eye(S, **F64)[None], (2 * randn(seed + 2, N, S, S)).softmax(-1)])
    if gaussian:
        F = ex.forward_kernels(torch.linspace(-2, 2, S, **F64), schedule_of((0.02 + 0.9 * rand(seed, N)).tolist()))
    R, pi = ex.reverse_kernels(nu, F), boltzmann(Q, nu, eta)
    V, q_nu, q_pi = ex.optimal_values(Q, R, eta), ex.grid_marginals(nu, F), ex.grid_marginals(pi, F)
    K, best = ex.optimal_kernels(V, R, eta), log_mean_exp(Q, nu, eta)
    close(K.sum(-1), 1, 1e-9)
    close(K, ex.reverse_kernels(pi, F), 1e-7)                                        # Theorem C.1
    close(ex.run_chain(q_pi[N], K), pi, 1e-9)                                        # Theorem 4.2
    close(q_pi, q_nu * ((V - best) / eta).exp(), 1e-9)
    close(pk.markov_path_kl(q_pi[N], K, q_nu[N], R).sum(), kl(pi, nu), 1e-9)         # Eqs. (P35), (P36)
    assert q_nu[N] @ V[N] <= best + 1e-9                                             # a fixed start cannot gain
    assert (V >= Q.min() - 1e-9).all() and (V <= Q.max() + 1e-9).all()
    p, k = random_chain(seed + 3, S, N)                                              # any other chain earns less
    assert ex.run_chain(p, k) @ Q - eta * pk.markov_path_kl(p, k, q_nu[N], R).sum() <= best + 1e-9


@few
@given(st.integers(1, 4), schedules, st.floats(0.2, 5), seeds)
def test_the_theorem_in_closed_form(A, sched, eta, seed):
    L, H = randn(seed, A, A), randn(seed + 1, A, A)
    nu = ex.Gaussian(randn(seed + 2, A), L @ L.T + 0.1 * torch.eye(A, **F64))
    v = v0 = ex.Quadratic(torch.tensor(0.0, **F64), randn(seed + 3, A) / eta, H @ H.T / eta)
    prec = torch.linalg.inv(nu.cov) + v0.curvature
    pi = ex.Gaussian(torch.linalg.solve(prec, torch.linalg.solve(nu.cov, nu.mean) + v0.linear), torch.linalg.inv(prec))
    x = randn(seed + 4, 5, A)
    for n in range(1, sched.num_steps + 1):
        v, optimal = ex.quadratic_backup(v, ex.gaussian_reverse(nu, n, n - 1, sched))
        reverse = ex.gaussian_reverse(pi, n, n - 1, sched)
        for name in ("slope", "shift", "cov"): close(getattr(optimal, name), getattr(reverse, name), 1e-8)
        close(v(x), ex.quadratic_backup(v0, ex.gaussian_reverse(nu, n, 0, sched))[0](x), 1e-8)


@few
@given(st.lists(st.floats(0.1, 0.9), min_size=1, max_size=4).map(schedule_of), mixtures(), st.floats(0.3, 3), seeds)
def test_the_best_gaussian_policy_is_best(sched, nu, eta, seed):
    u, (a, b) = torch.linspace(-4, 4, 161, **F64), randn(seed, 2)
    Q, eps = torch.sin(a + 2 * u) + 0.3 * b * u.clamp(-2, 2), df.mixture_eps(nu, sched)
    V, K = ex.gaussian_optimum(Q, eps, u, sched, eta)
    close(K.sum(-1), 1, 1e-9)
    boxed = ex.gaussian_optimum(Q, eps, u, sched, eta, clip=3.0)[0]
    assert (boxed[-1] <= V[-1] + 0.01).all()               # a bound on the means cannot help
    close(ex.gaussian_optimum(Q, eps, u, sched, eta, clip=1e9)[0], V, 1e-12)
    for bend in (0.0, 0.3, -0.5):                          # evaluate behaviour, and behaviour with bent means
        value = Q
        for n in range(1, sched.num_steps + 1):
            mean_nu = df.reverse_mean(u[:, None], eps(u[:, None], n), n, sched).squeeze(-1)
            mean = (mean_nu + bend * torch.sin(u)).clamp(-4, 4)
            var = sched.beta[n] if n > 1 else torch.tensor(0.0, **F64)
            value = ex.gaussian_kernel(mean, var, u) @ value - eta * (mean - mean_nu) ** 2 / (2 * sched.beta[n])
        assert (V[-1] - value)[40:121].min() > -0.01       # the grid's resolution


# Damage: each check passes with the right formula and must fail with every wrong one

S4 = vp_schedule(4, dtype=torch.float64)
DUO = Mixture(torch.tensor([0.3, 0.7], **F64), torch.tensor([[-0.8], [0.5]], **F64), torch.tensor([0.04, 0.09], **F64))
U = torch.linspace(-7, 7, 2801, **F64)
STEPS = range(1, 5)


def parts(n): return S4.beta[n], S4.alpha[n], S4.alpha_bar[n], S4.alpha_bar[n - 1]


def check_vp(log_alpha):
    for N in (1, 3, 10):
        t = torch.arange(N + 1, **F64) / N
        integral = 0.1 * t + 0.5 * 9.9 * t**2
        close(sum(log_alpha(n, N) for n in range(1, N + 1)), -integral[-1], 1e-12)
        close(log_alpha(1, N), -integral[1], 1e-12)


def check_marginal(f):
    "Against the composition of single steps, written out as densities on a grid."
    p, h = None, U[1] - U[0]
    for n in STEPS:
        b, a, *_ = parts(n)
        p = normal_pdf(U, a.sqrt() * 0.7, b) if p is None else (p * h) @ normal_pdf(U, a.sqrt() * U[:, None], b)
        mean = (p * U).sum() * h
        close(f(0.7, n, 0.0), mean, 1e-9)
        close((f(0.7, n, 1.0) - f(0.7, n, 0.0)) ** 2, (p * (U - mean) ** 2).sum() * h, 1e-9)


def bayes(n, x_n, x0):
    b, a, ab, prev = parts(n)
    p = (normal_pdf(x_n, a.sqrt() * U, b) * normal_pdf(U, prev.sqrt() * x0, 1 - prev))
    p = p / p.sum()
    return p @ U, p @ (U - p @ U) ** 2


def check_posterior_mean(f):
    for n in (2, 3, 4): close(f(0.9, -0.4, n), bayes(n, 0.9, -0.4)[0], 1e-9)


def check_posterior_var(f):
    for n in (2, 3, 4): close(f(n), bayes(n, 0.9, -0.4)[1], 1e-9)


def true_reverse_mean(n, x):
    "Mean of q(x_{n-1} | x_n = x) for DUO data, by Bayes on the grid."
    b, a, *_ = parts(n)
    p = DUO.noised(n - 1, S4).log_prob(U[:, None]).exp() * normal_pdf(x, a.sqrt() * U, b)
    return (p @ U) / p.sum()


def check_reverse_mean(f):
    for n in STEPS:
        for x in (-1.1, 0.2, 1.4):
            eps = df.mixture_eps(DUO, S4)(torch.tensor([[x]], **F64), n).item()
            close(f(x, eps, n), true_reverse_mean(n, x), 1e-8)


def check_score(f):
    "Mean noise by quadrature over x_0, turned into a score, against the slope of the log-density of x_n."
    for n in STEPS:
        ab, x, d = S4.alpha_bar[n], torch.tensor(0.3, **F64), 1e-4
        dens = [(DUO.log_prob(U[:, None]).exp() * normal_pdf(v, ab.sqrt() * U, 1 - ab)).sum() for v in (x - d, x + d)]
        w = DUO.log_prob(U[:, None]).exp() * normal_pdf(x, ab.sqrt() * U, 1 - ab)
        noise = (w @ ((x - ab.sqrt() * U) / (1 - ab).sqrt())) / w.sum()
        close(f(noise, n), (dens[1] / dens[0]).log() / (2 * d), 1e-6)


def check_noised(f):
    h = U[1] - U[0]
    for n in STEPS:
        ab, x = S4.alpha_bar[n], torch.linspace(-2, 2, 9, **F64)
        dens = normal_pdf(x[:, None], ab.sqrt() * U, 1 - ab) @ DUO.log_prob(U[:, None]).exp() * h
        mean, var = f(n)
        close(Mixture(DUO.weight, mean, var).log_prob(x[:, None]).exp(), dens, 1e-8)


def check_ddpm(f):
    "Both moments of a step; none but the mean at the last."
    z = torch.tensor([-1.0, 1.0], **F64)
    for n in STEPS:
        out = f(0.4, -0.3, n, z)
        close(out.mean(), df.reverse_mean(torch.tensor([0.4], **F64), torch.tensor([-0.3], **F64), n, S4), 1e-12)
        close((out[1] - out[0]) ** 2 / 4, S4.beta[n] if n > 1 else 0.0, 1e-12)


def check_ddim(f):
    for n in STEPS:
        _, _, ab, prev = parts(n)
        close(f(ab.sqrt() * 0.6 + (1 - ab).sqrt() * -1.1, -1.1, n), prev.sqrt() * 0.6 + (1 - prev).sqrt() * -1.1, 1e-12)


def price_check(view):
    "The price of two predictions in one view against torch's KL of the two kernels."
    def check(f):
        for n in STEPS:
            x, e, g = torch.tensor([0.2], **F64), torch.tensor([0.9], **F64), torch.tensor([-0.4], **F64)
            a, b = (Normal(df.reverse_mean(x, p, n, S4), S4.beta[n].sqrt()) for p in (e, g))
            close(f(*(view(x, p, n) for p in (e, g)), n), kl_divergence(a, b), 1e-10)
    return check


def check_path_kl(f):
    (sp, kp), (sq, kq) = random_chain(3, 3, 3), random_chain(11, 3, 3)
    total = 0
    for i, j, k, m in itertools.product(range(3), repeat=4):
        p, q = (s[i] * K[3, i, j] * K[2, j, k] * K[1, k, m] for s, K in ((sp, kp), (sq, kq)))
        total += p * (p / q).log()
    close(f(sp, kp, sq, kq).sum(), total, 1e-11)


GRID = torch.linspace(-3, 3, 41, **F64)
FWD = ex.forward_kernels(GRID, S4)
NU, VALUES, ETA = (3 * torch.sin(2 * GRID) - GRID**2).softmax(0), torch.cos(3 * GRID) + 0.4 * GRID, 0.6
REV, PI = ex.reverse_kernels(NU, FWD), boltzmann(VALUES, NU, ETA)


def check_reverse(f):
    "Joint probabilities read from both sides agree."
    p, R = ex.grid_marginals(NU, FWD), f(NU, FWD)
    for n in STEPS: close(p[n][:, None] * R[n], (p[n - 1][:, None] * FWD[n]).T, 1e-12)


def check_values(f):
    "Against one jump to x_0."
    V, jump = f(VALUES, REV, ETA), torch.eye(41, **F64)
    for n in STEPS:
        jump = REV[n] @ jump
        close(V[n], ETA * (jump @ (VALUES / ETA).exp()).log(), 1e-10)


def check_kernels(f):
    "Against the reversal of the tilted data's noising."
    close(f(ex.optimal_values(VALUES, REV, ETA), REV, ETA), ex.reverse_kernels(PI, FWD), 1e-9)


def check_backup(f):
    "A scalar quadratic against quadrature."
    c, b, p, s, t, v = 0.2, 0.7, 1.3, 0.6, -0.2, 0.35
    for x in (-1.0, 0.5, 2.0):
        w = normal_pdf(U, s * x + t, torch.tensor(v, **F64)) * (c + b * U - 0.5 * p * U**2).exp()
        value, mean, var = f(c, b, p, s * x + t, v)
        close(value, (w.sum() * (U[1] - U[0])).log(), 1e-9)
        close(mean, w @ U / w.sum(), 1e-9)
        close(var, w @ (U - w @ U / w.sum()) ** 2 / w.sum(), 1e-9)


def right_backup(c, b, p, m, v):
    t1 = lambda x: torch.tensor([x], **F64)
    val, k = ex.quadratic_backup(ex.Quadratic(torch.tensor(c, **F64), t1(b), t1(p)[None]),
                                 ex.LinearKernel(t1(1.0)[None], t1(0.0), t1(v)[None]))
    return val(t1(m)), k.slope[0] * m + k.shift, k.cov


def check_optimum(f):
    "For Q(a) = g a each Gaussian step moves its mean by beta g / eta; the values are linear too, so all is known."
    u, g, eta = torch.linspace(-9, 9, 361, **F64), 0.4, 0.7
    one = Mixture(*(torch.ones(s, **F64) for s in (1, (1, 1), 1)))
    V, K = f(g * u, df.mixture_eps(one, S4), u, S4, eta)
    slope, const, mid = torch.tensor(g, **F64), torch.tensor(0.0, **F64), slice(120, 241)
    for n in (1, 2):
        b, a, ab, prev = parts(n)
        k, shift = a.sqrt(), prev.sqrt() - a.sqrt() * ab.sqrt()        # data N(1, 1): behaviour's mean is k x + shift
        close((K[n] @ u)[mid], (k * u + shift + b * slope / eta)[mid], 1e-4)
        spread = K[n] @ u**2 - (K[n] @ u) ** 2
        close(spread[mid], b if n > 1 else 0.0, 1e-3)                   # a point splits between two cells: h^2 / 4
        slope, const = k * slope, const + slope * shift + 0.5 * b * slope**2 / eta
        close(V[n][mid], (slope * u + const)[mid], 1e-4)


def wrong_optimum(price, deviation=False):
    "gaussian_optimum with another price, written plainly."
    def f(Q, eps, u, sched, eta):
        V, K = [Q], [torch.eye(len(u), **F64)]
        for n in range(1, sched.num_steps + 1):
            var = sched.beta[n] if n > 1 else torch.tensor(0.0, **F64)
            m = df.reverse_mean(u[:, None], eps(u[:, None], n), n, sched)
            if deviation: var = var**0.5
            score = ex.gaussian_kernel(u, var, u) @ V[-1] - price((u - m) ** 2, sched.beta[n], eta)
            i = score.argmax(-1).clamp(1, len(u) - 2)
            lo, top, hi = (score.gather(-1, (i + k)[:, None])[:, 0] for k in (-1, 0, 1))
            move = 0.5 * (hi - lo) / (2 * top - lo - hi)
            V.append(top + 0.25 * (hi - lo) * move)
            K.append(ex.gaussian_kernel(u[i] + move * (u[1] - u[0]), var, u))
        return torch.stack(V), torch.stack(K)
    return f


def at(fn):
    "Call an exported function of tensors with numbers."
    def call(*args): return fn(*(torch.tensor([a], **F64) if isinstance(a, float) else a for a in args), S4)
    return call


def wrong_chain(**kw):
    "markov_path_kl with one thing wrong."
    def f(sp, kp, sq, kq):
        out, p = [kl(sp, sq)], sp
        for n in (3, 2, 1):
            a, b = (kq[n], kp[n]) if kw.get("swap") else (kp[n], kq[n])
            out.append((p * kl(a, b)).sum())
            p = p if kw.get("stay") else p @ (kq[n] if kw.get("other") else kp[n].T if kw.get("transpose") else kp[n])
        return torch.stack(out[1:] if kw.get("no_start") else out)
    return f


def wrong_values(step):
    def f(Q, R, eta):
        V = [Q]
        for k in R[1:]: V.append(step(k, V[-1], eta))
        return torch.stack(V)
    return f


def wrong_kernels(tilt):
    def f(V, R, eta):
        K = R.clone()
        K[1:] = tilt(R[1:], V[:-1, None, :], V[1:, :, None], eta)
        return K
    return f


def formula(expr):
    "A formula of (n, and what the check passes), with b, a, ab, prev = beta_n, alpha_n, alpha_bar_n, alpha_bar_{n-1}."
    return lambda *args: expr(*parts(next(v for v in args if isinstance(v, int))), *args)


def sq(d): return d.square().sum(-1)


same = lambda x, p, n: p
as_x0 = lambda x, p, n: df.x0_from_eps(x, p, n, S4)
as_score = lambda x, p, n: df.score_from_eps(p, n, S4)

DAMAGE = {
    "vp schedule": (check_vp, lambda n, N: vp_schedule(N, dtype=torch.float64).alpha[n].log(), {
        "2n+1": lambda n, N: torch.tensor(-0.1 / N - 0.5 * 9.9 * (2 * n + 1) / N**2),
        "1/N for 1/N^2": lambda n, N: torch.tensor(-0.1 / N - 0.5 * 9.9 * (2 * n - 1) / N),
        "missing half": lambda n, N: torch.tensor(-0.1 / N - 9.9 * (2 * n - 1) / N**2)}),
    "marginal (6)": (check_marginal, lambda x, n, e: at(df.forward_sample)(x, n, e), {
        "no root on the mean": formula(lambda b, a, ab, prev, x, n, e: ab * x + (1 - ab).sqrt() * e),
        "no root on the noise": formula(lambda b, a, ab, prev, x, n, e: ab.sqrt() * x + (1 - ab) * e),
        "n - 1": formula(lambda b, a, ab, prev, x, n, e: prev.sqrt() * x + (1 - prev).sqrt() * e),
        "alpha for alpha_bar": formula(lambda b, a, ab, prev, x, n, e: a.sqrt() * x + (1 - a).sqrt() * e)}),
    "posterior mean": (check_posterior_mean, at(df.posterior_mean), {
        "weights swapped": formula(
            lambda b, a, ab, prev, x, x0, n: (prev.sqrt() * b * x + a.sqrt() * (1 - prev) * x0) / (1 - ab)),
        "missing root alpha": formula(
            lambda b, a, ab, prev, x, x0, n: (prev.sqrt() * b * x0 + (1 - prev) * x) / (1 - ab)),
        "n for n - 1": formula(
            lambda b, a, ab, prev, x, x0, n: (ab.sqrt() * b * x0 + a.sqrt() * (1 - ab) * x) / (1 - ab))}),
    "posterior variance": (check_posterior_var, lambda n: S4.posterior_var[n], {
        "beta": formula(lambda b, a, ab, prev, n: b),
        "fraction upside down": formula(lambda b, a, ab, prev, n: b * (1 - ab) / (1 - prev)),
        "standard deviation": formula(lambda b, a, ab, prev, n: (b * (1 - prev) / (1 - ab)).sqrt())}),
    "reverse mean (8)": (check_reverse_mean, at(df.reverse_mean), {
        "plus": formula(lambda b, a, ab, prev, x, e, n: (x + b / (1 - ab).sqrt() * e) / a.sqrt()),
        "no root": formula(lambda b, a, ab, prev, x, e, n: (x - b / (1 - ab) * e) / a.sqrt()),
        "missing alpha": formula(lambda b, a, ab, prev, x, e, n: x - b / (1 - ab).sqrt() * e),
        "root of beta": formula(lambda b, a, ab, prev, x, e, n: (x - b.sqrt() / (1 - ab).sqrt() * e) / a.sqrt())}),
    "Tweedie": (check_score, lambda e, n: df.score_from_eps(e[None], n, S4), {
        "sign": formula(lambda b, a, ab, prev, e, n: e / (1 - ab).sqrt()),
        "no root": formula(lambda b, a, ab, prev, e, n: -e / (1 - ab)),
        "root of alpha_bar": formula(lambda b, a, ab, prev, e, n: -e / ab.sqrt())}),
    "noised mixture": (check_noised, lambda n: (DUO.noised(n, S4).mean, DUO.noised(n, S4).var), {
        "mean not shrunk": formula(lambda b, a, ab, prev, n: (DUO.mean, ab * DUO.var + 1 - ab)),
        "variance not shrunk": formula(lambda b, a, ab, prev, n: (ab.sqrt() * DUO.mean, DUO.var + 1 - ab)),
        "root on the variance": formula(
            lambda b, a, ab, prev, n: (ab.sqrt() * DUO.mean, ab.sqrt() * DUO.var + 1 - ab))}),
    "DDPM step": (check_ddpm, lambda x, e, n, z: df.ddpm_step(
        torch.full((2, 1), x, **F64), torch.full((2, 1), e, **F64), n, S4, z[:, None]).squeeze(-1), {
        "variance for deviation": lambda x, e, n, z: at(df.reverse_mean)(x, e, n) + S4.beta[n] * z * (n > 1),
        "noise at the last step": lambda x, e, n, z: at(df.reverse_mean)(x, e, n) + S4.beta[n].sqrt() * z,
        "posterior variance": lambda x, e, n, z: at(df.reverse_mean)(x, e, n) + S4.posterior_var[n].sqrt() * z}),
    "DDIM step": (check_ddim, lambda x, e, n: df.ddim_step(x[None], torch.tensor([e], **F64), n, S4), {
        "stays at n": lambda x, e, n: x,
        "old noise level": formula(
            lambda b, a, ab, prev, x, e, n: prev.sqrt() * (x - (1 - ab).sqrt() * e) / ab.sqrt() + (1 - ab).sqrt() * e),
        "no noise": formula(lambda b, a, ab, prev, x, e, n: prev.sqrt() * (x - (1 - ab).sqrt() * e) / ab.sqrt())}),
    "price in noise (17)": (price_check(same), lambda e, f, n: pk.step_kl(e, f, n, S4), {
        "missing alpha": formula(lambda b, a, ab, prev, e, f, n: b / (2 * (1 - ab)) * sq(e - f)),
        "missing half": formula(lambda b, a, ab, prev, e, f, n: b / (a * (1 - ab)) * sq(e - f)),
        "posterior variance": formula(lambda b, a, ab, prev, e, f, n: b / (2 * a * (1 - prev)) * sq(e - f)),
        "deviation": formula(lambda b, a, ab, prev, e, f, n: b.sqrt() ** 3 / (2 * a * (1 - ab)) * sq(e - f)),
        "not squared": formula(lambda b, a, ab, prev, e, f, n: b / (2 * a * (1 - ab)) * (e - f).abs().sum(-1))}),
    "price in means (17)": (price_check(lambda x, p, n: df.reverse_mean(x, p, n, S4)),
        lambda m, k, n: pk.step_kl_from_means(m, k, S4.beta[n]), {
        "deviation": formula(lambda b, a, ab, prev, m, k, n: sq(m - k) / (2 * b.sqrt())),
        "missing half": formula(lambda b, a, ab, prev, m, k, n: sq(m - k) / b),
        "posterior variance": lambda m, k, n: sq(m - k) / (2 * S4.posterior_var[n])}),
    "price in clean points": (price_check(as_x0), lambda e, f, n: pk.step_kl_from_x0(e, f, n, S4), {
        "alpha_bar_n": formula(lambda b, a, ab, prev, e, f, n: ab * b / (2 * (1 - ab) ** 2) * sq(e - f)),
        "one factor lost": formula(lambda b, a, ab, prev, e, f, n: prev * b / (2 * (1 - ab)) * sq(e - f))}),
    "price in scores": (price_check(as_score), lambda e, f, n: pk.step_kl_from_score(e, f, n, S4), {
        "missing alpha": formula(lambda b, a, ab, prev, e, f, n: b / 2 * sq(e - f)),
        "alpha_bar": formula(lambda b, a, ab, prev, e, f, n: b / (2 * ab) * sq(e - f)),
        "noise's weight": lambda e, f, n: pk.step_kl(e, f, n, S4)}),
    "path KL (11)": (check_path_kl, pk.markov_path_kl, {
        "KL reversed": wrong_chain(swap=True), "paths of q": wrong_chain(other=True),
        "never moves": wrong_chain(stay=True), "transposed": wrong_chain(transpose=True),
        "start left out": wrong_chain(no_start=True)}),
    "reverse kernels": (check_reverse, ex.reverse_kernels, {
        "prior left out": lambda p, F: F.transpose(1, 2) / F.sum(1)[:, :, None],
        "forward again": lambda p, F: F,
        "always the data": lambda p, F: torch.stack([(p[:, None] * k).T / (p @ k)[:, None] for k in F])}),
    "values (29)": (check_values, ex.optimal_values, {
        "plain mean": wrong_values(lambda k, v, eta: k @ v),
        "maximum": wrong_values(lambda k, v, eta: v.max() + 0 * v),
        "eta upside down": wrong_values(lambda k, v, eta: (k.log() + v * eta).logsumexp(-1) / eta),
        "eta forgotten outside": wrong_values(lambda k, v, eta: (k.log() + v / eta).logsumexp(-1)),
        "sum for mean": wrong_values(lambda k, v, eta: eta * (v / eta).logsumexp(-1) + 0 * v),
        "transposed": wrong_values(lambda k, v, eta: eta * (k.T.log() + v / eta).logsumexp(-1))}),
    "optimal kernels (30)": (check_kernels, ex.optimal_kernels, {
        "sign": wrong_kernels(lambda R, v, w, eta: R * ((w - v) / eta).exp()),
        "not normalised": wrong_kernels(lambda R, v, w, eta: R * (v / eta).exp()),
        "eta missing": wrong_kernels(lambda R, v, w, eta: R * (v - w).exp()),
        "V_n for V_{n-1}": lambda V, R, eta: ex.optimal_kernels(V.roll(-1, 0), R, eta),
        "untilted": wrong_kernels(lambda R, v, w, eta: R)}),
    "quadratic backup": (check_backup, right_backup, {
        "log determinant lost": lambda c, b, p, m, v: (
            c + (b * m - p * m**2 / 2 + b**2 * v / 2) / (1 + p * v), (m + v * b) / (1 + p * v), v / (1 + p * v)),
        "its sign": lambda c, b, p, m, v: (
            c + (b * m - p * m**2 / 2 + b**2 * v / 2) / (1 + p * v) + math.log(1 + p * v) / 2,
            (m + v * b) / (1 + p * v), v / (1 + p * v)),
        "variance untouched": lambda c, b, p, m, v: (right_backup(c, b, p, m, v)[0], (m + v * b) / (1 + p * v), v),
        "mean untouched": lambda c, b, p, m, v: (right_backup(c, b, p, m, v)[0], m, v / (1 + p * v))}),
    "Gaussian optimum (16)": (check_optimum, ex.gaussian_optimum, {
        "deviation in the price": wrong_optimum(lambda d, b, eta: eta * d / (2 * b.sqrt())),
        "missing half": wrong_optimum(lambda d, b, eta: eta * d / b),
        "eta missing": wrong_optimum(lambda d, b, eta: d / (2 * b)),
        "reward for distance": wrong_optimum(lambda d, b, eta: -eta * d / (2 * b)),
        "deviation for variance": wrong_optimum(lambda d, b, eta: eta * d / (2 * b), deviation=True),
        "noise at the last step": lambda *args: ex.gaussian_optimum(*args, last_noise=True)}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_right_formula_passes(name):
    check, right, _ = DAMAGE[name]
    check(right)


@pytest.mark.parametrize("name,wrong", [(n, w) for n, (_, _, wrongs) in DAMAGE.items() for w in wrongs])
def test_damage_is_noticed(name, wrong):
    check, _, wrongs = DAMAGE[name]
    with pytest.raises(AssertionError): check(wrongs[wrong])


def test_enough_damage(): assert len(DAMAGE) >= 10 and all(len(wrongs) >= 2 for _, _, wrongs in DAMAGE.values())


def test_undamaged_copies_pass():
    "The by-hand variants fail for what is wrong with them, not for being by hand."
    check_path_kl(wrong_chain())
    check_values(wrong_values(lambda k, v, eta: eta * (k.log() + v / eta).logsumexp(-1)))
    check_kernels(wrong_kernels(lambda R, v, w, eta: R * ((v - w) / eta).exp()))
    check_optimum(wrong_optimum(lambda d, b, eta: eta * d / (2 * b)))
    check_reverse_mean(formula(lambda b, a, ab, prev, x, e, n: (x - b / (1 - ab).sqrt() * e) / a.sqrt()))
    check_posterior_mean(formula(
        lambda b, a, ab, prev, x, x0, n: (prev.sqrt() * b * x0 + a.sqrt() * (1 - prev) * x) / (1 - ab)))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="at least 1"): vp_schedule(0)
    with pytest.raises(ValueError, match="too coarse"):
        ex.gaussian_optimum(VALUES, df.mixture_eps(DUO, S4), GRID, S4, ETA, clip=0.01)
    with pytest.raises(ValueError, match="ddpm"):
        next(df.reverse_path(lambda x, n: x, torch.zeros(1, 1), vp_schedule(2), solver="euler"))
