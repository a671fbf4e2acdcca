// Runs a compiled kernel over the blocks of an ensemble, and keeps compiled kernels. Knows neither XLA nor
// Python.
//
// A kernel integrates one block of `width` lanes. A buffer with lanes is an (elements, lanes) array, lanes
// last; the kernel gets the address of its block's first lane in element 0, and the distance, in items, from
// one element to the next.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tasks.h"

namespace pk {

using Kernel = void (*)(void* const* pointers, const int64_t* strides);

// Part of the interface with Python, as are the dtype codes below: bump pk_abi() with them.
enum class Role : int64_t {
  kInput = 0,   // with lanes; missing lanes of the last block repeat the last lane
  kSilent = 1,  // with lanes; missing lanes are zero
  kShared = 2,  // an input without lanes
  kResult = 3,  // with lanes
  kSum = 4,     // a result without lanes: every block stores its part, the parts are added
  kScratch = 5  // with lanes, private to a running block, contents undefined
};

enum class Number : int64_t { kFloat32 = 0, kFloat64 = 1, kInt32 = 2, kInt64 = 3 };  // what a sum can be of

struct Row {
  Role role;
  int64_t elements;  // per lane, or in all where there are no lanes
  int64_t item;      // bytes
  int64_t dtype;     // a Number if the role is kSum
};

constexpr size_t kRowNumbers = 4;     // a row in the layout: role, elements, item, dtype
constexpr int64_t kMostTasks = 1024;  // enough to balance divergent blocks, few enough to claim one by one

// How an ensemble is cut into blocks and tasks, and where a row lies in a worker's memory.
//
// Everything here follows from the layout, `lanes` and `width`, so the order in which sums are added does not
// depend on threads.
struct Plan {
  // Throws std::invalid_argument for a layout that makes no sense.
  Plan(const int64_t* layout, size_t numbers, int64_t lanes, int64_t width);

  std::vector<Row> rows;
  size_t buffers;  // the rows before the scratch rows: those whose memory the caller brings
  int64_t lanes;
  int64_t width;
  int64_t blocks;
  int64_t blocks_per_task;
  int64_t tasks;

  // A worker's memory: the sums of the running block (sums_bytes), the sums of the running task (sums_bytes),
  // scratch, and for the worker that meets a last block with missing lanes, padded copies of everything with
  // lanes.
  std::vector<int64_t>
      offsets;  // of a row's scratch or copy in that memory; of a kSum row in either part for sums
  int64_t sums_bytes;
  int64_t bytes;
  int64_t padded_bytes;  // with the copies
};

// Runs all blocks, on the calling thread and on at most `threads` - 1 closures given to `schedule`. `buffers`
// holds the addresses of the first `plan.buffers` rows. Returns when all blocks are done and nothing touches
// the buffers any more; closures that have not begun by then do nothing when they do. `poison` fills results
// and scratch with 0xFF before a block runs. Throws std::bad_alloc when there is no memory for scratch.
void run(Plan plan, Kernel kernel, void* const* buffers, int64_t threads, const Schedule& schedule,
         bool poison);

// A compiled kernel: in use while anyone but the registry holds it.
struct Code {
  void* address = nullptr;
  mutable std::atomic<int64_t> used{0};  // the registry's clock at the last use
};

// Returns the address of the compiled kernel, throws when there is none.
using Compile = std::function<void*(std::string_view key, std::string_view ir)>;

// The compiled kernels of the process by key (a hash of their content), the least recently used dropped.
//
// The code belongs to whoever compiled it, who learns from `retired` what may be freed. A key is never
// reported while a kernel with this key is in use or being compiled. Whoever compiles must serialise its
// answers with `retired` and the freeing after it: then what it returns for a key that it still holds is
// never freed by an earlier report.
class Registry {
 public:
  // The kernel of this key. Compiles it if need be, once however many threads ask: the others wait for the
  // first, and share its failure (std::runtime_error), which is not remembered.
  std::shared_ptr<const Code> get(std::string_view key, std::string_view ir, const Compile& compile);

  void set_capacity(int64_t capacity);
  int64_t resident() const;

  // Writes the keys of dropped kernels that are no longer in use, separated by newlines, and forgets them.
  // Keys for which there is no room stay. Returns the bytes written.
  int64_t retired(char* buffer, int64_t capacity);

  // For pthread_atfork.
  void before_fork();
  void after_fork_in_parent();
  void after_fork_in_child();

 private:
  struct Pending {
    bool done = false;
    std::string error;
    std::shared_ptr<const Code> code;
  };

  void keep(const std::string& key, std::shared_ptr<const Code> code);
  void evict();

  mutable std::shared_mutex mutex_;
  std::condition_variable_any compiled_;
  std::atomic<int64_t> clock_{0};
  int64_t capacity_ = 256;
  std::unordered_map<std::string, std::shared_ptr<const Code>> resident_;
  std::unordered_map<std::string, std::shared_ptr<Pending>> pending_;
  std::unordered_map<std::string, std::weak_ptr<const Code>> evicted_;  // dropped, not yet reported
};

}  // namespace pk
