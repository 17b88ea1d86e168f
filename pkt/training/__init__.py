"""Train the student from its start, and measure it."""

from pkt.training.run import (
    fit as fit,
)
from pkt.training.run import (
    train as train,
)
from pkt.training.run import (
    write_injected as write_injected,
)
