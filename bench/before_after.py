"""Time updates of this checkout against those of another, in turn, round by round, and write one JSON file:

    git worktree add ../before COMMIT
    python bench/before_after.py --before ../before --commit COMMIT

With `--jax PYTHON --flowrl CLONE` (as `make bench` has them: .venv-jax/bin/python) the official JAX code takes part
at all sizes but the planes'. The plain agent is the same in both and is what all times are divided by. `floor` is the
time of the matrix products alone (`products` of chapter 12), `peak` the fastest product and the fastest copy of one
core.
"""
import argparse
import json
from contextlib import ExitStack
from pathlib import Path

from bdpo_lit.evidence.benchmark import interleave, jax_worker, machine, ratios, torch_worker
from bdpo_lit.reference.style import provenance

HERE = Path(__file__).resolve().parents[1]
SIZES = dict(locomotion=dict(size="locomotion"), planes=dict(size="toy2d"),
             small=dict(size="locomotion", width=64, critics=4, samples=2, batch=128))
WAYS = dict(less=dict(kind="less"), kept=dict(kind="less", memory=True), fast=dict(kind="fast", memory=True))
NEW = dict(locomotion="half", small="whole")    # not in every checkout, and worth it at one size


def measure(name, before, rounds, jax):
    "All ways of one size, of both checkouts, beside the plain one and the JAX code (its command; or None)."
    many = 20 if name == "small" else 1
    ops = dict(pretrain=max(10, many), critic=many, actor=many)
    at = lambda path: dict(PYTHONPATH=str(path), PYTHONSAFEPATH="1")
    with ExitStack() as stack:
        start = lambda path, **options: stack.enter_context(torch_worker(at(path), **SIZES[name], **options))
        everyone = dict(plain=start(HERE, kind="plain"))
        for way in WAYS:
            everyone[f"before {way}"] = start(before, **WAYS[way])
            everyone[way] = start(HERE, **WAYS[way])
        if new := NEW.get(name): everyone[new] = start(HERE, kind=new, memory=True)
        if jax and name != "planes":
            sizes = [x for k, v in SIZES[name].items() if k != "size" for x in (f"--{k}", str(v))]
            everyone["jax bdpo"] = stack.enter_context(jax_worker(jax, "bdpo", 1, "--preset", "locomotion", *sizes))
        answers = interleave(everyone, ops, rounds)
        floors = interleave(dict(kept=everyone["kept"]), {f"{op}_products": many for op in ops}, rounds)["kept"]
        for op in ops: answers.setdefault("floor", {})[op] = floors[f"{op}_products"]
        work = {way: everyone[way].ask("work") for way in everyone if way in ("plain", "before kept", "kept")}
        memory = {way: w.ask("memory")["peak_rss"] for way, w in everyone.items()}
        return dict(ratio=ratios(answers, "plain"), work=work, memory=memory, rounds=rounds, cores=1,
                    peak=everyone["kept"].ask("peak"))


p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--before", required=True, help="another checkout")
p.add_argument("--commit", required=True, help="its commit, for the record")
p.add_argument("--out", default="runs/before_after.json", help="(chapter 12: bdpo_lit/results/speed_steps.json)")
p.add_argument("--rounds", type=int, default=7)
p.add_argument("--sizes", nargs="*", default=SIZES, choices=SIZES)
p.add_argument("--jax", help="Python of the JAX code's environment")
p.add_argument("--flowrl", help="clone of flow-rl")
a = p.parse_args()
out = Path(a.out)
jax = [a.jax, str(HERE / "bench" / "jax_peer.py"), "--flowrl", a.flowrl] if a.jax else None
found = json.loads(out.read_text()) if out.exists() else {}
for name in a.sizes:
    found[name] = measure(name, a.before, a.rounds, jax)
    found.setdefault("provenance", {})[name] = provenance() | machine("cpu") | dict(threads=1, before=a.commit)
    out.write_text(json.dumps(found, indent=1))
    for way, ops in found[name]["ratio"].items():
        print(f"{name:10s} {way:12s}", *(f"{op} {x['ratio']:.3f} ({x['low']:.3f}-{x['high']:.3f}) "
                                         f"{1e3 * x['seconds']:.1f} ms;" for op, x in ops.items()), flush=True)
