// The current device, its streams and events, as c10 asks for them.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "counts.h"
#include "streams.h"

namespace fake {

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return settings.type; }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(settings.type, current_device); }
  void setDevice(Device device) const override {
    if (device.index() < 0) return;
    TORCH_CHECK(device.index() < settings.count, "CUDA error: invalid device ordinal");
    current_device = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  DeviceIndex whose(Device device) const {
    return device.index() < 0 ? current_device : device.index();
  }
  Stream stream(DeviceIndex device, c10::StreamId id) const {
    return Stream(Stream::UNSAFE, Device(settings.type, device), id);
  }
  Stream getStream(Device device) const override {
    return stream(whose(device), current_streams[whose(device)]);
  }
  Stream getDefaultStream(Device device) const override { return stream(whose(device), 0); }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override {
    return getNewStream(device);
  }
  Stream getNewStream(Device device, int = 0) const override {
    Lock lock(gate);
    return stream(whose(device), ++last_stream[whose(device)]);
  }
  Stream exchangeStream(Stream next) const override {
    Stream old = getStream(next.device());
    current_streams[next.device_index()] = next.id();
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return settings.active ? settings.count : 0; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  void record(void** event, const Stream& stream, const DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    auto* it = static_cast<Event*>(*event);
    Queue before;
    {
      Lock lock(gate);
      before.swap(it->queue);
      it->queue = queues[{stream.device_index(), stream.id()}];
    }
    it->time = std::chrono::steady_clock::now();
  }
  void block(void* event, const Stream& stream) const override {
    if (event == nullptr) return;
    Queue due, queue = static_cast<Event*>(event)->queue;
    for (auto& late : queue)
      if (!late->to_host) due.push_back(late);
    finish(std::move(due));
    Lock lock(gate);
    for (auto& late : queue)
      if (!late->done) queues[{stream.device_index(), stream.id()}].push_back(late);
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || query(static_cast<Event*>(event)->queue);
  }
  bool queryStream(const Stream& stream) const override {
    Queue queue;
    {
      Lock lock(gate);
      queue = queues[{stream.device_index(), stream.id()}];
    }
    bool was = query(queue);
    settle(stream.device_index(), stream.id(), true);
    return was;
  }
  static bool query(
      const Queue& queue) {  // the first question comes too early, the second does not
    bool was =
        std::all_of(queue.begin(), queue.end(), [](auto& late) { return late->done.load(); });
    finish(queue);
    return was;
  }
  void synchronizeStream(const Stream& stream) const override {
    note("wait", "Stream.synchronize");
    settle(stream.device_index(), stream.id(), true);
  }
  void synchronizeEvent(void* event) const override {
    note("wait", "Event.synchronize");
    if (event != nullptr) finish(static_cast<Event*>(event)->queue);
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    note("wait", "synchronize");
    settle_all(device < 0 ? current_device : device);
  }
  double elapsedTime(void* first, void* second, const DeviceIndex) const override {
    auto span = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

}  // namespace fake
