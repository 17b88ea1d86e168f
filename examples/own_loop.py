"""Transfer, inject, and a training loop of your own; then a plain LoRA. Copy it and put your models in.

python examples/own_loop.py TEACHER STUDENT SEEDS.jsonl TRAIN.jsonl ADAPTER
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import pkt
from pkt.seeds import collate


def main(teacher: str, student: str, seeds: str, train: str, out: str) -> None:
    ext = pkt.transfer(teacher, student, seeds, rank=16)
    print(ext)
    model = pkt.inject(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), ext)
    rows = pkt.load_seeds(train, student)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    order = torch.utils.data.DataLoader(
        list(rows), batch_size=16, shuffle=True, collate_fn=lambda some: collate(some, rows.pad_id)
    )
    model.train()
    for step, batch in enumerate(order, 1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
        if step == 20:
            break
    pkt.finalize(model, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
