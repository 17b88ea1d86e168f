"""The first half of the work in one call: streamed, resumable."""

from pkt.transferring.run import transfer as transfer
