"""`make bench`: time one update in all its ways and, given a clone of flow-rl, beside its authors' JAX code."""
import argparse
from pathlib import Path

from bdpo_lit.evidence.benchmark import PARTS, bench, table

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--out", default="runs/bench.json", help="JSON file to write; parts it already holds are replaced")
p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
p.add_argument("--rounds", type=int, default=7, help="rounds that count")
p.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
p.add_argument("--jax", help="Python of the environment of requirements-jax.txt")
p.add_argument("--flowrl", help="clone of github.com/typoverflow/flow-rl")
p.add_argument("--agents", nargs="*", default=("bdpo", "dac", "dql"), help="of the JAX code")
a = p.parse_args()
peer = [a.jax, str(Path(__file__).with_name("jax_peer.py")), "--flowrl", a.flowrl] if a.jax and a.flowrl else None
if not peer: print("without the JAX code: give --jax and --flowrl (see bench/jax_peer.py)")
Path(a.out).parent.mkdir(parents=True, exist_ok=True)
print(table(bench(a.out, a.device, peer, a.agents, a.rounds, a.parts)))
