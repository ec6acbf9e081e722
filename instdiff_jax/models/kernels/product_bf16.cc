// Products and convolutions of bfloat16 as XLA custom calls: out = x w + bias, w a matrix or a k×k kernel, and the
// gradients of w and bias. Sums are float32.
//
// A block of sums stays in registers (four of AMX's eight tiles) while kDepth terms are added. Sums of kDepth terms are then added up
// in order, whatever the number of threads. product_bf16.py calls it.
#include "bf16.h"

#if HAS_BF16
#include <sys/syscall.h>
#include <unistd.h>

namespace bf16_product {

using namespace bf16;

constexpr int64_t kDepth = 640;                       // terms that are added in one go
constexpr int64_t kStride = kDepth + kTerms;          // of a row of terms
constexpr int64_t kMostColumns = 512, kMostRows = 512;
constexpr int64_t kMostChannels = 1 << 15;

struct Shape {
  int64_t b, h, w, in, k, out, step;  // batch, height, width, channels, the kernel's side, channels, stride
  int64_t h2() const { return h / step; }
  int64_t w2() const { return w / step; }
  int64_t rows() const { return b * h2() * w2(); }
  int64_t padded() const { return round_up(in, kTerms); }  // channels of a neighbour, in whole tiles
  int64_t terms() const { return k * k * padded(); }
  bool is_product() const { return k == 1 && step == 1; }
};

struct Range {
  int64_t first, last;
  int64_t size() const { return last - first; }
};

// The weights [k, k, in, out] of some terms and columns as `block` wants them.
void load_weights(const Shape& s, const Bf16* weights, Range terms, Range columns, const Bf16* zeros, Bf16* to) {
  for (int64_t i = terms.first; i < terms.last; i += 2) {
    int64_t near = i / s.padded(), c = i % s.padded(), at = i - terms.first;
    const Bf16* row = weights + (near * s.in + c) * s.out;
    Bf16* pairs = to + at / kTerms * 2 * kTileSize + at % kTerms / 2 * kTerms;
    for (int64_t n = columns.first; n < columns.last; n += kTile) {
      int64_t tile = (n - columns.first) / kTile;
      const Bf16* a = c < s.in ? row + n : zeros;
      const Bf16* b = c + 1 < s.in ? row + s.out + n : zeros;
      interleave(a, b, s.out - n, pairs + tile / 2 * terms.size() * kBlock + tile % 2 * kTileSize);
    }
  }
}

// The pixels of rows that follow each other, and their neighbours.
struct Places {
  struct Place {
    int b, i, j;
  } place[kMostRows];
  void of(const Shape& s, int64_t first, int64_t rows) {
    int64_t wide = s.w2(), high = s.h2();
    Place at{int(first / wide / high), int(first / wide % high * s.step), int(first % wide * s.step)};
    for (int64_t r = 0; r < rows; r++) {
      place[r] = at;
      if ((at.j += s.step) < s.w) continue;
      at.j = 0;
      if ((at.i += s.step) < s.h) continue;
      at.i = 0, at.b++;
    }
  }
  // The neighbour `near` of row r; nullptr outside of the picture.
  const Bf16* neighbour(const Shape& s, const Bf16* x, int r, int64_t near) const {
    int64_t i = place[r].i + near / s.k - s.k / 2, j = place[r].j + near % s.k - s.k / 2;
    if (i < 0 || i >= s.h || j < 0 || j >= s.w) return nullptr;
    return x + ((place[r].b * s.h + i) * s.w + j) * s.in;
  }
};

// Some terms of kBlock rows, with zeros outside of the picture and after the last row.
void load_pixels(const Shape& s, const Bf16* x, Range terms, int64_t first, int rows, Places& places, Bf16* to) {
  places.of(s, first, rows);
  for (int64_t t = terms.first, end; t < terms.last; t = end) {
    int64_t near = t / s.padded(), c = t % s.padded();
    end = std::min(terms.last, (near + 1) * s.padded());
    for (int r = 0; r < kBlock; r++) {
      const Bf16* from = r < rows ? places.neighbour(s, x, r, near) : nullptr;
      Bf16* at = to + r * kStride + t - terms.first;
      for (int64_t q = 0; q < end - t; q += kTerms) {
        int64_t count = from ? s.in - c - q : 0;
        __mmask32 mask = count >= kTerms ? ~0u : count > 0 ? (1u << count) - 1 : 0;
        _mm512_store_si512(at + q, _mm512_maskz_loadu_epi16(mask, from + c + q));
      }
    }
  }
}

struct Buffers {
  Aligned<Bf16> left{kBlock * kStride}, lefts{kMostColumns * kStride}, right{kStride * kMostColumns};
  Aligned<float> sums{kMostRows * kMostColumns}, bias{kMostColumns};
  std::vector<const Bf16*> pixels = std::vector<const Bf16*>(kMostRows);
  Places places;
  Aligned<Bf16> zeros{kMostChannels};  // a pixel outside of the picture
};

// A thread keeps its own: 2.5 MB, which take longer to get than a small product.
Buffers* buffers() {
  static thread_local Buffers own;
  return &own;
}

inline void put(const float* sums, int64_t count, float* to) { std::memcpy(to, sums, count * sizeof(float)); }

inline void put(const float* sums, int64_t count, Bf16* to) {
  for (int64_t c = 0; c < count; c += kTile) {
    __mmask16 mask = count - c < kTile ? (1u << (count - c)) - 1 : 0xffff;
    __m512i bits = _mm512_loadu_si512(sums + c);
    // To the nearest, ties to even; a NaN stays one, quiet.
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(_mm512_castsi512_ps(bits), _mm512_castsi512_ps(bits), _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(to + c, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
}

template <typename Out>
void add_bias(const float* sums, const float* bias, int64_t count, Out* to) {
  for (int64_t c = 0; c < count; c += kTile) {
    __mmask16 mask = first_of_16(count - c);
    store(_mm512_add_ps(_mm512_loadu_ps(sums + c), _mm512_maskz_loadu_ps(mask, bias + c)), mask, to + c);
  }
}

template <typename Out>
void multiply(const Shape& s, const Bf16* x, const Bf16* weights, const float* bias, Range rows, Range columns,
              Buffers& with, Out* out) {
  int64_t blocks = divide(s.terms(), kDepth), depth = round_up(divide(s.terms(), blocks), kTerms);
  for (Range terms{0, 0}; terms.first < s.terms(); terms.first = terms.last) {
    terms.last = std::min(s.terms(), terms.first + depth);
    bool first = terms.first == 0, last = terms.last == s.terms();
    load_weights(s, weights, terms, columns, with.zeros.data, with.right.data);
    for (int64_t m = rows.first; m < rows.last; m += kBlock) {
      int count = std::min<int64_t>(kBlock, rows.last - m);
      const Bf16* left = x + m * s.in + terms.first;
      bool in_place = s.is_product() && s.in == s.padded() && count == kBlock;
      if (!in_place) load_pixels(s, x, terms, m, count, with.places, with.left.data), left = with.left.data;
      for (int64_t n = columns.first; n < columns.last; n += kBlock) {
        float* sums = with.sums.data + (m - rows.first) % kMostRows * kMostColumns + n - columns.first;
        block(terms.size(), left, in_place ? s.in : kStride, with.right.data + (n - columns.first) * terms.size(),
              first ? nullptr : sums, sums, kMostColumns);
        if (!last) continue;
        int64_t wide = std::min<int64_t>(kBlock, s.out - n);
        for (int r = 0; r < count; r++) add_bias(sums + r * kMostColumns, bias + n, wide, out + (m + r) * s.out + n);
      }
    }
  }
}

// The gradient's channels `columns` of some rows, a line for each channel, zeros after the last; adds them to `bias`.
void load_gradient(const Shape& s, const Bf16* gradient, Range rows, Range columns, Buffers& with) {
  const Bf16* zeros = with.zeros.data;
  for (int64_t m = columns.first; m < columns.last; m += kTile) {
    __m512 sums = _mm512_load_ps(with.bias.data + m - columns.first);
    for (int64_t p = rows.first; p < rows.last; p += kTerms) {
      alignas(64) Bf16 pairs[kTileSize];
      __m512i turned[kTile];
      for (int i = 0; i < kTile; i++) {
        int64_t row = p + 2 * i;
        const Bf16* from = gradient + row * s.out + m;
        const Bf16 *a = row < rows.last ? from : zeros, *b = row + 1 < rows.last ? from + s.out : zeros;
        interleave(a, b, s.out - m, pairs + i * kTerms);
        turned[i] = _mm512_load_si512(pairs + i * kTerms);
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(turned[i], 16)));
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_and_si512(turned[i], _mm512_set1_epi32(0xffff0000))));
      }
      transpose(turned);
      Bf16* to = with.lefts.data + (m - columns.first) * kStride + p - rows.first;
      for (int i = 0; i < kTile; i++) _mm512_store_si512(to + i * kStride, turned[i]);
    }
    _mm512_store_ps(with.bias.data + m - columns.first, sums);
  }
}

// The terms `terms` of `rows` as `block` wants its right side: pairs of rows beside each other.
void load_neighbours(const Shape& s, const Bf16* x, Range rows, Range terms, Buffers& with) {
  int64_t length = round_up(rows.size(), kTerms), known = -1;
  with.places.of(s, rows.first, rows.size());
  for (int64_t t = terms.first; t < terms.last; t += kTile) {
    int64_t near = t / s.padded(), c = t % s.padded(), panel = (t - terms.first) / kBlock;
    if (near != known) {
      for (int64_t r = 0; r < length; r++) {
        const Bf16* from = r < rows.size() ? with.places.neighbour(s, x, r, near) : nullptr;
        with.pixels[r] = from ? from : with.zeros.data;
      }
      known = near;
    }
    for (int64_t r = 0; r < length; r += 2) {
      Bf16* tile = with.right.data + panel * length * kBlock + (r / kTerms * 2 + (t - terms.first) / kTile % 2) * kTileSize;
      interleave(with.pixels[r] + c, with.pixels[r + 1] + c, s.in - c, tile + r % kTerms / 2 * kTerms);
    }
  }
}

// Writes sums [columns, terms] as the gradient of weights [k, k, in, out].
void store_gradient(const Shape& s, const float* sums, Range columns, Range terms, float* out) {
  for (int64_t m = columns.first; m < std::min(s.out, columns.last); m += kTile)
    for (int64_t t = terms.first; t < terms.last; t += kTile) {
      __m512i part[kTile];
      const float* from = sums + (m - columns.first) * kMostColumns + t - terms.first;
      for (int i = 0; i < kTile; i++) part[i] = _mm512_load_si512(from + i * kMostColumns);
      transpose(part);
      int64_t near = t / s.padded(), c = t % s.padded();
      for (int i = 0; i < kTile && c + i < s.in; i++)
        store(_mm512_castsi512_ps(part[i]), first_of_16(s.out - m), out + (near * s.in + c + i) * s.out + m);
    }
}

// Sums over all rows of gradient[row, m] · x[neighbour of row, t], for channels m and terms t.
void correlate(const Shape& s, const Bf16* x, const Bf16* gradient, Range columns, Range terms, Buffers& with,
               float* of_weights, float* of_bias) {
  std::memset(with.bias.data, 0, kMostColumns * sizeof(float));
  for (Range rows{0, 0}; rows.first < s.rows(); rows.first = rows.last) {
    rows.last = std::min(s.rows(), rows.first + kMostRows);
    int64_t length = round_up(rows.size(), kTerms);
    load_gradient(s, gradient, rows, columns, with);
    load_neighbours(s, x, rows, terms, with);
    for (int64_t m = 0; m < columns.size(); m += kBlock)
      for (int64_t n = 0; n < terms.size(); n += kBlock) {
        float* sums = with.sums.data + m * kMostColumns + n;
        block(length, with.lefts.data + m * kStride, kStride, with.right.data + n * length, rows.first ? sums : nullptr,
              sums, kMostColumns);
      }
  }
  store_gradient(s, with.sums.data, columns, terms, of_weights);
  if (terms.first == 0)
    std::memcpy(of_bias + columns.first, with.bias.data, (std::min(s.out, columns.last) - columns.first) * sizeof(float));
}

Shape shape_of(ffi::Span<const int64_t> x, int64_t size, int64_t in, int64_t k, int64_t out, int64_t step) {
  if (k == 1 && step == 1) return {1, 1, size / in, in, k, out, step};
  return {x[0], x[1], x[2], in, k, out, step};
}

// Cuts `all` into parts of at most `most`, in whole blocks, as many as the threads have use for.
int64_t part(int64_t all, int64_t most, int64_t parts) {
  int64_t least = std::max(divide(all, most), std::min(parts, divide(all, 2 * kBlock)));
  return round_up(divide(all, least), kBlock);
}

void run_product(ffi::ThreadPool& pool, const Shape& s, const Bf16* x, const Bf16* weights, const float* bias, Bf16* out) {
  int64_t threads = std::max<int64_t>(1, pool.num_threads()), total = s.rows(), all = round_up(s.out, kBlock);
  int64_t columns = part(s.out, kMostColumns, 1), across = divide(s.out, columns);
  // With all terms in one go, nothing is kept between blocks of terms.
  int64_t rows = part(total, s.terms() <= kDepth ? 8 * kMostRows : kMostRows, threads), down = divide(total, rows);
  if (down * across < threads) columns = part(s.out, kMostColumns, threads), across = divide(s.out, columns);
  share(pool, down * across, buffers, [=](int64_t item, Buffers& with) {
    Tiles tiles;
    int64_t m = item / across * rows, n = item % across * columns;
    multiply(s, x, weights, bias, {m, std::min(total, m + rows)}, {n, std::min(all, n + columns)}, with, out);
  });
}

void run_gradient(ffi::ThreadPool& pool, const Shape& s, const Bf16* x, const Bf16* gradient, float* of_weights,
                  float* of_bias) {
  int64_t threads = std::max<int64_t>(1, pool.num_threads()), all = round_up(s.out, kBlock);
  int64_t columns = part(s.out, kMostColumns, 1), across = divide(s.out, columns);
  int64_t terms = part(s.terms(), kMostColumns, threads), down = divide(s.terms(), terms);
  share(pool, down * across, buffers, [=](int64_t item, Buffers& with) {
    Tiles tiles;
    int64_t t = item / across * terms, m = item % across * columns;
    correlate(s, x, gradient, {m, std::min(all, m + columns)}, {t, std::min(s.terms(), t + terms)}, with, of_weights,
              of_bias);
  });
}

}  // namespace bf16_product
#endif

typedef ffi::Buffer<ffi::BF16> Bf16Buffer;
typedef ffi::Buffer<ffi::F32> FloatBuffer;

static ffi::Error Bf16Product(ffi::ThreadPool pool, Bf16Buffer x, Bf16Buffer weights, FloatBuffer bias, int64_t step,
                             ffi::Result<Bf16Buffer> out) {
#if HAS_BF16
  auto sizes = weights.dimensions();  // [in, out] or [k, k, in, out]
  size_t n = sizes.size();
  int64_t k = n == 4 ? sizes[0] : 1;
  bf16_product::Shape s = bf16_product::shape_of(x.dimensions(), x.element_count(), sizes[n - 2], k, sizes[n - 1], step);
  bf16_product::run_product(pool, s, bf16::data(x), bf16::data(weights), bias.typed_data(), bf16::data(*out));
  return ffi::Error::Success();
#else
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor has no products of bfloat16");
#endif
}

static ffi::Error Bf16Gradient(ffi::ThreadPool pool, Bf16Buffer x, Bf16Buffer gradient, int64_t step,
                              ffi::Result<FloatBuffer> of_weights, ffi::Result<FloatBuffer> of_bias) {
#if HAS_BF16
  auto sizes = of_weights->dimensions();  // as the weights'
  size_t n = sizes.size();
  int64_t k = n == 4 ? sizes[0] : 1;
  bf16_product::Shape s = bf16_product::shape_of(x.dimensions(), x.element_count(), sizes[n - 2], k, sizes[n - 1], step);
  bf16_product::run_gradient(pool, s, bf16::data(x), bf16::data(gradient), of_weights->typed_data(), of_bias->typed_data());
  return ffi::Error::Success();
#else
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor has no products of bfloat16");
#endif
}

// Whether the kernels were built for this processor: 2 with AMX's tiles, 1 with AVX-512's dot products, else 0. Asks the
// system for the tiles, once for all threads, unless they are not wanted.
extern "C" int InstdiffHasBf16(int tiles_wanted) {
#if HAS_BF16
#ifdef __AMX_BF16__
  constexpr int kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  bf16::has_tiles = tiles_wanted && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#endif
  return bf16::has_tiles ? 2 : 1;
#else
  return 0;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffBf16Product, Bf16Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<FloatBuffer>()
                                  .Attr<int64_t>("step")
                                  .Ret<Bf16Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(InstdiffBf16Gradient, Bf16Gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bf16Buffer>()
                                  .Arg<Bf16Buffer>()
                                  .Attr<int64_t>("step")
                                  .Ret<FloatBuffer>()
                                  .Ret<FloatBuffer>());
