// max(x, 0)^2 (So et al., arXiv 2109.08668), forward and backward: dx = 2 max(x, 0) dy.
// Floor: one read and one write; backward two reads and one write.
#include "pointwise-inl.h"

template <DType T> static void relu_squared_fwd_rows(const ReluSquaredParams& p, i64 begin, i64 end) {
  const bool past = p.out.non_temporal;
  rows_by_twos<T>(p, begin, end, 0, p.C, [&](i64 r, auto rows, i64 width) __attribute__((always_inline)) {
    const void* x[] = {row(p.x, r), row(p.x, r + rows.value - 1)};
    void* y[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
    for_lanes<T>(width, [&](i64 c, i64 n) __attribute__((always_inline)) {
      F v[rows.value];
      UNROLL_FOR (int u = 0; u < rows.value; u++) v[u] = max(zero(), load_as<T>(x[u], c, n));  // nan stays
      UNROLL_FOR (int u = 0; u < rows.value; u++) put_as<T>(past, y[u], c, v[u] * v[u], n);
    });
  });
}
template <DType T> static void relu_squared_bwd_rows(const ReluSquaredParams& p, i64 begin, i64 end) {
  const bool past = p.out.non_temporal;
  rows_by_twos<T>(p, begin, end, 0, p.C, [&](i64 r, auto rows, i64 width) __attribute__((always_inline)) {
    const void* x[] = {row(p.x, r), row(p.x, r + rows.value - 1)};
    const void* dy[] = {row(p.dout, r), row(p.dout, r + rows.value - 1)};
    void* dx[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
    for_lanes<T>(width, [&](i64 c, i64 n) __attribute__((always_inline)) {
      F d[rows.value];
      UNROLL_FOR (int u = 0; u < rows.value; u++) {
        const F v = max(zero(), load_as<T>(x[u], c, n));
        d[u] = load_as<T>(dy[u], c, n) * (v + v);
      }
      UNROLL_FOR (int u = 0; u < rows.value; u++) put_as<T>(past, dx[u], c, d[u], n);
    });
  });
}
static void relu_squared_fwd(const ReluSquaredParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.x.dtype)) return base.relu_squared_fwd(p, row_begin, row_end);
  with_own_dtype(p.x.dtype, [&](auto t) { relu_squared_fwd_rows<t.value>(p, row_begin, row_end); });
  stream_end();
}
static void relu_squared_bwd(const ReluSquaredParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.x.dtype)) return base.relu_squared_bwd(p, row_begin, row_end);
  with_own_dtype(p.x.dtype, [&](auto t) { relu_squared_bwd_rows<t.value>(p, row_begin, row_end); });
  stream_end();
}

static void fill(Kernels& k) {
  k.relu_squared_fwd = relu_squared_fwd;
  k.relu_squared_bwd = relu_squared_bwd;
}
