// What dot-inl.h says, on NEON: with the dot products of I8MM (unsigned by signed), of DOTPROD (signed), or with none.
#if defined(__ARM_FEATURE_MATMUL_INT8)
INL I dot4(I acc, I w, I x) {
  return vreinterpretq_u32_s32(
      vusdotq_s32(vreinterpretq_s32_u32(acc), vreinterpretq_u8_u32(w), vreinterpretq_s8_u32(x)));
}
INL I dot4_small(I acc, I w, I x) { return dot4(acc, w, x); }
#else
INL I dot4_small(I acc, I w, I x) {
  const int8x16_t a = vreinterpretq_s8_u32(w), b = vreinterpretq_s8_u32(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(acc), a, b));
#else  // two products of -128 and 127 still fit into 16 bits
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(acc), vpaddq_s16(low, high)));
#endif
}
INL I dot4(I acc, I w, I x) { return dot4_small(acc, veorq_u32(w, iset(0x80808080u)), x); }
#endif
struct Lookup16 {
  const uint8x16_t table;
  explicit Lookup16(const uint8_t* t) : table(vld1q_u8(t)) {}
  INL_MEMBER I of(I nibbles) const { return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(nibbles))); }
};

INL I spread_bytes(const void* p) { return vreinterpretq_u32_s16(vmovl_s8(vld1_s8(static_cast<const int8_t*>(p)))); }
struct Exponents {
  uint8x16_t table;  // bytes
  explicit Exponents(const char* panel) {
    const uint16x8_t low = vreinterpretq_u16_u32(iload(panel)), high = vreinterpretq_u16_u32(iload(panel + 16));
    table = vcombine_u8(vshrn_n_u16(low, 7), vshrn_n_u16(high, 7));
  }
  INL_MEMBER I of(I x) const {  // an index beyond the table gives 0
    const I index = ior(iand(x, iset(0x000f000fu)), iset(0x80008000u));
    const uint16x8_t bytes = vreinterpretq_u16_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(index)));
    return vreinterpretq_u32_u16(vshlq_n_u16(bytes, 7));
  }
};
