// Scores of queries and a page of keys; see attention-inl.h.
#include "pages-inl.h"

// out[r][0..64) = scale q[r] . keys of a page; `after` is read next.
template <DType T, int R>
static void page_scores(const char* keys, const char* after, const float* q, i64 ldq, i64 D, float scale, float* out,
                        i64 ldo) {
  constexpr i64 kBytes = kPage * element_size(T);
  constexpr int V = kAttendVectors;
  for (i64 c = 0; c < kPage; c += V * L) {
    F acc[R][V];
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
    for (i64 d = 0; d < D; d++) {
      if (R == 1 && c == 0) prefetch_range(after + d * kBytes, kBytes);
      F k[V];
      UNROLL_FOR (int v = 0; v < V; v++) k[v] = load_cached<T>(keys, d * kPage + c + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F a = set(q[r * ldq + d]);
        UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, k[v], acc[r][v]);
      }
    }
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int v = 0; v < V; v++) store(out + r * ldo + c + v * L, acc[r][v] * set(scale));
  }
}

// Page by page: the heads of a page lie side by side.
template <DType T, int R> static void scores_of_rows(const AttendRows& rows) {
  const AttendParams& p = rows.p;
  const float* q = p.q + rows.row * p.q_stride;
  for (i64 at = rows.first; at < rows.end; at += kPage)
    for (i64 h = 0; h < p.heads; h++) {
      const char* after = h + 1 < p.heads         ? keys_of<T>(p, h + 1, at)
                          : at + kPage < rows.end ? keys_of<T>(p, 0, at + kPage)
                                                  : values_of<T>(p, 0, rows.first);
      page_scores<T, R>(keys_of<T>(p, h, at), after, q + h * p.q_heads, p.q_stride, p.D, p.scale,
                        rows.scores + h * R * rows.n + (at - rows.first), rows.n);
    }
}

template <DType T, int R = int(kAttendRows)> INL void fill_scores(Kernels& k) {
  k.page_scores[int(T)][R - 1] = scores_of_rows<T, R>;
  if constexpr (R > 1) fill_scores<T, R - 1>(k);
}
static void fill(Kernels& k) {
  fill_scores<DType::f32>(k);
  fill_scores<DType::bf16>(k);
  fill_scores<DType::f16>(k);
}
