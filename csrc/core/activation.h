// Activations and their derivatives, for scalars (CUDA) and vectors (CPU) alike. A family is closed under differentiation: order k of
// one curve is its k-th derivative, so that an operator that takes an order is its own backward, double backward and so on.
#pragma once
#include "exact_math.h"

namespace genfast {

enum class Act : int32_t { Linear = 0, Relu = 1, Lrelu = 2, Tanh = 3, Sigmoid = 4, Elu = 5, Selu = 6, Softplus = 7, Swish = 8 };
constexpr int kActivations = 9;
constexpr int kHighestOrder = 3;

// u -> clamp(gain * f(u), -clamp, clamp), or its derivative of the given order.
template <class T>
struct Curve {
  Act act;
  int order;
  bool clamped;
  T alpha;  // slope of lrelu below zero
  T gain;
  T clamp;
};

// Order 0 .. kHighestOrder of the activations that bend. Math: exp, expm1 (u <= 0), tanh, sigmoid and log1p_exp(u) = log(1 + e^u) of V.
template <class Math, class T, class V>
GF_HD V smooth_activation(Act act, int order, V u) {
  switch (act) {
    case Act::Tanh: {
      const V t = Math::tanh(u);
      if (order == 0) return t;
      const V d = T(1) - t * t;
      return order == 1 ? d : order == 2 ? T(-2) * t * d : d * (T(6) * t * t - T(2));
    }
    case Act::Elu:
    case Act::Selu: {
      const T scale = act == Act::Elu ? T(1) : T(1.0507009873554804934193349852946);
      const T bent = act == Act::Elu ? T(1) : T(1.0507009873554804934193349852946 * 1.6732632423543772848170429916717);
      if (order == 0) return u > T(0) ? scale * u : bent * Math::expm1(u);
      return u > T(0) ? V{} + (order == 1 ? scale : T(0)) : bent * Math::exp(u);
    }
    case Act::Softplus:
      // Above 20 it is the identity, as in torch: exactly, with all its derivatives.
      if (order == 0) return u > T(20) ? u : Math::log1p_exp(u);
      break;
    default:
      break;
  }
  const V s = Math::sigmoid(u), d = s * (T(1) - s);
  if (act == Act::Swish) {
    if (order == 0) return s * u;
    if (order == 1) return s + u * d;
    const V d2 = d * (T(1) - T(2) * s);
    return order == 2 ? T(2) * d + u * d2 : T(3) * d2 + u * d * (T(1) - T(6) * d);
  }
  const int k = act == Act::Softplus ? order - 1 : order;
  const V v = k == 0 ? s : k == 1 ? d : k == 2 ? d * (T(1) - T(2) * s) : d * (T(1) - T(6) * d);
  return act == Act::Softplus ? (u > T(20) ? V{} + (order == 1 ? T(1) : T(0)) : v) : v;
}

// Order 0 and up of linear, relu and lrelu. At zero relu has slope 0 and lrelu slope alpha, as in torch.
template <class T, class V>
GF_HD V straight_activation(const Curve<T>& c, int order, V u) {
  if (order == 0) {
    if (c.act == Act::Linear) return u;
    return c.act == Act::Relu ? (u < T(0) ? V{} : u) : (u > T(0) ? u : c.alpha * u);
  }
  if (order > 1) return V{};
  if (c.act == Act::Linear) return V{} + T(1);
  return u > T(0) ? V{} + T(1) : V{} + (c.act == Act::Relu ? T(0) : c.alpha);
}

template <class Math, class T, class V>
GF_HD V activation_at(const Curve<T>& c, int order, V u) {
  return c.act <= Act::Lrelu ? straight_activation(c, order, u) : Math::smooth(c.act, order, u);
}

// The curve at u. Past the clamp every derivative is zero; at the clamp it is the activation's own, as in torch.
template <class Math, class T, class V>
GF_HD V curve_at(const Curve<T>& c, V u) {
  V v = c.gain * activation_at<Math>(c, c.order, u);
  if (c.clamped) {
    if (c.order == 0) {
      v = v < -c.clamp ? V{} - c.clamp : v;
      v = v > c.clamp ? V{} + c.clamp : v;
    } else {
      const V w = c.gain * activation_at<Math>(c, 0, u);
      v = w >= -c.clamp ? v : V{};
      v = w <= c.clamp ? v : V{};
    }
  }
  return v;
}

// factor * slope, where a slope of zero lets nothing pass, infinities and NaNs neither.
template <class V>
GF_HD V times_slope(V factor, V slope) {
  return slope == V{} ? V{} : factor * slope;
}

}  // namespace genfast
