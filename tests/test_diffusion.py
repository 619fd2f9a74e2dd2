"""Chapter 2, against independent forms: PyTorch's mixture, moments of draws, Bayes' rule, both sides of a box."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from bdpo_lit.theory.diffusion import (
    Mixture,
    Schedule,
    ddim_step,
    ddpm_step,
    forward_sample,
    mixture_eps,
    posterior_mean,
    reverse_mean,
    reverse_path,
    vp_schedule,
    x0_from_eps,
)

F64 = dict(dtype=torch.float64)
few = settings(max_examples=15, derandomize=True, deadline=None, database=None)
seeds = st.integers(0, 10_000)
S5 = vp_schedule(5, **F64)
PLANE = Mixture(torch.tensor([0.5, 0.3, 0.2], **F64), torch.tensor([[-0.8, -0.5], [0.9, -0.3], [0.1, 0.9]], **F64),
                torch.tensor([0.02, 0.1, 0.3], **F64))


def gen(seed): return torch.Generator().manual_seed(seed)
def close(a, b, tol=1e-10): return torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def theirs(mixture):
    "The same mixture, made by PyTorch."
    sd = mixture.var.sqrt()[:, None].expand_as(mixture.mean)
    return MixtureSameFamily(Categorical(mixture.weight), Independent(Normal(mixture.mean, sd), 1))


@st.composite
def mixtures(draw):
    C, A, g = draw(st.integers(1, 4)), draw(st.integers(1, 3)), gen(draw(seeds))
    return Mixture(torch.randn(C, generator=g, **F64).softmax(0), torch.randn(C, A, generator=g, **F64),
                   0.01 + torch.rand(C, generator=g, **F64))


@few
@given(mixtures(), st.integers(0, 5), seeds)
def test_mixture_is_pytorchs(mixture, n, seed):
    q, x = mixture.noised(n, S5), 2 * torch.randn(3, 4, mixture.mean.shape[-1], generator=gen(seed), **F64)
    x.requires_grad_()
    want = theirs(q).log_prob(x)
    close(q.log_prob(x), want)
    close(q.score(x), torch.autograd.grad(want.sum(), x)[0], 1e-9)
    close(q.log_components(x).logsumexp(-1), want)


def test_mixture_samples():
    "Shares, centres and spreads of each component; coordinates are independent."
    x = PLANE.sample(200_000, gen(1))
    near = PLANE.log_components(x).softmax(-1)
    centre = near.T @ x / near.sum(0)[:, None]
    for k in range(3):
        d = x - PLANE.mean[k]
        cov = (near[:, k, None] * d).T @ d / near[:, k].sum()
        close(cov, PLANE.var[k] * torch.eye(2, **F64), 0.006)
        assert (cov.diagonal() / PLANE.var[k] - 1).abs().max() < 0.03
    close(near.mean(0), PLANE.weight, 0.005)
    close(centre, PLANE.mean, 0.01)
    assert torch.equal(PLANE.sample(5, gen(3)), PLANE.sample(5, gen(3)))
    log_prob = theirs(PLANE).log_prob(x)                       # the draws have the entropy of the density
    other = theirs(PLANE).log_prob(theirs(PLANE).sample((200_000,)))
    assert abs(log_prob.mean() - other.mean()) < 5 * (2 * log_prob.var() / 200_000) ** 0.5


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_reverse_mean_is_bayes_in_the_plane(n):
    "E[a^{n-1} | a^n] by weighting draws of a^{n-1}; a predictor that knows a^0 gets the posterior's mean."
    x_n = torch.tensor([[0.3, -0.4]], **F64)
    prev = PLANE.noised(n - 1, S5).sample(400_000, gen(n))
    w = (-(x_n - S5.alpha[n].sqrt() * prev).square().sum(-1) / (2 * S5.beta[n])).softmax(0)
    mean = w @ prev
    error = (w[:, None] ** 2 * (prev - mean) ** 2).sum(0).sqrt()
    ours = reverse_mean(x_n, mixture_eps(PLANE, S5)(x_n, n), n, S5)[0]
    assert ((ours - mean) / error).abs().max() < 4.5


@few
@given(st.lists(st.floats(0.02, 0.9), min_size=1, max_size=6), seeds)
def test_reverse_mean_written_out(betas, seed):
    "Both ways to write it, one step for each sample, and any box."
    beta = torch.tensor([0.0, *betas], **F64)
    s, g = Schedule(beta, 1 - beta, (1 - beta).cumprod(0)), gen(seed)
    n = torch.randint(1, s.num_steps + 1, (7,), generator=g)
    x, eps = torch.randn(2, 7, 3, generator=g, **F64)
    b, a, ab, prev = (v[:, None] for v in (s.beta[n], s.alpha[n], s.alpha_bar[n], s.alpha_bar[n - 1]))
    close(reverse_mean(x, eps, n, s), (x - b / (1 - ab).sqrt() * eps) / a.sqrt(), 1e-7)
    x0 = x0_from_eps(x, eps, n, s)
    for clip in (0.3, 1.0):
        inside = torch.minimum(torch.maximum(x0, torch.full_like(x0, -clip)), torch.full_like(x0, clip))
        want = (prev.sqrt() * b * inside + a.sqrt() * (1 - prev) * x) / (1 - ab)
        close(reverse_mean(x, eps, n, s, clip), want, 1e-9)
        close(reverse_mean(x, eps, n, s, clip), posterior_mean(x, inside, n, s), 1e-12)


@few
@given(st.integers(1, 5), st.floats(0.2, 1.5), seeds)
def test_a_box_has_two_sides(n, clip, seed):
    "DDIM clips its result to [-clip, clip], all of it; sign flips go through."
    x, eps = 3 * torch.randn(2, 50, 2, generator=gen(seed), **F64)
    plain, boxed = ddim_step(x, eps, n, S5), ddim_step(x, eps, n, S5, clip)
    low, high = torch.tensor(-clip, **F64), torch.tensor(clip, **F64)
    assert torch.equal(boxed, torch.minimum(torch.maximum(plain, low), high))
    assert boxed.min() == -clip and boxed.max() == clip and boxed.unique().numel() > 2
    for step in (ddim_step, reverse_mean): close(step(-x, -eps, n, S5, clip), -step(x, eps, n, S5, clip))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_variance_of_a_step_is_beta(n):
    "Of the step, and of the walk when it draws its own noise; none at the end."
    z = torch.tensor([[-1.0], [1.0]], **F64)
    x, eps = torch.full((2, 1), 0.4, **F64), torch.full((2, 1), -0.3, **F64)
    spread = (ddpm_step(x, eps, n, S5, z) - reverse_mean(x, eps, n, S5)).square().mean()
    close(spread, S5.beta[n] if n > 1 else torch.zeros((), **F64), 1e-12)
    walk = {k: prev for k, _, _, prev in reverse_path(lambda x, k: 0 * x, torch.zeros(40_000, 1, **F64), S5,
                                                      generator=gen(0))}
    start = {k: x for k, x, _, _ in reverse_path(lambda x, k: 0 * x, torch.zeros(40_000, 1, **F64), S5,
                                                 generator=gen(0))}
    drawn = (walk[n] - reverse_mean(start[n], 0 * start[n], n, S5)).var()
    assert abs(drawn / S5.beta[n] - 1) < 0.04 if n > 1 else drawn == 0


def test_walk_reproduces_data_whose_kernels_are_gaussian():
    "Data N(0, I): the kernels have variance beta exactly, and the last mean shrinks by sqrt(alpha_1)."
    unit = Mixture(torch.ones(1, **F64), torch.zeros(1, 2, **F64), torch.ones(1, **F64))
    g = gen(2)
    path = list(reverse_path(mixture_eps(unit, S5), torch.randn(100_000, 2, generator=g, **F64), S5, generator=g))
    for n, x, _, prev in path:
        want = S5.alpha[1] if n == 1 else torch.ones((), **F64)
        assert (x.var(0) - 1).abs().max() < 0.02 and (prev.var(0) - want).abs().max() < 0.02
    noised = forward_sample(path[-1][1], 3, torch.randn(100_000, 2, generator=g, **F64), S5)
    assert (noised.var(0) - 1).abs().max() < 0.02
