"""Which of a teacher's units a student's are: matched by weights alone, held against chance, and cut to the student's shape."""

from pkt.matching.cutting import Cutter as Cutter
from pkt.matching.hinting import looks_kin as looks_kin
from pkt.matching.lineage import BESIDE as BESIDE
from pkt.matching.lineage import Lineage as Lineage
from pkt.matching.lineage import lineage as lineage
from pkt.matching.matrices import Matrices as Matrices
from pkt.matching.shrinking import Shape as Shape
from pkt.matching.shrinking import UnitScores as UnitScores
from pkt.matching.shrinking import choose_units as choose_units
from pkt.matching.shrinking import cut_factors as cut_factors
from pkt.matching.shrinking import shape_of as shape_of
from pkt.matching.shrinking import shrink_to as shrink_to
from pkt.matching.shrinking import shrunk_model as shrunk_model
