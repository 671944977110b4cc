"""A site's resident runner, real in all but the training itself: that sleeps, then draws noise of the plan's size.

Run as `python _site_runner.py HOME SUPERNODE_ADDRESS TUNNEL_PORT`. Gate, trial on synthetic tiles, ledger, sealing, statement, site
database and transport are pathfed's own. Real training would make three sites fight for two cores, in a pattern that the other side does
not have.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pathfed_client import app
from pathfed_client.computing import RoundComputer
from pathfed_client.home import SiteHome
from pathfed_client.training.local_round import RoundOutcome
from pathfed_client.training.private_step import ReleasedFigures, SiteNotes
from pathfed_common.console import log_to_stderr
from pathfed_common.privacy.mechanism import PatientMechanism

TRAIN_S = "PATHFED_BENCH_TRAIN_S"
TIMES = "training-times.jsonl"
_TRAINING = "run"


def _trained(home: Path, base_state: Mapping[str, torch.Tensor], mechanism: PatientMechanism) -> RoundOutcome:
    began = time.time()
    time.sleep(float(os.environ[TRAIN_S]))
    random = torch.Generator().manual_seed(time.time_ns())
    update = {name: torch.randn(tensor.shape, generator=random) * mechanism.gradient_std for name, tensor in base_state.items()}
    figures = ReleasedFigures(loss_sum=0.0, loss_sum_std=mechanism.loss_sum_std, patients=0.0, patients_std=mechanism.patients_std)
    outcome = RoundOutcome(update=update, figures=figures, notes=SiteNotes())
    with (home / TIMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"began": began, "ended": time.time()}) + "\n")
    return outcome


def main(home: Path, address: str, tunnel: int) -> None:
    """Answer the SuperNode at `address` until ended."""

    def run(computer: RoundComputer, *, base_state: Mapping[str, torch.Tensor], mechanism: PatientMechanism, **_: Any) -> RoundOutcome:
        del computer
        return _trained(home, base_state, mechanism)

    setattr(RoundComputer, _TRAINING, run)
    app.run_resident(SiteHome(home), address, tunnel)


if __name__ == "__main__":
    log_to_stderr()
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
