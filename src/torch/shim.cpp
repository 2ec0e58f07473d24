// What tch has no binding for. Every function catches at its boundary: it returns null, or a message that the caller
// frees with `shim_free_message`. Tensors cross as tch's own pointers (`torch::Tensor*`), owned by the receiver.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <torch/script.h>

#include <cstring>
#include <string>
#include <vector>

namespace {

template <typename F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("an exception of unknown type");
  }
}

using TensorSink = void (*)(void* context, const char* name, torch::Tensor* tensor);

}  // namespace

extern "C" {

void shim_free_message(char* message) { free(message); }

// A tensor over memory that somebody else owns; `release(owner)` runs when its storage is freed.
char* shim_from_mapping(
    void* data, const int64_t* sizes, size_t dims, int kind, void* owner, void (*release)(void*),
    torch::Tensor** out) {
  // Once from_blob has taken the deleter, a failure runs it; before that, nobody would.
  return guarded([&] {
    auto options = torch::TensorOptions().dtype(static_cast<torch::ScalarType>(kind));
    *out = new torch::Tensor(torch::from_blob(
        data, torch::IntArrayRef(sizes, dims), [owner, release](void*) { release(owner); }, options));
  });
}

char* shim_module_parameters(torch::jit::script::Module* module, void* context, TensorSink sink) {
  return guarded([&] {
    for (const auto& p : module->named_parameters()) sink(context, p.name.c_str(), new torch::Tensor(p.value));
  });
}

char* shim_module_buffers(torch::jit::script::Module* module, void* context, TensorSink sink) {
  return guarded([&] {
    for (const auto& b : module->named_buffers()) sink(context, b.name.c_str(), new torch::Tensor(b.value));
  });
}

// Runs `forward` and hands out its tensor, or each tensor of its tuple, in order.
char* shim_module_forward(
    torch::jit::script::Module* module, torch::Tensor* const* inputs, size_t count, void* context, TensorSink sink) {
  return guarded([&] {
    std::vector<c10::IValue> arguments;
    arguments.reserve(count);
    for (size_t i = 0; i < count; i++) arguments.emplace_back(*inputs[i]);
    c10::IValue result = module->forward(std::move(arguments));
    if (result.isTensor()) {
      sink(context, "", new torch::Tensor(std::move(result).toTensor()));
      return;
    }
    for (const auto& element : result.toTupleRef().elements()) {
      sink(context, "", new torch::Tensor(element.toTensor()));
    }
  });
}

// A CPU random generator of its own: what `torch.Generator("cpu").manual_seed(seed)` is in Python.
char* shim_generator_new(uint64_t seed, at::Generator** out) {
  return guarded([&] { *out = new at::Generator(at::detail::createCPUGenerator(seed)); });
}

void shim_generator_free(at::Generator* generator) { delete generator; }

char* shim_randn(at::Generator* generator, const int64_t* sizes, size_t dims, int kind, torch::Tensor** out) {
  return guarded([&] {
    auto options = torch::TensorOptions().dtype(static_cast<torch::ScalarType>(kind));
    *out = new torch::Tensor(torch::randn(torch::IntArrayRef(sizes, dims), *generator, options));
  });
}

// Gives the cached, unused device memory back to the driver. Nothing to do without an accelerator.
char* shim_empty_cache() {
  return guarded([] {
    if (at::accelerator::deviceCount() > 0) at::accelerator::emptyCache();
  });
}

// Free and total bytes of an accelerator's memory, as the driver says.
char* shim_memory_info(int device, uint64_t* free_bytes, uint64_t* total_bytes) {
  return guarded([&] {
    auto info = at::accelerator::getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *free_bytes = info.first;
    *total_bytes = info.second;
  });
}

// Which kernels scaled_dot_product_attention may choose from.
char* shim_set_attention(bool flash, bool efficient, bool cudnn, bool math) {
  return guarded([=] {
    auto& context = at::globalContext();
    context.setSDPUseFlash(flash);
    context.setSDPUseMemEfficient(efficient);
    context.setSDPUseCuDNN(cudnn);
    context.setSDPUseMath(math);
  });
}

char* shim_allow_tf32(bool allow) {
  return guarded([=] {
    at::globalContext().setAllowTF32CuBLAS(allow);
    at::globalContext().setAllowTF32CuDNN(allow);
  });
}

}  // extern "C"
