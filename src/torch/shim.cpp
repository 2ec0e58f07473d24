// What tch has no binding for. Every function catches at its boundary: it returns null, or a message that the caller
// frees with `shim_free_message`. Tensors cross as tch's own pointers (`torch::Tensor*`), owned by the receiver.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>
#include <torch/version.h>
#ifdef SHIM_CUDA_GRAPHS
#include <ATen/cuda/CUDAGraph.h>
#endif

#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
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

// Work of this thread goes to a stream beside the usual one, after what the usual one had to do so far.
class OnSideStream {
 public:
  explicit OnSideStream(c10::Device device)
      : guard_(device.type()), before_(guard_.getStream(device)),
        stream_(guard_.getStreamFromGlobalPool(device, /*isHighPriority=*/false)) {
    c10::Event reached(device.type());
    reached.record(before_);
    reached.block(stream_);
    guard_.exchangeStream(stream_);
  }
  ~OnSideStream() { guard_.exchangeStream(before_); }
  OnSideStream(const OnSideStream&) = delete;
  const c10::Stream& stream() const { return stream_; }
  const c10::Stream& before() const { return before_; }

 private:
  c10::impl::VirtualGuardImpl guard_;
  c10::Stream before_;
  c10::Stream stream_;
};

// Brings bytes from pageable memory to a device through pinned buffers in turn, so that filling one and sending the
// others overlap. On the CPU it copies.
class Lane {
 public:
  Lane(c10::Device device, size_t buffer_bytes, size_t buffers) : buffer_bytes_(buffer_bytes) {
    if (device.is_cpu()) return;
    side_ = std::make_unique<OnSideStream>(device);
    for (size_t i = 0; i < buffers; i++) {
      auto options = torch::TensorOptions().dtype(torch::kUInt8).pinned_memory(true);
      staging_.push_back({torch::empty({static_cast<int64_t>(buffer_bytes)}, options), c10::Event(device.type())});
    }
  }

  void copy(torch::Tensor& target, const char* source) {
    auto bytes = target.view({-1}).view(torch::kUInt8);
    const auto length = static_cast<size_t>(bytes.numel());
    if (!side_) {
      std::memcpy(bytes.data_ptr(), source, length);
      return;
    }
    for (size_t start = 0; start < length; start += buffer_bytes_) {
      const auto part = std::min(buffer_bytes_, length - start);
      auto& [buffer, sent] = staging_[next_++ % staging_.size()];
      if (sent.was_marked_for_recording()) sent.synchronize();
      std::memcpy(buffer.data_ptr(), source + start, part);
      const auto count = static_cast<int64_t>(part);
      bytes.narrow(0, static_cast<int64_t>(start), count).copy_(buffer.narrow(0, 0, count), /*non_blocking=*/true);
      sent.record(side_->stream());
    }
  }

  void finish() {
    if (side_) side_->stream().synchronize();
  }

 private:
  size_t buffer_bytes_;
  size_t next_ = 0;
  std::unique_ptr<OnSideStream> side_;
  std::vector<std::pair<torch::Tensor, c10::Event>> staging_;
};

// A graph compiled ahead of time. It computes with the tensors in `constants` by pointers to them: they are declared
// first, so that they go last.
struct Package {
  std::unordered_map<std::string, torch::Tensor> constants;
  torch::inductor::AOTIModelPackageLoader loader;
};

}  // namespace

extern "C" {

void shim_free_message(char* message) { free(message); }

const char* shim_torch_version() { return TORCH_VERSION; }

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

// A lane belongs to the thread that made it.
char* shim_lane_new(int device, size_t buffer_bytes, size_t buffers, Lane** out) {
  return guarded([&] {
    auto place = device < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
    *out = new Lane(place, buffer_bytes, buffers);
  });
}

// `source` holds as many bytes as the contiguous `target`, and may go when the call returns.
char* shim_lane_copy(Lane* lane, torch::Tensor* target, const char* source) {
  return guarded([&] { lane->copy(*target, source); });
}

// Waits until all has arrived.
char* shim_lane_finish(Lane* lane) {
  return guarded([&] { lane->finish(); });
}

// Where the current stream of a CUDA device is now.
char* shim_mark_new(int device, c10::Event** out) {
  return guarded([=] {
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    auto event = std::make_unique<c10::Event>(c10::DeviceType::CUDA);
    event->record(guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))));
    *out = event.release();
  });
}

char* shim_mark_is_reached(c10::Event* mark, bool* out) {
  return guarded([=] { *out = mark->query(); });
}

void shim_mark_free(c10::Event* mark) { delete mark; }

void shim_lane_free(Lane* lane) { delete lane; }

// --- CUDA graphs ------------------------------------------------------------------------------------------------------

#ifdef SHIM_CUDA_GRAPHS
using Graph = at::cuda::CUDAGraph;

bool shim_has_graphs() { return true; }

// A memory pool that graphs may share which never run at the same time.
char* shim_graph_pool(uint64_t* pool) {
  return guarded([&] { std::tie(pool[0], pool[1]) = at::cuda::graph_pool_handle(); });
}

// What the calling thread does on a device, on a stream of its own, until it is freed. Between begin and end it is
// recorded instead of done.
struct Capture {
  OnSideStream side;
  std::unique_ptr<Graph> graph;
};

char* shim_capture_new(int device, Capture** out) {
  return guarded([&] {
    *out = new Capture{OnSideStream({c10::kCUDA, static_cast<c10::DeviceIndex>(device)}), nullptr};
  });
}

char* shim_capture_begin(Capture* capture, const uint64_t* pool) {
  return guarded([&] {
    auto graph = std::make_unique<Graph>();
    // other threads may go on allocating
    graph->capture_begin({pool[0], pool[1]}, cudaStreamCaptureModeThreadLocal);
    capture->graph = std::move(graph);
  });
}

char* shim_capture_end(Capture* capture, Graph** out) {
  return guarded([&] {
    auto graph = std::move(capture->graph);
    graph->capture_end();
    capture->side.stream().synchronize();
    *out = graph.release();
  });
}

void shim_capture_free(Capture* capture) {
  try {
    if (capture->graph) capture->graph->capture_end();
  } catch (...) {  // what failed before says more
  }
  delete capture;
}

char* shim_graph_replay(Graph* graph) {
  return guarded([&] { graph->replay(); });
}

void shim_graph_free(Graph* graph) {
  try {
    delete graph;
  } catch (...) {  // a lost device
  }
}
#else
struct Graph;
struct Capture;

bool shim_has_graphs() { return false; }
char* shim_graph_pool(uint64_t*) { return strdup("built without CUDA's headers"); }
char* shim_capture_new(int, Capture**) { return strdup("built without CUDA's headers"); }
char* shim_capture_begin(Capture*, const uint64_t*) { return strdup("built without CUDA's headers"); }
char* shim_capture_end(Capture*, Graph**) { return strdup("built without CUDA's headers"); }
void shim_capture_free(Capture*) {}
char* shim_graph_replay(Graph*) { return strdup("built without CUDA's headers"); }
void shim_graph_free(Graph*) {}
#endif

// --- Packages ----------------------------------------------------------------------------------------------------------

// Loads a package (device -1: the CPU) and gives it its constants, from among these tensors, without a copy.
char* shim_package_load(
    const char* path, int device, const char* const* names, torch::Tensor* const* tensors, size_t count,
    Package** out) {
  return guarded([&] {
    std::unordered_map<std::string, torch::Tensor> given;
    for (size_t i = 0; i < count; i++) given.emplace(names[i], *tensors[i]);
    // One caller at a time: without the bookkeeping for several.
    auto package = std::unique_ptr<Package>(new Package{
        {}, {path, "model", /*run_single_threaded=*/true, /*num_runners=*/1, static_cast<c10::DeviceIndex>(device)}});
    for (const auto& name : package->loader.get_constant_fqns()) {
      auto found = given.find(name);
      if (found == given.end()) throw std::runtime_error("it computes with " + name + ", which the graph does not have");
      package->constants.insert(*found);
    }
    package->loader.load_constants(
        package->constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
    *out = package.release();
  });
}

void shim_package_free(Package* package) { delete package; }

char* shim_package_run(
    Package* package, torch::Tensor* const* inputs, size_t count, void* context, TensorSink sink) {
  return guarded([&] {
    std::vector<torch::Tensor> arguments;
    arguments.reserve(count);
    for (size_t i = 0; i < count; i++) arguments.push_back(*inputs[i]);
    for (auto& output : package->loader.boxed_run(std::move(arguments))) {
      sink(context, "", new torch::Tensor(std::move(output)));
    }
  });
}

// CUDA's releases, as 1000 * major + 10 * minor: the newest that the driver runs, and that of libtorch. 0: there is none.
void shim_cuda_versions(int* driver, int* build) {
  *driver = *build = 0;
  auto ask = [](const char* name, int* version) {
    auto function = reinterpret_cast<int (*)(int*)>(dlsym(RTLD_DEFAULT, name));
    if (function && function(version)) *version = 0;
  };
  ask("cudaDriverGetVersion", driver);
  ask("cudaRuntimeGetVersion", build);
}

// Major and minor number of a CUDA device's architecture. The runtime comes with libtorch, its headers do not.
char* shim_compute_capability(int device, int* major, int* minor) {
  return guarded([=] {
    auto attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"));
    if (!attribute) throw std::runtime_error("the CUDA runtime is not loaded");
    constexpr int kMajor = 75, kMinor = 76;  // cudaDevAttrComputeCapabilityMajor and Minor
    if (attribute(major, kMajor, device) || attribute(minor, kMinor, device)) {
      throw std::runtime_error("the CUDA runtime does not know the device");
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
