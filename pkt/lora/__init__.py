"""LoRA in and around PEFT: injected, recognised, finalized. The only part of pkt that imports it."""
