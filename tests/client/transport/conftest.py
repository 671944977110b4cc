import pytest
from flwr.supercore.task_identity import TaskIdentity


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages take their run and sender from the task of their process."""
    for name, value in {"_task_id": 3, "_run_id": 1, "_node_id": 2}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
