"""A ServerApp with Flower's own FedAvg; only clocks are added to it."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that writes down when each round began, had its replies, and was aggregated."""

    out: Path

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Begin a round."""
        self.offered = time.time()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End a round."""
        collected, replies = time.time(), list(replies)
        result = super().aggregate_train(server_round, replies)
        aggregated = time.time()
        metrics = [reply.content.metric_records["metrics"] for reply in replies if reply.has_content()]
        row = {
            "offered": self.offered,
            "began": [each["began"] for each in metrics],
            "ended": [each["ended"] for each in metrics],
            "collected": collected,
            "aggregated": aggregated,
        }
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg over every site, without evaluation."""
    config, sites = context.run_config, int(context.run_config["sites"])
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    strategy.out = Path(str(config["out"]))
    state = load_file(str(config["state"]))
    if config["flat"]:
        state = {"all": torch.cat([tensor.flatten() for tensor in state.values()])}
    strategy.start(grid=grid, initial_arrays=ArrayRecord(state), num_rounds=int(config["rounds"]))
