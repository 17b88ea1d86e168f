"""Sensitivity: exact per-sample scores of every parameter from one backward pass a batch."""

from pkt.scoring.attention import one_order as one_order
from pkt.scoring.batches import Layout as Layout
from pkt.scoring.batches import in_order_of as in_order_of
from pkt.scoring.batches import longest_first as longest_first
from pkt.scoring.batches import real_lengths as real_lengths
from pkt.scoring.findings import Findings as Findings
from pkt.scoring.findings import LearntError as LearntError
from pkt.scoring.head import HeadUse as HeadUse
from pkt.scoring.head import find_fused_head as find_fused_head
from pkt.scoring.losses import default_loss as default_loss
from pkt.scoring.losses import per_sample_loss as per_sample_loss
from pkt.scoring.measure import check_measure as check_measure
from pkt.scoring.measure import check_tile as check_tile
from pkt.scoring.measure import score_seeds as score_seeds
from pkt.scoring.measure import sensitivity as sensitivity
from pkt.scoring.result import FORMAT as FORMAT
from pkt.scoring.result import KEPT as KEPT
from pkt.scoring.result import Sensitivity as Sensitivity
from pkt.scoring.scorer import PROBE_TOKENS as PROBE_TOKENS
from pkt.scoring.scorer import Scorer as Scorer
from pkt.scoring.sinks import FullSink as FullSink
from pkt.scoring.sinks import Sink as Sink
from pkt.scoring.uses import EmbeddingUse as EmbeddingUse
from pkt.scoring.uses import RowsUse as RowsUse
from pkt.scoring.uses import Use as Use
from pkt.scoring.uses import measured as measured
