"""What `pkt env` says: versions, devices, and the implementation of each op."""

from __future__ import annotations

from typing import Any

from pkt.manifest import versions


def environment(*, tune: bool = False) -> dict[str, Any]:
    """Versions, devices, the implementation of each op on each device here, and what is known of the kernels to choose from.

    tune: try those kernels first, whatever is known of them.
    """
    import importlib.util

    import torch

    from pkt import ops

    ops.choosing.forced()  # says so where it names no kernel
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = {d: torch.cuda.get_device_name(d) for d in devices if d != "cpu"}
    found = {**versions(), "threads": str(torch.get_num_threads()), "GPU": ", ".join(names.values()) or "none"}
    for module in ("triton", "bitsandbytes"):
        found[module] = "installed" if importlib.util.find_spec(module) else "not installed"
    table = []
    for op in ops.names():
        for device in devices:
            used, why = ops.implementation(op, device)
            table.append({"op": f"pkt::{op}", "device": device, "implementation": used, "why": why})
    kernels = []
    for name in names:
        if ops.no_triton(torch.device(name).index) is None:
            if tune:
                ops.choosing.tune(torch.device(name))
            kernels += [row._asdict() for row in ops.choosing.table(torch.device(name))]
    return {"versions": found, "ops": table, "kernels": kernels}
