"""What a teacher learnt, cut to a student that descends from its base, and kept."""

from pkt.transplanting.controls import Control as Control
from pkt.transplanting.run import control_of as control_of
from pkt.transplanting.run import transplant as transplant
