// Operations that take each row of a batch by itself: norms, activations, rotary positions.

#include "quantise.inl"

namespace tokenspeed::cpu {
namespace {

// A few sums side by side hide the latency of an addition.
constexpr int norm_chains = 4;

void add_rms_norm(const AddRmsNorm& call, std::int64_t row) {
    const void* const x = call.x.at(row);
    void* const stream = call.stream.data == nullptr ? nullptr : call.stream.at(row);
    Floats sums[norm_chains];
    for (Floats& sum : sums) sum = splat(0.0f);
    each_vector(call.x.columns, [&](std::int64_t at, std::int64_t count) {
        Floats value = load_part(x, call.x.type, at, count);
        if (call.residual.data != nullptr) {
            value = add(value, load_part(call.residual.at(row), Element::f32, at, count));
        }
        if (stream != nullptr) store_part(value, stream, Element::f32, at, count);
        Floats& sum = sums[at / lanes % norm_chains];
        sum = fma(value, value, sum);
    });
    const float squares = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    const float mean = squares / static_cast<float>(call.x.columns);
    const Floats scale = splat(1.0f / __builtin_sqrtf(mean + call.epsilon));
    write_row(call.y, row, 0, call.x.columns,
              [&](std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
                  const Floats value = stream != nullptr
                                           ? load_part(stream, Element::f32, at, count)
                                           : load_part(x, call.x.type, at, count);
                  const Floats weight = load_part(call.weight, call.weight_type, at, count);
                  return mul(mul(value, scale), weight);
              });
}

template <Activation activation>
void gate(const Gated& call, std::int64_t row, std::int64_t from, std::int64_t to) {
    const std::int64_t features = call.y.rows.columns;
    const void* const x = call.x.at(row);
    write_row(call.y, row, from, to,
              [&](std::int64_t at, std::int64_t count) __attribute__((always_inline)) {
                  const Floats gate = load_part(x, call.x.type, at, count);
                  Floats up = load_part(x, call.x.type, features + at, count);
                  Floats active;
                  if constexpr (activation == Activation::silu) {
                      active = mul(gate, sigmoid(gate));
                  } else if constexpr (activation == Activation::limited) {
                      const Floats most = splat(call.limit);
                      const Floats held = min(gate, most);
                      active = mul(held, sigmoid(mul(splat(1.702f), held)));
                      up = add(max(min(up, most), splat(-call.limit)), splat(1.0f));
                  } else {
                      // Hendrycks and Gimpel 2016, with tanh for the error function.
                      const Floats cube = mul(mul(gate, gate), gate);
                      const Floats inner = fma(cube, splat(0.044715f), gate);
                      const Floats curve = tanh(mul(inner, splat(0.797884561f)));
                      active = mul(mul(splat(0.5f), gate), add(splat(1.0f), curve));
                  }
                  return mul(active, up);
              });
}

void gate(const Gated& call, std::int64_t row, std::int64_t from, std::int64_t to) {
    if (call.activation == Activation::silu) {
        gate<Activation::silu>(call, row, from, to);
    } else if (call.activation == Activation::limited) {
        gate<Activation::limited>(call, row, from, to);
    } else {
        gate<Activation::gelu_tanh>(call, row, from, to);
    }
}

void rotate(const Rotation& call, std::int64_t token) {
    const std::int64_t half = call.head_dim / 2;
    const float* const cosines = call.cosines + token * half;
    const float* const sines = call.sines + token * half;
    for (std::int64_t head = 0; head < call.heads; ++head) {
        const auto element = size_bytes_of(call.x.type);
        const auto* const x =
            static_cast<const std::byte*>(call.x.at(token)) + head * call.head_dim * element;
        auto* const y = static_cast<std::byte*>(call.y.at(token)) + head * call.head_dim * element;
        each_vector(half, [&](std::int64_t at, std::int64_t count) {
            const Floats first = load_part(x, call.x.type, at, count);
            const Floats second = load_part(x, call.x.type, half + at, count);
            const Floats cosine = load_part(cosines, Element::f32, at, count);
            const Floats sine = load_part(sines, Element::f32, at, count);
            // first cos - second sin, and second cos + first sin.
            const Floats minus = sub(splat(0.0f), second);
            store_part(fma(minus, sine, mul(first, cosine)), y, call.y.type, at, count);
            store_part(fma(first, sine, mul(second, cosine)), y, call.y.type, half + at, count);
        });
    }
}

}  // namespace
}  // namespace tokenspeed::cpu
