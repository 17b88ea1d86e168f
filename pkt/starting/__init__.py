"""Starts for a student's LoRA, and how much of one to keep."""

from pkt.starting.run import rows_for as rows_for
from pkt.starting.run import start as start
from pkt.starting.scale import ALPHAS as ALPHAS
from pkt.starting.scale import BEYOND as BEYOND
from pkt.starting.scale import best_scale as best_scale
from pkt.starting.scale import tried as tried
