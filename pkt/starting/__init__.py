"""Starts for a student's LoRA, and how much of one to keep."""

from pkt.starting.scale import ALPHAS as ALPHAS
from pkt.starting.scale import best_scale as best_scale
