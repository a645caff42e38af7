"""The benchmarks without the command line: `python tests/benchmarks NAME [ARGS]`, one JSON line.

`python tests/benchmarks --help` lists the names; each is `sarjax bench NAME`, whose --help lists the arguments.
"""

import sys

from sarjax.cli.bench import bench_verb

if __name__ == "__main__":
    asked = sys.argv[1:]
    bench_verb(asked if not asked or "--help" in asked or "-h" in asked else [*asked, "--json"])
