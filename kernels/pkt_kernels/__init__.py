"""Triton kernels of pkt, one a file: a jitted body, then a launcher of the same name. See ``kernels/README.md``."""
