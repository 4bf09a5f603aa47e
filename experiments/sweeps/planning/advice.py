"""What is to be said of a sweep before its first job starts.

Jobs that will be refused, requests for the same run, rows of a study that an override replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.settings import Settings, check_machine, check_values
from experiments.records.failures import naming_output
from experiments.records.files import RunFiles
from experiments.sweeps.jobs import SweepJob


def check_planned(settings: Settings, run: Path, *, here: bool) -> None:
    """CameraError for a job that its check will refuse; `here`: it runs on this machine."""
    if RunFiles(run).is_done and not settings.force:
        return
    check_values(settings)
    if not here:
        return
    with naming_output(Path(settings.output)):  # the embedded model's texts are written there
        check_machine(settings)
    if Path(settings.model_path).is_dir():  # of a hub's model the weights aren't there yet
        from experiments.runs.compression import check_method

        check_method(settings)


def advice(
    jobs: Sequence[SweepJob],
    grids: Mapping[str, Sequence[Mapping[str, Any]] | None],
    arguments: Sequence[str],
) -> list[str]:
    """The sentences about a planned sweep; none where it is as it was asked for."""
    said = [*_replaced(grids, dict(a.split("=", 1) for a in arguments if "=" in a))]
    said += _same(jobs)
    refused = [job for job in jobs if job.refused]
    if refused:
        said.append(f"{_count(len(refused), len(jobs))} refused, the others run:")
        said += [f"  {_words(job)}: {job.refused}" for job in refused]
    return said


def _words(job: SweepJob) -> str:
    """The job's overrides but the one that lists jobs."""
    return " ".join(text for text in job.overrides if not text.startswith("dry_run="))


def _replaced(
    grids: Mapping[str, Sequence[Mapping[str, Any]] | None], given: Mapping[str, str]
) -> Iterator[str]:
    """What a study compares and the command line sets to something else."""
    for name, products in grids.items():
        for key, value in given.items():
            compared = [text for p in products or () if key in p for text in _texts(p[key])]
            lost = [text for text in dict.fromkeys(compared) if text not in value.split(",")]
            if len(set(compared)) < 2 or not lost:
                continue
            if key == "method" and "dense" in lost:
                yield (
                    f"{key}={value} also replaces the dense row of {name}: there is nothing to "
                    f"compare with. Keep it with {key}=dense,{value}."
                )
            else:
                yield f"{key}={value} replaces {', '.join(lost)} of {name}."


def _same(jobs: Sequence[SweepJob]) -> Iterator[str]:
    """Requests that ask for a run a second time, by the settings that its method ignores."""
    merged = [job for job in jobs if job.same]
    asked = len(jobs) + sum(len(job.same) for job in jobs)
    if not merged:
        return
    ignored: dict[str, list[str]] = {}
    for job in merged:
        unused = sorted({key for other in job.same for key in _ignored(job, other)})
        ignored.setdefault(" or ".join(unused), []).append(job.like[1])
    reasons = [
        f"{' and '.join(dict.fromkeys(methods))} {'use' if len(set(methods)) > 1 else 'uses'} no "
        f"{keys}"
        for keys, methods in ignored.items()
        if keys
    ]
    why = f": {'; '.join(reasons)}" if reasons else ""
    yield f"{_count(asked - len(jobs), asked)} the same as others{why}."


def _ignored(job: SweepJob, other: Sequence[str]) -> set[str]:
    """The settings of which both name a value, and not the same one."""
    one, two = (dict(text.split("=", 1) for text in said) for said in (job.overrides, other))
    return {key for key in one.keys() & two.keys() if one[key] != two[key]}


def _count(some: int, whole: int) -> str:
    return f"{some} of {whole} jobs {'is' if some == 1 else 'are'}"


def _texts(value: Any) -> list[str]:
    return (
        [str(each) for each in value] if isinstance(value, list | tuple) else str(value).split(",")
    )
