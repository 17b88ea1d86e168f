"""Sensitivity: exact per-sample scores of every parameter from one backward pass a batch."""

from pkt.scoring.scorer import (
    FORMAT as FORMAT,
)
from pkt.scoring.scorer import (
    Scorer as Scorer,
)
from pkt.scoring.scorer import (
    Sensitivity as Sensitivity,
)
from pkt.scoring.scorer import (
    default_loss as default_loss,
)
from pkt.scoring.scorer import (
    per_sample_loss as per_sample_loss,
)
from pkt.scoring.scorer import (
    sensitivity as sensitivity,
)
