"""Comparisons of trained models that can be believed: studies of cells, and seeds × items statistics."""

from pkt.statistics import Comparison as Comparison
from pkt.statistics import compare as compare
from pkt.statistics import holm as holm
from pkt.studying.comparing import as_study as as_study
from pkt.studying.comparing import as_yaml as as_yaml
from pkt.studying.comparing import comparison as comparison
from pkt.studying.comparing import recommended as recommended
from pkt.studying.converting import convert as convert
from pkt.studying.engines import Cluster as Cluster
from pkt.studying.engines import Engine as Engine
from pkt.studying.estimating import plan_of as plan_of
from pkt.studying.layout import Job as Job
from pkt.studying.layout import Layout as Layout
from pkt.studying.pacing import Pace as Pace
from pkt.studying.pacing import spoken as spoken
from pkt.studying.run import open_study as open_study
from pkt.studying.run import preset_names as preset_names
from pkt.studying.run import run_layout as run_layout
from pkt.studying.run import study as study
from pkt.studying.store import Store as Store
