"""What a GPU must do as the CPU does. `pytest -m gpu` runs it; with BDPO_LIT_GPU=cpu, what can do without one."""
import os
from contextlib import closing

import jaxtyping
import numpy as np
import pytest
import torch
from test_speed import CASES, TINY, far, numbers

from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.algorithm.speed import Fleet, accelerate, compiler_trouble, gradients, rough, synthetic_batch
from bdpo_lit.evidence.toy2d import closeness, exact_value, make_bandit, walk
from bdpo_lit.offline.data import Transitions
from bdpo_lit.offline.training import TrainConfig, Training, load_agent, read_column
from bdpo_lit.theory.diffusion import vp_schedule

DEVICE = os.environ.get("BDPO_LIT_GPU", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA only")
QUICK = dict(TINY, warmup_steps=2, actor_every=2, actor_lr=1e-3, critic_decay_steps=20)
MODES = ("off", "default", "whole", *(pytest.param(x, marks=only_cuda) for x in ("cudagraph", "whole-cudagraph")))

SAYS = {"off": "eager", "default": "activations compiled", "whole": "losses compiled"}
SAYS |= {"cudagraph": f"{SAYS['default']}, updates recorded as CUDA graphs",
         "whole-cudagraph": f"{SAYS['whole']}, updates recorded as CUDA graphs"}


@pytest.fixture(autouse=True)
def unchecked(request, monkeypatch):
    "Compiled with torch 2.11, jaxtyping's checks of shapes fail on shapes that are right."
    if "whole" in request.node.name: monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def moved(x, dtype=torch.float64): return x.to(DEVICE, dtype) if x.is_floating_point() else x.to(DEVICE)


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_cpu(case):
    config = BDPOConfig(**TINY | CASES[case])
    here, there = rough(BDPO(3, 2, config)), rough(BDPO(3, 2, config, DEVICE))
    batch = synthetic_batch(24, 3, 2, dtype=torch.float64)
    draws = {what: {k: moved(x).cpu() for k, x in here.draw(batch, what).items()}
             for what in ("critics", "actor", "behavior")}
    ours = gradients(there, type(batch)(*map(moved, batch)),
                     {what: {k: moved(x) for k, x in d.items()} for what, d in draws.items()})
    assert all(x.device.type == DEVICE for x in ours.values())
    assert far({k: x.cpu() for k, x in ours.items()}, gradients(here, batch, draws)) < 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_the_same(mode):
    "float32, and another order of sums: close, not equal."
    if mode != "off" and compiler_trouble(DEVICE): pytest.skip(compiler_trouble(DEVICE))
    plain, agent = (BDPO(3, 2, BDPOConfig(**QUICK), DEVICE) for _ in range(2))
    batches = [synthetic_batch(32, 3, 2, seed=s, device=DEVICE) for s in range(8)]
    said = accelerate(agent, mode, batches[0])
    assert said == SAYS[mode]
    plain.fixed = agent.fixed
    for what in ("update_behavior", "update"):
        for b in batches:
            ours, theirs = getattr(agent, what)(b), getattr(plain, what)(b)
            assert ours.keys() == theirs.keys()
            for k in theirs: torch.testing.assert_close(ours[k], theirs[k].float(), rtol=2e-3, atol=1e-4)
    for x, y in zip(numbers(agent), numbers(plain), strict=True): torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)


def test_a_fleet_learns_what_its_agents_would_alone():
    config = BDPOConfig(**QUICK)
    alone, together = ([BDPO(3, 2, config, DEVICE, seed) for seed in range(3)] for _ in range(2))
    fleet = Fleet(together)
    for k in range(6):
        batches = [synthetic_batch(32, 3, 2, seed=10 * k + s, device=DEVICE) for s in range(3)]
        for update in ("update_behavior", "update"):
            getattr(fleet, update)(batches)
            for a, b in zip(alone, batches): getattr(a, update)(b)
    fleet.give_back()
    for a, b in zip(alone, together):
        for x, y in zip(numbers(a), numbers(b), strict=True): torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-4)


@only_cuda
@pytest.mark.parametrize("mode", MODES)
def test_no_update_waits_for_the_gpu(mode):
    agent, batch = BDPO(3, 2, BDPOConfig(**QUICK), DEVICE), synthetic_batch(32, 3, 2, device=DEVICE)
    assert accelerate(agent, mode, batch) == SAYS[mode]
    agent.fixed = True            # else `lower_values` sorts rows, and waits to learn how many there are
    for _ in range(4): agent.update(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4): agent.update(batch)
    finally: torch.cuda.set_sync_debug_mode("default")


def data(size=60):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)
    return Transitions(draw(size, 3), draw(size, 2).clamp(-0.9, 0.9), draw(size), draw(size, 3), torch.zeros(size),
                       torch.zeros(size, dtype=torch.int64), dict(id="noise"))


@pytest.mark.parametrize("eta, mode", [(0.15, "off"), (0.15, "default"), ("auto", "off"),
                                       pytest.param(0.15, "whole-cudagraph", marks=only_cuda)])
def test_a_run_that_is_taken_up_again_ends_as_if_it_had_never_stopped(tmp_path, eta, mode):
    plan = TrainConfig(pretrain_steps=9, train_steps=14, batch_size=8, device=DEVICE, log_every=5, save_every=100,
                       compile=mode)
    start = lambda name: Training(data(), plan, BDPOConfig(**QUICK, eta=eta), None, tmp_path / name, resume=True)
    through, stopped = start("through"), start("stopped")
    assert through.accelerate() == SAYS[mode]
    assert stopped.agent.device.type == stopped.data.obs.device.type == DEVICE
    with closing(through.run()) as updates: list(updates)
    with closing(stopped.run()) as updates:
        for p in updates:
            if (p.phase, p.step) == ("train", 6): break
    again = start("stopped")
    assert again.steps == dict(pretrain=9, train=6)
    with closing(again.run()) as updates: list(updates)
    for x, y in zip(numbers(again.agent), numbers(through.agent), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    for metric in ("q/mean", "q/penalty", "actor/loss"):
        ours, theirs = (read_column(tmp_path / name, metric) for name in ("stopped", "through"))
        assert list(theirs) == [5, 10, 14] and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    obs = np.ones((4, 3), np.float32)
    here, there = (load_agent(tmp_path / "stopped", d).policy()(obs) for d in ("cpu", DEVICE))
    assert here.shape == there.shape == (4, 2) and np.isfinite(here).all() and np.isfinite(there).all()


def test_a_plane_is_measured_there_as_here():
    here, sched = make_bandit("rings", 12_000), vp_schedule(5)
    there = here.to(DEVICE)
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(exact_value(x.to(DEVICE), 3, there, 0.1, sched.to(DEVICE)).cpu(),
                               exact_value(x, 3, here, 0.1, sched), rtol=1e-3, atol=1e-4)
    ours, theirs = (closeness(b.points[:2000], b, None) for b in (there, here))
    for k in ("mean_energy", "share_gap", "outside"): assert ours[k] == pytest.approx(theirs[k], abs=1e-4), k
    assert abs(ours["energy_distance"] - theirs["energy_distance"]) < 0.05
    path = walk(lambda x, n: x, 7, sched.to(DEVICE))
    assert [p.shape for p in path] == [(7, 2)] * 6 and all(p.device.type == DEVICE for p in path)


def test_a_seed_gives_the_same_weights_everywhere_and_its_own_draws():
    a, b = (BDPO(3, 2, BDPOConfig(**TINY), d, seed=4) for d in ("cpu", DEVICE))
    for x, y in zip(numbers(a), numbers(b), strict=True): assert torch.equal(x, y.cpu())
    before = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    BDPO(3, 2, BDPOConfig(**TINY), DEVICE, seed=9).update(synthetic_batch(8, 3, 2, device=DEVICE))
    assert torch.equal(before, torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state())
    play, again = b.policy(seed=3), b.policy(seed=3)
    np.testing.assert_array_equal(play(np.zeros((2, 3), np.float32)), again(np.zeros((2, 3), np.float32)))
