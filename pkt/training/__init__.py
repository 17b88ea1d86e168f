"""Train the student from its start, and measure it."""

from pkt.training.answers import Stops as Stops
from pkt.training.answers import expected_answers as expected_answers
from pkt.training.answers import final_answer as final_answer
from pkt.training.evaluation import Evaluation as Evaluation
from pkt.training.evaluation import answers_of as answers_of
from pkt.training.evaluation import evaluate as evaluate
from pkt.training.evaluation import generate as generate
from pkt.training.evaluation import row_losses as row_losses
from pkt.training.evaluation import row_matches as row_matches
from pkt.training.export import write_injected as write_injected
from pkt.training.run import train as train
from pkt.training.targets import Distillation as Distillation
from pkt.training.targets import distillation as distillation
from pkt.training.trainer import fit as fit
from pkt.training.trainer import silently as silently
