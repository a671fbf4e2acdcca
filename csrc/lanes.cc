// The XLA custom calls "pykernels_lanes", "pykernels_passes" and "pykernels_buffer", and what Python calls
// through ctypes (pykernels/kernels/native.py).

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

#include "blocks.h"
#include "passes.h"
#include "xla/ffi/api/ffi.h"

#ifdef _WIN32
#define PK_EXPORT extern "C" __declspec(dllexport)
#else
#define PK_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kAbi =
    3;  // changes with the custom call's attributes and with the exports; native.py knows it too
constexpr int64_t kErrorCapacity = 4096;

using Compiler = void* (*)(const char* key, int64_t key_size, const char* ir, int64_t ir_size, char* error,
                           int64_t capacity);

std::atomic<Compiler> compiler{nullptr};
std::atomic<bool> poison{false};

pk::Registry& registry() {
  // Never destroyed: threads of XLA's may still run while the process ends.
  static pk::Registry* const only = [] {
    auto* made = new pk::Registry;
#ifndef _WIN32
    pthread_atfork([] { registry().before_fork(); }, [] { registry().after_fork_in_parent(); },
                   [] { registry().after_fork_in_child(); });
#endif
    return made;
  }();
  return *only;
}

void* compile(std::string_view key, std::string_view ir) {
  const Compiler current = compiler.load();
  if (current == nullptr)
    throw std::runtime_error("pykernels: no compiler is set for kernel " + std::string(key));
  std::vector<char> error(kErrorCapacity, '\0');
  void* const address = current(key.data(), static_cast<int64_t>(key.size()), ir.data(),
                                static_cast<int64_t>(ir.size()), error.data(), kErrorCapacity);
  if (address == nullptr) {
    error.back() = '\0';
    const std::string why = error.front() == '\0' ? "no reason given" : error.data();
    throw std::runtime_error("pykernels: kernel " + std::string(key) + " does not compile: " + why);
  }
  return address;
}

ffi::DataType number_type(int64_t dtype) {
  switch (static_cast<pk::Number>(dtype)) {
    case pk::Number::kFloat32:
      return ffi::F32;
    case pk::Number::kFloat64:
      return ffi::F64;
    case pk::Number::kInt32:
      return ffi::S32;
    case pk::Number::kInt64:
      return ffi::S64;
  }
  return ffi::DataType::INVALID;
}

// Holds a row of the layout against the buffer that XLA brings for it; throws when they differ.
void check(const pk::Plan& plan, size_t index, ffi::AnyBuffer buffer, bool argument) {
  const auto reject = [index](const std::string& why) {
    throw std::invalid_argument("pykernels: buffer " + std::to_string(index) + ": " + why);
  };
  const pk::Row& row = plan.rows[index];
  if (argument != (row.role <= pk::Role::kShared)) {
    reject(argument ? "the layout has a result where XLA has an argument"
                    : "the layout has an input where XLA has a result");
  }
  const auto dimensions = buffer.dimensions();
  const bool lanes = row.role != pk::Role::kShared && row.role != pk::Role::kSum;
  if (lanes && (dimensions.size() == 0 || dimensions.back() != plan.lanes)) {
    reject("the last dimension is not the lanes, " + std::to_string(plan.lanes));
  }
  const int64_t expected = row.elements * (lanes ? plan.lanes : 1);
  const auto count = static_cast<int64_t>(buffer.element_count());
  if (count != expected) {
    reject(std::to_string(count) + " elements where the layout has " + std::to_string(expected));
  }
  const auto item = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  if (item != row.item) {
    reject("items of " + std::to_string(item) + " bytes where the layout has " + std::to_string(row.item));
  }
  if (row.role == pk::Role::kSum && buffer.element_type() != number_type(row.dtype)) {
    reject("the dtype of a sum differs from the layout's code " + std::to_string(row.dtype));
  }
}

void run_lanes(ffi::ThreadPool& pool, std::string_view key, std::string_view ir, int64_t width, int64_t lanes,
               ffi::Span<const int64_t> layout, const ffi::RemainingArgs& arguments,
               const ffi::RemainingRets& results) {
  pk::Plan plan(layout.begin(), layout.size(), lanes, width);
  if (plan.buffers != arguments.size() + results.size()) {
    throw std::invalid_argument("pykernels: the layout has " + std::to_string(plan.buffers) +
                                " buffers besides scratch, XLA " +
                                std::to_string(arguments.size() + results.size()));
  }
  std::vector<void*> buffers;
  const auto take = [&](ffi::AnyBuffer buffer, bool argument) {
    check(plan, buffers.size(), buffer, argument);
    buffers.push_back(buffer.untyped_data());
  };
  for (size_t i = 0; i < arguments.size(); ++i) take(arguments.get<ffi::AnyBuffer>(i).value(), true);
  for (size_t i = 0; i < results.size(); ++i) take(*results.get<ffi::AnyBuffer>(i).value(), false);

  // Held until the call ends: this is what "in use" means to the registry. Nothing to integrate needs no
  // kernel.
  const std::shared_ptr<const pk::Code> code = lanes == 0 ? nullptr : registry().get(key, ir, compile);
  const auto kernel = reinterpret_cast<pk::Kernel>(code == nullptr ? nullptr : code->address);
  pk::run(
      std::move(plan), kernel, buffers.data(), pool.num_threads(),
      [&pool](std::function<void()> closure) { pool.Schedule(std::move(closure)); }, poison.load());
}

// Holds a strip of the layout against the buffer that XLA brings for it; throws when they differ.
void check(const pk::PassPlan& plan, size_t index, ffi::AnyBuffer buffer, bool argument) {
  const pk::Strip& strip = plan.strips[index];
  const auto count = static_cast<int64_t>(buffer.element_count());
  const auto item = static_cast<int64_t>(ffi::ByteWidth(buffer.element_type()));
  if (argument != (strip.part < pk::Part::kResult) || count != plan.elements(strip) || item != strip.item) {
    throw std::invalid_argument("pykernels: buffer " + std::to_string(index) + ": " + std::to_string(count) +
                                " items of " + std::to_string(item) + " bytes are not what the layout has");
  }
}

void run_one_pass(ffi::ThreadPool& pool, std::string_view key, std::string_view ir,
                  std::string_view streaming_key, std::string_view streaming_ir, const pk::PassPlan& plan,
                  const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results) {
  if (plan.strips.size() != arguments.size() + results.size()) {
    throw std::invalid_argument("pykernels: the layout has " + std::to_string(plan.strips.size()) +
                                " buffers, XLA " + std::to_string(arguments.size() + results.size()));
  }
  std::vector<void*> buffers;
  const auto take = [&](ffi::AnyBuffer buffer, bool argument) {
    check(plan, buffers.size(), buffer, argument);
    buffers.push_back(buffer.untyped_data());
  };
  for (size_t i = 0; i < arguments.size(); ++i) take(arguments.get<ffi::AnyBuffer>(i).value(), true);
  for (size_t i = 0; i < results.size(); ++i) take(*results.get<ffi::AnyBuffer>(i).value(), false);

  std::shared_ptr<const pk::Code> plain, streaming;  // held until the call ends
  const auto address = [](const std::shared_ptr<const pk::Code>& code) {
    return reinterpret_cast<pk::Kernel>(code == nullptr ? nullptr : code->address);
  };
  if (plan.tasks > 0) {
    if (!streaming_key.empty() && plan.aligned(buffers.data())) {
      streaming = registry().get(streaming_key, streaming_ir, compile);
    }
    if (streaming == nullptr || plan.columns % plan.width != 0) plain = registry().get(key, ir, compile);
  }
  pk::run_pass(
      plan, {address(plain), address(streaming)}, buffers.data(), pool.num_threads(),
      [&pool](std::function<void()> closure) { pool.Schedule(std::move(closure)); }, poison.load());
}

// What XLA is told of what `run` throws.
template <typename Run>
ffi::Error reported(std::string_view key, const Run& run) {
  try {
    run();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "pykernels: no memory for the scratch of kernel " + std::string(key));
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  } catch (...) {
    return ffi::Error::Internal("pykernels: an unknown error");
  }
}

ffi::Error call(ffi::ThreadPool pool, std::string_view key, std::string_view ir, int64_t width, int64_t lanes,
                ffi::Span<const int64_t> layout, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  return reported(key, [&] { run_lanes(pool, key, ir, width, lanes, layout, arguments, results); });
}

ffi::Error call_pass(ffi::ThreadPool pool, std::string_view key, std::string_view ir,
                     std::string_view streaming_key, std::string_view streaming_ir, int64_t rows,
                     int64_t columns, int64_t width, int64_t piece, ffi::Span<const int64_t> layout,
                     ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  return reported(key, [&] {
    const pk::PassPlan plan(layout.begin(), layout.size(), rows, columns, width, piece);
    run_one_pass(pool, key, ir, streaming_key, streaming_ir, plan, arguments, results);
  });
}

// Memory as XLA gives it. `number` keeps XLA from taking two of them for one.
ffi::Error call_buffer(int64_t number, ffi::Result<ffi::AnyBuffer> buffer) {
  static_cast<void>(number);
  if (poison.load()) std::memset(buffer->untyped_data(), 0xFF, buffer->size_bytes());
  return ffi::Error::Success();
}

}  // namespace

PK_EXPORT XLA_FFI_Error* PkLanes(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(PkLanes, call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("key")
                                  .Attr<std::string_view>("ir")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("lanes")
                                  .Attr<ffi::Span<const int64_t>>("layout")
                                  .RemainingArgs()
                                  .RemainingRets());

PK_EXPORT XLA_FFI_Error* PkPasses(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(PkPasses, call_pass,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<std::string_view>("key")
                                  .Attr<std::string_view>("ir")
                                  .Attr<std::string_view>("streaming_key")
                                  .Attr<std::string_view>("streaming_ir")
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("columns")
                                  .Attr<int64_t>("width")
                                  .Attr<int64_t>("piece")
                                  .Attr<ffi::Span<const int64_t>>("layout")
                                  .RemainingArgs()
                                  .RemainingRets());

PK_EXPORT XLA_FFI_Error* PkBuffer(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(PkBuffer, call_buffer,
                              ffi::Ffi::Bind().Attr<int64_t>("number").Ret<ffi::AnyBuffer>());

PK_EXPORT int64_t pk_abi() { return kAbi; }

// The version of XLA's interface that this was built for. An older XLA refuses it, and a refused target keeps
// JAX from starting its CPU backend: native.py looks before it registers.
PK_EXPORT int64_t pk_xla_major() { return XLA_FFI_API_MAJOR; }
PK_EXPORT int64_t pk_xla_minor() { return XLA_FFI_API_MINOR; }

PK_EXPORT void pk_set_compiler(Compiler function) { compiler = function; }

PK_EXPORT void pk_set_capacity(int64_t capacity) { registry().set_capacity(capacity); }

PK_EXPORT int64_t pk_resident() { return registry().resident(); }

PK_EXPORT int64_t pk_retired(char* buffer, int64_t capacity) { return registry().retired(buffer, capacity); }

PK_EXPORT void pk_set_poison(int on) { poison = on != 0; }

namespace {

// Runs something that wants threads, on threads of its own. Returns null, or what is wrong: text that lives
// until this thread's next call.
template <typename Run>
const char* on_own_threads(const Run& run) {
  static thread_local std::string error;
  std::vector<std::thread> pool;
  const char* failed = nullptr;
  try {
    run([&pool](std::function<void()> closure) { pool.emplace_back(std::move(closure)); });
  } catch (const std::bad_alloc&) {
    failed = "pykernels: no memory for scratch";
  } catch (const std::exception& caught) {
    error = caught.what();
    failed = error.c_str();
  }
  for (std::thread& thread : pool) thread.join();
  return failed;
}

}  // namespace

// Without XLA, for tests and benchmarks.
PK_EXPORT const char* pk_run(void* address, int64_t lanes, int64_t width, const int64_t* layout, int64_t rows,
                             void* const* buffers, int64_t threads) {
  return on_own_threads([&](const pk::Schedule& schedule) {
    pk::Plan plan(layout, static_cast<size_t>(rows) * pk::kRowNumbers, lanes, width);
    pk::run(std::move(plan), reinterpret_cast<pk::Kernel>(address), buffers, threads, schedule,
            poison.load());
  });
}

PK_EXPORT const char* pk_run_pass(void* address, int64_t rows, int64_t columns, int64_t width, int64_t piece,
                                  const int64_t* layout, int64_t strips, void* const* buffers,
                                  int64_t threads) {
  return on_own_threads([&](const pk::Schedule& schedule) {
    const pk::PassPlan plan(layout, static_cast<size_t>(strips) * pk::kRowNumbers, rows, columns, width,
                            piece);
    pk::run_pass(plan, {reinterpret_cast<pk::Kernel>(address)}, buffers, threads, schedule, poison.load());
  });
}
