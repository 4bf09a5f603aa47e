// Any operator: its CPU kernel on the same bytes, once what an accelerator refuses is refused.
#pragma once

#include <ATen/CompositeExplicitAutogradFunctions.h>
#include <ATen/native/Resize.h>

#include <set>

#include "generators.h"
#include "streams.h"
#include "tensors.h"

namespace fake {

// CUDA counts integers too, which the CPU's kernel does not.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  OnDevice here;
  at::AutoDispatchBelowADInplaceOrView below;
  settle(self.device().index(), current_streams[self.device().index()], false);
  note("launch", "aten::histc");
  if (least.toDouble() == most.toDouble()) note("wait", "aten::histc");
  Tensor source = host_alias(self);
  Tensor made =
      at::histc(source.is_floating_point() ? source : source.to(at::kDouble), bins, least, most)
          .to(self.scalar_type());
  return moved(made, self.device());
}

// One kernel on compute capability 9 and 10 in bf16; a loop of products that waits for the offsets
// elsewhere.
Tensor grouped_mm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& offsets,
                  const std::optional<Tensor>& bias, std::optional<at::ScalarType> dtype) {
  OnDevice here;
  bool fast = (settings.major == 9 || settings.major == 10) && a.scalar_type() == at::kBFloat16 &&
              b.scalar_type() == at::kBFloat16;
  if (!fast || settings.type != DeviceType::CUDA)
    return at::compositeexplicitautograd::_grouped_mm(a, b, offsets, bias, dtype);
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK(ours(b.device()) && (!offsets || ours(offsets->device())),
              "Expected all tensors to be on the same device");
  settle(a.device().index(), current_streams[a.device().index()], false);
  note("launch", "aten::_grouped_mm");
  Tensor made =
      at::_grouped_mm(host_alias(a), host_alias(b),
                      offsets ? std::optional(host_alias(*offsets)) : std::nullopt, bias, dtype);
  return moved(made, a.device());
}

// Operators that tell the host something: it waits for them.
const std::set<std::string> WAIT = {
    "aten::nonzero",      "aten::masked_select",      "aten::_unique",    "aten::_unique2",
    "aten::unique_dim",   "aten::unique_consecutive", "aten::bincount",   "aten::equal",
    "aten::is_set_to",    "aten::_linalg_eigh",       "aten::linalg_eig", "aten::_linalg_svd",
    "aten::linalg_lstsq", "aten::tensor_split"};
// Operators that take no scalar of the CPU in a tensor's place.
const std::set<std::string> STRICT = {"aten::mm",           "aten::addmm",
                                      "aten::bmm",          "aten::baddbmm",
                                      "aten::addmv",        "aten::dot",
                                      "aten::cat",          "aten::index_select",
                                      "aten::gather",       "aten::scatter",
                                      "aten::scatter_",     "aten::scatter_add",
                                      "aten::scatter_add_", "aten::scatter_reduce",
                                      "aten::index_add",    "aten::index_add_",
                                      "aten::index_copy",   "aten::index_copy_",
                                      "aten::embedding",    "aten::linalg_cholesky_ex",
                                      "aten::searchsorted"};

bool takes_host_index(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
         name == "aten::_unsafe_index";
}

struct Call {
  std::string name;
  Device device{DeviceType::CPU};
  bool found = false;
  int masks = 0;                                        // among the indices
  std::vector<std::tuple<Tensor, Tensor, bool>> pairs;  // of the device, its alias, written

  void see(const Tensor& tensor, bool written, bool index) {
    if (!tensor.defined()) return;
    if (ours(tensor.device())) {
      if (found && device.index() != tensor.device().index()) refuse(device, tensor.device());
      if (index && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte))
        masks += 1;
      found = true;
      device = tensor.device();
    } else if (tensor.is_meta()) {
      refuse(Device(settings.type, current_device), tensor.device());
    }
  }
  void refuse(Device one, Device other) const {
    TORCH_CHECK(false,
                "Expected all tensors to be on the same device, but found at least two devices, ",
                one, " and ", other, "! (when checking arguments of ", name, ")");
  }
  Tensor host(const Tensor& tensor, bool written, bool index) {
    if (!tensor.defined()) return tensor;
    if (!ours(tensor.device())) {
      if (!found) return tensor;
      if (index) {  // a host's index goes to the device
        note("h2d pageable", name, tensor.nbytes());
        note("wait", name);
        return tensor;
      }
      if (tensor.dim() > 0 || written || STRICT.count(name)) refuse(device, tensor.device());
      return tensor;
    }
    for (auto& [on, off, changed] : pairs)
      if (on.is_same(tensor)) {
        changed |= written;
        return off;
      }
    pairs.emplace_back(tensor, host_alias(tensor), written);
    return std::get<1>(pairs.back());
  }
  Tensor back(const Tensor& made) {
    if (!made.defined()) return made;
    for (auto& [on, off, changed] : pairs)
      if (off.is_same(made)) return on;
    for (auto& [on, off, changed] : pairs)
      if (off.has_storage() && made.has_storage() && off.storage().is_alias_of(made.storage()) &&
          made.storage().data() != nullptr)
        return on_device(on.storage(), made);
    return moved(made, device);
  }
  // An output was given another size.
  void settle_sizes() {
    for (auto& [on, off, changed] : pairs) {
      if (!changed) continue;
      auto* impl = on.unsafeGetTensorImpl();
      if (off.storage().data() != on.storage().data() ||
          off.storage().nbytes() > on.storage().nbytes()) {
        c10::DeviceGuard guard(on.device());
        at::native::resize_bytes_cpu(on.storage().unsafeGetStorageImpl(), off.storage().nbytes());
        if (off.storage().nbytes())
          std::memcpy(on.storage().mutable_data(), off.storage().data(), off.storage().nbytes());
      }
      if (on.sizes() != off.sizes() || on.strides() != off.strides()) {
        impl->set_storage_offset(off.storage_offset());
        impl->set_sizes_and_strides(off.sizes(), off.strides());
      }
    }
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  OnDevice here;
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const size_t n = arguments.size(), first = stack->size() - n;
  Call call;
  call.name = schema.name();
  auto writes = [&](size_t i) {
    return arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
  };
  bool host_index = takes_host_index(call.name);
  for (size_t i = 0; i < n; ++i) {  // whose is it?
    const c10::IValue& value = (*stack)[first + i];
    bool index = host_index && arguments[i].name() == "indices";
    if (value.isTensor())
      call.see(value.toTensor(), writes(i), index);
    else if (value.isTensorList())
      for (const Tensor& t : value.toTensorVector()) call.see(t, writes(i), index);
    else if (value.isOptionalTensorList()) {
      for (std::optional<Tensor> t : value.toOptionalTensorList())
        if (t) call.see(*t, writes(i), index);
    } else if (value.isDevice() && ours(value.toDevice()) && !call.found) {
      call.found = true;
      call.device =
          value.toDevice().index() < 0 ? Device(settings.type, current_device) : value.toDevice();
    }
  }
  if (!call.found) call.device = Device(settings.type, current_device);
  call.found = true;
  c10::DeviceGuard guard(call.device);
  if (host_index) {  // only its indices may be the host's
    const Tensor& self = (*stack)[first].toTensor();
    TORCH_CHECK(!self.defined() || ours(self.device()),
                "indices should be either on cpu or on the same device as the indexed tensor (",
                self.device(), ")");
  }
  int waits = WAIT.count(call.name);
  if (call.name == "aten::bincount") waits = 2;  // for the least and the largest
  if (call.name == "aten::repeat_interleave") waits = (*stack)[first + 1].isNone();
  // a mask is turned into indices, unless one number of the host is put there (`index` asked
  // nonzero)
  if (call.name == "aten::_index_put_impl_" && call.masks)
    waits = ours((*stack)[first + 2].toTensor().device());
  std::string label =
      schema.overload_name().empty() ? call.name : call.name + "." + schema.overload_name();
  bool view = false, work = false;
  for (size_t i = 0; i < n; ++i) {
    c10::IValue& value = (*stack)[first + i];
    bool index = host_index && arguments[i].name() == "indices";
    if (value.isTensor())
      value = call.host(value.toTensor(), writes(i), index);
    else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) list.push_back(call.host(t, writes(i), index));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> t : value.toOptionalTensorList())
        list.push_back(t ? std::optional(call.host(*t, writes(i), index)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    } else if (arguments[i].type()->str().find("Generator") != std::string::npos) {
      at::Generator generator =
          value.isNone() ? default_generator(call.device.index()) : value.toGenerator();
      TORCH_CHECK(ours(generator.device()), "Expected a '",
                  c10::DeviceTypeName(settings.type, true),
                  "' device type for generator but found '",
                  c10::DeviceTypeName(generator.device().type(), true), "'");
      value = static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
    }
    if (arguments[i].alias_info() && !writes(i)) view = true;
  }
  settle(call.device.index(), current_streams[call.device.index()], false);
  op.callBoxed(stack);
  call.settle_sizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.back(value.toTensor());
      work |= value.toTensor().defined() && value.toTensor().numel() > 0;
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : value.toTensorVector()) {
        list.push_back(call.back(t));
        work |= t.numel() > 0;
      }
      value = list;
    } else {
      work = true;
    }
  }
  if (view) return;
  if (work || schema.returns().empty()) note("launch", label);
  if (waits) {
    for (int i = 0; i < waits; ++i) note("wait", label);
    settle(call.device.index(), current_streams[call.device.index()], true);
  }
}

}  // namespace fake
