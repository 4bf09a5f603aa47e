"""Trackers log what a run writes to its folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from camera.evaluation.tasks.names import headline
from camera.runtime.errors import CameraError
from experiments.records.failures import one_line

if TYPE_CHECKING:  # the configuration's types are made from this module, at every start
    import pandas as pd

    from experiments.records.energy_summary import Histogram

log = logging.getLogger("camera")
NAME_LENGTH, TAG_LENGTH = 128, 64  # W&B's limits
NOT_IN_PROJECT = "/\\#?%:"


class NullTracker:
    """Keeps nothing; also what every tracker can be told."""

    def start(
        self,
        folder: Path,
        *,
        name: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
        config: dict[str, Any],
    ) -> None:
        """Open a run with its files below `folder`; `group` is the sweep."""

    def log(self, values: dict[str, float]) -> None:
        """Keep numbers, by slash-separated names."""

    def log_histograms(self, histograms: dict[int, Histogram]) -> None:
        """Keep the energies of each layer."""

    def log_figures(self, files: Sequence[Path]) -> None:
        """Keep images, by the names of their files."""

    def finish(self, metrics: dict[str, Any]) -> None:
        """Close the run as a success, its report as the summary and its scores as tables."""

    def fail(self, reason: str) -> None:
        """Close the run as failed; the next run starts afresh."""


class CarefulTracker(NullTracker):
    """Another tracker, whose failures are one warning: losing it loses nothing of the run.

    Only a CameraError of `start` is raised: what the user can mend before anything is done.
    """

    def __init__(self, tracker: NullTracker) -> None:
        self._tracker = tracker

    def start(self, folder: Path, **about: Any) -> None:
        self._tell("start", folder, **about)

    def log(self, values: dict[str, float]) -> None:
        self._tell("log", values)

    def log_histograms(self, histograms: dict[int, Histogram]) -> None:
        self._tell("log_histograms", histograms)

    def log_figures(self, files: Sequence[Path]) -> None:
        self._tell("log_figures", files)

    def finish(self, metrics: dict[str, Any]) -> None:
        self._tell("finish", metrics)

    def fail(self, reason: str) -> None:
        self._tell("fail", reason)

    def _tell(self, what: str, *args: Any, **about: Any) -> None:
        try:
            getattr(self._tracker, what)(*args, **about)
        except Exception as error:
            if what == "start" and isinstance(error, CameraError):
                raise
            name = type(self._tracker).__name__
            log.warning("%s is lost (%s): the run goes on without it.", name, one_line(error))
            self._tracker = NullTracker()


class WandbTracker(NullTracker):
    """Weights & Biases; `wandb sync` uploads what was kept offline."""

    def __init__(
        self,
        mode: Literal["offline", "online"] = "offline",
        project: str = "camera",
        entity: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if not 0 < len(project) <= NAME_LENGTH or set(project) & set(NOT_IN_PROJECT):
            raise CameraError(
                f"tracker.project={project} must be a name of at most {NAME_LENGTH} characters "
                f"without any of {NOT_IN_PROJECT}; the team is tracker.entity."
            )
        if entity is not None and (not entity or "/" in entity):
            raise CameraError(
                f"tracker.entity={entity} must be the name of a user or team, without a slash."
            )
        if "" in tags:
            raise CameraError("tracker.tags has an empty tag: leave it out.")
        self.mode, self.project, self.entity, self.tags = mode, project, entity, tuple(tags)
        self._run: Any = None
        self._folder = Path()

    def start(
        self,
        folder: Path,
        *,
        name: str,
        group: str | None,
        job_type: str,
        tags: Sequence[str],
        config: dict[str, Any],
    ) -> None:
        """Open a W&B run; CameraError if online mode needs a login."""
        if self.mode == "offline":  # else W&B reports its own errors to a host of its own
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = wandb.init(
                dir=folder,
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                name=name[-NAME_LENGTH:],  # the hash at its end tells runs apart
                group=group,
                job_type=job_type,
                tags=[tag[:TAG_LENGTH] for tag in dict.fromkeys([*tags, *self.tags])],
                config=config,
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
            self._folder = folder / "wandb"
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            if self.mode == "offline":
                raise  # no login mends it
            reason = " ".join(str(error).split())
            raise CameraError(
                f"tracker.mode={self.mode}: W&B can't start ({reason}); run `wandb login`, or use "
                "tracker.mode=offline and `wandb sync` later."
            ) from error

    def log(self, values: dict[str, float]) -> None:
        self._run.log(values)

    def log_histograms(self, histograms: dict[int, Histogram]) -> None:
        import wandb

        for layer, histogram in histograms.items():
            binned = (histogram.counts.tolist(), histogram.edges.tolist())
            self._run.log(
                {
                    f"energy/layer_{layer:02d}": wandb.Histogram(np_histogram=binned),
                    f"energy/zeros_{layer:02d}": histogram.zeros,
                }
            )

    def log_figures(self, files: Sequence[Path]) -> None:
        import wandb

        if files:
            self._run.log({f"figures/{file.stem}": wandb.Image(str(file)) for file in files})

    def finish(self, metrics: dict[str, Any]) -> None:
        import wandb

        tables = score_tables(metrics)
        if tables:
            with _staged_in(self._folder):
                self._run.log({f"tables/{k}": wandb.Table(dataframe=v) for k, v in tables.items()})
        # The settings are the run's config already.
        self._run.summary.update({k: v for k, v in metrics.items() if k != "settings"})
        self._run.finish(exit_code=0)

    def fail(self, reason: str) -> None:
        self._run.summary["error"] = reason
        self._run.finish(exit_code=1)


def score_tables(metrics: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """What a run's report says of its texts (`perplexity`) and of its tasks (`tasks`), a row each.

    A task's `score` is its acc_norm where it has one, else its acc, with the standard error of
    that one; all in percent. Nothing was measured: no table.
    """
    import pandas as pd

    perplexity = pd.DataFrame(metrics["perplexity"].items(), columns=["text", "perplexity"])
    tasks = pd.DataFrame(_task_row(task, found) for task, found in metrics["tasks"].items())
    return {k: v for k, v in {"perplexity": perplexity, "tasks": tasks}.items() if len(v)}


def _task_row(task: str, found: dict[str, float | None]) -> dict[str, Any]:
    metric = "acc" if found["acc_norm"] is None else "acc_norm"
    shares = {"score": headline(found), "standard error": found[f"{metric}_stderr"]} | found
    percent = {key: None if share is None else 100 * share for key, share in shares.items()}
    return {"task": task, "metric": metric} | percent


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let W&B stage tables there: by default it does so in the home folder, and syncs from it.

    A compute node's home may be read-only, or another one than the machine's that syncs.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
