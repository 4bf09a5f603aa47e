"""What replaces the experts of a layer once they are compressed."""

from camera.experts.delta import DeltaExperts
from camera.experts.form import FORMS, Form
from camera.experts.narrow import NarrowMlp, narrow_mlp
from camera.experts.packed import PackedExperts
from camera.experts.packed_linear import PackedLinear, PackedRouter
from camera.experts.packed_mlp import PackedMlp
from camera.experts.ragged import RaggedExperts

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
