// Tensors of the device and of the CPU over the same bytes, and views of them.
#pragma once

#include <ATen/native/Resize.h>

#include "allocators.h"

namespace fake {

// A CPU tensor over the same bytes.
Tensor host_alias(const Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(
      storage.mutable_data(), new c10::Storage(storage),
      [](void* held) { delete static_cast<c10::Storage*>(held); }, Device(DeviceType::CPU));
  c10::Storage on_host(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                             storage.nbytes(), std::move(data),
                                                             c10::GetCPUAllocator(), true));
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(on_host), c10::DispatchKeySet(DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

Tensor on_device(c10::Storage storage, const Tensor& like) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(settings.key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

c10::Storage new_storage(size_t size) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                            size, device_allocator.allocate(size),
                                                            &device_allocator, true));
}

// What a CPU kernel made, on the device.
Tensor moved(const Tensor& made, Device device) {
  OnDevice here;
  c10::DeviceGuard guard(device);
  size_t bytes = made.storage().nbytes();
  c10::Storage storage = new_storage(bytes);
  if (bytes) std::memcpy(storage.mutable_data(), made.storage().data(), bytes);
  return on_device(std::move(storage), made);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(
      Device(settings.type, device && device->index() >= 0 ? device->index() : current_device));
  auto type = at::scalarTypeToTypeMeta(dtype.value_or(at::get_default_dtype_as_scalartype()));
  auto bytes = at::detail::computeStorageNbytes(size, stride, type.itemsize());
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(new_storage(bytes),
                                                         c10::DispatchKeySet(settings.key), type);
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return made;
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
             std::optional<at::Layout> layout, std::optional<Device> device,
             std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  auto stride = c10::contiguous_strides(size);
  if (format && *format == at::MemoryFormat::ChannelsLast)
    stride = c10::get_channels_last_strides_2d(size);
  for (auto extent : size)
    TORCH_CHECK(extent >= 0, "Trying to create tensor with negative dimension ", extent, ": ",
                size);
  return empty_strided(size, stride, dtype, layout, device, pin);
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
Tensor view(const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }
Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::_reshape_alias(self, size, stride);
}
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  OnDevice here;
  c10::DeviceGuard guard(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt, true);
  return self;
}
Tensor& set_storage_offset(Tensor& self, c10::Storage source, int64_t offset, at::IntArrayRef size,
                           at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == self.device(),
              "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\".");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  at::native::resize_impl_cpu_(impl, size, stride.empty() ? std::nullopt : std::optional(stride),
                               true);
  return self;
}
Tensor& set_storage(Tensor& self, c10::Storage source) {
  int64_t size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage_offset(self, std::move(source), 0, {size}, {});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return self.is_same(source) ? self
                              : set_storage_offset(self, source.storage(), source.storage_offset(),
                                                   source.sizes(), source.strides());
}
Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  return set_storage_offset(self, new_storage(0), 0, {0}, {});
}
void record_stream(Tensor&, Stream) {}

}  // namespace fake
