"""What a teacher learnt, cut to a student that descends from its base, and kept."""

from pkt.transplanting.run import transplant as transplant
