"""Make the protobuf messages from their .proto files: `control_pb2.py` and its types, which git ignores and nobody edits.

Run by the build (hatch_build.py) and by `make protocol`. Services need no generated code: each side builds its stubs or handlers from the
descriptors, so that no file of `pathfed_common` imports grpc.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
FOLDER = ROOT / "pathfed_common" / "protocol"


def build() -> None:
    """Make them anew.

    Raises:
        subprocess.CalledProcessError: a .proto file does not compile.
    """
    protos = [str(path.relative_to(ROOT)) for path in sorted(FOLDER.glob("*.proto"))]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", "--python_out=.", "--pyi_out=.", *protos], cwd=ROOT, check=True
    )


if __name__ == "__main__":
    build()
