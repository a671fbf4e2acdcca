#include "passes.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace pk {
namespace {

[[noreturn]] void reject(size_t strip, const std::string& why) {
  throw std::invalid_argument("pykernels: layout row " + std::to_string(strip) + ": " + why);
}

bool has_columns(Part part) { return part != Part::kRow && part != Part::kSum; }
bool is_result(Part part) { return part >= Part::kResult; }
bool has_slots(Part part) { return part == Part::kSlots || part == Part::kSlotsResult; }

int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Stores past the caches are not ordered by what releases ordinary ones.
void order_streaming_stores() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_sfence();
#endif
}

template <typename T>
void add_up(const char* parts, int64_t count, char* total) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += reinterpret_cast<const T*>(parts)[i];
  std::memcpy(total, &sum, sizeof sum);
}

// One call: what all its workers share. Sums have one part per piece, and one for what is left of a row
// behind its pieces.
class PassCall {
 public:
  PassCall(const PassPlan& plan, PassKernel kernel, void* const* buffers, bool poison);

  void add_sums();

 private:
  friend class PassWorker;

  int64_t parts_per_row() const { return plan_.pieces_per_row + 1; }

  const PassPlan plan_;
  const PassKernel kernel_;
  const Kernel whole_;  // for whole vectors
  const bool poison_;
  std::vector<char*> buffers_;
  std::vector<size_t> passed_;                  // the buffers that the kernel gets, in order
  std::vector<std::unique_ptr<char[]>> parts_;  // of each kSum, by buffer number
};

// A thread at work on a call.
class PassWorker {
 public:
  explicit PassWorker(PassCall& call)
      : call_(call),
        plan_(call.plan_),
        pointers_(call.passed_.size() + 1),
        strides_(call.passed_.size() + 1) {
    pointers_[0] = &count_;
    for (size_t i = 0; i < call.passed_.size(); ++i) {
      if (has_columns(plan_.strips[call.passed_[i]].part)) strides_[i + 1] = plan_.width;
    }
  }
  ~PassWorker() { trim_thread_memory(); }

  void run(int64_t task);

 private:
  void run_piece(int64_t row, int64_t number);
  void run_rest(int64_t row, int64_t first, int64_t present);
  char* at(size_t buffer, int64_t row, int64_t first, int64_t part) const;
  void fill(const Strip& strip, char* to, const char* from, int64_t present) const;

  PassCall& call_;
  const PassPlan& plan_;
  int32_t count_ = 0;
  std::vector<void*> pointers_;
  std::vector<int64_t> strides_;
};

PassCall::PassCall(const PassPlan& plan, PassKernel kernel, void* const* buffers, bool poison)
    : plan_(plan),
      kernel_(kernel),
      whole_(kernel.streaming != nullptr && plan.aligned(buffers) ? kernel.streaming : kernel.plain),
      poison_(poison),
      parts_(plan.strips.size()) {
  for (size_t i = 0; i < plan_.strips.size(); ++i) {
    const Strip& strip = plan_.strips[i];
    buffers_.push_back(static_cast<char*>(buffers[i]));
    if (strip.part != Part::kReplaced) passed_.push_back(i);
    // Zero: a row may have no piece, or nothing left behind its pieces.
    if (strip.part == Part::kSum) {
      parts_[i] = std::make_unique<char[]>(static_cast<size_t>(plan_.rows * parts_per_row() * strip.item));
    }
  }
}

void PassCall::add_sums() {
  for (size_t i = 0; i < plan_.strips.size(); ++i) {
    const Strip& strip = plan_.strips[i];
    if (strip.part != Part::kSum) continue;
    const int64_t count = parts_per_row();
    for (int64_t row = 0; row < plan_.rows; ++row) {
      const char* const parts = parts_[i].get() + row * count * strip.item;
      char* const total = buffers_[i] + row * strip.item;
      if (static_cast<Number>(strip.extra) == Number::kFloat32) {
        add_up<float>(parts, count, total);
      } else {
        add_up<double>(parts, count, total);
      }
    }
  }
}

void PassWorker::run(int64_t task) {
  const int64_t first = task * plan_.pieces_per_task;
  const int64_t last = std::min(first + plan_.pieces_per_task, plan_.rows * plan_.pieces_per_row);
  for (int64_t piece = first; piece < last; ++piece) {
    run_piece(piece / plan_.pieces_per_row, piece % plan_.pieces_per_row);
  }
  order_streaming_stores();
}

// Where a piece of a buffer begins; `part` is the number of the piece among a row's sums.
char* PassWorker::at(size_t buffer, int64_t row, int64_t first, int64_t part) const {
  const Strip& strip = plan_.strips[buffer];
  char* const start = call_.buffers_[buffer];
  if (strip.part == Part::kRow) return start + row * strip.item;
  if (strip.part == Part::kSum) {
    return call_.parts_[buffer].get() + (row * call_.parts_per_row() + part) * strip.item;
  }
  int64_t slot = 0;
  if (has_slots(strip.part)) {
    int32_t wanted;
    std::memcpy(&wanted, call_.buffers_[static_cast<size_t>(strip.extra)] + row * sizeof wanted,
                sizeof wanted);
    // A kernel leaves a slot that there is not alone.
    slot = wanted >= 0 && wanted < strip.slots ? wanted : 0;
  }
  return start + ((slot * plan_.rows + row) * plan_.columns + first) * strip.item;
}

void PassWorker::run_piece(int64_t row, int64_t number) {
  const int64_t first = number * plan_.piece;
  const int64_t present = std::min(plan_.piece, plan_.columns - first);
  const int64_t whole = present / plan_.width;
  if (whole > 0) {
    for (size_t i = 0; i < call_.passed_.size(); ++i) {
      const size_t buffer = call_.passed_[i];
      const Strip& strip = plan_.strips[buffer];
      char* const place = at(buffer, row, first, number);
      pointers_[i + 1] = place;
      if (call_.poison_ && strip.part == Part::kResult && !strip.extra) {
        std::memset(place, 0xFF, static_cast<size_t>(whole * plan_.width * strip.item));
      }
    }
    count_ = static_cast<int32_t>(whole);
    call_.whole_(pointers_.data(), strides_.data());
  }
  const int64_t rest = present - whole * plan_.width;
  if (rest > 0) run_rest(row, first + whole * plan_.width, rest);
}

// The last columns of a row, fewer than a vector: results are copied in too, for a kernel may leave them
// alone.
void PassWorker::run_rest(int64_t row, int64_t first, int64_t present) {
  constexpr int64_t kMostItem = 8;
  const int64_t room = (plan_.width * kMostItem + kAlignment - 1) / kAlignment * kAlignment;
  char* memory = thread_memory(room * static_cast<int64_t>(call_.passed_.size()));
  for (size_t i = 0; i < call_.passed_.size(); ++i, memory += room) {
    const size_t buffer = call_.passed_[i];
    const Strip& strip = plan_.strips[buffer];
    char* const place = at(buffer, row, first, plan_.pieces_per_row);
    pointers_[i + 1] = place;
    if (!has_columns(strip.part)) continue;
    fill(strip, memory, place, present);
    pointers_[i + 1] = memory;
  }
  count_ = 1;
  call_.kernel_.plain(pointers_.data(), strides_.data());
  for (size_t i = 0; i < call_.passed_.size(); ++i) {
    const size_t buffer = call_.passed_[i];
    const Strip& strip = plan_.strips[buffer];
    if (!is_result(strip.part) || !has_columns(strip.part)) continue;
    std::memcpy(at(buffer, row, first, 0), pointers_[i + 1], static_cast<size_t>(present * strip.item));
  }
}

void PassWorker::fill(const Strip& strip, char* to, const char* from, int64_t present) const {
  const auto bytes = static_cast<size_t>(present * strip.item),
             all = static_cast<size_t>(plan_.width * strip.item);
  std::memcpy(to, from, bytes);
  if (strip.part != Part::kRepeated) {
    std::memset(to + bytes, 0, all - bytes);
    return;
  }
  const auto item = static_cast<size_t>(strip.item);
  for (size_t place = bytes; place < all; place += item) std::memcpy(to + place, to + bytes - item, item);
}

}  // namespace

PassPlan::PassPlan(const int64_t* layout, size_t numbers, int64_t rows_, int64_t columns_, int64_t width_,
                   int64_t piece_)
    : rows(rows_),
      columns(columns_),
      width(width_),
      piece(piece_),
      pieces_per_row(0),
      pieces_per_task(1),
      tasks(0) {
  if (rows < 0 || columns < 0) throw std::invalid_argument("pykernels: a state of negative size");
  if (width < 1 || piece < width || piece % width != 0 ||
      piece / width > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("pykernels: pieces of " + std::to_string(piece) + " columns for vectors of " +
                                std::to_string(width));
  }
  if (numbers % kRowNumbers != 0) {
    throw std::invalid_argument("pykernels: the layout has " + std::to_string(numbers) +
                                " numbers, not four per buffer");
  }
  for (size_t i = 0; i < numbers / kRowNumbers; ++i) {
    const int64_t* n = layout + i * kRowNumbers;
    strips.push_back({static_cast<Part>(n[0]), n[1], n[2], n[3]});
  }
  for (size_t i = 0; i < strips.size(); ++i) {
    const Strip& strip = strips[i];
    if (strip.part < Part::kState || strip.part > Part::kSum) reject(i, "unknown part");
    if (i > 0 && is_result(strips[i - 1].part) && !is_result(strip.part)) reject(i, "operands come first");
    if (strip.item < 1 || strip.item > 8) reject(i, "items of " + std::to_string(strip.item) + " bytes");
    if (strip.part == Part::kSum) {
      const auto number = static_cast<Number>(strip.extra);
      if (!(number == Number::kFloat32 && strip.item == 4) &&
          !(number == Number::kFloat64 && strip.item == 8))
        reject(i, "a sum is of float32 or float64");
    }
    if (has_slots(strip.part)) {
      const auto from = static_cast<size_t>(strip.extra);
      if (strip.slots < 1) reject(i, "no slots");
      if (strip.extra < 0 || from >= strips.size() || strips[from].part != Part::kRow ||
          strips[from].item != 4)
        reject(i, "its slots are not in an int32 operand with one per row");
    }
    // Checked once here, so that no product of these overflows later.
    int64_t left = std::numeric_limits<int64_t>::max() / 4 / strip.item;
    for (const int64_t n : {rows, std::max(columns, piece) + 1, has_slots(strip.part) ? strip.slots : 1}) {
      left = n > 0 ? left / n : left;
    }
    if (left == 0) reject(i, "larger than the address space");
  }
  pieces_per_row = ceil_divide(columns, piece);
  // Short rows share a task: it should be worth the claim.
  pieces_per_task = columns == 0 ? 1 : std::max<int64_t>(piece / columns, 1);
  tasks = ceil_divide(rows * pieces_per_row, pieces_per_task);
}

bool PassPlan::aligned(void* const* buffers) const {
  for (size_t i = 0; i < strips.size(); ++i) {
    if (!is_result(strips[i].part) || !has_columns(strips[i].part)) continue;
    if (reinterpret_cast<uintptr_t>(buffers[i]) % kAlignment != 0) return false;
    const bool rows_are = columns * strips[i].item % kAlignment == 0;
    if (!rows_are && (rows > 1 || strips[i].slots > 1)) return false;
  }
  return true;
}

int64_t PassPlan::elements(const Strip& strip) const {
  if (!has_columns(strip.part)) return rows;
  return rows * columns * (has_slots(strip.part) || strip.slots > 0 ? strip.slots : 1);
}

void run_pass(const PassPlan& plan, PassKernel kernel, void* const* buffers, int64_t threads,
              const Schedule& schedule, bool poison) {
  const auto call = std::make_shared<PassCall>(plan, kernel, buffers, poison);
  share(plan.tasks, threads, schedule, [call]() -> Work {
    const auto worker = std::make_shared<PassWorker>(*call);
    return [call, worker](int64_t task) { worker->run(task); };
  });
  call->add_sums();
}

}  // namespace pk
