#include "blocks.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

namespace pk {
namespace {

// A gap after each of a worker's buffers. Without it, buffers whose size is a power of two would all begin in
// the same cache set and evict each other; three lines, because three shares no divisor with the number of
// sets.
constexpr int64_t kGap = 3 * kAlignment;

[[noreturn]] void reject(size_t row, const std::string& why) {
  throw std::invalid_argument("pykernels: layout row " + std::to_string(row) + ": " + why);
}

int64_t multiply(int64_t a, int64_t b) {  // of non-negative numbers
  if (b != 0 && a > std::numeric_limits<int64_t>::max() / 2 / b) {
    throw std::invalid_argument("pykernels: a buffer of the layout is larger than the address space");
  }
  return a * b;
}

// Appends a buffer to a worker's memory, returns its offset.
int64_t append(int64_t& end, int64_t bytes) {
  const int64_t offset = end;
  if (bytes > std::numeric_limits<int64_t>::max() / 2 - end) {
    throw std::invalid_argument("pykernels: a block's scratch is larger than the address space");
  }
  end += (bytes + kAlignment - 1) / kAlignment * kAlignment + kGap;
  return offset;
}

bool has_lanes(Role role) { return role != Role::kShared && role != Role::kSum; }
bool is_input(Role role) { return role <= Role::kShared; }
bool is_copied(Role role) { return has_lanes(role) && role != Role::kScratch; }

void check(const Row& row, size_t index, Role previous) {
  if (row.role < Role::kInput || row.role > Role::kScratch) {
    reject(index, "unknown role " + std::to_string(static_cast<int64_t>(row.role)));
  }
  const bool ordered =
      is_input(row.role) ? is_input(previous) : row.role == Role::kScratch || previous != Role::kScratch;
  if (!ordered) reject(index, "inputs come first, then results, then scratch");
  if (row.elements < 0) reject(index, std::to_string(row.elements) + " elements");
  if (row.item < 1) reject(index, "items of " + std::to_string(row.item) + " bytes");
  if (row.role != Role::kSum) return;
  switch (static_cast<Number>(row.dtype)) {
    case Number::kFloat32:
    case Number::kInt32:
      if (row.item != 4)
        reject(index, "a sum of 32-bit numbers has items of 4 bytes, not " + std::to_string(row.item));
      return;
    case Number::kFloat64:
    case Number::kInt64:
      if (row.item != 8)
        reject(index, "a sum of 64-bit numbers has items of 8 bytes, not " + std::to_string(row.item));
      return;
  }
  reject(index, "unknown dtype code " + std::to_string(row.dtype) + " of a sum");
}

template <typename T>
void add(char* total, const char* part, int64_t elements) {
  T* to = reinterpret_cast<T*>(total);
  const T* from = reinterpret_cast<const T*>(part);
  for (int64_t i = 0; i < elements; ++i) to[i] += from[i];
}

void add(const Row& row, char* total, const char* part) {
  switch (static_cast<Number>(row.dtype)) {
    case Number::kFloat32:
      return add<float>(total, part, row.elements);
    case Number::kFloat64:
      return add<double>(total, part, row.elements);
    case Number::kInt32:  // unsigned: integers wrap around, as XLA's do
      return add<uint32_t>(total, part, row.elements);
    case Number::kInt64:
      return add<uint64_t>(total, part, row.elements);
  }
}

// What the caller and the closures of one call share.
class Call {
 public:
  Call(Plan plan, Kernel kernel, void* const* buffers, bool poison);

 private:
  friend class Worker;
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  void fold(int64_t task, const char* sums);
  void add_to_total(const char* sums);

  const Plan plan_;
  const Kernel kernel_;
  const bool poison_;
  std::vector<char*> buffers_;
  std::vector<size_t> alias_;  // per row: the input whose buffer a result shares, or kNone

  std::mutex mutex_;                                  // for all below
  int64_t folded_ = 0;                                // tasks whose sums are in the results
  std::map<int64_t, std::unique_ptr<char[]>> early_;  // sums of tasks that ended before an earlier one
};

// A thread at work on a call.
class Worker {
 public:
  explicit Worker(Call& call)
      : call_(call), plan_(call.plan_), pointers_(plan_.rows.size()), strides_(plan_.rows.size()) {}
  ~Worker() { trim_thread_memory(); }

  void run(int64_t task);

 private:
  void run_block(int64_t block);
  void point(int64_t block, bool padded);
  void copy_in(int64_t first, int64_t present);
  void copy_out(int64_t first, int64_t present);
  void poison();
  int64_t row_bytes(const Row& row) const { return plan_.width * row.item; }

  Call& call_;
  const Plan& plan_;
  char* memory_ = nullptr;
  std::vector<void*> pointers_;
  std::vector<int64_t> strides_;
};

Call::Call(Plan plan, Kernel kernel, void* const* buffers, bool poison)
    : plan_(std::move(plan)), kernel_(kernel), poison_(poison), alias_(plan_.rows.size(), kNone) {
  for (size_t i = 0; i < plan_.buffers; ++i) {
    buffers_.push_back(static_cast<char*>(buffers[i]));
    const Row& row = plan_.rows[i];
    if (row.role != Role::kResult || row.elements == 0) continue;
    for (size_t j = 0; j < i; ++j) {
      const Row& input = plan_.rows[j];
      const bool same = input.elements == row.elements && input.item == row.item;
      if (same && is_input(input.role) && has_lanes(input.role) && buffers[j] == buffers[i]) alias_[i] = j;
    }
  }
}

// Adds the tasks' sums to the results in the order of the tasks. Those that come early wait in `early_`, so
// memory grows with how far threads drift apart, not with the number of tasks.
void Call::fold(int64_t task, const char* sums) {
  if (plan_.sums_bytes == 0) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (task != folded_) {
    std::unique_ptr<char[]> copy(new char[static_cast<size_t>(plan_.sums_bytes)]);
    std::memcpy(copy.get(), sums, static_cast<size_t>(plan_.sums_bytes));
    early_.emplace(task, std::move(copy));
    return;
  }
  add_to_total(sums);
  while (!early_.empty() && early_.begin()->first == folded_) {
    add_to_total(early_.begin()->second.get());
    early_.erase(early_.begin());
  }
}

void Call::add_to_total(const char* sums) {
  for (size_t i = 0; i < plan_.buffers; ++i) {
    const Row& row = plan_.rows[i];
    if (row.role != Role::kSum || row.elements == 0) continue;
    if (folded_ == 0) {
      std::memcpy(buffers_[i], sums + plan_.offsets[i], static_cast<size_t>(row.elements * row.item));
    } else {
      add(row, buffers_[i], sums + plan_.offsets[i]);
    }
  }
  ++folded_;
}

void Worker::run(int64_t task) {
  const int64_t first = task * plan_.blocks_per_task;
  const int64_t last = std::min(first + plan_.blocks_per_task, plan_.blocks);
  const bool padded = last == plan_.blocks && plan_.lanes % plan_.width != 0;
  memory_ = thread_memory(padded ? plan_.padded_bytes : plan_.bytes);
  char* const sums = memory_ + plan_.sums_bytes;
  for (int64_t block = first; block < last; ++block) {
    run_block(block);
    if (plan_.sums_bytes == 0) continue;
    if (block == first) {
      std::memcpy(sums, memory_, static_cast<size_t>(plan_.sums_bytes));
      continue;
    }
    for (size_t i = 0; i < plan_.buffers; ++i) {
      if (plan_.rows[i].role == Role::kSum)
        add(plan_.rows[i], sums + plan_.offsets[i], memory_ + plan_.offsets[i]);
    }
  }
  call_.fold(task, sums);
}

void Worker::run_block(int64_t block) {
  const int64_t first = block * plan_.width;
  const int64_t present = std::min(plan_.width, plan_.lanes - first);
  const bool padded = present < plan_.width;
  point(first, padded);
  if (padded) copy_in(first, present);
  if (call_.poison_) poison();
  call_.kernel_(pointers_.data(), strides_.data());
  if (padded) copy_out(first, present);
}

// Sets the kernel's pointers and strides for the block that begins with lane `first`.
void Worker::point(int64_t first, bool padded) {
  for (size_t i = 0; i < plan_.rows.size(); ++i) {
    const Row& row = plan_.rows[i];
    if (row.role == Role::kShared) {
      pointers_[i] = call_.buffers_[i];
      strides_[i] = 0;
    } else if (row.role == Role::kSum) {
      pointers_[i] = memory_ + plan_.offsets[i];
      strides_[i] = 0;
    } else if (row.role == Role::kScratch || padded) {
      // A result in its input's place is there in the copies too: what a kernel leaves alone then keeps its
      // value.
      const size_t alias = call_.alias_[i];
      pointers_[i] = memory_ + plan_.offsets[alias == Call::kNone ? i : alias];
      strides_[i] = plan_.width;
    } else {
      pointers_[i] = row.elements == 0 ? nullptr : call_.buffers_[i] + first * row.item;
      strides_[i] = plan_.lanes;
    }
  }
}

void Worker::copy_in(int64_t first, int64_t present) {
  for (size_t i = 0; i < plan_.buffers; ++i) {
    const Row& row = plan_.rows[i];
    if (row.role != Role::kInput && row.role != Role::kSilent) continue;
    const int64_t bytes = present * row.item;
    for (int64_t e = 0; e < row.elements; ++e) {
      char* to = static_cast<char*>(pointers_[i]) + e * row_bytes(row);
      std::memcpy(to, call_.buffers_[i] + (e * plan_.lanes + first) * row.item, static_cast<size_t>(bytes));
      if (row.role == Role::kSilent) {
        std::memset(to + bytes, 0, static_cast<size_t>(row_bytes(row) - bytes));
      } else {
        for (int64_t at = bytes; at < row_bytes(row); at += row.item) {
          std::memcpy(to + at, to + bytes - row.item, static_cast<size_t>(row.item));
        }
      }
    }
  }
}

void Worker::copy_out(int64_t first, int64_t present) {
  for (size_t i = 0; i < plan_.buffers; ++i) {
    const Row& row = plan_.rows[i];
    if (row.role != Role::kResult) continue;
    for (int64_t e = 0; e < row.elements; ++e) {
      const char* from = static_cast<const char*>(pointers_[i]) + e * row_bytes(row);
      char* to = call_.buffers_[i] + (e * plan_.lanes + first) * row.item;
      std::memcpy(to, from, static_cast<size_t>(present * row.item));
    }
  }
}

void Worker::poison() {
  for (size_t i = 0; i < plan_.rows.size(); ++i) {
    const Row& row = plan_.rows[i];
    if (is_input(row.role) || call_.alias_[i] != Call::kNone)
      continue;  // a result may be in its input's place
    char* const start = static_cast<char*>(pointers_[i]);
    if (row.role == Role::kSum) {
      std::memset(start, 0xFF, static_cast<size_t>(row.elements * row.item));
      continue;
    }
    for (int64_t e = 0; e < row.elements; ++e) {
      std::memset(start + e * strides_[i] * row.item, 0xFF, static_cast<size_t>(row_bytes(row)));
    }
  }
}

}  // namespace

Plan::Plan(const int64_t* layout, size_t numbers, int64_t lanes_, int64_t width_)
    : buffers(0),
      lanes(lanes_),
      width(width_),
      blocks(0),
      blocks_per_task(1),
      tasks(0),
      sums_bytes(0),
      bytes(0),
      padded_bytes(0) {
  if (width < 1) throw std::invalid_argument("pykernels: a block of " + std::to_string(width) + " lanes");
  if (lanes < 0) throw std::invalid_argument("pykernels: an ensemble of " + std::to_string(lanes) + " lanes");
  if (numbers % kRowNumbers != 0) {
    throw std::invalid_argument("pykernels: the layout has " + std::to_string(numbers) +
                                " numbers, not four per buffer");
  }
  blocks = lanes / width + (lanes % width != 0);
  blocks_per_task = std::max<int64_t>(blocks / kMostTasks + (blocks % kMostTasks != 0), 1);
  tasks = blocks / blocks_per_task + (blocks % blocks_per_task != 0);

  Role previous = Role::kInput;
  for (size_t i = 0; i < numbers / kRowNumbers; ++i) {
    const int64_t* n = layout + i * kRowNumbers;
    const Row row{static_cast<Role>(n[0]), n[1], n[2], n[3]};
    check(row, i, previous);
    previous = row.role;
    rows.push_back(row);
    buffers += row.role != Role::kScratch;
    // Checked once here, so that no product of these overflows later.
    multiply(multiply(row.elements, row.item), has_lanes(row.role) ? std::max(lanes, width) : 1);
  }

  offsets.resize(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].role == Role::kSum) offsets[i] = append(sums_bytes, rows[i].elements * rows[i].item);
  }
  bytes = multiply(sums_bytes, 2);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].role == Role::kScratch) offsets[i] = append(bytes, rows[i].elements * rows[i].item * width);
  }
  padded_bytes = bytes;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (is_copied(rows[i].role)) offsets[i] = append(padded_bytes, rows[i].elements * rows[i].item * width);
  }
}

void run(Plan plan, Kernel kernel, void* const* buffers, int64_t threads, const Schedule& schedule,
         bool poison) {
  if (plan.tasks == 0) {
    for (size_t i = 0; i < plan.buffers; ++i) {
      const Row& row = plan.rows[i];
      if (row.role == Role::kSum && row.elements > 0)
        std::memset(buffers[i], 0, static_cast<size_t>(row.elements * row.item));
    }
    return;
  }
  const int64_t tasks = plan.tasks;
  const auto call = std::make_shared<Call>(std::move(plan), kernel, buffers, poison);
  share(tasks, threads, schedule, [call]() -> Work {
    const auto worker = std::make_shared<Worker>(*call);
    return [call, worker](int64_t task) { worker->run(task); };
  });
}

std::shared_ptr<const Code> Registry::get(std::string_view key_view, std::string_view ir,
                                          const Compile& compile) {
  const std::string key(key_view);
  {
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = resident_.find(key);
    if (found != resident_.end()) {
      found->second->used = ++clock_;
      return found->second;
    }
  }
  std::unique_lock<std::shared_mutex> lock(mutex_);
  if (const auto found = resident_.find(key); found != resident_.end()) {  // compiled since
    found->second->used = ++clock_;
    return found->second;
  }
  if (const auto found = pending_.find(key); found != pending_.end()) {
    const std::shared_ptr<Pending> other = found->second;
    compiled_.wait(lock, [&other] { return other->done; });
    if (other->code == nullptr) throw std::runtime_error(other->error);
    return other->code;
  }
  bool held = false;  // does the compiler still hold code of this key that it may free?
  if (const auto found = evicted_.find(key); found != evicted_.end()) {
    std::shared_ptr<const Code> code = found->second.lock();
    evicted_.erase(found);
    if (code != nullptr) {
      keep(key, code);
      return code;
    }
    held = true;
  }
  const auto mine = std::make_shared<Pending>();
  pending_.emplace(key, mine);
  lock.unlock();

  std::shared_ptr<Code> code;
  std::string error;
  try {
    code = std::make_shared<Code>();
    code->address = compile(key, ir);
    if (code->address == nullptr) throw std::runtime_error("pykernels: the compiler returned no kernel");
  } catch (const std::exception& caught) {
    code = nullptr;
    error = caught.what();
  } catch (...) {
    code = nullptr;
    error = "pykernels: the compiler failed";
  }

  lock.lock();
  pending_.erase(key);
  mine->done = true;
  mine->code = code;
  mine->error = error;
  compiled_.notify_all();  // first: nothing that goes wrong below may leave the others waiting
  if (code != nullptr) {
    keep(key, code);
  } else if (held) {
    evicted_.emplace(key, std::weak_ptr<const Code>());
  }
  if (code == nullptr) throw std::runtime_error(error);
  return code;
}

void Registry::keep(const std::string& key, std::shared_ptr<const Code> code) {
  code->used = ++clock_;
  resident_[key] = std::move(code);
  evict();
}

void Registry::evict() {
  while (static_cast<int64_t>(resident_.size()) > capacity_) {
    const auto oldest =
        std::min_element(resident_.begin(), resident_.end(),
                         [](const auto& a, const auto& b) { return a.second->used < b.second->used; });
    evicted_[oldest->first] = oldest->second;
    resident_.erase(oldest);
  }
}

void Registry::set_capacity(int64_t capacity) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  capacity_ = std::max<int64_t>(capacity, 0);
  evict();
}

int64_t Registry::resident() const {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return static_cast<int64_t>(resident_.size());
}

int64_t Registry::retired(char* buffer, int64_t capacity) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  int64_t written = 0;
  for (auto entry = evicted_.begin(); entry != evicted_.end();) {
    const std::string& key = entry->first;
    const int64_t needed = static_cast<int64_t>(key.size()) + (written > 0);
    if (!entry->second.expired() || needed > capacity - written) {
      ++entry;
      continue;
    }
    if (written > 0) buffer[written++] = '\n';
    std::memcpy(buffer + written, key.data(), key.size());
    written += static_cast<int64_t>(key.size());
    entry = evicted_.erase(entry);
  }
  return written;
}

void Registry::before_fork() { mutex_.lock(); }

void Registry::after_fork_in_parent() { mutex_.unlock(); }

// Only the thread that forked exists here, under a new thread id, so unlocking would not do for a lock that
// remembers its owner (glibc's): locks are made anew. Whoever was compiling is gone, so the child compiles
// again.
void Registry::after_fork_in_child() {
  new (&mutex_) std::shared_mutex;
  new (&compiled_) std::condition_variable_any;
  pending_.clear();
}

}  // namespace pk
