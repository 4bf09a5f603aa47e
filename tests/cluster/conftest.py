"""Six runs of a tiny model for each engine."""

import pytest

from tests.cluster.sweeping import SixRuns


@pytest.fixture
def six_runs(checkpoints, data_folder, tmp_path):
    """six_runs(NAME, ARGUMENTS): the sweep with these arguments besides."""

    def make(name: str, *arguments: str) -> SixRuns:
        model = checkpoints("qwen2_moe")
        return SixRuns(name, [*arguments], tmp_path, model, data_folder)

    return make
