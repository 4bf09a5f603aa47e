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
struct Held {
  size_t size;
  int site;
};
std::unordered_map<const void*, Held> on_host;
std::map<int, int64_t> held_by, held_at_peak;  // bytes by site

// Call all three with the gate closed.
void take_host(const void* data, size_t size, int site) {
  on_host[data] = {size, site};
  held_by[site] += size;
  host.now += size;
  host.allocations += 1;
  if (host.now <= host.peak) return;
  host.peak = host.now;
  if (tracing) held_at_peak = held_by;
}
void give_host(const void* data) {
  auto found = on_host.find(data);
  if (found == on_host.end()) return;
  host.now -= found->second.size;
  held_by[found->second.site] -= found->second.size;
  on_host.erase(found);
}
void reset_host_peak() {
  host.peak = host.now;
  held_at_peak = held_by;
}
std::map<uintptr_t, size_t> pinned_blocks;

struct Block {
  void* data;
  size_t size;
  DeviceIndex device;
};

thread_local int kernels_running = 0;
struct OnDevice {  // what this thread does meanwhile is the device's work
  OnDevice() { ++kernels_running; }
  ~OnDevice() { --kernels_running; }
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
      give_host(block->data);
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
    int where = tracing ? site() : 0;
    {
      Lock lock(gate);
      pinned.now += takes;
      pinned.allocations += 1;
      pinned.peak = std::max(pinned.peak, pinned.now);
      take_host(data, takes, where);
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

// Tensors of the host; what CPU kernels take in a device's place is not counted.
struct HostAllocator final : public c10::Allocator {
  static void free(void* data) {
    {
      Lock lock(gate);
      give_host(data);
    }
    c10::free_cpu(data);
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    if (size && !kernels_running) {
      int where = tracing ? site() : 0;
      Lock lock(gate);
      take_host(data, size, where);
    }
    return {data, data, &free, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
} host_allocator;

bool is_pinned(const void* data) {
  Lock lock(gate);
  auto address = reinterpret_cast<uintptr_t>(data);
  auto after = pinned_blocks.upper_bound(address);
  if (after == pinned_blocks.begin()) return false;
  auto [start, size] = *std::prev(after);
  return address < start + size;
}

}  // namespace fake
