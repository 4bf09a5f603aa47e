// What the device is said to be: its kind, number, memory, compute capability.
#pragma once

#include <ATen/ATen.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <array>
#include <mutex>

namespace fake {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::Stream;

constexpr int MAX_DEVICES = 8;

struct Settings {
  DeviceType type = DeviceType::CUDA;
  DispatchKey key = DispatchKey::CUDA;
  bool active = false;
  int count = 1;
  size_t total = size_t(40) << 30;  // bytes of a device
  int major = 8, minor = 0;         // compute capability
  bool late = true;                 // copies that may be late are
} settings;

std::recursive_mutex gate;  // guards counts, queues of copies and memory
using Lock = std::lock_guard<std::recursive_mutex>;

thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, MAX_DEVICES> current_streams{};

bool ours(Device device) { return device.type() == settings.type; }

}  // namespace fake
