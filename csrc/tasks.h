// Numbered tasks shared among threads. Knows neither XLA nor Python, nor what a task does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace pk {

// Puts a closure where another thread may run it, at once, later or never.
using Schedule = std::function<void(std::function<void()>)>;

using Work = std::function<void(int64_t task)>;

// Runs the tasks 0, 1, ..., `count` - 1, claimed one after the other, on the calling thread and on at most
// `threads` - 1 closures given to `schedule`. Every thread that gets a task calls `hire` once and keeps what
// it returns until it finds no more. Returns when all tasks are done; closures that have not begun by then do
// nothing when they do. What a task throws is thrown here, and the tasks that have not begun are left out.
//
// While a task runs, results and operands too small for a normal number are zero: that is how XLA computes on
// CPUs, and threads must not differ, or a number's bits would depend on which of them took it.
void share(int64_t count, int64_t threads, const Schedule& schedule, std::function<Work()> hire);

// Memory of the calling thread that stays from call to call, so that a call costs no page faults: at least
// this many bytes, aligned to a cache line, contents undefined. One worker at a time may use it: kernels
// never call back. Throws std::bad_alloc.
char* thread_memory(int64_t bytes);

// Gives the calling thread's memory back if it is so much that it should not stay.
void trim_thread_memory();

constexpr int64_t kAlignment = 64;  // a cache line, and the widest vector

}  // namespace pk
