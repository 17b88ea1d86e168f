"""What makes a comparison of trained models one that can be believed."""

from pkt.studying.statistics import Comparison as Comparison
from pkt.studying.statistics import compare as compare
from pkt.studying.statistics import holm as holm
