// Random numbers of a device: a CPU generator's under another address.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "settings.h"

namespace fake {

struct DeviceGenerator final : public c10::GeneratorImpl {  // a CPU generator with another address
  at::Generator inner;
  explicit DeviceGenerator(DeviceIndex index,
                           at::Generator source = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(settings.type, index), c10::DispatchKeySet(settings.key)),
        inner(std::move(source)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override {
    return new DeviceGenerator(device_.index(), inner.clone());
  }
};

at::Generator& default_generator(DeviceIndex index) {
  static std::array<at::Generator, MAX_DEVICES> all;
  Lock lock(gate);
  at::Generator& it = all[index < 0 ? current_device : index];
  if (!it.defined()) it = at::make_generator<DeviceGenerator>(index < 0 ? current_device : index);
  return it;
}

}  // namespace fake
