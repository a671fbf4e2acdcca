#include "tasks.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace pk {
namespace {

constexpr int64_t kMostKept = int64_t{64} << 20;  // memory that a thread keeps between calls

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { release(); }

  // What was there before is lost if it must grow.
  char* reserve(int64_t bytes) {
    if (bytes > capacity_) {
      release();
      memory_ = static_cast<char*>(
          ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}, std::nothrow));
      if (memory_ == nullptr) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return memory_;
  }

  void trim() {
    if (capacity_ > kMostKept) release();
  }

 private:
  void release() {
    ::operator delete(memory_, std::align_val_t{kAlignment});
    memory_ = nullptr;
    capacity_ = 0;
  }

  char* memory_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Arena arena;

class FlushSubnormals {
 public:
  FlushSubnormals() : before_(get()) { set(before_ | kFlush); }
  ~FlushSubnormals() { set(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__) || defined(_M_X64)
  static constexpr uint64_t kFlush = 0x8040;  // MXCSR: flush to zero, and take denormal operands as zero
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t word) { _mm_setcsr(static_cast<unsigned>(word)); }
#elif defined(__aarch64__) && defined(__GNUC__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FPCR.FZ
  static uint64_t get() {
    uint64_t word;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(uint64_t word) { __asm__ __volatile__("msr fpcr, %0" : : "r"(word)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
  const uint64_t before_;
};

// What the caller and the closures of one call share.
class Crew {
 public:
  Crew(int64_t count, std::function<Work()> hire)
      : count_(count), hire_(std::move(hire)), unfinished_(count) {}

  // Claims tasks and runs them until none is left. What they touch is touched only between a claim and its
  // end.
  void work() noexcept {
    Work run;
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      if (!failed_.load(std::memory_order_relaxed)) {
        try {
          const FlushSubnormals flush;
          if (!run) run = hire_();
          run(task);
        } catch (...) {
          fail(std::current_exception());
        }
      }
      // Releases what this thread wrote to the caller, which acquires it in wait().
      if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        const std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  // Waits for the tasks that others have claimed: for threads that are running, never for closures that are
  // not.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return unfinished_.load(std::memory_order_acquire) == 0; });
    // Closures that end later must not be the ones to free it.
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void fail(std::exception_ptr error) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::move(error);
    failed_.store(true, std::memory_order_relaxed);
  }

  const int64_t count_;
  const std::function<Work()> hire_;
  std::atomic<int64_t> next_{0};  // the next task to claim
  std::atomic<int64_t> unfinished_;
  std::atomic<bool> failed_{false};
  std::mutex mutex_;  // for all below
  std::condition_variable finished_;
  std::exception_ptr error_;
};

}  // namespace

void share(int64_t count, int64_t threads, const Schedule& schedule, std::function<Work()> hire) {
  if (count == 0) return;
  const auto crew = std::make_shared<Crew>(count, std::move(hire));
  try {
    for (int64_t i = 0; i < std::min(threads, count) - 1; ++i) schedule([crew] { crew->work(); });
  } catch (...) {
    // Fewer helpers than wanted: slower, that is all. Leaving now would free what those that were scheduled
    // use.
  }
  crew->work();
  crew->wait();
}

char* thread_memory(int64_t bytes) { return arena.reserve(bytes); }

void trim_thread_memory() { arena.trim(); }

}  // namespace pk
