// A fake accelerator for a CPU-only PyTorch: storages say `cuda` (or a private name), their bytes
// lie in host memory, and every operator runs its CPU kernel on them. Registered at run time.
#include "copies.h"
#include "fallback.h"
#include "hooks.h"

namespace fake {

std::vector<std::unique_ptr<torch::Library>> libraries;

void register_kernels() {
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "_", settings.key,
                                                       __FILE__, __LINE__));
  libraries.back()->fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", settings.key,
                                                       __FILE__, __LINE__));
  torch::Library& m = *libraries.back();
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("record_stream", &record_stream);
  m.impl("histc", &histc);
  m.impl("_grouped_mm", &grouped_mm);
}

// A CPU-only build has made its hooks while it was imported: an object without fields, all of whose
// methods refuse. No registration comes early enough, so that object is made one of ours in place.
void adopt_hooks() {
  static_assert(sizeof(CudaHooks) == sizeof(void*), "hooks with fields can't be adopted");
  static const CudaHooks mine;
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(theirs), static_cast<const void*>(&mine), sizeof(void*));
}

void activate(const std::string& type, int count, size_t total, std::pair<int, int> capability,
              bool late) {
  TORCH_CHECK(count > 0 && count <= MAX_DEVICES, "between 1 and ", MAX_DEVICES, " devices");
  bool first = !settings.active;
  DeviceType wanted = type == "cuda" ? DeviceType::CUDA : DeviceType::PrivateUse1;
  TORCH_CHECK(first || settings.type == wanted,
              "a process has one fake device, and it has got the other");
  settings.type = wanted;
  settings.key = wanted == DeviceType::CUDA ? DispatchKey::CUDA : DispatchKey::PrivateUse1;
  settings.count = count;
  settings.total = total;
  settings.major = capability.first;
  settings.minor = capability.second;
  settings.late = late;
  if (!first) return;
  settings.active = true;
  static c10::impl::DeviceGuardImplRegistrar guard(settings.type, new Guard);
  c10::SetAllocator(settings.type, &device_allocator, 255);
  c10::SetCPUAllocator(&host_allocator, 255);
  if (wanted == DeviceType::CUDA) {
    adopt_hooks();
  } else {
    at::RegisterPrivateUse1HooksInterface(new PrivateHooks);
  }
  register_kernels();
}

py::list report() {
  Lock lock(gate);
  py::list rows;
  for (const auto& [key, count] : counts) {
    const auto& [where, kind, what] = key;
    const auto& [file, line, function] = sites[where];
    rows.append(py::make_tuple(file, line, function, kind, what, count.times, count.bytes));
  }
  return rows;
}

}  // namespace fake

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace fake;
  m.def("activate", &activate);
  m.def("report", &report);
  m.def("reset", [] {
    Lock lock(gate);
    counts.clear();
  });
  m.def("count", [](bool on) { return std::exchange(counting, on); });
  m.def("project", [](std::vector<std::string> prefixes) {
    Lock lock(gate);
    project = std::move(prefixes);
    for (auto& [code, inside] : in_project) Py_DECREF(code);
    in_project.clear();
    site_of.clear();
  });
  m.def("late", [](bool on) { return std::exchange(settings.late, on); });
  m.def("total", [] { return settings.total; });
  m.def("capability", [] { return std::make_pair(settings.major, settings.minor); });
  m.def("devices", [] { return settings.count; });
  m.def("memory", [](int device) {
    Lock lock(gate);
    auto& it = memory.at(device);
    return std::make_tuple(it.now, it.peak, it.allocations);
  });
  m.def("pinned", [] {
    Lock lock(gate);
    return std::make_tuple(pinned.now, pinned.peak, pinned.allocations);
  });
  m.def("host", [] {
    Lock lock(gate);
    return std::make_tuple(host.now, host.peak, host.allocations);
  });
  m.def("trace", [](bool on) { return std::exchange(tracing, on); });
  m.def("host_at_peak", [] {
    Lock lock(gate);
    py::list rows;
    for (const auto& [where, bytes] : held_at_peak) {
      const auto& [file, line, function] = sites[where];
      rows.append(py::make_tuple(file, line, function, bytes));
    }
    return rows;
  });
  m.def("reset_peak", [](int device) {
    device_allocator.resetPeakStats(static_cast<DeviceIndex>(device));
    Lock lock(gate);
    pinned.peak = pinned.now;
    reset_host_peak();
  });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int device) {
    Guard().setDevice(Device(settings.type, static_cast<DeviceIndex>(device)));
  });
  m.def("default_generator",
        [](int device) { return default_generator(static_cast<DeviceIndex>(device)); });
}
