"""Every faster way of computing an update equals the plain one, and the benchmark measures what it says."""

import copy
import json
import sys
from contextlib import closing
from dataclasses import replace

import pytest
import torch

import bdpo_lit.algorithm.speed as speed
from bdpo_lit.algorithm.bdpo import BDPO, BDPOConfig
from bdpo_lit.algorithm.speed import (
    Fleet,
    PlainBDPO,
    Recorded,
    accelerate,
    compile_losses,
    compiler_trouble,
    fused_activate,
    gradients,
    halve_products,
    keep_memory,
    prepare_for_recording,
    products,
    rough,
    synthetic_batch,
    unchanged,
    use_activate,
)
from bdpo_lit.evidence.benchmark import Worker, cycle_ratio, ratios, table
from bdpo_lit.offline.data import Transitions
from bdpo_lit.offline.training import RunError, TrainConfig, Training, load_agent, load_checkpoint, run_together
from bdpo_lit.reference.style import RESULTS

compiles = pytest.mark.skipif(bool(compiler_trouble()), reason="needs a C++ compiler")
TINY = dict(num_critics=3, num_samples=4, actor_hidden=(16, 16), critic_hidden=(16, 16), time_dim=8)
CASES = {
    "locomotion": {}, "antmaze": dict(q_layer_norm=True, max_q=True, rho=0.5), "unclipped": dict(clip=None),
    "one of everything": dict(num_critics=1, num_samples=1, num_steps=1, actor_hidden=(8,), critic_hidden=(8,)),
    "bandit": dict(gamma=0.0), "no future for the paid": dict(rho=0.0, eta=0.0), "no norm": dict(v_layer_norm=False),
}


def twins(device="cpu", dtype=torch.float64, **options):
    "A `BDPO` and a `PlainBDPO` with the same rough parameters, a batch, and draws."
    config = BDPOConfig(**TINY | options)
    fast, plain = rough(BDPO(3, 2, config, device), dtype), PlainBDPO(3, 2, config, device)
    for name in ("behavior", "actor", "q", "v"):
        for part in ("net", "target"):
            setattr(getattr(plain, name), part, copy.deepcopy(getattr(getattr(fast, name), part)))
    plain.sched, batch = fast.sched, synthetic_batch(24, 3, 2, dtype=dtype, device=device)
    to = lambda x: x.to(dtype) if x.is_floating_point() else x
    return fast, plain, batch, {what: {k: to(x) for k, x in plain.draw(batch, what).items()}
                                for what in ("critics", "actor", "behavior")}


def far(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - x).abs().max() / x.abs().max().clamp_min(1e-12)).item() for k, x in theirs.items())


def numbers(agent): return list(unchanged(agent)._tensors())


@pytest.mark.parametrize("fixed", (False, True), ids=("split", "fixed"))
@pytest.mark.parametrize("case", CASES)
def test_less_work_computes_the_same(case, fixed):
    fast, plain, batch, draws = twins(**CASES[case])
    fast.fixed = fixed
    assert far(gradients(fast, batch, draws), gradients(plain, batch, draws)) < 1e-11


def test_a_difference_would_be_noticed():
    "Each term of the losses counts: a change of any of these settings is seen in losses or gradients."
    fast, plain, batch, draws = twins()
    reference = gradients(plain, batch, draws)
    for change in (dict(eta=0.151), dict(rho=0.99), dict(gamma=0.98), dict(clip=0.9)):
        fast.config = BDPOConfig(**TINY | change)
        assert far(gradients(fast, batch, draws), reference) > 1e-6, change


def test_at_the_last_step_one_of_the_equal_actions_is_asked_about():
    agent, batch, rows = BDPO(3, 2, BDPOConfig(**TINY)), synthetic_batch(24, 3, 2), {}
    for name in ("q", "v"):
        head = getattr(agent, name).target.mlp.head
        head.register_forward_hook(lambda module, inputs, out, name=name: rows.update({name: out[0].numel()}))
    draws = agent.draw(batch, "actor")
    agent.policy_loss(batch, **draws)
    last = (draws["n"] == 1).sum().item()
    assert 0 < last < 24 and rows == dict(q=last, v=(24 - last) * TINY["num_samples"])


def test_the_products_alone_are_those_of_the_update():
    agent, batch = BDPO(3, 2, BDPOConfig(**TINY)), synthetic_batch(24, 3, 2)
    for op in speed.UPDATES:
        state = agent.generator.get_state()
        alone = products(agent, batch, op)
        agent.generator.set_state(state)                        # the same n, so the same rows
        with speed.FlopCounterMode(display=False) as flops: alone()
        with speed.FlopCounterMode(display=False) as whole: getattr(agent, f"update_{speed.UPDATES[op]}")(batch)
        assert flops.get_total_flops() == whole.get_total_flops() > 0


@compiles
def test_compiled_activations_compute_the_same():
    for case in ("locomotion", "antmaze"):
        fast, plain, batch, draws = twins(**CASES[case])
        use_activate(fast, fused_activate)
        assert far(gradients(fast, batch, draws), gradients(plain, batch, draws)) < 1e-11


@compiles
def test_what_is_compiled_serves_all_sizes_and_is_not_left_for_the_plain_function():
    "A compiler that meets too many kinds of arguments gives up, and says so on standard error alone."
    agent = BDPO(3, 2, BDPOConfig(**TINY, warmup_steps=0, actor_every=1))
    use_activate(agent, fused_activate)
    def once(size):
        batch = synthetic_batch(size, 3, 2)
        agent.update(batch)
        agent.act(batch.obs[:4])
    once(24)
    with torch.compiler.set_stance("fail_on_recompile"): once(17)


def test_without_a_compiler_the_agent_stays_eager_and_says_so(monkeypatch):
    def broken(f): raise RuntimeError("no compiler found\nand a long story")
    monkeypatch.setattr(speed, "_compiled", broken)
    monkeypatch.setattr(speed, "compiler_trouble", speed.compiler_trouble.__wrapped__)   # not the remembered answer
    agent, batch = BDPO(3, 2, BDPOConfig(**TINY)), synthetic_batch(8, 3, 2)
    said = "eager: torch.compile does not work here (no compiler found)"
    for mode in ("default", "whole"): assert accelerate(agent, mode) == said
    agent.update(batch)
    assert accelerate(agent, "half") == f"{said}, products in half precision"
    agent.update(batch)


def test_memory_is_kept_with_glibc_only(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1"))
    assert keep_memory() is False


def start(run_dir, **changes):
    "A tiny run on noise."
    b = synthetic_batch(64, 3, 2)
    data = Transitions(b.obs, b.action * (1 - 1e-3), *b[2:], torch.arange(64) // 8)
    plan = TrainConfig(pretrain_steps=5, train_steps=8, batch_size=16, log_every=2, save_every=3, device="cpu")
    algorithm = BDPOConfig(**TINY, warmup_steps=2, actor_every=2, actor_lr=1e-3, ema=0.5)
    return Training(data, replace(plan, **changes), algorithm, None, run_dir, resume=True)


@compiles
def test_a_compiled_run_resumes_to_the_same_bits_and_may_go_on_eager(tmp_path):
    through = start(tmp_path / "through", compile="default")
    assert through.accelerate() == "activations compiled"
    list(through.run())
    for updates in (7, 100):
        part = start(tmp_path / "parts", compile="default")
        with closing(part.run()) as loop:
            for p, _ in zip(loop, range(updates)): pass
    metrics = [(tmp_path / name / "metrics.csv").read_text() for name in ("through", "parts")]
    assert metrics[0] == metrics[1] and part.finished
    longer = start(tmp_path / "parts", train_steps=10)                  # the same run without the compiler
    assert longer.accelerate() == "eager" and len(list(longer.run())) == 2


def test_runs_together_stay_together_when_one_evaluation_fails(tmp_path, monkeypatch):
    pair = [start(tmp_path / str(s), seed=s, eval_every=4) for s in range(2)]
    for t in pair: monkeypatch.setattr(t, "_evaluation_due", lambda t=t: t.steps["train"] == 4)
    monkeypatch.setattr(pair[0], "_judge", lambda: {})
    monkeypatch.setattr(pair[1], "_judge", lambda: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception, match="interrupted"): list(run_together(pair))
    again = [start(tmp_path / str(s), seed=s, eval_every=4) for s in range(2)]
    assert [t.steps["train"] for t in again] == [4, 4]
    for a, t in zip(again, pair): assert all(torch.equal(x, y) for x, y in zip(numbers(a.agent), numbers(t.agent)))
    list(run_together(again))
    assert all(t.finished for t in again)


def test_runs_together_save_what_separate_runs_save(tmp_path):
    alone = [start(tmp_path / f"alone-{s}", seed=s) for s in range(2)]
    for t in alone: list(t.run())
    together = [start(tmp_path / f"pair-{s}", seed=s) for s in range(2)]
    assert [p.step for p, _ in run_together(together)] == [*range(1, 6), *range(1, 9)]
    for a, t in zip(alone, together):
        assert t.finished and load_checkpoint(t.dir)["steps"] == load_checkpoint(a.dir)["steps"]
        for x, y in zip(numbers(a.agent), numbers(load_agent(t.dir)), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4)
    with pytest.raises(RunError, match="equally far"): next(run_together([*together, start(tmp_path / "new", seed=5)]))


def test_a_fleet_goes_on_from_where_its_agents_are_and_they_from_where_it_was():
    config, batch = BDPOConfig(**TINY, warmup_steps=1, actor_every=2, actor_lr=1e-3), synthetic_batch(24, 3, 2)
    alone, together = ([BDPO(3, 2, config, seed=s) for s in range(2)] for _ in range(2))
    for a in (*alone, *together): a.update(batch)                       # each by itself
    for _ in range(4):
        for a in alone: a.update(batch)
    fleet = Fleet(together)
    for _ in range(3): metrics = fleet.update([batch, batch])
    fleet.give_back()
    for a in together: a.update(batch)                                  # and again
    assert metrics["q/loss"].shape == (2,) and [a.updates for a in together] == [5, 5]
    for a, b in zip(alone, together):
        assert torch.equal(a.generator.get_state(), b.generator.get_state())
        for x, y in zip(numbers(a), numbers(b), strict=True): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_a_fleet_refuses_what_cannot_march_together():
    small = BDPOConfig(**TINY)
    with pytest.raises(ValueError, match="one configuration"): Fleet([BDPO(3, 2, small), BDPO(4, 2, small)])
    ahead = BDPO(3, 2, small)
    ahead.update_behavior(synthetic_batch(8, 3, 2))
    with pytest.raises(ValueError, match="equally many"): Fleet([BDPO(3, 2, small), ahead])


def test_rates_on_the_device_and_undone_updates():
    config, batch = BDPOConfig(**TINY, warmup_steps=0, actor_every=1, critic_decay_steps=5), synthetic_batch(16, 3, 2)
    agent, other = BDPO(3, 2, config), BDPO(3, 2, config)
    for name in ("behavior", "actor", "q", "v"): prepare_for_recording(getattr(agent, name))
    before, state = [x.clone() for x in numbers(agent)], agent.generator.get_state()
    with unchanged(agent): agent.update(batch)
    assert agent.updates == 0 and torch.equal(agent.generator.get_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(numbers(agent), before, strict=True))
    for _ in range(7): agent.update(batch), other.update(batch)
    for x, y in zip(numbers(agent), numbers(other), strict=True): torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_a_recorded_agent_refuses_a_state_and_a_fleet():
    agent = BDPO(3, 2, BDPOConfig(**TINY))
    state, agent.update = agent.state_dict(), None
    with pytest.raises(RuntimeError, match="before the updates are recorded"): agent.load_state_dict(state)
    with pytest.raises(ValueError, match="train alone"): Fleet([agent])
    compiled = BDPO(3, 2, BDPOConfig(**TINY))
    compile_losses(compiled)
    with pytest.raises(ValueError, match="recorded or compiled train alone"): Fleet([compiled])


def test_half_products_learn_and_stay_in_single_precision():
    "A fleet too; exact where the factors are exact in eight bits."
    agents = [BDPO(3, 2, BDPOConfig(**TINY, warmup_steps=0, actor_every=1), seed=s) for s in (0, 1)]
    for a in agents: halve_products(a)
    x = torch.randint(-8, 8, (1, 5, 3)) / 8
    net = agents[0].q.net
    with torch.no_grad():
        for layer in (*net.mlp.layers, net.mlp.head): layer.weight.copy_(torch.randint(-8, 8, layer.weight.shape) / 8)
        linear = net.mlp.layers[0]
        exact = torch.einsum("bi,kio->kbo", x[0], linear.weight[:, :3])
        assert torch.equal(net.mlp.share(0, x), exact)
        y = torch.randint(-8, 8, (1, 5, linear.weight.shape[1])) / 8
        assert torch.equal(linear(y), torch.einsum("bi,kio->kbo", y[0], linear.weight) + linear.bias[:, None])
    before = [p.clone() for a in agents for p in numbers(a)]
    fleet = Fleet(agents)
    fleet.update([synthetic_batch(8, 3, 2)] * 2)
    fleet.give_back()
    assert all(p.dtype == torch.float32 for a in agents for p in numbers(a))
    moved = [not torch.equal(p, q) for p, q in zip(before, (p for a in agents for p in numbers(a)))]
    assert sum(moved) > len(moved) // 2


@pytest.mark.parametrize("mode, error", [("cudagraph", RuntimeError), ("whole-cudagraph", AssertionError)])
def test_a_failed_recording_leaves_a_working_agent(mode, error, monkeypatch):
    "As far as that can be seen without a GPU. A compiler that fails does so when first asked, in the recording."
    def fails(agent, batch):
        agent.fixed = True
        agent._normal(3)
        raise error("operation not permitted when stream is capturing\n...")
    def broken(*args): raise error
    class Pretended(str): type = "cuda"
    agent, batch = BDPO(3, 2, BDPOConfig(**TINY)), synthetic_batch(16, 3, 2)
    monkeypatch.setattr(speed, "Recorded", fails)
    monkeypatch.setattr(speed, "compiler_trouble", lambda device: "")
    monkeypatch.setattr(speed, "fused_activate", broken)
    monkeypatch.setattr(torch, "compile", lambda f, **how: broken)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    before, agent.device = agent.generator.get_state(), Pretended("cpu")
    with pytest.raises(ValueError, match="batch is needed"): accelerate(agent, mode)
    said = accelerate(agent, mode, batch)
    assert said == "eager: nothing could be recorded (operation not permitted when stream is capturing)"
    assert not agent.fixed and torch.equal(agent.generator.get_state(), before)
    agent.update_behavior(batch)
    agent.update(batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("gamma", (0.99, 0.0))
def test_recorded_updates_equal_eager_ones(gamma):
    config = BDPOConfig(**TINY, gamma=gamma, warmup_steps=2, actor_every=2, actor_lr=1e-3, critic_decay_steps=20)
    eager, recorded = BDPO(3, 2, config, "cuda"), BDPO(3, 2, config, "cuda")
    batches = [synthetic_batch(32, 3, 2, seed=s, device="cuda") for s in range(8)]
    Recorded(recorded, batches[0]).take_over()
    eager.fixed = True
    for what in ("update_behavior", "update", "update_critics", "update_actor"):
        for b in batches:
            ours, theirs = getattr(recorded, what)(b), getattr(eager, what)(b)
            assert ours.keys() == theirs.keys()
            for k in theirs: torch.testing.assert_close(ours[k], theirs[k].float(), rtol=1e-3, atol=1e-5)
    for x, y in zip(numbers(recorded), numbers(eager), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


# ---- the benchmark

ECHO = "import sys\nprint('{}', flush=True)\nfor line in sys.stdin: print('{\"wall\": 1.0, \"cpu\": 2.0}', flush=True)"


def test_a_worker_answers_fails_and_ends():
    with Worker([sys.executable, "-c", ECHO]) as w: assert w.ask("critic 1") == dict(wall=1.0, cpu=2.0)
    assert w.process.returncode == 0
    with pytest.raises(RuntimeError, match="ended early"): Worker([sys.executable, "-c", "raise SystemExit(1)"])
    with Worker([sys.executable, "-c", ECHO.replace('{"wall"', '{"error": "no such op", "wall"')]) as w:
        with pytest.raises(RuntimeError, match="no such op"): w.ask("x")


def test_ratios_are_taken_round_by_round():
    "A machine that slows down threefold in one round does not change the ratio."
    times = lambda *x: [dict(wall=t, cpu=t) for t in x]
    answers = dict(plain=dict(critic=times(2, 6, 2), actor=times(1, 3, 1), pretrain=times(1, 3, 1)),
                   fast=dict(critic=times(1, 3, 1), actor=times(1, 3, 1), pretrain=times(1, 3, 1)))
    found = ratios(answers, "plain")["fast"]["critic"]
    assert (found["ratio"], found["low"], found["high"], found["seconds"]) == (0.5, 0.5, 0.5, 1)
    assert cycle_ratio(answers, "fast", "plain") == pytest.approx(7 / 12)


def test_stored_measurements_reach_what_the_chapter_says():
    result = json.loads((RESULTS / "speed_cpu.json").read_text())
    for part, p in result["provenance"].items():
        assert "dirty" not in p["commit"] and {"cpu", "torch", "date", "cores"} <= p.keys(), part
    way = result["locomotion"]["ratio"]
    assert way["fast"]["cycle"]["ratio"] <= 0.45 and way["fast"]["pretrain"]["ratio"] <= 1
    assert all(way["fast"][op]["ratio"] < way["jax bdpo"][op]["ratio"] for op in ("pretrain", "critic", "actor"))


def test_the_table_says_what_its_rows_and_columns_are():
    text = table(json.loads((RESULTS / "speed_cpu.json").read_text()))
    _, _, legend = text.rpartition("\n\n")
    explained = [line.split("  ")[1].strip() for line in legend.splitlines()]
    assert {"plain", "less", "kept", "fast", "jax bdpo", "critic", "cycle"} <= set(explained)
    assert len(explained) == len(set(explained))


def test_stored_steps_are_faster_after_than_before():
    found = json.loads((RESULTS / "speed_steps.json").read_text())["locomotion"]["ratio"]
    for way in ("kept", "fast"):
        assert all(found[way][op]["ratio"] < found[f"before {way}"][op]["ratio"] for op in ("critic", "actor")), way
