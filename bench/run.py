"""`make bench`: time one update in all its ways and, given a clone of flow-rl, beside its authors' JAX code.

Ten minutes without the JAX code; --full, all that chapter 23 shows, takes an hour.
"""
import argparse
from pathlib import Path

from bdpo_lit.evidence.benchmark import PARTS, QUICK, bench, table

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--out", default="runs/bench.json", help="JSON file to write; parts it already holds are replaced")
p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
p.add_argument("--full", action="store_true", help="all parts, seven rounds")
p.add_argument("--rounds", type=int, help="rounds that count; five, or seven with --full")
p.add_argument("--parts", nargs="*", choices=PARTS, help=f"in place of {', '.join(QUICK)}")
p.add_argument("--jax", help="Python of the environment of requirements-jax.txt")
p.add_argument("--flowrl", help="clone of github.com/typoverflow/flow-rl")
p.add_argument("--agents", nargs="*", default=("bdpo", "dac", "dql"), help="of the JAX code")
a = p.parse_args()
peer = [a.jax, str(Path(__file__).with_name("jax_peer.py")), "--flowrl", a.flowrl] if a.jax and a.flowrl else None
if not peer: print("without the JAX code: give --jax and --flowrl (see bench/jax_peer.py)")
Path(a.out).parent.mkdir(parents=True, exist_ok=True)
rounds, parts = a.rounds or (7 if a.full else 5), a.parts or (PARTS if a.full else QUICK)
print(table(bench(a.out, a.device, peer, a.agents, rounds, parts)))
