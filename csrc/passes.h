// Runs a compiled step kernel over a state in memory. Knows neither XLA nor Python.
//
// A state is an array (rows, columns). A kernel runs over a piece of one row: `count` vectors of `width`
// columns. What is left of a row, less than a vector, is copied to a vector of its own and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "blocks.h"

namespace pk {

// What a buffer is to a kernel. Part of the interface with Python: bump pk_abi() with it.
enum class Part : int64_t {
  kState = 0,        // an operand (rows, columns); columns missing in the last vector are zero
  kRepeated = 1,     // the same; missing columns repeat the last one
  kRow = 2,          // an operand (rows,)
  kSlots = 3,        // an operand (slots, rows, columns), of which a row's slot is read
  kReplaced = 4,     // an operand whose memory is a result's: the kernel gets the result only
  kResult = 5,       // a result (rows, columns)
  kSlotsResult = 6,  // a result (slots, rows, columns), of which a row's slot is written
  kSum = 7           // a result (rows,): every piece stores its part, the parts are added in order
};

struct Strip {
  Part part;
  int64_t item;   // bytes
  int64_t slots;  // of a buffer (slots, rows, columns), also if it is replaced; else 0
  int64_t extra;  // of kSlots and kSlotsResult: the number of the int32 kRow operand that holds each row's
                  // slot; of a kSum: its Number; of a kResult: whether its memory is an operand's
};

// How a state is cut into pieces and tasks. Everything follows from the arguments, so the order in which sums
// are added does not depend on threads.
struct PassPlan {
  // Throws std::invalid_argument for a layout that makes no sense. `piece`: columns of a piece, a multiple of
  // `width`.
  PassPlan(const int64_t* layout, size_t numbers, int64_t rows, int64_t columns, int64_t width,
           int64_t piece);

  std::vector<Strip> strips;
  int64_t rows;
  int64_t columns;
  int64_t width;
  int64_t piece;
  int64_t pieces_per_row;
  int64_t pieces_per_task;
  int64_t tasks;

  // Whether all results begin at vectors' addresses, in every row: `streaming` kernels need that.
  bool aligned(void* const* buffers) const;

  // Elements that a buffer has.
  int64_t elements(const Strip& strip) const;
};

// The same kernel twice: `streaming` writes whole vectors past the caches, and may be null; it is used only
// where the results are `aligned`, and never for what is left of a row, which is read back at once.
struct PassKernel {
  Kernel plain;
  Kernel streaming = nullptr;
};

// A kernel gets the address of `count` (int32) first, then those of the buffers' pieces but for kReplaced;
// strides as in blocks.h: 0 for what has no columns, else `width`. Threads and the end as in `run`.
void run_pass(const PassPlan& plan, PassKernel kernel, void* const* buffers, int64_t threads,
              const Schedule& schedule, bool poison);

}  // namespace pk
