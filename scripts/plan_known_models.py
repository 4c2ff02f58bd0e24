"""Plans six published models for slices that they are served on, from the configs in the tests, and says what it took.

    python scripts/plan_known_models.py [--only llama-3.1-8b] [--json FILE]

Each plan runs in a process of its own, so that the seconds and the peak of memory are its alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tests.plan.known import CONFIGS, PLANS  # noqa: E402


def main() -> int:
    """Prints each table, and the seconds and gigabytes that it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="those whose file's name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all plans there")
    args = parser.parse_args()
    plans, code = [], 0
    for name, topology in PLANS:
        if args.only is not None and args.only not in name:
            continue
        command = [sys.executable, "-m", "maxlike", "plan", "--model", str(CONFIGS[name]), "--topology", topology]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode not in (0, 1):
            return done.returncode
        found = json.loads(done.stdout)
        took = {"seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                "peak_gb": round(after.ru_maxrss / 1e6, 2)}  # of the largest so far
        plans.append({**found, "took": took})
        memory, cache = found["memory"], found["cache"]
        print(f"{name} on {topology}: {'fits' if found['fits'] else 'does not fit: ' + found['problem']}")
        print("  " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items()))
        for step in found["steps"]:
            print(f"  {step['name']}: {1000 * step['floor_s']:.2f} ms at least, {step['binds']} binds")
        print(f"  {cache['tokens']:,} tokens of cache; took {took['seconds']} s, {took['cpu_seconds']} s of CPU; the "
              f"largest so far {took['peak_gb']} GB", flush=True)
        code = max(code, done.returncode)
    if args.json is not None:
        args.json.write_text(json.dumps(plans, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
