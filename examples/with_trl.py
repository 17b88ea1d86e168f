"""The same with TRL's SFTTrainer, whose own adapters and merges are not needed: the model comes injected.

pkt transfer TEACHER STUDENT SEEDS.jsonl --out EXTRACTION --modules 'layers|embed_tokens'   # SFTTrainer wants a bare head
python examples/with_trl.py STUDENT EXTRACTION TRAIN.jsonl ADAPTER                         # rows of {"messages": [...]}
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pkt


def main(student: str, extraction: str, train: str, out: str) -> None:
    model = pkt.inject(AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32), extraction)
    arguments = SFTConfig(
        out + "-run",
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        logging_steps=5,
        bf16=False,
        report_to=[],
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=train, split="train"),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    pkt.finalize(trainer.model, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
