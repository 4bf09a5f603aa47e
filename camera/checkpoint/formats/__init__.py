"""What replaces the experts of a layer once they are compressed."""

from camera.checkpoint.formats.delta import DeltaExperts
from camera.checkpoint.formats.format import FORMS, Form
from camera.checkpoint.formats.narrow import NarrowMlp, narrow_mlp
from camera.checkpoint.formats.packed.experts import PackedExperts
from camera.checkpoint.formats.packed.linear import PackedLinear, PackedRouter
from camera.checkpoint.formats.packed.mlp import PackedMlp
from camera.checkpoint.formats.ragged import RaggedExperts

__all__ = [
    "FORMS",
    "DeltaExperts",
    "Form",
    "NarrowMlp",
    "PackedExperts",
    "PackedLinear",
    "PackedMlp",
    "PackedRouter",
    "RaggedExperts",
    "narrow_mlp",
]
