"""What is in a folder: as a page, as lines."""

from pkt.reporting.page import (
    environment as environment,
)
from pkt.reporting.page import (
    inspect_folder as inspect_folder,
)
from pkt.reporting.page import (
    new_figure as new_figure,
)
from pkt.reporting.page import (
    page as page,
)
from pkt.reporting.page import (
    plot_layers as plot_layers,
)
from pkt.reporting.page import (
    plot_methods as plot_methods,
)
from pkt.reporting.page import (
    plot_window as plot_window,
)
from pkt.reporting.page import (
    png_bytes as png_bytes,
)
from pkt.reporting.page import (
    write_report as write_report,
)
