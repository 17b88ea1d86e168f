"""Which part of which teacher matrix feeds which student matrix: a plain value, checked first."""

from pkt.planning.choosing import Chooser as Chooser
from pkt.planning.choosing import expert_sums as expert_sums
from pkt.planning.choosing import plan as plan
from pkt.planning.options import ModuleMap as ModuleMap
from pkt.planning.options import Vocabulary as Vocabulary
from pkt.planning.options import adapted as adapted
from pkt.planning.options import read_map as read_map
from pkt.planning.options import read_vocabulary as read_vocabulary
from pkt.planning.pairing import Feed as Feed
from pkt.planning.pairing import Pairing as Pairing
from pkt.planning.regions import BLOCK as BLOCK
from pkt.planning.regions import STRATEGIES as STRATEGIES
from pkt.planning.regions import Asking as Asking
from pkt.planning.regions import Region as Region
from pkt.planning.regions import together as together
from pkt.planning.transfer_plan import Entry as Entry
from pkt.planning.transfer_plan import TransferPlan as TransferPlan
from pkt.planning.transfer_plan import by_expert as by_expert
from pkt.planning.transfer_plan import describe as describe
from pkt.planning.transfer_plan import source_names as source_names
