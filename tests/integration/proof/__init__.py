"""What every method makes of tiny models, byte by byte, before and after a change of the code.

    python -m tests.integration.proof BEFORE.json
    python -m tests.integration.proof AFTER.json --against BEFORE.json [--only SUBSTRING]

Weights and statistics are recorded as hashes, config.json and camera.json as they stand, without
what differs from run to run.
"""

import os

os.environ.update(  # before torch is imported
    CUDA_VISIBLE_DEVICES="",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TRANSFORMERS_VERBOSITY="error",
    WANDB_MODE="offline",
)
