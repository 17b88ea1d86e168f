"""The same with transformers' Trainer, from an extraction on the disk.

pkt transfer TEACHER STUDENT SEEDS.jsonl --out EXTRACTION
python examples/with_trainer.py STUDENT EXTRACTION TRAIN.jsonl ADAPTER
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import pkt
from pkt.seeds import collate


def main(student: str, extraction: str, train: str, out: str) -> None:
    model = pkt.inject(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), extraction, dropout=0.05)
    rows = pkt.load_seeds(train, student)
    arguments = TrainingArguments(
        out + "-run", max_steps=20, per_device_train_batch_size=16, learning_rate=3e-3, logging_steps=5, report_to=[]
    )
    Trainer(model, arguments, train_dataset=list(rows), data_collator=lambda some: collate(some, rows.pad_id)).train()
    pkt.finalize(model, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
