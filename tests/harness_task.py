"""A task of the evaluation harness in a YAML file and rows beside it; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_task(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`pkt_local` in a folder: of each row's "choices" after its "question", the first is right."""
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        f"""task: pkt_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "test.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    return folder
