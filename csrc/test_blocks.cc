// Tests of blocks.h without XLA or Python; run under sanitizers by .ci/run.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "blocks.h"

// assert() goes away in Release; this does not.
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

// Too much memory is an error of ours to report, not one of the sanitizer's. Visible, or the sanitizer does
// not find them.
#ifndef _WIN32
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "allocator_may_return_null=1";
}
#endif

namespace {

using pk::Plan;

enum : int64_t { kInput, kSilent, kShared, kResult, kSum, kScratch };
enum : int64_t { kFloat32, kFloat64, kInt32, kInt64 };

// Threads that are started at once and joined when the pool goes.
struct Threads {
  ~Threads() {
    for (auto& thread : all) thread.join();
  }
  pk::Schedule schedule() {
    return [this](std::function<void()> closure) { all.emplace_back(std::move(closure)); };
  }
  std::vector<std::thread> all;
};

void run(const std::vector<int64_t>& layout, int64_t lanes, int64_t width, pk::Kernel kernel,
         const std::vector<void*>& buffers, int64_t threads, bool poison = false) {
  Threads pool;
  pk::run(Plan(layout.data(), layout.size(), lanes, width), kernel, buffers.data(), threads, pool.schedule(),
          poison);
}

template <typename Exception>
std::string message(const std::function<void()>& action) {
  try {
    action();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing thrown";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// One kernel for most tests: x (2 per lane), a silent weight, a shared factor -> y (2 per lane), a sum, an
// integer sum, through scratch. Its width is a global because kernels are compiled for one.
std::atomic<int64_t> kernel_width{4};
std::atomic<int64_t> uneven{0};  // blocks spin for up to this many rounds, so that they end out of order

const std::vector<int64_t> kLayout = {
    kInput, 2, 8, kFloat64, kSilent, 1, 8, kFloat64, kShared,  1, 8, kFloat64, kResult,  2, 8, kFloat64,
    kSum,   1, 8, kFloat64, kSum,    3, 4, kInt32,   kScratch, 2, 8, kFloat64, kScratch, 1, 4, kFloat32,
};

void kernel(void* const* p, const int64_t* s) {
  const auto* x = static_cast<const double*>(p[0]);
  const auto* weight = static_cast<const double*>(p[1]);
  const double factor = *static_cast<const double*>(p[2]);
  auto* y = static_cast<double*>(p[3]);
  auto* sum = static_cast<double*>(p[4]);
  auto* counts = static_cast<int32_t*>(p[5]);
  auto* scratch = static_cast<double*>(p[6]);
  const int64_t width = kernel_width;
  CHECK(s[2] == 0 && s[4] == 0 && s[5] == 0 && s[6] == width && s[7] == width);
  CHECK(reinterpret_cast<uintptr_t>(scratch) % 64 == 0 && reinterpret_cast<uintptr_t>(p[7]) % 64 == 0);
  std::atomic<int64_t> spun{0};
  const int64_t rounds = uneven == 0 ? 0 : static_cast<int64_t>(std::fabs(x[0])) * 7919 % uneven;
  while (spun < rounds) ++spun;
  double total = 0;
  for (int64_t i = 0; i < width; ++i) {
    scratch[i] = factor * x[i];
    scratch[s[6] + i] = factor * x[s[0] + i];
    static_cast<float*>(p[7])[i] = 1;
  }
  for (int64_t i = 0; i < width; ++i) {
    y[i] = scratch[i] + 1;
    y[s[3] + i] = scratch[s[6] + i] - 1;
    total += weight[i] * scratch[i];
  }
  *sum = total;
  for (int k = 0; k < 3; ++k) counts[k] = k + 1;
}

struct Ensemble {
  explicit Ensemble(int64_t lanes_) : lanes(lanes_), x(2 * lanes_), weight(lanes_), y(2 * lanes_, -7) {
    for (int64_t i = 0; i < lanes; ++i) {
      x[i] = std::sin(double(i)) * 1e3;
      x[lanes + i] = double(i);
      weight[i] = 1.0 / double(i + 1);
    }
  }

  void go(int64_t width, int64_t threads, bool poison = false) {
    kernel_width = width;
    run(kLayout, lanes, width, kernel, {x.data(), weight.data(), &factor, y.data(), &sum, counts}, threads,
        poison);
  }

  // The sum in the promised order.
  double expected_sum(int64_t width) const {
    const int64_t blocks = (lanes + width - 1) / width;
    const int64_t per_task = std::max<int64_t>((blocks + pk::kMostTasks - 1) / pk::kMostTasks, 1);
    double all = 0;
    for (int64_t first = 0; first < blocks; first += per_task) {
      double task = 0;
      for (int64_t block = first; block < std::min(first + per_task, blocks); ++block) {
        double part = 0;
        for (int64_t i = block * width; i < (block + 1) * width; ++i)
          part += i < lanes ? weight[i] * (factor * x[i]) : 0;
        task = block == first ? part : task + part;
      }
      all = first == 0 ? task : all + task;
    }
    return all;
  }

  void check(int64_t width) const {
    for (int64_t i = 0; i < lanes; ++i) {
      CHECK(y[i] == factor * x[i] + 1);
      CHECK(y[lanes + i] == factor * x[lanes + i] - 1);
    }
    CHECK(sum == expected_sum(width));
    const int64_t blocks = (lanes + width - 1) / width;
    for (int k = 0; k < 3; ++k) CHECK(counts[k] == blocks * (k + 1));
  }

  int64_t lanes;
  double factor = 1.5;
  std::vector<double> x, weight, y;
  double sum = -7;
  int32_t counts[3] = {-7, -7, -7};
};

void test_lanes_and_sums() {
  for (const int64_t lanes : {0, 1, 7, 8, 9, 1023, 5000}) {
    for (const int64_t width : {1, 4, 8, 16}) {
      for (const int64_t threads : {0, 1, 2, 8}) {
        for (const bool poison : {false, true}) {
          if (lanes > 1023 && (threads == 0 || poison)) continue;
          Ensemble ensemble(lanes);
          ensemble.go(width, threads, poison);
          ensemble.check(width);
        }
      }
    }
  }
}

void test_out_of_order() {
  uneven = 20000;
  for (int round = 0; round < 3; ++round) {
    Ensemble ensemble(3001);
    ensemble.go(2, 8);
    ensemble.check(2);
  }
  uneven = 0;
}

void test_plan() {
  const std::vector<int64_t> layout = {kScratch, 512, 8, 0, kScratch, 512, 8, 0, kScratch, 512, 8, 0};
  const Plan plan(layout.data(), layout.size(), 1 << 20, 8);
  CHECK(plan.blocks == 1 << 17 && plan.blocks_per_task == 128 && plan.tasks == 1024 && plan.buffers == 0);
  for (size_t i = 1; i < 3; ++i) {
    CHECK(plan.offsets[i] % 64 == 0);
    CHECK((plan.offsets[i] - plan.offsets[i - 1]) % 4096 != 0);  // not all in one cache set
  }
  for (const int64_t lanes : {1, 8192, 8193, 16383, 1 << 20}) {
    const Plan cut(nullptr, 0, lanes, 8);
    CHECK(cut.tasks <= pk::kMostTasks);
    CHECK((cut.tasks - 1) * cut.blocks_per_task < cut.blocks &&
          cut.blocks <= cut.tasks * cut.blocks_per_task);
  }
}

// What the padded copies hold, seen by the kernel.
void look(void* const* p, const int64_t* s) {
  const auto* repeated = static_cast<const int32_t*>(p[0]);
  const auto* silent = static_cast<const uint8_t*>(p[1]);
  auto* out = static_cast<int32_t*>(p[2]);
  if (repeated[0] == 8) {  // the last block: lanes 8, 9 and two that do not exist
    CHECK(s[0] == 4 && s[1] == 4 && s[2] == 4);
    for (int e = 0; e < 3; ++e) {
      const int32_t row[] = {8 + 100 * e, 9 + 100 * e, 9 + 100 * e, 9 + 100 * e};
      CHECK(std::memcmp(repeated + e * s[0], row, sizeof row) == 0);
    }
    const uint8_t row[] = {208, 209, 0, 0};
    CHECK(std::memcmp(silent, row, sizeof row) == 0);
  } else {
    CHECK(s[0] == 10 && s[1] == 10 && s[2] == 10);
  }
  for (int i = 0; i < 4; ++i) out[i] = silent[i];
}

void test_padding() {
  std::vector<int32_t> x(30), y(10 + 2, -7);
  std::vector<uint8_t> z(10);
  for (int i = 0; i < 10; ++i) {
    for (int e = 0; e < 3; ++e) x[10 * e + i] = i + 100 * e;
    z[i] = static_cast<uint8_t>(200 + i);
  }
  run({kInput, 3, 4, kInt32, kSilent, 1, 1, 0, kResult, 1, 4, kInt32}, 10, 4, look,
      {x.data(), z.data(), y.data()}, 2);
  for (int i = 0; i < 10; ++i) CHECK(y[i] == 200 + i);
  CHECK(y[10] == -7 && y[11] == -7);
}

void lazy(void* const* p, const int64_t*) {  // leaves most of what it could write alone
  static_cast<float*>(p[1])[1] += 1;
}

void test_poison() {
  std::vector<float> x(6, 1), y(6, 2);
  run({kInput, 1, 4, kFloat32, kResult, 1, 4, kFloat32}, 6, 3, lazy, {x.data(), y.data()}, 1, true);
  for (const float value : y) CHECK(std::isnan(value));
  CHECK(x[0] == 1);
  // A result in its input's place: nothing to poison, and padded lanes keep what is left alone.
  run({kInput, 1, 4, kFloat32, kResult, 1, 4, kFloat32}, 6, 4, lazy, {x.data(), x.data()}, 1, true);
  CHECK((x == std::vector<float>{1, 2, 1, 1, 1, 2}));
}

void test_late_and_inline_closures() {
  for (int kind = 0; kind < 3; ++kind) {
    std::vector<std::function<void()>> late;
    {
      Ensemble ensemble(100);
      kernel_width = 4;
      void* buffers[] = {ensemble.x.data(), ensemble.weight.data(), &ensemble.factor,
                         ensemble.y.data(), &ensemble.sum,          ensemble.counts};
      int64_t scheduled = 0;
      pk::run(
          Plan(kLayout.data(), kLayout.size(), 100, 4), kernel, buffers, 8,
          [&](std::function<void()> closure) {
            ++scheduled;
            if (kind == 0) late.push_back(std::move(closure));  // begins after the call: as in a forked child
            if (kind == 1) closure();                           // runs in the caller: as in a full pool
            if (kind == 2) throw std::runtime_error("no pool");
          },
          false);
      CHECK(scheduled == (kind == 2 ? 1 : 7));
      ensemble.check(4);
    }
    for (auto& closure : late) closure();  // the buffers are gone: a sanitizer would see a touch
  }
  Ensemble one(4);
  void* buffers[] = {one.x.data(), one.weight.data(), &one.factor, one.y.data(), &one.sum, one.counts};
  pk::run(
      Plan(kLayout.data(), kLayout.size(), 4, 4), kernel, buffers, 8,
      [](std::function<void()>) { CHECK(false); }, false);
  one.check(4);
}

void test_errors() {
  const auto plan = [](std::vector<int64_t> layout, int64_t lanes = 8, int64_t width = 4) {
    return message<std::invalid_argument>([=] { Plan(layout.data(), layout.size(), lanes, width); });
  };
  CHECK(contains(plan({}, 8, 0), "a block of 0 lanes"));
  CHECK(contains(plan({}, -1), "an ensemble of -1 lanes"));
  CHECK(contains(plan({0, 1, 8}), "3 numbers"));
  CHECK(contains(plan({6, 1, 8, 0}), "row 0: unknown role 6"));
  CHECK(contains(plan({-1, 1, 8, 0}), "unknown role -1"));
  CHECK(contains(plan({kInput, -1, 8, 0}), "-1 elements"));
  CHECK(contains(plan({kInput, 1, 0, 0}), "items of 0 bytes"));
  CHECK(contains(plan({kSum, 1, 8, kFloat32}), "4 bytes, not 8"));
  CHECK(contains(plan({kSum, 1, 4, kInt64}), "8 bytes, not 4"));
  CHECK(contains(plan({kSum, 1, 4, 4}), "unknown dtype code 4"));
  CHECK(contains(plan({kResult, 1, 8, 0, kInput, 1, 8, 0}), "row 1: inputs come first"));
  CHECK(contains(plan({kScratch, 1, 8, 0, kResult, 1, 8, 0}), "inputs come first"));
  CHECK(contains(plan({kScratch, int64_t{1} << 60, 8, 0}), "address space"));
  CHECK(contains(plan({kResult, 1, 8, 0}, int64_t{1} << 62), "address space"));
  CHECK(plan({kInput, 0,        8,       0, kSum, 0, 8,        kInt64, kSum, 1,
              8,      kFloat64, kResult, 1, 1,    0, kScratch, 0,      1,    0}) == "nothing thrown");

  // No memory for scratch: an error whoever claims the tasks, and the next call works.
  const auto huge = [] { run({kScratch, int64_t{1} << 55, 1, 0}, 8, 4, lazy, {}, 2); };
  CHECK(message<std::bad_alloc>(huge) != "nothing thrown");
  Ensemble ensemble(9);
  ensemble.go(4, 2);
  ensemble.check(4);
}

void touch(void* const* p, const int64_t* s) {
  static_cast<char*>(p[0])[(int64_t{9} << 20) * s[0]] = 1;
  static_cast<char*>(p[1])[0] = 1;
}

void test_large_scratch() {  // more than a thread keeps
  std::vector<char> y(16);
  const std::vector<int64_t> layout = {kResult, 1, 1, 0, kScratch, (int64_t{9} << 20) + 1, 1, 0};
  run(
      layout, 16, 8,
      [](void* const* p, const int64_t* s) {
        void* swapped[] = {p[1], p[0]};
        touch(swapped, s + 1);
      },
      {y.data()}, 2);
  CHECK(y[0] == 1 && y[8] == 1);
}

std::string retired(pk::Registry& registry, int64_t capacity = 1000) {
  std::string keys(static_cast<size_t>(capacity), '\0');
  keys.resize(static_cast<size_t>(registry.retired(&keys[0], capacity)));
  return keys;
}

void test_registry() {
  pk::Registry registry;
  int marker = 0, compiled = 0;
  const pk::Compile compile = [&](std::string_view key, std::string_view ir) -> void* {
    CHECK(ir == "ir of " + std::string(key));
    ++compiled;
    return key == "bad" ? nullptr : &marker;
  };
  const auto get = [&](const std::string& key) { return registry.get(key, "ir of " + key, compile); };

  registry.set_capacity(2);
  CHECK(get("a")->address == &marker && get("a") == get("a") && compiled == 1);
  get("b");
  get("a");  // b is now the least recently used
  auto c = get("c");
  CHECK(registry.resident() == 2 && compiled == 3 && retired(registry) == "b" && retired(registry).empty());
  get("a");
  CHECK(compiled == 3);
  get("d");  // drops c, which is in use
  CHECK(retired(registry).empty());
  const auto* address = c.get();
  CHECK(get("c").get() == address && compiled == 4);  // found again, not compiled
  CHECK(registry.resident() == 2 && retired(registry) == "a");
  registry.set_capacity(0);
  CHECK(registry.resident() == 0 && retired(registry) == "d");
  c.reset();
  CHECK(retired(registry, 0).empty() && retired(registry) == "c");

  // A key that is compiled again before anyone asked is not reported: it is in use.
  get("e");
  registry.set_capacity(1);
  const auto e = get("e");
  CHECK(compiled == 6 && retired(registry).empty());
  registry.set_capacity(0);

  // What does not fit stays.
  get("long long key");
  get("f");
  CHECK(retired(registry, 5) == "f" && retired(registry, 5).empty() && retired(registry) == "long long key");
  get("g");
  get("h");
  const std::string both = retired(registry);
  CHECK(both == "g\nh" || both == "h\ng");

  CHECK(contains(message<std::runtime_error>([&] { get("bad"); }), "no kernel"));
  const int before = compiled;
  CHECK(contains(message<std::runtime_error>([&] { get("bad"); }), "no kernel"));
  CHECK(compiled == before + 1 && registry.resident() == 0);  // a failure is not remembered
}

void test_registry_threads() {
  pk::Registry registry;
  registry.set_capacity(3);
  int markers[8];
  std::atomic<int> running[8] = {}, compiled[8] = {}, together{0}, most{0}, failures{0};
  const pk::Compile compile = [&](std::string_view key, std::string_view) -> void* {
    const int k = key[0] - '0';
    CHECK(running[k]++ == 0);
    const int now = ++together;
    for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(k == 7 ? 30 : 1));
    --together;
    --running[k];
    ++compiled[k];
    if (k == 7) throw std::runtime_error("seven");
    return &markers[k];
  };
  std::atomic<int> at_gate{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      ++at_gate;
      while (at_gate < 6) std::this_thread::yield();
      const std::string why = message<std::runtime_error>([&] { registry.get("7", "", compile); });
      failures += why == "seven";
      for (int i = 0; i < 200; ++i) {
        const int k = (i * (t + 1)) % 6;
        const auto code = registry.get(std::to_string(k), "", compile);
        CHECK(code->address == &markers[k]);
        if (i % 16 == 0) retired(registry);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(failures == 6 && compiled[7] >= 1 && most >= 2);
  CHECK(registry.resident() == 3);
}

void test_once_per_key() {
  pk::Registry registry;
  std::atomic<int> compiled{0};
  int marker = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      const auto code = registry.get("key", "", [&](std::string_view, std::string_view) -> void* {
        ++compiled;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        return &marker;
      });
      CHECK(code->address == &marker);
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(compiled == 1);
}

void test_calls_together() {  // several callers, each with helpers, as devices of one host
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([t] {
      for (int i = 0; i < 10; ++i) {
        Ensemble ensemble(500 + 13 * t + i);
        ensemble.go(4, 3);
        ensemble.check(4);
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

void test_fork() {
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
  static pk::Registry registry;
  std::atomic<bool> compiling{false}, forked{false};
  static int marker;
  std::thread other([&] {  // compiles while the process forks
    registry.get("slow", "", [&](std::string_view, std::string_view) -> void* {
      compiling = true;
      while (!forked) std::this_thread::yield();
      return &marker;
    });
  });
  while (!compiling) std::this_thread::yield();
  registry.before_fork();
  const pid_t child = fork();
  if (child == 0) {
    registry.after_fork_in_child();
    alarm(20);
    const auto compile = [](std::string_view, std::string_view) -> void* { return &marker; };
    CHECK(registry.get("slow", "", compile)->address ==
          &marker);  // does not wait for a thread that is not here
    CHECK(registry.get("new", "", compile)->address == &marker && registry.resident() == 2);
    registry.before_fork();
    registry.after_fork_in_parent();
    _exit(0);
  }
  registry.after_fork_in_parent();
  forked = true;
  other.join();
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(registry.resident() == 1);
#endif
}

}  // namespace

int main() {
  test_plan();
  test_lanes_and_sums();
  test_out_of_order();
  test_padding();
  test_poison();
  test_late_and_inline_closures();
  test_errors();
  test_large_scratch();
  test_registry();
  test_registry_threads();
  test_once_per_key();
  test_calls_together();
  test_fork();
  std::puts("test_blocks: all passed");
}
