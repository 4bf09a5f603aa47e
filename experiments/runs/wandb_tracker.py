"""Weights & Biases as a tracker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from camera.runtime.errors import CameraError
from experiments.runs import wandb_files
from experiments.runs.tracker import NullTracker, Result

if TYPE_CHECKING:  # the configuration's types are made from this module, at every start
    import pandas as pd

    from experiments.records.energy_summary import Histogram

NAME_LENGTH, TAG_LENGTH = 128, 64  # W&B's limits
NOT_IN_PROJECT = "/\\#?%:"
STEP = "layer"


class WandbTracker(NullTracker):
    """Weights & Biases; `camera wandb` uploads what was kept offline."""

    keeps: ClassVar[bool] = True

    def __init__(
        self,
        mode: Literal["offline", "online"] = "offline",
        project: str = "camera",
        entity: str | None = None,
        tags: Sequence[str] = (),
        artifacts: Sequence[Literal["checkpoint", "plan", "statistics"]] = (),
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
        self.artifacts = tuple(artifacts)
        self._run: Any = None
        self._folder = Path()
        self._layers_told = -1  # by an earlier process: the last one

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
        """Open a W&B run; CameraError if online mode needs a login.

        Online an interrupted run of this folder goes on; offline it is told anew, and what the
        earlier attempt left is marked as superseded. Of a sweep's agent the run is the agent's.
        """
        if self.mode == "offline":  # else W&B reports its own errors to a host of its own
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        identity: dict[str, Any] = {}
        if "WANDB_RUN_ID" not in os.environ:
            wandb_files.supersede(folder)
            identity["group"] = group
            if self.mode == "online":
                identity |= {"id": wandb_files.online_id(folder), "resume": "allow"}
        try:
            self._run = wandb.init(
                dir=folder,
                mode=self.mode,
                project=self.project,
                entity=self.entity,
                name=name[:NAME_LENGTH],
                job_type=job_type,
                tags=[tag[:TAG_LENGTH] for tag in dict.fromkeys([*tags, *self.tags])],
                config=config,
                reinit="finish_previous",
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
                **identity,
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            if self.mode == "offline":
                raise  # no login mends it
            reason = " ".join(str(error).split())
            raise CameraError(
                f"tracker.mode={self.mode}: W&B can't start ({reason}); run `wandb login`, or use "
                "tracker.mode=offline and `camera wandb` later."
            ) from error
        self._folder = wandb_files.folder_of(folder)
        if self._run.resumed:
            self._layers_told = self._run.summary.get("layers_done", 0) - 1
        self._run.define_metric(STEP, hidden=True, summary="none")
        for names in ("layer/*", "energy/*"):
            self._run.define_metric(names, step_metric=STEP, summary="none")

    def log_layer(self, layer: int, measured: Mapping[str, float]) -> None:
        if layer > self._layers_told and measured:
            values = {f"layer/{name}": value for name, value in measured.items()}
            self._run.log({STEP: layer, **values})
            if self.mode == "online":
                self._run.summary["layers_done"] = layer + 1

    def log_histograms(self, histograms: Mapping[int, Histogram]) -> None:
        import wandb

        for layer, histogram in histograms.items():
            binned = (histogram.counts.tolist(), histogram.edges.tolist())
            drawn = wandb.Histogram(np_histogram=binned)
            self._run.log({STEP: layer, "energy/histogram": drawn})

    def log_figures(self, files: Sequence[Path]) -> None:
        import wandb

        if files:
            self._run.log({f"figures/{file.stem}": wandb.Image(str(file)) for file in files})

    def log(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def log_tables(self, tables: Mapping[str, pd.DataFrame]) -> None:
        import wandb

        if tables:
            with _staged_in(self._folder):
                self._run.log({f"tables/{k}": wandb.Table(dataframe=v) for k, v in tables.items()})

    def log_curves(self, curves: pd.DataFrame, *, x: str, y: str, line: str, title: str) -> None:
        import wandb

        with _staged_in(self._folder):
            table = wandb.Table(dataframe=curves)
            plot = wandb.plot.line(table, x, y, stroke=line, title=title)
            self._run.log({f"curves/{y}_{x}": plot})

    def log_page(self, page: Path) -> None:
        import wandb

        self._run.log({page.stem: wandb.Html(page.read_text(encoding="utf-8"), inject=False)})

    def log_results(self, results: Sequence[Result], base: Mapping[str, Any]) -> None:
        import wandb

        asked = [result for result in results if result.kind in self.artifacts]
        if asked and self.mode == "online":  # offline W&B knows no inputs: `base_model` tells
            model = wandb.Artifact(_artifact_name(base["name"]), type="model", metadata=dict(base))
            self._run.use_artifact(model)
        for result in asked:
            about = {**result.about, "base_model": dict(base)}
            artifact = wandb.Artifact(_artifact_name(result.name), type=result.kind, metadata=about)
            how = {"policy": "immutable" if result.stays else "mutable", "skip_cache": True}
            add = artifact.add_dir if result.path.is_dir() else artifact.add_file
            with _staged_in(self._folder):
                add(str(result.path), **how)
                self._run.log_artifact(artifact)

    def log_text(self, file: Path) -> None:
        if file.exists():
            copy = Path(self._run.dir) / file.name  # it may grow, and the run's folder move
            shutil.copyfile(file, copy)
            self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def finish(self) -> None:
        self._run.finish(exit_code=0)

    def fail(self, reason: str) -> None:
        self._run.summary["error"] = reason
        self._run.finish(exit_code=1)


def _artifact_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[-NAME_LENGTH:]


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let W&B stage files there: by default it does so in the home folder, and syncs from it.

    A compute node's home may be read-only, or another one than the machine's that syncs.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
