"""What is in a folder: as a page, as lines. Imports no torch: most folders are told by their headers."""

from pkt.reporting.environment import environment as environment
from pkt.reporting.folders import inspect_folder as inspect_folder
from pkt.reporting.page import page as page
from pkt.reporting.page import write_report as write_report
from pkt.reporting.plots import FOCUS as FOCUS
from pkt.reporting.plots import INK as INK
from pkt.reporting.plots import LINE as LINE
from pkt.reporting.plots import MUTED as MUTED
from pkt.reporting.plots import PALETTE as PALETTE
from pkt.reporting.plots import PAPER as PAPER
from pkt.reporting.plots import WORSE as WORSE
from pkt.reporting.plots import canvas as canvas
from pkt.reporting.plots import check_packages as check_packages
from pkt.reporting.plots import legend_below as legend_below
from pkt.reporting.plots import new_figure as new_figure
from pkt.reporting.plots import plot_layers as plot_layers
from pkt.reporting.plots import plot_methods as plot_methods
from pkt.reporting.plots import plot_window as plot_window
from pkt.reporting.plots import png_bytes as png_bytes
from pkt.reporting.plots import save_figure as save_figure
from pkt.reporting.plots import svg_text as svg_text
