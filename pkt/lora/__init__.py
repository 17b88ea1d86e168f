"""LoRA in and around PEFT: injected, recognised, finalized. The only part of pkt that imports it."""

from pkt.lora.factors import scale_a as scale_a
from pkt.lora.finalization import finalize as finalize
from pkt.lora.finalization import write_merged as write_merged
from pkt.lora.injection import check_settings as check_settings
from pkt.lora.injection import checked_dropout as checked_dropout
from pkt.lora.injection import initialize_lora_weights as initialize_lora_weights
from pkt.lora.injection import inject as inject
from pkt.lora.pissa import initialize_pissa_weights as initialize_pissa_weights
from pkt.lora.plain import DRAWN as DRAWN
from pkt.lora.plain import ROWS as ROWS
from pkt.lora.plain import check_init as check_init
from pkt.lora.plain import draw_pairs as draw_pairs
from pkt.lora.plain import mode_of as mode_of
from pkt.lora.recognition import read_source as read_source
from pkt.lora.record import Mode as Mode
from pkt.lora.wrapping import ADAPTER as ADAPTER
from pkt.lora.wrapping import load_with_adapter as load_with_adapter
from pkt.lora.wrapping import wrap as wrap
