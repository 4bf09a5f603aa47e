"""Compress a Mixture-of-Experts model, measure it, log it, put it in a table.

    python main.py method=camera_p sparsity=0.2            one run
    python main.py -m method=camera_p sparsity=0.2,0.4,0.6 a sweep, ending in a table
    python main.py experiment=main                         a preset
    python main.py --help                                  the groups and their choices

`conf/` is the table of contents. Everything is written below `output` (default: outputs).
"""

import hydra
from omegaconf import DictConfig

from camera.runtime.distributed import process_group
from experiments.config.schema import naming_valid_keys
from experiments.sweeps.job import job


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> str | None:
    """One job of Hydra: a run, recorded in its folder whether it succeeds or fails."""
    return job(config)


if __name__ == "__main__":
    with naming_valid_keys(), process_group():
        main()
