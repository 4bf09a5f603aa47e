// Copies between the host and the devices; those that may come late do.
#pragma once

#include <limits>

#include "streams.h"
#include "tensors.h"

namespace fake {

void poison(const Tensor& tensor) {  // what memory might hold before a copy arrives
  if (tensor.is_floating_point() || tensor.is_complex())
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  else
    tensor.fill_(tensor.scalar_type() == at::kBool ? 1 : 0x55);
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  OnDevice here;
  at::AutoDispatchBelowADInplaceOrView below;
  bool in = !ours(from.device()), out = !ours(to.device());
  TORCH_CHECK((!in || from.is_cpu()) && (!out || to.is_cpu()), "copy_ between ", from.device(),
              " and ", to.device());
  DeviceIndex device = out ? from.device().index() : to.device().index();
  c10::StreamId stream = current_streams[device];
  int64_t bytes = to.numel() * to.itemsize();
  Tensor target = out ? to : host_alias(to), source = in ? from : host_alias(from);
  settle(device, stream, false);
  if (!in && !out) {
    if (to.numel()) note(to.device() == from.device() ? "launch" : "peer", "copy_", bytes);
    if (to.device() != from.device())
      settle(from.device().index(), current_streams[from.device().index()], false);
    target.copy_(source);
    return to;
  }
  bool fixed = is_pinned(in ? from.storage().data() : to.storage().data());
  if (to.numel())
    note(std::string(in ? "h2d" : "d2h") + (fixed ? " pinned" : " pageable"), "copy_", bytes);
  bool waits = !non_blocking || (out && !fixed);
  if (waits) {
    if (to.numel()) note("wait", "copy_");
    settle(device, stream, true);
    target.copy_(source);
  } else if (!settings.late) {
    target.copy_(source);
  } else {
    // The device's side is read in its turn, that is now; pinned host memory only when the copy
    // runs.
    Tensor seen = in && fixed ? source : source.clone();
    poison(target);
    auto late = std::make_shared<Late>();
    late->to_host = out;
    late->deliver = [target, seen] {
      at::AutoDispatchBelowADInplaceOrView inner;
      Tensor to = target;
      to.copy_(seen);
    };
    Lock lock(gate);
    queues[{device, stream}].push_back(std::move(late));
  }
  return to;
}

at::Scalar local_scalar(const Tensor& self) {
  OnDevice here;
  note("wait", "item");
  note("d2h pageable", "item", self.itemsize());
  settle(self.device().index(), current_streams[self.device().index()], true);
  return at::_local_scalar_dense(host_alias(self));
}

}  // namespace fake
