"""`pkt demo`: the whole path on a tiny pair that ships with the package."""

from pkt.demo.runner import run_demo as run_demo
