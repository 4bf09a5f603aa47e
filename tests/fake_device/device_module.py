"""torch.NAME over the fake device.

For `cuda` what a CPU-only build has no C++ for is replaced; for another name a device module is
made and registered.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch


def install(core: ModuleType, name: str) -> None:
    """Make torch.<name> answer for the fake."""
    own = members(core, name)
    if name != "cuda":
        torch.utils.rename_privateuse1_backend(name)
        module = ModuleType(f"torch.{name}")
        module.__dict__.update(own)
        torch._register_device_module(name, module)
        torch.utils.generate_methods_for_privateuse1_backend()
        return
    for module in (torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
        for key, value in own.items():
            if module is torch.cuda or hasattr(module, key):
                setattr(module, key, value)
    _carry_storages()


def members(core: ModuleType, name: str) -> dict[str, object]:
    """What the module of a device has: streams, events, memory, random numbers, properties."""

    def number(device: object = None) -> int:
        if isinstance(device, int):
            index = device if device >= 0 else None
        else:
            index = None if device is None else torch.device(device).index
        return core.current_device() if index is None else index

    class Stream(torch.Stream):
        def __new__(cls, device: object = None, priority: int = 0, **known: int):
            if known:
                return super().__new__(cls, priority=priority, **known)
            return super().__new__(
                cls, device=torch.device(name, number(device)), priority=priority
            )

        def record_event(self, event: torch.Event | None = None) -> torch.Event:
            event = Event() if event is None else event
            event.record(self)
            return event

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, **_: object):
            return super().__new__(cls, device=name, enable_timing=enable_timing)

        def record(self, stream: torch.Stream | None = None) -> None:
            super().record(current_stream() if stream is None else stream)

        def wait(self, stream: torch.Stream | None = None) -> None:
            super().wait(current_stream() if stream is None else stream)

    def known(stream: torch.Stream, id: int | None = None) -> Stream:
        return Stream(
            stream_id=stream.stream_id if id is None else id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )

    def current_stream(device: object = None) -> Stream:
        return known(torch._C._accelerator_getStream(number(device)))

    def default_stream(device: object = None) -> Stream:
        return known(torch._C._accelerator_getStream(number(device)), 0)

    def set_stream(stream: torch.Stream | None) -> None:
        if stream is not None:
            core.set_device(stream.device_index)
            torch._C._accelerator_setStream(stream)

    @contextmanager
    def stream_context(stream: torch.Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        device, before = core.current_device(), current_stream(stream.device_index)
        set_stream(stream)
        try:
            yield
        finally:
            set_stream(before)
            core.set_device(device)

    class device:
        def __init__(self, device: object):
            self.idx = number(device)

        def __enter__(self) -> None:
            self._before = exchange(self.idx)

        def __exit__(self, *_: object) -> bool:
            core.set_device(self._before)
            return False

    class device_of(device):
        def __init__(self, tensor: torch.Tensor):
            super().__init__(tensor.get_device())

    def exchange(index: int) -> int:
        before = core.current_device()
        if index >= 0:
            core.set_device(index)
        return before

    def memory_stats(device: object = None) -> OrderedDict:
        now, peak, times = core.memory(number(device))
        found = OrderedDict({"allocation.all.allocated": times})
        for what in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
            found |= {f"{what}.all.current": now, f"{what}.all.peak": peak}
        return found

    def mem_get_info(device: object = None) -> tuple[int, int]:
        return core.total() - core.memory(number(device))[0], core.total()

    def properties(device: object = None) -> SimpleNamespace:
        major, minor = core.capability()
        return SimpleNamespace(
            name="Fake accelerator",
            major=major,
            minor=minor,
            total_memory=core.total(),
            multi_processor_count=108,
            warp_size=32,
        )

    def generator(device: object = None) -> torch.Generator:
        return core.default_generator(number(device))

    def seed_all(seed: int) -> None:
        for index in range(core.devices()):
            generator(index).manual_seed(int(seed))

    def reset_peak(device: object = None) -> None:
        core.reset_peak(number(device))

    def get_rng_state(device: object = None) -> torch.Tensor:
        return generator(device).get_state()

    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        generator(device).set_state(state)

    def allocated(device: object = None) -> int:
        return core.memory(number(device))[0]

    def most_allocated(device: object = None) -> int:
        return core.memory(number(device))[1]

    everyone = range(core.devices())
    return {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "stream": stream_context,
        "StreamContext": stream_context,
        "device": device,
        "device_of": device_of,
        "_DeviceGuard": device,
        "current_device": core.current_device,
        "set_device": lambda device: core.set_device(number(device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "device_count": core.devices,
        "synchronize": lambda device=None: torch._C._accelerator_synchronizeDevice(number(device)),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "_lazy_call": lambda call, **_: call(),
        "ipc_collect": lambda: None,
        "empty_cache": lambda: None,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: "Fake accelerator",
        "get_device_capability": lambda device=None: core.capability(),
        "get_arch_list": lambda: ["sm_80"],
        "is_bf16_supported": lambda *_, **__: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "memory_stats": memory_stats,
        "mem_get_info": mem_get_info,
        "memory_allocated": allocated,
        "max_memory_allocated": most_allocated,
        "memory_reserved": allocated,
        "max_memory_reserved": most_allocated,
        "reset_peak_memory_stats": reset_peak,
        "reset_max_memory_allocated": reset_peak,
        "reset_accumulated_memory_stats": lambda device=None: None,
        "manual_seed": lambda seed: generator().manual_seed(int(seed)),
        "manual_seed_all": seed_all,
        "seed_all": lambda: seed_all(torch.seed()),
        "initial_seed": lambda: generator().initial_seed(),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [get_rng_state(index) for index in everyone],
        "set_rng_state_all": lambda states: [set_rng_state(s, i) for i, s in enumerate(states)],
        "default_generators": tuple(generator(index) for index in everyone),
    }


def _carry_storages() -> None:
    """torch.UntypedStorage of a CPU-only build makes none for cuda: those are made by a tensor."""
    plain = torch.UntypedStorage.clone

    def table(storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage.device.type != "cuda":
            return plain(storage)
        return table(storage).clone().untyped_storage()

    def restore(storage: torch.UntypedStorage, place: object) -> torch.UntypedStorage | None:
        if not str(place).startswith("cuda"):
            return None
        return table(storage).to(torch.device(str(place))).untyped_storage()

    torch.UntypedStorage.clone = clone
    torch.serialization.register_package(15, lambda _: None, restore)
