"""art-wandb under ART's suites, with the real library and its runs in files; also a cell of the conformance matrix."""

import pytest

from art_conformance import KeptModel, KeptRow, PluginConformance, TrackerConformance

KEY = "0123456789abcdef" * 2 + "01234567"


class TestWandbPlugin(PluginConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "wandb"


class TestWandb(TrackerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def plugin_name(cls):
        return "wandb"

    @pytest.fixture(scope="class")
    @classmethod
    def tracker_environment(cls):
        return lambda folder: {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_DATA_DIR": str(folder / "data")}

    @pytest.fixture(scope="class")
    @classmethod
    def read_back(cls, run_files):
        def kept(folder, project, name):
            rows, counts = [], {}
            for run in run_files.run_folders(folder):
                begun = [record.run for record in run_files.records(run) if record.WhichOneof("record_type") == "run"]
                if [(run.project, run.display_name) for run in begun] != [(project, name)]:
                    continue
                for row in run_files.rows(run):
                    step = row["training_step"]
                    tables = {key: row[key] for key in row if key.startswith("trajectories/")}
                    own = {"training_step", *tables, *(key for key in row if key.startswith("_"))}
                    if numbers := {key: float(row[key]) for key in row.keys() - own}:
                        rows.append(KeptRow(step=step, metrics=numbers))
                    for key, value in tables.items():
                        if key.endswith("_total"):
                            counts[step, key.removeprefix("trajectories/").removesuffix("_total")] = value
            return KeptModel(rows=rows, trajectories=counts)

        return kept
