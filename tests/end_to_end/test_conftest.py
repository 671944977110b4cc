"""What these tests look with must be able to see."""

import subprocess
import sys


def test_a_process_that_names_a_folder_is_seen_until_it_ends(tmp_path, processes_of) -> None:
    command = [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()", str(tmp_path / "home")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [found.pid for found in processes_of(tmp_path)] == [process.pid]
        process.kill()
        process.wait()
    assert processes_of(tmp_path) == []
