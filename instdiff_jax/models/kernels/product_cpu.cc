// Matrix products and convolutions for CPUs in float32, as an XLA custom call: out = x w, or a k×k convolution of x.
//
// A convolution is the product of its gathered neighbours, which are gathered a tile at a time. A tile of kRows × kColumns
// sums stays in registers while kDepth terms are added (Goto and van de Geijn 2008). Sums of kDepth terms are then
// added up in order, whatever the number of threads and rows. product_cpu.py calls it.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu.h"

namespace product {

#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 sums, 2 weights and a scalar in 32 registers
#else
constexpr int kRows = 6;  // 12, 2 and 1 in 16
#endif
constexpr int kVectors = 2, kColumns = kLanes * kVectors;
constexpr int kDepth = 320;            // the channels of Stable Diffusion are multiples of it
constexpr int kStride = kDepth + 16;   // of a tile's rows
constexpr int kMostColumns = 640;      // kDepth × kMostColumns weights, 0.8 MB, stay in the second cache
constexpr int64_t kMostRows = 73 * 14;

typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4)));

struct Shape {
  int64_t b, h, w, in, k, out, step;  // batch, height, width, channels, the kernel's side, channels, stride
  int64_t h2() const { return h / step; }
  int64_t w2() const { return w / step; }
  int64_t rows() const { return b * h2() * w2(); }
};

// Rows and columns of the result, from `first` to before `last`.
struct Range {
  int64_t first, last;
};

struct Buffers {
  std::vector<float> store;
  float *left, *right;
  Buffers() : store(kRows * kStride + kDepth * kMostColumns + 16) {
    left = store.data() + (64 - reinterpret_cast<uintptr_t>(store.data()) % 64) % 64 / 4;
    right = left + kRows * kStride;
  }
};

// Adds left [kRows, depth] times right [depth, kColumns] to out [rows, columns]; `first`: instead of adding, sets.
inline void tile(int64_t depth, const float* left, const float* right, float* out, int64_t stride, int rows,
                        int columns, bool first) {
  for (int r = 0; r < rows; r++) {
    __builtin_prefetch(out + r * stride, 1);
    __builtin_prefetch(out + r * stride + columns - 1, 1);
  }
  Floats sum[kRows][kVectors];
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kVectors; j++) sum[r][j] = Floats{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < depth; i++) {
    Floats x[kVectors];
    for (int j = 0; j < kVectors; j++) x[j] = *(const Floats*)(right + i * kColumns + j * kLanes);
#pragma GCC unroll 14
    for (int r = 0; r < kRows; r++) {
      Floats y = splat(left[r * kStride + i]);
      for (int j = 0; j < kVectors; j++) sum[r][j] += y * x[j];
    }
  }
  if (rows == kRows && columns == kColumns) {
    for (int r = 0; r < kRows; r++)
      for (int j = 0; j < kVectors; j++) {
        Unaligned& to = *(Unaligned*)(out + r * stride + j * kLanes);
        to = first ? sum[r][j] : sum[r][j] + to;
      }
    return;
  }
  float all[kRows][kColumns];
  for (int r = 0; r < kRows; r++)
    for (int j = 0; j < kVectors; j++) *(Unaligned*)(all[r] + j * kLanes) = sum[r][j];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) out[r * stride + c] = first ? all[r][c] : all[r][c] + out[r * stride + c];
}

// Weights of `depth` inputs and some outputs, by panels of kColumns outputs.
void load_weights(const float* weights, int64_t out, int64_t depth, Range columns, float* to) {
  for (int64_t n = columns.first; n < columns.last; n += kColumns, to += kDepth * kColumns) {
    int64_t count = std::min<int64_t>(kColumns, columns.last - n);
    for (int64_t i = 0; i < depth; i++) {
      float* row = to + i * kColumns;
      if (count == kColumns) {
        std::memcpy(row, weights + i * out + n, kColumns * sizeof(float));
      } else {
        std::memset(row, 0, kColumns * sizeof(float));
        std::memcpy(row, weights + i * out + n, count * sizeof(float));
      }
    }
  }
}

// `depth` channels of a tile's pixels, at the neighbour (y, x) of the kernel; zeros outside of the picture.
void load_pixels(const Shape& s, const float* x, int64_t y_of, int64_t x_of, int64_t depth, int64_t first,
                        int rows, float* to) {
  for (int r = 0; r < kRows; r++, to += kStride) {
    int64_t p = first + r, b = 0, i = 0, j = p;
    if (s.k > 1 || s.step > 1) {
      b = p / (s.w2() * s.h2());
      i = p / s.w2() % s.h2() * s.step + y_of;
      j = p % s.w2() * s.step + x_of;
    }
    if (r < rows && i >= 0 && i < s.h && j >= 0 && j < s.w)
      std::memcpy(to, x + ((b * s.h + i) * s.w + j) * s.in, depth * sizeof(float));
    else
      std::memset(to, 0, depth * sizeof(float));
  }
}

void multiply(const Shape& s, const float* x, const float* weights, Range rows, Range columns, Buffers& with,
                     float* out) {
  for (int64_t near = 0; near < s.k * s.k; near++)
    for (int64_t c = 0; c < s.in; c += kDepth) {
      int64_t depth = std::min<int64_t>(kDepth, s.in - c);
      load_weights(weights + (near * s.in + c) * s.out, s.out, depth, columns, with.right);
      for (int64_t m = rows.first; m < rows.last; m += kRows) {
        int count = std::min<int64_t>(kRows, rows.last - m);
        load_pixels(s, x + c, near / s.k - s.k / 2, near % s.k - s.k / 2, depth, m, count, with.left);
        for (int64_t n = columns.first; n < columns.last; n += kColumns)
          tile(depth, with.left, with.right + (n - columns.first) * kDepth, out + m * s.out + n, s.out, count,
               std::min<int64_t>(kColumns, columns.last - n), near + c == 0);
      }
    }
}

int64_t divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of the parts that rows and columns are cut into: the one of the least estimated time.
void cut(int64_t threads, int64_t all_rows, int64_t all_columns, int64_t* rows, int64_t* columns) {
  int64_t tiles = divide(all_rows, kRows), panels = divide(all_columns, kColumns);
  double least = 0;
  for (int64_t across = divide(panels, kMostColumns / kColumns); across <= panels; across++)
    for (int64_t down = divide(tiles, kMostRows / kRows); down <= tiles; down++) {
      int64_t m = divide(tiles, down) * kRows, n = divide(panels, across) * kColumns;
      int64_t parts = divide(all_rows, m) * divide(all_columns, n);
      // Loading weights takes as long as 26 rows of a part, loading pixels as long as 32 columns (a Xeon).
      double time = divide(parts, threads) * ((m + 26.0) * (n + 32.0));
      if (least == 0 || time < least) least = time, *rows = m, *columns = n;
      if (parts > 4 * threads) break;
    }
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> weights, int64_t step,
                          ffi::ResultBuffer<ffi::F32> out) {
  auto dims = x.dimensions(), sizes = weights.dimensions();
  bool convolution = sizes.size() == 4 && (sizes[0] > 1 || step > 1);  // a 1×1 kernel's is a product
  Shape s{1, 1, 1, sizes[sizes.size() - 2], 1, sizes[sizes.size() - 1], step};
  if (convolution)
    s.b = dims[0], s.h = dims[1], s.w = dims[2], s.k = sizes[0];
  else
    s.w = x.element_count() / s.in;
  int64_t rows, columns, total = s.rows();
  cut(std::max<int64_t>(1, pool.num_threads()), total, s.out, &rows, &columns);
  int64_t across = divide(s.out, columns);
  const float *from = x.typed_data(), *by = weights.typed_data();
  float* to = out->typed_data();
  auto buffers = [] { return std::make_unique<Buffers>(); };
  share(pool, divide(total, rows) * across, buffers, [=](int64_t item, Buffers& with) {
    int64_t m = item / across * rows, n = item % across * columns;
    multiply(s, from, by, {m, std::min(total, m + rows)}, {n, std::min(s.out, n + columns)}, with, to);
  });
  return ffi::Error::Success();
}

}  // namespace product

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffProduct, product::Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("step")
                                  .Ret<ffi::Buffer<ffi::F32>>());
