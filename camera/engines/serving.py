"""Which programs could serve a compressed model of a config, and what for."""

from typing import Any

from camera.engines.gguf.architectures import architecture_of
from camera.runtime.errors import CameraError


def engines_for(config: Any) -> dict[str, str]:
    """{program: what it takes of a compressed model of this config, or why it takes none}."""
    kind = config.model_type
    try:
        architecture = architecture_of(config).name
        gguf = f"a GGUF file (architecture {architecture}), every expert padded to one width"
    except CameraError as error:
        gguf = f"nothing: {error}"
    native = f"a native checkpoint of one width or of fewer experts, where it serves {kind}"
    return {
        "transformers": "every checkpoint, with this package imported; a native one without it",
        "vLLM": f"{native}; bits by layer as compressed-tensors",
        "SGLang": f"{native}; 4 or 8 bits as compressed-tensors",
        "llama.cpp": gguf,
    }
