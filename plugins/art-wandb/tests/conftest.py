"""How what wandb keeps of a run on this machine is read, without asking the library itself."""

import json
import struct

import pytest
from wandb.proto import wandb_internal_pb2


class RunFiles:
    """Reads the files of runs."""

    BLOCK, HEADER = 32768, 7

    @classmethod
    def records(cls, run_folder):
        """What a .wandb file holds: blocks of a LevelDB log, whose records are messages."""
        files = list(run_folder.glob("run-*.wandb"))
        data, at, whole = files[0].read_bytes() if files else b"", cls.HEADER, b""
        assert data[:4] in (b":W&B", b"")
        while at + cls.HEADER <= len(data):
            if (room := cls.BLOCK - at % cls.BLOCK) < cls.HEADER:
                at += room
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + cls.HEADER])
            if kind == 0:
                at += room
                continue
            whole += data[at + cls.HEADER : at + cls.HEADER + length]
            at += cls.HEADER + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(whole)
                yield record
                whole = b""

    @classmethod
    def rows(cls, run_folder):
        """The rows of a run, in the order in which they were logged."""
        for record in cls.records(run_folder):
            if record.WhichOneof("record_type") == "history":
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}

    @classmethod
    def lora_artifacts(cls, run_folder):
        """The adapters among a run's artifacts."""
        kept = [record.artifact for record in cls.records(run_folder) if record.WhichOneof("record_type") == "artifact"]
        return [artifact for artifact in kept if artifact.type == "lora"]

    @classmethod
    def run_folders(cls, folder, pattern="offline-run-*"):
        """The runs that wandb keeps below a folder, oldest first."""
        return sorted((folder / "wandb").glob(pattern))

    @classmethod
    def steps_of(cls, folder, pattern="offline-run-*"):
        """The steps of all rows of metrics, of all runs there."""
        return [
            row["training_step"]
            for run in cls.run_folders(folder, pattern)
            for row in cls.rows(run)
            if "loss/train" in row
        ]


@pytest.fixture(scope="session")
def run_files():
    """How the files of runs are read."""
    return RunFiles
