// What the CPU's kernels share: vectors as wide as the processor's, and work shared by the threads of XLA's pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
static inline Floats splat(float x) { return x - Floats{}; }

// 2^x for x <= 0; 0 below the normal numbers; NaN stays NaN.
static inline Floats exp2_of_negative(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Ints tiny = x < splat(-125.5f);
  x = tiny ? splat(-125.5f) : x;
  Floats rounded = x + magic;
  Floats f = x - (rounded - magic);
  // The polynomial of degree 6 with the least relative error on [-0.5, 0.5]; rounded to float32, 1.0e-7.
  Floats y = splat(1.53458008e-4f);
  y = y * f + splat(1.33999311e-3f);
  y = y * f + splat(9.61848907e-3f);
  y = y * f + splat(5.55032864e-2f);
  y = y * f + splat(2.40226462e-1f);
  y = y * f + splat(6.93147182e-1f);
  y = y * f + splat(1.0f);
  Ints bits = (Ints)y + ((Ints)rounded << 23);
  return tiny ? splat(0.0f) : (Floats)bits;
}

struct Work {
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

// Runs `item(i, buffers)` for all i < items; every thread takes the next until none is left, with buffers of its own.
template <typename MakeBuffers, typename Item>
static void share(ffi::ThreadPool& pool, int64_t items, MakeBuffers make_buffers, Item item) {
  auto work = std::make_shared<Work>();
  auto run = [=] {
    decltype(make_buffers()) buffers{};
    for (int64_t i; (i = work->next++) < items;) {
      if (!buffers) buffers = make_buffers();
      item(i, *buffers);
      if (++work->done == items) {
        std::lock_guard<std::mutex> lock(work->mutex);
        work->finished.notify_all();
      }
    }
  };
  int64_t threads = std::max<int64_t>(1, pool.num_threads());
  for (int64_t i = 1; i < std::min(threads, items); i++) pool.Schedule(decltype(run)(run));
  run();  // this thread works too; one that starts too late finds nothing to do
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == items; });
}
