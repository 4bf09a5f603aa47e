"""What may stand in the place of a native module of a compressed model: forms, by name."""

from typing import Any, ClassVar

from torch import nn

from camera.moe.expert_module import ExpertModule

FORMS: dict[str, type["Form"]] = {}


class Form(ExpertModule):
    """A way to hold a module's weights in a compressed checkpoint; subclasses name themselves.

    `spec` and `build` are inverse: what the first says in config.json, the second makes again.
    """

    form: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "form" in cls.__dict__:
            FORMS[cls.form] = cls

    def spec(self) -> dict[str, Any]:
        """All that `build` needs besides the native module, JSON-able, with the form's name."""
        raise NotImplementedError

    @classmethod
    def build(cls, native: nn.Module, spec: dict[str, Any]) -> nn.Module:
        """The module, empty and on meta, that stands for a freshly built native one."""
        raise NotImplementedError

    @classmethod
    def weights(cls, spec: dict[str, Any]) -> int | None:
        """How many weights of the original the module stands for; None: what its tensors hold."""
        return None

    @classmethod
    def raw_bits(cls, spec: dict[str, Any]) -> int | None:
        """Bits of all its codes, without scales; None where nothing is quantised."""
        return None
