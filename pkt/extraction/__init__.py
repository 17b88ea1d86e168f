"""Regions of the teacher as LoRA factors, and the folder that holds them."""

from pkt.extraction.factorization import SETTLED as SETTLED
from pkt.extraction.pairs import assemble as assemble
from pkt.extraction.pairs import extract as extract
from pkt.extraction.pairs import factorize_targets as factorize_targets
from pkt.extraction.released import import_released as import_released
from pkt.extraction.result import Extraction as Extraction
from pkt.extraction.result import describe_factorization as describe_factorization
from pkt.extraction.start import Start as Start
from pkt.extraction.start import open_start as open_start
