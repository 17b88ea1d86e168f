"""A teacher larger than the memory, scored one decoder layer at a time."""

from pkt.streaming.activations import Boundaries as Boundaries
from pkt.streaming.available import free_memory as free_memory
from pkt.streaming.engine import Engine as Engine
from pkt.streaming.engine import Progress as Progress
from pkt.streaming.engine import Tick as Tick
from pkt.streaming.forward import Forward as Forward
from pkt.streaming.forward import Head as Head
from pkt.streaming.loader import NotLayeredError as NotLayeredError
from pkt.streaming.loader import Teacher as Teacher
from pkt.streaming.loader import open_teacher as open_teacher
from pkt.streaming.memory import MemoryPlan as MemoryPlan
from pkt.streaming.memory import Sizes as Sizes
from pkt.streaming.memory import measured_seconds as measured_seconds
from pkt.streaming.memory import plan_memory as plan_memory
from pkt.streaming.memory import sizes_of as sizes_of
from pkt.streaming.microbatches import Chunk as Chunk
from pkt.streaming.microbatches import samples_of as samples_of
from pkt.streaming.parts import Key as Key
from pkt.streaming.passes import draw_rows as draw_rows
from pkt.streaming.passes import head_rows as head_rows
from pkt.streaming.passes import micro_batches as micro_batches
from pkt.streaming.passes import plan_forward as plan_forward
from pkt.streaming.sharing import SharedReading as SharedReading
from pkt.streaming.units import parse_size as parse_size
from pkt.streaming.units import spoken_size as spoken_size
