"""The folder of the adapter that a model starts from is the user's: it is read, and nothing in it changes."""

from art_backend_local.adapters.identity import write_identity_adapter
from art_engine_kit.lora_shape import LoraShape


async def test_a_folder_to_start_from_is_only_read(backend, make_policy, base, groups, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_identity_adapter(folder, base, LoraShape(r=4))

    def seen():
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}

    before = seen()
    policy = make_policy(base_model=folder)
    await backend.register(policy)
    assert (await backend.train(policy, groups, learning_rate=0.5)).step == 1
    assert seen() == before
    assert len(before) == 2
