"""What the kernel lets this process, and those it starts, take of the machine."""

import resource

_GB = 10**9


def limit_memory(most_gb: float | None) -> None:
    """Let this process, and each that it starts from now on, take at most so much memory for data (10^9 bytes); None: no limit of ours.

    It counts what is written to, files that are mapped for reading do not count (RLIMIT_DATA). Beyond it an allocation fails, which before
    a charge refuses the round (PF912).
    """
    if most_gb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(most_gb * _GB)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
