"""What `pkt env` says: versions, devices, and the implementation of each op."""

from __future__ import annotations

from typing import Any

from pkt.manifest import versions


def environment() -> dict[str, Any]:
    """Versions, devices, and the implementation of each op on each device here."""
    import importlib.util

    import torch

    from pkt import ops

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
    return {"versions": found, "ops": table}
