"""`python -m pkt`."""

from pkt.cli import main

main()
