// Tests of passes.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "passes.h"

// assert() goes away in Release; this does not.
#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

namespace {

using pk::PassPlan;

enum : int64_t { kState, kRepeated, kRow, kSlots, kReplaced, kResult, kSlotsResult, kSum };
constexpr int64_t kWidth = 4, kPiece = 16, kNumbers = 3;

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

// y, k, h, slots, buffer -> y + h k, the buffer with y in each row's slot, the sum of k / y.
const std::vector<int64_t> kLayout = {
    kRepeated, 8, 0,        0, kState,  8, 0, 0, kRow,         8, 0,        0, kRow, 4, 0, 0,
    kReplaced, 8, kNumbers, 0, kResult, 8, 0, 0, kSlotsResult, 8, kNumbers, 3, kSum, 8, 0, 1,
};

void kernel(void* const* p, const int64_t* s) {
  const int32_t count = *static_cast<const int32_t*>(p[0]);
  const auto* y = static_cast<const double*>(p[1]);
  const auto* k = static_cast<const double*>(p[2]);
  const double h = *static_cast<const double*>(p[3]);
  const int32_t slot = *static_cast<const int32_t*>(p[4]);
  auto* out = static_cast<double*>(p[5]);
  auto* milestone = static_cast<double*>(p[6]);
  CHECK(count > 0 && count <= kPiece / kWidth);
  CHECK(s[0] == 0 && s[1] == kWidth && s[2] == kWidth && s[3] == 0 && s[4] == 0 && s[5] == kWidth);
  CHECK(s[6] == kWidth && s[7] == 0);
  double total = 0;
  for (int64_t i = 0; i < count * kWidth; ++i) {
    out[i] = y[i] + h * k[i];
    total += k[i] / y[i];  // a missing column must add zero
    if (slot >= 0 && slot < kNumbers) milestone[i] = y[i];
  }
  *static_cast<double*>(p[7]) = total;
}

struct State {
  State(int64_t rows_, int64_t columns_)
      : rows(rows_),
        columns(columns_),
        y(rows * columns),
        k(rows * columns),
        out(rows * columns, -7),
        h(rows),
        sums(rows, -7),
        buffer(kNumbers * rows * columns, -3),
        slots(rows) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      y[i] = 1 + std::fabs(std::sin(double(i)));
      k[i] = std::cos(double(i));
    }
    for (int64_t r = 0; r < rows; ++r) {
      h[r] = 0.1 * double(r + 1);
      slots[r] = static_cast<int32_t>(r % (kNumbers + 2)) - 1;  // some rows have no slot
    }
  }

  void go(int64_t threads, bool poison = false) {
    Threads pool;
    const PassPlan plan(kLayout.data(), kLayout.size(), rows, columns, kWidth, kPiece);
    void* const buffers[] = {y.data(),      k.data(),   h.data(),      slots.data(),
                             buffer.data(), out.data(), buffer.data(), sums.data()};
    pk::run_pass(plan, {kernel}, buffers, threads, pool.schedule(), poison);
  }

  // The sum in the promised order: piece by piece, then what is left.
  double expected_sum(int64_t row) const {
    const auto part = [&](int64_t first, int64_t last) {
      double total = 0;
      for (int64_t c = first; c < last; ++c) total += k[row * columns + c] / y[row * columns + c];
      return total;
    };
    double all = 0;
    const int64_t whole = columns / kWidth * kWidth;
    for (int64_t first = 0; first < whole; first += kPiece)
      all += part(first, std::min(first + kPiece, whole));
    return all + part(whole, columns);
  }

  void check() const {
    for (int64_t row = 0; row < rows; ++row) {
      CHECK(sums[row] == expected_sum(row));
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t i = row * columns + c;
        CHECK(out[i] == y[i] + h[row] * k[i]);
        for (int64_t slot = 0; slot < kNumbers; ++slot) {
          CHECK(buffer[slot * rows * columns + i] == (slot == slots[row] ? y[i] : -3));
        }
      }
    }
  }

  int64_t rows, columns;
  std::vector<double> y, k, out, h, sums, buffer;
  std::vector<int32_t> slots;
};

void test_sizes() {
  for (const int64_t rows : {0, 1, 3, 70}) {
    for (const int64_t columns : {0, 1, 3, 4, 5, 15, 16, 17, 64, 1023}) {
      for (const int64_t threads : {1, 4}) {
        State state(rows, columns);
        state.go(threads);
        state.check();
      }
    }
  }
}

void test_same_bits_for_any_threads() {
  State one(2, 10007);
  one.go(1);
  for (int i = 0; i < 20; ++i) {
    State many(2, 10007);
    many.go(1 + i % 7);
    CHECK(std::memcmp(one.sums.data(), many.sums.data(), one.sums.size() * sizeof(double)) == 0);
    CHECK(one.out == many.out && one.buffer == many.buffer);
  }
}

void test_poison() {
  State state(3, 37);
  state.go(2, true);
  state.check();
}

// What a kernel leaves alone keeps its value, behind the last whole vector too.
void test_results_left_alone() {
  const std::vector<int64_t> layout = {kRow, 8, 0, 0, kReplaced, 8, 0, 0, kResult, 8, 0, 1};
  const auto nothing = [](void* const*, const int64_t*) {};
  std::vector<double> h(2), state(2 * 7);
  for (size_t i = 0; i < state.size(); ++i) state[i] = double(i);
  const std::vector<double> before = state;
  void* const buffers[] = {h.data(), state.data(), state.data()};
  Threads pool;
  pk::run_pass(PassPlan(layout.data(), layout.size(), 2, 7, kWidth, kPiece), {nothing}, buffers, 2,
               pool.schedule(), true);
  CHECK(state == before);
}

void test_alignment() {
  const std::vector<int64_t> layout = {kState, 4, 0, 0, kResult, 4, 0, 0};
  alignas(64) static float memory[256];
  const auto aligned = [&](int64_t rows, int64_t columns, float* result) {
    void* const buffers[] = {memory, result};
    return PassPlan(layout.data(), layout.size(), rows, columns, 16, 64).aligned(buffers);
  };
  CHECK(aligned(1, 17, memory) && aligned(2, 16, memory));
  CHECK(!aligned(2, 17, memory) && !aligned(1, 17, memory + 1));
}

// Whole vectors of aligned rows are the streaming kernel's, the rest is not.
void test_streaming() {
  const std::vector<int64_t> layout = {kState, 4, 0, 0, kResult, 4, 0, 0};
  const auto plain = [](void* const* p, const int64_t*) {
    for (int64_t i = 0; i < 16 * *static_cast<int32_t*>(p[0]); ++i) static_cast<float*>(p[2])[i] = 1;
  };
  const auto streaming = [](void* const* p, const int64_t*) {
    CHECK(reinterpret_cast<uintptr_t>(p[2]) % 64 == 0);
    for (int64_t i = 0; i < 16 * *static_cast<int32_t*>(p[0]); ++i) static_cast<float*>(p[2])[i] = 2;
  };
  alignas(64) static float memory[256];
  const auto go = [&](int64_t rows, int64_t columns, float* result) {
    void* const buffers[] = {memory, result};
    Threads pool;
    const PassPlan plan(layout.data(), layout.size(), rows, columns, 16, 64);
    pk::run_pass(plan, {plain, streaming}, buffers, 2, pool.schedule(), false);
  };
  go(1, 85, memory);
  for (int i = 0; i < 85; ++i) CHECK(memory[i] == (i < 80 ? 2 : 1));
  go(2, 85, memory);
  for (int i = 0; i < 170; ++i) CHECK(memory[i] == 1);
  go(1, 80, memory + 1);
  for (int i = 0; i < 80; ++i) CHECK(memory[i + 1] == 1);
}

std::string message(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing thrown";
}

void test_layouts() {
  const auto why = [](const std::vector<int64_t>& layout, int64_t rows = 2, int64_t columns = 9,
                      int64_t width = 4, int64_t piece = 16) {
    return message([&] { PassPlan(layout.data(), layout.size(), rows, columns, width, piece); });
  };
  const auto has = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  const std::vector<int64_t> good = {kState, 4, 0, 0, kResult, 4, 0, 0};
  CHECK(why(good) == "nothing thrown");
  CHECK(has(why(good, -1), "negative"));
  CHECK(has(why(good, 2, 9, 4, 18), "vectors of 4") && has(why(good, 2, 9, 0, 0), "vectors of 0"));
  CHECK(has(why({kState, 4, 0}), "four per buffer"));
  CHECK(has(why({9, 4, 0, 0}), "unknown part"));
  CHECK(has(why({kResult, 4, 0, 0, kState, 4, 0, 0}), "operands come first"));
  CHECK(has(why({kState, 16, 0, 0}), "items of 16"));
  CHECK(has(why({kState, 4, 0, 0, kSum, 4, 0, 1}), "float32 or float64"));
  CHECK(has(why({kSlots, 4, 0, 1, kRow, 4, 0, 0}), "no slots"));
  CHECK(has(why({kSlots, 4, 3, 0, kRow, 4, 0, 0}), "int32 operand") &&
        has(why({kSlots, 4, 3, 7}), "int32 operand"));
  CHECK(has(why(good, int64_t{1} << 40, int64_t{1} << 40), "address space"));
}

void test_errors_come_through() {
  const std::vector<int64_t> layout = {kState, 8, 0, 0, kResult, 8, 0, 0};
  std::vector<double> memory(4000);
  void* const buffers[] = {memory.data(), memory.data()};
  Threads pool;
  const auto refuse = [](void* const*, const int64_t*) { throw std::invalid_argument("no"); };
  CHECK(message([&] {
          pk::run_pass(PassPlan(layout.data(), layout.size(), 4, 1000, kWidth, kPiece), {refuse}, buffers, 3,
                       pool.schedule(), false);
        }) == "no");
}

}  // namespace

int main() {
  test_sizes();
  test_same_bits_for_any_threads();
  test_poison();
  test_results_left_alone();
  test_alignment();
  test_streaming();
  test_layouts();
  test_errors_come_through();
  std::puts("test_passes: all passed");
}
