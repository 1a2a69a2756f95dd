// The activation of the MLP, on fp32 lanes. GELU is that of csrc/cpu/gelu-inl.h.
#include "../cpu/gelu-inl.h"

INL F sigmoid(F x) { return reciprocal(set(1.f) + exp(zero() - x)); }

// tanh(x): x + x^3 P(x^2) for |x| < 0.625, P a minimax fit of the relative error (0.8 ulp), and 1 - 2 / (e^2|x| + 1) beyond.
INL F tanh(F x) {
  const F s = x * x, a = abs(x);
  F p = set(-0x1.6f420cp-8f);
  p = fma(p, s, set(0x1.50b826p-6f));
  p = fma(p, s, set(-0x1.b806a6p-5f));
  p = fma(p, s, set(0x1.1105a2p-3f));
  p = fma(p, s, set(-0x1.55552cp-2f));
  const F far = set(1.f) - set(2.f) * reciprocal(exp(a + a) + set(1.f));
  return select(ge(a, set(0.625f)), copysign(far, x), fma(x * s, p, x));
}

template <Epilogue EPILOGUE> INL F activate(F z) {
  if constexpr (EPILOGUE == Epilogue::gelu_tanh) return gelu_value<DType::f32, true>(z);
  if constexpr (EPILOGUE == Epilogue::gelu) return gelu_value<DType::f32, false>(z);
  if constexpr (EPILOGUE == Epilogue::relu) return max(zero(), z);  // z where it is nan
  if constexpr (EPILOGUE == Epilogue::silu) return z * sigmoid(z);
  if constexpr (EPILOGUE == Epilogue::quick_gelu) return z * sigmoid(set(1.702f) * z);
  if constexpr (EPILOGUE == Epilogue::tanh) return tanh(z);
  if constexpr (EPILOGUE == Epilogue::relu_squared) return max(zero(), z) * max(zero(), z);
  return z;
}
