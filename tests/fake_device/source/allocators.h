// Memory of the devices and pinned memory of the host, counted.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include "counts.h"

namespace fake {

struct Memory {
  size_t now = 0, peak = 0;
  int64_t allocations = 0;
};
std::array<Memory, MAX_DEVICES> memory;
Memory pinned, host;  // host: all of its tensors, the pinned ones too
void take_host(size_t size) {
  host.now += size;
  host.allocations += 1;
  host.peak = std::max(host.peak, host.now);
}
std::map<uintptr_t, size_t> pinned_blocks;

struct Block {
  void* data;
  size_t size;
  DeviceIndex device;
};

// What this thread does now is a device's: its CPU kernels' memory is none of the host's.
thread_local int on_device_now = 0;
struct OnDevice {
  OnDevice() { ++on_device_now; }
  ~OnDevice() { --on_device_now; }
};

size_t rounded(size_t size) { return (size + 511) / 512 * 512; }  // as CUDA's allocator does

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    Lock lock(gate);
    if (block->device >= 0) {
      memory[block->device].now -= block->size;
    } else {
      pinned.now -= block->size;
      host.now -= block->size;
      pinned_blocks.erase(reinterpret_cast<uintptr_t>(block->data));
    }
  }
  c10::free_cpu(block->data);
  delete block;
}

struct DeviceAllocator final : public c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    Device device(settings.type, current_device);
    if (size == 0) return {nullptr, nullptr, &free_block, device};
    size_t takes = rounded(size);
    {
      Lock lock(gate);
      Memory& m = memory[current_device];
      TORCH_CHECK_WITH(OutOfMemoryError, m.now + takes <= settings.total,
                       "CUDA out of memory. Tried to allocate ", size, " bytes. GPU ",
                       int(current_device), " has a total capacity of ", settings.total,
                       " bytes of which ", settings.total - m.now, " bytes is free.");
      m.now += takes;
      m.allocations += 1;
      m.peak = std::max(m.peak, m.now);
    }
    note("alloc", "allocate", takes);
    void* data = c10::alloc_cpu(size);
    return {data, new Block{data, takes, current_device}, &free_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    Lock lock(gate);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* array : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                        &stats.requested_bytes}) {
      (*array)[0].current = memory[device].now;
      (*array)[0].peak = memory[device].peak;
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    Lock lock(gate);
    memory[device].peak = memory[device].now;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    Lock lock(gate);
    return {settings.total - memory[device].now, settings.total};
  }
} device_allocator;

struct PinnedAllocator final : public at::HostAllocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) return {nullptr, nullptr, &free_block, Device(DeviceType::CPU)};
    size_t takes = 1;  // as CUDA's host allocator does
    while (takes < size) takes *= 2;
    void* data = c10::alloc_cpu(size);
    {
      Lock lock(gate);
      pinned.now += takes;
      pinned.allocations += 1;
      pinned.peak = std::max(pinned.peak, pinned.now);
      take_host(takes);
      pinned_blocks[reinterpret_cast<uintptr_t>(data)] = size;
    }
    note("pin", "allocate", takes);
    return {data, new Block{data, takes, -1}, &free_block, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_allocator;

// The host's tensors, in front of the allocator that they have anyway.
struct HostTensors final : public c10::Allocator {
  static void free(void* context) {
    auto* block = static_cast<Block*>(context);
    {
      Lock lock(gate);
      host.now -= block->size;
    }
    c10::free_cpu(block->data);
    delete block;
  }
  c10::DataPtr allocate(size_t size) override {
    if (size == 0 || on_device_now) return plain->allocate(size);
    void* data = c10::alloc_cpu(size);
    {
      Lock lock(gate);
      take_host(size);
    }
    return {data, new Block{data, size, -1}, &free, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  c10::Allocator* plain = nullptr;
} host_tensors;

bool is_pinned(const void* data) {
  Lock lock(gate);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto after = pinned_blocks.upper_bound(address);
  if (after == pinned_blocks.begin()) return false;
  auto [start, size] = *std::prev(after);
  return address < start + size;
}

}  // namespace fake
