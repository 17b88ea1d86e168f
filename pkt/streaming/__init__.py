"""A teacher larger than the memory, scored one decoder layer at a time."""

from pkt.streaming.engine import (
    Boundaries as Boundaries,
)
from pkt.streaming.engine import (
    Engine as Engine,
)
from pkt.streaming.engine import (
    Key as Key,
)
from pkt.streaming.engine import (
    Progress as Progress,
)
from pkt.streaming.engine import (
    Tick as Tick,
)
from pkt.streaming.engine import (
    samples_of as samples_of,
)
