"""How what wandb keeps of a run on this machine is read, without asking the library itself."""

import json
import struct

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(run_folder):
    """What a .wandb file holds: blocks of a LevelDB log, whose records are messages."""
    files = list(run_folder.glob("run-*.wandb"))
    data, at, whole = files[0].read_bytes() if files else b"", HEADER, b""
    assert data[:4] in (b":W&B", b"")
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if kind == 0:
            at += room
            continue
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def rows(run_folder):
    """The rows of a run, in the order in which they were logged."""
    for record in records(run_folder):
        if record.WhichOneof("record_type") == "history":
            yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def lora_artifacts(run_folder):
    """The adapters among a run's artifacts."""
    kept = [record.artifact for record in records(run_folder) if record.WhichOneof("record_type") == "artifact"]
    return [artifact for artifact in kept if artifact.type == "lora"]


def run_folders(folder, pattern="offline-run-*"):
    """The runs that wandb keeps below a folder, oldest first."""
    return sorted((folder / "wandb").glob(pattern))


def steps_of(folder, pattern="offline-run-*"):
    """The steps of all rows of metrics, of all runs there."""
    return [row["training_step"] for run in run_folders(folder, pattern) for row in rows(run) if "loss/train" in row]
