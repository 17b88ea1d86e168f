"""A student out of its teacher's own units: `pkt shrink`."""

from pkt.pruning.run import shrink as shrink
