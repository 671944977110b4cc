"""A ClientApp that sleeps for as long as pathfed's sites do, and sends as many bytes. Flower runs it in a new process for each message."""

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Load the state, "train", send an update of the same shapes."""
    state = message.content.array_records["arrays"].to_torch_state_dict()
    began = time.time()
    time.sleep(float(context.run_config["train-s"]))
    # New numbers at every site: Flower sends equal bytes once.
    random = torch.Generator().manual_seed(time.time_ns())
    update = {name: torch.randn(tensor.shape, generator=random) for name, tensor in state.items()}
    ended = time.time()
    metrics = MetricRecord({"num-examples": 1, "began": began, "ended": ended})
    return Message(RecordDict({"arrays": ArrayRecord(update), "metrics": metrics}), reply_to=message)
