"""What is behind an exception: torch and safetensors wrap the disk's errors in types of their own."""

from __future__ import annotations


def reason_of(problem: BaseException) -> str:
    """The system's own words where an error of the disk is behind the problem, else the problem's first line."""
    rank, problem = _first_failure(problem)
    disk = of_the_disk(problem)
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    said = (disk.strerror if disk else None) or (lines[0] if lines else type(problem).__name__)
    return f"{said} (process {rank})" if rank else said


def _first_failure(problem: BaseException) -> tuple[int, BaseException]:
    """Of torch.distributed.checkpoint's exception, which holds rank -> (exception, stack): the process, where one alone
    failed, and its exception. 0 and the problem itself for any other."""
    failures = getattr(problem, "failures", None)
    if not isinstance(failures, dict) or not failures:
        return 0, problem
    rank, (inner, _) = min(failures.items(), key=lambda item: item[0])
    return (rank if len(failures) == 1 else 0), _first_failure(inner)[1]


def of_the_disk(problem: BaseException) -> OSError | None:
    seen: BaseException | None = _first_failure(problem)[1]
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
