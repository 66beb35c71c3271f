"""Reads what an offline W&B run wrote: its own format of records in 32 KiB blocks."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class OfflineRun(NamedTuple):
    """What a test wants to know of a run."""

    id: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    """One entry per logged row; nested keys are joined by dots."""


def records(path: Path) -> Iterator[Record]:
    """Yield the file's records; one that a crash cut off at the end is left out."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no W&B file"
    position, parts = 7, []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # no header fits into the rest of a block
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record
        else:
            assert kind in (FIRST, MIDDLE)


def read_offline_run(path: Path) -> OfflineRun:
    """Collect the run's id, configuration and history."""
    run_id, config, history = "", {}, []
    for record in records(path):
        if record.HasField("run"):
            run_id = record.run.run_id
            updates = list(record.run.config.update)
        else:
            updates = list(record.config.update) if record.HasField("config") else []
        for update in updates:
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return OfflineRun(run_id, config, history)
