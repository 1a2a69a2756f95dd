// Sums of values, weighted, over pages; see attention-inl.h.
#include "pages-inl.h"

// Columns of rows of floats, from one place to another: heads whose columns fill no vector go through a buffer of whole ones.
COLD void copy_columns(float* to, i64 to_stride, const float* from, i64 from_stride, i64 rows, i64 columns) {
  for (i64 r = 0; r < rows; r++)
    __builtin_memcpy(to + r * to_stride, from + r * from_stride, size_t(columns) * sizeof(float));
}

// out[r][d0 + v L ...) += sum over positions [begin, end) of weights[r][position - begin] values[position][d0 + v L
// ...), of head h; `fresh`: out counts as 0. `after` is read next.
template <DType T, int R, int V>
static void accumulate_values(const AttendParams& p, i64 h, i64 begin, i64 end, const char* after, const float* weights,
                              i64 ldw, i64 d0, bool fresh, float* out) {
  const i64 Dp = padded_head(p.D), size = element_size(T);
  alignas(64) float buffer[R * V * L];
  const bool whole = d0 + V * L <= p.D;
  const i64 left = p.D > d0 ? p.D - d0 : 0;  // heads are padded
  float* const sums = whole ? out + d0 : buffer;
  const i64 stride = whole ? p.out_stride : V * L;
  if (!whole && !fresh) copy_columns(buffer, stride, out + d0, p.out_stride, R, left);
  F acc[R][V];
  const float* from = sums;
  UNROLL_FOR (int r = 0; r < R; r++, from += stride)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fresh ? zero() : load(from + v * L);
  for (i64 page = begin; page < end; page += kPage) {
    const char* values = values_of<T>(p, h, page);
    const char* next = page + kPage < end ? values_of<T>(p, h, page + kPage) : after;
    const float* w = weights + (page - begin);
    const i64 n = end - page < kPage ? end - page : kPage;
    for (i64 i = 0; i < n; i++) {
      if (R == 1) prefetch_range(next + (i * Dp + d0) * size, V * L * size);
      F x[V];
      UNROLL_FOR (int v = 0; v < V; v++) x[v] = load_cached<T>(values, i * Dp + d0 + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F a = set(w[r * ldw + i]);
        UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, x[v], acc[r][v]);
      }
    }
  }
  float* to = sums;
  UNROLL_FOR (int r = 0; r < R; r++, to += stride)
    UNROLL_FOR (int v = 0; v < V; v++) store(to + v * L, acc[r][v]);
  if (!whole) copy_columns(out + d0, p.out_stride, buffer, stride, R, left);
}

template <DType T, int R>
INL void page_values(const AttendParams& p, i64 h, i64 begin, i64 end, const char* after, const float* weights, i64 ldw,
                     bool fresh, float* out) {
  constexpr int V = kAttendVectors;
  i64 d = 0;
  for (; d + V * L <= padded_head(p.D); d += V * L)
    accumulate_values<T, R, V>(p, h, begin, end, after, weights, ldw, d, fresh, out);
  if constexpr (16 % (V * L) != 0)  // heads are padded to 16
    for (; d < p.D; d += L) accumulate_values<T, R, 1>(p, h, begin, end, after, weights, ldw, d, fresh, out);
}

template <DType T, int R> static void values_of_rows(const AttendRows& rows) {
  const AttendParams& p = rows.p;
  const i64 first = rows.first, end = rows.end, n = rows.n;
  float* out = p.out + rows.row * p.out_stride;
  const i64 stretch = p.heads == 1 ? n : kPage;
  for (i64 at = first; at < end; at += stretch)
    for (i64 h = 0; h < p.heads; h++) {
      const i64 to = at + stretch < end ? at + stretch : end;
      const char* after = h + 1 < p.heads || to == end ? values_of<T>(p, h + 1, at) : values_of<T>(p, 0, to);
      page_values<T, R>(p, h, at, to, after, rows.scores + h * R * n + (at - first), n, at == first,
                        out + h * p.q_heads);
    }
}

template <DType T, int R = int(kAttendRows)> INL void fill_values(Kernels& k) {
  k.page_values[int(T)][R - 1] = values_of_rows<T, R>;
  if constexpr (R > 1) fill_values<T, R - 1>(k);
}
static void fill(Kernels& k) {
  fill_values<DType::f32>(k);
  fill_values<DType::bf16>(k);
  fill_values<DType::f16>(k);
}
