"""The command: `python main.py` in a checkout, `python -m experiments` where it is installed.

    python main.py method=camera_p sparsity=0.2            one run
    python main.py -m method=camera_p sparsity=0.2,0.4,0.6 a sweep, ending in a table
    python main.py experiment=main                         a preset
    python main.py --help                                  the groups and their choices

`conf/` is the table of contents. Everything is written below `output` (default: outputs).
"""

import os

import hydra
from omegaconf import DictConfig

from experiments.config.location import CONF
from experiments.config.schema import naming_valid_keys


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(config: DictConfig) -> str | None:
    """One job of Hydra: a run, recorded in its folder whether it succeeds or fails."""
    from experiments.sweeps.job import job

    return job(config)


def command() -> None:
    """Compose the command line and do what it asks for, with the other ranks of a torchrun."""
    with naming_valid_keys():
        if "WORLD_SIZE" not in os.environ:
            main()
            return
        from camera.runtime.distributed import process_group

        with process_group():
            main()


if __name__ == "__main__":
    command()
