"""Every operation of pkt: one name each, whatever the device. `reference` says what it means, `dispatch` what runs it."""

from pkt.ops import choosing
from pkt.ops.checked import (
    abs_accumulate_,
    abs_accumulate_many_,
    best_blocks,
    best_window,
    embedding_sensitivity_,
    linear_sensitivity_,
    linear_sensitivity_tiles_,
    rsvd,
    rsvd_batch,
)
from pkt.ops.dispatch import (
    implementation,
    names,
    native_halves,
    no_triton,
    out_of_memory,
    working_dtype,
)
from pkt.ops.reference import (
    GRADIENT_ELEMENTS,
    MEASURES,
    SEARCH_BYTES,
    WIDENED,
    Measure,
    add_rows_,
    double_sum,
    embedding_rows,
    fetched,
    tile_sums,
    widened_elements,
    window_bits,
)
from pkt.ops.rsvd_reference import block_width

__all__ = [
    "GRADIENT_ELEMENTS",
    "MEASURES",
    "SEARCH_BYTES",
    "WIDENED",
    "Measure",
    "abs_accumulate_",
    "abs_accumulate_many_",
    "add_rows_",
    "best_blocks",
    "best_window",
    "block_width",
    "choosing",
    "double_sum",
    "embedding_rows",
    "embedding_sensitivity_",
    "fetched",
    "implementation",
    "linear_sensitivity_",
    "linear_sensitivity_tiles_",
    "names",
    "native_halves",
    "no_triton",
    "out_of_memory",
    "rsvd",
    "rsvd_batch",
    "tile_sums",
    "widened_elements",
    "window_bits",
    "working_dtype",
]
