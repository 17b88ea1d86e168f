"""Which part of which teacher matrix feeds which student matrix: a plain value, checked first."""

from pkt.planning.pairing import (
    Entry as Entry,
)
from pkt.planning.pairing import (
    Feed as Feed,
)
from pkt.planning.pairing import (
    ModuleMap as ModuleMap,
)
from pkt.planning.pairing import (
    Pairing as Pairing,
)
from pkt.planning.pairing import (
    TransferPlan as TransferPlan,
)
from pkt.planning.pairing import (
    Vocabulary as Vocabulary,
)
from pkt.planning.pairing import (
    assemble as assemble,
)
from pkt.planning.pairing import (
    by_expert as by_expert,
)
from pkt.planning.pairing import (
    check_options as check_options,
)
from pkt.planning.pairing import (
    describe as describe,
)
from pkt.planning.pairing import (
    lora_matrix as lora_matrix,
)
from pkt.planning.pairing import (
    plan as plan,
)
from pkt.planning.pairing import (
    read_vocabulary as read_vocabulary,
)
from pkt.planning.pairing import (
    source_names as source_names,
)
