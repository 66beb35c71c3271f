"""Texts that a word of their class is in, as rows of a file and as documents of a batch."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lightllm.batch import Document

FILLERS = "abcdefghij"


def labelled_rows(classes: int = 3, of_each: int = 20, seed: int = 0) -> list[dict[str, str]]:
    """Rows with a text, a label and a domain; text and label name the class."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(classes * of_each):
        number = index % classes
        chosen = torch.randint(len(FILLERS), (4,), generator=generator).tolist()
        words = [FILLERS[one] for one in chosen]
        words[chosen[0] % 4] = f"w{number}"
        rows.append(
            {"text": " ".join([*words, f"w{number}"]), "label": f"class {number}", "domain": "xy"[index // 3 % 2]}
        )
    return rows


def save_labelled(file: Path, rows: list[dict[str, str]]) -> str:
    """Write rows, one a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def labelled_documents(count: int = 12, classes: int = 3, seed: int = 0, vocabulary: int = 97) -> list[Document]:
    """Documents of random tokens that begin with one of their class, whose label is the class."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(2, 8, (), generator=generator))
        ids = [5 + index % classes, *torch.randint(20, vocabulary, (length,), generator=generator).tolist()]
        made.append(Document([*ids, index % classes], [*[False] * len(ids), True], index))
    return made
