// Copies that are asked for and not done yet, in the order of their streams.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>

#include "settings.h"

namespace fake {

struct Late {  // a copy that was asked for and is not done
  std::function<void()> deliver;
  bool to_host = false;
  std::atomic<bool> done{false};
  std::once_flag once;
};
using Queue = std::vector<std::shared_ptr<Late>>;
std::map<std::pair<DeviceIndex, c10::StreamId>, Queue> queues;
std::array<c10::StreamId, MAX_DEVICES> last_stream{};

// Copies run, and tensors die, with the gate open: a tensor's end may want the GIL, and whoever has
// the GIL may wait at the gate.
void finish(Queue due) {
  for (auto& late : due)
    std::call_once(late->once, [&late] {
      late->deliver();
      late->done = true;
    });
}

// What of a queue is done once the device reached its end; `host`: and the host waited for it.
Queue take(Queue& queue, bool host) {
  Queue due, left;
  for (auto& late : queue) (host || !late->to_host ? due : left).push_back(late);
  queue.swap(left);
  return due;
}

void settle(DeviceIndex device, c10::StreamId stream, bool host) {
  Queue due;
  {
    Lock lock(gate);
    auto found = queues.find({device, stream});
    if (found == queues.end() || found->second.empty()) return;
    due = take(found->second, host);
  }
  finish(std::move(due));
}

void settle_all(DeviceIndex device) {
  Queue due;
  {
    Lock lock(gate);
    for (auto& [key, queue] : queues)
      if (key.first == device)
        for (auto& late : take(queue, true)) due.push_back(late);
  }
  finish(std::move(due));
}

struct Event {
  Queue queue;
  std::chrono::steady_clock::time_point time;
};

}  // namespace fake
