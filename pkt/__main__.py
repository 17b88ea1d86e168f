"""`python -m pkt`."""

from pkt.cli import main

if __name__ == "__main__":
    main()
