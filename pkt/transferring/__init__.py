"""The first half of the work in one call: streamed, resumable."""

from pkt.transferring.checkpoints import RunFolder as RunFolder
from pkt.transferring.job import Recipe as Recipe
from pkt.transferring.reader import Listeners as Listeners
from pkt.transferring.run import transfer as transfer
from pkt.transferring.run import transfer_recipes as transfer_recipes
from pkt.transferring.scores import read_scores as read_scores
from pkt.transferring.scores import score_checkpoint as score_checkpoint
