import importlib

import pytest

EXPORTED = {
    "encoder": {
        "PRESETS", "CheckpointError", "DeadlineExceededError", "DeviceFailedError", "Encoder", "EncoderConfig",
        "EncoderConfigError", "EncoderError", "Encoding", "Engine", "EngineClosedError", "EngineStats", "Priority",
        "PromptError", "SelfCheckError",
    },
    "jobs": {"JobOptions", "JobRecord", "JobStatus", "JobView", "JobsError", "Manifest"},
    "layerstack": {
        "AsyncClient", "Client", "Embeddings", "LayerstackError", "PromptEmbeddings", "__version__", "read",
    },
}  # fmt: skip


@pytest.mark.parametrize("room", EXPORTED)
def test_the_public_names_of_a_room_are_a_decision(room):
    assert set(importlib.import_module(room).__all__) == EXPORTED[room]
