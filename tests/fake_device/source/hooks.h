// What ATen asks an accelerator for, under CUDA's name and under a private one.
#pragma once

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>

#include "allocators.h"
#include "generators.h"
#include "guard.h"

namespace fake {

template <typename Interface>
struct Hooks : public Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return settings.active; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return settings.count; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override {
    Guard().setDevice(Device(settings.type, device));
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(settings.type, current_device); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    return default_generator(index);
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current_device : index);
  }
};

struct CudaHooks final : public Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return settings.active && settings.type == DeviceType::CUDA; }
  int getNumGPUs() const override { return settings.count; }
  DeviceIndex current_device() const override { return fake::current_device; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  std::string showConfig() const override { return "fake"; }
  void deviceSynchronize(DeviceIndex device) const override { Guard().synchronizeDevice(device); }
};

struct PrivateHooks final : public Hooks<at::PrivateUse1HooksInterface> {
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), size);
  }
};

}  // namespace fake
