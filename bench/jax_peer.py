"""The JAX side of `make bench`: times the updates of flowrl's BDPO, DAC and Diffusion-QL agents, on request.

flowrl (https://github.com/typoverflow/flow-rl) is the library of BDPO's authors. The agents are theirs and so is every
line of maths: this program builds them at the sizes asked for, feeds them synthetic data and calls their jitted
functions. It runs in a virtual environment of its own, without bdpo_lit and without torch:

    python3.11 -m venv .venv-jax
    .venv-jax/bin/pip install -r bench/requirements-jax.txt
    git clone --depth 1 --branch v0.2.0 https://github.com/typoverflow/flow-rl
    .venv-jax/bin/python bench/jax_peer.py --flowrl flow-rl

`pip install flowrl==0.2.0` is not enough: the archive on the package index lacks flowrl.flow, flowrl.module,
flowrl.functional and flowrl.config, without which no agent can be imported. A clone needs no installation.

Protocol, one JSON object per line on stdout (everything else goes to stderr):
    at the start       versions, device, cores, sizes, agents (their ops, compile_seconds, sizes, differs), peak_rss
    `bdpo critic 3`    agent, op, repeats, wall and cpu: seconds per call (cpu: of the whole process, user and system);
                       compiled: how many programs JAX compiled meanwhile (a timing with any is spoilt; expect 0)
    `memory`           peak_rss: the most memory the process has held, in bytes, compilation included
    end of input       the same as `memory`, and the end
A request that cannot be served is answered by {"error": ...}.

One core: --threads 1 leaves the process the first of its cores before JAX starts, as `taskset -c` does from outside
(choose the core there if other work is pinned to the first). With jax 0.5.3 the XLA flags often advised,
--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1, change nothing: both cores stay busy. NPROC=1 in the
environment leaves one worker, but a second thread still runs beside it. The core is what counts.
"""
import argparse
import json
import os
import resource
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

PRESETS = {"locomotion": dict(obs=17, act=6, batch=256, steps=5), "toy2d": dict(obs=1, act=2, batch=512, steps=50)}
ACTOR_LAYERS, CRITIC_LAYERS, TIME_DIM = 4, 3, 64  # BDPO's networks; flowrl's own files give DAC and DQL three layers
ACTOR_EVERY = 5                                   # BDPO: critic updates per update of actor and behaviour
LR, EMA, EMA_EVERY, CLIP_GRAD, DECAY_STEPS = 3e-4, 0.005, 5, 1.0, 2_000_000

# What to keep in mind when a number from here stands beside one of bdpo_lit's BDPO.
BOTH_DIFFER = [
    "one critic Q: no V_n over the noisy actions of the path, so neither its target nor its update",
    "no behaviour network: `pretrain` is flowrl's own jit_update_ddpm on a copy of the actor (BDPO: the same, and an "
    "EMA copy), and no penalty has to be computed along the sampled path",
    "critic: samples actions of next_obs through all N steps, as BDPO does, and evaluates Q there",
    "train: one critic and one actor update every step (BDPO: an actor update every few critic updates)",
    "actor EMA: in every call of `actor`, every 5th of `train`, from the first on (flowrl's files: from the 1000th)",
]
DIFFERS = {
    "bdpo": [
        "critic and actor: V_n and Q both see all samples and a mask chooses (bdpo_lit: each sees its own rows)",
        "critic: the behaviour network sees the stored paths all at once, after the walk (bdpo_lit: step by step)",
        f"train: a critic update, and in every {ACTOR_EVERY}th call one of the actor and one of the behaviour network "
        f"(bdpo_lit: the same); ask for a multiple of {ACTOR_EVERY} repeats",
        "settings: flowrl's file for D4RL, but rho 1 (there 0) and no warm-up (there 50,000 critic updates)",
        "toy2d: flowrl's file for it has eta 0.05 (here 1) and does not clip samples (here to [-1, 1])",
    ],
    "dac": BOTH_DIFFER + [
        "actor: noise-prediction loss plus the predicted noise times the ensemble's action gradient at the noisy data "
        "action; one pass of the noise net per row, no samples (BDPO: M samples of one reverse step, through V_n or Q)",
        "only critic depends on N and M; actor depends on K, batch and width",
    ],
    "dql": BOTH_DIFFER + [
        "actor: noise-prediction loss plus back-propagation through the whole N-step chain, one sample per row",
        "critic target: the smallest of the ensemble, no mean - rho std",
        "samples: flowrl fixes them at 10 with the max-Q backup, and 1 without; --samples above 1 means 10, by max-Q",
        "critics: the actor reads members 0 and 1 alone but evaluates all; fewer than 2 are not possible, 2 are taken",
    ],
}
INSTALL = """\
  python3.11 -m venv .venv-jax && .venv-jax/bin/pip install -r bench/requirements-jax.txt
  git clone --depth 1 --branch v0.2.0 https://github.com/typoverflow/flow-rl
  .venv-jax/bin/python bench/jax_peer.py --flowrl flow-rl"""


def arguments():
    "The sizes: those of the preset, then whatever the command line sets."
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--preset", choices=PRESETS, default="locomotion")
    p.add_argument("--obs", type=int, help="dimension of an observation")
    p.add_argument("--act", type=int, help="dimension of an action")
    p.add_argument("--batch", type=int, help="transitions per update")
    p.add_argument("--steps", type=int, metavar="N", help="diffusion steps")
    p.add_argument("--critics", type=int, metavar="K", default=10, help="members of the critic ensemble")
    p.add_argument("--samples", type=int, metavar="M", default=10, help="actions per state in targets")
    p.add_argument("--width", type=int, metavar="W", default=256, help="of every hidden layer")
    p.add_argument("--agents", default="bdpo,dac,dql", help="which to build, with commas")
    p.add_argument("--ops", default="pretrain,critic,actor,train", help="which to compile and serve, with commas")
    p.add_argument("--threads", type=int, default=0, help="cores to run on; 0: all that the process may use")
    p.add_argument("--flowrl", type=Path, default=os.environ.get("FLOWRL"), metavar="DIR",
                   help="a clone of flow-rl (default: $FLOWRL, else the installed package)")
    args = p.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None: setattr(args, name, value)
    for name in ("obs", "act", "batch", "steps", "critics", "samples", "width"):
        if getattr(args, name) < 1: p.error(f"--{name} must be at least 1")
    args.agents, args.ops = args.agents.split(","), args.ops.split(",")
    for given, known in ((args.agents, AGENTS), (args.ops, ("pretrain", "critic", "actor", "train"))):
        if unknown := set(given) - set(known): p.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if args.threads and not hasattr(os, "sched_setaffinity"): p.error("--threads needs Linux")
    return args


def cores() -> int:
    "How many cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def load(folder: Path | None):
    "Import JAX and flowrl, or end with a message that says how to get them."
    if folder:
        if not (folder / "flowrl").is_dir(): sys.exit(f"No flowrl package in {folder}: is it a clone of flow-rl?")
        sys.path.insert(0, str(folder))
    try:
        import jax
        from flowrl.agent.offline import dac, dql
        from flowrl.agent.offline.bdpo import bdpo
        from flowrl.flow.ddpm import jit_update_ddpm
        from flowrl.types import Batch
    except ModuleNotFoundError as e:
        name = e.name or "?"
        if name.startswith("flowrl."):
            why = f"This flowrl has no {name}: the archive on the package index is incomplete, a clone is needed."
        elif name == "flowrl":
            why = "The JAX peer needs flowrl, which is not there: it is used from a clone."
        else:
            why = f"The JAX peer needs {name}, which is not installed in {sys.prefix}."
        sys.exit(f"{why}\nIt runs in an environment of its own:\n{INSTALL}")
    return jax, SimpleNamespace(bdpo=bdpo, dac=dac, dql=dql, jit_update_ddpm=jit_update_ddpm, Batch=Batch)


def synthetic_batch(jax, flowrl, args):
    "Transitions of noise: the time an update takes does not depend on what they say."
    keys = jax.random.split(jax.random.PRNGKey(0), 5)
    def normal(key, size): return jax.random.normal(key, (args.batch, size))
    def uniform(key): return jax.random.uniform(key, (args.batch, args.act), minval=-1.0)
    return flowrl.Batch(obs=normal(keys[0], args.obs), action=uniform(keys[1]), reward=normal(keys[2], 1),
                        terminal=jax.numpy.zeros((args.batch, 1)), next_obs=normal(keys[3], args.obs),
                        next_action=uniform(keys[4]))


def bdpo(flowrl, args):
    "The BDPO agent at these sizes, its updates by op (called as its train_step calls them), its sizes."
    c = SimpleNamespace(
        discount=0.99, q_target="lcb", maxQ=False, ensemble_size=args.critics, rho=1.0, eta=1.0,
        hidden_dims=(args.width,) * CRITIC_LAYERS, lr=LR, lr_decay_steps=DECAY_STEPS, clip_grad_norm=CLIP_GRAD,
        layer_norm=False, ema=EMA, ema_every=1, steps=args.steps, num_samples=args.samples, solver="ddpm",
        update_ratio=ACTOR_EVERY)
    d = SimpleNamespace(
        actor=SimpleNamespace(lr=1e-5, lr_decay_steps=DECAY_STEPS, clip_grad_norm=CLIP_GRAD, ema=EMA,
                              ema_every=EMA_EVERY),
        behavior=SimpleNamespace(lr=LR, lr_decay_steps=None, clip_grad_norm=CLIP_GRAD, ema=EMA, ema_every=1),
        noise_schedule="vp", resnet=False, dropout=0.0, layer_norm=False, time_dim=TIME_DIM,
        mlp_hidden_dims=(args.width,) * ACTOR_LAYERS, solver="ddpm", steps=args.steps, clip_sampler=True, x_min=-1.0,
        x_max=1.0)
    cfg = SimpleNamespace(warmup_steps=0, temperature=0.0, diffusion=d, critic=c)
    agent = flowrl.bdpo.BDPOAgent(args.obs, args.act, cfg, seed=0)
    agent.prepare_training()

    def critic(batch):
        agent.rng, agent.q0, agent.q0_target, agent.vt, agent.vt_target, _ = flowrl.bdpo.jit_update_critic(
            agent.rng, agent.q0, agent.q0_target, agent.vt, agent.vt_target, agent.actor_target, agent.behavior_target,
            batch, d.steps, c.discount, c.eta, c.rho, c.num_samples, c.q_target, c.maxQ, c.solver, c.ema, True)

    def actor(batch):
        agent.rng, agent.actor, agent.actor_target, _ = flowrl.bdpo.jit_update_actor(
            agent.rng, agent.actor, agent.actor_target, agent.behavior_target, agent.q0_target, agent.vt_target, batch,
            d.steps, c.eta, c.rho, c.num_samples, c.q_target, c.maxQ, c.solver, d.actor.ema, True)

    return (agent, dict(pretrain=partial(agent.pretrain_step, step=0), critic=critic, actor=actor),
            dict(steps=d.steps, critics=c.ensemble_size, samples=c.num_samples))


def dac(flowrl, args):
    "The same for DAC, which has no behaviour network and so no op `pretrain` of its own."
    cfg = SimpleNamespace(
        temperature=0.0, start_actor_ema=0, eta=1.0, eta_min=0.001, eta_max=100.0, eta_lr=0.0, eta_threshold=1.0,
        diffusion=SimpleNamespace(
            noise_schedule="vp", resnet=False, dropout=0.0, layer_norm=False, time_dim=TIME_DIM,
            mlp_hidden_dims=(args.width,) * ACTOR_LAYERS, solver="ddpm", steps=args.steps, clip_sampler=True,
            x_min=-1.0, x_max=1.0, lr=LR, lr_decay_steps=DECAY_STEPS, clip_grad_norm=CLIP_GRAD, ema=EMA,
            ema_every=EMA_EVERY),
        critic=SimpleNamespace(
            discount=0.99, q_target="lcb", rho=0.5, maxQ=False, num_samples=args.samples, ensemble_size=args.critics,
            hidden_dims=(args.width,) * CRITIC_LAYERS, layer_norm=False, lr=LR, lr_decay_steps=DECAY_STEPS,
            clip_grad_norm=CLIP_GRAD, ema=EMA, ema_every=1))
    agent, c, d = flowrl.dac.DACAgent(args.obs, args.act, cfg, seed=0), cfg.critic, cfg.diffusion

    def critic(batch):
        agent.rng, agent.critic, agent.critic_target, _ = flowrl.dac.jit_update_critic(
            agent.rng, agent.critic, agent.critic_target, agent.actor_target, batch, c.discount, c.rho, c.num_samples,
            c.q_target, c.maxQ, d.solver, c.ema, True)

    def actor(batch):
        agent.rng, agent.actor, agent.actor_target, agent.eta, _ = flowrl.dac.jit_update_actor(
            agent.rng, agent.actor, agent.actor_target, agent.critic_target, agent.eta, batch, cfg.eta_min, cfg.eta_max,
            cfg.eta_lr, cfg.eta_threshold, d.ema, True)

    return agent, dict(critic=critic, actor=actor), dict(steps=d.steps, critics=c.ensemble_size, samples=c.num_samples)


def dql(flowrl, args):
    "The same for Diffusion-QL, whose configuration has no number of samples either."
    max_q = args.samples > 1
    cfg = SimpleNamespace(
        temperature=1.0, start_actor_ema=0, eta=1.0, grad_norm=CLIP_GRAD, lr=LR, lr_decay_steps=DECAY_STEPS,
        diffusion=SimpleNamespace(
            noise_schedule="vp", time_dim=TIME_DIM, hidden_dims=(args.width,) * ACTOR_LAYERS, solver="ddpm",
            steps=args.steps, clip_sampler=True, x_min=-1.0, x_max=1.0, ema=EMA, ema_every=EMA_EVERY),
        critic=SimpleNamespace(discount=0.99, maxQ=max_q, ensemble_size=max(2, args.critics),
                               hidden_dims=(args.width,) * CRITIC_LAYERS, ema=EMA, ema_every=1))
    agent, c, d = flowrl.dql.DQLAgent(args.obs, args.act, cfg, seed=0), cfg.critic, cfg.diffusion

    def critic(batch):
        agent.rng, agent.critic, agent.critic_target, _ = flowrl.dql.jit_update_critic(
            agent.rng, agent.critic, agent.critic_target, agent.actor_target, batch, c.discount, c.maxQ, d.solver,
            c.ema)

    def actor(batch):
        agent.rng, agent.actor, agent.actor_target, _ = flowrl.dql.jit_update_actor(
            agent.rng, agent.actor, agent.actor_target, agent.critic, batch, cfg.eta, d.solver, d.ema, True)

    return (agent, dict(critic=critic, actor=actor),
            dict(steps=d.steps, critics=c.ensemble_size, samples=10 if max_q else 1))


AGENTS = {"bdpo": bdpo, "dac": dac, "dql": dql}


def operations(jax, flowrl, agent, updates, batch):
    "The four ops: each makes one update, leaves the new networks with the agent and waits until they are there."
    behavior = [jax.random.PRNGKey(1), agent.actor] # for agents without a behaviour network
    def pretrain(batch):
        behavior[0], behavior[1], _ = flowrl.jit_update_ddpm(behavior[0], behavior[1], batch.action, batch.obs)
    def run(update):
        update(batch)
        jax.block_until_ready([behavior, *(getattr(agent, name) for name in agent.model_names)])
    updates = dict(pretrain=pretrain, train=partial(agent.train_step, step=0)) | updates
    return {name: partial(run, update) for name, update in updates.items()}


class Compilations:
    "Counts the programs that JAX compiles."
    def __init__(self, jax):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.note)

    def note(self, event, seconds, **_):
        self.count += event.endswith("backend_compile_duration")


def warm_up(op, compilations, calm: int = 2) -> float:
    "Call the op until `calm` calls in a row compile nothing; the seconds of the calls that did, one run included."
    seconds, quiet = 0.0, 0
    while quiet < calm:
        before, start = compilations.count, time.perf_counter()
        op()
        if compilations.count > before: seconds, quiet = seconds + time.perf_counter() - start, 0
        else: quiet += 1
    return round(seconds, 3)


def measure(op, repeats: int) -> dict:
    "Seconds per call."
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats): op()
    return dict(wall=(time.perf_counter() - wall) / repeats, cpu=(time.process_time() - cpu) / repeats)


def peak_rss() -> int:
    "The most memory this process has held, in bytes (Linux counts in KiB, macOS in bytes)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def answer(line: str, ops: dict, compilations) -> dict:
    "What a request asks for, or why it cannot be had."
    words = line.split()
    if words == ["memory"]: return dict(peak_rss=peak_rss())
    known = ", ".join(f"{a} {o}" for a in ops for o in ops[a])
    try: agent, name, repeats = words[0], words[1], int(words[2])
    except (IndexError, ValueError): return dict(error=f"expected `agent op repeats` or `memory`, not `{line.strip()}`")
    if name not in ops.get(agent, {}): return dict(error=f"no `{agent} {name}` here; there are: {known}")
    if repeats < 1: return dict(error="repeats must be at least 1")
    before = compilations.count
    seconds = measure(ops[agent][name], repeats)
    return dict(agent=agent, op=name, repeats=repeats, **seconds, compiled=compilations.count - before)


def main():
    args = arguments()
    out = os.fdopen(os.dup(1), "w")     # the protocol keeps stdout;
    os.dup2(2, 1)                       # what anything else prints goes to stderr, native code included
    def say(record): print(json.dumps(record), file=out, flush=True)

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.threads:                    # before JAX starts: it makes as many threads as it finds cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    jax, flowrl = load(args.flowrl)
    import flax
    import flowrl as package

    compilations, ops, agents = Compilations(jax), {}, {}
    batch = synthetic_batch(jax, flowrl, args)
    for name in args.agents:
        agent, updates, sizes = AGENTS[name](flowrl, args)
        made = operations(jax, flowrl, agent, updates, batch)
        ops[name] = {op: made[op] for op in args.ops}
        seconds = {}
        for op in args.ops:             # train shares the programs of critic and actor where those came first
            print(f"{name} {op}: compiling", file=sys.stderr, flush=True)
            seconds[op] = warm_up(ops[name][op], compilations)
        agents[name] = dict(ops=args.ops, compile_seconds=seconds, sizes=sizes, differs=DIFFERS[name])

    versions = dict(jax=jax.__version__, flax=flax.__version__, flowrl=package.__version__,
                    python=sys.version.partition(" ")[0])
    say(dict(versions=versions, device=jax.devices()[0].device_kind, cores=cores(),
             sizes={k: getattr(args, k) for k in ("obs", "act", "batch", "steps", "critics", "samples", "width")},
             agents=agents, peak_rss=peak_rss()))
    for line in sys.stdin:
        if line.strip(): say(answer(line, ops, compilations))
    say(dict(peak_rss=peak_rss()))


if __name__ == "__main__":
    main()
