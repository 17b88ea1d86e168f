"""The trials' process with its lines written beforehand, quick because it imports nothing: LOG DEVICE ... WEIGHTED NAME..."""

import json
import os
import sys
import time

log, names = sys.argv[1], sys.argv[7:]
with open(log, "a") as file:
    print(*names, file=file)
# Milliseconds beside 1.0 of today's kernel.
MS = {"slow": 1.5, "same": 0.99, "faster": 0.7, "fastest": 0.5}
for name in names:
    print("a line of somebody else's", json.dumps({"begins": name}), sep="\n", flush=True)
    if name == "hangs":
        time.sleep(1000)
    if name == "dies":
        print("a kernel faulted", file=sys.stderr, flush=True)
        os._exit(11)
    said = (
        {"ms": {"large, long": MS[name]}, "standard_ms": {"large, long": 1.0}}
        if name in MS
        else {"refused": "it differs"}
    )
    print(json.dumps({"name": name, **({"later": "out of memory"} if name == "no memory" else said)}), flush=True)
